# and heads may turn to a position's neighbours (graph_window), alone or on top of stage 2:
#   python train.py config/remask_all.py config/stage3.py --init_from=out-stage2/ckpt_joint_all_positions.pt --out_dir=out-stage3
time_dim = 128
k1_credit = True
graph_window = 8
