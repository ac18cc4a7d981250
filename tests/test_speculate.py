"""
Writing from left to right: speculative sampling, its drafts, its cache, and plain autoregressive sampling.

Whatever a draft is worth, the samples follow the causal law, which is known exactly here.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ARITHMETIC, all_sequences, default_config, fresh_gpt, seeded, tiny_gpt
from oracles import (Oracle, empty, filtered_law, follows, given_prompt, misses, product_law, random_law,
                     settled, stubborn_gpt, texts_follow, uniform)

from configurator import UserError
from parts import speculate
from parts.cache import Cache
from parts.look import Sampling
from parts.presets import best_rules
from parts.speculate import Drafter, left_to_right, next_state, surprise, write
from plumbing.evaluate import causal_nll
from plumbing.rows import Ends, left_of
from sample import USUAL, How, fill, generate, generate_diffusion

LETTERS = dict(ARITHMETIC, name='text', format='stream', vocab_size=3, itos=['a', 'b', 'c'], bos=None,
               eos=None, pad=None)
FILTERS = [dict(), dict(temperature=0.7), dict(top_k=2), dict(temperature=1.5, top_k=2)]
PROMPTS = ([], [2], [0, 1], [0, 1, 2], [1, 1, 1, 1])


def drafted(model, canvas, fixed, ends=Ends(), seed=0, **filters):
    """Speculative sampling: (canvas, nfe, canvases)."""
    return write(model, canvas, filters, ends, generator=seeded(seed), trace=True)


def autoregressive(model, canvas, fixed, ends=Ends(), seed=0, **filters):
    """One token a pass: (canvas, nfe, canvases)."""
    return left_to_right(model, canvas, left_of(fixed), canvas.size(1), filters, ends,
                         generator=seeded(seed), trace=True)


SAMPLERS = [drafted, autoregressive]


@pytest.fixture
def window(monkeypatch):
    """window(n): drafts have n tokens from now on."""
    return lambda n: monkeypatch.setattr(speculate, 'WINDOW', n)


# -----------------------------------------------------------------------------
# the law of the samples


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_either_sampler_follows_the_causal_law(sampler):
    B, V, T = 8000, 3, 3
    law = random_law(V, T, seed=1)
    oracle = Oracle(V, T, random_law(V, T, seed=2), causal_law=law)
    canvas, nfe, _ = sampler(oracle, *empty(oracle, B))
    assert follows(canvas, V, law)
    if sampler is autoregressive:
        assert (nfe == T).all() and all(causal for _, causal in oracle.seen)


@pytest.mark.parametrize('size', [1, 2, 16])
@pytest.mark.parametrize('filters', FILTERS, ids=str)
def test_verified_drafts_follow_the_causal_law(window, size, filters):
    """Whatever the draft is worth: here it comes from another law altogether."""
    window(size)
    B, V, T = 6000, 3, 4
    draft, law = random_law(V, T, seed=3), random_law(V, T, seed=4)
    oracle = Oracle(V, T, draft, causal_law=law)
    canvas, nfe, _ = drafted(oracle, *empty(oracle, B), **filters)
    assert follows(canvas, V, filtered_law(law, V, T, **filters)) and misses(canvas, V, draft)
    assert nfe.min() >= 2 and nfe.max() <= 2 * T
    assert all((idx <= V).all() for idx, _ in oracle.seen)  # no draft holds [WRONG]


def prompted(oracle, B):
    """B rows of each of the prompts, which take turns; the last one is complete: (canvas, fixed)."""
    canvas = torch.stack([empty(oracle, B, prompt)[0] for prompt in PROMPTS], 1).flatten(0, 1)
    return canvas, canvas != oracle.V


@pytest.mark.parametrize('head', [None, 'junk'])
def test_rows_with_prompts_of_their_own(head):
    """Rows go on at different places and leave at different times; each keeps its own draft."""
    V, T = 3, 4
    law = random_law(V, T, seed=4)
    oracle = HeadOracle(V, T, law, head) if head else Oracle(V, T, random_law(V, T, seed=3), causal_law=law)
    canvas, fixed = prompted(oracle, 2000)
    out, nfe, _ = drafted(oracle, canvas, fixed)
    for i, prompt in enumerate(PROMPTS[:4]):
        assert follows(out[i::5], V, given_prompt(law, V, T, prompt))
    assert torch.equal(out[4::5], canvas[4::5]) and (nfe[4::5] == 0).all()
    assert (nfe[3::5] == (1 if head else 2)).all()


@pytest.mark.parametrize('sampler, filters', [(autoregressive, {}), (drafted, {}), (drafted, dict(top_k=4))])
def test_law_of_texts_with_an_end_token(sampler, filters):
    """Padding behind the end token saves passes and leaves the law of the texts as it is."""
    B, V, T, end, pad = 8000, 4, 3, 2, 3
    law = random_law(V, T, seed=7)
    oracle = Oracle(V, T, random_law(V, T, seed=8), causal_law=law)
    canvas, nfe, _ = sampler(oracle, *empty(oracle, B), Ends(end, pad), **filters)
    assert texts_follow(canvas, law, V, T, end)
    ends = (canvas == end).long()
    length = torch.where(ends.any(1), ends.argmax(1) + 1, T)
    assert ((canvas == pad) | (torch.arange(T) < length[:, None])).all()
    if sampler is autoregressive:
        assert torch.equal(nfe, length)  # a finished row leaves the batch


def test_good_drafts_save_passes(window):
    B, V, T = 500, 3, 6
    law = product_law(torch.rand(T, V, generator=seeded(5), dtype=torch.float64).add(0.1).softmax(1))
    good, bad = Oracle(V, T, law), Oracle(V, T, random_law(V, T, 6, spread=5), causal_law=law)
    for size, passes in ((16, 2), (6, 2), (5, 2), (2, 4), (1, 6)):  # each round gives window + 1 tokens
        window(size)
        assert (drafted(good, *empty(good, B))[1] == passes).all()
    # a bad draft costs one more pass: the tokens do not depend on one another here, so that what the causal
    # pass says behind a rejected token is what it would say in the next round, and that draft is accepted
    window(16)
    assert set(drafted(bad, *empty(bad, B))[1].tolist()) == {2, 3}


def test_the_rules_of_a_causal_checkpoint_draw_causally():
    """They never use the bidirectional pass, whose law here is another one."""
    V, T = 3, 3
    law = random_law(V, T, seed=2)
    oracle = Oracle(V, T, random_law(V, T, seed=1), causal_law=law)
    rules = best_rules(default_config(training_type='causal', block_size=T))
    samples = generate(oracle, LETTERS, 8000, batch_size=8000, **rules)
    assert follows(torch.tensor([s['tokens'] for s in samples]), V, law)
    assert all(causal for _, causal in oracle.seen)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_what_neither_sampler_breaks(sampler):
    V, T = 5, 8
    model = stubborn_gpt(V, T)
    canvas = torch.randint(V, (8, T), generator=seeded())
    fixed = torch.arange(T) < torch.arange(8)[:, None] % T
    canvas = canvas.masked_fill(~fixed, V)
    before = canvas.clone()
    out, nfe, trace = sampler(model, canvas, fixed)
    assert torch.equal(canvas, before) and out.min() >= 0 and out.max() < V
    assert torch.equal(trace[0], before) and torch.equal(trace[-1], out)
    sure = settled(torch.stack(trace), V)
    assert all(torch.equal(a[a != V], b[a != V]) for a, b in zip(sure, sure[1:]))    # nothing is taken back
    verdicts = sum((step >= 0).all().item() for step in trace) - 1
    assert nfe.max() <= (2 * T if sampler is drafted else T) and nfe.max() >= verdicts


@pytest.mark.parametrize('head', [False, True])
def test_the_trace_has_what_was_drafted_and_what_became_of_it(head):
    """From the left the draft stays as far as it is accepted, then comes one token, and the rest goes."""
    V, T, sizes = 4, 12, set()
    model = tiny_gpt(V, T, draft_head=head)
    canvas, fixed = torch.full((5, T), V), torch.zeros(5, T).bool()
    out, nfe, trace = drafted(model, canvas, fixed)
    plain, passes, nothing = write(model, canvas, {}, Ends(), generator=seeded())
    assert torch.equal(out, plain) and torch.equal(nfe, passes) and nothing is None
    for draft, verdict in zip(trace, trace[1:]):
        for guess, true in zip(draft.tolist(), verdict.tolist()):
            at = [i for i, id in enumerate(guess) if id < 0]
            if at:
                assert at == [*range(at[0], at[0] + len(at))] and true[:at[0]] == guess[:at[0]]
                assert len(at) == min(speculate.WINDOW, T - at[0]) and V not in true[:at[0] + 1]
                written = T - true.count(V) - at[0]                 # the accepted ones and one more
                assert all(true[i] == ~guess[i] for i in at[:written - 1]) and written <= len(at) + 1
                sizes.add(written)
    assert len(sizes) > 2


def test_forbidden_ids_are_not_written_where_a_text_goes_on():
    model = uniform(9, V=6)
    canvas, _ = empty(model, 40)
    closed = (torch.arange(9) < 5).expand(40, 9)
    out, _, _ = left_to_right(model, canvas, closed, 9, {}, Ends(4, 5, (3, 4, 5)), generator=seeded())
    assert (out[:, :5] < 3).all() and (out[:, 5:] >= 3).any()


# -----------------------------------------------------------------------------
# the cache


@torch.no_grad()
@pytest.mark.parametrize('short_conv', [0, 1, 3])
def test_a_cache_gives_the_causal_pass_at_any_windows(short_conv):
    """Rows at places of their own, tokens that are taken back, a window that stands out of the row."""
    parts = 'shortcuts' + f',short_conv:{short_conv},bigrams:{20 * short_conv}' * (short_conv > 0)
    model, x = tiny_gpt(V=7, T=8, n_layer=2, parts=parts), torch.randint(7, (3, 12), generator=seeded())
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        for plain in (True, False):
            model.compute_dtype, model.plain_attention = dtype, plain
            full = model(x[:, :8], causal=True)
            cache = Cache.empty(model, 3, 12)
            heads = model.config.n_head
            assert cache.kept.shape == (4, 3 if short_conv else 2, 3, heads, 12, model.config.n_embd // heads)
            model((x[:, :4] + 1) % 7, causal=True, cache=cache)  # all wrong, and written over
            first = model(x[:, :4], causal=True, cache=cache)
            assert (first - full[:, :4]).abs().max() < error
            for at in (torch.tensor([[1, 2], [4, 5], [2, 3]]), torch.tensor([[2, 3], [6, 7], [4, 5]]),
                       torch.tensor([[4, 5, 6, 7, 8], [7, 8, 9, 10, 11], [5, 6, 7, 8, 9]])):
                found = model(x, causal=True, cache=cache, at=at)
                inside = at < 8
                exact = full.gather(1, at.clamp(max=7)[..., None].expand_as(found))
                assert found.shape == (*at.shape, full.size(2)) and found.dtype == dtype
                assert (found - exact)[inside].abs().max() < error


def test_a_cache_gets_room_and_loses_rows():
    cache = Cache.empty(tiny_gpt(), 3)
    assert cache.kept.shape == (2, 2, 3, 2, 0, 8)
    cache.make_room(5)
    assert cache.kept.size(4) == 16 and not cache.kept.any()
    cache.kept += torch.arange(3.0).view(3, 1, 1, 1)
    before = cache.kept
    cache.make_room(16)
    cache.keep_rows(torch.arange(3))
    assert cache.kept is before  # nothing to do
    cache.keep_rows(torch.tensor([2, 0]))
    assert cache.kept.shape[2:] == (2, 2, 16, 8) and cache.kept[0, 0, :, 0, 0, 0].tolist() == [2, 0]
    cache.make_room(17)
    assert cache.kept.size(4) == 32 and not cache.kept[..., 16:, :].any()
    assert Cache.empty(tiny_gpt(parts='graph:1'), 4, 12) is None


@pytest.mark.parametrize('size', [1, 3, 16])
@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('head, parts', [
    (False, ''), (True, ''), (True, 'short_conv:2,bigrams:18'), (False, 'places'), (True, 'places')])
def test_a_cache_changes_what_is_computed_and_nothing_else(monkeypatch, window, size, sampler, head, parts):
    """Rows with prompts of their own, that end when they like; also a graph, which has no cache."""
    window(size)
    model = tiny_gpt(5, 12, n_layer=2, draft_head=head, parts=parts)
    canvas = torch.full((160, 12), 5)
    for rows, prompt in zip(canvas.split(40), ([], [2], [0, 1, 3, 2, 1], [1] * 12)):
        rows[:, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    computed, forward = [], model.forward

    def watched(*args, **how):
        computed.append(forward(*args, **how))
        return computed[-1]

    monkeypatch.setattr(model, 'forward', watched)
    results = []
    for cached in (True, False):
        if not cached:
            monkeypatch.setattr(Cache, 'empty', lambda model, B, S=0: None)
        x, nfe, _ = sampler(model, canvas, canvas != 5, Ends(4, 0))
        results.append((x, nfe, sum(hidden[..., 0].numel() for hidden in computed)))
        computed.clear()
    (x, nfe, some), (y, passes, all_of_them) = results
    assert torch.equal(x, y) and torch.equal(nfe, passes) and len(x.unique(dim=0)) > 40
    assert some < 0.8 * all_of_them or size == 16
    monkeypatch.undo()
    graph = tiny_gpt(5, 12, n_layer=2, parts='graph:1')
    assert (sampler(graph, canvas[:40], canvas[:40] != 5)[0] < 5).all()


# -----------------------------------------------------------------------------
# drafts of a head


class HeadOracle(Oracle):
    """
    An oracle with a draft head. Its hidden states say which prefix it has read, one-hot, and survive a norm.

    law (V^T,): of the causal pass, its only one. head: 'perfect' goes on to what the causal pass will say;
    'junk' answers with a law that depends on the last token alone and has nothing to do with the other.
    """

    def __init__(self, V, T, law, head):
        super().__init__(V, T, law)
        self.head = head
        self.drafter = lambda state, embedded: self.draft(state, embedded.long()[:, 0])
        self.wte = lambda ids: ids[:, None].double()
        rows = []
        for i in range(T):
            joint = law.view(V ** (i + 1), -1).sum(1).view(-1, V)  # (V^i, V)
            rows.append(joint / joint.sum(1, keepdim=True))
        rows.append(torch.full((V**T, V), 1 / V, dtype=torch.float64))  # behind the end, where nothing counts
        self.junk = sum(map(len, rows))
        junk = torch.tensor([[0.8, 0.1, 0.1], [0.05, 0.9, 0.05], [0.3, 0.1, 0.6]], dtype=torch.float64)
        self.answers = torch.cat((*rows, junk[:V, :V]))

    def state(self, node):
        return F.one_hot(node.clamp(max=len(self.answers) - 1), len(self.answers)).double()

    def __call__(self, idx, causal=False, cache=None):
        assert causal, 'with a draft head there is no need for a bidirectional pass'
        self.seen.append((idx.clone(), causal))
        node = [torch.zeros(len(idx), dtype=torch.long)]
        for token in idx[:, :-1].T:
            node.append(node[-1] * self.V + 1 + token.clamp(max=self.V - 1))
        return self.state(torch.stack(node, 1))

    def draft(self, state, ids):
        if self.head == 'junk':
            return self.state(self.junk + ids)
        return self.state((state.argmax(1) * self.V + 1 + ids).clamp(max=self.junk - 1))

    def logits(self, hidden, real_only=False):
        logits = F.pad(self.answers[hidden.argmax(-1)].log(), (0, 2), value=-30.0)
        return logits.masked_fill(torch.arange(self.V + 2) >= self.V, float('-inf')) if real_only else logits


@pytest.mark.parametrize('head', ['junk', 'perfect'])
@pytest.mark.parametrize('size', [1, 2, 16])
@pytest.mark.parametrize('filters', FILTERS, ids=str)
def test_drafts_of_a_head_follow_the_causal_law(window, size, filters, head):
    """Whatever the head says, from where it says it, and never by more than one pass a token."""
    window(size)
    V, T = 3, 4
    law = random_law(V, T, seed=4)
    oracle = HeadOracle(V, T, law, head)
    out, nfe, _ = drafted(oracle, *empty(oracle, 3000), **filters)
    assert follows(out, V, filtered_law(law, V, T, **filters))
    assert nfe.min() >= 1 + math.ceil((T - 1) / (min(size, T) + 1)) and nfe.max() == len(oracle.seen) <= T
    if head == 'junk':
        assert len(nfe.unique()) > 1  # some drafts are accepted, others are not


def test_perfect_drafts_of_a_head_save_passes(window):
    """The first pass has no draft and gives one token; every other one gives its window and one more."""
    V, T = 2, 8
    oracle = HeadOracle(V, T, random_law(V, T, seed=4), 'perfect')
    for size in (1, 2, 3, 7, 8, 16):
        window(size)
        for given in (0, 1, 5, 7):
            _, nfe, trace = drafted(oracle, *empty(oracle, 50, [1] * given))
            n = T - given
            assert (nfe == 1 + math.ceil((n - 1) / (min(size, T) + 1))).all(), (size, given)
            assert ((trace[1] == V).sum(1) == n - 1).all()


def test_drafts_of_a_head_with_an_end_token():
    """Drafted padding and ends follow the law of the texts as well."""
    V, T, end, pad = 3, 4, 1, 2
    law = random_law(V, T, seed=7)
    oracle = HeadOracle(V, T, law, 'junk')
    out, _, _ = drafted(oracle, *empty(oracle, 5000), Ends(end, pad))
    assert texts_follow(out, law, V, T, end)


def test_greedy_drafts_of_a_head_write_what_greedy_sampling_writes():
    oracle = HeadOracle(3, 5, random_law(3, 5, seed=4), 'junk')
    out, _, _ = drafted(oracle, *empty(oracle, 4), temperature=0.0)
    node, text = 0, []
    for _ in range(5):
        text.append(int(oracle.answers[node].argmax()))
        node = 3 * node + 1 + text[-1]
    assert out.tolist() == [text] * 4


@pytest.mark.parametrize('size', [2, 16])
def test_a_network_with_a_draft_head_follows_its_causal_law(window, size):
    """The real one, untrained: its law is the exponential of its own causal_nll, over every sequence."""
    window(size)
    B, V, T = 8000, 3, 4
    model, x = tiny_gpt(V, T, draft_head=True, seed=5), all_sequences(V, T)
    law = (-causal_nll(model, x, torch.ones_like(x).bool())).double().exp()
    canvas = torch.full((B, T), V)
    out, nfe, _ = generate_diffusion(model, canvas, canvas != V, remask='causal', generator=seeded())
    assert follows(out, V, law / law.sum()) and nfe.max() <= T and nfe.double().mean() < T - 0.2


# -----------------------------------------------------------------------------
# the head itself


def test_a_fresh_draft_head_leaves_the_state_as_it_is():
    """So its first guess is what the causal pass said about the token before."""
    torch.manual_seed(0)
    drafter, state, ones = Drafter(16), torch.randn(5, 16), torch.ones(5, 16)
    assert torch.equal(drafter(state, torch.randn(5, 16)), state)
    with torch.no_grad():
        drafter.proj.weight.normal_()
    embedded = torch.arange(16.0).expand(5, 16)
    first, second = drafter(state, ones), drafter(state, embedded)
    assert not torch.allclose(first, state) and not torch.allclose(first, second)
    fed = torch.cat((F.layer_norm(state, (16,)), F.layer_norm(embedded, (16,))), 1)
    h = F.linear(fed, drafter.fc.weight).relu() ** 2
    assert torch.allclose(second, state + F.linear(h, drafter.proj.weight), atol=1e-4)


@torch.no_grad()
def test_the_draft_head_is_fed_the_embedding_of_the_token():
    model = tiny_gpt(draft_head=True)
    state, ids = torch.randn(4, 16, generator=seeded()), torch.tensor([0, 2, 1, 3])
    fed = next_state(model, state, ids)
    assert torch.equal(fed, model.drafter(state, model.wte.weight[ids]))
    half = next_state(model, state.bfloat16(), ids)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), fed, rtol=0.1, atol=0.1)


def test_the_draft_head_is_counted_and_changes_no_other_number():
    """3 n_embd^2 parameters more; neither pass knows of it."""
    plain, more = fresh_gpt(), fresh_gpt(draft_head=True)
    assert plain.drafter is None and more.num_params() - plain.num_params() == 3 * 16 * 16
    x = torch.randint(3, (5, 4), generator=seeded())
    assert all(torch.equal(plain(x, causal=causal), more(x, causal=causal)) for causal in (False, True))
    assert set(more.state_dict()) - set(plain.state_dict()) == {'drafter.fc.weight', 'drafter.proj.weight'}


# -----------------------------------------------------------------------------
# a beginning that is written left to right, the rest by other rules


def two_laws(V, T):
    return Oracle(V, T, random_law(V, T, seed=1), causal_law=random_law(V, T, seed=2))


def test_hybrid_counts_both_parts():
    oracle = two_laws(3, 6)
    samples = generate(oracle, LETTERS, 7, ar_prefix=2, steps=2)
    assert [causal for _, causal in oracle.seen] == [True, True, False, False]
    assert all(s['nfe'] == 4 and len(s['tokens']) == 6 and not s['finished'] for s in samples)


def test_hybrid_writes_as_many_tokens_of_every_row_wherever_it_begins():
    oracle = two_laws(3, 6)
    canvas = torch.full((2, 6), 3)
    canvas[1, :3] = 1
    for i in range(2):
        (alone,) = fill(oracle, LETTERS, canvas[i : i + 1], canvas[i : i + 1] != 3, ar_prefix=2, trace=True)
        beside = fill(oracle, LETTERS, canvas, canvas != 3, ar_prefix=2, trace=True)[i]
        for sample in (alone, beside):
            # the canvases before and after the first three passes
            drawn = (sample['trace'][:4] != 3).sum(1) - 3 * i
            assert drawn.tolist()[:3] == [0, 1, 2] and (sample['trace'][2, : 2 + 3 * i] != 3).all()
    assert sum(causal for _, causal in oracle.seen) == 2 * 4


def test_hybrid_law():
    """Two tokens left to right, then ancestral: p_causal(x0, x1) p(x2 | x0, x1)."""
    B, V = 8000, 3
    oracle = two_laws(V, 3)
    law, causal = (oracle.laws[mode].view(V, V, V) for mode in (False, True))
    samples = generate(oracle, LETTERS, B, ar_prefix=2, batch_size=B)
    mixed = causal.sum(2, keepdim=True) * law / law.sum(2, keepdim=True)
    assert follows(torch.tensor([s['tokens'] for s in samples]), V, mixed.flatten())


@torch.no_grad()
def test_a_draft_of_all_is_corrected_by_the_loop():
    """Without a doubt it is what remask=causal writes, a pass later; what is doubted is written anew."""
    model, rules = tiny_gpt(3, 12, seed=4, scale=0.5), dict(batch_size=40, trace=True)
    plain = generate(model, LETTERS, 40, remask='causal', **rules)
    sure = generate(model, LETTERS, 40, draft=True, remask='wrong', remask_threshold=1.0, **rules)
    assert [s['tokens'] for s in sure] == [s['tokens'] for s in plain]
    assert [s['nfe'] for s in sure] == [s['nfe'] + 1 for s in plain]
    doubts = generate(model, LETTERS, 40, draft=True, remask='wrong', remask_schedule=(0.5, 0.5), **rules)
    for before, after in zip(plain, doubts):
        trace = after['trace'][len(before['trace']) - 1:]
        assert torch.equal(trace[0], before['trace'][-1])                  # the draft
        assert (trace[1:-1] == 3).any() and not (trace[-1] == 3).any()
    with pytest.raises(UserError, match='cannot see what is right of a hole'):
        canvas = torch.full((1, 12), 3)
        canvas[0, 5] = 1
        generate_diffusion(model, canvas, canvas < 3, draft=True, remask='wrong')


# -----------------------------------------------------------------------------
# the causal mode as a doubt


@torch.no_grad()
def test_surprise_is_how_often_a_draft_would_be_rejected():
    model, canvas = tiny_gpt(5, 8, scale=0.5), torch.randint(6, (40, 8), generator=seeded(1))
    run = Sampling(model, canvas, canvas == 0, How(**{**USUAL, 'remask': 'surprise', 'steps': 20}),
                   generator=seeded(2))
    run.committed_logp[:] = -torch.rand(40, 8, generator=seeded(3)).double() * 3
    look = next(run.looks())
    doubt, x = surprise(look), look.completed()
    assert look.passes == 2 and not (x == 5).any() and torch.equal(x[canvas < 5], canvas[canvas < 5])
    p = model.logits(model(x, causal=True), real_only=True).double().softmax(-1)
    p = p.gather(2, x[..., None])[..., 0]
    expected = 1 - (p / run.committed_logp.exp()).clamp(max=1)
    visible = (canvas < 5) & (canvas > 0)
    assert torch.allclose(doubt.double(), torch.where(visible, expected, 0.0), atol=1e-5)
    assert 0.05 < (doubt[visible] == 0).double().mean() < 0.95
