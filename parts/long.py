"""Texts that are longer than what the network reads: window by window, from left to right."""

import torch
import torch.nn.functional as F


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


def edits_in_windows(sampler, canvas, fixed, size):
    """
    in_windows for a sampler of edits, after which a text may have another length (see parts.edits.mend).

    A window is size // 4 tokens of what has been written, size // 2 that may change, and size // 8 of what
    follows; so there is room to grow. Returns a list of rows, the passes (B,), and the first and last canvas.
    """
    B, T = canvas.shape
    if size >= T:
        return sampler(canvas, fixed)
    left, step, right = size // 4, size // 2, size // 8
    rows, nfe = [row[:0] for row in canvas], torch.zeros(B, dtype=torch.long, device=canvas.device)
    for first in range(0, T, step):
        last, end = first + step, min(T, first + step + right)
        found, n = canvas[:, first:last], 0
        if not fixed[:, first:last].all():
            n = min(left, *map(len, rows))
            before = torch.stack([row[len(row) - n:] for row in rows])                       # (B, n)
            kept = fixed[:, first:end].clone()
            kept[:, step:] = True
            found, passes, _ = sampler(torch.cat((before, canvas[:, first:end]), 1),
                                       torch.cat((torch.ones_like(before).bool(), kept), 1))
            found, nfe = [row[:len(row) - max(0, end - last)] for row in found], nfe + passes
        rows = [torch.cat((row, new[n:])) for row, new in zip(rows, found)]
    width = max(T, *map(len, rows))
    steps = [canvas, rows]
    return rows, nfe, [torch.stack([F.pad(row, (0, width - len(row)), value=0) for row in step])
                       for step in steps]
