"""
The network of nanoRemask: one transformer, two attentions, a vocabulary of V + 2.

- bidirectional or causal attention, chosen for each call; one set of weights serves both
- hidden[:, i] always predicts position i: the bidirectional pass sees the whole canvas,
  the causal pass sees the positions before i only (its input is shifted right by one)
- two extra tokens: [MASK] = V (not yet decided) and [WRONG] = V + 1 (decided, and doubted)
- the stack of blocks may be applied n_recur times, with the same weights
- rotary positions, QK-norm, ReLU^2, norms without parameters, no biases, a tied head
- bfloat16 where the device is fast at it; the parameters stay float32 while the network learns

Optional parts, off by default, are in parts/layers.py.
"""

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.checkpoint import load_checkpoint
from plumbing.checks import check_sizes
from plumbing.kernels import beside, squared_relu


@dataclass
class GPTConfig:
    block_size: int = 64      # longest canvas
    vocab_size: int = 18      # V, the vocabulary of the dataset; the network adds [MASK] and [WRONG]
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128
    n_recur: int = 2          # how often the stack of n_layer blocks is applied
    dropout: float = 0.0
    parts: str = ''           # optional parts, for example short_conv:2,shortcuts; see parts/layers.py
    draft_head: bool = False  # a head that guesses what the causal pass will say next; see parts/speculate.py
    energy_head: int = 0      # a head that says how wrong a text is; see parts/energy.py


@dataclass
class Pass:
    """What the blocks share in one pass over a batch."""
    causal: bool
    plain: bool                        # plain_attention, or PyTorch's fused kernel
    segment: torch.Tensor = None       # (B, T) which text of its row a position belongs to; None: all to one
    cache: object = None               # keys and values of earlier passes, see parts/cache.py
    at: torch.Tensor = None            # (B, W) with a cache: the positions that are computed
    told: dict = None                  # what the parts of the network are told
    cos: torch.Tensor = None           # (T, hs), or (B, 1, W, hs) with a cache
    sin: torch.Tensor = None
    bias: torch.Tensor = None          # added to the attention scores; -inf where a position may not look
    embedded: torch.Tensor = None      # (B, T, C) the embeddings
    layer: int = 0                     # which block this is, in the order in which they are applied
    not_neighbours: torch.Tensor = None           # (B, 1, T, T) see parts.layers.Graph
    first: dict = field(default_factory=dict)     # what the first block saw, see parts.layers.Shortcuts


def norm(x):
    """Layer norm without parameters. In eager mode its one fused kernel beats the three of RMS norm."""
    return F.layer_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """A linear layer without bias. Its float32 weight is cast to the dtype of the input."""

    def __init__(self, fan_in, fan_out, zero=False):
        super().__init__(fan_in, fan_out, bias=False)
        # output projections start at zero, so that every block starts as the identity
        nn.init.normal_(self.weight, std=0.0 if zero else 0.5 * fan_in ** -0.5)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): x (..., T, hs), with cos and sin (T, hs) or (B, 1, T, hs)."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


def rotary_table(T, hs):
    """The cos and sin (T, hs) of rotate. Both carry a factor hs^-1/4, which gives q k' its 1/sqrt(hs)."""
    angle = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(hs // 2) / (hs // 2)))
    cos = torch.cat((angle.cos(), angle.cos()), 1)
    sin = torch.cat((angle.sin(), -angle.sin()), 1)
    return cos * hs ** -0.25, sin * hs ** -0.25


def plain_attention(q, k, v, bias):
    """softmax(q k' + bias) v. On a CPU, at short T, its backward is much faster than the fused kernel's."""
    scores = q @ k.transpose(-2, -1)                                # (B, nh, T, S): T queries, S keys
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def attention_bias(T, causal, segment, dtype, device):
    """Added to the scores, -inf where a position may not look: (T, T), or (B, 1, T, T) with a segment."""
    bias = torch.full((T, T), float('-inf') if causal else 0.0, dtype=dtype, device=device).triu(1)
    if segment is not None:             # texts that share a row do not see one another
        bias = bias.masked_fill((segment[:, :, None] != segment[:, None])[:, None], float('-inf'))
    return bias


class Block(nn.Module):

    def __init__(self, config, parts):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.parts = parts
        self.qkv = Linear(C, 3 * C)
        self.attn_proj = Linear(C, C, zero=True)
        self.fc = Linear(C, 4 * C)
        self.proj = Linear(4 * C, C, zero=True)
        self.dropout = nn.Dropout(config.dropout)

    def attention(self, x, p):
        """x (B, T, C) -> what the heads found (B, T, C), before it is projected."""
        B, T, C = x.size()
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)                        # (3, B, nh, T, hs)
        q, k = rotate(norm(qkv[:2]), p.cos, p.sin)              # (B, nh, T, hs) each
        v = qkv[2]
        bias = p.bias
        for part in self.parts.values():
            v = part.values(v, p)
            bias = part.bias(bias, p)
        if p.cache is not None:
            k, v = p.cache.put(p.layer, k, v)                   # (B, nh, S, hs) each

        if p.plain and T > 1:                                   # for one query the fused kernel is faster
            y = plain_attention(q, k, v, bias)
        else:
            is_causal = p.causal and bias is None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal, scale=1.0)
        return y.transpose(1, 2).reshape(B, T, C)               # (B, nh, T, hs) -> (B, T, C)

    def forward(self, x, p, only=None):
        """x (B, T, C) -> (B, T, C); with only (N,), places in the flattened batch, (N, C)."""
        for part in self.parts.values():
            x = part.before(x, p)
        found = self.attention(norm(x), p)
        if only is not None:                                    # after attention a position needs no others
            x = x.flatten(0, 1).index_select(0, only)           # (N, C)
            found = found.flatten(0, 1).index_select(0, only)
        x = x + self.dropout(self.attn_proj(found))
        return x + self.dropout(self.proj(squared_relu(self.fc(norm(x)))))


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        from parts import energy, layers, speculate             # here, because they build on this file
        check_sizes(config)
        self.config = config
        self.mask_token_id = config.vocab_size
        self.wrong_token_id = config.vocab_size + 1

        rows = -(-(config.vocab_size + 2) // 64) * 64           # padded for the hardware, never seen outside
        self.wte = nn.Embedding(rows, config.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.causal_embd = nn.Parameter(torch.zeros(config.n_embd))  # added to every token of a causal pass
        self.blocks = nn.ModuleList(
            Block(config, layers.build(config, layers.IN_A_BLOCK)) for _ in range(config.n_layer))

        # heads and parts draw their weights aside: the rest starts with the same numbers either way
        with torch.random.fork_rng(devices=[]):
            self.drafter = speculate.Drafter(config.n_embd) if config.draft_head else None
            self.critic = energy.Critic(config.n_embd, config.energy_head) if config.energy_head else None
            self.parts = layers.build(config, layers.IN_THE_NETWORK)

        self.register_buffer('mask_logit_bias', torch.zeros(()))    # see parts/abstain.py
        # twice as long as a row: a window beside a cache may stand out of it
        cos, sin = rotary_table(2 * config.block_size, config.n_embd // config.n_head)
        no_special = torch.zeros(config.vocab_size + 2)
        no_special[-2:] = float('-inf')
        self.register_buffer('cos', cos, persistent=False)      # (2 * block_size, hs)
        self.register_buffer('sin', sin, persistent=False)
        self.register_buffer('no_special', no_special, persistent=False)    # (V+2,) see logits

        self.head = None                                        # these four: see plumbing/device.py
        self.compute_dtype = torch.float32
        self.plain_attention = False
        self.most_logits = 2 ** 23

    @classmethod
    def load(cls, path, device='cpu', ema=True):
        """A checkpoint: (the network in eval mode, the checkpoint as a dict), see plumbing/checkpoint.py."""
        return load_checkpoint(path, cls, GPTConfig, device, ema)

    def forward(self, idx, causal=False, segment=None, cache=None, at=None, only=None, **told):
        """
        ids (B, T) -> hidden states (B, T, C), where hidden[:, i] predicts position i.

        causal: position i sees idx[:, :i] only, position 0 a start symbol; else all see the whole canvas.
        segment (B, T): which text of its row a position belongs to; each text is as if it were alone.
        cache: with causal, see parts/cache.py; at (B, W): only these positions are computed, (B, W, C), and
            what is left of them is in the cache; None: all are computed, and fill the cache. Else idx (B, W)
            are blocks of tokens that stand at (B, W), see parts/blocks.py.
        only (N,): places in the flattened batch; the result is (N, C), and half of the last block is spared.
        told: what optional parts are told, see parts/layers.py: level (B, 1) or (B, T), previous (B, T).
        """
        if causal:
            idx = beside(idx, 1, self.mask_token_id, segment)   # position i predicts idx[i], unseen
        slots = slice(idx.size(1))
        if cache is not None:
            at, slots = cache.begin(idx, at, causal)            # (B, W) or None, (B, 1, W)
        p = Pass(causal, self.plain_attention, segment, cache, at, told)

        added = self.causal_embd if causal else 0
        for part in [*self.parts.values()][::-1]:               # in this order a seed keeps its digits
            added = added + part.added(self, idx, p)
        p.embedded = self.embed(idx if at is None else idx.gather(1, at))
        x = norm(p.embedded + added).to(self.compute_dtype)     # (B, T, C)

        p.cos = self.cos[slots].to(x.dtype)
        p.sin = self.sin[slots].to(x.dtype)
        if cache is not None:
            p.bias = cache.bias(x.dtype)
        if p.bias is None and (segment is not None or (causal and self.plain_attention)):
            p.bias = attention_bias(idx.size(1), causal, segment, x.dtype, x.device)

        # the places are padded, because a CPU prepares its products anew for each size
        if only is not None:
            N = len(only)
            only = F.pad(only, (0, min(-(-N // 128) * 128, idx.numel()) - N))
        blocks = [*self.blocks] * self.config.n_recur
        for layer, block in enumerate(blocks):
            p.layer = layer
            x = block(x, p, only if layer == len(blocks) - 1 else None)
        return norm(x if only is None else x[:N])

    def embed(self, idx):
        """ids (B, T) -> embeddings (B, T, C). Parts work on the whole table if it has fewer rows."""
        few = len(self.parts) > 0 and len(self.wte.weight) < idx.numel()
        embedded = self.wte.weight if few else self.wte(idx)
        for part in self.parts.values():
            embedded = part.embed(embedded)
        return F.embedding(idx, embedded) if few else embedded

    def logits(self, hidden, real_only=False, words=None):
        """
        hidden states (N, C) -> float32 logits (N, V+2), only for the positions asked for.

        real_only: [MASK] and [WRONG] get -inf, before anything is drawn or any confidence is computed.
        words (rows, C): another table than the network's own.
        """
        V = self.config.vocab_size
        if words is None:
            frozen = self.head is not None and self.head.dtype == hidden.dtype
            words = self.head if frozen else self.wte.weight
        logits = F.linear(hidden, words.to(hidden.dtype))[..., :V + 2].float()
        special = self.no_special if real_only else F.pad(self.mask_logit_bias.view(1), (V, 1))
        return logits.add_(special)                             # in place: the vocabulary may be large

    def num_params(self):
        """The number of parameters. The padding rows of the embedding do not count."""
        padding = self.wte.weight.size(0) - self.config.vocab_size - 2
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd
