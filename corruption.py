"""
What the network is asked: clean rows -> (input, target, weight). A training type is nothing but that.
"""

from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace

import torch

from configurator import UserError
from parts import edits
from parts.noise import NOISE, another_token, fragment, noise, noise_weights, sticky
from parts.presets import supports
from plumbing import distributed
from plumbing.checks import parse_mixture
from plumbing.draw import NotFinite, draw, filtered
from plumbing.pieces import portions
from plumbing.rows import given_prefix, of_rows, places, random_subset, some_rows, split, stratified_k


@dataclass(frozen=True)
class Task:
    """What is asked: settings of train.py, with other defaults. Mixtures: ((name, share), ...)."""
    training_type: str = 'joint'
    remask_ratio: float = 0.5
    corruption: tuple = (('own', 1.0),)
    remasking_loss_type: str = 'all_positions'
    remask_target: str = 'wrong'
    weight_unmask_task: float = 1.0
    weight_remask_task: float = 1.0
    penalty_mask_correct: float = 1.0
    mask_weighting: str = 'row'
    sigma: tuple = (0.1, 0.9)
    noise_mix: tuple = None
    prefix_ratio: float = 0.0
    prefix_length: int = 16        # fixed: the most that it gives
    full_ratio: float = 0.0

    @property
    def doubt(self):
        """What a clean visible token weighs, as a share of a wrong one."""
        return self.penalty_mask_correct if self.remasking_loss_type == 'all_positions' else 0.0


def task_of(config):
    """The Task of the settings of train.py. Raises UserError for a corruption that there is not."""
    given = {field.name: config[field.name] for field in fields(Task) if field.name in config}
    given['corruption'] = parse_mixture('corruption', config['corruption'], CORRUPTIONS)
    given['noise_mix'] = parse_mixture('noise_mix', config['noise_mix'], NOISE)
    if config['training_type'] == 'remasking' and 'own' in dict(given['corruption']):
        raise UserError('a remasking model cannot unmask, so it has no guesses of its own: '
                        'set --corruption=random or --training_type=joint')
    return Task(sigma=(config['sigma_min'], config['sigma_max']), **given)


def ask(x0, free, real, task, tokens, generator, guess=None):
    """
    Clean rows -> (input, target, weight), (B, T) each: all that distinguishes one training type from another.

        unmasking   k of the n free tokens of a row are hidden, k uniform on 1..n; each weighs 1/k (the NELBO)
        remasking   wrong tokens stand at k places, nothing is hidden
        joint       in a share remask_ratio of the rows wrong tokens stand at 1..k of the k places, in a share
                    full_ratio of these rows at all k, so that no mask is left
        denoising   joint, with mixed noise for the wrong tokens

    x0 (B, T) clean ids; free (B, T) bool, what may be hidden; real (B, T) bool, what is not padding; tokens:
    the ids of [MASK], [WRONG] and padding (or None); guess(input, where) -> ids, what a network would write
    there. A wrong token's target is [WRONG] or the clean token, see remask_target; one that equals the
    original is no error. fragment and sticky put as many in a run anywhere; noise hits any place, makes the
    masks as well, and with 'edits' has the targets of parts/edits.py.
    """
    mask, wrong_id, pad = tokens
    B, mixture = len(x0), task.corruption
    if task.training_type == 'denoising':
        mixture = (('noise', 1.0),)
    if task.prefix_ratio:
        free = free & ~given_prefix(free, task.prefix_ratio, task.prefix_length, generator)
        real = real & free
    k = stratified_k(free.sum(1), generator)
    holes = random_subset(free, k, generator)
    input = masked = x0.masked_fill(holes, mask)

    # the first rows may have wrong tokens, each row those of one corruption
    num = {'unmasking': 0, 'remasking': B}.get(task.training_type, round(B * task.remask_ratio))
    proofread, noisy = torch.zeros_like(free), None
    proofread[:num] = True
    if num:
        count, full = k, torch.ones_like(proofread[:, :1])          # (B,), (B, 1): whether no mask is left
        if task.training_type != 'remasking':
            full = some_rows(full, task.full_ratio, generator)
            count = torch.where(full[:, 0], k, stratified_k(k, generator))
        chosen = random_subset(holes & proofread, count, generator)
        batch = SimpleNamespace(x0=x0, real=real, free=free, masked=masked, count=count, task=task, mask=mask,
                                pad=pad, rng=generator, guess=guess)
        for name, rows in split(mixture, proofread, generator):
            where, ids = CORRUPTIONS[name](batch, chosen & rows)
            where = where & rows & free                             # what is given stays, whatever moves
            input = torch.where(where, ids, torch.where(rows & full, x0, input))
            noisy = rows if name == 'noise' else noisy
    elif task.training_type == 'joint' and 'own' in dict(mixture) and guess:
        guess(input, proofread)                                     # nowhere, but see own_guesses

    wrong = (input != mask) & (input != x0)
    target = x0.masked_fill(wrong, wrong_id) if task.remask_target == 'wrong' else x0
    if noisy is not None and task.remask_target == 'edits':
        rows = places(noisy.any(1))                                 # (R,)
        target = x0.index_copy(0, rows, edits.labels(input[rows], x0[rows], mask, wrong_id, pad))
        wrong = (input != mask) & (input != target)
    weight = weights(input, wrong, free, proofread, task, mask)
    if noisy is not None:
        weight = torch.where(noisy, noise_weights(input, target, wrong, free, real, task, mask, pad), weight)
    return input, target, weight


def weights(input, wrong, free, proofread, task, mask):
    """Hidden tokens share weight_unmask_task, visible ones where they may be wrong weight_remask_task."""
    hidden = input == mask
    visible = free & ~hidden & proofread
    share = hidden.sum(1, keepdim=True).clamp(min=1)                # (B, 1)
    if task.mask_weighting == 'token':                              # in the mean over k as much as 1/k
        share = (free.sum(1, keepdim=True) + 1) / 2
    unmask = task.weight_unmask_task * hidden / share
    keep = wrong + task.doubt * (visible & ~wrong)
    return unmask + task.weight_remask_task * keep / visible.sum(1, keepdim=True).clamp(min=1)


# -----------------------------------------------------------------------------
# wrong tokens: a function of the batch in ask and of the places chosen in it -> (where they stand, ids)


def own(batch, where):
    return where, batch.guess(batch.masked, where)


def random(batch, where):
    return where, another_token(batch.x0, batch.mask, batch.rng)


CORRUPTIONS = dict(own=own, random=random, fragment=fragment, sticky=sticky, noise=noise)


def own_guesses(model, generator):
    """The guess of ask: draws tokens from the network's distribution, without gradients or dropout."""
    @torch.no_grad()
    def guess(input, where):
        rows, ids, training = where.any(1), torch.zeros_like(input), model.training
        rows[:1] |= distributed.sharded(model)                      # with fsdp no rank may stay away
        rows = places(rows)                                         # (R,)
        if len(rows):
            at = places(where[rows])                                # (N,) in R * T
            model.eval()
            hidden = of_rows(model, rows)(input[rows], only=at)     # (N, C)
            model.train(training)
            with suppress(NotFinite):                               # the loss will not be finite either
                drawn = [draw(filtered(model.logits(piece, real_only=True)), generator)
                         for piece in portions(model, hidden)]
                ids[rows[at // ids.size(1)], at % ids.size(1)] = torch.cat(drawn)
        return ids
    return guess


def errors_of(config):
    """own_errors for a network of this config: what it was trained on if it cannot write; None: none."""
    can = supports(config)
    usual = dict(noise_mix='replace', sigma_min=0.1, sigma_max=0.9)     # an older one may not say
    task = task_of({**usual, **config}) if can.detects and not can.writes else None
    return partial(own_errors, task=task) if can.detects else None


def own_errors(model, x0, free, real, generator, full=False, task=None, pad=None):
    """
    Rows x0 (B, T) with some own guesses of the network in them and some [MASK], full: none: ids (B, T). task:
    what else is in them. pad: the id of padding, None if there is none.
    """
    tokens = model.mask_token_id, model.wrong_token_id, pad
    guess = own_guesses(model, generator)
    task = task or Task(remask_ratio=1.0, full_ratio=float(full))
    input, _, _ = ask(x0, free, real, task, tokens, generator, guess)
    return input
