"""
Make the sudoku dataset: rows of token ids, a board each, puzzles with one solution.

$ python data/sudoku/prepare.py
$ python data/sudoku/prepare.py --size=6 --num_train=50000 --out=some/folder
"""

import os
import random
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
import configurator  # noqa: E402
from configurator import UserError  # noqa: E402
from data.common import check_writable, library, write_dataset  # noqa: E402
from data.sudoku.task import (  # noqa: E402
    BOXES, GIVENS, full_board, guesses, picture, puzzle, text_of, vocabulary)

out: str = None            # the folder to write to, None: data/sudoku, or data/sudoku6 for size=6
size = 9                   # 9: boxes of 3 x 3 | 6: boxes of 2 rows x 3 columns
num_train = 10000          # puzzles to train on, before they are relabelled and permuted
num_val = 1000             # held-out puzzles
least_givens: int = None   # givens of a puzzle are uniform from this; None: 25, or 10 for size=6
most_givens: int = None    # to this; None: 45, or 20 for size=6
seed = 1337


def signature(board):
    """
    What all boards share that relabelling, permuting and transposing make of this one.

    The digits of a line above those of another are a permutation, and the lengths of its cycles stay the same
    whatever the digits are called and wherever the two stand. Of all pairs of rows and all pairs of columns.
    """
    N = round(len(board) ** 0.5)
    sides = []
    for lines in ([board[r * N:r * N + N] for r in range(N)], [board[c::N] for c in range(N)]):
        kinds = []
        for i in range(N):
            for j in range(i):
                other, cycles = dict(zip(lines[i], lines[j])), []
                while other:
                    digit, length = next(iter(other)), 0
                    while digit in other:
                        digit, length = other.pop(digit), length + 1
                    cycles.append(length)
                kinds.append(tuple(sorted(cycles)))
        sides.append(tuple(sorted(kinds)))
    return tuple(sorted(sides))


def draw_boards(num, size, rng, bar, avoid=()):
    """num solved boards and what tells them apart, none of which is in avoid: {signature or board: board}."""
    boards = {}
    while len(boards) < num:
        board = full_board(rng, size)
        # there are 49 boards of 6 x 6, if those that are the same by symmetry count once: too few to split
        key = signature(board) if size == 9 else tuple(board)
        if key not in avoid and key not in boards:
            boards[key] = board
            bar.update()
    return boards


def encode_row(cells, board):
    """Token ids of a row (T,): the board, in which what the cells of the puzzle show is given."""
    N = round(len(board) ** 0.5)
    ids = [digit - 1 + N * bool(given) for digit, given in zip(board, cells)]
    return [id for r in range(N) for id in [*ids[r * N:r * N + N], 2 * N]]


def prepare(out_dir, size=9, num_train=10000, num_val=1000, givens=(None, None), seed=1337):
    """Draws the dataset, writes it into out_dir, says what it is and returns its meta."""
    if size not in BOXES:
        raise UserError(f'size expects 9 or 6, got {size}')
    least, most = (usual if n is None else n for n, usual in zip(givens, GIVENS[size]))
    if min(num_train, num_val) < 1 or not 0 <= least <= most <= size * size:
        raise UserError('num_train and num_val must be at least 1, and 0 <= least_givens <= most_givens <= '
                        f'{size * size}; got {num_train}, {num_val}, {least} and {most}')
    check_writable(out_dir)
    # seeded with names: by seed and seed + 1 the held-out set would be the next dataset's training set
    rows, puzzles, avoid = {}, {}, ()
    with library('tqdm').tqdm(total=2 * (num_train + num_val), desc='boards and puzzles') as bar:
        for split, num in (('train', num_train), ('val', num_val)):
            rng = random.Random(f'{split} {seed}')
            avoid = draw_boards(num, size, rng, bar, avoid)
            puzzles[split], rows[split] = [], []
            for board in avoid.values():
                puzzles[split].append(puzzle(rng, board, rng.randint(least, most)))
                rows[split].append(encode_row(puzzles[split][-1], board))
                bar.update()
    itos = vocabulary(size)
    meta = write_dataset(out_dir, np.array(rows['train']), np.array(rows['val']), {
        'name': 'sudoku', 'format': 'rows', 'block_size': size * size + size, 'vocab_size': len(itos),
        'tokenizer': 'char', 'itos': itos, 'bos': None, 'eos': None, 'pad': None, 'seed': seed,
        'given': [*range(size, len(itos))],                         # these tokens never change
        'guesses': [guesses(cells) for cells in puzzles['val']]})   # of each held-out puzzle
    report(out_dir, puzzles, meta['guesses'], size)
    return meta


def report(out_dir, puzzles, tries, size):
    """Say what was written."""
    for split, found in puzzles.items():
        mean = sum(digit > 0 for cells in found for digit in cells) / len(found)
        print(f'{split}: {len(found):,} puzzles, {mean:.1f} givens in the mean')
    hard = sum(n > 0 for n in tries)
    what = 'by symmetry one' if size == 9 else 'one'
    print(f'no board of val is {what} of train; {hard:,} of its puzzles need guesses beyond singles')
    print('for example', picture(text_of(puzzles['val'][0], puzzles['val'][0])), sep='\n')
    print(f'wrote train.bin, val.bin and meta.json to {out_dir}')


def main():
    folder = HERE if size == 9 else f'{HERE}{size}'
    prepare(out or folder, size, num_train, num_val, (least_givens, most_givens), seed)


if __name__ == '__main__':
    configurator.run(globals())
