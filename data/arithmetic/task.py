"""
Arithmetic in prefix notation: a language whose every string can be checked exactly.

    expr   := digit | '(' op expr expr ')'        op is + or *
    string := expr '=' value                      for example (+(*75)1)=36

draw() makes strings from the grammar, score() says how good a sample of strings is.
"""

import operator
import random
from collections import Counter
from functools import lru_cache

BLOCK_SIZE = 64
MAX_LENGTH = BLOCK_SIZE - 2  # one place each for <bos> and <eos>
MAX_DEPTH = 6
CHARS = '0123456789()+*='
DIGITS = frozenset('0123456789')  # str.isdigit() also says yes to '²' and to the digits of other scripts
OPS = {'+': operator.add, '*': operator.mul}

# -----------------------------------------------------------------------------
# the grammar

def gen(rng, d):
    """A random expression at most d operators deep: (text, value)."""
    if d == 0 or rng.random() < 0.2:
        digit = rng.randrange(10)
        return str(digit), digit
    op = rng.choice('+*')
    # one child may go as deep as is allowed, the other anywhere up to that: lopsided trees, shorter strings
    a, b = gen(rng, d - 1), gen(rng, rng.randrange(d))
    if rng.random() < 0.5:
        a, b = b, a
    return f'({op}{a[0]}{b[0]})', OPS[op](a[1], b[1])


def draw(rng, depth=None):
    """One string of the language: (text, value). rng: a random.Random; depth=None draws it from 1..6."""
    while True:
        expr, value = gen(rng, rng.randint(1, MAX_DEPTH) if depth is None else depth)
        text = f'{expr}={value}'
        if len(text) <= MAX_LENGTH:  # else draw again, the depth included
            return text, value

# -----------------------------------------------------------------------------
# the parser

def parse_expr(text):
    """The expression that text starts with: (value, where it ends), or None if it starts with none."""
    # the open parentheses, each [op, operands so far]: no recursion, so that junk may nest deep
    stack, i = [], 0
    while i < len(text):
        if text[i] == '(' and text[i+1:i+2] in OPS:
            stack.append([text[i+1]])
            i += 2
            continue
        if text[i] not in DIGITS:
            return None
        value = int(text[i])
        i += 1
        # value is a whole operand: the innermost parenthesis gets it, which it may complete, and so on
        while stack:
            stack[-1].append(value)
            if len(stack[-1]) < 3:
                break
            if text[i:i+1] != ')':
                return None
            op, a, b = stack.pop()
            value = OPS[op](a, b)
            i += 1
        else:  # nothing is open: this was the whole expression
            return value, i
    return None


def parse_number(text):
    """The number that text is, written as str() writes it (so not 007), or None."""
    if not text or not DIGITS.issuperset(text) or (text[0] == '0' and text != '0'):
        return None
    value = 0
    for i in range(0, len(text), 1000):  # in pieces: int() refuses a string of more than 4300 digits
        piece = text[i:i+1000]
        value = value * 10 ** len(piece) + int(piece)
    return value


def parse(text):
    """
    (valid, value, claimed): is text a whole `expr=number`, what is expr worth, which number does it claim?

    value and claimed are None unless text is valid. Takes any string at all.
    """
    head = parse_expr(text)
    if head is not None:
        value, end = head
        claimed = parse_number(text[end+1:])
        if text[end:end+1] == '=' and claimed is not None:
            return True, value, claimed
    return False, None, None


def balanced(text):
    """Do the parentheses balance? A lenient check of nothing else: '', '=' and '(7)' all pass."""
    height = 0
    for c in text:
        height += (c == '(') - (c == ')')
        if height < 0:
            return False
    return height == 0

# -----------------------------------------------------------------------------
# the scorer

def length_shares(texts):
    """The distribution of the lengths of texts: {length: share}."""
    return {length: count / len(texts) for length, count in Counter(map(len, texts)).items()}


@lru_cache
def reference_lengths(n=100_000):
    """The grammar's own distribution of lengths, from n fresh draws: {length: share}, only to be read."""
    rng = random.Random(12345)
    return length_shares([draw(rng)[0] for _ in range(n)])


def length_tv(texts, lengths=None):
    """Total variation distance of the lengths of texts from the reference: 0 the same, 1 nothing shared."""
    lengths = reference_lengths() if lengths is None else lengths
    mine = length_shares(texts)
    return sum(abs(mine.get(k, 0) - lengths.get(k, 0)) for k in sorted({*mine, *lengths})) / 2


def length_floor(n, repeats=20):
    """
    The length_tv to expect of n perfect samples, beside which a model's length_tv at this n is to be seen.

    It is not 0: a histogram of n samples is off by chance, and the distance counts every error as positive.
    """
    # seeded with texts: none of these is the reference's own
    rngs = [random.Random(f'floor {i}') for i in range(repeats)]
    return sum(length_tv([draw(rng)[0] for _ in range(n)]) for rng in rngs) / repeats


def score(texts, train=None, lengths=None):
    """
    How good are these samples? A dict of shares in 0..1, except for n and mean_length:
      n            how many texts
      balanced     parentheses balance (lenient, for comparison only)
      valid        the whole text is an `expr=number`
      correct      valid, and the number is right
      unique       distinct texts / n
      novel        not among the training strings (None if train, a collection of strings, is None)
      mean_length  in characters
      length_tv    distance of the lengths from the grammar's; see length_floor()
    lengths replaces the reference distribution of lengths, {length: share}.
    An unfinished sample is passed as whatever string it decodes to, and is scored like any other.
    """
    texts = list(texts)
    n = len(texts)
    if n == 0:
        raise ValueError('no texts to score')
    parsed = [parse(text) for text in texts]
    train = None if train is None else set(train)
    return {
        'n': n,
        'balanced': sum(map(balanced, texts)) / n,
        'valid': sum(valid for valid, _, _ in parsed) / n,
        'correct': sum(valid and value == claimed for valid, value, claimed in parsed) / n,
        'unique': len(set(texts)) / n,
        'novel': None if train is None else sum(text not in train for text in texts) / n,
        'mean_length': sum(map(len, texts)) / n,
        'length_tv': length_tv(texts, lengths),
    }


def verdict(text):
    """What to print beside a sample: a tick, the right value, or that the string is malformed."""
    valid, value, claimed = parse(text)
    return '✓' if valid and value == claimed else f'✗ is {value}' if valid else '✗ malformed'
