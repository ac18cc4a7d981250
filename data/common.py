"""What the prepare.py scripts share: fetching, tokenizing, and writing a dataset, all of it or none of it."""

import codecs
import contextlib
import errno
import functools
import glob
import hashlib
import http.client
import importlib
import json
import os
import re
import socket
import stat
import sys
import urllib.request
import zlib
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:         # Windows: there is no lock
    fcntl = None

# a prepare.py may know no more than this folder
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import UserError, reason  # noqa: E402

SPLITS = ('train', 'val')
SPECIAL = ['<bos>', '<eos>', '<pad>']
SHORTEST = 65               # tokens in a split: one more than a window of train.py's default block_size
WIDEST = 4096               # tokens of a row that nobody asked for
PIECE = 2**20               # characters that are tokenized at once
BATCH = 1024                # rows that are written at once


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
            data = read_bytes(input)
        else:
            with urllib.request.urlopen(url, timeout=30) as response:
                size = int(response.headers['Content-Length'] or 0) or None
                with library('tqdm').tqdm.wrapattr(response, 'read', total=size, desc='download') as file:
                    data = b''.join(iter(lambda: file.read(2**16), b''))
    except (OSError, http.client.HTTPException) as error:
        if input is not None:
            raise UserError(f'cannot read {input}: {reason(error)}') from error
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
        why = reason(error.__cause__ or error)
        if input is not None:
            raise UserError(f'cannot read the files in {input}: {why}') from error
        page = f"{name}/tree/{branch.replace('/', '%2F')}/{hub.get('name', '')}"
        raise UserError(f'cannot load {name} ({why}): fetch the .parquet files of '
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



def read_bytes(path):
    """What is in a file; '-' is standard input. Raises OSError, also for a device, which may have no end."""
    if str(path) == '-':
        return sys.stdin.buffer.read()
    with open(path, 'rb') as file:
        if stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and not file.isatty() and file.read(1):
            raise OSError(errno.EINVAL, 'it is a device, not a file', path)
        return file.read()


def read_text(path):
    """The text of a file in UTF-8 or UTF-16 without its byte-order mark, see read_bytes."""
    data = read_bytes(path)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode('utf-16' if wide else 'utf-8-sig')

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


def encode_documents(documents, desc):
    """texts -> the ids of all of them with <|endoftext|> between two, (N,) uint16, see encode_gpt2."""
    ids = []
    for text in documents:
        ids += [np.array([gpt2().eot_token], np.uint16)] * bool(ids) + [encode_gpt2(text, desc)]
    return np.concatenate(ids or [np.zeros(0, np.uint16)])


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


def encode_chars(texts, special=()):
    """
    texts -> (their characters, sorted, and the special tokens behind them; the ids of each text, (N,)
    uint16). Raises UserError.
    """
    itos, most = sorted(set().union(*texts)), 2**16 - 2 - len(special)
    if len(itos) > most:
        raise UserError(f'{len(itos):,} different characters are more than uint16 can count beside [MASK] '
                        f'and [WRONG] ({most:,}): use --tokenizer=gpt2')
    table = np.zeros(0x110000, dtype=np.uint16)  # of all code points
    table[[ord(c) for c in itos]] = np.arange(len(itos))
    ids = [table[np.frombuffer(text.encode('utf-32-le'), dtype='<u4')] for text in texts]
    return itos + list(special), ids

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

    A text may be a list of documents: a blank line is put between two, of GPT-2's tokens <|endoftext|>.
    Returns the meta. Raises UserError if a split is too short for one row of training.
    """
    check_writable(out_dir)
    train, val = ([text] if isinstance(text, str) else text for text in (train, val))
    if tokenizer == 'char':
        itos, ids = encode_chars(['\n'.join(documents) for documents in (train, val)])
        show_characters(itos)
    else:
        itos, ids = None, [encode_documents(*both) for both in zip((train, val), SPLITS)]
    for split, part in zip(SPLITS, ids):
        if len(part) < SHORTEST:
            raise UserError(f'the text is too short: {split} has {len(part)} tokens and needs {SHORTEST}, '
                            f'more than one row')
    meta = write_dataset(out_dir, *ids, text_meta(name, tokenizer, itos))
    report(out_dir, meta)
    return meta


def write_rows(out_dir, name, train, val, tokenizer, block_size=None, drop_long=False, seed=None):
    """
    Encodes two lists of texts as rows: start token, text, end token, padding; otherwise like write_text.

    block_size: tokens of a row, None: as many as the longest needs. drop_long: whether longer ones are left
    out; else they raise UserError. In GPT-2's tokens the end is <|endoftext|>, start and padding are new.
    """
    check_writable(out_dir)
    if tokenizer == 'char':
        itos, ids = encode_chars(train + val, SPECIAL)
        show_characters(itos[:-len(SPECIAL)])
        V = len(itos)
        bos, eos, pad = range(V - 3, V)
    else:
        itos, ids = None, [np.array(row, np.uint16) for row in gpt2().encode_ordinary_batch(train + val)]
        V, bos, eos, pad = 50259, 50257, 50256, 50258
    longest = 2 + max(map(len, ids))
    size = block_size or longest
    if size > WIDEST and not block_size:
        raise UserError(f'the longest row has {longest:,} tokens, and all rows would get padding up to that: '
                        'set --block_size, and --drop_long=True to leave out longer ones')
    long = sum(len(row) + 2 > size for row in ids)
    if long and not drop_long:
        raise UserError(f'{long:,} of {len(ids):,} rows are longer than block_size={size} with their start '
                        f'and end token: raise it (the longest has {longest:,}), or leave them out by '
                        '--drop_long=True')
    meta = dict(text_meta(name, tokenizer, itos, seed), format='rows', block_size=size, vocab_size=V,
                bos=bos, eos=eos, pad=pad)
    parts = [[row for row in part if len(row) + 2 <= size] for part in (ids[:len(train)], ids[len(train):])]
    if not all(parts):
        raise UserError(f'block_size={size} leaves no row to train on or none that is held out: raise it')
    with dataset_writer(out_dir, meta) as add:
        for split, part in zip(SPLITS, parts):
            print(f'{split}: {len(part):,} rows' + (f', {long:,} longer ones left out' if long else ''))
            for first in range(0, len(part), BATCH):
                some = part[first:first + BATCH]
                block = np.full((len(some), size), pad, np.uint16)
                for to, row in zip(block, some):
                    to[:len(row) + 2] = [bos, *row, eos]
                add(split, block)
    report(out_dir, meta)
    return meta


def show_characters(itos):
    """Say which characters there are."""
    print(f'vocabulary of {len(itos):,} characters: {"".join(itos[:100])!r}')


def check_writable(out_dir):
    """Raises UserError if no file can be made in a folder that may not be there yet."""
    there = Path(out_dir).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f'{out_dir}: cannot be made a folder for a dataset: {there} '
                        + ('cannot be written to' if there.is_dir() else 'is a file'))


def make_folder(path, what='checkpoints'):
    """Makes the folder that what goes to, if it is not there. Raises UserError if that cannot be."""
    try:
        os.makedirs(path, exist_ok=True)
    except (OSError, RecursionError) as error:
        raise UserError(f'{path}: cannot be made a folder for {what}: {reason(error)}') from error


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

    make_folder(out_dir, 'a dataset')
    with alone(out_dir):
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
            put_in_place(tmp, path)
        except OSError as error:                            # a full disk has no file name
            error.filename = error.filename or out_dir
            raise
        finally:
            for name in names:
                Path(tmp[name]).unlink(missing_ok=True)


def put_in_place(tmp, path):
    """Renames the files {name: path} of tmp to path, all or none of them; the last one is meta.json."""
    # an older meta.json goes before the first .bin changes: it must not describe a mixture of old and new
    Path(path['meta.json']).unlink(missing_ok=True)
    try:
        for name in tmp:
            os.replace(tmp[name], path[name])
    except BaseException:
        for name in path:                                   # without meta.json nobody knows what the ids mean
            Path(path[name]).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def alone(folder):
    """Nobody else writes a dataset into the folder meanwhile; waits for who does, removes what is torn."""
    said = f'waiting: another process is making a dataset in {folder}'
    descriptor = take_lock(folder, lambda: print(said, flush=True))
    try:
        if descriptor is not None:
            remove_torn(folder, 'train.bin', 'val.bin', 'meta.json')
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)                            # which ends the lock


def take_lock(folder, busy):
    """
    Locks a folder: the descriptor to close in the end, None on a system that knows no locks.

    If another process has it, busy() is called, which may raise, and then that process is waited for.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            return None
        raise
    return descriptor


def remove_torn(folder, *names):
    """Removes what killed processes left half written of files of these names, in a locked folder."""
    for name in names:
        for torn in glob.glob(os.path.join(glob.escape(folder), f'{name}.*.tmp')):
            os.remove(torn)
