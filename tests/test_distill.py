"""Distillation: the student is a checkpoint like any other, and what cannot teach is refused."""

import os

import pytest
import torch
from conftest import load_script, run_main, write_checkpoint
from test_commands import CPU, read_samples, refused

import configurator
from model import GPT
from plumbing.rows import Ends
from tools.common import learn

TINY = ['--teacher_steps=3', '--max_iters=6', '--batch_size=4', '--log_interval=3', *CPU]


@pytest.fixture(scope='module')
def distilled(tmp_path_factory):
    """A student: (the checkpoint of the teacher, its own, what was printed)."""
    out = tmp_path_factory.mktemp('distilled')
    path = write_checkpoint(str(out / 'a' / 'ckpt_joint.pt'), training_type='joint', causal_ratio=0.5)
    before = open(path, 'rb').read()
    text = run_main('tools/distill', f'--init_from={path}', f'--out_dir={out}', *TINY)
    assert open(path, 'rb').read() == before
    return path, str(out / 'distilled' / 'ckpt_distilled.pt'), text


def test_a_student_is_a_checkpoint_that_samples(distilled, run, tmp_path):
    teacher, path, text = distilled
    assert f'{teacher} teaches: ' in text and 'steps=3' in text and 'step 6/6  loss ' in text
    assert f'saved {path}' in text
    (before, old), (after, new) = GPT.load(teacher), GPT.load(path)
    assert after.config == before.config and new['meta'] == old['meta'] and new['iter_num'] == 6
    other = dict(training_type='unmasking', causal_ratio=0.0, energy_head=0)
    assert new['config'] == {**old['config'], **other}
    assert new['distilled']['teacher_steps'] == 3
    for name, weight in new['ema'].items():  # both have learned, the average lags behind
        learned = not torch.equal(weight, old['model'][name])
        assert learned == (name not in ('mask_logit_bias', 'causal_embd'))
        assert torch.equal(weight, new['model'][name]) != learned
    file = tmp_path / 's.jsonl'
    words = ['--steps=2', '--num_samples=3', f'--save={file}', *CPU]
    status, out, err = run('sample', f'--init_from={path}', *words)
    assert status == 0 and len(read_samples(file)) == 3, err
    refused(run('sample', f'--init_from={path}', '--remask=causal', *CPU), 'sample', 'no trained causal mode')


def test_the_student_learns_what_the_teacher_says(tmp_path, monkeypatch):
    """A teacher that says 7 everywhere: the targets at the masks are 7s, and the student says them more."""
    path = write_checkpoint(str(tmp_path / 'ckpt.pt'), training_type='unmasking')
    module, asked = load_script('tools/distill'), []
    words = ['--learning_rate=0.01', '--ema_decay=0.5', *TINY, '--max_iters=15']
    configurator.configure(vars(module), [f'--init_from={path}', f'--out_dir={tmp_path}/out', *words])

    def sevens(teacher, canvas, fixed, **rules):
        asked.append((teacher, canvas, fixed, rules))
        return canvas.masked_fill(~fixed, 7), None, None
    loss = module.loss
    monkeypatch.setattr(module, 'generate_diffusion', sevens)
    monkeypatch.setattr(module, 'loss', lambda student, *batch: asked.append(batch) or loss(student, *batch))
    module.main()
    for (teacher, canvas, fixed, rules), (input, target, weight) in zip(asked[::2], asked[1::2]):
        assert torch.equal(input, canvas) and torch.equal(fixed, input != 18)
        assert torch.equal(weight > 0, ~fixed)
        assert (target[~fixed] == 7).all() and torch.allclose(weight.sum(1), torch.ones(4))
        assert not teacher.training
        assert rules['ends'] == Ends(16, 17, (15,)) and rules['steps'] == 3
    student = tmp_path / 'out' / 'distilled' / 'ckpt_distilled.pt'
    before, after = (GPT.load(p)[0] for p in (path, str(student)))
    assert torch.equal(teacher.wte.weight, before.wte.weight)             # the teacher itself learns nothing
    holes = torch.full((1, 64), 18)
    first, second = (model.logits(model(holes), real_only=True).softmax(-1)[..., 7].mean().item()
                     for model in (before, after))
    assert second > 0.5 > 2 * first


def test_the_loop_of_the_tools_prints_means_and_lets_the_rate_fall(capsys):
    values, weight = iter([1.0, 2.0, 3.0, 4.0]), torch.nn.Parameter(torch.zeros(()))
    learn(torch.optim.SGD([weight], lr=9.0), lambda: dict(a=0 * weight + next(values), b=weight.clone()),
          dict(max_iters=4, log_interval=2, learning_rate=1.0))
    lines = capsys.readouterr().out.splitlines()         # b is 0, -1, -1.75, -2.25
    assert [line.split('  ')[:3] for line in lines] == [['step 2/4', 'a 1.500', 'b -0.500'],
                                                        ['step 4/4', 'a 3.500', 'b -2.000']]


def test_what_distillation_refuses(distilled, run, tmp_path):
    teacher, path, _ = distilled
    before = open(path, 'rb').read()
    out = os.path.dirname(os.path.dirname(path))
    refused(run('distill', f'--init_from={path}', f'--out_dir={out}', *TINY),
            'distill', path, 'would overwrite the checkpoint it is made from')
    assert open(path, 'rb').read() == before
    for kind in ('causal', 'remasking'):
        mute = write_checkpoint(str(tmp_path / 'mute.pt'), training_type=kind)
        refused(run('distill', f'--init_from={mute}', f'--out_dir={tmp_path}/out', *TINY),
                'distill', mute, f'training_type={kind}')
    for word, message in (('--teacher_preset=speculative', "'speculative' cannot"),
                          ('--teacher_preset=hybrid', "'hybrid' cannot"),
                          ('--teacher_preset=proofread', "'proofread' cannot"),
                          ('--teacher_preset=maskgti', 'did you mean maskgit'),
                          ('--max_iters=0', 'max_iters must be at least 1'),
                          ('--learning_rate=1e38', 'no longer finite'),
                          ('--init_from=nowhere.pt', 'nowhere.pt')):
        words = [f'--init_from={teacher}', f'--out_dir={tmp_path}/out', *TINY, word]
        refused(run('distill', *words), 'distill', message)
    assert not os.path.exists(tmp_path / 'out' / 'distilled' / 'ckpt_distilled.pt')
