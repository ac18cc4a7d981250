# a network that repairs text, lengths as well: characters of tiny Shakespeare, twenty minutes on a core;
# python sample.py --init_from=out-repair/ckpt_joint_all_positions.pt --task=repair --text="..."
remask_target = 'edits'            # keep, replace, take away, or open a hole for what is missing
corruption = 'noise:0.9,own:0.1'   # typing errors, and a few mistakes that the network would make itself
noise_mix = 'replace:0.19,delete:0.19,double:0.19,insert:0.19,swap:0.19,mask:0.05'
sigma_min, sigma_max = 0.01, 0.2   # of 1 to 20 % of the characters
remask_ratio = 0.8                 # a fifth of the rows is plain unmasking, which fills the holes
causal_ratio = 0.0
draft_head = False
mask_weighting = 'token'
proofreading_warmup_iters = 300
masking_warmup_iters = 0

# the network of shakespeare_char_cpu.py
dataset = 'shakespeare_char'
block_size = 128
batch_size = 32
n_layer = n_head = 4
n_embd = 128
n_recur = 1
parts = 'level:32,short_conv:2,shortcuts,bigrams:8192'
max_iters = 4440
learning_rate = 1e-2
decay_share = 0.7
ema_decay = 0.995
eval_interval = 1110
