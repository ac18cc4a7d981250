"""Files: what is written where, what is refused before the work, what is left behind and found again."""

import errno
import importlib.util
import io
import json
import math
import os
import shlex
import stat
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ARITHMETIC, ROOT, default_config, write_checkpoint

import configurator
from configurator import UserError
from data.common import dataset_writer, temporary
from data.loader import load_data
from model import GPT
from plumbing.checkpoint import (
    check_overwrite,
    check_resume,
    export_safetensors,
    find_checkpoint,
    save_checkpoint,
)
from plumbing.files import append_line, check_output, finite, read_records, to_json, write_atomically
from plumbing.log import read_log, start_log

# -----------------------------------------------------------------------------
# what lies at the path


def text_to(path):
    write_atomically(str(path), 'new\n')
    return lambda written: written == b'new\n'


def tensor_to(path):
    save_checkpoint(str(path), dict(x=torch.arange(3)))
    return lambda written: torch.load(io.BytesIO(written))['x'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('write', [text_to, tensor_to])
def test_links_devices_and_pipes_stay(tmp_path, write):
    """What a link points at is replaced; a device or a pipe is written to."""
    good = write(tmp_path / 'plain')
    (tmp_path / 'there').mkdir()
    for name in ('old', 'new'):  # the second one points at nothing yet
        link, real = tmp_path / f'{name}.link', tmp_path / 'there' / name
        link.symlink_to(os.path.join('there', name))
        if name == 'old':
            real.write_text('old')
        write(link)
        assert link.is_symlink() and good(real.read_bytes())
    os.mkfifo(tmp_path / 'pipe')
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / 'pipe').read_bytes()), daemon=True)
    reader.start()
    write(tmp_path / 'pipe')
    reader.join(5)
    assert good(got[0]) and stat.S_ISFIFO(os.stat(tmp_path / 'pipe').st_mode)
    (tmp_path / 'null').symlink_to(os.devnull)
    write(tmp_path / 'null')
    write(os.devnull)
    assert (tmp_path / 'null').is_symlink() and stat.S_ISCHR(os.stat(os.devnull).st_mode)
    (tmp_path / 'circle').symlink_to('circle')
    with pytest.raises(UserError, match='circle: cannot be written: Too many levels'):
        write(tmp_path / 'circle')
    if os.path.exists('/dev/full'):
        with pytest.raises(UserError, match='/dev/full: cannot be written: No space'):
            write('/dev/full')
    left = ['circle', 'new.link', 'null', 'old.link', 'pipe', 'plain', 'there']
    assert sorted(os.listdir(tmp_path)) == left and sorted(os.listdir(tmp_path / 'there')) == ['new', 'old']


@pytest.mark.parametrize('path', ['-', '/dev/stdout', '/dev/stderr'])
def test_streams(capfd, path):
    print('before')
    text_to(path)
    out, err = capfd.readouterr()
    assert (out, err) == (('before\n', 'new\n') if path == '/dev/stderr' else ('before\nnew\n', ''))


def test_what_cannot_be_written_is_refused_before(tmp_path, monkeypatch):
    (tmp_path / 'in.pt').write_text('a network')
    (tmp_path / 'link').symlink_to('in.pt')
    for good in (None, '-', os.devnull, tmp_path / 'new', tmp_path / 'link'):
        check_output(good and str(good), None, str(tmp_path / 'other'))
    for bad, message in (
        ('in.pt', 'would be written over'),
        ('link', 'would be written over'),
        ('', 'is a folder'),
        ('no/x', 'there is no folder'),
        ('in.pt/x', 'there is no folder'),
    ):
        with pytest.raises(UserError, match=message):
            check_output(str(tmp_path / bad), None, str(tmp_path / 'in.pt'))
    with pytest.raises(UserError, match='- is for text'):
        check_output('-', text=False)
    (tmp_path / 'old').write_text('old')
    for closed, path in ((tmp_path, 'new'), (tmp_path, 'old'), (tmp_path / 'old', 'old')):
        with monkeypatch.context() as m, pytest.raises(UserError, match='be written: Permission denied'):
            m.setattr(os, 'access', lambda path, mode: path != str(closed))  # root may write anywhere
            check_output(str(tmp_path / path))


def test_who_may_read_a_file_stays(tmp_path):
    path = tmp_path / 'a'
    path.write_text('old')
    path.chmod(0o640)
    text_to(path)
    assert path.read_text() == 'new\n' and stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize('action', [
    lambda folder: GPT.load(str(folder / 'ckpt.pt')),
    lambda folder: check_overwrite(str(folder / 'ckpt.pt'), default_config()),
    lambda folder: load_data('arithmetic'),
    lambda folder: find_checkpoint('ckpt', str(folder)),
])
def test_what_must_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, action):
    write_checkpoint(tmp_path / 'ckpt.pt')

    def closed(path, *more, **how):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr('builtins.open', closed)
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(UserError, match='cannot be read: Permission denied') as error:
        action(tmp_path)
    assert 'damaged' not in str(error.value)


@pytest.mark.parametrize('option', ['save', 'html', 'export', 'json'])
@pytest.mark.parametrize('where', ['ckpt_x.pt', 'folder', 'no/x', 'link'])
def test_scripts_refuse_outputs_before_the_work(tmp_path, run, monkeypatch, option, where):
    if option == 'export':
        pytest.importorskip('safetensors')
        where += '.safetensors'
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder.safetensors').mkdir()
    network = write_checkpoint(tmp_path / 'ckpt_x.pt')
    for link in ('link', 'link.safetensors', 'ckpt_x.pt.safetensors'):
        (tmp_path / link).symlink_to('ckpt_x.pt')
    before = (tmp_path / 'ckpt_x.pt').read_bytes()
    monkeypatch.setattr(torch, 'load', None)  # nothing is loaded
    script = 'bench' if option == 'json' else 'sample'
    for given in (network, 'ckpt'):
        words = f'--init_from={given}', f'--out_dir={tmp_path}', f'--{option}={tmp_path / where}'
        status, out, err = run(script, *words)
        assert status == 1 and err.startswith(f'{script}.py: {tmp_path / where}') and err.count('\n') == 1
    assert (tmp_path / 'ckpt_x.pt').read_bytes() == before


def test_samples_to_the_screen(tmp_path):
    """With - the stream holds nothing but what is written there."""
    network = write_checkpoint(tmp_path / 'ckpt_x.pt')
    words = f'--init_from={network}', '--num_samples=2', '--steps=2', '--save=-'
    result = subprocess.run([sys.executable, 'sample.py', *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and 'written to -' in result.stderr
    samples = [json.loads(line) for line in result.stdout.splitlines()]
    assert [set(sample) >= {'text', 'tokens'} for sample in samples] == [True, True]


# -----------------------------------------------------------------------------
# JSON


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_json_that_every_reader_takes(bad):
    def refuse(word):
        raise AssertionError(word)

    text = to_json(dict(a=bad, b=[1, (bad, 0.1)], c=dict(d=bad, e='ä', f=None, g=True)), ensure_ascii=False)
    read = json.loads(text, parse_constant=refuse)
    assert read == dict(a=None, b=[1, [None, 0.1]], c=dict(d=None, e='ä', f=None, g=True))
    assert finite((1, 2.5)) == [1, 2.5] and to_json({'x': 0.1}, indent=1) == json.dumps({'x': 0.1}, indent=1)


ODD = (b'{"step": 1', b'[1, 2]', b'"step"', b'null', b'{"step": "x"}', b'{"no": 1}', b'\0\xff', b'[' * 10**5)


@pytest.mark.parametrize('odd', ODD, ids=range(len(ODD)))
def test_a_log_with_an_odd_line(tmp_path, odd):
    """It is skipped, those behind it are not; a run that goes on drops it, and what came after its step."""
    path, good = tmp_path / 'log.jsonl', [{'step': 1, 'nelbo': 2.0}, {'step': 2, 'nelbo': None}, {'step': 3}]
    lines = [json.dumps(record).encode() for record in good]
    path.write_bytes(b'\n'.join([lines[0], odd, lines[1], odd]))
    append_line(str(path), lines[2].decode())  # to the half line that a crash left
    assert path.read_bytes() == b'\n'.join([lines[0], odd, lines[1], odd, lines[2], b''])
    assert read_log(str(path)) == good and all(isinstance(record, dict) for record in read_records(str(path)))
    start_log(str(path), 2)
    assert path.read_bytes() == b'\n'.join([*lines[:2], b''])


# -----------------------------------------------------------------------------
# paths


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    known = configurator.settings(os.path.join(ROOT, 'sample.py'))

    def value(name, text):
        return configurator.parse([f'--{name}={text}'], known)[1][0][1]

    for name in ('out_dir', 'init_from', 'merge_from', 'remask_from', 'file', 'save', 'html', 'export'):
        assert value(name, '~/x') == str(tmp_path / 'x') and value(name, 'a~/x') == 'a~/x'
    assert value('prompt', '~/x') == value('text', '~/x') == '~/x'  # no path
    for script in ('train.py', 'bench.py', 'tools/energy.py', 'tools/distill.py', 'data/text/prepare.py'):
        assert {*configurator.settings(os.path.join(ROOT, script))} & {*configurator.PATHS}, script


def test_a_folder_stands_for_its_newest_checkpoint(tmp_path):
    folder = tmp_path / "a 'run'"
    (folder / 'deep').mkdir(parents=True)
    for age, path in enumerate((folder / 'deep' / 'ckpt_b.pt', folder / 'ckpt_a.pt')):
        path.write_bytes(b'')
        os.utime(path, (10**9 - age,) * 2)
    (folder / 'ckpt_nowhere.pt').symlink_to('gone')
    (folder / 'ckpt_circle.pt').symlink_to('ckpt_circle.pt')
    (folder / 'ckpt_folder.pt').mkdir()
    for name, out_dir in ((str(folder), 'elsewhere'), ('ckpt', str(folder))):
        assert find_checkpoint(name, out_dir) == str(folder / 'ckpt_a.pt')
    with pytest.raises(UserError) as error:
        find_checkpoint('ckpt', str(tmp_path))
    below = shlex.split(str(error.value).partition('--init_from: ')[2].replace(', ', ' '))
    assert below == [str(folder / 'ckpt_a.pt'), str(folder / 'deep' / 'ckpt_b.pt')]
    with pytest.raises(UserError, match='no checkpoint in .*ckpt_folder.pt'):
        find_checkpoint(str(folder / 'ckpt_folder.pt'), '')


def test_commands_on_screen_can_be_pasted(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "a 'b'" / 'ckpt.pt')
    model, checkpoint = GPT.load(path)
    with pytest.raises(UserError) as error:
        check_resume(path, default_config(), checkpoint, ARITHMETIC)
    said = [str(error.value).partition('its weights with ')[2]]
    if importlib.util.find_spec('safetensors'):
        export_safetensors(path[:-2] + 'safetensors', model, checkpoint)
        said.append(capsys.readouterr().out.partition('sample.py ')[2].replace('safetensors', 'pt'))
    assert all(shlex.split(words) == [f'--init_from={path}'] for words in said)


# -----------------------------------------------------------------------------
# what killed writers leave


def dead_process():
    """The number of a process that is no more."""
    child = subprocess.Popen([sys.executable, '-c', ''])
    child.wait()
    return child.pid


def test_of_many_runs_that_want_a_folder_one_gets_it(tmp_path):
    """All begin at the same moment, and hold on to what they got until all have tried."""
    code = (
        'import sys\nfrom plumbing.files import lock\nprint("ready", flush=True)\nsys.stdin.readline()\n'
        'try:\n    lock(sys.argv[1])\n    print("mine", flush=True)\n'
        'except ValueError as error:\n    print("in use" in str(error), flush=True)\nsys.stdin.readline()'
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=ROOT)
    runs = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], **pipes) for _ in range(8)]
    said = [[run.stdout.readline() for run in runs]]
    for round in range(2):
        for run in runs:
            run.stdin.write('go\n')
        if not round:
            said.append(sorted(run.stdout.readline() for run in runs))
    for run in runs:
        run.communicate(timeout=10)
    assert said == [['ready\n'] * 8, ['True\n'] * 7 + ['mine\n']]


def test_leftovers_of_dead_writers_are_swept(tmp_path):
    """Of the same file only, of this machine only, and of no process that is alive."""
    dead, own = dead_process(), temporary(str(tmp_path / 'a.bin'))
    host = own.split('.')[-3]
    gone = [f'a.bin.{dead}.tmp', f'a.bin.{host}.{dead}.tmp']
    stay = [
        f'a.bin.{os.getppid()}.tmp',
        f'a.bin.{host}.{os.getppid()}.tmp',
        f'a.bin.{host[::-1]}.{dead}.tmp',
        f'a.binary.{dead}.tmp',
        f'b.bin.{dead}.tmp',
        'a.bin.x.tmp',
    ]
    for name in gone + stay:
        (tmp_path / name).write_bytes(b'half')
    write_atomically(str(tmp_path / 'a.bin'), 'whole')
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, 'a.bin'])
    assert own == str(tmp_path / f'a.bin.{host}.{os.getpid()}.tmp')


def test_a_dataset_sweeps_what_its_dead_writer_left(tmp_path):
    for name in ('train.bin', 'val.bin', 'meta.json'):
        (tmp_path / f'{name}.{dead_process()}.tmp').write_bytes(b'half')
    with dataset_writer(str(tmp_path), dict(vocab_size=3)) as add:
        add('train', [0, 1])
        add('val', [2])
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']
