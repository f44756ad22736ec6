"""A small voxel world, and a player that walks in it: actions, poses, depth and nodes as a clip has them."""

import numpy as np
import torch

from dataset.actions import JUMP, MOVE_X, MOVE_Z, YAW
from dataset.surroundings import FREE, REACH, SOLID, encode_inverse_ray_distance
from geometry import camera
from geometry.motion import to_world
from geometry.physics import Body, MotionConstants, Nodes, advance
from training.motion_windows import MotionClips

SIZE, HEIGHT, GROUND = 24, 10, 4  # nodes; those below GROUND are solid
FOV = 70.0
FAR, MARCH = 8.0, 0.125  # metres: farthest surface that is found, and step along a ray
C = MotionConstants()


def world(rng: np.random.Generator) -> np.ndarray:
    """Solid nodes [X, Y, Z] bool: flat ground, blocks and pillars on it, a high wall around all."""
    solid = np.zeros((SIZE, HEIGHT, SIZE), bool)
    solid[:, :GROUND] = True
    for height, count in ((1, 12), (3, 16)):
        x, z = rng.integers(1, SIZE - 1, (2, count))
        solid[x, GROUND : GROUND + height, z] = True
    for edge in (0, -1):
        solid[edge, : GROUND + 4] = solid[:, : GROUND + 4, edge] = True
    return solid


def clip(rng: np.random.Generator, frames: int) -> dict[str, np.ndarray]:
    """actions [K-1, 5], pose [K, 5], depth [K, 18, 32], nodes [K, 7, 7, 7] and origin [K, 3] of one walk.

    Keys are held for half a second to two and a half; mostly forward.
    """
    solid = world(rng)
    places = np.argwhere(~solid[:, GROUND])
    x, z = places[rng.integers(len(places))]
    body = Body(np.array([[x, GROUND - 0.5, z]], float), np.zeros((1, 3)), np.ones(1, bool))
    yaw, pose, actions = rng.uniform(0, 360), [], []
    nodes = Nodes(solid[None].astype(float), np.full((1, 3), -0.5))
    left, keys, turn = 0, (0.0, 0.0, 0.0), 0.0
    for _ in range(frames):
        pose.append([*body.feet[0], yaw, 10.0])
        if left == 0:
            left = rng.integers(8, 40)
            keys = [(0, 0, 1), (0, 0, 1), (0, 0, 1), (1, 0, 0), (0, 0, -1), (0, 0, 0), (0, 1, 1)][
                rng.integers(7)
            ]
            turn = rng.choice([0.0, 0.0, 2.0, -2.0, 8.0, -8.0])
        left -= 1
        yaw += turn
        action = np.zeros(5, np.float32)
        action[[MOVE_X, JUMP, MOVE_Z]], action[YAW] = keys, turn / 15
        actions.append(action)
        level = torch.tensor([[float(keys[0]), 0.0, float(keys[2])]], dtype=torch.float64)
        wanted = C.walk_speed * to_world(level, torch.tensor([yaw], dtype=torch.float64)).numpy()[:, ::2]
        body = advance(body, wanted, np.array([keys[1] > 0]), nodes, C)
    pose = np.array(pose, np.float32)
    corner = np.floor(pose[:, :3] + 0.5 + [0, 0.01, 0]).astype(np.int32) - REACH
    padded = np.pad(solid, REACH + 1, constant_values=False)
    boxes = [padded[x : x + 7, y : y + 7, z : z + 7] for x, y, z in (corner + REACH + 1).tolist()]
    return {
        "actions": np.array(actions[:-1]),
        "pose": pose,
        "depth": encode_inverse_ray_distance(depth(solid, pose)),
        "nodes": np.where(boxes, SOLID, FREE).astype(np.uint8),
        "origin": corner,
    }


def depth(solid: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Inverse ray distances [K, 18, 32] in 1/m, by small steps along each ray."""
    turn = camera.rotation(torch.from_numpy(pose[:, 3]), torch.from_numpy(pose[:, 4]))
    rays = torch.einsum("kij,hwj->khwi", turn, camera.rays(18, 32, FOV)).numpy() * [-1, -1, 1]
    eye = pose[:, None, None, :3] + [0, C.eye_height, 0]
    found = np.zeros(rays.shape[:-1])
    for distance in np.arange(FAR, 0, -MARCH):
        node = np.rint(eye + distance * rays).astype(int)
        inside = ((node >= 0) & (node < solid.shape)).all(-1)
        x, y, z = np.where(inside[..., None], node, 0).reshape(-1, 3).T
        found[inside & solid[x, y, z].reshape(inside.shape)] = 1 / (distance - MARCH / 2)
    return found


def motion_clips(seed: int, count: int, frames: int) -> MotionClips:
    """Several walks, each in a world of its own."""
    rng = np.random.default_rng(seed)
    parts = [clip(rng, frames) for _ in range(count)]
    return MotionClips(
        *([part[name] for part in parts] for name in ("actions", "pose", "depth", "nodes", "origin"))
    )
