"""
Every rule and preset on the same checkpoint at every budget of passes, num_seeds x num_samples each, the length being the
model's own decision, temperature 1.
"""

from tqdm import tqdm

from rules import PRESETS, supports
from suites.common import cell, checkpoint_of_arithmetic, markdown, measure, wanted


def budget_rows(config, block_size):
    """The samplers of a checkpoint of this config: (name, whether it takes a budget of passes, keywords of sample.generate)."""
    can_unmask, causal, detects = supports(config)
    rows = []
    if causal:
        rows.append(('AR: causal pass, one token a pass', False, dict(ar_prefix=block_size)))
    if causal and can_unmask:
        rows.append(('remask=causal (preset speculative)', False, dict(remask='causal')))
    if not can_unmask:
        return rows
    rows += [('remask=none (preset ancestral)', True, {}),
             ('remask=random', True, dict(remask='random')),
             ('remask=remdm (preset remdm)', True, dict(remask='remdm')),
             ('remask=confidence', True, dict(remask='confidence'))]
    if detects:
        rows += [('remask=wrong', True, dict(remask='wrong')),
                 ('schedule=cosine, remask=wrong (preset intelligent)', True, dict(schedule='cosine', remask='wrong')),
                 ('remask=p2 (preset p2)', True, dict(remask='p2'))]
    if causal and detects:
        rows.append(('half of the passes by ar_prefix, then remask=wrong', True, dict(remask='wrong', ar_prefix=0)))
    rows += [('commit=confidence, schedule=cosine (preset maskgit)', True, dict(commit='confidence', schedule='cosine')),
             ('commit=margin', True, dict(commit='margin')), ('commit=entropy', True, dict(commit='entropy')),
             ('commit=threshold (preset threshold)', True, dict(commit='threshold')),
             ('commit=priority', True, dict(commit='priority')),
             ('commit=left_to_right', True, dict(commit='left_to_right')),
             ('commit=random, block_length=8', True, dict(block_length=8)),
             ('remask=remdm, rescale', True, dict(remask='remdm', remdm='rescale')),
             ('remask=remdm, loop', True, dict(remask='remdm', remdm='loop'))]
    if causal:
        rows.append(('preset universal', False, PRESETS['universal']))
    return rows


def run(s):
    """The suite with bench's settings s: (rows, two tables: one column a budget)."""
    model, meta, config, task, train = checkpoint_of_arithmetic(s)
    ids = tuple(meta['itos'].index(c) for c in '()=+*')
    rows, lines = [], ([], [])
    for name, takes, rules in tqdm(wanted(s, budget_rows(config, model.config.block_size)), desc='rows', leave=False):
        if rules.get('commit') == 'priority':
            rules = dict(rules, priority=ids)
        found = []
        for n in s.budgets if takes else (None,):
            how = dict(rules, steps=n) if takes else rules
            if takes and 'ar_prefix' in rules:
                how.update(steps=n - n // 2, ar_prefix=n // 2)
            found.append(measure(s, model, meta, task, train, name, how, more=dict(budget=n)))
        rows += found
        cells = found if takes else found + [None] * (len(s.budgets) - 1)
        for line, metrics in zip(lines, (('valid', 'length_tv'), ('correct', 'unique', 'novel'))):
            line.append([name if takes else f"{name}: {cell(found[0], 'nfe')} passes",
                         *['' if row is None else ' · '.join(cell(row, m) for m in metrics) for row in cells]])
    print(f'{s.num_seeds} seeds x {s.num_samples} samples, ± standard error')
    heads = ('valid % · length_tv', 'correct % · unique % · novel %')
    return rows, '\n\n'.join(markdown([head, *[f'{n} passes' for n in s.budgets]], line) for head, line in zip(heads, lines))
