"""
The arithmetic dataset with 500,000 training strings in the place of 20,000.

$ python data/arithmetic_large/prepare.py
"""

import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), 'arithmetic'))
from prepare import prepare  # noqa: E402  (that of arithmetic)

if __name__ == '__main__':
    argparse.ArgumentParser(description='Make the arithmetic dataset with 500,000 training strings.').parse_args()
    prepare(HERE, num_train=500_000)
