"""
Does training survive? Runs are killed again and again, resumed, and compared with one that nobody touched.

    python bench.py --suite=faults --num_samples=40    SIGKILL, anywhere or inside a write, and SIGTERM

Every checkpoint that a kill leaves must load, and none may be older than the one before the kill. In the end
weights, optimisers and random numbers must be, bit by bit, those of the undisturbed run.
"""

import glob
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time

import torch

from configurator import UserError
from model import GPT
from plumbing.files import make_folder
from suites.common import markdown
from suites.runs import ROOT

if os.name == 'nt':
    raise UserError('faults kills processes by signals that Windows does not have: run it on Linux or macOS')

# a run of some seconds that saves all the time
TINY = ('--n_layer=1 --n_head=2 --n_embd=16 --n_recur=1 --batch_size=4 --max_iters=200 --eval_interval=5 '
        '--eval_rows=4 --eval_samples=0 --log_interval=5 --keep_every=50 --training_type=joint '
        '--causal_ratio=0.5 --device=cpu').split()
FRESH = multiprocessing.get_context('forkserver')    # its server imports torch once, which takes seconds
KINDS = ('SIGKILL at any time', 'SIGKILL inside a write', 'SIGTERM')
STATE = ('model', 'ema', 'optimizers', 'rng', 'sums', 'control', 'iter_num')

# -----------------------------------------------------------------------------
# kills


def work(folder, words):
    """What a run's process does: train.py as from the command line, but without curves, which take long."""
    os.chdir(ROOT)
    with open(f'{folder}.txt', 'a', encoding='utf-8') as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.modules['matplotlib.figure'] = None
    sys.argv = ['train.py', *TINY, *words, f'--out_dir={folder}']
    runpy.run_path('train.py', run_name='__main__')


def start(folder, words):
    """A training run in a process of its own, resumed if there is something to resume."""
    resume = ['--init_from=resume'] if newest(folder) else []
    process = FRESH.Process(target=work, args=(os.path.abspath(folder), [*words, *resume]))
    process.start()
    return process


def straight_run(folder, words):
    """A run that nobody disturbs: the seconds until it trains, and those that it trains."""
    FRESH.set_forkserver_preload(['torch', 'torch._dynamo', 'tqdm'])
    server = FRESH.Process(target=os.getpid)                             # what the first process waits for
    server.start()
    server.join()
    t0 = time.perf_counter()
    process = start(folder, words)
    while process.is_alive() and not os.path.exists(os.path.join(folder, 'log.jsonl')):
        time.sleep(1e-3)
    t1 = time.perf_counter()
    finish(process, folder)
    return t1 - t0, time.perf_counter() - t1


def finish(process, folder, *expected):
    """Waits for a run's end: its status. Raises UserError if that is neither 0 nor one of those expected."""
    process.join()
    if process.exitcode not in (0, *expected):
        with open(f'{folder}.txt', encoding='utf-8') as file:
            said = file.read().strip() or 'without a word'
        raise UserError(f'a run of train.py failed: {said.splitlines()[-1]}')
    return process.exitcode


def newest(folder):
    """The path of the run's newest checkpoint, None if there is none yet."""
    path = os.path.join(folder, 'ckpt_joint_all_positions.pt')
    return path if os.path.exists(path) else None


def half_written(folder, process):
    """Whether the run is writing a file there, or was when it was killed."""
    return os.path.isdir(folder) and any(name.endswith(f'.{process.pid}.tmp') for name in os.listdir(folder))


def disturb(process, folder, kind, seconds, rng):
    """Kills the run or asks it to stop: whether that was inside a write, None if the run was done before."""
    writes = rng.randint(0, 8)                                           # how many are let pass
    until = time.perf_counter() + rng.uniform(0.5 * seconds[0], seconds[0] + seconds[1] / 4)
    inside = False
    while process.is_alive() and (kind == KINDS[1] or time.perf_counter() < until):
        before, inside = inside, half_written(folder, process)
        writes -= inside and not before
        if kind == KINDS[1] and inside and writes < 0:
            break
        time.sleep(2e-4)
    if not process.is_alive():                                           # it ended before the signal
        return finish(process, folder) or None
    process.terminate() if kind == 'SIGTERM' else process.kill()
    status = finish(process, folder, -signal.SIGKILL, -signal.SIGTERM)
    return None if kind != 'SIGTERM' and status == 0 else half_written(folder, process)


def last_step(folder, found):
    """The step of the newest checkpoint, 0 without one. Counts in found the files that do not load."""
    steps = {None: 0}
    for path in glob.glob(os.path.join(glob.escape(folder), 'ckpt_*.pt')):
        try:
            steps[path] = GPT.load(path)[1]['iter_num']
        except UserError as error:
            print(error)
            found['corrupt'] += 1
    return steps.get(newest(folder), 0)


def same(a, b):
    """Whether two nested structures of tensors and numbers are equal, bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_run(folder, other):
    """Whether two finished runs are in the same state."""
    a, b = (torch.load(newest(where), weights_only=True) for where in (folder, other))
    return all(same(a[key], b[key]) for key in STATE)


def survive(s, words=()):
    """Disturbs runs s.num_samples times: rows of what was found, one for each kind, and one of the runs."""
    place = os.path.join(s.out_dir, 'faults')
    rng = random.Random(s.seed)
    shutil.rmtree(place, ignore_errors=True)
    make_folder(place)
    rows = [dict(name=kind, disturbances=0, inside=0, corrupt=0, lost=0) for kind in KINDS]
    runs = dict(name='the runs', finished=0, identical=0, left_behind=0)
    straight, done = os.path.join(place, 'straight'), 0
    seconds = straight_run(straight, words)
    while done < s.num_samples or not runs['finished']:
        folder, step = os.path.join(place, str(runs['finished'])), 0
        while done < s.num_samples and not complete(folder, straight):
            found = rows[(0, 1, 0, 1, 2)[done % 5]]
            inside = disturb(start(folder, words), folder, found['name'], seconds, rng)
            if inside is None:
                break
            now = last_step(folder, found)
            found['disturbances'] += 1
            found['inside'] += inside
            found['lost'] += now < step
            done, step = done + 1, now
            left = ', half a file left' if inside else ''
            print(f"{done}/{s.num_samples}: {found['name']}, step {step}{left}", flush=True)
        if not complete(folder, straight):
            finish(start(folder, words), folder)
        runs['finished'] += 1
        runs['identical'] += same_run(folder, straight)
        runs['left_behind'] += sum(name.endswith('.tmp') for name in os.listdir(folder))
    return rows, runs


def complete(folder, other):
    """Whether a run is where the other one ended."""
    steps = [last_step(where, {'corrupt': 0}) for where in (folder, other)]
    return newest(folder) is not None and steps[0] == steps[1]


def run(s):
    """The suite with bench's settings s: (rows, table)."""
    rows, runs = survive(s)
    lines = [list(map(str, row.values())) for row in rows]
    head = ['disturbance', 'how often', 'inside a write', 'corrupt checkpoints', 'lost checkpoints']
    end = (f"{runs['finished']} runs reached their end, {runs['identical']} of them bit-identical to the "
           f"undisturbed one; {runs['left_behind']} locks and half files left behind")
    return [*rows, runs], f'{markdown(head, lines)}\n\n{end}'
