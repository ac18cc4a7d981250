import torch  # noqa
from plumbing.draw import fine
from plumbing.rows import spread


def p_mask(model, hidden, where):
    """
    p(MASK) (R, T), how much a network trained with allow_abstain would rather leave a masked position open.
    """
    logits = model.logits(hidden[where])[:, :model.mask_token_id + 1]  # (N, V+1), mask_logit_bias included
    return spread(where, logits.to(fine(logits.device)).softmax(-1)[:, -1])


def abstain(look):
    """The commit rule of the lowest p(MASK). It does not look at the token drawn, so it prefers places."""
    return -p_mask(look.run.model, look.hidden, look.masked)
