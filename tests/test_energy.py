"""The energy head: what it reads, which laws it leads to, and the command that trains it."""

import os

import pytest
import torch
import torch.nn.functional as F
from conftest import (ARITHMETIC, all_sequences, chi_square, default_config, load_script, run_main, seeded,
                      tiny_gpt, write_checkpoint)
from oracles import Oracle, distance, empty, product_law, random_law, remasked_share, within_noise

from configurator import UserError
from model import GPT
from parts import energy as energy_module
from parts.energy import best_samples, choose_by_energy, energy, text_of, token_energy
from parts.presets import best_rules, choose_rules
from plumbing.rows import Ends
from plumbing.text import start_canvas
from sample import fill, generate_diffusion

CPU = ['--device=cpu', '--dtype=float32']
TINY = ['--max_iters=4', '--batch_size=12', '--own_samples=16', '--eval_rows=12', '--log_interval=2', *CPU]
LETTERS = dict(ARITHMETIC, name='letters', format='stream', vocab_size=3, itos=['a', 'b', 'c'], bos=None,
               eos=None, pad=None)


def headed(V=5, T=6, **more):
    return tiny_gpt(V, T, n_recur=1, energy_head=2, **more)


# -----------------------------------------------------------------------------
# the network's part


def test_the_score_of_a_token_is_what_the_critic_makes_of_both_passes():
    model, ids = headed(), torch.tensor([[0, 1, 2, 3, 4, 4], [3, 3, 1, 4, 4, 4]])
    real = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    score, of_texts = token_energy(model, ids, real), energy(model, ids, real)
    assert score.shape == ids.shape and score.dtype == torch.float32
    assert (score[~real] == float('-inf')).all() and score[real].isfinite().all()
    for b in range(2):
        for t in range(6):
            parts = []
            for causal in (False, True):
                hidden = model(ids[b : b + 1], causal=causal)[0, t]
                logp = F.linear(hidden, model.wte.weight[:5]).log_softmax(-1)[ids[b, t]]  # real tokens only
                parts += [hidden, (logp.clamp(min=-20) / 5)[None]]
            if real[b, t]:
                assert torch.allclose(score[b, t], model.critic(torch.cat(parts)), atol=1e-5)
        assert torch.allclose(of_texts[b], score[b][real[b]].exp().sum().log(), atol=1e-5)
    more = real.clone()
    more[1, 3:] = True  # padding counts for nothing unless it is called text
    assert torch.allclose(token_energy(model, ids, more)[real], score[real], atol=1e-5)
    assert energy(model, ids, more)[1] > of_texts[1]


def test_only_the_critic_learns():
    model, ids = headed(), torch.randint(5, (4, 6), generator=seeded())
    energy(model, ids, ids != 4).sum().backward()
    for name, p in model.named_parameters():
        learned = p.grad is not None and p.grad.abs().sum() > 0
        assert learned if name.startswith('critic.') else p.grad is None, name


def test_the_best_energy_is_the_logarithm_of_the_ratio_of_the_laws():
    """Noise contrastive estimation over all 9 texts: data p against samples q gives log q / p."""
    model, x = headed(3, 2), all_sequences(3, 2)
    p, q = (random_law(3, 2, seed, spread=1.0).float() for seed in (1, 2))
    with torch.no_grad():
        for weight in model.critic.parameters():
            weight.normal_(std=0.2, generator=seeded(3))
    optimizer = torch.optim.Adam(model.critic.parameters(), lr=0.03)
    for step in range(150):
        found = energy(model, x, torch.ones_like(x).bool())
        optimizer.zero_grad()
        (p * F.softplus(found) + q * F.softplus(-found)).sum().backward()
        optimizer.step()
    assert (found - (q / p).log()).abs().max() < 0.1


def test_what_of_a_canvas_is_text():
    """Up to the first end token, without the start symbol; a text without end is all of the canvas."""
    bos, eos, pad = 5, 6, 7
    x = torch.tensor(
        [[5, 1, 2, 6, 7, 7], [5, 1, 6, 3, 6, 0], [5, 1, 7, 2, 7, 7], [5, 1, 5, 2, 6, 7], [5, 6, 1, 1, 1, 1]])
    ids, real = text_of(x, Ends(eos, pad, (bos, eos, pad)))
    assert ids[[0, 2, 3]].equal(x[[0, 2, 3]])
    assert ids[[1, 4]].tolist() == [[5, 1, 6, 7, 7, 7], [5, 6, 7, 7, 7, 7]]
    shown = [''.join(map(str, row)) for row in real.long().tolist()]
    assert shown == ['011100', '011000', '011111', '011110', '010000']
    ids, real = text_of(x, Ends())
    assert torch.equal(ids, x) and real.all()


# -----------------------------------------------------------------------------
# the laws that it leads to


class Judge(Oracle):
    """An oracle that knows the energy of every text: energies (V^T,)."""

    def __init__(self, V, T, law, energies=None):
        super().__init__(V, T, law)
        self.energies = energies

    def energy(self, ids, real):
        assert (ids < self.V).all() and real.all()
        return self.energies[(ids * self.V ** torch.arange(self.T - 1, -1, -1)).sum(1)]


@pytest.fixture
def ask_the_judge(monkeypatch):
    """Energies are what a Judge says."""
    for name in ('energy', 'token_energy'):
        monkeypatch.setattr(energy_module, name, lambda judge, *text, name=name: getattr(judge, name)(*text))


def chosen_of_two(law, energies):
    """The law of the one of two draws from a law (N,) that is chosen in proportion to exp(-energy)."""
    weight = (-energies).exp()
    return 2 * law * (law * weight[:, None] / (weight[:, None] + weight)).sum(1)


@pytest.mark.usefixtures('ask_the_judge')
def test_guiding_by_a_constant_leaves_the_law_as_it_is():
    B, V, T = 20000, 3, 3
    law = random_law(V, T, seed=1)
    judge = Judge(V, T, law, torch.full((V**T,), 2.5))
    canvas, nfe, _ = generate_diffusion(judge, *empty(judge, B), guide=3, generator=seeded())
    statistic, bound = distance(canvas, V, law, B)
    assert statistic < bound and (nfe == 3 * (1 + 2 * 3)).all()


@pytest.mark.usefixtures('ask_the_judge')
def test_guiding_one_step_follows_the_law_of_importance_sampling():
    B, V, T = 20000, 3, 2
    marginals = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    law, energies = product_law(marginals), 3 * torch.randn(9, generator=seeded(4), dtype=torch.float64)
    judge = Judge(V, T, law, energies)
    for num, expected in ((1, law), (2, chosen_of_two(law, energies)), (200, law * (-energies).exp())):
        size = B if num < 10 else 2000
        canvas, nfe, _ = generate_diffusion(judge, *empty(judge, size), steps=1, guide=num,
                                            generator=seeded())
        statistic, bound = distance(canvas, V, expected / expected.sum(), size)
        assert statistic < bound and (nfe == 1 + 2 * num).all()
    canvas, _, _ = generate_diffusion(judge, *empty(judge, B), steps=1, guide=2, generator=seeded())
    assert distance(canvas, V, law, B)[0] > 10 * distance(canvas, V, law, B)[1]


@pytest.mark.usefixtures('ask_the_judge')
def test_guiding_two_steps_commits_a_token_of_the_chosen_text():
    """The first step keeps one token of the chosen pair, the second one chooses among pairs that have it."""
    B, V = 20000, 3
    marginals = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    energies = 2 * torch.randn(9, generator=seeded(5), dtype=torch.float64)
    chosen, energy = chosen_of_two(product_law(marginals), energies).view(V, V), energies.view(V, V)
    left = torch.stack([chosen[a].sum() * chosen_of_two(marginals[1], energy[a]) for a in range(V)])
    right = torch.stack([chosen[:, b].sum() * chosen_of_two(marginals[0], energy[:, b]) for b in range(V)], 1)
    judge = Judge(V, 2, product_law(marginals), energies)
    canvas, nfe, _ = generate_diffusion(judge, *empty(judge, B), commit='random', guide=2, generator=seeded())
    statistic, bound = distance(canvas, V, (left + right).flatten() / 2, B)
    assert statistic < bound and (nfe == 10).all()


def test_the_best_are_kept_and_no_length_is_lost():
    """Lengths stay, and in every kind the lowest energies are kept, none twice."""

    def candidate(length, energy):
        return dict(tokens=[0] * length, energy=energy, nfe=length)

    a, b = [9, 9], [9, 8]
    samples = [candidate(2, 0.5), candidate(2, 0.4), candidate(5, 3.0), candidate(2, 0.1), candidate(3, -9.0),
               candidate(5, 2.0), candidate(2, 0.3), candidate(2, 0.2), candidate(2, -8.0)]
    kept = best_samples(samples, [a, a, b] * 3, 3)
    assert [(len(sample['tokens']), sample['energy']) for sample in kept] == [(2, 0.1), (2, 0.2), (5, 2.0)]
    assert [sample['nfe'] for sample in kept] == [2 + 2 + 2, 2 + 3 + 2, 5 + 5 + 2]


def test_best_of_keeps_every_row_its_own_canvas_and_trace(monkeypatch):
    """Each row begins with a token of its own; the lowest energy wins, here that of the greatest number."""
    model, seen = headed(3, 3), []

    def minus_the_number(model, ids, real):
        seen.append((ids * torch.tensor([9, 3, 1])).sum(1))
        return -seen[-1].float()

    monkeypatch.setattr('sample.energy', minus_the_number)
    canvas = torch.tensor([[2, 3, 3], [0, 3, 3], [1, 3, 3], [0, 3, 3], [2, 1, 3]])
    samples = fill(model, LETTERS, canvas, canvas != 3, best_of=8, batch_size=16, trace=True)
    numbers = torch.cat(seen).view(8, 5)
    best = numbers.amax(0)
    best[[1, 3]] = numbers[:, [1, 3]].flatten().topk(2).values  # these two share a canvas, and its candidates
    for row, sample, number in zip(canvas, samples, best.tolist()):
        ids, trace = torch.tensor(sample['tokens']), sample['trace']
        assert (ids * torch.tensor([9, 3, 1])).sum() == number == -sample['energy']
        assert torch.equal(trace[0], row) and torch.equal(trace[-1], ids)
        assert torch.equal(ids[row != 3], row[row != 3])
        assert sample['nfe'] == 8 * ((row == 3).sum().item() + 2)


def test_choosing_by_energy():
    energy = torch.tensor([[0.0, 1.0, 3.0], [500.0, 501.0, 503.0]])
    assert choose_by_energy(energy.flip(1), seeded(), greedy=True).tolist() == [2, 2]
    chosen = choose_by_energy(energy.repeat(5000, 1), seeded())
    for row in (0, 1):
        statistic, bound = chi_square(chosen[row::2].bincount(minlength=3), 5000 * (-energy[0]).softmax(0))
        assert statistic < bound


@pytest.mark.usefixtures('ask_the_judge')
def test_critic_remasks_with_the_probabilities_that_it_gives():
    T, wrong = 4, torch.tensor([1e-6, 0.25, 0.6, 1 - 1e-6])
    oracle = Judge(3, T, product_law(torch.full((T, 3), 1 / 3, dtype=torch.float64)))
    oracle.token_energy = lambda ids, real: (wrong / (1 - wrong)).log().expand(ids.shape)
    assert within_noise(remasked_share(oracle, remask='critic'), wrong)
    assert within_noise(remasked_share(oracle, remask='critic', remask_rate=0.3), 0.3 * wrong)


@pytest.mark.usefixtures('ask_the_judge')
def test_the_critic_sees_completed_canvases_whose_tokens_are_committed():
    oracle, seen = Judge(3, 4, random_law(3, 4, seed=1)), []

    def token_energy(ids, real):
        seen.append(ids.clone())
        return torch.full(ids.shape, -50.0)

    oracle.token_energy = token_energy
    _, nfe, trace = generate_diffusion(oracle, *empty(oracle, 50), remask='critic', correct_share=0.0,
                                       trace=True, generator=seeded())
    assert len(seen) == 3 and (nfe == 3 * 3 + 1).all()  # the last step asks nobody
    for ids, before, after in zip(seen, trace, trace[1:]):
        assert (ids < 3).all() and torch.equal(ids[after != 3], after[after != 3])


@pytest.mark.parametrize('rules',
                         [dict(remask='critic', steps=5), dict(guide=2, steps=3),
                          dict(remask='critic', guide=3, steps=4), dict(best_of=3, steps=4),
                          dict(best_of=2, guide=2, remask='critic', ar_prefix=1)], ids=str)
def test_every_pass_is_counted_and_the_seed_decides(rules):
    """A hook counts the passes of one row; what is fixed stays, and the samples hold real tokens only."""
    model, passes = headed(18, 12), []
    model.register_forward_hook(lambda module, args, hidden: passes.append(len(args[0])))
    canvas, fixed = start_canvas(model, ARITHMETIC, 1, [10, 3])
    one, again, other = (fill(model, ARITHMETIC, canvas, fixed, seed=seed, **rules)[0] for seed in (1, 1, 2))
    assert one == again != other and one['nfe'] + again['nfe'] + other['nfe'] == sum(passes)
    assert one['tokens'][:3] == [15, 10, 3] and max(one['tokens']) < 18


# -----------------------------------------------------------------------------
# who may ask it


def test_who_has_no_head_is_told_how_to_get_one():
    config = default_config(training_type='joint', causal_ratio=0.3)
    rules = {'remask=critic': dict(remask='critic'), 'guide': dict(guide=2), 'best_of': dict(best_of=2)}
    for name, how in rules.items():
        with pytest.raises(UserError, match=f'{name} needs .* energy head.* python tools/energy.py --init'):
            choose_rules(config, **how)
        chosen = choose_rules({**config, 'energy_head': 2}, **how)
        assert how.items() <= chosen.items() and (chosen['remask'] == 'causal') == (name == 'best_of')
    with pytest.raises(UserError, match='energy head'):
        best_rules(config, remask='critic')
    with pytest.raises(UserError, match='not for --remask=critic'):
        choose_rules({**config, 'energy_head': 2}, judge=True, remask='critic')
    repair = choose_rules({**config, 'energy_head': 2}, task='repair', remask='critic')
    assert repair['remask_threshold'] == 0.8
    model = tiny_gpt(5, 6)
    with pytest.raises(UserError, match='python tools/energy.py'):
        generate_diffusion(model, torch.full((1, 6), 5), torch.zeros(1, 6).bool(), remask='critic')
    with pytest.raises(UserError, match='guide chooses among whole completions'):
        generate_diffusion(headed(), torch.full((1, 6), 5), torch.zeros(1, 6).bool(), guide=2,
                           remask='causal')


# -----------------------------------------------------------------------------
# the command


def test_a_batch_says_what_is_clean_and_what_is_wrong():
    script, model = load_script('tools/energy'), headed(18, 64)
    clean = torch.full((24, 64), 17)
    for row, n in zip(clean, range(5, 53, 2)):
        text = torch.randint(15, (n,), generator=seeded(n))
        row[: n + 2] = torch.cat((torch.tensor([15]), text, torch.tensor([16])))
    pool = clean[:2].clone()  # samples that are as good as the data
    ids, real, label, wrong, known = script.make_batch(model, clean, ARITHMETIC, pool, seeded())
    assert torch.equal(ids[:12], clean[:12]) and not label[:12].any() and not wrong[:12].any()
    assert known.tolist() == [16 <= i < 20 for i in range(24)]
    assert torch.equal(wrong, ids != clean) and label[20:].all()
    assert all((pool == row).all(1).any() for row in ids[20:])
    assert torch.equal(label[12:20], wrong[12:20].any(1)) and label[12:16].any() and label[16:20].any()
    assert (
        (ids < 18).all() and torch.equal(real, text_of(ids, Ends(16, 17, (15,)))[1]) and not real[:, 0].any())
    total, tokens = script.losses(model, ids, real, label, wrong, known).values()
    score = token_energy(model, ids, real)
    of_rows = score.logsumexp(1)
    assert torch.allclose(total, (F.softplus(of_rows) - label * of_rows).mean(), atol=1e-5)
    at = real[16:20]
    of_tokens = score[16:20][at]
    assert torch.allclose(tokens, (F.softplus(of_tokens) - wrong[16:20][at] * of_tokens).mean(), atol=1e-5)


def test_what_is_measured(monkeypatch):
    """An energy that knows the length of the text tells short samples from long rows."""
    script, model = load_script('tools/energy'), headed(18, 64)
    monkeypatch.setattr(script, 'energy', lambda model, ids, real: -real.sum(1).float())

    def row(text):
        ids = [15, *(ARITHMETIC['itos'].index(c) for c in text), 16]
        return torch.tensor(ids + [17] * (64 - len(ids)))

    texts = ['1=1', '(+1(+12))=4', '(+12)=4', '(+12', '3=3=3']
    clean, own = torch.stack([row('(+12)=3')] * 4), torch.stack([row(text) for text in texts])
    result = script.measure(model, ARITHMETIC, clean, own, texts, seeded())
    # as long as a clean row: half; shorter: one; longer: none
    assert result['wrong values'] == 0.5 and result['malformed samples'] == 1 and result['own samples'] == 0.7
    assert list(result) == ['noise', 'own samples', 'malformed samples', 'wrong values']
    # rows that the noise left alone are no noise: of this one in four rows has another length, all others are
    # as they were
    monkeypatch.setattr(script, 'noised', lambda model, x0, *how: torch.cat((x0[:3], row('1=1')[None])))
    assert script.measure(model, ARITHMETIC, clean, clean, ['(+12)=3'] * 4, seeded())['noise'] == 1


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint with a head: (its source, its path, what was printed)."""
    out = tmp_path_factory.mktemp('energy')
    model = tiny_gpt(18, 64, n_recur=1)
    path = write_checkpoint(str(out / 'a' / 'ckpt_joint.pt'), model, training_type='joint', causal_ratio=0.5)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['ema'] = {name: weight + 0.01 for name, weight in checkpoint['model'].items()}
    torch.save({**checkpoint, 'optimizers': [], 'rng': {}}, path)
    text = run_main('tools/energy', f'--init_from={path}', f'--out_dir={out}', *TINY)
    return path, str(out / 'energy' / 'ckpt_energy.pt'), text


def test_training_an_energy_head(trained):
    source, path, text = trained
    for words in ('joint on arithmetic', 'step 4/4  energy ', 'ROC-AUC against noise',
                  f'python sample.py --init_from={path}'):
        assert words in text, text
    before, (model, after) = torch.load(source, weights_only=True), GPT.load(path)
    for part in ('config', 'model_args'):
        assert after[part] == {**before[part], 'energy_head': 2}
    assert after['meta'] == before['meta'] and after['iter_num'] == 7
    assert not {'optimizers', 'rng'} & set(after)
    assert after['energy']['settings']['max_iters'] == 4 and 0 <= after['energy']['result']['noise'] <= 1
    for weights in ('model', 'ema'):  # the network is as it was, the critic the same in both
        assert all(torch.equal(after[weights][name], weight) for name, weight in before[weights].items())
        critic = {name: weight for name, weight in after[weights].items() if name not in before[weights]}
        assert len(critic) == 3
        assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in critic.items())
    assert model.critic.proj.weight.abs().sum() > 0  # it started at zero


@pytest.mark.parametrize('words',
                         [['--best_of=2', '--steps=3', '--remask=none'],
                          ['--guide=2', '--steps=3'],
                          ['--remask=critic', '--steps=3'],
                          ['--best_of=2', '--task=infill', '--text=(+_2)=_']], ids=' '.join)
def test_sampling_with_it(run, trained, words):
    status, out, err = run('sample', f'--init_from={trained[1]}', '--num_samples=2', *words, *CPU)
    assert status == 0, err
    assert '2 samples' in out and words[0].strip('-').split('=')[0] + '=' in out


def test_the_same_seed_gives_the_same_head(run, trained, tmp_path):
    heads = []
    # the checkpoint has a head already: it starts anew
    for name, seed in (('a.pt', 1), ('b.pt', 1), ('c.pt', 2)):
        words = [f'--init_from={trained[1]}', f'--save={tmp_path / name}', f'--seed={seed}', *TINY]
        status, _, err = run('energy', *words)
        assert status == 0, err
        heads.append(GPT.load(str(tmp_path / name))[0].state_dict())
    critics = [
        torch.cat([w.flatten() for name, w in head.items() if name.startswith('critic.')]) for head in heads]
    assert torch.equal(critics[0], critics[1]) and not torch.equal(critics[0], critics[2])


def test_mistakes(run, trained, tmp_path):
    """One line, and nothing is written."""
    causal = write_checkpoint(str(tmp_path / 'c' / 'ckpt_causal.pt'), training_type='causal')
    with open(trained[1], 'rb') as file:
        before = file.read()
    folder = os.path.dirname(trained[1])
    for words, message in (
        ([f'--init_from={trained[1]}', f'--out_dir={os.path.dirname(folder)}'],
         'would overwrite the checkpoint it is made from'),
        ([f'--init_from={trained[1]}', f'--save={folder}/a/../ckpt_energy.pt'], 'would overwrite'),
        ([f'--init_from={causal}', f'--out_dir={tmp_path}'], 'cannot unmask'),
        ([f'--init_from={trained[1]}', '--own_samples=2'], 'own_samples must be at least 8')):
        status, _, err = run('energy', *words, *CPU)
        assert status == 1 and message in err and err.count('\n') == 1, err
    with open(trained[1], 'rb') as file:
        assert file.read() == before
    assert os.listdir(tmp_path) == ['c']
