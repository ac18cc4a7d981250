# characters of tiny Shakespeare, 11 to 13 minutes on two CPU cores
mask_weighting = 'token'           # all masks weigh alike: a lower bound at equal steps
remask_ratio = 0.2                 # a fifth of the other rows carries wrong characters ...
corruption = 'own:0.7,random:0.3'  # ... most of them mistakes that the network would make, some typing errors
causal_ratio = 0.15                # this share trains the causal mode, which has the last word when sampling
proofreading_warmup_iters = masking_warmup_iters = 1000

dataset = 'shakespeare_char'
block_size = 128
batch_size = 32
n_layer = n_head = 4               # 32 channels a head; at this size 64 are a little worse, 16 much
n_embd = 128  # in ten minutes a narrow network that reads more gets further than a wide one
n_recur = 1
# each part lowers the bound: the network is told how much is masked; every block looks at two neighbours to
# each side first, and sees the embedding and the first block's values again; pairs of neighbours have
# embeddings of their own
parts = 'level:32,short_conv:2,shortcuts,bigrams:8192'
max_iters = 2800
learning_rate = 1e-2
decay_share = 0.7
ema_decay = 0.995
eval_interval = 700
sample_prompt = 'ROMEO:'
