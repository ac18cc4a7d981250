"""Texts that are longer than what the network reads: window by window, from left to right."""

import torch


def in_windows(sampler, canvas, fixed, size):
    """
    Fills canvas, fixed (B, T) of any length T, see sample.denoise, by a sampler of at most size tokens.

    Each window begins with size // 2 tokens of what stands there already, as far as there are so many left of
    the first one that may change; the sampler decides about all others in it, and they stay. Returns what the
    sampler returns: (canvas (B, T), passes (B,), canvases of all steps or None).
    """
    T = canvas.size(1)
    if size >= T:
        return sampler(canvas, fixed)
    x, todo, history = canvas.clone(), ~fixed, [canvas.clone()]
    nfe = torch.zeros(len(x), dtype=torch.long, device=x.device)
    while todo.any():
        rows = todo.any(1).nonzero()[:, 0]                          # (R,)
        first = todo[rows].long().argmax(1, keepdim=True)
        at = (first - size // 2).clamp(0, T - size) + torch.arange(size, device=x.device)    # (R, size)
        window, passes, steps = sampler(x[rows].gather(1, at), ~todo[rows].gather(1, at))
        for step in (steps or [])[1:]:
            history.append(x.index_copy(0, rows, x[rows].scatter(1, at, step)))
        x[rows] = x[rows].scatter(1, at, window)
        todo[rows] = todo[rows].scatter(1, at, False)
        nfe[rows] += passes
    return x, nfe, None if steps is None else history
