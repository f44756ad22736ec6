"""Motion pretraining: the motion model learns displacements from actions and poses, without pictures."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset.windows import TokenClips
from geometry.motion import REST_METRES, Motion, displacement_between
from model_geometry import GeometryWorldModel

BATCH, FRAMES = 64, 32  # windows, and their frames
CONTEXT = 6  # frames with true displacements before a window is self-fed
LEARNING_RATE = 2e-3
LINEAR_BEYOND = 0.05  # metres: a larger error of the displacement counts linearly
REST_WEIGHT = 0.05  # of the rest classification, relative to an error in metres


def pretrain_motion(model: GeometryWorldModel, clips: TokenClips, steps: int, seed: int) -> float:
    """Trains `motion_gru` and `motion_head`; returns the last step's mean error in metres.

    Every second batch is self-fed after CONTEXT frames: it is given the predicted displacements, as in a
    rollout. Returns NaN if no clip has poses or `steps` is 0.
    """
    rng, device = np.random.default_rng([seed, 2]), next(model.parameters()).device
    usable = [c for c, pose in enumerate(clips.pose) if len(pose) > FRAMES and np.isfinite(pose).all()]
    if not usable or not steps:
        return math.nan
    motion = model.motion_model
    parameters = [*motion.motion_gru.parameters(), *motion.motion_head.parameters()]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    for step in tqdm(range(steps), desc="motion", unit="step", leave=False, mininterval=2):
        actions, targets = [], []
        for clip in rng.choice(usable, BATCH):
            start = rng.integers(len(clips.pose[clip]) - FRAMES)
            pose = torch.from_numpy(clips.pose[clip][start : start + FRAMES + 1]).double()
            targets.append(displacement_between(pose[:-1], pose[1:]).float())
            actions.append(torch.from_numpy(clips.actions[clip][start : start + FRAMES]))
        actions, targets = torch.stack(actions, 1).to(device), torch.stack(targets, 1).to(device)  # [T, B, .]
        last, state = torch.zeros_like(targets[0]), model.init_state(BATCH, device, keyframes=0).motion
        predicted, errors = [], []
        for t in range(FRAMES):
            found, state = model.predict_motion(actions[t], last, state)
            predicted.append(found.mode.detach())
            errors.append(motion_loss(found, targets[t]))
            last = predicted[-1] if step % 2 and t >= CONTEXT else targets[t]
        error = torch.stack(errors).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return float((torch.stack(predicted) - targets).norm(dim=-1).mean())


def motion_loss(predicted: Motion, target: Tensor) -> Tensor:
    """Loss [B] of a predicted displacement against the true one [B, 3].

    Smooth L1 where the player moved by REST_METRES or more, and everywhere the binary cross-entropy of
    whether the player rests.
    """
    rests = target.norm(dim=1) < REST_METRES
    error = F.smooth_l1_loss(predicted.displacement, target, reduction="none", beta=LINEAR_BEYOND).sum(1)
    rest = F.binary_cross_entropy_with_logits(predicted.rest_logit, rests.float(), reduction="none")
    return error * ~rests + REST_WEIGHT * rest
