"""
The data folders: the arithmetic grammar and its scorer, the prepare scripts, what they share, and the loader.
"""

import errno
import hashlib
import importlib.util
import io
import json
import os
import pickle
import random
import re
import shlex
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import configurator
from configurator import UserError
from data import common, loader
from data import meta as meta_module
from plumbing import text as canvas
from plumbing.checks import check_fits, check_settings

DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'data')


def load(name):
    """The script data/<name>.py as a module, under a name of its own (there are many prepare.py)."""
    path = os.path.join(DATA, f'{name}.py')
    spec = importlib.util.spec_from_file_location('data_' + name.replace('/', '_'), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


task = load('arithmetic/task')
arithmetic = load('arithmetic/prepare')
shakespeare = load('shakespeare_char/prepare')
own_text = load('text/prepare')
wikitext = load('wikitext2/prepare')
openwebtext = load('openwebtext/prepare')


def draws(n, seed=0, depth=None):
    rng = random.Random(seed)
    return [task.draw(rng, depth)[0] for _ in range(n)]


def score_one(text):
    """(balanced, valid, correct) of a single text."""
    s = task.score([text], lengths={3: 1.0})
    return s['balanced'], s['valid'], s['correct']


def read_rows(folder, split):
    return np.fromfile(os.path.join(folder, f'{split}.bin'), dtype='<u2').reshape(-1, 64)


def sums(folder):
    """What meta.json says of the files of a dataset."""
    names = ('train.bin', 'val.bin')
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


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
    """
    The value of a well-formed prefix expression: read it backwards into infix, and let Python work that out.
    """
    stack = []
    for c in reversed(expr):
        if c in '0123456789':
            stack.append(c)
        elif c in '+*':
            stack.append(f'({stack.pop()}{c}{stack.pop()})')
    assert len(stack) == 1
    return eval(stack[0])


def valid_by_regex(text):
    """
    Is text in the language? Shrink innermost expressions to E until nothing changes, and see what is left.
    """
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
    # a lone digit: the root stops with p = 0.2
    assert abs(sum(len(t) == 3 for t in texts) / 4000 - 0.2) < 0.03
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
                 '(+12)=²', '(+12)=３', '٣=3', '(', '(+', '(+1', '(+12', '(+12)', '=', '=3', '3', '3=',
                 '(-12)=3', ' 3=3', '3=3\n']:
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
    texts = ['(+12)=3', '(+12)=3', '(+12)=4', ')(']
    s = task.score(texts, train={'(+12)=3', '9=9'}, lengths={7: 0.5, 2: 0.5})
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
    assert len(read_strings(tmp_path / 'new', 'train')) == 100
    assert len(read_strings(tmp_path / 'new', 'val')) == 20
    args.append('--num_train=0')
    run = subprocess.run([sys.executable, script, *args], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == 'prepare.py: num_train and num_val must be at least 1, got 0 and 20\n'

# -----------------------------------------------------------------------------
# data/common.py

@pytest.mark.parametrize('call, fails_at', [('replace', 1), ('replace', 2), ('replace', 3),
                                            ('fsync', 1), ('fsync', 3)])
@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_interrupted_write(tmp_path, monkeypatch, call, fails_at, error):
    """
    A first write leaves nothing; a second one the old dataset or nothing, never a mixture.
    """
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
    assert os.listdir(tmp_path / 'new') == []

    old = arithmetic.prepare(tmp_path / 'old', num_train=60, num_val=20, seed=1)
    attempt(tmp_path / 'old')
    left = sorted(os.listdir(tmp_path / 'old'))
    if call == 'fsync':  # nothing was renamed yet: the old dataset is still there, whole
        assert left == ['meta.json', 'train.bin', 'val.bin']
        assert sums(tmp_path / 'old') == old['sha256']
    else:  # and ids without a meta.json could mean anything
        assert left == []


def test_write_refuses_bad_ids(tmp_path):
    for bad in ([], [-1], [18], [70000]):
        with pytest.raises(ValueError):
            common.write_dataset(tmp_path, [1, 2], bad, {'vocab_size': 18})
    with pytest.raises(ValueError, match='does not fit into uint16'):  # [MASK] or [WRONG] would not
        common.write_dataset(tmp_path, [1, 2], [1], {'vocab_size': 65535})
    with pytest.raises(ValueError, match='a split has no tokens'):
        with common.dataset_writer(tmp_path, {'vocab_size': 18}) as add:
            add('train', [1, 2])
    assert os.listdir(tmp_path) == []
    (tmp_path / 'file').write_text('x')
    with pytest.raises(UserError, match='file: cannot be made a folder'):
        common.write_dataset(tmp_path / 'file', [1], [1], {'vocab_size': 18})


def test_writing_in_pieces_is_the_same(tmp_path):
    ids, meta = np.random.default_rng(0).integers(65534, size=(50, 7)), {'vocab_size': 65534}
    whole = common.write_dataset(tmp_path / 'whole', ids, ids[:9], meta)
    pieces = dict(meta)
    with common.dataset_writer(tmp_path / 'pieces', pieces) as add:
        for i, row in enumerate(ids):
            add('train', row.tolist())
            if i < 9:
                add('val', row)
    assert meta == {'vocab_size': 65534} and pieces == whole and whole['train_tokens'] == 350
    assert read_ids(tmp_path / 'pieces', 'train') == ids.flatten().tolist()
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / 'pieces' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()

# -----------------------------------------------------------------------------
# tokens

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture
def toy_gpt2(monkeypatch):
    """
    An encoding that cuts text as GPT-2's does, but knows only bytes and a few pairs of them; needs no
    download.
    """
    tiktoken = pytest.importorskip('tiktoken')
    pieces = [bytes([i]) for i in range(256)]
    pieces += [b'\n\n', b'  ', b' \n', b'th', b'the', b' t', b'a\n', b'\n\n\n']
    ranks = {piece: i for i, piece in enumerate(pieces)}
    toy = tiktoken.Encoding('toy', pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                            special_tokens={'<|endoftext|>': 50256})
    for module in (common, canvas, openwebtext):
        monkeypatch.setattr(module, 'gpt2', lambda: toy)
    return toy


@pytest.fixture
def real_gpt2():
    try:
        return common.gpt2()
    except UserError as error:
        pytest.skip(str(error))


def read_ids(folder, split):
    return np.fromfile(os.path.join(folder, f'{split}.bin'), dtype='<u2').tolist()


@pytest.mark.parametrize('piece', [1, 2, 7, 40])
def test_long_texts_are_cut_where_it_does_not_matter(toy_gpt2, monkeypatch, piece):
    monkeypatch.setattr(common, 'PIECE', piece)
    rng = random.Random(piece)
    drawn = [''.join(rng.choices('\n the a.', k=300)) for _ in range(20)]
    for text in ['', '\n', 'a', 'the\n\n\nthe  \n the\n', *drawn]:
        ids = common.encode_gpt2(text, 'test')
        assert ids.dtype == np.uint16 and ids.tolist() == toy_gpt2.encode_ordinary(text)


def test_characters_are_counted_in_their_order():
    texts = ['ba\nß', 'a€😀']
    itos, ids = common.encode_chars(texts)
    assert itos == ['\n', 'a', 'b', 'ß', '€', '😀']
    assert [''.join(itos[i] for i in part) for part in ids] == texts
    many = ''.join(map(chr, range(0x10000, 0x10000 + 65534)))
    itos, (ids, _) = common.encode_chars([many, ''])
    assert itos == [*many] and ids.tolist() == [*range(65534)]
    with pytest.raises(UserError, match='65,535 different characters.*--tokenizer=gpt2'):
        common.encode_chars([many, 'a'])


def test_gpt2_text_and_back(real_gpt2):
    meta = common.text_meta('text', 'gpt2')
    assert meta['vocab_size'] == real_gpt2.n_vocab == real_gpt2.eot_token + 1 == 50257
    text = 'The naïve €5 <|endoftext|>\n\n😀'
    ids = canvas.encode(meta, text)
    # what is written between documents is read back as that token
    assert ids.count(50256) == 1 and canvas.decode(meta, ids) == (text, False)
    # in a stream it is a token like any other
    assert canvas.decode(meta, [50256, 464]) == ('<|endoftext|>The', False)
    broken = canvas.decode(meta, real_gpt2.encode_ordinary('😀')[:1] + [464])[0]
    assert broken == '\ufffdThe'


def test_gpt2_that_cannot_be_had(monkeypatch):
    def refuse(name):
        raise OSError('no network')

    common.gpt2.cache_clear()
    monkeypatch.setitem(sys.modules, 'tiktoken', SimpleNamespace(get_encoding=refuse))
    with pytest.raises(UserError, match='no network.*set TIKTOKEN_CACHE_DIR') as e:
        canvas.encode(common.text_meta('text', 'gpt2'), 'a')
    assert '\n' not in str(e.value)
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(UserError, match='pip install tiktoken'):
        canvas.decode(common.text_meta('text', 'gpt2'), [1])


def test_long_vocabularies_are_not_printed():
    meta = common.text_meta('book', 'char', [chr(0x4e00 + i) for i in range(3000)])
    message = "'x' in 'x' is not in the vocabulary of book: .* and 2,800 more"
    with pytest.raises(UserError, match=message) as e:
        canvas.encode(meta, 'x')
    assert len(str(e.value)) < 300

# -----------------------------------------------------------------------------
# data/shakespeare_char/prepare.py and data/shakespeare/prepare.py

TEXT = 'First Citizen:\nBefore we proceed any further, hear me speak.\n' * 12


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / 'input.txt'
    path.write_bytes(TEXT.encode())
    return path


def run_script(name, *words):
    """A prepare.py as from the command line: (exit status, stderr)."""
    script = os.path.join(DATA, name, 'prepare.py')
    run = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True)
    return run.returncode, run.stderr


def test_shakespeare_refuses_other_text(tmp_path, text_file):
    got = hashlib.sha256(TEXT.encode()).hexdigest()
    with pytest.raises(UserError) as e:
        shakespeare.prepare(tmp_path / 'out', input=text_file)
    message = str(e.value)
    assert 'not tiny Shakespeare' in message and got in message and shakespeare.SHA256 in message
    assert '\n' not in message
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['shakespeare_char', 'shakespeare'])
def test_shakespeare_script_exit_status(tmp_path, text_file, name):
    status, err = run_script(name, f'--out={tmp_path / "out"}', f'--input={text_file}')
    assert status == 1 and len(err.splitlines()) == 1 and 'not tiny Shakespeare' in err
    assert not (tmp_path / 'out').exists()


def test_shakespeare_failed_download(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, 'URL', (tmp_path / 'nothing').as_uri())
    with pytest.raises(UserError, match='fetch file:.*/nothing by hand and pass --input=FILE') as e:
        shakespeare.prepare(tmp_path / 'out')
    assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='cannot read'):
        shakespeare.prepare(tmp_path / 'out', input=tmp_path / 'missing.txt')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('download', [False, True])
def test_shakespeare_round_trip(tmp_path, text_file, monkeypatch, download):
    monkeypatch.setattr(shakespeare, 'SHA256', hashlib.sha256(TEXT.encode()).hexdigest())
    monkeypatch.setattr(shakespeare, 'URL', text_file.as_uri())
    out = tmp_path / 'out'
    meta = shakespeare.prepare(out, input=None if download else text_file)
    assert sorted(os.listdir(out)) == ['meta.json', 'train.bin', 'val.bin']
    train, val = (read_ids(out, split) for split in ('train', 'val'))
    assert ''.join(meta['itos'][i] for i in [*train, *val]) == TEXT
    assert len(train) == meta['train_tokens'] == int(0.9 * len(TEXT))
    assert len(val) == meta['val_tokens'] == len(TEXT) - len(train)
    assert meta['itos'] == sorted(set(TEXT)) and meta['vocab_size'] == len(meta['itos'])
    assert meta['format'] == 'stream' and meta['name'] == 'shakespeare_char'
    assert [meta[k] for k in ('block_size', 'bos', 'eos', 'pad', 'seed')] == [None] * 5


def test_shakespeare_in_gpt2_tokens(tmp_path, text_file, monkeypatch, toy_gpt2):
    monkeypatch.setattr(shakespeare, 'SHA256', hashlib.sha256(TEXT.encode()).hexdigest())
    meta = shakespeare.prepare(tmp_path / 'out', text_file, 'shakespeare', 'gpt2')
    split = int(0.9 * len(TEXT))
    for name, text in (('train', TEXT[:split]), ('val', TEXT[split:])):
        assert read_ids(tmp_path / 'out', name) == toy_gpt2.encode_ordinary(text)
        assert meta[f'{name}_tokens'] < len(text)
    assert (meta['name'], meta['tokenizer']) == ('shakespeare', 'gpt2')
    assert (meta['vocab_size'], meta['itos']) == (50257, None)

# -----------------------------------------------------------------------------
# data/text/prepare.py

@pytest.fixture
def notes(tmp_path):
    """A folder with texts: the order of their paths, not of their making, is that of the dataset."""
    folder = tmp_path / 'notes'
    (folder / 'deep').mkdir(parents=True)
    for name, text in {'b.md': b'second\r\nfile\n\n', 'a.txt': b'\xef\xbb\xbffirst' + b' word' * 200,
                       'd.txt': b' \n', 'deep/c.txt': 'third é\n'.encode(), 'x.py': b'print()\n'}.items():
        (folder / name).write_bytes(text)
    return folder


NOTES = 'first' + ' word' * 200 + '\n\nsecond\nfile\n\nthird é\n'


def texts_of(folder, meta):
    """The two splits of a stream as text."""
    return [canvas.decode(meta, read_ids(folder, split))[0] for split in ('train', 'val')]


def rows_in(folder, meta, split):
    """The rows of a split as texts; asserts that each of them starts and ends."""
    rows = np.array(read_ids(folder, split)).reshape(-1, meta['block_size']).tolist()
    assert all(row[0] == meta['bos'] for row in rows)
    texts, ends = zip(*(canvas.decode(meta, row) for row in rows))
    assert all(ends)
    return list(texts)


def test_own_text_of_a_file_is_held_out_at_its_end(tmp_path):
    (tmp_path / 'a.txt').write_bytes(NOTES.replace('\n', '\r\n').encode('utf-8-sig'))
    meta = own_text.prepare(tmp_path / 'mybook', tmp_path / 'a.txt', val_share=0.25)
    train, val = texts_of(tmp_path / 'mybook', meta)
    assert train + val == NOTES and len(train) == int(0.75 * len(NOTES))
    assert meta['name'] == 'mybook' and meta['tokenizer'] == 'char' and meta['itos'] == sorted(set(NOTES))


def test_own_text_of_a_folder(tmp_path, notes):
    meta = own_text.prepare(tmp_path / 'mybook', notes, val_share=0.25)
    train, val = texts_of(tmp_path / 'mybook', meta)
    assert sorted((train + val).replace('\n', '')) == sorted(NOTES.replace('\n', '')) and len(val) > 200
    assert own_text.read_texts(notes, 'deep/*, *.py') == ['third é\n', 'print()\n']
    assert own_text.read_texts(notes / 'x.py', '*.txt') == ['print()\n']  # a file is taken whatever its name


def test_own_text_in_gpt2_tokens(tmp_path, notes, toy_gpt2):
    """Documents have <|endoftext|> between them."""
    (notes / 'b.md').write_text('word\n' * 300)
    meta = own_text.prepare(tmp_path / 'mybook', notes, 'gpt2')
    train, val = (toy_gpt2.decode(read_ids(tmp_path / 'mybook', split)) for split in ('train', 'val'))
    assert train.endswith('<|endoftext|>third é\n') and train.count('<|endoftext|>') == 2
    assert len(train + val) > 2000 and val.endswith('word\n')
    assert meta['tokenizer'] == 'gpt2' and meta['itos'] is None and meta['vocab_size'] == 50257


def test_a_few_files_are_held_out_in_pieces_of_all_of_them(tmp_path):
    """The end of everything would be the end of the last file, perhaps in another language."""
    kinds = dict(en=[f'line {i} of the text\n' for i in range(900)], zh=[f'第{i}行\n' for i in range(5400)])
    for kind, lines in kinds.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / 'a.txt').write_text(''.join(lines), encoding='utf-8')
    train, val = own_text.split_documents(own_text.read_texts(f'{tmp_path}/en,{tmp_path}/zh'), 0.1)
    for lines, learned, held in zip(kinds.values(), train, val):
        assert 0.07 < len(held) / len(learned + held) < 0.13
        found = learned.splitlines(True), held.splitlines(True)
        assert sorted(found[0] + found[1]) == sorted(lines)  # whole lines, in their order
        kept = set(found[0])
        assert found[0] == [line for line in lines if line in kept]


def test_of_many_files_some_are_held_out(tmp_path):
    documents = [f'{i} ' * (40 + i % 7) + '\n' for i in range(30)]
    train, val = own_text.split_documents(documents, 0.1)
    assert sorted(train + val) == sorted(documents) and 1 <= len(val) <= 4 and val != documents[-len(val):]
    # most of the text in one file: pieces of it are held out, and not all the others
    train, val = own_text.split_documents([*documents, 'a long line of it\n' * 9000], 0.1)
    assert 'long' in val[-1] and 0.08 < sum(map(len, val)) / sum(map(len, train + val)) < 0.12


def test_inputs_of_every_kind(tmp_path, monkeypatch, capsys):
    files = {'a,b.txt': b'comma', 'c.TXT': b'upper', '.hidden.txt': b'no', '.git/x.txt': b'no',
             'd/e.md': b'deep', 'wide.txt': 'weit é'.encode('utf-16'),
             'acc.txt': 'e\u0301'.encode(), 'odd.txt': b'\0\0\x1b'}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO('ein ß\r\n'.encode())))
    read = own_text.read_texts
    assert read('~/a,b.txt') == ['comma'] and read(f'{tmp_path}/a,b.txt') == ['comma']
    assert sorted(read(tmp_path)) == sorted(['comma', 'upper', 'deep', 'weit é', '\xe9', '\0\0\x1b'])
    odd = '2 of them NUL: is all of it text?, 1 of them ESC'
    assert f'read 6 files, 24 characters, {odd}' in capsys.readouterr().out
    assert read('~/c.TXT , ~/d/,~/c.TXT') == ['upper', 'deep']
    assert read(f'{tmp_path}/[cw]*') == ['upper', 'weit é']
    assert read('-') == ['ein ß\n'] and read('~/acc.txt', nfc=False) == ['e\u0301']
    for name in ('y.txt', 'z.md'):
        (tmp_path / name).write_bytes(b'abc\xff')
    with pytest.raises(UserError, match='not UTF-8, 2 of 8 files: .*y.txt .byte 3., .*z.md .*--skip_bad'):
        read(tmp_path)
    assert len(read(tmp_path, skip_bad=True)) == 6 and '2 files' in capsys.readouterr().out
    with pytest.raises(UserError, match='cannot read .*none: No such file'):
        read(f'{tmp_path}/d,{tmp_path}/none')


LINES = ['anna', 'bo\u2028b', ' c ', 'anna', 'dora\x0bd', '', *(f'name{i}' for i in range(40))]


@pytest.mark.parametrize('tokenizer', ['char', 'gpt2'])
def test_rows_of_lines(tmp_path, tokenizer, toy_gpt2):
    """A line ends in a line break and nothing else; equal ones are held out together."""
    (tmp_path / 'in.txt').write_bytes('\r\n'.join(LINES).encode())
    meta, other = (own_text.prepare(tmp_path / name, tmp_path / 'in.txt', tokenizer, rows='line')
                   for name in ('names', 'again'))
    train, val = (rows_in(tmp_path / 'names', meta, split) for split in ('train', 'val'))
    assert sorted(train + val) == sorted(filter(None, LINES)) and not set(train) & set(val) and len(val) == 4
    assert train != [line for line in LINES if line in train] and meta['sha256'] == other['sha256']
    agreed = [line for _, line in canvas.read_lines(tmp_path / 'in.txt')]           # sample.py --file
    assert agreed == list(filter(None, LINES))
    ids = {meta[name] for name in ('bos', 'eos', 'pad')}
    assert len(ids) == 3 and max(ids) == meta['vocab_size'] - 1 and meta['format'] == 'rows'
    if tokenizer == 'char':
        assert meta['itos'][-3:] == ['<bos>', '<eos>', '<pad>'] and meta['block_size'] == 8
    assert canvas.decode(meta, [meta['bos'], *canvas.encode(meta, 'an'), meta['pad']]) == ('an·', False)


def test_rows_are_trained_on_and_sampled_up_to_their_end(tmp_path, monkeypatch, run):
    """Without a task.py, as the command says that is printed."""
    monkeypatch.setattr(loader, 'HERE', str(tmp_path))
    (tmp_path / 'in.txt').write_bytes('\n'.join(LINES).encode())
    meta = own_text.prepare(tmp_path / 'names', tmp_path / 'in.txt', rows='line')
    words = shlex.split(own_text.command(meta))[2:]
    small = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--max_iters=1', '--eval_interval=1']
    words[0] = os.path.join(os.path.dirname(DATA), words[0])
    status, _, err = run('train', *words, *small, f'--out_dir={tmp_path}/out')
    assert (status, err) == (0, '')
    page, found = tmp_path / 'samples.jsonl', f'--init_from={tmp_path}/out/ckpt_joint_all_positions.pt'
    assert run('sample', found, '--num_samples=40', '--length=4', f'--save={page}')[0] == 0
    samples = [json.loads(line) for line in page.read_text(encoding='utf-8').split('\n')[:-1]]
    assert len(samples) == 40 and all(len(sample['text']) == 4 for sample in samples)
    assert all(canvas.decode(meta, sample['tokens']) == (sample['text'], True) for sample in samples)


def test_rows_of_files(tmp_path, capsys):
    for i in range(12):
        (tmp_path / f'{i}.txt').write_text(f'one\n\n{i % 6}\n' + 'long' * (i % 6 == 5))
    how = dict(input=tmp_path, rows='file', val_share=0.3)
    meta = own_text.prepare(tmp_path / 'out', **how)
    train, val = (set(rows_in(tmp_path / 'out', meta, split)) for split in ('train', 'val'))
    assert train | val == {f'one\n\n{i}' for i in range(5)} | {'one\n\n5\nlong'} and not train & val
    with pytest.raises(UserError, match='2 of 12 rows are longer than block_size=9 .*has 13.*--drop_long'):
        own_text.prepare(tmp_path / 'short', block_size=9, **how)
    meta = own_text.prepare(tmp_path / 'short', block_size=9, drop_long=True, **how)
    assert meta['block_size'] == 9 and meta['train_tokens'] + meta['val_tokens'] == 90
    assert 'longer ones left out' in capsys.readouterr().out
    for words, message in ((dict(block_size=2), 'block_size must be at least 3'),
                           (dict(block_size=3, drop_long=True), 'leaves no row'),
                           (dict(rows='word'), 'rows expects line or file'),
                           (dict(rows=None, drop_long=True), 'are about rows'),
                           (dict(glob='3.txt'), '1 different rows are too few')):
        with pytest.raises(UserError, match=message):
            own_text.prepare(tmp_path / 'none', **{**how, **words})
    (tmp_path / '3.txt').write_text('x' * 5000)
    with pytest.raises(UserError, match='the longest row has 5,002 tokens.*set --block_size'):
        own_text.prepare(tmp_path / 'none', **how)
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('text, tokenizer, rows', [
    ('a few words\n' * 61 + 'and more\n', 'char', None), ('a few words\n' * 400, 'char', None),
    ('some words\n' * 200, 'gpt2', None), ('anna\nbo\nclara\n', 'char', 'line'),
    ('a\nbo\nc\n', 'gpt2', 'line'),
    ('a\nb\n' + 'c' * 1500, 'char', 'line'), ('a\nb\n' + 'c' * 4000, 'gpt2', 'line')])
def test_the_command_that_is_proposed_runs(tmp_path, monkeypatch, capsys, toy_gpt2, text, tokenizer, rows):
    (tmp_path / 'in.txt').write_text(text)
    monkeypatch.setattr(own_text, 'DATA', str(tmp_path))
    meta = own_text.prepare(tmp_path / 'my book', tmp_path / 'in.txt', tokenizer, rows=rows)
    line = capsys.readouterr().out.splitlines()[-1]
    own_text.prepare(tmp_path / 'far' / 'book', tmp_path / 'in.txt', tokenizer, rows=rows)
    linked = f'train on it: ln -s {tmp_path}/far/book {tmp_path} && python train.py '
    assert capsys.readouterr().out.splitlines()[-1].startswith(linked)
    python, script, *words = shlex.split(line.removeprefix('train on it: '))
    assert (python, script) == ('python', 'train.py') and '--dataset=my book' in words
    train, root = load('../train'), os.path.dirname(DATA)
    values = configurator.configure(vars(train), [os.path.join(root, words[0]), *words[1:]])
    check_fits(values, meta)
    check_settings(values)
    assert values['batch_size'] * values['block_size'] <= 2**14 and values['batch_size'] >= 4


def test_own_text_that_cannot_be(tmp_path, notes):
    def refused(message, input=notes, out=tmp_path / 'out', **how):
        with pytest.raises(UserError, match=message):
            own_text.prepare(out, input, **how)
        assert not (tmp_path / 'out').exists()

    refused('--input is missing.*python data/text/prepare.py --input=PATH', input=None)
    refused("no file matches \\*.tex; set --glob", glob='*.tex')
    refused('cannot read .*nowhere.txt: No such file', input=tmp_path / 'nowhere.txt')
    refused("tokenizer expects char or gpt2, got 'bpe'", tokenizer='bpe')
    refused('val_share must be between 0 and 1', val_share=1.0)
    refused('too short: val has', val_share=0.01)
    refused('too short: train has', val_share=0.99)
    (tmp_path / 'empty.txt').write_text('\n')
    refused('too short: train has 0', input=tmp_path / 'empty.txt')
    refused('belongs to another dataset', out=os.path.join(DATA, 'arithmetic'))
    (notes / 'bad.md').write_bytes('é'.encode('latin-1'))
    refused('not UTF-8, 1 of 5 files: .*bad.md .byte 0.; .*--skip_bad=True')
    status, err = run_script('text')
    assert status == 1 and len(err.splitlines()) == 1 and '--input is missing' in err


def test_a_folder_of_your_own_is_a_dataset(tmp_path, notes, monkeypatch):
    monkeypatch.setattr(loader, 'HERE', str(tmp_path))
    own_text.prepare(tmp_path / 'mybook', notes)
    meta, data = loader.load_data('mybook')
    assert meta['name'] == 'mybook'
    assert canvas.decode(meta, data['train'].tolist())[0] == texts_of(tmp_path / 'mybook', meta)[0]
    with pytest.raises(UserError, match='did you mean mybook?'):
        loader.load_data('mybok')
    again = loader.data_of(dict(meta, name='arithmetic'), {})  # a checkpoint finds what it was trained on
    # one from before knew its name only
    assert again[0] == meta and loader.data_of({'name': 'mybook'}, {})[0] == meta
    first, other = (meta['itos'].index(c) for c in 'de')
    coarse = loader.data_of(meta, dict(coarse='de'))[1]['train']               # and with as few characters
    assert (coarse == first).sum() == np.isin(data['train'], [first, other]).sum()
    assert other not in coarse
    (tmp_path / 'mybook' / 'val.bin').unlink()
    command = 'python data/text/prepare.py --input=PATH'
    with pytest.raises(UserError, match=f'damaged.*make it again: {command} --out=data/mybook'):
        loader.load_data('mybook')
    (tmp_path / 'text').mkdir()
    (tmp_path / 'text' / 'prepare.py').write_text('raise SystemExit(1)')
    with pytest.raises(UserError, match=f'text is not there; make it with {command}$'):
        loader.load_data('text')

# -----------------------------------------------------------------------------
# data/meta.py and what the loader believes

SMALL = dict(name='small', format='stream', block_size=None, vocab_size=4, tokenizer='char', itos=[*'abcd'],
             bos=None, eos=None, pad=None)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The folder of a small dataset."""
    monkeypatch.setattr(loader, 'HERE', str(tmp_path))
    common.write_dataset(tmp_path / 'small', [0, 1, 2, 3] * 40, [0, 1, 2] * 40, SMALL)
    return tmp_path / 'small'


@pytest.mark.parametrize('name, values', [
    ('name', ['../../x', '..', '', 'a/b', 'a\\b', 'a\n', 3]), ('dataset', ['/etc', None]),
    ('format', ['row', [], None]), ('block_size', [-3, '8']), ('tokenizer', ['', None, 3]),
    ('vocab_size', [0, 4.0, True, '4', 65535]), ('train_tokens', [0, '9']), ('sha256', ['x']),
    ('itos', [None, [*'abc'], [*'abca'], [*'abc', 4], [*'abc', ''], 'abcd', {'a': 0}])])
def test_a_meta_is_not_believed(name, values):
    meta_module.check_meta(SMALL)
    for value in values:
        with pytest.raises(ValueError, match=f'{name}=.*makes no sense in the meta'):
            meta_module.check_meta({**SMALL, name: value})
    if name in SMALL:
        with pytest.raises(ValueError, match=f'the meta has no {name}'):
            meta_module.check_meta({key: value for key, value in SMALL.items() if key != name})


@pytest.mark.parametrize('changes, message', [
    (dict(bos=4), 'not ids below'), (dict(eos=-1, pad=2), 'not ids below'), (dict(bos=True), 'not ids below'),
    (dict(bos=1, eos=1, pad=2), 'each another'), (dict(eos=3), 'an eos, but no pad'),
    (dict(format='rows'), 'block_size=None'), (dict(tokenizer='gpt2'), 'itos='),
    (dict(vocab_size=50304, itos=None, tokenizer='gpt2'), "vocab_size=50304 is more than GPT-2's 50257")])
def test_fields_of_a_meta_that_do_not_fit_together(small, changes, message):
    with pytest.raises(ValueError, match=message):
        meta_module.check_meta({**SMALL, **changes})
    meta = json.loads((small / 'meta.json').read_text())
    for bad in ({**meta, **changes}, [meta], 'x'):
        (small / 'meta.json').write_text(json.dumps(bad))
        with pytest.raises(UserError, match='the dataset in data/small is damaged .*make it again'):
            loader.load_data('small')


def test_ids_that_are_no_tokens(small, monkeypatch):
    """[MASK] among them, or ids beyond the table of embeddings, would end in an error of a GPU."""
    ids = np.array(read_ids(small, 'train'), '<u2')
    for at in (0, len(ids) // 2, -1):
        wrong = ids.copy()
        wrong[at] = 4
        wrong.tofile(small / 'train.bin')
        for large in (2**28, 16):                              # of large files only blocks are looked at
            monkeypatch.setattr(meta_module, 'LARGE', large)
            monkeypatch.setattr(meta_module, 'BLOCK', 8)
            with pytest.raises(UserError, match='damaged .train.bin has the id 4, the 4 tokens end at 3'):
                loader.load_data('small')


def test_files_that_are_not_those_of_the_meta(small, monkeypatch):
    first = loader.load_data('small')[0]
    data = (small / 'val.bin').read_bytes()
    (small / 'val.bin').write_bytes(data[2:] + data[:2])
    with pytest.raises(UserError, match='not what it was when meta.json was written'):
        loader.load_data('small')
    monkeypatch.setattr(meta_module, 'LARGE', 16)
    assert loader.load_data('small')[0] == first


def test_which_task_a_dataset_has(small, tmp_path):
    """That of its own folder, or of the dataset whose prepare.py made it; never what meta.json likes."""
    def name(written):
        meta = dict(json.loads((small / 'meta.json').read_text()), name=written)
        (small / 'meta.json').write_text(json.dumps(meta))
        return loader.load_data('small')[0]['name']

    (tmp_path / 'maker').mkdir()
    assert name('maker') == name('elsewhere') == 'small'
    (tmp_path / 'maker' / 'prepare.py').write_text('')
    assert name('maker') == 'maker'                            # as arithmetic_large
    (small / 'task.py').write_text('')
    assert name('maker') == 'small'


class Evil:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def test_a_folder_of_nanogpt(tmp_path, monkeypatch, capsys, toy_gpt2):
    monkeypatch.setattr(loader, 'HERE', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'nano'
    folder.mkdir()
    np.array([0, 2, 1] * 50, np.uint16).tofile(folder / 'train.bin')
    np.array([1, 2] * 40, np.uint16).tofile(folder / 'val.bin')
    meta, data = loader.load_data('nano')
    assert (meta['tokenizer'], meta['vocab_size'], meta['format']) == ('gpt2', 50257, 'stream')
    assert data['train'][:3].tolist() == [0, 2, 1] and 'as nanoGPT makes it' in capsys.readouterr().out
    known = dict(vocab_size=3, itos={0: 'x', 1: 'y', 2: '\n'}, stoi={'x': 0, 'y': 1, '\n': 2})
    (folder / 'meta.pkl').write_bytes(pickle.dumps(known))
    (folder / 'prepare.py').write_text("import numpy\nids.tofile('train.bin')\n")
    meta, data = loader.load_data('nano')
    assert meta['itos'] == ['x', 'y', '\n'] and canvas.decode(meta, data['val'][:2].tolist())[0] == 'y\n'
    assert meta['val_tokens'] == 80 and meta['name'] == 'nano' and loader.data_of(meta, {})[0] == meta
    wrong = [Evil(), dict(known, itos=Evil()), [], dict(known, vocab_size=4), dict(known, vocab_size=2),
             dict(known, itos=['x', 'y', 'y']), dict(itos={})]
    for bad in (*map(pickle.dumps, wrong), b'', b'\x80\x04.'):
        (folder / 'meta.pkl').write_bytes(bad)
        with pytest.raises(UserError, match='data/nano is damaged'):
            loader.load_data('nano')
    assert not (tmp_path / 'ran').exists()
    (folder / 'meta.json.7.tmp').write_text('')                # ours, killed while its files were renamed
    assert not meta_module.is_nano(folder)


def test_a_prepare_script_of_nanogpt(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, 'HERE', str(tmp_path))
    (tmp_path / 'nano').mkdir()
    (tmp_path / 'nano' / 'prepare.py').write_text(
        'import os\nfor name in ("train.bin", "val.bin"):\n'
        '    open(os.path.join(os.path.dirname(__file__), name), "wb").write(bytes(300))\n')
    assert loader.load_data('nano')[0]['train_tokens'] == 150


def test_two_at_a_time(tmp_path, capfd):
    """The second waits for the first: what is there in the end is one of the two, whole."""
    started, results = threading.Event(), []

    def second():
        started.set()
        results.append(common.write_dataset(tmp_path, [3] * 9, [3] * 5, SMALL))

    with common.dataset_writer(tmp_path, dict(SMALL)) as add:
        (tmp_path / 'train.bin.123.tmp').write_text('torn')
        (tmp_path / 'mine.tmp').write_text('not ours')
        thread = threading.Thread(target=second)
        thread.start()
        started.wait()
        for split in ('train', 'val'):
            add(split, [1, 2])
        thread.join(0.2)
        assert thread.is_alive() and not results
    thread.join()
    assert sums(tmp_path) == results[0]['sha256'] and 'waiting: another process' in capfd.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'mine.tmp', 'train.bin', 'val.bin']


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(37, 'No locks available')

    if common.fcntl:
        monkeypatch.setattr(common.fcntl, 'flock', none)
    assert common.write_dataset(tmp_path, [3] * 9, [3] * 5, SMALL)['sha256'] == sums(tmp_path)


def test_a_disk_that_takes_nothing(tmp_path, text_file, monkeypatch):
    """The user hears of it in one line, and where it can be known before the text is tokenized."""
    def full(*args):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError) as error:
            own_text.prepare(tmp_path / 'out', text_file)
    message = configurator.of_the_machine(error.value, {})
    assert message == f"{tmp_path / 'out'}: No space left on device" and os.listdir(tmp_path / 'out') == []
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    for name in ('encode_chars', 'gpt2'):
        monkeypatch.setattr(common, name, None)
    text_file.write_text('one\ntwo\nthree\n')
    for how in (dict(), dict(tokenizer='gpt2'), dict(rows='line')):
        with pytest.raises(UserError, match=f'new: cannot be made a folder.*{tmp_path} cannot be written to'):
            own_text.prepare(tmp_path / 'new', text_file, **how)


def test_an_unknown_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, 'HERE', str(tmp_path))
    with pytest.raises(UserError, match='known: .*python data/text/prepare.py --input=PATH --out=data/foo'):
        loader.load_data('foo')

# -----------------------------------------------------------------------------
# data/wikitext2/prepare.py and data/openwebtext/prepare.py

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hugging Face's datasets, with a cache of its own and without the hub."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    datasets.disable_progress_bars()
    return datasets


WIKI = {'train': ['', ' = Title = ', '', ' A line <unk> , é . '] * 9,
        'validation': [' = Other = ', '', ' text ' * 20]}


def test_wikitext2_from_files(tmp_path, hub, toy_gpt2):
    """
    Text files and the hub's own format, in which only full lines keep their line break, give the same
    dataset.
    """
    for split, lines in WIKI.items():
        for kind in ('txt', 'parquet'):
            (tmp_path / kind).mkdir(exist_ok=True)
        text = ''.join(f'{line}\n' for line in lines)
        (tmp_path / 'txt' / f'{split}.txt').write_text(text, encoding='utf-8')
        rows = hub.Dataset.from_dict({'text': [line and f'{line}\n' for line in lines]})
        rows.to_parquet(tmp_path / 'parquet' / f'{split}-00000-of-00001.parquet')
    metas = [wikitext.prepare(tmp_path / 'out' / kind, tmp_path / kind) for kind in ('txt', 'parquet')]
    assert metas[0] == metas[1] and metas[0]['name'] == 'wikitext2' and metas[0]['tokenizer'] == 'gpt2'
    for split, lines in zip(('train', 'val'), WIKI.values()):
        text = ''.join(f'{line.rstrip()}\n' for line in lines)
        assert toy_gpt2.decode(read_ids(tmp_path / 'out' / 'txt', split)) == text


def test_wikitext2_that_cannot_be(tmp_path, hub, monkeypatch):
    (tmp_path / 'train.txt').write_bytes(b'\xff\n')
    with pytest.raises(UserError, match=r'expected train\*.txt and validation\*.txt'):
        wikitext.prepare(tmp_path / 'out', tmp_path)
    (tmp_path / 'validation.txt').write_text('text')
    with pytest.raises(UserError, match='cannot read the files in .*utf-8') as e:
        wikitext.prepare(tmp_path / 'out', tmp_path)
    assert '\n' not in str(e.value)

    def offline(*args, **how):
        assert args == ('Salesforce/wikitext',) and how['name'] == 'wikitext-2-raw-v1'
        assert how['split'] == ['train', 'validation']
        raise ConnectionError('no network\nat all')

    monkeypatch.setattr(hub, 'load_dataset', offline)
    message = 'cannot load Salesforce/wikitext .no network.*by hand and pass --input=FOLDER'
    with pytest.raises(UserError, match=message) as e:
        wikitext.prepare(tmp_path / 'out')
    assert '\n' not in str(e.value)
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match='pip install datasets'):
        wikitext.prepare(tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def split_documents(folder, split, encoding):
    """The documents of a split, read back; asserts that each of them ends."""
    ids = read_ids(folder, split)
    assert ids[-1] == 50256
    return encoding.decode(ids).split('<|endoftext|>')[:-1]


def test_openwebtext_from_files(tmp_path, hub, toy_gpt2, monkeypatch):
    monkeypatch.setattr(openwebtext, 'BATCH', 7)
    docs = [f'document {i} é' + ' and on' * (i % 5) for i in range(60)]
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'b.txt').write_text('\n'.join(docs[40:]), encoding='utf-8')
    # blank lines are no documents
    (tmp_path / 'in' / 'a.txt').write_text('\n \n'.join(docs[:40]) + '\n\n', encoding='utf-8')
    meta = openwebtext.prepare(tmp_path / 'out', tmp_path / 'in', num_proc=1)
    train, val = (split_documents(tmp_path / 'out', split, toy_gpt2) for split in ('train', 'val'))
    assert len(val) == 1 and train == [doc for doc in docs if doc not in val] and len(train) == 59
    assert meta == json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert meta['eos'] is None and meta['vocab_size'] == 50257
    again = openwebtext.prepare(tmp_path / 'again', tmp_path / 'in', num_proc=2)
    assert again['sha256'] == meta['sha256']                               # the same documents are held out
    monkeypatch.setattr(openwebtext, 'VAL_SHARE', 0.25)
    openwebtext.prepare(tmp_path / 'few', tmp_path / 'in', max_docs=20, num_proc=1)
    train, val = (split_documents(tmp_path / 'few', split, toy_gpt2) for split in ('train', 'val'))
    assert len(val) == 5 and sorted(train + val) == sorted(docs[:20])


def test_openwebtext_from_the_hub(tmp_path, hub, toy_gpt2, monkeypatch):
    asked, rows = [], hub.Dataset.from_dict({'text': [f'page {i}\n' for i in range(30)]})

    def load_dataset(name, split, streaming=False, **how):
        asked.append((name, split, streaming, how))
        return [rows.to_iterable_dataset() if streaming else rows]

    monkeypatch.setattr(hub, 'load_dataset', load_dataset)
    assert openwebtext.prepare(tmp_path / 'all', num_proc=3)['train_tokens'] > 200
    openwebtext.prepare(tmp_path / 'try', max_docs=4)
    assert asked == [(openwebtext.NAME, ['train'], False, {'num_proc': 3}),
                     (openwebtext.NAME, ['train'], True, {})]
    parts = [split_documents(tmp_path / 'try', split, toy_gpt2) for split in ('train', 'val')]
    assert sorted(sum(parts, [])) == [f'page {i}\n' for i in range(4)]
    rows = rows.select([0])
    for how in (dict(), dict(max_docs=1), dict(num_proc=0)):
        with pytest.raises(UserError):
            openwebtext.prepare(tmp_path / 'none', **how)
    assert not (tmp_path / 'none').exists()


def test_a_corpus_whose_script_nobody_runs_any_more(tmp_path, hub, toy_gpt2, monkeypatch):
    """datasets 4 refuses the scripts of old corpora; the hub keeps what they made in another branch."""
    asked, rows = [], hub.Dataset.from_dict({'text': [f'page {i}\n' for i in range(30)]})

    def load_dataset(name, split, revision=None, **how):
        asked.append(revision)
        if revision is None:
            raise RuntimeError('Dataset scripts are no longer supported, but found openwebtext.py')
        if len(asked) > 2:
            raise ConnectionError('no network')
        return [rows]

    monkeypatch.setattr(hub, 'load_dataset', load_dataset)
    assert openwebtext.prepare(tmp_path / 'all')['train_tokens'] > 200
    assert asked == [None, 'refs/convert/parquet']
    with pytest.raises(UserError, match='no network.*openwebtext/tree/refs%2Fconvert%2Fparquet/ by hand'):
        openwebtext.prepare(tmp_path / 'none')
    assert not (tmp_path / 'none').exists()


def test_openwebtext_interrupted(tmp_path, hub, toy_gpt2, monkeypatch):
    """What a stop in the middle of the work leaves: nothing, or the dataset that was there before."""
    (tmp_path / 'in.txt').write_text('one\ntwo\nthree\n')
    old = openwebtext.prepare(tmp_path / 'out', tmp_path, num_proc=1)

    def stop(*args, **how):
        raise KeyboardInterrupt

    stopping = SimpleNamespace(eot_token=50256, encode_ordinary_batch=stop)
    monkeypatch.setattr(openwebtext, 'gpt2', lambda: stopping)
    for name in ('out', 'new'):
        with pytest.raises(KeyboardInterrupt):
            openwebtext.prepare(tmp_path / name, tmp_path, num_proc=1)
    assert os.listdir(tmp_path / 'new') == []
    assert sorted(os.listdir(tmp_path / 'out')) == ['meta.json', 'train.bin', 'val.bin']
    assert sums(tmp_path / 'out') == old['sha256']


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    for name in ('arithmetic', 'sudoku', 'shakespeare_char', 'wikitext2', 'openwebtext'):
        script = load(f'{name}/prepare')
        for work in ('draw_splits', 'draw_boards', 'read_source', 'load_corpus', 'read_documents'):
            monkeypatch.setattr(script, work, None, raising=False)
        with pytest.raises(UserError, match='cannot be made a folder for a dataset'):
            script.prepare(f'{tmp_path}/file/x')


@pytest.mark.parametrize('error, message', [
    (OSError(errno.ENOMEM, 'Cannot allocate memory'), 'cannot be read: Cannot allocate memory'),
    (PermissionError(errno.EACCES, 'Permission denied', 'x'), 'x: cannot be read: Permission denied'),
    (FileNotFoundError(errno.ENOENT, 'No such file', 'x'), 'is damaged')])
def test_only_what_is_wrong_with_the_files_is_damage(monkeypatch, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(loader, 'read_dataset', fail)
    monkeypatch.setattr(loader.os.path, 'exists', lambda path: True)
    with pytest.raises(UserError, match=message):
        loader.load_data('arithmetic')


@pytest.mark.skipif(not os.path.exists('/dev/zero'), reason='no such device')
def test_a_device_without_end_is_no_text():
    with pytest.raises(OSError, match='it is a device'):
        common.read_text('/dev/zero')
    with pytest.raises(UserError, match='cannot be read: it is a device'):
        canvas.read_lines('/dev/zero')
