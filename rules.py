"""
The rules of the sampling loop: how a token is drawn, which masked positions are committed, which visible ones are doubted.

The loop that applies them is generate_diffusion in sample.py. Everything here works on a batch of rows at once.
"""

import difflib
import math

import torch
import torch.nn.functional as F

from configurator import UserError
from model import norm, places, random_subset
from plumbing.evaluate import p_wrong  # noqa: F401 (for those who import it from here)

COMMIT_RULES = ('random', 'confidence', 'margin', 'entropy', 'threshold', 'abstain', 'priority', 'left_to_right')
REMASK_RULES = ('none', 'random', 'wrong', 'critic', 'confidence', 'remdm', 'p2', 'causal')
REMDM_SCHEDULES = ('cap', 'rescale', 'loop')
CORRECTING = ('random', 'wrong', 'critic', 'confidence')   # the remask rules that may go on when the canvas is full
WHOLE_CANVAS = ('confidence', 'margin', 'entropy', 'threshold', 'priority')  # commit rules that look at every candidate

# -----------------------------------------------------------------------------
# drawing tokens


def filtered(logits, temperature=1.0, top_k=None, top_p=None):
    """logits (N, V+2), specials already at -inf -> probabilities (N, V+2) to draw from, rows sum to 1."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    if temperature != 1:
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


LARGE = 4096     # words; the samples of smaller vocabularies stay what they were


def draw(probs, generator=None):
    """
    One token a row: probs (..., V+2) -> ids (...).

    Of a LARGE vocabulary by a random number a row: multinomial takes one a word, and on a CPU most of its time to make them.
    """
    flat = probs.reshape(-1, probs.size(-1))
    if flat.size(0) == 0:
        return torch.zeros(probs.shape[:-1], dtype=torch.long, device=probs.device)
    if flat.size(1) > LARGE:
        total = flat.cumsum(1, dtype=fine(probs.device))                       # in float32 the rarest words would never come
        u = 1 - torch.rand(len(flat), 1, generator=generator, device=probs.device, dtype=total.dtype)  # in (0, 1]
        return torch.searchsorted(total, u * total[:, -1:]).view(probs.shape[:-1])
    return torch.multinomial(flat, 1, generator=generator).view(probs.shape[:-1])


def fine(device):
    """The dtype in which confidences are compared and orders drawn: float64, but float32 on MPS, which has nothing finer."""
    return torch.float32 if device.type == 'mps' else torch.float64


def spread(where, values):
    """values (N,), one for every True position of where (R, T) -> (R, T), 0 elsewhere."""
    return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(where, values)


def propose(model, hidden, where, filters, generator, closed=None, forbid=()):
    """
    Candidates at the True positions of where (R, T): ids (R, T), their log-probabilities (R, T), and the log-probabilities
    (N, V+2) of all tokens there, before temperature, top_k and top_p, in the dtype of fine.

    closed (R, T): where none of the ids forbid is drawn.
    """
    at = places(where)                                                         # (N,)
    logits = model.logits(hidden.flatten(0, 1)[at], real_only=True)            # (N, V+2)
    if forbid and closed is not None:
        ids = torch.zeros(logits.size(1), dtype=torch.bool, device=logits.device)
        ids[list(forbid)] = True
        logits = logits.masked_fill(closed.flatten()[at, None] & ids, float('-inf'))
    ids = draw(filtered(logits, **filters), generator)                         # (N,)
    logp = logits.to(fine(logits.device)).log_softmax(-1)
    return spread(where, ids), spread(where, logp.gather(1, ids[:, None])[:, 0]), logp


def draft_pass(model, x, masked, draft, previous=None, cache=None, first=True):
    """
    Hidden states (R, T, C) of x (R, T); those of the causal pass only at each row's first hole, elsewhere 0.

    previous (R, T): for a network with self_condition, its likeliest tokens of the pass before, replaced by those of this one.
    """
    if draft == 'bidirectional':
        hidden = model(x, previous=previous)
        if previous is not None:
            previous[masked] = model.logits(hidden[masked], real_only=True).argmax(-1)
        return hidden
    at = masked.long().argmax(1, keepdim=True)                                 # (R, 1)
    hidden = causal_pass(model, x, at, cache, first)                           # (R, 1, C)
    return hidden.new_zeros(*x.shape, hidden.size(2)).scatter(1, at[..., None].expand_as(hidden), hidden)


def causal_pass(model, x, at, cache=None, first=True):
    """
    Hidden states (R, W, C) of the causal pass over x (R, T) at the positions at (R, W), a window for each row.

    cache: of GPT.empty_cache, with room for the windows; None: everything left of them is computed again. first: it is still
    empty; later it knows what is left of the windows, and nothing else is computed.
    """
    if cache is not None and not first:
        return model(x, causal=True, cache=cache, at=at)
    width = min(model.config.block_size, int(at.max()) + 1)
    hidden = model(x[:, :width], causal=True, cache=cache)                     # (R, width, C)
    return hidden.gather(1, at.clamp(max=width - 1)[..., None].expand(-1, -1, hidden.size(2)))


def close_rows(x, masked, mask, end_id, pad_id):
    """x (R, T): of the positions that were masked, those right of an end token with no hole left of it become padding."""
    if end_id is None:
        return x
    decided = (x == mask).cumsum(1) == 0
    is_end = ((x == end_id) & decided).long()
    return x.masked_fill(masked & (is_end.cumsum(1) > is_end), pad_id)


# -----------------------------------------------------------------------------
# how many masks are left


def masks_left(progress, schedule, loop=False):
    """
    The share of the masks that is left at a progress (R,) of 0..1: linear, or cosine (few tokens early, many late).

    loop: ReMDM's loop instead, which holds a tenth of the tokens masked from 0.45 to 0.95 (its alpha = 0.9).
    """
    if loop:
        return torch.where(progress < 0.45, 1 - 2 * progress, torch.where(progress < 0.95, 0.1, 2 * (1 - progress)))
    return 1 - progress if schedule == 'linear' else (progress * math.pi / 2).cos()


# -----------------------------------------------------------------------------
# which masked positions are committed


def commit_order(commit, model, hidden, masked, candidates, *, noise_scale, priority, generator):
    """
    The order in which a commit rule takes the masked positions: score (R, T), highest first.

    candidates: what propose returned for all masked positions, None for the rules that do not look at them.
    noise_scale (R, 1): confidence, of the Gumbel noise on it (MaskGIT). priority: ids that come first.
    """
    dtype = fine(masked.device)
    noise = torch.rand(masked.shape, generator=generator, device=masked.device, dtype=dtype)
    if commit == 'left_to_right':
        return -torch.arange(masked.size(1), device=masked.device, dtype=dtype).expand(masked.shape)
    if commit == 'abstain':
        return -p_mask(model, hidden, masked)
    if commit == 'random':
        return noise.log()
    ids, confidence, logp = candidates
    if commit == 'confidence':
        return confidence - noise_scale * (-noise.log()).log()
    if commit == 'margin':
        top = logp.exp().topk(2, dim=-1).values                                # (N, 2)
        return spread(masked, (top[:, 0] - top[:, 1]).clamp(min=1e-30).log())
    if commit == 'entropy':
        return spread(masked, (logp.exp() * logp.clamp(min=-1e9)).sum(-1))
    if commit == 'priority':
        return ((noise + torch.isin(ids, torch.tensor(priority, device=ids.device))) / 2).log()
    return confidence                                                          # threshold


def first_of(score, where, count):
    """Of the True positions of where (R, T) the count (R,) with the highest score (R, T), ties from the left: bool (R, T)."""
    rank = score.clamp(min=-1e30).masked_fill(~where, float('-inf')).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return where & (rank < count[:, None])


def p_mask(model, hidden, where):
    """p(MASK) (R, T), how much a network trained with allow_abstain would rather leave a masked position open."""
    logits = model.logits(hidden[where])[:, :model.mask_token_id + 1]          # (N, V+1), mask_logit_bias included
    return spread(where, logits.to(fine(logits.device)).softmax(-1)[:, -1])


# -----------------------------------------------------------------------------
# which visible positions are doubted


def spare_lengths(doubt, x, where, end_id, pad_id):
    """
    The doubt (R, T) of the tokens x (R, T) at the True positions of where, but for the end token and the padding behind it
    the mean doubt of the row's text.

    By themselves these two are hardly ever doubted. Taking tokens away from the text alone takes away what speaks for a long
    text and leaves what speaks for a short one, and the samples shrink.
    """
    if end_id is None:
        return doubt
    ends = where & ((x == end_id) | (x == pad_id))
    text = where & ~ends
    mean = (doubt * text).sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)      # (R, 1)
    return torch.where(ends, mean, doubt)


def doubted(doubt, where, rate, generator, *, random_ratio=0.0, threshold=None, share=None, power=1.0):
    """
    Which of the positions where (R, T) are re-masked, by their doubt (R, T) in 0..1: bool (R, T).

    Each with probability rate * doubt ^ power; or, with a threshold, those whose doubt exceeds it; or, with a share in 0..1, that
    share of them, the most doubted first (the plan's ratio). random_ratio: 0 looks at the doubt alone, 1 not at all.
    """
    if share is not None:
        count = (share * where.sum(1)).round().long()                          # (R,)
        some = random_subset(where, (random_ratio * count).round().long(), generator)
        return some | first_of(doubt, where & ~some, count - some.sum(1))
    chance = rate * doubt ** power if threshold is None else (doubt > threshold).to(doubt.dtype)
    noise = torch.rand(where.shape, generator=generator, device=where.device)
    return where & (noise < (1 - random_ratio) * chance + random_ratio * rate)


def displaced(score, masked, stay, visible, left):
    """
    P2: of the masked positions, scored by score <= 0, and the visible ones, scored by stay <= 0, the best are to be visible
    when left (R,) are masked: the visible ones that lose their place, bool (R, T).
    """
    among = masked | visible
    keep = first_of(torch.where(visible, stay, score.clamp(max=-1e-9)), among, among.sum(1) - left)
    return visible & ~keep


def remdm_rate(kind, eta, left, visible, progress):
    """
    ReMDM's probability sigma (R,) of re-masking a visible token. left (R,) masks after the step, visible (R,) tokens before:
    left / visible is the largest sigma for which the masks after the step can still be as many as without it.
    """
    room = left / visible.clamp(min=1)
    if kind == 'rescale':
        return eta * room.clamp(max=1)
    if kind == 'loop':
        eta = torch.where((progress >= 0.45) & (progress < 0.95), eta, 0.0)
        return eta.minimum(room)
    return room.clamp(max=eta)


def share_at(schedule, progress):
    """The share of a (start, end) schedule at a progress of 0..1; None without one."""
    return None if schedule is None else schedule[0] + (schedule[1] - schedule[0]) * progress


# -----------------------------------------------------------------------------
# judging whole texts by their energy


def text_of(x, end_id, pad_id, forbid=()):
    """
    Whole canvases x (R, T) as texts: (ids (R, T), with padding behind the first end token, and which positions are text).

    forbid: ids of which one that is neither end nor padding is a start symbol: at the first position it is no text either.
    """
    ends = (x == (-1 if end_id is None else end_id)).long()
    behind = ends.cumsum(1) > ends
    start = torch.tensor([i for i in forbid if i not in (end_id, pad_id)], dtype=x.dtype, device=x.device)
    real = ~behind
    real[:, 0] &= ~torch.isin(x[:, 0], start)
    return x if pad_id is None else x.masked_fill(behind, pad_id), real


def choose_by_energy(energy, generator, greedy=False):
    """Of the n texts of each row one with probability proportional to exp(-energy), greedy: the best. energy (R, n) -> (R,)."""
    return energy.argmin(1) if greedy else draw((-energy).softmax(-1), generator)


def guided(model, hidden, x, masked, num, filters, generator, end_id=None, pad_id=None, closed=None, forbid=()):
    """
    What propose returns for the masked positions of x (R, T), but num proposals are made for every row and, by the energies of
    the texts that they make of it, one is chosen (importance sampling; Xu et al. 2024).
    """
    proposals = [propose(model, hidden, masked, filters, generator, closed, forbid) for _ in range(num)]
    energy = [model.energy(*text_of(torch.where(masked, ids, x), end_id, pad_id, forbid)) for ids, _, _ in proposals]
    chosen = choose_by_energy(torch.stack(energy, 1), generator, filters['temperature'] == 0)                # (R,)
    rows = torch.arange(len(x), device=x.device)
    ids, confidence = (torch.stack(parts)[chosen, rows] for parts in list(zip(*proposals))[:2])
    return ids, confidence, proposals[0][2]


# -----------------------------------------------------------------------------
# drafting and verifying


def speculate(model, x, masked, drafted, q, window, filters, generator, cache=None, first=True):
    """
    One round of speculative sampling (Leviathan et al. 2023): a verdict on the draft of each row's next tokens, the next draft.

    drafted (R, W) ids of the next W tokens of each row; q (R, W, V+2) the distributions that they were drawn from, all 0 where
    there is no draft: a network without a draft head then makes one by a bidirectional pass. The causal pass looks at the
    whole draft at once: from the left each token is accepted with probability min(1, p/q), p of the causal pass; the first
    rejected one is redrawn from the positive part of p - q, and if none is rejected one more comes from p. So a row gains at
    least one token, and every token is distributed by p, whatever the draft is worth. next_draft says where it comes from.

    x (R, T), whose masks are a suffix of each row -> x (R, T), the next drafted and q, of window tokens, and the passes (R,) that
    it took.
    cache, first: see causal_pass; what the cache knows of rejected tokens the next round writes over.
    """
    T, W = x.size(1), drafted.size(1)
    none = q.sum((1, 2)) == 0
    if model.drafter is None and none.any():
        drafted[none], new = bidirectional_draft(model, x[none], masked[none], W, filters, generator)
        q[none] = new.to(q.dtype)
    passes = 1 + (none if model.drafter is None else torch.zeros_like(none)).long()
    at = masked.long().argmax(1)[:, None] + torch.arange(W + 1, device=x.device)             # (R, W+1) from the first hole
    x = F.pad(x, (0, W + 1), value=model.mask_token_id)                        # room for windows that stand out
    hidden = causal_pass(model, x.scatter(1, at[:, :W], drafted), at, cache, first)      # (R, W+1, C)
    p = filtered(model.logits(hidden, real_only=True), **filters)              # (R, W+1, V+2)

    p_drafted, q_drafted = (law.gather(2, drafted[..., None])[..., 0] for law in (p[:, :W], q))                 # (R, W)
    noise = torch.rand(q_drafted.shape, generator=generator, device=x.device)
    accepted = noise * q_drafted < p_drafted * (q_drafted > 0)                 # where there is no draft, nothing is
    count = accepted.long().cumprod(1).sum(1, keepdim=True)                    # (R, 1) accepted from the left
    here = count[..., None].expand(-1, -1, p.size(2))
    goal, drawn_from = p.gather(1, here)[:, 0], F.pad(q, (0, 0, 0, 1)).gather(1, here)[:, 0]  # q: 0 if none was rejected
    rest = (goal - drawn_from).clamp(min=0)                                    # (R, V+2)
    rest = torch.where(rest.sum(-1, keepdim=True) > 1e-9, rest, goal)          # p = q up to rounding
    redrawn = draw(rest, generator)                                            # (R,)
    tokens = F.pad(drafted, (0, 1)).scatter(1, count, redrawn[:, None])        # (R, W+1)
    x = x.scatter(1, at, tokens.masked_fill(torch.arange(W + 1, device=x.device) > count, model.mask_token_id))[:, :T]
    return x, *next_draft(model, hidden, p, count, redrawn, window, filters, generator), passes


def next_draft(model, hidden, p, count, redrawn, window, filters, generator):
    """
    The draft of the window tokens after the redrawn (R,) one, the causal pass having said hidden (R, W+1, C) and p (R, W+1, V+2)
    after count (R, 1) accepted ones: drafted (R, window) ids and the distributions q (R, window, V+2) that they were drawn from.

    With a draft head: from the state in which the causal pass was before the redrawn token, one token after the other.
    Without one: what the pass said about the tokens behind, though in the light of a rejected one, is a draft
    for free (as in Jacobi decoding); past the window, where it said nothing, any token is as good as another.
    """
    if model.drafter is not None:
        state = hidden.gather(1, count[..., None].expand(-1, -1, hidden.size(2)))[:, 0]      # (R, C)
        drafted, q = [redrawn], []
        for _ in range(window):
            state = model.draft(state, drafted[-1])
            q.append(filtered(model.logits(norm(state), real_only=True), **filters))         # (R, V+2)
            drafted.append(draw(q[-1], generator))
        return torch.stack(drafted[1:], 1), torch.stack(q, 1)
    blank = F.pad(torch.full((p.size(2) - 2,), 1 / (p.size(2) - 2), dtype=p.dtype, device=p.device), (0, 2))
    behind = count + 1 + torch.arange(window, device=p.device)                 # (R, window)
    q = F.pad(p, (0, 0, 0, window)).gather(1, behind[..., None].expand(-1, -1, p.size(2)))   # past the window: 0
    some = torch.where(q.sum(-1, keepdim=True) == 0, blank, q)
    return draw(some, generator), torch.where((count < window)[..., None], some, q)          # all accepted: no draft


def bidirectional_draft(model, x, masked, window, filters, generator):
    """A draft for speculate by a bidirectional pass over x (R, T): drafted (R, W) ids, q (R, W, V+2)."""
    at = masked.long().argmax(1)[:, None] + torch.arange(window, device=x.device)            # (R, W)
    hidden = model(x)
    hidden = hidden.gather(1, at.clamp(max=x.size(1) - 1)[..., None].expand(-1, -1, hidden.size(2)))             # (R, W, C)
    q = filtered(model.logits(hidden, real_only=True), **filters)
    return draw(q, generator), q


# -----------------------------------------------------------------------------
# which rules a checkpoint gets


def supports(config):
    """What a checkpoint of this config was trained for: (unmasking, the causal mode, finding wrong tokens)."""
    kind = config['training_type']
    return (kind in ('unmasking', 'joint', 'denoising'), kind == 'causal' or config['causal_ratio'] > 0,
            kind in ('joint', 'remasking', 'denoising'))


PRESETS = dict(
    ancestral=dict(commit='random', remask='none'),
    maskgit=dict(commit='confidence', schedule='cosine', remask='none'),       # Chang et al. 2022
    threshold=dict(commit='threshold', remask='none'),                         # Wu et al. 2025 (Fast-dLLM)
    remdm=dict(commit='random', remask='remdm'),                               # Wang et al. 2025
    p2=dict(commit='random', remask='p2'),                                     # Peng et al. 2025
    intelligent=dict(commit='random', schedule='cosine', remask='wrong'),      # the remasking plan, repaired
    hybrid=dict(ar_prefix=16, commit='random', schedule='cosine', remask='wrong'),
    speculative=dict(remask='causal'),                                         # Leviathan et al. 2023
    universal=dict(ar_prefix=3, commit='confidence', schedule='cosine', steps=20, remask='none'),  # the universal denoiser
)
# repair changes as little as it can: what is doubted more than that, each position once, surest first
TASKS = dict(generate={}, infill={}, edit={}, score={},
             repair=dict(commit='threshold', remask='wrong', remask_threshold=0.8, temperature=0.0))

# a network that has seen noise mends it in one pass: every token that it would rather replace is replaced by the likeliest one
REWRITE = dict(commit='random', remask='wrong', remask_threshold=0.5, rewrite=True, steps=1, temperature=0.0)


def saw_noise(config):
    """Whether a checkpoint of this config learned to mend mixed noise."""
    return config['training_type'] == 'denoising' or (config['training_type'] == 'joint' and 'noise' in config['corruption'])


def choose_rules(config, *, preset=None, task='generate', inside=False, judge=False, **chosen):
    """
    The keywords of fill for a checkpoint of this config: what was chosen (not None), else the preset's, else the task's,
    else what best_rules says. inside: whether a hole has text right of it. Raises UserError for what does not fit.
    """
    if preset is not None and preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, 1)
        raise UserError(f"unknown preset '{preset}'; {f'did you mean {near[0]}' if near else 'there are ' + ', '.join(PRESETS)}?")
    chosen = {name: value for name, value in chosen.items() if value is not None}
    rewrites = task == 'repair' and saw_noise(config) and not judge and chosen.get('rewrite', True)
    usual = REWRITE if rewrites and preset is None and not {'commit', 'remask', 'guide'} & set(chosen) else TASKS[task]
    rules = {**usual, **PRESETS.get(preset, {}), **chosen}
    if 'remask_schedule' in chosen and 'remask_threshold' not in chosen:
        rules.pop('remask_threshold', None)
    if task == 'repair' and rules['remask'] not in ('wrong', 'random', 'critic'):
        raise UserError(f"repair finds what to change by re-masking: use --remask=wrong, random or critic, not {rules['remask']}")
    for name in ('guide', 'best_of'):
        if name in rules:
            check_energy_head(config, name)
    if rules.get('remask_rate', 0) > 1 and rules.get('remask') != 'p2':
        raise UserError(f"remask_rate is a probability, in 0..1 (only p2's is not), got {rules['remask_rate']}")
    inside = inside or 'guide' in rules                                        # the causal pass has no steps to guide
    best = best_rules(config, inside, judge=judge, **{name: rules.get(name) for name in ('commit', 'remask', 'ar_prefix')})
    return {**rules, **best}


def check_energy_head(config, name):
    """Raises UserError if the checkpoint of this config has no energy head, which the setting called name needs."""
    if not config.get('energy_head'):
        raise UserError(f'{name} needs a checkpoint with an energy head: give this one a head with '
                        'python tools/energy.py --init_from=CHECKPOINT and sample from what that writes')


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
    if kind == 'causal' and (lengths_given or (ar_prefix is not None and ar_prefix < config['block_size'])):
        raise UserError('this causal checkpoint writes from left to right to the end: it can neither fill a hole with text right '
                        'of it, nor be given a length, nor leave anything to other rules (no --ar_prefix)')
    if commit == 'abstain' and not config.get('allow_abstain'):
        raise UserError('commit=abstain needs a checkpoint trained with --allow_abstain=True')
    if remask == 'critic':
        check_energy_head(config, 'remask=critic')
    if remask in ('wrong', 'p2') and not (detects or judge):
        raise UserError('this checkpoint was not trained to find wrong tokens: train with training_type joint'
                        + (', or give a remasking one as --remask_from=PATH' if remask == 'wrong' else ''))
    if remask is None:
        if kind != 'causal' and causal and not lengths_given and commit is None and not ar_prefix:
            remask = 'causal'
        else:
            # whoever saw wrong tokens only calls every token wrong
            remask = 'wrong' if judge or (detects and config['remasking_loss_type'] == 'all_positions') else 'none'
    if ar_prefix is None:
        ar_prefix = config['block_size'] if kind == 'causal' else 0
    return dict(commit=commit or 'random', remask=remask, ar_prefix=ar_prefix)
