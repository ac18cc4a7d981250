"""Texts that are longer than what the network reads: window by window, from left to right."""

import torch

from plumbing.rows import Part, recorded


def in_windows(sampler, canvas, fixed, size, trace=None):
    """
    Fills canvas, fixed (B, T) of any length T by sampler(canvas, fixed, trace) of at most size tokens.

    Each window begins with size // 2 tokens of what stands there already, as far as there are so many left of
    the first one that may change; the sampler decides about all others in it, and they stay. trace: a list
    for the canvases of all steps, or None. Returns what the sampler returns: canvas (B, T), passes (B,).
    """
    T = canvas.size(1)
    if size >= T:
        return sampler(canvas, fixed, trace)
    x, todo, history = canvas.clone(), ~fixed, recorded(canvas, trace)
    nfe = torch.zeros(len(x), dtype=torch.long, device=x.device)
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
        todo[rows] = todo[rows].scatter(1, at, False)
        nfe[rows] += passes
    return x, nfe
