"""Training pairs whose sources the model generated: a rollout between keyframes, along a recorded path.

At play, keyframes are soon made from keyframes that were themselves generated. Each generation loses some
detail, and a model that has only seen recorded sources cannot bring it back. Here a chain of frames follows
the recorded poses, each as far from the one before as a keyframe at play. Each frame is generated from those
before it, and the recorded frame there is the target. So the model learns to restore what it loses itself.

Disoccluded cells take the recorded tokens: what the model invents there has no recorded continuation. In a
share of the chains they keep what the model invented. Their later frames have no target, and an adversarial
loss alone judges them.
"""

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from dataset.windows import TokenClips
from geometry import camera
from geometry.keyframes import NEW_GENERATED_DEGREES, NEW_GENERATED_METRES, VISIBLE, distance
from geometry.warping import SourceFrames
from model_geometry import GENERATION_MAX, GeometryWorldModel, ViewInput
from rollout.sampling import PLAY, correlated_noise, sample_tokens
from training.pairs import NO_TARGET, compose_input, join_pairs, to_half

CHAIN_STEPS = 12  # generated frames of a chain, so pairs of it
CHAINS = 8  # that are made at once
GENERATED_PAIRS = CHAINS * CHAIN_STEPS  # so many pairs are made at once
SPACING = 0.4, 1.6  # distance of a chain's frames, over that of keyframes at play
DrawScene = Callable[[np.random.Generator], tuple[int, int, int]]  # -> (clip, first frame, end)
TRIES = 20  # scenes that are drawn for a chain until one has enough movement


def chain_frames(pose: np.ndarray, spacing: float) -> np.ndarray:
    """The frames of a chain along poses [T, 5] (metres, degrees): the first, and each that is farther from
    the chain's last one than `spacing` times the distance of keyframes; at most 1 + CHAIN_STEPS."""
    chosen, poses = [0], torch.from_numpy(pose)
    while len(chosen) <= CHAIN_STEPS:
        metres, degrees = distance(poses[chosen[-1] + 1 :], poses[chosen[-1]])
        far = (metres > spacing * NEW_GENERATED_METRES) | (degrees > spacing * NEW_GENERATED_DEGREES)
        if not far.any():
            break
        chosen.append(chosen[-1] + 1 + int(far.int().argmax()))
    return np.array(chosen)


@torch.no_grad()
def make_generated_pairs(
    model: GeometryWorldModel,
    clips: TokenClips,
    draw_scene: DrawScene,
    rng: np.random.Generator,
    invented: float = 0.0,
) -> tuple[ViewInput, Tensor]:
    """GENERATED_PAIRS pairs, in half precision on the CPU: inputs and targets.

    In the share `invented` of the chains the model invents the disoccluded cells. After such a chain's first
    frame, targets are NO_TARGET.

    A chain that ends early repeats its last frame.
    """
    device, g = next(model.parameters()).device, model.config
    K = 1 + g.sources
    scenes, frames = [], []
    for _ in range(CHAINS):
        for _ in range(TRIES):
            clip, start, end = draw_scene(rng)
            chain = start + chain_frames(clips.pose[clip][start:end], rng.uniform(*SPACING))
            if len(chain) == 1 + CHAIN_STEPS:
                break
        scenes.append(clip)
        frames.append(np.pad(chain, (0, 1 + CHAIN_STEPS - len(chain)), mode="edge"))

    def of_chains(array: list[np.ndarray], index: list[np.ndarray]) -> np.ndarray:
        return np.stack([array[clip][i] for clip, i in zip(scenes, index, strict=True)])

    true_tokens = torch.from_numpy(of_chains(clips.tokens, frames).astype(np.int64)).to(device)
    poses = torch.from_numpy(of_chains(clips.pose, frames)).double()
    before = torch.from_numpy(of_chains(clips.pose, [np.maximum(f - 1, 0) for f in frames])).double()
    before = camera.relative_to(before, poses[:, :1]).float().to(device)
    poses = camera.relative_to(poses, poses[:, :1]).float().to(device)
    actions = torch.from_numpy(of_chains(clips.actions, [np.maximum(f - 1, 0) for f in frames]))
    actions = actions.float().to(device)

    invents = torch.from_numpy(rng.random((CHAINS, 1, 1)) < invented).to(device)
    sharp = torch.ones(true_tokens[:, 0].shape, device=device)
    made = [observe(model, true_tokens[:, 0], poses[:, 0], sharp)]
    parts = []
    for step in range(1, 1 + CHAIN_STEPS):
        # The last frame, and some of those before it.
        chosen, usable = np.full((CHAINS, K), step - 1), np.zeros((CHAINS, K), bool)
        usable[:, 0] = True
        for i in range(CHAINS):
            others = rng.permutation(step - 1)[: rng.integers(K)]
            chosen[i, 1 : 1 + len(others)], usable[i, 1 : 1 + len(others)] = others, True
        chosen = torch.from_numpy(chosen).to(device)
        rows = torch.arange(CHAINS, device=device)[:, None]
        sources = SourceFrames(
            **{
                f.name: torch.stack([getattr(m, f.name) for m in made], 1)[rows, chosen].flatten(0, 1)
                for f in fields(SourceFrames)
            }
        )
        inputs = compose_input(
            model,
            sources,
            torch.from_numpy(usable).to(device),
            chosen.float().clamp(max=GENERATION_MAX),
            poses[:, step],
            before[:, step],
            actions[:, step],
            torch.zeros(CHAINS, device=device),
        )
        target = true_tokens[:, step]
        if step > 1:
            target = target.masked_fill(invents, NO_TARGET)
        parts.append((to_half(inputs), target.to(torch.int16).cpu()))
        prediction = model.predict_from_view(inputs)
        noise = torch.special.ndtr(correlated_noise(true_tokens[:, step].shape, device=device))
        tokens = sample_tokens(model, prediction, PLAY, noise)
        kept = (prediction.visible_mask > VISIBLE) | invents
        tokens = torch.where(kept, tokens, true_tokens[:, step])
        made.append(observe(model, tokens, poses[:, step], prediction.resolution_after(inputs.exact)))
    return join_pairs(parts)


def observe(model: GeometryWorldModel, tokens: Tensor, pose: Tensor, resolution: Tensor) -> SourceFrames:
    """Frames of tokens [B, H, W] at `pose` [B, 5], with predicted depth and the `resolution` [B, H, W]."""
    picture = model.tokenizer.decode(tokens).float()
    return SourceFrames(picture, tokens, model.predict_depth(picture, pose[:, 4]), pose, resolution)
