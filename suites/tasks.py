"""
Held-out strings to complete and to mend: num_samples of them, the same in every row, num_seeds draws each.

infill expr=_    correct: the share whose value is right
infill _=value   valid, and with that value; as many holes as the original had tokens, for all of budgets
edit             the first digit (or character) written anew: valid, and with that value
repair           see repair_rows

The first two are of strings that have one '='. valid and correct are task.py's; without its score correct is
what the string was.
"""

import statistics

import torch
from tqdm import tqdm

from plumbing.text import decode, modelled, scored, task_canvas
from parts.noise import NOISE, mixed_noise
from configurator import UserError
from plumbing.checks import parse_mixture
from plumbing.evaluate import per_token
from parts.presets import choose_rules, supports
from sample import fill
from suites.common import checkpoint_of_rows, held_out_rows, mean_nfe, table_of, wanted, with_errors

# an insertion never fired in the experiment that the first protocol is from
WITHOUT_INSERTIONS = 'mask:0.5,replace:0.2,swap:0.15,delete:0.075,insert:0'
PROTOCOLS = {"without insertions": WITHOUT_INSERTIONS, 'with insertions': WITHOUT_INSERTIONS + '.075'}


def run(s):
    """The suite with bench's settings s: (rows, two tables)."""
    model, checkpoint, (task, _) = checkpoint_of_rows(s)
    meta, config, T = checkpoint['meta'], checkpoint['config'], model.config.block_size
    can_unmask = supports(config).writes
    clean = held_out_rows(s, model, checkpoint)
    texts = [decode(meta, ids)[0] for ids in clean.tolist()]
    if 'given' in meta:
        raise UserError(f"the suite tasks opens any token, {meta['name']} has some that are given: take "
                        '--suite=sudoku')
    asked = rows_of_tasks(s, config, texts, T)
    asked = [] if can_unmask and s.only == 'repair' else wanted(s, asked)

    rows, tables = [], []
    for name, sampler, holed, rules in tqdm(asked, desc='rows', leave=False):
        canvas, fixed = canvas_of(model, meta, holed)
        samples = []
        for number in range(s.num_seeds):
            rules = dict(rules, batch_size=s.batch_size, seed=s.seed + number)
            samples += fill(model, meta, canvas, fixed, **rules)
        shares = right_shares(task, samples, texts * s.num_seeds)
        row = dict(name=name, sampler=sampler, nfe=mean_nfe(samples), **shares)
        rows.append(with_errors(row, len(texts)))
    if rows:
        tables.append(table_of(rows, dict(task='name', sampler='sampler'), ('valid', 'correct', 'nfe')))
    if can_unmask and (not s.only or 'repair' in s.only):
        repaired = repair_rows(s, model, meta, config, clean)
        rows = rows + repaired
        tables.append(table_of(repaired, dict(repair='name', how='sampler'),
                               ('accuracy', 'by_string', 'exact', 'nfe')))
    print(f'{len(texts)} held-out strings, {s.num_seeds} draws each, ± standard error over the strings')
    return rows, '\n\n'.join(tables)


def rows_of_tasks(s, config, texts, block_size):
    """What is to be completed: (task, sampler, the texts with holes, keywords of sample.fill)."""
    can_unmask, causal, detects = supports(config)
    kinds = ['none', 'random'] + ['wrong'] * detects if can_unmask else []
    opened = first_operand_open(texts)
    edits = [('edit', f'remask={kind}', opened, dict(remask=kind, steps=8)) for kind in kinds]
    if any(text.count('=') != 1 for text in texts):
        return edits
    heads, values = zip(*(text.split('=') for text in texts))
    open_ends = [f'{head}=_' for head in heads]
    open_heads = [f"{'_' * len(head)}={value}" for head, value in zip(heads, values)]

    rows = [('infill expr=_', f'remask={kind}', open_ends, dict(remask=kind))
            for kind in kinds + ['causal'] * (can_unmask and causal)]
    if not can_unmask and causal:
        rows.append(('infill expr=_', 'AR', open_ends, dict(ar_prefix=block_size)))
    for kind, edit in zip(kinds, edits):
        rows += [('infill _=value', f'remask={kind}, {n} passes', open_heads, dict(remask=kind, steps=n))
                 for n in s.budgets]
        rows.append(edit)
    return rows


def first_operand_open(texts):
    """The texts, a hole in the place of the first operand of each."""
    at = [next((i for i, c in enumerate(text) if c.isdigit()), 0) for text in texts]
    return [f'{text[:i]}_{text[i + 1:]}' for text, i in zip(texts, at)]


def canvas_of(model, meta, holed):
    """Texts in which _ is a hole, as (canvas (N, T), fixed (N, T))."""
    canvases = [task_canvas('infill', model, meta, text, '_') for text in holed]
    return [torch.cat(parts) for parts in zip(*canvases)]


def right_shares(task, samples, originals):
    """
    The share of samples that are valid, and that are correct, with what stands behind the '=' of the
    originals, texts.
    """
    valid, correct = [], []
    for sample, before in zip(samples, originals):
        text = sample['text']
        found = scored(task, [text])
        valid.append(found.get('valid'))
        same = text.partition('=')[2] == before.partition('=')[2]
        correct.append(found['correct'] * same if 'correct' in found else text == before)
    return dict(valid=None if None in valid else statistics.mean(valid), correct=statistics.mean(correct))


def with_noise(model, meta, clean, mixture, level, rng):
    """Clean rows (N, T) under mixed noise of a level (N,). What a mixture lacks of 1 does nothing."""
    mix = parse_mixture('noise_mix', mixture, NOISE)
    level = (level * sum(share for _, share in mix)).float()
    return mixed_noise(clean, modelled(clean, meta)[1], level, mix, model.mask_token_id, meta['pad'], rng)


def repair_rows(s, model, meta, config, clean, sigma=0.2, protocols=PROTOCOLS):
    """
    Repair of clean rows (N, T) under mixed noise, beside what takes no repair. Greedy, so one draw.

    accuracy over the real tokens; by_string, the mean over strings of their share of right tokens, with the
    start symbol (kinder to short strings); exact, the share of strings that are right as a whole.
    """
    real = modelled(clean, meta)[1]
    rows = []
    for protocol, mixture in protocols.items():
        level = torch.full((len(clean),), sigma, dtype=torch.float64)
        noisy = with_noise(model, meta, clean, mixture, level, torch.Generator().manual_seed(s.seed))
        for how, (ids, nfe) in ways_to_repair(s, model, meta, config, clean, noisy).items():
            right = ids == clean
            exact = (right | ~real).all(1).double().mean().item()
            row = with_errors(dict(name=protocol, sampler=how, nfe=nfe, exact=exact), len(clean))
            row['accuracy'], row['accuracy_se'] = per_token((right & real).sum(1).double(), real.sum(1))
            share = ((right & real).sum(1) + 1).double() / (real.sum(1) + 1)  # (N,) the start symbol counts
            row['by_string'], row['by_string_se'] = per_token(share, torch.ones_like(share))
            rows.append(row)
    return rows


@torch.no_grad()
def ways_to_repair(s, model, meta, config, clean, noisy):
    """{way: (what it makes of noisy (N, T), its passes)}: nothing, one pass, and what --task=repair does."""
    free = modelled(clean, meta)[0]
    device = next(model.parameters()).device
    likeliest = torch.cat([model.logits(model(part.to(device)), real_only=True).argmax(-1).cpu()
                           for part in noisy.split(s.batch_size)])
    unmasked = torch.where(noisy == model.mask_token_id, clean, noisy)
    ways = {'nothing': (noisy, 0.0), 'nothing, masks filled perfectly': (unmasked, 0.0),
            'the likeliest token everywhere': (torch.where(free, likeliest, clean), 1.0)}
    if supports(config).detects:
        rules = choose_rules(config, task='repair', inside=True)
        samples = fill(model, meta, noisy, ~free, batch_size=s.batch_size, seed=s.seed, trace=True, **rules)
        ids = torch.stack([sample['trace'][-1].cpu() for sample in samples])
        ways['--task=repair'] = ids, mean_nfe(samples)
    return ways
