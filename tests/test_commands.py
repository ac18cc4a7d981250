"""The commands as a user types them: what works end to end, and that a mistake is one line and leaves no trace."""

import glob
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ARITHMETIC, ROOT, default_config, load_script, tiny_gpt, write_checkpoint

import configurator
import train
from model import GPTConfig, check_config

TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--n_recur=1', '--batch_size=4', '--max_iters=4',
        '--eval_interval=4',
        '--eval_rows=16', '--eval_samples=0', '--log_interval=2', '--device=cpu', '--dtype=float32']
CPU = ['--device=cpu', '--dtype=float32']
STREAM = dict(ARITHMETIC, name='text', format='stream', block_size=None, vocab_size=3, itos=['a', 'b', '\n'], bos=None,
              eos=None, pad=None)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A joint checkpoint with a causal mode, made by a process of its own: (its folder, the path, what was printed)."""
    out = tmp_path_factory.mktemp('trained')
    command = [sys.executable, 'train.py', *TINY, '--training_type=joint', '--causal_ratio=0.5', f'--out_dir={out}']
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
    assert os.listdir(out) == [os.path.basename(path)]
    for words in ('override: n_embd = 16', 'step 4/4', 'step 4  validation: NELBO', 'causal NLL', 'AUC',
                  f'saved {path}',
                  f'python sample.py --init_from={path}'):
        assert words in text, text


def read_samples(path):
    return [json.loads(line) for line in open(path, encoding='utf-8')]


@pytest.mark.parametrize('words', [
    [], ['--prompt=(+'], ['--commit=confidence', '--steps=8', '--schedule=cosine'], ['--remask=wrong', '--length=9'],
    ['--remask=random', '--remask_rate=0.1', '--steps=12', '--top_k=5'], ['--ar_prefix=8', '--steps=6', '--top_p=0.9'],
    ['--remask=none', '--commit=left_to_right', '--temperature=0.5', '--length=62'],
], ids=' '.join)
def test_sampling(run, trained, tmp_path, words):
    files = [tmp_path / name for name in ('a.jsonl', 'b.jsonl', 'c.jsonl')]
    for path, seed in zip(files, (5, 5, 6)):
        status, out, err = run('sample', '--init_from=ckpt', f'--out_dir={trained[0]}', '--num_samples=3', *CPU, *words,
                               f'--save={path}', f'--seed={seed}')
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
    judge = write_checkpoint(tmp_path / 'j' / 'ckpt_r.pt', tiny_gpt(18, 64, seed=1, n_recur=1),
                             training_type='remasking')
    status, out, err = run('sample', f'--init_from={writer}', f'--remask_from={judge}', '--num_samples=2', '--steps=5',
                           *CPU)
    assert status == 0, err
    assert 'remask=wrong' in out and '9.0 passes each' in out             # 5 of the writer, 4 of the judge


def test_sampling_ar(run, tmp_path):
    path = write_checkpoint(tmp_path / 'a' / 'ckpt_causal.pt', training_type='causal')
    status, out, err = run('sample', f'--init_from={path}', '--num_samples=2', f'--save={tmp_path}/s.jsonl', *CPU)
    assert status == 0, err
    assert all(s['nfe'] == len(s['tokens']) - 1 for s in read_samples(tmp_path / 's.jsonl'))


def test_settings_reach_the_sampler(trained):
    """What the command line says is what generate is called with."""
    wanted = dict(steps=7, schedule='cosine', commit='confidence', remask='wrong', remask_rate=0.7,
                  remask_random_ratio=0.2,
                  correct_share=0.5, ar_prefix=3, temperature=0.9, top_k=5, top_p=0.8, choice_temperature=2.5, seed=11,
                  batch_size=13)
    module, calls = load_script('sample'), []

    def generate(model, meta, num, **more):
        calls.append((num, more))
        return [dict(text='1=1', tokens=[1], nfe=1, finished=True)] * num

    module.generate = generate
    configurator.configure(vars(module), [f'--init_from={trained[1]}', '--num_samples=4', '--prompt=(+', '--length=9',
                                          *CPU,
                                          *[f'--{name}={value}' for name, value in wanted.items()]])
    module.main()
    (num, more), = calls
    assert num == 4 and more['prompt'] == [10, 12] and more['lengths'].tolist() == [9] * 4
    assert more['remask_model'] is None
    assert {name: more[name] for name in wanted} == wanted


def test_bench_measures_what_the_checkpoint_can_do():
    bench = load_script('bench')

    def names(**config):
        return [(name.split(':')[0], protocol, rules) for name, protocol, rules in
                bench.sampler_rows(default_config(**config), 20, 64)]
    ar = ('AR', 'free', dict(ar_prefix=64))
    assert names(training_type='causal') == [ar] and names(training_type='remasking') == []
    for kind, ratio, causal, wrong in (('unmasking', 0.0, 0, False), ('unmasking', 0.3, 1, False),
                                       ('joint', 0.0, 0, True),
                                       ('joint', 0.3, 1, True)):
        rows = names(training_type=kind, causal_ratio=ratio)
        assert (ar in rows) == bool(causal)
        remask = [rules.get('remask') for _, _, rules in rows]
        assert (remask.count('causal'), 'wrong' in remask) == (causal, wrong)


def test_bench_standard_errors():
    bench = load_script('bench')
    assert bench.standard_error([0.2], 'valid', 100) == pytest.approx(0.04)                       # binomial
    assert bench.standard_error([0.1, 0.2, 0.3], 'valid', 100) == pytest.approx((0.16 / 300) ** 0.5)
    assert bench.standard_error([0.2, 0.4, 0.6], 'unique', 100) == pytest.approx(0.2 / 3 ** 0.5)  # over seeds
    assert bench.standard_error([0.2], 'unique', 100) is None
    assert bench.standard_error([12.0], 'nfe', 100) is None


def test_bench(run, trained, tmp_path):
    path = tmp_path / 'table.json'
    words = ['--suite=arithmetic', f'--init_from={trained[1]}', '--num_samples=20', '--num_seeds=1', '--steps=4', *CPU]
    status, out, err = run('bench', *words, f'--json={path}')
    assert status == 0, err
    table = json.loads(path.read_text())
    assert table['checkpoint'] == trained[1] and '--num_samples=20' in table['command']
    assert table['config']['training_type'] == 'joint' and table['result']['nelbo'] > 0
    rows = {(row['name'].split(':')[0], row['protocol']): row for row in table['rows']}
    grammar = rows['the grammar itself', 'free']
    assert grammar['valid'] == grammar['correct'] == 1 and grammar['nfe'] == 0
    assert len(rows) == len(table['rows']) == 1 + 3 + 2 * 5
    for (name, protocol), row in rows.items():
        assert row['n'] == 20 and row['seeds'] == 1 and row['name'] in out
        assert all(0 <= row[share] <= 1 for share in ('balanced', 'valid', 'correct', 'unique', 'novel', 'length_tv'))
        assert row['valid_se'] == pytest.approx((row['valid'] * (1 - row['valid']) / 20) ** 0.5)
        if name not in ('the grammar itself', 'AR', 'remask=causal', 'hybrid'):
            assert row['nfe'] <= 4
    assert rows['ancestral', 'given']['mean_length'] <= grammar['mean_length'] + 1e-9
    status, out, err = run('bench', *words, '--num_seeds=2', '--only=ancestral', f'--json={path}')
    assert status == 0, err
    rows = json.loads(path.read_text())['rows']
    assert len(rows) == 4 and all(row['valid_se'] is not None and row['seeds'] == 2 for row in rows)


@pytest.mark.parametrize('path', sorted(glob.glob(os.path.join(ROOT, 'config', '*.py'))), ids=os.path.basename)
def test_configs(path):
    """Every recipe sets only what train.py has, and what it sets goes together."""
    module = load_script('train')
    before = {name: setting.default for name, setting in configurator.settings(module.__file__).items()}
    config = configurator.configure(vars(module), [path])
    assert config != before
    meta = dict(train_tokens=10 ** 6, val_tokens=10 ** 5, name=config['dataset'])
    meta = {**ARITHMETIC, **meta} if config['dataset'] == 'arithmetic' else {**STREAM, **meta}
    assert os.path.exists(os.path.join(ROOT, 'data', config['dataset'], 'prepare.py'))
    train.parse_mixture(config['corruption'])
    train.check_settings(config, meta)
    check_config(GPTConfig(vocab_size=meta['vocab_size'], **{name: config[name] for name in (
        'block_size', 'n_layer', 'n_head', 'n_embd', 'n_recur', 'dropout')}))

# -----------------------------------------------------------------------------
# mistakes in train.py


@pytest.mark.parametrize('words, message', [
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
    (['--dropout=1'], ['dropout must be in']),
], ids=lambda value: ' '.join(value) if value[0].startswith(('--', 'config')) else '')
def test_train_refuses(run, tmp_path, words, message):
    out = tmp_path / 'out'
    refused(run('train', *TINY, f'--out_dir={out}', *words), 'train', *message)
    assert not out.exists()                                               # nothing half done


def test_an_error_is_one_line_in_a_real_process(tmp_path):
    result = subprocess.run([sys.executable, 'train.py', *TINY, f'--out_dir={tmp_path}/out', '--n_embd=18',
                             '--n_head=4'],
                            cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith('train.py: n_embd must be a multiple')
    assert len(result.stderr.splitlines()) == 1 and os.listdir(tmp_path) == []


def test_train_refuses_a_checkpoint_of_another_vocabulary(run, tmp_path):
    other = dict(ARITHMETIC, itos=[*'9876543210()+*=', '<bos>', '<eos>', '<pad>'])
    small = dict(ARITHMETIC, vocab_size=17, itos=ARITHMETIC['itos'][1:])
    for meta, word in ((other, 'itos'), (small, 'vocab_size is 17 and 18')):
        path = write_checkpoint(tmp_path / 'x.pt', meta=meta)
        refused(run('train', *TINY, f'--init_from={path}', f'--out_dir={tmp_path}/out'), 'train', path, 'do not fit',
                word)
    path = write_checkpoint(tmp_path / 'x.pt', tiny_gpt(18, 64, n_recur=1, n_layer=2))
    refused(run('train', *TINY, f'--init_from={path}', f'--out_dir={tmp_path}/out'), 'train', 'n_layer is 2 and 1')
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
def copy(tmp_path):
    """A copy of the scripts and of the arithmetic dataset that a test may damage."""
    train.load_data('arithmetic')
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(path, tmp_path)
    shutil.copytree(os.path.join(ROOT, 'data'), tmp_path / 'data', ignore=shutil.ignore_patterns('__pycache__'))
    return tmp_path


def test_damaged_datasets(run, copy):
    folder = copy / 'data' / 'arithmetic'
    meta = json.loads((folder / 'meta.json').read_text())
    words = [*TINY, f'--out_dir={copy}/out']
    (folder / 'meta.json').write_text(json.dumps(dict(meta, val_tokens=64)))
    refused(run('train', *words, root=copy), 'train', 'data/arithmetic is damaged', 'meta.json says 64',
            'python data/arithmetic/prepare.py')
    (folder / 'meta.json').write_text('{"train_tokens": 12')
    refused(run('train', *words, root=copy), 'train', 'data/arithmetic is damaged', 'python data/arithmetic/prepare.py')
    (folder / 'meta.json').write_text(json.dumps(meta))
    (folder / 'train.bin').unlink()
    refused(run('train', *words, root=copy), 'train', 'data/arithmetic is damaged', 'train.bin')
    assert not (copy / 'out').exists()


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
    status, out, err = run('train', *TINY, '--max_iters=1', f'--out_dir={copy}/out', root=copy)
    assert status == 0, err
    assert 'preparing the dataset' in out and len(os.listdir(copy / 'out')) == 1

# -----------------------------------------------------------------------------
# mistakes in sample.py and bench.py


@pytest.mark.parametrize('words, message', [
    (['--prompt=(+x'], ["'x' in '(+x' is not in the vocabulary of arithmetic"]),
    (['--length=63'], ['length 63 does not fit', 'room for 62']),
    (['--length=2', '--prompt=(+12'], ['the prompt has 4 tokens, there is room for 2']),
    (['--prompt=' + '1' * 63], ['the prompt has 63 tokens']),
    (['--remask=causal', '--length=9'], ['the causal pass cannot see']),
    (['--ar_prefix=12', '--length=9'], ['the causal pass cannot see']),
    (['--commit=best'], ["commit expects one of random, confidence, left_to_right; got 'best'"]),
    (['--remask=all'], ["remask expects one of", "'all'"]),
    (['--schedule=step', '--remask=none'], ['schedule expects one of']),
    (['--commit=confidence', '--temperature=0'], ['one sample again and again', '--choice_temperature=4.5']),
    (['--num_samples=0'], ['num_samples must be at least 1, got 0']),
    (['--batch_size=0'], ['batch_size must be at least 1']),
    (['--steps=0'], ['steps must be at least 1']),
    (['--length=0'], ['length must be at least 1']),
    (['--top_p=0'], ['top_p']), (['--top_p=1.5'], ['top_p must be in 0..1']),
    (['--top_k=0'], ['top_k must be at least 1']),
    (['--temperature=-1'], ['temperature must be at least 0']), (['--remask_rate=2'], ['remask_rate must be in 0..1']),
    (['--device=tpu'], ['device expects']), (['--dtype=int8'], ['dtype expects']),
    (['--num_sample=3'], ['did you mean --num_samples?']), (['--steps=1.5'], ['steps expects an int']),
], ids=lambda value: ' '.join(value)[:30] if value[0].startswith('--') else '')
def test_sample_refuses(run, trained, tmp_path, words, message):
    result = run('sample', f'--init_from={trained[1]}', '--num_samples=2', f'--save={tmp_path}/s.jsonl', *CPU, *words)
    refused(result, 'sample', *message)
    assert os.listdir(tmp_path) == []


def test_sample_refuses_checkpoints(run, trained, tmp_path):
    refused(run('sample', f'--out_dir={tmp_path}/empty'), 'sample', f'no checkpoint under {tmp_path}/empty',
            'train one first')
    half = tmp_path / 'half.pt'
    half.write_bytes(open(trained[1], 'rb').read()[:5000])
    refused(run('sample', f'--init_from={half}', *CPU), 'sample', half, 'truncated or damaged')
    refused(run('sample', f'--init_from={trained[1]}', f'--remask_from={half}', *CPU), 'sample', half,
            'truncated or damaged')
    judge = write_checkpoint(tmp_path / 'ckpt_remasking_all_positions.pt', training_type='remasking')
    refused(run('sample', f'--init_from={judge}', *CPU), 'sample', 'remasking checkpoint', '--remask_from')
    plain = write_checkpoint(tmp_path / 'ckpt_unmasking.pt', training_type='unmasking')
    refused(run('sample', f'--init_from={plain}', '--remask=wrong', *CPU), 'sample', 'not trained to find wrong',
            '--remask_from')
    refused(run('sample', f'--init_from={plain}', '--remask=causal', *CPU), 'sample', 'no trained causal mode')
    refused(run('sample', f'--init_from={judge}', f'--remask_from={plain}', *CPU), 'sample', 'remasking checkpoint')
    refused(run('sample', f'--init_from={trained[1]}', f'--remask_from={plain}', *CPU), 'sample', plain,
            'not trained to find wrong')
    refused(run('sample', f'--init_from={trained[1]}', f'--remask_from={judge}', '--remask=random', *CPU), 'sample',
            '--remask=random')


def test_sample_refuses_a_judge_of_another_vocabulary(run, trained, tmp_path):
    other = dict(ARITHMETIC, itos=[*'9876543210()+*=', '<bos>', '<eos>', '<pad>'])
    judge = write_checkpoint(tmp_path / 'j.pt', meta=other, training_type='remasking')
    refused(run('sample', f'--init_from={trained[1]}', f'--remask_from={judge}', *CPU), 'sample', trained[1], judge,
            'itos')
    small = dict(ARITHMETIC, vocab_size=17, itos=ARITHMETIC['itos'][1:])
    judge = write_checkpoint(tmp_path / 'j.pt', meta=small, training_type='remasking')
    refused(run('sample', f'--init_from={trained[1]}', f'--remask_from={judge}', *CPU), 'sample', judge, 'vocab_size')


def test_sample_refuses_a_judge_of_another_length(run, tmp_path):
    writer = write_checkpoint(tmp_path / 'w.pt', tiny_gpt(3, 16), STREAM, training_type='unmasking')
    judge = write_checkpoint(tmp_path / 'j.pt', tiny_gpt(3, 8), STREAM, training_type='remasking')
    refused(run('sample', f'--init_from={writer}', f'--remask_from={judge}', *CPU), 'sample', 'block_size is 16 and 8')


def test_sample_refuses_a_judge_that_never_learned_to_say_wrong(run, tmp_path):
    for kind in ('remasking', 'joint'):
        judge = write_checkpoint(tmp_path / 'j.pt', training_type=kind, remask_target='original')
        writer = write_checkpoint(tmp_path / 'w.pt', training_type='unmasking')
        refused(run('sample', f'--init_from={writer}', f'--remask_from={judge}', '--steps=2', *CPU), 'sample', judge)
    refused(run('sample', f'--init_from={tmp_path}/j.pt', '--remask=wrong', '--steps=2', *CPU), 'sample', 'wrong')


def test_sample_refuses_to_judge_what_a_causal_checkpoint_writes(run, tmp_path):
    """The refilling would be left to a bidirectional pass that was never trained."""
    writer = write_checkpoint(tmp_path / 'w.pt', training_type='causal')
    judge = write_checkpoint(tmp_path / 'j.pt', training_type='remasking')
    refused(run('sample', f'--init_from={writer}', f'--remask_from={judge}', '--num_samples=2', *CPU), 'sample',
            'causal')


def test_sample_into_a_folder_that_is_not_there(run, trained, tmp_path):
    missing = tmp_path / 'no' / 's.jsonl'
    status, out, err = run('sample', f'--init_from={trained[1]}', f'--save={missing}', *CPU)
    refused((status, out, err), 'sample', missing, 'there is no folder')
    assert 'iteration' not in out and os.listdir(tmp_path) == []          # before any work is done


def test_bench_refuses(run, trained, tmp_path):
    judge = write_checkpoint(tmp_path / 'j.pt', training_type='remasking')
    text = write_checkpoint(tmp_path / 't.pt', tiny_gpt(3, 8), STREAM, training_type='unmasking')
    for words, message in (([f'--init_from={trained[1]}', '--suite=speeed'], "'speeed'"),
                           ([f'--init_from={trained[1]}', '--num_seeds=0'], 'num_seeds must be at least 1'),
                           ([f'--init_from={trained[1]}', '--only=nothing'], "no row's name contains 'nothing'"),
                           ([f'--out_dir={tmp_path}/empty'], 'train one first'),
                           ([f'--init_from={judge}'], 'cannot write'),
                           ([f'--init_from={text}'], 'trained on arithmetic')):
        refused(run('bench', '--num_samples=5', *CPU, *words), 'bench', message)


def test_bench_into_a_folder_that_is_not_there(run, trained, tmp_path):
    status, out, err = run('bench', f'--init_from={trained[1]}', '--num_samples=5', '--num_seeds=1', '--only=AR', *CPU,
                           f'--json={tmp_path}/no/table.json')
    assert '| sampler' not in out
    refused((status, out, err), 'bench', 'no/table.json')


@pytest.mark.parametrize('script', ['train', 'sample', 'bench'])
def test_help(run, script):
    status, out, err = run(script, '--help')
    assert status == 0 and f'usage: python {script}.py' in out and err == ''
    for name, setting in configurator.settings(os.path.join(ROOT, f'{script}.py')).items():
        assert f'--{name}=' in out and setting.comment, name              # every setting says what it is for


def test_importing_a_script_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['x', '--nonsense'])
    state = torch.get_rng_state()
    for script in ('train', 'sample', 'bench', 'model'):
        load_script(script)
    assert os.listdir(tmp_path) == [] and torch.equal(torch.get_rng_state(), state)
    assert default_config()['training_type'] == 'joint'
