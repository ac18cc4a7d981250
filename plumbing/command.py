"""
What sample.py does before and after it samples: networks, canvases, and what is shown. s is always its
settings.
"""

import json
import os
import shlex
from functools import partial

import torch

from configurator import UserError
from plumbing import show
from plumbing.checkpoint import best_of, check_same_model, find_checkpoint, identity, load_merged
from plumbing.device import configure_compute, freeze
from plumbing.evaluate import p_wrong
from plumbing.files import check_output, to_json, write_atomically
from plumbing.score import given_sample, judge_samples, total
from plumbing.text import (
    can_have,
    decode,
    encode,
    load_task,
    read_lines,
    start_canvas,
    stop_at,
    task_canvas,
    typed,
    until_end,
    usual_hole,
)


def load_networks(s, load, supports):
    """The network, its checkpoint and the judge (or None), ready to compute; says on screen what they are."""
    path = find_checkpoint(s.init_from, s.out_dir)
    other, judging = (name and find_checkpoint(name, s.out_dir) for name in (s.merge_from, s.remask_from))
    for output in (s.save, s.html, s.export):
        check_output(output, path, other, judging)
    merged = ''
    if other:
        model, checkpoint = load_merged(load, supports, path, other, s.merge_weight)
        merged = f', merged with {s.merge_weight:g} of {other}'
    else:
        model, checkpoint = load(path)
    print(f"{path}: {checkpoint['config']['training_type']} on {checkpoint['meta']['name']}, "
          f"iteration {checkpoint['iter_num']}{merged}")
    if os.path.exists(best_of(path)):
        print(f'its validation loss was lower before: --init_from={shlex.quote(best_of(path))}')

    judge = None
    if judging:
        judge, second = load(judging)
        check_same_model(path, identity(checkpoint), judging, identity(second),
                         ('vocab_size', 'block_size', 'itos'))
        if not supports(second['config']).detects:
            raise UserError(f'{judging} was not trained to find wrong tokens '
                            f"(training_type={second['config']['training_type']})")
        configure_compute(judge, s.device, s.dtype, s.attention, s.compile)
    model, choices = configure_compute(model, s.device, s.dtype, s.attention, s.compile)
    print(f'{model.num_params():,} parameters, {choices}')
    if not s.export:  # what is exported stays as it was trained
        for network in filter(None, (model, judge)):
            freeze(network)
    return model, checkpoint, judge


def saved(line):
    """A line that --save wrote -> (text, tokens). Raises UserError for any other."""
    try:
        sample = json.loads(line)
        return sample['text'] + '', sample.get('tokens')
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UserError("expected a JSON object with a 'text', as --save writes them") from None


def of_each_text(s, meta, use):
    """
    [(text, use(text, its tokens if it was saved with them))] of --text, or of the lines of --file, as the
    dataset's task.py reads them.

    Lines that cannot be used are named, left out and counted in s. Raises UserError if there are no others.
    """
    task, size = load_task(meta['name']), meta['block_size']
    hole = s.hole or usual_hole(meta)
    read = (lambda text: task.read(text, size, hole)) if hasattr(task, 'read') else lambda text: text
    if not s.file:
        text = read(typed(meta, s.text))
        return [(text, use(text, None))]
    found, wrong, name = [], [], 'standard input' if s.file == '-' else s.file
    lines = read_lines(s.file)
    if hasattr(task, 'gather') and not s.file.endswith('.jsonl'):
        lines = task.gather(lines, size)
    for number, line in lines:
        try:
            text, tokens = saved(line) if s.file.endswith('.jsonl') else (line, None)
            text = read(text)
            found.append((text, use(text, tokens)))
        except UserError as error:
            wrong.append(f'{name}, line {number}: {error}')
    if not found:
        others = f' (none of the {len(wrong)} lines can be used)' if len(wrong) > 1 else ''
        raise UserError(wrong[0] + others)
    if wrong:
        print(*wrong, sep='\n')
        s.left_out = f'{len(wrong)} of {len(found) + len(wrong)} lines of {name} were left out, see above'
    return found


def canvases(s, model, meta):
    """What is to be written: (texts or None, canvas, fixed), num_samples rows (T,) a text in the last two."""
    if s.task == 'generate':
        s.prompt = typed(meta, s.prompt)
        s.stop = s.stop and typed(meta, s.stop)
        odd = [c for c in s.stop or '' if not can_have(meta, c)]
        if odd:
            raise UserError(f"stop: {odd[0]!r} is not in the vocabulary of {meta['name']}")
        num = s.num_samples or 10
        lengths = None if s.length is None else torch.full((num,), s.length)
        return None, *start_canvas(model, meta, num, encode(meta, s.prompt), lengths)
    pairs = of_each_text(s, meta, lambda text, _: task_canvas(s.task, model, meta, text, s.hole, s.mask))
    rows = [(text, canvas[0], fixed[0]) for text, (canvas, fixed) in pairs for _ in range(s.num_samples or 1)]
    return zip(*rows)


def by_length(sampler, canvas, fixed):
    """The samples of sampler(canvas (B, T), fixed) for the rows of each length, in the order of the rows."""
    lengths = [len(row) for row in canvas]
    samples = [None] * len(lengths)
    for T in dict.fromkeys(lengths):
        where = [i for i, length in enumerate(lengths) if length == T]
        group = (torch.stack([rows[i] for i in where]) for rows in (canvas, fixed))
        for i, sample in zip(where, sampler(*group)):
            samples[i] = sample
    return samples


def given_samples(s, model, meta):
    """The given texts as samples, to be scored."""
    return [sample for _, sample in of_each_text(s, meta, partial(given_sample, model, meta))]


@torch.no_grad()
def compare(model, meta, sample, before):
    """Adds to a sample what edits made of the ids before (T,): before, and the signs of show.changes."""
    ids = sample['trace'][-1:] if meta['pad'] is not None else torch.tensor([sample['tokens']])
    ids = ids.to(next(model.parameters()).device)                   # (1, T), with its padding
    doubted = p_wrong(model, model(ids), ids)[0] > 0.5
    sample['before'] = until_end(meta, before.tolist())
    sample['taken'], sample['marks'] = show.changes(sample['before'], sample['tokens'], doubted.tolist())


def show_samples(s, model, judge, meta, can, samples, texts=None, canvas=None, *written):
    """
    Prints the samples, plays them, writes the page and the file: whatever was asked for.

    can: the checkpoint's parts.presets.Abilities; texts: what was given, None: nothing; canvas: the rows
    where sampling started; written: what is fixed in them, the rules in words and the seconds it took, if it
    wrote.
    """
    if s.stop:
        stop_at(meta, samples, s.stop, len(decode(meta, encode(meta, s.prompt))[0]))
    if s.task == 'repair':
        for sample, before in zip(samples, canvas):
            if getattr(s, 'rounds', None):
                compare(model, meta, sample, before)
                continue
            marks = show.marks(before, sample['trace'].cpu(), model.mask_token_id)
            sample['marks'] = marks[:len(sample['tokens'])]
    if s.score or s.task == 'score':
        judge_samples(model, meta, can, samples)

    scorer = load_task(meta['name'])
    for i, sample in enumerate(samples[:50]):
        print(show.report(sample, meta, scorer, texts and texts[i]))
    if len(samples) > 50:
        print(f'... and {len(samples) - 50} more' + ('' if s.save else ' (--save=FILE.jsonl keeps them all)'))
    if s.task == 'score' and len(samples) > 1:
        print(total(samples, meta))
    if written:
        fixed, rules, seconds = written
        nfe = sum(sample['nfe'] for sample in samples) / len(samples)
        print(f'{len(samples)} samples, {nfe:.1f} passes each (NFE), {len(samples) / seconds:.1f} samples/s')
        if s.animate or s.html:
            finds = judge or (model if can.detects else None)
            verdict = scorer and scorer.verdict
            show.watch(finds, meta, fixed, samples, verdict, s.task, f'{rules}; {nfe:.0f} passes a sample',
                       s.animate, s.html, writer=model if judge else None)
    if s.save:
        lines = [{key: value for key, value in sample.items() if key != 'trace'} for sample in samples]
        write_atomically(s.save, ''.join(to_json(line, ensure_ascii=False) + '\n' for line in lines))
        print(f'written to {s.save}')
    if hasattr(s, 'left_out'):
        print(s.left_out)
