"""
What suites that train share: runs, each in a folder of its own, and rows that are measured once.

A suite has a table of runs, {name: [script, its arguments]}, in which {other} stands for the checkpoint of the run other. A run's
folder is in out_dir/<the suite's name> and is named after a hash of its arguments and config files, so that changed arguments
are a new run. A run that is finished is not trained again, an interrupted one goes on; every measured row is kept in rows.jsonl.
s is always bench's settings.
"""

import ast
import functools
import glob
import hashlib
import json
import os
import re
import subprocess
import sys

from tqdm import tqdm

import configurator
from plumbing.checkpoint import load_checkpoint
from plumbing.files import append_line, make_folder, write_atomically
from configurator import UserError
from suites.common import load

WRITTEN = {'tools/energy.py': 'ckpt_energy.pt', 'tools/distill.py': 'ckpt_distilled.pt'}   # the checkpoint of a script that cannot resume
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# -----------------------------------------------------------------------------
# training what is missing


def arguments(s, runs, name, place):
    """
    The words of a run's command: the script, its arguments, those of train_args that the script has. No out_dir yet.

    place(run) -> what stands there for {run}.
    """
    script, *words = runs[name]
    words = words + [word for word in s.train_args.split() if setting_of(word) in known_settings(script)]
    return [script, *[re.sub(r'\{(.*?)\}', lambda found: place(found[1]), word) for word in words]]


def setting_of(word):
    """--max-iters=3 -> max_iters"""
    return word.partition('=')[0].lstrip('-').replace('-', '_')


@functools.cache
def known_settings(script):
    """The settings of a script, none if there is no such script yet."""
    path = os.path.join(ROOT, script)
    return configurator.settings(path) if os.path.exists(path) else {}


def check_train_args(s, runs):
    """Raises UserError for a word in train_args that no script has."""
    for word in s.train_args.split():
        if not any(setting_of(word) in known_settings(script) for script, *_ in runs.values()) or '=' not in word:
            scripts = ', '.join(sorted({run[0] for run in runs.values()}))
            raise UserError(f"train_args expects --key=value words of {scripts}; got '{word}'")


def folder_of(s, runs, name):
    """Where a run lives: its name and a hash of its arguments, of what its config files say (comments aside) and its origin."""
    script, *words = arguments(s, runs, name, lambda other: os.path.basename(folder_of(s, runs, other)))
    said = [script]
    for word in words:
        path = os.path.join(ROOT, word)
        if word.endswith('.py') and os.path.exists(path):
            with open(path, encoding='utf-8') as file:
                word = ast.dump(ast.parse(file.read()))
        said.append(word)
    slug = re.sub(r'\W+', '_', name).strip('_')
    return os.path.join(s.out_dir, s.suite, f"{slug}_{hashlib.sha256(repr(said).encode()).hexdigest()[:8]}")


def progress_of(folder, script):
    """(the path of the newest checkpoint there or None, whether training is finished)."""
    if script in WRITTEN:
        path = os.path.join(folder, WRITTEN[script])
        return (path, True) if os.path.exists(path) else (None, False)
    found = glob.glob(os.path.join(glob.escape(folder), 'ckpt_*[!0-9].pt'))    # none of the numbered ones
    if not found:
        return None, False
    path = max(found, key=os.path.getmtime)
    _, checkpoint = load_checkpoint(path)
    return path, checkpoint['iter_num'] >= checkpoint['config']['max_iters']


def trained(s, runs, name):
    """The path of a run's checkpoint; trains what is missing of it, and of the runs that it starts from, first."""
    folder, script = folder_of(s, runs, name), runs[name][0]
    if not os.path.exists(os.path.join(ROOT, script)):
        raise UserError(f'{name}: there is no {script} to train it with')
    path, finished = progress_of(folder, script)
    if finished:
        return path
    command = arguments(s, runs, name, lambda other: os.path.abspath(trained(s, runs, other)))
    command += [f'--out_dir={os.path.abspath(folder)}', *(['--init_from=resume'] if path else [])]
    log = os.path.join(folder, 'train.txt')
    tqdm.write(f"{name}: python {' '.join(command)} > {log}")
    make_folder(folder)
    status = execute(command, log, 'a' if path else 'w')
    path, finished = progress_of(folder, script)
    if status or not finished:
        with open(log, encoding='utf-8', errors='replace') as file:
            last = ' | '.join(file.read().splitlines()[-5:])
        raise UserError(f"{name}: training {'failed' if status else 'stopped before its end'}, see {log}: {last}")
    return path


def execute(command, log, mode):
    """The exit status of a Python command, its output going to a file. When we are interrupted it may still save."""
    with open(log, mode, encoding='utf-8') as file:
        child = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise


def network_of(s, runs, networks, name):
    """(model, checkpoint) of a run, which is trained if need be. networks keeps it, or the error, so that nothing fails twice."""
    if name not in networks:
        try:
            networks[name] = load(s, trained(s, runs, name))
        except UserError as error:
            networks[name] = error
    if isinstance(networks[name], UserError):
        raise networks[name]
    return networks[name]


# -----------------------------------------------------------------------------
# measuring what is missing


def measure_all(s, asked, key_of, measure, tables):
    """
    The rows of all that is asked, tuples with a name in front, and their tables as text: (rows, text), also written to table.md.

    key_of(*one) -> what its rows depend on, as text; measure(*one) -> a list of dicts; tables(rows) -> text. What is in
    rows.jsonl is not measured again. What cannot be measured is left out, and a UserError at the end names the first of it.
    """
    folder = os.path.join(s.out_dir, s.suite)
    make_folder(folder)
    cache = os.path.join(folder, 'rows.jsonl')
    known, found, failed = read_rows(cache), [], []
    for one in tqdm(asked, desc='rows', leave=False):
        try:
            key = key_of(*one)
            if key not in known:
                rows = measure(*one)
                append_line(cache, json.dumps(dict(key=key, rows=rows)))
                known[key] = rows
            found += known[key]
        except UserError as error:
            tqdm.write(f'{one[0]}: {error}')
            failed.append(f'{one[0]}: {error}')
    text, path = tables(found), os.path.join(folder, 'table.md')
    write_atomically(path, text + '\n')
    if failed:
        print(text)
        raise UserError(f'{len(failed)} of {len(asked)} rows could not be measured, the others are in {path}. {failed[0]}')
    print(f'{s.num_seeds} seeds x {s.num_samples} samples, ± standard error; also in {path}')
    return found, text


def read_rows(path):
    """The rows that were measured before: {key: rows}. What is no whole line, after a crash, is skipped and measured again."""
    known = {}
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            text = file.read()
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                known[entry['key']] = entry['rows']
            except (ValueError, KeyError, TypeError):
                continue
        if text and not text.endswith('\n'):                                   # the next line shall not be glued to a torn one
            with open(path, 'a', encoding='utf-8') as file:
                file.write('\n')
    return known
