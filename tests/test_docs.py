"""
README and docs: every command works, every link leads somewhere, every picture has a command, README is
short.

Commands are run as they stand, in one sandbox for all pages, but shortened by what SHORTER says: on a tiny
network, for two steps. Those of PARSED are not run here, because they train for hours, fetch something, or
need what may not be installed; their settings are read and checked, and the test file beside them runs their
like. test_extending.py runs extending.md; log.md is a journal, with commands as they were on their day.
"""

import glob
import os
import re
import shlex
import shutil
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, load_script

import configurator
from data import loader
from data.arithmetic import prepare as arithmetic
from data.sudoku import prepare as sudoku
from sample import How

PAGES = ['README.md', *(f'docs/{name}.md' for name in 'settings sampling running results python'.split())]
LINKED = sorted(os.path.relpath(path, ROOT) for pattern in ('*.md', 'docs/*.md', 'data/*/readme.md')
                for path in glob.glob(os.path.join(ROOT, pattern)))
CPU = '--device=cpu --dtype=float32'
TINY = ('--n_layer=1 --n_head=2 --n_embd=16 --n_recur=1 --batch_size=4 --eval_rows=8 --eval_samples=0 '
        f'--compile=False {CPU}')

# (a command that begins like this, what is appended to it), the first that fits
SHORTER = (
    ('train.py .*resume', f'--max_iters=3 --eval_interval=3 {TINY}'),
    ('train.py ', f'--max_iters=2 --eval_interval=2 {TINY}'),
    ('sample.py .*--(export|text|file)=', CPU),
    ('sample.py', f'--num_samples=2 {CPU}'),
    ('bench.py --suite=checkpoints', f'--num_samples=4 --steps=2 --eval_rows=4 {CPU}'),
    ('bench.py --suite=(tasks|samplers)', f'--num_samples=4 --num_seeds=1 --budgets=2 {CPU}'),
    ('bench.py --suite=(sudoku|blocks)', f'--num_samples=2 --num_seeds=1 {CPU}'),
    ('bench.py', f'--num_samples=4 --num_seeds=1 --steps=2 {CPU}'),
    ('tools/energy.py', f'--max_iters=1 --own_samples=16 --eval_rows=4 {CPU}'),
    ('tools/distill.py', f'--max_iters=1 {CPU}'),
    ('data/', ''),
)
FEWER = (('--steps=[0-9]+', '--steps=4'), ('--length=[0-9]{4}', '--length=140'))

# (a command that begins like this, the test file that runs its like)
PARSED = (
    ('bench.py --suite=universal', 'test_universal.py'),
    ('bench.py --suite=stages', 'test_stages_suite.py'),
    ('bench.py --suite=text', 'test_text.py'),
    ('bench.py --suite=repair', 'test_repair_suite.py'),
    ('bench.py --suite=speed', 'test_speed.py'),
    ('bench.py --suite=faults', 'test_faults.py'),
    ('bench.py --suite=diagnose', 'test_diagnose.py'),
    ('train.py config/arithmetic_best.py', 'test_commands.py'),        # draws 500,000 strings first
    ('app.py', 'test_app.py'),
    ('tools/film.py', 'test_show.py'),
    ('data/text/prepare.py .*--tokenizer=gpt2', 'test_data.py'),
    ('sample.py --export=', 'test_files.py'),
)
NOT_OURS = ('pip', 'torchrun', 'python -m pytest')                     # see also test_distributed.py
PICTURES = {                                                           # the command that makes each
    'app.png': 'python app.py --out_dir=out-text',
    'board.gif': 'python tools/film.py --page=board.html --width=440 --pause=700 --out=board.gif',
    'denoising.png': 'python tools/film.py --page=steps.html --sample=4 --first=64 --width=1000 '
                     '--out=denoising.png',
    'text.gif': 'python tools/film.py --page=steps.html --sample=4 --every=2 --out=text.gif',
    'controller.png': 'python this.py assets/controller.png',
}


def read(page):
    with open(os.path.join(ROOT, page), encoding='utf-8') as file:
        return file.read()


def fenced(text):
    """(language, body) of every block of code."""
    return re.findall(r'^```(\w*)\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def without_code(text):
    return re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)


def commands():
    """{command: the page where it stands first}: lines of blocks, and what stands between back-ticks."""
    found = {}
    for page in PAGES:
        text = read(page)
        lines = [line.removeprefix('$ ') for language, body in fenced(text) if not language
                 for line in body.splitlines()]
        inline = re.findall(r'`((?:python|torchrun) [^`]+)`', without_code(text))
        lines += [' '.join(words.split()) for words in inline]
        for line in lines:
            if line.startswith(('python ', 'torchrun ', 'pip ')):
                words = shlex.split(line, comments=True)
                for one in shlex.join(words).split(" '&&' "):
                    found.setdefault(one, page)
    return {one: page for one, page in found.items() if one != 'python this.py'}


def ours(command):
    return not command.startswith(NOT_OURS) and '...' not in command


def fits(command, table):
    """What a table says of a command, None if nothing."""
    for start, said in table:
        if re.match('python ' + start, command + ' '):
            return said


OURS = [command for command in commands() if ours(command)]


# -----------------------------------------------------------------------------
# commands


def test_there_are_commands():
    assert len(OURS) > 50 and len([one for one in OURS if commands()[one] == 'README.md']) >= 13


@pytest.mark.parametrize('command', [one for one in OURS if fits(one, PARSED)])
def test_commands_that_take_hours_are_understood(command, sandbox):
    """Config files, names and types of the settings; and their like is run elsewhere."""
    _, script, *words = shlex.split(command)
    assert os.path.exists(os.path.join(ROOT, 'tests', fits(command, PARSED)))
    configurator.configure(vars(load_script(script.removesuffix('.py'))), words)


def order(command):
    """Data first, then networks, then what needs them."""
    return [bool(re.match(start, command)) for start in (
        'python data/', 'python train.py (?!.*resume)', 'python train.py', 'python tools/', '')].index(True)


@pytest.fixture(scope='module')
def sandbox(tmp_path_factory):
    """A folder with all that the commands read, small: data, recipes of the pages, texts."""
    box = tmp_path_factory.mktemp('sandbox')
    others = shutil.ignore_patterns('__pycache__', 'shakespeare', 'shakespeare_char', 'sudoku6', 'wikitext2')
    for name in ('config', 'data'):
        shutil.copytree(os.path.join(ROOT, name), box / name, ignore=others)
    arithmetic.prepare(str(box / 'data' / 'arithmetic'), num_train=2000, num_val=200)
    sudoku.prepare(str(box / 'data' / 'sudoku'), num_train=20, num_val=10)
    sudoku.prepare(str(box / 'data' / 'sudoku6'), size=6, num_train=20, num_val=10)
    letters = ''.join(map(chr, [10, *range(32, 127)])).replace('_', '')
    for name in ('book.txt', 'names.txt', 'start.txt', 'notes/a.txt', 'notes/b.md'):
        (box / name).parent.mkdir(exist_ok=True)
        (box / name).write_text('\n'.join(f'ROMEO {n}: To be, or not' for n in range(400)) + letters * 20)
    (box / 'start.txt').write_text('ROMEO:')
    (box / 'puzzles.txt').write_text('123456789' + '.' * 72 + '\n')
    for page in PAGES:
        for language, body in fenced(read(page)):
            name = re.match(r'# (config/\w+\.py)\n', body)
            if language == 'python' and name:
                (box / name[1]).write_text(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, 'HERE', str(box / 'data'))
        patch.chdir(box)
        yield box


def run_shortened(command, run, box):
    """None, or what went wrong."""
    _, script, *words = shlex.split(command)
    more = fits(command, SHORTER)
    if more is None:
        return f'{command}: SHORTER does not say how to shorten it'
    for old, new in FEWER:
        words = [re.sub(f'^{old}$', new, word) for word in words]
    names = {word.partition('=')[0] for word in more.split()}
    words = [word for word in words if word and word.partition('=')[0] not in names] + more.split()
    path = str(box / script) if script.startswith('data/') else os.path.join(ROOT, script)
    status, _, err = run(path, *words)
    if status != 0:
        return f'{command}\n    as {shlex.join([script, *words])}\n    {err.strip()[-600:]}'


def test_every_command_runs(sandbox, run, monkeypatch):
    """With nothing but torch, numpy and tqdm; then the pages' Python, on what the commands have trained."""
    for name in ('tiktoken', 'datasets', 'rich', 'gradio', 'safetensors', 'wandb'):
        monkeypatch.setitem(sys.modules, name, None)
    text = ['--input=book.txt', '--out=data/shakespeare_char']
    assert run(str(sandbox / 'data' / 'text' / 'prepare.py'), *text)[0] == 0
    wrong = [run_shortened(command, run, sandbox) for command in sorted(OURS, key=order)
             if not fits(command, PARSED)]
    assert not any(wrong), '\n'.join(filter(None, wrong))

    monkeypatch.syspath_prepend(ROOT)
    for page in ('README.md', 'docs/python.md'):
        for language, body in fenced(read(page)):
            if body.startswith('from sample import load'):
                exec(compile(body, page, 'exec'), {})


def test_the_quick_start_names_what_is_imported():
    with open(os.path.join(ROOT, 'requirements.txt'), encoding='utf-8') as file:
        wanted = [re.split(r'\s*(?:#|$)', line)[0] for line in file]
    (install,) = [one for one in commands() if one.startswith('pip install')]
    assert set(shlex.split(install)[2:]) <= set(wanted)


# -----------------------------------------------------------------------------
# links, pictures, length, words


def anchors(page):
    """What GitHub calls the headings of a page."""
    found = []
    for heading in re.findall(r'^#+ (.*)$', without_code(read(page)), re.MULTILINE):
        plain = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading.replace('`', '').replace('*', ''))
        found.append(re.sub(r'[^\w\- ]', '', plain.strip().lower()).replace(' ', '-'))
    return found


@pytest.mark.parametrize('page', LINKED)
def test_links_lead_somewhere(page):
    for target in re.findall(r'(?:\]\(|src=")([^)"\s]+)[)"]', without_code(read(page))):
        if re.match(r'\w+:', target):
            continue
        path, _, anchor = target.partition('#')
        path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(os.path.join(ROOT, path)), f'{page}: {target}'
        assert not anchor or anchor in anchors(path), f'{page}: {target}'


def test_every_page_can_be_reached_from_the_first():
    seen, ahead = set(), ['README.md']
    while ahead:
        page = ahead.pop()
        if page not in seen:
            seen.add(page)
            ahead += [os.path.normpath(os.path.join(os.path.dirname(page), path))
                      for path in re.findall(r'\]\(([^)\s:#]+\.md)', read(page))]
    assert {page for page in LINKED if page.startswith('docs/')} <= seen


def test_every_picture_is_shown_and_has_a_command():
    text = '\n'.join(map(read, LINKED))
    assert sorted(os.listdir(os.path.join(ROOT, 'assets'))) == sorted(PICTURES)
    for name, command in PICTURES.items():
        assert re.search(rf'(\]\(|src=")[./]*assets/{name}', text) and command in text, name


def test_readme_is_short():
    text = read('README.md')
    words = without_code(text).split()
    assert text.count('\n') <= 180 and len(text.split()) <= 1800
    assert max(map(len, text.splitlines())) <= 110
    assert sum(bool(re.search(r'\d', word)) for word in words) <= 80


@pytest.mark.parametrize('page', [*PAGES, 'docs/extending.md', 'docs/aims.md', 'docs/peers.md'])
def test_every_setting_that_is_named_exists(page):
    scripts = ['train.py', 'sample.py', 'bench.py', 'app.py', *glob.glob(f'{ROOT}/tools/*.py'),
               *glob.glob(f'{ROOT}/data/*/prepare.py')]
    known = {name for path in scripts for name in configurator.settings(os.path.join(ROOT, path))}
    known |= {'help', 'standalone', 'nproc_per_node'} | {field.name for field in fields(How)}
    named = set(re.findall(r'(?<![\w-])--(\w+)', read(page)))
    assert named <= known, named - known


@pytest.mark.parametrize('page', LINKED)
def test_pages_name_nothing_that_a_reader_lacks(page):
    words = r"(?i)\b(?:the seed's|the fix guide|the mission|issue #?\d+|this session)\b|/(?:work|tmp|root)/"
    found = re.findall(words, read(page))
    assert not found


def decimals(text):
    """Its numbers with a point, as numbers; what stands in links does not count."""
    plain = re.sub(r'\]\([^)]*\)', '', without_code(text))
    return {float(number) for number in re.findall(r'(?<![\w.])\d*\.\d+', plain)}


def test_numbers_stand_in_one_place():
    """What README and the index of results.md say is in a table or a sentence of results.md."""
    index, tables = re.search(r'\n## Index(.*?)(\n## .*)', read('docs/results.md'), re.DOTALL).groups()
    assert decimals(read('README.md')) <= decimals(tables)
    assert decimals(index) <= decimals(tables) | {1.80, 1.62}              # the aims
