# and gradients get credit by their share (k1_credit), alone or on top of stage 1:
#   python train.py config/remask_all.py config/stage2.py --init_from=out-stage1/ckpt_joint_all_positions.pt --out_dir=out-stage2
time_dim = 128
k1_credit = True
