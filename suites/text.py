"""
Text: one network that writes both ways beside networks that write left to right only, and a judge of what is written.

likelihood  nats a token of the whole validation split, in windows of block_size: the bound of the diffusion mode (NELBO) and the
            NLL of the causal mode. Neither sees anything in front of a window
samples     num_seeds x num_samples texts of block_size tokens, written from nothing: what the judge, a separate causal network,
            thinks of them (nats a token), and how varied they are (see evaluation.text_statistics, all of which depends on the
            number of texts). Low nats alone are no merit: the line of real text says how many there should be
infill      a gap in the middle of windows of the validation split; restored: the share of its tokens that are what they were
repair      such windows with a tenth of their tokens replaced by other ones; restored: the share of these that were put right,
            damaged: of the others, that were made wrong, right: of all, that are right in the end

The dataset is that of the configs in RUNS, any stream of text; --train_args=--dataset=NAME takes another one for all of them.
Runs and measured rows are kept under out_dir/text, see runs.py. On a CPU begin with --num_samples=100.
"""

import functools
import json
import os
from types import SimpleNamespace

import torch
from tqdm import tqdm

from plumbing.text import decode
from configurator import UserError
from parts.noise import another_token
from data.loader import data_of, load_data, random_rows, rows_at, spread_rows
from plumbing.evaluate import causal_nll, evaluate, per_token, text_statistics, training_text
from model import random_subset
from rules import choose_rules, supports
from sample import fill, generate
from suites.common import cell, markdown, wanted
from suites.runs import check_train_args, folder_of, measure_all, network_of

# -----------------------------------------------------------------------------
# the tables

OURS = ['train.py', 'config/shakespeare_char_cpu.py']
# the same network and rows, nothing but the next token; what the other tasks need of it and of the settings is off
CAUSAL = [*OURS, '--training_type=causal', '--views=0', '--draft_head=False', '--noise_condition=False', '--self_condition=False',
          '--stage=0', '--time_dim=0', '--allow_abstain=False', '--target_mask_prob=0', '--mask_logit_bias=0',
          '--guess_from=None']
RUNS = {
    'ours': OURS,
    'AR same tokens': CAUSAL,
    'AR same time': CAUSAL,                                                    # and as many steps as take the time of ours
    'judge': ['train.py', 'config/shakespeare_char_judge.py'],
}

# name: what choose_rules is told beside the number of passes, a row for each of the setting budgets
SAMPLERS = {
    **{f'remask={remask}': dict(commit='random', schedule='linear', remask=remask)
       for remask in ('none', 'random', 'wrong', 'remdm', 'p2')},
    # a rate of 0.3, which these two have otherwise, takes back more at once than a long text can spare
    **{f'remask={remask} at 0.03': dict(commit='random', schedule='linear', remask=remask, remask_rate=0.03)
       for remask in ('random', 'remdm')},
    'intelligent': dict(preset='intelligent'),
    # what a doubt is worth while little is visible
    'remask=wrong without patience': dict(commit='random', schedule='linear', remask='wrong', remask_patience=0.0),
    'remask=wrong and commit=confidence': dict(commit='confidence', schedule='linear', remask='wrong'),
    # re-masking what is doubted sharpens the law, and so does a temperature: which text is better at the same entropy?
    'remask=none at temperature 0.9': dict(commit='random', schedule='linear', remask='none', temperature=0.9),
    'remask=wrong at temperature 1.05': dict(commit='random', schedule='linear', remask='wrong', temperature=1.05),
}
DRAWS = 8                                                                      # likelihood: masks a window
GAP = 16                                                                       # infill: so many tokens are hidden
INFILL = {
    'remask=none': dict(commit='random', remask='none'),
    'remask=wrong': dict(commit='random', remask='wrong'),
    'commit=confidence': dict(commit='confidence', remask='none'),
}
NOISE_SHARE = 0.1                                                              # repair: so many tokens are replaced
THRESHOLDS = (0.5, 0.2, 0.05)                                                  # repair: of the baseline mend_unsure


def rows_of_tables(s):
    """All rows: (name, table, run, what the table's function is told of it)."""
    rows = [(f'{run}: likelihood', 'likelihood', run, {}) for run in ('ours', 'AR same tokens', 'AR same time')]
    rows.append(('real text', 'samples', 'ours', dict(real=True)))
    rows += [(f'samples by {name} {steps}', 'samples', 'ours', dict(rules, steps=steps))
             for name, rules in SAMPLERS.items() for steps in s.budgets]
    rows.append(('samples by speculative', 'samples', 'ours', dict(preset='speculative')))
    rows.append(('infill: the text itself', 'infill', 'ours', dict(real=True)))
    rows += [(f'infill by {name}', 'infill', 'ours', dict(rules, steps=GAP)) for name, rules in INFILL.items()]
    return rows + [('repair', 'repair', 'ours', {})]

# -----------------------------------------------------------------------------
# likelihood


def likelihood_rows(s, network, name, run, how):
    """One row: what a run is worth on the whole validation split, and what it took to train it."""
    model, checkpoint = network(run)
    config, T = checkpoint['config'], model.config.block_size
    val = stream(checkpoint)['val']
    windows = rows_at(val, torch.arange(len(val) // T) * T, T)                 # (N, T)
    can_unmask, causal, _ = supports(config)
    row = dict(name=name, run=run, n=len(windows), parameters=model.num_params(), minutes=None, tokens_per_second=None,
               **dict.fromkeys(('nelbo', 'nelbo_se', 'causal_nll', 'causal_nll_se')))
    row.update(evaluate(model, windows, checkpoint['meta'], causal=causal, bidirectional=can_unmask, detects=False, draws=DRAWS,
                        batch_size=s.batch_size, seed=s.seed))
    if 'seconds' in checkpoint:
        seen = checkpoint['iter_num'] * config['batch_size'] * config['gradient_accumulation_steps'] * T
        row.update(minutes=checkpoint['seconds'] / 60, tokens_per_second=seen / max(1e-9, checkpoint['seconds']))
    return [row]


def steps_of_same_time(ours, other):
    """The steps that a run like that of the checkpoint other makes in the time of the checkpoint ours."""
    for checkpoint in (ours, other):
        if not checkpoint.get('seconds'):
            raise UserError('a checkpoint does not say how long its training took: delete the folder of that run, so that it is '
                            'trained again')
    return max(1, round(ours['seconds'] / (other['seconds'] / other['iter_num'])))


def stream(checkpoint):
    """The splits of a checkpoint's dataset. Raises UserError if it is no stream of text, or not what the checkpoint learned."""
    meta, data = data_of(checkpoint['meta'], checkpoint['config'])
    if meta['format'] != 'stream':
        raise UserError(f"the suite text needs a stream of text, {meta['name']} has rows")
    if meta['itos'] != checkpoint['meta']['itos'] or meta['vocab_size'] != checkpoint['meta']['vocab_size']:
        raise UserError(f"data/{meta['name']} has another vocabulary than the one that the network was trained on")
    return data

# -----------------------------------------------------------------------------
# samples


def judge_nll(judge, ids, batch_size=125):
    """What the causal mode of a network thinks of whole texts ids (N, T): nats a token, (N,)."""
    if ids.size(1) > judge.config.block_size:
        raise UserError(f'the judge reads {judge.config.block_size} tokens, the samples have {ids.size(1)}: '
                        f'give its config a block_size of at least that')
    device = next(judge.parameters()).device
    return torch.cat([causal_nll(judge, x.to(device), torch.ones_like(x, dtype=torch.bool, device=device)).cpu()
                      for x in ids.split(batch_size)]) / ids.size(1)


def judge_of(network, checkpoint):
    """The network that judges samples of a checkpoint. Raises UserError if it was trained on other tokens."""
    judge, other = network('judge')
    if other['meta']['itos'] != checkpoint['meta']['itos'] or other['meta']['name'] != checkpoint['meta']['name']:
        raise UserError(f"the judge learned {other['meta']['name']}, what it is to judge is {checkpoint['meta']['name']}: "
                        f'give their configs one dataset')
    return judge


def mean_and_error(name, values):
    """{name: the mean of values (N,), name_se: its standard error}"""
    return dict(zip((name, f'{name}_se'), per_token(values, torch.ones_like(values))))


def mean_nfe(samples):
    """The passes of samples, dicts as fill returns them, in the mean."""
    return sum(sample['nfe'] for sample in samples) / len(samples)


@functools.lru_cache(maxsize=1)
def corpus_of(dataset):
    """The training text of a dataset, see training_text."""
    meta, data = load_data(dataset)
    return training_text(meta, data['train'])


def sample_rows(s, network, name, run, how):
    """One row: num_seeds x num_samples texts, judged and counted; with how['real'] as many windows of the validation split."""
    model, checkpoint = network(run)
    meta, data, judge = checkpoint['meta'], stream(checkpoint), judge_of(network, checkpoint)
    if 'real' in how:
        num, T = s.num_samples * s.num_seeds, model.config.block_size
        rows = spread_rows(data['val'], num, T)
        if len(rows) < num:                                                    # as many as samples, overlapping if need be
            rows = random_rows(data['val'], num, T, torch.Generator().manual_seed(s.seed))
        samples = [dict(text=decode(meta, ids)[0], tokens=ids, nfe=0) for ids in rows.tolist()]
    else:
        rules = choose_rules(checkpoint['config'], **{'temperature': 1.0, **how})
        samples = [sample for number in range(s.num_seeds) for sample in generate(
            model, meta, s.num_samples, batch_size=s.batch_size, seed=s.seed + number, progress=True, **rules)]
    tokens = [sample['tokens'] for sample in samples]
    row = dict(name=name, n=len(samples), nfe=mean_nfe(samples),
               **mean_and_error('judge', judge_nll(judge, torch.tensor(tokens), s.batch_size)),
               **text_statistics([sample['text'] for sample in samples], tokens, corpus_of(meta.get('dataset', meta['name']))))
    tqdm.write(f"{name}: judge {cell(row, 'judge')}, entropy {row['entropy']:.3f}, distinct-3 {row['distinct_3']:.3f}")
    return [row]

# -----------------------------------------------------------------------------
# infill and repair


def infill_rows(s, network, name, run, how):
    """One row: a gap in each of num_samples windows filled num_seeds times; with how['real'] it holds what was there."""
    model, checkpoint = network(run)
    meta, judge, T = checkpoint['meta'], judge_of(network, checkpoint), model.config.block_size
    clean = spread_rows(stream(checkpoint)['val'], s.num_samples, T)           # (N, T)
    gap, found, nfe = middle(T), [clean], 0
    if 'real' not in how:
        canvas, fixed = clean.masked_fill(gap, model.mask_token_id), ~gap.expand_as(clean)
        rules = choose_rules(checkpoint['config'], task='infill', inside=True, **how)
        runs = [fill(model, meta, canvas, fixed, batch_size=s.batch_size, seed=s.seed + number, **rules)
                for number in range(s.num_seeds)]
        found = [torch.tensor([sample['tokens'] for sample in samples]) for samples in runs]
        nfe = mean_nfe([sample for samples in runs for sample in samples])
    restored = torch.stack([(ids == clean)[:, gap].double().mean(1) for ids in found]).mean(0)         # (N,), over the draws
    judged = torch.stack([judge_nll(judge, ids, s.batch_size) for ids in found]).mean(0)
    return [dict(name=name, n=len(clean), nfe=nfe, **mean_and_error('restored', restored), **mean_and_error('judge', judged))]


def middle(T):
    """The gap in a text of T tokens: bool (T,)."""
    size = min(GAP, T // 2)
    at = torch.arange(T) - (T - size) // 2
    return (at >= 0) & (at < size)


def replaced(clean, V, generator):
    """Rows clean (N, T) in which NOISE_SHARE of the tokens, at random places, are other ones of the V: ids (N, T)."""
    count = torch.full((len(clean),), max(1, round(NOISE_SHARE * clean.size(1))))
    where = random_subset(torch.ones_like(clean, dtype=torch.bool), count, generator)
    return torch.where(where, another_token(clean, V, generator), clean)


@torch.no_grad()
def mend_unsure(model, ids, threshold):
    """
    The plainest repair of ids (N, T): each token to which the network, which sees it stand there, gives less than the threshold
    is masked, and in one more pass the likeliest one takes its place. It needs no [WRONG] and no rules.
    """
    p = model.logits(model(ids), real_only=True).softmax(-1).gather(-1, ids[..., None])[..., 0]        # (N, T)
    masked = p < threshold
    holes = ids.masked_fill(masked, model.mask_token_id)
    return torch.where(masked, model.logits(model(holes), real_only=True).argmax(-1), ids)


def mended(name, before, after, clean, nfe):
    """A row of the repair of before (N, T) to after, clean being right: shares, standard errors over the rows."""
    wrong, right = before != clean, after == clean
    row = dict(name=name, n=len(clean), nfe=nfe)
    for measure, hit, among in (('restored', wrong & right, wrong), ('damaged', ~wrong & ~right, ~wrong),
                                ('right', right, torch.ones_like(right))):
        row[measure], row[f'{measure}_se'] = per_token(hit.sum(1).double(), among.sum(1))
    return row


def repair_rows(s, network, name, run, how):
    """A row for every way to mend num_samples windows of the validation split. All of them are greedy, so one draw."""
    model, checkpoint = network(run)
    device = next(model.parameters()).device
    clean = spread_rows(stream(checkpoint)['val'], s.num_samples, model.config.block_size)
    before = replaced(clean, model.config.vocab_size, torch.Generator().manual_seed(s.seed))
    rows = [mended('nothing', before, before, clean, 0)]
    for threshold in THRESHOLDS:
        after = torch.cat([mend_unsure(model, x.to(device), threshold).cpu() for x in before.split(s.batch_size)])
        rows.append(mended(f'what is less sure than {threshold:g} filled anew', before, after, clean, 2))
    rules = choose_rules(checkpoint['config'], task='repair', inside=True)
    samples = fill(model, checkpoint['meta'], before, torch.zeros_like(before, dtype=torch.bool), batch_size=s.batch_size,
                   seed=s.seed, **rules)
    after = torch.tensor([sample['tokens'] for sample in samples])
    return rows + [mended('--task=repair', before, after, clean, mean_nfe(samples))]

# -----------------------------------------------------------------------------
# the suite


MEASURES = dict(likelihood=likelihood_rows, samples=sample_rows, infill=infill_rows, repair=repair_rows)


def run(s):
    """The suite with bench's settings s: (rows, up to four tables). What cannot be measured is left out, and an error says so."""
    check_train_args(s, RUNS)
    networks = {}

    def settings(name):
        """s for the run of that name: of AR same time the number of steps has to be known first."""
        if name != 'AR same time':
            return s
        steps = steps_of_same_time(network('ours')[1], network('AR same tokens')[1])
        return SimpleNamespace(**{**vars(s), 'train_args': f'{s.train_args} --max_iters={steps}'})

    def network(name):
        return network_of(settings(name), RUNS, networks, name)

    def key_of(name, table, run, how):
        runs = [run, *(['judge'] if table in ('samples', 'infill') else [])]
        folders = [os.path.basename(folder_of(settings(run), RUNS, run)) for run in runs]
        sizes = dict(likelihood=[DRAWS], infill=[GAP], repair=[NOISE_SHARE, THRESHOLDS]).get(table, [])
        return json.dumps([table, name, folders, how, s.num_samples, s.num_seeds, s.seed, *sizes])

    def measure(name, table, run, how):
        return [dict(row, table=table) for row in MEASURES[table](s, network, name, run, how)]

    return measure_all(s, wanted(s, rows_of_tables(s)), key_of, measure, tables)


def tables(rows):
    """Markdown of the rows of run, a table for every kind that there is."""
    heads = dict(likelihood=('nelbo', 'causal_nll'), infill=('restored', 'judge', 'nfe'),
                 repair=('restored', 'damaged', 'right', 'nfe'),
                 samples=('judge', 'entropy', 'distinct_3', 'known_words', 'copy_mean', 'copy_max', 'nfe'))
    texts = []
    for table in MEASURES:
        found = [row for row in rows if row['table'] == table]
        cost = ['minutes of training', 'tokens/s', 'parameters'] if table == 'likelihood' else []
        if found:
            texts.append(markdown([table, *heads[table], *cost], [
                [row['name'], *[shown(row, metric) for metric in heads[table]], *(cost and cost_of(row))] for row in found]))
    return '\n\n'.join(texts)


def shown(row, metric):
    """A cell of the tables: a count as it is, the rest as in the other suites."""
    return str(row[metric]) if isinstance(row[metric], int) else cell({f'{metric}_se': None, **row}, metric)


def cost_of(row):
    """What the training of a row took, as cells."""
    cells = ['—', '—'] if row['minutes'] is None else [f"{row['minutes']:.1f}", f"{row['tokens_per_second']:,.0f}"]
    return [*cells, f"{row['parameters']:,}"]
