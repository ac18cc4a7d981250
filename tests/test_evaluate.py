"""What a network is worth: the likelihoods, how errors are found, and what samples of text look like."""

import itertools
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARITHMETIC, all_sequences, default_config, tiny_gpt
from test_corruption import MASK, WRONG, T, V, seeded
from test_train import Stub, arithmetic_rows

from corruption import errors_of, own_errors
from data.loader import load_data
from plumbing.evaluate import (
    calibration_error,
    causal_nll,
    evaluate,
    evaluation_line,
    nelbo,
    per_token,
    roc_auc,
)
from plumbing.text import modelled
from plumbing.textstats import (
    known_words,
    longest_copy,
    text_statistics,
    token_statistics,
    training_text,
    words_of,
)

# -----------------------------------------------------------------------------
# likelihoods


def any_order_nll(model, x, free):
    """
    -log p of the row x, its free positions filled one at a time: one number for every order, by brute force.
    """
    positions = free.nonzero()[:, 0].tolist()
    totals = []
    for order in itertools.permutations(positions):
        canvas, total = x.masked_fill(free, model.mask_token_id), 0.0
        for i in order:
            logits = model.logits(model(canvas[None])[0, i:i + 1])[0, :model.config.vocab_size]
            total -= logits.double().log_softmax(-1)[x[i]].item()
            canvas[i] = x[i]
        totals.append(total)
    return np.array(totals)


@torch.no_grad()
def test_nelbo_is_the_average_over_all_orders():
    """
    n times the mean cross-entropy of k random masked positions, k uniform on 1..n, is the mean over all
    orders of the sequence's own -log p, so its estimates must average to what the enumeration of the orders
    gives.
    """
    model = tiny_gpt(V=3, T=4)
    rows = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1], [1, 0, 0, 2]])
    free = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 1]]).bool()
    exact, orders = [], []
    for x, f in zip(rows, free):
        orders.append(any_order_nll(model, x, f))
        exact.append(orders[-1].mean())
        # Jensen: it is an upper bound, and a loose one
        assert exact[-1] > -np.log(np.exp(-orders[-1]).mean()) + 1e-4
    exact = torch.tensor(exact)
    # unbiased for a small batch too, and with several draws
    for B, calls, draws in ((12000, 1, 1), (6, 300, 1), (6, 300, 3)):
        generator, which = seeded(3), torch.arange(B) % 3
        estimates = [nelbo(model, rows[which], free[which], generator, draws) for _ in range(calls)]
        estimates = torch.stack(estimates).double()
        for row in range(3):
            mine = estimates[:, which == row]
            error = (mine - exact[row]).std() / mine.numel() ** 0.5
            assert 0.01 < mine.std() and abs(mine.mean() - exact[row]) < 4 * error < (0.3 if B > 6 else 0.6)


@torch.no_grad()
def test_nelbo_edges():
    model, x = tiny_gpt(V=3, T=4), torch.tensor([[0, 2, 1, 1], [1, 1, 0, 2]])
    free = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0]]).bool()
    bound = nelbo(model, x, free, seeded())
    assert bound[0] == 0                                                  # nothing to model
    assert bound[1] == pytest.approx(any_order_nll(model, x[1], free[1])[0], rel=1e-5)  # one position: exact
    assert torch.equal(nelbo(model, x, ~free, seeded()), nelbo(model, x, ~free, seeded()))


def test_stratification_lowers_the_variance():
    model, generator = tiny_gpt(V=3, T=4), seeded(4)
    x = torch.tensor([[0, 2, 1, 1]]).expand(16, 4)
    free = torch.ones_like(x, dtype=torch.bool)
    batches = torch.stack([nelbo(model, x, free, generator) for _ in range(300)])
    assert batches.mean(1).var() < 0.9 * batches.var() / 16
    four = torch.stack([nelbo(model, x[:1], free[:1], generator, draws=4) for _ in range(300)])
    assert four.var() < 0.9 * batches.var() / 4                           # a row's draws are spread as well


@torch.no_grad()
@pytest.mark.parametrize('given', [[], [0], [1], [0, 3]])
def test_causal_probabilities_sum_to_one(given):
    model = tiny_gpt(V=3, T=4, scale=6)
    x = all_sequences(3, 4)
    free = torch.ones_like(x, dtype=torch.bool)
    free[:, given] = False
    x = x[(x[:, given] == 1).all(1)]  # given positions hold one and the same token
    nll = causal_nll(model, x, free[:len(x)]).double()
    assert (-nll).exp().sum() == pytest.approx(1, abs=1e-5)
    assert (-nll).exp().std() > 1e-3                                      # and they are not all the same


@torch.no_grad()
def test_causal_nll_is_the_chain_rule():
    model, x = tiny_gpt(V=3, T=4), all_sequences(3, 4)
    free = torch.ones_like(x, dtype=torch.bool)
    for row in (5, 40, 77):
        total = 0.0
        for i in range(4):
            prefix = F.pad(x[row:row + 1, :i], (0, 4 - i), value=0)  # what is right of i - 1 is of no account
            total -= model.logits(model(prefix, causal=True)[0, i])[:3].log_softmax(-1)[x[row, i]].item()
        assert causal_nll(model, x, free)[row].item() == pytest.approx(total, rel=1e-5)


# -----------------------------------------------------------------------------
# evaluation


def test_roc_auc_against_counting_pairs():
    generator = seeded(1)
    for levels in (3, 1000):                                              # many ties, and hardly any
        score = torch.randint(levels, (300,), generator=generator).float() / levels
        label = torch.rand(300, generator=generator) < 0.2 + 0.5 * score
        a, b = score[label][:, None], score[~label][None]
        pairs = ((a > b).double() + 0.5 * (a == b).double()).mean().item()
        assert 0.55 < pairs < 0.9 and roc_auc(score, label) == pytest.approx(pairs, abs=1e-9)
    assert roc_auc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([False, False, True])) == 1
    assert roc_auc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([True, False, False])) == 0
    assert roc_auc(torch.ones(9), torch.arange(9) < 4) == 0.5
    assert roc_auc(torch.ones(3), torch.ones(3).bool()) is None


def test_calibration_error_by_hand():
    p = torch.tensor([0.9, 0.1, 0.5, 0.5, 0.1, 0.9])
    label = torch.tensor([True, False, True, False, True, True])
    # two of each: 0.1 said and 1/2 true, 0.5 and 1/2, 0.9 and 1
    assert calibration_error(p, label, bins=3) == pytest.approx((0.4 + 0 + 0.1) / 3)
    generator = seeded(2)
    p = torch.rand(40000, generator=generator)
    label = torch.rand(40000, generator=generator) < p
    assert calibration_error(p, label) < 0.01 < 0.24 < calibration_error(p / 2, label)
    assert calibration_error(torch.ones(0), torch.ones(0).bool()) is None


def test_per_token_and_its_standard_error():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 60, 500)
    nats = tokens * (2 + 0.3 * rng.standard_normal(500)) + 3 * rng.standard_normal(500)
    mean, error = per_token(torch.tensor(nats), torch.tensor(tokens))
    assert mean == pytest.approx(nats.sum() / tokens.sum())
    index = rng.integers(0, 500, (4000, 500))
    bootstrap = (nats[index].sum(1) / tokens[index].sum(1)).std()
    assert error == pytest.approx(bootstrap, rel=0.1)
    exact = per_token(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1, 2, 3]))
    assert exact == (2.0, pytest.approx(0, abs=1e-6))
    # one row says nothing about others
    assert per_token(torch.tensor([6.0]), torch.tensor([3])) == (2.0, None)


@torch.no_grad()
def test_evaluate_measures_what_it_says():
    model, x0 = tiny_gpt(18, 64, n_recur=1), arithmetic_rows(20)
    model.train()
    result = evaluate(model, x0, ARITHMETIC, causal=True, bidirectional=True, own_errors=own_errors)
    assert not model.training
    free, real = x0 != 15, (x0 != 15) & (x0 != 17)
    tokens = real.sum(1)
    bound = nelbo(model, x0, free, seeded(0))  # padding is paid for, and is no token
    assert (result['nelbo'], result['nelbo_se']) == pytest.approx(per_token(bound, tokens))
    exact = causal_nll(model, x0, real)
    assert (result['causal_nll'], result['causal_nll_se']) == pytest.approx(per_token(exact, tokens))
    assert 0 < result['auc'] < 1 and result['nelbo_se'] > 0
    again = evaluate(model, x0, ARITHMETIC, causal=True, bidirectional=True, own_errors=own_errors)
    assert again == result
    assert evaluate(model, x0, ARITHMETIC, causal=False, bidirectional=False) == {}
    halves = evaluate(model, x0, ARITHMETIC, causal=True, bidirectional=False, batch_size=7)
    assert halves == pytest.approx({k: result[k] for k in ('causal_nll', 'causal_nll_se')})
    assert result['nelbo'] != evaluate(model, x0, ARITHMETIC, causal=False, bidirectional=True,
                                       seed=1)['nelbo']


def detect(model, x0, meta=dict(bos=None, pad=None)):
    return evaluate(model, x0, meta, causal=False, bidirectional=False, own_errors=own_errors)


@pytest.mark.parametrize('sign, auc', [(1, 1.0), (-1, 0.0), (0, 0.5)])
def test_evaluate_scores_the_detection_of_own_errors(sign, auc):
    """It guesses at random, and doubts each token but the 0, by p(WRONG)."""
    table = torch.zeros(V + 1, V + 2)
    table[:, MASK], table[:, WRONG], table[0, WRONG] = float('-inf'), sign, -sign
    assert detect(Stub(table), torch.zeros(50, T, dtype=torch.long))['auc'] == auc


def test_evaluate_counts_what_is_put_right():
    """
    Everything should be a 0. The network trusts 0, 1 and 2, doubts 3, 4 and 5; its second choice for 1 and 3
    is the 0, for the others it is not. It guesses at random, with a slight preference for the 0.
    """
    logits = torch.zeros(V + 1, V + 2)
    for token, second in enumerate((4, 0, 3, 0, 1, 1)):
        # p(WRONG) is 0.44 or 0.59
        logits[token, token], logits[token, second] = 2.6 if token < 3 else 2.0, 1.5
    logits[MASK, 0], logits[MASK, MASK] = 0.01, -30.0
    model = Stub(logits)
    result = detect(model, torch.zeros(60, T, dtype=torch.long))
    draft, input, holes, *_ = model.seen
    assert (draft == MASK).any() and torch.equal(holes, torch.where((input > 2) & (input < V), MASK, input))
    wrong = input[(input != 0) & (input != MASK)]
    assert len(set(wrong.tolist())) == 5 and len(wrong) > 100
    assert result['fixed'] == pytest.approx(((wrong == 1) | (wrong == 3)).double().mean().item())
    assert result['refilled'] == pytest.approx((wrong > 2).double().mean().item())


def test_evaluate_judges_real_tokens_only():
    """Padding among the tokens that are told from one another would make detection look easy."""
    x0 = torch.tensor([[0, 1, 2, 5, 5, 5, 5, 5, 5, 5]]).repeat(40, 1)
    table = torch.zeros(V + 1, V + 2)
    table[:, WRONG] = torch.tensor([0, -1, 0, 0, 0, 9.0, 0])              # padding is what it doubts most
    model = Stub(table)
    result = detect(model, x0, dict(bos=None, pad=5))
    real = (x0 != 5) & (model.seen[1] != MASK)
    doubt = 1 - table[model.seen[1]].softmax(-1).gather(2, model.seen[1][..., None])[..., 0]
    assert result['auc'] == pytest.approx(roc_auc(doubt[real], (model.seen[1] != x0)[real]))
    assert (model.seen[1] == 5)[real].any()


def test_what_a_judge_is_shown_looks_like_its_training():
    """What noise has deleted leaves padding behind the text, not masks, which this network never saw."""
    config = default_config(training_type='remasking', corruption='noise', noise_mix='delete:1')
    model, rows = tiny_gpt(18, 64, n_recur=1), arithmetic_rows(20)
    found = evaluate(model, rows, ARITHMETIC, causal=False, bidirectional=False, own_errors=errors_of(config))
    assert found['auc'] is not None and not {'calibration', 'fixed'} & set(found)


@pytest.mark.parametrize('bias', [0.0, 1.0])
def test_evaluate_says_how_far_the_doubt_can_be_believed(bias):
    """
    It guesses a 0 for certain or anything, everything should be a 0, and it knows how often it is right; with
    a bias on the logit of what stands there it believes itself too much.
    """
    logits = torch.full((V + 1, V + 2), -30.0)
    logits[:V, :V].fill_diagonal_(bias)
    logits[:V, WRONG] = torch.tensor([-2.0, *[30.0] * (V - 1)])          # p(WRONG) of a 0: 0.12
    logits[MASK, :V] = torch.zeros(V)
    x0 = torch.zeros(240, T, dtype=torch.long)
    x0[::8] = 1                                                           # one 0 in eight is wrong
    model = Stub(logits)
    result = detect(model, x0)
    full = model.seen[4]                                                  # after draft, input, holes, draft
    assert not (full == MASK).any() and (model.seen[1] == MASK).any()
    said = 1 - logits[full].softmax(-1).gather(2, full[..., None])[..., 0]
    error = calibration_error(said.flatten(), (full != x0).flatten())
    assert result['calibration_full'] == pytest.approx(error)


def test_a_number_that_cannot_be_known():
    """Nothing is wrong where it always guesses right: no AUC, and the line says why."""
    table = torch.full((V + 1, V + 2), -30.0)
    table[:, 0] = 0.0
    result = detect(Stub(table), torch.zeros(20, T, dtype=torch.long))
    assert result['auc'] is result['fixed'] is result['refilled'] is None and result['calibration'] < 1e-6
    assert 'so no AUC' in evaluation_line(3, result)


def test_the_line_of_an_evaluation():
    result = dict(nelbo=1.23456, nelbo_se=0.01, causal_nll=1.1, causal_nll_se=None, auc=0.9, refilled=0.5,
                  calibration=0.01234, calibration_full=0.02)
    assert evaluation_line(7, result) == ('step 7  validation: NELBO 1.235 ± 0.010 nats/token  '
                                          'causal NLL 1.100\n    own errors found: AUC 0.900, put right 50%  '
                                          'p(WRONG) off by 0.012 beside masks, 0.020 without')
    assert evaluation_line(7, {}) == 'step 7  validation: nothing to measure for this training type'

# -----------------------------------------------------------------------------
# statistics


def test_token_statistics_of_small_texts():
    found = token_statistics([[0, 0, 1, 1], [2, 2, 2, 0]])
    counts = [3, 2, 3]
    assert found['entropy'] == pytest.approx(-sum(n / 8 * math.log(n / 8) for n in counts))
    # 22 twice; none across the two
    assert [found[f'distinct_{n}'] for n in (1, 2, 3, 4)] == [3 / 8, 5 / 6, 1, 1]
    assert found['longest_run'] == 3
    one = token_statistics([[7] * 6])
    assert one['entropy'] == 0 and one['longest_run'] == 6
    assert [one[f'distinct_{n}'] for n in (1, 2, 3, 4)] == [1 / 6, 1 / 5, 1 / 4, 1 / 3]
    assert token_statistics([[1, 2]])['distinct_3'] == 0                      # there are none


def test_words_are_runs_of_letters_and_apostrophes():
    words = words_of("O, 'tis THE king's\nÉtat-major 12th_x")
    assert words == {'o', "'tis", 'the', "king's", 'état', 'major', 'th', 'x'}
    assert known_words(['The  KING', "o kings' 5"], words) == 2 / 4
    assert known_words([' . 17'], words) == 0


def test_longest_copy_against_trying_all():
    rng = random.Random(1)
    for number in range(600):
        corpus = ''.join(rng.choice('abc') for _ in range(25))
        text = ''.join(rng.choice('abcd') for _ in range(rng.randrange(12)))
        if number % 3 == 0:
            text += corpus[5:5 + rng.randrange(14)] + 'd'
        pieces = [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
        longest = max([len(piece) for piece in pieces if piece in corpus], default=0)
        assert longest_copy(text, corpus) == longest, (text, corpus)


def test_text_statistics():
    found = text_statistics(['bad dog', 'cat-cat'], [[1, 2, 2], [3, 3, 3]], 'a cat, a dog')
    assert found['copy_mean'] == 3.5 and found['copy_max'] == 4               # ' dog', 'cat'
    assert found['known_words'] == 3 / 4 and found['longest_run'] == 3 and found['distinct_2'] == 3 / 4


def test_the_text_of_a_split():
    meta = dict(tokenizer='char', itos=['a', 'b', "'", ' '], bos=None, eos=None, pad=None)
    ids = np.random.default_rng(0).integers(4, size=400).astype(np.uint16)
    whole = ''.join(meta['itos'][i] for i in ids)
    assert training_text(meta, ids) == whole and training_text(meta, ids, most=7) == whole[:7]
    rows = dict(meta, itos=[*'ab', '.', '_'], eos=2, pad=3)
    assert training_text(rows, torch.tensor([[0, 1, 2, 3], [1, 1, 0, 2], [0, 0, 0, 0]]), most=8) == 'ab\nbba'


def test_a_network_that_cannot_write_is_judged_by_what_it_was_trained_on():
    """config/remask_only.py: random tokens, no mask; nothing is said about what it would put right."""
    config = default_config(training_type='remasking', corruption='random')
    model = tiny_gpt(18, 64, n_recur=1)
    x0 = load_data('arithmetic')[1]['val'][:20]
    asked = errors_of(config)
    result = evaluate(model, x0, ARITHMETIC, causal=False, bidirectional=False, own_errors=asked)
    assert set(result) == {'auc', 'calibration_full'} and 0 < result['auc'] < 1
    assert re.fullmatch(r'step 3  validation: wrong tokens found: AUC 0\.\d{3}', evaluation_line(3, result))
    free, real = modelled(x0, ARITHMETIC)
    input = asked(model, x0, free, real, torch.Generator().manual_seed(0))
    assert not (input == 18).any() and (input != x0).any(1).all()
    assert errors_of(default_config(training_type='unmasking')) is None
