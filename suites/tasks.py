"""
Held-out strings to complete and to mend: num_samples of them, the same in every row, num_seeds draws each.

infill expr=_    correct: the share whose value is right
infill _=value   valid, and with that value; as many holes as the original had tokens, at several numbers of passes
edit             the first operand written anew: valid, and with that value
repair           see repair_rows
"""

import statistics

import torch
from tqdm import tqdm

from plumbing.text import decode, task_canvas
from corruption import modelled
from data.loader import data_of, spread_rows
from parts.noise import NOISE, mixed_noise
from plumbing.checks import parse_mixture
from plumbing.evaluate import per_token
from rules import choose_rules, supports
from sample import fill
from suites.common import cell, checkpoint_of_arithmetic, markdown, wanted, with_errors


def run(s):
    """The suite with bench's settings s: (rows, two tables)."""
    model, meta, config, task, train = checkpoint_of_arithmetic(s)
    clean = spread_rows(data_of(meta, config)[1]['val'], s.num_samples, model.config.block_size)
    texts = [decode(meta, ids)[0] for ids in clean.tolist()]
    heads, values = zip(*(text.split('=') for text in texts))
    can_unmask, causal, detects = supports(config)
    diffusion = [('remask=none', {}), ('remask=random', dict(remask='random'))] if can_unmask else []
    diffusion += [('remask=wrong', dict(remask='wrong'))] if can_unmask and detects else []
    causally = ('remask=causal', dict(remask='causal')) if can_unmask else ('AR', dict(ar_prefix=model.config.block_size))
    asked = []                                                                 # (task, sampler, texts with holes, rules)
    for sampler, rules in diffusion + [causally] * causal:
        asked.append(('infill expr=_', sampler, [f'{head}=_' for head in heads], rules))
    for sampler, rules in diffusion:
        for n in s.budgets:
            holed = [f"{'_' * len(head)}={value}" for head, value in zip(heads, values)]
            asked.append(('infill _=value', f'{sampler}, {n} passes', holed, dict(rules, steps=n)))
        asked.append(('edit', sampler, first_operand_open(texts), dict(rules, steps=8)))
    rows = []
    asked = [] if can_unmask and s.only == 'repair' else wanted(s, asked)
    for name, sampler, holed, rules in tqdm(asked, desc='rows', leave=False):
        canvas, fixed = (torch.cat(parts) for parts in zip(*(task_canvas('infill', model, meta, text, '_') for text in holed)))
        runs = [fill(model, meta, canvas, fixed, batch_size=s.batch_size, seed=s.seed + number, **rules)
                for number in range(s.num_seeds)]
        parsed = [(*task.parse(sample['text']), int(goal)) for run in runs for sample, goal in zip(run, values)]
        row = dict(name=name, sampler=sampler, nfe=statistics.mean(sample['nfe'] for run in runs for sample in run))
        row['valid'] = statistics.mean(valid for valid, *_ in parsed)
        row['correct'] = statistics.mean(valid and value == claimed == goal for valid, value, claimed, goal in parsed)
        rows.append(with_errors(row, len(texts)))
    mended = repair_rows(s, model, meta, config, clean) if can_unmask and (not s.only or 'repair' in s.only) else []
    tables = [markdown([*head, *[f'{m} %' for m in metrics], 'nfe'],
                       [[row['name'], row['sampler'], *[cell(row, m) for m in (*metrics, 'nfe')]] for row in part])
              for head, metrics, part in ((('task', 'sampler'), ('valid', 'correct'), rows),
                                          (('repair', 'how'), ('accuracy', 'by_string', 'exact'), mended)) if part]
    print(f'{len(texts)} held-out strings, {s.num_seeds} draws each, ± standard error over the strings')
    return rows + mended, '\n\n'.join(tables)


def first_operand_open(texts):
    """The texts, a hole in the place of the first operand of each."""
    at = [next(i for i, c in enumerate(text) if c.isdigit()) for text in texts]
    return [f'{text[:i]}_{text[i + 1:]}' for text, i in zip(texts, at)]


def repair_rows(s, model, meta, config, clean, sigma=0.2, noise_mix='mask:0.5,replace:0.2,swap:0.15,delete:0.075,insert:0.075'):
    """
    Repair of clean rows (N, T) under mixed noise: accuracy over the real tokens; by_string, the mean over strings of their share
    of right tokens, start symbol included (the seed's measure, kinder to short strings); exact, the share right as a whole.

    In the seed's protocol an insertion never fires, in the other it does. Beside the repair: doing nothing; doing nothing but
    fill the masks perfectly; one pass that takes the likeliest token everywhere. Greedy, so one draw.
    """
    free, real = modelled(clean, meta)
    rows = []
    device = next(model.parameters()).device
    for protocol, mixture in (("the seed's protocol", noise_mix.replace('insert:0.075', 'insert:0')),
                              ('with insertions', noise_mix)):
        mix = parse_mixture('noise_mix', mixture, NOISE)
        level = sigma * sum(share for _, share in mix)                         # what would have been an insertion does nothing
        noisy = mixed_noise(clean, real, torch.full((len(clean),), level), mix, model.mask_token_id, meta['pad'],
                            torch.Generator().manual_seed(s.seed))
        found = {'nothing': noisy, 'nothing, masks filled perfectly': torch.where(noisy == model.mask_token_id, clean, noisy)}
        with torch.no_grad():
            likeliest = [model.logits(model(part.to(device)), real_only=True).argmax(-1).cpu()
                         for part in noisy.split(s.batch_size)]
        found['the likeliest token everywhere'] = torch.where(free, torch.cat(likeliest), clean)
        nfe = dict(zip(found, (0, 0, 1)))
        if supports(config)[2]:
            rules = choose_rules(config, task='repair', inside=True)
            samples = fill(model, meta, noisy, ~free, batch_size=s.batch_size, seed=s.seed, trace=True, **rules)
            found['--task=repair'] = torch.stack([sample['trace'][-1].cpu() for sample in samples])
            nfe['--task=repair'] = statistics.mean(sample['nfe'] for sample in samples)
        for how, ids in found.items():
            right = ids == clean
            exact = (right | ~real).all(1).double().mean().item()
            row = with_errors(dict(name=protocol, sampler=how, nfe=nfe[how], exact=exact), len(clean))
            row['accuracy'], row['accuracy_se'] = per_token((right & real).sum(1).double(), real.sum(1))
            share = ((right & real).sum(1) + 1).double() / (real.sum(1) + 1)  # (N,) the start symbol counts, as in the seed
            row['by_string'], row['by_string_se'] = per_token(share, torch.ones_like(share))
            rows.append(row)
    return rows
