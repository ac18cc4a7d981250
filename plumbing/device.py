"""What to compute on, in which dtype, by which attention: by device and shape, as measured (docs/log.md)."""

import ctypes

import torch

from configurator import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}


def keep_memory():
    """
    Asks glibc, if it is there, to keep freed memory instead of handing large blocks back to the kernel.

    A CPU step allocates the same megabytes again and again; else each one is mapped and zeroed anew.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD: only blocks over 32 MiB get a mapping of their own
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: keep the top of the heap
    except (OSError, AttributeError, TypeError):  # there is none
        pass


def bf16_is_fast(kind):
    """
    Whether a device of this kind (cpu, cuda, mps) multiplies matrices faster in bfloat16 than in float32.

    CPUs do by AMX (Intel since 2023) or AVX-512 BF16 (AMD since 2022), by up to a factor of 2. GPUs that only
    emulate it (before Ampere) are slower.
    """
    if kind == 'cpu':
        units = ('_is_amx_tile_supported', '_is_avx512_bf16_supported')
        return any(getattr(torch.cpu, unit, lambda: False)() for unit in units)
    return kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)


def find_device(device):
    """A device, 'auto' for the best there is, and its kind. Raises UserError if it is not there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if device == 'auto':
        device = next(kind for kind, present in there.items() if present)
    try:
        place = torch.device(device)
        present = there[place.type]
    except (RuntimeError, KeyError):
        raise UserError(f"device expects auto, cpu, cuda, cuda:N or mps, got '{device}'") from None
    if not present:
        raise UserError(f'this PyTorch sees no {place.type} device; use --device=cpu')
    if place.type == 'cuda' and place.index is not None:
        if (count := torch.cuda.device_count()) <= place.index:
            raise UserError(f'there is no {device}: this PyTorch sees {count} GPUs, the first is cuda:0')
        torch.cuda.set_device(place)  # its random numbers are the ones that are saved
    return device, place.type


def configure_compute(model, device, dtype='auto', attention='auto', compile=False):
    """Moves the model to a device -> (model, a line that says what was chosen). Raises UserError."""
    device, kind = find_device(device)
    if dtype not in ('auto', *DTYPES):
        raise UserError(f"dtype expects auto, float32 or bfloat16, got '{dtype}'")
    if attention not in ('auto', 'plain', 'sdpa'):
        raise UserError(f"attention expects auto, plain or sdpa, got '{attention}'")
    why = ''
    if dtype == 'auto':
        fast = bf16_is_fast(kind)
        dtype, why = ('bfloat16', ' (fast here)') if fast else ('float32', ' (no fast bf16 here)')
    if attention == 'auto':
        attention = 'plain' if kind == 'cpu' and model.config.block_size <= 512 else 'sdpa'

    model.to(device)
    model.compute_dtype = DTYPES[dtype]
    model.plain_attention = attention == 'plain'
    # at a time, in training: on a CPU what keep_memory keeps
    model.most_logits = 2 ** 23 if kind == 'cpu' else 2 ** 27
    words = [str(device), f'{dtype}{why}', f'{attention} attention']
    if kind == 'cpu':
        keep_memory()
        words.insert(1, f'{torch.get_num_threads()} threads')
    elif kind == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
    if compile:
        compile_passes(model)
        words.append('compiled')
    return model, ', '.join(words)


def compile_passes(model):
    """
    torch.compile for a network, in place: parameter names stay what they are. Passes with a cache stay eager.

    Each of those has another shape, so compiling them takes longer than all that it could save.
    """
    model.compile()
    compiled = model._compiled_call_impl

    def call(*args, cache=None, **more):
        if cache is None:
            return compiled(*args, **more)
        return model._call_impl(*args, cache=cache, **more)

    model._compiled_call_impl = call


def freeze(model):
    """
    Casts the matrices of a network that learns no more to the dtype it computes in; returns the network.

    It changes no result and spares a tenth to a fifth of sampling time. Choose device and dtype before.
    """
    for module in filter(None, (model.blocks, model.drafter)):
        for weight in module.parameters():
            weight.data = weight.data.to(model.compute_dtype)
    model.head = model.wte.weight.detach().to(model.compute_dtype)      # embeddings are added up in float32
    return model
