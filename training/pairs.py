"""Training pairs: a recorded frame, and the view of it composed from earlier frames of the same clip.

At play a view is composed from keyframes that may be 100 frames old, three times magnified and half missing.
Windows of consecutive frames show nothing like it; pairs do, and need no backpropagation through time.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dataset.surroundings import FARTHEST, decode_inverse_ray_distance
from dataset.windows import TokenClips
from geometry import camera
from geometry.keyframes import GENERATED_PENALTY, RESAMPLED_PENALTY
from geometry.motion import displacement_between
from geometry.warping import SourceFrames, compose_view
from model_geometry import GENERATION_MAX, GeometryWorldModel, ViewInput
from training.window_parts import CLEAN_SHARE, SIMILAR_COUNT, corrupt_tokens

SCENE_SOURCES, SCENE_PAIRS = 12, 24  # frames of a scene that serve as sources, and pairs made of them
NEAREST_GAP, FARTHEST_GAP = 8, 128  # frames from the first source to the view: up to the first in half of the
NEAR_SHARE = 0.5  # ... pairs, and in the others up to the second, on a logarithmic scale
NO_TARGET = -1  # the target's tokens where no frame was recorded that could be one


@dataclass(frozen=True)
class PairConfig:
    """What pairs are made of, and how often they are used."""

    batch: int
    size: int  # pairs of a round
    passes: int = 4  # how often each pair is used
    recorded_depth: float = 0.0  # share of the scenes warped by recorded depth, where there is any
    generated: float = 0.0  # share of the pairs whose sources the model generates
    invented: float = 0.0  # share of those in whose chains the model invents the disoccluded cells
    token_noise: float = 0.0  # each source's share of corrupted tokens is uniform in 0..this
    similar_share: float = 0.0  # share of the corrupted tokens that are replaced by similar codes


@torch.no_grad()
def make_pairs(
    model: GeometryWorldModel,
    clips: TokenClips,
    scene: tuple[int, int, int],
    config: PairConfig,
    rng: np.random.Generator,
) -> tuple[ViewInput, Tensor]:
    """SCENE_PAIRS pairs of a scene (clip, start, end), in half precision on the CPU: inputs and targets.

    Each view is composed from 1 to 1 + `config.sources` frames before it. The first one takes the place of
    the last frame of a rollout, the others that of the keyframes.
    """
    clip, start, end = scene
    device, g, K = next(model.parameters()).device, model.config, 1 + model.config.sources
    count = min(SCENE_SOURCES, end - start - 1)
    frames = start + np.sort(rng.choice(end - start - 1, count, replace=False))
    # Which sources, and which frame, for each pair.
    chosen, targets = np.zeros((SCENE_PAIRS, K), int), np.zeros(SCENE_PAIRS, int)
    usable = np.zeros((SCENE_PAIRS, K), bool)
    for i in range(SCENE_PAIRS):
        first = int(rng.integers(count))
        if rng.random() < NEAR_SHARE:
            gap = int(rng.integers(1, NEAREST_GAP + 1))
        else:
            gap = round(NEAREST_GAP * (FARTHEST_GAP / NEAREST_GAP) ** rng.random())
        targets[i] = min(frames[first] + gap, end - 1)
        others = [k for k in range(count) if frames[k] < targets[i] and k != first]
        others = rng.permutation(others)[: int(rng.integers(K))].astype(int)
        chosen[i, 0], chosen[i, 1 : 1 + len(others)] = first, others
        usable[i, : 1 + len(others)] = True

    tokens = torch.from_numpy(clips.tokens[clip][frames].astype(np.int64)).to(device)
    given, level = corrupt_tokens(
        tokens[:, None],
        g.codebook_size,
        config.token_noise,
        CLEAN_SHARE,
        model.code_space.similar_codes(SIMILAR_COUNT),
        config.similar_share,
    )
    given = given[:, 0]
    pictures = model.tokenizer.decode(given)
    pose = torch.from_numpy(clips.pose[clip][np.r_[frames, targets, targets - 1]]).double()
    pose = camera.relative_to(pose, pose[:1]).float().to(device)
    pose, pose_to, before = pose.split([count, SCENE_PAIRS, SCENE_PAIRS])
    recorded = clips.extras["depth"][clip] if "depth" in clips.extras else None
    if recorded is not None and rng.random() < config.recorded_depth:
        inverse = torch.from_numpy(decode_inverse_ray_distance(recorded[frames])).to(device)
        inverse = inverse.clamp(min=1 / FARTHEST)
    else:
        inverse = model.predict_depth(pictures, pose[:, 4])

    index = torch.from_numpy(chosen).to(device).flatten()
    sharp = torch.ones(index.shape + given.shape[1:], device=device)
    sources = SourceFrames(pictures[index].float(), given[index], inverse[index], pose[index], sharp)
    # Some first sources count as generated, so that the network sees both.
    generation = torch.from_numpy(rng.integers(0, 3, (SCENE_PAIRS, K)) * (rng.random((SCENE_PAIRS, 1)) < 0.5))
    inputs = compose_input(
        model,
        sources,
        torch.from_numpy(usable).to(device),
        generation.float().to(device),
        pose_to,
        before,
        torch.from_numpy(clips.actions[clip][targets - 1]).float().to(device),
        level[index.view(SCENE_PAIRS, K)[:, 0]],
    )
    target = torch.from_numpy(clips.tokens[clip][targets].astype(np.int16))
    return to_half(inputs), target


def compose_input(
    model: GeometryWorldModel,
    sources: SourceFrames,
    usable: Tensor,
    generation: Tensor,
    pose: Tensor,
    pose_before: Tensor,
    actions: Tensor,
    level: Tensor,
) -> ViewInput:
    """The network's input for the views at `pose` [B, 5], composed from B*K sources as a rollout does it.

    usable [B, K] bool; generation [B, K] of the sources, 0: observed; the first of them is the last frame.
    `pose_before` [B, 5] of the frame before the view, and the `actions` [B, A] between them; level [B], see
    `ViewInput`.
    """
    penalty = GENERATED_PENALTY * generation
    penalty[:, 0] = RESAMPLED_PENALTY * (generation[:, 0] > 0)
    fov = model.config.vertical_fov_degrees
    view = compose_view(sources, usable, penalty, pose, model.ground(pose), fov)
    cells = generation[:, :, None, None].expand(-1, -1, *view.source.shape[1:])
    return model.encode_view(
        view,
        cells.gather(1, view.source[:, None])[:, 0].clamp(max=GENERATION_MAX),
        pose,
        actions,
        displacement_between(pose_before, pose),
        generation[:, 0] == 0,
        level,
    )


def has_no_target(target: Tensor) -> Tensor:
    """Which samples of targets [B, H, W] have none: [B] bool."""
    return target[:, 0, 0] == NO_TARGET


def to_half(inputs: ViewInput) -> ViewInput:
    """In half precision on the CPU: 33 kB a pair."""
    return ViewInput(**{f.name: getattr(inputs, f.name).half().cpu() for f in fields(ViewInput)})


def join_pairs(parts: list[tuple[ViewInput, Tensor]]) -> tuple[ViewInput, Tensor]:
    """All pairs of the parts, in order: inputs and targets."""
    inputs, targets = zip(*parts, strict=True)
    joined = {f.name: torch.cat([getattr(part, f.name) for part in inputs]) for f in fields(ViewInput)}
    return ViewInput(**joined), torch.cat(targets)
