# the universal denoiser: in half of the rows every token may be masked, replaced, swapped, deleted or preceded by a new one,
# and the clean token is the target everywhere; the other half trains plain unmasking, so that it can write from nothing
training_type = 'denoising'
remask_target = 'original'
remask_ratio = 0.5
sigma_min, sigma_max = 0.1, 1.0
high_noise_bias = 0.3        # three rows in ten are nearly all noise

proofreading_warmup_iters = 300
masking_warmup_iters = 300

dataset = 'arithmetic'
batch_size = 64
max_iters = 1000
eval_interval = 250
