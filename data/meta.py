"""What a dataset says of itself, checked where it is read: its meta.json, or the meta.pkl of nanoGPT."""

import glob
import hashlib
import os
import pickle

import numpy as np

from data.common import SPLITS, text_meta

LARGE = 2**28   # bytes; of larger files only some blocks are looked at: a start should not take seconds
BLOCK = 2**19   # ids of such a block


def is_name(name):
    """Whether this is the name of a folder in data/ and leads nowhere else: code in there will be run."""
    plain = isinstance(name, str) and name.isprintable() and not {*name} & {'/', '\\'}
    return plain and name not in ('', '.', '..')


def is_count(number, low=1, high=2**62):
    """Whether this is a whole number in low..high."""
    return type(number) is int and low <= number <= high


def check_meta(meta):
    """
    Raises ValueError if this is not the meta of a dataset, which is

    name: that of a folder in data/. format: 'stream', or 'rows' of block_size ids. vocab_size. tokenizer:
    'gpt2', or 'char' or another name with itos, the text of every id. bos, eos, pad: ids of their own, or
    None. Maybe given, ids that never change; train_tokens, val_tokens; sha256 of the files; seed; dataset,
    the folder it was read from.
    """
    if not isinstance(meta, dict):
        raise ValueError('the meta is no dict')
    needed = ('name', 'format', 'block_size', 'vocab_size', 'tokenizer', 'itos', 'bos', 'eos', 'pad')
    given = meta.get('given', ())
    missing = [name for name in needed if name not in meta]
    if missing:
        raise ValueError(f'the meta has no {missing[0]}')
    V, itos, tokenizer = meta['vocab_size'], meta['itos'], meta['tokenizer']
    special = [meta[name] for name in ('bos', 'eos', 'pad') if meta[name] is not None]
    sized = is_count(V, 1, 2**16 - 2)                          # [MASK] and [WRONG] fit into uint16 as well
    last = V - 1 if sized else 0
    rules = dict(
        name=is_name(meta['name']),
        dataset=is_name(meta.get('dataset', meta['name'])),
        format=meta['format'] in ('stream', 'rows'),
        block_size=is_count(meta['block_size']) or meta['block_size'] is None and meta['format'] == 'stream',
        vocab_size=sized,
        tokenizer=isinstance(tokenizer, str) and tokenizer != '',
        itos=itos is None if tokenizer == 'gpt2' else isinstance(itos, list) and len(itos) == V
        and all(isinstance(text, str) and text for text in itos) and len({*itos}) == V,
        train_tokens=is_count(meta.get('train_tokens', 1)),
        val_tokens=is_count(meta.get('val_tokens', 1)),
        given=isinstance(given, (list, tuple)) and all(is_count(id, 0, last) for id in given),
        sha256=isinstance(meta.get('sha256') or {}, dict))
    for name, fits in rules.items():
        if not fits:
            raise ValueError(f'{name}={repr(meta.get(name))[:60]} makes no sense in the meta')
    if not all(is_count(id, 0, last) for id in special) or len({*special}) < len(special):
        raise ValueError('bos, eos and pad are not ids below vocab_size, each another')
    if meta['eos'] is not None and meta['pad'] is None:
        raise ValueError('there is an eos, but no pad that could be behind it')
    if tokenizer == 'gpt2' and V > 50257 + sum(id >= 50257 for id in special):
        raise ValueError(f"vocab_size={V} is more than GPT-2's 50257 tokens and the special ones")

# -----------------------------------------------------------------------------
# nanoGPT's folders


class Plain(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers, and refuses all that could run."""

    def find_class(self, module, name):
        raise ValueError(f'it would run {module}.{name}')


def is_nano(folder):
    """Whether a folder holds what a prepare.py of nanoGPT writes: train.bin and val.bin, perhaps meta.pkl."""
    there = [os.path.exists(os.path.join(folder, name)) for name in ('train.bin', 'val.bin')]
    if not all(there) or os.path.exists(os.path.join(folder, 'meta.json')):
        return False
    if glob.glob(os.path.join(glob.escape(folder), 'meta.json.*.tmp')):
        return False                                           # ours, killed halfway
    script = os.path.join(folder, 'prepare.py')
    if not os.path.exists(script):
        return True
    with open(script, encoding='utf-8', errors='replace') as file:
        return '.bin' in file.read()                           # ours leaves these files to data/common.py


def nano_meta(folder, name):
    """The meta of such a folder; without meta.pkl its ids are GPT-2's. Raises ValueError if it is damaged."""
    path, itos = os.path.join(folder, 'meta.pkl'), None
    if os.path.exists(path):
        try:
            with open(path, 'rb') as file:
                found = Plain(file).load()
            itos = [found['itos'][id] for id in range(found['vocab_size'])]
        except Exception as error:                             # whatever torn or foreign bytes may raise
            raise ValueError(f'meta.pkl: {type(error).__name__}: {error}') from error
    meta = text_meta(name, 'gpt2' if itos is None else 'char', itos)
    for split in SPLITS:
        meta[f'{split}_tokens'] = os.path.getsize(os.path.join(folder, f'{split}.bin')) // 2
    return meta

# -----------------------------------------------------------------------------
# the ids


def check_ids(name, ids, vocab_size):
    """Raises ValueError if there are ids (N,) in the file name that are no tokens; of many looks at some."""
    first = [0] if ids.nbytes <= LARGE else np.linspace(0, len(ids) - BLOCK, 256).astype(int)
    length = len(ids) if ids.nbytes <= LARGE else BLOCK
    highest = max(int(ids[at:at + length].max()) for at in first)
    if highest >= vocab_size:
        raise ValueError(f'{name} has the id {highest}, the {vocab_size} tokens end at {vocab_size - 1}')


def sums(ids):
    """{split: ids (N,)} -> the sha256 of their files, None if they are large (100 MB take 0.1 to 0.5 s)."""
    if sum(part.nbytes for part in ids.values()) > LARGE:
        return None
    return {f'{split}.bin': hashlib.sha256(part).hexdigest() for split, part in ids.items()}
