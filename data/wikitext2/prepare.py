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
from data.common import check_writable, load_corpus, write_text  # noqa: E402

NAME = 'Salesforce/wikitext'
HUB = dict(name='wikitext-2-raw-v1', revision='b08601e04326c79dfdd32d625aee71d232d685c3')
# the test split stays untouched: val decides on models and settings, and nothing here reports a test score
PATTERNS = dict(train='train*', validation='validation*')

input: str = None  # a folder with train.txt and validation.txt, or .parquet files of the hub; None: download
out: str = None    # the folder to write to, None: the one of this script


def prepare(out_dir=HERE, input=None):
    """Encodes the text, writes it into out_dir, says what it is, returns its meta. Raises UserError."""
    check_writable(out_dir)
    # a row is a line; the hub keeps some of the white space at their ends, files have other
    splits = load_corpus(NAME, PATTERNS, HUB, input)
    train, val = ('\n'.join(line.rstrip() for line in rows['text']) + '\n' for rows in splits)
    return write_text(out_dir, 'wikitext2', train, val, 'gpt2')


def main():
    prepare(out or HERE, input)


if __name__ == '__main__':
    configurator.run(globals())
