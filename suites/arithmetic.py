"""
The generation table: every sampler on the same checkpoint, num_seeds x num_samples each, at temperature 1.

'free': the length is the model's own decision; 'given': the true length of a fresh draw is fixed in advance.
The first row scores fresh draws of the grammar: what a perfect model would get at this n.
"""

from tqdm import tqdm

from rules import supports
from suites.common import METRICS, SHARES, cell, checkpoint_of_arithmetic, fresh_draws, markdown, measure, summary, wanted


def sampler_rows(config, steps, block_size):
    """The samplers that a checkpoint of this config supports: (name, protocol, keywords of sample.generate)."""
    can_unmask, causal, detects = supports(config)
    rows = []
    if causal:
        rows.append(('AR: causal pass, one token a pass', 'free', dict(ar_prefix=block_size)))
    if causal and can_unmask:
        drafts = 'draft head' if config.get('draft_head') else 'bidirectional draft'
        rows += [(f'remask=causal: {drafts}, causal verdict', 'free', dict(remask='causal')),
                 ('hybrid: AR prefix of 16, then ancestral', 'free', dict(ar_prefix=16, steps=max(1, steps // 2)))]
    if can_unmask:
        rows += [('commit=left_to_right, remask=none', 'free', dict(steps=steps, commit='left_to_right')),
                 ('commit=confidence, remask=none', 'free', dict(steps=steps, commit='confidence'))]
    for protocol in ('free', 'given') if can_unmask else ():
        rows += [('ancestral: commit=random, remask=none', protocol, dict(steps=steps)),
                 ('commit=random, remask=random, rate 0.1', protocol, dict(steps=steps, remask='random', remask_rate=0.1))]
        if detects:
            rows += [(f'commit=random, remask=wrong, rate {rate}', protocol, dict(steps=steps, remask='wrong', remask_rate=rate))
                     for rate in (0.3, 1.0)]
    return rows


def run(s):
    """The suite with bench's settings s: (rows, table)."""
    model, meta, config, task, train = checkpoint_of_arithmetic(s)
    perfect = [{**task.score(fresh_draws(s, task, number), train), 'nfe': 0} for number in range(s.num_seeds)]
    rows = [summary('the grammar itself', 'free', perfect, s.num_samples)]
    for name, protocol, rules in tqdm(wanted(s, sampler_rows(config, s.steps, model.config.block_size)),
                                      desc='rows', leave=False):
        rows.append(measure(s, model, meta, task, train, name, rules, protocol))
    print(f'{s.num_seeds} seeds x {s.num_samples} samples, ± standard error')
    return rows, markdown(['sampler', 'start', *[f'{m} %' if m in SHARES else m for m in METRICS]],
                          [[row['name'], row['protocol'], *[cell(row, m) for m in METRICS]] for row in rows])
