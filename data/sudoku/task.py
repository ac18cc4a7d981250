"""
Sudoku, 9 x 9 with boxes of 3 x 3, or 6 x 6 with boxes of 2 rows x 3 columns: what is written can be checked
exactly.

A text is a board, a line of digits for each row: bold digits (𝟏 to 𝟗) are given, plain ones were filled in,
and '_' is still empty. Cells are lists of N * N numbers from left to right and down, 0 for an empty one.
Tokens: 0..N-1 are the plain digits, N..2N-1 the given ones, and 2N is the end of a line.
"""

import functools
from itertools import combinations
from types import SimpleNamespace

import torch

from configurator import UserError

BOXES = {6: (2, 3), 9: (3, 3)}           # rows and columns of a box
SIDE = {42: 6, 90: 9}                    # of a board, by the tokens of its text
GIVENS = {6: (10, 20), 9: (25, 45)}      # how many a puzzle has, at least and at most
BOLD = str.maketrans({str(d): chr(0x1D7CE + d) for d in range(1, 10)})
PLAIN = {ord(bold): chr(plain) for plain, bold in BOLD.items()}
EMPTY = '.0_'                            # how people write an empty cell
FRAME = ' \t\r|+-│┼─'                      # and what they draw around cells
PRESETS = 'solve', 'surest'              # of checkpoints that doubt, and of others, if no rule is chosen
LINE = '{correct:.0%} of {n} puzzles are solved, {cells:.0%} of the cells to fill are right'


@functools.lru_cache
def shape(N):
    """The board of N x N cells: its units (rows, columns, boxes), and the (row, column, box) of each cell."""
    high, wide = BOXES[N]
    place = [(i // N, i % N, i // N // high * high + i % N // wide) for i in range(N * N)]
    units = [[i for i in range(N * N) if place[i][kind] == k] for kind in range(3) for k in range(N)]
    pairs = sorted({pair for unit in units for pair in combinations(unit, 2)})
    return SimpleNamespace(N=N, high=high, wide=wide, place=place, units=units, pairs=pairs)


def vocabulary(N):
    """The tokens of boards of N x N cells."""
    plain = [str(d) for d in range(1, N + 1)]
    return [*plain, *(c.translate(BOLD) for c in plain), '\n']


# -----------------------------------------------------------------------------
# the solver


def used(cells):
    """The digits in each row, column and box, as bits: three lists; None if one of them has a digit twice."""
    N = round(len(cells) ** 0.5)
    found = [0] * N, [0] * N, [0] * N
    for digit, place in zip(cells, shape(N).place):
        for bits, number in zip(found, place):
            if digit and bits[number] & 1 << digit:
                return None
            bits[number] |= digit and 1 << digit
    return found


def solutions(cells, most=2, rng=None, banned=None):
    """
    At most that many solutions of a puzzle: lists of cells. The most constrained cell comes first.

    rng: a random.Random, which tries digits in random order. banned: (cell, digit), what may not be there.
    """
    taken = used(cells)
    if taken is None:
        return []
    N, cells, found = round(len(cells) ** 0.5), list(cells), []
    rows, columns, boxes = taken
    place, every = shape(N).place, (2 << N) - 2
    empty = [i for i, digit in enumerate(cells) if not digit]
    if banned:                                                      # tried first: this fails at once
        empty.remove(banned[0])
        empty.append(banned[0])

    def search():
        fewest, best, open_digits = N + 1, None, 0
        for k in range(len(empty) - 1, -1, -1):
            r, c, b = place[empty[k]]
            free = every & ~(rows[r] | columns[c] | boxes[b])
            if banned and empty[k] == banned[0]:
                free &= ~(1 << banned[1])
            count = free.bit_count()
            if count < fewest:
                fewest, best, open_digits = count, k, free
                if count < 2:
                    break
        if best is None:
            found.append(cells[:])
            return
        if not fewest:
            return
        i, empty[best] = empty[best], empty[-1]
        empty.pop()
        r, c, b = place[i]
        digits = [d for d in range(1, N + 1) if open_digits >> d & 1]
        if rng:
            rng.shuffle(digits)
        for d in digits:
            bit = 1 << d
            rows[r] |= bit; columns[c] |= bit; boxes[b] |= bit      # noqa: E702
            cells[i] = d
            search()
            rows[r] ^= bit; columns[c] ^= bit; boxes[b] ^= bit      # noqa: E702
            if len(found) == most:
                break
        cells[i] = 0
        empty.append(i)

    search()
    return found


@functools.lru_cache(maxsize=4096)
def solution(givens):
    """The one solution of a puzzle, a tuple of cells; None if it has none, or several."""
    found = solutions(givens)
    return found[0] if len(found) == 1 else None


def candidates(cells):
    """The digits that each cell may get, as bits; 0 where it has one. None if the cells are in conflict."""
    taken = used(cells)
    if taken is None:
        return None
    rows, columns, boxes = taken
    N = len(rows)
    return [0 if digit else (2 << N) - 2 & ~(rows[r] | columns[c] | boxes[b])
            for digit, (r, c, b) in zip(cells, shape(N).place)]


def single(free):
    """A naked or hidden single, by the candidates: (cell, bits of its digit); None if there is none."""
    for i, bits in enumerate(free):
        if bits and not bits & bits - 1:
            return i, bits
    for unit in shape(round(len(free) ** 0.5)).units:
        once = twice = 0
        for i in unit:
            twice |= once & free[i]
            once |= free[i]
        for i in unit:
            alone = free[i] & once & ~twice
            if alone:
                return i, alone & -alone
    return None


def guesses(cells):
    """How many guesses (all count) a solver needs that sets all singles first; None: there is no solution."""
    solved, count = attempt(list(cells))
    return count if solved else None


def attempt(cells):
    """(whether it solves the cells, how many guesses it took), see guesses."""
    free, count = candidates(cells), 0
    while free and all(digit or bits for digit, bits in zip(cells, free)):
        if not any(free):
            return True, count
        forced = single(free)
        if forced is None:
            i = min((i for i, bits in enumerate(free) if bits), key=lambda i: free[i].bit_count())
            for digit in (d for d in range(10) if free[i] >> d & 1):
                solved, more = attempt([*cells[:i], digit, *cells[i + 1:]])
                count += 1 + more
                if solved:
                    return True, count
            return False, count
        cells[forced[0]] = forced[1].bit_length() - 1
        free = candidates(cells)
    return False, count


# -----------------------------------------------------------------------------
# puzzles


def full_board(rng, N=9):
    """A random solved board."""
    return solutions([0] * (N * N), 1, rng)[0]


def puzzle(rng, board, givens):
    """Cells with holes: taken away in random order while the solution stays the only one, down to givens."""
    cells, left = list(board), len(board)
    for i in rng.sample(range(left), left):
        if left <= givens:
            break
        digit, cells[i] = cells[i], 0
        if solutions(cells, 1, banned=(i, digit)):
            cells[i] = digit
        else:
            left -= 1
    return cells


def draw(rng, N=9):
    """A puzzle and its solution, cells each. rng: a random.Random."""
    board = full_board(rng, N)
    return puzzle(rng, board, rng.randint(*GIVENS[N])), board


def text_of(cells, givens):
    """The text of cells, in which those that givens has are bold."""
    N = round(len(cells) ** 0.5)
    signs = [str(d).translate(BOLD) if given else str(d or '_') for d, given in zip(cells, givens)]
    return ''.join(''.join(signs[r * N:r * N + N]) + '\n' for r in range(N))


def parse(text):
    """(cells, givens) of a text, both with 0 for what is empty or not there; None if it is no board."""
    lines = text.split('\n')
    N = len(lines) - 1
    if N not in BOXES or lines.pop() or any(len(line) != N for line in lines):
        return None
    signs = ''.join(lines)
    plain = signs.translate(PLAIN)
    if any(c != '_' and not '1' <= c <= str(N) for c in plain):
        return None
    cells = [0 if c == '_' else int(c) for c in plain]
    return cells, tuple(d if ord(c) in PLAIN else 0 for d, c in zip(cells, signs))


def conflicts(cells):
    """The pairs of cells that hold the same digit in one row, column or box."""
    pairs = shape(round(len(cells) ** 0.5)).pairs
    return [(i, j) for i, j in pairs if cells[i] and cells[i] == cells[j]]


# -----------------------------------------------------------------------------
# what training and sampling ask


def augment(rows, generator):
    """
    Rows (B, T) of token ids -> other rows that say the same: another puzzle of the same difficulty each.

    Digits are relabelled; bands, stacks, and rows and columns in them change places; 9 x 9 is transposed.
    """
    B, N = len(rows), SIDE[rows.size(1)]
    board = shape(N)

    def order(size):
        """The N lines in blocks of that size, shuffled inside of the blocks, and the blocks: (B, N)."""
        blocks = torch.rand(B, N // size, generator=generator).argsort(1)
        inside = torch.rand(B, N // size, size, generator=generator).argsort(2)
        return (blocks[:, :, None] * size + inside).flatten(1)

    at = order(board.high)[:, :, None] * N + order(board.wide)[:, None]        # (B, N, N) where it comes from
    turned = torch.rand(B, 1, 1, generator=generator) < 0.5
    if board.high == board.wide:
        at = torch.where(turned, at.mT, at)
    digits = torch.rand(B, N, generator=generator).argsort(1)
    lines = rows.view(B, N, N + 1)
    ids = lines[:, :, :N].flatten(1).gather(1, at.flatten(1))                  # (B, N * N)
    ids = digits.gather(1, ids % N) + ids // N * N
    return torch.cat((ids.view(B, N, N), lines[:, :, N:]), 2).flatten(1)


def starts(rows, num):
    """Of held-out rows (M, T) of token ids num texts to fill, spread evenly, again from the first if few."""
    N = SIDE[rows.size(1)]
    signs = ['_'] * N + vocabulary(N)[N:]
    picked = torch.arange(num) * max(1, len(rows) // num) % len(rows)
    return [''.join(signs[i] for i in row) for row in rows[picked].tolist()]


def gather(lines, size):
    """
    Lines of a file, [(number, line)], -> boards, [(number of the first line, signs)]. size: tokens of a text.

    A board is a line, or a line for each row; frames, spaces and empty lines count for nothing.
    """
    N, boards = SIDE[size], []
    for number, line in lines:
        cells = ''.join(c for c in line if c not in FRAME)
        if boards and len(cells) == N and len(boards[-1][1]) % N == 0 and len(boards[-1][1]) < N * N:
            boards[-1] = boards[-1][0], boards[-1][1] + cells
        elif cells:
            boards.append((number, cells))
    return boards


def read(text, size, hole='_'):
    """
    A puzzle as people write it -> its text. size: tokens of a text; hole: what an empty cell is there.

    '.', '0' and '_' are empty cells, spaces, frames and line ends count for nothing. In a puzzle all digits
    are given; in a full board those that are bold. Raises UserError for what is no board, and for a puzzle
    that breaks the rules by itself.
    """
    N = SIDE[size]
    signs = ''.join(c for c in text if c not in FRAME + '\n').replace(hole, '_')
    odd = [c for c in signs if c not in EMPTY + ''.join(vocabulary(N)[:-1])]
    if odd:
        raise UserError(f'{odd[0]!r} in {text!r} is no cell: a board has digits from 1 to {N}, and '
                        '. 0 or _ where it is empty')
    if len(signs) != N * N:
        raise UserError(f'{text!r} has {len(signs)} cells: a board is a line of {N * N} cells, or {N} '
                        f'lines of {N}')
    return read_board(signs).replace('_', hole)


def read_board(signs):
    """The text of a board, given a sign for each cell. Raises UserError if a puzzle breaks the rules."""
    digits = [c.translate(PLAIN) for c in signs]
    cells = [int(c) if c in '123456789' else 0 for c in digits]
    if all(cells):
        return text_of(cells, [ord(c) in PLAIN for c in signs])
    for i, j in conflicts(cells)[:1]:
        N = round(len(cells) ** 0.5)
        first, second = (f'row {k // N + 1} column {k % N + 1}' for k in (i, j))
        raise UserError(f'the board breaks the rules: {first} and {second} are both {cells[i]}')
    return text_of(cells, cells)


def score(texts, train=None):
    """
    How good are these boards? A dict of shares in 0..1, except for n:
      n        how many texts
      valid    no digit is missing, or twice in a row, column or box
      correct  the givens are as the only solution of the puzzle has them, and so is every other cell
      cells    cells that are right, of those that were to be filled; None if no puzzle has one solution
    What was given is bold, so that a text says which puzzle it solves.
    """
    texts = list(texts)
    if not texts:
        raise ValueError('no texts to score')
    valid, solved, right, filled = [], [], 0, 0
    for found in map(parse, texts):
        cells, givens = found or ([0], (0,))
        valid.append(found is not None and all(cells) and not conflicts(cells))
        best = found and solution(givens)
        solved.append(bool(best) and cells == best)
        if best:
            open_cells = [a == b for a, b, given in zip(cells, best, givens) if not given]
            right, filled = right + sum(open_cells), filled + len(open_cells)
    n = len(texts)
    return dict(n=n, valid=sum(valid) / n, correct=sum(solved) / n, cells=right / filled if filled else None)


def verdict(text):
    """What to print beside a board: a tick, or what is wrong with it."""
    found = parse(text)
    if found is None:
        return '✗ no board'
    many = len(conflicts(found[0]))
    if many:
        return f'✗ {many} conflict' + 's' * (many > 1)
    return '✓' if all(found[0]) else f'✗ {found[0].count(0)} empty'


def picture(text):
    """A board, or other signs in its place, with a space between the boxes; any other text as it is."""
    lines = text.split('\n')[:-1]
    N = len(lines)
    if N not in BOXES or any(len(line) != N for line in lines):
        return text
    high, wide = BOXES[N]
    rows = ['  '.join(' '.join(line[i:i + wide]) for i in range(0, N, wide)) for line in lines]
    bands = ['\n'.join(rows[i:i + high]) for i in range(0, N, high)]
    return '\n\n'.join(bands)
