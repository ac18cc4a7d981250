"""
The samplers: which law their samples follow, and what holds whatever the network says.

Most tests use an oracle in place of the network: it knows a law over all sequences of a few tokens and answers with
the exact conditional probabilities, so that whatever the samples lack is the sampler's own fault.
"""

import json
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARITHMETIC, all_sequences, chi_square, default_config, load_script, tiny_gpt, write_checkpoint

import sample
from configurator import UserError
from rules import best_rules, close_rows, commit_order, draw, filtered, first_of, p_mask, p_wrong, propose, supports
from plumbing.text import decode, encode, start_canvas
from plumbing.checkpoint import find_checkpoint, load_merged
from plumbing.files import write_atomically
from sample import fill, generate, generate_diffusion


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_law(V, T, seed, spread=1.5):
    """A law over all sequences of T tokens out of V in which everything depends on everything: (V^T,)."""
    return (spread * torch.randn(V ** T, generator=seeded(seed), dtype=torch.float64)).softmax(0)


def product_law(marginals):
    """The law of independent tokens: marginals (T, V) -> (V^T,)."""
    x = all_sequences(marginals.size(1), marginals.size(0))
    return marginals[torch.arange(marginals.size(0)), x].prod(1)


class Oracle:
    """
    Has the interface of model.GPT; its hidden states are the logits that belong to the exact conditionals.

    law (V^T,): of the bidirectional pass, p(x_i | all visible tokens). causal_law: of the causal pass, p(x_i | x_<i),
    the same law by default. wrong (T,): what it answers for p(WRONG) at each position.
    """

    def __init__(self, V, T, law, causal_law=None, wrong=None):
        self.V, self.T, self.x = V, T, all_sequences(V, T)
        self.laws = {False: law, True: law if causal_law is None else causal_law}
        self.config = SimpleNamespace(block_size=T, vocab_size=V, n_embd=V + 2, energy_head=2)
        self.mask_token_id, self.wrong_token_id = V, V + 1
        wrong = torch.zeros(T) if wrong is None else torch.as_tensor(wrong)
        self.odds = (wrong / (1 - wrong)).double().log()
        self.seen, self.drafter, self.previous = [], None, None

    def parameters(self):
        yield torch.zeros(1)

    def empty_cache(self, B, T=0):
        return None

    def __call__(self, idx, causal=False, previous=None, cache=None):
        self.seen.append((idx.clone(), causal))
        T = idx.size(1)
        assert T <= self.T
        agree = (idx[:, None] == self.x[:, :T]) | (idx[:, None] == self.mask_token_id)   # (B, V^T, T)
        joint = self.laws[causal] * (1 if causal else agree.all(2))                      # (V^T,) or (B, V^T)
        p = torch.empty(*idx.shape, self.V, dtype=torch.float64)
        for i in range(T):                                                               # what of the law is left
            p[:, i] = joint @ F.one_hot(self.x[:, i], self.V).double()
            joint = joint * agree[..., i] if causal else joint
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
        specials = torch.stack((torch.full((T,), -30.0).double(), self.odds[:T]), 1).expand(len(idx), -1, -1)
        return torch.cat(((p + 1e-300).log(), specials), -1)

    def logits(self, hidden, real_only=False):
        out = hidden.clone()
        if real_only:
            out[..., self.V:] = float('-inf')
        return out


def cells(canvas, V):
    """How often each of the V^T sequences occurs in canvas (B, T)."""
    number = (canvas * V ** torch.arange(canvas.size(1) - 1, -1, -1)).sum(1)
    return number.bincount(minlength=V ** canvas.size(1))


def empty(oracle, B, prompt=()):
    canvas = torch.full((B, oracle.T), oracle.mask_token_id)
    canvas[:, :len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    return canvas, canvas != oracle.mask_token_id


def distance(canvas, V, law, B):
    """(chi-square statistic, bound) of the samples against a law."""
    assert canvas.min() >= 0 and canvas.max() < V
    return chi_square(cells(canvas, V), B * law)

# -----------------------------------------------------------------------------
# the law of the samples


@pytest.mark.parametrize('rules', [
    dict(commit='random'), dict(commit='left_to_right'), dict(commit='left_to_right', draft='causal'),
    dict(commit='random', steps=3), dict(commit='left_to_right', steps=9), dict(remask='causal'),
], ids=str)
def test_one_token_a_step_reproduces_the_law(rules):
    B, V, T = 20000, 3, 3
    law = random_law(V, T, seed=1)
    oracle = Oracle(V, T, law)
    canvas, nfe, _ = generate_diffusion(oracle, *empty(oracle, B), generator=seeded(), **rules)
    statistic, bound = distance(canvas, V, law, B)
    assert statistic < bound
    if 'remask' not in rules:
        assert (nfe == 3).all()


@pytest.mark.parametrize('commit', ['random', 'left_to_right'])
def test_all_tokens_in_one_step_give_the_product_of_the_marginals(commit):
    """The factorisation error of few steps is known exactly, and the tests of the law would notice it."""
    B, V, T = 20000, 3, 3
    law = random_law(V, T, seed=1)
    marginals = torch.stack([(law[:, None] * F.one_hot(all_sequences(V, T)[:, i], V)).sum(0) for i in range(T)])
    oracle = Oracle(V, T, law)
    canvas, nfe, _ = generate_diffusion(oracle, *empty(oracle, B), steps=1, commit=commit, generator=seeded())
    assert (nfe == 1).all()
    statistic, bound = distance(canvas, V, product_law(marginals), B)
    assert statistic < bound
    statistic, bound = distance(canvas, V, law, B)
    assert statistic > 10 * bound


def test_two_steps_err_by_what_they_should():
    """Left to right, 2 + 1 tokens of 3: p(x0) p(x1) p(x2 | x0, x1)."""
    B, V = 20000, 3
    law = random_law(V, 3, seed=1).view(V, V, V)
    first, second = law.sum((1, 2)), law.sum((0, 2))
    mixed = first[:, None, None] * second[None, :, None] * law / law.sum(2, keepdim=True)
    oracle = Oracle(V, 3, law.flatten())
    canvas, nfe, _ = generate_diffusion(oracle, *empty(oracle, B), steps=2, commit='left_to_right', generator=seeded())
    statistic, bound = distance(canvas, V, mixed.flatten(), B)
    assert statistic < bound and (nfe == 2).all()


def test_infilling_follows_the_conditional_law():
    B, V = 20000, 3
    law = random_law(V, 3, seed=2).view(V, V, V)
    oracle = Oracle(V, 3, law.flatten())
    canvas = torch.tensor([[3, 2, 3]]).repeat(B, 1)
    out, _, _ = generate_diffusion(oracle, canvas, canvas != 3, generator=seeded())
    statistic, bound = distance(out, V, (law * torch.eye(V)[2][None, :, None] / law[:, 2].sum()).flatten(), B)
    assert statistic < bound


def filtered_law(law, V, T, temperature, top_k=None):
    """The law of left-to-right sampling with every conditional of the law sharpened and cut, written out."""
    x, total = all_sequences(V, T), torch.ones(V ** T, dtype=torch.float64)
    table = law.view([V] * T)
    for i in range(T):
        p = table.sum(tuple(range(i + 1, T))) if i < T - 1 else table     # (V, ..., V), the last axis is x_i
        p = (p / p.sum(-1, keepdim=True)) ** (1 / temperature)
        if top_k:
            p = p * (p >= p.sort(-1, descending=True).values[..., top_k - 1:top_k])
        total *= (p / p.sum(-1, keepdim=True))[tuple(x[:, :i + 1].T)]
    return total


@pytest.mark.parametrize('window', [1, 2, 16])
@pytest.mark.parametrize('filters', [dict(), dict(temperature=0.7), dict(top_k=2), dict(temperature=1.5, top_k=2)],
                         ids=str)
def test_verified_drafts_follow_the_causal_law(monkeypatch, window, filters):
    """Whatever the draft is worth: here it comes from another law altogether."""
    monkeypatch.setattr(sample, 'DRAFT_WINDOW', window)
    B, V, T = 12000, 3, 4
    draft, law = random_law(V, T, seed=3), random_law(V, T, seed=4)
    oracle = Oracle(V, T, draft, causal_law=law)
    canvas, nfe, _ = generate_diffusion(oracle, *empty(oracle, B), remask='causal', generator=seeded(), **filters)
    statistic, bound = distance(canvas, V, filtered_law(law, V, T, **{'temperature': 1.0, **filters}), B)
    assert statistic < bound
    statistic, bound = distance(canvas, V, draft, B)
    assert statistic > 10 * bound
    assert nfe.min() >= 2 and nfe.max() <= 2 * T
    assert all((idx <= V).all() for idx, _ in oracle.seen)                # no draft holds [WRONG]


@pytest.mark.parametrize('window', [1, 16])
def test_verified_drafts_after_a_prompt(monkeypatch, window):
    monkeypatch.setattr(sample, 'DRAFT_WINDOW', window)
    B, V, T = 20000, 3, 4
    draft, law = random_law(V, T, seed=3), random_law(V, T, seed=4).view(V, -1)
    oracle = Oracle(V, T, draft, causal_law=law.flatten())
    canvas, _, _ = generate_diffusion(oracle, *empty(oracle, B, [2]), remask='causal', generator=seeded())
    given = torch.zeros_like(law)
    given[2] = law[2] / law[2].sum()
    statistic, bound = distance(canvas, V, given.flatten(), B)
    assert statistic < bound


def test_verified_drafts_where_rows_have_prompts_of_their_own():
    B, V, T = 5000, 3, 4
    law = random_law(V, T, seed=4)
    oracle = Oracle(V, T, random_law(V, T, seed=3), causal_law=law)
    canvas = torch.cat([empty(oracle, B, prompt)[0] for prompt in ([], [2], [0, 1], [0, 1, 2], [1, 1, 1, 1])])
    out, nfe, _ = generate_diffusion(oracle, canvas, canvas != V, remask='causal', generator=seeded())
    for i, prompt in enumerate(([], [2], [0, 1], [0, 1, 2])):
        fits = (all_sequences(V, T)[:, :len(prompt)] == torch.tensor(prompt, dtype=torch.long)).all(1)
        statistic, bound = distance(out[i * B:][:B], V, law * fits / (law * fits).sum(), B)
        assert statistic < bound
    assert torch.equal(out[4 * B:], canvas[4 * B:]) and (nfe[4 * B:] == 0).all() and (nfe[3 * B:4 * B] == 2).all()


def test_good_drafts_save_passes(monkeypatch):
    B, V, T = 500, 3, 6
    law = product_law(torch.rand(T, V, generator=seeded(5), dtype=torch.float64).add(0.1).softmax(1))
    good, bad = Oracle(V, T, law), Oracle(V, T, random_law(V, T, 6, spread=5), causal_law=law)
    for window, passes in ((16, 2), (6, 2), (5, 2), (2, 4), (1, 6)):      # each round gives window + 1 tokens
        monkeypatch.setattr(sample, 'DRAFT_WINDOW', window)
        _, nfe, _ = generate_diffusion(good, *empty(good, B), remask='causal', generator=seeded())
        assert (nfe == passes).all()
    monkeypatch.setattr(sample, 'DRAFT_WINDOW', 16)
    _, nfe, _ = generate_diffusion(bad, *empty(bad, B), remask='causal', generator=seeded())
    # a bad draft costs one more pass: the tokens do not depend on one another here, so that what the causal pass says
    # behind a rejected token is what it would say in the next round, and that draft is accepted as a whole
    assert set(nfe.tolist()) == {2, 3}


@pytest.mark.parametrize('window', [1, 3, 16])
@pytest.mark.parametrize('rules', [dict(remask='causal'), dict(draft='causal', commit='left_to_right')], ids=str)
@pytest.mark.parametrize('head, short_conv', [(False, 0), (True, 0), (True, 2)])
def test_a_cache_changes_what_is_computed_and_nothing_else(monkeypatch, window, rules, head, short_conv):
    """Rows with prompts of their own, that end when they like; also a graph, which has no cache."""
    monkeypatch.setattr(sample, 'DRAFT_WINDOW', window)
    model = tiny_gpt(5, 12, n_layer=2, n_recur=2, draft_head=head, short_conv=short_conv, bigram_rows=9 * short_conv)
    canvas = torch.full((160, 12), 5)
    for rows, prompt in zip(canvas.split(40), ([], [2], [0, 1, 3, 2, 1], [1] * 12)):
        rows[:, :len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    computed, forward = [], model.forward
    monkeypatch.setattr(model, 'forward', lambda *args, **how: computed.append(forward(*args, **how)) or computed[-1])
    results = []
    for cached in (True, False):
        if not cached:
            monkeypatch.setattr(model, 'empty_cache', lambda B, T=0: None)
        results.append(generate_diffusion(model, canvas, canvas != 5, end_id=4, pad_id=0, generator=seeded(), **rules)[:2])
        results[-1] += (sum(hidden[..., 0].numel() for hidden in computed),)
        computed.clear()
    (x, nfe, some), (y, passes, all_of_them) = results
    assert torch.equal(x, y) and torch.equal(nfe, passes) and len(x.unique(dim=0)) > 60
    assert some < 0.7 * all_of_them or window == 16
    graph = tiny_gpt(5, 12, n_layer=2, graph_window=1)
    assert graph.empty_cache(4, 12) is None
    x, _, _ = generate_diffusion(graph, canvas[:40], canvas[:40] != 5, generator=seeded(), **rules)
    assert (x < 5).all()


def text_law(law, V, T, end):
    """The law of the texts, what comes before the first end token or all of it: {tuple: probability}."""
    texts = {}
    for x, p in zip(all_sequences(V, T).tolist(), law.tolist()):
        text = tuple(x[:x.index(end) + 1] if end in x else x)
        texts[text] = texts.get(text, 0) + p
    return texts


@pytest.mark.parametrize('rules', [
    dict(commit='random'), dict(commit='left_to_right'), dict(commit='left_to_right', draft='causal'),
    dict(remask='causal'), dict(remask='causal', top_k=4),
], ids=str)
def test_law_of_texts_with_an_end_token(rules):
    """Padding behind the end token saves passes and leaves the law of the texts as it is."""
    B, V, T, end, pad = 20000, 4, 3, 2, 3
    law = random_law(V, T, seed=7)
    other = random_law(V, T, seed=8)
    causal = 'causal' in rules.values()
    oracle = Oracle(V, T, other if causal else law, causal_law=law if causal else other)
    canvas, nfe, _ = generate_diffusion(oracle, *empty(oracle, B), end_id=end, pad_id=pad, generator=seeded(), **rules)
    expected = text_law(law, V, T, end)
    counts = dict.fromkeys(expected, 0)
    for x in canvas.tolist():
        counts[tuple(x[:x.index(end) + 1] if end in x else x)] += 1
    statistic, bound = chi_square(list(counts.values()), [B * p for p in expected.values()])
    assert statistic < bound
    ends = (canvas == end).long()
    length = torch.where(ends.any(1), ends.argmax(1) + 1, T)
    if rules.get('remask') != 'causal' and rules['commit'] == 'left_to_right':
        assert torch.equal(nfe, length)                                   # a finished row leaves the batch
    if causal or rules['commit'] == 'left_to_right':
        assert ((canvas == pad) | (torch.arange(T) < length[:, None])).all()

# -----------------------------------------------------------------------------
# what holds whatever the network says


def stubborn_gpt(V=5, T=8):
    """A random network that wants to write [MASK] and [WRONG] wherever it may."""
    model = tiny_gpt(V, T, n_recur=1)
    with torch.no_grad():
        model.wte.weight[V] *= 30
        model.wte.weight[V + 1] = -model.wte.weight[V]                    # so that one of them always wins
    logits = model.logits(model(torch.randint(V + 1, (50, T), generator=seeded())).reshape(-1, 16))
    assert (logits.argmax(1) >= V).float().mean() > 0.9
    return model


def starting_canvas(V, T, causal, B=8, seed=0):
    """(canvas, fixed): fixed tokens, visible ones that are not fixed, and masks; a prefix only for the causal rules."""
    generator = seeded(seed)
    canvas = torch.randint(V, (B, T), generator=generator)
    width = torch.arange(B)[:, None] % T
    given = torch.arange(T) < width if causal else torch.rand(B, T, generator=generator) < 0.3
    trusted = given if causal else given & (torch.rand(B, T, generator=generator) < 0.7)
    return canvas.masked_fill(~given, V), trusted


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
@pytest.mark.parametrize('judged', [False, True])
@pytest.mark.parametrize('remask', ['none', 'random', 'wrong', 'causal'])
@pytest.mark.parametrize('commit', ['random', 'confidence', 'left_to_right', 'abstain'])
def test_rules_that_no_sampler_breaks(commit, remask, judged, schedule):
    V, T = 5, 8
    model = stubborn_gpt(V, T)
    for steps in (1, 3, T, T + 5):
        canvas, fixed = starting_canvas(V, T, remask == 'causal', seed=steps)
        before = canvas.clone()
        out, nfe, trace = generate_diffusion(
            model, canvas, fixed, steps=steps, commit=commit, remask=remask, schedule=schedule, trace=True,
            remask_model=tiny_gpt(V, T, seed=9) if judged else None, remask_rate=0.8, generator=seeded(steps))
        assert torch.equal(canvas, before)                                # the caller's canvas is left alone
        assert out.min() >= 0 and out.max() < V                           # no mask is left, no special id is written
        assert all(torch.equal(x[fixed], before[fixed]) for x in trace)
        assert all(((x >= 0) & (x <= V)).all() for x in trace)            # [MASK] may stand there, [WRONG] never
        assert torch.equal(trace[0], before) and torch.equal(trace[-1], out)
        assert nfe.shape == (8,) and nfe.min() >= 0
        assert nfe.max() == len(trace) - 1 if remask != 'causal' and not judged else nfe.max() >= len(trace) - 1
        assert nfe.max() <= (2 * T if remask == 'causal' else 2 * steps if judged else steps)
        hidden_again = [((a != V) & (b == V)).sum().item() for a, b in zip(trace, trace[1:])]
        if remask in ('none', 'causal') or steps == 1:
            assert sum(hidden_again) == 0
            assert all(torch.equal(a[a != V], b[a != V]) for a, b in zip(trace, trace[1:]))
        else:
            assert sum(hidden_again[:-1]) > 0 and hidden_again[-1] == 0
        if remask == 'none':
            masks = (before == V).sum(1)
            assert nfe.max() <= min(steps, int(masks.max())) and (nfe[masks == 0] == 0).all()


@pytest.mark.parametrize('remask', ['random', 'wrong'])
def test_remask_rate_zero_never_remasks(remask):
    canvas, fixed = starting_canvas(5, 8, False)
    _, _, trace = generate_diffusion(stubborn_gpt(), canvas, fixed, steps=12, remask=remask, remask_rate=0.0,
                                     remask_random_ratio=0.5, trace=True, generator=seeded())
    assert len(trace) == 13 and all(torch.equal(a[a != 5], b[a != 5]) for a, b in zip(trace, trace[1:]))


def test_ar_and_hybrid_never_write_specials():
    model, meta = stubborn_gpt(18, 64), ARITHMETIC
    for rules in (dict(ar_prefix=64), dict(ar_prefix=7, steps=9), dict(ar_prefix=7, steps=9, remask='wrong')):
        for s in generate(model, meta, 6, **rules):
            assert s['tokens'][0] == 15 and max(s['tokens']) < 18 and 0 < s['nfe'] <= 63


def test_schedules():
    """How many tokens are visible after each step: linear, equally many; cosine, few early and many late."""
    V, T = 3, 8
    oracle = Oracle(V, T, product_law(torch.full((T, V), 1 / 3, dtype=torch.float64)))
    for schedule, steps, expected in (('linear', 4, [2, 4, 6, 8]), ('linear', 8, [1, 2, 3, 4, 5, 6, 7, 8]),
                                      ('linear', 3, [3, 6, 8]), ('cosine', 4, [1, 3, 5, 8]), ('cosine', 1, [8]),
                                      ('linear', 20, [1, 2, 3, 4, 5, 6, 7, 8])):
        for commit in ('random', 'confidence', 'left_to_right'):
            _, nfe, trace = generate_diffusion(oracle, *empty(oracle, 2), steps=steps, commit=commit, schedule=schedule,
                                               trace=True, generator=seeded())
            assert [(x != V).sum(1).tolist() for x in trace[1:]] == [[n, n] for n in expected]
            assert (nfe == len(expected)).all()


def test_commit_rules_choose_what_they_say():
    """An oracle that is surest of the positions 2, 0, 3, 1, in that order."""
    sure = torch.tensor([0.95, 0.7, 0.99, 0.9], dtype=torch.float64)
    marginals = torch.stack((sure, 1 - sure), 1)
    oracle = Oracle(2, 4, product_law(marginals))
    first = {}
    for commit in ('random', 'confidence', 'left_to_right'):
        order = []
        for seed in range(60):
            _, _, trace = generate_diffusion(oracle, *empty(oracle, 1), commit=commit, choice_temperature=0.0,
                                             temperature=0.0, trace=True, generator=seeded(seed))
            order.append([(a != b).nonzero()[0, 1].item() for a, b in zip(trace, trace[1:])])
        first[commit] = {tuple(o) for o in order}
    assert first['left_to_right'] == {(0, 1, 2, 3)} and first['confidence'] == {(2, 0, 3, 1)}
    assert len(first['random']) > 15


def test_gumbel_noise_of_the_confidence_order():
    """With noise 1, the first position is chosen with the probabilities that the confidences are the logarithms of."""
    B, p = 20000, torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    masked = torch.tensor([1, 1, 1, 1, 0]).bool().expand(B, 5)
    confidence = F.pad(p.log(), (0, 1), value=5.0).expand(B, 5)

    def first(noise_scale, count=1):
        score = commit_order('confidence', None, None, masked, (None, confidence, None), noise_scale=noise_scale, priority=(),
                             generator=seeded())
        return first_of(score, masked, torch.full((B,), count))
    chosen = first(1.0)
    assert (chosen.sum(1) == 1).all()
    statistic, bound = chi_square(chosen.sum(0)[:4], B * p)
    assert statistic < bound and not chosen[:, 4].any()
    statistic, bound = chi_square(first(100.0).sum(0)[:4], torch.full((4,), B / 4))
    assert statistic < 3 * bound
    assert first(0.0, 2)[0].tolist() == [1, 1, 0, 0, 0] and not first(1.0, -1).any()


def test_proposals_come_with_the_unfiltered_probability():
    oracle = Oracle(3, 2, random_law(3, 2, seed=1))
    canvas = torch.tensor([[3, 3], [1, 3]]).repeat(50, 1)
    hidden, where = oracle(canvas), canvas == 3
    ids, confidence, logp_all = propose(oracle, hidden, where, dict(temperature=0.3, top_k=2), seeded())
    assert confidence.dtype == torch.float64 and (ids[~where] == 0).all() and (confidence[~where] == 0).all()
    logp = hidden[..., :3].log_softmax(-1).gather(2, ids[..., None])[..., 0]
    assert torch.allclose(confidence[where], logp[where]) and len(ids[:, 0].unique()) == 2

# -----------------------------------------------------------------------------
# the remask rules


def remasked_share(oracle, B=4000, judge=None, fixed=None, **rules):
    """A complete, untrusted canvas, one step: the share of the rows in which each position was re-masked (T,)."""
    canvas = torch.zeros(B, oracle.T, dtype=torch.long)
    fixed = torch.zeros_like(canvas).bool() if fixed is None else fixed
    out, _, trace = generate_diffusion(oracle, canvas, fixed, steps=2, trace=True, remask_model=judge,
                                       generator=seeded(), **rules)
    assert (out < oracle.V).all() and torch.equal(trace[0], canvas)
    return (trace[1] == oracle.mask_token_id).double().mean(0)


def within_noise(shares, expected, B=4000):
    expected = torch.as_tensor(expected).double()
    sigma = (expected * (1 - expected) / B).sqrt()
    return ((shares - expected).abs() <= 4.5 * sigma).all()


def test_remask_rules_have_the_probabilities_they_say():
    T, wrong = 4, torch.tensor([1e-6, 0.25, 0.6, 1 - 1e-6])
    law = product_law(torch.full((T, 3), 1 / 3, dtype=torch.float64))
    oracle, judge = Oracle(3, T, law, wrong=wrong), Oracle(3, T, law, wrong=1 - wrong)
    share = remasked_share
    assert within_noise(share(oracle, remask='wrong', remask_rate=1.0), wrong)
    assert within_noise(share(oracle, remask='wrong', remask_rate=0.3), 0.3 * wrong)
    assert within_noise(share(oracle, remask='random', remask_rate=0.3), [0.3] * T)
    assert within_noise(share(oracle, remask='wrong', remask_rate=0.5, remask_random_ratio=1.0), [0.5] * T)
    assert within_noise(share(oracle, remask='wrong', remask_rate=0.5, remask_random_ratio=0.4),
                        0.5 * (0.6 * wrong + 0.4))
    assert within_noise(share(oracle, judge=judge, remask='wrong', remask_rate=0.7), 0.7 * (1 - wrong))
    fixed = torch.tensor([0, 0, 1, 1]).bool().expand(4000, T)
    assert within_noise(share(oracle, fixed=fixed, remask='random', remask_rate=0.9), [0.9, 0.9, 0, 0])


@pytest.mark.parametrize('patience, power', [(0.0, 1), (1.0, 2), (2.0, 4)])
def test_patience_counts_a_doubt_less_while_little_is_visible(patience, power):
    """Half of the row is visible: its doubts count as their power 2^patience; where all of it is, they count in full."""
    T, B, wrong = 4, 4000, torch.tensor([0.3, 0.8, 0.5, 0.5])
    oracle = Oracle(3, T, product_law(torch.full((T, 3), 1 / 3, dtype=torch.float64)), wrong=wrong)
    canvas = torch.tensor([0, 1, 3, 3]).expand(B, T)
    _, _, trace = generate_diffusion(oracle, canvas, torch.zeros(B, T).bool(), steps=2, remask='wrong', remask_patience=patience,
                                     trace=True, generator=seeded())
    assert within_noise((trace[1] == 3).double().mean(0)[:2], wrong[:2] ** power)
    assert within_noise(remasked_share(oracle, remask='wrong', remask_patience=patience), wrong)


def test_text_without_an_end_is_sampled_with_patience(monkeypatch):
    asked = []
    monkeypatch.setattr(sample, 'generate_diffusion', lambda model, canvas, fixed, **more: (
        asked.append(more['remask_patience']), (canvas * 0, torch.ones(len(canvas)), None))[1])
    model = tiny_gpt(18, 64, n_recur=1)
    for meta in (ARITHMETIC, dict(ARITHMETIC, bos=None, eos=None, pad=None)):
        for more in ({}, dict(remask_patience=0.5)):
            sample.generate(model, meta, 2, remask='wrong', **more)
    assert asked == [0.0, 0.5, 1.0, 0.5]


@torch.no_grad()
def test_p_wrong_is_what_the_token_that_stands_there_lacks():
    """1 - p(that token), in the softmax over the whole vocabulary, [WRONG] and [MASK] with its bias."""
    model, ids = tiny_gpt(3, 4), torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
    for bias in (0.0, 2.0):
        model.mask_logit_bias.fill_(bias)
        logits = F.linear(model(ids), model.wte.weight)[..., :5]
        logits[..., 3] += bias
        p = logits.softmax(-1)
        got = p_wrong(model, model(ids), ids)
        assert got.shape == ids.shape
        for b, t in ((b, t) for b in range(2) for t in range(4)):
            assert got[b, t].item() == pytest.approx(1 - p[b, t, ids[b, t]].item(), abs=1e-6)


@torch.no_grad()
def test_p_mask():
    """At masked positions: of the softmax over the real tokens and [MASK], whose logit has the bias; elsewhere 0."""
    model, ids = tiny_gpt(3, 4), torch.tensor([[3, 1, 3, 1], [2, 3, 3, 3]])
    for bias in (0.0, -1.5, 3.0):
        model.mask_logit_bias.fill_(bias)
        logits = F.linear(model(ids), model.wte.weight)[..., :4]
        logits[..., 3] += bias
        expected = torch.where(ids == 3, logits.softmax(-1)[..., 3], 0.0)
        assert torch.allclose(p_mask(model, model(ids), ids == 3).float(), expected, atol=1e-6)
    assert p_mask(model, model(ids), torch.zeros_like(ids).bool()).sum() == 0


def reluctant(keep, V=3):
    """An oracle that would rather leave some positions open: keep (T,), its log-odds of [MASK] there."""
    oracle = Oracle(V, len(keep), random_law(V, len(keep), seed=1))
    answer = oracle.__call__

    class Reluctant(Oracle):
        def __init__(self):
            vars(self).update(vars(oracle))

        def __call__(self, idx, causal=False, previous=None, cache=None):
            hidden = answer(idx, causal)
            hidden[..., V] = torch.as_tensor(keep, dtype=hidden.dtype)[:idx.size(1)]
            return hidden
    return Reluctant()


@pytest.mark.parametrize('remask', ['none', 'wrong'])
def test_commit_abstain_fills_what_the_network_is_readiest_for(remask):
    keep = [0.3, -2.0, 1.5, -1.0, -3.0]
    model = reluctant(keep)
    canvas, fixed = empty(model, 50)
    canvas[:10, 1], fixed[:10, 1] = 2, True                               # the readiest but one is given
    filled, nfe, trace = generate_diffusion(model, canvas, fixed, commit='abstain', remask=remask, correct_share=0.0,
                                            trace=True, generator=seeded())
    for before, after in zip(trace, trace[1:]):
        for row, now in zip(before, after):
            masked = [t for t in range(5) if row[t] == 3]
            chosen = {t for t in masked if now[t] != 3}
            assert chosen == set(sorted(masked, key=lambda t: keep[t])[:len(chosen)])
            assert bool(chosen) == bool(masked)
    assert (filled < 3).all() and torch.equal(filled[fixed], canvas[fixed])
    if remask == 'none':
        assert (nfe[:10] == 4).all() and (nfe[10:] == 5).all()
    _, nfe, trace = generate_diffusion(model, *empty(model, 50), commit='abstain', steps=2, trace=True, generator=seeded())
    assert (trace[1] != 3).tolist() == [[False, True, False, True, True]] * 50 and (nfe == 2).all()


def test_commit_abstain_draws_from_the_law():
    """The order depends on the place alone here, so that one token a step is as exact as any other order."""
    law, model = random_law(3, 3, seed=1), reluctant([1.0, -1.0, 0.0])
    canvas, _, _ = generate_diffusion(model, *empty(model, 20000), commit='abstain', generator=seeded())
    statistic, bound = distance(canvas, 3, law, 20000)
    assert statistic < bound


def test_the_judge_sees_completed_canvases():
    law = random_law(3, 4, seed=1)
    oracle, judge = Oracle(3, 4, law), Oracle(3, 4, random_law(3, 4, seed=2), wrong=[0.5] * 4)
    canvas, fixed = empty(oracle, 50, [1])
    _, nfe, trace = generate_diffusion(oracle, canvas, fixed, steps=6, remask='wrong', remask_model=judge,
                                       remask_rate=1.0,
                                       trace=True, generator=seeded())
    assert len(judge.seen) == 5 and len(oracle.seen) == 6                 # the last step asks nobody
    for (idx, causal), x in zip(judge.seen, trace):
        assert not causal and (idx < 3).all() and torch.equal(idx[x != 3], x[x != 3])
    assert (nfe == 11).all()


def test_committed_tokens_are_those_that_the_judge_saw():
    oracle, judge = [Oracle(3, 4, random_law(3, 4, seed=1), wrong=[1e-9] * 4) for _ in range(2)]
    _, _, trace = generate_diffusion(oracle, *empty(oracle, 50), steps=4, remask='wrong', remask_model=judge,
                                     correct_share=0.0, trace=True, generator=seeded())
    for (idx, _), before, after in zip(judge.seen, trace, trace[1:]):
        new = (before == 3) & (after != 3)
        assert new.sum() == 50 and torch.equal(after[new], idx[new])


def test_remasking_does_not_slow_the_filling_down():
    """What is re-masked is made up for by more commits: each step ends with the masks that the schedule asks for."""
    oracle = Oracle(2, 8, random_law(2, 8, seed=1))
    _, _, trace = generate_diffusion(oracle, *empty(oracle, 200), steps=8, remask='random', remask_rate=0.15,
                                     correct_share=0.0, trace=True, generator=seeded())
    doubted = [((a != 2) & (b == 2)).sum(1) for a, b in zip(trace, trace[1:])]
    for step, count in enumerate(doubted):                           # a token is not written in the step that doubts it
        assert torch.equal((trace[step + 1] == 2).sum(1), count.clamp(min=7 - step))
    assert all((count > 0).any() for count in doubted[2:-1])


def test_correct_share_ends_the_filling_early():
    oracle = Oracle(2, 8, random_law(2, 8, seed=1))
    for share, filled_after in ((0.0, 8), (0.25, 6), (0.5, 4), (1.0, 1)):
        _, nfe, trace = generate_diffusion(oracle, *empty(oracle, 5), steps=8, remask='random', remask_rate=0.0,
                                           correct_share=share, trace=True, generator=seeded())
        assert [bool((x == 2).any()) for x in trace].index(False) == filled_after
        assert (nfe == 8).all()                                           # the rest of the steps looks for errors


@pytest.mark.parametrize('remask', ['none', 'random'])
@torch.no_grad()
def test_a_self_conditioned_network_is_shown_its_last_prediction(monkeypatch, remask):
    """Its likeliest real tokens where a mask stood in the step before and still stands; the mask token everywhere else."""
    V, T, asked = 5, 8, []
    model = tiny_gpt(V, T, self_condition=True)
    model.mask_logit_bias.fill_(50.0)                                     # it would rather abstain
    forward = model.forward
    monkeypatch.setattr(model, 'forward', lambda idx, previous: asked.append((idx.clone(), previous.clone())) or
                        forward(idx, previous=previous))
    canvas, again = torch.tensor([[1, V, V, 2, V, V, V, V]]).repeat(20, 1), 0
    generate_diffusion(model, canvas, torch.arange(T).expand(20, T) == 0, steps=6, remask=remask, remask_rate=0.3,
                       correct_share=0.0, generator=seeded())
    assert len(asked) == 6 and (asked[0][1] == V).all()
    for (x, shown), (after, shown_after) in zip(asked, asked[1:]):
        likeliest = model.logits(forward(x, previous=shown))[..., :V].argmax(-1)
        held = (x == V) & (after == V)
        again += ((x != V) & (after == V)).sum()
        assert torch.equal(shown_after, torch.where(held, likeliest, V)) and held.any()
        assert (likeliest != model.logits(forward(x))[..., :V].argmax(-1)).any() == (shown != V).any()   # it has its say
    assert (again > 0) == (remask == 'random')


def test_repair_finds_the_errors_itself():
    """Nothing is fixed and nothing masked; the network doubts the tokens that never occur in its law."""
    law = torch.zeros(81, dtype=torch.float64)
    law[all_sequences(3, 4).eq(1).all(1)] = 1.0                           # only 1 1 1 1 exists

    class Doubter(Oracle):
        def __call__(self, idx, causal=False, previous=None, cache=None):
            out = super().__call__(idx.masked_fill(idx != 1, 3), causal)
            out[..., 4] = torch.where(idx == 1, -30.0, 30.0)
            return out

    oracle = Doubter(3, 4, law)
    canvas = torch.tensor([[1, 1, 1, 1], [0, 1, 2, 1], [2, 2, 2, 2], [0, 1, 1, 1]])
    fixed = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    out, nfe, _ = generate_diffusion(oracle, canvas, fixed, steps=8, remask='wrong', remask_rate=1.0,
                                     generator=seeded())
    assert out.tolist() == [[1, 1, 1, 1]] * 3 + [[0, 1, 1, 1]]
    out, nfe, _ = generate_diffusion(oracle, canvas, fixed, remask='none', generator=seeded())
    assert torch.equal(out, canvas) and (nfe == 0).all()

# -----------------------------------------------------------------------------
# refusals


def test_rules_that_do_not_fit_are_refused():
    oracle = Oracle(3, 4, random_law(3, 4, seed=1))
    for name in ('commit', 'remask', 'schedule', 'draft'):
        with pytest.raises(UserError, match=f"{name} expects one of .*; got 'best'"):
            generate_diffusion(oracle, *empty(oracle, 2), **{name: 'best'})
    for rules in (dict(), dict(commit='left_to_right', remask='random'), dict(commit='left_to_right', remask='causal')):
        with pytest.raises(UserError, match='writes from left to right and takes nothing back'):
            generate_diffusion(oracle, *empty(oracle, 2), draft='causal', **rules)
    canvas, fixed = empty(oracle, 2)
    with pytest.raises(UserError, match='a fixed position holds a mask'):
        generate_diffusion(oracle, canvas, ~fixed)
    canvas[:, -1] = 1                                                     # a fixed suffix
    for rules in (dict(remask='causal'), dict(draft='causal', commit='left_to_right')):
        with pytest.raises(UserError, match='causal pass cannot see'):
            generate_diffusion(oracle, canvas, canvas != 3, **rules)
    assert not oracle.seen


def test_greedy_confidence_from_an_empty_canvas_is_refused():
    oracle = Oracle(3, 4, random_law(3, 4, seed=1))
    canvas, fixed = empty(oracle, 3)
    for prompt in ([], [1]):                                              # one fixed token is the start symbol
        canvas, fixed = empty(oracle, 3, prompt)
        for noise in (dict(temperature=0.0), dict(choice_temperature=0.0)):
            with pytest.raises(UserError, match='one sample again and again'):
                generate_diffusion(oracle, canvas, fixed, commit='confidence', **noise)
        for greedy in (dict(temperature=0.0), dict(top_k=1)):
            with pytest.raises(UserError, match='commit=abstain without noise writes one sample again and again'):
                generate_diffusion(oracle, canvas, fixed, commit='abstain', **greedy)
    generate_diffusion(oracle, *empty(oracle, 3), commit='abstain', choice_temperature=0.0)   # this one has no say here
    generate_diffusion(oracle, *empty(oracle, 3, [1, 2]), commit='confidence', temperature=0.0)
    generate_diffusion(oracle, *empty(oracle, 1), commit='confidence', temperature=0.0)
    generate_diffusion(oracle, *empty(oracle, 3), commit='random', temperature=0.0)

# -----------------------------------------------------------------------------
# drawing tokens


def test_filtered():
    logits = torch.tensor([[2.0, 1.0, 0.0, 3.0, float('-inf'), float('-inf')],
                           [0.0, 5.0, 1.0, 2.0, float('-inf'), float('-inf')]])
    p = logits.softmax(-1)
    assert torch.allclose(filtered(logits), p)
    assert torch.allclose(filtered(logits, temperature=0.5), (2 * logits).softmax(-1))
    assert filtered(logits, temperature=0).tolist() == [[0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    two = filtered(logits, top_k=2)
    assert (two > 0).tolist() == [[1, 0, 0, 1, 0, 0], [0, 1, 0, 1, 0, 0]]
    assert torch.allclose(two, (p * (two > 0)) / (p * (two > 0)).sum(-1, keepdim=True))
    assert torch.allclose(filtered(logits, top_k=99), p) and torch.allclose(filtered(logits, top_p=1.0), p)
    flat = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).log()
    for top_p, kept in ((0.4, [0, 1, 0, 0]), (0.51, [0, 1, 1, 0]), (0.79, [0, 1, 1, 0]), (1e-6, [0, 1, 0, 0])):
        q = filtered(flat, top_p=top_p)                                   # the token that crosses top_p stays in
        assert (q > 0).tolist() == [kept] and q.sum() == pytest.approx(1)
    assert filtered(flat, top_p=0.51)[0, 1].item() == pytest.approx(5 / 8)
    both = filtered(logits, temperature=2.0, top_k=3, top_p=0.7)         # in this order, each on what the last one left
    q = (logits[0] / 2)[[3, 0, 1]].softmax(0)
    assert torch.allclose(both[0], torch.stack((q[1], *torch.zeros(2), q[0], *torch.zeros(2))) / (q[0] + q[1]),
                          atol=1e-6)


def test_a_large_vocabulary_is_drawn_from_by_the_same_law():
    """Of 6000 words most have no chance: neither the first nor the last, nor a row that does not quite sum to 1, goes wrong."""
    law, V = torch.zeros(6000), 6000
    law[[7, 4096, 5000, 5001, 5997]] = torch.tensor([0.4, 0.3, 0.2, 0.0999, 1e-4])
    drawn = draw(law.expand(300, 100, V), seeded())
    assert drawn.shape == (300, 100) and (law[drawn] > 0).all()
    statistic, bound = chi_square(drawn.flatten().bincount(minlength=V)[law > 0], law[law > 0] / law.sum() * drawn.numel())
    assert statistic < bound
    one = torch.eye(V)[[0, 3, V - 1]]
    assert draw(one / 3, seeded()).tolist() == [0, 3, V - 1] and draw(torch.zeros(0, V)).shape == (0,)


def test_draw():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    ids = draw(p.expand(100, 200, 4), seeded())
    assert ids.shape == (100, 200)
    statistic, bound = chi_square(ids.flatten().bincount(minlength=4), 20000 * p.double())
    assert statistic < bound
    assert draw(torch.zeros(3, 0, 4)).shape == (3, 0) and draw(torch.zeros(0, 4)).dtype == torch.long
    assert torch.equal(draw(torch.eye(4)), torch.arange(4))


def test_close_rows():
    M, E, P = 9, 5, 7                                                     # mask, end, padding
    x = torch.tensor([[1, E, 2, E, 3],        # finished: what was masked behind the end becomes padding
                      [1, M, E, 2, 3],        # a hole left of the end
                      [1, E, M, 2, M],        # holes right of the end
                      [1, 2, 3, 4, E],
                      [E, 1, 2, 3, 4]])
    everywhere = torch.ones_like(x).bool()
    assert close_rows(x, everywhere, M, E, P).tolist() == [
        [1, E, P, P, P], [1, M, E, 2, 3], [1, E, P, P, P], [1, 2, 3, 4, E], [E, P, P, P, P]]
    masked = torch.tensor([[0, 0, 1, 0, 1]]).bool().expand(5, 5)
    assert close_rows(x, masked, M, E, P).tolist() == [
        [1, E, P, E, P], [1, M, E, 2, 3], [1, E, P, 2, P], [1, 2, 3, 4, E], [E, 1, P, 3, P]]
    assert close_rows(x, everywhere, M, None, None) is x

# -----------------------------------------------------------------------------
# text in, text out

STREAM = dict(ARITHMETIC, name='text', format='stream', vocab_size=3, itos=['a', 'b', '\n'], bos=None, eos=None,
              pad=None)


def test_encode_and_decode():
    ids = encode(ARITHMETIC, '(+12)=3')
    assert ids == [10, 12, 1, 2, 11, 14, 3]
    assert decode(ARITHMETIC, [15, *ids, 16, 17, 4]) == ('(+12)=3', True)
    assert decode(ARITHMETIC, [15, *ids]) == ('(+12)=3', False)
    assert decode(ARITHMETIC, [15, 1, 17, 2]) == ('1·2', False)           # scored as wrong, not hidden, and as long as it is
    assert decode(ARITHMETIC, [15, 1, 17, 17, 17]) == ('1·', False)       # one is enough to see it
    assert decode(ARITHMETIC, [15, 1, 17]) == ('1·', False) and decode(ARITHMETIC, [15, 17, 17, 2]) == ('··2', False)
    assert decode(ARITHMETIC, [15, 16, 16]) == ('', True)
    assert encode(STREAM, 'ab\n') == [0, 1, 2] and decode(STREAM, [0, 2, 1]) == ('a\nb', False)
    with pytest.raises(UserError, match="'x' in '1x2' is not in the vocabulary of arithmetic: '0123"):
        encode(ARITHMETIC, '1x2')


def test_start_canvas():
    model = SimpleNamespace(config=SimpleNamespace(block_size=8), mask_token_id=18)
    canvas, fixed = start_canvas(model, ARITHMETIC, 3)
    assert canvas.tolist() == [[15] + [18] * 7] * 3 and fixed.tolist() == [[True] + [False] * 7] * 3
    canvas, fixed = start_canvas(model, ARITHMETIC, 2, prompt=[1, 2])
    assert canvas.tolist() == [[15, 1, 2] + [18] * 5] * 2 and fixed[0].tolist() == [True] * 3 + [False] * 5
    canvas, fixed = start_canvas(model, ARITHMETIC, 2, prompt=[1], lengths=torch.tensor([2, 6]))
    assert canvas.tolist() == [[15, 1, 18, 16, 17, 17, 17, 17], [15, 1, 18, 18, 18, 18, 18, 16]]
    assert torch.equal(fixed, canvas != 18)
    model.config.block_size, model.mask_token_id = 4, 3
    assert start_canvas(model, STREAM, 1)[0].tolist() == [[3, 3, 3, 3]]
    canvas, fixed = start_canvas(model, STREAM, 1, prompt=[2], lengths=torch.tensor([3]))
    assert canvas.tolist() == [[2, 3, 3]] and fixed.tolist() == [[True, False, False]]


@pytest.mark.parametrize('meta, prompt, lengths, message', [
    (ARITHMETIC, [], [3, 7], 'a text of 7 tokens does not fit: block_size 8 leaves room for 6'),
    (ARITHMETIC, [1] * 7, None, 'a text of 7 tokens does not fit: block_size 8 leaves room for 6'),
    (ARITHMETIC, [1, 2, 3], [2, 2], 'a length of 2 is too short: the prompt has 3 tokens'),
    (ARITHMETIC, [], [0, 3], 'a length of 0 is too short'),
    (STREAM, [], [9], 'a text of 9 tokens does not fit: block_size 8 leaves room for 8'),
    (STREAM, [1] * 9, None, 'a text of 9 tokens does not fit: block_size 8 leaves room for 8'),
])
def test_starts_that_do_not_fit(meta, prompt, lengths, message):
    model = SimpleNamespace(config=SimpleNamespace(block_size=8), mask_token_id=18)
    with pytest.raises(UserError, match=message):
        start_canvas(model, meta, 2, prompt, None if lengths is None else torch.tensor(lengths))


def test_a_prompt_is_never_cut():
    """One row's length is too short for the prompt, another's is not."""
    model = SimpleNamespace(config=SimpleNamespace(block_size=8), mask_token_id=18)
    with pytest.raises(UserError, match='the prompt has 3 tokens'):
        start_canvas(model, ARITHMETIC, 2, [1, 2, 3], torch.tensor([2, 5]))


@pytest.mark.parametrize('rules', [
    dict(), dict(commit='confidence', steps=5), dict(remask='causal'), dict(remask='wrong', steps=9),
    dict(ar_prefix=64),
    dict(ar_prefix=5, steps=6)], ids=str)
def test_same_seed_same_samples(rules):
    model = tiny_gpt(18, 64, n_recur=1)
    first, again, other = [generate(model, ARITHMETIC, 4, seed=seed, batch_size=3, **rules) for seed in (1, 1, 2)]
    assert first == again and len(first) == 4
    assert sum(a['tokens'] != b['tokens'] for a, b in zip(first, other)) >= 3        # two short texts may agree by chance
    assert len({tuple(s['tokens']) for s in first}) == 4                  # also across batches
    torch.manual_seed(99)                                                 # the global generator has no say
    assert generate(model, ARITHMETIC, 4, seed=1, batch_size=3, **rules) == first


def test_filters_reach_every_rule():
    """With top_k=1 each way of drawing is greedy: the seed has no say, so two batches of other draws agree."""
    model = tiny_gpt(18, 64, n_recur=1)
    for rules in (dict(ar_prefix=64), dict(remask='causal'), dict(ar_prefix=9, commit='left_to_right'),
                  dict(commit='left_to_right')):
        for filters in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=0)):
            first, second = [generate(model, ARITHMETIC, 2, seed=seed, **rules, **filters) for seed in (1, 2)]
            assert first[0]['tokens'] == first[1]['tokens'] == second[0]['tokens']


def test_generate_returns_whole_samples():
    model = tiny_gpt(18, 64, n_recur=1)
    for s in generate(model, ARITHMETIC, 20, prompt=encode(ARITHMETIC, '(+'), ar_prefix=64):
        assert sorted(s) == ['finished', 'nfe', 'text', 'tokens'] and s['text'].startswith('(+')
        assert s['tokens'][:3] == [15, 10, 12] and s['finished'] == (16 in s['tokens'])
        assert s['tokens'].index(16) == len(s['tokens']) - 1 if s['finished'] else len(s['tokens']) == 64
        assert s['nfe'] == len(s['tokens']) - 3                           # a pass a token, the end token included
        assert json.loads(json.dumps(s)) == s
    lengths = torch.tensor([3, 9, 62])
    for n, s in zip((3, 9, 62), generate(model, ARITHMETIC, 3, lengths=lengths, batch_size=2, steps=70)):
        assert s['finished'] and s['tokens'][-1] == 16 and len(s['tokens']) <= n + 2
        assert s['nfe'] <= n                                              # no row waits for a longer one


def test_hybrid_counts_both_parts():
    oracle = Oracle(3, 6, random_law(3, 6, seed=1), causal_law=random_law(3, 6, seed=2))
    oracle.config.block_size = 6
    meta = dict(STREAM, itos=['a', 'b', 'c'])
    samples = generate(oracle, meta, 7, ar_prefix=2, steps=2)
    assert [causal for _, causal in oracle.seen] == [True, True, False, False]
    assert all(s['nfe'] == 4 and len(s['tokens']) == 6 and not s['finished'] for s in samples)


def test_hybrid_writes_as_many_tokens_of_every_row_wherever_it_begins():
    oracle = Oracle(3, 6, random_law(3, 6, seed=1), causal_law=random_law(3, 6, seed=2))
    canvas, meta = torch.full((2, 6), 3), dict(STREAM, itos=['a', 'b', 'c'])
    canvas[1, :3] = 1
    for i in range(2):
        alone, = fill(oracle, meta, canvas[i:i + 1], canvas[i:i + 1] != 3, ar_prefix=2, trace=True)
        beside = fill(oracle, meta, canvas, canvas != 3, ar_prefix=2, trace=True)[i]
        for sample in (alone, beside):
            drawn = (sample['trace'][:4] != 3).sum(1) - 3 * i                  # canvases before and after the first three passes
            assert drawn.tolist()[:3] == [0, 1, 2] and (sample['trace'][2, :2 + 3 * i] != 3).all()


def test_hybrid_law():
    """An AR prefix of 2, then ancestral: p_causal(x0, x1) p(x2 | x0, x1)."""
    B, V = 20000, 3
    law, causal = random_law(V, 3, seed=1).view(V, V, V), random_law(V, 3, seed=2).view(V, V, V)
    oracle = Oracle(V, 3, law.flatten(), causal_law=causal.flatten())
    samples = generate(oracle, dict(STREAM, itos=['a', 'b', 'c']), B, ar_prefix=2, batch_size=B)
    mixed = causal.sum(2, keepdim=True) * law / law.sum(2, keepdim=True)
    statistic, bound = distance(torch.tensor([s['tokens'] for s in samples]), V, mixed.flatten(), B)
    assert statistic < bound

# -----------------------------------------------------------------------------
# which rules a checkpoint gets

CAUSAL = dict(commit='random', remask='none', ar_prefix=64)


@pytest.mark.parametrize('kind, ratio, chosen, expected', [
    ('unmasking', 0.0, {}, dict(commit='random', remask='none', ar_prefix=0)),
    ('unmasking', 0.3, {}, dict(commit='random', remask='causal', ar_prefix=0)),
    ('unmasking', 0.3, dict(lengths_given=True), dict(commit='random', remask='none', ar_prefix=0)),
    ('unmasking', 0.3, dict(commit='confidence'), dict(commit='confidence', remask='none', ar_prefix=0)),
    ('unmasking', 0.3, dict(ar_prefix=8), dict(commit='random', remask='none', ar_prefix=8)),
    ('unmasking', 0.3, dict(remask='random'), dict(commit='random', remask='random', ar_prefix=0)),
    ('joint', 0.0, {}, dict(commit='random', remask='wrong', ar_prefix=0)),
    ('joint', 0.3, {}, dict(commit='random', remask='causal', ar_prefix=0)),
    ('joint', 0.3, dict(lengths_given=True), dict(commit='random', remask='wrong', ar_prefix=0)),
    ('joint', 0.3, dict(ar_prefix=8), dict(commit='random', remask='wrong', ar_prefix=8)),
    ('joint', 0.3, dict(remask='none'), dict(commit='random', remask='none', ar_prefix=0)),
    ('unmasking', 0.3, dict(judge=True), dict(commit='random', remask='wrong', ar_prefix=0)),
    ('causal', 0.0, {}, CAUSAL),
    ('causal', 0.0, dict(remask='none'), CAUSAL),
    ('causal', 0.5, {}, CAUSAL),
    ('causal', 0.0, dict(ar_prefix=64), CAUSAL),
])
def test_best_rules(kind, ratio, chosen, expected):
    assert best_rules(default_config(training_type=kind, causal_ratio=ratio), **chosen) == expected


def test_best_rules_of_other_checkpoints():
    """Whatever the target was, it learned to tell right from wrong; if it saw wrong tokens only, it calls each one wrong."""
    for kind, target in (('joint', 'original'), ('denoising', 'original'), ('joint', 'wrong')):
        config = default_config(training_type=kind, remask_target=target)
        assert best_rules(config) == dict(commit='random', remask='wrong', ar_prefix=0)
        config['remasking_loss_type'] = 'corrupted_only'
        assert best_rules(config)['remask'] == 'none' and best_rules(config, remask='wrong')['remask'] == 'wrong'
        assert best_rules(config, judge=True)['remask'] == 'wrong'


def test_supports():
    for kind, expected in (('unmasking', (True, False)), ('joint', (True, True)), ('denoising', (True, True)),
                           ('remasking', (False, True)), ('causal', (False, False))):
        for ratio in (0.0, 0.3):
            for target in ('wrong', 'original'):
                config = default_config(training_type=kind, causal_ratio=ratio, remask_target=target)
                assert supports(config) == (expected[0], kind == 'causal' or ratio > 0, expected[1])


def test_best_rules_of_a_checkpoint_that_abstains():
    for kind in ('unmasking', 'joint'):
        config = default_config(training_type=kind, allow_abstain=True)
        assert best_rules(config, commit='abstain')['commit'] == 'abstain' and best_rules(config)['commit'] == 'random'
        for other in (dict(config, allow_abstain=False), {k: v for k, v in config.items() if k != 'allow_abstain'}):
            with pytest.raises(UserError, match='commit=abstain needs a checkpoint trained with --allow_abstain=True'):
                best_rules(other, commit='abstain')


# -----------------------------------------------------------------------------
# merging


def two_checkpoints(tmp_path, first=None, second=None, **more):
    """The paths of two checkpoints with different weights, and the two networks."""
    a, b = tiny_gpt(18, 64, seed=1, n_recur=1), tiny_gpt(18, 64, seed=2, n_recur=1, **more)
    a.mask_logit_bias.fill_(1.0), b.mask_logit_bias.fill_(3.0)
    return (write_checkpoint(tmp_path / 'a.pt', a, **(first or {})), write_checkpoint(tmp_path / 'b.pt', b, **(second or {})),
            a, b)


def test_merging_interpolates_the_weights(tmp_path):
    path, other, a, b = two_checkpoints(tmp_path)
    for weight in (0.0, 0.25, 1.0):
        merged, checkpoint = load_merged(path, other, weight)
        assert not merged.training and checkpoint['meta'] == ARITHMETIC
        for (name, now), x, y in zip(merged.state_dict().items(), a.state_dict().values(), b.state_dict().values()):
            if weight in (0, 1):
                assert torch.equal(now, y if weight else x), name
            else:
                assert torch.allclose(now, 0.75 * x + 0.25 * y, atol=1e-6), name
        assert merged.mask_logit_bias.item() == pytest.approx(1 + 2 * weight)


def test_merging_what_does_not_fit(tmp_path):
    path, other, _, _ = two_checkpoints(tmp_path, n_embd=32)
    with pytest.raises(UserError, match=f'{path} and {other} do not fit together: n_embd is 16 and 32'):
        load_merged(path, other, 0.5)
    other = write_checkpoint(tmp_path / 'b.pt', meta=dict(ARITHMETIC, itos=[*'9876543210()+*=', '<bos>', '<eos>', '<pad>']))
    with pytest.raises(UserError, match='do not fit together: itos is'):
        load_merged(path, other, 0.5)


@pytest.mark.parametrize('first, second, expected', [
    (dict(training_type='unmasking'), dict(training_type='remasking'), (True, False, True)),
    (dict(training_type='remasking'), dict(training_type='unmasking'), (True, False, True)),
    (dict(training_type='unmasking', causal_ratio=0.3), dict(training_type='unmasking'), (True, True, False)),
    (dict(training_type='causal'), dict(training_type='unmasking'), (True, True, False)),
    (dict(training_type='causal'), dict(training_type='causal'), (False, True, False)),
    (dict(training_type='remasking'), dict(training_type='remasking'), (False, False, True)),
    (dict(training_type='causal'), dict(training_type='denoising'), (True, True, True)),
], ids=lambda value: '-'.join(map(str, value.values())) if isinstance(value, dict) else '')
def test_merged_networks_support_what_either_did(tmp_path, first, second, expected):
    path, other, _, _ = two_checkpoints(tmp_path, first, second)
    _, checkpoint = load_merged(path, other, 0.5)
    assert supports(checkpoint['config']) == expected
    if expected[0] and expected[2]:
        assert best_rules(checkpoint['config'], remask='wrong', commit='random')['remask'] == 'wrong'


def test_merged_networks_keep_what_is_known_of_the_judge(tmp_path):
    """The loss type counts of the one that judges; abstaining needs both."""
    unmasking, judge = dict(training_type='unmasking'), dict(training_type='remasking', remasking_loss_type='corrupted_only')
    for first, second in ((unmasking, judge), (judge, unmasking)):
        path, other, _, _ = two_checkpoints(tmp_path, first, second)
        assert load_merged(path, other, 0.5)[1]['config']['remasking_loss_type'] == 'corrupted_only'
    for a, b in ((True, True), (True, False), (False, True)):
        path, other, _, _ = two_checkpoints(tmp_path, dict(unmasking, allow_abstain=a), dict(unmasking, allow_abstain=b))
        assert bool(load_merged(path, other, 0.5)[1]['config']['allow_abstain']) == (a and b)


@pytest.mark.parametrize('kind, ratio, chosen, message', [
    ('remasking', 0.0, {}, 'it judges tokens but cannot write'),
    ('remasking', 0.5, {}, 'it judges tokens but cannot write'),
    ('unmasking', 0.0, dict(remask='causal'), 'no trained causal mode'),
    ('joint', 0.0, dict(ar_prefix=4), 'no trained causal mode'),
    ('causal', 0.0, dict(commit='confidence'), 'samples left to right'),
    ('causal', 0.0, dict(remask='wrong'), 'samples left to right'),
    ('causal', 0.0, dict(remask='causal'), 'samples left to right'),
    ('causal', 0.0, dict(judge=True), 'samples left to right'),
    ('causal', 0.0, dict(ar_prefix=5), 'from left to right to the end'),  # the rest would be of a mode that it never learned
    ('causal', 0.0, dict(lengths_given=True), 'nor be given a length'),
    ('unmasking', 0.0, dict(remask='wrong'), 'not trained to find wrong tokens'),
    ('joint', 0.0, dict(judge=True, remask='random'), 'not for --remask=random'),
])
def test_best_rules_refuses(kind, ratio, chosen, message):
    with pytest.raises(UserError, match=message):
        best_rules(default_config(training_type=kind, causal_ratio=ratio), **chosen)


def test_ar_rules_draw_causally():
    """The rules of a causal checkpoint never use the bidirectional pass, whose law here is another one."""
    V, T = 3, 3
    law = random_law(V, T, seed=2)
    oracle = Oracle(V, T, random_law(V, T, seed=1), causal_law=law)
    rules = best_rules(default_config(training_type='causal', block_size=T))
    samples = generate(oracle, dict(STREAM, itos=['a', 'b', 'c']), 20000, batch_size=20000, **rules)
    statistic, bound = distance(torch.tensor([s['tokens'] for s in samples]), V, law, 20000)
    assert statistic < bound and all(causal for _, causal in oracle.seen)

# -----------------------------------------------------------------------------
# files


def test_write_atomically(tmp_path, monkeypatch):
    path = str(tmp_path / 'a.jsonl')
    write_atomically(path, 'ä\n')
    assert open(path, encoding='utf-8').read() == 'ä\n' and os.listdir(tmp_path) == ['a.jsonl']

    def full(*args):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(os, 'replace', full)
        with pytest.raises(UserError, match='a.jsonl: cannot be written: No space left'):
            write_atomically(path, 'new')
    assert open(path, encoding='utf-8').read() == 'ä\n' and os.listdir(tmp_path) == ['a.jsonl']
    with pytest.raises(UserError, match='cannot be written'):
        write_atomically(str(tmp_path / 'no' / 'b.jsonl'), 'x')
    with pytest.raises(UserError, match='cannot be written'):
        write_atomically(str(tmp_path), 'x')
    assert os.listdir(tmp_path) == ['a.jsonl']


def test_find_checkpoint(tmp_path):
    with pytest.raises(UserError, match=f'no checkpoint under {tmp_path}.*train one first'):
        find_checkpoint('ckpt', str(tmp_path))
    (tmp_path / 'run').mkdir()
    for name, age in (('ckpt_unmasking.pt', 300), ('run/ckpt_joint_all_positions.pt', 100), ('run/ckpt_x.pt.9.tmp', 0),
                      ('run/table.pt', 0)):
        (tmp_path / name).write_bytes(b'')
        os.utime(tmp_path / name, (10 ** 9 - age,) * 2)
    assert find_checkpoint('ckpt', str(tmp_path)) == str(tmp_path / 'run' / 'ckpt_joint_all_positions.pt')
    os.utime(tmp_path / 'ckpt_unmasking.pt', (10 ** 9,) * 2)              # it is the age that counts, not the name
    assert find_checkpoint('ckpt', str(tmp_path)) == str(tmp_path / 'ckpt_unmasking.pt')
    assert find_checkpoint('other.pt', str(tmp_path)) == 'other.pt'


def test_load_task():
    fresh = load_script('sample')
    assert fresh.load_task('shakespeare_char') is None and fresh.load_task('no such dataset') is None
    assert fresh.load_task('arithmetic').verdict('(+12)=3') == '✓'


def test_a_given_length_is_the_length():
    """Neither the end token nor padding is drawn inside a given length, and forbidden ids never are."""
    model = tiny_gpt(V=18, T=16)
    with torch.no_grad():
        model.wte.weight[16:18] += 3 * model.wte.weight.std()                 # an untrained network in love with the end
    lengths = torch.tensor([1, 5, 9, 14] * 8)
    for rules in (dict(), dict(commit='confidence'), dict(remask='random', steps=8)):
        samples = generate(model, dict(ARITHMETIC, block_size=16), len(lengths), lengths=lengths, **rules)
        assert [len(sample['text']) for sample in samples] == lengths.tolist()
        assert all(sample['finished'] for sample in samples)


# -----------------------------------------------------------------------------
# rewriting in place

REPAIRS = dict(commit='random', remask='wrong', remask_threshold=0.5, rewrite=True, temperature=0.0)


def test_rewriting_is_one_look_and_the_likeliest_token_wherever_another_is_less_likely_than_not():
    model, x = tiny_gpt(5, 9), torch.randint(6, (50, 9), generator=seeded(3))              # 5 is the mask
    fixed = (torch.arange(9) < 2) & (x != 5)
    result, nfe, _ = generate_diffusion(model, x, fixed, steps=1, **REPAIRS, generator=seeded())
    with torch.no_grad():
        logits = model.logits(model(x))
    unsure = logits.softmax(-1).gather(-1, x[..., None])[..., 0] < 0.5
    rewritten = (x == 5) | (unsure & ~fixed)
    assert torch.equal(result, torch.where(rewritten, logits[..., :5].argmax(-1), x)) and (nfe == 1).all()
    assert (result != x)[x != 5].any() and (result == x)[x != 5].any()


def test_a_rewritten_end_moves_the_padding():
    """The end token 2 is doubted and becomes text; behind the new end there is padding, whatever the network would like there."""
    class Told(Oracle):
        def __call__(self, idx, causal=False, previous=None, cache=None):
            return 20 * F.one_hot(torch.tensor([[0, 1, 1, 2, 0]]), 6).double()
    canvas = torch.tensor([[0, 1, 2, 3, 3]])
    result, _, _ = generate_diffusion(Told(4, 5, None), canvas, canvas < 0, steps=1, **REPAIRS, end_id=2, pad_id=3,
                                      generator=seeded())
    assert result.tolist() == [[0, 1, 1, 2, 3]]


def test_rewriting_needs_rules_that_do_not_look_at_candidates():
    model, x = tiny_gpt(5, 9), torch.full((1, 9), 5)
    for more in (dict(commit='confidence'), dict(remask='none'), dict(remask='p2')):
        with pytest.raises(UserError, match='rewrite goes with'):
            generate_diffusion(model, x, x < 0, **{**REPAIRS, 'remask_threshold': None, **more})
