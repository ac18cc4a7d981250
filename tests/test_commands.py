"""
The commands as a user types them: what works end to end, and that a mistake is one line and leaves no trace.
"""

import contextlib
import glob
import io
import itertools
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ARITHMETIC, ROOT, default_config, load_script, tiny_gpt, write_checkpoint
from test_show import Page

import configurator
import train
from data import loader
from model import GPT, GPTConfig
from plumbing import show
from plumbing.checks import check_fits, check_sizes, idle
from suites import arithmetic, checkpoints
from suites.common import standard_error

TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--n_recur=1', '--batch_size=4', '--max_iters=4',
        '--eval_interval=4', '--eval_rows=16', '--eval_samples=0', '--log_interval=2', '--device=cpu',
        '--dtype=float32']
CPU = ['--device=cpu', '--dtype=float32']
STREAM = dict(ARITHMETIC, name='text', format='stream', block_size=None, vocab_size=3, itos=['a', 'b', '\n'],
              bos=None, eos=None, pad=None)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A joint checkpoint with a causal mode: (its folder, the path, what was printed)."""
    out, printed = tmp_path_factory.mktemp('trained'), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(sys.modules, 'matplotlib.figure', None)
        patch.setattr(sys, 'argv', ['train.py', *TINY, '--causal_ratio=0.5', f'--out_dir={out}'])
        runpy.run_path(os.path.join(ROOT, 'train.py'), run_name='__main__')
    return str(out), str(out / 'ckpt_joint_all_positions.pt'), printed.getvalue()


def went_well(result):
    """What the run printed."""
    status, out, err = result
    assert status == 0, err
    return out


def refused(result, script, *words):
    """The run ended in one line on stderr, which names the script and says all of these words."""
    status, _, err = result
    assert status not in (0, None), 'it went through'
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f'{script}.py: '), err
    for word in words:
        assert str(word) in lines[0], f'{word} is not in: {lines[0]}'


def checkpoint(folder, kind, model=None, meta=ARITHMETIC, **config):
    """The word that starts from an untrained checkpoint of this training type, written into a folder."""
    return '--init_from=' + write_checkpoint(folder / f'{kind}.pt', model, meta, training_type=kind, **config)


def judging(word):
    """The word that judges with the checkpoint which this word starts from."""
    return word.replace('--init_from', '--remask_from')


# -----------------------------------------------------------------------------
# what works

def test_training_prints_where_it_stands(trained):
    out, path, text = trained
    assert sorted(os.listdir(out)) == [os.path.basename(path), 'log.jsonl']
    for words in ('override: n_embd = 16', 'step 4/4', 'step 4  validation: NELBO', 'causal NLL', 'AUC',
                  f'saved {path}', f'python sample.py --init_from={path}'):
        assert words in text, text


def read_samples(path):
    return [json.loads(line) for line in open(path, encoding='utf-8')]


@pytest.mark.parametrize('words', [
    '', '--prompt=(+', '--commit=confidence --steps=8 --schedule=cosine', '--remask=wrong --length=9',
    '--remask=random --remask_rate=0.1 --steps=12 --top_k=5', '--ar_prefix=8 --steps=6 --top_p=0.9',
    '--remask=none --commit=entropy --temperature=0.5 --length=20'])
def test_sampling(run, trained, tmp_path, words):
    files = [tmp_path / name for name in ('a.jsonl', 'b.jsonl', 'c.jsonl')]
    for path, seed in zip(files, (5, 5, 6)):
        out = went_well(run('sample', '--init_from=ckpt', f'--out_dir={trained[0]}', '--num_samples=3', *CPU,
                            *words.split(), f'--save={path}', f'--seed={seed}'))
    for said in (f'{trained[1]}: joint on arithmetic, iteration 4', '3 samples', f'written to {path}'):
        assert said in out
    assert out.count('✗') + out.count('✓') == 3
    samples = read_samples(files[0])
    assert len(samples) == 3 and all(sorted(s) == ['finished', 'nfe', 'text', 'tokens'] for s in samples)
    for s in samples:
        assert 0 <= min(s['tokens']) and max(s['tokens']) < 18 and s['tokens'][0] == 15 and s['nfe'] > 0
        assert s['finished'] == (16 in s['tokens'])
        assert words != '--prompt=(+' or s['text'].startswith('(+')
        assert '--length=9' not in words or s['finished'] and len(s['tokens']) <= 11
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert sorted(os.listdir(tmp_path)) == ['a.jsonl', 'b.jsonl', 'c.jsonl']


@pytest.mark.parametrize('kind, target', [('remasking', 'wrong'), ('remasking', 'original'),
                                          ('joint', 'original'), ('denoising', 'original')])
def test_sampling_with_a_second_checkpoint_that_judges(run, tmp_path, kind, target):
    """p(WRONG) is what the token lacks, so no checkpoint has to have learned the label [WRONG]."""
    judge = checkpoint(tmp_path, kind, tiny_gpt(18, 64, seed=1, n_recur=1), remask_target=target)
    out = went_well(run('sample', checkpoint(tmp_path, 'unmasking'), judging(judge), '--num_samples=2',
                        '--steps=5', *CPU))
    assert 'remask=wrong' in out and 'each: 9.0 passes (NFE)' in out      # 5 of the writer, 4 of the judge


def test_sampling_from_other_checkpoints(run, tmp_path):
    """One that writes left to right, and one that abstains."""
    went_well(run('sample', checkpoint(tmp_path, 'causal'), '--num_samples=2', f'--save={tmp_path}/s.jsonl',
                  *CPU))
    assert all(s['nfe'] == len(s['tokens']) - 1 for s in read_samples(tmp_path / 's.jsonl'))
    out = went_well(run('sample', checkpoint(tmp_path, 'unmasking', allow_abstain=True), '--num_samples=2',
                        '--commit=abstain', '--steps=5', *CPU))
    assert 'commit=abstain, remask=none' in out and '2 samples' in out


def test_sampling_from_merged_checkpoints(run, tmp_path):
    """What is drawn from is the merged network, which can do what either could be used for."""
    networks = [tiny_gpt(18, 64, seed=seed, n_recur=1) for seed in (1, 2, 3)]
    first, second, middle = (network.state_dict() for network in networks)
    networks[2].load_state_dict({name: first[name].lerp(second[name], 0.25) for name in middle})
    first, second, middle = (checkpoint(tmp_path, kind, network) for kind, network in
                             zip(('unmasking', 'remasking', 'joint'), networks))
    second = second.replace('--init_from', '--merge_from')

    def drawn(*words):
        path = tmp_path / 's.jsonl'
        out = went_well(run('sample', '--num_samples=2', '--steps=6', *CPU, *words, f'--save={path}'))
        return path.read_text(), out

    merged, out = drawn(first, second, '--merge_weight=0.25', '--remask=wrong')
    assert f"merged with 0.25 of {second.split('=')[1]}" in out
    assert merged == drawn(middle, '--remask=wrong')[0]
    alone = drawn(first, '--remask=none')[0]
    assert drawn(first, second, '--merge_weight=0', '--remask=none')[0] == alone
    assert drawn(first, second, '--remask=none')[0] != alone


@pytest.mark.parametrize('wanted', [
    dict(steps=7, schedule='cosine', commit='confidence', remask='wrong',
         remask_random_ratio=0.2, remask_schedule=(0.5, 0.1), correct_share=0.5, ar_prefix=3, temperature=0.9,
         top_k=5, top_p=0.8, choice_temperature=2.5),
    dict(commit='threshold', commit_threshold=0.7, remask='wrong', remask_rate=0.7, remask_patience=0.5),
    dict(remask='remdm', remdm='rescale')], ids=str)
def test_settings_reach_the_sampler(trained, wanted):
    """What the command line says is what fill is called with."""
    wanted = dict(wanted, seed=11, batch_size=13)
    module, calls = load_script('sample'), []

    def fill(model, meta, canvas, fixed, **more):
        calls.append((canvas, fixed, more))
        return [dict(text='1=1', tokens=[1], nfe=1, finished=True)] * len(canvas)

    module.fill = fill
    words = [f'--{name}={value}' for name, value in wanted.items()]
    configurator.configure(vars(module), [f'--init_from={trained[1]}', '--num_samples=4', '--prompt=(+',
                                          '--length=9', *CPU, *words])
    module.main()
    ((canvas, fixed, more),) = calls
    assert canvas.shape == (4, 64) and torch.equal(fixed, canvas != 18) and fixed.sum() == 4 * (3 + 54)
    assert canvas[0, :3].tolist() == [15, 10, 12] and canvas[0, 10:12].tolist() == [16, 17]
    assert {name: more[name] for name in wanted} == wanted and more['remask_model'] is None


def test_bench_measures_what_the_checkpoint_can_do():
    def names(**config):
        rows = arithmetic.sampler_rows(default_config(**config), 20, 64)
        return [(name.split(':')[0], protocol, rules) for name, protocol, rules in rows]

    ar = ('AR', 'free', dict(ar_prefix=64))
    assert names(training_type='causal') == [ar] and names(training_type='remasking') == []
    for kind, ratio in itertools.product(('unmasking', 'joint'), (0.0, 0.3)):
        rows = names(training_type=kind, causal_ratio=ratio)
        remask = [rules.get('remask') for _, _, rules in rows]
        assert (ar in rows) == bool(remask.count('causal')) == (ratio > 0)
        assert ('wrong' in remask) == (kind == 'joint')


def test_bench_standard_errors():
    for values, metric, error in (([0.2], 'valid', 0.04), ([0.1, 0.2, 0.3], 'valid', (0.16 / 300) ** 0.5),
                                  ([0.2, 0.4, 0.6], 'unique', 0.2 / 3 ** 0.5)):   # binomial, or over seeds
        assert standard_error(values, metric, 100) == pytest.approx(error)
    assert standard_error([0.2], 'unique', 100) is None and standard_error([12.0], 'nfe', 100) is None


def test_bench(run, trained, tmp_path):
    path = tmp_path / 'table.json'
    words = ['--suite=arithmetic', f'--init_from={trained[1]}', '--num_samples=20', '--num_seeds=2',
             '--steps=4', *CPU, f'--json={path}']
    out = went_well(run('bench', *words))
    table = json.loads(path.read_text())
    assert set(table) == {'command', 'rows'} and table['command'] == ' '.join(['python bench.py', *words])
    assert f'{trained[1]}: joint on arithmetic, iteration 4' in out
    rows = {(row['name'].split(':')[0], row['protocol']): row for row in table['rows']}
    grammar = rows['the grammar itself', 'free']
    assert grammar['valid'] == grammar['correct'] == 1 and grammar['nfe'] == 0
    assert len(rows) == len(table['rows']) == 1 + 3 + 1 + 2 * 4
    for (name, protocol), row in rows.items():
        assert row['n'] == 20 and row['seeds'] == 2 and row['name'] in out
        for share in ('balanced', 'valid', 'correct', 'unique', 'novel', 'length_tv'):
            assert 0 <= row[share] <= 1
        assert row['valid_se'] == pytest.approx((row['valid'] * (1 - row['valid']) / 40) ** 0.5)
        assert name in ('the grammar itself', 'AR', 'remask=causal', 'hybrid') or row['nfe'] <= 4
    assert rows['ancestral', 'given']['mean_length'] <= grammar['mean_length'] + 1e-9


def bench_settings(*words):
    """What bench.py hands to a suite: its settings, with the changes of a command line."""
    return SimpleNamespace(**configurator.configure(vars(load_script('bench')), [*CPU, *words]))


def test_bench_compares_runs(run, trained, tmp_path):
    """Seeds of one configuration share a row, with their standard error; others are named by a change."""
    runs = (('a', {}), ('b', dict(remask_ratio=0.25, allow_abstain=True)), ('c', {}))
    first, _, third = (
        write_checkpoint(tmp_path / f'{name}.pt', tiny_gpt(18, 64, seed=seed, n_recur=1), causal_ratio=0.3,
                         seed=seed, out_dir=name, **more) for seed, (name, more) in enumerate(runs))
    out = went_well(run('bench', '--suite=checkpoints', f'--init_from={tmp_path}/[ab].pt,{third}', *CPU,
                        '--num_samples=4', '--steps=3', '--eval_rows=6', f'--json={tmp_path}/table.json'))
    rows = json.loads((tmp_path / 'table.json').read_text())['rows']
    samplers = ['', 'remask=none', 'remask=wrong', 'remask=causal']
    other, more = 'remask_ratio=0.25, allow_abstain=True', [*samplers[:3], 'commit=abstain', samplers[3]]
    assert [(row['settings'], row['sampler'], row['seeds']) for row in rows] == [
        *(('the first', name, 2) for name in samplers), *((other, name, 1) for name in more)]
    assert {row['name'] for row in rows} == {f'{first}, {third}', f'{tmp_path}/b.pt'}
    for row in rows:
        drawn, asked = 'valid correct length_tv unique nfe', 'nelbo causal_nll auc fixed refilled'
        for metric in (drawn if row['sampler'] else asked).split():
            assert row[metric] is not None and (row[f'{metric}_se'] is None) == (row['seeds'] == 1)
        assert row['sampler'] in ('', 'remask=causal') or 0 < row['nfe'] <= 3
    for words in (f'| {first}, {third} | the first ', f'| {other} ', 'nelbo', 'valid %'):
        assert words in out

    # what stands there is the mean over the seeds
    val = loader.spread_rows(loader.load_data('arithmetic')[1]['val'], 6, 64)
    a, c = (train.evaluate(GPT.load(path)[0], val, ARITHMETIC, causal=False, bidirectional=True)['nelbo']
            for path in (first, third))
    assert rows[0]['nelbo'] == pytest.approx((a + c) / 2)
    assert rows[0]['nelbo_se'] == pytest.approx(abs(a - c) / 2)


def test_bench_knows_what_makes_two_runs_alike():
    """Not the seed, nor where it ran; of a checkpoint that it learned from only that there is one."""
    def recipe(config, **more):
        return checkpoints.recipe(dict(config=config, **{'iter_num': config['max_iters'], **more}))

    same = [dict(seed=1, init_from='x.pt', dtype='float32'), dict(seed=2, init_from='y.pt')]
    assert recipe(default_config(**same[0])) == recipe(default_config(**same[1]))
    plain = recipe(default_config())
    for changes in (same[0], dict(init_from='a.pt'), dict(learning_rate=0.1), dict(allow_abstain=True),
                    dict(remask_target='original'), dict(noise_mix='mask'), dict(max_iters=3),
                    dict(n_embd=64)):
        assert recipe(default_config(**changes)) != plain, changes
    head = recipe(dict(default_config(), energy_head=1))           # not a setting of train.py
    assert set(head) == set(plain) and head != plain
    assert recipe(default_config(init_from='resume')) == plain     # as older checkpoints say
    first, second, third = (
        recipe(default_config(), distilled=dict(teacher_steps=steps, seed=seed, init_from=path))
        for steps, seed, path in ((4, 1, 'a.pt'), (4, 2, 'b.pt'), (16, 1, 'a.pt')))
    assert first == second != plain and first != third and set(first) == set(plain)
    early = recipe(default_config(), iter_num=7)                   # is no seed of the finished run
    assert early != plain and early == recipe(default_config(seed=2), iter_num=7) and set(early) == set(plain)


def test_bench_merges_pair_by_pair(tmp_path, monkeypatch):
    seen, score = [], dict.fromkeys(('valid', 'correct', 'length_tv', 'unique', 'nfe'), 1.0)
    for name in ('a1', 'a2', 'b1', 'b2'):
        write_checkpoint(tmp_path / f'{name}.pt', seed=int(name[1]))

    def scores(s, path, other):
        seen.append((path[-5:], other[-5:]))
        return {'nelbo': 1.0}, {'x': score}
    monkeypatch.setattr(checkpoints, 'checkpoint_scores', scores)
    s = bench_settings(f'--init_from={tmp_path}/a*.pt', f'--merge_from={tmp_path}/b*.pt')
    rows, _ = checkpoints.run(s)
    assert seen == [('a1.pt', 'b1.pt'), ('a2.pt', 'b2.pt')] and rows[0]['settings'] == 'the first + the first'
    assert rows[0]['name'] == ', '.join(f'{tmp_path}/a{k}.pt + {tmp_path}/b{k}.pt' for k in (1, 2))
    assert [row['seeds'] for row in rows] == [2, 2] and rows[0]['auc'] is None
    write_checkpoint(tmp_path / 'b2.pt', seed=2, remask_ratio=0.25)
    rows, _ = checkpoints.run(s)
    found = [row['settings'] for row in rows[::2]]
    assert found == ['the first + the first', 'the first + remask_ratio=0.25']


@pytest.mark.parametrize('path', sorted(glob.glob(f'{ROOT}/config/*.py')), ids=os.path.basename)
def test_configs(path):
    """Every recipe sets only what train.py has, and what it sets goes together."""
    module = load_script('train')
    before = {name: setting.default for name, setting in configurator.settings(module.__file__).items()}
    config = configurator.configure(vars(module), [path])
    # remask_all writes the defaults out, stage0 says that there is nothing
    assert config != before or path.endswith(('stage0.py', 'remask_all.py'))
    assert os.path.exists(os.path.join(ROOT, 'data', config['dataset'], 'prepare.py'))
    meta = dict(STREAM, vocab_size=95, itos=[chr(c) for c in range(32, 127)])
    if config['dataset'].startswith('arithmetic'):
        meta = ARITHMETIC
    train.check_settings(config)
    check_fits(config, dict(meta, train_tokens=10 ** 6, val_tokens=10 ** 5, name=config['dataset']))
    sizes = ('block_size', 'n_layer', 'n_head', 'n_embd', 'n_recur', 'dropout')
    check_sizes(GPTConfig(vocab_size=meta['vocab_size'], **{name: config[name] for name in sizes}))


# -----------------------------------------------------------------------------
# mistakes in train.py

@pytest.mark.parametrize('words, message', [
    ('--max_iter=3', 'unknown key --max_iter .. did you mean --max_iters?'),
    ('config/remask_al.py', 'config/remask_al.py: no such config file'),
    ('--dataset=arithmetics', 'data/arithmetics/prepare.py .. did you mean arithmetic?'),
    ('--init_from=resume', 'ckpt_joint_all_positions.pt .. there is no checkpoint to resume from'),
    ('--init_from=nowhere.pt', 'nowhere.pt .. no such checkpoint'),
    ('--block_size=32', '64 .. set --block_size=64'),
    ('--n_embd=18 --n_head=4', 'n_embd must be a multiple .. n_embd=18'),
    ('--n_layer=0', 'n_layer must be at least 1'), ('--batch_size=0', 'batch_size must be at least 1, got 0'),
    ('--max_iters=0', 'max_iters must be at least 1'), ('--device=gpu', "device expects .. 'gpu'"),
    ('--dtype=float16', "dtype expects .. 'float16'"), ('--attention=flash', "attention expects .. 'flash'"),
    ('--training_type=remask', "training_type expects one of .. 'remask'"),
    ('--training_type=remasking', '--corruption=random'), ('--corruption=onw', "corruption knows .. 'onw'"),
    ('--causal_ratio=2', 'causal_ratio must be in 0..1'), ('--dropout=1', 'dropout must be in'),
    ('--training_type=denoising --remask_target=wrong', '--remask_target=original'),
    ('--noise_mix=mask:1,drop:1', "noise_mix knows .. 'mask:1,drop:1'"),
    ('--target_mask_prob=0.2', '--allow_abstain=True')])
def test_train_refuses(run, tmp_path, words, message):
    out = tmp_path / 'out'
    refused(run('train', *TINY, f'--out_dir={out}', *words.split()), 'train', *message.split(' .. '))
    assert not out.exists()                                        # nothing half done


def test_an_error_is_one_line_in_a_real_process(tmp_path):
    words = [*TINY, f'--out_dir={tmp_path}/out', '--n_embd=18', '--n_head=4']
    result = subprocess.run([sys.executable, 'train.py', *words], cwd=ROOT, capture_output=True, text=True)
    refused((result.returncode, result.stdout, result.stderr), 'train', 'n_embd must be a multiple')
    assert result.returncode == 1 and os.listdir(tmp_path) == []


# an alphabet in another order, and one without a letter
OTHER = dict(ARITHMETIC, itos=[*'9876543210()+*=', '<bos>', '<eos>', '<pad>'])
SMALL = dict(ARITHMETIC, vocab_size=17, itos=ARITHMETIC['itos'][1:], bos=14, eos=15, pad=16)


def test_train_refuses_a_checkpoint_of_another_size(run, tmp_path):
    """(One of other characters is read by character, see test_vocabulary.)"""
    words, path = [*TINY, f'--init_from={tmp_path}/x.pt', f'--out_dir={tmp_path}/out'], tmp_path / 'x.pt'
    write_checkpoint(path, tiny_gpt(18, 64, n_recur=1, n_layer=2))
    refused(run('train', *words), 'train', 'n_layer is 2 and 1')
    assert os.listdir(tmp_path) == ['x.pt']


def test_resuming_a_finished_run(run, tmp_path):
    """It says that nothing is left to do; with another optimiser it is refused."""
    words = [*TINY, '--training_type=unmasking', f'--out_dir={tmp_path}']
    path = tmp_path / 'ckpt_unmasking.pt'
    went_well(run('train', *words))
    before = os.stat(path).st_mtime_ns
    refused(run('train', *words, '--optimizer=adamw', '--init_from=resume'), 'train', 'optimizer')
    _, out, err = run('train', *words, '--init_from=resume', '--max_iters=2')
    assert os.stat(path).st_mtime_ns == before and 'saved' not in out and 'max_iters' in out + err


def test_out_dir_that_is_a_file(run, tmp_path):
    (tmp_path / 'out').write_text('x')
    refused(run('train', *TINY, f'--out_dir={tmp_path}/out'), 'train', f'{tmp_path}/out')


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the scripts and of the arithmetic dataset that a test may damage."""
    def left_out(folder, names):
        binary = [] if os.path.basename(folder) == 'arithmetic' else [n for n in names if n.endswith('.bin')]
        return ['__pycache__', *binary]

    loader.load_data('arithmetic')
    monkeypatch.setattr(loader, 'HERE', str(tmp_path / 'data'))
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(path, tmp_path)
    shutil.copytree(os.path.join(ROOT, 'data'), tmp_path / 'data', ignore=left_out)
    return tmp_path


def test_damaged_datasets(run, copy):
    folder = copy / 'data' / 'arithmetic'
    meta = json.loads((folder / 'meta.json').read_text())

    def damaged(*words):
        refused(run('train', *TINY, f'--out_dir={copy}/out', root=copy), 'train',
                'data/arithmetic is damaged', 'python data/arithmetic/prepare.py', *words)
        assert not (copy / 'out').exists()
    (folder / 'meta.json').write_text(json.dumps(dict(meta, val_tokens=64)))
    damaged('meta.json says 64')
    (folder / 'meta.json').write_text('{"train_tokens": 12')
    damaged()
    (folder / 'meta.json').write_text(json.dumps(meta))
    (folder / 'train.bin').unlink()
    damaged('train.bin')


def test_dataset_that_cannot_be_prepared(run, copy):
    """The prepare.py says on its own stderr what went wrong; train.py adds one line."""
    folder = copy / 'data' / 'offline'
    folder.mkdir()
    (folder / 'prepare.py').write_text('raise SystemExit("download failed: no network")')
    refused(run('train', *TINY, '--dataset=offline', f'--out_dir={copy}/out', root=copy), 'train',
            'the dataset offline is not there', 'python data/offline/prepare.py')
    assert not (copy / 'out').exists() and os.listdir(folder) == ['prepare.py']


def test_dataset_is_prepared_on_first_use(run, copy):
    for name in ('meta.json', 'train.bin', 'val.bin'):
        (copy / 'data' / 'arithmetic' / name).unlink()
    out = went_well(run('train', *TINY, '--max_iters=1', f'--out_dir={copy}/out', root=copy))
    assert 'preparing the dataset' in out
    assert sorted(os.listdir(copy / 'out')) == ['ckpt_joint_all_positions.pt', 'log.jsonl']


# -----------------------------------------------------------------------------
# mistakes in sample.py and bench.py

@pytest.mark.parametrize('words, message', [
    ('--prompt=(+x', "'x' in '(+x' is not in the vocabulary of arithmetic"),
    ('--length=63', 'a text of 63 tokens does not fit .. room for 62'),
    ('--remask=causal --length=9', 'the causal pass cannot see'),
    ('--ar_prefix=12 --length=9', 'the causal pass cannot see'),
    ('--commit=best', "commit expects one of random, threshold, left, confidence, margin .. got 'best'"),
    ('--remask=all', "remask expects one of .. 'all'"), ('--steps=0', 'steps must be at least 1'),
    ('--schedule=step --remask=none', 'schedule expects one of'), ('--top_p=0', 'top_p'),
    ('--commit=confidence --temperature=0 --choice_temperature=0',
     'one sample again and again .. --choice_temperature=4.5'),
    ('--num_samples=0', 'num_samples must be at least 1, got 0'), ('--top_p=1.5', 'top_p must be in 0..1'),
    ('--batch_size=0', 'batch_size must be at least 1'), ('--length=0', 'length must be at least 1'),
    ('--merge_weight=-0.1', 'merge_weight must be'), ('--merge_from=nowhere.pt', 'no such checkpoint'),
    ('--merge_weight=2', 'merge_weight must be in 0..1, got 2'), ('--top_k=0', 'top_k must be at least 1'),
    ('--commit=abstain', 'commit=abstain needs a checkpoint trained with --allow_abstain=True'),
    ('--temperature=-1', 'temperature must be at least 0'), ('--device=tpu', 'device expects'),
    ('--remask_rate=2', 'remask_rate is a probability, in 0..1'), ('--dtype=int8', 'dtype expects'),
    ('--num_sample=3', 'did you mean --num_samples?')])
def test_sample_refuses(run, trained, tmp_path, words, message):
    refused(run('sample', f'--init_from={trained[1]}', '--num_samples=2', f'--save={tmp_path}/s.jsonl', *CPU,
                *words.split()), 'sample', *message.split(' .. '))
    assert os.listdir(tmp_path) == []


def test_sample_refuses_checkpoints(run, trained, tmp_path):
    half, joint = tmp_path / 'half.pt', f'--init_from={trained[1]}'
    half.write_bytes(open(trained[1], 'rb').read()[:5000])
    broken, judge = f'--init_from={half}', checkpoint(tmp_path, 'remasking')
    plain, causal = checkpoint(tmp_path, 'unmasking'), checkpoint(tmp_path, 'causal')
    other = checkpoint(tmp_path / 'other', 'remasking', meta=OTHER)
    small = checkpoint(tmp_path / 'small', 'remasking', meta=SMALL)
    writer = checkpoint(tmp_path / '16', 'unmasking', tiny_gpt(3, 16), STREAM)
    short = checkpoint(tmp_path / '8', 'remasking', tiny_gpt(3, 8), STREAM)
    for words, message in (
            ([f'--out_dir={tmp_path}/empty'], f'no checkpoint in {tmp_path}/empty .. train one first'),
            ([broken], f'{half} .. truncated or damaged'),
            ([joint, judging(broken)], f'{half} .. truncated or damaged'),
            ([judge], 'remasking checkpoint .. --remask_from'),
            ([plain, '--remask=wrong'], 'not trained to find wrong .. --remask_from'),
            ([plain, '--remask=causal'], 'no trained causal mode'),
            ([judge, judging(plain)], 'not trained to find wrong tokens'),
            ([joint, judging(plain)], f'{tmp_path}/unmasking.pt .. not trained to find wrong'),
            ([joint, judging(judge), '--remask=random'], '--remask=random'),
            ([causal, judging(judge)], 'causal'),      # who would refill? that pass was never trained
            ([joint, judging(other)], f'{trained[1]} .. {tmp_path}/other .. itos'),
            ([joint, judging(small)], f'{tmp_path}/small .. vocab_size'),
            ([writer, judging(short)], 'block_size is 16 and 8')):
        refused(run('sample', *CPU, *words), 'sample', *message.split(' .. '))


def test_output_into_a_folder_that_is_not_there(run, trained, tmp_path):
    """It is refused before any work is done."""
    for script, words in (('sample', [f'--save={tmp_path}/no/s']),
                          ('bench', ['--num_samples=5', '--only=AR', f'--json={tmp_path}/no/s'])):
        status, out, err = run(script, f'--init_from={trained[1]}', *CPU, *words)
        refused((status, out, err), script, f'{tmp_path}/no/s', 'there is no folder')
        assert 'iteration' not in out and '| sampler' not in out and os.listdir(tmp_path) == []


def test_bench_refuses(run, trained, tmp_path):
    joint, judge = f'--init_from={trained[1]}', checkpoint(tmp_path, 'remasking')
    text = checkpoint(tmp_path, 'unmasking', tiny_gpt(3, 8), STREAM)
    suite, both = '--suite=checkpoints', f'{judge},{tmp_path}/unmasking.pt'
    for words, message in (
            ([joint, '--suite=speeed'], "'speeed'"), ([joint, '--num_seeds=0'], 'num_seeds must be at least'),
            (['--suite=samplers', '--budgets=0,8'], 'budgets expects numbers of passes, each at least 1'),
            ([joint, '--only=nothing'], "no row's name contains 'nothing'"), ([judge], 'cannot write'),
            ([f'--out_dir={tmp_path}/empty'], 'train one first'), ([text], 'take --suite=text'),
            ([joint, '--merge_weight=1.5'], 'merge_weight must be in 0..1, got 1.5'),
            ([joint, '--remask_rate=2'], 'remask_rate must be in 0..1, got 2'),
            ([joint, '--eval_rows=0'], 'eval_rows must be at least 1'),
            ([joint, f'--merge_from={tmp_path}/unmasking.pt'], 'do not fit together'),
            ([suite, f'--init_from={tmp_path}/x*.pt'], f"no checkpoint matches '{tmp_path}/x*.pt'"),
            ([suite, both, f'--merge_from={tmp_path}/r*.pt'], 'matches 1 checkpoints, init_from 2')):
        refused(run('bench', '--num_samples=5', *CPU, *words), 'bench', message)


def test_bench_leaves_out_what_it_cannot_measure(run, trained, tmp_path, monkeypatch):
    """A text that runs on has no samples to score, a judge no samples at all, a torn file nothing."""
    text = checkpoint(tmp_path, 'unmasking', tiny_gpt(3, 8), STREAM).partition('=')[2]
    judge = checkpoint(tmp_path, 'remasking', corruption='random').partition('=')[2]
    (tmp_path / 'torn.pt').write_bytes(b'x')
    rows = torch.randint(3, (10, 8))
    load = checkpoints.data_of
    monkeypatch.setattr('suites.checkpoints.data_of', lambda meta, config: (
        (meta, {'val': rows}) if meta['name'] == 'text' else load(meta, config)))
    words = ['--suite=checkpoints', '--num_samples=2', '--steps=2', '--eval_rows=6', *CPU]
    path, whole = tmp_path / 't.json', trained[1]
    paths = f'{tmp_path}/torn.pt,{text},{judge},{whole}'
    went_well(run('bench', *words, f'--init_from={paths}', f'--json={path}'))
    rows = json.loads(path.read_text())['rows']
    found = [(row['name'], row['sampler']) for row in rows]
    samplers = ['', 'remask=none', 'remask=wrong', 'remask=causal']
    assert found == [(text, ''), (judge, ''), *((whole, sampler) for sampler in samplers)]
    assert len(rows) == 6 and rows[0]['nelbo'] and [row['auc'] for row in rows if row['name'] == judge][0]
    status, out, err = run('bench', *words, f'--init_from={tmp_path}/torn.pt')
    refused((status, out, err.split('\r')[-1]), 'bench', 'none of the 1 checkpoints')


@pytest.mark.parametrize('script', ['train', 'sample', 'bench'])
def test_help(run, script):
    """Every setting says what it is for."""
    status, out, err = run(script, '--help')
    assert status == 0 and f'usage: python {script}.py' in out and err == ''
    for name, setting in configurator.settings(os.path.join(ROOT, f'{script}.py')).items():
        assert f'--{name}=' in out and setting.comment, name


def test_importing_a_script_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['x', '--nonsense'])
    state = torch.get_rng_state()
    for script in ('train', 'sample', 'bench', 'model'):
        load_script(script)
    assert os.listdir(tmp_path) == [] and torch.equal(torch.get_rng_state(), state)
    assert default_config()['training_type'] == 'joint'


# -----------------------------------------------------------------------------
# what is told

@pytest.mark.parametrize('changes, told', [
    (dict(), []), (dict(training_type='unmasking', remask_target='wrong'), ['remask_target: no say']),
    (dict(training_type='remasking', remask_ratio=0.1, mask_weighting='token'),
     ['mask_weighting:', 'remask_ratio:']),
    (dict(training_type='causal', views=2), ['views:']),
    (dict(training_type='causal', prefix_ratio=0.5), ['prefix_ratio:']),
    (dict(training_type='denoising', full_ratio=1.0), ['full_ratio:']),
    (dict(corruption='noise', full_ratio=1.0), ['full_ratio:']),
    (dict(corruption='own,noise', full_ratio=1.0), []),
    (dict(init_from='out/ckpt.pt', mask_logit_bias=1.0), ['mask_logit_bias:']),
    (dict(mask_bias_limit=5.0), ['mask_bias_limit: no say']),
    (dict(mask_logit_bias=1.0, mask_bias_limit=5.0), []),
    (dict(sigma_max=0.5), ['sigma_max: no say, since nothing is corrupted by noise']),
    (dict(sigma_max=0.5, corruption='own:0.5,noise:0.5'), []),
    (dict(training_type='denoising', sigma_max=0.5), []),
    (dict(optimizer='adamw', muon_lr=0.1, lr_schedule='cosine', decay_share=0.1),
     ['muon_lr:', 'decay_share:']),
    (dict(remasking_loss_type='corrupted_only', masking_warmup_iters=9), ['masking_warmup_iters:'])], ids=str)
def test_settings_without_a_say_are_named(changes, told):
    defaults = {name: setting.default for name, setting in configurator.settings(f'{ROOT}/train.py').items()}
    lines = idle({**defaults, **changes}, defaults)
    assert len(lines) == len(told) and all(map(str.startswith, lines, told)), lines


@pytest.mark.parametrize('path', sorted(glob.glob(f'{ROOT}/config/*.py')), ids=os.path.basename)
def test_every_setting_of_a_config_has_a_say(path):
    module = load_script('train')
    defaults = configurator.current(vars(module))
    assert idle(configurator.configure(vars(module), [path]), defaults) == []


def test_what_training_proposes_works(run, tmp_path):
    """What a network that judges proposes is to score a text; another one samples by it."""
    plain, out = tmp_path / 'plain', tmp_path / 'judge'
    words = went_well(run('train', *TINY, 'config/unmask.py', '--remask_target=wrong', f'--out_dir={plain}'))
    assert 'remask_target: no say, since training_type=unmasking has no wrong tokens' in words
    command = words.rpartition('sample from it: python ')[2].split()
    went_well(run(command[0].removesuffix('.py'), *command[1:], '--num_samples=1', '--steps=2', *CPU))
    words = went_well(run('train', *TINY, 'config/remask_only.py', f'--out_dir={out}'))
    assert 'sample from it' not in words and 'wrong tokens found: AUC' in words
    score = shlex.split(words.rpartition(' texts: python sample.py ')[2].splitlines()[0])
    assert 'p(WRONG) of every token' in went_well(run('sample', *score, *CPU))
    more = words.rpartition(', with ')[2].split(',')[0]
    words = went_well(run('sample', *command[1:], more, '--num_samples=1', '--steps=2', *CPU))
    assert 'remask=wrong' in words


def test_results_come_first(run, trained):
    out = went_well(run('sample', f'--init_from={trained[1]}', '--num_samples=2', '--seed=3', *CPU))
    lines = out.splitlines()
    assert all('✗' in line or '✓' in line for line in lines[:2]) and lines[2] == ''
    for words in ('override: seed = 3', f'{trained[1]}: joint', 'remask=causal, ar_prefix=0', '2 samples, '):
        assert any(line.startswith(words) for line in lines[3:]), words
    assert 'commit' not in out                                     # it has no say


def test_a_folder_and_those_below(run, trained, tmp_path):
    """ckpt is the newest in out_dir itself, whatever a suite or a second stage has trained below it."""
    shutil.copy(trained[1], tmp_path / 'ckpt_joint_all_positions.pt')
    checkpoint(tmp_path / 'faults' / '0', 'ckpt_unmasking')
    out = went_well(run('sample', f'--out_dir={tmp_path}', '--num_samples=1', *CPU))
    assert f'{tmp_path}/ckpt_joint_all_positions.pt: joint' in out
    assert f'below it there are others: {tmp_path}/faults/0/ckpt_unmasking.pt' in out


def test_presets_side_by_side(run, trained, tmp_path):
    """The first sample of each, then the second, each as by itself, and the page says which is which."""
    words = ['--init_from=ckpt', f'--out_dir={trained[0]}', '--num_samples=2', '--steps=3', *CPU]
    both = went_well(run('sample', *words, '--preset=ancestral,intelligent', f'--save={tmp_path}/both.jsonl',
                         f'--html={tmp_path}/page.html'))
    for name in ('ancestral', 'intelligent'):
        went_well(run('sample', *words, f'--preset={name}', f'--save={tmp_path}/{name}.jsonl'))
    names = 'both', 'ancestral', 'intelligent'
    samples, one, two = (read_samples(tmp_path / f'{name}.jsonl') for name in names)
    assert samples == [one[0], two[0], one[1], two[1]]
    page, by = Page(tmp_path / 'page.html'), 'commit=random, remask=none, steps=3'
    assert [story['by'].startswith(by) for story in page.data()['stories']] == [True, False] * 2
    assert both.count(by) == 3 and '2 samples, each: 3.0 passes (NFE)\n' in both
    assert f'{by}, ar_prefix=0; 3 passes a sample' in page.text
    refused(run('sample', '--preset=ancestral,inteligent', '--init_from=no.pt'), 'sample', 'did you mean')


def test_animate_shows_every_step_as_it_happens(run, trained, monkeypatch):
    """One sample after the other, and the same texts as without it, one at a time."""
    pytest.importorskip('rich')
    passes, shown, plain = [], [], show.painted
    monkeypatch.setattr(show, 'painted', lambda *args: (shown.append(len(passes)), plain(*args))[1])
    first = GPT.forward
    monkeypatch.setattr(GPT, 'forward', lambda *args, **more: (passes.append(1), first(*args, **more))[1])
    words = ['--init_from=ckpt', f'--out_dir={trained[0]}', '--num_samples=2', '--remask=wrong', '--steps=4',
             *CPU]
    out = went_well(run('sample', *words, '--animate=True'))
    assert len(shown) == 10 and shown[0] <= 3 and len(passes) > shown[4]      # a step is judged, too
    assert 'sample 1 · step 4 · 0 masked' in out and 'sample 2 · step 4 · 0 masked' in out
    assert 'samples/s' not in out
    alone = went_well(run('sample', *words, '--batch_size=1'))
    texts = [line for line in alone.splitlines() if '✗' in line or '✓' in line]
    assert len(texts) == 2 and all(text in out for text in texts)


def test_animate_needs_rich_before_anything_is_loaded(run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'rich.console', None)
    refused(run('sample', '--animate', '--init_from=nowhere.pt'), 'sample', 'pip install rich')


@pytest.mark.parametrize('words, message', [
    ('--commit=best', 'commit expects one of'), ('--remask=best', 'remask expects'),
    ('--preset=x', 'unknown preset')])
def test_unknown_rules_are_found_before_anything_is_loaded(run, words, message):
    refused(run('sample', words, '--init_from=nowhere.pt'), 'sample', message)


def test_help_begins_with_what_a_script_is_for(run):
    for path in glob.glob(f'{ROOT}/data/*/prepare.py') + glob.glob(f'{ROOT}/tools/[!c]*.py'):
        status, out, _ = run(path, '--help')
        name = os.path.relpath(path, ROOT)
        first, _, usage = out.partition('\n\n')
        assert status == 0 and usage.startswith(f'usage: python {name} ') and first.endswith('.'), name
