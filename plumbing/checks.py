"""
What is checked before a run touches anything: settings that make no sense, do not go together or do not fit the data.
"""

from plumbing import distributed
from plumbing.text import encode
from configurator import UserError
from corruption import KINDS, NOISE, parse_mixture


def check_settings(config):
    """Raises UserError for settings that make no sense or do not go together."""
    for name, known in (('training_type', ('unmasking', 'remasking', 'joint', 'denoising', 'causal')),
                        ('remasking_loss_type', ('all_positions', 'corrupted_only')),
                        ('remask_target', ('wrong', 'original')), ('optimizer', ('muon', 'adamw')),
                        ('lr_schedule', ('wsd', 'cosine')), ('mask_weighting', ('row', 'token'))):
        if config[name] not in known:
            raise UserError(f"{name} expects one of {', '.join(known)}; got '{config[name]}'")
    for name in ('batch_size', 'block_size', 'max_iters', 'eval_interval', 'eval_rows', 'log_interval',
                 'gradient_accumulation_steps', 'max_bad_steps'):
        if config[name] < 1:
            raise UserError(f'{name} must be at least 1, got {config[name]}')
    if config['batch_size'] % distributed.world():
        raise UserError(f"batch_size={config['batch_size']} rows cannot be shared equally by {distributed.world()} processes: "
                        f'set --batch_size to a multiple of {distributed.world()}')
    for name in ('causal_ratio', 'remask_ratio', 'reward_correct_unmask', 'decay_share', 'ema_decay', 'sigma_min',
                 'sigma_max', 'high_noise_bias', 'target_mask_prob', 'prefix_ratio'):
        if not 0 <= config[name] <= 1:
            raise UserError(f'{name} must be in 0..1, got {config[name]}')
    for name in ('learning_rate', 'muon_lr', 'weight_decay', 'bigram_decay', 'grad_clip', 'warmup_iters',
                 'proofreading_warmup_iters', 'masking_warmup_iters', 'weight_unmask_task', 'weight_remask_task',
                 'penalty_mask_correct', 'eval_samples', 'keep_every', 'seed', 'views', 'mask_control_rate', 'mask_bias_limit'):
        if config[name] < 0:
            raise UserError(f'{name} must not be negative, got {config[name]}')
    if config['seed'] >= 2 ** 62:                                              # of which every process takes one a little higher
        raise UserError(f"seed must be in 0..2^62 - 1, got {config['seed']}")
    for name in ('beta1', 'beta2'):
        if not 0 <= config[name] < 1:
            raise UserError(f'{name} must be in [0, 1), got {config[name]}')
    kind, kinds = config['training_type'], dict(parse_mixture('corruption', config['corruption'], KINDS))
    parse_mixture('noise_mix', config['noise_mix'], NOISE)
    if kind == 'remasking' and 'own' in kinds and not config['guess_from']:
        raise UserError('a remasking model cannot unmask, so it has no guesses of its own: name the unmasking checkpoint '
                        'whose guesses it shall judge as --guess_from=PATH, or use --corruption=random or --training_type=joint')
    if config['guess_from'] and ('own' not in kinds or kind not in ('joint', 'remasking')):
        raise UserError('guess_from makes the wrong tokens of --corruption=own, with training_type joint or remasking')
    if kind == 'denoising' and config['remask_target'] != 'original':
        raise UserError('a denoiser learns the clean token everywhere: set --remask_target=original')
    if config['sigma_min'] > config['sigma_max']:
        raise UserError(f"sigma_min={config['sigma_min']} is above sigma_max={config['sigma_max']}")
    if config['penalty_keep_mask'] and not 1e-5 <= config['penalty_keep_mask'] <= 1 - 1e-5:
        raise UserError(f"penalty_keep_mask must be 0, or in 0.00001..0.99999, got {config['penalty_keep_mask']}")
    if config['target_mask_prob'] and not config['allow_abstain']:
        raise UserError('target_mask_prob steers how often the network abstains: set --allow_abstain=True')
    rows, causal = config['batch_size'], round(config['batch_size'] * config['causal_ratio'])
    if kind != 'causal' and causal == rows and not config['views']:
        raise UserError(f'every row trains the causal mode and none {kind}: lower --causal_ratio, or set --views=1 or '
                        f'--training_type=causal')
    if config['causal_ratio'] and not causal:
        raise UserError(f"causal_ratio={config['causal_ratio']} of batch_size={rows} is no row: raise one of them")
    others = 0 if config['views'] else rows - causal
    if config['fsdp'] and not distributed.several():
        raise UserError('fsdp shares the network among processes: start them by torchrun --nproc_per_node=2 train.py ...')
    if config['fsdp'] and kind != 'causal' and any(0 < some < distributed.world() for some in (causal, others)):
        raise UserError(f'with fsdp each of {distributed.world()} processes needs causal rows and others, there are {causal} and '
                        f'{others} of them: raise --batch_size')
    for name in ('noise_condition', 'time_dim', 'self_condition'):
        if config[name] and kind in ('remasking', 'causal'):
            raise UserError(f'{name} is about masked positions, training_type={kind} has none')
    if config['draft_head'] and kind != 'causal' and not config['causal_ratio']:
        raise UserError('draft_head drafts for the causal mode, which this run does not train: set --causal_ratio=0.5')
    if config['allow_abstain'] and kind in ('remasking', 'causal'):
        raise UserError(f'allow_abstain is about masked positions, training_type={kind} has none')
    if config['bigram_decay'] and not config['bigram_rows']:
        raise UserError('bigram_decay is of the tables of pairs, and there are none: set --bigram_rows=8192')
    if config['mask_logit_bias'] and not config['allow_abstain']:
        raise UserError('mask_logit_bias is for an answer [MASK]: set --allow_abstain=True')
    if abs(config['mask_logit_bias']) > config['mask_bias_limit']:
        raise UserError(f"mask_logit_bias={config['mask_logit_bias']} is beyond mask_bias_limit={config['mask_bias_limit']}")


def check_fits(config, meta):
    """Raises UserError if the settings do not fit the dataset."""
    if meta['format'] == 'rows' and config['block_size'] != meta['block_size']:
        raise UserError(f"the rows of {meta['name']} have {meta['block_size']} tokens: set --block_size={meta['block_size']}")
    if meta['format'] == 'stream' and config['block_size'] >= min(meta['train_tokens'], meta['val_tokens']):
        raise UserError(f"block_size={config['block_size']} is longer than a split of {meta['name']} "
                        f"({meta['val_tokens']} tokens)")
    try:                                                                       # without a prompt no tokenizer is needed yet
        given = len(encode(meta, config['sample_prompt'])) if config['sample_prompt'] else 0
    except UserError as error:
        raise UserError(f'sample_prompt: {error}') from None
    if given and given + sum(meta[name] is not None for name in ('bos', 'eos')) >= config['block_size']:
        raise UserError(f"sample_prompt has {given} tokens, which leaves nothing to write of block_size={config['block_size']}: "
                        f'shorten it')
