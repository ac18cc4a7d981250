# a separate remasking model: it never sees a mask, it only learns to say which visible tokens are wrong.
# Use it beside an unmasking model:
#   python sample.py --init_from=out/ckpt_unmasking.pt --remask_from=out/ckpt_remasking_all_positions.pt
training_type = 'remasking'
remask_target = 'wrong'
corruption = 'random'        # it cannot unmask, so it has no guesses of its own to learn from
causal_ratio = 0.0
draft_head = False
