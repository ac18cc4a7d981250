# and heads may turn to the neighbours of a position; alone, or on top of stage 2:
#   python train.py config/remask_all.py config/stage3.py --out_dir=out-stage3 \
#       --init_from=out-stage2/ckpt_joint_all_positions.pt
parts = 'level:128,graph:8'
k1_credit = True
