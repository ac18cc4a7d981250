# tiny Shakespeare in GPT-2's tokens, on a CPU. Only positions that carry loss are projected to the
# vocabulary of 50,257
mask_weighting = 'token'     # all masks weigh alike: on characters that gives a lower bound
remask_ratio = 0.25
causal_ratio = 0.2
proofreading_warmup_iters = masking_warmup_iters = 500

dataset = 'shakespeare'
batch_size = 16
n_layer = 4
n_head = 2
n_recur = 1
max_iters = 2000
eval_interval = 500
eval_rows = 500
sample_prompt = 'ROMEO:'
