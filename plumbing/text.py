"""Text in, text out: words and tasks of the command line become canvases, and canvases become texts again."""

import functools
import importlib.util
import os

import torch

from configurator import UserError
from data.common import gpt2
from data.loader import load_data


def encode(meta, text):
    """text -> list of ids. Raises UserError for a character that the dataset does not have."""
    if meta['tokenizer'] == 'gpt2':
        return gpt2().encode_ordinary(text)
    stoi = {s: i for i, s in enumerate(meta['itos'])}
    unknown = sorted({c for c in text if c not in stoi})
    if unknown:
        known = ''.join(s for s in meta['itos'] if len(s) == 1)
        more = f' and {len(known) - 200:,} more' if len(known) > 200 else ''
        raise UserError(f"{unknown[0]!r} in {text!r} is not in the vocabulary of {meta['name']}: "
                        f'{known[:200]!r}{more}')
    return [stoi[c] for c in text]


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
        return gpt2().decode(ids), finished
    return ''.join('·' if i == meta['pad'] else meta['itos'][i] for i in ids), finished


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


def holes(meta, text, hole, mask_token_id):
    """
    A text with holes -> (ids, mask_token_id for each hole, whether the text ends where it is written).

    A hole at the very end is open: it stands for as many tokens as the model wants. Raises UserError for a
    hole that could be text, and for a text without one.
    """
    if all(c in (meta['itos'] or ()) for c in hole):
        raise UserError(f"hole expects a text that is not in the vocabulary of {meta['name']}, got {hole!r}")
    if hole not in text:
        raise UserError(f'{text!r} has no hole ({hole!r}) to fill')
    pieces = [encode(meta, piece) for piece in text.split(hole)]
    ids = [i for piece in pieces for i in [mask_token_id, *piece]][1:]
    opened = text.endswith(hole)
    return (ids[:-1] if opened else ids), not opened


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
        ids, ends = holes(meta, text, hole, model.mask_token_id)
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


def read_lines(path):
    """The lines of a text file that are not empty. Raises UserError if there are none."""
    try:
        with open(path, encoding='utf-8') as lines:
            found = [line for line in lines.read().splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read: {getattr(error, "strerror", None) or error}') from error
    if not found:
        raise UserError(f'{path}: there is no text in it')
    return found
