"""
The network of nanoRemask: one transformer, two attentions, a vocabulary of V + 2.

Notable features:
- bidirectional or causal attention, chosen per call; one set of weights serves both
- hidden[:, i] always predicts position i: the bidirectional pass sees the whole canvas,
  the causal pass sees positions < i only (its input is shifted right by one)
- two extra tokens: [MASK] = V (not yet decided) and [WRONG] = V + 1 (decided, and doubted)
- the block stack may be applied n_recur times (the K of the universal denoiser seed)
- rotary positions, QK-norm, ReLU^2, norms without parameters, no biases, a tied head
- compute in bf16 where the device is fast at it; the parameters stay float32 as long as it learns, see GPT.freeze
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from plumbing.rows import places, random_subset, stratified_k  # noqa: F401 (for those who import them from here)

# -----------------------------------------------------------------------------
# the network


@dataclass
class GPTConfig:
    block_size: int = 64     # longest canvas
    vocab_size: int = 18     # V, the dataset's own vocabulary; the network adds [MASK] and [WRONG]
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128
    n_recur: int = 2         # how often the stack of n_layer blocks is applied, with the same weights
    dropout: float = 0.0
    draft_head: bool = False # a head that guesses what the causal pass will say next, see Drafter
    energy_head: int = 0     # a head that says how wrong a text is, see Critic; reads 1: the bidirectional pass, 2: both passes
    noise_condition: bool = False  # the network is told the share of [MASK] in its canvas (the universal denoiser seed)
    self_condition: bool = False  # the network is shown its previous prediction (Chen et al. 2022, Analog Bits)
    time_dim: int = 0        # noise_condition by an MLP of that width; 0: off (TEMPORAL of the fix guide's seed, as the next two)
    graph_window: int = 0    # the heads may turn to a position's neighbours, so many to each side, see graph_edges; 0: off
    graph_topk: int = 4      # of those also so many positions that are most similar
    mu_blocks: int = 0       # the embedding as so many blocks that exchange information, see Mixer; 0: off
    short_conv: int = 0      # every block first looks at the so many positions to each side, see ShortConv; 0: off
    shortcuts: bool = False  # every block is shown the embedding and the first block's values again, see Block.shortcuts
    bigram_rows: int = 0     # embeddings of pairs of tokens, in tables of so many rows, see Bigrams; 0: off


def norm(x):
    """Layer norm without parameters: in eager mode its one fused kernel beats RMS norm's three."""
    return F.layer_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """A linear layer without bias; its float32 weight is cast to the dtype of the input."""

    def __init__(self, fan_in, fan_out, zero=False):
        super().__init__(fan_in, fan_out, bias=False)
        # output projections start at zero, so that every block starts as the identity
        nn.init.normal_(self.weight, std=0.0 if zero else 0.5 * fan_in ** -0.5)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): x (..., T, hs), cos and sin (T, hs) or (B, 1, T, hs) from rotary_table."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


def rotary_table(T, hs):
    """
    The cos and sin (T, hs) of rotate. Both carry a factor hs^-1/4, so that q k' of rotated q and k has its 1/sqrt(hs).
    """
    angle = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(hs // 2) / (hs // 2)))
    return (torch.cat((angle.cos(), angle.cos()), 1) * hs ** -0.25, torch.cat((angle.sin(), -angle.sin()), 1) * hs ** -0.25)


def plain_attention(q, k, v, bias):
    """softmax(q k' + bias) v written out. On a CPU, at short T, its backward is several times faster than the fused kernel's."""
    scores = q @ k.transpose(-2, -1)                                # (B, nh, T, T), or of T queries and S keys
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def attention_bias(T, causal, segment, dtype, device):
    """What is added to the scores, -inf where a position may not look: (T, T), or (B, 1, T, T) with segment (B, T)."""
    bias = torch.full((T, T), float('-inf') if causal else 0.0, dtype=dtype, device=device).triu(1)
    if segment is not None:                                         # texts that share a row do not see one another
        bias = bias.masked_fill((segment[:, :, None] != segment[:, None])[:, None], float('-inf'))
    return bias


class SquaredReLU(torch.autograd.Function):
    """relu(h)^2 (So et al. 2021), to the bit what relu(h) * h gives; but backward is one product, and one tensor less is kept."""

    @staticmethod
    def forward(ctx, h):
        positive = F.relu(h)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(2)


def squared_relu(h):
    """See SquaredReLU. In place where no gradient is wanted, which makes the pass of a sampler a fifth faster on a CPU."""
    return SquaredReLU.apply(h) if torch.is_grad_enabled() else F.relu(h).square_()


def graph_edges(embedded, window, topk, causal, segment):
    """
    Which positions are neighbours of which: bool (B, T, T), from the embeddings (B, T, C) of the canvas.

    Those at most window away; those a power of two away, shortcuts through the whole row; and of the others the topk most
    similar, of equals (all masks are) the nearest, the left one first. Only what a position may look at is compared: in the
    causal mode nothing of what stands to its right has a say in its edges, or they would give the answer away. Nor has the
    length of the row, since rows are cut and packed.
    """
    T = embedded.size(1)
    at = torch.arange(T, device=embedded.device)
    distance = (at[:, None] - at).abs()                             # (T, T)
    edges = (distance <= window) | ((distance & (distance - 1)) == 0)
    similar = norm(embedded.detach().float())
    similar = similar @ similar.mT / similar.size(-1) - 1e-5 * (distance + (at > at[:, None]) / 2)   # (B, T, T)
    closed = edges | (at > at[:, None]) if causal else edges
    if segment is not None:
        closed = closed | (segment[:, :, None] != segment[:, None])
    nearest = similar.masked_fill(closed, float('-inf')).topk(min(topk, T), -1)              # (B, T, topk)
    return edges.repeat(len(embedded), 1, 1).scatter(-1, nearest.indices, True)


def neighbours(d):
    """Slices of a row: the positions that have one d places to their left (d < 0: -d to their right), and these."""
    return (slice(d, None), slice(-d)) if d > 0 else (slice(d), slice(-d, None))


def beside(idx, d, nothing, segment=None):
    """ids (B, T) -> those d places to the left (d < 0: -d to the right) of them, nothing past the end of the row or segment."""
    there = F.pad(idx, (d, -d), value=nothing)
    return there if segment is None else there.masked_fill(F.pad(segment, (d, -d), value=-1) != segment, nothing)


def taps(x, weight, offsets, segment):
    """
    The sum over d in offsets of w x[:, t - d], w the row of weight (n, C) for that d: x (B, T, C) -> (B, T, C).

    Nothing comes from outside of the row, or of the segment (B, T) that t belongs to; None: there is one.
    """
    if segment is None and x.size(-1) >= 32:                         # a kernel for it, on x as it lies in memory; below 32 channels
        # it may never return (8 neighbours, 16 channels, bf16)
        n = max(map(abs, offsets))
        kernel = weight.new_zeros(x.size(-1), 1, 1, 2 * n + 1)
        kernel[:, 0, 0, [n - d for d in offsets]] = weight.T
        return F.conv2d(x[:, None].permute(0, 3, 1, 2), kernel, padding=(0, n), groups=x.size(-1)).permute(0, 2, 3, 1)[:, 0]
    out = torch.zeros_like(x)
    for d, w in zip(offsets, weight):
        here, there = neighbours(d)
        inside = 1 if segment is None else (segment[:, here] == segment[:, there])[..., None]
        out[:, here].addcmul_(x[:, there] * inside, w)
    return out


class Taps(torch.autograd.Function):
    """taps, with a backward of its own: PyTorch's for shifts and for grouped convolutions takes many times as long on a CPU."""

    @staticmethod
    def forward(ctx, y, weight, offsets, segment):
        ctx.save_for_backward(y, weight)
        ctx.offsets, ctx.segment = offsets, segment
        return taps(y, weight, offsets, segment)

    @staticmethod
    def backward(ctx, grad):
        (y, weight), segment, dw = ctx.saved_tensors, ctx.segment, []
        for here, there in map(neighbours, ctx.offsets):
            product = grad[:, here] * y[:, there]                    # (B, T - |d|, C)
            if segment is not None:
                product = product * (segment[:, here] == segment[:, there])[..., None]
            product = product.flatten(0, 1)                          # summed over rows by what is fastest at it
            dw.append(product.new_ones(1, len(product)) @ product)
        return taps(grad, weight, [-d for d in ctx.offsets], segment), torch.cat(dw), None, None


class ShortConv(nn.Module):
    """
    What stands next to a position is added to it, before attention has to find it: a weight a channel for each of the n positions
    to its left and, in the bidirectional mode, to its right. It starts as the identity.
    Primer (So et al. 2021), Canon layers (Allen-Zhu 2025).
    """

    def __init__(self, C, n):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * n, 1, C))         # n to the left, n to the right, the nearest first

    def forward(self, x, causal, segment=None, known=None, slots=None, at=None):
        """x (B, T, C) -> (B, T, C). segment, at: see GPT.forward; known (B, nh, S, hs) and slots: see Block.attention."""
        n, y = len(self.weight) // 2, norm(x)
        offsets = [*range(1, n + 1), *(() if causal else range(-1, -n - 1, -1))]
        weight = self.weight[:len(offsets), 0].to(x.dtype)           # (n or 2n, C)
        if known is None:
            return x + Taps.apply(y, weight, offsets, segment)
        heads = y.unflatten(-1, known.shape[1::2]).transpose(1, 2)   # (B, nh, T, hs)
        states = known.view(-1, known.size(-1)).index_copy_(0, slots, heads.flatten(0, 2))       # (B * nh * S, hs)
        for d, w in zip(offsets, weight):                            # what left of the window is known comes from the cache
            left = states[(slots - d).clamp(min=0)].view_as(heads).transpose(1, 2).flatten(2)    # (B, T, C)
            x = torch.addcmul(x, left * (at >= d)[..., None], w)
        return x


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        # graph attention: how much less each head looks at what is no neighbour; 0 is full attention, much is the graph alone
        self.aloof = nn.Parameter(torch.zeros(config.n_head)) if config.graph_window else None
        self.conv = ShortConv(C, config.short_conv) if config.short_conv else None
        # the weights of x, of the embedding (as in modded-nanogpt), of the values, and of the first block's (Zhou et al. 2024)
        self.shortcuts = nn.Parameter(torch.tensor([1.0, 0.0, 1.0, 0.0])) if config.shortcuts else None
        self.qkv = Linear(C, 3 * C)
        self.attn_proj = Linear(C, C, zero=True)
        self.fc = Linear(C, 4 * C)
        self.proj = Linear(4 * C, C, zero=True)
        self.dropout = nn.Dropout(config.dropout)

    def shortcut(self, x, first, number):
        """x mixed with first, its like in the first block, by the weights number and number + 1; None: it is in that block."""
        if self.shortcuts is None or first is None:
            return x
        own, other = self.shortcuts[number:number + 2].to(x.dtype)
        return torch.addcmul(own * x, first, other)

    def attention(self, x, cos, sin, causal, bias, plain, far=None, first=None, known=None, slots=None):
        """
        x (B, T, C) -> what the heads found, (B, T, C), before it is projected, and the values (B, nh, T, hs).

        first (B, nh, T, hs): the values of the first block, None: this is it.
        far (B, 1, T, T): 1 where the graph has no edge, else 0; None: no graph.
        known (2 or more, B, nh, S, hs): the keys and values of a cache, contiguous; slots (B * nh * T,): where the new ones go.
        """
        B, T, C = x.size()
        if far is not None:
            bias = bias - self.aloof.to(x.dtype).view(-1, 1, 1) * far   # (B, nh, T, T)
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        q, k = rotate(norm(qkv[:2]), cos, sin)                      # one call for both: (B, nh, T, hs) each
        v = self.shortcut(qkv[2], first, 2)
        if known is not None:
            known[:2].view(2, -1, C // self.n_head).index_copy_(1, slots, torch.stack((k, v)).flatten(1, 3))
        keys, values = (k, v) if known is None else known[:2]       # (B, nh, T or S, hs) each
        if plain and T > 1:                                         # for one query the fused kernel is the faster one
            y = plain_attention(q, keys, values, bias)
        else:
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, is_causal=causal and bias is None, scale=1.0)
        return y.transpose(1, 2).reshape(B, T, C), v                # (B, nh, T, hs) -> (B, T, C)

    def forward(self, x, first, cos, sin, causal, bias, plain, far=None, segment=None, known=None, slots=None, at=None,
                only=None):
        """
        x (B, T, C), first -> (B, T, C), or with only (N,), see GPT.forward, (N, C), since after attention these positions need no
        others; and first: with shortcuts, what the first block was given (B, T, C) and its values (B, nh, T, hs), else None each.
        """
        start, x = x, self.shortcut(x, first[0], 0)
        if self.conv is not None:
            x = self.conv(x, causal, segment, None if known is None else known[2], slots, at)
        found, values = self.attention(norm(x), cos, sin, causal, bias, plain, far, first[1], known, slots)
        if self.shortcuts is not None and first[0] is None:
            first = start, values
        if only is not None:
            x, found = (each.flatten(0, 1).index_select(0, only) for each in (x, found))     # (N, C) each
        x = x + self.dropout(self.attn_proj(found))
        return x + self.dropout(self.proj(squared_relu(self.fc(norm(x))))), first


class Mixer(nn.Module):
    """
    The embedding as n blocks that exchange information (MU of the fix guide's seed): attention among the blocks of one token,
    added to it. A function of the token alone; it starts as the identity.
    """

    def __init__(self, C, n):
        super().__init__()
        self.n = n
        self.qkv = Linear(C // n, 3 * C // n)
        self.proj = Linear(C // n, C // n, zero=True)

    def forward(self, embedded):
        """(..., C) -> (..., C)."""
        q, k, v = self.qkv(norm(embedded.unflatten(-1, (self.n, -1)))).chunk(3, -1)          # (..., n, C/n) each
        mixed = (q @ k.mT * q.size(-1) ** -0.5).softmax(-1) @ v
        return embedded + self.proj(mixed).flatten(-2)


class Bigrams(nn.Module):
    """
    Embeddings of pairs of tokens, looked up instead of computed: one for a token and what stands left of it, and, in the
    bidirectional mode, one for what stands left and right of a position, which says a lot about a mask. They start at zero.

    With rows for all (V + 2)^2 pairs each has its own; with fewer some share one. After the bigram hash embeddings of
    modded-nanogpt (2026), which has those to the left.
    """

    def __init__(self, rows, V, C):
        super().__init__()
        self.tokens = V + 2
        self.rows = min(rows, self.tokens ** 2)
        self.left, self.around = (nn.Embedding(self.rows, C) for _ in range(2))
        for table in (self.left, self.around):
            nn.init.zeros_(table.weight)

    def forward(self, idx, causal, segment=None, at=None):
        """
        ids (B, T) -> (B, T, C), or with at (B, W), see GPT.forward, (B, W, C). Past the end of a text stands [WRONG], since no
        token that is read ever is that.
        """
        left = beside(idx, 1, self.tokens - 1, segment)              # (B, T)
        pairs = [(self.left, left, idx)]
        if not causal:
            pairs.append((self.around, left, beside(idx, -1, self.tokens - 1, segment)))
        found = 0
        for table, a, b in pairs:
            place = (a * self.tokens + b) % self.rows
            found = found + table(place if at is None else place.gather(1, at))
        return found


class Drafter(nn.Module):
    """
    A recurrent head that guesses, far cheaper than by a pass, what the causal pass will say next (Zhang et al. 2024, ReDrafter).

    Its first state is the causal hidden state of a position; fed the token that was written there, it becomes that of the
    next position, and so on. The guesses are drafts for speculative sampling, which never depends on them being right.
    """

    def __init__(self, C):
        super().__init__()
        self.fc = Linear(2 * C, C)
        self.proj = Linear(C, C, zero=True)

    def forward(self, state, embedded):
        """state (N, C), the token's embedding (N, C) -> the next state (N, C)."""
        h = self.fc(torch.cat((norm(state), norm(embedded)), dim=-1))
        return state + self.proj(squared_relu(h))


class Critic(nn.Module):
    """
    The energy head (the universal denoiser seed): how wrong is this text? It reads one or two passes of the frozen network.

    Every token gets a score, the logit of being wrong; the energy of a text is the log-sum-exp of its tokens' scores, since one
    wrong token is enough.
    """

    def __init__(self, C, passes, hidden=64):
        super().__init__()
        self.fc = Linear(passes * (C + 1), hidden)
        self.mid = Linear(hidden, hidden)
        self.proj = Linear(hidden, 1, zero=True)

    def forward(self, features):
        """features (..., passes * (C + 1)), see GPT.token_energy -> scores (...)."""
        h = F.gelu(self.mid(F.gelu(self.fc(features))))
        return self.proj(h)[..., 0]


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        self.mask_token_id = config.vocab_size
        self.wrong_token_id = config.vocab_size + 1
        rows = -(-(config.vocab_size + 2) // 64) * 64   # padded for the hardware; the extra rows are never seen outside
        self.wte = nn.Embedding(rows, config.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.causal_embd = nn.Parameter(torch.zeros(config.n_embd))  # tells the network which of its two jobs it is doing
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        with torch.random.fork_rng(devices=[]):                      # with or without it the rest draws the same numbers
            self.drafter = Drafter(config.n_embd) if config.draft_head else None
            self.critic = Critic(config.n_embd, config.energy_head) if config.energy_head else None
            self.level = Linear(32, config.n_embd, zero=True) if config.noise_condition else None
            self.previous = Linear(config.n_embd, config.n_embd, zero=True) if config.self_condition else None
            self.mixer = Mixer(config.n_embd, config.mu_blocks) if config.mu_blocks else None
            self.bigrams = Bigrams(config.bigram_rows, config.vocab_size, config.n_embd) if config.bigram_rows else None
            if config.time_dim:
                self.level = nn.Sequential(Linear(32, config.time_dim), nn.GELU(),
                                           Linear(config.time_dim, config.n_embd, zero=True))
        self.register_buffer('mask_logit_bias', torch.zeros(()))     # set by the controller in train.py, saved with the model
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer('cos', cos, persistent=False)           # (block_size, hs)
        self.register_buffer('sin', sin, persistent=False)
        self.register_buffer('no_special', torch.zeros(config.vocab_size + 2), persistent=False)      # see logits
        self.no_special[-2:] = float('-inf')
        self.head = None                                             # see freeze
        self.compute_dtype = torch.float32                           # see configure_compute in device.py
        self.plain_attention = False
        self.most_logits = 2 ** 23

    def forward(self, idx, causal=False, segment=None, previous=None, level=None, cache=None, at=None, only=None):
        """
        ids (B, T) -> hidden states (B, T, C), where hidden[:, i] predicts position i; with only (N,), places in the flattened
        batch, (N, C): the hidden states of these positions, and half of the last block is spared for all others.

        causal=False: every position sees the whole canvas.
        causal=True:  position i sees idx[:, :i] only; position 0 sees a start symbol (the mask token).
        segment (B, T): a number for the text that each position belongs to; several texts share a row, and each is as if it were
        alone, in both modes.
        previous (B, T): with self_condition, ids that an earlier pass predicted, the mask token where none did; None: nowhere.
        level (B, 1) or (B, T): with noise_condition or time_dim, the share of noise; None: the share of [MASK] in the row.
        cache: with causal, without segment and gradient, see empty_cache; the keys and values are written to it. at (B, W): those
        of all positions left of these are in it, and only these are computed: hidden states (B, W, C). None: all are.
        """
        T = idx.size(1)
        if causal:
            idx = beside(idx, 1, self.mask_token_id, segment)
        if cache is not None and at is None:
            at = torch.arange(T, device=idx.device).expand(len(idx), -1)
        extra = self.causal_embd if causal else 0
        if self.bigrams is not None:
            extra = extra + self.bigrams(idx, causal, segment, at)   # (B, T, C)
        if self.level is not None and not causal:
            level = (idx == self.mask_token_id).float().mean(1, keepdim=True) if level is None else level
            extra = extra + self.level((level[..., None] * math.pi * torch.arange(32, device=idx.device)).cos())  # (B, 1 or T, C)
        if cache is not None:
            idx = idx.gather(1, at)                                  # (B, W)
        if self.previous is not None and not causal:
            previous = torch.full_like(idx, self.mask_token_id) if previous is None else previous
            extra = extra + self.previous(norm(self.wte(previous)))  # (B, T, C)
        embedded = self.embed(idx)
        x, first = norm(embedded + extra).to(self.compute_dtype), (None, None)
        place = slice(T) if cache is None else at[:, None].clamp(max=len(self.cos) - 1)      # (B, 1, W)
        cos, sin = self.cos[place].to(x.dtype), self.sin[place].to(x.dtype)                  # (T, hs), or (B, 1, W, hs)
        bias = far = slots = None
        if self.config.graph_window:
            edges = graph_edges(embedded, self.config.graph_window, self.config.graph_topk, causal, segment)
            far = (~edges)[:, None].to(x.dtype)                      # (B, 1, T, T)
        if cache is not None:
            S, heads = cache.size(4), torch.arange(len(at) * self.config.n_head, device=at.device)
            slots = (heads.view(len(at), -1, 1) * S + at[:, None]).flatten()                 # (B * nh * W,)
            behind = torch.arange(S, device=at.device) > at[:, None, :, None]                # (B, 1, W, S)
            bias = torch.zeros(behind.shape, dtype=x.dtype, device=x.device).masked_fill(behind, float('-inf'))
        elif segment is not None or far is not None or (causal and self.plain_attention):
            bias = attention_bias(T, causal, segment, x.dtype, x.device)
        known = itertools.repeat(None) if cache is None else iter(cache)
        if only is not None:                                         # padded: a CPU prepares its products anew for every new size
            N = len(only)
            only = F.pad(only, (0, min(-(-N // 128) * 128, idx.numel()) - N))
        left = self.config.n_recur * len(self.blocks)
        for _ in range(self.config.n_recur):
            for block in self.blocks:
                left -= 1
                x, first = block(x, first, cos, sin, causal, bias, self.plain_attention, far, segment, next(known), slots, at,
                                 None if left else only)
        return norm(x if only is None else x[:N])

    def empty_cache(self, B, T=0):
        """
        A cache for the causal pass over B rows, with places for T positions: the keys and values (L, 2, B, nh, T, hs) of every
        application of a block, and with short_conv (L, 3, ...) what the convolution reads. None if the network cannot use one: a
        graph compares embeddings, which a cache does not keep.
        """
        if self.config.graph_window:
            return None
        heads, L = self.config.n_head, self.config.n_layer * self.config.n_recur
        shape = (L, 3 if self.config.short_conv else 2, B, heads, T, self.config.n_embd // heads)
        return torch.zeros(shape, dtype=self.compute_dtype, device=self.wte.weight.device)

    def freeze(self):
        """
        For a network that learns no more: its matrices are cast to the dtype it computes in once, and not in every pass, which
        takes a tenth to a fifth of the time of sampling. Changes no result. To be called when device and dtype are chosen.
        """
        for part in (self.blocks, self.drafter):
            for weight in [] if part is None else part.parameters():
                weight.data = weight.data.to(self.compute_dtype)
        self.head = self.wte.weight.detach().to(self.compute_dtype)  # embeddings are added up in float32
        return self

    def embed(self, idx):
        """ids (B, T) -> embeddings (B, T, C); what mu_blocks adds is worked out per word or per position, whichever is less."""
        if self.mixer is None:
            return self.wte(idx)
        if len(self.wte.weight) < idx.numel():
            return F.embedding(idx, self.mixer(self.wte.weight))
        return self.mixer(self.wte(idx))

    def draft(self, state, ids):
        """The draft head's state (N, C), fed the tokens ids (N,) -> its next state (N, C), for logits(norm(state))."""
        return self.drafter(state, self.wte(ids).detach().to(state.dtype))

    def logits(self, hidden, real_only=False, words=None):
        """
        hidden states (N, C) -> float32 logits (N, V+2), only for the positions asked for.

        real_only: [MASK] and [WRONG] get -inf, before anything is drawn or any confidence is computed.
        words (rows, C): the table, if not that of the network itself.
        """
        V = self.config.vocab_size
        if words is None:
            words = self.wte.weight if self.head is None or self.head.dtype != hidden.dtype else self.head
        logits = F.linear(hidden, words.to(hidden.dtype))[..., :V + 2].float()
        special = self.no_special if real_only else F.pad(self.mask_logit_bias.view(1), (V, 1))
        return logits.add_(special)                                  # in place: the vocabulary may be large

    def token_energy(self, ids, real):
        """
        How wrong is each token? ids (B, T), whole texts without masks, and which positions are text, real (B, T) -> float32
        scores (B, T): the logit of being wrong, -inf outside real.

        The critic is shown the hidden state of a position in the bidirectional pass over the text, and in the causal one if it
        reads two, and what they give for the token that stands there. It learns, the network does not.
        """
        if self.critic is None:
            raise UserError('this network has no energy head: give it one with python tools/energy.py --init_from=CHECKPOINT')
        with torch.no_grad():
            features = []
            for causal in (False, True)[:self.config.energy_head]:
                hidden = self(ids, causal=causal)[real].float()                 # (N, C)
                logp = self.logits(hidden, real_only=True).log_softmax(-1).gather(1, ids[real][:, None])
                features += [hidden, logp.clamp(-20, 0) / 5]                    # the states have scale 1, so shall these
        score = self.critic(torch.cat(features, -1))                            # (N,)
        return torch.full(ids.shape, float('-inf'), device=ids.device).masked_scatter(real, score)

    def energy(self, ids, real):
        """
        The energy (B,) of whole texts, see token_energy: the logit of not being from the data.

        exp(-energy) is, up to a factor, how much likelier the text is in the data than among what the critic learned to
        tell from it, for the most part the network's own samples (noise contrastive estimation; Xu et al. 2024).
        """
        return self.token_energy(ids, real).logsumexp(-1)

    def num_params(self):
        """Number of parameters that the user asked for: the padding rows of the embedding do not count."""
        padding = self.wte.weight.size(0) - self.config.vocab_size - 2
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd


def room_for(cache, T):
    """A cache with places for T positions or a few more: attention goes over all of them, so there shall not be many."""
    more = T - cache.size(4)
    return cache if more <= 0 else F.pad(cache, (0, 0, 0, -(-more // 16) * 16))


def check_config(config):
    """Raises UserError if a network of this GPTConfig cannot be built."""
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_recur'):
        if getattr(config, name) < 1:
            raise UserError(f'{name} must be at least 1, got {getattr(config, name)}')
    if config.n_embd % (2 * config.n_head):
        raise UserError(f'n_embd must be a multiple of 2 * n_head (rotary positions pair the channels of a head), '
                        f'got n_embd={config.n_embd}, n_head={config.n_head}')
    for name in ('time_dim', 'graph_window', 'graph_topk', 'mu_blocks', 'short_conv', 'bigram_rows'):
        if getattr(config, name) < 0:
            raise UserError(f'{name} must not be negative, got {getattr(config, name)}')
    if config.mu_blocks and config.n_embd % config.mu_blocks:
        raise UserError(f'mu_blocks={config.mu_blocks} must divide n_embd={config.n_embd}')
    if config.mu_blocks == config.n_embd:
        raise UserError(f'mu_blocks={config.mu_blocks} leaves blocks of a single channel, which have nothing to say')
    if not 0 <= config.dropout < 1:
        raise UserError(f'dropout must be in [0, 1), got {config.dropout}')


# -----------------------------------------------------------------------------
# masks
