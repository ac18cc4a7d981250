"""
Poor Man's Configurator, checked. A script keeps its settings as plain globals above its first function

    max_iters = 2000    # number of optimiser steps
    length: int = None  # number of characters, None: the model decides

and ends in configurator.run(globals()), after which these work:

$ python train.py config/unmask.py --max_iters=500 --compile
$ python train.py --help

A config file is Python that assigns some of the settings. Files apply first, in order, then the --key=value
overrides, in order. A name that is no setting, or a value of the wrong type, is an error.

A dataclass among the settings with an instance right behind it (class How, how = How()) holds settings too:
its annotated fields, which are set as attributes of that instance.
"""

import ast
import difflib
import errno
import functools
import io
import itertools
import math
import os
import sys
import tokenize
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

TYPES = {t.__name__: t for t in (int, float, bool, str, tuple, list)}  # what a setting can be
# settings that are paths, where ~ is the home folder, and those of them that are written; - is the screen
OUTPUTS = ('save', 'html', 'json', 'export')
PATHS = (*OUTPUTS, 'out_dir', 'init_from', 'merge_from', 'remask_from', 'file', 'input', 'out')
# settings that decide how much memory is taken
SIZES = ('batch_size', 'views', 'block_size', 'length', 'num_samples', 'eval_samples', 'n_embd', 'n_layer')
# what a word of the command line may be beyond Python's literals
WORDS = {'true': True, 'false': False, 'none': None, 'nan': math.nan, 'inf': math.inf}


class UserError(ValueError):
    """something that the user can put right: its message is one line that says what to do"""


class Setting(NamedTuple):
    name: str
    default: object
    type: object  # None: any
    comment: str
    section: list  # the comment lines that head its group
    holder: str  # the global whose attribute it is; None: it is a global itself


def settings(path):
    """name -> Setting, for every literal global or field above the script's first def or other class"""
    source = Path(path).read_bytes()
    comments = read_comments(source)
    found, section, end = {}, [], 0
    for node, holder in statements(ast.parse(source).body):
        above = [comments[line] for line in range(end + 1, node.lineno) if line in comments]
        section = [text for column, text in above if column in (0, node.col_offset)] or section
        end = node.end_lineno
        if not isinstance(node, ast.AnnAssign if holder else (ast.Assign, ast.AnnAssign)):
            continue
        target, *more = getattr(node, 'targets', None) or [node.target]
        name, annotation = getattr(target, 'id', '_'), getattr(node, 'annotation', None)
        try:
            default = ast.literal_eval(node.value)
        except (ValueError, TypeError):
            continue  # computed, so not for the user to set
        plain = default is None or type(default) in TYPES.values()
        if plain and name.islower() and not (more or name.startswith('_')):
            kind = TYPES.get(getattr(annotation, 'id', None)) or (None if default is None else type(default))
            found[name] = Setting(name, default, kind, comments.get(end, (0, ''))[1], section, holder)
    return found


def statements(body):
    """(statement, the holder of a setting made there), from a dataclass with an instance those of its body"""
    for node, behind in itertools.zip_longest(body, body[1:]):
        made = ast.unparse(behind.value) if isinstance(behind, ast.Assign) else ''
        decorators = ' '.join(map(ast.unparse, getattr(node, 'decorator_list', ())))
        if 'dataclass' in decorators and made == f'{node.name}()':
            yield from ((field, behind.targets[0].id) for field in node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return
        else:
            yield node, None


def read_comments(source):
    """line -> (column, text) of its comment; rules (# ---) are left out"""
    comments = {}
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        text = token.string.lstrip('#').strip()
        if token.type == tokenize.COMMENT and text.strip('-='):
            comments[token.start[0]] = token.start[1], text
    return comments


def lookup(known, name, dashes=''):
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f'did you mean {dashes}{near[0]}?' if near else 'see --help'
    raise UserError(f'unknown key {dashes}{name}; {hint}')


def expected(kind):
    return 'a value' if kind is None else f'{"an" if kind is int else "a"} {kind.__name__}'


def check(setting, value):
    """the value in the setting's own type; only conversions that lose nothing are made"""
    kind = setting.type
    if value is None and setting.default is None:
        return None
    numbers = value if isinstance(value, (tuple, list)) else [value]
    if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
        raise UserError(f'{setting.name} expects a finite number, got {value!r}')
    if kind is float and type(value) is int and abs(value) < 2**127:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():  # 1e6 is how one writes a million
        value = int(value)
        numbers = [value]
    # the largest of a counter, and of the float32 that a network computes with
    most = 127 if kind is float else 62
    if any(type(n) in (int, float) and abs(n) >= 2**most for n in numbers):
        raise UserError(f'{setting.name} expects a number below 2^{most}, got {value!r}')
    if value == '' and kind is str and setting.default != '':  # mostly an unset variable of the shell
        raise UserError(f'{setting.name} is empty: give it a value, or leave it out')
    if kind in (tuple, list) and type(value) in (tuple, list, int, float):    # one value is a tuple of it
        return kind(numbers)
    if setting.name in PATHS and type(value) is str:
        value = os.path.expanduser(value)  # the shell leaves it as it is behind =
    if kind is not None and type(value) is not kind:  # isinstance would let True pass for 1
        raise UserError(f'{setting.name} expects {expected(kind)}, got {value!r}')
    return value


def read(setting, text):
    """the value that a word of the command line stands for"""
    if setting.type is str:  # as it is, so that --prompt=12 asks for '12'
        return None if text == 'None' and setting.default is None else text
    try:
        return WORDS[text] if text in WORDS else ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text  # fine for a setting of any type; check() refuses it for the others


def parse(argv, known):
    """split the command line into config files and checked (name, value) overrides"""
    files, overrides, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith('--'):
            if not word.endswith('.py'):
                raise UserError(f'{word}: config files end in .py and overrides are written --key=value')
            files.append(word)
            continue
        key, equals, text = word[2:].partition('=')
        setting = lookup(known, key.replace('-', '_'), '--')
        if not equals and setting.type is bool:  # a bool's bare flag sets it
            text = words.pop(0) if words and words[0] in ('True', 'False', 'true', 'false') else 'True'
        elif not equals:
            if not words or words[0].startswith('--'):
                raise UserError(f'--{key}: the value is missing, write --{key}= and {expected(setting.type)}')
            text = words.pop(0)
        try:
            overrides.append((setting.name, check(setting, read(setting, text))))
        except UserError as error:
            raise UserError(f'{error} (--{key}={text})') from None
    return files, overrides


def execute(file, values):
    """the namespace that a config file leaves; it starts from the values so far, to compute with them"""
    path, namespace = Path(file), {**values, '__file__': file, '__name__': '__config__'}
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob('*.py')], 1, 0.5)
        hint = f'; did you mean {path.with_name(near[0] + ".py")}?' if near else ''
        raise UserError(f'{file}: no such config file{hint}')
    try:
        exec(compile(path.read_bytes(), file, 'exec'), namespace)
    except (Exception, SystemExit) as error:
        # say which of the file's own lines led to it; a syntax error carries its line itself
        frames = traceback.extract_tb(error.__traceback__)
        lines = [getattr(error, 'lineno', '?')] + [frame.lineno for frame in frames if frame.filename == file]
        raise UserError(f'{file}, line {lines[-1]}: {type(error).__name__}: {error}') from error
    return namespace


def apply_file(file, values, known):
    for name, value in execute(file, values).items():
        # what the file imports or defines for its own use is no setting
        if name.startswith('_') or (name not in known and (isinstance(value, ModuleType) or callable(value))):
            continue
        try:
            setting = lookup(known, name)
            if value is not values[name]:  # assigned by the file
                values[name] = check(setting, value)
        except UserError as error:
            raise UserError(f'{file}: {error}') from None


def print_help(scope, known):
    if scope.get('__doc__'):
        print(scope['__doc__'].strip().split('\n\n')[0] + '\n')
    path = os.path.relpath(scope['__file__'], os.path.dirname(os.path.abspath(__file__)))
    path = os.path.basename(path) if path.startswith('..') else path
    print(f'usage: python {path} [config/file.py ...] [--key=value ...]')
    flags = {name: f'--{name}={setting.default!r}' for name, setting in known.items()}
    # one long default must not push all comments away
    width = min(max(map(len, flags.values()), default=0), 40)
    for section, group in itertools.groupby(known.values(), lambda setting: setting.section):
        print('', *(f'# {line}' for line in section), sep='\n')
        for setting in group:
            print(f'{flags[setting.name]:{width}}  {setting.comment}'.rstrip())


def help_first(scope):
    """prints the help and exits, if a script was called for it: to be called above slow imports"""
    if scope['__name__'] == '__main__':
        sys.excepthook = functools.partial(interrupted, sys.excepthook)
        if {'--help', '-h'} & set(sys.argv[1:]):
            print_help(scope, settings(scope['__file__']))
            raise SystemExit(0)


def interrupted(hook, kind, error, trace):
    """what an exception that nobody catches says: Ctrl-C while modules are imported needs no traceback"""
    if issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
    else:
        hook(kind, error, trace)


def home(scope, setting):
    """the namespace that a setting lives in: the script's globals (scope), or the attributes of its holder"""
    return vars(scope[setting.holder]) if setting.holder else scope


def current(scope, known=None):
    """name -> the value that each setting of a script has now"""
    known = known or settings(scope['__file__'])
    return {name: home(scope, setting).get(name, setting.default) for name, setting in known.items()}


def configure(scope, argv):
    """sets the settings of a script from the words of the command line; returns the values of all of them"""
    known = settings(scope['__file__'])
    if '--help' in argv or '-h' in argv:
        print_help(scope, known)
        raise SystemExit(0)
    values = current(scope, known)
    # settings of earlier versions are still read: FORMER has their defaults, modernise() makes them today's
    former = {name: Setting(name, default, type(default), '', [], None)
              for name, default in scope.get('FORMER', {}).items()}
    known = {**known, **former}
    values.update(scope.get('FORMER', {}))
    files, overrides = parse(argv, known)
    if any(name in OUTPUTS and value == '-' for name, value in overrides):
        sys.stdout = sys.stderr  # which leaves the stream to what is written there; run() puts it back
    say = scope['SAID'].append if 'SAID' in scope else print  # a script may tell it later
    for file in files:
        apply_file(file, values, known)
        say(f'using {file}')
    for name, value in overrides:
        say(f'override: {name} = {value!r}')
        values[name] = value
    if former:
        values = scope['modernise'](values)
    for name, value in values.items():  # last, so that an error leaves the script as it was
        home(scope, known[name])[name] = value
    return values


def namespace(scope):
    """the values of the script's settings that are globals, as one object"""
    known = settings(scope['__file__'])
    return SimpleNamespace(**{name: scope[name] for name, setting in known.items() if not setting.holder})


class Screen:
    """a stream that never ends a run: once its pipe is closed or its disk full, what it is told is dropped"""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action, *args):
        try:
            action(*args)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)  # also for what is still buffered, and for children
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            if error.errno != errno.EPIPE and self.stream is not sys.__stderr__:
                print(f'nothing more is shown: {reason(error)}', file=sys.stderr)


def run(scope):
    """the last line of a script: configure it from the command line and call its main()"""
    script = os.path.basename(scope['__file__'])
    streams = sys.stdout, sys.stderr
    for stream in streams:  # what a terminal cannot show must not stop a run
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')
    sys.stdout, sys.stderr = map(Screen, streams)
    status = 0
    try:
        configure(scope, sys.argv[1:])
        scope['main']()
    except KeyboardInterrupt:
        print(f'{script}: interrupted', file=sys.stderr)
        status = 130
    except Exception as error:  # the user's or the machine's, so a line; only ours is worth a traceback
        message = str(error) if isinstance(error, UserError) else of_the_machine(error, scope)
        if message is None:
            raise
        print(f'{script}: {one_line(message)}', file=sys.stderr)
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
    if status:
        sys.exit(status)


def one_line(message):
    """a message as a terminal may have it: what is quoted in it may be of any length, with any characters"""
    line = ''.join(c if c.isprintable() else '?' for c in ' '.join(message.splitlines()))
    return line if len(line) <= 2000 else f'{line[:1000]} ... {line[-900:]}'


def reason(error):
    """what an error of the machine says, a line without the file it is about"""
    said = getattr(error, 'strerror', None) or str(error).strip() or type(error).__name__
    return said.splitlines()[0]


def of_the_machine(error, scope):
    """what to do about memory, disks, permissions and compilers: a line; None for any other error"""
    text, kinds = str(error), {f'{kind.__module__}.{kind.__name__}' for kind in type(error).__mro__}
    beyond = any(said in text for said in ('allocate memory', 'bad_alloc', 'size calculation overflowed'))
    if beyond or isinstance(error, MemoryError) or 'torch.OutOfMemoryError' in kinds:
        known, now = settings(scope['__file__']), current(scope)
        names = [name for name in SIZES if now.get(name)]
        names.sort(key=lambda name: now[name] / (known[name].default or now[name]), reverse=True)
        sizes = [f'--{name}={now[name]}' for name in names]
        return f"out of memory: lower {' or '.join(sizes[:2]) or 'the sizes'}"
    if any(kind.startswith(('torch._inductor', 'torch._dynamo')) for kind in kinds):
        return (f'torch.compile does not work here ({reason(error)}): leave --compile out, '
                'or install a C++ compiler')
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return None
