# the plan's separate remasking model: it never sees a mask, it only learns to say which visible tokens are wrong.
# Use it beside an unmasking model:
# python sample.py --init_from=out/ckpt_unmasking.pt --remask_from=out/ckpt_remasking_all_positions.pt
training_type = 'remasking'
remasking_loss_type = 'all_positions'  # with 'corrupted_only' the answer would always be [WRONG]: nothing to learn
remask_target = 'wrong'
corruption = 'random'                  # it cannot unmask, so it has no guesses of its own to learn from

dataset = 'arithmetic'
batch_size = 64
max_iters = 1000
eval_interval = 250
masking_warmup_iters = 300             # first learn to find errors, then what a false alarm costs
