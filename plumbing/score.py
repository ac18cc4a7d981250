"""
What a checkpoint thinks of whole texts.
"""

import math

import torch

from configurator import UserError
from plumbing.evaluate import causal_nll, nelbo, p_wrong
from plumbing.text import decode, encode, modelled, rows_of, task_canvas, until_end


NAMES = dict(nelbo='NELBO', causal_nll='causal NLL')                # of what judge_rows says in nats a token


def given_sample(model, meta, text, tokens=None):
    """A text as a sample to judge: a dict as sample.fill makes them. tokens: those it was saved with."""
    if not spells(model, meta, tokens, text):
        if meta['eos'] is None and meta['bos'] is None:             # it may be longer than the network reads
            tokens = encode(meta, text)
        else:
            canvas, _ = task_canvas('score', model, meta, text)
            tokens = until_end(meta, canvas[0].tolist())
    if not tokens:
        raise UserError('the text is empty')
    return dict(text=text, tokens=tokens, nfe=0, finished=meta['eos'] in tokens)


def spells(model, meta, tokens, text):
    """Whether saved tokens are a row of this network for this text; they may be anything."""
    known = range(meta['vocab_size'])
    if not isinstance(tokens, list) or not all(type(i) is int and i in known for i in tokens):
        return False
    fits = meta['pad'] is None or len(tokens) <= model.config.block_size
    return fits and meta['bos'] in (None, *tokens[:1]) and decode(meta, tokens)[0] == text


@torch.no_grad()
def judge_rows(model, meta, canvas, can, estimates=32, seed=0):
    """
    What a checkpoint thinks of whole texts, canvas (B, T): a list of B dicts with what it was trained for.

    nelbo and causal_nll are in nats a token (padding is paid for and not counted), p_wrong is a list of T.
    nelbo is the mean of that many estimates, k stratified over them. can: the checkpoint's
    parts.presets.Abilities.
    """
    device = next(model.parameters()).device
    results = []
    for row in canvas.to(device).split(1):
        generator = torch.Generator(device).manual_seed(seed)                  # so that a text has one score
        free, real = modelled(row, meta)
        tokens = max(1, int(real.sum()))
        result = {}
        if can.writes:
            bound = nelbo(model, row.expand(estimates, -1), free.expand(estimates, -1), generator)
            result['nelbo'] = bound.mean().item() / tokens
        if can.causal:
            result['causal_nll'] = causal_nll(model, row, real).item() / tokens
        if can.detects:
            result['p_wrong'] = p_wrong(model, model(row), row)[0].tolist()
        results.append(result)
    return results


def judge_samples(model, meta, can, samples):
    """
    Adds to every sample what judge_rows says of it.

    Where nothing is padded, what is longer than the network reads is judged in windows, each by itself, whose
    number is added as well.
    """
    size = model.config.block_size
    for sample in samples:
        tokens = sample['tokens']
        if not tokens:                                              # --stop left nothing
            continue
        if meta['pad'] is None:
            rows = torch.tensor(tokens).split(size)
        else:
            rows = rows_of([sample], meta, size)
        parts = [judge_rows(model, meta, row[None], can)[0] for row in rows]
        sample.update(parts[0])
        if len(parts) > 1:
            sample['windows'] = len(parts)
            for key in NAMES.keys() & parts[0].keys():
                sample[key] = sum(part[key] * len(row) for part, row in zip(parts, rows)) / len(tokens)
        if 'p_wrong' in sample:
            sample['p_wrong'] = [p for part in parts for p in part['p_wrong']][:len(tokens)]


def total(samples, meta):
    """A line that says what judged samples are worth together, as means over all of their tokens."""
    given = (meta['bos'], meta['pad'])
    counts = [max(1, sum(i not in given for i in sample['tokens'])) for sample in samples]
    words = [f'{len(samples)} texts, {sum(counts):,} tokens']
    for key in NAMES:
        if key in samples[0]:
            nats = sum(n * sample[key] for n, sample in zip(counts, samples)) / sum(counts)
            words.append(f'{NAMES[key]} {nats:.3f} nats/token ({nats / math.log(2):.3f} bits)')
    return ', '.join(words)
