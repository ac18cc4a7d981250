"""
What teaches the draft head.
"""

import torch
import torch.nn.functional as F

from model import norm
from plumbing.pieces import in_pieces


def draft_loss(model, hidden, x0, weight, depth=6, most=256):
    """
    What teaches the draft head: (the mean CE, {'draft': (the mean CE, 1)}).

    x0 (B, T) ids; hidden (B, T, C) of the causal pass over them; weight (B, T), > 0 where a token is
    modelled. From the state at these positions (at most `most` of them, spread evenly) the head is fed the
    true tokens one by one and asked for the next one, up to depth tokens ahead. State and embeddings are
    detached: the head learns from the network and the network nothing from the head. The shapes never change,
    because a CPU prepares its matrix products anew for every new shape.
    """
    # where it starts
    row, at = (weight > 0).nonzero(as_tuple=True)                   # (N,) each
    pick = torch.arange(most, device=row.device)
    inside = pick < len(row)                                        # (most,)
    pick = (pick * max(1, len(row) / most)).long().clamp(max=len(row) - 1)
    row, at = row[pick], at[pick]
    state, total, count = hidden.detach()[row, at], 0.0, 0
    table = model.wte.weight.detach()                               # (rows, C)

    def piece_of_loss(hidden, table, piece):
        """The sum of the CE of a piece of the tokens, of those that count, see in_pieces."""
        logits = F.linear(hidden, table.to(hidden.dtype))[:, :model.mask_token_id].float()     # (n, V)
        return (F.cross_entropy(logits, target[piece], reduction='none') * inside[piece]).sum(), ()

    # one token further each time
    for _ in range(depth):
        state = model.draft(state, x0[row, at])
        inside = inside & (at + 1 < x0.size(1))
        at = (at + 1).clamp(max=x0.size(1) - 1)
        inside = inside & (weight[row, at] > 0)
        target = x0[row, at]                                        # (most,)
        total = total + in_pieces(piece_of_loss, norm(state), table, model.most_logits)[0]
        count = count + inside.sum()
    mean = total / count.clamp(min=1)
    return mean, {'draft': torch.stack((mean.detach(), torch.ones_like(mean)))}
