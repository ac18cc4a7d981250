"""
Held-out sudoku puzzles: num_samples of them, the same in every row, num_seeds draws each, at
temperature 1 where no other stands.

The samplers at 1, 2, 4 and 8 cells a pass: correct, the puzzles that are solved, and cells, of those to fill.
repair: the solution with 1, 3 or 5 wrong cells, any other digit each, which are not known: auc, how well
p(WRONG) tells them from the right ones, and exact, the boards that --task=repair restores; its draws are of
the wrong cells.
"""

import torch
from tqdm import tqdm

from configurator import UserError
from parts.presets import PRESETS, choose_rules, supports
from parts.speculate import causal_pass
from plumbing.checkpoint import find_checkpoint
from plumbing.draw import draw, filtered, forbid
from plumbing.evaluate import p_wrong, per_token, roc_auc
from plumbing.rows import random_subset
from plumbing.text import modelled
from sample import fill
from suites.common import asked_for, cells, headings, held_out_rows, load, markdown, table_of, wanted

CELLS = (1, 2, 4, 8)             # cells a pass
WRONG = (1, 3, 5)                # wrong cells to repair
METRICS = ('correct', 'cells', 'nfe')


def sampler_rows(config):
    """The samplers of a checkpoint of this config: (name, keywords of sample.fill; None: left to right)."""
    can_unmask, causal, detects = supports(config)
    rows = [(causal, 'causal: left to right', None),
            (can_unmask, 'random order, remask=none', PRESETS['ancestral']),
            (can_unmask, 'most probable first', PRESETS['surest']),
            (can_unmask, 'commit=margin', dict(commit='margin', remask='none')),
            (can_unmask, 'random order, remask=random', dict(remask='random')),
            (can_unmask, 'random order, remask=remdm', PRESETS['remdm']),
            (can_unmask, 'random order, remask=confidence', dict(remask='confidence')),
            (can_unmask and detects, 'random order, remask=p2', PRESETS['p2']),
            (can_unmask and detects, 'random order, remask=wrong', dict(remask='wrong')),
            (can_unmask and detects, 'random order, redraft', PRESETS['redraft']),
            (can_unmask and detects, 'redraft while doubted (preset solve)', PRESETS['solve']),
            (can_unmask and detects, 'commit=margin, remask=wrong', dict(commit='margin', remask='wrong'))]
    rows += [(known, f'{name}, temperature 0.1', dict(rules, temperature=0.1)) for known, name, rules in rows
             if name in ('random order, remask=none', 'commit=margin', 'random order, redraft')]
    return [row for known, *row in rows if known]


@torch.no_grad()
def left_to_right(model, meta, canvas, seed):
    """
    Fills canvas (B, T), with as many masks in each row, by the causal mode: (ids (B, T), passes (B,)).

    What is given right of a mask it does not see.
    """
    generator, x = torch.Generator(canvas.device).manual_seed(seed), canvas.clone()
    count = (x == model.mask_token_id).sum(1)
    for _ in range(count[0]):
        hole = (x == model.mask_token_id).long().argmax(1, keepdim=True)                   # (B, 1)
        logits = model.logits(causal_pass(model, x, hole)[:, 0], real_only=True)
        logits = forbid(logits, meta['given'], hole >= 0)
        x = x.scatter(1, hole, draw(filtered(logits), generator)[:, None])
    return x, count


def solve(s, model, meta, clean, rules, each, seed):
    """Clean rows (N, T) whose free cells are filled anew, that many a pass: (ids (N, T), passes (N,))."""
    free = modelled(clean, meta)[0]
    canvas, count = clean.masked_fill(free, model.mask_token_id), free.sum(1)
    ids, passes = clean.clone(), torch.zeros(len(clean), dtype=torch.long)
    for holes in count.unique().tolist():                           # of these the passes are the same
        for rows in (count == holes).nonzero()[:, 0].split(s.batch_size):
            if rules is None:
                device = next(model.parameters()).device
                found, nfe = left_to_right(model, meta, canvas[rows].to(device), seed)
            else:
                samples = fill(model, meta, canvas[rows], ~free[rows], batch_size=s.batch_size, seed=seed,
                               **{**rules, 'steps': -(-holes // each)})
                found = torch.tensor([sample['tokens'] for sample in samples])
                nfe = torch.tensor([sample['nfe'] for sample in samples])
            ids[rows], passes[rows] = found.cpu(), nfe.cpu()
    return ids, passes


def worth(clean, free, draws):
    """A row of the table: what draws, a list of (ids (N, T), passes (N,)), have of clean rows (N, T)."""
    right = torch.stack([(ids == clean) & free for ids, _ in draws]).sum(2).double()       # (seeds, N)
    free = free.sum(1)
    row = {}
    row['correct'], row['correct_se'] = per_token((right == free).double().mean(0), torch.ones_like(free))
    row['cells'], row['cells_se'] = per_token(right.mean(0), free)
    nfe = torch.stack([passes for _, passes in draws]).double().mean(0)
    row['nfe'], row['nfe_se'] = per_token(nfe, torch.ones_like(free))
    return row


@torch.no_grad()
def repair(s, model, meta, config, clean, many):
    """One row: solved boards (N, T) with that many wrong cells, see above."""
    free, N = modelled(clean, meta)[0], meta['vocab_size'] // 2
    device, rules = next(model.parameters()).device, choose_rules(config, task='repair', inside=True)
    draws, doubts, labels = [], [], []
    for number in range(s.num_seeds):
        rng = torch.Generator().manual_seed(s.seed + number)
        wrong = random_subset(free, torch.full((len(clean),), many), rng)
        other = (clean + torch.randint(1, N, clean.shape, generator=rng)) % N              # another digit
        board = torch.where(wrong, other, clean)
        doubt = [p_wrong(model, model(rows), rows).cpu() for rows in board.to(device).split(s.batch_size)]
        doubts.append(torch.cat(doubt)[free])
        labels.append(wrong[free])
        samples = fill(model, meta, board, ~free, batch_size=s.batch_size, seed=s.seed + number, **rules)
        draws.append((torch.tensor([sample['tokens'] for sample in samples]),
                      torch.tensor([sample['nfe'] for sample in samples])))
    row = worth(clean, free, draws)
    auc = torch.tensor([roc_auc(doubt, label) for doubt, label in zip(doubts, labels)])
    row['auc'], row['auc_se'] = per_token(auc, torch.ones_like(auc))
    row['exact'], row['exact_se'] = row.pop('correct'), row.pop('correct_se')
    return dict(name=f'repair {many} wrong', **row)


def run(s):
    """The suite with bench's settings s: (rows, two tables)."""
    model, checkpoint = load(s, find_checkpoint(s.init_from, s.out_dir), s.merge_from)
    meta, config = checkpoint['meta'], checkpoint['config']
    if meta['name'] != 'sudoku':
        raise UserError(f"the suite sudoku needs a checkpoint trained on sudoku, this one saw {meta['name']}")
    clean = held_out_rows(s, model, checkpoint)
    free = modelled(clean, meta)[0]
    can = supports(config)
    repairs = [n for n in WRONG if can.writes and can.detects and asked_for(s, f'repair {n} wrong')]
    asked = [row for row in sampler_rows(config) if asked_for(s, row[0])]
    if not asked and not repairs:
        wanted(s, sampler_rows(config))                             # says so

    rows, lines = [], []
    for name, rules in tqdm(asked, desc='rows', leave=False):
        found = []
        for each in CELLS[:None if rules is not None else 1]:
            draws = [solve(s, model, meta, clean, rules, each, s.seed + k) for k in range(s.num_seeds)]
            found.append(dict(name=name, cells_a_pass=each, **worth(clean, free, draws)))
            tqdm.write(f'{name}, {each} a pass: {cells(found[-1], METRICS)}')
        rows += found
        line = [name, *[cells(row, METRICS) for row in found]]
        lines.append(line + [''] * (1 + len(CELLS) - len(line)))
    head = [' · '.join(headings(METRICS)), *[f"{n} cell{'s' * (n > 1)} a pass" for n in CELLS]]
    tables = [markdown(head, lines)] if lines else []
    repaired = [repair(s, model, meta, config, clean, many) for many in repairs]
    if repaired:
        tables.append(table_of(repaired, dict(task='name'), ('auc', 'exact', 'cells', 'nfe')))
    print(f'{len(clean)} held-out puzzles, {s.num_seeds} draws each, ± standard error over the puzzles')
    return rows + repaired, '\n\n'.join(tables)
