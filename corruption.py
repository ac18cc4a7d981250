"""
What the network is asked: clean rows -> (input, target, weight), for every training type.

Masks are drawn here, and wrong tokens of every kind: 'random' ones, the network's 'own' guesses, a 'fragment' of other
text, 'sticky' runs of random ones, and the mixed noise of a denoiser. The loss that it all feeds is in train.py.
"""

import math

import torch

from plumbing import distributed
from configurator import UserError
from plumbing.rows import places, random_subset, stratified_k
from plumbing.pieces import at_once
from plumbing.draw import draw, filtered
from plumbing.text import modelled  # noqa: F401 (for those who import it from here)

KINDS = ('own', 'random', 'fragment', 'sticky', 'noise')    # of wrong tokens, see corrupt
NOISE = ('mask', 'replace', 'swap', 'delete', 'insert')     # what mixed_noise may do to a token


def corrupt(x0, free, real, *, training_type, mask_token_id, wrong_token_id, generator, remask_ratio=0.5,
            corruption=(('own', 1.0),), guess=None, remasking_loss_type='all_positions', remask_target='wrong',
            weight_unmask_task=1.0, weight_remask_task=1.0, penalty_mask_correct=1.0, sigma=(0.1, 0.9, 0.0), noise_mix=None,
            pad_id=None, prefix_ratio=0.0, prefix_length=16, mask_weighting='row'):
    """
    Clean rows -> (input, target, weight), (B, T) each: all that distinguishes one training type from another.

    x0 (B, T) clean ids; free (B, T) bool, positions that may be masked; real (B, T) bool, those that are not padding. In
    every row k of its n free positions are chosen, k uniform on 1..n and stratified over the batch.
      unmasking: they become [MASK]; each weighs 1/k, so that the loss is the NELBO a position, without any 1/t. With
                 mask_weighting='token' each weighs 2/(n+1), as much in the mean over k, and all masks alike: what a row with
                 few of them says about its loss is mostly noise, and 1/k makes much of it (docs/log.md).
      remasking: wrong tokens stand there; nothing is masked.
      joint:     in a share remask_ratio of the rows wrong tokens stand at 1..k of them, the others are masked.
      denoising: joint with the corruption 'noise', whatever the argument corruption says.
    A replacement that equals the original is no error. Visible positions share weight_remask_task equally in a row,
    clean ones times penalty_mask_correct, or 0 if remasking_loss_type is 'corrupted_only'. The target of a wrong token is
    wrong_token_id, or the clean token if remask_target is 'original'.
    corruption: ((kind, share), ...), one kind a row: 'random' draws any other token; 'own' calls guess(input (R, T), where
    (R, T) bool) -> ids (R, T), for the guesses of a network; 'sticky' and 'fragment' fill one run of real positions, with
    random tokens and with a piece of another row; 'noise' is mixed_noise instead of masks, at a level drawn by
    noise_level(*sigma): there all positions up to the first padding behind the text are alike, masked or visible, and share
    weight_remask_task.
    prefix_ratio: in that share of the rows the first tokens, up to prefix_length of them, are given (hybrid generation).
    """
    B = x0.size(0)
    if training_type == 'denoising':
        corruption = (('noise', 1.0),)
    if prefix_ratio:
        given = torch.rand(2, B, 1, generator=generator, device=x0.device)
        length = (1 + given[1] * prefix_length).long() * (given[0] < prefix_ratio)           # (B, 1)
        free = free & (free.cumsum(1) > length.clamp(max=x0.size(1) // 2))
        real = real & free
    k = stratified_k(free.sum(1), generator)
    chosen = random_subset(free, k, generator)
    input = x0.masked_fill(chosen, mask_token_id)
    proofread = torch.zeros_like(free)                                         # rows in which tokens may be wrong
    some = {'unmasking': 0, 'remasking': B}.get(training_type, round(B * remask_ratio))
    proofread[:some] = True
    noisy_rows = torch.zeros_like(proofread[:, :1])                            # (B, 1)
    if some:
        count = k if training_type == 'remasking' else stratified_k(k, generator)
        filled = random_subset(chosen & proofread, count, generator)
        edges = torch.tensor([share for _, share in corruption], device=x0.device).cumsum(0)
        kinds = torch.bucketize(torch.rand(B, generator=generator, device=x0.device) * edges[-1], edges)
        for number, (kind, _) in enumerate(corruption):
            rows = proofread & (kinds == number)[:, None]
            where = filled & rows
            if kind == 'noise':
                noisy_rows = rows[:, :1]
                noisy = mixed_noise(x0, real & free, noise_level(B, *sigma, generator), noise_mix,
                                    mask_token_id, pad_id, generator)
                input = torch.where(rows, noisy, input)
                continue
            if kind in ('fragment', 'sticky') and training_type == 'remasking':
                input = torch.where(rows, x0, input)                           # the run is all that is wrong in the row
            if kind == 'own':
                replacement = guess(input, where)
            elif kind == 'fragment':
                where, replacement = other_text(x0, real, count, generator)
            else:
                replacement = another_token(x0, mask_token_id, generator)
            if kind == 'sticky':
                where = one_run(real, count, generator)
            where = where & rows
            input = torch.where(where, replacement, input)
    elif training_type == 'joint' and 'own' in dict(corruption) and guess:
        guess(input, proofread)                                                # nowhere, but see own_guesses

    masked = input == mask_token_id
    wrong = ~masked & (input != x0)
    target = x0.masked_fill(wrong, wrong_token_id) if remask_target == 'wrong' else x0
    visible = free & ~masked & proofread
    keep = penalty_mask_correct if remasking_loss_type == 'all_positions' else 0.0
    share = masked.sum(1, keepdim=True).clamp(min=1) if mask_weighting == 'row' else (free.sum(1, keepdim=True) + 1) / 2  # (B, 1)
    unmask = weight_unmask_task * masked / share
    remask = weight_remask_task * (wrong + keep * (visible & ~wrong)) / visible.sum(1, keepdim=True).clamp(min=1)
    weight = unmask + remask
    if some and 'noise' in dict(corruption):
        text = real | (input != (mask_token_id if pad_id is None else pad_id))
        counted = free & (text | text.roll(1, 1))                              # and the padding right behind it
        alike = weight_remask_task * torch.where(masked | wrong, 1.0, keep) / counted.sum(1, keepdim=True).clamp(min=1)
        alike = alike * counted
        weight = torch.where(noisy_rows, alike, weight)
    return input, target, weight


def own_guesses(model, generator):
    """The guess of corrupt: draws tokens from a network's distribution, without gradients or dropout."""
    @torch.no_grad()
    def guess(input, where):
        rows, ids, training = where.any(1), torch.zeros_like(input), model.training
        rows[:1] |= distributed.sharded(model)                                 # none of its ranks may stay away
        rows = places(rows)                                                    # (R,)
        if len(rows):
            at = places(where[rows])                                           # (N,) in R * T
            hidden = model.eval()(input[rows], only=at)                        # (N, C)
            model.train(training)
            pieces = hidden.split(at_once(model.wte.weight, model.most_logits))
            drawn = torch.cat([draw(filtered(model.logits(piece, real_only=True)), generator) for piece in pieces])
            ids[rows[at // ids.size(1)], at % ids.size(1)] = drawn
        return ids
    return guess


def pack(length, *rows):
    """
    Short rows, several to a row: the first length (B,) positions of the tensors rows (B, T) each, 0 in what room is left (R, T),
    and after them segment (R, T), see GPT.forward.
    """
    (B, T), device, length = rows[0].shape, length.device, length.cpu()        # a GPU is waited for here, and not again
    room, place, lengths = [], [None] * B, length.tolist()                     # first fit, the longest first
    for row in length.argsort(descending=True).tolist():
        n = lengths[row]
        shelf = next((i for i, left in enumerate(room) if left >= n), len(room))
        if shelf == len(room):
            room.append(T)
        place[row] = shelf * T + T - room[shelf]
        room[shelf] -= n
    position = torch.arange(T)
    inside = position < length[:, None]                                        # (B, T)
    to = (torch.tensor(place)[:, None] + position)[inside].to(device)          # (N,) in R * T
    of = places(inside).to(device)                                             # (N,) in B * T
    number = torch.arange(1, B + 1, device=device)[:, None].expand(B, T)
    return [torch.zeros(len(room) * T, dtype=part.dtype, device=device).index_put((to,), part.flatten()[of]).view(-1, T)
            for part in (*rows, number)]


def extent(input, weight, pad_id, generator):
    """
    How many positions (B,) of the rows input (B, T) a pass needs: not the visible padding behind all that carries weight (B, T),
    but for a random part of it, mostly short. So the network meets every length of padding, and rarely pays for it.
    """
    T = input.size(1)
    last = T - ((weight > 0) | (input != pad_id)).flip(1).long().argmax(1)     # (B,)
    u = torch.rand(last.shape, generator=generator, device=last.device)
    return last + (u ** 3 * (T + 1 - last)).long().clamp(max=T - last)


def another_token(ids, V, generator):
    """For every token of ids (...) one of the other V - 1, uniformly."""
    other = torch.randint(V - 1, ids.shape, generator=generator, device=ids.device)
    return other + (other >= ids)


def one_run(real, count, generator):
    """In every row at most count (B,) of the real positions (B, T), next to one another, anywhere: bool (B, T)."""
    rank, n = real.cumsum(1) - 1, real.sum(1)                                  # (B, T), (B,)
    count = count.minimum(n)
    start = (torch.rand(n.shape, generator=generator, device=n.device) * (n - count + 1)).long().minimum(n - count)
    return real & (rank >= start[:, None]) & (rank < (start + count)[:, None])


def other_text(x0, real, count, generator):
    """
    A run of at most count (B,) real positions in every row, and for it as many neighbours from a random place of another
    row, which may be shorter: (run (B, T) bool, ids (B, T), of which those in the run matter).
    """
    B, T = x0.shape
    shift = int(torch.randint(1, max(2, B), (), generator=generator, device=x0.device))
    source, source_real = x0.roll(shift, 0), real.roll(shift, 0)               # one row's text for each row
    piece = one_run(source_real, count.minimum(real.sum(1)), generator)
    run = one_run(real, piece.sum(1), generator)
    at = torch.arange(T, device=x0.device) + (piece.long().argmax(1) - run.long().argmax(1))[:, None]  # (B, T)
    return run, source.gather(1, at.clamp(0, T - 1))


def noise_level(num, sigma_min, sigma_max, high_noise_bias, generator):
    """
    The noise level of num rows, (num,): uniform on sigma_min..sigma_max, but in a share high_noise_bias of the rows on the
    upper fifth of 0..sigma_max (the seed's 0.8..1.0).
    """
    u, high = torch.rand(2, num, generator=generator, device=generator.device)
    low = torch.where(high < high_noise_bias, max(sigma_min, 0.8 * sigma_max), sigma_min)
    return low + (sigma_max - low) * u


def mixed_noise(x0, real, sigma, mix, mask_token_id, pad_id, generator):
    """
    Every real token of x0 (B, T) is hit with probability sigma (B,): ids (B, T), the noisy canvas.

    mix: ((what, share), ...) of NOISE. mask: it becomes [MASK]; replace: another token; swap: it changes places with its right
    neighbour; delete: what is right of it moves left; insert: a random token comes before it and what is right of it moves
    right, onto the padding where there is some, else off the canvas. What moves in from the right end is padding, or
    [MASK] in a dataset without padding. (The universal denoiser seed's mixture; there insert never found room.)
    """
    B, T = x0.shape
    edges = torch.tensor([share for _, share in mix], device=x0.device).cumsum(0)
    u, which = torch.rand(2, B, T, generator=generator, device=x0.device)
    op = torch.bucketize(which * edges[-1], edges)                             # (B, T) number in mix
    op = op.masked_fill((u >= sigma[:, None]) | ~real, -1)
    number = {what: i for i, (what, _) in enumerate(mix)}
    hit = {what: op == number.get(what, -2) for what in NOISE}

    # of a run of positions that would swap every other one does, with the position behind it
    at = torch.arange(T, device=x0.device).expand(B, T)
    since = at - at.masked_fill(hit['swap'], -1).cummax(1).values              # 1, 2, .. within a run
    first = hit['swap'] & (since % 2 == 1)
    first[:, -1] = False
    first[:, :-1] &= real[:, 1:]
    second = first.roll(1, 1)
    x = torch.where(first, x0.roll(-1, 1), torch.where(second, x0.roll(1, 1), x0))

    x = torch.where(hit['replace'], another_token(x, mask_token_id, generator), x).masked_fill(hit['mask'], mask_token_id)
    size = 1 + hit['insert'].long() - hit['delete'].long()                     # (B, T) positions that each token takes
    place = size.cumsum(1) - 1                                                 # (B, T) where it ends up, < 2T
    canvas = torch.full((B, 2 * T + 1), mask_token_id if pad_id is None else pad_id, device=x0.device)
    inserted = torch.randint(mask_token_id, x0.shape, generator=generator, device=x0.device)
    canvas.scatter_(1, (place - 1).masked_fill(~hit['insert'], 2 * T), inserted)
    canvas.scatter_(1, place.masked_fill(hit['delete'], 2 * T), x)
    return canvas[:, :T]


def parse_mixture(name, text, known):
    """'own' or 'own:0.7,random:0.3' -> (('own', 0.7), ('random', 0.3)). Raises UserError, naming the setting."""
    try:
        mixture = tuple((kind.strip(), float(share or 1)) for kind, _, share in (part.partition(':') for part in text.split(',')))
    except ValueError:
        raise UserError(f"{name} expects a kind, or kind:share,kind:share; got '{text}'") from None
    for kind, share in mixture:
        if kind not in known or not 0 <= share < math.inf or not sum(share for _, share in mixture):
            raise UserError(f"{name} knows {', '.join(known)}, with shares >= 0; got '{text}'")
    return mixture


def own_errors(model, x0, free, real, generator):
    """Rows x0 (B, T) in which some tokens are the network's own guesses and others [MASK]: ids (B, T), see corrupt."""
    input, _, _ = corrupt(x0, free, real, training_type='joint', remask_ratio=1.0, generator=generator,
                          mask_token_id=model.mask_token_id, wrong_token_id=model.wrong_token_id,
                          guess=own_guesses(model, generator))
    return input
