# the network is told the noise level, the part that pays most; alone, or on top of stage 0:
#   python train.py config/remask_all.py config/stage1.py --out_dir=out-stage1 \
#       --init_from=out-stage0/ckpt_joint_all_positions.pt
parts = 'level:128'
