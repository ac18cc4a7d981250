"""Blocks: what each position sees, the same in training and in sampling, and the law of what is written."""

import itertools

import pytest
import torch
from conftest import ARITHMETIC, all_sequences, chi_square, seeded, tiny_gpt
from test_checkpoint import write_checkpoint
from test_tasks import quick_bench
from test_train import arithmetic_rows, default_config, gradients

import train
from configurator import UserError
from corruption import Task, ask
from parts.blocks import (
    AfterPrefix,
    Beside,
    Blocks,
    InBlocks,
    Kept,
    block_nelbo,
    even_blocks,
    grown,
    lay_out,
    random_blocks,
)
from parts.cache import Cache
from parts.presets import choose_rules
from plumbing.evaluate import evaluate
from plumbing.rows import Ends
from plumbing.text import modelled
from sample import generate_diffusion
from suites import blocks
from train import causal_part, check_settings, curricula, loss, progress_line, training_step

V, T = 5, 12
PARTS = ['', 'short_conv:2,shortcuts,bigrams:64,level:8']


def in_blocks(model, x0, start, segment=None):
    """The network for the blocks that begin at start (B, T), having read the clean rows x0 (B, T)."""
    kept = Kept()
    model(x0, causal=True, cache=kept, segment=segment)
    return InBlocks(model, kept, Blocks(start, segment))


def some_rows(B=3):
    return torch.randint(V, (B, T), generator=seeded(B))


def starts(*first, length=4):
    """Where the blocks begin of rows whose first block has so many tokens: (B, T)."""
    first = torch.tensor(first)[:, None]
    return even_blocks(torch.full((len(first),), T), T, torch.full_like(first, length), first)[0]

# -----------------------------------------------------------------------------
# how rows are cut


def test_blocks_by_hand():
    start = starts(4, 1, 3)
    assert start[0].tolist() == [0] * 4 + [4] * 4 + [8] * 4
    assert start[1].tolist() == [0] + [1] * 4 + [5] * 4 + [9] * 3
    rows, blocks = torch.arange(3 * T).view(3, T), Blocks(start)
    cut = blocks.cut(rows, nothing=-1)
    assert cut.shape == (11, 4) and cut[3].tolist() == [12, -1, -1, -1]
    assert cut[6].tolist() == [21, 22, 23, -1]
    assert torch.equal(blocks.lay(cut), rows)


def test_random_blocks_begin_anywhere_and_end_behind_the_text():
    end = torch.randint(1, T + 1, (4000,), generator=seeded(1))
    start, behind = random_blocks(end, T, (1, 3, 8), seeded(2))
    position = torch.arange(T)
    assert (start <= position).all() and (start.diff(dim=1) >= 0).all() and (behind >= end).all()
    assert (behind - end < 8).all() and (start[torch.arange(4000), end - 1] < end).all()
    inside = behind < T                                                    # one begins behind the last one
    assert torch.equal(start[inside].gather(1, behind[inside][:, None])[:, 0], behind[inside])
    share = (start == position).double().mean(0)[3:]                       # the mean of 1, 1/3 and 1/8
    assert (share - (1 + 1 / 3 + 1 / 8) / 3).abs().max() < 0.04

# -----------------------------------------------------------------------------
# what a position sees


@pytest.mark.parametrize('parts', PARTS)
@torch.no_grad()
def test_a_position_sees_the_text_left_of_its_block_and_its_block(parts):
    model, x0, start = tiny_gpt(V, T, parts=parts), some_rows(2), starts(4, 2)
    canvas = some_rows(2).masked_fill(torch.rand(2, T, generator=seeded(3)) < 0.5, V)
    network = in_blocks(model, x0, start)
    blocks = network.blocks
    before = blocks.lay(network(blocks.cut(canvas)).movedim(-1, 0)[0])     # the first channel (B, T)
    for at in range(T):
        clean, other = x0.clone(), canvas.clone()
        clean[:, at] = (clean[:, at] + 1) % V
        other[:, at] = torch.where(other[:, at] == V, 0, V)
        by_text = in_blocks(model, clean, start)(blocks.cut(canvas))
        by_text = blocks.lay(by_text.movedim(-1, 0)[0]) != before
        by_block = blocks.lay(network(blocks.cut(other)).movedim(-1, 0)[0]) != before
        assert torch.equal(by_text, start > at)
        assert torch.equal(by_block, start == start[:, at:at + 1])


@pytest.mark.parametrize('parts', PARTS)
@torch.no_grad()
def test_one_block_is_the_whole_canvas(parts, monkeypatch):
    """But for the start symbol, which the canvas pass does not see."""
    model, x0 = tiny_gpt(V, T, parts=parts), some_rows()
    canvas = x0.masked_fill(torch.rand(3, T, generator=seeded(4)) < 0.5, V)
    network = in_blocks(model, x0, torch.zeros_like(x0))
    plain = Beside.bias
    assert not torch.allclose(network(canvas), model(canvas), atol=1e-3)

    def without_start(self, dtype):
        bias = plain(self, dtype)
        bias[..., 0] = float('-inf')
        return bias
    monkeypatch.setattr(Beside, 'bias', without_start)
    assert torch.allclose(network(canvas), model(canvas), atol=1e-4)


@torch.no_grad()
def test_blocks_of_length_one_see_what_the_causal_pass_sees():
    """With the embeddings of the causal mode and the clean token in its place they are the causal pass."""
    model, x0 = tiny_gpt(V, T), some_rows()
    network = in_blocks(model, x0, torch.arange(T).expand(3, T))
    causal = model(x0, causal=True)                                        # slot i + 1 has read token i
    model.blocks[0].attn_proj.weight.data *= 1.0
    shifted = model(torch.cat((x0, x0[:, :1]), 1)[:, :T], causal=True)
    assert torch.equal(causal, shifted)
    left = network.blocks.start
    seen = Beside(network.kept, left, None).bias(torch.float32)[:, 0] == 0
    slots = torch.arange(T)
    assert torch.equal(seen[0, :, :T], slots <= slots[:, None])            # the slots of a causal query ...
    assert torch.equal(seen[0, :, T:], torch.eye(T).bool())                # ... and its own


@pytest.mark.parametrize('parts', PARTS)
@torch.no_grad()
def test_packed_rows_are_as_if_alone(parts):
    model, x0 = tiny_gpt(18, 64, parts=parts), arithmetic_rows(9)
    packed, free, real, segment, blocks = lay_out(x0, ARITHMETIC, (4, 8), seeded(5))
    assert len(packed) < 9 and torch.equal(free.sum(), blocks.cut(free).sum())
    network = in_blocks(model, packed, blocks.start, segment)
    blocks = network.blocks                                         # in the order of the rows
    canvas = packed.masked_fill(free & (torch.rand(packed.shape, generator=seeded(6)) < 0.5), 18)
    found = blocks.lay(network(blocks.cut(canvas)).movedim(-1, 0)[0])
    for number in range(1, 10):
        here = segment == number
        text, masked, begin = packed[here][None], canvas[here][None], blocks.start[here][None]
        alone = in_blocks(model, text, begin - begin[0, 0])
        alone = alone.blocks.lay(alone(alone.blocks.cut(masked)).movedim(-1, 0)[0])
        assert torch.allclose(alone[0], found[here], atol=1e-4)
        assert torch.equal(text[0, :(x0[number - 1] != 17).sum()], x0[number - 1][x0[number - 1] != 17])


@pytest.mark.parametrize('parts', PARTS)
@torch.no_grad()
def test_sampling_sees_what_training_saw(parts):
    """A block beside a cache that was filled pass by pass, in rows that begin at different places."""
    model, x0 = tiny_gpt(V, T, parts=parts), some_rows()
    first = torch.tensor([2, 4, 1])
    network = in_blocks(model, x0, starts(2, 4, 1))
    canvas = x0.masked_fill(torch.rand(3, T, generator=seeded(7)) < 0.5, V)
    found = network.blocks.lay(network(network.blocks.cut(canvas)).movedim(-1, 0)[0])
    cache, whole = Cache.empty(model, 3, 2 * T), model(x0, causal=True)[..., 0]
    cache.end = T
    model(x0[:, :5], causal=True, cache=cache)                             # the first block, at least
    begin = first[:, None]
    while (begin < T).any():
        at = begin + torch.arange(4)
        block = torch.cat((canvas, torch.zeros(3, 4).long()), 1).gather(1, at.clamp(max=T + 3))
        there = AfterPrefix(model, cache, at, torch.cat((x0, x0), 1))
        both = there(block)[..., 0]
        inside = at < T
        assert torch.allclose(both[inside], found.gather(1, at.clamp(max=T - 1))[inside], atol=1e-4)
        some = there.of(torch.tensor([2, 0]))(block[[2, 0]])[..., 0]
        assert torch.allclose(some, both[[2, 0]], atol=1e-5)
        written = torch.where(at < T, torch.cat((x0, x0), 1).gather(1, at), block)         # read causally
        read = there(written, causal=True)[..., 0]
        assert torch.allclose(read[inside], whole.gather(1, at.clamp(max=T - 1))[inside], atol=1e-4)
        again = there(block)[..., 0]                                           # which leaves no trace
        assert torch.allclose(again[inside], both[inside], atol=1e-5)
        model(x0, causal=True, cache=cache, at=(at + 1).clamp(max=T - 1))  # the block is committed
        begin = begin + 4

# -----------------------------------------------------------------------------
# training, and what it is worth


def block_law(model, x, length):
    """-log p of the row x in blocks, each the mean over all orders, by brute force; no prompt."""
    total = 0.0
    start = torch.arange(len(x))[None] // length * length
    network = in_blocks(model, x[None], start)
    for number, begin in enumerate(range(0, len(x), length)):
        orders = []
        for order in itertools.permutations(range(length)):
            canvas, nats = torch.full((1, length), model.mask_token_id), 0.0
            for i in order:
                logits = network.of(torch.tensor([number]))(canvas)[0, i]
                logp = model.logits(logits, real_only=True).double().log_softmax(-1)
                nats, canvas[0, i] = nats - logp[x[begin + i]].item(), x[begin + i]
            orders.append(nats)
        total += sum(orders) / len(orders)
    return total


@torch.no_grad()
def test_the_bound_in_blocks_is_the_mean_over_their_orders():
    model, x = tiny_gpt(3, 6), torch.tensor([0, 2, 1, 1, 0, 2])
    exact = block_law(model, x, 3)
    rows = x.expand(8000, 6)
    every = torch.ones_like(rows).bool()
    estimates = block_nelbo(model, rows, every, every, seeded(1), length=3).double()
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / 8000 ** 0.5 < 0.15
    one = block_nelbo(model, rows[:1], every[:1], every[:1], seeded(1), length=1)
    assert one.item() == pytest.approx(block_law(model, x, 1), rel=1e-5)


@torch.no_grad()
def test_padding_behind_the_last_block_costs_nothing():
    model, x0 = tiny_gpt(18, 64), arithmetic_rows(20)
    free, real = modelled(x0, ARITHMETIC)
    cut = x0.clone()
    found = block_nelbo(model, cut, free, real, seeded(2), length=8)
    length = real.sum(1) + 1                                               # with the start symbol
    end = (length + 7) // 8 * 8
    behind = torch.arange(64) >= end[:, None]
    assert behind.any()
    again = block_nelbo(model, cut.masked_fill(behind, 3), free & ~behind, real, seeded(2), length=8)
    assert torch.allclose(found, again, atol=1e-3)
    bounds = {'nelbo_8': lambda *args: block_nelbo(*args, length=8)}
    result = evaluate(model, x0, ARITHMETIC, causal=False, bidirectional=False, bounds=bounds)
    assert result['nelbo_8'] > 0 and result['nelbo_8_se'] > 0


def test_the_step_is_that_of_rows_that_are_not_packed():
    """The causal loss of all rows, and their blocks' loss, every token of which weighs the same."""
    model, x0 = tiny_gpt(18, 64, n_recur=1), arithmetic_rows(6)
    config = default_config(block_lengths=(4, 8), causal_ratio=1.0)
    task = Task('unmasking', mask_weighting='row')
    settings = ARITHMETIC, config, task, seeded(3), None
    (total, parts), = causal_part(model, x0, 12, *settings)
    total.backward()
    grads = gradients(model)
    assert set(parts) == {'causal', 'unmask', 'detect', 'keep'}

    generator = seeded(3)
    packed, free, real, segment, blocks = lay_out(x0, ARITHMETIC, (4, 8), generator)
    scale = 12 / real.sum()
    kept = Kept()
    hidden = model(packed, causal=True, segment=segment, cache=kept)
    expected, _ = loss(model, packed, packed, real * scale, causal=True, hidden=hidden.flatten(0, 1)[
        (real.flatten()).nonzero()[:, 0]])
    rows = [blocks.cut(ids) for ids in (packed, free, real)]
    input, target, weight = ask(*rows, task, (18, 19, None), generator)
    n = rows[1].sum(1, keepdim=True)
    assert torch.allclose((weight * n).sum(), rows[1].sum().float())       # each block weighs its tokens
    network = InBlocks(model, kept, blocks)
    logits = model.logits(network(input), real_only=True)
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction='none')
    expected = expected + (ce * (weight * n).flatten())[weight.flatten() > 0].sum() * scale
    assert torch.allclose(total, expected, rtol=1e-4)
    model.zero_grad()
    expected.backward()
    for name, grad in gradients(model).items():
        assert torch.allclose(grads[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item()), name


def test_blocks_of_long_texts_are_as_often_the_first_ones():
    """The first blocks of a batch get the wrong tokens, and rows are packed with the longest texts first."""
    x0, draws, first, share = arithmetic_rows(16), 400, 0, 0.0
    length = (x0 != ARITHMETIC['pad']).sum(1)
    for seed in range(draws):
        *_, blocks = lay_out(x0, ARITHMETIC, (4,), seeded(seed))
        owner = torch.cat((blocks.segment.flatten(), blocks.segment.new_zeros(1)))[blocks.at[:, 0]] - 1
        long = length[owner] > length.float().median()
        first, share = first + long[:len(long) // 2].sum().item(), share + long.sum().item() / 2
    assert abs(first - share) < 0.05 * share


def test_own_guesses_of_blocks():
    """They are drawn beside the text left of the block: a network that copies it guesses it."""
    model, x0 = tiny_gpt(18, 64, n_recur=1, scale=1.0), arithmetic_rows(8)
    config = default_config(block_lengths=(8,), causal_ratio=1.0)
    (total, parts), = causal_part(model, x0, 8, ARITHMETIC, config, Task(remask_ratio=1.0), seeded(1), None)
    assert {'causal', 'unmask', 'detect'} <= set(parts) and total.isfinite()
    model.train()
    list(causal_part(model, x0, 8, ARITHMETIC, config, Task(remask_ratio=0.5), seeded(1), None))
    assert model.training

# -----------------------------------------------------------------------------
# blocks that grow

GROWING = dict(causal_ratio=0.25, block_lengths=(16, 4, 8), block_warmup_iters=10)


def test_growth_by_hand():
    config = default_config(**GROWING)
    ratios = [grown(step, config)['causal_ratio'] for step in (0, 5, 10, 99)]
    assert ratios == [1, 0.625, 0.25, 0.25]
    lengths = [grown(step, config)['block_lengths'] for step in (0, 3, 4, 6, 7, 10, 99)]
    assert lengths == [(4,), (4,), (4, 8), (4, 8), (4, 8, 16), (4, 8, 16), (4, 8, 16)]
    for step in (0, 5):
        assert set(curricula(step, config)) == {
            'remask_ratio', 'penalty_mask_correct', 'causal_ratio', 'block_lengths'}
        assert set(curricula(step, dict(config, block_warmup_iters=0))) == {
            'remask_ratio', 'penalty_mask_correct'}
    # in the end it is the very number, which decides how a half is rounded
    assert grown(10, dict(config, causal_ratio=0.15))['causal_ratio'] == 0.15
    line = progress_line(5, config, {'causal': 1.5}, 10.0)
    assert 'masking penalty 1%  blocks grown 50%  10.0 it/s' in line
    assert 'grown' not in progress_line(5, default_config(), {'causal': 1.5}, 10.0)


@pytest.mark.parametrize('step, causal, wrong, lengths', [
    (0, 8, 0, (4,)), (5, 5, 2, (4, 8)), (6, 4, 2, (4, 8)), (10, 2, 3, (4, 8, 16)), (11, 2, 3, (4, 8, 16))])
def test_rows_that_are_causal_in_blocks_and_whole(monkeypatch, step, causal, wrong, lengths):
    """Every row is in one of the two; of those that may have wrong tokens the right number are whole."""
    model, x0, laid, asked = tiny_gpt(18, 64, n_recur=1), arithmetic_rows(8), [], []
    monkeypatch.setattr(train, 'lay_out', lambda *args: laid.append(args) or lay_out(*args))

    def watch(*args):
        result = ask(*args)
        asked.append((args, result[2]))
        return result

    monkeypatch.setattr(train, 'ask', watch)
    config = default_config(**GROWING, remask_ratio=0.5, proofreading_warmup_iters=0, corruption='random')
    parts = training_step(model, x0, ARITHMETIC, config, step, seeded(1))
    (rows, _, found, _), = laid
    assert torch.equal(rows, x0[:causal]) and found == lengths
    assert parts['causal'][1].item() == pytest.approx(causal, rel=1e-5)

    # the blocks, then the whole canvases, if there are any yet
    (blocks, *_), *whole = asked
    assert len(whole) == (causal < 8) and blocks[0].size(1) <= lengths[-1] and blocks[3].remask_ratio == 0.5
    for args, weight in whole:
        assert torch.equal(args[0], x0[causal:]) and round(args[3].remask_ratio * (8 - causal)) == wrong
        assert weight.shape == (8 - causal, 64)


def test_while_blocks_grow_a_row_weighs_one(monkeypatch):
    """Of masked tokens alone: the blocks' weights are those of as many rows as are causal."""
    model, x0 = tiny_gpt(18, 64, n_recur=1), arithmetic_rows(8)

    def all_masked(x0, free, real, *task):
        return x0.masked_fill(free, 18), x0, free / free.sum(1, keepdim=True).clamp(min=1)

    monkeypatch.setattr(train, 'ask', all_masked)
    causal = training_step(model, x0, ARITHMETIC, default_config(training_type='causal'), 0, seeded(1))
    for step in (0, 4, 5, 10):
        # behind the end of a text a block is free as well: blocks of one token end with it
        config = default_config(**{**GROWING, 'block_lengths': (1,)})
        parts = training_step(model, x0, ARITHMETIC, config, step, seeded(1))
        assert parts['unmask'][1].item() == pytest.approx(8, rel=1e-5)
        if step == 0:
            assert torch.allclose(parts['causal'], causal['causal'], rtol=1e-5)


@pytest.mark.parametrize('changes, message', [
    (dict(block_lengths=()), 'grows blocks, and there are none: set --block_lengths'),
    (dict(views=2), 'set --views=0'), (dict(fsdp=True), 'leave out --fsdp'),
    (dict(block_warmup_iters=-1), 'block_warmup_iters must not be negative')])
def test_what_does_not_go_with_growing(changes, message, monkeypatch):
    monkeypatch.setattr('plumbing.distributed.several', lambda: True)
    monkeypatch.setattr('plumbing.distributed.world', lambda: 1)
    check_settings(default_config(**GROWING))
    with pytest.raises(UserError, match=message):
        check_settings(default_config(**{**GROWING, **changes}))


# -----------------------------------------------------------------------------
# sampling


def law_in_blocks(model, prompt, length):
    """The law (V^4,) of four tokens behind a prompt in two blocks, one token a pass in random order."""
    x = all_sequences(3, 4)
    P, B = len(prompt), len(x)
    rows = torch.cat((torch.tensor(prompt).long().expand(B, P), x), 1)
    position = torch.arange(P + 4).expand(B, -1)
    start = torch.where(position < P, position, P + (position - P) // length * length)
    network = in_blocks(model, rows, start)
    law = torch.ones(B, dtype=torch.float64)
    for block in range(4 // length):
        places = [P + block * length + i for i in range(length)]
        number = [int((network.blocks.at[:, 0] == row * (P + 4) + places[0]).nonzero()) for row in range(B)]
        mean = torch.zeros(B, dtype=torch.float64)
        for order in itertools.permutations(range(length)):
            canvas, p = torch.full((B, length), model.mask_token_id), torch.ones(B, dtype=torch.float64)
            for i in order:
                hidden = network.of(torch.tensor(number))(canvas)[:, i]
                logp = model.logits(hidden, real_only=True).double().log_softmax(-1)
                token = rows[:, places[i]]
                p, canvas[:, i] = p * logp.gather(1, token[:, None])[:, 0].exp(), token
            mean += p
        law *= mean / mean.new_tensor([1, 2][length - 1])
    return law


@pytest.mark.parametrize('prompt, length', [((), 2), ((1,), 2), ((2, 0), 1)])
@torch.no_grad()
def test_the_law_of_blocks(prompt, length):
    model = tiny_gpt(3, 4 + len(prompt), seed=2)
    B = 20000
    canvas = torch.full((B, 4 + len(prompt)), 3)
    canvas[:, :len(prompt)] = torch.tensor(prompt)
    fixed = canvas < 3
    x, nfe, _ = generate_diffusion(model, canvas, fixed, block_length=length, generator=seeded(1))
    expected = law_in_blocks(model, prompt, length)
    assert expected.sum() == pytest.approx(1)
    number = (x[:, len(prompt):] * torch.tensor([27, 9, 3, 1])).sum(1)
    statistic, bound = chi_square(torch.bincount(number, minlength=81), B * expected)
    assert statistic < bound
    assert torch.equal(x[fixed], canvas[fixed]) and (nfe == 4 + 4 // length).all()      # and the commits


@pytest.mark.parametrize('revise', [False, True])
@torch.no_grad()
def test_rows_of_different_prompts_share_a_batch(revise):
    """Greedy, so that what the rows draw does not depend on one another."""
    model = tiny_gpt(V, T, seed=3)
    canvas = some_rows(4)
    for row, first in enumerate((0, 3, 5, 11)):
        canvas[row, first:] = V
    rules = dict(block_length=4, commit='confidence', choice_temperature=0.0, temperature=1e-6,
                 remask='wrong', remask_rate=0.0, steps=9)
    rules['revise'] = revise
    both, nfe, trace = generate_diffusion(model, canvas, canvas < V, trace=True, generator=seeded(1), **rules)
    assert torch.equal(trace[-1], both) and torch.equal(trace[0], canvas) and len(trace) > 6
    assert not (both == V).any() and torch.equal(both[canvas < V], canvas[canvas < V])
    for row in range(4):
        alone, passes, _ = generate_diffusion(model, canvas[row:row + 1], canvas[row:row + 1] < V, **rules)
        assert torch.equal(alone[0], both[row]) and passes[0] == nfe[row]


@torch.no_grad()
def test_a_block_can_be_revised_until_the_next_one_is_written():
    model, canvas = tiny_gpt(V, T, seed=6), torch.full((200, T), V)
    rules = dict(block_length=3, remask='random', remask_rate=0.5, steps=16, generator=seeded(3), trace=True)
    for revise, changes in ((False, []), (True, [0, 1, 2])):
        x, nfe, trace = generate_diffusion(model, canvas, canvas < V, revise=revise, **rules)
        trace = torch.stack(trace)                                         # (S, 200, T)
        begun = [int((trace[..., at] != V).any(1).long().argmax()) for at in range(0, T, 3)]
        later = trace[begun[1] + 1:]                                       # the second block has begun
        moved = (later != later[0]).any(1).any(0)
        assert moved[:3].nonzero()[:, 0].tolist() == changes and moved[3:].all()
        after = trace[begun[2] + 1:]
        assert not (after[..., :3] != after[0, :, :3]).any()               # and then it is committed
        assert (nfe == 4 * 3 + (3 if revise else 4)).all()


@pytest.mark.parametrize('revise, length, head', [
    (False, 2, False), (True, 3, False), (True, 1, False), (False, 2, True), (False, 1, True),
    (True, 3, True)])
@torch.no_grad()
def test_blocks_that_are_only_drafted_have_the_law_of_left_to_right(revise, length, head):
    """And each block costs the passes of its draft, one that doubts nothing, and one that commits it."""
    model, B, T = tiny_gpt(3, 4, seed=2, draft_head=head), 20000, 4
    canvas = torch.full((B, T), 3)
    rules = dict(block_length=length, revise=revise, draft=True, remask='wrong', remask_threshold=1.0)
    x, nfe, _ = generate_diffusion(model, canvas, canvas < 3, generator=seeded(1), **rules)
    rows = all_sequences(3, T)
    logp = model.logits(model(rows, causal=True), real_only=True).double().log_softmax(-1)
    law = logp.gather(2, rows[..., None])[..., 0].sum(1).exp()             # (81,)
    number = (x * torch.tensor([27, 9, 3, 1])).sum(1)
    statistic, bound = chi_square(torch.bincount(number, minlength=81), B * law)
    assert law.sum() == pytest.approx(1) and statistic < bound
    assert (nfe >= 3 * -(-T // length) - revise).all()


@pytest.mark.parametrize('revise', [False, True])
def test_a_draft_ends_with_its_block(revise):
    """Of L tokens each pass writes one at least: the draft, one pass that doubts, one that commits."""
    model, canvas, L = tiny_gpt(3, 32, draft_head=True), torch.full((20, 32), 3), 4
    rules = dict(block_length=L, revise=revise, draft=True, remask='wrong', remask_threshold=1.0)
    x, nfe, _ = generate_diffusion(model, canvas, canvas < 3, generator=seeded(1), **rules)
    assert (x < 3).all() and (nfe <= 8 * (L + 2)).all()


@torch.no_grad()
def test_a_block_that_is_revised_keeps_what_its_tokens_were_drawn_with():
    """By confidence a token of the block before goes back as often as it was improbable."""
    model, canvas = tiny_gpt(2, 4, seed=6), torch.full((400, 4), 2)
    rules = dict(block_length=2, revise=True, remask='confidence', steps=16, trace=True)
    _, _, trace = generate_diffusion(model, canvas, canvas < 2, generator=seeded(3), **rules)
    trace = torch.stack(trace)                                             # (S, B, 4)
    begun = (trace[..., 2] != 2).long().argmax(0)                          # (B,) the second block has a token
    again = ((trace[1:] == 2) & (trace[:-1] != 2))[..., :2].any(2)         # (S - 1, B)
    late = again & (torch.arange(len(again))[:, None] >= begun)
    assert 0.05 < late.any(0).double().mean() < 0.95


@torch.no_grad()
def test_a_text_ends_at_its_end_token():
    model = tiny_gpt(18, 64, seed=5)
    canvas = torch.full((50, 64), 18)
    canvas[:, 0] = 15
    x, nfe, _ = generate_diffusion(model, canvas, canvas == 15, ends=Ends(16, 17, (15, 16, 17)),
                                   block_length=8, remask='wrong', steps=32, generator=seeded(2))
    ended = (x == 16).any(1)
    assert 10 < ended.sum() and (x != 18).all()
    for row, passes in zip(x[ended].tolist(), nfe[ended].tolist()):
        end = row.index(16)
        assert set(row[end + 1:]) <= {17} and passes <= 4 * (1 + (end - 1) // 8)


def test_what_does_not_go_with_blocks():
    joint = dict(training_type='joint', causal_ratio=0.3, block_size=64, corruption='own',
                 remasking_loss_type='all_positions')
    with pytest.raises(UserError, match='not trained to write in blocks: train with --block_lengths=4,8'):
        choose_rules(joint, block_length=8)
    rules = choose_rules(dict(joint, block_lengths=(4, 8)), block_length=8)
    assert rules['commit'] == 'left' and rules['remask'] == 'none' and rules['block_length'] == 8
    for chosen in (dict(commit='random'), dict(draft=True), dict(revise=True),
                   dict(remask_threshold=0.5)):
        assert choose_rules(dict(joint, block_lengths=(4, 8)), block_length=8, **chosen)['remask'] == 'wrong'
    for chosen, message in ((dict(task='repair'), 'block_length writes what is missing'),
                            (dict(block_length=65), 'block_length=65 is more than block_size=64')):
        with pytest.raises(UserError, match=message):
            choose_rules(dict(joint, block_lengths=(4, 8)), **{'block_length': 8, **chosen})
    model, canvas = tiny_gpt(), torch.full((1, 4), 3)
    with pytest.raises(UserError, match='block_length goes with rules'):
        generate_diffusion(model, canvas, canvas < 3, block_length=2, remask='critic')


def test_the_suite_of_blocks(monkeypatch, tmp_path):
    model = tiny_gpt(18, 64, n_recur=1)
    config = default_config(training_type='joint', causal_ratio=0.5, block_lengths=(4, 8))
    path = write_checkpoint(tmp_path / 'x.pt', model, **config)
    s = quick_bench(monkeypatch, f'--init_from={path}', '--budgets=16', '--eval_rows=6')
    rows, tables = blocks.run(s)
    nats = {row['name']: row['nats'] for row in rows if 'nats' in row}
    assert list(nats) == ['nelbo', 'causal_nll', 'nelbo_4', 'nelbo_8'] and all(n > 0 for n in nats.values())
    drawn = [row for row in rows if 'budget' in row]
    assert all((row['budget'] is None) == (row['name'][13:] in ('from left to right', 'remask=none'))
               for row in drawn)
    assert [row['name'] for row in drawn] == [
        f'blocks of {n}, {how}' for n in (4, 8)
        for how in ('from left to right', 'remask=none', 'intelligent', 'intelligent, revise',
                    'proofread, revise', 'surprise, revise')]
    assert all(row['nfe'] <= 16 + 1 for row in drawn if 'intelligent' in row['name'])
    assert tables.count('blocks of 8') == 6
    bare = write_checkpoint(tmp_path / 'y.pt', model, **default_config(training_type='joint'))
    with pytest.raises(UserError, match='trained with --block_lengths'):
        blocks.run(quick_bench(monkeypatch, f'--init_from={bare}'))
