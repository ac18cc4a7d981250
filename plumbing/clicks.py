"""
What a page answers to somebody who types or clicks. m is always a parts.handle.Handle.
"""

import html

import torch

from configurator import UserError
from plumbing import show
from plumbing.text import modelled, pieces


def read_place(m, text, place=None):
    """A text as it stands, with holes or without: (canvas (T,), the text of each token)."""
    _, canvas, _ = m.canvas('infill' if m.hole in m.read(text) else 'score', text)
    ids, mask = canvas.tolist(), m.model.mask_token_id
    told = iter([text for text, _ in pieces(m.meta, [i for i in ids if i != mask])])
    parts = [m.hole if i == mask else next(told) for i in ids]
    if place is not None and not 0 <= place < len(ids):
        raise UserError('this place is no longer there: click again')
    return canvas.to(next(m.model.parameters()).device), parts


def heat(m, text):
    """HTML of a text, each token the darker the more it is doubted; what is wrong with the text, if it is."""
    if not text:
        return ''
    try:
        canvas, _ = read_place(m, text)
        given = ~modelled(canvas[None], m.meta)[0][0]
        return show.fragment(m.look, m.frame(canvas, given)[0])
    except UserError as error:
        return f'<p style="overflow-wrap: anywhere">{html.escape(str(error))}</p>'


@torch.no_grad()
def alternatives(m, text, place, number=5):
    """A line: the likeliest tokens of a place, if the network did not see what stands there."""
    canvas, parts = read_place(m, text, place)
    canvas[place] = m.model.mask_token_id
    hidden = m.model(canvas[None])[0, place]
    p = m.model.logits(hidden[None], real_only=True)[0].softmax(-1)                              # (V+2,)
    best = p.topk(min(number, m.meta['vocab_size']))
    words = [f'{show.printable(m.meta, id).translate(show.SIGNS)} {share:.0%}'
             for share, id in zip(best.values.tolist(), best.indices.tolist()) if share >= 0.005]
    return f'in place of {parts[place].translate(show.SIGNS)}: ' + ', '.join(words)


def mask_word(m, text, place):
    """The text with a hole for each token of the word at a place."""
    _, parts = read_place(m, text, place)
    first, last = place, place + 1
    if parts[place].strip().isalpha():                              # the letters around it are its word
        while first and parts[first - 1].strip().isalpha() and not parts[first][:1].isspace():
            first -= 1
        while last < len(parts) and parts[last].isalpha():
            last += 1
    for i in range(first, last):
        if parts[i] and parts[i] != m.hole:
            parts[i] = ' ' * parts[i].startswith(' ') * (len(parts[i]) > 1) + m.hole
    return ''.join(parts)
