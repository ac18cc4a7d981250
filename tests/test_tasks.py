"""
What a text becomes: holes, spans, canvases; infill, edit, repair and score as typed, and what is measured.
"""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ARITHMETIC, default_config, seeded, tiny_gpt, write_checkpoint
from test_commands import CPU, STREAM, bench_settings, read_samples, refused, went_well
from test_evaluate import any_order_nll
from test_show import Page

import sample
from configurator import UserError
from model import GPT
from parts.noise import mixed_noise
from parts.presets import PRESETS, supports
from plumbing.evaluate import causal_nll
from plumbing.score import judge_rows
from plumbing.show import marks
from plumbing.text import decode, encode, holes, load_task, spans, start_canvas, task_canvas
from sample import COMMIT, DOUBT, OTHER_RULES
from suites import common, samplers, tasks

BOS, EOS, PAD, MASK = 15, 16, 17, 18
FIT = '--text=(+12)=3'


# -----------------------------------------------------------------------------
# texts become canvases

@pytest.mark.parametrize('text, hole, ids, ends', [
    ('(+_2)=3', '_', [10, 12, MASK, 2, 11, 14, 3], True), ('_12', '_', [MASK, 1, 2], True),
    ('(+12)=_', '_', [10, 12, 1, 2, 11, 14], False),           # open: as many tokens as it takes
    ('1__2_3', '_', [1, MASK, MASK, 2, MASK, 3], True), ('_', '_', [], False),
    ('1_2__', '_', [1, MASK, 2, MASK], False),                 # only the last one is open
    ('1<?>2', '<?>', [1, MASK, 2], True), ('1<?><?>', '<?>', [1, MASK], False)])
def test_holes(text, hole, ids, ends):
    assert holes(ARITHMETIC, text, hole, MASK) == (ids, ends)


NO_HOLE = 'hole expects a text that is not in the vocabulary of arithmetic, got '


@pytest.mark.parametrize('text, hole, message', [
    ('1=1', '1', f"{NO_HOLE}'1'"), ('12=1', '', f"{NO_HOLE}''"), ('(+12)=3', '12', f"{NO_HOLE}'12'"),
    ('(+12)=3', '_', r"'\(\+12\)=3' has no hole \('_'\) to fill"),
    ('(+x_)=3', '_', "'x' in '.*' is not in the vocabulary of arithmetic"),
    ('1___', '__', "'_' in '_' is not in the vocabulary")])    # what is left of it is no token
def test_holes_that_are_none(text, hole, message):
    with pytest.raises(UserError, match=message):
        holes(ARITHMETIC, text, hole, MASK)


def test_spans():
    for text, places in (('3:5', [3, 4]), ('3:5,6:7', [3, 4, 6]), ('0:7', [*range(7)]),
                         (' 4:5, 0:2 ', [4, 0, 1])):
        assert spans(text, 7) == places


@pytest.mark.parametrize('text, message', [
    ('3:3', 'the span 3:3 is empty'), ('5:3', 'the span 5:3 is empty'), ('7:8', 'outside the text'),
    ('3:8', 'the span 3:8 is outside the text, which has 7 tokens'), ('1:2,1:2', 'overlap'),
    ('0:2,9:10', 'the span 9:10 is outside'), ('2:4,3:5', "the spans of '2:4,3:5' overlap"),
    ('3', "mask expects spans like 3:5 or 3:5,8:9, counted from 0; got '3'"),
    *((text, 'mask expects') for text in ('a:b', '-1:2', '1:2:3', '1:2,', '', ':', None, '²:3', '1.0:2'))])
def test_spans_that_are_none(text, message):
    with pytest.raises(UserError, match=message):
        spans(text, 7)


def small(block_size=8, mask=MASK):
    return SimpleNamespace(config=SimpleNamespace(block_size=block_size), mask_token_id=mask)


@pytest.mark.parametrize('task, text, more, expected, fixed', [
    ('infill', '1_2', dict(hole='_'), [BOS, 1, MASK, 2, EOS, PAD, PAD, PAD], '11011111'),
    ('infill', '1_2_', dict(hole='_'), [BOS, 1, MASK, 2, MASK, MASK, MASK, MASK], '11010000'),
    ('infill', '_', dict(hole='_'), [BOS] + [MASK] * 7, '10000000'),
    ('edit', '123', dict(mask='0:2'), [BOS, MASK, MASK, 3, EOS, PAD, PAD, PAD], '10011111'),
    ('repair', '123', {}, [BOS, 1, 2, 3, EOS, PAD, PAD, PAD], '10000000'),
    ('score', '123', {}, [BOS, 1, 2, 3, EOS, PAD, PAD, PAD], '11111111'),
    ('score', '123456', {}, [BOS, 1, 2, 3, 4, 5, 6, EOS], '11111111'),
    # without an end token a text that ends makes the canvas; what is open goes as far as the network
    ('infill', 'a_b', dict(hole='_'), [0, 3, 1], '101'), ('score', 'ab', {}, [0, 1], '11'),
    ('infill', 'a_', dict(hole='_'), [0, 3, 3, 3, 3, 3], '100000'),
    ('edit', 'ab\n', dict(mask='1:2'), [0, 3, 2], '101'), ('repair', 'aba', {}, [0, 1, 0], '001'),
    ('repair', 'a', {}, [0], '0')])
def test_task_canvas(task, text, more, expected, fixed):
    model, meta = (small(6, 3), STREAM) if 'a' in text else (small(), ARITHMETIC)
    canvas, kept = task_canvas(task, model, meta, text, **more)
    assert canvas.tolist() == [expected] and kept.dtype == torch.bool
    assert kept.tolist() == [[x == '1' for x in fixed]]


@pytest.mark.parametrize('task, text, more, message', [
    ('repair', '1234567', {}, 'a text of 7 tokens does not fit: block_size 8 leaves room for 6'),
    ('infill', '1234567_', dict(hole='_'), 'a text of 7 tokens does not fit'),
    ('infill', '_______1', dict(hole='_'), 'a text of 8 tokens does not fit'),
    ('edit', '1234567', dict(mask='0:1'), 'does not fit'), ('repair', '', {}, 'the text is empty'),
    ('score', '', {}, 'the text is empty'), ('edit', '', dict(mask='0:1'), 'the text is empty'),
    ('edit', '123', dict(mask='2:4'), 'outside the text, which has 3 tokens'),
    ('score', '1x', {}, "'x' in '1x' is not in the vocabulary")])
def test_task_canvases_that_do_not_fit(task, text, more, message):
    with pytest.raises(UserError, match=message):
        task_canvas(task, small(), ARITHMETIC, text, **more)
    assert task_canvas('infill', small(), ARITHMETIC, '123456_', hole='_')[0].size(1) == 8     # that fits


# -----------------------------------------------------------------------------
# what is said of a text

def test_marks():
    """Changed, doubted and kept, or let alone; how often it went back and forth does not matter."""
    before = torch.tensor([15, 1, 2, 3, 4, 5, 16])
    trace = torch.tensor([[15, 1, 2, 3, 4, 5, 16], [15, 1, 18, 18, 4, 18, 16], [15, 1, 7, 3, 4, 18, 16],
                          [15, 1, 18, 3, 4, 8, 16], [15, 1, 9, 3, 4, 5, 17]])
    assert marks(before, trace, 18) == '  ^? ?^' and marks(before, trace[:1], 18) == ' ' * 7
    assert marks(before, trace[[0, 2]], 18) == '  ^  ^ '


TEXT = dict(ARITHMETIC, name='text', vocab_size=3, itos=['a', '<end>', '<pad>'], bos=None, eos=1, pad=2)


@torch.no_grad()
def test_judge_rows_says_what_the_network_thinks():
    """NELBO: the mean over all orders, padding paid for, not counted; causal NLL a token; p(WRONG)."""
    model, rows = tiny_gpt(3, 4, seed=2), torch.tensor([[0, 0, 1, 2], [0, 0, 0, 1], [1, 2, 2, 2]])
    can = supports(default_config(training_type='joint', causal_ratio=0.3))
    runs = [judge_rows(model, TEXT, rows, can, seed=seed) for seed in range(40)]
    for row, (x, tokens) in enumerate(zip(rows, (3, 4, 1))):
        found = torch.tensor([run[row]['nelbo'] for run in runs])
        expected = any_order_nll(model, x, torch.ones(4).bool()).mean() / tokens
        error = found.std().item() / 40 ** 0.5
        assert abs(found.mean().item() - expected) < 4.5 * error < 0.3 and len(found.unique()) > 35
        judged = runs[0][row]
        assert set(judged) == {'nelbo', 'causal_nll', 'p_wrong'} and json.dumps(judged)
        nll = causal_nll(model, x[None], x[None] != 2).item() / tokens
        assert judged['causal_nll'] == pytest.approx(nll, rel=1e-5)
        p = model.logits(model(x[None]))[0].softmax(-1)
        assert judged['p_wrong'] == pytest.approx([1 - p[t, x[t]].item() for t in range(4)], abs=1e-5)
    assert judge_rows(model, TEXT, rows, can, seed=3) == runs[3]

    # more estimates, less noise
    many = [judge_rows(model, TEXT, rows[:1], can, 256, seed)[0]['nelbo'] for seed in range(15)]
    assert torch.tensor(many).var() < 0.4 * torch.tensor([run[0]['nelbo'] for run in runs]).var()

    # the start symbol is given: neither paid nor counted
    bos, start = dict(TEXT, bos=0, itos=['<start>', '<end>', '<pad>']), torch.tensor([[0, 2, 1, 2]])
    nll = causal_nll(model, start, torch.tensor([[False, False, True, False]])).item()
    assert judge_rows(model, bos, start, can)[0]['causal_nll'] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize('kind, ratio, keys', [
    ('unmasking', 0.0, {'nelbo'}), ('unmasking', 0.3, {'nelbo', 'causal_nll'}),
    ('joint', 0.0, {'nelbo', 'p_wrong'}), ('causal', 0.0, {'causal_nll'}), ('remasking', 0.0, {'p_wrong'}),
    ('denoising', 0.5, {'nelbo', 'causal_nll', 'p_wrong'})])
def test_judge_rows_says_what_the_network_was_trained_for(kind, ratio, keys):
    can = supports(default_config(training_type=kind, causal_ratio=ratio))
    judged = judge_rows(tiny_gpt(3, 4), STREAM, torch.tensor([[0, 1, 1, 2]]), can)
    assert [set(row) for row in judged] == [keys]


# -----------------------------------------------------------------------------
# the command

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Untrained checkpoints of several kinds: a dict of their paths."""
    folder = tmp_path_factory.mktemp('made')
    kinds = dict(joint=dict(training_type='joint', causal_ratio=0.5), plain=dict(training_type='unmasking'),
                 causal=dict(training_type='causal'), judge=dict(training_type='remasking'))
    paths = {name: write_checkpoint(folder / f'{name}.pt', **config) for name, config in kinds.items()}
    stream = write_checkpoint(folder / 'stream.pt', tiny_gpt(3, 12, n_recur=1), STREAM, training_type='joint')
    return dict(paths, stream=stream)


@pytest.fixture
def sampled(run, made, tmp_path):
    """sampled('joint', '--task=edit ...'): (what was printed, the samples)."""
    def sampled(name, words):
        path = tmp_path / 'samples.jsonl'
        words = [f'--init_from={made[name]}', *CPU, f'--save={path}', *words.split()]
        return went_well(run('sample', *words)), read_samples(path)
    return sampled


@pytest.fixture
def mistaken(run, made, tmp_path):
    """mistaken('joint', '--task=edit ...', 'message'): it ends in one line, and nothing is written."""
    def mistaken(name, words, *message):
        before = os.listdir(tmp_path)
        words = [f'--init_from={made[name]}', *CPU, f'--save={tmp_path}/s.jsonl', *words.split()]
        refused(run('sample', *words), 'sample', *message)
        assert os.listdir(tmp_path) == before
    return mistaken


def test_edit_changes_nothing_but_the_span(sampled):
    out, samples = sampled('joint', f'--task=edit {FIT} --mask=2:4,6:7 --num_samples=12 --temperature=2')
    assert len(samples) == 12 and out.count('(+12)=3\n-> (+') == 12
    for s in samples:
        assert s['finished'] and len(s['text']) == 7 and s['text'][:2] + s['text'][4:6] == '(+)='
        assert s['tokens'][:3] == [15, 10, 12] and s['tokens'][-1] == 16 and max(s['tokens'][1:-1]) < 15
    assert all(len({s['text'][i] for s in samples}) > 1 for i in (2, 3, 6))    # it does write there


def test_nothing_ends_a_text_in_a_hole_that_is_begun_left_to_right():
    """An end token or padding inside is as wrong in the part that the causal pass writes as in the rest."""
    model = tiny_gpt(18, 64, n_recur=1)
    with torch.no_grad():                                      # an untrained network in love with the end
        model.wte.weight[EOS:PAD + 1] += 3 * model.wte.weight.std()
    for canvas, fixed in (task_canvas('infill', model, ARITHMETIC, '(+____________2)=3', '_'),
                          start_canvas(model, ARITHMETIC, 1, lengths=torch.tensor([17]))):
        for s in sample.fill(model, ARITHMETIC, canvas.repeat(20, 1), fixed.repeat(20, 1), ar_prefix=3,
                             remask='none'):
            assert s['tokens'].index(EOS) == len(s['tokens']) - 1 == canvas[0].tolist().index(EOS)
            assert PAD not in s['tokens']


def test_infill_keeps_the_anchors(sampled):
    for name, words in (('joint', ''), ('plain', ''), ('joint', '--preset=maskgit --steps=2'),
                        ('joint', '--preset=remdm')):
        out, samples = sampled(name, f'--task=infill --text=(+_2)=_3 --num_samples=4 {words}')
        for s in samples:
            assert s['finished'] and re.fullmatch(r'\(\+.2\)=.3', s['text']) and max(s['tokens'][1:-1]) < 15
    assert 'remask=remdm' in out


def test_an_open_hole_is_as_long_as_the_model_wants(sampled):
    """And where nothing is right of it the causal mode may write it."""
    for words, rule in (('', 'remask=causal'), ('--remask=wrong', 'remask=wrong'),
                        ('--preset=hybrid', 'ar_prefix=16')):
        out, samples = sampled('joint', f'--task=infill --text=(+12)=?? --hole=?? --num_samples=5 {words}')
        assert rule in out and all(s['text'].startswith('(+12)=') for s in samples)
        assert len({len(s['tokens']) for s in samples}) > 1
    _, (s,) = sampled('causal', '--task=infill --text=(+12)=_')
    assert s['text'].startswith('(+12)=') and s['nfe'] == len(s['tokens']) - 7
    assert 'remask=wrong' in sampled('joint', '--task=infill --text=(+_2)=_')[0]       # it cannot see that


def test_a_file_of_texts(sampled, tmp_path):
    """A text a line, without the empty ones; num_samples of each, in their order; both are printed."""
    lines = ['(+_2)=3', '(*1_)=12', '_']
    (tmp_path / 'lines.txt').write_text('\n\n'.join(lines) + '\n', encoding='utf-8')
    words = f'--task=infill --file={tmp_path}/lines.txt --num_samples=2 --batch_size=4'
    out, samples = sampled('joint', words)
    twice = [line for line in lines for _ in range(2)]
    assert len(samples) == 6 and '6 samples' in out
    for s, line in zip(samples, twice[:4]):
        assert re.fullmatch(re.escape(line).replace('_', '.'), s['text'])
    assert [line.strip() for line in out.splitlines() if line.strip() in lines] == twice
    written = [line[3:].split('   ')[0] for line in out.splitlines() if line.startswith('-> ')]
    assert written[:4] == [s['text'] for s in samples[:4]]


def test_repair_says_what_it_did(sampled, made):
    """The marks are true: ^ exactly where the text is another one; it can be less or more sure."""
    text, before = '(+12))=3', [15, 10, 12, 1, 2, 11, 11, 14, 3, 16] + [17] * 54
    out, (s,) = sampled('joint', f'--task=repair --text={text}')
    assert 'remask=wrong' in out and 'remask_threshold=0.8' in out and f'{text}\n-> ' in out
    assert 'trace' not in s and len(s['marks']) == len(s['tokens']) and s['tokens'][0] == 15 and s['nfe'] >= 1
    changed = [new != old for new, old in zip(s['tokens'], before)]
    assert [mark == '^' for mark in s['marks']] == changed and any(changed)
    assert f"   {s['marks'][1:].rstrip()}   (^ changed, ? doubted and kept)" in out
    out, (s,) = sampled('joint', f'--task=repair --text={text} --remask_threshold=1')
    assert s['text'] == text and s['nfe'] == 1 and not s['marks'].strip() and '(^ changed' not in out
    assert f'-> {text}   ✗' in out

    # with a judge of its own
    judge = f"--remask_from={made['judge']} --remask_threshold=0.1"
    out, (s,) = sampled('plain', f'--task=repair --text={text} {judge}')
    assert 'remask=wrong' in out and s['nfe'] >= 2 and set(s['marks']) <= set(' ^?') and s['marks'].strip()


def test_score_prints_and_saves_what_the_network_thinks(sampled, made):
    """The text itself is left alone."""
    model, text = GPT.load(made['joint'])[0], '(+12)=3'
    row = torch.tensor([[15, 10, 12, 1, 2, 11, 14, 3, 16] + [17] * 55])
    can = supports(default_config(training_type='joint', causal_ratio=0.5))
    (judged,) = judge_rows(model, ARITHMETIC, row, can)
    out, (s,) = sampled('joint', f'--task=score --text={text}')
    assert s['text'] == text and s['tokens'] == row[0, :9].tolist() and s['nfe'] == 0
    assert s['p_wrong'] == pytest.approx(judged['p_wrong'][:9], abs=1e-5)
    assert s['nelbo'] == pytest.approx(judged['nelbo'], rel=1e-4)
    assert s['causal_nll'] == pytest.approx(judged['causal_nll'], rel=1e-4)
    tenths = ''.join(str(min(9, int(10 * p))) for p in judged['p_wrong'][1:9])     # not of the start symbol
    assert f'{text}   ✓\n{tenths}   p(WRONG) of every token in tenths\n' in out
    assert f"NELBO {judged['nelbo']:.3f}, causal NLL {judged['causal_nll']:.3f} nats/token" in out
    assert 'passes (NFE)' not in out and '-> ' not in out

    # a plain one does not doubt, a judge cannot write
    for name, knows, says in (('plain', {'nelbo'}, {'NELBO'}), ('judge', {'p_wrong'}, {'p(WRONG)'})):
        out, (s,) = sampled(name, f'--task=score --text={text}')
        assert {'nelbo', 'causal_nll', 'p_wrong'} & set(s) == knows
        assert {word for word in ('NELBO', 'causal NLL', 'p(WRONG)') if word in out} == says


def test_samples_can_be_scored_as_well(sampled):
    words = '--num_samples=3 --remask=none --steps=6'
    out, samples = sampled('joint', f'{words} --score')
    assert out.count('p(WRONG) of every token') == out.count(' nats/token') == 3
    for s in samples:
        assert len(s['p_wrong']) == len(s['tokens']) and s['nelbo'] > 0 and s['causal_nll'] > 0
    _, again = sampled('joint', words)
    assert [s['text'] for s in samples] == [s['text'] for s in again] and 'nelbo' not in again[0]


@pytest.mark.parametrize('words', [
    '--task=infill --text=(+__)=_ --steps=9', f'--task=edit {FIT} --mask=2:4', f'--task=score {FIT}',
    '--task=repair --text=(+12))=3 --temperature=1 --remask_threshold=0.05',
    '--preset=remdm --steps=6'])
def test_same_seed_same_output_of_every_task(sampled, words):
    """Nor are two samples of one text the same."""
    words += ' --num_samples=2' * ('score' not in words)
    first, again, other = (sampled('joint', f'{words} --seed={seed}')[1] for seed in (5, 5, 6))
    assert first == again
    assert 'score' in words or first != other and first[0] != first[1]


def test_a_preset_gives_way_to_what_is_chosen(sampled):
    for words, said in (
            ('--preset=intelligent --remask=random', 'commit=random .. remask=random .. 4.0 passes'),
            ('--preset=maskgit', 'commit=confidence, schedule=cosine, remask=none'),
            ('--commit=priority --priority=(', 'commit=priority')):        # which is a text here
        out, samples = sampled('joint', f'{words} --steps=4 --num_samples=2')
        assert all(word in out for word in ('steps=4', *said.split(' .. '))) and len(samples) == 2
    out, samples = sampled('joint', '--preset=universal --prompt=(+ --num_samples=2')
    assert 'ar_prefix=3' in out and all(s['nfe'] <= 23 and s['text'].startswith('(+') for s in samples)


def test_a_page_has_the_stories_of_the_first_samples(sampled, tmp_path):
    page = tmp_path / 'steps.html'
    out, samples = sampled('joint', f'--remask=wrong --steps=4 --num_samples=21 --html={page}')
    stories = Page(page).data()['stories']
    assert f'written to {page}' in out and len(stories) == 20 and 'trace' not in samples[0]
    assert all(len(told['frames']) == 5 and s['text'] in told['label'] for s, told in zip(samples, stories))
    _, (s,) = sampled('joint', f'--task=infill --text=(+_2)=_ --html={page} --steps=9 --remask=none')
    (story,) = Page(page).data()['stories']
    assert len(story['frames']) == s['nfe'] + 1
    assert story['frames'][0][1].startswith('fffmfffm')        # <bos>(+_2)=_ : what is given, and the holes
    sampled('joint', f'--task=score {FIT} --html={page}')
    (story,) = Page(page).data()['stories']
    assert story['frames'][0][1].startswith('fk') and 'NELBO' in story['note'] and len(story['frames']) == 1
    text = page.read_text(encoding='utf-8')
    assert '--task=score' in text and 'seed 1337' in text


@pytest.mark.parametrize('words', ['--task=repair --text=(+12))=3', '--preset=hybrid --steps=3'])
def test_it_can_be_watched_in_the_terminal(sampled, words):
    pytest.importorskip('rich')
    out, samples = sampled('joint', f'{words} --animate')
    assert f'sample {len(samples)} · step ' in out and f'sample {len(samples) + 1}' not in out


def test_a_dataset_without_an_end_token(sampled, tmp_path):
    _, samples = sampled('stream', '--task=infill --text=a_b --num_samples=3')
    assert all(s['tokens'] == [0, s['tokens'][1], 1] and not s['finished'] for s in samples)
    _, (s,) = sampled('stream', '--task=infill --text=ab_')
    assert len(s['tokens']) == 12 and s['text'].startswith('ab')
    _, (s,) = sampled('stream', '--task=repair --text=abab')
    assert len(s['tokens']) == 4
    # texts of different lengths, each on a canvas of its own
    lines, texts = tmp_path / 'lines.txt', ['a_b', 'ab_a', 'a_', 'b_b', '_bab']
    lines.write_text('\n'.join(texts))
    _, samples = sampled('stream', f'--task=infill --file={lines} --num_samples=2')
    for text, s in zip([text for text in texts for _ in range(2)], samples, strict=True):
        pattern = '(?s)' + text.replace('_', '.') + ('.{10}' if text == 'a_' else '')
        assert re.fullmatch(pattern, s['text'])
    _, (alone, _) = sampled('stream', '--task=infill --text=ab_a --num_samples=2')
    assert samples[2] == alone
    for task in ('repair', 'edit --mask=0:1', 'score'):
        lines.write_text('ab\na\nabb\n')
        _, samples = sampled('stream', f'--task={task} --file={lines}')
        assert [len(s['tokens']) for s in samples] == [2, 1, 3]


FREE, GIVEN = 'text, file and mask are for --task=infill', 'prompt and length are for --task=generate'


@pytest.mark.parametrize('name, words, message', [
    ('joint', f'--task=infil {FIT}', "expects one of generate, infill .. got 'infil', did you mean infill?"),
    ('joint', f'--task=zzz {FIT}', "got 'zzz'"), ('joint', FIT, f'{FREE} .. generate takes --prompt'),
    ('joint', '--mask=1:2', FREE), ('joint', '--file=lines.txt', FREE),
    ('joint', f'--task=repair {FIT} --prompt=(', f'{GIVEN} .. repair takes'),
    ('joint', f'--task=edit {FIT} --mask=1:2 --length=9', GIVEN),
    ('joint', '--task=repair', '--task=repair needs a text'),
    ('joint', '--task=infill --text=1_ --file=x', 'not both'),
    ('joint', f'--task=edit {FIT}', 'give --mask=WORD, or --mask=3:5 in tokens, or put [brackets]'),
    ('joint', '--task=infill --text=1_ --mask=0:1', 'infill takes no mask'),
    ('joint', f'--task=infill {FIT}', "has no hole ('_')"),
    ('joint', '--task=repair --text=', 'text is empty'),
    ('joint', f'--task=repair {FIT} --remask=none', 'repair finds what to change by re-masking'),
    ('joint', '--preset=remasking', "unknown preset 'remasking'"),
    ('joint', '--preset=maskgti', 'did you mean maskgit?'),
    ('plain', '--remask=wrong', 'not trained to find wrong tokens'),
    ('plain', f'--task=repair {FIT}', 'not trained to find wrong tokens'),
    ('plain', '--preset=speculative', 'no trained causal mode'),
    ('causal', '--task=infill --text=1_1', 'neither fill a hole with text right of it'),
    ('joint', '--task=infill --text=1_1 --remask=causal', 'cannot see what is right of a hole'),
    ('judge', '--task=infill --text=1_1', 'it judges tokens but cannot write'),
    ('joint', '--remask_schedule=0.3', 'two shares in 0..1'),
    ('joint', '--remask_schedule=0.3,2', 'two shares in 0..1'),
    ('joint', '--remdm=caps --remask=remdm', 'remdm expects one of'),
    ('joint', '--remask_schedule=0.3,0.1 --remask_threshold=0.5', 'give one of them'),
    ('joint', '--remask=remdm --remask_threshold=0.5', 'not for remdm'),
    ('joint', '--remask_rate=2 --remask=wrong', 'in 0..1'),
    ('joint', '--commit_threshold=0', 'commit_threshold'),
    ('joint', '--block_length=0', 'block_length must be at least 1'),
    ('causal', f'--task=score {FIT} --html=x.html', 'not trained to find wrong tokens'),
    ('joint', f'--task=score {FIT} --animate', 'nothing to watch'),
    ('joint', '--commit=priority --priority=x', "'x' in 'x' is not in the vocabulary"),
    ('joint', '--preset=intelligent --remask_rate=3', 'remask_rate is a probability, in 0..1 .. got 3.0')])
def test_mistakes(mistaken, name, words, message):
    mistaken(name, words, *message.split(' .. '))


def test_p2_takes_any_rate(sampled):
    out, _ = sampled('joint', '--preset=p2 --remask_rate=3 --steps=4 --num_samples=1')
    assert 'remask=p2' in out and 'remask_rate=3.0' in out


def test_files_without_text(mistaken, tmp_path):
    (tmp_path / 'empty').write_text('\n\n')
    (tmp_path / 'binary').write_bytes(b'\xff\x00\x80')
    for name, message in (('empty', 'there is no text in it'), ('binary', 'cannot be read'),
                          ('missing', 'cannot be read: No such file'), ('', 'cannot be read')):
        mistaken('joint', f'--task=repair --file={tmp_path / name}', tmp_path / name, message)


# -----------------------------------------------------------------------------
# what is measured of it

def quick_bench(monkeypatch, *words):
    """bench's settings; the set of training strings is empty, because reading all of them takes longest."""
    monkeypatch.setattr(common, 'training_strings', lambda s, meta: (load_task('arithmetic'), set()))
    return bench_settings('--num_samples=4', '--num_seeds=1', *words)


def test_repair_is_measured_beside_doing_nothing(monkeypatch):
    """By hand: the accuracy of the noisy rows themselves, and of the same rows with their masks filled in."""
    s, model = quick_bench(monkeypatch, '--batch_size=3'), tiny_gpt(18, 64, n_recur=1)
    clean = torch.full((8, 64), PAD)
    for row, n in zip(clean, range(5, 40, 5)):
        ids = torch.randint(15, (n,), generator=seeded(n))
        row[: n + 2] = torch.cat((torch.tensor([BOS]), ids, torch.tensor([EOS])))
    rows = tasks.repair_rows(s, model, ARITHMETIC, default_config(training_type='joint'), clean[:7])
    table = {(row['name'], row['sampler']): row for row in rows}
    hows = ['nothing', 'nothing, masks filled perfectly', 'the likeliest token everywhere', '--task=repair']
    protocols = ["without insertions", 'with insertions']
    assert list(table) == [(protocol, how) for protocol in protocols for how in hows]
    for protocol, level, insert in (("without insertions", 0.2 * 0.925, 0), ('with insertions', 0.2, 0.075)):
        nothing, filled, likeliest, repair = (table[protocol, how] for how in hows)
        mix = [('mask', 0.5), ('replace', 0.2), ('swap', 0.15), ('delete', 0.075), ('insert', insert)]
        real = clean[:7] < 17
        real[:, 0] = False
        noisy = mixed_noise(clean[:7], real, torch.full((7,), level), mix, MASK, PAD, seeded(s.seed))
        right = [
            [a == b for a, b, counts in zip(*rows) if counts]
            for rows in zip(noisy.tolist(), clean.tolist(), real.tolist())
        ]
        assert nothing['accuracy'] == pytest.approx(sum(map(sum, right)) / sum(map(len, right)))
        shares = [(sum(row) + 1) / (len(row) + 1) for row in right]
        assert nothing['by_string'] == pytest.approx(sum(shares) / 7)
        assert nothing['exact'] == pytest.approx(sum(map(all, right)) / 7)
        assert 0.3 < nothing['accuracy'] < filled['accuracy'] < 1 and nothing['exact'] <= filled['exact']
        assert [row['nfe'] for row in (nothing, filled, likeliest)] == [0, 0, 1] and 1 <= repair['nfe'] <= 16
        assert all(0 <= row['accuracy'] <= 1 and row['accuracy_se'] > 0 for row in table.values())
        assert all(0 <= row['exact'] <= 1 for row in table.values())
    first, second = (table[protocol, 'nothing']['accuracy'] for protocol in protocols)
    assert first > second
    rows = tasks.repair_rows(s, model, ARITHMETIC, default_config(training_type='unmasking'), clean[:7])
    # it cannot find the errors itself
    assert [row['sampler'] for row in rows] == hows[:3] * 2
    joint = default_config(training_type='joint')
    untouched = tasks.repair_rows(s, model, ARITHMETIC, joint, clean[:7], sigma=0.0)
    untouched = [row for row in untouched if row['sampler'].startswith('nothing')]
    assert len(untouched) == 4 and all(row['accuracy'] == row['exact'] == 1 for row in untouched)


def test_the_suite_of_samplers_has_every_rule_and_preset(monkeypatch, made):
    """Every rule that a checkpoint knows has a row, and a row named after a preset has its rules."""
    s = quick_bench(monkeypatch, f"--init_from={made['joint']}", '--budgets=2,3')
    asked = samplers.budget_rows(default_config(training_type='joint', causal_ratio=0.5), 64)
    rows, table = samplers.run(s)
    expected = [(name, n) for name, takes, _ in asked for n in ((2, 3) if takes else (None,))]
    assert [(row['name'], row['budget']) for row in rows] == expected
    for row in rows:
        assert row['n'] == 4 and row['seeds'] == 1
        assert all(0 <= row[m] <= 1 + 1e-9 for m in ('valid', 'correct', 'unique', 'length_tv'))
        assert row['budget'] is None or 0 < row['nfe'] <= row['budget']
        assert table.count(f"| {row['name']}") >= 2
    first, second = table.split('\n\n')
    assert [line.count('|') for line in (first + '\n' + second).splitlines()] == [4] * 2 * (len(asked) + 2)
    assert 'valid % · length_tv' in first and '2 passes' in first
    assert 'correct % · unique % · novel %' in second
    left_out = {'abstain'}
    assert {rules.get('commit', 'random') for _, _, rules in asked} == set(COMMIT) - left_out
    assert {rules.get('remask', 'none') for _, _, rules in asked} == {
        "none",
        "causal",
        *DOUBT,
        *OTHER_RULES,
    } - {'critic'}
    plain = dict(commit='random', remask='none')
    named = {
        name.split('preset ')[1].rstrip(')'): {**plain, **rules}
        for name, _, rules in asked
        if 'preset ' in name
    }
    assert set(named) >= set(PRESETS) - {'hybrid', 'solve'}   # solve: boards, see suites/sudoku.py
    assert all(rules == {**plain, **PRESETS[name]} for name, rules in named.items())
    kinds = {
        kind: [rules for _, _, rules in samplers.budget_rows(default_config(training_type=kind), 64)]
        for kind in ('unmasking', 'causal')
    }
    assert not {'wrong', 'p2', 'causal'} & {rules.get('remask') for rules in kinds['unmasking']}
    assert len(kinds['unmasking']) >= 10
    assert not any('ar_prefix' in rules for rules in kinds['unmasking'])
    assert kinds['causal'] == [dict(ar_prefix=64)]


def test_the_suite_of_tasks(monkeypatch, made):
    s = quick_bench(monkeypatch, f"--init_from={made['joint']}", '--budgets=2,3')
    rows, table = tasks.run(s)
    kinds = ['remask=none', 'remask=random', 'remask=wrong']
    found = [(row['name'], row['sampler']) for row in rows]
    assert found[:4] == [('infill expr=_', how) for how in [*kinds, 'remask=causal']]
    expected = [[*[('infill _=value', f'{how}, {n} passes') for n in (2, 3)], ('edit', how)] for how in kinds]
    assert found[4:13] == sum(expected, [])
    assert len(found) == 13 + 8 and found[16][1] == found[20][1] == '--task=repair'
    assert all(0 <= row['correct'] <= row['valid'] <= 1 and row['valid_se'] >= 0 for row in rows[:13])
    assert all(row['nfe'] <= int(row['sampler'].split()[-2]) for row in rows if 'passes' in row['sampler'])
    infilled, repaired = table.split('\n\n')
    assert len(infilled.splitlines()) == 13 + 2 and len(repaired.splitlines()) == 8 + 2
    assert 'accuracy %' in repaired
    assert 'valid %' in infilled


@pytest.mark.parametrize(
    'only, names', [('edit', {'edit'}), ('repair', {"without insertions", 'with insertions'})]
)
def test_one_of_the_tasks_alone(monkeypatch, made, only, names):
    s = quick_bench(monkeypatch, f"--init_from={made['plain']}", '--budgets=2,3', f'--only={only}')
    rows, table = tasks.run(s)
    assert {row['name'] for row in rows} == names and all(name in table for name in names)


def test_a_perfect_sampler_gets_every_task_right(monkeypatch, made):
    """Arithmetic decides what is right: first the samples are the held-out strings, then other true ones."""
    s = quick_bench(monkeypatch, f"--init_from={made['plain']}", '--budgets=2,3', '--only=infill,edit')
    clean = common.spread_rows(common.data_of({'name': 'arithmetic'}, {})[1]['val'], 4, 64)
    texts = [decode(ARITHMETIC, ids)[0] for ids in clean.tolist()]
    asked = []

    def fill(model, meta, canvas, fixed, **how):
        asked.append((canvas, fixed, how))
        return [dict(text=text, nfe=1) for text in texts]

    monkeypatch.setattr(tasks, 'fill', fill)
    rows, _ = tasks.run(s)
    assert all(row['valid'] == row['correct'] == 1 for row in rows) and len(asked) == len(rows)
    for (canvas, fixed, how), row in zip(asked, rows):
        # all that is given is true
        assert torch.equal(canvas[fixed], clean[fixed]) and (canvas[~fixed] == MASK).all()
        holes = [(c == MASK).sum().item() for c in canvas]
        if row['name'] == 'edit':
            assert holes == [1] * 4 and how['steps'] == 8
        elif row['name'] == 'infill _=value':
            assert holes == [text.index('=') for text in texts]
        else:
            assert holes == [64 - 2 - text.index('=') for text in texts]
    texts = ['(+11)=2' if text.endswith('=3') else '(+12)=3' for text in texts]
    rows, _ = tasks.run(s)
    assert all(row['valid'] == 1 and row['correct'] == 0 for row in rows)


def test_the_suites_run_as_commands(run, made, tmp_path):
    for suite, only in (('samplers', 'commit=margin'), ('tasks', 'expr')):
        path = tmp_path / f'{suite}.json'
        status, out, err = run(
            'bench',
            f'--suite={suite}',
            f"--init_from={made['joint']}",
            '--num_samples=4',
            '--num_seeds=1',
            '--budgets=2,3',
            f'--only={only}',
            f'--json={path}',
            *CPU,
        )
        assert status == 0, err
        rows = json.loads(path.read_text())['rows']
        assert len(rows) == (2 if suite == 'samplers' else 4)
        assert all(only in row['name'] and row['name'] in out for row in rows)


# -----------------------------------------------------------------------------
# text in, text out

@pytest.mark.parametrize('ids, text, finished', [
    ([15, 10, 12, 1, 2, 11, 14, 3, 16, 17, 4], '(+12)=3', True),
    ([15, 10, 12, 1, 2, 11, 14, 3], '(+12)=3', False), ([15, 16, 16], '', True),
    ([15, 1, 17, 2], '1·2', False), ([15, 17, 17, 2], '··2', False),   # scored as wrong, and as long as it is
    ([15, 1, 17], '1·', False), ([15, 1, 17, 17, 17], '1·', False)])   # one is enough to see it
def test_decode(ids, text, finished):
    assert decode(ARITHMETIC, ids) == (text, finished)


def test_encode():
    assert encode(ARITHMETIC, '(+12)=3') == [10, 12, 1, 2, 11, 14, 3]
    assert encode(STREAM, 'ab\n') == [0, 1, 2] and decode(STREAM, [0, 2, 1]) == ('a\nb', False)
    with pytest.raises(UserError, match="'x' in '1x2' is not in the vocabulary of arithmetic: '0123"):
        encode(ARITHMETIC, '1x2')


def test_start_canvas():
    canvas, fixed = start_canvas(small(), ARITHMETIC, 3)
    assert canvas.tolist() == [[15] + [18] * 7] * 3 and fixed.tolist() == [[True] + [False] * 7] * 3
    canvas, fixed = start_canvas(small(), ARITHMETIC, 2, prompt=[1, 2])
    assert canvas.tolist() == [[15, 1, 2] + [18] * 5] * 2 and torch.equal(fixed, canvas != 18)
    canvas, fixed = start_canvas(small(), ARITHMETIC, 2, prompt=[1], lengths=torch.tensor([2, 6]))
    assert canvas.tolist() == [[15, 1, 18, 16, 17, 17, 17, 17], [15, 1, 18, 18, 18, 18, 18, 16]]
    assert torch.equal(fixed, canvas != 18)
    assert start_canvas(small(4), STREAM, 1)[0].tolist() == [[18] * 4]
    canvas, fixed = start_canvas(small(4), STREAM, 1, prompt=[2], lengths=torch.tensor([3]))
    assert canvas.tolist() == [[2, 18, 18]] and fixed.tolist() == [[True, False, False]]


@pytest.mark.parametrize('meta, prompt, lengths, message', [
    (ARITHMETIC, [], [3, 7], 'a text of 7 tokens does not fit: block_size 8 leaves room for 6'),
    (ARITHMETIC, [1] * 7, None, 'a text of 7 tokens does not fit: block_size 8 leaves room for 6'),
    (ARITHMETIC, [1, 2, 3], [2, 2], 'a length of 2 is too short: the prompt has 3 tokens'),
    (ARITHMETIC, [1, 2, 3], [2, 5], 'the prompt has 3 tokens'),    # too short for one row is too short
    (ARITHMETIC, [], [0, 3], 'a length of 0 is too short'),
    (STREAM, [], [2 * 10 ** 6], 'a text of 2000000 tokens does not fit: at most 1,000,000 are written')])
def test_starts_that_do_not_fit(meta, prompt, lengths, message):
    with pytest.raises(UserError, match=message):
        start_canvas(small(), meta, 2, prompt, None if lengths is None else torch.tensor(lengths))


def test_load_task():
    assert load_task('shakespeare_char') is None and load_task('no such dataset') is None
    assert load_task('arithmetic').verdict('(+12)=3') == '✓'
