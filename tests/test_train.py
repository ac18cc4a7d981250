"""
Training: what the loss, its controller and the evaluation are, and that a run can go on where it was stopped.
"""

import datetime
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARITHMETIC, ROOT, START_WORDS, default_config, load_script, tiny_gpt
from test_corruption import MASK, WRONG, T, V, clean_rows, corrupted, seeded

import configurator
import train
from configurator import UserError
from corruption import Task, ask, own_guesses
from data import loader
from data.loader import load_data, random_rows, spread_rows
from model import GPT, GPTConfig
from parts.abstain import steer
from parts.layers import told
from parts.speculate import draft_loss
from plumbing import distributed
from plumbing import run as run_module
from plumbing.checkpoint import checkpoint_name
from plumbing.checks import check_fits
from plumbing.evaluate import nelbo
from plumbing.log import PARTS, draw_curves, start_log
from plumbing.optim import lr_scale, make_optimizers, ramp
from plumbing.pack import extent
from train import loss, training_step

# -----------------------------------------------------------------------------
# the loss


def dense_loss(model, input, target, weight, causal, r, price=None):
    """The loss over all positions, with the whole vocabulary and logarithms written out."""
    logits = model.logits(model(input, causal=causal)).double()
    masked = (input == MASK) | causal
    first = V if price is None or causal else V + 1
    logits[..., first:] = torch.where(masked[..., None], float('-inf'), logits[..., first:])
    law = logits.softmax(-1)
    p = law.gather(2, target[..., None])[..., 0]
    if price is not None and not causal:
        p = torch.where(masked, p + price * law[..., MASK], p)
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
    return (
        x0,
        *corrupted(
            x0, free, 'joint', seed, **{'weight_remask_task': 0.5, 'penalty_mask_correct': 0.6, **more}),
    )


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
        assert parts[name].tolist() == pytest.approx(
            [(scaled * ce)[which].sum().item(), scaled[which].sum().item()], rel=1e-4)


@pytest.mark.parametrize('price', [0.0, 0.05, 0.6])
def test_abstaining_loss_and_gradients_equal_the_dense_computation(price):
    """
    -log(p(x0) + price p(MASK)) at masked positions, with the bias inside the softmax; elsewhere nothing
    changes.
    """
    model, x0 = tiny_gpt(V, T), None
    model.mask_logit_bias.fill_(0.7)
    x0, input, target, weight = joint_batch()
    total, parts = loss(model, input, target, weight, keep_mask_price=price)
    total.backward()
    sparse = gradients(model)
    expected, _, ce = dense_loss(model, input, target, weight, False, 1.0, price)
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(sparse, gradients(model))
    masked = input == MASK
    assert set(parts) == {'unmask', 'detect', 'keep', 'p(MASK)'}
    assert parts['unmask'].tolist() == pytest.approx(
        [(weight * ce)[masked].sum().item(), weight[masked].sum().item()], rel=1e-4)
    plain, others = loss(model, input, target, weight)
    assert abs(plain - total) > 0.01 and all(
        torch.equal(parts[name], others[name]) for name in ('detect', 'keep'))
    causal, parts = loss(model, x0, x0, weight, causal=True, keep_mask_price=price)
    assert torch.equal(causal, loss(model, x0, x0, weight, causal=True)[0]) and set(parts) == {'causal'}


@pytest.mark.parametrize(
    'how', [{}, dict(causal=True), dict(keep_mask_price=0.3), dict(reward_correct_unmask=0.2)], ids=str)
def test_a_large_vocabulary_in_pieces_costs_the_same(monkeypatch, how):
    """
    The loss, its parts and all gradients; never more logits at a time than asked for, if a single row has
    fewer.
    """
    model, drawn, found = tiny_gpt(V, T), [], []
    _, input, target, weight = joint_batch()
    logits = model.logits
    monkeypatch.setattr(model, 'logits', lambda *args: drawn.append(logits(*args)) or drawn[-1])
    for most in (10 ** 6, 10 * len(model.wte.weight), 1):
        model.most_logits = most
        total, parts = loss(model, input, target, weight, **how)
        (total / 3).backward()
        found.append(
            (
                total.item(), {name: part.tolist() for name, part in parts.items()}, gradients(model),
                len(drawn))
        )
        assert most > 10 ** 5 or max(map(len, drawn)) == max(1, most // len(model.wte.weight))
        drawn.clear()
    (total, parts, grads, calls), *others = found
    assert calls == 1
    for other in others:
        assert other[0] == pytest.approx(total, rel=1e-5) and other[3] > 10
        assert {name: pytest.approx(part, rel=1e-4) for name, part in parts.items()} == other[1]
        assert_close(grads, other[2])
    with torch.no_grad():                                                 # and where nothing is to be learned
        assert loss(model, input, target, weight, **how)[0].item() == pytest.approx(total, rel=1e-5)


def test_the_draft_head_learns_the_same_in_pieces():
    model, found = tiny_gpt(V, T, draft_head=True), []
    x0, *_ = joint_batch()
    for most in (10 ** 6, 10 * len(model.wte.weight)):
        model.most_logits = most
        hidden = model(x0, causal=True)
        mean, parts = draft_loss(model, hidden, x0, torch.ones(x0.shape))
        (mean / 3).backward()
        found.append(
            (mean.item(), parts['draft'].tolist(), {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad()
    (mean, part, grads), (other, same, pieces) = found
    assert other == pytest.approx(mean, rel=1e-5) and same == pytest.approx(part, rel=1e-5)
    for name, grad in grads.items():                                      # nothing but the head learns
        assert (grad is None) == (pieces[name] is None) == (not name.startswith('drafter.')), name
        assert grad is None or torch.allclose(grad, pieces[name], rtol=1e-3, atol=1e-6)


def test_unsure_is_cheaper_than_wrong_and_dearer_than_right():
    model, input, target = tiny_gpt(V, T), torch.full((1, T), MASK), torch.zeros(1, T, dtype=torch.long)
    with torch.no_grad():
        model.mask_logit_bias.fill_(200.0)                                # it always abstains
    for price in (0.05, 0.9):
        assert loss(model, input, target, torch.full((1, T), 1 / T), keep_mask_price=price)[
            0].item() == pytest.approx(-math.log(price), rel=1e-4)


@pytest.mark.parametrize('pad_id', [None, 2])
def test_abstentions_are_counted_at_masked_tokens_that_are_not_padding(pad_id):
    model = tiny_gpt(V, T)
    model.mask_logit_bias.fill_(1.5)
    x0, input, target, weight = joint_batch()
    _, parts = loss(model, input, target, weight, keep_mask_price=0.3, pad_id=pad_id)
    counted = (input == MASK) & (x0 != (-1 if pad_id is None else pad_id))
    logits = F.linear(model(input), model.wte.weight)[..., :V + 1]
    logits[..., V] += 1.5
    total = logits.softmax(-1)[..., V][counted].sum().item()
    assert parts['p(MASK)'].tolist() == pytest.approx([total, counted.sum().item()], rel=1e-4)
    assert not parts['p(MASK)'].requires_grad and 0 < counted.sum() < (input == MASK).sum() + (pad_id is None)


class OnePosition(torch.nn.Module):
    """
    In the place of a network: the same free logits of V tokens and [MASK] at every position, the bias added.
    """
    mask_token_id, most_logits = V, 2 ** 23

    def __init__(self, bias):
        super().__init__()
        self.wte = torch.nn.Embedding(1, 1)
        self.free, self.bias = torch.nn.Parameter(torch.zeros(V + 2)), bias

    def forward(self, idx, causal=False, only=None):
        return torch.zeros(*(idx if only is None else only).shape, 1)

    def logits(self, hidden, *how):
        return self.free + self.bias * F.one_hot(torch.tensor(V), V + 2) + hidden


@pytest.mark.parametrize('price, support', [(0.1, 6), (0.2, 3), (0.4, 1)])
def test_the_best_answer_of_an_abstaining_network(price, support):
    """
    Where x0 has the law pi the loss is least at p_i = pi_i - price * m on S = {pi_i > price * m}, 0
    elsewhere, with p(MASK) m = (1 - pi(S)) / (1 - price |S|): it depends on the price alone, so the optimiser
    undoes any bias.
    """
    pi = torch.tensor([0.45, 0.25, 0.15, 0.07, 0.05, 0.03])
    p, m = pi, 0.0
    if support < V:
        m = ((1 - pi[:support].sum()) / (1 - price * support)).item()
        assert pi[support - 1] > price * m > pi[support]
        p = torch.where(torch.arange(V) < support, pi - price * m, 0.0)
    for bias in (0.0, 4.0):
        model = OnePosition(bias)
        optim = torch.optim.LBFGS(
            model.parameters(), max_iter=100, tolerance_change=1e-9, line_search_fn='strong_wolfe')

        def ask():
            return loss(
                model, torch.full((1, V), MASK), torch.arange(V)[None], pi[None], keep_mask_price=price)

        def descend():
            optim.zero_grad()
            total, _ = ask()
            total.backward()
            return total
        optim.step(descend)
        learned, parts = model.logits(torch.zeros(1, 1))[0, :V + 1].softmax(-1), ask()[1]
        assert torch.allclose(learned, torch.cat((p, torch.tensor([m]))), atol=0.01)
        assert (parts['p(MASK)'][0] / parts['p(MASK)'][1]).item() == pytest.approx(m, abs=0.01)


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
        # [MASK] becomes the likeliest answer everywhere
        model.mask_logit_bias.fill_(10.0)
    _, after = loss(model, input, target, weight)
    assert torch.equal(parts['unmask'], after['unmask'])
    assert after['keep'][0] > parts['keep'][0] + 1 and after['detect'][0] > parts['detect'][0] + 1
    full, causal = loss(model, x0, x0, weight, causal=True)
    with torch.no_grad():
        model.mask_logit_bias.fill_(0.0)
    assert torch.equal(loss(model, x0, x0, weight, causal=True)[0], full)


def test_reward_formula():
    """
    One masked position: r = 1 is plain cross-entropy, r = 0 weighs it 1 - p, and a certain answer still costs
    r.
    """
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
    # where the network may abstain, that is no knowledge: p is p(x0) alone, price * p(MASK) makes only the
    # loss smaller
    model.mask_logit_bias.fill_(3.0)
    p, keep = model.logits(model(input)[0, 4])[:V + 1].softmax(-1)[[0, V]].tolist()
    total, parts = loss(model, input, target, weight, reward_correct_unmask=0.25, keep_mask_price=0.6)
    assert keep > 0.3 and parts['unmask'][1].item() == pytest.approx(2 * (0.25 + 0.75 * (1 - p)), rel=1e-4)
    assert total.item() == pytest.approx(2 * (0.25 + 0.75 * (1 - p)) * -math.log(p + 0.6 * keep), rel=1e-4)


@torch.no_grad()
def test_the_unmasking_loss_is_the_nelbo_a_position():
    model, n = tiny_gpt(3, 4), 4
    row = torch.tensor([[0, 2, 1, 1]])
    x0 = row.expand(2000, 4)
    free = torch.ones_like(x0).bool()
    bounds, losses = [], []
    for seed in range(12):
        bounds.append(nelbo(model, x0, free, seeded(seed)).mean() / n)
        batch = ask(x0, free, free, Task(training_type='unmasking'), (3, 4, None), seeded(99 + seed))
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
@pytest.mark.parametrize('views', [0, 2])
@pytest.mark.parametrize('training_type, ratio', [('causal', 0.0), ('unmasking', 0.0), ('joint', 0.5),
                                                  ('unmasking', 1.0)])
def test_training_step(training_type, ratio, views, accumulate):
    """
    Its gradient is that of the mean over the rows: a row's own loss, or the causal rows' mean loss a real
    token. It packs the rows, which must not matter: here every row is on its own, as long as extent says, the
    causal ones whole.
    """
    model, x0, passes = tiny_gpt(18, 64, n_recur=1), arithmetic_rows(8), []
    config = default_config(
        training_type=training_type, causal_ratio=ratio, gradient_accumulation_steps=accumulate, views=views,
        proofreading_warmup_iters=10, masking_warmup_iters=20, weight_remask_task=0.5)
    hook = model.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    parts = training_step(model, x0, ARITHMETIC, config, 5, seeded(1))
    hook.remove()
    grads = gradients(model)
    num_causal = 8 if training_type == 'causal' else int(8 * ratio)
    total = torch.zeros(())
    if num_causal:
        rows = x0[:num_causal]
        logits = model.logits(model(rows, causal=True), real_only=True)
        ce = F.cross_entropy(logits.transpose(1, 2), rows, reduction='none')
        total = total + num_causal * ce[(rows != 15) & (rows != 17)].mean()
        assert parts['causal'][1].item() == pytest.approx(num_causal, rel=1e-5)
        assert passes[0] < num_causal                                     # it did pack them
    bidirectional = training_type != 'causal' and (views or num_causal < 8)
    if bidirectional:
        rows, generator = x0.repeat(views, 1) if views else x0[num_causal:], seeded(1)
        task = Task(training_type, remask_ratio=0.25, penalty_mask_correct=0.25, weight_remask_task=0.5,
                    full_ratio=config['full_ratio'])
        batch = ask(rows, rows != 15, (rows != 15) & (rows != 17), task, (18, 19, 17), generator,
                    own_guesses(model, generator))
        for row, n in enumerate(extent(batch[0], batch[2], 17, generator)):
            total = total + loss(model, *[part[row:row + 1, :n] for part in batch])[0] / max(1, views)
    (total / 8 / accumulate).backward()
    assert_close(gradients(model), grads)
    assert set(parts) == ({'unmask', 'detect', 'keep'} if bidirectional else set()) | (
        {'causal'} if num_causal else set())


def test_more_views_leave_the_scale_of_the_gradient_as_it_is(monkeypatch):
    """
    Where every view is corrupted alike they teach what one of them does; with 0 the causal rows have no part
    in it.
    """
    model, x0, asked = tiny_gpt(18, 64, n_recur=1), arithmetic_rows(8), []

    def all_masked(x0, free, real, *task):
        asked.append(x0)
        return x0.masked_fill(free, 18), x0, free / free.sum(1, keepdim=True)
    monkeypatch.setattr(train, 'ask', all_masked)
    found = {}
    for ratio in (0.0, 0.5):
        for views in (0, 1, 3):
            training_step(
                model, x0, ARITHMETIC, default_config(causal_ratio=ratio, views=views), 5, seeded(1))
            found[ratio, views] = gradients(model)
            assert torch.equal(asked.pop(), x0.repeat(views, 1) if views else x0[int(8 * ratio):])
    for ratio, views in ((0.0, 0), (0.0, 3), (0.5, 3)):
        assert_close(found[ratio, views], found[ratio, 1])
    assert (found[0.5, 1]['wte.weight'] - found[0.5, 0]['wte.weight']).abs().max() > 1e-3


def test_rows_without_padding_are_not_packed():
    """In a stream the same step is one pass a mode over rows as they are."""
    model, x0, seen = tiny_gpt(3, 8, n_recur=1), torch.randint(3, (6, 8), generator=seeded()), []
    model.register_forward_hook(
        lambda module, args, more, out: seen.append((len(args[0]), more.get('segment'))), with_kwargs=True)
    config = default_config(training_type='unmasking', causal_ratio=0.5)
    training_step(model, x0, dict(ARITHMETIC, bos=None, pad=None), config, 5, seeded(1))
    assert seen == [(3, None), (3, None)]


@pytest.mark.parametrize('level', [0, 8])
def test_what_a_conditioned_network_is_shown_in_training(level):
    """
    Of every other row its likeliest tokens at the masks, from a first pass that is told the same level and no
    prediction.
    """
    model, asked = tiny_gpt(V, T, parts=f'previous,level:{level}' if level else 'previous'), []
    model.mask_logit_bias.fill_(50.0)
    x0, input, _, _ = joint_batch()
    segment, noise = (torch.arange(T) > 5).long().expand(24, T), torch.rand(24, T, generator=seeded())
    model.register_forward_hook(lambda module, args, more, out: asked.append((more, out)), with_kwargs=True)
    some = (torch.rand(24, T, generator=seeded()) < 0.5).flatten().nonzero()[:, 0]
    hidden = model(input, segment=segment, only=some, **told(model, input, segment, noise))
    (first, guess), (second, out) = asked
    assert (
        first.get('previous') is None and out is hidden and hidden.requires_grad and not guess.requires_grad)
    assert all(more['segment'] is segment and more['level'] is noise for more, _ in asked)
    shown = (input == MASK) & (torch.arange(24) % 2 == 0)[:, None]
    assert (
        torch.equal(first['only'], shown.flatten().nonzero()[:, 0]) and shown.any() and second['only'] is some
    )
    assert torch.equal(second['previous'][shown], F.linear(guess, model.wte.weight)[:, :V].argmax(-1))
    assert (second['previous'][~shown] == MASK).all()
    asked.clear()
    plain = tiny_gpt(V, T)
    assert torch.equal(
        plain(input, segment=segment, only=some, **told(plain, input, segment, noise)),
        plain(input, segment=segment, only=some))
    assert not asked


@pytest.mark.parametrize('kind', ['joint', 'denoising'])
def test_the_level_is_the_share_of_the_row_that_is_masked(monkeypatch, kind):
    """
    Of the whole row, as it is when the network samples, whatever else shares the row with it. Of wrong tokens
    the level says nothing: they are to be found, and nobody tells of them when the network repairs.
    """
    asked, clean = [], arithmetic_rows(8)
    monkeypatch.setattr(train, 'told', lambda model, *args: asked.append(args) or {})
    monkeypatch.setattr(train, 'ask', lambda *args: asked.append(ask(*args)) or asked[-1])
    config = default_config(
        training_type=kind, corruption='random', remask_ratio=0.5, proofreading_warmup_iters=0,
        remask_target='wrong' if kind == 'joint' else 'original')
    for meta in (ARITHMETIC, dict(ARITHMETIC, pad=None)):
        asked.clear()
        training_step(tiny_gpt(18, 64, n_recur=1, parts='level:8'), clean, meta, config, 5, seeded(1))
        (input, target, _), (_, segment, level) = asked
        wrong = (input != clean) & (input != 18)
        share = (input == 18).sum(1) / 64
        assert (wrong.any(1) & (input == 18).any(1)).any()
        if segment is None:
            assert torch.equal(level, share[:, None].expand(8, 64))
        else:
            assert torch.allclose(level, torch.cat((torch.zeros(1), share))[segment])


def test_training_step_asks_for_what_the_settings_say(monkeypatch):
    """Every setting of the task reaches ask, loss, or the network that guesses."""
    asked, counted = [], []
    monkeypatch.setattr(train, 'ask', lambda *args: asked.append(args) or ask(*args))
    monkeypatch.setattr(train, 'loss', lambda *args, **more: counted.append(more) or loss(*args, **more))
    model, x0 = tiny_gpt(18, 64, n_recur=1), arithmetic_rows(8)
    config = default_config(
        training_type='denoising', remask_target='original', remask_ratio=0.8, sigma_min=0.2, sigma_max=0.7,
        noise_mix='mask:0.4,swap:0.6', corruption='sticky', weight_unmask_task=0.3, weight_remask_task=0.6,
        penalty_mask_correct=0.9, proofreading_warmup_iters=10, masking_warmup_iters=30,
        reward_correct_unmask=0.7, prefix_ratio=0.1, mask_weighting='token', full_ratio=0.4)
    for meta, pad in ((ARITHMETIC, 17), (dict(ARITHMETIC, pad=None), None)):
        training_step(model, x0, meta, config, 5, seeded(1), price=0.25)
        clean, free, real, task, tokens, *_ = asked[-1]
        assert torch.equal(clean, x0) and torch.equal(free, x0 != 15)
        assert torch.equal(real, (x0 != 15) & (x0 != pad) if pad else x0 != 15)
        assert task.penalty_mask_correct == pytest.approx(0.15) and tokens == (18, 19, pad)
        assert task == Task(
            'denoising', 3 / 8, (('sticky', 1.0),), 'all_positions', 'original', 0.3, 0.6,
            task.penalty_mask_correct, 'token', (0.2, 0.7), (('mask', 0.4), ('swap', 0.6)), 0.1,
            full_ratio=0.4)
        hidden, at = (counted[-1].pop(name) for name in ('hidden', 'at'))         # see conditioned
        assert hidden.requires_grad and len(hidden) == len(at)
        assert counted[-1] == dict(reward_correct_unmask=0.7, keep_mask_price=0.25, pad_id=pad)


class Stub:
    """
    In the place of a network: table (V + 1, V + 2), the logits that it answers by the id which stands at a
    position.
    """
    training = False

    most_logits, wte = 2 ** 23, torch.nn.Embedding(1, 1)

    def __init__(self, table):
        self.table, self.seen = table, []
        self.mask_token_id, self.wrong_token_id = table.size(1) - 2, table.size(1) - 1

    def parameters(self):
        yield torch.zeros(1)

    def eval(self):
        return self

    def train(self, mode):
        pass

    def __call__(self, idx, causal=False, only=None):
        self.seen.append(idx)
        return self.table[idx if only is None else idx.flatten()[only]]

    def logits(self, hidden, real_only=False):
        return hidden.masked_fill(
            (torch.arange(hidden.size(-1)) >= self.mask_token_id) & real_only, float('-inf'))


# -----------------------------------------------------------------------------
# the controller of abstention


CONTROL = dict(p_mask=None, bias=0.0, price=0.3)


class Plant:
    """
    What the controller sees of a network: the log-odds y of p(MASK) follow the bias at once, and then drift
    back, as the network learns, to what the price alone makes the best answer.
    """

    def __init__(self, best, tau=40):
        self.best, self.tau, self.y = best, tau, best(0.3)

    def run(self, control, steps, target=0.3, rate=0.2, limit=20.0):
        history = []
        for _ in range(steps):
            p = 1 / (1 + math.exp(-self.y))
            after = steer(control, torch.tensor([p * 50, 50.0]), target, rate, limit)
            self.y += (self.best(after['price']) - self.y) / self.tau + after['bias'] - control['bias']
            control = after
            history.append((p, control['bias'], control['price']))
        return control, np.array(history)


@pytest.mark.parametrize('slope, offset', [(1.0, -2.0), (0.5, 1.0), (2.0, 0.0)])
@pytest.mark.parametrize('target', [0.1, 0.3, 0.6])
def test_the_controller_holds_its_set_point(target, slope, offset):
    plant = Plant(lambda price: slope * math.log(price / (1 - price)) + offset)
    _, history = plant.run(CONTROL, 3000, target)
    p, bias, price = history.T
    assert abs(p[-2000:] - target).max() < 0.01
    assert np.ptp(bias[-500:]) < 0.01 and abs(bias).max() < 10 and abs(bias[-1]) < 6
    odds = (math.log(target / (1 - target)) - offset) / slope
    assert price[-1] == pytest.approx(1 / (1 + math.exp(-odds)), abs=0.01)


def test_without_a_price_the_bias_grows_without_end():
    """The trap: the optimiser undoes what the bias does, so that it grows at a constant rate, and in vain."""
    plant = Plant(lambda price: -3.0)
    control, history = plant.run(dict(CONTROL, price=0.0), 4000, limit=1e9)
    p, bias, price = history.T
    assert control['price'] == 0 and not price.any()
    assert np.ptp(np.diff(bias)[-3000:]) < 1e-6 and bias[-1] - bias[-3001] > 50 and 0.1 < p[-1] < 0.2
    # what is left of the error moves it for ever
    assert np.diff(bias)[-1] == pytest.approx(0.2 * (0.3 - p[-1]), rel=1e-3)


@pytest.mark.parametrize(
    'control, limit',
    [(dict(CONTROL), 2.0), (dict(CONTROL, price=0.98), 1e3), (dict(CONTROL, price=0.0), 2.0)],
    ids=['bias', 'price', 'no price'])
@pytest.mark.parametrize('sign', [1, -1])
def test_at_its_limits_the_controller_waits_and_comes_back_at_once(control, limit, sign):
    """Wound up it would need as many steps to come back as it has waited."""
    stuck, free = (0.0, 1.0) if sign > 0 else (1.0, 0.0)
    if control['price'] > 0.5 and sign < 0:
        control = dict(control, price=0.02)

    def step(control, p):
        return steer(control, torch.tensor([p * 9, 9.0]), 0.5, 0.2, limit)

    for _ in range(1000):
        before, control = control, step(control, stuck)
    assert (control['bias'], control['price']) == (before['bias'], before['price'])   # both wait
    assert abs(control['bias']) <= limit and (control['price'] == 0 or 1e-6 <= control['price'] <= 1 - 1e-6)
    assert sign * control['bias'] > 1.8
    after = step(control, free)
    assert sign * (control['bias'] - after['bias']) > 0.1
    beyond = dict(CONTROL, bias=sign * (limit + 1))                        # of a run with a higher limit
    assert abs(step(beyond, free)['bias']) < limit + 1 and step(beyond, stuck)['bias'] == beyond['bias']
    if control['price']:
        assert sign * (math.log(control['price'] / after['price'])
                       - math.log((1 - control['price']) / (1 - after['price']))) > 0.1


def test_one_step_of_the_controller():
    first = steer(CONTROL, torch.tensor([2.0, 10.0]), 0.3, 0.5, 20.0)
    odds = 3 / 7 * math.exp(0.05)
    assert first == pytest.approx(dict(p_mask=0.2, bias=0.05, price=odds / (1 + odds)), rel=1e-5)
    second = steer(first, torch.tensor([6.0, 10.0]), 0.3, 0.5, 20.0)  # the average is 0.28 now
    assert second['p_mask'] == pytest.approx(0.28) and second['bias'] == pytest.approx(
        0.05 + 0.5 * (0.02 - 20 * 0.08))
    still = steer(first, torch.tensor([6.0, 10.0]), 0.3, 0.0, 20.0)
    assert (still['bias'], still['price']) == pytest.approx((first['bias'], first['price']), rel=1e-12)
    # a batch without a masked token says nothing
    for control in (CONTROL, first):
        assert steer(control, torch.zeros(2), 0.3, 0.5, 20.0) == control


def steer_on_a_rank(rank, path, parts, results):
    """One of two processes that steer together; what comes out goes to the file results."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=2,
                                         timeout=datetime.timedelta(seconds=60))
    try:
        control = CONTROL
        for part in parts:
            summed = distributed.sum_parts({'p(MASK)': torch.tensor(part[rank])}, PARTS)['p(MASK)']
            control = steer(control, summed, 0.3, 0.2, 20.0)
        torch.save(control, f'{results}.{rank}')
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason='no gloo')
def test_ranks_steer_together(tmp_path):
    """
    The ranks see different tokens, and different numbers of them; one process that saw all of them does the
    same.
    """
    parts = [
        ([1.0, 10.0], [6.0, 20.0]), ([0.0, 0.0], [0.0, 0.0]), ([3.0, 4.0], [0.0, 0.0]),
        ([2.0, 30.0], [20.0, 40.0])]
    words = (str(tmp_path / 'meet'), parts, str(tmp_path / 'control'))
    other = torch.multiprocessing.get_context('spawn').Process(target=steer_on_a_rank, args=(1, *words))
    other.start()
    steer_on_a_rank(0, *words)
    other.join(60)
    control = CONTROL
    for part in parts:
        control = steer(control, torch.tensor(part).sum(0), 0.3, 0.2, 20.0)
    for rank in range(2):
        assert torch.load(tmp_path / f'control.{rank}') == pytest.approx(control)


# -----------------------------------------------------------------------------
# schedules and names


def test_lr_scale():
    wsd = [lr_scale(step, 'wsd', 100, 9, 0.4) for step in range(101)]
    assert wsd[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert wsd[9:60] == [1.0] * 51 and wsd[60:] == pytest.approx(
        [(100 - step) / 40 for step in range(60, 101)])
    cosine = [lr_scale(step, 'cosine', 100, 0, 0.4) for step in range(101)]
    assert cosine[0] == 1 and cosine[50] == pytest.approx(0.5) and cosine[100] == pytest.approx(0)
    assert all(a > b for a, b in itertools.pairwise(cosine))
    assert lr_scale(0, 'cosine', 100, 9, 0.4) == pytest.approx(0.1)
    assert lr_scale(50, 'wsd', 100, 0, 0.0) == 1.0                        # no decay
    assert lr_scale(0, 'wsd', 1, 0, 0.4) == 1.0


def test_ramp():
    assert [ramp(step, 4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert ramp(0, 0) == 1


def test_checkpoint_names():
    assert checkpoint_name('unmasking', 'all_positions') == 'ckpt_unmasking.pt'
    assert checkpoint_name('causal', 'corrupted_only', 500) == 'ckpt_causal_500.pt'
    assert checkpoint_name('joint', 'all_positions') == 'ckpt_joint_all_positions.pt'
    assert checkpoint_name('remasking', 'corrupted_only', 20) == 'ckpt_remasking_corrupted_only_20.pt'


@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_every_parameter_is_optimised_once(kind):
    model = tiny_gpt(V, T, n_layer=2, parts='bigrams:8')
    optimizers = make_optimizers(model, kind, 1e-3, 1e-2, 0.1, (0.9, 0.95), 0.3)
    groups = [group for optim in optimizers for group in optim.param_groups]
    names = {p: name for name, p in model.named_parameters()}
    found = [names[p] for group in groups for p in group['params']]
    assert sorted(found) == sorted(names.values())
    for group in groups:
        for name in (names[p] for p in group['params']):
            decays = {'blocks': 0.1, 'parts': 0.3}
            assert group['weight_decay'] == decays.get(name.split('.')[0], 0)
    assert [type(optim).__name__ for optim in optimizers] == (
        ['Muon', 'AdamW'] if kind == 'muon' else ['AdamW'])
    assert [optim.param_groups[0]['lr'] for optim in optimizers] == (
        [1e-2, 1e-3] if kind == 'muon' else [1e-3])

# -----------------------------------------------------------------------------
# data


def test_rows_of_a_stream():
    ids = np.arange(100, dtype=np.uint16)
    rows = random_rows(ids, 3000, 8, seeded())
    assert rows.shape == (3000, 8) and rows.dtype == torch.long
    assert torch.equal(rows, rows[:, :1] + torch.arange(8)) and set(rows[:, 0].tolist()) == set(range(93))
    for num in (1, 2, 5, 12, 1000):
        rows = spread_rows(ids, num, 8)
        assert (
            len(rows) == min(num, 12) and torch.equal(rows, rows[:, :1] + torch.arange(8)) and rows[0, 0] == 0
        )
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
    """
    A small dataset with a prepare.py that fails, under folder/data/small: ids that count up, modulo period.
    """
    spec = importlib.util.spec_from_file_location('data_common', os.path.join(ROOT, 'data', 'common.py'))
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    out = folder / 'data' / 'small'
    ids = (np.arange(width) + np.arange(rows)[:, None]) % period
    common.write_dataset(
        out,
        ids,
        ids,
        {
            'name': 'small', 'format': fmt, 'block_size': width if fmt == 'rows' else None,
            'vocab_size': period, 'tokenizer': 'char', 'itos': [*'abcdefgh'[:period]], 'bos': None,
            'eos': None, 'pad': None, **meta},
    )
    (out / 'prepare.py').write_text('raise SystemExit("no network")')
    return out


def test_load_data(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, 'HERE', str(tmp_path / 'data'))
    out = write_dataset(tmp_path)
    meta, data = load_data('small')
    assert meta['vocab_size'] == 4 and data['train'].shape == (64, 8) and data['val'].dtype == torch.long
    assert data['train'][3].tolist() == [3, 0, 1, 2, 3, 0, 1, 2]
    write_dataset(tmp_path, fmt='stream')
    _, data = load_data('small')
    assert data['val'].shape == (512,) and data['val'].dtype == np.uint16 and data['val'][10] == 3

    def damaged(message):
        with pytest.raises(
            UserError, match=f'damaged.*{message}.*make it again: python data/small/prepare.py'):
            load_data('small')

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
    (out / 'meta.json').write_text(
        json.dumps({k: v for k, v in json.loads(text).items() if k != 'train_tokens'}))
    damaged('train_tokens')
    (out / 'meta.json').unlink()
    with pytest.raises(UserError, match='the dataset small is not there; make it with'):
        load_data('small')                                          # and it cannot be made
    with pytest.raises(UserError, match='no data/smal/prepare.py; did you mean small'):
        load_data('smal')
    with pytest.raises(UserError, match='known'):
        load_data('zzz')
    for path, hint in ((str(out), 'did you mean small'), ('data/small/', 'did you mean small'),
                       ('../words', r'ln -s .*/words data/')):
        with pytest.raises(UserError, match=f'the name of a folder in data/.*{hint}'):
            load_data(path)                                         # a checkpoint knows its dataset by name


def test_missing_dataset_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, 'HERE', str(tmp_path / 'data'))
    out = write_dataset(tmp_path)
    hidden = tmp_path / 'hidden'
    shutil.move(out, hidden)
    out.mkdir()
    copying = f'import shutil; shutil.copytree({str(hidden)!r}, {str(out)!r}, dirs_exist_ok=True)'
    (out / 'prepare.py').write_text(copying)
    assert load_data('small')[0]['name'] == 'small'

# -----------------------------------------------------------------------------
# whole runs

TINY = [
    '--n_layer=1', '--n_head=2', '--n_embd=16', '--n_recur=1', '--batch_size=4', '--max_iters=6',
    '--eval_interval=3', '--eval_rows=16', '--eval_samples=2', '--log_interval=2', '--warmup_iters=1',
    '--device=cpu', '--dtype=float32']
MIXED = [
    '--training_type=joint', '--corruption=own:0.7,random:0.3', '--causal_ratio=0.5', '--dropout=0.1',
    '--ema_decay=0.99', '--optimizer=muon', '--proofreading_warmup_iters=4', '--masking_warmup_iters=3',
    '--parts=bigrams:50', '--bigram_decay=0.5']
PLAIN = ['--training_type=unmasking', '--optimizer=adamw', '--ema_decay=0', '--gradient_accumulation_steps=2',
         '--weight_decay=0.1', '--lr_schedule=cosine', '--eval_samples=0']
GROWING = ['--causal_ratio=0.25', '--block_lengths=4,8', '--block_warmup_iters=5', '--parts=level:8',
           '--batch_size=8', '--eval_samples=0']
ABSTAIN = [
    '--training_type=joint', '--corruption=sticky:1,fragment:1', '--allow_abstain', '--target_mask_prob=0.4',
    '--mask_control_rate=3', '--penalty_keep_mask=0.3', '--mask_logit_bias=-0.5', '--eval_samples=0',
    '--log_interval=4']


def start(out_dir, *words, patch=None):
    """One run of train.py, in this process: the module. patch(module) is called before main."""
    module = load_script('train')
    configurator.configure(vars(module), [*START_WORDS, *TINY, f'--out_dir={out_dir}', *words])
    if patch:
        patch(module)
    module.main()
    return module


def newest(out_dir):
    path, = [os.path.join(out_dir, name) for name in os.listdir(out_dir)
             if name.endswith('.pt') and not re.search(r'_(\d+|best)\.pt$', name)]
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
    assert open(os.path.join(a, 'log.jsonl'), 'rb').read() == open(os.path.join(b, 'log.jsonl'), 'rb').read()
    a, b = read(a), read(b)
    assert set(a['rng']) >= {'rows', 'noise', 'torch', 'where'}
    for key in (
        'model', 'ema', 'optimizers', 'rng', 'iter_num', 'sums', 'control', 'model_args', 'meta', 'result'):
        assert_same(a[key], b[key], key)


@pytest.mark.parametrize('words', [MIXED, PLAIN, ABSTAIN, GROWING],
                         ids=['mixed', 'plain', 'abstain', 'growing'])
def test_resumed_runs_are_bit_identical(tmp_path, words):
    straight, resumed, stopped = [str(tmp_path / name) for name in ('straight', 'resumed', 'stopped')]
    start(straight, *words, '--keep_every=3')
    assert read(straight)['iter_num'] == 6 and len(os.listdir(straight)) == 4
    name = os.path.basename(newest(straight))
    half = os.path.join(straight, name[:-3] + '_3.pt')
    assert torch.load(half, weights_only=True)['iter_num'] == 3
    os.makedirs(resumed)
    shutil.copy(half, os.path.join(resumed, name))
    # with lines of steps that are not done yet
    shutil.copy(os.path.join(straight, 'log.jsonl'), resumed)
    torch.manual_seed(12345)                                              # nothing of the old process is left
    start(resumed, *words, '--init_from=resume')
    assert_same_run(straight, resumed)
    assert read(resumed)['config']['init_from'] == read(straight)['config']['init_from'] != 'resume'

    def interrupt(module):
        calls, rows = [], module.random_rows

        def random_rows(*args):
            calls.append(args)
            if len(calls) == after * module.gradient_accumulation_steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return rows(*args)
        module.random_rows = random_rows

    # between two evaluations, and where one is due
    for after in (2, 3):
        shutil.rmtree(stopped, ignore_errors=True)
        start(stopped, *words, patch=interrupt)                           # the step is finished, then saved
        assert read(stopped)['iter_num'] == after
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


@pytest.mark.parametrize(
    'words, name',
    [
        (['--training_type=unmasking'], 'ckpt_unmasking.pt'),
        (['--training_type=causal'], 'ckpt_causal.pt'),
        (
            ['--training_type=joint', '--remask_target=original', '--remasking_loss_type=corrupted_only'],
            'ckpt_joint_corrupted_only.pt'),
        (['--training_type=remasking', '--corruption=random'], 'ckpt_remasking_all_positions.pt'),
        (
            [
                '--training_type=remasking', '--corruption=random', '--remask_target=original',
                '--causal_ratio=0.5', '--remasking_loss_type=corrupted_only'],
            'ckpt_remasking_corrupted_only.pt',
        ),
        (
            [
                '--training_type=unmasking', '--causal_ratio=0.5', '--reward_correct_unmask=0.2',
                '--grad_clip=0'],
            'ckpt_unmasking.pt',
        ),
        (
            [
                '--training_type=denoising', '--remask_target=original', '--allow_abstain',
                '--proofreading_warmup_iters=0'],
            'ckpt_denoising.pt',
        ),
        (
            [
                '--training_type=joint', '--corruption=fragment:1,sticky:1', '--allow_abstain',
                '--penalty_keep_mask=0', '--target_mask_prob=0.2', '--proofreading_warmup_iters=0'],
            'ckpt_joint_all_positions.pt',
        ),
        (
            [
                '--training_type=joint', '--corruption=own:1,noise:1', '--views=2', '--causal_ratio=1',
                '--prefix_ratio=0.5', '--parts=level:8,previous', '--proofreading_warmup_iters=0',
                '--draft_head'],
            'ckpt_joint_all_positions.pt',
        ),
    ],
)
def test_every_kind_of_run(tmp_path, words, name):
    start(str(tmp_path), *words, '--max_iters=2', '--eval_interval=1')
    assert sorted(os.listdir(tmp_path)) == [name, 'log.jsonl']
    model, checkpoint = GPT.load(str(tmp_path / name))
    assert checkpoint['iter_num'] == 2 and checkpoint['meta']['name'] == 'arithmetic'
    assert all(math.isfinite(value) for value in checkpoint['result'].values())
    assert set(checkpoint['config']) == set(configurator.settings(train.__file__))
    fresh = GPT(GPTConfig(**checkpoint['model_args']))
    assert model.wte.weight.shape == fresh.wte.weight.shape
    asked = next((word for word in words if word.startswith('--parts=')), '')
    assert set(model.parts) == {part for part in ('level', 'previous') if part in asked}
    assert all(p.any() for p in model.parts.parameters())                 # it has learned


@pytest.mark.parametrize('fmt', ['rows', 'stream'])
def test_coarse_characters_become_one(tmp_path, monkeypatch, fmt):
    """In the rows that it learns from and in those that it is measured on; the others are what they were."""
    write_dataset(tmp_path, fmt)
    monkeypatch.setattr(loader, 'HERE', str(tmp_path / 'data'))

    def rows(*words):
        seen = []

        def watch(module):
            step, evaluate = module.training_step, module.evaluate
            module.training_step = lambda model, x0, *rest: seen.append(x0) or step(model, x0, *rest)
            module.evaluate = lambda model, x0, *rest, **more: (
                seen.append(x0) or evaluate(model, x0, *rest, **more))

        start(
            str(tmp_path / 'out'), '--dataset=small', '--block_size=8', '--training_type=causal',
            '--max_iters=1', '--eval_samples=0', '--overwrite=True', *words, patch=watch)
        return seen
    for coarse, first in (('db', [0, 3, 2, 3]), ('bcd', [0, 1, 1, 1]), ('a', [0, 1, 2, 3])):
        plain, changed = rows(), rows(f'--coarse={coarse}')
        assert len(plain) == 3 and all(torch.equal(torch.tensor(first)[a], b) for a, b in zip(plain, changed))
    with pytest.raises(UserError, match="'x'"):
        rows('--coarse=ax')


def test_the_loss_of_the_draft_head_by_hand():
    """
    From every modelled position the head is unrolled over the true tokens; the mean CE over all that it was
    asked for.
    """
    model = tiny_gpt(3, 6, draft_head=True)
    x0 = torch.tensor([[0, 1, 2, 1, 0, 2], [2, 2, 1, 0, 1, 1], [0, 0, 2, 1, 2, 0]])
    # start, text, padding
    weight = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]) * 0.3
    with torch.no_grad():
        hidden = model(x0, causal=True)
        for depth in (1, 2, 6, 9):
            ces = []
            for row in range(3):
                for at in range(6):
                    state, ahead = hidden[row, at][None], 1
                    while (
                        weight[row, at] > 0
                        and ahead <= depth
                        and at + ahead < 6
                        and weight[row, at + ahead] > 0
                    ):
                        state = model.drafter(state, model.wte.weight[x0[row, at + ahead - 1]][None])
                        logits = F.layer_norm(state, (16,)) @ model.wte.weight[:3].T
                        ces.append(F.cross_entropy(logits, x0[row, at + ahead][None]).item())
                        ahead += 1
            mean, parts = draft_loss(model, hidden, x0, weight, depth)
            assert len(ces) == {1: 4 + 1, 2: 4 + 3 + 1}.get(depth, 4 + 3 + 2 + 1 + 1)
            assert mean.item() == pytest.approx(sum(ces) / len(ces), rel=1e-5)
            assert set(parts) == {'draft'} and parts['draft'].tolist() == pytest.approx([mean.item(), 1.0])
        assert len({draft_loss(model, hidden, x0, weight, depth)[0].item() for depth in (1, 2, 4)}) == 3
        assert draft_loss(model, hidden, x0, weight)[0] == draft_loss(model, hidden, x0, weight, 6)[0]
        # packed texts are separate ones
        packed, two = (torch.cat((some[:1], some[1:2]), 1) for some in (x0, torch.ones(3, 6)))
        segment = torch.tensor([[0] * 6 + [1] * 6])
        states = torch.cat((hidden[:1], hidden[1:2]), 1)
        alone, _ = draft_loss(model, hidden[:2], x0[:2], two.view(2, 6))
        apart, one = (draft_loss(model, states, packed, two, segment=s)[0].item() for s in (segment, None))
        assert apart == pytest.approx(alone.item()) and one != pytest.approx(alone.item())
        # one token a row: nothing comes after it
        nothing, _ = draft_loss(model, hidden, x0, torch.eye(6)[:3])
        assert nothing == 0


def test_the_loss_of_the_draft_head_teaches_the_head_alone():
    model, x0 = tiny_gpt(18, 64, n_recur=1, draft_head=True), arithmetic_rows(4)
    mean, _ = draft_loss(model, model(x0, causal=True), x0, (x0 < 17).float())
    mean.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert grads == {'drafter.fc.weight', 'drafter.proj.weight'}


@pytest.mark.parametrize(
    'kind, ratio, drafts', [('joint', 0.5, True), ('causal', 0.0, True), ('joint', 0.0, False)])
def test_a_training_step_teaches_the_draft_head_beside_the_rest(kind, ratio, drafts):
    """
    The other gradients are those of the same step without it, bit by bit; a batch without causal rows has
    nothing for it.
    """
    config, found = default_config(training_type=kind, causal_ratio=ratio, gradient_accumulation_steps=2), {}
    x0, plain = arithmetic_rows(8), tiny_gpt(18, 64, n_recur=1)
    for head in (False, True):
        model = tiny_gpt(18, 64, n_recur=1, draft_head=head)
        model.load_state_dict(plain.state_dict(), strict=False)
        parts = training_step(model, x0, ARITHMETIC, config, 5, seeded(1))
        found[head] = gradients(model), parts
    (grads, parts), (more, others) = found[False], found[True]
    assert_same({name: grad for name, grad in more.items() if not name.startswith('drafter.')}, grads)
    assert ('draft' in others) == drafts == ('drafter.fc.weight' in more) and 'draft' not in parts
    assert all(torch.equal(others[name], parts[name]) for name in parts)
    if drafts:
        rows = x0[:8 if kind == 'causal' else 4]
        real = ((rows != 15) & (rows != 17)).float()
        # a mean, so no share of the rows
        (draft_loss(model, model(rows, causal=True), rows, real)[0] / 2).backward()
        for name, grad in gradients(model).items():
            assert torch.allclose(grad, more[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_a_draft_head_does_not_change_what_the_network_learns(tmp_path, optimizer, dropout):
    """
    The weights after a few steps of the same seed are the same, bit by bit, clipped gradients and averages
    included.
    """
    runs = {}
    for head in (False, True):
        start(
            str(tmp_path / str(head)), '--training_type=joint', '--causal_ratio=0.5', '--max_iters=3',
            '--eval_samples=0', '--eval_rows=2', f'--optimizer={optimizer}', f'--dropout={dropout}',
            '--grad_clip=0.05', '--ema_decay=0.9', '--learning_rate=0.01', f'--draft_head={head}')
        runs[head] = read(str(tmp_path / str(head)))
    for key in ('model', 'ema'):
        trunk = {name: tensor for name, tensor in runs[True][key].items() if not name.startswith('drafter.')}
        assert_same(dict(trunk), dict(runs[False][key]), key)
    assert runs[True]['model']['drafter.proj.weight'].any()                   # it has learned
    assert not torch.equal(runs[True]['model']['drafter.fc.weight'], runs[True]['ema']['drafter.fc.weight'])
    assert runs[True]['model_args']['draft_head'] and not runs[False]['model_args']['draft_head']


def test_a_draft_head_learns_what_comes_next(tmp_path, monkeypatch):
    """Its loss falls, and the log has it."""
    write_dataset(tmp_path)
    monkeypatch.setattr(loader, 'HERE', str(tmp_path / 'data'))
    start(
        str(tmp_path / 'out'), '--dataset=small', '--block_size=8', '--training_type=causal',
        '--batch_size=32', '--max_iters=30', '--eval_interval=30', '--eval_rows=8', '--eval_samples=0',
        '--log_interval=5', '--learning_rate=0.02', '--n_embd=32', '--draft_head=True')
    losses = [record['draft'] for record in log_of(str(tmp_path / 'out')) if 'draft' in record]
    assert len(losses) == 6 and losses[0] > 1 and losses[-1] < 0.6 * losses[0]


def test_averaged_weights(tmp_path):
    start(str(tmp_path), '--training_type=unmasking', '--max_iters=1', '--ema_decay=0.99', '--eval_samples=0',
          '--seed=4')
    checkpoint = read(str(tmp_path))
    torch.manual_seed(4)
    before = GPT(GPTConfig(**checkpoint['model_args'])).state_dict()
    # a young average forgets its start: 1/10, not 0.99
    for name, now in checkpoint['model'].items():
        assert torch.allclose(checkpoint['ema'][name], 0.1 * before[name] + 0.9 * now, atol=1e-6), name
    assert not torch.equal(before['wte.weight'], checkpoint['model']['wte.weight'])


def log_of(out_dir):
    with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def test_control_of_a_run(tmp_path):
    """
    The controller starts from the settings, sees each step's p(MASK), and its bias is in the model and in its
    average.
    """
    seen = []

    def watch(module):
        steer, loss = module.steer, module.loss
        module.steer = lambda control, part, *rest: (
            seen.append((control, part.tolist(), rest)) or steer(control, part, *rest))
        module.loss = lambda model, *args, **more: (
            seen.append((more.get('keep_mask_price'), float(model.mask_logit_bias)))
            or loss(model, *args, **more)
        )

    start(
        str(tmp_path), '--training_type=unmasking', '--allow_abstain', '--target_mask_prob=0.4',
        '--mask_control_rate=0.7', '--penalty_keep_mask=0.3', '--mask_logit_bias=-0.5', '--mask_bias_limit=9',
        '--max_iters=2', '--eval_samples=0', '--gradient_accumulation_steps=2', '--log_interval=1',
        patch=watch)
    checkpoint, log = read(str(tmp_path)), [line for line in log_of(tmp_path) if 'p(MASK)' in line]
    first, second = [line for line in seen if len(line) == 3]
    assert first[0] == dict(p_mask=None, bias=-0.5, price=0.3) and first[2] == (0.4, 0.7, 9.0)
    losses = [line for line in seen if len(line) == 2]
    now = [dict(p_mask=None, bias=-0.5, price=0.3)] * 2 + [second[0]] * 2  # of each of the four batches
    assert losses == [pytest.approx((control['price'], control['bias'])) for control in now]
    assert second[0] == steer(*first[:1], torch.tensor(first[1]), *first[2]) and second[0]['bias'] != -0.5
    last = steer(second[0], torch.tensor(second[1]), *second[2])
    assert checkpoint['control'] == last
    for line, (_, (total, count), _), control in zip(log, (first, second), (second[0], last)):
        assert line['p(MASK)'] == pytest.approx(total / count) and count > 0
        assert (line['mask_logit_bias'], line['penalty_keep_mask']) == (control['bias'], control['price'])
    assert checkpoint['model']['mask_logit_bias'].item() == pytest.approx(last['bias'])
    average = -0.5
    for decay, control in ((1 / 10, second[0]), (2 / 11, last)):          # a young average forgets its start
        average = decay * average + (1 - decay) * control['bias']
    assert checkpoint['ema']['mask_logit_bias'].item() == pytest.approx(average, rel=1e-5)
    assert float(GPT.load(newest(str(tmp_path)))[0].mask_logit_bias) == pytest.approx(
        average, rel=1e-5)


def test_without_a_target_nothing_is_steered(tmp_path):
    weights = []
    for words, bias in (
        ([], 0.0), (['--allow_abstain'], 0.0), (['--allow_abstain', '--mask_logit_bias=1.5'], 1.5)):
        start(
            str(tmp_path), *words, '--training_type=unmasking', '--penalty_keep_mask=0.3', '--max_iters=2',
            '--eval_samples=0')
        checkpoint, line = read(str(tmp_path)), log_of(tmp_path)[1]
        assert checkpoint['control'] == dict(p_mask=None, bias=bias, price=0.3)
        assert [float(checkpoint[net]['mask_logit_bias']) for net in ('model', 'ema')] == [bias, bias]
        assert ('p(MASK)' in line) == bool(words)
        assert not words or (line['mask_logit_bias'], line['penalty_keep_mask']) == (bias, 0.3)
        weights.append(checkpoint['model']['wte.weight'])
    # abstaining is another loss, the bias has its say
    assert not torch.equal(*weights[:2]) and not torch.equal(*weights[1:])


def test_log(tmp_path):
    """
    A line every log_interval steps and one for every evaluation, in order; losses are means since the last
    such line.
    """
    parts = []

    def watch(module):
        step = module.training_step
        module.training_step = lambda *args: parts.append(step(*args)) or parts[-1]

    start(str(tmp_path), *MIXED, '--eval_samples=3', '--log_interval=2', '--eval_interval=3', patch=watch)
    log = log_of(tmp_path)
    assert [line['step'] for line in log] == [0, 2, 3, 4, 6, 6]
    for line in log[1:2] + log[3:5]:
        assert set(line) - {'causal', 'unmask', 'detect', 'keep'} == {
            # nothing of an abstention that is off
            'step', 'remask_ratio', 'penalty_mask_correct', 'learning_rate'}
        done = parts[line['step'] - 2:line['step']]
        for name in ('causal', 'unmask', 'detect', 'keep'):
            total, weight = sum(part.get(name, torch.zeros(2)) for part in done).tolist()
            assert (name in line) == (weight > 0)
            if weight:
                assert line[name] == pytest.approx(total / weight, rel=1e-4)
        assert line['remask_ratio'] == 0.5 * min(1, line['step'] / 4)
        assert line['penalty_mask_correct'] == min(1, line['step'] / 3)
        assert line['learning_rate'] == pytest.approx(3e-3 * lr_scale(line['step'] - 1, 'wsd', 6, 1, 0.4))
    validation = {'step', 'nelbo', 'nelbo_se', 'causal_nll', 'causal_nll_se', 'auc', 'fixed', 'refilled',
                  'calibration', 'calibration_full'}
    for line in (log[0], log[2], log[5]):
        assert set(line) == validation | ({'valid', 'correct'} if line['step'] else set())
    assert {'step': 6, **read(str(tmp_path))['result']} == log[5]


def test_a_new_run_starts_a_new_log(tmp_path):
    words = ['--training_type=unmasking', '--max_iters=2', '--eval_samples=0']
    start(str(tmp_path), *words)
    first = (tmp_path / 'log.jsonl').read_text()
    start(str(tmp_path), *words)
    assert (tmp_path / 'log.jsonl').read_text() == first
    start(str(tmp_path), *words, '--max_iters=3', '--init_from=resume', '--eval_only')
    # nothing is trained, nothing is forgotten
    assert (tmp_path / 'log.jsonl').read_text() == first


def test_start_log(tmp_path):
    path = tmp_path / 'log.jsonl'
    lines = [json.dumps({'step': step}) + '\n' for step in (0, 5, 10, 10, 15)]
    for start, left in ((10, 4), (9, 2), (99, 5), (0, 0)):
        path.write_text(''.join(lines))
        start_log(str(path), start)
        assert path.read_text() == ''.join(lines[:left])
    assert (tmp_path / 'log_before.jsonl').read_text() == ''.join(lines)  # that of another run is not lost
    path.write_text(''.join(lines[:2]) + '{"step": 1')                     # the machine died while it wrote
    start_log(str(path), 10)
    assert path.read_text() == ''.join(lines[:2])
    path.unlink()
    # the log of an older version, or lost
    start_log(str(path), 10)
    assert path.read_text() == '' and 'log.jsonl' in os.listdir(tmp_path)


@pytest.mark.parametrize('interval, evaluated', [(5, [0]), (1, [0, 1])])
def test_a_stopped_run_is_saved_where_it_is(tmp_path, interval, evaluated):
    """It is evaluated only where an evaluation was due, so that the log of the resumed run lacks no line."""
    def interrupt(module):
        rows = module.random_rows
        module.random_rows = lambda *args: os.kill(os.getpid(), signal.SIGINT) or rows(*args)

    start(
        str(tmp_path), *PLAIN, f'--eval_interval={interval}', '--gradient_accumulation_steps=1',
        patch=interrupt)
    assert [line['step'] for line in log_of(tmp_path)] == evaluated
    checkpoint = read(str(tmp_path))
    assert (
        checkpoint['iter_num'] == 1
        and bool(checkpoint['result']) == (interval == 1)
        and checkpoint['sums']['unmask'][1] > 0
    )


def test_curves(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    with open(tmp_path / 'log.jsonl', 'w') as file:
        for record in (
            {'step': 0, 'nelbo': 2.0}, {'step': 2, 'unmask': 1.0, 'learning_rate': 0.5},
            {'step': 4, 'nelbo': 1.0}):
            file.write(json.dumps(record) + '\n')
    assert not draw_curves(str(tmp_path / 'log.jsonl'), str(tmp_path / 'curves.png'))
    assert os.listdir(tmp_path) == ['log.jsonl']
    monkeypatch.delitem(sys.modules, 'matplotlib.figure')                 # see tidy in conftest.py
    (tmp_path / 'empty.jsonl').write_text('{"step": 0}\n')
    assert not draw_curves(str(tmp_path / 'empty.jsonl'), str(tmp_path / 'curves.png'))
    (tmp_path / 'empty.jsonl').unlink()
    from matplotlib.axes import Axes
    drawn, plot = {}, Axes.plot
    monkeypatch.setattr(Axes, 'plot', lambda axes, x, y, label, **more: drawn.update(
        {label: (axes.get_title(), list(zip(x, y)))}) or plot(axes, x, y, label=label, **more))
    assert draw_curves(str(tmp_path / 'log.jsonl'), str(tmp_path / 'curves.png'))
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(os.listdir(tmp_path)) == ['curves.png', 'log.jsonl']
    assert drawn == {
        'unmask': ('nats, training', [(2, 1.0)]), 'nelbo': ('nats a token, validation', [(0, 2.0), (4, 1.0)]),
        'learning_rate': ('learning rate', [(2, 0.5)])}


def test_a_run_says_where_its_curves_are(tmp_path, capsys, monkeypatch):
    drawn = []

    def draw(log, path):
        drawn.append((log, path))
        return True
    for drawer, message in ((draw, 'log.jsonl, curves.png'),
                            (draw_curves, 'log.jsonl (pip install matplotlib for curves.png)')):
        monkeypatch.setattr(run_module, 'draw_curves', drawer)
        start(str(tmp_path), *PLAIN, '--max_iters=2', '--eval_interval=1')
        assert f'losses and validation: {tmp_path}/{message}\n' in capsys.readouterr().out
    assert drawn == [(f'{tmp_path}/log.jsonl', f'{tmp_path}/curves.png')] * 2


def test_rates_and_clipping_reach_the_optimisers(tmp_path, monkeypatch):
    def changed(*words, patch=None):
        start(
            str(tmp_path / 'out'), '--training_type=unmasking', '--ema_decay=0', '--max_iters=3',
            '--eval_samples=0', '--eval_rows=2', *words, patch=patch)
        now = read(str(tmp_path / 'out'))
        torch.manual_seed(now['config']['seed'])
        before = GPT(GPTConfig(**now['model_args'])).state_dict()
        return {name.split('.')[0] for name in before if not torch.equal(before[name], now['model'][name])}

    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, 'clip_grad_norm_', lambda p, norm: norms.append((norm, clip(p, norm))))
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
def test_training_learns(tmp_path, monkeypatch, optimizer):
    """
    Rows that count up from anywhere, modulo 4: one token tells all the others, so 8 tokens are worth log 4
    nats.
    """
    write_dataset(tmp_path)
    monkeypatch.setattr(loader, 'HERE', str(tmp_path / 'data'))
    start(
        str(tmp_path / 'out'), '--dataset=small', '--block_size=8', '--training_type=joint',
        '--causal_ratio=0.3', '--batch_size=32', '--max_iters=200', '--eval_interval=200', '--eval_rows=64',
        '--eval_samples=0', '--learning_rate=0.01', f'--optimizer={optimizer}',
        '--proofreading_warmup_iters=20', '--masking_warmup_iters=20', '--n_recur=2', '--n_embd=32',
        '--ema_decay=0.9')
    result = read(str(tmp_path / 'out'))['result']
    best = math.log(4) / 8                                                # 0.173 nats a token
    assert best - 4 * result['nelbo_se'] < result['nelbo'] < 0.6          # of 1.386 for guessing
    assert best - 1e-3 < result['causal_nll'] < 0.25
    assert result['auc'] > 0.75


def test_a_dataset_that_was_made_anew_is_another_one(tmp_path, monkeypatch):
    """
    Its tokens may mean something else, or what is held out may be what was learned: nothing goes on, nothing
    is lost.
    """
    write_dataset(tmp_path)
    monkeypatch.setattr(loader, 'HERE', str(tmp_path / 'data'))
    out, words = (
        str(tmp_path / 'out'), ['--dataset=small', '--block_size=8', '--eval_samples=0', '--max_iters=2'])
    start(out, *words)
    path, meta = newest(out), read(out)['meta']
    before = open(path, 'rb').read()
    assert len(loader.data_of(meta, {})[1]['val']) == 64
    write_dataset(tmp_path, rows=48)
    for more in ([], ['--init_from=resume', '--max_iters=3']):
        with pytest.raises(UserError, match='other data than what data/small holds now'):
            start(out, *words, *more)
    with pytest.raises(UserError, match='data/small holds other data.*make that again as it was'):
        loader.data_of(meta, {})
    assert open(path, 'rb').read() == before
    # its weights still are a start
    start(out, *words, '--init_from=ckpt', '--max_iters=1', '--overwrite=True')
    assert read(out)['iter_num'] == 1 and read(out)['config']['init_from'] == 'ckpt'
    write_dataset(tmp_path)                                               # as the first one was
    assert len(loader.data_of(meta, {})[1]['val']) == 64


def test_init_from_takes_the_averaged_weights_and_starts_anew(tmp_path):
    start(str(tmp_path / 'a'), *MIXED, '--eval_samples=0')
    source = newest(str(tmp_path / 'a'))
    before = open(source, 'rb').read()
    start(
        str(tmp_path / 'b'), '--training_type=unmasking', f'--init_from={source}', '--learning_rate=0',
        '--muon_lr=0', '--eval_samples=0', '--max_iters=1', '--bigram_rows=50')
    checkpoint = read(str(tmp_path / 'b'))
    assert_same(dict(checkpoint['model']), dict(torch.load(source, weights_only=True)['ema']))
    assert checkpoint['iter_num'] == 1 and open(source, 'rb').read() == before


def test_a_causal_checkpoint_is_adapted_as_its_blocks_grow(tmp_path, capsys):
    """It loses nothing by being loaded: at first it says of held-out text what it said before."""
    sizes = ['--n_recur=2', '--seed=3', '--eval_samples=0']
    start(str(tmp_path / 'a'), *sizes, '--training_type=causal', '--parts=short_conv:2')
    source = newest(str(tmp_path / 'a'))
    assert torch.load(source, weights_only=True)['ema']['causal_embd'].abs().max() > 0
    capsys.readouterr()
    start(str(tmp_path / 'b'), *sizes, *GROWING, '--parts=short_conv:2,level:8', '--draft_head',
          f'--init_from={source}')
    said = capsys.readouterr().out
    assert f'starting from {source}, step 0; new: draft_head, level\n' in said
    assert 'step 2/6' in said and 'blocks grown 40%' in said and 'blocks grown 100%' in said
    before, (first, *lines) = read(str(tmp_path / 'a'))['result'], log_of(tmp_path / 'b')
    for name in ('causal_nll', 'causal_nll_se'):
        assert first[name] == before[name]
    grew = [(line['step'], line['causal_ratio'], line['block_lengths']) for line in lines if 'causal' in line]
    assert grew == [(2, pytest.approx(0.7), [4]), (4, pytest.approx(0.4), [4, 8]), (6, 0.25, [4, 8])]
    assert not any(torch.equal(*(read(str(tmp_path / run))['model'][name] for run in 'ab'))
                   for name in ('wte.weight', 'causal_embd'))


def test_a_checkpoint_without_all_that_a_resume_needs_is_refused(tmp_path):
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    path = newest(str(tmp_path))
    checkpoint = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in checkpoint.items() if key != 'control'}, path)
    with pytest.raises(UserError, match="no 'control' to resume with.*--init_from="):
        start(str(tmp_path), *PLAIN, '--max_iters=3', '--init_from=resume')


def test_a_resumed_run_has_the_decay_betas_and_price_that_it_was_given(tmp_path):
    words = ['--training_type=joint', '--allow_abstain', '--eval_samples=0']
    start(str(tmp_path), *words, '--max_iters=2')
    start(str(tmp_path), *words, '--max_iters=3', '--init_from=resume', '--weight_decay=0.3', '--beta1=0.5',
          '--penalty_keep_mask=0.7')
    checkpoint = read(str(tmp_path))
    muon, adamw = (optim['param_groups'][0] for optim in checkpoint['optimizers'])
    assert muon['weight_decay'] == 0.3 and tuple(adamw['betas']) == (0.5, 0.95) and adamw['weight_decay'] == 0
    assert checkpoint['control']['price'] == 0.7 and checkpoint['iter_num'] == 3


def test_a_run_goes_on_on_another_kind_of_device_and_says_what_that_costs(tmp_path, capsys):
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    path = newest(str(tmp_path))
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint['rng']['where'] == 'cpu'
    # as a GPU's generator has it
    checkpoint['rng'].update(where='cuda', noise=torch.zeros(16, dtype=torch.uint8))
    torch.save(checkpoint, path)
    start(str(tmp_path), *PLAIN, '--max_iters=3', '--init_from=resume')
    assert (
        'device: cuda before, cpu now; the run goes on, but no longer to the last bit the same'
        in capsys.readouterr().out
    )
    assert read(str(tmp_path))['iter_num'] == 3


def test_init_from_keeps_the_bias_that_the_weights_were_trained_with(tmp_path):
    start(str(tmp_path / 'a'), *ABSTAIN, '--eval_samples=0')
    source = newest(str(tmp_path / 'a'))
    bias = torch.load(source, weights_only=True)['ema']['mask_logit_bias']
    start(
        str(tmp_path / 'b'), *ABSTAIN, '--eval_samples=0', '--max_iters=1', f'--init_from={source}',
        '--mask_control_rate=0')
    checkpoint = read(str(tmp_path / 'b'))
    assert (
        bias
        and torch.equal(checkpoint['model']['mask_logit_bias'], bias)
        and checkpoint['control']['bias'] == bias
    )


def test_eval_only_saves_nothing(tmp_path, capsys):
    start(str(tmp_path / 'a'), *MIXED)
    source = newest(str(tmp_path / 'a'))
    before = open(source, 'rb').read()
    capsys.readouterr()
    start(str(tmp_path / 'a'), *MIXED, '--init_from=resume', '--eval_only')
    out = capsys.readouterr().out
    result = torch.load(source, weights_only=True)['result']
    assert f"step 6  validation: NELBO {result['nelbo']:.3f}" in out and 'saved' not in out
    # wherever it stands
    start(str(tmp_path / 'a'), *MIXED, '--init_from=resume', '--eval_only', '--max_iters=2')
    assert f"step 6  validation: NELBO {result['nelbo']:.3f}" in capsys.readouterr().out
    start(str(tmp_path / 'b'), *MIXED, f'--init_from={source}', '--eval_only', '--eval_rows=1')
    out = capsys.readouterr().out
    assert 'step 0  validation' in out and 'samples are well formed' in out and 'nan' not in out
    assert open(source, 'rb').read() == before and sorted(os.listdir(tmp_path / 'a')) == [
        os.path.basename(source), 'log.jsonl']


def test_a_loss_that_is_not_finite_keeps_the_old_checkpoint(tmp_path):
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    before = open(newest(str(tmp_path)), 'rb').read()
    for words in (
        ['--learning_rate=1e38', '--log_interval=1000'], ['--learning_rate=1e38', '--log_interval=1']):
        with pytest.raises(
            UserError,
            match='the gradient of 10 steps in a row is no longer finite at step 1[23].*'
            f'--learning_rate.*last good checkpoint is {newest(str(tmp_path))}',
        ):
            start(
                str(tmp_path), *PLAIN, '--init_from=resume', '--max_iters=40', '--eval_interval=1000', *words)
        assert open(newest(str(tmp_path)), 'rb').read() == before and len(os.listdir(tmp_path)) == 2


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    before = open(newest(str(tmp_path)), 'rb').read()
    with pytest.raises(UserError, match='finite'):
        start(str(tmp_path), *PLAIN, '--init_from=resume', '--max_iters=5', '--learning_rate=1.7e38')
    assert open(newest(str(tmp_path)), 'rb').read() == before


def test_an_untrained_network_is_not_saved(tmp_path):
    """The evaluation before the first step must not put a network that knows nothing over one that does."""
    def stop(module):
        def failing(*args):
            raise KeyboardInterrupt
        module.random_rows = failing

    with pytest.raises(KeyboardInterrupt):
        start(str(tmp_path), *PLAIN, '--keep_every=1', patch=stop)
    assert os.listdir(tmp_path) == ['log.jsonl']


@pytest.mark.parametrize(
    'error', [OSError(28, 'No space left on device'), RuntimeError('unexpected pos 576 vs 534')])
def test_a_full_disk_ends_a_run_only_at_its_end(tmp_path, monkeypatch, capsys, error):
    """
    In between a line says what was not written; the old checkpoint stays whole and nothing is left of the new
    one.
    """
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    path, save, calls = newest(str(tmp_path)), torch.save, []
    before = open(path, 'rb').read()

    def full(checkpoint, file):
        calls.append(open(path, 'rb').read() == before)
        if len(calls) in disk:
            Path(file).write_bytes(b'half')
            raise error
        save(checkpoint, file)

    monkeypatch.setattr(torch, 'save', full)
    words = [*PLAIN, '--init_from=resume', '--max_iters=4', '--eval_interval=1']
    disk = (1, 2)  # at step 3 and at the end
    with pytest.raises(
        UserError, match=f'{path}: cannot be written: .*; the last good checkpoint is {path}$'):
        start(str(tmp_path), *words)
    out = capsys.readouterr().out
    assert (
        f'{path}: cannot be written: ' in out
        and f'the run goes on, the last good checkpoint is {path}\n' in out
    )
    assert calls == [True] * 2 and open(path, 'rb').read() == before
    assert sorted(os.listdir(tmp_path)) == ['ckpt_unmasking.pt', 'log.jsonl']
    disk = (3,)
    # the disk has room again when the run ends
    start(str(tmp_path), *words)
    assert read(str(tmp_path))['iter_num'] == 4 and len(os.listdir(tmp_path)) == 2


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    # a folder takes no line
    monkeypatch.setattr(run_module, 'start_log', lambda path, start: os.mkdir(path))
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    out = capsys.readouterr().out
    assert f'{tmp_path}/log.jsonl: cannot be written: Is a directory; the run goes on' in out
    assert read(str(tmp_path))['iter_num'] == 2


def spoiled(when, where):
    """
    patch for start: the steps in when have a loss ('parts') that is not finite, or a gradient of such a
    parameter.
    """
    def patch(module):
        step = module.training_step

        def training_step(model, x0, meta, config, number, *args):
            parts = step(model, x0, meta, config, number, *args)
            if number in when and where == 'parts':
                parts['unmask'][0] = float('inf')
            elif number in when:
                dict(model.named_parameters())[where].grad.view(-1)[3] = float('nan')
            return parts
        module.training_step = training_step
    return patch


@pytest.mark.parametrize('where', ['parts', 'wte.weight', 'blocks.0.fc.weight', 'drafter.fc.weight'])
def test_a_step_that_is_not_finite_is_skipped(tmp_path, capsys, monkeypatch, where):
    """
    The weights stay what they are, the optimisers do not count it, the sums stay finite; how many there were
    is shown.
    """
    words = [
        '--training_type=unmasking', '--causal_ratio=0.5', '--draft_head', '--eval_samples=0',
        '--log_interval=4', '--max_iters=6', '--eval_interval=6']
    # the weights as every step found them
    seen = []

    decide = run_module.is_finite

    def is_finite(model, parts):
        seen.append({name: p.detach().clone() for name, p in model.state_dict().items()})
        return decide(model, parts)

    monkeypatch.setattr(run_module, 'is_finite', is_finite)
    start(str(tmp_path), *words, patch=spoiled((2, 3), where))
    assert_same(seen[2], seen[4])
    for step in (1, 4):
        assert not torch.equal(seen[step]['wte.weight'], seen[step + 1]['wte.weight'])
    checkpoint = read(str(tmp_path))
    assert checkpoint['skipped'] == dict(steps=2, in_a_row=0)
    steps = {int(state['step']) for state in checkpoint['optimizers'][1]['state'].values()}
    assert steps == {4}                                                   # AdamW counts its steps
    assert 'skipped 2  ' in capsys.readouterr().out and log_of(tmp_path)[1]['skipped'] == 2
    assert all(part.isfinite().all() for part in checkpoint['sums'].values())


def test_skipped_steps_are_counted_over_a_resume_and_too_many_in_a_row_stop_the_run(tmp_path):
    words = [*PLAIN, '--eval_interval=100', '--max_bad_steps=4']
    start(str(tmp_path), *words, '--max_iters=3', patch=spoiled((1, 2), 'parts'))
    path, before = newest(str(tmp_path)), open(newest(str(tmp_path)), 'rb').read()
    assert read(str(tmp_path))['skipped'] == dict(steps=2, in_a_row=2)
    with pytest.raises(UserError, match='4 steps in a row is no longer finite at step 4: .*; '
                                        f'the last good checkpoint is {path}'):
        start(str(tmp_path), *words, '--max_iters=9', '--init_from=resume', patch=spoiled((3, 4), 'parts'))
    assert open(path, 'rb').read() == before and sorted(os.listdir(tmp_path)) == [
        'ckpt_unmasking.pt', 'log.jsonl']
    # 3 in a row
    start(str(tmp_path), *words, '--max_iters=9', '--init_from=resume', patch=spoiled((3, 5, 6, 7), 'parts'))
    assert read(str(tmp_path))['skipped'] == dict(steps=6, in_a_row=0)


def test_lines_on_screen(capsys, tmp_path):
    start(str(tmp_path), *MIXED, '--eval_samples=0')
    out = capsys.readouterr().out
    assert 'step 2/6  causal ' in out and 'unmask ' in out and 'it/s' in out
    assert 'step 2/6' in out and 'proofreading 50%  masking penalty 67%' in out
    assert 'step 4/6' in out and 'proofreading 100%  masking penalty 100%' in out
    assert 'step 0  validation: NELBO' in out and 'causal NLL' in out and 'AUC' in out
    assert out.count('  validation: ') == 3 and f'saved {tmp_path}' in out and 'put right ' in out
    line = train.progress_line(5, default_config(training_type='unmasking'), {'unmask': 1.5}, 10.0)
    assert line == 'step 5/2000  unmask 1.500  10.0 it/s  3:19 left'
    abstaining = default_config(training_type='unmasking', allow_abstain=True, target_mask_prob=0.2)
    line = train.progress_line(5, abstaining, {'unmask': 1.5, 'p(MASK)': 0.25, 'mask_logit_bias': -1.0,
                                               'penalty_keep_mask': 0.3}, 10.0)
    assert line == 'step 5/2000  unmask 1.500  p(MASK) 0.250  bias -1.00  price 0.30  10.0 it/s  3:19 left'


def test_check_settings_table():
    train.check_settings(default_config())
    remasking, abstaining = dict(training_type='remasking'), dict(allow_abstain=True)
    for changes in (
        dict(remasking, corruption='random'),
        dict(training_type='denoising', remask_target='original', sigma_min=0.5, sigma_max=0.5),
        dict(abstaining, target_mask_prob=0.5, penalty_keep_mask=0.0),
        dict(abstaining, penalty_keep_mask=0.999),
        dict(abstaining, training_type='denoising', remask_target='original', penalty_keep_mask=0.00001),
        dict(abstaining, mask_logit_bias=-20.0), dict(noise_mix='insert')):
        train.check_settings(default_config(**changes))
    for changes, message in (
        (dict(training_type='denoise'), "training_type expects one of .*got 'denoise'"),
        (dict(optimizer='sgd'), 'optimizer expects'), (dict(lr_schedule='linear'), 'lr_schedule expects'),
        (dict(remask_target='x'), 'remask_target expects'),
        (dict(remasking_loss_type='x'), 'remasking_loss_type expects'),
        (dict(batch_size=0), 'batch_size must be at least 1'),
        (dict(max_iters=0), 'max_iters must be at least 1'), (dict(eval_interval=0), 'eval_interval must be'),
        (dict(log_interval=0), 'log_interval must be'),
        (dict(gradient_accumulation_steps=0), 'gradient_accumulation_steps must'),
        (dict(causal_ratio=1.5), 'causal_ratio must be in 0..1'),
        (dict(seed=10**20), r'seed must be in 0..2\^62 - 1'),
        (dict(remask_ratio=-0.1), 'remask_ratio must be in 0..1'),
        (dict(reward_correct_unmask=2.0), 'reward_correct_unmask'), (dict(ema_decay=1.1), 'ema_decay'),
        (dict(decay_share=-1.0), 'decay_share'), (dict(sigma_min=-0.1), 'sigma_min must be in 0..1'),
        (dict(sigma_max=1.1), 'sigma_max must be in 0..1'),
        (dict(target_mask_prob=1.1), 'target_mask_prob must be in 0..1'),
        (dict(prefix_ratio=1.1), 'prefix_ratio must be in 0..1'),
        (dict(prefix_ratio=-0.1), 'prefix_ratio must be in 0..1'),
        (dict(sigma_min=0.6, sigma_max=0.5), 'sigma_min=0.6 is above sigma_max=0.5'),
        (remasking, 'no guesses of its own'),
        (dict(corruption='onw'), "corruption knows own, random, fragment, sticky.*'onw'"),
        (dict(training_type='denoising'), 'set --remask_target=original'),
        (dict(abstaining, penalty_keep_mask=1.0), 'penalty_keep_mask must be 0, or in 0.00001..0.99999'),
        (dict(penalty_keep_mask=-0.1), 'penalty_keep_mask must be 0, or in'),
        (dict(penalty_keep_mask=0.000005), 'penalty_keep_mask must be 0, or in'),
        (dict(target_mask_prob=0.3), 'set --allow_abstain=True'),
        (dict(abstaining, training_type='causal'), 'training_type=causal has none'),
        (dict(abstaining, **remasking, corruption='random'), 'training_type=remasking has none'),
        (dict(block_lengths=(4.5, 8), causal_ratio=0.5), 'block_lengths expects whole numbers of at least 1'),
        (dict(block_lengths=(4, 8), causal_ratio=0.5, parts='places'), 'the part places says where'),
        (dict(bigram_decay=0.1), 'of the tables of pairs, and there are none: set --parts=bigrams'),
        (dict(mask_logit_bias=0.5), 'set --allow_abstain=True'),
        (dict(abstaining, mask_logit_bias=20.5), 'mask_logit_bias=20.5 is beyond mask_bias_limit=20.0'),
        (dict(abstaining, mask_logit_bias=-2.0, mask_bias_limit=1.0), 'is beyond mask_bias_limit=1.0')):
        with pytest.raises(UserError, match=message):
            train.check_settings(default_config(**changes))


def test_check_fits():
    meta = dict(ARITHMETIC, train_tokens=100, val_tokens=100)
    stream = dict(meta, format='stream', block_size=None)
    check_fits(default_config(), meta)
    check_fits(default_config(block_size=99), stream)
    for size, data, message in (
        (32, meta, 'set --block_size=64'), (100, stream, 'block_size=100 is longer than a split'),
        (50, dict(stream, val_tokens=50), 'longer than a split'),
        (50, dict(stream, train_tokens=50), 'longer than a split')):
        with pytest.raises(UserError, match=message):
            check_fits(default_config(block_size=size), data)


def test_a_share_of_rows_that_is_none_or_all_of_them():
    for words, message in (
        (dict(causal_ratio=1.0), 'every row trains the causal mode and none joint'),
        (dict(causal_ratio=0.2, batch_size=2), 'causal_ratio=0.2 of batch_size=2 is no row')):
        with pytest.raises(UserError, match=message):
            train.check_settings(default_config(**words))
    train.check_settings(default_config(causal_ratio=1.0, views=1))


def test_negative_settings():
    for name in (
        'learning_rate', 'muon_lr', 'weight_decay', 'bigram_decay', 'penalty_mask_correct',
        'weight_unmask_task', 'grad_clip', 'weight_remask_task', 'warmup_iters', 'proofreading_warmup_iters',
        'masking_warmup_iters', 'block_warmup_iters', 'eval_samples', 'keep_every', 'seed', 'views',
        'mask_control_rate', 'mask_bias_limit'):
        with pytest.raises(UserError, match=f'{name} must not be negative'):
            train.check_settings(default_config(**{name: type(default_config()[name])(-1)}))
