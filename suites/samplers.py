"""
The rules and presets on the same checkpoint at every budget of passes, num_seeds x num_samples each.

The temperature is 1, the length is the model's own decision.
"""

from tqdm import tqdm

from plumbing.text import can_have, encode
from parts.presets import PRESETS, supports
from suites.common import cell, cells, checkpoint_of_rows, headings, markdown, measure, wanted


def budget_rows(config, block_size):
    """The samplers of such a checkpoint: (name, whether it takes a budget, keywords of sample.generate)."""
    can_unmask, causal, detects = supports(config)
    finds, both = can_unmask and detects, can_unmask and causal
    halves = dict(remask='wrong', ar_prefix=0)
    rows = [(causal, 'AR: causal pass, one token a pass', False, dict(ar_prefix=block_size)),
            (both, 'remask=causal (preset speculative)', False, PRESETS['speculative']),
            (both and finds, 'written, then read once more (preset proofread)', False, PRESETS['proofread']),
            (both and finds, 'a draft, a tenth again 40 times (preset polish)', False, PRESETS['polish']),
            (can_unmask, 'remask=none (preset ancestral)', True, PRESETS['ancestral']),
            (can_unmask, 'remask=random', True, dict(remask='random')),
            (can_unmask, 'remask=remdm (preset remdm)', True, PRESETS['remdm']),
            (can_unmask, 'remask=confidence', True, dict(remask='confidence')),
            (finds, 'remask=wrong', True, dict(remask='wrong')),
            (finds, 'schedule=cosine, remask=wrong (preset intelligent)', True, PRESETS['intelligent']),
            (finds, 'remask=p2 (preset p2)', True, PRESETS['p2']),
            (finds, 'all at once, then a share of it again (preset redraft)', True, PRESETS['redraft']),
            (finds and causal, 'half of the passes by ar_prefix, then remask=wrong', True, halves),
            (can_unmask, 'commit=confidence, schedule=cosine (preset maskgit)', True, PRESETS['maskgit']),
            (can_unmask, 'commit=confidence without noise (preset surest)', True, PRESETS['surest']),
            (can_unmask, 'commit=left', True, dict(commit='left')),
            (can_unmask, 'commit=margin', True, dict(commit='margin')),
            (can_unmask, 'commit=entropy', True, dict(commit='entropy')),
            (can_unmask, 'commit=threshold (preset threshold)', True, PRESETS['threshold']),
            (can_unmask, 'commit=priority', True, dict(commit='priority', priority='()=+*')),
            (can_unmask, 'remask=remdm, rescale', True, dict(remask='remdm', remdm='rescale')),
            (both, 'remask=surprise', True, dict(remask='surprise')),
            (both, 'preset universal', False, PRESETS['universal'])]
    return [row for known, *row in rows if known]


def run(s):
    """The suite with bench's settings s: (rows, two tables with a column for each budget)."""
    model, checkpoint, strings = checkpoint_of_rows(s)
    meta = checkpoint['meta']
    rows, tables = [], {('valid', 'length_tv'): [], ('correct', 'unique', 'novel'): []}
    rows_here = [row for row in budget_rows(checkpoint['config'], model.config.block_size)
                 if all(can_have(meta, c) for c in row[2].get('priority', ''))]
    asked = wanted(s, rows_here)
    for name, takes, rules in tqdm(asked, desc='rows', leave=False):
        found = []
        for n in s.budgets if takes else (None,):
            how = dict(rules, steps=n) if takes else dict(rules)
            if 'priority' in rules:
                how['priority'] = tuple(encode(meta, rules['priority']))
            if rules.get('remask') == 'surprise':                   # all but the last of its steps are two
                how['steps'] = (n + 1) // 2
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
