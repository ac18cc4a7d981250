"""
What sample.py does around the methods of parts.handle.Handle, here m: what they are asked, and what is shown.
s is always its settings.
"""

import json
import shlex
import sys
from contextlib import closing
from functools import partial

from configurator import UserError
from plumbing import show
from plumbing.checkpoint import find_checkpoint
from plumbing.files import check_output, to_json, write_atomically
from plumbing.rows import Tally
from plumbing.score import total
from plumbing.text import decode, encode, read_lines, stop_at, typed, until_end, visible

SHOWN = 50                  # so many samples are printed; --save keeps all of them


def open_checkpoints(s, load):
    """The Handle of what the settings name. load: of sample.py."""
    paths = [name and find_checkpoint(name, s.out_dir, lambda line: None)
             for name in (s.init_from, s.merge_from, s.remask_from)]
    for output in (s.save, s.html, s.export):
        check_output(output, *paths)
    return load(s.init_from, out_dir=s.out_dir, merge=s.merge_from, merge_weight=s.merge_weight,
                judge=s.remask_from, frozen=not s.export, device=s.device, dtype=s.dtype,
                attention=s.attention, compile=s.compile)


def saved(line):
    """A line that --save wrote -> dict of its text and tokens. Raises UserError for any other."""
    try:
        sample = json.loads(line)
        return dict(text=sample['text'] + '', tokens=sample.get('tokens'))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UserError("expected a JSON object with a 'text', as --save writes them") from None


def given_texts(s, m):
    """
    What --text says, or the lines of --file, as the dataset's task.py gathers them: texts, or dicts of saved
    samples, a list.

    Lines that cannot be used are named, left out and counted in s. Raises UserError if there are no others.
    """
    if not s.file:
        return [typed(m.meta, s.text)]
    check = m.given if s.task == 'score' else partial(m.canvas, s.task, hole=s.hole, mask=s.mask)
    found, wrong, name = [], [], 'standard input' if s.file == '-' else s.file
    lines = read_lines(s.file)
    if hasattr(m.task, 'gather') and not s.file.endswith('.jsonl'):
        lines = m.task.gather(lines, m.meta['block_size'])
    for number, line in lines:
        try:
            text = saved(line) if s.file.endswith('.jsonl') else line
            check(text if s.task == 'score' or not isinstance(text, dict) else text['text'])
            found.append(text)
        except UserError as error:
            wrong.append(f'{name}, line {number}: {error}')
    if not found:
        others = f' (none of the {len(wrong)} lines can be used)' if len(wrong) > 1 else ''
        raise UserError(wrong[0] + others)
    if wrong:
        print(*wrong, sep='\n')
        s.left_out = f'{len(wrong)} of {len(found) + len(wrong)} lines of {name} were left out, see above'
    return found


class Stream(Tally):
    """
    A Tally that prints texts while they are written: of the first one what stays, then of the second, ...

    m: the Handle that writes them, all with this prompt; stop: the text before which they end, or None. What
    is printed is what show_samples would print.
    """

    def __init__(self, m, prompt, stop):
        super().__init__(m.meta['vocab_size'], m.meta['pad'])
        self.m, self.stop, self.number = m, stop or '', 0           # number: of the text, row: in its batch
        self.given = len(decode(m.meta, encode(m.meta, prompt))[0])
        self.next_text(0)

    def next_text(self, row):
        self.row, self.text, self.read, self.printed = row, '', 0, 0     # read: tokens, printed: characters

    def follow(self, work):
        """What work(trace=self) returns, when all of it is printed."""
        try:
            found = work(trace=self)
        except BaseException:
            print()                                                 # what is said next has a line of its own
            raise
        self.begin(None)
        return found

    def begin(self, fixed):
        if self:
            self.settle(self[-1])                                   # the batch before is complete
        self.next_text(0)
        return super().begin(fixed)

    def append(self, canvas):
        if not self:
            self.settle(canvas)                                     # the prompt
        super().append(canvas)

    def settle(self, canvas):
        """Prints what is new in canvas (B, T), of which all but the masks stays."""
        while self.row < len(canvas) and self.number < SHOWN:
            row = canvas[self.row]
            known = int((row != self.mask).cummin(0).values.sum())  # tokens left of the first mask
            if known < len(row):
                return self.show(row[self.read:known].tolist())
            self.finish(row.tolist())

    def show(self, ids):
        """Prints the text of the next ids, a list, but for what may turn out to be something else."""
        meta, new = self.m.meta, decode(self.m.meta, ids)[0]
        if ids and ids[-1] not in (meta['eos'], meta['pad']) and new[-1:] != '\ufffd':     # half a character
            self.text, self.read = self.text + new, self.read + len(ids)
        ready = len(self.text)
        if self.stop:                                               # or what may be the beginning of it
            at = self.text.find(self.stop, self.given)
            ready = at if at >= 0 else max(self.given, ready - len(self.stop) + 1)
        print(visible(self.text[self.printed:ready]), end='', flush=True)
        self.printed = max(self.printed, min(ready, len(self.text)))

    def finish(self, ids):
        """Prints what is left of a text, whose ids (T,) are complete."""
        meta = self.m.meta
        sample = dict(text=decode(meta, ids)[0], tokens=until_end(meta, ids))
        if self.stop:
            stop_at(meta, [sample], self.stop, self.given)
        told = show.report(sample, meta, self.m.task)
        print(told[len(visible(self.text[:self.printed])):], flush=True)
        self.number += 1
        self.next_text(self.row + 1)


def check_order(s, m, rules):
    """Raises UserError if what the settings ask for is not written from left to right, for --stream."""
    canvas, _ = m.start(1, s.prompt, s.length)
    chosen = m.choose('generate', [], canvas, preset=s.preset, **rules)
    T = m.model.config.block_size
    plain = chosen['ar_prefix'] >= T and chosen['remask'] == 'none'
    in_windows = canvas.size(1) > T and not chosen.get('rounds')
    if hasattr(m.task, 'picture'):
        raise UserError(f"--stream: a text of {m.meta['name']} is shown as a picture, when it is complete")
    if not (plain or in_windows or chosen['remask'] == 'causal' or chosen.get('block_length')):
        raise UserError('--stream prints what is written from left to right, and this sampler writes in any '
                        'order: use --remask=causal, --block_length=16 if the checkpoint was trained in '
                        f'blocks, or in text without an end a --length above {T}')


def ask(s, m, rules, live):
    """
    The Samples that the settings ask for, of several presets the first of each, then the second. What each
    has counted goes to s.counts, see Tally.

    rules: those of How that were chosen, None for the others. live: makes a parts.handle.Live for --animate:
    samples are written one by one, and each step is shown at once.
    """
    kept = s.animate or s.html or s.task == 'repair'                # the steps
    how = dict(rules, seed=s.seed, batch_size=1 if s.animate else s.batch_size,
               progress=not (s.animate or s.stream))
    s.counts = []
    if s.task == 'generate':
        s.prompt = typed(m.meta, s.prompt)
        s.stop = s.stop and typed(m.meta, s.stop)
        if s.stream:
            check_order(s, m, rules)
        work = partial(m.generate, s.num_samples or 10, s.prompt, s.length, s.stop, **how)
    else:
        texts = given_texts(s, m)
        if s.task == 'score':
            return m.score(texts)
        texts = [text['text'] if isinstance(text, dict) else text for text in texts]
        more = dict(edit=dict(words=s.mask), infill=dict(hole=s.hole)).get(s.task, {})
        work = partial(getattr(m, s.task), texts, num=s.num_samples, **more, **how)
    found = []
    for preset in (s.preset or '').split(','):
        mine = partial(work, preset=preset or None)
        if s.animate:
            watched = live()
            with closing(m.frames(watched, mine)) as steps:         # Ctrl-C ends the work as well
                show.animate(steps)
        tally = Tally(m.meta['vocab_size'], m.meta['pad'])
        if s.animate:
            found.append(watched.result)
        elif s.stream:
            tally = Stream(m, s.prompt, s.stop)
            found.append(tally.follow(mine))
        else:
            found.append(mine(trace=bool(kept) or tally))
        for sample in found[-1] if kept else ():
            tally.clear()
            for canvas in sample.steps:
                tally.append(canvas)
        s.counts.append((found[-1][0].rules, tally.numbers()))
    return [sample for group in zip(*found) for sample in group]


def did(s, samples, nfe, seconds):
    """What the sampler did for samples of the same rules, a line. nfe: passes each; seconds: 0, not said."""
    num, rules = len(samples), samples[0].rules
    counts = [numbers for other, numbers in s.counts if other == rules]
    drafted, refused, again = (f'{sum(numbers) / num:.1f}' for numbers in zip(*counts))
    words = [f'{nfe:.1f} passes (NFE)']
    if rules.get('remask') == 'causal':
        words += [f'{drafted} tokens drafted ahead', f'{refused} of them taken back']
    elif (rules.get('remask', 'none') != 'none' or rules.get('redrafts')) and not rules.get('rounds'):
        words.append(f'{again} tokens taken back')
    speed = f'; {num / seconds:.1f} samples/s' if seconds else ''
    if seconds > num:
        speed = f'; {seconds / num:.1f} s a sample'
    return f"{'1 sample' if num == 1 else f'{num} samples, each'}: {', '.join(words)}{speed}"


def show_samples(s, m, samples, seconds):
    """Prints the samples, plays them, writes the page and the file: whatever was asked for."""
    if s.task == 'score' and s.html and not m.can.detects:
        raise UserError('--html shows p(WRONG) of a text, and this checkpoint was not trained to find wrong '
                        'tokens: use --task=score without it, or train with training_type joint')
    if s.score and s.task != 'score':
        m.judge_all(samples)
    groups = {}                                                     # the samples of each preset
    for sample in samples:
        groups.setdefault(show.words_of(sample.rules), []).append(sample)
    for sample in samples[:0 if s.stream else SHOWN]:
        if len(groups) > 1:
            print(f'{show.words_of(sample.rules)}:')
        print(sample.report())
    if len(samples) > SHOWN:
        hint = '' if s.save else ' (--save=FILE.jsonl keeps them all)'
        print(f'... and {len(samples) - SHOWN} more{hint}')
    if s.task == 'score' and len(samples) > 1:
        print(total(samples, m.meta))
    print()
    foot = []
    seconds = 0 if s.animate or len(groups) > 1 else seconds
    for rules, group in groups.items() if s.task != 'score' else ():
        nfe = sum(sample.nfe for sample in group) / len(group)
        print(f'{rules}: ' * (len(groups) > 1) + did(s, group, nfe, seconds))
        foot.append(f'{rules}; {nfe:.0f} passes a sample')
    print(*s.said, *m.said, *[*groups][:len(foot) == 1], sep='\n')
    if s.html:
        foot += [m.said[0], shlex.join(['python', *sys.argv]), f'seed {s.seed}']
        show.write_page(s.html, f"{m.meta['name']}: {s.task}", foot, m.stories(samples[:20]), m.look)
        print(f'written to {s.html}')
    if s.save:
        lines = [{key: value for key, value in sample.items() if key != 'trace'} for sample in samples]
        write_atomically(s.save, ''.join(to_json(line, ensure_ascii=False) + '\n' for line in lines))
        print(f'written to {s.save}')
    if hasattr(s, 'left_out'):
        print(s.left_out)
