"""
Make the tiny Shakespeare dataset in GPT-2's tokens: the text and the split of shakespeare_char.

$ python data/shakespeare/prepare.py                       # downloads the text, 1.1 MB
$ python data/shakespeare/prepare.py --input=input.txt     # or takes it from a file
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
import configurator  # noqa: E402
from data.shakespeare_char.prepare import prepare  # noqa: E402

input: str = None  # a copy of the text, None: download it
out: str = None    # the folder to write to, None: the one of this script


def main():
    prepare(out or HERE, input, name='shakespeare', tokenizer='gpt2')


if __name__ == '__main__':
    configurator.run(globals())
