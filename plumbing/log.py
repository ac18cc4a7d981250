"""The log of a training run, a JSON object a line, and its curves."""

import json
import os

from plumbing.files import atomically, write_atomically


def read_log(path):
    """The records of a log, as far as its lines are whole."""
    records = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            for line in file:
                try:
                    records.append(json.loads(line))
                except ValueError:                                  # torn by a crash
                    break
    return records


def start_log(path, start):
    """Starts an empty log and keeps an older one as log_before.jsonl; of a run resumed at step start the log up to there."""
    if not start and os.path.exists(path) and os.path.getsize(path):
        os.replace(path, path.removesuffix('.jsonl') + '_before.jsonl')
    records = [record for record in read_log(path) if 0 < start >= record['step']]
    write_atomically(path, ''.join(json.dumps(record) + '\n' for record in records))


def draw_curves(log, path):
    """log.jsonl as curves, one panel for what belongs together, if matplotlib is there; returns whether it is."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    records = read_log(log)
    groups = {'nats, training': ('causal', 'draft', 'unmask', 'detect', 'keep'),
              'nats a token, validation': ('nelbo', 'causal_nll', 'entropy'),
              'share': ('auc', 'fixed', 'refilled', 'valid', 'correct', 'distinct_3', 'known_words'),
              'abstention': ('p(MASK)', 'penalty_keep_mask'), 'bias on the logit of [MASK]': ('mask_logit_bias',),
                'curricula': ('remask_ratio', 'penalty_mask_correct'), 'learning rate': ('learning_rate',)}
    there = {name for record in records for name in record}
    panels = [(title, [name for name in names if name in there]) for title, names in groups.items()]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return False
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 2.6 * rows), layout='constrained')
    for number, (title, names) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 2, number, title=title)
        for name in names:
            points = [(record['step'], record[name]) for record in records if name in record]
            axes.plot(*zip(*points), label=name, marker='.' if len(points) < 20 else None)
        axes.legend(fontsize='small')
        axes.grid(alpha=0.3)
    with atomically(path) as temporary:
        figure.savefig(temporary, format='png', dpi=110)
    return True
