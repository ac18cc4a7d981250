"""The suite of the universal denoiser: what it trains and measures, and what its samplers and scores mean."""

import json
import os

import pytest
import torch
from conftest import ARITHMETIC, default_config, seeded, tiny_gpt, write_checkpoint
from test_commands import bench_settings

from configurator import UserError
from data import loader
from parts.presets import choose_rules
from plumbing.text import encode, load_task, start_canvas
from suites import runs, universal

BOS, EOS, PAD, MASK = 15, 16, 17, 18
WRITTEN = {'tools/energy.py': 'energy/ckpt_energy.pt', 'tools/distill.py': 'distilled/ckpt_distilled.pt'}


@pytest.fixture
def s(tmp_path, monkeypatch):
    """bench's settings for something small; no training string is known, because reading them takes long."""
    strings = load_task('arithmetic'), set()
    monkeypatch.setattr(universal, 'training_strings', lambda s, meta: strings)
    return bench_settings('--suite=universal', f'--out_dir={tmp_path}', '--num_samples=3', '--num_seeds=1',
                          '--eval_rows=6')


@pytest.fixture
def trainings(monkeypatch):
    """The commands that would have been run. Each writes a tiny network, done after how['max_iters']."""
    # write_checkpoint says that 7 steps are done
    how, commands = dict(max_iters=7, status=0, text='first\nlast\n'), []

    def execute(command, log, mode):
        commands.append(command)
        with open(log, mode) as file:
            file.write(how['text'])
        script = command[0]
        folder = next(word for word in command if word.startswith('--out_dir=')).partition('=')[2]
        if how['status'] == 0:
            parts = ','.join(word.partition('=')[2] for word in command if word.startswith('--parts='))
            path = os.path.join(folder, WRITTEN.get(script, 'ckpt_denoising.pt'))
            network = tiny_gpt(18, 64, n_recur=1, energy_head=script == 'tools/energy.py', parts=parts)
            write_checkpoint(path, network, training_type='denoising', remask_target='original',
                             causal_ratio=0.3, max_iters=how['max_iters'])
            if script == 'tools/energy.py':
                checkpoint = torch.load(path)
                torch.save({**checkpoint, 'config': {**checkpoint['config'], 'energy_head': True}}, path)
        return how['status']
    monkeypatch.setattr(runs, 'execute', execute)
    return how, commands

# -----------------------------------------------------------------------------
# training


def test_a_finished_run_is_not_trained_again_and_an_interrupted_one_goes_on(s, trainings):
    how, commands = trainings
    how['max_iters'] = 9
    message = 'base: training stopped before its end, see .*train.txt: first . last'
    with pytest.raises(UserError, match=message):
        runs.trained(s, universal.RUNS, 'base')
    folder = runs.folder_of(s, universal.RUNS, 'base')
    assert commands == [['train.py', 'config/denoise.py', f'--out_dir={folder}']]
    how['max_iters'] = 7
    path = runs.trained(s, universal.RUNS, 'base')
    assert path == os.path.join(folder, 'ckpt_denoising.pt')
    assert commands[1] == commands[0] + ['--init_from=resume']
    assert open(os.path.join(folder, 'train.txt')).read() == 'first\nlast\n' * 2
    assert runs.trained(s, universal.RUNS, 'base') == path and len(commands) == 2
    # of --keep_every
    write_checkpoint(os.path.join(folder, 'ckpt_denoising_5.pt'), training_type='denoising', max_iters=9)
    assert runs.trained(s, universal.RUNS, 'base') == path and len(commands) == 2


def test_other_arguments_are_another_run(s, trainings):
    """train_args, the arguments, what a config file says, and the run that it starts from; not a comment."""
    _, commands = trainings
    first = runs.trained(s, universal.RUNS, 'energy')
    assert [command[0] for command in commands] == ['train.py', 'tools/energy.py']
    assert commands[1][1] == f"--init_from={runs.trained(s, universal.RUNS, 'ours')}" and len(commands) == 2
    s.train_args = '--max_iters=20 --eval_samples=0'
    assert runs.trained(s, universal.RUNS, 'energy') != first
    # it has none
    assert commands[2][-3:-1] == ['--max_iters=20', '--eval_samples=0']
    assert '--eval_samples=0' not in commands[3]
    assert '--max_iters=20' in commands[3] and len(commands) == 4
    # it cannot resume: from the start
    os.remove(runs.trained(s, universal.RUNS, 'energy'))
    runs.trained(s, universal.RUNS, 'energy')
    assert commands[4] == commands[3]
    folders = {runs.folder_of(s, universal.RUNS, name) for name in universal.RUNS}
    assert len(folders) == len(universal.RUNS)
    for wrong in ('--max_iter=3', '--max_iters 3'):
        s.train_args = wrong
        with pytest.raises(UserError, match='train_args expects'):
            runs.check_train_args(s, universal.RUNS)


def test_a_comment_in_a_config_file_is_no_other_run(s, monkeypatch, tmp_path):
    path = tmp_path / 'some.py'
    monkeypatch.setitem(universal.RUNS, 'mine', ['train.py', str(path)])
    folders = []
    for text in ('seed = 1', 'seed = 1   # why not', 'seed = 2'):
        path.write_text(text + '\n')
        folders.append(runs.folder_of(s, universal.RUNS, 'mine'))
    assert folders[0] == folders[1] != folders[2]


def test_a_training_that_fails_is_tried_once_and_the_other_rows_are_measured(s, trainings, capsys):
    how, commands = trainings
    # this is there, and so is base
    runs.trained(s, universal.RUNS, 'student')
    assert len(commands) == 2
    how.update(status=1, text='a\n' * 9 + 'out of luck\n')
    s.only = 'ancestral 4,K=1'
    message = r'3 of 5 rows .*/table.md. K=1: .* K=1: training failed, see .*: a \| a .* out of luck'
    with pytest.raises(UserError, match=message):
        universal.run(s)
    assert [command[2] for command in commands[2:]] == ['--n_recur=1']
    out = capsys.readouterr().out
    assert '| base: ancestral 4' in out and '| student: ancestral 4' in out and '| K=1' not in out
    s.only = 'nothing'
    with pytest.raises(UserError, match="no row's name contains 'nothing'"):
        universal.run(s)

# -----------------------------------------------------------------------------
# rows


def test_a_row_is_measured_once(s, trainings, monkeypatch, tmp_path):
    """Unless its line in the cache is damaged, or it asks for something else; a torn line spoils no other."""
    drawn, fill = [], universal.fill
    monkeypatch.setattr(universal, 'fill',
                        lambda *args, **more: drawn.append(more['steps']) or fill(*args, **more))
    s.only = 'base: ancestral 4,base: ancestral 8,student: ancestral 4'
    rows, table = universal.run(s)
    assert ([row['name'] for row in rows] == [f'{name}: ancestral {n}' for name, n in (
                ('base', 4), ('student', 4), ('base', 8))]
            and drawn == [4, 4, 8])
    assert universal.run(s) == (rows, table) and drawn == [4, 4, 8]
    cache = tmp_path / 'universal' / 'rows.jsonl'
    lines = cache.read_text().splitlines()
    assert len(lines) == 3 and (tmp_path / 'universal' / 'table.md').read_text() == table + '\n'
    # torn where a crash would tear it
    cache.write_text('\n'.join([lines[0], lines[1][:-9], '[]', '', lines[2][:40]]))
    again, _ = universal.run(s)
    assert drawn == [4, 4, 8, 4, 8]
    # the same seed, the same samples
    assert [{**row, 'seconds': 0} for row in again] == [{**row, 'seconds': 0} for row in rows]
    universal.run(s)
    assert len(drawn) == 5
    s.num_samples = 2
    assert {row['n'] for row in universal.run(s)[0]} == {2} and len(drawn) == 8


def test_the_tables_can_be_measured(s):
    """No two rows share a name, every run is known, and every row asks for what the samplers have."""
    rows = universal.ROWS
    names = [name for name, *_ in rows]
    # or --only could not name it
    assert len(set(names)) == len(names) and not any(',' in name for name in names)
    for name, table, run, how in rows:
        assert table in universal.MEASURES
        assert run in universal.RUNS and how.get('then', ['base'])[0] in universal.RUNS, name
        how = {key: value for key, value in how.items() if key not in ('anchor', 'then', 'shown_as')}
        config = default_config(training_type='denoising', remask_target='original', causal_ratio=0.3)
        choose_rules({**config, 'energy_head': True}, **how)
    assert {run for _, _, run, _ in rows} >= set(universal.RUNS) - {'skeleton'}


def test_every_kind_of_row(s, trainings):
    s.only = ('noise conditioning: maskgit,skeleton,energy: guided,energy: best of 5,critic,'
              'energy: detection,base: repair,base: anchor,'
              'priority,hybrid-aware: AR warm start of 5,corrector,ours: AR,self-conditioning: maskgit')
    rows, text = universal.run(s)
    assert [row['table'] for row in rows] == ['generation'] * (len(rows) - 4) + ['repair'] + ['detection'] * 3
    names = {row['name'].split(':')[0] for row in rows}
    assert names >= {'noise conditioning', 'skeleton alone', 'skeleton then digits', 'energy'}
    for row in rows[:-4]:
        assert row['n'] == 3 and 0 < row['nfe'] <= 200 and 0 <= row['valid'] <= 1, row['name']
    found = {row['name']: row for row in rows}
    repair = found['base: repair and edit']
    assert repair['edit']['anchors'] == 1 and len(repair['repair']) == 8
    assert all(repair[name] is not None for name in ('nelbo', 'causal_nll', 'auc'))
    kinds = ['corrupted', 'own samples, invalid', 'own samples, wrong value']
    assert [row['against'] for row in rows[-3:]] == kinds
    assert rows[-3]['contains a mask'] >= 0.5 and all(0 <= rows[-2][score] <= 1 for score in universal.SCORES)
    json.dumps(rows)
    generation, repaired, detected = text.split('\n\n')
    assert generation.splitlines()[2].startswith('| the grammar itself')
    assert len(repaired.splitlines()) == 2 + 2 + 1
    assert len(generation.splitlines()) == 2 + 1 + len(rows) - 4 and len(detected.splitlines()) == 2 + 3

# -----------------------------------------------------------------------------
# samplers and scores


def test_digits_are_written_anew_and_the_skeleton_stays():
    model = tiny_gpt(18, 64, n_recur=1)
    old = [dict(tokens=[BOS, *encode(ARITHMETIC, text), EOS], text=text, nfe=n)
           for text, n in (('(+00)=00', 5), ('()', 3))]
    new = universal.write_digits(model, ARITHMETIC, old, steps=3, seed=1)
    assert new[1] == dict(old[1], finished=True) and 5 < new[0]['nfe'] <= 8
    assert len(new[0]['tokens']) == 10
    assert all(a == b for a, b in zip(old[0]['tokens'], new[0]['tokens']) if a != 0)
    assert new[0]['tokens'] != old[0]['tokens']


def test_anchors_are_where_the_training_strings_have_them():
    model, rows = tiny_gpt(18, 64, n_recur=1), loader.load_data('arithmetic')[1]['train'][:40]
    equals, = encode(ARITHMETIC, '=')
    places = set((rows == equals).nonzero()[:, 1].tolist())
    canvas, fixed = universal.seed_anchors(*start_canvas(model, ARITHMETIC, 500), equals, rows, seeded())
    assert set((canvas == equals).nonzero()[:, 1].tolist()) == places
    assert ((canvas == equals).sum(1) == 1).all()
    assert torch.equal(fixed, (canvas == equals) | (canvas == BOS)) and (canvas[~fixed] == MASK).all()


class Knows:
    """A network that is sure of one row, whatever is on the canvas; its energy counts the differences."""

    def __init__(self, row):
        self.row, self.mask_token_id, self.critic = row, MASK, True
        self.most_logits, self.wte = 100, torch.nn.Embedding(1, 1)

    def parameters(self):
        return iter([self.row])

    def __call__(self, ids, causal=False, only=None):
        rows = self.row.expand_as(ids)
        return torch.nn.functional.one_hot(rows if only is None else rows.flatten()[only], 20).float()

    def logits(self, hidden, real_only=False):
        return 4 * hidden

    def energy(self, ids, real):
        return ((ids != self.row) & real).sum(1).float()


def test_every_score_tells_a_bad_text_from_a_good_one(monkeypatch):
    monkeypatch.setattr(universal, 'energy', lambda model, *text: model.energy(*text))
    row = torch.tensor([BOS, *encode(ARITHMETIC, '(+12)=3'), EOS] + [PAD] * 3)
    bad = row.clone()
    bad[[2, 5]] = torch.tensor([0, MASK])
    wrong = row.clone()
    wrong[[2, 5]] = torch.tensor([0, 1])
    found = universal.suspicion(Knows(row), ARITHMETIC, torch.stack((row, bad, wrong)), batch_size=2)
    assert list(found) == list(universal.SCORES)
    for name, score in found.items():
        assert score.shape == (3,) and score[1] > score[0], name
        same = name == 'max p(WRONG)' and score[2] == score[1]
        assert (score[2] > score[1] or same) == ('a mask' not in name), name
    # the mask is filled first, and rightly
    assert found['energy'].tolist() == [0, 1, 2]
    likely = torch.tensor([4.0] + [0.0] * 19).log_softmax(0)
    assert found['leave-one-out'][1] == pytest.approx(-(6 * likely[0] + likely[1]).item() / 7)
    assert found['causal NLL'][1] == pytest.approx(-(7 * likely[0] + likely[1]).item() / 8)
    few = universal.suspicion(Knows(row), ARITHMETIC, row.expand(9, -1), causal=False, batch_size=2, most=3)
    assert len(few['leave-one-out']) == 3 and len(few['energy']) == 9 and few['causal NLL'] is None


def test_auc_and_its_error():
    low, high = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert universal.auc_of(high, low) == (1.0, 0.0) and universal.auc_of(low, high)[0] == 0.0
    normal = [torch.randn(400, generator=seeded(number)) for number in (1, 2)]
    auc, error = universal.auc_of(*normal)
    # Mann and Whitney's
    assert abs(auc - 0.5) < 0.07 and error == pytest.approx((801 / (12 * 400 * 400)) ** 0.5, rel=0.02)


def test_noise_spares_no_row():
    clean = loader.spread_rows(loader.load_data('arithmetic')[1]['val'], 50, 64)
    noisy = universal.corrupted(tiny_gpt(18, 64, n_recur=1), ARITHMETIC, clean, 1)
    assert len(noisy) <= 50 and not any((row == clean).all(1).any() for row in noisy)
    assert (noisy == MASK).any()


def test_a_command_writes_its_log_and_is_stopped_with_us(tmp_path, monkeypatch):
    log = str(tmp_path / 'log.txt')
    assert runs.execute(['-c', 'import sys; print(1); sys.exit(3)'], log, 'w') == 3
    wait, waits = runs.subprocess.Popen.wait, []

    def interrupted(child, timeout=None):
        waits.append(child)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return wait(child, timeout)
    monkeypatch.setattr(runs.subprocess.Popen, 'wait', interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.execute(['-c', 'import time; time.sleep(60)'], log, 'a')
    assert waits[0].returncode < 0 and open(log).read() == '1\n'
