"""
What the suites share. s is always bench's settings, a SimpleNamespace.
"""

import functools
import math
import random
import statistics
import time

import torch
from tqdm import tqdm

from plumbing.text import decode, load_task
from plumbing.checkpoint import find_checkpoint, load_checkpoint, load_merged
from configurator import UserError
from data.loader import load_data
from plumbing.device import configure_compute
from sample import generate

METRICS = ('balanced', 'valid', 'correct', 'unique', 'novel', 'mean_length', 'length_tv', 'nfe')
SHARES = ('balanced', 'valid', 'correct', 'unique', 'novel', 'fixed', 'refilled', 'accuracy', 'by_string', 'exact', 'anchors')


def standard_error(values, name, n):
    """
    Of the mean of a metric over seeds with n samples each; None if it cannot be told from a single seed.

    A share of independent samples: binomial over all of them, which is surer than the spread of a few seeds. The others
    (unique and length_tv are properties of the n samples together): from the spread over the seeds.
    """
    if name in SHARES and name != 'unique':
        mean = statistics.mean(values)
        return (mean * (1 - mean) / (n * len(values))) ** 0.5
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def summary(name, protocol, scores, n, seconds=None):
    """One row of the table: every metric with its standard error, from the score of every seed."""
    row = dict(name=name, protocol=protocol, n=n, seeds=len(scores), seconds=seconds)
    for metric in METRICS:
        values = [score[metric] for score in scores]
        row[metric] = statistics.mean(values) if None not in values else None
        row[f'{metric}_se'] = standard_error(values, metric, n) if None not in values else None
    return row


def with_errors(row, n):
    """row, with the binomial standard error of its shares over n strings (draws of one string are not independent)."""
    errors = {f'{name}_se': (value * (1 - value) / n) ** 0.5 for name, value in row.items() if name in SHARES}
    return {**row, **errors, 'nfe_se': None}


def cell(row, metric):
    """A metric as text: shares in per cent, with the standard error where there is one."""
    value, error = row[metric], row[f'{metric}_se']
    if value is None:
        return '—'
    scale, digits = (100, 1) if metric in SHARES else (1, 1 if metric in ('nfe', 'mean_length') else 3)
    return f'{scale * value:.{digits}f}' + ('' if error is None or math.isnan(error) else f' ± {scale * error:.{digits}f}')


def markdown(head, lines):
    """A Markdown table that also reads well on screen."""
    lines = [head, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ['| ' + ' | '.join(value.ljust(width) for value, width in zip(line, widths)) + ' |' for line in lines]
    text.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    return '\n'.join(text)


def load(s, path, other=None, learns=False):
    """The model of a checkpoint, merged with the other if there is one and frozen unless it learns, and the checkpoint."""
    model, checkpoint = load_merged(path, other, s.merge_weight) if other else load_checkpoint(path)
    model, choices = configure_compute(model, s.device, s.dtype, s.attention, s.compile)
    tqdm.write(f"{path}: {checkpoint['config']['training_type']} on {checkpoint['meta']['name']}, iteration "
               f"{checkpoint['iter_num']}, {model.num_params():,} parameters; {choices}")
    return model if learns else model.freeze(), checkpoint


def checkpoint_of_arithmetic(s):
    """(model, meta, config, task module, set of training strings) of the one checkpoint that is measured."""
    model, checkpoint = load(s, find_checkpoint(s.init_from, s.out_dir), s.merge_from)
    meta, config = checkpoint['meta'], checkpoint['config']
    return model, meta, config, *training_strings(s, meta)


def training_strings(s, meta):
    """The task of the dataset and the set of its training strings. Raises UserError if it is not arithmetic."""
    if meta['name'] != 'arithmetic':
        raise UserError(f"the suite {s.suite} needs checkpoints trained on arithmetic, this one saw {meta['name']}")
    return load_task(meta['name']), training_texts(meta.get('dataset', meta['name']))


@functools.cache
def training_texts(dataset):
    """The training strings of a dataset, a set, which callers share and only read."""
    meta, data = load_data(dataset)
    return {decode(meta, ids)[0] for ids in data['train'].tolist()}


def measure(s, model, meta, task, train, name, rules, protocol='free', more=None):
    """One row: num_seeds x num_samples of a sampler, scored. more: columns to add."""
    def draw(number):
        lengths = None
        if protocol == 'given':
            lengths = torch.tensor([len(text) for text in fresh_draws(s, task, number)])
        return generate(model, meta, s.num_samples, lengths=lengths, batch_size=s.batch_size, seed=s.seed + number, **rules)
    return measure_draws(s, task, train, name, draw, protocol, more)


def measure_draws(s, task, train, name, draw, protocol='free', more=None):
    """measure for samples of any origin: draw(number) -> those of the seed of that number, a list of dicts text, nfe."""
    scores, t0 = [], time.time()
    for number in range(s.num_seeds):
        samples = draw(number)
        score = task.score([sample['text'] for sample in samples], train)
        scores.append({**score, 'nfe': statistics.mean(sample['nfe'] for sample in samples)})
    row = {**summary(name, protocol, scores, s.num_samples, time.time() - t0), **(more or {})}
    tqdm.write(f'{name}, {protocol}: ' + ', '.join(f'{metric} {cell(row, metric)}' for metric in METRICS))
    return row


def fresh_draws(s, task, number):
    """num_samples strings of the grammar, for the seed of that number."""
    rng = random.Random(f'bench {s.seed + number}')
    return [task.draw(rng)[0] for _ in range(s.num_samples)]


def asked_for(s, name):
    """Whether the setting only, parts with commas between, asks for a row of this name."""
    return any(part in name for part in (s.only or '').split(','))


def wanted(s, rows):
    """The rows whose name contains the setting only. Raises UserError if there are none."""
    found = [row for row in rows if asked_for(s, row[0])]
    if not found:
        raise UserError(f"no row's name contains '{s.only}'" if s.only else 'this checkpoint cannot write')
    return found
