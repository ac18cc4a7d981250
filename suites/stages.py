"""
Must a network be trained in stages: simple first, then told the noise level, then with gradient credit, then
with graph attention? Or may it have all at once? Variants have equal steps and, within 2 %, parameters.

nelbo     nats a token of the whole validation split; its difference to stage 0 is paired by the training seed
samples   of arithmetic, in --steps passes: num_samples by the checkpoint's best rules, and by remask=wrong
cost      the time of a training step; it wants a quiet machine, so only --only=cost asks for it

± is the standard error over num_seeds training seeds. Runs and rows are kept in out_dir/stages, see runs.py.
Machines can share the work: each takes some runs with --only, and the lines of their rows.jsonl in one file
make the whole table. A --max_iters among the --train_args counts for each leg of a run that has legs.
"""

import functools
import os
import statistics
from types import SimpleNamespace

import configurator
from configurator import UserError
from data.loader import data_of, load_data, spread_rows
from parts.presets import choose_rules
from suites.common import (COST, averaged, cell, cells, headings, markdown, measure, training_strings, wanted,
                           worth)
from suites.runs import (ROOT, check_train_args, folder_name, known_settings, measure_all, network_of,
                         setting_of, training_cost)
from suites.speed import compare, ms, our_step, times_as_fast, with_ratios
from suites.text import DRAWS

ARITHMETIC = ['train.py', 'config/remask_all.py', '--eval_samples=0']
TEXT = ['train.py', 'config/unmask.py', '--dataset=shakespeare_char', '--block_size=128', '--batch_size=32',
        '--n_layer=4', '--n_recur=1', '--mask_weighting=token', '--max_iters=2000', '--warmup_iters=30',
        '--ema_decay=0.995', '--eval_samples=0', '--eval_interval=100000']
RECIPES = dict(arithmetic=ARITHMETIC, text=TEXT)

CREDIT = '--k1_credit=True'
# a level of the usual width of 128 would be 5 % more parameters
STAGES = [[], ['--parts=level:32'], ['--parts=level:32', CREDIT], ['--parts=level:32,graph:8', CREDIT]]
WITH_BLOCKS = [['--parts=mu:16'], ['--parts=level:32,mu:16'], ['--parts=level:32,mu:16', CREDIT],
               ['--parts=level:32,graph:8,mu:16', CREDIT]]
VARIANTS = {                     # no commas, or --only could not name a run
    'stage 0': STAGES[0],
    'stage 1 noise level': STAGES[1],
    'stage 2 and credit': STAGES[2],
    'stage 3 and graph': STAGES[3],
    'credit alone': [CREDIT],
    'graph alone': ['--parts=graph:8'],
    'blocks alone': WITH_BLOCKS[0],
    'all at once': WITH_BLOCKS[3],
    'all at once in legs': WITH_BLOCKS[3],       # to compare staged with: the optimiser starts as often
    'staged': WITH_BLOCKS[3],                    # the same in the end
}
LEGS = {'all at once in legs': 4 * [WITH_BLOCKS[3]], 'staged': WITH_BLOCKS}
SAMPLERS = {'best rules': {}, 'remask=wrong': dict(remask='wrong')}
SAMPLED = ('valid', 'correct', 'length_tv', 'unique', 'nfe')


def config_of(words):
    """The settings of train.py, a dict, that the words of a run's command make."""
    known = known_settings(words[0])
    values = {name: setting.default for name, setting in known.items()}
    files, overrides = configurator.parse(words[1:], known)
    for file in files:
        configurator.apply_file(os.path.join(ROOT, file), values, known)
    return {**values, **dict(overrides)}


def legs_of(s, data, variant, k):
    """
    The runs that make up a variant of LEGS, {name: words}, each from the checkpoint of the one before it.

    Together they make as many steps as the other variants. The rate stays up until the last leg, which decays
    for as many steps as the others do, or all along if it is shorter: it is, a quarter against two fifths.
    """
    config, legs = config_of(RECIPES[data]), LEGS[variant]
    runs, before = {}, None
    for number, leg in enumerate(legs):
        last = number == len(legs) - 1
        name = f'{data}: {variant} seed {k}' if last else f'{data}: leg {number} of {variant} seed {k}'
        decay = min(1.0, len(legs) * config['decay_share']) if last else 0
        # a seed of its own, for each leg to see new rows and new masks, as one long run would
        words = [*RECIPES[data], *leg, f'--seed={s.seed + k + 1000 * number}', f'--decay_share={decay:g}',
                 f"--max_iters={config['max_iters'] // len(legs)}"]
        if before:
            words += ['--warmup_iters=10', '--proofreading_warmup_iters=0', '--masking_warmup_iters=0',
                      f'--init_from={{{before}}}']
        runs[name], before = words, name
    return runs


def runs_of(s):
    """All runs, {name: words}, and what is asked of them, see measure_all."""
    runs, asked = {}, []
    for data, recipe in RECIPES.items():
        for variant, words in VARIANTS.items():
            for k in range(s.num_seeds):
                name = f'{data}: {variant} seed {k}'
                whole = {name: [*recipe, *words, f'--seed={s.seed + k}']}
                legs = legs_of(s, data, variant, k) if variant in LEGS else whole
                runs.update(legs)
                asked.append((name, data, name, dict(variant=variant, seed=k, legs=list(legs))))
    return runs, asked


def rows_of(s, network, name, run, how):
    """One row: the worth of a run on the whole validation split, its samples, and what its training took."""
    model, checkpoint = network(run)
    meta, config = checkpoint['meta'], checkpoint['config']
    val = data_of(meta, config)[1]['val']
    row = dict(name=name, variant=how['variant'], seed=how['seed'], causal_nll=None, samples={})
    row.update(training_cost(model, *[network(leg)[1] for leg in how['legs']]))
    row.update(worth(model, checkpoint, spread_rows(val, len(val), model.config.block_size), detects=False,
                     draws=DRAWS, batch_size=s.batch_size, seed=s.seed))
    if meta['name'] == 'arithmetic':
        once, strings = SimpleNamespace(**{**vars(s), 'num_seeds': 1}), training_strings(s, meta)
        for sampler, chosen in SAMPLERS.items():
            rules = choose_rules(config, steps=s.steps, **chosen)
            found = measure(once, model, meta, strings, f'{name}, {sampler}', rules)
            row['samples'][sampler] = {metric: found[metric] for metric in SAMPLED}
    return [row]


def cost(s):
    """Rows and text: the time of a training step of every variant, on random ids."""
    rows = []
    for data, recipe in RECIPES.items():
        steps = {}
        for variant, words in VARIANTS.items():
            if variant not in LEGS:
                config = config_of([*recipe, *words, *s.train_args.split()])
                vocab_size = load_data(config['dataset'])[0]['vocab_size']
                steps[variant] = our_step(s, dict(config, vocab_size=vocab_size), s.compile)
        rows += with_ratios(compare('cost', data, steps, s.steps), 'stage 0')
    lines = [[row['shape'], row['name'], ms(row), times_as_fast(row)] for row in rows]
    return rows, markdown(['data', 'a step of', 'ms (quartiles)', 'against stage 0'], lines)


def run(s):
    """The suite with bench's settings s: (rows, a table for each dataset), see measure_all."""
    runs, asked = runs_of(s)
    for word in s.train_args.split():
        if setting_of(word) in ('seed', 'init_from', 'parts'):
            raise UserError(f'train_args is for all runs, which have their own seed, parts and init_from: '
                            f'leave out {word}')
    check_train_args(s, runs)
    if s.only == 'cost':
        return cost(s)
    network = functools.partial(network_of, s, runs, {})
    return measure_all(s, network, wanted(s, asked), dict.fromkeys(RECIPES, rows_of),
                       lambda data, run, how: [folder_name(s, runs, run), s.steps], tables)


def tables(rows):
    """Markdown of the rows of run: a table for each dataset, and in it a line for each variant."""
    texts = []
    for data in RECIPES:
        found = {variant: {} for variant in VARIANTS}
        for row in rows:
            if row['table'] == data:
                found[row['variant']][row['seed']] = row
        lines = [line_of(variant, seeds, found['stage 0']) for variant, seeds in found.items() if seeds]
        sampled = ' · '.join(headings(SAMPLED))
        samples = [f'{sampler}: {sampled}' for sampler in SAMPLERS if data == 'arithmetic']
        if lines:
            head = [data, 'seeds', 'nelbo', 'against stage 0', 'causal_nll', *samples, *headings(COST)]
            texts.append(markdown(head, lines))
    return '\n\n'.join(texts)


def line_of(variant, seeds, first):
    """The cells of a variant: means over its rows {seed: row}, ± standard errors. first: those of stage 0."""
    rows = list(seeds.values())
    pairs = [dict(difference=row['nelbo'] - first[k]['nelbo']) for k, row in seeds.items() if k in first]
    against = '—'
    if pairs and variant != 'stage 0':
        against = cell(averaged(pairs, ['difference']), 'difference')
        if len(pairs) < len(rows):
            against += f' (n={len(pairs)})'
    mean = averaged(rows, ('nelbo', 'causal_nll'))
    samples = [averaged([row['samples'][name] for row in rows], SAMPLED) for name in rows[0]['samples']]
    took = {metric: statistics.mean(row[metric] for row in rows) for metric in COST}
    return [variant, str(len(rows)), cell(mean, 'nelbo'), against, cell(mean, 'causal_nll'),
            *[cells(sample, SAMPLED) for sample in samples], *[cell(took, metric) for metric in COST]]
