"""
The universal denoiser's whole table: everything that an earlier experiment tried, and what came after it.

It is about arithmetic. RUNS says what is trained, GENERATION and ROWS what is measured. Runs and rows are
kept in out_dir/universal.
"""

import functools
import re

import torch
from tqdm import tqdm

from plumbing.text import decode, encode, modelled, rows_of, start_canvas
from data.loader import data_of, load_data, spread_rows
from plumbing.evaluate import causal_nll, p_wrong, roc_auc
from parts.energy import energy, text_of
from plumbing.rows import Ends
from parts.presets import PRESETS, choose_rules, supports
from sample import fill, generate
from suites.common import (cell, cells, grammar_itself, held_out_rows, markdown, mean_nfe, measure_draws,
                           table_of, training_strings, wanted, with_errors, worth)
from suites.runs import check_train_args, folder_name, measure_all, network_of
from suites.tasks import (WITHOUT_INSERTIONS, canvas_of, first_operand_open, repair_rows, right_shares,
                          with_noise)

# name: the script and its arguments; {base} stands for the checkpoint of the run base
DENOISE = ['train.py', 'config/denoise.py']
RUNS = {
    'base': DENOISE,
    'noise only': [*DENOISE, '--remask_ratio=1.0'],
    'sigma_max 1.0': [*DENOISE, '--sigma_max=1.0'],
    'self-conditioning': [*DENOISE, '--parts=previous'],
    'noise conditioning': [*DENOISE, '--parts=level:32'],
    'hybrid-aware': [*DENOISE, '--prefix_ratio=0.5'],
    'K=1': [*DENOISE, '--n_recur=1'],
    'K=4': [*DENOISE, '--n_recur=4'],
    'skeleton': [*DENOISE, '--coarse=0123456789', '--causal_ratio=0.0'],
    'ours': ['train.py', 'config/universal.py'],
    'energy': ['tools/energy.py', '--init_from={ours}'],
    'energy without causal pass': ['tools/energy.py', '--init_from={ours}', '--passes=1'],
    'student': ['tools/distill.py', '--init_from={base}'],
}
DENOISERS = [name for name, (script, *_) in RUNS.items() if script == 'train.py' and name != 'skeleton']

MASKGIT = dict(commit='confidence', schedule='cosine')
TWENTY = dict(MASKGIT, steps=20)
# (row, run, keywords of sample.fill), and beside these, see draw_samples: anchor, then, shown_as
GENERATION = [
    *[(f'{run}: ancestral 64', run, dict(steps=64)) for run in DENOISERS],
    *[(f'{run}: maskgit 20', run, TWENTY) for run in DENOISERS],
    *[(f'base: maskgit {n}', 'base', dict(MASKGIT, steps=n)) for n in (5, 12, 30)],
    *[(f'base: maskgit {n} linear', 'base', dict(MASKGIT, schedule='linear', steps=n))
      for n in (5, 12, 20, 30)],
    ('base: anchor seeding then maskgit 20', 'base', dict(TWENTY, anchor='=')),
    ('base: priority unmasking 20', 'base', dict(commit='priority', priority='()=+*', steps=20)),
    *[(f'{run}: AR warm start of {n} then maskgit 20', run, dict(TWENTY, ar_prefix=n))
      for run in ('base', 'hybrid-aware') for n in (3, 5, 8, 16)],
    *[(f'energy: best of {n} by maskgit 20', 'energy', dict(TWENTY, best_of=n)) for n in (5, 10)],
    *[(f'energy without causal pass: best of {n} by intelligent {steps}', 'energy without causal pass',
       dict(PRESETS['intelligent'], steps=steps, best_of=n)) for n, steps in ((2, 28), (3, 20))],
    ('energy: guided 16', 'energy', dict(steps=16, guide=4)),
    ('energy: remask=critic 16', 'energy', dict(steps=16, remask='critic')),
    ('skeleton alone: maskgit 20', 'skeleton', dict(TWENTY, shown_as='1')),
    ('skeleton then digits: maskgit 20 then 8', 'skeleton', dict(TWENTY, then=('base', dict(steps=8)))),
    *[(f'{run}: ancestral {n}', run, dict(steps=n)) for n in (4, 8) for run in ('base', 'student')],
    ('base: discrete flow matching corrector 32 (remdm rescale)', 'base',
     dict(steps=32, remask='remdm', remdm='rescale')),
    ('ours: remask=wrong 64', 'ours', dict(steps=64, remask='wrong')),
    ('ours: intelligent 64', 'ours', dict(PRESETS['intelligent'], steps=64)),
    ('ours: speculative', 'ours', PRESETS['speculative']),
    ('ours: AR', 'ours', dict(ar_prefix=64)),
]
ROWS = [*[(name, 'generation', run, how) for name, run, how in GENERATION],
        *[(f'{run}: repair and edit', 'repair', run, {}) for run in DENOISERS],
        *[(f'{run}: detection', 'detection', run, {}) for run in ('energy', 'energy without causal pass')]]

# -----------------------------------------------------------------------------
# generation


def generation_rows(s, network, name, run, how):
    """One row: num_seeds x num_samples, scored."""
    strings = training_strings(s, network(run)[1]['meta'])
    return [measure_draws(s, strings, name, lambda number: draw_samples(s, network, run, how, number))]


def draw_samples(s, network, run, how, number):
    """
    num_samples of a row of GENERATION for the seed of that number: a list of dicts text, nfe, tokens.

    how has keywords of fill, and
      anchor    this character is put where it stands in a training string, and stays there
      then      (run, keywords of fill): the digits are written anew by that run, all else staying
      shown_as  digits count as this one: all digits of a skeleton are 0, and no number but 0 starts with it
    """
    (model, checkpoint), how = network(run), dict(how)
    meta = checkpoint['meta']
    anchor, then, shown_as = (how.pop(name, None) for name in ('anchor', 'then', 'shown_as'))
    if 'priority' in how:
        how['priority'] = encode(meta, how['priority'])
    how = choose_rules(checkpoint['config'], **{**dict(commit='random', remask='none', ar_prefix=0), **how})
    more = dict(batch_size=s.batch_size, seed=s.seed + number)

    canvas, fixed = start_canvas(model, meta, s.num_samples)
    if anchor:
        rows = data_of(meta, checkpoint['config'])[1]['train']
        rng = torch.Generator().manual_seed(s.seed + number)
        canvas, fixed = seed_anchors(canvas, fixed, encode(meta, anchor)[0], rows, rng)
    samples = fill(model, meta, canvas, fixed, **how, **more)
    if then:
        samples = write_digits(network(then[0])[0], meta, samples, **then[1], **more)
    if shown_as:
        samples = [dict(sample, text=re.sub(r'\d', shown_as, sample['text'])) for sample in samples]
    return samples


def seed_anchors(canvas, fixed, anchor, rows, rng):
    """Puts and fixes an id in each row of a canvas, where it stands in a random one of rows (N, T)."""
    row = torch.randint(len(rows), (len(canvas),), generator=rng)
    at = (rows[row] == anchor).long().argmax(1)                                # (B,)
    here = torch.arange(canvas.size(1)) == at[:, None]
    return canvas.masked_fill(here, anchor), fixed | here


def write_digits(model, meta, samples, **how):
    """The samples, their digits written anew by fill(**how) and all else fixed; nfe counts both stages."""
    canvas = rows_of(samples, meta, model.config.block_size)
    digits = torch.isin(canvas, torch.tensor(encode(meta, '0123456789')))
    written = fill(model, meta, canvas.masked_fill(digits, model.mask_token_id), ~digits, **how)
    return [dict(new, nfe=old['nfe'] + new['nfe']) for old, new in zip(samples, written)]

# -----------------------------------------------------------------------------
# repair and editing

WORTH = ('nelbo', 'causal_nll', 'auc')


def repair_and_edit(s, network, name, run, how):
    """One row: how a checkpoint repairs and edits num_samples held-out strings, its worth on eval_rows."""
    model, checkpoint = network(run)
    meta, config, T = checkpoint['meta'], checkpoint['config'], model.config.block_size
    task, _ = training_strings(s, meta)
    val = data_of(meta, config)[1]['val']
    clean = spread_rows(val, s.num_samples, T)
    row = dict(name=name, run=run, **dict.fromkeys(WORTH))
    row.update(worth(model, checkpoint, spread_rows(val, s.eval_rows, T), seed=s.seed))
    row['edit'] = edit_row(s, model, meta, task, clean)
    row['repair'] = repair_rows(s, model, meta, config, clean)
    repaired = [f"{part['name']}, {part['sampler']}: {cell(part, 'accuracy')}" for part in row['repair']]
    tqdm.write(f"{name}: edits valid {cell(row['edit'], 'valid')}, {', '.join(repaired)}")
    return [row]


def edit_row(s, model, meta, task, clean):
    """
    The first operand of clean rows (N, T) written anew.

    valid; correct, the value still holds; anchors, the share of the other tokens that are what they were.
    """
    texts = [decode(meta, ids)[0] for ids in clean.tolist()]
    canvas, fixed = canvas_of(model, meta, first_operand_open(texts))
    samples = fill(model, meta, canvas, fixed, steps=8, batch_size=s.batch_size, seed=s.seed, trace=True)
    result = torch.stack([sample['trace'][-1].cpu() for sample in samples])
    kept = (result == clean)[fixed & modelled(clean, meta)[1]].double().mean().item()
    shares = right_shares(task, samples, texts)
    return with_errors(dict(shares, anchors=kept, nfe=mean_nfe(samples)), len(clean))

# -----------------------------------------------------------------------------
# detection

SCORES = ('contains a mask', 'mean confidence', 'max p(WRONG)', 'causal NLL', 'leave-one-out', 'energy',
          'energy or a mask')


def detection_rows(s, network, name, run, how):
    """
    How well scores of whole texts tell held-out strings from wrong ones: ROC-AUC, a row for each kind.

    The same strings under noise, masks left in; the network's samples that are no strings, or of wrong value.
    """
    model, checkpoint = network(run)
    meta, config = checkpoint['meta'], checkpoint['config']
    task, _ = training_strings(s, meta)
    clean = held_out_rows(s, model, checkpoint)
    score = functools.partial(suspicion, model, meta, causal=supports(config).causal, batch_size=s.batch_size)
    good, rows = score(clean), []
    kinds = {'corrupted': corrupted(model, meta, clean, s.seed), **own_mistakes(s, model, meta, task)}
    for against, ids in kinds.items():
        row = dict(name=name, against=against, n=len(ids), clean=len(clean))
        bad = score(ids) if len(ids) else dict.fromkeys(SCORES)
        for which in SCORES:
            known = bad[which] is not None
            row[which], row[f'{which}_se'] = auc_of(bad[which], good[which]) if known else (None, None)
        rows.append(row)
        found = ', '.join(f'{which} {cell(row, which)}' for which in SCORES)
        tqdm.write(f'{name}, {against}, {len(ids)} strings: {found}')
    return rows


def corrupted(model, meta, clean, seed, low=0.2, high=0.6):
    """Clean rows (N, T) under noise of a level uniform on low..high, without those that it spared."""
    rng = torch.Generator().manual_seed(seed)
    level = low + (high - low) * torch.rand(len(clean), generator=rng)
    noisy = with_noise(model, meta, clean, WITHOUT_INSERTIONS, level, rng)
    return noisy[(noisy != clean).any(1)]


def own_mistakes(s, model, meta, task, rounds=10, steps=32):
    """The network's samples that are no strings, and those of wrong value: at most num_samples of each."""
    found = {'own samples, invalid': [], 'own samples, wrong value': []}
    for number in range(rounds):
        seed = s.seed + 1000 + number            # none that the energy head may have learned from
        samples = generate(model, meta, s.num_samples, steps=steps, batch_size=s.batch_size, seed=seed)
        for sample, ids in zip(samples, rows_of(samples, meta, model.config.block_size)):
            valid, value, claimed = task.parse(sample['text'])
            if not valid or value != claimed:
                kind = 'own samples, wrong value' if valid else 'own samples, invalid'
                found[kind].append(ids)
        if all(len(rows) >= s.num_samples for rows in found.values()):
            break
    return {kind: torch.stack(rows[:s.num_samples]) if rows else torch.zeros(0)
            for kind, rows in found.items()}


@torch.no_grad()
def suspicion(model, meta, ids, causal=True, batch_size=125, most=200):
    """
    What speaks against texts ids (N, T), which may hold masks: {score: (N,), higher is worse; None: unknown}.

    leave-one-out is for the first most texts only. The causal pass and the energy head know no masks: they
    see the text with the masks filled by the likeliest tokens.
    """
    parts, device = [], next(model.parameters()).device
    for start, x in zip(range(0, len(ids), batch_size), ids.split(batch_size)):
        x = x.to(device)
        real, masked = modelled(x, meta)[1], x == model.mask_token_id
        hidden, visible = model(x), real & ~masked
        doubt = p_wrong(model, hidden, x) * visible                            # (B, T)
        filled = torch.where(masked, model.logits(hidden, real_only=True).argmax(-1), x)
        text = modelled(filled, meta)[1]
        part = {'contains a mask': masked.any(1).float(), 'max p(WRONG)': doubt.amax(1),
                'mean confidence': doubt.sum(1) / visible.sum(1).clamp(min=1)}
        if causal:
            part['causal NLL'] = causal_nll(model, filled, text) / text.sum(1).clamp(min=1)
        if start < most:
            part['leave-one-out'] = leave_one_out(model, x, visible)[:most - start]
        if model.critic is not None:
            part['energy'] = energy(model, *text_of(filled, Ends.of(meta)))
            # with a mask in it, it is no text yet
            part['energy or a mask'] = part['energy'] + 1e4 * part['contains a mask']
        parts.append(part)
    found = {name: torch.cat([part[name].cpu() for part in parts if name in part]) for name in parts[0]}
    return {**dict.fromkeys(SCORES), **found}


def leave_one_out(model, ids, visible):
    """The mean -log p of the visible tokens of ids (B, T), each masked alone: (B,). A pass a position."""
    total = torch.zeros(len(ids), device=ids.device)
    for at in visible.any(0).nonzero()[:, 0].tolist():
        x = ids.clone()
        x[:, at] = model.mask_token_id
        logp = model.logits(model(x)[:, at], real_only=True).log_softmax(-1)   # (B, V+2)
        total -= torch.where(visible[:, at], logp.gather(1, ids[:, at:at + 1])[:, 0], 0.0)
    return total / visible.sum(1).clamp(min=1)


def auc_of(bad, good):
    """The ROC-AUC of a score, bad (N,) over good (M,), and its standard error (Hanley and McNeil 1982)."""
    auc = roc_auc(torch.cat((bad, good)), torch.arange(len(bad) + len(good)) < len(bad))
    one, two = auc / (2 - auc), 2 * auc ** 2 / (1 + auc)
    variance = auc * (1 - auc) + (len(bad) - 1) * (one - auc ** 2) + (len(good) - 1) * (two - auc ** 2)
    return auc, max(0.0, variance / (len(bad) * len(good))) ** 0.5

MEASURES = dict(generation=generation_rows, repair=repair_and_edit, detection=detection_rows)


def run(s):
    """The suite with bench's settings s: (rows, up to three tables), see measure_all."""
    check_train_args(s, RUNS)

    def key_of(table, run, how):
        runs = [run, how['then'][0]] if 'then' in how else [run]
        rows = [s.eval_rows] if table == 'repair' else []
        return [[folder_name(s, RUNS, run) for run in runs], s.num_seeds, *rows]

    network = functools.partial(network_of, s, RUNS, {})
    return measure_all(s, network, wanted(s, ROWS), MEASURES, key_of, functools.partial(tables, s))


def tables(s, rows):
    """Markdown of the rows of run: generation, repair and editing, detection, as far as there are any."""
    found = {table: [row for row in rows if row['table'] == table] for table in MEASURES}
    texts = []
    if found['generation']:
        perfect = grammar_itself(s, training_strings(s, load_data('arithmetic')[0]))
        texts.append(table_of([perfect, *found['generation']], dict(generation='name'),
                              ('valid', 'balanced', 'correct', 'unique', 'length_tv', 'nfe')))
    if found['repair']:
        texts.append(repair_table(found['repair']))
    if found['detection']:
        columns = {'ROC-AUC': 'name', 'against': 'against', 'strings': 'n'}
        texts.append(table_of(found['detection'], columns, SCORES))
    return '\n\n'.join(texts)


def repair_table(rows):
    """A line for each checkpoint; what needs no checkpoint comes first and once."""
    lines, nothing = [], {}
    for row in rows:
        # two protocols, the same ways
        ways = {}
        for part in row['repair']:
            ways.setdefault(part['sampler'], []).append(cells(part, ('accuracy', 'by_string', 'exact')))
        nothing.update({how: results for how, results in ways.items() if how.startswith('nothing')})
        edit = cells(row['edit'], ('valid', 'correct', 'anchors'))
        lines.append([row['run'], *ways['--task=repair'], edit, *[cell(row, metric) for metric in WORTH]])
    head = ['repair', 'accuracy % · by string % · exact %', 'the same, with insertions',
            'edit: valid % · correct % · anchors kept %', 'nelbo', 'causal nll', 'auc']
    return markdown(head, [[how, *results, '', '', '', ''] for how, results in nothing.items()] + lines)
