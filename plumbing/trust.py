"""
What a checkpoint must be before anything of it is used: it may be damaged, and it may come from anyone.
"""

import glob
import math
import os
import pickle
import re
import shlex
import stat
import zipfile

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configurator import UserError, reason
from plumbing.checks import CHOICES

FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64


def check_readable(path):
    """Raises UserError if there is no file of this path, or it must not be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileNotFoundError
        with open(path, 'rb'):
            pass
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f'{path}: no such checkpoint; train one with '
                        'python train.py config/remask_all.py') from None
    except OSError as error:                                        # it is whole, but not ours
        raise UserError(f'{path}: cannot be read: {reason(error)}') from error


def unpack(path, device):
    """
    What torch.save wrote. Nothing in it can run code, and every byte is the one that was written.

    Raises UserError for what is no such file; for a damaged one whatever its readers raise.
    """
    if not zipfile.is_zipfile(path):
        with open(path, 'rb') as file:
            start = file.read(4)
        if start in (b'', b'PK\x03\x04'):
            raise ValueError('its end is missing')
        raise UserError(f'{path}: refused, because it is no plain checkpoint: torch.save writes other files')
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
            raise ValueError('it holds more than its size')
        torn = archive.testzip()                                    # 0.4 s for a gigabyte
    if torn:
        raise ValueError(f'{os.path.basename(torn)} in it is not what was written')
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r'(?:GLOBAL|class) (\S+)', str(error))
        what = f', it would call {found[1]}' if found else ''
        raise UserError(f'{path}: refused, because it is no plain checkpoint: '
                        f'it holds more than numbers and text{what}') from error


def damaged(path, error):
    """The UserError for a file that its readers could not make sense of, with another one to take."""
    others = glob.glob(os.path.join(glob.escape(os.path.dirname(path) or '.'), 'ckpt_*.pt'))
    others = [other for other in others if os.path.isfile(other) and not os.path.samefile(other, path)]
    other = 'an older one'
    if others:
        other = f'--init_from={shlex.quote(max(others, key=os.path.getmtime))}'
    return UserError(f'{path}: truncated or damaged ({reason(error)}); take {other} or train again')


# -----------------------------------------------------------------------------
# what each field is


def is_dense(x, dtypes=FLOATS):
    """Whether x is a tensor with a number of its own in the file for each of its elements."""
    return (type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided and not x.is_meta
            and x.dtype in dtypes and x.numel() * x.element_size() <= x.untyped_storage().nbytes())


def is_number(x):
    return type(x) is float and math.isfinite(x) or type(x) is int and abs(x) < 2**62


def is_plain(x, depth=5):
    """Whether x is made of numbers and text only, in lists and dicts that are not too deep."""
    if isinstance(x, dict):
        return depth > 0 and all(type(key) is str and is_plain(part, depth - 1) for key, part in x.items())
    if isinstance(x, (list, tuple)):
        return depth > 0 and all(is_plain(part, depth - 1) for part in x)
    return x is None or type(x) in (str, bool) or is_number(x)


def is_dict_of(fits):
    return lambda x: isinstance(x, dict) and all(type(key) is str and fits(part) for key, part in x.items())


KINDS = {
    'text': lambda x: type(x) is str,
    'flag': lambda x: type(x) is bool,
    'count': lambda x: type(x) is int and 0 <= x < 2**62,
    'number': is_number,
    'float': lambda x: type(x) is float,
    'fraction': lambda x: type(x) is float and math.isfinite(x),
    'share': lambda x: is_number(x) and 0 <= x <= 1,
    'nothing': lambda x: x is None,
    'list of dicts': lambda x: isinstance(x, list) and all(isinstance(part, dict) for part in x),
    'dict': lambda x: isinstance(x, dict),
    'dict of plain values': lambda x: isinstance(x, dict) and is_plain(x),
    'dict of pairs': is_dict_of(lambda part: is_dense(part) and part.shape == (2,)),
    'random state': lambda x: is_dense(x, (torch.uint8,)) and x.ndim == 1,
}
RANDOM = dict(rows='random state', noise='random state', torch='random state', cuda='random state',
              mps='random state', where=('cpu', 'cuda', 'mps'))
# a kind, several with or between them, one of a tuple, or what is in a dict; fields that are not there fit
FIELDS = dict(
    model='dict', ema='dict or nothing', model_args='dict of plain values', iter_num='count',
    config=dict(
        training_type=CHOICES['training_type'], remasking_loss_type=CHOICES['remasking_loss_type'],
        causal_ratio='share', corruption='text', block_size='count', parts='text', coarse='text',
        dataset='text', init_from='text', allow_abstain='flag', draft_head='flag',
        energy_head='count or flag', max_iters='count', batch_size='count',
        gradient_accumulation_steps='count'),
    meta='dict',                                                    # see data.meta.check_meta
    optimizers='list of dicts', rng=RANDOM, sums='dict of pairs', seconds='number',
    control=dict(p_mask='fraction or nothing', bias='fraction', price='fraction'),
    skipped=dict(steps='count', in_a_row='count'),
    best=dict(value='float', step='count', last='flag'), distilled='dict of plain values')


def check_fields(path, values, fields=FIELDS, where='its'):
    """Raises UserError if a value of a checkpoint, a dict, is not of the kind that fields say."""
    for name, kind in fields.items():
        if name not in values or name == 'best' and values[name] is None:
            continue
        value = values[name]
        if isinstance(kind, tuple):
            fits, kind = type(value) is str and value in kind, ' or '.join(kind)
        elif isinstance(kind, dict):
            fits = isinstance(value, dict)
        else:
            fits = any(KINDS[one](value) for one in kind.split(' or '))
        if not fits:
            kind = 'dict' if isinstance(kind, dict) else kind
            raise UserError(f"{path}: not a checkpoint of train.py: {where} '{name}' is no {kind}")
        if isinstance(kind, dict):
            check_fields(path, value, kind, f'{where} {name} has a field that')
    if fields is FIELDS:
        for name in ('config', 'meta'):
            if not is_plain(values[name]):
                raise UserError(f'{path}: not a checkpoint of train.py: its {name} holds more than numbers '
                                'and text')


class AtMost(TorchDispatchMode):
    """with AtMost(n): no more than n numbers come into being, or UserError: a file may say any size."""

    def __init__(self, numbers):
        super().__init__()
        self.left = numbers

    @classmethod
    def _should_skip_dynamo(cls):                                   # which would import all of torch.compile
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))                        # memory is only taken when it is filled
        if isinstance(made, torch.Tensor) and not func._schema.name.endswith('_'):
            self.left -= made.numel()
            if self.left < 0:
                raise UserError('it is larger than the weights beside them')
        return made
