"""
Checkpoints and the other files of a run: written whole or not at all, read without trust.
"""

import contextlib
import os
import pickle
from dataclasses import asdict, fields

import torch

from configurator import UserError
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# files


@contextlib.contextmanager
def atomically(path):
    """with atomically(path) as temporary: write the file temporary. At every moment path is the old file or the new one, whole."""
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


# -----------------------------------------------------------------------------
# reading and writing a checkpoint


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint atomically."""
    with atomically(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(path, device='cpu', ema=True):
    """
    Reads a checkpoint: (model in eval mode, the checkpoint as a dict).

    ema: take the averaged weights where the checkpoint has them. Nothing in the file can run code (weights_only).
    Raises UserError, naming the file and what is wrong with it.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such checkpoint; train one with python train.py config/remask_all.py')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f'{path}: refused, because it is no plain checkpoint: {str(error).splitlines()[0]}') from error
    except Exception as error:  # whatever a reader of damaged bytes may raise
        raise UserError(f'{path}: truncated or damaged ({str(error).splitlines()[0] if str(error) else "empty"}); '
                        f'take an older one or train again') from error
    missing = [key for key in ('model', 'model_args', 'config', 'meta', 'iter_num')
               if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise UserError(f"{path}: not a checkpoint of train.py: it has no '{missing[0]}'")
    known = {field.name: field.default for field in fields(GPTConfig)}
    odd = sorted(set(checkpoint['model_args']) - set(known))
    if odd:
        raise UserError(f"{path}: made by another version of model.py, which has the field '{odd[0]}'")
    checkpoint['model_args'] = {**known, **checkpoint['model_args']}           # what an older version did not have is off
    model = GPT(GPTConfig(**checkpoint['model_args'])).to(device)
    weights = checkpoint['ema'] if ema and checkpoint.get('ema') else checkpoint['model']
    own = model.state_dict()
    for name in sorted(set(own) | set(weights)):
        if name not in own or name not in weights:
            raise UserError(f"{path}: made by another version of model.py: they differ in the tensor '{name}'")
        if own[name].shape != weights[name].shape:
            raise UserError(f"{path}: tensor '{name}' has shape {tuple(weights[name].shape)}, "
                            f"the network needs {tuple(own[name].shape)}")
        if not torch.isfinite(weights[name]).all():
            raise UserError(f"{path}: tensor '{name}' holds NaN or infinity; take an older checkpoint")
    model.load_state_dict(weights)
    return model.eval(), checkpoint


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


# -----------------------------------------------------------------------------
# what a training run saves and goes on from


def checkpoint_name(training_type, remasking_loss_type, step=None):
    """As the plan names them: ckpt_unmasking.pt, ckpt_joint_all_positions.pt, ckpt_unmasking_500.pt, ..."""
    kind = f'_{remasking_loss_type}' if training_type in ('remasking', 'joint') else ''
    return f"ckpt_{training_type}{kind}{'' if step is None else f'_{step}'}.pt"


def make_checkpoint(model, ema, optimizers, generator, noise, step, sums, control, args, config, meta, result):
    """Everything that sampling needs, and everything that a bit-identical resume needs."""
    rng = dict(rows=generator.get_state(), noise=noise.get_state(), torch=torch.get_rng_state())
    if torch.cuda.is_available():
        rng['cuda'] = torch.cuda.get_rng_state()
    return dict(model=model.state_dict(), ema=ema.state_dict() if ema is not model else None, iter_num=step,
                optimizers=[optim.state_dict() for optim in optimizers], rng=rng, sums=sums, control=control,
                model_args=args, config=config, meta=meta, result=result)


def restore(checkpoint, ema, optimizers, generator, noise):
    """The counterpart of make_checkpoint, the model's weights excepted: returns the step to go on from, sums and control."""
    if ema is not None and checkpoint['ema']:
        ema.load_state_dict(checkpoint['ema'])
    for optim, state in zip(optimizers, checkpoint['optimizers']):
        optim.load_state_dict(state)
    generator.set_state(checkpoint['rng']['rows'].cpu())
    noise.set_state(checkpoint['rng']['noise'].cpu())
    torch.set_rng_state(checkpoint['rng']['torch'].cpu())
    if 'cuda' in checkpoint['rng'] and torch.cuda.is_available():
        torch.cuda.set_rng_state(checkpoint['rng']['cuda'].cpu())
    return checkpoint['iter_num'], checkpoint['sums'], checkpoint['control']


def load_start(path, config, args, meta):
    """
    What a run starts from: (weights, checkpoint), the averaged weights unless it resumes.

    args: the model_args of this run. Raises UserError, naming the field in which the checkpoint and this run differ.
    """
    resume = config['init_from'] == 'resume'
    source, checkpoint = load_checkpoint(path, ema=not resume)
    check_same_model(path, {**identity(checkpoint), 'dropout': args['dropout']}, 'this run', {**args, 'itos': meta['itos']})
    if resume:
        missing = [key for key in ('optimizers', 'rng', 'sums', 'control') if key not in checkpoint]
        if missing:
            raise UserError(f"{path}: made by another version of train.py, it has no '{missing[0]}' to resume with; start a new "
                            f'run from its weights with --init_from={path}')
        check_same_model(path, checkpoint['config'], 'this run', config, ('optimizer', 'dataset', 'training_type'))
        if checkpoint['iter_num'] >= config['max_iters'] and not config['eval_only']:
            raise UserError(f"{path} has all of its {checkpoint['iter_num']} steps: to go on, set a higher --max_iters")
    return source.state_dict(), checkpoint
