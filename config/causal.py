# the autoregressive baseline: the same network with causal attention, next token, nothing masked; network,
# data and number of rows as in config/remask_all.py, so that the two can be compared
training_type = 'causal'
causal_ratio = 0.0           # all rows are causal anyway
draft_head = False
