"""A checkpoint from Python: the methods of parts.handle, which are those of the commands."""

import doctest
import json
import os
import string
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ARITHMETIC, ROOT, run_main, tiny_gpt, write_checkpoint

from configurator import UserError
from parts import handle
from plumbing.rows import Tally
from plumbing.text import PAD, decode, encode, marked_words
from sample import load

STREAM = dict(ARITHMETIC, name='text', format='stream', block_size=None, vocab_size=5, itos=[*'ab \n.'],
              bos=None, eos=None, pad=None)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('out')
    more = dict(training_type='joint', causal_ratio=0.5)
    write_checkpoint(folder / 'ckpt_joint_all_positions.pt', **more)
    write_checkpoint(folder / 'text.pt', tiny_gpt(5, 16, n_recur=1), STREAM, **more)
    write_checkpoint(folder / 'plain.pt', training_type='unmasking')
    write_checkpoint(folder / 'judge.pt', tiny_gpt(18, 64, seed=1, n_recur=1), training_type='remasking')
    return folder


@pytest.fixture(scope='module')
def m(folder):
    return load(str(folder), device='cpu', dtype='float32')


def test_the_examples_of_its_docstrings(m):
    found = doctest.testmod(handle, extraglobs=dict(m=m))
    assert found.attempted > 8 and not found.failed


def test_samples(m, capsys):
    one, two = m.generate(2, prompt='(+', length=9, seed=3)
    assert [*map(type, (one, two))] == [handle.Sample] * 2 and one.text != two.text
    assert str(one) == one.text == one['text'] and one.text.startswith('(+') and one.finished and one.nfe > 0
    assert (one.steps[-1].tolist(), one.steps[0, 4].item()) == (one.tokens + [17] * 53, 18)
    assert ''.join(one.pieces) == one.text and len(one.p_wrong) == len(one.pieces) == 9
    again = m.score(one)
    assert again.p_wrong == pytest.approx(one.p_wrong) and again.nelbo > 0 and again.causal_nll > 0
    assert one.nelbo is None and capsys.readouterr().out == ''                  # no method prints
    assert m.generate(1, prompt='(+', length=9, trace=False)[0].steps is None
    assert m.generate(3, prompt='(+', length=9, seed=3)[0].tokens != m.generate(1, length=9)[0].tokens


def test_a_tally_counts_what_the_steps_show(m):
    """Of drafts and of what is re-masked, without keeping a step."""
    for rules in (dict(), dict(remask='wrong', steps=9), dict(ar_prefix=5, remask='wrong', steps=9)):
        tally = Tally(18, 17)
        samples = m.generate(5, seed=3, batch_size=2, trace=tally, **rules)
        kept = m.generate(5, seed=3, batch_size=2, **rules)
        assert [one.tokens for one in samples] == [one.tokens for one in kept] and samples[0].steps is None
        drafted, refused, again = 0, 0, 0
        for steps in (one.steps.tolist() for one in kept):
            for before, after in zip(steps, steps[1:]):
                for old, new in zip(before, after):
                    drafted += old < 0 and new != 17
                    refused += old < 0 and new not in (17, ~old)
                    again += 0 <= old < 17 and new != old
        assert tally.numbers() == [drafted, refused, again]
        assert (drafted > refused > 0 == again) if not rules else (again > 0 == drafted)


def test_texts_and_lists_of_them(m):
    assert m.infill('(+_2)=3', steps=1).before == '(+_2)=3'
    several = m.infill(['(+_2)=3', '1=_'], 2, steps=1)
    assert [sample.before for sample in several] == ['(+_2)=3'] * 2 + ['1=_'] * 2
    assert [sample.task for sample in m.repair(['1=1'])] == ['repair'] and m.repair([]) == []
    assert [len(sample.p_wrong) for sample in m.score(['1=1', '(+12)=3'])] == [3, 7]


def test_the_commands_say_what_the_methods_return(m, folder, tmp_path):
    save = tmp_path / 's.jsonl'
    for task, words, sample in (
            ('generate', ['--num_samples=1', '--remask=wrong', '--steps=5'],
             lambda: m.generate(1, remask='wrong', steps=5, trace=False)[0]),
            ('infill', ['--text=(+_2)=3'], lambda: m.infill('(+_2)=3', trace=False)),
            ('repair', ['--text=(+12))=3'], lambda: m.repair('(+12))=3')),
            ('edit', ['--text=(+12)=3', '--mask=2:4'], lambda: m.edit('(+12)=3', '12', trace=False)),
            ('score', ['--text=(+12)=3'], lambda: m.score('(+12)=3'))):
        out = run_main('sample', f'--task={task}', f'--init_from={folder}', '--device=cpu', '--dtype=float32',
                       f'--save={save}', *words)
        expected = {key: value for key, value in sample().items() if key != 'trace'}
        assert json.loads(save.read_text()) == json.loads(json.dumps(expected)), task
        lines = out.splitlines()
        shown = sample().report().splitlines()
        at = lines.index(shown[0])
        assert lines[at:at + len(shown)] == shown                               # results first
        assert all(at < lines.index(line) for line in m.said)


def test_watching_is_live(m):
    """A canvas is there before the next pass is made, all are those of the sample, and one may leave."""
    passes, rules = [], dict(remask='none', steps=6, length=9, seed=4)
    hook = m.model.register_forward_hook(lambda *_: passes.append(time.perf_counter()))
    seen, found = [], []
    for canvas in m.watch('(+', **rules):
        seen.append((canvas, len(passes)))
        time.sleep(0.01)
        found.append(canvas.ids)
    total = len(passes)
    assert seen[0][0] == '(+' + 7 * '▒' and '▒' not in seen[-1][0]
    assert [made < total for _, made in seen][:3] == [True] * 3
    assert torch.equal(torch.stack(found), m.generate(1, prompt='(+', **rules)[0].steps)
    passes.clear()
    watching = m.watch('(+', remask='none', length=40)
    next(watching)
    watching.close()
    assert len(passes) < 10
    hook.remove()
    assert [*m.watch('(+12))=3', task='repair')][-1] == m.repair('(+12))=3').text
    assert len([*m.watch('(+')]) == len(m.generate(1, '(+')[0].steps)           # speculative
    with pytest.raises(UserError, match='remask expects'):
        next(m.watch(remask='best'))
    with pytest.raises(UserError, match='task expects'):
        next(m.watch(task='score'))


@pytest.mark.parametrize('how', [dict(task='repair', text='(+12))=3'), dict(preset='hybrid', steps=5),
                                 dict(task='infill', text='(+_2)=_', remask='wrong', steps=3)], ids=str)
def test_what_is_watched_is_what_is_kept(m, how):
    found = [canvas.ids for canvas in m.watch(**how)]
    text, task = how.pop('text', ''), how.pop('task', 'generate')
    sample = m.generate(1, **how)[0] if task == 'generate' else getattr(m, task)(text, **how)
    assert torch.equal(torch.stack(found), sample.steps)


def test_windows_are_watched_as_parts_of_the_text(folder):
    text = load(str(folder / 'text.pt'), device='cpu', dtype='float32')
    for how in (dict(preset='speculative'), dict(remask='wrong', steps=4), dict(preset='hybrid', steps=4)):
        found = [canvas.ids for canvas in text.watch('ab', length=40, **how)]
        sample = text.generate(1, 'ab', length=40, **how)[0]
        assert torch.equal(torch.stack(found), sample.steps) and sample.steps.size(1) == 40


def test_a_watcher_that_fails_does_not_wait(m):
    live = handle.Live()
    steps = m.frames(live, lambda trace: m.generate(2, remask='wrong', steps=9, batch_size=1, trace=trace))
    assert [begins for *_, begins in steps] == [True, *[False] * 9] * 2
    assert [len(sample.steps) for sample in live.result] == [10, 10]
    with pytest.raises(ZeroDivisionError):
        for frame, before, begins in m.frames(handle.Live(), lambda trace: m.generate(1, trace=trace)):
            assert begins and frame['states'] == before['states']
            1 / 0


def test_shown_in_a_terminal_and_in_a_notebook(m, capsys, monkeypatch):
    sample = m.repair('(+12))=3')
    sample.show()
    assert capsys.readouterr().out == f'{sample.report()}\n' and '-> ' in sample.report()
    page = sample._repr_html_()
    assert page.startswith('<iframe srcdoc="&lt;!') and page.count('<') == 2    # nothing breaks out
    displayed = []
    notebook = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1),
                               display=SimpleNamespace(display=displayed.append))
    monkeypatch.setitem(sys.modules, 'IPython', notebook)
    sample.show()
    assert displayed == [sample] and capsys.readouterr().out == ''
    m.score('1=1').show()                                                       # nothing to slide over
    assert 'NELBO' in capsys.readouterr().out


def test_other_checkpoints(m, folder):
    how = dict(device='cpu', dtype='float32')
    plain = load(str(folder / 'plain.pt'), **how)
    with pytest.raises(UserError, match='not trained to find wrong'):
        plain.generate(1)[0].p_wrong
    judged = load(str(folder / 'plain.pt'), judge=str(folder / 'judge.pt'), **how)
    assert len(judged.score('1=1').p_wrong) == 3 and judged.generate(1, steps=3)[0].rules['remask'] == 'wrong'
    merged = load(str(folder / 'plain.pt'), merge=str(folder / 'judge.pt'), merge_weight=0.25, **how)
    assert 'merged with 0.25' in repr(merged) and merged.can.writes and merged.can.detects
    text = load(str(folder / 'text.pt'), **how)
    sample = text.score('ab\n' * 12)                                            # in windows
    assert len(sample.p_wrong) == len(sample.pieces) == 36
    with pytest.raises(UserError, match='the prompt fills the canvas: its 6 tokens leave nothing'):
        text.generate(1, prompt='ab' * 3, length=6)
    assert len(text.generate(1, prompt='ab' * 10, length=30)[0].text) == 30     # in windows
    with pytest.raises(UserError, match='no such checkpoint'):
        load(str(folder / 'nowhere.pt'))


@pytest.mark.parametrize('ask, message', [
    (lambda m: m.generate(1, stepss=3), "unknown rule 'stepss'; did you mean steps"),
    (lambda m: m.generate(1, steps=3), 'no say: steps with remask=causal'),
    (lambda m: m.generate(0), 'at least 1'), (lambda m: m.generate(1, steps=0), 'steps must be at least 1'),
    (lambda m: m.generate(1, preset='p3'), 'unknown preset'), (lambda m: m.generate(1, 'x'), 'vocabulary'),
    (lambda m: m.generate(1, stop='x'), 'stop: '), (lambda m: m.infill('1=1'), 'has no hole'),
    (lambda m: m.edit('1=1'), 'brackets'), (lambda m: m.score(''), 'text is empty'),
    (lambda m: m.generate(1, trace=False)[0].page(), 'were not kept')])
def test_mistakes(m, ask, message):
    with pytest.raises(UserError, match=message):
        ask(m)


@pytest.mark.parametrize('text, words, found', [
    ('ab a', 'a', [3]), ('ab b.', 'b', [3]), ('aab', 'aa', [0, 1]), ('aab.', '1:2,3:4', [1, 3]),
    ('a[b] a', None, [1]), ('[a]b[ .]', None, [0, 2, 3]), ('a\nb', '\n', [1])])
def test_words_to_write_anew(text, words, found):
    stripped = text.replace('[', '').replace(']', '')
    assert marked_words(STREAM, text, words) == (stripped, found)


@pytest.mark.parametrize('text, words, message', [
    ('a a', 'a', "'a' stands 2 times"), ('ab', 'x', "'x' stands 0 times"), ('ab', '', 'stands'),
    ('ab', None, 'no .brackets'), ('a[]b', None, 'nothing in the'), ('ab', '1:3', 'outside the text')])
def test_words_that_are_not_there(text, words, message):
    with pytest.raises(UserError, match=message):
        marked_words(STREAM, text, words)


def test_words_of_tokens_longer_than_a_character():
    meta = dict(STREAM, vocab_size=3, itos=['not', ' go', ' '])
    assert marked_words(meta, 'not go', 'go') == ('not go', [1])
    assert marked_words(meta, 'not[ g]o not', None) == ('not go not', [1])
    assert decode(meta, encode(meta, 'not go')) == ('not go', False) and PAD == '·'


# -----------------------------------------------------------------------------
# docs/python.md and examples/tour.ipynb

TINY = '--eval_rows=8 --eval_samples=2 --n_layer=1 --n_head=2 --n_embd=16 --n_recur=1 --batch_size=8'
TOUR = os.path.join(ROOT, 'examples', 'tour.ipynb')


def test_the_example_of_the_page(tmp_path, monkeypatch, capsys):
    meta = dict(STREAM, itos=[*string.ascii_letters, *' ,:\n'], vocab_size=56)
    write_checkpoint(tmp_path / 'out-text' / 'ckpt_joint_all_positions.pt', tiny_gpt(56, 32, n_recur=1), meta,
                     training_type='joint', causal_ratio=0.5)
    with open(os.path.join(ROOT, 'docs', 'python.md'), encoding='utf-8') as page:
        code = page.read().split('```python\n')[1].split('```')[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {'__name__': 'page'})
    out = capsys.readouterr().out
    assert 'out-text' in out and 'I will nqt go wikh thee\n-> ' in out and out.count('ROMEO:') > 6


def tour(out):
    """The notebook with settings for a test: eight steps, into a folder of its own."""
    with open(TOUR, encoding='utf-8') as file:
        source = file.read()
    changes = {'STEPS = 150': 'STEPS = 8', "'out-tour'": repr(str(out)), '--eval_rows=200': TINY}
    for what, instead in changes.items():
        assert source.count(what) == 1
        source = source.replace(what, instead)
    return source


def test_the_cells_of_the_tour(tmp_path, monkeypatch, capsys):
    """As a plain script, without Jupyter: they train, write, judge and repair."""
    cells = [cell for cell in json.loads(tour(tmp_path))['cells'] if cell['cell_type'] == 'code']
    assert not any(cell['outputs'] for cell in cells)
    monkeypatch.chdir(os.path.dirname(TOUR))
    monkeypatch.setattr(sys, 'path', [*sys.path])
    exec('\n'.join(cell['source'] for cell in cells), {'__name__': 'tour'})
    out = capsys.readouterr().out
    for words in ('saved ', ' passes', '▒', '(+12))=3\n-> '):
        assert words in out, out


def test_the_tour_as_a_notebook(tmp_path):
    client, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    pytest.importorskip('ipykernel')
    notebook = nbformat.reads(tour(tmp_path), as_version=4)
    place = dict(metadata=dict(path=os.path.dirname(TOUR)))
    client.NotebookClient(notebook, timeout=120, resources=place).execute()
    pages = [output.data['text/html'] for cell in notebook.cells for output in cell.get('outputs', ())
             if 'text/html' in output.get('data', ())]
    assert len(pages) == 1 and pages[0].startswith('<iframe')
