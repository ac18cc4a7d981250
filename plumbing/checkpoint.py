"""
Checkpoints and the other files of a run: written whole or not at all, read without trust.
"""

import contextlib
import glob
import json
import math
import os
import pickle
import socket
from dataclasses import asdict, fields

import torch

from plumbing import distributed
from configurator import UserError, expected
from data.loader import other_data, read_meta

# -----------------------------------------------------------------------------
# files


@contextlib.contextmanager
def atomically(path):
    """with atomically(path) as temporary: write the file temporary. At every moment path is the old or the new file, whole."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_atomically(path, text):
    """Writes a text file so that it is there whole or not at all."""
    try:
        with atomically(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
            file.write(text)
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {error.strerror}') from error


def make_folder(path):
    """Makes the folder that checkpoints go to, if it is not there. Raises UserError if that cannot be."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f'{path}: cannot be made a folder for checkpoints: {error.strerror}') from error


def append_line(path, line):
    """Adds a line to a text file, whole or not at all. Raises UserError if there is no room for it."""
    try:
        with open(path, 'ab') as file:
            size = file.tell()
            try:
                file.write(line.encode() + b'\n')
                file.flush()
            except OSError:
                os.truncate(path, size)                                        # half a line would harm the next
                raise
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {error.strerror}') from error


# -----------------------------------------------------------------------------
# one run a folder


def read_lock(folder):
    """(pid, host) of the run that train.lock in the folder speaks of; (0, '') if there is no such file, or half of one."""
    try:
        with open(os.path.join(folder, 'train.lock'), encoding='utf-8') as file:
            pid, host = file.read().split()
            return int(pid), host
    except (OSError, ValueError):
        return 0, ''


def lives(pid, host):
    """Whether a run is there still; yes on another host, from where it cannot be told."""
    if not pid:
        return False
    if host != socket.gethostname() or os.name == 'nt':                        # there, asking would interrupt it
        return True
    try:
        os.kill(pid, 0)
    except PermissionError:                                                    # it is someone else's
        return True
    except (OSError, OverflowError):
        return False
    return pid != os.getpid()                                                  # in a new container numbers start again


def check_unlocked(folder):
    """Raises UserError if another run trains into the folder."""
    pid, host = read_lock(folder)
    if lives(pid, host):
        raise UserError(f'{folder} is in use: process {pid} on {host} trains into it. Give another --out_dir, or stop that run '
                        f"first; if it is no training run any more, delete {os.path.join(folder, 'train.lock')}")


def lock(folder):
    """Makes this process the one that trains into the folder, until unlock. Raises UserError if another one does."""
    check_unlocked(folder)
    path = os.path.join(folder, 'train.lock')
    try:
        if os.path.exists(path):                                               # of a run that was killed, like what it half wrote
            for torn in glob.glob(os.path.join(glob.escape(folder), f'*.{read_lock(folder)[0]}.tmp')):
                os.remove(torn)
            os.remove(path)
        with open(path, 'x', encoding='utf-8') as file:                        # O_EXCL: of two that come at once one fails
            file.write(f'{os.getpid()} {socket.gethostname()}\n')
    except OSError as error:
        check_unlocked(folder)
        raise UserError(f'{path}: cannot be written: {error.strerror}') from error


def unlock(folder):
    """Takes the lock away, if it is this process that trains into the folder."""
    if read_lock(folder) == (os.getpid(), socket.gethostname()):
        os.remove(os.path.join(folder, 'train.lock'))


def check_overwrite(path, config):
    """
    Looks at what a new run would write over; raises UserError if that is another network, or of another dataset.

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
    off = {'coarse': '', **{field.name: field.default for field in fields(GPTConfig) if field.name != 'dropout'}}
    old = {**off, **old}                                                       # what it did not have was off
    for name in ('dataset', *off):
        idle = name == 'graph_topk' and not old['graph_window']                # of no effect there
        if name in config and name in old and old[name] != config[name] and not idle:
            raise UserError(f'{path} is of another run, with {name}={old[name]!r} where this one has {config[name]!r}: {how}')
    now = read_meta(config['dataset'])
    if now is not None and other_data(checkpoint['meta'], now):
        raise UserError(f"{path} is of another run, on other data than what data/{config['dataset']} holds now: give another "
                        '--out_dir, or write over it by --overwrite=True')
    return f'{path} will be written over: it is of the same network and dataset'


# -----------------------------------------------------------------------------
# reading and writing a checkpoint

# parts that a network may get later, because they start as the identity
GROWS = ('noise_condition', 'time_dim', 'self_condition', 'graph_window', 'mu_blocks', 'short_conv', 'shortcuts', 'bigram_rows',
         'draft_head')
# what sampling asks a checkpoint for: settings of train.py, entries of the dataset's meta.json
NEEDED = ('training_type', 'causal_ratio', 'remasking_loss_type', 'corruption', 'block_size')
NEEDED_META = ('name', 'vocab_size', 'tokenizer', 'itos', 'bos', 'eos', 'pad')


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint atomically. Raises UserError if it cannot be written."""
    try:
        with atomically(path) as temporary:
            torch.save(checkpoint, temporary)
    except (OSError, RuntimeError) as error:                                   # a full disk is a RuntimeError of torch.save
        why = getattr(error, 'strerror', None) or f'is the disk full? {str(error).splitlines()[0]}'
        raise UserError(f'{path}: cannot be written: {why}') from error


def last_good(path):
    """Which checkpoint there still is, for someone who just lost a newer one."""
    return f'the last good checkpoint is {path}' if os.path.exists(path) else 'there is no checkpoint yet'


def import_safetensors():
    """The package safetensors. Raises UserError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError('files that end in .safetensors need the package of that name: pip install safetensors') from None
    return safetensors


def export_safetensors(path, model, checkpoint):
    """
    The weights of a network as a .safetensors file, and what sampling needs beside them as JSON in its metadata.

    model: as load_checkpoint returned it, so the averaged weights where there are some. load_checkpoint reads the result.
    """
    safetensors = import_safetensors()
    keep = json.dumps({key: checkpoint[key] for key in ('model_args', 'config', 'meta', 'iter_num')})
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        with atomically(path) as temporary:
            safetensors.torch.save_file(weights, temporary, {'nanoremask': keep})
    except Exception as error:                                                 # safetensors has errors of its own
        raise UserError(f'{path}: cannot be written: {str(error).splitlines()[0]}') from error


def read_safetensors(path, device):
    """The counterpart of export_safetensors: a checkpoint as a dict."""
    with import_safetensors().safe_open(path, 'pt', device=str(device)) as file:
        keep = json.loads((file.metadata() or {}).get('nanoremask', '{}'))
        return {**keep, 'model': {name: file.get_tensor(name) for name in file.keys()}, 'ema': None}


def read_checkpoint(path, device='cpu'):
    """
    A checkpoint, or what --export made of one (.safetensors), as a dict of what it must have. Nothing in it can run code.

    Raises UserError, naming the file and what is wrong with it.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such checkpoint; train one with python train.py config/remask_all.py')
    try:
        if path.endswith('.safetensors'):
            checkpoint = read_safetensors(path, device)
        else:
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f'{path}: refused, because it is no plain checkpoint: {first_line(error)}') from error
    except Exception as error:  # whatever a reader of damaged bytes may raise
        raise UserError(f'{path}: truncated or damaged ({first_line(error)}); take an older one or train again') from error
    for key, kind in (('model', dict), ('model_args', dict), ('config', dict), ('meta', dict), ('iter_num', int)):
        if not isinstance(checkpoint, dict) or key not in checkpoint:
            raise UserError(f"{path}: not a checkpoint of train.py: it has no '{key}'")
        if not isinstance(checkpoint[key], kind):
            raise UserError(f"{path}: not a checkpoint of train.py: its '{key}' is no {kind.__name__}")
    for part, names in (('config', NEEDED), ('meta', NEEDED_META)):
        missing = [name for name in names if name not in checkpoint[part]]
        if missing:
            raise UserError(f"{path}: not a checkpoint of train.py: its {part} has no '{missing[0]}'")
    return checkpoint


def first_line(error):
    """The first line of what an error says; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_checkpoint(path, network, sizes, device='cpu', ema=True):
    """
    Reads a checkpoint: (model in eval mode, the checkpoint as a dict).

    ema: take the averaged weights where the checkpoint has them. Raises UserError, naming the file and what is wrong with it.
    """
    checkpoint = modernised(read_checkpoint(path, device))
    known = {field.name: field.default for field in fields(sizes)}
    odd = sorted(set(checkpoint['model_args']) - set(known), key=str)
    if odd:
        raise UserError(f"{path}: made by another version of model.py, which has the field '{odd[0]}'")
    checkpoint['model_args'] = args = {**known, **checkpoint['model_args']}    # what an older version did not have is off
    check_args(path, args, known, checkpoint['meta'])
    weights = checkpoint['ema'] if ema and checkpoint.get('ema') else checkpoint['model']
    try:
        model = network(sizes(**args)).to(device)
    except Exception as error:                                                 # check_config's, or too much memory
        raise UserError(f'{path}: its model_args make no network: {first_line(error)}') from error
    check_weights(path, weights, model.state_dict())
    model.load_state_dict(weights)
    return model.eval(), checkpoint


def check_args(path, args, known, meta):
    """Raises UserError if the model_args of a file are no numbers, or the vocabulary in its meta is not the network's."""
    for name, default in known.items():
        if not isinstance(args[name], (int, float) if isinstance(default, float) else type(default)):
            raise UserError(f'{path}: damaged: {name} is {args[name]!r}, not {expected(type(default))}')
    itos, size = meta['itos'], meta['vocab_size']
    fits = isinstance(size, int) and size == args['vocab_size']
    if not fits or not (itos is None or isinstance(itos, list) and len(itos) == size):
        raise UserError(f"{path}: damaged: the network knows {args['vocab_size']} tokens, its vocabulary has "
                        f"{len(itos) if isinstance(itos, list) else size!r}")
    for name in (meta['name'], meta.get('dataset', meta['name'])):             # task.py and prepare.py of that name will be run
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise UserError(f'{path}: damaged: {name!r} is no name of a dataset')


def check_weights(path, weights, own):
    """Raises UserError, naming the tensor, if weights from a file are not what the network needs, its state dict own."""
    if not isinstance(weights, dict):
        raise UserError(f'{path}: damaged: its averaged weights are no dict')
    for name in sorted({*own, *weights}, key=str):
        if name not in own or name not in weights:
            raise UserError(f"{path}: made by another version of model.py: they differ in the tensor '{name}'")
        if not isinstance(weights[name], torch.Tensor) or not weights[name].is_floating_point():
            raise UserError(f"{path}: '{name}' is no tensor of floating-point numbers")
        if own[name].shape != weights[name].shape:
            raise UserError(f"{path}: tensor '{name}' has shape {tuple(weights[name].shape)}, "
                            f"the network needs {tuple(own[name].shape)}")
        if not torch.isfinite(weights[name]).all():
            raise UserError(f"{path}: tensor '{name}' holds NaN or infinity; take an older checkpoint")


def check_same_model(path, model_args, other_path, other_args, names=None):
    """Raises UserError, naming the field, if two checkpoints' (or runs') model_args differ in one of names (None: any)."""
    for name in names or model_args:
        if model_args[name] != other_args[name]:
            raise UserError(f'{path} and {other_path} do not fit together: '
                            f'{name} is {model_args[name]} and {other_args[name]}')


def identity(checkpoint):
    """What two checkpoints must have in common to work together: the model_args, and the tokens that the ids stand for."""
    return {**checkpoint['model_args'], 'itos': checkpoint['meta']['itos']}


def model_args(config):
    """A GPTConfig as the plain dict that a checkpoint holds."""
    return asdict(config)


# what the settings and fields of earlier versions are in parts=, and the tensors of their parts today
OLD_PARTS = dict(graph_window='graph', shortcuts='shortcuts', short_conv='short_conv', self_condition='previous', mu_blocks='mu',
                 bigram_rows='bigrams', noise_condition='level', time_dim='level')
OLD_TENSORS = (('.aloof', '.parts.graph.off_graph_penalty'), ('.shortcuts', '.parts.shortcuts.weight'),
               ('.conv.weight', '.parts.short_conv.weight'), ('previous.weight', 'parts.previous.proj.weight'),
               ('mixer.', 'parts.mu.'), ('bigrams.', 'parts.bigrams.'), ('level.weight', 'parts.level.mlp.0.weight'),
               ('level.', 'parts.level.mlp.'))


def modernised(checkpoint):
    """A checkpoint of an earlier version as one of this version; the fields of its parts become the field parts."""
    for key in ('model_args', 'config'):
        old = checkpoint[key]
        if 'parts' in old or not set(OLD_PARTS) & set(old):
            continue
        words = {}
        for name, part in OLD_PARTS.items():
            value = old.pop(name, 0)
            if value:
                words[part] = part if value is True else f'{part}:{value}'
        topk = old.pop('graph_topk', 4)
        if 'graph' in words:
            words['graph'] += f':{topk}'
        old['parts'] = ','.join(words.values())
    for key in ('model', 'ema'):
        weights = checkpoint.get(key)
        if isinstance(weights, dict):
            checkpoint[key] = {new_name(name): tensor for name, tensor in weights.items()}
    return checkpoint


def new_name(name):
    """The name today of a tensor of an earlier version."""
    if not isinstance(name, str) or 'parts.' in name:
        return name
    for old, new in OLD_TENSORS:
        if name.startswith(old) or (old[0] == '.' and name.endswith(old) and name.startswith('blocks.')):
            return name.replace(old, new)
    return name


# -----------------------------------------------------------------------------
# what a training run saves and goes on from


def checkpoint_name(training_type, remasking_loss_type, step=None):
    """As the plan names them: ckpt_unmasking.pt, ckpt_joint_all_positions.pt, ckpt_unmasking_500.pt, ..."""
    kind = f'_{remasking_loss_type}' if training_type in ('remasking', 'joint') else ''
    return f"ckpt_{training_type}{kind}{'' if step is None else f'_{step}'}.pt"


def make_checkpoint(model, ema, optimizers, generator, noise, step, sums, control, skipped, args, config, meta, result):
    """Everything that sampling needs, and everything that a bit-identical resume needs."""
    rng = dict(rows=generator.get_state(), noise=noise.get_state(), torch=torch.get_rng_state(), where=noise.device.type)
    if torch.cuda.is_available():
        rng['cuda'] = torch.cuda.get_rng_state()
    if noise.device.type == 'mps':                                             # dropout draws from it
        rng['mps'] = torch.mps.get_rng_state()
    weights = distributed.whole(dict(model=model.state_dict(), ema=ema.state_dict() if ema is not model else None,
                                     optimizers=[optim.state_dict() for optim in optimizers]))
    return dict(weights, iter_num=step, rng=rng, sums=sums, control=control, skipped=skipped, model_args=args, config=config,
                meta=meta, result=result)


def random_states_of_ranks(checkpoint):
    """The random states of the ranks that saved a checkpoint, a list; of a single process the only one."""
    rng = checkpoint['rng']
    return rng['ranks'] if isinstance(rng, dict) and 'ranks' in rng else [rng]


def restore(path, checkpoint, ema, optimizers, generator, noise):
    """
    The counterpart of make_checkpoint, the model's weights excepted: (the step to go on from, sums, control, skipped). The state
    of noise is left alone if it was saved on another kind of device. Rates, decay and betas are those of this run.

    Raises UserError, naming the path, if what it says does not fit the run.
    """
    try:
        if ema is not None and checkpoint['ema']:
            check_weights(path, checkpoint['ema'], ema.state_dict())
            ema.load_state_dict(distributed.like(checkpoint['ema'], ema.state_dict()))
        for optim, state in zip(optimizers, checkpoint['optimizers'], strict=True):
            params = [p for group in optim.param_groups for p in group['params']]
            chosen = [{name: group[name] for name in ('betas', 'weight_decay') if name in group} for group in optim.param_groups]
            optim.load_state_dict(dict(state, state=distributed.like(state['state'], params)))
            for group, settings in zip(optim.param_groups, chosen):
                group.update(settings)
        generator.set_state(checkpoint['rng']['rows'].cpu())
        where = checkpoint['rng'].get('where', noise.device.type)
        if where not in ('cpu', 'cuda', 'mps'):
            raise ValueError('its random numbers come from nowhere')
        if where == noise.device.type:
            noise.set_state(checkpoint['rng']['noise'].cpu())
        torch.set_rng_state(checkpoint['rng']['torch'].cpu())
        if 'cuda' in checkpoint['rng'] and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint['rng']['cuda'].cpu())
        if 'mps' in checkpoint['rng'] and noise.device.type == 'mps':
            torch.mps.set_rng_state(checkpoint['rng']['mps'].cpu())
        control = {name: checkpoint['control'][name] for name in ('p_mask', 'bias', 'price')}
        numbers = [value for name, value in control.items() if name != 'p_mask' or value is not None]
        if not all(isinstance(value, float) and math.isfinite(value) for value in numbers):
            raise ValueError('its controller holds no numbers')
        sums = {name: part.to(noise.device) for name, part in checkpoint['sums'].items()}
        return checkpoint['iter_num'], sums, control, checkpoint.get('skipped', dict(steps=0, in_a_row=0))
    except UserError:
        raise
    except Exception as error:                                                 # as many kinds as there are ways to be wrong
        raise UserError(f'{path}: damaged: the state of its run does not fit this one ({first_line(error)}); start a new run '
                        f'from its weights with --init_from={path}') from error


def load_start(path, config, args, meta):
    """
    What a run starts from: (weights, checkpoint), the averaged weights unless it resumes.

    args: the model_args of this run. Unless it resumes, it may have parts that the checkpoint lacks, those of GROWS: they start
    as identities, so it begins where the checkpoint stands. Raises UserError, naming the field in which the two differ otherwise.
    """
    resume = config['init_from'] == 'resume'
    source, checkpoint = load_checkpoint(path, ema=not resume)
    before, now = {**identity(checkpoint), 'dropout': args['dropout']}, {**args, 'itos': meta['itos']}
    grown = [] if resume else [name for name in GROWS if now[name] and not before[name]
                               and not (name == 'time_dim' and before['noise_condition'])]   # which its MLP would replace
    check_same_model(path, before, 'this run', now, [name for name in now if name not in grown and
                                                     (name != 'graph_topk' or before['graph_window'])])
    if resume:
        if other_data(checkpoint['meta'], meta):
            raise UserError(f"{path} was trained on other data than what data/{config['dataset']} holds now: make that again as "
                            f'it was, or start a new run from its weights with --init_from={path}')
        missing = [key for key in ('optimizers', 'rng', 'sums', 'control') if key not in checkpoint]
        if missing:
            raise UserError(f"{path}: made by another version of train.py, it has no '{missing[0]}' to resume with; start a new "
                            f'run from its weights with --init_from={path}')
        check_same_model(path, {'coarse': '', 'k1_credit': False, **checkpoint['config']}, 'this run', config,
                         ('optimizer', 'dataset', 'training_type', 'coarse', 'k1_credit'))
        if checkpoint['iter_num'] >= config['max_iters'] and not config['eval_only']:
            raise UserError(f"{path} has all of its {checkpoint['iter_num']} steps: to go on, set a higher --max_iters")
    return source.state_dict(), checkpoint


def load_guesser(path, args, meta):
    """The network of guess_from. Raises UserError if it has no guesses to make, or not for this run."""
    guesser, checkpoint = load_checkpoint(path)
    check_same_model(path, identity(checkpoint), 'this run', {**args, 'itos': meta['itos']}, ('vocab_size', 'block_size', 'itos'))
    if not supports(checkpoint['config'])[0]:
        raise UserError(f"guess_from={path} cannot unmask (training_type={checkpoint['config']['training_type']}), "
                        f'so it has no guesses')
    return guesser


def find_checkpoint(name, out_dir):
    """'ckpt': the newest ckpt_*.pt under out_dir; otherwise the name is a path. Raises UserError if there is none."""
    if name != 'ckpt':
        return name
    found = glob.glob(os.path.join(out_dir, '**', 'ckpt_*.pt'), recursive=True)
    if not found:
        raise UserError(f'no checkpoint under {out_dir}; train one first: python train.py config/remask_all.py')
    return max(found, key=os.path.getmtime)


def load_merged(load, supports, path, other_path, weight):
    """
    Two checkpoints of one architecture, weights interpolated: (model, checkpoint), weight 0 being the first (the plan's
    merging). The result counts as trained for what either was. Raises UserError, naming the field in which they differ.
    """
    (model, checkpoint), (other, other_checkpoint) = load(path), load(other_path)
    check_same_model(path, identity(checkpoint), other_path, identity(other_checkpoint))
    with torch.no_grad():
        mine, theirs = model.state_dict(), other.state_dict()
        torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], weight)
    config, other_config = checkpoint['config'], other_checkpoint['config']
    unmasks, causal, detects = (a or b for a, b in zip(supports(config), supports(other_config)))
    kind = ('joint' if detects else 'unmasking') if unmasks else 'remasking' if detects else 'causal'
    judge = config if supports(config)[2] else other_config
    checkpoint['config'] = {**config, 'training_type': kind, 'causal_ratio': float(causal),
                            'remasking_loss_type': judge['remasking_loss_type'],
                            'allow_abstain': config.get('allow_abstain') and other_config.get('allow_abstain')}
    return model, checkpoint


def check_folder(path):
    """Raises UserError if a file cannot be written to this path (None: nothing is to be written) for want of a folder."""
    folder = os.path.dirname(path or '')
    if folder and not os.path.isdir(folder):
        raise UserError(f'{path}: there is no folder {folder}')
