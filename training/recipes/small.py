"""Recipe small: ten minutes of training on two CPU cores, from the world that ships. `make train` uses it.

    python train.py RECIPE=small DATA_DIR=tokens/samples OUT_DIR=runs/samples

A few minutes adapt the shipped world to a handful of clips; they teach no new one from nothing. The motion
model stays that of the shipped world.
"""

INIT_FROM = "checkpoints/world.pt"
MOTION_STEPS = 0

STEPS = 300
BATCH_SIZE = 4
LR = 3e-4
MIN_LR = 3e-5
WARMUP_STEPS = 10
AVERAGE_DECAY = 0.98
SEQ_LEN = 8
SEQ_LEN_MAX = 8
PAIR_SHARE = 0.8
PAIR_BATCH = 16
PAIR_POOL = 384
AR_LEN_MAX = 4

LOG_STEPS = 10
VAL_STEPS = 75
VAL_WINDOWS = 12
VAL_ROLLOUTS = 4
PICTURE_STEPS = 75
SENSITIVITY_STEPS = 100
SAVE_STEPS = 100
