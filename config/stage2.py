# and gradients get credit by their share; alone, or on top of stage 1:
#   python train.py config/remask_all.py config/stage2.py --out_dir=out-stage2 \
#       --init_from=out-stage1/ckpt_joint_all_positions.pt
parts = 'level:128'
k1_credit = True
