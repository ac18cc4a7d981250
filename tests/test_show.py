"""What is shown of a denoising: frames are true to the trace, and no token's text breaks out of the page."""

import io
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from conftest import ARITHMETIC, load_script, seeded, tiny_gpt

from configurator import UserError
from plumbing import show
from plumbing.text import decode, encode, pieces, sample_line, visible

BOS, EOS, PAD, MASK = ARITHMETIC['bos'], ARITHMETIC['eos'], ARITHMETIC['pad'], ARITHMETIC['vocab_size']
HOSTILE = ['</script><script>alert(1)</script>', '<!--<script>', '"', "'", '\\', '&amp;', ']]>',
           '$data', '\u2028', '\ud800']


def told(*rows, meta=ARITHMETIC):
    """The story of a trace, whose first token is given, and whose others are doubted by their position."""
    trace = torch.tensor(rows)                                                          # (S, T)
    position = torch.arange(trace.size(1))
    doubts = (position / 8).expand(trace.shape).masked_fill(trace == MASK, math.nan)
    return show.story(meta, trace, position == 0, doubts, 'label')


def hand_made(tokens, label='label'):
    """A story of one frame with any token texts."""
    n = len(tokens)
    return dict(label=label, frames=[dict(tokens=tokens, states=['kept'] * n, doubts=[0.25] * n)])


class Page(HTMLParser):
    """
    What a browser makes of the page: its scripts, each with its attributes and its text, and all other tags.
    """

    def __init__(self, path):
        super().__init__()
        self.scripts, self.tags, self.text = [], [], ''
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == 'script':
            self.scripts.append([dict(attrs), ''])

    def handle_data(self, data):
        if self.lasttag == 'script':
            self.scripts[-1][1] += data
        self.text += data

    def data(self):
        return json.loads(self.scripts[0][1])


def write(path, *stories, title='title', foot='foot', **look):
    show.write_page(str(path), title, [foot], stories, dict(kind='boxes', **look))
    return Page(path)


def test_judge_steps_is_one_minus_the_probability_of_the_token_and_nan_exactly_at_masks():
    model = tiny_gpt(V=5, T=6)
    trace = torch.tensor([[5, 5, 1, 0, 2, 5], [5] * 6, [3, 5, 1, 0, 5, 4], [0, 1, 2, 3, 4, 0]])
    doubts = show.judge_steps(model, trace)
    assert doubts.shape == (4, 6) and not doubts.requires_grad
    assert torch.equal(doubts.isnan(), trace == 5)
    probs = model.logits(model(trace)).softmax(-1).detach()
    for step in range(4):
        for i, token in enumerate(trace[step].tolist()):
            expected = 1 - probs[step, i, token].item()
            assert token == 5 or doubts[step, i].item() == pytest.approx(expected, abs=1e-6)


def test_a_judge_that_never_saw_a_mask_is_shown_what_the_writer_would_write():
    judge, writer = tiny_gpt(V=5, T=6, seed=1), tiny_gpt(V=5, T=6, seed=2)
    canvas = torch.tensor([[3, 5, 1, 0, 5, 4]])
    whole = torch.where(canvas == 5, writer.logits(writer(canvas), real_only=True).argmax(-1), canvas)
    doubts = show.judge_steps(judge, canvas, writer)
    assert torch.equal(doubts.isnan(), canvas == 5)
    assert torch.equal(doubts[canvas != 5], show.judge_steps(judge, whole)[canvas != 5])
    assert not torch.equal(doubts[canvas != 5], show.judge_steps(judge, canvas)[canvas != 5])


def test_a_story_says_what_happened_to_every_position():
    frames = told([BOS, MASK, MASK, 3, 4, MASK],
                  [BOS, 7, MASK, MASK, 5, MASK],
                  [BOS, 7, 10, MASK, 5, EOS])['frames']
    assert [frame['states'] for frame in frames] == [
        ['fixed', 'mask', 'mask', 'kept', 'kept', 'mask'],
        ['fixed', 'new', 'mask', 'remasked', 'changed', 'mask'],
        ['fixed', 'kept', 'new', 'mask', 'kept', 'new']]
    assert {state for frame in frames for state in frame['states']} == set(show.STATES) - {'draft'}
    assert [''.join(frame['tokens']) for frame in frames] == ['⟨▒▒34▒', '⟨7▒▒5▒', '⟨7(▒5⟩']
    assert frames[0]['doubts'] == [None, None, None, 3 / 8, 4 / 8, None]  # what was given is not doubted
    assert frames[2]['doubts'] == [None, 1 / 8, 2 / 8, None, 4 / 8, 5 / 8]


def test_a_story_says_what_became_of_a_draft():
    """What is accepted is new, the first that is not becomes another token, those behind are taken back."""
    frames = told([BOS] + [MASK] * 6,
                  [BOS, ~7, ~3, ~4, ~5, MASK, MASK],
                  [BOS, 7, 10, MASK, MASK, MASK, MASK],
                  [BOS, 7, 10, ~EOS, ~7, ~PAD, ~1],
                  [BOS, 7, 10, EOS, PAD, PAD, PAD])['frames']
    assert [frame['states'][1:] for frame in frames] == [
        ['mask'] * 6, ['draft'] * 4 + ['mask'] * 2,
        ['new', 'changed', 'remasked', 'remasked', 'mask', 'mask'],
        ['kept', 'kept'] + ['draft'] * 4, ['kept', 'kept', 'new', 'new', 'new', 'new']]
    assert ''.join(frames[1]['tokens']) == '⟨7345▒▒'
    model = tiny_gpt(V=5, T=6)
    draft, plain = torch.tensor([[3, ~1, 5, 5, 2, 5]]), torch.tensor([[3, 5, 5, 5, 2, 5]])
    doubts = show.judge_steps(model, draft)
    assert torch.equal(doubts.isnan(), plain == 5)                  # what is not decided is not doubted
    assert torch.equal(doubts.nan_to_num(), show.judge_steps(model, plain).nan_to_num())


def test_what_is_longer_than_the_network_reads_is_judged_in_windows():
    model, trace = tiny_gpt(V=5, T=6), torch.randint(5, (2, 14), generator=seeded())
    parts = [show.judge_steps(model, part) for part in (trace[:, :6], trace[:, 6:12], trace[:, 12:])]
    assert torch.equal(show.judge_steps(model, trace), torch.cat(parts, 1))


def test_the_padding_at_the_right_is_left_out_but_nothing_that_was_ever_written():
    end = [BOS, 7, EOS, PAD, PAD, PAD]
    for step, width in (([BOS, MASK, MASK, MASK, MASK, MASK], 3), ([BOS, 7, MASK, PAD, PAD, MASK], 3),
                        ([BOS, MASK, MASK, MASK, 4, MASK], 5), ([BOS, 7, EOS, PAD, PAD, 2], 6)):
        story = told([BOS] + [MASK] * 5, step, end)
        widths = [[len(column) for column in frame.values()] for frame in story['frames']]
        assert widths == [[width] * 3] * 3, step
    assert len(told([PAD, PAD], [PAD, PAD])['frames'][0]['tokens']) == 1
    # not finished: no padding yet
    assert len(told([BOS, MASK, MASK], [BOS, 7, MASK])['frames'][0]['tokens']) == 3
    assert len(told(end, end, meta={**ARITHMETIC, 'pad': None})['frames'][0]['tokens']) == 6


def test_what_cannot_be_seen_gets_a_sign(monkeypatch):
    text = dict(name='text', tokenizer='char', vocab_size=4, itos=[*'a \n\x1b'], bos=None, eos=None, pad=None)
    assert [show.printable(text, id) for id in range(5)] == ['a', ' ', '\n', '␛', '▒']
    pieces = {0: b' the', 1: b'\xe2\x82', 2: b'<|endoftext|>'}
    monkeypatch.setattr(show, 'gpt2', lambda: SimpleNamespace(decode_single_token_bytes=pieces.get))
    bpe = dict(text, tokenizer='gpt2', vocab_size=3, eos=2)
    assert [show.printable(bpe, id) for id in range(4)] == [' the', '\ufffd', '⟩', '▒▒']


CHARS = dict(name='chars', tokenizer='char', bos=None, eos=None, pad=None,
             itos=[*'ab \n\t\u4f60\u0301\x1b\x00\r\x9b', '\u4f60\na'])
CHARS['vocab_size'] = len(CHARS['itos'])


def test_no_control_character_reaches_the_terminal(capsys):
    """Not of a text, of what was given, of a verdict or of an animation; line ends and tabs do."""
    controls = ''.join(map(chr, [*range(32), *range(127, 160)]))
    hostile = f'a{controls}b'

    def clean(text):
        return not {*controls} - {'\n', '\t'} & {*text}
    assert visible(hostile).startswith('a␀␁') and '\t\n␋' in visible(hostile) and '␛␜' in visible(hostile)
    assert visible(hostile).endswith(r'␡\x80' + ''.join(rf'\x{c:x}' for c in range(129, 160)) + 'b')
    assert clean(visible(hostile)) and visible('é\u4f60\U0001f600\xa0') == 'é\u4f60\U0001f600\xa0'
    ids = encode(CHARS, '\x1b\x00\r\x9ba')
    sample = dict(text=decode(CHARS, ids)[0], tokens=ids, marks='^' * 5)
    assert show.report(sample, CHARS, SimpleNamespace(verdict=str.upper), hostile).splitlines()[-2:] == [
        '-> ␛␀␍\\x9ba   ␛␀␍\\x9bA', '   ^^^^^^^^   (^ changed, ? doubted and kept)']
    task = SimpleNamespace(verdict=str)
    for text in (show.report(sample, CHARS, None, hostile), show.report(sample, CHARS, task, None),
                 sample_line(hostile, None), sample_line(hostile, task),
                 *(show.printable(CHARS, id) for id in range(12))):
        assert clean(text)
    pytest.importorskip('rich')
    show.animate(live(hand_made([show.printable(CHARS, 7)], hostile)))
    assert clean(capsys.readouterr().out)


@pytest.mark.parametrize('text, marks, expected', [
    ('ab', '^ ', ['ab', '^']), ('ab', ' ?', ['ab', ' ?']),
    ('ab\nba\n\nb', ' ^  ?  ^', ['ab', ' ^', 'ba', ' ?', '', 'b', '^']),          # under each line
    ('a\n\nb', ' ^? ', ['a↵', ' ^', '↵', '?', 'b']),                             # a line end that changed
    ('a\u4f60b\u4f60', ' ^ ?', ['a\u4f60b\u4f60', ' ^^ ??']),                     # two columns
    ('a\u0301b', ' ^?', ['a\u0301b', '^?']), ('a\u0301b', '^ ?', ['a\u0301b', '^?']),
    ('a\tb\tb', ' ^ ?^', ['a       b       b', ' ^^^^^^^ ???????^']),
    ('\x1ba\x9bb', '^ ^?', ['␛a\\x9bb', '^ ^^^^?'])])
def test_marks_stand_under_what_they_mark(text, marks, expected):
    sample = dict(text=text, tokens=encode(dict(CHARS, itos=CHARS['itos'][:-1]), text), marks=marks)
    out = show.report(sample, CHARS, SimpleNamespace(verdict=lambda text: '!'))
    out = out.replace('   (^ changed, ? doubted and kept)', '')
    last = max(i for i, line in enumerate(expected) if set(line) - set(' ^?'))
    assert out.split('\n') == [line + '   !' * (i == last) for i, line in enumerate(expected)]


def test_what_is_said_under_a_text_is_said_once():
    """Also of a token that is more than one line; after what was given, all is to the right."""
    sample = dict(text='a\u4f60\nab', tokens=[0, 11, 1], marks='^? ', p_wrong=[0.91, 0.25, 0.0])
    assert show.report(sample, CHARS, None, 'x\ny') == '\n'.join([
        '   x', '   y', '-> a\u4f60↵', '   ^???   (^ changed, ? doubted and kept)',
        '   9222   p(WRONG) of every token in tenths', '   ab', '   ?', '   20', '-' * 15])


def test_a_long_line_and_its_signs_are_folded_together(monkeypatch):
    monkeypatch.setenv('COLUMNS', '33')
    sample = dict(text='ab' * 20, tokens=[0, 1] * 20, marks=' ' * 31 + '^' + ' ' * 8)
    assert show.report(sample, CHARS, None, 'x').split('\n')[:-1] == [
        '   x', '-> ' + 'ab' * 15, '   ' + 'ab' * 5, '    ^   (^ changed, ? doubted and kept)']
    same = show.report(dict(sample, marks=' ' * 40), CHARS, None, 'ab' * 20)
    assert same.split('\n')[1:] == ['-> ' + 'ab' * 20, '   (nothing changed)', '-' * 15]


def test_a_mark_of_the_end_has_a_column():
    sample = dict(text='12', tokens=[BOS, 1, 2, EOS], marks='  ?^')
    assert show.report(sample, ARITHMETIC, None).split('\n') == [
        '12', ' ?^   (^ changed, ? doubted and kept)', '-' * 15]


@pytest.mark.parametrize('name', ['rows', 'gpt2'])
def test_the_pieces_of_a_text_are_the_text(name):
    """Also where GPT-2's tokens are halves of characters, or of none."""
    meta = ARITHMETIC
    if name == 'gpt2':
        meta = dict(CHARS, tokenizer='gpt2', itos=None, vocab_size=50257)
        pytest.importorskip('tiktoken')
        try:
            show.gpt2()
        except UserError:
            pytest.skip('tiktoken cannot load the vocabulary of GPT-2')
    for n in range(300):
        high = 256 if n % 2 and name == 'gpt2' else meta['vocab_size']  # the first ones are bytes
        ids = torch.randint(high, (n % 9,), generator=seeded(n)).tolist()
        found = [*pieces(meta, ids)]
        assert len(found) == len(ids) and ''.join(text for text, _ in found) == decode(meta, ids)[0]


def test_marks_of_tokens_of_gpt2():
    """A token has all of its characters; a character of several tokens has the strongest of their marks."""
    pytest.importorskip('tiktoken')
    try:
        ids = show.gpt2().encode('Who went\n\u2603 \u4f60')
    except UserError:
        pytest.skip('tiktoken cannot load the vocabulary of GPT-2')
    meta = dict(CHARS, tokenizer='gpt2', itos=None, vocab_size=50257)
    assert [text for text, _ in pieces(meta, ids)] == ['Who', ' went', '\n', '', '\u2603', ' ', '', '\u4f60']
    for marks, expected in ((' ^      ', ['Who went', '   ^^^^^', '\u2603 \u4f60']),
                            ('?  ^ ? ^', ['Who went', '???', '\u2603 \u4f60', '^?^^'])):
        out = show.report(dict(text='Who went\n\u2603 \u4f60', tokens=ids, marks=marks), meta, None)
        assert out.replace('   (^ changed, ? doubted and kept)', '').split('\n')[:-1] == expected


def unpacked(data, number):
    """The frames of a story as the page's script reads them: [(tokens, states, doubts)]."""
    frames = []
    for ids, states, doubts in data['stories'][number]['frames']:
        tokens = frames[-1][0][:] if frames else [data['tokens'][id] for id in ids]
        for place, id in zip(ids[::2], ids[1::2]) if frames else ():
            tokens[place] = data['tokens'][id]
        steps = len(data['doubts']) - 1
        doubts = [None if c == ' ' else data['doubts'].index(c) / steps for c in doubts]
        frames.append((tokens, states, doubts))
    return frames


def test_the_page_holds_what_went_in(tmp_path):
    story = told([BOS, MASK, MASK, 3, 4, MASK], [BOS, 7, MASK, MASK, 5, MASK], [BOS, 7, 10, MASK, 5, EOS])
    data = write(tmp_path / 'page.html', story, hand_made(['7', 'new'], 'second')).data()
    assert [story['label'] for story in data['stories']] == ['label', 'second']
    names = {state[0]: state for state in show.STATES}
    assert len(names) == len(show.STATES)  # one letter tells them apart
    assert data['words'] == {letter: show.WORDS[state] for letter, state in names.items()}
    for (tokens, states, doubts), frame in zip(unpacked(data, 0), story['frames'], strict=True):
        assert tokens == frame['tokens'] and [names[letter] for letter in states] == frame['states']
        for doubt, true in zip(doubts, frame['doubts'], strict=True):
            assert doubt is true is None or doubt == pytest.approx(true, abs=0.006)
    assert len(set(data['tokens'])) == len(data['tokens']) == 9
    assert 'foot' in (tmp_path / 'page.html').read_text(encoding='utf-8')


def test_doubts_from_nothing_to_one_have_letters_that_need_no_escape():
    frame = dict(tokens=['a'] * 101, states=['kept'] * 101, doubts=[n / 100 for n in range(101)])
    (_, _, letters), = show.packed(dict(label='', frames=[frame]), {})['frames']
    assert letters[0] == show.DOUBTS[0] and letters[-1] == show.DOUBTS[-1] and sorted(letters) == [*letters]
    assert not {*letters} & {*'"&<>\\ '}


@pytest.mark.parametrize('itos, task, expected', [
    (['a', ' '], None, dict(kind='prose')), (['a', '\n'], None, dict(kind='prose')),
    (['a'], None, dict(kind='boxes')),
    (['1', '\n'], SimpleNamespace(SIDE={42: 6}, BOXES={6: (2, 3)}), dict(kind='board', side=6, box=(2, 3)))])
def test_how_a_text_is_laid_out(itos, task, expected):
    assert show.layout(dict(CHARS, itos=itos, block_size=42), task) == expected


def test_a_judged_text_is_a_page_of_one_step(tmp_path):
    sample = dict(text='12', tokens=[BOS, 1, 2, EOS], p_wrong=[0.9, 0.25, 0.5, 1], nelbo=1.5)
    data = write(tmp_path / 'page.html', *show.stories(None, ARITHMETIC, None, [sample])).data()
    (_, states, doubts), = unpacked(data, 0)
    assert states == 'fkkk' and doubts[0] is None and doubts[1:] == pytest.approx([0.25, 0.5, 1], abs=0.006)
    assert data['stories'][0]['note'] == 'NELBO 1.500 nats/token'


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    page = write(tmp_path / 'page.html', hand_made(['a']))
    foreign = ('link', 'img', 'iframe', 'base')
    assert not [tag for tag, attrs in page.tags if tag in foreign or {'src', 'href'} & set(attrs)]
    text = (tmp_path / 'page.html').read_text(encoding='utf-8')
    assert not re.search(r'https?:|@import|url\(|innerHTML|fetch\(', text)
    assert ('meta', {'name': 'viewport', 'content': 'width=device-width, initial-scale=1'}) in page.tags
    assert [path.name for path in tmp_path.iterdir()] == ['page.html']


def test_no_text_can_break_out_of_the_page(tmp_path):
    harmless = write(tmp_path / 'harmless.html', hand_made(['a']))
    stories = [hand_made(HOSTILE, label) for label in HOSTILE]
    page = write(tmp_path / 'page.html', *stories, title=HOSTILE[0], foot=HOSTILE[1])
    assert page.tags == harmless.tags and len(page.scripts) == 2
    data = page.data()
    assert data['tokens'] == HOSTILE and [story['label'] for story in data['stories']] == HOSTILE
    assert page.scripts[1] == harmless.scripts[1]
    assert HOSTILE[0] in page.text and HOSTILE[1] in page.text  # shown as the text that they are
    assert not {'<', '>', '&', '\u2028'} & set(page.scripts[0][1])


class Marks(HTMLParser):
    """What a browser makes of a fragment: (tag, class, text) of each mark."""

    def __init__(self, text):
        super().__init__()
        self.marks = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.marks.append([tag, dict(attrs).get('class', '').strip(), ''])

    def handle_data(self, data):
        self.marks[-1][2] += data


def test_a_fragment_is_a_mark_for_every_token():
    frames = told([BOS, MASK, MASK, 3, 4, MASK], [BOS, 7, MASK, MASK, 5, MASK])['frames']
    boxes = dict(kind='boxes')
    assert Marks(show.fragment(boxes, frames[1], frames[0])).marks[1:] == [
        ['i', 'f', '⟨'], ['i', 'n', '7'], ['i', 'm', '▒'], ['i', 'r', '3'], ['i', 'c', '5'], ['i', 'm', '▒']]
    # in prose a line end is one, and is seen only where something happened to it
    prose = dict(tokens=['a', '\n', '\n', '▒▒'], states=['kept', 'kept', 'new', 'mask'], doubts=[0.5] * 4)
    assert [text for *_, text in Marks(show.fragment(dict(kind='prose'), prose)).marks[1:]] == [
        'a', '\n', '↵\n', '\u2002\u2002']
    board = hand_made([*'1𝟐\n34\n'])['frames'][0]
    marks = Marks(show.fragment(dict(kind='board', side=2, box=(2, 1)), board)).marks[1:]
    assert [text for *_, text in marks] == [*'12\n34\n'] and marks[2][1] == 'k end top across'
    assert marks[4][1] == 'k down across' and marks[0][1] == 'k top left across'


def test_what_a_repair_did_is_told_place_by_place_also_where_texts_are_moved():
    trace = torch.tensor([[BOS, 1, 10, 2, EOS], [BOS, 1, MASK, MASK, EOS], [BOS, 1, 10, 3, EOS]])
    sample = dict(tokens=trace[-1].tolist(), marks='  ?^ ', trace=trace)
    diff = show.differences(ARITHMETIC, sample)
    assert diff[:3] == [('⟨', '⟨', False), ('1', '1', False), ('(', '(', True)]
    assert diff[3:] == [('2', '3', False), ('⟩', '⟩', False)]
    assert Marks(show.repaired(dict(kind='boxes'), diff)).marks[1:] == [
        ['i', 'k', '⟨'], ['i', 'k', '1'], ['i', 'q', '('], ['i', 'k', ''], ['del', '', '2'], ['ins', '', '3'],
        ['i', 'k', '⟩']]
    shorter = show.differences(ARITHMETIC, dict(sample, tokens=[BOS, 1, EOS], marks='  ^'))
    assert shorter[1:] == [('1', '1', False), ('(', '⟩', False), ('2', '', False), ('⟩', '', False)]
    texts = [*'abcdef'], [*'bXXcdfg']
    text = dict(CHARS, itos=[*'abcdefgX'], vocab_size=8)
    before, after = ([text['itos'].index(c) for c in some] for some in texts)
    taken, marks = show.changes(before, after, [c == 'd' for c in texts[1]])
    diff = show.differences(text, dict(tokens=after, before=before, taken=taken, marks=marks))
    assert [''.join(column) for column in zip(*((was, now) for was, now, _ in diff))] == ['abcdef', 'bXXcdfg']
    assert [now for _, now, doubted in diff if doubted] == ['d']
    assert all(was == now or not was or not now for was, now, _ in diff)


def test_no_text_can_break_out_of_a_fragment():
    harmless = Marks(show.fragment(dict(kind='prose'), hand_made(['a'] * len(HOSTILE))['frames'][0])).marks
    for kind in ('prose', 'boxes'):
        marks = Marks(show.fragment(dict(kind=kind), hand_made(HOSTILE)['frames'][0])).marks
        assert [mark[0] for mark in marks] == [mark[0] for mark in harmless]
        assert [text for *_, text in marks[1:]] == HOSTILE
    assert '.prose {' in show.styles() and 'body' not in show.styles() and ':root' not in show.styles()


def test_a_page_that_cannot_be_written_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match='page.html: cannot be written: No such file or directory'):
        write(tmp_path / 'nowhere' / 'page.html', hand_made(['a']))


def live(*stories):
    """Stories as the steps that are played: (frame, the one before it, whether a sample begins)."""
    for story in stories:
        frames = story['frames']
        for before, frame in zip(frames[:1] + frames, frames):
            yield frame, before, frame is frames[0]


def test_animate_leaves_the_last_frames_where_there_is_no_terminal(capsys):
    pytest.importorskip('rich')
    stories = [told([BOS, MASK, 3], [BOS, 7, MASK], [BOS, 7, EOS]), hand_made(['[red]', '7'], '7  [bold]✓')]
    show.animate(live(*stories), seconds=60)
    out = capsys.readouterr().out
    assert '⟨7⟩\nsample 1 · step 2 · 0 masked · 1 new · mean p(WRONG) 0.19\n' in out
    assert '[red]7\nsample 2 · step 0 · 0 masked · mean p(WRONG) 0.25\n' in out
    assert '▒' not in out and '\x1b' not in out


def test_animate_plays_every_frame_in_a_terminal(monkeypatch, capsys):
    pytest.importorskip('rich')
    waits = []
    monkeypatch.setattr(show.time, 'sleep', waits.append)
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.setenv('TERM', 'xterm-256color')
    show.animate(live(told([BOS, MASK, 3], [BOS, 7, MASK], [BOS, 7, EOS])), seconds=0.5)
    out = capsys.readouterr().out
    assert waits == [0.5] * 3 and all(f'step {step} ·' in out for step in range(3))
    assert '1 masked · 1 new · 1 taken back' in out.replace('2 masked', '1 masked')
    assert '\x1b[7;31m3\x1b[0m' in out  # the token that is taken back
    assert '\x1b[7;32m7\x1b[0m' in out


def test_animate_without_rich_says_what_to_install(monkeypatch):
    for name in ('rich', 'rich.console', 'rich.live', 'rich.text'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match='pip install rich'):
        show.animate(live(hand_made(['a'])))


def test_a_line_ends_in_the_animation_where_one_stands(capsys):
    pytest.importorskip('rich')
    meta = dict(CHARS, itos=[*'ab \n\t!'], vocab_size=6)
    show.animate(live(told([6, 3, 6, 0], [0, 3, 3, 2], meta=meta)))
    assert 'a\n↵\n␣\nsample 1 · step 1 · 0 masked · 1 new · 1 rewritten · ' in capsys.readouterr().out


def test_an_empty_text_is_shown_as_such():
    for task in (None, SimpleNamespace(verdict=lambda text: '✗')):
        for more in ({}, dict(p_wrong=[0.1, 0.95])):
            shown = show.report(dict(text='', tokens=[BOS, EOS], **more), ARITHMETIC, task)
            assert shown.startswith('(empty)') and '9' * bool(more) in shown
    assert sample_line('', SimpleNamespace(verdict=lambda text: '✗')) == '(empty)   ✗'


@pytest.mark.parametrize('pad', [0, 4])
def test_a_draft_behind_an_end_becomes_padding_whatever_its_id(pad):
    """It was not rewritten: nobody would have written it."""
    meta = dict(ARITHMETIC, vocab_size=5, itos=[*'abcde'], pad=pad, eos=3, bos=None)
    trace = torch.tensor([[5, 5, 5], [~1, ~2, ~1], [1, 3, pad]])
    frames = show.story(meta, trace, torch.zeros(3).bool(), torch.full((3, 3), float('nan')), '')['frames']
    assert frames[1]['states'][:2] == ['draft'] * 2
    assert frames[2]['states'] == ['new', 'changed', 'new']


# -----------------------------------------------------------------------------
# tools/film.py


@pytest.fixture
def page(tmp_path):
    """The path of a page with two samples, of three steps and one."""
    path = tmp_path / 'steps.html'
    stories = [told([BOS, MASK, 3], [BOS, 7, MASK], [BOS, 7, EOS]), told([BOS, 7, EOS])]
    show.write_page(str(path), 'title', [], stories, dict(kind='boxes'))
    return path


@pytest.mark.parametrize('words, message', [
    (['--page=nowhere.html'], 'there is no nowhere.html: python sample.py --html=nowhere.html writes one'),
    (['--out=film.mp4'], '--out ends with .gif for a film, with .png for a picture, got film.mp4'),
    (['--every=0'], '--every is at least 1, got 0'),
    (['--out=nowhere/film.gif'], 'nowhere')])
def test_what_cannot_be_filmed_is_said_first(run, page, words, message):
    status, _, err = run('film', f'--page={page}', *words)
    assert status and message in err


def test_film_without_a_browser_says_what_to_install(run, page, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'playwright.sync_api', None)
    status, _, err = run('film', f'--page={page}', f'--out={tmp_path}/film.gif')
    assert status and 'pip install playwright pillow' in err


def test_a_film_plays_its_pictures_and_holds_the_last_one(tmp_path):
    image = pytest.importorskip('PIL.Image')
    film, shots = load_script('tools/film'), []
    for colour, height in (('red', 20), ('green', 30), ('blue', 25)):
        file = io.BytesIO()
        image.new('RGB', (560, height), colour).save(file, 'PNG')
        shots.append(file.getvalue())
    film.out = str(tmp_path / 'film.gif')
    film.write_gif(shots)
    with image.open(film.out) as made:
        assert made.size == (560, 30) and made.n_frames == 3 and made.info['loop'] == 0
        lasts = [made.seek(n) or made.info['duration'] for n in range(3)]
    assert lasts == [film.pause, film.pause, film.hold]


def test_a_browser_films_every_step(run, page, tmp_path):
    image = pytest.importorskip('PIL.Image')
    pytest.importorskip('playwright')
    chromium = shutil.which('chromium') or shutil.which('google-chrome') or pytest.skip('no browser')
    where = [f'--page={page}', f'--browser={chromium}']
    for words, frames in (([], 3), (['--every=2'], 2), (['--sample=2'], 1), (['--first=2'], 1)):
        assert run('film', *where, *words, f'--out={tmp_path}/film.gif')[0] == 0
        with image.open(tmp_path / 'film.gif') as made:
            assert made.n_frames == frames
    assert run('film', *where, f'--out={tmp_path}/step.png', '--width=300')[0] == 0
    with image.open(tmp_path / 'step.png') as made:
        assert made.size == (300, 706)
    for words in (['--sample=3'], ['--first=3']):
        status, _, err = run('film', *where, *words, f'--out={tmp_path}/film.gif')
        assert status and '2 samples and the steps 0 to' in err
