# characters of tiny Shakespeare, an hour on two CPU cores (--compile=True makes it a tenth faster): NELBO
# 1.614. It unmasks and does nothing else; for a network that also finds and corrects its mistakes, take
# what config/shakespeare_char_cpu.py has, and a higher NELBO
training_type = 'unmasking'
mask_weighting = 'token'
causal_ratio = 0.0
draft_head = False

dataset = 'shakespeare_char'
block_size = 256
batch_size = 32
n_layer = n_head = 6
n_embd = 192
n_recur = 1
parts = 'level:32,short_conv:2,shortcuts,bigrams:8192'
bigram_decay = 0.07  # it reads the text 34 times: this and the next two against learning it by heart
weight_decay = 0.025
reward_correct_unmask = 0.5       # what is nearly known teaches less, or it would be much too sure of itself
max_iters = 4200
learning_rate = 1e-2
decay_share = 0.7
warmup_iters = 100
ema_decay = 0.995
eval_interval = 1000
sample_prompt = 'ROMEO:'
