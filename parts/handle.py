"""
A checkpoint as an object, for Python and for the commands of sample.py, which use these very methods.

    from sample import load
    m = load('out-text')
    print(*m.generate(3, prompt='ROMEO:', length=100), sep='\\n\\n')
    m.repair('I will nqt go wikh thee').show()

Nothing here prints, but for Sample.show. What cannot be done is a UserError. The examples below are of a
network of arithmetic.
"""

import html
import os
import queue
import shlex
import sys
import threading
from functools import cached_property, partial
from itertools import groupby
from operator import itemgetter

import torch
import torch.nn.functional as F

from configurator import UserError
from model import GPT
from parts.presets import check_chosen, choose_rules, nearest, refuse_idle, supports
from plumbing import show
from plumbing.checkpoint import best_of, check_same_model, find_checkpoint, identity, load_merged
from plumbing.device import configure_compute, freeze
from plumbing.evaluate import p_wrong, read
from plumbing.rows import same_length
from plumbing.score import given_sample, judge_samples
from plumbing.text import (ANY, can_have, decode, encode, load_task, pieces, start_canvas, stop_at,
                           task_canvas, until_end, usual_hole)

HOLE = '▒'                  # a token that is not there yet
NO_RULES = {'steps', 'temperature', 'top_k', 'top_p'}    # who chooses these has not chosen a sampler yet


class Sample(dict):
    """
    A text that was written or judged. It is also a dict, as --save writes it.

    task: what was asked; before: the text that was given, or None; rules: those it was written by, or {}
    fixed (T,) bool: what was given of the canvas and stayed, or None
    """

    text = property(itemgetter('text'), doc='str, up to the end; padding in a text without end is a dot each')
    tokens = property(itemgetter('tokens'), doc='ids, from the start symbol to the end, a list')
    nfe = property(itemgetter('nfe'), doc='how many passes it took')
    finished = property(itemgetter('finished'), doc='whether it has an end')
    steps = property(lambda self: self.get('trace'), doc='(S, T) ids: all canvases; None if not kept')

    def __init__(self, owner, found, task, before=None, fixed=None, rules=None):
        super().__init__(found)
        self.owner, self.task, self.before, self.fixed, self.rules = owner, task, before, fixed, rules or {}

    def __str__(self):
        return self.text

    def __repr__(self):
        return f'<{self.task} {self.text!r}, nfe={self.nfe}>'

    @cached_property
    def places(self):
        """The indices of those of tokens that are text, a list."""
        found = pieces(self.owner.meta, self.tokens)
        return [i for i, (piece, inside) in enumerate(found) if piece or inside]

    @property
    def pieces(self):
        """What each token adds to the text, a list of str."""
        found = [piece for piece, _ in pieces(self.owner.meta, self.tokens)]
        return [found[i] for i in self.places]

    @property
    def p_wrong(self):
        """p(WRONG) of each of pieces, a list of float. Of a sample it takes a pass, the first time."""
        if 'p_wrong' not in self:
            finds = self.owner.finds
            if finds is None:
                raise UserError('this checkpoint was not trained to find wrong tokens: load it with '
                                'judge=PATH, a remasking one')
            only = self.owner.can._replace(writes=False, causal=False, detects=True)
            judge_samples(finds, self.owner.meta, only, [self])
        return [self['p_wrong'][i] for i in self.places if i < len(self['p_wrong'])]

    @property
    def nelbo(self):
        """The bound on -log p in nats a token, None if the network does not unmask or was not asked."""
        return self.get('nelbo')

    @property
    def causal_nll(self):
        """-log p by the causal mode in nats a token, None if it has none or was not asked."""
        return self.get('causal_nll')

    def report(self):
        """The text, what was given, and the signs under it as lines of text."""
        return show.report(self, self.owner.meta, self.owner.task, self.before)

    def page(self):
        """The page with a slider over the steps, HTML."""
        if self.steps is None:
            raise UserError('the steps of this sample were not kept: write it with trace=True')
        meta = self.owner.meta
        words = [f'{show.words_of(self.rules)}; {self.nfe} passes', self.owner.said[0]]
        return show.page(f"{meta['name']}: {self.task}", words, self.owner.stories([self]), self.owner.look)

    def _repr_html_(self):
        if self.steps is not None:
            return (f'<iframe srcdoc="{html.escape(self.page())}" style="width: 100%; height: 32em; '
                    'border: 0"></iframe>')

    def show(self):
        """Shows it: the page in a notebook, the report in a terminal."""
        notebook = getattr(sys.modules.get('IPython'), 'get_ipython', lambda: None)()
        if hasattr(notebook, 'kernel') and self.steps is not None:
            sys.modules['IPython'].display.display(self)
        else:
            print(self.report())


class Canvas(str):
    """
    The text of a canvas, ▒ for each token that is not there; ids (T,) are its tokens, ~id of what is drafted.
    """

    def __new__(cls, meta, ids):
        runs = groupby((max(i, ~i) for i in ids.tolist()), lambda i: i == meta['vocab_size'])
        made = super().__new__(cls, ''.join(HOLE * len([*run]) if hole else decode(meta, [*run])[0]
                                            for hole, run in runs))
        made.ids = ids
        return made


class Live(list):
    """
    A trace that is read while it grows, of one batch after the other: the canvases of the last one.

    result: what the work returned, once all has been read
    """

    def __init__(self):
        super().__init__()
        self.queue, self.unread, self.fixed, self.result = queue.Queue(1), False, None, None

    def begin(self, fixed):
        """The trace of the next batch, whose fixed (B, T) positions never change."""
        self.clear()
        self.fixed = fixed
        return self

    def append(self, canvas):
        if self.unread:
            raise GeneratorExit
        super().append(canvas)
        self.queue.put((canvas, self.fixed, len(self) == 1))

    def follow(self, work):
        """
        Runs work(trace=self) in a thread of its own. Yields every canvas (B, T) as it happens, with the fixed
        positions (B, T) and whether it is the first of a batch.
        """
        error = None

        def run():
            nonlocal error
            try:
                self.result = work(trace=self)
            except BaseException as problem:                        # raised again where it is read
                error = problem
            self.queue.put(None)

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        step = True
        try:
            while step := self.queue.get():
                yield step
            if error:
                raise error
        finally:
            self.unread = True
            if not sys.is_finalizing():                             # then no thread would answer
                while step:                                         # whoever waits may go
                    step = self.queue.get()
                worker.join()


class Handle:
    """
    A network that is ready to compute, see load in sample.py, which makes one.

    model: a GPT; checkpoint: the dict it was read from; meta: of its dataset; config: its training settings;
    can: what it was trained for, see parts.presets.Abilities; judge: a second network that finds wrong
    tokens, or None; task: the task.py of the dataset, or None; said: what it is, lines; look: how its texts
    are shown, see plumbing.show.layout; hole: what stands for a token to be found.

    Methods that write take the rules of sample.How by name (steps=32, remask='wrong', ...), preset, seed,
    batch_size, progress (a bar) and trace (False: the steps are not kept). They return a Sample for a text,
    or num of them in a list; for a list of texts a list, those of the first text first.
    """

    def __init__(self, fill, fields, model, checkpoint, judge=None, said=()):
        self.fill, self.fields, self.said = fill, fields, [*said]
        self.model, self.checkpoint, self.judge = model, checkpoint, judge
        self.meta, self.config = checkpoint['meta'], checkpoint['config']
        self.can, self.task = supports(self.config), load_task(self.meta['name'])
        self.look, self.hole = show.layout(self.meta, self.task), usual_hole(self.meta)

    @classmethod
    def load(cls, fill, fields, path='ckpt', *, out_dir='out', merge=None, merge_weight=0.5, judge=None,
             frozen=True, **compute):
        """
        fill: of sample.py; fields: the names of How; path: a file, a folder, or 'ckpt', the newest in
        out_dir; merge: a second checkpoint to merge with, judge: one that finds wrong tokens; frozen: False
        keeps the weights as they were trained; compute: device, dtype, attention, compile, see
        plumbing.device.
        """
        said = []
        path = find_checkpoint(path, out_dir, said.append)
        other, judging = (name and find_checkpoint(name, out_dir, said.append) for name in (merge, judge))
        merged, compute = '', dict(dict(device='auto'), **compute)
        if other:
            model, checkpoint = load_merged(GPT.load, supports, path, other, merge_weight)
            merged = f', merged with {merge_weight:g} of {other}'
        else:
            model, checkpoint = GPT.load(path)
        said.insert(0, f"{path}: {checkpoint['config']['training_type']} on {checkpoint['meta']['name']}, "
                       f"iteration {checkpoint['iter_num']}{merged}")
        if os.path.exists(best_of(path)):
            best = shlex.quote(best_of(path))
            said.append(f'its validation loss was lower before: --init_from={best}')
        if judging:
            judge, second = GPT.load(judging)
            check_same_model(path, identity(checkpoint), judging, identity(second),
                             ('vocab_size', 'block_size', 'itos'))
            if not supports(second['config']).detects:
                raise UserError(f'{judging} was not trained to find wrong tokens '
                                f"(training_type={second['config']['training_type']})")
            configure_compute(judge, **compute)
        model, choices = configure_compute(model, **compute)
        said.append(f'{model.num_params():,} parameters, {choices}')
        for network in filter(None, (model, judge) if frozen else ()):
            freeze(network)
        return cls(fill, fields, model, checkpoint, judge, said)

    def __repr__(self):
        return '\n'.join(self.said)

    @property
    def finds(self):
        """The network that knows what is wrong, None if none learned it."""
        return self.model if self.can.detects else self.judge

    # -------------------------------------------------------------------------
    # what one asks of it

    def generate(self, num=1, prompt='', length=None, stop=None, **how):
        """
        num samples that start with the prompt, a list. length: tokens, None: the model decides; stop: a text
        before which they end.

        >>> samples = m.generate(2, prompt='(+', length=9)
        >>> [(len(sample.text), sample.text[:2]) for sample in samples]
        [(9, '(+'), (9, '(+')]
        """
        odd = [c for c in stop or '' if not can_have(self.meta, c)]
        if odd:
            raise UserError(f"stop: {odd[0]!r} is not in the vocabulary of {self.meta['name']}")
        if num < 1:
            raise UserError(f'num_samples must be at least 1, got {num}')
        canvas, fixed = self.start(num, prompt, length)
        samples = self.write('generate', [None] * num, canvas, fixed, **how)
        if stop:
            stop_at(self.meta, samples, stop, len(decode(self.meta, encode(self.meta, prompt))[0]))
        return samples

    def infill(self, text, num=None, hole=None, **how):
        """
        The text with its holes filled: '_', or '[MASK]' where a text can have '_', or what hole says. A hole
        is a token; one at the very end is as many as it takes.

        >>> sample = m.infill('(+_2)=3', steps=1)
        >>> sample.before, sample.text[:2], sample.text[3:]
        ('(+_2)=3', '(+', '2)=3')
        """
        return self.each('infill', text, num, dict(hole=hole), how)

    def repair(self, text, num=None, **how):
        """
        The text with what is wrong in it written anew. str(sample) is the new one, sample.before the old.

        >>> sample = m.repair('(+12))=3')
        >>> sample.before, sample.task, sample.steps.shape[1]
        ('(+12))=3', 'repair', 64)
        """
        return self.each('repair', text, num, {}, how)

    def edit(self, text, words=None, num=None, **how):
        """
        The text with some words written anew: a part of the text, places such as '2:4' or '2:3,5:6' (of its
        tokens, from 0), or None: what stands in [brackets].

        >>> [m.edit(*asked).text[4:] for asked in (('(+12)=3', '12'), ('(+12)=3', '2:4'), ('(+[12])=3',))]
        [')=3', ')=3', ')=3']
        """
        return self.each('edit', text, num, dict(mask=words), how)

    def score(self, text):
        """
        What it thinks of a text, or of a list of texts or samples: .p_wrong, .nelbo, .causal_nll, see Sample.

        >>> sample = m.score('(+12)=4')
        >>> sample.pieces, len(sample.p_wrong)
        (['(', '+', '1', '2', ')', '=', '4'], 7)
        """
        if not isinstance(text, list):
            return self.score([text])[0]
        samples = [self.given(one) for one in text]
        self.judge_all(samples)
        return samples

    def watch(self, text='', task='generate', **how):
        """
        Yields every step as it happens, a Canvas: its text so far, and its ids (T,), ~id if only drafted.

        text: the prompt, or for another task (infill, repair, edit) the text; how: what its method takes.

        >>> [canvas for canvas in m.watch('(+', length=4, steps=2, remask='none')][0]
        '(+▒▒'
        """
        if task not in ('generate', 'infill', 'repair', 'edit'):
            raise UserError(f"task expects one of generate, infill, repair, edit; got '{task}'")
        work = partial(self.generate, 1, text) if task == 'generate' else partial(getattr(self, task), text)
        for canvas, _, _ in Live().follow(partial(work, **how)):
            yield Canvas(self.meta, canvas[0].cpu())

    # -------------------------------------------------------------------------
    # how it does it

    def read(self, text, hole=None):
        """A text as the dataset's task.py reads what people write."""
        if hasattr(self.task, 'read'):
            return self.task.read(text, self.meta['block_size'], hole or self.hole)
        return text

    def given(self, text):
        """A text, or a dict of one and its tokens, as a Sample to be judged."""
        tokens = None
        if isinstance(text, dict):
            text, tokens = text['text'], text.get('tokens')
        text = self.read(text)
        return Sample(self, given_sample(self.model, self.meta, text, tokens), 'score')

    def start(self, num, prompt='', length=None):
        """What num samples start from that begin with a prompt: canvas (B, T), fixed (B, T) bool."""
        lengths = None if length is None else torch.full((num,), length)
        canvas, fixed = start_canvas(self.model, self.meta, num, encode(self.meta, prompt), lengths)
        if not (canvas == self.model.mask_token_id).any():
            raise UserError(f'the prompt fills the canvas: its {int(fixed[0].sum())} tokens leave nothing to '
                            f'write of {canvas.size(1)}')
        return canvas, fixed

    def canvas(self, task, text, hole=None, mask=None):
        """What a task other than generate starts from: (the text as it was read, canvas (T,), fixed (T,))."""
        text = self.read(text, hole)
        canvas, fixed = task_canvas(task, self.model, self.meta, text, hole, mask)
        return text, canvas[0], fixed[0]

    def each(self, task, text, num, what, how):
        """The samples of a task for a text, or for each of several; what: keywords of canvas."""
        texts = [text] if isinstance(text, str) else text
        rows = [row for one in texts for row in [self.canvas(task, one, **what)] * (num or 1)]
        samples = self.write(task, *zip(*rows), **how) if rows else []
        return samples[0] if isinstance(text, str) and num is None else samples

    def choose(self, task, texts, canvas, *, preset=None, **rules):
        """All rules for canvas, B rows (T,), and texts as in write, if these rules were chosen."""
        odd = [name for name in rules if name not in self.fields]
        if odd:
            hint = nearest(odd[0], self.fields) or f"there are {', '.join(self.fields)}"
            raise UserError(f"unknown rule '{odd[0]}'; {hint}")
        check_chosen(rules)
        free = {name for name in rules if rules[name] is not None} <= NO_RULES and preset is None
        if free and hasattr(self.task, 'PRESETS') and self.can.writes and not self.judge and task != 'repair':
            doubting, plain = self.task.PRESETS                     # what is best for this dataset
            preset = doubting if self.can.detects else plain
        masked = [row == self.model.mask_token_id for row in canvas]
        # whether there is text right of a hole
        inside = task == 'repair' or any((row.cummax(0).values & ~row).any() for row in masked)
        return choose_rules(self.config, preset=preset, task=task, inside=inside,
                            judge=self.judge is not None, stream=self.meta['eos'] is None,
                            any_length=any(ANY in text for text in texts if text), **rules)

    def write(self, task, texts, canvas, fixed, *, preset=None, seed=1337, batch_size=256, trace=True,
              progress=False, **rules):
        """
        The Samples of canvas and fixed, B rows (T,) each, which may have several lengths. texts: what was
        given, B texts or None.
        """
        chosen = self.choose(task, texts, canvas, preset=preset, **rules)
        said = refuse_idle(self.config, rules, chosen)
        sampler = partial(self.fill, self.model, self.meta, batch_size=batch_size, seed=seed,
                          progress=progress, remask_model=self.judge, trace=trace, **chosen)
        samples = []
        for found, before, start, given in zip(by_length(sampler, canvas, fixed), texts, canvas, fixed):
            if task == 'repair' and chosen.get('rounds') and 'trace' in found:
                self.compare(found, start)
            elif task == 'repair' and 'trace' in found:
                marks = show.marks(start, found['trace'].cpu(), self.model.mask_token_id)
                found['marks'] = marks[:len(found['tokens'])]
            samples.append(Sample(self, found, task, before, given, said))
        return samples

    @torch.no_grad()
    def compare(self, found, before):
        """Adds to a sample what edits made of the ids before (T,): before, and the signs of show.changes."""
        ids = found['trace'][-1:] if self.meta['pad'] is not None else torch.tensor([found['tokens']])
        ids = ids.to(next(self.model.parameters()).device)          # (1, T), with its padding
        doubted = p_wrong(self.model, read(self.model, ids), ids)[0] > 0.5
        found['before'] = until_end(self.meta, before.tolist())
        found['taken'], found['marks'] = show.changes(found['before'], found['tokens'], doubted.tolist())

    def frame(self, canvas, fixed, before=None):
        """
        A canvas (T,) as a frame, see plumbing.show.story, and the one before it, of before (T,), or the same.

        fixed (T,): what was given and is not doubted; all may be of several lengths.
        """
        rows, mask = [canvas if before is None else before, canvas], self.model.mask_token_id
        width = max(map(len, rows))
        trace = torch.stack([F.pad(row, (0, width - len(row)), value=mask) for row in rows])    # (2, T)
        if len(fixed) != width:                                     # edits have moved what was given
            fixed = torch.zeros_like(trace[0], dtype=torch.bool)
        doubts = torch.full(trace.shape, float('nan'))
        if self.finds:
            doubts[1] = show.judge_steps(self.judge or self.finds, trace[1:], self.judge and self.model)[0]
        old, frame = show.story(self.meta, trace.cpu(), fixed.cpu(), doubts, '')['frames']
        return frame, old

    def frames(self, live, work):
        """Yields (frame, the one before it, whether a sample begins) of every step of work(trace=live)."""
        before = None
        for canvas, fixed, begins in live.follow(work):
            before = None if begins else before
            yield *self.frame(canvas[0], fixed[0], before), begins
            before = canvas[0]

    def judge_all(self, samples):
        """Adds to Samples what the network thinks of them: p(WRONG), NELBO and causal NLL."""
        judge_samples(self.model, self.meta, self.can, samples)

    def stories(self, samples):
        """What show.animate and show.page tell of Samples that have their steps."""
        given = None if samples[0].task == 'score' else [sample.fixed for sample in samples]
        told = show.stories(self.judge or self.finds, self.meta, given, samples, self.task,
                            self.model if self.judge else None)
        rules = [show.words_of(sample.rules) for sample in samples]
        for story, words in zip(told, rules):                       # of several samplers each says which
            story['by'] = words if len({*rules}) > 1 else ''
        return told


def by_length(sampler, canvas, fixed):
    """The samples of sampler(canvas (B, T), fixed) for the rows of each length, in the order of the rows."""
    samples = [None] * len(canvas)
    for where in same_length(canvas):
        group = (torch.stack([rows[i] for i in where]) for rows in (canvas, fixed))
        for i, sample in zip(where, sampler(*group)):
            samples[i] = sample
    return samples
