"""
Everything that is measured.

    python bench.py --suite=arithmetic --init_from=ckpt                 the generation table of one checkpoint
    python bench.py --suite=arithmetic --num_samples=200 --num_seeds=1  the same, quickly
    python bench.py --suite=arithmetic --json=table.json                and as JSON
    python bench.py --suite=samplers                                    every rule and preset at 8, 16, 32 and 64 passes
    python bench.py --suite=tasks                                       infill, repair and edit held-out strings
    python bench.py --suite=checkpoints --init_from='out/*/ckpt_*.pt'   training runs compared, seeds of one config together
"""

import glob
import json as jsonlib
import math
import random
import statistics
import sys
import time

import torch
from tqdm import tqdm

import configurator
from canvas import decode, load_task, task_canvas
from configurator import UserError
from corruption import NOISE, mixed_noise, modelled, parse_mixture
from data.loader import load_data, spread_rows
from evaluation import evaluate, per_token
from model import configure_compute, load_checkpoint, write_atomically
from rules import PRESETS, choose_rules, supports
from sample import check_folder, fill, find_checkpoint, generate, load_merged

# -----------------------------------------------------------------------------
suite = 'arithmetic'     # what to measure: arithmetic | samplers | tasks (of one checkpoint) | checkpoints (training runs)
init_from = 'ckpt'       # 'ckpt': the newest checkpoint under out_dir; or a path; checkpoints: paths or patterns, a comma between
merge_from: str = None   # another checkpoint, merged with the first (see sample.py); checkpoints: as many as init_from
merge_weight = 0.5       # its share
out_dir = 'out'          # where 'ckpt' looks
num_samples = 1000       # samples a row and seed
num_seeds = 3            # arithmetic: seeds a row
steps = 64               # arithmetic, checkpoints: passes that the diffusion samplers get
budgets = (8, 16, 32, 64)  # samplers: passes
remask_rate = 0.3        # checkpoints: of remask=wrong
eval_rows = 1000         # checkpoints: rows of the validation split
only: str = None         # measure only the rows whose name contains this text, or one of several with commas between
seed = 1337              # the first seed
batch_size = 125         # samples drawn at a time
json: str = None         # also write the table to this file
device = 'auto'          # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'           # auto | float32 | bfloat16
attention = 'auto'       # auto | plain | sdpa
compile = False          # torch.compile the network
# -----------------------------------------------------------------------------

METRICS = ('balanced', 'valid', 'correct', 'unique', 'novel', 'mean_length', 'length_tv', 'nfe')
SHARES = ('balanced', 'valid', 'correct', 'unique', 'novel', 'fixed', 'refilled', 'accuracy', 'exact')


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
    scale, digits = (100, 1) if metric in SHARES else (1, 1 if metric in ('nfe', 'mean_length') else 3)
    return f'{scale * value:.{digits}f}' + ('' if error is None or math.isnan(error) else f' ± {scale * error:.{digits}f}')


def markdown(head, lines):
    """A Markdown table that also reads well on screen."""
    lines = [head, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ['| ' + ' | '.join(value.ljust(width) for value, width in zip(line, widths)) + ' |' for line in lines]
    text.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    return '\n'.join(text)


def load(path, other=None):
    """The model of a checkpoint, ready to compute, and the checkpoint; merged with the other if there is one."""
    model, checkpoint = load_merged(path, other, merge_weight) if other else load_checkpoint(path)
    model, choices = configure_compute(model, device, dtype, attention, compile)
    tqdm.write(f"{path}: {checkpoint['config']['training_type']} on {checkpoint['meta']['name']}, iteration "
               f"{checkpoint['iter_num']}, {model.num_params():,} parameters; {choices}")
    return model, checkpoint


def checkpoint_of_arithmetic():
    """(model, meta, config, task module, set of training strings) of the one checkpoint that is measured."""
    model, checkpoint = load(find_checkpoint(init_from, out_dir), merge_from)
    meta, config = checkpoint['meta'], checkpoint['config']
    return model, meta, config, *training_strings(meta)


def measure(model, meta, task, train, name, rules, protocol='free', more=None):
    """One row: num_seeds x num_samples of a sampler, scored. more: columns to add."""
    scores, t0 = [], time.time()
    for s in range(num_seeds):
        lengths = None
        if protocol == 'given':
            lengths = torch.tensor([len(text) for text in fresh_draws(task, s)])
        samples = generate(model, meta, num_samples, lengths=lengths, batch_size=batch_size, seed=seed + s, **rules)
        score = task.score([sample['text'] for sample in samples], train)
        scores.append({**score, 'nfe': statistics.mean(sample['nfe'] for sample in samples)})
    row = {**summary(name, protocol, scores, num_samples, time.time() - t0), **(more or {})}
    tqdm.write(f'{name}, {protocol}: ' + ', '.join(f'{metric} {cell(row, metric)}' for metric in METRICS))
    return row


def fresh_draws(task, s):
    """num_samples strings of the grammar, for the seed of number s."""
    rng = random.Random(f'bench {seed + s}')
    return [task.draw(rng)[0] for _ in range(num_samples)]


def wanted(rows):
    """The rows whose name contains the setting only. Raises UserError if there are none."""
    found = [row for row in rows if not only or any(part in row[0] for part in only.split(','))]
    if not found:
        raise UserError(f"no row's name contains '{only}'" if only else 'this checkpoint cannot write')
    return found


def arithmetic():
    """
    The generation table: every sampler on the same checkpoint, num_seeds x num_samples each, at temperature 1.

    'free': the length is the model's own decision; 'given': the true length of a fresh draw is fixed in advance.
    The first row scores fresh draws of the grammar: what a perfect model would get at this n. Returns (rows, table).
    """
    model, meta, config, task, train = checkpoint_of_arithmetic()
    perfect = [{**task.score(fresh_draws(task, s), train), 'nfe': 0} for s in range(num_seeds)]
    rows = [summary('the grammar itself', 'free', perfect, num_samples)]
    for name, protocol, rules in tqdm(wanted(sampler_rows(config, steps, model.config.block_size)), desc='rows', leave=False):
        rows.append(measure(model, meta, task, train, name, rules, protocol))
    print(f'{num_seeds} seeds x {num_samples} samples, ± standard error')
    return rows, markdown(['sampler', 'start', *[f'{m} %' if m in SHARES else m for m in METRICS]],
                          [[row['name'], row['protocol'], *[cell(row, m) for m in METRICS]] for row in rows])


def budget_rows(config, block_size):
    """The samplers of the suite samplers: (name, whether it takes a budget of passes, keywords of sample.generate)."""
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


def samplers():
    """
    Every rule and preset on the same checkpoint at every budget of passes, num_seeds x num_samples each, the length being the
    model's own decision, temperature 1. Returns (rows, two tables: one column a budget).
    """
    model, meta, config, task, train = checkpoint_of_arithmetic()
    ids = tuple(meta['itos'].index(c) for c in '()=+*')
    rows, lines = [], ([], [])
    for name, takes, rules in tqdm(wanted(budget_rows(config, model.config.block_size)), desc='rows', leave=False):
        if rules.get('commit') == 'priority':
            rules = dict(rules, priority=ids)
        found = []
        for n in budgets if takes else (None,):
            how = dict(rules, steps=n) if takes else rules
            if takes and 'ar_prefix' in rules:
                how.update(steps=n - n // 2, ar_prefix=n // 2)
            found.append(measure(model, meta, task, train, name, how, more=dict(budget=n)))
        rows += found
        cells = found if takes else found + [None] * (len(budgets) - 1)
        for line, metrics in zip(lines, (('valid', 'length_tv'), ('correct', 'unique', 'novel'))):
            line.append([name if takes else f"{name}: {cell(found[0], 'nfe')} passes",
                         *['' if row is None else ' · '.join(cell(row, m) for m in metrics) for row in cells]])
    print(f'{num_seeds} seeds x {num_samples} samples, ± standard error')
    heads = ('valid % · length_tv', 'correct % · unique % · novel %')
    return rows, '\n\n'.join(markdown([head, *[f'{n} passes' for n in budgets]], line) for head, line in zip(heads, lines))


def training_strings(meta):
    """The task of the dataset and the set of its training strings. Raises UserError if it is not arithmetic."""
    if meta['name'] != 'arithmetic':
        raise UserError(f"the suite {suite} needs checkpoints trained on arithmetic, this one saw {meta['name']}")
    return load_task(meta['name']), {decode(meta, ids)[0] for ids in load_data('arithmetic')[1]['train'].tolist()}


# -----------------------------------------------------------------------------
# infill, edit, repair


def tasks():
    """
    Held-out strings to complete and to mend: num_samples of them, the same in every row, num_seeds draws each.

    infill expr=_    correct: the share whose value is right
    infill _=value   valid, and with that value; as many holes as the original had tokens, at several numbers of passes
    edit             the first operand written anew: valid, and with that value
    repair           see repair_rows
    Returns (rows, two tables).
    """
    model, meta, config, task, train = checkpoint_of_arithmetic()
    clean = spread_rows(load_data('arithmetic')[1]['val'], num_samples, model.config.block_size)
    texts = [decode(meta, ids)[0] for ids in clean.tolist()]
    heads, values = zip(*(text.split('=') for text in texts))
    at = [next(i for i, c in enumerate(text) if c.isdigit()) for text in texts]
    _, causal, detects = supports(config)
    diffusion = [('remask=none', {}), ('remask=random', dict(remask='random'))]
    diffusion += [('remask=wrong', dict(remask='wrong'))] if detects else []
    asked = []                                                                 # (task, sampler, texts with holes, rules)
    for sampler, rules in diffusion + ([('remask=causal', dict(remask='causal'))] if causal else []):
        asked.append(('infill expr=_', sampler, [f'{head}=_' for head in heads], rules))
    for sampler, rules in diffusion:
        for n in budgets:
            holed = [f"{'_' * len(head)}={value}" for head, value in zip(heads, values)]
            asked.append(('infill _=value', f'{sampler}, {n} passes', holed, dict(rules, steps=n)))
        asked.append(('edit', sampler, [f'{text[:i]}_{text[i + 1:]}' for text, i in zip(texts, at)], dict(rules, steps=8)))
    rows = []
    for name, sampler, holed, rules in tqdm([] if only == 'repair' else wanted(asked), desc='rows', leave=False):
        canvas, fixed = (torch.cat(parts) for parts in zip(*(task_canvas('infill', model, meta, text, '_') for text in holed)))
        runs = [fill(model, meta, canvas, fixed, batch_size=batch_size, seed=seed + s, **rules) for s in range(num_seeds)]
        parsed = [(*task.parse(sample['text']), int(goal)) for run in runs for sample, goal in zip(run, values)]
        row = dict(name=name, sampler=sampler, nfe=statistics.mean(sample['nfe'] for run in runs for sample in run))
        row['valid'] = statistics.mean(valid for valid, *_ in parsed)
        row['correct'] = statistics.mean(valid and value == claimed == goal for valid, value, claimed, goal in parsed)
        rows.append(with_errors(row, len(texts)))
    mended = repair_rows(model, meta, config, clean) if not only or 'repair' in only else []
    tables = [markdown([*head, *[f'{m} %' for m in metrics], 'nfe'],
                       [[row['name'], row['sampler'], *[cell(row, m) for m in (*metrics, 'nfe')]] for row in part])
              for head, metrics, part in ((('task', 'sampler'), ('valid', 'correct'), rows),
                                          (('repair', 'how'), ('accuracy', 'exact'), mended)) if part]
    print(f'{len(texts)} held-out strings, {num_seeds} draws each, ± standard error over the strings')
    return rows + mended, '\n\n'.join(tables)


def with_errors(row, n):
    """row, with the binomial standard error of its shares over n strings (draws of one string are not independent)."""
    errors = {f'{name}_se': (value * (1 - value) / n) ** 0.5 for name, value in row.items() if name in SHARES}
    return {**row, **errors, 'nfe_se': None}


def repair_rows(model, meta, config, clean, sigma=0.2, noise_mix='mask:0.5,replace:0.2,swap:0.15,delete:0.075,insert:0.075'):
    """
    Repair of clean rows (N, T) under mixed noise: accuracy over the real tokens and exact, the share that is right as a whole.

    In the seed's protocol an insertion never fires, in the other it does. Beside the repair: doing nothing; doing nothing but
    fill the masks perfectly; one pass that takes the likeliest token everywhere. Greedy, so one draw.
    """
    free, real = modelled(clean, meta)
    rows = []
    device = next(model.parameters()).device
    for protocol, mixture in (("the seed's protocol", noise_mix.replace('insert:0.075', 'insert:0')), ('with insertions', noise_mix)):
        mix = parse_mixture('noise_mix', mixture, NOISE)
        level = sigma * sum(share for _, share in mix)                         # what would have been an insertion does nothing
        noisy = mixed_noise(clean, real, torch.full((len(clean),), level), mix, model.mask_token_id, meta['pad'],
                            torch.Generator().manual_seed(seed))
        found = {'nothing': noisy, 'nothing, masks filled perfectly': torch.where(noisy == model.mask_token_id, clean, noisy)}
        with torch.no_grad():
            likeliest = [model.logits(model(part.to(device)), real_only=True).argmax(-1).cpu() for part in noisy.split(batch_size)]
        found['the likeliest token everywhere'] = torch.where(free, torch.cat(likeliest), clean)
        nfe = dict(zip(found, (0, 0, 1)))
        if supports(config)[2]:
            rules = choose_rules(config, task='repair', inside=True)
            samples = fill(model, meta, noisy, ~free, batch_size=batch_size, seed=seed, trace=True, **rules)
            found['--task=repair'] = torch.stack([sample['trace'][-1].cpu() for sample in samples])
            nfe['--task=repair'] = statistics.mean(sample['nfe'] for sample in samples)
        for how, ids in found.items():
            right = ids == clean
            exact = (right | ~real).all(1).double().mean().item()
            row = with_errors(dict(name=protocol, sampler=how, nfe=nfe[how], exact=exact), len(clean))
            row['accuracy'], row['accuracy_se'] = per_token((right & real).sum(1).double(), real.sum(1))
            rows.append(row)
    return rows


# -----------------------------------------------------------------------------
# training runs


VALIDATION = ('nelbo', 'causal_nll', 'auc', 'fixed', 'refilled')
GENERATED = ('valid', 'correct', 'length_tv', 'unique', 'nfe')
# settings that say nothing about what was learned
IGNORED = ('seed', 'out_dir', 'eval_interval', 'eval_rows', 'eval_samples', 'eval_only', 'log_interval', 'keep_every', 'wandb_log',
           'wandb_project', 'wandb_run_name', 'device', 'dtype', 'attention', 'compile')


def recipe(config):
    """What of a run's settings decides about the result; of a path only that there is one."""
    return {name: 'a checkpoint' if name in ('init_from', 'guess_from') and value not in (None, 'scratch', 'resume') else value
            for name, value in config.items() if name not in IGNORED}


def checkpoint_scores(path, other=None):
    """(validation: dict of VALIDATION, what there is of it; {sampler: dict of GENERATED}) of one checkpoint."""
    model, checkpoint = load(path, other)
    meta, config = checkpoint['meta'], checkpoint['config']
    task, train = training_strings(meta)
    can_unmask, causal, detects = supports(config)
    writer = model
    if config.get('guess_from') and not can_unmask:
        writer, _ = load_checkpoint(config['guess_from'])
        configure_compute(writer, device, dtype, attention, compile)
    writes = can_unmask or writer is not model
    val = spread_rows(load_data('arithmetic')[1]['val'], eval_rows, model.config.block_size)
    validation = evaluate(model, val, meta, causal=causal, bidirectional=can_unmask, detects=detects and writes, guesser=writer)
    rules = {'remask=none': dict(remask='none')} if writes else {}
    if writes and detects:
        rules['remask=wrong'] = dict(remask='wrong', remask_rate=remask_rate, remask_model=None if writer is model else model)
    if config.get('allow_abstain'):
        rules['commit=abstain'] = dict(commit='abstain')
    if causal and can_unmask:
        rules['remask=causal'] = dict(remask='causal')
    scores = {}
    for name, more in rules.items():
        if not only or only in name:
            # a judge of its own takes a pass as well
            passes = max(1, steps // 2) if more.get('remask_model') else steps
            samples = generate(writer, meta, num_samples, batch_size=batch_size, seed=seed, steps=passes, **more)
            score = task.score([sample['text'] for sample in samples], train)
            scores[name] = {**score, 'nfe': statistics.mean(sample['nfe'] for sample in samples)}
    return validation, scores


def checkpoints():
    """
    Training runs side by side: runs that differ in their seed only share a row, ± the standard error over these seeds.

    A row is named by what it sets differently from the first run. Returns (rows, table).
    """
    paths, others = ([path for pattern in patterns.split(',') for path in sorted(glob.glob(pattern))]
                     for patterns in (init_from, merge_from or ''))
    if not paths:
        raise UserError(f"no checkpoint matches '{init_from}'")
    if merge_from and len(others) != len(paths):
        raise UserError(f"merge_from='{merge_from}' matches {len(others)} checkpoints, init_from {len(paths)}")
    groups, first = {}, None
    with tqdm(list(zip(paths, others or [None] * len(paths))), desc='checkpoints', leave=False) as bar:
        for path, other in bar:
            config = recipe(load_checkpoint(path)[1]['config'])
            first = first or config
            changes = ', '.join(f'{name}={value}' for name, value in config.items() if value != first.get(name, value))
            groups.setdefault(changes or 'the first', []).append(checkpoint_scores(path, other))
    rows = []
    for name, runs in groups.items():
        rows.append(dict(name=name, sampler='', seeds=len(runs), **mean_and_error([run[0] for run in runs], VALIDATION)))
        for sampler in runs[0][1]:
            rows.append(dict(name=name, sampler=sampler, seeds=len(runs),
                             **mean_and_error([run[1][sampler] for run in runs], GENERATED)))
    print(f'{num_samples} samples a seed and sampler, ± standard error over training seeds\n')
    validation = [[row['name'], str(row['seeds']), *[cell(row, m) for m in VALIDATION]] for row in rows if not row['sampler']]
    generated = [[row['name'], row['sampler'], *[cell(row, m) for m in GENERATED]] for row in rows if row['sampler']]
    head = {m: f'{m} %' if m in SHARES else m for m in (*VALIDATION, *GENERATED)}
    table = markdown(['run', 'seeds', *[head[m] for m in VALIDATION]], validation)
    if generated:
        table += '\n\n' + markdown(['run', 'sampler', *[head[m] for m in GENERATED]], generated)
    return rows, table


def mean_and_error(scores, metrics):
    """The mean of every metric over the runs, and its standard error from their spread (one run: None)."""
    row = {}
    for metric in metrics:
        values = [score.get(metric) for score in scores]
        there = None not in values
        row[metric] = statistics.mean(values) if there else None
        row[f'{metric}_se'] = statistics.stdev(values) / len(values) ** 0.5 if there and len(values) > 1 else None
    return row


SUITES = dict(arithmetic=arithmetic, samplers=samplers, tasks=tasks, checkpoints=checkpoints)


def main():
    if suite not in SUITES:
        raise UserError(f"suite expects one of {', '.join(SUITES)}; got '{suite}'")
    for name in ('num_samples', 'num_seeds', 'steps', 'batch_size', 'eval_rows'):
        if globals()[name] < 1:
            raise UserError(f'{name} must be at least 1, got {globals()[name]}')
    for name in ('merge_weight', 'remask_rate'):
        if not 0 <= globals()[name] <= 1:
            raise UserError(f'{name} must be in 0..1, got {globals()[name]}')
    check_folder(json)
    rows, table = SUITES[suite]()
    print(table)
    if json:
        command = 'python bench.py ' + ' '.join(sys.argv[1:])
        write_atomically(json, jsonlib.dumps(dict(command=command, rows=rows), indent=1) + '\n')
        print(f'written to {json}')


if __name__ == '__main__':
    configurator.run(globals())
