"""docs/extending.md: every block works when it stands where its first line says."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--n_recur=1', '--batch_size=16', '--max_iters=8',
        '--eval_interval=8', '--eval_rows=16', '--eval_samples=2', '--proofreading_warmup_iters=0',
        '--device=cpu', '--dtype=float32']


def blocks():
    """(file, name of the dictionary or None, code) of every Python block of the page."""
    with open(os.path.join(ROOT, 'docs', 'extending.md'), encoding='utf-8') as page:
        found = re.findall(r'```python\n# (\S+?)(?:, behind (\w+))?\n(.*?)```', page.read(), re.DOTALL)
    return [(path, name or None, code) for path, name, code in found]


def insert(path, name, code):
    """
    Writes code behind the statement that makes the dictionary called name; without a name as a file of its
    own.
    """
    if not name:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w', encoding='utf-8') as file:
            file.write(code)
        return
    with open(path, encoding='utf-8') as file:
        source = file.read()
    ends = [
        node.end_lineno
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) == name
    ]
    lines = source.splitlines(keepends=True)
    lines.insert(ends[0], f'\n\n{code}\n\n')
    with open(path, 'w', encoding='utf-8') as file:
        file.write(''.join(lines))


@pytest.fixture(scope='module')
def extended(tmp_path_factory):
    """A copy of the repository with everything that the page adds."""
    root = tmp_path_factory.mktemp('extended') / 'nanoremask'
    shutil.copytree(ROOT, root,
                    ignore=shutil.ignore_patterns('.*', 'out*', '*.bin', 'meta.json', 'tests', '__pycache__'))
    for path, name, code in blocks():
        insert(os.path.join(root, path), name, code)
    return root


def run(root, *commands):
    """Commands in the copy, one process for all: their output. They must succeed."""
    code = ('import runpy, sys\nsys.path.insert(0, "")\n'
            f'for sys.argv in {commands!r}: runpy.run_path(sys.argv[0], run_name="__main__")')
    done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_adds_one_thing_of_each_kind():
    assert [name for _, name, _ in blocks()] == ['COMMIT', 'DOUBT', 'CORRUPTIONS', 'IN_A_BLOCK', None, None]
    for _, name, code in blocks()[:3]:  # a rule is at most six lines
        assert len(code.strip().splitlines()) <= 7


CPU = ['--device=cpu', '--dtype=float32', '--eval_rows=4']
FEW = [*CPU, '--num_samples=4', '--num_seeds=1']


@pytest.fixture(scope='module')
def told(extended):
    """What training, sampling, a second stage and the suites say of the dataset of the page."""
    return run(extended,
               ['train.py', 'config/remask_all.py', '--dataset=sorting', '--block_size=24', '--parts=gain',
                '--corruption=own:0.5,next_id:0.5', *TINY],
               ['sample.py', '--commit=structure', '--remask=lonely', '--steps=6', '--num_samples=3',
                '--save=samples.jsonl'],
               ['bench.py', '--suite=arithmetic', '--steps=3', '--only=AR,ancestral', *FEW],
               ['bench.py', '--suite=samplers', '--budgets=3', '--only=margin', *FEW],
               ['bench.py', '--suite=tasks', '--budgets=3', *FEW],
               ['bench.py', '--suite=checkpoints', '--init_from=out/ckpt_*.pt', '--steps=3', *FEW],
               ['bench.py', '--suite=diagnose', '--only=vocabulary,leak', *CPU[:2]],
               ['tools/energy.py', '--max_iters=1', '--own_samples=16', *CPU],
               ['sample.py', '--init_from=out/energy', '--best_of=2', '--num_samples=2', *CPU[:2]])


def test_what_the_page_adds_trains_and_samples(extended, told):
    assert re.search(r'0?\d+% of 2 samples are well formed', told)
    assert 'commit=structure' in told and 'remask=lonely' in told and ('✓' in told or '✗' in told)
    with open(os.path.join(extended, 'samples.jsonl'), encoding='utf-8') as file:
        samples = [json.loads(line) for line in file]
    assert len(samples) == 3 and all(sample['nfe'] == 6 for sample in samples)
    assert all(token < 14 for sample in samples for token in sample['tokens'])


def test_what_the_page_adds_is_measured(told):
    """By all suites that need no more than score and draw; ckpt stays what was trained."""
    assert re.search(r'\| the grammar itself +\| free +\| 100\.0', told) and 'balanced' not in told
    for name in ('AR: causal pass', 'ancestral', 'commit=margin', 'infill expr=_', 'infill _=value', '| edit',
                 'with insertions', '| out/ckpt_joint_all_positions.pt | the first', 'own samples',
                 '2 samples, '):
        assert name in told, name
