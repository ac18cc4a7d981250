"""
What a GPU would refuse, found without one: a device is pretended, whose tensors say that they lie on 'meta'
and hold CPU data.

What mixes them with tensors of the CPU fails, as on a GPU, and so does float64, which MPS has not; and every
time that the program would have to wait for the device to learn a value or a number of elements is counted.
"""

import collections

import pytest
import torch
from conftest import ARITHMETIC, default_config, tiny_gpt
from test_train import arithmetic_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import train
from corruption import own_errors
from parts.cache import Cache
from parts.presets import PRESETS, choose_rules, supports
from plumbing import device, distributed, optim
from plumbing.evaluate import evaluate
from plumbing.rows import Ends
from plumbing.run import is_finite
from plumbing.score import judge_rows
from sample import fill, generate
from suites.speed import cached_ar, plain_ancestral, recipe

AWAY = torch.device('meta')
WAITS = collections.Counter()                # {operation: how often the program waited for the device}
ROWS = arithmetic_rows(8)[:, :24]
META = dict(ARITHMETIC, block_size=24)
WAITING = ('_local_scalar_dense', 'nonzero', 'masked_select')


class Away(torch.Tensor):
    """A tensor of the pretended device; here is what it holds."""

    @staticmethod
    def __new__(cls, here):
        self = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=AWAY,
            storage_offset=here.storage_offset())
        self.here = here
        return self

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return carry_out(operation, args, kwargs or {})

    def tolist(self):
        WAITS['tolist'] += 1
        return self.here.tolist()


class Pretence(TorchDispatchMode):
    """So that what is made on the device, without any tensor of it, is seen as well."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return carry_out(operation, args, kwargs or {})


def content(x):
    return x.here if isinstance(x, Away) else x


def carry_out(operation, args, kwargs):
    """An operation on what its tensors hold; its results lie where it says, or where its tensors do."""
    name = operation._schema.name.removeprefix('aten::')
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    away = [x for x in given if isinstance(x, Away)]
    target = torch.device(kwargs['device']) if kwargs.get('device') is not None else None
    if away and name not in ('_to_copy', 'copy_'):
        # a number may come from the CPU, and so may indices
        strangers = [x for x in given if not isinstance(x, Away) and x.dim() and not name.startswith('index')]
        assert not strangers and (isinstance(args[0], Away) or not name.startswith('index')), (
            f'{operation} mixes devices')
    if away and (
        name in WAITING
        or (name == '_to_copy' and target not in (None, AWAY))
        or (
            name in ('index', 'index_put', 'index_put_')
            and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
        )
    ):
        WAITS[name] += 1
    if target == AWAY:
        kwargs = dict(kwargs, device=torch.device('cpu'))
    found = operation(*tree_map(content, args), **tree_map(content, kwargs))
    # what was changed in place stays what it is
    same = {id(content(x)): x for x in given}
    there = target == AWAY or (away and target is None)

    def placed(x):
        assert not (there and isinstance(x, torch.Tensor) and x.dtype == torch.float64), (
            f'{operation} gives float64')
        return same.get(id(x), Away(x) if there else x) if isinstance(x, torch.Tensor) else x
    return args[0] if name == 'copy_' else tree_map(placed, found)


class Generator(torch.Generator):
    """A generator of random numbers that says it is one of the device."""
    device = property(lambda self: AWAY)


@pytest.fixture
def away(monkeypatch):
    """away(model): the model, moved to the pretended device, which there is as long as the test runs."""
    # noqa: F401 (these look at torch.Generator)
    import torch._dynamo
    import torch.distributed.tensor  # noqa: F401
    for module in ('plumbing.draw', 'parts.look', 'parts.abstain', 'parts.speculate'):    # as on MPS
        monkeypatch.setattr(f'{module}.fine', lambda device: torch.float32)
    tensor, generator = torch.tensor, torch.Generator
    monkeypatch.setattr(
        torch, 'tensor', lambda *args, device=None, **more: tensor(*args, **more).to(device or 'cpu'))
    monkeypatch.setattr(
        torch, 'Generator', lambda device='cpu': Generator() if torch.device(device) == AWAY else generator())

    def move(model):
        for module in model.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = None if p is None else torch.nn.Parameter(p.detach().to(AWAY))
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.to(AWAY)
        model.compute_dtype = torch.bfloat16
        return model
    with Pretence():
        yield move


def settings(**changes):
    return recipe(block_size=24, batch_size=8, **changes)


def network(config, **more):
    sizes = dict(parts=config['parts'], draft_head=config['draft_head'])
    return tiny_gpt(18, 24, **sizes, **more).train()


def a_step(model, config):
    """A step of train.py, but for the optimisers' own kernels."""
    noise = torch.Generator(AWAY).manual_seed(2)
    parts = train.training_step(
        model, ROWS.to(AWAY), META, config, 10_000, noise, 0.1 if config['allow_abstain'] else None)
    assert is_finite(model, parts)
    distributed.clip_gradients(list(model.parameters()), 1.0)


# -----------------------------------------------------------------------------


def test_the_pretence_finds_what_it_should(away):
    model = away(tiny_gpt())
    there, here = model.wte.weight, torch.ones(16)
    for mixed in (
        lambda: there + here, lambda: there * torch.arange(16),
        lambda: torch.cat((there, torch.zeros(1, 16))), lambda: here[there[0].long()],
        lambda: torch.where(there > 0, there, here)):
        with pytest.raises(AssertionError, match='mixes devices'):
            mixed()
    assert (there + here.to(AWAY)).device == (
        there * torch.tensor(2.0)).device == AWAY and there.cpu().device.type == 'cpu'
    with pytest.raises(AssertionError, match='gives float64'):
        there.double()
    WAITS.clear()
    assert there[there > 99].numel() == 0 and there.sum().item() and (there > 99).nonzero().tolist() == []
    # a mask, a number, their places, a list
    assert sum(WAITS.values()) == 4


@pytest.mark.parametrize(
    'changes',
    [
        {}, dict(parts='short_conv:2,shortcuts,bigrams:64,level:8'),
        dict(parts='graph:3,mu:4', causal_ratio=0.5),
        dict(corruption='own:1,random:1,fragment:1,sticky:1,noise:1', remask_target='original'),
        dict(allow_abstain=True, draft_head=False), dict(views=2, parts='previous'),
        dict(training_type='denoising', remask_target='original'),
        dict(training_type='causal', k1_credit=True), dict(prefix_ratio=0.5, mask_weighting='token'),
        dict(optimizer='adamw', parts='bigrams:400')],
    ids=str,
)
@pytest.mark.parametrize('plain', [False, True])
def test_training_stays_on_its_device(away, changes, plain):
    config = settings(**changes)
    model = away(network(config))
    model.plain_attention = plain
    a_step(model, config)
    optimizers = optim.make_optimizers(model, config['optimizer'], 1e-3, 1e-3, 0.1, (0.9, 0.95), 0.1)
    # AdamW's fused kernel is PyTorch's own affair
    if config['optimizer'] == 'muon':
        optimizers[0].step()
    can_unmask, causal, detects = supports(config)
    result = evaluate(model.eval(), ROWS, META, causal=causal, bidirectional=can_unmask,
                      own_errors=own_errors if detects else None, seed=1)
    assert all(value == value for value in result.values())


@pytest.mark.parametrize('changes, most', [({}, 9), (dict(causal_ratio=0.0, training_type='unmasking'), 4)])
def test_a_step_hardly_ever_waits_for_its_device(away, changes, most):
    """
    While the program waits it launches nothing, and a GPU that has nothing left to do waits for the program
    in turn.
    """
    config = settings(**changes)
    model = away(network(config))
    WAITS.clear()
    a_step(model, config)
    assert sum(WAITS.values()) <= most, WAITS


@pytest.mark.parametrize(
    'rules',
    [
        *(dict(preset=name) for name in PRESETS), dict(commit='priority', priority=(1, 2)),
        dict(commit='margin'), dict(commit='abstain'), dict(commit='entropy', remask='none', block_length=4),
        dict(top_k=3, top_p=0.5), dict(remask='critic'), dict(remask='confidence'), dict(remask='random'),
        dict(remask='remdm', remdm='rescale'), dict(remask='wrong', remask_threshold=0.5),
        dict(remask='wrong', remask_schedule=(0.3, 0.1)), dict(remask='wrong', rewrite=True),
        dict(remask='none', guide=2), dict(remask='wrong', best_of=2), dict(ar_prefix=24, remask='none')],
    ids=str,
)
def test_sampling_stays_on_its_device(away, rules):
    model = away(network(settings(parts='short_conv:1,bigrams:50'), energy_head=2)).eval()
    if 'preset' in rules:
        rules = choose_rules(settings(), steps=None if rules['preset'] == 'speculative' else 6, **rules)
    samples = generate(model, META, 4, seed=1, **{'steps': 6, **rules})
    assert len(samples) == 4 and all(18 not in sample['tokens'] for sample in samples)


@pytest.mark.parametrize('preset', ['ancestral', 'intelligent', 'speculative'])
def test_a_pass_of_the_sampler_waits_twice(away, preset):
    model = away(network(settings())).eval()
    steps, waits = (4, 12), []
    for number in steps:
        WAITS.clear()
        rules = choose_rules(settings(), preset=preset, steps=None if preset == 'speculative' else number)
        samples = generate(model, META, 2, seed=1, **rules)
        waits.append((sum(WAITS.values()), max(sample['nfe'] for sample in samples)))
    if preset == 'speculative':
        assert waits[0][0] <= 2 * waits[0][1] + 9, (waits, WAITS)
    else:
        assert waits[1][0] - waits[0][0] <= 2 * (steps[1] - steps[0]), (waits, WAITS)


def test_other_tasks_stay_on_their_device(away):
    model, config = away(network(settings())).eval(), default_config(causal_ratio=0.5)
    repaired = fill(model, META, ROWS, torch.zeros_like(ROWS, dtype=torch.bool), seed=1, **choose_rules(
        config, task='repair', inside=True))
    judged = judge_rows(model, META, ROWS[:2], supports(config), estimates=4)[0]
    assert len(repaired) == 8 and set(judged) == {'nelbo', 'causal_nll', 'p_wrong'}
    blank = ROWS.masked_fill(torch.arange(24) > 0, 18).to(AWAY)
    for x in (
        plain_ancestral(model, blank, torch.Generator(AWAY)),
        cached_ar(model, blank, torch.Generator(AWAY), Ends(16, 17))):
        assert x.device == AWAY and not bool((x == 18).any())


@torch.no_grad()
def test_passes_with_a_cache_are_not_compiled(monkeypatch):
    """Each has another shape, so compiling them never ends."""
    calls, model = [], tiny_gpt(5, 8, n_layer=2)

    def fake(module):
        def call(*args, **more):
            calls.append(more)
            return module._call_impl(*args, **more)
        module._compiled_call_impl = call
    monkeypatch.setattr(torch.nn.Module, 'compile', fake)
    device.compile_passes(model)
    ids = torch.randint(5, (3, 8))
    whole = model(ids, causal=True)
    cached = model(ids, causal=True, cache=Cache.empty(model, 3, 8))
    assert len(calls) == 1 and torch.allclose(whole, cached, atol=1e-5)
