"""
Sample from a trained nanoRemask checkpoint.

    python sample.py --init_from=ckpt                        the newest checkpoint under out_dir, its best sampler
    python sample.py --init_from=out/ckpt_unmasking.pt --commit=random --steps=32
    python sample.py --remask=wrong --remask_from=out/ckpt_remasking_all_positions.pt --prompt="(+"

All sampling is one loop with two rules: the commit rule says which masked positions of the canvas become visible,
the remask rule says which visible ones go back to [MASK]. See generate_diffusion.
"""

import functools
import glob
import importlib.util
import json
import math
import os
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import configurator
from configurator import UserError
from model import atomically, check_same_model, configure_compute, load_checkpoint, random_subset

# -----------------------------------------------------------------------------
init_from = 'ckpt'         # 'ckpt': the newest checkpoint under out_dir; or the path of one
remask_from: str = None    # path of a second, remasking checkpoint that judges the visible tokens
merge_from: str = None     # path of a second checkpoint of the same architecture to merge with the first
merge_weight = 0.5         # its share in the merged weights: 0 is the first checkpoint, 1 the second
out_dir = 'out'            # where 'ckpt' looks
num_samples = 10           # how many samples to draw
steps: int = None          # passes over the canvas; None: one a token (remask=causal takes what it needs)
schedule = 'linear'        # linear: equally many tokens a step; cosine: few early, many late
commit: str = None         # random | confidence | left_to_right | abstain; None: the best that the checkpoint supports
remask: str = None         # none | random | wrong | causal; None: the best that the checkpoint supports
remask_rate = 0.3          # a visible token is re-masked with this probability (times p(WRONG) for wrong)
remask_random_ratio = 0.0  # 0: re-mask by p(WRONG) alone, 1: at random alone
correct_share = 0.25       # share of the steps, at the end, that only re-mask and refill (remask=random, wrong)
ar_prefix: int = None      # tokens drawn left to right with the causal pass first; None: 0 (a causal checkpoint: all)
temperature = 1.0          # 0: the most probable token, 1: the model's own distribution
top_k: int = None          # draw among the k most probable tokens only
top_p: float = None        # draw among the most probable tokens that together reach this probability only
choice_temperature = 4.5   # commit=confidence: noise in the order, annealed to 0 (MaskGIT)
prompt = ''                # text that every sample starts with
length: int = None         # number of tokens, given; None: the model decides (a dataset without end token: block_size)
seed = 1337                # the same seed and command give the same text
batch_size = 256           # samples drawn at a time
save: str = None           # also write the samples to this file, one JSON object a line
device = 'auto'            # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'             # auto | float32 | bfloat16
attention = 'auto'         # auto | plain | sdpa
compile = False            # torch.compile the network
# -----------------------------------------------------------------------------

COMMIT_RULES = ('random', 'confidence', 'left_to_right', 'abstain')
REMASK_RULES = ('none', 'random', 'wrong', 'causal')
DRAFT_WINDOW = 16  # remask=causal drafts this many tokens a round; EXPERIMENTS.md has 8 to 63


# -----------------------------------------------------------------------------
# drawing tokens


def filtered(logits, temperature=1.0, top_k=None, top_p=None):
    """logits (N, V+2), specials already at -inf -> probabilities (N, V+2) to draw from, rows sum to 1."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float('-inf'))
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        ordered = ordered * (ordered.cumsum(-1) - ordered < top_p)   # the token that crosses top_p stays in
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs, generator=None):
    """One token a row: probs (..., V+2) -> ids (...)."""
    flat = probs.reshape(-1, probs.size(-1))
    if flat.size(0) == 0:
        return torch.zeros(probs.shape[:-1], dtype=torch.long, device=probs.device)
    return torch.multinomial(flat, 1, generator=generator).view(probs.shape[:-1])


# -----------------------------------------------------------------------------
# the loop


@torch.no_grad()
def generate_diffusion(model, canvas, fixed, *, steps=None, commit='random', remask='none', schedule='linear',
                       draft='bidirectional', remask_model=None, remask_rate=0.3, remask_random_ratio=0.0,
                       correct_share=0.25, temperature=1.0, top_k=None, top_p=None, choice_temperature=4.5,
                       end_id=None, pad_id=None, forbid=(), generator=None, trace=False):
    """
    The one sampling loop: canvas, fixed -> repeat: candidates at masked positions, commit some, re-mask some.

    canvas (B, T) ids, model.mask_token_id where undecided; fixed (B, T) bool, positions that never change. The start
    decides the task: all masked (generate), prompt and suffix fixed (infill), visible but not fixed (repair).

    steps: passes over the canvas (None: as many as the fullest row has masks), but no row is filled in more steps than it
    has tokens to fill; a finished row leaves the batch.
    commit: random (ancestral; exact when one token a step) | confidence (MaskGIT) | left_to_right | abstain (lowest p(MASK)
      first; unlike confidence it does not look at the token drawn, so it prefers places, not tokens).
    remask: none
      | random: each visible token with probability remask_rate
      | wrong: with probability remask_rate * p(WRONG), judged by the same pass, or by remask_model on the completed
        canvas; remask_random_ratio mixes random's probability in
      | causal: the causal pass verifies the draft, so the samples follow the law of the causal mode exactly, in fewer
        passes than it needs (speculative sampling, see speculate); steps, commit and schedule have no say.
    correct_share: the share of the steps, at the end, in which random and wrong only refill what they re-masked.
    draft='causal': candidates come from the causal pass, one a step from the left: plain AR sampling.
    end_id, pad_id: once everything left of an end token is decided, what is right of it is padding.
    forbid: ids that are never drawn, beside the special ones (all rules but causal).

    Returns canvas (B, T) without masks, nfe (B,) the passes that each row took part in, and the list of the canvases
    from the first to the last if trace, else None. Raises UserError for rules that do not fit together or the canvas.
    """
    mask = model.mask_token_id
    check_rules(canvas, mask, fixed, commit, remask, draft, schedule, temperature, top_k, choice_temperature)
    canvas = canvas.clone()
    start = (canvas == mask).sum(1)                                            # (B,) tokens to fill
    corrects = remask in ('random', 'wrong')
    steps = steps or int(start.max()) or max(1, canvas.size(1) // 4)
    if remask == 'causal' or draft == 'causal':
        steps = canvas.size(1)                                                 # at least one token a step: always enough
    fill = start.clamp(min=1, max=max(1, steps - int(correct_share * steps) if corrects else steps))  # (B,) steps to fill
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    if remask == 'causal':
        window = min(DRAFT_WINDOW, canvas.size(1))
        drafts = torch.zeros(*canvas.shape[:1], window, mask + 2, device=canvas.device)  # (B, W, V+2), see speculate
    nfe = torch.zeros_like(start)
    history = [canvas.clone()] if trace else None
    rows = torch.arange(canvas.size(0), device=canvas.device) if corrects else start.nonzero()[:, 0]

    for step in range(steps):
        if rows.numel() == 0:
            break
        x, last = canvas[rows], step == steps - 1                              # (R, T)
        masked = x == mask
        if remask == 'causal':
            x, drafts[rows], passes = speculate(model, x, masked, drafts[rows], filters, generator)
        else:
            hidden, passes = draft_pass(model, x, masked, draft), 1            # (R, T, C)
            progress = ((step + 1) / fill[rows]).clamp(max=1)                  # (R,)
            judged = remask_model is not None and corrects and not last
            if judged or commit == 'confidence':                               # these look at every candidate
                proposed, confidence = propose(model, hidden, masked, filters, generator, forbid)
            doubted = torch.zeros_like(masked)
            if corrects and not last:
                doubt = 1.0
                if remask == 'wrong':
                    doubt = p_wrong(model, hidden, x)
                    if judged:
                        whole = torch.where(masked, proposed, x)
                        doubt, passes = p_wrong(remask_model, remask_model(whole), whole), 2
                rate = remask_rate * ((1 - remask_random_ratio) * doubt + remask_random_ratio)
                noise = torch.rand(x.shape, generator=generator, device=x.device)
                doubted = (noise < rate) & ~fixed[rows] & ~masked
            if draft == 'causal':
                count = masked.sum(1).clamp(max=1)                             # (R,) tokens to commit
            else:
                left = 1 - progress if schedule == 'linear' else (progress * math.pi / 2).cos()
                count = masked.sum(1) + doubted.sum(1) - (start[rows] * left + 1e-4).long()
            if commit == 'confidence':
                chosen = most_confident(masked, confidence, count, choice_temperature * (1 - progress[:, None]), generator)
            elif commit == 'abstain':
                chosen = most_confident(masked, -p_mask(model, hidden, masked), count, 0.0, generator)
            elif commit == 'random':
                chosen = random_subset(masked, count, generator)
            else:
                chosen = masked & (masked.cumsum(1) <= count[:, None])
            if not (judged or commit == 'confidence'):                         # the others choose first, then draw
                proposed, _ = propose(model, hidden, chosen, filters, generator, forbid)
            x = torch.where(chosen, proposed, x).masked_fill(doubted, mask)
        x = close_rows(x, masked, mask, end_id, pad_id)
        canvas[rows] = x
        nfe[rows] += passes
        if trace:
            history.append(canvas.clone())
        if last or not corrects:
            rows = rows[(x == mask).any(1)]
    return canvas, nfe, history


def check_rules(canvas, mask, fixed, commit, remask, draft, schedule, temperature, top_k, choice_temperature):
    """Raises UserError where a rule does not exist or does not fit the canvas."""
    for name, value, known in (('commit', commit, COMMIT_RULES), ('remask', remask, REMASK_RULES),
                               ('schedule', schedule, ('linear', 'cosine')),
                               ('draft', draft, ('bidirectional', 'causal'))):
        if value not in known:
            raise UserError(f"{name} expects one of {', '.join(known)}; got '{value}'")
    masked = canvas == mask
    if (masked & fixed).any():
        raise UserError('a fixed position holds a mask: it would never be filled')
    if 'causal' in (remask, draft) and (masked.cummax(1).values & ~masked).any():
        raise UserError('the causal pass cannot see what is right of a hole: with a fixed suffix or a given length '
                        'use --remask=wrong, random or none and --ar_prefix=0')
    greedy = temperature == 0 or top_k == 1 or (commit == 'confidence' and choice_temperature == 0)
    if commit in ('confidence', 'abstain') and greedy and canvas.size(0) > 1 and not (fixed.sum(1) > 1).any():
        raise UserError(f'commit={commit} without noise writes one sample again and again from an empty canvas: '
                        f'use --temperature=1 and --choice_temperature=4.5, or another commit rule')


def draft_pass(model, x, masked, draft):
    """Hidden states (R, T, C); the causal pass skips the columns right of the last row's first hole, which it cannot see."""
    if draft == 'bidirectional':
        return model(x)
    width = int(masked.long().argmax(1).max()) + 1
    return F.pad(model(x[:, :width], causal=True), (0, 0, 0, x.size(1) - width))


def propose(model, hidden, where, filters, generator, forbid=()):
    """Candidate ids (R, T) and their confidence (R, T), a float64 log-probability, at the True positions of where."""
    logits = model.logits(hidden[where], real_only=True)                       # (N, V+2)
    if forbid:
        logits[:, list(forbid)] = float('-inf')
    ids = draw(filtered(logits, **filters), generator)                         # (N,)
    logp = logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]       # of the unfiltered distribution
    return (torch.zeros(where.shape, dtype=ids.dtype, device=ids.device).masked_scatter(where, ids),
            torch.zeros(where.shape, dtype=logp.dtype, device=ids.device).masked_scatter(where, logp))


def p_wrong(model, hidden, ids):
    """
    p(WRONG), the probability that the token which stands at a position is not the right one: 1 - p(that token).

    hidden (..., C), ids (...) -> (...). A network that learned the target [WRONG] gives what it takes from the right token
    to [WRONG] (the two differ by 0.01 on average); one that learned the original gives it to the other tokens.
    """
    return 1 - model.logits(hidden).softmax(-1).gather(-1, ids[..., None])[..., 0]


def p_mask(model, hidden, where):
    """p(MASK) (R, T), how much a network trained with allow_abstain would rather leave a masked position open."""
    logits = model.logits(hidden[where])[:, :model.mask_token_id + 1]          # (N, V+1), mask_logit_bias included
    keep = logits.double().softmax(-1)[:, -1]
    return torch.zeros(where.shape, dtype=keep.dtype, device=keep.device).masked_scatter(where, keep)


def most_confident(masked, confidence, count, noise, generator):
    """Of the masked positions (R, T) the count (R,) surest, in an order shaken by Gumbel noise of that scale (MaskGIT)."""
    u = torch.rand(confidence.shape, generator=generator, device=confidence.device, dtype=confidence.dtype)
    score = (confidence - noise * (-u.log()).log()).masked_fill(~masked, float('-inf'))
    rank = score.argsort(1, descending=True).argsort(1)
    return masked & (rank < count[:, None])


def close_rows(x, masked, mask, end_id, pad_id):
    """x (R, T): of the positions that were masked, those right of an end token with no hole left of it become padding."""
    if end_id is None:
        return x
    decided = (x == mask).cumsum(1) == 0
    is_end = ((x == end_id) & decided).long()
    return x.masked_fill(masked & (is_end.cumsum(1) > is_end), pad_id)


def speculate(model, x, masked, drafts, filters, generator):
    """
    One round of speculative sampling (Leviathan et al. 2023): a draft of each row's next tokens, a verdict on it.

    drafts (R, W, V+2): the distributions that the next W tokens of each row are drafted from; rows whose first one is all
    0 have none yet and take a bidirectional pass. The causal pass then looks at the whole draft at once: from the left
    each token is accepted with probability min(1, p/q), p of the causal pass, q of the draft; the first rejected one is
    redrawn from the positive part of p - q, and if none is rejected one more comes from p. So a row gains at least one
    token, and every token is distributed by p. What the causal pass said about the tokens behind, though in the light
    of a rejected one, is the next draft for free (as in Jacobi decoding): no second bidirectional pass.

    x (R, T), whose masks are a suffix of each row -> x (R, T), the next drafts, passes (R,).
    """
    T, W = x.size(1), drafts.size(1)
    V = model.mask_token_id
    at = masked.long().argmax(1)[:, None] + torch.arange(W + 1, device=x.device)             # (R, W+1) from the first hole
    pick = at.clamp(max=T - 1)[..., None].expand(-1, -1, model.config.n_embd)
    new = drafts[:, 0].sum(-1) == 0
    q = drafts.clone()
    if new.any():
        hidden = model(x[new]).gather(1, pick[new, :W])                                      # (N, W, C)
        q[new] = filtered(model.logits(hidden, real_only=True), **filters).to(q.dtype)
    blank = F.pad(torch.full((V,), 1 / V, device=x.device), (0, 2))                          # no idea: any real token
    q = torch.where(q.sum(-1, keepdim=True) == 0, blank, q)                                  # (R, W, V+2)
    drafted = draw(q, generator)                                                             # (R, W)

    x = F.pad(x, (0, W + 1), value=model.mask_token_id)                        # room for windows that stand out
    width = min(T, int(at.max()) + 1)
    hidden = model(x.scatter(1, at[:, :W], drafted)[:, :width], causal=True)   # (R, width, C)
    p = filtered(model.logits(hidden.gather(1, pick.clamp(max=width - 1)), real_only=True), **filters)  # (R, W+1, V+2)

    ratio = (p[:, :W] / q).gather(2, drafted[..., None])[..., 0]               # (R, W)
    accepted = torch.rand(ratio.shape, generator=generator, device=x.device) < ratio
    count = accepted.long().cumprod(1).sum(1, keepdim=True)                    # (R, 1) accepted from the left
    here = count[..., None].expand(-1, -1, p.size(2))
    goal, drawn_from = p.gather(1, here)[:, 0], F.pad(q, (0, 0, 0, 1)).gather(1, here)[:, 0]  # q: 0 if none was rejected
    rest = (goal - drawn_from).clamp(min=0)                                    # (R, V+2)
    rest = torch.where(rest.sum(-1, keepdim=True) > 1e-9, rest, goal)          # p = q up to rounding
    tokens = F.pad(drafted, (0, 1)).scatter(1, count, draw(rest, generator)[:, None])        # (R, W+1)
    window = torch.arange(W + 1, device=x.device)
    x = x.scatter(1, at, tokens.masked_fill(window > count, model.mask_token_id))[:, :T]
    behind = (count + 1 + window[:W])[..., None].expand(-1, -1, p.size(2))     # (R, W, V+2); past the window: 0
    return x, F.pad(p, (0, 0, 0, W)).gather(1, behind).to(drafts.dtype), 1 + new.long()


# -----------------------------------------------------------------------------
# text in, text out


def encode(meta, text):
    """text -> list of ids. Raises UserError for a character outside the dataset's vocabulary."""
    if meta['tokenizer'] == 'gpt2':
        import tiktoken
        return tiktoken.get_encoding('gpt2').encode_ordinary(text)
    stoi = {s: i for i, s in enumerate(meta['itos'])}
    unknown = sorted({c for c in text if c not in stoi})
    if unknown:
        known = ''.join(s for s in meta['itos'] if len(s) == 1)
        raise UserError(f"{unknown[0]!r} in {text!r} is not in the vocabulary of {meta['name']}: {known!r}")
    return [stoi[c] for c in text]


def decode(meta, ids):
    """ids, from the first position on -> (text up to the end token, whether there is one)."""
    ids = [i for i in ids if i != meta['bos']]
    while ids[-2:] == [meta['pad']] * 2:                                       # one is enough to see that there is no end
        ids.pop()
    finished = meta['eos'] is not None and meta['eos'] in ids
    if finished:
        ids = ids[:ids.index(meta['eos'])]
    if meta['tokenizer'] == 'gpt2':
        import tiktoken
        return tiktoken.get_encoding('gpt2').decode(ids), finished
    return ''.join(meta['itos'][i] for i in ids), finished


def start_canvas(model, meta, num, prompt=(), lengths=None):
    """
    An empty canvas for num samples: (canvas (B, T) ids, fixed (B, T) bool).

    prompt: ids that every sample starts with. lengths: tokens in each sample (B,), None: the model's own decision
    (for a dataset without end token the canvas is as long as the longest length). Raises UserError if it does not fit.
    """
    bos = [] if meta['bos'] is None else [meta['bos']]
    ends = 0 if meta['eos'] is None else 1
    room = model.config.block_size - len(bos) - ends
    longest = room if lengths is None else int(lengths.max())
    if longest > room:
        raise UserError(f'length {longest} does not fit: block_size {model.config.block_size} leaves room for {room}')
    shortest = room if lengths is None else int(lengths.min())
    if shortest < 1:
        raise UserError(f'length must be at least 1, got {shortest}')
    if len(prompt) > shortest:
        raise UserError(f'the prompt has {len(prompt)} tokens, there is room for {shortest}')
    T = model.config.block_size if ends else len(bos) + longest
    canvas = torch.full((num, T), model.mask_token_id)
    canvas[:, :len(bos) + len(prompt)] = torch.tensor([*bos, *prompt], dtype=torch.long)
    if ends and lengths is not None:
        position, end = torch.arange(T), len(bos) + lengths[:, None]
        canvas = canvas.masked_fill(position > end, meta['pad']).masked_fill(position == end, meta['eos'])
    return canvas, canvas != model.mask_token_id


def generate(model, meta, num, *, prompt=(), lengths=None, ar_prefix=0, batch_size=256, seed=1337, progress=False, **rules):
    """
    Draws num samples in batches: a list of dicts text, tokens (ids from the first position to the end), nfe, finished.

    ar_prefix: that many tokens are drawn left to right with the causal pass first (hybrid generation).
    rules: the keywords of generate_diffusion.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ends = dict(end_id=meta['eos'], pad_id=meta['pad'], generator=generator)
    # where the length is given, nothing inside it may end the text
    inside = [meta[name] for name in ('bos', 'eos', 'pad') if meta[name] is not None] if lengths is not None else []
    filters = {key: rules[key] for key in ('temperature', 'top_k', 'top_p') if key in rules}
    canvases, fixeds = start_canvas(model, meta, num, prompt, lengths)
    samples = []
    for first in tqdm(range(0, num, batch_size), disable=not progress or num <= batch_size, desc='sampling', leave=False):
        canvas, fixed = canvases[first:first + batch_size].to(device), fixeds[first:first + batch_size].to(device)
        nfe = 0
        if ar_prefix:
            width = min(canvas.size(1), int((canvas == model.mask_token_id).long().argmax(1).max()) + ar_prefix)
            head, nfe, _ = generate_diffusion(model, canvas[:, :width], fixed[:, :width], commit='left_to_right',
                                              draft='causal', **filters, **ends)
            canvas = close_rows(torch.cat((head, canvas[:, width:]), 1), canvas == model.mask_token_id,
                                model.mask_token_id, meta['eos'], meta['pad'])
        canvas, more, _ = generate_diffusion(model, canvas, fixed, forbid=inside, **rules, **ends)
        for ids, passes in zip(canvas.tolist(), (nfe + more).tolist()):
            text, finished = decode(meta, ids)
            tokens = ids[:ids.index(meta['eos']) + 1] if finished else ids
            samples.append(dict(text=text, tokens=tokens, nfe=passes, finished=finished))
    return samples


def supports(config):
    """What a checkpoint of this config was trained for: (unmasking, the causal mode, finding wrong tokens)."""
    kind = config['training_type']
    return (kind in ('unmasking', 'joint', 'denoising'), kind == 'causal' or config['causal_ratio'] > 0,
            kind in ('joint', 'remasking', 'denoising'))


def best_rules(config, lengths_given=False, commit=None, remask=None, ar_prefix=None, judge=False):
    """
    The rules that were not chosen, by what the checkpoint was trained for: dict(commit, remask, ar_prefix).

    config: the checkpoint's; judge: whether a second checkpoint finds the wrong tokens. Raises UserError if a chosen rule
    needs something that the checkpoint was not trained for.
    """
    kind = config['training_type']
    _, causal, detects = supports(config)
    if judge and remask not in (None, 'wrong'):
        raise UserError(f'--remask_from judges tokens for --remask=wrong, not for --remask={remask}')
    if judge:
        remask = 'wrong'
    if kind == 'remasking':
        raise UserError('this is a remasking checkpoint: it judges tokens but cannot write; '
                        'give it as --remask_from, and an unmasking or joint one as --init_from')
    if not causal and (remask == 'causal' or ar_prefix):
        raise UserError('this checkpoint has no trained causal mode: train with --causal_ratio=0.33, '
                        'or sample with --ar_prefix=0 and --remask=none, random or wrong')
    if kind == 'causal' and (commit or remask not in (None, 'none')):
        raise UserError('this causal checkpoint cannot fill a hole: it samples left to right (no --commit, --remask, '
                        '--remask_from)')
    if commit == 'abstain' and not config.get('allow_abstain'):
        raise UserError('commit=abstain needs a checkpoint trained with --allow_abstain=True')
    if remask == 'wrong' and not (detects or judge):
        raise UserError('this checkpoint was not trained to find wrong tokens: give a remasking one as --remask_from=PATH')
    if remask is None:
        if kind != 'causal' and causal and not lengths_given and commit is None and not ar_prefix:
            remask = 'causal'
        else:
            # whoever saw wrong tokens only calls every token wrong
            remask = 'wrong' if judge or (detects and config['remasking_loss_type'] == 'all_positions') else 'none'
    if ar_prefix is None:
        ar_prefix = config['block_size'] if kind == 'causal' else 0
    return dict(commit=commit or 'random', remask=remask, ar_prefix=ar_prefix)


# -----------------------------------------------------------------------------
# the command


def find_checkpoint(name, out_dir):
    """'ckpt': the newest ckpt_*.pt under out_dir; otherwise the name is a path. Raises UserError if there is none."""
    if name != 'ckpt':
        return name
    found = glob.glob(os.path.join(out_dir, '**', 'ckpt_*.pt'), recursive=True)
    if not found:
        raise UserError(f'no checkpoint under {out_dir}; train one first: python train.py config/remask_all.py')
    return max(found, key=os.path.getmtime)


def load_merged(path, other_path, weight):
    """
    Two checkpoints of one architecture, weights interpolated: (model, checkpoint), weight 0 being the first (the plan's
    merging). The result counts as trained for what either was. Raises UserError, naming the field in which they differ.
    """
    (model, checkpoint), (other, other_checkpoint) = load_checkpoint(path), load_checkpoint(other_path)
    check_same_model(path, {**checkpoint['model_args'], 'itos': checkpoint['meta']['itos']},
                     other_path, {**other_checkpoint['model_args'], 'itos': other_checkpoint['meta']['itos']})
    with torch.no_grad():
        mine, theirs = model.state_dict(), other.state_dict()
        torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], weight)
    config, other_config = checkpoint['config'], other_checkpoint['config']
    unmasks, causal, detects = (a or b for a, b in zip(supports(config), supports(other_config)))
    kind = ('joint' if detects else 'unmasking') if unmasks else 'remasking' if detects else 'causal'
    judge = config if supports(config)[2] else other_config
    checkpoint['config'] = {**config, 'training_type': kind, 'causal_ratio': float(causal),
                            'remasking_loss_type': judge['remasking_loss_type'],
                            'allow_abstain': config.get('allow_abstain') and other_config.get('allow_abstain')}
    return model, checkpoint


@functools.lru_cache
def load_task(dataset):
    """The module data/<dataset>/task.py, which knows right from wrong there, or None."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', dataset, 'task.py')
    if not os.path.exists(path):
        return None
    spec = importlib.util.spec_from_file_location(f'{dataset}_task', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_atomically(path, text):
    """Writes a text file so that it is there whole or not at all."""
    try:
        with atomically(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
            file.write(text)
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {error.strerror}') from error


def check_folder(path):
    """Raises UserError if a file cannot be written to this path (None: nothing is to be written) for want of a folder."""
    folder = os.path.dirname(path or '')
    if folder and not os.path.isdir(folder):
        raise UserError(f'{path}: there is no folder {folder}')


def check_settings():
    """Raises UserError for a value that makes no sense, before anything is loaded."""
    for name, low, high in (('num_samples', 1, None), ('batch_size', 1, None), ('steps', 1, None), ('length', 1, None),
                            ('top_k', 1, None), ('top_p', 0, 1), ('temperature', 0, None), ('ar_prefix', 0, None),
                            ('choice_temperature', 0, None), ('remask_rate', 0, 1), ('remask_random_ratio', 0, 1),
                            ('correct_share', 0, 1), ('merge_weight', 0, 1)):
        value = globals()[name]
        if value is not None and (value < low or (high is not None and value > high)):
            raise UserError(f'{name} must be {f"in {low}..{high}" if high is not None else f"at least {low}"}, got {value}')
    if not 0 <= seed < 2 ** 63:
        raise UserError(f'seed must be in 0..2^63 - 1, got {seed}')
    if top_p == 0:
        raise UserError('top_p=0 leaves no token to draw')
    check_folder(save)


def main():
    check_settings()
    path = find_checkpoint(init_from, out_dir)
    model, checkpoint = load_merged(path, merge_from, merge_weight) if merge_from else load_checkpoint(path)
    meta = checkpoint['meta']
    print(f"{path}: {checkpoint['config']['training_type']} on {meta['name']}, iteration {checkpoint['iter_num']}"
          + (f', merged with {merge_weight:g} of {merge_from}' if merge_from else ''))
    given = length is not None and meta['eos'] is not None
    rules = best_rules(checkpoint['config'], given, commit, remask, ar_prefix, judge=bool(remask_from))
    judge = None
    if remask_from:
        judge, other = load_checkpoint(remask_from)
        check_same_model(path, {**checkpoint['model_args'], 'itos': meta['itos']},
                         remask_from, {**other['model_args'], 'itos': other['meta']['itos']},
                         ('vocab_size', 'block_size', 'itos'))
        if not supports(other['config'])[2]:
            raise UserError(f'{remask_from} was not trained to find wrong tokens '
                            f"(training_type={other['config']['training_type']})")
        configure_compute(judge, device, dtype, attention, compile)
    model, choices = configure_compute(model, device, dtype, attention, compile)
    print(f'{model.num_params():,} parameters, {choices}')
    print(', '.join(f'{name}={value}' for name, value in rules.items()) + (f', steps={steps}' if steps else ''))

    t0 = time.time()
    lengths = None if length is None else torch.full((num_samples,), length)
    samples = generate(
        model, meta, num_samples, prompt=encode(meta, prompt), lengths=lengths, batch_size=batch_size, seed=seed,
        progress=True, steps=steps, schedule=schedule, remask_model=judge, remask_rate=remask_rate,
        remask_random_ratio=remask_random_ratio, correct_share=correct_share, temperature=temperature, top_k=top_k,
        top_p=top_p, choice_temperature=choice_temperature, **rules)
    seconds = time.time() - t0
    task = load_task(meta['name'])
    for sample in samples[:50]:
        print(f"{sample['text']}   {task.verdict(sample['text'])}" if task else f"{sample['text']}\n{'-' * 15}")
    if num_samples > 50:
        print(f'... and {num_samples - 50} more' + ('' if save else ' (--save=FILE.jsonl keeps them all)'))
    mean_nfe = sum(sample['nfe'] for sample in samples) / num_samples
    print(f'{num_samples} samples, {mean_nfe:.1f} passes each (NFE), {num_samples / seconds:.1f} samples/s')
    if save:
        write_atomically(save, ''.join(json.dumps(sample, ensure_ascii=False) + '\n' for sample in samples))
        print(f'written to {save}')


if __name__ == '__main__':
    configurator.run(globals())
