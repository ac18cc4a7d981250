# WikiText-2 in GPT-2's tokens, 45 million parameters, 26 of them embeddings: for one GPU (not measured
# here)
mask_weighting = 'token'     # all masks weigh alike: on characters that gives a lower bound
remask_ratio = 0.25
causal_ratio = 0.2
proofreading_warmup_iters = masking_warmup_iters = 2000

dataset = 'wikitext2'
block_size = 256
batch_size = 32
n_layer = 6
n_head = 8
n_embd = 512
n_recur = 1
dropout = 0.1
max_iters = 10000
ema_decay = 0.999
eval_interval = 1000
eval_samples = 8
sample_prompt = 'The city of'
