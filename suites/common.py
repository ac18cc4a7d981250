"""
What the suites share. s is always bench's settings, a SimpleNamespace; strings are those of training_strings.
"""

import functools
import math
import random
import statistics
import time
from collections import Counter

import torch
from tqdm import tqdm

from plumbing.text import decode, drawn_by, load_task, scored
from model import GPT
from plumbing.checkpoint import find_checkpoint, load_merged
from configurator import UserError
from corruption import errors_of
from data.loader import data_of, load_data, spread_rows
from plumbing.device import configure_compute, freeze
from plumbing.evaluate import evaluate
from parts.presets import supports
from sample import generate

METRICS = ('balanced', 'valid', 'correct', 'unique', 'novel', 'mean_length', 'length_tv', 'nfe')
SHARES = ('balanced', 'valid', 'correct', 'unique', 'novel',
          'fixed', 'refilled', 'cells', 'accuracy', 'aligned', 'by_string', 'exact', 'anchors')
COST = ('minutes', 'tokens_per_second', 'parameters')    # of training, see training_cost in runs.py
# digits behind the point; 3 for all others
DIGITS = {**dict.fromkeys((*SHARES, 'nfe', 'mean_length', 'minutes'), 1), 'tokens_per_second': 0}


def standard_error(values, name, n=None):
    """
    The standard error of a metric's mean over seeds with n samples each; None if one seed cannot tell.

    A share of independent samples: binomial, surer than the spread of a few seeds. All else: from the spread.
    """
    if n and name in SHARES and name != 'unique':
        mean = statistics.mean(values)
        return (mean * (1 - mean) / (n * len(values))) ** 0.5
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def averaged(scores, metrics, n=None):
    """The mean of every metric over scores, dicts, and its standard error; None where a score lacks it."""
    row = {}
    for metric in metrics:
        values = [score.get(metric) for score in scores]
        known = None not in values
        row[metric] = statistics.mean(values) if known else None
        row[f'{metric}_se'] = standard_error(values, metric, n) if known else None
    return row


def with_errors(row, n):
    """row, with the binomial error of its shares over n strings (draws of one are not independent)."""
    errors = {f'{name}_se': (value * (1 - value) / n) ** 0.5 for name, value in row.items()
              if name in SHARES and value is not None}
    return {**row, **errors, 'nfe_se': None}


def cell(row, metric):
    """A metric as text: a count as it is, shares in per cent, with the standard error where there is one."""
    value, error = row[metric], row.get(f'{metric}_se')
    if value is None:
        return '—'
    if isinstance(value, int) and metric not in SHARES:
        return f'{value:,}'
    scale, digits = 100 if metric in SHARES else 1, DIGITS.get(metric, 3)
    known = error is not None and not math.isnan(error)
    return f'{scale * value:,.{digits}f}' + (f' ± {scale * error:.{digits}f}' if known else '')


def cells(row, metrics):
    """Several metrics in one cell."""
    return ' · '.join(cell(row, metric) for metric in metrics)


def headings(metrics):
    """What stands above the cells of metrics."""
    names = dict(minutes='minutes of training', tokens_per_second='tokens/s')
    return [f'{metric} %' if metric in SHARES else names.get(metric, metric) for metric in metrics]


def markdown(head, lines):
    """A Markdown table that also reads well on screen."""
    lines = [head, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ['| ' + ' | '.join(map(str.ljust, line, widths)) + ' |' for line in lines]
    text.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    return '\n'.join(text)


def table_of(rows, columns, metrics):
    """Markdown of rows, dicts: the columns {heading: key} as they stand there, then the metrics as cells."""
    lines = [[*[str(row[key]) for key in columns.values()], *[cell(row, metric) for metric in metrics]]
             for row in rows]
    return markdown([*columns, *headings(metrics)], lines)


def load(s, path, other=None, learns=False):
    """(model, checkpoint), merged with the other if there is one. The model is frozen unless it learns."""
    if other:
        other = find_checkpoint(other, s.out_dir)
        model, checkpoint = load_merged(GPT.load, supports, path, other, s.merge_weight)
    else:
        model, checkpoint = GPT.load(path)
    model, choices = configure_compute(model, s.device, s.dtype, s.attention, s.compile)
    tqdm.write(f"{path}: {checkpoint['config']['training_type']} on {checkpoint['meta']['name']}, iteration "
               f"{checkpoint['iter_num']}, {model.num_params():,} parameters; {choices}")
    return model if learns else freeze(model), checkpoint


def checkpoint_of_rows(s):
    """(model, checkpoint, strings) of the one checkpoint that is measured."""
    model, checkpoint = load(s, find_checkpoint(s.init_from, s.out_dir), s.merge_from)
    return model, checkpoint, training_strings(s, checkpoint['meta'])


def training_strings(s, meta):
    """(the dataset's task or None, the set of its training strings). Raises UserError if it has no rows."""
    if meta['eos'] is None and 'given' not in meta:
        raise UserError(f"the suite {s.suite} measures strings that end, {meta['name']} is a text that runs "
                        'on: take --suite=text')
    return load_task(meta['name']), training_texts(meta.get('dataset', meta['name']))


@functools.cache
def training_texts(dataset):
    """The training strings of a dataset, a set, which callers share and only read."""
    meta, data = load_data(dataset)
    return {decode(meta, ids)[0] for ids in data['train'].tolist()}


def worth(model, checkpoint, rows, detects=True, **how):
    """What a network is worth on clean rows (N, T): evaluate for the modes that it was trained for."""
    can = supports(checkpoint['config'])
    return evaluate(model, rows, checkpoint['meta'], causal=can.causal, bidirectional=can.writes,
                    own_errors=errors_of(checkpoint['config']) if detects else None, **how)


def held_out_rows(s, model, checkpoint):
    """num_samples held-out rows (N, T) of a checkpoint's dataset."""
    data = data_of(checkpoint['meta'], checkpoint['config'])[1]
    return spread_rows(data['val'], s.num_samples, model.config.block_size)


def mean_nfe(samples):
    """The mean number of passes of samples, dicts as fill returns them."""
    return statistics.fmean(sample['nfe'] for sample in samples)


def score(strings, samples):
    """
    What the task says of samples, dicts text, nfe, and their mean number of passes. What it does not say of
    METRICS is as for any strings; length_tv is then the distance from the lengths of the training strings.
    """
    (task, known), texts = strings, [sample['text'] for sample in samples]
    found = dict(unique=len(set(texts)) / len(texts), mean_length=statistics.fmean(map(len, texts)),
                 novel=sum(text not in known for text in texts) / len(texts))
    if known:
        mine, theirs = Counter(map(len, texts)), lengths_of(frozenset(known))
        apart = [abs(mine[n] / len(texts) - theirs[n] / len(known)) for n in sorted({*mine, *theirs})]
        found['length_tv'] = sum(apart) / 2
    return {**found, **scored(task, texts, known), 'nfe': mean_nfe(samples)}


@functools.lru_cache(maxsize=1)
def lengths_of(texts):
    """How many of the texts, a frozenset, are of each length."""
    return Counter(map(len, texts))


def measure(s, model, meta, strings, name, rules, protocol='free', **more):
    """One row: num_seeds x num_samples of a sampler, scored. more: columns to add."""
    def draw(number):
        lengths = None
        if protocol == 'given':
            lengths = torch.tensor([len(sample['text']) for sample in fresh_draws(s, strings, number)])
        return generate(model, meta, s.num_samples, lengths=lengths, batch_size=s.batch_size,
                        seed=s.seed + number, **rules)
    return measure_draws(s, strings, name, draw, protocol, **more)


def measure_draws(s, strings, name, draw, protocol='free', **more):
    """measure for samples of any origin: draw(number) -> dicts text, nfe for the seed of that number."""
    t0 = time.perf_counter()
    scores = [score(strings, draw(number)) for number in range(s.num_seeds)]
    seconds = time.perf_counter() - t0
    row = dict(name=name, protocol=protocol, n=s.num_samples, seeds=s.num_seeds, seconds=seconds,
               **averaged(scores, METRICS, s.num_samples), **more)
    told = ', '.join(f'{metric} {cell(row, metric)}' for metric in METRICS if row[metric] is not None)
    tqdm.write(f'{name}, {protocol}: {told}')
    return row


def draws_strings(strings):
    """Whether the task's draw makes fresh strings."""
    return drawn_by(strings[0], random.Random(0)) is not None


def grammar_itself(s, strings):
    """A row for fresh draws of the grammar: what a perfect network would get at this number of samples."""
    scores = [score(strings, fresh_draws(s, strings, number)) for number in range(s.num_seeds)]
    return dict(name='the grammar itself', protocol='free', n=s.num_samples, seeds=s.num_seeds, seconds=None,
                **averaged(scores, METRICS, s.num_samples))


def fresh_draws(s, strings, number):
    """num_samples strings of the grammar, for the seed of that number: dicts like samples."""
    rng = random.Random(f'bench {s.seed + number}')
    return [dict(text=drawn_by(strings[0], rng), nfe=0) for _ in range(s.num_samples)]


def asked_for(s, name):
    """Whether the setting only, parts with commas between, asks for a row of this name."""
    return any(part in name for part in (s.only or '').split(','))


def wanted(s, rows):
    """The rows whose name contains the setting only. Raises UserError if there are none."""
    found = [row for row in rows if asked_for(s, row[0])]
    if not found:
        raise UserError(f"no row's name contains '{s.only}'" if s.only else 'this checkpoint cannot write')
    return found
