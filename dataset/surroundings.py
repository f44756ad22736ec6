"""Depth and the nodes around the player, recorded by the game beside each picture.

There are two measures of depth:

- axial depth: metres along the camera's axis (its z). A depth buffer stores a function of it.
- ray distance: metres from the eye along a pixel's ray, equal to axial depth / cosine of the angle between
  ray and axis. It does not change while the camera only turns. This project uses its inverse, in 1/m.

depth/NAME.npz beside a clip's video/NAME.mp4 has, for the clip's K frames:

- `log_inverse` [K, H/4, W/4] uint8: the inverse ray distance at the centre of each 4x4 block of the H x W
  picture, in the code of `encode_inverse_ray_distance`; 0 is the sky
- `nodes` [K, 7, 7, 7] uint8, optional: the content of each node of a box around the player, indexed [x, y,
  z]: UNKNOWN, FREE, LIQUID, SOLID or LOW
- `origin` [K, 3] int32, with `nodes`: the coordinates [x, y, z] of the box's lowest node

Nodes are cubes of 1 m. Axes and units are those of the clip's `pos` (Minecraft's convention, y up): the
centre of nodes[k, i, j, l] is at origin[k] + [i, j, l]. The player's feet are in nodes[k, 3, 3, 3].
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.arrays import ArraysError, read_arrays
from runtime.errors import UserError

BLOCK = 4  # side in pixels of the blocks of the recorded picture that share one ray distance
NEAREST, FARTHEST = 1 / 8, 200.0  # metres, the range of codes
SKY = 0  # the code of everything farther: sky and clouds
RANGE = math.log(FARTHEST / NEAREST)
SCALE = {"nearest_m": NEAREST, "farthest_m": FARTHEST, "sky": SKY}  # as written to the manifest

REACH = 3  # nodes from the player's feet to the box's faces
BOX = (2 * REACH + 1,) * 3
UNKNOWN, FREE, LIQUID, SOLID, LOW = range(5)  # LOW: an obstacle that fills a part of its cube: snow, stairs


class SurroundingsError(UserError):
    """A depth file that is missing, broken, or does not fit its clip. Names the file."""


@dataclass(frozen=True)
class Surroundings:
    """The content of a depth file, see above. `nodes` and `origin` are both given or both None."""

    log_inverse: np.ndarray  # [K, h, w] uint8
    nodes: np.ndarray | None = None  # [K, 7, 7, 7] uint8
    origin: np.ndarray | None = None  # [K, 3] int32

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, as in the file."""
        every = {"log_inverse": self.log_inverse, "nodes": self.nodes, "origin": self.origin}
        return {name: array for name, array in every.items() if array is not None}


# ------------------------------------------------------------ depth


def encode_inverse_ray_distance(inverse: np.ndarray) -> np.ndarray:
    """Inverse ray distances (1/m, any shape) -> codes, uint8: linear in the logarithm, 2.9 % per step.

    SKY is FARTHEST and farther, 1 is one step nearer, 255 is NEAREST and nearer.
    """
    steps = np.log(np.maximum(inverse, 1 / FARTHEST) * FARTHEST) * (255 / RANGE)
    return np.minimum(np.rint(steps), 255).astype(np.uint8)


def decode_inverse_ray_distance(codes: np.ndarray) -> np.ndarray:
    """Codes (uint8, any shape) -> inverse ray distances in 1/m, float32; 0 for SKY (infinitely far).

    exp(code / 255 * (ln 8 - ln 1/200) + ln 1/200) for codes of at least 1.
    """
    table = np.exp(np.arange(256) * (RANGE / 255)) / FARTHEST
    table[SKY] = 0.0
    return table.astype(np.float32)[codes]


def inverse_axial_depth(buffer: np.ndarray, near: float, far: float) -> np.ndarray:
    """Values of an OpenGL depth buffer (0..1, perspective, any shape) -> inverse axial depths in 1/m.

    `near` and `far` are the clipping planes in metres. Axial depth = near far / (far - d (far - near)).
    """
    return (far - buffer.astype(np.float64) * (far - near)) / (near * far)


def centre_of_block(inverse: np.ndarray) -> np.ndarray:
    """Inverse axial depths [..., 4] of the four pixels around a block's centre -> the centre's [...].

    It is the median: inverse axial depth is linear over a flat surface, so the median is exact there. Where
    the two middle values differ by more than a tenth, an edge passes between them and the nearer one is
    used: their mean would be the depth of neither surface.
    """
    ordered = np.sort(inverse, axis=-1)
    farther, nearer = ordered[..., 1], ordered[..., 2]
    return np.where(nearer > 1.1 * farther, nearer, (farther + nearer) / 2)


# ------------------------------------------------------------ files


def write_surroundings(path: Path, content: Surroundings) -> None:
    """Writes a depth file. This is not atomic: give a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.savez_compressed(file, **content.arrays())


def read_surroundings(path: Path, frames: int | None = None) -> Surroundings:
    """Reads a depth file. Raises SurroundingsError if it is missing or broken, or has not `frames` frames."""
    try:
        arrays = read_arrays(path, (), ("log_inverse", "nodes", "origin"))
    except FileNotFoundError:
        raise SurroundingsError(f"{path}: no such depth file; record the clip again") from None
    except ArraysError as error:
        raise SurroundingsError(f"{error}; record the clip again") from None
    types = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    depth = arrays.get("log_inverse")
    count = len(depth) if depth is not None and depth.ndim else 0
    expected = {"nodes": ("uint8", (count, *BOX)), "origin": ("int32", (count, 3))}
    if (
        depth is None
        or depth.dtype != np.uint8
        or depth.ndim != 3
        or any(types.get(name, expected[name]) != expected[name] for name in expected)
        or ("nodes" in arrays) != ("origin" in arrays)
    ):
        raise SurroundingsError(
            f"{path}: expected log_inverse uint8 [K, h, w] and, with nodes, nodes uint8 "
            f"[K, {', '.join(map(str, BOX))}] and origin int32 [K, 3], found {types}; record the clip again"
        )
    if frames is not None and count != frames:
        raise SurroundingsError(
            f"{path}: {count} frames, its clip has {frames}; depth and clip are of different recordings, "
            "record the clip again"
        )
    return Surroundings(**arrays)
