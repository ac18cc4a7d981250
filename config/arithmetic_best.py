# strings that are well formed, and right: 99.7 and 64 % after 16 minutes on one CPU core (see docs/log.md).
# Nearly all of the batch trains the causal mode, which has the last word when sampling, on strings that are
# hardly ever seen twice; the rest keeps the other mode alive
causal_ratio = 0.9
n_layer = 4
n_recur = 1

dataset = 'arithmetic_large'
batch_size = 128
max_iters = 3400
eval_interval = 850
