"""The settings of a training run, with the values that ship: one field for each constant of train.py.

train.py explains each constant, and a person edits the values there. The values here tell an edited constant
from one that was left alone. `used_if` names the MODEL or AR_GROWTH that a constant is for.
"""

from dataclasses import dataclass
from pathlib import Path

from runtime.config import read_recipe, used_if

RECIPES = Path(__file__).parent / "recipes"  # NAME.py holds the values of RECIPE=NAME


@dataclass(frozen=True)
class TrainConfig:
    """All settings of train.py. See its constants of the same names, in capitals, for what each means."""

    # files
    data_dir: str = "tokens/luanti"
    vqvae_ckpt: str = "checkpoints/vqvae.pt"
    depth_ckpt: str = used_if("checkpoints/depth.pt", model="geometry")
    out_dir: str = "runs/world"
    resume: bool = True
    init_from: str = ""
    recipe: str = ""
    # model
    model: str = "geometry"
    channels: int = used_if(64, model="geometry")
    coarse_channels: int = used_if(96, model="geometry")
    prior: bool = used_if(True, model="geometry")
    keyframes: int = used_if(64, model="geometry")
    sources: int = used_if(3, model="geometry")
    codebook_init: bool = used_if(True, model="convgru")
    embed_dim: int = used_if(128, model="convgru")
    hidden_dim: int = used_if(128, model="convgru")
    layers: int = used_if(3, model="convgru")
    kernel_size: int = used_if(3, model="convgru")
    gradient_checkpointing: bool = used_if(False, model="convgru")
    # optimization
    steps: int = 30_000
    batch_size: int = 8
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_steps: int = 200
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    average_decay: float = 0.998
    precision: str = "auto"
    device: str = "auto"
    seed: int = 1
    # windows
    seq_len: int = 12
    seq_len_max: int = 12
    seq_len_grow_steps: int = 5000
    balance: float = 0.5
    # pairs
    pair_share: float = used_if(0.75, model="geometry")
    pair_batch: int = used_if(32, model="geometry")
    pair_pool: int = used_if(1536, model="geometry")
    pair_passes: int = used_if(4, model="geometry")
    recorded_depth: float = used_if(0.3, model="geometry")
    # curriculum
    ar_growth: str = "rollout"
    ar_len_max: int = 8
    ar_start_step: int = 0
    ar_step: int = used_if(2, refuse=True, ar_growth="rollout")
    ar_ramp_steps: int = used_if(4000, refuse=True, ar_growth="ramp")
    ss_midpoint_step: int = used_if(6000, refuse=True, ar_growth="ramp")
    ss_steepness: float = used_if(1500.0, refuse=True, ar_growth="ramp")
    ss_max_teacher_prob: float = used_if(0.95, refuse=True, ar_growth="ramp")
    ss_min_teacher_prob: float = 0.15
    self_fed_greedy: bool = False
    self_fed_temperature: float = 0.9
    # noise on the input
    token_noise: float = 0.15
    similar_codes: float = used_if(0.7, model="geometry")
    latent_noise: float = used_if(0.0, model="convgru")
    # loss weights
    ce_weight: float = 1.0
    label_smoothing: float = 0.05
    perceptual_weight: float = 0.0
    perceptual: str = "auto"
    disoccluded_weight: float = used_if(3.0, model="geometry")
    loss_cells: float = used_if(0.3, model="geometry")
    masked_decoding: float = used_if(0.5, model="geometry")
    magnified_weight: float = used_if(2.0, model="geometry")
    motion_steps: int = used_if(300, model="geometry")
    motion_frames: int = used_if(6000, model="geometry")
    neighbor_weight: float = used_if(0.0, model="convgru")
    neighbor_kernel: int = used_if(3, model="convgru")
    neighbor_exact_mix: float = used_if(0.3, model="convgru")
    semantic_weight: float = used_if(0.0, model="convgru")
    entropy_weight: float = used_if(0.0, model="convgru")
    entropy_floor: float = used_if(4.5, model="convgru")
    sharpness_weight: float = used_if(0.0, model="convgru")
    temporal_weight: float = used_if(0.0, model="convgru")
    # logging and saving
    log_steps: int = 20
    val_steps: int = 500
    val_windows: int = 48
    val_rollouts: int = 16
    picture_steps: int = 500
    sensitivity_steps: int = 500
    spike_factor: float = 3.0
    save_steps: int = 1000
    save_minutes: float = 10.0
    keep: int = 3
    wandb: str = "auto"
    wandb_project: str = "project-ochre"


def recipe_config(name: str) -> TrainConfig:
    """The settings of a recipe over the values that ship. Raises SettingError if there is no such recipe."""
    return TrainConfig(**{key.lower(): value for key, value in read_recipe(RECIPES, name).items()})
