"""What the sampling loop remembers, and what one pass over the canvas tells its rules."""

import math

import torch

from parts.energy import guided
from plumbing.draw import draw, filtered, fine, forbid
from plumbing.pieces import portions
from plumbing.rows import Ends, left_of, of_rows, places, recorded, spread


class Sampling:
    """
    What the loop remembers from step to step, (B, T) or (B,) each.

    canvas (B, T): ids, model.mask_token_id where undecided; fixed (B, T) bool: positions that never change
    ends: the special ids of the dataset, see plumbing.rows.Ends
    closed (B, T) bool: where none of ends.forbid is drawn; None: left of what is fixed
    judge: a second network that finds the wrong tokens, or None
    trace: whether the canvas of every step is kept in history, or a list that it goes to
    """

    def __init__(self, model, canvas, fixed, how, ends=Ends(), closed=None, judge=None, generator=None,
                 trace=False):
        self.model, self.fixed, self.how, self.ends, self.judge = model, fixed, how, ends, judge
        self.generator = generator
        self.mask = model.mask_token_id
        self.canvas = canvas.clone()
        self.closed = left_of(fixed) if closed is None else closed

        # a row is filled in no more steps than it has tokens, unless they are spent on re-masking; the
        # last steps may only correct
        masked = canvas == self.mask
        self.start = masked.sum(1)                                   # (B,) tokens to fill
        self.steps = how.steps or int(self.start.max()) or max(1, canvas.size(1) // 4)
        filling = self.steps - int(how.correct_share * self.steps) if how.corrects() else self.steps
        self.fill = self.start.clamp(min=1, max=max(1, filling))     # (B,) steps to fill a row in
        if how.steps and how.spends():
            self.fill = torch.full_like(self.start, how.steps)

        self.committed_logp = torch.zeros(canvas.shape, dtype=fine(canvas.device), device=canvas.device)
        self.previous = torch.full_like(canvas, self.mask) if 'previous' in model.parts else None
        self.tried = fixed.clone()                                   # remask_threshold doubts a position once
        self.nfe = torch.zeros_like(self.start)
        at_work = torch.ones_like(self.start) if how.corrects() else self.start
        self.rows = at_work.nonzero()[:, 0]                          # (R,) the rows that have not finished
        self.history = recorded(self.canvas, trace)

    def looks(self):
        """A Look for every step, until all rows have finished; put comes between two of them."""
        for step in range(self.steps):
            if not len(self.rows):
                break
            yield Look(self, step)

    def put(self, look, x, chosen, logp):
        """What a step made of its rows x (R, T), the tokens that it chose and their log-probabilities."""
        rows = self.rows
        self.canvas[rows] = x
        self.committed_logp[rows] = torch.where(chosen, logp, self.committed_logp[rows])
        self.nfe[rows] += look.passes
        if look.last or not self.how.corrects() or self.how.remask_threshold is not None:
            self.rows = rows[places((x == self.mask).any(1))]        # a row without masks has finished
        if self.history is not None:
            self.history.append(self.canvas.clone())


class Look:
    """One pass over the rows (R, T) that have not finished, and what it tells the rules."""

    def __init__(self, run, step):
        rows, how, model = run.rows, run.how, of_rows(run.model, run.rows)
        self.run, self.how, self.step, self.model = run, how, step, model
        self.x = run.canvas[rows]
        self.masked = self.x == run.mask
        self.visible = ~self.masked & ~run.fixed[rows]               # what may be re-masked
        if how.remask_full:
            self.visible &= ~self.masked.any(1, keepdim=True)
        self.last = step == run.steps - 1
        self.judge = None if self.last else run.judge
        self.progress = ((step + 1) / run.fill[rows]).clamp(max=1)   # (R,)
        share = 1 - self.progress if how.schedule == 'linear' else (self.progress * math.pi / 2).cos()
        self.left = (run.start[rows] * share + 1e-4).long()          # (R,) masks after this step

        # the pass; a network with self-conditioning is shown what it predicted in the pass before
        told = {}
        if run.previous is not None:
            told['previous'] = run.previous[rows].masked_fill(~self.masked, run.mask)
        self.hidden = model(self.x, **told)                          # (R, T, C)
        self.passes = 1
        if told:
            predicted = model.logits(self.hidden[self.masked], real_only=True).argmax(-1)
            run.previous[rows] = told['previous'].masked_scatter(self.masked, predicted)

        # tokens for all masked positions, if a rule looks at them; else only what is committed is drawn
        self.candidates = None
        if how.guide:
            self.candidates = guided(self)
            self.passes += model.config.energy_head * how.guide
        elif self.judge or how.needs_candidates():
            self.candidates = self.propose(self.masked)
        self.noise = torch.rand(self.x.shape, generator=run.generator, device=self.x.device,
                                dtype=fine(self.x.device))

    def propose(self, where):
        """
        Tokens for the True positions of where (R, T): their ids and log-probabilities (R, T) each, and the
        log-probabilities (N, V+2) of all tokens there, before temperature, top_k and top_p.

        What no rule asks for is 0 and None. Of a large vocabulary only some positions at a time are drawn.
        """
        run, how, hidden = self.run, self.how, self.hidden.flatten(0, 1)
        asked = how.guide or how.needs_candidates() or how.remask == 'confidence'
        # of the commit rules, these three look at the candidates alone, not at the other words
        every = asked and how.commit not in ('confidence', 'threshold', 'priority')
        closed, at = run.closed[run.rows].flatten(), places(where)   # (R * T,), (N,)
        ids, logp, words = [], [], []
        for some in portions(run.model, at):
            logits = run.model.logits(hidden[some], real_only=True)  # (n, V+2)
            logits = forbid(logits, run.ends.forbid, closed[some, None])
            ids.append(draw(filtered(logits, **how.filters()), run.generator))                   # (n,)
            if asked:
                law = logits.to(fine(logits.device)).log_softmax(-1)
                logp.append(law.gather(1, ids[-1][:, None])[:, 0])
                if every:
                    words.append(law)
        ids = spread(where, torch.cat(ids))
        logp = spread(where, torch.cat(logp)) if asked else torch.zeros_like(ids, dtype=torch.float32)
        return ids, logp, torch.cat(words) if every else None

    def completed(self):
        """The canvas (R, T) with the candidates in its holes."""
        return torch.where(self.masked, self.candidates[0], self.x)
