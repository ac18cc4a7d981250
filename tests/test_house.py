"""The house: what may import what, and how long a function may be. ruff.toml has the other limits."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = sorted(
    path
    for path in subprocess.run(
        ['git', 'ls-files', '*.py'], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if os.path.exists(os.path.join(ROOT, path))
)
# a file imports only from its own room and from those before it; tests may import anything
ROOMS = (
    'configurator.py',
    'data',
    'plumbing',
    'model.py',
    'parts',
    'corruption.py',
    'sample.py',
    'train.py',
    'tools',
    'suites',
    'bench.py',
    'app.py',
)


def tree(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        return ast.parse(file.read())


def imported(path):
    """The modules that a file imports when it is imported itself, not inside of its functions."""
    for node in tree(path).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def room(name):
    """The number of the room of a path or module, None for what is not ours."""
    first = name.split('/')[0].split('.')[0]
    for number, known in enumerate(ROOMS):
        if known.removesuffix('.py') == first:
            return number


@pytest.mark.skipif(not FILES, reason='needs git')
def test_files_import_only_downwards():
    upwards = [
        f'{path} imports {module}'
        for path in FILES
        if room(path) is not None
        for module in imported(path)
        if room(module) is not None and room(module) > room(path)
    ]
    # data/common.py and the loader know the configurator only, plumbing knows data, and nothing knows what
    # stands above it
    assert not upwards


@pytest.mark.skipif(not FILES, reason='needs git')
def test_the_root_is_seven_files():
    root = [path for path in FILES if '/' not in path]
    names = 'app bench configurator corruption model sample train'
    assert root == [f'{name}.py' for name in names.split()]


@pytest.mark.parametrize('path', [path for path in FILES if not path.startswith('config/')])
def test_no_function_is_longer_than_sixty_lines(path):
    long = [
        f'{node.name}: {node.end_lineno - node.lineno + 1}'
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert not long


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'app.py'])
def test_help_does_not_wait_for_torch(script):
    command = [sys.executable, '-X', 'importtime', script, '--help']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert '--init_from=' in result.stdout and '| configurator' in result.stderr
    assert not re.search(r'\| +(torch|numpy)$', result.stderr, re.MULTILINE)
