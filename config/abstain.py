# masked diffusion that may answer [MASK]: "not yet". The controller sets the price of that answer so that
# it is given at three masked tokens in ten. Sample from it with --commit=abstain, which fills what the
# network is readiest for
training_type = 'unmasking'
causal_ratio = 0.0
draft_head = False
allow_abstain = True
target_mask_prob = 0.3
