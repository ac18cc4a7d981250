"""
Make a dataset of your own text: a file, or all text files below a folder.

$ python data/text/prepare.py --input=book.txt
$ python data/text/prepare.py --input=notes/ --tokenizer=gpt2 --out=data/notes   # then --dataset=notes
"""

import fnmatch
import os
import shlex
import sys
from pathlib import Path

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.dirname(HERE)
sys.path.insert(0, os.path.dirname(DATA))
import configurator  # noqa: E402
from configurator import UserError  # noqa: E402
from data.common import write_text  # noqa: E402

input: str = None      # a text file, or a folder of them
out: str = None        # the folder to write to, which names the dataset; None: the one of this script
tokenizer = 'char'     # char: the characters of the text; gpt2: GPT-2's byte-pair encoding
val_share = 0.1        # share of the text that is held out, from its end
glob = '*.txt,*.md'    # which files of a folder, and of the folders in it


def read_text(input, glob):
    """The text of a file, or of all files below a folder that match a pattern, with blank lines between."""
    top, patterns = Path(input), [pattern.strip() for pattern in glob.split(',')]
    files = [top]
    if top.is_dir():
        files = sorted(path for path in top.rglob('*') if path.is_file()
                       and any(fnmatch.fnmatch(path.relative_to(top), pattern) for pattern in patterns))
    if not files:
        raise UserError(f'{input}: no file matches {glob}; set --glob')
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding='utf-8-sig'))  # without the mark that some editors put there
        except UnicodeDecodeError as error:
            at = error.start
            raise UserError(f'{path} is not UTF-8 (byte {at}): convert it, or leave it out') from error
        except OSError as error:
            raise UserError(f'cannot read {path}: {error.strerror}') from error
    return '\n'.join(text.rstrip('\n') + '\n' for text in texts if text.strip())


def prepare(out_dir, input, tokenizer='char', val_share=0.1, glob='*.txt,*.md'):
    """Encodes the text, writes it into out_dir, says what it is, returns its meta. Raises UserError first."""
    if not input:
        raise UserError('--input is missing: python data/text/prepare.py --input=PATH, a file or a folder')
    if tokenizer not in ('char', 'gpt2'):
        raise UserError(f'tokenizer expects char or gpt2, got {tokenizer!r}')
    if not 0 < val_share < 1:
        raise UserError(f'val_share must be between 0 and 1, got {val_share}')
    out_dir = os.path.abspath(out_dir)
    if out_dir != HERE and os.path.exists(os.path.join(out_dir, 'prepare.py')):
        raise UserError(f'{out_dir} belongs to another dataset, which has a prepare.py: choose another --out')
    text = read_text(input, glob)
    split = int(len(text) * (1 - val_share))
    meta = write_text(out_dir, os.path.basename(out_dir), text[:split], text[split:], tokenizer)
    if os.path.dirname(out_dir) == DATA:
        name = shlex.quote(meta['name'])
        config = 'shakespeare_char_cpu' if tokenizer == 'char' else 'shakespeare_bpe'
        print(f"train on it: python train.py config/{config}.py --dataset={name} --sample_prompt= "
              f'--out_dir=out-{name}')
    return meta


def main():
    prepare(out or HERE, input, tokenizer, val_share, glob)


if __name__ == '__main__':
    configurator.run(globals())
