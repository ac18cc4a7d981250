"""Keys and values of the causal pass, kept for later: what is left of a position never changes them."""

import torch
import torch.nn.functional as F


class Cache:
    """
    What the blocks keep of B rows.

    kept (L, 2, B, nh, S, hs): the keys and values of the S first positions, for every application of a block;
    with short_conv (L, 3, ...), the third is what the convolution reads.
    """

    def __init__(self, kept):
        self.kept = kept
        self.at = None                                              # (B, W) of the latest pass
        self.end = None                                             # a block sees no slot behind this one

    @classmethod
    def empty(cls, model, B, S=0):
        """A cache for the causal pass over B rows and S positions. None if the network cannot use one."""
        config = model.config
        if 'graph' in config.parts:  # a graph compares embeddings, which no cache keeps
            return None
        heads = config.n_head
        size = 3 if 'short_conv' in config.parts else 2
        shape = (config.n_layer * config.n_recur, size, B, heads, S, config.n_embd // heads)
        return cls(torch.zeros(shape, dtype=model.compute_dtype, device=model.wte.weight.device))

    def make_room(self, S):
        """Makes places for S positions or a few more; attention goes over all of them."""
        more = S - self.kept.size(4)
        if more > 0:
            self.kept = F.pad(self.kept, (0, 0, 0, -(-more // 16) * 16))

    def keep_rows(self, rows):
        """Drops all rows but rows (R,)."""
        if len(rows) < self.kept.size(2):
            self.kept = self.kept.index_select(2, rows)

    def of(self, rows):
        """The same for some rows (R,): a copy."""
        other = Cache(self.kept.index_select(2, rows))
        other.end = self.end
        return other

    def begin(self, idx, at, causal):
        """
        A causal pass over idx (B, T) begins, at the positions at (B, W), None: at all of them; or one over
        blocks idx (B, W) of tokens that stand at (B, W). Returns which of idx are computed, None: all; and
        their slots (B, 1, W).
        """
        if at is None:
            at = torch.arange(idx.size(1), device=idx.device).expand(len(idx), -1)
        self.at = slots = at if causal else at + 1                  # (B, W) token i has slot i + 1
        self.last = slots if causal else slots[:, -1:].clamp(max=self.end)         # (B, W or 1) that is seen
        B, nh, S = self.kept.shape[2:5]
        heads = torch.arange(B * nh, device=idx.device).view(B, -1, 1)
        self.slots = (heads * S + slots[:, None]).flatten()         # (B * nh * W,) where the new ones go
        return at if causal else None, slots[:, None]

    def bias(self, dtype):
        """What is added to the scores of W queries and S keys: (B, 1, W or 1, S), -inf where not seen."""
        behind = torch.arange(self.kept.size(4), device=self.at.device) > self.last[:, None, :, None]
        return torch.zeros(behind.shape, dtype=dtype, device=behind.device).masked_fill(behind, float('-inf'))

    def put(self, layer, k, v):
        """Keeps new keys and values (B, nh, W, hs), and returns all of them, (B, nh, S, hs) each."""
        kept = self.kept[layer, :2]                                 # (2, B, nh, S, hs)
        new = torch.stack((k, v)).flatten(1, 3)                     # (2, B * nh * W, hs)
        kept.view(2, -1, k.size(-1)).index_copy_(1, self.slots, new)
        return kept[0], kept[1]

    def convolve(self, p, x, y, weight, offsets):
        """x + the weighted sum of the states y (B, W, C) left of each position, also from earlier passes."""
        kept = self.kept[p.layer, 2]                                # (B, nh, S, hs)
        if p.at is None:                                            # the blocks' own states are in x already
            return self.across(kept, x, weight[:len(offsets) // 2])
        heads = y.unflatten(-1, kept.shape[1::2]).transpose(1, 2)   # (B, nh, W, hs)
        states = kept.view(-1, kept.size(-1)).index_copy_(0, self.slots, heads.flatten(0, 2))
        for d, w in zip(offsets, weight):
            left = states[(self.slots - d).clamp(min=0)].view_as(heads)        # (B, nh, W, hs)
            x = torch.addcmul(x, left.transpose(1, 2).flatten(2) * (self.at >= d)[..., None], w)
        return x

    def across(self, kept, x, weight):
        """x (B, W, C) of blocks + what stands left of them, but for the start symbol in slot 0."""
        rows = torch.arange(len(x), device=x.device)[:, None]
        for d, w in enumerate(weight, 1):
            slots = self.at[:, :d] - d                              # (B, d or W)
            left = kept[rows, :, slots.clamp(min=0)].flatten(2) * (slots > 0)[..., None]
            x[:, :d] += left * w
        return x
