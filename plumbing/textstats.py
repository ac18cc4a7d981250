"""What samples of text look like beside the text that they were learned from."""

import collections
import functools
import itertools
import math
import re

import torch

from data.loader import spread_rows
from plumbing.text import decode, encode, until_end


def training_text(meta, ids, most=2_000_000):
    """The text of a split of load_data, of its first tokens if it has more than most."""
    if isinstance(ids, torch.Tensor):  # rows, each of them a text
        return '\n'.join(decode(meta, row)[0] for row in ids[:max(1, most // ids.size(1))].tolist())
    return decode(meta, ids[:most].tolist())[0]


def find_words(text):
    """The words of a text in their order: maximal runs of letters and apostrophes, in lower case."""
    return re.findall(r"(?:[^\W\d_]|')+", text.lower())


@functools.lru_cache(maxsize=2)
def words_of(text):
    """The set of the words of a text, see find_words."""
    return frozenset(find_words(text))


def known_words(texts, words):
    """The share of the words in texts that are in the set words; 0 if there are none."""
    found = [word in words for text in texts for word in find_words(text)]
    return sum(found) / max(1, len(found))


def token_statistics(ids):
    """
    How varied texts are, given as lists of token ids: a dict.

    entropy, of single tokens in nats; distinct_1 .. distinct_4, the share of different ones among the n-grams
    of each text; longest_run, of one token repeated. Compare only texts of equal length and number.
    """
    counts = collections.Counter(itertools.chain.from_iterable(ids))
    total = sum(counts.values())
    result = dict(entropy=sum(n / total * math.log(total / n) for n in counts.values()))
    for n in range(1, 5):
        grams = [tuple(row[i:i + n]) for row in ids for i in range(len(row) - n + 1)]
        result[f'distinct_{n}'] = len(set(grams)) / max(1, len(grams))
    runs = (len(list(run)) for row in ids for _, run in itertools.groupby(row))
    result['longest_run'] = max(runs, default=0)
    return result


def longest_copy(text, corpus):
    """The length in characters of the longest piece of text that occurs word for word in corpus."""
    best = at = 0
    while at + best < len(text):
        # this piece is the likeliest to settle it quickly: a longer copy from at .. at + skip would hold it
        skip = best // 3
        if text[at + skip:at + best + 1] not in corpus:
            at += skip + 1
        elif text[at:at + best + 1] in corpus:
            best += 1
        else:
            at += 1
    return best


def text_statistics(texts, ids, corpus):
    """
    Samples of text, as strings and as lists of token ids, beside the training text corpus: a dict.

    What token_statistics says; known_words, see there; copy_mean and copy_max over the texts, see
    longest_copy.
    """
    copies = [longest_copy(text, corpus) for text in texts]
    return dict(token_statistics(ids), known_words=known_words(texts, words_of(corpus)),
                copy_mean=sum(copies) / len(copies), copy_max=max(copies))


def usual_text(ids, meta, config, most=16):
    """What samples are compared with: token_statistics of pieces of the split ids, and its words."""
    # what is given says nothing about a network
    start = len(encode(meta, config['sample_prompt'])) + (meta['bos'] is not None)
    rows = spread_rows(ids, min(config['eval_samples'], most), config['block_size']).tolist()
    return dict(token_statistics([until_end(meta, row)[start:] for row in rows]), num=len(rows), start=start,
                words=words_of(training_text(meta, ids)))


def compare_text(texts, ids, usual):
    """Prints how varied samples are beside usual_text, warns of a collapse, returns what the log gets."""
    found = dict(token_statistics(ids), known_words=known_words(texts, usual['words']))
    print(f"    unigram entropy {found['entropy']:.2f} nats (training data {usual['entropy']:.2f}), "
          f"different 3-grams {found['distinct_3']:.0%} (training data {usual['distinct_3']:.0%}), "
          f"known words {found['known_words']:.0%}")
    if found['entropy'] < 0.7 * usual['entropy'] or found['distinct_3'] < usual['distinct_3'] / 3:
        print('    warning: the samples collapse, they repeat themselves far more than the data. Early on '
              'that is usual: train longer. Later sample with --temperature=1 and --commit=random, in more '
              '--steps')
    return {name: found[name] for name in ('entropy', 'distinct_3', 'known_words')}
