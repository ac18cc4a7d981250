# the plan's other loss: only wrong tokens count. With [WRONG] as their target the one answer would always be right, so the
# target is the original token: the network does not find errors, it corrects where one is known to be
training_type = 'joint'
remasking_loss_type = 'corrupted_only'
remask_target = 'original'

dataset = 'arithmetic'
batch_size = 64
max_iters = 1000
eval_interval = 250
proofreading_warmup_iters = 300
