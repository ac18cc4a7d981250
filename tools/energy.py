"""
Give a trained network an energy head: a number for every text that says how little it looks like the data.

    python tools/energy.py --init_from=ckpt                  1000 steps from the newest checkpoint in out_dir
    python sample.py --init_from=out/energy --best_of=4      of 4 samples the one of the lowest energy
    python sample.py --init_from=out/energy --guide=4        at every step one of 4 by exp(-energy)
    python sample.py --init_from=out/energy --remask=critic  re-mask what the head calls wrong

The network is frozen; a critic of 20,000 parameters learns on its passes over the text. It tells clean rows
from rows with noise or own guesses in them, and from the network's own samples. Against the samples the best
energy is the logarithm of how much likelier a text is among them than in the data (noise contrastive
estimation; Xu et al. 2024), so that weighing samples by exp(-energy) makes up for what the sampler got wrong.
Noise alone makes a detector of noise, and the samples of a sampler hold none.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import configurator

configurator.help_first(globals())           # --help must not wait for torch
# ruff: noqa: E402 (so the imports come after it)

import shlex
import time

import torch
import torch.nn.functional as F

from configurator import UserError
from corruption import own_errors
from data.loader import data_of, random_rows, spread_rows
from model import GPT, GPTConfig
from parts.energy import energy, text_of, token_energy
from parts.noise import NOISE, mixed_noise, noise_level
from parts.presets import choose_rules, supports
from plumbing.checkpoint import save_checkpoint
from plumbing.checks import check_ranges, parse_mixture
from plumbing.device import configure_compute
from plumbing.draw import draw, filtered
from plumbing.evaluate import roc_auc
from plumbing.rows import Ends, places
from plumbing.text import load_task, modelled, rows_of, scored
from sample import generate
from tools.common import learn, load_writer

# -----------------------------------------------------------------------------
init_from = 'ckpt'       # 'ckpt': the newest checkpoint in out_dir; or the path of one
out_dir = 'out'          # where 'ckpt' looks; the result goes to its folder energy
save: str = None         # path of the result; None: energy/ckpt_energy.pt in out_dir
passes = 2               # what the head reads: 1, the bidirectional pass; 2, the causal one as well
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

# noise with masks in it and without
MIXES = [parse_mixture('noise_mix', mix, NOISE)
         for mix in ('mask:0.5,replace:0.2,swap:0.15,delete:0.075,insert:0.075',
                     'replace:0.4,swap:0.3,delete:0.15,insert:0.15')]


@torch.no_grad()
def complete(model, x, generator=None):
    """The masks of x (B, T) filled in one pass: by draws, or without a generator by the likeliest tokens."""
    masked = x == model.mask_token_id
    logits = model.logits(model(x, only=places(masked)), real_only=True)       # (N, V+2)
    drawn = logits.argmax(-1) if generator is None else draw(filtered(logits), generator)
    return x.masked_scatter(masked, drawn)


def noised(model, x0, meta, mix, sigma_min, sigma_max, generator):
    """Rows x0 (B, T) with mixed_noise of that mix, its masks filled by the likeliest tokens: ids (B, T)."""
    sigma = noise_level(len(x0), sigma_min, sigma_max, generator)
    real = modelled(x0, meta)[1]
    return complete(model, mixed_noise(x0, real, sigma, mix, model.mask_token_id, meta['pad'], generator))


def draw_samples(model, meta, config, num):
    """num samples by the network's usual samplers, in a random order: ids (num, T), a list of their texts."""
    hows = [dict(remask='none', steps=steps) for steps in (16, 32, 64)]
    if choose_rules(config, inside=True)['remask'] == 'wrong':
        hows.append(dict(remask='wrong', steps=32))
    if supports(config).causal:
        hows.append(dict(remask='causal'))
    samples = []
    for i, how in enumerate(hows):
        share = num * (i + 1) // len(hows) - num * i // len(hows)
        t0, rules = time.perf_counter(), choose_rules(config, commit='random', **how)
        samples += generate(model, meta, share, seed=seed + i, progress=True, **rules)
        words = ', '.join(f'{name}={value}' for name, value in how.items())
        print(f'{share} samples, {words}: {time.perf_counter() - t0:.0f} s', flush=True)
    ids = rows_of(samples, meta, model.config.block_size)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    return ids[order], [samples[i]['text'] for i in order.tolist()]


def make_batch(model, x0, meta, pool, generator):
    """
    Clean rows x0 (B, T) -> the batch (ids, real, label, wrong, known).

    ids and real (B, T), see parts.energy; label (B,), whether a row is not clean; wrong (B, T), whether a
    token is wrong; known (B,), the rows whose tokens teach that. The first half stays clean. The other half
    becomes noise, own guesses and own samples out of the pool (N, T), in equal shares. What came out clean is
    clean, but a sample is a sample even if there is nothing wrong with it.
    """
    clean, rest = x0.tensor_split(2)
    noise, guesses, own = rest.tensor_split(3)
    noisy = [noised(model, part, meta, mix, 0.1, 0.6, generator)
             for part, mix in zip(noise.tensor_split(2), MIXES)]
    drawn = pool[torch.randint(len(pool), (len(own),), generator=generator, device=x0.device)]
    wrong_guesses = own_errors(model, guesses, *modelled(guesses, meta), generator)     # some before others
    rows = torch.cat((clean, *noisy, complete(model, wrong_guesses, generator), drawn))
    ids, real = text_of(rows, Ends.of(meta))
    wrong, row = ids != x0, torch.arange(len(x0), device=x0.device)
    first_guess, first_sample = len(clean) + len(noise), len(x0) - len(own)
    known = (row >= first_guess) & (row < first_sample)
    return ids, real, wrong.any(1) | (row >= first_sample), wrong, known


def losses(model, ids, real, label, wrong, known):
    """What make_batch returned -> two cross-entropies: of the energies, and of the scores of tokens."""
    score, at = token_energy(model, ids, real), real & known[:, None]           # (B, T)
    return dict(energy=F.binary_cross_entropy_with_logits(score.logsumexp(-1), label.float()),
                tokens=F.binary_cross_entropy_with_logits(score[at], wrong[at].float()))


def train_critic(model, meta, rows, pool, noise):
    """Trains the critic on rows of a split against noise, guesses and the samples of the pool (N, T)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.critic.parameters(), lr=learning_rate, weight_decay=0.0)

    def next_losses():
        x0 = random_rows(rows, batch_size, model.config.block_size, generator).to(noise.device)
        return losses(model, *make_batch(model, x0, meta, pool, noise))

    learn(optimizer, next_losses, globals())


@torch.no_grad()
def measure(model, meta, x0, own, texts, generator):
    """
    The ROC-AUC of the energy, clean rows x0 (N, T) against others: a dict by what the others are.

    They are the same rows with noise, and own samples (M, T), their texts a list: all of them, those that are
    malformed, and those that are well formed and have a wrong value.
    """
    def energies(ids):
        return torch.cat([energy(model, *text_of(part, Ends.of(meta))) for part in ids.split(256)]).cpu()

    clean, sampled, task = energies(x0), energies(own), load_task(meta['name'])
    noisy = noised(model, x0, meta, MIXES[0], 0.2, 0.6, generator)
    hit = (noisy != x0).any(1).cpu()  # noise spares some rows, others are put right
    against = {'noise': energies(noisy)[hit], 'own samples': sampled}
    scores = [scored(task, [text]) for text in texts]
    if scores and {'valid', 'correct'} <= set(scores[0]):
        valid, correct = (torch.tensor([score[name] > 0 for score in scores])
                          for name in ('valid', 'correct'))
        against.update({'malformed samples': sampled[~valid], 'wrong values': sampled[valid & ~correct]})
    return {name: roc_auc(torch.cat((clean, other)), torch.arange(len(clean) + len(other)) >= len(clean))
            for name, other in against.items() if len(other)}


def headed(trunk, model_args):
    """A trained network, frozen, with a fresh critic that learns."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**model_args)).eval().requires_grad_(False)
    model.load_state_dict(with_critic(trunk.state_dict(), model))
    model.critic.requires_grad_(True)
    return model


def with_critic(weights, model):
    """The state dict weights with the critic of the model in the place of its own, if it had one."""
    own = {f'critic.{name}': weight for name, weight in model.critic.state_dict().items()}
    return {**{name: weight for name, weight in weights.items() if not name.startswith('critic.')}, **own}


def main():
    check_ranges(configurator.current(globals()))
    for name, low in dict(own_samples=8, batch_size=12).items():
        if globals()[name] < low:
            raise UserError(f'{name} must be at least {low}, got {globals()[name]}')
    if passes not in (1, 2):
        raise UserError(f'passes expects 1 or 2, got {passes}')
    goal = save or os.path.join(out_dir, 'energy', 'ckpt_energy.pt')
    path, trunk, checkpoint = load_writer(GPT.load, init_from, out_dir, goal)
    meta, config = checkpoint['meta'], checkpoint['config']
    checkpoint['model_args']['energy_head'] = passes
    _, data = data_of(meta, config)
    model, choices = configure_compute(headed(trunk, checkpoint['model_args']), device, dtype, attention)
    parameters = sum(p.numel() for p in model.critic.parameters())
    print(f"{path}: {config['training_type']} on {meta['name']}, iteration {checkpoint['iter_num']}\n"
          f'{choices}\n{parameters:,} parameters of the energy head')

    pool, texts = draw_samples(model, meta, config, own_samples)
    place = next(model.parameters()).device
    pool, held_out = pool.to(place), own_samples // 8
    noise = torch.Generator(place).manual_seed(seed + 1)
    train_critic(model, meta, data['train'], pool[held_out:], noise)

    val = spread_rows(data['val'], eval_rows, model.config.block_size).to(place)
    result = measure(model, meta, val, pool[:held_out], texts[:held_out], noise)
    against = ', '.join(f'{name} {auc:.3f}' for name, auc in result.items())
    print(f'energy of held-out rows, ROC-AUC against {against}')
    keep = {name: checkpoint.get(name) for name in ('iter_num', 'model_args', 'meta', 'result')}
    heads = {name: checkpoint.get(name) and with_critic(checkpoint[name], model) for name in ('model', 'ema')}
    energy = dict(settings=configurator.current(globals()), result=result)
    save_checkpoint(goal, dict(**keep, **heads, config=dict(config, energy_head=passes), energy=energy))
    print(f'saved {goal}; sample with it: python sample.py --init_from={shlex.quote(goal)} --best_of=4')


if __name__ == '__main__':
    configurator.run(globals())
