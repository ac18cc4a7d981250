"""Reading a prepared dataset, and rows of it."""

import difflib
import json
import os
import subprocess
import sys

import numpy as np
import torch

from configurator import UserError

HERE = os.path.dirname(os.path.abspath(__file__))


def has_one_of(folder, *names):
    """Whether one of these files is in the folder."""
    return any(os.path.exists(os.path.join(folder, name)) for name in names)


def how_to_make(dataset):
    """The command that makes a dataset. Without a prepare.py of its own it is a user's text, made by that of data/text."""
    if dataset == 'text' or not has_one_of(os.path.join(HERE, dataset), 'prepare.py'):
        return 'python data/text/prepare.py --input=PATH' + ('' if dataset == 'text' else f' --out=data/{dataset}')
    return f'python data/{dataset}/prepare.py'


def load_data(dataset, coarse=''):
    """
    The dataset as (meta, {'train': ids, 'val': ids}), int64 (N, T) for rows, uint16 (N,) for a stream of text.

    A dataset that is not there yet is made by its prepare.py. coarse: characters that all become the first of them. Raises
    UserError with what to do if that fails.
    """
    dataset = os.path.normpath(dataset)
    name = os.path.basename(dataset)
    if name != dataset:                                              # a checkpoint remembers the name alone
        hint = (f'did you mean {name}?' if has_one_of(os.path.join(HERE, name), 'prepare.py', 'meta.json') else
                f'a folder from elsewhere can be linked there: ln -s {os.path.abspath(dataset)} data/')
        raise UserError(f'dataset expects the name of a folder in data/, got {dataset}; {hint}')
    folder = os.path.join(HERE, dataset)
    script = os.path.join(folder, 'prepare.py')
    if not has_one_of(folder, 'prepare.py', 'meta.json'):
        known = sorted(name for name in os.listdir(HERE) if has_one_of(os.path.join(HERE, name), 'prepare.py', 'meta.json'))
        near = difflib.get_close_matches(dataset, known, 1)
        raise UserError(f"there is no data/{dataset}/prepare.py; {f'did you mean {near[0]}' if near else f'known: {known}'}?")
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        print(f'preparing the dataset: python data/{dataset}/prepare.py', flush=True)
        if subprocess.run([sys.executable, script]).returncode:
            raise UserError(f'the dataset {dataset} is not there; make it with {how_to_make(dataset)}')
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
            meta = json.load(file)
        data = {split: np.memmap(os.path.join(folder, f'{split}.bin'), dtype=np.uint16, mode='r') for split in ('train', 'val')}
        for split, ids in data.items():
            if len(ids) != meta[f'{split}_tokens']:
                raise ValueError(f"{split}.bin has {len(ids)} tokens, meta.json says {meta[f'{split}_tokens']}")
        if meta['format'] == 'rows':
            data = {split: torch.from_numpy(ids.astype(np.int64)).view(-1, meta['block_size']) for split, ids in data.items()}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f'the dataset in data/{dataset} is damaged ({error}); make it again: '
                        f'{how_to_make(dataset)}') from error
    return {**meta, 'dataset': dataset}, {split: made_coarse(ids, meta, coarse) for split, ids in data.items()}


def made_coarse(ids, meta, coarse):
    """The ids of a split with the first of the characters coarse for all of them. Raises UserError for what is no character."""
    odd = [c for c in coarse if c not in (meta['itos'] or ())]
    if odd:
        raise UserError(f"coarse={coarse} expects characters of {meta['name']}, and {odd[0]!r} is none of its tokens")
    if not coarse:
        return ids
    first, *others = (meta['itos'].index(c) for c in coarse)
    if isinstance(ids, torch.Tensor):
        return torch.where(torch.isin(ids, torch.tensor(others)), first, ids)
    return np.where(np.isin(ids, others), np.uint16(first), ids)


def read_meta(dataset):
    """The meta.json of data/<dataset>, None if it is not there or damaged: load_data makes the one and refuses the other."""
    try:
        with open(os.path.join(HERE, dataset, 'meta.json'), encoding='utf-8') as file:
            meta = json.load(file)
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) else None


def other_data(meta, now):
    """Whether the meta of a checkpoint is of other files than now, that of a dataset. A meta without sha256 is of any."""
    return meta.get('sha256') not in (None, now.get('sha256'))


def data_of(meta, config):
    """
    load_data for the meta and the config in a checkpoint: what it was trained on. Its name says what kind of text that is.

    Raises UserError if the folder of that name holds something else by now: ids would mean other tokens, and val be train.
    """
    dataset = meta.get('dataset', meta['name'])
    now, data = load_data(dataset, config.get('coarse', ''))
    if other_data(meta, now):
        raise UserError(f'data/{dataset} holds other data than what the checkpoint was trained on; make that again as it was: '
                        f'{how_to_make(dataset)}')
    return now, data


def rows_at(ids, index, block_size):
    """Rows of a dataset (see load_data): ids, index (B,) -> x0 (B, T). For a stream the index is a first position."""
    if isinstance(ids, torch.Tensor):
        return ids[index]
    window = index[:, None].numpy() + np.arange(block_size)
    return torch.from_numpy(ids[window].astype(np.int64))


def random_rows(ids, num, block_size, generator):
    """num rows at random places of the dataset: x0 (num, T)."""
    high = len(ids) if isinstance(ids, torch.Tensor) else len(ids) - block_size + 1
    return rows_at(ids, torch.randint(high, (num,), generator=generator), block_size)


def spread_rows(ids, num, block_size):
    """At most num rows spread evenly over the dataset, the same every time: x0 (num, T). For evaluation."""
    high = len(ids) if isinstance(ids, torch.Tensor) else len(ids) - block_size + 1
    num = min(num, high if isinstance(ids, torch.Tensor) else len(ids) // block_size)
    return rows_at(ids, torch.arange(num) * (high - 1) // max(1, num - 1), block_size)
