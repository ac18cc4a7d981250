"""
How fast is it, and what would a plain script take? What is compared takes turns, so that a noisy machine is noisy to all of them.

sampling  samples/s: ours, the plain ancestral sampler (one token a pass, every logit of every row), and left to right with a
          key/value cache, in a loop of its own and in ours. Network, dtype and attention are the same; all end with the text
training  tokens/s of a whole step: the same network as nanoGPT runs it (float32, eager, fused attention kernel, one AdamW that
          loops over the tensors, every logit), ours with the same task, and ours as in config/remask_all.py, with one feature
          less each; with --compile=True also ours with the same task compiled
peak      FLOP/s of a bare matrix product of these shapes, best of many: what mfu is a share of, in all rows of a shape
startup   until --help is printed, until the first training step is made, and the heavy imports that this takes
growth    time and peak memory of a step of config/remask_all.py for longer rows, more of them, more words, more layers
head      the loss with logits where they count, against logits everywhere, from the same hidden states
compile   eager against torch.compile, only if --only=compile asks for it

--only=training,head takes some of the tables, --steps is how often each thing is timed at most: after SECONDS a comparison ends
with the round that it is in. A time is a median, with the quartiles behind it. keep_memory (device.py) works for the whole
process, so it speeds up the baselines as well, and the ratios are rather too low. Sizes are the constants below.
"""

import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import configurator
from plumbing import optim
import train
from plumbing.text import decode, start_canvas
from plumbing.checkpoint import find_checkpoint
from plumbing.checks import parse_mixture
from configurator import UserError
from corruption import CORRUPTIONS, Task, ask, modelled
from data.loader import load_data
from plumbing.device import configure_compute
from plumbing.files import atomically, make_folder
from plumbing.run import is_finite
from model import GPT, GPTConfig, places, room_for
from rules import best_rules, close_rows, draw, filtered, supports
from sample import generate
from suites.common import load, markdown, wanted
from suites.runs import ROOT

# -----------------------------------------------------------------------------
# what is measured

SECONDS = 30                 # a comparison makes no new round after that, but at least ROUNDS
ROUNDS = 3
SMALL = dict(n_layer=4, n_embd=128, n_head=4, n_recur=1)
SHAPES = (                   # training, peak
    dict(SMALL, block_size=64, batch_size=12, vocab_size=65),
    dict(SMALL, block_size=64, batch_size=64, vocab_size=65),
    dict(n_layer=6, n_embd=384, n_head=6, n_recur=1, block_size=256, batch_size=16, vocab_size=65),
    dict(SMALL, block_size=256, batch_size=8, vocab_size=50257),
)
PLAIN = dict(training_type='unmasking', causal_ratio=0.0, draft_head=False)
ALL = 'ours, remask_all'
VARIANTS = {                 # what is changed in config/remask_all.py
    'ours, unmasking': PLAIN,
    'ours, unmasking, AdamW, no EMA': dict(PLAIN, optimizer='adamw', ema_decay=0.0),       # the very task of the baseline
    ALL: {},
    'without own corruption (random)': dict(corruption='random'),
    'without causal share, draft head': dict(causal_ratio=0.0, draft_head=False),
    'without draft head': dict(draft_head=False),
    'without EMA': dict(ema_decay=0.0),
    'without Muon (AdamW)': dict(optimizer='adamw'),
}
BATCHES = (1, 256)           # sampling; of a large vocabulary fewer, so that all their logits are at most MOST_LOGITS
MOST_LOGITS = 2 ** 26
COMMANDS = {                 # startup: arguments, and the line that is waited for; None: the end
    'sample.py --help': (['sample.py', '--help'], None),
    'train.py --help': (['train.py', '--help'], None),
    'train.py, first step': (['train.py', 'config/remask_all.py', '--max_iters=1', '--log_interval=1', '--eval_rows=1',
                              '--eval_samples=0'], 'step 1/1 '),
}
HEAVY = ('torch', 'numpy', 'torch._dynamo', 'matplotlib', 'datasets', 'tiktoken')
CENTRE = dict(SMALL, block_size=64, batch_size=8, vocab_size=65)                           # growth: where all axes meet
GROWTH = dict(block_size=(64, 128, 256, 512, 1024), batch_size=(8, 32, 128), vocab_size=(65, 1024, 8192, 50257),
              n_layer=(2, 4, 8, 12))
TINY = dict(n_layer=1, n_embd=16, n_head=1, n_recur=1, block_size=8, batch_size=4, vocab_size=8)
HEAD = SHAPES[3]
COMPILE = SHAPES[1]


def recipe(**changes):
    """The settings of config/remask_all.py, a dict, with changes; vocab_size may be one of them."""
    known = configurator.settings(os.path.join(ROOT, 'train.py'))
    values = {name: setting.default for name, setting in known.items()}
    configurator.apply_file(os.path.join(ROOT, 'config', 'remask_all.py'), values, known)
    return {**values, **changes}


def label(config):
    """The sizes of a config, as text."""
    return (f"{config['n_layer']}x{config['n_embd']}, T={config['block_size']}, batch {config['batch_size']}, "
            f"vocabulary {config['vocab_size']:,}")

# -----------------------------------------------------------------------------
# the clock


def wait():
    """Until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def alternate(steps, most):
    """Times the functions {name: function} in turn, in at most `most` rounds, after one that is not timed: {name: [seconds]}."""
    times, end = {name: [] for name in steps}, None
    for number in range(-1, most):
        if number >= ROUNDS and time.perf_counter() > end:
            break
        for name, step in steps.items():
            wait()
            t0 = time.perf_counter()
            step()
            wait()
            if number >= 0:
                times[name].append(time.perf_counter() - t0)
        end = end or time.perf_counter() + SECONDS
    return times


def spread(times):
    """dict(seconds, the median; low and high, the quartiles; n) of a list of seconds."""
    low, _, high = statistics.quantiles(times, n=4, method='inclusive') if len(times) > 1 else times * 3
    return dict(seconds=statistics.median(times), low=low, high=high, n=len(times))


def compare(table, shape, steps, most):
    """One row for each of the functions {name: function}, which take turns."""
    return [dict(table=table, shape=shape, name=name, **spread(times)) for name, times in alternate(steps, most).items()]


def with_ratios(rows, base):
    """Adds ratio to the rows of one comparison: how many times as fast as the row called base; None without such a row."""
    seconds = [row['seconds'] for row in rows if row['name'] == base]
    for row in rows:
        row['ratio'] = seconds[0] / row['seconds'] if seconds else None
    return rows


def ms(row):
    """A row's time as text, in milliseconds."""
    return f"{1e3 * row['seconds']:.4g} ({1e3 * row['low']:.4g}–{1e3 * row['high']:.4g})"


def times_as_fast(row):
    """A row's ratio as text."""
    return '' if row['ratio'] is None else f"{row['ratio']:.2f}x"

# -----------------------------------------------------------------------------
# training


def network(s, config, dtype=None, attention=None, compile=False):
    """A fresh network of a config, ready to compute; the same weights at every call. dtype, attention: None as in s."""
    torch.manual_seed(s.seed)
    model = GPT(GPTConfig(**{field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}))
    return configure_compute(model, s.device, dtype or s.dtype, attention or s.attention, compile)[0].train()


def random_batch(s, model, config):
    """Random ids x0 (B, T), what there is to know about them, and a generator for their corruption."""
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(s.seed)
    x0 = torch.randint(config['vocab_size'], (config['batch_size'], config['block_size']), generator=generator, device=device)
    return x0, dict(bos=None, eos=None, pad=None), generator


def our_step(s, config, compile=False):
    """
    A step of train.py, ready to be called: forward and backward, clipping, the optimisers, the average of the weights.

    step(at) makes it at that step of the curricula, without at behind all of them. The rates are tiny: random ids teach nothing,
    and a step that is not finite would be left out.
    """
    model = network(s, config, compile=compile)
    ema = copy.deepcopy(model) if config['ema_decay'] else None
    optimizers = optim.make_optimizers(model, config['optimizer'], 1e-5, 1e-5, 0.0, (config['beta1'], config['beta2']))
    rates = dict(config, muon_lr=1e-5, learning_rate=1e-5)
    x0, meta, generator = random_batch(s, model, config)

    def step(at=config['max_iters']):
        parts = train.training_step(model, x0, meta, config, at, generator)
        if not is_finite(model, parts):
            raise UserError(f'the loss of {label(config)} is not finite; try --dtype=float32')
        optim.update(model, optimizers, rates, scale=1.0)
        if ema:
            optim.average(ema, model, config['ema_decay'])
        model.zero_grad(set_to_none=True)
    return step


def baseline_loss(model, input, target, weight, hidden=None):
    """The NELBO loss the plain way: logits at all positions, cross-entropy at all of them, and then the weights. (B, T) each."""
    hidden = model(input) if hidden is None else hidden                        # (B, T, C)
    words = model.wte.weight[:model.config.vocab_size].to(hidden.dtype)
    logits = F.linear(hidden.flatten(0, 1), words).float()                     # (B*T, V)
    ce = F.cross_entropy(logits, target.flatten(), reduction='none')
    return (weight.flatten() * ce).sum() / len(input)


def masked_batch(model, x0, meta, generator):
    """(input, target, weight), (B, T) each, of plain unmasking."""
    tokens = model.mask_token_id, model.wrong_token_id, meta['pad']
    return ask(x0, *modelled(x0, meta), Task(training_type='unmasking'), tokens, generator)


def baseline_step(s, config):
    """A step of plain unmasking as nanoGPT would make it on a CPU, ready to be called."""
    model = network(s, config, 'float32', 'sdpa')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), foreach=False, fused=False)
    batch = random_batch(s, model, config)

    def step():
        baseline_loss(model, *masked_batch(model, *batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def step_flops(config):
    """
    Model FLOPs of a step: what its products cost if nothing is computed in vain, however it is done.

    A token that passes through the network takes 2 N forward, N = 12 L C^2 being the weights of its matrices, and 4 L T C for the
    products of attention; a logit 2 C. Backward costs twice the forward pass: 6 N + 12 L T C a token, 6 (V+2) C a position with
    loss. These are all positions of the causal rows, of those with wrong tokens too, and half of the others (k is uniform on
    1..T); in the bidirectional pass 9 C^2 of the last block's weights, those behind its attention, see no more positions either.
    Passes without gradient (own guesses, at a quarter of the positions) count a third of it. The draft head makes 6 steps from
    256 places; of its logits only the state gets a gradient.
    """
    L, C = config['n_layer'] * config['n_recur'], config['n_embd']
    T, B, row = config['block_size'], config['batch_size'], (config['vocab_size'] + 2) * config['n_embd']
    token = 12 * L * C * C + 2 * L * T * C                                     # half of the forward FLOPs
    causal = B if config['training_type'] == 'causal' else round(B * config['causal_ratio'])
    others = B * config['views'] if config['views'] else B - causal
    proofread = round(others * config['remask_ratio']) if config['training_type'] == 'joint' else 0
    learned, behind = proofread * T + (others - proofread) * (T + 1) / 2, 9 * C * C     # positions with loss; weights
    mixture = dict(parse_mixture('corruption', config['corruption'], CORRUPTIONS))
    guesses = proofread * mixture.get('own', 0) / sum(mixture.values())        # rows
    drafts = 6 * 256 if config['draft_head'] and causal else 0
    return (6 * (causal * T * (token + row) + others * T * (token - behind) + learned * (row + behind))
            + 2 * guesses * (T * (token - behind) + (T + 3) / 4 * (row + behind)) + drafts * (6 * 3 * C * C + 4 * row))


def peak_flops(s, shape, least=0.3):
    """FLOP/s of (B*T, C) x (C, 4C), the best of many calls, in the dtype in use: the machine, measured."""
    model = network(s, recipe(**CENTRE))                                       # only to see which dtype and device it gets
    dtype, device = model.compute_dtype, model.wte.weight.device
    rows, C = shape['batch_size'] * shape['block_size'], shape['n_embd']
    x, w = torch.randn(rows, C, device=device).to(dtype), torch.randn(4 * C, C, device=device).to(dtype)
    best, end = float('inf'), time.perf_counter() + least
    with torch.no_grad():
        while time.perf_counter() < end or best == float('inf'):
            wait()
            t0 = time.perf_counter()
            for _ in range(4):                                                 # so that a GPU's launches overlap
                F.linear(x, w)
            wait()
            best = min(best, (time.perf_counter() - t0) / 4)
    return 2 * rows * C * 4 * C / best, str(dtype).removeprefix('torch.')


def training(s):
    """Rows and text: the baseline, ours, and what each feature costs, for every shape."""
    rows, lines = [], []
    for shape in SHAPES:
        configs = {name: recipe(**shape, **changes) for name, changes in VARIANTS.items()}
        steps = {'baseline': baseline_step(s, configs['ours, unmasking'])}
        steps.update((name, our_step(s, config)) for name, config in configs.items())
        if s.compile:                                                          # the others, with two modes, would take minutes
            torch.compiler.reset()                                             # it gives up on a function after eight networks
            for name in [name for name in configs if 'unmasking' in name]:
                steps[name + ', compiled'] = step = our_step(s, configs[name], compile=True)
                configs[name + ', compiled'] = configs[name]
                step()                                                         # the next call may compile again
        found = with_ratios(compare('training', label(shape), steps, s.steps), 'baseline')
        most, _ = peak_flops(s, shape)
        everything = next(row['seconds'] for row in found if row['name'] == ALL)
        for row in found:
            flops = step_flops(configs.get(row['name'], configs['ours, unmasking']))
            row.update(tokens_per_second=shape['batch_size'] * shape['block_size'] / row['seconds'], flops=flops,
                       mfu=flops / row['seconds'] / most,
                       costs=1 - row['seconds'] / everything if row['name'].startswith('without') else None)
            lines.append([row['shape'], row['name'], f"{row['tokens_per_second']:,.0f}", ms(row), times_as_fast(row),
                          '' if row['costs'] is None else f"{row['costs']:.0%}", f'{flops / 1e9:.3g}', f"{row['mfu']:.1%}"])
        rows += found
    head = ['shape', 'step', 'tokens/s', 'ms (quartiles)', 'against baseline', 'costs, of remask_all', 'model GFLOP', 'mfu']
    return rows, markdown(head, lines)


def peak(s):
    """Rows and text: the peak of every shape."""
    rows = []
    for shape in SHAPES:
        flops, dtype = peak_flops(s, shape)
        rows.append(dict(table='peak', shape=label(shape), name=dtype, flops_per_second=flops))
    lines = [[row['shape'], row['name'], f"{row['flops_per_second'] / 1e12:.3g}"] for row in rows]
    return rows, markdown(['shape', 'dtype', 'peak TFLOP/s'], lines)

# -----------------------------------------------------------------------------
# sampling


@torch.no_grad()
def plain_ancestral(model, canvas, generator):
    """canvas (B, T), equally many masks a row -> whole ids (B, T): a token a pass, at a random place; every logit of all rows."""
    x, row = canvas.clone(), torch.arange(len(canvas), device=canvas.device)
    for _ in range(int((x == model.mask_token_id).sum(1).max())):
        ids = draw(model.logits(model(x), real_only=True).softmax(-1), generator)            # (B, T)
        noise = torch.rand(x.shape, generator=generator, device=x.device)
        at = noise.masked_fill(x != model.mask_token_id, -1).argmax(1)         # (B,)
        x[row, at] = ids[row, at]
    return x


@torch.no_grad()
def cached_ar(model, canvas, generator, end_id=None, pad_id=None, **filters):
    """
    canvas (B, T), whose masks are the same suffix of all rows -> whole ids (B, T), written left to right with a key/value cache.

    What generate_diffusion does with draft='causal': rows leave the batch at their end token, here a quarter of it at a time.
    filters: temperature, top_k, top_p.
    """
    x, start = canvas.clone(), canvas == model.mask_token_id
    rows = torch.arange(len(x), device=x.device)
    going = rows >= 0                                                          # (R,) rows without an end token
    cache = model.empty_cache(len(x))
    for position in range(x.size(1)):
        cache = room_for(cache, position + 1)
        hidden = model(x[rows], causal=True, cache=cache, at=torch.full_like(rows[:, None], position))       # (R, 1, C)
        if start[0, position]:
            x[rows, position] = draw(filtered(model.logits(hidden[:, 0], real_only=True), **filters), generator)
        going = going & (x[rows, position] != (-1 if end_id is None else end_id))
        left = int(going.sum())
        if left <= 0.75 * len(rows):                                           # not for every row: that moves the whole cache
            rows, cache, going = rows[going], cache.index_select(2, going.nonzero()[:, 0]), going[going]
        if not left:
            break
    return close_rows(x, start, model.mask_token_id, end_id, pad_id)


def sampling_network(s):
    """(model, meta, config, what it is) of the checkpoint of init_from; if there is none, of a fresh network."""
    try:
        path = find_checkpoint(s.init_from, s.out_dir)
    except UserError:
        config = recipe()
        meta, _ = load_data(config['dataset'])
        fresh = network(s, {**config, 'vocab_size': meta['vocab_size']}).eval().freeze()
        return fresh, meta, config, 'a fresh network of remask_all'
    model, checkpoint = load(s, path, s.merge_from)
    return model.eval(), checkpoint['meta'], checkpoint['config'], path


def samplers(model, meta, config, num):
    """{name: function of a seed that draws num samples}: those that a checkpoint of this config supports."""
    writes, causal, _ = supports(config)
    device = model.wte.weight.device
    canvas = start_canvas(model, meta, num)[0].to(device)
    best = best_rules(config)

    def ours(**rules):
        return lambda seed: generate(model, meta, num, batch_size=num, seed=seed, **rules)

    def plainly(sampler, **more):
        def sample(seed):
            x = sampler(model, canvas, torch.Generator(device).manual_seed(seed), **more)
            return [decode(meta, ids) for ids in x.tolist()]
        return sample

    found = {}
    if writes:
        found['plain ancestral'] = plainly(plain_ancestral)
        found['ours, ancestral'] = ours(commit='random', remask='none')
    found[f"ours, default (remask={best['remask']})"] = ours(**best)
    if causal and not model.config.graph_window:                               # a graph cannot use a cache
        found['AR, cached'] = plainly(cached_ar, end_id=meta['eos'], pad_id=meta['pad'])
    if causal:
        found['ours, AR'] = ours(ar_prefix=model.config.block_size)
    return found


def sampling(s):
    """Rows and text: the samplers of one checkpoint, for every batch."""
    model, meta, config, what = sampling_network(s)
    rows = []
    canvas = model.config.block_size * model.config.vocab_size
    for num in dict.fromkeys(min(num, max(1, MOST_LOGITS // canvas)) for num in BATCHES):
        steps = {name: lambda sample=sample, seeds=itertools.count(s.seed): sample(next(seeds))
                 for name, sample in samplers(model, meta, config, num).items()}
        found = with_ratios(compare('sampling', f'batch {num}', steps, s.steps), 'plain ancestral')
        cached = [row['seconds'] for row in found if row['name'] == 'AR, cached']
        for row in found:
            row.update(checkpoint=what, samples_per_second=num / row['seconds'],
                       against_cached_ar=cached[0] / row['seconds'] if cached else None)
        rows += found
    lines = [[row['shape'], row['name'], f"{row['samples_per_second']:.4g}", ms(row), times_as_fast(row),
              '' if row['against_cached_ar'] is None else f"{row['against_cached_ar']:.2f}x"] for row in rows]
    head = ['samples at a time', 'sampler', 'samples/s', 'ms a batch (quartiles)', 'against plain', 'against cached AR']
    return rows, f'{what}\n{markdown(head, lines)}'

# -----------------------------------------------------------------------------
# start-up


def until(command, mark):
    """
    Runs a Python command: (seconds to its line that begins with mark, None: to its end; what it said until then).

    Raises UserError if it fails.
    """
    t0, seconds, said = time.perf_counter(), None, []
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as child:
        for line in child.stdout:
            if seconds is None:
                said.append(line)
            if mark and line.startswith(mark):
                seconds = time.perf_counter() - t0
    if mark is None:
        seconds = time.perf_counter() - t0
    if child.returncode or seconds is None:
        raise UserError(f"python {' '.join(command)} failed: {' | '.join(said[-3:])}")
    return seconds, ''.join(said)


def imports(text):
    """What python -X importtime says of the modules in HEAVY: {name: seconds with all that they import themselves}."""
    found = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.removeprefix('import time:').split('|')]
        if len(parts) == 3 and parts[2] in HEAVY:
            found[parts[2]] = int(parts[1]) / 1e6
    return found


def startup(s, most=5):
    """Rows and text: how long the commands take to begin, and what they import until then."""
    load_data(recipe()['dataset'])                                             # making it is not what is timed
    times, heavy = {name: [] for name in COMMANDS}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, min(s.steps, most)):                           # the first round is slower: it lists the imports
            for name, (words, mark) in COMMANDS.items():
                command = words + ([f'--out_dir={folder}'] if mark else [])
                seconds, said = until(command if number >= 0 else ['-X', 'importtime', *command], mark)
                if number >= 0:
                    times[name].append(seconds)
                else:
                    heavy[name] = imports(said)
    rows = [dict(table='startup', shape='', name=name, **spread(times[name]), imports=heavy[name]) for name in COMMANDS]
    lines = [[row['name'], ms(row), ', '.join(f'{name} {seconds:.2f}' for name, seconds in row['imports'].items())]
             for row in rows]
    return rows, markdown(['command', 'ms (quartiles)', 'heavy imports, s'], lines)

# -----------------------------------------------------------------------------
# memory, growth, the head


def high_water(device):
    """
    The most memory in bytes that was in use so far: of the GPU if the setting device means one, else of the process.

    On Linux not what getrusage says: a new process takes over its parent's mark.
    """
    if torch.cuda.is_available() and device != 'cpu':
        return torch.cuda.max_memory_allocated()
    if os.path.exists('/proc/self/status'):
        with open('/proc/self/status', encoding='utf-8') as file:
            marks = [int(line.split()[1]) * 1024 for line in file if line.startswith('VmHWM:')]
        if marks:
            return marks[0]
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def peak_memory(s, what, config):
    """The memory in bytes that two steps take at most, in a process of its own. what: training, sparse head or full head."""
    told = dict(what=what, config=config, s={name: getattr(s, name) for name in ('seed', 'device', 'dtype', 'attention')})
    command = [sys.executable, '-m', 'suites.speed']
    child = subprocess.run(command, cwd=ROOT, input=json.dumps(told), text=True, capture_output=True)
    if child.returncode:
        raise UserError(f'{label(config)}, {what}: no memory measured: {child.stderr.strip().splitlines()[-1:]}')
    return int(child.stdout)


def memory_child():
    """The other side of peak_memory."""
    told = json.load(sys.stdin)
    s, what, config = SimpleNamespace(**told['s']), told['what'], told['config']
    make_step(s, what, {**config, **TINY})()                                   # loads what libraries a step needs
    before = high_water(s.device)
    step = make_step(s, what, config)
    step()
    step()
    print(high_water(s.device) - before)


def head_step(s, config, everywhere):
    """The loss of plain unmasking from given hidden states, and backward: logits everywhere, or where there is weight."""
    model = network(s, config)
    x0, meta, generator = random_batch(s, model, config)
    input, target, weight = masked_batch(model, x0, meta, generator)
    hidden = torch.randn(*x0.shape, config['n_embd'], device=x0.device).to(model.compute_dtype).requires_grad_()

    def step():
        if everywhere:
            total = baseline_loss(model, input, target, weight, hidden)
        else:
            at = places(weight > 0)                                            # (N,)
            here = hidden.flatten(0, 1).index_select(0, at)                    # (N, C)
            total = train.loss(model, input, target, weight, at=at, hidden=here)[0] / len(x0)
        total.backward()
        hidden.grad = None
        model.zero_grad(set_to_none=True)
    return step


def make_step(s, what, config):
    """The step that a name stands for, see peak_memory."""
    return our_step(s, config) if what == 'training' else head_step(s, config, what == 'full head')


def head(s):
    """Rows and text: what logits where they are not needed would cost."""
    config = recipe(**HEAD)
    names = ('full head', 'sparse head')
    rows = with_ratios(compare('head', label(HEAD), {name: make_step(s, name, config) for name in names}, s.steps), names[0])
    for row in rows:
        row['memory'] = peak_memory(s, row['name'], config)
    lines = [[row['shape'], row['name'], ms(row), times_as_fast(row), f"{row['memory'] / 2**20:.0f}"] for row in rows]
    return rows, markdown(['shape', 'logits', 'ms (quartiles)', 'against full', 'peak memory, MB'], lines)


def exponent(rows, axis):
    """x in time ~ axis^x, fitted by least squares to the rows of one axis of growth."""
    logs = [torch.tensor([float(row[name]) for row in rows]).log().tolist() for name in (axis, 'seconds')]
    return statistics.linear_regression(*logs).slope if len(rows) > 1 else None


def growth(s):
    """Rows and text: time and memory of a step along every axis, and a plot in out_dir if matplotlib is there."""
    rows, lines = [], []
    for axis, values in GROWTH.items():
        configs = {value: recipe(**{**CENTRE, axis: value}) for value in values}
        found = compare('growth', axis, {value: our_step(s, config) for value, config in configs.items()}, s.steps)
        for row in found:
            value, config = row['name'], configs[row['name']]
            row.update(name=label(config), memory=peak_memory(s, 'training', config), **{axis: value})
        for row in found:
            row['exponent'] = exponent(found, axis)
        power = '' if found[0]['exponent'] is None else f"{found[0]['exponent']:.2f}"
        lines += [[axis, f'{row[axis]:,}', ms(row), f"{row['memory'] / 2**20:.0f}", power] for row in found]
        rows += found
    make_folder(s.out_dir)
    path = os.path.join(s.out_dir, 'speed.png')
    drawn = f'\nplot: {path}' if draw_growth(rows, path) else ''
    table = markdown(['along', 'value', 'ms (quartiles)', 'peak memory, MB', 'time ~ value to the'], lines)
    return rows, f'a step of remask_all, elsewhere {label(CENTRE)}\n{table}{drawn}'


def draw_growth(rows, path):
    """Time and memory along every axis, if matplotlib is there; returns whether it is."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    axes = list(dict.fromkeys(row['shape'] for row in rows))
    figure = Figure(figsize=(3 * len(axes), 5), layout='constrained')
    for number, axis in enumerate(axes, 1):
        points = [row for row in rows if row['shape'] == axis]
        for line, (name, unit, factor) in enumerate((('seconds', 'ms a step', 1e3), ('memory', 'peak memory, MB', 2**-20))):
            panel = figure.add_subplot(2, len(axes), number + line * len(axes), xlabel=axis, ylabel=unit)
            values = [row[axis] for row in points]
            panel.loglog(values, [factor * row[name] for row in points], marker='.')
            panel.set_xticks(values, [f'{value:,}' for value in values])       # plain numbers, and no others between
            panel.yaxis.set_major_formatter('{x:g}')
            panel.yaxis.set_minor_formatter('{x:g}')
            panel.tick_params(which='minor', labelsize='small', bottom=False, labelbottom=False)
            panel.grid(alpha=0.3)
    with atomically(path) as temporary:
        figure.savefig(temporary, format='png', dpi=110)
    return True

# -----------------------------------------------------------------------------
# torch.compile


def through_curricula(step, config, num=6):
    """
    Makes num first steps, from the start of the curricula to their end: (seconds of the first, graphs compiled in it, and later).

    Raises UserError where torch.compile does not work.
    """
    from torch._dynamo.utils import counters
    counters.clear()
    seconds, graphs = [], []
    for number in range(num):
        t0 = time.perf_counter()
        try:
            step(max(config['proofreading_warmup_iters'], config['masking_warmup_iters']) * number // (num - 1))
        except RuntimeError as error:                                          # dynamo's errors are such, and inductor's
            raise UserError(f'torch.compile does not work here (does it find a C++ compiler?): {error}') from error
        wait()
        seconds.append(time.perf_counter() - t0)
        graphs.append(counters['stats']['unique_graphs'])
    return seconds[0], graphs[0], graphs[-1] - graphs[0]


def compiled(s):
    """Rows and text: eager against compiled, how long the first compiled step takes, and what is compiled anew after it."""
    config = recipe(**COMPILE)
    steps = {'eager': our_step(s, config), 'compiled': our_step(s, config, compile=True)}
    found = dict(eager=(None, 0, 0), compiled=through_curricula(steps['compiled'], config))
    rows = with_ratios(compare('compile', label(COMPILE), steps, s.steps), 'eager')
    for row in rows:
        row['first'], row['graphs'], row['anew'] = found[row['name']]
    lines = [[row['shape'], row['name'], '' if row['first'] is None else f"{row['first']:.1f}", ms(row), times_as_fast(row),
              str(row['graphs']), str(row['anew'])] for row in rows]
    return rows, markdown(['shape', 'step', 'first step, s', 'ms (quartiles)', 'against eager', 'graphs', 'compiled anew'], lines)


# first what may refuse its checkpoint
TABLES = dict(sampling=sampling, training=training, peak=peak, startup=startup, growth=growth, head=head, compile=compiled)


def run(s):
    """The suite with bench's settings s: (rows of all tables, the tables as text)."""
    rows, texts = [], []
    for name, table in wanted(s, list(TABLES.items())):
        if name == 'compile' and not s.only:
            continue
        found, text = table(s)
        print(f'{name}: done', flush=True)
        rows += found
        texts.append(f'{name}\n\n{text}')
    print(f'{torch.get_num_threads()} threads, torch {torch.__version__}')
    return rows, '\n\n'.join(texts)


if __name__ == '__main__':
    memory_child()
