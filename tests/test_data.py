"""The data folders: the arithmetic grammar and its scorer, both prepare scripts, and the writer they share."""

import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import urllib.error

import numpy as np
import pytest

DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'data')


def load(name):
    """The script data/<name>.py as a module, under a name of its own (there are two prepare.py)."""
    spec = importlib.util.spec_from_file_location('data_' + name.replace('/', '_'), os.path.join(DATA, name + '.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


task = load('arithmetic/task')
arithmetic = load('arithmetic/prepare')
shakespeare = load('shakespeare_char/prepare')


def draws(n, seed=0, depth=None):
    rng = random.Random(seed)
    return [task.draw(rng, depth)[0] for _ in range(n)]


def score_one(text):
    """(balanced, valid, correct) of a single text."""
    s = task.score([text], lengths={3: 1.0})
    return s['balanced'], s['valid'], s['correct']


def read_rows(folder, split):
    return np.fromfile(os.path.join(folder, f'{split}.bin'), dtype='<u2').reshape(-1, 64)


def read_strings(folder, split):
    """The strings of a split, read back from the file; asserts the layout of every row on the way."""
    texts = []
    for row in read_rows(folder, split):
        end = row.tolist().index(16)
        assert row[0] == 15 and end >= 4 and (row[end+1:] == 17).all() and (row[1:end] < 15).all()
        texts.append(''.join(task.CHARS[i] for i in row[1:end]))
    return texts

# -----------------------------------------------------------------------------
# the grammar and the parser, against evaluators of another kind

def by_eval(expr):
    """The value of a well-formed prefix expression: read it backwards into infix, and let Python work that out."""
    stack = []
    for c in reversed(expr):
        if c in '0123456789':
            stack.append(c)
        elif c in '+*':
            stack.append(f'({stack.pop()}{c}{stack.pop()})')
    assert len(stack) == 1
    return eval(stack[0])


def valid_by_regex(text):
    """Is text in the language? Shrink innermost expressions to E until nothing changes, and see what is left."""
    expr, equals, number = text.partition('=')
    if 'E' in expr or not equals or not re.fullmatch('0|[1-9][0-9]*', number):
        return False
    expr, changes = re.sub('[0-9]', 'E', expr), 1
    while changes:
        expr, changes = re.subn(r'\([+*]EE\)', 'E', expr)
    return expr == 'E'


def test_draws_are_valid_and_correct():
    rng = random.Random(1)
    for _ in range(2000):
        text, value = task.draw(rng)
        expr, number = text.split('=')
        assert len(text) <= task.MAX_LENGTH == 62 and set(text) <= set(task.CHARS)
        assert valid_by_regex(text)
        assert value == by_eval(expr) == int(number)
        assert task.parse(text) == (True, value, value)


def test_draw_follows_the_grammar():
    assert all(re.fullmatch(r'([0-9])=\1', t) for t in draws(50, depth=0))
    nesting = [max(t[:i].count('(') - t[:i].count(')') for i in range(len(t))) for t in draws(500, depth=3)]
    assert set(nesting) == {0, 1, 2, 3}
    texts = draws(4000)
    assert abs(sum(len(t) == 3 for t in texts) / 4000 - 0.2) < 0.03   # a lone digit: the root stops with p = 0.2
    roots = [t[1] for t in texts if t[0] == '(']
    assert abs(roots.count('+') / len(roots) - 0.5) < 0.05
    first = sum(t[2:3] == '(' for t in texts)
    last = sum('))=' in t for t in texts)
    assert abs(first - last) / len(roots) < 0.05  # the deeper operand comes first as often as second
    assert draws(20, seed=5) == draws(20, seed=5) != draws(20, seed=6)


def test_parser_on_broken_strings():
    rng = random.Random(2)
    agreed = {True: 0, False: 0}
    for text in draws(3000, seed=3):
        chars = list(text)
        for _ in range(rng.randint(1, 2)):  # replace, insert or delete a character
            i = rng.randrange(len(chars) + 1)
            chars[i:i + rng.randint(0, 1)] = rng.choice(['', rng.choice(task.CHARS)])
        broken = ''.join(chars)
        valid, value, claimed = task.parse(broken)
        assert valid == valid_by_regex(broken), broken
        if valid:
            expr, number = broken.split('=')
            assert (value, claimed) == (by_eval(expr), int(number))
        agreed[valid] += 1
    assert min(agreed.values()) > 300  # both answers were tried


def test_parser_survives_junk():
    deep = 5000
    nested = '(*9' * deep + '9' + ')' * deep
    for junk in ['(' * deep, '(+' * deep, ')' * deep, '=' * deep, '7' * deep, nested, nested + '=', '\0é²',
                 '(+12)=²', '(+12)=３', '٣=3', '(', '(+', '(+1', '(+12', '(+12)', '=', '=3', '3', '3=', '(-12)=3',
                 ' 3=3', '3=3\n']:
        assert task.parse(junk) == (False, None, None)
    assert task.parse(nested + '=0') == (True, 9 ** (deep + 1), 0)
    assert task.parse('1=' + '9' * deep) == (True, 1, 10 ** deep - 1)
    rng = random.Random(4)
    for _ in range(200):
        task.score([''.join(rng.choices(task.CHARS, k=rng.randrange(3000)))], lengths={3: 1.0})

# -----------------------------------------------------------------------------
# the scorer

@pytest.mark.parametrize('text, balanced, valid, correct', [
    ('(+12)=3', 1, 1, 1),
    ('(+(*75)1)=36', 1, 1, 1),
    ('7=7', 1, 1, 1),
    ('(*07)=0', 1, 1, 1),
    ('(+12)=4', 1, 1, 0),
    ('(*99)=8', 1, 1, 0),          # a number cut short
    ('(+12)=03', 1, 0, 0),
    ('0=00', 1, 0, 0),
    ('(+12)=', 1, 0, 0),
    ('(+12)', 1, 0, 0),
    ('(+12)=3=3', 1, 0, 0),
    ('(+12)=(+12)', 1, 0, 0),
    ('(+12)=-3', 1, 0, 0),
    ('(+123)=6', 1, 0, 0),
    ('(+1)=1', 1, 0, 0),
    ('(12)=3', 1, 0, 0),
    ('+12=3', 1, 0, 0),
    ('(7)=7', 1, 0, 0),
    ('12=12', 1, 0, 0),            # a digit is an expression, a number is not
    ('', 1, 0, 0),
    ('((+12)=3', 0, 0, 0),
    ('(+12))=3', 0, 0, 0),
    ('(+12=3', 0, 0, 0),
    (')(', 0, 0, 0),
])
def test_scores_of_single_strings(text, balanced, valid, correct):
    assert score_one(text) == (balanced, valid, correct)


def test_score_of_a_sample():
    s = task.score(['(+12)=3', '(+12)=3', '(+12)=4', ')('], train={'(+12)=3', '9=9'}, lengths={7: 0.5, 2: 0.5})
    assert s == {'n': 4, 'balanced': 0.75, 'valid': 0.75, 'correct': 0.5, 'unique': 0.75, 'novel': 0.5,
                 'mean_length': 23 / 4, 'length_tv': 0.25}
    assert task.score(iter(['7=7']), lengths={3: 1.0})['novel'] is None
    assert task.score(['7=7'], train=[], lengths={3: 1.0})['novel'] == 1
    json.dumps(s)
    with pytest.raises(ValueError):
        task.score([])


def test_length_tv():
    reference = task.reference_lengths(2000)
    assert sum(reference.values()) == pytest.approx(1)
    assert task.reference_lengths(2000) is reference
    assert task.length_tv(draws(2000, seed=12345), reference) == 0  # the very draws the reference is made of
    assert task.length_tv(['1' * 200, ''], reference) == pytest.approx(1)
    half = ['7=7'] * 500 + ['1' * 200] * 500
    assert task.length_tv(half, {3: 1.0}) == 0.5
    assert 0 < task.length_tv(draws(2000), reference) < 0.15


def test_length_floor(monkeypatch):
    reference = task.reference_lengths(20_000)
    monkeypatch.setattr(task, 'reference_lengths', lambda: reference)
    few, many = task.length_floor(100, repeats=5), task.length_floor(900, repeats=5)
    assert 2 < few / many < 4  # falls as 1 / sqrt(n)
    assert task.length_floor(100, repeats=5) == few

# -----------------------------------------------------------------------------
# data/arithmetic/prepare.py

def test_arithmetic_files(tmp_path):
    meta = arithmetic.prepare(tmp_path, num_train=500, num_val=100, seed=1)
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']
    assert meta == json.loads((tmp_path / 'meta.json').read_text())
    for split in ('train', 'val'):
        data = (tmp_path / f'{split}.bin').read_bytes()
        assert len(data) == 2 * meta[f'{split}_tokens']
        assert hashlib.sha256(data).hexdigest() == meta['sha256'].pop(f'{split}.bin')
    assert meta == {
        'name': 'arithmetic', 'format': 'rows', 'block_size': 64, 'vocab_size': 18, 'tokenizer': 'char',
        'itos': [*'0123456789()+*=', '<bos>', '<eos>', '<pad>'], 'bos': 15, 'eos': 16, 'pad': 17,
        'train_tokens': 500 * 64, 'val_tokens': 100 * 64, 'seed': 1, 'sha256': {},
    }


def test_arithmetic_strings(tmp_path):
    arithmetic.prepare(tmp_path, num_train=2000, num_val=300)
    train, val = read_strings(tmp_path, 'train'), read_strings(tmp_path, 'val')
    assert (len(train), len(val)) == (2000, 300)
    assert not set(train) & set(val)
    assert task.score(train + val, lengths={3: 1.0})['correct'] == 1
    assert len(set(train)) < len(train)  # duplicates stay, as the grammar draws them


def test_val_is_not_drawn_from_the_training_stream():
    for seed in (1, 2):
        train, val, rejected = arithmetic.draw_splits(500, 50, seed)
        assert 0 < rejected < 100  # with the same stream it would be all of the first 500
        others = arithmetic.draw_splits(500, 50, seed + 1)[0]
        assert len(set(val) & set(others)) < 25


def test_longest_string_fills_its_row():
    text = '1' * task.MAX_LENGTH
    assert arithmetic.encode_rows([text]).tolist() == [[15] + [1] * 62 + [16]]


def test_arithmetic_seeds(tmp_path):
    shas = [arithmetic.prepare(tmp_path / str(i), num_train=200, num_val=50, seed=seed)['sha256']
            for i, seed in enumerate((1, 1, 2))]
    assert shas[0] == shas[1]
    assert shas[0]['train.bin'] != shas[2]['train.bin'] and shas[0]['val.bin'] != shas[2]['val.bin']


def test_arithmetic_script(tmp_path):
    script = os.path.join(DATA, 'arithmetic', 'prepare.py')
    args = [f'--out={tmp_path / "new"}', '--num_train=100', '--num_val=20', '--seed=3']
    run = subprocess.run([sys.executable, script, *args], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(read_strings(tmp_path / 'new', 'train')) == 100 and len(read_strings(tmp_path / 'new', 'val')) == 20
    with pytest.raises(ValueError):
        arithmetic.prepare(tmp_path, num_train=0)

# -----------------------------------------------------------------------------
# data/common.py

@pytest.mark.parametrize('call, fails_at', [('replace', 1), ('replace', 2), ('replace', 3), ('fsync', 1), ('fsync', 3)])
@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_interrupted_write(tmp_path, monkeypatch, call, fails_at, error):
    """A first write leaves no meta.json and no partial file; a second one also no old meta.json beside new data."""
    real, calls = getattr(os, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) == fails_at:
            raise error('interrupted')
        return real(*args)

    def attempt(folder):
        calls.clear()
        with monkeypatch.context() as m:
            m.setattr(os, call, failing)
            with pytest.raises(error):
                arithmetic.prepare(folder, num_train=50, num_val=10, seed=2)
        assert len(calls) == fails_at

    attempt(tmp_path / 'new')
    left = sorted(os.listdir(tmp_path / 'new'))
    assert left == (['train.bin', 'val.bin'][:fails_at-1] if call == 'replace' else [])
    assert all((tmp_path / 'new' / name).stat().st_size in (50 * 128, 10 * 128) for name in left)

    old = arithmetic.prepare(tmp_path / 'old', num_train=60, num_val=20, seed=1)
    attempt(tmp_path / 'old')
    left = sorted(os.listdir(tmp_path / 'old'))
    if call == 'fsync':  # nothing was renamed yet: the old dataset is still there, whole
        assert left == ['meta.json', 'train.bin', 'val.bin']
        assert {f: hashlib.sha256((tmp_path / 'old' / f).read_bytes()).hexdigest() for f in left[1:]} == old['sha256']
    else:
        assert left == ['train.bin', 'val.bin']


def test_write_refuses_bad_ids(tmp_path):
    common = load('common')
    for bad in ([], [-1], [18], [70000]):
        with pytest.raises(ValueError):
            common.write_dataset(tmp_path, [1, 2], bad, {'vocab_size': 18})
    assert os.listdir(tmp_path) == []

# -----------------------------------------------------------------------------
# data/shakespeare_char/prepare.py

TEXT = 'First Citizen:\nBefore we proceed any further, hear me speak.\n'


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / 'input.txt'
    path.write_bytes(TEXT.encode())
    return path


def test_shakespeare_refuses_other_text(tmp_path, text_file):
    got = hashlib.sha256(TEXT.encode()).hexdigest()
    with pytest.raises(SystemExit) as e:
        shakespeare.prepare(tmp_path / 'out', input=text_file)
    message = e.value.code
    assert 'not tiny Shakespeare' in message and got in message and shakespeare.SHA256 in message
    assert '\n' not in message
    assert not (tmp_path / 'out').exists()


def test_shakespeare_script_exit_status(tmp_path, text_file):
    script = os.path.join(DATA, 'shakespeare_char', 'prepare.py')
    args = [f'--out={tmp_path / "out"}', f'--input={text_file}']
    run = subprocess.run([sys.executable, script, *args], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1 and 'not tiny Shakespeare' in run.stderr
    assert not (tmp_path / 'out').exists()


def test_shakespeare_failed_download(tmp_path, monkeypatch):
    def fail(url, timeout):
        raise urllib.error.URLError('no network')

    monkeypatch.setattr(shakespeare.urllib.request, 'urlopen', fail)
    with pytest.raises(SystemExit) as e:
        shakespeare.prepare(tmp_path / 'out')
    assert '--input=FILE' in e.value.code and '\n' not in e.value.code
    with pytest.raises(SystemExit, match='cannot read'):
        shakespeare.prepare(tmp_path / 'out', input=tmp_path / 'missing.txt')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('download', [False, True])
def test_shakespeare_round_trip(tmp_path, text_file, monkeypatch, download):
    monkeypatch.setattr(shakespeare, 'SHA256', hashlib.sha256(TEXT.encode()).hexdigest())
    monkeypatch.setattr(shakespeare.urllib.request, 'urlopen', lambda url, timeout: open(text_file, 'rb'))
    out = tmp_path / 'out'
    meta = shakespeare.prepare(out, input=None if download else text_file)
    assert sorted(os.listdir(out)) == ['meta.json', 'train.bin', 'val.bin']
    train, val = (np.fromfile(out / f'{split}.bin', dtype='<u2') for split in ('train', 'val'))
    assert ''.join(meta['itos'][i] for i in [*train, *val]) == TEXT
    assert len(train) == meta['train_tokens'] == int(0.9 * len(TEXT))
    assert len(val) == meta['val_tokens'] == len(TEXT) - len(train)
    assert meta['itos'] == sorted(set(TEXT)) and meta['vocab_size'] == len(meta['itos'])
    assert meta['format'] == 'stream'
    assert [meta[k] for k in ('block_size', 'bos', 'eos', 'pad', 'seed')] == [None] * 5
