"""Texts that are longer than the network reads."""

import json

import pytest
import torch
from conftest import run_main, tiny_gpt
from test_checkpoint import write_checkpoint

from configurator import UserError
from parts.long import in_windows
from plumbing.rows import recorded
from plumbing.text import start_canvas
from sample import fill, generate

V, SIZE = 3, 8
STREAM = dict(name='words', format='stream', block_size=None, vocab_size=V, tokenizer='char', itos=[*'abc'],
              bos=None, eos=None, pad=None)


def counting(seen):
    """A sampler that writes how many windows there were before into what may change, in one pass."""
    def sampler(x, fixed, trace):
        seen.append((x.clone(), fixed.clone()))
        out = torch.where(fixed, x, len(seen) - 1)
        recorded(x, trace)
        recorded(out, trace)
        return out, torch.ones(len(x), dtype=torch.long)
    return sampler


def test_windows_by_hand():
    seen = []
    canvas = torch.full((1, 19), V + 6)
    canvas[0, :3] = torch.arange(100, 103)
    history = []
    x, nfe = in_windows(counting(seen), canvas, canvas >= 100, SIZE, history)
    # from 0, and then from 4 places left of the first hole; the last one ends with the row
    assert x.tolist() == [[100, 101, 102] + [0] * 5 + [1] * 4 + [2] * 4 + [3] * 3]
    assert [window.size(1) for window, _ in seen] == [8] * 4 and nfe.tolist() == [4]
    assert [fixed.sum().item() for _, fixed in seen] == [3, 4, 4, 5]
    assert torch.equal(history[0], canvas) and torch.equal(history[-1], x) and len(history) == 5


def test_rows_with_holes_in_different_places():
    canvas = torch.arange(40).expand(3, 40).clone()
    holes = torch.zeros(3, 40, dtype=torch.bool)
    holes[0, 35], holes[1, 2], holes[1, 20] = True, True, True             # and nothing in the third row
    seen = []
    x, nfe = in_windows(counting(seen), canvas.masked_fill(holes, 99), ~holes, SIZE)
    assert torch.equal(x[~holes], canvas[~holes]) and x[1, 2] == x[0, 35] == 0 and x[1, 20] == 1
    assert nfe.tolist() == [1, 2, 0] and [len(window) for window, _ in seen] == [2, 1]
    assert seen[0][0][0].tolist() == [31, 32, 33, 34, 99, 36, 37, 38]      # four places left of the hole


def test_what_may_change_is_looked_at_once():
    """Repair: nothing is masked, nothing is fixed."""
    seen = []
    x, _ = in_windows(counting(seen), torch.full((2, 20), 50), torch.zeros(2, 20).bool(), SIZE)
    assert x.tolist() == [[0] * 8 + [1] * 4 + [2] * 4 + [3] * 4] * 2


@pytest.mark.parametrize('rules', [dict(remask='causal'), dict(remask='wrong', steps=5), dict(ar_prefix=3),
                                   dict(block_length=4, remask='wrong')], ids=str)
def test_any_length_from_a_small_network(rules):
    model = tiny_gpt(V, SIZE)
    lengths = torch.full((3,), 50)
    samples = generate(model, STREAM, 3, prompt=[0, 1], lengths=lengths, trace=True, **rules)
    again = generate(model, STREAM, 3, prompt=[0, 1], lengths=lengths, **rules)
    for sample, same in zip(samples, again):
        assert sample['text'] == same['text'] and len(sample['text']) == 50
        assert sample['text'].startswith('ab') and sample['nfe'] > 10
        assert sample['trace'][-1].tolist() == sample['tokens'] and sample['trace'].size(1) == 50
    assert len({sample['text'] for sample in samples}) == 3
    with pytest.raises(UserError, match='best_of judges whole texts, of at most block_size=8'):
        generate(model, STREAM, 3, lengths=lengths, best_of=2, **rules)


def test_a_prompt_longer_than_the_network_reads():
    model, prompt = tiny_gpt(V, SIZE), [0, 1, 2] * 7
    canvas, fixed = start_canvas(model, STREAM, 2, prompt)
    assert canvas.size(1) == 21 + 4 and fixed.sum() == 42
    for sample in fill(model, STREAM, canvas, fixed, remask='causal'):
        assert sample['tokens'][:21] == prompt and len(sample['text']) == 25


def test_left_to_right_in_windows_follows_the_law_of_a_window():
    """Behind a window of 4 the next 4 tokens have the law that they have behind these 4 as a prompt."""
    model = tiny_gpt(V, SIZE, seed=4)
    prompt, found = [1, 2, 2, 1], []
    for seed, before in ((1, [2] * 9), (2, [])):
        P = len(before) + 4
        canvas, fixed = start_canvas(model, STREAM, 4000, [*before, *prompt], torch.full((4000,), P + 4))
        samples = fill(model, STREAM, canvas, fixed, remask='causal', seed=seed, batch_size=4000)
        pairs = torch.tensor([sample['tokens'][P:P + 2] for sample in samples])
        found.append(torch.bincount(pairs @ torch.tensor([3, 1]), minlength=9))
    first, second = found
    error = (2 * 4000 * 0.25) ** 0.5
    assert ((first - second).abs() < 4.5 * error).all() and first.max() > 600


def test_the_command(tmp_path):
    how = dict(training_type='joint', causal_ratio=0.5)
    path = write_checkpoint(tmp_path / 'x.pt', tiny_gpt(V, SIZE), STREAM, **how)
    save = tmp_path / 'samples.jsonl'
    words = (f'--init_from={path}', '--num_samples=2', '--device=cpu', f'--save={save}')
    out = run_main('sample', *words, '--length=40', '--prompt=ab')
    texts = [json.loads(line)['text'] for line in save.read_text().splitlines()]
    assert [len(text) for text in texts] == [40, 40] and texts[0] in out and texts[0].startswith('ab')
    run_main('sample', *words, '--task=infill', '--text=' + 'abc' * 6 + '_' + 'cab' * 5)
    text = json.loads(save.read_text().splitlines()[0])['text']
    assert len(text) == 34 and text[:18] == 'abc' * 6 and text[19:] == 'cab' * 5
    page = tmp_path / 'page.html'                                          # doubts of a text that long
    run_main('sample', *words[:1], '--task=repair', '--text=' + 'abc' * 9, f'--html={page}', '--device=cpu')
    run_main('sample', *words[:1], '--task=score', '--text=' + 'abc' * 9, f'--html={page}', '--device=cpu')
    assert page.stat().st_size > 1000
