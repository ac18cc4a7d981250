"""
The rules of the sampling loop, one by one: which are the same under another name, what each commits, what each doubts.

Most tests use networks that know a law exactly (see Oracle), so that whatever is missing is the rules' own fault.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import all_sequences, chi_square, tiny_gpt
from test_sample import (Oracle, distance, empty, filtered_law, product_law, random_law, seeded,
                         starting_canvas, stubborn_gpt, text_law, within_noise)

import sample
from configurator import UserError
from plumbing.evaluate import causal_nll
from rules import COMMIT_RULES, displaced, doubted, masks_left, remdm_rate, share_at
from sample import generate_diffusion, spare_lengths
from plumbing.rows import left_of


class Independent(Oracle):
    """
    An oracle of independent tokens, for canvases that are too long to enumerate: table (T, V) their marginals.

    wrong: its answer for p(WRONG), by position (T,), or by position and token (T, V). A visible token is certain else.
    """

    def __init__(self, table, wrong=None):
        table = torch.as_tensor(table, dtype=torch.float64)
        super().__init__(1, 1, torch.ones(1, dtype=torch.float64))
        (self.T, self.V), self.table = table.shape, table
        self.mask_token_id, self.wrong_token_id = self.V, self.V + 1
        wrong = torch.as_tensor(0.0 if wrong is None else wrong, dtype=torch.float64)
        self.wrong = (wrong if wrong.ndim == 2 else wrong.expand(self.T)[:, None]).expand(self.T, self.V)

    def __call__(self, idx, causal=False, previous=None, cache=None):
        self.seen.append((idx.clone(), causal))
        hole = (idx == self.V)[..., None]
        p = torch.where(hole, self.table.expand(*idx.shape, -1), F.one_hot(idx, self.V + 1)[..., :self.V].double())
        wrong = self.wrong.expand(*idx.shape, -1).gather(2, idx.clamp(max=self.V - 1)[..., None]) * ~hole
        return torch.cat(((p + 1e-300).log(), torch.full_like(wrong, -700.0), (wrong / (1 - wrong)).log()), -1)


def uniform(T, V=2, wrong=None):
    return Independent(torch.full((T, V), 1 / V), wrong)


def traced(model, canvas, fixed=None, seed=0, **rules):
    """(canvas, nfe, the canvases from the first to the last (S, B, T))."""
    fixed = canvas != model.mask_token_id if fixed is None else fixed
    out, nfe, trace = generate_diffusion(model, canvas, fixed, trace=True, generator=seeded(seed), **rules)
    return out, nfe, torch.stack(trace)


def remasked(trace, mask):
    """Which positions go back to [MASK] in each step: trace (S, B, T) -> bool (S - 1, B, T)."""
    return (trace[:-1] != mask) & (trace[1:] == mask)


def committed(trace, mask):
    return (trace[:-1] == mask) & (trace[1:] != mask)


def visible_canvas(model, B):
    """A complete canvas of tokens 0 that nobody trusts."""
    canvas = torch.zeros(B, model.T, dtype=torch.long)
    return canvas, torch.zeros_like(canvas, dtype=torch.bool)

# -----------------------------------------------------------------------------
# the same under another name


@pytest.mark.parametrize('rules', [dict(remask='remdm'), dict(remask='remdm', remdm='rescale'),
                                   dict(remask='remdm', remdm='loop'),
                                   dict(remask='p2'), dict(remask='confidence')], ids=lambda rules: '-'.join(rules.values()))
def test_a_rate_of_zero_is_ancestral_sampling(rules):
    """Nothing is re-masked whatever is doubted, and one token a step is exact, as without a remask rule."""
    B, V, T = 20000, 3, 3
    law = random_law(V, T, seed=1)
    oracle = Oracle(V, T, law, wrong=[0.9, 0.5, 0.99])
    loop = rules.get('remdm') == 'loop'                       # of 3 masks it holds none, and so takes two of them at once
    out, nfe, trace = traced(oracle, empty(oracle, B)[0], remask_rate=0.0, correct_share=0.0, **rules)
    assert not remasked(trace, V).any() and (out < V).all()
    if loop:
        assert (trace == V).sum(2)[:, 0].tolist() == [3, 1, 0]
    else:
        assert (nfe == T).all()
        statistic, bound = distance(out, V, law, B)
        assert statistic < bound


@pytest.mark.parametrize('remask', ['random', 'wrong', 'confidence'])
def test_a_rate_of_zero_leaves_a_full_canvas_alone(remask):
    """Through all the correcting steps, however wrong everything looks; a rate above zero would not."""
    model = uniform(6, wrong=0.9)
    canvas, _ = empty(model, 40)
    for rate, again in ((0.0, False), (0.5, True)):
        _, nfe, trace = traced(model, canvas, steps=12, remask=remask, remask_rate=rate)
        assert (nfe == 12).all() and bool(remasked(trace, 2).any()) == again


@pytest.mark.parametrize('shares', [None, (0.6, 0.2)], ids=['chance', 'share'])
@pytest.mark.parametrize('remask', ['wrong', 'confidence'])
def test_all_at_random_is_the_rule_random(remask, shares):
    """remask_random_ratio=1 takes the doubt out of the rule: the same draws give the same canvases."""
    model = Independent([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.99, 0.01], [0.5, 0.5]], wrong=[0.01, 0.2, 0.4, 0.8, 0.99])
    canvas = empty(model, 50)[0]
    how = dict(steps=10, remask_rate=0.4, remask_schedule=shares)
    ours, _, trace = traced(model, canvas, remask=remask, remask_random_ratio=1.0, **how)
    theirs, _, other = traced(model, canvas, remask='random', **how)
    assert torch.equal(trace, other) and remasked(trace, 2).any()
    assert not torch.equal(trace[-1], traced(model, canvas, remask=remask, remask_random_ratio=0.0, **how)[0])


def test_blocks_of_one_token_are_left_to_right():
    oracle = Oracle(3, 4, random_law(3, 4, seed=1))
    for prompt in ([], [2]):
        canvas = empty(oracle, 200, prompt)[0]
        for steps in (None, 2):
            ours = traced(oracle, canvas, block_length=1, steps=steps)
            theirs = traced(oracle, canvas, commit='left_to_right', steps=steps)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize('commit', ['random', 'confidence', 'margin', 'entropy', 'threshold', 'left_to_right', 'priority'])
def test_one_block_for_the_whole_canvas_changes_nothing(commit):
    oracle = Oracle(3, 4, random_law(3, 4, seed=1))
    canvas = empty(oracle, 100)[0]
    plain = traced(oracle, canvas, commit=commit, priority=(1,), remask='random', steps=5)
    for length in (4, 99):
        blocks = traced(oracle, canvas, commit=commit, priority=(1,), remask='random', steps=5, block_length=length)
        assert all(torch.equal(a, b) for a, b in zip(plain, blocks))


@pytest.mark.parametrize('commit', ['random', 'confidence', 'margin', 'entropy', 'abstain', 'priority', 'threshold'])
@pytest.mark.parametrize('steps', [None, 3])
def test_blocks_are_filled_from_left_to_right(commit, steps):
    """No token of a later block is there while an earlier block has a hole; the blocks begin at the first hole of a row."""
    model, V = stubborn_gpt(5, 8), 5
    canvas = torch.full((60, 8), V)
    canvas[20:, 0] = 1                                        # blocks 1-2, 3-4, .. here
    canvas[40:, 4] = 2                                        # a given token in the middle
    _, _, trace = traced(model, canvas, commit=commit, steps=steps, block_length=2, priority=(1, 3))
    orders = set()
    for row, start in zip(trace.unbind(1), canvas):
        first = int((start == V).long().argmax())
        block = (torch.arange(8) - first) // 2
        for now in row:
            open_, new = now == V, (now != V) & (start == V)
            if open_.any() and new.any():
                assert block[new].max() <= block[open_].min()
        orders.add(tuple(committed(row, V).nonzero()[:, 1].tolist()))
    if commit == 'random' and steps is None:
        assert len(orders) > 20                               # within its block every token may be the first

# -----------------------------------------------------------------------------
# commit rules

SURE = [[0.50, 0.49, 0.01], [0.45, 0.275, 0.275], [0.60, 0.20, 0.20], [0.62, 0.37, 0.01]]
ORDERS = dict(confidence=(3, 2, 0, 1), margin=(2, 3, 1, 0), entropy=(3, 0, 2, 1), threshold=(3, 2, 0, 1))


@pytest.mark.parametrize('commit', ORDERS)
def test_what_margin_entropy_and_threshold_call_sure(commit):
    """Each of the four has an order of its own (threshold's is the confidence's); a single row may be greedy."""
    model = Independent(SURE)
    rules = dict(commit=commit, commit_threshold=2.0, choice_temperature=0.0)
    for seed in range(5):
        out, _, trace = traced(model, empty(model, 1)[0], seed=seed, temperature=0.0, **rules)
        assert tuple(committed(trace, 3).nonzero()[:, 2].tolist()) == ORDERS[commit] and out.tolist() == [[0, 0, 0, 0]]
    assert len({ORDERS[name] for name in ('confidence', 'margin', 'entropy')}) == 3


@pytest.mark.parametrize('commit', ['margin', 'entropy'])
def test_margin_and_entropy_look_at_the_law_and_not_at_the_token_drawn(commit):
    """Whatever is drawn, the order is the same, so that one token a step stays exact."""
    B, model = 20000, Independent(SURE)
    out, _, trace = traced(model, empty(model, B)[0], commit=commit)
    for at, new in zip(ORDERS[commit], committed(trace, 3)):
        assert new[:, at].all() and (new.sum(1) == 1).all()
    statistic, bound = distance(out, 3, product_law(model.table), B)
    assert statistic < bound


def test_priority_takes_its_tokens_first():
    """Positions 2, 4 and 5 get a token of the priority; within both groups any order."""
    likely = torch.tensor([0, 0, 2, 0, 3, 2, 1])
    model = Independent(0.9 * F.one_hot(likely, 4) + 0.025)
    canvas = empty(model, 400, [0, 0])[0]                     # two tokens are given, so that it may be greedy
    for priority, ahead in (((2, 3), {2, 4, 5}), ((3,), {4}), ((1, 0), {3, 6}), ((), set())):
        out, _, trace = traced(model, canvas, commit='priority', priority=priority, temperature=0.0)
        assert (out == likely).all()
        orders = committed(trace, 4).nonzero()                # (N, 3): step, row, position
        first = {at: set() for at in range(5)}
        for step, _, at in orders.tolist():
            first[step].add(at)
        for step in range(5):
            assert first[step] == (({2, 3, 4, 5, 6} if not ahead else ahead) if step < len(ahead) or not ahead
                                   else {2, 3, 4, 5, 6} - ahead)


def test_threshold_commits_one_token_or_all():
    """Out of everybody's reach: one token a step. Within everybody's reach: all in the first pass."""
    B, V, T = 20000, 3, 3
    law = random_law(V, T, seed=1)
    oracle = Oracle(V, T, law)
    canvas = empty(oracle, B)[0]
    _, nfe, trace = traced(oracle, canvas[:500], commit='threshold', commit_threshold=1.1)
    assert (committed(trace, V).sum(2) == 1).all() and (nfe == T).all()
    marginals = torch.stack([(law[:, None] * F.one_hot(all_sequences(V, T)[:, i], V)).sum(0) for i in range(T)])
    out, nfe, _ = traced(oracle, canvas, commit='threshold', commit_threshold=1e-9)
    assert (nfe == 1).all()
    statistic, bound = distance(out, V, product_law(marginals), B)
    assert statistic < bound


def test_threshold_commits_exactly_the_candidates_that_reach_it():
    """Independent tokens: the first step takes each position with the probability that a likely token is drawn there."""
    B, model = 20000, Independent([[1.0, 0.0, 0.0], [0.5, 0.45, 0.05], [0.7, 0.2, 0.1], [0.35, 0.35, 0.3], [0.4, 0.4, 0.2]])
    _, nfe, trace = traced(model, empty(model, B)[0], commit='threshold', commit_threshold=0.38)
    chance = torch.tensor([1.0, 0.95, 0.7, 0.0, 0.8], dtype=torch.float64)    # of a token that reaches it
    taken = committed(trace, 3)[0]                                            # (B, T)
    tokens = trace[1][taken]
    assert (model.table.expand(B, -1, -1)[taken].gather(1, tokens[:, None]) >= 0.38).all()
    pattern = torch.stack((1 - chance, chance), 1)
    statistic, bound = chi_square((taken * 2 ** torch.arange(4, -1, -1)).sum(1).bincount(minlength=32),
                                  B * product_law(pattern))
    assert statistic < bound
    assert (nfe >= 2).all() and nfe.max() <= 5 and len(nfe.unique()) > 2


def test_threshold_does_not_wait_for_the_schedule():
    """But it stops with the steps: the last one takes whatever is left."""
    model = uniform(6, V=3)
    for schedule in ('linear', 'cosine'):
        _, nfe, trace = traced(model, empty(model, 5)[0], commit='threshold', commit_threshold=0.9, steps=3, schedule=schedule)
        assert [(x == 3).sum(1).tolist() for x in trace] == [[6] * 5, [5] * 5, [4] * 5, [0] * 5] and (nfe == 3).all()


def test_threshold_within_a_block_does_not_count_the_sure_ones_of_later_blocks():
    """A token that does not reach the threshold is committed alone, or in the last step, whatever other blocks hold."""
    model = Independent([[0.6, 0.4], [0.6, 0.4], [1.0, 0.0], [1.0, 0.0], [0.6, 0.4], [0.6, 0.4]])
    _, _, trace = traced(model, empty(model, 50)[0], commit='threshold', commit_threshold=0.9, block_length=2, steps=6)
    for before, after in zip(trace[:-2], trace[1:-1]):
        for old, new in zip(before, after):
            at = ((old == 2) & (new != 2)).nonzero()[:, 0]
            assert len(at) <= 1 or (model.table[at, new[at]] >= 0.9).all(), (old, new)


@pytest.mark.parametrize('commit', COMMIT_RULES)
def test_greedy_rules_need_something_to_go_by(commit):
    """Without noise an empty canvas gives one sample again and again: refused where more than one is asked for."""
    model = Independent(SURE)
    for greedy in (dict(temperature=0.0), dict(top_k=1)):
        for prompt in ([], [1]):                              # one given token is no more than the start symbol
            if commit in ('random', 'left_to_right', 'priority'):             # their order is not the network's
                traced(model, empty(model, 2, prompt)[0], commit=commit, **greedy)
            else:
                with pytest.raises(UserError, match=f'commit={commit} without noise writes one sample again and again'):
                    traced(model, empty(model, 2, prompt)[0], commit=commit, **greedy)
        out, _, _ = traced(model, empty(model, 3, [1, 1])[0], commit=commit, **greedy)
        assert out.tolist() == [[1, 1, 0, 0]] * 3
        assert traced(model, empty(model, 1)[0], commit=commit, **greedy)[0].tolist() == [[0, 0, 0, 0]]
    if commit != 'confidence':                                # whose order alone has this noise
        traced(model, empty(model, 2)[0], commit=commit, choice_temperature=0.0)

# -----------------------------------------------------------------------------
# remask rules


def test_confidence_remembers_the_probability_at_commit_time():
    """The token looks certain ever after (p = 1), but it is doubted by what it was committed with."""
    B, p = 20000, torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    model = Independent(p.expand(4, 3))
    for rate in (1.0, 0.5):
        _, _, trace = traced(model, empty(model, B)[0], commit='left_to_right', remask='confidence', remask_rate=rate,
                             correct_share=0.0)
        again = remasked(trace, 3)
        assert not again[0].any() and again[1][:, 0].any() and not again[1][:, 1:].any()
        for token in range(3):
            rows = trace[1][:, 0] == token
            share = again[1][rows, 0].double().mean()
            assert within_noise(share, rate * (1 - p[token]), int(rows.sum()))


def test_confidence_takes_the_probability_before_the_filters():
    """Of a greedy choice too: it was as sure as the network, not as sure as the filter."""
    B, model = 4000, Independent([[0.7, 0.3]] * 4)
    _, _, trace = traced(model, empty(model, B, [0, 0])[0], commit='left_to_right', remask='confidence', correct_share=0.0,
                         steps=3, temperature=0.0)
    assert within_noise(remasked(trace, 2)[1][:, 2].double().mean(), 0.3)


def test_confidence_never_doubts_what_was_there_from_the_start():
    model = uniform(6, wrong=0.9)
    canvas, fixed = empty(model, 500, [1, 0, 1])
    fixed[:, 1:] = False                                      # visible, but not fixed
    _, _, trace = traced(model, canvas, fixed, steps=12, remask='confidence')
    again = remasked(trace, 2)
    assert not again[..., :3].any() and again[..., 3:].any((0, 1)).all()


def test_confidence_forgets_what_stood_there_before():
    """What was re-masked and written anew is doubted by its new probability."""
    B, model = 6000, Independent([[1.0, 0.0], [0.5, 0.5]])
    model.table[1] = torch.tensor([0.2, 0.8])
    _, _, trace = traced(model, empty(model, B)[0], commit='left_to_right', remask='confidence', correct_share=0.75, steps=8)
    for before, now, later in zip(trace[2:], trace[3:], trace[4:-1]):         # committed at 1, doubted at the earliest in 3
        new = (before[:, 1] == 2) & (now[:, 1] != 2)
        for token, p in ((0, 0.2), (1, 0.8)):
            rows = new & (now[:, 1] == token)
            if rows.sum() > 100:
                assert within_noise((later[rows, 1] == 2).double().mean(), 1 - p, int(rows.sum()))
        assert not (later[:, 0] == 2).any()                                   # p = 1: beyond doubt


def scheduled(n, steps, loop=False):
    """The masks after each step, of n at first, by the formulas of the paper."""
    def share(t):
        if loop:
            return 1 - 2 * t if t < 0.45 else 0.1 if t < 0.95 else 2 * (1 - t)
        return 1 - t
    return [int(n * share((step + 1) / steps) + 1e-3) for step in range(steps)]


@pytest.mark.parametrize('remdm, eta', [('cap', 0.2), ('cap', 1.0), ('rescale', 0.3), ('rescale', 1.0), ('loop', 0.05)])
def test_remdm_keeps_the_forward_marginals(remdm, eta):
    """Which are masked after a step: as many as the schedule says, and every set of that size as likely as another."""
    B, T, steps = 2000, 20, 20
    model = Independent(torch.tensor([1.0, 0.0]).expand(T, 2))
    _, nfe, trace = traced(model, empty(model, B)[0], remask='remdm', remdm=remdm, remask_rate=eta, steps=steps)
    assert (nfe == steps).all() and remasked(trace, 2).any()
    for step, left in enumerate(scheduled(T, steps, remdm == 'loop')):
        masked = trace[step + 1] == 2
        assert left or not masked.any()
        if left:
            statistic, bound = chi_square(masked.sum(0), torch.full((T,), masked.sum() / T))
            assert statistic < bound                                          # no position is preferred
        mean = masked.sum(1).double().mean().item()
        assert within_noise(masked.double().mean(0), [left / T] * T, B), f'step {step}: {mean} masks, not {left}'


@pytest.mark.parametrize('remdm, eta', [('cap', 0.3), ('rescale', 0.5)])
def test_remdm_takes_back_ends_as_often_as_text(remdm, eta):
    """Its law is that of the masks alone: where hardly anything but ends is written, these go back to masks as well."""
    B, T, steps = 1000, 12, 12
    model = Independent(torch.tensor([0.05, 0.5, 0.45]).expand(T, 3))
    canvas = empty(model, B)[0]
    often = []
    for ends in (dict(end_id=1, pad_id=2), {}):
        _, _, trace = traced(model, canvas, remask='remdm', remdm=remdm, remask_rate=eta, steps=steps, **ends)
        often.append(remasked(trace, 3)[:8].double().mean().item())            # before texts are closed
    assert often[0] == pytest.approx(often[1], rel=0.1) and often[0] > 0.01


def test_remdm_ends_each_step_with_the_masks_of_the_schedule():
    """Unless more were re-masked than that, the number is exact."""
    model = uniform(30)
    for remdm in ('cap', 'rescale', 'loop'):
        _, _, trace = traced(model, empty(model, 100)[0], remask='remdm', remdm=remdm, remask_rate=0.1)
        masks, again = (trace == 2).sum(2)[1:], remasked(trace, 2).sum(2)
        assert again.sum() > 0 and not again[-1].any()
        for step, left in enumerate(scheduled(30, 30, remdm == 'loop')):
            few = again[step] <= left
            assert (masks[step][few] == left).all() and few.double().mean() > 0.4


def test_remdm_rates_by_hand():
    left, visible = torch.tensor([0, 1, 5, 9, 10]), torch.tensor([10, 8, 5, 1, 0])
    progress, eta = torch.tensor([0.2, 0.45, 0.9, 0.95, 1.0]), 0.4
    room = [0, 1 / 8, 1, 9, 10]                               # left / visible, visible at least 1
    assert remdm_rate('cap', eta, left, visible, progress).tolist() == pytest.approx([min(eta, r) for r in room])
    assert remdm_rate('rescale', eta, left, visible, progress).tolist() == pytest.approx([eta * min(1, r) for r in room])
    inside = [False, True, True, False, False]
    expected = [min(eta, r) * i for r, i in zip(room, inside)]
    assert remdm_rate('loop', eta, left, visible, progress).tolist() == pytest.approx(expected)


def test_the_loop_holds_a_tenth_of_the_masks():
    progress = torch.linspace(0, 1, 101)
    share = masks_left(progress, 'linear', loop=True)
    assert torch.allclose(share[:46], 1 - 2 * progress[:46], atol=1e-6)
    assert torch.allclose(share[45:96], torch.tensor(0.1), atol=1e-6)
    assert share[0] == 1 and share[-1] == 0 and (share.diff() < 1e-6).all()
    assert masks_left(progress, 'linear')[30].item() == pytest.approx(0.7)
    assert masks_left(progress, 'cosine')[30].item() == pytest.approx(math.cos(0.15 * math.pi))
    model = uniform(40)
    _, nfe, trace = traced(model, empty(model, 20)[0], remask='remdm', remdm='loop', remask_rate=0.03)
    masks, again = (trace == 2).sum(2)[1:], remasked(trace, 2)
    held = [step for step in range(40) if 0.45 <= (step + 1) / 40 < 0.95]
    assert (masks[held] >= 4).all() and masks[held].double().mean() < 4.3 and (nfe == 40).all()
    assert again[held].any() and not again[:held[0]].any() and not again[held[-1] + 1:].any()


def test_displaced_by_hand():
    """4 masked and visible ones compete for 2 places: -0.1 (masked), -0.3 (visible), -0.7 (masked), -2 (visible)."""
    score = torch.tensor([[-0.1, 0.0, -0.7, 0.0, -0.05]])
    stay = torch.tensor([[0.0, -0.3, 0.0, -2.0, -9.0]])
    masked, visible = torch.tensor([[1, 0, 1, 0, 0]]).bool(), torch.tensor([[0, 1, 0, 1, 0]]).bool()  # the fifth one is fixed
    for left, gone in ((0, [0, 0, 0, 0, 0]), (1, [0, 0, 0, 1, 0]), (2, [0, 0, 0, 1, 0]), (3, [0, 1, 0, 1, 0]),
                       (4, [0, 1, 0, 1, 0])):
        assert displaced(score, masked, stay, visible, torch.tensor([left])).tolist() == [[bool(x) for x in gone]], left
    # nobody doubts it: no candidate is better, even one of score 0 or more
    assert not displaced(torch.full((1, 5), 3.0), masked, torch.zeros(1, 5), visible, torch.tensor([2])).any()


def test_p2_where_tokens_are_impossible():
    """Their score is the worst there is, and yet no more of them lose their place than have to; what is fixed takes none."""
    class Certain(Independent):
        def __call__(self, idx, causal=False, previous=None, cache=None):          # what it did not write itself has p = 0
            hidden = super().__call__(idx)
            hidden[..., :2] = torch.tensor([0.0, -1e9])
            return hidden
    model = Certain(torch.tensor([1.0, 0.0]).expand(8, 2))
    canvas = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2]]).repeat(20, 1)
    fixed = torch.arange(8).expand(20, 8) < 2
    _, _, trace = traced(model, canvas, fixed, remask='p2', temperature=0.0)  # 2 masks: one is left after the first step
    assert ((trace[1] == 2).sum(1) == 1).all() and torch.equal(trace[1][:, 6:], torch.zeros(20, 2, dtype=torch.long))
    assert (remasked(trace, 2)[0].sum(1) == 1).all()


def test_p2_trades_doubted_tokens_for_better_candidates():
    """One step: 3 masks become 2, so that of 4 tokens and candidates 2 stay visible, the best two by their scores."""
    model = Independent([[0.5, 0.5], [0.5, 0.5], [0.8, 0.2], [0.9, 0.1], [1.0, 0.0], [1.0, 0.0]],
                        wrong=[0.7, 0.0, 0.0, 0.0, 0.0, 0.0])
    canvas = torch.tensor([[0, 2, 2, 2, 0, 0]]).repeat(20, 1)
    fixed = torch.arange(6).expand(20, 6) > 3
    # log(1 - 0.7) = -1.2 is worse than log 0.9 = -0.11 and log 0.8 = -0.22; a tenth of it is between them
    for rate, visible in ((1.0, [2, 2, 0, 0, 0, 0]), (0.15, [0, 2, 2, 0, 0, 0]), (0.01, [0, 2, 2, 0, 0, 0]),
                          (0.0, [0, 2, 2, 0, 0, 0])):
        _, _, trace = traced(model, canvas, fixed, commit='confidence', choice_temperature=0.0, temperature=0.0, remask='p2',
                             remask_rate=rate)
        assert trace[1].tolist() == [visible] * 20, rate


@pytest.mark.parametrize('commit', ['random', 'entropy', 'threshold', 'margin', 'priority'])
def test_p2_keeps_what_is_hardly_doubted(commit):
    """Coin flips do not take the place of tokens that are as good as certain, in whatever terms a commit rule scores them."""
    model = uniform(12, wrong=1e-4)
    _, _, trace = traced(model, empty(model, 50)[0], remask='p2', commit=commit, priority=(1,))
    assert remasked(trace, 2).sum() < 0.05 * 50 * 12


def test_p2_ends_each_step_with_the_masks_of_the_schedule():
    T, B = 12, 100
    model = uniform(T, wrong=0.6)
    for schedule, steps in (('linear', 12), ('linear', 4), ('cosine', 6)):
        _, nfe, trace = traced(model, empty(model, B)[0], remask='p2', steps=steps, schedule=schedule)
        left = [int(T * (1 - s / steps if schedule == 'linear' else math.cos(s / steps * math.pi / 2)) + 1e-3)
                for s in range(1, steps + 1)]
        assert [(x == 2).sum(1).unique().tolist() for x in trace[1:]] == [[n] for n in left]
        assert remasked(trace, 2).any() and (nfe == steps).all()


def test_doubted_by_hand():
    doubt = torch.tensor([[0.9, 0.1, 0.5, 0.95, 0.3, 0.51], [0.2, 0.2, 0.2, 0.2, 0.2, 0.2]])
    where = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    # exceeds, not reaches; rate has no say without the ratio
    more = doubted(doubt, where, 1.0, seeded(), threshold=0.5)
    assert more.tolist() == [[True, False, False, False, False, True], [False] * 6]
    for share in (0.0, 0.2, 0.5, 0.7, 1.0):
        order = [0, 5, 2, 4, 1]
        taken = doubted(doubt, where, 1.0, seeded(), share=share)
        assert taken[0].nonzero()[:, 0].tolist() == sorted(order[:round(5 * share)]), share
        assert taken[1].sum() == round(5 * share) and not (taken & ~where).any()
    for ratio, sure in ((0.4, 3), (0.0, 5), (1.0, 0)):                        # of 5 of 10: so many by doubt, the rest at random
        doubt, where = torch.linspace(0, 1, 10).expand(500, 10), torch.ones(500, 10).bool()
        taken = doubted(doubt, where, 1.0, seeded(), share=0.5, random_ratio=ratio)
        assert (taken.sum(1) == 5).all() and (taken[:, 10 - sure:].all() if sure else taken.any(0).all())
    assert not doubted(doubt, torch.zeros(500, 10).bool(), 1.0, seeded(), share=0.9).any()


def test_doubted_is_drawn_with_the_chance_that_it_says():
    B, doubt = 20000, torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    for rate, ratio, threshold, chance in ((1.0, 0.0, None, doubt), (0.5, 0.0, None, 0.5 * doubt),
                                           (0.5, 0.3, None, 0.35 * doubt + 0.15),
                                           (0.5, 1.0, None, torch.full((4,), 0.5)),
                                           (0.4, 0.25, 0.5, torch.tensor([0.1, 0.1, 0.85, 0.85]))):
        taken = doubted(doubt.expand(B, 4), torch.ones(B, 4).bool(), rate, seeded(), random_ratio=ratio, threshold=threshold)
        assert within_noise(taken.double().mean(0), chance, B)
    rates = torch.tensor([[0.0], [1.0]])                                      # remdm has one for each row
    assert doubted(torch.ones(2, 3), torch.ones(2, 3).bool(), rates, seeded()).tolist() == [[False] * 3, [True] * 3]


def test_shares_of_a_schedule():
    assert share_at(None, 0.5) is None and share_at((0.3, 0.1), 0.0) == 0.3 and share_at((0.0, 0.0), 0.7) == 0
    assert share_at((0.3, 0.1), 1.0) == pytest.approx(0.1) and share_at((0.1, 0.5), 0.25) == pytest.approx(0.2)


def test_remask_schedule_goes_from_the_first_share_to_the_second():
    """On a complete canvas that nobody trusts, every step: round(share * visible), the most doubted of the visible ones."""
    T, steps, wrong = 40, 9, torch.rand(40, generator=seeded(3)).double()
    model = uniform(T, wrong=wrong)
    for shares in ((0.413, 0.0), (0.051, 0.449), (0.2503, 0.2503)):        # no count is half a token
        _, nfe, trace = traced(model, *visible_canvas(model, 3), steps=steps, remask='wrong', remask_schedule=shares)
        assert len(trace) == steps + 1 and (nfe == steps).all()
        for step, again in enumerate(remasked(trace, 2)):
            share = shares[0] + (shares[1] - shares[0]) * step / (steps - 2)   # the last step re-masks nothing
            for row, taken in zip(trace[step], again):
                visible = (row != 2).nonzero()[:, 0].tolist()
                count = round(share * len(visible)) if step < steps - 1 else 0
                assert set(taken.nonzero()[:, 0].tolist()) == set(sorted(visible, key=lambda i: -wrong[i])[:count])


def test_remask_schedule_of_a_rule_that_doubts_all_alike_takes_any():
    """random has no favourites: each position is taken as often as another."""
    T, B = 8, 3000
    model = uniform(T)
    _, _, trace = traced(model, *visible_canvas(model, B), steps=3, remask='random', remask_schedule=(0.5, 0.5))
    taken = remasked(trace, 2)[0]
    statistic, bound = chi_square(taken.sum(0), torch.full((T,), B / 2))
    assert (taken.sum(1) == 4).all() and statistic < bound


@pytest.mark.parametrize('remask', ['none', 'remdm', 'p2', 'causal'])
def test_thresholds_and_schedules_of_rules_that_have_none_are_refused(remask):
    model = uniform(4)
    for how in (dict(remask_threshold=0.5), dict(remask_schedule=(0.3, 0.1))):
        with pytest.raises(UserError, match=f'remask_threshold and remask_schedule are for .*, not for {remask}'):
            traced(model, empty(model, 2)[0], remask=remask, **how)


@pytest.mark.parametrize('remask', ['wrong', 'random'])
def test_a_threshold_doubts_a_position_once(remask):
    """Token 1 is always written where it is masked, and always doubted: no position goes back twice, and the row is done."""
    T, doubt = 6, torch.tensor([0.1, 0.9])
    model = Independent(torch.tensor([0.0, 1.0]).expand(T, 2), wrong=doubt.expand(T, 2))
    canvas = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]]).repeat(50, 1)
    fixed = torch.zeros_like(canvas).bool()
    fixed[:, 5] = True
    out, nfe, trace = traced(model, canvas, fixed, steps=20, remask=remask, remask_threshold=0.5, remask_rate=0.3)
    again = remasked(trace, 2).sum(0)                                         # (B, T) how often
    assert again.max() == 1 and not again[:, 5].any()
    if remask == 'wrong':
        assert torch.equal(again.bool(), (canvas == 1) & ~fixed) and (out[:, :5] == canvas[:, :5]).all()
        assert (nfe[0::3] == 1).all()                                         # without a doubt the first look is the last
        assert (nfe[1::3] == 2).all() and (nfe[2::3] == 2).all()              # one to doubt, one to fill in
    else:
        assert nfe.max() < 20


def test_spare_lengths_by_hand():
    """End 8 and padding 9 get the mean doubt of the visible text; what is not looked at does not count."""
    x = torch.tensor([[1, 2, 3, 8, 9, 9], [8, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 6]])
    doubt = torch.tensor([[0.2, 0.8, 0.4, 0.01, 0.02, 0.03], [0.5] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    where = torch.ones_like(x).bool()
    where[0, 1], where[0, 5] = False, False                                   # a mask, and a fixed padding
    spared = spare_lengths(doubt, x, where, 8, 9)
    assert spared[0].tolist() == pytest.approx([0.2, 0.8, 0.4, 0.3, 0.3, 0.03])
    assert spared[1].tolist() == [0.0] * 6                                    # no text that could be doubted
    assert torch.equal(spared[2], doubt[2]) and torch.equal(spare_lengths(doubt, x, where, None, None), doubt)


@pytest.mark.parametrize('rules', [dict(remask='wrong'), dict(remask='wrong', remask_rate=0.5), dict(remask='confidence')],
                         ids=str)
def test_the_end_is_doubted_as_much_as_the_text(rules):
    """Ends that the network is sure of go back to [MASK] as often as the text on average, so that texts do not shrink."""
    B, T, end, pad = 6000, 6, 2, 3
    wrong = torch.tensor([0.5, 0.7, 0.0, 0.0]).expand(T, 4)                   # of tokens 0, 1, the end and the padding
    model = Independent(torch.full((T, 4), 0.25), wrong=wrong)
    canvas, fixed = torch.tensor([[0, 1, 0, end, pad, pad]]).repeat(B, 1), torch.zeros(B, T).bool()
    mean, rate = (0.5 + 0.7 + 0.5) / 3, rules.get('remask_rate', 1.0)
    _, _, trace = generate_diffusion(model, canvas, fixed, steps=2, trace=True, end_id=end, pad_id=pad, generator=seeded(),
                                     **rules)
    expected = [0.5, 0.7, 0.5, mean, mean, mean] if rules['remask'] == 'wrong' else [0.0] * T
    assert within_noise((trace[1] == 4).double().mean(0), [rate * p for p in expected], B)

# -----------------------------------------------------------------------------
# what holds whatever the network says

REMASKS = dict(
    none=dict(), random=dict(remask='random'), wrong=dict(remask='wrong'), confidence=dict(remask='confidence'),
    cap=dict(remask='remdm'), rescale=dict(remask='remdm', remdm='rescale'), loop=dict(remask='remdm', remdm='loop'),
    p2=dict(remask='p2'),
    doubts=dict(remask='wrong', remask_threshold=0.6), doubted_confidence=dict(remask='confidence', remask_threshold=0.6),
    shares=dict(remask='wrong', remask_schedule=(0.7, 0.1), remask_random_ratio=0.5),
    lucky=dict(remask='random', remask_schedule=(0.4, 0.4)))


@pytest.mark.parametrize('remask', REMASKS)
@pytest.mark.parametrize('commit', COMMIT_RULES)
def test_rules_that_no_combination_breaks(commit, remask):
    """What is fixed stays, no mask is left, no special id is written, in no more steps than were given."""
    V, T = 5, 8
    model = stubborn_gpt(V, T)
    for steps, block_length, judged in ((1, None, False), (3, 3, False), (T, None, remask in ('wrong', 'p2', 'doubts')),
                                        (T + 5, 2, False)):
        canvas, fixed = starting_canvas(V, T, False, seed=steps)
        before = canvas.clone()
        out, nfe, trace = generate_diffusion(
            model, canvas, fixed, steps=steps, commit=commit, block_length=block_length, commit_threshold=0.4, priority=(1, 2),
            trace=True, remask_model=tiny_gpt(V, T, seed=9) if judged else None, generator=seeded(steps),
            **{'remask_rate': 0.7, **REMASKS[remask]})
        assert torch.equal(canvas, before) and out.min() >= 0 and out.max() < V
        assert all(torch.equal(x[fixed], before[fixed]) and ((x >= 0) & (x <= V)).all() for x in trace)
        assert torch.equal(trace[0], before) and torch.equal(trace[-1], out)
        assert len(trace) - 1 <= steps and nfe.max() <= steps * (1 + judged) and (judged or nfe.max() == len(trace) - 1)
        again = remasked(torch.stack(trace), V)
        assert not again[-1].any()
        if remask not in ('loop', 'p2', 'cap', 'rescale', 'doubted_confidence'):    # which may find nothing to do
            assert bool(again.any()) == (remask != 'none' and steps > 1)


@pytest.mark.parametrize('remask', REMASKS)
def test_nothing_ends_a_text_whose_end_is_fixed(remask):
    """Where the end token is fixed, no start, end or padding is drawn left of it; where it is not, an end may be."""
    V, T, bos, end, pad = 6, 9, 3, 4, 5
    model = tiny_gpt(V, T, n_recur=1)
    with torch.no_grad():
        model.wte.weight[bos:pad + 1] *= 20                                   # a network in love with them
    generator = seeded(1)
    canvas = torch.randint(3, (40, T), generator=generator).masked_fill(torch.rand(40, T, generator=generator) < 0.6, V)
    canvas[:, 0] = bos
    closed = torch.arange(40) < 20
    canvas[:20, 6], canvas[:20, 7:] = end, pad
    canvas[20:, 6:] = V
    fixed = canvas != V
    how = dict(end_id=end, pad_id=pad, forbid=(bos, end, pad), steps=6, commit_threshold=0.4, priority=(end, 0),
               **REMASKS[remask])
    ends = 0
    for commit in COMMIT_RULES:
        out, _, trace = generate_diffusion(model, canvas, fixed, commit=commit, trace=True, generator=seeded(), **how)
        assert all((x[closed, 1:6] < 3).logical_or(x[closed, 1:6] == V).all() for x in trace) and (out[closed, 1:6] < 3).all()
        assert torch.equal(out[:20, 6:], canvas[:20, 6:]) and (out < V).all()
        ends += int((out[~closed, 1:] >= 3).sum())
        assert (out[20:, 1:6][left_of(fixed)[20:, 1:6]] < 3).all()            # nor within what is given of a text that goes on
    assert ends > 0                                                           # it would have, had it been let

# -----------------------------------------------------------------------------
# the draft head


class HeadOracle(Oracle):
    """
    An oracle with a draft head. Its hidden states say which prefix it has read, one-hot, and survive a norm.

    law (V^T,): of the causal pass, its only one. head: 'perfect' goes on to what the causal pass will say; 'junk' answers
    with a law that depends on the last token alone and has nothing to do with the other.
    """

    def __init__(self, V, T, law, head):
        super().__init__(V, T, law)
        self.drafter, rows = head, []
        for i in range(T):
            joint = law.view(V ** (i + 1), -1).sum(1).view(-1, V)             # (V^i, V)
            rows.append(joint / joint.sum(1, keepdim=True))
        rows.append(torch.full((V ** T, V), 1 / V, dtype=torch.float64))      # behind the end, where nothing counts
        self.junk = sum(map(len, rows))
        rows.append(torch.tensor([[0.8, 0.1, 0.1], [0.05, 0.9, 0.05], [0.3, 0.1, 0.6]], dtype=torch.float64)[:V, :V])
        self.answers = torch.cat(rows)

    def state(self, node):
        return F.one_hot(node.clamp(max=len(self.answers) - 1), len(self.answers)).double()

    def __call__(self, idx, causal=False, previous=None, cache=None):
        assert causal, 'with a draft head there is no need for a bidirectional pass'
        self.seen.append((idx.clone(), causal))
        node = [torch.zeros(len(idx), dtype=torch.long)]
        for token in idx[:, :-1].T:
            node.append(node[-1] * self.V + 1 + token.clamp(max=self.V - 1))
        return self.state(torch.stack(node, 1))

    def draft(self, state, ids):
        if self.drafter == 'junk':
            return self.state(self.junk + ids)
        return self.state((state.argmax(1) * self.V + 1 + ids).clamp(max=self.junk - 1))

    def logits(self, hidden, real_only=False):
        logits = F.pad(self.answers[hidden.argmax(-1)].log(), (0, 2), value=-30.0)
        return logits.masked_fill(torch.arange(self.V + 2) >= self.V, float('-inf')) if real_only else logits


@pytest.mark.parametrize('head', ['junk', 'perfect'])
@pytest.mark.parametrize('window', [1, 2, 16])
@pytest.mark.parametrize('filters', [dict(), dict(temperature=0.7), dict(top_k=2), dict(temperature=1.5, top_k=2)], ids=str)
def test_drafts_of_a_head_follow_the_causal_law(monkeypatch, window, filters, head):
    """Whatever the head says, from where it says it, and never by more than one pass a token."""
    monkeypatch.setattr(sample, 'DRAFT_WINDOW', window)
    B, V, T = 5000, 3, 4
    law = random_law(V, T, seed=4)
    oracle = HeadOracle(V, T, law, head)
    out, nfe, _ = generate_diffusion(oracle, *empty(oracle, B), remask='causal', generator=seeded(), **filters)
    statistic, bound = distance(out, V, filtered_law(law, V, T, **{'temperature': 1.0, **filters}), B)
    assert statistic < bound
    assert nfe.max() <= T and nfe.min() >= 1 + math.ceil((T - 1) / (min(window, T) + 1)) and nfe.max() == len(oracle.seen)
    if head == 'junk':
        assert len(nfe.unique()) > 1                                          # some drafts are accepted, others are not


def test_perfect_drafts_of_a_head_save_passes(monkeypatch):
    """The first pass has no draft to look at and gives one token; every other one gives its window and one more."""
    V, T = 2, 8
    oracle = HeadOracle(V, T, random_law(V, T, seed=4), 'perfect')
    for window in (1, 2, 3, 7, 8, 16):
        monkeypatch.setattr(sample, 'DRAFT_WINDOW', window)
        for given in (0, 1, 5, 7):
            _, nfe, trace = generate_diffusion(oracle, *empty(oracle, 50, [1] * given), remask='causal', trace=True,
                                               generator=seeded())
            n = T - given
            assert (nfe == 1 + math.ceil((n - 1) / (min(window, T) + 1))).all(), (window, given)
            assert ((trace[1] == V).sum(1) == n - 1).all()


def test_drafts_of_a_head_where_rows_have_prompts_of_their_own():
    """Rows go on at different places and leave at different times; each keeps its own draft."""
    B, V, T = 2500, 3, 4
    law = random_law(V, T, seed=4)
    oracle = HeadOracle(V, T, law, 'junk')
    prompts = ([], [2], [0, 1], [0, 1, 2], [1, 1, 1, 1])
    canvas = torch.stack([empty(oracle, B, prompt)[0] for prompt in prompts], 1).flatten(0, 1)   # taking turns
    out, nfe, _ = generate_diffusion(oracle, canvas, canvas != V, remask='causal', generator=seeded())
    for i, prompt in enumerate(prompts[:4]):
        fits = (all_sequences(V, T)[:, :len(prompt)] == torch.tensor(prompt, dtype=torch.long)).all(1)
        statistic, bound = distance(out[i::5], V, law * fits / (law * fits).sum(), B)
        assert statistic < bound
    assert torch.equal(out[4::5], canvas[4::5]) and (nfe[4::5] == 0).all() and (nfe[3::5] == 1).all()


def test_drafts_of_a_head_with_an_end_token():
    """Drafted padding and ends follow the law of the texts as well."""
    B, V, T, end, pad = 10000, 3, 4, 1, 2
    law = random_law(V, T, seed=7)
    oracle = HeadOracle(V, T, law, 'junk')
    out, _, _ = generate_diffusion(oracle, *empty(oracle, B), remask='causal', end_id=end, pad_id=pad, generator=seeded())
    expected = text_law(law, V, T, end)
    counts = dict.fromkeys(expected, 0)
    for x in out.tolist():
        counts[tuple(x[:x.index(end) + 1] if end in x else x)] += 1
    statistic, bound = chi_square(list(counts.values()), [B * p for p in expected.values()])
    assert statistic < bound


def test_greedy_drafts_of_a_head_write_what_greedy_sampling_writes():
    oracle = HeadOracle(3, 5, random_law(3, 5, seed=4), 'junk')
    out, _, _ = generate_diffusion(oracle, *empty(oracle, 4), remask='causal', temperature=0.0, generator=seeded())
    node, text = 0, []
    for _ in range(5):
        text.append(int(oracle.answers[node].argmax()))
        node = 3 * node + 1 + text[-1]
    assert out.tolist() == [text] * 4


@pytest.mark.parametrize('window', [2, 16])
def test_a_network_with_a_draft_head_follows_its_causal_law(monkeypatch, window):
    """The real one, untrained: its law is the exponential of its own causal_nll, over every sequence."""
    monkeypatch.setattr(sample, 'DRAFT_WINDOW', window)
    B, V, T = 8000, 3, 4
    model, x = tiny_gpt(V, T, draft_head=True, seed=5), all_sequences(V, T)
    law = (-causal_nll(model, x, torch.ones_like(x).bool())).double().exp()
    canvas = torch.full((B, T), V)
    out, nfe, _ = generate_diffusion(model, canvas, canvas != V, remask='causal', generator=seeded())
    statistic, bound = distance(out, V, law / law.sum(), B)
    assert statistic < bound and nfe.max() <= T and nfe.double().mean() < T - 0.2
