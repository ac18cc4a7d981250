"""Positions in a batch of rows: how many to mask, which ones at random, where they lie in the flat batch."""

import torch


def places(where):
    """The places of the True positions of where (B, T) in the flattened batch: (N,). It waits for a GPU."""
    return where.flatten().nonzero()[:, 0]


def stratified_k(n, generator=None):
    """
    How many positions to mask in each row: k (B,) uniform on 1..n, stratified over the batch.

    n (B,): number of positions of each row that may be masked (>= 1). Every single k is uniform on 1..n.
    Together they cover the range evenly, which takes most of the variance out of the NELBO (as LLaDA's
    evaluation does).
    """
    B = n.size(0)
    strata = torch.randperm(B, generator=generator, device=n.device)
    # in [0, 1), but float32 may round up
    u = (strata + torch.rand(B, generator=generator, device=n.device)) / B
    return (1 + (u * n).long()).minimum(n)


def random_subset(candidates, k, generator=None):
    """Of the True positions of candidates (B, T), k (B,) in each row at random: bool (B, T)."""
    noise = torch.rand(candidates.shape, generator=generator, device=candidates.device)
    order = noise.masked_fill(~candidates, 2.0).argsort(dim=1)
    chosen = torch.zeros_like(candidates)
    rank = torch.arange(candidates.size(1), device=candidates.device).expand_as(order)
    return chosen.scatter(1, order, rank < k[:, None]) & candidates
