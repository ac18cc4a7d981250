"""
Several processes: that they train as one does, stop and go on together, and speak with one voice.

torchrun also starts this file itself, see worker: a start costs seconds, so most runs of two processes share
one.
"""

import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ARITHMETIC, ROOT, START_WORDS, default_config, tiny_gpt
from test_train import (
    MIXED,
    TINY,
    assert_close,
    assert_same,
    assert_same_run,
    gradients,
    log_of,
    read,
    seeded,
    start,
)

import corruption
import train
from configurator import UserError
from data import loader
from plumbing import distributed
from plumbing.checks import check_settings
from plumbing.log import PARTS
from train import losses, training_step

RUN = [*START_WORDS, *TINY, '--batch_size=8', '--eval_samples=0', '--log_interval=4']
JOINT = [
    *RUN, *MIXED, '--draft_head', '--parts=short_conv:2,shortcuts,bigrams:500', '--bigram_decay=0.1',
    '--proofreading_warmup_iters=0']
# Muon amplifies roundings
CAUSAL = [*RUN, '--training_type=causal', '--optimizer=adamw', '--gradient_accumulation_steps=2']
WHOLE = [*CAUSAL, '--n_layer=2', '--n_recur=2', '--grad_clip=0.1', '--keep_every=3']
# Muon; of one row with wrong tokens one rank has none
SHARDED = [*JOINT, '--fsdp', '--remask_ratio=0.2', '--corruption=own']
# training type, causal ratio and rows; of a single causal row one rank has none. In the last one blocks grow:
# at step 5 of 12, 5 of 6 rows are causal, in blocks of one token, and one rank has the only whole canvas
BATCHES = [('causal', 0.0, 6), ('unmasking', 0.5, 6), ('unmasking', 0.5, 2), ('unmasking', 0.0, 6),
           ('unmasking', 0.5, 6, dict(block_lengths=(1, 8), block_warmup_iters=12, weight_unmask_task=1.0))]


# -----------------------------------------------------------------------------
# what a rank does, and how ranks are started


def all_masked(x0, free, *rest):
    """In the place of corruption.ask: every free token is masked, so nothing is drawn."""
    return x0.masked_fill(free, 18), x0, free / free.sum(1, keepdim=True).clamp(min=1)


def step_of_a_batch(training_type, causal_ratio, rows, more=None):
    """A training step whose loss draws nothing, on this rank's part of the first rows: (gradients, parts)."""
    x0 = distributed.rows_of_rank(loader.load_data('arithmetic')[1]['train'][:rows])
    model = tiny_gpt(18, 64, n_recur=1, draft_head=True)
    config = default_config(training_type=training_type, causal_ratio=causal_ratio,
                            **(more or dict(weight_unmask_task=0.0)))
    parallel = distributed.data_parallel(model, losses)
    with pytest.MonkeyPatch.context() as patch:
        if more:
            patch.setattr(train, 'ask', all_masked)
        parts = training_step(model, x0, ARITHMETIC, config, 5, seeded(distributed.rank()), None, parallel)
    return gradients(model), distributed.sum_parts(parts, PARTS)


def train_here(out_dir, *words, stop_at=None, whom=None):
    """
    train.py as from the command line: what its batches were, [(x0, input), ...]. At the batch number stop_at
    rank 0 sends SIGTERM to the process whom, and waits until it has arrived here.
    """
    rows, ask, calls, seen = loader.random_rows, corruption.ask, [], []

    def random_rows(*args):
        calls.append(args)
        if len(calls) == stop_at and os.environ['RANK'] == '0':
            os.kill(whom, signal.SIGTERM)
            while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                time.sleep(0.01)
        return rows(*args)

    def watch(x0, *args):
        result = ask(x0, *args)
        if args[2].remask_ratio < 1:                                        # not what an evaluation asks
            seen.append((x0, result[0]))
        return result

    loader.random_rows, corruption.ask = random_rows, watch
    sys.argv = [os.path.join(ROOT, 'train.py'), *words, f'--out_dir={out_dir}']
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    finally:
        loader.random_rows, corruption.ask = rows, ask
    return seen


def worker(folder, job, *ports):
    """
    What a rank does when torchrun starts this file: several runs, one after the other, or one that is
    stopped.
    """
    rank = os.environ['RANK']
    if job == 'stopped':
        train_here(f'{folder}/torchrun', *JOINT, stop_at=3, whom=os.getppid())
        return
    whole = [step_of_a_batch(*batch) for batch in BATCHES]
    distributed.connect('cpu')
    shared, heard = [step_of_a_batch(*batch) for batch in BATCHES], ''
    try:
        with distributed.together():
            if rank == '1':
                raise UserError('said by rank 1')
    except UserError as error:
        heard = str(error)
    model = tiny_gpt(18, 64)
    distributed.shard(model, torch.device('cpu'))
    part = [
        sum(t.numel() for t in distributed.local(net.parameters())) / sum(p.numel() for p in net.parameters())
        for net in (model.blocks, model.wte)
    ]
    torch.save((whole, shared, part, heard, distributed.anywhere(rank == '1')), f'{folder}/shared.{rank}')
    distributed.disconnect()
    for port, (name, words, more) in zip(
        ports,
        (
            ('causal', CAUSAL, {}), ('straight', JOINT, {}),
            ('rank0', JOINT, dict(stop_at=2, whom=os.getpid())),
            ('rank0', [*JOINT, '--init_from=resume'], {}), ('fsdp', [*WHOLE, '--fsdp'], {}),
            ('sharded', SHARDED, {}), ('parts', SHARDED, dict(stop_at=2, whom=os.getpid())),
            ('parts', [*SHARDED, '--init_from=resume'], {})),
        strict=True,
    ):
        # every run meets at a place of its own
        os.environ.update(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE='False')
        seen = train_here(f'{folder}/{name}', *words, **more)
        torch.save(seen, f'{folder}/{name}.{rank}')


def torchrun(folder, *words):
    """Two processes: (exit status, stdout, stderr)."""
    (folder / 'matplotlib.py').write_text('raise ImportError("curves would take longer than all the rest")')
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(folder))
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *words],
        env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


def free_port():
    with socket.socket() as found:
        found.bind(('localhost', 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder for runs; the tests are skipped where processes may not talk to one another."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip('this PyTorch has no gloo')
    try:
        dist.init_process_group('gloo', store=dist.TCPStore('localhost', 0, 1, True), rank=0, world_size=1)
        dist.destroy_process_group()
    except (RuntimeError, OSError) as error:
        pytest.skip(f'processes cannot talk to one another here: {error}')
    return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def runs(folder):
    """The runs of worker: (folder, stdout)."""
    status, out, err = torchrun(folder, __file__, str(folder), 'runs', *[free_port() for _ in range(8)])
    assert status == 0, err
    return folder, out


# -----------------------------------------------------------------------------
# one process


def test_a_single_process_is_what_it_was():
    rows, parts = torch.arange(6).view(3, 2), {'unmask': torch.ones(2)}
    assert (distributed.rank(), distributed.world(), distributed.share(5), distributed.gather('a')) == (
        0, 1, 5, ['a'])
    assert distributed.rows_of_rank(rows) is rows and distributed.total(rows) is rows
    assert distributed.sum_parts(parts, PARTS) is parts and distributed.data_parallel(None, losses) is None
    assert [distributed.connect(device) for device in ('auto', 'cuda:1', 'mps')] == ['auto', 'cuda:1', 'mps']
    assert distributed.anywhere(True) and not distributed.anywhere(False)


@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_shares_are_of_the_rows_of_a_rank(monkeypatch, world):
    """
    The ranks' rows are the batch, each row once, and share counts those of its first rows that a rank has.
    """
    monkeypatch.setattr(distributed, 'several', lambda: True)
    monkeypatch.setattr(distributed, 'world', lambda: world)
    rows, found = torch.arange(12)[:, None], []
    for rank in range(world):
        monkeypatch.setattr(distributed, 'rank', lambda: rank)
        mine = distributed.rows_of_rank(rows)
        assert len(mine) == 12 // world
        for num in range(13):
            assert distributed.share(num) == (mine < num).sum()
            # they come first
            assert torch.equal(mine[:distributed.share(num)], mine[mine < num][:, None])
        found += mine[:, 0].tolist()
    assert sorted(found) == list(range(12))


# -----------------------------------------------------------------------------
# two processes


def test_the_gradients_of_a_batch(runs):
    """
    Their mean is the gradient of the whole batch, even where one rank has fewer causal rows or none; so are
    the parts.
    """
    (whole, shared, *_), (_, other, *_) = [torch.load(runs[0] / f'shared.{rank}') for rank in range(2)]
    for (training_type, ratio, _, *grows), (expected, parts), (grads, more) in zip(
        BATCHES, whole, shared, strict=True):
        # each rank picks the tokens that it learns from
        head = {name for name in grads if name.startswith('drafter.')}
        assert head == {name for name in expected if name.startswith('drafter.')}
        assert bool(head) == (training_type == 'causal' or ratio > 0)
        assert_close({name: grads[name] for name in grads if name not in head},
                     {name: expected[name] for name in expected if name not in head})
        # what nobody used stays without a gradient
        assert ('causal_embd' in grads) == bool(head)
        for name in head:
            assert grads[name].norm() / expected[name].norm() == pytest.approx(1, abs=0.2)
        for name in PARTS:
            if name != 'draft' and (grows or name != 'unmask'):
                assert torch.allclose(more[name], parts.get(name, torch.zeros(2)), rtol=1e-4), name
        assert more['draft'][1].item() == (2 if head else 0)
        if grows:
            assert [more[name][1].item() for name in ('causal', 'unmask')] == pytest.approx([5, 6])
    assert_same([grads for grads, _ in shared], [grads for grads, _ in other])


def test_what_one_rank_finds_all_of_them_hear(runs):
    for rank in range(2):
        *_, heard, asked = torch.load(runs[0] / f'shared.{rank}')
        assert heard == 'said by rank 1' and asked is True


def test_two_processes_train_as_one_does(runs, tmp_path):
    start(str(tmp_path), *CAUSAL)
    one, two = read(str(tmp_path)), read(str(runs[0] / 'causal'))
    for net in ('model', 'ema'):
        for name in one[net]:
            assert torch.allclose(one[net][name], two[net][name], rtol=1e-3, atol=2e-5), name
    for expected, line in zip(log_of(tmp_path), log_of(runs[0] / 'causal'), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)
    assert 'ranks' not in one['rng'] and len(two['rng']['ranks']) == 2


def test_a_sharded_network_trains_as_a_whole_one_does(runs, tmp_path, run):
    """Its checkpoints are those of one process: any number goes on with them, and sample.py samples."""
    start(str(tmp_path / 'one'), *WHOLE)
    os.mkdir(tmp_path / 'resumed')
    shutil.copy(runs[0] / 'fsdp' / 'ckpt_causal_3.pt', tmp_path / 'resumed' / 'ckpt_causal.pt')
    start(str(tmp_path / 'resumed'), *WHOLE, '--init_from=resume')
    one = read(str(tmp_path / 'one'))
    for other in (read(str(runs[0] / 'fsdp')), read(str(tmp_path / 'resumed'))):
        for net in ('model', 'ema'):
            for name in one[net]:
                assert torch.allclose(one[net][name], other[net][name], rtol=1e-3, atol=2e-5), name
        for i, kept in one['optimizers'][0]['state'].items():
            for name in kept:
                torch.testing.assert_close(
                    other['optimizers'][0]['state'][i][name], kept[name], rtol=1e-3, atol=1e-6)
    for expected, line in zip(log_of(tmp_path / 'one'), log_of(runs[0] / 'fsdp'), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)
    status, out, err = run(
        'sample', f"--init_from={runs[0] / 'fsdp' / 'ckpt_causal.pt'}", '--num_samples=2', '--device=cpu')
    assert status == 0 and '2 samples' in out, err


def test_a_rank_keeps_its_part_and_no_more(runs):
    for rank in range(2):
        *_, part, _, _ = torch.load(runs[0] / f'shared.{rank}')
        assert part == [0.5, 1]                                            # of the blocks, of the embedding


def test_settings_that_fsdp_does_not_go_with(monkeypatch):
    def refused(message, **changes):
        with pytest.raises(UserError, match=message):
            check_settings(default_config(fsdp=True, **changes))
    refused('start them by torchrun')
    monkeypatch.setattr(distributed, 'several', lambda: True)
    monkeypatch.setattr(distributed, 'world', lambda: 2)
    refused('there are 1 and 7 of them', batch_size=8, causal_ratio=0.125)
    refused('there are 7 and 1 of them', batch_size=8, causal_ratio=0.875)
    for changes in (
        dict(causal_ratio=0.25), dict(causal_ratio=1.0, views=1),
        dict(training_type='causal', causal_ratio=0.125)):
        check_settings(default_config(fsdp=True, batch_size=8, **changes))


def test_ranks_share_the_rows_and_draw_masks_of_their_own(runs, tmp_path):
    first, second = [torch.load(runs[0] / f'straight.{rank}') for rank in range(2)]
    batches = []

    def watch(module):
        ask = module.ask
        module.ask = lambda x0, *args: batches.append(x0) or ask(x0, *args)
    start(str(tmp_path), *JOINT, patch=watch)
    assert len(first) == len(second) == len(batches) == 6
    for (a, hidden), (b, other), whole in zip(first, second, batches):
        # 4 of 8 rows, the others are causal
        assert torch.equal(torch.stack((a, b), 1).flatten(0, 1), whole)
        assert not torch.equal(hidden == 18, other == 18)
    a, b = read(str(runs[0] / 'straight'))['rng']['ranks']
    assert torch.equal(a['rows'], b['rows'])
    assert not torch.equal(a['noise'], b['noise']) and not torch.equal(a['torch'], b['torch'])


def test_one_voice(runs):
    """One rank speaks, one log and one checkpoint are left."""
    folder, out = runs
    assert (
        out.count('cpu, 1 threads, float32, plain attention, 2 processes\n')
        == out.count(' parameters; ')
        == 8
    )
    assert (
        out.count('step 6  validation: ')
        == out.count('step 4/6 ')
        == out.count('/log.jsonl (pip install')
        == 6
    )
    assert sorted(os.listdir(folder / 'straight')) == ['ckpt_joint_all_positions.pt', 'log.jsonl']
    assert [line['step'] for line in log_of(folder / 'straight')] == [0, 3, 4, 6]


def test_rank_0_stops_all_ranks(runs):
    folder, out = runs
    assert out.count('finishing the step, then saving ...') == 2
    assert (
        'stopped; go on with: the same torchrun command and --init_from=resume' in out and ', step 2\n' in out
    )
    assert_same_run(str(folder / 'straight'), str(folder / 'rank0'))
    assert_same_run(str(folder / 'sharded'), str(folder / 'parts'))


def test_torchrun_is_stopped_and_goes_on(runs, capsys):
    """
    SIGTERM to torchrun: saved once, where it was; then to the last bit the same, but with another number of
    processes.
    """
    folder, path = runs[0], runs[0] / 'torchrun'
    status, out, err = torchrun(folder, __file__, str(folder), 'stopped')
    assert (
        status and out.count('finishing the step, then saving ...') == out.count('stopped; go on with: ') == 1
    ), err
    assert (
        sorted(os.listdir(path)) == ['ckpt_joint_all_positions.pt', 'log.jsonl']
        and read(path)['iter_num'] == 3
    )
    before = (path / 'ckpt_joint_all_positions.pt').read_bytes()
    status, out, err = torchrun(
        folder, os.path.join(ROOT, 'train.py'), *JOINT, f'--out_dir={path}', '--init_from=resume')
    assert status == 0 and 'number of processes' not in out, err
    assert_same_run(str(folder / 'straight'), str(path))
    (path / 'ckpt_joint_all_positions.pt').write_bytes(before)
    capsys.readouterr()
    start(str(path), *JOINT, '--init_from=resume')
    assert 'number of processes: 2 before, 1 now; the run goes on' in capsys.readouterr().out
    checkpoint = read(str(path))
    assert checkpoint['iter_num'] == 6 and 'ranks' not in checkpoint['rng']


def test_a_batch_that_cannot_be_shared(folder, tmp_path):
    status, out, err = torchrun(
        folder, os.path.join(ROOT, 'train.py'), *RUN, '--batch_size=7', f'--out_dir={tmp_path}/out')
    assert status == 1 and 'step 0' not in out and os.listdir(tmp_path) == []
    assert re.findall('^train.py: .*', err, re.M) == [
        'train.py: batch_size=7 rows cannot be shared equally by 2 processes: '
        'set --batch_size to a multiple of 2'
    ]


if __name__ == '__main__':
    # train.py is not the last thing that this does
    leave, distributed.leave = distributed.leave, lambda: None
    worker(*sys.argv[1:])
    leave()
