"""A training run as a whole: what ends it, what it keeps, and what it says when it goes on."""

import contextlib
import os
import signal

import pytest
import torch
from conftest import ARITHMETIC
from test_train import MIXED, PLAIN, arithmetic_rows, newest, read, start

from configurator import UserError
from plumbing import run as run_module
from plumbing import text
from plumbing.log import draw_curves, show_repairs
from plumbing.run import SIGNALS


@pytest.mark.parametrize('words', [['--proofreading_warmup_iters=0'], ['--corruption=random']])
def test_a_run_that_diverges_is_told_so(tmp_path, words):
    """Own guesses are drawn before there is a loss: not even they may fail where the logits are NaN."""
    with pytest.raises(UserError, match='no longer finite at step .*: lower --learning_rate'):
        start(str(tmp_path), *MIXED, *words, '--learning_rate=1e30', '--muon_lr=1e30', '--max_iters=40',
              '--eval_interval=1000', '--warmup_iters=0')


@pytest.mark.parametrize('name', SIGNALS)
def test_what_ends_a_run_lets_it_save_first(tmp_path, capsys, name):
    def patch(module):
        rows, once = module.random_rows, [getattr(signal, name)]

        def random_rows(*args):
            if once:
                os.kill(os.getpid(), once.pop())
            return rows(*args)
        module.random_rows = random_rows

    handlers = {getattr(signal, other): signal.getsignal(getattr(signal, other)) for other in SIGNALS}
    try:
        start(str(tmp_path), *PLAIN, '--max_iters=5', '--eval_interval=100', patch=patch)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out = capsys.readouterr().out
    assert read(str(tmp_path))['iter_num'] == 1
    assert 'finishing the step' in out and '--init_from=resume' in out


def test_an_ignored_signal_stays_ignored(tmp_path):
    """nohup has a closed terminal ignored, and so it stays."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        start(str(tmp_path), *PLAIN, '--max_iters=1')
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize('values, kept', [
    ((5, 4, 3), None), ((5, 3, 4), 2), ((3, 4, 5), 1), ((3, 4, 2), None), ((4, float('nan'), 5), 1)])
def test_the_checkpoint_of_the_lowest_validation_loss_is_kept(tmp_path, capsys, monkeypatch, values, kept):
    found = iter((9, *values))

    def patch(module):
        module.evaluate = lambda *args, **more: dict(nelbo=next(found), nelbo_se=None)
    start(str(tmp_path), *PLAIN, '--max_iters=3', '--eval_interval=1', patch=patch)
    best, = [*tmp_path.glob('*_best.pt')] or [None]
    assert (best is None) == (kept is None)
    if best:
        assert torch.load(best, weights_only=True)['iter_num'] == kept
        assert f'the lowest validation loss was at step {kept}: {best}' in capsys.readouterr().out
        os.remove(best)
    assert read(str(tmp_path))['iter_num'] == 3


def test_a_run_that_goes_on_says_what_is_other_than_before(tmp_path, capsys):
    start(str(tmp_path), *PLAIN, '--max_iters=2')
    capsys.readouterr()
    start(str(tmp_path), *PLAIN, '--max_iters=2', '--init_from=resume', '--eval_only')
    assert 'settings that are not' not in capsys.readouterr().out
    start(str(tmp_path), *PLAIN, '--max_iters=3', '--init_from=resume', '--batch_size=2', '--seed=5')
    out = capsys.readouterr().out
    assert 'settings that are not those of the checkpoint: ' in out
    assert 'max_iters 2 -> 3' in out and 'batch_size 4 -> 2' in out and 'seed 1337 -> 5' in out


def test_resuming_what_is_not_there_names_what_is(tmp_path):
    with pytest.raises(UserError, match='no checkpoint to resume from; start the run without'):
        start(str(tmp_path), *PLAIN, '--init_from=resume')
    start(str(tmp_path), *PLAIN, '--max_iters=1')
    with pytest.raises(UserError, match=f'there is {newest(str(tmp_path))}: give its --training_type'):
        start(str(tmp_path), *PLAIN, '--init_from=resume', '--training_type=joint', '--corruption=random')


def test_curves_that_cannot_be_drawn_end_nothing(tmp_path, capsys, monkeypatch):
    def broken(log, path):
        raise AttributeError('an old numpy')
    monkeypatch.setattr('plumbing.log.curves', broken)
    with pytest.raises(UserError, match='curves.png: not drawn: an old numpy'):
        draw_curves('log.jsonl', 'curves.png')
    monkeypatch.setattr(run_module, 'draw_curves', draw_curves)
    start(str(tmp_path), *PLAIN, '--max_iters=1')
    assert 'not drawn: an old numpy; the run goes on' in capsys.readouterr().out
    assert read(str(tmp_path))['iter_num'] == 1


@pytest.fixture
def task_of_mine(tmp_path, monkeypatch):
    """Where the task.py of a dataset 'mine' is looked for."""
    monkeypatch.setattr(text, '__file__', str(tmp_path / 'plumbing' / 'text.py'))
    (tmp_path / 'data' / 'mine').mkdir(parents=True)
    text.load_task.cache_clear()
    yield tmp_path / 'data' / 'mine' / 'task.py'
    text.load_task.cache_clear()


@pytest.mark.parametrize('source, message', [
    ('1 / 0', 'task.py: ZeroDivisionError'), ('def score(', 'task.py: SyntaxError'),
    ('verdict = 3\nscore = len', 'verdict is no function')])
def test_a_task_that_cannot_be_used(task_of_mine, source, message):
    task_of_mine.write_text(source)
    with pytest.raises(UserError, match=message):
        text.load_task('mine')


CHARS = dict(name='mine', format='rows', tokenizer='char', itos=[*'ab', '<bos>', '<eos>', '<pad>'],
             vocab_size=5, bos=2, eos=3, pad=4)


@pytest.mark.parametrize('source, message', [
    ('', ''), ('def draw(rng): return "ab"', ''), ('def draw(rng): return "ab", 3', ''),
    ('def draw(rng): return "xy"', "draw.rng.: UserError: 'x' in 'xy' is not in the vocabulary"),
    ('def score(texts): return dict(good=1.0)', ''),
    ('def score(texts, train=None): return dict(valid=1, correct=0.5, n=2)', ''),
    ('def score(texts): return dict(good="1")', 'score.texts.: TypeError: a dict of numbers is wanted'),
    ('def score(texts): return 1 / 0', 'score.texts.: ZeroDivisionError'),
    ('LINE = "{right}"\ndef score(texts): return {}', "LINE: KeyError: 'right'"),
    ('def verdict(text): return text == "ab"', 'verdict.text.: TypeError: a text is wanted, got True'),
    ('def verdict(text): return text[5]', 'verdict.text.: IndexError')])
def test_a_task_is_tried_when_training_starts(task_of_mine, source, message):
    """All that it may have is optional; what it has is tried on held-out rows."""
    task_of_mine.write_text(source)
    data = dict(val=torch.tensor([[2, 0, 1, 3, 4]]))
    refused = pytest.raises(UserError, match=f'data/mine/task.py: {message}')
    with refused if message else contextlib.nullcontext():
        text.check_task(CHARS, data)
    task = text.load_task('mine')
    if not message:
        assert text.sample_line('ab', task) == 'ab'
        assert set(text.scored(task, ['ab'])) <= {'valid', 'correct', 'n', 'good'}


def test_a_mistake_is_put_in_and_repaired(capsys):
    """One token of the text is another one then, never its end or padding; repair sees it in its row."""
    rows = arithmetic_rows(40)
    end = (rows == ARITHMETIC['eos']).long().argmax(1)
    for seed in range(5):
        seen = []

        def repair(ids, fixed):
            seen.append(ids)
            return [dict(text='(+12)=3')] * len(ids)
        show_repairs(repair, rows, ARITHMETIC, seed)
        changed = seen[0] != rows
        assert (changed.sum(1) == 1).all() and (changed.long().argmax(1) < end).all()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 40 and all('repaired: (+12)=3  (was: ' in line for line in lines)


def test_an_empty_text_has_no_mistake(capsys):
    rows = torch.full((2, 64), ARITHMETIC['pad'])
    rows[:, 0], rows[:, 1] = ARITHMETIC['bos'], ARITHMETIC['eos']
    show_repairs(lambda ids, fixed: [dict(text='')] * len(ids), rows, ARITHMETIC, 0)
    assert capsys.readouterr().out.count('one token wrong:   repaired:   (as it was)') == 2
