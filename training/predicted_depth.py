"""Depth of recorded frames as a world model sees it at play: predicted from decoded tokens."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.surroundings import encode_inverse_ray_distance
from dataset.windows import TokenClips
from depth.predictor import DepthPredictor
from model_geometry import GeometryWorldModel
from training.motion_windows import MotionClips, observed_keyframes

BATCH = 32  # frames


@torch.no_grad()
def fill_predicted_depth(
    codes: np.ndarray,
    frames: np.ndarray,
    tokens: np.ndarray,
    pose: np.ndarray,
    decode: Callable[[Tensor], Tensor],
    predictor: DepthPredictor,
    bar: tqdm,
    device: torch.device | str = "cpu",
) -> None:
    """Predicts the depth of some frames of a clip into `codes` [K, h, w] uint8 (surroundings.py).

    `frames` [N]: their indices; tokens [K, H, W] and pose [K, 5] are the clip's; `decode` takes tokens on
    `device` to pictures.
    """
    for part in np.array_split(frames, -(-len(frames) // BATCH)):
        pictures = decode(torch.from_numpy(tokens[part].astype(np.int64)).to(device))
        pitch = torch.from_numpy(pose[part, 4]).float().to(device)
        inverse = predictor.predict_at(pictures, pitch, codes.shape[1:])
        codes[part] = encode_inverse_ray_distance(inverse.cpu().numpy())
        bar.update(len(part))


@torch.no_grad()
def motion_clips(model: GeometryWorldModel, clips: TokenClips, frames: int, seed: int) -> MotionClips:
    """Clips for the motion model: all poses and actions, and the predicted depth of the keyframes of some
    clips, drawn until they have `frames` keyframes.

    The nodes are those of the extras "nodes" and "origin" of `clips`, where they were loaded.
    """
    device, H, W = next(model.parameters()).device, model.config.latent_height, model.config.latent_width
    depth: list[np.ndarray | None] = [None] * len(clips.tokens)
    left = frames
    bar = tqdm(total=frames, desc="depth for the motion model", unit="frame", leave=False, mininterval=2)
    for clip in np.random.default_rng([seed, 3]).permutation(len(clips.tokens)):
        pose = clips.pose[clip]
        if left <= 0:
            break
        if not np.isfinite(pose).all():
            continue
        kept = observed_keyframes(pose)
        codes = np.zeros((len(pose), 2 * H, 2 * W), np.uint8)
        fill_predicted_depth(
            codes, kept, clips.tokens[clip], pose, model.tokenizer.decode, model.depth, bar, device
        )
        depth[clip] = codes
        left -= len(kept)
    bar.close()
    nodes, origin = (clips.extras.get(name) for name in ("nodes", "origin"))
    return MotionClips(clips.actions, clips.pose, depth, nodes, origin)
