"""
Sample from a trained nanoRemask checkpoint: generate, infill, repair, edit.

    python sample.py --init_from=ckpt                                    the newest checkpoint under out_dir, its best sampler
    python sample.py --preset=remdm --steps=32                           a named sampler; every choice can be overridden
    python sample.py --task=infill --text="(+_2)=_"                      fill the holes
    python sample.py --task=repair --text="(+12))=3"                     find what is wrong and write it anew
    python sample.py --task=edit --text="(+12)=3" --mask=2:4             write only this span anew
    python sample.py --remask=wrong --html=steps.html                    watch it think

All sampling is one loop with two rules: the commit rule says which masked positions of the canvas become visible,
the remask rule says which visible ones go back to [MASK]. See generate_diffusion.
"""

import configurator

configurator.help_first(globals())           # --help shall not wait for torch
# ruff: noqa: E402 (so the imports come after it)

import difflib
import json
import math
import time

import torch
from tqdm import tqdm

from plumbing import show
from plumbing.text import decode, encode, load_task, rows_of, start_canvas, task_canvas, until_end
from plumbing.checkpoint import (check_same_model, export_safetensors, find_checkpoint, identity, import_safetensors, load_checkpoint,
                                 load_merged)
from plumbing.files import check_folder, write_atomically
from configurator import UserError
from corruption import modelled
from plumbing.device import configure_compute
from plumbing.evaluate import causal_nll, nelbo
from model import places, random_subset, room_for
from rules import (COMMIT_RULES, CORRECTING, REMASK_RULES, REMDM_SCHEDULES, TASKS, WHOLE_CANVAS, choose_rules,
                   close_rows, commit_order, displaced, doubted, draft_pass, fine, first_of, guided, masks_left, p_wrong, propose,
                   remdm_rate, share_at, spare_lengths, speculate, spread, supports, text_of)

# -----------------------------------------------------------------------------
# the checkpoint
init_from = 'ckpt'         # 'ckpt': the newest checkpoint under out_dir; or the path of one
remask_from: str = None    # path of a second, remasking checkpoint that judges the visible tokens
merge_from: str = None     # path of a second checkpoint of the same architecture to merge with the first
merge_weight = 0.5         # its share in the merged weights: 0 is the first checkpoint, 1 the second
out_dir = 'out'            # where 'ckpt' looks
export: str = None         # only write the weights (averaged, merged) to this .safetensors file, for init_from; needs safetensors
# the task
task = 'generate'          # generate | infill | repair | edit | score (writes nothing, says what the model thinks of a text)
prompt = ''                # generate: text that every sample starts with
length: int = None         # generate: number of tokens, given; None: the model decides (without end token: block_size)
text: str = None           # infill, repair, edit, score: the text
file: str = None           # or a file of texts, one a line
hole = '_'                 # infill: stands for one token; at the very end of the text for as many as the model wants
mask: str = None           # edit: the tokens to write anew, 3:5 for the fourth and fifth, or several spans 3:5,8:9
num_samples: int = None    # how many samples to draw; None: 10, with a text 1 each
# --preset=NAME chooses the settings below that are left at None:
#   ancestral    commit at random, never re-mask: plain masked diffusion
#   maskgit      commit the surest first, cosine schedule
#   threshold    commit whatever is surer than commit_threshold, as few passes as that takes
#   remdm        re-mask at random with a probability that keeps the forward marginals
#   p2           visible tokens and candidates compete for staying
#   intelligent  re-mask what the network itself calls wrong, cosine schedule
#   hybrid       16 tokens left to right with the causal pass, the rest by intelligent
#   speculative  the causal pass verifies what is drafted: the law of left-to-right writing, in fewer passes
#   universal    3 tokens left to right, then maskgit in 20 steps (the universal denoiser's best)
preset: str = None         # a name from this list; None: the best that the checkpoint supports
# which masked tokens are committed
steps: int = None          # passes; None: one a token; repair: a fourth, or 1 (remask=causal takes what it needs)
schedule: str = None       # linear: equally many tokens a step; cosine: few early, many late; None: linear
commit: str = None         # random | confidence | margin | entropy | threshold | abstain | priority | left_to_right
block_length: int = None   # commit blocks of that many tokens from left to right (semi-autoregressive)
choice_temperature: float = None  # commit=confidence: noise in the order, annealed to 0 (MaskGIT); None: 4.5
commit_threshold = 0.9     # commit=threshold: candidates at least this probable
priority = '()=+*'         # commit=priority: candidates of these characters first
ar_prefix: int = None      # tokens drawn left to right with the causal pass first; None: 0 (a causal checkpoint: all)
# which visible tokens are re-masked
remask: str = None         # none | random | wrong | critic | confidence | remdm | p2 | causal
remask_rate: float = None  # how often, see generate_diffusion; None: 1 for wrong, critic, confidence and p2, else 0.3
remask_random_ratio = 0.0  # 0: re-mask by doubt alone, 1: at random alone
remask_patience: float = None   # how much less a doubt counts while little is visible; None: 1 for text without end, else 0
remask_threshold: float = None  # re-mask what is doubted more than this, each position once
remask_schedule: tuple = None   # re-mask a share of the visible tokens that goes from the first to the second number: 0.3,0.05
rewrite: bool = None       # draw what is doubted anew at once, given what stands there; None: in repair, if trained on noise
remdm = 'cap'              # remask=remdm: cap | rescale | loop
correct_share: float = None     # share of the steps, at the end, that only re-mask and refill; None: 0.25
# what the energy head is asked, in a checkpoint that has one (energy.py)
guide: int = None          # at every step draw this many whole completions and go on with one, the likelier the lower its energy
best_of: int = None        # draw this many times the samples and keep one in that many, the lowest energy, lengths as drawn
# drawing
temperature: float = None  # 0: the most probable token, 1: the model's own distribution; None: 1 (repair: 0)
top_k: int = None          # draw among the k most probable tokens only
top_p: float = None        # draw among the most probable tokens that together reach this probability only
seed = 1337                # the same seed and command give the same text
batch_size = 256           # samples drawn at a time; what causal sampling keeps of the text grows with it
# what to show
score = False              # print NELBO, causal NLL and p(WRONG) of every token of what was written
animate = False            # play the denoising in the terminal (pip install rich)
html: str = None           # write it to this file, a page with a slider over the steps
save: str = None           # also write the samples to this file, one JSON object a line
# system
device = 'auto'            # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'             # auto | float32 | bfloat16
attention = 'auto'         # auto | plain | sdpa
compile = False            # torch.compile the network
# -----------------------------------------------------------------------------

RATES = dict(wrong=1.0, critic=1.0, confidence=1.0, p2=1.0)   # remask_rate if not given; 0.3 for the others, see docs/log.md
DRAFT_WINDOW = 5  # remask=causal drafts this many tokens a round; docs/log.md has 1 to 63


# -----------------------------------------------------------------------------
# the loop


@torch.no_grad()
def generate_diffusion(model, canvas, fixed, *, steps=None, commit='random', remask='none', schedule='linear',
                       draft='bidirectional', remask_model=None, remask_rate=None, remask_random_ratio=0.0,
                       remask_patience=0.0, remask_threshold=None, remask_schedule=None, remdm='cap', correct_share=0.25,
                       temperature=1.0, top_k=None, top_p=None, choice_temperature=4.5, commit_threshold=0.9, priority=(),
                       block_length=None, rewrite=False, end_id=None, pad_id=None, closed=None, forbid=(), guide=None,
                       generator=None, trace=False):
    """
    The one sampling loop: canvas, fixed -> repeat: candidates at masked positions, commit some, re-mask some.

    canvas (B, T) ids, model.mask_token_id where undecided; fixed (B, T) bool, positions that never change. The start
    decides the task: all masked (generate), all but the holes fixed (infill, edit), visible but not fixed (repair).

    steps: passes over the canvas (None: as many as the fullest row has masks), but no row is filled in more steps than it
    has tokens to fill; a finished row leaves the batch.
    schedule: linear | cosine, see rules.masks_left.
    commit: which masked positions become visible
      random       any (ancestral; exact when one token a step)
      confidence   the likeliest candidates, shaken by annealed noise of scale choice_temperature (MaskGIT)
      margin       the largest distance between the best and the second token (Dream's topk_margin)
      entropy      the lowest entropy
      threshold    all candidates of probability >= commit_threshold, at least one (Fast-dLLM); schedule has no say
      abstain      the lowest p(MASK); unlike confidence it does not look at the token drawn, so it prefers places
      priority     candidates out of the ids priority first
      left_to_right
    block_length: blocks of that many tokens from left to right, the rule deciding within them (semi-autoregressive).
    remask: which visible positions go back to [MASK]
      none
      random       any, with probability remask_rate
      wrong        with probability remask_rate * p(WRONG), by this pass or by remask_model on the completed canvas
      critic       with probability remask_rate * the probability that the energy head calls the token wrong in the canvas
                   completed by this step's candidates; as many more passes as the head reads
      confidence   with probability remask_rate * (1 - the probability that the token was committed with) (ReMDM-conf)
      remdm        any, with a probability that keeps the forward marginals (ReMDM, remask_rate being its eta): remdm='cap'
                   min(eta, s), 'rescale' eta * s, s = masks left / visible; 'loop' eta while a tenth is held masked
      p2           visible tokens, scored remask_rate * log(1 - p(WRONG)), compete with the candidates for staying (P2)
      causal       the causal pass verifies the draft, so the samples follow the law of the causal mode exactly, in fewer
                   passes than it needs (speculative sampling, see rules.speculate); steps, commit and schedule have no say
    random, wrong, critic and confidence use the last correct_share of the steps to re-mask and refill the full canvas.
    remask_patience: doubt ^ (v ^ -remask_patience) is what counts, v being the share of the row that is visible. While that is
    little nearly all is doubted, and what is taken back together is drawn again together: noise, which is doubted again.
    remask_random_ratio mixes random's probability in. remask_threshold: instead, all tokens doubted more than that, each
    position once, and a row without masks has finished. remask_schedule: instead, a share of the visible tokens that goes
    linearly from the first to the second number, the most doubted first.
    rewrite: what random, wrong or confidence would re-mask is drawn anew in the same pass instead, seen as it stands: a network
    that was trained on noise reads out of a wrong token what it was before (with commit random; all else needs its candidates).
    draft='causal': candidates come from the causal pass, one a step from the left: plain AR sampling, of so many tokens as steps.
    guide: that many whole completions are proposed at each step, and the tokens of one, chosen with probability proportional
    to exp(-energy), are committed (temperature 0: of the lowest energy). Each takes as many more passes as the head reads.
    end_id, pad_id: once everything left of an end token is decided, what is right of it is padding.
    closed (B, T) bool: where none of the ids forbid is drawn; None: left of what is fixed, for a text that goes on has no end.

    Returns canvas (B, T), without masks unless draft='causal' was given too few steps, nfe (B,) the passes that each row took
    part in, and the list of the canvases from the first to the last if trace, else None. Raises UserError for rules that do
    not fit together or the canvas.
    """
    mask = model.mask_token_id
    remask_rate = RATES.get(remask, 0.3) if remask_rate is None else remask_rate
    check_rules(canvas, mask, fixed, commit, remask, remdm, draft, schedule, temperature, top_k, choice_temperature, guide)
    if remask not in CORRECTING and not (remask_threshold is None and remask_schedule is None):
        raise UserError(f"remask_threshold and remask_schedule are for --remask={', '.join(CORRECTING)}, not for {remask}")
    if rewrite and (remask not in ('random', 'wrong', 'confidence') or commit != 'random' or remask_model or guide):
        raise UserError('rewrite goes with --commit=random and --remask=wrong, random or confidence, '
                        'without a second network or guide')
    canvas = canvas.clone()
    start = (canvas == mask).sum(1)                                            # (B,) tokens to fill
    corrects, loops = remask in CORRECTING, remask == 'remdm' and remdm == 'loop'
    steps = steps or int(start.max()) or max(1, canvas.size(1) // 4)
    if remask == 'causal':
        steps = canvas.size(1)                                                 # at least one token a step: always enough
    fill = start.clamp(min=1, max=max(1, steps - int(correct_share * steps) if corrects else steps))  # (B,) steps to fill
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    if remask == 'causal':                                                     # no draft yet: ids (R, W), their laws (R, W, V+2)
        window = min(DRAFT_WINDOW, canvas.size(1))
        size = int((start > 0).sum()), window if model.drafter is None else 0  # a head has no state yet to draft from
        drafted = torch.zeros(size, dtype=torch.long, device=canvas.device)
        q = torch.zeros(*size, mask + 2, device=canvas.device)
    closed = left_of(fixed) if closed is None else closed                      # (B, T)
    first, position = (canvas == mask).long().argmax(1), torch.arange(canvas.size(1), device=canvas.device)  # where blocks begin
    surety = torch.zeros(canvas.shape, dtype=fine(canvas.device), device=canvas.device)  # log-probabilities at commit time
    previous = torch.full_like(canvas, mask) if model.previous is not None else None  # self-conditioning: nothing predicted yet
    tried = fixed.clone()                                                      # remask_threshold doubts a position once
    nfe = torch.zeros_like(start)
    history = [canvas.clone()] if trace else None
    rows = torch.arange(canvas.size(0), device=canvas.device) if corrects else start.nonzero()[:, 0]
    cache = model.empty_cache(len(rows)) if 'causal' in (remask, draft) else None

    for step in range(steps):
        if rows.numel() == 0:
            break
        x, last = canvas[rows], step == steps - 1                              # (R, T)
        masked, visible = x == mask, (x != mask) & ~fixed[rows]
        if cache is not None:
            cache = room_for(cache, int(masked.long().argmax(1).max()) + 1 + (drafted.size(1) if remask == 'causal' else 0))
        if remask == 'causal':
            x, drafted, q, passes = speculate(model, x, masked, drafted, q, window, filters, generator, cache, step == 0)
        else:
            shown = None if previous is None else previous[rows].masked_fill(~masked, mask)
            hidden, passes = draft_pass(model, x, masked, draft, shown, cache, step == 0), 1
            if shown is not None:
                previous[rows] = shown
            progress = ((step + 1) / fill[rows]).clamp(max=1)                  # (R,)
            left = (start[rows] * masks_left(progress, schedule, loops) + 1e-4).long()                # (R,) masks after this step
            judge = None if last else remask_model
            candidates = None
            if guide:
                candidates = guided(model, hidden, x, masked, guide, filters, generator, end_id, pad_id, closed[rows], forbid)
                passes += model.config.energy_head * guide
            elif judge or remask == 'critic' or commit in WHOLE_CANVAS:
                candidates = propose(model, hidden, masked, filters, generator, closed[rows], forbid)
            score = commit_order(commit, model, hidden, masked, candidates, priority=priority, generator=generator,
                                 noise_scale=choice_temperature * (1 - progress[:, None]))            # (R, T)
            ready = masked                                                     # what may be committed now
            if block_length:
                block = (position - first[rows, None]) // block_length         # (R, T)
                score = score - 1e6 * block                                    # earlier blocks first
                ready = masked & (block == block.masked_fill(~masked, x.size(1)).amin(1, keepdim=True))

            again = torch.zeros_like(masked)                                   # what is re-masked
            if remask != 'none' and (rewrite or not last):
                doubt, rate = torch.ones_like(score), remask_rate              # random: all are doubted alike
                if remask in ('wrong', 'p2'):
                    whole = torch.where(masked, candidates[0], x) if judge else x
                    states = judge(whole) if judge else hidden
                    at = places(visible)                                       # (N,)
                    p = p_wrong(judge or model, states.flatten(0, 1)[at], whole.flatten()[at])       # (N,)
                    doubt = spread(visible, p).to(surety.dtype)                # (R, T)
                    passes += judge is not None
                elif remask == 'critic':
                    whole, text = text_of(torch.where(masked, candidates[0], x), end_id, pad_id, forbid)
                    doubt = model.token_energy(whole, text).sigmoid().to(surety.dtype)
                    passes += model.config.energy_head
                elif remask == 'confidence':
                    doubt = 1 - surety[rows].exp()
                elif remask == 'remdm':
                    rate = remdm_rate(remdm, remask_rate, left, visible.sum(1), progress)[:, None]   # (R, 1)
                if not rewrite and remask != 'remdm':                          # the one mends lengths too, the other keeps a law
                    doubt = spare_lengths(doubt, x, visible, end_id, pad_id)
                if remask == 'p2':
                    again = displaced(score, masked, rate * (-doubt).log1p().clamp(min=-1e3), visible, left)
                else:
                    may = visible & ~tried[rows] if remask_threshold is not None else visible
                    power = ((x != mask).sum(1, keepdim=True) / x.size(1)) ** -remask_patience if remask_patience else 1.0
                    again = doubted(doubt, may, rate, generator, threshold=remask_threshold, power=power,
                                    random_ratio=1.0 if remask == 'random' else remask_random_ratio,
                                    share=share_at(remask_schedule, step / max(1, steps - 2)))
                    tried[rows] |= again
                    if remask == 'remdm':                                      # by chance more than may be masked
                        again = random_subset(again, left, generator)

            count = masked.sum(1)                                              # (R,) tokens to commit
            if draft == 'causal':
                count = count.clamp(max=1)
            elif commit == 'threshold' and not last:
                count = (ready & (candidates[1] >= math.log(commit_threshold))).sum(1).clamp(min=1)
            elif not last:
                count = count + (0 if rewrite else again.sum(1)) - left
            chosen = first_of(score, masked, count)
            if rewrite:
                chosen, again, masked = chosen | again, torch.zeros_like(again), masked | visible
            ids, confidence, _ = candidates or propose(model, hidden, chosen, filters, generator, closed[rows], forbid)
            surety[rows] = torch.where(chosen, confidence, surety[rows])
            x = torch.where(chosen, ids, x).masked_fill(again, mask)
        x = close_rows(x, masked, mask, end_id, pad_id)
        canvas[rows] = x
        nfe[rows] += passes
        if trace:
            history.append(canvas.clone())
        if last or not corrects or remask_threshold is not None:
            going = places((x == mask).any(1))
            if cache is not None and len(going) < len(rows):
                cache = cache.index_select(2, going)
            rows = rows[going]
            if remask == 'causal':
                drafted, q = drafted[going], q[going]
    return canvas, nfe, history


def left_of(fixed):
    """Which positions have a fixed one to their right: fixed (B, T) bool -> (B, T)."""
    return fixed.flip(1).cummax(1).values.flip(1)


def check_rules(canvas, mask, fixed, commit, remask, remdm, draft, schedule, temperature, top_k, choice_temperature, guide=None):
    """Raises UserError where a rule does not exist or does not fit the canvas."""
    for name, value, known in (('commit', commit, COMMIT_RULES), ('remask', remask, REMASK_RULES),
                               ('remdm', remdm, REMDM_SCHEDULES), ('schedule', schedule, ('linear', 'cosine')),
                               ('draft', draft, ('bidirectional', 'causal'))):
        if value not in known:
            raise UserError(f"{name} expects one of {', '.join(known)}; got '{value}'")
    masked = canvas == mask
    if (masked & fixed).any():
        raise UserError('a fixed position holds a mask: it would never be filled')
    if 'causal' in (remask, draft) and (masked.cummax(1).values & ~masked).any():
        raise UserError('the causal pass cannot see what is right of a hole: with a fixed suffix or a given length '
                        'use --remask=wrong, random or none and --ar_prefix=0')
    if guide and 'causal' in (remask, draft):
        raise UserError('guide chooses among whole completions, which causal sampling does not have: '
                        'use --remask=none, wrong or critic')
    if draft == 'causal' and (commit != 'left_to_right' or remask != 'none'):
        raise UserError("draft='causal' writes from left to right and takes nothing back: commit='left_to_right', remask='none'")
    greedy = temperature == 0 or top_k == 1 or (commit == 'confidence' and choice_temperature == 0)
    empty = masked.sum(1) >= canvas.size(1) - 1                                # nothing is given but the start symbol
    if commit in (*WHOLE_CANVAS, 'abstain') and commit != 'priority' and greedy and empty.sum() > 1:
        noise = '--temperature=1' + (' and --choice_temperature=4.5' if commit == 'confidence' else '')
        raise UserError(f'commit={commit} without noise writes one sample again and again from an empty canvas: '
                        f'use {noise}, or another commit rule')


# -----------------------------------------------------------------------------
# batches of canvases


@torch.no_grad()
def fill(model, meta, canvas, fixed, *, ar_prefix=0, best_of=None, batch_size=256, seed=1337, progress=False, trace=False,
         **rules):
    """
    Runs generate_diffusion on canvas, fixed (B, T) in batches: a list of B dicts text, tokens (ids from the first position to
    the end), nfe, finished; with trace also trace (S, T), the row's canvases.

    ar_prefix: that many tokens are drawn left to right with the causal pass first (hybrid generation).
    best_of: that many samples are drawn for every canvas and one in that many is kept, by its energy, see best_samples; nfe is
    then what all of them took, with the passes that the head reads.
    rules: the keywords of generate_diffusion; remask_patience is 1 where texts have no end, else 0, if not given.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ends = dict(end_id=meta['eos'], pad_id=meta['pad'], generator=generator)
    inside = [meta[name] for name in ('bos', 'eos', 'pad') if meta[name] is not None]  # nothing but an end may end a text
    filters = {key: rules[key] for key in ('temperature', 'top_k', 'top_p') if key in rules}
    rules = {'remask_patience': float(meta['eos'] is None), **rules}           # by what was measured (docs/log.md)
    canvas, fixed = (part.repeat(best_of or 1, 1) for part in (canvas, fixed))
    samples, num = [], canvas.size(0)
    for first in tqdm(range(0, num, batch_size), disable=not progress or num <= batch_size, desc='sampling', leave=False):
        x, kept = canvas[first:first + batch_size].to(device), fixed[first:first + batch_size].to(device)
        nfe, steps = 0, []
        if ar_prefix:
            width = min(x.size(1), int((x == model.mask_token_id).long().argmax(1).max()) + ar_prefix)
            head, nfe, steps = generate_diffusion(
                model, x[:, :width], kept[:, :width], steps=ar_prefix, commit='left_to_right', draft='causal',
                closed=left_of(kept)[:, :width], forbid=inside, trace=trace, **filters, **ends)  # the end may be beyond width
            steps = [torch.cat((step, x[:, width:]), 1) for step in steps or []][:-1]
            masked, x = x == model.mask_token_id, torch.cat((head, x[:, width:]), 1)
            x = close_rows(x, masked, model.mask_token_id, meta['eos'], meta['pad'])
        x, more, history = generate_diffusion(model, x, kept, forbid=inside, trace=trace, **rules, **ends)
        nfe, steps = nfe + more, steps + (history or [])
        if best_of:
            nfe = nfe + model.config.energy_head
            energy = model.energy(*text_of(x, meta['eos'], meta['pad'], inside)).cpu()
        for row, (ids, passes) in enumerate(zip(x.tolist(), nfe.tolist())):
            text, finished = decode(meta, ids)
            samples.append(dict(text=text, tokens=until_end(meta, ids), nfe=passes, finished=finished))
            if trace:
                samples[-1]['trace'] = torch.stack([step[row] for step in steps])
            if best_of:
                samples[-1]['energy'] = energy[row].item()
    return samples if not best_of else best_samples(samples, canvas.tolist(), num // best_of)


def best_samples(samples, canvases, num):
    """
    Of samples with an energy, the first num of them followed by as many further candidates for the same canvases, again and
    again, num: each of the first is replaced by the candidate of the lowest energy, for an equal canvas and of its own length,
    that is not taken yet.

    Of its own length, because more can be wrong in long texts: candidates that compete over all lengths get shorter.
    """
    kinds = [(tuple(canvas), len(sample['tokens'])) for sample, canvas in zip(samples, canvases)]
    candidates = {}
    for i in sorted(range(len(samples)), key=lambda i: -samples[i]['energy']):
        candidates.setdefault(kinds[i], []).append(samples[i])                 # the best last
    spent = [sum(sample['nfe'] for sample in samples[i::num]) for i in range(num)]
    return [dict(candidates[kind].pop(), nfe=passes) for kind, passes in zip(kinds, spent)]


def generate(model, meta, num, *, prompt=(), lengths=None, **how):
    """Draws num samples from an empty canvas, see start_canvas and fill, whose keywords it takes."""
    return fill(model, meta, *start_canvas(model, meta, num, prompt, lengths), **how)


@torch.no_grad()
def judge_rows(model, meta, canvas, config, estimates=32, seed=0):
    """
    What a checkpoint thinks of whole texts, canvas (B, T): a list of B dicts with those of these that it was trained for:
    nelbo and causal_nll in nats a token (padding paid for, not counted), p_wrong, a list of T.

    nelbo: the mean of that many estimates, k stratified over them.
    """
    writes, causal, detects = supports(config)
    device = next(model.parameters()).device
    results = []
    for row in canvas.to(device).split(1):
        generator = torch.Generator(device).manual_seed(seed)                  # so that a text has one score
        free, real = modelled(row, meta)
        result, tokens = {}, max(1, int(real.sum()))
        if writes:
            bound = nelbo(model, row.expand(estimates, -1), free.expand(estimates, -1), generator)
            result['nelbo'] = bound.mean().item() / tokens
        if causal:
            result['causal_nll'] = causal_nll(model, row, real).item() / tokens
        if detects:
            result['p_wrong'] = p_wrong(model, model(row), row)[0].tolist()
        results.append(result)
    return results


# -----------------------------------------------------------------------------
# the command


def check_settings():
    """Raises UserError for a value that makes no sense, before anything is loaded."""
    for name, low, high in (('num_samples', 1, None), ('batch_size', 1, None), ('steps', 1, None), ('length', 1, None),
                            ('top_k', 1, None), ('top_p', 0, 1), ('temperature', 0, None), ('ar_prefix', 0, None),
                            ('choice_temperature', 0, None), ('remask_rate', 0, None),
                            ('remask_random_ratio', 0, 1), ('remask_patience', 0, None), ('remask_threshold', 0, None),
                            ('commit_threshold', 0, None),
                            ('block_length', 1, None), ('guide', 1, None), ('best_of', 1, None), ('correct_share', 0, 1),
                            ('merge_weight', 0, 1)):
        value = globals()[name]
        if value is not None and (value < low or (high is not None and value > high)):
            raise UserError(f'{name} must be {f"in {low}..{high}" if high is not None else f"at least {low}"}, got {value}')
    if not 0 <= seed < 2 ** 63:
        raise UserError(f'seed must be in 0..2^63 - 1, got {seed}')
    if top_p == 0 or commit_threshold == 0:
        raise UserError('top_p=0 leaves no token to draw' if top_p == 0 else 'commit_threshold must be above 0')
    if remask_schedule and (len(remask_schedule) != 2 or not all(0 <= share <= 1 for share in remask_schedule)):
        raise UserError(f'remask_schedule expects two shares in 0..1, for example 0.3,0.05; got {remask_schedule}')
    if remask_schedule and remask_threshold is not None:
        raise UserError('remask_schedule and remask_threshold both say how much is re-masked: give one of them')
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, 1)
        raise UserError(f"task expects one of {', '.join(TASKS)}; got '{task}'" + (f', did you mean {near[0]}?' if near else ''))
    if task == 'generate' and (text is not None or file or mask):
        raise UserError('text, file and mask are for --task=infill, repair, edit or score; generate takes --prompt')
    if task == 'score' and (animate or html):
        raise UserError('score writes nothing, so there is nothing to watch: --animate and --html are for the other tasks')
    if task != 'generate' and (prompt or length):
        raise UserError(f'prompt and length are for --task=generate; {task} takes --text or --file')
    if task != 'generate' and (text is None) == (file is None):
        raise UserError(f'--task={task} needs a text: --text="..." or --file=FILE, one text a line'
                        + (', not both' if file else ''))
    if (task == 'edit') != (mask is not None):
        raise UserError('--mask=3:5 says what --task=edit writes anew' + ('' if task == 'edit' else f'; {task} takes no mask'))
    if export and not export.endswith('.safetensors'):
        raise UserError(f"export expects the name of a .safetensors file, got '{export}'")
    if export:
        import_safetensors()
    for path in (save, html, export):
        check_folder(path)


def read_lines(path):
    """The lines of a text file that are not empty. Raises UserError if there are none or it cannot be read."""
    try:
        with open(path, encoding='utf-8') as lines:
            found = [line for line in lines.read().splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read: {getattr(error, "strerror", None) or error}') from error
    if not found:
        raise UserError(f'{path}: there is no text in it')
    return found


def load_all():
    """The model, its checkpoint and the judge (or None), ready to compute; says on screen what they are."""
    path = find_checkpoint(init_from, out_dir)
    model, checkpoint = load_merged(path, merge_from, merge_weight) if merge_from else load_checkpoint(path)
    print(f"{path}: {checkpoint['config']['training_type']} on {checkpoint['meta']['name']}, iteration {checkpoint['iter_num']}"
          + (f', merged with {merge_weight:g} of {merge_from}' if merge_from else ''))
    judge = None
    if remask_from:
        judge, other = load_checkpoint(remask_from)
        check_same_model(path, identity(checkpoint), remask_from, identity(other), ('vocab_size', 'block_size', 'itos'))
        if not supports(other['config'])[2]:
            raise UserError(f'{remask_from} was not trained to find wrong tokens '
                            f"(training_type={other['config']['training_type']})")
        configure_compute(judge, device, dtype, attention, compile)
    model, choices = configure_compute(model, device, dtype, attention, compile)
    print(f'{model.num_params():,} parameters, {choices}')
    if not export:                                                             # what is exported stays as it was trained
        for network in filter(None, (model, judge)):
            network.freeze()
    return model, checkpoint, judge


def canvases(model, meta):
    """
    What is to be written: (texts or None, canvas (B, T), fixed (B, T)), num_samples rows for each text.

    In a dataset without end token texts of different lengths would need canvases of different lengths: UserError.
    """
    if task == 'generate':
        num = num_samples or 10
        lengths = None if length is None else torch.full((num,), length)
        return None, *start_canvas(model, meta, num, encode(meta, prompt), lengths)
    texts = read_lines(file) if file else [text]
    pairs = [task_canvas(task, model, meta, line, hole, mask) for line in texts]
    if len({canvas.size(1) for canvas, _ in pairs}) > 1:
        raise UserError(f"{meta['name']} has no end token, so texts of different lengths cannot share a canvas: "
                        f'give texts of one length, or one at a time')
    canvas, fixed = (torch.cat(parts).repeat_interleave(num_samples or 1, 0) for parts in zip(*pairs))
    return [line for line in texts for _ in range(num_samples or 1)], canvas, fixed


def judge_samples(model, meta, config, samples, width):
    """Adds to every sample what judge_rows says of it, on a canvas of that width, or as long as it is where nothing is padded."""
    for sample in samples:
        row = rows_of([sample], meta, len(sample['tokens']) if meta['pad'] is None else width)
        judged, = judge_rows(model, meta, row, config)
        sample.update(judged)
        if 'p_wrong' in judged:
            sample['p_wrong'] = judged['p_wrong'][:len(sample['tokens'])]


def main():
    check_settings()
    model, checkpoint, judge = load_all()
    if export:
        export_safetensors(export, model, checkpoint)
        return print(f'written to {export}; sample from it: python sample.py --init_from={export}')
    meta, config = checkpoint['meta'], checkpoint['config']
    texts, t0, width = None, time.time(), model.config.block_size
    if task == 'score':
        samples = [dict(text=line, tokens=until_end(meta, task_canvas(task, model, meta, line)[0][0].tolist()), nfe=0,
                        finished=meta['eos'] is not None) for line in (read_lines(file) if file else [text])]
    else:
        texts, canvas, fixed = canvases(model, meta)
        masked, width = canvas == model.mask_token_id, canvas.size(1)
        rules = choose_rules(
            config, preset=preset, task=task, inside=task == 'repair' or bool((masked.cummax(1).values & ~masked).any()),
            judge=judge is not None, steps=steps, schedule=schedule, commit=commit, block_length=block_length,
            ar_prefix=ar_prefix, choice_temperature=choice_temperature, remask=remask, remask_rate=remask_rate,
            remask_patience=remask_patience, remask_threshold=remask_threshold, remask_schedule=remask_schedule,
            correct_share=correct_share, rewrite=rewrite, guide=guide, best_of=best_of, temperature=temperature)
        print(', '.join(f'{name}={value}' for name, value in rules.items()))
        samples = fill(
            model, meta, canvas, fixed, batch_size=batch_size, seed=seed, progress=True,
            trace=bool(animate or html) or task == 'repair', remask_model=judge, remask_random_ratio=remask_random_ratio,
            remdm=remdm, commit_threshold=commit_threshold,
            priority=encode(meta, priority) if rules['commit'] == 'priority' else (), top_k=top_k, top_p=top_p, **rules)
    seconds, num = time.time() - t0, len(samples)
    if task == 'repair':
        for sample, before in zip(samples, canvas):
            sample['marks'] = show.marks(before, sample['trace'].cpu(), model.mask_token_id)[:len(sample['tokens'])]
    if score or task == 'score':
        judge_samples(model, meta, config, samples, width)

    scorer = load_task(meta['name'])
    for i, sample in enumerate(samples[:50]):
        print(show.report(sample, meta, scorer and scorer.verdict, texts and texts[i]))
    if num > 50:
        print(f'... and {num - 50} more' + ('' if save else ' (--save=FILE.jsonl keeps them all)'))
    mean_nfe = sum(sample['nfe'] for sample in samples) / num
    if task != 'score':
        print(f'{num} samples, {mean_nfe:.1f} passes each (NFE), {num / seconds:.1f} samples/s')
    if animate or html:
        show.watch(judge or (model if supports(config)[2] else None), meta, fixed, samples, scorer and scorer.verdict, task,
                   ', '.join(f'{name}={value}' for name, value in rules.items()) + f'; {mean_nfe:.0f} passes a sample',
                   animate, html, writer=model if judge else None)
    if save:
        lines = [{key: value for key, value in sample.items() if key != 'trace'} for sample in samples]
        write_atomically(save, ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines))
        print(f'written to {save}')


if __name__ == '__main__':
    configurator.run(globals())
