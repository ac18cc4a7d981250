"""The network: who sees what, what the numbers mean, and what a network cannot be."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import fresh_gpt, seeded, tiny_gpt

from configurator import UserError
from model import GPT, GPTConfig, Pass
from parts.energy import token_energy
from parts.speculate import next_state
from plumbing.device import bf16_is_fast, configure_compute, freeze
from plumbing.rows import places


def plain_and_sdpa(model):
    """Runs the body of a test once for either attention."""
    for model.plain_attention in (True, False):
        yield model

# -----------------------------------------------------------------------------
# who sees what


@pytest.mark.parametrize('parts', ['', 'short_conv:2,bigrams:99'])
def test_causal_pass_sees_the_left_only(parts):
    torch.manual_seed(1)
    for model in plain_and_sdpa(tiny_gpt(V=7, T=8, n_layer=2, parts=parts)):
        x = torch.randint(7, (4, 8))
        before = model(x, causal=True)
        for i in range(8):
            right = torch.cat((x[:, :i], (x[:, i:] + 1) % 7), 1)          # position i itself included
            after = model(right, causal=True)
            assert torch.equal(after[:, :i + 1], before[:, :i + 1])
            if i < 7:  # and all to the right of i do see it
                one = x.clone()
                one[:, i] = (one[:, i] + 1) % 7
                change = (model(one, causal=True) - before).abs().amax(-1)
                assert (change[:, :i + 1] == 0).all() and (change[:, i + 1:] > 1e-4).all()


def test_bidirectional_pass_sees_everything():
    torch.manual_seed(1)
    for model in plain_and_sdpa(tiny_gpt(V=7, T=8)):
        x = torch.randint(7, (4, 8))
        for i in range(8):
            one = x.clone()
            one[:, i] = (one[:, i] + 1) % 7
            assert ((model(one) - model(x)).abs().amax(-1) > 1e-5).all()


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_frozen_network_gives_the_same_to_the_bit(dtype):
    parts = 'level:8,previous,mu:4,short_conv:2,shortcuts,bigrams:99'
    model = tiny_gpt(V=7, T=8, draft_head=True, energy_head=1, parts=parts)
    model.compute_dtype = dtype
    x, real = torch.randint(8, (3, 8), generator=seeded()), torch.ones(3, 8, dtype=torch.bool)

    def results():
        both = model(x), model(x, causal=True)
        drafted = next_state(model, both[1][:, 0], x[:, 0].clamp(max=6))
        scores = token_energy(model, x.clamp(max=6), real)
        return [*both, drafted, *map(model.logits, (*both, drafted)), scores]
    before, names = results(), list(model.state_dict())
    assert freeze(model) is model and list(model.state_dict()) == names
    assert all(torch.equal(*pair) for pair in zip(before, results(), strict=True))
    assert {p.dtype for p in model.blocks.parameters()} == {dtype}
    assert model.wte.weight.dtype == torch.float32


def test_causal_start_symbol_and_mode_embedding():
    model, wide = tiny_gpt(V=5, T=6), tiny_gpt(V=5, T=6)
    x = torch.randint(5, (3, 6), generator=seeded())
    first = model(x, causal=True)[:, 0]
    assert torch.equal(first, first[:1].expand(3, -1))                    # whatever the row holds
    # without attention to mix positions, the causal pass is the bidirectional one on the shifted row, plus a
    # vector
    shifted = F.pad(x[:, :-1], (1, 0), value=model.mask_token_id)
    with torch.no_grad():
        wide.causal_embd.zero_()
        for block in (*model.blocks, *wide.blocks):
            block.attn_proj.weight.zero_()
    assert torch.allclose(wide(x, causal=True), wide(shifted), atol=1e-6)
    assert (model(x, causal=True) - model(shifted)).abs().max() > 1e-2


@pytest.mark.parametrize('causal', [False, True])
def test_plain_and_sdpa_attention_agree(causal):
    model = tiny_gpt(V=11, T=16, n_layer=2, n_embd=32, n_head=4)
    x = torch.randint(13, (5, 16), generator=seeded())
    plain, sdpa = [m(x, causal=causal) for m in plain_and_sdpa(model)]
    assert (plain - sdpa).abs().max() < 1e-5 * plain.abs().max()
    short = model(x[:, :5], causal=causal)                                # any length up to block_size
    assert short.shape == (5, 5, 32)
    assert torch.allclose(short, sdpa[:, :5], atol=1e-5) == causal


@torch.no_grad()
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('parts', ['', 'level,previous', 'level:8,graph:1:1,mu:4',
                                   'short_conv:3,level,shortcuts,bigrams:30'])
def test_texts_that_share_a_row_are_as_if_each_were_alone(causal, parts):
    model = tiny_gpt(V=7, T=16, n_layer=2, scale=6, parts=parts)
    lengths = [[5, 1, 9, 1], [16], [3, 3, 3, 7]]  # the numbers of the texts may be any
    segment = torch.stack([torch.arange(9, 9 - len(row), -1).repeat_interleave(torch.tensor(row))
                           for row in lengths])
    x, previous = torch.randint(8, (2, 3, 16), generator=seeded())
    level = segment / 10 if parts else None
    for network in plain_and_sdpa(model):
        packed = network(x, causal=causal, segment=segment, previous=previous, level=level)
        for row, sizes in enumerate(lengths):
            for own in torch.arange(16).split(sizes):
                alone = network(x[row:row + 1, own], causal=causal, previous=previous[row:row + 1, own],
                                level=level[row:row + 1, own] if parts else None)
                assert torch.allclose(packed[row, own], alone[0], atol=1e-4)
        unaware = network(x, causal=causal, previous=previous, level=level)
        assert torch.allclose(packed[1], unaware[1], atol=1e-4)
        assert (packed[0] - unaware[0]).abs().max() > 0.1


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('more', [{}, dict(n_layer=2, parts='short_conv:2,level:8'),
                                  dict(n_recur=1, parts='graph:1:1')], ids=['plain', 'deep', 'graph'])
def test_hidden_states_of_some_places_only(causal, more):
    """
    They and their gradients are those of the whole pass, packed rows or not; the last MLP sees no other
    position.
    """
    x, where = torch.randint(8, (40, 8), generator=seeded()), torch.rand(40, 8, generator=seeded(1)) < 0.4
    model, seen = tiny_gpt(V=7, T=8, **more), []
    model.blocks[-1].fc.register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape[:-1].numel()))
    for model in plain_and_sdpa(model):
        for segment in (None, (torch.arange(8) > 4).long().expand(40, -1)):
            found = []
            for only in (None, places(where)):
                seen.clear()
                hidden = model(x, causal=causal, segment=segment, only=only)
                hidden = hidden[where] if only is None else hidden
                model.logits(hidden).square().sum().backward()
                grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                found.append([hidden.detach(), *grads])
                model.zero_grad(set_to_none=True)
            assert seen == [320] * (model.config.n_recur - 1) + [128]     # 128, 256, .. positions
            assert 64 < where.sum() < 128 and len(found[0]) == len(found[1]) > 5
            for whole, some in zip(*found):
                torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())
    nowhere = model(x, causal=causal, only=places(where & ~where))
    assert nowhere.shape == (0, model.config.n_embd)


def test_attention_is_scaled_softmax_of_normalised_rotated_heads():
    """One block against the formulas, written head by head and position by position."""
    model = tiny_gpt(V=5, T=6, n_recur=1, n_embd=8, n_head=2)
    block, T, hs = model.blocks[0], 6, 4
    x = torch.randn(1, T, 8, generator=seeded())

    def ln(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def rotated(v, t):
        angle = t * 10000.0 ** (-torch.arange(hs // 2) / (hs // 2))
        a, b = v[:hs // 2], v[hs // 2:]
        return torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()))

    h = ln(x[0])
    q, k, v = (h @ block.qkv.weight.T).view(T, 3, 2, hs).unbind(1)
    heads = torch.empty(T, 2, hs)
    for head, t in itertools.product(range(2), range(T)):
        scores = torch.stack([rotated(ln(q[t, head]), t) @ rotated(ln(k[s, head]), s) for s in range(T)])
        heads[t, head] = (scores / hs ** 0.5).softmax(0) @ v[:, head]
    y = x[0] + heads.view(T, 8) @ block.attn_proj.weight.T
    y = y + (ln(y) @ block.fc.weight.T).relu().square() @ block.proj.weight.T
    for plain in (True, False):
        p = Pass(causal=False, plain=plain, cos=model.cos[:T], sin=model.sin[:T])
        assert torch.allclose(block(x, p)[0], y, atol=1e-5)


def test_bf16_roughly_agrees():
    model = tiny_gpt(V=11, T=16, n_embd=32)
    x = torch.randint(11, (5, 16), generator=seeded())
    for causal in (False, True):
        model.compute_dtype = torch.float32
        exact = model.logits(model(x, causal=causal))
        model.compute_dtype = torch.bfloat16
        hidden = model(x, causal=causal)
        logits = model.logits(hidden)
        assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
        assert 0 < (logits - exact).abs().max() < 0.05 * exact.abs().max()


def test_blocks_start_as_the_identity_and_recur():
    fresh = fresh_gpt()
    x = torch.randint(3, (2, 4))
    assert torch.allclose(fresh(x), F.layer_norm(F.layer_norm(fresh.wte(x), (16,)), (16,)), atol=1e-5)
    once, twice = tiny_gpt(n_recur=1), tiny_gpt(n_recur=2)
    twice.load_state_dict(once.state_dict())                              # recurring adds no weights
    assert (once(x) - twice(x)).abs().max() > 1e-3

# -----------------------------------------------------------------------------
# the head


def test_logits_of_special_tokens():
    model = tiny_gpt(V=5, T=4)
    hidden = torch.randn(7, 16, generator=seeded())
    plain, real = model.logits(hidden), model.logits(hidden, real_only=True)
    assert plain.shape == real.shape == (7, 7) and plain.dtype == torch.float32
    # tied; the padding rows are not seen
    assert torch.allclose(plain, hidden @ model.wte.weight[:7].T, atol=1e-5)
    assert plain.isfinite().all()
    assert (real[:, 5:] == float('-inf')).all() and torch.equal(real[:, :5], plain[:, :5])
    model.mask_logit_bias.fill_(2.5)
    assert torch.allclose(model.logits(hidden) - plain, torch.tensor([0.0] * 5 + [2.5, 0]), atol=1e-5)
    assert torch.equal(model.logits(hidden, real_only=True), real)
    assert model.logits(hidden[:0]).shape == (0, 7)


@pytest.mark.parametrize('V, rows', [(3, 64), (62, 64), (63, 128), (65, 128)])
def test_vocabulary_is_padded_invisibly(V, rows):
    model = tiny_gpt(V=V, n_recur=1)
    assert model.wte.weight.shape == (rows, 16) and (model.mask_token_id, model.wrong_token_id) == (V, V + 1)
    assert model.logits(torch.zeros(2, 16)).shape == (2, V + 2)
    # an embedding of V + 2 rows, 3 + 1 + 4 + 4 square matrices, and the causal embedding
    assert model.num_params() == 16 * (V + 2) + 12 * 16 * 16 + 16


def test_padding_rows_get_no_gradient():
    model = tiny_gpt(V=5, T=4)
    x = torch.randint(5, (3, 4), generator=seeded())
    model.logits(model(x)).logsumexp(-1).sum().backward()
    grad = model.wte.weight.grad.abs().sum(1)
    assert (grad[:7] > 0).all() and (grad[7:] == 0).all()


@pytest.mark.parametrize('changes, message', [
    (dict(n_embd=18, n_head=4), r'n_embd must be a multiple of 2 \* n_head.*n_embd=18, n_head=4'),
    (dict(n_embd=12, n_head=4), 'n_embd must be a multiple'),             # 3 channels a head cannot be paired
    (dict(n_layer=0), 'n_layer must be at least 1, got 0'),
    (dict(n_recur=0), 'n_recur must be at least 1'),
    (dict(block_size=0), 'block_size must be at least 1'),
    (dict(dropout=1.0), 'dropout must be in'),
])
def test_impossible_networks(changes, message):
    with pytest.raises(UserError, match=message):
        GPT(GPTConfig(**changes))

# -----------------------------------------------------------------------------
# where it computes


def test_configure_compute():
    model, line = configure_compute(tiny_gpt(), 'cpu', 'float32')
    assert model.compute_dtype == torch.float32 and model.plain_attention
    assert 'cpu' in line and 'float32' in line and 'plain attention' in line
    model, line = configure_compute(tiny_gpt(), 'cpu', 'bfloat16', 'sdpa')
    assert model.compute_dtype == torch.bfloat16 and not model.plain_attention and 'sdpa' in line
    assert model(torch.zeros(1, 4, dtype=torch.long)).dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32                # only the compute changes
    for arguments, message in ((('tpu',), 'device expects'), (('cpu:x',), 'device expects'),
                               (('cpu', 'float8'), 'dtype expects'),
                               (('cpu', 'float32', 'flash'), 'attention expects')):
        with pytest.raises(UserError, match=message):
            configure_compute(tiny_gpt(), *arguments)
    for device in ('cuda', 'mps'):
        if not getattr(torch.backends if device == 'mps' else torch, device).is_available():
            with pytest.raises(UserError, match=f'no {device} device'):
                configure_compute(tiny_gpt(), device)


@pytest.mark.parametrize('unit', [None, 'amx_tile', 'avx512_bf16'])
def test_bfloat16_where_the_cpu_has_a_unit_for_it(monkeypatch, unit):
    for name in ('amx_tile', 'avx512_bf16'):
        monkeypatch.setattr(torch.cpu, f'_is_{name}_supported', lambda has=name == unit: has, raising=False)
    model, line = configure_compute(tiny_gpt(), 'cpu')
    assert model.compute_dtype == (torch.bfloat16 if unit else torch.float32)
    assert ('bfloat16 (fast here)' if unit else 'float32 (no fast bf16 here)') in line


def test_a_gpu_that_emulates_bfloat16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                        lambda including_emulation=True: including_emulation)
    assert not bf16_is_fast('cuda') and not bf16_is_fast('mps')
