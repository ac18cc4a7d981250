"""
Make the WikiText-2 dataset in GPT-2's tokens: articles of Wikipedia, 11 MB of raw text.

$ python data/wikitext2/prepare.py                      # downloads it with Hugging Face's datasets
$ python data/wikitext2/prepare.py --input=FOLDER       # or takes train.txt and validation.txt from a folder
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
import configurator  # noqa: E402
from data.common import load_corpus, write_text  # noqa: E402

NAME, HUB = 'Salesforce/wikitext', dict(name='wikitext-2-raw-v1', revision='b08601e04326c79dfdd32d625aee71d232d685c3')
# the test split stays untouched: what is measured on val decides on models and settings, and nothing here reports a test score
PATTERNS = dict(train='train*', validation='validation*')

input: str = None  # a folder with train.txt and validation.txt, or with the hub's .parquet files; None: download
out: str = None    # the folder to write to, None: the one of this script


def prepare(out_dir=HERE, input=None):
    """Encode the text, write it into out_dir, say what it is, and return its meta. Raises UserError if it cannot be had."""
    # a row is a line; the hub keeps some of the white space at their ends, files have other
    train, val = ('\n'.join(line.rstrip() for line in rows['text']) + '\n' for rows in load_corpus(NAME, PATTERNS, HUB, input))
    return write_text(out_dir, 'wikitext2', train, val, 'gpt2')


def main():
    prepare(out or HERE, input)


if __name__ == '__main__':
    configurator.run(globals())
