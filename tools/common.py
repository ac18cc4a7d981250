"""What the tools have in common: something small learns from a finished checkpoint."""

import os
import time

import torch

from configurator import UserError
from parts.presets import supports
from plumbing.checkpoint import find_checkpoint
from plumbing.files import check_output, make_folder


def load_writer(load, init_from, out_dir, goal):
    """What goal, a path, is made from, which can write: (the path, the network, the checkpoint)."""
    path = find_checkpoint(init_from, out_dir)
    if os.path.realpath(path) == os.path.realpath(goal):
        raise UserError(f'{goal} would overwrite the checkpoint it is made from: give another --init_from, '
                        'or another place for the result')
    model, checkpoint = load(path)
    kind = checkpoint['config']['training_type']
    if not supports(checkpoint['config']).writes:
        raise UserError(f'{path} cannot unmask (training_type={kind}), so it has nothing to teach')
    make_folder(os.path.dirname(goal) or '.')
    check_output(goal, text=False)
    return path, model, checkpoint


def learn(optimizer, losses, settings, clipped=(), after=lambda: None):
    """
    Steps on the sum of losses(), {name: loss}, at a rate that falls linearly to 0, and a line now and then.

    settings: those of the tool; clipped: parameters whose gradients have a norm of 1 at most; after: called
    after every step.
    """
    num, interval = settings['max_iters'], settings['log_interval']
    t0, sums = time.perf_counter(), {}
    for step in range(num):
        parts = losses()
        total = sum(parts.values())
        if not torch.isfinite(total):
            raise UserError(f'the loss is no longer finite at step {step}: lower --learning_rate')
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        for group in optimizer.param_groups:
            group['lr'] = settings['learning_rate'] * (1 - step / num)
        optimizer.step()
        after()

        sums = {name: sums.get(name, 0) + part.item() for name, part in parts.items()}
        if (step + 1) % interval == 0:
            speed = (step + 1) / (time.perf_counter() - t0)
            left = int((num - step - 1) / speed)
            time_left = f'{left // 60}:{left % 60:02d}'
            means = '  '.join(f'{name} {value / interval:.3f}' for name, value in sums.items())
            print(f'step {step + 1}/{num}  {means}  {speed:.1f} it/s  {time_left} left', flush=True)
            sums = {}
