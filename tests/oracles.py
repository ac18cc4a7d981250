"""
Networks that know a law exactly, and what measures samples against it.

With an oracle in place of the network, whatever the samples lack is the sampler's own fault.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from conftest import all_sequences, chi_square, seeded, tiny_gpt

from sample import generate_diffusion

# -----------------------------------------------------------------------------
# laws


def random_law(V, T, seed, spread=1.5):
    """A law over all sequences of T tokens out of V in which everything depends on everything: (V^T,)."""
    return (spread * torch.randn(V ** T, generator=seeded(seed), dtype=torch.float64)).softmax(0)


def product_law(marginals):
    """The law of independent tokens: marginals (T, V) -> (V^T,)."""
    x = all_sequences(marginals.size(1), marginals.size(0))
    return marginals[torch.arange(marginals.size(0)), x].prod(1)


def marginals_of(law, V, T):
    """The law of each token by itself: law (V^T,) -> (T, V)."""
    x = all_sequences(V, T)
    return torch.stack([(law[:, None] * F.one_hot(x[:, i], V)).sum(0) for i in range(T)])


def given_prompt(law, V, T, prompt):
    """The law (V^T,) of the sequences that begin with the prompt, a list of tokens."""
    fits = (all_sequences(V, T)[:, :len(prompt)] == torch.tensor(prompt, dtype=torch.long)).all(1)
    return law * fits / (law * fits).sum()


def filtered_law(law, V, T, temperature=1.0, top_k=None):
    """The law of left-to-right sampling with every conditional of the law sharpened and cut, written out."""
    x = all_sequences(V, T)
    total = torch.ones(V ** T, dtype=torch.float64)
    table = law.view([V] * T)
    for i in range(T):
        p = table.sum(tuple(range(i + 1, T))) if i < T - 1 else table     # (V, ..., V), the last axis is x_i
        p = (p / p.sum(-1, keepdim=True)) ** (1 / temperature)
        if top_k:
            p = p * (p >= p.sort(-1, descending=True).values[..., top_k - 1:top_k])
        total *= (p / p.sum(-1, keepdim=True))[tuple(x[:, :i + 1].T)]
    return total


def text_of_row(x, end):
    """What comes before the first end token of a row, a list of ids, or all of it, as a tuple."""
    return tuple(x[:x.index(end) + 1] if end in x else x)


def text_law(law, V, T, end):
    """The law of the texts: {tuple: probability}."""
    texts = {}
    for x, p in zip(all_sequences(V, T).tolist(), law.tolist()):
        text = text_of_row(x, end)
        texts[text] = texts.get(text, 0) + p
    return texts

# -----------------------------------------------------------------------------
# samples against a law


def follows(canvas, V, law):
    """Whether samples (B, T) follow a law (V^T,), by a chi-square test."""
    statistic, bound = distance(canvas, V, law, len(canvas))
    return statistic < bound


def misses(canvas, V, law):
    """Whether samples (B, T) are clearly not from this law (V^T,)."""
    statistic, bound = distance(canvas, V, law, len(canvas))
    return statistic > 10 * bound


def distance(canvas, V, law, B):
    """(chi-square statistic, bound) of samples (B, T) against a law."""
    assert canvas.min() >= 0 and canvas.max() < V
    number = (canvas * V ** torch.arange(canvas.size(1) - 1, -1, -1)).sum(1)
    return chi_square(number.bincount(minlength=V ** canvas.size(1)), B * law)


def texts_follow(canvas, law, V, T, end):
    """Whether the texts of samples (B, T) follow those of a law (V^T,)."""
    expected = text_law(law, V, T, end)
    counts = dict.fromkeys(expected, 0)
    for x in canvas.tolist():
        counts[text_of_row(x, end)] += 1
    statistic, bound = chi_square(list(counts.values()), [len(canvas) * p for p in expected.values()])
    return statistic < bound


def within_noise(shares, expected, B=4000):
    """Whether shares of B tries are as expected, give or take 4.5 standard errors."""
    expected = torch.as_tensor(expected).double()
    sigma = (expected * (1 - expected) / B).sqrt()
    return ((shares - expected).abs() <= 4.5 * sigma).all()

# -----------------------------------------------------------------------------
# networks


class Oracle:
    """
    Has the interface of model.GPT; its hidden states are the logits that belong to the exact conditionals.

    law (V^T,): of the bidirectional pass, p(x_i | all visible tokens). causal_law: of the causal pass,
    p(x_i | x_<i), the same law by default. wrong (T,): what it answers for p(WRONG) at each position.
    """

    most_logits, wte = 3000, torch.nn.Embedding(1, 1)               # of three thousand positions at a time

    def __init__(self, V, T, law, causal_law=None, wrong=None):
        self.V, self.T, self.x = V, T, all_sequences(V, T)
        self.laws = {False: law, True: law if causal_law is None else causal_law}
        self.config = SimpleNamespace(block_size=T, vocab_size=V, n_embd=V + 2, energy_head=2, parts='graph')
        self.mask_token_id, self.wrong_token_id = V, V + 1
        wrong = torch.zeros(T) if wrong is None else torch.as_tensor(wrong)
        self.odds = (wrong / (1 - wrong)).double().log()
        self.seen = []
        self.parts = {}
        self.drafter = None

    def parameters(self):
        yield torch.zeros(1)

    def __call__(self, idx, causal=False, cache=None):
        self.seen.append((idx.clone(), causal))
        T = idx.size(1)
        assert T <= self.T and cache is None
        agree = (idx[:, None] == self.x[:, :T]) | (idx[:, None] == self.mask_token_id)   # (B, V^T, T)
        joint = self.laws[causal] * (1 if causal else agree.all(2))                  # (V^T,) or (B, V^T)
        p = torch.empty(*idx.shape, self.V, dtype=torch.float64)
        for i in range(T):
            p[:, i] = joint @ F.one_hot(self.x[:, i], self.V).double()
            joint = joint * agree[..., i] if causal else joint                       # what of the law is left
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
        specials = torch.stack((torch.full((T,), -30.0).double(), self.odds[:T]), 1).expand(len(idx), -1, -1)
        return torch.cat(((p + 1e-300).log(), specials), -1)

    def logits(self, hidden, real_only=False):
        out = hidden.clone()
        if real_only:
            out[..., self.V:] = float('-inf')
        return out


class Independent(Oracle):
    """
    An oracle of independent tokens, for canvases too long to enumerate: table (T, V) their marginals.

    wrong: its answer for p(WRONG), by position (T,), or by position and token (T, V). A visible token is
    certain otherwise.
    """

    def __init__(self, table, wrong=None):
        table = torch.as_tensor(table, dtype=torch.float64)
        super().__init__(1, 1, torch.ones(1, dtype=torch.float64))
        (self.T, self.V), self.table = table.shape, table
        self.config.block_size, self.config.vocab_size = self.T, self.V
        self.mask_token_id, self.wrong_token_id = self.V, self.V + 1
        wrong = torch.as_tensor(0.0 if wrong is None else wrong, dtype=torch.float64)
        by_token = wrong if wrong.ndim == 2 else wrong.expand(self.T)[:, None]
        self.wrong = by_token.expand(self.T, self.V)

    def __call__(self, idx, causal=False, cache=None):
        self.seen.append((idx.clone(), causal))
        hole = (idx == self.V)[..., None]
        certain = F.one_hot(idx, self.V + 1)[..., :self.V].double()
        p = torch.where(hole, self.table[:idx.size(1)].expand(*idx.shape, -1), certain)
        wrong = self.wrong[:idx.size(1)].expand(*idx.shape, -1)
        wrong = wrong.gather(2, idx.clamp(max=self.V - 1)[..., None]) * ~hole
        mask = torch.full_like(wrong, -700.0)
        return torch.cat(((p + 1e-300).log(), mask, (wrong / (1 - wrong)).log()), -1)


def uniform(T, V=2, wrong=None):
    """An oracle for which every token of every position is as likely as another."""
    return Independent(torch.full((T, V), 1 / V), wrong)


def stubborn_gpt(V=5, T=8):
    """A random network that wants to write [MASK] and [WRONG] wherever it may."""
    model = tiny_gpt(V, T, n_recur=1)
    with torch.no_grad():
        model.wte.weight[V] *= 30
        model.wte.weight[V + 1] = -model.wte.weight[V]              # so that one of them always wins
    logits = model.logits(model(torch.randint(V + 1, (50, T), generator=seeded())).reshape(-1, 16))
    assert (logits.argmax(1) >= V).float().mean() > 0.9
    return model

# -----------------------------------------------------------------------------
# canvases, and what happened on them


def empty(oracle, B, prompt=()):
    """B canvases that hold nothing but a prompt, which is fixed: (canvas, fixed)."""
    canvas = torch.full((B, oracle.T), oracle.mask_token_id)
    canvas[:, :len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    return canvas, canvas != oracle.mask_token_id


def visible_canvas(model, B):
    """A complete canvas of tokens 0 that nobody trusts."""
    canvas = torch.zeros(B, model.T, dtype=torch.long)
    return canvas, torch.zeros_like(canvas, dtype=torch.bool)


def starting_canvas(V, T, causal, B=8, seed=0):
    """(canvas, fixed): fixed tokens, visible ones that are not fixed, masks; causal: a prefix only."""
    generator = seeded(seed)
    canvas = torch.randint(V, (B, T), generator=generator)
    width = torch.arange(B)[:, None] % T
    given = torch.arange(T) < width if causal else torch.rand(B, T, generator=generator) < 0.3
    trusted = given if causal else given & (torch.rand(B, T, generator=generator) < 0.7)
    return canvas.masked_fill(~given, V), trusted


def traced(model, canvas, fixed=None, seed=0, **rules):
    """(canvas, nfe, the canvases from the first to the last (S, B, T))."""
    fixed = canvas != model.mask_token_id if fixed is None else fixed
    out, nfe, trace = generate_diffusion(model, canvas, fixed, trace=True, generator=seeded(seed), **rules)
    return out, nfe, torch.stack(trace)


def remasked(trace, mask):
    """Which positions go back to [MASK] in each step: trace (S, B, T) -> bool (S - 1, B, T)."""
    trace = settled(trace, mask)
    return (trace[:-1] != mask) & (trace[1:] == mask)


def settled(trace, mask):
    """A trace with masks for what was only drafted."""
    return trace.masked_fill(trace < 0, mask)


def committed(trace, mask):
    """Which positions are written in each step: trace (S, B, T) -> bool (S - 1, B, T)."""
    return (trace[:-1] == mask) & (trace[1:] != mask)


def remasked_share(oracle, B=4000, judge=None, fixed=None, **rules):
    """A complete, untrusted canvas, one step: the share of rows in which each position is re-masked (T,)."""
    canvas = torch.zeros(B, oracle.T, dtype=torch.long)
    fixed = torch.zeros_like(canvas).bool() if fixed is None else fixed
    out, _, trace = traced(oracle, canvas, fixed, steps=2, remask_model=judge, **rules)
    assert (out < oracle.V).all() and torch.equal(trace[0], canvas)
    return (trace[1] == oracle.mask_token_id).double().mean(0)
