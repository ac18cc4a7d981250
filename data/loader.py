"""Reading a prepared dataset, and rows of it."""

import difflib
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import torch

from configurator import UserError, reason
from data.meta import check_ids, check_meta, is_nano, nano_meta, sums

HERE = os.path.dirname(os.path.abspath(__file__))


def is_dataset(name):
    """Whether data/<name> is a dataset, or a script that makes one."""
    there = any(os.path.exists(os.path.join(HERE, name, file)) for file in ('prepare.py', 'meta.json'))
    return there or is_nano(os.path.join(HERE, name))


def how_to_make(dataset):
    """The command that makes a dataset: its own prepare.py, or for a user's text the one of data/text."""
    if dataset != 'text' and os.path.exists(os.path.join(HERE, dataset, 'prepare.py')):
        return f'python data/{dataset}/prepare.py'
    out = '' if dataset == 'text' else f" --out={shlex.quote(f'data/{dataset}')}"
    return f'python data/text/prepare.py --input=PATH{out}'


def load_data(dataset, coarse=''):
    """
    The dataset: (meta, {'train': ids, 'val': ids}), int64 (N, T) for rows, uint16 (N,) for a stream of text.

    A dataset that is not there yet is made by its prepare.py; if that fails, or if the files are not what
    meta.json says, UserError says what to do. A folder that nanoGPT made is read as it is.
    coarse: characters that all become the first of them.
    """
    dataset = os.path.normpath(dataset)
    check_name(dataset)
    folder = os.path.join(HERE, dataset)
    if not os.path.exists(os.path.join(folder, 'meta.json')) and not is_nano(folder):
        print(f'preparing the dataset: python data/{dataset}/prepare.py', flush=True)
        if subprocess.run([sys.executable, os.path.join(folder, 'prepare.py')]).returncode:
            raise UserError(f'the dataset {dataset} is not there; make it with {how_to_make(dataset)}')
    try:
        meta, data = read_dataset(folder, dataset)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, IsADirectoryError)):
            raise UserError(f'{error.filename or folder}: cannot be read: {reason(error)}') from error
        raise UserError(f'the dataset in data/{dataset} is damaged ({error}); make it again: '
                        f'{how_to_make(dataset)}') from error
    data = {split: made_coarse(ids, meta, coarse) for split, ids in data.items()}
    meta = {**meta, 'name': own_name(meta['name'], dataset), 'dataset': dataset}
    from plumbing.text import load_task                             # here, because that builds on this file
    task = load_task(meta['name'])
    if hasattr(task, 'augment'):                                    # random_rows asks for it
        data['train'].augment = task.augment
    return meta, data


def own_name(name, dataset):
    """
    The name by which data/<dataset> finds its task.py: its own, unless the prepare.py of the dataset that its
    meta.json names made it, as for arithmetic_large.
    """
    own = os.path.exists(os.path.join(HERE, dataset, 'task.py'))
    places = {HERE, os.path.dirname(os.path.abspath(__file__))}
    made = any(os.path.exists(os.path.join(place, name, 'prepare.py')) for place in places)
    return name if made and not own else dataset


def check_name(dataset):
    """Raises UserError if this is not the name of a dataset in data/."""
    name = os.path.basename(dataset)
    if name != dataset:  # a checkpoint remembers the name alone
        there = shlex.quote(os.path.abspath(dataset))
        hint = f'a folder from elsewhere can be linked there: ln -s {there} data/'
        if is_dataset(name):
            hint = f'did you mean {name}?'
        raise UserError(f'dataset expects the name of a folder in data/, got {dataset}; {hint}')
    if not is_dataset(dataset):
        known = sorted(filter(is_dataset, os.listdir(HERE)))
        near = difflib.get_close_matches(dataset, known, 1)
        hint = f'did you mean {near[0]}?' if near else f'known: {known};'
        raise UserError(f'there is no data/{dataset}/prepare.py; {hint} to make it of your own text: '
                        f'{how_to_make(dataset)}')


def read_dataset(folder, name):
    """The files of a dataset, see load_data. Raises ValueError and others if they are damaged."""
    nano = is_nano(folder)
    if nano:
        meta = nano_meta(folder, name)
    else:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
            meta = json.load(file)
    check_meta(meta)
    data = {}
    for split in ('train', 'val'):
        data[split] = ids = np.memmap(os.path.join(folder, f'{split}.bin'), dtype='<u2', mode='r')
        expected = meta[f'{split}_tokens']
        if len(ids) != expected:
            raise ValueError(f'{split}.bin has {len(ids)} tokens, meta.json says {expected}')
        check_ids(f'{split}.bin', ids, meta['vocab_size'])
    now = sums(data)
    if nano:
        print(f"data/{name} is a stream as nanoGPT makes it, vocabulary {meta['vocab_size']:,}", flush=True)
        meta['sha256'] = now
    elif None not in (now, meta.get('sha256')) and now != meta['sha256']:
        raise ValueError('train.bin or val.bin is not what it was when meta.json was written (sha256)')
    if meta['format'] == 'rows':
        data = {split: torch.from_numpy(ids.astype(np.int64)).view(-1, meta['block_size'])
                for split, ids in data.items()}
    return meta, data


def made_coarse(ids, meta, coarse):
    """The ids of a split with the first of the characters coarse for all of them. Raises UserError."""
    odd = [c for c in coarse if c not in (meta['itos'] or ())]
    if odd:
        raise UserError(f"coarse={coarse} expects characters of {meta['name']}, and {odd[0]!r} is not among "
                        f'its tokens')
    if not coarse:
        return ids
    first, *others = (meta['itos'].index(c) for c in coarse)
    if isinstance(ids, torch.Tensor):
        return torch.where(torch.isin(ids, torch.tensor(others)), first, ids)
    return np.where(np.isin(ids, others), np.uint16(first), ids)


def read_meta(dataset):
    """The meta.json of data/<dataset>; None if it is not there or damaged, which load_data sees to."""
    try:
        with open(os.path.join(HERE, dataset, 'meta.json'), encoding='utf-8') as file:
            meta = json.load(file)
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) else None


def other_data(meta, now):
    """Whether the meta of a checkpoint is of other files than the meta now. One without sha256 fits all."""
    return meta.get('sha256') not in (None, now.get('sha256'))


def data_of(meta, config):
    """
    What a checkpoint was trained on: load_data for its meta and config.

    Raises UserError if the folder of that name holds something else by now: ids would mean other tokens.
    """
    dataset = meta.get('dataset', meta['name'])
    now, data = load_data(dataset, config.get('coarse', ''))
    if other_data(meta, now):
        raise UserError(f'data/{dataset} holds other data than what the checkpoint was trained on; make that '
                        f'again as it was: {how_to_make(dataset)}')
    return now, data


def rows_at(ids, index, block_size):
    """Rows of load_data's ids: index (B,), for a stream the first positions -> x0 (B, T)."""
    if isinstance(ids, torch.Tensor):
        return ids[index]
    window = index[:, None].numpy() + np.arange(block_size)
    return torch.from_numpy(ids[window].astype(np.int64))


def num_places(ids, block_size):
    """How many rows rows_at could take."""
    return len(ids) if isinstance(ids, torch.Tensor) else len(ids) - block_size + 1


def random_rows(ids, num, block_size, generator):
    """num rows at random places of the dataset, as the task's augment changes them: x0 (num, T)."""
    index = torch.randint(num_places(ids, block_size), (num,), generator=generator)
    rows = rows_at(ids, index, block_size)
    return ids.augment(rows, generator) if hasattr(ids, 'augment') else rows


def spread_rows(ids, num, block_size):
    """At most num rows spread evenly over the dataset, the same every time: x0 (num, T). For evaluation."""
    high = num_places(ids, block_size)
    num = min(num, high if isinstance(ids, torch.Tensor) else len(ids) // block_size)
    return rows_at(ids, torch.arange(num) * (high - 1) // max(1, num - 1), block_size)
