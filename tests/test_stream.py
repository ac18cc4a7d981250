"""--stream: what is printed early stays, it comes early, and all of it is what is printed without."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ARITHMETIC, load_script, run_main, tiny_gpt, write_checkpoint

import configurator
from configurator import UserError
from plumbing import command, text
from plumbing.command import Stream
from plumbing.text import PAD
from sample import generate

V, SIZE, MASK = 5, 16, 5
STREAM = dict(ARITHMETIC, name='text', format='stream', block_size=None, vocab_size=V, itos=[*'ab \n.'],
              bos=None, eos=None, pad=None)
ROWS = dict(ARITHMETIC, block_size=SIZE, vocab_size=V, itos=[*'ab', '<bos>', '<eos>', '<pad>'], bos=2, eos=3,
            pad=4)


class Listener(list):
    """A trace that keeps what was settled, and how many canvases there were before."""

    def __init__(self):
        super().__init__()
        self.told = []

    def begin(self, fixed):
        return self

    def settle(self, canvas):
        self.told.append((len(self), canvas.clone()))


WRONG = dict(remask='wrong', steps=40)
BLOCKS = dict(block_length=4, remask='wrong', steps=48, remask_patience=0.0)
REVISED = dict(BLOCKS, revise=True)
ROW, LONG_ROW = None, 40     # lengths: of a row with an end, and of a text in windows
ORDERED = [(dict(remask='causal'), ROW), (dict(ar_prefix=50), ROW), (BLOCKS, ROW), (REVISED, ROW),
           (dict(remask='causal'), 16), (dict(ar_prefix=50), 16), (BLOCKS, 16), (REVISED, 16),
           (dict(BLOCKS, ar_prefix=5), 16), (dict(remask='causal'), LONG_ROW), (WRONG, LONG_ROW),
           (dict(REVISED, block_length=3), LONG_ROW), (dict(WRONG, ar_prefix=3), LONG_ROW)]


@pytest.mark.parametrize('rules, length', ORDERED, ids=str)
def test_what_is_settled_stays(rules, length):
    """To the last canvas, in every row."""
    model, trace, meta = tiny_gpt(V, SIZE, n_layer=2), Listener(), STREAM if length else ROWS
    lengths = length and torch.full((6,), length)
    samples = generate(model, meta, 6, lengths=lengths, trace=trace, **rules)
    assert len(trace.told) > 1
    for number, canvas in trace.told:
        known = canvas != MASK
        assert all(torch.equal(later[known], canvas[known]) for later in trace[number:])
        assert (known.long().diff(dim=1) <= 0).all()                # from the left on
    for ids, sample in zip(trace[-1].tolist(), samples):
        assert ids[:len(sample['tokens'])] == sample['tokens']

    # something is known while other places are not; where tokens are taken back, not all that is visible is
    assert any((canvas != MASK).any() and (canvas == MASK).any() for _, canvas in trace.told)
    back = [(old >= 0) & (old != MASK) & (new != old) for old, new in zip(trace, trace[1:])]
    assert torch.stack(back).any() == (rules.get('remask') == 'wrong')


def test_a_block_is_known_when_it_is_committed():
    """With revise one block later, but for the last one."""
    model = tiny_gpt(V, SIZE)
    for revise, known in ((False, [4, 8, 12, 16]), (True, [0, 4, 8, 16])):
        trace = Listener()
        generate(model, STREAM, 2, trace=trace, **dict(BLOCKS, revise=revise))
        assert [(canvas[0] != MASK).sum().item() for _, canvas in trace.told] == known


# -----------------------------------------------------------------------------
# the printer by hand


def printer(meta=STREAM, prompt='', stop=None):
    return Stream(SimpleNamespace(meta=meta, task=None), prompt, stop)


def told(capsys, stream, *canvases):
    """What each of these settled canvases prints."""
    found = []
    for rows in canvases:
        stream.settle(torch.tensor(rows))
        found.append(capsys.readouterr().out)
    return found


LINE = '\n' + '-' * 15 + '\n'


def test_one_text_after_the_other(capsys):
    stream, _ = printer(), capsys.readouterr()
    rows = [[0, MASK, MASK], [1, 1, 1]], [[0, 1, MASK], [1, 1, 1]], [[0, 1, 0], [1, 1, 1]]
    assert told(capsys, stream, *rows) == ['a', 'b', f'a{LINE}bbb{LINE}']
    assert told(capsys, stream, *rows) == ['', '', '']              # the batch is printed
    stream.append(torch.tensor(rows[2]))
    stream.begin(None)                                              # and the next one begins
    assert told(capsys, stream, rows[0]) == ['a']


def test_what_may_be_the_beginning_of_the_stop_waits(capsys):
    stream = printer(prompt='.ab', stop='.ab')
    rows = [[4, 0, 1, MASK, MASK, MASK, MASK, MASK], [4, 0, 1, 0, 4, 0, MASK, MASK],
            [4, 0, 1, 0, 4, 0, 0, MASK], [4, 0, 1, 0, 4, 0, 0, 4]]
    assert told(capsys, stream, *[[row] for row in rows]) == ['.ab', 'a', '.', f'aa.{LINE}']
    stream = printer(prompt='.ab', stop='.ab')
    rows = [[4, 0, 1, 4, 0, MASK], [4, 0, 1, 4, 0, 1]]
    assert told(capsys, stream, *[[row] for row in rows]) == ['.ab', LINE]


def test_ends_and_padding_wait_until_it_is_known_what_they_are(capsys):
    stream = printer(ROWS)
    rows = [[2, 0, 4, 4, MASK, MASK], [2, 0, 4, 4, 1, MASK], [2, 0, 4, 4, 1, 3]]
    assert told(capsys, stream, *[[row] for row in rows]) == ['', f'a{PAD}{PAD}b', LINE]
    assert told(capsys, printer(ROWS), [[2, 3, 4, 4, 4, 4]]) == [f'(empty){LINE}']


def test_half_a_character_waits(capsys, monkeypatch):
    """In tokens that are bytes."""
    monkeypatch.setattr(text, 'gpt2', lambda: SimpleNamespace(
        encode=lambda text, **how: [*text.encode()],
        decode=lambda ids: bytes(ids).decode('utf-8', errors='replace')))
    ids, mask = list('né 猫!'.encode()), 256
    stream = printer(dict(STREAM, tokenizer='gpt2', vocab_size=mask, itos=None))
    rows = [[ids[:n] + [mask] * (len(ids) - n)] for n in range(1, len(ids) + 1)]
    found = told(capsys, stream, *rows)
    assert found == ['n', '', 'é', ' ', '', '', '猫', f'!{LINE}']


def test_control_characters_are_signs_and_no_more_are_printed_than_without(capsys, monkeypatch):
    stream = printer(dict(STREAM, itos=['\x1b', '\x85', ' ', '\n', '.']))
    assert told(capsys, stream, [[0, 1, MASK]], [[0, 1, 4]]) == ['␛\\x85', f'.{LINE}']
    monkeypatch.setattr(command, 'SHOWN', 2)
    stream = printer()
    assert told(capsys, stream, [[0], [1], [0]]) == [f'a{LINE}b{LINE}']


# -----------------------------------------------------------------------------
# the command


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('out')
    more = dict(training_type='joint', causal_ratio=0.5, block_lengths=(4, 8))
    write_checkpoint(folder / 'text.pt', tiny_gpt(V, SIZE, n_recur=1), STREAM, **more)
    write_checkpoint(folder / 'rows.pt', **more)
    write_checkpoint(folder / 'plain.pt', training_type='unmasking')
    return folder


def command_line(folder, words):
    name, *words = words.split()
    return f'--init_from={folder}/{name}.pt', '--device=cpu', '--dtype=float32', *words


INTELLIGENT = '--preset=intelligent --block_length=4'
WORDS = ['text', 'text --ar_prefix=16 --remask=none', 'text --num_samples=2 --batch_size=1',
         'text --prompt=ab --stop=b', 'rows', 'rows --num_samples=55 --batch_size=20', 'rows --prompt=(+',
         'rows --ar_prefix=64 --remask=none',
         # blocks
         f'text {INTELLIGENT}', f'text {INTELLIGENT} --revise=True', 'rows --block_length=4 --length=9',
         'rows --block_length=8 --remask=wrong --revise=True',
         # windows
         'text --length=50', 'text --length=50 --remask=wrong --steps=6',
         'text --length=50 --prompt=ab --stop=a.', f'text {INTELLIGENT} --revise=True --length=41']


@pytest.mark.parametrize('words', WORDS)
def test_what_is_printed_is_what_is_printed_without(folder, words):
    words = command_line(folder, words)
    plain, live = (run_main('sample', *words, *more).split('\n') for more in ((), ('--stream',)))
    says = [n for n, line in enumerate(plain) if 'passes (NFE)' in line]
    assert len(says) == 1 and plain[:says[0]] == live[:says[0]] and max(map(len, plain[:says[0]])) > 0
    same = [line[says[0]].partition(';')[0] for line in (plain, live)]      # but for the seconds
    assert same[0] == same[1] and len(live) == len(plain) + 1       # which says that it was told to


class Watched:
    """A stream that notes how many passes there were when something came."""

    def __init__(self, passes):
        self.passes, self.came = passes, []

    def write(self, text):
        if text:
            self.came.append((len(self.passes), text))

    def flush(self):
        pass


@pytest.mark.parametrize('words', ['text --length=50', 'text --block_length=4 --preset=intelligent',
                                   'text --length=50 --remask=wrong --steps=6', 'rows --remask=causal'])
def test_it_comes_while_it_is_written(folder, monkeypatch, words):
    script, passes = load_script('sample'), []
    configurator.configure(vars(script), [*command_line(folder, words), '--stream'])
    first = script.Handle.load.__globals__['GPT'].forward
    monkeypatch.setattr(script.Handle.load.__globals__['GPT'], 'forward',
                        lambda *args, **more: (passes.append(1), first(*args, **more))[1])
    monkeypatch.setattr(sys, 'stdout', Watched(passes))
    script.main()
    came = [number for number, _ in sys.stdout.came]
    assert came[0] < len(passes) / 2 and len({*came}) > 3 and came == sorted(came)


@pytest.mark.parametrize('words, message', [
    ('text --remask=wrong', 'writes in any order: use --remask=causal'),
    ('plain', 'writes in any order'),
    ('text --ar_prefix=16 --remask=wrong', 'writes in any order'),
    ('text --animate', 'not with --animate'),
    ('text --html=x.html --score', 'not with --html or --score'),
    ('text --best_of=2', 'not with --best_of'),
    ('text --preset=speculative,ancestral', 'not with several presets'),
    ('text --task=repair --text=ab', 'not with --task=repair')])
def test_what_cannot_be_printed_from_left_to_right(folder, words, message):
    with pytest.raises(UserError, match=message):
        run_main('sample', *command_line(folder, words), '--stream')
