"""The overlay of F4: keyframes, depth and sources of the last step, as one picture."""

import cv2
import numpy as np
import torch

from geometry import camera
from geometry.keyframes import VISIBLE
from model_geometry import GeometryWorldModel, Prediction
from playing.session import Session
from runtime.device import autocast
from runtime.video import enlarge

CELL = 6  # pixels for a grid cell of a panel; distance has two values per cell and side
LEGEND_HEIGHT = 17  # of a line of text
MAP_METRES = 24.0  # from the player to the edge of the map
GATE_MAX = 10.0  # of the colour scale
Colour = tuple[int, int, int]
WHITE, NEAR, FAR = (255, 255, 255), (252, 180, 60), (150, 70, 160)  # texts; near and far in the colour scale
OBSERVED, GENERATED, PLAYER = (90, 200, 255), (255, 160, 60), WHITE  # keyframes and player
LAST_FRAME, KEYFRAMES, DISOCCLUDED = (60, 240, 60), (60, 60, 240), (240, 60, 60)  # sources of cells
BLOCKED, LOW, DROP = (240, 60, 60), (240, 200, 60), (60, 90, 240)  # nodes around the player
NODE = 9  # pixels for a node of the map of what blocks
LINE, BACKGROUND = (90, 90, 90), (18, 18, 18)


@torch.inference_mode()
def overlay(session: Session) -> np.ndarray | None:
    """The overlay [H, W, 3] uint8; None before the first step and for a model without keyframes.

    Left, a map of the keyframes around the player, seen from above, and in its corner the nodes around the
    player: what blocks, what is low enough to step on, where the ground drops by more than a node. Right,
    from top to bottom, each under a title in a player's words and a legend:

    - distance: the predicted ray distance of the frame that the step started from, logarithmic;
    - memory: the gate of each cell (`GeometryWorldModel.gate_map`), that is the weight of the composed view
      in the logits, 0 dark to GATE_MAX bright;
    - origin: the source of each cell: the last frame, the keyframes, or none (disoccluded); darker where the
      source shows less of the cell.
    """
    model, state, prediction = session.rollout.model, session.rollout.state, session.prediction
    if prediction is None or not isinstance(model, GeometryWorldModel):
        return None
    with autocast(session.rollout.device, session.rollout.dtype):
        gate = model.gate_map(prediction, session.rollout.sampling.trust)[0].float().cpu().numpy() / GATE_MAX
    width = CELL * gate.shape[1]
    column = np.concatenate(
        [
            legend({"distance": WHITE, "near": NEAR, "far": FAR}, width),
            enlarge(colour_scale(nearness(prediction)), CELL // 2),
            legend({"from memory": WHITE, "mostly": NEAR, "hardly": FAR}, width),
            enlarge(colour_scale(gate), CELL),
            legend({"from the picture before": LAST_FRAME}, width),
            legend({"from earlier views": KEYFRAMES, "new": DISOCCLUDED}, width),
            enlarge(source_colours(prediction), CELL),
        ]
    )
    size = column.shape[0] - 3 * LEGEND_HEIGHT  # of the map, which has a title and two lines of legend
    count = int((state.keyframes.order[0] > 0).sum())
    left = np.concatenate(
        [
            legend({f"map, {MAP_METRES:.0f} m around you, {count} remembered views": WHITE}, size),
            with_node_map(keyframe_map(session, size), session),
            legend({"you": PLAYER, "recorded view": OBSERVED, "view drawn by the model": GENERATED}, size),
            legend({"corner:": WHITE, "wall": BLOCKED, "step up": LOW, "drop": DROP}, size),
        ]
    )
    return np.concatenate([left, column], 1)


def nearness(prediction: Prediction) -> np.ndarray:
    """Predicted ray distances [2H, 2W] on a log scale: 0 from FAR_RAY_DISTANCE on, 1 up to 1 m."""
    distance = 1 / prediction.inverse_ray_distance[0].float().cpu().numpy()
    far = camera.FAR_RAY_DISTANCE
    return np.log(far / distance.clip(1.0, far)) / np.log(far)


def colour_scale(values: np.ndarray) -> np.ndarray:
    """[H, W] in 0..1 -> [H, W, 3] uint8, dark to bright."""
    shade = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(shade, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def legend(entries: dict[str, Colour], width: int) -> np.ndarray:
    """A strip [LEGEND_HEIGHT, width, 3] uint8 with each text in its colour."""
    strip, x = np.zeros((LEGEND_HEIGHT, width, 3), np.uint8), 3
    for text, colour in entries.items():
        if sum(colour) < 400:  # too dark to read on black
            colour = tuple(min(255, c + 70) for c in colour)
        cv2.putText(strip, text, (x, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.38, colour, 1, cv2.LINE_AA)
        x += cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.38, 1)[0][0] + 8
    return strip


def source_colours(prediction: Prediction) -> np.ndarray:
    """The source of each cell, [H, W, 3] uint8."""
    visible = prediction.visible_mask[0].float().cpu().numpy()
    last = prediction.view.source[0].cpu().numpy() == 0
    shade = np.stack([visible <= VISIBLE, last * visible, ~last * visible], -1)
    return (60 + 180 * shade).round().astype(np.uint8)


def with_node_map(canvas: np.ndarray, session: Session) -> np.ndarray:
    """The map with `node_colours` in its lower left corner, -z up, and the player in the middle of it."""
    occupancy = session.prediction.occupancy
    if occupancy is None:
        return canvas
    motion, state = session.rollout.model.motion_model, session.rollout.state
    filled = motion.filled(occupancy, state.motion[:, 7] - occupancy.lowest[:, 1])[0].cpu().numpy()
    nodes = enlarge(node_colours(filled, motion.constants.step_height).swapaxes(0, 1), NODE)
    side = len(nodes)
    place = (state.pose[0, [0, 2]] - occupancy.lowest[0, [0, 2]]).cpu().numpy() * NODE
    cv2.circle(nodes, tuple(int(x) for x in place.round()), 3, WHITE, -1, cv2.LINE_AA)
    canvas[-side - 2 :, : side + 2] = LINE
    canvas[-side - 1 : -1, 1 : side + 1] = nodes
    return canvas


def node_colours(filled: np.ndarray, step_height: float) -> np.ndarray:
    """Filled heights [X, Y, Z] of the nodes around a player -> a colour [X, Z, 3] uint8 for each column."""
    feet = filled.shape[1] // 2
    body, head, below = filled[:, feet], filled[:, feet + 1], filled[:, feet - 2 : feet].max(1)
    colours = np.full((*body.shape, 3), BACKGROUND, np.uint8)
    colours[below == 0] = DROP
    colours[body > 0] = LOW
    colours[(body > step_height) | (head > 0)] = BLOCKED
    return colours


def keyframe_map(session: Session, size: int) -> np.ndarray:
    """The keyframes around the player from above, [size, size, 3] uint8, with circles of 8, 16 and 24 m.

    A wedge is the horizontal field of view of a keyframe, or of the player. -z (north in Minecraft) is up.
    """
    state, config = session.rollout.state, session.rollout.model.config
    canvas = np.full((size, size, 3), BACKGROUND, np.uint8)
    pixels_per_metre = size / 2 / MAP_METRES
    for radius in (8, 16, 24):
        cv2.circle(canvas, (size // 2, size // 2), round(radius * pixels_per_metre), LINE, 1, cv2.LINE_AA)
    player = state.pose[0].float().cpu().numpy()
    keyframes, used = state.keyframes, state.keyframes.order > 0
    wedges = [
        (pose.float().cpu().numpy(), OBSERVED if generation.item() == 0 else GENERATED, 5.0, 0.12)
        for pose, generation in zip(keyframes.pose[used], keyframes.generation[used], strict=True)
    ]
    aspect = config.picture_width / config.picture_height
    half_fov = np.arctan(np.tan(np.deg2rad(config.vertical_fov_degrees / 2)) * aspect)
    for pose, colour, length, opacity in [*wedges, (player, PLAYER, 8.0, 0.3)]:
        # Minecraft's yaw 0 looks along +z, which is down here; it grows to the right, clockwise.
        tip = size / 2 + (pose[[0, 2]] - player[[0, 2]]) * pixels_per_metre
        angles = np.deg2rad(pose[3]) + np.linspace(-half_fov, half_fov, 9)
        arc = tip + length * pixels_per_metre * np.stack([-np.sin(angles), np.cos(angles)], 1)
        wedge = np.concatenate([[tip], arc]).round().astype(np.int32)
        fill = cv2.fillPoly(canvas.copy(), [wedge], colour, cv2.LINE_AA)
        canvas = cv2.addWeighted(fill, opacity, canvas, 1 - opacity, 0)
        cv2.polylines(canvas, [wedge], True, colour, 1, cv2.LINE_AA)
    return canvas
