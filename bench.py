"""
Everything that is measured.

    python bench.py --suite=arithmetic --init_from=ckpt                 the generation table of one checkpoint
    python bench.py --suite=arithmetic --num_samples=200 --num_seeds=1  the same, quickly
    python bench.py --suite=arithmetic --json=table.json                and as JSON
"""

import json as jsonlib
import math
import random
import statistics
import sys
import time

import torch
from tqdm import tqdm

import configurator
from configurator import UserError
from model import configure_compute, load_checkpoint
from sample import check_folder, decode, find_checkpoint, generate, load_task, supports, write_atomically
from train import load_data

# -----------------------------------------------------------------------------
suite = 'arithmetic'     # what to measure: arithmetic
init_from = 'ckpt'       # 'ckpt': the newest checkpoint under out_dir; or the path of one
out_dir = 'out'          # where 'ckpt' looks
num_samples = 1000       # samples a row and seed
num_seeds = 3            # seeds a row
steps = 64               # passes that the diffusion samplers get
only: str = None         # measure only the rows whose name contains this text
seed = 1337              # the first seed
batch_size = 125         # samples drawn at a time
json: str = None         # also write the table to this file
device = 'auto'          # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'           # auto | float32 | bfloat16
attention = 'auto'       # auto | plain | sdpa
compile = False          # torch.compile the network
# -----------------------------------------------------------------------------

METRICS = ('balanced', 'valid', 'correct', 'unique', 'novel', 'mean_length', 'length_tv', 'nfe')
SHARES = ('balanced', 'valid', 'correct', 'unique', 'novel')


def sampler_rows(config, steps, block_size):
    """The samplers that a checkpoint of this config supports: (name, protocol, keywords of sample.generate)."""
    can_unmask, causal, detects = supports(config)
    rows = []
    if causal:
        rows.append(('AR: causal pass, one token a pass', 'free', dict(ar_prefix=block_size)))
    if causal and can_unmask:
        rows += [('remask=causal: bidirectional draft, causal verdict', 'free', dict(remask='causal')),
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


def standard_error(values, name, n):
    """
    Of the mean of a metric over seeds with n samples each; None if it cannot be told from a single seed.

    A share of independent samples: binomial over all of them, which is surer than the spread of a few seeds. The others
    (unique and length_tv are properties of the n samples together): from the spread over the seeds.
    """
    if name in SHARES and name != 'unique':
        mean = statistics.mean(values)
        return (mean * (1 - mean) / (n * len(values))) ** 0.5
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def summary(name, protocol, scores, n, seconds=None):
    """One row of the table: every metric with its standard error, from the score of every seed."""
    row = dict(name=name, protocol=protocol, n=n, seeds=len(scores), seconds=seconds)
    for metric in METRICS:
        values = [score[metric] for score in scores]
        row[metric] = statistics.mean(values) if None not in values else None
        row[f'{metric}_se'] = standard_error(values, metric, n) if None not in values else None
    return row


def cell(row, metric):
    """A metric as text: shares in per cent, with the standard error where there is one."""
    value, error = row[metric], row[f'{metric}_se']
    if value is None:
        return '—'
    scale, digits = (100, 1) if metric in SHARES else (1, 3 if metric == 'length_tv' else 1)
    return f'{scale * value:.{digits}f}' + ('' if error is None or math.isnan(error) else f' ± {scale * error:.{digits}f}')


def markdown(rows):
    """The rows as a Markdown table that also reads well on screen."""
    head = ['sampler', 'start', *[f'{m} %' if m in SHARES else m for m in METRICS]]
    lines = [head, *[[row['name'], row['protocol'], *[cell(row, m) for m in METRICS]] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ['| ' + ' | '.join(value.ljust(width) for value, width in zip(line, widths)) + ' |' for line in lines]
    text.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    return '\n'.join(text)


def arithmetic(model, checkpoint):
    """
    The generation table: every sampler on the same checkpoint, num_seeds x num_samples each, at temperature 1.

    'free': the length is the model's own decision; 'given': the true length of a fresh draw is fixed in advance.
    The first row scores fresh draws of the grammar: what a perfect model would get at this n.
    """
    meta, config = checkpoint['meta'], checkpoint['config']
    task = load_task(meta['name'])
    if meta['name'] != 'arithmetic':
        raise UserError(f"the suite arithmetic needs a checkpoint trained on arithmetic, this one saw {meta['name']}")
    _, data = load_data('arithmetic')
    train = {decode(meta, ids)[0] for ids in data['train'].tolist()}
    draws = [[task.draw(rng)[0] for _ in range(num_samples)]
             for rng in (random.Random(f'bench {seed + s}') for s in range(num_seeds))]
    rows = [summary('the grammar itself', 'free', [{**task.score(texts, train), 'nfe': 0} for texts in draws], num_samples)]
    todo = [row for row in sampler_rows(config, steps, model.config.block_size) if not only or only in row[0]]
    if not todo:
        raise UserError(f"no row's name contains '{only}'" if only else 'this checkpoint cannot write')
    with tqdm(total=len(todo) * num_seeds, desc='rows x seeds', leave=False) as bar:
        for name, protocol, rules in todo:
            scores, t0 = [], time.time()
            for s in range(num_seeds):
                lengths = torch.tensor([len(text) for text in draws[s]]) if protocol == 'given' else None
                samples = generate(model, meta, num_samples, lengths=lengths, batch_size=batch_size, seed=seed + s, **rules)
                score = task.score([sample['text'] for sample in samples], train)
                scores.append({**score, 'nfe': statistics.mean(sample['nfe'] for sample in samples)})
                bar.update()
            rows.append(summary(name, protocol, scores, num_samples, time.time() - t0))
            bar.write(f'{name}, {protocol}: ' + ', '.join(f'{metric} {cell(rows[-1], metric)}' for metric in METRICS))
    return rows


SUITES = {'arithmetic': arithmetic}


def main():
    if suite not in SUITES:
        raise UserError(f"suite expects one of {', '.join(SUITES)}; got '{suite}'")
    for name in ('num_samples', 'num_seeds', 'steps', 'batch_size'):
        if globals()[name] < 1:
            raise UserError(f'{name} must be at least 1, got {globals()[name]}')
    check_folder(json)
    path = find_checkpoint(init_from, out_dir)
    model, checkpoint = load_checkpoint(path)
    model, choices = configure_compute(model, device, dtype, attention, compile)
    print(f"{path}: {checkpoint['config']['training_type']} on {checkpoint['meta']['name']}, iteration "
          f"{checkpoint['iter_num']}, {model.num_params():,} parameters; {choices}")
    rows = SUITES[suite](model, checkpoint)
    print(f'{num_seeds} seeds x {num_samples} samples, ± standard error\n' + markdown(rows))
    if json:
        command = 'python bench.py ' + ' '.join(sys.argv[1:])
        write_atomically(json, jsonlib.dumps(dict(command=command, checkpoint=path, config=checkpoint['config'],
                                                  result=checkpoint.get('result'), rows=rows), indent=1) + '\n')
        print(f'written to {json}')


if __name__ == '__main__':
    configurator.run(globals())
