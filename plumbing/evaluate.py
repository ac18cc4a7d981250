"""What a network is worth on held-out rows: its bound, its likelihood, how it mends its own errors."""

import torch
import torch.nn.functional as F

from plumbing.pieces import portions
from plumbing.rows import places, random_subset, stratified_k
from plumbing.text import modelled


@torch.no_grad()
def nelbo(model, x0, free, generator=None, draws=1):
    """
    The upper bound on -log p(x0), an unbiased estimate from draws of masks: nats of each row (B,).

    x0 (B, T) clean ids; free (B, T) bool, the positions that are modelled (the rest is given). With k uniform
    on 1..n and exactly k of n positions masked, n times the mean cross-entropy at the masks needs no 1/t
    weight. The draws of a row spread their k evenly over 1..n. Rows without a free position get 0.
    """
    n = free.sum(1)                                                           # (B,)
    some = n.clamp(min=1)
    first_k, total = stratified_k(some, generator), torch.zeros(x0.shape, device=x0.device)
    for draw in range(draws):
        k = (first_k - 1 + draw * some // draws) % some + 1                   # (B,)
        masked = random_subset(free, k, generator)                            # (B, T)
        hidden = model(x0.masked_fill(masked, model.mask_token_id), only=places(masked))  # (M, C)
        ce = F.cross_entropy(model.logits(hidden, real_only=True), x0[masked], reduction='none')
        total += torch.zeros_like(total).masked_scatter(masked, ce) * (n / k)[:, None]
    return total.sum(1) / draws


@torch.no_grad()
def causal_nll(model, x0, free):
    """-log p of the free positions in the causal mode, each given all to its left: nats of each row (B,)."""
    hidden = model(x0, causal=True, only=places(free))                        # (M, C)
    ce = F.cross_entropy(model.logits(hidden, real_only=True), x0[free], reduction='none')
    return torch.zeros(x0.shape, device=x0.device).masked_scatter(free, ce).sum(1)


def read(model, ids):
    """Hidden states (B, T, C) of ids (B, T); what is longer than the network reads in windows, each alone."""
    return torch.cat([model(window) for window in ids.split(model.config.block_size, 1)], 1)


def p_wrong(model, hidden, ids):
    """
    p(WRONG), the probability that the token which stands at a position is not the right one: 1 - p(that
    token).

    hidden (..., C), ids (...) -> (...). A network that learned the target [WRONG] gives what it takes from
    the right token to [WRONG] (the two differ by 0.01 on average); one that learned the original gives it to
    other tokens.
    """
    some = zip(portions(model, hidden.flatten(0, -2)), portions(model, ids.flatten()))
    kept = [model.logits(states).softmax(-1).gather(1, few[:, None])[:, 0] for states, few in some]
    return 1 - torch.cat(kept).view(ids.shape)


def roc_auc(score, label):
    """
    Area under the ROC curve: the chance that a True one scores above a False one; ties count half. None if
    there are none of one kind.
    """
    _, rank, count = score.unique(return_inverse=True, return_counts=True)    # of the sorted scores
    mean_rank = (count.cumsum(0) - (count - 1) / 2).double()[rank]
    positive, negative = label.sum().item(), (~label).sum().item()
    if not positive or not negative:
        return None
    return (mean_rank[label].sum().item() - positive * (positive + 1) / 2) / (positive * negative)


def calibration_error(p, label, bins=10):
    """
    How far probabilities p (N,) are from the shares of label (N,) that are True, in the mean; None: N is 0.

    Both are compared within bins of equally many, in the order of p (expected calibration error, ECE).
    """
    if not len(p):
        return None
    label = label[p.argsort()].double()
    parts = zip(p.sort().values.double().tensor_split(bins), label.tensor_split(bins))
    return sum((said.sum() - true.sum()).abs().item() for said, true in parts) / len(p)


def share(which):
    """The share of which (N,) bool that is True, None: N = 0."""
    return which.float().mean().item() if len(which) else None


def per_token(nats, tokens):
    """Nats and tokens of rows (B,) -> nats a token and the standard error of that, None for one row."""
    mean = (nats.sum() / tokens.sum()).item()
    if len(nats) < 2:
        return mean, None
    error = (nats - mean * tokens).std().item() / (len(nats) ** 0.5 * tokens.double().mean().item())
    return mean, error


def of_text(doubt, rows, free, input, mask, pad):
    """
    p(WRONG) of the tokens of input (B, T) that look like text (K,), and whether they are wrong (K,).

    (To look only where the clean rows have text would be a choice by what the network cannot know.)
    """
    text = free & (input != mask) & (input != (-1 if pad is None else pad))
    return doubt[text], (input != rows)[text]


def detection(model, rows, free, real, input, pad):
    """
    How the model judges the tokens of input (B, T), clean rows (B, T) with wrong and masked tokens in them.

    Returns p(WRONG) of the real visible tokens (N,), whether they are wrong (N,), which of the wrong ones are
    put right: by the likeliest other token (M,), and by masking and filling all with p(WRONG) > 1/2 (M,), and
    what of_text says.
    """
    judged = real & (input != model.mask_token_id)
    wrong = judged & (input != rows)
    hidden = model(input)
    doubt = p_wrong(model, hidden, input)                                     # (B, T)
    other = model.logits(hidden[wrong], real_only=True).scatter(1, input[wrong][:, None], float('-inf'))

    holes = input.masked_fill(judged & (doubt > 0.5), model.mask_token_id)
    filled = model.logits(model(holes)[wrong], real_only=True).argmax(1)      # (M,)
    mended = torch.where(holes[wrong] == model.mask_token_id, filled, input[wrong])
    return (doubt[judged], wrong[judged], other.argmax(1) == rows[wrong], mended == rows[wrong],
            *of_text(doubt, rows, free, input, model.mask_token_id, pad))


@torch.no_grad()
def evaluate(model, x0, meta, *, causal, bidirectional, own_errors=None, draws=1, batch_size=256, seed=0,
             bounds=None):
    """
    What the model is worth on clean rows x0 (N, T), by a fixed seed: a dict of nats a token and shares.

    nelbo, nelbo_se: the bound of the diffusion mode and its standard error, from this many draws of masks for
    each row; padding is paid for, but does not count as tokens. causal_nll, causal_nll_se: -log p of the
    causal mode. bounds: other bounds by name, functions (model, rows, free, real, generator) -> nats (B,).
    With own_errors(model, rows, free, real, generator, full, pad) -> input, own guesses put into rows --
    auc: how well p(WRONG) tells them from correct visible tokens; fixed, refilled: the shares put right, see
    detection; calibration, calibration_full: how far p(WRONG) is from the share of tokens that are wrong,
    beside masks and in rows without a mask. If there is no mask in what own_errors makes, only auc and
    calibration_full. What cannot be known is None.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    # at most 1 GiB of logits
    batch_size = max(1, min(batch_size, 2 ** 28 // (x0.size(1) * model.mask_token_id)))
    bound, exact, tokens, found, found_full, masks = [], [], [], [], [], False
    others = {name: [] for name in bounds or ()}
    full_rng = torch.Generator(device).manual_seed(seed + 1)
    for rows in x0.split(batch_size):
        rows = rows.to(device)
        free, real = modelled(rows, meta)
        tokens.append(real.sum(1))
        if bidirectional:
            bound.append(nelbo(model, rows, free, generator, draws))
        if causal:
            exact.append(causal_nll(model, rows, real))
        for name, nats in others.items():
            nats.append(bounds[name](model, rows, free, real, generator))
        if own_errors:
            input = own_errors(model, rows, free, real, generator, pad=meta['pad'])
            masks = masks or bool((input == model.mask_token_id).any())
            found.append(detection(model, rows, free, real, input, meta['pad']))
            input = own_errors(model, rows, free, real, full_rng, full=True, pad=meta['pad'])
            doubt = p_wrong(model, model(input), input)
            found_full.append(of_text(doubt, rows, free, input, model.mask_token_id, meta['pad']))

    # what follows is in float64, which MPS does not have
    result, tokens = {}, torch.cat(tokens).cpu()
    if bidirectional:
        result['nelbo'], result['nelbo_se'] = per_token(torch.cat(bound).cpu(), tokens)
    if causal:
        result['causal_nll'], result['causal_nll_se'] = per_token(torch.cat(exact).cpu(), tokens)
    for name, nats in others.items():
        result[name], result[f'{name}_se'] = per_token(torch.cat(nats).cpu(), tokens)
    if own_errors:
        doubts, wrong, fixed, refilled, *beside = [torch.cat(parts).cpu() for parts in zip(*found)]
        full = [torch.cat(parts).cpu() for parts in zip(*found_full)]
        mended = dict(fixed=share(fixed), refilled=share(refilled), calibration=calibration_error(*beside))
        result.update(auc=roc_auc(doubts, wrong), **(mended if masks else {}),
                      calibration_full=calibration_error(*full))
    return result


def evaluation_line(step, result):
    """What is on screen after an evaluation: a line of the losses, a line of what was found."""
    words, found = [], []
    for name, title, unit in (('nelbo', 'NELBO', ' nats/token'), ('causal_nll', 'causal NLL', '')):
        if name in result:
            error = result[f'{name}_se']
            words.append(f'{title} {result[name]:.3f}' + ('' if error is None else f' ± {error:.3f}') + unit)
    blocks = [f'{name[6:]}: {nats:.3f}' for name, nats in result.items() if name[6:].isdecimal()]
    if blocks:
        words.append('in blocks of ' + ', '.join(blocks))
    if 'auc' in result:
        own = 'own errors' if 'refilled' in result else 'wrong tokens'
        right = f", put right {result['refilled']:.0%}" if result.get('refilled') is not None else ''
        found.append(f'{own}: there are none, or nothing else, so no AUC' if result['auc'] is None else
                     f"{own} found: AUC {result['auc']:.3f}{right}")
        if result.get('calibration') is not None:
            found.append(f"p(WRONG) off by {result['calibration']:.3f} beside masks, "
                         f"{result['calibration_full']:.3f} without")
    lines = '\n    '.join('  '.join(line) for line in (words, found) if line)
    return f"step {step}  validation: {lines or 'nothing to measure for this training type'}"
