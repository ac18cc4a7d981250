# the main job: ONE network that unmasks, finds its own mistakes, and has a causal mode that verifies what
# it drafts; two to five minutes on two CPU cores. These are the defaults of train.py, written out as a
# recipe to copy
training_type = 'joint'
causal_ratio = 0.5  # half of each batch trains the causal mode, which has the last word when sampling
remask_ratio = 0.5  # half of the other rows carry wrong tokens, so the unmasking task keeps its share
corruption = 'own'           # errors the network really makes; uniformly random tokens are too easy to spot
remask_target = 'original'   # at a wrong token the target is the right one: more to learn than [WRONG] alone
draft_head = True            # guesses what the causal mode will say, so that checking it takes few passes
dataset = 'arithmetic'
max_iters = 1000
