"""
What the network is asked: masks, wrong tokens of every kind, the noise of a denoiser, and what each position
weighs.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import ARITHMETIC, chi_square, default_config, tiny_gpt

from configurator import UserError
from corruption import CORRUPTIONS, Task, ask, own_guesses, task_of
from parts.noise import NOISE, mixed_noise, noise_level
from plumbing.checks import parse_mixture
from plumbing.pack import extent, pack
from plumbing.text import modelled

V, T = 6, 10
MASK, WRONG = V, V + 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clean_rows(B, seed=0):
    """
    (x0, free): random rows of which some positions are not free, and one row has no free position at all.
    """
    generator = seeded(seed)
    x0, free = torch.randint(V, (B, T), generator=generator), torch.rand(B, T, generator=generator) < 0.8
    free[:, 1] = True
    free[B // 2] = False
    return x0, free


def corrupted(x0, free, training_type, seed=1, real=None, pad_id=None, guess=None, V=V, **settings):
    """What ask makes of rows, with random tokens as wrong ones if the settings do not say otherwise."""
    task = Task(**{'training_type': training_type, 'corruption': (('random', 1.0),), **settings})
    return ask(x0, free, free if real is None else real, task, (V, V + 1, pad_id), seeded(seed), guess)


def random_guess(seed=5):
    """A guess for ask that records what it was asked."""
    generator, calls = seeded(seed), []

    def guess(input, where):
        calls.append((input.clone(), where.clone()))
        return torch.randint(V, input.shape, generator=generator)
    return guess, calls

# -----------------------------------------------------------------------------
# (input, target, weight)


def expected_weight(x0, input, free, proofread, keep, unmask, remask, noisy=None, real=None, pad_id=None):
    """
    The documented weights, a row and a position at a time; noisy: the rows whose errors are mixed noise.
    """
    weight = torch.zeros(x0.shape)
    for b in range(len(x0)):
        masked = [t for t in range(T) if input[b, t] == MASK]
        if noisy is not None and noisy[b]:
            text = [bool(real[b, t]) or input[b, t] != pad_id for t in range(T)]
            # one padding behind the text
            counted = [t for t in range(T) if free[b, t] and (text[t] or text[t - 1])]
            for t in counted:
                weight[b, t] = remask * (1.0 if input[b, t] != x0[b, t] else keep) / len(counted)
            continue
        visible = [t for t in range(T) if free[b, t] and input[b, t] != MASK]
        for t in masked:
            weight[b, t] = unmask / len(masked)
        for t in visible if proofread[b] else ():
            weight[b, t] = remask * (1.0 if input[b, t] != x0[b, t] else keep) / len(visible)
    return weight


@pytest.mark.parametrize('target_kind', ['wrong', 'original'])
@pytest.mark.parametrize('loss_type', ['all_positions', 'corrupted_only'])
@pytest.mark.parametrize('kind', ['own', 'random', 'fragment', 'sticky'])
@pytest.mark.parametrize('training_type', ['unmasking', 'remasking', 'joint'])
def test_ask(training_type, kind, loss_type, target_kind):
    B = 64
    x0, free = clean_rows(B)
    guess, calls = random_guess()
    for seed, penalty, ratio in ((1, 0.7, 0.5), (2, 0.0, 1.0), (3, 1.0, 0.3)):
        input, target, weight = corrupted(
            x0, free, training_type, seed, corruption=((kind, 1.0),), guess=guess,
            remasking_loss_type=loss_type, remask_target=target_kind, weight_unmask_task=1.5,
            weight_remask_task=0.25, penalty_mask_correct=penalty, remask_ratio=ratio)
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
        elif kind in ('random', 'sticky'):
            # so is the number of replaced tokens
            assert wrong[proofread & free.any(1)].any(1).all()
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
    input, _, _ = corrupted(
        x0, free, training_type, corruption=(('own', 1.0),), guess=guess, remask_ratio=1.0)
    (seen, where), = calls
    # the network guesses without the answer
    assert (seen[where] == MASK).all() and not (where & ~free).any()
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
    input, _, _ = corrupted(
        x0, torch.ones_like(x0).bool(), 'remasking', corruption=(('own', 7.0), ('random', 3.0)),
        guess=lambda input, where: torch.where(where, 1, 0 * input))
    # all errors of the row are the guesses
    ones = (input == 1).sum(1) == (input != 0).sum(1)
    # among which a random one is a 1 now and then
    single = (input != 0).sum(1) == 1
    share = ones[~single].double().mean()
    assert abs(share - 0.7 - 0.3 * 0.02) < 0.04


@pytest.mark.parametrize('order', [('own', 'random'), ('random', 'own')])
def test_each_row_has_one_kind_of_error(order):
    """
    In a mixture the network guesses for its own rows only, and never sees what the other kind has written
    there.
    """
    x0 = torch.zeros(400, T, dtype=torch.long)
    guess, calls = random_guess()
    input, _, _ = corrupted(
        x0, torch.ones_like(x0).bool(), 'joint', corruption=tuple((kind, 0.5) for kind in order), guess=guess,
        remask_ratio=1.0)
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
    # cannot be called: it is not asked in vain
    idle = SimpleNamespace(training=False)
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

def test_modelled():
    x0 = torch.tensor([[15, 1, 2, 16, 17, 17]])
    free, real = modelled(x0, ARITHMETIC)
    assert free.tolist() == [[0, 1, 1, 1, 1, 1]] and real.tolist() == [[0, 1, 1, 1, 0, 0]]
    free, real = modelled(x0, dict(bos=None, pad=None))
    assert free.all() and real.all() and free.shape == (1, 6)

def test_parse_mixture():
    assert parse_mixture('corruption', 'own', CORRUPTIONS) == (('own', 1.0),)
    assert parse_mixture('corruption', 'own:0.7,random:0.3', CORRUPTIONS) == (('own', 0.7), ('random', 0.3))
    assert parse_mixture('corruption', 'own:2, random', CORRUPTIONS) == (('own', 2.0), ('random', 1.0))
    for text in (
        '', 'typo', 'own:x', 'own:-1', 'own:0', 'own,', 'own:0,random:0', 'own;random', 'random:0.5,onw:0.5'):
        with pytest.raises(UserError, match='corruption') as error:
            parse_mixture('corruption', text, CORRUPTIONS)
        assert f"got '{text}'" in str(error.value)


def test_a_task_is_made_of_settings():
    config = default_config(
        training_type='joint', corruption='own:2,noise', sigma_min=0.2, sigma_max=0.7, prefix_ratio=0.1,
        noise_mix='mask:0.4,swap:0.6', remask_target='original', mask_weighting='token')
    assert task_of(config) == Task(
        'joint', 0.5, (('own', 2.0), ('noise', 1.0)), remask_target='original', prefix_ratio=0.1,
        sigma=(0.2, 0.7), noise_mix=(('mask', 0.4), ('swap', 0.6)), mask_weighting='token')
    for changes, message in (
            (dict(corruption='onw'), "corruption knows own, random, fragment, sticky.*'onw'"),
            (dict(noise_mix='mask:1,own:1'), 'noise_mix knows mask, replace, swap, delete, insert'),
            (dict(noise_mix='mask:0'), 'noise_mix knows'), (dict(noise_mix='mask:x'), 'noise_mix expects'),
            (dict(training_type='remasking'), 'no guesses of its own.*--corruption=random'),
            (dict(training_type='remasking', corruption='random:1,own:1'), 'no guesses of its own')):
        with pytest.raises(UserError, match=message):
            task_of(default_config(**changes))


def test_a_new_corruption_is_a_function_and_an_entry(monkeypatch):
    monkeypatch.setitem(CORRUPTIONS, 'zero', lambda batch, where: (where, torch.zeros_like(batch.x0)))
    x0, free = clean_rows(20)
    input, _, _ = corrupted(x0, free, 'remasking', corruption=(('zero', 1.0),))
    assert (input[input != x0] == 0).all() and (input != x0).any()


@pytest.mark.parametrize('text', ['own:nan', 'own:inf', 'own:0.5:0.5'])
def test_parse_mixture_refuses_odd_shares(text):
    with pytest.raises(UserError):
        parse_mixture('corruption', text, CORRUPTIONS)

# -----------------------------------------------------------------------------
# runs of wrong tokens


def numbered(B=400, seed=3):
    """
    (x0, real): every token occurs once, so that it tells where it comes from; rows of different length,
    between others.
    """
    generator = seeded(seed)
    x0 = torch.arange(B * T).view(B, T)
    end = torch.randint(3, T + 1, (B, 1), generator=generator)
    return x0, (torch.arange(T) >= 1) & (torch.arange(T) < end)


def errors_of(kind, training_type, x0, real, seed=1, **more):
    """(input, where the wrong tokens stand), for a vocabulary as large as x0 needs."""
    mask = x0.numel()
    input, target, _ = corrupted(
        x0, real, training_type, seed, V=mask, corruption=((kind, 1.0),), remask_ratio=1.0, **more)
    assert torch.equal(target == mask + 1, (input != x0) & (input != mask))
    return input, target == mask + 1


@pytest.mark.parametrize('training_type', ['joint', 'remasking'])
@pytest.mark.parametrize('kind', ['fragment', 'sticky'])
def test_runs(kind, training_type):
    """
    Wrong tokens stand next to one another on real positions; what else was chosen is masked, or in remasking
    left alone.
    """
    x0, real = numbered()
    input, wrong = errors_of(kind, training_type, x0, real)
    starts = (wrong & ~torch.nn.functional.pad(wrong, (1, 0))[:, :-1]).sum(1)
    assert (starts == 1).all() and not (wrong & ~real).any()
    chosen = corrupted(x0, real, 'unmasking', V=x0.numel())[0] == x0.numel()
    masked = input == x0.numel()
    assert torch.equal(masked, chosen & ~wrong if training_type == 'joint' else torch.zeros_like(wrong))
    assert torch.equal(input[~masked & ~wrong], x0[~masked & ~wrong]) and (
        masked.any() or training_type == 'remasking')
    assert (wrong.sum(1) <= chosen.sum(1)).all()


def test_fragments_are_pieces_of_one_other_row():
    x0, _ = numbered()
    real = (torch.arange(T) >= 1).expand_as(x0)
    input, wrong = errors_of('fragment', 'remasking', x0, real)
    for b in range(len(x0)):
        piece = input[b, wrong[b]]
        # neighbours there as well, in their order
        assert torch.equal(piece, piece[0] + torch.arange(len(piece)))
        source = piece // T
        assert (source == source[0]).all() and source[0] != b and (piece % T >= 1).all()
    assert len(set((input[wrong] % T).tolist())) == T - 1                     # from anywhere in it
    other, _ = errors_of('fragment', 'remasking', x0, real, seed=2)
    assert (other // T)[-1].max() != (input // T)[-1].max() or not torch.equal(other, input)


def test_sticky_tokens_are_random_ones():
    x0 = torch.randint(V, (4000, T), generator=seeded(1))
    input, _, _ = corrupted(x0, torch.ones_like(x0).bool(), 'remasking', corruption=(('sticky', 1.0),))
    wrong = input != x0
    pairs = (x0[wrong] * V + input[wrong]).bincount(minlength=V * V).view(V, V)
    expected = (pairs.sum(1, keepdim=True) / (V - 1)).expand(V, V) * (1 - torch.eye(V))
    statistic, bound = chi_square(pairs, expected)
    assert statistic < bound
    both = wrong[:, 1:] & wrong[:, :-1]
    # neighbours have nothing to do with one another
    shift = (input - x0) % V
    pairs = (shift[:, :-1][both] * V + shift[:, 1:][both]).bincount(minlength=V * V).view(V, V)[1:, 1:]
    statistic, bound = chi_square(pairs, pairs.sum() / (V - 1) ** 2 * torch.ones(V - 1, V - 1))
    assert statistic < bound


def test_how_long_runs_are_and_where_they_start():
    """
    As many tokens as the other kinds would replace, anywhere on the real positions with the same probability.
    """
    B, n = 12000, 4
    x0, real = (
        torch.zeros(B, T, dtype=torch.long),
        ((torch.arange(T) >= 2) & (torch.arange(T) < 2 + n)).expand(B, T))
    input, _, _ = corrupted(x0, real, 'remasking', corruption=(('sticky', 1.0),))
    wrong = input != x0
    pairs = (wrong.sum(1) * n + wrong.long().argmax(1) - 2).bincount(minlength=(n + 1) * n).view(n + 1, n)
    expected = [
        [B / n / (n - size + 1) if size and start <= n - size else 0.0 for start in range(n)]
        for size in range(n + 1)
    ]
    statistic, bound = chi_square(pairs, expected)
    assert statistic < bound


def test_runs_in_short_rows():
    """
    Positions that may be masked, but are padding, take no part in a run; a row that has no real token gets
    none.
    """
    x0 = torch.arange(60 * T).view(60, T)
    free, real = torch.ones_like(x0).bool(), (torch.arange(T) < 3).expand_as(x0).clone()
    real[7] = False
    for kind in ('sticky', 'fragment'):
        input, _, _ = corrupted(x0, free, 'remasking', 0, real, V=600, corruption=((kind, 1.0),))
        wrong = input != x0
        assert not (wrong & ~real).any() and not wrong[7].any()
        assert (~wrong.any(1)).sum() == (2 if kind == 'fragment' else 1)  # row 7 has no text to lend either
        if kind == 'fragment':
            assert (input[wrong] % T < 3).all()                           # and what is lent is no padding
        # most k of 1..10 are more than there is
        assert (wrong.sum(1) == 3).sum() > 40


def test_all_kinds_in_one_mixture():
    x0 = torch.arange(3000 * T).view(3000, T)
    input, _, _ = corrupted(x0, torch.ones_like(x0).bool(), 'remasking', 0, V=x0.numel(),
                            guess=lambda input, where: 0 * input,
                            corruption=(('sticky', 1.0), ('own', 2.0), ('fragment', 3.0), ('random', 4.0)))
    wrong = input != x0
    size, starts = wrong.sum(1), (wrong & ~torch.nn.functional.pad(wrong, (1, 0))[:, :-1]).sum(1)
    own = (input == 0).sum(1) >= 2
    neighbours = ((input[:, 1:] == input[:, :-1] + 1) & wrong[:, 1:] & wrong[:, :-1]).sum(1)
    fragment = (neighbours == size - 1) & (starts == 1)
    sticky = (starts == 1) & ~fragment & ~own
    # of 10: neither one run by chance, nor all of the row
    several = (size > 3) & (size < 8)
    assert several.sum() > 800
    for rows, share in ((own, 0.2), (fragment, 0.3), (sticky, 0.1 + 0.4 * 0.04)):
        assert abs(rows[several].double().mean() - share) < 0.06

# -----------------------------------------------------------------------------
# denoising

MIX = (('mask', 0.3), ('replace', 0.25), ('swap', 0.2), ('delete', 0.1), ('insert', 0.15))


@pytest.mark.parametrize('low, high', [(0.1, 0.9), (0.0, 1.0), (0.85, 0.9), (0.4, 0.4)])
def test_noise_levels(low, high):
    """Uniform on low..high."""
    B = 20000
    level = noise_level(B, low, high, seeded())
    assert level.shape == (B,) and low - 1e-6 <= level.min() and level.max() <= high + 1e-6
    assert level.mean().item() == pytest.approx((low + high) / 2, abs=0.01)
    if low < high:
        cells = ((level - low) / (high - low) * 8).long().clamp(0, 7).bincount(minlength=8)
        statistic, bound = chi_square(cells, [B / 8] * 8)
        assert statistic < bound


# tokens, and so the number of [MASK]
NEW = 10 ** 9


def canvases(B=300, pad=True, seed=4):
    """
    (x0, real) with T = 24 and tokens 1 .. 23 in their order, so that a token tells its place: 0 starts, 99
    pads.
    """
    x0 = torch.arange(24).repeat(B, 1)
    if not pad:
        return x0, torch.ones_like(x0).bool()
    end = torch.randint(2, 25, (B, 1), generator=seeded(seed))
    x0 = torch.where(x0 < end, x0, 99)
    return x0, (x0 != 99) & (x0 != 0)


def noisy(x0, real, what, sigma, pad=True, seed=0):
    """One kind of noise, with a vocabulary so large that new tokens are never among the old ones."""
    return mixed_noise(
        x0, real, torch.as_tensor(sigma).expand(len(x0)), ((what, 1.0),), NEW, 99 if pad else None,
        seeded(seed))


@pytest.mark.parametrize('pad', [True, False])
@pytest.mark.parametrize('what', NOISE)
def test_no_noise_changes_nothing(what, pad):
    x0, real = canvases(pad=pad)
    assert torch.equal(noisy(x0, real, what, 0.0, pad), x0)
    if pad:
        start, end = x0[:, :1], real.sum(1)
        for sigma in (0.5, 1.0):
            x = noisy(x0, real, what, sigma)
            assert torch.equal(x[:, :1], start)                           # the start symbol never moves
            if what in ('mask', 'replace', 'swap'):
                assert torch.equal(x[~real], x0[~real])                   # nor does padding
            if what == 'delete':
                assert all((row[n + 1:] == 99).all() for row, n in zip(x, end))


@pytest.mark.parametrize('pad', [True, False])
def test_noise_masks_and_replaces(pad):
    x0, real = canvases(2000, pad)
    for what in ('mask', 'replace'):
        for sigma in (0.2, 0.7):
            x = noisy(x0, real, what, sigma, pad)
            hit = x != x0
            share = hit[real].double().mean()
            assert (
                abs(share - sigma) < 4 * (sigma * (1 - sigma) / real.sum()) ** 0.5 and not (hit & ~real).any()
            )
            assert (x[hit] == NEW).all() if what == 'mask' else (x[hit] < NEW).all()
        assert (noisy(x0, real, what, 1.0, pad) != x0)[real].all()        # never the same token
    small = torch.zeros(4000, 5, dtype=torch.long) + torch.arange(5)
    x = mixed_noise(
        small, torch.ones_like(small).bool(), torch.ones(4000), (('replace', 1.0),), 5, None, seeded())
    statistic, bound = chi_square(
        (small * 5 + x).flatten().bincount(minlength=25).view(5, 5), 1000 * (1 - torch.eye(5)))
    assert statistic < bound


@pytest.mark.parametrize('pad', [True, False])
def test_noise_swaps_neighbours(pad):
    """Whoever is not at home has changed places with one neighbour, and a real one."""
    x0, real = canvases(300, pad)
    for sigma in (0.1, 0.5, 1.0):
        x = noisy(x0, real, 'swap', sigma, pad)
        away, count = x != x0, 0
        for now, before, there, moved in zip(x.tolist(), x0.tolist(), real.tolist(), away.tolist()):
            t = 0
            while t < 24:
                if moved[t]:
                    assert now[t:t + 2] == before[t:t + 2][::-1] and all(there[t:t + 2])
                    t, count = t + 1, count + 1
                t += 1
        # from the left: a hit swaps unless its token has been swapped already by a hit right before, or is
        # the last one
        pairs = 0.0
        for length in real.sum(1).tolist():
            state = 0.0
            for _ in range(length - 1):
                state = sigma * (1 - state)
                pairs += state
        assert abs(count - pairs) <= 5 * (pairs * (1 - sigma)) ** 0.5 and count > 100


@pytest.mark.parametrize('pad', [True, False])
def test_noise_deletes(pad):
    """What is left keeps its order and moves left; padding, or [MASK] where there is none, moves in."""
    x0, real = canvases(1000, pad)
    filler, kept = 99 if pad else NEW, 0
    for x, row, n in zip(noisy(x0, real, 'delete', 0.3, pad), x0, real.sum(1).tolist()):
        left = [token for token in x.tolist() if token != filler]
        assert (
            left == sorted(set(left))
            and set(left) <= set(row.tolist())
            and x.tolist() == left + [filler] * (24 - len(left))
        )
        kept += len(left) - (1 if pad else 0)
    assert abs(1 - kept / real.sum() - 0.3) < 4 * (0.21 / real.sum()) ** 0.5
    assert (noisy(x0, real, 'delete', 1.0, pad)[:, 1 if pad else 0:] == filler).all()


@pytest.mark.parametrize('pad', [True, False])
def test_noise_inserts(pad):
    """Without the new tokens it is the old text, as far as there is room."""
    x0, real = canvases(1000, pad)
    for sigma in (0.2, 1.0):
        new, hits = 0, 0
        for x, row, n in zip(
            noisy(x0, real, 'insert', sigma, pad).tolist(), x0.tolist(), real.sum(1).tolist()):
            old = [token for token in x if token < 24]
            # the old tokens, in their order, from the start on
            assert old == row[:len(old)] and NEW not in x
            text = [token for token in x if token != 99]
            inserted = [token for token in text if token >= 24]
            if 99 in x:                                                   # nothing fell off
                assert len(old) == n + 1 and len(text) == n + 1 + len(inserted)
            if pad and n <= 11:                                           # there is room for everything
                assert len(old) == n + 1
                new, hits = new + len(inserted), hits + n
            assert len(set(inserted)) == len(inserted)
            if sigma == 1 and text:                                       # a new one before every real token
                assert [token >= 24 for token in text[1 if pad else 0 :]] == [
                    i % 2 == 0 for i in range(len(text) - (1 if pad else 0))]
        assert not pad or abs(new / hits - sigma) <= 4 * (sigma * (1 - sigma) / hits) ** 0.5


def slow_noise(x0, real, sigma, mix, mask, pad, generator):
    """mixed_noise a token at a time, fed by the same random numbers."""
    B, T = x0.shape
    u, which = torch.rand(2, B, T, generator=generator)
    others = torch.randint(mask - 1, (B, T), generator=generator)
    news = torch.randint(mask, (B, T), generator=generator)
    total, rows = sum(share for _, share in mix), []
    for b in range(B):
        ops = [None] * T
        for t in range(T):
            if real[b, t] and u[b, t] < sigma[b]:
                edge = 0.0
                for what, share in mix:
                    edge += share
                    if which[b, t] * total <= edge:
                        ops[t] = what
                        break
        x, t = x0[b].tolist(), 0
        while t < T - 1:
            if ops[t] == 'swap' and real[b, t + 1]:
                x[t], x[t + 1] = x[t + 1], x[t]
                t += 1 + (ops[t + 1] == 'swap')
            else:
                t += 1
        row = []
        for t in range(T):
            if ops[t] == 'insert':
                row.append(news[b, t].item())
            if ops[t] == 'replace':
                x[t] = others[b, t].item() + (others[b, t].item() >= x[t])
            if ops[t] != 'delete':
                row.append(mask if ops[t] == 'mask' else x[t])
        rows.append((row + [mask if pad is None else pad] * T)[:T])
    return torch.tensor(rows)


@pytest.mark.parametrize('pad', [True, False])
@pytest.mark.parametrize(
    'mix', [MIX, *[((what, 2.0),) for what in NOISE], (('insert', 1.0), ('delete', 1.0))],
    ids=lambda mix: '-'.join(what for what, _ in mix))
def test_mixed_noise_a_token_at_a_time(mix, pad):
    x0, real = canvases(60, pad)
    sigma = torch.linspace(0, 1, 60)
    got = mixed_noise(x0, real, sigma, mix, 200, 99 if pad else None, seeded(2))
    assert torch.equal(got, slow_noise(x0, real, sigma, mix, 200, 99 if pad else None, seeded(2)))
    assert not torch.equal(got, x0) and got.min() >= 0 and got.max() <= 200


def test_noise_shares():
    """Of the hits each kind of noise gets its share; those of one row are as many as its own level says."""
    x0 = torch.arange(40).repeat(4000, 1)
    real, sigma = torch.ones_like(x0).bool(), torch.tensor([0.2, 0.8]).repeat(2000)
    mix = (('mask', 2.0), ('replace', 1.0))
    x = mixed_noise(x0, real, sigma, mix, NEW, None, seeded())
    masked, replaced = (x == NEW).double().mean(1), ((x != x0) & (x < NEW)).double().mean(1)
    for rows, level in ((slice(0, None, 2), 0.2), (slice(1, None, 2), 0.8)):
        assert masked[rows].mean().item() == pytest.approx(level * 2 / 3, abs=0.01)
        assert replaced[rows].mean().item() == pytest.approx(level / 3, abs=0.01)


def test_masks_that_weigh_alike():
    """
    mask_weighting='token': the same canvases; each mask among n positions weighs 2/(n+1), in the mean over k
    as by row.
    """
    x0, free = clean_rows(4096)
    more = dict(training_type='unmasking', weight_unmask_task=1.5)
    (input, _, by_row), (same, _, alike) = (
        corrupted(x0, free, **more, mask_weighting=kind) for kind in ('row', 'token'))
    masked, n = input == MASK, free.sum(1, keepdim=True)
    assert torch.equal(input, same) and torch.allclose(alike, 1.5 * masked * 2 / (n + 1))
    assert by_row.sum(1).mean().item() == pytest.approx(alike.sum(1).mean().item(), rel=0.02)
    # and no visible token's weight
    proofread = corrupted(x0, free, 'joint', remask_ratio=1.0, mask_weighting='token')
    assert torch.equal(proofread[2] * (proofread[0] != MASK),
                       corrupted(x0, free, 'joint', remask_ratio=1.0)[2] * (proofread[0] != MASK))


@pytest.mark.parametrize('loss_type', ['all_positions', 'corrupted_only'])
def test_denoising(loss_type):
    """In the first rows, a share remask_ratio, everything may be wrong; the others are plain unmasking."""
    x0, free = clean_rows(64)
    # 2 to 10 tokens, and padding
    x0 = torch.where(torch.arange(T) < 2 + torch.arange(64)[:, None] % 9, x0 % 3, 3)
    free[:] = True
    free[:, 0] = False
    real = free & (x0 != 3)
    more = dict(
        sigma=(0.2, 0.9), noise_mix=MIX, remask_target='original', remasking_loss_type=loss_type,
        weight_unmask_task=1.5, weight_remask_task=0.25, penalty_mask_correct=0.7, real=real, pad_id=3)
    plain = corrupted(x0, free, 'unmasking', weight_unmask_task=1.5)
    for ratio, rows in ((0.3, 19), (0.0, 0), (1.0, 64)):
        input, target, weight = corrupted(x0, free, 'denoising', remask_ratio=ratio, **more)
        assert torch.equal(target, x0)
        proofread = torch.arange(64) < rows
        keep = 0.7 if loss_type == 'all_positions' else 0.0
        assert torch.allclose(
            weight, expected_weight(x0, input, free, proofread, keep, 1.5, 0.25, proofread, real, 3),
            atol=1e-7)
        assert all(torch.equal(a[rows:], b[rows:]) for a, b in zip((input, target, weight), plain))
        wrong = (input != x0) & (input != MASK)
        assert not wrong[rows:].any() and wrong[:rows].any(1).double().sum() >= 0.5 * rows
        joint = corrupted(x0, free, 'joint', remask_ratio=ratio, corruption=(('noise', 1.0),), **more)
        # the same by another name
        assert all(torch.equal(a, b) for a, b in zip((input, target, weight), joint))


@pytest.mark.parametrize('what, counted', [('mask', 4), ('swap', 4), ('delete', 4), ('insert', 7)])
def test_how_far_the_loss_of_a_denoiser_reaches(what, counted):
    """
    As far as the text, the clean one or the noisy one if that is longer, and the first padding: that is where
    it ends.
    """
    x0 = torch.tensor([[4, 0, 1, 2, 5, 5, 5, 5, 5, 5]]).repeat(9, 1)
    free, real = x0 != 4, x0 < 4
    input, _, weight = corrupted(
        x0, free, 'denoising', real=real, pad_id=5, remask_ratio=1.0, sigma=(1.0, 1.0),
        noise_mix=((what, 1.0),), weight_remask_task=2.0, penalty_mask_correct=0.25)
    shares = torch.where(input != x0, 2 / counted, 0.5 / counted)
    assert (
        torch.allclose(weight[:, 1 : counted + 1], shares[:, 1 : counted + 1])
        and not weight[:, counted + 1 :].any()
    )
    assert (
        not weight[:, 0].any() and (input != x0).any() and (what != 'insert' or (weight[:, 5:7] > 0.25).any())
    )


def test_noise_in_a_mixture():
    """
    Its rows, and only these, weigh as a denoiser's: all positions together weight_remask_task, without an
    unmasking loss.
    """
    x0, free = clean_rows(400)
    free[:] = True
    more = dict(sigma=(0.3, 0.6), noise_mix=(('mask', 1.0), ('replace', 1.0)),
                weight_unmask_task=2.0, weight_remask_task=0.5)
    for order in ([('noise', 0.5), ('random', 0.5)], [('random', 0.5), ('noise', 0.5)]):
        input, target, weight = corrupted(
            x0, free, 'joint', corruption=tuple(order), remask_ratio=1.0, **more)
        total, masks = weight.sum(1), (input == MASK).any(1)
        noisy = (total - 0.5).abs() < 1e-5
        assert 150 < (noisy & masks).sum() and (~noisy).sum() > 130
        assert torch.allclose(weight[noisy], torch.tensor(0.05)) and torch.equal(
            target == WRONG, (input != x0) & (input != MASK))
        shares = (weight * (input == MASK)).sum(1)[~noisy]
        assert torch.allclose(shares, torch.tensor(2.0))


def test_denoising_levels():
    """The levels are those of noise_level, one a row."""
    x0 = torch.zeros(3000, 200, dtype=torch.long)
    free = torch.ones_like(x0).bool()

    def hits(*sigma):
        input, _, _ = corrupted(
            x0, free, 'denoising', remask_ratio=1.0, sigma=sigma, noise_mix=(('replace', 1.0),),
            remask_target='original')
        return (input != x0).double().mean(1)
    assert not hits(0.0, 0.0).any() and (hits(1.0, 1.0) == 1).all()
    spread = hits(0.1, 0.9)
    assert (spread.mean().item() == pytest.approx(0.5, abs=0.02)
            and spread.std().item() == pytest.approx(0.8 / 12 ** 0.5, abs=0.02))

# -----------------------------------------------------------------------------
# given prefixes


@pytest.mark.parametrize(
    'training_type, kind',
    [
        ('unmasking', 'random'),
        *[
            (name, kind)
            for name in ('remasking', 'joint')
            for kind in ('own', 'random', 'fragment', 'sticky')
        ],
        ('denoising', 'noise'),
    ],
)
def test_a_given_prefix_is_left_alone(training_type, kind):
    """
    In a share of the rows the first 1 .. prefix_length tokens, half of the row at most, are as they were and
    weigh nothing.
    """
    x0, free = torch.arange(30000).view(-1, T) % (V - 1), (torch.arange(T) > 0).expand(3000, T)
    for ratio, most in ((1.0, 1), (0.5, 3), (1.0, 99)):
        input, _, weight = corrupted(
            x0, free, training_type, corruption=((kind, 1.0),), guess=lambda input, _: (input + 1) % V,
            sigma=(0.9, 0.9), noise_mix=MIX, pad_id=5, remask_ratio=1.0, prefix_ratio=ratio,
            prefix_length=most)
        law = {0: 1 - ratio}                                              # of the number of given tokens
        for n in range(1, most + 1):
            law[min(n, 5)] = law.get(min(n, 5), 0) + ratio / most
        heard = (input != x0) | (weight > 0)
        # n free tokens: each is masked with (n + 1) / 2n
        for place in range(T):
            expected = sum(p * ((10 - n) / (18 - 2 * n) if training_type == 'unmasking' else 1)
                           for n, p in law.items() if n < place)
            assert heard[:, place].double().mean().item() == pytest.approx(
                expected, abs=0.04 if 0 < expected < 1 else 1e-9), place

# -----------------------------------------------------------------------------
# several texts in a row


@pytest.mark.parametrize(
    'length', [[1] * 7, [T] * 5, [6, 5, 4, 3, 2, 1, 9, 10, 1, 3], [1], [6, 6, 6]], ids=str)
def test_pack_keeps_every_text_whole_and_adds_nothing(length):
    B = len(length)
    ids, other = torch.arange(1, B * T + 1).view(B, T), torch.rand(B, T, generator=seeded())
    packed, parts, segment = pack(torch.tensor(length), ids, other)
    assert packed.shape == parts.shape == segment.shape and packed.size(1) == T and parts.dtype == other.dtype
    texts = [
        packed[row][segment[row] == number]
        for row in range(len(packed))
        for number in segment[row].unique()
        if number
    ]
    # none in two rows
    assert sorted(map(torch.Tensor.tolist, texts)) == [ids[b, :n].tolist() for b, n in enumerate(length)]
    for row in range(len(packed)):                                        # and each in one piece
        changes = (segment[row, 1:] != segment[row, :-1]).sum() + 1
        assert changes == len(segment[row].unique())
    room = segment == 0
    assert not packed[room].any() and not parts[room].any() and (packed[~room] > 0).all()
    assert torch.equal(parts[~room], other.flatten()[packed[~room] - 1])  # the tensors stay side by side
    # no text had room in a row before its own
    for row in range(1, len(packed)):
        assert segment[row][~room[row]].unique(return_counts=True)[1].min() > room[:row].sum(1).max()


def test_how_much_of_a_row_a_pass_sees():
    """
    All that is text or has weight; of the padding behind it, which is visible and weightless, a random part.
    """
    B, pad = 40000, 3
    input, weight = torch.full((B, 41), pad), torch.zeros(B, 41)
    # padding lies before the last token as well
    input[:, 5] = 0
    weight[B // 2:, 9] = 0.1                                              # a padding that counts
    n = extent(input, weight, pad, seeded())
    for part, last in ((n[:B // 2], 6), (n[B // 2:], 10)):
        more = (part - last).double()
        assert more.min() == 0 and more.max() == 41 - last  # from none of it to all of it
        assert (
            more.mean().item() == pytest.approx((41 - last) / 4, rel=0.05)
            and (more == 0).double().mean() > 0.2
        )
    # text to the end: nothing to leave out
    input[:, -1] = 1
    assert (extent(input, weight, pad, seeded()) == 41).all()
    input[:, -1], weight[:, -1] = pad, 0.1
    assert (extent(input, weight, pad, seeded()) == 41).all()
