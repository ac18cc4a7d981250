"""
The arithmetic dataset with 500,000 training strings in the place of 20,000.

$ python data/arithmetic_large/prepare.py
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
import configurator  # noqa: E402
from data.arithmetic.prepare import prepare  # noqa: E402

out: str = None  # the folder to write to, None: the one of this script


def main():
    prepare(out or HERE, num_train=500_000)


if __name__ == '__main__':
    configurator.run(globals())
