"""
A checkpoint in the browser: write, repair, fill in, solve, and see every step (pip install gradio).

    python app.py                                    the newest checkpoint in out
    python app.py --out_dir=out-text --port=8000     another one, at http://127.0.0.1:8000
"""

import configurator

configurator.help_first(globals())           # --help does not wait for torch
# ruff: noqa: E402 (so the imports come after it)

import functools
import html
import inspect
import os
import traceback
from itertools import zip_longest
from types import SimpleNamespace

from configurator import UserError
from data.loader import load_data
from model import GPT
from parts.presets import PRESETS, choose_rules, supports
from plumbing import show
from plumbing.checkpoint import find_checkpoint
from plumbing.clicks import alternatives, frame_of, heat, mask_word, passes, start
from plumbing.device import configure_compute, freeze
from plumbing.text import decode, load_task, usual_hole
from sample import fill

# -----------------------------------------------------------------------------
init_from = 'ckpt'         # 'ckpt': the newest checkpoint under out_dir; or the path of one, or a folder
out_dir = 'out'            # where 'ckpt' looks
host = '127.0.0.1'         # who may see the page: 127.0.0.1 this machine only, 0.0.0.0 whoever reaches it
port: int = None           # None: the first free one from 7860 on
longest = 2000             # characters of a text, at most
device = 'auto'            # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'             # auto | float32 | bfloat16
attention = 'auto'         # auto | plain | sdpa
# -----------------------------------------------------------------------------

LEGEND = """<h1>nanoRemask: {name}</h1><p class="legend"><i class="m">x</i> masked
<i class="n">x</i> new <i class="r">x</i> taken back <i class="c">x</i> rewritten <i class="f">x</i> given
<i class="ramp">0   1</i> p(WRONG) <i class="q">x</i> doubted and kept</p>"""
CLICK = """element.addEventListener('click', event => {
  const mark = event.target.closest('[data-place]')
  if (mark) trigger('click', { place: +mark.dataset.place })
})"""
USUAL, NONE = 'as usual', 'none'


# -----------------------------------------------------------------------------
# behind the page: a network, net, and what is asked of it


def open_network(s):
    """What the settings name: an object of model, meta, config, task (or None), can, look and hole."""
    path = find_checkpoint(s.init_from, s.out_dir)
    model, checkpoint = GPT.load(path)
    model, choices = configure_compute(model, s.device, s.dtype, s.attention)
    meta, config = checkpoint['meta'], checkpoint['config']
    task = load_task(meta['name'])
    print(f'{path}: {choices}')
    return SimpleNamespace(model=freeze(model), meta=meta, config=config, task=task, can=supports(config),
                           look=show.layout(meta, task), hole=usual_hole(meta), path=path, longest=s.longest)


def samplers(net, task):
    """The presets that this checkpoint can use for a task, USUAL is none of them."""
    found = [USUAL]
    for name in PRESETS:
        try:
            rules = choose_rules(net.config, preset=name, task=task, inside=task != 'generate')
            if task == 'generate' or rules['remask'] != 'causal' and not rules['ar_prefix']:
                found.append(name)
        except UserError:
            pass
    return found


def steps(net, task, text, sampler=USUAL, count=0, seed=1337):
    """
    Writes, and yields HTML for every step; the last one is the finished text, for a repair what it did.

    sampler: a preset; count: passes, 0: as many as usual, and never more than there are places.
    """
    canvas, fixed = start(net, task, text)
    masked = canvas[0] == net.model.mask_token_id
    inside = task == 'repair' or bool((masked.cummax(0).values & ~masked).any())
    rules = choose_rules(net.config, preset=None if sampler == USUAL else sampler, task=task, inside=inside,
                         steps=min(int(count), net.model.config.block_size) or None)
    if rules['remask'] == 'causal':                                 # it takes the passes that it takes
        rules.pop('steps', None)
    rules['seed'] = int(seed) % 2 ** 63
    work = functools.partial(fill, net.model, net.meta, canvas, fixed, trace=True, **rules)
    before, old = canvas[0], None
    for found in passes(net, work):
        if isinstance(found, list):
            break
        frame = frame_of(net, found, fixed[0], before.to(found.device))
        yield show.fragment(net.look, frame, old)
        before, old = found, frame

    # a causal pass cannot be watched while it writes, so its steps are shown now
    (story,) = show.stories(net.model if net.can.detects else None, net.meta, fixed, found, net.task)
    for before, frame in zip(story['frames'], story['frames'][1:]) if old is None else ():
        yield show.fragment(net.look, frame, before)
    yield ending(net, task, story, found[0]['nfe'])


def ending(net, task, story, nfe):
    """HTML of what a sampler wrote; for a repair what it did."""
    first, last, doubted = story['frames'][0], story['frames'][-1], set()
    for frame in story['frames']:
        doubted |= {place for place, state in enumerate(frame['states']) if state == 'remasked'}
    states = [state if state == 'fixed' else 'kept' for state in last['states']]
    if task == 'infill' and net.look['kind'] != 'board':            # of a long text one looks for what is new
        states = ['kept' if state == 'fixed' else 'new' for state in states]
    said = ', '.join(filter(None, [html.escape(story['note']), f'{nfe} passes']))
    marks = show.fragment(net.look, dict(last, states=states), given=first if task == 'repair' else None,
                          doubted=doubted)
    return f'{marks}<p>{said}</p>'


# -----------------------------------------------------------------------------
# the page


def polite(gr, function):
    """The function for Gradio: what it raises is a message."""
    @functools.wraps(function)
    def call(*args):
        try:
            result = function(*args)
            if inspect.isgenerator(result):
                yield from result
            else:
                yield result
        except UserError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
        except Exception:
            traceback.print_exc()
            raise gr.Error('that went wrong; the terminal says why', print_exception=False) from None
    return call


def side_by_side(net, task):
    """The function behind a button: text, settings, two samplers -> pairs of HTML."""
    def write(text, first, second, count, seed):
        names = [name for name in (first, second) if name != NONE]
        both = [steps(net, task, text, name, count, seed) for name in names]
        shown = ['', '']
        for parts in zip_longest(*both):
            shown = [new or old for new, old in zip_longest(parts, shown)]
            yield tuple(shown)
    return write


def example(net, task):
    """A held-out text of the data to try a task on, '' if it is not here."""
    try:
        val = load_data(net.meta.get('dataset', net.meta['name']))[1]['val']
    except UserError:
        return ''
    if hasattr(net.task, 'starts'):
        return net.task.starts(val, 1)[0] if task == 'infill' else decode(net.meta, val[0].tolist())[0]
    row = val[0] if val.ndim == 2 else val[:net.model.config.block_size // 2]
    text = decode(net.meta, row.tolist())[0]
    return mask_word(net, text, 5) if task == 'infill' else text


def tab(gr, net, task, label, told):
    """One tab: a text, what the network thinks of it, the controls, and what comes of it."""
    def answer(text, event: gr.EventData):
        line = alternatives(net, text, event.place)
        return mask_word(net, text, event.place) if task == 'infill' else text, f'<p>{html.escape(line)}</p>'

    names, T = samplers(net, task), net.model.config.block_size
    begin = '' if task == 'generate' else example(net, task)
    best = 'intelligent' if task == 'generate' and 'intelligent' in names else USUAL    # it can be watched
    css = show.styles()
    with gr.Tab(label):
        text = gr.Textbox(begin, label=label, info=told, lines=3, max_lines=12, max_length=net.longest)
        seen = gr.HTML(heat(net, begin), css_template=css, js_on_load=CLICK)
        said = gr.HTML()
        with gr.Row():
            one = gr.Dropdown(names, value=best, label='sampler', info='the rules')
            two = gr.Dropdown([NONE, *names], value=NONE, label='beside it', info='a second one')
            count = gr.Slider(0, T, 0, step=1, label='steps', info='0: as usual')
            number = gr.Number(1337, precision=0, minimum=0, label='seed', info='fixes what is drawn')
        with gr.Row():
            go, halt = gr.Button(label, variant='primary'), gr.Button('stop', scale=0)
        with gr.Row():
            results = [gr.HTML(css_template=css, min_width=300, visible=first) for first in (True, False)]

    calm = dict(show_progress='hidden', trigger_mode='always_last')    # while one types, the last text counts
    text.change(polite(gr, functools.partial(heat, net)), text, seen, api_name=f'{task}_heat', **calm)
    seen.click(polite(gr, answer), text, [text, said], api_name=False, **calm)
    writing = go.click(polite(gr, side_by_side(net, task)), [text, one, two, count, number], results,
                       api_name=task, show_progress='minimal', concurrency_id='write')
    halt.click(None, cancels=writing)
    two.change(lambda name: gr.update(visible=name != NONE), two, results[1], api_name=False)


TABS = dict(
    generate=('write', 'how the text begins, or nothing'),
    infill=('fill in', 'a text with holes, {hole} for each token; click a word to make holes of it'),
    repair=('repair', 'what is doubted is shaded as you type; click it to see what else could stand there'))


def build(gr, net):
    """The page, gr.Blocks."""
    board, can = net.look['kind'] == 'board', net.can
    with gr.Blocks(title='nanoRemask', analytics_enabled=False) as blocks:
        gr.HTML(LEGEND.format(name=html.escape(net.meta['name'])), css_template=show.styles())
        for task, (label, told) in TABS.items():
            fits = dict(generate=not board, repair=can.detects and can.writes, infill=can.writes)
            if fits[task] and (can.writes or can.causal):
                label = 'solve' if board and task == 'infill' else label
                tab(gr, net, task, label, told.format(hole=net.hole))
    return blocks


def main():
    s = configurator.namespace(globals())
    if s.longest < 1 or not 1 <= (s.port or 1) <= 65535:
        raise UserError(f'longest must be at least 1 and port in 1..65535, got {s.longest} and {s.port}')
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'                # before it is imported
    try:
        import gradio as gr
    except ImportError:
        raise UserError('app.py needs gradio: pip install gradio') from None
    blocks = build(gr, open_network(s))
    look = gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace'])    # none is fetched
    try:
        blocks.queue(max_size=16, default_concurrency_limit=1).launch(
            server_name=s.host, server_port=s.port, share=False, ssr_mode=False, theme=look,
            footer_links=[])
    except OSError as error:
        raise UserError(f'{s.host}, port {s.port or "from 7860 on"}: {error}') from error


if __name__ == '__main__':
    configurator.run(globals())
