"""
Make a dataset of your own text: files, all text files below folders, or rows with an end.

$ python data/text/prepare.py --input=book.txt
$ python data/text/prepare.py --input=notes/ --tokenizer=gpt2 --out=data/notes   # then --dataset=notes
$ python data/text/prepare.py --input=names.txt --rows=line --out=data/names     # every line is an example
"""

import os
import re
import shlex
import sys
import unicodedata
from collections import Counter
from fnmatch import fnmatchcase
from glob import glob as paths_like
from pathlib import Path
from random import Random

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.dirname(HERE)
sys.path.insert(0, os.path.dirname(DATA))
import configurator  # noqa: E402
from configurator import UserError, reason  # noqa: E402
from data.common import SHORTEST, read_text, write_rows, write_text  # noqa: E402

input: str = None       # text files, folders of them or patterns, commas between; -: standard input
out: str = None         # the folder to write to, which names the dataset; None: the one of this script
tokenizer = 'char'      # char: the characters of the text; gpt2: GPT-2's byte-pair encoding
rows: str = None        # line or file: every one is an example with an end; None: a text that runs on
block_size: int = None  # of rows: their tokens, with start and end; None: as many as the longest needs
drop_long = False       # of rows: leave out the longer ones
val_share = 0.1         # share of the text, or of the rows, that is held out
glob = '*.txt,*.md'     # which files of a folder, and of the folders in it; hidden ones never
skip_bad = False        # leave out files that are neither UTF-8 nor UTF-16
nfc = True              # write an accent and its letter as one character (Unicode's NFC)

SEED = 1337             # of what is held out
MANY = 10               # files of which whole ones are held out
PIECE = 4000            # characters of a piece that is held out of fewer files

# -----------------------------------------------------------------------------
# reading


def find_files(input, glob):
    """The files that an input names, each once; those of a folder in the order of their paths."""
    found = []
    whole = os.path.exists(os.path.expanduser(input))  # a name may have a comma in it
    for word in [input] if whole else filter(None, map(str.strip, input.split(','))):
        word = os.path.expanduser(word)
        tops = [word] if word == '-' or os.path.exists(word) else sorted(paths_like(word, recursive=True))
        if not tops:
            raise UserError(f'cannot read {word}: No such file or directory')
        for top in map(Path, tops):
            found += files_below(top, glob) if top.is_dir() else [top]
    if not found:
        raise UserError(f'{input}: no file matches {glob}; set --glob')
    return list(dict.fromkeys(found))


def files_below(top, glob):
    """The files below a folder that match a pattern, in any case, and are not hidden."""
    patterns = [pattern.strip().lower() for pattern in glob.split(',')]
    names = {path: path.relative_to(top) for path in sorted(top.rglob('*')) if path.is_file()}
    return [path for path, name in names.items() if not any(part.startswith('.') for part in name.parts)
            and any(fnmatchcase(name.as_posix().lower(), pattern) for pattern in patterns)]


def read_texts(input, glob='*.txt,*.md', skip_bad=False, nfc=True):
    """The texts of the files that an input names, with "\\n" for "\\r\\n"; says what was read."""
    texts, bad = [], []
    for path in find_files(input, glob):
        try:
            text = read_text(path)
        except UnicodeDecodeError as error:
            bad.append(f'{path} (byte {error.start})')
        except OSError as error:
            raise UserError(f'cannot read {path}: {reason(error)}') from error
        else:
            text = text.replace('\r\n', '\n')
            texts.append(unicodedata.normalize('NFC', text) if nfc else text)
    if bad and (not skip_bad or not texts):
        names = ', '.join(bad[:50]) + (', ...' if len(bad) > 50 else '')
        raise UserError(f'not UTF-8, {len(bad)} of {len(bad) + len(texts)} files: {names}; convert them, or '
                        'leave them out by --skip_bad=True')
    odd = {name: sum(text.count(c) for text in texts) for name, c in (('NUL', '\0'), ('ESC', '\x1b'))}
    odd = [f'{count:,} of them {name}: is all of it text?' for name, count in odd.items() if count]
    print(', '.join([f'read {len(texts):,} files, {sum(map(len, texts)):,} characters', *odd])
          + (f'; left out, as not UTF-8: {len(bad):,} files' if bad else ''))
    return texts

# -----------------------------------------------------------------------------
# what is held out


def held_out(sizes, room):
    """Of things of these sizes those that are held out, drawn by a fixed seed: the numbers of what fits."""
    order, held = list(range(len(sizes))), set()
    Random(SEED).shuffle(order)
    for number in order:
        if sizes[number] <= room:
            held.add(number)
            room -= sizes[number]
    return held


def split_documents(documents, share):
    """
    Documents -> (those to train on, those held out).

    Of one it is the end. Of many small ones some are drawn. Of a few, or if most of the text is in few, it is
    every n-th piece of up to some thousand characters, cut at line ends: all kinds of text are held out.
    """
    if len(documents) < 2:
        text = ''.join(documents)
        at = int(len(text) * (1 - share))
        return [text[:at]], [text[at:]]
    sizes = list(map(len, documents))
    total = sum(sizes)
    if len(documents) >= MANY and sum(size for size in sizes if size <= share * total) > total / 2:
        held = held_out(sizes, share * total)
        return [[text for i, text in enumerate(documents) if (i in held) == val] for val in (False, True)]
    size, number, splits = max(1, min(PIECE, int(share * total / 4))), 0, ([], [])
    for text in documents:
        kept = [], []
        for number, piece in enumerate(re.findall(rf'(?s).{{{size}}}[^\n]{{0,{size}}}\n?|.+', text), number):
            kept[round((number + 1) * share) > round(number * share)].append(piece)
        number += 1
        for split, pieces in zip(splits, kept):
            split += [''.join(pieces)] if pieces else []
    return splits


def split_rows(texts, share):
    """Texts -> (those to train on, those held out), shuffled; equal ones are on the same side."""
    texts = [text for text in texts if text.strip()]
    counts = Counter(texts)
    held = held_out(list(counts.values()), max(1, round(share * len(texts))))
    val = {text for number, text in enumerate(counts) if number in held}
    Random(SEED).shuffle(texts)
    splits = [text for text in texts if text not in val], [text for text in texts if text in val]
    if not all(splits):
        raise UserError(f'{len(counts)} different rows are too few: some are for training, some held out')
    return splits

# -----------------------------------------------------------------------------
# a dataset


def command(meta):
    """How a dataset is trained on, a command that runs."""
    config, size, batch = 'shakespeare_bpe', 64, 16              # what these recipes have
    if meta['tokenizer'] == 'char':
        text = meta['format'] == 'stream'
        config, size, batch = ('shakespeare_char_cpu', 128, 32) if text else ('remask_all', 64, 64)
    words = [f'config/{config}.py', f"--dataset={meta['name']}"]
    if meta['format'] == 'rows':
        size = meta['block_size']
        words += [f'--block_size={size}']
        words += [f'--batch_size={max(4, 2**14 // size)}'] if batch * size > 2**14 else []
    elif min(meta['train_tokens'], meta['val_tokens']) <= size:
        words += [f'--block_size={SHORTEST - 1}']
    return shlex.join(['python', 'train.py', *words, '--sample_prompt=', f"--out_dir=out-{meta['name']}"])


def prepare(out_dir, input, tokenizer='char', val_share=0.1, glob='*.txt,*.md', rows=None, block_size=None,
            drop_long=False, skip_bad=False, nfc=True):
    """
    Encodes the text, writes it into out_dir, says what it is, returns its meta. Raises UserError first.

    Several files are documents: GPT-2's tokens have <|endoftext|> between two of them, characters a blank
    line. Rows are start token, text, end token and padding.
    """
    if not input:
        raise UserError('--input is missing: python data/text/prepare.py --input=PATH, a file or a folder')
    if tokenizer not in ('char', 'gpt2'):
        raise UserError(f'tokenizer expects char or gpt2, got {tokenizer!r}')
    if rows not in (None, 'line', 'file'):
        raise UserError(f'rows expects line or file, got {rows!r}; without it the text runs on')
    if block_size is not None and block_size < 3:
        raise UserError(f'block_size must be at least 3, for start, a token and end, got {block_size}')
    if not rows and (block_size is not None or drop_long):
        raise UserError('block_size and drop_long are about rows: set --rows=line or --rows=file')
    if not 0 < val_share < 1:
        raise UserError(f'val_share must be between 0 and 1, got {val_share}')
    out_dir = os.path.abspath(out_dir)
    if out_dir == DATA or out_dir != HERE and os.path.exists(os.path.join(out_dir, 'prepare.py')):
        raise UserError(f'{out_dir} belongs to another dataset: choose another --out, as data/mybook')
    texts, name = read_texts(str(input), glob, skip_bad, nfc), os.path.basename(out_dir)
    if rows:
        texts = [text.rstrip('\n') for text in texts]
        if rows == 'line':
            texts = [line.removesuffix('\r') for text in texts for line in text.split('\n')]
        splits = split_rows(texts, val_share)
        meta = write_rows(out_dir, name, *splits, tokenizer, block_size, drop_long, SEED)
    else:
        texts = [text.replace('\r', '\n').rstrip('\n') + '\n' for text in texts if text.strip()]
        meta = write_text(out_dir, name, *split_documents(texts, val_share), tokenizer)
    here = os.path.realpath(os.path.dirname(out_dir)) == os.path.realpath(DATA)
    link = '' if here else f'ln -s {shlex.quote(out_dir)} {shlex.quote(DATA)} && '
    print(f'train on it: {link}{command(meta)}')
    return meta


def main():
    prepare(out or HERE, input, tokenizer, val_share, glob, rows, block_size, drop_long, skip_bad, nfc)


if __name__ == '__main__':
    configurator.run(globals())
