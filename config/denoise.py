# a universal denoiser on one network: in half of the rows of the denoising task every token may be masked,
# replaced, swapped, deleted or preceded by a new one, and the clean token is the target everywhere; the
# other half is plain unmasking, up to the full mask, to write from nothing; a quarter of the batch trains
# the causal mode, for warm starts
training_type = 'denoising'
causal_ratio = 0.25
draft_head = False

max_iters = 2000
eval_interval = 500
