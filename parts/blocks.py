"""
Text in blocks from left to right, each block by diffusion (Arriola et al. 2025, BD3-LM; LLaDA2.x).

One rule: a query sees the slots up to the end of its own block. Blocks of length 1 are the causal mode, one
block is the whole canvas. Token i has slot i + 1, the start symbol slot 0. What is left of a block has always
been read by the causal pass, so its keys and values serve every block length; a block itself is scratch
beside them. To everything else (what is asked, the loss, the bound, the sampling loop) a block is a row like
any other, of a network that has read what is left of it: InBlocks in training, AfterPrefix in sampling.
"""

import math
from copy import copy
from functools import partial

import torch
import torch.nn.functional as F

from parts.look import Sampling
from parts.speculate import Unfinished, causal_pass, write
from plumbing.evaluate import nelbo
from plumbing.kernels import beside
from plumbing.optim import ramp
from plumbing.pack import pack
from plumbing.rows import Part, places, settled
from plumbing.text import modelled


class Kept:
    """Takes the place of a cache in a causal pass over whole rows: keeps all, with gradient."""

    def __init__(self):
        self.layers = []                                            # (k, v) of every block applied
        self.states = []                                            # and what its short_conv reads, (B, T, C)
        self.idx = None                                             # (B, T) the token in each slot

    def begin(self, idx, at, causal):
        self.idx = idx
        return None, slice(idx.size(1))

    def bias(self, dtype):
        return None

    def put(self, layer, k, v):
        self.layers.append((k, v))
        return k, v

    def convolve(self, p, x, y, weight, offsets):
        self.states.append(y)
        return x


class Beside:
    """
    Takes the place of a cache in a pass over blocks: each sees itself and what is left of it, as Kept.

    start (B, T): the position at which the block of a position begins; segment (B, T) or None: its text.
    """

    def __init__(self, kept, start, segment):
        self.kept, self.start, self.segment = kept, start, segment

    def begin(self, idx, at, causal):
        return None, slice(1, idx.size(1) + 1)                      # token i has slot i + 1

    def bias(self, dtype):
        """(B, 1, T, 2T): the slots of the causal pass, then those of the blocks."""
        start = self.start
        slot = torch.arange(start.size(1), device=start.device)
        left = slot <= start[..., None]                             # (B, T, T): slot s is that of token s - 1
        if self.segment is not None:
            left = left & (self.segment[:, None] == self.segment[..., None])
        seen = torch.cat((left, start[:, None] == start[..., None]), 2)[:, None]
        return torch.zeros(seen.shape, dtype=dtype, device=start.device).masked_fill(~seen, float('-inf'))

    def put(self, layer, k, v):
        return tuple(torch.cat(both, 2) for both in zip(self.kept.layers[layer], (k, v)))

    def convolve(self, p, x, y, weight, offsets):
        """x (B, T, C) + what stands left of each block, as the causal pass saw it."""
        states = self.kept.states[p.layer]                          # slot s is that of token s - 1
        text = torch.zeros_like(self.start) if self.segment is None else self.segment
        for d, w in enumerate(weight[:len(offsets) // 2], 1):
            there = (beside(self.start, d, -1) != self.start) & (beside(text, d, -1) == text)      # (B, T)
            x = torch.addcmul(x, F.pad(states, (0, 0, d - 1, 1 - d)) * there[..., None], w)
        return x


class Blocks:
    """
    How rows (B, T) are cut into N blocks of at most L tokens.

    start (B, T): where the block of a position begins; segment (B, T): its text, None: a row is one text.
    at (N, L): the places of the tokens of a block in the flattened batch, B * T where it has fewer.
    """

    def __init__(self, start, segment=None):
        self.start, self.segment = start, segment
        B, T = start.shape
        position = torch.arange(T, device=start.device).expand(B, T)
        number = (start == position).flatten().cumsum(0) - 1        # (B * T,) of the block
        inside = (position - start).flatten()
        self.at = torch.full((int(number[-1]) + 1, int(inside.max()) + 1), B * T, device=start.device)
        self.at[number, inside] = torch.arange(B * T, device=start.device)

    def cut(self, rows, nothing=0):
        """rows (B, T) -> blocks (N, L), nothing behind the end of a block."""
        end = torch.full_like(rows.flatten()[:1], nothing)
        return torch.cat((rows.flatten(), end))[self.at]

    def rows(self, x0, free, real, scale):
        """The blocks as rows to be asked, see train.diffusion_part; every token weighs scale."""
        x0, free, real = map(self.cut, (x0, free, real))
        return x0, free, real, free.sum(1, keepdim=True) * scale

    def of(self, some):
        """The same, but only some (n,) of the N blocks are cut and laid."""
        other = copy(self)
        other.at = self.at[some]
        return other

    def lay(self, blocks):
        """blocks (N, L) -> rows (B, T)."""
        rows = blocks.new_zeros(self.start.numel() + 1)
        rows[self.at] = blocks
        return rows[:-1].view_as(self.start)


def grown(step, config):
    """
    causal_ratio and block_lengths as they are at a step while blocks grow (block_warmup_iters), {} otherwise.

    From one token to the whole row (LLaDA2.0, arXiv 2512.15745): all rows are causal at first, in blocks of
    the shortest length; the longer ones come one by one, and whole canvases linearly.
    """
    if not config['block_warmup_iters']:
        return {}
    done = ramp(step, config['block_warmup_iters'])
    lengths, ratio = sorted(config['block_lengths']), config['causal_ratio']
    so_far = max(1, math.ceil(done * len(lengths)))
    return dict(causal_ratio=ratio + (1 - done) * (1 - ratio), block_lengths=tuple(lengths[:so_far]))


def random_blocks(end, T, lengths, generator):
    """
    Where blocks begin (B, T), and where each row's last one ends (B,), behind the end (B,) of its text.

    Each row has one of the lengths. Its first block has 1..length tokens, so that blocks may begin anywhere.
    """
    which = torch.randint(len(lengths), end.shape, generator=generator, device=end.device)
    length = torch.tensor(lengths, device=end.device)[which][:, None]                        # (B, 1)
    u = torch.rand(length.shape, generator=generator, device=end.device)
    return even_blocks(end, T, length, 1 + (u * length).long().clamp(max=length - 1))


def even_blocks(end, T, length, first):
    """random_blocks with a length and a length of the first block, (B, 1) each."""
    position = torch.arange(T, device=end.device)
    start = (first + (position - first).div(length, rounding_mode='floor') * length).clamp(min=0)     # (B, T)
    behind = start.gather(1, end[:, None] - 1) + torch.where(end[:, None] > first, length, first)
    return start, behind[:, 0].clamp(max=T)


def lay_out(x0, meta, lengths, generator):
    """
    Rows x0 (B, T) as a causal pass reads them: (x0, free, real, segment, Blocks), without lengths no blocks.

    With padding they are packed, and end with their text, or with the last block of it.
    """
    (free, real), T, blocks = modelled(x0, meta), x0.size(1), None
    end, segment, offset = T - real.flip(1).long().argmax(1), None, []                       # (B,)
    position = torch.arange(T, device=x0.device)
    if lengths:
        start, end = random_blocks(end, T, lengths, generator)
        offset = [position - start]                                 # (B, T) of a position in its block
    if meta['pad'] is not None:
        x0, free, real, *offset, segment = pack(end, x0, free, real, *offset)
    if lengths:
        # in any order, because rows were packed by length, and the first ones get the wrong tokens
        blocks = Blocks(position - offset[0], segment)
        blocks = blocks.of(torch.randperm(len(blocks.at), generator=generator, device=x0.device))
    return x0, free, real, segment, blocks


def level_of(idx, there, mask, level=None):
    """The noise level (N, 1) of blocks idx (N, L), or level, as a share of the tokens there (N, L)."""
    level = (idx == mask).float().mean(1, keepdim=True) if level is None else level[:, :1]
    return level * idx.size(1) / there.sum(1, keepdim=True).clamp(min=1)


class InBlocks:
    """A network for blocks (N, L), each of which sees what a causal pass has kept of the text left of it."""

    def __init__(self, model, kept, blocks):
        self.model, self.kept, self.blocks = model, kept, blocks

    def __getattr__(self, name):
        return getattr(self.model, name)

    def of(self, some):
        """The same for some (n,) of the N blocks."""
        return InBlocks(self.model, self.kept, self.blocks.of(some))

    def __call__(self, idx, only=None, segment=None, **told):
        """ids (N, L) -> hidden states (N, L, C); only (n,): (n, C). See GPT.forward."""
        blocks, at = self.blocks, self.blocks.at                    # (N, L)
        there = at < blocks.start.numel()
        told = dict(level=level_of(idx, there, self.mask_token_id, told.pop('level', None)), **told)
        told = {name: blocks.lay(ids.expand(idx.shape)) for name, ids in told.items() if ids is not None}
        at = (at * there).flatten()                                 # (N * L,)
        cache = Beside(self.kept, blocks.start, blocks.segment)
        laid, places = blocks.lay(idx), None if only is None else at[only]
        told['left'] = self.left(laid)
        hidden = self.model(laid, segment=blocks.start, cache=cache, only=places, **told)
        return hidden if only is not None else hidden.flatten(0, 1)[at].unflatten(0, idx.shape)

    def left(self, idx):
        """The left neighbours (B, T) of ids idx (B, T) in blocks; [WRONG] where a text begins."""
        start, read, nothing = self.blocks.start, self.kept.idx, self.wrong_token_id
        read = read.masked_fill(read == self.mask_token_id, nothing)    # [MASK] is the start symbol there
        return torch.where(beside(start, 1, -1) != start, read, beside(idx, 1, nothing))


@torch.no_grad()
def block_nelbo(model, x0, free, real, generator=None, length=16):
    """
    The bound on -log p(x0) in blocks of a length, from the first position on: nats of each row (B,).

    x0, free, real (B, T), see corruption.ask. What is right of the block with the last real token is free.
    """
    T, kept = x0.size(1), Kept()
    model(x0, causal=True, cache=kept, only=places(real))
    end = T - real.flip(1).long().argmax(1)
    start, end = even_blocks(end, T, *torch.full((2, len(x0), 1), length, device=x0.device))
    blocks = Blocks(start)
    free = free & (torch.arange(T, device=x0.device) < end[:, None])
    nats = nelbo(InBlocks(model, kept, blocks), blocks.cut(x0), blocks.cut(free), generator)     # (N,)
    return torch.zeros(len(x0), device=x0.device).index_add(0, blocks.at[:, 0] // T, nats)


def block_bounds(lengths):
    """The bounds in blocks of these lengths, for plumbing.evaluate."""
    return {f'nelbo_{length}': partial(block_nelbo, length=length) for length in lengths}


class AfterPrefix:
    """
    A network for one block (R, L) of each row, at (R, L), whose cache has read what is left of it.

    x (R, S): the rows, in which the block stands. In the causal mode its tokens are read from the left.
    """

    def __init__(self, model, cache, at, x):
        self.model, self.cache, self.at, self.x = model, cache, at, x

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, idx, causal=False, **told):
        """ids (R, L) -> hidden states (R, L, C). See GPT.forward."""
        if causal:
            return self.model(self.x.scatter(1, self.at, idx), causal=True, cache=self.cache, at=self.at)
        inside = self.at < self.cache.end
        level = level_of(idx, inside, self.mask_token_id)
        segment = None if inside.all() else inside.long()           # what stands out of it is no neighbour
        begin = self.at[:, :1]                                      # [WRONG] is left of the first token
        left = self.x.gather(1, (begin - 1).clamp(min=0)).masked_fill(begin == 0, self.wrong_token_id)
        told.update(level=level, left=torch.cat((left, idx[:, :-1]), 1))
        return self.model(idx, segment=segment, cache=self.cache, at=self.at, **told)

    def of(self, rows):
        """The same for some rows (r,) of the R."""
        if len(rows) == len(self.at):
            return self
        return AfterPrefix(self.model, self.cache.of(rows), self.at[rows], self.x[rows])


@torch.no_grad()
def write_blocks(run, loop):
    """
    Fills the canvas of a parts.look.Sampling in blocks of how.block_length, each by the loop, from the left.

    The first block begins at the first hole. A text is finished at its end token. how.steps are passes for a
    whole canvas: a block has its share of them, of which the last writes its keys and values and is causal.
    With how.revise a block is committed one block later: until then it is part of the canvas, and what is
    doubted in it can still be taken back. Returns what sample.denoise returns; the committing passes count.
    """
    how, model, L, T = run.how, run.model, run.how.block_length, run.canvas.size(1)
    todo = Unfinished(model, run.canvas, run.ends, run.history)
    todo.cache.end = T
    begin = (run.canvas == run.mask).long().argmax(1)[todo.rows][:, None]    # (R, 1) the first hole
    known, width, logp = begin, L, 0.0                              # the last slots, not in the cache yet
    while len(todo.rows):
        x = todo.canvas[todo.rows]
        todo.cache.make_room(int(begin.max()) + width + 1)
        state = None                                                # of the causal mode at begin
        if known.size(1):
            state = causal_pass(model, x, known, todo.cache)[:, -1]            # (R, C)

        # the block is a canvas like any other; where it stands out of the row it is fixed, and is not seen
        at = begin + torch.arange(width, device=x.device)           # (R, L), or with revise (R, 2L)
        outside, place = at >= T, at.clamp(max=T - 1)
        block = x.gather(1, place).masked_fill(outside, 0)
        fixed, closed = (where[todo.rows].gather(1, place) for where in (run.fixed, run.closed))
        x = torch.cat((x, x.new_zeros(len(x), width)), 1)           # (R, T + L)
        passes = 0
        if how.draft:
            text, passes = drafted(run, x.scatter(1, at, block)[:, :T], place, None if how.revise else state)
            block = torch.where(outside, block, text)
        network, steps = AfterPrefix(model, todo.cache, at, x), None
        if run.history is not None:
            steps = Part(block, run.history, lambda part: todo.closed(x.scatter(1, at, part)[:, :T]))
        part = Sampling(network, block, fixed | outside, how.of_block(T), run.ends, closed, None,
                        run.generator, steps)
        part.committed_logp[:, :width - L] = logp                   # of the block before, if it is still open
        block, nfe, _ = loop(part)
        done = width - L if how.revise else L                       # so many tokens are committed
        going = todo.put(x.scatter(1, at, block)[:, :T], nfe + passes + bool(done))
        known, begin = (at[going, :done] + 1).clamp(max=T - 1), begin[going] + done
        width, logp = 2 * L if how.revise else L, part.committed_logp[going, done:]
        settled(todo.before(begin), todo.history)
    return todo.canvas, todo.nfe, todo.history


def drafted(run, x, at, state):
    """
    What the causal mode writes into the masks of blocks at (R, L) of rows x (R, T): ids (R, L), passes (R,).

    state (R, C): its state at the first of them, or None. It reads what is left of a block anew, in the first
    of its passes.
    """
    outside = torch.ones_like(x, dtype=torch.bool).scatter(1, at, False)
    x = torch.where(outside & (x == run.mask), 0, x)                # nothing is written behind a block
    x = x[:, :int(at.max()) + 1]                                    # nor drafted, if all blocks end here
    x, nfe, _ = write(run.model, x, run.how.filters(), run.ends, state=state, generator=run.generator)
    return x.gather(1, at), nfe
