# plain masked diffusion: mask k of n tokens, predict them, nothing else. The baseline of everything with "remask" in it
training_type = 'unmasking'
causal_ratio = 0.0           # no causal mode: this checkpoint samples by commit rules alone

# same network, data and number of rows as config/remask_all.py, so that the two can be compared
dataset = 'arithmetic'
batch_size = 64
max_iters = 1000
eval_interval = 250          # four looks at the samples on the way
