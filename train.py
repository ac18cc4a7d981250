"""
Train a masked-diffusion language model that can find and fix its own mistakes.

    python train.py config/remask_all.py                     one network: unmask, detect wrong tokens, write causally
    python train.py config/unmask.py --max_iters=500         plain masked diffusion, shorter
    python train.py config/remask_all.py --init_from=resume  go on where the last checkpoint stands
    torchrun --standalone --nproc_per_node=2 train.py ...    the same by two processes, see distributed.py

Training is one weighted cross-entropy: every training type, corruption and curriculum only decides (input, target,
weight). See corrupt in corruption.py, and loss. Beside the checkpoint out_dir holds log.jsonl and curves.png.
"""

import configurator

configurator.help_first(globals())           # --help shall not wait for torch
# ruff: noqa: E402 (so the imports come after it)

import copy
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import fields

import torch
import torch.nn.functional as F

from plumbing import distributed
from plumbing.text import encode, load_task
from plumbing.checkpoint import (append_line, check_overwrite, check_unlocked, checkpoint_name, last_good, load_guesser, load_start, lock,
                        make_checkpoint, make_folder, model_args, random_states_of_ranks, restore, save_checkpoint, unlock)
from plumbing.checks import check_fits, check_settings
from configurator import UserError
from corruption import KINDS, NOISE, corrupt, extent, modelled, own_errors, own_guesses, pack, parse_mixture
from plumbing.log import draw_curves, start_log
from data.loader import load_data, random_rows, spread_rows
from plumbing.device import configure_compute
from plumbing.evaluate import evaluate, evaluation_line
from plumbing.textstats import compare_text, usual_text
from model import GPT, GPTConfig, norm, places
from plumbing.optim import average, lr_scale, make_optimizers, update
from plumbing.pieces import in_pieces
from rules import best_rules, supports
from sample import find_checkpoint, generate

# -----------------------------------------------------------------------------
# I/O
out_dir = 'out'                  # where checkpoints go
init_from = 'scratch'            # scratch | resume | the path of a checkpoint to start from; 'ckpt': the newest under out_dir
eval_interval = 250              # steps between evaluations; each one also saves a checkpoint
eval_rows = 1000                 # rows of the validation split that an evaluation uses
eval_samples = 100               # samples drawn at every evaluation, of text at most 16; the first few are printed
sample_prompt = ''               # text that these samples start with
eval_only = False                # evaluate once, then exit
log_interval = 25                # steps between lines on screen
overwrite = False                # write over a checkpoint in out_dir that is of another network or dataset
keep_every = 0                   # also keep a numbered checkpoint every so many steps; 0: only the newest
wandb_log = False                # log to Weights & Biases as well
wandb_project = 'nanoremask'     # its project
wandb_run_name = 'run'           # its run; the training type is appended
# data
dataset = 'arithmetic'           # a folder under data/; it is prepared on the first run
coarse = ''                      # characters that all become the first of them: 0123456789 leaves the skeleton of a string
batch_size = 64                  # rows of a batch, of all processes together
gradient_accumulation_steps = 1  # batches a step; their gradients are averaged
block_size = 64                  # length of a row
# the task: what becomes (input, target, weight)
training_type = 'joint'          # unmasking | remasking | joint | denoising | causal
causal_ratio = 0.0               # share of every batch that trains the causal mode (next token, causal attention)
views = 0                        # n: every row trains the training type n times, corrupted anew, the causal rows too
remask_ratio = 0.5               # joint, denoising: share of the other rows in which visible tokens may be wrong
corruption = 'own'               # own (the network's guesses) | random | fragment | sticky, or own:0.7,random:0.3
guess_from: str = None           # corruption=own: the checkpoint whose guesses they are; None: the network itself
sigma_min = 0.1                  # denoising: least noise level, the share of the tokens that are hit
sigma_max = 0.9                  # denoising: highest noise level
high_noise_bias = 0.0            # denoising: share of the rows with a level from the upper fifth
prefix_ratio = 0.0               # share of the rows whose first 1..16 tokens are given: trained for hybrid generation
noise_mix = 'mask:0.5,replace:0.2,swap:0.15,delete:0.075,insert:0.075'  # denoising: what happens to a token
remasking_loss_type = 'all_positions'  # all_positions: clean visible tokens count too | corrupted_only
remask_target = 'wrong'          # at a wrong token the target is [WRONG] | original: the clean token
weight_unmask_task = 1.0         # weight of the masked positions
mask_weighting = 'row'           # row: the masks of a row share that weight (the NELBO) | token: all masks weigh alike
weight_remask_task = 1.0         # weight of the visible positions
penalty_mask_correct = 1.0       # weight of a clean visible token, times weight_remask_task: the price of doubting it
reward_correct_unmask = 1.0      # r: a masked position weighs r + (1 - r)(1 - p(x0)); 1: plain cross-entropy
proofreading_warmup_iters = 500  # curriculum: steps until remask_ratio is reached, linearly from 0
masking_warmup_iters = 500       # curriculum: steps until penalty_mask_correct is reached, linearly from 0
# abstention: [MASK] as an answer, for positions that are not ready yet
allow_abstain = False            # a masked position costs -log(p(x0) + price * p(MASK)) instead of -log p(x0)
penalty_keep_mask = 0.1          # that price, in 0..1: what p(MASK) is worth; 0: nothing. The controller starts from it
target_mask_prob = 0.0           # the controller holds the mean p(MASK) of masked positions here; 0: no controller
mask_logit_bias = 0.0            # added to the logit of [MASK]; the controller starts from it (a checkpoint has its own)
mask_control_rate = 0.4          # how far one step of the controller moves bias and price, a unit of error
mask_bias_limit = 20.0           # the controller never takes the bias beyond this
# model
n_layer = 2                      # blocks in the stack
n_head = 4                       # attention heads
n_embd = 128                     # width
n_recur = 2                      # how often the stack is applied
dropout = 0.0                    # for small data and long runs
noise_condition = False          # tell the network which share of its canvas is masked; when denoising, which is noise
self_condition = False           # show it its previous prediction; half of the rows go without
stage = 0                        # a short way to set 1: time_dim=128, 2: and k1_credit, 3: and graph_window=8; 0: nothing
time_dim = 0                     # noise_condition by an MLP of that width; 0: off
graph_window = 0                 # graph attention: every head may turn to a position's neighbours, so many to each side; 0: off
graph_topk = 4                   # graph attention: the so many most similar positions are neighbours too
mu_blocks = 0                    # the embedding as so many blocks that exchange information; 0: off
short_conv = 0                   # every block first mixes in so many neighbours to each side, a weight a channel; 0: off
shortcuts = False                # every block is shown the embedding and the first block's values again, by weights it learns
bigram_rows = 0                  # embeddings of pairs of neighbours, looked up in tables of so many rows: no products; 0: off
draft_head = False               # train a head that drafts for --remask=causal: the same law in far fewer passes
# optimiser
optimizer = 'muon'               # muon: torch.optim.Muon for the matrices, AdamW for the rest | adamw: for everything
max_iters = 2000                 # steps
muon_lr = 0.02                   # peak rate of Muon
learning_rate = 3e-3             # peak rate of AdamW
weight_decay = 0.0               # of the matrices
bigram_decay = 0.0               # of the tables of pairs: what is seen rarely is not learned by heart
beta1 = 0.9                      # AdamW
beta2 = 0.95                     # AdamW
grad_clip = 1.0                  # largest gradient norm; 0: off
k1_credit = False                # then scale down the tensors whose gradient is below the mean, see give_credit in optim.py
lr_schedule = 'wsd'              # wsd: warmup, stable, linear decay to 0 | cosine: warmup, cosine to 0
warmup_iters = 50                # steps of linear warmup
decay_share = 0.4                # wsd: the share of max_iters that decays
max_bad_steps = 10               # a step whose loss or gradient is not finite is skipped; so many in a row stop the run
ema_decay = 0.99                 # average of the weights that evaluation and sampling use; 0: off
# system
seed = 1337                      # of weights, batches and corruption
device = 'auto'                  # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'                   # auto | float32 | bfloat16
attention = 'auto'               # auto | plain | sdpa
fsdp = False                     # the processes of torchrun share the network instead of each having it whole
compile = False                  # torch.compile the network; a minute of waiting, then faster
# -----------------------------------------------------------------------------

STAGES = (dict(time_dim=128), dict(k1_credit=True), dict(graph_window=8))  # what each one turns on, beside those before it
PARTS = ('causal', 'draft', 'unmask', 'detect', 'keep', 'p(MASK)')  # of the loss, see training_step


# -----------------------------------------------------------------------------
# the loss


def loss(model, input, target, weight, causal=False, reward_correct_unmask=1.0, keep_mask_price=None, pad_id=None, at=None,
         hidden=None):
    """
    The one weighted cross-entropy: (sum of weight * CE, {task: (sum of weight * CE, sum of weight)}).

    input, target, weight (B, T). Only positions that carry weight are projected to the vocabulary. At masked positions
    and in the causal mode the softmax runs over the V real tokens. A masked position's weight is scaled by
    r + (1 - r)(1 - p(x0)), r = reward_correct_unmask: what is known already teaches less, but never nothing.
    keep_mask_price: not None lets a masked position abstain: its softmax has [MASK] too, and it costs
    -log(p(x0) + price * p(MASK)), price in [0, 1): unsure is cheaper than wrong and dearer than right. The parts then
    hold 'p(MASK)', its sum and count over masked tokens that are not padding. (diffusion_lm_report, without the argmax.)
    at (N,), hidden (N, C): places(weight > 0), and what the network said there, if that is known already.
    """
    at = places(weight > 0) if at is None else at                              # (N,)
    hidden = model(input, causal=causal, only=at) if hidden is None else hidden              # (N, C)
    input, target, weight = (ids.flatten()[at] for ids in (input, target, weight))               # (N,)
    masked = (input == model.mask_token_id) | causal
    abstains = keep_mask_price is not None and not causal
    only_real = causal or (bool(masked.all()) and not abstains)                # one pass over the vocabulary less

    def of(hidden, words, at):
        """What the tokens at cost: (the sum of weight * CE, (weight * CE, weight, p(MASK) or nothing)), (n,) each."""
        logits, here, w = model.logits(hidden, only_real, words), masked[at], weight[at]                 # (n, V+2)
        if only_real:
            ce = F.cross_entropy(logits, target[at], reduction='none')         # (n,)
        else:
            closed = torch.arange(logits.size(-1), device=logits.device) >= model.mask_token_id + abstains
            logp = logits.masked_fill(here[:, None] & closed, float('-inf')).log_softmax(-1)
            ce = -logp.gather(1, target[at, None])[:, 0]
        known, keep = (-ce.detach()).exp(), ()                                 # p(x0), whatever abstaining is worth
        if abstains:
            keep = logp[:, model.mask_token_id]
            price = torch.tensor(keep_mask_price, device=keep.device).log()
            ce = torch.where(here, -torch.logaddexp(-ce, keep + price), ce)
            keep = (keep.detach().exp(),)
        if reward_correct_unmask != 1.0:
            w = torch.where(here, w * (1 - (1 - reward_correct_unmask) * known), w)
        return (w * ce).sum(), ((w * ce).detach(), w, *keep)

    total, (weighted, weight, *keep) = in_pieces(of, hidden, model.wte.weight, model.most_logits)
    wrong = ~masked & (target != input)
    tasks = {'causal': masked} if causal else {'unmask': masked, 'detect': wrong, 'keep': ~masked & ~wrong}
    parts = {name: torch.stack(((weighted * which).sum(), (weight * which).sum())) for name, which in tasks.items()}
    if abstains:
        counted = masked if pad_id is None else masked & (target != pad_id)
        parts['p(MASK)'] = torch.stack(((keep[0] * counted).sum(), counted.sum()))
    return total, parts


def draft_loss(model, hidden, x0, weight, depth=6, most=256):
    """
    What teaches the draft head: (the mean CE, {'draft': (sum of weight * CE, sum of weight)}).

    x0 (B, T) ids, hidden (B, T, C) of the causal pass over them, weight (B, T), > 0 where a token is modelled. From the state of
    these positions (of more than most of them, most spread evenly) the head is fed the true tokens one by one and asked for
    the next one, up to depth tokens ahead. State and embeddings are detached: the head learns from the network, the network
    nothing from the head. The shapes never change, because a CPU prepares its matrix products anew for every new shape.
    """
    row, at = (weight > 0).nonzero(as_tuple=True)                              # (N,) each
    pick = torch.arange(most, device=row.device)
    inside = pick < len(row)                                                   # (most,)
    pick = (pick * max(1, len(row) / most)).long().clamp(max=len(row) - 1)
    row, at = row[pick], at[pick]
    state, total, count = hidden.detach()[row, at], 0.0, 0
    words = model.wte.weight.detach()                                          # (rows, C)

    def of(hidden, words, at):
        """The sum of the CE of the tokens at, those that count, see in_pieces."""
        logits = F.linear(hidden, words.to(hidden.dtype))[:, :model.mask_token_id].float()       # (n, V)
        return (F.cross_entropy(logits, target[at], reduction='none') * inside[at]).sum(), ()

    for _ in range(depth):
        state = model.draft(state, x0[row, at])
        inside = inside & (at + 1 < x0.size(1))
        at = (at + 1).clamp(max=x0.size(1) - 1)
        inside = inside & (weight[row, at] > 0)
        target = x0[row, at]                                                   # (most,)
        total = total + in_pieces(of, norm(state), words, model.most_logits)[0]
        count = count + inside.sum()
    mean = total / count.clamp(min=1)
    return mean, {'draft': torch.stack((mean.detach(), torch.ones_like(mean)))}


def steer(control, p_mask, target_mask_prob, rate, bias_limit):
    """
    One step of the controller that holds the mean p(MASK) over masked inputs at target_mask_prob: the new control.

    control: dict(p_mask, the moving average of what is measured; bias, on the logit of [MASK]; price, of abstaining, see
    loss); p_mask: (sum, count) of this step, summed over all ranks here. Bias and log-odds of the price make the same
    moves, those of a PI controller. The optimiser undoes any constant bias, because the best p(MASK) depends on the price
    alone; so the price is what holds the set point in the end, and the bias only makes the loop quick. Since the two move
    together, the bias is bounded by what the price needs. With a price of 0, as in the report, the price cannot move and
    the bias has to grow for ever. Where one of the two is at its limit and the error pushes further, both wait
    (anti-windup).
    """
    total, count = distributed.total(p_mask).tolist()
    if not count:
        return control
    now = total / count
    average = now if control['p_mask'] is None else 0.8 * control['p_mask'] + 0.2 * now
    before = average if control['p_mask'] is None else control['p_mask']
    move = rate * (target_mask_prob - average + 20 * (before - average))       # PI, 20 steps: about how fast p(MASK) follows
    bias, price = control['bias'] + move, control['price']
    if price:
        odds = price / (1 - price) * math.exp(move)
        price = odds / (1 + odds)
    if abs(bias) > bias_limit or (price and not 1e-6 < price < 1 - 1e-6):
        bias, price = control['bias'], control['price']
    return dict(p_mask=average, bias=bias, price=price)


# -----------------------------------------------------------------------------
# samples on the way


def show_samples(model, meta, config, num, usual=None, shown=4, seed=0):
    """
    Draws num samples by the best rules that the checkpoint supports, prints a few, returns the task's score, or for text without
    a task what compare_text says. usual: see usual_text.
    """
    if config['training_type'] == 'remasking' or not num:
        return {}
    task, prompt = load_task(meta['name']), encode(meta, config['sample_prompt'])
    drawn = generate(model, meta, usual['num'] if usual else num, prompt=prompt, seed=seed, **best_rules(config))
    samples = [sample['text'] for sample in drawn]
    for text in samples[:shown]:
        print(f'    {text}   {task.verdict(text)}' if task else f'    {text!r}')
    if not task:
        return compare_text([text[len(config['sample_prompt']):] for text in samples],
                            [sample['tokens'][usual['start']:] for sample in drawn], usual)
    score = task.score(samples)
    print(f"    {score['valid']:.0%} of {num} samples are well formed, {score['correct']:.0%} have the right value")
    return {name: score[name] for name in ('valid', 'correct')}


# -----------------------------------------------------------------------------
# the run


def ramp(step, warmup_iters):
    """A curriculum: 0 at step 0, 1 from warmup_iters on, linear between."""
    return min(1.0, step / warmup_iters) if warmup_iters else 1.0


def staged(config):
    """The config with what its stage turns on; what is on already keeps its value. Raises UserError for an unknown stage."""
    if not 0 <= config['stage'] <= len(STAGES):
        raise UserError(f"stage expects 0 to {len(STAGES)}, got {config['stage']}")
    implied = {name: value for switches in STAGES[:config['stage']] for name, value in switches.items()}
    return {**config, **{name: config[name] or value for name, value in implied.items()}}


def curricula(step, config):
    """What changes while training goes on: dict of remask_ratio and penalty_mask_correct at this step."""
    return dict(remask_ratio=config['remask_ratio'] * ramp(step, config['proofreading_warmup_iters']),
                penalty_mask_correct=config['penalty_mask_correct'] * ramp(step, config['masking_warmup_iters']))


def conditioned(model, input, segment, level, only):
    """
    The hidden states (N, C) at the places only (N,) of canvases (R, T), the network being told what it is conditioned on.

    noise_condition, time_dim: the level (R, T) of noise. self_condition: its own prediction at the masks, from a pass before;
    every other row goes without, so that the network can start from nothing.
    """
    previous = None
    if model.previous is not None:
        with torch.no_grad():
            shown = (input == model.mask_token_id) & (torch.arange(len(input), device=input.device) % 2 == 0)[:, None]
            first = model(input, segment=segment, level=level, only=places(shown))           # (n, C)
            guess = model.logits(first, real_only=True).argmax(-1)             # (n,)
        previous = torch.full_like(input, model.mask_token_id).masked_scatter(shown, guess)
    if model._compiled_call_impl is not None:                                  # compiled once for any number of them
        torch._dynamo.maybe_mark_dynamic(only, 0)
    return model(input, segment=segment, previous=previous, level=level, only=only)


def training_step(model, x0, meta, config, step, generator, price=None, guesser=None):
    """
    One batch, forward and backward: adds to the gradients, returns the parts of the loss by task.

    price: see loss; guesser: the network that makes the wrong tokens of corruption='own' (None: the model itself).
    Of several processes each has its rows x0 of the batch; the mean of their gradients is that of the whole batch.
    """
    num, accumulate, ramped = x0.size(0), config['gradient_accumulation_steps'], curricula(step, config)
    batch = num * distributed.world()                                          # rows over all processes
    all_causal = batch if config['training_type'] == 'causal' else round(batch * config['causal_ratio'])
    num_causal = distributed.share(all_causal)
    free, real = modelled(x0, meta)
    count = distributed.total(real[:num_causal].sum())                         # tokens that they model causally
    parts = {}
    if num_causal:
        rows, counted, segment = x0[:num_causal], real[:num_causal], None
        if meta['pad'] is not None:                                            # the causal pass needs no padding
            rows, counted, segment = pack(x0.size(1) - counted.flip(1).long().argmax(1), rows, counted)
        weight = counted * (all_causal / count)
        hidden, at = model(rows, causal=True, segment=segment), places(weight > 0)
        here = hidden.flatten(0, 1).index_select(0, at)                        # (N, C)
        total, parts = loss(model, rows, rows, weight, causal=True, at=at, hidden=here)
        (total / (num * accumulate)).backward()
        if model.drafter is not None:
            mean, more = draft_loss(model, hidden, rows, weight)               # over tokens picked by each process for itself
            part = num_causal * distributed.world() / all_causal
            (mean * part / accumulate).backward()
            parts.update(draft=more['draft'] * part)
    others = x0.repeat(config['views'], 1) if config['views'] else x0[num_causal:]
    if len(others) and config['training_type'] != 'causal':
        x0, (free, real) = others, modelled(others, meta)
        before, all_others = (0, batch * config['views']) if config['views'] else (all_causal, batch - all_causal)
        wrong = distributed.share(before + round(all_others * ramped['remask_ratio'])) - distributed.share(before)
        ramped['remask_ratio'] = wrong / len(x0)                               # the rows that may have wrong tokens, as a share
        input, target, weight = corrupt(
            x0, free, real, mask_token_id=model.mask_token_id,
            wrong_token_id=model.wrong_token_id, pad_id=meta['pad'], generator=generator,
            guess=own_guesses(guesser or model, generator), corruption=parse_mixture('corruption', config['corruption'], KINDS),
            sigma=(config['sigma_min'], config['sigma_max'], config['high_noise_bias']),
            noise_mix=parse_mixture('noise_mix', config['noise_mix'], NOISE), **ramped,
            **{name: config[name] for name in ('training_type', 'remasking_loss_type', 'remask_target', 'prefix_ratio',
                                               'weight_unmask_task', 'weight_remask_task', 'mask_weighting')})
        noisy = input != x0 if config['training_type'] == 'denoising' else input == model.mask_token_id
        segment, level = None, noisy.float().mean(1, keepdim=True).expand(x0.shape)  # (B, T); joint: wrong tokens are its to find
        if meta['pad'] is not None:
            length = extent(input, weight, meta['pad'], generator)
            input, target, weight, level, segment = pack(length, input, target, weight, level)
        at = places(weight > 0)                                                # (N,)
        hidden = conditioned(model, input, segment, level, at)                 # (N, C)
        total, more = loss(model, input, target, weight, reward_correct_unmask=config['reward_correct_unmask'],
                           keep_mask_price=price, pad_id=meta['pad'], at=at, hidden=hidden)
        (total / (num * max(1, config['views']) * accumulate)).backward()
        parts.update(more)
    return parts


def progress_line(step, config, record, speed):
    """The line on screen: losses by task since the last one, curricula, controller, speed and time left."""
    words = [f'{name} {record[name]:.3f}' for name in PARTS if name in record]
    if config['target_mask_prob']:
        words.append(f"bias {record['mask_logit_bias']:+.2f}  price {record['penalty_keep_mask']:.2f}")
    if config['training_type'] in ('joint', 'remasking', 'denoising'):
        words.append(f"proofreading {ramp(step, config['proofreading_warmup_iters']):.0%}"
                     f"  masking penalty {ramp(step, config['masking_warmup_iters']):.0%}")
    if record.get('skipped'):
        words.append(f"skipped {record['skipped']}")
    left = int((config['max_iters'] - step) / speed)
    return f"step {step}/{config['max_iters']}  {'  '.join(words)}  {speed:.1f} it/s  {left // 60}:{left % 60:02d} left"


def is_finite(model, parts):
    """Whether the gradients of a step and its losses (see training_step) are all finite; waits once for the device."""
    total = distributed.grad_norm(model.parameters())
    return torch.cat((total[None], *parts.values())).isfinite().all().item()


def check_finite(model, skipped, step, path, max_bad_steps):
    """Raises UserError if a weight is not finite, or the last max_bad_steps steps were skipped: nothing is saved then."""
    finite = all(torch.isfinite(p).all() for p in distributed.local(model.parameters()))
    for bad, what in ((skipped['in_a_row'] >= max_bad_steps, f"loss or the gradient of {skipped['in_a_row']} steps in a row"),
                      (distributed.anywhere(not finite), 'network')):
        if bad:
            raise UserError(f'the {what} is no longer finite at step {step}: lower --learning_rate or --muon_lr, '
                            f'or set --dtype=float32; {last_good(path)}')


def stop_on_signal():
    """After Ctrl-C or SIGTERM the step is finished and saved; a second Ctrl-C stops at once."""
    stop = {'asked': False}

    def ask(signum, frame):
        stop['asked'] = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print('finishing the step, then saving ...', flush=True)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop


def load_rows(config):
    """load_data for a run, checked. Raises UserError if it does not fit."""
    meta, data = load_data(config['dataset'], config['coarse'])
    check_fits(config, meta)
    return meta, data


def to_device(x, device):
    """x on the device; on a GPU the program does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else x.to(device)


def start_wandb(config):
    """A run of Weights & Biases. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError('wandb_log needs Weights & Biases: pip install wandb') from None
    name = f"{config['wandb_run_name']}_{config['training_type']}"
    return wandb.init(project=config['wandb_project'], name=name, config=config)


def train():
    config = staged({name: globals()[name] for name in configurator.settings(__file__)})
    place = distributed.connect(device)
    check_settings(config)                                                     # before any work
    rank, world = distributed.rank(), distributed.world()
    newest = os.path.join(out_dir, checkpoint_name(training_type, remasking_loss_type))
    with distributed.together():
        replaced = check_overwrite(newest, config) if rank == 0 else ''
        if rank == 0 and not eval_only:
            check_unlocked(out_dir)
        if distributed.first_here():                                           # which makes the dataset if it is not there
            meta, data = load_rows(config)
    with distributed.together():
        if not distributed.first_here():
            meta, data = load_rows(config)
        torch.manual_seed(seed)
        sizes = {field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}
        args = model_args(GPTConfig(vocab_size=meta['vocab_size'], **sizes))
        model = GPT(GPTConfig(**args))
        path, checkpoint = newest, {}
        if init_from not in ('resume', 'scratch'):
            path = find_checkpoint(init_from, out_dir)
        if init_from != 'scratch':
            weights, checkpoint = load_start(path, config, args, meta)
            model.load_state_dict({**model.state_dict(), **weights})           # what the checkpoint did not have yet stays
            del weights
        guesser = load_guesser(guess_from, args, meta) if guess_from else None
        if guesser:
            configure_compute(guesser, place, dtype, attention, compile)
        model, choices = configure_compute(model, place, dtype, attention, compile)
    distributed.same_weights(model)
    on = next(model.parameters()).device
    ema = copy.deepcopy(model.cpu() if fsdp else model) if ema_decay else model
    if fsdp:                                                                   # on the device it is never there twice in whole
        distributed.shard(model, on)
        distributed.shard(ema, on)
    optimizers = make_optimizers(model, optimizer, learning_rate, muon_lr, weight_decay, (beta1, beta2), bigram_decay)
    generator = torch.Generator().manual_seed(seed)                            # which rows
    noise = torch.Generator(on).manual_seed(seed + 1)                          # how they are corrupted
    start, sums, skipped, elsewhere = 0, {}, dict(steps=0, in_a_row=0), ''
    if init_from == 'resume':
        with distributed.together():
            ranks = random_states_of_ranks(checkpoint)
            checkpoint['rng'] = ranks[rank if len(ranks) == world else 0]
            start, sums, control, skipped = restore(path, checkpoint, ema if ema_decay else None, optimizers, generator, noise)
        began = checkpoint['config'].get('init_from', 'scratch')
        config['init_from'] = 'scratch' if began == 'resume' else began        # what an older version says
        if not target_mask_prob:                                               # else it is the controller's
            control['price'] = penalty_keep_mask
        kind = checkpoint['rng'].get('where', on.type)
        if len(ranks) != world:
            elsewhere = f'number of processes: {len(ranks)} before, {world} now'
        elif kind != on.type:
            elsewhere = f'device: {kind} before, {on.type} now'
    else:
        if init_from == 'scratch':
            for network in (model, ema):
                network.mask_logit_bias.fill_(mask_logit_bias)
        control = dict(p_mask=None, bias=model.mask_logit_bias.item(), price=penalty_keep_mask)
    spent = checkpoint.get('seconds', 0.0) if init_from == 'resume' else 0.0
    del checkpoint                                                             # it may be as large as all the rest
    if elsewhere or (rank and init_from != 'resume'):                          # every rank draws something else
        torch.manual_seed(seed + start + 10_000 * rank)
        noise.manual_seed(seed + start + 10_000 * rank + 1)
    print(f"{choices}{f', {world} processes' if world > 1 else ''}\n{model.num_params():,} parameters; {training_type} on "
          f"{dataset}: {meta['train_tokens']:,} training tokens, vocabulary {meta['vocab_size']} + [MASK] + [WRONG]")
    if init_from != 'scratch':
        print(f'starting from {path}, step {start}')
    if elsewhere:
        print(f'{elsewhere}; the run goes on, but no longer to the last bit the same')
    if replaced:
        print(replaced)

    run, usual, log, plotted = None, None, os.path.join(out_dir, 'log.jsonl'), False
    with distributed.together():
        if rank == 0:
            writes = eval_samples and training_type != 'remasking' and not load_task(meta['name'])
            usual = usual_text(data['train'], meta, config) if writes else None
            make_folder(out_dir)
            if not eval_only:
                lock(out_dir)
                start_log(log, start)
            run = start_wandb(config) if wandb_log and not eval_only else None
    val = spread_rows(data['val'], eval_rows, block_size)
    can_unmask, causal, detects = supports(config)
    stop = stop_on_signal()
    marks = [(start, time.time())]
    began = time.time() - spent                                                # evaluations and saves taken out

    def attempt(action, *args, last=False):
        """What an action on files returns. A full disk costs a line on screen, and only the last checkpoint costs the run."""
        try:
            return action(*args)
        except (OSError, UserError) as error:
            if last:
                raise UserError(f'{error}; {last_good(newest)}') from error
            print(f'{error}; the run goes on, {last_good(newest)}', flush=True)

    def write(record):
        if rank == 0:
            attempt(append_line, log, json.dumps(record))
        if run:
            run.log(record)

    def save(path, state, last=False):
        attempt(save_checkpoint, path, dict(state, seconds=t0 - began), last=last)  # wall time of the training steps

    asked = False
    for step in range(start, max(start * eval_only, max_iters) + 1):
        asked = distributed.anywhere(stop['asked'])
        t0, stopping = time.time(), step == max_iters or asked
        due = eval_only or step == max_iters or (step % eval_interval == 0 and (step > start or not start))
        numbered = keep_every and step % keep_every == 0 and step > start
        if due or numbered or stopping:
            check_finite(model, skipped, step, newest, max_bad_steps)
            result, shown = {}, distributed.whole_model(ema) if due else None
            with distributed.together():                                       # rank 0 evaluates, the others wait
                if due and rank == 0:
                    result = evaluate(shown, val, meta, causal=causal, bidirectional=can_unmask,
                                      own_errors=own_errors if detects and can_unmask else None, seed=seed)
                    print(evaluation_line(step, result))
                    result.update(show_samples(shown, meta, config, eval_samples if step or eval_only else 0, usual))
            if eval_only:
                break
            if due:
                write({'step': step, **result})
            del shown                                                          # with fsdp it is whole, as is what follows
            if step > start:
                state = make_checkpoint(model, ema, optimizers, generator, noise, step, sums, control, skipped, args, config,
                                        meta, result)
                if world > 1:
                    state['rng']['ranks'] = distributed.gather(state['rng'])
                with distributed.together():
                    if rank == 0 and (due or stopping):
                        save(newest, state, last=stopping)
                        plotted = attempt(draw_curves, log, os.path.join(out_dir, 'curves.png'))
                    if rank == 0 and numbered:
                        name = checkpoint_name(training_type, remasking_loss_type, step)
                        save(os.path.join(out_dir, name), dict(state, result={}))
                del state
        if stopping:
            break
        pause = time.time() - t0
        began, marks = began + pause, [(at, when + pause) for at, when in marks]   # speed is the speed of training

        scale = lr_scale(step, lr_schedule, max_iters, warmup_iters, decay_share)
        model.train()
        parts = {}
        for _ in range(gradient_accumulation_steps):
            x0 = to_device(distributed.rows_of_rank(random_rows(data['train'], batch_size, block_size, generator)), on)
            more = training_step(model, x0, meta, config, step, noise, control['price'] if allow_abstain else None, guesser)
            parts = {name: parts.get(name, 0) + more.get(name, 0) for name in {**parts, **more}}
        own = parts.get('p(MASK)', torch.zeros(2, device=on))                  # of this process: steer sums over all of them
        parts = distributed.average_gradients(model, parts, PARTS)             # from here on all processes do the same
        good = is_finite(model, parts)
        skipped = dict(steps=skipped['steps'] + (not good), in_a_row=0 if good else skipped['in_a_row'] + 1)
        if good:
            sums = {name: sums.get(name, 0) + parts.get(name, 0) for name in {**sums, **parts}}
            if target_mask_prob and 'p(MASK)' in parts:
                control = steer(control, own, target_mask_prob, mask_control_rate, mask_bias_limit)
                model.mask_logit_bias.fill_(control['bias'])
            update(model, optimizers, config, scale)
            if ema_decay:
                average(ema, model, min(ema_decay, (1 + step) / (10 + step)))  # a young average forgets its start
        elif skipped['in_a_row'] == max_bad_steps:
            check_finite(model, skipped, step, newest, max_bad_steps)
        model.zero_grad(set_to_none=True)

        if (step + 1) % log_interval == 0:
            marks = marks[-20:] + [(step + 1, time.time())]
            speed = (marks[-1][0] - marks[0][0]) / max(1e-9, marks[-1][1] - marks[0][1])
            losses = {name: part.tolist() for name, part in sums.items()}
            record = {'step': step + 1, **{name: total / weight for name, (total, weight) in losses.items() if weight > 0},
                      'learning_rate': scale * learning_rate, **({'skipped': skipped['steps']} if skipped['steps'] else {}),
                      **(curricula(step + 1, config) if detects else {}),
                      **(dict(mask_logit_bias=control['bias'], penalty_keep_mask=control['price']) if allow_abstain else {})}
            print(progress_line(step + 1, config, record, speed), flush=True)
            write(record)
            sums = {}
    if asked and step < max_iters and not eval_only:
        command = f'python train.py {shlex.join(sys.argv[1:])}' if world == 1 else 'the same torchrun command and'
        print(f'stopped; go on with: {command} --init_from=resume')
    elif not eval_only:
        print(f'losses and validation: {log}' + (', curves.png' if plotted else ' (pip install matplotlib for curves.png)'))
        print(f'saved {newest}; sample from it: python sample.py --init_from=' + ('ckpt' if out_dir == 'out' else newest))


def main():
    try:
        train()
    finally:
        unlock(out_dir)
        distributed.disconnect()


if __name__ == '__main__':
    distributed.run(globals())
    distributed.leave()
