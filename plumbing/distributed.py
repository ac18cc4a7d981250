"""
Several processes, started by torchrun: each has its share of every batch, and all of them take the same step.

    torchrun --standalone --nproc_per_node=2 train.py config/remask_all.py

A process is a rank. Rank 0 prints, evaluates and writes. In a single process nothing here does anything.

With --fsdp every rank keeps a part of each matrix of the blocks, see shard, and borrows those of one block at
a time.
"""

import atexit
import contextlib
import datetime
import os
import sys
import warnings
from functools import reduce

import torch
import torch.distributed as dist

import configurator
from configurator import UserError
from plumbing.pieces import added


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
    configurator.run, but only rank 0 is heard.

    Every rank has the same UserErrors (see together), so the others end quietly and leave them to rank 0:
    when one fails, torchrun stops all ranks, rank 0 before it can speak.
    """
    if not launched() or os.environ['RANK'] == '0':
        return configurator.run(scope)
    sys.stdout = open(os.devnull, 'w', encoding='utf-8')
    with contextlib.suppress(UserError, KeyboardInterrupt):
        configurator.configure(scope, sys.argv[1:])
        scope['main']()


def leave():
    """
    Ends a rank at once, without taking the interpreter down: the last line of a script.

    Threads of Gloo may still hold a tensor, and to let go of it by then aborts the process (PyTorch 2.13, 3
    runs of 13): torchrun would call a run failed that is saved.
    """
    if launched():
        atexit._run_exitfuncs()                                     # of the loggers, say
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def connect(device):
    """
    Connects the ranks that torchrun started; returns the device of this one, or without torchrun what was
    asked for.

    Raises UserError if a device cannot be shared out, or if the ranks do not find one another.
    """
    if not launched():
        return device
    if device not in ('auto', 'cpu', 'cuda'):
        raise UserError('torchrun gives every process a device of its own: '
                        f'set --device=cuda or --device=cpu, not {device}')
    cuda = torch.cuda.is_available() and device != 'cpu'
    try:                                                            # hours: they wait while rank 0 evaluates
        dist.init_process_group('cpu:gloo,cuda:nccl' if cuda else 'gloo', timeout=datetime.timedelta(hours=6))
    except (RuntimeError, ValueError) as error:
        raise UserError(f'the processes of torchrun do not find one another: {error}') from error
    here, local = int(os.environ['LOCAL_WORLD_SIZE']), int(os.environ['LOCAL_RANK'])
    with together():
        if cuda and here > torch.cuda.device_count():
            raise UserError(f'{here} processes need as many GPUs, there are {torch.cuda.device_count()}: '
                            'set --nproc_per_node, or --device=cpu')
    if cuda:
        torch.cuda.set_device(local)
        return 'cuda'
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    return 'cpu'


def disconnect():
    """The counterpart of connect. A rank that crashed ends at once, since the others wait for it."""
    if several() and isinstance(sys.exc_info()[1], (UserError, type(None))):
        dist.destroy_process_group()


def gather(thing):
    """The things of all ranks, a list in their order. Every rank waits here for all others."""
    if not several():
        return [thing]
    things = [None] * world()
    dist.all_gather_object(things, thing)
    return things


@contextlib.contextmanager
def together():
    """with together(): a UserError of one rank is raised on all; none goes on before all are through."""
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
    flag = torch.tensor(int(flag))                                  # on the CPU, wherever the network is
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def total(count):
    """The sum of a tensor over all ranks."""
    if several():
        count = count.clone()
        dist.all_reduce(count)
    return count


def rows_of_rank(rows):
    """The rows of this rank, of a batch (B, T): every world()-th of them, B being a multiple of world()."""
    return rows[rank()::world()] if several() else rows


def share(num):
    """How many of the first num rows of a batch are among those of rows_of_rank."""
    return len(range(rank(), num, world()))


class Losses(torch.nn.Module):
    """A network and all losses of a batch as one forward pass: what DistributedDataParallel can follow."""

    def __init__(self, model, losses):
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, *batch):
        """What losses(model, *batch) yields, [(a loss, its parts)], together: (the sum, the parts)."""
        found = list(self.losses(self.model, *batch))
        return sum(total for total, _ in found), reduce(added, (parts for _, parts in found), {})


def data_parallel(model, losses):
    """
    losses(model, *batch) by DistributedDataParallel: backward makes every gradient its mean over the ranks.

    Returns None for a single process. What no rank uses gets no gradient; this depends on the batch; where
    there is nothing of the kind PyTorch warns once. All ranks start with the weights of rank 0.
    """
    if not several():
        return None
    if model._compiled_call_impl is not None:                       # the network is compiled in one piece
        torch._dynamo.config.optimize_ddp = False
    wrapped = Losses(model, losses)
    split = [name for name, p in wrapped.named_parameters() if sharded(p)]    # FSDP averages them
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapped, split)
    warnings.filterwarnings('ignore', message='.*broadcast_buffers')
    return torch.nn.parallel.DistributedDataParallel(wrapped, broadcast_buffers=False,
                                                     find_unused_parameters=True)


def averaging(network, last):
    """A context for a pass of data_parallel: the ranks exchange gradients after the last one of a step."""
    return contextlib.nullcontext() if network is None or last else network.no_sync()


def sum_parts(parts, names):
    """The parts of the loss {name: (2,)} summed over the ranks; names: all that a rank may have."""
    if not several():
        return parts
    zero = torch.zeros_like(next(iter(parts.values())))
    return dict(zip(names, total(torch.stack([parts.get(name, zero).float() for name in names]))))


# -----------------------------------------------------------------------------
# a network too large for one device (FSDP)


def shard(model, device):
    """
    Splits the matrices of the blocks over the ranks: from here on they are DTensors, and so are their
    gradients.

    Every rank has the rest whole, for the most part the embedding, because training uses that outside of
    GPT.forward, where no hook of FSDP sees it. Every rank has to go through the network equally often: a pass
    of one waits for all the others. In bfloat16 the gradients of a stack that is applied several times are
    summed in that dtype, without fsdp in float32.
    """
    if sharded(model):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    rest = {p for name, p in model.named_parameters() if not name.startswith('blocks.') or p.ndim != 2}
    policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world(),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=rest)
    model.to(device)


def sharded(thing):
    """Whether a network or a tensor is split over the ranks."""
    return hasattr(thing, 'unshard') or hasattr(thing, 'full_tensor')    # to import DTensor takes a second


def local(tensors):
    """What this rank has of each of the tensors, a list."""
    return [t.to_local() if sharded(t) else t for t in tensors]


def full(tensor):
    """A tensor put together from what the ranks have of it, on every rank."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def like(value, own):
    """A tensor, or a state dict, with only the part of this rank of what is split in its counterpart own."""
    if isinstance(value, dict):
        return {name: like(one, own[name] if isinstance(own, (dict, list)) else own)
                for name, one in value.items()}
    if not sharded(own) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def whole(thing):
    """The counterpart of like, also for lists: whole tensors on the CPU of rank 0, and None elsewhere."""
    if isinstance(thing, dict):
        return {name: whole(one) for name, one in thing.items()}
    if isinstance(thing, list):
        return [whole(one) for one in thing]
    if not sharded(thing):
        return thing
    tensor = thing.full_tensor()
    return None if rank() else tensor.cpu()


def whole_model(model):
    """The network for rank 0 to go through alone: if it is split a copy, and None on the other ranks."""
    if not sharded(model):
        return model
    weights = whole(model.state_dict())
    if rank():
        return None
    with torch.random.fork_rng(devices=[]):
        copy = type(model).__bases__[-1](model.config)              # the first is that of fully_shard
    copy.load_state_dict(weights)
    copy.compute_dtype, copy.plain_attention = model.compute_dtype, model.plain_attention
    return copy.to(model.wte.weight.device)


def norms(grads):
    """The norms of gradients, (n,); for one that is split the norm of the whole."""
    norms, split = torch.stack(torch._foreach_norm(local(grads))), [sharded(grad) for grad in grads]
    if not any(split):
        return norms
    split = torch.tensor(split, device=norms.device)
    return torch.where(split, total(norms ** 2 * split).sqrt(), norms)


def grad_norm(params):
    """The norm of the gradients of params together, the same on every rank."""
    grads = [p.grad for p in params if p.grad is not None]
    if not any(sharded(grad) for grad in grads):
        return torch.nn.utils.get_total_norm(grads)
    return norms(grads).norm()


def clip_gradients(params, most):
    """torch.nn.utils.clip_grad_norm_, which does not take whole and split gradients together."""
    if not any(sharded(p) for p in params):
        torch.nn.utils.clip_grad_norm_(params, most)
    else:
        grads = local(p.grad for p in params if p.grad is not None)
        torch._foreach_mul_(grads, (most / (grad_norm(params) + 1e-6)).clamp(max=1))
