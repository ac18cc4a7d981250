"""
Training runs side by side: runs that differ in their seed only share a row, ± the standard error over these seeds.

A row is named by what it sets differently from the first run; merged ones by both.
"""

import glob
import statistics

from tqdm import tqdm

from plumbing.checkpoint import load_checkpoint
from configurator import UserError
from data.loader import data_of, spread_rows
from plumbing.device import configure_compute
from corruption import own_errors
from plumbing.evaluate import evaluate
from rules import supports
from sample import generate
from suites.common import SHARES, asked_for, cell, load, markdown, training_strings
from suites.runs import known_settings

VALIDATION = ('nelbo', 'causal_nll', 'auc', 'fixed', 'refilled')
GENERATED = ('valid', 'correct', 'length_tv', 'unique', 'nfe')
# settings that say nothing about what was learned
IGNORED = ('seed', 'out_dir', 'eval_interval', 'eval_rows', 'eval_samples', 'eval_only', 'log_interval', 'keep_every',
           'wandb_log', 'wandb_project', 'wandb_run_name', 'sample_prompt', 'overwrite', 'max_bad_steps',
           'device', 'dtype', 'attention', 'compile', 'fsdp', 'stage')   # what a stage turns on has settings of its own


def recipe(checkpoint):
    """What of a checkpoint's settings decides about what it is; of a path only that there is one."""
    known = {name: setting.default for name, setting in known_settings('train.py').items()}
    config = {**known, 'energy_head': 0, **checkpoint['config']}               # what an older or a simpler one lacks is off
    if config['init_from'] == 'resume':                                        # of an older one; now it is what it went on with
        config['init_from'] = 'scratch'
    how = checkpoint.get('distilled')
    config['distilled'] = how and {name: value for name, value in how.items() if name not in (*IGNORED, 'init_from')}
    early = not how and checkpoint['iter_num'] < config['max_iters']           # numbered ones; runs that were stopped
    config['stopped_at'] = checkpoint['iter_num'] if early else None
    return {name: 'a checkpoint' if name in ('init_from', 'guess_from') and value not in (None, 'scratch') else value
            for name, value in config.items() if name not in IGNORED}


def changed(checkpoint, first):
    """What a checkpoint's recipe has that the recipe first has not, as text."""
    return ', '.join(f'{name}={value}' for name, value in recipe(checkpoint).items() if value != first.get(name)) or 'the first'


def checkpoint_scores(s, path, other=None):
    """(validation: dict of VALIDATION, what there is of it; {sampler: dict of GENERATED}) of one checkpoint."""
    model, checkpoint = load(s, path, other)
    meta, config = checkpoint['meta'], checkpoint['config']
    task, train = training_strings(s, meta)
    can_unmask, causal, detects = supports(config)
    writer = model
    if config.get('guess_from') and not can_unmask:
        writer, _ = load_checkpoint(config['guess_from'])
        configure_compute(writer, s.device, s.dtype, s.attention, s.compile)
    writes = can_unmask or writer is not model
    val = spread_rows(data_of(meta, config)[1]['val'], s.eval_rows, model.config.block_size)
    validation = evaluate(model, val, meta, causal=causal, bidirectional=can_unmask,
                          own_errors=own_errors if detects and can_unmask else None)
    rules = {'remask=none': dict(remask='none')} if writes else {}
    if writes and detects:
        rules['remask=wrong'] = dict(remask='wrong', remask_rate=s.remask_rate, remask_model=None if writer is model else model)
    if config.get('allow_abstain'):
        rules['commit=abstain'] = dict(commit='abstain')
    if causal and can_unmask:
        rules['remask=causal'] = dict(remask='causal')
    scores = {}
    for name, more in rules.items():
        if asked_for(s, name):
            # a judge of its own takes a pass as well
            passes = max(1, s.steps // 2) if more.get('remask_model') else s.steps
            samples = generate(writer, meta, s.num_samples, batch_size=s.batch_size, seed=s.seed, steps=passes, **more)
            score = task.score([sample['text'] for sample in samples], train)
            scores[name] = {**score, 'nfe': statistics.mean(sample['nfe'] for sample in samples)}
    return validation, scores


def run(s):
    """The suite with bench's settings s: (rows, table)."""
    paths, others = ([path for pattern in patterns.split(',') for path in sorted(glob.glob(pattern))]
                     for patterns in (s.init_from, s.merge_from or ''))
    if not paths:
        raise UserError(f"no checkpoint matches '{s.init_from}'")
    if s.merge_from and len(others) != len(paths):
        raise UserError(f"merge_from='{s.merge_from}' matches {len(others)} checkpoints, init_from {len(paths)}")
    groups, first = {}, None
    with tqdm(list(zip(paths, others or [None] * len(paths))), desc='checkpoints', leave=False) as bar:
        for path, other in bar:
            checkpoint = load_checkpoint(path)[1]
            first = first or recipe(checkpoint)
            name = changed(checkpoint, first) + (f' + {changed(load_checkpoint(other)[1], first)}' if other else '')
            groups.setdefault(name, []).append(checkpoint_scores(s, path, other))
    if s.only and not any(scores for runs in groups.values() for _, scores in runs):
        raise UserError(f"no sampler's name contains '{s.only}'")
    rows = []
    for name, runs in groups.items():
        rows.append(dict(name=name, sampler='', seeds=len(runs), **mean_and_error([run[0] for run in runs], VALIDATION)))
        for sampler in runs[0][1]:
            rows.append(dict(name=name, sampler=sampler, seeds=len(runs),
                             **mean_and_error([run[1][sampler] for run in runs], GENERATED)))
    print(f'{s.num_samples} samples a seed and sampler, ± standard error over training seeds\n')
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
