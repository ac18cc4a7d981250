"""
How fast is it, and what would a plain script take?

sampling  of our samplers, of plain ancestral sampling (a token a pass, every logit of every row), and left
          to right with a key/value cache, in a loop of its own and in ours; all with one network. Beside them
          nanoGPT's own way: its network, with the same n_layer, n_embd and n_head and random weights, reads
          up to block_size tokens anew for every token. It stops at no end, so compare tokens/s; of ours the
          tokens up to the end count. Text without an end is also written LENGTH tokens long, in windows
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
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import configurator
import train
from configurator import UserError
from corruption import CORRUPTIONS, Task, ask
from plumbing.checks import parse_mixture
from plumbing.text import decode, modelled, start_canvas, until_end
from data.loader import load_data
from model import GPT, GPTConfig
from parts.cache import Cache
from parts.long import in_windows
from plumbing.rows import Ends, close_rows
from plumbing import optim
from plumbing.run import is_finite
from plumbing.device import configure_compute, freeze
from parts.presets import PRESETS, best_rules, supports
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
BATCHES = (1, 16, 256)  # sampling: samples at a time, fewer if all their logits are more than MOST_LOGITS
MOST_LOGITS = 2 ** 26
LENGTH, LONG_BATCHES = 2000, (1, 16)         # sampling: long texts
PATIENCE = 30               # sampling: who would take more seconds, by the batch before, is left out


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
    cache, begin = Cache.empty(model, len(x)), 0
    for position in range(int(start[0].long().argmax()), x.size(1)):
        cache.make_room(position + 1)
        at = torch.arange(begin, position + 1, device=x.device).expand(len(rows), -1)
        hidden = model(x[rows], causal=True, cache=cache, at=at)               # (R, W, C), at first a prompt
        logits = model.logits(hidden[:, -1], real_only=True)
        x[rows, position] = draw(filtered(logits, **filters), generator)
        begin = position + 1
        going = going & (x[rows, position] != (-1 if ends.end is None else ends.end))
        left = int(going.sum())
        if left <= 0.75 * len(rows):  # not for every row: that moves the cache
            cache.keep_rows(going.nonzero()[:, 0])
            rows, going = rows[going], going[going]
        if not left:
            break
    return close_rows(x, start, model.mask_token_id, ends)


class PlainBlock(nn.Module):
    """A block of nanoGPT's network, without dropout and biases."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(C, bias=False) for _ in range(2))
        self.qkv, self.attn_proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.fc, self.proj = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2)             # (B, nh, T, hs) each
                   for part in self.qkv(self.norms[0](x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.proj(F.gelu(self.fc(self.norms[1](x))))


class PlainGPT(nn.Module):
    """nanoGPT's network with the sizes of a GPTConfig and random weights, as only its time is measured."""

    def __init__(self, config):
        super().__init__()
        C, self.block_size = config.n_embd, config.block_size
        self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.block_size, C)
        self.blocks = nn.Sequential(*[PlainBlock(C, config.n_head) for _ in range(config.n_layer)])
        self.norm = nn.LayerNorm(C, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, idx):
        """ids (B, T) -> the logits (B, V) of the token behind."""
        x = self.blocks(self.wte(idx) + self.wpe.weight[:idx.size(1)])         # (B, T, C)
        return F.linear(self.norm(x[:, -1:]), self.wte.weight)[:, 0]


@torch.no_grad()
def nanogpt(model, canvas, generator):
    """Fills canvas (B, T), whose masks are a suffix, as nanoGPT's generate: a whole pass for every token."""
    B, T = canvas.shape
    given = int((canvas[0] < model.wte.num_embeddings).sum())
    idx = canvas[:, :given] if given else canvas.new_zeros(B, 1)               # it begins behind some token
    for _ in range(T - given):
        logits = model(idx[:, -model.block_size:]).float()                     # (B, V)
        idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1, generator=generator)), 1)
    return idx[:, -T:]


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


def samplers(model, meta, config, num, length=None):
    """
    {name: function of a seed that draws num samples and returns how many tokens it wrote}: nanoGPT, and those
    that a checkpoint of this config supports. length: None, or that of texts in windows.
    """
    writes, causal, detects = supports(config)
    device, best = model.wte.weight.device, best_rules(config)
    lengths = length and torch.full((num,), length)
    canvas, fixed = (rows.to(device) for rows in start_canvas(model, meta, num, lengths=lengths))
    given, plain = int(fixed[0].sum()), PlainGPT(model.config).to(device, model.compute_dtype).eval()

    def ours(**rules):
        def sample(seed):
            samples = generate(model, meta, num, lengths=lengths, batch_size=num, seed=seed, **rules)
            return sum(len(sample['tokens']) - given for sample in samples)
        return sample

    def plainly(sampler, ends=True):
        def sample(seed):
            x = sampler(canvas, torch.Generator(device).manual_seed(seed)).tolist()
            texts = [decode(meta, ids) for ids in x]
            tokens = [until_end(meta, ids) for ids in x] if ends else x
            return sum(map(len, tokens)) - given * len(texts)
        return sample

    def cached(canvas, rng):
        sampler = lambda x, fixed, trace: (cached_ar(model, x, rng, Ends.of(meta)), 0)
        return in_windows(sampler, canvas, fixed, model.config.block_size)[0]

    found = {'nanoGPT': plainly(partial(nanogpt, plain), ends=False)}
    if writes and not length:
        found['plain ancestral'] = plainly(partial(plain_ancestral, model))
        found['ours, ancestral'] = ours(commit='random', remask='none')
    found[f"ours, default (remask={best['remask']})"] = ours(**best)
    if writes and detects:
        found['ours, intelligent'] = ours(**PRESETS['intelligent'])
    if 16 in (config.get('block_lengths') or ()):
        found['ours, intelligent in blocks of 16'] = ours(block_length=16, **PRESETS['intelligent'])
    if causal and 'graph' not in model.config.parts:                           # a graph cannot use a cache
        found['AR, cached'] = plainly(cached)
    if causal and not length:
        found['ours, AR'] = ours(ar_prefix=model.config.block_size)
    return found


def sampling(s):
    """Rows and text: the samplers of one checkpoint, for every batch, and of a stream for long texts."""
    model, meta, config, what = sampling_network(s)
    most = max(1, MOST_LOGITS // (model.config.block_size * model.config.vocab_size))
    shapes = [(num, None) for num in dict.fromkeys(min(num, most) for num in BATCHES)]
    if meta['eos'] is None:
        shapes += [(num, LENGTH) for num in LONG_BATCHES]
    rows, pace = [], {}                                                        # pace: seconds a sample
    for num, length in shapes:
        shape = f'batch {num}' + (f', {length:,} tokens' if length else '')
        steps, written = {}, {}
        for name, sample in samplers(model, meta, config, num, length).items():
            if num * pace.get((name, length), 0) > PATIENCE:
                print(f'{shape}: {name} would take more than {PATIENCE} s, left out')
                continue
            seeds = map(sample, itertools.count(s.seed))                       # a new seed every time
            written[name] = []
            steps[name] = lambda seeds=seeds, counts=written[name]: counts.append(next(seeds))
        found = with_ratios(compare('sampling', shape, steps, s.steps), 'plain ancestral')
        for row in found:
            pace[row['name'], length] = row['seconds'] / num
            row.update(checkpoint=what, samples_per_second=num / row['seconds'],
                       tokens_per_second=statistics.mean(written[row['name']]) / row['seconds'])
        speeds = {row['name']: row['tokens_per_second'] for row in found}
        for row in found:
            for base in ('AR, cached', 'nanoGPT'):
                row[f'against {base}'] = speeds[row['name']] / speeds[base] if base in speeds else None
        rows += found
    return rows, what + '\n' + table_of(rows, {
        'samples at a time': SHAPE, 'sampler': NAME, 'tokens/s': value('tokens_per_second', '{:,.0f}'),
        'samples/s': value('samples_per_second', '{:.4g}'), 'ms a batch (quartiles)': ms,
        'against plain': times_as_fast, 'against cached AR': value('against AR, cached', '{:.2f}x'),
        'against nanoGPT': value('against nanoGPT', '{:.2f}x')})


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
