# the autoregressive baseline: the same network with causal attention, next token, nothing masked
training_type = 'causal'

# same network, data and number of rows as config/remask_all.py, so that the two can be compared
dataset = 'arithmetic'
batch_size = 64
max_iters = 1000
eval_interval = 250
