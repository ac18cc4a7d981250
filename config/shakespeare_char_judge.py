# a judge of samples for bench.py --suite=text: a larger causal network of another seed. It saw the training split only, and rows
# at least as long as the samples that it is to judge; ten minutes on two CPU cores
training_type = 'causal'
seed = 4242

dataset = 'shakespeare_char'
block_size = 256
batch_size = 16
n_layer = 4
n_embd = 256
n_recur = 1
max_iters = 1500
eval_interval = 500
