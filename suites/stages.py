"""
Must a network be trained in stages: simple first, then told the noise level, then with gradient credit, then with graph
attention? And does it hurt to have it all from the start? Every variant makes as many steps with as many parameters, within 2 %.

nelbo            nats a token of the whole validation split, and its difference to stage 0, paired by the seed of training
samples          of arithmetic: --num_samples by the best rules of the checkpoint, and as many by remask=wrong in --steps passes
cost             the time of a training step, in turns; it wants a quiet machine, so only --only=cost asks for it

A training run is a row by itself, ± is the standard error over num_seeds seeds of training. Runs and measured rows are kept
under out_dir/stages, see runs.py. Several machines can share the work: each takes some runs with --only, into an out_dir of its
own, and the lines of their rows.jsonl in one file make the whole table. --train_args are words for all runs; a --max_iters among
them is that of each leg of those that have legs.
"""

import functools
import json
import os
import statistics
from types import SimpleNamespace

import configurator
from configurator import UserError
from data.loader import data_of, load_data, spread_rows
from plumbing.evaluate import evaluate
from rules import choose_rules, supports
from suites.checkpoints import mean_and_error
from suites.common import SHARES, cell, markdown, measure, training_strings, wanted
from suites.runs import ROOT, check_train_args, folder_of, known_settings, measure_all, network_of, setting_of
from suites.speed import compare, ms, our_step, times_as_fast, with_ratios
from suites.text import DRAWS, cost_of

# -----------------------------------------------------------------------------
# what is trained

ARITHMETIC = ['train.py', 'config/remask_all.py', '--eval_samples=0']
TEXT = ['train.py', 'config/unmask.py', '--dataset=shakespeare_char', '--block_size=128', '--batch_size=32', '--n_layer=4',
        '--n_recur=1', '--mask_weighting=token', '--max_iters=2000', '--warmup_iters=30', '--ema_decay=0.995', '--eval_samples=0',
        '--eval_interval=100000']
RECIPES = dict(arithmetic=ARITHMETIC, text=TEXT)

BLOCKS = ['--mu_blocks=16']
# a time MLP of the usual width of 128 would be 5 % more parameters
STAGES = [[], *[[f'--stage={n}', '--time_dim=32'] for n in (1, 2, 3)]]
VARIANTS = {                                                                   # no commas, or --only could not name a run
    'stage 0': STAGES[0],
    'stage 1 noise level': STAGES[1],
    'stage 2 and credit': STAGES[2],
    'stage 3 and graph': STAGES[3],
    'credit alone': ['--k1_credit=True'],
    'graph alone': ['--graph_window=8'],
    'blocks alone': BLOCKS,
    'all at once': [*STAGES[3], *BLOCKS],
    'all at once in legs': [*STAGES[3], *BLOCKS],                              # to compare `staged` with: as many fresh starts
    'staged': [*STAGES[3], *BLOCKS],                                           # the same in the end, see legs_of
}
LEGS = {'all at once in legs': 4 * [STAGES[3]], 'staged': STAGES}              # the stage of every leg
SAMPLERS = {'best rules': {}, 'remask=wrong': dict(remask='wrong')}
SAMPLED = ('valid', 'correct', 'length_tv', 'unique', 'nfe')


def config_of(words):
    """The settings of train.py, a dict, that the words of a run's command make, with what their stage turns on."""
    known = known_settings(words[0])
    values = {name: setting.default for name, setting in known.items()}
    files, overrides = configurator.parse(words[1:], known)
    for file in files:
        configurator.apply_file(os.path.join(ROOT, file), values, known)
    return {**values, **dict(overrides)}


def legs_of(s, data, variant, k):
    """
    The runs that make up a variant of LEGS, {name: words}, each from the checkpoint of the one before it.

    Together they make as many steps as the other variants. The rate stays up until the last leg, which decays as many steps as
    the others do, or from its first step on if it is shorter than that: it is, a quarter against two fifths.
    """
    config, runs, before = config_of(RECIPES[data]), {}, None
    legs = LEGS[variant]
    for number, stage in enumerate(legs):
        last = number == len(legs) - 1
        name = f'{data}: {variant} seed {k}' if last else f'{data}: leg {number} of {variant} seed {k}'
        decay = min(1.0, len(legs) * config['decay_share']) if last else 0
        # a seed of its own, for each leg to see new rows and new masks, as one long run would
        words = [*RECIPES[data], *stage, *BLOCKS, f"--max_iters={config['max_iters'] // len(legs)}", f'--decay_share={decay:g}',
                 f'--seed={s.seed + k + 1000 * number}']
        if before:
            words += ['--warmup_iters=10', '--proofreading_warmup_iters=0', '--masking_warmup_iters=0',
                      f'--init_from={{{before}}}']
        runs[name], before = words, name
    return runs


def runs_of(s):
    """All runs, {name: words}, and what is measured of them, tuples (name, data, variant, k, names of its legs)."""
    runs, asked = {}, []
    for data, recipe in RECIPES.items():
        for variant, words in VARIANTS.items():
            for k in range(s.num_seeds):
                name = f'{data}: {variant} seed {k}'
                legs = legs_of(s, data, variant, k) if variant in LEGS else {name: [*recipe, *words, f'--seed={s.seed + k}']}
                runs.update(legs)
                asked.append((name, data, variant, k, list(legs)))
    return runs, asked

# -----------------------------------------------------------------------------
# what is measured


def row_of(s, network, name, data, variant, k, legs):
    """The row of a run: what it is worth on the whole validation split, what its samples are, and what it took to train it."""
    model, checkpoint = network(name)
    meta, config, T = checkpoint['meta'], checkpoint['config'], model.config.block_size
    val, (can_unmask, causal, _) = data_of(meta, config)[1]['val'], supports(config)
    row = dict(name=name, data=data, variant=variant, seed=k, parameters=model.num_params(), causal_nll=None, samples={})
    row.update(evaluate(model, spread_rows(val, len(val), T), meta, causal=causal, bidirectional=can_unmask, detects=False,
                        draws=DRAWS, batch_size=s.batch_size, seed=s.seed))
    if data == 'arithmetic':
        once, (task, known) = SimpleNamespace(**{**vars(s), 'num_seeds': 1}), training_strings(s, meta)
        for sampler, chosen in SAMPLERS.items():
            rules = choose_rules(config, steps=s.steps, **chosen)
            found = measure(once, model, meta, task, known, f'{name}, {sampler}', rules)
            row['samples'][sampler] = {metric: found[metric] for metric in SAMPLED}
    trained = [network(leg)[1] for leg in legs]
    seconds = sum(leg['seconds'] for leg in trained)
    seen = sum(leg['iter_num'] for leg in trained) * config['batch_size'] * config['gradient_accumulation_steps'] * T
    return dict(row, minutes=seconds / 60, tokens_per_second=seen / max(1e-9, seconds))


def cost(s):
    """Rows and text: the time of a training step of every variant, on random ids."""
    rows, lines = [], []
    for data, recipe in RECIPES.items():
        configs = {variant: config_of([*recipe, *words, *s.train_args.split()])
                   for variant, words in VARIANTS.items() if variant not in LEGS}
        steps = {variant: our_step(s, dict(config, vocab_size=load_data(config['dataset'])[0]['vocab_size']), s.compile)
                 for variant, config in configs.items()}
        rows += with_ratios(compare('cost', data, steps, s.steps), 'stage 0')
    lines = [[row['shape'], row['name'], ms(row), times_as_fast(row)] for row in rows]
    return rows, markdown(['data', 'a step of', 'ms (quartiles)', 'against stage 0'], lines)

# -----------------------------------------------------------------------------
# the suite


def run(s):
    """The suite with bench's settings s: (rows, a table a dataset). What cannot be measured is left out, and an error says so."""
    runs, asked = runs_of(s)
    check_train_args(s, runs)
    for word in s.train_args.split():
        if setting_of(word) in ('seed', 'init_from'):
            raise UserError(f'train_args is for all runs, which have their own seed and init_from: leave out {word}')
    if s.only == 'cost':
        return cost(s)
    network = functools.partial(network_of, s, runs, {})

    def key_of(name, *_):
        return json.dumps([name, os.path.basename(folder_of(s, runs, name)), s.num_samples, s.steps, s.seed])

    return measure_all(s, wanted(s, asked), key_of, lambda *one: [row_of(s, network, *one)], tables)


def tables(rows):
    """Markdown of the rows of run, a table for each dataset that there is and in it a line for each variant."""
    texts = []
    for data in RECIPES:
        found = {variant: {row['seed']: row for row in rows if (row['data'], row['variant']) == (data, variant)}
                 for variant in VARIANTS}
        lines = [line_of(variant, seeds, found['stage 0']) for variant, seeds in found.items() if seeds]
        samples = [f"{sampler}: {' · '.join(f'{m} %' if m in SHARES else m for m in SAMPLED)}"
                   for sampler in (SAMPLERS if data == 'arithmetic' else ())]
        if lines:
            texts.append(markdown([data, 'seeds', 'nelbo', 'against stage 0', 'causal_nll', *samples, 'minutes of training',
                                   'tokens/s', 'parameters'], lines))
    return '\n\n'.join(texts)


def line_of(variant, seeds, first):
    """The cells of a variant: means over its rows {seed: row}, ± standard errors. first: those of stage 0."""
    rows, metrics = list(seeds.values()), ('nelbo', 'causal_nll')
    pairs = [dict(difference=row['nelbo'] - first[k]['nelbo']) for k, row in seeds.items() if k in first and variant != 'stage 0']
    mean = mean_and_error(rows, metrics)
    against = cell(mean_and_error(pairs, ['difference']), 'difference') if pairs else '—'
    if pairs and len(pairs) < len(rows):
        against += f' (n={len(pairs)})'
    samples = [mean_and_error([row['samples'][sampler] for row in rows], SAMPLED) for sampler in rows[0]['samples']]
    took = {name: statistics.mean(row[name] for row in rows) for name in ('minutes', 'tokens_per_second')}
    return [variant, str(len(rows)), cell(mean, 'nelbo'), against, cell(mean, 'causal_nll'),
            *[' · '.join(cell(sample, m) for m in SAMPLED) for sample in samples],
            *cost_of(dict(took, parameters=rows[0]['parameters']))]
