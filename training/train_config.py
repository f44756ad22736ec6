"""The settings of a training run, with the values that ship: one field for each constant of train.py.

train.py explains each constant, and a person edits the values there. The values here tell an edited constant
from one that was left alone, and the types say which values are allowed. `used_if` names the MODEL or
AR_GROWTH that a constant is for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from metrics.perceptual import Perceptual
from runtime.config import SettingError, read_recipe, used_if
from runtime.ranges import (
    Layers,
    NonNegative,
    NonNegativeNumber,
    Odd,
    OneOf,
    Positive,
    PositiveNumber,
    PositiveShare,
    Precision,
    Seed,
    Share,
    ShareBelowOne,
    Width,
)
from runtime.run_log import WandbMode

RECIPES = Path(__file__).parent / "recipes"  # NAME.py holds the values of RECIPE=NAME


@dataclass(frozen=True)
class TrainConfig:
    """All settings of train.py. See its constants of the same names, in capitals, for what each means."""

    # files
    data_dir: str = "tokens/default"
    vqvae_ckpt: str = "checkpoints/vqvae.pt"
    depth_ckpt: str = used_if("checkpoints/depth.pt", model="geometry")
    out_dir: str = "runs/world"
    resume: bool = True
    init_from: str = ""
    recipe: str = ""
    # model
    model: Annotated[str, OneOf(("geometry", "convgru"))] = "geometry"
    channels: Width = used_if(64, model="geometry")
    coarse_channels: Width = used_if(96, model="geometry")
    prior: bool = used_if(True, model="geometry")
    keyframes: NonNegative = used_if(64, model="geometry")
    sources: Positive = used_if(3, model="geometry")
    codebook_init: bool = used_if(True, model="convgru")
    embed_dim: Width = used_if(128, model="convgru")
    hidden_dim: Width = used_if(128, model="convgru")
    layers: Layers = used_if(3, model="convgru")
    kernel_size: Odd = used_if(3, model="convgru")
    gradient_checkpointing: bool = used_if(False, model="convgru")
    # optimization
    steps: NonNegative = 30_000
    trained_parts: str = ""
    batch_size: Positive = 8
    lr: PositiveNumber = 1e-3
    min_lr: NonNegativeNumber = 1e-5
    warmup_steps: NonNegative = 200
    weight_decay: NonNegativeNumber = 0.01
    grad_clip: PositiveNumber = 1.0
    average_decay: ShareBelowOne = 0.998
    precision: Precision = "auto"
    device: str = "auto"
    seed: Seed = 1
    # windows
    seq_len: Positive = 12
    seq_len_max: Positive = 12
    seq_len_grow_steps: Positive = 5000
    balance: NonNegativeNumber = 0.5
    # pairs
    pair_share: Share = used_if(0.75, model="geometry")
    pair_batch: Positive = used_if(32, model="geometry")
    pair_pool: Positive = used_if(1536, model="geometry")
    pair_passes: Positive = used_if(4, model="geometry")
    pair_generated: Share = used_if(0.4, model="geometry")
    pair_invented: ShareBelowOne = used_if(0.0, model="geometry")
    recorded_depth: Share = used_if(0.3, model="geometry")
    # curriculum
    ar_growth: Annotated[str, OneOf(("rollout", "ramp"))] = "rollout"
    ar_len_max: NonNegative = 8
    ar_start_step: NonNegative = 0
    ar_step: NonNegative = used_if(2, refuse=True, ar_growth="rollout")
    ar_ramp_steps: NonNegative = used_if(4000, refuse=True, ar_growth="ramp")
    ss_midpoint_step: NonNegative = used_if(6000, refuse=True, ar_growth="ramp")
    ss_steepness: PositiveNumber = used_if(1500.0, refuse=True, ar_growth="ramp")
    ss_max_teacher_prob: Share = used_if(0.95, refuse=True, ar_growth="ramp")
    ss_min_teacher_prob: Share = 0.15
    self_fed_greedy: bool = False
    self_fed_temperature: PositiveNumber = 0.9
    # noise on the input
    token_noise: Share = 0.15
    similar_codes: Share = used_if(0.7, model="geometry")
    latent_noise: NonNegativeNumber = used_if(0.0, model="convgru")
    # loss weights
    ce_weight: NonNegativeNumber = 1.0
    label_smoothing: ShareBelowOne = 0.0
    perceptual_weight: NonNegativeNumber = 0.0
    perceptual: Perceptual = "auto"
    adversarial_weight: NonNegativeNumber = used_if(0.0, model="geometry")
    adversarial_batch: Positive = used_if(8, model="geometry")
    disoccluded_weight: PositiveNumber = used_if(3.0, model="geometry")
    loss_cells: PositiveShare = used_if(0.3, model="geometry")
    masked_decoding: Share = used_if(0.1, model="geometry")
    magnified_weight: PositiveNumber = used_if(2.0, model="geometry")
    motion_steps: NonNegative = used_if(300, model="geometry")
    motion_frames: Positive = used_if(6000, model="geometry")
    neighbor_weight: NonNegativeNumber = used_if(0.0, model="convgru")
    neighbor_kernel: Odd = used_if(3, model="convgru")
    neighbor_exact_mix: Share = used_if(0.3, model="convgru")
    semantic_weight: NonNegativeNumber = used_if(0.0, model="convgru")
    entropy_weight: NonNegativeNumber = used_if(0.0, model="convgru")
    entropy_floor: NonNegativeNumber = used_if(4.5, model="convgru")
    sharpness_weight: NonNegativeNumber = used_if(0.0, model="convgru")
    temporal_weight: NonNegativeNumber = used_if(0.0, model="convgru")
    # logging and saving
    log_steps: Positive = 20
    val_steps: Positive = 500
    val_windows: Positive = 48
    val_rollouts: NonNegative = 16
    picture_steps: Positive = 500
    sensitivity_steps: Positive = 500
    spike_factor: PositiveNumber = 3.0
    save_steps: Positive = 1000
    save_minutes: PositiveNumber = 10.0
    keep: NonNegative = 3
    wandb: WandbMode = "auto"
    wandb_project: str = "project-ochre"

    def __post_init__(self):
        if self.trained_parts and not self.init_from:
            raise SettingError(
                f"TRAINED_PARTS={self.trained_parts}: the other parts would stay untrained; give INIT_FROM"
            )
        if self.pair_invented and not (self.adversarial_weight and self.pair_generated):
            raise SettingError(
                f"PAIR_INVENTED={self.pair_invented}: pairs without a target are generated ones, and an "
                "adversarial loss alone judges them; give PAIR_GENERATED and ADVERSARIAL_WEIGHT above 0"
            )
        if self.ss_min_teacher_prob > self.ss_max_teacher_prob and self.ar_growth == "ramp":
            raise SettingError(
                f"SS_MIN_TEACHER_PROB={self.ss_min_teacher_prob} is above SS_MAX_TEACHER_PROB="
                f"{self.ss_max_teacher_prob}; give a smaller one"
            )


def recipe_config(name: str) -> TrainConfig:
    """The settings of a recipe over the values that ship. Raises SettingError if there is no such recipe."""
    return TrainConfig(**{key.lower(): value for key, value in read_recipe(RECIPES, name).items()})
