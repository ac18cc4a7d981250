"""The configurator: what is a setting, what files and overrides may do to it, and what a mistake says."""

import errno
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch._inductor.exc import InductorError

import configurator
from configurator import UserError

SCRIPT = '''\
"""
Trains nothing at all.
In two lines.

A paragraph that the help leaves out.
"""
import math
# -----------------------------------------------------------------------------
# I/O
out_dir = 'out'            # where checkpoints go
prompt: str = None         # text to start from # and to keep
# optimiser
max_iters = 2000           # number of steps
lr_decay_iters = 2000      # where the decay ends
learning_rate = 3e-3       # peak rate
threshold = -0.5
compile = False            # torch.compile the network
length: int = None         # characters, None: the model decides
top_p: float = None
extra = None               # anything
betas = (0.9,
         0.95)             # of AdamW
sizes = [1, 2]
# -----------------------------------------------------------------------------
half = max_iters // 2
first = second = 1
left, right = 1, 2
later: int
table = {'a': 1}
MAX = 3
Mixed = 4
_private = 5
sys_like = math.pi


def main():
    print('main sees', max_iters, out_dir)


below = 1
'''
KEYS = ['out_dir', 'prompt', 'max_iters', 'lr_decay_iters', 'learning_rate', 'threshold', 'compile', 'length',
        'top_p', 'extra', 'betas', 'sizes']


def load(path):
    spec = importlib.util.spec_from_file_location('script_under_test', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path, monkeypatch):
    """
    The script as a module, in a folder of its own with an empty config/, which is the working directory.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config').mkdir()
    (tmp_path / 'train.py').write_text(SCRIPT)
    return load(tmp_path / 'train.py')


@pytest.fixture
def configure(script):
    return lambda *argv: configurator.configure(vars(script), list(argv))


@pytest.fixture
def error(script):
    """The one line that a command line is refused with; the script's globals must be as before."""
    def refuse(*argv):
        before = dict(vars(script))
        with pytest.raises(UserError) as caught:
            configurator.configure(vars(script), list(argv))
        assert vars(script) == before
        return str(caught.value)
    return refuse


def write(name, text):
    with open(name, 'w') as f:
        f.write(text)
    return name


# -----------------------------------------------------------------------------
# which globals are settings


def test_settings_are_the_literal_lower_case_globals_above_the_first_def(script):
    assert list(configurator.settings(script.__file__)) == KEYS


def test_settings_know_default_type_comment_and_section(script):
    known = configurator.settings(script.__file__)
    assert known['max_iters'] == ('max_iters', 2000, int, 'number of steps', ['optimiser'], None)
    assert known['out_dir'] == ('out_dir', 'out', str, 'where checkpoints go', ['I/O'], None)
    assert known['prompt'].comment == 'text to start from # and to keep'
    assert (known['threshold'].default, known['threshold'].comment) == (-0.5, '')
    assert (known['length'].default, known['length'].type) == (None, int)
    assert (known['top_p'].type, known['extra'].type, known['compile'].type) == (float, None, bool)
    betas = known['betas']
    assert (betas.default, betas.type, betas.comment) == ((0.9, 0.95), tuple, 'of AdamW')


@pytest.mark.parametrize('stop', ['def f(): pass', 'class C: pass', 'async def f(): pass'])
def test_settings_end_at_the_first_definition(tmp_path, stop):
    path = tmp_path / 's.py'
    path.write_text(f'a = 1\n{stop}\nb = 2\n')
    assert list(configurator.settings(path)) == ['a']


def test_annotation_beats_the_type_of_the_default_and_an_unknown_one_is_no_type(tmp_path):
    path = tmp_path / 's.py'
    path.write_text('x: float = 1\ny: int | None = None\nz: object = 3\n')
    assert [s.type for s in configurator.settings(path).values()] == [float, None, int]


# -----------------------------------------------------------------------------
# values from the command line


def test_without_arguments_the_defaults_are_returned_and_nothing_is_printed(configure, script, capsys):
    values = configure()
    assert list(values) == KEYS
    assert all(values[name] == getattr(script, name) for name in KEYS)
    assert values['max_iters'] == 2000 and values['length'] is None
    assert capsys.readouterr().out == ''


def test_values_are_assigned_into_the_script_and_nothing_else_is(configure, script):
    before = set(vars(script))
    assert configure('--max_iters=5', '--out_dir=here')['max_iters'] == 5
    assert (script.max_iters, script.out_dir, script.learning_rate) == (5, 'here', 3e-3)
    assert set(vars(script)) == before


def test_what_the_script_itself_changed_below_its_settings_is_kept(configure, script):
    script.max_iters = 77
    assert configure('--compile')['max_iters'] == 77


@pytest.mark.parametrize('word, name, value', [
    ('--max_iters=5', 'max_iters', 5),
    ('--max_iters=-5', 'max_iters', -5),
    ('--max-iters=5', 'max_iters', 5),
    ('--max_iters=1e3', 'max_iters', 1000),
    ('--max_iters=2000.0', 'max_iters', 2000),
    ('--max_iters=1_000', 'max_iters', 1000),
    ('--learning_rate=1', 'learning_rate', 1.0),
    ('--learning_rate=1e-4', 'learning_rate', 1e-4),
    ('--compile', 'compile', True),
    ('--compile=True', 'compile', True),
    ('--compile=true', 'compile', True),
    ('--compile=False', 'compile', False),
    ('--compile=false', 'compile', False),
    ('--out_dir=12', 'out_dir', '12'),
    ('--out_dir=a=b', 'out_dir', 'a=b'),
    ("--out_dir='q'", 'out_dir', "'q'"),
    ('--out_dir=a-b', 'out_dir', 'a-b'),
    ('--out_dir=--x', 'out_dir', '--x'),
    ('--out_dir=None', 'out_dir', 'None'),  # the default is no None, so it is a name like any other
    ('--out_dir=true', 'out_dir', 'true'),
    ('--prompt=None', 'prompt', None),
    ('--prompt=none', 'prompt', 'none'),
    ('--length=None', 'length', None),
    ('--length=none', 'length', None),
    ('--length=7', 'length', 7),
    ('--top_p=1', 'top_p', 1.0),
    ('--extra=5', 'extra', 5),
    ('--extra=true', 'extra', True),
    ('--extra=word', 'extra', 'word'),
    ('--extra=None', 'extra', None),
    ('--betas=0.8,0.9', 'betas', (0.8, 0.9)),
    ('--betas=[0.8, 0.9]', 'betas', (0.8, 0.9)),
    ('--sizes=3,4', 'sizes', [3, 4]),
])
def test_value(configure, word, name, value):
    got = configure(word)[name]
    assert (type(got), got) == (type(value), value)


@pytest.mark.parametrize('word, message', [
    ('--max_iters=abc', "max_iters expects an int, got 'abc' (--max_iters=abc)"),
    ('--max-iters=abc', "max_iters expects an int, got 'abc' (--max-iters=abc)"),
    ('--max_iters=', "max_iters expects an int, got '' (--max_iters=)"),
    ('--max_iters=2.5', 'max_iters expects an int, got 2.5 (--max_iters=2.5)'),
    ('--max_iters=True', 'max_iters expects an int, got True (--max_iters=True)'),
    ('--max_iters=None', 'max_iters expects an int, got None (--max_iters=None)'),
    ('--max_iters=inf', 'max_iters expects a finite number, got inf (--max_iters=inf)'),
    ('--learning_rate=True', 'learning_rate expects a float, got True (--learning_rate=True)'),
    ('--learning_rate=nan', 'learning_rate expects a finite number, got nan (--learning_rate=nan)'),
    ('--learning_rate=1e999', 'learning_rate expects a finite number, got inf (--learning_rate=1e999)'),
    ('--learning_rate=1+1', "learning_rate expects a float, got '1+1'"),
    ('--betas=0.9,1e999', 'betas expects a finite number, got (0.9, inf)'),
    ('--betas=True', 'betas expects a tuple, got True (--betas=True)'),
    ('--betas=x', "betas expects a tuple, got 'x'"),
    ('--betas=nan', 'betas expects a finite number, got nan'),
    ('--compile=1', 'compile expects a bool, got 1 (--compile=1)'),
    ('--compile=None', 'compile expects a bool, got None'),
    ('--compile=', "compile expects a bool, got ''"),
    ('--length=2.5', 'length expects an int, got 2.5'),
    ('--length=x', "length expects an int, got 'x'"),
    ("--max_iters=__import__('os')", 'max_iters expects an int, got "__import__'),
])
def test_wrong_value(error, word, message):
    assert error(word).startswith(message)


def test_wrong_value_that_python_itself_cannot_take(error):
    for text in ('(' * 5000, '-' * 5000 + '1', '-' * 100000 + '1', '9' * 5000):
        assert error('--max_iters=' + text).startswith(f"max_iters expects an int, got '{text[:9]}")
    assert error('--learning_rate=1' + '0' * 400).startswith('learning_rate expects a number below 2^127')


def test_value_in_the_next_word(configure):
    values = configure('--max_iters', '5', '--threshold', '-2', '--out_dir', 'x.py', '--prompt', 'a=b')
    assert (values['max_iters'], values['threshold']) == (5, -2.0)
    assert (values['out_dir'], values['prompt']) == ('x.py', 'a=b')


@pytest.mark.parametrize('word, value', [('True', True), ('true', True), ('False', False), ('false', False)])
def test_a_bool_takes_a_truth_value_from_the_next_word(configure, word, value):
    values = configure('--compile', word, '--max_iters=5')
    assert (values['compile'], values['max_iters']) == (value, 5)


def test_a_bool_takes_nothing_else_from_the_next_word(configure, error):
    write('config/a.py', 'max_iters = 3')
    assert configure('--compile', 'config/a.py')['max_iters'] == 3
    assert configure('--compile', '--max_iters=4')['compile'] is True
    assert error('--compile', '0').startswith('0: config files end in .py')


@pytest.mark.parametrize('argv', [['--max_iters'], ['--max_iters', '--compile'],
                                  ['--compile', '--max_iters']])
def test_missing_value(error, argv):
    assert error(*argv) == '--max_iters: the value is missing, write --max_iters= and an int'


@pytest.mark.parametrize('word, message', [
    ('--max_itrs=5', 'unknown key --max_itrs; did you mean --max_iters?'),
    ('--max-itrs', 'unknown key --max_itrs; did you mean --max_iters?'),
    ('--zzz=5', 'unknown key --zzz; see --help'),
    ('--MAX=5', 'unknown key --MAX; see --help'),
    ('--half=5', 'unknown key --half; see --help'),
    ('--below=5', 'unknown key --below; see --help'),
    ('--', 'unknown key --; see --help'),
])
def test_unknown_key(error, word, message):
    assert error(word) == message


@pytest.mark.parametrize('word', ['max_iters=5', 'config/a', 'train', '-x'])
def test_stray_word(error, word):
    assert error(word) == f'{word}: config files end in .py and overrides are written --key=value'


def test_a_mistake_on_the_command_line_is_found_before_a_config_file_runs(error):
    write('config/a.py', "open('ran', 'w')")
    error('config/a.py', '--max_iters=abc')
    assert not os.path.exists('ran')


# -----------------------------------------------------------------------------
# config files


def test_config_file_is_python_that_sees_the_values_so_far(configure):
    write('config/a.py', 'max_iters = 10 * 5\nlr_decay_iters = max_iters')
    write('config/b.py', 'lr_decay_iters += learning_rate > 0')
    values = configure('config/a.py', 'config/b.py')
    assert (values['max_iters'], values['lr_decay_iters']) == (50, 51)


def test_config_files_apply_in_order_and_before_all_overrides(configure, script):
    write('config/a.py', "max_iters = 1\nout_dir = 'a'\nlr_decay_iters = max_iters")
    write('config/b.py', "max_iters = 2\nthreshold = 0.25")
    values = configure('--out_dir=mine', 'config/a.py', '--max_iters=3', '--max_iters=4', 'config/b.py')
    assert (values['max_iters'], values['out_dir'], values['threshold']) == (4, 'mine', 0.25)
    assert values['lr_decay_iters'] == 1
    assert configure('config/b.py', 'config/a.py')['max_iters'] == 1
    assert script.max_iters == 1


def test_config_file_values_are_converted_like_the_command_lines(configure):
    write('config/a.py', 'max_iters = 1e3\nlearning_rate = 1\nlength = None\n'
                         'betas = [0.5, 0.5]\nextra = {1: 2}')
    values = configure('config/a.py')
    assert type(values['max_iters']) is int and values['max_iters'] == 1000
    assert type(values['learning_rate']) is float and values['learning_rate'] == 1
    assert (values['length'], values['betas'], values['extra']) == (None, (0.5, 0.5), {1: 2})


def test_only_what_a_config_file_assigns_is_checked(configure, script):
    script.length = 'all'  # the script's own doing
    write('config/a.py', 'max_iters = 3')
    assert configure('config/a.py')['length'] == 'all'


def test_config_file_may_have_helpers_of_its_own(configure, script):
    write('config/a.py', 'import math\nfrom math import sqrt\nfrom fractions import Fraction\n_n = 9\n'
                         'def f(n): return int(sqrt(n))\nclass C: pass\nmax_iters = f(_n)')
    assert configure('config/a.py')['max_iters'] == 3
    assert not hasattr(script, 'f') and not hasattr(script, '_n')


@pytest.mark.parametrize('text, message', [
    ("max_iters = 'abc'", "max_iters expects an int, got 'abc'"),
    ("max_iters = '5'", "max_iters expects an int, got '5'"),
    ('max_iters = True', 'max_iters expects an int, got True'),
    ('max_iters = None', 'max_iters expects an int, got None'),
    ('compile = 1', 'compile expects a bool, got 1'),
    ('out_dir = 5', 'out_dir expects a str, got 5'),
    ('out_dir = None', 'out_dir expects a str, got None'),
    ("learning_rate = float('nan')", 'learning_rate expects a finite number, got nan'),
    ("extra = float('inf')", 'extra expects a finite number, got inf'),
    ('def compile(): pass', 'compile expects a bool, got <function'),
    ('max_itrs = 5', 'unknown key max_itrs; did you mean max_iters?'),
    ('zzz = 5', 'unknown key zzz; see --help'),
])
def test_wrong_assignment_in_a_config_file_names_the_file(error, text, message):
    assert error(write('config/a.py', text)).startswith(f'config/a.py: {message}')


@pytest.mark.parametrize('text, message', [
    ('\nmax_iters = 1 / 0\n', 'config/a.py, line 2: ZeroDivisionError: division by zero'),
    ('def f():\n    return nowhere\n\nf()', "config/a.py, line 2: NameError: name 'nowhere' is not defined"),
    ('import ast\n\n\nast.literal_eval("1+")', 'config/a.py, line 4: SyntaxError: '),
    ('max_iters = 5\n\nmax_iters = = 5', 'config/a.py, line 3: SyntaxError: invalid syntax'),
])
def test_exception_in_a_config_file_names_file_line_and_exception(error, text, message):
    assert error(write('config/a.py', text)).startswith(message)


def test_missing_config_file(error):
    for name in ('remask_all', 'unmask', 'causal'):
        write(f'config/{name}.py', '')
    assert error('config/remsk_all.py') == \
        'config/remsk_all.py: no such config file; did you mean config/remask_all.py?'
    assert error('config/q.py') == 'config/q.py: no such config file'
    assert error('nowhere/unmask.py') == 'nowhere/unmask.py: no such config file'


# -----------------------------------------------------------------------------
# what is printed


def test_one_line_for_each_file_and_each_override(configure, capsys):
    write('config/a.py', 'max_iters = 1\nthreshold = 2')
    configure('--max-iters=1e1', 'config/a.py', '--out_dir', 'x')
    assert capsys.readouterr().out == "using config/a.py\noverride: max_iters = 10\noverride: out_dir = 'x'\n"


@pytest.mark.parametrize('argv', [['--help'], ['-h'], ['--zzz=1', 'nonsense', '--help']])
def test_help(configure, script, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        configure(*argv)
    assert caught.value.code == 0
    assert capsys.readouterr().out == '''\
Trains nothing at all.
In two lines.

usage: python train.py [config/file.py ...] [--key=value ...]

# I/O
--out_dir='out'        where checkpoints go
--prompt=None          text to start from # and to keep

# optimiser
--max_iters=2000       number of steps
--lr_decay_iters=2000  where the decay ends
--learning_rate=0.003  peak rate
--threshold=-0.5
--compile=False        torch.compile the network
--length=None          characters, None: the model decides
--top_p=None
--extra=None           anything
--betas=(0.9, 0.95)    of AdamW
--sizes=[1, 2]
'''


# -----------------------------------------------------------------------------
# settings that are the fields of a dataclass

HELD = '''\
"""Samples nothing at all."""
from dataclasses import dataclass, field
# input
path = 'ckpt'              # what to sample from


# the loop
@dataclass
class How:
    """The settings of the loop."""
    depth: int = 1         # of the network
    # how far it goes
    steps: int = 32        # passes
    rate: float = 1.0      # share of the doubted
                           # that is masked again
    # what it draws
    top_k: int = None      # None: all
    words: tuple = ('a',)
    plain = 5              # no annotation, so no field
    table: dict = field(default_factory=dict)
    needed: str = f'{path}'

    def share(self):
        inner: int = 3
        return self.rate / self.steps


how = How()
# output
save: str = None           # where to


@dataclass
class Look:
    """No instance stands behind it."""
    canvas: int = 1


below = 1


def main():
    print(path, how.steps, how.share(), save)
'''


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A script with a dataclass of settings, as a module, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'sample.py').write_text(HELD)
    return load(tmp_path / 'sample.py')


def test_fields_of_a_dataclass_with_an_instance_are_settings(held):
    known = configurator.settings(held.__file__)
    assert list(known) == ['path', 'depth', 'steps', 'rate', 'top_k', 'words', 'save']
    assert known['steps'] == ('steps', 32, int, 'passes', ['how far it goes'], 'how')
    assert known['rate'].comment == 'share of the doubted' and known['words'].section == ['what it draws']
    assert (known['top_k'].type, known['top_k'].default) == (int, None)
    assert known['save'] == ('save', None, str, 'where to', ['output'], None)


def test_fields_are_set_on_the_instance(held, capsys):
    before = held.how
    before.rate = 0.5                                                # the script's own doing is kept
    write('a.py', 'steps = 2 * steps\nwords = ["b"]\npath = "x"')
    values = configurator.configure(vars(held), ['a.py', '--top-k=7', '--save=y'])
    fields = dict(depth=1, steps=64, rate=0.5, top_k=7, words=('b',))
    assert held.how is before and vars(before) == {**fields, 'table': {}, 'needed': 'ckpt'}
    assert (held.path, held.save) == ('x', 'y') and not hasattr(held, 'steps')
    assert values == configurator.current(vars(held)) == {'path': 'x', **fields, 'save': 'y'}
    assert capsys.readouterr().out == "using a.py\noverride: top_k = 7\noverride: save = 'y'\n"


@pytest.mark.parametrize('word, message', [
    ('--steps=x', "steps expects an int, got 'x' (--steps=x)"),
    ('--stepps=3', 'unknown key --stepps; did you mean --steps?'),
    ('--plain=3', 'unknown key --plain; see --help'),
    ('--canvas=3', 'unknown key --canvas; see --help'),
    ('--inner=3', 'unknown key --inner; see --help'),
])
def test_mistakes_about_fields_leave_the_instance_as_it_was(held, word, message):
    before = dict(vars(held.how))
    with pytest.raises(UserError) as caught:
        configurator.configure(vars(held), ['--rate=0.1', word])
    assert str(caught.value) == message and vars(held.how) == before


def test_help_shows_fields_in_the_order_of_the_script(held, capsys):
    with pytest.raises(SystemExit):
        configurator.configure(vars(held), ['--help'])
    assert capsys.readouterr().out == '''\
Samples nothing at all.

usage: python sample.py [config/file.py ...] [--key=value ...]

# input
--path='ckpt'   what to sample from

# the loop
--depth=1       of the network

# how far it goes
--steps=32      passes
--rate=1.0      share of the doubted

# what it draws
--top_k=None    None: all
--words=('a',)

# output
--save=None     where to
'''


@pytest.mark.parametrize('body, names', [
    ('@dataclasses.dataclass(kw_only=True)\nclass C:\n    b: int = 1\nc = C()\nd = 2', ['a', 'b', 'd']),
    ('@dataclass\nclass C:\n    b: int = 1\nc = C(2)\nd = 2', ['a']),
    ('@dataclass\nclass C:\n    b: int = 1\nd = 2\nc = C()', ['a']),
    ('class C:\n    b: int = 1\nc = C()\nd = 2', ['a']),
])
def test_which_classes_hold_settings(tmp_path, body, names):
    path = tmp_path / 's.py'
    path.write_text(f'a = 1\n{body}\n')
    assert list(configurator.settings(path)) == names


# -----------------------------------------------------------------------------
# run


def run(script, monkeypatch, main, *argv):
    """The exit status of configurator.run, or None where it returns."""
    monkeypatch.setattr(sys, 'argv', ['train.py', *argv])
    script.main = main
    try:
        configurator.run(vars(script))
    except SystemExit as stop:
        return stop.code


def raiser(exception):
    def main():
        raise exception
    return main


def test_run_calls_main_after_the_configuration(script, monkeypatch):
    seen = []
    assert run(script, monkeypatch, lambda: seen.append(script.max_iters), '--max_iters=5') is None
    assert seen == [5]


def test_run_reports_a_wrong_command_line_and_never_reaches_main(script, monkeypatch, capsys):
    assert run(script, monkeypatch, raiser(AssertionError), '--max_itrs=5') == 1
    assert capsys.readouterr() == ('', 'train.py: unknown key --max_itrs; did you mean --max_iters?\n')


def test_run_reports_a_user_error_from_main_in_one_line(script, monkeypatch, capsys):
    assert run(script, monkeypatch, raiser(UserError('no data,\nrun prepare.py'))) == 1
    assert capsys.readouterr() == ('', 'train.py: no data, run prepare.py\n')


def test_run_ends_an_interrupt_with_130(script, monkeypatch, capsys):
    assert run(script, monkeypatch, raiser(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ('', 'train.py: interrupted\n')


@pytest.mark.parametrize('words, message', [
    (['--out_dir='], 'out_dir is empty: give it a value, or leave it out'),
    (['--prompt', ''], 'prompt is empty'), (['exits.py'], 'exits.py, line 1: SystemExit'),
    ([f'--max_iters={2**62}'], 'max_iters expects a number below 2^62'),
    (['--max_iters=1e308'], 'max_iters expects a number below 2^62'),
    ([f'--betas=0.9,{2**70}'], 'betas expects a number below')])
def test_values_that_nobody_means(script, monkeypatch, capsys, tmp_path, words, message):
    (tmp_path / 'exits.py').write_text('import sys; sys.exit(0)')
    assert run(script, monkeypatch, raiser(AssertionError), *words) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('error, message', [
    (MemoryError(), 'out of memory: lower --length=8'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate'), 'out of memory: lower --length=8'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 'out of memory: lower'),
    (RuntimeError('Storage size calculation overflowed with sizes=[4]'), 'out of memory: lower --length=8'),
    (UserError('x' * 10**5 + ': write less\n\x1b[2J'), 'xxx: write less ?[2J\n'),
    (UserError('x' * 10**5), 'x ... x'),
    (InductorError(RuntimeError('no C++ compiler'), None), 'leave --compile out, or install a C++ compiler'),
    (OSError(errno.ENOSPC, 'No space left on device', 'out/x'), 'out/x: No space left on device'),
    (PermissionError(errno.EACCES, 'Permission denied', 'out'), 'out: Permission denied')])
def test_errors_of_the_machine_are_one_line(script, monkeypatch, capsys, error, message):
    assert run(script, monkeypatch, raiser(error), '--length=8') == 1
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1


@pytest.mark.parametrize('where', ['pipe', 'full'])
def test_a_screen_that_is_gone_ends_nothing(tmp_path, where):
    """Behind `| head` and on a full disk the work is done to its end, silently, and the status is 0."""
    (tmp_path / 'script.py').write_text(
        'import configurator\n\n\ndef main():\n    for i in range(30_000):\n        print("line", i)\n'
        '    open("done", "w")\n\n\nif __name__ == "__main__":\n    configurator.run(globals())\n')
    env = {**os.environ, 'PYTHONPATH': os.path.dirname(configurator.__file__)}
    redirect = '| head -1' if where == 'pipe' else '> /dev/full'
    if where == 'full' and not os.path.exists('/dev/full'):
        pytest.skip('there is no /dev/full')
    command = f'set -o pipefail; {sys.executable} script.py {redirect}'
    done = subprocess.run(['bash', '-c', command], cwd=tmp_path, env=env, capture_output=True, text=True)
    said = 'nothing more is shown: No space left on device\n'
    assert (done.returncode, done.stderr) == (0, '' if where == 'pipe' else said)
    assert (tmp_path / 'done').exists()


@pytest.mark.parametrize('exception', [ValueError('a bug'), RuntimeError('another')])
def test_run_lets_any_other_exception_through(script, monkeypatch, exception):
    assert issubclass(UserError, ValueError)
    with pytest.raises(type(exception), match=str(exception)):
        run(script, monkeypatch, raiser(exception))


def test_as_a_real_script(tmp_path):
    source = SCRIPT.replace('import math', 'import math\nimport configurator')
    end = "\nif __name__ == '__main__':\n    configurator.run(globals())\n"
    (tmp_path / 'train.py').write_text(source + end)
    (tmp_path / 'a.py').write_text('max_iters = 7')
    env = {**os.environ, 'PYTHONPATH': os.path.dirname(configurator.__file__)}

    def call(*argv):
        command = [sys.executable, 'train.py', *argv]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert call('a.py', '--out_dir=x') == (0, "using a.py\noverride: out_dir = 'x'\nmain sees 7 x\n", '')
    assert call('b.py') == (1, '', 'train.py: b.py: no such config file\n')
    env['PYTHONIOENCODING'] = 'ascii'  # what cannot be shown does not stop a run
    assert call('--out_dir=\u2713') == (0, "override: out_dir = '?'\nmain sees 2000 ?\n", '')
