"""Sudoku: the solver, the puzzles, their symmetries, and that what is given stays where it is."""

import json
import os
import random
from collections import Counter
from itertools import product

import pytest
import torch
from conftest import ROOT, fresh_gpt, load_script, run_main, seeded, tiny_gpt, write_checkpoint

import corruption
from configurator import UserError
from corruption import CORRUPTIONS, Task, ask
from data import loader
from data.sudoku import prepare, task
from parts.noise import NOISE
from plumbing.log import show_samples
from plumbing.rows import Ends
from plumbing.show import report
from plumbing.text import decode, encode, load_task, modelled, pictured, start_canvas, task_canvas
from sample import generate_diffusion

SIZES = [6, 9]
NUM = dict(num_train=30, num_val=8)


@pytest.fixture(scope='module', params=SIZES)
def boards(request, tmp_path_factory):
    """A small dataset: (N, meta, {split: rows}, its folder)."""
    folder = str(tmp_path_factory.mktemp('sudoku'))
    meta = prepare.prepare(folder, request.param, **NUM)
    return request.param, meta, loader.read_dataset(folder)[1], folder


def rows_and_texts(boards):
    N, meta, data, _ = boards
    return data['train'], [decode(meta, row)[0] for row in data['train'].tolist()]


# -----------------------------------------------------------------------------
# the solver


def brute_force(cells):
    """All solutions of a puzzle of 6 x 6, by trying all digits in all empty cells, row by row."""
    found, pairs = [cells], task.shape(6).pairs
    for i in range(36):
        if not cells[i]:
            found = [[*one[:i], d, *one[i + 1:]] for one in found for d in range(1, 7)]
        found = [one for one in found if not any(i in pair and one[pair[0]] == one[pair[1]] for pair in pairs)]
    return found


@pytest.mark.parametrize('seed', range(4))
def test_the_solver_finds_what_brute_force_finds(seed):
    rng = random.Random(seed)
    board = task.full_board(rng, 6)
    for holes in (0, 6, 14, 18):
        cells = [0 if i < holes else d for i, d in zip(rng.sample(range(36), 36), board)]
        expected = brute_force(cells)
        assert sorted(task.solutions(cells, 10**6)) == sorted(expected) and board in expected
        assert len(task.solutions(cells)) == min(2, len(expected))
        i = rng.randrange(36)
        if not cells[i]:
            others = [one for one in expected if one[i] != board[i]]
            assert sorted(task.solutions(cells, 10**6, banned=(i, board[i]))) == sorted(others)


def test_a_puzzle_without_solution():
    broken, dead = [1, 1] + [0] * 34, [0, 1, 2, 3, 4, 5] + [6] + [0] * 29
    for cells in (broken, dead):                # two in a row; no digit is left for the first cell
        assert task.solutions(cells) == [] and task.guesses(cells) is None and task.solution(tuple(cells)) is None
    assert task.solution((0,) * 36) is None     # it has many


@pytest.mark.parametrize('N', SIZES)
def test_puzzles_have_one_solution(N):
    for seed in range(3):
        rng = random.Random(seed)
        board = task.full_board(rng, N)
        assert task.full_board(rng, N) != board
        for unit in task.shape(N).units:
            assert sorted(board[i] for i in unit) == [*range(1, N + 1)]
        few, many = (task.puzzle(rng, board, task.GIVENS[N][k]) for k in range(2))
        assert sum(map(bool, many)) == task.GIVENS[N][1] and len(set(map(bool, few))) == 2
        for cells in (few, many):
            assert task.solutions(cells) == [board] and all(a in (0, b) for a, b in zip(cells, board))
        # as few as can be: any other given, taken away, leaves a second solution
        least = task.puzzle(rng, board, 0)
        assert task.solutions(least) == [board]
        for i in (i for i in range(N * N) if least[i]):
            assert len(task.solutions([*least[:i], 0, *least[i + 1:]])) == 2


def test_guesses():
    """Singles alone solve the first; of the second, a famous hard one, they set nothing."""
    easy = [int(c) for c in '530070000600195000098000060800060003400803001700020006060000280000419005000080079']
    hard = [int(c) for c in '800000000003600000070090200050007000000045700000100030001000068008500010090000400']
    assert task.guesses(easy) == 0 and task.guesses(hard) > 5
    assert task.single(task.candidates(easy)) and not task.single(task.candidates(hard))
    two_left = task.solutions(hard)[0]
    assert task.guesses(two_left) == 0


# -----------------------------------------------------------------------------
# the dataset


def test_the_files(boards):
    N, meta, data, folder = boards
    assert meta['block_size'] == N * N + N and meta['vocab_size'] == len(meta['itos']) == 2 * N + 1
    assert [meta['itos'][i] for i in meta['given']] == [*task.vocabulary(N)[N:]]
    for split in ('train', 'val'):
        rows = data[split]
        assert rows.shape == (NUM[f'num_{split}'], N * N + N)
        assert (rows.view(-1, N, N + 1)[..., -1] == 2 * N).all() and (rows == 2 * N).sum() == len(rows) * N
        texts = [decode(meta, row)[0] for row in rows.tolist()]
        assert task.score(texts) == dict(n=len(texts), valid=1.0, correct=1.0, cells=1.0)
        givens = [sum(map(bool, task.parse(text)[1])) for text in texts]
        least, most = task.GIVENS[N]
        assert all(least <= n <= most for n in givens) and len({*givens}) > 3
    assert meta['guesses'] == [task.guesses(task.parse(decode(meta, row)[0])[1]) for row in data['val'].tolist()]
    again = prepare.prepare(folder, N, **NUM)
    assert again['sha256'] == meta['sha256']
    assert prepare.prepare(folder, N, **NUM, seed=7)['sha256'] != meta['sha256']
    prepare.prepare(folder, N, **NUM)


def test_no_held_out_board_is_a_training_board(boards):
    N, _, data, _ = boards

    def known(split):
        return {prepare.signature([i % N for i in row if i < 2 * N]) if N == 9 else tuple(i % N for i in row)
                for row in data[split].tolist()}
    assert len(known('train')) == 30 and not known('train') & known('val')


def test_a_board_that_is_taken_is_not_drawn_again():
    """draw_boards skips what is in avoid, and what it has."""
    class Bar:
        def update(self): pass
    first = prepare.draw_boards(3, 9, random.Random(1), Bar())
    second = prepare.draw_boards(3, 9, random.Random(1), Bar(), first)
    assert not {*first} & {*second}


def test_the_signature_is_that_of_all_images(boards):
    N, _, data, _ = boards
    if N == 9:
        row = data['train'][:1]
        many = task.augment(row.expand(20, -1), seeded(1))
        signs = {prepare.signature([i % 9 for i in one if i < 18]) for one in [*many.tolist(), *row.tolist()]}
        assert len({*map(tuple, many.tolist())}) == 20 and len(signs) == 1


@pytest.mark.parametrize('words, message', [
    (dict(size=7), 'size expects 9 or 6, got 7'),
    (dict(size=6, givens=(10, 40)), 'most_givens <= 36; got 10000, 1000, 10 and 40'),
    (dict(size=6, givens=(12, 10)), 'least_givens <= most_givens'),
    (dict(num_val=0), 'must be at least 1')])
def test_settings_that_make_no_sense(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(str(tmp_path), **words)
    assert not os.listdir(tmp_path)


# -----------------------------------------------------------------------------
# symmetries


def test_augment_keeps_puzzles(boards):
    """Another valid board with as many givens in as many lines, whose givens have one solution, with as many guesses."""
    N, meta, _, _ = boards
    rows, texts = rows_and_texts(boards)
    other = task.augment(rows, seeded(3))
    changed = [decode(meta, row)[0] for row in other.tolist()]
    assert all(text not in texts for text in changed)
    assert task.score(changed)['correct'] == task.score(changed)['cells'] == 1
    for before, after in zip(texts, changed):
        (_, old), (_, new) = task.parse(before), task.parse(after)
        assert sum(map(bool, old)) == sum(map(bool, new))
        assert sorted(Counter(old).values()) == sorted(Counter(new).values())
        sides = [sorted(sorted(Counter(place[kind] for d, place in zip(cells, task.shape(N).place) if d).values())
                        for kind in (0, 1)) for cells in (old, new)]
        assert sides[0] == sides[1]                # lines with as many givens, perhaps transposed
    assert torch.equal(task.augment(rows, seeded(3)), other)
    assert not torch.equal(task.augment(rows, seeded(4)), other)


def test_augment_reaches_all_places(boards):
    """One cell of one board goes to every place, with every digit; 9 x 9 is transposed in half of the cases."""
    N, meta, data, _ = boards
    row = data['train'][0].clone()
    row[row != 2 * N] = 0
    row[0], row[1] = 1, N                          # the first two cells: another digit, a given
    many = task.augment(row.expand(4000, -1), seeded())
    cells = many.view(-1, N, N + 1)[..., :N].flatten(1)
    given = (cells >= N).long().argmax(1)
    assert (cells >= N).sum() == 4000
    share = given.bincount(minlength=N * N) / 4000
    assert (share - 1 / N ** 2).abs().max() < 4.5 * (1 / N ** 2 / 4000) ** 0.5
    digits = (cells.max(1).values % N).bincount(minlength=N) / 4000
    assert (digits - 1 / N).abs().max() < 4.5 * (1 / N / 4000) ** 0.5
    plain = torch.where(cells >= N, -1, cells)
    odd = torch.stack([(plain == d).sum(1) == 1 for d in range(N)], 1).long().argmax(1)      # the digit of the other
    other = (plain == odd[:, None]).long().argmax(1)
    same_row = (other // N == given // N).double().mean().item()
    assert abs(same_row - (0.5 if N == 9 else 1)) < 0.04


# -----------------------------------------------------------------------------
# what is given stays


@pytest.mark.parametrize('name', [*CORRUPTIONS, *NOISE])
@pytest.mark.parametrize('kind', ['joint', 'unmasking', 'denoising', 'remasking'])
def test_no_corruption_touches_what_is_given(boards, name, kind):
    N, meta, data, _ = boards
    V, x0 = meta['vocab_size'], data['train']
    free, real = modelled(x0, meta)
    assert torch.equal(free, x0 < N) and torch.equal(free, real)
    mix = name if name in CORRUPTIONS else 'noise'
    noise = ((name, 1.0),) if name in NOISE else tuple((what, 0.2) for what in NOISE)
    if kind == 'remasking' and mix == 'own':
        return
    setting = Task(training_type=kind, remask_ratio=1.0, corruption=((mix, 1.0),), noise_mix=noise)
    for seed in range(4):
        rng = seeded(seed)
        input, target, weight = ask(x0, free, real, setting, (V, V + 1, None), rng,
                                    lambda ids, where: torch.randint(N, ids.shape, generator=rng))
        assert torch.equal(input[~free], x0[~free]) and not weight[~free].any()
        assert (input != x0).any() and weight.any()


def test_noise_that_moves_tokens_stays_between_what_is_given():
    """The kind of the fault: not only boards, any text with something given inside."""
    x0, free = torch.arange(12)[None].repeat(50, 1), torch.ones(50, 12, dtype=torch.bool)
    free[:, [3, 4, 9]] = False
    setting = Task(training_type='denoising', remask_ratio=1.0, noise_mix=(('delete', 1.0), ('insert', 1.0)))
    input, _, weight = ask(x0, free, free, setting, (12, 13, None), seeded())
    assert torch.equal(input[~free], x0[~free]) and not weight[~free].any() and (input != x0)[:, 10:].any()


@torch.no_grad()
def test_the_bound_counts_free_cells_only(boards):
    from plumbing.evaluate import evaluate
    N, meta, data, _ = boards
    model = fresh_gpt(meta['vocab_size'], N * N + N).eval()
    for p in model.parameters():
        p.zero_()                                  # so that every token is as likely as any other
    result = evaluate(model, data['val'], meta, causal=True, bidirectional=True,
                      own_errors=corruption.own_errors)
    expected = torch.tensor(float(meta['vocab_size'])).log().item()
    assert abs(result['nelbo'] - expected) < 1e-4 and abs(result['causal_nll'] - expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize('rules', [dict(), dict(remask='wrong'), dict(remask='p2', commit='margin'),
                                   dict(remask='confidence', commit='confidence'), dict(remask='remdm')])
def test_samples_keep_what_is_given_and_write_digits_only(boards, rules):
    N, meta, data, _ = boards
    model = tiny_gpt(meta['vocab_size'], N * N + N)
    texts = task.starts(data['val'], 3)
    canvas, fixed = (torch.cat(rows) for rows in zip(*[task_canvas('infill', model, meta, text, '_')
                                                       for text in texts]))
    filled = generate_diffusion(model, canvas, fixed, ends=Ends.of(meta), generator=seeded(), steps=20, **rules)[0]
    assert torch.equal(filled[fixed], canvas[fixed]) and (filled[~fixed] < N).all()
    repaired, fixed = task_canvas('repair', model, meta, decode(meta, data['val'][0].tolist())[0])
    assert torch.equal(fixed[0], data['val'][0] >= N) and torch.equal(repaired[0], data['val'][0])
