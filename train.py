"""
Train a masked-diffusion language model that can find and fix its own mistakes.

    python train.py config/remask_all.py                     one network: unmask, detect wrong tokens, write causally
    python train.py config/unmask.py --max_iters=500         plain masked diffusion, shorter
    python train.py config/remask_all.py --init_from=resume  go on where the last checkpoint stands

Training is one weighted cross-entropy: every training type, corruption and curriculum only decides (input, target,
weight). See corrupt and loss.
"""

import copy
import difflib
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import configurator
from configurator import UserError
from model import (GPT, GPTConfig, causal_nll, check_same_model, configure_compute, load_checkpoint, model_args, nelbo,
                   random_subset, save_checkpoint, stratified_k)
from sample import best_rules, draw, filtered, generate, load_task, p_wrong

# -----------------------------------------------------------------------------
# I/O
out_dir = 'out'                  # where checkpoints go
init_from = 'scratch'            # scratch | resume | the path of a checkpoint to start from
eval_interval = 250              # steps between evaluations; each one also saves a checkpoint
eval_rows = 1000                 # rows of the validation split that an evaluation uses
eval_samples = 100               # samples drawn at every evaluation; the first few are printed
eval_only = False                # evaluate once, then exit
log_interval = 25                # steps between lines on screen
keep_every = 0                   # also keep a numbered checkpoint every so many steps; 0: only the newest
wandb_log = False                # log to Weights & Biases as well
wandb_project = 'nanoremask'     # its project
wandb_run_name = 'run'           # its run; the training type is appended
# data
dataset = 'arithmetic'           # a folder under data/; it is prepared on the first run
batch_size = 64                  # rows a step
gradient_accumulation_steps = 1  # batches summed up into one step
block_size = 64                  # length of a row
# the task: what becomes (input, target, weight)
training_type = 'joint'          # unmasking | remasking | joint | causal
causal_ratio = 0.0               # share of every batch that trains the causal mode (next token, causal attention)
remask_ratio = 0.5               # joint: share of the other rows in which some visible tokens are wrong
corruption = 'own'               # where wrong tokens come from: own (the network's guesses) | random, or own:0.7,random:0.3
remasking_loss_type = 'all_positions'  # all_positions: clean visible tokens count too | corrupted_only
remask_target = 'wrong'          # at a wrong token the target is [WRONG] | original: the clean token
weight_unmask_task = 1.0         # weight of the masked positions
weight_remask_task = 1.0         # weight of the visible positions
penalty_mask_correct = 1.0       # weight of a clean visible token, times weight_remask_task: the price of doubting it
reward_correct_unmask = 1.0      # r: a masked position weighs r + (1 - r)(1 - p(x0)); 1: plain cross-entropy
proofreading_warmup_iters = 500  # curriculum: steps until remask_ratio is reached, linearly from 0
masking_warmup_iters = 500       # curriculum: steps until penalty_mask_correct is reached, linearly from 0
# model
n_layer = 2                      # blocks in the stack
n_head = 4                       # attention heads
n_embd = 128                     # width
n_recur = 2                      # how often the stack is applied
dropout = 0.0                    # for small data and long runs
# optimiser
optimizer = 'muon'               # muon: torch.optim.Muon for the matrices, AdamW for the rest | adamw: for everything
max_iters = 2000                 # steps
muon_lr = 0.02                   # peak rate of Muon
learning_rate = 3e-3             # peak rate of AdamW
weight_decay = 0.0               # of the matrices
beta1 = 0.9                      # AdamW
beta2 = 0.95                     # AdamW
grad_clip = 1.0                  # largest gradient norm; 0: off
lr_schedule = 'wsd'              # wsd: warmup, stable, linear decay to 0 | cosine: warmup, cosine to 0
warmup_iters = 50                # steps of linear warmup
decay_share = 0.4                # wsd: the share of max_iters that decays
ema_decay = 0.99                 # average of the weights that evaluation and sampling use; 0: off
# system
seed = 1337                      # of weights, batches and corruption
device = 'auto'                  # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'                   # auto | float32 | bfloat16
attention = 'auto'               # auto | plain | sdpa
compile = False                  # torch.compile the network; a minute of waiting, then faster
# -----------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))

# -----------------------------------------------------------------------------
# data


def load_data(dataset):
    """
    The dataset as (meta, {'train': ids, 'val': ids}), int64 (N, T) for rows, uint16 (N,) for a stream of text.

    A dataset that is not there yet is made by its prepare.py. Raises UserError with what to do if that fails.
    """
    folder = os.path.join(HERE, 'data', dataset)
    script = os.path.join(folder, 'prepare.py')
    if not os.path.exists(script):
        known = sorted(name for name in os.listdir(os.path.join(HERE, 'data'))
                       if os.path.exists(os.path.join(HERE, 'data', name, 'prepare.py')))
        near = difflib.get_close_matches(dataset, known, 1)
        raise UserError(f"there is no data/{dataset}/prepare.py; {f'did you mean {near[0]}' if near else f'known: {known}'}?")
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        print(f'preparing the dataset: python data/{dataset}/prepare.py')
        if subprocess.run([sys.executable, script]).returncode:
            raise UserError(f'the dataset {dataset} is not there; make it with python data/{dataset}/prepare.py')
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
            meta = json.load(file)
        data = {split: np.memmap(os.path.join(folder, f'{split}.bin'), dtype=np.uint16, mode='r') for split in ('train', 'val')}
        for split, ids in data.items():
            if len(ids) != meta[f'{split}_tokens']:
                raise ValueError(f"{split}.bin has {len(ids)} tokens, meta.json says {meta[f'{split}_tokens']}")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'the dataset in data/{dataset} is damaged ({error}); make it again: '
                        f'python data/{dataset}/prepare.py') from error
    if meta['format'] == 'rows':
        data = {split: torch.from_numpy(ids.astype(np.int64)).view(-1, meta['block_size']) for split, ids in data.items()}
    return meta, data


def rows_at(ids, index, block_size):
    """Rows of a dataset (see load_data): ids, index (B,) -> x0 (B, T). For a stream the index is a first position."""
    if isinstance(ids, torch.Tensor):
        return ids[index]
    window = index[:, None].numpy() + np.arange(block_size)
    return torch.from_numpy(ids[window].astype(np.int64))


def random_rows(ids, num, block_size, generator):
    """num rows at random places of the dataset: x0 (num, T)."""
    high = len(ids) if isinstance(ids, torch.Tensor) else len(ids) - block_size + 1
    return rows_at(ids, torch.randint(high, (num,), generator=generator), block_size)


def spread_rows(ids, num, block_size):
    """At most num rows spread evenly over the dataset, the same every time: x0 (num, T). For evaluation."""
    high = len(ids) if isinstance(ids, torch.Tensor) else len(ids) - block_size + 1
    num = min(num, high if isinstance(ids, torch.Tensor) else len(ids) // block_size)
    return rows_at(ids, torch.arange(num) * (high - 1) // max(1, num - 1), block_size)


def modelled(x0, meta):
    """Which positions of x0 (B, T) are modelled: (free: all but the start symbol, real: those without the padding)."""
    free = torch.ones_like(x0, dtype=torch.bool) if meta['bos'] is None else x0 != meta['bos']
    return free, free if meta['pad'] is None else free & (x0 != meta['pad'])


# -----------------------------------------------------------------------------
# the task: (input, target, weight)


def corrupt(x0, free, *, training_type, mask_token_id, wrong_token_id, generator, remask_ratio=0.5,
            corruption=(('own', 1.0),), guess=None, remasking_loss_type='all_positions', remask_target='wrong', weight_unmask_task=1.0,
            weight_remask_task=1.0, penalty_mask_correct=1.0):
    """
    Clean rows -> (input, target, weight), (B, T) each: all that distinguishes one training type from another.

    x0 (B, T) clean ids; free (B, T) bool, positions that may be masked or corrupted. In every row k of its n free
    positions are chosen, k uniform on 1..n and stratified over the batch.
      unmasking: they become [MASK]; each weighs 1/k, so that the loss is the NELBO a position, without any 1/t.
      remasking: they are replaced by wrong tokens; nothing is masked.
      joint:     a share remask_ratio of the rows has 1..k of them replaced by wrong tokens, the others masked.
    A replacement that equals the original is no error. Visible positions share weight_remask_task equally in a row,
    clean ones times penalty_mask_correct, or 0 if remasking_loss_type is 'corrupted_only'.
    corruption: ((kind, share), ...); kind 'random' draws another token uniformly, 'own' calls
    guess(input (R, T), where (R, T) bool) -> ids (R, T), the network's own guesses.
    """
    B = x0.size(0)
    n = free.sum(1)
    k = stratified_k(n, generator)
    chosen = random_subset(free, k, generator)
    input = x0.masked_fill(chosen, mask_token_id)
    proofread = torch.zeros_like(free)                                         # rows in which tokens are replaced
    proofread[:{'unmasking': 0, 'joint': round(B * remask_ratio), 'remasking': B}[training_type]] = True
    if proofread.any():
        count = k if training_type == 'remasking' else stratified_k(k, generator)
        filled = random_subset(chosen & proofread, count, generator)
        edges = torch.tensor([share for _, share in corruption], device=x0.device).cumsum(0)
        kinds = torch.bucketize(torch.rand(B, generator=generator, device=x0.device) * edges[-1], edges)
        for number, (kind, _) in enumerate(corruption):
            where = filled & (kinds == number)[:, None]
            if kind == 'own':
                replacement = guess(input, where)
            else:                                                              # any token but the original
                replacement = torch.randint(mask_token_id - 1, x0.shape, generator=generator, device=x0.device)
                replacement += replacement >= x0
            input = torch.where(where, replacement, input)

    masked = input == mask_token_id
    wrong = ~masked & (input != x0)
    target = x0.masked_fill(wrong, wrong_token_id) if remask_target == 'wrong' else x0
    visible = free & ~masked & proofread
    keep = penalty_mask_correct if remasking_loss_type == 'all_positions' else 0.0
    unmask = weight_unmask_task * masked / masked.sum(1, keepdim=True).clamp(min=1)
    remask = weight_remask_task * (wrong + keep * (visible & ~wrong)) / visible.sum(1, keepdim=True).clamp(min=1)
    return input, target, unmask + remask


def own_guesses(model, generator):
    """The guess of corrupt: draws tokens from the network's own distribution, without gradients or dropout."""
    @torch.no_grad()
    def guess(input, where):
        rows, ids, training = where.any(1), torch.zeros_like(input), model.training
        if rows.any():
            hidden = model.eval()(input[rows])[where[rows]]                    # (N, C)
            model.train(training)
            ids[where] = draw(filtered(model.logits(hidden, real_only=True)), generator)
        return ids
    return guess


def loss(model, input, target, weight, causal=False, reward_correct_unmask=1.0):
    """
    The one weighted cross-entropy: (sum of weight * CE, {task: (sum of weight * CE, sum of weight)}).

    input, target, weight (B, T). Only positions that carry weight are projected to the vocabulary. At masked positions
    and in the causal mode the softmax runs over the V real tokens. A masked position's weight is scaled by
    r + (1 - r)(1 - p(x0)), r = reward_correct_unmask: what is known already teaches less, but never nothing.
    """
    at = weight > 0                                                            # (B, T)
    hidden = model(input, causal=causal)[at]                                   # (N, C)
    input, target, weight = input[at], target[at], weight[at]                  # (N,)
    masked = (input == model.mask_token_id) | causal
    logits = model.logits(hidden)                                              # (N, V+2)
    specials = torch.arange(logits.size(-1), device=logits.device) >= model.mask_token_id
    ce = F.cross_entropy(logits.masked_fill(masked[:, None] & specials, float('-inf')), target, reduction='none')
    if reward_correct_unmask != 1.0:
        known = (-ce.detach()).exp()
        weight = torch.where(masked, weight * (1 - (1 - reward_correct_unmask) * known), weight)
    weighted = weight * ce
    wrong = target == model.wrong_token_id
    tasks = {'causal': masked} if causal else {'unmask': masked, 'detect': wrong, 'keep': ~masked & ~wrong}
    parts = {name: torch.stack((weighted.detach()[which].sum(), weight[which].sum())) for name, which in tasks.items()}
    return weighted.sum(), parts


# -----------------------------------------------------------------------------
# evaluation


def roc_auc(score, label):
    """Area under the ROC curve: the chance that a True one scores higher than a False one, ties counting half."""
    _, rank, count = score.unique(return_inverse=True, return_counts=True)     # sorted distinct scores
    mean_rank = (count.cumsum(0) - (count - 1) / 2).double()[rank]
    positive, negative = label.sum().item(), (~label).sum().item()
    if not positive or not negative:
        return float('nan')
    return ((mean_rank[label].sum().item() - positive * (positive + 1) / 2) / (positive * negative))


def per_token(nats, tokens):
    """Nats a row and tokens a row (B,) -> nats a token and its standard error (of a ratio of means)."""
    mean = (nats.sum() / tokens.sum()).item()
    error = (nats - mean * tokens).std().item() / (len(nats) ** 0.5 * tokens.double().mean().item())
    return mean, error


@torch.no_grad()
def evaluate(model, x0, meta, *, causal, bidirectional, detects, batch_size=256, seed=0):
    """
    What the model is worth on clean rows x0 (N, T), by a fixed seed: dict of nats a (real) token, with standard errors.

    nelbo, nelbo_se: the bound of the diffusion mode, padding paid for but not counted as tokens; causal, causal_se:
    -log p of the causal mode; auc: how well p(WRONG) tells the model's own errors from correct visible tokens.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    bound, exact, tokens, scores, labels = [], [], [], [], []
    for rows in x0.split(batch_size):
        rows = rows.to(device)
        free, real = modelled(rows, meta)
        tokens.append(real.sum(1))
        if bidirectional:
            bound.append(nelbo(model, rows, free, generator))
        if causal:
            exact.append(causal_nll(model, rows, real))
        if detects:
            input, _, _ = corrupt(rows, free, training_type='joint', mask_token_id=model.mask_token_id, remask_ratio=1.0,
                                  wrong_token_id=model.wrong_token_id, generator=generator,
                                  guess=own_guesses(model, generator))
            judged = real & (input != model.mask_token_id)
            scores.append(p_wrong(model, model(input)[judged]))
            labels.append((input != rows)[judged])
    result, tokens = {}, torch.cat(tokens)
    if bidirectional:
        result['nelbo'], result['nelbo_se'] = per_token(torch.cat(bound), tokens)
    if causal:
        result['causal'], result['causal_se'] = per_token(torch.cat(exact), tokens)
    if detects:
        result['auc'] = roc_auc(torch.cat(scores), torch.cat(labels))
    return result


def show_samples(model, meta, config, num, shown=4, seed=0):
    """Draws num samples by the best rules that the checkpoint supports, prints a few, returns the task's score."""
    if config['training_type'] == 'remasking' or not num:
        return {}
    task = load_task(meta['name'])
    num = num if task else shown
    samples = [sample['text'] for sample in generate(model, meta, num, seed=seed, **best_rules(config))]
    for text in samples[:shown]:
        print(f'    {text}   {task.verdict(text)}' if task else f'    {text!r}')
    if not task:
        return {}
    score = task.score(samples)
    print(f"    {score['valid']:.0%} of {num} samples are well formed, {score['correct']:.0%} have the right value")
    return {name: score[name] for name in ('valid', 'correct')}


# -----------------------------------------------------------------------------
# optimisation


def make_optimizers(model, optimizer, learning_rate, muon_lr, weight_decay, betas):
    """A list of optimisers: Muon (Jordan et al. 2024) for the matrices of the blocks and AdamW for the rest, or AdamW only."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not name.startswith('blocks.')]
    fused = next(model.parameters()).device.type != 'mps'
    if optimizer == 'muon':
        return [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
                torch.optim.AdamW(others, lr=learning_rate, betas=betas, weight_decay=0.0, fused=fused)]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    return [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)]


def lr_scale(step, schedule, max_iters, warmup_iters, decay_share):
    """The learning rate of a step as a share of its peak."""
    warmup = min(1.0, (step + 1) / (warmup_iters + 1))
    if schedule == 'cosine':
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max_iters)))
    return min(warmup, (max_iters - step) / max(1.0, decay_share * max_iters))


def ramp(step, warmup_iters):
    """A curriculum: 0 at step 0, 1 from warmup_iters on, linear between."""
    return min(1.0, step / warmup_iters) if warmup_iters else 1.0


def parse_mixture(text):
    """'own' or 'own:0.7,random:0.3' -> (('own', 0.7), ('random', 0.3)). Raises UserError."""
    try:
        mixture = tuple((kind.strip(), float(share or 1)) for kind, _, share in (part.partition(':') for part in text.split(',')))
    except ValueError:
        raise UserError(f"corruption expects a kind, or kind:share,kind:share; got '{text}'") from None
    for kind, share in mixture:
        if kind not in ('own', 'random') or not 0 <= share < math.inf or not sum(share for _, share in mixture):
            raise UserError(f"corruption knows own and random, with shares >= 0; got '{text}'")
    return mixture


# -----------------------------------------------------------------------------
# the run


def checkpoint_name(training_type, remasking_loss_type, step=None):
    """As the plan names them: ckpt_unmasking.pt, ckpt_joint_all_positions.pt, ckpt_unmasking_500.pt, ..."""
    kind = f'_{remasking_loss_type}' if training_type in ('remasking', 'joint') else ''
    return f"ckpt_{training_type}{kind}{'' if step is None else f'_{step}'}.pt"


def check_settings(config, meta):
    """Raises UserError for settings that do not go together, before any work is done."""
    for name, known in (('training_type', ('unmasking', 'remasking', 'joint', 'causal')),
                        ('remasking_loss_type', ('all_positions', 'corrupted_only')),
                        ('remask_target', ('wrong', 'original')), ('optimizer', ('muon', 'adamw')),
                        ('lr_schedule', ('wsd', 'cosine'))):
        if config[name] not in known:
            raise UserError(f"{name} expects one of {', '.join(known)}; got '{config[name]}'")
    for name in ('batch_size', 'block_size', 'max_iters', 'eval_interval', 'eval_rows', 'log_interval',
                 'gradient_accumulation_steps'):
        if config[name] < 1:
            raise UserError(f'{name} must be at least 1, got {config[name]}')
    for name in ('causal_ratio', 'remask_ratio', 'reward_correct_unmask', 'decay_share', 'ema_decay'):
        if not 0 <= config[name] <= 1:
            raise UserError(f'{name} must be in 0..1, got {config[name]}')
    for name in ('learning_rate', 'muon_lr', 'weight_decay', 'grad_clip', 'warmup_iters', 'proofreading_warmup_iters',
                 'masking_warmup_iters', 'weight_unmask_task', 'weight_remask_task', 'penalty_mask_correct',
                 'eval_samples', 'keep_every', 'seed'):
        if config[name] < 0:
            raise UserError(f'{name} must not be negative, got {config[name]}')
    if config['training_type'] == 'remasking' and 'own' in dict(parse_mixture(config['corruption'])):
        raise UserError("a remasking model cannot unmask, so it has no guesses of its own: use --corruption=random, "
                        "or --training_type=joint")
    if meta['format'] == 'rows' and config['block_size'] != meta['block_size']:
        raise UserError(f"the rows of {meta['name']} have {meta['block_size']} tokens: set --block_size={meta['block_size']}")
    if meta['format'] == 'stream' and config['block_size'] >= min(meta['train_tokens'], meta['val_tokens']):
        raise UserError(f"block_size={config['block_size']} is longer than a split of {meta['name']} "
                        f"({meta['val_tokens']} tokens)")


def training_step(model, x0, meta, config, step, generator):
    """One batch, forward and backward: adds to the gradients, returns the parts of the loss by task (see loss)."""
    num, accumulate = x0.size(0), config['gradient_accumulation_steps']
    num_causal = num if config['training_type'] == 'causal' else round(num * config['causal_ratio'])
    free, real = modelled(x0, meta)
    parts = {}
    if num_causal:
        width = int(real[:num_causal].any(0).nonzero()[-1]) + 1                # the causal pass needs no padding
        rows, weight = x0[:num_causal, :width], real[:num_causal, :width] * (num_causal / real[:num_causal].sum())
        total, parts = loss(model, rows, rows, weight, causal=True)
        (total / (num * accumulate)).backward()
    if num_causal < num:
        input, target, weight = corrupt(
            x0[num_causal:], free[num_causal:], mask_token_id=model.mask_token_id, wrong_token_id=model.wrong_token_id,
            generator=generator, guess=own_guesses(model, generator), corruption=parse_mixture(config['corruption']),
            remask_ratio=config['remask_ratio'] * ramp(step, config['proofreading_warmup_iters']),
            penalty_mask_correct=config['penalty_mask_correct'] * ramp(step, config['masking_warmup_iters']),
            **{name: config[name] for name in ('training_type', 'remasking_loss_type', 'remask_target',
                                               'weight_unmask_task', 'weight_remask_task')})
        total, more = loss(model, input, target, weight, reward_correct_unmask=config['reward_correct_unmask'])
        (total / (num * accumulate)).backward()
        parts.update(more)
    return parts


def progress_line(step, config, sums, speed):
    """The line on screen: losses by task since the last one, curricula, speed and time left."""
    losses = '  '.join(f'{name} {(total / max(weight, 1e-9)):.3f}' for name, (total, weight) in sums.items() if weight > 0)
    curricula = ''
    if config['training_type'] in ('joint', 'remasking'):
        curricula = (f"  proofreading {ramp(step, config['proofreading_warmup_iters']):.0%}"
                     f"  masking penalty {ramp(step, config['masking_warmup_iters']):.0%}")
    left = int((config['max_iters'] - step) / speed)
    return f"step {step}/{config['max_iters']}  {losses}{curricula}  {speed:.1f} it/s  {left // 60}:{left % 60:02d} left"


def evaluation_line(step, result):
    """The line on screen after an evaluation."""
    words = []
    if 'nelbo' in result:
        words.append(f"NELBO {result['nelbo']:.3f} ± {result['nelbo_se']:.3f} nats/token")
    if 'causal' in result:
        words.append(f"causal NLL {result['causal']:.3f} ± {result['causal_se']:.3f}")
    if 'auc' in result:
        words.append(f"own errors found: AUC {result['auc']:.3f}")
    return f"step {step}  validation: " + ('  '.join(words) or 'nothing to measure for this training type')


def check_finite(sums, step, path, model=None):
    """Raises UserError if a loss since the last line, or a weight of the model, is not finite: nothing is saved then."""
    bad = [f'{name} loss' for name, part in sums.items() if not torch.isfinite(part).all()]
    bad += ['network'] if model and not all(torch.isfinite(p).all() for p in model.parameters()) else []
    if bad:
        kept = f'; the last good checkpoint is {path}' if os.path.exists(path) else ''
        raise UserError(f'the {bad[0]} is no longer finite at step {step}: lower --learning_rate or --muon_lr, '
                        f'or set --dtype=float32{kept}')


def make_checkpoint(model, ema, optimizers, generator, noise, step, args, config, meta, result):
    """Everything that sampling needs, and everything that a bit-identical resume needs."""
    rng = dict(rows=generator.get_state(), noise=noise.get_state(), torch=torch.get_rng_state())
    if torch.cuda.is_available():
        rng['cuda'] = torch.cuda.get_rng_state()
    return dict(model=model.state_dict(), ema=ema.state_dict() if ema is not model else None, iter_num=step,
                optimizers=[optim.state_dict() for optim in optimizers], rng=rng, model_args=args, config=config,
                meta=meta, result=result)


def restore(checkpoint, ema, optimizers, generator, noise):
    """The counterpart of make_checkpoint, the weights of the model excepted: returns the step to go on from."""
    if ema is not None and checkpoint['ema']:
        ema.load_state_dict(checkpoint['ema'])
    for optim, state in zip(optimizers, checkpoint['optimizers']):
        optim.load_state_dict(state)
    generator.set_state(checkpoint['rng']['rows'].cpu())
    noise.set_state(checkpoint['rng']['noise'].cpu())
    torch.set_rng_state(checkpoint['rng']['torch'].cpu())
    if 'cuda' in checkpoint['rng'] and torch.cuda.is_available():
        torch.cuda.set_rng_state(checkpoint['rng']['cuda'].cpu())
    return checkpoint['iter_num']


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


def main():
    config = {name: globals()[name] for name in configurator.settings(__file__)}
    parse_mixture(corruption)                                                  # what needs no data is checked without it
    meta, data = load_data(dataset)
    check_settings(config, meta)
    torch.manual_seed(seed)
    args = model_args(GPTConfig(block_size, meta['vocab_size'], n_layer, n_head, n_embd, n_recur, dropout))
    model = GPT(GPTConfig(**args))
    newest = os.path.join(out_dir, checkpoint_name(training_type, remasking_loss_type))
    start, checkpoint = 0, None
    if init_from != 'scratch':
        path = newest if init_from == 'resume' else init_from
        source, checkpoint = load_checkpoint(path, ema=init_from != 'resume')
        check_same_model(path, {**checkpoint['model_args'], 'dropout': dropout, 'itos': checkpoint['meta']['itos']},
                         'this run', {**args, 'itos': meta['itos']})
        model.load_state_dict(source.state_dict())
    if init_from == 'resume':
        check_same_model(path, checkpoint['config'], 'this run', config, ('optimizer', 'dataset', 'training_type'))
        if checkpoint['iter_num'] >= max_iters and not eval_only:
            raise UserError(f"{path} has all of its {checkpoint['iter_num']} steps: to go on, set a higher --max_iters")
    model, choices = configure_compute(model, device, dtype, attention, compile)
    on = next(model.parameters()).device
    ema = copy.deepcopy(model) if ema_decay else model
    optimizers = make_optimizers(model, optimizer, learning_rate, muon_lr, weight_decay, (beta1, beta2))
    generator = torch.Generator().manual_seed(seed)                            # which rows
    noise = torch.Generator(on).manual_seed(seed + 1)                          # how they are corrupted
    if init_from == 'resume':
        start = restore(checkpoint, ema if ema_decay else None, optimizers, generator, noise)
    print(f"{choices}\n{model.num_params():,} parameters; {training_type} on {dataset}: "
          f"{meta['train_tokens']:,} training tokens, vocabulary {meta['vocab_size']} + [MASK] + [WRONG]")
    if init_from != 'scratch':
        print(f'starting from {path}, step {start}')

    run = None
    if wandb_log:
        try:
            import wandb
        except ImportError:
            raise UserError('wandb_log needs Weights & Biases: pip install wandb') from None
        run = wandb.init(project=wandb_project, name=f'{wandb_run_name}_{training_type}', config=config)
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f'{out_dir}: cannot be made a folder for checkpoints: {error.strerror}') from error
    val = spread_rows(data['val'], eval_rows, block_size)
    stop = stop_on_signal()
    sums, marks = {}, [(start, time.time())]
    for step in range(start, max_iters + 1):
        stopping = step == max_iters or stop['asked']
        due = stopping or eval_only or (step % eval_interval == 0 and (step > start or not start))
        numbered = keep_every and step % keep_every == 0 and step > start
        if due or numbered:
            check_finite(sums, step, newest, model)
        if due:
            t0 = time.time()
            result = evaluate(ema, val, meta, causal=training_type == 'causal' or causal_ratio > 0, seed=seed,
                              bidirectional=training_type in ('unmasking', 'joint'),
                              detects=training_type == 'joint' and remask_target == 'wrong')
            print(evaluation_line(step, result))
            result.update(show_samples(ema, meta, config, eval_samples if step else 0))
            if run:
                run.log({'step': step, **result})
            if eval_only:
                break
            if step > start:
                state = make_checkpoint(model, ema, optimizers, generator, noise, step, args, config, meta, result)
                save_checkpoint(newest, state)
            marks = [(at, when + time.time() - t0) for at, when in marks]      # speed is the speed of training
        if numbered:
            state = make_checkpoint(model, ema, optimizers, generator, noise, step, args, config, meta, {})
            save_checkpoint(os.path.join(out_dir, checkpoint_name(training_type, remasking_loss_type, step)), state)
        if stopping:
            break

        scale = lr_scale(step, lr_schedule, max_iters, warmup_iters, decay_share)
        for optim, peak in zip(optimizers, [muon_lr, learning_rate] if optimizer == 'muon' else [learning_rate]):
            for group in optim.param_groups:
                group['lr'] = peak * scale
        model.train()
        for _ in range(gradient_accumulation_steps):
            x0 = random_rows(data['train'], batch_size, block_size, generator).to(on)
            for name, part in training_step(model, x0, meta, config, step, noise).items():
                sums[name] = sums.get(name, 0) + part
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        for optim in optimizers:
            optim.step()
            optim.zero_grad(set_to_none=True)
        if ema_decay:
            decay = min(ema_decay, (1 + step) / (10 + step))                   # a young average forgets its start
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

        if (step + 1) % log_interval == 0:
            check_finite(sums, step, newest)
            marks = marks[-20:] + [(step + 1, time.time())]
            speed = (marks[-1][0] - marks[0][0]) / max(1e-9, marks[-1][1] - marks[0][1])
            sums = {name: part.tolist() for name, part in sums.items()}
            print(progress_line(step + 1, config, sums, speed), flush=True)
            if run:
                run.log({'step': step + 1, 'lr_scale': scale, **{name: a / max(b, 1e-9) for name, (a, b) in sums.items()}})
            sums = {}
    if stop['asked']:
        print(f'stopped; go on with: python train.py {" ".join(sys.argv[1:])} --init_from=resume')
    elif not eval_only:
        print(f'saved {newest}; sample from it: python sample.py --init_from=' + ('ckpt' if out_dir == 'out' else newest))


if __name__ == '__main__':
    configurator.run(globals())
