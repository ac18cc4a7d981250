"""
Trust: a run survives kills, full disks and a second run in its folder; whatever is wrong with an input is
said in one line.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch
from conftest import ARITHMETIC, ROOT, default_config, tiny_gpt, write_checkpoint
from test_train import PLAIN, assert_same, newest, read, start

import configurator
import train
from configurator import UserError
from data.loader import load_data
from model import GPT
from plumbing import checkpoint as files
from plumbing import text as canvas
from plumbing.checkpoint import save_checkpoint
from plumbing.files import append_line, held
from suites import faults

pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, assume, configuration, given, settings  # noqa: E402
from hypothesis import strategies as st

# it would write here
configuration.set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), 'hypothesis'))

# -----------------------------------------------------------------------------
# kills


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    rows, runs = faults.survive(SimpleNamespace(out_dir=str(tmp_path), num_samples=5, seed=1),
                                ['--max_iters=120'])
    assert [row['disturbances'] for row in rows] == [2, 2, 1] and rows[1]['inside'] == 2
    assert all(row['corrupt'] == row['lost'] == 0 for row in rows)
    assert runs['finished'] == runs['identical'] >= 1 and runs['left_behind'] == 0


def test_the_suite_sees_what_is_lost_and_corrupt(tmp_path):
    path, found = write_checkpoint(tmp_path / 'ckpt_joint_all_positions.pt'), {'corrupt': 0}
    assert faults.last_step(str(tmp_path), found) == 7 and not found['corrupt']
    (tmp_path / 'ckpt_joint_all_positions_5.pt').write_bytes(open(path, 'rb').read()[:3000])
    assert faults.last_step(str(tmp_path), found) == 7 and found['corrupt'] == 1
    a = dict(x=[torch.tensor([1.0, 2.0])], y=None)
    assert faults.same(a, copy.deepcopy(a))
    assert not any(faults.same(a, b) for b in (dict(x=[torch.tensor([1.0, 2.1])], y=None), dict(x=[], y=None),
                                               dict(a, z=1)))


# -----------------------------------------------------------------------------
# one run a folder


@contextlib.contextmanager
def another_run(folder):
    """Another process that trains into the folder."""
    words = ('import sys, time; from plumbing.files import lock; lock(sys.argv[1]); '
             'print("locked", flush=True); time.sleep(99)')
    process = subprocess.Popen([sys.executable, '-c', words, str(folder)], cwd=ROOT, stdout=subprocess.PIPE,
                               text=True)
    assert process.stdout.readline() == 'locked\n'
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    before = sorted((name, (tmp_path / name).read_bytes()) for name in os.listdir(tmp_path))
    with another_run(tmp_path):
        for words in ([], ['--overwrite'], ['--init_from=resume', '--max_iters=9']):
            with pytest.raises(UserError, match=f'{tmp_path} is in use: another process trains into it'):
                start(str(tmp_path), *PLAIN, *words)
            assert sorted((name, (tmp_path / name).read_bytes()) for name in os.listdir(tmp_path)) == before
        start(str(tmp_path), *PLAIN, '--init_from=resume', '--eval_only')  # looking is allowed
    start(str(tmp_path), *PLAIN, '--init_from=resume', '--max_iters=3')  # the other one was killed


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    torn = [tmp_path / name for name in ('ckpt_unmasking.pt.17.tmp', 'ckpt_unmasking_4.pt.17.tmp',
                                         'log.jsonl.17.tmp')]
    other = tmp_path / 'table.json.1.tmp'
    for path in (*torn, other):
        path.write_text('half')
    with another_run(tmp_path), pytest.raises(UserError, match='in use'):
        start(str(tmp_path), *PLAIN)
    assert all(path.exists() for path in torn)
    start(str(tmp_path), *PLAIN, '--max_iters=1')
    assert not any(path.exists() for path in torn) and other.exists()


def test_the_lock_goes_when_a_run_fails(tmp_path):
    def fail(module):
        def random_rows(*args):
            assert str(tmp_path) in held
            raise RuntimeError('broken')

        module.random_rows = random_rows

    with pytest.raises(RuntimeError, match='broken'):
        start(str(tmp_path), *PLAIN, patch=fail)
    assert os.listdir(tmp_path) == ['log.jsonl'] and str(tmp_path) not in held


def test_what_a_new_run_writes_over(tmp_path, capsys, monkeypatch):
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    path = newest(str(tmp_path))
    before = open(path, 'rb').read()

    def refuses(message, *words):
        with monkeypatch.context() as m, pytest.raises(UserError, match=message):
            m.setattr(load_data, '__code__', (lambda dataset: 1 / 0).__code__)  # before data is touched
            start(str(tmp_path), *PLAIN, *words)
        assert open(path, 'rb').read() == before

    refuses(
        f'{path} is of another run, with n_embd=16 where this one has 32: '
        '.*--init_from=resume.*--out_dir.*--overwrite=True',
        '--n_embd=32',
    )
    refuses("with dataset='arithmetic' where this one has 'other'", '--dataset=other')
    refuses("with coarse='' where", '--coarse=0123')
    refuses('with n_embd=16 where', '--n_embd=32', f'--init_from={path}')
    capsys.readouterr()
    start(str(tmp_path), *PLAIN, '--max_iters=1')
    assert f'{path} will be written over: it is of the same network and dataset\n' in capsys.readouterr().out
    start(str(tmp_path), *PLAIN, '--max_iters=1', '--n_embd=32', '--overwrite')
    assert (read(str(tmp_path))['model_args']['n_embd'] == 32
            and f'{path} will be written over\n' in capsys.readouterr().out)
    start(str(tmp_path / 'new'), *PLAIN, '--max_iters=1')
    assert 'written over' not in capsys.readouterr().out
    (tmp_path / 'ckpt_unmasking.pt').write_bytes(before[:999])
    with pytest.raises(UserError, match='cannot read; .*--overwrite=True.*truncated or damaged'):
        start(str(tmp_path), *PLAIN)


# -----------------------------------------------------------------------------
# full disks


@pytest.fixture
def full_disk():
    """A file cannot grow beyond 20,000 bytes: what a full disk does, for writes of every kind."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_on_a_full_disk(tmp_path, full_disk):
    path = str(tmp_path / 'ckpt.pt')
    save_checkpoint(path, dict(small=torch.zeros(10)))
    before = open(path, 'rb').read()
    with pytest.raises(UserError, match='ckpt.pt: cannot be written: .*disk full'):
        save_checkpoint(path, dict(large=torch.zeros(10000)))
    if files_there():
        with pytest.raises(UserError, match='w.safetensors: cannot be written'):
            files.export_safetensors(str(tmp_path / 'w.safetensors'), tiny_gpt(n_embd=64),
                                     load_of(tiny_gpt(n_embd=64)))
    assert open(path, 'rb').read() == before and os.listdir(tmp_path) == ['ckpt.pt']


def test_a_log_on_a_full_disk_has_whole_lines(tmp_path, full_disk):
    path = tmp_path / 'log.jsonl'
    append_line(str(path), json.dumps({'step': 1}))
    with pytest.raises(UserError, match='log.jsonl: cannot be written: File too large'):
        append_line(str(path), 'x' * 30000)
    assert path.read_text() == '{"step": 1}\n'
    append_line(str(path), json.dumps({'step': 2}))
    assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [1, 2]


# -----------------------------------------------------------------------------
# safetensors


def files_there():
    try:
        return files.import_safetensors()
    except UserError:
        return None


def load_of(model, **more):
    """A checkpoint of the network in arithmetic, as a dict."""
    return dict(dict(model=model.state_dict(), ema=None, iter_num=7,
                     model_args=files.model_args(model.config), config=default_config(), meta=ARITHMETIC),
                **more)


def test_export(tmp_path, run):
    """The averaged weights, and all that sampling and a new run need; the same texts come out."""
    pytest.importorskip('safetensors')
    start(str(tmp_path), '--training_type=joint', '--causal_ratio=0.5', '--max_iters=2', '--eval_samples=0')
    path, out = newest(str(tmp_path)), str(tmp_path / 'w.safetensors')
    status, said, err = run('sample', f'--init_from={path}', f'--export={out}', '--device=cpu')
    assert status == 0 and f'written to {out}' in said, err
    model, old = GPT.load(path)
    other, new = GPT.load(out)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert all(new[key] == old[key] for key in ('model_args', 'config', 'meta', 'iter_num'))
    words = ['--num_samples=3', '--remask=wrong', '--steps=4', '--device=cpu', '--dtype=float32']
    texts = []
    for name in (path, out):
        assert run('sample', f'--init_from={name}', f'--save={tmp_path}/s.jsonl', *words)[0] == 0
        texts.append((tmp_path / 's.jsonl').read_text())
    assert texts[0] == texts[1]
    start(str(tmp_path / 'b'), '--training_type=unmasking', f'--init_from={out}', '--learning_rate=0',
          '--muon_lr=0', '--max_iters=1', '--eval_samples=0')
    assert_same(dict(read(str(tmp_path / 'b'))['model']), dict(model.state_dict()))


def test_export_refuses(tmp_path, run, monkeypatch):
    pytest.importorskip('safetensors')
    path = write_checkpoint(tmp_path / 'ckpt_unmasking.pt')
    for words, message in (('w.pt', "export expects the name of a .safetensors file, got 'w.pt'"),
                           ('no/w.safetensors', 'no folder')):
        status, _, err = run('sample', f'--init_from={path}', f'--export={words}')
        assert status == 1 and message in err
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    for words in (f'--export={tmp_path}/w.safetensors',
                  f'--init_from={write_checkpoint(tmp_path / "x.safetensors")}'):
        status, _, err = run('sample', f'--init_from={path}', words)
        assert status == 1 and 'pip install safetensors' in err and len(err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ['ckpt_unmasking.pt', 'x.safetensors']


# -----------------------------------------------------------------------------
# whatever is wrong is said in one line. The cases are drawn, the same ones every time


def cases(num):
    return settings(max_examples=num, derandomize=True, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))


def refused(action, *culprits, may_pass=False):
    """action() raises UserError and nothing else, whose one line names the culprits. may_pass: or passes."""
    try:
        action()
    except UserError as error:
        said = ' '.join(str(error).splitlines())  # as configurator.run prints it
        assert said.strip() and all(str(culprit) in said for culprit in culprits), said
        return
    assert may_pass, f'it went through: {culprits}'


TRAIN = os.path.join(ROOT, 'train.py')
KNOWN = configurator.settings(TRAIN)
names = st.text('abcdefghijklmnopqrstuvwxyz_', min_size=1, max_size=12)
junk = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=8)
NUMBERS = sorted(name for name, setting in KNOWN.items() if setting.type in (int, float))
BOOLS = sorted(name for name, setting in KNOWN.items() if setting.type is bool)


def configure(words, monkeypatch=None):
    scope = dict(__file__=TRAIN)
    configurator.configure(scope, words)
    return scope


@pytest.fixture(autouse=True, scope='module')
def settings_are_read_once():
    before = configurator.settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configurator, 'settings', lambda path: KNOWN if path == TRAIN else before(path))
        yield


@cases(75)
@given(names, junk)
def test_unknown_settings(name, value):
    assume(name not in (*KNOWN, 'h', 'help'))
    refused(lambda: configure([f'--{name}={value}']), f'unknown key --{name}')


@cases(100)
@given(st.sampled_from(NUMBERS), junk)
def test_settings_that_are_no_number(name, value):
    try:
        assume(isinstance(eval(value, {'__builtins__': {}}), str))  # a number after all, or a word like None
    except (Exception, SystemExit):
        pass
    assume(value not in ('None',) and not value.isdecimal())
    refused(lambda: configure([f'--{name}={value}']), name)


@cases(30)
@given(st.sampled_from(NUMBERS + BOOLS),
       st.sampled_from(['nan', 'inf', '-inf', '1e999', '[1,', '(', "'", '1,2', '{}', '0x', '--', '']))
def test_settings_of_the_wrong_kind(name, value):
    refused(lambda: configure([f'--{name}={value}']), name)


def each(names, strategy):
    return dict.fromkeys(names.split(), strategy)


RANGES = {
    **each('batch_size block_size max_iters eval_interval eval_rows log_interval max_bad_steps '
           'gradient_accumulation_steps', st.integers(max_value=0)),
    **each('causal_ratio remask_ratio reward_correct_unmask decay_share ema_decay sigma_min sigma_max '
           'target_mask_prob prefix_ratio', st.floats(max_value=-1e-6, allow_infinity=False)
           | st.floats(min_value=1.000001, allow_infinity=False)),
    **each('learning_rate muon_lr weight_decay bigram_decay grad_clip',
           st.floats(max_value=-1e-9, allow_infinity=False)),
    **each('warmup_iters eval_samples keep_every seed views', st.integers(max_value=-1)),
    **each('training_type remasking_loss_type remask_target optimizer lr_schedule corruption noise_mix',
           junk)}


@cases(75)
@given(st.sampled_from(sorted(RANGES)).flatmap(lambda name: st.tuples(st.just(name), RANGES[name])))
def test_settings_out_of_range(pair):
    refused(lambda: train.check_settings(default_config(**dict([pair]))), pair[0])


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('faults')


CONFIG = open(os.path.join(ROOT, 'config', 'remask_all.py'), encoding='utf-8').read()


@cases(40)
@given(st.integers(0, len(CONFIG)), st.text(st.characters(max_codepoint=0x2FF, exclude_characters='\0'),
                                            max_size=6))
def test_torn_config_files(place, cut, tail):
    path = place / 'torn.py'
    path.write_text(CONFIG[:cut] + tail, encoding='utf-8')
    refused(lambda: configure([str(path)]), path, may_pass=True)  # a whole statement more or less is no error


# -----------------------------------------------------------------------------
# checkpoints

SMALL = load_of(tiny_gpt(18, 8, n_recur=1))
LAYERS = sorted(SMALL['model'])


def as_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


WHOLE = as_bytes(SMALL)


def try_to_load(place, data, *culprits, name='ckpt.pt', may_pass=False):
    path = place / name
    path.write_bytes(data)
    before = set(os.listdir(place))
    refused(lambda: GPT.load(str(path)), path, *culprits, may_pass=may_pass)
    assert set(os.listdir(place)) == before and path.read_bytes() == data


@cases(60)
@given(st.binary(max_size=200), st.sampled_from([b'', b'PK\x03\x04', b'\x80\x02', b'\x80\x04', b'\x1f\x8b']),
       st.sampled_from(['ckpt.pt', 'w.safetensors']))
def test_random_bytes(place, data, magic, name):
    assume(name == 'ckpt.pt' or files_there())
    try_to_load(place, magic + data, name=name)


def tear(place, data, at, byte, cut, name='ckpt.pt'):
    """The file ends there, or has another byte there, which can make another number."""
    rest = b'' if cut else bytes([byte]) + data[at + 1:]
    try_to_load(place, data[:at] + rest, name=name, may_pass=not cut)


@cases(60)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.booleans())
def test_torn_checkpoints(place, where, byte, cut):
    tear(place, WHOLE, int(where * len(WHOLE)), byte, cut)


@cases(30)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.booleans())
def test_torn_exports(place, where, byte, cut):
    if not files_there():
        pytest.skip('safetensors is not installed')
    path = place / 'whole.safetensors'
    if not path.exists():
        files.export_safetensors(str(path), tiny_gpt(18, 8, n_recur=1), SMALL)
    data = path.read_bytes()
    # the header is what there is to harm
    tear(place, data, int(where ** 3 * len(data)), byte, cut, 'w.safetensors')


values = st.sampled_from([None, 'x', -1, 3.5, [], {}, (), b'x', 10**30, float('nan'), torch.zeros(2),
                          [1, 'x']])


@cases(30)
@given(st.sampled_from(['model', 'model_args', 'config', 'meta', 'iter_num']), values)
def test_a_part_of_a_checkpoint_is_something_else(place, key, value):
    assume(not (key == 'iter_num' and type(value) is int))
    try_to_load(place, as_bytes({**SMALL, key: value}))
    try_to_load(place, as_bytes({name: part for name, part in SMALL.items() if name != key}),
                f"has no '{key}'")


@cases(40)
@given(st.sampled_from(['block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout']), values)
def test_model_args_that_make_no_network(place, name, value):
    # so many would only take for ever
    assume(not (name == 'n_layer' and isinstance(value, int) and value > 1))
    try_to_load(place, as_bytes({**SMALL, 'model_args': {**SMALL['model_args'], name: value}}))


@cases(75)
@given(st.sampled_from(LAYERS), st.sampled_from(['shape', 'nan', 'inf', 'gone', 'int', 'none', 'renamed']),
       st.booleans())
def test_tensors_that_do_not_fit(place, name, how, ema):
    weights = dict(SMALL['model'])
    tensor = weights.pop(name)
    if how in ('nan', 'inf'):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = float(how)
    weights.update({'shape': {name: tensor.new_zeros(*tensor.shape, 2)}, 'gone': {},
                    'int': {name: tensor.long()}, 'none': {name: None},
                    'renamed': {name + '_': tensor}}.get(how, {name: tensor}))
    try_to_load(place, as_bytes({**SMALL, 'ema' if ema else 'model': weights}), name)


@cases(30)
@given(st.sampled_from(['vocab_size', 'itos', 'name', 'tokenizer', 'bos', 'eos', 'pad']), values)
def test_another_vocabulary(place, name, value):
    meta = {key: part for key, part in ARITHMETIC.items() if key != name}
    try_to_load(place, as_bytes({**SMALL, 'meta': meta}), f"its meta has no '{name}'")
    if name == 'vocab_size' or (name, value if isinstance(value, str) else None) in (
        ('itos', 'x'),
        ('name', None),
    ):
        try_to_load(place, as_bytes({**SMALL, 'meta': {**meta, name: value}}))


class Command:
    """Unpickling this runs a command."""

    def __init__(self, function, words):
        self.function, self.words = function, words

    def __reduce__(self):
        return self.function, self.words


@cases(30)
@given(st.sampled_from([os.system, os.mkdir, open, eval, exec, subprocess.call, __import__]), st.booleans(),
       st.sampled_from(['config', 'meta', 'model', 'iter_num', 'extra']))
def test_a_checkpoint_that_would_run_a_command(place, function, plain, key):
    words = {open: (f'{place}/ran', 'w'), os.system: (f'touch {place}/ran',)}.get(function, (f'{place}/ran',))
    evil = Command(function, words)
    try_to_load(place, pickle.dumps(evil, protocol=2) if plain else as_bytes({**SMALL, key: evil}),
                'refused')
    assert not os.path.exists(place / 'ran')


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    """The folder of a run that could go on, and its checkpoint."""
    folder = tmp_path_factory.mktemp('stopped')
    start(str(folder), *PLAIN, '--max_iters=1')
    for name in set(os.listdir(folder)) - {'ckpt_unmasking.pt'}:  # the log, and curves if they can be drawn
        os.remove(folder / name)
    return folder, read(str(folder))


@cases(12)
@given(st.sampled_from(['optimizers', 'rng', 'sums', 'control']), values, st.booleans())
def test_a_run_that_cannot_be_resumed(stopped, key, value, inside):
    folder, whole = stopped
    part = whole[key]
    # which is a number like any other
    assume(not (key == 'control' and inside and isinstance(value, float) and value == 3.5))
    if inside and isinstance(part, dict):
        value = {**part, sorted(part)[0]: value}
    tensors = isinstance(value, dict) and all(isinstance(part, torch.Tensor) for part in value.values())
    assume(key != 'sums' or not tensors)
    torch.save({**whole, key: value}, folder / 'ckpt_unmasking.pt')
    refused(lambda: start(str(folder), *PLAIN, '--init_from=resume', '--max_iters=2'),
            folder / 'ckpt_unmasking.pt')
    assert os.listdir(folder) == ['ckpt_unmasking.pt']


# -----------------------------------------------------------------------------
# what sample.py is asked to do

MODEL = tiny_gpt(18, 16, n_recur=1)
texts = st.text('0123456789()+*=', max_size=20)


@cases(40)
@given(texts, junk.filter(lambda text: set(text) - set('0123456789()+*=_')), texts,
       st.sampled_from(['infill', 'repair', 'edit', 'score']))
def test_texts_of_other_characters(before, odd, after, task):
    text = before + odd + ('_' if task == 'infill' else '') + after
    refused(lambda: canvas.task_canvas(task, MODEL, ARITHMETIC, text, '_', '0:1'),
            'is not in the vocabulary of arithmetic')


@cases(40)
@given(texts, st.text('0123456789:, -x', max_size=8))
def test_spans(text, mask):
    def edit():
        there, fixed = canvas.task_canvas('edit', MODEL, ARITHMETIC, text, None, mask)
        masked = [i - 1 for i in (there[0] == MODEL.mask_token_id).nonzero()[:, 0].tolist()]
        assert (masked == sorted(canvas.spans(mask, len(text))) and masked
                and fixed.sum() == there.numel() - len(masked))

    refused(edit, may_pass=True)
    if not text or len(text) > 14 or ':' not in mask:
        refused(edit)


@cases(30)
@given(texts, st.text('0123456789()+*=_?', max_size=2), st.booleans())
def test_holes(text, hole, there):
    def infill():
        canvas.task_canvas('infill', MODEL, ARITHMETIC, text + (hole if there else ''), hole)

    odd = set(hole) - set('0123456789()+*=')
    if not odd or not there:
        refused(infill, repr(hole))  # it could be text, or is nowhere
    else:
        refused(infill, may_pass=len(text) <= 14)
