"""
How the weights move: Muon for the matrices of the blocks, AdamW for the rest, rates that warm up and decay,
averaged weights.
"""

import math

import torch

from plumbing import distributed


class Muon(torch.optim.Muon):
    """
    torch.optim.Muon (Jordan et al. 2024), all matrices of one shape at a time.

    The steps are the same, by as many kernels for any depth. A GPU would otherwise wait for them to be
    launched, longer than for the whole backward pass of a small network. State, coefficients and rates are
    those of torch.optim.Muon.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
                    if 'momentum_buffer' not in self.state[p]:
                        self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad)
            for (rows, columns), params in by_shape.items():
                grads = [p.grad for p in params]
                momenta = [self.state[p]['momentum_buffer'] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
                nesterov = torch.stack(grads).lerp(torch.stack(momenta), group['momentum'])
                moves = orthogonalized(distributed.full(nesterov), group['ns_coefficients'],
                                       group['ns_steps'])
                moves = distributed.like(moves.to(nesterov.dtype), nesterov)
                (moves,), params = distributed.local([moves]), distributed.local(params)
                torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
                rate = group['lr'] * max(1, rows / columns) ** 0.5
                torch._foreach_add_(params, moves.unbind(), alpha=-rate)


def orthogonalized(matrices, coefficients, steps):
    """Roughly the nearest semi-orthogonal matrices (n, rows, columns), by Newton and Schulz in bfloat16."""
    a, b, c = coefficients
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.bfloat16().mT if tall else matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT                                             # the smaller side, squared
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizers(model, optimizer, learning_rate, muon_lr, weight_decay, betas, bigram_decay=0.0):
    """
    A list of optimisers: Muon for the matrices of the blocks and AdamW for the rest, or AdamW only.

    weight_decay is for these matrices, bigram_decay for the tables of pairs.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    tables = list(model.parts['bigrams'].parameters()) if 'bigrams' in model.parts else []
    known = {*matrices, *tables}
    groups = [dict(params=[p for p in model.parameters() if p not in known])]
    if tables:
        groups.append(dict(params=tables, weight_decay=bigram_decay))
    fused = next(model.parameters()).device.type != 'mps'
    if optimizer == 'muon':
        return [Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
                torch.optim.AdamW(groups, lr=learning_rate, betas=betas, weight_decay=0.0, fused=fused)]
    groups = [dict(params=matrices, weight_decay=weight_decay), *groups]
    return [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, weight_decay=0.0, fused=fused)]


def update(model, optimizers, config, scale):
    """
    One step of the optimisers, at the share scale of their peak rates.

    The draft head must not change what the network learns, so it has no say in the clipping or the credit
    either.
    """
    peaks = [config['learning_rate']]
    if config['optimizer'] == 'muon':
        peaks.insert(0, config['muon_lr'])
    for optim, peak in zip(optimizers, peaks):
        for group in optim.param_groups:
            group['lr'] = peak * scale
    trunk = [p for name, p in model.named_parameters() if not name.startswith('drafter.')]
    if config['grad_clip']:
        distributed.clip_gradients(trunk, config['grad_clip'])
    if config.get('k1_credit'):
        give_credit([p.grad for p in trunk if p.grad is not None])
    for optim in optimizers:
        optim.step()


def give_credit(grads):
    """
    Scales each of the n gradients g by min(1, n |g| / sum |g|), in place (k1_credit).

    A tensor whose gradient is smaller than the mean moves less still. Both optimisers undo a constant factor,
    since their steps do not depend on the scale of the gradient: what is left is how the factor changes from
    step to step.
    """
    norms = distributed.norms(grads)                                # (n,)
    credit = (len(grads) * norms / norms.sum().clamp(min=1e-30)).clamp(max=1)
    torch._foreach_mul_(distributed.local(grads), credit.unbind())


def average(ema, model, decay):
    """Moves the averaged weights towards those of the model: a share decay of what they are stays."""
    with torch.no_grad():
        old, new = ([*distributed.local(net.parameters()), net.mask_logit_bias] for net in (ema, model))
        torch._foreach_lerp_(old, new, 1 - decay)


def lr_scale(step, schedule, max_iters, warmup_iters, decay_share):
    """The learning rate of a step as a share of its peak."""
    warmup = min(1.0, (step + 1) / (warmup_iters + 1))
    if schedule == 'cosine':
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max_iters)))
    return min(warmup, (max_iters - step) / max(1.0, decay_share * max_iters))


def ramp(step, warmup_iters):
    """A curriculum: 0 at step 0, 1 from warmup_iters on, linear between."""
    return min(1.0, step / warmup_iters) if warmup_iters else 1.0
