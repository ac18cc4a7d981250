# after config/shakespeare_char_cpu.py: the same text also in blocks, 4 characters at a time to 32. Of 24 rows
# 12 are read from the left and written in blocks, 12 are whole canvases; a quarter longer
#     python train.py config/shakespeare_char_cpu.py config/blocks_text.py --out_dir=out-blocks-text
block_lengths = 4, 8, 16, 32
batch_size = 24
causal_ratio = 0.5
# wrong characters only where no mask is left, and few: see config/blocks.py
remask_ratio = 0.1
full_ratio = 1.0
