"""
The generation table: every sampler on the same checkpoint, num_seeds x num_samples each, at temperature 1.
Of arithmetic, or any strings that end: what task.py's score says, and how many are unique, novel, how long.

'free': the length is the model's own decision; 'given': the true length of a fresh draw is fixed in advance.
"""

from tqdm import tqdm

from parts.presets import supports
from suites.common import (METRICS, checkpoint_of_rows, draws_strings, grammar_itself, measure, table_of,
                           wanted)


def sampler_rows(config, steps, block_size):
    """The samplers of a checkpoint of this config: (name, protocol, keywords of sample.generate)."""
    can_unmask, causal, detects = supports(config)
    drafts = 'draft head' if config.get('draft_head') else 'bidirectional draft'
    both, hybrid = can_unmask and causal, dict(ar_prefix=16, steps=max(1, steps // 2))
    rows = [(causal, 'AR: causal pass, one token a pass', dict(ar_prefix=block_size)),
            (both, f'remask=causal: {drafts}, causal verdict', dict(remask='causal')),
            (both, 'hybrid: AR prefix of 16, then ancestral', hybrid),
            (can_unmask, 'commit=confidence, remask=none', dict(steps=steps, commit='confidence'))]
    rows = [(name, 'free', rules) for known, name, rules in rows if known]
    for protocol in ('free', 'given') if can_unmask else ():
        rows.append(('ancestral: commit=random, remask=none', protocol, dict(steps=steps)))
        for remask, rate in [('random', 0.1)] + [('wrong', 0.3), ('wrong', 1.0)] * detects:
            rows.append((f'commit=random, remask={remask}, rate {rate}', protocol,
                         dict(steps=steps, remask=remask, remask_rate=rate)))
    return rows


def run(s):
    """The suite with bench's settings s: (rows, table)."""
    model, checkpoint, strings = checkpoint_of_rows(s)
    fresh = draws_strings(strings)
    rows = [grammar_itself(s, strings)] if fresh else []
    asked = [row for row in sampler_rows(checkpoint['config'], s.steps, model.config.block_size)
             if fresh or row[1] == 'free']
    asked = wanted(s, asked)
    for name, protocol, rules in tqdm(asked, desc='rows', leave=False):
        rows.append(measure(s, model, checkpoint['meta'], strings, name, rules, protocol))
    print(f'{s.num_seeds} seeds x {s.num_samples} samples, ± standard error')
    metrics = [metric for metric in METRICS if any(row[metric] is not None for row in rows)]
    return rows, table_of(rows, dict(sampler='name', start='protocol'), metrics)
