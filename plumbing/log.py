"""What a training run tells: its log, a JSON object a line, its curves, its lines on screen, its samples."""

import itertools
import os

import torch

from configurator import UserError
from plumbing.files import atomically, read_records, to_json, write_atomically
from plumbing.optim import ramp
from plumbing.text import decode, encode, load_task, modelled, sample_line, score_line, scored

PARTS = ('causal', 'draft', 'unmask', 'detect', 'keep', 'p(MASK)')  # of the loss, as training tells them


def read_log(path):
    """The records of a log, as far as its lines are whole."""
    return [record for record in read_records(path) if type(record.get('step')) is int]


def start_log(path, start):
    """Starts an empty log, an older one becoming log_before.jsonl; of a resumed run it stays up to start."""
    if not start and os.path.exists(path) and os.path.getsize(path):
        os.replace(path, path.removesuffix('.jsonl') + '_before.jsonl')
    records = [record for record in read_log(path) if 0 < start >= record['step']]
    write_atomically(path, ''.join(to_json(record) + '\n' for record in records))


def draw_curves(log, path):
    """Draws log.jsonl as curves, if matplotlib is there and works; returns whether it does."""
    try:
        return curves(log, path)
    except ImportError:
        return False
    except Exception as error:                                      # whatever a drawing library may raise
        raise UserError(f'{path}: not drawn: {error}') from error


def curves(log, path):
    """Draws log.jsonl as curves; returns whether there is something to draw."""
    from matplotlib.figure import Figure
    records = read_log(log)
    groups = {'nats, training': ('causal', 'draft', 'unmask', 'detect', 'keep'),
              'nats a token, validation': ('nelbo', 'causal_nll', 'entropy'),
              'share': ('auc', 'fixed', 'refilled', 'calibration', 'calibration_full', 'valid', 'correct',
                        'cells', 'distinct_3', 'known_words'),
              'abstention': ('p(MASK)', 'penalty_keep_mask'),
              'bias on the logit of [MASK]': ('mask_logit_bias',),
              'curricula': ('remask_ratio', 'penalty_mask_correct', 'causal_ratio'),
              'learning rate': ('learning_rate',)}
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
            points = [(record['step'], record[name]) for record in records if record.get(name) is not None]
            axes.plot(*zip(*points), label=name, marker='.' if len(points) < 20 else None)
        axes.legend(fontsize='small')
        axes.grid(alpha=0.3)
    with atomically(path) as half:
        figure.savefig(half, format='png', dpi=110)
    return True


def progress_line(step, config, record, speed):
    """The line on screen: losses by task since the last one, curricula, controller, speed and time left."""
    words = [f'{name} {record[name]:.3f}' for name in PARTS if name in record]
    if config['target_mask_prob']:
        words.append(f"bias {record['mask_logit_bias']:+.2f}  price {record['penalty_keep_mask']:.2f}")
    for name, kinds, setting in (('proofreading', ('joint', 'denoising'), 'proofreading_warmup_iters'),
                                 ('masking penalty', ('joint', 'denoising', 'remasking'),
                                  'masking_warmup_iters')):
        if config['training_type'] in kinds:
            words.append(f'{name} {ramp(step, config[setting]):.0%}')
    if config['block_warmup_iters']:
        words.append(f"blocks grown {ramp(step, config['block_warmup_iters']):.0%}")
    if record.get('skipped'):
        words.append(f"skipped {record['skipped']}")
    left = int((config['max_iters'] - step) / speed)
    time_left = f'{left // 60}:{left % 60:02d}'
    return f"step {step}/{config['max_iters']}  {'  '.join(words)}  {speed:.1f} it/s  {time_left} left"


def show_samples(samples, meta, config, compare, shown=4):
    """
    Prints a few of the samples drawn and what they are worth.

    Returns the score of the task, or for text without a task compare(texts, lists of ids).
    """
    task, texts = load_task(meta['name']), [sample['text'] for sample in samples]
    lines = [sample_line(text, task) for text in texts[:shown]]
    if hasattr(task, 'picture'):                                    # next to one another
        width = 4 + max(len(line) for block in lines for line in block.splitlines())
        rows = itertools.zip_longest(*map(str.splitlines, lines), fillvalue='')
        lines = [''.join(line.ljust(width) for line in row).rstrip() for row in rows]
    for line in lines:
        print(f'    {line}')
    if not hasattr(task, 'score'):
        given = len(encode(meta, config['sample_prompt'])) + (meta['bos'] is not None)
        return compare([text[len(config['sample_prompt']):] for text in texts],
                       [sample['tokens'][given:] for sample in samples])
    score = scored(task, texts)
    print('    ' + score_line(task, texts, score))
    kept = [name for name in ('valid', 'correct', 'cells') if name in score]
    return {name: score[name] for name in kept or score}


def show_repairs(repair, rows, meta, seed):
    """
    Prints held-out rows (N, T), in each of which one token takes the place of another, and their repair.

    repair: ids, fixed (N, T) -> a list of samples, see sample.fill; seed: which tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = rows if meta['eos'] is not None else rows[:, :40]
    wrong, free = rows.clone(), modelled(rows, meta)[0]
    text = free & ~torch.isin(rows, torch.tensor([id for id in (meta['eos'], meta['pad']) if id is not None]))
    for ids, places in zip(wrong, text):
        if not places.any():                                        # an empty text
            continue
        shuffled = ids[places][torch.randperm(int(places.sum()), generator=generator)]
        at = places.nonzero()[:, 0][torch.randint(len(shuffled), (), generator=generator)]
        ids[at] = shuffled[(shuffled != ids[at]).long().argmax()]   # the first other one
    for before, ids, sample in zip(rows.tolist(), wrong.tolist(), repair(wrong, ~free)):
        before, ids = (decode(meta, row)[0] for row in (before, ids))
        told = 'as it was' if sample['text'] == before else f'was: {before}'
        line = f"one token wrong: {ids}  repaired: {sample['text']}  ({told})"
        print('    ' + line.replace('\n', '⏎'))
