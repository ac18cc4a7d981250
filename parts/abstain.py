"""[MASK] as an answer: its cost where a network is not ready yet, and what holds how often it is given."""

import math

import torch

from plumbing.draw import fine
from plumbing.rows import spread


def abstaining_ce(logits, target, masked, price, mask_token_id):
    """
    The cross-entropy where a masked position may abstain: -log(p(x0) + price * p(MASK)), price in [0, 1).

    Unsure is cheaper than wrong and dearer than right. logits (N, V+2), target (N,). Returns (N,) each: what
    every target costs, -log p(x0) alone, and p(MASK).
    """
    logp = logits.log_softmax(-1)
    plain, keep = -logp.gather(1, target[:, None])[:, 0], logp[:, mask_token_id]
    log_price = torch.tensor(price, device=keep.device).log()
    ce = torch.where(masked, -torch.logaddexp(-plain, keep + log_price), plain)
    return ce, plain, keep.detach().exp()


def steer(control, p_mask, target_mask_prob, rate, bias_limit):
    """
    One step of the controller that holds the mean p(MASK) of masked inputs at a target: the new control.

    control: dict(p_mask, the moving average of what is measured; bias, on the logit of [MASK]; price, of
    abstaining). p_mask: the (sum, count) of this step, of all processes together.

    Bias and log-odds of the price make the same moves, those of a PI controller. The optimiser undoes any
    constant bias, because the best p(MASK) depends on the price alone. So the price holds the set point in
    the end, and the bias only makes the loop quick. Since the two move together, the bias is bounded by what
    the price needs. With a price of 0 the price cannot move, and the bias has to grow for ever. Where one of
    the two is at its limit and the error pushes further, both wait (anti-windup). From beyond the limit,
    where a run with a lower one may begin, the bias comes back.
    """
    total, count = p_mask.tolist()
    if not count:
        return control
    average = before = now = total / count
    if control['p_mask'] is not None:
        before = control['p_mask']
        average = 0.8 * before + 0.2 * now

    # proportional and integral, over 20 steps: about how fast p(MASK) follows
    move = rate * (target_mask_prob - average + 20 * (before - average))
    bias, price = control['bias'] + move, control['price']
    if price:
        odds = price / (1 - price) * math.exp(move)
        price = odds / (1 + odds)
    if abs(bias) > max(bias_limit, abs(control['bias'])) or (price and not 1e-6 < price < 1 - 1e-6):
        bias, price = control['bias'], control['price']
    return dict(p_mask=average, bias=bias, price=price)


def p_mask(model, hidden, where):
    """p(MASK) (R, T): how much the network would rather leave a masked position open. hidden (R, T, C)."""
    logits = model.logits(hidden[where])[:, :model.mask_token_id + 1]          # (N, V+1)
    return spread(where, logits.to(fine(logits.device)).softmax(-1)[:, -1])


def abstain(look):
    """The commit rule of the lowest p(MASK). It does not look at the token drawn, so it prefers places."""
    return -p_mask(look.run.model, look.hidden, look.masked)
