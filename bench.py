"""
Everything that is measured.

    python bench.py --suite=arithmetic --init_from=ckpt                 the generation table of one checkpoint
    python bench.py --suite=arithmetic --num_samples=200 --num_seeds=1  the same, quickly
    python bench.py --suite=arithmetic --json=table.json                and as JSON
    python bench.py --suite=checkpoints --init_from='out/*/ckpt_*.pt'   training runs compared, seeds of one config together
"""

import glob
import json as jsonlib
import math
import random
import statistics
import sys
import time

import torch
from tqdm import tqdm

import configurator
from canvas import decode, load_task
from configurator import UserError
from data.loader import load_data, spread_rows
from model import configure_compute, load_checkpoint
from sample import check_folder, find_checkpoint, generate, load_merged, supports, write_atomically
from train import evaluate

# -----------------------------------------------------------------------------
suite = 'arithmetic'     # what to measure: arithmetic (samplers of one checkpoint) | checkpoints (training runs)
init_from = 'ckpt'       # 'ckpt': the newest checkpoint under out_dir; or a path; checkpoints: paths or patterns, a comma between
merge_from: str = None   # another checkpoint, merged with the first (see sample.py); checkpoints: as many as init_from
merge_weight = 0.5       # its share
out_dir = 'out'          # where 'ckpt' looks
num_samples = 1000       # samples a row and seed
num_seeds = 3            # arithmetic: seeds a row
steps = 64               # passes that the diffusion samplers get
remask_rate = 0.3        # checkpoints: of remask=wrong
eval_rows = 1000         # checkpoints: rows of the validation split
only: str = None         # measure only the rows whose name contains this text
seed = 1337              # the first seed
batch_size = 125         # samples drawn at a time
json: str = None         # also write the table to this file
device = 'auto'          # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'           # auto | float32 | bfloat16
attention = 'auto'       # auto | plain | sdpa
compile = False          # torch.compile the network
# -----------------------------------------------------------------------------

METRICS = ('balanced', 'valid', 'correct', 'unique', 'novel', 'mean_length', 'length_tv', 'nfe')
SHARES = ('balanced', 'valid', 'correct', 'unique', 'novel', 'fixed', 'refilled')


def sampler_rows(config, steps, block_size):
    """The samplers that a checkpoint of this config supports: (name, protocol, keywords of sample.generate)."""
    can_unmask, causal, detects = supports(config)
    rows = []
    if causal:
        rows.append(('AR: causal pass, one token a pass', 'free', dict(ar_prefix=block_size)))
    if causal and can_unmask:
        rows += [('remask=causal: bidirectional draft, causal verdict', 'free', dict(remask='causal')),
                 ('hybrid: AR prefix of 16, then ancestral', 'free', dict(ar_prefix=16, steps=max(1, steps // 2)))]
    if can_unmask:
        rows += [('commit=left_to_right, remask=none', 'free', dict(steps=steps, commit='left_to_right')),
                 ('commit=confidence, remask=none', 'free', dict(steps=steps, commit='confidence'))]
    for protocol in ('free', 'given') if can_unmask else ():
        rows += [('ancestral: commit=random, remask=none', protocol, dict(steps=steps)),
                 ('commit=random, remask=random, rate 0.1', protocol, dict(steps=steps, remask='random', remask_rate=0.1))]
        if detects:
            rows += [(f'commit=random, remask=wrong, rate {rate}', protocol, dict(steps=steps, remask='wrong', remask_rate=rate))
                     for rate in (0.3, 1.0)]
    return rows


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


def load(path, other=None):
    """The model of a checkpoint, ready to compute, and the checkpoint; merged with the other if there is one."""
    model, checkpoint = load_merged(path, other, merge_weight) if other else load_checkpoint(path)
    model, choices = configure_compute(model, device, dtype, attention, compile)
    tqdm.write(f"{path}: {checkpoint['config']['training_type']} on {checkpoint['meta']['name']}, iteration "
               f"{checkpoint['iter_num']}, {model.num_params():,} parameters; {choices}")
    return model, checkpoint


def arithmetic():
    """
    The generation table: every sampler on the same checkpoint, num_seeds x num_samples each, at temperature 1.

    'free': the length is the model's own decision; 'given': the true length of a fresh draw is fixed in advance.
    The first row scores fresh draws of the grammar: what a perfect model would get at this n. Returns (rows, table).
    """
    model, checkpoint = load(find_checkpoint(init_from, out_dir), merge_from)
    meta, config = checkpoint['meta'], checkpoint['config']
    task, train = training_strings(meta)
    draws = [[task.draw(rng)[0] for _ in range(num_samples)]
             for rng in (random.Random(f'bench {seed + s}') for s in range(num_seeds))]
    rows = [summary('the grammar itself', 'free', [{**task.score(texts, train), 'nfe': 0} for texts in draws], num_samples)]
    todo = [row for row in sampler_rows(config, steps, model.config.block_size) if not only or only in row[0]]
    if not todo:
        raise UserError(f"no row's name contains '{only}'" if only else 'this checkpoint cannot write')
    with tqdm(total=len(todo) * num_seeds, desc='rows x seeds', leave=False) as bar:
        for name, protocol, rules in todo:
            scores, t0 = [], time.time()
            for s in range(num_seeds):
                lengths = torch.tensor([len(text) for text in draws[s]]) if protocol == 'given' else None
                samples = generate(model, meta, num_samples, lengths=lengths, batch_size=batch_size, seed=seed + s, **rules)
                score = task.score([sample['text'] for sample in samples], train)
                scores.append({**score, 'nfe': statistics.mean(sample['nfe'] for sample in samples)})
                bar.update()
            rows.append(summary(name, protocol, scores, num_samples, time.time() - t0))
            bar.write(f'{name}, {protocol}: ' + ', '.join(f'{metric} {cell(rows[-1], metric)}' for metric in METRICS))
    print(f'{num_seeds} seeds x {num_samples} samples, ± standard error')
    return rows, markdown(['sampler', 'start', *[f'{m} %' if m in SHARES else m for m in METRICS]],
                          [[row['name'], row['protocol'], *[cell(row, m) for m in METRICS]] for row in rows])


def training_strings(meta):
    """The task of the dataset and the set of its training strings. Raises UserError if it is not arithmetic."""
    if meta['name'] != 'arithmetic':
        raise UserError(f"the suite {suite} needs checkpoints trained on arithmetic, this one saw {meta['name']}")
    return load_task(meta['name']), {decode(meta, ids)[0] for ids in load_data('arithmetic')[1]['train'].tolist()}


# -----------------------------------------------------------------------------
# training runs


VALIDATION = ('nelbo', 'causal_nll', 'auc', 'fixed', 'refilled')
GENERATED = ('valid', 'correct', 'length_tv', 'unique', 'nfe')
# settings that say nothing about what was learned
IGNORED = ('seed', 'out_dir', 'eval_interval', 'eval_rows', 'eval_samples', 'eval_only', 'log_interval', 'keep_every', 'wandb_log',
           'wandb_project', 'wandb_run_name', 'device', 'dtype', 'attention', 'compile')


def recipe(config):
    """What of a run's settings decides about the result; of a path only that there is one."""
    return {name: 'a checkpoint' if name in ('init_from', 'guess_from') and value not in (None, 'scratch', 'resume') else value
            for name, value in config.items() if name not in IGNORED}


def checkpoint_scores(path, other=None):
    """(validation: dict of VALIDATION, what there is of it; {sampler: dict of GENERATED}) of one checkpoint."""
    model, checkpoint = load(path, other)
    meta, config = checkpoint['meta'], checkpoint['config']
    task, train = training_strings(meta)
    can_unmask, causal, detects = supports(config)
    writer = model
    if config.get('guess_from') and not can_unmask:
        writer, _ = load_checkpoint(config['guess_from'])
        configure_compute(writer, device, dtype, attention, compile)
    writes = can_unmask or writer is not model
    val = spread_rows(load_data('arithmetic')[1]['val'], eval_rows, model.config.block_size)
    validation = evaluate(model, val, meta, causal=causal, bidirectional=can_unmask, detects=detects and writes, guesser=writer)
    rules = {'remask=none': dict(remask='none')} if writes else {}
    if writes and detects:
        rules['remask=wrong'] = dict(remask='wrong', remask_rate=remask_rate, remask_model=None if writer is model else model)
    if config.get('allow_abstain'):
        rules['commit=abstain'] = dict(commit='abstain')
    if causal and can_unmask:
        rules['remask=causal'] = dict(remask='causal')
    scores = {}
    for name, more in rules.items():
        if not only or only in name:
            # a judge of its own takes a pass as well
            passes = max(1, steps // 2) if more.get('remask_model') else steps
            samples = generate(writer, meta, num_samples, batch_size=batch_size, seed=seed, steps=passes, **more)
            score = task.score([sample['text'] for sample in samples], train)
            scores[name] = {**score, 'nfe': statistics.mean(sample['nfe'] for sample in samples)}
    return validation, scores


def checkpoints():
    """
    Training runs side by side: runs that differ in their seed only share a row, ± the standard error over these seeds.

    A row is named by what it sets differently from the first run. Returns (rows, table).
    """
    paths, others = ([path for pattern in patterns.split(',') for path in sorted(glob.glob(pattern))]
                     for patterns in (init_from, merge_from or ''))
    if not paths:
        raise UserError(f"no checkpoint matches '{init_from}'")
    if merge_from and len(others) != len(paths):
        raise UserError(f"merge_from='{merge_from}' matches {len(others)} checkpoints, init_from {len(paths)}")
    groups, first = {}, None
    with tqdm(list(zip(paths, others or [None] * len(paths))), desc='checkpoints', leave=False) as bar:
        for path, other in bar:
            config = recipe(load_checkpoint(path)[1]['config'])
            first = first or config
            changes = ', '.join(f'{name}={value}' for name, value in config.items() if value != first.get(name, value))
            groups.setdefault(changes or 'the first', []).append(checkpoint_scores(path, other))
    rows = []
    for name, runs in groups.items():
        rows.append(dict(name=name, sampler='', seeds=len(runs), **mean_and_error([run[0] for run in runs], VALIDATION)))
        for sampler in runs[0][1]:
            rows.append(dict(name=name, sampler=sampler, seeds=len(runs),
                             **mean_and_error([run[1][sampler] for run in runs], GENERATED)))
    print(f'{num_samples} samples a seed and sampler, ± standard error over training seeds\n')
    validation = [[row['name'], str(row['seeds']), *[cell(row, m) for m in VALIDATION]] for row in rows if not row['sampler']]
    generated = [[row['name'], row['sampler'], *[cell(row, m) for m in GENERATED]] for row in rows if row['sampler']]
    head = {m: f'{m} %' if m in SHARES else m for m in (*VALIDATION, *GENERATED)}
    table = markdown(['run', 'seeds', *[head[m] for m in VALIDATION]], validation)
    if generated:
        table += '\n\n' + markdown(['run', 'sampler', *[head[m] for m in GENERATED]], generated)
    return rows, table


def mean_and_error(scores, metrics):
    """The mean of every metric over the runs, and its standard error from their spread (one run: None)."""
    row = {}
    for metric in metrics:
        values = [score.get(metric) for score in scores]
        there = None not in values
        row[metric] = statistics.mean(values) if there else None
        row[f'{metric}_se'] = statistics.stdev(values) / len(values) ** 0.5 if there and len(values) > 1 else None
    return row


SUITES = {'arithmetic': arithmetic, 'checkpoints': checkpoints}


def main():
    if suite not in SUITES:
        raise UserError(f"suite expects one of {', '.join(SUITES)}; got '{suite}'")
    for name in ('num_samples', 'num_seeds', 'steps', 'batch_size', 'eval_rows'):
        if globals()[name] < 1:
            raise UserError(f'{name} must be at least 1, got {globals()[name]}')
    for name in ('merge_weight', 'remask_rate'):
        if not 0 <= globals()[name] <= 1:
            raise UserError(f'{name} must be in 0..1, got {globals()[name]}')
    check_folder(json)
    rows, table = SUITES[suite]()
    print(table)
    if json:
        command = 'python bench.py ' + ' '.join(sys.argv[1:])
        write_atomically(json, jsonlib.dumps(dict(command=command, rows=rows), indent=1) + '\n')
        print(f'written to {json}')


if __name__ == '__main__':
    configurator.run(globals())
