"""
Watch the denoising: what a sampler wrote, took back and rewrote, step by step, with what the network thinks of each token.

judge_steps() asks the network about every canvas of a trace, story() makes one sample of it into frames of text, and
animate() plays them in the terminal, write_page() in one HTML file that needs nothing else; watch() does all of that.
report() says the end of it in lines of text, marks() what a repair did.
"""

import html
import json
import time
from string import Template

import torch

from plumbing.files import write_atomically
from configurator import UserError
from rules import p_wrong

# what a position can be in a frame (its first letter is its name in the page), and how the terminal shows it
STYLES = dict(kept='', changed='magenta', new='green bold', remasked='red reverse', mask='dim', fixed='bold cyan')
STATES = list(STYLES)
SIGNS = str.maketrans({'\n': '↵', ' ': '␣', '\t': '⇥'})  # for what would not be seen


def marks(before, trace, mask_token_id):
    """
    What a repair did to a text, a character a position: ^ changed, ? doubted and kept, else a space.

    before (T,) ids; trace (S, T), the canvases from the first to the last.
    """
    again = ((trace[:-1] != mask_token_id) & (trace[1:] == mask_token_id)).any(0)          # (T,) re-masked at some step
    return ''.join('^' if new != old else '?' if doubted else ' '
                   for old, new, doubted in zip(before.tolist(), trace[-1].tolist(), again.tolist()))


def report(sample, meta, verdict, before=None):
    """The lines to print for one sample: what became of the text before, and what the model thinks of it, if it was asked."""
    lines = [f"{sample['text']}   {verdict(sample['text'])}" if verdict else sample['text']]
    indent = ''
    if before is not None:
        lines, indent = [before, f'-> {lines[0]}'], '   '
    shown = slice(meta['bos'] is not None, None)                               # the start symbol is not printed
    if meta['tokenizer'] == 'char' and sample.get('marks', '').strip():
        lines.append(f"{indent}{sample['marks'][shown].rstrip()}   (^ changed, ? doubted and kept)")
    if 'p_wrong' in sample:
        tenths = [min(9, int(10 * p)) for p in sample['p_wrong'][shown]]
        lines.append(indent + ''.join(map(str, tenths)) + '   p(WRONG) of every token in tenths')
    numbers = [f'{name} {sample[key]:.3f}' for key, name in (('nelbo', 'NELBO'), ('causal_nll', 'causal NLL')) if key in sample]
    if numbers:
        lines.append(indent + ', '.join(numbers) + ' nats/token')
    return '\n'.join(lines) + ('' if verdict else f"\n{'-' * 15}")


@torch.no_grad()
def judge_steps(model, canvases, writer=None):
    """
    p(WRONG) of every visible token of every step: canvases, a list of (B, T) ids -> (S, B, T) float, nan at masks.

    writer: whose likeliest tokens stand where the masks are while a network judges that was never shown any; None: the masks do.
    """
    doubts = []
    for x in canvases:
        masked, whole = x == model.mask_token_id, x
        if writer is not None:
            whole = torch.where(masked, writer.logits(writer(x), real_only=True).argmax(-1), x)
        doubts.append(p_wrong(model, model(whole), whole).masked_fill(masked, float('nan')))
    return torch.stack(doubts)


def printable(meta, id):
    """The text that stands for one id; nothing in it can break a line or reach the terminal as a command."""
    if id == meta['vocab_size']:
        return '▒▒' if meta['tokenizer'] == 'gpt2' else '▒'
    for name, sign in (('eos', '⟩'), ('bos', '⟨'), ('pad', '·')):
        if id == meta[name]:
            return sign
    if meta['tokenizer'] == 'gpt2':
        import tiktoken
        text = tiktoken.get_encoding('gpt2').decode_single_token_bytes(id).decode('utf-8', errors='replace')
    else:
        text = meta['itos'][id]
    return ''.join(c if c.isprintable() else '\ufffd' for c in text.translate(SIGNS))


def story(meta, canvases, fixed, doubts, row, label):
    """
    One sample's denoising: dict(label, frames), a frame a canvas: dict(tokens [str], states [str], doubts [float or None]).

    canvases: a list of (B, T) ids, from the first to the last; fixed (B, T) bool, what was given and is not doubted; doubts
    (S, B, T), nan at masks; label: text shown beside it. Columns at the right that end as padding and never held anything
    but that and masks are left out.
    """
    ids, mask = torch.stack([canvas[row] for canvas in canvases]), meta['vocab_size']   # (S, T)
    before = torch.cat((ids[:1], ids[:-1]))
    was, now, state = before == mask, ids == mask, torch.zeros_like(ids)                # 0: kept
    for name, where in dict(changed=ids != before, new=was & ~now, remasked=~was & now, mask=was & now,
                            fixed=fixed[row].expand_as(ids)).items():
        state[where] = STATES.index(name)                                               # the last that holds counts
    width = ids.size(1)
    if meta['pad'] is not None:
        wrote = ((ids != mask) & (ids != meta['pad'])).any(0) | (ids[-1] != meta['pad'])  # (T,)
        width = max([1, *(wrote.nonzero()[:, 0] + 1).tolist()])
    text = {id: printable(meta, id) for id in ids.unique().tolist()}
    judged = doubts[:, row].masked_fill(fixed[row].to(doubts.device), float('nan'))
    return dict(label=label, frames=[
        dict(tokens=[text[id] for id in tokens], states=[STATES[s] for s in states], doubts=[p if p == p else None for p in ps])
        for tokens, states, ps in zip(*(x[:, :width].tolist() for x in (ids, state, judged)))])


def animate(stories, seconds=0.08):
    """Plays the stories in the terminal, one after the other. Raises UserError without rich."""
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        raise UserError('--animate needs rich: pip install rich') from None
    console = Console()
    console.print(Text.assemble(*[(f'{state}  ', style) for state, style in STYLES.items()], ('doubted  ', 'yellow'),
                                ('p(WRONG) > 1/2', 'red')))
    for number, told in enumerate(stories, 1):
        old, last = None, len(told['frames']) - 1
        with Live(console=console, auto_refresh=False) as live:
            for step, frame in enumerate(told['frames']):
                picture = Text(overflow='fold')
                for i, (token, state, doubt) in enumerate(zip(frame['tokens'], frame['states'], frame['doubts'])):
                    # names of colours, not shades: every terminal has them readable on its own background
                    level = ('red' if doubt > 0.5 else 'yellow' if doubt > 0.2 else '') if state == 'kept' and doubt else ''
                    picture.append(old[i] if state == 'remasked' else token, level or STYLES[state])
                picture.append(f'\nsample {number}/{len(stories)}  step {step}/{last}', 'dim')
                live.update(picture.append(f'  {told["label"]}\n' if step == last else ''), refresh=True)
                old = frame['tokens']
                if console.is_terminal:
                    time.sleep(seconds)


def write_page(path, title, subtitle, stories):
    """One self-contained HTML file: every story with a slider over its steps, coloured by p(WRONG), playable."""
    table = {}  # text -> its index
    told = [dict(label=story['label'], frames=[
        [[table.setdefault(token, len(table)) for token in frame['tokens']], ''.join(state[0] for state in frame['states']),
         [None if doubt is None else round(100 * doubt) for doubt in frame['doubts']]] for frame in story['frames']])
        for story in stories]
    data = json.dumps(dict(tokens=list(table), stories=told), separators=(',', ':'))
    data = data.replace('<', r'\u003c').replace('>', r'\u003e').replace('&', r'\u0026')  # no text can end the script
    page = Template(PAGE).substitute(title=html.escape(title), subtitle=html.escape(subtitle), data=data)
    write_atomically(path, page)


def watch(judge, meta, fixed, samples, verdict, title, subtitle, in_terminal, path, most=20, writer=None):
    """
    Plays the first samples, dicts of sample.fill with their traces, in the terminal, or writes them to the page at path, or both.

    judge: the network that says how wrong each token is; None if there is none that learned it. writer: the one that wrote, if
    that is another, see judge_steps. fixed (B, T): what was given.
    verdict: a function of a text that says what is wrong with it, or None.
    """
    stories = []
    for row, sample in enumerate(samples[:most]):
        steps = [step[None] for step in sample['trace']]                       # S x (1, T)
        doubts = judge_steps(judge, steps, writer) if judge else torch.full((len(steps), *steps[0].shape), float('nan'))
        label = f"{sample['text']}   {verdict(sample['text'])}" if verdict else sample['text'][:60]
        stories.append(story(meta, steps, fixed[row:row + 1], doubts, 0, label))
    if in_terminal:
        animate(stories)
    if path:
        write_page(path, f"{meta['name']}: {title}", subtitle, stories)
        print(f'written to {path}')


PAGE = '''<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --bg: #fcfbf9; --card: #fff; --ink: #1d1c1a; --soft: #66625b; --line: #d9d4cb;
  --mask: #ddd8ce; --red: 222 58 48; --gone: #b3261e; --new: #13754a; --edit: #7a3fb0; --given: #1f5fa8 }
@media (prefers-color-scheme: dark) { :root { --bg: #131416; --card: #1b1d20; --ink: #eceae6; --soft: #a3a09a; --line: #393b3f;
  --mask: #3a3d43; --red: 214 66 56; --gone: #ff8a80; --new: #56d39b; --edit: #c9a0f5; --given: #82b7f5 } }
* { box-sizing: border-box } :focus-visible { outline: 2px solid var(--given); outline-offset: 2px }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 68rem; margin: auto; padding: 1.5rem 1rem; font-variant-numeric: tabular-nums }
h1 { font-size: 1.35rem; line-height: 1.25; margin: 0 } p { margin: .3rem 0 }
@media (max-width: 36rem) { #counts { min-height: 3em } }
.soft { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere } .soft i { color: var(--ink); margin-right: .4em }
button, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  min-height: 2.6rem; padding: 0 .8rem } #play { min-width: 5rem; background: var(--ink); color: var(--bg) }
#which { width: 100%; margin: .9rem 0; text-overflow: ellipsis }
#which, i { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
#canvas { display: flex; flex-wrap: wrap; gap: 3px; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; font-size: clamp(15px, 2vw, 18px); cursor: pointer; max-height: 60vh; overflow: auto }
i { display: inline-block; min-width: 1.55em; max-width: 100%; overflow: clip; padding: 0 .3em; font-style: normal;
  line-height: 1.75; text-align: center; white-space: pre; border: 1.5px solid transparent; border-radius: 5px;
  background: rgb(var(--red) / calc(var(--p, 0) * .0085)) }
i.m { color: transparent; background: repeating-linear-gradient(135deg, var(--mask) 0 3px, transparent 3px 6px) }
i.r { border-color: var(--gone); color: var(--gone); background: none; text-decoration: line-through }
i.n { border-color: var(--new); font-weight: 700 } i.c { border: 1.5px dashed var(--edit); font-weight: 700 }
i.f { box-shadow: inset 0 -3px var(--given) } i.picked { outline: 2px solid var(--ink) }
i.ramp { border: 0; background: linear-gradient(90deg, rgb(var(--red) / 0), rgb(var(--red) / .85)) }
.row { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .7rem 0 } span { margin-right: .5rem }
#step { display: block; accent-color: var(--ink); width: calc(100% - 100% / var(--n) + 16px);
  margin: 0 calc(50% / var(--n) - 8px) }
#map { position: relative; height: clamp(9rem, var(--t) * 1px, 24rem); margin: .4rem 0; overflow: hidden;
  border: 1px solid var(--line) }
#raster { width: 100%; height: 100%; image-rendering: pixelated; cursor: crosshair; touch-action: pan-y }
#now { position: absolute; inset: 0 auto; width: calc(100% / var(--n)); outline: 1.5px solid var(--ink); pointer-events: none }
</style>
<main>
<h1>$title</h1>
<p class="soft">$subtitle</p>
<select id="which" aria-label="sample"></select>
<div id="canvas" role="img"></div>
<p id="counts"></p>
<div class="row">
<button id="play" title="space">Play</button>
<button id="back" aria-label="one step back" title="left arrow">‹</button>
<button id="next" aria-label="one step forward" title="right arrow">›</button>
<select id="speed" aria-label="steps a second"><option>2/s<option selected>6/s<option>15/s<option>40/s</select>
</div>
<input id="step" type="range" min="0" aria-label="step">
<div id="map"><canvas id="raster" aria-hidden="true"></canvas><div id="now"></div></div>
<p id="info" class="soft" aria-live="polite"></p>
<div class="row soft"><span><i class="m">x</i>masked</span><span><i class="n">x</i>new</span>
<span><i class="r">x</i>re-masked</span><span><i class="c">x</i>rewritten</span><span><i class="f">x</i>given</span>
<span><i class="ramp">0 &nbsp; 1</i>p(WRONG)</span></div>
</main>
<script type="application/json" id="data">$data</script>
<script>
const ui = Object.fromEntries([...document.querySelectorAll('[id]')].map(element => [element.id, element]))
const { tokens, stories } = JSON.parse(ui.data.textContent)
const names = { m: 'masked', r: 're-masked', n: 'new', c: 'rewritten', k: 'kept', f: 'given' }
const root = document.documentElement, within = (x, end) => Math.min(Math.max(Math.floor(x) || 0, 0), end - 1)
let frames, step, picked = null, timer = null, saving

function show(to) {  // the one place that draws a step
  step = within(to, frames.length)
  const [ids, states, doubts] = frames[step], old = frames[Math.max(step - 1, 0)]
  ids.forEach((id, i) => {
    const cell = ui.canvas.children[i], gone = states[i] == 'r', p = gone ? old[2][i] : doubts[i]
    cell.className = states[i] + (i === picked ? ' picked' : '')
    cell.textContent = tokens[gone ? old[0][i] : id]
    cell.style.setProperty('--p', p)
    cell.title = 'position ' + i + ', ' + names[states[i]] + (p === null ? '' : ', p(WRONG) ' + (p / 100).toFixed(2))
  })
  const has = x => states.split(x).length - 1, judged = doubts.filter(p => p !== null)
  const mean = judged.reduce((sum, p) => sum + p, 0) / judged.length / 100
  ui.counts.textContent = ['step ' + step + '/' + (frames.length - 1), 'masked ' + (has('m') + has('r')),
    'committed ' + has('n'), 're-masked ' + has('r'), ...has('c') ? ['rewritten ' + has('c')] : [],
    'mean p(WRONG) ' + (judged.length ? mean.toFixed(2) : '–')].join(' · ')
  ui.canvas.ariaLabel = ids.map(id => tokens[id]).join('')
  ui.step.value = step
  ui.now.style.left = 100 * step / frames.length + '%'
  const life = frames.flatMap(([ids], s) => s && ids[picked] === frames[s - 1][0][picked] ? [] :
    tokens[ids[picked]] + (s ? ' at ' + s : ''))
  ui.info.textContent = picked === null ? 'Tap a token to follow it. The map: steps to the right, positions down.'
    : ui.canvas.children[picked].title + ': ' + life.join(' → ')
  clearTimeout(saving)  // browsers refuse an address that changes too often
  saving = setTimeout(() => history.replaceState(null, '', '#sample=' + (+ui.which.value + 1) + '&step=' + step), 300)
}
function paint() {  // the map: a pixel for each position of each step
  const color = name => getComputedStyle(root).getPropertyValue(name), pen = ui.raster.getContext('2d')
  Object.assign(ui.raster, { width: frames.length, height: frames[0][0].length })
  const [red, ...colors] = ['--red', '--mask', '--gone', '--new', '--edit'].map(color)
  frames.forEach(([, states, doubts], s) => doubts.forEach((p, i) => {
    pen.fillStyle = colors['mrnc'.indexOf(states[i])] || 'rgb(' + red + ' / ' + p * .0085 + ')'
    pen.fillRect(s, i, 1, 1)
  }))
}
function choose(sample, to) {
  ui.which.value = sample
  frames = stories[sample].frames
  picked = null
  ui.step.max = frames.length - 1
  root.style.setProperty('--n', frames.length)
  root.style.setProperty('--t', frames[0][0].length)
  ui.canvas.replaceChildren(...frames[0][0].map(() => document.createElement('i')))
  paint()
  show(to)
}
function play(on) {
  clearInterval(timer)
  const tick = () => step < frames.length - 1 ? show(step + 1) : play(false)
  timer = on ? setInterval(tick, 1000 / parseInt(ui.speed.value)) : null
  ui.play.textContent = on ? 'Pause' : 'Play'
}
function toggle() { if (!timer && step == frames.length - 1) show(0); play(!timer) }
function go(to) { play(false); show(to) }
function follow() {  // #sample=2&step=30
  const at = new URLSearchParams(location.hash.slice(1))
  play(false)
  choose(within(at.get('sample') - 1, stories.length), at.get('step'))
}
stories.forEach(({ label }, i) => ui.which.add(new Option((i + 1) + ' · ' + label, i)))
ui.which.onchange = () => { play(false); choose(ui.which.value, 0) }
ui.play.onclick = toggle
ui.back.onclick = () => go(step - 1)
ui.next.onclick = () => go(step + 1)
ui.speed.onchange = () => play(timer)
ui.step.oninput = () => go(ui.step.value)
ui.canvas.onclick = event => {
  const i = [...ui.canvas.children].indexOf(event.target)
  picked = i < 0 || i === picked ? null : i
  show(step)
}
ui.raster.onpointerdown = ui.raster.onpointermove = event => {
  if (!event.buttons) return
  const at = ui.raster.getBoundingClientRect()
  picked = within((event.clientY - at.top) / at.height * ui.raster.height, ui.raster.height)
  go((event.clientX - at.left) / at.width * frames.length)
}
onkeydown = event => {
  const tag = event.target.tagName, move = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
  if (tag == 'SELECT' || event.ctrlKey || event.metaKey || event.altKey || (event.key == ' ' ? tag == 'BUTTON' : !move)) return
  event.preventDefault()
  if (move) go(step + move); else toggle()
}
onhashchange = follow
matchMedia('(prefers-color-scheme: dark)').onchange = paint
follow()
</script>
</html>
'''
