"""The page in the browser: what a click and a key are answered, every step as it happens, and messages."""

import re
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ARITHMETIC, run_main, tiny_gpt, write_checkpoint
from test_show import Marks

import app
from configurator import UserError
from parts.handle import Live
from sample import load

TEXT = dict(ARITHMETIC, name='text', itos=[*'abcdefghijkl .\n!?,'], bos=None, eos=None, pad=None)
CPU = dict(device='cpu', dtype='float32')


@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    """name -> a checkpoint that is open, small and untrained."""
    folder = tmp_path_factory.mktemp('nets')

    def opened(name, meta, T, **config):
        model = tiny_gpt(18, T, n_recur=1, draft_head=True)
        return load(write_checkpoint(folder / f'{name}.pt', model, meta, **config), **CPU)
    joint = dict(training_type='joint', causal_ratio=0.5, draft_head=True)
    edits = dict(joint, corruption='noise', remask_target='edits', causal_ratio=0.0)
    return dict(sums=opened('sums', dict(ARITHMETIC, block_size=16), 16, **joint),
                text=opened('text', TEXT, 24, **joint), edits=opened('edits', TEXT, 24, **edits),
                plain=opened('plain', TEXT, 24, training_type='unmasking'))


def places(page):
    """(class, text) of every token of a fragment."""
    return [(sign.split()[0], text) for tag, sign, text in Marks(page).marks if tag == 'i']


def test_a_text_is_shaded_by_what_the_network_doubts(nets):
    m = nets['sums']
    page = app.heat(m, '(+12)=3')
    _, canvas, _ = m.canvas('score', '(+12)=3')
    probs = m.model.logits(m.model(canvas[None]))[0].softmax(-1)
    p = [1 - probs[i, id].item() for i, id in enumerate(canvas[:9].tolist())]
    assert [text for _, text in places(page)] == [*'⟨(+12)=3⟩']
    shades = [float(number) for number in re.findall(r'--p: ([0-9.]+)', page)]
    assert shades[0] == 0 and shades[1:] == pytest.approx(p[1:], abs=0.006)     # the start is given
    assert ('m', '▒') in places(app.heat(m, '(+_2)=3')) and app.heat(m, '') == ''
    assert set(re.findall(r'--p: ([0-9.]+)', app.heat(nets['plain'], 'a bad'))) == {'0.00'}


@pytest.mark.parametrize('text', ['(+1x)=3', '<b>', '1' * 15])
def test_what_cannot_be_read_is_said_where_one_types(nets, text):
    page = app.heat(nets['sums'], text)
    assert page.startswith('<p ') and '<b>' not in page
    assert any(word in page for word in ('vocabulary', 'does not fit'))


def test_the_likeliest_tokens_of_a_place_come_first(nets):
    m = nets['text']
    _, canvas, _ = m.canvas('score', 'a bad cab')
    canvas[3] = m.model.mask_token_id
    p = m.model.logits(m.model(canvas[None]), real_only=True)[0, 3].softmax(-1)
    best = p.topk(5)
    signs = [TEXT['itos'][i].replace(' ', '␣').replace('\n', '↵') for i in best.indices]
    words = [f'{sign} {share:.0%}' for sign, share in zip(signs, best.values.tolist()) if share >= 0.005]
    assert app.alternatives(m, 'a bad cab', 3) == 'in place of a: ' + ', '.join(words)
    for place in (-1, 9):
        with pytest.raises(UserError, match='click again'):
            app.alternatives(m, 'a bad cab', place)


@pytest.mark.parametrize('name, text, place, expected', [
    ('text', 'a bad cab', 3, 'a ___ cab'), ('text', 'a bad cab', 8, 'a bad ___'), ('text', 'a', 0, '_'),
    ('text', 'a bad.cab', 5, 'a bad_cab'), ('text', 'a __d cab', 4, 'a ___ cab'),
    ('text', 'a __d cab', 2, 'a __d cab'), ('sums', '(+12)=3', 3, '(+_2)=3'),
    ('sums', '(+12)=3', 0, '(+12)=3')])
def test_a_click_makes_holes_of_a_word(nets, name, text, place, expected):
    assert app.mask_word(nets[name], text, place) == expected


def test_only_samplers_that_the_checkpoint_can_use_are_offered(nets):
    assert {'intelligent', 'speculative'} < {*app.samplers(nets['text'], 'generate')}
    plain = ['ancestral', 'maskgit', 'threshold', 'remdm', 'surest']
    assert app.samplers(nets['plain'], 'generate')[1:] == plain
    for task, text in (('infill', 'a b_d cab'), ('repair', 'a bad cab')):
        found = app.samplers(nets['text'], task)
        assert 'speculative' not in found and 'intelligent' in found
        for name in found:                                          # none of them is refused
            assert list(app.steps(nets['text'], task, text, name, count=2))


@pytest.mark.parametrize('name, sampler', [
    ('text', 'intelligent'), ('sums', 'intelligent'), ('plain', 'as usual'), ('text', 'speculative')])
def test_every_step_is_shown_and_the_last_is_what_the_same_settings_write(nets, name, sampler):
    m = nets[name]
    prompt = '(+' if name == 'sums' else 'ab'
    pages = list(app.steps(m, 'generate', prompt, sampler, count=6, seed=3))
    causal = sampler == 'speculative'
    rules = dict(preset=None if sampler == 'as usual' else sampler, seed=3)
    (sample,) = m.generate(1, prompt, **rules, **({} if causal else dict(steps=6)))
    assert len(pages) == len(sample.steps) + 1 and (causal or len(pages) == 8)
    assert sample.text in ''.join(text for _, text in places(pages[-1]))
    assert f'{sample.nfe} passes' in pages[-1]
    if causal:                                                      # drafts, and what became of them
        assert all('class="d ' in page for page in pages[2:-1:2]) and 'class="d ' not in pages[-1]
    else:
        assert {sign for sign, _ in places(pages[0])} == {'f', 'm'} and 'class="n ' in pages[1]


def test_nobody_can_ask_for_more_steps_than_there_are_places(nets):
    pages = list(app.steps(nets['text'], 'repair', 'a bad cab', 'intelligent', count=10 ** 9, seed=-1))
    assert len(pages) <= 25


def test_a_repair_ends_in_what_it_did(nets):
    m = nets['text']
    *_, page = app.steps(m, 'repair', 'a bad cab')
    old = ''.join(text for tag, _, text in Marks(page).marks if tag in ('i', 'del'))
    assert old.startswith('a bad cab') or page.count('<del>') == page.count('<ins>') > 0
    *_, page = app.steps(m, 'infill', 'a b_d cab', count=2)
    assert [sign for sign, _ in places(page)] == ['n' if i == 3 else 'k' for i in range(9)]
    m = nets['edits']                                               # one that moves what stays
    *pages, page = app.steps(m, 'repair', 'a bad cab')
    marks = Marks(page.partition('<p>')[0]).marks[1:]
    assert len(pages) > 2 and ('ins' in page or 'del' in page)
    assert ''.join(text for tag, _, text in marks if tag != 'ins').replace('␣', ' ') == 'a bad cab'
    assert ''.join(text for tag, _, text in marks if tag != 'del') == m.repair('a bad cab').text


def test_who_stops_to_look_ends_the_work(nets):
    m, before = nets['text'], threading.active_count()
    watched = app.steps(m, 'generate', '', 'intelligent', count=24)
    next(watched)
    assert threading.active_count() == before + 1
    watched.close()
    assert threading.active_count() == before


def test_what_goes_wrong_in_the_work_is_raised_where_it_is_watched(nets):
    def work(trace):
        trace.begin(torch.zeros(1, 2).bool()).append(torch.zeros(1, 2, dtype=torch.long))
        raise UserError('no')
    watched = nets['text'].frames(Live(), work)
    assert next(watched)[0]['tokens'] == ['a', 'a']
    with pytest.raises(UserError, match='no'):
        next(watched)
    with pytest.raises(UserError, match='has no hole'):
        list(app.steps(nets['text'], 'infill', 'abc'))


def test_two_samplers_side_by_side_and_two_checkpoints(nets):
    m, other = nets['text'], nets['plain']
    write = app.side_by_side(m, 'generate', m)
    pairs = list(write('ab', 'intelligent', 'ancestral', 3, 1))
    assert len(pairs) == 5 and pairs[-1][0] != pairs[-1][1] and all(map(all, pairs))
    assert all(right == '' for _, right in write('ab', 'ancestral', 'none', 3, 1))
    *_, (left, right) = app.side_by_side(m, 'generate', other)('ab', 'ancestral', 'ancestral', 3, 1)
    *_, alone = app.steps(other, 'generate', 'ab', 'ancestral', 3, 1)
    assert right == alone and '--p: 0.00' in right and left != right


@pytest.mark.parametrize('words, message', [
    (['--longest=0'], 'longest must be at least 1'), (['--port=70000'], 'port in 1..65535'),
    ([], 'pip install gradio')])
def test_what_the_command_refuses(monkeypatch, words, message):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    monkeypatch.setenv('GRADIO_ANALYTICS_ENABLED', 'True')
    with pytest.raises(UserError, match=message):
        run_main('app', *words)


def test_errors_are_messages(capsys):
    class Refused(Exception):
        pass
    gr = SimpleNamespace(Error=lambda text, print_exception: Refused(text))

    def fails(error):
        yield 1
        raise error
    wrong = (UserError('<b> & so'), '&lt;b&gt; &amp; so'), (KeyError('x'), 'the terminal says why')
    for error, message in wrong:
        told = app.polite(gr, fails, 9)(error)
        assert next(told) == 1
        with pytest.raises(Refused, match=message):
            next(told)
    assert 'KeyError' in capsys.readouterr().err
    assert list(app.polite(gr, str, 2)(777)) == ['777']
    with pytest.raises(Refused, match='the text has 3 characters, and 2 are taken'):
        next(app.polite(gr, str, 2)('abc'))


def test_the_page_answers(nets, monkeypatch):
    monkeypatch.setenv('GRADIO_ANALYTICS_ENABLED', 'False')
    monkeypatch.delitem(sys.modules, 'matplotlib.figure')           # which gradio finds, or does not
    gr = pytest.importorskip('gradio')
    client = pytest.importorskip('gradio_client')
    blocks = app.build(gr, nets['text'], nets['plain'])
    _, url, shared = blocks.queue().launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        page = client.Client(url, verbose=False)
        assert shared is None and '127.0.0.1' in url
        assert ('k', 'a') in places(page.predict('a bad cab', api_name='/repair_heat'))
        pairs = list(page.submit('ab', 'intelligent', 'ancestral', 3, 1, api_name='/generate'))
        write = app.side_by_side(nets['text'], 'generate', nets['plain'])
        assert tuple(pairs[-1]) == [*write('ab', 'intelligent', 'ancestral', 3, 1)][-1]
        with pytest.raises(Exception, match='is not in the vocabulary'):
            page.predict('€', 'as usual', 'none', 0, 1, api_name='/repair')
    finally:
        blocks.close()
