"""Which rules a checkpoint gets by what it was trained for, and which settings are refused."""

from types import SimpleNamespace

import pytest
import torch
from conftest import default_config, tiny_gpt
from oracles import Independent, Oracle, empty, random_law, traced, uniform

import sample
from configurator import UserError
from parts.presets import (
    EDITS,
    GROW,
    PRESETS,
    REWRITE,
    TASKS,
    best_rules,
    check_sampling,
    choose_rules,
    refuse_idle,
    supports,
)
from sample import COMMIT, DOUBT, OTHER_RULES, USUAL, How, generate_diffusion

REMASK = [*DOUBT, *OTHER_RULES]
ALL = dict(commit='random', remask='none', ar_prefix=64)  # what a causal checkpoint does

# -----------------------------------------------------------------------------
# the best rules


@pytest.mark.parametrize('kind, ratio, chosen, expected', [
    ('unmasking', 0.0, {}, {}),
    ('unmasking', 0.3, {}, dict(remask='causal')),
    ('unmasking', 0.3, dict(lengths_given=True), {}),
    ('unmasking', 0.3, dict(commit='confidence'), dict(commit='confidence')),
    ('unmasking', 0.3, dict(ar_prefix=8), dict(ar_prefix=8)),
    ('unmasking', 0.3, dict(remask='random'), dict(remask='random')),
    ('unmasking', 0.3, dict(judge=True), dict(remask='wrong')),
    ('joint', 0.0, {}, dict(remask='wrong')),
    ('joint', 0.3, {}, dict(remask='causal')),
    ('joint', 0.3, dict(lengths_given=True), dict(remask='wrong')),
    ('joint', 0.3, dict(ar_prefix=8), dict(remask='wrong', ar_prefix=8)),
    ('joint', 0.3, dict(remask='none'), {}),
    ('causal', 0.0, {}, ALL),
    ('causal', 0.0, dict(remask='none'), ALL),
    ('causal', 0.5, {}, ALL),
    ('causal', 0.0, dict(ar_prefix=64), ALL)])
def test_best_rules(kind, ratio, chosen, expected):
    plain = dict(commit='random', remask='none', ar_prefix=0)
    config = default_config(training_type=kind, causal_ratio=ratio)
    assert best_rules(config, **chosen) == {**plain, **expected}


def test_who_saw_wrong_tokens_in_full_texts_only_doubts_full_texts_only():
    config = default_config(training_type='joint', causal_ratio=0.5, full_ratio=1.0)
    assert choose_rules(config, remask='wrong')['remask_full'] is True
    assert choose_rules(config, preset='proofread')['remask_full'] is True
    assert choose_rules(config, task='repair')['remask_full'] is True
    assert choose_rules(config, remask='wrong', remask_full=False)['remask_full'] is False
    others = [dict(remask=remask) for remask in ('none', 'random', 'p2')]
    for other in (*others, dict(remask='wrong', judge=True), {}):
        assert 'remask_full' not in choose_rules(config, **other)
    assert 'remask_full' not in choose_rules(dict(config, full_ratio=0.5), remask='wrong')
    for remask in ('none', 'remdm', 'p2'):       # these two take back while masks are left, or nothing
        with pytest.raises(UserError, match=f'remask_full with remask={remask}'):
            refuse_idle(config, dict(remask_full=True), dict(remask=remask, remask_full=True))


def test_best_rules_of_other_checkpoints():
    """Whatever the target was, it tells right from wrong; if it saw wrong tokens only, it calls all wrong."""
    for kind, target in (('joint', 'original'), ('denoising', 'original'), ('joint', 'wrong')):
        config = default_config(training_type=kind, remask_target=target)
        assert best_rules(config) == dict(commit='random', remask='wrong', ar_prefix=0)
        config['remasking_loss_type'] = 'corrupted_only'
        assert best_rules(config)['remask'] == 'none'
        assert best_rules(config, remask='wrong')['remask'] == 'wrong'
        assert best_rules(config, judge=True)['remask'] == 'wrong'


@pytest.mark.parametrize('kind, writes, detects', [
    ('unmasking', True, False),
    ('joint', True, True),
    ('denoising', True, True),
    ('remasking', False, True),
    ('causal', False, False)])
def test_supports(kind, writes, detects):
    for ratio in (0.0, 0.3):
        for target in ('wrong', 'original'):
            can = supports(default_config(training_type=kind, causal_ratio=ratio, remask_target=target))
            assert (can.writes, can.detects) == (writes, detects)
            assert can.causal == (kind == 'causal' or ratio > 0)


def test_best_rules_of_a_checkpoint_that_abstains():
    for kind in ('unmasking', 'joint'):
        config = default_config(training_type=kind, allow_abstain=True)
        assert best_rules(config, commit='abstain')['commit'] == 'abstain'
        assert best_rules(config)['commit'] == 'random'
        older = {name: value for name, value in config.items() if name != 'allow_abstain'}
        for other in (dict(config, allow_abstain=False), older):
            with pytest.raises(UserError, match='commit=abstain needs a checkpoint .* --allow_abstain=True'):
                best_rules(other, commit='abstain')


@pytest.mark.parametrize('kind, ratio, chosen, message', [
    ('remasking', 0.0, {}, 'it judges tokens but cannot write'),
    ('remasking', 0.5, {}, 'it judges tokens but cannot write'),
    ('unmasking', 0.0, dict(remask='causal'), 'no trained causal mode'),
    ('joint', 0.0, dict(ar_prefix=4), 'no trained causal mode'),
    ('causal', 0.0, dict(commit='confidence'), 'samples left to right'),
    ('causal', 0.0, dict(remask='wrong'), 'samples left to right'),
    ('causal', 0.0, dict(remask='causal'), 'samples left to right'),
    ('causal', 0.0, dict(judge=True), 'samples left to right'),
    # the rest would be of a mode that it never learned
    ('causal', 0.0, dict(ar_prefix=5), 'from left to right to the end'),
    ('causal', 0.0, dict(lengths_given=True), 'nor be given a length'),
    ('unmasking', 0.0, dict(remask='wrong'), 'not trained to find wrong tokens'),
    ('joint', 0.0, dict(judge=True, remask='random'), 'not for --remask=random')])
def test_best_rules_refuses(kind, ratio, chosen, message):
    with pytest.raises(UserError, match=message):
        best_rules(default_config(training_type=kind, causal_ratio=ratio), **chosen)


# -----------------------------------------------------------------------------
# presets and tasks


def test_who_has_seen_noise_repairs_by_rewriting():
    for noisy in (default_config(training_type='denoising'),
                  default_config(training_type='joint', corruption='own:0.5,noise:0.5')):
        assert choose_rules(noisy, task='repair', inside=True) == {**REWRITE, 'ar_prefix': 0}
        assert choose_rules(noisy, task='repair', inside=True, temperature=0.7)['temperature'] == 0.7
        for more in (dict(rewrite=False), dict(remask='random'), dict(commit='confidence'),
                     dict(preset='intelligent')):
            assert choose_rules(noisy, task='repair', inside=True, **more)['remask_threshold'] == 0.8
    unmasking = default_config(training_type='unmasking', corruption='noise')
    assert 'rewrite' not in choose_rules(unmasking, inside=True)
    # with a judge it looks first
    judged = choose_rules(noisy, task='repair', inside=True, judge=True)
    assert judged == {**TASKS['repair'], 'ar_prefix': 0}


def test_what_was_chosen_wins_over_the_preset_and_that_over_the_task_and_that_over_the_best():
    joint = default_config(training_type='joint', causal_ratio=0.3)
    best = dict(commit='random', remask='causal', ar_prefix=0)
    assert choose_rules(joint) == best and choose_rules(joint, steps=5, schedule=None) == {**best, 'steps': 5}
    assert choose_rules(joint, inside=True)['remask'] == 'wrong'
    repair = choose_rules(joint, task='repair', inside=True)
    assert repair == {**TASKS['repair'], 'ar_prefix': 0} and repair['remask_threshold'] == 0.8
    both = choose_rules(joint, task='repair', preset='intelligent', remask='random', temperature=0.5,
                        remask_rate=None)
    assert (
        dict(commit='random', remask='random', temperature=0.5, remask_threshold=0.8).items() <= both.items())
    assert choose_rules(joint, task='repair', inside=True, stream=True)['remask_threshold'] == 0.95
    shares = choose_rules(joint, task='repair', remask_schedule=(0.3, 0.1))
    assert 'remask_threshold' not in shares and shares['remask_schedule'] == (0.3, 0.1)
    for name, rules in PRESETS.items():
        chosen = choose_rules(joint, preset=name)
        assert rules.items() <= chosen.items() and {'commit', 'remask', 'ar_prefix'} <= set(chosen)
    universal = choose_rules(joint, preset='universal', steps=3, ar_prefix=0)
    assert universal == {**PRESETS['universal'], 'steps': 3, 'ar_prefix': 0}
    assert choose_rules(joint, preset='ancestral', temperature=0.0)['temperature'] == 0
    plain = default_config(training_type='unmasking')
    assert choose_rules(plain, preset='maskgit', remask='random')['remask'] == 'random'
    assert choose_rules(plain, judge=True) == dict(commit='random', remask='wrong', ar_prefix=0)


@pytest.mark.parametrize('kind, how, message', [
    ('joint', dict(preset='remdn'), "unknown preset 'remdn'; did you mean remdm?"),
    ('joint', dict(preset='zzz'), "unknown preset 'zzz'; there are ancestral, maskgit, .*universal"),
    (
        'joint',
        dict(task='repair', remask='none'),
        'repair finds what to change by re-masking: use --remask=wrong, random or critic, not none',
    ),
    ('joint', dict(task='repair', preset='ancestral'), 'not none'),
    ('joint', dict(task='repair', remask='p2'), 'not p2'),
    ('joint', dict(task='repair', preset='remdm'), 'not remdm'),
    ('joint', dict(remask='wrong', remask_rate=1.5), 'remask_rate is a probability'),
    ('unmasking', dict(task='repair'), 'not trained to find wrong tokens'),
    ('unmasking', dict(preset='intelligent'), 'not trained to find wrong tokens'),
    ('unmasking', dict(preset='speculative'), 'causal mode'),
    ('unmasking', dict(preset='universal'), 'no trained causal mode'),
    ('unmasking', dict(draft=True, remask='random'), 'draft needs a trained causal mode'),
    ('causal', dict(draft=True), 'writes from left to right to the end'),
    ('causal', dict(task='repair'), 'samples left to right'),
    ('remasking', dict(task='infill'), 'it judges tokens but cannot write'),
    ('joint', dict(preset='remdm', judge=True), 'not for --remask=remdm')])
def test_rules_that_cannot_be_chosen(kind, how, message):
    with pytest.raises(UserError, match=message):
        choose_rules(default_config(training_type=kind), **how)


def test_every_preset_and_task_names_rules_that_there_are():
    """And what the loop is given by default are fields of How as well."""
    fields = set(vars(How()))
    assert set(USUAL) <= fields
    for rules in (*PRESETS.values(), *TASKS.values(), REWRITE, EDITS, GROW):
        assert set(rules) <= fields
        assert rules.get('commit', 'random') in COMMIT
        assert rules.get('remask', 'none') in ('none', 'causal', *DOUBT, *OTHER_RULES)


# -----------------------------------------------------------------------------
# settings of the command


def settings(**changes):
    """(the settings of sample.py, its How) with changes."""
    names = ('task', 'prompt', 'text', 'file', 'mask', 'num_samples', 'seed', 'score', 'animate', 'stream',
             'html', 'save', 'export', 'merge_weight', 'length', 'batch_size', 'stop', 'hole', 'preset',
             'merge_from')
    own = {name: getattr(sample, name) for name in names}
    how = {name: value for name, value in changes.items() if name not in own}
    return SimpleNamespace(**{**own, **{name: changes[name] for name in own if name in changes}}), How(**how)


@pytest.mark.parametrize('changes',
                         [{}, dict(steps=1, top_p=1, temperature=0, ar_prefix=0),
                          dict(remask_schedule=(0.0, 1.0)), dict(task='repair', text='x'),
                          dict(task='edit', file='x', mask='1:2'), dict(seed=2**63 - 1),
                          dict(remask_rate=3.0)], ids=str)
def test_settings_that_make_sense(changes):
    check_sampling(*settings(**changes), COMMIT, REMASK)


@pytest.mark.parametrize('changes, message', [
    (dict(num_samples=0), 'num_samples must be at least 1, got 0'),
    (dict(steps=0), 'steps must be at least 1'),
    (dict(top_p=1.5), 'top_p must be in 0..1, got 1.5'),
    (dict(top_p=0), 'top_p=0 leaves no token'),
    (dict(temperature=-1), 'temperature must be at least 0'),
    (dict(top_k=0), 'top_k must be at least 1'),
    (dict(correct_share=2), 'correct_share must be in 0..1'),
    (dict(merge_weight=-0.1), 'merge_weight must be'),
    (dict(block_length=0), 'block_length must be at least 1'),
    (dict(guide=0), 'guide must be at least 1'),
    (dict(commit_threshold=0), 'commit_threshold must be above 0'),
    (dict(seed=-1), 'seed must be in'),
    (dict(seed=2**63), 'seed must be in'),
    (dict(remask_random_ratio=1.1), 'remask_random_ratio must be in'),
    (dict(remask_schedule=(0.3, 2)), 'two shares in 0..1'),
    (dict(remask_schedule=(0.3,)), 'two shares in 0..1'),
    (dict(remask_schedule=('a', 'b')), 'two shares in 0..1'),
    (dict(remask_schedule=(0.3, 0.1), remask_threshold=0.5), 'give one of them'),
    (dict(task='infil', text='x'), "task expects one of generate, .*got 'infil', did you mean infill?"),
    (dict(text='x'), 'generate takes --prompt'),
    (dict(task='repair'), '--task=repair needs a text'),
    (dict(task='infill', text='x', file='x'), 'not both'),
    (dict(task='edit', text='x'), 'writes anew'),
    (dict(task='infill', text='x', mask='0:1'), 'infill takes no mask'),
    (dict(task='repair', text='x', prompt='('), 'prompt and length are for --task=generate'),
    (dict(task='score', text='x', animate=True), 'nothing to watch'),
    (dict(task='infill', text='x', stream=True), 'stream prints texts .* not with --task=infill'),
    (dict(stream=True, animate=True, best_of=2), 'not with --animate or --best_of'),
    (dict(task='score', text='x', steps=3, preset='p2'), 'steps, preset have no say'),
    (dict(hole='?'), 'hole has no say'),
    (dict(merge_weight=0.25), 'merge_weight has no say'),
    (dict(commit='best'), 'commit expects one of random'),
    (dict(preset='bset'), 'unknown preset'),
    (dict(export='weights.pt'), 'export expects the name of a .safetensors file'),
    (dict(save='/nowhere/at/all/x.jsonl'), 'there is no folder')], ids=str)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        check_sampling(*settings(**changes), COMMIT, REMASK)


@pytest.mark.parametrize('chosen, idle', [
    (dict(remask='causal', steps=5, commit='confidence', top_k=5),
     'steps with remask=causal, commit with'),
    (dict(steps=5), 'steps with remask=causal'),
    (dict(remask='none', commit_threshold=0.5), 'commit_threshold with commit=random'),
    (dict(commit='confidence', remask='none', remask_rate=0.5, steps=5), 'remask_rate with remask=none'),
    (dict(remask='p2', correct_share=0.5), 'correct_share with remask=p2'),
    (dict(remask='none', revise=True), 'revise with no block_length'),
    (dict(remask='p2', draft=True), 'draft with remask=p2'),
    (dict(remask='wrong', draft=True, schedule='cosine'), 'schedule with draft'),
    (dict(remask='wrong', draft=True, schedule='cosine', block_length=3), ''),
    (dict(remask='causal', verify=3), 'verify with remask=causal'),
    (dict(draft=False), 'draft with remask=causal'),
    (dict(remask='wrong', remask_threshold=0.5, remask_rate=0.5), 'remask_rate with remask_threshold'),
    (dict(remask='wrong', remask_threshold=0.5, remask_rate=0.5, remask_random_ratio=0.5), ''),
    (dict(remask='random', remask_threshold=0.5, remask_rate=0.2), ''),
    (dict(remask='random', remask_random_ratio=0.5), 'remask_random_ratio with remask=random'),
    (dict(remask='random', remask_patience=1.0), 'remask_patience with remask=random'),
    (dict(remask='wrong', commit='threshold', schedule='cosine'), 'schedule with commit=threshold'),
    (dict(remask='wrong', commit='threshold', correct_share=0.5), 'correct_share with commit=threshold'),
    (dict(remask='p2', commit='threshold', schedule='cosine'), ''),
    (dict(temperature=0.0, top_k=5), 'top_k with temperature=0'),
    (dict(remask='wrong', temperature=0.0, top_p=0.5), 'top_p with temperature=0'),
    (dict(remask='wrong', remask_rate=0.5, steps=5, schedule='cosine', block_length=3), '')], ids=str)
def test_rules_without_a_say(chosen, idle):
    """What was chosen and does nothing is refused, what is told are the others."""
    config = default_config(training_type='joint', causal_ratio=0.5, block_lengths=(3,))
    rules = choose_rules(config, **chosen)
    if idle:
        with pytest.raises(UserError, match=idle):
            refuse_idle(config, chosen, rules)
    else:
        assert refuse_idle(config, chosen, rules).items() >= chosen.items()
    told = refuse_idle(config, {}, rules)
    assert told.items() <= rules.items()
    assert rules['remask'] != 'causal' or not {'steps', 'commit'} & set(told)


# -----------------------------------------------------------------------------
# rules that do not fit one another, or the canvas


def test_rules_that_do_not_fit_are_refused():
    oracle = Oracle(3, 4, random_law(3, 4, seed=1))
    for name in ('commit', 'remask', 'schedule', 'remdm'):
        with pytest.raises(UserError, match=f"{name} expects one of .*; got 'best'"):
            generate_diffusion(oracle, *empty(oracle, 2), **{name: 'best'})
    canvas, fixed = empty(oracle, 2)
    with pytest.raises(UserError, match='a fixed position holds a mask'):
        generate_diffusion(oracle, canvas, ~fixed)
    with pytest.raises(UserError, match='guide chooses among whole completions'):
        generate_diffusion(oracle, canvas, fixed, remask='causal', guide=2)
    canvas[:, -1] = 1  # a fixed suffix
    with pytest.raises(UserError, match='causal pass cannot see'):
        generate_diffusion(oracle, canvas, canvas != 3, remask='causal')
    assert not oracle.seen


@pytest.mark.parametrize('remask', ['none', 'remdm', 'p2', 'causal'])
def test_thresholds_and_schedules_of_rules_that_have_none_are_refused(remask):
    model = uniform(4)
    for how in (dict(remask_threshold=0.5), dict(remask_schedule=(0.3, 0.1))):
        with pytest.raises(UserError,
                           match=f'remask_threshold and remask_schedule are for .*, not for {remask}'):
            traced(model, empty(model, 2)[0], remask=remask, **how)


def test_rewriting_needs_rules_that_do_not_look_at_candidates():
    model, x = tiny_gpt(5, 9), torch.full((1, 9), 5)
    for more in (dict(commit='confidence'), dict(remask='none'), dict(remask='p2'), dict(guide=2),
                 dict(remask_model=model)):
        with pytest.raises(UserError, match='rewrite goes with'):
            generate_diffusion(model, x, x < 0, **{**REWRITE, 'remask_threshold': None, **more})


@pytest.mark.parametrize('commit', COMMIT)
def test_greedy_rules_need_something_to_go_by(commit):
    """Without noise an empty canvas gives one sample again and again: refused where several are asked for."""
    model = Independent([[0.50, 0.49, 0.01], [0.45, 0.275, 0.275], [0.60, 0.20, 0.20], [0.62, 0.37, 0.01]])
    if commit == 'confidence':  # noise of the tokens or of the order is enough
        out, _, _ = traced(model, empty(model, 40)[0], commit=commit, choice_temperature=0.0)
        assert len({tuple(row) for row in out.tolist()}) > 1
        traced(model, empty(model, 2)[0], commit=commit, temperature=0.0, choice_temperature=4.5)
    for greedy in (dict(temperature=0.0, choice_temperature=0.0), dict(top_k=1, choice_temperature=0.0)):
        for prompt in ([], [1]):  # one given token is no more than the start symbol
            canvas = empty(model, 2, prompt)[0]
            if commit in ('random', 'priority'):  # their order is not the network's
                traced(model, canvas, commit=commit, **greedy)
            else:
                with pytest.raises(UserError,
                                   match=f'commit={commit} without noise writes one sample again and'):
                    traced(model, canvas, commit=commit, **greedy)
        out, _, _ = traced(model, empty(model, 3, [1, 1])[0], commit=commit, **greedy)
        alone, _, _ = traced(model, empty(model, 1)[0], commit=commit, **greedy)
        assert out.tolist() == [[1, 1, 0, 0]] * 3 and alone.tolist() == [[0, 0, 0, 0]]
