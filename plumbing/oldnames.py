"""
Checkpoints of earlier versions, under today's names: their optional parts had a field and a setting each.
"""

# in the order of parts/layers.py: field -> part
PARTS = dict(graph_window='graph', shortcuts='shortcuts', short_conv='short_conv', self_condition='previous',
             mu_blocks='mu', bigram_rows='bigrams', noise_condition='level', time_dim='level')
# the settings that config files of earlier versions may still have, with their defaults
FORMER = {**dict.fromkeys(PARTS, 0), 'graph_topk': 4, 'shortcuts': False, 'self_condition': False,
          'noise_condition': False}
GONE = ('stage', 'guess_from', 'high_noise_bias')
# how the name of a tensor begins, or in a block ends -> what stands there today
TENSORS = (('.aloof', '.parts.graph.off_graph_penalty'), ('.shortcuts', '.parts.shortcuts.weight'),
           ('.conv.weight', '.parts.short_conv.weight'), ('previous.weight', 'parts.previous.proj.weight'),
           ('mixer.', 'parts.mu.'), ('bigrams.', 'parts.bigrams.'),
           ('level.weight', 'parts.level.mlp.0.weight'), ('level.', 'parts.level.mlp.'))


def modernised(checkpoint):
    """A checkpoint, a dict, as this version would have written it."""
    for key in ('model_args', 'config'):
        if 'parts' not in checkpoint[key] and set(PARTS) & set(checkpoint[key]):
            checkpoint[key] = with_parts(checkpoint[key])
    for key in ('model', 'ema'):
        if isinstance(checkpoint.get(key), dict):
            checkpoint[key] = {new_name(name): tensor for name, tensor in checkpoint[key].items()}
    return checkpoint


def with_parts(old):
    """Settings or fields of an earlier version, with parts='short_conv:2,...' for those that are gone."""
    words = {}
    for field, part in PARTS.items():
        if old.get(field):
            words[part] = part if old[field] is True else f'{part}:{old[field]}'
    if 'graph' in words and old.get('graph_topk', 4) != 4:
        words['graph'] += f":{old['graph_topk']}"
    kept = {name: value for name, value in old.items() if name not in FORMER and name not in GONE}
    return {**kept, 'parts': ','.join(filter(None, (old.get('parts'), *words.values())))}


def new_name(name):
    """The name of a tensor today."""
    if isinstance(name, str) and 'parts.' not in name:
        for old, new in TENSORS:
            in_block = old.startswith('.') and name.startswith('blocks.') and name.endswith(old)
            if in_block or name.startswith(old):
                return name.replace(old, new)
    return name
