"""What the world remembers and believes, as one picture."""

import cv2
import numpy as np
import torch

from geometry import camera
from model_geometry import GeometryWorldModel
from playing.session import Session
from runtime.device import autocast
from runtime.video import enlarge, label

CELL = 4  # pixels for a cell of a panel, half as many for one of the finer depth
MAP_METRES = 24.0  # from the player to the map's edge
OBSERVED, GENERATED, PLAYER = (90, 200, 255), (255, 160, 60), (255, 255, 255)
INK, DARK = (90, 90, 90), (18, 18, 18)


@torch.inference_mode()
def beliefs(session: Session) -> np.ndarray | None:
    """The picture [H, W, 3] uint8, or None for a world that keeps no memory or has made no step yet.

    Four panels, in the view of the last step: the map of the keyframes around the player (what was seen in
    blue, what was generated in orange; a wedge is what a keyframe shows, north up); the distance that each half
    cell is taken to have (near bright, logarithmic); how strongly what was carried holds a cell, 0 dark to
    10 and more bright (`GeometryWorldModel.gates`); and where cells come from: the last frame green, the
    keyframes blue, invented red.
    """
    model, state, prediction = session.rollout.model, session.rollout.state, session.prediction
    if prediction is None or not isinstance(model, GeometryWorldModel):
        return None
    sampling = session.rollout.sampling
    with autocast(session.rollout.device, session.rollout.dtype):
        gates = model.gate_map(prediction, (sampling.trust, sampling.continuation))[0]
    distance = 1 / prediction.inverse_ray_distance[0].float().cpu().numpy()
    near = np.log(camera.FAR_RAY_DISTANCE / distance.clip(1.0, camera.FAR_RAY_DISTANCE)) / np.log(
        camera.FAR_RAY_DISTANCE
    )
    panels = {
        "distance": enlarge(colour(near), CELL // 2),
        "carried: gate": enlarge(colour(gates.float().amax(0).cpu().numpy() / 10), CELL),
        "last / kept / new": enlarge(sources(prediction), CELL),
    }
    column = np.concatenate([label(panel, name) for name, panel in panels.items()])
    kept = int((state.keyframes.order[0] > 0).sum())
    size = column.shape[0] - 16
    around = label(keyframe_map(session, size), f"{kept} keyframes, {MAP_METRES:.0f} m around")
    return np.concatenate([around, column], 1)


def colour(values: np.ndarray) -> np.ndarray:
    """[H, W] of 0..1 -> [H, W, 3] uint8, dark to bright."""
    shade = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(shade, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def sources(prediction) -> np.ndarray:
    """Where the cells of a view come from, [H, W, 3] uint8."""
    by_last, by_memory = prediction.source_mask[0].float().cpu().numpy()
    seen = prediction.visible_mask[0].float().cpu().numpy()
    red = 1 - np.maximum(by_last, by_memory)
    shade = np.stack([red, by_last * seen, by_memory * seen], -1)
    return (60 + 180 * shade).round().astype(np.uint8)


def keyframe_map(session: Session, size: int) -> np.ndarray:
    """The keyframes around the player from above, [size, size, 3] uint8; the player looks along the white
    wedge, +z (south in Minecraft) is down."""
    state, config = session.rollout.state, session.rollout.model.config
    canvas = np.full((size, size, 3), DARK, np.uint8)
    metres = size / 2 / MAP_METRES
    for radius in (8, 16, 24):
        cv2.circle(canvas, (size // 2, size // 2), round(radius * metres), INK, 1, cv2.LINE_AA)
    here = state.pose[0].float().cpu().numpy()
    keyframes, kept = state.keyframes, state.keyframes.order > 0
    wedges = [
        (pose.float().cpu().numpy(), ink_of(generation.item()), 5.0, 0.12)
        for pose, generation in zip(keyframes.pose[kept], keyframes.generation[kept], strict=True)
    ]
    aspect = config.picture_width / config.picture_height
    half = np.arctan(np.tan(np.deg2rad(config.vertical_fov_degrees / 2)) * aspect)  # of the field of view
    for pose, ink, length, filled in [*wedges, (here, PLAYER, 8.0, 0.3)]:
        # Minecraft's yaw 0 looks along +z, which is down here; it grows to the right, clockwise.
        middle = size / 2 + (pose[[0, 2]] - here[[0, 2]]) * metres
        angles = np.deg2rad(pose[3]) + np.linspace(-half, half, 9)
        rim = middle + length * metres * np.stack([-np.sin(angles), np.cos(angles)], 1)
        wedge = np.concatenate([[middle], rim]).round().astype(np.int32)
        fill = cv2.fillPoly(canvas.copy(), [wedge], ink, cv2.LINE_AA)
        canvas = cv2.addWeighted(fill, filled, canvas, 1 - filled, 0)
        cv2.polylines(canvas, [wedge], True, ink, 1, cv2.LINE_AA)
    return canvas


def ink_of(generation: float) -> tuple[int, int, int]:
    """The colour of a keyframe: 0 is one that was observed."""
    return OBSERVED if generation == 0 else GENERATED
