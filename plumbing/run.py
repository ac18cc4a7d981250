"""
A training run: what it holds from step to step, its folder, what it says on screen. What is trained is handed
in.
"""

import contextlib
import copy
import glob
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import fields

import torch

from configurator import UserError
from data.loader import load_data
from plumbing import distributed
from plumbing.checkpoint import (best_of, check_overwrite, checkpoint_name, find_checkpoint, load_start,
                                 make_checkpoint, model_args, random_states_of_ranks, restore,
                                 save_checkpoint)
from plumbing.checks import check_fits
from plumbing.device import configure_compute
from plumbing.files import append_line, check_output, copy_file, lock, make_folder, sweep, to_json
from plumbing.log import draw_curves, start_log
from plumbing.optim import make_optimizers
from plumbing.pieces import added
from plumbing.text import check_task, decode
from plumbing.vocabulary import by_character, other_characters


# what ends a run: Ctrl-C, kill, a closed terminal, and what Slurm sends before the time is up
SIGNALS = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGXCPU')


class Run:
    """
    First start and open, then halts, save, count and record in the steps, and finish at the end.

    It holds model and ema (the averaged weights), optimizers, config, meta; step; rows_rng and noise_rng,
    which rows and how they are corrupted; sums, the parts of the loss since the last line of the log;
    control, see parts/abstain.py; skipped, how many steps were not finite.
    """

    def __init__(self, config, idle=()):
        """idle: lines that say which settings have no say."""
        self.config, self.folder, self.source = config, config['out_dir'], config['init_from']
        self.idle = idle
        names = config['training_type'], config['remasking_loss_type']
        self.newest = os.path.join(self.folder, checkpoint_name(*names))
        self.log_path = os.path.join(self.folder, 'log.jsonl')
        self.step, self.sums, self.skipped = 0, {}, dict(steps=0, in_a_row=0)
        self.replaced, self.wandb, self.plotted, self.asked, self.best = '', None, False, False, None
        self.writes = distributed.rank() == 0
        if self.writes:
            self.replaced = check_overwrite(self.newest, config)
            if not config['eval_only']:
                lock(self.folder)

    # -------------------------------------------------------------------------
    # the start

    def start(self, meta, model, choices, path, checkpoint):
        """
        Makes all that is needed beside the model, or takes it from a checkpoint if the run is resumed.

        choices: what it computes on, a line; path, checkpoint: where the weights come from ('', {}: nowhere).
        """
        config, world = self.config, distributed.world()
        self.model, self.meta, self.device = model, meta, next(model.parameters()).device
        self.ema = model
        if config['ema_decay']:                                     # with fsdp never whole on the device
            self.ema = copy.deepcopy(model.cpu() if config['fsdp'] else model)
        if config['fsdp']:
            distributed.shard(model, self.device)
            distributed.shard(self.ema, self.device)
        self.optimizers = make_optimizers(
            model, config['optimizer'], config['learning_rate'], config['muon_lr'], config['weight_decay'],
            (config['beta1'], config['beta2']), config['bigram_decay'])
        self.rows_rng = torch.Generator().manual_seed(config['seed'])
        self.noise_rng = torch.Generator(self.device).manual_seed(config['seed'] + 1)
        changed, seconds, other = '', 0.0, ''
        if self.source == 'resume':
            other = other_settings(config, checkpoint['config'])
            changed, seconds = self.resume(path, checkpoint), checkpoint.get('seconds', 0.0)
        else:
            if self.source == 'scratch':
                for network in (model, self.ema):
                    network.mask_logit_bias.fill_(config['mask_logit_bias'])
            bias = model.mask_logit_bias.item()
            self.control = dict(p_mask=None, bias=bias, price=config['penalty_keep_mask'])
        if changed or (distributed.rank() and self.source != 'resume'):    # every rank draws something else
            seed = config['seed'] + self.step + 10_000 * distributed.rank()
            torch.manual_seed(seed)
            self.noise_rng.manual_seed(seed + 1)
        self.first = self.step
        self.began = time.perf_counter() - seconds                          # evaluations and saves taken out

        print(*self.idle, choices + (f', {world} processes' if world > 1 else ''), sep='\n')
        print(f"{model.num_params():,} parameters; {config['training_type']} on {config['dataset']}: "
              f"{meta['train_tokens']:,} training tokens, vocabulary {meta['vocab_size']} + [MASK] + [WRONG]")
        if path:
            new = f"; new: {checkpoint['new']}" if checkpoint['new'] else ''
            print(f'starting from {path}, step {self.step}{new}')
        if other:
            print(f'settings that are not those of the checkpoint: {other}')
        if changed:
            print(f'{changed}; the run goes on, but no longer to the last bit the same')
        if self.replaced:
            print(self.replaced)

    def resume(self, path, checkpoint):
        """Goes on where a checkpoint stands; returns what has changed and makes the random numbers new."""
        rank, world = distributed.rank(), distributed.world()
        with distributed.together():
            ranks = random_states_of_ranks(checkpoint)
            checkpoint['rng'] = ranks[rank if len(ranks) == world else 0]
            restore(self, path, checkpoint)
        began = checkpoint['config'].get('init_from', 'scratch')
        self.config['init_from'] = 'scratch' if began == 'resume' else began    # what an older version says
        if not self.config['target_mask_prob']:                     # else it is up to the controller
            self.control['price'] = self.config['penalty_keep_mask']
        where = checkpoint['rng'].get('where', self.device.type)
        if len(ranks) != world:
            return f'number of processes: {len(ranks)} before, {world} now'
        if where != self.device.type:
            return f'device: {where} before, {self.device.type} now'
        return ''

    def open(self):
        """Opens the folder and the log, on the rank that writes."""
        make_folder(self.folder)
        if not self.config['eval_only']:
            lock(self.folder)
            check_output(self.newest, text=False)
            name = os.path.basename(self.newest)
            sweep(self.folder, name, name.replace('.pt', '_*.pt'), 'log.jsonl', 'curves.png')
            start_log(self.log_path, self.first)
            if self.config['wandb_log']:
                self.wandb = start_wandb(self.config)

    # -------------------------------------------------------------------------
    # every step

    def steps(self):
        """The numbers of the steps, each also being self.step; the last one is only there to be looked at."""
        last = self.config['max_iters']
        if self.config['eval_only']:
            last = max(last, self.first)
        self.stop_on_signal()
        self.marks = [(self.first, time.perf_counter())]
        for self.step in range(self.first, last + 1):
            yield self.step

    def stop_on_signal(self):
        """After one of SIGNALS the step is finished and saved; a second Ctrl-C stops at once."""
        self.signalled = False

        def ask(signum, frame):
            self.signalled = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.suppress(RuntimeError):                 # it came in the midst of another line
                print('finishing the step, then saving ...', flush=True)

        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:    # as nohup has it
                signal.signal(number, ask)

    def halts(self):
        """Whether an evaluation (self.due), a checkpoint or the end (self.stopping) comes first."""
        config, step = self.config, self.step
        self.asked = distributed.anywhere(self.signalled)
        self.paused = time.perf_counter()
        self.stopping = step == config['max_iters'] or self.asked
        regular = step % config['eval_interval'] == 0 and (step > self.first or not self.first)
        self.due = config['eval_only'] or step == config['max_iters'] or regular
        self.numbered = bool(config['keep_every']) and step % config['keep_every'] == 0 and step > self.first
        return self.due or self.numbered or self.stopping

    def save(self, result):
        """Saves what is due; result: what the evaluation found. Ends the pause that halts began."""
        if self.due:
            self.write({'step': self.step, **result})
        if self.step > self.first:
            if self.writes and (self.due or self.stopping):
                self.attempt(self.keep_best, result)
            state = dict(make_checkpoint(self, result), seconds=self.paused - self.began)
            with distributed.together():
                if self.writes and (self.due or self.stopping):
                    self.attempt(save_checkpoint, self.newest, state, last=self.stopping)
                    curves = os.path.join(self.folder, 'curves.png')
                    self.plotted = self.attempt(draw_curves, self.log_path, curves)
                if self.writes and self.numbered:
                    path = f'{self.newest[:-3]}_{self.step}.pt'
                    self.attempt(save_checkpoint, path, dict(state, result={}))
        pause = time.perf_counter() - self.paused
        self.began += pause                                         # speed is the speed of training
        self.marks = [(step, when + pause) for step, when in self.marks]

    def keep_best(self, result):
        """Before a worse checkpoint replaces the one of the lowest validation loss, that becomes _best.pt."""
        value = result.get('nelbo', result.get('causal_nll', math.inf))
        best, path = self.best, best_of(self.newest)
        if best is None or value <= best['value']:
            self.best = dict(value=value, step=self.step, last=True)
            if os.path.exists(path):
                os.remove(path)
        elif best['last'] and os.path.exists(self.newest):
            copy_file(self.newest, path)
            best['last'] = False
        if self.step - self.best['step'] >= 5 * self.config['eval_interval']:
            print(f"validation was best at step {self.best['step']}, {self.best['value']:.3f}: {path}")

    def count(self, parts):
        """Whether a step is finite and to be taken; adds up the parts of its loss, or the steps skipped."""
        good = is_finite(self.model, parts)
        self.skipped = dict(steps=self.skipped['steps'] + (not good),
                            in_a_row=0 if good else self.skipped['in_a_row'] + 1)
        if good:
            self.sums = added(self.sums, parts)
        elif self.skipped['in_a_row'] == self.config['max_bad_steps']:
            self.check_finite()
        return good

    def check_finite(self):
        """Raises UserError if a weight is not finite, or the last max_bad_steps steps were not."""
        finite = all(torch.isfinite(p).all() for p in distributed.local(self.model.parameters()))
        in_a_row, what = self.skipped['in_a_row'], ''
        if in_a_row >= self.config['max_bad_steps']:
            what = f'loss or the gradient of {in_a_row} steps in a row'
        elif distributed.anywhere(not finite):
            what = 'network'
        if what:
            raise UserError(f'the {what} is no longer finite at step {self.step}: lower --learning_rate or '
                            f'--muon_lr, or set --dtype=float32; {self.last_good()}')

    def record(self, learning_rate, **more):
        """What is logged of the steps since the last record: a dict. Sets self.speed."""
        done = self.step + 1
        self.marks = self.marks[-20:] + [(done, time.perf_counter())]
        (first, start), (last, end) = self.marks[0], self.marks[-1]
        self.speed = (last - first) / max(1e-9, end - start)
        record = {'step': done}
        for name, part in self.sums.items():
            total, weight = part.tolist()
            if weight > 0:
                record[name] = total / weight
        self.sums = {}
        record['learning_rate'] = learning_rate
        if self.skipped['steps']:
            record['skipped'] = self.skipped['steps']
        return {**record, **more}

    # -------------------------------------------------------------------------
    # files

    def last_good(self):
        """Which checkpoint there still is, for someone who just lost a newer one."""
        if os.path.exists(self.newest):
            return f'the last good checkpoint is {self.newest}'
        return 'there is no checkpoint yet'

    def attempt(self, action, *args, last=False):
        """What an action on files returns. A full disk costs a line on screen, and only when last the run."""
        try:
            return action(*args)
        except (OSError, UserError) as error:
            if last:
                raise UserError(f'{error}; {self.last_good()}') from error
            print(f'{error}; the run goes on, {self.last_good()}', flush=True)

    def write(self, record):
        """Adds a record to the log."""
        if self.writes:
            self.attempt(append_line, self.log_path, to_json(record))
        if self.wandb:
            self.wandb.log(record)

    def finish(self, val):
        """Says what is left of the run and how to go on; val (N, T): held-out rows."""
        if self.asked and self.step < self.config['max_iters']:
            command = f'python train.py {shlex.join(sys.argv[1:])}'
            if distributed.world() > 1:
                command = 'the same torchrun command and'
            print(f'stopped; go on with: {command} --init_from=resume')
        else:
            curves = ', curves.png' if self.plotted else ' (pip install matplotlib for curves.png)'
            print(f'losses and validation: {self.log_path}{curves}')
            name = shlex.quote('ckpt' if self.folder == 'out' else self.newest)
            then = f'sample from it: python sample.py --init_from={name}'
            if self.config['training_type'] == 'remasking':
                name = shlex.quote(self.newest)
                ids = val[0] if self.meta['eos'] is not None else val[0, :24]
                text = shlex.quote(decode(self.meta, ids.tolist())[0].replace('\n', '\\n'))
                then = (f'it judges what another one writes, with --remask_from={name}, and texts: '
                        f'python sample.py --task=score --init_from={name} --text={text}')
            print(f'saved {self.newest}; {then}')
            if self.best and not self.best['last']:
                print(f"the lowest validation loss was at step {self.best['step']}: {best_of(self.newest)}")


def load_rows(config):
    """The dataset of a run: its meta.json and rows. The first process of a machine makes it if need be."""
    for turn in (True, False):
        with distributed.together():
            if distributed.first_here() == turn:
                meta, data = load_data(config['dataset'], config['coarse'])
                check_fits(config, meta)
                check_task(meta, data)
    return meta, data


def load_network(network, sizes, config, meta, place, newest):
    """
    A network on its device: (model, on what it computes, the path of its weights or '', that checkpoint).

    network, sizes: the classes GPT and GPTConfig; place: the device; newest: the checkpoint to resume from.
    """
    torch.manual_seed(config['seed'])
    chosen = {field.name: config[field.name] for field in fields(sizes) if field.name in config}
    path, checkpoint = '', {}
    with distributed.together():
        model = network(sizes(vocab_size=meta['vocab_size'], **chosen))
        if config['init_from'] != 'scratch':
            path = newest
            if config['init_from'] == 'resume':
                check_there(path)
            else:
                path = find_checkpoint(config['init_from'], config['out_dir'])
            weights, checkpoint = load_start(network.load, path, config, model_args(model.config), meta)
            own = model.state_dict()
            if other_characters(checkpoint['meta'], meta):
                weights = by_character(weights, checkpoint['meta'], meta, own)
            model.load_state_dict({**own, **weights})               # what it did not have yet stays
            new = {name.removeprefix('parts.').split('.')[0] for name in own if name not in weights}
            checkpoint['new'] = ', '.join(sorted(new)).replace('drafter', 'draft_head')
        how = config['dtype'], config['attention'], config['compile']
        model, choices = configure_compute(model, place, *how)
    return model, choices, path, checkpoint


def check_there(path):
    """Raises UserError if there is no checkpoint to resume from; says which others there are."""
    if not os.path.exists(path):
        others = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(path) or '.'), 'ckpt_*.pt')))
        hint = 'start the run without --init_from=resume'
        if others:
            hint = (f'but there is {others[0]}: give its --training_type to resume it, or start from its '
                    f'weights with --init_from={shlex.quote(others[0])}')
        raise UserError(f'{path}: there is no checkpoint to resume from; {hint}')


def other_settings(config, before):
    """The settings of a run that resumes which are not those of its checkpoint, a line."""
    free = ['init_from', 'out_dir', 'overwrite', 'eval_only', 'device', 'compile', 'log_interval',
            'mask_logit_bias'] + ['penalty_keep_mask'] * bool(config['target_mask_prob'])    # see checks.idle
    return ', '.join(f'{name} {before[name]!r} -> {config[name]!r}' for name in config
                     if name in before and name not in free and before[name] != config[name])


def is_finite(model, parts):
    """Whether the gradients of a step and its losses are all finite; waits once for the device."""
    total = distributed.grad_norm(model.parameters())
    return torch.cat((total[None], *parts.values())).isfinite().all().item()


def to_device(x, device):
    """x on the device; on a GPU the program does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else x.to(device)


def start_wandb(config):
    """A run of Weights & Biases. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError('wandb_log needs Weights & Biases: pip install wandb') from None
    name = f"{config['wandb_run_name']}_{config['training_type']}"
    return wandb.init(project=config['wandb_project'], name=name, config=config)
