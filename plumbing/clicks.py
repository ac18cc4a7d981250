"""
What a page answers to somebody who types or clicks. net is always an object of model, meta, task (or None),
can, look (of plumbing.show.layout), hole and longest, see open_network in app.py.
"""

import html
import queue
import threading

import torch

from configurator import UserError
from plumbing import show
from plumbing.text import encode, modelled, pieces, start_canvas, task_canvas


def read(net, text):
    """A text as the dataset's task.py reads what people write. Raises UserError for one that is too long."""
    if len(text) > net.longest:
        raise UserError(f'the text has {len(text):,} characters, and {net.longest:,} are taken (--longest)')
    if hasattr(net.task, 'read'):
        return net.task.read(text, net.meta['block_size'], net.hole)
    return text


def start(net, task, text):
    """Where a task starts: canvas and fixed (1, T). Raises UserError for a text that it cannot use."""
    text = read(net, text) if text or task != 'generate' else text
    if task == 'generate':
        return start_canvas(net.model, net.meta, 1, encode(net.meta, text))
    return task_canvas(task, net.model, net.meta, text)


def frame_of(net, canvas, fixed, before=None):
    """A canvas (T,) as a frame, see plumbing.show.story; before (T,): the one of the step before."""
    doubts = torch.full((1, len(canvas)), float('nan'))
    if net.can.detects:
        doubts = show.judge_steps(net.model, canvas[None]).cpu()
    trace = torch.stack((canvas if before is None else before, canvas)).cpu()                      # (2, T)
    return show.story(net.meta, trace, fixed.cpu(), doubts.repeat(2, 1), '')['frames'][-1]


def read_place(net, text, place=None):
    """A text as it stands, with holes or without: (canvas (1, T), fixed (1, T), the text of each token)."""
    canvas, fixed = start(net, 'infill' if net.hole in read(net, text) else 'score', text)
    ids = canvas[0].tolist()
    given = [i for i in ids if i != net.model.mask_token_id]
    told = iter([text for text, _ in pieces(net.meta, given)])
    parts = [net.hole if i == net.model.mask_token_id else next(told) for i in ids]
    if place is not None and not 0 <= place < len(ids):
        raise UserError('this place is no longer there: click again')
    return canvas.to(next(net.model.parameters()).device), fixed, parts


def heat(net, text):
    """HTML of a text, each token the darker the more it is doubted; what is wrong with the text, if it is."""
    if not text:
        return ''
    try:
        canvas, _, _ = read_place(net, text)
        return show.fragment(net.look, frame_of(net, canvas[0], ~modelled(canvas, net.meta)[0][0]))
    except UserError as error:
        return f'<p style="overflow-wrap: anywhere">{html.escape(str(error))}</p>'


@torch.no_grad()
def alternatives(net, text, place, number=5):
    """A line: the likeliest tokens of a place, if the network did not see what stands there."""
    canvas, _, parts = read_place(net, text, place)
    canvas[0, place] = net.model.mask_token_id
    hidden = net.model(canvas)[0, place]
    p = net.model.logits(hidden[None], real_only=True)[0].softmax(-1)                               # (V+2,)
    best = p.topk(min(number, net.meta['vocab_size']))
    words = [f'{show.printable(net.meta, id).translate(show.SIGNS)} {share:.0%}'
             for share, id in zip(best.values.tolist(), best.indices.tolist())]
    return f'in place of {parts[place].translate(show.SIGNS)}: ' + ', '.join(words)


def mask_word(net, text, place):
    """The text with a hole for each token of the word at a place."""
    _, _, parts = read_place(net, text, place)
    first, last = place, place + 1
    if parts[place].strip().isalpha():                              # the letters around it are its word
        while first and parts[first - 1].strip().isalpha() and not parts[first][:1].isspace():
            first -= 1
        while last < len(parts) and parts[last].isalpha():
            last += 1
    for i in range(first, last):
        if parts[i] and parts[i] != net.hole:
            parts[i] = ' ' * parts[i].startswith(' ') * (len(parts[i]) > 1) + net.hole
    return ''.join(parts)


def passes(net, work):
    """Yields what net.model sees, ids (T,), in each bidirectional pass of work(), then what that returns."""
    seen, left = queue.Queue(1), threading.Event()

    def note(module, args, more):
        if threading.current_thread() is worker and not more.get('causal'):
            seen.put(args[0][0].clone())
            if left.is_set():
                raise GeneratorExit

    def run():
        try:
            seen.put(([work()], None))
        except BaseException as error:                              # raised again where it is read
            seen.put(([], error))

    worker = threading.Thread(target=run, daemon=True)
    hook = net.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        worker.start()
        found = seen.get()
        while not isinstance(found, tuple):
            yield found
            found = seen.get()
        if found[1]:
            raise found[1]
        yield from found[0]
    finally:
        left.set()
        while worker.is_alive():                                    # it may wait for somebody to read
            if not seen.empty():
                seen.get()
            worker.join(0.01)
        hook.remove()
