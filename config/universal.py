# one network writes, edits, repairs and finds what is wrong: 2,000 steps of 64 strings, 20,000 strings, 396
# thousand parameters (and 49 thousand of the draft head, which only saves passes); see docs/log.md for all
# that was tried. An energy head for it: python tools/energy.py --init_from=out/ckpt_joint_all_positions.pt
causal_ratio = 1.0                 # every row trains the causal mode ...
views = 2                          # ... and, corrupted twice, the other one:
remask_ratio = 0.8                 # a fifth plain unmasking
corruption = 'own:0.4,noise:0.6'   # a third its own errors, half mixed noise
sigma_min, sigma_max = 0.05, 0.6  # noise that can be repaired; masks alone teach to write from nothing
full_ratio = 0.0                   # mixed noise already leaves texts without a mask
proofreading_warmup_iters = 100

max_iters = 2000
ema_decay = 0.99                   # keeps the lengths
eval_interval = 500
