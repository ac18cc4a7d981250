"""
Files: written whole or not at all, in a folder that one run has to itself.
"""

import contextlib
import glob
import os
import shutil

from configurator import UserError

try:
    import fcntl
except ImportError:                                                 # Windows: there is no lock
    fcntl = None


@contextlib.contextmanager
def atomically(path):
    """with atomically(path) as temporary: write that file. path always is the old or the new one, whole."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_atomically(path, text):
    """Writes a text file so that it is there whole or not at all."""
    try:
        with atomically(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
            file.write(text)
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {error.strerror}') from error


def copy_file(source, path):
    """Copies a file, whole or not at all."""
    with atomically(path) as temporary:
        shutil.copyfile(source, temporary)


def append_line(path, line):
    """Adds a line to a text file, whole or not at all. Raises UserError if there is no room for it."""
    try:
        with open(path, 'ab') as file:
            size = file.tell()
            try:
                file.write(line.encode() + b'\n')
                file.flush()
            except OSError:
                os.truncate(path, size)                             # half a line would harm the next
                raise
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {error.strerror}') from error


def make_folder(path):
    """Makes the folder that checkpoints go to, if it is not there. Raises UserError if that cannot be."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f'{path}: cannot be made a folder for checkpoints: {error.strerror}') from error


def check_folder(path):
    """Raises UserError if there is no folder for a file of this path (None: nothing is written)."""
    folder = os.path.dirname(path or '')
    if folder and not os.path.isdir(folder):
        raise UserError(f'{path}: there is no folder {folder}')


# -----------------------------------------------------------------------------
# one run a folder: the system forgets the lock of a process that is gone

held = {}                                                           # folder -> file descriptor of its lock


def lock(folder):
    """
    Makes this process the one that trains into the folder, until unlock. Raises UserError if another one
    does.

    A folder that is not there yet belongs to no one.
    """
    if fcntl is None or folder in held or not os.path.isdir(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f'{folder} is in use: another process trains into it. Give another --out_dir, '
                        'or stop that run first') from None
    except OSError:                                                 # a file system that knows no locks
        os.close(descriptor)
        return
    held[folder] = descriptor


def unlock(folder):
    """Lets others train into the folder, if it was this process that did."""
    if folder in held:
        os.close(held.pop(folder))


def sweep(folder, *names):
    """Removes what killed runs left half written, of files of these names, in a folder that is locked."""
    for name in names if folder in held else ():
        for torn in glob.glob(os.path.join(glob.escape(folder), f'{name}.*.tmp')):
            os.remove(torn)
