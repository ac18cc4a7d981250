"""
Repair that can change the length: labels for a network that edits a text, and the rounds in which it does.

At a visible position such a network (remask_target='edits') may answer with the token that stands there: keep
it; another token: replace it; [WRONG]: this does not belong here, take it away; [MASK]: something is missing
right before it, open a hole. A hole takes one token, further rounds may open more.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from parts.look import Sampling
from parts.verify import verify
from plumbing.draw import forbid
from plumbing.rows import close_rows, first_of, left_of, same_length

NEVER = 10 ** 6              # the price of what is not to be done; every edit costs 1


def text_length(ids, pad):
    """How many tokens of ids (B, T) come before the padding at the end: (B,); pad None: all."""
    at = torch.arange(1, ids.size(1) + 1, device=ids.device)
    return (at * (ids != (-1 if pad is None else pad))).amax(1)


def labels(noisy, clean, mask, wrong, pad=None):
    """
    What is to be answered at noisy (B, T) so that, round by round, it becomes clean (B, M): ids (B, T).

    These are the fewest edits: a token that is replaced, taken away or missing counts 1, a mask stands for
    any token. Of several ways the rightmost tokens stay: of a doubled token the left copy goes. Tokens that
    are missing at one place are one [MASK] at the visible token behind them; masks before it are the first
    of them, and a token that is to be replaced waits.

    A text ends where its padding begins, and what is missing at its end is missing before the padding. A row
    without padding behind it may be cut off anywhere: of clean only the part that it has is asked for. The
    label of a mask there that stands for nothing is [MASK].
    """
    T = noisy.size(1)
    size, goal = text_length(noisy, pad)[:, None], text_length(clean, pad)[:, None]      # (B, 1) each
    words = F.pad(clean, (0, 1), value=-1 if pad is None else pad)                       # (B, M+1)
    kept, column, last = align(noisy, words, size, goal, mask)

    # back from the end of the text, which is the first j words, to its start
    target, j = noisy.clone(), torch.where(size < T, goal + 1, last)                     # (B, 1)
    for i in reversed(range(T)):
        y, inside = noisy[:, i:i + 1], size >= i                                         # (B, 1) each
        is_kept = kept[i].gather(1, j)
        answer = torch.where(is_kept, words.gather(1, (j - 1).clamp(min=0)), wrong)
        answer = torch.where((y == mask) & ~is_kept, mask, answer)
        j = torch.where(inside, j - is_kept.long(), j)
        before = torch.where(inside & (y != mask), column[i].gather(1, j).long(), j)
        answer = torch.where(before < j, mask, answer)
        target[:, i:i + 1] = torch.where(inside, answer, y)
        j = before
    return target


def align(noisy, words, size, goal, mask):
    """
    The cheapest ways to make the first j words (B, M+1) of the first i tokens of noisy (B, T), for all i, j.

    size, goal (B, 1): the tokens before the padding of both. Returns kept [T] of (B, M+2) bool, whether token
    i stands for word j - 1 then, else it goes; column [T] of (B, M+2), the j before it if words are missing
    there; last (B, 1), the cheapest j at the end.
    """
    B, T = noisy.shape
    hole, at = noisy == mask, torch.arange(words.size(1) + 1, device=noisy.device)       # (M+2,)
    ends = torch.arange(T, device=noisy.device) == size             # (B, T) the padding behind the text
    closed = at[:-1] == goal                                        # (B, M+1)
    behind = hole.flip(1).cummin(1).values.flip(1)                  # (B, T) nothing but masks from here on
    away = (ends | hole & ~behind) * NEVER + ~hole
    whole = (NEVER * (at > 0)).expand(B, -1)                        # (B, M+2) by j, if none is missing there
    best, start = at.expand(B, -1), torch.zeros_like(at).expand(B, -1)
    kept, column = [], []
    for i in range(T):
        here = slice(i, i + 1)
        column.append(start.int())                                  # there are T * B * M of them
        before = torch.where(hole[:, here], whole, best)            # masks are the first of what is missing
        price = ((words != noisy[:, here]) & ~hole[:, here]).long()
        stay = before[:, :-1] + price.masked_fill(closed != ends[:, here], NEVER)        # (B, M+1)
        go = before + away[:, here]
        kept.append(F.pad(stay <= go[:, 1:], (1, 0)))
        whole = torch.cat((go[:, :1], stay.minimum(go[:, 1:])), 1)
        low, start = (whole - at).cummin(1)
        best = low + at
    last = (whole.masked_fill(at > goal, 2 * NEVER * T) * len(at) - at).argmin(1, keepdim=True)
    return kept, column, last


def applied(ids, fixed, answers, mask, wrong):
    """A row ids, fixed with the edits answers made, lists of T: two lists, a mask for every hole opened."""
    out = []
    for id, keep, answer in zip(ids, fixed, answers):
        if answer == mask:
            out += [(mask, False), (id, keep)] if id != mask else []
        elif answer != wrong:
            out.append((answer, keep))
    return [id for id, _ in out], [keep for _, keep in out]


# -----------------------------------------------------------------------------
# rounds


@torch.no_grad()
def mend(run, denoise):
    """
    Edits a text until it stays as it is, or for how.rounds rounds. Masks are filled first.

    Each round is a pass, in which all is done that edits_of says, and the loop denoise, which fills what was
    opened, all else fixed. A text that was there before ends it. With how.verify a round is an offer that the
    causal mode may turn down, see parts.verify. What is fixed stays, though it may move; a text never grows
    beyond block_size. run: a parts.look.Sampling. Returns what denoise does, but of streams, which have no
    padding, the canvas is a list of rows of several lengths.
    """
    rows, fixed = [*run.canvas], [*run.fixed]
    fill_holes(run, rows, fixed, range(len(rows)), denoise)
    keep(run, rows)
    if run.how.verify:
        def one_round(rows, fixed, at_work):
            edit(run, rows, fixed, at_work)
            fill_holes(run, rows, fixed, at_work, denoise)
        verify(run, rows, fixed, one_round, options, keep)
    else:
        until_nothing_changes(run, rows, fixed, denoise)

    if run.history is not None:                                     # all of them as wide as the widest
        width = max(step.size(1) for step in run.history)
        run.history[:] = [F.pad(step, (0, width - step.size(1)), value=run.mask) for step in run.history]
    return torch.stack(rows) if run.ends.pad is not None else rows, run.nfe, run.history


def until_nothing_changes(run, rows, fixed, denoise):
    """The rounds of rows and fixed, lists of (T,): how.rounds, or fewer if no row has a text that is new."""
    at_work = [*range(len(rows))]
    seen = [{tuple(row.tolist())} for row in rows]
    for _ in range(run.how.rounds):
        edit(run, rows, fixed, at_work)
        keep(run, rows)
        fill_holes(run, rows, fixed, at_work, denoise)
        keep(run, rows)
        at_work = [i for i in at_work if tuple(rows[i].tolist()) not in seen[i]]
        if not at_work:
            break
        for i in at_work:
            seen[i].add(tuple(rows[i].tolist()))


def edit(run, rows, fixed, at_work):
    """Makes the edits of edits_of, in one pass, in the rows at_work of rows and fixed, lists of (T,)."""
    for group in same_length(rows, at_work):
        x, kept = (torch.stack([some[i] for i in group]) for some in (rows, fixed))
        answers = edits_of(run, x, kept)
        run.nfe[group] += 1
        for i, *row in zip(group, *(of.tolist() for of in (x, kept, answers))):     # waits for a GPU once
            rows[i], fixed[i] = moved(*row, run)


def fill_holes(run, rows, fixed, at_work, denoise):
    """Fills the holes in the rows at_work of rows and fixed, lists of (T,), by the loop denoise."""
    filling = replace(run.how, rounds=None, remask='none', remask_threshold=None)
    for group in same_length(rows, at_work):
        x, kept = (torch.stack([some[i] for i in group]) for some in (rows, fixed))
        holes = (x == run.mask).any(1).nonzero()[:, 0].tolist()
        if not holes:
            continue
        group, x, kept = [group[row] for row in holes], x[holes], kept[holes]
        x, passes, _ = denoise(Sampling(run.model, x, x != run.mask, filling, run.ends, left_of(kept),
                                        generator=run.generator))
        run.nfe[group] += passes
        for i, ids in zip(group, close_rows(x, ~kept, run.mask, run.ends)):
            rows[i] = ids


def keep(run, rows):
    """Adds rows, a list of (T,) of several lengths, to the history, masks behind the shorter ones."""
    if run.history is not None:
        width = max(map(len, rows))
        run.history.append(torch.stack([F.pad(row, (0, width - len(row)), value=run.mask) for row in rows]))


def edits_of(run, x, fixed):
    """
    The answers (B, T) to be applied to x (B, T), without masks: what is likelier than that a token stays.

    It has to be doubted more than how.remask_threshold. Nothing is put into the padding behind a text, and no
    more holes are opened than have room, the surest first.
    """
    p, keep = options(run, x, fixed)
    best, answers = p.max(-1)
    answers = torch.where((best > keep) & (1 - keep > (run.how.remask_threshold or 0)), answers, x)

    mask = run.mask
    gone = (answers == mask + 1).sum(1)
    room = run.model.config.block_size - text_length(x, run.ends.pad) + gone
    opened = answers == mask
    return torch.where(opened & ~first_of(best, opened, room), x, answers)


def options(run, x, fixed):
    """
    The probabilities of all answers to x (B, T), (B, T, V+2), and of the one that keeps a token (B, T).

    Those that are no edits are negative: what stands there, and what would change what is fixed.
    """
    model, mask = run.model, run.mask
    logits = model.logits(model(x)).float()                         # (B, T, V+2)
    closed = left_of(fixed) & ~fixed
    logits = forbid(logits.flatten(0, 1), run.ends.forbid, closed.flatten()[:, None]).view(logits.shape)
    p = logits.softmax(-1)
    keep = p.gather(-1, x[..., None])[..., 0]                       # (B, T)

    # what is fixed is kept, but a hole may be opened before it, if that is not between two fixed tokens
    inside = torch.arange(x.size(1), device=x.device) <= text_length(x, run.ends.pad)[:, None]
    free = inside & ~fixed
    opens = inside & ~(fixed & F.pad(fixed[:, :-1], (1, 0), value=True))
    p = p.scatter(-1, x[..., None], -1.0)
    p[..., mask] = p[..., mask].masked_fill(~opens, -1.0)
    p[..., :mask] = p[..., :mask].masked_fill(~free[..., None], -1.0)
    p[..., mask + 1] = p[..., mask + 1].masked_fill(~free, -1.0)
    return p, keep


def moved(ids, fixed, answers, run):
    """
    A row ids, fixed, lists of T, with the edits made, (T,) each; one with padding keeps its length. Nothing
    is no text.
    """
    new, kept = applied(ids, fixed, answers, run.mask, run.mask + 1)
    if not new:
        new, kept = ids, fixed
    if run.ends.pad is not None:
        T, end = run.canvas.size(1), run.ends.pad
        new, kept = (new + [end] * T)[:T], (kept + [False] * T)[:T]
    return torch.tensor(new, device=run.canvas.device), torch.tensor(kept, device=run.canvas.device)
