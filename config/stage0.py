# Stages: nothing, then the noise level, then gradient credit, then graph attention. A second config file:
#   python train.py config/remask_all.py config/stage0.py --out_dir=out-stage0
# It is a way to look at them, not a recipe: bringing a network up in stages is worse than any of them from
# the start, and credit does nothing (docs/log.md)
parts = ''
k1_credit = False
