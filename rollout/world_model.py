"""What a world model offers to training, rollouts and evaluation; loading and saving one."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from depth.predictor import SHIPPED_DEPTH, DepthPredictor, load_depth
from model_convGru import ConvGRUWorldModel, WorldModelConfig
from model_geometry import GeometryConfig, GeometryWorldModel
from runtime.checkpoint import SHIPPED, CheckpointError, build, content_of, load
from vq_vae.tokenizer import Tokenizer, check_tokenizer

SHIPPED_WORLD = SHIPPED / "world.pt"
WORLD_KIND = "world_model"
ARCHITECTURES = {
    "convgru": (ConvGRUWorldModel, WorldModelConfig),
    "geometry": (GeometryWorldModel, GeometryConfig),
}


class WorldModel(Protocol):
    """A network that predicts the next grid of tokens from the current one and the action.

    The state is the model's own; callers only pass it on. A prediction has `visible_mask` [B, H, W], the
    share of each cell that earlier frames show, or None for a model without warping.
    """

    config: Any
    tokenizer: Tokenizer

    def init_state(self, batch: int, device: torch.device | None = None) -> Any:
        """A state without observations."""

    def predict(
        self,
        tokens: Tensor,
        actions: Tensor,
        state: Any,
        observed: bool = True,
        picture: Tensor | None = None,
        true_pose: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """tokens [B, H, W], actions [B, A] -> the prediction of the next frame and the state after it.

        `observed`: the tokens are recorded, not generated. `picture` [B, 3, Hp, Wp]: the decoded tokens, if
        at hand. `true_pose` [B, 5]: recorded pose, NaN where unknown.
        """

    def logits(self, prediction: Any, cells: Tensor | None = None, trust: Tensor | float = 0.0) -> Tensor:
        """Logits [B, V, H, W] over the codes, or [B, n, V] of the cells [B, n]."""

    def condition_on_tokens(self, prediction: Any, tokens: Tensor, given: Tensor) -> Any:
        """The prediction when the tokens [B, H, W] are given where `given` [B, H, W] is true."""

    def select_worlds(self, state: Any, index: slice) -> Any:
        """The state of some worlds of the batch."""

    def pose_of(self, state: Any) -> Tensor | None:
        """Pose [B, 5] relative to the start of the rollout; None for a model that has none."""


def architecture_of(model: WorldModel) -> str:
    """The name in ARCHITECTURES of a world model's class."""
    return next(name for name, (kind, _) in ARCHITECTURES.items() if isinstance(model, kind))


def world_content(model: WorldModel, **extra) -> dict:
    """The dict that `load_world_model` reads, with `extra` (constants, step, optimizer, RNG, fps, ...)."""
    if isinstance(model, GeometryWorldModel):
        extra["depth"] = model.depth.fingerprint
    return content_of(
        WORLD_KIND,
        model,
        tokenizer=model.tokenizer.fingerprint,
        architecture=architecture_of(model),
        **extra,
    )


def check_depth(content: dict, depth: DepthPredictor, setting: str, path: str | Path) -> None:
    """Raises CheckpointError if the world model's checkpoint `path` was trained with another depth network.

    `setting` is the flag or constant that names the depth network.
    """
    if content.get("depth", depth.fingerprint) != depth.fingerprint:
        raise CheckpointError(
            f"{depth.path}: depth network {depth.fingerprint}, but {path} was trained with "
            f"{content['depth']}; give that network ({setting})"
        )


def load_world_model(
    path: str | Path,
    tokenizer: Tokenizer,
    device: torch.device | str = "cpu",
    depth_ckpt: str | Path = SHIPPED_DEPTH,
    other_depth: bool = False,
) -> tuple[WorldModel, dict]:
    """The world model in `path` in eval mode on `device`, and the checkpoint's whole content.

    Raises CheckpointError if it was trained with another tokenizer or, unless `other_depth`, with another
    depth network, or has an architecture or parameter names that this version does not know.
    """
    content = load(path, WORLD_KIND, needed=("tokenizer",))
    check_tokenizer(
        content["tokenizer"], tokenizer.fingerprint, "the tokenizer checkpoint (--vqvae_ckpt)", str(path)
    )
    architecture = content.get("architecture", "convgru")  # checkpoints before 0.4 do not name it
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: of architecture {architecture!r}, this version knows {sorted(ARCHITECTURES)}; "
            "update the code or give another checkpoint"
        )
    model_class, config_class = ARCHITECTURES[architecture]
    if architecture == "geometry":
        if "depth_head.0.weight" in content["model"] or "code_axes" in content["model"]:
            raise CheckpointError(
                f"{path}: a world model of version 0.5 or 0.6, which had a depth head; convert it once with "
                f"python tools/convert_checkpoint.py {path} NEW.pt"
            )
        depth = load_depth(depth_ckpt, device)
        if not other_depth:
            check_depth(content, depth, "--depth_ckpt", path)
        model = build(lambda config: model_class(config, tokenizer, depth), config_class, content, path)
    else:
        model = build(lambda config: model_class(config, tokenizer), config_class, content, path)
    return model.eval().to(device), content
