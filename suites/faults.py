"""
Does training survive? Runs are killed again and again, resumed, and compared with one that nobody touched.

    python bench.py --suite=faults --num_samples=40         SIGKILL, anywhere or inside a write, and SIGTERM
    python bench.py --suite=faults --only=soak --steps=10   train, sample, resume for 10 minutes: what grows?

Every checkpoint that a kill leaves must load, and none may be older than the one before the kill. In the end
weights, optimisers and random numbers must be, bit by bit, those of the undisturbed run.
"""

import contextlib
import glob
import io
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import statistics
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
    t0 = time.time()
    process = start(folder, words)
    while process.is_alive() and not os.path.exists(os.path.join(folder, 'log.jsonl')):
        time.sleep(1e-3)
    t1 = time.time()
    finish(process, folder)
    return t1 - t0, time.time() - t1


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
    until = time.time() + rng.uniform(0.5 * seconds[0], seconds[0] + seconds[1] / 4)
    inside = False
    while process.is_alive() and (kind == KINDS[1] or time.time() < until):
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

# -----------------------------------------------------------------------------
# soak


def command(script, *words):
    """A script in this process, as from the command line, but silent. Raises UserError if it fails."""
    said, argv = io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        sys.argv = [script, *words]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
    except SystemExit as stop:
        words = said.getvalue().strip() or str(stop)
        raise UserError(f'{script} failed: {words.splitlines()[-1]}') from stop
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def usage(folder):
    """What this process and the folder take now: dict of memory (RSS) and disk in MB, open files."""
    with open('/proc/self/statm', encoding='utf-8') as file:
        memory = int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6
    paths = glob.glob(os.path.join(glob.escape(folder), '**'), recursive=True)
    disk = sum(map(os.path.getsize, paths)) / 1e6
    return {'memory, MB': memory, 'open files': len(os.listdir('/proc/self/fd')), 'disk, MB': disk}


def soak(s, minutes, words=()):
    """Trains, samples and resumes here for these minutes: rows of what the process uses, and how it grows."""
    if not os.path.exists('/proc/self/statm'):
        raise UserError('the soak reads /proc, which only Linux has')
    folder = os.path.join(s.out_dir, 'faults', 'soak')
    shutil.rmtree(folder, ignore_errors=True)
    here, seen, end = f'--out_dir={folder}', [], time.time() + 60 * minutes
    while time.time() < end or len(seen) < 4:
        command('train.py', *TINY, *words, here, '--max_iters=10')
        save = f'--save={folder}/samples.jsonl'
        command('sample.py', here, '--steps=4', '--num_samples=4', save, '--device=cpu')
        command('train.py', *TINY, *words, here, '--max_iters=20', '--init_from=resume')
        seen.append(usage(folder))

    def slope(name):
        late = [use[name] for use in seen[len(seen) // 2:]]              # the first rounds fill caches
        return statistics.linear_regression(range(len(late)), late).slope
    return [dict(name=f'soak: {name}', rounds=len(seen), first=first, last=seen[-1][name], slope=slope(name))
            for name, first in seen[0].items()]


def run(s):
    """The suite with bench's settings s: (rows, table)."""
    if s.only and s.only not in 'soak':
        raise UserError(f"faults has no '{s.only}': --only=soak, with --steps=MINUTES, or no --only")
    if s.only:
        rows = soak(s, s.steps)
        lines = [[row['name'], str(row['rounds']), *[f'{row[key]:.3f}' for key in ('first', 'last', 'slope')]]
                 for row in rows]
        head = ['of the process', 'rounds', 'after the first', 'after the last', 'growth a round']
        return rows, markdown(head, lines)
    rows, runs = survive(s)
    lines = [list(map(str, row.values())) for row in rows]
    head = ['disturbance', 'how often', 'inside a write', 'corrupt checkpoints', 'lost checkpoints']
    end = (f"{runs['finished']} runs reached their end, {runs['identical']} of them bit-identical to the "
           f"undisturbed one; {runs['left_behind']} locks and half files left behind")
    return [*rows, runs], f'{markdown(head, lines)}\n\n{end}'
