"""
What a real GPU computes, beside what the CPU does. The other tests hide it, so these are asked for:
CUDA_VISIBLE_DEVICES=0 python -m pytest -q tests/test_gpu.py
"""

import pytest
import torch
from conftest import default_config, seeded, tiny_gpt
from test_device import META, network, settings
from test_speculate import LETTERS
from test_train import arithmetic_rows

import train
from corruption import own_errors
from parts.presets import PRESETS, choose_rules
from plumbing import optim
from plumbing.device import configure_compute
from plumbing.evaluate import evaluate
from plumbing.run import is_finite
from sample import fill, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU, or it is hidden')
PARTS = ['', 'level:8', 'short_conv:2,shortcuts,bigrams:64', 'graph:3,mu:4', 'previous']


def on_gpu(model, dtype='float32', attention='auto'):
    return configure_compute(model, 'cuda', dtype, attention)[0]


@pytest.mark.parametrize('parts', PARTS)
@pytest.mark.parametrize('attention', ['plain', 'sdpa'])
@pytest.mark.parametrize('causal', [False, True])
@torch.no_grad()
def test_logits_are_those_of_the_cpu(parts, attention, causal):
    rows = torch.randint(19, (5, 24), generator=seeded())
    there = network(settings(parts=parts)).eval()
    there.plain_attention = True
    expected = there.logits(there(rows, causal=causal)).float()                        # (5, 24, 20)
    scale = expected.std()
    for dtype, error in (('float32', 1e-2), ('bfloat16', 1e-1)):       # TF32 has ten bits, bf16 seven
        model = on_gpu(network(settings(parts=parts)).eval(), dtype, attention)
        found = model.logits(model(rows.cuda(), causal=causal)).float().cpu()
        assert (found - expected).square().mean().sqrt() < error * scale


def counted(model, rules, B=20000, V=3, T=4):
    """How often each of the V^T texts is written from B empty canvases."""
    canvas = torch.full((B, T), model.mask_token_id, device=model.wte.weight.device)
    samples = fill(model, LETTERS, canvas, canvas < 0, batch_size=B, seed=5, **rules)
    ids = torch.tensor([sample['tokens'] for sample in samples])                       # (B, T)
    return (ids @ V ** torch.arange(T - 1, -1, -1)).bincount(minlength=V ** T).double()


@pytest.mark.parametrize('preset', PRESETS)
def test_samples_have_the_law_of_those_of_the_cpu(preset):
    config = default_config(causal_ratio=0.5, draft_head=True)
    rules = choose_rules(config, preset=preset)
    rules['steps'] = min(rules.get('steps') or 8, 8)
    # without places an empty canvas is alike everywhere, and rounding decides what is surest
    model = dict(V=3, T=4, n_layer=2, draft_head=True, parts='places')
    here, there = counted(tiny_gpt(**model), rules), counted(on_gpu(tiny_gpt(**model)), rules)
    often = here + there > 16
    statistic = ((here - there).square() / (here + there))[often].sum()
    assert statistic < often.sum() + 5 * (2 * often.sum()) ** 0.5      # chi-square, five standard deviations


@pytest.mark.parametrize('preset', PRESETS)
def test_the_same_seed_writes_the_same(preset):
    model = on_gpu(network(settings()).eval(), 'bfloat16')
    rules = choose_rules(settings(), preset=preset)
    first, again = (generate(model, META, 8, seed=3, **rules) for _ in range(2))
    assert first == again and all(18 not in sample['tokens'] for sample in first)


def test_likelihoods_are_those_of_the_cpu():
    rows, found = arithmetic_rows(200)[:, :24], []
    for model in (network(settings()), on_gpu(network(settings()))):
        found.append(evaluate(model, rows, META, causal=True, bidirectional=True, own_errors=own_errors,
                              draws=4, seed=1))
    here, there = found
    assert abs(here['causal_nll'] - there['causal_nll']) < 1e-2 * here['causal_nll']
    assert abs(here['nelbo'] - there['nelbo']) < 5 * (here['nelbo_se'] ** 2 + there['nelbo_se'] ** 2) ** 0.5
    assert abs(here['auc'] - there['auc']) < 0.1


@pytest.mark.parametrize('changes', [
    {}, dict(parts='short_conv:2,shortcuts,bigrams:64,level:8'), dict(parts='graph:3,mu:4', causal_ratio=0.5),
    dict(corruption='own:1,random:1,fragment:1,sticky:1,noise:1'), dict(training_type='denoising'),
    dict(training_type='causal', k1_credit=True), dict(optimizer='adamw', views=2)], ids=str)
def test_a_network_learns(changes):
    """Forty steps on the same rows, in bf16."""
    config, losses = settings(**changes), []
    model = on_gpu(network(config), 'bfloat16')
    betas, rows = (config['beta1'], config['beta2']), arithmetic_rows(64)[:, :24].cuda()
    optimizers = optim.make_optimizers(model, config['optimizer'], 1e-2, 1e-2, 0.0, betas)
    noise = torch.Generator('cuda').manual_seed(2)
    for _ in range(40):
        parts = train.training_step(model, rows, META, config, 10_000, noise)
        assert is_finite(model, parts)
        losses.append(float(sum(part.sum() for part in parts.values())))
        optim.update(model, optimizers, dict(config, muon_lr=1e-2, learning_rate=1e-2), scale=1.0)
        model.zero_grad(set_to_none=True)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses


def test_a_run_from_its_first_step_to_its_samples(run, tmp_path):
    out = f'--out_dir={tmp_path}'
    words = ['config/remask_all.py', out, '--eval_rows=50', '--eval_interval=10', '--log_interval=5']
    status, printed, err = run('train', *words, '--max_iters=10')
    assert not status and 'cuda, bfloat16' in printed, printed + err
    status, printed, err = run('train', out, '--init_from=resume', '--max_iters=20')
    assert not status and 'step 20' in printed, printed + err
    for more in ([], ['--preset=intelligent', '--steps=8', '--num_samples=2'], ['--device=cpu'],
                 ['--task=infill', '--text=(+1_)=3'], ['--task=repair', '--text=(+12))=3'],
                 ['--task=score', '--text=(+12)=3']):
        status, printed, err = run('sample', out, *more)
        assert not status and printed, err
