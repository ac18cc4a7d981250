# the main job: ONE network that unmasks, finds its own mistakes, and has a causal mode that can verify what it drafts
# three to five minutes on two CPU cores; see README.md for what comes out
training_type = 'joint'
causal_ratio = 0.5                     # half of each batch trains the causal mode: by default it has the last word when sampling
remask_ratio = 0.5                     # half of the other rows carry wrong tokens, so the unmasking task keeps its share
corruption = 'own'                     # errors the network really makes; uniformly random tokens are too easy to spot
remasking_loss_type = 'all_positions'  # a correct token that is doubted counts as an error too
remask_target = 'original'             # at a wrong token the target is the right one: more to learn than [WRONG] alone
draft_head = True                      # guesses what the causal mode will say, so that checking it takes few passes

# curricula: learn to write before proofreading, and to find errors before being told off for false alarms
proofreading_warmup_iters = 300
masking_warmup_iters = 300

dataset = 'arithmetic'
batch_size = 64
max_iters = 1000
eval_interval = 250          # four looks at the samples on the way
