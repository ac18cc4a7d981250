"""
Text: one network that writes both ways beside networks that write left to right only, judged by another one.

likelihood  nats a token of the whole validation split, in windows of block_size, nothing in front of them:
            the bound of the diffusion mode (NELBO), the NLL of the causal mode
samples     num_seeds x num_samples texts of block_size tokens: nats a token by a judge, and variety (see
            text_statistics; it depends on the number of texts). Low nats alone are no merit: see real text
infill      a gap in the middle of windows of the validation split; the share of its tokens that is restored
repair      such windows with a tenth of their tokens replaced; the shares restored of these, damaged of the
            others, and right of all in the end

--train_args=--dataset=NAME takes another stream of text for all runs. Runs and rows are kept in out_dir/text,
see runs.py. On a CPU begin with --num_samples=100.
"""

import functools
from types import SimpleNamespace

import torch
from tqdm import tqdm

from plumbing.text import decode
from configurator import UserError
from parts.noise import another_token
from data.loader import data_of, load_data, random_rows, rows_at, spread_rows
from plumbing.evaluate import causal_nll, per_token
from plumbing.textstats import text_statistics, training_text
from plumbing.rows import random_subset
from parts.presets import choose_rules
from sample import fill, generate
from suites.common import COST, cell, mean_nfe, table_of, wanted, worth
from suites.runs import check_train_args, folder_name, measure_all, network_of, training_cost

OURS = ['train.py', 'config/shakespeare_char_cpu.py']
# the same network and rows, nothing but the next token: what only other tasks need is off, and the level
CAUSAL = [*OURS, '--training_type=causal', '--views=0', '--draft_head=False', '--allow_abstain=False',
          '--target_mask_prob=0', '--mask_logit_bias=0', '--parts=short_conv:2,shortcuts,bigrams:8192']
RUNS = {
    'ours': OURS,
    'AR same tokens': CAUSAL,
    'AR same time': CAUSAL,                      # and as many steps as take the time of ours
    'judge': ['train.py', 'config/shakespeare_char_judge.py'],
}

# name: what choose_rules is told beside the number of passes, a row for each of the setting budgets
PLAIN = dict(commit='random', schedule='linear')
SAMPLERS = {
    **{f'remask={kind}': dict(PLAIN, remask=kind) for kind in ('none', 'random', 'wrong', 'remdm', 'p2')},
    # a rate of 0.3, which these two have otherwise, takes back more at once than a long text can spare
    **{f'remask={kind} at 0.03': dict(PLAIN, remask=kind, remask_rate=0.03) for kind in ('random', 'remdm')},
    'intelligent': dict(preset='intelligent'),
    # what a doubt is worth while little is visible
    'remask=wrong without patience': dict(PLAIN, remask='wrong', remask_patience=0.0),
    'remask=wrong and commit=confidence': dict(commit='confidence', schedule='linear', remask='wrong'),
    # re-masking sharpens the law, and so does a temperature: which text is better at equal entropy?
    'remask=none at temperature 0.9': dict(PLAIN, remask='none', temperature=0.9),
    'remask=wrong at temperature 1.05': dict(PLAIN, remask='wrong', temperature=1.05),
}
FROM_THE_LEFT = {                # these take as many passes as they take
    'speculative': dict(preset='speculative'),
    'speculative at temperature 0.9': dict(preset='speculative', temperature=0.9),
    'proofread': dict(preset='proofread'),
    'polish': dict(preset='polish'),
}
INFILL = {'remask=none': dict(commit='random', remask='none'),
          'remask=wrong': dict(commit='random', remask='wrong'),
          'commit=confidence': dict(commit='confidence', remask='none')}
DRAWS = 8                        # likelihood: masks a window
GAP = 16                         # infill: how many tokens are hidden
NOISE_SHARE = 0.1                # repair: the share of the tokens that are replaced
THRESHOLDS = (0.5, 0.2, 0.05)    # repair: of the baseline mend_unsure


def rows_of_tables(s):
    """All rows: (name, table, run, what the table's function is told of it)."""
    rows = [(f'{run}: likelihood', 'likelihood', run, {}) for run in RUNS if run != 'judge']
    rows.append(('real text', 'samples', 'ours', dict(real=True)))
    rows += [(f'samples by {name} {steps}', 'samples', 'ours', dict(rules, steps=steps))
             for name, rules in SAMPLERS.items() for steps in s.budgets]
    rows += [(f'samples by {name}', 'samples', 'ours', rules) for name, rules in FROM_THE_LEFT.items()]
    rows.append(('infill: the text itself', 'infill', 'ours', dict(real=True)))
    rows += [(f'infill by {name}', 'infill', 'ours', dict(rules, steps=GAP))
             for name, rules in INFILL.items()]
    return rows + [('repair', 'repair', 'ours', {})]


def likelihood_rows(s, network, name, run, how):
    """One row: what a run is worth on the whole validation split, and what it took to train it."""
    model, checkpoint = network(run)
    val, T = stream(checkpoint)['val'], model.config.block_size
    windows = rows_at(val, torch.arange(len(val) // T) * T, T)                 # (N, T)
    row = dict(name=name, run=run, n=len(windows), nelbo=None, causal_nll=None)
    how = dict(detects=False, draws=DRAWS, batch_size=s.batch_size, seed=s.seed)
    return [{**row, **training_cost(model, checkpoint), **worth(model, checkpoint, windows, **how)}]


def steps_of_same_time(ours, other):
    """The steps that a run like that of the checkpoint other makes in the time of the checkpoint ours."""
    if not ours.get('seconds') or not other.get('seconds'):
        raise UserError('a checkpoint does not say how long its training took: '
                        'delete the folder of that run, so that it is trained again')
    return max(1, round(ours['seconds'] / (other['seconds'] / other['iter_num'])))


def stream(checkpoint):
    """The splits of a checkpoint's dataset. Raises UserError if it is no text, or has another vocabulary."""
    known = checkpoint['meta']
    meta, data = data_of(known, checkpoint['config'])
    if meta['format'] != 'stream':
        raise UserError(f"the suite text needs a stream of text, {meta['name']} has rows")
    if meta['itos'] != known['itos'] or meta['vocab_size'] != known['vocab_size']:
        raise UserError(f"data/{meta['name']} has another vocabulary than the network was trained on")
    return data


def judge_nll(judge, ids, batch_size=125):
    """What the causal mode of a network thinks of whole texts ids (N, T): nats a token, (N,)."""
    if ids.size(1) > judge.config.block_size:
        raise UserError(f'the judge reads {judge.config.block_size} tokens, the samples have {ids.size(1)}: '
                        f'give its config a block_size of at least that')
    batches = ids.to(next(judge.parameters()).device).split(batch_size)
    nats = torch.cat([causal_nll(judge, x, torch.ones_like(x, dtype=torch.bool)) for x in batches])
    return nats.cpu() / ids.size(1)


def judge_of(network, checkpoint):
    """The network that judges samples of a checkpoint. Raises UserError if it was trained on other tokens."""
    judge, other = network('judge')
    mine, theirs = checkpoint['meta'], other['meta']
    if (mine['itos'], mine['name']) != (theirs['itos'], theirs['name']):
        raise UserError(f"the judge learned {theirs['name']}, what it is to judge is {mine['name']}: "
                        f'give their configs one dataset')
    return judge


def mean_of(name, values):
    """{name: the mean of values (N,), name_se: its standard error}"""
    return dict(zip((name, f'{name}_se'), per_token(values, torch.ones_like(values))))


@functools.lru_cache(maxsize=1)
def corpus_of(dataset):
    """The training text of a dataset, see training_text."""
    meta, data = load_data(dataset)
    return training_text(meta, data['train'])


def sample_rows(s, network, name, run, how):
    """One row: num_seeds x num_samples texts, judged and counted; how['real']: of the validation split."""
    model, checkpoint = network(run)
    meta, val, judge = checkpoint['meta'], stream(checkpoint)['val'], judge_of(network, checkpoint)
    if 'real' in how:
        num, T = s.num_samples * s.num_seeds, model.config.block_size
        rows = spread_rows(val, num, T)
        if len(rows) < num:                      # as many as samples, overlapping if need be
            rows = random_rows(val, num, T, torch.Generator().manual_seed(s.seed))
        samples = [dict(text=decode(meta, ids)[0], tokens=ids, nfe=0) for ids in rows.tolist()]
    else:
        rules, samples = choose_rules(checkpoint['config'], **{'temperature': 1.0, **how}), []
        for number in range(s.num_seeds):
            samples += generate(model, meta, s.num_samples, batch_size=s.batch_size, seed=s.seed + number,
                                progress=True, **rules)
    texts, tokens = zip(*((sample['text'], sample['tokens']) for sample in samples))
    row = dict(name=name, n=len(samples), nfe=mean_nfe(samples),
               **mean_of('judge', judge_nll(judge, torch.tensor(tokens), s.batch_size)),
               **text_statistics(texts, tokens, corpus_of(meta.get('dataset', meta['name']))))
    tqdm.write(f"{name}: judge {cell(row, 'judge')}, entropy {row['entropy']:.3f}, "
               f"distinct-3 {row['distinct_3']:.3f}")
    return [row]


def infill_rows(s, network, name, run, how):
    """One row: a gap in num_samples windows filled num_seeds times; how['real']: by what was there."""
    model, checkpoint = network(run)
    judge, T = judge_of(network, checkpoint), model.config.block_size
    clean = spread_rows(stream(checkpoint)['val'], s.num_samples, T)           # (N, T)
    gap, found, nfe = middle(T), [clean], 0
    if 'real' not in how:
        canvas, fixed = clean.masked_fill(gap, model.mask_token_id), ~gap.expand_as(clean)
        rules = choose_rules(checkpoint['config'], task='infill', inside=True, **how)
        runs = [fill(model, checkpoint['meta'], canvas, fixed, batch_size=s.batch_size, seed=s.seed + number,
                     **rules) for number in range(s.num_seeds)]
        found = [torch.tensor([sample['tokens'] for sample in samples]) for samples in runs]
        nfe = mean_nfe(sum(runs, []))

    # means over the draws, (N,)
    restored = torch.stack([(ids == clean)[:, gap].double().mean(1) for ids in found]).mean(0)
    judged = torch.stack([judge_nll(judge, ids, s.batch_size) for ids in found]).mean(0)
    means = {**mean_of('restored', restored), **mean_of('judge', judged)}
    return [dict(name=name, n=len(clean), nfe=nfe, **means)]


def middle(T):
    """The gap in a text of T tokens: bool (T,)."""
    size = min(GAP, T // 2)
    at = torch.arange(T) - (T - size) // 2
    return (at >= 0) & (at < size)


def replaced(clean, V, rng):
    """Rows clean (N, T), NOISE_SHARE of whose tokens, at random places, are replaced by others of the V."""
    count = torch.full((len(clean),), max(1, round(NOISE_SHARE * clean.size(1))))
    where = random_subset(torch.ones_like(clean, dtype=torch.bool), count, rng)
    return torch.where(where, another_token(clean, V, rng), clean)


@torch.no_grad()
def mend_unsure(model, ids, threshold):
    """
    The plainest repair of ids (N, T), without [WRONG] and without rules.

    A token to which the network, seeing it, gives less than the threshold is masked and predicted anew.
    """
    p = model.logits(model(ids), real_only=True).softmax(-1).gather(-1, ids[..., None])[..., 0]    # (N, T)
    masked = p < threshold
    holes = ids.masked_fill(masked, model.mask_token_id)
    return torch.where(masked, model.logits(model(holes), real_only=True).argmax(-1), ids)


def mended(name, before, after, clean, nfe):
    """The row of a repair of before (N, T) to after, where clean is right: shares, errors over the rows."""
    wrong, right = before != clean, after == clean
    row = dict(name=name, n=len(clean), nfe=nfe)
    for measure, hit, among in (('restored', wrong & right, wrong), ('damaged', ~wrong & ~right, ~wrong),
                                ('right', right, torch.ones_like(right))):
        row[measure], row[f'{measure}_se'] = per_token(hit.sum(1).double(), among.sum(1))
    return row


def repair_rows(s, network, name, run, how):
    """A row for every way to mend num_samples windows of the validation split. Greedy, so one draw."""
    model, checkpoint = network(run)
    device = next(model.parameters()).device
    clean = spread_rows(stream(checkpoint)['val'], s.num_samples, model.config.block_size)
    before = replaced(clean, model.config.vocab_size, torch.Generator().manual_seed(s.seed))
    rows = [mended('nothing', before, before, clean, 0)]
    for threshold in THRESHOLDS:
        batches = before.to(device).split(s.batch_size)
        after = torch.cat([mend_unsure(model, x, threshold) for x in batches]).cpu()
        rows.append(mended(f'what is less sure than {threshold:g} filled anew', before, after, clean, 2))
    rules = choose_rules(checkpoint['config'], task='repair', inside=True, remask_threshold=0.8)
    samples = fill(model, checkpoint['meta'], before, torch.zeros_like(before, dtype=torch.bool),
                   batch_size=s.batch_size, seed=s.seed, **rules)
    after = torch.tensor([sample['tokens'] for sample in samples])
    return rows + [mended('--task=repair --remask_threshold=0.8', before, after, clean, mean_nfe(samples))]

MEASURES = dict(likelihood=likelihood_rows, samples=sample_rows, infill=infill_rows, repair=repair_rows)
METRICS = dict(likelihood=('nelbo', 'causal_nll', *COST),
               samples=('judge', 'entropy', 'distinct_3', 'known_words', 'copy_mean', 'copy_max', 'nfe'),
               infill=('restored', 'judge', 'nfe'), repair=('restored', 'damaged', 'right', 'nfe'))
SIZES = dict(likelihood=[DRAWS], infill=[GAP], repair=[NOISE_SHARE, THRESHOLDS])


def run(s):
    """The suite with bench's settings s: (rows, up to four tables), see measure_all."""
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

    def key_of(table, run, how):
        runs = [run, 'judge'] if table in ('samples', 'infill') else [run]
        return [[folder_name(settings(run), RUNS, run) for run in runs], s.num_seeds, *SIZES.get(table, [])]

    return measure_all(s, network, wanted(s, rows_of_tables(s)), MEASURES, key_of, tables)


def tables(rows):
    """Markdown of the rows of run, a table for every kind that there is."""
    found = {table: [row for row in rows if row['table'] == table] for table in METRICS}
    return '\n\n'.join(table_of(found[table], {table: 'name'}, metrics)
                       for table, metrics in METRICS.items() if found[table])
