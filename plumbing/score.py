"""
What a checkpoint thinks of whole texts.
"""

import torch

from plumbing.evaluate import causal_nll, nelbo, p_wrong
from plumbing.text import modelled, rows_of, task_canvas, until_end


def given_sample(model, meta, text):
    """A text as a sample to judge: a dict as sample.fill makes them."""
    canvas, _ = task_canvas('score', model, meta, text)
    tokens = until_end(meta, canvas[0].tolist())
    return dict(text=text, tokens=tokens, nfe=0, finished=meta['eos'] is not None)


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


def judge_samples(model, meta, can, samples, width):
    """
    Adds to every sample what judge_rows says of it, on a canvas of that width, or as long as it is where
    nothing is padded.
    """
    for sample in samples:
        row = rows_of([sample], meta, len(sample['tokens']) if meta['pad'] is None else width)
        judged, = judge_rows(model, meta, row, can)
        sample.update(judged)
        if 'p_wrong' in judged:
            sample['p_wrong'] = judged['p_wrong'][:len(sample['tokens'])]
