"""What a user gives: texts read back as the tokens that they are, files, holes, line ends, where it stops."""

import io
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ARITHMETIC, default_config, seeded, tiny_gpt, write_checkpoint
from test_commands import CPU, STREAM, read_samples, refused, went_well

from configurator import UserError
from parts.presets import supports
from plumbing.score import given_sample, judge_rows, judge_samples
from plumbing.text import decode, encode, holes, read_lines, stop_at, typed, usual_hole

GPT2 = dict(name='gpt2', format='stream', vocab_size=50257, tokenizer='gpt2', itos=None, bos=None, eos=None,
            pad=None)
# ab is the longest token at the start of abc, but then c is left
OWN = dict(ARITHMETIC, name='own', tokenizer='own', vocab_size=8, bos=5, eos=6, pad=7,
           itos=['a', 'ab', 'bc', ' the', '\n', '<bos>', '<eos>', '<pad>'])


@pytest.fixture
def gpt2():
    """Skips a test where the vocabulary of GPT-2 cannot be had."""
    tiktoken = pytest.importorskip('tiktoken')
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception:                        # no vocabulary, no network: whatever that raises
        pytest.skip('tiktoken cannot load the vocabulary of GPT-2')

# -----------------------------------------------------------------------------
# text out, text in


def same_text(meta, num=300):
    """Random rows of tokens, as a sampler may draw them: decode, encode, decode is decode."""
    for n in range(num):
        ids = torch.randint(meta['vocab_size'], (n % 12,), generator=seeded(n)).tolist()
        if meta['tokenizer'] == 'gpt2' and n % 3 == 0:
            ids.insert(n % 5, 50256)
        text, finished = decode(meta, ids)
        assert decode(meta, encode(meta, text) + [meta['eos']] * finished) == (text, finished)


@pytest.mark.parametrize('meta', [ARITHMETIC, STREAM, OWN], ids=['rows', 'stream', 'own'])
def test_what_is_written_is_read_as_the_same_text(meta):
    same_text(meta)
    if meta is STREAM:
        assert all(encode(meta, decode(meta, [i, j])[0]) == [i, j] for i in range(3) for j in range(3))


def test_what_is_written_in_tokens_of_gpt2_is_read_as_the_same_text(gpt2):
    """<|endoftext|> is one token, the one between the documents of the data."""
    same_text(GPT2)
    assert encode(dict(tokenizer='gpt2'), '<|endoftext|>') == [50256]
    assert encode(GPT2, 'a<|endoftext|>\u00e9') == [64, 50256, *gpt2.encode_ordinary('\u00e9')]


def test_padding_is_read_as_padding():
    assert encode(ARITHMETIC, '1·2') == [1, 17, 2]
    assert encode(dict(STREAM, itos=['a', '·', '\n']), 'a·') == [0, 1]         # where it is a character
    with pytest.raises(UserError, match="'·' in 'a·' is not in the vocabulary"):
        encode(STREAM, 'a·')


def test_the_longest_token_that_leaves_a_rest_of_tokens():
    assert encode(OWN, 'ab the\naabc') == [1, 3, 4, 0, 0, 2] and encode(OWN, '') == []
    for text, odd in (('abx', 'x'), ('a<bos>', '<'), ('<eos>', '<'), ('abb', 'b'), ('ab th', ' ')):
        with pytest.raises(UserError, match=f"{odd!r} in '{text}' is not in the vocabulary of own: 'a ab "):
            encode(OWN, text)
    with pytest.raises(UserError, match=r"'x' in '\.\.\.b{40}xb{39}\.\.\.' is not"):    # what is around it
        encode(STREAM, 'b' * 99 + 'x' + 'b' * 99)

# -----------------------------------------------------------------------------
# files


@pytest.mark.parametrize('data, lines', [
    ('a\nb', [(1, 'a'), (2, 'b')]), ('\n\na\n\nb\n', [(3, 'a'), (5, 'b')]),
    ('a\r\n\r\nb\rc\r\n', [(1, 'a'), (3, 'b\rc')]), (' \n\ta ', [(1, ' '), (2, '\ta ')]),
    ('a\u2028b\x0bc\x0cd\x85e\u2029f\x1cg\n', [(1, 'a\u2028b\x0bc\x0cd\x85e\u2029f\x1cg')]),
    ('\ufeffa\n\ufeffb', [(1, 'a'), (2, '\ufeffb')])])          # a mark at the start only
def test_a_line_is_what_ends_in_a_line_end(tmp_path, monkeypatch, data, lines):
    path = tmp_path / 'lines.txt'
    path.write_bytes(data.encode())
    assert read_lines(path) == lines
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(data.encode())))
    assert read_lines('-') == lines


@pytest.mark.parametrize('data, message', [
    (b'', 'there is no text'), (b'\xef\xbb\xbf\r\n\n', 'there is no text'), (b'a\n\xff', 'cannot be read')])
def test_a_file_without_text(monkeypatch, data, message):
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(data)))
    with pytest.raises(UserError, match=f'^-: {message}'):
        read_lines('-')


# -----------------------------------------------------------------------------
# holes and prompts

CODE = dict(STREAM, itos=[*'_[MASK]?\\n'])


@pytest.mark.parametrize('meta, hole', [(ARITHMETIC, '_'), (STREAM, '_'), (CODE, '[MASK]'), (GPT2, '[MASK]'),
                                        (dict(OWN, itos=['my_', *OWN['itos'][1:]]), '[MASK]')])
def test_the_usual_hole_is_no_ordinary_text(meta, hole):
    assert usual_hole(meta) == hole


def test_a_hole_where_texts_have_underscores():
    assert holes(CODE, '_[MASK]K[MASK]', None, 99) == ([0, 99, 5], False)
    for text in ('K_K', 'K'):
        with pytest.raises(UserError, match=rf"'{text}' has no hole \('\[MASK\]'\) to fill: .* --hole"):
            holes(CODE, text, None, 99)
    with pytest.raises(UserError, match="hole expects a text that is not in the vocabulary .*, got '\\?'"):
        holes(CODE, 'K?', '?', 99)


@pytest.mark.parametrize('text, hole, expected', [
    ('The [MASK] went', None, ['The', None, ' went']),              # the blank comes with the hole's word
    ('The [MASK].', None, ['The', None, '.']), ('The[MASK] went', None, ['The', None, ' went']),
    ('The [MASK] [MASK] went [MASK]', None, ['The', None, None, ' went', True]),
    ('The  [MASK]', None, ['The', ' ', True]), (' [MASK]\n[MASK] a', None, [None, '\n', None, ' a']),
    ('my_var = [MASK]<|endoftext|>', None, ['my', '_', 'var', ' =', None, '<|endoftext|>']),
    ('The _ went', '_', ['The', None, ' went'])])
def test_holes_in_tokens_of_gpt2(gpt2, text, hole, expected):
    """None: a hole, True: an open one."""
    ids, ends = holes(GPT2, text, hole, None)
    assert [i if i is None else gpt2.decode([i]) for i in ids] + [True] * (not ends) == expected


def test_the_underscore_of_a_program_is_text(gpt2):
    with pytest.raises(UserError, match=r"'my_var = 1' has no hole \('\[MASK\]'\)"):
        holes(GPT2, 'my_var = 1', None, 0)


def test_a_word_of_an_own_vocabulary_brings_its_blank():
    assert holes(OWN, 'a _ the_', None, 99) == ([0, 99, 3], False)


@pytest.mark.parametrize('meta, text, expected', [
    (STREAM, 'a\\nb', 'a\nb'), (STREAM, '\\n', '\n'), (CODE, 'n\\n', 'n\\n'), (GPT2, '\\nu', '\\nu'),
    (ARITHMETIC, '(+12)', '(+12)'), (STREAM, '@p.txt', '@p.txt')])
def test_what_is_typed(meta, text, expected):
    assert typed(meta, text) == expected


def test_a_prompt_from_a_file(tmp_path):
    """As it stands, but for a last line end where texts have none."""
    path = tmp_path / 'p.txt'
    path.write_bytes(b'\xef\xbb\xbfa\\nb\r\n\n')
    assert typed(STREAM, f'FILE:{path}') == typed(GPT2, f'FILE:{path}') == 'a\\nb\n\n'
    path.write_text('(+12)=3\n')
    assert typed(ARITHMETIC, f'FILE:{path}') == '(+12)=3'
    with pytest.raises(UserError, match='nowhere: cannot be read: No such file'):
        typed(STREAM, 'FILE:nowhere')


# -----------------------------------------------------------------------------
# the command


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Words that start from untrained checkpoints."""
    folder = tmp_path_factory.mktemp('made')
    how = dict(training_type='joint', causal_ratio=0.5)
    return dict(rows=f"--init_from={write_checkpoint(folder / 'rows.pt', **how)}",
                stream=f"--init_from={write_checkpoint(folder / 's.pt', tiny_gpt(3, 12), STREAM, **how)}")


def test_a_bad_line_does_not_end_the_rest(run, made, tmp_path):
    """It is named by its number, and counted at the end; only if all are bad the command fails."""
    path, samples = tmp_path / 'lines.txt', tmp_path / 's.jsonl'
    path.write_text('\n(+_2)=3\n(+12)=3\n(+x_)=3\n\n1_\n' + '1' * 70 + '_2\n')
    words = ('--task=infill', f'--file={path}', f'--save={samples}', *CPU)
    out = went_well(run('sample', made['rows'], *words))
    for number, message in ((3, "'(+12)=3' has no hole"), (4, "'x' in '(+x' is not in the vocabulary"),
                            (7, 'a text of 72 tokens does not fit')):
        assert f'{path}, line {number}: {message}' in out
    assert f'3 of 5 lines of {path} were left out' in out.splitlines()[-1]
    assert [s['text'][:1] for s in read_samples(samples)] == ['(', '1']
    path.write_text('(+12)=3\nx_\n')
    refused(run('sample', made['rows'], *words), 'sample', f'{path}, line 1: ', 'none of the 2 lines')


def test_saved_samples_are_scored_as_they_were(run, made, tmp_path):
    """Token by token, line ends within them included; what was saved by other hands is read as text."""
    for kind in ('rows', 'stream'):
        first, again = tmp_path / f'{kind}.jsonl', tmp_path / f'{kind}2.jsonl'
        went_well(run('sample', made[kind], '--num_samples=4', '--score', f'--save={first}', *CPU))
        out = went_well(run('sample', made[kind], '--task=score', f'--file={first}', f'--save={again}', *CPU))
        before, after = read_samples(first), read_samples(again)
        assert [dict(s, nfe=0) for s in before] == after
        real = [sum(i not in (15, 17) for i in s['tokens']) for s in after] if kind == 'rows' else [12] * 4
        nats = sum(n * s['nelbo'] for n, s in zip(real, after)) / sum(real)
        bits = nats / math.log(2)
        assert f'4 texts, {sum(real)} tokens, NELBO {nats:.3f} nats/token ({bits:.3f} bits), ' in out
    first.write_text('{"text": "ab"}\n{"text": "ab", "tokens": [0, 9]}\n{"text": 3}\nab\n[]\n{"tex": "a"}\n')
    out = went_well(run('sample', made['stream'], '--task=score', f'--file={first}', f'--save={again}', *CPU))
    assert [s['tokens'] for s in read_samples(again)] == [[0, 1]] * 2
    assert out.count("expected a JSON object with a 'text'") == 4 and '4 of 6 lines' in out


@pytest.mark.parametrize('tokens, saved', [
    ([15, 1, 17, 2], True), ([15, 1, 2, 16], False), ([1, 17, 2], False), ([15, 1, 17, 2] + [16] * 70, False),
    ([15, 1, 17, 20], False), ([15, 1.0, 17, 2], False), ('1', False), (None, False)])
def test_saved_tokens_count_if_they_spell_the_text(tokens, saved):
    sample = given_sample(tiny_gpt(18, 64), ARITHMETIC, '1·2', tokens)
    assert sample['tokens'] == ([15, 1, 17, 2] if saved else [15, 1, 17, 2, 16])
    assert sample['finished'] != saved


@torch.no_grad()
def test_a_long_text_is_scored_in_windows():
    """Every token once, all of them alike; what fits is scored as before."""
    model, can = tiny_gpt(3, 6), supports(default_config(training_type='joint', causal_ratio=0.5))
    text = 'abba\nab\naabbab'
    samples = [given_sample(model, STREAM, text[:n]) for n in (6, 14)]
    judge_samples(model, STREAM, can, samples)
    assert 'windows' not in samples[0] and samples[1]['windows'] == 3
    parts = [judge_rows(model, STREAM, torch.tensor([encode(STREAM, text[at:at + 6])]), can)[0]
             for at in (0, 6, 12)]
    assert parts[0] == {name: samples[0][name] for name in parts[0]}
    for name in ('nelbo', 'causal_nll'):
        assert samples[1][name] == pytest.approx(sum(n * p[name] for n, p in zip((6, 6, 2), parts)) / 14)
    assert samples[1]['p_wrong'] == [p for part in parts for p in part['p_wrong']]
    with pytest.raises(UserError, match='the text is empty'):
        given_sample(model, STREAM, '')


def test_windows_are_said_on_screen(run, made):
    out = went_well(run('sample', made['stream'], '--task=score', f"--text={'ab' * 9}", *CPU))
    assert 'longer than block_size: in 2 windows, each by itself' in out and 'texts, ' not in out

# -----------------------------------------------------------------------------
# where a sample stops


@pytest.mark.parametrize('meta, ids, given, text, left', [
    (STREAM, [0, 2, 1, 2, 2, 0], 0, 'a', 1), (STREAM, [0, 2, 1, 2, 2, 0], 2, 'a\nb', 3),
    (STREAM, [2, 0], 0, '', 0), (STREAM, [0, 1], 0, 'ab', None), (STREAM, [0, 2], 2, 'a\n', None),
    (OWN, [5, 0, 3, 4, 2, 6], 0, 'a the', 3), (OWN, [5, 4, 0, 6], 0, '', 1),
    (OWN, [5, 0, 6, 4], 0, 'a', None)])
def test_a_sample_ends_before_the_first_stop(meta, ids, given, text, left):
    sample = dict(text=decode(meta, ids)[0], tokens=ids, nfe=7, finished=False)
    stop_at(meta, [sample], '\n', given)
    stopped = left is not None
    assert sample == dict(text=text, tokens=ids[:left], nfe=7, finished=stopped)


def test_a_stop_within_a_token(gpt2):
    """The text is exact, the tokens are as few as have all of it."""
    ids = gpt2.encode('Who\u00e9? \u4f60 the end')
    for stop, text, last in (('e', 'Who\u00e9? \u4f60 th', ' the'), (' the', 'Who\u00e9? \u4f60', None),
                             ('\u4f60', 'Who\u00e9? ', None), ('?', 'Who\u00e9', None)):
        sample = dict(text=gpt2.decode(ids), tokens=ids)
        stop_at(GPT2, [sample], stop, 0)
        assert sample['text'] == text and gpt2.decode(sample['tokens']).startswith(text)
        assert last is None or gpt2.decode(sample['tokens'][-1:]) == last
        assert not gpt2.decode(sample['tokens'][:-1]).startswith(text)


def test_stop_as_typed(run, made, tmp_path):
    path = tmp_path / 's.jsonl'
    words = (made['stream'], r'--prompt=a\nb', '--num_samples=5', '--score', f'--save={path}', *CPU)
    went_well(run('sample', *words))
    whole = read_samples(path)
    went_well(run('sample', *words, r'--stop=\n'))
    stopped = read_samples(path)
    for s, before in zip(stopped, whole, strict=True):
        assert s['text'] == 'a\nb' + before['text'][3:].split('\n')[0] and s['nfe'] == before['nfe']
        assert len(s['text']) == len(s['tokens']) == len(s['p_wrong'])
    assert [s['text'] for s in stopped] != [s['text'] for s in whole]
    refused(run('sample', *words, '--stop=x'), 'sample', "stop: 'x' is not in the vocabulary of text")
    refused(run('sample', made['rows'], '--task=repair', '--text=1', '--stop=1'), 'sample', 'stop is for --')
    # nothing is left to be scored
    went_well(run('sample', made['stream'], '--score', '--num_samples=9', '--stop=a', *CPU))
