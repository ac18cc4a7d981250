"""
Make the arithmetic dataset: rows of 64 ids, <bos> text <eos> <pad> <pad> ..., one string to a row.

$ python data/arithmetic/prepare.py
$ python data/arithmetic/prepare.py --num_train=100000 --seed=7 --out=some/folder
"""

import os
import random
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
import configurator  # noqa: E402
from configurator import UserError  # noqa: E402
from data.arithmetic.task import BLOCK_SIZE, CHARS, draw  # noqa: E402
from data.common import check_writable, write_dataset  # noqa: E402

out: str = None    # the folder to write to, None: the one of this script
num_train = 20000  # strings to train on
num_val = 2000     # held-out strings
seed = 1337

ITOS = list(CHARS) + ['<bos>', '<eos>', '<pad>']
STOI = {s: i for i, s in enumerate(ITOS)}
BOS, EOS, PAD = STOI['<bos>'], STOI['<eos>'], STOI['<pad>']


def encode_rows(texts):
    """The strings as an array of ids, (len(texts), BLOCK_SIZE)."""
    rows = np.full((len(texts), BLOCK_SIZE), PAD, dtype=np.uint16)
    for row, text in zip(rows, texts):
        row[:len(text)+2] = [BOS, *(STOI[c] for c in text), EOS]
    return rows


def draw_splits(num_train, num_val, seed):
    """(training strings, held-out strings, how many held-out draws were rejected as training strings)."""
    # seeded with names: by seed and seed + 1 the held-out set would be the next dataset's training set
    train_rng, val_rng = random.Random(f'train {seed}'), random.Random(f'val {seed}')
    train = [draw(train_rng)[0] for _ in range(num_train)]
    seen = set(train)
    val, rejected = [], 0
    while len(val) < num_val:
        text = draw(val_rng)[0]
        if text in seen:
            rejected += 1
        else:
            val.append(text)
    return train, val, rejected


def prepare(out_dir=HERE, num_train=20000, num_val=2000, seed=1337):
    """Draws the dataset, writes it into out_dir, says what it is and returns its meta."""
    if num_train < 1 or num_val < 1:
        raise UserError(f'num_train and num_val must be at least 1, got {num_train} and {num_val}')
    check_writable(out_dir)
    train, val, rejected = draw_splits(num_train, num_val, seed)
    meta = write_dataset(out_dir, encode_rows(train), encode_rows(val), {
        'name': 'arithmetic', 'format': 'rows', 'block_size': BLOCK_SIZE,
        'vocab_size': len(ITOS), 'tokenizer': 'char', 'itos': ITOS,
        'bos': BOS, 'eos': EOS, 'pad': PAD, 'seed': seed,
    })
    for split, texts in (('train', train), ('val', val)):
        print(f'{split}: {len(texts):,} strings ({len(set(texts)):,} distinct), '
              f'mean length {sum(map(len, texts)) / len(texts):.1f}, {meta[f"{split}_tokens"]:,} tokens')
    share = rejected / (rejected + num_val)
    print(f'no string of val is in train: {share:.1%} of its draws were, and were rejected')
    print('for example', *train[:3], sep='\n  ')
    print(f'wrote train.bin, val.bin and meta.json to {out_dir}')
    return meta


def main():
    prepare(out or HERE, num_train, num_val, seed)


if __name__ == '__main__':
    configurator.run(globals())
