"""Checkpoints: what is saved and found again, what older ones become, and what a damaged one says."""

import contextlib
import functools
import io
import os
import pickle
import random
import resource
import shlex
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ARITHMETIC, default_config, run_main, seeded, tiny_gpt, write_checkpoint
from test_train import assert_same, newest, start

from configurator import UserError
from model import GPT
from parts.presets import best_rules, supports
from parts.speculate import next_state
from plumbing import oldnames
from plumbing.checkpoint import (
    check_same_model,
    find_checkpoint,
    identity,
    load_merged,
    model_args,
    read_checkpoint,
    save_checkpoint,
)
from plumbing.files import write_atomically

# a run of all tasks, as small as can be
SMALL = '--training_type=joint', '--causal_ratio=0.5', '--draft_head=True', '--eval_samples=0'


def checkpoint_of(network, **changes):
    meta = dict(
        name='x',
        format='stream',
        block_size=None,
        vocab_size=network.config.vocab_size,
        tokenizer='char',
        itos=[*map(chr, range(97, 97 + network.config.vocab_size))],
        bos=None,
        eos=None,
        pad=None,
    )
    return dict(
        dict(
            model=network.state_dict(),
            ema=None,
            iter_num=3,
            model_args=model_args(network.config),
            config=default_config(),
            meta=meta,
        ),
        **changes,
    )


# -----------------------------------------------------------------------------
# what is saved and loaded


def test_checkpoint_round_trip(tmp_path):
    path, x = str(tmp_path / 'ckpt.pt'), torch.randint(3, (2, 4), generator=seeded())
    model, ema = tiny_gpt(seed=1), tiny_gpt(seed=2)
    model.mask_logit_bias.fill_(-1.5)
    save_checkpoint(path, checkpoint_of(model, ema=ema.state_dict()))
    assert os.listdir(tmp_path) == ['ckpt.pt']
    loaded, checkpoint = GPT.load(path, ema=False)
    assert not loaded.training and checkpoint['iter_num'] == 3 and loaded.config == model.config
    assert torch.equal(loaded.logits(loaded(x)), model.logits(model(x)))  # the controller's bias included
    averaged, _ = GPT.load(path)
    assert torch.equal(averaged(x), ema(x)) and not torch.equal(averaged(x), model(x))
    save_checkpoint(path, checkpoint_of(model))  # one without averaged weights
    assert torch.equal(GPT.load(path)[0](x), model(x))


@torch.no_grad()
def test_a_checkpoint_with_a_draft_head(tmp_path):
    path, model = str(tmp_path / 'ckpt.pt'), tiny_gpt(draft_head=True)
    save_checkpoint(path, checkpoint_of(model))
    loaded, checkpoint = GPT.load(path)
    assert checkpoint['model_args']['draft_head'] is True and loaded.num_params() == model.num_params()
    state, ids = torch.randn(4, 16, generator=seeded()), torch.tensor([0, 2, 1, 1])
    assert torch.equal(next_state(loaded, state, ids), next_state(model, state, ids))
    for weights, args in ((tiny_gpt(), model), (model, tiny_gpt())):
        torch.save(checkpoint_of(weights, model_args=model_args(args.config)), path)
        with pytest.raises(UserError, match="tensor 'drafter.fc.weight'"):
            GPT.load(path)


def test_identity_is_the_network_and_its_vocabulary():
    checkpoint = dict(model_args=model_args(tiny_gpt().config), meta=dict(itos=['a', 'b', 'c'], name='x'))
    assert identity(checkpoint) == {**checkpoint['model_args'], 'itos': ['a', 'b', 'c']}
    other = identity(dict(checkpoint, meta=dict(itos=['a', 'c', 'b'])))
    with pytest.raises(UserError, match='a.pt and b.pt do not fit together: itos is'):
        check_same_model('a.pt', identity(checkpoint), 'b.pt', other)


def test_check_same_model():
    a = dict(vocab_size=5, block_size=8, dropout=0.0)
    check_same_model('a.pt', a, 'b.pt', dict(a))
    check_same_model('a.pt', a, 'b.pt', {**a, 'dropout': 0.1}, ('vocab_size', 'block_size'))
    with pytest.raises(UserError, match='a.pt and b.pt do not fit together: block_size is 8 and 9'):
        check_same_model('a.pt', a, 'b.pt', {**a, 'block_size': 9})


def test_find_checkpoint(tmp_path):
    """The newest of the folder itself; those below are named, and never taken."""
    said, find = [], find_checkpoint
    with pytest.raises(UserError, match=f'no checkpoint in {tmp_path}; train.*--out_dir={tmp_path}'):
        find('ckpt', str(tmp_path))
    (tmp_path / 'run').mkdir()
    below = tmp_path / 'run' / 'ckpt_joint_all_positions.pt'
    below.write_bytes(b'')
    for name in ('run/ckpt_x.pt.9.tmp', 'run/table.pt'):
        (tmp_path / name).write_bytes(b'')
    with pytest.raises(UserError, match=f'no checkpoint in {tmp_path} itself; .*--init_from: {below}$'):
        find('ckpt', str(tmp_path))
    for name, age in (('ckpt_unmasking.pt', 300), ('ckpt_causal.pt', 200)):
        (tmp_path / name).write_bytes(b'')
        os.utime(tmp_path / name, (10**9 - age,) * 2)
    for name, out_dir in (('ckpt', tmp_path), ('ckpt', f'{tmp_path}/'), (str(tmp_path), 'out')):
        assert os.path.samefile(find(name, str(out_dir), said.append), tmp_path / 'ckpt_causal.pt')
        assert said.pop().endswith(f'below it there are others: {below}')
    os.utime(tmp_path / 'ckpt_unmasking.pt', (10**9,) * 2)  # it is the age that counts, not the name
    assert find('ckpt', str(tmp_path)) == str(tmp_path / 'ckpt_unmasking.pt')
    assert find('ckpt', str(tmp_path / 'run'), said.append) == str(below) and said == []
    assert find('other.pt', str(tmp_path)) == 'other.pt'


# -----------------------------------------------------------------------------
# saving, interrupted


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
    for nowhere in (tmp_path / 'no' / 'b.jsonl', tmp_path):
        with pytest.raises(UserError, match='cannot be written'):
            write_atomically(str(nowhere), 'x')
    assert os.listdir(tmp_path) == ['a.jsonl']


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
        expected = KeyboardInterrupt if error is KeyboardInterrupt else UserError
        with pytest.raises(expected, match='interrupted'):
            save_checkpoint(path, checkpoint_of(tiny_gpt(seed=2)))
    assert os.listdir(tmp_path) == ['ckpt.pt'] and open(path, 'rb').read() == before


def test_save_makes_the_file_durable_before_it_takes_the_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(fd):
        calls.append(('fsync', os.fstat(fd).st_size))
        fsync(fd)

    def watched_replace(a, b):
        calls.append(('replace', os.path.getsize(a)))
        replace(a, b)

    monkeypatch.setattr(os, 'fsync', watched_fsync)
    monkeypatch.setattr(os, 'replace', watched_replace)
    save_checkpoint(str(tmp_path / 'ckpt.pt'), checkpoint_of(tiny_gpt()))
    size = os.path.getsize(tmp_path / 'ckpt.pt')
    assert calls == [('fsync', size), ('replace', size)]


# -----------------------------------------------------------------------------
# files that are no checkpoints


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
        GPT.load(str(path))
    assert not marker.exists() and '\n' not in str(error.value)
    pickle.loads(pickle.dumps(Evil(str(marker))))  # it would have
    assert marker.exists()


def test_damaged_files(tmp_path):
    path = tmp_path / 'ckpt.pt'
    for nothing in (path, tmp_path):  # the second one is a folder
        with pytest.raises(UserError, match='no such checkpoint'):
            GPT.load(str(nothing))
    save_checkpoint(str(path), checkpoint_of(tiny_gpt()))
    whole = path.read_bytes()
    halves = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for junk in (*halves, b'hello, world\n', b'\x80\x02', b'\x00' * 1000, bytes(range(256)) * 20):
        path.write_bytes(junk)
        with pytest.raises(UserError, match='ckpt.pt: (truncated or damaged|refused)') as error:
            GPT.load(str(path))
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('error', [IndexError, TypeError, AttributeError])
def test_other_errors_of_a_damaged_file(tmp_path, monkeypatch, error):
    def load(*args, **more):
        raise error('pop from empty list')

    save_checkpoint(str(tmp_path / 'ckpt.pt'), checkpoint_of(tiny_gpt()))
    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises(UserError, match='ckpt.pt: truncated or damaged'):
        GPT.load(str(tmp_path / 'ckpt.pt'))


@pytest.mark.parametrize('content', [[1, 2], {'model': {}}, {'a': torch.zeros(2)}, 3, None])
def test_not_a_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='ckpt.pt: not a checkpoint of train.py'):
        GPT.load(str(tmp_path / 'ckpt.pt'))


def test_checkpoints_that_do_not_fit(tmp_path):
    path, model = str(tmp_path / 'ckpt.pt'), tiny_gpt()
    weights, args = model.state_dict(), model_args(model.config)
    bad, meta = {name: tensor.clone() for name, tensor in weights.items()}, checkpoint_of(model)['meta']
    bad['blocks.0.fc.weight'][3, 2] = float('nan')
    fewer = {name: tensor for name, tensor in weights.items() if name != 'causal_embd'}
    for changes, message in (
        (dict(model=bad), "'blocks.0.fc.weight' holds NaN"),
        (dict(ema=bad), "'blocks.0.fc.weight' holds NaN"),
        (dict(model_args={**args, 'n_kv_head': 2}), "field 'n_kv_head'"),
        (dict(model_args={**args, 'n_embd': 32}), r"has shape \(\d+.*the network needs \(\d+"),
        (dict(model_args={**args, 'parts': 'level:x'}), 'its model_args make no network: parts knows'),
        (dict(model_args={**args, 'parts': 3}), 'parts is 3, not'),
        (dict(model={**weights, 'head.weight': torch.zeros(1)}), "tensor 'head.weight'"),
        (dict(model=fewer), "tensor 'causal_embd'"),
        (dict(meta=dict(meta, name='..')), "damaged: name='..' makes no sense"),
        (dict(meta=dict(meta, dataset='/etc')), "damaged: dataset='/etc' makes no sense"),
        (dict(meta=dict(meta, itos=['a'] * meta['vocab_size'])), 'damaged: itos='),
        (dict(meta=dict(meta, vocab_size=1, itos=['a'])), 'its vocabulary has 1'),
    ):
        torch.save(checkpoint_of(model, **changes), path)
        with pytest.raises(UserError, match=message) as error:
            GPT.load(path)
        assert str(error.value).startswith(path) and '\n' not in str(error.value)


# -----------------------------------------------------------------------------
# what is changed a little


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """(a folder, the bytes of the checkpoint of a run in it, the same as a dict)."""
    folder = str(tmp_path_factory.mktemp('run'))
    with contextlib.redirect_stdout(io.StringIO()):
        start(folder, *SMALL, '--max_iters=1')
    data = Path(newest(folder)).read_bytes()
    return folder, data, torch.load(io.BytesIO(data), weights_only=True)


def test_a_flipped_bit_is_seen(whole, tmp_path):
    """Wherever it is: the file is refused, or it holds the very same."""
    _, data, content = whole
    path, rng, refused = tmp_path / 'ckpt.pt', random.Random(0), 0
    (tmp_path / "ckpt_a 'b'_best.pt").write_bytes(data)
    for _ in range(50):
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        try:
            now = read_checkpoint(str(path))
        except UserError as error:
            refused += 1
            assert 'ckpt.pt: truncated or damaged' in str(error) and '\n' not in str(error)
            assert f"take --init_from={shlex.quote(str(tmp_path))[:-1]}" in str(error).replace("'", '')
        else:
            assert_same(now, read_checkpoint(str(tmp_path / "ckpt_a 'b'_best.pt")))
    assert refused >= 40


def test_a_compressed_checkpoint(whole, tmp_path):
    """A small file may become a large one: what torch.save writes does not."""
    path = tmp_path / 'ckpt.pt'
    old = zipfile.ZipFile(io.BytesIO(whole[1]))
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr('archive/data/more', bytes(10**6))
    with pytest.raises(UserError, match='truncated or damaged .it holds more than its size'):
        GPT.load(str(path))


@pytest.mark.parametrize('call, said', [(Evil('x'), f'{open.__module__}.open'), (slice(1), 'slice')])
def test_what_is_refused_is_named(tmp_path, call, said):
    """Nobody is told to load it all the same."""
    torch.save(checkpoint_of(tiny_gpt(), config=call), tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=f'refused, .*numbers and text, it would call {said}') as error:
        GPT.load(str(tmp_path / 'ckpt.pt'))
    assert 'weights_only' not in str(error.value)


@pytest.mark.parametrize('field', ['n_layer', 'n_recur', 'block_size', 'n_embd', 'vocab_size', 'energy_head'])
@pytest.mark.parametrize('size', [10**5, 10**9, 10**18])
def test_sizes_that_would_eat_the_machine(tmp_path, field, size):
    path, model = str(tmp_path / 'ckpt.pt'), tiny_gpt(18, 64)
    changes = dict(model_args={**model_args(model.config), field: size}, meta=dict(ARITHMETIC))
    if field == 'vocab_size':
        changes['meta'].update(vocab_size=size, itos=None, tokenizer='gpt2')
    if field == 'n_embd':
        changes['model_args']['n_embd'] -= size % 4
    save_checkpoint(path, checkpoint_of(model, **changes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    long = (field, size) == ('block_size', 10**5)  # that is possible
    with contextlib.nullcontext() if long else pytest.raises(UserError, match=f'^{path}: '):
        GPT.load(path)
    assert time.perf_counter() - began < 20                        # busy machines are slow
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def places_in(content, above=()):
    """The path of every value in dicts and lists, but for tuples, which nothing is put into."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in pairs:
        yield (*above, key)
        if isinstance(value, (dict, list)):
            yield from places_in(value, (*above, key))


def copied(content):
    """The dicts and lists anew, with the same tensors in them."""
    if isinstance(content, dict):
        return {key: copied(value) for key, value in content.items()}
    return [copied(value) for value in content] if isinstance(content, list) else content


SIZED = torch.zeros(1).expand(10**12), torch.zeros(4).to_sparse(), torch.zeros(2, device='meta')
ODD = (None, True, 'x', '', '../x', -1, 0, 7, 10**9, 10**30, 3.5, float('nan'), [], {}, (), b'x', {1: 2})
TENSORS = torch.zeros(2), torch.zeros(0), torch.tensor(3), torch.zeros(2, dtype=torch.complex64), *SIZED


def test_a_changed_field_is_refused_or_does_no_harm(whole):
    """A value, anywhere, is another one or is gone: sampling and going on work, or say so in a line."""
    folder, _, content = whole
    path, rng, outcomes = newest(folder), random.Random(1), []
    places = list(places_in(content))
    for _ in range(40):
        top = rng.choice(sorted(content))
        changed, place = copied(content), rng.choice([place for place in places if place[0] == top])
        inside = functools.reduce(lambda part, key: part[key], place[:-1], changed)
        if rng.random() < 0.2:
            del inside[place[-1]]
        else:
            inside[place[-1]] = rng.choice(ODD + TENSORS)
        torch.save(changed, path)
        for action in (
            lambda: run_main('sample', f'--init_from={path}', '--num_samples=1', '--remask=wrong',
                             '--steps=1', '--score'),
            lambda: start(folder, *SMALL, '--init_from=resume', '--max_iters=2'),
        ):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    action()
                outcomes.append('fine')
            except UserError as error:
                outcomes.append('refused')
                assert 'weights_only' not in str(error), place
            except Exception as error:
                raise AssertionError(f'{place} is {inside}') from error
    assert min(map(outcomes.count, ('fine', 'refused'))) > 10


# -----------------------------------------------------------------------------
# checkpoints of earlier versions


def test_a_checkpoint_from_before_a_field_was_there(tmp_path):
    """
    What it does not know has its default, so that older checkpoints go on working; tensors must fit all the
    same.
    """
    path, model = str(tmp_path / 'ckpt.pt'), tiny_gpt()
    new = ('draft_head', 'energy_head', 'parts')
    old = {name: value for name, value in model_args(model.config).items() if name not in new}
    torch.save(checkpoint_of(model, model_args=old), path)
    loaded, checkpoint = GPT.load(path)
    assert loaded.config == model.config and checkpoint['model_args'] == model_args(model.config)
    assert all(not checkpoint['model_args'][name] for name in new)
    torch.save(checkpoint_of(tiny_gpt(parts='previous'), model_args=old), path)
    with pytest.raises(UserError, match="tensor 'parts.previous.proj.weight'"):
        GPT.load(path)


# what an earlier version called the parts: their fields, and their tensors by the names of today
OLD = {
    'short_conv:2': (dict(short_conv=2), {'blocks.0.parts.short_conv.weight': 'blocks.0.conv.weight'}),
    'shortcuts': (dict(shortcuts=True), {'blocks.0.parts.shortcuts.weight': 'blocks.0.shortcuts'}),
    'graph:1:2': (
        dict(graph_window=1, graph_topk=2),
        {'blocks.0.parts.graph.off_graph_penalty': 'blocks.0.aloof'},
    ),
    'graph:1:0': (
        dict(graph_window=1, graph_topk=0),
        {'blocks.0.parts.graph.off_graph_penalty': 'blocks.0.aloof'},
    ),
    'mu:4': (
        dict(mu_blocks=4),
        {'parts.mu.qkv.weight': 'mixer.qkv.weight', 'parts.mu.proj.weight': 'mixer.proj.weight'},
    ),
    'bigrams:9': (
        dict(bigram_rows=9),
        {
            'parts.bigrams.left.weight': 'bigrams.left.weight',
            'parts.bigrams.around.weight': 'bigrams.around.weight',
        },
    ),
    'previous': (dict(self_condition=True), {'parts.previous.proj.weight': 'previous.weight'}),
    'level': (dict(noise_condition=True), {'parts.level.mlp.0.weight': 'level.weight'}),
    'level:8': (
        dict(time_dim=8),
        {'parts.level.mlp.0.weight': 'level.0.weight', 'parts.level.mlp.2.weight': 'level.2.weight'},
    ),
    '': ({}, {}),
}
NOTHING = {
    **dict.fromkeys(oldnames.PARTS, 0),
    'graph_topk': 4,
    'shortcuts': False,
    'self_condition': False,
    'noise_condition': False,
}


@torch.no_grad()
@pytest.mark.parametrize('parts', [*OLD, 'graph:1:2,shortcuts,short_conv:2,previous,mu:4,bigrams:9,level:8'])
def test_a_checkpoint_with_the_fields_and_tensors_of_an_earlier_version(tmp_path, parts):
    """
    It loads as the network it was, averaged weights included, and its settings say the same by one name.
    """
    path, model, ema = str(tmp_path / 'ckpt.pt'), tiny_gpt(parts=parts), tiny_gpt(parts=parts, seed=1)
    fields, names = dict(NOTHING), {}
    for part in parts.split(','):
        fields.update(OLD[part][0])
        names.update(OLD[part][1])

    def before(settings):
        return {**{name: value for name, value in settings.items() if name != 'parts'}, **fields}

    def renamed(network):
        weights = {names.get(name, name): tensor for name, tensor in network.state_dict().items()}
        assert not any('parts.' in name for name in weights)
        return weights

    torch.save(
        checkpoint_of(
            model,
            model=renamed(model),
            ema=renamed(ema),
            config=before(default_config()),
            model_args=before(model_args(model.config)),
        ),
        path,
    )
    x = torch.randint(4, (3, 4), generator=seeded())
    for averaged, expected in ((False, model), (True, ema)):
        loaded, checkpoint = GPT.load(path, ema=averaged)
        assert loaded.state_dict().keys() == expected.state_dict().keys()
        for causal in (False, True):
            told = dict(previous=x.flip(0), level=torch.rand(3, 1, generator=seeded()))
            assert torch.equal(loaded(x, causal=causal, **told), expected(x, causal=causal, **told))
        for settings in (checkpoint['model_args'], checkpoint['config']):
            assert set(settings['parts'].split(',')) == set(parts.split(',')) and not set(NOTHING) & set(
                settings
            )


# -----------------------------------------------------------------------------
# merging


def merge(path, other, weight=0.5):
    return load_merged(GPT.load, supports, path, other, weight)


def two_checkpoints(tmp_path, first=None, second=None, **more):
    """The paths of two checkpoints with different weights, and the two networks."""
    a, b = tiny_gpt(18, 64, seed=1, n_recur=1), tiny_gpt(18, 64, seed=2, n_recur=1, **more)
    a.mask_logit_bias.fill_(1.0)
    b.mask_logit_bias.fill_(3.0)
    path = write_checkpoint(tmp_path / 'a.pt', a, **(first or {}))
    return path, write_checkpoint(tmp_path / 'b.pt', b, **(second or {})), a, b


def test_merging_interpolates_the_weights(tmp_path):
    path, other, a, b = two_checkpoints(tmp_path)
    for weight in (0.0, 0.25, 1.0):
        merged, checkpoint = merge(path, other, weight)
        assert not merged.training and checkpoint['meta'] == ARITHMETIC
        mine, theirs = a.state_dict(), b.state_dict()
        for name, now in merged.state_dict().items():
            if weight in (0, 1):
                assert torch.equal(now, theirs[name] if weight else mine[name]), name
            else:
                assert torch.allclose(now, 0.75 * mine[name] + 0.25 * theirs[name], atol=1e-6), name
        assert merged.mask_logit_bias.item() == pytest.approx(1 + 2 * weight)


def test_merging_what_does_not_fit(tmp_path):
    path, other, _, _ = two_checkpoints(tmp_path, n_embd=32)
    with pytest.raises(UserError, match=f'{path} and {other} do not fit together: n_embd is 16 and 32'):
        merge(path, other)
    words = [*'9876543210()+*=', '<bos>', '<eos>', '<pad>']
    other = write_checkpoint(tmp_path / 'b.pt', meta=dict(ARITHMETIC, itos=words))
    with pytest.raises(UserError, match='do not fit together: itos is'):
        merge(path, other)


@pytest.mark.parametrize(
    'first, second, expected',
    [
        (dict(training_type='unmasking'), dict(training_type='remasking'), (True, False, True)),
        (dict(training_type='remasking'), dict(training_type='unmasking'), (True, False, True)),
        (
            dict(training_type='unmasking', causal_ratio=0.3),
            dict(training_type='unmasking'),
            (True, True, False),
        ),
        (dict(training_type='causal'), dict(training_type='unmasking'), (True, True, False)),
        (dict(training_type='causal'), dict(training_type='causal'), (False, True, False)),
        (dict(training_type='remasking'), dict(training_type='remasking'), (False, False, True)),
        (dict(training_type='causal'), dict(training_type='denoising'), (True, True, True)),
    ],
    ids=lambda value: '-'.join(map(str, value.values())) if isinstance(value, dict) else '',
)
def test_merged_networks_support_what_either_did(tmp_path, first, second, expected):
    path, other, _, _ = two_checkpoints(tmp_path, first, second)
    _, checkpoint = merge(path, other)
    assert supports(checkpoint['config']) == expected
    if expected[0] and expected[2]:
        assert best_rules(checkpoint['config'], remask='wrong', commit='random')['remask'] == 'wrong'


def test_merged_networks_keep_what_is_known_of_the_judge(tmp_path):
    """The loss type counts of the one that judges; abstaining needs both."""
    unmasking = dict(training_type='unmasking')
    judge = dict(training_type='remasking', remasking_loss_type='corrupted_only')
    for first, second in ((unmasking, judge), (judge, unmasking)):
        path, other, _, _ = two_checkpoints(tmp_path, first, second)
        assert merge(path, other)[1]['config']['remasking_loss_type'] == 'corrupted_only'
    for a, b in ((True, True), (True, False), (False, True)):
        configs = [dict(unmasking, allow_abstain=abstains) for abstains in (a, b)]
        path, other, _, _ = two_checkpoints(tmp_path, *configs)
        assert bool(merge(path, other)[1]['config']['allow_abstain']) == (a and b)
