"""Text in, text out: words and tasks of the command line become canvases, and canvases become texts again."""

import bisect
import codecs
import functools
import importlib.util
import inspect
import itertools
import os
import random
import re

import torch

from configurator import UserError, reason
from data.common import gpt2, read_text
from data.loader import load_data


PAD = '·'                   # one token of padding in a text
EMPTY = '(empty)'           # what is shown of a text without a token
CONTROLS = {**{c: chr(0x2400 + c) for c in range(32) if chr(c) not in '\t\n'}, 127: '␡',
            **{c: f'\\x{c:x}' for c in range(128, 160)}}
LONGEST = 10**6             # tokens of a text that is written in windows, see parts/long.py
HOLE = '[MASK]'             # a hole where a text can have _
ANY = '[...]'               # a hole of any length, for networks trained on edits


def words_of(meta):
    """text -> id of every token of meta['itos'] that a text can have; padding is '·' if nothing else is."""
    special = [meta[name] for name in ('bos', 'eos', 'pad')]
    words = {word: i for i, word in enumerate(meta['itos']) if i not in special}
    return words if meta['pad'] is None else {PAD: meta['pad'], **words}


def encode(meta, text):
    """
    text -> list of ids, of which decode makes the same text. Raises UserError for what is none of its tokens.

    Where tokens are longer than a character, the longest at each place that leaves a rest of tokens.
    """
    if meta['tokenizer'] == 'gpt2':
        return gpt2().encode(text, allowed_special='all')           # <|endoftext|> is between documents
    words = words_of(meta)
    sizes = sorted({len(word) for word in words if word}, reverse=True)

    found = {len(text): None}                                       # place -> the token there
    for at in reversed(range(len(text))):
        for size in sizes:
            if at + size in found and text[at:at + size] in words:
                found[at] = text[at:at + size]
                break
    if 0 not in found:
        refuse_text(meta, text, words, sizes)
    ids, at = [], 0
    while at < len(text):
        ids.append(words[found[at]])
        at += len(found[at])
    return ids


def can_have(meta, character):
    """Whether a text of the data can have this character."""
    return meta['tokenizer'] == 'gpt2' or any(character in word for word in words_of(meta))


def typed(meta, text):
    """
    What --prompt and --text stand for: a text, or as in nanoGPT FILE:PATH, all that is in a file.

    Where no text can have a backslash, \\n is a line end. A file's last line end counts if texts have them.
    """
    if text.startswith('FILE:'):
        text = text_of_file(text.removeprefix('FILE:')).replace('\r\n', '\n')
        return text if can_have(meta, '\n') else text.removesuffix('\n')
    return text if can_have(meta, '\\') else text.replace('\\n', '\n')


def refuse_text(meta, text, words, sizes):
    """Raises UserError, naming the first character of a text that no token reaches."""
    reached = {0}
    for at in range(len(text)):
        if at in reached:
            reached.update(at + size for size in sizes if text[at:at + size] in words)
    known = ('' if sizes == [1] else ' ').join(word for word in words if words[word] != meta['pad'])
    more = f' and {len(known) - 200:,} more' if len(known) > 200 else ''
    at = max(reached)
    raise UserError(f"{text[at]!r} in {quoted(text, at)} is not in the vocabulary of {meta['name']}: "
                    f'{known[:200]!r}{more}')


def quoted(text, at=0):
    """A text for a message, on one line: what is around a place in it."""
    first = max(0, at - 40)
    return repr('...' * (first > 0) + text[first:at + 40] + '...' * (at + 40 < len(text)))


def decode(meta, ids):
    """
    ids, from the first position on -> (text up to the end token, whether there is one).

    No id may be [MASK] or [WRONG]. Padding in a text without end is '·', one sign for one token, so that
    lengths are true. Bytes that are no UTF-8, which GPT-2's tokens can make up, become '\\ufffd'.
    """
    # one token of padding is enough to see that there is no end
    ids = [i for i in ids if i != meta['bos']]
    while ids[-2:] == [meta['pad']] * 2:
        ids.pop()
    finished = meta['eos'] is not None and meta['eos'] in ids
    if finished:
        ids = ids[:ids.index(meta['eos'])]
    if meta['tokenizer'] == 'gpt2':
        runs = itertools.groupby(ids, lambda i: i == meta['pad'])
        return ''.join(PAD * len([*run]) if pad else gpt2().decode([*run]) for pad, run in runs), finished
    return ''.join(PAD if i == meta['pad'] else meta['itos'][i] for i in ids), finished


def pieces(meta, ids):
    """
    The text that each of ids adds to decode(meta, ids), '' for special ones, and whether it ends within a
    character: pairs.
    """
    end = len(ids)
    if meta['eos'] in ids:
        end = ids.index(meta['eos'])
    else:
        while meta['pad'] is not None and ids[:end][-2:] == [meta['pad']] * 2:
            end -= 1
    utf8 = codecs.getincrementaldecoder('utf-8')('replace')
    for place, i in enumerate(ids):
        if place >= end or i == meta['bos']:
            yield '', False
        elif meta['tokenizer'] == 'gpt2' and i != meta['pad']:
            text = utf8.decode(gpt2().decode_single_token_bytes(i), final=place == end - 1)
            yield text, bool(utf8.getstate()[0])
        else:
            yield PAD if i == meta['pad'] else meta['itos'][i], False


def visible(text):
    """A text as a terminal may have it: control characters as signs, but for tabs and line ends."""
    return text.translate(CONTROLS)


def sample_line(text, task):
    """What training prints of a sample; task: what load_task knows, or None."""
    return visible(pictured(task, text)) if task else repr(text)


def stop_at(meta, samples, stop, given):
    """Ends samples, dicts as sample.fill makes them, before the first stop behind their given characters."""
    for sample in samples:
        at, ids = sample['text'].find(stop, given), sample['tokens']
        if at >= 0:
            # as few tokens as have all of the text: of GPT-2's, the last one may have more
            text = sample['text'][:at]
            fewest = bisect.bisect_left(range(len(ids)), True, lo=meta['bos'] is not None,
                                        key=lambda n: decode(meta, ids[:n])[0].startswith(text))
            sample.update(text=text, tokens=ids[:fewest], finished=True)


def until_end(meta, ids):
    """ids up to the first end token, which is the last one kept; all of them if there is none."""
    return ids[:ids.index(meta['eos']) + 1] if meta['eos'] in ids else ids


def rows_of(samples, meta, T):
    """The tokens of samples, dicts as sample.fill returns them, as rows (B, T) with padding behind them."""
    pad = 0 if meta['pad'] is None else meta['pad']
    return torch.tensor([sample['tokens'] + [pad] * (T - len(sample['tokens'])) for sample in samples])


def modelled(x0, meta):
    """
    Masks of x0 (B, T): (free, all positions but the start symbol and what is given; real, those without
    padding).

    A dataset may name tokens that are given wherever they stand, meta['given']. The causal mode sees them
    only where it has passed.
    """
    free = torch.ones_like(x0, dtype=torch.bool) if meta['bos'] is None else x0 != meta['bos']
    if meta.get('given'):
        free = free & ~torch.isin(x0, torch.tensor(meta['given'], device=x0.device))
    return free, free if meta['pad'] is None else free & (x0 != meta['pad'])


def text_canvas(model, meta, texts, ends):
    """
    Texts on a canvas: (canvas (B, T) ids, fixed (B, T) bool). Every mask in them is open, all else is fixed.

    texts: B lists of ids, model.mask_token_id for a token that is to be found. ends: whether each text ends
    there, and the end token and the padding behind it are fixed too; otherwise the rest of the canvas is
    open. Without end token, texts that end must be equally long, and may be longer than block_size, see
    parts/long.py. Raises UserError if a text does not fit.
    """
    bos = [] if meta['bos'] is None else [meta['bos']]
    longest = max(map(len, texts))
    check_room(model, meta, longest)
    T = model.config.block_size
    if ends and meta['eos'] is None:
        T = len(bos) + longest
    elif longest >= T and meta.get('format') == 'stream':           # half a window behind a long prompt
        T = longest + T // 2
    canvas = torch.full((len(texts), T), model.mask_token_id)
    for row, ids in zip(canvas, texts):
        filled = [*bos, *ids]
        if ends and meta['eos'] is not None:
            filled += [meta['eos']] + [meta['pad']] * (T - len(filled) - 1)
        row[:len(filled)] = torch.tensor(filled, dtype=torch.long)
    return canvas, canvas != model.mask_token_id


def check_room(model, meta, longest):
    """Raises UserError if a text of that many tokens does not fit on a canvas; without end it is long."""
    room = model.config.block_size - (meta['bos'] is not None) - (meta['eos'] is not None)
    why = f'block_size {model.config.block_size} leaves room for {room}'
    if meta['bos'] is None and meta['eos'] is None:
        room, why = LONGEST, f'at most {LONGEST:,} are written'
    if longest > room:
        raise UserError(f'a text of {longest} tokens does not fit: {why}')


def start_canvas(model, meta, num, prompt=(), lengths=None):
    """
    A canvas for num samples: (canvas (B, T) ids, fixed (B, T) bool), empty, or held-out texts with holes if
    task.py has starts.

    prompt: ids that every sample starts with. lengths: tokens in each sample (B,), None: the model decides
    (without an end token the canvas is as long as the longest length). Raises UserError if it does not fit.
    """
    task = load_task(meta['name'])
    if hasattr(task, 'starts'):
        if prompt or lengths is not None:
            raise UserError(f"{meta['name']} starts from what is given: it takes no prompt and no length")
        texts = task.starts(load_data(meta.get('dataset', meta['name']))[1]['val'], num)
        ids = [holes(meta, text, '_', model.mask_token_id)[0] for text in texts]
        return text_canvas(model, meta, ids, ends=True)
    if lengths is None:
        return tuple(row.repeat(num, 1) for row in text_canvas(model, meta, [prompt], ends=False))
    if lengths.min() < max(1, len(prompt)):
        raise UserError(f'a length of {int(lengths.min())} is too short'
                        + (f': the prompt has {len(prompt)} tokens' if prompt else ''))
    check_room(model, meta, int(lengths.max()))
    lengths = lengths.tolist() if meta['eos'] is not None else [int(lengths.max())] * num
    texts = [[*prompt] + [model.mask_token_id] * (n - len(prompt)) for n in lengths]
    return text_canvas(model, meta, texts, ends=True)


def usual_hole(meta):
    """What stands for a hole if nothing is chosen: '_' where no text can have it, else '[MASK]'."""
    return HOLE if can_have(meta, '_') else '_'


def holes(meta, text, hole, mask_token_id):
    """
    A text with holes -> (ids, mask_token_id for each hole, whether the text ends where it is written).

    hole: None is usual_hole. One at the very end is open: it stands for as many tokens as the model wants.
    [...] begins as a hole like any other, see parts/edits.py.
    Where words bring the blank before them, the one before a hole is the hole's, whatever follows. Raises
    UserError for a hole that could be text, and for a text without one.
    """
    hole = usual_hole(meta) if hole is None else hole
    spelled = meta['tokenizer'] != 'gpt2' and hole not in (HOLE, ANY) and all(can_have(meta, c) for c in hole)
    if spelled or not hole:
        raise UserError(f"hole expects a text that is not in the vocabulary of {meta['name']}, got {hole!r}")
    if hole not in text:
        raise UserError(f'{quoted(text)} has no hole ({hole!r}) to fill: write {hole}, or choose --hole')
    *before, last = text.split(hole)
    if meta['tokenizer'] == 'gpt2' or any(word[0] == ' ' for word in words_of(meta) if len(word) > 1):
        before = [piece.removesuffix(' ') for piece in before]
    ids = [i for piece in [*before, last] for i in [mask_token_id, *encode(meta, piece)]][1:]
    return (ids, True) if last else (ids[:-1], False)


def spans(text, n):
    """'3:5,8:9' -> [3, 4, 8], positions in a text of n tokens. Raises UserError for what is no such text."""
    found = []
    for part in (text or '').split(','):
        first, colon, last = part.partition(':')
        if not (colon and first.strip().isdecimal() and last.strip().isdecimal()):
            raise UserError(f"mask expects spans like 3:5 or 3:5,8:9, counted from 0; got '{text}'")
        at = range(int(first), int(last))
        if not at or at[-1] >= n:
            why = 'empty' if not at else f'outside the text, which has {n} tokens'
            raise UserError(f'mask: the span {part.strip()} is {why}')
        if set(at) & set(found):
            raise UserError(f"mask: the spans of '{text}' overlap")
        found += at
    return found


def marked_words(meta, text, words):
    """
    Which tokens of a text are to be written anew: (the text, their places, a list).

    words: spans in tokens such as '2:4'; or a part of the text, the only one that is a word of its own, or
    the only one at all; None: what stands in [brackets], which are no part of the text.
    """
    parts = re.split(r'\[(.*?)\]', text) if words is None else [text]
    if words is None and len(parts) == 1:
        raise UserError(f'{quoted(text)} has no [brackets] around what is to be written anew, and no mask')
    text = ''.join(parts)
    ids = encode(meta, text)
    if words is not None and re.fullmatch(r'[\d\s:,]*:[\d\s:,]*', words):
        return text, spans(words, len(ids))

    # where it is in characters, and which tokens have a part of it
    if words is None:
        ends = [*itertools.accumulate(map(len, parts))]
        found = [*zip(ends[::2], ends[1::2])]
    else:
        whole = rf'(?<!\w){re.escape(words)}(?!\w)'
        found = [at.span() for at in [*re.finditer(whole, text)] or re.finditer(re.escape(words), text)]
        if len(found) != 1 or not words:
            raise UserError(f"mask: '{words}' stands {len(found)} times in {quoted(text)}; give a word that "
                            'stands there once, spans in tokens such as 3:5 or 3:5,8:9, or put [brackets] '
                            'around it')
    at, places = 0, []
    for place, (piece, _) in enumerate(pieces(meta, ids)):
        if any(at < last and first < at + max(1, len(piece)) for first, last in found):
            places.append(place)
        at += len(piece)
    if not places:
        raise UserError(f'{quoted(text)}: there is nothing in the [brackets]')
    return text, places


def task_canvas(task, model, meta, text, hole=None, mask=None):
    """The canvas of one text for a task: (canvas (1, T), fixed (1, T)). See task at the top of sample.py."""
    if task == 'infill':
        ids, ends = holes(meta, text, ANY if ANY in text else hole, model.mask_token_id)
        return text_canvas(model, meta, [ids], ends)
    if not text:
        raise UserError('the text is empty')
    places = []
    if task == 'edit':
        text, places = marked_words(meta, text, mask)
    ids = encode(meta, text)
    for i in places:
        ids[i] = model.mask_token_id
    canvas, fixed = text_canvas(model, meta, [ids], ends=True)
    if task == 'repair':  # nothing is trusted but the start symbol
        fixed = ~modelled(canvas, meta)[0]
        if meta['eos'] is None and len(ids) > 1:                    # of the last one nothing more is known
            fixed[:, -1] = True
    return canvas, fixed


@functools.lru_cache
def load_task(dataset):
    """
    The module data/<dataset>/task.py, which knows right from wrong there, or None. What it lacks of verdict
    says nothing.

    Raises UserError if it cannot be used.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.path.join(root, 'data', dataset, 'task.py')
    if not os.path.exists(path):
        return None
    spec = importlib.util.spec_from_file_location(f'{dataset}_task', path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:                           # it is the user's code
        raise UserError(f'{path}: {type(error).__name__}: {error}') from error
    odd = [name for name in ('draw', 'score', 'verdict') if not callable(getattr(module, name, len))]
    if odd:
        raise UserError(f'{path}: {odd[0]} is no function: there may be draw(rng), score(texts) and '
                        'verdict(text), see docs/extending.md')
    module.verdict = getattr(module, 'verdict', lambda text: '')
    return module


def scored(task, texts, train=None):
    """What task.py's score says of texts, a dict of numbers; {} without one. train: the training strings."""
    if not hasattr(task, 'score'):
        return {}
    more = (train,) * (len(inspect.signature(task.score).parameters) > 1)
    return task.score(texts, *more)


def drawn_by(task, rng):
    """A text that task.py draws, None if it draws none: draw(rng) is a text, or begins with one."""
    if not hasattr(task, 'draw') or hasattr(task, 'starts'):
        return None
    found = task.draw(rng)
    return found if isinstance(found, str) else found[0]


def check_task(meta, data):
    """Tries what the dataset's task.py has on rows of data, before training needs it. Raises UserError."""
    task = load_task(meta['name'])
    if task is None or meta['format'] != 'rows':
        return
    texts, what = [decode(meta, ids)[0] for ids in data['val'][:4].tolist()], 'draw(rng)'
    try:
        text = drawn_by(task, random.Random(0))
        if text is not None:
            encode(meta, text)
        what = 'score(texts)'
        found = scored(task, texts)
        if not all(isinstance(value, (int, float, type(None))) for value in found.values()):
            raise TypeError(f'a dict of numbers is wanted, got {found}')
        what = 'LINE'
        score_line(task, texts, found)
        what = 'verdict(text)'
        if not isinstance(task.verdict(texts[0]), str):
            raise TypeError(f'a text is wanted, got {task.verdict(texts[0])!r}')
    except Exception as error:                           # it is the user's code
        raise UserError(f"data/{meta['name']}/task.py: {what}: {type(error).__name__}: {error}") from error


def score_line(task, texts, found):
    """What training prints of the score found of texts, a line."""
    line = '{valid:.0%} of {n} samples are well formed, {correct:.0%} have the right value'
    if not {'valid', 'correct'} <= set(found):
        line = ', '.join(f'{name} {{{name}:.3g}}' for name in found if found[name] is not None)
    return getattr(task, 'LINE', line).format(**{'n': len(texts), **found})


def pictured(task, text):
    """What is printed of a text: as task.py draws it, and what it says of it; without a task the text."""
    if hasattr(task, 'picture'):
        return f'{task.picture(text)}\n{task.verdict(text)}\n'
    return f'{text or EMPTY}   {task.verdict(text)}'.rstrip() if task else text


def text_of_file(path):
    """data.common.read_text, raising UserError."""
    try:
        return read_text(path)
    except (OSError, UnicodeError) as error:
        raise UserError(f'{path}: cannot be read: {reason(error)}') from error


def read_lines(path):
    """
    [(number from 1, line)] of what ends in \\n or \\r\\n in a file, without empty ones.

    Raises UserError if there are none.
    """
    # not splitlines(): a text may have other line ends, such as \u2028, in it
    lines = [line.removesuffix('\r') for line in text_of_file(path).split('\n')]
    found = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not found:
        raise UserError(f'{path}: there is no text in it')
    return found
