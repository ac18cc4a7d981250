"""Texts that are still doubted when they are finished are written again: which, how often, and what stays."""

import pytest
import torch
from conftest import ARITHMETIC, default_config, tiny_gpt
from oracles import Oracle, empty, follows, random_law, traced

from configurator import UserError
from parts import again
from parts.again import BELIEVED, most_doubted
from parts.look import Sampling
from parts.presets import PRESETS, choose_rules
from plumbing.evaluate import p_wrong
from plumbing.rows import Ends
from plumbing.text import start_canvas
from sample import USUAL, How, fill, generate_diffusion


def doubts(monkeypatch, of):
    """From now on of(texts (R, T)) says how much they are doubted (R,). Returns what it was asked."""
    asked = []

    def doubt(run, x, fixed):
        asked.append(x.clone())
        return of(x)
    monkeypatch.setattr(again, 'most_doubted', doubt)
    return asked


@pytest.mark.parametrize('times', [1, 2, 5])
def test_the_law_of_what_is_written_until_it_is_believed(monkeypatch, times):
    """One token, and the last of four is doubted: it stays if it is drawn every time."""
    law = random_law(4, 1, seed=2)
    doubts(monkeypatch, lambda x: (x[:, 0] == 3).double())
    canvas, nfe, _ = traced(oracle := Oracle(4, 1, law), empty(oracle, 20000)[0], redrafts=times)
    expected, bad = law.clone(), law[3]
    expected[3] = bad ** (times + 1)
    expected[:3] *= (1 - expected[3]) / (1 - bad)
    assert follows(canvas, 4, expected)
    assert set(nfe.tolist()) <= {2 * n for n in range(1, times + 2)}
    assert (nfe[canvas[:, 0] == 3] == 2 * (times + 1)).all()


def test_what_is_believed_is_left_alone_and_the_least_doubted_stays(monkeypatch):
    scores = [[0.05, 0.9, 0.9, 0.5], [0.8, 0.95, BELIEVED], [0.3, 0.2], [0.7, 0.01]]
    asked = doubts(monkeypatch, lambda x: torch.tensor(scores[len(asked) - 1]))
    oracle = Oracle(3, 4, random_law(3, 4, seed=1))
    out, nfe, trace = traced(oracle, empty(oracle, 4, prompt=[1])[0], redrafts=3, **PRESETS['surest'])
    first, second, third, fourth = asked
    assert torch.equal(out, torch.stack((first[0], third[0], fourth[1], second[2])))
    assert torch.equal(trace[-1], out) and (trace[:, :, 0] == 1).all()
    assert nfe[0] == 3 + 1 and (nfe[1:3] > nfe[3]).all()


@pytest.mark.parametrize('rules', [{}, PRESETS['surest'], dict(remask='wrong', steps=3),
                                   dict(temperature=0.5, top_k=2)], ids=str)
def test_every_pass_is_counted_and_the_seed_decides(rules):
    model, passes = tiny_gpt(18, 12, n_recur=1), []
    model.register_forward_hook(lambda module, args, hidden: passes.append(len(args[0])))
    canvas, fixed = start_canvas(model, ARITHMETIC, 1, [10, 3])
    how = dict(redrafts=3, **rules)
    one, again, other = (fill(model, ARITHMETIC, canvas, fixed, seed=seed, trace=True, **how)[0]
                         for seed in (1, 1, 2))
    assert one['tokens'] == again['tokens'] != other['tokens']
    assert one['nfe'] + again['nfe'] + other['nfe'] == sum(passes)
    assert one['tokens'][:3] == [15, 10, 3] and max(one['tokens']) < 18
    assert one['trace'][-1].tolist()[:len(one['tokens'])] == one['tokens']


def test_the_doubt_of_a_text_is_that_of_its_tokens():
    """Neither of what is fixed nor of what stands behind the end."""
    model = tiny_gpt(18, 8)
    x = torch.tensor([[15, 3, 4, 16, 17, 17, 17, 17], [15, 3, 4, 5, 6, 7, 8, 16]])
    fixed = torch.zeros_like(x, dtype=torch.bool)
    fixed[1, 2:6] = True
    run = Sampling(model, x, fixed, How(**USUAL), Ends.of(ARITHMETIC))
    doubt = p_wrong(model, model(x), x).detach()
    expected = torch.stack((doubt[0, 1:4].max(), doubt[1, [1, 6, 7]].max()))
    assert torch.allclose(most_doubted(run, x, fixed), expected)


def test_a_second_network_may_be_the_judge():
    model, judge = tiny_gpt(3, 4), tiny_gpt(3, 4, seed=5)
    x = torch.zeros(1, 4, dtype=torch.long)
    run = Sampling(model, x, x > 0, How(**USUAL), judge=judge)
    assert torch.allclose(most_doubted(run, x, x > 0), p_wrong(judge, judge(x), x).amax(1))


def test_who_may_ask_for_it():
    joint = default_config(causal_ratio=0.3)
    assert choose_rules(joint, preset='solve')['redrafts'] == 16
    with pytest.raises(UserError, match='redrafts needs a checkpoint that doubts'):
        choose_rules({**joint, 'training_type': 'unmasking'}, preset='solve')
    chosen = choose_rules({**joint, 'training_type': 'unmasking'}, judge=True, remask='wrong', redrafts=2)
    assert chosen['redrafts'] == 2
    canvas = torch.full((1, 6), 18)
    for more in (dict(rounds=2, remask='wrong'), dict(rewrite=True, remask='wrong'), dict(block_length=2)):
        with pytest.raises(UserError, match='redrafts go without rounds, rewrite, block_length and draft'):
            generate_diffusion(tiny_gpt(18, 6), canvas, canvas < 0, redrafts=2, **more)
