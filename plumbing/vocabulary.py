"""
A network of one set of characters goes on with a text of another one.
"""


def other_characters(before, now):
    """Whether two meta.json describe texts in characters, but not in the same ones."""
    return None not in (before['itos'], now['itos']) and before['itos'] != now['itos']


def by_character(weights, before, now, own):
    """
    The weights of a network, its embeddings moved to the ids of another vocabulary: a dict of tensors.

    before, now: the meta.json of the two; own: the weights of the new network, which knows more than these.
    What both have keeps its embedding. New ones, and tables of pairs, stay as they are in own.
    """
    weights = {name: tensor for name, tensor in weights.items() if 'bigrams' not in name}
    old, table = weights['wte.weight'], own['wte.weight'].clone()           # (rows, C), (new rows, C)
    ids = {text: number for number, text in enumerate(before['itos'])}
    for number, text in enumerate(now['itos']):
        if text in ids:
            table[number] = old[ids[text]]
    V = now['vocab_size']
    table[V:V + 2] = old[before['vocab_size']:before['vocab_size'] + 2]     # [MASK] and [WRONG]
    new = len({*now['itos']} - {*ids})
    pairs = ', and so are all pairs' if any('bigrams' in name for name in own) else ''
    print(f'{new} of {V} characters are new to the network{pairs}')
    return {**weights, 'wte.weight': table}
