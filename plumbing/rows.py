"""
Some positions of many rows, (B, T) bool: which, how many, and where they lie.
"""

from typing import NamedTuple

import torch


def places(where):
    """The places of the True positions of where (B, T) in the flattened batch: (N,). Waits for a GPU."""
    return where.flatten().nonzero()[:, 0]


def spread(where, values):
    """values (N,), one for every True position of where (R, T) -> (R, T), 0 elsewhere."""
    return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(where, values)


def stratified_k(n, generator=None):
    """
    How many positions to mask in each row: k (B,) uniform on 1..n, stratified over the batch.

    n (B,): number of positions of each row that may be masked (>= 1). Every single k is uniform on 1..n;
    together they cover the range evenly, which takes most of the variance out of the NELBO (LLaDA's
    evaluation does the same).
    """
    B = n.size(0)
    strata = torch.randperm(B, generator=generator, device=n.device)
    # in [0, 1), but float32 may round up
    u = (strata + torch.rand(B, generator=generator, device=n.device)) / B
    return (1 + (u * n).long()).minimum(n)


def random_subset(candidates, k, generator=None):
    """Of the True positions of candidates (B, T), k (B,) in each row at random: bool (B, T)."""
    noise = torch.rand(candidates.shape, generator=generator, device=candidates.device)
    return first_of(-noise, candidates, k)


def of_rows(model, rows):
    """The network for rows (R,) of a batch: itself, unless its rows are blocks, see parts/blocks.py."""
    return model.of(rows) if hasattr(model, 'of') else model


class Ends(NamedTuple):
    """The special ids of a dataset, None where it has none."""
    end: int = None
    pad: int = None
    forbid: tuple = ()  # ids that are never drawn left of what is given: nothing but an end may end a text

    @classmethod
    def of(cls, meta):
        """The special ids that the meta.json of a dataset names."""
        special = [*(meta[name] for name in ('bos', 'eos', 'pad')), *meta.get('given', ())]
        return cls(meta['eos'], meta['pad'], tuple(i for i in special if i is not None))


def close_rows(x, masked, mask, ends):
    """
    ids x (R, T): of the positions that were masked, those right of an end token become padding, if no hole is
    left of it.
    """
    if ends.end is None:
        return x
    decided = (x == mask).cumsum(1) == 0
    is_end = ((x == ends.end) & decided).long()
    return x.masked_fill(masked & (is_end.cumsum(1) > is_end), ends.pad)


def same_length(rows, among=None):
    """The numbers among (None: all) of rows (T,) of several lengths, in lists of rows of one length."""
    among = range(len(rows)) if among is None else among
    lengths = [len(rows[i]) for i in among]
    return [[i for i, length in zip(among, lengths) if length == T] for T in dict.fromkeys(lengths)]


def recorded(canvas, trace):
    """
    Where a sampler that starts from canvas (B, T) puts what it makes of it: a list; None without a trace.
    trace: True, or a list, which goes on.
    """
    if trace is None or trace is False:
        return None
    kept = [] if trace is True else trace
    if not (kept and torch.equal(kept[-1], canvas)):
        kept.append(canvas.clone())
    return kept


def settled(canvas, trace):
    """Tells a trace that listens to it, as a Stream does, that all but the masks of canvas (B, T) stays."""
    if hasattr(trace, 'settle'):
        trace.settle(canvas)


class Part(list):
    """
    A trace of a part of a canvas, its last one: what is added goes to the trace of the whole as well.

    put: function of a part that returns the whole, with the part in its place; stays: whether what is
    settled in the part is settled in the whole
    """

    def __init__(self, start, whole, put, stays=True):
        super().__init__([start])
        self.whole, self.put, self.stays = whole, put, stays

    def append(self, canvas):
        self[:] = [canvas]
        self.whole.append(self.put(canvas))

    def settle(self, canvas):
        if self.stays:
            settled(self.put(canvas), self.whole)


class Tally(list):
    """
    A trace that keeps the last canvas only, and counts tokens: what is in a text, not the padding behind it.

    mask, pad: ids, pad None: no padding
    """

    def __init__(self, mask, pad=None):
        super().__init__()
        self.mask, self.pad, self.counts = mask, -1 if pad is None else pad, 0

    def begin(self, fixed):
        """The trace of the next batch, whose fixed (B, T) positions never change."""
        self.clear()
        return self

    def append(self, canvas):
        if self:
            before = self.pop()
            drafted = (before < 0) & (canvas != self.pad)           # ~id of what was only drafted
            written = (before >= 0) & (before != self.mask) & (before != self.pad)
            events = (drafted, drafted & (canvas != ~before), written & (canvas != before))
            self.counts = self.counts + torch.stack([event.sum() for event in events])
        super().append(canvas)

    def numbers(self):
        """How many tokens were drafted, how many drafts were taken back, and how many written tokens."""
        return self.counts.tolist() if torch.is_tensor(self.counts) else [0, 0, 0]


def left_of(fixed):
    """Which positions have a fixed one to their right: fixed (B, T) bool -> (B, T)."""
    return fixed.flip(1).cummax(1).values.flip(1)


def first_of(score, where, count):
    """
    Of the True positions of where (R, T) the count (R,) with the highest score (R, T), ties from the left:
    bool (R, T).
    """
    score = score.clamp(min=-1e30).masked_fill(~where, float('-inf'))
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(score.size(1), device=score.device).expand_as(order)
    return torch.zeros_like(where).scatter(1, order, rank < count[:, None]) & where


def some_rows(rows, share, generator=None):
    """Of rows (B, 1) bool each with the probability share (drawn only if that is not 0): bool (B, 1)."""
    if not share:
        return torch.zeros_like(rows)
    return rows & (torch.rand(rows.shape, generator=generator, device=rows.device) < share)


def given_prefix(free, ratio, most, generator=None):
    """
    Where a prefix is given (B, T): in a share ratio of the rows, and what is not free with it.

    It has 1..most of the free (B, T) positions, at most half of them, rounded up, and never all.
    """
    n = free.sum(1, keepdim=True)                                   # (B, 1)
    given = torch.rand(2, len(free), 1, generator=generator, device=free.device)
    length = (1 + given[1] * most).long() * (given[0] < ratio)      # (B, 1)
    return free.cumsum(1) <= length.minimum((n + 1) // 2 * (n > 1))


def split(mixture, rows, generator=None):
    """A mixture ((name, share), ...) of rows (B, T) bool: [(name, its part of them)], drawn row by row."""
    edges = torch.tensor([share for _, share in mixture], device=rows.device).cumsum(0)
    u = torch.rand(len(rows), generator=generator, device=rows.device)
    kinds = torch.bucketize(u * edges[-1], edges)                   # (B,) number in the mixture
    return [(name, rows & (kinds == number)[:, None]) for number, (name, _) in enumerate(mixture)]
