"""The optional parts of the network: each starts as the identity and then does what it says."""

import pytest
import torch
import torch.nn.functional as F
from conftest import fresh_gpt, seeded, tiny_gpt

from configurator import UserError
from model import GPT, GPTConfig, Pass, norm
from parts.layers import IN_A_BLOCK, IN_THE_NETWORK, Part, ShortConv, Shortcuts, build, parse_parts
from plumbing.kernels import beside
from plumbing.checkpoint import NUMBERS, check_same_model, comparable

# every part with numbers that are not its own, and its parameters at 16 channels, 5 tokens and 8 places
SIZES = {'graph:2:1': 2, 'shortcuts': 4, 'short_conv:3': 6 * 16, 'previous': 16 * 16, 'mu:4': 4 * 12 + 4 * 4,
         'bigrams:10': 2 * 10 * 16, 'level': 32 * 16, 'level:8': 32 * 8 + 8 * 16, 'places': 8 * 16}


def passing(**more):
    """What a part is told of a pass."""
    return Pass(**{**dict(causal=False, plain=True, told={}), **more})


# -----------------------------------------------------------------------------
# the joints


def test_every_part_is_listed_here():
    assert {name.split(':')[0] for name in SIZES} == {*IN_A_BLOCK, *IN_THE_NETWORK}


@torch.no_grad()
@pytest.mark.parametrize('plain', [True, False])
@pytest.mark.parametrize('parts',
                         [*SIZES, ','.join(dict((name.split(':')[0], name) for name in SIZES).values())])
def test_every_part_starts_as_the_identity(parts, plain):
    """A fresh part changes no number of a network that is trained, in either mode, packed or not."""
    without, fitted = tiny_gpt(V=5, T=8), fresh_gpt(5, 8, parts=parts)
    missing = fitted.load_state_dict(without.state_dict(), strict=False)
    assert missing.missing_keys and not missing.unexpected_keys
    assert all('parts.' in name for name in missing.missing_keys)
    assert fitted.num_params() - without.num_params() == sum(SIZES[part] for part in parts.split(','))
    x = torch.randint(6, (3, 8), generator=seeded())
    segment = torch.tensor([[0] * 8, [4] * 3 + [2] * 5, [0] + [1] * 6 + [2]])
    for network in (without, fitted.eval()):
        network.plain_attention = plain
    for causal in (False, True):
        for packed in (None, segment):
            told = dict(previous=x.flip(0), level=torch.rand(3, 8, generator=seeded()))
            found = fitted(x, causal=causal, segment=packed, **told)
            assert torch.allclose(found, without(x, causal=causal, segment=packed), atol=1e-5)


@pytest.mark.parametrize('parts', SIZES)
def test_a_part_leaves_the_random_numbers_of_the_rest_alone(parts):
    without, fitted = fresh_gpt().state_dict(), fresh_gpt(parts=parts).state_dict()
    assert all(torch.equal(fitted[name], weight) for name, weight in without.items())


def test_a_part_need_not_use_any_joint():
    part, x, p = Part(), torch.randn(2, 3, 4), passing()
    assert part.embed(x) is part.before(x, p) is part.values(x, p) is part.bias(x, p) is x
    assert part.added(None, x, p) == 0 and part.bias(None, p) is None


def test_parts_by_name():
    assert parse_parts('') == parse_parts(' , ') == {}
    assert parse_parts('short_conv:2, shortcuts,graph:8:4') == dict(short_conv=(2,), shortcuts=(),
                                                                    graph=(8, 4))
    model = fresh_gpt(parts='level:4,short_conv,bigrams:9,previous,graph:1')
    assert [*model.parts] == ['previous', 'bigrams', 'level']  # in the order of the tables
    assert [*model.blocks[0].parts] == ['graph', 'short_conv']
    graph = model.blocks[0].parts['graph']
    assert (graph.window, graph.topk) == (1, 4) and len(model.blocks[0].parts['short_conv'].weight) == 4
    assert not fresh_gpt().parts and not fresh_gpt().blocks[0].parts


def test_parts_are_compared_with_all_of_their_numbers():
    for name, part in {**IN_A_BLOCK, **IN_THE_NETWORK}.items():
        assert (part.__init__.__defaults__ or ()) == NUMBERS.get(name, ())
    for same in ('graph:8, level:0', 'level,graph:8:4', ' level , graph'):
        check_same_model('a', dict(parts='graph,level'), 'b', dict(parts=same))
    for other in ('graph', 'graph:8:0,level', 'graph:4,level', 'graph,level:8', 'graph,level,mu'):
        assert comparable('parts', other) != comparable('parts', 'graph,level')
    assert comparable('parts', 'mu,graph:8:4') > comparable('parts', 'graph:8') > comparable('parts', ' , ')


@pytest.mark.parametrize('parts, message', [
    ('short_cnov', "parts knows graph, shortcuts, .*level, places, each once, .*got 'short_cnov'"),
    ('shortcuts,shortcuts', "each once, with numbers as in short_conv:2; got 'shortcuts,shortcuts'"),
    ('short_conv:0', 'with numbers as in short_conv:2'),
    ('short_conv:00', 'with numbers as in short_conv:2'),
    ('graph:0:4', 'with numbers as in short_conv:2'),
    ('short_conv:-1', 'with numbers'),
    ('level:x', 'with numbers'),
    ('level:', 'with numbers'),
    ('level:1.5', 'with numbers'),
    ('level:²', 'with numbers'),
    ('level=8', 'parts knows'),
    ('shortcuts:1', "parts='shortcuts:1' gives a part more numbers than it takes"),
    ('level:1:2', 'more numbers than it takes'),
    ('mu:5', 'mu:5 must divide n_embd=16 into blocks of at least two channels'),
    ('mu:16', 'at least two channels')])
def test_parts_that_are_none(parts, message):
    with pytest.raises(UserError, match=message):
        fresh_gpt(parts=parts)


def test_a_part_of_ones_own(monkeypatch):
    """A class and an entry in a table are all that a new part needs."""

    class Louder(Part):
        def __init__(self, config, times=2):
            super().__init__()
            self.times = times

        def values(self, v, p):
            return self.times * v

    monkeypatch.setitem(IN_A_BLOCK, 'louder', Louder)
    x = torch.randint(4, (2, 4), generator=seeded())
    model, louder = tiny_gpt(), tiny_gpt(parts='louder:3')
    assert (model(x) - louder(x)).abs().max() > 0.01
    with torch.no_grad():
        model.blocks[0].qkv.weight[2 * 16 :] *= 3
    assert torch.allclose(model(x), louder(x), atol=1e-5)
    with pytest.raises(UserError, match='each once'):
        build(GPTConfig(parts='louder,louder'), IN_A_BLOCK)


# -----------------------------------------------------------------------------
# what the network is told


@torch.no_grad()
def test_what_the_network_is_conditioned_on():
    """None is no prediction, and the share of masks as the level; the causal pass is told neither."""
    model = tiny_gpt(V=5, T=8, parts='level,previous')
    x = torch.tensor([[1, 5, 5, 0, 5, 2, 3, 4], [5, 1, 2, 3, 4, 0, 1, 2]])
    plain, share = model(x), torch.tensor([[3 / 8], [1 / 8]])
    guess = torch.where(x == 5, 2, 5)
    one = torch.full_like(x, 5).index_fill(1, torch.tensor(2), 3)
    for told in (dict(previous=torch.full_like(x, 5)), dict(level=share), dict(level=share.expand(2, 8))):
        assert torch.allclose(model(x, **told), plain, atol=1e-6)
    for told in (dict(previous=guess), dict(level=share + 0.1), dict(previous=one)):
        assert ((model(x, **told) - plain).abs().amax(-1) > 1e-4).all()  # and all positions hear of it
        assert torch.equal(model(x, causal=True, **told), model(x, causal=True))


# -----------------------------------------------------------------------------
# pairs of tokens, shortcuts


@torch.no_grad()
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('rows, kept', [(200, 81), (81, 81), (20, 20)])
def test_every_pair_of_tokens_has_an_embedding(causal, rows, kept):
    """Its own, where there are rows enough; next to the ends of a text is nothing, which is not a mask."""
    model = tiny_gpt(V=7, T=8, parts=f'bigrams:{rows}')
    bigrams = model.parts['bigrams']
    left_table, around = bigrams.left.weight, bigrams.around.weight
    assert left_table.shape == around.shape == (kept, 16)
    x = torch.randint(8, (3, 8), generator=seeded())
    segment = torch.tensor([[0] * 8, [4] * 3 + [2] * 5, [0] + [1] * 6 + [2]])
    windows = torch.tensor([[2], [7], [1]])
    found = bigrams.added(model, x, passing(causal=causal, segment=segment))
    some = bigrams.added(model, x, passing(causal=causal, segment=segment, at=windows))
    assert torch.equal(some[:, 0], found[torch.arange(3), windows[:, 0]])
    assert torch.equal(bigrams.added(model, x, passing(causal=causal))[0], found[0])

    def row(a, b):
        return (9 * a + b) % kept

    def beside(b, t, s):
        return x[b, s] if 0 <= s < 8 and segment[b, s] == segment[b, t] else 8

    for b in range(3):
        for t in range(8):
            left, right = beside(b, t, t - 1), beside(b, t, t + 1)
            expected = left_table[row(left, x[b, t])] + (0 if causal else around[row(left, right)])
            assert torch.equal(found[b, t], expected)
    if causal:
        assert (model(x, causal=True) - model(x, causal=True, segment=segment)).abs().amax((1, 2))[0] == 0


@torch.no_grad()
@pytest.mark.parametrize('causal', [False, True])
def test_every_position_of_a_text_has_an_embedding(causal):
    model, x = tiny_gpt(V=7, T=8, parts='places'), torch.randint(8, (3, 8), generator=seeded())
    places = model.parts['places']
    segment = torch.tensor([[0] * 8, [4] * 3 + [2] * 5, [0] + [1] * 6 + [2]])
    windows = torch.tensor([[2, 3], [7, 0], [1, 1]])
    found = places.added(model, x, passing(causal=causal, segment=segment))
    position = torch.tensor([[*range(8)], [*range(3), *range(5)], [0, *range(6), 0]])
    assert torch.equal(found, places.weight[position])
    some = places.added(model, x, passing(causal=causal, segment=segment, at=windows))
    assert torch.equal(some, places.weight[position.gather(1, windows)])
    assert torch.equal(places.added(model, x, passing(causal=causal))[2], places.weight)


@torch.no_grad()
@pytest.mark.parametrize('causal', [False, True])
def test_every_block_is_shown_the_embedding_and_the_first_values(monkeypatch, causal):
    """Two blocks, used twice: all but the very first application mix in what that one was given."""
    model = tiny_gpt(V=7, T=8, n_layer=2, n_recur=2, parts='shortcuts,level:4')
    x, mixed, original = torch.randint(8, (3, 8), generator=seeded()), [], Shortcuts.mixed

    def watch(self, y, p, name, own, other):
        mixed.append((self, y, name, p.first.get(name), original(self, y, p, name, own, other)))
        return mixed[-1][-1]

    monkeypatch.setattr(Shortcuts, 'mixed', watch)
    model(x, causal=causal)
    shortcuts = [block.parts['shortcuts'] for block in model.blocks]
    expected = [(part, name) for part in 2 * shortcuts for name in ('x', 'values')]
    assert expected == [(part, name) for part, _, name, _, _ in mixed]
    (_, start, _, none, kept), (_, values, _, nothing, same), *later = mixed
    assert none is nothing is None and kept is start and same is values
    ids = F.pad(x[:, :-1], (1, 0), value=7) if causal else x
    share = (x == 7).float().mean(1)[:, None, None]
    level = model.parts['level'].mlp((share * torch.pi * torch.arange(32)).cos())
    assert torch.allclose(start, norm(model.wte(ids) + (model.causal_embd if causal else level)), atol=1e-5)
    for part, y, name, first, out in later:
        a, b = part.weight[:2] if name == 'x' else part.weight[2:]
        assert first is (start if name == 'x' else values)
        assert torch.allclose(out, a * y + b * first, atol=1e-5) and (out - y).abs().max() > 0.1


# -----------------------------------------------------------------------------
# the short convolution


def short_conv(C, n):
    return ShortConv(GPTConfig(n_embd=C), n)


@pytest.mark.parametrize('T, C', [(2, 8), (6, 8), (2, 32), (6, 32)])
def test_the_short_convolution_has_one_weight_for_each_channel_and_neighbour(T, C):
    """Against conv1d of the normalised states, in either mode, in rows shorter than its reach as well."""
    conv, x = short_conv(C, 3), torch.randn(2, T, C, generator=seeded())
    assert torch.equal(conv.before(x, passing()), x)  # as it starts
    with torch.no_grad():
        conv.weight.normal_(generator=seeded(1))
    kernel = torch.zeros(C, 1, 7)  # what is 3 to the left comes first
    kernel[:, 0, :3], kernel[:, 0, 4:] = conv.weight[:3, 0].flip(0).T, conv.weight[3:, 0].T
    for causal in (False, True):
        kernel[:, 0, 4:] *= not causal
        y = F.conv1d(F.layer_norm(x, (C,)).mT, kernel, padding=3, groups=C).mT
        assert torch.allclose(conv.before(x, passing(causal=causal)), x + y, atol=1e-5)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('segment', [None, torch.tensor([[0, 0, 0, 1, 1], [4, 7, 7, 7, 2]])],
                         ids=['whole', 'packed'])
@pytest.mark.parametrize('C', [3, 32])
def test_the_gradients_of_the_short_convolution(C, segment, causal):
    conv, x = short_conv(C, 2).double(), torch.randn(2, 5, C, generator=seeded()).double().requires_grad_()
    weight = torch.randn(4, 1, C, generator=seeded(1)).double().requires_grad_()
    p = passing(causal=causal, segment=segment)

    def convolved(x, weight):
        del conv._parameters['weight']
        conv._parameters['weight'] = weight
        return conv.before(x, p)

    assert torch.autograd.gradcheck(convolved, (x, weight), fast_mode=True)


def test_parts_make_no_network_of_another_kind():
    """The names of what they learn, by which a checkpoint knows them."""
    model = GPT(GPTConfig(n_layer=1, parts='graph,shortcuts,short_conv,previous,mu,bigrams:9,level:8'))
    block = ('graph.off_graph_penalty', 'shortcuts.weight', 'short_conv.weight')
    whole = ('previous.proj', 'mu.qkv', 'mu.proj', 'bigrams.left', 'bigrams.around', 'level.mlp.0',
             'level.mlp.2')
    assert [name for name, _ in model.named_parameters() if 'parts.' in name] == [
        *(f'blocks.0.parts.{part}' for part in block), *(f'parts.{part}.weight' for part in whole)]


@pytest.mark.parametrize('d', [-9, -3, -1, 1, 2, 3, 9])
def test_beside_a_row_there_is_nothing(d):
    """Also where the neighbour would be further away than the row is long."""
    idx, segment = torch.tensor([[4, 5, 6]]), torch.tensor([[0, 0, 1]])
    there = [idx[0, i - d].item() if 0 <= i - d < 3 else 7 for i in range(3)]
    assert beside(idx, d, 7).tolist() == [there]
    same = [there[i] if 0 <= i - d < 3 and segment[0, i] == segment[0, i - d] else 7 for i in range(3)]
    assert beside(idx, d, 7, segment).tolist() == [same]
