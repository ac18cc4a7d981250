"""
The doctor: can this training set-up learn, and is what it learns honest? Run it before the long run, and when one went wrong.

The set-up is what train_args says, words for train.py, or the config of a checkpoint, whose weights are then examined too. A
check returns (status, what was measured, what to do). The network that they examine is a fresh one, as train.py would start
it; the checks for leaks take one that has just learned a batch by heart, because a fresh network, whose blocks are the
identity, cannot show any.
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
from plumbing import optim
import train
from plumbing.checkpoint import check_same_model, find_checkpoint, identity
from configurator import UserError
from corruption import Task, another_token, ask, modelled
from data.loader import data_of, load_data, random_rows, spread_rows
from plumbing.device import configure_compute
from model import GPT, GPTConfig, beside, random_subset
from rules import supports
from suites.common import load, wanted

ORDER = ('ok', 'warning', 'problem')
TOLERANCE = 1e-5        # of hidden states, whose scale is 1: what has not changed; exactly equal on the devices that we know
MEMORISED = 0.1         # nats a token
PIECE = 2**24           # tokens of a stream that are in memory at once
SCHEDULE = ('lr_schedule', 'max_iters', 'warmup_iters', 'decay_share')


def verdict(measured, faults):
    """The result of a check from its faults, a list of (status, what to do): the worst status, all that is to be done."""
    status = max((status for status, _ in faults), key=ORDER.index, default='ok')
    return status, measured, '; '.join(advice for _, advice in faults)


# -----------------------------------------------------------------------------
# the data


def token_counts(ids):
    """How often every id 0..65535 occurs in a split of a dataset, (65536,). Piece by piece: a stream may be long."""
    ids = ids.reshape(-1)
    return sum(np.bincount(ids[start:start + PIECE], minlength=2**16) for start in range(0, len(ids), PIECE))


def text_counts(count, meta):
    """token_counts without the start symbol and the padding."""
    special = [token for token in (meta['bos'], meta['pad']) if token is not None]
    return np.where(np.isin(np.arange(len(count)), special), 0, count)


def check_vocabulary(counts, meta):
    """counts: {split: token_counts}. Ids are 0..V-1, and V is what the tokens say: no one-off, no unused rows at the end."""
    V, top = meta['vocab_size'], max(int(count.nonzero()[0].max()) for count in counts.values())
    special = (meta['bos'], meta['eos'], meta['pad'])
    faults = []
    if top >= V:
        faults.append(('problem', f'id {top} would be taken for [MASK] or [WRONG], or has no row: prepare the dataset again, '
                                  f'with a vocab_size of {top + 1} or more'))
    if meta['itos'] is not None and len(meta['itos']) != V:
        faults.append(('problem', f"itos has {len(meta['itos'])} tokens, vocab_size is {V}: prepare the dataset again"))
    # a tokenizer that was made for other text may well have tokens that do not occur in this one
    if top < V - 1 and V - 1 not in special and meta['tokenizer'] == 'char':
        faults.append(('warning', f'the ids above {top} never occur: is vocab_size one too many?'))
    return verdict(f'ids up to {top}, vocabulary 0..{V - 1}', faults)


def check_special(model, meta, data, counts):
    """[MASK] and [WRONG] are V and V+1 and in no data, can never be sampled; start, end and padding stand where they should."""
    V, (mask, wrong) = meta['vocab_size'], (model.mask_token_id, model.wrong_token_id)
    faults, device = [], next(model.parameters()).device
    if (mask, wrong) != (V, V + 1):
        faults.append(('problem', f'[MASK] and [WRONG] are not {V} and {V + 1}: the network was made for another dataset'))
    for split, count in counts.items():
        found = [f'[MASK] or [WRONG] stands in it {count[mask] + count[wrong]} times'] if count[mask] + count[wrong] else []
        found += misplaced(data[split], meta) if meta['format'] == 'rows' else []
        faults += [('problem', f'{split}: {fault}; prepare the dataset again') for fault in found]
    with torch.no_grad():
        logits = model.logits(model(torch.full((1, 2), mask, device=device))[0], real_only=True)               # (2, V+2)
    if logits.size(1) != wrong + 1 or (logits[:, mask:] != float('-inf')).any():
        faults.append(('problem', 'the sampler may draw [MASK] or [WRONG]: GPT.logits(real_only=True) must give them -inf'))
    return verdict(f'[MASK] {mask}, [WRONG] {wrong}, bos {meta["bos"]}, eos {meta["eos"]}, pad {meta["pad"]}', faults)


def misplaced(x0, meta):
    """What is wrong with start, end and padding of rows x0 (N, T), as texts."""
    faults, (bos, eos, pad) = [], (meta['bos'], meta['eos'], meta['pad'])
    behind = torch.zeros_like(x0, dtype=torch.bool)                            # (N, T) behind an end token
    if eos is not None:
        behind = (x0 == eos).cumsum(1) > (x0 == eos)
    if bos is not None and ((x0[:, 0] != bos).any() or (x0[:, 1:] == bos).any()):
        faults.append('bos must stand first in every row, and nowhere else')
    if pad is not None and ((x0 == pad) & ~behind).any():
        faults.append('padding must stand behind the end only')
    if behind.any() and (pad is None or (x0[behind] != pad).any()):
        faults.append('nothing but padding may stand behind the end')
    return faults


def check_statistics(counts, meta, data):
    """What the tokens are like, start and padding aside, and whether the validation rows are new."""
    count = text_counts(counts['train'], meta)
    share = count[count > 0] / max(1, count.sum())
    entropy, V = float(-(share * np.log(share)).sum()), meta['vocab_size']
    measured = (f'{count.sum():,} tokens, {len(share)} of {V} ids, unigram entropy {entropy:.2f} nats (ln V {math.log(V):.2f}), '
                f'the most frequent token is {max(share, default=0):.0%}')
    faults = [] if len(share) > 1 else [('problem', 'there is nothing to learn: all tokens are the same')]
    if len(share) > 1 and max(share) > 0.5:
        faults.append(('warning', 'one token is most of the data: is it padding that meta.json does not call so?'))
    if meta['format'] == 'rows':
        known, val = ({row.tobytes() for row in data['train'].numpy()}, data['val'].numpy())
        twice, seen = 1 - len(known) / len(data['train']), sum(row.tobytes() in known for row in val) / len(val)
        measured += f'; {twice:.0%} of the training rows are repetitions, {seen:.1%} of the validation rows stand in train'
        if twice > 0.9:
            faults.append(('warning', 'few rows are new: the network may learn them by heart'))
        if seen > 0.03:
            faults.append(('problem', 'the validation split measures memory: take what stands in train out of it'))
    return verdict(measured, faults)


# -----------------------------------------------------------------------------
# the settings


def check_size(params, tokens, rows, config):
    """Parameters against the tokens of one epoch, and how many epochs of rows (a split's worth of them) the run takes."""
    epochs = config['max_iters'] * config['batch_size'] * config['gradient_accumulation_steps'] / rows
    faults = []
    if params > 10 * tokens:
        faults.append(('warning', 'far more parameters than there are tokens: the network will learn the data by heart; '
                                  'more data, a smaller network, or --dropout=0.1'))
    if epochs > 300:
        faults.append(('warning', f'{epochs:,.0f} times over the same data: fewer --max_iters or more data'))
    return verdict(f'{params:,} parameters, {tokens:,} tokens an epoch, {epochs:.3g} epochs', faults)


def check_rates(config):
    """Learning rates, warmup and curricula."""
    names = ['learning_rate'] + ['muon_lr'] * (config['optimizer'] == 'muon')
    steps, faults = config['max_iters'], []
    for name, low, high in (('learning_rate', 1e-5, 0.03), ('muon_lr', 1e-4, 0.2)):
        if name in names and not config[name]:
            faults.append(('problem', f'{name} is 0: what it trains stays as it is'))
        elif name in names and not low <= config[name] <= high:
            faults.append(('warning', f'{name} is usually in {low}..{high}'))
    ramps = [('warmup_iters', 'the learning rate never reaches its peak')]
    if config['training_type'] in ('joint', 'denoising'):
        ramps.append(('proofreading_warmup_iters', 'remask_ratio is never reached'))
    if supports(config)[2] and config['remasking_loss_type'] == 'all_positions':
        ramps.append(('masking_warmup_iters', 'penalty_mask_correct is never reached'))
    faults += [('warning', f'{name}={config[name]} is longer than max_iters={steps}: {what}')
               for name, what in ramps if config[name] > steps]
    if 1 / max(1e-9, 1 - config['ema_decay']) > steps:
        faults.append(('warning', f"ema_decay={config['ema_decay']} averages over more steps than there are: lower it, 0 is off"))
    rates = ', '.join(f'{name} {config[name]:g}' for name in names)
    return verdict(f"{rates}, {config['lr_schedule']}, {steps} steps, the first {config['warmup_iters']} to warm up", faults)


def check_speed(choices, seconds, config):
    """choices: the line of configure_compute; seconds: that every step took."""
    step = statistics.median(seconds[1:])                                      # the first one prepares the device
    hours = step * config['max_iters'] / 3600
    expected = f'{60 * hours:.1f} minutes' if hours < 2 else f'{hours:.1f} hours'
    measured = (f'{choices}; {1000 * step:.0f} ms a step{", not compiled" if config["compile"] else ""}, '
                f"{config['max_iters']} steps in {expected}, evaluations aside")
    return verdict(measured, [('warning', 'a long time: a smaller network, fewer steps, or a GPU')] if hours > 24 else [])


# -----------------------------------------------------------------------------
# learning


def initial_losses(model, x0, meta, generator):
    """
    What an untrained network says of rows x0 (N, T): [(mode, mean CE, what it should be, remark)].

    The mean is over the distinct tokens, every one alike, because which tokens are frequent has no say in a uniform guess.
    A tied head expects the token that it has just read once more, so the causal mode is also judged without it.
    """
    real, found = modelled(x0, meta)[1], []
    half = random_subset(real, (real.sum(1) + 1) // 2, generator)
    before = beside(x0, 1, model.mask_token_id)                                # (N, T) what the causal pass has just read
    other = real & (before != x0) & (before != model.mask_token_id)
    with torch.no_grad():
        for mode, where in (('unmasking', half), ('causal', other)):
            causal = mode == 'causal'
            hidden = model(x0 if causal else x0.masked_fill(half, model.mask_token_id), causal=causal)[where]   # (M, C)
            logits, remark, V = model.logits(hidden, real_only=True), '', model.config.vocab_size
            if causal:
                remark = f'; {by_token(logits, x0[where]):.2f} if the token just read may come again'
                logits, V = logits.scatter(1, before[where][:, None], float('-inf')), V - 1
            found.append((mode, by_token(logits, x0[where]), math.log(V), remark))
    return found


def by_token(logits, target):
    """The mean over the distinct ids in target (M,) of the mean CE of logits (M, V+2) at each."""
    _, which, count = target.unique(return_inverse=True, return_counts=True)
    ce = F.cross_entropy(logits, target, reduction='none')
    return (torch.zeros(len(count), device=ce.device).index_add(0, which, ce) / count).mean().item()


def check_initial_loss(found):
    """found: see initial_losses."""
    faults = []
    for mode, nats, ideal, _ in found:
        if not abs(nats - ideal) <= 0.2 * ideal:
            faults.append(('problem', f'{mode}: a fresh network must guess uniformly; see how it starts, which logits are open'))
        elif abs(nats - ideal) > 0.05 * ideal:                                 # logits start with a deviation of 0.02 sqrt(C)
            faults.append(('warning', f'{mode}: not uniform; usual in a wide network for few tokens, else see how it starts'))
    measured = [f'{mode} {nats:.3f} nats (uniform: {ideal:.3f}{remark})' for mode, nats, ideal, remark in found]
    return verdict('; '.join(measured), faults)


def first_steps(model, ids, meta, config, num=5):
    """
    num real steps of training on a split ids, then the gradients of one more batch, not clipped: ([seconds of each step],
    {name: norm of the gradient, None for a tensor that got none}) of the tensors that this run trains.

    More than one step, because the output projections start at zero: at first nothing behind them has a gradient.
    """
    on = next(model.parameters()).device
    generator, noise = torch.Generator().manual_seed(config['seed']), torch.Generator(on).manual_seed(config['seed'] + 1)
    late = max(config['proofreading_warmup_iters'], config['masking_warmup_iters'])  # the tasks as they are after the curricula
    price = config['penalty_keep_mask'] if config['allow_abstain'] else None
    optimizers, seconds = optimizers_of(model, config), []
    model.train()
    for step in range(num + 1):
        t0 = time.time()
        for _ in range(config['gradient_accumulation_steps']):
            x0 = random_rows(ids, config['batch_size'], config['block_size'], generator).to(on)
            train.training_step(model, x0, meta, config, late, noise, price)
        if step < num:
            at = min(step, config['max_iters'] - 1)                            # a rate behind the end would be negative
            optim.update(model, optimizers, config, optim.lr_scale(at, *[config[name] for name in SCHEDULE]))
            model.zero_grad(set_to_none=True)
            next(model.parameters()).sum().item()                              # wait for the device
            seconds.append(time.time() - t0)
    return seconds, {name: None if p.grad is None else p.grad.norm().item() for name, p in trained_tensors(model, config)}


def optimizers_of(model, config):
    """The optimisers of a run with these settings."""
    return optim.make_optimizers(model, config['optimizer'], config['learning_rate'], config['muon_lr'], config['weight_decay'],
                                 (config['beta1'], config['beta2']), config['bigram_decay'])


def trained_tensors(model, config):
    """(name, tensor) of what a run of these settings trains: not the energy head, and no part whose mode it never uses."""
    causal = supports(config)[1]
    bidirectional = config['training_type'] != 'causal' and (config['causal_ratio'] < 1 or config['views'] > 0)
    idle = ['critic.'] + ['causal_embd', 'drafter.'] * (not causal)
    idle += ['level.', 'previous.', 'bigrams.around'] * (not bidirectional)
    idle += ['blocks.0.shortcuts'] * (config['n_recur'] == 1)                  # a first block has nothing to be shown again
    return [(name, p) for name, p in model.named_parameters() if not name.startswith(tuple(idle))]


def check_gradients(norms):
    """norms: {name: norm of the gradient, or None}, see first_steps."""
    values = [norm for norm in norms.values() if norm and math.isfinite(norm)]
    median = statistics.median(values) if values else 0.0
    kinds = {'not finite': ('problem', 'lower the learning rates, or --dtype=float32'),
             'without any gradient': ('problem', 'the loss does not depend on it, or the rate of what follows it is 0'),
             'vanishing': ('warning', 'what follows it passes next to nothing back'),
             'exploding': ('warning', 'look at its input, or let its weights start smaller')}
    found = {kind: [] for kind in kinds}
    for name, norm in norms.items():
        kind = ('without any gradient' if not norm else 'not finite' if not math.isfinite(norm) else
                'vanishing' if norm < 1e-7 * median else 'exploding' if norm > 1e3 * median else None)
        if kind:
            found[kind].append(name)
    faults = []
    for kind, names in found.items():
        more = f' and {len(names) - 6} more' if len(names) > 6 else ''
        faults += [(kinds[kind][0], f"{', '.join(names[:6])}{more}: {kind}; {kinds[kind][1]}")] if names else []
    span = f'norms {min(values):.1e} to {max(values):.1e}, median {median:.1e}' if values else 'no gradient at all'
    return verdict(f'{len(norms)} tensors, {span}', faults)


def memorise(model, ids, meta, config, steps=100):
    """
    Learns one small batch of the split ids by heart at the run's own peak rates, half of the tokens masked, always the same
    (training_type causal: left to right): (the loss, nats a token, at every step, the lowest loss that is possible).

    Dropout is off. Ends when MEMORISED is reached, or with a loss that is not finite.
    """
    on, T = next(model.parameters()).device, config['block_size']
    generator = torch.Generator().manual_seed(config['seed'])
    most = min(2048, 2**24 // meta['vocab_size'])                              # tokens; a large vocabulary makes them dear
    x0 = random_rows(ids, min(16, max(2, most // T)), T, generator)            # (N, T)
    real, causal = modelled(x0, meta)[1], config['training_type'] == 'causal'
    x0 = x0[:, :int(real.any(0).nonzero().max()) + 1]                          # no need to learn the padding
    real = real[:, :x0.size(1)]
    where = real if causal else random_subset(real, (real.sum(1) + 1) // 2, generator)
    floor = math.log(len(x0)) * len(x0) / int(real.sum()) if causal else 0.0   # which row it is has to be guessed
    x0, where, losses, optimizers = x0.to(on), where.to(on), [], optimizers_of(model, config)
    model.eval()
    for step in tqdm(range(steps + 1), desc='memorisation', leave=False):
        hidden = model(x0 if causal else x0.masked_fill(where, model.mask_token_id), causal=causal)[where]     # (M, C)
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
    last, steps = losses[-1], len(losses) - 1
    rates = '--learning_rate' + ' and --muon_lr' * (config['optimizer'] == 'muon')
    measured = f'one batch: {losses[0]:.3f} to {last:.3f} nats a token in {steps} steps (goal {MEMORISED + floor:.2f})'
    if last <= MEMORISED + floor:
        return verdict(measured, [])
    if not last < 1.1 * losses[0]:                                             # also true of NaN
        fault = 'problem', f'the loss rose: lower {rates}, ten times to begin with'
    elif last > 0.9 * losses[0]:
        fault = 'problem', f'the loss did not move: raise {rates}, unless the gradients say that something is cut off'
    elif min(losses[-20:]) < 0.9 * min(losses[:-20], default=0):
        fault = 'warning', f'the loss falls, but slowly: raise {rates}'
    else:
        fault = 'problem', f'the loss stands still: a network with more capacity (--n_embd, --n_layer), or other {rates}'
    return verdict(measured, [fault])


# -----------------------------------------------------------------------------
# leaks


def largest(change, where):
    """The largest change of hidden states (N, T, C) at the positions where (N, T); NaN if anything is not finite."""
    return (change.float().abs().amax(-1) * where).max().item()


@torch.no_grad()
def check_hidden_tokens(model, x0, meta, seed=0):
    """
    Two batches that differ in nothing but what is masked must look the same to the network, and be answered the same.

    x0 (N, T). Every position that carries weight is a target, so all that the network may know of it is that it is masked.
    """
    (free, real), V = modelled(x0, meta), model.config.vocab_size

    def asked(ids):
        return ask(ids, free, real, Task(training_type='unmasking'), (V, V + 1, meta['pad']),
                   torch.Generator(x0.device).manual_seed(seed))
    input, _, weight = asked(x0)
    target = weight > 0
    swapped = torch.where(target, another_token(x0, V, torch.Generator(x0.device).manual_seed(seed)), x0)
    answer = model(input)                                                      # before the other batch is even made
    other = asked(swapped)[0]
    shown = int((other != input).sum())
    moved = largest(model(other) - answer, target)
    faults = [] if target.any() else [('problem', 'corrupt asks for nothing: no position carries weight')]
    if shown:
        faults.append(('problem', f'label leak: {shown} inputs show the token that is asked for; corrupt must mask them'))
    elif not moved <= TOLERANCE:
        faults.append(('problem', 'label leak: the network knows what is masked although its input does not say so; look for '
                                  'what else its forward reads'))
    return verdict(f'{int(target.sum())} hidden tokens exchanged, the outputs there moved by {moved:.1e}', faults)


@torch.no_grad()
def check_causal(model, x0):
    """In the causal mode a token must not move any prediction up to its own: x0 (N, T), of which the first row is used."""
    T, V = x0.size(1), model.config.vocab_size
    at = torch.linspace(0, T - 1, min(T, 16), device=x0.device).long()         # (n,), one row each
    rows = x0[:1].repeat(len(at), 1)                                           # (n, T)
    here = torch.arange(T, device=x0.device) == at[:, None]
    changed = torch.where(here, another_token(rows, V, torch.Generator(x0.device).manual_seed(0)), rows)
    moved = largest(model(changed, causal=True) - model(rows, causal=True), torch.arange(T, device=x0.device) <= at[:, None])
    return verdict(f'{len(at)} tokens exchanged, the predictions up to them moved by {moved:.1e}', [] if moved <= TOLERANCE else [
        ('problem', 'the causal mode sees what it has to predict: look at the attention mask and at the shift of the input')])


@torch.no_grad()
def check_packed(model, x0):
    """Texts that share a row must not see one another, in both modes: x0 (N, T), cut into two texts a row."""
    T, V, moved = x0.size(1), model.config.vocab_size, 0.0
    position = torch.arange(T, device=x0.device).expand(x0.shape)
    second, hidden = position >= T // 2, position % 2 == 1
    other = another_token(x0, V, torch.Generator(x0.device).manual_seed(0))
    for causal in (False, True):
        holes = torch.zeros_like(hidden) if causal else hidden
        for text in (second, ~second):
            before, after = (model(ids.masked_fill(holes, V), causal=causal, segment=second.long())
                             for ids in (x0, torch.where(text, other, x0)))
            moved = max(moved, largest(after - before, ~text), key=lambda value: (math.isnan(value), value))
    return verdict(f'one of two texts exchanged, the other one moved by {moved:.1e}', [] if moved <= TOLERANCE else [
        ('problem', 'texts that are packed into one row see one another: look at what attention does with segment')])


@torch.no_grad()
def check_context(model, x0, meta, seed=0):
    """What is visible has to matter: x0 (N, T), half of it masked, all that is visible exchanged."""
    free, V, generator = modelled(x0, meta)[0], model.config.vocab_size, torch.Generator(x0.device).manual_seed(seed)
    masked = random_subset(free, (free.sum(1) + 1) // 2, generator)
    other = torch.where(free, another_token(x0, V, generator), x0)
    moved = largest(model(other.masked_fill(masked, V)) - model(x0.masked_fill(masked, V)), masked)
    return verdict(f'the visible tokens exchanged, the outputs at the masks moved by {moved:.1e}', [] if moved > 1e-2 else [
        ('problem', 'the network guesses without looking at the text: it has not learned, or attention is cut off')])


# -----------------------------------------------------------------------------
# the weights of a checkpoint


def check_tensors(model, checkpoint, config):
    """The saved weights and their average: nothing that is not finite, and nothing all zero that was trained."""
    trained, faults = {name for name, _ in trained_tensors(model, config)}, []
    kinds = [kind for kind in ('model', 'ema') if checkpoint.get(kind)]
    for kind in kinds:
        for name, tensor in checkpoint[kind].items():
            if not torch.isfinite(tensor).all():
                faults.append(('problem', f'{kind}: {name} holds NaN or infinity, take an older checkpoint'))
            elif name in trained and not tensor.any():
                faults.append(('problem', f'{kind}: {name} is all zero, so it never learned'))
    num = sum(len(checkpoint[kind]) for kind in kinds)
    return verdict(f"{num} tensors ({', '.join(kinds)}), {checkpoint['iter_num']} steps", faults)


@torch.no_grad()
def silent_units(model, x0, meta, config):
    """The share of every block's ReLU units that are never active on rows x0 (N, T), in the modes that were trained: [share]."""
    active = [torch.zeros(block.fc.out_features, dtype=torch.bool, device=x0.device) for block in model.blocks]

    def watch(seen):
        def hook(layer, args, h):
            seen.logical_or_((h > 0).flatten(0, -2).any(0))
        return hook
    hooks = [block.fc.register_forward_hook(watch(seen)) for seen, block in zip(active, model.blocks)]
    free, generator = modelled(x0, meta)[0], torch.Generator(x0.device).manual_seed(0)
    if config['training_type'] != 'causal':
        model(x0.masked_fill(random_subset(free, (free.sum(1) + 1) // 2, generator), model.mask_token_id))
    if supports(config)[1]:
        model(x0, causal=True)
    for hook in hooks:
        hook.remove()
    return [1 - seen.float().mean().item() for seen in active]


def check_units(shares):
    """shares: see silent_units."""
    dead = [f'block {number}' for number, share in enumerate(shares) if share > 0.5]
    status = 'problem' if max(shares) > 0.95 else 'warning'
    return verdict('never active: ' + ', '.join(f'{share:.1%}' for share in shares) + ' of the units, by block', [
        (status, f"{', '.join(dead)}: most units are dead, lower the learning rates or warm up longer")] if dead else [])


# -----------------------------------------------------------------------------
# the suite


def set_up(s):
    """
    What is to be diagnosed: (the settings of train.py as a dict, model, checkpoint), the last two None for train_args.

    Raises UserError for words that train.py would refuse, and where it is not clear what is meant.
    """
    if not s.train_args:
        model, checkpoint = load(s, find_checkpoint(s.init_from, s.out_dir), learns=True)
        known = configurator.settings(train.__file__)
        return {name: checkpoint['config'].get(name, setting.default) for name, setting in known.items()}, model, checkpoint
    if s.init_from != 'ckpt':
        raise UserError('diagnose takes train_args, a set-up, or init_from, a checkpoint and its set-up, but not both')
    try:
        words = shlex.split(s.train_args)
    except ValueError as error:
        raise UserError(f"train_args='{s.train_args}': {error}") from None
    config = configurator.configure(dict(vars(train)), words)
    if config['init_from'] != 'scratch':
        raise UserError('train_args starts from a checkpoint, but what is diagnosed is a fresh network: leave its init_from out; '
                        f"the checkpoint itself is diagnosed by --init_from={config['init_from']} without train_args")
    return config, None, None


def fresh_network(config, meta):
    """The network with which train.py would start."""
    torch.manual_seed(config['seed'])
    known = {field.name for field in fields(GPTConfig)}
    model = GPT(GPTConfig(**{name: value for name, value in config.items() if name in known}, vocab_size=meta['vocab_size']))
    model.mask_logit_bias.fill_(config['mask_logit_bias'])
    return model


def set_up_checks(s, config, meta, data, model, choices):
    """
    [(name, the check, to be called)] of a set-up; model is its fresh network. What several of them need is made once.

    If there are ids that the network has no row for, that is the one check: the others need them.
    """
    on = next(model.parameters()).device
    generator = torch.Generator(on).manual_seed(s.seed)
    counts = {split: token_counts(np.asarray(ids)) for split, ids in data.items()}
    vocabulary = ('vocabulary', lambda: check_vocabulary(counts, meta))
    if any(count[meta['vocab_size']:].any() for count in counts.values()):
        return [vocabulary]
    x0 = random_rows(data['train'], min(32, max(2, 4096 // config['block_size'])), config['block_size'],
                     torch.Generator().manual_seed(s.seed)).to(on)             # (N, T)
    rows = len(data['train']) / (1 if meta['format'] == 'rows' else config['block_size'])
    tokens = int(text_counts(counts['train'], meta).sum())

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
            ('initial loss', lambda: check_initial_loss(initial_losses(model, x0, meta, generator))),
            ('gradients', lambda: check_gradients(steps()[1])),
            ('memorisation', lambda: check_memory(*learned()[1], config)),
            *leak_checks('', lambda: learned()[0], x0, meta),
            ('speed', lambda: check_speed(choices, steps()[0], config))]


def leak_checks(prefix, network, x0, meta):
    """[(name, the check)] for leaks: network() is the one to examine, x0 (N, T) rows to do it with."""
    return [(f'{prefix}leak: hidden tokens', lambda: check_hidden_tokens(network(), x0, meta)),
            (f'{prefix}leak: causal', lambda: check_causal(network(), x0)),
            (f'{prefix}leak: packed texts', lambda: check_packed(network(), x0)),
            (f'{prefix}context', lambda: check_context(network(), x0, meta))]


def run(s):
    """
    The suite with bench's settings s: (rows of name, status, measured, advice; the summary). Every result is printed at once.
    """
    config, trained, checkpoint = set_up(s)
    if not checkpoint:                                                         # the others were checked when they were trained
        train.check_settings(dict(config, fsdp=False))                         # of many processes here is one
    meta, data = data_of(checkpoint['meta'], config) if checkpoint else load_data(config['dataset'], config['coarse'])
    train.check_fits(config, meta)
    if checkpoint:
        check_same_model('the checkpoint', identity(checkpoint), f"data/{config['dataset']}", meta, ('vocab_size', 'itos'))
    model = fresh_network(config, meta)
    # the set-up's own choices, unless bench was told others; a checkpoint's were for the machine that it was trained on
    chosen = {name: config[name] if getattr(s, name) == 'auto' and not checkpoint else getattr(s, name)
              for name in ('device', 'dtype', 'attention')}
    model, choices = configure_compute(model, **chosen)
    checks = set_up_checks(s, config, meta, data, model, choices)
    if checkpoint and len(checks) > 1:
        x0 = spread_rows(data['val'], min(32, s.eval_rows), config['block_size']).to(next(trained.parameters()).device)
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
