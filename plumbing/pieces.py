"""
Losses over a large vocabulary, some positions at a time: the logits of all of them would not fit, and need
not be kept.
"""

import torch


class Piecewise(torch.autograd.Function):
    """See in_pieces."""

    @staticmethod
    def forward(ctx, of, size, hidden, words):
        learns = ctx.needs_input_grad[3]
        total, found, grad_hidden, grad_words = 0.0, [], [], torch.zeros_like(words) if learns else None
        cast = words.detach().to(hidden.dtype).requires_grad_(learns)       # once, not for every piece
        for at in (slice(start, start + size) for start in range(0, len(hidden), size)):
            with torch.enable_grad():
                piece = hidden[at].detach().requires_grad_()
                part, more = of(piece, cast, at)
                grads = torch.autograd.grad(part, (piece, cast)[:1 + learns])
            total += part.detach()
            found.append(more)
            grad_hidden.append(grads[0])
            if learns:
                grad_words += grads[1]                              # added up in float32
        ctx.save_for_backward(torch.cat(grad_hidden), grad_words)
        found = [torch.cat(column) for column in zip(*found)]
        ctx.mark_non_differentiable(*found)
        return total, *found

    @staticmethod
    def backward(ctx, grad, *others):
        grad_hidden, grad_words = ctx.saved_tensors
        return None, None, grad_hidden * grad, None if grad_words is None else grad_words * grad


def at_once(words, most):
    """How many positions have at most `most` logits, words (rows, C) being the table; at least one."""
    return max(1, most // len(words))


def portions(model, x):
    """x (N, ...) in portions of as many positions as the model may compute all logits of at a time."""
    return x.split(at_once(model.wte.weight, model.most_logits))


def in_pieces(of, hidden, words, most):
    """
    of(hidden, words, places), a sum over positions and vectors (n,) of what else it tells about them: (sum,
    vectors (N,)).

    hidden (N, C), words (rows, C). If there are more than `most` logits, of is asked for some positions at a
    time, and the gradients are taken on the way, so that only the logits of one piece exist at any time (as
    in the Liger kernels, Hsu et al. 2024). A large vocabulary takes a fraction of the memory, and on a CPU,
    where fresh memory is dear, less time as well.
    """
    if len(hidden) * len(words) <= most or not torch.is_grad_enabled():
        return of(hidden, words, slice(None))
    total, *found = Piecewise.apply(of, at_once(words, most), hidden, words)
    return total, found


def sums(values, weights, which):
    """The sums of values and weights (N,) over the True positions of which (N,): (2,)."""
    return torch.stack(((values * which).sum(), (weights * which).sum()))


def added(parts, more):
    """The sum of two dicts of numbers, name by name; what one of them lacks is 0."""
    return {name: parts.get(name, 0) + more.get(name, 0) for name in {**parts, **more}}
