"""Wrong tokens in fragments of other text, in runs, and as the mixed noise of a denoiser."""

import torch

NOISE = ('mask', 'replace', 'swap', 'delete', 'insert', 'double')   # what mixed_noise may do to a token


def another_token(ids, V, rng):
    """For every token of ids (...) one of the other V - 1, uniformly."""
    other = torch.randint(V - 1, ids.shape, generator=rng, device=ids.device)
    return other + (other >= ids)


def one_run(real, count, rng):
    """In every row at most count (B,) real positions (B, T), next to one another, anywhere: bool (B, T)."""
    rank, n = real.cumsum(1) - 1, real.sum(1)                       # (B, T), (B,)
    count = count.minimum(n)
    u = torch.rand(n.shape, generator=rng, device=n.device)
    start = (u * (n - count + 1)).long().minimum(n - count)
    return real & (rank >= start[:, None]) & (rank < (start + count)[:, None])


def other_text(x0, real, count, rng):
    """
    A run of at most count (B,) real positions in every row, bool (B, T), and ids (B, T) of another row there.

    Where the other row is too short for the piece, the run is shorter.
    """
    B, T = x0.shape
    shift = int(torch.randint(1, max(2, B), (), generator=rng, device=x0.device))
    piece = one_run(real.roll(shift, 0), count.minimum(real.sum(1)), rng)
    run = one_run(real, piece.sum(1), rng)
    offset = piece.long().argmax(1) - run.long().argmax(1)          # (B,)
    at = torch.arange(T, device=x0.device) + offset[:, None]        # (B, T)
    return run, x0.roll(shift, 0).gather(1, at.clamp(0, T - 1))


def noise_level(num, sigma_min, sigma_max, rng):
    """The noise level of num rows, (num,): uniform on sigma_min..sigma_max."""
    u, _ = torch.rand(2, num, generator=rng, device=rng.device)   # the second row: draws of older runs
    low = torch.full_like(u, sigma_min)
    return low + (sigma_max - low) * u


def swapped(x0, real, hit):
    """x0 (B, T), each hit swapped with its right neighbour; in a run of hits every other one."""
    at = torch.arange(x0.size(1), device=x0.device).expand(x0.shape)
    since = at - at.masked_fill(hit, -1).cummax(1).values           # 1, 2, .. within a run
    first = hit & (since % 2 == 1)
    first[:, -1] = False
    first[:, :-1] &= real[:, 1:]
    second = first.roll(1, 1)
    return torch.where(first, x0.roll(-1, 1), torch.where(second, x0.roll(1, 1), x0))


def mixed_noise(x0, real, sigma, mix, mask_token_id, pad_id, rng):
    """
    Every real token of x0 (B, T) is hit with probability sigma (B,): ids (B, T), the noisy canvas.

    mix: ((what, share), ...) of NOISE.
      mask     it becomes [MASK]
      replace  it becomes another token
      swap     it changes places with its right neighbour
      delete   what is right of it moves left; padding moves in, or [MASK] in a dataset without padding
      insert   a random token comes before it; what is right of it moves right, or off the canvas
      double   it stands there twice
    """
    # what happens to each token
    B, T = x0.shape
    edges = torch.tensor([share for _, share in mix], device=x0.device).cumsum(0)
    u, which = torch.rand(2, B, T, generator=rng, device=x0.device)
    op = torch.bucketize(which * edges[-1], edges)                  # (B, T) number in mix
    op = op.masked_fill((u >= sigma[:, None]) | ~real, -1)
    number = {what: i for i, (what, _) in enumerate(mix)}
    hit = {what: op == number.get(what, -2) for what in NOISE}

    # tokens that change, where they stand
    x = swapped(x0, real, hit['swap'])
    x = torch.where(hit['replace'], another_token(x, mask_token_id, rng), x)
    x = x.masked_fill(hit['mask'], mask_token_id)

    # tokens that move: each takes 0, 1 or 2 positions; what is not wanted goes to column 2T, which is cut off
    twice = hit['insert'] | hit['double']
    size = 1 + twice.long() - hit['delete'].long()                  # (B, T)
    place = size.cumsum(1) - 1                                      # (B, T) where it ends up, < 2T
    filler = mask_token_id if pad_id is None else pad_id
    canvas = torch.full((B, 2 * T + 1), filler, device=x0.device)
    inserted = torch.randint(mask_token_id, x0.shape, generator=rng, device=x0.device)
    inserted = torch.where(hit['double'], x, inserted)
    canvas.scatter_(1, (place - 1).masked_fill(~twice, 2 * T), inserted)
    canvas.scatter_(1, place.masked_fill(hit['delete'], 2 * T), x)
    return canvas[:, :T]


# what corruption.py asks for: (where wrong tokens stand, ids), (B, T) each


def fragment(batch, where):
    return other_text(batch.x0, batch.real, batch.count, batch.rng)


def sticky(batch, where):
    ids = another_token(batch.x0, batch.mask, batch.rng)
    return one_run(batch.real, batch.count, batch.rng), ids


def noise(batch, where):
    level = noise_level(len(batch.x0), *batch.task.sigma, batch.rng)
    ids = mixed_noise(batch.x0, batch.real, level, batch.task.noise_mix, batch.mask, batch.pad, batch.rng)
    return torch.ones_like(where), ids


def noise_weights(input, target, wrong, free, real, task, mask, pad):
    """What weighs how much in rows of mixed noise: all up to the first padding behind the text alike."""
    text = real | (input != (mask if pad is None else pad))
    counted = free & (text | text.roll(1, 1)) & ((input != mask) | (target != mask))
    alike = torch.where((input == mask) | wrong, 1.0, task.doubt)
    return task.weight_remask_task * alike / counted.sum(1, keepdim=True).clamp(min=1) * counted
