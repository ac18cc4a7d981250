"""
Several processes, started by torchrun: each has its share of every batch, and all of them take the same step.

    torchrun --standalone --nproc_per_node=2 train.py config/remask_all.py

A process is a rank. Rank 0 prints, evaluates and writes. In a single process nothing here does anything.
"""

import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist

import configurator
from configurator import UserError


def launched():
    """Whether torchrun started this process."""
    return 'LOCAL_WORLD_SIZE' in os.environ and 'MASTER_ADDR' in os.environ


def several():
    """Whether the ranks are connected, see connect."""
    return dist.is_available() and dist.is_initialized()


def rank():
    """The number of this process, 0 .. world() - 1."""
    return dist.get_rank() if several() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if several() else 1


def first_here():
    """Whether this is the first rank of its machine."""
    return not several() or os.environ['LOCAL_RANK'] == '0'


def run(scope):
    """
    configurator.run, but only rank 0 is heard. The UserErrors of the others are left to it, because every rank has the same
    ones (see together): they end quietly, since torchrun stops all ranks, rank 0 before it can speak, when one fails.
    """
    if not launched() or os.environ['RANK'] == '0':
        return configurator.run(scope)
    sys.stdout = open(os.devnull, 'w')
    with contextlib.suppress(UserError, KeyboardInterrupt):
        configurator.configure(scope, sys.argv[1:])
        scope['main']()


def connect(device):
    """
    Connects the ranks that torchrun started; returns the device of this one, as a setting: without torchrun, what was asked for.

    Raises UserError if a device cannot be shared out, or if the ranks do not find one another.
    """
    if not launched():
        return device
    if device not in ('auto', 'cpu', 'cuda'):
        raise UserError(f'torchrun gives every process a device of its own: set --device=cuda or --device=cpu, not {device}')
    cuda = torch.cuda.is_available() and device != 'cpu'
    try:                                                                       # hours: the others wait while rank 0 evaluates
        dist.init_process_group('cpu:gloo,cuda:nccl' if cuda else 'gloo', timeout=datetime.timedelta(hours=6))
    except (RuntimeError, ValueError) as error:
        raise UserError(f'the processes of torchrun do not find one another: {error}') from error
    here, local = int(os.environ['LOCAL_WORLD_SIZE']), int(os.environ['LOCAL_RANK'])
    with together():
        if cuda and here > torch.cuda.device_count():
            raise UserError(f'{here} processes need as many GPUs, there are {torch.cuda.device_count()}: set --nproc_per_node, '
                            f'or --device=cpu')
    if cuda:
        torch.cuda.set_device(local)
    elif 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    return 'cuda' if cuda else 'cpu' if device == 'auto' else device


def disconnect():
    """The counterpart of connect. Not for a rank that crashed: it has to end at once, the others are still waiting for it."""
    if several() and isinstance(sys.exc_info()[1], (UserError, type(None))):
        dist.destroy_process_group()


def gather(thing):
    """The thing of every rank, a list in their order. Every rank waits here for all others."""
    if not several():
        return [thing]
    things = [None] * world()
    dist.all_gather_object(things, thing)
    return things


@contextlib.contextmanager
def together():
    """with together(): the UserError of one rank in here becomes that of all, and none goes on before all are through."""
    found = None
    try:
        yield
    except UserError as error:
        found = error
    first = next((error for error in gather(found and str(found)) if error is not None), None)
    if first is not None:
        raise found if found and str(found) == first else UserError(first)


def anywhere(flag):
    """Whether the flag of any rank is set."""
    if not several():
        return flag
    flag = torch.tensor(int(flag))                                             # on the CPU, no matter where the network is
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def total(count):
    """The sum of a tensor over all ranks."""
    if several():
        count = count.clone()
        dist.all_reduce(count)
    return count


def rows_of_rank(rows):
    """This rank's rows of a batch (B, T), B a multiple of world(): every world()-th of them."""
    return rows[rank()::world()] if several() else rows


def share(num):
    """How many of the first num rows of a batch are among those of rows_of_rank."""
    return len(range(rank(), num, world()))


def same_weights(model):
    """Gives every rank the weights and buffers of rank 0."""
    if several():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def average_gradients(model, parts, names):
    """
    Makes every gradient its mean over the ranks; returns the parts of the loss (see training_step), now summed over them.

    names: of all the parts that a rank may have. It is one sum of one flat tensor: training_step goes through the network by
    several methods, several times, and never through all of it, which the hooks of DistributedDataParallel cannot follow.
    """
    if not several():
        return parts
    params = list(model.parameters())
    there = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    losses = torch.stack([parts[name].float() if name in parts else there.new_zeros(2) for name in names])     # (names, 2)
    flat = torch.cat([*(torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in params), there,
                      losses.view(-1)])
    dist.all_reduce(flat)
    *grads, there, losses = flat.split([*(p.numel() for p in params), len(params), losses.numel()])
    for p, grad, some in zip(params, grads, there.tolist()):
        p.grad = grad.view_as(p).div_(world()) if some else None               # what no rank used is not optimised either
    return dict(zip(names, losses.view(-1, 2)))
