"""
Watch the denoising: what a sampler wrote, took back and rewrote, and what the network thinks of each token.

stories() makes traces into frames of text, for animate() in the terminal, for page(), HTML that needs
nothing else, and for fragment(), a part of another page. report() says the end of it in lines of text,
marks() what a repair did.
"""

import html
import shutil
import time
import unicodedata
from contextlib import ExitStack
from difflib import SequenceMatcher
from pathlib import Path
from string import Template

import torch

from configurator import UserError
from data.common import gpt2
from plumbing.files import to_json, write_atomically
from plumbing.evaluate import p_wrong, read
from plumbing.score import NAMES
from plumbing.text import EMPTY, can_have, modelled, pictured, pieces, until_end, visible

# how the terminal shows what a position can be in a frame, in the colours of the page; the first letter is
# its name there
STYLES = dict(kept='', changed='magenta reverse', new='green reverse', remasked='red reverse', mask='dim',
              draft='italic blue underline', fixed='bold cyan')
STATES = list(STYLES)
WORDS = dict(kept='kept', changed='rewritten', new='new', remasked='taken back', mask='masked',
             draft='drafted', fixed='given')
SPACES = '\n \t'
SIGNS = str.maketrans(SPACES, '↵␣⇥')  # for what would not be seen
# doubt in the page: a letter, from 0 to 1, and a blank for none; none of them needs an escape
DOUBTS = ''.join(c for c in map(chr, range(33, 127)) if c not in '"&<>\\')


def marks(before, trace, mask_token_id):
    """What a repair did to the ids before (T,), by its trace (S, T): ^ changed, ? doubted and kept."""
    remasked = ((trace[:-1] != mask_token_id) & (trace[1:] == mask_token_id)).any(0)      # (T,)
    return ''.join('^' if new != old else '?' if doubted else ' '
                   for old, new, doubted in zip(before.tolist(), trace[-1].tolist(), remasked.tolist()))


def changes(before, after, doubted):
    """
    What became of a text whose length may differ: signs for the ids before, and for the ids after.

    - taken away, + put in, ~ replaced; ? doubted (by position in after) and kept.
    """
    old, new = [], []
    for what, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        both = min(j - i, m - k)
        sign = ' ' if what == 'equal' else '~'
        old.append(sign * both + '-' * (j - i - both))
        new.append(sign * both + '+' * (m - k - both))
    return ''.join(old), ''.join('?' if c == ' ' and p else c for c, p in zip(''.join(new), doubted))


def differences(meta, sample):
    """
    What a repair made of the tokens of a text, [(what it was, what it is, whether it was doubted and kept)];
    what it was is '' for what was put in, what it is for what was taken away. sample: has a trace and marks.
    """
    before, taken, marks = sample.get('before'), sample.get('taken'), sample['marks']
    after, num = sample['tokens'], len(marks)
    if before is None:                                              # nothing was moved
        before = until_end(meta, sample['trace'][0].tolist())
        taken = ' ' * num + '-' * (len(before) - num)
        marks = marks[:len(before)] + '+' * (num - len(before))
    before, after, found = [*zip(before, taken)], [*zip(after, marks)], []
    while before or after:
        (old, gone), (new, sign) = *(before[:1] or [(None, '')]), *(after[:1] or [(None, '')])
        old = None if sign == '+' and gone != '-' else before.pop(0)[0]
        new = None if gone == '-' else after.pop(0)[0]
        texts = ('' if id is None else printable(meta, id) for id in (old, new))
        found.append((*texts, old == new and sign == '?'))
    return found


def columns(text):
    """How many columns a text takes in the terminal."""
    wide = {'W': 2, 'F': 2}
    return sum(0 if unicodedata.category(c) in ('Mn', 'Me') or c in '\u200b\u200c\u200d' else
               wide.get(unicodedata.east_asian_width(c), 1) for c in text)


def annotated(meta, sample, rows, indent=0):
    """
    The lines of a sample's text, each with the signs under it: lists of 1 + len(rows) texts.

    rows: texts with a sign for each of its tokens, which stands under all columns of the token. Of several
    tokens in one column it is the greatest. indent: the columns to the left, for tabs.
    """
    lines, held, left = [[''] * (1 + len(rows))], [' '] * len(rows), len(sample['text'])
    for (piece, inside), *signs in zip(pieces(meta, sample['tokens']), *rows):
        signs = [*map(max, signs, held)]
        held = signs if inside else [' '] * len(rows)
        for c in piece[:left] if piece or inside else [None]:       # None: an end, with a column for its sign
            line, shown = lines[-1], visible(c or '')
            if c == '\n':
                shown = '↵' if ''.join(signs).strip() else ''
                lines.append([''] * len(line))
            elif c == '\t':
                shown = ' ' * (8 - (indent + len(line[1])) % 8)
            width = 1 if c is None else columns(shown)
            line[0] += shown
            for number, sign in enumerate(signs, 1):
                before = line[number]
                joined = before[:-1] + max(before[-1:], sign)       # no column: that of the one before
                line[number] = before + sign * width if width else joined
        left -= len(piece)
    return lines


def below(text, signs):
    """signs for the characters of a text, in its lines."""
    return ''.join(c if c == '\n' else sign for c, sign in zip(text, signs))


def report(sample, meta, task, before=None):
    """
    The lines to print for one sample: what became of the text before, and what the model thinks of it.

    task: the dataset's task.py, or None. What it draws as a picture shows by itself what was given.
    """
    rows, legends = [], []
    start = meta['bos'] is not None  # the start symbol is not printed
    if sample.get('marks', '').strip():
        rows.append(sample['marks'][start:])
        legends.append('(+ put in, ~ replaced, ? doubted and kept)' if 'taken' in sample else
                       '(^ changed, ? doubted and kept)')
    if 'p_wrong' in sample:
        rows.append(''.join(str(min(9, int(10 * p))) for p in sample['p_wrong'][start:]))
        legends.append('p(WRONG) of every token in tenths')
    indent = '' if before is None else '   '
    if hasattr(task, 'picture'):
        told = [pictured(task, sample['text'])]
        for row, what in zip(rows, legends):
            told.append(f"{task.picture(below(sample['text'], row)).rstrip()}   {what}")
    else:
        told = marked(sample, meta, rows, legends, indent, task and task.verdict(sample['text']))
        if before is not None:
            was = [indent + line for line in before.split('\n')]
            if 'taken' in sample:                                   # their columns are one below the other
                was = marked(dict(text=before, tokens=sample['before']), meta, [sample['taken'][start:]],
                             ['(- taken away, ~ replaced)'], indent, None)
            told[:1] = *was, f'-> {told[0].removeprefix(indent)}'
            if not (sample.get('marks', '?') + sample.get('taken', '')).strip():
                told.append(f'{indent}(nothing changed)')
    numbers = [f'{name} {sample[key]:.3f}' for key, name in NAMES.items() if key in sample]
    if numbers:
        told.append(f"{indent}{', '.join(numbers)} nats/token")
    if 'windows' in sample:
        told.append(f"{indent}longer than block_size: in {sample['windows']} windows, each by itself")
    return visible('\n'.join(told if task else [*told, '-' * 15]))


def marked(sample, meta, rows, legends, indent, verdict):
    """The lines of a sample's text, each with its part of rows of signs under it, and what these are."""
    lines = [[line] for line in (sample['text'] or EMPTY).split('\n')]
    if rows:
        shown = dict(sample, tokens=sample['tokens'][meta['bos'] is not None:])
        lines = annotated(meta, shown, rows, len(indent))
        lines[0][0] = lines[0][0] if sample['text'] else EMPTY
    if verdict:
        lines[-1][0] += f'   {verdict}'
    told, legends = [], [*legends]
    for line, *signs in lines:
        for part, *below in folded(line, signs, shutil.get_terminal_size((110, 24)).columns - len(indent)):
            told.append(indent + part)
            for number, row in enumerate(map(str.rstrip, below)):
                if row:
                    told.append(f'{indent}{row}   {legends[number]}'.rstrip())
                    legends[number] = ''                            # it is said once
    return told


def folded(line, signs, width):
    """A line and the rows of signs under it, in parts that the terminal does not fold one by one."""
    if not signs or columns(line) != len(line) or width < 20:
        return [(line, *signs)]
    return [[row[at:at + width] for row in (line, *signs)] for at in range(0, max(1, len(line)), width)]


@torch.no_grad()
def judge_steps(model, trace, writer=None):
    """
    p(WRONG) of every visible token of every step: trace (S, T) ids -> (S, T) float, nan at masks and drafts.

    What is longer than the network reads is judged in windows, each by itself. writer: for a judge that was
    never shown a mask, the network whose likeliest tokens it is shown there.
    """
    doubts = []
    for x in trace.masked_fill(trace < 0, model.mask_token_id).split(32):       # (n, T)
        whole, masked = x, x == model.mask_token_id
        if writer is not None:
            whole = torch.where(masked, writer.logits(read(writer, x), real_only=True).argmax(-1), x)
        doubts.append(p_wrong(model, read(model, whole), whole).masked_fill(masked, float('nan')))
    return torch.cat(doubts)


def printable(meta, id):
    """The text that stands for one id; but for blanks, tabs and line ends it can be seen."""
    if id == meta['vocab_size']:
        return '▒▒' if meta['tokenizer'] == 'gpt2' else '▒'
    for name, sign in (('eos', '⟩'), ('bos', '⟨'), ('pad', '·')):
        if id == meta[name]:
            return sign
    if meta['tokenizer'] == 'gpt2':
        text = gpt2().decode_single_token_bytes(id).decode('utf-8', errors='replace')
    else:
        text = meta['itos'][id]
    return ''.join(c if c.isprintable() or c in SPACES else '\ufffd' for c in visible(text))


def layout(meta, task=None):
    """How texts are shown: dict(kind), prose, boxes or board, which has a side and a box too."""
    side = getattr(task, 'SIDE', {}).get(meta.get('block_size'))
    if side:
        return dict(kind='board', side=side, box=task.BOXES[side])
    return dict(kind='prose' if any(can_have(meta, c) for c in SPACES) else 'boxes')


def story(meta, trace, fixed, doubts, label, note=''):
    """
    One sample's denoising: dict(label, note, frames), each frame dict(tokens [str], states [str], doubts
    [float]). note: what is said of the finished text.

    trace (S, T) ids, ~id of what is only drafted; fixed (T,) bool, what was given and is not doubted; doubts
    (S, T), nan at masks. Columns at the right that end as padding and never held anything but that and masks
    are left out.
    """
    mask, before = meta['vocab_size'], torch.cat((trace[:1], trace[:-1]))       # (S, T)
    was, now, state = before == mask, trace == mask, torch.zeros_like(trace)
    padding = False if meta['pad'] is None else trace == meta['pad']
    held = (before < 0) & ((trace == ~before) | padding)                        # what a draft became
    drafted, changed, trace = trace < 0, trace != before, torch.where(trace < 0, ~trace, trace)
    events = (changed, (was | held) & ~now, ~was & now, was & now, drafted, fixed.expand_as(trace))
    for number, where in enumerate(events, 1):  # in the order of STATES: the last that holds counts
        state[where] = number
    width = trace.size(1)
    if meta['pad'] is not None:
        wrote = ((trace != mask) & (trace != meta['pad'])).any(0) | (trace[-1] != meta['pad'])    # (T,)
        width = max([1, *(wrote.nonzero()[:, 0] + 1).tolist()])
    text = {id: printable(meta, id) for id in trace.unique().tolist()}
    judged = doubts.masked_fill(fixed.to(doubts.device), float('nan'))
    frames = [dict(tokens=[text[id] for id in ids], states=[STATES[s] for s in states],
                   doubts=[p if p == p else None for p in ps])
              for ids, states, ps in zip(*(x[:, :width].tolist() for x in (trace, state, judged)))]
    return dict(label=label, note=note, frames=frames)


def words_of(rules):
    """Rules, a dict, as a line."""
    return ', '.join(f'{name}={value}' for name, value in rules.items())


def import_rich():
    """The classes Console, Live and Text of rich. Raises UserError if it is not installed."""
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        raise UserError('--animate needs rich: pip install rich') from None
    return Console, Live, Text


def counts(frame):
    """What happened in a frame, in the words of the page."""
    found = {state: frame['states'].count(state) for state in STATES}
    judged = [p for p in frame['doubts'] if p is not None]
    words = [f"{found['mask'] + found['remasked']} masked"]
    words += [f'{found[state]} {WORDS[state]}' for state in ('draft', 'new', 'remasked', 'changed')
              if found[state]]
    if judged:
        words.append(f'mean p(WRONG) {sum(judged) / len(judged):.2f}')
    return ' · '.join(words)


def animate(steps, seconds=0.08):
    """
    Plays steps in the terminal as they come: (frame, the one before it, whether a sample begins), see story.

    Raises UserError without rich.
    """
    Console, Live, Text = import_rich()
    console = Console()
    legend = [part for state, style in STYLES.items() for part in ((WORDS[state], style), '  ')]
    console.print(Text.assemble(*legend, ('p(WRONG) > 0.2', 'yellow'), '  ', ('> 0.5', 'bold yellow')))
    number = step = 0
    with ExitStack() as screen:
        for frame, old, begins in steps:
            if begins:
                screen.close()
                live = screen.enter_context(Live(console=console, auto_refresh=False))
                number, step = number + 1, 0
            picture = painted(Text, frame, old)
            picture.append(f'\nsample {number} · step {step} · {counts(frame)}\n', 'dim')
            live.update(picture, refresh=True)
            step += 1
            if console.is_terminal:
                time.sleep(seconds)


def painted(Text, frame, old):
    """A frame in the colours of the terminal, a Text of rich; old: the frame before."""
    picture = Text(overflow='fold')
    for i, (token, state, doubt) in enumerate(zip(*frame.values())):
        # names of colours, not shades: every terminal has them readable on its own background
        style = STYLES[state]
        if state == 'kept' and doubt:
            style = 'bold yellow' if doubt > 0.5 else 'yellow' if doubt > 0.2 else ''
        token = old['tokens'][i] if state == 'remasked' else token
        if style and state != 'fixed' and token.isspace():
            token = token.translate(SIGNS) + token.replace(' ', '').replace('\t', '')
        picture.append(token, style)
    return picture


def packed(story, table):
    """
    A story as the page holds it. table: text -> its number there, which grows.

    A frame is [ids, states, doubts]: the ids of the first, then only those that differ, as place, id, ...
    """
    frames, before = [], None
    for frame in story['frames']:
        ids = [table.setdefault(token, len(table)) for token in frame['tokens']]
        differ = ids
        if before:
            differ = [n for i, id in enumerate(ids) if id != before[i] for n in (i, id)]
        doubts = (' ' if p is None else DOUBTS[round(p * (len(DOUBTS) - 1))] for p in frame['doubts'])
        frames.append([differ, ''.join(state[0] for state in frame['states']), ''.join(doubts)])
        before = ids
    return dict(note='', by='', diff=None) | story | dict(frames=frames)


def template():
    """The text of show.html."""
    return Path(__file__).with_suffix('.html').read_text(encoding='utf-8')


def write_page(path, title, foot, stories, look):
    """Writes the page as a file."""
    write_atomically(path, page(title, foot, stories, look))


def page(title, foot, stories, look):
    """
    Self-contained HTML: every story with a slider over its steps, coloured by p(WRONG).

    foot: lines that say how it was made; look: see layout.
    """
    table = {}
    told = [packed(story, table) for story in stories]
    words = {state[0]: word for state, word in WORDS.items()}
    data = to_json(dict(look, doubts=DOUBTS, words=words, stories=told, tokens=list(table)),
                   separators=(',', ':'))
    for sign, escaped in (('<', r'\u003c'), ('>', r'\u003e'), ('&', r'\u0026')):  # no text can end the script
        data = data.replace(sign, escaped)
    foot = ''.join(f'<p>{html.escape(line)}</p>\n' for line in foot)
    return Template(template()).substitute(title=html.escape(title), foot=foot, data=data)


def stories(judge, meta, fixed, samples, task=None, writer=None):
    """
    The stories of samples of sample.fill, with traces, a list.

    fixed (B, T): what was given; None: the samples are judged texts, which have p_wrong and no trace. judge:
    the network that says how wrong each token is, None if none learned it; task: the dataset's task.py, or
    None; writer: the network that wrote, if that is another.
    """
    told = []
    for number, sample in enumerate(samples):
        if fixed is None:
            trace, doubts = torch.tensor([sample['tokens']]), torch.tensor([sample['p_wrong']])     # (1, T)
            given = ~modelled(trace, meta)[0][0]
        else:
            trace, given = sample['trace'], fixed[number]                       # (S, T), (T,)
            if trace.size(1) != len(given):                         # edits have moved what was given
                given = torch.zeros_like(trace[0], dtype=torch.bool)
            doubts = judge_steps(judge, trace, writer) if judge else torch.full(trace.shape, float('nan'))
        verdict = task.verdict(sample['text']) if task else ''
        label = f"{sample['text']}   {verdict}".replace('\n', ' ') if task else sample['text'][:60]
        numbers = [f'{name} {sample[key]:.3f} nats/token' for key, name in NAMES.items() if key in sample]
        told.append(story(meta, trace, given, doubts, label, ', '.join(filter(None, [verdict, *numbers]))))
        if 'marks' in sample:
            told[-1]['diff'] = differences(meta, sample)
    return told


# -----------------------------------------------------------------------------
# a part of somebody else's page


def styles():
    """The CSS of fragment(), to stand inside of the rule for what holds it."""
    return template().partition('<style>')[2].partition('/* the page */')[0].replace(':root', '&')


def shown(token, state, kind):
    """What a token looks like: prose as it is, in boxes with signs for what would not be seen."""
    if kind == 'board':
        return unicodedata.normalize('NFKC', token)
    if kind == 'boxes':
        return token.translate(SIGNS)
    if state == 'mask':
        return '\u2002' * len(token)
    return token if state in ('kept', 'fixed') else token.replace('\n', '↵\n')


def lines_around(place, look):
    """The classes of a place that is a cell of a board."""
    if look['kind'] != 'board':
        return ''
    (row, column), (high, wide) = divmod(place, look['side'] + 1), look['box']
    drawn = dict(end=column == look['side'], top=row == 0, left=column == 0, down=row % high == high - 1,
                 across=column % wide == wide - 1)
    return ' '.join(name for name, there in drawn.items() if there)


def fragment(look, frame, old=None):
    """
    A frame as HTML, <i data-place="3" class="n">text</i> for each token.

    old: the frame before it, which has what is taken back.
    """
    cells = []
    for place, (token, state, doubt) in enumerate(zip(frame['tokens'], frame['states'], frame['doubts'])):
        if state == 'remasked' and old:
            token = old['tokens'][place]
        number = '' if doubt is None else f', p(WRONG) {doubt:.2f}'
        cells.append(cell(look, place, state[0], html.escape(shown(token, state, look['kind'])),
                          f'{token.translate(SIGNS)}, {WORDS[state]}{number}', doubt))
    return text_of(look, cells)


def repaired(look, diff):
    """What a repair did as HTML, see differences."""
    cells = []
    for place, (was, now, doubted) in enumerate(diff):
        old, new = (html.escape(shown(token, 'kept', look['kind'])) for token in (was.translate(SIGNS), now))
        text, said = new, 'doubted and kept' if doubted else 'kept'
        if was != now:
            text, said = f'<del>{old}</del>' * bool(was) + f'<ins>{new}</ins>' * bool(now), 'replaced'
        cells.append(cell(look, place, 'q' if doubted else 'k', text, f'{now.translate(SIGNS)}, {said}'))
    return text_of(look, cells)


def cell(look, place, sign, text, title, doubt=None):
    """One token as HTML."""
    return (f'<i class="{sign} {lines_around(place, look)}" data-place="{place}" '
            f'title="{html.escape(title)}" style="--p: {doubt or 0:.2f}">{text}</i>')


def text_of(look, cells):
    """The cells of a text as HTML."""
    side = f' style="--side: {look["side"]}"' if 'side' in look else ''
    return f'<div class="text {look["kind"]}"{side}>{"".join(cells)}</div>'
