"""Training: what becomes (input, target, weight), what the loss and the evaluation are, and that a run can go on."""

import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARITHMETIC, ROOT, chi_square, default_config, load_script, tiny_gpt

import configurator
import train
from configurator import UserError
from model import GPT, GPTConfig, causal_nll, load_checkpoint, nelbo
from train import (checkpoint_name, corrupt, evaluate, loss, lr_scale, make_optimizers, modelled, own_guesses,
                   parse_mixture, per_token, ramp, random_rows, roc_auc, spread_rows, training_step)

V, T = 6, 10
MASK, WRONG = V, V + 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clean_rows(B, seed=0):
    """(x0, free): random rows of which some positions are not free, and one row has no free position at all."""
    generator = seeded(seed)
    x0, free = torch.randint(V, (B, T), generator=generator), torch.rand(B, T, generator=generator) < 0.8
    free[:, 1] = True
    free[B // 2] = False
    return x0, free


def corrupted(x0, free, training_type, seed=1, **more):
    more = {'corruption': (('random', 1.0),), **more}
    return corrupt(x0, free, training_type=training_type, mask_token_id=MASK, wrong_token_id=WRONG,
                   generator=seeded(seed), **more)


def random_guess(seed=5):
    """A guess for corrupt that records what it was asked."""
    generator, calls = seeded(seed), []

    def guess(input, where):
        calls.append((input.clone(), where.clone()))
        return torch.randint(V, input.shape, generator=generator)
    return guess, calls

# -----------------------------------------------------------------------------
# the task


def expected_weight(x0, input, free, proofread, keep, unmask, remask):
    """The documented weights, a row and a position at a time."""
    weight = torch.zeros(x0.shape)
    for b in range(len(x0)):
        masked = [t for t in range(T) if input[b, t] == MASK]
        visible = [t for t in range(T) if free[b, t] and input[b, t] != MASK]
        for t in masked:
            weight[b, t] = unmask / len(masked)
        for t in visible if proofread[b] else ():
            weight[b, t] = remask * (1.0 if input[b, t] != x0[b, t] else keep) / len(visible)
    return weight


@pytest.mark.parametrize('target_kind', ['wrong', 'original'])
@pytest.mark.parametrize('loss_type', ['all_positions', 'corrupted_only'])
@pytest.mark.parametrize('kind', ['own', 'random'])
@pytest.mark.parametrize('training_type', ['unmasking', 'remasking', 'joint'])
def test_corrupt(training_type, kind, loss_type, target_kind):
    B = 64
    x0, free = clean_rows(B)
    guess, calls = random_guess()
    for seed, penalty, ratio in ((1, 0.7, 0.5), (2, 0.0, 1.0), (3, 1.0, 0.3)):
        input, target, weight = corrupted(
            x0, free, training_type, seed, corruption=((kind, 1.0),), guess=guess, remasking_loss_type=loss_type,
            remask_target=target_kind, weight_unmask_task=1.5, weight_remask_task=0.25, penalty_mask_correct=penalty,
            remask_ratio=ratio)
        masked, changed = input == MASK, input != x0
        wrong = changed & ~masked
        rows = {'unmasking': 0, 'remasking': B, 'joint': round(B * ratio)}[training_type]
        proofread = torch.arange(B) < rows
        assert torch.equal(input[~free], x0[~free]) and (weight[~free] == 0).all()
        assert input.min() >= 0 and input.max() <= MASK                   # [WRONG] is a label, never an input
        assert torch.equal(target, torch.where(wrong, WRONG, x0) if target_kind == 'wrong' else x0)
        keep = penalty if loss_type == 'all_positions' else 0.0
        assert torch.allclose(weight, expected_weight(x0, input, free, proofread, keep, 1.5, 0.25), atol=1e-7)
        has_masks = masked.any(1)
        assert torch.allclose((weight * masked).sum(1)[has_masks], torch.tensor(1.5))
        assert not wrong[~proofread].any() and not wrong[B // 2].any()
        if training_type == 'remasking':
            assert not masked.any()
        else:
            assert has_masks[~proofread & free.any(1)].all()              # k is at least 1
        if training_type == 'unmasking':
            assert not calls and (weight[~masked] == 0).all()
        elif kind == 'random':
            assert wrong[proofread & free.any(1)].any(1).all()            # so is the number of replaced tokens
        assert not (masked & ~free).any() and wrong.any() == (rows > 0)


def test_curricula_start_at_plain_unmasking():
    x0, free = clean_rows(40)
    plain, start = corrupted(x0, free, 'unmasking'), corrupted(x0, free, 'joint', remask_ratio=0.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, start))
    free_of_charge = corrupted(x0, free, 'joint', penalty_mask_correct=0.0)
    wrong_only = corrupted(x0, free, 'joint', remasking_loss_type='corrupted_only')
    assert all(torch.equal(a, b) for a, b in zip(free_of_charge, wrong_only))
    input, _, weight = free_of_charge
    assert (weight[input == x0] == 0).all() and (weight[input != x0] > 0).all()


@pytest.mark.parametrize('training_type', ['joint', 'remasking'])
def test_own_corruption_uses_the_guesses_where_it_asked(training_type):
    x0, free = clean_rows(50)
    guess, calls = random_guess()
    input, _, _ = corrupted(x0, free, training_type, corruption=(('own', 1.0),), guess=guess, remask_ratio=1.0)
    (seen, where), = calls
    assert (seen[where] == MASK).all() and not (where & ~free).any()      # the network guesses without the answer
    guesses = torch.randint(V, x0.shape, generator=seeded(5))
    assert torch.equal(input, torch.where(where, guesses, seen))
    assert where[free.any(1)].any(1).all() and torch.equal(seen[seen != MASK], x0[seen != MASK])


def test_a_guess_that_is_right_is_no_error():
    x0, free = clean_rows(50)
    for kind in ('remasking', 'joint'):
        input, target, weight = corrupted(x0, free, kind, corruption=(('own', 1.0),), guess=lambda *_: x0,
                                          remask_ratio=1.0, penalty_mask_correct=0.5)
        visible = free & (input != MASK)
        assert torch.equal(target, x0) and torch.equal(input[visible], x0[visible])
        shares = (weight * visible).sum(1)[visible.any(1)]
        assert torch.allclose(shares, torch.tensor(0.5))


def test_random_replacements_are_uniform_over_the_other_tokens():
    x0 = torch.arange(V).repeat(5000).view(-1, T)
    input, _, _ = corrupted(x0, torch.ones_like(x0).bool(), 'remasking')
    wrong = input != x0
    pairs = (x0[wrong] * V + input[wrong]).bincount(minlength=V * V).view(V, V)
    expected = (pairs.sum(1, keepdim=True) / (V - 1)).expand(V, V) * (1 - torch.eye(V))
    statistic, bound = chi_square(pairs, expected)
    assert statistic < bound and pairs.sum() > 10000


def test_how_many_are_masked_and_replaced():
    """k uniform on 1..n; of these, in the rows that carry errors, 1..k replaced, uniform again."""
    B, n = 12000, 4
    x0, free = torch.zeros(B, T, dtype=torch.long), (torch.arange(T) < n).expand(B, T)
    input, _, _ = corrupted(x0, free, 'unmasking')
    statistic, bound = chi_square((input == MASK).sum(1).bincount(minlength=n + 1)[1:], [B / n] * n)
    assert statistic < bound
    assert ((input == MASK).sum(0)[:n] / B - 5 / 8).abs().max() < 0.02    # every position alike
    input, _, _ = corrupted(x0, free, 'remasking')
    statistic, bound = chi_square((input != x0).sum(1).bincount(minlength=n + 1)[1:], [B / n] * n)
    assert statistic < bound
    input, _, _ = corrupted(x0, free, 'joint', remask_ratio=1.0)
    wrong, k = ((input != x0) & (input != MASK)).sum(1), (input != x0).sum(1)
    pairs = (k * (n + 1) + wrong).bincount(minlength=(n + 1) ** 2).view(n + 1, n + 1)
    expected = [[B / n / i if 1 <= j <= i else 0.0 for j in range(n + 1)] for i in range(n + 1)]
    statistic, bound = chi_square(pairs, expected)
    assert statistic < bound


def test_mixtures_of_corruptions_have_their_shares():
    B = 4000
    x0 = torch.zeros(B, T, dtype=torch.long)
    input, _, _ = corrupted(x0, torch.ones_like(x0).bool(), 'remasking', corruption=(('own', 7.0), ('random', 3.0)),
                            guess=lambda input, where: torch.where(where, 1, 0 * input))
    ones = (input == 1).sum(1) == (input != 0).sum(1)                     # all errors of the row are the guesses
    single = (input != 0).sum(1) == 1                                     # among which a random one is a 1 now and then
    share = ones[~single].double().mean()
    assert abs(share - 0.7 - 0.3 * 0.02) < 0.04


@pytest.mark.parametrize('order', [('own', 'random'), ('random', 'own')])
def test_each_row_has_one_kind_of_error(order):
    """In a mixture the network guesses for its own rows only, and never sees what the other kind has written there."""
    x0 = torch.zeros(400, T, dtype=torch.long)
    guess, calls = random_guess()
    input, _, _ = corrupted(x0, torch.ones_like(x0).bool(), 'joint', corruption=tuple((kind, 0.5) for kind in order),
                            guess=guess, remask_ratio=1.0)
    (seen, where), = calls
    assert (seen[where] == MASK).all() and 120 < where.any(1).sum() < 280
    guesses = torch.randint(V, x0.shape, generator=seeded(5))
    own, others = where.any(1), ~where.any(1)
    assert torch.equal(input[own], torch.where(where, guesses, seen)[own])
    assert (input[others] != 0).any(1).all()


@torch.no_grad()
def test_own_guesses_follow_the_network():
    model = tiny_gpt(V, T, seed=3)
    model.mask_logit_bias.fill_(50.0)                                     # it would rather abstain
    input = torch.tensor([[1, MASK, 2, 0, 3, MASK, 1, 1, 0, 2]]).repeat(4000, 1)
    where = torch.zeros_like(input).bool()
    where[:3000, 5] = True
    ids = own_guesses(model, seeded())(input, where)
    assert (ids[~where] == 0).all()
    p = model.logits(model(input[:1])[0, 5])[:V].softmax(-1)
    statistic, bound = chi_square(ids[:3000, 5].bincount(minlength=V), 3000 * p.double())
    assert statistic < bound
    idle = SimpleNamespace(training=False)                                # cannot be called: it is not asked in vain
    nothing = own_guesses(idle, None)(input, torch.zeros_like(where))
    assert not nothing.any()


def test_own_guesses_need_no_gradient():
    model = tiny_gpt(V, T)
    guess, input = own_guesses(model, seeded()), torch.full((2, T), MASK)
    assert not guess(input, input == MASK).requires_grad
    hidden = []
    model.register_forward_hook(lambda module, args, out: hidden.append(out))
    guess(input, input == MASK)
    assert not hidden[0].requires_grad


def test_own_guesses_are_made_without_dropout():
    model = tiny_gpt(V, T, dropout=0.5).train()
    input, hidden = torch.full((2, T), MASK), []
    model.register_forward_hook(lambda module, args, out: hidden.append(out))
    for _ in range(2):
        own_guesses(model, seeded())(input, input == MASK)
    assert torch.equal(*hidden) and model.training

# -----------------------------------------------------------------------------
# the loss


def dense_loss(model, input, target, weight, causal, r):
    """The loss over all positions, with the whole vocabulary and logarithms written out."""
    logits = model.logits(model(input, causal=causal)).double()
    masked = (input == MASK) | causal
    logits[..., V:] = torch.where(masked[..., None], float('-inf'), logits[..., V:])
    p = (logits - logits.logsumexp(-1, keepdim=True)).gather(2, target[..., None])[..., 0].exp()
    scale = torch.where(masked, r + (1 - r) * (1 - p.detach()), 1.0)
    # where nothing is to be learned the target may be impossible: no 0 * inf
    return (weight * scale * -torch.where(weight > 0, p, 1.0).log()).sum(), weight * scale, -p.detach().log()


def gradients(model):
    """The gradients of all parameters that have one; they are taken off the model."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_close(grads, expected):
    assert set(grads) == set(expected) and 'wte.weight' in grads
    for name, grad in expected.items():
        assert torch.allclose(grads[name], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item()), name


def joint_batch(seed=0, **more):
    x0, free = clean_rows(24, seed)
    return (x0, *corrupted(x0, free, 'joint', seed, **{'weight_remask_task': 0.5, 'penalty_mask_correct': 0.6, **more}))


@pytest.mark.parametrize('r', [1.0, 0.3, 0.0])
@pytest.mark.parametrize('causal', [False, True])
def test_loss_and_gradients_equal_the_dense_computation(causal, r):
    model = tiny_gpt(V, T)
    model.mask_logit_bias.fill_(0.7)
    x0, input, target, weight = joint_batch()
    if causal:
        input, target, weight = x0, x0, (torch.rand(x0.shape, generator=seeded()) < 0.5) * 0.2
    total, parts = loss(model, input, target, weight, causal=causal, reward_correct_unmask=r)
    total.backward()
    sparse = gradients(model)
    expected, scaled, ce = dense_loss(model, input, target, weight, causal, r)
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients(model), sparse)
    masked, wrong = input == MASK, target == WRONG
    tasks = {'causal': weight > 0} if causal else dict(unmask=masked, detect=wrong,
                                                       keep=~masked & ~wrong & (weight > 0))
    assert set(parts) == set(tasks)
    for name, which in tasks.items():
        assert which.any() and not parts[name].requires_grad
        which = which & (weight > 0)
        assert parts[name].tolist() == pytest.approx([(scaled * ce)[which].sum().item(), scaled[which].sum().item()],
                                                     rel=1e-4)


def test_unweighted_positions_have_no_say():
    model = tiny_gpt(V, T)
    _, input, target, weight = joint_batch()
    total, _ = loss(model, input, target, weight)
    other = torch.where(weight > 0, target, (target + 1) % V)
    assert torch.equal(loss(model, input, other, weight)[0], total)
    nothing, parts = loss(model, input, target, torch.zeros_like(weight))
    assert nothing.item() == 0 and parts['unmask'].tolist() == [0, 0]
    nothing.backward()


def test_softmax_at_masked_positions_has_real_tokens_only():
    model = tiny_gpt(V, T)
    x0, input, target, weight = joint_batch()
    before, parts = loss(model, input, target, weight)
    with torch.no_grad():
        model.mask_logit_bias.fill_(10.0)                               # [MASK] becomes the likeliest answer everywhere
    _, after = loss(model, input, target, weight)
    assert torch.equal(parts['unmask'], after['unmask'])
    assert after['keep'][0] > parts['keep'][0] + 1 and after['detect'][0] > parts['detect'][0] + 1
    full, causal = loss(model, x0, x0, weight, causal=True)
    with torch.no_grad():
        model.mask_logit_bias.fill_(0.0)
    assert torch.equal(loss(model, x0, x0, weight, causal=True)[0], full)


def test_reward_formula():
    """One masked position: r = 1 is plain cross-entropy, r = 0 weighs it 1 - p, and a certain answer still costs r."""
    model = tiny_gpt(V, T)
    input = torch.full((1, T), MASK)
    target, weight = torch.zeros(1, T, dtype=torch.long), torch.zeros(1, T)
    weight[0, 4] = 2.0
    p = model.logits(model(input)[0, 4])[:V].softmax(-1)[0].item()
    for r in (1.0, 0.0, 0.25):
        total, parts = loss(model, input, target, weight, reward_correct_unmask=r)
        assert total.item() == pytest.approx(2 * (r + (1 - r) * (1 - p)) * -math.log(p), rel=1e-4)
        assert parts['unmask'][1].item() == pytest.approx(2 * (r + (1 - r) * (1 - p)), rel=1e-4)
    with torch.no_grad():                                                 # visible positions are not rewarded
        visible = torch.zeros_like(input)
        totals = [loss(model, visible, target, weight, reward_correct_unmask=r)[0] for r in (1.0, 0.0)]
        assert torch.equal(*totals)


@torch.no_grad()
def test_the_unmasking_loss_is_the_nelbo_a_position():
    model, n = tiny_gpt(3, 4), 4
    row = torch.tensor([[0, 2, 1, 1]])
    x0 = row.expand(2000, 4)
    free = torch.ones_like(x0).bool()
    bounds, losses = [], []
    for seed in range(12):
        bounds.append(nelbo(model, x0, free, seeded(seed)).mean() / n)
        batch = corrupt(x0, free, training_type='unmasking', mask_token_id=3, wrong_token_id=4,
                        generator=seeded(99 + seed))
        losses.append(loss(model, *batch)[0] / len(x0))
    bounds, losses = torch.stack(bounds), torch.stack(losses)
    error = ((bounds.var() + losses.var()) / 12) ** 0.5
    assert abs(bounds.mean() - losses.mean()) < 4 * error < 0.05 * bounds.mean()


def arithmetic_rows(num, seed=0):
    """Rows of the shape of the arithmetic dataset: start, 3 to 20 tokens, end, padding."""
    generator = np.random.default_rng(seed)
    rows = np.full((num, 64), 17)
    for row, n in zip(rows, generator.integers(3, 21, num)):
        row[:n + 2] = [15, *generator.integers(0, 15, n), 16]
    return torch.from_numpy(rows)


@pytest.mark.parametrize('accumulate', [1, 4])
@pytest.mark.parametrize('training_type, ratio', [('causal', 0.0), ('unmasking', 0.0), ('joint', 0.5),
                                                  ('unmasking', 1.0)])
def test_training_step(training_type, ratio, accumulate):
    """Its gradient is that of the mean over the rows: a row's own loss, or the causal rows' mean loss a real token."""
    model, x0 = tiny_gpt(18, 64, n_recur=1), arithmetic_rows(8)
    config = default_config(training_type=training_type, causal_ratio=ratio, gradient_accumulation_steps=accumulate,
                            proofreading_warmup_iters=10, masking_warmup_iters=20, weight_remask_task=0.5)
    parts = training_step(model, x0, ARITHMETIC, config, 5, seeded(1))
    grads = gradients(model)
    num_causal = 8 if training_type == 'causal' else int(8 * ratio)
    total = torch.zeros(())
    if num_causal:
        rows = x0[:num_causal]
        logits = model.logits(model(rows, causal=True), real_only=True)
        ce = F.cross_entropy(logits.transpose(1, 2), rows, reduction='none')
        total = total + num_causal * ce[(rows != 15) & (rows != 17)].mean()
        assert parts['causal'][1].item() == pytest.approx(num_causal, rel=1e-5)
    if num_causal < 8:
        rows, generator = x0[num_causal:], seeded(1)
        batch = corrupt(rows, rows != 15, training_type=training_type, mask_token_id=18, wrong_token_id=19,
                        generator=generator, guess=own_guesses(model, generator), remask_ratio=0.25,
                        penalty_mask_correct=0.25, weight_remask_task=0.5)
        total = total + loss(model, *batch)[0]
    (total / 8 / accumulate).backward()
    assert_close(gradients(model), grads)
    others = {'unmask', 'detect', 'keep'} if num_causal < 8 else set()
    assert set(parts) == others | ({'causal'} if num_causal else set())

# -----------------------------------------------------------------------------
# evaluation


def test_roc_auc_against_counting_pairs():
    generator = seeded(1)
    for levels in (3, 1000):                                              # many ties, and hardly any
        score = torch.randint(levels, (300,), generator=generator).float() / levels
        label = torch.rand(300, generator=generator) < 0.2 + 0.5 * score
        a, b = score[label][:, None], score[~label][None]
        pairs = ((a > b).double() + 0.5 * (a == b).double()).mean().item()
        assert 0.55 < pairs < 0.9 and roc_auc(score, label) == pytest.approx(pairs, abs=1e-9)
    assert roc_auc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([False, False, True])) == 1
    assert roc_auc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([True, False, False])) == 0
    assert roc_auc(torch.ones(9), torch.arange(9) < 4) == 0.5
    assert math.isnan(roc_auc(torch.ones(3), torch.ones(3).bool()))


def test_per_token_and_its_standard_error():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 60, 500)
    nats = tokens * (2 + 0.3 * rng.standard_normal(500)) + 3 * rng.standard_normal(500)
    mean, error = per_token(torch.tensor(nats), torch.tensor(tokens))
    assert mean == pytest.approx(nats.sum() / tokens.sum())
    index = rng.integers(0, 500, (4000, 500))
    bootstrap = (nats[index].sum(1) / tokens[index].sum(1)).std()
    assert error == pytest.approx(bootstrap, rel=0.1)
    assert per_token(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1, 2, 3])) == (2.0, pytest.approx(0, abs=1e-6))


@torch.no_grad()
def test_evaluate_measures_what_it_says():
    model, x0 = tiny_gpt(18, 64, n_recur=1), arithmetic_rows(20)
    model.train()
    result = evaluate(model, x0, ARITHMETIC, causal=True, bidirectional=True, detects=True)
    assert not model.training
    free, real = x0 != 15, (x0 != 15) & (x0 != 17)
    tokens = real.sum(1)
    bound = nelbo(model, x0, free, seeded(0))                             # padding is paid for, and is no token
    assert (result['nelbo'], result['nelbo_se']) == pytest.approx(per_token(bound, tokens))
    exact = causal_nll(model, x0, real)
    assert (result['causal'], result['causal_se']) == pytest.approx(per_token(exact, tokens))
    assert 0 < result['auc'] < 1 and result['nelbo_se'] > 0
    again = evaluate(model, x0, ARITHMETIC, causal=True, bidirectional=True, detects=True)
    assert again == result
    assert evaluate(model, x0, ARITHMETIC, causal=False, bidirectional=False, detects=False) == {}
    halves = evaluate(model, x0, ARITHMETIC, causal=True, bidirectional=False, detects=False, batch_size=7)
    assert halves == pytest.approx({k: result[k] for k in ('causal', 'causal_se')})
    assert result['nelbo'] != evaluate(model, x0, ARITHMETIC, causal=False, bidirectional=True, detects=False,
                                       seed=1)['nelbo']


class Detector:
    """In the place of a network: it guesses at random, and doubts each token but the 0."""
    mask_token_id, wrong_token_id, training = MASK, WRONG, False

    def __init__(self, sign):
        self.sign = sign

    def parameters(self):
        yield torch.zeros(1)

    def eval(self):
        return self

    def train(self, mode):
        pass

    def __call__(self, idx):
        return F.one_hot(idx, V + 2).float()

    def logits(self, hidden, real_only=False):
        out = torch.zeros(hidden.shape)
        out[..., MASK] = float('-inf')
        out[..., WRONG] = float('-inf') if real_only else self.sign * (1 - 2 * hidden[..., 0])
        return out


@pytest.mark.parametrize('sign, auc', [(1, 1.0), (-1, 0.0), (0, 0.5)])
def test_evaluate_scores_the_detection_of_own_errors(sign, auc):
    x0 = torch.zeros(50, T, dtype=torch.long)
    meta = dict(bos=None, pad=None)
    assert evaluate(Detector(sign), x0, meta, causal=False, bidirectional=False, detects=True) == {'auc': auc}


def test_modelled():
    x0 = torch.tensor([[15, 1, 2, 16, 17, 17]])
    free, real = modelled(x0, ARITHMETIC)
    assert free.tolist() == [[0, 1, 1, 1, 1, 1]] and real.tolist() == [[0, 1, 1, 1, 0, 0]]
    free, real = modelled(x0, dict(bos=None, pad=None))
    assert free.all() and real.all() and free.shape == (1, 6)

# -----------------------------------------------------------------------------
# schedules and names


def test_lr_scale():
    wsd = [lr_scale(step, 'wsd', 100, 9, 0.4) for step in range(101)]
    assert wsd[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert wsd[9:60] == [1.0] * 51 and wsd[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 101)])
    cosine = [lr_scale(step, 'cosine', 100, 0, 0.4) for step in range(101)]
    assert cosine[0] == 1 and cosine[50] == pytest.approx(0.5) and cosine[100] == pytest.approx(0)
    assert all(a > b for a, b in itertools.pairwise(cosine))
    assert lr_scale(0, 'cosine', 100, 9, 0.4) == pytest.approx(0.1)
    assert lr_scale(50, 'wsd', 100, 0, 0.0) == 1.0                        # no decay
    assert lr_scale(0, 'wsd', 1, 0, 0.4) == 1.0


def test_ramp():
    assert [ramp(step, 4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert ramp(0, 0) == 1


def test_parse_mixture():
    assert parse_mixture('own') == (('own', 1.0),)
    assert parse_mixture('own:0.7,random:0.3') == (('own', 0.7), ('random', 0.3))
    assert parse_mixture('own:2, random') == (('own', 2.0), ('random', 1.0))
    for text in ('', 'typo', 'own:x', 'own:-1', 'own:0', 'own,', 'own:0,random:0', 'own;random', 'random:0.5,onw:0.5'):
        with pytest.raises(UserError, match='corruption') as error:
            parse_mixture(text)
        assert f"got '{text}'" in str(error.value)


@pytest.mark.parametrize('text', ['own:nan', 'own:inf', 'own:0.5:0.5'])
def test_parse_mixture_refuses_odd_shares(text):
    with pytest.raises(UserError):
        parse_mixture(text)


def test_checkpoint_names():
    assert checkpoint_name('unmasking', 'all_positions') == 'ckpt_unmasking.pt'
    assert checkpoint_name('causal', 'corrupted_only', 500) == 'ckpt_causal_500.pt'
    assert checkpoint_name('joint', 'all_positions') == 'ckpt_joint_all_positions.pt'
    assert checkpoint_name('remasking', 'corrupted_only', 20) == 'ckpt_remasking_corrupted_only_20.pt'


@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_every_parameter_is_optimised_once(kind):
    model = tiny_gpt(V, T, n_layer=2)
    optimizers = make_optimizers(model, kind, 1e-3, 1e-2, 0.1, (0.9, 0.95))
    groups = [group for optim in optimizers for group in optim.param_groups]
    names = {p: name for name, p in model.named_parameters()}
    found = [names[p] for group in groups for p in group['params']]
    assert sorted(found) == sorted(names.values())
    for group in groups:
        for name in (names[p] for p in group['params']):
            assert group['weight_decay'] == (0.1 if name.startswith('blocks') else 0)
    assert [type(optim).__name__ for optim in optimizers] == (['Muon', 'AdamW'] if kind == 'muon' else ['AdamW'])
    assert [optim.param_groups[0]['lr'] for optim in optimizers] == ([1e-2, 1e-3] if kind == 'muon' else [1e-3])

# -----------------------------------------------------------------------------
# data


def test_rows_of_a_stream():
    ids = np.arange(100, dtype=np.uint16)
    rows = random_rows(ids, 3000, 8, seeded())
    assert rows.shape == (3000, 8) and rows.dtype == torch.long
    assert torch.equal(rows, rows[:, :1] + torch.arange(8)) and set(rows[:, 0].tolist()) == set(range(93))
    for num in (1, 2, 5, 12, 1000):
        rows = spread_rows(ids, num, 8)
        assert len(rows) == min(num, 12) and torch.equal(rows, rows[:, :1] + torch.arange(8)) and rows[0, 0] == 0
        if num >= 2:
            assert rows[-1, -1] == 99 and (rows[1:, 0] - rows[:-1, 0]).min() >= 8   # no token counts twice
    assert torch.equal(random_rows(ids, 2, 100, seeded()), torch.arange(100).expand(2, 100))


def test_rows_of_rows():
    ids = torch.arange(70).view(10, 7)
    assert set(random_rows(ids, 500, 7, seeded())[:, 0].tolist()) == set(range(0, 70, 7))
    for num, expected in ((3, [0, 4, 9]), (10, list(range(10))), (99, list(range(10))), (1, [0])):
        assert spread_rows(ids, num, 7)[:, 0].tolist() == [7 * i for i in expected]
    assert torch.equal(random_rows(ids, 5, 7, seeded(3)), random_rows(ids, 5, 7, seeded(3)))


def write_dataset(folder, fmt='rows', rows=64, width=8, period=4, **meta):
    """A small dataset with a prepare.py that fails, under folder/data/small: ids that count up, modulo period."""
    spec = importlib.util.spec_from_file_location('data_common', os.path.join(ROOT, 'data', 'common.py'))
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    out = folder / 'data' / 'small'
    ids = (np.arange(width) + np.arange(rows)[:, None]) % period
    common.write_dataset(out, ids, ids, {'name': 'small', 'format': fmt, 'block_size': width if fmt == 'rows' else None,
                                         'vocab_size': period, 'tokenizer': 'char', 'itos': [*'abcdefgh'[:period]],
                                         'bos': None, 'eos': None, 'pad': None, **meta})
    (out / 'prepare.py').write_text('raise SystemExit("no network")')
    return out


def test_load_data(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'HERE', str(tmp_path))
    out = write_dataset(tmp_path)
    meta, data = train.load_data('small')
    assert meta['vocab_size'] == 4 and data['train'].shape == (64, 8) and data['val'].dtype == torch.long
    assert data['train'][3].tolist() == [3, 0, 1, 2, 3, 0, 1, 2]
    write_dataset(tmp_path, fmt='stream')
    _, data = train.load_data('small')
    assert data['val'].shape == (512,) and data['val'].dtype == np.uint16 and data['val'][10] == 3

    def damaged(message):
        with pytest.raises(UserError, match=f'damaged.*{message}.*make it again: python data/small/prepare.py'):
            train.load_data('small')

    whole, text = (out / 'val.bin').read_bytes(), (out / 'meta.json').read_text()
    (out / 'val.bin').write_bytes(whole[:-2])
    damaged('val.bin has 511 tokens, meta.json says 512')
    (out / 'val.bin').write_bytes(whole[:-1])
    damaged('')
    (out / 'val.bin').unlink()
    damaged('')
    (out / 'val.bin').write_bytes(whole)
    (out / 'meta.json').write_text(text[:40])
    damaged('')
    (out / 'meta.json').write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != 'train_tokens'}))
    damaged('train_tokens')
    (out / 'meta.json').unlink()
    with pytest.raises(UserError, match='the dataset small is not there; make it with'):
        train.load_data('small')                                          # and it cannot be made
    with pytest.raises(UserError, match='no data/smal/prepare.py; did you mean small'):
        train.load_data('smal')
    with pytest.raises(UserError, match='known'):
        train.load_data('zzz')


def test_missing_dataset_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'HERE', str(tmp_path))
    out = write_dataset(tmp_path)
    hidden = tmp_path / 'hidden'
    shutil.move(out, hidden)
    out.mkdir()
    copying = f'import shutil; shutil.copytree({str(hidden)!r}, {str(out)!r}, dirs_exist_ok=True)'
    (out / 'prepare.py').write_text(copying)
    assert train.load_data('small')[0]['name'] == 'small'

# -----------------------------------------------------------------------------
# whole runs

TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--n_recur=1', '--batch_size=4', '--max_iters=6',
        '--eval_interval=3',
        '--eval_rows=16', '--eval_samples=2', '--log_interval=2', '--warmup_iters=1', '--device=cpu', '--dtype=float32']
MIXED = ['--training_type=joint', '--corruption=own:0.7,random:0.3', '--causal_ratio=0.5', '--dropout=0.1',
         '--ema_decay=0.99', '--optimizer=muon', '--proofreading_warmup_iters=4', '--masking_warmup_iters=3']
PLAIN = ['--training_type=unmasking', '--optimizer=adamw', '--ema_decay=0', '--gradient_accumulation_steps=2',
         '--weight_decay=0.1', '--lr_schedule=cosine', '--eval_samples=0']


def start(out_dir, *words, patch=None):
    """One run of train.py, in this process: the module. patch(module) is called before main."""
    module = load_script('train')
    configurator.configure(vars(module), [*TINY, f'--out_dir={out_dir}', *words])
    if patch:
        patch(module)
    module.main()
    return module


def newest(out_dir):
    path, = [os.path.join(out_dir, name) for name in os.listdir(out_dir) if not name[:-3].split('_')[-1].isdigit()]
    return path


def read(out_dir):
    return torch.load(newest(out_dir), weights_only=True)


def assert_same(a, b, where=''):
    """Two nested structures are equal, bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f'{where}.{i}')
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b or (a != a and b != b), where


def assert_same_run(a, b):
    a, b = read(a), read(b)
    assert set(a['rng']) >= {'rows', 'noise', 'torch'}
    for key in ('model', 'ema', 'optimizers', 'rng', 'iter_num', 'model_args', 'meta', 'result'):
        assert_same(a[key], b[key], key)


@pytest.mark.parametrize('words', [MIXED, PLAIN], ids=['mixed', 'plain'])
def test_resumed_runs_are_bit_identical(tmp_path, words):
    straight, resumed, stopped = [str(tmp_path / name) for name in ('straight', 'resumed', 'stopped')]
    start(straight, *words, '--keep_every=3')
    assert read(straight)['iter_num'] == 6 and len(os.listdir(straight)) == 3
    name = os.path.basename(newest(straight))
    half = os.path.join(straight, name[:-3] + '_3.pt')
    assert torch.load(half, weights_only=True)['iter_num'] == 3
    os.makedirs(resumed)
    shutil.copy(half, os.path.join(resumed, name))
    torch.manual_seed(12345)                                              # nothing of the old process is left
    start(resumed, *words, '--init_from=resume')
    assert_same_run(straight, resumed)

    def interrupt(module):
        calls, rows = [], module.random_rows
        after = 2 * module.gradient_accumulation_steps

        def random_rows(*args):
            calls.append(args)
            if len(calls) == after:
                os.kill(os.getpid(), signal.SIGTERM)
            return rows(*args)
        module.random_rows = random_rows

    start(stopped, *words, patch=interrupt)                               # the step is finished, then saved
    assert read(stopped)['iter_num'] == 2
    torch.manual_seed(54321)
    start(stopped, *words, '--init_from=resume')
    assert_same_run(straight, stopped)


def test_same_command_same_weights_and_other_seed_others(tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        torch.manual_seed(len(name) + seed * 77)
        start(str(tmp_path / name), *MIXED, f'--seed={seed}', '--eval_samples=0')
    assert_same_run(str(tmp_path / 'a'), str(tmp_path / 'b'))
    a, c = (read(str(tmp_path / name))['model'] for name in 'ac')
    assert not torch.equal(a['blocks.0.fc.weight'], c['blocks.0.fc.weight'])


@pytest.mark.parametrize('words, name', [
    (['--training_type=unmasking'], 'ckpt_unmasking.pt'),
    (['--training_type=causal'], 'ckpt_causal.pt'),
    (['--training_type=joint', '--remask_target=original', '--remasking_loss_type=corrupted_only'],
     'ckpt_joint_corrupted_only.pt'),
    (['--training_type=remasking', '--corruption=random'], 'ckpt_remasking_all_positions.pt'),
    (['--training_type=remasking', '--corruption=random', '--remask_target=original', '--causal_ratio=0.5',
      '--remasking_loss_type=corrupted_only'], 'ckpt_remasking_corrupted_only.pt'),
    (['--training_type=unmasking', '--causal_ratio=1', '--reward_correct_unmask=0.2', '--grad_clip=0'],
     'ckpt_unmasking.pt'),
])
def test_every_kind_of_run(tmp_path, words, name):
    start(str(tmp_path), *words, '--max_iters=2', '--eval_interval=1')
    assert os.listdir(tmp_path) == [name]
    model, checkpoint = load_checkpoint(str(tmp_path / name))
    assert checkpoint['iter_num'] == 2 and checkpoint['meta']['name'] == 'arithmetic'
    assert all(math.isfinite(value) for value in checkpoint['result'].values())
    assert set(checkpoint['config']) == set(configurator.settings(train.__file__))
    fresh = GPT(GPTConfig(**checkpoint['model_args']))
    assert model.wte.weight.shape == fresh.wte.weight.shape


def test_averaged_weights(tmp_path):
    start(str(tmp_path), '--training_type=unmasking', '--max_iters=1', '--ema_decay=0.99', '--eval_samples=0',
          '--seed=4')
    checkpoint = read(str(tmp_path))
    torch.manual_seed(4)
    before = GPT(GPTConfig(**checkpoint['model_args'])).state_dict()
    for name, now in checkpoint['model'].items():                    # a young average forgets its start: 1/10, not 0.99
        assert torch.allclose(checkpoint['ema'][name], 0.1 * before[name] + 0.9 * now, atol=1e-6), name
    assert not torch.equal(before['wte.weight'], checkpoint['model']['wte.weight'])


def test_rates_and_clipping_reach_the_optimisers(tmp_path, monkeypatch):
    def changed(*words, patch=None):
        start(str(tmp_path / 'out'), '--training_type=unmasking', '--ema_decay=0', '--max_iters=3', '--eval_samples=0',
              '--eval_rows=2', *words, patch=patch)
        now = read(str(tmp_path / 'out'))
        torch.manual_seed(now['config']['seed'])
        before = GPT(GPTConfig(**now['model_args'])).state_dict()
        return {name.split('.')[0] for name in before if not torch.equal(before[name], now['model'][name])}

    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda p, norm: norms.append((norm, clip(p, norm))))
    assert changed('--grad_clip=0.5') == {'wte', 'blocks'}
    assert [norm for norm, _ in norms] == [0.5] * 3 and all(total > 0 for _, total in norms)
    assert changed('--muon_lr=0', '--grad_clip=0') == {'wte'} and len(norms) == 3
    assert changed('--learning_rate=0') == {'blocks'}
    assert changed('--learning_rate=0', '--optimizer=adamw') == set()
    steps = []

    def silent(step, *schedule):
        steps.append((step, *schedule))
        return 0.0
    assert changed('--warmup_iters=7', patch=lambda module: setattr(module, 'lr_scale', silent)) == set()
    assert steps == [(step, 'wsd', 3, 7, 0.4) for step in range(3)]


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_training_learns(tmp_path, optimizer):
    """Rows that count up from anywhere, modulo 4: one token tells all the others, so 8 tokens are worth log 4 nats."""
    write_dataset(tmp_path)
    start(str(tmp_path / 'out'), '--dataset=small', '--block_size=8', '--training_type=joint', '--causal_ratio=0.3',
          '--batch_size=32', '--max_iters=120', '--eval_interval=120', '--eval_rows=64', '--eval_samples=0',
          '--learning_rate=0.01', f'--optimizer={optimizer}', '--proofreading_warmup_iters=20',
          '--masking_warmup_iters=20',
          '--n_recur=2', '--n_embd=32', '--ema_decay=0.9', patch=lambda module: setattr(module, 'HERE', str(tmp_path)))
    result = read(str(tmp_path / 'out'))['result']
    best = math.log(4) / 8                                                # 0.173 nats a token
    assert best - 4 * result['nelbo_se'] < result['nelbo'] < 0.6          # of 1.386 for guessing
    assert best - 1e-3 < result['causal'] < 0.25
    assert result['auc'] > 0.75


def test_init_from_takes_the_averaged_weights_and_starts_anew(tmp_path):
    start(str(tmp_path / 'a'), *MIXED, '--eval_samples=0')
    source = newest(str(tmp_path / 'a'))
    before = open(source, 'rb').read()
    start(str(tmp_path / 'b'), '--training_type=unmasking', f'--init_from={source}', '--learning_rate=0', '--muon_lr=0',
          '--eval_samples=0', '--max_iters=1')
    checkpoint = read(str(tmp_path / 'b'))
    assert_same(dict(checkpoint['model']), dict(torch.load(source, weights_only=True)['ema']))
    assert checkpoint['iter_num'] == 1 and open(source, 'rb').read() == before


def test_eval_only_saves_nothing(tmp_path, capsys):
    start(str(tmp_path / 'a'), *MIXED)
    source = newest(str(tmp_path / 'a'))
    before = open(source, 'rb').read()
    capsys.readouterr()
    start(str(tmp_path / 'a'), *MIXED, '--init_from=resume', '--eval_only')
    out = capsys.readouterr().out
    result = torch.load(source, weights_only=True)['result']
    assert f"step 6  validation: NELBO {result['nelbo']:.3f}" in out and 'saved' not in out
    assert open(source, 'rb').read() == before and len(os.listdir(tmp_path / 'a')) == 1


def test_a_loss_that_is_not_finite_keeps_the_old_checkpoint(tmp_path):
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    before = open(newest(str(tmp_path)), 'rb').read()
    for words in (['--learning_rate=1e39', '--log_interval=1000'], ['--learning_rate=1e39', '--log_interval=1']):
        with pytest.raises(UserError, match='the unmask loss is no longer finite at step [0-9]+.*--learning_rate.*'
                                            f'last good checkpoint is {newest(str(tmp_path))}'):
            start(str(tmp_path), *PLAIN, '--init_from=resume', '--max_iters=40', '--eval_interval=1000', *words)
        assert open(newest(str(tmp_path)), 'rb').read() == before and len(os.listdir(tmp_path)) == 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    before = open(newest(str(tmp_path)), 'rb').read()
    with pytest.raises(UserError, match='finite'):
        start(str(tmp_path), *PLAIN, '--init_from=resume', '--max_iters=3', '--learning_rate=1e39')
    assert open(newest(str(tmp_path)), 'rb').read() == before


def test_an_untrained_network_is_not_saved(tmp_path):
    """The evaluation before the first step must not put a network that knows nothing over one that does."""
    def stop(module):
        def failing(*args):
            raise KeyboardInterrupt
        module.random_rows = failing

    with pytest.raises(KeyboardInterrupt):
        start(str(tmp_path), *PLAIN, '--keep_every=1', patch=stop)
    assert os.listdir(tmp_path) == []


def test_interrupted_save_of_a_run_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    before = open(newest(str(tmp_path)), 'rb').read()

    def full(checkpoint, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError):
        start(str(tmp_path), *PLAIN, '--init_from=resume', '--max_iters=3')
    assert open(newest(str(tmp_path)), 'rb').read() == before and len(os.listdir(tmp_path)) == 1


def test_lines_on_screen(capsys, tmp_path):
    start(str(tmp_path), *MIXED, '--eval_samples=0')
    out = capsys.readouterr().out
    assert 'step 2/6  causal ' in out and 'unmask ' in out and 'it/s' in out
    assert 'step 2/6' in out and 'proofreading 50%  masking penalty 67%' in out
    assert 'step 4/6' in out and 'proofreading 100%  masking penalty 100%' in out
    assert 'step 0  validation: NELBO' in out and 'causal NLL' in out and 'AUC' in out
    assert out.count('validation:') == 3 and f'saved {tmp_path}' in out
    line = train.progress_line(5, default_config(training_type='unmasking'),
                               {'unmask': [3.0, 2.0], 'none': [0.0, 0.0]}, 10.0)
    assert line == 'step 5/2000  unmask 1.500  10.0 it/s  3:19 left'


def test_check_settings_table():
    meta = dict(ARITHMETIC, train_tokens=100, val_tokens=100)
    train.check_settings(default_config(), meta)
    stream = dict(meta, format='stream', block_size=None)
    train.check_settings(default_config(block_size=99), stream)
    for changes, message in ((dict(training_type='denoise'), "training_type expects one of .*got 'denoise'"),
                             (dict(optimizer='sgd'), 'optimizer expects'),
                             (dict(lr_schedule='linear'), 'lr_schedule expects'),
                             (dict(remask_target='x'), 'remask_target expects'),
                             (dict(remasking_loss_type='x'), 'remasking_loss_type expects'),
                             (dict(batch_size=0), 'batch_size must be at least 1'),
                             (dict(max_iters=0), 'max_iters must be at least 1'),
                             (dict(eval_interval=0), 'eval_interval must be'),
                             (dict(log_interval=0), 'log_interval must be'),
                             (dict(gradient_accumulation_steps=0), 'gradient_accumulation_steps must'),
                             (dict(causal_ratio=1.5), 'causal_ratio must be in 0..1'),
                             (dict(remask_ratio=-0.1), 'remask_ratio must be in 0..1'),
                             (dict(reward_correct_unmask=2.0), 'reward_correct_unmask'),
                             (dict(ema_decay=1.1), 'ema_decay'), (dict(decay_share=-1.0), 'decay_share'),
                             (dict(training_type='remasking'), 'no guesses of its own'),
                             (dict(block_size=32), 'set --block_size=64')):
        with pytest.raises(UserError, match=message):
            train.check_settings(default_config(**changes), meta)
    with pytest.raises(UserError, match='block_size=100 is longer than a split'):
        train.check_settings(default_config(block_size=100), stream)


def test_negative_settings():
    meta = dict(ARITHMETIC, train_tokens=100, val_tokens=100)
    for name in ('learning_rate', 'muon_lr', 'weight_decay', 'penalty_mask_correct', 'weight_unmask_task', 'grad_clip',
                 'weight_remask_task', 'warmup_iters', 'proofreading_warmup_iters', 'masking_warmup_iters',
                 'eval_samples',
                 'keep_every'):
        with pytest.raises(UserError, match=name):
            train.check_settings(default_config(**{name: type(default_config()[name])(-1)}), meta)
