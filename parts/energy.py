"""
The energy of a text: a number that says how little it looks like the data, and what a sampler does with it.

The network is frozen; a small head on its passes learns to tell texts from the network's own samples
(tools/energy.py). exp(-energy) is, up to a factor, how much likelier a text is in the data than among those
samples (noise contrastive estimation; Xu et al. 2024), so weighing samples by it makes up for what the
sampler got wrong.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from model import Linear
from plumbing.draw import draw


class Critic(nn.Module):
    """The energy head: it reads the bidirectional pass of the network, with passes=2 the causal one too."""

    def __init__(self, C, passes, hidden=64):
        super().__init__()
        self.fc = Linear(passes * (C + 1), hidden)
        self.mid = Linear(hidden, hidden)
        self.proj = Linear(hidden, 1, zero=True)

    def forward(self, features):
        """features (..., passes * (C + 1)), see token_energy -> scores (...)."""
        h = F.gelu(self.mid(F.gelu(self.fc(features))))
        return self.proj(h)[..., 0]


def token_energy(model, ids, real):
    """
    How wrong is each token of whole texts? The logit of being wrong, float32 (B, T), -inf where no text is.

    ids (B, T) without masks; real (B, T) bool: which positions are text. Of each pass the critic is shown the
    hidden state and the log-probability of the token that stands there. The critic learns from it, the
    network does not. Raises UserError if the network has no energy head.
    """
    if model.critic is None:
        raise UserError('this network has no energy head: '
                        'give it one with python tools/energy.py --init_from=CHECKPOINT')
    features = []
    with torch.no_grad():
        for causal in (False, True)[:model.config.energy_head]:
            hidden = model(ids, causal=causal)[real].float()                   # (N, C)
            logp = model.logits(hidden, real_only=True).log_softmax(-1).gather(1, ids[real][:, None])
            features += [hidden, logp.clamp(-20, 0) / 5]  # the states have scale 1, so these get it too
    score = model.critic(torch.cat(features, -1))                              # (N,)
    return torch.full(ids.shape, float('-inf'), device=ids.device).masked_scatter(real, score)


def energy(model, ids, real):
    """
    The energy (B,) of whole texts, see token_energy: the logit of not being from the data.

    It is the log-sum-exp of the scores of the tokens, since one wrong token is enough.
    """
    return token_energy(model, ids, real).logsumexp(-1)


def text_of(x, ends):
    """
    Whole canvases x (R, T) as texts: (ids (R, T), padded behind the first end token; which of them are text).

    ends: see plumbing.rows.Ends. A start symbol at the first position is no text.
    """
    is_end = (x == (-1 if ends.end is None else ends.end)).long()
    behind = is_end.cumsum(1) > is_end
    starts = [i for i in ends.forbid if i not in (ends.end, ends.pad)]
    real = ~behind
    real[:, 0] &= ~torch.isin(x[:, 0], torch.tensor(starts, dtype=x.dtype, device=x.device))
    return x if ends.pad is None else x.masked_fill(behind, ends.pad), real


def choose_by_energy(energies, generator, greedy=False):
    """One of n texts for each row, with probability ~ exp(-energy): energies (R, n) -> (R,)."""
    return energies.argmin(1) if greedy else draw((-energies).softmax(-1), generator)


def guided(look):
    """What Look.propose returns, of how.guide whole completions of each row the one chosen by its energy."""
    run = look.run
    ids, logp, all_logp = zip(*[look.propose(look.masked) for _ in range(look.how.guide)])   # (R, T) each
    texts = [text_of(torch.where(look.masked, one, look.x), run.ends) for one in ids]
    energies = torch.stack([energy(run.model, *text) for text in texts], 1)                  # (R, guide)
    chosen = choose_by_energy(energies, run.generator, look.how.temperature == 0)            # (R,)
    rows = torch.arange(len(look.x), device=look.x.device)
    return torch.stack(ids)[chosen, rows], torch.stack(logp)[chosen, rows], all_logp[0]


def best_samples(samples, canvases, num):
    """
    Of several candidates for each of num canvases the one of the lowest energy, of the length drawn first.

    samples: dicts with an energy, the first num of them followed by as many candidates for the same canvases,
    again and again; canvases: their starting canvases, lists of ids. Each of the first num is replaced by the
    best candidate for an equal canvas and of its own length that is not taken yet. (More can be wrong in a
    long text, so candidates that compete over all lengths get shorter.)
    """
    kinds = [(tuple(canvas), len(sample['tokens'])) for sample, canvas in zip(samples, canvases)]
    candidates = {}
    for i in sorted(range(len(samples)), key=lambda i: -samples[i]['energy']):
        candidates.setdefault(kinds[i], []).append(samples[i])                 # the best last
    spent = [sum(sample['nfe'] for sample in samples[i::num]) for i in range(num)]
    return [dict(candidates[kind].pop(), nfe=passes) for kind, passes in zip(kinds, spent)]


def critic(look):
    """The doubt (R, T): the probability by which the head calls a token wrong in the completed canvas."""
    look.passes += look.run.model.config.energy_head
    scores = token_energy(look.run.model, *text_of(look.completed(), look.run.ends))
    return scores.sigmoid().to(look.noise.dtype)
