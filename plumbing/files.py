"""
Files: written whole or not at all, in a folder that one run has to itself.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import tempfile

from configurator import UserError, reason
from data.common import make_folder, remove_torn, take_lock, temporary  # noqa: F401

STREAMS = {'-': 1, '/dev/stdout': 1, '/dev/stderr': 2}              # paths of streams that are open already


def is_written_to(path):
    """Whether a path is no file that could be replaced: a stream, a device, a pipe."""
    return path in STREAMS or os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def target(path):
    """The file that a path means, at the end of its symbolic links. Raises OSError if they go in a circle."""
    real = os.path.realpath(path)
    if os.path.islink(real):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    return real


@contextlib.contextmanager
def atomically(path):
    """
    with atomically(path) as half: write that file. path always is the old or the new one, whole.

    A symbolic link stays, and what it points at is replaced. A device or a pipe gets what was written.
    """
    if is_written_to(path):
        with tempfile.TemporaryDirectory() as folder:
            half = os.path.join(folder, 'half')
            yield half
            sys.stdout.flush()
            where = os.dup(STREAMS[path]) if path in STREAMS else path
            with open(half, 'rb') as source, open(where, 'wb') as file:
                shutil.copyfileobj(source, file)
        return
    path = target(path)
    half = temporary(path)
    try:
        yield half
        with open(half, 'rb+') as file:
            os.fsync(file.fileno())
        if os.path.exists(path):                                    # who may read it stays as it was
            shutil.copymode(path, half)
        os.replace(half, path)
    finally:
        if os.path.exists(half):
            os.remove(half)


def write_atomically(path, text):
    """Writes a text file so that it is there whole or not at all."""
    try:
        # half a character, from bytes of the command line that are no UTF-8, must not cost the rest
        with atomically(path) as half, open(half, 'w', encoding='utf-8', errors='replace') as file:
            file.write(text)
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {reason(error)}') from error


def finite(value):
    """A value of dicts, lists and numbers with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value, **how):
    """A value as JSON that every reader takes: what is not finite is null. how: as json.dumps has it."""
    return json.dumps(finite(value), allow_nan=False, **how)


def read_records(path):
    """
    The objects in a file that has one on each line, as JSON; none if there is no such file.

    A line that is something else is skipped: a crash has torn it, or it was never ours.
    """
    records = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def copy_file(source, path):
    """Copies a file, whole or not at all."""
    with atomically(path) as half:
        shutil.copyfile(source, half)


def append_line(path, line):
    """Adds a line to a text file, whole or not at all. Raises UserError if there is no room for it."""
    try:
        with open(path, 'ab+') as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = file.read(1) not in (b'', b'\n')                 # what a crash left must stay a line alone
            try:
                file.write(b'\n' * torn + line.encode() + b'\n')
                file.flush()
            except OSError:
                os.truncate(path, size)                             # half a line would harm the next
                raise
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {reason(error)}') from error


def check_output(path, *inputs, text=True):
    """
    Raises UserError if a file of this path cannot be written (None: nothing is written), or is an input.

    inputs: paths, None for those not given. text: whether it may also be a stream, as '-' is.
    """
    if path is None or text and path in STREAMS:
        return
    try:
        real = target(path)
        folder = os.path.dirname(real)
        if path in STREAMS:
            raise UserError(f'{path} is for text: give the path of a file')
        if os.path.isdir(real):
            raise UserError(f'{path} is a folder: give the path of a file in it')
        if not os.path.isdir(folder):
            raise UserError(f'{path}: there is no folder {os.path.dirname(path) or folder}')
        needed = [path] * os.path.exists(path) + [folder] * (not is_written_to(path))
        if not all(os.access(place, os.W_OK) for place in needed):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        with contextlib.suppress(FileNotFoundError):                # its name may be too long
            os.lstat(path if is_written_to(path) else temporary(real))
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {reason(error)}') from error
    if not is_written_to(path) and real in [os.path.realpath(other) for other in inputs if other]:
        raise UserError(f'{path} would be written over what is read or written otherwise: give another path')


# -----------------------------------------------------------------------------
# one run a folder: the system forgets the lock of a process that is gone

held = {}                                                           # folder -> file descriptor of its lock


def lock(folder):
    """
    Makes this process the one that trains into the folder, until unlock. Raises UserError if another one
    does.

    A folder that is not there yet belongs to no one.
    """
    if folder in held or not os.path.isdir(folder):
        return

    def refuse():
        raise UserError(f'{folder} is in use: another process trains into it. Give another --out_dir, '
                        'or stop that run first')

    descriptor = take_lock(folder, refuse)
    if descriptor is not None:
        held[folder] = descriptor


def unlock(folder):
    """Lets others train into the folder, if it was this process that did."""
    if folder in held:
        os.close(held.pop(folder))


def sweep(folder, *names):
    """Removes what killed runs left half written, of files of these names, in a folder that is locked."""
    if folder in held:
        remove_torn(folder, *names)
