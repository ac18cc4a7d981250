"""
Every rule and preset on the same checkpoint at every budget of passes, num_seeds x num_samples each.

The temperature is 1, the length is the model's own decision.
"""

from tqdm import tqdm

from plumbing.text import encode
from rules import PRESETS, supports
from suites.common import cell, cells, checkpoint_of_arithmetic, headings, markdown, measure, wanted


def budget_rows(config, block_size):
    """The samplers of such a checkpoint: (name, whether it takes a budget, keywords of sample.generate)."""
    can_unmask, causal, detects = supports(config)
    rows = []
    if causal:
        rows.append(('AR: causal pass, one token a pass', False, dict(ar_prefix=block_size)))
    if causal and can_unmask:
        rows.append(('remask=causal (preset speculative)', False, PRESETS['speculative']))
    if not can_unmask:
        return rows
    rows += [('remask=none (preset ancestral)', True, PRESETS['ancestral']),
             ('remask=random', True, dict(remask='random')),
             ('remask=remdm (preset remdm)', True, PRESETS['remdm']),
             ('remask=confidence', True, dict(remask='confidence'))]
    if detects:
        rows += [('remask=wrong', True, dict(remask='wrong')),
                 ('schedule=cosine, remask=wrong (preset intelligent)', True, PRESETS['intelligent']),
                 ('remask=p2 (preset p2)', True, PRESETS['p2'])]
    if causal and detects:
        halves = dict(remask='wrong', ar_prefix=0)
        rows.append(('half of the passes by ar_prefix, then remask=wrong', True, halves))
    rows += [('commit=confidence, schedule=cosine (preset maskgit)', True, PRESETS['maskgit']),
             ('commit=margin', True, dict(commit='margin')),
             ('commit=entropy', True, dict(commit='entropy')),
             ('commit=threshold (preset threshold)', True, PRESETS['threshold']),
             ('commit=priority', True, dict(commit='priority', priority='()=+*')),
             ('commit=random, block_length=8', True, dict(block_length=8)),
             ('remask=remdm, rescale', True, dict(remask='remdm', remdm='rescale'))]
    if causal:
        rows.append(('preset universal', False, PRESETS['universal']))
    return rows


def run(s):
    """The suite with bench's settings s: (rows, two tables with a column for each budget)."""
    model, checkpoint, strings = checkpoint_of_arithmetic(s)
    meta = checkpoint['meta']
    rows, tables = [], {('valid', 'length_tv'): [], ('correct', 'unique', 'novel'): []}
    asked = wanted(s, budget_rows(checkpoint['config'], model.config.block_size))
    for name, takes, rules in tqdm(asked, desc='rows', leave=False):
        found = []
        for n in s.budgets if takes else (None,):
            how = dict(rules, steps=n) if takes else dict(rules)
            if 'priority' in rules:
                how['priority'] = tuple(encode(meta, rules['priority']))
            if takes and 'ar_prefix' in rules:
                how.update(steps=n - n // 2, ar_prefix=n // 2)
            found.append(measure(s, model, meta, strings, name, how, budget=n))
        rows += found
        label = name if takes else f"{name}: {cell(found[0], 'nfe')} passes"
        for metrics, lines in tables.items():
            line = [label, *[cells(row, metrics) for row in found]]
            lines.append(line + [''] * (1 + len(s.budgets) - len(line)))
    print(f'{s.num_seeds} seeds x {s.num_samples} samples, ± standard error')
    budgets = [f'{n} passes' for n in s.budgets]
    return rows, '\n\n'.join(markdown([' · '.join(headings(metrics)), *budgets], lines)
                             for metrics, lines in tables.items())
