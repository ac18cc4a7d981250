"""
Left-to-right sampling, plain and speculative (Leviathan et al. 2023): a causal pass checks several tokens.

Every token is distributed as plain left-to-right sampling would draw it, in far fewer passes. Drafts come
from a small head that was trained for it, or from the network's bidirectional pass.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear, norm
from plumbing.draw import draw, filtered, fine, forbid
from parts.cache import Cache
from parts.presets import check_suffix
from plumbing.kernels import squared_relu
from plumbing.pieces import in_pieces
from plumbing.rows import Part, close_rows, left_of, places, recorded, settled, spread

WINDOW = 5   # tokens drafted a round; docs/log.md has measured 1 to 63


class Drafter(nn.Module):
    """
    A recurrent head that guesses what the causal pass will say next (Zhang et al. 2024, ReDrafter).

    Its first state is the causal hidden state of a position; fed the token there, it becomes the next one.
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


def picked(x, at):
    """Of x (R, S, C) the places at (R, W) of each row, a place beyond the last one being that: (R, W, C)."""
    return x.take_along_dim(at.clamp(max=x.size(1) - 1)[..., None], 1)


def causal_pass(model, x, at, cache=None):
    """
    Hidden states (R, W, C) of the causal pass over x (R, T) at positions at (R, W), a window for each row.

    cache: with room for the windows. If it is empty, or None, everything left of them is computed as well.
    """
    if cache is not None and cache.at is not None:
        return model(x, causal=True, cache=cache, at=at)
    width = min(model.config.block_size, int(at.max()) + 1)
    return picked(model(x[:, :width], causal=True, cache=cache), at)


class Unfinished:
    """
    The rows of a canvas (B, T) that have masks left, and what is known of them. All but write_blocks need the
    masks to be a suffix of each row.

    rows (R,): their numbers; a row without masks leaves, also the cache (None if the network cannot use one).
    """

    def __init__(self, model, canvas, ends, trace):
        self.canvas = canvas.clone()
        self.mask = model.mask_token_id
        self.ends = ends
        self.rows = (canvas == self.mask).any(1).nonzero()[:, 0]
        self.nfe = torch.zeros(len(canvas), dtype=torch.long, device=canvas.device)
        self.history = recorded(canvas, trace)
        self.cache = Cache.empty(model, len(self.rows))

    def look(self, window):
        """x (R, T) and the first mask of each row (R, 1); the cache gets room for a window there."""
        x = self.canvas[self.rows]
        hole = (x == self.mask).long().argmax(1, keepdim=True)
        if self.cache is not None:
            self.cache.make_room(int(hole.max()) + window)
        return x, hole

    def closed(self, x):
        """The canvas with x (R, T), and padding behind what is an end in it."""
        masked = self.canvas[self.rows] == self.mask
        return self.canvas.index_copy(0, self.rows, close_rows(x, masked, self.mask, self.ends))

    def show_draft(self, x, hole, drafted, q):
        """
        Adds a canvas to the history with the draft (R, W) of what comes from hole (R, 1) on, if there is one.

        What is only drafted is ~id there, so that nobody takes it for text. q (R, W, V+2), 0: no draft.
        """
        if self.history is not None and q.any():
            T, W = x.size(1), drafted.size(1)
            ids = torch.where(q.sum(2) > 0, ~drafted, self.mask)                             # (R, W)
            at = hole + torch.arange(W, device=x.device)
            x = F.pad(x, (0, W), value=self.mask).scatter(1, at, ids)[:, :T]
            self.history.append(self.canvas.index_copy(0, self.rows, x))

    def put(self, x, passes):
        """Keeps x (R, T), which took passes, an int or (R,). Returns which of the R rows go on."""
        self.canvas = self.closed(x)
        self.nfe[self.rows] += passes
        recorded(self.canvas, self.history)
        going = (self.canvas[self.rows] == self.mask).any(1).nonzero()[:, 0]
        if self.cache is not None:
            self.cache.keep_rows(going)
        self.rows = self.rows[going]
        return going

    def before(self, begin):
        """The canvas with masks from begin (R, 1) on in the rows that go on."""
        at = torch.arange(self.canvas.size(1), device=begin.device)
        return self.canvas.index_put((self.rows,), self.canvas[self.rows].masked_fill(at >= begin, self.mask))


@torch.no_grad()
def write(model, canvas, filters, ends, *, state=None, generator=None, trace=False):
    """
    Fills canvas (B, T), whose masks are a suffix of each row, by speculative sampling.

    filters: temperature, top_k, top_p; ends: see plumbing.rows.Ends; state (B, C): of the causal mode at the
    first mask of each row, if it is known. Returns what sample.denoise returns.
    """
    run = Unfinished(model, canvas, ends, trace)
    window = min(WINDOW, canvas.size(1))

    # no draft yet, ids (R, W) and their laws (R, W, V+2); a head has no state yet to draft from
    size = (len(run.rows), window if model.drafter is None else 0)
    drafted = torch.zeros(size, dtype=torch.long, device=canvas.device)
    q = torch.zeros(*size, run.mask + 2, device=canvas.device)
    if state is not None and model.drafter is not None:
        drafted, q = first_draft(model, state[run.rows], window, filters, generator)
    while len(run.rows):
        x, hole = run.look(drafted.size(1) + 1)
        passes = torch.ones_like(run.rows)
        none = q.sum((1, 2)) == 0
        if model.drafter is None and none.any():
            ids, law = draft_by_both_sides(model, x[none], hole[none], window, filters, generator)
            drafted[none], q[none] = ids, law.to(q.dtype)
            passes += none
        run.show_draft(x, hole, drafted, q)
        x, drafted, q = one_round(model, x, hole, drafted, q, window, filters, generator, run.cache)
        going = run.put(x, passes)
        settled(run.canvas, run.history)
        drafted, q = drafted[going], q[going]
    return run.canvas, run.nfe, run.history


def first_draft(model, state, window, filters, generator):
    """A draft of window tokens from a hole on, where the causal mode has the state (R, C), see one_round."""
    law = filtered(model.logits(state, real_only=True), **filters)[:, None]                  # (R, 1, V+2)
    first = draw(law, generator)                                                             # (R, 1)
    if window == 1:
        return first, law
    count = torch.zeros_like(first)
    behind, q = next_draft(model, state[:, None], law, count, first[:, 0], window - 1, filters, generator)
    return torch.cat((first, behind), 1), torch.cat((law, q), 1)


def draft_by_both_sides(model, x, hole, window, filters, generator):
    """A draft of window tokens from hole (R, 1) on by a bidirectional pass over x (R, T), see one_round."""
    at = hole + torch.arange(window, device=x.device)                                        # (R, W)
    law = filtered(model.logits(picked(model(x), at), real_only=True), **filters)            # (R, W, V+2)
    return draw(law, generator), law


def one_round(model, x, hole, drafted, q, window, filters, generator, cache=None):
    """
    One round: a verdict on the draft of each row's next tokens, and the next draft.

    drafted (R, W): ids of the next W tokens; q (R, W, V+2): the distributions that they were drawn from, all
    0 where there is no draft. The causal pass looks at the whole draft at once. From the left each token is
    accepted with probability min(1, p/q), p of the causal pass; the first rejected one is drawn anew from the
    positive part of p - q; if none is rejected, one more comes from p. So a row gains at least one token, and
    every token is distributed by p.

    x (R, T), all masks from hole (R, 1) on -> x (R, T), the next drafted and q, of window tokens. What the
    cache knows of rejected tokens is written over in the next round.
    """
    T = x.size(1)
    W = drafted.size(1)
    at = hole + torch.arange(W + 1, device=x.device)                                         # (R, W+1)

    # what the causal pass says about each drafted token and the one behind; windows may stand out of x
    x = F.pad(x, (0, W + 1), value=model.mask_token_id)
    hidden = causal_pass(model, x.scatter(1, at[:, :W], drafted), at, cache)                 # (R, W+1, C)
    p = filtered(model.logits(hidden, real_only=True), **filters)                            # (R, W+1, V+2)

    # how many are accepted from the left
    p_drafted = p[:, :W].gather(2, drafted[..., None])[..., 0]                               # (R, W)
    q_drafted = q.gather(2, drafted[..., None])[..., 0]
    noise = torch.rand(q_drafted.shape, generator=generator, device=x.device)
    count = (noise * q_drafted < p_drafted).long().cumprod(1).sum(1, keepdim=True)           # (R, 1)

    # one more token, from what p has and q lacks; if none was rejected q is 0 there
    wanted = picked(p, count)[:, 0]                                                          # (R, V+2)
    rest = (wanted - picked(F.pad(q, (0, 0, 0, 1)), count)[:, 0]).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 1e-9, rest, wanted)  # p = q up to rounding
    redrawn = draw(rest, generator)                                                          # (R,)

    tokens = F.pad(drafted, (0, 1)).scatter(1, count, redrawn[:, None])                      # (R, W+1)
    beyond = torch.arange(W + 1, device=x.device) > count
    x = x.scatter(1, at, tokens.masked_fill(beyond, model.mask_token_id))[:, :T]
    return x, *next_draft(model, hidden, p, count, redrawn, window, filters, generator)


def next_draft(model, hidden, p, count, redrawn, window, filters, generator):
    """
    The draft of the window tokens behind the redrawn (R,) one: ids (R, window), their laws (R, window, V+2).

    hidden (R, W+1, C) and p (R, W+1, V+2): what the causal pass said; count (R, 1): how many tokens it
    accepted. A draft head is fed one token after the other, from the state before the redrawn one. Without
    it, what the pass said about the tokens behind, though in the light of a rejected one, is a draft for free
    (as in Jacobi decoding); past its end any token is as good as another.
    """
    if model.drafter is not None:
        state = picked(hidden, count)[:, 0]                                                  # (R, C)
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
    q = picked(F.pad(p, (0, 0, 0, window)), behind)                                          # 0 past the end
    q = torch.where(q.sum(-1, keepdim=True) == 0, any_token, q)
    return draw(q, generator), torch.where((count < window)[..., None], q, 0)  # all accepted: no draft


def surprise(look):
    """
    The doubt (R, T): 1 - min(1, p / q), of a token that was drawn with q and that the causal mode, which
    reads the completed canvas, would have drawn with p: how often speculative sampling would reject it.
    """
    run, x = look.run, look.completed()
    look.passes += 1
    at = places(look.visible)                                                  # (N,)
    hidden = look.model(x, causal=True).flatten(0, 1)[at]                      # (N, C)
    logp = run.model.logits(hidden, real_only=True).log_softmax(-1).gather(1, x.flatten()[at, None])[:, 0]
    drawn = run.committed_logp[run.rows].flatten()[at]
    return spread(look.visible, (1 - (logp - drawn).exp().clamp(max=1)).to(drawn.dtype))


@torch.no_grad()
def left_to_right(model, canvas, closed, steps, filters, ends, *, generator=None, trace=False):
    """
    Writes at most steps tokens into the holes of each row of canvas (B, T), from the left: autoregressively.

    closed (B, T): where none of ends.forbid is drawn. Returns what sample.denoise returns; where steps were
    too few the canvas still has masks.
    """
    run = Unfinished(model, canvas, ends, trace)
    for _ in range(steps):
        if not len(run.rows):
            break
        x, hole = run.look(1)
        logits = model.logits(causal_pass(model, x, hole, run.cache)[:, 0], real_only=True)    # (R, V+2)
        logits = forbid(logits, ends.forbid, closed[run.rows].gather(1, hole))
        # not needed, but a seed keeps its samples
        torch.rand(x.shape, generator=generator, device=x.device, dtype=fine(x.device))
        ids = draw(filtered(logits, **filters), generator)                                     # (R,)
        run.put(x.scatter(1, hole, ids[:, None]), 1)
        settled(run.canvas, run.history)
    return run.canvas, run.nfe, run.history


def write_prefix(model, x, fixed, ar_prefix, *, ends, generator, trace, **rules):
    """
    x (B, T) with ar_prefix more tokens in each row, left to right, or with draft all that are missing: (x,
    passes). trace: a list, or None. In blocks each is drafted when it is its turn.
    """
    drafts = rules.get('draft') and not rules.get('block_length')
    if not ar_prefix and not drafts:
        return x, 0
    mask = model.mask_token_id
    masked = x == mask
    width = x.size(1) if drafts else min(x.size(1), int(masked.long().argmax(1).max()) + ar_prefix)
    check_suffix(masked[:, :width])
    filters = {name: rules[name] for name in ('temperature', 'top_k', 'top_p') if name in rules}

    def whole(head):
        return close_rows(torch.cat((head, x[:, width:]), 1), masked, mask, ends)

    steps, stays = None, rules.get('remask', 'none') in ('none', 'causal')      # else it may be taken back
    if trace is not None:
        steps = Part(x[:, :width], recorded(x, trace), whole, stays)
    how = dict(generator=generator, trace=steps)
    if drafts:
        head, nfe, _ = write(model, x, filters, ends, **how)
    else:
        closed = left_of(fixed)[:, :width]
        head, nfe, _ = left_to_right(model, x[:, :width], closed, ar_prefix, filters, ends, **how)
    return whole(head), nfe


def draft_loss(model, hidden, x0, weight, depth=6, most=256, segment=None):
    """
    What teaches the draft head: (the mean CE, {'draft': (sum of weight * CE, sum of weight)}).

    x0 (B, T) ids, hidden (B, T, C) of the causal pass over them, weight (B, T), > 0 where a token is
    modelled, segment (B, T): of packed texts their numbers. From the states of these positions (of more than
    most, most spread evenly) the head is fed the true tokens of the same text one by one and asked for the
    next one, up to depth tokens ahead. State and embeddings are detached: the head learns from the network,
    and the network nothing from the head. The shapes never change, because a CPU prepares its matrix products
    anew for every new shape.
    """
    row, at = (weight > 0).nonzero(as_tuple=True)                              # (N,) each
    pick = torch.arange(most, device=row.device)
    inside = pick < len(row)                                                   # (most,)
    pick = (pick * max(1, len(row) / most)).long().clamp(max=len(row) - 1)
    row, at = row[pick], at[pick]
    state, text = hidden.detach()[row, at], None if segment is None else segment[row, at]
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
        if segment is not None:
            inside = inside & (segment[row, at] == text)
        target = x0[row, at]                                                   # (most,)
        total = total + in_pieces(of, norm(state), words, model.most_logits)[0]
        count = count + inside.sum()
    mean = total / count.clamp(min=1)
    return mean, {'draft': torch.stack((mean.detach(), torch.ones_like(mean)))}
