"""The suite of repair that changes lengths: its errors, its distance, its dictionary and its rows."""

import random
import sys
from types import SimpleNamespace

import pytest
from conftest import tiny_gpt, write_checkpoint
from test_commands import bench_settings
from test_text import META, words  # noqa: F401 (a fixture)

from configurator import UserError
from model import GPT
from plumbing.text import load_task
from suites import repair, runs

LETTERS = 'abcdef '


@pytest.mark.parametrize('text, clean, edits, kept', [
    ('abcd', 'abcd', 0, {0, 1, 2, 3}), ('abd', 'abcd', 1, {0, 1, 3}), ('abbcd', 'abcd', 1, {0, 1, 2, 3}),
    ('axcd', 'abcd', 1, {0, 2, 3}), ('', 'ab', 2, set()), ('ab', '', 2, set()), ('bacd', 'abcd', 2, {2, 3})])
def test_compare(text, clean, edits, kept):
    assert repair.compare(text, clean) == (edits, kept)


@pytest.mark.parametrize('level, most', [(0.0, 0), (0.1, 2), (1.0, 2)])
def test_errors(level, most):
    """As many characters are hit as asked for; each takes at most two edits; what is spared is there."""
    rng, text = random.Random(1), ''.join(random.Random(0).choices(LETTERS, k=400))
    found, spared = repair.hit(text, level, LETTERS, rng)
    edits, kept = repair.compare(found, text)
    hits = 400 * level
    assert edits <= most * hits * 1.5 and (edits > hits / 3 or not level)
    assert len(set(spared) - kept) <= edits and (found == text) == (not level)


def test_without_a_dictionary(monkeypatch):
    repair.dictionary.cache_clear()
    monkeypatch.setitem(sys.modules, 'symspellpy', None)
    with pytest.raises(UserError, match='pip install symspellpy'):
        repair.dictionary('any')


def test_the_dictionary(monkeypatch):
    """Unknown words become the commonest known one beside them; capitals stay."""
    pytest.importorskip('symspellpy')
    monkeypatch.setattr(repair, 'corpus_of', lambda name: 'the the cat sat, then')
    repair.dictionary.cache_clear()
    assert repair.dictionary('any')('Thee cet sat; xyzzy') == 'The cat sat; xyzzy'
    repair.dictionary.cache_clear()


def test_rows(words, tmp_path, monkeypatch):  # noqa: F811
    """What takes no network leaves what it was given; clean windows are 0 errors; all ways give shares."""
    monkeypatch.setattr(repair, 'MARGIN', 4)
    changes = dict(corruption='noise', remask_target='edits', block_size=16, dataset='words')
    path = write_checkpoint(tmp_path / 'a.pt', tiny_gpt(4, 16), META, **changes)
    s = SimpleNamespace(num_samples=5, num_seeds=2, seed=1, batch_size=4)

    def row(way, level, **how):
        how.update(way=way, level=level)
        return repair.text_rows(s, lambda run: GPT.load(path), way, 'text', how)[0]
    assert row('nothing', 0.0)['after'] == 0 and row('nothing', 0.0)['n'] == 5
    nothing, network = row('nothing', 0.3), row('--task=repair', 0.3, remask_threshold=0.2)
    assert nothing['before'] == nothing['after'] == network['before'] > 0 and nothing['touched'] == 0
    assert network['touched'] > 0 and network['nfe'] >= 1 and network['n'] == 10
    assert row('--task=repair', 0.3, remask_threshold=1.0)['touched'] == 0


def test_arithmetic(tmp_path, monkeypatch):
    s = bench_settings('--suite=repair', f'--out_dir={tmp_path}', '--num_samples=6', '--only=arithmetic')

    def execute(command, log, mode):
        folder = next(word for word in command if word.startswith('--out_dir=')).partition('=')[2]
        edits = '--remask_target=edits' in command
        write_checkpoint(f'{folder}/ckpt_joint.pt', tiny_gpt(18, 64, n_recur=1), max_iters=7,
                         corruption='own:0.4,noise:0.6', remask_target='edits' if edits else 'original')
        return 0
    monkeypatch.setattr(runs, 'execute', execute)
    rows, table = repair.run(s)
    found = {kind: [row for row in rows if row['table'] == kind] for kind in repair.METRICS}
    assert [len(some) for some in found.values()] == [0, 4, 3, 4] and 'arithmetic with edits' in table
    before, _, after, _ = found['arithmetic']                       # nothing, of both
    assert before == {**after, 'name': before['name']} and before['aligned'] > before['accuracy']
    assert all(0 <= row[name] <= 1 for row in found['arithmetic'] for name in ('aligned', 'exact'))


@pytest.mark.parametrize('text, what, right', [
    ('(+12)=33', 'inserted', ['(+12)=3']),                          # one of two equal tokens: one text
    ('(+112)=3', 'inserted', ['(+12)=3']), ('7=77', 'inserted', ['7=7']),
    ('(+12)=', 'lost', ['(+12)=3']), ('(+1)=3', 'lost', ['(+12)=3', '(+21)=3']),
    ('(12)=2', 'lost', ['(*12)=2']), ('(+102)=2', 'inserted', ['(+02)=2'])])
def test_what_a_string_may_have_been(text, what, right):
    """All strings an edit away are tried; the right ones among them are what it may have been."""
    score = load_task('arithmetic').score
    letters = '0123456789()+*='
    assert sorted(t for t in repair.an_edit_away(text, what, letters) if score([t])['correct']) == right


@pytest.mark.parametrize('what', repair.ONE)
def test_one_token(what, tmp_path, monkeypatch):
    """Who restores all has 1 of the clear cases; who does nothing has 0, and what is ambiguous is counted."""
    path, seen = write_checkpoint(tmp_path / 'a.pt', tiny_gpt(18, 64), corruption='noise'), []
    s = SimpleNamespace(num_samples=60, num_seeds=1, seed=1, batch_size=64)

    def row(mend):
        def written(s, model, checkpoint, task, texts):
            seen.extend(texts)
            return [dict(text=mend(number, text)) for number, text in enumerate(texts)], 2.0
        monkeypatch.setattr(repair, 'written', written)
        return repair.single_rows(s, lambda run: GPT.load(path), what, 'arithmetic', dict(what=what))[0]
    clean = repair.held_out(s, GPT.load(path))[3]
    best, worst = row(lambda number, text: clean[number]), row(lambda number, text: text)
    assert best['exact'] == best['correct'] == 1 and worst['exact'] == 0 and worst['correct'] < 0.2
    assert best['ambiguous'] == worst['ambiguous'] and 0 < best['ambiguous'] < 1
    step = 1 if what == 'inserted' else -1
    assert all(len(noisy) == len(text) + step for noisy, text in zip(seen, clean))
