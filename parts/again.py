"""A text that the network still doubts when it is finished is written again."""

from dataclasses import replace

import torch

from parts.energy import text_of
from parts.look import Sampling
from parts.presets import PRESETS
from plumbing.evaluate import p_wrong
from plumbing.rows import Part, places, recorded

BELIEVED = 0.1   # no cell of a right board of sudoku is doubted by more than 0.01, some of a wrong one by 0.3


def until_believed(run, loop):
    """
    loop(run); then all rows that are doubted again, as preset redraft writes, at most how.redrafts times.

    A row is doubted if p(WRONG) of a token of its text that is not fixed is above BELIEVED, which costs a
    pass. It begins again from what was given, and of its versions the one whose most doubted token is doubted
    least stays. run: a parts.look.Sampling. Returns what loop returns.
    """
    start, how = run.canvas.clone(), replace(run.how, **PRESETS['redraft'], remask_threshold=None)
    canvas, nfe, history = loop(run)
    doubt = most_doubted(run, canvas, run.fixed)
    nfe += 1
    for _ in range(run.how.redrafts):
        rows = places(doubt > BELIEVED)                             # (R,)
        if not len(rows):
            break
        steps = None
        if history is not None:
            steps = Part(canvas[rows], history, lambda part: canvas.index_copy(0, rows, part), stays=False)
        again = Sampling(run.model, start[rows], run.fixed[rows], how, run.ends, run.closed[rows], run.judge,
                         run.generator, steps)
        x, passes, _ = loop(again)
        nfe[rows] += passes + 1
        found = most_doubted(run, x, run.fixed[rows])
        better = found < doubt[rows]
        canvas[rows[better]], doubt[rows[better]] = x[better], found[better]
        recorded(canvas, history)                                   # some may be back at an earlier version
    return canvas, nfe, history


@torch.no_grad()
def most_doubted(run, x, fixed):
    """p(WRONG) of the most doubted token of each text x (R, T) that is not fixed (R, T): (R,)."""
    judge = run.judge or run.model
    ids, real = text_of(x, run.ends)
    return p_wrong(judge, judge(ids), ids).masked_fill(~real | fixed, 0).amax(1)
