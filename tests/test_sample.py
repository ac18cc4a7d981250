"""
The sampling loop and its rules: which law the samples follow, what each rule commits and doubts, and what
holds whatever the network says.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARITHMETIC, all_sequences, chi_square, seeded, tiny_gpt
from oracles import (
    Independent, Oracle, committed, empty, follows, given_prompt, marginals_of, misses, product_law,
    random_law, remasked, remasked_share, stubborn_gpt, texts_follow, traced, uniform, within_noise)

import sample
from parts.abstain import p_mask
from parts.look import Look, Sampling
from plumbing.evaluate import p_wrong
from plumbing.rows import Ends, first_of
from plumbing.text import encode
from sample import USUAL, How, generate

LEFT_TO_RIGHT = dict(commit='left')
SURE = [[0.50, 0.49, 0.01], [0.45, 0.275, 0.275], [0.60, 0.20, 0.20], [0.62, 0.37, 0.01]]
LAW = random_law(3, 3, seed=1)


def from_empty(model, B=20000, prompt=(), **rules):
    """Samples from B empty canvases: (canvas, nfe, trace)."""
    return traced(model, empty(model, B, prompt)[0], **rules)


def fits(counts, expected):
    """Whether counts have the expected law, by a chi-square test."""
    statistic, bound = chi_square(counts, expected)
    return statistic < bound


def order(trace, mask=3):
    """In which order the positions of a single sample were committed."""
    return tuple(committed(trace, mask).nonzero()[:, 2].tolist())


def even(T=4, wrong=None):
    """An oracle of T tokens out of 3, each as likely as another, in which some are doubted."""
    return Oracle(3, T, product_law(torch.full((T, 3), 1 / 3, dtype=torch.float64)), wrong=wrong)


# -----------------------------------------------------------------------------
# the law of the samples

@pytest.mark.parametrize('rules', [{}, LEFT_TO_RIGHT, dict(steps=9)], ids=str)
def test_one_token_a_step_reproduces_the_law(rules):
    canvas, nfe, _ = from_empty(Oracle(3, 3, LAW), **rules)
    assert follows(canvas, 3, LAW) and (nfe == 3).all()


@pytest.mark.parametrize('rules', [dict(steps=1), dict(steps=1, **LEFT_TO_RIGHT),
                                   dict(commit='threshold', commit_threshold=1e-9)], ids=str)
def test_all_tokens_in_one_step_give_the_product_of_the_marginals(rules):
    """The factorisation error of few steps is known exactly. A threshold of about 0 takes all at once."""
    canvas, nfe, _ = from_empty(Oracle(3, 3, LAW), **rules)
    assert follows(canvas, 3, product_law(marginals_of(LAW, 3, 3))) and misses(canvas, 3, LAW)
    assert (nfe == 1).all()


def test_two_steps_err_by_what_they_should():
    """Left to right, 2 + 1 tokens of 3: p(x0) p(x1) p(x2 | x0, x1)."""
    law = LAW.view(3, 3, 3)
    first, second = law.sum((1, 2)), law.sum((0, 2))
    mixed = first[:, None, None] * second[None, :, None] * law / law.sum(2, keepdim=True)
    canvas, nfe, _ = from_empty(Oracle(3, 3, LAW), steps=2, **LEFT_TO_RIGHT)
    assert follows(canvas, 3, mixed.flatten()) and (nfe == 2).all()


def test_infilling_follows_the_conditional_law():
    law = LAW.view(3, 3, 3)
    out, _, _ = traced(Oracle(3, 3, LAW), torch.tensor([[3, 2, 3]]).repeat(20000, 1))
    assert follows(out, 3, (law * torch.eye(3)[2][None, :, None] / law[:, 2].sum()).flatten())


@pytest.mark.parametrize('rules', [{}, LEFT_TO_RIGHT], ids=str)
def test_law_of_texts_with_an_end_token(rules):
    """Padding behind the end token saves passes and leaves the law of the texts as it is."""
    V, T, end, pad = 4, 3, 2, 3
    law = random_law(V, T, seed=7)
    canvas, nfe, _ = from_empty(Oracle(V, T, law), ends=Ends(end, pad), **rules)
    assert texts_follow(canvas, law, V, T, end)
    if rules:
        length = ((canvas == end).cumsum(1) == 0).sum(1).add(1).clamp(max=T)
        assert torch.equal(nfe, length)                       # a finished row leaves the batch
        assert ((canvas == pad) | (torch.arange(T) < length[:, None])).all()


def test_a_causal_sampler_is_a_remask_rule_as_well():
    """remask=causal writes by the causal law, whatever the bidirectional one is."""
    oracle = Oracle(3, 3, random_law(3, 3, seed=2), causal_law=LAW)
    for prompt in ([], [1]):
        canvas, _, trace = from_empty(oracle, prompt=prompt, remask='causal')
        assert follows(canvas, 3, given_prompt(LAW, 3, 3, prompt)) and not remasked(trace, 3).any()


# -----------------------------------------------------------------------------
# the same under another name

@pytest.mark.parametrize('rules', [
    *(dict(remask=remask, correct_share=0.0) for remask in ('remdm', 'p2', 'confidence', 'random', 'wrong')),
    dict(remask='remdm', remdm='rescale', correct_share=0.0),
    dict(remask='wrong', remask_random_ratio=0.5, correct_share=0.5, steps=8)], ids=str)
def test_a_rate_of_zero_is_ancestral_sampling(rules):
    """Nothing is re-masked whatever is doubted, and one token a step is exact, as without a remask rule."""
    out, nfe, trace = from_empty(Oracle(3, 3, LAW, wrong=[0.9, 0.5, 0.99]), remask_rate=0.0, **rules)
    assert not remasked(trace, 3).any() and (nfe == rules.get('steps', 3)).all() and follows(out, 3, LAW)


# -----------------------------------------------------------------------------
# commit rules

@pytest.mark.parametrize('schedule, steps, expected', [
    ('linear', 4, [2, 4, 6, 8]), ('linear', 8, [*range(1, 9)]), ('linear', 3, [3, 6, 8]),
    ('cosine', 4, [1, 3, 5, 8]), ('cosine', 1, [8]), ('linear', 20, [*range(1, 9)])])
@pytest.mark.parametrize('rules', [dict(commit='random'), dict(commit='confidence'), LEFT_TO_RIGHT], ids=str)
def test_schedules(schedule, steps, expected, rules):
    """How many tokens are visible after each step: linear, equally many; cosine, few early and many late."""
    _, nfe, trace = from_empty(uniform(8, V=3), 2, steps=steps, schedule=schedule, **rules)
    assert [(x != 3).sum(1).tolist() for x in trace[1:]] == [[n, n] for n in expected]
    assert (nfe == len(expected)).all()


ORDERS = dict(confidence=(3, 2, 0, 1), margin=(2, 3, 1, 0), entropy=(3, 0, 2, 1), threshold=(3, 2, 0, 1))


@pytest.mark.parametrize('commit', ORDERS)
def test_what_margin_entropy_and_threshold_call_sure(commit):
    """Each has an order of its own (threshold's is the confidence's); a single row may be greedy."""
    for seed in range(5):
        out, _, trace = from_empty(Independent(SURE), 1, seed=seed, temperature=0.0, commit=commit,
                                   commit_threshold=2.0, choice_temperature=0.0)
        assert order(trace) == ORDERS[commit] and out.tolist() == [[0, 0, 0, 0]]


def test_orders_that_are_not_the_networks():
    def orders(**rules):
        return {order(from_empty(Independent(SURE), 1, seed=seed, temperature=0.0, **rules)[2])
                for seed in range(60)}
    assert len(orders()) >= 16 and orders(**LEFT_TO_RIGHT) == {(0, 1, 2, 3)}


@pytest.mark.parametrize('commit', ['margin', 'entropy'])
def test_margin_and_entropy_look_at_the_law_and_not_at_the_token_drawn(commit):
    """Whatever is drawn, the order is the same, so that one token a step stays exact."""
    model = Independent(SURE)
    out, _, trace = from_empty(model, commit=commit)
    for at, new in zip(ORDERS[commit], committed(trace, 3)):
        assert new[:, at].all() and (new.sum(1) == 1).all()
    assert follows(out, 3, product_law(model.table))


def test_gumbel_noise_of_the_confidence_order():
    """With noise 1, a position comes first with the probability that its confidence is the logarithm of."""
    B, p = 20000, torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    masked = torch.tensor([1, 1, 1, 1, 0]).bool().expand(B, 5)
    logp = F.pad(p.log(), (0, 1), value=5.0).expand(B, 5)

    def first(noise, count=1):
        look = SimpleNamespace(candidates=(None, logp, None), how=How(choice_temperature=noise),
                               progress=torch.zeros(B), noise=torch.rand(B, 5, generator=seeded()).double())
        return first_of(sample.confidence(look), masked, torch.full((B,), count))

    chosen = first(1.0)
    assert (chosen.sum(1) == 1).all() and not chosen[:, 4].any() and fits(chosen.sum(0)[:4], B * p)
    statistic, bound = chi_square(first(100.0).sum(0)[:4], torch.full((4,), B / 4))
    assert statistic < 3 * bound
    assert first(0.0, 2)[0].tolist() == [1, 1, 0, 0, 0] and not first(1.0, -1).any()


def test_priority_takes_its_tokens_first():
    """Positions 2, 4 and 5 get a token of the priority; within both groups any order."""
    likely, holes = torch.tensor([0, 0, 2, 0, 3, 2, 1]), {2, 3, 4, 5, 6}
    model = Independent(0.9 * F.one_hot(likely, 4) + 0.025)
    for priority, ahead in (((2, 3), {2, 4, 5}), ((3,), {4}), ((1, 0), {3, 6}), ((), set())):
        out, _, trace = from_empty(model, 400, [0, 0], commit='priority', priority=priority, temperature=0.0)
        assert (out == likely).all()
        for step, new in enumerate(committed(trace, 4)):
            group = ahead if step < len(ahead) else holes - ahead
            assert set(new.nonzero()[:, 1].tolist()) == group


def test_proposals_come_with_the_unfiltered_probability():
    oracle = Oracle(3, 2, random_law(3, 2, seed=1))
    canvas = torch.tensor([[3, 3], [1, 3]]).repeat(50, 1)
    where, how = canvas == 3, How(**{**USUAL, 'temperature': 0.3, 'top_k': 2, 'remask': 'confidence'})
    look = Look(Sampling(oracle, canvas, ~where, how, generator=seeded()), 0)
    ids, confidence, every = look.propose(where)
    for rule in ('none', 'random', 'wrong', 'remdm', 'p2'):                      # these ask for tokens alone
        other = Look(Sampling(oracle, canvas, ~where, replace(how, remask=rule), generator=seeded()), 0)
        alone, nothing, none = other.propose(where)
        assert torch.equal(alone, ids) and not nothing.any() and none is None
    assert confidence.dtype == torch.float64 and (ids[~where] == 0).all() and (confidence[~where] == 0).all()
    law = look.hidden[..., :3].log_softmax(-1)
    assert torch.allclose(every[:, :3], law[where])
    assert torch.allclose(confidence[where], law.gather(2, ids[..., None])[..., 0][where])
    assert len(ids[:, 0].unique()) == 2


# -----------------------------------------------------------------------------
# commit=threshold

def test_threshold_commits_exactly_the_candidates_that_reach_it():
    """The first step takes each position with the probability that a likely token is drawn there."""
    B = 20000
    model = Independent([[1.0, 0.0, 0.0], [0.5, 0.45, 0.05], [0.7, 0.2, 0.1], [0.35, 0.35, 0.3],
                         [0.4, 0.4, 0.2]])
    _, nfe, trace = from_empty(model, B, commit='threshold', commit_threshold=0.38)
    chance = torch.tensor([1.0, 0.95, 0.7, 0.0, 0.8], dtype=torch.float64)     # of a token that reaches it
    taken = committed(trace, 3)[0]                            # (B, T)
    tokens = trace[1][taken]
    assert (model.table.expand(B, -1, -1)[taken].gather(1, tokens[:, None]) >= 0.38).all()
    pattern = (taken * 2 ** torch.arange(4, -1, -1)).sum(1).bincount(minlength=32)
    assert fits(pattern, B * product_law(torch.stack((1 - chance, chance), 1)))
    assert (nfe >= 2).all() and nfe.max() <= 5 and len(nfe.unique()) > 2


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
def test_threshold_does_not_wait_for_the_schedule(schedule):
    """But it stops with the steps: the last one takes whatever is left."""
    _, nfe, trace = from_empty(uniform(6, V=3), 5, commit='threshold', commit_threshold=0.9, steps=3,
                               schedule=schedule)
    assert [(x == 3).sum(1).tolist() for x in trace] == [[6] * 5, [5] * 5, [4] * 5, [0] * 5]
    assert (nfe == 3).all()


# -----------------------------------------------------------------------------
# commit=abstain

@torch.no_grad()
def test_p_mask():
    """At masked positions: of the softmax over the real tokens and [MASK] with its bias; elsewhere 0."""
    model, ids = tiny_gpt(3, 4), torch.tensor([[3, 1, 3, 1], [2, 3, 3, 3]])
    for bias in (0.0, -1.5, 3.0):
        model.mask_logit_bias.fill_(bias)
        logits = F.linear(model(ids), model.wte.weight)[..., :4]
        logits[..., 3] += bias
        expected = torch.where(ids == 3, logits.softmax(-1)[..., 3], 0.0)
        assert torch.allclose(p_mask(model, model(ids), ids == 3).float(), expected, atol=1e-6)
    assert p_mask(model, model(ids), torch.zeros_like(ids).bool()).sum() == 0


class Reluctant(Oracle):
    """An oracle that would rather leave some positions open: keep (T,), its log-odds of [MASK] there."""

    def __init__(self, keep, V=3):
        super().__init__(V, len(keep), random_law(V, len(keep), seed=1))
        self.keep = torch.tensor(keep).double()

    def __call__(self, idx, causal=False, cache=None):
        hidden = super().__call__(idx, causal)
        hidden[..., self.V] = self.keep[: idx.size(1)]
        return hidden


@pytest.mark.parametrize('remask', ['none', 'wrong'])
def test_commit_abstain_fills_what_the_network_is_readiest_for(remask):
    keep = [0.3, -2.0, 1.5, -1.0, -3.0]
    model = Reluctant(keep)
    canvas, fixed = empty(model, 50)
    canvas[:10, 1], fixed[:10, 1] = 2, True                   # the readiest but one is given
    filled, nfe, trace = traced(model, canvas, fixed, commit='abstain', remask=remask, correct_share=0.0)
    for before, after in zip(trace, trace[1:]):
        for row, now in zip(before, after):
            masked = [t for t in range(5) if row[t] == 3]
            chosen = {t for t in masked if now[t] != 3}
            assert chosen == set(sorted(masked, key=lambda t: keep[t])[:len(chosen)])
            assert bool(chosen) == bool(masked)
    assert (filled < 3).all() and torch.equal(filled[fixed], canvas[fixed])
    if remask == 'none':
        assert (nfe[:10] == 4).all() and (nfe[10:] == 5).all()
    _, nfe, trace = from_empty(model, 50, commit='abstain', steps=2)
    assert (trace[1] != 3).tolist() == [[False, True, False, True, True]] * 50 and (nfe == 2).all()


def test_commit_abstain_draws_from_the_law():
    """The order depends on the place alone here, so that one token a step is as exact as any other order."""
    canvas, _, _ = from_empty(Reluctant([1.0, -1.0, 0.0]), commit='abstain')
    assert follows(canvas, 3, LAW)


# -----------------------------------------------------------------------------
# remask=random and wrong

@torch.no_grad()
def test_p_wrong_is_what_the_token_that_stands_there_lacks():
    """1 - p(that token), in the softmax over the whole vocabulary, [WRONG] and [MASK] with its bias."""
    model, ids = tiny_gpt(3, 4), torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
    for bias in (0.0, 2.0):
        model.mask_logit_bias.fill_(bias)
        logits = F.linear(model(ids), model.wte.weight)[..., :5]
        logits[..., 3] += bias
        p = logits.softmax(-1).gather(2, ids[..., None])[..., 0]
        for model.most_logits in (1, 3 * len(model.wte.weight), 2 ** 23):        # positions at a time
            assert torch.allclose(p_wrong(model, model(ids), ids), 1 - p, atol=1e-6)


def test_remask_rules_have_the_probabilities_they_say():
    wrong = torch.tensor([1e-6, 0.25, 0.6, 1 - 1e-6])
    fixed = torch.tensor([0, 0, 1, 1]).bool().expand(4000, 4)
    for expected, rules in (
            (wrong, dict(remask='wrong')), (0.3 * wrong, dict(remask='wrong', remask_rate=0.3)),
            ([0.3] * 4, dict(remask='random')), ([0.6] * 4, dict(remask='random', remask_rate=0.6)),
            ([0.5] * 4, dict(remask='wrong', remask_rate=0.5, remask_random_ratio=1.0)),
            (0.5 * (0.6 * wrong + 0.4), dict(remask='wrong', remask_rate=0.5, remask_random_ratio=0.4)),
            (0.7 * (1 - wrong), dict(judge=even(wrong=1 - wrong), remask='wrong', remask_rate=0.7)),
            ([0.9, 0.9, 0, 0], dict(fixed=fixed, remask='random', remask_rate=0.9))):
        assert within_noise(remasked_share(even(wrong=wrong), **rules), expected), rules


def test_text_without_an_end_is_sampled_with_patience(monkeypatch):
    asked = []

    def watched(model, canvas, fixed, **more):
        asked.append(more['remask_patience'])
        return canvas * 0, torch.ones(len(canvas)), None

    monkeypatch.setattr(sample, 'generate_diffusion', watched)
    model = tiny_gpt(18, 64, n_recur=1)
    for meta in (ARITHMETIC, dict(ARITHMETIC, bos=None, eos=None, pad=None)):
        for more in ({}, dict(remask_patience=0.5)):
            generate(model, meta, 2, remask='wrong', **more)
    assert asked == [0.0, 0.5, 1.0, 0.5]


def test_the_judge_sees_completed_canvases():
    """The last step asks nobody."""
    oracle, judge = (Oracle(3, 4, random_law(3, 4, seed=seed), wrong=[0.5] * 4) for seed in (1, 2))
    _, nfe, trace = from_empty(oracle, 50, [1], steps=6, remask='wrong', remask_model=judge)
    assert len(judge.seen) == 5 and len(oracle.seen) == 6 and (nfe == 11).all()
    for (idx, causal), x in zip(judge.seen, trace):
        assert not causal and (idx < 3).all() and torch.equal(idx[x != 3], x[x != 3])


def test_committed_tokens_are_those_that_the_judge_saw():
    oracle, judge = [Oracle(3, 4, random_law(3, 4, seed=1), wrong=[1e-9] * 4) for _ in range(2)]
    _, _, trace = from_empty(oracle, 50, steps=4, remask='wrong', remask_model=judge, correct_share=0.0)
    for (idx, _), before, after in zip(judge.seen, trace, trace[1:]):
        new = (before == 3) & (after != 3)
        assert new.sum() == 50 and torch.equal(after[new], idx[new])


def test_remasking_does_not_slow_the_filling_down():
    """What is re-masked is made up for: each step ends with the masks that the schedule asks for."""
    oracle = Oracle(2, 8, random_law(2, 8, seed=1))
    _, _, trace = from_empty(oracle, 200, steps=8, remask='random', remask_rate=0.15, correct_share=0.0)
    doubted = remasked(trace, 2).sum(2)
    for step, count in enumerate(doubted):                    # nor is one written in the step that doubts it
        assert torch.equal((trace[step + 1] == 2).sum(1), count.clamp(min=7 - step))
    assert all((count > 0).any() for count in doubted[2:-1])


def test_correct_share_ends_the_filling_early():
    """The rest of the steps looks for errors."""
    for share, filled_after in ((0.0, 8), (0.25, 6), (0.5, 4), (1.0, 1)):
        _, nfe, trace = from_empty(uniform(8), 5, steps=8, remask='random', remask_rate=0.0,
                                   correct_share=share)
        assert [bool((x == 2).any()) for x in trace].index(False) == filled_after and (nfe == 8).all()


def test_repair_finds_the_errors_itself():
    """Nothing is fixed and nothing masked; the network doubts the tokens that never occur in its law."""
    class Doubter(Oracle):
        def __call__(self, idx, causal=False, cache=None):
            out = super().__call__(idx.masked_fill(idx != 1, 3), causal)
            out[..., 4] = torch.where(idx == 1, -30.0, 30.0)
            return out

    only_ones = all_sequences(3, 4).eq(1).all(1).double()
    canvas = torch.tensor([[1, 1, 1, 1], [0, 1, 2, 1], [2, 2, 2, 2], [0, 1, 1, 1]])
    fixed = torch.zeros(4, 4).bool()
    fixed[3, 0] = True
    out, _, _ = traced(Doubter(3, 4, only_ones), canvas, fixed, steps=8, remask='wrong')
    assert out.tolist() == [[1, 1, 1, 1]] * 3 + [[0, 1, 1, 1]]
    out, nfe, _ = traced(Doubter(3, 4, only_ones), canvas, fixed, remask='none')
    assert torch.equal(out, canvas) and (nfe == 0).all()


def test_more_passes_than_tokens_bring_remdm_closer_to_the_law():
    """As its authors' own sampler; with as many passes as tokens some are always drawn together."""
    law, number = random_law(3, 4, seed=3), torch.tensor([27, 9, 3, 1])
    off = []
    for steps in (2, 4, 32):
        x, nfe, _ = from_empty(Oracle(3, 4, law), remask='remdm', steps=steps)
        found = torch.bincount(x @ number, minlength=81) / len(x)
        off.append((found - law).abs().sum().item() / 2)
        assert (nfe == nfe[0]).all() and steps / 2 < nfe[0] <= steps
    assert off[0] > 3 * off[1] and off[1] > 1.6 * off[2] and off[2] < 0.03


# -----------------------------------------------------------------------------
# remask=confidence

def test_confidence_remembers_the_probability_at_commit_time():
    """The token looks certain ever after (p = 1), but it is doubted by what it was committed with."""
    p = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    for rate in (1.0, 0.5):
        _, _, trace = from_empty(Independent(p.expand(4, 3)), remask='confidence', remask_rate=rate,
                                 correct_share=0.0, **LEFT_TO_RIGHT)
        again = remasked(trace, 3)
        assert not again[0].any() and again[1][:, 0].any() and not again[1][:, 1:].any()
        for token in range(3):
            rows = trace[1][:, 0] == token
            assert within_noise(again[1][rows, 0].double().mean(), rate * (1 - p[token]), int(rows.sum()))


def test_confidence_never_doubts_what_was_there_from_the_start():
    model = uniform(6, wrong=0.9)
    canvas, fixed = empty(model, 500, [1, 0, 1])
    fixed[:, 1:] = False                                      # visible, but not fixed
    _, _, trace = traced(model, canvas, fixed, steps=12, remask='confidence')
    again = remasked(trace, 2)
    assert not again[..., :3].any() and again[..., 3:].any((0, 1)).all()


def test_confidence_forgets_what_stood_there_before():
    """What was re-masked and written anew is doubted by its new probability."""
    model = Independent([[1.0, 0.0], [0.2, 0.8]])
    _, _, trace = from_empty(model, 6000, remask='confidence', correct_share=0.75, steps=8, **LEFT_TO_RIGHT)
    for before, now, later in zip(trace[2:], trace[3:], trace[4:-1]):  # committed at 1, doubted from 3 on
        new = (before[:, 1] == 2) & (now[:, 1] != 2)
        for token, p in ((0, 0.2), (1, 0.8)):
            rows = new & (now[:, 1] == token)
            if rows.sum() > 100:
                assert within_noise((later[rows, 1] == 2).double().mean(), 1 - p, int(rows.sum()))
        assert not (later[:, 0] == 2).any()                   # p = 1: beyond doubt


# -----------------------------------------------------------------------------
# rewriting in place

REPAIRS = dict(commit='random', remask='wrong', remask_threshold=0.5, rewrite=True, temperature=0.0)


def test_rewriting_is_one_look_and_the_likeliest_token_wherever_another_is_less_likely_than_not():
    model, x = tiny_gpt(5, 9), torch.randint(6, (50, 9), generator=seeded(3))      # 5 is the mask
    fixed = (torch.arange(9) < 2) & (x != 5)
    result, nfe, _ = traced(model, x, fixed, steps=1, **REPAIRS)
    with torch.no_grad():
        logits = model.logits(model(x))
    unsure = logits.softmax(-1).gather(-1, x[..., None])[..., 0] < 0.5
    rewritten = (x == 5) | (unsure & ~fixed)
    assert torch.equal(result, torch.where(rewritten, logits[..., :5].argmax(-1), x)) and (nfe == 1).all()
    assert (result != x)[x != 5].any() and (result == x)[x != 5].any()


def test_a_rewritten_end_moves_the_padding():
    """The end token 2 becomes text; behind the new end there is padding, whatever the network wants there."""

    class Told(Oracle):
        def __call__(self, idx, causal=False, cache=None):
            return 20 * F.one_hot(torch.tensor([[0, 1, 1, 2, 0]]), 6).double()

    canvas = torch.tensor([[0, 1, 2, 3, 3]])
    result, _, _ = traced(Told(4, 5, None), canvas, canvas < 0, steps=1, ends=Ends(2, 3), **REPAIRS)
    assert result.tolist() == [[0, 1, 1, 2, 3]]


# -----------------------------------------------------------------------------
# whole samples

@pytest.mark.parametrize('rules', [dict(), dict(commit='confidence', steps=5), dict(remask='causal'),
                                   dict(remask='wrong', steps=9), dict(ar_prefix=64),
                                   dict(ar_prefix=5, steps=6)], ids=str)
def test_same_seed_same_samples(rules):
    meta, model = dict(ARITHMETIC, block_size=24), tiny_gpt(18, 24, n_recur=1)
    runs = []
    for seed in (1, 2, 1):
        torch.manual_seed(len(runs))                          # the global generator has no say
        runs.append(generate(model, meta, 4, seed=seed, batch_size=3, **rules))
    first, other, again = runs
    assert first == again and len(first) == 4
    assert sum(a['tokens'] != b['tokens'] for a, b in zip(first, other)) >= 3      # two may agree by chance
    assert len({tuple(s['tokens']) for s in first}) == 4      # also across batches


def test_generate_returns_whole_samples():
    model = tiny_gpt(18, 64, n_recur=1)
    for s in generate(model, ARITHMETIC, 20, prompt=encode(ARITHMETIC, '(+'), ar_prefix=64):
        assert sorted(s) == ['finished', 'nfe', 'text', 'tokens'] and s['text'].startswith('(+')
        assert s['tokens'][:3] == [15, 10, 12] and s['finished'] == (16 in s['tokens'])
        assert s['tokens'].index(16) == len(s['tokens']) - 1 if s['finished'] else len(s['tokens']) == 64
        assert s['nfe'] == len(s['tokens']) - 3  # a pass a token, the end token included
        assert json.loads(json.dumps(s)) == s
    lengths = torch.tensor([3, 9, 62])
    for n, s in zip((3, 9, 62), generate(model, ARITHMETIC, 3, lengths=lengths, batch_size=2, steps=70)):
        assert s['finished'] and s['tokens'][-1] == 16 and len(s['tokens']) <= n + 2
        assert s['nfe'] <= n  # no row waits for a longer one


def test_a_given_length_is_the_length():
    """Neither the end token nor padding is drawn inside a given length, and forbidden ids never are."""
    model, lengths = tiny_gpt(V=18, T=16), torch.tensor([1, 5, 9, 14] * 8)
    with torch.no_grad():
        model.wte.weight[16:18] += 3 * model.wte.weight.std()  # an untrained network in love with the end
    for rules in (dict(), dict(commit='confidence'), dict(remask='random', steps=8)):
        samples = generate(model, dict(ARITHMETIC, block_size=16), len(lengths), lengths=lengths, **rules)
        assert [len(s['text']) for s in samples] == lengths.tolist()
        assert all(s['finished'] for s in samples)


@pytest.mark.parametrize('rules', [dict(ar_prefix=64), dict(ar_prefix=7, steps=9),
                                   dict(ar_prefix=7, steps=9, remask='wrong')], ids=str)
def test_no_sampler_writes_specials(rules):
    """The network wants to write [MASK] and [WRONG] wherever it may."""
    for s in generate(stubborn_gpt(18, 64), ARITHMETIC, 6, **rules):
        assert s['tokens'][0] == 15 and max(s['tokens']) < 18 and 0 < s['nfe'] <= 63
