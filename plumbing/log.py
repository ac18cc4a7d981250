"""The log of a training run, a JSON object a line, and its curves."""

import json
import os

from plumbing.checkpoint import atomically, write_atomically


def read_log(path):
    """The records of a log, as far as its lines are whole."""
    records = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            for line in file:
                try:
                    records.append(json.loads(line))
                except ValueError:                                             # torn by a crash
                    break
    return records


def start_log(path, start):
    """An empty log, an older one being kept as log_before.jsonl; if a run is resumed at step start, the log up to there."""
    if not start and os.path.exists(path) and os.path.getsize(path):
        os.replace(path, path.removesuffix('.jsonl') + '_before.jsonl')
    write_atomically(path, ''.join(json.dumps(record) + '\n' for record in read_log(path) if 0 < start >= record['step']))


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
    groups = {title: [name for name in names if any(name in record for record in records)] for title, names in groups.items()}
    groups = {title: names for title, names in groups.items() if names}
    if not groups:
        return False
    figure = Figure(figsize=(10, 2.6 * -(-len(groups) // 2)), layout='constrained')
    for number, (title, names) in enumerate(groups.items(), 1):
        axes = figure.add_subplot(-(-len(groups) // 2), 2, number, title=title)
        for name in names:
            points = [(record['step'], record[name]) for record in records if name in record]
            axes.plot(*zip(*points), label=name, marker='.' if len(points) < 20 else None)
        axes.legend(fontsize='small')
        axes.grid(alpha=0.3)
    with atomically(path) as temporary:
        figure.savefig(temporary, format='png', dpi=110)
    return True
