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
from plumbing.text import read_lines, typed


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


def ask(s, m, rules, live):
    """
    The Samples that the settings ask for, of several presets the first of each, then the second. What each
    has counted goes to s.counts, see Tally.

    rules: those of How that were chosen, None for the others. live: makes a parts.handle.Live for --animate:
    samples are written one by one, and each step is shown at once.
    """
    kept = s.animate or s.html or s.task == 'repair'                # the steps
    how = dict(rules, seed=s.seed, batch_size=1 if s.animate else s.batch_size, progress=not s.animate)
    s.counts = []
    if s.task == 'generate':
        s.prompt = typed(m.meta, s.prompt)
        s.stop = s.stop and typed(m.meta, s.stop)
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
        found.append(watched.result if s.animate else mine(trace=bool(kept) or tally))
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
    elif rules.get('remask', 'none') != 'none' and not rules.get('rounds'):
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
    for sample in samples[:50]:
        if len(groups) > 1:
            print(f'{show.words_of(sample.rules)}:')
        print(sample.report())
    if len(samples) > 50:
        print(f'... and {len(samples) - 50} more' + ('' if s.save else ' (--save=FILE.jsonl keeps them all)'))
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
