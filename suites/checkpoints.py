"""
Training runs side by side. Those that differ in their seed only share a row, ± the standard error over seeds.

A row is named by its paths, beside what it sets differently from the first run; merged ones by both. What
cannot be measured is named and left out: a file that is no checkpoint, samples of a text that runs on.
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
    can_unmask, causal, detects = supports(config)
    val = spread_rows(data_of(meta, config)[1]['val'], s.eval_rows, model.config.block_size)
    validation = worth(model, checkpoint, val)

    samplers = {'remask=none': (can_unmask, dict(remask='none')),
                'remask=wrong': (can_unmask and detects, dict(remask='wrong', remask_rate=s.remask_rate)),
                'commit=abstain': (config.get('allow_abstain'), dict(commit='abstain')),
                'remask=causal': (can_unmask and causal, dict(remask='causal'))}
    scores = {}
    if meta['eos'] is None and 'given' not in meta:
        tqdm.write(f'{path}: no samples are scored, {meta["name"]} is a text that runs on (see --suite=text)')
        return validation, {}
    strings = training_strings(s, meta)
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

    first, groups, failed = None, {}, []
    with tqdm(list(zip(paths, others or [None] * len(paths))), desc='checkpoints', leave=False) as bar:
        for pair in bar:
            named = ' + '.join(filter(None, pair))
            try:
                checkpoints = [GPT.load(path)[1] for path in pair if path]
                first = first or recipe(checkpoints[0])
                settings = ' + '.join(changed(checkpoint, first) for checkpoint in checkpoints)
                groups.setdefault(settings, []).append((named, *checkpoint_scores(s, *pair)))
            except UserError as error:
                failed.append(str(error))
                tqdm.write(f'left out: {error}')
    if not groups:
        raise UserError(f'none of the {len(paths)} checkpoints can be measured: {failed[0]}')
    rows = []
    for settings, runs in groups.items():
        names, validations, scores = zip(*runs)
        same = dict(name=', '.join(names), settings=settings, seeds=len(runs))
        rows.append(dict(same, sampler='', **averaged(validations, VALIDATION)))
        for sampler in scores[0]:
            mean = averaged([score[sampler] for score in scores], GENERATED)
            rows.append(dict(same, sampler=sampler, **mean))
    generated = [row for row in rows if row['sampler']]
    if s.only and not generated:
        raise UserError(f"no sampler's name contains '{s.only}'")
    print(f'{s.num_samples} samples a seed and sampler, ± standard error over training seeds\n')
    columns = dict(run='name', settings='settings')
    table = table_of([row for row in rows if not row['sampler']], dict(columns, seeds='seeds'), VALIDATION)
    if generated:
        table += '\n\n' + table_of(generated, dict(columns, sampler='sampler'), GENERATED)
    return rows, table
