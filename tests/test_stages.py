"""
The stages and Muon in batches: each part does what it says, gives nothing away and can join a network that is
trained.
"""

import copy
import functools
import json
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, default_config, fresh_gpt, seeded, tiny_gpt
from test_train import TINY, assert_same_run, newest, read, start

from configurator import UserError
from model import GPT, GPTConfig, Pass, attention_bias, norm, rotary_table, rotate
from parts import layers
from parts.layers import graph_edges
from plumbing import optim
from plumbing.checkpoint import save_checkpoint
from suites import diagnose

ON = 'level:8,graph:1:2,mu:4'  # all parts of the stages, for a width of 16


def fresh(**more):
    return fresh_gpt(7, 16, **more)


# -----------------------------------------------------------------------------
# Muon in batches


SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8), (5, 3)]


def make_muon(kind, seed=0, **more):
    generator = seeded(seed)
    return kind([torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES], **more)


def walk(optimizer, steps, lacking=(), seed=1):
    """
    So many steps with random gradients of many sizes, none for those of lacking, tuples (step, parameter):
    the parameters.
    """
    generator, params = seeded(seed), optimizer.param_groups[0]['params']
    for step in range(steps):
        for number, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator) * 10.0 ** (number - 3)
            p.grad = None if (step, number) in lacking else grad
        optimizer.step()
    return params


def farthest(ones, others):
    """The largest difference of two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize('decay', [0.0, 0.3])
def test_muon_makes_the_steps_of_torch(decay):
    lacking = {(0, 1), (1, 1), (2, 3), *((step, 5) for step in range(4))}  # late, once in between, never
    ours, theirs = (
        walk(make_muon(kind, lr=0.1, weight_decay=decay), 4, lacking)
        for kind in (optim.Muon, torch.optim.Muon)
    )
    moved = [farthest([a], [b]) for a, b in zip(ours, make_muon(optim.Muon).param_groups[0]['params'])]
    assert min(moved[:5]) > 0.1 and moved[5] == 0  # not even weight decay
    assert farthest(ours, theirs) < 0.01 * max(moved)  # bfloat16 rounds each as it likes


@pytest.mark.parametrize('before, after', [(optim.Muon, torch.optim.Muon), (torch.optim.Muon, optim.Muon)])
def test_the_state_of_muon_is_that_of_torch(before, after):
    first, other, forgetful = (make_muon(kind, lr=0.1, momentum=0.9) for kind in (before, after, after))
    weights, lacking = [p.detach().clone() for p in walk(first, 2, {(0, 4), (1, 4)})], {(0, 5), (1, 5)}
    # or the two would share their momenta
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer in (other, forgetful):
        for p, value in zip(optimizer.param_groups[0]['params'], weights):
            p.data.copy_(value)
    on, same, without = (walk(optimizer, 2, lacking, seed=2) for optimizer in (first, other, forgetful))
    assert farthest(on, same) < 0.005 and farthest(on, without) > 0.05
    a, b = first.state_dict(), other.state_dict()
    assert a['param_groups'] == b['param_groups'] and a['state'].keys() == b['state'].keys()
    assert all(
        torch.equal(a['state'][n]['momentum_buffer'], b['state'][n]['momentum_buffer']) for n in a['state']
    )


@pytest.mark.parametrize('shape', [(8, 8), (24, 8), (8, 24)])
def test_orthogonalized(shape):
    """
    Each matrix by itself: singular vectors stay, singular values come near 1, whatever its size; zero stays
    zero.
    """
    matrices = torch.randn(3, *shape, generator=seeded()) * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1)
    matrices[0] += 1e-4 * torch.eye(*shape)
    made = optim.orthogonalized(matrices, (3.4445, -4.775, 2.0315), 5).float()
    for matrix, found in zip(matrices, made):
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        # diagonal, if the singular vectors are kept
        scaled = u.T @ found @ vh.T
        assert (scaled - scaled.diag().diag()).abs().max() < 0.04
        assert (scaled.diag()[values > 0.05 * values.max()] - 0.95).abs().max() < 0.35
    assert not optim.orthogonalized(torch.zeros(2, *shape), (3.4445, -4.775, 2.0315), 5).any()


# -----------------------------------------------------------------------------
# credit


def test_credit_by_hand():
    grads = [
        torch.tensor([[3.0, 0.0], [0.0, 0.0]]),
        torch.tensor([0.0, -4.0]),
        torch.zeros(3),
        torch.tensor([[1.0]]),
    ]
    optim.give_credit(grads)  # norms 3, 4, 0, 1: the mean is 2
    for found, wanted in zip(grads, ([[3.0, 0.0], [0.0, 0.0]], [0.0, -4.0], [0.0] * 3, [[0.5]])):
        assert torch.allclose(found, torch.tensor(wanted))
    nothing = [torch.zeros(2, 2), torch.zeros(3)]
    optim.give_credit(nothing)
    assert not any(grad.any() for grad in nothing)
    # both of norm 4: no tensor is below the mean
    equal = [torch.full((4,), 2.0), torch.full((4, 4), 1.0)]
    optim.give_credit(equal)
    assert torch.allclose(equal[0], torch.tensor(2.0)) and torch.allclose(equal[1], torch.tensor(1.0))


@pytest.mark.parametrize('clip', [0.0, 1.0])
@pytest.mark.parametrize('credit', [False, True])
def test_update_gives_credit_to_all_but_the_draft_head(clip, credit):
    model = tiny_gpt(draft_head=True, parts=ON)
    for number, (name, p) in enumerate(model.named_parameters()):
        p.grad = torch.full_like(p, 1000.0 if name.startswith('drafter') else 0.1 * number)
    model.causal_embd.grad = None
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: grad.norm().item() for name, grad in before.items() if not name.startswith('drafter')}
    optim.update(model, [], dict(optimizer='adamw', learning_rate=1.0, grad_clip=clip, k1_credit=credit), 1.0)
    clipped = clip / sum(n**2 for n in norms.values()) ** 0.5 if clip else 1.0
    assert len(before) > len(norms) > 5 and model.causal_embd.grad is None
    for name, p in model.named_parameters():
        if name in before:
            share = min(1.0, len(norms) * norms.get(name, 0.0) / sum(norms.values())) if credit else 1.0
            factor = 1.0 if name.startswith('drafter') else clipped * share
            assert torch.allclose(p.grad, before[name] * factor, rtol=1e-4), name


# -----------------------------------------------------------------------------
# the graph


def edges_by_hand(table, ids, window, topk, causal, segment):
    """
    What graph_edges shall say of a row of ids, where a position may look: bool (T, T). table: similarity of
    two ids.
    """
    T = len(ids)
    edges = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        seen = [j for j in range(T) if (j <= i or not causal) and segment[j] == segment[i]]
        close = [j for j in seen if abs(i - j) <= window or abs(i - j) in (1, 2, 4, 8, 16, 32)]
        others = sorted(set(seen) - set(close), key=lambda j: (-table[ids[i]][ids[j]], abs(i - j), j > i))
        edges[i, close + others[:topk]] = True
    return edges


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('window, topk', [(1, 3), (5, 1), (3, 0), (2, 50)])
def test_edges_against_a_double_loop(causal, packed, window, topk):
    vectors, T = torch.randn(6, 8, generator=seeded(3)), 36
    table = [[round((norm(a) @ norm(b)).item() / 8, 3) for b in vectors] for a in vectors]
    # no two pairs alike, by more than distance counts
    assert len({value for row in table for value in row}) == 5 * 6 / 2 + 1
    ids = torch.randint(6, (4, T), generator=seeded(1))
    # a row of masks, and one with a prompt
    ids[2], ids[3, 5:] = 0, 0
    segment = torch.arange(T).div(13, rounding_mode='floor').expand(4, T) if packed else None
    found = graph_edges(vectors[ids], window, topk, causal, segment)
    assert found.shape == (4, T, T) and found.dtype == torch.bool
    looks = attention_bias(T, causal, segment, torch.float32, 'cpu') == 0  # (T, T) or (4, 1, T, T)
    texts = segment.tolist() if packed else [[0] * T] * 4
    wanted = torch.stack(
        [edges_by_hand(table, row, window, topk, causal, text) for row, text in zip(ids.tolist(), texts)]
    )
    assert torch.equal(found & looks.view(-1, T, T), wanted)


def test_a_mask_turns_to_the_nearest_masks():
    found = graph_edges(torch.ones(1, 20, 8), 1, 2, False, None)[0]
    assert found[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 8, 16]
    assert found[10].nonzero()[:, 0].tolist() == [2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 18]
    # of 7 and 13
    assert graph_edges(torch.ones(1, 20, 8), 1, 1, False, None)[0, 10].nonzero()[:, 0].tolist()[2] == 7


@pytest.mark.parametrize('causal', [False, True])
def test_the_length_of_the_row_has_no_say_in_the_edges(causal):
    """
    Nor have other texts in it. Rows are cut to what is needed and texts packed: that must not change what
    comes out.
    """
    # so that distance decides
    alike = torch.randn(8, generator=seeded(1)) + 0.01 * torch.randn(40, 8, generator=seeded())
    for vectors in (alike, torch.randn(3, 8, generator=seeded())):
        ids = torch.randint(len(vectors), (3, 48), generator=seeded())
        segment = (torch.arange(48) >= 20).long().expand(3, 48)
        looks = attention_bias(48, causal, segment, torch.float32, 'cpu')[:, 0] == 0  # (3, 48, 48)
        packed = graph_edges(vectors[ids], 1, 3, causal, segment) & looks
        for own in (slice(20), slice(20, 48)):
            alone = graph_edges(vectors[ids[:, own]], 1, 3, causal, None)
            assert torch.equal(packed[:, own, own], alone & looks[:, own, own])


# -----------------------------------------------------------------------------
# nothing is given away


def graph_of(block):
    return block.parts['graph']


def aloof_network():
    """
    A network of random weights with all the parts, whose heads turn away from what is no neighbour, more or
    less.
    """
    model = tiny_gpt(V=7, T=16, n_layer=2, parts=ON)
    with torch.no_grad():
        for block in model.blocks:
            graph_of(block).off_graph_penalty.copy_(torch.tensor([3.0, 9.0]))
    return model


@torch.no_grad()
def leak(model, x, segment):
    """How far the hidden states up to any position move when what stands there and behind it is exchanged."""
    before, moved = model(x, causal=True, segment=segment), 0.0
    for i in range(x.size(1)):
        right = torch.cat((x[:, :i], torch.randint(8, x[:, i:].shape, generator=seeded(i))), 1)
        moved = max(
            moved, (model(right, causal=True, segment=segment) - before)[:, : i + 1].abs().max().item()
        )
    return moved


@pytest.mark.parametrize('plain', [True, False])
@pytest.mark.parametrize('packed', [False, True])
def test_the_causal_mode_gives_nothing_away(monkeypatch, plain, packed):
    model = aloof_network()
    model.plain_attention = plain
    x = torch.randint(8, (6, 16), generator=seeded())
    segment = (torch.arange(16) >= torch.tensor([1, 3, 5, 8, 11, 16])[:, None]).long() if packed else None
    assert leak(model, x, segment) == 0
    monkeypatch.setattr(
        layers, 'graph_edges', lambda e, window, topk, causal, s: graph_edges(e, window, topk, False, s)
    )
    assert leak(model, x, segment) > 1e-3  # these rows would show it


@torch.no_grad()
@pytest.mark.parametrize('plain', [True, False])
@pytest.mark.parametrize('causal', [False, True])
def test_texts_in_a_row_do_not_move_one_another(plain, causal):
    model = aloof_network()
    model.plain_attention = plain
    x, other = torch.randint(8, (2, 6, 16), generator=seeded())
    second = torch.arange(16) >= torch.tensor([1, 3, 5, 8, 11, 15])[:, None]
    how = dict(causal=causal, segment=second.long(), level=torch.where(second, 0.2, 0.7))
    before = model(x, **how)
    for text in (second, ~second):
        moved = (model(torch.where(text, other, x), **how) - before).abs().amax(-1)
        assert moved[~text].max() == 0 and moved[text].max() > 0.1
        if not causal:
            louder = dict(how, level=torch.where(text, 0.9, how['level']))
            moved = (model(x, **louder) - before).abs().amax(-1)
            assert moved[~text].max() == 0 and moved[text].min() > 1e-4


def test_a_token_reaches_its_neighbours_only_if_the_heads_are_aloof():
    """In one layer, without similar ones: at most one away, and powers of two."""
    model = tiny_gpt(V=7, T=16, n_recur=1, parts='graph:1')
    graph_of(model.blocks[0]).topk = 0
    x = torch.randint(7, (3, 16), generator=seeded())
    away = (torch.arange(16)[:, None] - torch.arange(16)).abs()
    for penalty, reach in ((0.0, away >= 0), (1e4, torch.isin(away, torch.tensor([0, 1, 2, 4, 8])))):
        with torch.no_grad():
            graph_of(model.blocks[0]).off_graph_penalty.fill_(penalty)
            for j in range(16):
                one = x.clone()
                one[:, j] = (one[:, j] + 1) % 7
                moved = (model(one) - model(x)).abs().amax(-1) > 1e-6  # (3, T)
                assert torch.equal(moved, reach[j].expand(3, 16))


# -----------------------------------------------------------------------------
# heads that turn away from what is no neighbour


def attended(block, x, far, open_pairs):
    """
    Attention written out: head 0 looks at the open pairs (B, T, T), head 1 at those of them that are not far.
    """
    B, T, C = x.shape
    q, k, v = block.qkv(x).view(B, T, 3, 2, C // 2).permute(2, 3, 0, 1, 4)  # (2, B, T, hs) each
    q, k = (rotate(norm(h), *rotary_table(T, C // 2)) for h in (q, k))
    heads = [
        (q[n] @ k[n].mT).masked_fill(~seen, float('-inf')).softmax(-1) @ v[n]
        for n, seen in enumerate((open_pairs, open_pairs & ~far))
    ]
    return torch.cat(heads, -1) @ block.attn_proj.weight.T  # (B, T, C)


@torch.no_grad()
@pytest.mark.parametrize('plain', [True, False])
@pytest.mark.parametrize('causal', [False, True])
def test_a_very_aloof_head_sees_neighbours_alone_and_one_that_is_not_sees_all(plain, causal):
    block, x = fresh(parts='graph:1').blocks[0], torch.randn(3, 10, 16)
    block.attn_proj.weight.normal_()
    graph_of(block).off_graph_penalty.copy_(torch.tensor([0.0, 1e4]))
    far = (torch.rand(3, 10, 10) < 0.5) & ~torch.eye(10, dtype=torch.bool)
    bias = attention_bias(10, causal, None, torch.float32, 'cpu')
    cos, sin = rotary_table(10, 8)
    found = block.attention(
        x, Pass(causal, plain, cos=cos, sin=sin, bias=bias, not_neighbours=far[:, None].float())
    )
    found = block.attn_proj(found)
    assert torch.allclose(found, attended(block, x, far, (bias == 0).expand(3, 10, 10)), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('causal', [False, True])
def test_a_graph_that_no_head_minds_changes_nothing(causal):
    model, plain = aloof_network(), tiny_gpt(V=7, T=16, n_layer=2, parts='level:8,mu:4')
    plain.load_state_dict(model.state_dict(), strict=False)
    x = torch.randint(8, (4, 16), generator=seeded())
    for network in (model, plain):
        network.plain_attention = True
    assert (model(x, causal=causal) - plain(x, causal=causal)).abs().max() > 0.1
    for block in model.blocks:
        graph_of(block).off_graph_penalty.zero_()
    for model.plain_attention in (True, False):
        assert torch.allclose(model(x, causal=causal), plain(x, causal=causal), atol=1e-5)


@pytest.mark.parametrize('causal', [False, True])
def test_both_attentions_teach_the_heads_alike(causal):
    model, x, grads = aloof_network(), torch.randint(8, (4, 16), generator=seeded()), []
    weight = torch.randn(4, 16, 16, generator=seeded())
    for block in model.blocks:
        graph_of(block).off_graph_penalty.data.fill_(1.0)
    for model.plain_attention in (True, False):
        model.zero_grad()
        (model(x, causal=causal) * weight).sum().backward()
        assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if p.grad is not None)
        grads.append(torch.stack([graph_of(block).off_graph_penalty.grad for block in model.blocks]))
    assert (grads[0].abs() > 1e-3).all() and torch.allclose(*grads, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        for model.plain_attention in (True, False):
            exact = model(x, causal=causal)
            model.compute_dtype = torch.bfloat16
            assert 0 < (model(x, causal=causal).float() - exact).abs().max() < 0.25
            model.compute_dtype = torch.float32


# -----------------------------------------------------------------------------
# blocks of the embedding, and the noise level


@torch.no_grad()
def test_the_mixer_is_attention_among_the_blocks_of_a_token():
    torch.manual_seed(0)
    mixer, x = layers.Mixer(GPTConfig(n_embd=12), 3), torch.randn(2, 5, 12)
    assert torch.equal(mixer.embed(x), x)  # it starts as the identity
    mixer.proj.weight.normal_()
    found = mixer.embed(x)
    for b, t in ((0, 0), (1, 3)):
        blocks = x[b, t].view(3, 4)
        h = (blocks - blocks.mean(1, keepdim=True)) / (
            blocks.var(1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        q, k, v = (h @ mixer.qkv.weight[rows].T for rows in (slice(4), slice(4, 8), slice(8, 12)))
        for n in range(3):
            mixed = (k @ q[n] / 2).softmax(0) @ v
            assert torch.allclose(
                found[b, t, 4 * n : 4 * n + 4], blocks[n] + mixer.proj.weight @ mixed, atol=1e-5
            )


def test_embeddings_by_table_and_by_position_agree(monkeypatch):
    """
    The table has 64 rows here, so it is what a batch of more ids than that asks; gradients agree as well.
    """
    model, found, sizes = tiny_gpt(V=7, T=16, parts=ON), [], []
    x, weight = torch.randint(9, (4, 16), generator=seeded()), torch.randn(4, 16, 16, generator=seeded())
    mixer = model.parts['mu']
    mixer.qkv.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[:-2].numel()))
    for repeats in (1, 2):
        model.zero_grad()
        embedded = model.embed(x.repeat(repeats, 1))[:4]
        (embedded * weight).sum().backward()
        found.append((embedded.detach(), *(p.grad.clone() for p in (model.wte.weight, *mixer.parameters()))))
    assert sizes == [64, 64] and len(found[0]) == 4
    shapes = []
    monkeypatch.setattr(
        F, 'embedding', lambda *args: shapes.append(args) or torch.embedding(args[1], args[0])
    )
    model.embed(x.repeat(2, 1))
    assert [len(table) for _, table in shapes] == [64]  # worked out once for every word
    for one, other in zip(*found):
        assert torch.allclose(one, other, atol=1e-5) and one.abs().max() > 0.1
    assert not found[1][1][9:].any()  # nothing teaches the padding


@torch.no_grad()
def test_an_embedding_does_not_depend_on_its_neighbours():
    model = tiny_gpt(V=7, T=16, parts=ON)
    words = model.embed(torch.arange(9)[None])[0]  # (9, C)
    assert (words - model.wte.weight[:9]).abs().amax(-1).min() > 0.05  # the mixer does something
    for rows in (2, 8):
        x = torch.randint(9, (rows, 16), generator=seeded())
        assert torch.allclose(model.embed(x), words[x], atol=1e-5)


@torch.no_grad()
def test_the_level_goes_through_an_mlp():
    """Without blocks the hidden state is the embedding and what the level adds, normed."""
    model = tiny_gpt(V=7, T=16, parts='level:8')
    for block in model.blocks:
        block.attn_proj.weight.zero_()
        block.proj.weight.zero_()
    x = torch.randint(7, (2, 16), generator=seeded())
    x[0, :4], x[1, ::2] = 7, 7
    share, each = torch.tensor([[0.25], [0.5]]), torch.rand(2, 16, generator=seeded())
    first, _, last = model.parts['level'].mlp
    for told, level in (({}, share), (dict(level=share), share), (dict(level=each), each)):
        # (2, 1 or T, 32)
        waves = torch.stack([(level * n * torch.pi).cos() for n in range(32)], -1)
        extra = F.gelu(waves @ first.weight.T) @ last.weight.T
        assert first.weight.shape == (8, 32) and extra.abs().max() > 0.1
        assert torch.allclose(model(x, **told), norm(norm(model.wte(x) + extra)), atol=1e-4)
    assert torch.equal(model(x, causal=True, level=share), model(x, causal=True, level=each))
    with torch.no_grad():
        last.weight.zero_()  # as it starts
    assert torch.equal(model(x, level=share), model(x, level=each))


# -----------------------------------------------------------------------------
# all parts together


LEVEL = {'parts.level.mlp.0.weight', 'parts.level.mlp.2.weight'}
MIXER = {'parts.mu.qkv.weight', 'parts.mu.proj.weight'}


def in_both_blocks(name):
    return {f'blocks.{number}.parts.{name}' for number in (0, 1)}


@pytest.mark.parametrize(
    'parts, tensors',
    [
        ('level:8', LEVEL),
        ('level', {'parts.level.mlp.0.weight'}),
        ('mu:4', MIXER),
        ('graph:2', in_both_blocks('graph.off_graph_penalty')),
        ('short_conv:2', in_both_blocks('short_conv.weight')),
        ('shortcuts', in_both_blocks('shortcuts.weight')),
        ('bigrams:20', {'parts.bigrams.left.weight', 'parts.bigrams.around.weight'}),
        (ON, {*LEVEL, *MIXER, *in_both_blocks('graph.off_graph_penalty')}),
    ],
)
@pytest.mark.parametrize('draft_head, others', [(False, ''), (True, 'previous')])
def test_a_fresh_part_changes_no_number(parts, tensors, draft_head, others):
    """Neither what the rest starts from by a seed, nor what is drawn after it, nor what comes out."""
    off, after = fresh(n_layer=2, draft_head=draft_head, parts=others), torch.get_rng_state()
    on = fresh(n_layer=2, draft_head=draft_head, parts=f'{others},{parts}')
    assert torch.equal(torch.get_rng_state(), after)
    weights = on.state_dict()
    assert set(weights) - set(off.state_dict()) == tensors
    assert all(torch.equal(weights[name], tensor) for name, tensor in off.state_dict().items())
    with torch.no_grad():
        # or no block would do anything yet
        for network in (off, on):
            for name, p in network.named_parameters():
                if name.endswith('proj.weight') and name.startswith('blocks'):
                    p.copy_(torch.randn(p.shape, generator=seeded(len(name))) / 4)
        x = torch.randint(8, (3, 16), generator=seeded())
        for causal in (False, True):
            assert torch.allclose(off(x, causal=causal), on(x, causal=causal), atol=1e-5)


@pytest.mark.parametrize('kind', ['muon', 'adamw'])
def test_every_new_parameter_is_optimised_once(kind):
    model = tiny_gpt(n_layer=2, parts=ON)
    optimizers = optim.make_optimizers(model, kind, 1e-3, 1e-2, 0.1, (0.9, 0.95))
    names, found = {p: name for name, p in model.named_parameters()}, {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group['params']:
                found.setdefault(names[p], []).append((type(optimizer).__name__, group['weight_decay']))
    assert set(found) == set(names.values()) and all(len(places) == 1 for places in found.values())
    new = [name for name in found if 'parts.' in name]
    assert len(new) == 6 and all(found[name] == [('AdamW', 0.0)] for name in new)
    assert found['blocks.1.qkv.weight'] == [('Muon' if kind == 'muon' else 'AdamW', 0.1)]


# -----------------------------------------------------------------------------
# going up


WORDS = [
    *TINY,
    '--training_type=joint',
    '--causal_ratio=0.5',
    '--eval_samples=0',
    '--proofreading_warmup_iters=0',
    '--max_iters=3',
]


PARTS = ('', 'level:128', 'level:128', 'level:128,graph:8')  # of stages 0 to 3
EVERYTHING = f'{PARTS[3]},mu:4'


def stage_file(stage):
    return os.path.join(ROOT, 'config', f'stage{stage}.py')


@functools.lru_cache
def trained(folder, stage):
    """The path of a checkpoint of that stage, made in the folder."""
    start(os.path.join(folder, str(stage)), *WORDS, stage_file(stage))
    return newest(os.path.join(folder, str(stage)))


@pytest.fixture
def of_stage(tmp_path_factory):
    return functools.partial(trained, str(tmp_path_factory.getbasetemp() / 'stages'))


@pytest.mark.parametrize('stage', [0, 1, 2])
def test_going_up_a_stage_starts_where_the_checkpoint_stands(tmp_path, of_stage, stage):
    path = of_stage(stage)
    before = torch.load(path, weights_only=True)
    parts = f'{PARTS[stage + 1]},mu:4'
    start(str(tmp_path), *WORDS, stage_file(stage + 1), f'--parts={parts}', f'--init_from={path}')
    first = json.loads((tmp_path / 'log.jsonl').read_text().splitlines()[0])
    assert first.pop('step') == 0 and set(first) == set(before['result']) >= {'nelbo', 'causal_nll', 'auc'}
    assert first == pytest.approx(before['result'], abs=1e-5)
    after = read(str(tmp_path))
    for weights in (after['model'], after['ema']):  # and then the new parts learn
        assert (
            all(weights[name].any() for name in set(weights) - set(before['model']))
            and weights['parts.mu.proj.weight'].any()
        )
    assert after['result']['nelbo'] != pytest.approx(first['nelbo'], abs=1e-4)


def test_a_checkpoint_holds_what_its_stage_turns_on(of_stage):
    for stage, credit in enumerate((False, False, True, True)):
        path = of_stage(stage)
        model, checkpoint = GPT.load(path)
        assert (checkpoint['config']['parts'], checkpoint['config']['k1_credit']) == (PARTS[stage], credit)
        assert checkpoint['model_args']['parts'] == PARTS[stage]
        assert ('level' in model.parts, 'graph' in model.blocks[0].parts) == (stage >= 1, stage >= 3)
        assert stage < 3 or graph_of(model.blocks[0]).off_graph_penalty.any()


@pytest.mark.parametrize(
    'before, words, message',
    [
        (1, [stage_file(0)], 'parts is level:128 and $'),
        (3, [stage_file(2)], 'parts is level:128,graph:8 and level:128$'),
        (
            3,
            [stage_file(3), '--parts=level:128,graph:8:2'],
            'parts is level:128,graph:8 and level:128,graph:8:2$',
        ),
        (1, [stage_file(2), '--parts=level:64'], 'parts is level:128 and level:64$'),
        (0, [stage_file(1), '--n_embd=32'], 'n_embd is 16 and 32'),
        (0, [stage_file(3), '--n_layer=2'], 'n_layer is 1 and 2'),
    ],
)
def test_what_is_no_way_up_is_refused(tmp_path, of_stage, before, words, message):
    path = of_stage(before)
    with pytest.raises(UserError, match=f'{path} and this run do not fit together: {message}'):
        start(str(tmp_path / 'out'), *WORDS, *words, f'--init_from={path}')
    assert not (tmp_path / 'out').exists()


def test_a_level_that_an_mlp_would_replace_is_refused(tmp_path):
    """
    A fresh MLP does not begin where the linear layer of a level without a width stands; the same MLP stays.
    """
    path, words = str(tmp_path / 'ckpt.pt'), [*WORDS, '--parts=level:8']
    checkpoint = dict(iter_num=1, config=default_config(), meta=diagnose.load_data('arithmetic')[0])

    def save(parts):
        network = tiny_gpt(18, 64, n_recur=1, parts=parts)
        save_checkpoint(path, dict(checkpoint, model=network.state_dict(), model_args=vars(network.config)))

    save('level')
    with pytest.raises(UserError, match='do not fit together: parts is level and level:8'):
        start(str(tmp_path / 'out'), *words, f'--init_from={path}')
    save('level:8')
    start(str(tmp_path / 'out'), *words, '--max_iters=1', f'--init_from={path}')
    assert read(str(tmp_path / 'out'))['model']['parts.level.mlp.2.weight'].shape == (16, 8)


@pytest.mark.parametrize(
    'before, after, message',
    [
        (0, [stage_file(1)], 'parts is  and level:128$'),
        (1, [stage_file(2)], 'k1_credit is False and True'),
        (2, [stage_file(1)], 'k1_credit is True and False'),
        (2, [stage_file(3)], 'parts is level:128 and level:128,graph:8$'),
        (3, [stage_file(0)], 'parts is level:128,graph:8 and $'),
        (3, [stage_file(3), f'--parts={EVERYTHING}'], f'parts is level:128,graph:8 and {EVERYTHING}$'),
    ],
)
def test_a_run_does_not_change_its_stage(of_stage, before, after, message):
    path = of_stage(before)
    with pytest.raises(UserError, match=f'do not fit together: {message}'):
        start(os.path.dirname(path), *WORDS, '--max_iters=4', *after, '--init_from=resume')


def test_a_run_with_everything_resumes_bit_identically(tmp_path):
    words = [
        *WORDS,
        stage_file(3),
        f'--parts={EVERYTHING}',
        '--draft_head',
        '--eval_interval=2',
        '--max_iters=4',
    ]
    straight, resumed = str(tmp_path / 'straight'), str(tmp_path / 'resumed')
    start(straight, *words, '--keep_every=2')
    os.makedirs(resumed)
    name = os.path.basename(newest(straight))
    os.replace(os.path.join(straight, name[:-3] + '_2.pt'), os.path.join(resumed, name))
    lines = open(os.path.join(straight, 'log.jsonl')).read()
    open(os.path.join(resumed, 'log.jsonl'), 'w').write(lines)
    torch.manual_seed(1)
    start(resumed, *words, '--init_from=resume')
    assert_same_run(straight, resumed)


def test_all_that_grows_starts_as_the_identity():
    """
    What load_start lets a network grow: with each of them alone, what comes out is what came out before.
    """
    x = torch.randint(8, (3, 16), generator=seeded())
    grows = [
        *(dict(parts=name) for name in {**layers.IN_A_BLOCK, **layers.IN_THE_NETWORK}),
        dict(parts='level:4'),
        dict(draft_head=True),
    ]
    for name in grows:
        on = fresh(**name)
        with torch.no_grad():
            for network in (plain := fresh(), on):
                network.blocks[0].attn_proj.weight.copy_(torch.eye(16))
            assert set(on.state_dict()) > set(plain.state_dict()), name
            for causal in (False, True):
                assert torch.allclose(plain(x, causal=causal), on(x, causal=causal), atol=1e-5), name


# -----------------------------------------------------------------------------
# the doctor


def test_the_doctor_finds_no_leak_in_a_network_with_everything():
    words = ('config/remask_all.py config/stage3.py --parts=level:128,graph:8,mu:16 '
             '--n_layer=1 --n_head=2 --n_embd=32')
    config, *_ = diagnose.set_up(SimpleNamespace(train_args=words, init_from='ckpt'))
    meta, data = diagnose.load_data(config['dataset'])
    model = diagnose.fresh_network(config, meta)
    assert {*model.parts, *model.blocks[0].parts} == {'level', 'mu', 'graph'}
    with torch.no_grad():
        for p in model.parameters():  # a fresh network could not leak
            p.add_(torch.randn(p.shape, generator=seeded()) * 0.3)
        for block in model.blocks:
            graph_of(block).off_graph_penalty.fill_(3.0)
    for model.plain_attention in (True, False):
        found = {
            name: check()
            for name, check in diagnose.leak_checks('', lambda: model.eval(), data['train'][:8], meta)
        }
        assert len(found) == 4 and all(status == 'ok' for status, *_ in found.values()), found
