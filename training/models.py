"""The model, the loss weights and the window loss that the settings of a run select."""

from torch import Tensor, nn

from dataset.token_files import Manifest
from depth.predictor import DepthPredictor
from geometry.physics import MotionConstants
from model_convGru import ConvGRUWorldModel, WorldModelConfig
from model_geometry import GeometryConfig, GeometryWorldModel
from rollout.world_model import WorldModel
from runtime.config import SettingError
from training.convgru_window import convgru_window_loss
from training.geometry_window import geometry_window_loss
from training.train_config import TrainConfig
from training.window_parts import InputConfig, LossWeights, StepLoss, WindowResult
from vq_vae.tokenizer import Tokenizer


def build_model(
    config: TrainConfig, tokenizer: Tokenizer, manifest: Manifest, depth: DepthPredictor | None
) -> WorldModel:
    """The untrained model for these tokens; the geometry model needs `depth`.

    Raises SettingError for an unknown MODEL.
    """
    t, (rows, columns) = tokenizer.config, manifest.latent_size
    if config.model == "convgru":
        model = ConvGRUWorldModel(
            WorldModelConfig(
                codebook_size=t.codebook_size,
                latent_height=rows,
                latent_width=columns,
                embed_dim=config.embed_dim,
                hidden_dim=config.hidden_dim,
                layers=config.layers,
                kernel_size=config.kernel_size,
            ),
            tokenizer,
        )
        model.gradient_checkpointing = config.gradient_checkpointing
        if config.codebook_init:
            model.init_from_codebook()
        return model
    if config.model != "geometry":
        raise SettingError(f"MODEL={config.model}: must be geometry or convgru")
    model = GeometryWorldModel(
        GeometryConfig(
            codebook_size=t.codebook_size,
            latent_height=rows,
            latent_width=columns,
            picture_height=t.height,
            picture_width=t.width,
            vertical_fov_degrees=manifest.vertical_fov_degrees,
            degrees_per_unit=manifest.camera_degrees_per_unit,
            channels=config.channels,
            coarse_channels=config.coarse_channels,
            keyframes=config.keyframes,
            sources=config.sources,
            prior=config.prior,
        ),
        tokenizer,
        depth,
    )
    model.init_from_codebook()
    model.motion_model.constants = MotionConstants(frame_seconds=1 / manifest.fps)
    return model


def trained_parameters(model: nn.Module, parts: str) -> list[nn.Parameter]:
    """The parameters that are trained: those of the `parts`, names separated by commas, or all if it is "".
    The others no longer need gradients. Raises SettingError for a part that the model has not."""
    if parts:
        own = {name: [value] for name, value in model.named_parameters(recurse=False)}
        own |= {name: list(part.parameters()) for name, part in model.named_children()}
        chosen = [part.strip() for part in parts.split(",")]
        for part in chosen:
            if not own.get(part):
                raise SettingError(f"TRAINED_PARTS: no part {part!r}; the model has {', '.join(own)}")
        model.requires_grad_(False)
        for part in chosen:
            for parameter in own[part]:
                parameter.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_weights(config: TrainConfig) -> LossWeights:
    """The weights of the loss terms; each model's window loss uses its own."""
    return LossWeights(
        ce=config.ce_weight,
        label_smoothing=config.label_smoothing,
        neighbor=config.neighbor_weight,
        neighbor_kernel=config.neighbor_kernel,
        neighbor_exact_mix=config.neighbor_exact_mix,
        semantic=config.semantic_weight,
        entropy=config.entropy_weight,
        entropy_floor=config.entropy_floor,
        sharpness=config.sharpness_weight,
        temporal=config.temporal_weight,
        perceptual=config.perceptual_weight,
        adversarial=config.adversarial_weight,
        disoccluded=config.disoccluded_weight,
        magnified=config.magnified_weight,
        cells=config.loss_cells,
    )


def window_loss(
    model: WorldModel,
    step_loss: StepLoss,
    tokens: Tensor,
    actions: Tensor,
    pose: Tensor,
    inputs: InputConfig,
) -> WindowResult:
    """The model's own window loss: tokens [B, T+1, H, W], actions [B, T, 5], pose [B, T+1, 5]."""
    if isinstance(model, GeometryWorldModel):
        return geometry_window_loss(model, step_loss, tokens, actions, pose, inputs)
    return convgru_window_loss(model, step_loss, tokens, actions, inputs)
