"""
How fast is it, and what would a plain script take?

sampling  samples/s of our samplers, of plain ancestral sampling (a token a pass, every logit of every row),
          and left to right with a key/value cache, in a loop of its own and in ours; all with one network
training  tokens/s of a step: as nanoGPT makes it (float32, eager, fused attention, AdamW in a loop over the
          tensors, all logits), ours with the same task, config/remask_all.py, and that less one feature each;
          with --compile=True also ours with the same task, compiled
peak      FLOP/s of a bare matrix product of these shapes, best of many: what mfu is a share of

--only=training takes one of the tables. What is compared takes turns, so that noise hits all of it.
--steps is the most rounds of a comparison; after SECONDS it ends with the round it is in. A time is a median,
with its quartiles. keep_memory (plumbing/device.py) helps the baselines too, so ratios are rather too low.
"""

import copy
import itertools
import os
import statistics
import time
from dataclasses import fields

import torch
import torch.nn.functional as F

import configurator
import train
from configurator import UserError
from corruption import CORRUPTIONS, Task, ask
from plumbing.checks import parse_mixture
from plumbing.text import decode, modelled, start_canvas
from data.loader import load_data
from model import GPT, GPTConfig
from parts.cache import Cache
from plumbing.rows import Ends, close_rows
from plumbing import optim
from plumbing.run import is_finite
from plumbing.device import configure_compute, freeze
from parts.presets import best_rules, supports
from plumbing.draw import draw, filtered
from plumbing.checkpoint import find_checkpoint
from sample import generate
from suites.common import load, markdown, wanted
from suites.runs import ROOT

# -----------------------------------------------------------------------------
# what is measured

SECONDS = 30                 # a comparison begins no new round after that, but makes ROUNDS
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
    'ours, unmasking, AdamW, no EMA': dict(PLAIN, optimizer='adamw', ema_decay=0.0),   # the baseline's task
    ALL: {},
    'without own corruption (random)': dict(corruption='random'),
    'without causal share, draft head': dict(causal_ratio=0.0, draft_head=False),
    'without draft head': dict(draft_head=False),
    'without EMA': dict(ema_decay=0.0),
    'without Muon (AdamW)': dict(optimizer='adamw'),
}
BATCHES = (1, 256)  # sampling: samples at a time, fewer if all their logits would be more than MOST_LOGITS
MOST_LOGITS = 2 ** 26


def recipe(**changes):
    """The settings of config/remask_all.py, a dict, with changes; vocab_size may be one of them."""
    known = configurator.settings(os.path.join(ROOT, 'train.py'))
    values = {name: setting.default for name, setting in known.items()}
    configurator.apply_file(os.path.join(ROOT, 'config', 'remask_all.py'), values, known)
    return {**values, **changes}


def label(config):
    """The sizes of a config, as text."""
    sizes = f"{config['n_layer']}x{config['n_embd']}, T={config['block_size']}, batch {config['batch_size']}"
    return f"{sizes}, vocabulary {config['vocab_size']:,}"


# -----------------------------------------------------------------------------
# the clock and the tables


def seconds_of(step):
    """How long one call of step() takes, until the device is done with it."""
    t0 = wait()
    step()
    return wait() - t0


def wait():
    """Waits until the device has done what it was told, and returns the time."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def compare(table, shape, steps, most):
    """Times the functions {name: step} in turn, `most` rounds at most, after one for nothing: a row each."""
    for step in steps.values():
        seconds_of(step)
    times, end = {name: [] for name in steps}, time.perf_counter() + SECONDS
    for number in range(most):
        if number >= ROUNDS and time.perf_counter() > end:
            break
        for name, step in steps.items():
            times[name].append(seconds_of(step))
    return [dict(table=table, shape=shape, name=name, **spread(times[name])) for name in steps]


def spread(times):
    """dict(seconds, the median; low and high, the quartiles; n) of a list of seconds."""
    low, _, high = statistics.quantiles(times, n=4, method='inclusive') if len(times) > 1 else times * 3
    return dict(seconds=statistics.median(times), low=low, high=high, n=len(times))


def with_ratios(rows, base):
    """Adds ratio to the rows of a comparison: times as fast as the row base; None without that row."""
    seconds = [row['seconds'] for row in rows if row['name'] == base]
    for row in rows:
        row['ratio'] = seconds[0] / row['seconds'] if seconds else None
    return rows


def ms(row):
    """A row's time as text, in milliseconds."""
    return f"{1e3 * row['seconds']:.4g} ({1e3 * row['low']:.4g}–{1e3 * row['high']:.4g})"


def value(name, style='{}', scale=1):
    """A column: what makes the text of row[name]; '' for None."""
    return lambda row: '' if row[name] is None else style.format(scale * row[name])


times_as_fast = value('ratio', '{:.2f}x')
SHAPE, NAME = value('shape'), value('name')


def table_of(rows, columns):
    """Markdown of the rows; columns: {head: function of a row that makes the text of its cell}."""
    return markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows])

# -----------------------------------------------------------------------------
# training


def network(s, config, dtype=None, attention=None, compile=False):
    """A fresh network of a config, always with the same weights. dtype, attention: None as in s."""
    torch.manual_seed(s.seed)
    sizes = {field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}
    model = GPT(GPTConfig(**sizes))
    return configure_compute(model, s.device, dtype or s.dtype, attention or s.attention, compile)[0].train()


def random_batch(s, model, config):
    """Random ids x0 (B, T), what there is to know about them, and a generator for their corruption."""
    device, size = model.wte.weight.device, (config['batch_size'], config['block_size'])
    rng = torch.Generator(device).manual_seed(s.seed)
    x0 = torch.randint(config['vocab_size'], size, generator=rng, device=device)
    return x0, dict(bos=None, eos=None, pad=None), rng


def our_step(s, config, compile=False):
    """
    A step of train.py: forward and backward, clipping, the optimisers, the average of the weights.

    step(at) is at that step of the curricula, step() behind them. The rates are tiny, as ids are random.
    """
    model = network(s, config, compile=compile)
    ema = copy.deepcopy(model) if config['ema_decay'] else None
    betas = (config['beta1'], config['beta2'])
    optimizers = optim.make_optimizers(model, config['optimizer'], 1e-5, 1e-5, 0.0, betas)
    rates = dict(config, muon_lr=1e-5, learning_rate=1e-5)
    x0, meta, rng = random_batch(s, model, config)

    def step(at=config['max_iters']):
        parts = train.training_step(model, x0, meta, config, at, rng)
        if not is_finite(model, parts):
            raise UserError(f'the loss of {label(config)} is not finite; try --dtype=float32')
        optim.update(model, optimizers, rates, scale=1.0)
        if ema:
            optim.average(ema, model, config['ema_decay'])
        model.zero_grad(set_to_none=True)
    return step


def baseline_loss(model, input, target, weight, hidden=None):
    """The NELBO loss the plain way: logits and cross-entropy everywhere, then the weights. (B, T) each."""
    hidden = model(input) if hidden is None else hidden                        # (B, T, C)
    words = model.wte.weight[:model.config.vocab_size].to(hidden.dtype)
    logits = F.linear(hidden.flatten(0, 1), words).float()                     # (B*T, V)
    ce = F.cross_entropy(logits, target.flatten(), reduction='none')
    return (weight.flatten() * ce).sum() / len(input)


def masked_batch(model, x0, meta, rng):
    """(input, target, weight), (B, T) each, of plain unmasking."""
    tokens = model.mask_token_id, model.wrong_token_id, meta['pad']
    return ask(x0, *modelled(x0, meta), Task(training_type='unmasking'), tokens, rng)


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

    A token takes 2 N forward, N = 12 L C^2 being the weights of the matrices, and 4 L T C for the products of
    attention; a logit takes 2 C. Backward costs twice the forward pass.
    """
    L, C = config['n_layer'] * config['n_recur'], config['n_embd']
    T, B = config['block_size'], config['batch_size']
    token = 12 * L * C * C + 2 * L * T * C               # half of the FLOPs of its forward pass
    logits = (config['vocab_size'] + 2) * C              # the same of all logits of a position
    behind = 9 * C * C                                   # of the last block behind its attention

    # rows of each task; of rows with wrong tokens all positions have loss, of masked ones half (k is uniform)
    causal = B if config['training_type'] == 'causal' else round(B * config['causal_ratio'])
    others = B * config['views'] if config['views'] else B - causal
    proofread = round(others * config['remask_ratio']) if config['training_type'] == 'joint' else 0
    learned = proofread * T + (others - proofread) * (T + 1) / 2

    # own guesses, at a quarter of the positions of their rows, come from a pass without gradient
    mixture = dict(parse_mixture('corruption', config['corruption'], CORRUPTIONS))
    guesses = proofread * mixture.get('own', 0) / sum(mixture.values())

    # the draft head makes 6 steps from 256 places; of its logits only the state gets a gradient
    drafts = 6 * 256 if config['draft_head'] and causal else 0
    return (6 * (causal * T * (token + logits) + others * T * (token - behind) + learned * (logits + behind))
            + 2 * guesses * (T * (token - behind) + (T + 3) / 4 * (logits + behind))
            + drafts * (6 * 3 * C * C + 4 * logits))


def peak_flops(s, shape, least=0.3):
    """(FLOP/s of (B*T, C) x (C, 4C), the best of many calls, the dtype in use): the machine, measured."""
    model = network(s, recipe(**SHAPES[0]))                                    # only for its dtype and device
    dtype, device = model.compute_dtype, model.wte.weight.device
    rows, C = shape['batch_size'] * shape['block_size'], shape['n_embd']
    x = torch.randn(rows, C, device=device).to(dtype)
    w = torch.randn(4 * C, C, device=device).to(dtype)
    best, end = float('inf'), time.perf_counter() + least
    with torch.no_grad():
        while time.perf_counter() < end or best == float('inf'):
            best = min(best, seconds_of(lambda: [F.linear(x, w) for _ in range(4)]) / 4)   # launches overlap
    return 2 * rows * C * 4 * C / best, str(dtype).removeprefix('torch.')


def training(s):
    """Rows and text: the baseline, ours, and what each feature costs, for every shape."""
    rows = []
    for shape in SHAPES:
        configs = {name: recipe(**shape, **changes) for name, changes in VARIANTS.items()}
        plain = configs['ours, unmasking']
        steps = {'baseline': baseline_step(s, plain)}
        steps.update((name, our_step(s, config)) for name, config in configs.items())

        # the task of the baseline compiled as well; the others, with two modes, would take minutes
        if s.compile:
            torch.compiler.reset()                                       # it gives up after eight networks
            for name in [name for name in VARIANTS if 'unmasking' in name]:
                steps[f'{name}, compiled'] = our_step(s, configs[name], compile=True)
                steps[f'{name}, compiled']()                             # the next call may compile again

        found = with_ratios(compare('training', label(shape), steps, s.steps), 'baseline')
        most, _ = peak_flops(s, shape)
        everything = next(row['seconds'] for row in found if row['name'] == ALL)
        for row in found:
            seconds, flops = row['seconds'], step_flops(configs.get(row['name'], plain))
            row.update(tokens_per_second=shape['batch_size'] * shape['block_size'] / seconds, flops=flops,
                       mfu=flops / seconds / most, costs=None)
            if row['name'].startswith('without'):
                row['costs'] = 1 - seconds / everything
        rows += found
    return rows, table_of(rows, {
        'shape': SHAPE, 'step': NAME, 'tokens/s': value('tokens_per_second', '{:,.0f}'), 'ms (quartiles)': ms,
        'against baseline': times_as_fast, 'costs, of remask_all': value('costs', '{:.0%}'),
        'model GFLOP': value('flops', '{:.3g}', 1e-9), 'mfu': value('mfu', '{:.1%}')})


def peak(s):
    """Rows and text: the peak of every shape."""
    rows = []
    for shape in SHAPES:
        flops, dtype = peak_flops(s, shape)
        rows.append(dict(table='peak', shape=label(shape), name=dtype, flops_per_second=flops))
    teraflops = value('flops_per_second', '{:.3g}', 1e-12)
    return rows, table_of(rows, {'shape': SHAPE, 'dtype': NAME, 'peak TFLOP/s': teraflops})

# -----------------------------------------------------------------------------
# sampling


@torch.no_grad()
def plain_ancestral(model, canvas, generator):
    """Fills canvas (B, T), equally many masks a row: a token a pass, anywhere, by all logits of all rows."""
    x, row = canvas.clone(), torch.arange(len(canvas), device=canvas.device)
    for _ in range(int((x == model.mask_token_id).sum(1).max())):
        ids = draw(model.logits(model(x), real_only=True).softmax(-1), generator)            # (B, T)
        noise = torch.rand(x.shape, generator=generator, device=x.device)
        at = noise.masked_fill(x != model.mask_token_id, -1).argmax(1)         # (B,)
        x[row, at] = ids[row, at]
    return x


@torch.no_grad()
def cached_ar(model, canvas, generator, ends=Ends(), **filters):
    """
    Writes canvas (B, T), whose masks are the same suffix of all rows, left to right with a key/value cache.

    Rows leave the batch behind their end token, a quarter of it at once. filters: temperature, top_k, top_p.
    """
    x, start = canvas.clone(), canvas == model.mask_token_id
    rows = torch.arange(len(x), device=x.device)
    going = rows >= 0  # (R,) rows without an end token
    cache = Cache.empty(model, len(x))
    for position in range(x.size(1)):
        cache.make_room(position + 1)
        at = torch.full_like(rows[:, None], position)
        hidden = model(x[rows], causal=True, cache=cache, at=at)               # (R, 1, C)
        if start[0, position]:
            logits = model.logits(hidden[:, 0], real_only=True)
            x[rows, position] = draw(filtered(logits, **filters), generator)
        going = going & (x[rows, position] != (-1 if ends.end is None else ends.end))
        left = int(going.sum())
        if left <= 0.75 * len(rows):  # not for every row: that moves the cache
            cache.keep_rows(going.nonzero()[:, 0])
            rows, going = rows[going], going[going]
        if not left:
            break
    return close_rows(x, start, model.mask_token_id, ends)


def sampling_network(s):
    """(model, meta, config, what it is) of the checkpoint of init_from, or of a fresh network without one."""
    try:
        path = find_checkpoint(s.init_from, s.out_dir)
    except UserError:
        config = recipe()
        meta, _ = load_data(config['dataset'])
        fresh = freeze(network(s, {**config, 'vocab_size': meta['vocab_size']}).eval())
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
    if causal and 'graph' not in model.config.parts:                           # a graph cannot use a cache
        found['AR, cached'] = plainly(cached_ar, ends=Ends.of(meta))
    if causal:
        found['ours, AR'] = ours(ar_prefix=model.config.block_size)
    return found


def sampling(s):
    """Rows and text: the samplers of one checkpoint, for every batch."""
    model, meta, config, what = sampling_network(s)
    most, rows = max(1, MOST_LOGITS // (model.config.block_size * model.config.vocab_size)), []
    for num in dict.fromkeys(min(num, most) for num in BATCHES):
        steps = {}
        for name, sample in samplers(model, meta, config, num).items():
            seeds = map(sample, itertools.count(s.seed))                       # a new seed every time
            steps[name] = seeds.__next__
        found = with_ratios(compare('sampling', f'batch {num}', steps, s.steps), 'plain ancestral')
        cached = [row['seconds'] for row in found if row['name'] == 'AR, cached']
        for row in found:
            row.update(checkpoint=what, samples_per_second=num / row['seconds'],
                       against_cached_ar=cached[0] / row['seconds'] if cached else None)
        rows += found
    return rows, what + '\n' + table_of(rows, {
        'samples at a time': SHAPE, 'sampler': NAME, 'samples/s': value('samples_per_second', '{:.4g}'),
        'ms a batch (quartiles)': ms, 'against plain': times_as_fast,
        'against cached AR': value('against_cached_ar', '{:.2f}x')})


# first what may refuse its checkpoint
TABLES = dict(sampling=sampling, training=training, peak=peak)


def run(s):
    """The suite with bench's settings s: (rows of all tables, the tables as text)."""
    rows, texts = [], []
    for name, table in wanted(s, list(TABLES.items())):
        found, text = table(s)
        print(f'{name}: done', flush=True)
        rows += found
        texts.append(f'{name}\n\n{text}')
    print(f'{torch.get_num_threads()} threads, torch {torch.__version__}')
    return rows, '\n\n'.join(texts)
