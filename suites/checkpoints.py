"""
Training runs side by side. Those that differ in their seed only share a row, ± the standard error over seeds.

A row is named by what it sets differently from the first run; merged ones by both.
"""

import glob
import os

from tqdm import tqdm

from model import GPT
from configurator import UserError
from data.loader import data_of, spread_rows
from parts.presets import supports
from plumbing.checkpoint import find_checkpoint
from sample import generate
from suites.common import asked_for, averaged, load, score, table_of, training_strings, worth
from suites.runs import known_settings

VALIDATION = ('nelbo', 'causal_nll', 'auc', 'fixed', 'refilled')
GENERATED = ('valid', 'correct', 'length_tv', 'unique', 'nfe')
# settings that say nothing about what was learned
IGNORED = ('seed', 'out_dir', 'eval_interval', 'eval_rows', 'eval_samples', 'eval_only', 'log_interval',
           'keep_every', 'wandb_log', 'wandb_project', 'wandb_run_name', 'sample_prompt', 'overwrite',
           'max_bad_steps', 'device', 'dtype', 'attention', 'compile', 'fsdp')


def recipe(checkpoint):
    """What of a checkpoint's settings decides about what it is; of a path only that there is one."""
    # what an older or a simpler one lacks is off, what train.py no longer has is left out
    known = {name: setting.default for name, setting in known_settings('train.py').items()}
    config = {name: checkpoint['config'].get(name, default)
              for name, default in {**known, 'energy_head': 0}.items() if name not in IGNORED}
    # an older one may say resume, now it is what it went on with
    if config['init_from'] != 'scratch':
        config['init_from'] = 'scratch' if config['init_from'] == 'resume' else 'a checkpoint'
    how = checkpoint.get('distilled')
    config['distilled'] = how and {name: how[name] for name in how if name not in (*IGNORED, 'init_from')}
    # numbered ones, and runs that were stopped
    early = not how and checkpoint['iter_num'] < config['max_iters']
    config['stopped_at'] = checkpoint['iter_num'] if early else None
    return config


def changed(checkpoint, first):
    """What a checkpoint's recipe has that the recipe first has not, as text."""
    words = [f'{name}={value}' for name, value in recipe(checkpoint).items() if value != first.get(name)]
    return ', '.join(words) or 'the first'


def checkpoint_scores(s, path, other=None):
    """(validation: dict of what there is of VALIDATION; {sampler: dict of GENERATED}) of one checkpoint."""
    model, checkpoint = load(s, path, other)
    meta, config = checkpoint['meta'], checkpoint['config']
    strings = training_strings(s, meta)
    can_unmask, causal, detects = supports(config)
    val = spread_rows(data_of(meta, config)[1]['val'], s.eval_rows, model.config.block_size)
    validation = worth(model, checkpoint, val)

    samplers = {'remask=none': (can_unmask, dict(remask='none')),
                'remask=wrong': (can_unmask and detects, dict(remask='wrong', remask_rate=s.remask_rate)),
                'commit=abstain': (config.get('allow_abstain'), dict(commit='abstain')),
                'remask=causal': (can_unmask and causal, dict(remask='causal'))}
    scores = {}
    for name, (known, rules) in samplers.items():
        if known and asked_for(s, name):
            rules.update(steps=s.steps, batch_size=s.batch_size, seed=s.seed)
            scores[name] = score(strings, generate(model, meta, s.num_samples, **rules))
    return validation, scores


def run(s):
    """The suite with bench's settings s: (rows, table)."""
    paths, others = ([find_checkpoint(path, '') for pattern in patterns.split(',')
                      for path in sorted(glob.glob(os.path.expanduser(pattern)))]
                     for patterns in (s.init_from, s.merge_from or ''))
    if not paths:
        raise UserError(f"no checkpoint matches '{s.init_from}'")
    if s.merge_from and len(others) != len(paths):
        counts = f'{len(others)} checkpoints, init_from {len(paths)}'
        raise UserError(f"merge_from='{s.merge_from}' matches {counts}")

    first, groups = recipe(GPT.load(paths[0])[1]), {}
    with tqdm(list(zip(paths, others or [None] * len(paths))), desc='checkpoints', leave=False) as bar:
        for pair in bar:
            name = ' + '.join(changed(GPT.load(path)[1], first) for path in pair if path)
            groups.setdefault(name, []).append(checkpoint_scores(s, *pair))
    rows = []
    for name, runs in groups.items():
        validations, scores = zip(*runs)
        rows.append(dict(name=name, sampler='', seeds=len(runs), **averaged(validations, VALIDATION)))
        for sampler in scores[0]:
            mean = averaged([score[sampler] for score in scores], GENERATED)
            rows.append(dict(name=name, sampler=sampler, seeds=len(runs), **mean))
    generated = [row for row in rows if row['sampler']]
    if s.only and not generated:
        raise UserError(f"no sampler's name contains '{s.only}'")
    print(f'{s.num_samples} samples a seed and sampler, ± standard error over training seeds\n')
    table = table_of([row for row in rows if not row['sampler']], dict(run='name', seeds='seeds'), VALIDATION)
    if generated:
        table += '\n\n' + table_of(generated, dict(run='name', sampler='sampler'), GENERATED)
    return rows, table
