"""Depth of recorded frames as a world model sees it at play: predicted from decoded tokens."""

import numpy as np
import torch
from tqdm import tqdm

from dataset.surroundings import encode_inverse_ray_distance
from dataset.windows import TokenClips
from model_geometry import GeometryWorldModel
from training.motion_windows import MotionClips, observed_keyframes

BATCH = 32  # frames


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
        for part in np.array_split(kept, -(-len(kept) // BATCH)):
            tokens = torch.from_numpy(clips.tokens[clip][part].astype(np.int64)).to(device)
            pitch = torch.from_numpy(pose[part, 4]).float().to(device)
            inverse = model.predict_depth(model.tokenizer.decode(tokens), pitch)
            codes[part] = encode_inverse_ray_distance(inverse.cpu().numpy())
        depth[clip] = codes
        left -= len(kept)
        bar.update(len(kept))
    bar.close()
    nodes, origin = (clips.extras.get(name) for name in ("nodes", "origin"))
    return MotionClips(clips.actions, clips.pose, depth, nodes, origin)
