# sudoku of 9 x 9 cells: three quarters of an hour on a CPU core, if it is free. The recipe of
# config/remask_all.py without a causal mode, which could not see the givens to its right; depth comes from
# applying the blocks four times
training_type = 'joint'
causal_ratio = 0.0
draft_head = False
remask_ratio = 0.5           # half of the rows carry wrong digits ...
corruption = 'own'           # ... that the network would write itself

dataset = 'sudoku'
block_size = 90              # 9 lines of 9 cells, each with its end
n_layer = 2
n_head = 4
n_embd = 128
n_recur = 4
parts = 'places'             # a cell knows where it stands, and needs not count lines
max_iters = 7000
eval_interval = 1000
