"""
What a network is worth on held-out rows: the bound, the likelihood of its causal mode, and how well it finds and mends its own errors.
"""

import torch

from corruption import corrupt, modelled, own_guesses
from model import causal_nll, nelbo
from rules import p_wrong


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
def evaluate(model, x0, meta, *, causal, bidirectional, detects, guesser=None, batch_size=256, seed=0):
    """
    What the model is worth on clean rows x0 (N, T), by a fixed seed: dict of nats a (real) token, with standard errors.

    nelbo, nelbo_se: the bound of the diffusion mode, padding paid for but not counted as tokens; causal_nll, causal_nll_se:
    -log p of the causal mode. On wrong tokens that are the guesser's own (None: the model's) -- auc: how well the model's
    p(WRONG) tells them from correct visible ones; fixed: the share where the likeliest other token, read off directly, is
    the right one; refilled: the share that is right after what has p(WRONG) > 1/2 was masked and filled by the guesser.
    """
    model.eval()
    guesser = guesser or model
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    bound, exact, tokens, scores, labels, fixed, refilled = [], [], [], [], [], [], []
    for rows in x0.split(batch_size):
        rows = rows.to(device)
        free, real = modelled(rows, meta)
        tokens.append(real.sum(1))
        if bidirectional:
            bound.append(nelbo(model, rows, free, generator))
        if causal:
            exact.append(causal_nll(model, rows, real))
        if detects:
            input, _, _ = corrupt(rows, free, real, training_type='joint', remask_ratio=1.0, generator=generator,
                                  mask_token_id=model.mask_token_id, wrong_token_id=model.wrong_token_id,
                                  guess=own_guesses(guesser, generator))
            judged = real & (input != model.mask_token_id)
            wrong = judged & (input != rows)
            hidden = model(input)
            doubt = p_wrong(model, hidden, input)                              # (B, T)
            scores.append(doubt[judged])
            labels.append(wrong[judged])
            other = model.logits(hidden[wrong], real_only=True).scatter(1, input[wrong][:, None], float('-inf'))
            fixed.append(other.argmax(1) == rows[wrong])
            holes = input.masked_fill(judged & (doubt > 0.5), model.mask_token_id)
            filled = guesser.logits(guesser(holes)[wrong], real_only=True).argmax(1)
            refilled.append(torch.where(holes[wrong] == model.mask_token_id, filled, input[wrong]) == rows[wrong])
    result, tokens = {}, torch.cat(tokens).cpu()                               # what follows is in float64, which MPS has not
    if bidirectional:
        result['nelbo'], result['nelbo_se'] = per_token(torch.cat(bound).cpu(), tokens)
    if causal:
        result['causal_nll'], result['causal_nll_se'] = per_token(torch.cat(exact).cpu(), tokens)
    if detects:
        result['auc'] = roc_auc(torch.cat(scores).cpu(), torch.cat(labels).cpu())
        result['fixed'] = torch.cat(fixed).float().mean().item()
        result['refilled'] = torch.cat(refilled).float().mean().item()
    return result
