# the universal denoiser of the seed, on one network: in half of the rows of the denoising task every token may be masked,
# replaced, swapped, deleted or preceded by a new one, and the clean token is the target everywhere; the other half is plain
# unmasking, up to the full mask, to write from nothing; a quarter of the batch trains the causal mode, for warm starts
training_type = 'denoising'
remask_target = 'original'
remask_ratio = 0.5
causal_ratio = 0.25
sigma_min, sigma_max = 0.1, 0.9

proofreading_warmup_iters = 300
masking_warmup_iters = 300

dataset = 'arithmetic'
batch_size = 64
max_iters = 2000
eval_interval = 500
