"""The doctor: what is healthy is left alone, and every fault that is planted is found and named."""

import json

import numpy as np
import pytest
import torch
from conftest import default_config, load_script, seeded, tiny_gpt, write_checkpoint
from test_commands import bench_settings

import corruption
from configurator import UserError
from data import loader
from model import GPT
from suites import diagnose

A, BOS, EOS, PAD, V = 0, 6, 7, 8, 9
META = dict(name='small', format='rows', block_size=12, vocab_size=V, tokenizer='char',
            itos=[*'abcdef', '<bos>', '<eos>', '<pad>'], bos=BOS, eos=EOS, pad=PAD)
SIZE = dict(block_size=12, n_layer=1, n_head=2, n_embd=64, n_recur=2, batch_size=16)
WORDS = ' '.join(f'--{name}={value}' for name, value in SIZE.items())
CONFIG = default_config(**SIZE, causal_ratio=0.5, draft_head=True, max_iters=600)
SET_UP = ['vocabulary', 'special tokens', 'statistics', 'size', 'rates', 'initial loss', 'gradients',
          'memorisation']
LEAKS = ['leak: hidden tokens', 'leak: causal', 'leak: packed texts', 'context']


def some_rows(num=1240, seed=0):
    """Rows of 2..9 random letters, no two alike: (num, 12)."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < num:
        text = [BOS, *rng.integers(0, 6, rng.integers(2, 10)).tolist(), EOS]
        found[tuple(text + [PAD] * (12 - len(text)))] = None
    return torch.tensor(list(found))


ROWS = some_rows()
DATA = dict(train=ROWS[:1200], val=ROWS[1200:])


@pytest.fixture
def small(monkeypatch):
    """The dataset of the suite is the one above."""
    meta = dict(META, train_tokens=DATA['train'].numel(), val_tokens=DATA['val'].numel())
    for module in (diagnose, loader):
        monkeypatch.setattr(module, 'load_data', lambda dataset, coarse: (meta, DATA))
    return meta


def counts_of(data):
    return {split: diagnose.token_counts(ids.numpy()) for split, ids in data.items()}


def fresh(**changes):
    return diagnose.fresh_network({**CONFIG, **changes}, META)


def diagnosed(*words):
    """The rows of the suite, {name: row}, and its summary."""
    rows, summary = diagnose.run(bench_settings('--suite=diagnose', *words))
    return {row['name']: row for row in rows}, summary

# -----------------------------------------------------------------------------
# the suite


def test_a_healthy_set_up_is_left_alone(small, capsys):
    rows, summary = diagnosed(f'--train_args={WORDS} --causal_ratio=0.5 --draft_head')
    assert {(row['status'], row['advice']) for row in rows.values()} == {('ok', '')}, rows
    assert list(rows) == [*SET_UP, *LEAKS, 'speed'] and rows['speed']['measured'].startswith('cpu')
    assert summary == 'ok: 13, warning: 0, problem: 0' and capsys.readouterr().out.count('\nok ') == 13


@pytest.mark.parametrize('n_recur', [1, 2])
@pytest.mark.parametrize('kind', ['unmasking', 'causal', 'remasking', 'denoising'])
def test_what_a_run_does_not_train_is_no_fault(kind, n_recur):
    """Every training type, with all of the parts that it may have."""
    changes = dict(training_type=kind, causal_ratio=0.0, draft_head=kind == 'causal', corruption='random',
                   remask_target='original', optimizer='adamw', n_embd=16, n_recur=n_recur,
                   parts='level:8,previous,shortcuts,short_conv:1,bigrams:64,graph:1,mu:2')
    config = {**CONFIG, **changes}
    seconds, norms = diagnose.first_steps(fresh(**changes), DATA['train'], META, config)
    assert diagnose.check_gradients(norms)[0] == 'ok' and len(seconds) == 5
    for name in ('causal_embd', 'drafter.fc.weight'):
        assert (name in norms) == (kind == 'causal')
    for name in ('level.mlp.2.weight', 'previous.proj.weight', 'bigrams.around.weight'):
        assert (f'parts.{name}' in norms) == (kind != 'causal')
    assert ('blocks.0.parts.shortcuts.weight' in norms) == (n_recur == 2)

    # a run that is shorter than that: its rate is never negative
    config['max_iters'] = 1
    seconds, norms = diagnose.first_steps(fresh(**changes), DATA['train'], META, config, num=2)
    assert diagnose.check_gradients(norms)[0] == 'ok' and len(seconds) == 2


def test_a_checkpoint_is_diagnosed_with_its_set_up(small, tmp_path):
    model = tiny_gpt(V, 12, n_recur=1)
    path = write_checkpoint(tmp_path / 'ckpt_joint.pt', model, small, **SIZE, causal_ratio=0.5)
    rows, _ = diagnosed(f'--init_from={path}', '--only=leak,checkpoint,rates')
    assert {row['status'] for row in rows.values()} == {'ok'}, rows
    found = [name for name in rows if name.startswith('checkpoint')]
    assert found == [f'checkpoint, {name}' for name in ('tensors', 'silent units', *LEAKS)]

    # what is wrong with its weights and its settings
    with torch.no_grad():
        model.blocks[0].fc.weight.zero_()
    write_checkpoint(path, model, small, **SIZE, learning_rate=0.0)
    rows, _ = diagnosed(f'--init_from={path}', '--only=tensors,silent,rates')
    assert [row['status'] for row in rows.values()] == ['problem'] * 3
    assert 'model: blocks.0.fc.weight is all zero' in rows['checkpoint, tensors']['advice']
    assert '100.0%' in rows['checkpoint, silent units']['measured']
    assert 'learning_rate is 0' in rows['rates']['advice']

    # the folder holds other text by now
    small.update(dataset='small', sha256=dict(train='new'))
    write_checkpoint(path, model, dict(small, sha256=dict(train='old')), **SIZE)
    with pytest.raises(UserError, match='data/small holds other data than what the checkpoint was'):
        diagnosed(f'--init_from={path}')


def test_a_problem_is_an_error_and_still_written(small, run, tmp_path):
    words = ('--suite=diagnose', '--only=rates,size', f'--json={tmp_path}/found.json')
    status, out, err = run('bench', *words, f'--train_args={WORDS} --learning_rate=0')
    assert status == 1 and err == 'bench.py: problems with rates; what to do stands above\n'
    assert 'problem  rates: ' in out and '-> learning_rate is 0' in out
    with open(tmp_path / 'found.json') as file:
        rows = json.load(file)['rows']
    assert [(row['name'], row['status']) for row in rows] == [('size', 'ok'), ('rates', 'problem')]
    assert set(rows[0]) == {'name', 'status', 'measured', 'advice'}
    status, _, err = run('bench', *words, f'--train_args={WORDS} --warmup_iters=5000')
    assert status == 0 and not err                                            # a warning is none


@pytest.mark.parametrize('words, message', [
    (['--train_args=--n_layers=3'], 'unknown key --n_layers; did you mean --n_layer?'),
    (['--train_args=--n_layer=many'], "n_layer expects an int, got 'many'"),
    (['--train_args=config/unmsk.py'], 'did you mean config/unmask.py?'),
    (['--train_args=--dataset="small'], 'No closing quotation'),
    (['--train_args=--training_type=diffusion'], 'training_type expects one of'),
    (['--train_args=--init_from=old.pt'], 'diagnosed by --init_from=old.pt without train_args'),
    (['--train_args=--n_layer=2', '--init_from=old.pt'], 'but not both'),
    (['--train_args=--block_size=64'], 'set --block_size=12'),
    (['--init_from=nowhere.pt'], 'nowhere.pt: no such checkpoint'),
    (['--train_args=--block_size=12', '--only=nothing'], "no row's name contains 'nothing'"),
])
def test_bad_input_is_one_line(small, run, words, message):
    status, _, err = run('bench', '--suite=diagnose', *words)
    assert status == 1 and err.startswith('bench.py: ') and message in err and err.count('\n') == 1, err


def test_words_are_those_of_train_py(small):
    s = bench_settings('--suite=diagnose', '--train_args=config/unmask.py --n_layer=3')
    config, model, checkpoint = diagnose.set_up(s)
    assert (config['n_layer'], config['training_type'], config['learning_rate']) == (3, 'unmasking', 3e-3)
    assert model is None and checkpoint is None
    assert load_script('train').n_layer == diagnose.train.n_layer == 2         # train.py itself is as it was

# -----------------------------------------------------------------------------
# the data and the settings


@pytest.mark.parametrize('changes, status, words', [
    (dict(), 'ok', []),
    (dict(vocab_size=V - 1), 'problem', ['id 8 would be taken for [MASK]', 'itos has 9 tokens, vocab_size']),
    (dict(vocab_size=V + 1), 'problem', ['itos has 9', 'ids above 8 never occur']),
    (dict(vocab_size=V + 1, itos=[*META['itos'], 'x']), 'warning', ['one too many']),
    (dict(vocab_size=50257, itos=None, tokenizer='gpt2'), 'ok', [])])
def test_a_vocabulary_off_by_one(changes, status, words):
    found, _, advice = diagnose.check_vocabulary(counts_of(DATA), {**META, **changes})
    assert found == status and all(word in advice for word in words)


def test_tokens_are_counted_piece_by_piece(monkeypatch):
    ids = np.array([[3, 3, 5], [0, 5, 65535], [3, 0, 1]], dtype=np.uint16)
    for piece in (2**24, 4, 1):
        monkeypatch.setattr(diagnose, 'PIECE', piece)
        count = diagnose.token_counts(ids)
        found = {int(i): int(count[i]) for i in count.nonzero()[0]}
        assert count.shape == (2**16,) and found == {0: 2, 1: 1, 3: 3, 5: 2, 65535: 1}


def test_ids_that_the_network_does_not_have_end_the_diagnosis(small, monkeypatch):
    broken = dict(DATA, val=DATA['val'].masked_fill(DATA['val'] == A, 200))
    monkeypatch.setattr(diagnose, 'load_data', lambda dataset, coarse: (small, broken))
    rows, _ = diagnosed(f'--train_args={WORDS}')
    assert list(rows) == ['vocabulary'] and rows['vocabulary']['status'] == 'problem'
    assert 'id 200' in rows['vocabulary']['advice']


@pytest.mark.parametrize('row, fault', [
    ([A, A, EOS, PAD], 'bos must stand first'), ([BOS, BOS, EOS, PAD], 'bos must stand first'),
    ([BOS, PAD, EOS, PAD], 'behind the end only'), ([BOS, A, A, PAD], 'behind the end only'),
    ([BOS, EOS, A, PAD], 'nothing but padding'), ([BOS, EOS, EOS, PAD], 'nothing but padding'),
    ([BOS, A, EOS, PAD], None), ([BOS, A, A, EOS], None), ([BOS, A, A, A], None)])
def test_start_end_and_padding_stand_where_they_should(row, fault):
    found = diagnose.misplaced(torch.tensor([[BOS, A, EOS, PAD], row]), META)
    assert (fault in found[0] if fault else not found), found
    assert not diagnose.misplaced(torch.tensor([row]), dict(bos=None, eos=None, pad=None))


def test_special_tokens():
    def check(model, data=DATA):
        return diagnose.check_special(model, META, data, counts_of(data))
    model = tiny_gpt(V, 12)
    assert check(model)[0] == 'ok'
    data = dict(DATA, val=DATA['val'].clone())
    data['val'][3, 2:4] = V
    assert 'val: [MASK] or [WRONG] stands in it 2 times' in check(model, data)[2]
    assert 'made for another dataset' in check(tiny_gpt(V - 1, 12))[2]
    open_logits, model.logits = model.logits, lambda hidden, real_only=False: open_logits(hidden)
    status, _, advice = check(model)
    assert status == 'problem' and advice.startswith('the sampler may draw [MASK] or [WRONG]')


def test_validation_rows_that_stand_in_train():
    def check(**changes):
        data = {**DATA, **changes}
        return diagnose.check_statistics(counts_of(data), META, data)
    status, measured, _ = check()
    letters = (DATA['train'] < 6).sum() + (DATA['train'] == EOS).sum()
    assert status == 'ok' and f'{letters:,} tokens, 7 of 9 ids' in measured
    assert ' 0% of the training rows' in measured
    status, measured, advice = check(val=torch.cat((DATA['val'], DATA['train'][:10])))
    assert status == 'problem' and 'measures memory' in advice
    assert '20.0% of the validation rows stand in train' in measured
    status, measured, _ = check(train=DATA['train'][:13].repeat(20, 1))
    assert status == 'warning' and '95% of the training rows are repetitions' in measured


def test_statistics_of_a_stream():
    """Two tokens, one in four: the entropy of (1/4, 3/4); a stream has no rows to compare."""
    def check(ids):
        data, meta = dict(train=torch.tensor(ids * 50)), dict(META, format='stream', bos=None, pad=None)
        return diagnose.check_statistics(counts_of(data), meta, data)
    status, measured, _ = check([0, 1, 1, 1])
    assert status == 'warning' and 'rows' not in measured
    assert 'entropy 0.56 nats (ln V 2.20), the most frequent token is 75%' in measured
    assert check([0, 0, 0, 0])[0] == 'problem'


@pytest.mark.parametrize('sizes, status, measured', [
    ((1000, 1000, 100), 'ok', '1,000 parameters, 1,000 tokens an epoch, 96 epochs'),
    ((11000, 1000, 100), 'warning', ''), ((1000, 1000, 30), 'warning', '')])
def test_size(sizes, status, measured):
    found = diagnose.check_size(*sizes, CONFIG)
    assert found[0] == status and measured in found[1]


@pytest.mark.parametrize('changes, status, word', [
    (dict(), 'ok', ''),
    (dict(learning_rate=0.0), 'problem', 'learning_rate is 0'),
    (dict(learning_rate=0.3), 'warning', 'learning_rate'), (dict(muon_lr=0.0), 'problem', 'muon_lr is 0'),
    (dict(muon_lr=1.0), 'warning', 'muon_lr'),
    (dict(warmup_iters=601), 'warning', 'warmup_iters=601'),
    (dict(ema_decay=0.999), 'warning', 'ema_decay'),
    (dict(proofreading_warmup_iters=601), 'warning', 'remask_ratio is never reached'),
    (dict(masking_warmup_iters=601), 'warning', 'penalty_mask_correct is never reached'),
    # neither has a say there
    (dict(training_type='unmasking', proofreading_warmup_iters=999, optimizer='adamw', muon_lr=0), 'ok', '')])
def test_rates(changes, status, word):
    found, _, advice = diagnose.check_rates({**CONFIG, **changes})
    assert found == status and word in advice and ';' not in advice

# -----------------------------------------------------------------------------
# learning


def test_initial_loss():
    def check(model):
        return diagnose.check_initial_loss(diagnose.initial_losses(model, DATA['train'], META, seeded()))
    found = diagnose.initial_losses(fresh(), DATA['train'], META, seeded())
    ideals = [(mode, round(ideal, 3)) for mode, _, ideal, _ in found]
    assert ideals == [('unmasking', 2.197), ('causal', 2.079)]                 # ln 9, ln 8
    assert check(fresh())[0] == 'ok'
    loud = fresh()
    with torch.no_grad():
        loud.wte.weight *= 20
    status, _, advice = check(loud)
    assert status == 'problem' and 'unmasking: ' in advice and 'causal: ' in advice
    wide = fresh()
    wide.logits = lambda hidden, real_only=False: GPT.logits(wide, hidden)     # [MASK] and [WRONG] take part
    status, _, advice = check(wide)
    assert status == 'problem' and 'unmasking: ' in advice


@pytest.mark.parametrize('nats, status', [(1.04, 'ok'), (0.9, 'warning'), (1.1, 'warning'), (1.3, 'problem'),
                                          (float('inf'), 'problem'), (float('nan'), 'problem')])
def test_how_far_from_uniform(nats, status):
    assert diagnose.check_initial_loss([('causal', nats, 1.0, '')])[0] == status


def test_by_token_counts_every_token_once():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    p = torch.tensor([2.0, 0.0]).log_softmax(0)
    assert abs(diagnose.by_token(logits, torch.tensor([0, 0, 1])) + p.mean().item()) < 1e-6


def test_a_dead_layer_is_named():
    def check(model):
        return diagnose.check_gradients(diagnose.first_steps(model, DATA['train'], META, CONFIG)[1])
    model = fresh(n_layer=2)
    fc, whole = model.blocks[1].fc, model.blocks[1].fc.forward
    fc.forward = lambda x: whole(x * 0)                                        # its input is cut off
    status, _, advice = check(model)
    assert status == 'problem'
    assert advice.startswith('blocks.1.fc.weight, blocks.1.proj.weight: without any gradient')
    model = fresh()
    proj, open_end = model.blocks[0].attn_proj, model.blocks[0].attn_proj.forward
    proj.forward = lambda x: open_end(x).detach()                              # its output is
    start = 'blocks.0.qkv.weight, blocks.0.attn_proj.weight: without any gradient'
    assert check(model)[2].startswith(start)


@pytest.mark.parametrize('norm, status, word', [
    (1.5, 'ok', ''), (0.0, 'problem', 'without any gradient'), (None, 'problem', 'without any gradient'),
    (float('nan'), 'problem', 'not finite'), (float('inf'), 'problem', 'not finite'),
    (1e-9, 'warning', 'vanishing'), (1e4, 'warning', 'exploding')])
def test_gradients_that_vanish_explode_or_are_no_numbers(norm, status, word):
    found, _, advice = diagnose.check_gradients(dict(a=1.0, b=2.0, c=0.5, d=1.0, late=norm))
    assert found == status and advice.startswith(f'late: {word}' if word else '')
    assert 'and 3 more' in diagnose.check_gradients({str(i): None for i in range(9)})[2]


@pytest.mark.parametrize('changes, status, reason', [
    ({}, 'ok', ''), (dict(training_type='causal'), 'ok', ''),
    (dict(learning_rate=0.0, muon_lr=0.0), 'problem', 'did not move'),
    (dict(learning_rate=1e-5, muon_lr=1e-5), 'problem', 'did not move'),
    (dict(learning_rate=5.0, muon_lr=5.0), 'problem', 'the loss rose'),
    (dict(optimizer='adamw', learning_rate=1e-3), 'warning', 'slowly')])
def test_memorisation_says_why_it_failed(changes, status, reason):
    config = {**CONFIG, **changes}
    steps = dict(ok=100, warning=40, problem=25)[status]
    losses, floor = diagnose.memorise(fresh(**changes), DATA['train'], META, config, steps)
    found, _, advice = diagnose.check_memory(losses, floor, config)
    assert found == status and reason in advice, (losses[-1], advice)
    assert (floor > 0) == (config['training_type'] == 'causal')


def test_memorisation_without_capacity_and_with_nan():
    assert 'more capacity' in diagnose.check_memory([2.0, *[1.0] * 100], 0.0, CONFIG)[2]
    assert 'the loss rose' in diagnose.check_memory([2.0, 1.5, float('nan')], 0.0, CONFIG)[2]

# -----------------------------------------------------------------------------
# leaks


@pytest.fixture
def x0():
    return DATA['train'][:8]


def test_a_network_that_peeks_is_caught(x0, monkeypatch):
    class Peeking(GPT):
        seen = None

        def forward(self, idx, **how):
            return super().forward(idx, **how) + 1e-3 * self.wte(self.seen)

    def ask(x0, *args):
        model.seen = x0
        return corruption.ask(x0, *args)
    model = tiny_gpt(V, 12)
    assert diagnose.check_hidden_tokens(model, x0, META)[0] == 'ok'
    monkeypatch.setattr(diagnose, 'ask', ask)
    model.__class__ = Peeking
    status, _, advice = diagnose.check_hidden_tokens(model, x0, META)
    assert status == 'problem' and 'its input does not say so' in advice


def test_an_ask_that_does_not_mask_is_caught(x0, monkeypatch):
    def ask(x0, *args):
        input, target, weight = corruption.ask(x0, *args)
        input[2] = x0[2]                                                       # one row is forgotten
        return input, target, weight
    monkeypatch.setattr(diagnose, 'ask', ask)
    status, _, advice = diagnose.check_hidden_tokens(tiny_gpt(V, 12), x0, META)
    assert status == 'problem' and 'inputs show what is asked for' in advice
    monkeypatch.setattr(diagnose, 'ask', lambda x0, *args: (x0, x0, torch.zeros(x0.shape)))
    assert 'no position carries weight' in diagnose.check_hidden_tokens(tiny_gpt(V, 12), x0, META)[2]


@pytest.mark.parametrize('plain', [True, False])
def test_a_causal_pass_that_sees_too_much_is_caught(x0, plain):
    model = tiny_gpt(V, 12)
    model.plain_attention = plain
    assert diagnose.check_causal(model, x0)[0] == 'ok' and diagnose.check_packed(model, x0)[0] == 'ok'

    class Unshifted(GPT):  # reads the token that it predicts
        def forward(self, idx, causal=False, **how):
            return super().forward(idx.roll(-1, 1) if causal else idx, causal=causal, **how)

    class Unmasked(GPT):  # sees what comes later, and other texts
        def forward(self, idx, causal=False, segment=None, **how):
            return super().forward(idx, **how)

    class Broken(GPT):
        def forward(self, idx, **how):
            return super().forward(idx, **how) * float('nan')
    for leaky, packed in ((Unshifted, 'ok'), (Unmasked, 'problem'), (Broken, 'problem')):
        model.__class__ = leaky
        assert diagnose.check_causal(model, x0)[0] == 'problem'
        assert diagnose.check_packed(model, x0)[0] == packed


def test_the_visible_text_has_to_matter(x0):
    assert diagnose.check_context(tiny_gpt(V, 12), x0, META)[0] == 'ok'
    status, measured, advice = diagnose.check_context(fresh(), x0, META)  # every block is still the identity
    assert status == 'problem' and measured.endswith('0.0e+00') and 'without looking' in advice

# -----------------------------------------------------------------------------
# the weights of a checkpoint


def test_tensors_of_a_checkpoint():
    model = tiny_gpt(V, 12)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoint = dict(model=weights, ema=dict(weights), iter_num=7)
    status, measured, _ = diagnose.check_tensors(model, checkpoint, CONFIG)
    assert (status, measured) == ('ok', f'{2 * len(weights)} tensors (model, ema), 7 steps')
    checkpoint['ema']['wte.weight'] = weights['wte.weight'] * float('inf')
    weights['causal_embd'].zero_()
    _, _, advice = diagnose.check_tensors(model, checkpoint, CONFIG)
    assert 'ema: wte.weight holds NaN' in advice and 'model: causal_embd is all zero' in advice
    _, _, advice = diagnose.check_tensors(model, dict(checkpoint, ema=None), {**CONFIG, 'causal_ratio': 0.0})
    assert not advice                                                          # it was never trained


def test_silent_units(x0):
    model = tiny_gpt(V, 12, n_layer=2)
    before = model(x0)
    with torch.no_grad():
        model.blocks[1].fc.weight[:48] = 0                                     # 48 of 64
    shares = diagnose.silent_units(model, x0, META, CONFIG)
    assert shares[0] < 0.1 and shares[1] >= 0.75
    assert diagnose.check_units(shares)[0] == 'warning' and 'block 1: ' in diagnose.check_units(shares)[2]
    assert diagnose.check_units([0.1, 0.2])[0] == 'ok' and diagnose.check_units([0.1, 1.0])[0] == 'problem'
    assert not model.blocks[0].fc._forward_hooks and model(x0).shape == before.shape
