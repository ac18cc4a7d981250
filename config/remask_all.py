training_type = 'joint'
causal_ratio = 0.34
