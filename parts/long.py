"""Texts that are longer than what the network reads: window by window, from left to right."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from plumbing.rows import Part, recorded, settled


def in_windows(sampler, canvas, fixed, size, trace=None, progress=False):
    """
    Fills canvas, fixed (B, T) of any length T by sampler(canvas, fixed, trace) of at most size tokens.

    Each window begins with size // 2 tokens of what stands there already, as far as there are so many left of
    the first one that may change; the sampler decides about all others in it, and they stay. trace: a list
    for the canvases of all steps, or None; progress: a bar with the tokens to come. Returns what the sampler
    returns: canvas (B, T), passes (B,).
    """
    T = canvas.size(1)
    if size >= T:
        return sampler(canvas, fixed, trace)
    x, todo, history = canvas.clone(), ~fixed, recorded(canvas, trace)
    nfe = torch.zeros(len(x), dtype=torch.long, device=x.device)
    bar = tqdm(total=int(todo.sum(1).max()), desc='in windows', unit=' tokens', disable=not progress,
               leave=False)
    while todo.any():
        rows = todo.any(1).nonzero()[:, 0]                          # (R,)
        first = todo[rows].long().argmax(1, keepdim=True)
        at = (first - size // 2).clamp(0, T - size) + torch.arange(size, device=x.device)    # (R, size)

        def whole(part):
            return x.index_copy(0, rows, x[rows].scatter(1, at, part))

        start = x[rows].gather(1, at)
        steps = None if history is None else Part(start, history, whole)
        window, passes = sampler(start, ~todo[rows].gather(1, at), steps)
        x = whole(window)
        settled(x, history)
        todo[rows] = todo[rows].scatter(1, at, False)
        nfe[rows] += passes
        bar.update(bar.total - bar.n - int(todo.sum(1).max()))
    bar.close()
    return x, nfe


def edits_in_windows(sampler, canvas, fixed, size, trace=None, progress=False):
    """
    in_windows for a sampler of edits, after which a text may have another length (see parts.edits.mend).

    A window is size // 4 tokens of what has been written, size // 2 that may change, and size // 8 of what
    follows; so there is room to grow. Returns a list of rows and the passes (B,).
    """
    B, T = canvas.shape
    if size >= T:
        return sampler(canvas, fixed, trace)
    left, step, right = size // 4, size // 2, size // 8
    rows, nfe = [row[:0] for row in canvas], torch.zeros(B, dtype=torch.long, device=canvas.device)
    for first in tqdm(range(0, T, step), desc='in windows', disable=not progress, leave=False):
        last, end = first + step, min(T, first + step + right)
        found, n = canvas[:, first:last], 0
        if not fixed[:, first:last].all():
            n = min(left, *map(len, rows))
            before = torch.stack([row[len(row) - n:] for row in rows])                       # (B, n)
            kept = fixed[:, first:end].clone()
            kept[:, step:] = True
            found, passes = sampler(torch.cat((before, canvas[:, first:end]), 1),
                                    torch.cat((torch.ones_like(before).bool(), kept), 1), None)
            found, nfe = [row[:len(row) - max(0, end - last)] for row in found], nfe + passes
        rows = [torch.cat((row, new[n:])) for row, new in zip(rows, found)]
    if trace is not None:                                           # the first and the last canvas, as wide
        width = max(T, *map(len, rows))
        for step in (canvas, rows):
            trace.append(torch.stack([F.pad(row, (0, width - len(row))) for row in step]))
    return rows, nfe
