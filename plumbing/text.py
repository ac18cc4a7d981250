"""Text in, text out: words and tasks of the command line become canvases, and canvases become texts again."""

import bisect
import codecs
import functools
import importlib.util
import itertools
import os
import sys

import torch

from configurator import UserError
from data.common import gpt2
from data.loader import load_data


PAD = '·'                   # one token of padding in a text
CONTROLS = {**{c: chr(0x2400 + c) for c in range(32) if chr(c) not in '\t\n'}, 127: '␡',
            **{c: f'\\x{c:x}' for c in range(128, 160)}}
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
        text = read_text(text.removeprefix('FILE:')).replace('\r\n', '\n')
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
    open. (Without end token, texts that end must be equally long.) Raises UserError if a text does not fit.
    """
    bos = [] if meta['bos'] is None else [meta['bos']]
    room = model.config.block_size - len(bos) - (meta['eos'] is not None)
    longest = max(map(len, texts))
    if longest > room:
        raise UserError(f'a text of {longest} tokens does not fit: block_size {model.config.block_size} '
                        f'leaves room for {room}')
    T = len(bos) + longest if ends and meta['eos'] is None else model.config.block_size
    canvas = torch.full((len(texts), T), model.mask_token_id)
    for row, ids in zip(canvas, texts):
        filled = [*bos, *ids]
        if ends and meta['eos'] is not None:
            filled += [meta['eos']] + [meta['pad']] * (T - len(filled) - 1)
        row[:len(filled)] = torch.tensor(filled, dtype=torch.long)
    return canvas, canvas != model.mask_token_id


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
        return text_canvas(model, meta, [list(prompt)] * num, ends=False)
    if lengths.min() < max(1, len(prompt)):
        raise UserError(f'a length of {int(lengths.min())} is too short'
                        + (f': the prompt has {len(prompt)} tokens' if prompt else ''))
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


def task_canvas(task, model, meta, text, hole=None, mask=None):
    """The canvas of one text for a task: (canvas (1, T), fixed (1, T)). See task at the top of sample.py."""
    if task == 'infill':
        ids, ends = holes(meta, text, ANY if ANY in text else hole, model.mask_token_id)
        return text_canvas(model, meta, [ids], ends)
    ids = encode(meta, text)
    if not ids:
        raise UserError('the text is empty')
    if task == 'edit':
        for i in spans(mask, len(ids)):
            ids[i] = model.mask_token_id
    canvas, fixed = text_canvas(model, meta, [ids], ends=True)
    if task == 'repair':  # nothing is trusted but the start symbol
        fixed = ~modelled(canvas, meta)[0]
    return canvas, fixed


@functools.lru_cache
def load_task(dataset):
    """
    The module data/<dataset>/task.py, which knows right from wrong there, or None.

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
    missing = [name for name in ('score', 'verdict') if not callable(getattr(module, name, None))]
    if missing:
        raise UserError(f'{path} has no function {missing[0]}: training calls score(texts), verdict(text), '
                        'see data/arithmetic/task.py')
    return module


def pictured(task, text):
    """What is printed of a text: as task.py draws it, and what it says of it; without a task the text."""
    if hasattr(task, 'picture'):
        return f'{task.picture(text)}\n{task.verdict(text)}\n'
    return f'{text}   {task.verdict(text)}' if task else text


def read_text(path):
    """The text of a file without its byte-order mark; '-' is standard input. Raises UserError."""
    try:
        if path == '-':
            return sys.stdin.buffer.read().decode('utf-8-sig')
        with open(path, 'rb') as file:
            return file.read().decode('utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read: {getattr(error, "strerror", None) or error}') from error


def read_lines(path):
    """
    [(number from 1, line)] of what ends in \\n or \\r\\n in a file, without empty ones.

    Raises UserError if there are none.
    """
    # not splitlines(): a text may have other line ends, such as \u2028, in it
    lines = [line.removesuffix('\r') for line in read_text(path).split('\n')]
    found = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not found:
        raise UserError(f'{path}: there is no text in it')
    return found
