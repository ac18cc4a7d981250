"""parts/edits.py: labels that give a text back, and the rounds that do what the network answers."""

import itertools
import json
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARITHMETIC, default_config, seeded, tiny_gpt, write_checkpoint

from configurator import UserError
from corruption import Task, ask
from parts import verify
from parts.edits import applied, edits_of, labels
from parts.noise import NOISE, mixed_noise
from parts.long import edits_in_windows
from parts.presets import EDITS, GROW, VERIFIED, choose_rules, refuse_idle
from parts.verify import edited
from plumbing import show
from plumbing.evaluate import causal_nll
from plumbing.rows import Ends, same_length
from sample import fill, generate_diffusion

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
            ids, _ = applied(rows[i].tolist(), (rows[i] < 0).tolist(), answer.tolist(), MASK, WRONG)
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
    most_logits, wte = 100, torch.nn.Embedding(1, 1)

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


class Always(Oracle):
    """A network that answers a function of the row, the surer the further left; [MASK]s become 0."""

    def __init__(self, answers, block_size):
        self.answers, self.config = answers, SimpleNamespace(block_size=block_size)

    def __call__(self, x):
        sure = 30.0 - torch.arange(x.size(1))[None, :, None]
        return sure * torch.nn.functional.one_hot(torch.where(x == MASK, 0, self.answers(x)), WRONG + 1)


def mend(model, x, fixed=None, **rules):
    """The row x, a list of ids, after the rounds, and its passes."""
    x = torch.tensor([x])
    fixed = x < 0 if fixed is None else torch.tensor([fixed])
    rows, nfe, _ = generate_diffusion(model, x, fixed, **{**EDITS, **rules})
    return rows[0].tolist(), nfe.item()


def test_rounds_end():
    """After a round without a change, when a text comes again, after how.rounds, where there is no room."""
    assert mend(Always(lambda x: x, 9), [0, 1, 2]) == ([0, 1, 2], 1)
    assert mend(Always(lambda x: 1 - x, 9), [0, 1, 1]) == ([0, 1, 1], 2)
    assert mend(Always(lambda x: (x + 1) % 3, 9), [0, 1, 2], rounds=2) == ([2, 0, 1], 2)
    # the surest holes first, a pass for each hole
    more = Always(lambda x: torch.full_like(x, MASK), 5)
    assert mend(more, [1, 2, 2], rounds=1) == ([0, 1, 0, 2, 2], 3)
    assert mend(more, [1, 2, 2], rounds=9) == ([0, 1, 0, 2, 2], 4)
    assert mend(Always(lambda x: torch.full_like(x, WRONG), 5), [1, 2], rounds=9) == ([1, 2], 1)


def test_what_is_fixed_stays_and_holes_open_beside_what_is_open():
    """A hole of any length: _ in 1 _ 2 may go, and others come left and right of what fills it."""
    fixed = [True, False, True, True]
    assert mend(Always(lambda x: torch.full_like(x, WRONG), 9), [1, MASK, 2, 2], fixed) == ([1, 2, 2], 3)
    more = Always(lambda x: torch.full_like(x, MASK), 9)
    assert mend(more, [1, MASK, 2, 2], fixed, rounds=1) == ([1, 0, 0, 0, 2, 2], 4)


@pytest.mark.parametrize('p, threshold, edited', [
    ((0.6, 0.4), 0.3, False), ((0.4, 0.6), 0.3, True), ((0.4, 0.6), 0.7, False),
    ((0.4, 0.3, 0.3), 0.5, False)])
def test_what_is_edited_is_doubted_and_less_likely_than_the_edit(p, threshold, edited):
    """p: how likely it is that the token 0 stays, and of others."""
    model, x = Oracle(torch.tensor([[0]]), None, 9), torch.tensor([[0]])
    model.logits = lambda hidden: torch.tensor([*p, *[0.0] * (WRONG + 1 - len(p))]).log().expand(1, 1, -1)
    how = SimpleNamespace(remask_threshold=threshold)
    run = SimpleNamespace(model=model, mask=MASK, ends=Ends(), how=how)
    assert (edits_of(run, x, x < 0) != x).item() == edited


CHANGES = dict(training_type='joint', corruption='own:0.5,noise:0.5', remask_target='edits')


@pytest.mark.parametrize('seed', range(4))
def test_a_single_edit_is_what_rounds_would_make_of_it(seed):
    rng = random.Random(seed)
    x = torch.randint(3, (5, 6), generator=seeded(seed))
    fixed = torch.rand(5, 6, generator=seeded(seed)) < 0.3
    at = torch.tensor([[rng.randrange(6) for _ in range(4)] for _ in range(5)])
    answers = torch.tensor([[rng.choice([0, 1, 2, MASK, WRONG]) for _ in range(4)] for _ in range(5)])
    ids, stays, more = edited(F.pad(x, (0, 2)), F.pad(fixed, (0, 2)), at, answers, MASK)
    for row, edit in itertools.product(range(5), range(4)):
        single = x[row].clone()
        single[at[row, edit]] = answers[row, edit]
        new, kept = applied(x[row].tolist(), fixed[row].tolist(), single.tolist(), MASK, WRONG)
        assert len(new) == 6 + more[row, edit]
        assert ids[row, edit, :len(new)].tolist() == new and stays[row, edit, :len(new)].tolist() == kept


def every_edit(row, fixed):
    """All rows that one edit makes of a row, a list of ids of which the first ones are fixed."""
    found = []
    for at in range(fixed, len(row)):
        found.append(row[:at] + row[at + 1:])
        found += [row[:at] + [v] + row[at + more:] for v in range(3) for more in (0, 1)]
    return [new for new in found if new]


@pytest.mark.parametrize('fixed', [0, 2])
@torch.no_grad()
def test_verified_edits_end_where_no_edit_makes_the_text_likelier(fixed, monkeypatch):
    """Every round makes it likelier by MARGIN nats, all edits are tried, and what is fixed stays."""
    monkeypatch.setattr(verify, 'MARGIN', 0.1)
    model, T = tiny_gpt(3, 8, seed=3, scale=0.6), 5

    def nats(row):
        row = torch.tensor([row])
        return causal_nll(model, row, row >= 0).item()
    x = torch.randint(3, (15, T), generator=seeded(1))
    known = torch.arange(T).expand(15, -1) < fixed
    how = dict(EDITS, remask_threshold=1.0, verify=200)
    rows, nfe, history = generate_diffusion(model, x, known, trace=True, **how)
    moved = 0
    for before, after, steps in zip(x.tolist(), rows, torch.stack(history, 1)):
        after = after.tolist()
        assert after[:fixed] == before[:fixed] and steps[-1][:len(after)].tolist() == after
        assert nats(after) <= nats(before) - verify.MARGIN * (after != before) + 1e-4
        if len(after) < 8:
            assert all(nats(new) > nats(after) - verify.MARGIN - 1e-4 for new in every_edit(after, fixed))
        moved += after != before
    assert moved > 5 and (nfe > 20).all()


def test_rules_of_checkpoints_with_edits():
    config = default_config(**CHANGES)
    alone, both = dict(config, causal_ratio=0.0), dict(config, causal_ratio=0.3)
    assert choose_rules(both, task='repair') == dict(VERIFIED, ar_prefix=0)
    assert choose_rules(alone, task='repair') == dict(EDITS, ar_prefix=0)
    with pytest.raises(UserError, match='verify needs a trained causal mode'):
        choose_rules(alone, task='repair', verify=3)
    with pytest.raises(UserError, match='rounds has no say beside verify'):
        choose_rules(both, task='repair', rounds=2)
    assert choose_rules(both, task='repair', rounds=2, verify=0)['rounds'] == 2
    for chosen in (dict(remask_schedule=(0.3, 0.1)), dict(correct_share=0.5), dict(remask_full=True)):
        with pytest.raises(UserError, match='with rounds of edits'):
            refuse_idle(alone, chosen, choose_rules(alone, task='repair', **chosen))
    with pytest.raises(UserError, match='rounds of edits go by what the network calls wrong'):
        choose_rules(alone, task='repair', rounds=4, remask='random')
    assert 'rounds' not in choose_rules(config, task='repair', rewrite=False)
    assert choose_rules(config, task='infill', any_length=True)['rounds']
    assert 'rounds' not in choose_rules(config, task='infill')
    for how in (dict(task='repair', rounds=2), dict(task='infill', any_length=True)):
        with pytest.raises(UserError, match='--remask_target=edits'):
            choose_rules(default_config(**{**CHANGES, 'remask_target': 'original'}), **how)


def test_the_command(run, tmp_path):
    """A network of no training repairs and fills holes of any length; what it was given stays around them."""
    path = write_checkpoint(tmp_path / 'a.pt', **CHANGES)
    words = ('sample', f'--init_from={path}', '--device=cpu', f"--save={tmp_path / 's.jsonl'}")
    status, out, err = run(*words, '--task=repair', '--text=(+12))=3', f"--html={tmp_path / 'p.html'}")
    assert not status and 'rounds=4' in out and '-> ' in out, err
    status, out, err = run(*words, '--task=infill', '--text=(+[...]2)=3', '--num_samples=9')
    samples = [json.loads(line)['text'] for line in open(tmp_path / 's.jsonl', encoding='utf-8')]
    assert not status and len(samples) == 9, err
    assert all(text.startswith('(+') and text.endswith('2)=3') for text in samples)
    status, out, err = run(*words, '--task=infill', '--text=(+[...]_)=3')
    assert status and "'_'" in err


def test_a_text_longer_than_the_network_reads_is_edited_in_windows():
    """A sampler that doubles every 1 and takes every 2 away, and must not see more than it can read."""
    seen = []

    def sampler(canvas, fixed, trace):
        assert canvas.size(1) <= 14 and (canvas == canvas[:, :1]).any()
        seen.append(canvas.size(1))
        rows = [torch.tensor([out for id, kept in zip(row.tolist(), keep.tolist())
                              for out in ([id] if kept or id > 2 else [1, 1] * (id == 1))])
                for row, keep in zip(canvas, fixed)]
        return rows, torch.ones(len(canvas), dtype=torch.long)

    canvas = torch.randint(1, 7, (3, 61), generator=seeded(1))
    fixed = torch.rand(3, 61, generator=seeded(2)) < 0.3
    fixed[:, 24:40] = True                                                 # two windows with nothing to do
    rows, nfe = edits_in_windows(sampler, canvas, fixed, 16, steps := [])
    first, last = steps
    for row, ids, kept, shown in zip(rows, canvas, fixed, last):
        expected, _ = edits_in_windows(sampler, ids[None, :7], kept[None, :7], 16)
        wanted = sampler(ids[None, :1], kept[None, :1], None)[0][0].tolist()
        for id, keep in zip(ids[1:], kept[1:]):
            wanted += sampler(id.view(1, 1), keep.view(1, 1), None)[0][0].tolist()
        assert row.tolist() == wanted and shown[:len(row)].tolist() == wanted
        assert expected[0].tolist() == wanted[:len(expected[0])]           # a short one is one window
    assert torch.equal(first[:, :61], canvas) and nfe.tolist() == [6] * 3


@torch.no_grad()
def test_a_long_text_repaired():
    meta = dict(ARITHMETIC, name='words', format='stream', block_size=None, bos=None, eos=None, pad=None)
    model = tiny_gpt(18, 16)
    canvas = torch.randint(18, (2, 50), generator=seeded(3))
    for rules in (EDITS, GROW):
        samples = fill(model, meta, canvas, canvas < 9, trace=True, **rules)
        for row, sample in zip(canvas.tolist(), samples):
            kept = [id for id in row if id < 9]
            left = iter(sample['tokens'])
            assert all(id in left for id in kept) and 18 not in sample['tokens']   # in this order
            assert sample['trace'][0][:50].tolist() == row


@pytest.mark.parametrize('seed', range(20))
def test_changes(seed):
    """Signs under the old and the new text; what has none is in both."""
    old, new = (torch.randint(3, (n,), generator=seeded(seed + 50 * n)).tolist() for n in (8, 6 + seed % 5))
    taken, marks = show.changes(old, new, [False] * len(new))
    assert len(taken) == len(old) and len(marks) == len(new)
    assert [i for i, c in zip(old, taken) if c == ' '] == [i for i, c in zip(new, marks) if c == ' ']
    assert taken.count('~') == marks.count('~') and {*taken} <= {*' -~'} and {*marks} <= {*' +~'}
    assert show.changes([1, 2], [1, 2], [True, False]) == ('  ', '? ')
