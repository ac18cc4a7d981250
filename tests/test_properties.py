"""
What holds for anything that comes from outside: texts, words of a command line, metas, checkpoints, paths.

Every property is a function of a random generator. It is tried with a fixed seed; where hypothesis is
installed it also chooses the random numbers, and looks for the smallest that fail. CASES=10000 tries more.
"""

import contextlib
import copy
import math
import os
import random
import string

import pytest
import torch

import configurator
from configurator import Setting, UserError
from conftest import ARITHMETIC, default_config, tiny_gpt
from data.meta import check_meta
from model import GPT
from plumbing.checkpoint import model_args
from plumbing.command import saved
from plumbing.files import check_output, to_json, write_atomically
from plumbing.rows import Ends
from plumbing.text import decode, encode, holes, pieces, read_lines, typed

try:
    from hypothesis import HealthCheck, given, settings, strategies
except ImportError:
    given = None

CASES = int(os.environ.get('CASES', 40))
# line ends that are none, half of a pair, signs of several code points, what is special here or elsewhere
ODD = [*'aB 0_\\\n\r\t·=+(', '\u2028', '\x85', '\x0c', '\ufeff', '\0', '\x1b', 'e\u0301', '😀', '👨\u200d👩',
       'שָׁ', '\u200f', '[MASK]', '<eos>', '<|endoftext|>', 'FILE', '{"', '"', "'", '\\n']
VALUES = [None, True, False, 0, 1, -1, 2, 17, 2**62, 2**63, 10**400, 0.0, 0.5, 1e300, math.nan, math.inf, '',
          'x', '../x', 'a/b', '\ud800', [], [1], ['a'], [['a']], {}, {'a': 1}, [0] * 18,
          list('0123456789abcdefgh')]


def some_text(rng, most=12):
    return ''.join(rng.choices(ODD, k=rng.randrange(most)))


def mutated(rng, value, *more):
    """A dict with one of its fields, however deep, gone or something else."""
    value = copy.deepcopy(value)
    part, key = value, rng.choice(sorted(value))
    while isinstance(part[key], dict) and part[key] and rng.random() < 0.7:
        part, key = part[key], rng.choice(sorted(part[key], key=str))
    if rng.random() < 0.1:
        del part[key]
    else:
        part[key] = rng.choice([*VALUES, *more])
    return value


# -----------------------------------------------------------------------------
# the properties


def texts_come_back(rng, folder):
    """What is encoded is decoded to the same text, token by token too; what has no token is named."""
    words = list(dict.fromkeys([*rng.sample(ODD, 8), *(some_text(rng, 4) for _ in range(4))]))
    words = [word for word in words if word]
    rng.shuffle(words)
    n, ends = len(words), rng.random() < 0.5
    special = dict(bos=n, eos=n + 1, pad=n + 2) if ends else dict(bos=None, eos=None, pad=None)
    meta = dict(ARITHMETIC, itos=words + ['<1>', '<2>', '<3>'] * ends, vocab_size=n + 3 * ends, **special)
    if len({*meta['itos']}) < len(meta['itos']) or ends and '·' in words:
        return
    text = ''.join(rng.choices(words, k=rng.randrange(9)))
    ids = encode(meta, text)
    assert decode(meta, [meta['bos'], *ids, meta['eos']] if ends else ids) == (text, ends)
    assert ''.join(piece for piece, _ in pieces(meta, ids)) == text
    with pytest.raises(UserError, match='is not in the vocabulary'):
        encode(meta, text + 'Z')


def lines_come_back(rng, folder):
    """A file has the lines that were written, with their numbers, whatever it is coded in."""
    lines = [some_text(rng).translate({10: '', 13: ''}) for _ in range(rng.randrange(6))]
    path, end = folder / 'lines', rng.choice(['\n', '\r\n'])
    path.write_bytes(end.join(lines).lstrip('\ufeff').encode(rng.choice(['utf-8', 'utf-8-sig', 'utf-16'])))
    lines = end.join(lines).lstrip('\ufeff').split(end)
    expected = [(number, line) for number, line in enumerate(lines, 1) if line]
    if expected:
        assert read_lines(str(path)) == expected
    else:
        with pytest.raises(UserError, match='there is no text in it'):
            read_lines(str(path))


def samples_come_back(rng, folder):
    """A sample that --save writes is read again with its text and tokens."""
    sample = dict(text=some_text(rng), tokens=[rng.randrange(9) for _ in range(3)], nelbo=math.nan)
    line = to_json(sample, ensure_ascii=rng.random() < 0.5)
    assert '\n' not in line and saved(line) == dict(text=sample['text'], tokens=sample['tokens'])


def any_line_is_a_sample_or_refused(rng, folder):
    lines = some_text(rng), to_json(rng.choice(VALUES)), '{"text": 1}', '[' * 9999
    with contextlib.suppress(UserError):
        assert type(saved(rng.choice(lines))['text']) is str


def holes_are_found(rng, folder):
    """Holes become masks, and what is between them stays as it was; a prompt is read without an error."""
    parts = [''.join(rng.choices('0123456789()+*=', k=rng.randrange(4))) for _ in range(rng.randrange(2, 5))]
    ids, ends = holes(ARITHMETIC, '_'.join(parts), None, 18)
    shown = '_'.join(parts) if ends else '_'.join(parts)[:-1]       # at the very end it is no token yet
    assert ends == bool(parts[-1])
    assert [decode(ARITHMETIC, [i])[0] if i != 18 else '_' for i in ids] == list(shown)
    assert typed(ARITHMETIC, some_text(rng).replace('FILE', '')) is not None


def values_are_of_their_type(rng, folder):
    """A word becomes a value of the setting's type that float32 and int64 hold, or an error names it."""
    kind = rng.choice([None, *configurator.TYPES.values()])
    default = rng.choice([None, kind()]) if kind else None
    setting = Setting(rng.choice(['steps', 'save']), default, kind, '', [], None)
    number = rng.choice('{} -{} 1e{} 1e-{} {}.5 ({},) [{}] "{}" {}_0 2**{} 0x{}'.split())
    number = number.format(rng.randrange(10**rng.randrange(1, 22)))
    odd = ''.join(rng.choices(string.printable, k=rng.randrange(6)))
    text = rng.choice([some_text(rng), repr(rng.choice(VALUES)), number, odd])
    try:
        value = configurator.check(setting, configurator.read(setting, text))
    except UserError as error:
        assert str(error).startswith('steps ') or str(error).startswith('save ')
        return
    assert value is None or kind is None or type(value) is kind
    for number in value if isinstance(value, (tuple, list)) else [value]:
        if type(number) in (int, float):
            assert math.isfinite(number) and abs(number) < (2**127 if kind is float else 2**62)
    assert configurator.check(setting, value) == value
    if kind not in (str, None):
        assert configurator.check(setting, configurator.read(setting, repr(value))) == value


def messages_are_one_line(rng, folder):
    line = configurator.one_line(some_text(rng, 30) * rng.choice([1, 1000]))
    assert line.isprintable() and len(line) <= 2000


def metas_are_checked(rng, folder):
    """What check_meta lets through encodes, decodes and goes to JSON and back."""
    meta = dict(ARITHMETIC, train_tokens=640, val_tokens=64, sha256={'train.bin': 'x'}, given=[3])
    meta = mutated(rng, meta)
    try:
        check_meta(meta)
    except ValueError:
        return
    text, _ = decode(meta, list(range(meta['vocab_size'])))
    special = [meta[name] for name in ('bos', 'eos', 'pad')]
    assert {*Ends.of(meta).forbid} <= {*range(meta['vocab_size'])}
    assert type(text) is str
    assert all(encode(meta, word) for i, word in enumerate(meta['itos']) if i not in special)


def checkpoint():
    model = tiny_gpt(18, 8, n_recur=1)
    return dict(model=model.state_dict(), ema=None, iter_num=7, model_args=model_args(model.config),
                config=default_config(block_size=8), meta=ARITHMETIC)


def checkpoints_are_checked(rng, folder, good=[]):
    """A checkpoint with another field is refused in a line, or computes."""
    good.append(good.pop() if good else checkpoint())
    path, zeros = str(folder / 'ckpt.pt'), torch.zeros(2)
    torch.save(mutated(rng, good[0], zeros, zeros.to_sparse(), zeros.bool()), path)
    try:
        model, read = GPT.load(path)
    except UserError as error:
        assert str(error).startswith(path) and '\n' not in str(error)
        return
    T = min(4, model.config.block_size)
    assert model(torch.zeros(1, T, dtype=torch.long)).shape == (1, T, model.config.n_embd)
    assert type(read['config']['training_type']) is str and 0 <= read['config']['causal_ratio'] <= 1


def bytes_of_checkpoints_are_checked(rng, folder, good=[]):
    """A checkpoint with a byte changed or its end gone is refused, or holds the same numbers."""
    path = folder / 'ckpt.pt'
    if not good:
        torch.save(checkpoint(), path)
        good.append(path.read_bytes())
    damaged = bytearray(good[0])
    if rng.random() < 0.2:
        del damaged[rng.randrange(len(damaged)):]
    else:
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)
    try:
        model, _ = GPT.load(str(path))
    except UserError as error:
        assert str(error).startswith(str(path)) and '\n' not in str(error)
        return
    whole = checkpoint()['model']
    assert all(torch.equal(whole[name], tensor) for name, tensor in model.state_dict().items())


def outputs_are_checked(rng, folder):
    """What check_output accepts can be written, whole, and nothing is left; what it refuses stays."""
    place = folder / 'place'
    place.mkdir(exist_ok=True)
    for name in ('file', 'folder/file', 'link', 'circle', 'dangling', 'into'):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).unlink(missing_ok=True)
    (place / 'new').unlink(missing_ok=True)
    (place / 'file').write_text('old')
    for name, to in dict(link='file', circle='circle', dangling='new', into='nowhere/new').items():
        os.symlink(to, place / name)
    name = rng.choice(['file', 'folder', 'link', 'circle', 'dangling', 'into', 'new', 'no/new', 'file/new',
                       'folder/new', '[b]*?', "a 'b\"", 'ü😀', 'x\ny', 'x' * 300, 'x' * 255, 'x' * 250,
                       'x/' * 2500, '.', '..', '', '-x', '~', some_text(rng).replace('\0', '')])
    path = f'{place}/{name}'
    try:
        check_output(path)
    except UserError:
        assert (place / 'file').read_text() == 'old'
        return
    write_atomically(path, 'a\u2028b')
    with open(path, encoding='utf-8') as file:
        assert file.read() == 'a\u2028b'
    assert not [*place.rglob('*.tmp')]
    os.remove(path)


PROPERTIES = [texts_come_back, lines_come_back, samples_come_back, any_line_is_a_sample_or_refused,
              holes_are_found, values_are_of_their_type, messages_are_one_line, metas_are_checked,
              checkpoints_are_checked, bytes_of_checkpoints_are_checked, outputs_are_checked]


@pytest.mark.parametrize('holds', PROPERTIES, ids=lambda holds: holds.__name__)
def test_property(holds, tmp_path):
    for seed in range(CASES):
        holds(random.Random(seed), tmp_path)


@pytest.mark.skipif(given is None, reason='hypothesis is not installed')
@pytest.mark.parametrize('holds', PROPERTIES, ids=lambda holds: holds.__name__)
def test_property_by_hypothesis(holds, tmp_path):
    some = given(strategies.randoms(use_true_random=False))
    how = settings(max_examples=CASES, deadline=None, database=None, derandomize=True,
                   suppress_health_check=list(HealthCheck))
    how(some(lambda rng: holds(rng, tmp_path)))()
