"""How a token is drawn, and which positions of many rows are chosen."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ARITHMETIC, chi_square, seeded

from plumbing import rows
from plumbing.draw import LARGE, NotFinite, draw, filtered
from plumbing.rows import Ends, close_rows, first_of, left_of, places, random_subset, spread, stratified_k

# -----------------------------------------------------------------------------
# drawing


def test_filtered():
    logits = torch.tensor(
        [
            [2.0, 1.0, 0.0, 3.0, float('-inf'), float('-inf')],
            [0.0, 5.0, 1.0, 2.0, float('-inf'), float('-inf')],
        ]
    )
    p = logits.softmax(-1)
    assert torch.allclose(filtered(logits), p)
    assert torch.allclose(filtered(logits, temperature=0.5), (2 * logits).softmax(-1))
    assert filtered(logits, temperature=0).tolist() == [[0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    two = filtered(logits, top_k=2)
    assert (two > 0).tolist() == [[1, 0, 0, 1, 0, 0], [0, 1, 0, 1, 0, 0]]
    assert torch.allclose(two, (p * (two > 0)) / (p * (two > 0)).sum(-1, keepdim=True))
    assert torch.allclose(filtered(logits, top_k=99), p) and torch.allclose(filtered(logits, top_p=1.0), p)

    # the token that crosses top_p stays in
    flat = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).log()
    for top_p, kept in (
        (0.4, [0, 1, 0, 0]),
        (0.51, [0, 1, 1, 0]),
        (0.79, [0, 1, 1, 0]),
        (1e-6, [0, 1, 0, 0]),
    ):
        q = filtered(flat, top_p=top_p)
        assert (q > 0).tolist() == [kept] and q.sum() == pytest.approx(1)
    assert filtered(flat, top_p=0.51)[0, 1].item() == pytest.approx(5 / 8)

    # all three in this order, each on what the last one left
    both = filtered(logits, temperature=2.0, top_k=3, top_p=0.7)
    q = (logits[0] / 2)[[3, 0, 1]].softmax(0)
    expected = torch.stack((q[1], *torch.zeros(2), q[0], *torch.zeros(2))) / (q[0] + q[1])
    assert torch.allclose(both[0], expected, atol=1e-6)


def test_draw():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    ids = draw(p.expand(100, 200, 4), seeded())
    assert ids.shape == (100, 200)
    statistic, bound = chi_square(ids.flatten().bincount(minlength=4), 20000 * p.double())
    assert statistic < bound
    assert draw(torch.zeros(3, 0, 4)).shape == (3, 0) and draw(torch.zeros(0, 4)).dtype == torch.long
    assert torch.equal(draw(torch.eye(4)), torch.arange(4))


def test_a_large_vocabulary_is_drawn_from_by_the_same_law():
    """
    Of 6000 words most have no chance: neither the first nor the last goes wrong, nor a row that does not
    quite sum to 1.
    """
    V = 6000
    law = torch.zeros(V)
    law[[7, 4096, 5000, 5001, 5997]] = torch.tensor([0.4, 0.3, 0.2, 0.0999, 1e-4])
    drawn = draw(law.expand(300, 100, V), seeded())
    assert drawn.shape == (300, 100) and (law[drawn] > 0).all()
    counts = drawn.flatten().bincount(minlength=V)[law > 0]
    statistic, bound = chi_square(counts, law[law > 0] / law.sum() * drawn.numel())
    assert statistic < bound
    one = torch.eye(V)[[0, 3, V - 1]]
    assert draw(one / 3, seeded()).tolist() == [0, 3, V - 1] and draw(torch.zeros(0, V)).shape == (0,)


# -----------------------------------------------------------------------------
# how many, and which


def test_stratified_k_is_uniform_and_spread():
    n, generator = torch.full((10,), 7), seeded(1)
    draws = torch.stack([stratified_k(n, generator) for _ in range(3000)])  # (3000, 10)
    for row in range(10):  # in every row, not only in all of them together
        statistic, bound = chi_square(draws[:, row].bincount(minlength=8)[1:], torch.full((7,), 3000 / 7))
        assert statistic < bound
    # 10 strata over 7 values: each value gets 10/7 of a batch, give or take less than one
    counts = F.one_hot(draws - 1, 7).sum(1)
    assert counts.max() <= 3 and (counts.sum(1) == 10).all()
    many = stratified_k(torch.full((1000,), 4), generator).bincount(minlength=5)[1:]
    assert (many - 250).abs().max() <= 1
    # rows with n of their own: 1..n each, and a row is not tied to its stratum
    mixed = torch.stack([stratified_k(torch.tensor([1, 2, 3, 50]), generator) for _ in range(500)])
    assert (mixed.amin(0) == 1).all() and (mixed.amax(0)[:3] == torch.tensor([1, 2, 3])).all()
    assert mixed.max() <= 50
    for half in (mixed[:, 3] > 25, mixed[:, 3] < 26):
        assert half.float().mean() > 0.4


def test_stratified_k_never_exceeds_n(monkeypatch):
    """In float32 (strata + rand) / B may round up to 1, which must not give k = n + 1."""
    monkeypatch.setattr(rows.torch, 'rand', lambda *size, **more: torch.full(size, 1 - 2.0**-24))
    assert stratified_k(torch.full((8,), 5)).max() == 5


def test_random_subset_is_exact_and_uniform():
    generator = seeded(2)
    candidates = torch.tensor([[1, 0, 1, 1, 0, 1]] * 20000).bool()
    chosen = random_subset(candidates, torch.full((20000,), 2), generator)
    assert (chosen.sum(1) == 2).all() and not (chosen & ~candidates).any()
    pairs = (chosen[:, [0, 2, 3, 5]] * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16)
    expected = torch.tensor([20000 / 6 if bin(i).count('1') == 2 else 0.0 for i in range(16)])
    statistic, bound = chi_square(pairs, expected)
    assert statistic < bound
    k = torch.tensor([0, 1, 4, 9, -3])  # more than there are: all; fewer than none: none
    assert random_subset(candidates[:5], k, generator).sum(1).tolist() == [0, 1, 4, 4, 0]


def test_first_of_takes_the_highest_and_of_equals_the_left_one():
    score = torch.tensor([[0.5, 2.0, float('-inf'), 2.0, 9.0]]).repeat(5, 1)
    where = torch.tensor([1, 1, 1, 1, 0]).bool().expand(5, 5)
    chosen = first_of(score, where, torch.tensor([-1, 1, 2, 4, 9]))
    assert chosen.long().tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 0, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
    ]


def test_places_and_what_is_spread_over_them():
    where = torch.tensor([[0, 1, 0], [1, 1, 0]]).bool()
    assert places(where).tolist() == [1, 3, 4]
    assert spread(where, torch.tensor([7.0, 8.0, 9.0])).tolist() == [[0, 7, 0], [8, 9, 0]]
    assert left_of(where).long().tolist() == [[1, 1, 0], [1, 1, 0]]


def test_the_special_ids_of_a_dataset():
    assert Ends.of(ARITHMETIC) == (16, 17, (15, 16, 17))
    assert Ends.of(dict(bos=None, eos=None, pad=None)) == Ends() == (None, None, ())


def test_close_rows():
    M, E, P = 9, 5, 7  # mask, end, padding
    x = torch.tensor(
        [
            [1, E, 2, E, 3],  # finished: what was masked behind the end becomes padding
            [1, M, E, 2, 3],  # a hole left of the end
            [1, E, M, 2, M],  # holes right of the end
            [1, 2, 3, 4, E],
            [E, 1, 2, 3, 4],
        ]
    )
    everywhere = torch.ones_like(x).bool()
    assert close_rows(x, everywhere, M, Ends(E, P)).tolist() == [
        [1, E, P, P, P],
        [1, M, E, 2, 3],
        [1, E, P, P, P],
        [1, 2, 3, 4, E],
        [E, P, P, P, P],
    ]
    masked = torch.tensor([[0, 0, 1, 0, 1]]).bool().expand(5, 5)
    assert close_rows(x, masked, M, Ends(E, P)).tolist() == [
        [1, E, P, E, P],
        [1, M, E, 2, 3],
        [1, E, P, 2, P],
        [1, 2, 3, 4, E],
        [E, 1, P, 3, P],
    ]
    assert close_rows(x, everywhere, M, Ends()) is x


@pytest.mark.parametrize('words', [7, LARGE + 9])
@pytest.mark.parametrize('temperature', [0, 1.0])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_nothing_is_drawn_from_logits_that_are_not_finite(words, temperature, value):
    logits = torch.zeros(3, words)
    logits[1] = value
    with pytest.raises(NotFinite, match='no longer finite'):
        filtered(logits, temperature=temperature)


@pytest.mark.parametrize('temperature', [1e-45, 1e-30, 1e30, 1e308])
def test_temperatures_at_the_ends_of_their_range(temperature):
    logits = torch.tensor([[1.0, 3.0, float('-inf')], [-2.0, -2.0, 5.0]])
    probs = filtered(logits, temperature=temperature)
    likeliest = torch.tensor([[0, 1.0, 0], [0, 0, 1]])
    uniform = torch.tensor([[0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(probs, likeliest if temperature < 1 else uniform)
