"""
Edits that the causal mode has to agree to: the network proposes, the likelihood of the whole text decides.

An edit that mends a text makes all that stands right of it likelier, so a causal pass over the edited text
tells it from one that only looks good where it is made. It also chooses between edits that look equally good:
which of three operands is one too many, if the value behind the '=' is to be right.
"""

import torch
import torch.nn.functional as F

from plumbing.evaluate import causal_nll
from plumbing.rows import same_length

MARGIN = 5.0                 # nats: a text has to become e^5 times as likely
AT_ONCE = 256                # rows of a pass


@torch.no_grad()
def verify(run, rows, fixed, one_round, options, keep):
    """
    Edits rows, a list of (T,), as long as an edit makes a text likelier by MARGIN; changes rows and fixed.

    In a round the run.how.verify likeliest single edits of each row are tried, and all edits at once that
    one_round(rows, fixed, numbers) makes. fixed: where the rows must not change, a list of (T,) bool;
    options(run, x, fixed): the probabilities of all answers, see parts.edits; keep(run, rows) records.
    """
    model, pad, at_work = run.model, run.ends.pad, [*range(len(rows))]
    while at_work:
        going, at_once, kept_at_once = [], [*rows], [*fixed]
        one_round(at_once, kept_at_once, at_work)
        nats_at_once = dict(likelihoods(model, at_once, at_work, pad))
        for group in same_length(rows, at_work):
            x, kept = (torch.stack([some[i] for i in group]) for some in (rows, fixed))
            ids, stays, more, holes = tried(run, x, kept, *options(run, x, kept))
            end = x.size(1) + (more if pad is None else torch.zeros_like(more))          # (B, K+1)
            nats = likelihood(model, ids, end, pad)
            run.nfe[group] += 2 + holes + nats.size(1)
            least, which = nats.min(1)
            ends = end.gather(1, which[:, None])[:, 0]
            told = (of.tolist() for of in (nats[:, 0], least, which, ends))     # waits for a GPU once
            for row, (i, now, best, edit, T) in enumerate(zip(group, *told)):
                if min(best, nats_at_once[i]) > now - MARGIN:
                    continue
                going.append(i)
                rows[i], fixed[i] = ids[row, edit, :T], stays[row, edit, :T]
                if nats_at_once[i] < best:
                    rows[i], fixed[i] = at_once[i], kept_at_once[i]
        at_work = going
        keep(run, rows)


def tried(run, x, fixed, p, keep):
    """
    The likeliest single edits of x, fixed (B, T), x itself first: ids and fixed (B, K+1, T+1), how many
    tokens longer they are (B, K+1), and how many canvases had to be read for it (B,).

    p (B, T, V+2): the probabilities of all answers, negative: not to be given; keep (B, T): that of what
    stands there. For a hole each token is an edit of its own.
    """
    model, mask, count, V = run.model, run.mask, run.how.verify, p.size(-1)
    special = torch.zeros(V, dtype=torch.bool, device=x.device)
    special[list(run.ends.forbid)] = True
    holes = torch.arange(V, device=x.device) == mask
    p = p.masked_fill(special | special[x][..., None] & ~holes, -1)
    if run.ends.pad is None:
        full = torch.full_like(fixed[:, 0], x.size(1) >= model.config.block_size)        # (B,)
    else:
        full = x[:, -1] != run.ends.pad
    p[full, :, mask] = -1                                           # no hole where there is no room
    if x.size(1) == 1:
        p[..., mask + 1] = -1                                       # nothing is no text
    odds = p.clamp(min=0).log() - keep[..., None].log()                                  # (B, T, V+2)
    count = min(count, odds[0].numel())
    likeliest, flat = odds.flatten(1).topk(count)                                        # (B, K)
    at, answers = flat // V, flat % V
    nothing = 0 if run.ends.pad is None else run.ends.pad
    x, fixed = F.pad(x, (0, 2), value=nothing), F.pad(fixed, (0, 2))                     # room for a token
    ids, stays, more = edited(x, fixed, at, answers, mask)

    # a pass over every canvas with a hole says what may fill it
    opens = (answers == mask) & likeliest.isfinite()
    options = F.pad(likeliest[..., None], (0, V - 1), value=float('-inf'))               # (B, K, V+2)
    if opens.any():
        canvases = ids[opens] if run.ends.pad is None else ids[opens][:, :-1]
        hidden = torch.cat([model(part) for part in canvases.split(AT_ONCE)])
        hidden = hidden.take_along_dim(at[opens][:, None, None], 1)[:, 0]                # (n, C)
        logits = model.logits(hidden, real_only=True).masked_fill(special, float('-inf'))
        options[opens] = likeliest[opens][:, None] + logits.log_softmax(-1)
    which = options.flatten(1).topk(count).indices                                       # (B, K)
    edit, token = which // V, which % V
    ids, stays = (every.take_along_dim(edit[..., None], 1) for every in (ids, stays))
    ids = torch.where(ids == mask, token[..., None], ids)

    # what cannot be made at all is the text as it was
    first = x[:, None, :-1]
    made = options.flatten(1).gather(1, which).isfinite()
    ids = torch.cat((first, torch.where(made[..., None], ids, first)), 1)
    stays = torch.cat((fixed[:, None, :-1], stays), 1)
    more = F.pad(more.gather(1, edit) * made, (1, 0))
    return ids, stays, more, opens.sum(1)


def edited(x, fixed, at, answers, mask):
    """
    Each row x, fixed (B, T+2), whose last two are room, with each of K edits, answers (B, K) at places at.

    Returns ids and fixed (B, K, T+1), [MASK] where a hole is opened; and how many tokens longer they are,
    (B, K): 1, 0 or -1.
    """
    opens, goes = (answers == mask)[..., None], (answers == mask + 1)[..., None]         # (B, K, 1)
    here, at = torch.arange(x.size(1) - 1, device=x.device), at[..., None]
    source = here - (opens & (here > at)).long() + (goes & (here >= at)).long()          # (B, K, T+1)
    written = (here == at) & ~goes
    ids = torch.where(written, answers[..., None], x[:, None].take_along_dim(source, 2))
    stays = fixed[:, None].take_along_dim(source, 2) & ~(written & opens)
    return ids, stays, (opens.long() - goes.long())[..., 0]


def likelihood(model, ids, end, pad=None):
    """-log p of ids (B, K, T) up to their ends (B, K), or their padding, in the causal mode: nats (B, K)."""
    real = torch.arange(ids.size(2), device=ids.device) < end[..., None]
    if pad is not None:
        real = real & (ids != pad)
    rows = zip(ids.flatten(0, 1).split(AT_ONCE), real.flatten(0, 1).split(AT_ONCE))
    return torch.cat([causal_nll(model, *part) for part in rows]).view(end.shape)


def likelihoods(model, rows, numbers, pad):
    """Yields (number, -log p) of the rows of these numbers, of several lengths."""
    for group in same_length(rows, numbers):
        x = torch.stack([rows[i] for i in group])[:, None]                               # (B, 1, T)
        yield from zip(group, likelihood(model, x, torch.full_like(x[..., 0], x.size(2)), pad)[:, 0].tolist())
