"""
What is checked before a run touches anything: settings that make no sense, do not go together or do not fit
the data.
"""

import math

from configurator import UserError
from plumbing import distributed
from plumbing.text import encode

CHOICES = dict(training_type=('unmasking', 'remasking', 'joint', 'denoising', 'causal'),
               remasking_loss_type=('all_positions', 'corrupted_only'),
               remask_target=('wrong', 'original', 'edits'),
               optimizer=('muon', 'adamw'), lr_schedule=('wsd', 'cosine'), mask_weighting=('row', 'token'))
# what a number must be -> (the test, the settings)
RANGES = {
    'must be at least 1': (lambda x: x >= 1, (
        'batch_size', 'block_size', 'max_iters', 'eval_interval', 'eval_rows', 'log_interval',
        'gradient_accumulation_steps', 'max_bad_steps', 'teacher_steps')),
    'must be in 0..1': (lambda x: 0 <= x <= 1, (
        'causal_ratio', 'remask_ratio', 'full_ratio', 'reward_correct_unmask', 'decay_share', 'ema_decay',
        'sigma_min', 'sigma_max', 'target_mask_prob', 'prefix_ratio')),
    'must not be negative': (lambda x: x >= 0, (
        'learning_rate', 'muon_lr', 'weight_decay', 'bigram_decay', 'grad_clip', 'warmup_iters', 'seed',
        'views', 'proofreading_warmup_iters', 'masking_warmup_iters', 'block_warmup_iters',
        'weight_unmask_task', 'keep_every', 'weight_remask_task', 'penalty_mask_correct', 'eval_samples',
        'mask_control_rate', 'mask_bias_limit')),
    'must be below 2^31': (lambda x: x < 2**31, ('batch_size', 'views', 'eval_rows', 'eval_samples')),
    'must be in 0..2^62 - 1': (lambda x: x < 2 ** 62, ('seed',)),    # every process adds a little
    'must be in [0, 1)': (lambda x: 0 <= x < 1, ('beta1', 'beta2')),
    'must be 0, or in 0.00001..0.99999': (lambda x: not x or 1e-5 <= x <= 1 - 1e-5, ('penalty_keep_mask',))}


def check_settings(config):
    """Raises UserError for settings that make no sense or do not go together."""
    for name, known in CHOICES.items():
        if config[name] not in known:
            raise UserError(f"{name} expects one of {', '.join(known)}; got '{config[name]}'")
    check_ranges(config)
    for wrong, message in (*conflicts_of_rows(config), *conflicts_of_tasks(config)):
        if wrong:
            raise UserError(message)


def check_ranges(config):
    """Raises UserError for a number that is out of its range; config may lack some of them."""
    for what, (fits, names) in RANGES.items():
        for name in names:
            if name in config and not fits(config[name]):
                raise UserError(f'{name} {what}, got {config[name]}')


def conflicts_of_rows(config):
    """[(whether it is so, what to do then)], of settings that say which rows are trained on what."""
    kind, rows, world = config['training_type'], config['batch_size'], distributed.world()
    causal = round(rows * config['causal_ratio'])
    others = 0 if config['views'] else rows - causal
    too_few = kind != 'causal' and any(0 < some < world for some in (causal, others))
    return [
        (rows % world, f'batch_size={rows} rows cannot be shared equally by {world} processes: '
                       f'set --batch_size to a multiple of {world}'),
        (kind != 'causal' and causal == rows and not config['views'],
         f'every row trains the causal mode and none {kind}: lower --causal_ratio, or set --views=1 or '
         '--training_type=causal'),
        (config['causal_ratio'] and not causal,
         f"causal_ratio={config['causal_ratio']} of batch_size={rows} is no row: raise one of them"),
        (config['fsdp'] and not distributed.several(),
         'fsdp shares the network among processes: start them by torchrun --nproc_per_node=2 train.py ...'),
        (config['fsdp'] and too_few,
         f'with fsdp each of {world} processes needs causal rows and others, there are {causal} and {others} '
         'of them: raise --batch_size')]


def conflicts_of_tasks(config):
    """[(whether it is so, what to do then)], of settings of one task or one part of the network."""
    kind, bias, limit = config['training_type'], config['mask_logit_bias'], config['mask_bias_limit']
    no_masks = kind in ('remasking', 'causal')
    return [
        (kind == 'denoising' and config['remask_target'] == 'wrong',
         'a denoiser learns the clean token everywhere: set --remask_target=original'),
        (config['sigma_min'] > config['sigma_max'],
         f"sigma_min={config['sigma_min']} is above sigma_max={config['sigma_max']}"),
        (config['target_mask_prob'] and not config['allow_abstain'],
         'target_mask_prob steers how often the network abstains: set --allow_abstain=True'),
        *[(config[name] and no_masks, f'{name} is about masked positions, training_type={kind} has none')
          for name in ('allow_abstain',)],
        *[(part in config['parts'] and no_masks,
           f'the part {part} is about masked positions, training_type={kind} has none')
          for part in ('level', 'previous')],
        (config['draft_head'] and kind != 'causal' and not config['causal_ratio'],
         'draft_head drafts for the causal mode, which this run does not train: set --causal_ratio=0.5'),
        (config['block_lengths'] and (kind == 'causal' or no_masks or not config['causal_ratio']),
         'block_lengths trains blocks beside what the causal mode has read: it needs causal rows and masks, '
         'set --causal_ratio=0.3 and --training_type=joint'),
        (config['block_lengths'] and 'graph' in config['parts'],
         'the part graph compares whole rows, and has no blocks: leave out block_lengths, or graph'),
        (config['block_lengths'] and 'places' in config['parts'],
         'the part places says where in its row a token stands, which a block does not know: leave out '
         'block_lengths, or places'),
        *[(config['block_warmup_iters'] and wrong, f'block_warmup_iters {why}') for wrong, why in (
            (not config['block_lengths'], 'grows blocks, and there are none: set --block_lengths=4,8,16,32'),
            (config['views'], 'makes rows whole canvases bit by bit, with views all of them are from the '
                              'first step: set --views=0'),
            (config['fsdp'], 'begins with fewer whole canvases than there are processes, and with fsdp each '
                             'needs one: leave out --fsdp'))],
        (any(type(length) is not int or length < 1 for length in config['block_lengths']),
         f"block_lengths expects whole numbers of at least 1, got {config['block_lengths']}"),
        (config['bigram_decay'] and 'bigrams' not in config['parts'],
         'bigram_decay is of the tables of pairs, and there are none: set --parts=bigrams:8192'),
        (bias and not config['allow_abstain'],
         'mask_logit_bias is for an answer [MASK]: set --allow_abstain=True'),
        (abs(bias) > limit, f'mask_logit_bias={bias} is beyond mask_bias_limit={limit}')]


def idle(config, defaults):
    """Lines that name the settings which are not at their defaults, and have no say beside the others."""
    kind = config['training_type']
    mixed = {part.partition(':')[0].strip() for part in config['corruption'].split(',')}
    wrong = ('remask_target corruption remask_ratio full_ratio remasking_loss_type weight_remask_task '
             'penalty_mask_correct proofreading_warmup_iters masking_warmup_iters')
    hidden = 'weight_unmask_task mask_weighting reward_correct_unmask'
    no_say = []
    for holds, names, why in (
            (kind in ('unmasking', 'causal'), wrong, f'training_type={kind} has no wrong tokens'),
            (kind in ('remasking', 'causal'), hidden, f'training_type={kind} has no masks'),
            (kind == 'remasking', 'remask_ratio full_ratio proofreading_warmup_iters',
             'all rows of training_type=remasking have wrong tokens'),
            (kind == 'causal', 'views prefix_ratio', 'all rows are causal'),
            (kind == 'denoising' or mixed == {'noise'}, 'full_ratio',
             'mixed noise says how many masks are left'),
            (kind == 'denoising', 'corruption', 'training_type=denoising has mixed noise, see noise_mix'),
            (kind != 'denoising' and not ('noise' in mixed and kind in ('joint', 'remasking')),
             'sigma_min sigma_max noise_mix', 'nothing is corrupted by noise'),
            (config['remasking_loss_type'] == 'corrupted_only', 'penalty_mask_correct masking_warmup_iters',
             'remasking_loss_type=corrupted_only never looks at clean tokens'),
            (not config['allow_abstain'], 'penalty_keep_mask', 'allow_abstain is off'),
            (not config['target_mask_prob'], 'mask_control_rate', 'target_mask_prob is 0'),
            (not config['target_mask_prob'] and not config['mask_logit_bias'], 'mask_bias_limit',
             'there is no mask_logit_bias'),
            (config['init_from'] != 'scratch', 'mask_logit_bias', 'it is that of the checkpoint'),
            (config['init_from'] == 'resume' and config['target_mask_prob'], 'penalty_keep_mask',
             'it goes on from that of the checkpoint'),
            (config['optimizer'] == 'adamw', 'muon_lr', 'optimizer=adamw'),
            (config['lr_schedule'] == 'cosine', 'decay_share', 'lr_schedule=cosine'),
            (not config['wandb_log'], 'wandb_project wandb_run_name', 'wandb_log is off')):
        found = [name for name in names.split() if holds and config[name] != defaults[name]]
        if found:
            no_say.append(f"{', '.join(found)}: no say, since {why}")
    return no_say


def check_fits(config, meta):
    """Raises UserError if the settings do not fit the dataset."""
    name, size = meta['name'], config['block_size']
    if meta['format'] == 'rows' and size != meta['block_size']:
        raise UserError(f"the rows of {name} have {meta['block_size']} tokens: "
                        f"set --block_size={meta['block_size']}")
    if meta['format'] == 'stream' and size >= min(meta['train_tokens'], meta['val_tokens']):
        raise UserError(f"block_size={size} is longer than a split of {name} ({meta['val_tokens']} tokens)")
    if meta.get('given') and config['remask_target'] == 'edits':
        raise UserError(f'what is given in {name} has its place, which edits would move: '
                        'set --remask_target=original')
    try:                                                            # no tokenizer is needed without a prompt
        given = len(encode(meta, config['sample_prompt'])) if config['sample_prompt'] else 0
    except UserError as error:
        raise UserError(f'sample_prompt: {error}') from None
    if given and 'given' in meta:
        raise UserError(f'{name} starts from what is given: it takes no sample_prompt')
    if given and given + sum(meta[name] is not None for name in ('bos', 'eos')) >= size:
        raise UserError(f'sample_prompt has {given} tokens, which leaves nothing to write of '
                        f'block_size={size}: shorten it')


def parse_mixture(name, text, known):
    """'own' or 'own:0.7,random:0.3' -> (('own', 0.7), ('random', 0.3)). Raises UserError."""
    try:
        parts = [part.partition(':') for part in text.split(',')]
        mixture = tuple((kind.strip(), float(share or 1)) for kind, _, share in parts)
    except ValueError:
        raise UserError(f"{name} expects a kind, or kind:share,kind:share; got '{text}'") from None
    for kind, share in mixture:
        if kind not in known or not 0 <= share < math.inf or not sum(share for _, share in mixture):
            raise UserError(f"{name} knows {', '.join(known)}, with shares >= 0; got '{text}'")
    return mixture


def check_sizes(config):
    """Raises UserError if a network of this model.GPTConfig cannot be built."""
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_recur'):
        if getattr(config, name) < 1:
            raise UserError(f'{name} must be at least 1, got {getattr(config, name)}')
    for name, most in dict(block_size=2**17, n_layer=2**12, n_recur=2**10, energy_head=2).items():
        if getattr(config, name) > most:
            raise UserError(f'{name} must be at most {most}, got {getattr(config, name)}')
    if config.n_embd % (2 * config.n_head):
        raise UserError(f'n_embd must be a multiple of 2 * n_head (rotary positions pair the channels), '
                        f'got n_embd={config.n_embd}, n_head={config.n_head}')
    if not 0 <= config.dropout < 1:
        raise UserError(f'dropout must be in [0, 1), got {config.dropout}')
