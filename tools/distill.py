"""
Consistency distillation: a student that reaches in a few passes where its teacher needs many.

    python tools/distill.py --init_from=ckpt          500 steps from the newest checkpoint in out_dir
    python sample.py --init_from=out/distilled --steps=4

The student starts as a copy of the teacher. Rows are masked as in training, the teacher completes them with
its sampler in teacher_steps passes, and the student learns to say in one pass what came out (Song et al.
2023; on masks as Deschenaux and Gulcehre 2024, SDTT, but with drawn tokens in the place of averaged
probabilities). One pass draws its tokens independently, so what can be gained is that each of them is surer.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import configurator

configurator.help_first(globals())           # --help must not wait for torch
# ruff: noqa: E402 (so the imports come after it)

import copy
import shlex

import torch

from configurator import UserError
from corruption import Task, ask
from data.loader import data_of, random_rows
from model import GPT
from parts.presets import PRESETS, choose_rules
from plumbing.checkpoint import save_checkpoint
from plumbing.checks import check_ranges
from plumbing.device import configure_compute
from plumbing.optim import make_optimizers
from plumbing.rows import Ends
from plumbing.text import load_task, modelled, sample_line
from sample import generate, generate_diffusion
from tools.common import learn, load_writer
from train import loss

# -----------------------------------------------------------------------------
init_from = 'ckpt'       # the teacher: 'ckpt', the newest checkpoint in out_dir, or a path
out_dir = 'out'          # where 'ckpt' looks; the student is distilled/ckpt_distilled.pt in it
teacher_preset = 'maskgit'  # the teacher's sampler, see sample.py
teacher_steps = 16       # its passes
max_iters = 500          # steps
batch_size = 32          # rows a step
learning_rate = 3e-4     # of AdamW, falling linearly to 0
ema_decay = 0.98         # average of the student's weights, which is what is saved
log_interval = 25        # steps between lines on screen
seed = 1337              # of rows, masks and the teacher's draws
device = 'auto'          # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'           # auto | float32 | bfloat16
attention = 'auto'       # auto | plain | sdpa
# -----------------------------------------------------------------------------


def lesson(teacher, x0, meta, rules, noise):
    """Clean rows x0 (B, T) -> (input, target, weight) for the student, the target by the teacher."""
    free, real = modelled(x0, meta)
    tokens = teacher.mask_token_id, teacher.wrong_token_id, meta['pad']
    input, _, weight = ask(x0, free, real, Task(training_type='unmasking'), tokens, noise)
    forbid = () if meta['bos'] is None else (meta['bos'],)
    ends = Ends(meta['eos'], meta['pad'], forbid)
    fixed = input != teacher.mask_token_id
    target, _, _ = generate_diffusion(teacher, input, fixed, ends=ends, generator=noise, **rules)
    return input, target, weight


def study(student, average, teacher, rows, meta, rules):
    """Trains the student, and the average of its weights, on rows of the training split."""
    optimizer, = make_optimizers(student, 'adamw', learning_rate, 0.0, 0.0, (0.9, 0.95))
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator(next(student.parameters()).device).manual_seed(seed + 1)
    weights = list(student.parameters())

    def losses():
        x0 = random_rows(rows, batch_size, teacher.config.block_size, generator).to(noise.device)
        return dict(loss=loss(student, *lesson(teacher, x0, meta, rules, noise))[0] / batch_size)

    @torch.no_grad()
    def follow():
        torch._foreach_lerp_(list(average.parameters()), weights, 1 - ema_decay)

    learn(optimizer, losses, globals(), weights, follow)


def main():
    check_ranges(configurator.current(globals()))
    goal = os.path.join(out_dir, 'distilled', 'ckpt_distilled.pt')
    path, teacher, checkpoint = load_writer(GPT.load, init_from, out_dir, goal)
    meta, config = checkpoint['meta'], checkpoint['config']
    rules = choose_rules(config, preset=teacher_preset, inside=True, steps=teacher_steps)
    ahead = rules.pop('ar_prefix') or rules.get('draft')
    if teacher_preset not in PRESETS or rules['remask'] == 'causal' or ahead:
        raise UserError(f"the teacher fills holes in any place, which the preset '{teacher_preset}' cannot")
    _, data = data_of(meta, config)
    teacher, choices = configure_compute(teacher, device, dtype, attention)
    words = ', '.join(f'{name}={value}' for name, value in rules.items())
    print(f'{path} teaches: {words}\n{choices}')
    student, average = copy.deepcopy(teacher).train(), copy.deepcopy(teacher)
    study(student, average, teacher, data['train'], meta, rules)

    config = {**config, 'training_type': 'unmasking', 'causal_ratio': 0.0, 'energy_head': 0}
    save_checkpoint(goal, dict(model_args=checkpoint['model_args'], meta=meta, model=student.state_dict(),
                               ema=average.state_dict(), iter_num=max_iters, config=config,
                               distilled=configurator.current(globals())))
    task = load_task(meta['name'])
    for sample in generate(average.eval(), meta, 4, seed=seed, steps=8):
        print(sample_line(sample['text'], task))
    print(f'saved {goal}; sample from it: python sample.py --init_from={shlex.quote(goal)} --steps=4')


if __name__ == '__main__':
    configurator.run(globals())
