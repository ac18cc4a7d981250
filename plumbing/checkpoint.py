"""
Checkpoints: what is in them, how they are written and how they are read, without trust.
"""

import errno
import glob
import json
import math
import os
import shlex
from dataclasses import asdict, fields

import torch

from configurator import UserError, expected, reason
from data.loader import other_data, read_meta
from data.meta import check_meta
from plumbing import distributed
from plumbing.files import atomically, to_json
from plumbing.oldnames import modernised
from plumbing.trust import AtMost, check_fields, check_readable, damaged, is_dense, unpack
from plumbing.vocabulary import other_characters

# what a network and what a run is made of: fields of model.GPTConfig, settings of train.py
SIZES = dict(block_size=64, n_layer=2, n_head=4, n_embd=128, n_recur=2, parts='', draft_head=False)
# the numbers of a part where none are given, as in parts/layers.py: graph is graph:8:4
NUMBERS = dict(graph=(8, 4), short_conv=(2,), mu=(4,), bigrams=(8192,), level=(0,))
# what sampling asks a checkpoint for: settings of train.py, entries of the dataset's meta.json
NEEDED = ('training_type', 'causal_ratio', 'remasking_loss_type', 'corruption', 'block_size')
NEEDED_META = ('name', 'vocab_size', 'tokenizer', 'itos', 'bos', 'eos', 'pad')


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint atomically. Raises UserError if it cannot be written."""
    try:
        with atomically(path) as half:
            torch.save(checkpoint, half)
    except (OSError, RuntimeError) as error:             # a full disk is a RuntimeError of torch.save
        why = getattr(error, 'strerror', None) or f'is the disk full? {str(error).splitlines()[0]}'
        raise UserError(f'{path}: cannot be written: {why}') from error


def import_safetensors():
    """The package safetensors. Raises UserError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError('files that end in .safetensors need the package of that name: '
                        'pip install safetensors') from None
    return safetensors


def export_safetensors(path, model, checkpoint):
    """
    The weights of a network as a .safetensors file, and what sampling needs beside them as JSON in its
    metadata; says how to use it.

    model: as load_checkpoint returned it, so the averaged weights where there are some. load_checkpoint reads
    the result.
    """
    safetensors = import_safetensors()
    keep = to_json({key: checkpoint[key] for key in ('model_args', 'config', 'meta', 'iter_num')})
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        with atomically(path) as half:
            safetensors.torch.save_file(weights, half, {'nanoremask': keep})
    except Exception as error:                                      # safetensors has errors of its own
        raise UserError(f'{path}: cannot be written: {reason(error)}') from error
    then = f'sample from it: python sample.py --init_from={shlex.quote(path)}'
    if checkpoint['config']['training_type'] == 'remasking':
        then = f'it judges what another one writes: add --remask_from={shlex.quote(path)} there'
    print(f'written to {path}; {then}')


def read_safetensors(path, device):
    """The counterpart of export_safetensors: a checkpoint as a dict."""
    with import_safetensors().safe_open(path, 'pt', device=str(device)) as file:
        keep = json.loads((file.metadata() or {}).get('nanoremask', '{}'))
        if isinstance(keep.get('config'), dict):                    # JSON has no tuples
            keep['config'] = {name: tuple(value) if isinstance(value, list) else value
                              for name, value in keep['config'].items()}
        return {**keep, 'model': {name: file.get_tensor(name) for name in file.keys()}, 'ema': None}


def read_checkpoint(path, device='cpu'):
    """
    A checkpoint, or what --export made of one (.safetensors), as a dict of what it must have. Nothing in it
    can run code.

    Raises UserError, naming the file and what is wrong with it.
    """
    check_readable(path)
    try:
        checkpoint = (read_safetensors if path.endswith('.safetensors') else unpack)(path, device)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a reader of damaged bytes may raise
        raise damaged(path, error) from error
    for key in ('model', 'model_args', 'config', 'meta', 'iter_num'):
        if not isinstance(checkpoint, dict) or key not in checkpoint:
            raise UserError(f"{path}: not a checkpoint of train.py: it has no '{key}'")
    check_fields(path, checkpoint)
    for part, names in (('config', NEEDED), ('meta', NEEDED_META)):
        missing = [name for name in names if name not in checkpoint[part]]
        if missing:
            raise UserError(f"{path}: not a checkpoint of train.py: its {part} has no '{missing[0]}'")
    return modernised(checkpoint)


def find_checkpoint(name, out_dir, say=print):
    """
    'ckpt': the newest ckpt_*.pt in out_dir; a folder: in that one; else the path itself. say is told, in a
    line, of others in the folders below.

    Raises UserError if there is none.
    """
    if name != 'ckpt' and not os.path.isdir(name):
        return name
    folder = out_dir if name == 'ckpt' else name
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f'{folder}: cannot be read: {os.strerror(errno.EACCES)}')
    found = glob.glob(os.path.join(glob.escape(folder), '**', 'ckpt_*.pt'), recursive=True)
    found = [path for path in found if os.path.isfile(path)]        # no link that leads nowhere
    own = [path for path in found if os.path.dirname(path) == os.path.dirname(os.path.join(folder, ''))]
    below = sorted(set(found) - set(own))
    others = ', '.join(map(shlex.quote, below[:3])) + f' and {len(below) - 3} more' * (len(below) > 3)
    if not own and below:
        raise UserError(f'no checkpoint in {folder} itself; below it there are others, to be named with '
                        f'--init_from: {others}')
    if not own:
        where = '' if folder == 'out' else f' --out_dir={shlex.quote(folder)}'
        raise UserError(f'no checkpoint in {folder}; '
                        f'train one first: python train.py config/remask_all.py{where}')
    newest = max(own, key=os.path.getmtime)
    if below:
        say(f'{newest} is the newest in {folder} itself; below it there are others: {others}')
    return newest


def load_checkpoint(path, network, sizes, device='cpu', ema=True):
    """
    Reads a checkpoint: (model in eval mode, the checkpoint as a dict), the averaged weights if ema and there
    are some. network, sizes: the classes of the network and of what it is made of.

    Raises UserError, naming the file and what is wrong with it.
    """
    checkpoint = read_checkpoint(path, device)
    known = {field.name: field.default for field in fields(sizes)}
    odd = sorted(set(checkpoint['model_args']) - set(known), key=str)
    if odd:
        raise UserError(f"{path}: made by another version of model.py, which has the field '{odd[0]}'")
    args = {**known, **checkpoint['model_args']}                    # what an older version lacks is off
    checkpoint['model_args'] = args
    check_args(path, args, known, checkpoint['meta'])
    weights = checkpoint['ema'] if ema and checkpoint.get('ema') else checkpoint['model']
    if checkpoint['config'].get('energy_head') and not args['energy_head']:
        raise UserError(f'{path}: damaged: its config has an energy head, its network has none')
    check_tensors(path, weights)
    numbers = sum(tensor.numel() for tensor in weights.values())
    width = weights['causal_embd'].numel() if 'causal_embd' in weights else 0
    try:
        with AtMost(8 * numbers + 16 * width * args['block_size'] + 2**20):
            model = network(sizes(**args))
        model = model.to(device)
    except Exception as error:                                      # of check_sizes, or too much memory
        raise UserError(f'{path}: its model_args make no network: {reason(error)}') from error
    check_weights(path, weights, model.state_dict())
    model.load_state_dict(weights)
    return model.eval(), checkpoint


def load_merged(load, supports, path, other_path, weight):
    """
    Two checkpoints of one architecture, weights interpolated: (model, checkpoint), weight 0 being the first.
    load: of GPT; supports: of parts/presets.py.

    The result counts as trained for what either was. Raises UserError, naming the field in which they differ.
    """
    model, checkpoint = load(path)
    other, other_checkpoint = load(other_path)
    check_same_model(path, identity(checkpoint), other_path, identity(other_checkpoint))
    with torch.no_grad():
        mine, theirs = model.state_dict(), other.state_dict()
        torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], weight)

    config, other_config = checkpoint['config'], other_checkpoint['config']
    unmasks, causal, detects = (a or b for a, b in zip(supports(config), supports(other_config)))
    if unmasks:
        kind = 'joint' if detects else 'unmasking'
    else:
        kind = 'remasking' if detects else 'causal'
    judge = config if supports(config).detects else other_config
    checkpoint['config'] = {**config, 'training_type': kind, 'causal_ratio': float(causal),
                            'remasking_loss_type': judge['remasking_loss_type'],
                            'allow_abstain': all(c.get('allow_abstain') for c in (config, other_config))}
    return model, checkpoint


def check_args(path, args, known, meta):
    """Raises UserError if model_args of a file are no numbers or do not fit the vocabulary in its meta."""
    for name, default in known.items():
        kinds = {float: (int, float), str: (str,)}.get(type(default), (int, bool))
        if type(args[name]) not in kinds:
            raise UserError(f'{path}: damaged: {name} is {args[name]!r}, not {expected(type(default))}')
    try:
        check_meta({'format': 'stream', 'block_size': None, **meta})    # sampling needs neither
    except ValueError as error:
        raise UserError(f'{path}: damaged: {error}') from error
    if meta['vocab_size'] != args['vocab_size']:
        raise UserError(f"{path}: damaged: the network knows {args['vocab_size']} tokens, "
                        f"its vocabulary has {meta['vocab_size']}")


def check_tensors(path, weights):
    """Raises UserError if weights from a file are no plain tensors."""
    for name, tensor in weights.items():
        if not is_dense(tensor):
            raise UserError(f"{path}: '{name}' is no tensor of floating-point numbers")


def check_weights(path, weights, own):
    """Raises UserError if weights from a file are not like own, the state dict of the network."""
    check_tensors(path, weights)
    for name in sorted({*own, *weights}, key=str):
        if name not in own or name not in weights:
            raise UserError(f'{path}: made by another version of model.py: '
                            f"they differ in the tensor '{name}'")
        if own[name].shape != weights[name].shape:
            raise UserError(f"{path}: tensor '{name}' has shape {tuple(weights[name].shape)}, "
                            f"the network needs {tuple(own[name].shape)}")
        if not torch.isfinite(weights[name]).all():
            raise UserError(f"{path}: tensor '{name}' holds NaN or infinity; take an older checkpoint")


def check_same_model(path, model_args, other_path, other_args, names=None):
    """Raises UserError if the model_args of two checkpoints or runs differ in names (None: in any field)."""
    for name in names or model_args:
        mine, theirs = model_args.get(name), other_args.get(name)
        if comparable(name, mine) != comparable(name, theirs):
            raise UserError(f'{path} and {other_path} do not fit together: {name} is {mine} and {theirs}')


def comparable(name, value):
    """The value of a field for comparisons: parts in any order, with all of their numbers."""
    if name != 'parts':
        return value
    words = [word.strip().split(':') for word in value.split(',') if word.strip()]
    return {(part, *map(str, [*numbers, *NUMBERS.get(part, ())[len(numbers):]])) for part, *numbers in words}


def identity(checkpoint):
    """What checkpoints that work together have in common: model_args, and the tokens of the ids."""
    return {**checkpoint['model_args'], 'itos': checkpoint['meta']['itos']}


def model_args(config):
    """A GPTConfig as the plain dict that a checkpoint holds."""
    return asdict(config)


# -----------------------------------------------------------------------------
# what a training run saves and goes on from


def checkpoint_name(training_type, remasking_loss_type, step=None):
    """The name of a file: ckpt_unmasking.pt, ckpt_joint_all_positions.pt, ckpt_unmasking_500.pt, ..."""
    kind = f'_{remasking_loss_type}' if training_type in ('remasking', 'joint') else ''
    number = '' if step is None else f'_{step}'
    return f'ckpt_{training_type}{kind}{number}.pt'


def best_of(path):
    """Where the checkpoint of the lowest validation loss is, if it is not the newest one of this path."""
    return f'{path[:-3]}_best.pt'


def check_overwrite(path, config):
    """
    Looks at what a new run would write over; raises UserError if that is another network, or of another
    dataset.

    Returns a line to print: what is written over, or ''.
    """
    if not os.path.exists(path) or config['init_from'] == 'resume' or config['eval_only']:
        return ''
    if config['overwrite']:
        return f'{path} will be written over'
    how = 'go on with it by --init_from=resume, give another --out_dir, or write over it by --overwrite=True'
    try:
        checkpoint = read_checkpoint(path)
    except UserError as error:
        raise UserError(f'this run would write over a file that it cannot read; {how} ({error})') from error
    old = checkpoint['config']
    old = {'coarse': '', **SIZES, **old}                            # what it did not have was off
    for name in ('dataset', 'coarse', *SIZES):
        if name in old and comparable(name, old[name]) != comparable(name, config[name]):
            raise UserError(f'{path} is of another run, with {name}={old[name]!r} where this one has '
                            f'{config[name]!r}: {how}')
    now = read_meta(config['dataset'])
    if now is not None and other_data(checkpoint['meta'], now):
        raise UserError(f'{path} is of another run, on other data than what '
                        f"data/{config['dataset']} holds now: give another --out_dir, "
                        'or write over it by --overwrite=True')
    return f'{path} will be written over: it is of the same network and dataset'


def make_checkpoint(run, result):
    """Everything that sampling needs of a Run, and everything that a bit-identical resume needs."""
    rng = dict(rows=run.rows_rng.get_state(), noise=run.noise_rng.get_state(), torch=torch.get_rng_state(),
               where=run.device.type)
    if torch.cuda.is_available():
        rng['cuda'] = torch.cuda.get_rng_state()
    if run.device.type == 'mps':                                    # dropout draws from it
        rng['mps'] = torch.mps.get_rng_state()
    ema = run.ema.state_dict() if run.ema is not run.model else None
    weights = distributed.whole(dict(model=run.model.state_dict(), ema=ema,
                                     optimizers=[optim.state_dict() for optim in run.optimizers]))
    if distributed.several():
        rng['ranks'] = distributed.gather(rng)
    return dict(weights, iter_num=run.step, rng=rng, sums=run.sums, control=run.control, skipped=run.skipped,
                best=run.best,
                model_args=model_args(run.model.config), config=run.config, meta=run.meta, result=result)


def random_states_of_ranks(checkpoint):
    """The random states of the ranks that saved a checkpoint, a list; of a single process the only one."""
    rng = checkpoint['rng']
    return rng['ranks'] if isinstance(rng, dict) and 'ranks' in rng else [rng]


def restore(run, path, checkpoint):
    """
    Puts a Run where a checkpoint stands, the weights of its model excepted. Rates, decay and betas are those
    of this run.

    Raises UserError, naming the path, if what it says does not fit the run.
    """
    try:
        if run.ema is not run.model and checkpoint['ema']:
            own = run.ema.state_dict()
            check_weights(path, checkpoint['ema'], own)
            run.ema.load_state_dict(distributed.like(checkpoint['ema'], own))
        for optim, state in zip(run.optimizers, checkpoint['optimizers'], strict=True):
            restore_optimizer(optim, state)
        restore_random_states(run, checkpoint['rng'])

        control = {name: checkpoint['control'][name] for name in ('p_mask', 'bias', 'price')}
        numbers = [value for name, value in control.items() if name != 'p_mask' or value is not None]
        if not all(isinstance(value, float) and math.isfinite(value) for value in numbers):
            raise ValueError('its controller holds no numbers')
        run.control = control
        run.sums = {name: part.to(run.device) for name, part in checkpoint['sums'].items()}
        run.skipped = {name: checkpoint.get('skipped', run.skipped)[name] for name in run.skipped}
        best = checkpoint.get('best')
        run.best = None if best is None else {name: best[name] for name in ('value', 'step', 'last')}
        run.step = checkpoint['iter_num']
    except UserError:
        raise
    except Exception as error:                                      # whatever a damaged state may raise
        raise UserError(f'{path}: damaged: the state of its run does not fit this one ({reason(error)}); '
                        f'start a new run from its weights with --init_from={shlex.quote(path)}') from error


def restore_optimizer(optim, state):
    """Loads the state of an optimiser, but keeps the settings that it was made with."""
    params = [p for group in optim.param_groups for p in group['params']]
    chosen = [{name: group[name] for name in group if name != 'params'} for group in optim.param_groups]
    numbers = [[group['params'] for group in one['param_groups']] for one in (optim.state_dict(), state)]
    if numbers[0] != numbers[1]:
        raise ValueError('an optimiser knows other weights')
    names = {'momentum_buffer'} if 'momentum' in chosen[0] else {'step', 'exp_avg', 'exp_avg_sq'}
    for number, own in state['state'].items():
        shapes = {name: torch.Size() if name == 'step' else params[number].shape for name in names}
        if {name: is_dense(part) and part.shape for name, part in own.items()} != shapes:
            raise ValueError('an optimiser knows other weights')
        if not all(part.isfinite().all() for part in own.values()):
            raise ValueError('an optimiser holds NaN or infinity')
    optim.load_state_dict(dict(state, state=distributed.like(state['state'], params)))
    for group, settings in zip(optim.param_groups, chosen):
        group.update(settings)


def restore_random_states(run, rng):
    """Sets all random numbers, those of the noise only if they were saved on this kind of device."""
    run.rows_rng.set_state(rng['rows'].cpu())
    where = rng.get('where', run.device.type)
    if where not in ('cpu', 'cuda', 'mps'):
        raise ValueError('its random numbers come from nowhere')
    if where == run.device.type:
        run.noise_rng.set_state(rng['noise'].cpu())
    torch.set_rng_state(rng['torch'].cpu())
    if 'cuda' in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng['cuda'].cpu())
    if 'mps' in rng and run.device.type == 'mps':
        torch.mps.set_rng_state(rng['mps'].cpu())


def load_start(load, path, config, args, meta):
    """
    What a run starts from: (weights, checkpoint), the averaged weights unless it resumes.

    args: the model_args of this run. Unless it resumes, it may have parts and a draft head that the
    checkpoint lacks: they start as identities, so it begins where the checkpoint stands. Nor need a text in
    characters have the same ones. Raises UserError, naming the field in which the two differ otherwise.
    """
    resume = config['init_from'] == 'resume'
    source, checkpoint = load(path, ema=not resume)
    before = {**identity(checkpoint), 'dropout': args['dropout']}
    now = {**args, 'itos': meta['itos']}
    grows = []
    if not resume:
        if comparable('parts', now['parts']) >= comparable('parts', before['parts']):
            grows.append('parts')
        if now['draft_head'] and not before['draft_head']:
            grows.append('draft_head')
        if other_characters(checkpoint['meta'], meta):              # see by_character
            grows += ['itos', 'vocab_size']
    check_same_model(path, before, 'this run', now, [name for name in now if name not in grows])
    if resume:
        check_resume(path, config, checkpoint, meta)
    return source.state_dict(), checkpoint


def check_resume(path, config, checkpoint, meta):
    """Raises UserError if a run with these settings and data cannot go on with a checkpoint."""
    if other_data(checkpoint['meta'], meta):
        raise UserError(f"{path} was trained on other data than what data/{config['dataset']} holds now: "
                        'make that again as it was, or start a new run from its weights with '
                        f'--init_from={shlex.quote(path)}')
    missing = [key for key in ('optimizers', 'rng', 'sums', 'control') if key not in checkpoint]
    if missing:
        raise UserError(f"{path}: made by another version of train.py, it has no '{missing[0]}' "
                        'to resume with; start a new run from its weights with '
                        f'--init_from={shlex.quote(path)}')
    check_same_model(path, {'coarse': '', 'k1_credit': False, **checkpoint['config']}, 'this run', config,
                     ('optimizer', 'dataset', 'training_type', 'coarse', 'k1_credit'))
    if checkpoint['iter_num'] >= config['max_iters'] and not config['eval_only']:
        raise UserError(f"{path} has all of its {checkpoint['iter_num']} steps: "
                        'to go on, set a higher --max_iters')
