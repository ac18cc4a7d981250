"""The suite of speed, on networks so small that what it counts is known, what it compares computed twice."""

import functools
import itertools
import json

import pytest
import torch
from conftest import ARITHMETIC, chi_square, seeded, tiny_gpt, write_checkpoint
from test_commands import bench_settings
from torch.utils.flop_counter import FlopCounterMode

import train
from configurator import UserError
from plumbing import device
from plumbing.rows import Ends, places
from plumbing.text import until_end
from sample import fill
from suites import speed

T, V = 12, 5
ITOS = [*'ab', '<bos>', '<eos>', '<pad>']
META = dict(ARITHMETIC, block_size=T, vocab_size=V, itos=ITOS, bos=2, eos=3, pad=4)
SHAPE = dict(n_layer=1, n_embd=16, n_head=2, n_recur=1, block_size=8, batch_size=8, vocab_size=20)


@pytest.fixture
def small(monkeypatch):
    """The tables with tiny sizes, two rounds each."""
    monkeypatch.setattr(speed, 'SHAPES', (SHAPE, dict(SHAPE, batch_size=4)))
    monkeypatch.setattr(speed, 'BATCHES', (1, 3))
    monkeypatch.setattr(speed, 'LONG_BATCHES', (2,))
    monkeypatch.setattr(speed, 'LENGTH', 30)
    return lambda *words: bench_settings('--suite=speed', '--steps=2', '--dtype=float32', *words)


def check_rows(rows, base, more=()):
    """Every row has its columns; the ratios are those of the medians of one comparison."""
    for row in rows:
        assert {'table', 'shape', 'name', 'seconds', 'low', 'high', 'n', *more} <= set(row)
        assert 0 < row['low'] <= row['seconds'] <= row['high'] and row['n'] == 2
        if base:
            first, = [other for other in rows if (other['shape'], other['name']) == (row['shape'], base)]
            assert row['ratio'] == pytest.approx(first['seconds'] / row['seconds'])
    json.dumps(rows)

# -----------------------------------------------------------------------------
# what is compared is the same


def test_baseline_has_our_loss_and_gradients():
    """Also where one token alone is masked. Logits where they count give the gradients of all logits."""
    model, x0 = tiny_gpt(V, T), torch.randint(V, (6, T), generator=seeded())
    meta = dict(META, bos=None, eos=None, pad=None)
    batch = speed.masked_batch(model, x0, meta, seeded(1))
    found = []
    for everywhere in (True, False):
        hidden = model(batch[0])
        hidden.retain_grad()
        here = hidden.flatten(0, 1)[places(batch[2] > 0)]
        if everywhere:
            total = speed.baseline_loss(model, *batch, hidden)
        else:
            total = train.loss(model, *batch, hidden=here)[0] / 6
        total.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([total.detach(), hidden.grad, *grads])
        model.zero_grad(set_to_none=True)
    assert found[0][0] > 1 and found[0][1].abs().max() > 1e-3
    for plain, ours in itertools.zip_longest(*found):
        torch.testing.assert_close(plain, ours, rtol=1e-5, atol=1e-6)
    assert speed.baseline_loss(model, *batch).item() == pytest.approx(found[0][0].item())


def test_a_baseline_step_is_a_step_of_ours(small):
    """From the same weights and rows, with AdamW, without averages, ours goes where the baseline goes."""
    s, networks = small(), []
    make = speed.network

    def keep(*args, **more):
        networks.append(make(*args, **more))
        return networks[-1]

    config = speed.recipe(**SHAPE, **speed.VARIANTS['ours, unmasking, AdamW, no EMA'])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, 'network', keep)
        steps = [speed.baseline_step(s, config), speed.our_step(s, config)]
    before = networks[0].wte.weight.detach().clone()
    for step in steps:
        step()
        step()
    moved = [network.wte.weight.detach() - before for network in networks]
    assert moved[0].abs().max() > 1e-6  # the rate is 1e-5, the weights float32
    torch.testing.assert_close(*moved, rtol=0, atol=1e-6)


# nearly all is in the blocks,
@pytest.mark.parametrize('sizes', [dict(n_layer=2, n_recur=2, n_embd=32, vocab_size=62),
                                   dict(n_layer=1, n_recur=1, n_embd=16, vocab_size=1022)])  # or in the head
@pytest.mark.parametrize('changes', [speed.PLAIN, {}, dict(corruption='own:1,random:1', remask_ratio=1.0),
                                     dict(views=2, draft_head=False)])
def test_step_flops_are_those_that_torch_counts(small, sizes, changes):
    config = speed.recipe(n_head=2, block_size=32, batch_size=32, **sizes, **changes)
    step = speed.our_step(small('--attention=plain'), {**config, 'optimizer': 'adamw'})
    with FlopCounterMode(display=False) as counter:
        for _ in range(2):                                                     # k is drawn
            step()
    assert counter.get_total_flops() / 2 == pytest.approx(speed.step_flops(config), rel=0.05)

# -----------------------------------------------------------------------------
# the samplers


def test_cached_ar_writes_what_ar_writes():
    """The likeliest tokens after different prompts: rows end early, and late, and leave."""
    model = tiny_gpt(V, T, seed=2, n_layer=2)
    canvas = torch.full((27, T), model.mask_token_id)
    canvas[:, 0] = META['bos']
    canvas[:, 1:4] = torch.cartesian_prod(*[torch.tensor([0, 1, 4])] * 3)
    ours = fill(model, META, canvas, canvas != model.mask_token_id, ar_prefix=T, temperature=0.0)
    x = speed.cached_ar(model, canvas, seeded(), Ends(META['eos'], META['pad']), temperature=0.0)
    assert [until_end(META, ids) for ids in x.tolist()] == [sample['tokens'] for sample in ours]
    lengths = {len(sample['tokens']) for sample in ours}
    assert len(lengths) > 2 and T in lengths and torch.equal(x[:, :4], canvas[:, :4])
    ended = (x == META['eos']).cumsum(1) > (x == META['eos']).long()
    assert ended.any() and (x[ended] == META['pad']).all()


def test_cached_ar_draws_from_the_causal_law():
    model, n = tiny_gpt(3, 2, seed=1), 3000
    x = speed.cached_ar(model, torch.full((n, 2), 3), seeded())
    with torch.no_grad():
        every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        logp = model.logits(model(every, causal=True), real_only=True).log_softmax(-1)
    logp = logp.gather(2, every[..., None]).sum((1, 2))
    statistic, bound = chi_square((x[:, 0] * 3 + x[:, 1]).bincount(minlength=9), logp.exp() * n)
    assert statistic < bound


def test_plain_ancestral_draws_from_the_ancestral_law():
    """The mean over both orders of two tokens; what is given stays."""
    model, n, mask = tiny_gpt(3, 3, seed=1), 3000, 3
    canvas = torch.tensor([[mask, 2, mask]]).repeat(n, 1)
    x = speed.plain_ancestral(model, canvas, seeded())
    assert (x[:, 1] == 2).all()

    def law(a, b):
        """p of what is to stand at the first and last position, given these."""
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([[a, 2, b]]))[0], real_only=True)
        return logits.softmax(-1)[:, :3].double()

    start = law(mask, mask)
    expected = torch.tensor([start[0, a] * law(a, mask)[2, b] + start[2, b] * law(mask, b)[0, a]
                             for a in range(3) for b in range(3)]) / 2
    statistic, bound = chi_square((x[:, 0] * 3 + x[:, 2]).bincount(minlength=9), expected * n)
    assert statistic < bound


def test_nanogpt_is_a_causal_network_that_draws_from_its_law():
    """Of what it has written it reads the last block_size tokens; what is given stays."""
    config = tiny_gpt(3, 4, n_layer=2).config
    torch.manual_seed(0)
    model, n = speed.PlainGPT(config).eval(), 3000
    for weight in (model.wte.weight, model.wpe.weight):
        torch.nn.init.normal_(weight, std=1.0)
    read = []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    x = speed.nanogpt(model, torch.tensor([[1, 2, 3, 3, 3, 3]]).repeat(n, 1), seeded())
    assert (x[:, :2] == torch.tensor([1, 2])).all() and x.shape == (n, 6) and x.max() < 3
    assert [idx.size(1) for idx in read] == [2, 3, 4, 4] and torch.equal(read[-1], x[:, 1:5])
    with torch.no_grad():
        first = model(torch.tensor([[1, 2]])).softmax(-1)[0]
        second = model(torch.tensor([[1, 2, a] for a in range(3)])).softmax(-1)
    statistic, bound = chi_square((x[:, 2] * 3 + x[:, 3]).bincount(minlength=9), first[:, None] * second * n)
    assert statistic < bound
    empty = speed.nanogpt(model, torch.full((2, 5), 3), seeded())
    assert empty.shape == (2, 5) and empty.max() < 3

# -----------------------------------------------------------------------------
# the clock


def test_functions_take_turns(monkeypatch):
    calls = []
    rows = speed.compare('table', 'shape', {name: functools.partial(calls.append, name) for name in 'abc'}, 4)
    # the first round is not timed
    assert ''.join(calls) == 'abc' * 5 and [row['n'] for row in rows] == [4] * 3
    assert [(row['table'], row['shape']) for row in rows] == [('table', 'shape')] * 3
    assert [row['name'] for row in rows] == ['a', 'b', 'c']
    monkeypatch.setattr(speed, 'SECONDS', 0)                                   # the time is up at once
    assert [row['n'] for row in speed.compare('', '', {'a': int}, 100)] == [speed.ROUNDS]


def test_median_and_quartiles():
    assert speed.spread([5.0, 1.0, 2.0, 9.0, 3.0]) == dict(seconds=3, low=2, high=5, n=5)
    assert speed.spread([2.0]) == dict(seconds=2, low=2, high=2, n=1)
    rows = speed.with_ratios([dict(name='a', seconds=6.0), dict(name='b', seconds=2.0)], 'a')
    assert [row['ratio'] for row in rows] == [1, 3]
    assert speed.with_ratios([dict(name='b', seconds=2.0)], 'a')[0]['ratio'] is None


# -----------------------------------------------------------------------------
# the tables


def test_training_table(small, monkeypatch):
    some = {name: speed.VARIANTS[name] for name in ('ours, unmasking', speed.ALL, 'without draft head')}
    monkeypatch.setattr(speed, 'VARIANTS', some)
    rows, text = speed.training(small())
    assert [row['name'] for row in rows] == ['baseline', *some] * 2
    check_rows(rows, 'baseline', ('tokens_per_second', 'flops', 'mfu', 'costs'))
    everything = {row['shape']: row for row in rows if row['name'] == speed.ALL}
    for row in rows:
        batch = 8 if 'batch 8' in row['shape'] else 4
        assert row['tokens_per_second'] == pytest.approx(batch * 8 / row['seconds'])
        if row['name'].startswith('without'):
            assert row['costs'] == pytest.approx(1 - row['seconds'] / everything[row['shape']]['seconds'])
        else:
            assert row['costs'] is None
    assert {row['flops'] for row in rows if row['name'] == 'baseline'} < {row['flops'] for row in rows}
    assert text.count('\n') == len(rows) + 1

    compiled = []
    monkeypatch.setattr(device, 'compile_passes', compiled.append)
    rows, _ = speed.training(small('--compile=True'))
    assert [row['name'] for row in rows] == ['baseline', *some, 'ours, unmasking, compiled'] * 2
    assert rows[4]['flops'] == rows[1]['flops'] and len(compiled) == 2


def test_sampling_table(small, tmp_path, monkeypatch):
    model = tiny_gpt(V, T, n_recur=1)
    path = write_checkpoint(tmp_path / 'ckpt_joint.pt', model, META, block_size=T, causal_ratio=0.5)
    rows, text = speed.sampling(small(f'--init_from={path}'))
    names = ['nanoGPT', 'plain ancestral', 'ours, ancestral', 'ours, default (remask=causal)',
             'ours, intelligent', 'AR, cached', 'ours, AR']
    assert [row['shape'] for row in rows] == ['batch 1'] * 7 + ['batch 3'] * 7
    assert [row['name'] for row in rows] == names * 2
    check_rows(rows, 'plain ancestral', ('samples_per_second', 'tokens_per_second', 'checkpoint'))
    plain, cached, ours = rows[7], *rows[12:]
    assert plain['tokens_per_second'] == pytest.approx(3 * (T - 1) / plain['seconds'])      # it has no end
    assert 3 <= cached['tokens_per_second'] * cached['seconds'] <= 3 * (T - 1)
    assert plain['against nanoGPT'] == cached['against AR, cached'] == 1 and path in text
    assert ours['samples_per_second'] == pytest.approx(3 / ours['seconds'])
    assert ours['against nanoGPT'] == pytest.approx(ours['tokens_per_second'] / plain['tokens_per_second'])

    path = write_checkpoint(tmp_path / 'plain.pt', model, META, block_size=T, training_type='unmasking')
    rows, _ = speed.sampling(small(f'--init_from={path}'))                     # it has no causal mode
    assert {row['name'] for row in rows} == {*names[:3], 'ours, default (remask=none)'}
    monkeypatch.setattr(speed, 'MOST_LOGITS', 2 * T * V)  # all logits of two samples: no more at a time
    assert {row['shape'] for row in speed.sampling(small(f'--init_from={path}'))[0]} == {'batch 1', 'batch 2'}
    with pytest.raises(UserError, match='nowhere.pt'):
        speed.sampling(small('--init_from=nowhere.pt'))


def test_sampling_table_of_text(small, tmp_path, monkeypatch):
    """Also in windows, and in blocks; who is too slow is left out of the next batch of that length."""
    meta = dict(META, format='stream', bos=None, eos=None, pad=None)
    path = write_checkpoint(tmp_path / 'text.pt', tiny_gpt(V, T, n_recur=1), meta, causal_ratio=0.5,
                            training_type='joint', block_size=T, block_lengths=(4, 16))
    rows, text = speed.sampling(small(f'--init_from={path}'))
    long = [row for row in rows if row['shape'] == 'batch 2, 30 tokens']
    assert [row['name'] for row in long] == ['nanoGPT', 'ours, default (remask=causal)', 'ours, intelligent',
                                             'ours, intelligent in blocks of 16', 'AR, cached']
    check_rows(long, '')
    for row in rows:                                                           # nobody ends early
        tokens = {'batch 1': T, 'batch 3': 3 * T}.get(row['shape'], 60)
        assert row['tokens_per_second'] * row['seconds'] == pytest.approx(tokens)
    assert text.count('\n') == len(rows) + 2
    monkeypatch.setattr(speed, 'PATIENCE', 0)
    assert {row['shape'] for row in speed.sampling(small(f'--init_from={path}'))[0]} == {
        'batch 1', 'batch 2, 30 tokens'}


def test_without_a_checkpoint_a_fresh_network_is_sampled(small, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, 'load_data', lambda name: (ARITHMETIC, None))
    model, meta, config, what = speed.sampling_network(small(f'--out_dir={tmp_path}'))
    assert meta is ARITHMETIC and 'fresh' in what
    assert model.config.draft_head and model.config.vocab_size == 18
    assert config == speed.recipe() and not model.training


def test_tables_that_are_asked_for(small, monkeypatch):
    tables = {name: lambda s, name=name: ([dict(table=name)], f'text of {name}') for name in speed.TABLES}
    monkeypatch.setattr(speed, 'TABLES', tables)
    rows, text = speed.run(small('--only=peak,sampling'))
    assert [row['table'] for row in rows] == ['sampling', 'peak'] and 'text of peak' in text
    assert len(speed.run(small())[0]) == 3
    with pytest.raises(UserError, match="contains 'speling'"):
        speed.run(small('--only=speling'))


def test_peak_through_bench(small, run, tmp_path):
    words = ('--suite=speed', '--only=peak', '--steps=2', '--device=cpu')
    status, out, err = run('bench', *words, f'--json={tmp_path}/peak.json')
    assert status == 0, err
    rows = json.loads((tmp_path / 'peak.json').read_text())['rows']
    assert [row['table'] for row in rows] == ['peak'] * 2 and 'peak TFLOP/s' in out
    assert all(1e6 < row['flops_per_second'] < 1e16 for row in rows)


def test_peak_counts_a_product(small, monkeypatch):
    """(64, 16) x (16, 64) is 2 * 64 * 16 * 64 FLOPs; by a clock that ticks a look four take a second."""
    clock = itertools.count()
    monkeypatch.setattr(speed.time, 'perf_counter', lambda: next(clock))
    flops, dtype = speed.peak_flops(small(), SHAPE, least=3)
    assert flops == 4 * 2 * 64 * 16 * 64 and dtype == 'float32'
