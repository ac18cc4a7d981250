"""
Does the program still do what it did? Runs small commands and compares losses and samples to the last digit.

    python tests/same.py --root=OLD --write=before.json       record what the old tree does
    python tests/same.py --root=NEW --against=before.json     compare; exits with 1 if anything differs

--root: the tree to run, by default the one of this file. --only=TEXT: the cases with this text in their name.
--jobs=2: cases at a time. --text=FILE: a copy of tiny Shakespeare, without which cases on text are left out.
Only the same machine and the same torch give the same digits. torch is imported once and every command is a
fork of this process, because importing takes longer than most commands.
"""

import os

os.environ['OMP_NUM_THREADS'] = '1'   # before torch is imported
# ruff: noqa: E402 (so the imports come after it)

import argparse
import glob
import hashlib
import json
import multiprocessing
import re
import runpy
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
import torch._dynamo  # noqa: F401, what the optimisers import: once, not in every command

# every setting whose default may change, and what makes a run small
BASE = dict(
    training_type='joint', causal_ratio=0.0, remask_ratio=0.5, full_ratio=0.0, corruption='own',
    remask_target='wrong', views=0,
    remasking_loss_type='all_positions', mask_weighting='row', proofreading_warmup_iters=4,
    masking_warmup_iters=8,
    reward_correct_unmask=1.0, prefix_ratio=0.0, n_layer=2, n_head=2, n_embd=32, n_recur=1, draft_head=False,
    parts='',
    dropout=0.0, max_iters=16, eval_interval=8, eval_rows=40, eval_samples=4, log_interval=3, batch_size=16,
    block_size=64, gradient_accumulation_steps=1, dataset='arithmetic', optimizer='muon', lr_schedule='wsd',
    warmup_iters=4, learning_rate=3e-3, muon_lr=0.02, weight_decay=0.0, grad_clip=1.0, ema_decay=0.99,
    seed=1337,
    decay_share=0.4, sigma_min=0.1, sigma_max=0.9,
    noise_mix='mask:0.5,replace:0.2,swap:0.15,delete:0.075,insert:0.075')
GIVEN = dict(train=BASE, sample=dict(num_samples=6, steps=12),
             energy=dict(max_iters=10, own_samples=32, eval_rows=40, batch_size=24, log_interval=5),
             distill=dict(max_iters=8, batch_size=12, teacher_steps=4, log_interval=4))
# the parts of the network: their name in --parts, and their setting in a tree that has no setting parts yet
PARTS = dict(short_conv='short_conv', shortcuts='shortcuts', bigrams='bigram_rows', level='time_dim',
             previous='self_condition', graph='graph_window', mu='mu_blocks')
# of a clock, or newer than old trees
NOT_COMPARED = ('seconds', 'speed', 'calibration', 'calibration_full')
ALL_PARTS = 'short_conv:2,shortcuts,bigrams:512,level:32,previous,graph:8,mu:4'

JOINT = 'train --causal_ratio=0.5 --remask_target=original --draft_head=True --n_recur=2'
UNMASK = 'train --training_type=unmasking'
ABSTAIN = f'{UNMASK} --allow_abstain=True --target_mask_prob=0.3'
JUDGE = '--training_type=remasking --corruption=random'
UNIVERSAL = ('train --views=2 --causal_ratio=1.0 --remask_ratio=0.8 --corruption=own:0.4,noise:0.6 '
             '--sigma_max=0.6 --remask_target=original --draft_head=True')
TEXT = 'train --dataset=shakespeare_char --sample_prompt=ROMEO: --mask_weighting=token'
HOLES = [f'--task=infill --text="{text}" --num_samples=4' for text in ('(+_2)=_', '(1+_)=3', '(+12)=_')]
LINES = ['--task=repair --file={dir}/lines.txt --num_samples=2 --steps=None',
         '--task=score --file={dir}/lines.txt']
REPAIR = '--task=repair --text="(+12))=3"'

# A case: commands in a folder of its own. One without a script in front is of sample.py, from the newest
# checkpoint in the subfolder a. 'train' trains into a, 'train:b' into b, energy into energy;
# {b} is the newest in b.
CASES = {
    'commit': [JOINT, *(f'--remask=none {way}' for way in (
        *(f'--commit={rule}' for rule in ('random', 'left', 'confidence', 'margin', 'entropy', 'threshold',
            'priority')),
        '--commit=confidence --choice_temperature=1', '--commit=threshold --commit_threshold=0.2',
        '--ar_prefix=5', '--commit=priority --priority=12+', '--top_p=0.8', '--schedule=cosine',
        '--schedule=linear --temperature=0.7 --top_k=5', '--temperature=0', '--length=20',
        '--prompt="(1+2" --seed=5', '--batch_size=4 --steps=None'))],
    'remask': [JOINT, *(f'--remask={way}' for way in (
        'none', 'random', 'wrong', 'confidence', 'remdm', 'p2', 'causal', 'remdm --remdm=rescale',
        'remdm --remdm=cap --remask_rate=0.6', 'p2 --remask_rate=2', 'wrong --remask_random_ratio=0.3',
        'wrong --remask_patience=1', 'wrong --remask_threshold=0.9', 'wrong --remask_schedule=0.3,0.05',
        'wrong --correct_share=0.5', 'random --remask_rate=0.1',
        'wrong --commit=confidence --schedule=cosine', 'confidence --correct_share=0', 'wrong --rewrite=True',
        'causal --prompt="(1+" --top_p=0.9')), '--length=20'],
    'presets': [f'{JOINT} --seed=3', *(f'--preset={name}' for name in (
        'ancestral', 'maskgit', 'threshold', 'remdm', 'p2', 'intelligent', 'hybrid', 'speculative',
        'universal --steps=None', 'maskgit --steps=7 --schedule=linear')), '--steps=None'],
    'tasks': [f'{JOINT} --seed=4', *HOLES, *LINES, '--task=infill --text="(1+__)=__" --hole=__',
              *(f'--task=edit --text="(+12)=3" --mask={mask}' for mask in ('2:4', '0:1,3:5')),
              f'{REPAIR} --remask_threshold=0.3', f'{REPAIR} --remask=random --remask_rate=0.2',
              '--score=True'],
    'energy': [JOINT, 'energy', *(f'--init_from={{energy}} --num_samples=4 {way}' for way in (
        '--best_of=3', '--guide=3', '--guide=2 --remask=wrong --commit=confidence', '--remask=critic',
        '--remask=critic --best_of=2 --remask_threshold=0.4', '--best_of=4 --temperature=0.8 --remask=none',
        f'{REPAIR} --remask=critic'))],
    'energy of one pass': [UNMASK, 'energy --passes=1', '--init_from={energy} --best_of=3',
                           '--init_from={energy} --guide=3'],
    'distill': [JOINT, 'distill', '--init_from={distill} --steps=4',
                '--init_from={distill} --preset=maskgit'],
    'distill ancestral': [UNMASK, 'distill --teacher_preset=ancestral', '--init_from={distill} --steps=4'],
    'two networks': [UNMASK, f'train:b {JUDGE}', '--remask_from={b}', '--merge_from={b} --merge_weight=0.3',
                     '--remask_from={b} --commit=confidence --remask_schedule=0.3,0.05',
                     REPAIR + ' --remask_from={b}', '--export={dir}/a.safetensors',
                     '--init_from={dir}/a.safetensors --score=True'],
    'resume and grow': [
        'train --causal_ratio=0.25', 'train --causal_ratio=0.25 --init_from=resume --max_iters=22',
        '--score=True', f'train:b --causal_ratio=0.25 --init_from={{a}} --parts={ALL_PARTS}',
        '--init_from={b}', 'train:c --causal_ratio=0.5 --draft_head=True --init_from={a}'],
    'unmasking': [UNMASK, '', '--score=True --preset=maskgit'],
    'remasking': [f'train {JUDGE}', '--task=score --text="(1+2)=3"'],
    'remasking wrong ones': [f'train {JUDGE} --remasking_loss_type=corrupted_only --remask_target=original'],
    'joint': ['train', '--score=True', *HOLES],
    'joint wrong ones': ['train --remasking_loss_type=corrupted_only --remask_target=original', '', *HOLES],
    'denoising': ['train --training_type=denoising --remask_target=original --causal_ratio=0.25', '', *HOLES,
                  *LINES],
    'causal': ['train --training_type=causal --n_recur=2', '--score=True',
               '--temperature=0.7 --top_k=4 --prompt="(1"'],
    'noise': ['train --corruption=noise --sigma_max=0.6 --remask_target=original', *LINES,
              f'{REPAIR} --rewrite=False', '--remask=random --rewrite=True --steps=9'],
    'blocks': [f'{JOINT} --block_lengths=4,8', '--score=True', *(
        f'--steps=None --block_length={way}' for way in (
            '4', '8 --commit=random --remask=none', '4 --remask=wrong --revise=True --steps=40'))],
    'universal': [UNIVERSAL, '--score=True', *LINES, '--preset=universal --steps=None'],
    'prefix': ['train --prefix_ratio=0.5 --causal_ratio=0.25', '--preset=hybrid'],
    'abstain': [ABSTAIN, '--commit=abstain', '--commit=abstain --remask=random --score=True',
                f'{ABSTAIN} --init_from=resume --max_iters=22', '--commit=abstain'],
    'parts': [f'{JOINT} --parts={ALL_PARTS}', '', '--remask=wrong', '--remask=none --commit=confidence',
              '--ar_prefix=6'],
    'text': [f'{TEXT} --causal_ratio=0.25 --draft_head=True --corruption=own:0.7,random:0.3', '--score=True',
             '--remask=wrong', '--remask=p2', '--remask=confidence --prompt=ROMEO:', '--length=30',
             '--commit=entropy', *(f'--task=infill --text="To be, {hole}"'
                 for hole in ('__ not', '_')),
             '--task=repair --text="To bq, or not"', '--task=edit --text="To be, or not" --mask=3:5'],
    'text parts': [f'{TEXT} --block_size=48 --training_type=unmasking --bigram_decay=0.07 '
                   '--parts=level:32,short_conv:2,shortcuts,bigrams:512', '--score=True'],
    'text causal': [f'{TEXT} --training_type=causal', '--score=True'],
    **{name: [f'train {settings}', '--score=True'] for name, settings in {
        'causal drafting': '--training_type=causal --draft_head=True',
        'random': '--corruption=random --remask_ratio=0.75',
        'fragment': '--corruption=fragment --remask_target=original', 'sticky': '--corruption=sticky',
        'mixture': '--corruption=own:0.3,random:0.2,fragment:0.2,sticky:0.1,noise:0.2 --batch_size=20',
        'token': '--mask_weighting=token --causal_ratio=0.25 --n_recur=2',
        'reward': '--reward_correct_unmask=0.5',
        'weights': '--weight_unmask_task=0.8 --weight_remask_task=0.5 --penalty_mask_correct=0.6',
        'abstain at a price': '--allow_abstain=True --penalty_keep_mask=0.2 --mask_logit_bias=-1',
        'accumulation': '--gradient_accumulation_steps=2 --causal_ratio=0.25', 'credit': '--k1_credit=True',
        'adamw': '--optimizer=adamw --lr_schedule=cosine --weight_decay=0.1 --learning_rate=1e-3 '
                 '--grad_clip=0.5',
        'dropout': '--dropout=0.2 --causal_ratio=0.25 --weight_decay=0.01',
        'no average': '--ema_decay=0 --grad_clip=0 --decay_share=1',
        'coarse': '--coarse=0123456789 --keep_every=4',
        'bigrams decaying': '--parts=bigrams:512 --bigram_decay=0.1',
        **{f'part {part}': f'--causal_ratio=0.25 --parts={part}' for part in ALL_PARTS.split(',')}}.items()}}


RENAMED = {'parts.graph.off_graph_penalty': 'aloof', 'parts.shortcuts.weight': 'shortcuts',
           'parts.short_conv.weight': 'conv.weight', 'parts.previous.proj.weight': 'previous.weight',
           'parts.mu.': 'mixer.', 'parts.bigrams.': 'bigrams.', 'parts.level.mlp.': 'level.'}


def rename(name):
    """What a parameter was called when its network had a field for every part."""
    for new, old in RENAMED.items():
        name = name.replace(new, old)
    return name


def newest(folder):
    """The newest checkpoint in a folder, '' if there is none."""
    return max(written(folder), key=os.path.getmtime, default='')


def written(folder):
    """The checkpoints of a command, which tools of a newer tree write into a folder of their own."""
    return sorted(glob.glob(os.path.join(folder, '**', 'ckpt_*.pt'), recursive=True))


def read(command, root, folder):
    """A command of a case: (the script, its words, the subfolder that it writes checkpoints to or None)."""
    first, *given = shlex.split('sample ' + command if command[:2] in ('', '--') else command)
    kind, _, goal = first.partition(':')
    for name in os.listdir(folder):
        given = [word.replace('{%s}' % name, newest(os.path.join(folder, name))) for word in given]
    given = [word.replace('{dir}', folder) for word in given]
    goal = os.path.join(folder, goal or ('a' if kind == 'train' else kind))
    usual = dict(GIVEN[kind], device='cpu', dtype='float32',
                 init_from='scratch' if kind == 'train' else newest(os.path.join(folder, 'a')))
    usual.update(dict(save=os.path.join(folder, 'samples.jsonl')) if kind == 'sample' else dict(out_dir=goal))
    asked = {word[2:].split('=')[0] for word in given}
    words = [f'--{name}={value}' for name, value in usual.items() if name not in asked] + given
    scripts = [os.path.join(root, *place, f'{kind}.py') for place in (['tools'], [])]
    return next(filter(os.path.exists, scripts)), translated(words, root), None if kind == 'sample' else goal


def translated(words, root):
    """
    The words as this tree wants them: without a full_ratio of 0 where there is none yet, and the parts by the
    settings that were there before, if there is no setting parts.
    """
    with open(os.path.join(root, 'train.py'), encoding='utf-8') as file:
        known = {line.split(' = ')[0] for line in file}
    if 'full_ratio' not in known:
        words = [word for word in words if word != '--full_ratio=0.0']
    if 'parts' in known:
        return words
    parts = [part.partition(':') for word in words if word.startswith('--parts=')
             for part in word[8:].split(',')]
    return [word for word in words if not word.startswith('--parts=')] + [
        f'--{PARTS[name]}={value or True}' for name, _, value in parts if name]


def work(script, words, root, output):
    """What the process of a command does."""
    with open(output, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    sys.argv, sys.path[0] = [script, *words], os.path.dirname(script)
    sys.modules['matplotlib'] = None  # no curves: drawing them takes longer than training
    runpy.run_path(script, run_name='__main__')


def run(script, words, root, output):
    """Runs a script in a process of its own, its output into a file. Raises RuntimeError if it fails."""
    process = multiprocessing.get_context('fork').Process(target=work, args=(script, words, root, output))
    process.start()
    process.join()
    if process.exitcode:
        with open(output, encoding='utf-8', errors='replace') as file:
            last = ' / '.join(file.read().splitlines()[-3:])
        raise RuntimeError(f'{last}\n    {shlex.join([script, *words])}')


def run_without_idle(script, words, root, output):
    """run, without the settings that a newer tree refuses because they have no say: older ones ignored it."""
    try:
        run(script, words, root, output)
    except RuntimeError as error:
        idle = re.search(r'(?:what has no say: )?([a-z_, ]+) (?:with|have no say)', str(error))
        if not idle:
            raise
        names = re.findall(r'[a-z_]+', idle[1])
        run(script, [word for word in words if word[2:].split('=')[0] not in names], root, output)


def lines_of(path):
    """The objects in a file of JSON lines, without what a clock says; nothing if there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8') as file:
        return [{name: value for name, value in json.loads(line).items() if name not in NOT_COMPARED}
                for line in file]


def hashed(tensor):
    """A hash of the dtype, the shape and all the bits of a tensor."""
    head = f'{tensor.dtype} {tuple(tensor.shape)} '.encode()
    bits = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(head + bits).hexdigest()[:16]


def checkpoint_of(path):
    """What is compared of a checkpoint: results, controller, a hash of every tensor of 'model' and 'ema'."""
    found = torch.load(path, map_location='cpu', weights_only=True)
    weights = {part: {rename(name): hashed(tensor) for name, tensor in sorted((found.get(part)
        or {}).items())}
               for part in ('model', 'ema')}
    result = {name: value for name, value in (found.get('result') or {}).items() if name not in NOT_COMPARED}
    return dict(step=found['iter_num'], result=result, energy=(found.get('energy')
                or {}).get('result'), control=found.get('control'), **weights)


def run_case(commands, root, folder):
    """The record of a case: a dict for each of its commands."""
    os.makedirs(folder)
    with open(os.path.join(folder, 'lines.txt'), 'w', encoding='utf-8') as file:
        file.write('(1+2)=3\n(+12))=3\n(4*(2+3))=21\n(2+2=4\n')
    record, saved = [], os.path.join(folder, 'samples.jsonl')
    for command in commands:
        try:
            script, words, goal = read(command, root, folder)
            run_without_idle(script, words, root, os.path.join(folder, 'output.txt'))
            came = dict(samples=lines_of(saved), log=lines_of(os.path.join(goal or '-', 'log.jsonl')))
            came['checkpoints'] = [checkpoint_of(path) for path in written(goal or '-')]
        except Exception as error:
            came = dict(failed=f'{type(error).__name__}: {error}')
        record.append(dict(command=command, **came))
        if os.path.exists(saved):
            os.remove(saved)
    return json.loads(json.dumps(record))


def prepare(root, text, folder):
    """Makes the datasets where they are not there yet; a record for each, of its hashes."""
    records = {}
    for name, words in [('arithmetic', [])] + [('shakespeare_char', [f'--input={text}'])] * bool(text):
        place = os.path.join(root, 'data', name)
        if not os.path.exists(os.path.join(place, 'meta.json')):
            run(os.path.join(place, 'prepare.py'), words, root, os.path.join(folder, 'prepare.txt'))
        for split in ('train', 'val'):
            with open(os.path.join(place, f'{split}.bin'), 'rb') as file:
                found = hashlib.sha256(file.read()).hexdigest()
            records.setdefault(f'data of {name}', []).append({split: found})
    return records


def difference(before, now, where=''):
    """Where two records first differ, and how; '' if they are the same."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return '' if repr(before) == repr(now) else f'{where}: {before!r} before, {now!r} now'
    where += f"[{before['command']}]" if 'command' in before else ''
    if 'failed' in now:
        return f"{where} {now['failed']}"
    for name in before:                                             # a newer tree may measure more
        if name not in now:
            return f'{where}/{name} is no longer there'
        found = difference(before[name], now[name], f'{where}/{name}')
        if found:
            return found
    return ''


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', type=os.path.abspath,
                        default=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parser.add_argument('--only', default='')
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--text', type=os.path.abspath)
    parser.add_argument('--write')
    parser.add_argument('--against')
    given, began, records, bad = parser.parse_args(), time.time(), {}, 0
    if bool(given.write) == bool(given.against):
        parser.error('give either --write=FILE or --against=FILE')
    with open(given.against or os.devnull, encoding='utf-8') as file:
        before = json.load(file) if given.against else {}
    cases = {name: commands for name, commands in CASES.items()
             if given.only in name and (given.text or not name.startswith('text'))}
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(given.root, given.text, folder)         # first, so that no two cases do it
        with ProcessPoolExecutor(given.jobs, multiprocessing.get_context('fork')) as pool:
            running = {pool.submit(run_case, commands, given.root, os.path.join(folder, f'case{i}')): name
                       for i, (name, commands) in enumerate(cases.items())}
            running.update({pool.submit(list, record): name for name, record in data.items()})
            for future in as_completed(running):
                name = running[future]
                records[name] = record = future.result()
                found = difference(before.get(name, 'nothing') if given.against else record, record)
                bad += bool(found)
                print(f"{name}: {f'DIFFERS {found}' if found else 'same' if given.against else 'recorded'}",
                      flush=True)
    if given.write:
        with open(given.write, 'w', encoding='utf-8') as file:
            json.dump(records, file, indent=0)
    print(f'{len(records)} cases, {bad} bad, {time.time() - began:.0f} s')
    return int(bad > 0)


if __name__ == '__main__':
    sys.exit(main())
