"""
What to compute on, in which dtype, by which attention: all choices by device and shape, by what was measured (docs/log.md).
"""

import ctypes

import torch

from configurator import UserError


def keep_memory():
    """
    Asks glibc to keep freed memory instead of handing every large block back to the kernel.

    A CPU step allocates the same megabytes again and again; without this each one is mapped and zeroed anew, page by
    page. Does nothing where there is no glibc.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 25)        # M_MMAP_THRESHOLD: only blocks over 32 MiB get a mapping of their own
        libc.mallopt(-1, 2 ** 31 - 1)    # M_TRIM_THRESHOLD: keep the top of the heap
    except (OSError, AttributeError, TypeError):
        pass


def bf16_is_fast(kind):
    """
    Whether the device multiplies matrices faster in bfloat16 than in float32: kind is cpu, cuda or mps.

    A CPU does by AMX (Intel since 2023) or AVX-512 BF16 (AMD since 2022): a step is up to twice as fast. A GPU that only
    emulates it (before Ampere) is slower.
    """
    if kind == 'cpu':
        return any(getattr(torch.cpu, f'_is_{unit}_supported', lambda: False)() for unit in ('amx_tile', 'avx512_bf16'))
    return kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)


def configure_compute(model, device, dtype='auto', attention='auto', compile=False):
    """
    Moves the model to the device and chooses dtype and attention; 'auto' follows what was measured (docs/log.md).

    Returns (model, a line that says what was chosen and why). Raises UserError for a device or dtype that is not there.
    """
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    kind = place and place.type
    if kind not in ('cpu', 'cuda', 'mps'):
        raise UserError(f"device expects auto, cpu, cuda, cuda:N or mps, got '{device}'")
    if (kind == 'cuda' and not torch.cuda.is_available()) or (kind == 'mps' and not torch.backends.mps.is_available()):
        raise UserError(f'this PyTorch sees no {kind} device; use --device=cpu')
    if kind == 'cuda' and place.index is not None:
        if place.index >= torch.cuda.device_count():
            raise UserError(f'there is no {device}: this PyTorch sees {torch.cuda.device_count()} GPUs, the first is cuda:0')
        torch.cuda.set_device(place)                                 # its random numbers are the ones that are saved
    dtypes = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
    if dtype not in ('auto', *dtypes):
        raise UserError(f"dtype expects auto, float32 or bfloat16, got '{dtype}'")
    if attention not in ('auto', 'plain', 'sdpa'):
        raise UserError(f"attention expects auto, plain or sdpa, got '{attention}'")
    why = ''
    if dtype == 'auto':
        dtype, why = ('bfloat16', ' (fast here)') if bf16_is_fast(kind) else ('float32', ' (no fast bf16 here)')
    if attention == 'auto':
        attention = 'plain' if kind == 'cpu' and model.config.block_size <= 512 else 'sdpa'
    model.to(device)
    model.compute_dtype = dtypes[dtype]
    model.plain_attention = attention == 'plain'
    model.most_logits = 2 ** 23 if kind == 'cpu' else 2 ** 27         # at a time, in training: of a CPU what keep_memory keeps
    if kind == 'cpu':
        keep_memory()
    if kind == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
    if compile:
        model.compile()   # in place: parameter names stay what they are
    threads = f', {torch.get_num_threads()} threads' if kind == 'cpu' else ''
    return model, f'{device}{threads}, {dtype}{why}, {attention} attention{", compiled" if compile else ""}'
