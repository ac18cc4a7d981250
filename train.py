"""
Train a masked-diffusion language model that can find and fix its own mistakes.

    python train.py config/remask_all.py                     unmask, detect wrong tokens, write causally
    python train.py config/unmask.py --max_iters=500         plain masked diffusion, shorter
    python train.py config/remask_all.py --init_from=resume  go on where the last checkpoint stands
    torchrun --standalone --nproc_per_node=2 train.py ...    two processes, see plumbing/distributed.py

Training is one weighted cross-entropy: every training type, corruption and curriculum only decides (input,
target, weight). See ask in corruption.py, and loss. Beside the checkpoint out_dir holds log.jsonl and
curves.png.
"""

import configurator

configurator.help_first(globals())           # --help needs no torch
# ruff: noqa: E402 (so the imports come after it)

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from corruption import ask, errors_of, own_guesses, task_of
from data.loader import random_rows, spread_rows
from model import GPT, GPTConfig
from parts.abstain import abstaining_ce, steer
from parts.blocks import InBlocks, Kept, block_bounds, grown, lay_out
from parts.layers import told
from parts.presets import best_rules, choose_rules, supports
from parts.speculate import draft_loss
from plumbing import checks, distributed
from plumbing.evaluate import evaluate, evaluation_line
from plumbing.files import unlock
from plumbing.log import PARTS, progress_line, show_repairs, show_samples
from plumbing.oldnames import FORMER, with_parts as modernise  # noqa: F401 (for the configurator)
from plumbing.optim import average, lr_scale, ramp, update
from plumbing.pack import extent, pack
from plumbing.pieces import added, in_pieces, sums
from plumbing.run import Run, load_network, load_rows, to_device
from plumbing.rows import places
from plumbing.text import encode, load_task, modelled
from plumbing.textstats import compare_text, usual_text
from sample import fill, generate

# -----------------------------------------------------------------------------
# files
out_dir = 'out'              # where checkpoints go
init_from = 'scratch'        # scratch | resume | a checkpoint to start from ('ckpt': the newest in out_dir)
# data
dataset = 'arithmetic'       # a folder under data/; it is prepared on the first run
batch_size = 64              # rows of a batch, of all processes together
block_size = 64              # length of a row
# the task: what becomes (input, target, weight)
training_type = 'joint'      # unmasking | remasking | joint | denoising | causal, see corruption.py
causal_ratio = 0.5           # share of every batch that trains the causal mode: the next token
remask_ratio = 0.5           # joint, denoising: share of the rows in which visible tokens may be wrong
full_ratio = 0.5             # joint: share of these rows in which no mask is left
block_lengths: tuple = ()    # 4,8,16,32: the causal rows also train blocks of these lengths
corruption = 'own'           # own (its guesses) | random | fragment | sticky | noise | own:0.7,random:0.3
remask_target = 'original'   # at a wrong token: the clean one | wrong: [WRONG] | edits: see parts/edits.py
# model
n_layer = 2                  # blocks in the stack
n_head = 4                   # attention heads
n_embd = 128                 # width
n_recur = 2                  # how often the stack is applied
dropout = 0.0                # for small data and long runs
parts = ''                   # optional parts, as short_conv:2,shortcuts; see parts/layers.py
draft_head = True            # train a head that drafts for --remask=causal: the same law in fewer passes
# optimiser
max_iters = 1000             # steps
learning_rate = 3e-3         # peak rate of AdamW
muon_lr = 0.02               # peak rate of Muon
# system
seed = 1337                  # of weights, batches and corruption
device = 'auto'              # auto | cpu | cuda | cuda:1 | mps
compile = False              # torch.compile the network; a minute of waiting, then faster
# -----------------------------------------------------------------------------
# what follows is seldom turned

# files and samples
eval_interval = 250          # steps between evaluations; each one also saves a checkpoint
eval_rows = 1000             # rows of the validation split that an evaluation uses
eval_samples = 100           # samples drawn at every evaluation, of text at most 16; some are printed
sample_prompt = ''           # text that these samples start with
eval_only = False            # evaluate once, then exit
log_interval = 25            # steps between lines on screen
overwrite = False            # write over a checkpoint in out_dir that is of another network or dataset
keep_every = 0               # also keep a numbered checkpoint after this many steps; 0: only the newest
wandb_log = False            # log to Weights & Biases as well
wandb_project = 'nanoremask' # its project
wandb_run_name = 'run'       # its run; the training type is appended
# data
coarse = ''                  # characters that all become the first of them: 0123456789 leaves a skeleton
gradient_accumulation_steps = 1 # batches a step; their gradients are averaged
# the task
views = 0                    # n: every row, also a causal one, trains the training type n times; 0: off
sigma_min = 0.1              # noise: least level, the share of the tokens that are hit
sigma_max = 0.9              # noise: highest level
prefix_ratio = 0.0           # share of the rows whose first 1..16 tokens are given, for hybrid generation
noise_mix = 'mask:0.5,replace:0.2,swap:0.15,delete:0.075,insert:0.075'  # noise: what happens to a token
remasking_loss_type = 'all_positions' # all_positions: clean visible tokens count too | corrupted_only
weight_unmask_task = 1.0     # weight of the masked positions
mask_weighting = 'row'       # row: the masks of a row share it (the NELBO) | token: all masks weigh alike
weight_remask_task = 1.0     # weight of the visible positions
penalty_mask_correct = 1.0   # share of it for a clean visible token: the price of doubting it
reward_correct_unmask = 1.0  # r: a mask weighs r + (1 - r)(1 - p(x0)); 1: plain cross-entropy
proofreading_warmup_iters = 300 # curriculum: steps until remask_ratio is reached, linearly from 0
masking_warmup_iters = 300   # curriculum: steps until penalty_mask_correct is reached, linearly from 0
block_warmup_iters = 0       # curriculum: steps in which blocks grow, from causal rows alone; 0: off
# abstention: [MASK] as an answer, for positions that are not ready yet
allow_abstain = False        # a masked position costs -log(p(x0) + price * p(MASK)), not -log p(x0)
penalty_keep_mask = 0.1      # that price, in 0..1; the controller starts from it
target_mask_prob = 0.0       # the controller holds the mean p(MASK) of masked positions here; 0: off
mask_logit_bias = 0.0        # added to the logit of [MASK]; the controller starts from it
mask_control_rate = 0.4      # how far one step of the controller moves bias and price
mask_bias_limit = 20.0       # the controller never takes the bias beyond this
# optimiser
optimizer = 'muon'           # muon: torch.optim.Muon for the matrices, AdamW for the rest | adamw: for all
weight_decay = 0.0           # of the matrices
bigram_decay = 0.0           # of the tables of pairs, so that what is rare is not learned by heart
beta1 = 0.9                  # AdamW
beta2 = 0.95                 # AdamW
grad_clip = 1.0              # largest gradient norm; 0: off
k1_credit = False            # scale down gradients below the mean, see plumbing/optim.py
lr_schedule = 'wsd'          # wsd: warmup, stable, linear decay to 0 | cosine: warmup, cosine to 0
warmup_iters = 50            # steps of linear warmup
decay_share = 0.4            # wsd: the share of max_iters that decays
max_bad_steps = 10           # a step that is not finite is skipped; this many in a row stop the run
ema_decay = 0.96             # average of the weights that evaluation and sampling use; 0: off
# system
dtype = 'auto'               # auto | float32 | bfloat16
attention = 'auto'           # auto | plain | sdpa
fsdp = False                 # the processes of torchrun share one network, see plumbing/distributed.py
# -----------------------------------------------------------------------------
# the loss


def loss(model, input, target, weight, causal=False, reward_correct_unmask=1.0, keep_mask_price=None,
         pad_id=None, at=None, hidden=None):
    """
    The one weighted cross-entropy: (sum of weight * CE, {task: (sum of weight * CE, sum of weight)}).

    input, target, weight (B, T). Only positions that carry weight are projected to the vocabulary. At masked
    positions and in the causal mode the softmax runs over the V real tokens.

    keep_mask_price: a masked position may also answer [MASK], at this price, see parts/abstain.py; the parts
    then hold 'p(MASK)', its sum and count over masked tokens that are not padding (pad_id).
    at (N,), hidden (N, C): places(weight > 0) and the hidden states there, if they are known already.
    """
    at = places(weight > 0) if at is None else at                   # (N,)
    hidden = model(input, causal=causal, only=at) if hidden is None else hidden        # (N, C)
    input, target, weight = (ids.flatten()[at] for ids in (input, target, weight))     # (N,)
    masked = (input == model.mask_token_id) | causal
    abstains = keep_mask_price is not None and not causal
    only_real = causal or (bool(masked.all()) and not abstains)     # spares a pass over the vocabulary

    def piece_of_loss(hidden, table, piece):
        """A piece of the positions: (sum of weight * CE, (weight * CE, weight, maybe p(MASK)), (n,) each)."""
        logits = model.logits(hidden, only_real, table)             # (n, V+2)
        here, w, p_mask = masked[piece], weight[piece], ()
        if not only_real:
            closed = torch.arange(logits.size(-1), device=logits.device) >= model.mask_token_id + abstains
            logits = logits.masked_fill(here[:, None] & closed, float('-inf'))
        if abstains:
            ce, plain, *p_mask = abstaining_ce(logits, target[piece], here, keep_mask_price,
                                               model.mask_token_id)
        else:
            ce = plain = F.cross_entropy(logits, target[piece], reduction='none')
        if reward_correct_unmask != 1.0:                            # what is known already teaches less
            known = (-plain.detach()).exp()
            w = torch.where(here, w * (1 - (1 - reward_correct_unmask) * known), w)
        return (w * ce).sum(), ((w * ce).detach(), w, *p_mask)

    total, found = in_pieces(piece_of_loss, hidden, model.wte.weight, model.most_logits)

    # the same by task
    weighted, weight, *p_mask = found
    wrong = ~masked & (target != input)
    tasks = {'causal': masked} if causal else {'unmask': masked, 'detect': wrong, 'keep': ~masked & ~wrong}
    parts = {name: sums(weighted, weight, which) for name, which in tasks.items()}
    if abstains:
        counted = masked if pad_id is None else masked & (target != pad_id)
        parts['p(MASK)'] = sums(p_mask[0], counted, counted)
    return total, parts


# -----------------------------------------------------------------------------
# one step


def curricula(step, config):
    """The settings that change while training goes on, as they are at this step: a dict."""
    ratio, penalty = config['remask_ratio'], config['penalty_mask_correct']
    return dict(grown(step, config), remask_ratio=ratio * ramp(step, config['proofreading_warmup_iters']),
                penalty_mask_correct=penalty * ramp(step, config['masking_warmup_iters']))


def causal_part(model, x0, all_causal, meta, config, task, generator, price):
    """
    The causal mode on rows x0 (B, T): yields (sum of weight * CE, parts), then what draft_loss says.

    all_causal: how many such rows all processes have together; these tokens share a weight of one a row. With
    block_lengths the rows are canvases in blocks too, beside what the causal pass has read.
    """
    count = distributed.total(modelled(x0, meta)[1].sum())
    if not len(x0):
        return
    x0, free, real, segment, blocks = lay_out(x0, meta, config['block_lengths'], generator)
    weight, kept = real * (all_causal / count), Kept() if blocks else None
    hidden, at = model(x0, causal=True, segment=segment, cache=kept), places(weight > 0)
    here = hidden.flatten(0, 1).index_select(0, at)                 # (N, C)
    total, parts = loss(model, x0, x0, weight, causal=True, at=at, hidden=here)
    if blocks:                                                      # one backward pass for both; no padding
        rows = blocks.rows(x0, free, real, all_causal / count)
        more, others = diffusion_part(InBlocks(model, kept, blocks), rows, {**meta, 'pad': None}, config,
                                      task, generator, price)
        total, parts = total + more, {**parts, **others}
    yield total, parts
    if model.drafter is not None:
        # each process picks tokens for itself
        yield draft_loss(model, hidden, x0, weight, segment=segment)


def diffusion_part(model, rows, meta, config, task, generator, price):
    """
    The training type on rows: (sum of weight * CE, parts).

    rows: x0, free, real (B, T), see ask, and what each row weighs, (B, 1) or a number.
    """
    x0, free, real, scale = rows
    tokens = model.mask_token_id, model.wrong_token_id, meta['pad']
    guess = own_guesses(model, generator)
    input, target, weight = ask(x0, free, real, task, tokens, generator, guess)
    weight = weight * scale

    # level (B, T): the share of masks in the whole row; wrong tokens are to be found, so they do not count
    segment, level = None, (input == model.mask_token_id).float().mean(1, keepdim=True).expand(x0.shape)
    if meta['pad'] is not None:
        length = extent(input, weight, meta['pad'], generator)
        input, target, weight, level, segment = pack(length, input, target, weight, level)
    at = places(weight > 0)                                         # (N,)
    if model._compiled_call_impl is not None:                       # compiled once for any number of places
        torch._dynamo.maybe_mark_dynamic(at, 0)
    hidden = model(input, segment=segment, only=at, **told(model, input, segment, level))    # (N, C)
    return loss(model, input, target, weight, reward_correct_unmask=config['reward_correct_unmask'],
                keep_mask_price=price, pad_id=meta['pad'], at=at, hidden=hidden)


def losses(model, x0, meta, config, step, generator, price=None):
    """
    Yields the losses of a batch, each to go backward from before the next: (a loss, its parts by task).

    Of several processes each has its rows x0 (B, T); the mean of their gradients is that of the whole batch.
    """
    config = {**config, **curricula(step, config)}
    num, views, accumulate = len(x0), config['views'], config['gradient_accumulation_steps']
    batch = num * distributed.world()                               # rows over all processes
    all_causal = batch if config['training_type'] == 'causal' else round(batch * config['causal_ratio'])
    num_causal = distributed.share(all_causal)
    task = task_of(config)
    for total, parts in causal_part(model, x0[:num_causal], all_causal, meta, config, task, generator, price):
        if 'draft' in parts:                                        # a mean already
            part = num_causal * distributed.world() / all_causal
            yield total * part / accumulate, dict(draft=parts['draft'] * part)
        else:
            yield total / (num * accumulate), parts

    others = x0.repeat(views, 1) if views else x0[num_causal:]
    if len(others) and config['training_type'] != 'causal':
        # the rows that may have wrong tokens are the first ones of the whole batch
        before, all_others = (0, batch * views) if views else (all_causal, batch - all_causal)
        last = before + round(all_others * config['remask_ratio'])
        ratio = (distributed.share(last) - distributed.share(before)) / len(others)
        rows = others, *modelled(others, meta), 1.0
        total, parts = diffusion_part(model, rows, meta, config, replace(task, remask_ratio=ratio), generator,
                                      price)
        yield total / (num * max(1, views) * accumulate), parts


def training_step(model, x0, meta, config, step, generator, price=None, parallel=None):
    """
    One batch, forward and backward: adds to the gradients, returns the parts of the loss by task.

    price: of abstaining, see loss; parallel: of several processes, see distributed.data_parallel.
    """
    batch = x0, meta, config, step, generator, price
    parts = {}
    for total, more in losses(model, *batch) if parallel is None else [parallel(*batch)]:
        total.backward()
        parts = added(parts, more)
    return parts


def take_step(run, rows, parallel):
    """The gradients of one or several batches of the training rows, and a step of the optimisers."""
    model, config, control, parts = run.model, run.config, run.control, {}
    run.scale = lr_scale(run.step, config['lr_schedule'], config['max_iters'], config['warmup_iters'],
                         config['decay_share'])
    model.train()
    accumulate = config['gradient_accumulation_steps']
    for number in range(accumulate):
        x0 = random_rows(rows, config['batch_size'], config['block_size'], run.rows_rng)
        x0 = to_device(distributed.rows_of_rank(x0), run.device)
        with distributed.averaging(parallel, number == accumulate - 1):
            more = training_step(model, x0, run.meta, config, run.step, run.noise_rng,
                                 control['price'] if config['allow_abstain'] else None, parallel)
        parts = added(parts, more)
    parts = distributed.sum_parts(parts, PARTS)                     # from here on all processes do the same
    if run.count(parts):
        if config['target_mask_prob'] and 'p(MASK)' in parts:
            run.control = steer(control, parts['p(MASK)'], config['target_mask_prob'],
                                config['mask_control_rate'], config['mask_bias_limit'])
            model.mask_logit_bias.fill_(run.control['bias'])
        update(model, run.optimizers, config, run.scale)
        if config['ema_decay']:                                     # a young average forgets its start
            average(run.ema, model, min(config['ema_decay'], (1 + run.step) / (10 + run.step)))
    model.zero_grad(set_to_none=True)


# -----------------------------------------------------------------------------
# the run


def check_settings(config):
    """Raises UserError for settings that make no sense or do not go together."""
    checks.check_settings(config)
    task_of(config)


def draws(config, meta):
    """Whether samples are drawn at an evaluation; from left to right none with text given inside."""
    kinds = ('remasking', 'causal') if 'given' in meta else ('remasking',)
    return config['eval_samples'] and config['training_type'] not in kinds


def examine(run, val, usual):
    """What an evaluation by rank 0 finds, with samples, printed: a dict, empty on the other ranks."""
    config, result = run.config, {}
    can_unmask, causal, detects = supports(config)
    model = distributed.whole_model(run.ema)
    with distributed.together():
        if distributed.rank() == 0:
            result = evaluate(model, val, run.meta, causal=causal, bidirectional=can_unmask,
                              own_errors=errors_of(config), seed=config['seed'],
                              bounds=block_bounds(config['block_lengths']))
            print(evaluation_line(run.step, result))
            if draws(config, run.meta) and (run.step or config['eval_only']):
                num = usual['num'] if usual else config['eval_samples']
                prompt = encode(run.meta, config['sample_prompt'])
                rules = best_rules(config, lengths_given='given' in run.meta)
                samples = generate(model, run.meta, num, prompt=prompt, seed=0, **rules)
                compare = partial(compare_text, usual=usual)
                result.update(show_samples(samples, run.meta, config, compare))
                if detects and 'given' not in run.meta:
                    rules = choose_rules(config, task='repair', inside=True, stream=run.meta['eos'] is None)
                    show_repairs(partial(fill, model, run.meta, **rules), val[-2:], run.meta, run.step)
    return result


def report(run):
    """Logs and prints what the last steps were like."""
    config = run.config
    more = curricula(run.step + 1, config) if supports(config).detects else grown(run.step + 1, config)
    if config['allow_abstain']:
        more.update(mask_logit_bias=run.control['bias'], penalty_keep_mask=run.control['price'])
    record = run.record(run.scale * config['learning_rate'], **more)
    print(progress_line(run.step + 1, config, record, run.speed), flush=True)
    run.write(record)


def train(config):
    # settings, folder, data and network, each checked before the next one costs time
    place = distributed.connect(config['device'])
    check_settings(config)
    known = configurator.settings(__file__)
    idle = checks.idle(config, {name: setting.default for name, setting in known.items()})
    with distributed.together():
        run = Run(config, idle)
    meta, data = load_rows(config)
    run.start(meta, *load_network(GPT, GPTConfig, config, meta, place, run.newest))
    with distributed.together():
        usual = None
        if distributed.rank() == 0:
            if draws(config, meta) and not hasattr(load_task(meta['name']), 'score'):
                usual = usual_text(data['train'], meta, config)
            run.open()

    # the loop
    val = spread_rows(data['val'], config['eval_rows'], config['block_size'])
    parallel = distributed.data_parallel(run.model, losses)
    for step in run.steps():
        if run.halts():
            run.check_finite()
            result = examine(run, val, usual) if run.due else {}
            if config['eval_only']:
                return
            run.save(result)
        if run.stopping:
            break
        take_step(run, data['train'], parallel)
        if (step + 1) % config['log_interval'] == 0:
            report(run)
    run.finish(val)


def main():
    try:
        train(configurator.current(globals()))
    finally:
        unlock(out_dir)
        distributed.disconnect()


if __name__ == '__main__':
    distributed.run(globals())
    distributed.leave()
