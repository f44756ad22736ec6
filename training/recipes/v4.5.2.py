"""Recipe v4.5.2: the ConvGRU + FiLM baseline, its schedule and its loss weights.

    python train.py RECIPE=v4.5.2 DATA_DIR=tokens/mine

The weights of the entropy, sharpness and temporal terms were never published. With those below each of the
three terms starts under a tenth of the whole loss.
"""

# 16.2 GB of activations by count: with 16 GB of GPU memory (P100) set GRADIENT_CHECKPOINTING=True.
MODEL = "convgru"
EMBED_DIM = 256
HIDDEN_DIM = 384
LAYERS = 6
CODEBOOK_INIT = False

BATCH_SIZE = 16
LR = 3e-5
MIN_LR = 1e-6
WARMUP_STEPS = 500
GRAD_CLIP = 0.5
AVERAGE_DECAY = 0.0
SEQ_LEN = 20
SEQ_LEN_MAX = 20
BALANCE = 0.0

AR_GROWTH = "ramp"
AR_START_STEP = 0
AR_RAMP_STEPS = 10_000
AR_LEN_MAX = 18
SS_MIDPOINT_STEP = 10_000
SS_STEEPNESS = 4000.0
SS_MAX_TEACHER_PROB = 0.95
SS_MIN_TEACHER_PROB = 0.15
SELF_FED_GREEDY = True
SELF_FED_TEMPERATURE = 1.0
TOKEN_NOISE = 0.0
LATENT_NOISE = 0.0

CE_WEIGHT = 0.0
LABEL_SMOOTHING = 0.0
NEIGHBOR_WEIGHT = 2.0
NEIGHBOR_KERNEL = 3
NEIGHBOR_EXACT_MIX = 0.3
SEMANTIC_WEIGHT = 3.0
ENTROPY_WEIGHT = 0.05
ENTROPY_FLOOR = 4.5
SHARPNESS_WEIGHT = 0.05
TEMPORAL_WEIGHT = 0.05
PERCEPTUAL_WEIGHT = 0.0
