"""
The rules of the sampling loop: what the remask rules take back, and what no combination of rules breaks.

Most networks here know a law exactly (see oracles.py), so that whatever is missing is the rules' own fault.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARITHMETIC, seeded, tiny_gpt
from oracles import (
    Independent, remasked, starting_canvas, stubborn_gpt, traced, uniform, within_noise)
from test_sample import fits, from_empty

import sample
from plumbing.rows import Ends, left_of
from sample import COMMIT, USUAL, How, by_doubt, generate, p2, remdm, spare_lengths


def fake_look(visible, masked=None, *, x=None, left=None, step=0, steps=9, ends=Ends(), **rules):
    """As much of a Look at visible (R, T) as the remask rules need."""
    run = SimpleNamespace(steps=steps, generator=seeded(), tried=torch.zeros_like(visible), ends=ends,
                          rows=torch.arange(len(visible)))
    return SimpleNamespace(run=run, how=How(**{**USUAL, 'remask': 'wrong', **rules}), step=step, last=False,
                           visible=visible, masked=~visible if masked is None else masked, left=left,
                           x=visible.long() if x is None else x)


# -----------------------------------------------------------------------------
# doubt: how much of it is needed

DOUBT = torch.tensor([[0.9, 0.1, 0.5, 0.95, 0.3, 0.51], [0.2, 0.2, 0.2, 0.2, 0.2, 0.2]])
VISIBLE = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()


def test_doubts_over_a_threshold_by_hand():
    """It is exceeded, not reached, each position once, and the rate has no say without the random ratio."""
    look = fake_look(VISIBLE, remask_threshold=0.5, remask_rate=0.01)
    taken = [by_doubt(look, doubt).int().tolist() for doubt in (DOUBT, DOUBT, torch.ones(2, 6))]
    assert taken == [[[1, 0, 0, 0, 0, 1], [0] * 6], [[0] * 6] * 2, [[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 0]]]


def test_shares_by_hand():
    for share in (0.0, 0.2, 0.5, 0.7, 1.0):
        taken = by_doubt(fake_look(VISIBLE, remask_schedule=(share, share)), DOUBT)
        assert taken[0].nonzero()[:, 0].tolist() == sorted([0, 5, 2, 4, 1][:round(5 * share)]), share
        assert taken[1].sum() == round(5 * share) and not (taken & ~VISIBLE).any()
    nothing = fake_look(torch.zeros(2, 6).bool(), remask_schedule=(0.9, 0.9))
    assert not by_doubt(nothing, DOUBT).any()


@pytest.mark.parametrize('rules, sure', [(dict(remask_random_ratio=0.4), 3), (dict(), 5),
                                         (dict(remask_random_ratio=1.0), 0), (dict(remask='random'), 0)])
def test_shares_partly_at_random(rules, sure):
    """Of 10 tokens 5 are taken: some by their doubt, the rest at random, as often here as there."""
    doubt, B = torch.linspace(0, 1, 10).expand(2000, 10), 2000
    taken = by_doubt(fake_look(doubt >= 0, remask_schedule=(0.5, 0.5), **rules), doubt)
    assert (taken.sum(1) == 5).all() and taken[:, 10 - sure:].all()
    if sure == 0:
        assert fits(taken.sum(0), torch.full((10,), B / 2))
    elif sure < 5:
        assert taken.any(0).all()


def test_shares_go_from_the_first_to_the_second():
    """By step of 6 that re-mask, the last of 7 does not."""
    doubt = torch.arange(20).expand(1, 20) / 20
    for steps, counts in ((7, [10, 9, 8, 7, 6, 5]), (1, [10])):
        looks = [fake_look(doubt >= 0, step=step, steps=steps, remask_schedule=(0.5, 0.25))
                 for step in range(len(counts))]
        assert [by_doubt(look, doubt).sum() for look in looks] == counts


D = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)


@pytest.mark.parametrize('rules, chance', [
    (dict(), D), (dict(remask_rate=0.5), 0.5 * D),
    (dict(remask_rate=0.5, remask_random_ratio=0.3), 0.35 * D + 0.15),
    (dict(remask_rate=0.5, remask_random_ratio=1.0), [0.5] * 4),
    (dict(remask_rate=0.4, remask_random_ratio=0.25, remask_threshold=0.5), [0.1, 0.1, 0.85, 0.85]),
    (dict(remask='random'), [0.3] * 4), (dict(remask='random', remask_rate=0.6), [0.6] * 4),
    (dict(remask_patience=2.0), D),                            # everything is visible
    (dict(remask_rate=0.5, remask_patience=1.0, half=True), 0.5 * D ** 2),
    (dict(remask_patience=2.0, half=True), D ** 4)], ids=str)
def test_doubts_are_drawn_with_the_chance_that_they_say(rules, chance):
    """half: four masks stand beside the four tokens, and patience makes powers of the doubts."""
    B, rules = 20000, dict(rules)
    visible = torch.arange(8 if rules.pop('half', False) else 4).expand(B, -1) < 4
    doubt = F.pad(D, (0, visible.size(1) - 4), value=1.0).expand(B, -1)
    taken = by_doubt(fake_look(visible, **rules), doubt)
    assert within_noise(taken[:, :4].double().mean(0), chance, B) and not taken[:, 4:].any()


@pytest.mark.parametrize('remask', ['wrong', 'random'])
def test_a_threshold_doubts_a_position_once(remask):
    """Token 1 fills every hole, and is always doubted: no position goes back twice, the row is done."""
    T, doubt = 6, torch.tensor([0.1, 0.9])
    model = Independent(torch.tensor([0.0, 1.0]).expand(T, 2), wrong=doubt.expand(T, 2))
    canvas = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]]).repeat(50, 1)
    fixed = torch.arange(T).expand(150, T) == 5
    out, nfe, trace = traced(model, canvas, fixed, steps=20, remask=remask, remask_threshold=0.5,
                             remask_rate=0.3)
    again = remasked(trace, 2).sum(0)                          # (B, T) how often
    assert again.max() == 1 and not again[:, 5].any() and nfe.max() < 20
    if remask == 'wrong':
        assert torch.equal(again.bool(), (canvas == 1) & ~fixed) and (out[:, :5] == canvas[:, :5]).all()
        assert nfe.view(50, 3).unique(dim=0).tolist() == [[1, 2, 2]]       # to doubt, and to fill in


@pytest.mark.parametrize('remask', ['wrong', 'random'])
def test_texts_are_doubted_only_when_they_are_full(remask):
    """With remask_full a row gives tokens back in the step after it was full, and in no other."""
    T = 5
    model = Independent(torch.tensor([0.5, 0.5]).expand(T, 2), wrong=torch.full((T, 2), 0.6))
    canvas = torch.full((60, T), 2)
    out, _, trace = traced(model, canvas, canvas < 2, steps=24, remask=remask, remask_full=True)
    for before, after in zip(trace, trace[1:]):
        again = ((before != 2) & (after == 2)).any(1)
        assert not (again & (before == 2).any(1)).any()
    assert not (out == 2).any() and remasked(trace, 2).any()
    _, _, trace = traced(model, canvas, canvas < 2, steps=24, remask='wrong')
    assert any(((a == 2) & (b != 2)).any(1)[(b == 2).any(1)].any() for b, a in zip(trace, trace[1:]))


@pytest.mark.parametrize('rule', [*sample.DOUBT, *sample.OTHER_RULES])
def test_the_last_step_doubts_nothing(rule):
    """And it does not even ask."""
    look = fake_look(torch.ones(2, 3).bool(), remask=rule)
    look.last = True
    assert not sample.taken_back(look, None).any()


# -----------------------------------------------------------------------------
# the lengths of texts

def test_spare_lengths_by_hand():
    """End 8 and padding 9 get the mean doubt of the visible text; what is not looked at does not count."""
    x = torch.tensor([[1, 2, 3, 8, 9, 9], [8, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 6]])
    doubt = torch.tensor([[0.2, 0.8, 0.4, 0.01, 0.02, 0.03], [0.5] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    visible = torch.ones_like(x).bool()
    visible[0, 1], visible[0, 5] = False, False                # a mask, and a fixed padding
    spared = spare_lengths(fake_look(visible, x=x, ends=Ends(8, 9)), doubt)
    assert spared[0].tolist() == pytest.approx([0.2, 0.8, 0.4, 0.3, 0.3, 0.03])
    assert spared[1].tolist() == [0.0] * 6                     # no text that could be doubted
    assert torch.equal(spared[2], doubt[2])
    assert torch.equal(spare_lengths(fake_look(visible, x=x), doubt), doubt)


@pytest.mark.parametrize('rules', [dict(remask='wrong'), dict(remask='wrong', remask_rate=0.5),
                                   dict(remask='confidence')], ids=str)
def test_the_end_is_doubted_as_much_as_the_text(rules):
    """Ends that the network is sure of are re-masked as often as the text on average: texts do not shrink."""
    B, T, end, pad = 6000, 6, 2, 3
    wrong = torch.tensor([0.5, 0.7, 0.0, 0.0]).expand(T, 4)    # of tokens 0, 1, the end and the padding
    model = Independent(torch.full((T, 4), 0.25), wrong=wrong)
    canvas, fixed = torch.tensor([[0, 1, 0, end, pad, pad]]).repeat(B, 1), torch.zeros(B, T).bool()
    _, _, trace = traced(model, canvas, fixed, steps=2, ends=Ends(end, pad), **rules)
    mean, rate = (0.5 + 0.7 + 0.5) / 3, rules.get('remask_rate', 1.0) * (rules['remask'] == 'wrong')
    expected = [rate * p for p in (0.5, 0.7, 0.5, mean, mean, mean)]
    assert within_noise((trace[1] == 4).double().mean(0), expected, B)


# -----------------------------------------------------------------------------
# remdm

@pytest.mark.parametrize('kind', ['cap', 'rescale'])
def test_remdm_by_hand(kind):
    """Each row has its probability: left / visible, at most eta; or eta times that. Never more than left."""
    eta, B, left = 0.4, 4000, torch.tensor([0, 1, 5, 20])
    visible = torch.arange(20) < torch.tensor([[10], [8], [5], [1]])
    expected = [min(eta, r) if kind == 'cap' else eta * min(1, r) for r in (0, 1 / 8, 1, 20)]
    look = fake_look(visible.repeat(B, 1), left=left.repeat(B), remask='remdm', remdm=kind, remask_rate=eta)
    again = remdm(look, None)                                  # (4B, 20)
    assert not (again & ~look.visible).any() and (again.sum(1) <= look.left).all()
    for row in (0, 2, 3):                                      # where left does not cut what was drawn
        assert within_noise(again[row::4][:, visible[row]].double().mean(0), expected[row], B)
    assert within_noise(again[1::4].any(1).double().mean(), 1 - (1 - expected[1]) ** 8, B)


@pytest.mark.parametrize('kind, eta', [('cap', 0.2), ('cap', 1.0), ('rescale', 0.3), ('rescale', 1.0)])
def test_remdm_keeps_the_forward_marginals(kind, eta):
    """Masks after a step: as many as the schedule says, and every position as likely as another."""
    B, T = 2000, 12
    how = dict(steps=T, remask='remdm', remdm=kind, remask_rate=eta)
    _, nfe, trace = from_empty(Independent(torch.tensor([1.0, 0.0]).expand(T, 2)), B, **how)
    assert (nfe == T).all() and remasked(trace, 2).any() and not remasked(trace, 2)[-1].any()
    for left, masked in zip(range(T, -1, -1), trace == 2):
        assert (masked.sum(1) == left).all() and within_noise(masked.double().mean(0), [left / T] * T, B)


@pytest.mark.parametrize('kind, eta', [('cap', 0.3), ('rescale', 0.5)])
def test_remdm_takes_back_ends_as_often_as_text(kind, eta):
    """Its law is about masks alone: where hardly anything but ends is written, these go back as well."""
    model, often = Independent(torch.tensor([0.05, 0.5, 0.45]).expand(12, 3)), []
    for ends in (Ends(1, 2), Ends()):
        _, _, trace = from_empty(model, 1000, steps=12, ends=ends, remask='remdm', remdm=kind,
                                 remask_rate=eta)
        often.append(remasked(trace, 3)[:8].double().mean().item())        # before texts are closed
    assert often[0] == pytest.approx(often[1], rel=0.1) and often[0] > 0.01


# -----------------------------------------------------------------------------
# p2

def test_p2_by_hand(monkeypatch):
    """Four compete: -0.1 (masked), -0.3 (visible), -0.7 (masked), -2 (visible); the fifth is fixed."""
    score = torch.tensor([[-0.1, 0.0, -0.7, 0.0, -0.05]], dtype=torch.float64)
    stay = torch.tensor([[0.0, -0.3, 0.0, -2.0, -9.0]], dtype=torch.float64)
    masked, visible = torch.tensor([[1, 0, 1, 0, 0]]).bool(), torch.tensor([[0, 1, 0, 1, 0]]).bool()

    def gone(left, score=score, **rules):
        look = fake_look(visible, masked, left=torch.tensor([left]), remask='p2', **rules)
        return p2(look, score)[0].nonzero()[:, 0].tolist()
    monkeypatch.setattr(sample, 'wrong', lambda look: 1 - stay.exp())
    assert [gone(left) for left in range(5)] == [[], [3], [3], [1, 3], [1, 3]]
    assert gone(2, remask_rate=3.0) == [1, 3]                  # -0.9 and -6
    assert gone(2, remask_rate=0.1) == [3] and gone(2, remask_rate=0.0) == []      # -0.03 and -0.2

    # nobody doubts it: no candidate is better, even one of score 0 or more
    monkeypatch.setattr(sample, 'wrong', lambda look: torch.zeros(1, 5))
    assert gone(2, torch.full((1, 5), 3.0)) == []


def test_p2_where_tokens_are_impossible():
    """They score the worst there is, yet no more of them go than have to; fixed tokens take no place."""
    class Certain(Independent):
        def __call__(self, idx, causal=False, cache=None):     # what it did not write itself has p = 0
            hidden = super().__call__(idx)
            hidden[..., :2] = torch.tensor([0.0, -1e9])
            return hidden
    model = Certain(torch.tensor([1.0, 0.0]).expand(8, 2))
    canvas = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2]]).repeat(20, 1)
    fixed = torch.arange(8).expand(20, 8) < 2
    _, _, trace = traced(model, canvas, fixed, remask='p2', temperature=0.0)
    assert ((trace[1] == 2).sum(1) == 1).all()                 # 2 masks: one is left after the first step
    assert (trace[1][:, 6:] == 0).all() and (remasked(trace, 2)[0].sum(1) == 1).all()


@pytest.mark.parametrize('commit', ['random', 'left', 'entropy', 'threshold', 'margin', 'priority'])
def test_p2_keeps_what_is_hardly_doubted(commit):
    """Coin flips do not take the place of tokens that are as good as certain, however a rule scores them."""
    _, _, trace = from_empty(uniform(12, wrong=1e-4), 50, remask='p2', commit=commit, priority=(1,))
    assert remasked(trace, 2).sum() < 0.05 * 50 * 12


@pytest.mark.parametrize('schedule, steps', [('linear', 12), ('linear', 4), ('cosine', 6)])
def test_p2_ends_each_step_with_the_masks_of_the_schedule(schedule, steps):
    _, nfe, trace = from_empty(uniform(12, wrong=0.6), 100, remask='p2', steps=steps, schedule=schedule)
    progress = [step / steps for step in range(1, steps + 1)]
    left = [int(12 * (1 - s if schedule == 'linear' else math.cos(s * math.pi / 2)) + 1e-3) for s in progress]
    assert [(x == 2).sum(1).unique().tolist() for x in trace[1:]] == [[n] for n in left]
    assert remasked(trace, 2).any() and (nfe == steps).all()


# -----------------------------------------------------------------------------
# what holds whatever the network says

REMASKS = dict(none=dict(), random=dict(remask='random'), wrong=dict(remask='wrong'),
               confidence=dict(remask='confidence'), cap=dict(remask='remdm'), rescale=dict(remask='remdm',
    remdm='rescale'), p2=dict(remask='p2'), patient=dict(remask='wrong', remask_patience=1.0),
               doubts=dict(remask='wrong', remask_threshold=0.6), doubted_confidence=dict(remask='confidence',
    remask_threshold=0.6), shares=dict(remask='wrong', remask_schedule=(0.7, 0.1), remask_random_ratio=0.5),
               lucky=dict(remask='random', remask_schedule=(0.4, 0.4)))
IDLE = ('none', 'p2', 'cap', 'rescale', 'doubted_confidence')      # these may find nothing to do
JUDGED = ('wrong', 'doubts', 'shares', 'p2')


def unbroken(model, canvas, fixed, remask_model=None, **rules):
    """Runs a sampler and returns its trace (S, B, T), having looked at what no rule may break."""
    V, before = model.mask_token_id, canvas.clone()
    out, nfe, trace = traced(model, canvas, fixed, remask_model=remask_model, **rules)
    assert torch.equal(canvas, before) and out.min() >= 0 and out.max() < V  # no mask, no special
    assert ((trace >= 0) & (trace <= V)).all() and (trace == before)[:, fixed].all()
    assert torch.equal(trace[0], before) and torch.equal(trace[-1], out)
    assert len(trace) - 1 <= rules['steps'] and nfe.max() <= rules['steps'] * (2 if remask_model else 1)
    assert remask_model or nfe.max() == len(trace) - 1
    assert not remasked(trace, V)[-1].any()
    return trace


@pytest.mark.parametrize('remask', REMASKS)
@pytest.mark.parametrize('commit', COMMIT)
def test_rules_that_no_combination_breaks(commit, remask):
    """What is fixed stays, no mask is left, no special id is written, in no more steps than were given."""
    V, T = 5, 8
    for steps, schedule in ((1, 'linear'), (5, 'cosine'), (T, 'linear'), (T + 5, 'linear')):
        judge = tiny_gpt(V, T, seed=9) if steps == T and remask in JUDGED else None
        trace = unbroken(stubborn_gpt(V, T), *starting_canvas(V, T, False, seed=steps), seed=steps,
                         steps=steps, commit=commit, schedule=schedule,
                         commit_threshold=0.4, priority=(1, 2), remask_model=judge,
                         **{'remask_rate': 0.7, **REMASKS[remask]})
        assert remask in IDLE or bool(remasked(trace, V).any()) == (steps > 1)
        assert remask != 'none' or not remasked(trace, V).any()


@pytest.mark.parametrize('remask', ['random', 'wrong', 'confidence', 'doubts'])
@pytest.mark.parametrize('steps', [1, 3, 13])
def test_rewriting_breaks_nothing_either(remask, steps):
    """And no token becomes a mask on the way."""
    canvas, fixed = starting_canvas(5, 8, False, seed=steps)
    trace = unbroken(stubborn_gpt(5, 8), canvas, fixed, steps=steps, rewrite=True, remask_rate=0.7,
                     **REMASKS[remask])
    assert not remasked(trace, 5).any() and (trace[1:] != trace[:-1])[:, canvas == 5].any()


@pytest.mark.parametrize('remask', REMASKS)
def test_nothing_ends_a_text_whose_end_is_fixed(remask):
    """Where the end token is fixed, no start, end or padding is drawn left of it; elsewhere an end may be."""
    V, T, bos, end, pad = 6, 9, 3, 4, 5
    model = tiny_gpt(V, T, n_recur=1)
    with torch.no_grad():
        model.wte.weight[bos:pad + 1] *= 20                    # a network in love with them
    generator = seeded(1)
    canvas = torch.randint(3, (40, T), generator=generator)
    canvas = canvas.masked_fill(torch.rand(40, T, generator=generator) < 0.6, V)
    canvas[:, 0] = bos
    closed = torch.arange(40) < 20
    canvas[:20, 6], canvas[:20, 7:] = end, pad
    canvas[20:, 6:] = V
    fixed = canvas != V
    how = dict(ends=Ends(end, pad, (bos, end, pad)), steps=6, commit_threshold=0.4, priority=(end, 0))
    ends = 0
    for commit in COMMIT:
        out, _, trace = traced(model, canvas, fixed, commit=commit, **how, **REMASKS[remask])
        inside = trace[:, closed, 1:6]
        assert ((inside < 3) | (inside == V)).all() and (out[closed, 1:6] < 3).all()
        assert torch.equal(out[:20, 6:], canvas[:20, 6:]) and (out < V).all()
        ends += int((out[~closed, 1:] >= 3).sum())
        assert (out[20:, 1:6][left_of(fixed)[20:, 1:6]] < 3).all()  # nor within what is given
    assert ends > 0                                            # it would have, had it been let


@pytest.mark.parametrize('filters', [dict(top_k=1), dict(top_p=1e-6), dict(temperature=0.0)], ids=str)
@pytest.mark.parametrize('rules', [
    dict(ar_prefix=16), dict(remask='causal'), dict(block_length=1),
    dict(block_length=1, remask='p2', remask_rate=0.0)], ids=str)
def test_filters_reach_every_rule(rules, filters):
    """Each way of drawing is greedy, and the order is fixed: the seed has no say, other draws agree."""
    model, meta = tiny_gpt(18, 16, n_recur=1), dict(ARITHMETIC, block_size=16)
    first, second = [generate(model, meta, 2, seed=seed, **rules, **filters) for seed in (1, 2)]
    assert first[0]['tokens'] == first[1]['tokens'] == second[0]['tokens']


@pytest.mark.parametrize('rules', [*(dict(commit=commit) for commit in COMMIT), *REMASKS.values(),
                                   dict(remask='wrong', rewrite=True)], ids=str)
def test_a_filter_leaves_only_the_likeliest_token_to_every_rule(rules):
    """Each position has its own favourite, and with top_k=1 nothing else is ever written."""
    likely = torch.tensor([0, 3, 1, 2, 2, 0, 1, 3])
    model = Independent(0.4 * F.one_hot(likely, 4) + 0.15, wrong=[0.5] * 8)
    _, _, trace = from_empty(model, 20, [0, 3], steps=6, top_k=1, priority=(1,), **rules)
    assert ((trace == 4) | (trace == likely)).all() and (trace[-1] == likely).all()


@pytest.mark.parametrize('remask', ['none', 'random'])
@torch.no_grad()
def test_a_self_conditioned_network_is_shown_its_last_prediction(monkeypatch, remask):
    """Its likeliest real tokens where a mask stood the step before and still stands; elsewhere [MASK]."""
    V, T, asked = 5, 8, []
    model = tiny_gpt(V, T, parts='previous')
    model.mask_logit_bias.fill_(50.0)                          # it would rather abstain
    forward = model.forward

    def watched(idx, previous):
        asked.append((idx.clone(), previous.clone()))
        return forward(idx, previous=previous)
    monkeypatch.setattr(model, 'forward', watched)
    canvas, again = torch.tensor([[1, V, V, 2, V, V, V, V]]).repeat(20, 1), 0
    traced(model, canvas, torch.arange(T).expand(20, T) == 0, steps=6, remask=remask, remask_rate=0.3,
           correct_share=0.0)
    assert len(asked) == 6 and (asked[0][1] == V).all()
    for (x, shown), (after, shown_after) in zip(asked, asked[1:]):
        likeliest = model.logits(forward(x, previous=shown))[..., :V].argmax(-1)
        held = (x == V) & (after == V)
        again += ((x != V) & (after == V)).sum()
        assert torch.equal(shown_after, torch.where(held, likeliest, V)) and held.any()
        alone = model.logits(forward(x))[..., :V].argmax(-1)
        assert (likeliest != alone).any() == (shown != V).any()            # it has its say
    assert (again > 0) == (remask == 'random')
