# GPT-2's size on OpenWebText (its loss was not measured here; a step is, see docs/log.md):
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_scale.py
# half a million tokens a step, all processes together; on fewer GPUs raise gradient_accumulation_steps and
# lower batch_size in proportion
mask_weighting = 'token'       # all masks weigh alike: on characters that gives a lower bound
remask_ratio = 0.25
causal_ratio = 0.25
proofreading_warmup_iters = masking_warmup_iters = 10000

dataset = 'openwebtext'
block_size = 1024
batch_size = 256               # 32 a GPU
gradient_accumulation_steps = 2
n_layer = n_head = 12
n_embd = 768
n_recur = 1
max_iters = 40000              # 20 billion tokens
learning_rate = 1e-3
warmup_iters = 500
ema_decay = 0.999
dtype = 'bfloat16'
compile = True
eval_interval = 1000
keep_every = 10000
eval_samples = 8
