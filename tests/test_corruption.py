"""
What the network is asked: masks, wrong tokens of every kind, a denoiser's noise, and what positions weigh.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARITHMETIC, chi_square, default_config, seeded, tiny_gpt

from configurator import UserError
from corruption import CORRUPTIONS, Task, ask, own_guesses, task_of
from parts.noise import NOISE, mixed_noise, noise_level
from plumbing.checks import parse_mixture
from plumbing.pack import extent, pack
from plumbing.text import modelled

V, T = 6, 10
MASK, WRONG = V, V + 1


def fits(counts, expected):
    """Whether counts have the expected law, by a chi-square test."""
    statistic, bound = chi_square(counts, expected)
    return statistic < bound


def runs(wrong):
    """How many runs of wrong tokens there are in each row (B, T): (B,)."""
    return (wrong & ~F.pad(wrong, (1, 0))[:, :-1]).sum(1)


def one(kind):
    """A mixture of one kind of wrong tokens."""
    return ((kind, 1.0),)


def clean_rows(B, seed=0):
    """(x0, free): random rows; some positions are not free, and one row has no free position at all."""
    generator = seeded(seed)
    x0, free = torch.randint(V, (B, T), generator=generator), torch.rand(B, T, generator=generator) < 0.8
    free[:, 1] = True
    free[B // 2] = False
    return x0, free


def corrupted(x0, free, training_type, seed=1, real=None, pad_id=None, guess=None, V=V, **settings):
    """What ask makes of rows, with random tokens as wrong ones if the settings do not say otherwise."""
    task = Task(**{'training_type': training_type, 'corruption': one('random'), **settings})
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
    """The documented weights, position by position; noisy: the rows whose errors are mixed noise."""
    weight = torch.zeros(x0.shape)
    for b in range(len(x0)):
        masked = [t for t in range(T) if input[b, t] == MASK]
        counted = [t for t in range(T) if free[b, t] and input[b, t] != MASK]
        if noisy is not None and noisy[b]:
            text = [bool(real[b, t]) or input[b, t] != pad_id for t in range(T)]
            counted = [t for t in range(T) if free[b, t] and (text[t] or text[t - 1])]      # one padding
            masked = []
        for t in masked:
            weight[b, t] = unmask / len(masked)
        for t in counted if proofread[b] else ():
            weight[b, t] = remask * (1.0 if input[b, t] != x0[b, t] else keep) / len(counted)
    return weight


@pytest.mark.parametrize('target_kind', ['wrong', 'original'])
@pytest.mark.parametrize('loss_type', ['all_positions', 'corrupted_only'])
@pytest.mark.parametrize('kind', ['own', 'random', 'fragment', 'sticky'])
@pytest.mark.parametrize('training_type', ['unmasking', 'remasking', 'joint'])
def test_ask(training_type, kind, loss_type, target_kind):
    B = 24
    x0, free = clean_rows(B)
    guess, calls = random_guess()
    for seed, penalty, ratio in ((1, 0.7, 0.5), (2, 0.0, 1.0), (3, 1.0, 0.3)):
        input, target, weight = corrupted(
            x0, free, training_type, seed, corruption=one(kind), guess=guess, remasking_loss_type=loss_type,
            remask_target=target_kind, weight_unmask_task=1.5, weight_remask_task=0.25,
            penalty_mask_correct=penalty, remask_ratio=ratio)
        masked = input == MASK
        wrong = (input != x0) & ~masked
        rows = {'unmasking': 0, 'remasking': B, 'joint': round(B * ratio)}[training_type]
        proofread = torch.arange(B) < rows

        # the canvas
        assert torch.equal(input[~free], x0[~free]) and not (masked & ~free).any()
        assert input.min() >= 0 and input.max() <= MASK                   # [WRONG] is a label, never an input
        assert not wrong[~proofread].any() and not wrong[B // 2].any() and wrong.any() == (rows > 0)
        has_masks = masked.any(1)
        if training_type == 'remasking':
            assert not masked.any()
        else:
            assert has_masks[~proofread & free.any(1)].all()              # k is at least 1
        if training_type == 'unmasking':
            assert not calls
        elif kind in ('random', 'sticky'):
            assert wrong[proofread & free.any(1)].any(1).all()            # so is what is replaced

        # what is asked of it
        assert torch.equal(target, torch.where(wrong, WRONG, x0) if target_kind == 'wrong' else x0)
        keep = penalty if loss_type == 'all_positions' else 0.0
        assert torch.allclose(weight, expected_weight(x0, input, free, proofread, keep, 1.5, 0.25), atol=1e-7)
        assert torch.allclose((weight * masked).sum(1)[has_masks], torch.tensor(1.5))


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
    input, _, _ = corrupted(x0, free, training_type, corruption=one('own'), guess=guess, remask_ratio=1.0)
    (seen, where), = calls
    assert (seen[where] == MASK).all() and not (where & ~free).any()      # it guesses without the answer
    guesses = torch.randint(V, x0.shape, generator=seeded(5))
    assert torch.equal(input, torch.where(where, guesses, seen))
    assert where[free.any(1)].any(1).all() and torch.equal(seen[seen != MASK], x0[seen != MASK])


@pytest.mark.parametrize('kind', ['own', 'random', 'fragment', 'sticky'])
def test_rows_in_which_no_mask_is_left(kind):
    """A share full_ratio of the rows with wrong tokens; with own guesses they stand wherever a mask stood."""
    x0, free = clean_rows(400)
    guess, calls = random_guess()
    settings = dict(corruption=one(kind), guess=guess, remask_ratio=0.5)
    rows = free.any(1) & (torch.arange(400) < 200)
    share = []
    for ratio in (0.0, 0.5, 1.0):
        input, _, weight = corrupted(x0, free, 'joint', full_ratio=ratio, **settings)
        masks = (input == MASK).sum(1)
        assert masks[~rows & free.any(1)].min() == 1                      # the other rows are as they were
        share.append((masks[rows] == 0).float().mean().item())
    assert share[0] + 0.5 * (1 - share[0]) == pytest.approx(share[1], abs=0.1) and share[2] == 1
    assert (weight[rows] > 0).any(1).all()
    if kind == 'own':
        seen, where = calls[-1]
        assert torch.equal(where[:200], (seen == MASK)[:200])


def test_a_guess_that_is_right_is_no_error():
    x0, free = clean_rows(50)
    for kind in ('remasking', 'joint'):
        input, target, weight = corrupted(x0, free, kind, corruption=one('own'), guess=lambda *_: x0,
                                          remask_ratio=1.0, penalty_mask_correct=0.5)
        visible = free & (input != MASK)
        assert torch.equal(target, x0) and torch.equal(input[visible], x0[visible])
        assert torch.allclose((weight * visible).sum(1)[visible.any(1)], torch.tensor(0.5))


@pytest.mark.parametrize('kind', ['random', 'sticky'])
def test_replacements_are_uniform_over_the_other_tokens(kind):
    x0 = torch.randint(V, (4000, T), generator=seeded(1))
    input, _, _ = corrupted(x0, torch.ones_like(x0).bool(), 'remasking', corruption=one(kind))
    wrong = input != x0
    pairs = (x0[wrong] * V + input[wrong]).bincount(minlength=V * V).view(V, V)
    others = (1 - torch.eye(V)) / (V - 1)
    assert pairs.sum() > 10000 and fits(pairs, pairs.sum(1, keepdim=True) * others)

    # neighbours have nothing to do with one another
    both = wrong[:, 1:] & wrong[:, :-1]
    shift = (input - x0) % V
    pairs = (shift[:, :-1][both] * V + shift[:, 1:][both]).bincount(minlength=V * V).view(V, V)[1:, 1:]
    assert fits(pairs, pairs.sum() / (V - 1) ** 2 * torch.ones(V - 1, V - 1))


def test_how_many_are_masked_and_replaced():
    """k uniform on 1..n; of these, in the rows that carry errors, 1..k replaced, uniform again."""
    B, n = 12000, 4
    x0, free = torch.zeros(B, T, dtype=torch.long), (torch.arange(T) < n).expand(B, T)
    input, _, _ = corrupted(x0, free, 'unmasking')
    assert fits((input == MASK).sum(1).bincount(minlength=n + 1)[1:], [B / n] * n)
    assert ((input == MASK).sum(0)[:n] / B - 5 / 8).abs().max() < 0.02    # every position alike
    input, _, _ = corrupted(x0, free, 'remasking')
    assert fits((input != x0).sum(1).bincount(minlength=n + 1)[1:], [B / n] * n)
    input, _, _ = corrupted(x0, free, 'joint', remask_ratio=1.0)
    wrong, k = ((input != x0) & (input != MASK)).sum(1), (input != x0).sum(1)
    pairs = (k * (n + 1) + wrong).bincount(minlength=(n + 1) ** 2).view(n + 1, n + 1)
    assert fits(pairs, [[B / n / i if 1 <= j <= i else 0.0 for j in range(n + 1)] for i in range(n + 1)])


def test_all_kinds_in_one_mixture():
    """Each kind has its share of the rows."""
    x0 = torch.arange(3000 * T).view(3000, T)
    input, _, _ = corrupted(x0, torch.ones_like(x0).bool(), 'remasking', 0, V=x0.numel(),
                            guess=lambda input, where: 0 * input,
                            corruption=(('sticky', 1.0), ('own', 2.0), ('fragment', 3.0), ('random', 4.0)))
    wrong = input != x0
    size, own = wrong.sum(1), (input == 0).sum(1) >= 2
    neighbours = ((input[:, 1:] == input[:, :-1] + 1) & wrong[:, 1:] & wrong[:, :-1]).sum(1)
    fragment = (neighbours == size - 1) & (runs(wrong) == 1)
    sticky = (runs(wrong) == 1) & ~fragment & ~own
    several = (size > 3) & (size < 8)          # neither one run by chance, nor all of the row
    assert several.sum() > 800
    for rows, share in ((own, 0.2), (fragment, 0.3), (sticky, 0.1 + 0.4 * 0.04)):
        assert abs(rows[several].double().mean() - share) < 0.06


@pytest.mark.parametrize('order', [('own', 'random'), ('random', 'own')])
def test_each_row_has_one_kind_of_error(order):
    """The network guesses for its own rows only, and never sees what the other kind has written there."""
    x0 = torch.zeros(400, T, dtype=torch.long)
    guess, calls = random_guess()
    input, _, _ = corrupted(x0, torch.ones_like(x0).bool(), 'joint', guess=guess, remask_ratio=1.0,
                            corruption=tuple((kind, 0.5) for kind in order))
    (seen, where), = calls
    assert (seen[where] == MASK).all() and 120 < where.any(1).sum() < 280
    guesses, own = torch.randint(V, x0.shape, generator=seeded(5)), where.any(1)
    assert torch.equal(input[own], torch.where(where, guesses, seen)[own])
    assert (input[~own] != 0).any(1).all()


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
    assert fits(ids[:3000, 5].bincount(minlength=V), 3000 * p.double())
    uncallable = SimpleNamespace(training=False)                          # it is not asked in vain
    assert not own_guesses(uncallable, None)(input, torch.zeros_like(where)).any()


def test_own_guesses_are_made_without_gradient_and_dropout():
    model = tiny_gpt(V, T, dropout=0.5).train()
    input, hidden = torch.full((2, T), MASK), []
    model.register_forward_hook(lambda module, args, out: hidden.append(out))
    for _ in range(2):
        assert not own_guesses(model, seeded())(input, input == MASK).requires_grad
    assert torch.equal(*hidden) and model.training and not hidden[0].requires_grad


def test_modelled():
    x0 = torch.tensor([[15, 1, 2, 16, 17, 17]])
    free, real = modelled(x0, ARITHMETIC)
    assert free.tolist() == [[0, 1, 1, 1, 1, 1]] and real.tolist() == [[0, 1, 1, 1, 0, 0]]
    free, real = modelled(x0, dict(bos=None, pad=None))
    assert free.all() and real.all() and free.shape == (1, 6)

def test_parse_mixture():
    for text, mixture in (('own', one('own')), ('own:0.7,random:0.3', (('own', 0.7), ('random', 0.3))),
                          ('own:2, random', (('own', 2.0), ('random', 1.0)))):
        assert parse_mixture('corruption', text, CORRUPTIONS) == mixture
    for text in ('', 'typo', 'own:x', 'own:-1', 'own:0', 'own,', 'own:0,random:0', 'own;random',
                 'random:0.5,onw:0.5', 'own:nan', 'own:inf', 'own:0.5:0.5'):
        with pytest.raises(UserError, match='corruption') as error:
            parse_mixture('corruption', text, CORRUPTIONS)
        assert f"got '{text}'" in str(error.value)


def test_a_task_is_made_of_settings():
    config = default_config(
        training_type='joint', corruption='own:2,noise', sigma_min=0.2, sigma_max=0.7, prefix_ratio=0.1,
        noise_mix='mask:0.4,swap:0.6', remask_target='original', mask_weighting='token')
    assert task_of(config) == Task(
        'joint', 0.5, (('own', 2.0), ('noise', 1.0)), remask_target='original', prefix_ratio=0.1,
        sigma=(0.2, 0.7), noise_mix=(('mask', 0.4), ('swap', 0.6)), mask_weighting='token', full_ratio=0.5)
    for changes, message in (
            (dict(corruption='onw'), "corruption knows own, random, fragment, sticky.*'onw'"),
            (dict(noise_mix='mask:1,own:1'), 'noise_mix knows mask, replace, swap, delete, insert'),
            (dict(noise_mix='mask:0'), 'noise_mix knows'), (dict(noise_mix='mask:x'), 'noise_mix expects'),
            (dict(training_type='remasking'), 'no guesses of its own.*--corruption=random'),
            (dict(training_type='remasking', corruption='random:1,own:1'), 'no guesses of its own')):
        with pytest.raises(UserError, match=message):
            task_of(default_config(**changes))


# -----------------------------------------------------------------------------
# runs of wrong tokens

def numbered(B=400, seed=3):
    """(x0, real): every token occurs once, so that it tells where it comes from; rows of several lengths."""
    end = torch.randint(3, T + 1, (B, 1), generator=seeded(seed))
    return torch.arange(B * T).view(B, T), (torch.arange(T) >= 1) & (torch.arange(T) < end)


def errors_of(kind, training_type, x0, real, seed=1, **more):
    """(input, where the wrong tokens stand), for a vocabulary as large as x0 needs."""
    mask = x0.numel()
    input, target, _ = corrupted(x0, real, training_type, seed, V=mask, corruption=one(kind),
                                 remask_ratio=1.0, **more)
    assert torch.equal(target == mask + 1, (input != x0) & (input != mask))
    return input, target == mask + 1


@pytest.mark.parametrize('training_type', ['joint', 'remasking'])
@pytest.mark.parametrize('kind', ['fragment', 'sticky'])
def test_runs(kind, training_type):
    """Wrong tokens stand side by side on real positions; what else was chosen is masked, or left alone."""
    x0, real = numbered()
    input, wrong = errors_of(kind, training_type, x0, real)
    assert (runs(wrong) == 1).all() and not (wrong & ~real).any()
    chosen = corrupted(x0, real, 'unmasking', V=x0.numel())[0] == x0.numel()
    masked = input == x0.numel()
    assert torch.equal(masked, chosen & ~wrong if training_type == 'joint' else torch.zeros_like(wrong))
    assert torch.equal(input[~masked & ~wrong], x0[~masked & ~wrong])
    assert masked.any() or training_type == 'remasking'
    assert (wrong.sum(1) <= chosen.sum(1)).all()


def test_fragments_are_pieces_of_one_other_row():
    x0, _ = numbered()
    real = (torch.arange(T) >= 1).expand_as(x0)
    input, wrong = errors_of('fragment', 'remasking', x0, real)
    for b in range(len(x0)):
        piece = input[b, wrong[b]]
        assert torch.equal(piece, piece[0] + torch.arange(len(piece)))       # neighbours there as well
        source = piece // T
        assert (source == source[0]).all() and source[0] != b and (piece % T >= 1).all()
    assert len(set((input[wrong] % T).tolist())) == T - 1                     # from anywhere in it

    # of three rows any other one
    lenders = set()
    for seed in range(12):
        input, wrong = errors_of('fragment', 'remasking', x0[:3], real[:3], seed)
        assert (input[wrong] // T != x0[:3][wrong] // T).all()
        lenders.add(input[0, wrong[0]][0].item() // T)
    assert lenders == {1, 2}


def test_how_long_runs_are_and_where_they_start():
    """As many tokens as the other kinds would replace, and every start on real positions is as likely."""
    B, n = 12000, 4
    x0, at = torch.zeros(B, T, dtype=torch.long), torch.arange(T)
    real = ((at >= 2) & (at < 2 + n)).expand(B, T)
    input, _, _ = corrupted(x0, real, 'remasking', corruption=one('sticky'))
    wrong = input != x0
    pairs = (wrong.sum(1) * n + wrong.long().argmax(1) - 2).bincount(minlength=(n + 1) * n).view(n + 1, n)
    expected = torch.zeros(n + 1, n)
    for size in range(1, n + 1):
        expected[size, :n - size + 1] = B / n / (n - size + 1)
    assert fits(pairs, expected)


def test_runs_in_short_rows():
    """Padding takes no part in a run, even where it may be masked; a row without a real token gets none."""
    x0 = torch.arange(60 * T).view(60, T)
    free, real = torch.ones_like(x0).bool(), (torch.arange(T) < 3).expand_as(x0).clone()
    real[7] = False
    for kind in ('sticky', 'fragment'):
        input, _, _ = corrupted(x0, free, 'remasking', 0, real, V=600, corruption=one(kind))
        wrong = input != x0
        assert not (wrong & ~real).any() and not wrong[7].any()
        assert (~wrong.any(1)).sum() == (2 if kind == 'fragment' else 1)  # row 7 has no text to lend either
        assert kind == 'sticky' or (input[wrong] % T < 3).all()           # and what is lent is no padding
        assert (wrong.sum(1) == 3).sum() > 40                             # most k of 1..10 are more than that


# -----------------------------------------------------------------------------
# denoising

MIX = (('mask', 0.3), ('replace', 0.25), ('swap', 0.2), ('delete', 0.1), ('insert', 0.15))


@pytest.mark.parametrize('low, high', [(0.1, 0.9), (0.0, 1.0), (0.85, 0.9), (0.4, 0.4)])
def test_noise_levels(low, high):
    """Uniform on low..high."""
    B = 20000
    level = noise_level(B, low, high, seeded())
    assert level.shape == (B,) and low - 1e-6 <= level.min() and level.max() <= high + 1e-6
    if low < high:
        cells = ((level - low) / (high - low) * 8).long().clamp(0, 7).bincount(minlength=8)
        assert fits(cells, [B / 8] * 8)


# tokens, and so the number of [MASK]
NEW = 10 ** 9                                  # tokens, and so the number of [MASK]


def canvases(B, pad, seed=4):
    """(x0, real), T = 24: tokens 1 .. 23 in order, so that a token tells its place; 0 starts, 99 pads."""
    x0 = torch.arange(24).repeat(B, 1)
    if not pad:
        return x0, torch.ones_like(x0).bool()
    end = torch.randint(2, 25, (B, 1), generator=seeded(seed))
    x0 = torch.where(x0 < end, x0, 99)
    return x0, (x0 != 99) & (x0 != 0)


@pytest.mark.parametrize('what, text, alone', [
    ('mask', [0, NEW, NEW, NEW, 99, 99], [NEW] * 6), ('swap', [0, 2, 1, 3, 99, 99], [1, 0, 3, 2, 5, 4]),
    ('delete', [0, 99, 99, 99, 99, 99], [NEW] * 6), ('replace', [0, '+', '+', '+', 99, 99], ['+'] * 6),
    ('insert', [0, '+', 1, '+', 2, '+'], ['+', 0, '+', 1, '+', 2]),
    ('double', [0, 1, 1, 2, 2, 3], [0, 0, 1, 1, 2, 2])])
def test_noise_by_hand(what, text, alone):
    """Every token is hit: one text between start and padding, one alone; + is a new token, NEW is [MASK]."""
    x0, alike = torch.tensor([[0, 1, 2, 3, 99, 99]]), torch.arange(6)[None]
    for x, real, pad_id, expected in ((x0, (x0 > 0) & (x0 < 99), 99, text), (alike, alike >= 0, None, alone)):
        for sigma, wanted in ((1.0, expected), (0.0, x[0].tolist())):
            got = mixed_noise(x, real, torch.tensor([sigma]), one(what), NEW, pad_id, seeded())[0].tolist()
            assert ['+' if 99 < token < NEW else token for token in got] == wanted


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
                row += [mask if ops[t] == 'mask' else x[t]] * (1 + (ops[t] == 'double'))
        rows.append((row + [mask if pad is None else pad] * T)[:T])
    return torch.tensor(rows)


@pytest.mark.parametrize('pad', [True, False])
@pytest.mark.parametrize('mix', [MIX, *(one(what) for what in NOISE), (('insert', 1.0), ('delete', 1.0))],
                         ids=lambda mix: '-'.join(what for what, _ in mix))
def test_mixed_noise_a_token_at_a_time(mix, pad):
    x0, real = canvases(60, pad)
    sigma, more = torch.linspace(0, 1, 60), (mix, 200, 99 if pad else None)
    got = mixed_noise(x0, real, sigma, *more, seeded(2))
    assert torch.equal(got, slow_noise(x0, real, sigma, *more, seeded(2)))
    assert not torch.equal(got, x0) and got.min() >= 0 and got.max() <= 200


def test_masks_that_weigh_alike():
    """mask_weighting='token': each mask among n positions weighs 2/(n+1), in the mean over k as by row."""
    x0, free = clean_rows(4096)
    (input, _, by_row), (same, _, alike) = (
        corrupted(x0, free, 'unmasking', weight_unmask_task=1.5, mask_weighting=kind)
        for kind in ('row', 'token'))
    masked, n = input == MASK, free.sum(1, keepdim=True)
    assert torch.equal(input, same) and torch.allclose(alike, 1.5 * masked * 2 / (n + 1))
    assert by_row.sum(1).mean().item() == pytest.approx(alike.sum(1).mean().item(), rel=0.02)

    # and a visible token weighs what it did
    (input, _, by_row), (_, _, alike) = (
        corrupted(x0, free, 'joint', remask_ratio=1.0, mask_weighting=kind) for kind in ('row', 'token'))
    assert torch.equal(by_row * (input != MASK), alike * (input != MASK))


@pytest.mark.parametrize('loss_type', ['all_positions', 'corrupted_only'])
def test_denoising(loss_type):
    """In the first rows, a share remask_ratio, everything may be wrong; the others are plain unmasking."""
    x0, free = clean_rows(64)
    x0 = torch.where(torch.arange(T) < 2 + torch.arange(64)[:, None] % 9, x0 % 3, 3)   # 2 to 10, and padding
    free[:] = True
    free[:, 0] = False
    real = free & (x0 != 3)
    more = dict(sigma=(0.2, 0.9), noise_mix=MIX, remask_target='original', remasking_loss_type=loss_type,
                weight_unmask_task=1.5, weight_remask_task=0.25, penalty_mask_correct=0.7, real=real,
                pad_id=3)
    plain = corrupted(x0, free, 'unmasking', weight_unmask_task=1.5)
    keep = 0.7 if loss_type == 'all_positions' else 0.0
    for ratio, rows in ((0.3, 19), (0.0, 0), (1.0, 64)):
        asked = input, target, weight = corrupted(x0, free, 'denoising', remask_ratio=ratio, **more)
        proofread = torch.arange(64) < rows
        expected = expected_weight(x0, input, free, proofread, keep, 1.5, 0.25, proofread, real, 3)
        assert torch.equal(target, x0) and torch.allclose(weight, expected, atol=1e-7)
        assert all(torch.equal(a[rows:], b[rows:]) for a, b in zip(asked, plain))
        wrong = (input != x0) & (input != MASK)
        assert not wrong[rows:].any() and wrong[:rows].any(1).double().sum() >= 0.5 * rows
        joint = corrupted(x0, free, 'joint', remask_ratio=ratio, corruption=one('noise'), **more)
        assert all(torch.equal(a, b) for a, b in zip(asked, joint))       # the same by another name


@pytest.mark.parametrize('what, counted', [('mask', 4), ('swap', 4), ('delete', 4), ('insert', 7)])
def test_how_far_the_loss_of_a_denoiser_reaches(what, counted):
    """As far as the text, the clean or the noisy one, and the first padding: that is where it ends."""
    x0 = torch.tensor([[4, 0, 1, 2, 5, 5, 5, 5, 5, 5]]).repeat(9, 1)
    input, _, weight = corrupted(
        x0, x0 != 4, 'denoising', real=x0 < 4, pad_id=5, remask_ratio=1.0, sigma=(1.0, 1.0),
        noise_mix=one(what), weight_remask_task=2.0, penalty_mask_correct=0.25)
    at = torch.arange(T)
    shares = torch.where(input != x0, 2 / counted, 0.5 / counted) * ((at > 0) & (at <= counted))
    assert torch.allclose(weight, shares) and (input != x0).any()
    assert what != 'insert' or (weight[:, 5:7] > 0.25).any()


def test_noise_in_a_mixture():
    """Its rows, and only these, weigh as a denoiser's: together weight_remask_task, no unmasking loss."""
    x0, free = clean_rows(400)
    free[:] = True
    more = dict(sigma=(0.3, 0.6), noise_mix=(('mask', 1.0), ('replace', 1.0)), weight_unmask_task=2.0,
                weight_remask_task=0.5, remask_ratio=1.0)
    for order in ('noise', 'random'), ('random', 'noise'):
        mixture = tuple((kind, 0.5) for kind in order)
        input, target, weight = corrupted(x0, free, 'joint', corruption=mixture, **more)
        noisy, masked = (weight.sum(1) - 0.5).abs() < 1e-5, input == MASK
        assert 150 < (noisy & masked.any(1)).sum() and (~noisy).sum() > 130
        assert torch.equal(target == WRONG, (input != x0) & ~masked)
        assert torch.allclose(weight[noisy], torch.tensor(0.05))
        assert torch.allclose((weight * masked).sum(1)[~noisy], torch.tensor(2.0))


def test_denoising_levels():
    """The levels are those of noise_level, one a row."""
    x0 = torch.zeros(2000, 100, dtype=torch.long)

    def hits(*sigma):
        input, _, _ = corrupted(x0, x0 == 0, 'denoising', remask_ratio=1.0, sigma=sigma,
                                noise_mix=one('replace'), remask_target='original')
        return (input != x0).double().mean(1)
    assert not hits(0.0, 0.0).any() and (hits(1.0, 1.0) == 1).all()
    spread = hits(0.1, 0.9)
    assert spread.mean().item() == pytest.approx(0.5, abs=0.02)
    assert spread.std().item() == pytest.approx(0.8 / 12 ** 0.5, abs=0.02)


# -----------------------------------------------------------------------------
# given prefixes

@pytest.mark.parametrize('training_type, kind', [
    ('unmasking', 'random'), ('denoising', 'noise'),
    *((name, kind) for name in ('remasking', 'joint') for kind in ('own', 'random', 'fragment', 'sticky'))])
def test_a_given_prefix_is_left_alone(training_type, kind):
    """In a share of the rows 1 .. prefix_length tokens, half of the row at most, stay and weigh nothing."""
    x0, free = torch.arange(30000).view(-1, T) % (V - 1), (torch.arange(T) > 0).expand(3000, T)
    for ratio, most in ((1.0, 1), (0.5, 3), (1.0, 99)):
        input, _, weight = corrupted(
            x0, free, training_type, corruption=one(kind), guess=lambda input, _: (input + 1) % V,
            sigma=(0.9, 0.9), noise_mix=MIX, pad_id=5, remask_ratio=1.0, prefix_ratio=ratio,
            prefix_length=most)
        law = {0: 1 - ratio}                                              # of the number of given tokens
        for n in range(1, most + 1):
            law[min(n, 5)] = law.get(min(n, 5), 0) + ratio / most
        heard = ((input != x0) | (weight > 0)).double().mean(0)

        # n free tokens: each is masked with (n + 1) / 2n
        for place in range(T):
            expected = sum(p * ((10 - n) / (18 - 2 * n) if training_type == 'unmasking' else 1)
                           for n, p in law.items() if n < place)
            slack = 0.04 if 0 < expected < 1 else 1e-9
            assert heard[place].item() == pytest.approx(expected, abs=slack), place


# -----------------------------------------------------------------------------
# several texts in a row

@pytest.mark.parametrize('length', [[1] * 7, [T] * 5, [6, 5, 4, 3, 2, 1, 9, 10, 1, 3], [1], [6] * 3], ids=str)
def test_pack_keeps_every_text_whole_and_adds_nothing(length):
    B = len(length)
    ids, other = torch.arange(1, B * T + 1).view(B, T), torch.rand(B, T, generator=seeded())
    packed, parts, segment = pack(torch.tensor(length), ids, other)
    assert packed.shape == parts.shape == segment.shape and packed.size(1) == T and parts.dtype == other.dtype

    # every text is there, in one piece
    texts = []
    for row, numbers in zip(packed, segment):
        texts += [row[numbers == number].tolist() for number in numbers.unique() if number]
        assert (numbers[1:] != numbers[:-1]).sum() + 1 == len(numbers.unique())
    assert sorted(texts) == [ids[b, :n].tolist() for b, n in enumerate(length)]

    # the tensors stay side by side, and no text had room in a row before its own
    room = segment == 0
    assert not packed[room].any() and not parts[room].any() and (packed[~room] > 0).all()
    assert torch.equal(parts[~room], other.flatten()[packed[~room] - 1])
    for row in range(1, len(packed)):
        assert segment[row][~room[row]].unique(return_counts=True)[1].min() > room[:row].sum(1).max()


def test_how_much_of_a_row_a_pass_sees():
    """All that is text or has weight; of the padding behind it, visible and weightless, a random part."""
    B, pad = 40000, 3
    input, weight = torch.full((B, 41), pad), torch.zeros(B, 41)
    input[:, 5] = 0                                                       # there is padding before it as well
    weight[B // 2:, 9] = 0.1                                              # a padding that counts
    n = extent(input, weight, pad, seeded())
    for part, last in ((n[:B // 2], 6), (n[B // 2:], 10)):
        more = (part - last).double()
        assert more.min() == 0 and more.max() == 41 - last                # from none of it to all of it
        assert more.mean().item() == pytest.approx((41 - last) / 4, rel=0.05)
        assert (more == 0).double().mean() > 0.2
    input[:, -1] = 1                                                      # text to the end
    assert (extent(input, weight, pad, seeded()) == 41).all()
    input[:, -1], weight[:, -1] = pad, 0.1
    assert (extent(input, weight, pad, seeded()) == 41).all()
