"""A checkpoint of one set of characters as the start of a run on another."""

import pytest
import torch
from conftest import ARITHMETIC, default_config, tiny_gpt, write_checkpoint

from model import GPT, GPTConfig
from plumbing.run import load_network
from plumbing.vocabulary import by_character


def stream(itos):
    return dict(ARITHMETIC, name='text', format='stream', itos=itos, vocab_size=len(itos), bos=None, eos=None,
                pad=None)


@pytest.mark.parametrize('parts', ['', 'bigrams:50,short_conv'])
def test_embeddings_go_by_character(capsys, parts):
    before, now = stream([*'abc']), stream([*'xcab\n'])
    old, new = tiny_gpt(3, 8, parts=parts), tiny_gpt(5, 8, parts=parts, seed=1)
    for name, tensor in old.state_dict().items():
        if 'bigrams' in name:
            tensor.fill_(3)
    own = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    weights = by_character(old.state_dict(), before, now, own)
    new.load_state_dict({**own, **weights})
    assert ('2 of 5 characters are new' in capsys.readouterr().out)
    ids, then = torch.tensor([[1, 2, 3, 5, 6]]), torch.tensor([[2, 0, 1, 3, 4]])       # c a b [MASK] [WRONG]
    assert torch.equal(new.wte(ids), old.wte(then))
    assert torch.equal(new.wte.weight[[0, 4]], own['wte.weight'][[0, 4]])
    if not parts:
        with torch.no_grad():
            assert torch.equal(new(ids[:, :4]), old(then[:, :4]))    # of a known text it thinks as before


def test_a_run_starts_from_a_checkpoint_of_other_characters(tmp_path):
    before, now = stream([*'abc']), stream([*'xcab\n'])
    path = write_checkpoint(tmp_path / 'ckpt_unmasking.pt', tiny_gpt(3, 8), before, block_size=8)
    small = vars(tiny_gpt(3, 8).config)
    sizes = {name: small[name] for name in ('n_layer', 'n_head', 'n_embd', 'n_recur')}
    config = default_config(init_from=path, block_size=8, training_type='unmasking', **sizes)
    model, _, source, _ = load_network(GPT, GPTConfig, config, now, 'cpu', '')
    assert source == path and model.config.vocab_size == 5
    assert torch.equal(model.wte.weight[1], GPT.load(path)[0].wte.weight[2])
