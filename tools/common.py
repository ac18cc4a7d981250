"""What the tools have in common: a finished checkpoint teaches, and something small learns from it."""

import os
import time

import torch

from configurator import UserError
from parts.presets import supports
from plumbing.checkpoint import find_checkpoint


def check_least(settings, least):
    """Raises UserError for settings, a dict, that are below the least that makes sense, {name: number}."""
    for name, low in least.items():
        if settings[name] < low:
            raise UserError(f'{name} must be at least {low}, got {settings[name]}')


def load_writer(load, init_from, out_dir, goal):
    """(the path of a checkpoint that can write, its network, the checkpoint); goal: what will be made of it."""
    path = find_checkpoint(init_from, out_dir)
    if os.path.realpath(path) == os.path.realpath(goal):
        raise UserError(f'{goal} would overwrite the checkpoint it is made from: name another one as '
                        '--init_from, or another place for it')
    model, checkpoint = load(path)
    config = checkpoint['config']
    if not supports(config).writes:
        raise UserError(f"{path} cannot unmask (training_type={config['training_type']}), so it has nothing to teach")
    return path, model, checkpoint


def learn(optimizer, losses, max_iters, log_interval, clipped=()):
    """
    Takes max_iters steps on the sum of losses(), a dict, at a rate that falls linearly to 0; yields after each.

    clipped: the parameters whose gradients together have a norm of 1 at most.
    """
    rate, t0, sums = optimizer.defaults['lr'], time.time(), {}
    for step in range(max_iters):
        parts = losses()
        total = sum(parts.values())
        if not torch.isfinite(total):
            raise UserError(f'the loss is no longer finite at step {step}: lower --learning_rate')
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        for group in optimizer.param_groups:
            group['lr'] = rate * (1 - step / max_iters)
        optimizer.step()
        yield

        sums = {name: sums.get(name, 0) + part.item() for name, part in parts.items()}
        if (step + 1) % log_interval == 0:
            speed = (step + 1) / (time.time() - t0)
            left = int((max_iters - step - 1) / speed)
            means = '  '.join(f'{name} {value / log_interval:.3f}' for name, value in sums.items())
            print(f'step {step + 1}/{max_iters}  {means}  {speed:.1f} it/s  {left // 60}:{left % 60:02d} left',
                  flush=True)
            sums = {}
