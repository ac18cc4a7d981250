"""
How a token is drawn.
"""

import torch
import torch.nn.functional as F

from configurator import UserError

LARGE = 4096     # words


class NotFinite(UserError):
    """The logits of a network are NaN or infinite: there is nothing to draw from."""


def fine(device):
    """The dtype in which confidences are compared: float64, but float32 on MPS, which has no finer one."""
    return torch.float32 if device.type == 'mps' else torch.float64


def filtered(logits, temperature=1.0, top_k=None, top_p=None):
    """
    logits (N, V+2), [MASK] and [WRONG] at -inf already -> probabilities (N, V+2) to draw from.

    Raises NotFinite on a CPU if the logits of a row are not finite, or leave no word open.
    """
    most = logits.amax(-1, keepdim=True)
    if logits.device.type != 'cpu':                                     # it would have to be waited for
        logits = logits.nan_to_num(nan=0.0, neginf=float('-inf'))
    elif not most.isfinite().all():
        raise NotFinite('the network is no longer finite: lower --learning_rate or --muon_lr, '
                        'take an older checkpoint, or set --dtype=float32')
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    if temperature < 1e-3:                                              # or they would overflow
        logits = logits - most
    if temperature != 1:
        logits = logits / min(max(temperature, 1e-30), 1e30)
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float('-inf'))
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered * (before < max(top_p, 1e-30))                # the token that crosses top_p stays
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def forbid(logits, ids, where):
    """logits (N, V+2), with -inf for these ids in the rows where (N, 1) bool says so."""
    if not ids:
        return logits
    forbidden = torch.zeros(logits.size(-1), dtype=torch.bool, device=logits.device)
    forbidden[list(ids)] = True
    return logits.masked_fill(where & forbidden, float('-inf'))


def draw(probs, generator=None):
    """One token for each row: probs (..., V+2) -> ids (...)."""
    flat = probs.reshape(-1, probs.size(-1))
    if flat.size(0) == 0:
        return torch.zeros(probs.shape[:-1], dtype=torch.long, device=probs.device)

    # multinomial takes a random number for each word, which on a CPU takes longer than all the rest;
    # the sum is in float64, because in float32 the rarest words would never come
    if flat.size(1) > LARGE:
        total = flat.cumsum(1, dtype=fine(probs.device))
        u = 1 - torch.rand(len(flat), 1, generator=generator, device=probs.device, dtype=total.dtype)
        return torch.searchsorted(total, u * total[:, -1:]).view(probs.shape[:-1])
    return torch.multinomial(flat, 1, generator=generator).view(probs.shape[:-1])
