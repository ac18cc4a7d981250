"""
What a network is worth on held-out rows: the bound, the likelihood of its causal mode, how well it finds and mends its own
errors. And what samples of text look like beside the text that they were learned from.
"""

import collections
import functools
import itertools
import math
import re

import torch
import torch.nn.functional as F

from plumbing.text import decode, encode, until_end
from corruption import Task, ask, modelled, own_guesses
from data.loader import spread_rows
from model import places, random_subset, stratified_k
from rules import p_wrong


@torch.no_grad()
def nelbo(model, x0, free, generator=None, draws=1):
    """
    An unbiased estimate a row of the upper bound on -log p(x0), the mean of several draws of masks: nats a row (B,).

    x0 (B, T) clean ids; free (B, T) bool, the positions that are modelled (the rest is given). With k uniform on 1..n
    and exactly k of n positions masked, n times the mean cross-entropy over the masked positions needs no 1/t weight.
    The draws of a row spread their k evenly over 1..n. Rows without a free position get 0.
    """
    n = free.sum(1)                                                           # (B,)
    some = n.clamp(min=1)
    first, total = stratified_k(some, generator), torch.zeros(x0.shape, device=x0.device)
    for draw in range(draws):
        k = (first - 1 + draw * some // draws) % some + 1                     # (B,)
        masked = random_subset(free, k, generator)                            # (B, T)
        hidden = model(x0.masked_fill(masked, model.mask_token_id), only=places(masked))      # (M, C)
        ce = F.cross_entropy(model.logits(hidden, real_only=True), x0[masked], reduction='none')  # (M,)
        total += torch.zeros_like(total).masked_scatter(masked, ce) * (n / k)[:, None]
    return total.sum(1) / draws


@torch.no_grad()
def causal_nll(model, x0, free):
    """-log p(x0) of the causal mode over the free positions, each given everything left of it: nats a row (B,)."""
    hidden = model(x0, causal=True, only=places(free))                        # (M, C)
    ce = F.cross_entropy(model.logits(hidden, real_only=True), x0[free], reduction='none')
    return torch.zeros(x0.shape, device=x0.device).masked_scatter(free, ce).sum(1)


def roc_auc(score, label):
    """Area under the ROC curve: the chance that a True one scores higher than a False one, ties counting half."""
    _, rank, count = score.unique(return_inverse=True, return_counts=True)     # sorted distinct scores
    mean_rank = (count.cumsum(0) - (count - 1) / 2).double()[rank]
    positive, negative = label.sum().item(), (~label).sum().item()
    if not positive or not negative:
        return float('nan')
    return ((mean_rank[label].sum().item() - positive * (positive + 1) / 2) / (positive * negative))


def per_token(nats, tokens):
    """Nats a row and tokens a row (B,) -> nats a token and its standard error (of a ratio of means), None if there is one row."""
    mean = (nats.sum() / tokens.sum()).item()
    if len(nats) < 2:
        return mean, None
    error = (nats - mean * tokens).std().item() / (len(nats) ** 0.5 * tokens.double().mean().item())
    return mean, error


@torch.no_grad()
def evaluate(model, x0, meta, *, causal, bidirectional, detects, guesser=None, draws=1, batch_size=256, seed=0):
    """
    What the model is worth on clean rows x0 (N, T), by a fixed seed: dict of nats a (real) token, with standard errors.

    nelbo, nelbo_se: the bound of the diffusion mode, from so many draws of masks a row, padding paid for but not counted as
    tokens; causal_nll, causal_nll_se: -log p of the causal mode. On wrong tokens that are the guesser's own (None: the
    model's) -- auc: how well the model's p(WRONG) tells them from correct visible ones; fixed: the share where the likeliest
    other token, read off directly, is the right one; refilled: the share that is right after what has p(WRONG) > 1/2 was
    masked and filled by the guesser.
    """
    model.eval()
    guesser = guesser or model
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    batch_size = max(1, min(batch_size, 2 ** 28 // (x0.size(1) * model.mask_token_id)))  # 1 GiB of logits at most
    bound, exact, tokens, scores, labels, fixed, refilled = [], [], [], [], [], [], []
    for rows in x0.split(batch_size):
        rows = rows.to(device)
        free, real = modelled(rows, meta)
        tokens.append(real.sum(1))
        if bidirectional:
            bound.append(nelbo(model, rows, free, generator, draws))
        if causal:
            exact.append(causal_nll(model, rows, real))
        if detects:
            kind = 'joint' if bidirectional else 'remasking'                   # who cannot unmask never sees a mask
            special = model.mask_token_id, model.wrong_token_id, meta['pad']
            input, _, _ = ask(rows, free, real, Task(training_type=kind, remask_ratio=1.0), special, generator,
                              own_guesses(guesser, generator))
            judged = real & (input != model.mask_token_id)
            wrong = judged & (input != rows)
            hidden = model(input)
            doubt = p_wrong(model, hidden, input)                              # (B, T)
            scores.append(doubt[judged])
            labels.append(wrong[judged])
            other = model.logits(hidden[wrong], real_only=True).scatter(1, input[wrong][:, None], float('-inf'))
            fixed.append(other.argmax(1) == rows[wrong])
            holes = input.masked_fill(judged & (doubt > 0.5), model.mask_token_id)
            filled = guesser.logits(guesser(holes)[wrong], real_only=True).argmax(1)
            refilled.append(torch.where(holes[wrong] == model.mask_token_id, filled, input[wrong]) == rows[wrong])
    result, tokens = {}, torch.cat(tokens).cpu()                               # what follows is in float64, which MPS has not
    if bidirectional:
        result['nelbo'], result['nelbo_se'] = per_token(torch.cat(bound).cpu(), tokens)
    if causal:
        result['causal_nll'], result['causal_nll_se'] = per_token(torch.cat(exact).cpu(), tokens)
    if detects:
        result['auc'] = roc_auc(torch.cat(scores).cpu(), torch.cat(labels).cpu())
        result['fixed'] = torch.cat(fixed).float().mean().item()
        result['refilled'] = torch.cat(refilled).float().mean().item()
    return result


# -----------------------------------------------------------------------------
# samples of text


def training_text(meta, ids, most=2_000_000):
    """The text of a split of load_data, of its first tokens if it has more than most."""
    if isinstance(ids, torch.Tensor):                                          # rows: a text each
        return '\n'.join(decode(meta, row)[0] for row in ids[:max(1, most // ids.size(1))].tolist())
    return decode(meta, ids[:most].tolist())[0]


@functools.lru_cache(maxsize=2)
def words_of(text):
    """The set of the words of a text: maximal runs of letters and apostrophes, in lower case."""
    return frozenset(find_words(text))


def find_words(text):
    """The words of a text, see words_of, in their order: a list."""
    return re.findall(r"(?:[^\W\d_]|')+", text.lower())


def known_words(texts, words):
    """The share of the words in texts that are in the set words; 0 if there are none."""
    found = [word in words for text in texts for word in find_words(text)]
    return sum(found) / max(1, len(found))


def token_statistics(ids):
    """
    How varied texts are, given as lists of token ids: dict of entropy, that of single tokens in nats; distinct_1 .. distinct_4,
    the share of different ones among the n-grams (none crosses from one text to the next); longest_run, of one token repeated.

    All of them depend on how many tokens there are: compare texts of equal length and number only.
    """
    counts = collections.Counter(itertools.chain.from_iterable(ids))
    total = sum(counts.values())
    result = dict(entropy=sum(n / total * math.log(total / n) for n in counts.values()))
    for n in range(1, 5):
        grams = [tuple(row[i:i + n]) for row in ids for i in range(len(row) - n + 1)]
        result[f'distinct_{n}'] = len(set(grams)) / max(1, len(grams))
    result['longest_run'] = max((len(list(run)) for row in ids for _, run in itertools.groupby(row)), default=0)
    return result


def longest_copy(text, corpus):
    """The length in characters of the longest piece of text that occurs word for word in corpus."""
    best = at = 0
    while at + best < len(text):
        skip = best // 3                                                       # the likeliest piece to settle it quickly
        if text[at + skip:at + best + 1] not in corpus:
            at += skip + 1                                                     # a longer copy from at .. at + skip would hold it
        elif text[at:at + best + 1] in corpus:
            best += 1
        else:
            at += 1
    return best


def text_statistics(texts, ids, corpus):
    """
    Samples of text, as strings and as lists of token ids, beside the training text corpus: what token_statistics says;
    known_words, the share of their words that occur there; copy_mean and copy_max over the texts, see longest_copy.
    """
    copies = [longest_copy(text, corpus) for text in texts]
    return dict(token_statistics(ids), known_words=known_words(texts, words_of(corpus)),
                copy_mean=sum(copies) / len(copies), copy_max=max(copies))


def usual_text(ids, meta, config, most=16):
    """What samples of text are compared with: token_statistics of as many pieces of the training split ids, and its words."""
    start = len(encode(meta, config['sample_prompt'])) + (meta['bos'] is not None)  # what is given says nothing about a network
    rows = spread_rows(ids, min(config['eval_samples'], most), config['block_size']).tolist()
    return dict(token_statistics([until_end(meta, row)[start:] for row in rows]), num=len(rows), start=start,
                words=words_of(training_text(meta, ids)))


def compare_text(texts, ids, usual):
    """Prints how varied samples are beside the usual (see usual_text), and a warning if they collapse; returns it for the log."""
    found = dict(token_statistics(ids), known_words=known_words(texts, usual['words']))
    print(f"    unigram entropy {found['entropy']:.2f} nats (training data {usual['entropy']:.2f}), different 3-grams "
          f"{found['distinct_3']:.0%} (training data {usual['distinct_3']:.0%}), known words {found['known_words']:.0%}")
    if found['entropy'] < 0.7 * usual['entropy'] or found['distinct_3'] < usual['distinct_3'] / 3:
        print('    warning: the samples collapse, they repeat themselves far more than the data. Early on that is usual: train '
              'longer. Later sample with --temperature=1 and --commit=random, in more --steps')
    return {name: found[name] for name in ('entropy', 'distinct_3', 'known_words')}


def with_error(result, name):
    """An entry of what evaluate returns, as text, with its standard error if there is one."""
    error = result[f'{name}_se']
    return f'{result[name]:.3f}' + ('' if error is None else f' ± {error:.3f}')


def evaluation_line(step, result):
    """The line on screen after an evaluation."""
    words = []
    if 'nelbo' in result:
        words.append(f"NELBO {with_error(result, 'nelbo')} nats/token")
    if 'causal_nll' in result:
        words.append(f"causal NLL {with_error(result, 'causal_nll')}")
    if 'auc' in result:
        words.append(f"own errors found: AUC {result['auc']:.3f}, put right {result['refilled']:.0%}")
    return f"step {step}  validation: " + ('  '.join(words) or 'nothing to measure for this training type')
