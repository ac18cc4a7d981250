"""
Speculative sampling (Leviathan et al. 2023): the causal pass checks several drafted tokens at once.

Every token is distributed as left-to-right sampling would draw it, in far fewer passes. Drafts come from a
small head that was trained for it, or from the network's bidirectional pass. Plain left-to-right sampling
stands here too.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear, norm
from plumbing.draw import draw, filtered, fine
from parts.cache import Cache
from parts.presets import check_suffix
from plumbing.kernels import squared_relu
from plumbing.pieces import in_pieces
from plumbing.rows import close_rows, left_of

WINDOW = 5   # tokens drafted a round; docs/log.md has measured 1 to 63


class Drafter(nn.Module):
    """
    A recurrent head that guesses, far cheaper than a pass, what the causal pass will say next (Zhang et al.
    2024, ReDrafter).

    Its first state is the causal hidden state of a position. Fed the token that was written there, the state
    becomes the one of the next position, and so on. Sampling does not depend on the guesses being right.
    """

    def __init__(self, C):
        super().__init__()
        self.fc = Linear(2 * C, C)
        self.proj = Linear(C, C, zero=True)

    def forward(self, state, embedded):
        """state (N, C), the token's embedding (N, C) -> the next state (N, C)."""
        h = self.fc(torch.cat((norm(state), norm(embedded)), dim=-1))
        return state + self.proj(squared_relu(h))


def next_state(model, state, ids):
    """The draft head's state (N, C), fed the tokens ids (N,) -> its next state (N, C)."""
    return model.drafter(state, model.wte(ids).detach().to(state.dtype))


def causal_pass(model, x, at, cache=None, first=True):
    """
    Hidden states (R, W, C) of the causal pass over x (R, T) at the positions at (R, W), a window for each
    row.

    cache: with room for the windows; None: everything left of them is computed again. first: it is still
    empty. Later it knows what is left of the windows, and nothing else is computed.
    """
    if cache is not None and not first:
        return model(x, causal=True, cache=cache, at=at)
    width = min(model.config.block_size, int(at.max()) + 1)
    hidden = model(x[:, :width], causal=True, cache=cache)                     # (R, width, C)
    return hidden.gather(1, at.clamp(max=width - 1)[..., None].expand(-1, -1, hidden.size(2)))


@torch.no_grad()
def write(model, canvas, fixed, filters, ends, *, generator=None, trace=False):
    """
    Fills canvas (B, T), whose masks are a suffix of each row, by speculative sampling.

    filters: temperature, top_k, top_p; ends: see plumbing.rows.Ends. Returns what sample.denoise returns.
    """
    canvas = canvas.clone()
    mask = model.mask_token_id
    rows = (canvas == mask).any(1).nonzero()[:, 0]
    nfe = torch.zeros(len(canvas), dtype=torch.long, device=canvas.device)
    history = [canvas.clone()]
    cache = Cache.empty(model, len(rows))

    # no draft yet, ids (R, W) and their laws (R, W, V+2); a head has no state yet to draft from
    window = min(WINDOW, canvas.size(1))
    size = (len(rows), window if model.drafter is None else 0)
    drafted = torch.zeros(size, dtype=torch.long, device=canvas.device)
    q = torch.zeros(*size, mask + 2, device=canvas.device)

    first = True
    while len(rows):
        x = canvas[rows]                                                       # (R, T)
        masked = x == mask
        if cache is not None:
            cache.make_room(int(masked.long().argmax(1).max()) + 1 + drafted.size(1))
        x, drafted, q, passes = one_round(
            model, x, masked, drafted, q, window, filters, generator, cache, first)
        canvas[rows] = close_rows(x, masked, mask, ends)
        nfe[rows] += passes
        if trace:
            history.append(canvas.clone())

        going = (canvas[rows] == mask).any(1).nonzero()[:, 0]
        if cache is not None:
            cache.keep_rows(going)
        rows, drafted, q = rows[going], drafted[going], q[going]
        first = False
    return canvas, nfe, history if trace else None


def one_round(model, x, masked, drafted, q, window, filters, generator, cache=None, first=True):
    """
    One round: a verdict on the draft of each row's next tokens, and the next draft.

    drafted (R, W): ids of the next W tokens; q (R, W, V+2): the distributions that they were drawn from, all
    0 where there is no draft. The causal pass looks at the whole draft at once. From the left each token is
    accepted with probability min(1, p/q), p of the causal pass; the first rejected one is drawn anew from the
    positive part of p - q; if none is rejected, one more comes from p. So a row gains at least one token, and
    every token is distributed by p.

    x (R, T), whose masks are a suffix -> x (R, T), the next drafted and q, of window tokens, the passes (R,)
    that it took. cache, first: see causal_pass; what the cache knows of rejected tokens is written over in
    the next round.
    """
    T = x.size(1)
    W = drafted.size(1)
    none = q.sum((1, 2)) == 0
    passes = torch.ones_like(none, dtype=torch.long)
    if model.drafter is None and none.any():
        drafted[none], new = bidirectional_draft(model, x[none], masked[none], W, filters, generator)
        q[none] = new.to(q.dtype)
        passes += none

    # what the causal pass says about each drafted token and the one behind them; x gets room for windows that
    # stand out
    # (R, W+1) from the first hole
    at = masked.long().argmax(1)[:, None] + torch.arange(W + 1, device=x.device)
    x = F.pad(x, (0, W + 1), value=model.mask_token_id)
    hidden = causal_pass(model, x.scatter(1, at[:, :W], drafted), at, cache, first)          # (R, W+1, C)
    p = filtered(model.logits(hidden, real_only=True), **filters)                            # (R, W+1, V+2)

    # how many are accepted from the left
    p_drafted = p[:, :W].gather(2, drafted[..., None])[..., 0]                               # (R, W)
    q_drafted = q.gather(2, drafted[..., None])[..., 0]
    noise = torch.rand(q_drafted.shape, generator=generator, device=x.device)
    accepted = noise * q_drafted < p_drafted * (q_drafted > 0)  # where there is no draft, none
    count = accepted.long().cumprod(1).sum(1, keepdim=True)                                  # (R, 1)

    # one more token, from what p has and q lacks; if none was rejected q is 0 there
    here = count[..., None].expand(-1, -1, p.size(2))
    wanted = p.gather(1, here)[:, 0]                                                         # (R, V+2)
    rest = (wanted - F.pad(q, (0, 0, 0, 1)).gather(1, here)[:, 0]).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 1e-9, rest, wanted)  # p = q up to rounding
    redrawn = draw(rest, generator)                                                          # (R,)

    tokens = F.pad(drafted, (0, 1)).scatter(1, count, redrawn[:, None])                      # (R, W+1)
    beyond = torch.arange(W + 1, device=x.device) > count
    x = x.scatter(1, at, tokens.masked_fill(beyond, model.mask_token_id))[:, :T]
    return x, *next_draft(model, hidden, p, count, redrawn, window, filters, generator), passes


def next_draft(model, hidden, p, count, redrawn, window, filters, generator):
    """
    The draft of the window tokens behind the redrawn (R,) one: ids (R, window), and their laws q (R, window,
    V+2).

    hidden (R, W+1, C) and p (R, W+1, V+2): what the causal pass said; count (R, 1): how many tokens it
    accepted. With a draft head the state in which the causal pass was before the redrawn token is fed one
    token after the other. Without one, what the pass said about the tokens behind, though in the light of a
    rejected one, is a draft for free (as in Jacobi decoding); past the window, where it said nothing, any
    token is as good as another.
    """
    if model.drafter is not None:
        state = hidden.gather(1, count[..., None].expand(-1, -1, hidden.size(2)))[:, 0]      # (R, C)
        drafted = [redrawn]
        q = []
        for _ in range(window):
            state = next_state(model, state, drafted[-1])
            q.append(filtered(model.logits(norm(state), real_only=True), **filters))         # (R, V+2)
            drafted.append(draw(q[-1], generator))
        return torch.stack(drafted[1:], 1), torch.stack(q, 1)

    V = p.size(2) - 2
    any_token = F.pad(torch.full((V,), 1 / V, dtype=p.dtype, device=p.device), (0, 2))
    behind = count + 1 + torch.arange(window, device=p.device)                               # (R, window)
    # past the window: 0
    q = F.pad(p, (0, 0, 0, window)).gather(1, behind[..., None].expand(-1, -1, p.size(2)))
    q = torch.where(q.sum(-1, keepdim=True) == 0, any_token, q)
    return draw(q, generator), torch.where((count < window)[..., None], q, 0)  # all accepted: no draft


def bidirectional_draft(model, x, masked, window, filters, generator):
    """A draft by a bidirectional pass over x (R, T): ids (R, W), and their laws (R, W, V+2)."""
    at = masked.long().argmax(1)[:, None] + torch.arange(window, device=x.device)            # (R, W)
    hidden = model(x)
    # (R, W, C)
    hidden = hidden.gather(1, at.clamp(max=x.size(1) - 1)[..., None].expand(-1, -1, hidden.size(2)))
    q = filtered(model.logits(hidden, real_only=True), **filters)
    return draw(q, generator), q


@torch.no_grad()
def left_to_right(model, canvas, fixed, steps, filters, ends, *, closed=None, generator=None, trace=False):
    """
    Writes at most steps tokens into the holes of each row of canvas (B, T), from the left: autoregressive
    sampling.

    closed (B, T): where none of ends.forbid is drawn; None: left of what is fixed. Returns what
    sample.denoise returns; where steps were too few the canvas still has masks.
    """
    canvas = canvas.clone()
    mask = model.mask_token_id
    closed = left_of(fixed) if closed is None else closed
    rows = (canvas == mask).any(1).nonzero()[:, 0]
    nfe = torch.zeros(len(canvas), dtype=torch.long, device=canvas.device)
    history = [canvas.clone()]
    cache = Cache.empty(model, len(rows))

    for step in range(steps):
        if not len(rows):
            break
        x = canvas[rows]                                                       # (R, T)
        masked = x == mask
        hole = masked.long().argmax(1, keepdim=True)                           # (R, 1)
        if cache is not None:
            cache.make_room(int(hole.max()) + 1)
        hidden = causal_pass(model, x, hole, cache, step == 0)[:, 0]           # (R, C)
        logits = model.logits(hidden, real_only=True)                          # (R, V+2)
        if ends.forbid:
            forbidden = torch.zeros_like(logits, dtype=torch.bool)
            forbidden[:, list(ends.forbid)] = True
            logits = logits.masked_fill(closed[rows].gather(1, hole) & forbidden, float('-inf'))
        # a seed keeps its samples
        torch.rand(x.shape, generator=generator, device=x.device, dtype=fine(x.device))
        x = x.scatter(1, hole, draw(filtered(logits, **filters), generator)[:, None])
        canvas[rows] = close_rows(x, masked, mask, ends)
        nfe[rows] += 1
        if trace:
            history.append(canvas.clone())

        going = (canvas[rows] == mask).any(1).nonzero()[:, 0]
        if cache is not None:
            cache.keep_rows(going)
        rows = rows[going]
    return canvas, nfe, history if trace else None


def write_prefix(model, x, fixed, ar_prefix, *, ends, generator, trace, **rules):
    """x (B, T) with ar_prefix more tokens in each row, left to right: (x, passes, canvases but the last)."""
    if not ar_prefix:
        return x, 0, []
    mask = model.mask_token_id
    masked = x == mask
    width = min(x.size(1), int(masked.long().argmax(1).max()) + ar_prefix)
    check_suffix(masked[:, :width])
    filters = {name: rules[name] for name in ('temperature', 'top_k', 'top_p') if name in rules}
    closed = left_of(fixed)[:, :width]                                         # the end may be beyond width
    head, nfe, steps = left_to_right(model, x[:, :width], fixed[:, :width], ar_prefix, filters, ends,
                                     closed=closed, generator=generator, trace=trace)
    steps = [torch.cat((step, x[:, width:]), 1) for step in steps or []][:-1]
    x = torch.cat((head, x[:, width:]), 1)
    return close_rows(x, masked, mask, ends), nfe, steps


def draft_loss(model, hidden, x0, weight, depth=6, most=256):
    """
    What teaches the draft head: (the mean CE, {'draft': (sum of weight * CE, sum of weight)}).

    x0 (B, T) ids, hidden (B, T, C) of the causal pass over them, weight (B, T), > 0 where a token is
    modelled. From the states of these positions (of more than most, most spread evenly) the head is fed the
    true tokens one by one and asked for the next one, up to depth tokens ahead. State and embeddings are
    detached: the head learns from the network, and the network nothing from the head. The shapes never
    change, because a CPU prepares its matrix products anew for every new shape.
    """
    row, at = (weight > 0).nonzero(as_tuple=True)                              # (N,) each
    pick = torch.arange(most, device=row.device)
    inside = pick < len(row)                                                   # (most,)
    pick = (pick * max(1, len(row) / most)).long().clamp(max=len(row) - 1)
    row, at = row[pick], at[pick]
    state = hidden.detach()[row, at]
    words = model.wte.weight.detach()                                          # (rows, C)

    def of(hidden, words, at):
        """The sum of the CE of the tokens at, those that count, see in_pieces."""
        logits = F.linear(hidden, words.to(hidden.dtype))[:, :model.mask_token_id].float()   # (n, V)
        return (F.cross_entropy(logits, target[at], reduction='none') * inside[at]).sum(), ()

    total = 0.0
    count = 0
    for _ in range(depth):
        state = next_state(model, state, x0[row, at])
        inside = inside & (at + 1 < x0.size(1))
        at = (at + 1).clamp(max=x0.size(1) - 1)
        inside = inside & (weight[row, at] > 0)
        target = x0[row, at]                                                   # (most,)
        total = total + in_pieces(of, norm(state), words, model.most_logits)[0]
        count = count + inside.sum()
    mean = total / count.clamp(min=1)
    return mean, {'draft': torch.stack((mean.detach(), torch.ones_like(mean)))}
