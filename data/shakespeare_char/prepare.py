"""
Make the character-level tiny Shakespeare dataset: one flat stream of ids, the same as nanoGPT's.

$ python data/shakespeare_char/prepare.py                       # downloads the text, 1.1 MB
$ python data/shakespeare_char/prepare.py --input=input.txt     # or takes it from a file
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
import configurator  # noqa: E402
from data.common import check_writable, read_source, write_text  # noqa: E402

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

input: str = None  # a copy of the text, None: download it
out: str = None    # the folder to write to, None: the one of this script


def prepare(out_dir=HERE, input=None, name='shakespeare_char', tokenizer='char'):
    """Encodes the text, writes it into out_dir, says what it is, returns its meta. Raises UserError."""
    check_writable(out_dir)
    text = read_source('tiny Shakespeare', URL, SHA256, input).decode()
    split = int(len(text) * 0.9)
    return write_text(out_dir, name, text[:split], text[split:], tokenizer)


def main():
    prepare(out or HERE, input)


if __name__ == '__main__':
    configurator.run(globals())
