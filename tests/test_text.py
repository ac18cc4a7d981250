"""The suite of text, on networks and texts so small that the answer is known; what training says of text."""

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import default_config, tiny_gpt, write_checkpoint
from test_commands import bench_settings
from test_train import log_of, newest, read, start

from configurator import UserError
from data import loader
from plumbing.evaluate import causal_nll
from plumbing.textstats import token_statistics
from suites import runs, text

T, V = 12, 4
META = dict(name='words', format='stream', block_size=None, vocab_size=V, tokenizer='char',
            itos=['a', 'b', "'", ' '], bos=None, eos=None, pad=None)
UNEVEN = torch.tensor([0.35, 0.3, 0.1, 0.25])


def plant(folder, monkeypatch, meta, ids):
    """A dataset of these ids (N,), the last 100 for validation; returns its splits."""
    out = folder / 'data' / meta['name']
    out.mkdir(parents=True)
    ids = np.asarray(ids, dtype='<u2')
    ids[:-100].tofile(out / 'train.bin')
    ids[-100:].tofile(out / 'val.bin')
    (out / 'meta.json').write_text(json.dumps(dict(meta, train_tokens=len(ids) - 100, val_tokens=100)))
    (out / 'prepare.py').write_text('raise SystemExit("no network")')
    monkeypatch.setattr(loader, 'HERE', str(folder / 'data'))
    text.corpus_of.cache_clear()
    return loader.load_data(meta['name'])[1]


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A dataset of random characters; returns its splits."""
    return plant(tmp_path, monkeypatch, META, torch.multinomial(UNEVEN, 500, replacement=True,
                                                                generator=torch.Generator().manual_seed(0)))

# -----------------------------------------------------------------------------
# training


TEXT = ['--dataset=words', f'--block_size={T}', '--training_type=unmasking', '--max_iters=2',
        '--eval_interval=2', '--eval_rows=4']


def test_samples_of_text_are_compared_with_the_data(words, tmp_path, capsys):
    start(str(tmp_path / 'out'), *TEXT, '--eval_samples=100', '--sample_prompt=ab a')
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line[5:9] == 'ab a']
    assert len(lines) == 4 and 'warning' not in out
    pieces = loader.spread_rows(words['train'], 16, T)[:, 4:].tolist()
    usual = token_statistics(pieces)
    assert f"(training data {usual['entropy']:.2f}), different 3-grams" in out
    record, = [line for line in log_of(tmp_path / 'out') if 'entropy' in line]
    assert record['step'] == 2 and 0.8 < record['entropy'] <= math.log(V) and 0 < record['distinct_3'] <= 1
    assert {'step': 2, **read(str(tmp_path / 'out'))['result']} == record


@pytest.mark.parametrize('tokens, warned', [([0] * T, True), ([0, 1, 2, 3] * (T // 4), True),
                                            ([0, 1, 2, 3, 0, 2, 1, 3, 3, 1, 2, 0], False)])
def test_a_collapse_is_reported(words, tmp_path, capsys, tokens, warned):
    def patch(module):
        sample = dict(tokens=tokens, text=''.join(META['itos'][i] for i in tokens))
        module.generate = lambda model, meta, num, **more: [sample] * num
    module = start(str(tmp_path / 'out'), *TEXT, '--eval_samples=2', patch=patch)
    out = capsys.readouterr().out
    assert ('warning: the samples collapse' in out) == warned
    assert out.count(repr(module.generate(0, 0, 1)[0]['text'])) == 2


@pytest.mark.parametrize('prompt, message', [
    ('abx', "sample_prompt: 'x' in 'abx' is not in the vocabulary"),
    ('a' * T, f'sample_prompt has {T} tokens, which leaves nothing to write')])
def test_a_prompt_that_does_not_fit_is_refused_before_any_work(words, tmp_path, prompt, message):
    with pytest.raises(UserError, match=message):
        start(str(tmp_path / 'out'), *TEXT, f'--sample_prompt={prompt}')
    assert not os.path.exists(tmp_path / 'out')


def test_a_checkpoint_says_how_long_its_training_took(words, tmp_path, monkeypatch):
    """The time of the steps, over a resume, without that of the evaluations."""
    clock = [0.0]
    monkeypatch.setattr('plumbing.run.time', SimpleNamespace(
        time=lambda: clock[0], perf_counter=lambda: clock[0]))

    def patch(module):
        step, evaluate = module.training_step, module.evaluate

        def taking(seconds, function):
            def call(*args, **more):
                clock[0] += seconds
                return function(*args, **more)
            return call
        module.training_step, module.evaluate = taking(2.0, step), taking(100.0, evaluate)
    start(str(tmp_path / 'out'), *TEXT, '--eval_samples=0', '--max_iters=3', patch=patch)
    assert read(str(tmp_path / 'out'))['seconds'] == 6
    clock[0] += 1000
    start(str(tmp_path / 'out'), *TEXT, '--eval_samples=0', '--max_iters=5', '--init_from=resume',
          patch=patch)
    assert read(str(tmp_path / 'out'))['seconds'] == 10
    assert newest(str(tmp_path / 'out')).endswith('ckpt_unmasking.pt')

# -----------------------------------------------------------------------------
# judging, infilling, mending


@torch.no_grad()
def test_the_judge_is_the_causal_mode():
    judge = tiny_gpt(V, T, n_recur=1)
    ids = torch.randint(V, (5, 7), generator=torch.Generator().manual_seed(1))
    found = text.judge_nll(judge, ids, batch_size=2)
    assert torch.allclose(found * 7, causal_nll(judge, ids, torch.ones_like(ids, dtype=torch.bool)))
    logp = judge.logits(judge(ids, causal=True), real_only=True).log_softmax(-1)
    assert torch.allclose(found, -logp.gather(2, ids[..., None])[..., 0].mean(1), atol=1e-5)
    with pytest.raises(UserError, match='the judge reads 12 tokens, the samples have 13'):
        text.judge_nll(judge, torch.zeros(1, 13, dtype=torch.long))


class Hand:
    """A network that gives the token of row (T,) the probability sure (T,), all others the rest, always."""
    mask_token_id = V

    def __init__(self, row, sure):
        rest = ((1 - sure) / (V - 1))[:, None].expand(-1, V).scatter(1, row[:, None], sure[:, None])
        self.law = torch.cat((rest, torch.zeros(len(row), 2)), 1).log()       # (T, V+2)

    def __call__(self, ids):
        return self.law.expand(*ids.shape, V + 2)

    def logits(self, hidden, real_only=False):
        return hidden


def test_what_the_network_is_unsure_of_is_filled_anew():
    row = torch.tensor([0, 1, 2, 3])
    model = Hand(row, torch.tensor([0.97, 0.4, 0.97, 0.5]))
    # right; wrong at 0 and 3; wrong at 1 and 2
    ids = torch.tensor([[0, 1, 2, 3], [1, 1, 2, 2], [0, 2, 3, 3]])
    some = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 2], [0, 2, 2, 3]])
    more = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 2, 3]])
    assert torch.equal(text.mend_unsure(model, ids, 0.05), some)
    assert torch.equal(text.mend_unsure(model, ids, 0.18), more)
    assert torch.equal(text.mend_unsure(model, ids, 1.0), row.expand(3, 4))
    assert torch.equal(text.mend_unsure(model, ids, 0.0), ids)


def test_repair_is_counted_at_wrong_and_at_right_tokens():
    clean, before, after = (torch.tensor(ids) for ids in ([[0, 0, 0, 0], [1, 1, 1, 1]],
                                                          [[2, 2, 0, 0], [1, 1, 1, 3]],
                                                          [[0, 2, 3, 0], [1, 1, 1, 2]]))
    row = text.mended('x', before, after, clean, 2)
    assert [row[name] for name in ('restored', 'damaged', 'right')] == pytest.approx([1 / 3, 1 / 5, 5 / 8])
    row = text.mended('x', before, before, clean, 0)
    assert (row['restored'], row['damaged'], row['right'], row['n']) == (0, 0, pytest.approx(5 / 8), 2)


def test_a_tenth_is_replaced_and_the_gap_is_in_the_middle():
    clean = torch.randint(V, (50, 40), generator=torch.Generator().manual_seed(1))
    before = text.replaced(clean, V, torch.Generator().manual_seed(2))
    assert ((before != clean).sum(1) == 4).all() and before.max() < V and (before != clean).any(0).sum() > 30
    for size in (128, 64, 20, 5):
        gap = text.middle(size)
        where = gap.nonzero()[:, 0].tolist()
        assert len(where) == min(16, size // 2) and where == list(range(where[0], where[-1] + 1))
        assert abs(where[0] - (size - 1 - where[-1])) <= 1

# -----------------------------------------------------------------------------
# the suite


@pytest.fixture
def s(words, tmp_path):
    return bench_settings('--suite=text', f'--out_dir={tmp_path}/out', '--num_samples=3', '--num_seeds=2',
                          '--budgets=2,3')


@pytest.fixture
def trainings(monkeypatch):
    """The commands that would have been run; each writes a tiny network. Ours takes longest."""
    commands = []

    def execute(command, log, mode):
        commands.append(command)
        folder = command[-1].partition('=')[2]
        kind = 'joint' if len(commands) == 1 else 'causal'
        network = tiny_gpt(V, T if len(commands) < 4 else 2 * T, n_recur=1)
        path = os.path.join(folder, f'ckpt_{kind}.pt')
        write_checkpoint(path, network, meta=META, training_type=kind, causal_ratio=0.5, max_iters=7,
                         block_size=T, batch_size=3)
        torch.save({**torch.load(path), 'seconds': 70.0 if kind == 'joint' else 28.0}, path)
        open(log, mode).close()
        return 0
    monkeypatch.setattr(runs, 'execute', execute)
    return commands


def test_the_whole_suite(s, trainings, words, tmp_path, monkeypatch):
    s.train_args = '--max_iters=7'
    rows, table = text.run(s)
    found = {row['name']: row for row in rows}
    assert len(found) == len(rows) == 3 + 1 + 12 * 2 + 4 + 4 + (1 + 3 + 1)
    assert not any(',' in name for name in found)
    causal = [command for command in trainings if '--training_type=causal' in command]
    # the last one counts
    assert len(trainings) == 4 and causal[1].index('--max_iters=18') > causal[1].index('--max_iters=7')

    ours = found['ours: likelihood']
    # all of it but what is no window
    windows = torch.from_numpy(np.array(words['val'])[:96].astype(np.int64)).view(8, T)
    exact = causal_nll(tiny_gpt(V, T, n_recur=1), windows, torch.ones(8, T, dtype=torch.bool))
    assert ours['causal_nll'] == pytest.approx(exact.sum().item() / 96, rel=1e-4) and ours['n'] == 8
    assert ours['nelbo'] > 0.5
    assert ours['minutes'] == 70 / 60 and ours['tokens_per_second'] == pytest.approx(7 * 3 * T / 70)
    assert found['AR same time: likelihood']['nelbo'] is None

    real, plain = found['real text'], found['samples by remask=none 2']
    val = loader.spread_rows(words['val'], 6, T)
    judge = tiny_gpt(V, 2 * T, n_recur=1)
    assert real['judge'] == pytest.approx(text.judge_nll(judge, val).mean().item(), rel=1e-4)
    assert real['nfe'] == 0
    assert real['entropy'] == token_statistics(val.tolist())['entropy'] and plain['n'] == 6
    assert plain['nfe'] == 2
    sampled = [row for row in rows if row['name'].startswith('samples by')]
    fewest = {'speculative', 'proofread', 'polish'}                     # these take as many as they take
    sampled = [row for row in sampled if row['name'].split()[2] not in fewest]
    assert all(0 < row['nfe'] <= 3 for row in sampled)
    assert found['infill: the text itself']['restored'] == 1
    assert 0 <= found['infill by remask=wrong']['restored'] < 1
    nothing = found['nothing']
    assert nothing['right'] == pytest.approx(1 - 1 / T) and nothing['damaged'] == nothing['restored'] == 0
    assert 0 <= found['--task=repair --remask_threshold=0.8']['right'] <= 1
    json.dumps(rows)
    parts = table.split('\n\n')
    assert [part.splitlines()[0].split()[1] for part in parts] == list(text.MEASURES)
    assert [len(part.splitlines()) - 2 for part in parts] == [3, 29, 4, 5]
    assert (tmp_path / 'out/text/table.md').read_text() == table + '\n'

    # nothing is measured or trained twice
    monkeypatch.setattr(text, 'MEASURES', dict.fromkeys(text.MEASURES))
    assert text.run(s) == (rows, table) and len(trainings) == 4
    s.only = 'repair'
    assert [row['name'] for row in text.run(s)[0]] == [row['name'] for row in rows[-5:]]


def test_rows_ask_for_the_runs_they_need(s, trainings):
    s.only = 'repair'
    text.run(s)
    assert len(trainings) == 1                                                # ours: no judge, no baseline
    s.only = 'nothing of that name'
    with pytest.raises(UserError, match="no row's name contains"):
        text.run(s)


def test_same_time_needs_to_know_the_times():
    ours, other = dict(seconds=70.0, iter_num=7), dict(seconds=28.0, iter_num=7)
    assert text.steps_of_same_time(ours, other) == 18 and text.steps_of_same_time(other, ours) == 3
    with pytest.raises(UserError, match='how long its training took'):
        text.steps_of_same_time(ours, dict(iter_num=7))


def test_other_data_is_refused(words):
    with pytest.raises(UserError, match='data/words has another vocabulary'):
        text.stream(dict(meta=dict(META, itos=[*'abcd']), config={}))
    networks = {'judge': (None, dict(meta=dict(META, name='other')))}
    with pytest.raises(UserError, match='the judge learned other, what it is to judge is words'):
        text.judge_of(networks.get, dict(meta=META))


def test_text_in_tokens_of_gpt2(tmp_path, monkeypatch):
    """Copies and words are counted in characters and words of the text, all else in tokens."""
    tiktoken = pytest.importorskip('tiktoken')
    try:
        encoding = tiktoken.get_encoding('gpt2')
    except Exception:                        # no vocabulary, no network: whatever that raises
        pytest.skip('tiktoken cannot load the vocabulary of GPT-2')
    meta = dict(META, name='pieces', vocab_size=50257, tokenizer='gpt2', itos=None)
    ids = encoding.encode_ordinary('The unfathomable zyzzyva said so. ' * 60)
    data = plant(tmp_path, monkeypatch, meta, ids)
    config = default_config(training_type='joint', causal_ratio=0.5)
    networks = {'ours': (tiny_gpt(50257, T, n_recur=1), dict(meta=meta, config=config))}
    networks['judge'] = networks['ours']
    s = bench_settings('--suite=text', '--num_samples=2', '--num_seeds=2')
    real, = text.sample_rows(s, networks.get, 'real text', 'ours', dict(real=True))
    pieces = [encoding.decode(ids) for ids in loader.spread_rows(data['val'], 4, T).tolist()]
    # the text repeats itself
    assert real['known_words'] > 0.5 and real['copy_max'] == max(map(len, pieces))
    row, = text.sample_rows(s, networks.get, 'x', 'ours', dict(remask='none', steps=2))
    assert row['n'] == 4 and row['distinct_1'] > 0.9 and row['copy_mean'] < 9
    filled, = text.infill_rows(s, networks.get, 'x', 'ours', dict(remask='none', steps=2))
    assert filled['restored'] < 0.5 and filled['judge'] > 3
