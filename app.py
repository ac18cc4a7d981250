"""
A checkpoint in the browser: write, repair, fill in, solve, and see every step (pip install gradio).

    python app.py                                    the newest checkpoint in out
    python app.py --out_dir=out-text --port=8000     another one, at http://127.0.0.1:8000
    python app.py --beside=out/old                   two checkpoints side by side
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

from configurator import UserError
from data.loader import load_data
from parts.handle import Live
from parts.presets import PRESETS, choose_rules
from plumbing import show
from plumbing.clicks import alternatives, heat, mask_word
from plumbing.text import decode
from sample import load

# -----------------------------------------------------------------------------
init_from = 'ckpt'         # 'ckpt': the newest checkpoint under out_dir; or the path of one, or a folder
out_dir = 'out'            # where 'ckpt' looks
beside: str = None         # the path of a second checkpoint, or a folder, that writes beside the first
host = '127.0.0.1'         # who may see the page: 127.0.0.1 this machine only, 0.0.0.0 whoever reaches it
port: int = None           # None: the first free one from 7860 on
longest = 2000             # characters of a text, at most
device = 'auto'            # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'             # auto | float32 | bfloat16
attention = 'auto'         # auto | plain | sdpa
# -----------------------------------------------------------------------------

LEGEND = """<h1>nanoRemask: {name}</h1><p class="legend"><i class="m">x</i> masked
<i class="n">x</i> new <i class="r">x</i> taken back <i class="c">x</i> rewritten <i class="f">x</i> given
<i class="d">x</i> drafted <i class="ramp">0   1</i> p(WRONG) <i class="q">x</i> doubted and kept
{signs}</p><p>{said}</p>"""
SIGNS = '⟨ start, ⟩ end of text, · padding'
CLICK = """element.addEventListener('click', event => {
  const mark = event.target.closest('[data-place]')
  if (mark) trigger('click', { place: +mark.dataset.place })
})"""
USUAL, NONE = 'as usual', 'none'


# -----------------------------------------------------------------------------
# behind the page: a parts.handle.Handle, m, and what is asked of it


def samplers(m, task):
    """The presets that this checkpoint can use for a task, USUAL is none of them."""
    found = [USUAL]
    for name in PRESETS:
        try:
            rules = choose_rules(m.config, preset=name, task=task, inside=task != 'generate')
            from_the_left = rules['remask'] == 'causal' or rules['ar_prefix'] or rules.get('draft')
            if task == 'generate' or not from_the_left:
                found.append(name)
        except UserError:
            pass
    return found


def steps(m, task, text, sampler=USUAL, count=0, seed=1337):
    """
    Writes, and yields HTML for every step; the last one is the finished text, for a repair what it did.

    sampler: a preset; count: passes, 0: as many as usual, and never more than there are places.
    """
    if task == 'generate':
        canvas, fixed = m.start(1, m.read(text) if text else text)
        text, canvas, fixed = None, canvas[0], fixed[0]
    else:
        text, canvas, fixed = m.canvas(task, text)
    preset = None if sampler == USUAL else sampler
    count = min(int(count), m.model.config.block_size) or None
    if m.choose(task, [text], [canvas], preset=preset)['remask'] == 'causal':
        count = None                                                # it takes the passes that it takes
    live = Live()
    work = functools.partial(m.write, task, [text], [canvas], [fixed], preset=preset, steps=count,
                             seed=int(seed) % 2 ** 63)
    for frame, before, _ in m.frames(live, work):
        yield show.fragment(m.look, frame, before)
    yield ending(m, live.result[0])


def ending(m, sample):
    """HTML of a Sample; for a repair what was done to the text."""
    (story,) = m.stories([sample])
    last = story['frames'][-1]
    states = [state if state == 'fixed' else 'kept' for state in last['states']]
    if sample.task == 'infill' and m.look['kind'] != 'board':       # of a long text one looks for what is new
        states = ['kept' if state == 'fixed' else 'new' for state in states]
    marks = show.fragment(m.look, dict(last, states=states))
    if sample.task == 'repair':
        marks = show.repaired(m.look, story['diff'])
    said = ', '.join(filter(None, [html.escape(story['note']), f'{sample.nfe} passes']))
    return f'{marks}<p>{said}</p>'


# -----------------------------------------------------------------------------
# the page


def polite(gr, function, longest):
    """The function for Gradio: what it raises is a message, and so is a text that is too long."""
    @functools.wraps(function)
    def call(*args):
        try:
            most = max((len(text) for text in args if isinstance(text, str)), default=0)
            if most > longest:
                raise UserError(f'the text has {most:,} characters, and {longest:,} are taken (--longest)')
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


def side_by_side(m, task, other):
    """The function behind a button: text, settings, two samplers, of m and of other -> pairs of HTML."""
    def write(text, first, second, count, seed):
        chosen = [(owner, name) for owner, name in ((m, first), (other, second)) if name != NONE]
        both = [steps(owner, task, text, name, count, seed) for owner, name in chosen]
        shown = ['', '']
        for parts in zip_longest(*both):
            shown = [new or old for new, old in zip_longest(parts, shown)]
            yield tuple(shown)
    return write


def example(m, task):
    """A held-out text of the data to try a task on, '' if it is not here."""
    try:
        val = load_data(m.meta.get('dataset', m.meta['name']))[1]['val']
    except UserError:
        return ''
    if hasattr(m.task, 'starts'):
        return m.task.starts(val, 1)[0] if task == 'infill' else decode(m.meta, val[0].tolist())[0]
    row = val[0] if val.ndim == 2 else val[:m.model.config.block_size // 2]
    text = decode(m.meta, row.tolist())[0]
    return mask_word(m, text, 5) if task == 'infill' else text


def tab(gr, m, other, longest, task):
    """One tab: a text, what the network thinks of it, the controls, and what comes of it."""
    label, told = TABS[task]
    label = 'solve' if m.look['kind'] == 'board' and task == 'infill' else label

    def answer(text, event: gr.EventData):
        line = alternatives(m, text, event.place)
        return mask_word(m, text, event.place) if task == 'infill' else text, f'<p>{html.escape(line)}</p>'

    names, T = samplers(m, task), m.model.config.block_size
    second = samplers(other, task) if fits(other, task) else []
    two_of_them = other is not m and second != []
    begin = '' if task == 'generate' else example(m, task)
    best = 'intelligent' if task == 'generate' and 'intelligent' in names else USUAL    # it takes things back
    css = show.styles()
    with gr.Tab(label):
        text = gr.Textbox(begin, label=label, info=told.format(hole=m.hole), lines=3, max_lines=12,
                          max_length=longest)
        seen = gr.HTML(heat(m, begin), css_template=css, js_on_load=CLICK)
        said = gr.HTML()
        with gr.Row():
            one = gr.Dropdown(names, value=best, label='sampler', info='the rules')
            two = gr.Dropdown([NONE, *second], value=USUAL if two_of_them else NONE, label='beside it',
                              info='of the second checkpoint' if other is not m else 'a second one')
            count = gr.Slider(0, T, 0, step=1, label='steps', info='0: as usual')
            number = gr.Number(1337, precision=0, minimum=0, label='seed', info='fixes what is drawn')
        with gr.Row():
            go, halt = gr.Button(label, variant='primary'), gr.Button('stop', scale=0)
        with gr.Row():
            results = [gr.HTML(css_template=css, min_width=300, visible=there)
                       for there in (True, two_of_them)]

    calm = dict(show_progress='hidden', trigger_mode='always_last')    # while one types, the last text counts
    text.change(polite(gr, functools.partial(heat, m), longest), text, seen, api_name=f'{task}_heat', **calm)
    seen.click(polite(gr, answer, longest), text, [text, said], api_name=False, **calm)
    writing = go.click(polite(gr, side_by_side(m, task, other), longest), [text, one, two, count, number],
                       results, api_name=task, show_progress='minimal', concurrency_id='write')
    halt.click(None, cancels=writing)
    two.change(lambda name: gr.update(visible=name != NONE), two, results[1], api_name=False)


TABS = dict(
    generate=('write', 'how the text begins, or nothing'),
    infill=('fill in', 'a text with holes, {hole} for each token; click a word to make holes of it'),
    repair=('repair', 'what is doubted is shaded as you type; click it to see what else could stand there'))


def fits(m, task):
    """Whether a checkpoint can do a task."""
    if task == 'generate':
        return m.look['kind'] != 'board' and (m.can.writes or m.can.causal)
    return m.can.writes and (m.can.detects or task == 'infill')


def build(gr, m, other=None, longest=2000):
    """The page, gr.Blocks; other: what writes beside m, None: m as well."""
    other = other or m
    said = html.escape(m.said[0])
    if other is not m:
        said = f'left: {said}<br>right: {html.escape(other.said[0])}'
    padded = m.look['kind'] == 'boxes' and m.meta['pad'] is not None
    legend = LEGEND.format(name=html.escape(m.meta['name']), said=said, signs=SIGNS if padded else '')
    with gr.Blocks(title='nanoRemask', analytics_enabled=False) as blocks:
        gr.HTML(legend, css_template=show.styles())
        for task in TABS:
            if fits(m, task):
                tab(gr, m, other, longest, task)
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
    compute = dict(device=s.device, dtype=s.dtype, attention=s.attention)
    m = load(s.init_from, out_dir=s.out_dir, **compute)
    other = s.beside and load(s.beside, **compute)
    print(m, *filter(None, [other]), sep='\n')
    blocks = build(gr, m, other, s.longest)
    look = gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace'])    # none is fetched
    try:
        blocks.queue(max_size=16, default_concurrency_limit=1).launch(
            server_name=s.host, server_port=s.port, share=False, ssr_mode=False, theme=look,
            footer_links=[])
    except OSError as error:
        raise UserError(f'{s.host}, port {s.port or "from 7860 on"}: {error}') from error


if __name__ == '__main__':
    configurator.run(globals())
