"""
The commands as a user types them: what works end to end, and that a mistake is one line and leaves no trace.
"""

import glob
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ARITHMETIC, ROOT, default_config, load_script, tiny_gpt, write_checkpoint

import configurator
import train
from data import loader
from model import GPT, GPTConfig
from plumbing.checks import check_fits, check_sizes
from suites import arithmetic, checkpoints
from suites.common import standard_error

TINY = [
    '--n_layer=1',
    '--n_head=2',
    '--n_embd=16',
    '--n_recur=1',
    '--batch_size=4',
    '--max_iters=4',
    '--eval_interval=4',
    '--eval_rows=16',
    '--eval_samples=0',
    '--log_interval=2',
    '--device=cpu',
    '--dtype=float32',
]
CPU = ['--device=cpu', '--dtype=float32']
STREAM = dict(
    ARITHMETIC,
    name='text',
    format='stream',
    block_size=None,
    vocab_size=3,
    itos=['a', 'b', '\n'],
    bos=None,
    eos=None,
    pad=None,
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """
    A joint checkpoint with a causal mode, made by a process of its own: (its folder, the path, what was
    printed).
    """
    out = tmp_path_factory.mktemp('trained')
    command = [
        sys.executable,
        'train.py',
        *TINY,
        '--training_type=joint',
        '--causal_ratio=0.5',
        f'--out_dir={out}',
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return str(out), str(out / 'ckpt_joint_all_positions.pt'), run.stdout


def refused(result, script, *words):
    """The run ended in one line on stderr, which names the script and says all of these words."""
    status, _, err = result
    assert status not in (0, None), 'it went through'
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f'{script}.py: '), err
    for word in words:
        assert str(word) in lines[0], f'{word} is not in: {lines[0]}'


# -----------------------------------------------------------------------------
# what works


def test_training_prints_where_it_stands(trained):
    out, path, text = trained
    curves = ['curves.png'] if importlib.util.find_spec('matplotlib') else []
    assert sorted(os.listdir(out)) == [os.path.basename(path), *curves, 'log.jsonl']
    for words in (
        'override: n_embd = 16',
        'step 4/4',
        'step 4  validation: NELBO',
        'causal NLL',
        'AUC',
        f'saved {path}',
        f'python sample.py --init_from={path}',
    ):
        assert words in text, text


def read_samples(path):
    return [json.loads(line) for line in open(path, encoding='utf-8')]


@pytest.mark.parametrize(
    'words',
    [
        [],
        ['--prompt=(+'],
        ['--commit=confidence', '--steps=8', '--schedule=cosine'],
        ['--remask=wrong', '--length=9'],
        ['--remask=random', '--remask_rate=0.1', '--steps=12', '--top_k=5'],
        ['--ar_prefix=8', '--steps=6', '--top_p=0.9'],
        ['--remask=none', '--block_length=1', '--temperature=0.5', '--length=62'],
    ],
    ids=' '.join,
)
def test_sampling(run, trained, tmp_path, words):
    files = [tmp_path / name for name in ('a.jsonl', 'b.jsonl', 'c.jsonl')]
    for path, seed in zip(files, (5, 5, 6)):
        status, out, err = run(
            'sample',
            '--init_from=ckpt',
            f'--out_dir={trained[0]}',
            '--num_samples=3',
            *CPU,
            *words,
            f'--save={path}',
            f'--seed={seed}',
        )
        assert status == 0, err
    assert f'{trained[1]}: joint on arithmetic, iteration 4' in out and '3 samples' in out
    assert f'written to {path}' in out
    assert out.count('✗') + out.count('✓') == 3
    samples = read_samples(files[0])
    assert len(samples) == 3 and all(sorted(s) == ['finished', 'nfe', 'text', 'tokens'] for s in samples)
    for s in samples:
        assert 0 <= min(s['tokens']) and max(s['tokens']) < 18 and s['tokens'][0] == 15 and s['nfe'] > 0
        assert s['finished'] == (16 in s['tokens'])
        if '--prompt=(+' in words:
            assert s['text'].startswith('(+')
    if '--length=9' in words:
        assert all(s['finished'] and len(s['tokens']) <= 11 for s in samples)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert sorted(os.listdir(tmp_path)) == ['a.jsonl', 'b.jsonl', 'c.jsonl']


def test_sampling_with_a_second_checkpoint_that_judges(run, tmp_path):
    writer = write_checkpoint(tmp_path / 'w' / 'ckpt_unmasking.pt', training_type='unmasking')
    judge = write_checkpoint(
        tmp_path / 'j' / 'ckpt_r.pt', tiny_gpt(18, 64, seed=1, n_recur=1), training_type='remasking'
    )
    status, out, err = run(
        'sample', f'--init_from={writer}', f'--remask_from={judge}', '--num_samples=2', '--steps=5', *CPU
    )
    assert status == 0, err
    assert 'remask=wrong' in out and '9.0 passes each' in out  # 5 of the writer, 4 of the judge


def test_sampling_ar(run, tmp_path):
    path = write_checkpoint(tmp_path / 'a' / 'ckpt_causal.pt', training_type='causal')
    status, out, err = run(
        'sample', f'--init_from={path}', '--num_samples=2', f'--save={tmp_path}/s.jsonl', *CPU
    )
    assert status == 0, err
    assert all(s['nfe'] == len(s['tokens']) - 1 for s in read_samples(tmp_path / 's.jsonl'))


def test_sampling_from_a_checkpoint_that_abstains(run, tmp_path):
    path = write_checkpoint(
        tmp_path / 'a' / 'ckpt_unmasking.pt', training_type='unmasking', allow_abstain=True
    )
    status, out, err = run(
        'sample', f'--init_from={path}', '--num_samples=2', '--commit=abstain', '--steps=5', *CPU
    )
    assert status == 0 and 'commit=abstain, remask=none' in out and '2 samples' in out, err


def test_sampling_from_merged_checkpoints(run, tmp_path):
    """
    What is drawn from is the merged network: each share another one, and one that either could be used for.
    """
    networks = [tiny_gpt(18, 64, seed=seed, n_recur=1) for seed in (1, 2)]
    first = write_checkpoint(tmp_path / 'ckpt_unmasking.pt', networks[0], training_type='unmasking')
    second = write_checkpoint(tmp_path / 'ckpt_remasking.pt', networks[1], training_type='remasking')
    middle = tiny_gpt(18, 64, n_recur=1)
    middle.load_state_dict(
        {name: a.lerp(networks[1].state_dict()[name], 0.25) for name, a in networks[0].state_dict().items()}
    )
    middle = write_checkpoint(tmp_path / 'middle.pt', middle, training_type='joint')

    def drawn(*words):
        path = tmp_path / 's.jsonl'
        status, out, err = run('sample', '--num_samples=2', '--steps=6', *CPU, *words, f'--save={path}')
        assert status == 0, err
        return path.read_text(), out

    merged, out = drawn(
        f'--init_from={first}', f'--merge_from={second}', '--merge_weight=0.25', '--remask=wrong'
    )
    assert f'merged with 0.25 of {second}' in out
    assert merged == drawn(f'--init_from={middle}', '--remask=wrong')[0]
    alone = drawn(f'--init_from={first}', '--remask=none')[0]
    assert (
        drawn(f'--init_from={first}', f'--merge_from={second}', '--merge_weight=0', '--remask=none')[0]
        == alone
    )
    assert drawn(f'--init_from={first}', f'--merge_from={second}', '--remask=none')[0] != alone


def test_settings_reach_the_sampler(trained):
    """What the command line says is what fill is called with."""
    wanted = dict(
        steps=7,
        schedule='cosine',
        commit='confidence',
        block_length=5,
        commit_threshold=0.7,
        remask='wrong',
        remask_rate=0.7,
        remask_random_ratio=0.2,
        remask_patience=0.5,
        remask_schedule=(0.5, 0.1),
        remdm='loop',
        correct_share=0.5,
        ar_prefix=3,
        temperature=0.9,
        top_k=5,
        top_p=0.8,
        choice_temperature=2.5,
        seed=11,
        batch_size=13,
    )
    module, calls = load_script('sample'), []

    def fill(model, meta, canvas, fixed, **more):
        calls.append((canvas, fixed, more))
        return [dict(text='1=1', tokens=[1], nfe=1, finished=True)] * len(canvas)

    module.fill = fill
    configurator.configure(
        vars(module),
        [
            f'--init_from={trained[1]}',
            '--num_samples=4',
            '--prompt=(+',
            '--length=9',
            *CPU,
            *[f'--{name}={value}' for name, value in wanted.items()],
        ],
    )
    module.main()
    ((canvas, fixed, more),) = calls
    assert (
        canvas.shape == (4, 64)
        and canvas[0, :3].tolist() == [15, 10, 12]
        and canvas[0, 10:12].tolist() == [16, 17]
    )
    assert torch.equal(fixed, canvas != 18) and fixed.sum() == 4 * (3 + 54) and more['remask_model'] is None
    assert {name: more[name] for name in wanted} == wanted


def test_bench_measures_what_the_checkpoint_can_do():
    def names(**config):
        return [
            (name.split(':')[0], protocol, rules)
            for name, protocol, rules in arithmetic.sampler_rows(default_config(**config), 20, 64)
        ]

    ar = ('AR', 'free', dict(ar_prefix=64))
    assert names(training_type='causal') == [ar] and names(training_type='remasking') == []
    for kind, ratio, causal, wrong in (
        ('unmasking', 0.0, 0, False),
        ('unmasking', 0.3, 1, False),
        ('joint', 0.0, 0, True),
        ('joint', 0.3, 1, True),
    ):
        rows = names(training_type=kind, causal_ratio=ratio)
        assert (ar in rows) == bool(causal)
        remask = [rules.get('remask') for _, _, rules in rows]
        assert (remask.count('causal'), 'wrong' in remask) == (causal, wrong)


def test_bench_standard_errors():
    assert standard_error([0.2], 'valid', 100) == pytest.approx(0.04)  # binomial
    assert standard_error([0.1, 0.2, 0.3], 'valid', 100) == pytest.approx((0.16 / 300) ** 0.5)
    assert standard_error([0.2, 0.4, 0.6], 'unique', 100) == pytest.approx(0.2 / 3**0.5)  # over seeds
    assert standard_error([0.2], 'unique', 100) is None
    assert standard_error([12.0], 'nfe', 100) is None


def test_bench(run, trained, tmp_path):
    path = tmp_path / 'table.json'
    words = [
        '--suite=arithmetic',
        f'--init_from={trained[1]}',
        '--num_samples=20',
        '--num_seeds=1',
        '--steps=4',
        *CPU,
    ]
    status, out, err = run('bench', *words, f'--json={path}')
    assert status == 0, err
    table = json.loads(path.read_text())
    assert set(table) == {'command', 'rows'}
    assert table['command'] == ' '.join(['python bench.py', *words, f'--json={path}'])
    assert f'{trained[1]}: joint on arithmetic, iteration 4' in out
    rows = {(row['name'].split(':')[0], row['protocol']): row for row in table['rows']}
    grammar = rows['the grammar itself', 'free']
    assert grammar['valid'] == grammar['correct'] == 1 and grammar['nfe'] == 0
    assert len(rows) == len(table['rows']) == 1 + 3 + 1 + 2 * 4
    for (name, protocol), row in rows.items():
        assert row['n'] == 20 and row['seeds'] == 1 and row['name'] in out
        assert all(
            0 <= row[share] <= 1 for share in ('balanced', 'valid', 'correct', 'unique', 'novel', 'length_tv')
        )
        assert row['valid_se'] == pytest.approx((row['valid'] * (1 - row['valid']) / 20) ** 0.5)
        if name not in ('the grammar itself', 'AR', 'remask=causal', 'hybrid'):
            assert row['nfe'] <= 4
    assert rows['ancestral', 'given']['mean_length'] <= grammar['mean_length'] + 1e-9
    status, out, err = run('bench', *words, '--num_seeds=2', '--only=ancestral', f'--json={path}')
    assert status == 0, err
    rows = json.loads(path.read_text())['rows']
    assert len(rows) == 4 and all(row['valid_se'] is not None and row['seeds'] == 2 for row in rows)


def bench_settings(*words):
    """What bench.py hands to a suite: its settings, with the changes of a command line."""
    return SimpleNamespace(**configurator.configure(vars(load_script('bench')), [*CPU, *words]))


def test_bench_compares_runs(run, trained, tmp_path):
    """
    Seeds of one configuration share a row, with the standard error over them; the others are named by what
    they change.
    """
    paths = [
        write_checkpoint(
            tmp_path / f'{name}.pt',
            tiny_gpt(18, 64, seed=number, n_recur=1),
            causal_ratio=0.3,
            seed=number,
            out_dir=name,
            **more,
        )
        for number, (name, more) in enumerate(
            (('a', {}), ('b', dict(remask_ratio=0.25, allow_abstain=True)), ('c', {}))
        )
    ]
    status, out, err = run(
        'bench',
        '--suite=checkpoints',
        f'--init_from={tmp_path}/[ab].pt,{paths[2]}',
        '--num_samples=4',
        '--steps=3',
        '--eval_rows=6',
        *CPU,
        f'--json={tmp_path}/table.json',
    )
    assert status == 0, err
    rows = json.loads((tmp_path / 'table.json').read_text())['rows']
    samplers = ['', 'remask=none', 'remask=wrong', 'remask=causal']
    assert [(row['name'], row['sampler'], row['seeds']) for row in rows] == [
        *[('the first', name, 2) for name in samplers],
        *[
            ('remask_ratio=0.25, allow_abstain=True', name, 1)
            for name in samplers[:3] + ['commit=abstain'] + samplers[3:]
        ],
    ]
    for row in rows:
        metrics = (
            ('nelbo', 'causal_nll', 'auc', 'fixed', 'refilled')
            if not row['sampler']
            else ('valid', 'correct', 'length_tv', 'unique', 'nfe')
        )
        for metric in metrics:
            assert row[metric] is not None and (row[f'{metric}_se'] is None) == (row['seeds'] == 1)
        assert row['sampler'] in ('', 'remask=causal') or 0 < row['nfe'] <= 3
    val, nelbos = loader.spread_rows(loader.load_data('arithmetic')[1]['val'], 6, 64), []
    for path in (paths[0], paths[2]):
        result = train.evaluate(GPT.load(path)[0], val, ARITHMETIC, causal=False, bidirectional=True)
        nelbos.append(result['nelbo'])
    assert rows[0]['nelbo'] == pytest.approx(sum(nelbos) / 2) and rows[0]['nelbo_se'] == pytest.approx(
        abs(nelbos[0] - nelbos[1]) / 2
    )
    assert (
        '| the first ' in out
        and '| remask_ratio=0.25, allow_abstain=True ' in out
        and 'nelbo' in out
        and 'valid %' in out
    )


def test_bench_knows_what_makes_two_runs_alike():
    """
    Not the seed, nor where it ran; of another checkpoint that it started from or learned from only that there
    is one.
    """

    def recipe(config, **more):
        return checkpoints.recipe(dict(config=config, **{'iter_num': config['max_iters'], **more}))

    same = [dict(seed=1, init_from='x.pt', dtype='float32'), dict(seed=2, init_from='y.pt')]
    assert recipe(default_config(**same[0])) == recipe(default_config(**same[1]))
    plain = recipe(default_config())
    for changes in (
        same[0],
        dict(init_from='a.pt'),
        dict(learning_rate=0.1),
        dict(allow_abstain=True),
        dict(remask_target='original'),
        dict(noise_mix='mask'),
        dict(max_iters=3),
        dict(n_embd=64),
    ):
        assert recipe(default_config(**changes)) != plain, changes
    head = recipe(dict(default_config(), energy_head=1))  # not a setting of train.py
    assert set(head) == set(plain) and head != plain
    assert recipe(default_config(init_from='resume')) == plain  # as older checkpoints say
    students = [
        recipe(default_config(), distilled=dict(teacher_steps=steps, seed=seed, init_from=path))
        for steps, seed, path in ((4, 1, 'a.pt'), (4, 2, 'b.pt'), (16, 1, 'a.pt'))
    ]
    assert (
        students[0] == students[1] != plain and students[0] != students[2] and set(students[0]) == set(plain)
    )
    early = recipe(default_config(), iter_num=7)  # a numbered one is no seed of the finished run
    assert early != plain and early == recipe(default_config(seed=2), iter_num=7) and set(early) == set(plain)


def test_bench_merges_pair_by_pair(tmp_path, monkeypatch):
    seen = []
    for name in ('a1', 'a2', 'b1', 'b2'):
        write_checkpoint(tmp_path / f'{name}.pt', seed=int(name[1]))
    score = dict.fromkeys(('valid', 'correct', 'length_tv', 'unique', 'nfe'), 1.0)
    monkeypatch.setattr(
        checkpoints,
        'checkpoint_scores',
        lambda s, path, other: seen.append((path[-5:], other[-5:])) or ({'nelbo': 1.0}, {'x': score}),
    )
    rows, _ = checkpoints.run(
        bench_settings(f'--init_from={tmp_path}/a*.pt', f'--merge_from={tmp_path}/b*.pt')
    )
    assert seen == [('a1.pt', 'b1.pt'), ('a2.pt', 'b2.pt')]
    assert [row['seeds'] for row in rows] == [2, 2] and rows[0]['auc'] is None
    assert rows[0]['name'] == 'the first + the first'
    write_checkpoint(tmp_path / 'b2.pt', seed=2, remask_ratio=0.25)
    rows, _ = checkpoints.run(
        bench_settings(f'--init_from={tmp_path}/a*.pt', f'--merge_from={tmp_path}/b*.pt')
    )
    assert [row['name'] for row in rows[::2]] == ['the first + the first', 'the first + remask_ratio=0.25']


@pytest.mark.parametrize(
    'path', sorted(glob.glob(os.path.join(ROOT, 'config', '*.py'))), ids=os.path.basename
)
def test_configs(path):
    """Every recipe sets only what train.py has, and what it sets goes together."""
    module = load_script('train')
    before = {name: setting.default for name, setting in configurator.settings(module.__file__).items()}
    config = configurator.configure(vars(module), [path])
    # remask_all writes the defaults out, stage0 says that there is nothing
    assert config != before or path.endswith(('stage0.py', 'remask_all.py'))
    meta = dict(train_tokens=10**6, val_tokens=10**5, name=config['dataset'])
    text = dict(STREAM, vocab_size=95, itos=[chr(c) for c in range(32, 127)])
    meta = {**(ARITHMETIC if config['dataset'].startswith('arithmetic') else text), **meta}
    assert os.path.exists(os.path.join(ROOT, 'data', config['dataset'], 'prepare.py'))
    train.check_settings(config)
    check_fits(config, meta)
    check_sizes(
        GPTConfig(
            vocab_size=meta['vocab_size'],
            **{
                name: config[name]
                for name in ('block_size', 'n_layer', 'n_head', 'n_embd', 'n_recur', 'dropout')
            },
        )
    )


# -----------------------------------------------------------------------------
# mistakes in train.py


@pytest.mark.parametrize(
    'words, message',
    [
        (['--max_iter=3'], ['unknown key --max_iter', 'did you mean --max_iters?']),
        (['--max_iters=many'], ['max_iters expects an int', "'many'"]),
        (['--compile=3'], ['compile expects a bool']),
        (['config/remask_al.py'], ['config/remask_al.py: no such config file']),
        (['--dataset=arithmetics'], ['data/arithmetics/prepare.py', 'did you mean arithmetic?']),
        (['--init_from=resume'], ['ckpt_joint_all_positions.pt', 'no such checkpoint']),
        (['--init_from=nowhere.pt'], ['nowhere.pt', 'no such checkpoint']),
        (['--block_size=32'], ['64', 'set --block_size=64']),
        (['--n_embd=18', '--n_head=4'], ['n_embd must be a multiple', 'n_embd=18']),
        (['--n_layer=0'], ['n_layer must be at least 1']),
        (['--batch_size=0'], ['batch_size must be at least 1, got 0']),
        (['--max_iters=0'], ['max_iters must be at least 1']),
        (['--device=gpu'], ['device expects', "'gpu'"]),
        (['--dtype=float16'], ['dtype expects', "'float16'"]),
        (['--attention=flash'], ['attention expects', "'flash'"]),
        (['--training_type=remask'], ['training_type expects one of', "'remask'"]),
        (['--training_type=remasking'], ['--corruption=random']),
        (['--corruption=onw'], ['corruption knows', "'onw'"]),
        (['--causal_ratio=2'], ['causal_ratio must be in 0..1']),
        (['--training_type=denoising', '--remask_target=wrong'], ['--remask_target=original']),
        (['--noise_mix=mask:1,drop:1'], ['noise_mix knows', "'mask:1,drop:1'"]),
        (['--target_mask_prob=0.2'], ['--allow_abstain=True']),
        (['--dropout=1'], ['dropout must be in']),
    ],
    ids=lambda value: ' '.join(value) if value[0].startswith(('--', 'config')) else '',
)
def test_train_refuses(run, tmp_path, words, message):
    out = tmp_path / 'out'
    refused(run('train', *TINY, f'--out_dir={out}', *words), 'train', *message)
    assert not out.exists()  # nothing half done


def test_an_error_is_one_line_in_a_real_process(tmp_path):
    result = subprocess.run(
        [sys.executable, 'train.py', *TINY, f'--out_dir={tmp_path}/out', '--n_embd=18', '--n_head=4'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and result.stderr.startswith('train.py: n_embd must be a multiple')
    assert len(result.stderr.splitlines()) == 1 and os.listdir(tmp_path) == []


def test_train_refuses_a_checkpoint_of_another_vocabulary(run, tmp_path):
    other = dict(ARITHMETIC, itos=[*'9876543210()+*=', '<bos>', '<eos>', '<pad>'])
    small = dict(ARITHMETIC, vocab_size=17, itos=ARITHMETIC['itos'][1:])
    for meta, word in ((other, 'itos'), (small, 'vocab_size is 17 and 18')):
        path = write_checkpoint(tmp_path / 'x.pt', meta=meta)
        refused(
            run('train', *TINY, f'--init_from={path}', f'--out_dir={tmp_path}/out'),
            'train',
            path,
            'do not fit',
            word,
        )
    path = write_checkpoint(tmp_path / 'x.pt', tiny_gpt(18, 64, n_recur=1, n_layer=2))
    refused(
        run('train', *TINY, f'--init_from={path}', f'--out_dir={tmp_path}/out'), 'train', 'n_layer is 2 and 1'
    )
    assert os.listdir(tmp_path) == ['x.pt']


def test_resuming_with_another_optimiser_is_refused(run, tmp_path):
    words = [*TINY, '--training_type=unmasking', f'--out_dir={tmp_path}']
    assert run('train', *words, '--optimizer=muon', '--max_iters=1')[0] == 0
    refused(run('train', *words, '--optimizer=adamw', '--init_from=resume'), 'train', 'optimizer')


def test_resuming_a_finished_run_says_so(run, tmp_path):
    words = [*TINY, '--training_type=unmasking', f'--out_dir={tmp_path}']
    assert run('train', *words)[0] == 0
    before = os.stat(tmp_path / 'ckpt_unmasking.pt').st_mtime_ns
    _, out, err = run('train', *words, '--init_from=resume', '--max_iters=2')
    assert os.stat(tmp_path / 'ckpt_unmasking.pt').st_mtime_ns == before
    assert 'saved' not in out and 'max_iters' in out + err


def test_out_dir_that_is_a_file(run, tmp_path):
    (tmp_path / 'out').write_text('x')
    refused(run('train', *TINY, f'--out_dir={tmp_path}/out'), 'train', f'{tmp_path}/out')


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the scripts and of the arithmetic dataset that a test may damage."""
    loader.load_data('arithmetic')
    monkeypatch.setattr(loader, 'HERE', str(tmp_path / 'data'))
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(path, tmp_path)
    shutil.copytree(
        os.path.join(ROOT, 'data'),
        tmp_path / 'data',
        ignore=lambda folder, names: [
            name
            for name in names
            if name == '__pycache__' or (name.endswith('.bin') and os.path.basename(folder) != 'arithmetic')
        ],
    )
    return tmp_path


def test_damaged_datasets(run, copy):
    folder = copy / 'data' / 'arithmetic'
    meta = json.loads((folder / 'meta.json').read_text())
    words = [*TINY, f'--out_dir={copy}/out']
    (folder / 'meta.json').write_text(json.dumps(dict(meta, val_tokens=64)))
    refused(
        run('train', *words, root=copy),
        'train',
        'data/arithmetic is damaged',
        'meta.json says 64',
        'python data/arithmetic/prepare.py',
    )
    (folder / 'meta.json').write_text('{"train_tokens": 12')
    refused(
        run('train', *words, root=copy),
        'train',
        'data/arithmetic is damaged',
        'python data/arithmetic/prepare.py',
    )
    (folder / 'meta.json').write_text(json.dumps(meta))
    (folder / 'train.bin').unlink()
    refused(run('train', *words, root=copy), 'train', 'data/arithmetic is damaged', 'train.bin')
    assert not (copy / 'out').exists()


def test_dataset_that_cannot_be_prepared(run, copy):
    """The prepare.py says on its own stderr what went wrong; train.py adds one line."""
    folder = copy / 'data' / 'offline'
    folder.mkdir()
    (folder / 'prepare.py').write_text('raise SystemExit("download failed: no network")')
    refused(
        run('train', *TINY, '--dataset=offline', f'--out_dir={copy}/out', root=copy),
        'train',
        'the dataset offline is not there',
        'python data/offline/prepare.py',
    )
    assert not (copy / 'out').exists() and os.listdir(folder) == ['prepare.py']


def test_dataset_is_prepared_on_first_use(run, copy):
    for name in ('meta.json', 'train.bin', 'val.bin'):
        (copy / 'data' / 'arithmetic' / name).unlink()
    status, out, err = run('train', *TINY, '--max_iters=1', f'--out_dir={copy}/out', root=copy)
    assert status == 0, err
    assert 'preparing the dataset' in out and sorted(os.listdir(copy / 'out')) == [
        'ckpt_joint_all_positions.pt',
        'log.jsonl',
    ]


# -----------------------------------------------------------------------------
# mistakes in sample.py and bench.py


@pytest.mark.parametrize(
    'words, message',
    [
        (['--prompt=(+x'], ["'x' in '(+x' is not in the vocabulary of arithmetic"]),
        (['--length=63'], ['a text of 63 tokens does not fit', 'room for 62']),
        (['--length=2', '--prompt=(+12'], ['a length of 2 is too short: the prompt has 4 tokens']),
        (['--prompt=' + '1' * 63], ['a text of 63 tokens does not fit']),
        (['--remask=causal', '--length=9'], ['the causal pass cannot see']),
        (['--ar_prefix=12', '--length=9'], ['the causal pass cannot see']),
        (['--commit=best'], ["commit expects one of random, threshold, confidence, margin", "got 'best'"]),
        (['--remask=all'], ["remask expects one of", "'all'"]),
        (['--schedule=step', '--remask=none'], ['schedule expects one of']),
        (
            ['--commit=confidence', '--temperature=0'],
            ['one sample again and again', '--choice_temperature=4.5'],
        ),
        (['--num_samples=0'], ['num_samples must be at least 1, got 0']),
        (['--batch_size=0'], ['batch_size must be at least 1']),
        (['--steps=0'], ['steps must be at least 1']),
        (['--length=0'], ['length must be at least 1']),
        (['--top_p=0'], ['top_p']),
        (['--top_p=1.5'], ['top_p must be in 0..1']),
        (['--top_k=0'], ['top_k must be at least 1']),
        (['--merge_from=nowhere.pt'], ['nowhere.pt', 'no such checkpoint']),
        (['--merge_weight=2'], ['merge_weight must be in 0..1, got 2']),
        (['--merge_weight=-0.1'], ['merge_weight must be']),
        (['--commit=abstain'], ['commit=abstain needs a checkpoint trained with --allow_abstain=True']),
        (['--temperature=-1'], ['temperature must be at least 0']),
        (['--remask_rate=2'], ['remask_rate is a probability, in 0..1']),
        (['--device=tpu'], ['device expects']),
        (['--dtype=int8'], ['dtype expects']),
        (['--num_sample=3'], ['did you mean --num_samples?']),
        (['--steps=1.5'], ['steps expects an int']),
    ],
    ids=lambda value: ' '.join(value)[:30] if value[0].startswith('--') else '',
)
def test_sample_refuses(run, trained, tmp_path, words, message):
    result = run(
        'sample', f'--init_from={trained[1]}', '--num_samples=2', f'--save={tmp_path}/s.jsonl', *CPU, *words
    )
    refused(result, 'sample', *message)
    assert os.listdir(tmp_path) == []


def test_sample_refuses_checkpoints(run, trained, tmp_path):
    refused(
        run('sample', f'--out_dir={tmp_path}/empty'),
        'sample',
        f'no checkpoint under {tmp_path}/empty',
        'train one first',
    )
    half = tmp_path / 'half.pt'
    half.write_bytes(open(trained[1], 'rb').read()[:5000])
    refused(run('sample', f'--init_from={half}', *CPU), 'sample', half, 'truncated or damaged')
    refused(
        run('sample', f'--init_from={trained[1]}', f'--remask_from={half}', *CPU),
        'sample',
        half,
        'truncated or damaged',
    )
    judge = write_checkpoint(tmp_path / 'ckpt_remasking_all_positions.pt', training_type='remasking')
    refused(run('sample', f'--init_from={judge}', *CPU), 'sample', 'remasking checkpoint', '--remask_from')
    plain = write_checkpoint(tmp_path / 'ckpt_unmasking.pt', training_type='unmasking')
    refused(
        run('sample', f'--init_from={plain}', '--remask=wrong', *CPU),
        'sample',
        'not trained to find wrong',
        '--remask_from',
    )
    refused(
        run('sample', f'--init_from={plain}', '--remask=causal', *CPU), 'sample', 'no trained causal mode'
    )
    refused(
        run('sample', f'--init_from={judge}', f'--remask_from={plain}', *CPU),
        'sample',
        'not trained to find wrong tokens',
    )
    refused(
        run('sample', f'--init_from={trained[1]}', f'--remask_from={plain}', *CPU),
        'sample',
        plain,
        'not trained to find wrong',
    )
    refused(
        run('sample', f'--init_from={trained[1]}', f'--remask_from={judge}', '--remask=random', *CPU),
        'sample',
        '--remask=random',
    )


def test_sample_refuses_a_judge_of_another_vocabulary(run, trained, tmp_path):
    other = dict(ARITHMETIC, itos=[*'9876543210()+*=', '<bos>', '<eos>', '<pad>'])
    judge = write_checkpoint(tmp_path / 'j.pt', meta=other, training_type='remasking')
    refused(
        run('sample', f'--init_from={trained[1]}', f'--remask_from={judge}', *CPU),
        'sample',
        trained[1],
        judge,
        'itos',
    )
    small = dict(ARITHMETIC, vocab_size=17, itos=ARITHMETIC['itos'][1:])
    judge = write_checkpoint(tmp_path / 'j.pt', meta=small, training_type='remasking')
    refused(
        run('sample', f'--init_from={trained[1]}', f'--remask_from={judge}', *CPU),
        'sample',
        judge,
        'vocab_size',
    )


def test_sample_refuses_a_judge_of_another_length(run, tmp_path):
    writer = write_checkpoint(tmp_path / 'w.pt', tiny_gpt(3, 16), STREAM, training_type='unmasking')
    judge = write_checkpoint(tmp_path / 'j.pt', tiny_gpt(3, 8), STREAM, training_type='remasking')
    refused(
        run('sample', f'--init_from={writer}', f'--remask_from={judge}', *CPU),
        'sample',
        'block_size is 16 and 8',
    )


def test_a_judge_that_learned_the_original_tokens(run, tmp_path):
    """
    p(WRONG) is what the token that stands there lacks, so no checkpoint has to have learned the label
    [WRONG].
    """
    writer = write_checkpoint(tmp_path / 'w.pt', training_type='unmasking')
    for kind in ('remasking', 'joint', 'denoising'):
        judge = write_checkpoint(tmp_path / 'j.pt', training_type=kind, remask_target='original')
        status, out, err = run(
            'sample', f'--init_from={writer}', f'--remask_from={judge}', '--steps=2', '--num_samples=1', *CPU
        )
        assert status == 0 and 'remask=wrong' in out, err


def test_sample_refuses_to_judge_what_a_causal_checkpoint_writes(run, tmp_path):
    """The refilling would be left to a bidirectional pass that was never trained."""
    writer = write_checkpoint(tmp_path / 'w.pt', training_type='causal')
    judge = write_checkpoint(tmp_path / 'j.pt', training_type='remasking')
    refused(
        run('sample', f'--init_from={writer}', f'--remask_from={judge}', '--num_samples=2', *CPU),
        'sample',
        'causal',
    )


def test_sample_into_a_folder_that_is_not_there(run, trained, tmp_path):
    missing = tmp_path / 'no' / 's.jsonl'
    status, out, err = run('sample', f'--init_from={trained[1]}', f'--save={missing}', *CPU)
    refused((status, out, err), 'sample', missing, 'there is no folder')
    assert 'iteration' not in out and os.listdir(tmp_path) == []  # before any work is done


def test_bench_refuses(run, trained, tmp_path):
    judge = write_checkpoint(tmp_path / 'j.pt', training_type='remasking')
    text = write_checkpoint(tmp_path / 't.pt', tiny_gpt(3, 8), STREAM, training_type='unmasking')
    for words, message in (
        ([f'--init_from={trained[1]}', '--suite=speeed'], "'speeed'"),
        ([f'--init_from={trained[1]}', '--num_seeds=0'], 'num_seeds must be at least 1'),
        (['--suite=samplers', '--budgets=0,8'], 'budgets expects numbers of passes, each at least 1'),
        ([f'--init_from={trained[1]}', '--only=nothing'], "no row's name contains 'nothing'"),
        ([f'--out_dir={tmp_path}/empty'], 'train one first'),
        ([f'--init_from={judge}'], 'cannot write'),
        ([f'--init_from={text}'], 'trained on arithmetic'),
        ([f'--init_from={trained[1]}', '--merge_weight=1.5'], 'merge_weight must be in 0..1, got 1.5'),
        ([f'--init_from={trained[1]}', '--remask_rate=2'], 'remask_rate must be in 0..1, got 2'),
        ([f'--init_from={trained[1]}', '--eval_rows=0'], 'eval_rows must be at least 1'),
        ([f'--init_from={trained[1]}', f'--merge_from={text}'], 'do not fit together'),
        (
            ['--suite=checkpoints', f'--init_from={tmp_path}/x*.pt'],
            f"no checkpoint matches '{tmp_path}/x*.pt'",
        ),
        (
            ['--suite=checkpoints', f'--init_from={judge},{text}', f'--merge_from={tmp_path}/j*.pt'],
            'matches 1 checkpoints, init_from 2',
        ),
    ):
        refused(run('bench', '--num_samples=5', *CPU, *words), 'bench', message)
    status, out, err = run('bench', '--suite=checkpoints', f'--init_from={text}', *CPU)
    # what stands there when the bar is gone
    refused((status, out, err.split('\r')[-1]), 'bench', 'trained on arithmetic')


def test_bench_into_a_folder_that_is_not_there(run, trained, tmp_path):
    status, out, err = run(
        'bench',
        f'--init_from={trained[1]}',
        '--num_samples=5',
        '--num_seeds=1',
        '--only=AR',
        *CPU,
        f'--json={tmp_path}/no/table.json',
    )
    assert '| sampler' not in out
    refused((status, out, err), 'bench', 'no/table.json')


@pytest.mark.parametrize('script', ['train', 'sample', 'bench'])
def test_help(run, script):
    status, out, err = run(script, '--help')
    assert status == 0 and f'usage: python {script}.py' in out and err == ''
    for name, setting in configurator.settings(os.path.join(ROOT, f'{script}.py')).items():
        assert f'--{name}=' in out and setting.comment, name  # every setting says what it is for


def test_importing_a_script_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['x', '--nonsense'])
    state = torch.get_rng_state()
    for script in ('train', 'sample', 'bench', 'model'):
        load_script(script)
    assert os.listdir(tmp_path) == [] and torch.equal(torch.get_rng_state(), state)
    assert default_config()['training_type'] == 'joint'
