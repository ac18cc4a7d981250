"""
Measure samplers, checkpoints and recipes. Each suite is a file in suites/.

    python bench.py --suite=arithmetic --init_from=ckpt   the samplers of one checkpoint
    python bench.py --suite=samplers --json=table.json    the rules and presets at several numbers of passes
    python bench.py --suite=blocks --budgets=32,64        in blocks of every length: likelihood, samples
    python bench.py --suite=tasks --num_samples=200       infill, repair and edit held-out strings
    python bench.py --suite=sudoku --num_samples=200      held-out puzzles to solve, boards to repair
    python bench.py --suite=checkpoints --init_from='out/*/ckpt_*.pt'    training runs side by side
    python bench.py --suite=universal                     the universal denoiser's table; trains what it needs
    python bench.py --suite=text --budgets=64,128         likelihood, samples, infill, repair; trains too
    python bench.py --suite=repair                        text and strings whose lengths change; trains too
    python bench.py --suite=stages --only="text: stage 0" simple first, or all from the start? Trains too
    python bench.py --suite=diagnose --train_args=config/unmask.py       or --init_from=ckpt: can this learn?
    python bench.py --suite=faults --num_samples=40       training runs killed and resumed: is anything lost?
    python bench.py --suite=speed --only=training         ours against a plain script
"""

import configurator

configurator.help_first(globals())           # --help does not wait for torch
# ruff: noqa: E402 (so the imports come after it)

import glob
import importlib
import os
import shlex
import sys
from types import SimpleNamespace

from plumbing.files import check_output, to_json, write_atomically
from configurator import UserError

# -----------------------------------------------------------------------------
suite = 'arithmetic'     # which one, see above
init_from = 'ckpt'       # the newest checkpoint in out_dir; or a path; checkpoints: patterns with commas
merge_from: str = None   # another checkpoint, merged with the first; checkpoints: as many as init_from
merge_weight = 0.5       # its share
out_dir = 'out'          # where 'ckpt' looks; suites that train: runs and table go to that folder in it
train_args = ''          # diagnose: words for train.py; suites that train: for scripts that have them
num_samples = 1000       # samples a row and seed; faults: kills
num_seeds = 3            # seeds a row; tasks: draws of a string; stages: seeds of training
steps = 64               # arithmetic, checkpoints, stages: passes; speed: rounds
budgets = (8, 16, 32, 64)  # samplers, tasks, text: passes
remask_rate = 0.3        # checkpoints: of remask=wrong
eval_rows = 1000         # checkpoints, universal: rows of the validation split
only: str = None         # only rows whose name contains this, or one of several with commas; speed: tables
seed = 1337              # the first seed
batch_size = 125         # samples drawn at a time
json: str = None         # also write the table to this file
device = 'auto'          # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'           # auto | float32 | bfloat16
attention = 'auto'       # auto | plain | sdpa
compile = False          # torch.compile the network
# -----------------------------------------------------------------------------

SUITES = ('arithmetic samplers blocks tasks sudoku checkpoints universal text repair stages diagnose '
          'faults speed').split()


def main():
    if suite not in SUITES:
        raise UserError(f"suite expects one of {', '.join(SUITES)}; got '{suite}'")
    settings = {name: globals()[name] for name in configurator.settings(__file__)}
    for name in ('num_samples', 'num_seeds', 'steps', 'batch_size', 'eval_rows'):
        if settings[name] < 1:
            raise UserError(f'{name} must be at least 1, got {settings[name]}')
    for name in ('merge_weight', 'remask_rate'):
        if not 0 <= settings[name] <= 1:
            raise UserError(f'{name} must be in 0..1, got {settings[name]}')
    if not budgets or any(type(n) is not int or n < 1 for n in budgets):
        raise UserError(f'budgets expects numbers of passes, each at least 1, got {budgets}')
    inputs = (init_from, merge_from or '', os.path.join(out_dir, '**', 'ckpt_*.pt'))
    check_output(json, *[path for patterns in inputs for pattern in patterns.split(',')
                         for path in glob.glob(pattern, recursive=True)])

    rows, table = importlib.import_module(f'suites.{suite}').run(SimpleNamespace(**settings))
    print(table)
    if json:
        written = dict(command=f'python bench.py {shlex.join(sys.argv[1:])}'.strip(), rows=rows)
        write_atomically(json, to_json(written, indent=1) + '\n')
        print(f'written to {json}')
    problems = [row['name'] for row in rows if row.get('status') == 'problem']     # of diagnose
    if problems:
        raise UserError(f"problems with {', '.join(problems)}; what to do stands above")


if __name__ == '__main__':
    configurator.run(globals())
