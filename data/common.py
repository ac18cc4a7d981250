"""What the prepare.py scripts share: fetching, tokenizing, and writing a dataset, all of it or none of it."""

import contextlib
import functools
import glob
import hashlib
import http.client
import importlib
import json
import os
import re
import socket
import sys
import urllib.request
import zlib
from pathlib import Path

import numpy as np

# a prepare.py may know no more than this folder
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import UserError  # noqa: E402

SPLITS = ('train', 'val')
SHORTEST = 65               # tokens in a split: one more than a window of train.py's default block_size
PIECE = 2**20               # characters that are tokenized at once


def library(name):
    """The module of that name. Raises UserError with what to do if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'{name} is needed here ({error}): pip install {name}') from error

# -----------------------------------------------------------------------------
# sources


def read_source(what, url, sha256, input=None):
    """
    The bytes of a source that never changes, from the file input or else from the web, checked to be that.

    what: its name in messages. Raises UserError if it cannot be had, or is something else.
    """
    try:
        if input is not None:
            with open(input, 'rb') as file:
                data = file.read()
        else:
            with urllib.request.urlopen(url, timeout=30) as response:
                size = int(response.headers['Content-Length'] or 0) or None
                with library('tqdm').tqdm.wrapattr(response, 'read', total=size, desc='download') as file:
                    data = b''.join(iter(lambda: file.read(2**16), b''))
    except (OSError, http.client.HTTPException) as error:
        if input is not None:
            raise UserError(f'cannot read {input}: {error.strerror}') from error
        raise UserError(f'download failed ({error}): fetch {url} by hand and pass --input=FILE') from error
    got = hashlib.sha256(data).hexdigest()
    if got != sha256:
        raise UserError(f'{input or url}: this is not {what} (expected sha256 {sha256}, got {got})')
    return data


def load_corpus(name, patterns, hub, input=None):
    """
    A corpus through Hugging Face's datasets: a list with a Dataset, whose column is 'text', for each split.

    name: where it is on the hub; hub: more that load_dataset takes there. input: a folder with copies of the
    hub's .parquet files, or with .txt files, a row a line. patterns: {split: glob pattern of its files,
    without the ending}. Raises UserError.
    """
    datasets = library('datasets')
    kind, how, branch = name, hub, 'main'
    if input is not None:
        kind, files = find_files(input, patterns)
        how = dict(data_files=files)
    try:
        try:
            return datasets.load_dataset(kind, split=list(patterns), **how)
        except RuntimeError as error:
            if 'Dataset scripts' not in str(error):
                raise
            branch = 'refs/convert/parquet'  # where the hub keeps what the script once made
            return datasets.load_dataset(kind, split=list(patterns), revision=branch, **how)
    except Exception as error:  # whatever its readers and the network may raise
        reason = str(error.__cause__ or error).splitlines()[0]
        if input is not None:
            raise UserError(f'cannot read the files in {input}: {reason}') from error
        page = f"{name}/tree/{branch.replace('/', '%2F')}/{hub.get('name', '')}"
        raise UserError(f'cannot load {name} ({reason}): fetch the .parquet files of '
                        f'https://huggingface.co/datasets/{page} by hand and pass --input=FOLDER') from error


def find_files(folder, patterns):
    """(the format for load_dataset, {split: its files in the folder}) of patterns, see load_corpus."""
    for kind, ending in (('parquet', 'parquet'), ('text', 'txt')):
        files = {split: sorted(glob.glob(os.path.join(glob.escape(folder), f'{pattern}.{ending}')))
                 for split, pattern in patterns.items()}
        if all(files.values()):
            return kind, files
    names = ' and '.join(f'{pattern}.txt' for pattern in patterns.values())
    raise UserError(f'{folder} does not hold the text: expected {names}, or the same with .parquet')

# -----------------------------------------------------------------------------
# tokens


@functools.lru_cache
def gpt2():
    """GPT-2's byte-pair encoding, 50257 tokens, the last one <|endoftext|>. Raises UserError."""
    tiktoken = library('tiktoken')
    try:
        return tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as error:  # no network; a damaged download
        raise UserError(f"tiktoken cannot load GPT-2's vocabulary ({error}): where there is a network run "
                        'TIKTOKEN_CACHE_DIR=FOLDER python -c '
                        '"import tiktoken; tiktoken.get_encoding(\'gpt2\')", '
                        'and here set TIKTOKEN_CACHE_DIR to a copy of that FOLDER') from error


def encode_gpt2(text, desc):
    """text -> its ids as GPT-2 counts, (N,) uint16, under a progress bar named desc."""
    # no token reaches from a visible character into a line break behind it, so cutting there changes nothing
    pieces = re.findall(rf'(?s).{{{PIECE}}}.*?(?<=\S)(?=\n)|.+', text)
    encoding, ids = gpt2(), [np.zeros(0, np.uint16)]
    with library('tqdm').tqdm(total=len(text), desc=desc, unit=' characters', unit_scale=True,
                              disable=len(pieces) < 2) as bar:
        for piece in pieces:
            ids.append(np.array(encoding.encode_ordinary(piece), dtype=np.uint16))
            bar.update(len(piece))
    return np.concatenate(ids)


def encode_chars(texts):
    """texts -> (their characters, sorted; the ids of each text, (N,) uint16). Raises UserError."""
    itos = sorted(set().union(*texts))
    if len(itos) > 2**16 - 2:
        raise UserError(f'{len(itos):,} different characters are more than uint16 can count beside [MASK] '
                        f'and [WRONG] ({2**16 - 2:,}): use --tokenizer=gpt2')
    table = np.zeros(0x110000, dtype=np.uint16)  # of all code points
    table[[ord(c) for c in itos]] = np.arange(len(itos))
    return itos, [table[np.frombuffer(text.encode('utf-32-le'), dtype='<u4')] for text in texts]

# -----------------------------------------------------------------------------
# files


def temporary(path):
    """
    The name NAME.MACHINE.PID.tmp under which this process writes a file of this path, until it is whole.

    What dead processes of this machine left half written of the same file is removed.
    """
    machine = f'{zlib.crc32(socket.gethostname().encode()):08x}'    # PyTorch keeps the name in its files
    for torn in glob.glob(f'{glob.escape(path)}.*.tmp'):
        there, _, number = torn[len(path) + 1:-len('.tmp')].rpartition('.')
        if there in ('', machine) and number.isdigit() and not is_alive(int(number)):
            with contextlib.suppress(OSError):                      # another process may be as tidy
                os.remove(torn)
    return f'{path}.{machine}.{os.getpid()}.tmp'


def is_alive(number):
    """Whether there is a process of that number on this machine, as far as one can tell."""
    if os.name == 'nt':                                             # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:                                                 # it is there, but someone else's
        pass
    return True


def text_meta(name, tokenizer, itos=None, seed=None):
    """The meta.json of a stream of text, as far as it is known. itos: the characters, None for 'gpt2'."""
    # no end token: the text runs on, and <|endoftext|> between two documents is a token like any other
    vocab_size = 50257 if itos is None else len(itos)
    return {'name': name, 'format': 'stream', 'block_size': None, 'vocab_size': vocab_size,
            'tokenizer': tokenizer, 'itos': itos, 'bos': None, 'eos': None, 'pad': None, 'seed': seed}


def write_text(out_dir, name, train, val, tokenizer):
    """
    Encodes two texts with the tokenizer 'char' or 'gpt2', writes them into out_dir, says what they are.

    Returns the meta. Raises UserError if a split is too short for one row of training.
    """
    if tokenizer == 'char':
        itos, ids = encode_chars((train, val))
        print(f'vocabulary of {len(itos):,} characters: {"".join(itos[:100])!r}')
    else:
        itos, ids = None, [encode_gpt2(text, split) for split, text in zip(SPLITS, (train, val))]
    for split, part in zip(SPLITS, ids):
        if len(part) < SHORTEST:
            raise UserError(f'the text is too short: {split} has {len(part)} tokens and needs {SHORTEST}, '
                            f'more than one row')
    meta = write_dataset(out_dir, *ids, text_meta(name, tokenizer, itos))
    report(out_dir, meta)
    return meta


def report(out_dir, meta):
    """Say what was written."""
    for split in SPLITS:
        print(f'{split}: {meta[f"{split}_tokens"]:,} tokens')
    print(f'wrote train.bin, val.bin and meta.json to {out_dir}')


def write_dataset(out_dir, train_ids, val_ids, meta):
    """Write two arrays of token ids (see dataset_writer); returns the meta as written."""
    meta = dict(meta)
    with dataset_writer(out_dir, meta) as add:
        for split, ids in zip(SPLITS, (train_ids, val_ids)):
            add(split, ids)
    return meta


@contextlib.contextmanager
def dataset_writer(out_dir, meta):
    """
    with dataset_writer(out_dir, meta) as add: add('train', ids) and add('val', ids), as often as needed.

    Writes token ids of any shape as little-endian uint16, and meta.json with their counts and sha256, which
    meta gets too. A folder that holds a meta.json holds the whole dataset it describes. Raises ValueError for
    ids that are not in 0..V-1, and UserError if there can be no such folder.
    """
    names = [f'{split}.bin' for split in SPLITS] + ['meta.json']  # the last is the last to be renamed
    path = {name: os.path.join(out_dir, name) for name in names}
    tmp = {name: temporary(path[name]) for name in names}
    sums, counts = {split: hashlib.sha256() for split in SPLITS}, dict.fromkeys(SPLITS, 0)
    if not 0 < meta['vocab_size'] <= 2**16 - 2:  # [MASK] and [WRONG] fit as well
        raise ValueError(f"vocab_size={meta['vocab_size']} does not fit into uint16")

    def add(split, ids):
        ids = np.asarray(ids)
        if ids.size == 0 or ids.min() < 0 or ids.max() >= meta['vocab_size']:
            raise ValueError(f'the ids of {split} are not in 0..vocab_size-1, or there are none')
        data = ids.astype('<u2').tobytes()
        files[split].write(data)
        sums[split].update(data)
        counts[split] += ids.size

    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f'{out_dir}: cannot be made a folder for a dataset: {error.strerror}') from error
    try:
        with contextlib.ExitStack() as stack:
            files = {split: stack.enter_context(open(tmp[f'{split}.bin'], 'wb')) for split in SPLITS}
            yield add
            if not all(counts.values()):
                raise ValueError(f'a split has no tokens: {counts}')
            meta['sha256'] = {f'{split}.bin': sums[split].hexdigest() for split in SPLITS}
            meta.update({f'{split}_tokens': int(counts[split]) for split in SPLITS})
            files['meta'] = stack.enter_context(open(tmp['meta.json'], 'wb'))
            files['meta'].write((json.dumps(meta, indent=1) + '\n').encode())
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        # an older meta.json goes before the first .bin changes: it must not describe a mixture of old and new
        Path(path['meta.json']).unlink(missing_ok=True)
        for name in names:
            os.replace(tmp[name], path[name])
    finally:
        for name in names:
            Path(tmp[name]).unlink(missing_ok=True)
