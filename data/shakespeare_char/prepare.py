"""
Make the character-level tiny Shakespeare dataset: one flat stream of ids, the same as nanoGPT's.

$ python data/shakespeare_char/prepare.py                       # downloads the text, 1.1 MB
$ python data/shakespeare_char/prepare.py --input=input.txt     # or takes it from a file
"""

import argparse
import hashlib
import http.client
import os
import sys
import urllib.request

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from common import write_dataset  # noqa: E402

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def read_text(input=None):
    """Tiny Shakespeare, from the file `input` or else from the web, checked to be exactly that."""
    try:
        if input is not None:
            with open(input, 'rb') as f:
                data = f.read()
        else:
            with urllib.request.urlopen(URL, timeout=30) as f:
                data = f.read()
    except (OSError, http.client.HTTPException) as e:
        if input is not None:
            sys.exit(f'cannot read {input}: {e.strerror}')
        sys.exit(f'download failed ({e}): fetch {URL} by hand and pass --input=FILE')
    got = hashlib.sha256(data).hexdigest()
    if got != SHA256:
        sys.exit(f'{input or URL}: this is not tiny Shakespeare (expected sha256 {SHA256}, got {got})')
    return data.decode()


def prepare(out_dir=HERE, input=None):
    """Encode the text, write it into out_dir, say what it is, and return its meta."""
    text = read_text(input)
    itos = sorted(set(text))
    stoi = {c: i for i, c in enumerate(itos)}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    split = int(len(ids) * 0.9)
    meta = write_dataset(out_dir, ids[:split], ids[split:], {
        'name': 'shakespeare_char', 'format': 'stream', 'block_size': None,
        'vocab_size': len(itos), 'tokenizer': 'char', 'itos': itos,
        'bos': None, 'eos': None, 'pad': None, 'seed': None,
    })
    print(f'vocabulary of {len(itos)} characters: {"".join(itos)!r}')
    print(f'train: {meta["train_tokens"]:,} tokens')
    print(f'val: {meta["val_tokens"]:,} tokens')
    print(f'wrote train.bin, val.bin and meta.json to {out_dir}')
    return meta


def main():
    parser = argparse.ArgumentParser(description='Make the character-level tiny Shakespeare dataset.')
    parser.add_argument('--out', default=HERE, help='the folder to write to (default: the one of this script)')
    parser.add_argument('--input', help='a copy of the text (default: download it)')
    args = parser.parse_args()
    prepare(args.out, args.input)


if __name__ == '__main__':
    main()
