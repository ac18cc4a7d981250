"""
The scripts lie in the root of the repository and import one another from there; what several tests share.
"""

import contextlib
import functools
import importlib.util
import io
import os
import runpy
import signal
import sys

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')              # the workers share the cores

# the tests are of small networks, for which a CPU is faster
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')

import pytest  # noqa: E402
import torch  # noqa: E402

torch.backends.mps.is_available = functools.lru_cache(lambda: False)    # as PyTorch has it

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import configurator  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plumbing.checkpoint import model_args  # noqa: E402

# what data/arithmetic/prepare.py writes, without the token counts
ARITHMETIC = dict(
    name='arithmetic',
    format='rows',
    block_size=64,
    vocab_size=18,
    tokenizer='char',
    itos=[*'0123456789()+*=', '<bos>', '<eos>', '<pad>'],
    bos=15,
    eos=16,
    pad=17,
)


def seeded(seed=0):
    """A generator of random numbers with this seed."""
    return torch.Generator().manual_seed(seed)


def fresh_gpt(V=3, T=4, seed=0, **more):
    """A small network as training begins with it."""
    torch.manual_seed(seed)
    sizes = dict(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=16, n_recur=2)
    return GPT(GPTConfig(**{**sizes, **more}))


def tiny_gpt(V=3, T=4, seed=0, scale=3.0, **more):
    """
    A small random network in eval mode, far from uniform, that uses all of its parts; a fresh one does not.
    """
    model = fresh_gpt(V, T, seed, **more)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=scale * 0.1)
    return model.eval()


def all_sequences(V, T):
    """Every sequence of T tokens out of V: (V^T, T)."""
    return torch.cartesian_prod(*[torch.arange(V)] * T).view(-1, T)


def chi_square(counts, expected):
    """
    (the statistic, a bound which it passes by chance once in 100,000 times), small cells pooled into one.

    The bound is Wilson and Hilferty's approximation of the chi-square quantile; 4.265 is the normal one.
    """
    counts = torch.as_tensor(counts).double().flatten()
    expected = torch.as_tensor(expected).double().flatten()
    assert abs(counts.sum() - expected.sum()) < 1e-6 * expected.sum()
    assert counts[expected < 1e-9].sum() == 0  # what is impossible never happens
    small = expected < 8
    if small.any():
        counts = torch.cat((counts[~small], counts[small].sum()[None]))
        expected = torch.cat((expected[~small], expected[small].sum()[None]))
    counts, expected = counts[expected > 1e-9], expected[expected > 1e-9]
    df = len(expected) - 1
    bound = df * (1 - 2 / (9 * df) + 4.265 * (2 / (9 * df)) ** 0.5) ** 3
    return ((counts - expected) ** 2 / expected).sum().item(), bound


def load_script(name):
    """A script as a fresh module, so that a test may change its settings."""
    path = os.path.join(ROOT, f'{name}.py')
    spec = importlib.util.spec_from_file_location(f'{os.path.basename(name)}_under_test', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_main(name, *words):
    """The main() of a script, in this process, with words of a command line: what it prints."""
    script = load_script(name)
    configurator.configure(vars(script), words)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        script.main()
    return printed.getvalue()


read_settings = configurator.settings


@functools.lru_cache(maxsize=None)
def settings_as_of(path, changed):
    return read_settings(path)


def cached_settings(path):
    """configurator.settings, but a file is read once for all tests, until it changes."""
    return dict(settings_as_of(path, os.stat(path).st_mtime_ns))


configurator.settings = cached_settings


# where most tests start: a plain joint run, without the causal half and the draft head of train.py's defaults
START = dict(
    causal_ratio=0.0,
    remask_target='wrong',
    draft_head=False,
    max_iters=2000,
    proofreading_warmup_iters=500,
    masking_warmup_iters=500,
)
START_WORDS = [f'--{name}={value}' for name, value in START.items()]


def default_config(**changes):
    """The settings of train.py, those of START, and changes, as a checkpoint keeps them."""
    known = cached_settings(os.path.join(ROOT, 'train.py'))
    assert set(changes) <= set(known)
    return {**{name: setting.default for name, setting in known.items()}, **START, **changes}


def write_checkpoint(path, model=None, meta=ARITHMETIC, **config):
    """A checkpoint of an untrained network, as train.py would have written it; returns its path as text."""
    model = model or tiny_gpt(meta['vocab_size'], config.get('block_size', 64), n_recur=1)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    torch.save(
        dict(
            model=model.state_dict(),
            ema=None,
            iter_num=7,
            model_args=model_args(model.config),
            config=default_config(**config),
            meta=meta,
        ),
        path,
    )
    return str(path)


@pytest.fixture(autouse=True)
def tidy(monkeypatch):
    """
    A test leaves no signal handler behind, and finds no matplotlib: curves would take longer than all the
    rest.
    """
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(monkeypatch, capsys):
    """run('train', '--max_iters=3', ...) as from the command line: (exit status, stdout, stderr)."""

    def run(script, *words, root=ROOT):
        folder = os.path.join(root, 'tools' if script in ('energy', 'distill', 'film') else '')
        path = script if script.endswith('.py') else os.path.join(folder, f'{script}.py')
        monkeypatch.setattr(sys, 'argv', [path, *map(str, words)])
        capsys.readouterr()
        try:
            runpy.run_path(path, run_name='__main__')
            status = 0
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run
