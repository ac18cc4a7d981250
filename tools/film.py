"""
A film of a page that sample.py --html=steps.html wrote: the steps of a sample as a GIF, or one step as a PNG.

    python tools/film.py --page=steps.html --out=steps.gif --sample=2
    python tools/film.py --page=steps.html --out=step.png --sample=2 --first=64

A browser draws it: pip install playwright pillow, then playwright install chromium (or --browser).
"""

import io
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import configurator
from configurator import UserError
from plumbing.files import check_output

# -----------------------------------------------------------------------------
page = 'steps.html'      # a page of sample.py --html
out = 'steps.gif'        # .gif: text and counts, step after step; .png: the whole page at the step --first
sample = 1               # which of the page's samples
first = 0                # the step it begins with
every = 1                # .gif: show each step, or only every second, third, ...; the last one always
pause = 140              # .gif: milliseconds a step
hold = 4000              # .gif: milliseconds of the last one
width = 560              # of the picture, in pixels; from 1000 on the map has room
height = 706             # .png: of the picture
browser: str = None      # path of a Chromium or Chrome; None: the one that playwright installed
# -----------------------------------------------------------------------------

# of the page a film shows the text and what is counted below it, without the mean, which flickers
FILM = ('h1, #which, #samples figcaption, #player .row, #map, #info, footer {display: none} '
        'main {padding: .6rem .8rem} #counts {white-space: nowrap; overflow: hidden}')
STEADY = "ui.counts.textContent = ui.counts.textContent.split(' · mean')[0]"
LEAST = dict(sample=1, first=0, every=1, pause=20, hold=20, width=100, height=100)
COLOURS = 64             # one palette for all pictures, so that they have the same colours


def check_settings():
    """Raises UserError for what cannot be filmed."""
    if not os.path.isfile(page):
        raise UserError(f'there is no {page}: python sample.py --html={page} writes one')
    if not out.endswith(('.gif', '.png')):
        raise UserError(f'--out ends with .gif for a film, with .png for a picture, got {out}')
    for name, least in LEAST.items():
        if globals()[name] < least:
            raise UserError(f'--{name} is at least {least}, got {globals()[name]}')
    check_output(out, page, text=False)


def open_page(driver):
    """The page in a browser, at the step --first of the sample."""
    try:
        window = driver.chromium.launch(executable_path=browser).new_page(
            viewport=dict(width=width, height=height if out.endswith('.png') else 900))
    except Exception as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(f'no browser: playwright install chromium, or --browser=PATH ({said})') from None
    window.goto(f'file://{os.path.abspath(page)}#sample={sample}&step={first}')
    samples, last = window.evaluate('typeof stories == "object" ? [stories.length, last] : [0, 0]')
    if sample > samples or first > last:
        raise UserError(f'{page} has {samples} samples and the steps 0 to {last}: choose --sample and '
                        '--first among them')
    return window, last


def film(window, last):
    """The pictures of the steps, as PNG bytes."""
    window.add_style_tag(content=FILM)
    shots = []
    for step in sorted({*range(first, last + 1, every), last}):
        window.evaluate(f'show({step}, false); {STEADY}')
        bottom = window.evaluate("document.getElementById('counts').getBoundingClientRect().bottom")
        shots.append(window.screenshot(clip=dict(x=0, y=0, width=width, height=bottom + 8)))
    return shots


def write_gif(shots):
    """Writes PNG pictures as a GIF that plays for ever."""
    from PIL import Image
    pictures = [Image.open(io.BytesIO(shot)).convert('RGB') for shot in shots]
    tall, plain = max(picture.height for picture in pictures), Image.Dither.NONE
    pictures = [picture.crop((0, 0, width, tall)) for picture in pictures]
    together = Image.new('RGB', (width, tall * len(pictures)))
    for number, picture in enumerate(pictures):
        together.paste(picture, (0, tall * number))
    palette = together.quantize(COLOURS, dither=plain)
    begin, *others = [picture.quantize(palette=palette, dither=plain) for picture in pictures]
    begin.save(out, save_all=True, append_images=others, duration=[pause] * len(others) + [hold], loop=0,
               optimize=True)


def main():
    check_settings()
    try:
        import PIL  # noqa: F401 (write_gif needs it, after all has been drawn)
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError('tools/film.py needs a browser and pictures: pip install playwright pillow, then '
                        'playwright install chromium') from None
    with sync_playwright() as driver:
        window, last = open_page(driver)
        if out.endswith('.png'):
            window.evaluate(f'show({first}, false)')
            window.screenshot(path=out)
            print(f'written to {out}: step {first} of {last}')
        else:
            shots = film(window, last)
            write_gif(shots)
            print(f'written to {out}: {len(shots)} pictures of steps {first} to {last}')


if __name__ == '__main__':
    configurator.run(globals())
