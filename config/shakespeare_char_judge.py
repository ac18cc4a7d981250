# a judge of samples for bench.py --suite=text: a larger causal network of another seed, which saw the
# training split only; its rows are as long as the samples that it is to judge. Five minutes on two CPU
# cores
training_type = 'causal'
causal_ratio = 0.0
draft_head = False
seed = 4242

dataset = 'shakespeare_char'
block_size = 128
batch_size = 32
n_layer = 4
n_head = 6
n_embd = 192
n_recur = 1
max_iters = 1500
eval_interval = 500
