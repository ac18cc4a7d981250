"""What a user gives: texts read back as the tokens that they are, files, holes, line ends, where it stops."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ARITHMETIC, seeded
from test_commands import STREAM

from configurator import UserError
from plumbing.text import decode, encode, read_lines

GPT2 = dict(name='gpt2', format='stream', vocab_size=50257, tokenizer='gpt2', itos=None, bos=None, eos=None,
            pad=None)
# ab is the longest token at the start of abc, but then c is left
OWN = dict(ARITHMETIC, name='own', tokenizer='own', vocab_size=8, bos=5, eos=6, pad=7,
           itos=['a', 'ab', 'bc', ' the', '\n', '<bos>', '<eos>', '<pad>'])


@pytest.fixture
def gpt2():
    """Skips a test where the vocabulary of GPT-2 cannot be had."""
    tiktoken = pytest.importorskip('tiktoken')
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception:                        # no vocabulary, no network: whatever that raises
        pytest.skip('tiktoken cannot load the vocabulary of GPT-2')

# -----------------------------------------------------------------------------
# text out, text in


def same_text(meta, num=300):
    """Random rows of tokens, as a sampler may draw them: decode, encode, decode is decode."""
    for n in range(num):
        ids = torch.randint(meta['vocab_size'], (n % 12,), generator=seeded(n)).tolist()
        if meta['tokenizer'] == 'gpt2' and n % 3 == 0:
            ids.insert(n % 5, 50256)
        text, finished = decode(meta, ids)
        assert decode(meta, encode(meta, text) + [meta['eos']] * finished) == (text, finished)


@pytest.mark.parametrize('meta', [ARITHMETIC, STREAM, OWN], ids=['rows', 'stream', 'own'])
def test_what_is_written_is_read_as_the_same_text(meta):
    same_text(meta)
    if meta is STREAM:
        assert all(encode(meta, decode(meta, [i, j])[0]) == [i, j] for i in range(3) for j in range(3))


def test_what_is_written_in_tokens_of_gpt2_is_read_as_the_same_text(gpt2):
    """<|endoftext|> is one token, the one between the documents of the data."""
    same_text(GPT2)
    assert encode(dict(tokenizer='gpt2'), '<|endoftext|>') == [50256]
    assert encode(GPT2, 'a<|endoftext|>\u00e9') == [64, 50256, *gpt2.encode_ordinary('\u00e9')]


def test_padding_is_read_as_padding():
    assert encode(ARITHMETIC, '1·2') == [1, 17, 2]
    assert encode(dict(STREAM, itos=['a', '·', '\n']), 'a·') == [0, 1]         # where it is a character
    with pytest.raises(UserError, match="'·' in 'a·' is not in the vocabulary"):
        encode(STREAM, 'a·')


def test_the_longest_token_that_leaves_a_rest_of_tokens():
    assert encode(OWN, 'ab the\naabc') == [1, 3, 4, 0, 0, 2] and encode(OWN, '') == []
    for text, odd in (('abx', 'x'), ('a<bos>', '<'), ('<eos>', '<'), ('abb', 'b'), ('ab th', ' ')):
        with pytest.raises(UserError, match=f"{odd!r} in '{text}' is not in the vocabulary of own: 'a ab "):
            encode(OWN, text)

# -----------------------------------------------------------------------------
# files


@pytest.mark.parametrize('data, lines', [
    ('a\nb', [(1, 'a'), (2, 'b')]), ('\n\na\n\nb\n', [(3, 'a'), (5, 'b')]),
    ('a\r\n\r\nb\rc\r\n', [(1, 'a'), (3, 'b\rc')]), (' \n\ta ', [(1, ' '), (2, '\ta ')]),
    ('a\u2028b\x0bc\x0cd\x85e\u2029f\x1cg\n', [(1, 'a\u2028b\x0bc\x0cd\x85e\u2029f\x1cg')]),
    ('\ufeffa\n\ufeffb', [(1, 'a'), (2, '\ufeffb')])])          # a mark at the start only
def test_a_line_is_what_ends_in_a_line_end(tmp_path, monkeypatch, data, lines):
    path = tmp_path / 'lines.txt'
    path.write_bytes(data.encode())
    assert read_lines(path) == lines
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(data.encode())))
    assert read_lines('-') == lines


@pytest.mark.parametrize('data, message', [
    (b'', 'there is no text'), (b'\xef\xbb\xbf\r\n\n', 'there is no text'), (b'a\n\xff', 'cannot be read')])
def test_a_file_without_text(monkeypatch, data, message):
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(data)))
    with pytest.raises(UserError, match=f'^-: {message}'):
        read_lines('-')
