"""
What sample.py does before and after it samples: networks, canvases, and what is shown. s is always its
settings.
"""

import os
import shlex

import torch

from configurator import UserError
from plumbing import show
from plumbing.checkpoint import best_of, check_same_model, find_checkpoint, identity, load_merged
from plumbing.device import configure_compute, freeze
from plumbing.files import check_output, to_json, write_atomically
from plumbing.score import given_sample, judge_samples
from plumbing.text import encode, load_task, read_lines, start_canvas, task_canvas


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


def given_texts(s):
    """The texts that --text or --file give."""
    return read_lines(s.file) if s.file else [s.text]


def canvases(s, model, meta):
    """What is to be written: (texts or None, canvas (B, T), fixed (B, T)), num_samples rows for each text."""
    if s.task == 'generate':
        num = s.num_samples or 10
        lengths = None if s.length is None else torch.full((num,), s.length)
        return None, *start_canvas(model, meta, num, encode(meta, s.prompt), lengths)
    texts = given_texts(s)
    pairs = [task_canvas(s.task, model, meta, line, s.hole, s.mask) for line in texts]
    if len({canvas.size(1) for canvas, _ in pairs}) > 1:
        raise UserError(f"{meta['name']} has no end token, so texts of different lengths cannot share a "
                        'canvas: give texts of one length, or one at a time')
    each = s.num_samples or 1
    canvas, fixed = (torch.cat(rows).repeat_interleave(each, 0) for rows in zip(*pairs))
    return [line for line in texts for _ in range(each)], canvas, fixed


def given_samples(s, model, meta):
    """The given texts as samples, to be scored."""
    return [given_sample(model, meta, line) for line in given_texts(s)]


def show_samples(s, model, judge, meta, can, samples, texts=None, canvas=None, *written):
    """
    Prints the samples, plays them, writes the page and the file: whatever was asked for.

    can: the checkpoint's parts.presets.Abilities; texts: what was given, None: nothing; canvas (B, T): where
    sampling started; written: what is fixed (B, T), the rules in words and the seconds it took, if it wrote.
    """
    if s.task == 'repair':
        for sample, before in zip(samples, canvas):
            marks = show.marks(before, sample['trace'].cpu(), model.mask_token_id)
            sample['marks'] = marks[:len(sample['tokens'])]
    if s.score or s.task == 'score':
        width = model.config.block_size if canvas is None else canvas.size(1)
        judge_samples(model, meta, can, samples, width)

    scorer = load_task(meta['name'])
    verdict = scorer and scorer.verdict
    for i, sample in enumerate(samples[:50]):
        print(show.report(sample, meta, verdict, texts and texts[i]))
    if len(samples) > 50:
        print(f'... and {len(samples) - 50} more' + ('' if s.save else ' (--save=FILE.jsonl keeps them all)'))
    if written:
        fixed, rules, seconds = written
        nfe = sum(sample['nfe'] for sample in samples) / len(samples)
        print(f'{len(samples)} samples, {nfe:.1f} passes each (NFE), {len(samples) / seconds:.1f} samples/s')
        if s.animate or s.html:
            finds = judge or (model if can.detects else None)
            show.watch(finds, meta, fixed, samples, verdict, s.task, f'{rules}; {nfe:.0f} passes a sample',
                       s.animate, s.html, writer=model if judge else None)
    if s.save:
        lines = [{key: value for key, value in sample.items() if key != 'trace'} for sample in samples]
        write_atomically(s.save, ''.join(to_json(line, ensure_ascii=False) + '\n' for line in lines))
        print(f'written to {s.save}')
