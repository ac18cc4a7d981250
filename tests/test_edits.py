"""parts/edits.py: labels that give a text back, and the rounds that do what the network answers."""

import pytest
import torch
from conftest import seeded

from corruption import Task, ask
from parts.edits import applied, labels
from parts.noise import NOISE, mixed_noise

MASK, WRONG, PAD = 5, 6, 4                                          # few tokens, so that much is alike
MIX = tuple((what, 1.0) for what in NOISE)


def texts(num, T, pad):
    """Random rows (num, T), with pad padded from anywhere on, and where they are text."""
    x0 = torch.randint(4, (num, T), generator=seeded(0))
    real = torch.arange(T) < torch.randint(1, T + 1, (num, 1), generator=seeded(1))
    return (x0.masked_fill(~real, PAD), real) if pad else (x0, torch.ones_like(real))


def row(ids, T, pad):
    """A list of ids as a row; with pad (1, T)."""
    while pad and ids[-1:] == [PAD]:
        ids = ids[:-1]
    return torch.tensor([ids + [PAD] * (T - len(ids)) if pad else ids], dtype=torch.long)


def one_round(x, clean, pad):
    """A row after one round of its labels, every mask filled by the clean token, and the labels."""
    answers = labels(x, clean, MASK, WRONG, PAD if pad else None)
    ids, _ = applied(x[0], torch.zeros_like(x[0], dtype=torch.bool), answers[0], MASK, WRONG)
    x = row(ids, clean.size(1), pad)
    assert x.size(1) <= clean.size(1)                               # never longer than the clean text
    return torch.where(x == MASK, labels(x, clean, MASK, WRONG, PAD if pad else None), x), answers


@pytest.mark.parametrize('pad', [True, False])
@pytest.mark.parametrize('sigma', [0.1, 0.4, 0.9])
def test_labels_give_the_clean_text_back(pad, sigma):
    """Whatever noise does, round by round; of a stream all but what is missing at its end."""
    clean, real = texts(700, 12, pad)
    level = torch.full((len(clean),), sigma)
    noisy, rounds = mixed_noise(clean, real, level, MIX, MASK, PAD if pad else None, seeded(3)), []
    for x, x0 in zip(noisy.split(1), clean.split(1)):
        for number in range(14):
            x, answers = one_round(x, x0, pad)
            if not (answers == WRONG).any() and torch.equal(x, answers):
                break
        assert torch.equal(x, x0[:, :x.size(1)])
        rounds.append(number)
    print(torch.tensor(rounds).bincount())
