"""
Sample from a trained nanoRemask checkpoint: generate, infill, repair, edit.

    python sample.py --init_from=ckpt                                    the newest checkpoint under out_dir, its best sampler
    python sample.py --preset=remdm --steps=32                           a named sampler; every choice can be overridden
    python sample.py --task=infill --text="(+_2)=_"                      fill the holes
    python sample.py --task=repair --text="(+12))=3"                     find what is wrong and write it anew
    python sample.py --task=edit --text="(+12)=3" --mask=2:4             write only this span anew
    python sample.py --remask=wrong --html=steps.html                    watch it think

All sampling is one loop with two rules: the commit rule says which masked positions of the canvas become visible,
the remask rule says which visible ones go back to [MASK]. See denoise.
"""

import configurator

configurator.help_first(globals())           # --help does not wait for torch
# ruff: noqa: E402 (so the imports come after it)

import math
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from tqdm import tqdm

from model import GPT, draw, filtered, fine
from parts.abstain import p_mask
from parts.energy import best_samples, energy, guided, text_of, token_energy
from parts.presets import check_rules, check_sampling, choose_rules, supports
from parts.speculate import left_to_right, write
from plumbing.checkpoint import export_safetensors
from plumbing.command import canvases, given_samples, load_networks, show_samples
from plumbing.evaluate import p_wrong
from plumbing.rows import Ends, close_rows, first_of, left_of, places, random_subset, spread
from plumbing.text import decode, encode, start_canvas, until_end

# -----------------------------------------------------------------------------
# the task
task = 'generate'          # generate | infill | repair | edit | score (writes nothing, says what the model thinks of a text)
prompt = ''                # generate: text that every sample starts with
text: str = None           # infill, repair, edit, score: the text
file: str = None           # or a file of texts, one a line
mask: str = None           # edit: the tokens to write anew, 3:5 for the fourth and fifth, or several spans 3:5,8:9
num_samples: int = None    # how many samples to draw; None: 10, with a text 1 each
preset: str = None         # a named choice of what is None below, see parts/presets.py; None: the best for the checkpoint
seed = 1337                # the same seed and command give the same text
score = False              # print NELBO, causal NLL and p(WRONG) of every token of what was written
animate = False            # play the denoising in the terminal (pip install rich)
html: str = None           # write it to this file, a page with a slider over the steps
save: str = None           # also write the samples to this file, one JSON object a line
# the checkpoint
init_from = 'ckpt'         # 'ckpt': the newest checkpoint under out_dir; or the path of one
out_dir = 'out'            # where 'ckpt' looks
remask_from: str = None    # path of a second, remasking checkpoint that judges the visible tokens
merge_from: str = None     # path of a second checkpoint of the same architecture to merge with the first
merge_weight = 0.5         # its share in the merged weights: 0 is the first checkpoint, 1 the second
export: str = None         # only write the weights (averaged, merged) to this .safetensors file, for init_from
# rarely turned
length: int = None         # generate: number of tokens, given; None: the model decides (without end token: block_size)
hole = '_'                 # infill: stands for one token; at the very end of the text for as many as the model wants
batch_size = 256           # samples drawn at a time; what causal sampling keeps of the text grows with it
device = 'auto'            # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'             # auto | float32 | bfloat16
attention = 'auto'         # auto | plain | sdpa
compile = False            # torch.compile the network
# -----------------------------------------------------------------------------


@dataclass
class How:
    """The settings of the loop, which are settings of this script too."""
    # which masked tokens are committed
    steps: int = None          # passes; None: one a token; repair: a fourth, or 1 (remask=causal takes what it needs)
    commit: str = None         # random | confidence | margin | entropy | threshold | abstain | priority; None: random
    schedule: str = None       # linear: equally many tokens a step; cosine: few early, many late; None: linear
    block_length: int = None   # commit blocks of that many tokens from left to right (semi-autoregressive)
    choice_temperature: float = None  # commit=confidence: noise in the order, annealed to 0 (MaskGIT); None: 4.5
    commit_threshold: float = 0.9     # commit=threshold: candidates at least this probable
    priority: str = '()=+*'    # commit=priority: candidates of these characters first
    ar_prefix: int = None      # tokens drawn left to right with the causal pass first; None: 0 (a causal checkpoint: all)
    # which visible tokens are re-masked
    remask: str = None         # none | random | wrong | critic | confidence | remdm | p2 | causal
    remask_rate: float = None  # times the doubt, the probability of re-masking; None: 1, of random and remdm 0.3
    remask_random_ratio: float = 0.0  # 0: re-mask by doubt alone, 1: at random alone
    remask_patience: float = None     # how much less a doubt counts while little is visible; None: 1 for text without end, else 0
    remask_threshold: float = None    # re-mask what is doubted more than this, each position once
    remask_schedule: tuple = None     # re-mask a share of the visible tokens, from the first to the second number: 0.3,0.05
    rewrite: bool = None       # draw what is doubted anew at once, given what stands there; None: in repair, if trained on noise
    remdm: str = 'cap'         # remask=remdm: cap | rescale
    correct_share: float = None       # share of the steps, at the end, that only re-mask and refill; None: 0.25
    # what the energy head is asked, in a checkpoint that has one (tools/energy.py)
    guide: int = None          # at every step draw this many whole completions, go on with one, the likelier the lower its energy
    best_of: int = None        # draw this many times the samples and keep one in that many, the lowest energy, lengths as drawn
    # drawing
    temperature: float = None  # 0: the most probable token, 1: the model's own distribution; None: 1 (repair: 0)
    top_k: int = None          # draw among the k most probable tokens only
    top_p: float = None        # draw among the most probable tokens that together reach this probability only

    def filters(self):
        """How a token is drawn, see model.filtered."""
        return dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


how = How()      # what the command line says
USUAL = dict(commit='random', schedule='linear', choice_temperature=4.5, remask='none', remask_patience=0.0, rewrite=False,
             correct_share=0.25, temperature=1.0)             # what is meant by None
RATES = dict(random=0.3, remdm=0.3)                           # of the others 1


# -----------------------------------------------------------------------------
# the loop


def generate_diffusion(model, canvas, fixed, *, ends=Ends(), closed=None, remask_model=None, generator=None,
                       trace=False, **rules):
    """
    Fills a canvas by any sampler: canvas (B, T) ids, model.mask_token_id where undecided; fixed (B, T), what never changes.

    The start decides the task: all masked (generate), all but the holes fixed (infill, edit), visible but not fixed (repair).
    rules: fields of How. For the rest, and what is returned, see denoise. Raises UserError for rules that do not fit
    together or do not fit the canvas.
    """
    how = How(**{**USUAL, **{name: value for name, value in rules.items() if value is not None}})
    check_rules(how, canvas, fixed, model.mask_token_id, remask_model, COMMIT, [*DOUBT, *OTHER_RULES])
    if how.remask == 'causal':
        return write(model, canvas, fixed, how.filters(), ends, generator=generator, trace=trace)
    sampler = rewrite if how.rewrite else denoise
    return sampler(model, canvas, fixed, how, ends, closed=closed, judge=remask_model, generator=generator, trace=trace)


@torch.no_grad()
def denoise(model, canvas, fixed, how, ends, *, closed=None, judge=None, generator=None, trace=False):
    """
    The one sampling loop: every step commits some masked positions and re-masks some visible ones.

    canvas (B, T) ids; fixed (B, T) bool, positions that never change; ends: the dataset's special ids; closed (B, T) bool:
    where none of ends.forbid is drawn, None: left of what is fixed; judge: a second network that finds the wrong tokens.
    Returns canvas (B, T) without masks, nfe (B,) the passes that each row took part in (a finished row leaves the batch),
    and the list of all canvases if trace, else None.
    """
    run = Sampling(model, canvas, fixed, how, ends, closed, judge, generator)
    history = [canvas.clone()]
    for step in range(run.steps):
        if not len(run.rows):
            break
        look = Look(run, step)
        score = look.in_blocks(COMMIT[how.commit](look))                       # which masked positions come first
        again = look.taken_back(score)                                         # which visible ones go back to [MASK]
        chosen = first_of(score, look.masked, look.how_many(again))

        ids, logp, _ = look.candidates or look.propose(chosen)
        x = torch.where(chosen, ids, look.x).masked_fill(again, model.mask_token_id)
        run.put(look, close_rows(x, look.masked, model.mask_token_id, ends), chosen, logp)
        history += [run.canvas.clone()] * trace
    return run.canvas, run.nfe, history if trace else None


@torch.no_grad()
def rewrite(model, canvas, fixed, how, ends, *, closed=None, judge=None, generator=None, trace=False):
    """
    denoise, but what it would re-mask is drawn anew in the same pass, seen as it stands.

    A network that was trained on noise reads out of a wrong token what it was before, and mends lengths too.
    """
    run = Sampling(model, canvas, fixed, how, ends, closed, judge, generator)
    history = [canvas.clone()]
    for step in range(run.steps):
        if not len(run.rows):
            break
        look = Look(run, step)
        score = look.in_blocks(COMMIT['random'](look))
        again = by_doubt(look, DOUBT[how.remask](look))
        chosen = again | first_of(score, look.masked, look.how_many(torch.zeros_like(again)))

        ids, logp, _ = look.propose(chosen)
        x = torch.where(chosen, ids, look.x)
        run.put(look, close_rows(x, look.masked | look.visible, model.mask_token_id, ends), chosen, logp)
        history += [run.canvas.clone()] * trace
    return run.canvas, run.nfe, history if trace else None


class Sampling:
    """What the loop remembers from step to step, (B, T) or (B,) each."""

    def __init__(self, model, canvas, fixed, how, ends, closed, judge, generator):
        self.model, self.fixed, self.how, self.ends, self.judge, self.generator = model, fixed, how, ends, judge, generator
        self.canvas = canvas.clone()
        self.closed = left_of(fixed) if closed is None else closed

        # no row is filled in more steps than it has tokens to fill; the last share of the steps may only correct
        masked = canvas == model.mask_token_id
        self.corrects = how.remask in DOUBT
        self.start = masked.sum(1)                                             # (B,) tokens to fill
        self.steps = how.steps or int(self.start.max()) or max(1, canvas.size(1) // 4)
        filling = self.steps - int(how.correct_share * self.steps) if self.corrects else self.steps
        self.fill = self.start.clamp(min=1, max=max(1, filling))               # (B,) steps to fill a row in
        self.first_hole = masked.long().argmax(1)

        self.committed_logp = torch.zeros(canvas.shape, dtype=fine(canvas.device), device=canvas.device)
        self.previous = torch.full_like(canvas, model.mask_token_id) if 'previous' in model.parts else None
        self.tried = fixed.clone()                                             # remask_threshold doubts a position once
        self.nfe = torch.zeros_like(self.start)
        everything = torch.ones_like(self.start) if self.corrects else self.start
        self.rows = everything.nonzero()[:, 0]                                 # (R,) the rows that have not finished

    def put(self, look, x, chosen, logp):
        """What a step made of its rows x (R, T), the tokens that it chose and their log-probabilities."""
        rows = self.rows
        self.canvas[rows] = x
        self.committed_logp[rows] = torch.where(chosen, logp, self.committed_logp[rows])
        self.nfe[rows] += look.passes
        if look.last or not self.corrects or self.how.remask_threshold is not None:
            self.rows = rows[places((x == self.model.mask_token_id).any(1))]   # a row without masks has finished


class Look:
    """One pass over the rows (R, T) that have not finished, and what it tells the rules."""

    def __init__(self, run, step):
        rows, how, model = run.rows, run.how, run.model
        self.run, self.how, self.step = run, how, step
        self.x = run.canvas[rows]
        self.masked = self.x == model.mask_token_id
        self.visible = ~self.masked & ~run.fixed[rows]
        self.last = step == run.steps - 1
        self.judge = None if self.last else run.judge
        self.progress = ((step + 1) / run.fill[rows]).clamp(max=1)             # (R,)
        share = 1 - self.progress if how.schedule == 'linear' else (self.progress * math.pi / 2).cos()
        self.left = (run.start[rows] * share + 1e-4).long()                    # (R,) masks after this step

        # the pass; a network with self-conditioning is shown what it predicted in the pass before
        told = {}
        if run.previous is not None:
            told['previous'] = run.previous[rows].masked_fill(~self.masked, model.mask_token_id)
        self.hidden = model(self.x, **told)                                    # (R, T, C)
        self.passes = 1
        if told:
            predicted = model.logits(self.hidden[self.masked], real_only=True).argmax(-1)
            run.previous[rows] = told['previous'].masked_scatter(self.masked, predicted)

        # tokens for every masked position, or later only for those that are committed: ids, logp (R, T), logp of all (N, V+2)
        self.candidates = None
        if how.guide:
            self.candidates = guided(self)
            self.passes += model.config.energy_head * how.guide
        elif self.judge or how.remask == 'critic' or how.commit not in BLIND:
            self.candidates = self.propose(self.masked)
        self.noise = torch.rand(self.x.shape, generator=run.generator, device=self.x.device, dtype=fine(self.x.device))

    def propose(self, where):
        """
        Tokens for the True positions of where (R, T): ids (R, T), their log-probabilities (R, T), and the log-probabilities
        (N, V+2) of all tokens there, before temperature, top_k and top_p.
        """
        run = self.run
        at = places(where)                                                     # (N,)
        logits = run.model.logits(self.hidden.flatten(0, 1)[at], real_only=True)             # (N, V+2)
        if run.ends.forbid:
            forbidden = torch.zeros(logits.size(1), dtype=torch.bool, device=logits.device)
            forbidden[list(run.ends.forbid)] = True
            logits = logits.masked_fill(run.closed[run.rows].flatten()[at, None] & forbidden, float('-inf'))
        ids = draw(filtered(logits, **self.how.filters()), run.generator)      # (N,)
        logp = logits.to(fine(logits.device)).log_softmax(-1)
        return spread(where, ids), spread(where, logp.gather(1, ids[:, None])[:, 0]), logp

    def completed(self):
        """The canvas (R, T) with the candidates in its holes."""
        return torch.where(self.masked, self.candidates[0], self.x)

    def in_blocks(self, score):
        """The commit scores (R, T), earlier blocks first; ready (R, T) is what may be committed now."""
        self.ready = self.masked
        if self.how.block_length:
            position = torch.arange(self.x.size(1), device=self.x.device)
            block = (position - self.run.first_hole[self.run.rows, None]) // self.how.block_length
            score = score - 1e6 * block
            first_open = block.masked_fill(~self.masked, self.x.size(1)).amin(1, keepdim=True)
            self.ready = self.masked & (block == first_open)
        return score

    def how_many(self, again):
        """How many masked positions (R,) are committed when again (R, T) are re-masked; the last step leaves none."""
        count = self.masked.sum(1)
        if self.last:
            return count
        if self.how.commit == 'threshold':
            sure = self.candidates[1] >= math.log(self.how.commit_threshold)
            return (self.ready & sure).sum(1).clamp(min=1)
        return count + again.sum(1) - self.left

    def taken_back(self, score):
        """Which visible positions (R, T) go back to [MASK]."""
        if self.how.remask == 'none' or self.last:
            return torch.zeros_like(self.masked)
        if self.how.remask in OTHER_RULES:
            return OTHER_RULES[self.how.remask](self, score)
        return by_doubt(self, spare_lengths(self, DOUBT[self.how.remask](self)))

    def rate(self):
        """remask_rate, or what is usual for the rule."""
        return RATES.get(self.how.remask, 1.0) if self.how.remask_rate is None else self.how.remask_rate


# -----------------------------------------------------------------------------
# which masked positions are committed: a score (R, T), the highest first


def confidence(look):
    """The likeliest candidates, shaken by annealed Gumbel noise (MaskGIT)."""
    gumbel = -(-look.noise.log()).log()
    return look.candidates[1] + look.how.choice_temperature * (1 - look.progress[:, None]) * gumbel


def margin(look):
    """The largest distance between the best and the second token (Dream's topk_margin)."""
    top = look.candidates[2].exp().topk(2, dim=-1).values                      # (N, 2)
    return spread(look.masked, (top[:, 0] - top[:, 1]).clamp(min=1e-30).log())


def entropy(look):
    """The lowest entropy."""
    logp = look.candidates[2]
    return spread(look.masked, (logp.exp() * logp.clamp(min=-1e9)).sum(-1))


def priority(look):
    """Candidates of the tokens how.priority first."""
    return ((look.noise + torch.isin(look.candidates[0], torch.tensor(look.how.priority, device=look.x.device))) / 2).log()


def abstain(look):
    """The lowest p(MASK): it does not look at the token drawn, so it prefers places."""
    return -p_mask(look.run.model, look.hidden, look.masked)


COMMIT = dict(random=lambda look: look.noise.log(), confidence=confidence, margin=margin, entropy=entropy, abstain=abstain,
              threshold=lambda look: look.candidates[1], priority=priority)
BLIND = ('random', 'abstain')    # these do not look at candidates, so only what is committed is drawn


# -----------------------------------------------------------------------------
# how much each visible token is doubted, (R, T) in 0..1


def wrong(look):
    """p(WRONG), by this pass, or by the judge in the completed canvas."""
    model, x, hidden = look.run.model, look.x, look.hidden
    if look.judge:
        model, x = look.judge, look.completed()
        hidden = model(x)
        look.passes += 1
    at = places(look.visible)                                                  # (N,)
    p = p_wrong(model, hidden.flatten(0, 1)[at], x.flatten()[at])              # (N,)
    return spread(look.visible, p).to(look.noise.dtype)


def critic(look):
    """The probability that the energy head calls the token wrong in the completed canvas."""
    look.passes += look.run.model.config.energy_head
    return token_energy(look.run.model, *text_of(look.completed(), look.run.ends)).sigmoid().to(look.noise.dtype)


DOUBT = dict(random=lambda look: torch.ones_like(look.noise), wrong=wrong, critic=critic,
             confidence=lambda look: 1 - look.run.committed_logp[look.run.rows].exp())       # ReMDM-conf


def spare_lengths(look, doubt):
    """
    The doubt (R, T), but for an end token and the padding behind it the mean doubt of the row's text.

    By themselves these two are hardly ever doubted. Re-masking the text alone takes away what speaks for a long text and
    leaves what speaks for a short one, and the samples shrink.
    """
    ends = look.run.ends
    if ends.end is None:
        return doubt
    closing = look.visible & ((look.x == ends.end) | (look.x == ends.pad))
    inside = look.visible & ~closing
    mean = (doubt * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp(min=1)  # (R, 1)
    return torch.where(closing, mean, doubt)


def by_doubt(look, doubt):
    """
    Which visible positions (R, T) are re-masked by their doubt (R, T): each with probability rate * doubt.

    With remask_threshold those whose doubt exceeds it, each once; with remask_schedule a share, the most doubted first.
    remask_patience: doubt ^ (visible share ^ -patience) counts. While little is visible nearly all is doubted, and what is
    re-masked together is drawn again together: noise, which is doubted again. random_ratio: 0 looks at the doubt alone.
    """
    how, run = look.how, look.run
    at_random = 1.0 if how.remask == 'random' else how.remask_random_ratio
    if how.remask_schedule is not None:
        start, end = how.remask_schedule
        share = start + (end - start) * look.step / max(1, run.steps - 2)
        count = (share * look.visible.sum(1)).round().long()                   # (R,)
        some = random_subset(look.visible, (at_random * count).round().long(), run.generator)
        return some | first_of(doubt, look.visible & ~some, count - some.sum(1))

    where = look.visible
    if how.remask_threshold is not None:
        where = where & ~run.tried[run.rows]
        chance = (doubt > how.remask_threshold).to(doubt.dtype)
    elif how.remask_patience:
        shown = (~look.masked).sum(1, keepdim=True) / look.x.size(1)           # (R, 1)
        chance = look.rate() * doubt ** shown ** -how.remask_patience
    else:
        chance = look.rate() * doubt
    noise = torch.rand(where.shape, generator=run.generator, device=where.device)
    again = where & (noise < (1 - at_random) * chance + at_random * look.rate())
    run.tried[run.rows] |= again
    return again


def remdm(look, score):
    """
    Any token, with a probability that keeps the forward marginals (ReMDM, remask_rate is its eta).

    room is the largest probability for which the masks after the step can still be as many as without it.
    """
    room = look.left / look.visible.sum(1).clamp(min=1)                        # (R,)
    eta = look.rate()
    chance = eta * room.clamp(max=1) if look.how.remdm == 'rescale' else room.clamp(max=eta)
    noise = torch.rand(look.x.shape, generator=look.run.generator, device=look.x.device)
    again = look.visible & (noise < chance[:, None])
    return random_subset(again, look.left, look.run.generator)                 # by chance more than may be masked


def p2(look, score):
    """The visible tokens, scored rate * log(1 - p(WRONG)), compete with the candidates for staying (P2)."""
    stay = look.rate() * (-spare_lengths(look, wrong(look))).log1p().clamp(min=-1e3)
    among = look.masked | look.visible
    keep = first_of(torch.where(look.visible, stay, score.clamp(max=-1e-9)), among, among.sum(1) - look.left)
    return look.visible & ~keep


OTHER_RULES = dict(remdm=remdm, p2=p2)    # functions of a Look and the commit scores: what is re-masked, (R, T)


# -----------------------------------------------------------------------------
# batches of canvases


@torch.no_grad()
def fill(model, meta, canvas, fixed, *, ar_prefix=0, best_of=None, batch_size=256, seed=1337, progress=False, trace=False,
         **rules):
    """
    Runs a sampler on canvas, fixed (B, T) in batches: a list of B dicts text, tokens (ids from the first position to the
    end), nfe, finished; with trace also trace (S, T), the row's canvases.

    meta: the dataset's, from a checkpoint. ar_prefix, best_of: see How; nfe then counts all passes for a sample that is kept.
    rules: what generate_diffusion takes; remask_patience is 1 where texts have no end, else 0, if not given.
    """
    device = next(model.parameters()).device
    rules = {'remask_patience': float(meta['eos'] is None), **rules}           # by what was measured, see docs/log.md
    rules.update(ends=Ends.of(meta), generator=torch.Generator(device).manual_seed(seed), trace=trace)
    if isinstance(rules.get('priority'), str):
        rules['priority'] = encode(meta, rules['priority'])
    canvas = canvas.repeat(best_of or 1, 1)
    fixed = fixed.repeat(best_of or 1, 1)
    num = len(canvas)
    samples = []
    for first in tqdm(range(0, num, batch_size), disable=not progress or num <= batch_size, desc='sampling', leave=False):
        x = canvas[first:first + batch_size].to(device)
        kept = fixed[first:first + batch_size].to(device)
        x, prefix_nfe, prefix_steps = write_prefix(model, x, kept, ar_prefix, **rules)
        x, nfe, steps = generate_diffusion(model, x, kept, **rules)
        nfe = nfe + prefix_nfe
        if best_of:
            nfe = nfe + model.config.energy_head
            energies = energy(model, *text_of(x, rules['ends'])).tolist()
        for row, (ids, passes) in enumerate(zip(x.tolist(), nfe.tolist())):
            text, finished = decode(meta, ids)
            samples.append(dict(text=text, tokens=until_end(meta, ids), nfe=passes, finished=finished))
            if trace:
                samples[-1]['trace'] = torch.stack([step[row] for step in prefix_steps + steps])
            if best_of:
                samples[-1]['energy'] = energies[row]
    return best_samples(samples, canvas.tolist(), num // best_of) if best_of else samples


def write_prefix(model, x, fixed, ar_prefix, *, ends, generator, trace, **rules):
    """x (B, T) with ar_prefix tokens more in each row, drawn left to right: (x, passes, canvases but the last)."""
    if not ar_prefix:
        return x, 0, []
    mask = model.mask_token_id
    masked = x == mask
    width = min(x.size(1), int(masked.long().argmax(1).max()) + ar_prefix)
    filters = {'temperature': 1.0, **{name: rules[name] for name in ('temperature', 'top_k', 'top_p') if name in rules}}
    head, nfe, steps = left_to_right(model, x[:, :width], fixed[:, :width], ar_prefix, filters, ends, trace=trace,
                                     closed=left_of(fixed)[:, :width], generator=generator)  # the end may be beyond width
    steps = [torch.cat((step, x[:, width:]), 1) for step in steps or []][:-1]
    x = torch.cat((head, x[:, width:]), 1)
    return close_rows(x, masked, mask, ends), nfe, steps


def generate(model, meta, num, *, prompt=(), lengths=None, **how):
    """Draws num samples from an empty canvas, see start_canvas and fill, whose keywords it takes."""
    return fill(model, meta, *start_canvas(model, meta, num, prompt, lengths), **how)


# -----------------------------------------------------------------------------
# the command


def main():
    s = SimpleNamespace(**{name: globals()[name] for name in configurator.settings(__file__) if name in globals()})
    check_sampling(s, how)
    model, checkpoint, judge = load_networks(s, GPT.load, supports)
    meta, config = checkpoint['meta'], checkpoint['config']
    if s.export:
        export_safetensors(s.export, model, checkpoint)
        return print(f'written to {s.export}; sample from it: python sample.py --init_from={s.export}')
    if s.task == 'score':
        return show_samples(s, model, judge, checkpoint, supports(config), given_samples(s, model, meta))

    # what is to be written, and by which rules
    texts, canvas, fixed = canvases(s, model, meta)
    masked = canvas == model.mask_token_id
    inside = s.task == 'repair' or bool((masked.cummax(1).values & ~masked).any())           # text right of a hole
    rules = choose_rules(config, preset=s.preset, task=s.task, inside=inside, judge=judge is not None, **vars(how))
    print(', '.join(f'{name}={value}' for name, value in rules.items()))

    t0 = time.time()
    samples = fill(model, meta, canvas, fixed, batch_size=s.batch_size, seed=s.seed, progress=True, remask_model=judge,
                   trace=bool(s.animate or s.html) or s.task == 'repair', **rules)
    show_samples(s, model, judge, checkpoint, supports(config), samples, texts, canvas, fixed, rules, time.time() - t0)


if __name__ == '__main__':
    configurator.run(globals())
