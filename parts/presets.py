"""Named samplers, and which rules a checkpoint gets by what it was trained for."""

import difflib
from typing import NamedTuple

from configurator import UserError
from plumbing.checkpoint import import_safetensors
from plumbing.files import check_output
from plumbing.show import import_rich


class Abilities(NamedTuple):
    """What a checkpoint was trained for."""
    writes: bool     # fills masks
    causal: bool     # has the causal mode
    detects: bool    # finds wrong tokens


def supports(config):
    """The Abilities of a checkpoint, by the training settings that it keeps."""
    kind = config['training_type']
    return Abilities(writes=kind in ('unmasking', 'joint', 'denoising'),
                     causal=kind == 'causal' or config['causal_ratio'] > 0,
                     detects=kind in ('joint', 'remasking', 'denoising'))


SUREST = dict(commit='confidence', choice_temperature=0.0, remask='none')     # Nie et al. 2025 (LLaDA)

PRESETS = dict(
    ancestral=dict(commit='random', remask='none'),
    maskgit=dict(commit='confidence', schedule='cosine', remask='none'),       # Chang et al. 2022
    threshold=dict(commit='threshold', remask='none'),                         # Wu et al. 2025 (Fast-dLLM)
    remdm=dict(commit='random', remask='remdm'),                               # Wang et al. 2025
    p2=dict(commit='random', remask='p2'),                                     # Peng et al. 2025
    intelligent=dict(commit='random', schedule='cosine', remask='wrong'),
    # all at once, then a share is taken back and written anew, less each time, the most doubted first
    redraft=dict(commit='random', remask='wrong', remask_schedule=(1.0, 0.0), correct_share=1.0),
    surest=SUREST,
    # the surest token first; what is doubted in the end is written again by redraft until it is believed
    solve=dict(SUREST, redrafts=16),
    # written from left to right, then read once more: what is doubted is taken back and written anew
    proofread=dict(draft=True, commit='threshold', remask='wrong', remask_threshold=0.8),
    # written so, then a share is taken back and written anew, 40 times: sharper text
    polish=dict(draft=True, commit='random', remask='wrong', remask_schedule=(0.1, 0.0), steps=40),
    hybrid=dict(ar_prefix=16, commit='random', schedule='cosine', remask='wrong'),
    speculative=dict(remask='causal'),                                         # Leviathan et al. 2023
    universal=dict(ar_prefix=3, commit='confidence', schedule='cosine', steps=20, remask='none'),
)

# repair changes as little as it can: what is doubted more than that, each place once, the surest token first
TASKS = dict(generate={}, infill={}, edit={}, score={},
             repair=dict(commit='threshold', remask='wrong', remask_threshold=0.8, temperature=0.0))

# without padding all tokens are text, and the first and the last of a line are hard to tell: be surer there
SURE = dict(TASKS['repair'], remask_threshold=0.95)

# a network that has seen noise mends a text in one pass: it writes every token that it would rather see there
REWRITE = dict(commit='random', remask='wrong', remask_threshold=0.5, rewrite=True, steps=1, temperature=0.0)

# one that was trained on edits changes the length as well, until the text stays as it is
EDITS = dict(rounds=4, remask='wrong', remask_threshold=0.9, commit='confidence', choice_temperature=0.0,
             temperature=0.0)
# with a causal mode, which says which edit is best, many more are tried
VERIFIED = dict(EDITS, verify=96)

# in blocks from left to right: by measurement the best order there, see docs/log.md
BLOCKS = dict(commit='left', remask='none')

GROW = dict(rounds=8, remask='wrong', remask_threshold=0.5, commit='random')


def refuse(*conflicts):
    """Raises UserError for the first of several (whether it is wrong, message)."""
    for wrong, message in conflicts:
        if wrong:
            raise UserError(message)


def nearest(name, known):
    """'did you mean NAME?', or '' if no known name is like that one."""
    return ''.join(f'did you mean {near}?' for near in difflib.get_close_matches(name, known, 1))


def choose_rules(config, *, preset=None, task='generate', inside=False, judge=False,
                 any_length=False, stream=False, **chosen):
    """
    The rules for a checkpoint: what was chosen (not None), else the preset's, the task's, or the best it can.

    config: the training settings of the checkpoint; inside: whether a hole has text right of it; judge:
    whether a second checkpoint finds the wrong tokens; any_length: whether a hole may get any number of
    tokens; stream: whether its texts have no end; chosen: fields of sample.How. Raises UserError for what
    does not fit.
    """
    check_preset(preset)
    chosen = {name: value for name, value in chosen.items() if value is not None}
    usual = SURE if task == 'repair' and stream else TASKS[task]
    kind = config['training_type']
    saw_noise = kind == 'denoising' or (kind == 'joint' and 'noise' in config['corruption'])
    edits = saw_noise and config.get('remask_target') == 'edits'
    free = preset is None and not judge and not {'commit', 'remask', 'guide'} & set(chosen)
    if task == 'repair' and saw_noise and free and chosen.get('rewrite', True):
        usual = EDITS if edits else REWRITE
    if usual is EDITS and supports(config).causal:
        usual = VERIFIED
    if any_length and task == 'infill':
        usual = GROW
    corrects = any(name.startswith(('remask', 'draft', 'revise')) for name, value in chosen.items() if value)
    if free and not usual and 'block_length' in chosen and not corrects:
        usual = BLOCKS
    rules = {**usual, **PRESETS.get(preset, {}), **chosen}
    if 'remask_schedule' in chosen and 'remask_threshold' not in chosen:
        rules.pop('remask_threshold', None)

    remask, rate = rules.get('remask'), rules.get('remask_rate', 0)
    refuse(
        *conflicts_from_the_left(config, task, rules),
        (not edits and ('rounds' in rules or usual is GROW),
         'only a checkpoint trained on edits changes the length of a text: train with --remask_target=edits '
         '--corruption=own:0.5,noise:0.5'),
        ('rounds' in chosen and rules.get('verify'), 'rounds has no say beside verify, which goes on until '
         'no edit is better: leave it out, or give --verify=0 as well'),
        ('rounds' in rules and 'best_of' in rules, 'rounds edit one text, best_of chooses among several: '
         'give one of them'),
        ('rounds' in rules and remask != 'wrong',
         f'rounds of edits go by what the network calls wrong: use --remask=wrong, not {remask}'),
        (task == 'repair' and remask not in ('wrong', 'random', 'critic'),
         f'repair finds what to change by re-masking: use --remask=wrong, random or critic, not {remask}'),
        *[(name in rules and not config.get('energy_head'), NO_HEAD.format(name))
          for name in ('guide', 'best_of')],
        ('redrafts' in rules and not (judge or supports(config).detects),
         'redrafts needs a checkpoint that doubts: train with training_type joint, or give a remasking one '
         'as --remask_from=PATH'),
        (rate > 1 and remask != 'p2',
         f"remask_rate is a probability, in 0..1 (only p2's is not), got {rate}"))
    # causal sampling has no steps, no blocks, and nothing to correct
    inside = inside or any(rules.get(name) for name in ('guide', 'block_length', 'draft'))
    named = {name: rules.get(name) for name in ('commit', 'remask', 'ar_prefix', 'remask_full')}
    return {**rules, **best_rules(config, inside, judge=judge, **named)}


def conflicts_from_the_left(config, task, rules):
    """[(whether it is wrong, message)] of rules that write from the left or ask the causal mode."""
    remask = rules.get('remask')
    return [
        *[(rules.get(name) and not supports(config).causal,
           f'{name} needs a trained causal mode: train with --causal_ratio=0.33')
          for name in ('draft', 'verify')],
        *[(task == 'repair' and rules.get(name),
           f'{name} writes what is missing from left to right, and in a repair nothing is: leave it out')
          for name in ('block_length', 'draft', 'ar_prefix')],
        *[(remask in ('confidence', 'surprise') and rules.get(name),
           f'remask={remask} asks how likely a token was when the loop drew it, and with {name} some are '
           'drawn before: use --remask=wrong') for name in ('draft', 'ar_prefix')],
        (rules.get('block_length', 0) > config['block_size'],
         f"block_length={rules.get('block_length')} is more than block_size={config['block_size']}"),
        ('block_length' in rules and not config.get('block_lengths'),
         'this checkpoint was not trained to write in blocks: train with --block_lengths=4,8,16,32')]


def best_rules(config, lengths_given=False, commit=None, remask=None, ar_prefix=None, remask_full=None,
               judge=False):
    """
    The rules that were not chosen, by what the checkpoint was trained for: dict(commit, remask, ar_prefix),
    and remask_full where wrong tokens never stood beside masks in training.

    Raises UserError if a chosen rule needs something that the checkpoint was not trained for.
    """
    if judge and remask not in (None, 'wrong'):
        raise UserError(f'--remask_from judges tokens for --remask=wrong, not for --remask={remask}')
    if judge:
        remask = 'wrong'
    check_trained(config, lengths_given, commit, remask, ar_prefix, judge)

    only_causal = config['training_type'] == 'causal'
    can = supports(config)
    if remask is None:
        other_rules = only_causal or lengths_given or commit is not None or ar_prefix
        # whoever saw wrong tokens only calls every token wrong
        doubts = can.detects and config['remasking_loss_type'] == 'all_positions'
        remask = 'causal' if can.causal and not other_rules else 'wrong' if doubts else 'none'
    if ar_prefix is None:
        ar_prefix = config['block_size'] if only_causal else 0
    rules = dict(commit=commit or 'random', remask=remask, ar_prefix=ar_prefix)
    apart = config['training_type'] == 'joint' and config.get('full_ratio') == 1 and not judge
    if remask_full is None and apart and remask == 'wrong':
        rules['remask_full'] = True
    return rules


NO_HEAD = ('{} needs a checkpoint with an energy head: give this one a head with '
           'python tools/energy.py --init_from=CHECKPOINT and sample from what that writes')


def check_trained(config, lengths_given, commit, remask, ar_prefix, judge):
    """Raises UserError if a rule needs something that the checkpoint was not trained for, see best_rules."""
    can, kind = supports(config), config['training_type']
    leaves_off = ar_prefix is not None and ar_prefix < config['block_size']
    hint = ', or give a remasking one as --remask_from=PATH' if remask == 'wrong' else ''
    refuse(
        (kind == 'causal' and (commit or remask not in (None, 'none')),
         'this causal checkpoint cannot fill a hole: it samples left to right '
         '(no --commit, --remask, --remask_from)'),
        (kind == 'causal' and (lengths_given or leaves_off),
         'this causal checkpoint writes from left to right to the end: it can neither fill a hole with text '
         'right of it, nor be given a length, nor leave anything to other rules (no --ar_prefix)'),
        (kind == 'remasking',
         'this is a remasking checkpoint: it judges tokens but cannot write; '
         'give it as --remask_from, and an unmasking or joint one as --init_from'),
        (not can.causal and (remask in ('causal', 'surprise') or ar_prefix),
         'this checkpoint has no trained causal mode: train with --causal_ratio=0.33, '
         'or sample with --ar_prefix=0 and --remask=none, random or wrong'),
        (commit == 'abstain' and not config.get('allow_abstain'),
         'commit=abstain needs a checkpoint trained with --allow_abstain=True'),
        (remask == 'critic' and not config.get('energy_head'), NO_HEAD.format('remask=critic')),
        (remask in ('wrong', 'p2') and not (can.detects or judge),
         f'this checkpoint was not trained to find wrong tokens: train with training_type joint{hint}'))


# -----------------------------------------------------------------------------
# what is checked before anything is loaded, and before the loop begins

# the lowest and highest number (None: no limit) of settings of sample.py
RANGES = {(1, None): 'num_samples batch_size steps rounds length top_k block_length redrafts guide best_of',
          (0, None): 'temperature ar_prefix choice_temperature remask_rate remask_patience remask_threshold '
                     'commit_threshold verify',
          (0, 1): 'top_p remask_random_ratio correct_share merge_weight'}


def check_chosen(settings):
    """Raises UserError for a number that is out of its range, or a rule that makes no sense by itself."""
    for (low, high), names in RANGES.items():
        wanted = f'at least {low}' if high is None else f'in {low}..{high}'
        for name in names.split():
            value = settings.get(name)
            if value is not None and (value < low or (high is not None and value > high)):
                raise UserError(f'{name} must be {wanted}, got {value}')
    seed, shares = settings.get('seed', 0), settings.get('remask_schedule')
    refuse(
        (not 0 <= seed < 2 ** 63, f'seed must be in 0..2^63 - 1, got {seed}'),
        (settings.get('top_p') == 0, 'top_p=0 leaves no token to draw'),
        (settings.get('commit_threshold') == 0, 'commit_threshold must be above 0'),
        (shares is not None and (len(shares) != 2 or not all(type(share) in (int, float) and 0 <= share <= 1
                                                             for share in shares)),
         f'remask_schedule expects two shares in 0..1, for example 0.3,0.05; got {shares}'),
        (shares is not None and settings.get('remask_threshold') is not None,
         'remask_schedule and remask_threshold both say how much is re-masked: give one of them'))


def check_sampling(settings, how, commits, remasks):
    """Raises UserError for settings of sample.py that make no sense: its own, and those of its How."""
    settings = {**vars(settings), **vars(how)}
    check_chosen(settings)
    check_names(settings, commits, remasks)
    chosen = [name for name, value in {**vars(how), 'preset': settings['preset'],
                                       'num_samples': settings['num_samples']}.items() if value is not None]
    export = settings['export']
    refuse(
        *conflicts_of_task(settings, chosen),
        (export and not export.endswith('.safetensors'),
         f"export expects the name of a .safetensors file, got '{export}'"))
    if export:
        import_safetensors()
    if settings['animate']:
        import_rich()
    outputs = [settings[name] for name in ('export', 'save', 'html')]
    for number, path in enumerate(outputs):
        check_output(path, settings['file'], *outputs[:number], text=number > 0)


def conflicts_of_task(settings, chosen):
    """
    [(whether it is wrong, message)], of a task of sample.py, and of settings that are for another one.
    chosen: what was chosen of the rules, the preset and num_samples, names.
    """
    task, text, file, mask = (settings[name] for name in ('task', 'text', 'file', 'mask'))
    hint = ', '.join(filter(None, (f"got '{task}'", nearest(task, TASKS))))
    generates = task == 'generate'
    both = ', not both' if file else ''
    whole = [f'--{name}' for name in ('animate', 'html', 'score', 'best_of') if settings[name]]
    whole += ['several presets'] * (',' in (settings['preset'] or ''))
    no_mask = '' if task == 'edit' else f'; {task} takes no mask'
    return [
        (task not in TASKS, f"task expects one of {', '.join(TASKS)}; {hint}"),
        (generates and (text is not None or file or mask),
         'text, file and mask are for --task=infill, repair, edit or score; generate takes --prompt'),
        (task == 'score' and settings['animate'],
         'score writes nothing, so there is nothing to watch: --animate is for the other tasks, and --html '
         'shows what is doubted'),
        (settings['stream'] and (not generates or whole),
         f'--stream prints texts that are generated, from left to right, and nothing beside them: not with '
         f"{' or '.join(whole) or f'--task={task}'}"),
        (not generates and (settings['prompt'] or settings['length']),
         f'prompt and length are for --task=generate; {task} takes --text or --file'),
        (not generates and settings['stop'], f'stop is for --task=generate, {task} ends where its text ends'),
        (not generates and (text is None) == (file is None),
         f'--task={task} needs a text: --text="..." or --file=FILE, one text a line{both}'),
        (task != 'edit' and mask is not None, f'--mask=3:5 says what --task=edit writes anew{no_mask}'),
        (task == 'edit' and mask is None and '[' not in (text or '['),
         '--task=edit needs to know what it writes anew: give --mask=WORD, or --mask=3:5 in tokens, or put '
         '[brackets] around it in the text'),
        (task == 'score' and chosen,
         f"{', '.join(chosen)} {have_no_say(chosen)}: --task=score writes nothing"),
        (settings['hole'] is not None and task != 'infill',
         f'hole has no say: it is for --task=infill, not {task}'),
        (settings['merge_weight'] != 0.5 and not settings['merge_from'],
         'merge_weight has no say: there is no --merge_from to merge with')]


def have_no_say(names):
    """The verb behind a list of names."""
    return 'have no say' if len(names) > 1 else 'has no say'


LOOP = ('steps commit schedule block_length choice_temperature commit_threshold priority remask_rate '
        'remask_random_ratio remask_patience remask_threshold remask_full remask_schedule rewrite remdm '
        'correct_share revise draft verify redrafts')
# of these, what rounds of edits do not ask
OF_TEXTS = ('block_length revise correct_share remask_full remask_patience remask_random_ratio remask_rate '
            'remask_schedule')


def idle(config, rules):
    """Which rules have no say beside the others, and why: a dict of names."""
    commit, remask = rules.get('commit'), rules.get('remask')
    drawn = dict.fromkeys(('top_k', 'top_p') if rules.get('temperature') == 0 else (), 'temperature=0')
    from_the_left = (rules.get('ar_prefix') or 0) >= config['block_size']
    if remask == 'causal' or from_the_left:
        why = 'remask=causal' if remask == 'causal' else 'a text that is written from left to right'
        return {**drawn, **dict.fromkeys(LOOP.split(), why)}
    shares = [name for name in ('remask_schedule', 'remask_threshold') if rules.get(name) is not None]
    share = shares[0] if shares else None
    at_random = share == 'remask_threshold' and (remask == 'random' or rules.get('remask_random_ratio'))
    found = [(f'commit={commit}', name) for name, wanted in dict(
        choice_temperature='confidence', commit_threshold='threshold', priority='priority').items()
        if commit in ('random', 'left', 'confidence', 'margin', 'entropy', 'threshold', 'priority', 'abstain')
        and commit != wanted]
    if rules.get('rounds'):
        found += [('rounds of edits', name) for name in OF_TEXTS.split()]
    else:
        found.append(('no rounds of edits', 'verify'))
    if not rules.get('block_length'):
        found.append(('no block_length', 'revise'))
    if remask != 'remdm':
        found.append((f'remask={remask}', 'remdm'))
    if remask == 'none':
        found.append(('remask=none', 'remask_rate'))
    if remask == 'random':
        found += [('remask=random', name) for name in ('remask_random_ratio', 'remask_patience')]
    if commit == 'threshold' and remask not in ('remdm', 'p2'):
        found += [('commit=threshold', name) for name in ('schedule', 'correct_share')]
    if rules.get('draft'):
        found.append(('draft', 'ar_prefix'))
        found += [('draft', name) for name in ('schedule', 'correct_share') if not rules.get('block_length')]
    if remask in ('none', 'remdm', 'p2'):
        names = 'remask_random_ratio remask_patience correct_share remask_full draft'
        found += [(f'remask={remask}', name) for name in names.split()]
    elif share:
        found += [(share, 'remask_patience')] + [(share, 'remask_rate')] * (not at_random)
    return {**drawn, **{name: why for why, name in found}}


def refuse_idle(config, chosen, rules):
    """
    The rules that have a say, of all that choose_rules found. Raises UserError for one that was chosen and
    has none.
    """
    names = idle(config, rules)
    wrong = [name for name in names if chosen.get(name) is not None]
    if wrong:
        reasons = ', '.join(f'{name} with {names[name]}' for name in wrong)
        hint = '' if 'remask=causal' not in reasons else ', or choose another rule, as --remask=none or wrong'
        raise UserError(f'what has no say: {reasons}; leave it out{hint}')
    return {name: value for name, value in rules.items() if name not in names}


def check_names(settings, commits, remasks):
    """Raises UserError for a rule or a preset that does not exist. None: it was not chosen."""
    known = dict(commit=[*commits], remask=['none', *remasks, 'causal'], remdm=['cap', 'rescale'],
                 schedule=['linear', 'cosine'])
    for name, names in known.items():
        if settings[name] not in (None, *names):
            raise UserError(f"{name} expects one of {', '.join(names)}; got '{settings[name]}'")
    for preset in (settings.get('preset') or '').split(','):
        check_preset(preset or None)


def check_preset(preset):
    """Raises UserError for a preset that does not exist; None is none."""
    if preset is not None and preset not in PRESETS:
        hint = nearest(preset, PRESETS) or 'there are ' + ', '.join(PRESETS)
        raise UserError(f"unknown preset '{preset}'; {hint}")


def check_rules(how, canvas, fixed, mask, judge, commits, remasks):
    """Raises UserError for rules of How that do not exist, or do not fit together or the canvas (B, T)."""
    check_names(vars(how), commits, remasks)
    masked = canvas == mask
    if how.remask == 'causal' or how.draft:
        check_suffix(masked)
    doubts_some = how.remask_threshold is not None or how.remask_schedule is not None
    rewrites = how.commit == 'random' and how.remask in ('random', 'wrong', 'confidence')
    refuse(
        ((masked & fixed).any(), 'a fixed position holds a mask: it would never be filled'),
        (how.guide and how.remask == 'causal',
         'guide chooses among whole completions, which causal sampling does not have: '
         'use --remask=none, wrong or critic'),
        (doubts_some and not how.corrects(),
         'remask_threshold and remask_schedule are for rules that doubt tokens, such as --remask=wrong, '
         f'not for {how.remask}'),
        (how.block_length and (how.remask in ('causal', 'critic') or how.guide or judge),
         'block_length goes with rules that look at a block alone: not with --remask=causal or critic, guide '
         'or a second network'),
        (how.rewrite and (not rewrites or judge or how.guide),
         'rewrite goes with --commit=random and --remask=wrong, random or confidence, '
         'without a second network or guide'),
        (how.rounds and (how.rewrite or judge or how.guide),
         'rounds of edits go without rewrite, a second network and guide'),
        (how.redrafts and (how.rounds or how.rewrite or how.block_length or how.draft),
         'redrafts go without rounds, rewrite, block_length and draft'))
    check_not_greedy(how, masked)


def check_suffix(masked):
    """Raises UserError if the masks (B, T) are not the suffix of each row, which causal sampling needs."""
    if (masked.cummax(1).values & ~masked).any():
        raise UserError('the causal pass cannot see what is right of a hole: with a fixed suffix or a given '
                        'length use --remask=wrong, random or none and --ar_prefix=0')


def check_not_greedy(how, masked):
    """Raises UserError if the surest token comes first and nothing is given: all samples would be one."""
    by_sureness = how.commit not in ('random', 'priority')
    greedy = how.temperature == 0 or how.top_k == 1
    if how.commit == 'confidence':  # whose order may have noise of its own
        greedy = greedy and how.choice_temperature == 0
    empty = masked.sum(1) >= masked.size(1) - 1  # nothing is given but the start symbol
    if by_sureness and greedy and empty.sum() > 1:
        noise = '--temperature=1' if how.temperature == 0 else 'a higher --top_k'
        noise += ' or --choice_temperature=4.5' * (how.commit == 'confidence')
        raise UserError(f'commit={how.commit} without noise writes one sample again and again from an empty '
                        f'canvas: use {noise}, or another commit rule')
