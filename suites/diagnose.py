"""
The doctor: can this training set-up learn, and is what it learns honest? Run it before the long run.

The set-up is what train_args says, words for train.py, or the config of a checkpoint, whose weights are then
examined too. A check returns (status, what was measured, what to do). It examines a fresh network; for leaks
one that has learned a batch by heart, because the blocks of a fresh one are the identity.
"""

import copy
import functools
import math
import shlex
import statistics
import time
from dataclasses import fields

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import configurator
import train
from configurator import UserError
from corruption import Task, ask
from parts.noise import another_token
from plumbing.text import modelled
from data.loader import data_of, load_data, random_rows, spread_rows
from model import GPT, GPTConfig
from plumbing.kernels import beside
from plumbing.rows import random_subset
from plumbing import optim
from plumbing.checkpoint import check_same_model, find_checkpoint, identity
from plumbing.checks import check_fits
from plumbing.device import configure_compute
from parts.presets import supports
from suites.common import load, wanted

ORDER = ('ok', 'warning', 'problem')
TOLERANCE = 1e-5        # of what has not changed, in hidden states, whose scale is 1
MEMORISED = 0.1         # nats a token
PIECE = 2**24           # tokens of a stream that are in memory at once
SCHEDULE = ('lr_schedule', 'max_iters', 'warmup_iters', 'decay_share')


def verdict(measured, *faults):
    """The result of a check; faults: (whether it is there, 'warning' or 'problem', what to do)."""
    found = [(status, advice) for there, status, advice in faults if there]
    status = max((status for status, _ in found), key=ORDER.index, default='ok')
    return status, measured, '; '.join(advice for _, advice in found)


def seeded(device, seed=0):
    """A random generator on the device."""
    return torch.Generator(device).manual_seed(seed)


def half_of(places, rng):
    """A random half of the places (N, T) in every row, rounded up."""
    return random_subset(places, (places.sum(1) + 1) // 2, rng)

# -----------------------------------------------------------------------------
# the data


def token_counts(ids):
    """How often every id 0..65535 occurs in a split, (65536,), piece by piece as a stream may be long."""
    ids = ids.reshape(-1)
    return sum(np.bincount(ids[start:start + PIECE], minlength=2**16) for start in range(0, len(ids), PIECE))


def text_counts(count, meta):
    """token_counts without the start symbol and the padding."""
    special = [token for token in (meta['bos'], meta['pad']) if token is not None]
    return np.where(np.isin(np.arange(len(count)), special), 0, count)


def check_vocabulary(counts, meta):
    """The ids of counts, {split: token_counts}, are 0..V-1, and V is not too large."""
    V, special = meta['vocab_size'], (meta['bos'], meta['eos'], meta['pad'])
    top = max(int(count.nonzero()[0].max()) for count in counts.values())
    known = V if meta['itos'] is None else len(meta['itos'])
    # a tokenizer that was made for other text may well have tokens that do not occur in this one
    unused = top < V - 1 and V - 1 not in special and meta['tokenizer'] == 'char'
    again = 'prepare the dataset again'
    return verdict(
        f'ids up to {top}, vocabulary 0..{V - 1}',
        (top >= V, 'problem', f'id {top} would be taken for [MASK] or [WRONG]: {again} with V > {top}'),
        (known != V, 'problem', f'itos has {known} tokens, vocab_size is {V}: {again}'),
        (unused, 'warning', f'the ids above {top} never occur: is vocab_size one too many?'))


def check_special(model, meta, data, counts):
    """[MASK] and [WRONG] are V and V+1, in no data, never drawn; start, end, padding are in place."""
    V, mask, wrong = meta['vocab_size'], model.mask_token_id, model.wrong_token_id
    other = f'[MASK] and [WRONG] are not {V} and {V + 1}: the network was made for another dataset'
    faults = [((mask, wrong) != (V, V + 1), 'problem', other)]
    for split, count in counts.items():
        times = count[mask] + count[wrong]
        found = [f'[MASK] or [WRONG] stands in it {times} times'] * bool(times)
        found += misplaced(data[split], meta) if meta['format'] == 'rows' else []
        faults += [(True, 'problem', f'{split}: {fault}; prepare the dataset again') for fault in found]
    with torch.no_grad():
        masks = torch.full((1, 2), mask, device=next(model.parameters()).device)
        logits = model.logits(model(masks)[0], real_only=True)                 # (2, V+2)
    drawn = logits.size(1) != wrong + 1 or (logits[:, mask:] != float('-inf')).any()
    return verdict(
        f'[MASK] {mask}, [WRONG] {wrong}, bos {meta["bos"]}, eos {meta["eos"]}, pad {meta["pad"]}', *faults,
        (drawn, 'problem',
         'the sampler may draw [MASK] or [WRONG]: GPT.logits(real_only=True) must give them -inf'))


def misplaced(x0, meta):
    """What is wrong with start, end and padding of rows x0 (N, T), as texts."""
    bos, eos, pad = (-1 if meta[name] is None else meta[name] for name in ('bos', 'eos', 'pad'))
    end = x0 == eos
    behind = end.cumsum(1) > end                                               # (N, T) behind an end token
    displaced = bos >= 0 and ((x0[:, 0] != bos).any() or (x0[:, 1:] == bos).any())
    faults = ((displaced, 'bos must stand first in every row, and nowhere else'),
              (((x0 == pad) & ~behind).any(), 'padding must stand behind the end only'),
              (((x0 != pad) & behind).any(), 'nothing but padding may stand behind the end'))
    return [text for there, text in faults if there]


def check_statistics(counts, meta, data):
    """What the tokens are like, start and padding aside, and whether the validation rows are new."""
    count, V = text_counts(counts['train'], meta), meta['vocab_size']
    share = count[count > 0] / max(1, count.sum())
    entropy, most = float(-(share * np.log(share)).sum()), max(share, default=0)
    measured = (f'{count.sum():,} tokens, {len(share)} of {V} ids, unigram entropy {entropy:.2f} nats '
                f'(ln V {math.log(V):.2f}), the most frequent token is {most:.0%}')
    twice = seen = 0
    if meta['format'] == 'rows':
        val, known = data['val'].numpy(), {row.tobytes() for row in data['train'].numpy()}
        twice = 1 - len(known) / len(data['train'])
        seen = sum(row.tobytes() in known for row in val) / len(val)
        measured += (f'; {twice:.0%} of the training rows are repetitions, '
                     f'{seen:.1%} of the validation rows stand in train')
    return verdict(
        measured,
        (len(share) <= 1, 'problem', 'there is nothing to learn: all tokens are the same'),
        (len(share) > 1 and most > 0.5, 'warning',
         'one token is most of the data: is it padding that meta.json does not call so?'),
        (twice > 0.9, 'warning', 'few rows are new: the network may learn them by heart'),
        (seen > 0.03, 'problem', 'the validation split measures memory: take what stands in train out of it'))

# -----------------------------------------------------------------------------
# the settings


def check_size(params, tokens, rows, config):
    """Parameters against the tokens of an epoch, and how many epochs of these rows the run takes."""
    epochs = config['max_iters'] * config['batch_size'] * config['gradient_accumulation_steps'] / rows
    by_heart = ('far more parameters than there are tokens: the network will learn the data by heart; '
                'more data, a smaller network, or --dropout=0.1')
    return verdict(
        f'{params:,} parameters, {tokens:,} tokens an epoch, {epochs:.3g} epochs',
        (params > 10 * tokens, 'warning', by_heart),
        (epochs > 300, 'warning', f'{epochs:,.0f} times over the same data: fewer --max_iters or more data'))


def check_rates(config):
    """Learning rates, warmup and curricula."""
    usual = dict(learning_rate=(1e-5, 0.03), muon_lr=(1e-4, 0.2))
    if config['optimizer'] != 'muon':
        del usual['muon_lr']
    steps, decay, faults = config['max_iters'], config['ema_decay'], []
    for name, (low, high) in usual.items():
        strange = config[name] and not low <= config[name] <= high
        faults += [(not config[name], 'problem', f'{name} is 0: what it trains stays as it is'),
                   (strange, 'warning', f'{name} is usually in {low}..{high}')]
    mixed = config['training_type'] in ('joint', 'denoising')
    judges = supports(config).detects and config['remasking_loss_type'] == 'all_positions'
    for name, used, what in (('warmup_iters', True, 'the learning rate never reaches its peak'),
                             ('proofreading_warmup_iters', mixed, 'remask_ratio is never reached'),
                             ('masking_warmup_iters', judges, 'penalty_mask_correct is never reached'),
                             ('block_warmup_iters', True, 'causal_ratio is never reached')):
        late = used and config[name] > steps
        faults.append((late, 'warning', f'{name}={config[name]} is longer than max_iters={steps}: {what}'))
    faults.append((1 / max(1e-9, 1 - decay) > steps, 'warning',
                   f'ema_decay={decay} averages over more steps than there are: lower it, 0 is off'))
    rates = ', '.join(f'{name} {config[name]:g}' for name in usual)
    warmup = f"the first {config['warmup_iters']} to warm up"
    return verdict(f"{rates}, {config['lr_schedule']}, {steps} steps, {warmup}", *faults)


def check_speed(choices, seconds, config):
    """choices: the line of configure_compute; seconds: of all steps; the first prepares the device."""
    step = statistics.median(seconds[1:])
    hours = step * config['max_iters'] / 3600
    expected = f'{60 * hours:.1f} minutes' if hours < 2 else f'{hours:.1f} hours'
    took = f'{1000 * step:.0f} ms a step' + ', not compiled' * config['compile']
    return verdict(
        f"{choices}; {took}, {config['max_iters']} steps in {expected}, evaluations aside",
        (hours > 24, 'warning', 'a long time: a smaller network, fewer steps, or a GPU'))

# -----------------------------------------------------------------------------
# learning


def initial_losses(model, x0, meta, generator):
    """
    What an untrained network says of rows x0 (N, T): [(mode, mean CE, what it should be, remark)].

    All distinct tokens count alike, as which are frequent has no say in a uniform guess. A tied head expects
    the token that it has just read once more, so the causal mode is also judged without it.
    """
    real, V = modelled(x0, meta)[1], model.config.vocab_size
    before = beside(x0, 1, model.mask_token_id)      # (N, T) what the causal pass has just read
    half, other = half_of(real, generator), real & (before != x0) & (before != model.mask_token_id)
    with torch.no_grad():
        hidden = model(x0.masked_fill(half, model.mask_token_id))[half]        # (M, C)
        guess = model.logits(hidden, real_only=True)                           # (M, V+2)
        again = model.logits(model(x0, causal=True)[other], real_only=True)
    anew = again.scatter(1, before[other][:, None], float('-inf'))
    remark = f'; {by_token(again, x0[other]):.2f} if the token just read may come again'
    return [('unmasking', by_token(guess, x0[half]), math.log(V), ''),
            ('causal', by_token(anew, x0[other]), math.log(V - 1), remark)]


def by_token(logits, target):
    """The mean over the distinct ids in target (M,) of the mean CE of logits (M, V+2) at each."""
    _, which, count = target.unique(return_inverse=True, return_counts=True)
    ce = F.cross_entropy(logits, target, reduction='none')
    return (torch.zeros(len(count), device=ce.device).index_add(0, which, ce) / count).mean().item()


def check_initial_loss(found):
    """found: see initial_losses. Logits start with a deviation of 0.02 sqrt(n_embd)."""
    faults = []
    for mode, nats, ideal, _ in found:
        wrong = not abs(nats - ideal) <= 0.2 * ideal                           # also true of NaN
        skewed = not wrong and abs(nats - ideal) > 0.05 * ideal
        faults += [(wrong, 'problem', f'{mode}: a fresh network must guess uniformly; see how it starts, '
                                      'which logits are open'),
                   (skewed, 'warning', f'{mode}: not uniform; usual in a wide network for few tokens, '
                                       'else see how it starts')]
    said = [f'{mode} {nats:.3f} nats (uniform: {ideal:.3f}{remark})' for mode, nats, ideal, remark in found]
    return verdict('; '.join(said), *faults)


def first_steps(model, ids, meta, config, num=5):
    """
    Makes num real steps on a split ids, then the gradients of one more batch, not clipped.

    Returns ([seconds of each step], {name: norm of the gradient, None without one}), of trained tensors. The
    output projections start at zero, so that in the first step nothing behind them has a gradient.
    """
    device, seed = next(model.parameters()).device, config['seed']
    rng, noise = seeded('cpu', seed), seeded(device, seed + 1)
    late = max(config[f'{name}_warmup_iters'] for name in ('proofreading', 'masking', 'block'))    # all done
    price = config['penalty_keep_mask'] if config['allow_abstain'] else None
    optimizers, seconds = optimizers_of(model, config), []
    model.train()
    for step in range(num + 1):
        t0 = time.perf_counter()
        for _ in range(config['gradient_accumulation_steps']):
            x0 = random_rows(ids, config['batch_size'], config['block_size'], rng).to(device)
            train.training_step(model, x0, meta, config, late, noise, price)
        if step < num:
            at = min(step, config['max_iters'] - 1)                      # behind the end the rate is negative
            scale = optim.lr_scale(at, *[config[name] for name in SCHEDULE])
            optim.update(model, optimizers, config, scale)
            model.zero_grad(set_to_none=True)
            next(model.parameters()).sum().item()                              # wait for the device
            seconds.append(time.perf_counter() - t0)
    grads = {name: p.grad for name, p in trained_tensors(model, config)}
    return seconds, {name: None if grad is None else grad.norm().item() for name, grad in grads.items()}


def optimizers_of(model, config):
    """The optimisers of a run with these settings."""
    rates = [config[name] for name in ('optimizer', 'learning_rate', 'muon_lr', 'weight_decay')]
    return optim.make_optimizers(model, *rates, (config['beta1'], config['beta2']), config['bigram_decay'])


def trained_tensors(model, config):
    """(name, tensor) of what a run trains: not the energy head, no part whose mode it never uses."""
    causal = supports(config).causal
    both_ways = config['training_type'] != 'causal' and (config['causal_ratio'] < 1 or config['views'] > 0)
    idle = ['critic.'] + ['causal_embd', 'drafter.'] * (not causal)
    idle += ['parts.level.', 'parts.previous.', 'parts.bigrams.around'] * (not both_ways)
    idle += ['blocks.0.parts.shortcuts'] * (config['n_recur'] == 1)     # the first block sees nothing again
    return [(name, p) for name, p in model.named_parameters() if not name.startswith(tuple(idle))]


def check_gradients(norms):
    """norms: {name: norm of the gradient, or None}, see first_steps."""
    norms = {name: norm or 0.0 for name, norm in norms.items()}
    values = [norm for norm in norms.values() if 0 < norm < math.inf]
    median = statistics.median(values) if values else 0.0
    faults = []
    for kind, status, advice, is_so in (
            ('not finite', 'problem',
             'lower the learning rates, or --dtype=float32', lambda x: not math.isfinite(x)),
            ('without any gradient', 'problem',
             'the loss does not depend on it, or the rate of what follows it is 0', lambda x: x == 0),
            ('vanishing', 'warning',
             'what follows it passes next to nothing back', lambda x: 0 < x < 1e-7 * median),
            ('exploding', 'warning',
             'look at its input, or let its weights start smaller', lambda x: 1e3 * median < x < math.inf)):
        names = [name for name, norm in norms.items() if is_so(norm)]
        more = f' and {len(names) - 6} more' if len(names) > 6 else ''
        faults.append((names, status, f"{', '.join(names[:6])}{more}: {kind}; {advice}"))
    span = 'no gradient at all'
    if values:
        span = f'norms {min(values):.1e} to {max(values):.1e}, median {median:.1e}'
    return verdict(f'{len(norms)} tensors, {span}', *faults)


def memorise(model, ids, meta, config, steps=100):
    """
    Learns one small batch of the split ids by heart, at the run's own peak rates, without dropout.

    Half of the tokens are masked, always the same; the training_type causal reads left to right. Ends at
    MEMORISED, or if the loss is not finite. Returns (the loss, nats a token, at every step; the lowest
    that is possible, as which row it is has to be guessed).
    """
    device, T = next(model.parameters()).device, config['block_size']
    causal = config['training_type'] == 'causal'
    rng = seeded('cpu', config['seed'])
    most = min(2048, 2**24 // meta['vocab_size'])    # tokens; a large vocabulary makes them dear
    x0 = random_rows(ids, min(16, max(2, most // T)), T, rng)                  # (N, T)
    real = modelled(x0, meta)[1]
    length = int(real.any(0).nonzero().max()) + 1                              # padding need not be learned
    x0, real = x0[:, :length], real[:, :length]
    where = (real if causal else half_of(real, rng)).to(device)
    floor = math.log(len(x0)) * len(x0) / int(real.sum()) if causal else 0.0
    x0 = x0.to(device)
    input = x0 if causal else x0.masked_fill(where, model.mask_token_id)

    losses, optimizers = [], optimizers_of(model, config)
    model.eval()
    for step in tqdm(range(steps + 1), desc='memorisation', leave=False):
        hidden = model(input, causal=causal)[where]                            # (M, C)
        loss = F.cross_entropy(model.logits(hidden, real_only=True), x0[where])
        losses.append(loss.item())
        if step == steps or not MEMORISED + floor < losses[-1] < math.inf:
            break
        loss.backward()
        optim.update(model, optimizers, config, min(1.0, (step + 1) / 10))
        model.zero_grad(set_to_none=True)
    return losses, floor


def check_memory(losses, floor, config):
    """losses, floor: see memorise. A network that cannot learn even that learns nothing."""
    last, steps, goal = losses[-1], len(losses) - 1, MEMORISED + floor
    rates = '--learning_rate' + ' and --muon_lr' * (config['optimizer'] == 'muon')
    measured = f'one batch: {losses[0]:.3f} to {last:.3f} nats a token in {steps} steps (goal {goal:.2f})'
    status = 'problem'
    if not last < 1.1 * losses[0]:                                             # also true of NaN
        advice = f'the loss rose: lower {rates}, ten times to begin with'
    elif last > 0.9 * losses[0]:
        advice = f'the loss did not move: raise {rates}, unless the gradients say that something is cut off'
    elif min(losses[-20:]) < 0.9 * min(losses[:-20], default=0):
        status, advice = 'warning', f'the loss falls, but slowly: raise {rates}'
    else:
        advice = f'the loss stands still: use more capacity (--n_embd, --n_layer), or other {rates}'
    return verdict(measured, (not last <= goal, status, advice))

# -----------------------------------------------------------------------------
# leaks


def largest(change, where):
    """The largest change of hidden states (N, T, C) at places where (N, T); NaN if anything is not finite."""
    return (change.float().abs().amax(-1) * where).max().item()


@torch.no_grad()
def check_hidden_tokens(model, x0, meta):
    """
    Two batches (N, T) that differ only in what is masked must look the same, and be answered the same.

    Every position that carries weight is a target, so the network may know of it only that it is masked.
    """
    (free, real), V = modelled(x0, meta), model.config.vocab_size

    def asked(ids):
        tokens = V, V + 1, meta['pad']
        return ask(ids, free, real, Task(training_type='unmasking'), tokens, seeded(x0.device))
    input, _, weight = asked(x0)
    target = weight > 0
    answer = model(input)                                                # before the other batch is even made
    other = asked(torch.where(target, another_token(x0, V, seeded(x0.device)), x0))[0]
    shown = int((other != input).sum())
    moved = largest(model(other) - answer, target)
    peeks = ('label leak: the network knows what is masked although its input does not say so; look for what '
             'else its forward reads')
    return verdict(
        f'{int(target.sum())} hidden tokens exchanged, the outputs there moved by {moved:.1e}',
        (not target.any(), 'problem', 'ask wants nothing: no position carries weight'),
        (shown, 'problem', f'label leak: {shown} inputs show what is asked for; ask must mask them'),
        (not shown and not moved <= TOLERANCE, 'problem', peeks))


@torch.no_grad()
def check_causal(model, x0):
    """In the causal mode a token must not move any prediction up to its own: x0 (N, T), its first row."""
    T, V = x0.size(1), model.config.vocab_size
    at = torch.linspace(0, T - 1, min(T, 16), device=x0.device).long()[:, None]    # (n, 1)
    rows = x0[:1].repeat(len(at), 1)                                               # (n, T)
    position = torch.arange(T, device=x0.device)
    changed = torch.where(position == at, another_token(rows, V, seeded(x0.device)), rows)
    moved = largest(model(changed, causal=True) - model(rows, causal=True), position <= at)
    return verdict(
        f'{len(at)} tokens exchanged, the predictions up to them moved by {moved:.1e}',
        (not moved <= TOLERANCE, 'problem', 'the causal mode sees what it has to predict: look at the '
                                            'attention mask and at the shift of the input'))


@torch.no_grad()
def check_packed(model, x0):
    """Texts that share a row must not see one another, in both modes: x0 (N, T), cut into two texts a row."""
    T, V, moved = x0.size(1), model.config.vocab_size, 0.0
    position = torch.arange(T, device=x0.device).expand(x0.shape)              # (N, T)
    second = position >= T // 2
    other = another_token(x0, V, seeded(x0.device))
    for causal in (False, True):
        holes = (position % 2 == 1) & (not causal)
        for text in (second, ~second):
            before, after = (model(ids.masked_fill(holes, V), causal=causal, segment=second.long())
                             for ids in (x0, torch.where(text, other, x0)))
            moved = max(moved, largest(after - before, ~text), key=lambda value: (math.isnan(value), value))
    return verdict(
        f'one of two texts exchanged, the other one moved by {moved:.1e}',
        (not moved <= TOLERANCE, 'problem',
         'texts that are packed into one row see one another: look at what attention does with segment'))


@torch.no_grad()
def check_context(model, x0, meta):
    """What is visible has to matter: x0 (N, T), half of it masked, all that is visible exchanged."""
    free, V, rng = modelled(x0, meta)[0], model.config.vocab_size, seeded(x0.device)
    masked = half_of(free, rng)
    other = torch.where(free, another_token(x0, V, rng), x0)
    moved = largest(model(other.masked_fill(masked, V)) - model(x0.masked_fill(masked, V)), masked)
    return verdict(
        f'the visible tokens exchanged, the outputs at the masks moved by {moved:.1e}',
        (not moved > 1e-2, 'problem',
         'the network guesses without looking at the text: it has not learned, or attention is cut off'))


def leak_checks(prefix, network, x0, meta):
    """[(name, the check)] for leaks: network() is the one to examine, x0 (N, T) rows to do it with."""
    return [(f'{prefix}leak: hidden tokens', lambda: check_hidden_tokens(network(), x0, meta)),
            (f'{prefix}leak: causal', lambda: check_causal(network(), x0)),
            (f'{prefix}leak: packed texts', lambda: check_packed(network(), x0)),
            (f'{prefix}context', lambda: check_context(network(), x0, meta))]

# -----------------------------------------------------------------------------
# the weights of a checkpoint


def check_tensors(model, checkpoint, config):
    """The saved weights and their average: all are finite, and what was trained is not all zero."""
    trained, faults = {name for name, _ in trained_tensors(model, config)}, []
    kinds = [kind for kind in ('model', 'ema') if checkpoint.get(kind)]
    for kind in kinds:
        for name, tensor in checkpoint[kind].items():
            finite = torch.isfinite(tensor).all()
            idle = finite and name in trained and not tensor.any()
            bad = f'{kind}: {name} holds NaN or infinity, take an older checkpoint'
            faults += [(not finite, 'problem', bad),
                       (idle, 'problem', f'{kind}: {name} is all zero, so it never learned')]
    num = sum(len(checkpoint[kind]) for kind in kinds)
    return verdict(f"{num} tensors ({', '.join(kinds)}), {checkpoint['iter_num']} steps", *faults)


@torch.no_grad()
def silent_units(model, x0, meta, config):
    """The share of each block's ReLU units that are never active on rows x0 (N, T) in any trained mode."""
    active = [x0.new_zeros(block.fc.out_features, dtype=torch.bool) for block in model.blocks]

    def watch(seen, layer, args, h):
        seen.logical_or_((h > 0).flatten(0, -2).any(0))
    hooks = [block.fc.register_forward_hook(functools.partial(watch, seen))
             for seen, block in zip(active, model.blocks)]
    if config['training_type'] != 'causal':
        model(x0.masked_fill(half_of(modelled(x0, meta)[0], seeded(x0.device)), model.mask_token_id))
    if supports(config).causal:
        model(x0, causal=True)
    for hook in hooks:
        hook.remove()
    return [1 - seen.float().mean().item() for seen in active]


def check_units(shares):
    """shares: see silent_units."""
    dead = [f'block {number}' for number, share in enumerate(shares) if share > 0.5]
    status = 'problem' if max(shares) > 0.95 else 'warning'
    return verdict(
        'never active: ' + ', '.join(f'{share:.1%}' for share in shares) + ' of the units, by block',
        (dead, status, f"{', '.join(dead)}: most units are dead, lower the learning rates or warm up longer"))

# -----------------------------------------------------------------------------
# the suite


def set_up(s):
    """
    What is to be diagnosed: (the settings of train.py, a dict, model or None, its checkpoint or None).

    Raises UserError for words that train.py would refuse, and where it is not clear what is meant.
    """
    if not s.train_args:
        model, checkpoint = load(s, find_checkpoint(s.init_from, s.out_dir), learns=True)
        known = configurator.settings(train.__file__)
        config = {name: checkpoint['config'].get(name, setting.default) for name, setting in known.items()}
        return config, model, checkpoint
    if s.init_from != 'ckpt':
        raise UserError('diagnose takes train_args, a set-up, or init_from, a checkpoint and its set-up, '
                        'but not both')
    try:
        words = shlex.split(s.train_args)
    except ValueError as error:
        raise UserError(f"train_args='{s.train_args}': {error}") from None
    config = configurator.configure(dict(vars(train)), words)
    if config['init_from'] != 'scratch':
        raise UserError('train_args starts from a checkpoint, but what is diagnosed is a fresh network: '
                        'leave its init_from out; the checkpoint itself is diagnosed by '
                        f"--init_from={shlex.quote(config['init_from'])} without train_args")
    return config, None, None


def fresh_network(config, meta):
    """The network with which train.py would start."""
    torch.manual_seed(config['seed'])
    known = {field.name for field in fields(GPTConfig)}
    sizes = {name: value for name, value in config.items() if name in known}
    model = GPT(GPTConfig(**sizes, vocab_size=meta['vocab_size']))
    model.mask_logit_bias.fill_(config['mask_logit_bias'])
    return model


def set_up_checks(s, config, meta, data, model, choices):
    """
    [(name, the check, to be called)] of a set-up with its fresh model. What several need is made once.

    If there are ids that the network has no row for, that is the one check: the others need them.
    """
    counts = {split: token_counts(np.asarray(ids)) for split, ids in data.items()}
    vocabulary = ('vocabulary', lambda: check_vocabulary(counts, meta))
    if any(count[meta['vocab_size']:].any() for count in counts.values()):
        return [vocabulary]
    device, T = next(model.parameters()).device, config['block_size']
    x0 = random_rows(data['train'], min(32, max(2, 4096 // T)), T, seeded('cpu', s.seed)).to(device)  # (N, T)
    rows = len(data['train']) / (1 if meta['format'] == 'rows' else T)
    tokens = int(text_counts(counts['train'], meta).sum())
    rng = seeded(device, s.seed)

    @functools.cache
    def steps():
        return first_steps(copy.deepcopy(model), data['train'], meta, config)

    @functools.cache
    def learned():
        network = copy.deepcopy(model)
        return network, memorise(network, data['train'], meta, config)
    return [vocabulary,
            ('special tokens', lambda: check_special(model, meta, data, counts)),
            ('statistics', lambda: check_statistics(counts, meta, data)),
            ('size', lambda: check_size(model.num_params(), tokens, rows, config)),
            ('rates', lambda: check_rates(config)),
            ('initial loss', lambda: check_initial_loss(initial_losses(model, x0, meta, rng))),
            ('gradients', lambda: check_gradients(steps()[1])),
            ('memorisation', lambda: check_memory(*learned()[1], config)),
            *leak_checks('', lambda: learned()[0], x0, meta),
            ('speed', lambda: check_speed(choices, steps()[0], config))]


def run(s):
    """The suite with bench's settings s: (rows, the summary). A row: name, status, measured, advice."""
    config, trained, checkpoint = set_up(s)
    if checkpoint:
        meta, data = data_of(checkpoint['meta'], config)
        place = f"data/{config['dataset']}"
        check_same_model('the checkpoint', identity(checkpoint), place, meta, ('vocab_size', 'itos'))
    else:
        train.check_settings(dict(config, fsdp=False))                         # of many processes here is one
        meta, data = load_data(config['dataset'], config['coarse'])
    check_fits(config, meta)

    # the set-up's own choices unless bench was told others; those of a checkpoint were for another machine
    chosen = {name: getattr(s, name) for name in ('device', 'dtype', 'attention')}
    if not checkpoint:
        chosen = {name: config[name] if choice == 'auto' else choice for name, choice in chosen.items()}
    model, choices = configure_compute(fresh_network(config, meta), **chosen)

    checks = set_up_checks(s, config, meta, data, model, choices)
    if checkpoint and len(checks) > 1:
        x0 = spread_rows(data['val'], min(32, s.eval_rows), config['block_size'])
        x0 = x0.to(next(trained.parameters()).device)
        checks += [('checkpoint, tensors', lambda: check_tensors(trained, checkpoint, config)),
                   ('checkpoint, silent units', lambda: check_units(silent_units(trained, x0, meta, config))),
                   *leak_checks('checkpoint, ', lambda: trained, x0, meta)]
    print(f"{config['training_type']} on {meta['name']}, {model.num_params():,} parameters")
    rows = []
    for name, check in wanted(s, checks):
        status, measured, advice = check()
        rows.append(dict(name=name, status=status, measured=measured, advice=advice))
        print(f'{status:8} {name}: {measured}' + f'\n{"":8} -> {advice}' * bool(advice), flush=True)
    return rows, ', '.join(f"{status}: {sum(row['status'] == status for row in rows)}" for status in ORDER)
