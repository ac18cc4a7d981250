"""
What suites that train share: runs, each in a folder of its own, and rows that are measured once.

A suite has a table of runs, {name: [script, its arguments]}, in which {other} is the checkpoint of that run.
Each has a folder in out_dir/<the suite's name>, named after a hash of its arguments and config files: changed
ones are a new run. A finished run is not trained again, an interrupted one goes on.
"""

import ast
import functools
import glob
import hashlib
import os
import re
import shlex
import subprocess
import sys

from tqdm import tqdm

import configurator
from model import GPT
from plumbing.files import append_line, finite, make_folder, read_records, to_json, write_atomically
from configurator import UserError
from suites.common import load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

def arguments(s, runs, name, place):
    """The words of a run's command but for out_dir; place(run) -> what stands there for {run}."""
    script, *words = runs[name]
    words = words + [word for word in s.train_args.split() if setting_of(word) in known_settings(script)]
    return [script, *[re.sub(r'\{(.*?)\}', lambda found: place(found[1]), word) for word in words]]


def setting_of(word):
    """--max-iters=3 -> max_iters"""
    return word.partition('=')[0].lstrip('-').replace('-', '_')


@functools.cache
def known_settings(script):
    return configurator.settings(os.path.join(ROOT, script))


def check_train_args(s, runs):
    """Raises UserError for a word in train_args that no script has."""
    scripts = sorted({script for script, *_ in runs.values()})
    for word in s.train_args.split():
        if '=' not in word or not any(setting_of(word) in known_settings(script) for script in scripts):
            raise UserError(f"train_args expects --key=value words of {', '.join(scripts)}; got '{word}'")


def folder_name(s, runs, name):
    """A run's name and a hash of its arguments, its origin, and what its config files say, comments aside."""
    script, *words = arguments(s, runs, name, lambda other: folder_name(s, runs, other))
    said = [script]
    for word in words:
        path = os.path.join(ROOT, word)
        if word.endswith('.py') and os.path.exists(path):
            with open(path, encoding='utf-8') as file:
                word = ast.dump(ast.parse(file.read()))
        said.append(word)
    slug = re.sub(r'\W+', '_', name).strip('_')
    return f'{slug}_{hashlib.sha256(repr(said).encode()).hexdigest()[:8]}'


def folder_of(s, runs, name):
    """Where a run lives."""
    return os.path.join(s.out_dir, s.suite, folder_name(s, runs, name))


def progress_of(folder, script):
    """(the path of the newest checkpoint there or None, whether training is finished)."""
    # none of the numbered ones; the tools have a folder in it
    found = glob.glob(os.path.join(glob.escape(folder), '**', 'ckpt_*[!0-9].pt'), recursive=True)
    found = [path for path in found if not path.endswith('_best.pt')]
    if not found:
        return None, False
    path = max(found, key=os.path.getmtime)
    # the other scripts write once, when they are done
    checkpoint = GPT.load(path)[1]
    return path, script != 'train.py' or checkpoint['iter_num'] >= checkpoint['config']['max_iters']


def trained(s, runs, name):
    """The path of a run's checkpoint. Trains what is missing, first of the runs that it starts from."""
    folder, script = folder_of(s, runs, name), runs[name][0]
    path, finished = progress_of(folder, script)
    if finished:
        return path

    command = arguments(s, runs, name, lambda other: os.path.abspath(trained(s, runs, other)))
    command.append(f'--out_dir={os.path.abspath(folder)}')
    if path:
        command.append('--init_from=resume')
    log = os.path.join(folder, 'train.txt')
    tqdm.write(f"{name}: python {shlex.join(command)} > {shlex.quote(log)}")
    make_folder(folder)
    status = execute(command, log, 'a' if path else 'w')

    path, finished = progress_of(folder, script)
    if status or not finished:
        with open(log, encoding='utf-8', errors='replace') as file:
            last = ' | '.join(file.read().splitlines()[-5:])
        how = 'failed' if status else 'stopped before its end'
        raise UserError(f'{name}: training {how}, see {log}: {last}')
    return path


def execute(command, log, mode):
    """The exit status of a Python command that writes to a log. When we are interrupted it may still save."""
    with open(log, mode, encoding='utf-8') as file:
        child = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise


def network_of(s, runs, networks, name):
    """(model, checkpoint) of a run, trained if need be. networks keeps it, or why it failed."""
    if name not in networks:
        try:
            networks[name] = load(s, trained(s, runs, name))
        except UserError as error:
            networks[name] = error
    if isinstance(networks[name], UserError):
        raise networks[name]
    return networks[name]


def training_cost(model, *checkpoints):
    """What the training of a network took, all of its legs: dict of COST, None for what is not known."""
    cost = dict(minutes=None, tokens_per_second=None, parameters=model.num_params())
    if all('seconds' in leg for leg in checkpoints):
        config, seconds = checkpoints[-1]['config'], sum(leg['seconds'] for leg in checkpoints)
        step = config['batch_size'] * config['gradient_accumulation_steps'] * model.config.block_size
        tokens = step * sum(leg['iter_num'] for leg in checkpoints)
        cost.update(minutes=seconds / 60, tokens_per_second=tokens / max(1e-9, seconds))
    return cost


def measure_all(s, network, asked, measures, key_of, tables):
    """
    The rows of all that is asked, tuples (name, table, run, how), and their tables as text, also in table.md.

    measures[table](s, network, name, run, how) -> dicts; key_of(table, run, how) -> what else they depend on;
    tables(rows) -> text. What is in rows.jsonl is not measured again. What cannot be measured is left out,
    and a UserError at the end names the first.
    """
    folder = os.path.join(s.out_dir, s.suite)
    make_folder(folder)
    cache, path = os.path.join(folder, 'rows.jsonl'), os.path.join(folder, 'table.md')
    known, found, failed = read_rows(cache), [], []
    for name, table, run, how in tqdm(asked, desc='rows', leave=False):
        try:
            key = to_json([table, name, how, s.num_samples, s.seed, *key_of(table, run, how)])
            if key not in known:
                rows = finite([dict(row, table=table) for row in measures[table](s, network, name, run, how)])
                append_line(cache, to_json(dict(key=key, rows=rows)))
                known[key] = rows
            found += known[key]
        except UserError as error:
            failed.append(f'{name}: {error}')
            tqdm.write(failed[-1])
    text = tables(found)
    write_atomically(path, text + '\n')
    if failed:
        print(text)
        raise UserError(f'{len(failed)} of {len(asked)} rows could not be measured, '
                        f'the others are in {path}. {failed[0]}')
    print(f'{s.num_seeds} seeds x {s.num_samples} samples, ± standard error; also in {path}')
    return found, text


def read_rows(path):
    """The rows that were measured before: {key: rows}. A line that a crash has torn is skipped."""
    return {entry['key']: entry['rows'] for entry in read_records(path)
            if isinstance(entry.get('key'), str) and isinstance(entry.get('rows'), list)}
