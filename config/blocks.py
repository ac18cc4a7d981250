# the recipe of config/remask_all.py, whose causal rows are also written in blocks: 4 tokens at a time to 32.
# Twice its time. Neighbours and the noise level help a block to see where it is
block_lengths = 4, 8, 16, 32
parts = 'short_conv:2,level:32'
# wrong tokens only where no mask is left: beside masks they make a network distrust all that it sees, and
# what it then writes is worse. So it is doubted when it is finished, and not on the way
remask_ratio = 0.25
full_ratio = 1.0
