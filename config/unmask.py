# plain masked diffusion: mask k of n tokens, predict them, nothing else. The baseline of everything with
# "remask" in it; network, data and number of rows as in config/remask_all.py, so that the two can be
# compared
training_type = 'unmasking'
causal_ratio = 0.0           # no causal mode: this checkpoint samples by commit rules alone
draft_head = False
