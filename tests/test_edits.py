"""parts/edits.py: labels that give a text back, and the rounds that do what the network answers."""

from types import SimpleNamespace

import pytest
import torch
from conftest import seeded

from corruption import Task, ask
from parts.edits import applied, labels, same_length
from parts.noise import NOISE, mixed_noise
from parts.presets import EDITS
from plumbing.rows import Ends
from sample import generate_diffusion

MASK, WRONG, PAD, END = 5, 6, 4, 3                                  # few tokens, so that much is alike
MIX = tuple((what, 1.0) for what in NOISE)
WITHOUT_MOVES = tuple((what, 1.0) for what in ('replace', 'mask'))


def texts(num, T, pad):
    """Random rows (num, T), with pad padded from anywhere on, and where they are text."""
    x0 = torch.randint(3, (num, T), generator=seeded(0))
    real = torch.arange(T) < torch.randint(1, T + 1, (num, 1), generator=seeded(1))
    return (x0.masked_fill(~real, PAD), real) if pad else (x0, torch.ones_like(real))


def noisy_texts(num, T, pad, sigma, mix=MIX):
    """Such rows, where they are text, and what noise makes of them."""
    clean, real = texts(num, T, pad)
    level = torch.full((num,), sigma)
    return clean, real, mixed_noise(clean, real, level, mix, MASK, PAD if pad else None, seeded(3))


def spell(x):
    """Ids as text: _ is [MASK], # [WRONG], . padding."""
    return ''.join('abcd._#'[i] for i in x)


@pytest.mark.parametrize('noisy, clean, expected', [
    ('abca', 'abca', 'abca'), ('aacb', 'abcb', 'abcb'),             # keep, replace
    ('aabc', 'abca', '#abc'), ('abbc', 'abca', 'a#bc'),             # take away; of a double the left one
    ('acba', 'abcba', 'a_ba'), ('abcb', 'bacb', 'bacb'),             # open a hole; a swap is two replacements
    ('abc.', 'abca', 'abc_'), ('ab..', 'abca', 'ab_.'),             # at the end the padding says it
    ('a_b.', 'acab', 'ac_.'), ('a_b_', 'abac', 'abac'),             # masks are the first of what is missing
    ('acb_', 'abcb', 'a_b_'), ('bca_', 'abca', '_ca_')])            # and nothing where the row is cut off
def test_labels_by_hand(noisy, clean, expected):
    x, x0 = (torch.tensor([['abcd._'.index(c) for c in text]]) for text in (noisy, clean))
    assert spell(labels(x, x0, MASK, WRONG, PAD if '.' in noisy else None)[0]) == expected


@pytest.mark.parametrize('pad', [PAD, None])
@pytest.mark.parametrize('sigma', [0.1, 0.4, 0.9])
def test_labels_give_the_clean_text_back(pad, sigma):
    """Whatever noise does, round by round; of a stream all but what is missing at its end."""
    clean, _, noisy = noisy_texts(700, 12, pad, sigma)
    rows, at_work = [*noisy], [*range(len(clean))]

    def labelled(among):
        for group in same_length(rows, among):
            x = torch.stack([rows[i] for i in group])
            yield from zip(group, labels(x, clean[group], MASK, WRONG, pad))

    for number in range(15):
        for i, answer in [*labelled(at_work)]:
            if torch.equal(rows[i], answer):
                at_work.remove(i)
            ids, _ = applied(rows[i], rows[i] < 0, answer, MASK, WRONG)
            assert len([token for token in ids if token != PAD]) <= 12          # never longer than the clean
            rows[i] = torch.tensor((ids + [PAD] * 12)[:12] if pad else ids, dtype=torch.long)
        for i, answer in [*labelled([i for i in at_work if MASK in rows[i]])]:
            rows[i] = torch.where(rows[i] == MASK, answer, rows[i])
    assert not at_work
    for ids, x0 in zip(rows, clean):
        assert torch.equal(ids, x0[:len(ids)])


@pytest.mark.parametrize('pad', [PAD, None])
def test_clean_text_is_kept_and_noise_without_moves_is_original(pad):
    clean, real, noisy = noisy_texts(100, 12, pad, 0.4, WITHOUT_MOVES)
    assert torch.equal(labels(clean, clean, MASK, WRONG, pad), clean)
    how = dict(remask_ratio=1.0, corruption=(('noise', 1.0),), sigma=(0.05, 0.1))
    asked = {}
    for target in ('original', 'edits'):
        task = Task(remask_target=target, noise_mix=(('mask', 1.0), ('replace', 0.5)), **how)
        asked[target] = ask(clean, torch.ones_like(real), real, task, (MASK, WRONG, pad), seeded(1))
    same = (asked['edits'][1] == asked['original'][1]).double().mean()
    assert same > 0.97                                              # two replaced may have a cheaper reading
    for a, b in zip(asked['edits'][::2], asked['original'][::2]):
        assert torch.equal(a, b)


@pytest.mark.parametrize('pad', [PAD, None])
def test_what_is_asked(pad):
    """Guesses keep the clean token as target; of noise what the labels say, and nothing at idle masks."""
    clean, real = texts(200, 12, pad)
    task = Task(remask_target='edits', remask_ratio=1.0, corruption=(('random', 0.5), ('noise', 0.5)),
                sigma=(0.3, 0.3), noise_mix=MIX)
    free = torch.ones_like(real)
    input, target, weight = ask(clean, free, real, task, (MASK, WRONG, pad), seeded(1))
    moved = (target != clean).any(1)
    expected = labels(input[moved], clean[moved], MASK, WRONG, pad)
    assert torch.equal(target[moved], expected) and moved.float().mean() > 0.2
    asked = (target == WRONG).any(1) & (target == MASK).any(1)
    assert asked.any() and (weight[(input == MASK) & (target == MASK)] == 0).all()
    assert (weight[(input != target) & (input != MASK) & real] > 0).all()


class Oracle:
    """A network that knows the clean text, and answers with its labels."""
    mask_token_id, wrong_token_id, parts = MASK, WRONG, {}

    def __init__(self, clean, pad, block_size):
        self.clean, self.pad, self.config = clean, pad, SimpleNamespace(block_size=block_size)

    def __call__(self, x):
        answers = labels(x, self.clean.expand(len(x), -1), MASK, WRONG, self.pad)
        return 30.0 * torch.nn.functional.one_hot(answers, WRONG + 1)

    def logits(self, hidden, real_only=False):
        special = torch.arange(WRONG + 1) >= MASK
        return hidden.masked_fill(special & real_only, float('-inf'))


@pytest.mark.parametrize('pad', [PAD, None])
@pytest.mark.parametrize('sigma', [0.1, 0.5])
def test_rounds_with_an_oracle_restore_the_text(pad, sigma):
    clean, real = texts(1, 12, pad)
    if pad:
        real = torch.arange(12)[None] < 9
        clean = torch.where(real, torch.tensor([[0, 1, 2, 0, 0, 1, 2, 1, END, 0, 0, 0]]), PAD)
    many, level = clean.expand(60, -1), torch.full((60,), sigma)
    noisy = mixed_noise(many, real.expand(60, -1), level, MIX, MASK, pad, seeded(2))
    noisy = [row if pad else row[:1 + int((row != MASK).nonzero().max())] for row in noisy]
    for group in same_length(noisy, range(60)):
        x = torch.stack([noisy[i] for i in group])
        rules = dict(EDITS, rounds=12, ends=Ends(END, PAD) if pad else Ends(), trace=True)
        rows, nfe, history = generate_diffusion(Oracle(clean, pad, 12), x, x < 0, **rules)
        for row, passes, steps in zip(rows, nfe, torch.stack(history, 1)):
            assert torch.equal(row, clean[0, :len(row)]) and len(row) >= 6 and passes >= 1
            assert torch.equal(steps[-1][:len(row)], row)
    once = generate_diffusion(Oracle(clean, pad, 12), clean, clean < 0, **rules)
    assert torch.equal(once[0][0], clean[0]) and once[1].item() == 1
