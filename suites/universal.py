"""
The universal denoiser's whole table: everything that its seed tried, and what came after it, on this grammar.

What is to be trained stands in RUNS, what is to be measured in GENERATION, REPAIR and DETECTION: edit them as you like. Runs and
measured rows are kept under out_dir/universal, see runs.py.
"""

import copy
import functools
import json
import os
import re
import statistics

import torch
from tqdm import tqdm

from plumbing.text import decode, encode, rows_of, start_canvas, task_canvas
from corruption import modelled
from data.loader import data_of, load_data, spread_rows
from parts.noise import NOISE, mixed_noise
from plumbing.checks import parse_mixture
from plumbing.evaluate import causal_nll, evaluate, roc_auc
from rules import PRESETS, choose_rules, p_wrong, supports, text_of
from sample import fill, generate
from suites.common import SHARES, cell, fresh_draws, markdown, measure_draws, summary, training_strings, wanted, with_errors
from suites.runs import check_train_args, folder_of, measure_all, network_of
from suites.tasks import first_operand_open, repair_rows

# -----------------------------------------------------------------------------
# the tables

# name: the script and its arguments; {base} stands for the checkpoint of the run base
DENOISE = ['train.py', 'config/denoise.py']
RUNS = {
    'base': DENOISE,
    'noise only': [*DENOISE, '--remask_ratio=1.0'],
    'sigma_max 1.0': [*DENOISE, '--sigma_max=1.0', '--high_noise_bias=0.0'],
    'sigma_max 1.0 with 30 % high noise': [*DENOISE, '--sigma_max=1.0', '--high_noise_bias=0.3'],
    'sigma_max 0.9 with 30 % high noise': [*DENOISE, '--sigma_max=0.9', '--high_noise_bias=0.3'],
    'self-conditioning': [*DENOISE, '--self_condition=True'],
    'noise conditioning': [*DENOISE, '--noise_condition=True'],
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
# (row, run, keywords of sample.fill), and beside these, see draw_samples: anchor, level, then, shown_as
GENERATION = [
    *[(f'{run}: ancestral 64', run, dict(steps=64)) for run in DENOISERS],
    *[(f'{run}: maskgit 20', run, dict(MASKGIT, steps=20)) for run in DENOISERS],
    *[(f'base: maskgit {steps}', 'base', dict(MASKGIT, steps=steps)) for steps in (5, 12, 30)],
    *[(f'base: maskgit {steps} linear', 'base', dict(MASKGIT, schedule='linear', steps=steps)) for steps in (5, 12, 20, 30)],
    ('base: anchor seeding then maskgit 20', 'base', dict(MASKGIT, steps=20, anchor='=')),
    ('base: priority unmasking 20', 'base', dict(commit='priority', priority='()=+*', steps=20)),
    *[(f'noise conditioning: single shot at {level}', 'noise conditioning', dict(steps=1, level=level))
      for level in (1.0, 0.9, 0.8, 0.5)],
    *[(f'{run}: AR warm start of {n} then maskgit 20', run, dict(MASKGIT, steps=20, ar_prefix=n))
      for run in ('base', 'hybrid-aware') for n in (3, 5, 8, 16)],
    *[(f'energy: best of {n} by maskgit 20', 'energy', dict(MASKGIT, steps=20, best_of=n)) for n in (5, 10)],
    *[(f'energy without causal pass: best of {n} by intelligent {steps}', 'energy without causal pass',
       dict(PRESETS['intelligent'], steps=steps, best_of=n)) for n, steps in ((2, 28), (3, 20))],
    ('energy: guided 16', 'energy', dict(steps=16, guide=4)),
    ('energy: remask=critic 16', 'energy', dict(steps=16, remask='critic')),
    ('skeleton alone: maskgit 20', 'skeleton', dict(MASKGIT, steps=20, shown_as='1')),
    ('skeleton then digits: maskgit 20 then 8', 'skeleton', dict(MASKGIT, steps=20, then=('base', dict(steps=8)))),
    *[(f'{run}: ancestral {steps}', run, dict(steps=steps)) for steps in (4, 8) for run in ('base', 'student')],
    ('base: discrete flow matching corrector 32 (remdm rescale)', 'base', dict(steps=32, remask='remdm', remdm='rescale')),
    ('ours: remask=wrong 64', 'ours', dict(steps=64, remask='wrong')),
    ('ours: intelligent 64', 'ours', dict(PRESETS['intelligent'], steps=64)),
    ('ours: speculative', 'ours', PRESETS['speculative']),
    ('ours: AR', 'ours', dict(ar_prefix=64)),
]
REPAIR = [(f'{run}: repair and edit', run, {}) for run in DENOISERS]
DETECTION = [(f'{run}: detection', run, {}) for run in ('energy', 'energy without causal pass')]

SEED_NOISE = 'mask:0.5,replace:0.2,swap:0.15,delete:0.075,insert:0'            # an insertion never fired there

# -----------------------------------------------------------------------------
# generation


def draw_samples(s, network, run, how, number):
    """
    num_samples of a row of GENERATION for the seed of that number: a list of dicts text, nfe, tokens. how: keywords of fill, and
      anchor    this character is put where it stands in a training string, and stays there
      level     the network is told that this share of its canvas is noise, whatever it sees
      then      (run, keywords of fill): the digits are written anew by that run, all else staying
      shown_as  digits count as this one: all digits of a skeleton are 0, and no number but 0 starts with it
    """
    (model, checkpoint), how = network(run), dict(how)
    meta = checkpoint['meta']
    anchor, level, then, shown_as = (how.pop(name, None) for name in ('anchor', 'level', 'then', 'shown_as'))
    if 'priority' in how:
        how['priority'] = encode(meta, how['priority'])
    if level is not None:
        model = copy.copy(model)                                               # the other rows' network is told nothing
        model.forward = functools.partial(model.forward, level=torch.full((1, 1), level, device=next(model.parameters()).device))
    how = choose_rules(checkpoint['config'], **{**dict(commit='random', remask='none', ar_prefix=0), **how})
    more = dict(batch_size=s.batch_size, seed=s.seed + number)
    canvas, fixed = start_canvas(model, meta, s.num_samples)
    if anchor:
        canvas, fixed = seed_anchors(canvas, fixed, encode(meta, anchor)[0], data_of(meta, checkpoint['config'])[1]['train'],
                                     torch.Generator().manual_seed(s.seed + number))
    samples = fill(model, meta, canvas, fixed, **how, **more)
    if then:
        samples = write_digits(network(then[0])[0], meta, samples, **then[1], **more)
    if shown_as:
        samples = [dict(sample, text=re.sub(r'\d', shown_as, sample['text'])) for sample in samples]
    return samples


def seed_anchors(canvas, fixed, anchor, rows, generator):
    """The id anchor put and fixed in every row of canvas, fixed (B, T), where it stands first in a random one of rows (N, T)."""
    row = torch.randint(len(rows), (len(canvas),), generator=generator)
    at = (rows[row] == anchor).long().argmax(1)                                # (B,)
    here = torch.arange(canvas.size(1)) == at[:, None]
    return canvas.masked_fill(here, anchor), fixed | here


def write_digits(model, meta, samples, **how):
    """The samples with all of their digits written anew by fill(**how), all else fixed; nfe counts both stages."""
    canvas = rows_of(samples, meta, model.config.block_size)
    digits = torch.isin(canvas, torch.tensor(encode(meta, '0123456789')))
    written = fill(model, meta, canvas.masked_fill(digits, model.mask_token_id), ~digits, **how)
    return [dict(new, nfe=old['nfe'] + new['nfe']) for old, new in zip(samples, written)]


def generation_rows(s, network, name, run, how):
    """One row: num_seeds x num_samples, scored."""
    task, train = training_strings(s, network(run)[1]['meta'])
    return [measure_draws(s, task, train, name, lambda number: draw_samples(s, network, run, how, number))]


# -----------------------------------------------------------------------------
# repair and editing


def repair_and_edit(s, network, name, run, how):
    """One row: what a checkpoint mends and edits in num_samples held-out strings, what it is worth on eval_rows of them."""
    model, checkpoint = network(run)
    meta, config = checkpoint['meta'], checkpoint['config']
    task, _ = training_strings(s, meta)
    can_unmask, causal, detects = supports(config)
    val = data_of(meta, config)[1]['val']
    clean = spread_rows(val, s.num_samples, model.config.block_size)
    row = dict(name=name, run=run, **dict.fromkeys(('nelbo', 'nelbo_se', 'causal_nll', 'causal_nll_se', 'auc', 'auc_se')))
    row.update(evaluate(model, spread_rows(val, s.eval_rows, model.config.block_size), meta, causal=causal,
                        bidirectional=can_unmask, detects=detects, seed=s.seed))
    row['edit'] = edit_row(s, model, meta, task, clean)
    row['repair'] = repair_rows(s, model, meta, config, clean)
    tqdm.write(f"{name}: edits valid {cell(row['edit'], 'valid')}, " + ', '.join(
        f"{part['name']}, {part['sampler']}: {cell(part, 'accuracy')}" for part in row['repair']))
    return [row]


def edit_row(s, model, meta, task, clean):
    """
    The first operand of clean rows (N, T) written anew: valid, correct (the value still holds), and anchors, the share of
    the other tokens that are what they were, counted in the result.
    """
    texts = first_operand_open([decode(meta, ids)[0] for ids in clean.tolist()])
    canvas, fixed = (torch.cat(parts) for parts in zip(*(task_canvas('infill', model, meta, text, '_') for text in texts)))
    samples = fill(model, meta, canvas, fixed, steps=8, batch_size=s.batch_size, seed=s.seed, trace=True)
    parsed = [task.parse(sample['text']) for sample in samples]
    result, others = torch.stack([sample['trace'][-1].cpu() for sample in samples]), fixed & modelled(clean, meta)[1]
    return with_errors(dict(valid=statistics.mean(valid for valid, _, _ in parsed),
                            correct=statistics.mean(valid and value == claimed for valid, value, claimed in parsed),
                            anchors=(result == clean)[others].double().mean().item(),
                            nfe=statistics.mean(sample['nfe'] for sample in samples)), len(clean))


# -----------------------------------------------------------------------------
# detection

SCORES = ('contains a mask', 'mean confidence', 'max p(WRONG)', 'causal NLL', 'leave-one-out', 'energy', 'energy or a mask')


def detection_rows(s, network, name, run, how):
    """
    How well scores of whole texts tell held-out strings from three kinds of wrong ones, ROC-AUC, one row a kind: the same strings
    with the seed's noise, masks left in; the network's own samples that are no strings; its own with a wrong value.
    """
    model, checkpoint = network(run)
    meta, config = checkpoint['meta'], checkpoint['config']
    task, _ = training_strings(s, meta)
    clean = spread_rows(data_of(meta, config)[1]['val'], s.num_samples, model.config.block_size)
    score = functools.partial(suspicion, model, meta, causal=supports(config)[1], batch_size=s.batch_size)
    good, rows = score(clean), []
    for against, ids in {'corrupted': corrupted(model, meta, clean, s.seed), **own_mistakes(s, model, meta, task)}.items():
        row = dict(name=name, against=against, n=len(ids), clean=len(clean))
        bad = score(ids) if len(ids) else dict.fromkeys(SCORES)
        for which in SCORES:
            row[which] = row[f'{which}_se'] = None
            if bad[which] is not None:
                row[which], row[f'{which}_se'] = auc_of(bad[which], good[which])
        rows.append(row)
        tqdm.write(f'{name}, {against}, {len(ids)} strings: ' + ', '.join(f'{which} {cell(row, which)}' for which in SCORES))
    return rows


def corrupted(model, meta, clean, seed, low=0.2, high=0.6):
    """Clean rows (N, T) with the seed's noise, its level uniform on low..high; without those that it happened to spare."""
    generator = torch.Generator().manual_seed(seed)
    mix = parse_mixture('noise_mix', SEED_NOISE, NOISE)
    level = (low + (high - low) * torch.rand(len(clean), generator=generator)) * sum(share for _, share in mix)
    noisy = mixed_noise(clean, modelled(clean, meta)[1], level, mix, model.mask_token_id, meta['pad'], generator)
    return noisy[(noisy != clean).any(1)]


def own_mistakes(s, model, meta, task, rounds=10, steps=32):
    """The network's own samples that are no strings, and those with a wrong value: num_samples of each, if the rounds suffice."""
    found = {'own samples, invalid': [], 'own samples, wrong value': []}
    for number in range(rounds):
        seed = s.seed + 1000 + number                                          # none that the energy head may have learned from
        samples = generate(model, meta, s.num_samples, steps=steps, batch_size=s.batch_size, seed=seed)
        for sample, ids in zip(samples, rows_of(samples, meta, model.config.block_size)):
            valid, value, claimed = task.parse(sample['text'])
            if not valid or value != claimed:
                found['own samples, wrong value' if valid else 'own samples, invalid'].append(ids)
        if all(len(rows) >= s.num_samples for rows in found.values()):
            break
    return {kind: torch.stack(rows[:s.num_samples]) if rows else torch.zeros(0) for kind, rows in found.items()}


@torch.no_grad()
def suspicion(model, meta, ids, causal=True, batch_size=125, most=200):
    """
    What speaks against texts ids (N, T), which may hold masks: {score: (N,), higher is worse}, None for a score that the network
    does not have. leave-one-out is for the first most texts only.

    The causal pass and the energy head know no masks: they see the text with the masks filled by the likeliest tokens.
    """
    parts, device = [], next(model.parameters()).device
    for x in ids.split(batch_size):
        x = x.to(device)
        real, masked = modelled(x, meta)[1], x == model.mask_token_id
        hidden, visible = model(x), real & ~masked
        doubt = p_wrong(model, hidden, x) * visible                            # (B, T)
        filled = torch.where(masked, model.logits(hidden, real_only=True).argmax(-1), x)
        text = modelled(filled, meta)[1]
        parts.append((masked.any(1).float(), doubt.sum(1) / visible.sum(1).clamp(min=1), doubt.amax(1),
                      causal_nll(model, filled, text) / text.sum(1).clamp(min=1) if causal else None,
                      leave_one_out(model, x, visible) if sum(len(part[0]) for part in parts) < most else None,
                      model.energy(*text_of(filled, meta['eos'], meta['pad'], [meta['bos']]))
                      if model.critic is not None else None))
    columns = ([part.cpu() for part in column if part is not None] for column in zip(*parts))
    found = {name: torch.cat(column) if column else None for name, column in zip(SCORES, columns)}
    if found['energy'] is not None:                                            # a text with a mask in it is no text yet
        found['energy or a mask'] = found['energy'] + 1e4 * found['contains a mask']
    return {**dict.fromkeys(SCORES), **found, 'leave-one-out': found['leave-one-out'][:most]}


def leave_one_out(model, ids, visible):
    """-log p of every visible token of ids (B, T) when it alone is masked, in the mean over them: (B,). One pass a position."""
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


# -----------------------------------------------------------------------------
# the suite


MEASURES = dict(generation=(GENERATION, generation_rows), repair=(REPAIR, repair_and_edit), detection=(DETECTION, detection_rows))


def run(s):
    """The suite with bench's settings s: (rows, up to three tables). What cannot be measured is left out; an error at the end."""
    check_train_args(s, RUNS)
    asked = wanted(s, [(*row, table) for table, (rows, _) in MEASURES.items() for row in rows])
    network = functools.partial(network_of, s, RUNS, {})

    def measure(name, start, how, table):
        return [dict(row, table=table) for row in MEASURES[table][1](s, network, name, start, how)]

    return measure_all(s, asked, functools.partial(row_key, s), measure, functools.partial(tables, s))


def row_key(s, name, start, how, table):
    """What a measured row depends on, as text."""
    runs = [start, *([how['then'][0]] if 'then' in how else [])]
    return json.dumps([table, name, [os.path.basename(folder_of(s, RUNS, run)) for run in runs], how,
                       s.num_samples, s.num_seeds, s.seed, s.eval_rows if table == 'repair' else None])


def tables(s, rows):
    """Markdown of the rows of run: generation, repair and editing, detection, as far as there are any."""
    found = {table: [row for row in rows if row['table'] == table] for table in MEASURES}
    texts = []
    if found['generation']:
        metrics = ('valid', 'balanced', 'correct', 'unique', 'length_tv', 'nfe')
        task, train = training_strings(s, load_data('arithmetic')[0])
        perfect = [{**task.score(fresh_draws(s, task, number), train), 'nfe': 0} for number in range(s.num_seeds)]
        lines = [summary('the grammar itself', 'free', perfect, s.num_samples), *found['generation']]
        texts.append(markdown(['generation', *[f'{m} %' if m in SHARES else m for m in metrics]],
                              [[row['name'], *[cell(row, m) for m in metrics]] for row in lines]))
    if found['repair']:
        texts.append(repair_table(found['repair']))
    if found['detection']:
        texts.append(markdown(['ROC-AUC', 'against', 'strings', *SCORES],
                              [[row['name'], row['against'], str(row['n']), *[cell(row, score) for score in SCORES]]
                               for row in found['detection']]))
    return '\n\n'.join(texts)


def repair_table(rows):
    """A line a checkpoint; what needs no checkpoint comes first and once."""
    lines, nothing = [], {}
    for row in rows:
        ways = {}
        for part in row['repair']:                                             # two protocols, the same ways
            ways.setdefault(part['sampler'], []).append(' · '.join(cell(part, m) for m in ('accuracy', 'by_string', 'exact')))
        nothing.update({how: cells for how, cells in ways.items() if how.startswith('nothing')})
        edit = ' · '.join(cell(row['edit'], m) for m in ('valid', 'correct', 'anchors'))
        lines.append([row['run'], *ways['--task=repair'], edit, *[cell(row, m) for m in ('nelbo', 'causal_nll', 'auc')]])
    head = ['repair', 'accuracy % · by string % · exact %', 'the same, with insertions',
            'edit: valid % · correct % · anchors kept %', 'nelbo', 'causal nll', 'auc']
    return markdown(head, [[how, *cells, '', '', '', ''] for how, cells in nothing.items()] + lines)
