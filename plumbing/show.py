"""
Watch the denoising: what a sampler wrote, took back and rewrote, and what the network thinks of each token.

watch() makes traces into stories, frames of text, for animate() in the terminal and for write_page(), one
HTML file that needs nothing else. report() says the end of it in lines of text, marks() what a repair did.
"""

import html
import time
import unicodedata
from difflib import SequenceMatcher
from pathlib import Path
from string import Template

import torch

from configurator import UserError
from data.common import gpt2
from plumbing.files import to_json, write_atomically
from plumbing.evaluate import p_wrong
from plumbing.score import NAMES
from plumbing.text import pictured, pieces, visible

# how the terminal shows what a position can be in a frame; the first letter is its name in the page
STYLES = dict(kept='', changed='magenta', new='green bold', remasked='red reverse', mask='dim',
              fixed='bold cyan')
STATES = list(STYLES)
SIGNS = str.maketrans({'\n': '↵', ' ': '␣', '\t': '⇥'})  # for what would not be seen


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
            was = [before]
            if 'taken' in sample:                                   # their columns are one below the other
                was = marked(dict(text=before, tokens=sample['before']), meta, [sample['taken'][start:]],
                             ['(- taken away, ~ replaced)'], indent, None)
            told[:1] = *was, f'-> {told[0].removeprefix(indent)}'
    numbers = [f'{name} {sample[key]:.3f}' for key, name in NAMES.items() if key in sample]
    if numbers:
        told.append(f"{indent}{', '.join(numbers)} nats/token")
    if 'windows' in sample:
        told.append(f"{indent}longer than block_size: in {sample['windows']} windows, each by itself")
    return visible('\n'.join(told if task else [*told, '-' * 15]))


def marked(sample, meta, rows, legends, indent, verdict):
    """The lines of a sample's text, each with its part of rows of signs under it, and what these are."""
    lines = [[line] for line in sample['text'].split('\n')]
    if rows:
        shown = dict(sample, tokens=sample['tokens'][meta['bos'] is not None:])
        lines = annotated(meta, shown, rows, len(indent))
    if verdict:
        lines[-1][0] += f'   {verdict}'
    told, legends = [], [*legends]
    for line, *signs in lines:
        told.append(indent + line)
        for number, row in enumerate(map(str.rstrip, signs)):
            if row:
                told.append(f'{indent}{row}   {legends[number]}'.rstrip())
                legends[number] = ''                                # it is said once
    return told


@torch.no_grad()
def judge_steps(model, trace, writer=None):
    """
    p(WRONG) of every visible token of every step: trace (S, T) ids -> (S, T) float, nan at masks.

    writer: for a judge that was never shown a mask, the network whose likeliest tokens it is shown there.
    """
    doubts = []
    for x in trace[:, None]:                                                    # (1, T)
        whole, masked = x, x == model.mask_token_id
        if writer is not None:
            whole = torch.where(masked, writer.logits(writer(x), real_only=True).argmax(-1), x)
        doubts.append(p_wrong(model, model(whole), whole).masked_fill(masked, float('nan')))
    return torch.cat(doubts)


def printable(meta, id):
    """The text that stands for one id; nothing in it can break a line or reach the terminal as a command."""
    if id == meta['vocab_size']:
        return '▒▒' if meta['tokenizer'] == 'gpt2' else '▒'
    for name, sign in (('eos', '⟩'), ('bos', '⟨'), ('pad', '·')):
        if id == meta[name]:
            return sign
    if meta['tokenizer'] == 'gpt2':
        text = gpt2().decode_single_token_bytes(id).decode('utf-8', errors='replace')
    else:
        text = meta['itos'][id]
    return ''.join(c if c.isprintable() else '\ufffd' for c in visible(text.translate(SIGNS)))


def story(meta, trace, fixed, doubts, label):
    """
    One sample's denoising: dict(label, frames), each frame dict(tokens [str], states [str], doubts [float]).

    trace (S, T) ids; fixed (T,) bool, what was given and is not doubted; doubts (S, T), nan at masks. Columns
    at the right that end as padding and never held anything but that and masks are left out.
    """
    mask, before = meta['vocab_size'], torch.cat((trace[:1], trace[:-1]))       # (S, T)
    was, now, state = before == mask, trace == mask, torch.zeros_like(trace)
    events = (trace != before, was & ~now, ~was & now, was & now, fixed.expand_as(trace))
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
    return dict(label=label, frames=frames)


def animate(stories, seconds=0.08):
    """Plays the stories in the terminal, one after the other. Raises UserError without rich."""
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        raise UserError('--animate needs rich: pip install rich') from None
    console = Console()
    legend = [(f'{state}  ', style) for state, style in STYLES.items()]
    console.print(Text.assemble(*legend, ('doubted  ', 'yellow'), ('p(WRONG) > 1/2', 'red')))
    for number, told in enumerate(stories, 1):
        old, last = None, len(told['frames']) - 1
        with Live(console=console, auto_refresh=False) as live:
            for step, frame in enumerate(told['frames']):
                picture = Text(overflow='fold')
                for i, (token, state, doubt) in enumerate(zip(*frame.values())):
                    # names of colours, not shades: every terminal has them readable on its own background
                    style = STYLES[state]
                    if state == 'kept' and doubt:
                        style = 'red' if doubt > 0.5 else 'yellow' if doubt > 0.2 else ''
                    picture.append(old[i] if state == 'remasked' else token, style)
                    picture.append('\n' * (state == 'fixed' and token == '↵'))
                picture.append(f'\nsample {number}/{len(stories)}  step {step}/{last}', 'dim')
                label = f'  {visible(told["label"])}\n' if step == last else ''
                live.update(picture.append(label), refresh=True)
                old = frame['tokens']
                if console.is_terminal:
                    time.sleep(seconds)


def write_page(path, title, subtitle, stories):
    """One self-contained HTML file: every story with a slider over its steps, coloured by p(WRONG)."""
    table, told = {}, []  # text -> its index; what the page holds of the stories
    for story in stories:
        frames = [[[table.setdefault(token, len(table)) for token in frame['tokens']],
                   ''.join(state[0] for state in frame['states']),
                   [None if doubt is None else round(100 * doubt) for doubt in frame['doubts']]]
                  for frame in story['frames']]
        told.append(dict(label=story['label'], frames=frames))
    data = to_json(dict(tokens=list(table), stories=told), separators=(',', ':'))
    for sign, escaped in (('<', r'\u003c'), ('>', r'\u003e'), ('&', r'\u0026')):  # no text can end the script
        data = data.replace(sign, escaped)
    page = Template(Path(__file__).with_suffix('.html').read_text(encoding='utf-8'))
    title, subtitle = html.escape(title), html.escape(subtitle)
    write_atomically(path, page.substitute(title=title, subtitle=subtitle, data=data))


def watch(judge, meta, fixed, samples, verdict, title, subtitle, in_terminal, path, writer=None):
    """
    Plays the first samples of sample.fill, with traces, in the terminal, or writes them to the page at path.

    fixed (B, T): what was given; verdict: a function of a text, or None. judge: the network that says how
    wrong each token is, None if none learned it; writer: the one that wrote, if that is another.
    """
    stories = []
    for given, sample in zip(fixed, samples[:20]):
        trace = sample['trace']                                                 # (S, T)
        if trace.size(1) != len(given):                             # edits have moved what was given
            given = torch.zeros_like(trace[0], dtype=torch.bool)
        doubts = judge_steps(judge, trace, writer) if judge else torch.full(trace.shape, float('nan'))
        label = sample['text'][:60]
        if verdict:
            label = f"{sample['text']}   {verdict(sample['text'])}".replace('\n', ' ')
        stories.append(story(meta, trace, given, doubts, label))
    if in_terminal:
        animate(stories)
    if path:
        write_page(path, f"{meta['name']}: {title}", subtitle, stories)
        print(f'written to {path}')
