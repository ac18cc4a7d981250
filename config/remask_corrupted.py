# a loss at wrong tokens only. With [WRONG] as their target the one answer would always be right, so the
# target is the original token: the network does not find errors, it corrects where one is known to be
remasking_loss_type = 'corrupted_only'
causal_ratio = 0.0
draft_head = False
