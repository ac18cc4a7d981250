"""Sudoku: the solver, the puzzles, their symmetries, and that what is given stays where it is."""

import json
import os
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import fresh_gpt, run_main, seeded, tiny_gpt, write_checkpoint

import corruption
from configurator import UserError
from corruption import CORRUPTIONS, Task, ask
from data import loader
from data.sudoku import prepare, task
from parts.noise import NOISE
from parts.presets import PRESETS
from plumbing.evaluate import evaluate
from plumbing.rows import Ends
from plumbing.show import report
from plumbing.text import decode, modelled, pictured, task_canvas
from sample import generate_diffusion, load
from suites import sudoku as suite

SIZES = [6, 9]
NUM = dict(num_train=30, num_val=8)


@pytest.fixture(scope='module', params=SIZES)
def boards(request, tmp_path_factory):
    """A small dataset: (N, meta, {split: rows})."""
    folder = str(tmp_path_factory.mktemp('sudoku'))
    meta = prepare.prepare(folder, request.param, **NUM)
    return request.param, meta, loader.read_dataset(folder, 'sudoku')[1]


def rows_and_texts(boards):
    meta, data = boards[1:]
    return data['train'], [decode(meta, row)[0] for row in data['train'].tolist()]


# -----------------------------------------------------------------------------
# the solver


def brute_force(cells):
    """All solutions of a puzzle of 6 x 6, by trying all digits in all empty cells, row by row."""
    found, pairs = [cells], task.shape(6).pairs
    for i in range(36):
        if not cells[i]:
            found = [[*one[:i], d, *one[i + 1:]] for one in found for d in range(1, 7)]
        found = [one for one in found if all(i not in (a, b) or one[a] != one[b] for a, b in pairs)]
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
        assert task.solutions(cells) == [] and task.guesses(cells) is None
        assert task.solution(tuple(cells)) is None
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
    easy = '530070000600195000098000060800060003400803001700020006060000280000419005000080079'
    hard = '800000000003600000070090200050007000000045700000100030001000068008500010090000400'
    easy, hard = [*map(int, easy)], [*map(int, hard)]
    assert task.guesses(easy) == 0 and task.guesses(hard) > 5
    assert task.single(task.candidates(easy)) and not task.single(task.candidates(hard))
    assert task.guesses(task.solutions(hard)[0]) == 0


# -----------------------------------------------------------------------------
# the dataset


def test_the_files(boards, tmp_path):
    N, meta, data = boards
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
    held_out = [task.parse(decode(meta, row)[0])[1] for row in data['val'].tolist()]
    assert meta['guesses'] == [*map(task.guesses, held_out)]
    assert prepare.prepare(str(tmp_path), N, **NUM)['sha256'] == meta['sha256']


def test_no_held_out_board_is_a_training_board(boards):
    N, _, data = boards

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
    N, _, data = boards
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
    """Another valid board with as many givens in as many lines, whose givens have one solution."""
    N, meta = boards[:2]
    rows, texts = rows_and_texts(boards)
    other = task.augment(rows, seeded(3))
    changed = [decode(meta, row)[0] for row in other.tolist()]
    assert all(text not in texts for text in changed)
    assert task.score(changed)['correct'] == task.score(changed)['cells'] == 1
    for before, after in zip(texts, changed):
        (_, old), (_, new) = task.parse(before), task.parse(after)
        assert sum(map(bool, old)) == sum(map(bool, new))
        assert sorted(Counter(old).values()) == sorted(Counter(new).values())
        sides = []
        for cells in (old, new):
            places = [place for d, place in zip(cells, task.shape(N).place) if d]
            sides.append(sorted(sorted(Counter(place[kind] for place in places).values()) for kind in (0, 1)))
        assert sides[0] == sides[1]                # lines with as many givens, perhaps transposed
    assert torch.equal(task.augment(rows, seeded(3)), other)
    assert not torch.equal(task.augment(rows, seeded(4)), other)


def test_augment_reaches_all_places(boards):
    """One cell of a board goes to every place, with every digit; 9 x 9 is transposed in half of the cases."""
    N, meta, data = boards
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
    odd = torch.stack([(plain == d).sum(1) == 1 for d in range(N)], 1).long().argmax(1)
    other = (plain == odd[:, None]).long().argmax(1)
    same_row = (other // N == given // N).double().mean().item()
    assert abs(same_row - (0.5 if N == 9 else 1)) < 0.04


# -----------------------------------------------------------------------------
# what is given stays


@pytest.mark.parametrize('name', [*CORRUPTIONS, *NOISE])
@pytest.mark.parametrize('kind', ['joint', 'unmasking', 'denoising', 'remasking'])
def test_no_corruption_touches_what_is_given(boards, name, kind):
    N, meta, data = boards
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
    N, meta, data = boards
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
    N, meta, data = boards
    model = tiny_gpt(meta['vocab_size'], N * N + N)
    texts = task.starts(data['val'], 3)
    canvas, fixed = (torch.cat(rows) for rows in zip(*[task_canvas('infill', model, meta, text, '_')
                                                       for text in texts]))
    ends = Ends.of(meta)
    filled = generate_diffusion(model, canvas, fixed, ends=ends, generator=seeded(), steps=20, **rules)[0]
    assert torch.equal(filled[fixed], canvas[fixed]) and (filled[~fixed] < N).all()
    repaired, fixed = task_canvas('repair', model, meta, decode(meta, data['val'][0].tolist())[0])
    assert torch.equal(fixed[0], data['val'][0] >= N) and torch.equal(repaired[0], data['val'][0])


# -----------------------------------------------------------------------------
# what people write, and what is said of a board

PUZZLE = '..15..6..2...35.4..6.....4.3..3...2.'
LINES = [PUZZLE[i:i + 6] for i in range(0, 36, 6)]
GIVEN = '__𝟏𝟓__\n𝟔__𝟐__\n_𝟑𝟓_𝟒_\n_𝟔____\n_𝟒_𝟑__\n𝟑___𝟐_\n'
SOLVED = task.text_of(task.solution(task.parse(GIVEN)[1]), task.parse(GIVEN)[1])
FRAMED = '\n+-------+-------+\n'.join(f"| {' '.join(line[:3])} | {' '.join(line[3:])} |" for line in LINES)


def boards_of(lines, size=42, hole='_'):
    """What sample.py makes of the lines of a file."""
    return [task.read(board, size, hole) for _, board in task.gather(enumerate(lines, 1), size)]


@pytest.mark.parametrize('text', [
    PUZZLE, PUZZLE.replace('.', '0'), PUZZLE.replace('.', '_'), PUZZLE.replace('.', '?'), '\n'.join(LINES),
    '\r\n'.join(LINES) + '\r\n', ' '.join(PUZZLE), FRAMED, FRAMED.replace('|', '│'), GIVEN,
    task.picture(GIVEN), PUZZLE.translate(task.BOLD)])
def test_read_all_notations(text):
    hole = '?' if '?' in text else '_'
    assert task.read(text, 42, hole) == GIVEN.replace('_', hole)
    assert boards_of(text.splitlines(), hole=hole) == [GIVEN.replace('_', hole)]


def test_read_several_boards():
    assert boards_of([PUZZLE, '', PUZZLE, *LINES, PUZZLE]) == [GIVEN] * 4
    assert [number for number, _ in task.gather(enumerate([PUZZLE, '', *LINES, PUZZLE], 1), 42)] == [1, 3, 9]
    nine = '53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79'
    assert boards_of([nine, nine], 90)[1].translate(task.PLAIN).replace('\n', '').replace('_', '.') == nine


def test_what_is_bold_in_a_full_board_is_given():
    plain = SOLVED.translate(task.PLAIN)
    assert task.read(SOLVED, 42) == SOLVED and task.read(plain, 42) == plain
    wrong = '11' + SOLVED[2:]                       # that is what a repair is for
    assert task.read(wrong, 42) == wrong


@pytest.mark.parametrize('lines, message', [
    (['11' + '.' * 34], 'the board breaks the rules: row 1 column 1 and row 1 column 2 are both 1'),
    (['2.....' + '.' * 18 + '2' + '.' * 11], 'row 1 column 1 and row 5 column 1 are both 2'),
    (['3........3' + '.' * 26], None),
    (['3......3' + '.' * 28], 'row 1 column 1 and row 2 column 2 are both 3'),
    ([PUZZLE[:-1]], "has 35 cells: a board is a line of 36 cells, or 6 lines of 6"),
    ([PUZZLE + '.'], 'has 37 cells'),
    (LINES[:5], 'has 30 cells: a board is'),
    ([*LINES[:2], PUZZLE], 'has 12 cells: a board is'),
    ([*LINES[:2], LINES[2][1:], *LINES[3:]], 'has 12 cells: a board is'),
    ([PUZZLE[:-1] + '7'], "'7' in .* is no cell: a board has digits from 1 to 6"),
    ([PUZZLE[:-1] + 'x'], "'x' in .* is no cell"),
    ([PUZZLE[:-1] + '²'], 'is no cell'),
    ([PUZZLE[:-1] + '𝟗'], 'is no cell')])
def test_boards_that_are_refused(lines, message):
    if message is None:
        assert boards_of(lines)
        return
    with pytest.raises(UserError, match=message):
        boards_of(lines)


def test_score_and_verdict():
    assert task.score([SOLVED]) == dict(n=1, valid=1.0, correct=1.0, cells=1.0)
    assert task.verdict(SOLVED) == '✓'
    i = next(i for i, c in enumerate(SOLVED) if c in '123456')
    j = next(j for j, c in enumerate(SOLVED) if c in '123456' and c != SOLVED[i])
    wrong = list(SOLVED)
    wrong[i], wrong[j] = wrong[j], wrong[i]
    wrong = ''.join(wrong)
    free = sum(c in '123456' for c in SOLVED)
    assert task.score([SOLVED, wrong]) == dict(n=2, valid=0.5, correct=0.5, cells=(free - 1) / free)
    assert task.verdict(wrong) == f'✗ {len(task.conflicts(task.parse(wrong)[0]))} conflicts'
    # a given that was changed makes another puzzle, or none
    k = next(k for k, c in enumerate(SOLVED) if c in '𝟏𝟐𝟑𝟒𝟓𝟔')
    cheat = SOLVED[:k] + str(7 - int(SOLVED[k])).translate(task.BOLD) + SOLVED[k + 1:]
    assert task.score([cheat])['correct'] == 0 and '✗' in task.verdict(cheat)
    assert task.verdict(GIVEN) == f'✗ {GIVEN.count("_")} empty' and task.score([GIVEN])['correct'] == 0
    for text in ('', 'x', SOLVED[:-1], SOLVED + '\n', SOLVED.replace('\n', '1'), '7' + SOLVED[1:]):
        assert task.verdict(text) == '✗ no board' and task.score([text])['valid'] == 0
        assert task.picture(text) == text or len(text) == 42
    with pytest.raises(ValueError):
        task.score([])


def test_a_pair_is_one_conflict():
    cells = [0] * 36
    cells[0] = cells[1] = 4                         # in a row and in a box
    assert task.conflicts(cells) == [(0, 1)]
    assert task.verdict(task.text_of(cells, cells)) == '✗ 1 conflict'


def test_a_board_is_drawn_as_a_board():
    rows = task.picture(SOLVED).split('\n')
    assert len(rows) == 8 and rows[2] == rows[5] == ''
    assert rows[0] == ' '.join(SOLVED[:3]) + '  ' + ' '.join(SOLVED[3:6])
    meta = dict(bos=None, tokenizer='char')
    sample = dict(text=SOLVED, p_wrong=[i / 42 for i in range(42)], marks=' ^?' * 14)
    shown = report(sample, meta, task, GIVEN)
    assert shown.startswith(task.picture(SOLVED)) and '✓' in shown
    assert '0 0 0  0 0 1\n' in shown and '  ^ ?    ^ ?\n' in shown and 'p(WRONG)' in shown
    assert pictured(None, 'a\n') == 'a\n'


# -----------------------------------------------------------------------------
# the commands

RUN = ['--dataset=tiny', '--block_size=42', '--n_layer=1', '--n_head=2', '--n_embd=16', '--n_recur=2',
       '--batch_size=8', '--parts=places', '--causal_ratio=0', '--draft_head=False', '--eval_rows=8',
       '--eval_samples=4', '--eval_interval=4', '--proofreading_warmup_iters=0', '--device=cpu',
       '--dtype=float32', '--max_iters=8']


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A folder of datasets with one called tiny: its path."""
    folder = tmp_path_factory.mktemp('data')
    prepare.prepare(str(folder / 'tiny'), 6, **NUM)
    return str(folder)


@pytest.fixture
def here(tiny, monkeypatch):
    monkeypatch.setattr(loader, 'HERE', tiny)


def held_out_of(name):
    return loader.spread_rows(loader.load_data(name)[1]['val'], 5, 42)


def checkpoint_of(folder):
    return torch.load(os.path.join(folder, 'ckpt_joint_all_positions.pt'), weights_only=True)


def test_training_sees_other_boards_every_time_and_resumes_bit_by_bit(tmp_path, here):
    meta, data = loader.load_data('tiny')
    first, second = (loader.random_rows(data['train'], 8, 42, rng) for rng in [seeded(5)] * 2)
    known = {*map(tuple, data['train'].tolist())}
    assert not {*map(tuple, first.tolist())} & known and not torch.equal(first, second)
    assert {*map(tuple, loader.random_rows(data['val'], 8, 42, seeded()).tolist())} <= \
        {*map(tuple, data['val'].tolist())}
    straight, half = str(tmp_path / 'a'), str(tmp_path / 'b')
    out = run_main('train', *RUN, f'--out_dir={straight}')
    assert 'of 4 puzzles are solved' in out
    line = next(line for line in out.split('\n') if '✗' in line)
    assert line.count('✗') == 4 and line.startswith('    ✗')        # boards stand next to one another
    run_main('train', *RUN, f'--out_dir={half}', '--keep_every=4')
    name = os.path.join(half, 'ckpt_joint_all_positions')
    os.replace(f'{name}_4.pt', f'{name}.pt')
    torch.manual_seed(99)
    run_main('train', *RUN, f'--out_dir={half}', '--init_from=resume')
    before, after = checkpoint_of(straight), checkpoint_of(half)
    assert all(torch.equal(before['model'][name], weight) for name, weight in after['model'].items())
    with open(os.path.join(straight, 'log.jsonl'), encoding='utf-8') as log:
        assert {'correct', 'cells', 'valid', 'nelbo'} <= {*json.loads(log.readlines()[-1])}


def test_infill_keeps_the_givens_and_samples_start_from_held_out_puzzles(tmp_path, here):
    run_main('train', *RUN, f'--out_dir={tmp_path}')
    path, puzzles = str(tmp_path / 'ckpt_joint_all_positions.pt'), tmp_path / 'puzzles.txt'
    puzzles.write_text(PUZZLE + '\n\n' + '\n'.join(LINES) + '\n', encoding='utf-8')
    save, page = str(tmp_path / 'samples.jsonl'), tmp_path / 'page.html'
    words = [f'--init_from={path}', f'--save={save}', '--device=cpu']
    out = run_main('sample', *words, '--task=infill', f'--file={puzzles}', f'--html={page}', '--score=True')
    with open(save, encoding='utf-8') as file:
        texts = [json.loads(line)['text'] for line in file]
    assert len(texts) == 2 and all(task.parse(text)[1] == task.parse(GIVEN)[1] for text in texts)
    assert all(all(task.parse(text)[0]) for text in texts)
    assert task.picture(texts[0]) in out and '"kind":"board","side":6' in page.read_text(encoding='utf-8')
    run_main('sample', *words, '--task=repair', f'--text={SOLVED}')
    with open(save, encoding='utf-8') as file:
        assert task.parse(json.loads(file.read())['text'])[1] == task.parse(SOLVED)[1]

    # without a text they are the held-out ones, and without a rule those of the dataset are used
    assert 'redrafts=16' in run_main('sample', *words, '--num_samples=2', '--steps=2')
    assert 'redrafts' not in run_main('sample', *words, '--num_samples=2', '--steps=2', '--remask=wrong')
    m = load(str(tmp_path))
    canvas, _ = m.start(1)
    assert m.choose('generate', [], canvas, steps=4).items() >= PRESETS['solve'].items()
    m.can = m.can._replace(detects=False)                           # as one that learned unmasking alone
    assert 'redrafts' not in m.choose('generate', [], canvas, steps=4)
    assert m.choose('generate', [], canvas, steps=4).items() >= PRESETS['surest'].items()
    run_main('sample', *words, '--num_samples=10')
    with open(save, encoding='utf-8') as file:
        texts = [json.loads(line)['text'] for line in file]
    meta, data = loader.load_data('tiny')
    held_out = [task.parse(decode(meta, row)[0])[1] for row in data['val'].tolist()]
    assert [task.parse(text)[1] for text in texts] == held_out + held_out[:2]
    for word in ('--prompt=1', '--length=42'):
        with pytest.raises(UserError, match='sudoku starts from what is given: it takes no prompt'):
            run_main('sample', *words, word)


def test_the_suite(tmp_path, here):
    run_main('train', *RUN, '--causal_ratio=0.5', f'--out_dir={tmp_path}')
    words = ['--suite=sudoku', f'--out_dir={tmp_path}', '--num_samples=5', '--num_seeds=2', '--device=cpu']
    save = str(tmp_path / 'table.json')
    out = run_main('bench', *words, f'--json={save}', '--only=causal,most probable,margin,repair')
    with open(save, encoding='utf-8') as file:
        rows = json.load(file)['rows']
    names = {row['name'] for row in rows}
    assert len(names) == 8 and 'causal: left to right' in names and all(name in out for name in names)
    mean = 36 - sum(sum(map(bool, task.parse(text)[1])) for text in task.starts(held_out_of('tiny'), 5)) / 5
    for row in rows:
        assert 0 <= row['cells'] <= 1 and 0 <= row.get('correct', row.get('exact')) <= 1
        if row.get('cells_a_pass') == 1:
            assert abs(row['nfe'] - mean) < 1e-6
    assert out.count('8 cells a pass') == 1 and '5 held-out puzzles, 2 draws each' in out
    with pytest.raises(UserError, match="no row's name contains 'nothing'"):
        run_main('bench', *words, '--only=nothing')
    write_checkpoint(str(tmp_path / 'arithmetic.pt'))
    with pytest.raises(UserError, match='needs a checkpoint trained on sudoku, this one saw arithmetic'):
        run_main('bench', *words, f"--init_from={tmp_path / 'arithmetic.pt'}")


@torch.no_grad()
def test_solving_and_repairing_as_a_perfect_network_would(boards, monkeypatch):
    """What is right is counted as right, whatever the number of cells a pass."""
    N, meta, data = boards
    clean, passes = data['val'], torch.ones(8, dtype=torch.long)
    free = modelled(clean, meta)[0]
    half = clean.clone()
    half[:4][free[:4]] = (half[:4][free[:4]] + 1) % N
    row = suite.worth(clean, free, [(clean, passes), (half, 3 * passes)])
    wrong = free[:4].sum() / 2 / free.sum()
    assert row['correct'] == 0.75 and row['nfe'] == 2 and abs(row['cells'] - 1 + wrong) < 1e-6
    model, s = tiny_gpt(meta['vocab_size'], N * N + N), SimpleNamespace(batch_size=3)
    for each in (1, 4):
        ids, passes = suite.solve(s, model, meta, clean, dict(remask='none'), each, 0)
        assert torch.equal(ids[~free], clean[~free]) and (ids[free] < N).all()
        assert torch.equal(passes, -(-free.sum(1) // each))
    ids, passes = suite.solve(s, model, meta, clean, None, 1, 0)
    assert torch.equal(passes, free.sum(1))
    assert torch.equal(ids[~free], clean[~free]) and (ids[free] < N).all()


def test_a_causal_baseline_trains_without_samples(tmp_path, here):
    out = run_main('train', *RUN, '--training_type=causal', f'--out_dir={tmp_path}')
    assert 'causal NLL' in out and 'puzzles are solved' not in out


def test_a_prompt_is_refused_before_training(tmp_path, here):
    with pytest.raises(UserError, match='sudoku starts from what is given: it takes no sample_prompt'):
        run_main('train', *RUN, '--sample_prompt=1', f'--out_dir={tmp_path}')


def test_starts_are_spread_over_the_held_out_rows(boards):
    N, meta, data = boards
    held_out = [decode(meta, row)[0] for row in data['val'].tolist()]
    for num, expected in ((1, [0]), (4, [0, 2, 4, 6]), (8, range(8)), (11, [*range(8), 0, 1, 2])):
        texts = task.starts(data['val'], num)
        assert [task.parse(text)[1] for text in texts] == [task.parse(held_out[i])[1] for i in expected]
        assert all(set(text) & set('123456789') == set() and '_' in text for text in texts)
