"""Motion pretraining: the motion model learns displacements from actions and poses, without pictures."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset import surroundings
from dataset.actions import BLOCKED_METRES, JUMP, MOVE_X, MOVE_Z, horizontal_metres
from geometry.motion import (
    FREE,
    LOW,
    SOLID,
    NodeNetwork,
    PlayerMotion,
)
from geometry.occupancy import POINTS, REACH, SIDE
from geometry.physics import MotionConstants
from training.motion_windows import MotionClips, recorded_nodes

SAMPLES = 4096  # frames whose nodes the network is taught
EVIDENCE_BATCH = 64  # frames whose evidence is computed together
NODE_BATCH, NODE_LEARNING_RATE = 64, 3e-3
HEIGHT_WEIGHT = 0.3  # of nodes more than two below or above the feet's
NEAR_NODES = 2.0  # nodes; at about this distance a node has half the weight of the player's own
OLD_SHARE, OLDEST = 0.7, 40  # share of the samples whose keyframes end some frames ago, and how many at most
EVENT_SHARE, BEFORE_EVENT = 0.5, 16  # share of the samples that precede an event, by at most so many frames
RISING = 0.02  # metres: a step that goes up or down by more is an event
FEW = 20  # a constant is fitted if so many steps tell of it
UNKNOWN_NODE = -1


# What data without poses means for play; printed by train.py.
WITHOUT_POSES = (
    "no clip has poses, so how far a step goes cannot be learned. In play the player {how}. There is no "
    "training on pairs, and collisions cannot be evaluated"
)


def without_poses(motion: PlayerMotion, keep: bool) -> str:
    """Prepares a motion model for data without poses -> what that means for play, in words.

    `keep`: it was trained on other data and stays as it is. Else the player walks on flat ground.
    """
    if not keep:
        motion.sees_nodes.zero_()
    if motion.sees_nodes:
        return WITHOUT_POSES.format(how="moves and stops at walls as in the world that training started from")
    c = motion.constants
    how = (
        f"walks at {c.walk_speed:.2f} m/s on flat ground while a key is held, jumps "
        f"{c.jump_speed**2 / (2 * c.gravity):.2f} m high, and walks through what the picture shows"
    )
    return WITHOUT_POSES.format(how=how)


def pretrain_player_motion(
    motion: PlayerMotion, clips: MotionClips, fov: float, steps: int, seed: int
) -> float:
    """Fits the constants of `motion` to recorded poses and trains its node network on recorded nodes.

    Returns the last cross-entropy of the nodes in nats, NaN if nothing was trained: without nodes the network
    stays as it is.
    """
    motion.constants = fit_constants(
        motion.constants,
        [clips.pose[c] for c in clips.with_pose],
        [clips.actions[c] for c in clips.with_pose],
    )
    if not clips.with_nodes or not steps:
        return math.nan
    evidence, ground, kind = node_samples(motion, clips, fov, min(SAMPLES, NODE_BATCH * steps), seed)
    return train_node_network(motion.node_network, evidence, ground, kind, steps, seed)


def fit_constants(
    start: MotionConstants, poses: Sequence[np.ndarray], actions: Sequence[np.ndarray]
) -> MotionConstants:
    """The constants that recorded poses [K, 5] and actions [K-1, A] tell; the others are those of `start`.

    Each is a median over the steps that depend on it alone: of keys held for long, of free fall, of first
    steps from rest. Where a node begins follows from the heights at which the player stands.
    """
    T = start.frame_seconds
    heights, walks, falls, jumps, starts = [], [], [], [], []
    for pose, action in zip(poses, actions, strict=True):
        level, rise = horizontal_metres(pose), np.diff(pose[:, 1].astype(np.float64))
        keys = np.hypot(action[:, MOVE_X], action[:, MOVE_Z]) > 0.5
        flat = np.abs(rise) < 1e-3
        held = np.convolve(keys & flat, np.ones(6))[: len(keys)] == 6  # this step and the five before it
        walks.append(level[held])
        heights.append(pose[1:, 1][flat & keys])
        air = np.abs(rise) > 0.02
        falls.append(np.diff(rise)[air[1:] & air[:-1] & (np.diff(rise) < 0)])
        jumping = (action[1:, JUMP] > 0.5) & (action[:-1, JUMP] < 0.5) & flat[:-1] & (rise[1:] > 0.1)
        jumps.append(rise[1:][jumping])
        begun = keys[1:] & flat[1:] & ~keys[:-1] & (level[:-1] < 1e-3) & (level[1:] > 0.01)
        starts.append(level[1:][begun])
    if not heights:
        return start
    heights, walks, falls, jumps, starts = map(np.concatenate, (heights, walks, falls, jumps, starts))
    found = {}
    walks = walks[walks > 0.5 * np.quantile(walks, 0.9)] if len(walks) else walks
    if len(walks) >= FEW:
        found["walk_speed"] = float(np.median(walks)) / T
    if len(falls) >= FEW:
        found["gravity"] = -float(np.median(falls)) / T**2
    if len(jumps) >= FEW:
        found["jump_speed"] = float(np.median(jumps)) / T + found.get("gravity", start.gravity) * T / 2
    if len(starts) >= FEW:
        found["ground_acceleration"] = 2 * float(np.median(starts)) / T**2
    if len(heights) >= FEW:
        above = np.mod(heights, 1.0)
        found["lattice"] = (
            0.5 if (np.abs(above - 0.5) < 0.02).mean() > (np.minimum(above, 1 - above) < 0.02).mean() else 0.0
        )
    return replace(start, **found)


def node_samples(
    motion: PlayerMotion, clips: MotionClips, fov: float, count: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames of clips with nodes: what `NodeNetwork.forward` reads, and what it should say.

    Evidence [N, FEATURES, X, Y, Z] (float16), ground [N], and the kind of each node [N, X, Y, Z] int64,
    UNKNOWN_NODE where it is not known.
    """
    rng = np.random.default_rng([seed, 3])
    starts = sample_frames(clips, count, rng)
    # In a rollout the depth is of recorded frames: the farther it goes, the older are the last ones.
    age = rng.integers(0, OLDEST + 1, count) * (rng.random(count) < OLD_SHARE)
    stood = {c: last_stood(clips.pose[c]) for c in clips.with_nodes}
    evidence, ground, kind = [], [], []
    for first in tqdm(range(0, count, EVIDENCE_BATCH), desc="maps", unit="batch", leave=False, mininterval=2):
        part = starts[first : first + EVIDENCE_BATCH]
        windows = clips.windows(part, 1, -age[first : first + EVIDENCE_BATCH])
        pose = windows.pose[:, 0]
        occupancy = motion.occupancy_around(
            windows.inverse_ray_distance, windows.frames, windows.valid, pose, fov
        )
        evidence.append(occupancy.evidence.half())
        under = torch.tensor([stood[clip][frame] for clip, frame in part]) - windows.origin[:, 1]
        ground.append((under - occupancy.lowest[:, 1]).float())
        kind.append(kind_of(recorded_nodes(clips, part, occupancy, windows.origin)))
    return torch.cat(evidence), torch.cat(ground), torch.cat(kind)


def sample_frames(clips: MotionClips, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` frames of clips with nodes, [N, 2] of (clip, frame).

    EVENT_SHARE of them are shortly before a step that something blocks, or that goes up or down.
    """
    frames, events = [], []
    for clip in clips.with_nodes:
        pose = clips.pose[clip].astype(np.float64)
        keys = np.abs(clips.actions[clip][:, [MOVE_X, MOVE_Z]]).max(1) > 0.5
        event = (keys & (horizontal_metres(pose) < BLOCKED_METRES)) | (np.abs(np.diff(pose[:, 1])) > RISING)
        soon = np.convolve(event[::-1], np.ones(BEFORE_EVENT))[: len(event)][::-1] > 0
        rows = np.stack([np.full(len(event), clip), np.arange(len(event))], 1)
        frames.append(rows)
        events.append(rows[soon])
    frames, events = np.concatenate(frames), np.concatenate(events)
    wanted = round(EVENT_SHARE * count) if len(events) else 0
    return np.concatenate(
        [
            events[rng.integers(len(events), size=wanted)],
            frames[rng.integers(len(frames), size=count - wanted)],
        ]
    )


def last_stood(pose: np.ndarray) -> np.ndarray:
    """The height [K] at which the player of poses [K, 5] stood last; at first that of the first frame."""
    still = np.abs(np.diff(pose[:, 1], prepend=pose[0, 1])) < 1e-3
    return pose[np.maximum.accumulate(np.where(still, np.arange(len(pose)), 0)), 1].astype(np.float64)


def kind_of(nodes: Tensor) -> Tensor:
    """Recorded nodes (codes of surroundings.py) -> classes of the node network, UNKNOWN_NODE elsewhere."""
    table = torch.full((5,), UNKNOWN_NODE)
    for code, kind in (
        (surroundings.FREE, FREE),
        (surroundings.LIQUID, FREE),
        (surroundings.SOLID, SOLID),
        (surroundings.LOW, LOW),
    ):
        table[code] = kind
    return table[nodes.long()]


def train_node_network(
    network: NodeNetwork, evidence: Tensor, ground: Tensor, kind: Tensor, steps: int, seed: int
) -> float:
    """Trains on what `node_samples` returns; returns the mean loss of the last tenth of the steps."""
    device = next(network.parameters()).device
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), NODE_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, 1.5 * (1 - s / steps)))
    weight = node_weights(device)
    losses = []
    for _ in tqdm(range(steps), desc="nodes", unit="step", leave=False, mininterval=2):
        index = torch.randint(len(evidence), (NODE_BATCH,), generator=random)
        given, target = mirrored(evidence[index].to(device).float(), kind[index].to(device), random)
        logits = network(given, ground[index].to(device))
        error = F.cross_entropy(logits, target, ignore_index=UNKNOWN_NODE, reduction="none") * weight
        loss = error.sum() / (weight * (target != UNKNOWN_NODE)).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, steps // 10) :]))


def node_weights(device: torch.device) -> Tensor:
    """Weights of the nodes in the loss [X, Y, Z]: what is near the player decides its next steps."""
    away = torch.arange(SIDE, device=device) - REACH
    near = 1 / (1 + (away[:, None, None] ** 2 + away**2) / NEAR_NODES)
    return near * torch.where(away.abs() <= 2, 1.0, HEIGHT_WEIGHT)[:, None]


def mirrored(evidence: Tensor, kind: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same boxes mirrored along x and z and with x and z exchanged, each at random: physics knows no
    direction of the compass."""
    points = evidence.unflatten(1, (2, POINTS, POINTS, POINTS))  # [B, 2, px, py, pz, X, Y, Z]
    for axes, node_axes in (((2, 5), (1,)), ((4, 7), (3,))):
        if torch.rand((), generator=random) < 0.5:
            points, kind = points.flip(axes), kind.flip(node_axes)
    if torch.rand((), generator=random) < 0.5:
        points, kind = points.transpose(2, 4).transpose(5, 7), kind.transpose(1, 3)
    return points.flatten(1, 4), kind
