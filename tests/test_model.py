"""The network and its likelihoods: who sees what, what the numbers mean, and what a damaged checkpoint says."""

import itertools
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import chi_square, default_config, tiny_gpt

import model as model_module
from plumbing.checkpoint import check_same_model, identity, load_checkpoint, model_args, save_checkpoint
from configurator import UserError
from plumbing.device import bf16_is_fast, configure_compute
from model import GPT, Block, Drafter, GPTConfig, ShortConv, norm, places, random_subset, stratified_k


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_and_sdpa(model):
    """Runs the body of a test once for either attention."""
    for model.plain_attention in (True, False):
        yield model

# -----------------------------------------------------------------------------
# who sees what


@pytest.mark.parametrize('parts', [{}, dict(short_conv=2, bigram_rows=99)])
def test_causal_pass_sees_the_left_only(parts):
    torch.manual_seed(1)
    for model in plain_and_sdpa(tiny_gpt(V=7, T=8, n_layer=2, **parts)):
        x = torch.randint(7, (4, 8))
        before = model(x, causal=True)
        for i in range(8):
            right = torch.cat((x[:, :i], (x[:, i:] + 1) % 7), 1)          # position i itself included
            after = model(right, causal=True)
            assert torch.equal(after[:, :i + 1], before[:, :i + 1])
            if i < 7:                                                     # and all to the right of i do see it
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
@pytest.mark.parametrize('short_conv', [0, 1, 3])
def test_a_cache_gives_the_causal_pass_at_any_windows(short_conv):
    """Rows at places of their own, tokens that are taken back, a window that stands out of the row, a dtype of its own."""
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        for model in plain_and_sdpa(tiny_gpt(V=7, T=8, n_layer=2, n_recur=2, short_conv=short_conv, shortcuts=True,
                                             bigram_rows=20 * short_conv)):
            model.compute_dtype = dtype
            x = torch.randint(7, (3, 12), generator=seeded())
            full = model(x[:, :8], causal=True)
            cache = model.empty_cache(3, 12)
            kept, heads = 3 if short_conv else 2, model.config.n_head
            assert cache.shape == (4, kept, 3, heads, 12, model.wte.weight.size(1) // heads)
            model((x[:, :4] + 1) % 7, causal=True, cache=cache)           # all wrong, and written over
            first = model(x[:, :4], causal=True, cache=cache)
            assert (first - full[:, :4]).abs().max() < error
            for at in (torch.tensor([[1, 2], [4, 5], [2, 3]]), torch.tensor([[2, 3], [6, 7], [4, 5]]),
                       torch.tensor([[4, 5, 6, 7, 8], [7, 8, 9, 10, 11], [5, 6, 7, 8, 9]])):
                found = model(x, causal=True, cache=cache, at=at)
                inside = at < 8
                exact = full.gather(1, at.clamp(max=7)[..., None].expand_as(found))
                assert found.shape == (*at.shape, full.size(2)) and found.dtype == dtype
                assert (found - exact)[inside].abs().max() < error


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_frozen_network_gives_the_same_to_the_bit(dtype):
    model = tiny_gpt(V=7, T=8, draft_head=True, energy_head=1, time_dim=8, self_condition=True, mu_blocks=4, short_conv=2,
                     shortcuts=True, bigram_rows=99)
    model.compute_dtype = dtype
    x, real = torch.randint(8, (3, 8), generator=seeded()), torch.ones(3, 8, dtype=torch.bool)

    def results():
        both = model(x), model(x, causal=True)
        drafted = model.draft(both[1][:, 0], x[:, 0].clamp(max=6))
        return [*both, drafted, *map(model.logits, (*both, drafted)), model.token_energy(x.clamp(max=6), real)]
    before, names = results(), list(model.state_dict())
    assert model.freeze() is model and list(model.state_dict()) == names
    assert all(torch.equal(*pair) for pair in zip(before, results(), strict=True))
    assert {p.dtype for p in model.blocks.parameters()} == {dtype} and model.wte.weight.dtype == torch.float32


def test_causal_start_symbol_and_mode_embedding():
    model = tiny_gpt(V=5, T=6)
    x = torch.randint(5, (3, 6), generator=seeded())
    first = model(x, causal=True)[:, 0]
    assert torch.equal(first, first[:1].expand(3, -1))                    # whatever the row holds
    shifted = F.pad(x[:, :-1], (1, 0), value=model.mask_token_id)
    wide = tiny_gpt(V=5, T=6)
    with torch.no_grad():
        wide.causal_embd.zero_()
    # without attention to mix positions, the causal pass is the bidirectional one on the shifted row, plus a vector
    for m in (model, wide):
        with torch.no_grad():
            for block in m.blocks:
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
@pytest.mark.parametrize('heads', [{}, dict(noise_condition=True, self_condition=True),
                                   dict(time_dim=8, graph_window=1, graph_topk=1, mu_blocks=4),
                                   dict(short_conv=3, noise_condition=True, shortcuts=True, bigram_rows=30)],
                         ids=['plain', 'conditioned', 'staged', 'convolved'])
def test_texts_that_share_a_row_are_as_if_each_were_alone(causal, heads):
    model = tiny_gpt(V=7, T=16, n_layer=2, scale=6, **heads)
    lengths = [[5, 1, 9, 1], [16], [3, 3, 3, 7]]                          # the numbers of the texts may be any
    segment = torch.stack([torch.arange(9, 9 - len(row), -1).repeat_interleave(torch.tensor(row)) for row in lengths])
    x, previous = torch.randint(8, (2, 3, 16), generator=seeded())
    level = segment / 10 if heads else None
    for network in plain_and_sdpa(model):
        packed = network(x, causal=causal, segment=segment, previous=previous, level=level)
        for row, sizes in enumerate(lengths):
            for own in torch.arange(16).split(sizes):
                alone = network(x[row:row + 1, own], causal=causal, previous=previous[row:row + 1, own],
                                level=level[row:row + 1, own] if heads else None)
                assert torch.allclose(packed[row, own], alone[0], atol=1e-4)
        unaware = network(x, causal=causal, previous=previous, level=level)
        assert torch.allclose(packed[1], unaware[1], atol=1e-4) and (packed[0] - unaware[0]).abs().max() > 0.1


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('parts', [{}, dict(n_recur=2, n_layer=2, short_conv=2, time_dim=8),
                                   dict(n_recur=1, graph_window=1, graph_topk=1)], ids=['plain', 'deep', 'graph'])
def test_hidden_states_of_some_places_only(causal, parts):
    """They and their gradients are those of the whole pass, packed rows or not; the last MLP sees no other position."""
    x, where = torch.randint(8, (40, 8), generator=seeded()), torch.rand(40, 8, generator=seeded(1)) < 0.4
    model, seen = tiny_gpt(V=7, T=8, **parts), []
    model.blocks[-1].fc.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:-1].numel()))
    for model in plain_and_sdpa(model):
        for segment in (None, (torch.arange(8) > 4).long().expand(40, -1)):
            found = []
            for only in (None, places(where)):
                seen.clear()
                hidden = model(x, causal=causal, segment=segment, only=only)
                hidden = hidden[where] if only is None else hidden
                model.logits(hidden).square().sum().backward()
                found.append([hidden.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]])
                model.zero_grad(set_to_none=True)
            assert seen == [320] * (model.config.n_recur - 1) + [128] and 64 < where.sum() < 128     # 128, 256, .. positions
            assert len(found[0]) == len(found[1]) > 5
            for whole, some in zip(*found):
                torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())
    nowhere = model(x, causal=causal, only=places(where & ~where))
    assert nowhere.shape == (0, model.config.n_embd)


@torch.no_grad()
def test_what_the_network_is_conditioned_on():
    """None is no prediction, and the share of masks as the level; the causal pass is told neither."""
    model = tiny_gpt(V=5, T=8, noise_condition=True, self_condition=True)
    x = torch.tensor([[1, 5, 5, 0, 5, 2, 3, 4], [5, 1, 2, 3, 4, 0, 1, 2]])
    plain, share = model(x), torch.tensor([[3 / 8], [1 / 8]])
    guess, one = torch.where(x == 5, 2, 5), torch.full_like(x, 5).index_fill(1, torch.tensor(2), 3)
    for told in (dict(previous=torch.full_like(x, 5)), dict(level=share), dict(level=share.expand(2, 8))):
        assert torch.allclose(model(x, **told), plain, atol=1e-6)
    for told in (dict(previous=guess), dict(level=share + 0.1), dict(previous=one)):
        assert ((model(x, **told) - plain).abs().amax(-1) > 1e-4).all()   # and all positions hear of it
        assert torch.equal(model(x, causal=True, **told), model(x, causal=True))


@torch.no_grad()
@pytest.mark.parametrize('name, weights', [('noise_condition', 32 * 16), ('self_condition', 16 * 16)])
def test_a_fresh_condition_changes_no_number(name, weights):
    def fresh(**more):
        torch.manual_seed(0)
        return GPT(GPTConfig(block_size=4, vocab_size=3, n_layer=1, n_head=2, n_embd=16, **more))
    x, told = torch.tensor([[0, 3, 2, 1], [1, 1, 3, 3]]), fresh(**{name: True})
    assert (torch.equal(fresh()(x), told(x, previous=x, level=torch.rand(2, 1)))
            and told.num_params() == fresh().num_params() + weights)


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
        scores = torch.stack([rotated(ln(q[t, head]), t) @ rotated(ln(k[s, head]), s) for s in range(T)]) / hs ** 0.5
        heads[t, head] = scores.softmax(0) @ v[:, head]
    y = x[0] + heads.view(T, 8) @ block.attn_proj.weight.T
    y = y + (ln(y) @ block.fc.weight.T).relu().square() @ block.proj.weight.T
    for plain in (True, False):
        assert torch.allclose(block(x, (None, None), model.cos, model.sin, False, None, plain)[0][0], y, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('rows, kept', [(200, 81), (81, 81), (20, 20)])
def test_every_pair_of_tokens_has_an_embedding(causal, rows, kept):
    """Its own, where there are rows enough; nothing is next to the ends of a text, which is not what a mask is."""
    model = tiny_gpt(V=7, T=8, bigram_rows=rows)
    tables = model.bigrams.left.weight, model.bigrams.around.weight
    assert tables[0].shape == tables[1].shape == (kept, 16)
    x = torch.randint(8, (3, 8), generator=seeded())
    segment = torch.tensor([[0] * 8, [4] * 3 + [2] * 5, [0] + [1] * 6 + [2]])
    found, windows = model.bigrams(x, causal, segment), torch.tensor([[2], [7], [1]])
    assert torch.equal(model.bigrams(x, causal, segment, windows)[:, 0], found[torch.arange(3), windows[:, 0]])
    assert torch.equal(model.bigrams(x, causal)[0], found[0])

    def row(a, b):
        return (9 * a + b) % kept
    for b in range(3):
        for t in range(8):
            left, right = (x[b, s] if 0 <= s < 8 and segment[b, s] == segment[b, t] else 8 for s in (t - 1, t + 1))
            expected = tables[0][row(left, x[b, t])] + (0 if causal else tables[1][row(left, right)])
            assert torch.equal(found[b, t], expected)
    if causal:
        assert (model(x, causal=True) - model(x, causal=True, segment=segment)).abs().amax((1, 2))[0] == 0


@torch.no_grad()
@pytest.mark.parametrize('causal', [False, True])
def test_every_block_is_shown_the_embedding_and_the_first_values(causal):
    """Two blocks, used twice: all but the very first application mix what they are given with what that one was given."""
    model = tiny_gpt(V=7, T=8, n_layer=2, n_recur=2, shortcuts=True, time_dim=4)
    x, mixed = torch.randint(8, (3, 8), generator=seeded()), []
    shortcut = Block.shortcut

    def watch(block, y, first, number):
        mixed.append((block, y, first, number, shortcut(block, y, first, number)))
        return mixed[-1][-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, 'shortcut', watch)
        model(x, causal=causal)
    assert [(model.blocks[i], n) for i in (0, 1, 0, 1) for n in (0, 2)] == [(block, n) for block, _, _, n, _ in mixed]
    (_, start, none, _, kept), (_, values, nothing, _, same), *later = mixed
    assert none is nothing is None and kept is start and same is values
    ids = F.pad(x[:, :-1], (1, 0), value=7) if causal else x
    extra = model.causal_embd if causal else model.level(
        ((x == 7).float().mean(1)[:, None, None] * torch.pi * torch.arange(32)).cos())
    assert torch.allclose(start, norm(model.wte(ids) + extra), atol=1e-5)
    for block, y, first, number, out in later:
        a, b = block.shortcuts[number:number + 2]
        assert first is (values if number else start)
        assert torch.allclose(out, a * y + b * first, atol=1e-5) and (out - y).abs().max() > 0.1


@pytest.mark.parametrize('T, C', [(2, 8), (6, 8), (2, 32), (6, 32)])
def test_the_short_convolution_is_one_weight_a_channel_and_neighbour(T, C):
    """Against conv1d of the normalised states, in either mode, in rows shorter than its reach as well."""
    conv, x = ShortConv(C, 3), torch.randn(2, T, C, generator=seeded())
    assert torch.equal(conv(x, False), x)                                 # as it starts
    with torch.no_grad():
        conv.weight.normal_(generator=seeded(1))
    kernel = torch.zeros(C, 1, 7)                                         # what is 3 to the left comes first
    kernel[:, 0, :3], kernel[:, 0, 4:] = conv.weight[:3, 0].flip(0).T, conv.weight[3:, 0].T
    for causal in (False, True):
        kernel[:, 0, 4:] *= not causal
        y = F.conv1d(F.layer_norm(x, (C,)).mT, kernel, padding=3, groups=C).mT
        assert torch.allclose(conv(x, causal), x + y, atol=1e-5)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('segment', [None, torch.tensor([[0, 0, 0, 1, 1], [4, 7, 7, 7, 2]])], ids=['whole', 'packed'])
@pytest.mark.parametrize('C', [3, 32])
def test_the_gradients_of_the_short_convolution(C, segment, causal):
    conv, x = ShortConv(C, 2).double(), torch.randn(2, 5, C, generator=seeded()).double().requires_grad_()
    weight = torch.randn(4, 1, C, generator=seeded(1)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: torch.func.functional_call(conv, dict(weight=weight), (x, causal, segment)),
                                    (x, weight))


def test_bf16_roughly_agrees():
    model = tiny_gpt(V=11, T=16, n_embd=32)
    x = torch.randint(11, (5, 16), generator=seeded())
    for causal in (False, True):
        model.compute_dtype = torch.float32
        exact = model.logits(model(x, causal=causal))
        model.compute_dtype = torch.bfloat16
        hidden = model(x, causal=causal)
        assert hidden.dtype == torch.bfloat16
        logits = model.logits(hidden)
        assert logits.dtype == torch.float32
        assert 0 < (logits - exact).abs().max() < 0.05 * exact.abs().max()


def test_blocks_start_as_the_identity_and_recur():
    torch.manual_seed(0)
    fresh = GPT(GPTConfig(block_size=4, vocab_size=3, n_layer=1, n_head=2, n_embd=16))
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
    assert torch.allclose(plain, hidden @ model.wte.weight[:7].T, atol=1e-5)  # tied; the padding rows are not seen
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
    (dict(time_dim=-1), 'time_dim must not be negative, got -1'),
    (dict(graph_window=-1), 'graph_window must not be negative'),
    (dict(graph_topk=-1), 'graph_topk must not be negative'),
    (dict(mu_blocks=-1), 'mu_blocks must not be negative'),
    (dict(mu_blocks=5), 'mu_blocks=5 must divide n_embd=128'),
])
def test_impossible_networks(changes, message):
    with pytest.raises(UserError, match=message):
        GPT(GPTConfig(**changes))

# -----------------------------------------------------------------------------
# the draft head


def test_a_fresh_draft_head_leaves_the_state_as_it_is():
    """So its first guess is what the causal pass said about the token before; whatever it is fed has no say yet."""
    torch.manual_seed(0)
    drafter, state = Drafter(16), torch.randn(5, 16)
    assert torch.equal(drafter(state, torch.randn(5, 16)), state)
    with torch.no_grad():
        drafter.proj.weight.normal_()
    first, second = drafter(state, torch.ones(5, 16)), drafter(state, torch.arange(16.0).expand(5, 16))
    assert not torch.allclose(first, state) and not torch.allclose(first, second)
    fed = torch.cat((F.layer_norm(state, (16,)), F.layer_norm(torch.arange(16.0).expand(5, 16), (16,))), 1)
    assert torch.allclose(second, state + F.linear(F.linear(fed, drafter.fc.weight).relu() ** 2, drafter.proj.weight),
                          atol=1e-4)


@torch.no_grad()
def test_the_draft_head_is_fed_the_embedding_of_the_token():
    model = tiny_gpt(draft_head=True)
    state, ids = torch.randn(4, 16, generator=seeded()), torch.tensor([0, 2, 1, 3])
    assert torch.equal(model.draft(state, ids), model.drafter(state, model.wte.weight[ids]))
    half = model.draft(state.bfloat16(), ids)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), model.draft(state, ids), rtol=0.1, atol=0.1)


def test_the_draft_head_is_counted_and_changes_no_other_number():
    """3 n_embd^2 parameters more; neither pass knows of it."""
    plain, more = (GPT(GPTConfig(block_size=4, vocab_size=3, n_layer=1, n_head=2, n_embd=16, draft_head=head))
                   for head in (False, True))
    assert plain.drafter is None and more.num_params() - plain.num_params() == 3 * 16 * 16
    more.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randint(3, (5, 4), generator=seeded())
    assert all(torch.equal(plain(x, causal=causal), more(x, causal=causal)) for causal in (False, True))
    assert set(more.state_dict()) - set(plain.state_dict()) == {'drafter.fc.weight', 'drafter.proj.weight'}


@torch.no_grad()
def test_a_checkpoint_with_a_draft_head(tmp_path):
    path, model = str(tmp_path / 'ckpt.pt'), tiny_gpt(draft_head=True)
    save_checkpoint(path, checkpoint_of(model))
    loaded, checkpoint = load_checkpoint(path)
    assert checkpoint['model_args']['draft_head'] is True and loaded.num_params() == model.num_params()
    state, ids = torch.randn(4, 16, generator=seeded()), torch.tensor([0, 2, 1, 1])
    assert torch.equal(loaded.draft(state, ids), model.draft(state, ids))
    for weights, args, message in ((tiny_gpt().state_dict(), model_args(model.config), "tensor 'drafter.fc.weight'"),
                                   (model.state_dict(), model_args(tiny_gpt().config), "tensor 'drafter.fc.weight'")):
        torch.save(checkpoint_of(model, model=weights, model_args=args), path)
        with pytest.raises(UserError, match=message):
            load_checkpoint(path)


def test_identity_is_the_network_and_its_vocabulary():
    checkpoint = dict(model_args=model_args(tiny_gpt().config), meta=dict(itos=['a', 'b', 'c'], name='x'))
    assert identity(checkpoint) == {**checkpoint['model_args'], 'itos': ['a', 'b', 'c']}
    other = identity(dict(checkpoint, meta=dict(itos=['a', 'c', 'b'])))
    with pytest.raises(UserError, match='a.pt and b.pt do not fit together: itos is'):
        check_same_model('a.pt', identity(checkpoint), 'b.pt', other)


def test_configure_compute():
    model, line = configure_compute(tiny_gpt(), 'cpu', 'float32')
    assert model.compute_dtype == torch.float32 and model.plain_attention
    assert 'cpu' in line and 'float32' in line and 'plain attention' in line
    model, line = configure_compute(tiny_gpt(), 'cpu', 'bfloat16', 'sdpa')
    assert model.compute_dtype == torch.bfloat16 and not model.plain_attention and 'sdpa' in line
    assert model(torch.zeros(1, 4, dtype=torch.long)).dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32                # only the compute changes
    for arguments, message in ((('tpu',), 'device expects'), (('cpu:x',), 'device expects'), (('cpu', 'float8'), 'dtype expects'),
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
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    assert not bf16_is_fast('cuda') and not bf16_is_fast('mps')

# -----------------------------------------------------------------------------
# masks


def test_stratified_k_is_uniform_and_spread():
    n, generator = torch.full((10,), 7), seeded(1)
    draws = torch.stack([stratified_k(n, generator) for _ in range(3000)])   # (3000, 10)
    for row in range(10):                                               # in every row, not only in all of them together
        statistic, bound = chi_square(draws[:, row].bincount(minlength=8)[1:], torch.full((7,), 3000 / 7))
        assert statistic < bound
    # 10 strata over 7 values: each value gets 10/7 of a batch, give or take less than one
    counts = F.one_hot(draws - 1, 7).sum(1)
    assert counts.min() >= 1 - 1 and counts.max() <= 3 and (counts.sum(1) == 10).all()
    many = stratified_k(torch.full((1000,), 4), generator).bincount(minlength=5)[1:]
    assert (many - 250).abs().max() <= 1
    # rows with n of their own: 1..n each, and a row is not tied to its stratum
    mixed = torch.stack([stratified_k(torch.tensor([1, 2, 3, 50]), generator) for _ in range(500)])
    assert (mixed.amin(0) == 1).all() and (mixed.amax(0)[:3] == torch.tensor([1, 2, 3])).all() and mixed.max() <= 50
    assert (mixed[:, 3] > 25).float().mean() > 0.4 and (mixed[:, 3] < 26).float().mean() > 0.4


def test_stratified_k_never_exceeds_n(monkeypatch):
    """In float32 (strata + rand) / B may round up to 1, which must not give k = n + 1."""
    n = torch.full((8,), 5)
    monkeypatch.setattr(model_module.torch, 'rand', lambda *size, **more: torch.full(size, 1 - 2.0 ** -24))
    assert stratified_k(n).max() == 5


def test_random_subset_is_exact_and_uniform():
    generator = seeded(2)
    candidates = torch.tensor([[1, 0, 1, 1, 0, 1]] * 20000).bool()
    chosen = random_subset(candidates, torch.full((20000,), 2), generator)
    assert (chosen.sum(1) == 2).all() and not (chosen & ~candidates).any()
    pairs = (chosen[:, [0, 2, 3, 5]] * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16)
    expected = torch.tensor([20000 / 6 if bin(i).count('1') == 2 else 0.0 for i in range(16)])
    statistic, bound = chi_square(pairs, expected)
    assert statistic < bound
    k = torch.tensor([0, 1, 4, 9, -3])                                 # more than there are: all; fewer than none: none
    assert random_subset(candidates[:5], k, generator).sum(1).tolist() == [0, 1, 4, 4, 0]

# -----------------------------------------------------------------------------
# checkpoints


def checkpoint_of(network, **changes):
    meta = dict(name='x', vocab_size=network.config.vocab_size, tokenizer='char', itos=None, bos=None, eos=None, pad=None)
    return dict(dict(model=network.state_dict(), ema=None, iter_num=3, model_args=model_args(network.config),
                     config=default_config(), meta=meta), **changes)


def test_checkpoint_round_trip(tmp_path):
    path, x = str(tmp_path / 'ckpt.pt'), torch.randint(3, (2, 4), generator=seeded())
    model, ema = tiny_gpt(seed=1), tiny_gpt(seed=2)
    model.mask_logit_bias.fill_(-1.5)
    save_checkpoint(path, checkpoint_of(model, ema=ema.state_dict()))
    assert os.listdir(tmp_path) == ['ckpt.pt']
    loaded, checkpoint = load_checkpoint(path, ema=False)
    assert not loaded.training and checkpoint['iter_num'] == 3 and loaded.config == model.config
    assert torch.equal(loaded.logits(loaded(x)), model.logits(model(x)))  # the controller's bias included
    averaged, _ = load_checkpoint(path)
    assert torch.equal(averaged(x), ema(x)) and not torch.equal(averaged(x), model(x))
    save_checkpoint(path, checkpoint_of(model))                           # one without averaged weights
    assert torch.equal(load_checkpoint(path)[0](x), model(x))


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('where', ['save', 'fsync', 'replace'])
def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch, error, where):
    path = str(tmp_path / 'ckpt.pt')
    save_checkpoint(path, checkpoint_of(tiny_gpt(seed=1)))
    before = open(path, 'rb').read()

    def failing(checkpoint, file, *more):
        if where == 'save':
            Path(file).write_bytes(b'half a checkpoint')
        raise error('interrupted')

    with monkeypatch.context() as m:
        if where == 'save':
            m.setattr(torch, 'save', failing)
        else:
            m.setattr(os, where, lambda *args: failing(None, None))
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UserError, match='interrupted'):
            save_checkpoint(path, checkpoint_of(tiny_gpt(seed=2)))
    assert os.listdir(tmp_path) == ['ckpt.pt'] and open(path, 'rb').read() == before


def test_save_makes_the_file_durable_before_it_takes_the_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (calls.append(('fsync', os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (calls.append(('replace', os.path.getsize(a))), replace(a, b)))
    save_checkpoint(str(tmp_path / 'ckpt.pt'), checkpoint_of(tiny_gpt()))
    size = os.path.getsize(tmp_path / 'ckpt.pt')
    assert calls == [('fsync', size), ('replace', size)]


class Evil:
    """Unpickling this creates a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, 'w'))


@pytest.mark.parametrize('how', ['torch', 'pickle'])
def test_checkpoint_cannot_run_code(tmp_path, how):
    path, marker = tmp_path / 'ckpt.pt', tmp_path / 'marker'
    evil = checkpoint_of(tiny_gpt(), config=Evil(str(marker)))
    if how == 'torch':
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps(Evil(str(marker)), protocol=2))
    with pytest.raises(UserError, match='ckpt.pt: refused') as error:
        load_checkpoint(str(path))
    assert not marker.exists() and '\n' not in str(error.value)
    pickle.loads(pickle.dumps(Evil(str(marker))))                         # it would have
    assert marker.exists()


def test_damaged_files(tmp_path):
    path = tmp_path / 'ckpt.pt'
    with pytest.raises(UserError, match='ckpt.pt: no such checkpoint'):
        load_checkpoint(str(path))
    with pytest.raises(UserError, match='no such checkpoint'):
        load_checkpoint(str(tmp_path))                                    # a folder
    save_checkpoint(str(path), checkpoint_of(tiny_gpt()))
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match='ckpt.pt: (truncated or damaged|refused)') as error:
            load_checkpoint(str(path))
        assert '\n' not in str(error.value)
    for junk in (b'hello, world\n', b'\x80\x02', b'\x00' * 1000, bytes(range(256)) * 20):
        path.write_bytes(junk)
        with pytest.raises(UserError, match='ckpt.pt: (truncated or damaged|refused)'):
            load_checkpoint(str(path))


@pytest.mark.parametrize('error', [IndexError, TypeError, AttributeError])
def test_other_errors_of_a_damaged_file(tmp_path, monkeypatch, error):
    def load(*args, **more):
        raise error('pop from empty list')

    save_checkpoint(str(tmp_path / 'ckpt.pt'), checkpoint_of(tiny_gpt()))
    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises(UserError, match='ckpt.pt: truncated or damaged'):
        load_checkpoint(str(tmp_path / 'ckpt.pt'))


@pytest.mark.parametrize('content', [[1, 2], {'model': {}}, {'a': torch.zeros(2)}, 3, None])
def test_not_a_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='ckpt.pt: not a checkpoint of train.py'):
        load_checkpoint(str(tmp_path / 'ckpt.pt'))


def test_checkpoints_that_do_not_fit(tmp_path):
    path, model = str(tmp_path / 'ckpt.pt'), tiny_gpt()
    weights, args = model.state_dict(), model_args(model.config)
    bad = {name: tensor.clone() for name, tensor in weights.items()}
    bad['blocks.0.fc.weight'][3, 2] = float('nan')
    fewer = {name: tensor for name, tensor in weights.items() if name != 'causal_embd'}
    for changes, message in (
            (dict(model=bad), "'blocks.0.fc.weight' holds NaN"),
            (dict(ema=bad), "'blocks.0.fc.weight' holds NaN"),
            (dict(model_args={**args, 'n_kv_head': 2}), "field 'n_kv_head'"),
            (dict(model_args={**args, 'n_embd': 32}), r"has shape \(\d+.*the network needs \(\d+"),
            (dict(model={**weights, 'head.weight': torch.zeros(1)}), "tensor 'head.weight'"),
            (dict(model=fewer), "tensor 'causal_embd'")):
        torch.save(checkpoint_of(model, **changes), path)
        with pytest.raises(UserError, match=message) as error:
            load_checkpoint(path)
        assert str(error.value).startswith(path) and '\n' not in str(error.value)


def test_a_checkpoint_from_before_a_field_was_there(tmp_path):
    """What it does not know has its default, so that older checkpoints go on working; tensors must fit all the same."""
    path, model = str(tmp_path / 'ckpt.pt'), tiny_gpt()
    new = ('draft_head', 'energy_head', 'noise_condition', 'self_condition', 'time_dim', 'graph_window', 'mu_blocks',
           'short_conv', 'shortcuts', 'bigram_rows')
    old = {name: value for name, value in model_args(model.config).items() if name not in new}
    torch.save(checkpoint_of(model, model_args=old), path)
    loaded, checkpoint = load_checkpoint(path)
    assert loaded.config == model.config and checkpoint['model_args'] == model_args(model.config)
    assert all(not checkpoint['model_args'][name] for name in new)
    torch.save(checkpoint_of(tiny_gpt(self_condition=True), model_args=old), path)
    with pytest.raises(UserError, match="tensor 'previous.weight'"):
        load_checkpoint(path)


def test_check_same_model():
    a = dict(vocab_size=5, block_size=8, dropout=0.0)
    check_same_model('a.pt', a, 'b.pt', dict(a))
    check_same_model('a.pt', a, 'b.pt', {**a, 'dropout': 0.1}, ('vocab_size', 'block_size'))
    with pytest.raises(UserError, match='a.pt and b.pt do not fit together: block_size is 8 and 9'):
        check_same_model('a.pt', a, 'b.pt', {**a, 'block_size': 9})
