"""Writing a prepared dataset: train.bin, val.bin and meta.json, all of it or none of it."""

import hashlib
import json
import os

import numpy as np


def write_dataset(out_dir, train_ids, val_ids, meta):
    """
    Write two arrays of token ids as little-endian uint16, and meta.json with their token counts and sha256 added.
    Returns the meta as written. A folder that holds a meta.json holds the whole dataset it describes.
    """
    files = {}
    meta = dict(meta, sha256={})
    for split, ids in (('train', train_ids), ('val', val_ids)):
        ids = np.asarray(ids)
        if ids.size == 0 or ids.min() < 0 or ids.max() >= meta['vocab_size'] or meta['vocab_size'] > 2**16:
            raise ValueError(f'the ids of {split} are not in 0..vocab_size-1, or there are none')
        files[f'{split}.bin'] = ids.astype('<u2').tobytes()
        meta[f'{split}_tokens'] = int(ids.size)
        meta['sha256'][f'{split}.bin'] = hashlib.sha256(files[f'{split}.bin']).hexdigest()
    files['meta.json'] = (json.dumps(meta, indent=1) + '\n').encode()  # the last in the dict, so the last renamed below

    os.makedirs(out_dir, exist_ok=True)
    path = {name: os.path.join(out_dir, name) for name in files}
    tmp = {name: f'{path[name]}.{os.getpid()}.tmp' for name in files}
    try:
        for name, data in files.items():
            with open(tmp[name], 'wb') as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        # an older meta.json goes before the first .bin changes, so that it never describes a mixture of old and new
        if os.path.exists(path['meta.json']):
            os.remove(path['meta.json'])
        for name in files:
            os.replace(tmp[name], path[name])
    finally:
        for name in files:
            if os.path.exists(tmp[name]):
                os.remove(tmp[name])
    return meta
