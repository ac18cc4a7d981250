"""
Make the OpenWebText dataset in GPT-2's tokens, as nanoGPT does: 8 million web pages, 9 billion tokens, 18 GB.

$ python data/openwebtext/prepare.py --max_docs=10000       # a try, which downloads no more than it needs
$ python data/openwebtext/prepare.py --num_proc=16          # all of it, with Hugging Face's datasets
$ python data/openwebtext/prepare.py --input=FOLDER         # or your own .txt files, one document a line
"""

import os
import random
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
import configurator  # noqa: E402
from configurator import UserError  # noqa: E402
from data.common import (  # noqa: E402
    check_writable, dataset_writer, gpt2, library, load_corpus, report, text_meta)

NAME, VAL_SHARE, SEED = 'Skylion007/openwebtext', 0.0005, 2357
BATCH = 1024                # documents that are in memory at once

input: str = None           # a folder of .txt files, a document a line, or of .parquet files; None: download
out: str = None             # the folder to write to, None: the one of this script
max_docs: int = None        # take only the first documents, None: all
num_proc = 8                # processes that download, threads that tokenize


def read_documents(input, max_docs, num_proc):
    """The documents, a Dataset with a column 'text', on disk but for a try. Raises UserError."""
    if input is not None:
        docs, = load_corpus(NAME, dict(train='*'), {}, input)
        docs = docs.filter(lambda text: text is not None and text.strip() != '', input_columns='text')
        return docs.select(range(min(max_docs or len(docs), len(docs))))
    if max_docs is None:
        return load_corpus(NAME, dict(train='*'), dict(num_proc=num_proc))[0]
    docs, = load_corpus(NAME, dict(train='*'), dict(streaming=True))
    return library('datasets').Dataset.from_list(list(docs.take(max_docs)))


def prepare(out_dir=HERE, input=None, max_docs=None, num_proc=8):
    """Encodes the documents, writes them into out_dir, says what they are and returns the meta."""
    if num_proc < 1 or (max_docs is not None and max_docs < 2):
        raise UserError(f'num_proc must be at least 1 and max_docs at least 2, got {num_proc} and {max_docs}')
    check_writable(out_dir)
    end = gpt2().eot_token  # before the download, which takes longer to fail
    docs = read_documents(input, max_docs, num_proc)
    if len(docs) < 2:
        raise UserError(f'{input or NAME} has {len(docs)} documents; one for each split is the least')
    # training draws windows at random, so the documents themselves can stay in their order
    held_out = set(random.Random(SEED).sample(range(len(docs)), max(1, round(VAL_SHARE * len(docs)))))
    meta = text_meta('openwebtext', 'gpt2', seed=SEED)
    bar = library('tqdm').tqdm(total=len(docs), desc='tokens', unit=' documents')
    with bar, dataset_writer(out_dir, meta) as add:
        for first in range(0, len(docs), BATCH):
            texts = docs[first:first + BATCH]['text']
            for i, ids in enumerate(gpt2().encode_ordinary_batch(texts, num_threads=num_proc), first):
                add('val' if i in held_out else 'train', ids + [end])  # documents share a window, so they end
            bar.update(len(texts))
    report(out_dir, meta)
    return meta


def main():
    prepare(out or HERE, input, max_docs, num_proc)


if __name__ == '__main__':
    configurator.run(globals())
