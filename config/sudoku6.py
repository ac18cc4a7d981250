# sudoku of 6 x 6 cells: a quarter of an hour on a CPU core. The recipe of config/remask_all.py without a
# causal mode, which could not see the givens to its right; depth comes from applying the blocks four times
training_type = 'joint'
causal_ratio = 0.0
draft_head = False
remask_ratio = 0.5           # half of the rows carry wrong digits ...
corruption = 'own'           # ... that the network would write itself

dataset = 'sudoku6'
block_size = 42              # 6 lines of 6 cells, each with its end
n_layer = 2
n_head = 4
n_embd = 128
n_recur = 4
parts = 'places'             # a cell knows where it stands, and needs not count lines
max_iters = 4000
eval_interval = 1000
