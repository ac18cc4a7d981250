"""
Optional parts of the network, chosen by one setting: parts='short_conv:2,shortcuts,bigrams:8192,level:32'.

Each part starts as the identity, so a trained network can get one later, and costs nothing where it is off. A
part is a class with the joints that it uses, see Part, and one entry in IN_A_BLOCK or IN_THE_NETWORK.
docs/extending.md adds one.
"""

import math

import torch
import torch.nn as nn

from configurator import UserError
from model import Linear, attention_bias, norm
from plumbing.kernels import Taps, beside
from plumbing.rows import places


class Part(nn.Module):
    """The joints at which a part may act. p is a model.Pass, what the blocks share in one pass."""

    def embed(self, embedded):
        """Embeddings (..., C) -> (..., C), a function of the token alone."""
        return embedded

    def added(self, network, idx, p):
        """Added to the embeddings of the ids idx (B, T): (B, T, C), or (B, W, C) with a cache."""
        return 0

    def before(self, x, p):
        """The input (B, T, C) of a block -> (B, T, C)."""
        return x

    def values(self, v, p):
        """The values (B, nh, T, hs) of a block's attention -> (B, nh, T, hs)."""
        return v

    def bias(self, bias, p):
        """What is added to a block's attention scores, None or broadcast to (B, nh, T, T) -> the same."""
        return bias


class ShortConv(Part):
    """
    A block first adds to each position its n neighbours, in the causal mode those to the left.

    Each neighbour has one weight for each channel. Primer (So et al. 2021), Canon layers (Allen-Zhu 2025).
    """

    def __init__(self, config, n=2):
        super().__init__()
        # n to the left, n to the right, the nearest first
        self.weight = nn.Parameter(torch.zeros(2 * n, 1, config.n_embd))

    def before(self, x, p):
        n = len(self.weight) // 2
        offsets = [*range(1, n + 1)]
        if not p.causal:
            offsets += range(-1, -n - 1, -1)
        weight = self.weight[:len(offsets), 0].to(x.dtype)           # (n or 2n, C)
        y = norm(x)
        if p.at is None:
            x = x + Taps.apply(y, weight, offsets, p.segment)
        return x if p.cache is None else p.cache.convolve(p, x, y, weight, offsets)


class Shortcuts(Part):
    """Every block sees the embedding (modded-nanogpt) and the first values (Zhou et al. 2024) again."""

    def __init__(self, config):
        super().__init__()
        # of x, the embedding, the values, the first values
        self.weight = nn.Parameter(torch.tensor([1.0, 0.0, 1.0, 0.0]))

    def mixed(self, x, p, name, own, other):
        first = p.first.setdefault(name, x)
        return x if first is x else torch.addcmul(own * x, first, other)

    def before(self, x, p):
        return self.mixed(x, p, 'x', *self.weight[:2].to(x.dtype))

    def values(self, v, p):
        return self.mixed(v, p, 'values', *self.weight[2:].to(v.dtype))


class Graph(Part):
    """
    Every head learns how much less it looks at positions that are not neighbours, see graph_edges.

    A penalty of 0 is full attention, a large one is the graph alone.
    """

    def __init__(self, config, window=8, topk=4):
        super().__init__()
        self.window = window
        self.topk = topk
        self.off_graph_penalty = nn.Parameter(torch.zeros(config.n_head))

    def bias(self, bias, p):
        dtype = p.cos.dtype
        if p.not_neighbours is None:                                 # the same for all blocks
            edges = graph_edges(p.embedded, self.window, self.topk, p.causal, p.segment)
            p.not_neighbours = (~edges)[:, None].to(dtype)           # (B, 1, T, T)
        if bias is None:
            bias = attention_bias(p.embedded.size(1), p.causal, p.segment, dtype, p.cos.device)
        return bias - self.off_graph_penalty.to(dtype).view(-1, 1, 1) * p.not_neighbours


def graph_edges(embedded, window, topk, causal, segment):
    """
    Which positions are neighbours of which: bool (B, T, T), from the embeddings (B, T, C) of the canvas.

    Neighbours are at most window positions away, or a power of two away (shortcuts through the row), or among
    the topk most similar of the rest; of equals (all masks are) the nearest comes first, the left one before
    the right one. Only what a position may look at is compared: in the causal mode a token to the right would
    give the answer away. The length of the row has no say either, since rows are cut and packed.
    """
    T = embedded.size(1)
    position = torch.arange(T, device=embedded.device)
    distance = (position[:, None] - position).abs()                 # (T, T)
    to_the_right = position > position[:, None]                     # (T, T)
    edges = (distance <= window) | ((distance & (distance - 1)) == 0)

    similar = norm(embedded.detach().float())
    similar = similar @ similar.mT / similar.size(-1) - 1e-5 * (distance + to_the_right / 2)  # (B, T, T)
    closed = edges | to_the_right if causal else edges
    if segment is not None:
        closed = closed | (segment[:, :, None] != segment[:, None])
    nearest = similar.masked_fill(closed, float('-inf')).topk(min(topk, T), -1)  # (B, T, topk)
    return edges.repeat(len(embedded), 1, 1).scatter(-1, nearest.indices, True)


class Mixer(Part):
    """The embedding is n blocks that exchange information by attention among them, added to it."""

    def __init__(self, config, n=4):
        super().__init__()
        C = config.n_embd
        if C % n or n == C:
            raise UserError(f'mu:{n} must divide n_embd={C} into blocks of at least two channels')
        self.n = n
        self.qkv = Linear(C // n, 3 * C // n)
        self.proj = Linear(C // n, C // n, zero=True)

    def embed(self, embedded):
        q, k, v = self.qkv(norm(embedded.unflatten(-1, (self.n, -1)))).chunk(3, -1)  # (..., n, C/n) each
        mixed = (q @ k.mT * q.size(-1) ** -0.5).softmax(-1) @ v
        return embedded + self.proj(mixed).flatten(-2)


class Bigrams(Part):
    """
    Embeddings of pairs of tokens, after modded-nanogpt's bigram hash embeddings (2026).

    One table is for a token and its left neighbour. In the bidirectional mode another is for the left and
    right neighbours of a position. With fewer rows than pairs some pairs share one.

    told: left (B, T), the left neighbours, where some are not in the canvas.
    """

    def __init__(self, config, rows=8192):
        super().__init__()
        self.tokens = config.vocab_size + 2
        self.rows = min(rows, self.tokens ** 2)
        self.left = nn.Embedding(self.rows, config.n_embd)
        self.around = nn.Embedding(self.rows, config.n_embd)
        nn.init.zeros_(self.left.weight)
        nn.init.zeros_(self.around.weight)

    def added(self, network, idx, p):
        outside = self.tokens - 1  # [WRONG], which no token that is read ever is
        left = p.told.get('left')
        if left is None:
            left = beside(idx, 1, outside, p.segment)                # (B, T)
        found = self.looked_up(self.left, left, idx, p.at)
        if p.causal:
            return found
        return found + self.looked_up(self.around, left, beside(idx, -1, outside, p.segment), p.at)

    def looked_up(self, table, first, second, at):
        """Pairs of ids (B, T) each -> their embeddings (B, T, C), or (B, W, C) with at (B, W)."""
        row = (first * self.tokens + second) % self.rows
        return table(row if at is None else row.gather(1, at))


class Level(Part):
    """
    The bidirectional mode is told the share of noise in its canvas: by default the share of [MASK].

    told: level (B, 1) or (B, T). An MLP of that width reads it; width 0 is one linear layer.
    """

    def __init__(self, config, width=0):
        super().__init__()
        first = [Linear(32, width), nn.GELU()] if width else []
        self.mlp = nn.Sequential(*first, Linear(width or 32, config.n_embd, zero=True))

    def added(self, network, idx, p):
        if p.causal:
            return 0
        level = p.told.get('level')
        if level is None:
            level = (idx == network.mask_token_id).float().mean(1, keepdim=True)
        waves = (level[..., None] * math.pi * torch.arange(32, device=idx.device)).cos()
        return self.mlp(waves)                                       # (B, 1 or T, C)


class Previous(Part):
    """
    The bidirectional mode is shown what it predicted in an earlier pass (Chen et al. 2022, Analog Bits).

    told: previous (B, T), ids, the mask token where nothing was predicted.
    """

    def __init__(self, config):
        super().__init__()
        self.proj = Linear(config.n_embd, config.n_embd, zero=True)

    def added(self, network, idx, p):
        if p.causal:
            return 0
        previous = p.told.get('previous')
        if previous is None:
            previous = torch.full_like(idx, network.mask_token_id)
        return self.proj(norm(network.wte(previous)))


class Places(Part):
    """Every position of a text has an embedding of its own: on a board, what is near is not next to it."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.block_size, config.n_embd))

    def added(self, network, idx, p):
        at = torch.arange(idx.size(1), device=idx.device).expand(idx.shape)
        if p.segment is not None:                                    # each text of a row from its first token
            begins = beside(p.segment, 1, -1, None) != p.segment
            at = at - at.masked_fill(~begins, 0).cummax(1).values
        at = at if p.at is None else at.gather(1, p.at)
        at = at.clamp(max=len(self.weight) - 1)                      # a draft may reach beyond the row
        return self.weight[at]                                       # (B, T, C), or (B, W, C)


# name -> class, in the order in which the parts act, and in which an optimiser knows their parameters
IN_A_BLOCK = dict(graph=Graph, shortcuts=Shortcuts, short_conv=ShortConv)
IN_THE_NETWORK = dict(previous=Previous, mu=Mixer, bigrams=Bigrams, level=Level, places=Places)


def parse_parts(text):
    """'short_conv:2,shortcuts' -> {'short_conv': (2,), 'shortcuts': ()}. Raises UserError."""
    chosen = {}
    known = {**IN_A_BLOCK, **IN_THE_NETWORK}
    for word in filter(None, map(str.strip, text.split(','))):
        name, *numbers = word.split(':')
        # only the topk of a graph may be 0: then distances alone decide
        fits = all(number.isdecimal() for number in numbers) and all(map(int, numbers[:1]))
        if name not in known or name in chosen or not fits:
            raise UserError(f"parts knows {', '.join(known)}, each once, with numbers as in short_conv:2; "
                            f"got '{text}'")
        chosen[name] = tuple(map(int, numbers))
    return chosen


def build(config, kinds):
    """The chosen parts of those kinds, a ModuleDict in the order of the kinds."""
    chosen = parse_parts(config.parts)
    try:
        parts = {name: kind(config, *chosen[name]) for name, kind in kinds.items() if name in chosen}
    except TypeError:
        raise UserError(f"parts='{config.parts}' gives a part more numbers than it takes") from None
    return nn.ModuleDict(parts)


def told(model, input, segment, level):
    """
    What the parts of a network are told in training: keywords of GPT.forward for the canvases input (R, T).

    level (R, T) is the share of noise. previous is the network's own prediction at the masks, from a pass
    before; every other row goes without, so that the network can start from nothing.
    """
    previous = None
    if 'previous' in model.parts:
        with torch.no_grad():
            even = torch.arange(len(input), device=input.device) % 2 == 0
            shown = (input == model.mask_token_id) & even[:, None]                               # (R, T)
            hidden = model(input, segment=segment, level=level, only=places(shown))              # (n, C)
            guess = model.logits(hidden, real_only=True).argmax(-1)                              # (n,)
        previous = torch.full_like(input, model.mask_token_id).masked_scatter(shown, guess)
    return dict(level=level, previous=previous)
