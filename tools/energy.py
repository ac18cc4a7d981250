"""
Give a trained network an energy head: a number for every text that says how little it looks like the data.

    python tools/energy.py --init_from=ckpt                                    1000 steps from the newest checkpoint under out_dir
    python sample.py --init_from=out/ckpt_energy.pt --best_of=4          of 4 samples the one of the lowest energy
    python sample.py --init_from=out/ckpt_energy.pt --guide=4 --steps=8  a choice among 4 at every step, by exp(-energy)
    python sample.py --init_from=out/ckpt_energy.pt --remask=critic      re-mask what the head calls wrong

The network is frozen; what learns is the critic of model.py, 20,000 parameters on the passes over the text (stage 2 of the
universal denoiser seed). It tells clean rows from rows with noise in them, from rows with the network's own guesses in them,
and from the network's own samples. Against these last ones the best energy is the logarithm of how much likelier a text is
among the samples than in the data (noise contrastive estimation; Xu et al. 2024), so that weighing samples by exp(-energy)
makes up for what the sampler got wrong. Noise alone, as in the seed, makes a detector of noise, and the samples of a sampler
hold none.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import configurator

configurator.help_first(globals())           # --help shall not wait for torch
# ruff: noqa: E402 (so the imports come after it)

import time

import torch
import torch.nn.functional as F

from plumbing.text import load_task, rows_of
from plumbing.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from configurator import UserError
from corruption import Task, ask, modelled, own_guesses
from data.loader import data_of, random_rows, spread_rows
from plumbing.device import configure_compute
from plumbing.evaluate import roc_auc
from plumbing.checks import parse_mixture
from model import GPT, GPTConfig, places
from parts.noise import NOISE, mixed_noise, noise_level
from rules import choose_rules, draw, filtered, supports, text_of
from sample import generate

# -----------------------------------------------------------------------------
init_from = 'ckpt'       # 'ckpt': the newest checkpoint under out_dir; or the path of one
out_dir = 'out'          # where 'ckpt' looks, and where the result goes
save: str = None         # path of the result; None: ckpt_energy.pt in out_dir
passes = 2               # what the head reads: 1, the bidirectional pass over a text; 2, the causal one as well
own_samples = 4000       # samples of the network itself, drawn first; one in eight is held out
eval_rows = 1000         # rows of the validation split for the report at the end
max_iters = 1000         # steps
batch_size = 64          # rows a step, half of them clean
learning_rate = 4e-3     # of AdamW, falling linearly to 0
log_interval = 25        # steps between lines on screen
seed = 1337              # of the head, rows, noise and samples
device = 'auto'          # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'           # auto | float32 | bfloat16, of the frozen network; the head is float32
attention = 'auto'       # auto | plain | sdpa
# -----------------------------------------------------------------------------

# the seed's noise, with its masks and without
MIXES = [parse_mixture('noise_mix', mix, NOISE) for mix in ('mask:0.5,replace:0.2,swap:0.15,delete:0.075,insert:0.075',
                                                            'replace:0.4,swap:0.3,delete:0.15,insert:0.15')]

# -----------------------------------------------------------------------------
# what is not from the data


@torch.no_grad()
def complete(model, x, generator=None):
    """The masks of x (B, T) filled in one pass: by draws, or without a generator by the likeliest tokens."""
    masked = x == model.mask_token_id
    logits = model.logits(model(x, only=places(masked)), real_only=True)       # (N, V+2)
    return x.masked_scatter(masked, logits.argmax(-1) if generator is None else draw(filtered(logits), generator))


def noised(model, x0, meta, mix, sigma_min, sigma_max, generator):
    """Rows x0 (B, T) with mixed_noise of that mix, its masks filled by the network's likeliest tokens: ids (B, T)."""
    sigma = noise_level(len(x0), sigma_min, sigma_max, generator)
    real = modelled(x0, meta)[1]
    return complete(model, mixed_noise(x0, real, sigma, mix, model.mask_token_id, meta['pad'], generator))


def guessed(model, x0, meta, generator):
    """Rows x0 (B, T) in which the network's own guesses stand, some of them made before and some after the others: ids (B, T)."""
    free, real = modelled(x0, meta)
    tokens = model.mask_token_id, model.wrong_token_id, meta['pad']
    input, _, _ = ask(x0, free, real, Task(remask_ratio=1.0), tokens, generator, own_guesses(model, generator))
    return complete(model, input, generator)


def draw_samples(model, meta, config, num):
    """num samples of the network itself, by its usual samplers, in a random order: ids (num, T), a list of their texts."""
    hows = [dict(remask='none', steps=steps) for steps in (16, 32, 64)]
    if choose_rules(config, inside=True)['remask'] == 'wrong':
        hows.append(dict(remask='wrong', steps=32))
    if supports(config)[1]:
        hows.append(dict(remask='causal'))
    samples = []
    for i, how in enumerate(hows):
        share = num * (i + 1) // len(hows) - num * i // len(hows)
        t0 = time.time()
        if share:
            samples += generate(model, meta, share, seed=seed + i, progress=True, **choose_rules(config, commit='random', **how))
            print(f"{share} samples, {', '.join(f'{name}={value}' for name, value in how.items())}: {time.time() - t0:.0f} s",
                  flush=True)
    ids = rows_of(samples, meta, model.config.block_size)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    return ids[order], [samples[i]['text'] for i in order.tolist()]


# -----------------------------------------------------------------------------
# learning to tell, and how well it is told


def as_texts(ids, meta):
    """ids (B, T) -> what GPT.energy takes: (ids, real), see text_of."""
    return text_of(ids, meta['eos'], meta['pad'], [i for i in (meta['bos'],) if i is not None])


def make_batch(model, x0, meta, pool, generator):
    """
    Clean rows x0 (B, T) -> the batch: ids, real (B, T), see GPT.energy; label (B,), whether a row is not clean; wrong (B, T),
    whether a token is wrong; known (B,), the rows whose tokens teach that.

    The first half stays clean. The other half becomes noise, own guesses and own samples out of the pool, (N, T), in equal
    shares. What came out clean is clean, but a sample is a sample even if there is nothing wrong with it.
    """
    clean, rest = x0.tensor_split(2)
    noise, guesses, own = rest.tensor_split(3)
    noisy = [noised(model, part, meta, mix, 0.1, 0.6, generator) for part, mix in zip(noise.tensor_split(2), MIXES)]
    drawn = pool[torch.randint(len(pool), (len(own),), generator=generator, device=x0.device)]
    ids, real = as_texts(torch.cat((clean, *noisy, guessed(model, guesses, meta, generator), drawn)), meta)
    wrong, row = ids != x0, torch.arange(len(x0), device=x0.device)
    first, last = len(clean) + len(noise), len(x0) - len(own)                  # of the guesses
    return ids, real, wrong.any(1) | (row >= last), wrong, (row >= first) & (row < last)


def losses(model, ids, real, label, wrong, known):
    """What make_batch returned -> the cross-entropies of the energies and of the scores of tokens known to be right or wrong."""
    score, at = model.token_energy(ids, real), real & known[:, None]           # (B, T)
    return (F.binary_cross_entropy_with_logits(score.logsumexp(-1), label.float()),
            F.binary_cross_entropy_with_logits(score[at], wrong[at].float()))


@torch.no_grad()
def measure(model, meta, x0, own, texts, generator):
    """
    The ROC-AUC of the energy, clean rows x0 (N, T) against the same rows with the seed's noise, and against own samples
    (M, T), their texts a list: all of them, those that are malformed, and those that are well formed and have a wrong value.
    """
    def energies(ids):
        return torch.cat([model.energy(*as_texts(part, meta)) for part in ids.split(256)]).cpu()

    clean, sampled, task = energies(x0), energies(own), load_task(meta['name'])
    noisy = noised(model, x0, meta, MIXES[0], 0.2, 0.6, generator)
    hit = (noisy != x0).any(1).cpu()                                           # noise spares some rows, others are put right
    against = {'noise': energies(noisy)[hit], 'own samples': sampled}
    if task:
        parsed = [task.parse(text) for text in texts]
        valid = torch.tensor([valid for valid, _, _ in parsed])
        correct = torch.tensor([valid and value == claimed for valid, value, claimed in parsed])
        against.update({'malformed samples': sampled[~valid], 'wrong values': sampled[valid & ~correct]})
    return {name: roc_auc(torch.cat((clean, other)), torch.arange(len(clean) + len(other)) >= len(clean))
            for name, other in against.items() if len(other)}


# -----------------------------------------------------------------------------
# the run


def load_trunk(path):
    """The network of a checkpoint, its averaged weights, frozen, with a fresh critic that learns; the checkpoint."""
    trunk, checkpoint = load_checkpoint(path)
    if not supports(checkpoint['config'])[0]:
        raise UserError(f"{path} cannot unmask (training_type={checkpoint['config']['training_type']}), "
                        f'so it has no samples of its own to learn from')
    torch.manual_seed(seed)
    checkpoint['model_args'] = {**checkpoint['model_args'], 'energy_head': passes}
    model = GPT(GPTConfig(**checkpoint['model_args'])).eval().requires_grad_(False)
    model.load_state_dict(with_critic(trunk.state_dict(), model))
    model.critic.requires_grad_(True)
    return model, checkpoint


def with_critic(weights, model):
    """The state dict weights with the critic of the model in the place of its own, if it had one."""
    critic = {name: weight for name, weight in model.state_dict().items() if name.startswith('critic.')}
    return {**{name: weight for name, weight in weights.items() if not name.startswith('critic.')}, **critic}


def main():
    for name, low in (('max_iters', 1), ('log_interval', 1), ('eval_rows', 1), ('own_samples', 8), ('batch_size', 12),
                      ('seed', 0)):
        if globals()[name] < low:
            raise UserError(f'{name} must be at least {low}, got {globals()[name]}')
    if passes not in (1, 2):
        raise UserError(f'passes expects 1 or 2, got {passes}')
    path, goal = find_checkpoint(init_from, out_dir), save or os.path.join(out_dir, 'ckpt_energy.pt')
    if os.path.realpath(path) == os.path.realpath(goal):
        raise UserError(f'{goal} would overwrite the checkpoint it is made from: name another one as --init_from, or as --save')
    model, checkpoint = load_trunk(path)
    meta, config = checkpoint['meta'], checkpoint['config']
    _, data = data_of(meta, config)
    try:
        os.makedirs(os.path.dirname(goal) or '.', exist_ok=True)
    except OSError as error:
        raise UserError(f'{goal}: there is no folder to write it to: {error.strerror}') from error
    model, choices = configure_compute(model, device, dtype, attention)
    on = next(model.parameters()).device
    print(f"{path}: {config['training_type']} on {meta['name']}, iteration {checkpoint['iter_num']}\n{choices}\n"
          f'{sum(p.numel() for p in model.critic.parameters()):,} parameters of the energy head')

    pool, texts = draw_samples(model, meta, config, own_samples)
    pool, held_out = pool.to(on), own_samples // 8
    rows, noise = torch.Generator().manual_seed(seed), torch.Generator(on).manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.critic.parameters(), lr=learning_rate, weight_decay=0.0)
    means, t0 = torch.zeros(2), time.time()
    for step in range(max_iters):
        x0 = random_rows(data['train'], batch_size, model.config.block_size, rows).to(on)
        parts = losses(model, *make_batch(model, x0, meta, pool[held_out:], noise))
        if not torch.isfinite(sum(parts)):
            raise UserError(f'the loss is no longer finite at step {step}: lower --learning_rate')
        optimizer.zero_grad(set_to_none=True)
        sum(parts).backward()
        optimizer.param_groups[0]['lr'] = learning_rate * (1 - step / max_iters)
        optimizer.step()
        means += torch.stack(parts).detach().cpu() / log_interval
        if (step + 1) % log_interval == 0:
            speed = (step + 1) / (time.time() - t0)
            left = int((max_iters - step - 1) / speed)
            print(f'step {step + 1}/{max_iters}  energy {means[0]:.3f}  tokens {means[1]:.3f}  {speed:.1f} it/s  '
                  f'{left // 60}:{left % 60:02d} left', flush=True)
            means.zero_()

    val = spread_rows(data['val'], eval_rows, model.config.block_size).to(on)
    result = measure(model, meta, val, pool[:held_out], texts[:held_out], noise)
    print('energy of held-out rows, ROC-AUC against ' + ', '.join(f'{name} {auc:.3f}' for name, auc in result.items()))
    keep = {name: checkpoint[name] for name in ('iter_num', 'model_args', 'meta')}
    settings = {name: globals()[name] for name in configurator.settings(__file__)}
    weights = {name: checkpoint.get(name) and with_critic(checkpoint[name], model) for name in ('model', 'ema')}
    save_checkpoint(goal, dict(keep, **weights, config=dict(config, energy_head=passes), result=checkpoint.get('result'),
                               energy=dict(settings=settings, result=result)))
    print(f'saved {goal}; sample with it: python sample.py --init_from={goal} --best_of=4')


if __name__ == '__main__':
    configurator.run(globals())
