"""The suite of stages: runs equal but for what they ask about, legs that make a whole run, tables by hand."""

import json
import os
from dataclasses import fields

import pytest
from conftest import load_script
from test_commands import bench_settings
from test_text import META, plant

import configurator
import train
from configurator import UserError
from model import GPT, GPTConfig
from plumbing.text import load_task
from suites import runs, stages

STAGE_SETTINGS = {'parts', 'k1_credit'}


def parts_of(config):
    """The parts of a network and what else the stages turn on: a set like {'level', 'credit'}."""
    parts = {part.partition(':')[0] for part in config['parts'].split(',') if part}
    return parts | ({'credit'} if config['k1_credit'] else set())


@pytest.fixture
def s(tmp_path):
    return bench_settings('--suite=stages', f'--out_dir={tmp_path}/out', '--num_samples=4', '--steps=2',
                          '--num_seeds=1')


# -----------------------------------------------------------------------------
# what is trained


def test_a_name_picks_one_run(s):
    """With --only: commas would split it, and it must not be part of another name."""
    s.num_seeds = 3
    table, asked = stages.runs_of(s)
    names = [name for name, *_ in asked]
    assert len(set(names)) == len(names) == 2 * 3 * len(stages.VARIANTS) and set(names) <= set(table)
    assert len(table) == len(names) + 2 * 3 * 3 * len(stages.LEGS)             # the first three legs
    for name in table:
        assert ',' not in name and 'cost' not in name
        assert [other for other in table if name in other] == [name]
    s.only = 'text: staged seed 2'
    assert [one[0] for one in stages.wanted(s, asked)] == [s.only]
    assert len({runs.folder_of(s, table, name) for name in table}) == len(table)


def test_variants_differ_in_nothing_but_their_settings(s):
    """Every word is a setting of train.py with a value that it takes, and the networks are of one size."""
    for data, recipe in stages.RECIPES.items():
        configs = {variant: stages.config_of([*recipe, *words]) for variant, words in stages.VARIANTS.items()}
        # as the command line would read them
        words = [*recipe[1:], *stages.VARIANTS['staged']]
        assert configs['staged'] == configurator.configure(vars(load_script('train')), words)
        first, sizes = configs['stage 0'], {}
        for variant, config in configs.items():
            changed = {name for name in config if config[name] != first[name]}
            assert changed <= STAGE_SETTINGS and (changed or variant == 'stage 0'), variant
            known = {field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}
            sizes[variant] = GPT(GPTConfig(**known)).num_params()
            assert sizes[variant] == pytest.approx(sizes['stage 0'], rel=0.02), (data, variant)
        on = {variant: parts_of(config) for variant, config in configs.items()}
        assert on['stage 0'] == set() and first['eval_samples'] == 0
        assert on['stage 1 noise level'] == {'level'} and on['stage 2 and credit'] == {'level', 'credit'}
        assert on['stage 3 and graph'] == on['stage 2 and credit'] | {'graph'}
        everything = {'level', 'credit', 'graph', 'mu'}
        assert on['all at once'] == on['all at once in legs'] == on['staged'] == everything
        alone = [on[f'{part} alone'] for part in ('credit', 'graph', 'blocks')]
        assert alone == [{'credit'}, {'graph'}, {'mu'}]
        assert sizes['stage 0'] < sizes['stage 1 noise level'] and sizes['stage 0'] < sizes['blocks alone']


def test_the_seeds_of_a_variant_differ_in_the_seed_only(s):
    s.num_seeds = 2
    table, asked = stages.runs_of(s)
    for name, data, run, how in asked:
        variant, k, legs = how['variant'], how['seed'], how['legs']
        config, other = (stages.config_of(table[f'{data}: {variant} seed {number}']) for number in (0, 1))
        assert run == name == f'{data}: {variant} seed {k}'
        assert {setting for setting in config if config[setting] != other[setting]} == \
            {'seed'} | ({'init_from'} if variant in stages.LEGS else set())
        if variant not in stages.LEGS:
            assert stages.config_of(table[name])['seed'] == s.seed + k and legs == [name]


@pytest.mark.parametrize('data', stages.RECIPES)
def test_the_legs_of_staged_make_one_run(s, data):
    s.num_seeds = 2
    table, _ = stages.runs_of(s)
    legs = stages.legs_of(s, data, 'staged', 1)
    assert len(legs) == 4 and list(legs)[-1] == f'{data}: staged seed 1'
    assert all(table[name] == legs[name] for name in legs)
    whole = stages.config_of(table[f'{data}: all at once seed 1'])
    configs = [stages.config_of(words) for words in legs.values()]
    steps = dict(arithmetic=1000, text=2000)[data]
    assert sum(config['max_iters'] for config in configs) == whole['max_iters'] == steps
    origins = [f'{{{name}}}' for name in list(legs)[:-1]]
    assert [config['init_from'] for config in configs] == ['scratch', *origins]
    assert [parts_of(config) for config in configs] == [
        {'mu'}, {'mu', 'level'}, {'mu', 'level', 'credit'}, {'mu', 'level', 'credit', 'graph'}]
    # no leg sees the rows of the one before it again
    assert len({config['seed'] for config in configs}) == 4
    # what is left to differ from all at once: how the rate goes, and the curricula that are over
    for config in configs:
        assert {name for name in config if config[name] != whole[name]} <= STAGE_SETTINGS | {
            'max_iters', 'init_from', 'seed', 'decay_share', 'warmup_iters', 'proofreading_warmup_iters',
            'masking_warmup_iters'}
    assert {name for name in whole if configs[3][name] != whole[name]}.isdisjoint(STAGE_SETTINGS)
    schedule = ('lr_schedule', 'max_iters', 'warmup_iters', 'decay_share')
    rates = [train.lr_scale(step, *[config[name] for name in schedule])
             for config in configs for step in range(config['max_iters'])]
    assert configs[0]['warmup_iters'] == whole['warmup_iters'] and rates[whole['warmup_iters']] == 1
    kept, last = 3 * configs[0]['max_iters'], configs[3]['max_iters']
    assert all(rates[number * last + 10] == rates[(number + 1) * last - 1] == 1 for number in (1, 2))
    assert rates[last - 1] == 1 and rates[-1] < 0.01
    assert rates[kept + 20:] == sorted(rates[kept + 20:], reverse=True)
    # the decay starts with the last leg, because that of the others would be longer than it
    assert whole['decay_share'] * whole['max_iters'] > last
    assert rates[kept + last // 2] == pytest.approx(0.5, abs=0.01)
    assert [train.curricula(0, config)['penalty_mask_correct'] for config in configs] == [0, 1, 1, 1]


def test_train_args_leave_the_seeds_alone(s):
    for word in ('--seed=3', '--init_from=ckpt.pt', '--parts=level:32'):
        s.train_args = f'--max_iters=3 {word}'
        with pytest.raises(UserError, match=f'leave out {word}'):
            stages.run(s)
    s.train_args = '--max_iter=3'
    with pytest.raises(UserError, match='train_args expects'):
        stages.run(s)

# -----------------------------------------------------------------------------
# the tables


def made_up(data, variant, seed, nelbo, **more):
    return dict(name=f'{data}: {variant} seed {seed}', table=data, variant=variant, seed=seed, nelbo=nelbo,
                nelbo_se=9.0, parameters=1234, tokens_per_second=1000.0,
                **{'minutes': 2.0, 'causal_nll': None, 'samples': {}, **more})


def cells(table, variant):
    line, = [line for line in table.splitlines() if line.startswith(f'| {variant} ')]
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_means_errors_and_paired_differences():
    """Errors are those over seeds, never those of a row; a difference is of the seeds that both have."""
    rows = [made_up('text', 'stage 0', k, nelbo) for k, nelbo in enumerate((1.0, 2.0, 6.0))]
    rows += [made_up('text', 'graph alone', 2, 5.5), made_up('text', 'graph alone', 0, 1.1)]   # no seed 1
    rows += [made_up('text', 'credit alone', k, nelbo, minutes=float(k))
             for k, nelbo in ((0, 1.1), (1, 2.3), (2, 6.2))]
    rows += [made_up('text', 'blocks alone', k, nelbo) for k, nelbo in ((7, 3.0), (1, 4.0))]
    rows.append(made_up('text', 'all at once', 1, 2.5))
    table = stages.tables(rows)
    assert '\n\n' not in table and len(table.splitlines()) == 2 + 5
    # the standard deviation of 1, 2, 6 is sqrt(7)
    assert cells(table, 'stage 0') == ['stage 0', '3', '3.000 ± 1.528', '—', '—', '2.0', '1,000', '1,234']
    # 0.1, 0.3, 0.2: mean 0.2, standard deviation 0.1, over sqrt(3)
    assert cells(table, 'credit alone')[1:6] == ['3', '3.200 ± 1.539', '0.200 ± 0.058', '—', '1.0']
    # 0.1 and -0.5: mean -0.2, standard deviation 0.6 / sqrt(2), over sqrt(2)
    assert cells(table, 'graph alone')[1:4] == ['2', '3.300 ± 2.200', '-0.200 ± 0.300']
    assert cells(table, 'all at once')[1:4] == ['1', '2.500', '0.500']         # one seed: no error
    # seed 7 has no partner
    assert cells(table, 'blocks alone')[1:4] == ['2', '3.500 ± 0.500', '2.000 (n=1)']
    assert cells(stages.tables(rows[3:]), 'graph alone')[3] == '—'             # no stage 0 at all
    assert stages.tables([]) == ''


def test_a_table_for_each_dataset_and_samples_of_arithmetic():
    def scores(valid):
        return dict(valid=valid, correct=0.5, length_tv=0.1, unique=1.0, nfe=12.0)
    rows = [made_up('arithmetic', 'staged', k, 1.0, causal_nll=0.5 + k, samples={
                'best rules': scores(0.9 + 0.02 * k), 'remask=wrong': scores(0.5)}) for k in (0, 1)]
    arithmetic, text = stages.tables([*rows, made_up('text', 'staged', 0, 3.0)]).split('\n\n')
    assert [len(table.splitlines()) for table in (arithmetic, text)] == [3, 3] and 'samples' not in text
    head = cells(arithmetic, 'arithmetic')
    metrics = 'valid % · correct % · length_tv · unique % · nfe'
    assert head[5:7] == [f'best rules: {metrics}', f'remask=wrong: {metrics}']
    line = cells(arithmetic, 'staged')
    assert len(line) == len(head) and line[4] == '1.000 ± 0.500'
    assert line[5] == '91.0 ± 1.0 · 50.0 ± 0.0 · 0.100 ± 0.000 · 100.0 ± 0.0 · 12.0 ± 0.0'
    assert line[6].startswith('50.0 ± 0.0')

# -----------------------------------------------------------------------------
# the suite


@pytest.fixture
def trained_here(run, monkeypatch):
    """The training commands that were run, all in this process."""
    commands = []

    def execute(command, log, mode):
        commands.append(command)
        status, out, err = run(command[0].removesuffix('.py'), *command[1:])
        with open(log, mode) as file:
            file.write(out + err)
        return status
    monkeypatch.setattr(runs, 'execute', execute)
    return commands


TINY = '--n_layer=1 --n_embd=32 --n_head=1 --eval_rows=20 --device=cpu --dtype=float32'


def test_arithmetic_from_training_to_the_table(s, trained_here, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, 'training_strings', lambda s, meta: (load_task('arithmetic'), set()))
    monkeypatch.setattr(stages, 'DRAWS', 1)
    s.train_args = f'{TINY} --max_iters=4 --batch_size=8 --n_recur=1'
    s.only = 'arithmetic: stage 0,arithmetic: staged'
    rows, table = stages.run(s)
    assert [(row['name'], row['seed']) for row in rows] == [
        ('arithmetic: stage 0 seed 0', 0), ('arithmetic: staged seed 0', 0)]
    assert [[word for word in command if word.startswith('--parts')] for command in trained_here] == [
        [], ['--parts=mu:16'], *[['--parts=level:32,mu:16']] * 2, ['--parts=level:32,graph:8,mu:16']]
    table_of_runs, legs = stages.runs_of(s)[0], stages.legs_of(s, 'arithmetic', 'staged', 0)
    paths = [runs.trained(s, table_of_runs, name) for name in legs]
    for before, command in zip(paths, trained_here[2:]):
        assert f'--init_from={os.path.abspath(before)}' in command
    legs = [GPT.load(path)[1] for path in paths]
    assert ['graph' in parts_of(leg['config']) for leg in legs] == [False, False, False, True]
    plain, staged = rows
    seconds = sum(leg['seconds'] for leg in legs)
    assert staged['parameters'] > plain['parameters'] and staged['minutes'] == pytest.approx(seconds / 60)
    assert staged['tokens_per_second'] == pytest.approx(4 * 4 * 8 * 64 / seconds)
    for row in rows:
        assert 0 < row['nelbo'] < 20 and 0 < row['causal_nll'] < 20
        assert set(row['samples']) == set(stages.SAMPLERS)
        assert all(set(found) == set(stages.SAMPLED) for found in row['samples'].values())
        assert row['samples']['remask=wrong']['nfe'] <= s.steps
    assert (tmp_path / 'out/stages/table.md').read_text() == table + '\n' and len(table.splitlines()) == 4
    # a row is one seed, however many there are
    s.num_seeds = 2
    s.only = 'arithmetic: stage 0 seed 0,arithmetic: staged seed 0'
    # nothing is trained or measured again
    assert stages.run(s) == (rows, table) and len(trained_here) == 5
    assert len((tmp_path / 'out/stages/rows.jsonl').read_text().splitlines()) == 2
    s.out_dir, cache = str(tmp_path / 'other'), (tmp_path / 'out/stages/rows.jsonl').read_text()
    os.makedirs(tmp_path / 'other/stages')
    (tmp_path / 'other/stages/rows.jsonl').write_text(cache)                   # brought from another machine
    assert stages.run(s) == (rows, table) and len(trained_here) == 5


def test_text_has_its_bound_and_no_samples(s, trained_here, monkeypatch, tmp_path):
    ids = [0, 1, 2, 3] * 125
    plant(tmp_path, monkeypatch, META, ids)
    s.train_args = f'{TINY} --dataset=words --block_size=12 --batch_size=8 --max_iters=4'
    s.only = 'text: blocks alone seed 0'
    row, = stages.run(s)[0]
    assert row['causal_nll'] is None and row['samples'] == {} and 0 < row['nelbo'] < 10
    assert len(trained_here) == 1
    json.dumps(row)


def test_cost_is_measured_only_when_asked_for(s, trained_here, monkeypatch, tmp_path):
    plant(tmp_path, monkeypatch, META, [0, 1, 2, 3] * 125)
    monkeypatch.setattr(stages, 'RECIPES', dict(text=stages.TEXT))
    s.train_args = f'{TINY} --dataset=words --block_size=12 --batch_size=8'
    s.only = 'cost'
    rows, table = stages.run(s)
    assert ([row['name'] for row in rows] == [name for name in stages.VARIANTS if name not in stages.LEGS]
            and not trained_here)
    assert all(row['ratio'] == pytest.approx(rows[0]['seconds'] / row['seconds']) for row in rows)
    assert all(row['n'] == 2 for row in rows)
    assert len(table.splitlines()) == 2 + len(rows)
