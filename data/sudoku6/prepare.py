"""
Sudoku of 6 x 6 cells with boxes of 2 rows x 3 columns; its task.py is that of data/sudoku.

$ python data/sudoku6/prepare.py
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
import configurator  # noqa: E402
from data.sudoku.prepare import prepare  # noqa: E402

out: str = None  # the folder to write to, None: the one of this script


def main():
    prepare(out or HERE, size=6)


if __name__ == '__main__':
    configurator.run(globals())
