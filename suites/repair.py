"""
Repair that changes lengths: text with typing errors mended by a network that was trained on edits.

In num_samples held-out windows of text every character is hit with a probability: by turns replaced, dropped,
doubled, preceded by a random one, or swapped with the next; num_seeds draws each. before, after: the edits
between it and the clean text, a clean character (Levenshtein). damaged: of the characters that were not hit
the share that is no longer there. touched: of windows that were clean the share that is changed at all.

threshold      the same for several of remask_threshold, and not to choose one by: these windows are held out
usual text     repair by the recipe of text, which keeps the length
dictionary     each word becomes the likeliest known one an edit away (needs symspellpy), if it is not known
arithmetic     strings under mixed noise with insertions; accuracy, exact: see suites/tasks.py; aligned: the
               share of the clean tokens that are there, wherever they stand
one token      strings into which one token was inserted, or that lost one. exact: restored, of those that
               one edit makes right in one way only; ambiguous: the share of the others; correct: of all
infill         [...]=value, a hole of unknown length, and as many masks as there were tokens; valid, and with
               that value

Runs and rows are kept in out_dir/repair, see runs.py.
"""

import functools
import random
import re
from collections import Counter

import torch
from tqdm import tqdm

from configurator import UserError
from data.loader import spread_rows
from parts.presets import choose_rules
from parts.handle import by_length
from plumbing.evaluate import per_token
from plumbing.text import ANY, decode, load_task, modelled, task_canvas, until_end
from sample import fill
from suites.common import cell, held_out_rows, mean_nfe, table_of, wanted, with_errors
from suites.runs import check_train_args, folder_name, measure_all, network_of
from suites.tasks import PROTOCOLS, right_shares, ways_to_repair, with_noise
from suites.text import corpus_of, mean_of, stream

UNIVERSAL = ['train.py', 'config/universal.py']
RUNS = {
    'text': ['train.py', 'config/repair_text.py'],
    'usual text': ['train.py', 'config/shakespeare_char_cpu.py'],
    'arithmetic': UNIVERSAL,
    'arithmetic with edits': [*UNIVERSAL, '--remask_target=edits'],
}
ONE = ('inserted', 'lost')
LEVELS = (0.03, 0.1, 0.0)
THRESHOLDS = (0.5, 0.7, 0.8, 0.95)
MARGIN = 16                      # a window may grow by that much


def rows_of_tables(s):
    """All rows: (name, table, run, what the table's function is told of it)."""
    ways = [('nothing', {}), ('dictionary', {}), ('--task=repair', {})]
    ways += [('threshold', dict(remask_threshold=t)) for t in THRESHOLDS]
    rows = []
    for way, how in ways:
        name = way + ''.join(f' {how[key]:g}' for key in ('remask_threshold',) if key in how)
        rows += [(f'text, {level:.0%} hit: {name}', 'text', 'text', dict(how, way=way, level=level))
                 for level in LEVELS]
    rows += [(f'usual text, {level:.0%} hit: --task=repair', 'text', 'usual text',
              dict(way='--task=repair', level=level)) for level in LEVELS]
    for run in ('arithmetic', 'arithmetic with edits'):
        rows.append((f'{run}: repair', 'arithmetic', run, {}))
        rows += [(f'{run}: one token {what}', 'one token', run, dict(what=what)) for what in ONE]
        rows.append((f'{run}: infill, length known', 'infill', run, dict(hole='_', remask='wrong', steps=64)))
    return rows + [('arithmetic with edits: infill, length unknown', 'infill', run, dict(hole=ANY))]


def hit(text, level, letters, rng):
    """A text with typing errors, and its characters that were not hit, as their numbers."""
    out, spared, i = [], [], 0
    while i < len(text):
        what = rng.choice(('replace', 'drop', 'double', 'insert', 'swap')) if rng.random() < level else ''
        c = text[i]
        if what == 'swap' and i + 1 < len(text):
            out += [text[i + 1], c]
            i += 2
            continue
        if what in ('replace', 'insert'):
            out.append(rng.choice([other for other in letters if other != c]))
        out += [c] * {'replace': 0, 'drop': 0, 'double': 2}.get(what, 1)
        if what != 'replace' and what != 'drop':
            spared.append(i)
        i += 1
    return ''.join(out), spared


def compare(text, clean):
    """(the least number of edits from a text to the clean one, the characters of clean that it kept)."""
    table = [[*range(len(clean) + 1)]]
    for i, a in enumerate(text, 1):
        above, line = table[-1], [i]
        for j, b in enumerate(clean, 1):
            line.append(min(above[j] + 1, line[-1] + 1, above[j - 1] + (a != b)))
        table.append(line)
    kept, i, j = set(), len(text), len(clean)
    while i and j:
        same = text[i - 1] == clean[j - 1]
        if table[i][j] == table[i - 1][j - 1] + (not same):
            i, j = i - 1, j - 1
            if same:
                kept.add(j)
        elif table[i][j] == table[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
    return table[-1][-1], kept


@functools.lru_cache(maxsize=1)
def dictionary(dataset):
    """A function of a text: each unknown word becomes the commonest known one an edit away."""
    try:
        from symspellpy import SymSpell, Verbosity
    except ImportError:
        raise UserError('the dictionary needs symspellpy: pip install symspellpy') from None
    speller = SymSpell(max_dictionary_edit_distance=1)
    for word, count in Counter(re.findall(r"[a-z']+", corpus_of(dataset).lower())).items():
        speller.create_dictionary_entry(word, count)

    def word(found):
        near = speller.lookup(found[0], Verbosity.TOP, max_edit_distance=1, transfer_casing=True)
        return near[0].term if near else found[0]
    return lambda text: re.sub(r"[A-Za-z']+", word, text)


def written(s, model, checkpoint, task, texts, **how):
    """The samples that a task makes of texts, and the mean of their passes."""
    meta = checkpoint['meta']
    canvases, fixed = zip(*(task_canvas(task, model, meta, text, '_') for text in texts))
    rules = choose_rules(checkpoint['config'], task=task, inside=True, stream=meta['eos'] is None,
                         any_length=any(ANY in text for text in texts), **how)
    sampler = functools.partial(fill, model, meta, batch_size=s.batch_size, seed=s.seed, **rules)
    samples = by_length(sampler, [row[0] for row in canvases], [row[0] for row in fixed])
    return samples, mean_nfe(samples)


def text_rows(s, network, name, run, how):
    """One row: num_samples windows, num_seeds draws of errors, mended in one way."""
    model, checkpoint = network(run)
    meta, how = checkpoint['meta'], dict(how)
    way, level = how.pop('way'), how.pop('level')
    ids = spread_rows(stream(checkpoint)['val'], s.num_samples, model.config.block_size - MARGIN)
    clean = [decode(meta, row)[0] for row in ids.tolist()] * (s.num_seeds if level else 1)
    rng = random.Random(f'repair {s.seed} {level}')
    before, spared = zip(*(hit(text, level, meta['itos'], rng) for text in clean))
    after, nfe = before, 0
    if way == 'dictionary':
        after = [*map(dictionary(meta.get('dataset', meta['name'])), before)]
    elif way != 'nothing':
        samples, nfe = written(s, model, checkpoint, 'repair', before, **how)
        after = [sample['text'] for sample in samples]

    sizes = torch.tensor([len(text) for text in clean])
    found = [(*compare(a, text), *compare(b, text)) for a, b, text in zip(after, before, clean)]
    known = [there & set(kept) for kept, (*_, there) in zip(spared, found)]
    lost = torch.tensor([len(there - still) for there, (_, still, *_) in zip(known, found)])
    row = dict(name=name, n=len(clean), nfe=nfe)
    for metric, at in (('after', 0), ('before', 2)):
        edits = torch.tensor([parts[at] for parts in found]).double()
        row[metric], row[f'{metric}_se'] = per_token(edits, sizes)
    row['damaged'], row['damaged_se'] = per_token(lost.double(), torch.tensor([*map(len, known)]))
    changed = torch.tensor([a != b for a, b in zip(after, before)]).double()
    row.update(mean_of('touched', changed))
    tqdm.write(f"{name}: {cell(row, 'before')} -> {cell(row, 'after')}, damaged {cell(row, 'damaged')}")
    return [row]


def arithmetic_rows(s, network, name, run, how):
    """Two rows: num_samples held-out strings with a fifth of the tokens hit by mixed noise, and mended."""
    model, checkpoint = network(run)
    meta, config = checkpoint['meta'], checkpoint['config']
    clean = held_out_rows(s, model, checkpoint)
    level, rng = torch.full((len(clean),), 0.2, dtype=torch.float64), torch.Generator().manual_seed(s.seed)
    noisy = with_noise(model, meta, clean, PROTOCOLS['with insertions'], level, rng)
    real, rows = modelled(clean, meta)[1], []
    ways = ways_to_repair(s, model, meta, config, clean, noisy)
    for way in ('nothing', '--task=repair'):
        ids, nfe = ways[way]
        right = ids == clean
        row = dict(name=f'{run}: {way}', nfe=nfe, exact=(right | ~real).all(1).double().mean().item())
        row = with_errors(row, len(clean))
        texts = [[until_end(meta, x) for x in some.tolist()] for some in (ids, clean)]
        kept = torch.tensor([len(compare(*pair)[1]) for pair in zip(*texts)]) - 1       # the start symbol
        for metric, count in (('accuracy', (right & real).sum(1)), ('aligned', kept)):
            row[metric], row[f'{metric}_se'] = per_token(count.double(), real.sum(1))
        rows.append(row)
    return rows


def held_out(s, run_of):
    """(model, checkpoint, task, held-out strings) of a run."""
    model, checkpoint = run_of
    meta, rows = checkpoint['meta'], held_out_rows(s, model, checkpoint)
    return model, checkpoint, load_task(meta['name']), [decode(meta, row)[0] for row in rows.tolist()]


def with_one(text, letters, rng):
    """text with a letter more, anywhere."""
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(letters) + text[at:]


def less_one(text, rng):
    """text with a letter less."""
    at = rng.randrange(len(text))
    return text[:at] + text[at + 1:]


def an_edit_away(text, what, letters):
    """All that text may have been: before one letter was 'inserted', or one was 'lost'."""
    if what == 'inserted':
        return {text[:at] + text[at + 1:] for at in range(len(text))}
    return {text[:at] + letter + text[at:] for at in range(len(text) + 1) for letter in letters}


def single_rows(s, network, name, run, how):
    """One row: num_samples held-out strings, one token of each inserted or lost, mended."""
    model, checkpoint, task, clean = held_out(s, network(run))
    clean = [text for text in clean if len(text) < model.config.block_size - 2]     # one more has room
    rng, what, letters = random.Random(f'{how} {s.seed}'), how['what'], sorted(set(''.join(clean)))
    noisy = [with_one(text, letters, rng) if what == 'inserted' else less_one(text, rng) for text in clean]
    samples, nfe = written(s, model, checkpoint, 'repair', noisy)
    ways = [[text for text in an_edit_away(text, what, letters) | {text} if task.score([text])['correct']]
            for text in noisy]
    known = torch.tensor([len(some) == 1 for some in ways])
    exact = torch.tensor([sample['text'] == text for sample, text in zip(samples, clean)])
    right = [task.score([sample['text']])['correct'] for sample in samples]
    row = dict(name=name, n=len(clean), nfe=nfe, **mean_of('exact', exact[known].double()))
    row.update(mean_of('ambiguous', (~known).double()), **mean_of('correct', torch.tensor(right).double()))
    return [row]


def infill_rows(s, network, name, run, how):
    """One row: num_samples held-out strings to be written anew, but for '=' and the value."""
    model, checkpoint, task, clean = held_out(s, network(run))
    how, parts = dict(how), [text.split('=') for text in clean]
    hole = how.pop('hole')
    sizes = [1 if hole == ANY else len(left) for left, _ in parts]
    texts = [f'{hole * size}={value}' for size, (_, value) in zip(sizes, parts)]
    samples, nfe = written(s, model, checkpoint, 'infill', texts, **how)
    return [with_errors(dict(name=name, nfe=nfe, **right_shares(task, samples, clean)), len(clean))]


MEASURES = {'text': text_rows, 'arithmetic': arithmetic_rows, 'infill': infill_rows, 'one token': single_rows}
METRICS = {'text': ('before', 'after', 'damaged', 'touched', 'nfe'),
           'arithmetic': ('aligned', 'accuracy', 'exact', 'nfe'),
           'infill': ('valid', 'correct', 'nfe'),
           'one token': ('exact', 'ambiguous', 'correct', 'nfe')}


def run(s):
    """The suite with bench's settings s: (rows, two tables), see measure_all."""
    check_train_args(s, RUNS)
    network = functools.partial(network_of, s, RUNS, {})

    def key_of(table, run, how):
        return [folder_name(s, RUNS, run), s.num_seeds, MARGIN]
    return measure_all(s, network, wanted(s, rows_of_tables(s)), MEASURES, key_of, tables)


def tables(rows):
    """Markdown of the rows of run, a table for each kind that there is."""
    found = {table: [row for row in rows if row['table'] == table] for table in METRICS}
    return '\n\n'.join(table_of(found[table], {table: 'name'}, metrics)
                       for table, metrics in METRICS.items() if found[table])
