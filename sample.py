"""
Sample from a trained nanoRemask checkpoint: generate, infill, repair, edit.

    python sample.py --init_from=ckpt                         the newest checkpoint, its best sampler
    python sample.py --preset=remdm --steps=32                a named sampler; every choice can be overridden
    python sample.py --task=infill --text="(+_2)=_"           fill the holes
    python sample.py --task=repair --text="(+12))=3"          find what is wrong and write it anew
    python sample.py --task=edit --text="(+[12])=3"          write only what is in brackets anew
    python sample.py --remask=wrong --html=steps.html         watch it think

All sampling is one loop with two rules: the commit rule says which masked positions of the canvas become
visible, the remask rule says which visible ones go back to [MASK]. See denoise.
"""

import configurator

configurator.help_first(globals())           # --help does not wait for torch
# ruff: noqa: E402 (so the imports come after it)

import math
import time
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from configurator import UserError
from parts.abstain import abstain
from parts.again import until_believed
from parts.blocks import write_blocks
from parts.edits import mend
from parts.energy import best_samples, critic, energy, text_of
from parts.handle import Handle, Live
from parts.long import edits_in_windows, in_windows
from parts.look import Sampling
from parts.presets import check_rules, check_sampling
from parts.speculate import surprise, write, write_prefix
from plumbing.checkpoint import export_safetensors
from plumbing.command import ask, open_checkpoints, show_samples
from plumbing.evaluate import p_wrong
from plumbing.rows import Ends, Tally, close_rows, first_of, places, random_subset, spread
from plumbing.text import decode, encode, start_canvas, until_end

# -----------------------------------------------------------------------------
# what a newcomer turns: the task
task = 'generate'          # generate | infill | repair | edit | score (says what it thinks of a text)
prompt = ''                # generate: text that every sample starts with; FILE:PATH is all of that file
text: str = None           # infill, repair, edit, score: the text; \n is a line end where texts have no \
file: str = None           # or a file of texts, one a line; - is standard input
mask: str = None           # edit: a word to write anew, or 3:5,8:9 in tokens; None: what is in [brackets]
num_samples: int = None    # how many samples to draw; None: 10, with a text 1 each
preset: str = None         # rules with a name, see parts/presets.py, or several: a,b; None: the best
seed = 1337                # the same seed and command give the same text
score = False              # print NELBO, causal NLL and p(WRONG) of every token of what was written
animate = False            # write one by one, and show every step as it happens (pip install rich)
stream = False             # generate: print texts while they are written, if that is from left to right
html: str = None           # write it to this file, a page that plays the steps; score: shades what is doubted
save: str = None           # also write the samples to this file, one JSON object a line
# the checkpoint
init_from = 'ckpt'         # 'ckpt': the newest checkpoint in out_dir; or the path of one, or a folder
out_dir = 'out'            # where 'ckpt' looks
remask_from: str = None    # path of a second, remasking checkpoint that judges the visible tokens
merge_from: str = None     # path of a second checkpoint of the same architecture to merge with the first
merge_weight = 0.5         # its share in the merged weights: 0 is the first checkpoint, 1 the second
export: str = None         # only write the weights (averaged, merged) to this .safetensors file
# rarely turned
stop: str = None           # generate: a sample ends before this text (that of the prompt does not count)
length: int = None         # generate: number of tokens; None: the model decides (or block_size)
hole: str = None           # infill: a token, at the very end any number; None: _ if no text has it, or [MASK]
batch_size = 256           # samples drawn at a time; what causal sampling keeps of the text grows with it
device = 'auto'            # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'             # auto | float32 | bfloat16
attention = 'auto'         # auto | plain | sdpa
compile = False            # torch.compile the network
# -----------------------------------------------------------------------------


@dataclass
class How:
    """The settings of the loop; they are settings of the script as well. None: what the preset says."""
    # which masked tokens are committed
    steps: int = None          # passes; None: one a token; repair: a fourth, or 1 (causal: as it takes)
    commit: str = None # random | left | confidence | margin | entropy | threshold | abstain | priority
    schedule: str = None       # linear: equally many tokens a step | cosine: few early, many late
    block_length: int = None   # write in blocks of that many tokens, each after those to its left
    revise: bool = None        # block_length: the block before may change until the next one is written
    choice_temperature: float = None   # commit=confidence: noise in the order, annealed to 0; usually 4.5
    commit_threshold: float = None     # commit=threshold: candidates at least this probable; usually 0.9
    priority: str = None       # commit=priority: candidates of these characters first; usually ()=+*
    draft: bool = None         # the causal mode writes all (or a block) first, and the loop corrects it
    ar_prefix: int = None      # tokens drawn left to right by the causal pass first; a causal checkpoint: all
    # which visible tokens are re-masked
    remask: str = None         # none | random | wrong | surprise | critic | confidence | remdm | p2 | causal
    remask_rate: float = None  # times the doubt: how likely a token is re-masked; usually 1, or 0.3
    remask_random_ratio: float = None  # 0: re-mask by doubt alone, the usual; 1: at random alone
    remask_patience: float = None      # less doubt while little is visible; usually 1 in text without end
    remask_threshold: float = None     # re-mask what is doubted more than this, each position once
    remask_full: bool = None   # only in texts without a mask; usual if trained with full_ratio=1
    remask_schedule: tuple = None      # re-mask a share, from the first to the second number: 0.3,0.05
    rewrite: bool = None       # draw what is doubted anew at once; usual in repair, if trained on noise
    rounds: int = None         # of edits, which change the length as well; repair: 4, if trained on them
    verify: int = None         # rounds: so many edits are tried, the causal mode decides; usually 96, 0: off
    remdm: str = None          # remask=remdm: cap | rescale; usually cap
    correct_share: float = None        # least share of the steps that only re-mask and refill; usually 0.25
    # what whole texts are asked: whether a token is doubted; and their energy, with a head (tools/energy.py)
    redrafts: int = None       # what is doubted when it is finished is written again, at most so often
    guide: int = None          # draw that many completions a step; the lower its energy, the likelier one
    best_of: int = None        # draw that many times the samples, and keep those of the lowest energy
    # drawing
    temperature: float = None  # 0: the likeliest token, 1: the model's own distribution; usually 1
    top_k: int = None          # draw among the k most probable tokens only
    top_p: float = None        # draw among the most probable tokens that together reach this probability only

    def filters(self):
        """How a token is drawn, see plumbing.draw.filtered."""
        return dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def corrects(self):
        """Whether the last steps only re-mask and refill."""
        return self.remask in DOUBT

    def spends(self):
        """Whether steps beyond one a token are of use while a canvas is filled."""
        return self.remask in OTHER_RULES

    def of_block(self, T):
        """The same for a block, whose share of the steps for T tokens includes the pass that commits it."""
        steps = self.steps and max(1, round(self.steps * self.block_length / T) - 1)
        return replace(self, steps=steps, block_length=None)

    def needs_candidates(self):
        """Whether a rule looks at tokens for all masked positions."""
        return self.remask in ('critic', 'surprise') or self.commit not in BLIND


how = How()      # what the command line says
SAID = []        # and in which words, told after the samples
USUAL = dict(commit='random', schedule='linear', choice_temperature=4.5, commit_threshold=0.9, priority=(),
             remask='none', remask_random_ratio=0.0, remask_patience=0.0, remask_full=False, rewrite=False,
             remdm='cap', correct_share=0.25, temperature=1.0)
RATES = dict(random=0.3, remdm=0.3)    # remask_rate of the others is 1


# -----------------------------------------------------------------------------
# the loop


def generate_diffusion(model, canvas, fixed, *, ends=Ends(), remask_model=None, generator=None, trace=False,
                       **rules):
    """
    Fills a canvas by any sampler; rules are fields of How. For all else, and what is returned, see denoise.

    The canvas decides the task: all masked (generate), all but the holes fixed (infill, edit), visible but
    not fixed (repair). Raises UserError for rules that do not fit together or do not fit the canvas.
    """
    how = How(**{**USUAL, **{name: value for name, value in rules.items() if value is not None}})
    check_rules(how, canvas, fixed, model.mask_token_id, remask_model, COMMIT, [*DOUBT, *OTHER_RULES])
    if how.remask == 'causal':
        return write(model, canvas, how.filters(), ends, generator=generator, trace=trace)
    run = Sampling(model, canvas, fixed, how, ends, judge=remask_model, generator=generator, trace=trace)
    if how.rounds or how.redrafts:
        return (mend if how.rounds else until_believed)(run, denoise)
    loop = rewrite if how.rewrite else denoise
    return write_blocks(run, loop) if how.block_length else loop(run)


@torch.no_grad()
def denoise(run):
    """
    The one sampling loop: every step commits some masked positions and re-masks some visible ones.

    run: see parts.look.Sampling. Returns canvas (B, T) without masks, nfe (B,), the passes that each row took
    part in (a row that has finished leaves the batch), and with trace the list of all canvases, else None.
    """
    for look in run.looks():                                        # a pass over the rows not finished yet
        score = COMMIT[run.how.commit](look)                        # which masked positions come first
        again = taken_back(look, score)                             # which visible ones go back to [MASK]
        chosen = first_of(score, look.masked, how_many(look, again))

        ids, logp, _ = look.candidates or look.propose(chosen)
        x = torch.where(chosen, ids, look.x).masked_fill(again, run.mask)
        run.put(look, close_rows(x, look.masked, run.mask, run.ends), chosen, logp)
    return run.canvas, run.nfe, run.history


@torch.no_grad()
def rewrite(run):
    """
    denoise, but what it would re-mask is drawn anew in the same pass, seen as it stands.

    A network that was trained on noise reads out of a wrong token what it was before, and mends lengths too.
    """
    for look in run.looks():
        again = by_doubt(look, DOUBT[run.how.remask](look))
        chosen = again | first_of(look.noise, look.masked, how_many(look, torch.zeros_like(again)))

        ids, logp, _ = look.propose(chosen)
        x = torch.where(chosen, ids, look.x)
        run.put(look, close_rows(x, look.masked | look.visible, run.mask, run.ends), chosen, logp)
    return run.canvas, run.nfe, run.history


def how_many(look, again):
    """How many masked positions (R,) are committed if again (R, T) are re-masked; the last step: all."""
    count = look.masked.sum(1)
    if look.last:
        return count
    if look.how.commit == 'threshold':
        sure = look.candidates[1] >= math.log(look.how.commit_threshold)
        return (look.masked & sure).sum(1).clamp(min=1)
    return count + again.sum(1) - look.left


def taken_back(look, score):
    """Which visible positions (R, T) go back to [MASK]."""
    if look.how.remask == 'none' or look.last:
        return torch.zeros_like(look.masked)
    if look.how.remask in OTHER_RULES:
        return OTHER_RULES[look.how.remask](look, score)
    return by_doubt(look, spare_lengths(look, DOUBT[look.how.remask](look)))


def rate(look):
    """remask_rate, or what is usual for the rule."""
    return RATES.get(look.how.remask, 1.0) if look.how.remask_rate is None else look.how.remask_rate


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
    first = torch.isin(look.candidates[0], torch.tensor(look.how.priority, device=look.x.device))
    return ((look.noise + first) / 2).log()


COMMIT = dict(random=lambda look: look.noise.log(), threshold=lambda look: look.candidates[1],
              left=lambda look: (-look.masked.cumsum(1) / (look.x.size(1) + 1)).log1p(),    # below 0, for p2
              confidence=confidence, margin=margin, entropy=entropy, priority=priority, abstain=abstain)
BLIND = ('random', 'left', 'abstain')    # these do not look at candidates, so only what is committed is drawn


# -----------------------------------------------------------------------------
# how much each visible token is doubted, (R, T) in 0..1


def wrong(look):
    """p(WRONG), by this pass, or by the judge in the completed canvas."""
    model, x, hidden = look.run.model, look.x, look.hidden
    if look.judge:
        model, x = look.judge, look.completed()
        hidden = model(x)
        look.passes += 1
    at = places(look.visible)                                        # (N,)
    p = p_wrong(model, hidden.flatten(0, 1)[at], x.flatten()[at])    # (N,)
    return spread(look.visible, p).to(look.noise.dtype)


def unsure(look):
    """One minus the probability that a token was committed with (ReMDM-conf)."""
    return 1 - look.run.committed_logp[look.run.rows].exp()


DOUBT = dict(random=lambda look: torch.ones_like(look.noise), wrong=wrong, critic=critic, surprise=surprise,
             confidence=unsure)


def spare_lengths(look, doubt):
    """
    The doubt (R, T), but for an end token and the padding behind it the mean doubt of the row's text.

    By themselves these two are hardly ever doubted. Re-masking the text alone takes away what speaks for a
    long text and leaves what speaks for a short one, and the samples shrink.
    """
    ends = look.run.ends
    if ends.end is None:
        return doubt
    closing = look.visible & ((look.x == ends.end) | (look.x == ends.pad))
    inside = look.visible & ~closing
    mean = (doubt * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp(min=1)     # (R, 1)
    return torch.where(closing, mean, doubt)


def by_doubt(look, doubt):
    """
    Which visible positions (R, T) are re-masked by their doubt (R, T): each with probability rate * doubt.

    With remask_threshold those whose doubt exceeds it, each once; with remask_schedule a share, the most
    doubted first. With remask_patience doubt ^ (visible share ^ -patience) counts: while little is visible
    nearly all is doubted, and what is re-masked together is drawn again together: noise, doubted again.
    """
    how, run = look.how, look.run
    at_random = 1.0 if how.remask == 'random' else how.remask_random_ratio
    if how.remask_schedule is not None:
        start, end = how.remask_schedule
        share = start + (end - start) * look.step / max(1, run.steps - 2)
        count = (share * look.visible.sum(1)).round().long()         # (R,)
        some = random_subset(look.visible, (at_random * count).round().long(), run.generator)
        return some | first_of(doubt, look.visible & ~some, count - some.sum(1))

    where = look.visible
    if how.remask_threshold is not None:
        where = where & ~run.tried[run.rows]
        chance = (doubt > how.remask_threshold).to(doubt.dtype)
    elif how.remask_patience:
        shown = (~look.masked).sum(1, keepdim=True) / look.x.size(1)     # (R, 1)
        chance = rate(look) * doubt ** shown ** -how.remask_patience
    else:
        chance = rate(look) * doubt
    noise = torch.rand(where.shape, generator=run.generator, device=where.device)
    again = where & (noise < (1 - at_random) * chance + at_random * rate(look))
    run.tried[run.rows] |= again
    return again


def remdm(look, score):
    """
    Any token, with a probability that keeps the forward marginals (ReMDM, remask_rate is its eta).

    room is the largest probability for which the masks after the step can still be as many as without it.
    """
    room = look.left / look.visible.sum(1).clamp(min=1)              # (R,)
    eta = rate(look)
    chance = eta * room.clamp(max=1) if look.how.remdm == 'rescale' else room.clamp(max=eta)
    noise = torch.rand(look.x.shape, generator=look.run.generator, device=look.x.device)
    again = look.visible & (noise < chance[:, None])
    return random_subset(again, look.left, look.run.generator)       # by chance more than may be masked


def p2(look, score):
    """The visible tokens, scored rate * log(1 - p(WRONG)), compete with the candidates for staying (P2)."""
    stay = rate(look) * (-spare_lengths(look, wrong(look))).log1p().clamp(min=-1e3)
    among = look.masked | look.visible
    keep = first_of(torch.where(look.visible, stay, score.clamp(max=-1e-9)), among, among.sum(1) - look.left)
    return look.visible & ~keep


# rules that are more than a doubt: functions of a Look and the commit scores -> what is re-masked (R, T)
OTHER_RULES = dict(remdm=remdm, p2=p2)


# -----------------------------------------------------------------------------
# batches of canvases


@torch.no_grad()
def fill(model, meta, canvas, fixed, *, ar_prefix=0, best_of=None, batch_size=256, seed=1337, progress=False,
         trace=False, **rules):
    """
    Runs a sampler on canvas, fixed (B, T) in batches, longer rows in windows, see parts/long.py.

    meta: the dataset's, from a checkpoint; ar_prefix, best_of: see How; rules: what generate_diffusion takes.
    Returns a list of B dicts: text, tokens (ids from the first position to the end), nfe (all passes spent on
    the sample), finished; with trace also trace (S, T), the row's canvases, in which what is only drafted is
    ~id. trace: True, or a list with a method begin that is told as it happens: parts.handle.Live, rows.Tally.
    progress: a bar, if there are several batches or windows.
    """
    device = next(model.parameters()).device
    rules = {'remask_patience': float(meta['eos'] is None), **rules}    # by measurement, see docs/log.md
    rules.update(ends=Ends.of(meta), generator=torch.Generator(device).manual_seed(seed))
    if rules.get('commit') == 'priority' and isinstance(rules.get('priority', '()=+*'), str):
        rules['priority'] = encode(meta, rules.get('priority', '()=+*'))
    canvas = canvas.repeat(best_of or 1, 1)
    fixed = fixed.repeat(best_of or 1, 1)
    num = len(canvas)
    samples = []
    quiet = not progress or num <= batch_size

    if best_of and canvas.size(1) > model.config.block_size:
        raise UserError(f'best_of judges whole texts, of at most block_size={model.config.block_size} tokens')
    windows = edits_in_windows if rules.get('rounds') else in_windows

    def written(x, fixed, steps):
        x, prefix_nfe = write_prefix(model, x, fixed, ar_prefix, trace=steps, **rules)
        x, nfe, _ = generate_diffusion(model, x, fixed, trace=steps, **rules)
        return x, nfe + prefix_nfe

    for first in tqdm(range(0, num, batch_size), disable=quiet, desc='sampling', leave=False):
        x = canvas[first:first + batch_size].to(device)
        kept = fixed[first:first + batch_size].to(device)
        steps = [] if trace is True else None
        if hasattr(trace, 'begin'):
            steps = trace.begin(kept)
        x, nfe = windows(written, x, kept, model.config.block_size, steps, progress)
        if best_of:
            nfe = nfe + model.config.energy_head
            energies = energy(model, *text_of(x, rules['ends'])).tolist()
        for row, (ids, passes) in enumerate(zip(x, nfe.tolist())):
            text, finished = decode(meta, ids := ids.tolist())
            samples.append(dict(text=text, tokens=until_end(meta, ids), nfe=passes, finished=finished))
            if steps is not None and not isinstance(steps, Tally):
                samples[-1]['trace'] = torch.stack([step[row] for step in steps])
            if best_of:
                samples[-1]['energy'] = energies[row]
    return best_samples(samples, canvas.tolist(), num // best_of) if best_of else samples


def generate(model, meta, num, *, prompt=(), lengths=None, **how):
    """Draws num samples from an empty canvas, see start_canvas and fill, whose keywords it takes."""
    return fill(model, meta, *start_canvas(model, meta, num, prompt, lengths), **how)


# -----------------------------------------------------------------------------
# from Python, and as a command


def load(path='ckpt', **how):
    """A checkpoint to sample from, see parts.handle.Handle: load('out-text').generate(3, prompt='ROMEO:')."""
    return Handle.load(fill, [*vars(How())], path, **how)


def main():
    s = configurator.namespace(globals())
    check_sampling(s, how, COMMIT, [*DOUBT, *OTHER_RULES])
    m = open_checkpoints(s, load)
    s.said = SAID
    if s.export:
        return export_safetensors(s.export, m.model, m.checkpoint)
    t0 = time.perf_counter()
    samples = ask(s, m, vars(how), Live)
    show_samples(s, m, samples, time.perf_counter() - t0)


if __name__ == '__main__':
    configurator.run(globals())
