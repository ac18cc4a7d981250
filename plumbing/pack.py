"""
Several short texts in one row, so that a pass has no padding to go through.
"""

import torch


def pack(length, *rows):
    """
    Short rows, several to a row: the first length (B,) positions of rows (B, T) each -> (R, T), 0 in what is
    left.

    Last comes segment (R, T), the number of the text that a position belongs to, see GPT.forward.
    """
    (B, T), device = rows[0].shape, length.device
    length = length.cpu()                                           # a GPU is waited for here, and not again

    # every text goes to the first row that has room for it, the longest texts first
    room, start, lengths = [], [None] * B, length.tolist()
    for text in length.argsort(descending=True).tolist():
        n = lengths[text]
        row = next((i for i, left in enumerate(room) if left >= n), len(room))
        if row == len(room):
            room.append(T)
        start[text] = row * T + T - room[row]
        room[row] -= n

    position = torch.arange(T)
    inside = position < length[:, None]                             # (B, T)
    target = (torch.tensor(start)[:, None] + position)[inside].to(device)              # (N,) in R * T
    source = inside.flatten().nonzero()[:, 0].to(device)            # (N,) in B * T
    number = torch.arange(1, B + 1, device=device)[:, None].expand(B, T)
    packed = []
    for part in (*rows, number):
        empty = torch.zeros(len(room) * T, dtype=part.dtype, device=device)
        packed.append(empty.index_put((target,), part.flatten()[source]).view(-1, T))
    return packed


def extent(input, weight, pad_id, rng):
    """
    How many positions (B,) of the rows input (B, T) a pass needs: all but the padding behind what carries
    weight (B, T).

    A random part of this padding stays, mostly a short one: the network meets every length of padding and
    rarely pays for it.
    """
    T = input.size(1)
    last = T - ((weight > 0) | (input != pad_id)).flip(1).long().argmax(1)             # (B,)
    u = torch.rand(last.shape, generator=rng, device=last.device)
    return last + (u ** 3 * (T + 1 - last)).long().clamp(max=T - last)
