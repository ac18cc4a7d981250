"""
A checkpoint in blocks of every length that it was trained for: what it is worth, and what it writes.

Likelihood: nats a token on eval_rows held-out rows, of the whole canvas, in blocks, and left to right.
Samples, if the strings end: num_seeds x num_samples at each of the budgets, which are passes for a whole
canvas and include those that commit a block, or with a token a pass; nfe is what the texts took.
"""

from tqdm import tqdm

from configurator import UserError
from data.loader import data_of, spread_rows
from parts.blocks import block_bounds
from parts.presets import BLOCKS, PRESETS
from plumbing.checkpoint import find_checkpoint
from suites.common import cells, headings, load, markdown, measure, training_strings, wanted, worth

METRICS = ('valid', 'correct', 'length_tv', 'unique', 'nfe')


def block_rows(config):
    """The samplers of a checkpoint of this config: (name, a token a pass, keywords of sample.generate)."""
    for length in config['block_lengths']:
        for name, rules in (('from left to right', BLOCKS),
                            ('remask=none', dict(remask='none')), ('intelligent', PRESETS['intelligent']),
                            ('intelligent, revise', dict(PRESETS['intelligent'], revise=True)),
                            ('proofread, revise', dict(PRESETS['proofread'], revise=True)),
                            ('surprise, revise', dict(remask='surprise', schedule='cosine', revise=True))):
            single = rules.get('remask') == 'none'
            yield f'blocks of {length}, {name}', single, dict(rules, block_length=length)


def run(s):
    """The suite with bench's settings s: (rows, two tables)."""
    model, checkpoint = load(s, find_checkpoint(s.init_from, s.out_dir))
    config, meta = checkpoint['config'], checkpoint['meta']
    if not config.get('block_lengths'):
        raise UserError('the suite blocks needs a checkpoint that was trained with --block_lengths=4,8,16,32')
    val = spread_rows(data_of(meta, config)[1]['val'], s.eval_rows, model.config.block_size)
    found = worth(model, checkpoint, val, detects=False,
                  bounds=block_bounds(config['block_lengths']), seed=s.seed)
    nats = [name for name in found if not name.endswith('_se')]
    rows = [dict(name=name, nats=found[name], nats_se=found[f'{name}_se']) for name in nats]
    tables = [markdown(['', 'nats a token'], [[row['name'], cells(row, ('nats',))] for row in rows])]
    if meta['eos'] is not None:
        strings, lines = training_strings(s, meta), []
        for name, single, rules in tqdm(wanted(s, [*block_rows(config)]), desc='rows', leave=False):
            drawn = [measure(s, model, meta, strings, name, dict(rules, steps=n), budget=n)
                     for n in ((None,) if single else s.budgets)]
            found = [cells(row, METRICS) for row in drawn]
            lines.append([name, *found, *[''] * (len(s.budgets) - len(found))])
            rows += drawn
        print(f'{s.num_seeds} seeds x {s.num_samples} samples, ± standard error')
        tables.append(markdown([' · '.join(headings(METRICS)), *[f'{n} passes' for n in s.budgets]], lines))
    return rows, '\n\n'.join(tables)
