"""Checks recorded clips in GF-Minecraft's layout: do pictures, actions and poses belong together?

Used by `python record.py --check DIR`, and by preprocess.py on a few clips. A wrong convention trains without
any error and teaches the model to ignore its actions, so all of it is measured from the pictures:

- alignment: the camera's turn from picture k-1 to k, measured from the pictures, against the recorded deltas
- signs: which signs of yaw, pitch, x and z let a picture be warped into the next one best (camera.py)
- field of view: the one with which turns explain the pictures best
- depth, where the clips have it (surroundings.py): a picture warped by the depth of a later frame shows that
  frame better than by the depth of the frame before or after it, and better than over a flat ground

Files, classes of actions and places come from the metadata of all clips. MineRL trajectories are not checked.
"""

import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset import actions
from dataset.recordings import (
    GAMEFACTORY_FPS,
    Clip,
    ClipError,
    find_clips,
    gamefactory_track,
    read_depth_file,
    read_gamefactory_entries,
    read_json,
    world_key,
)
from dataset.surroundings import REACH, decode_inverse_distance
from geometry import camera
from metrics import measure_turns, peak
from runtime.video import VideoError, has_frame, header_frames, read_frames, resize, video_fps

HEIGHT = 72  # pixels of the grey pictures that are compared
USUAL_FOV = 70.0  # degrees, vertical, where the caller expects none: Minecraft's and Luanti's own
LAGS = (-2, -1, 0, 1, 2)
FIRST = 2  # pairs left out at the start of a clip, where the world may still be loading

STILL = 0.02  # metres a frame: who moves less only turns
OTHER_AXIS = 1.0  # degrees a frame that the other axis may turn where only one is asked about
ENOUGH_PAIRS = 150  # turn-only pairs from which on the others are not needed
ENOUGH_CHANGES = 20  # changes of the turning speed that it takes to tell lags apart
CHANGE = 0.5  # degrees a frame: so much is a change of the turning speed
LARGEST_CHANGE = 5.0  # degrees a frame; a larger one counts as this, lest a wrong one outweigh the rest
GOOD_MATCH = 0.7  # correlation of two unrolled pictures above which a measured turn counts

TURNED = 1.0  # degrees a frame that a turning pair turns at least
WALKED, LEVEL = 0.1, 0.05  # metres along the ground at least, and up or down at most, of a walking pair
PAIRS_A_CLIP = 32  # pairs that are warped for signs and field of view
LARGEST_ERROR = 0.15  # of 0..1: a pixel that was hidden before says no more than this
CLEARLY = 0.97  # other signs must bring the error below this share of the expected signs' error
FEWEST_PAIRS = 20  # pairs that a verdict on signs takes
FEWEST_TURNS = 5  # turn-only pairs that a clip's field of view takes
FOV_TOLERANCE = 2.0  # degrees
DEPTH_LAGS = (-1, 0, 1)
DEPTH_STEPS = 4  # frames from the picture that is warped to the one that it is compared with
DEPTH_WALKED = 0.3  # metres along the ground between the two, at least
NODES_OFF = 1.6  # metres between a player's feet and the middle of its nodes, at most: the eye lags on a step
TURN_SPEEDS = (0, 1, 2, 5, 10, 15)  # degrees a frame, edges of the histogram


@dataclass
class Axis:
    """How measured turns about one axis agree with the recorded ones."""

    correlation: dict[int, float]  # by lag
    frames: int  # near a change of the recorded speed; the correlation is over these
    changes: int  # of the recorded speed by more than CHANGE
    turn_only: bool  # the player stood still and the other axis too
    degrees_a_degree: float | None  # measured over recorded turn, median over turns of 2 degrees and more


@dataclass
class Pictures:
    """What a sample of clips showed. None stands for "not available"."""

    clips: list[str] = field(default_factory=list)
    pairs: int = 0
    yaw: Axis | None = None
    pitch: Axis | None = None
    turn_error: dict[str, float] | None = None  # by signs of yaw and pitch ("++"): mean error of the warp
    walk_error: dict[str, float] | None = None  # by signs of x and z; "rotation" is without the ground plane
    turn_pairs: int = 0  # that turn_error is the mean of
    walk_pairs: int = 0
    fov: float | None = None  # degrees, median over clips
    fov_quartiles: tuple[float, float] | None = None
    fov_clips: int = 0
    fov_turn_only: bool = True
    expected_fov: float | None = None
    depth_error: dict[str, float] | None = None  # mean error of the warp by lag of the depth ("+0"), "ground"
    depth_pairs: int = 0
    depth_clips: int = 0  # of `clips`, that have depth
    bad_files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Balance:
    """What the players of all readable clips did. Shares are of frames."""

    classes: dict[str, float] = field(default_factory=dict)
    transitions: float = 0.0  # frames whose keys differ from the frame's before
    turns_left: float = 0.0
    turns_right: float = 0.0
    strafes_left: float = 0.0
    strafes_right: float = 0.0
    turn_speeds: dict[str, float] = field(default_factory=dict)  # degrees a frame, of the frames that turn
    pitch_mean: float | None = None  # degrees, + down
    pitch_quartiles: tuple[float, float, float] | None = None


@dataclass
class Report:
    """What `check_clips` found, as plain values."""

    parent: str
    source: str
    clips: int = 0
    frames: int = 0  # of readable clips
    hours: float = 0.0
    bad_files: list[str] = field(default_factory=list)
    pictures: Pictures | None = None
    balance: Balance | None = None
    biomes: dict[str, int] = field(default_factory=dict)  # clips by value
    weather: dict[str, int] = field(default_factory=dict)
    start_times: dict[str, int] = field(default_factory=dict)
    worlds: dict[str, int] = field(default_factory=dict)
    styles: dict[str, int] = field(default_factory=dict)  # of the scripted player
    with_depth: int = 0  # readable clips that have depth, and nodes
    with_nodes: int = 0
    ended_early: dict[str, str] = field(default_factory=dict)  # clip -> why
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict:
        """All fields as dicts, lists and plain values."""
        return asdict(self)

    def text(self) -> str:
        """A table for people."""
        return "\n".join(_lines(self))


@dataclass
class _Track:
    """One sampled clip: grey pictures [T, 1, H, W] in 0..1, actions [T-1, 5], poses [T, 5]."""

    name: str
    grey: Tensor
    actions: np.ndarray
    pose: np.ndarray
    inverse: Tensor | None = None  # [T, h, w] inverse ray distances in 1/m, where the clip has them
    eye_height: float = camera.EYE_HEIGHT  # metres

    def __post_init__(self):
        self.turned = actions.wrap(np.diff(self.pose[:, 3:], axis=0))  # [T-1, 2] degrees of yaw and pitch
        self.moved = np.diff(self.pose[:, :3], axis=0)  # [T-1, 3] metres

    @property
    def still(self) -> np.ndarray:
        """[T-1] bool: pairs between which the player did not move; False where that is unknown."""
        return np.linalg.norm(self.moved, axis=1) < STILL


# ------------------------------------------------------------ everything


def check_clips(
    parent: Path,
    clips: int = 24,
    seed: int = 0,
    progress: bool = True,
    limit_frames: int = 200,
    expected_fov: float | None = None,
) -> Report:
    """Checks the data set in `parent`: metadata and headers of all clips, pictures of `clips` of them.

    Of each of those the first `limit_frames` frames are decoded. `expected_fov` (degrees, vertical) is
    compared with the measured one. Raises DataError if there is no clip.
    """
    start = time.perf_counter()
    source, found = find_clips(parent, "auto", parent)
    report = Report(str(parent), source, len(found))
    if source != "gamefactory":
        report.notes.append(
            "MineRL trajectories are not checked: they have no pose, and their pictures are aligned "
            "when they are read"
        )
        return report
    whole, vectors, pitch = [], [], []
    for clip in tqdm(found, desc="metadata", unit="clip", disable=not progress):
        try:
            content = read_json(clip.metadata)
            every, pose = gamefactory_track(read_gamefactory_entries(clip.metadata, content), clip.metadata)
            _check_header(clip, len(pose))
            surroundings = read_depth_file(clip.video, len(pose))
            if surroundings is not None:
                report.with_depth += 1
                if surroundings.nodes is not None:
                    report.with_nodes += 1
                    _check_nodes(clip, surroundings.origin, pose)
            report.hours += len(pose) / (video_fps(clip.video) or GAMEFACTORY_FPS) / 3600
        except (ClipError, VideoError) as error:
            report.bad_files.append(str(error))
            continue
        whole.append(clip)
        vectors.append(every)
        pitch.append(pose[:, 4])
        ended = str(content.get("ended", "complete"))
        if ended != "complete":
            report.ended_early[clip.name] = ended
        for counts, value in (
            (report.biomes, content.get("biome", "unknown")),
            (report.weather, content.get("initial_weather", "unknown")),
            (report.start_times, content.get("start_time", "unknown")),
            (report.worlds, world_key(content) or "unknown"),
            (report.styles, content.get("player_style", content.get("player", "unknown"))),
        ):
            counts[str(value)] = counts.get(str(value), 0) + 1
    report.frames = sum(len(p) for p in pitch)
    if sum(map(len, vectors)):
        report.balance = measure_balance(vectors, np.concatenate(pitch))
    sample = random.Random(seed).sample(whole, min(clips, len(whole)))
    report.pictures = check_pictures(sample, limit_frames, expected_fov, progress)
    report.bad_files += report.pictures.bad_files
    if report.bad_files:
        report.problems.append(
            f"{len(report.bad_files)} of {len(found)} clips cannot be used, preprocess.py will skip them: "
            "delete them, record them again, or mend what is listed under bad files"
        )
    report.problems += report.pictures.problems
    report.notes += report.pictures.notes
    report.seconds = time.perf_counter() - start
    return report


def _check_header(clip: Clip, needed: int) -> None:
    """Raises ClipError or VideoError if the video is missing or its header promises too few frames."""
    if not clip.video.is_file():
        raise ClipError("no video", f"{clip.video} is missing")
    promised = header_frames(clip.video)
    if 0 < promised < needed:
        raise ClipError("short video", f"{clip.video}: {promised} frames, its metadata has {needed} entries")


def _check_nodes(clip: Clip, origin: np.ndarray, pose: np.ndarray) -> None:
    """Raises ClipError if the nodes of most frames are not those around the player."""
    off = np.abs(origin + REACH - pose[:, :3]).max(1)
    off = off[np.isfinite(off)]
    if len(off) and (off > NODES_OFF).mean() > 0.05:
        raise ClipError(
            "broken depth",
            f"{clip.video}: its nodes lie {np.median(off):.1f} m from its poses (median), expected the "
            "player in their middle; depth file and metadata are not of one recording, record the clip again",
        )


def measure_balance(vectors: list[np.ndarray], pitch: np.ndarray) -> Balance:
    """Shares of what was done, from the action vectors [N, 5] of each clip and all pitches [M] in degrees."""
    every = np.concatenate(vectors)
    keys = [np.abs(np.diff(v[:, actions.MOVE_X :], axis=0)).max(1, initial=0) > 0 for v in vectors]
    yaw, side = every[:, actions.YAW], every[:, actions.MOVE_X]
    classes = np.bincount(actions.action_class(every), minlength=len(actions.CLASS_NAMES)) / len(every)
    speed = np.abs(yaw[np.abs(yaw) > actions.CAMERA_MOVES]) * actions.DEGREES_PER_UNIT
    # Vectors are clipped, so the last bin holds what is at the limit.
    edges = [*TURN_SPEEDS[:-1], TURN_SPEEDS[-1] - 1e-3, np.inf]
    counts = np.histogram(speed, edges)[0] / max(len(speed), 1)
    names = [f"{a}-{b}" for a, b in zip(TURN_SPEEDS, TURN_SPEEDS[1:], strict=False)] + [
        f">={TURN_SPEEDS[-1]}"
    ]
    balance = Balance(
        classes={name: float(s) for name, s in zip(actions.CLASS_NAMES, classes, strict=True)},
        transitions=float(np.concatenate(keys).mean()) if len(every) > len(vectors) else 0.0,
        turns_left=float((yaw < -actions.CAMERA_MOVES).mean()),
        turns_right=float((yaw > actions.CAMERA_MOVES).mean()),
        strafes_left=float((side < -actions.KEY_PRESSED).mean()),
        strafes_right=float((side > actions.KEY_PRESSED).mean()),
        turn_speeds={name: float(s) for name, s in zip(names, counts, strict=True)},
    )
    pitch = pitch[np.isfinite(pitch)]
    if len(pitch):
        balance.pitch_mean = float(pitch.mean())
        balance.pitch_quartiles = tuple(float(q) for q in np.quantile(pitch, [0.25, 0.5, 0.75]))
    return balance


# ------------------------------------------------------------ pictures


def check_pictures(
    sample: Iterable[Clip], limit_frames: int = 200, expected_fov: float | None = None, progress: bool = True
) -> Pictures:
    """Compares the first `limit_frames` pictures of each GF-Minecraft clip in `sample` with its metadata.

    What there is too little of to tell becomes a note, never a problem.
    """
    start = time.perf_counter()
    found = Pictures(expected_fov=expected_fov)
    tracks, measured = [], []
    for clip in tqdm(list(sample), desc="pictures", unit="clip", disable=not progress):
        try:
            track = _read_track(clip, limit_frames)
        except (ClipError, VideoError, cv2.error) as error:
            found.bad_files.append(str(error))
            continue
        tracks.append(track)
        grey, fov = track.grey, expected_fov or USUAL_FOV
        measured.append(measure_turns(grey[:-1], grey[1:], track.pose[:-1, 4], fov))
        found.clips.append(track.name)
        found.pairs += len(track.actions)
    found.yaw = _align(tracks, measured, 0)
    found.pitch = _align(tracks, measured, 1)
    _judge_alignment(found, any(track.actions[:, :2].any() for track in tracks))
    signs = _check_signs(found, tracks, expected_fov or USUAL_FOV)
    _check_fov(found, tracks, signs)
    _check_depth(found, tracks, expected_fov or USUAL_FOV)
    found.seconds = time.perf_counter() - start
    return found


def _read_track(clip: Clip, limit: int) -> _Track:
    """The start of a clip, and whether its end can be decoded. Raises ClipError or VideoError."""
    content = read_json(clip.metadata)
    every, pose = gamefactory_track(read_gamefactory_entries(clip.metadata, content), clip.metadata)
    if not clip.video.is_file():
        raise ClipError("no video", f"{clip.video} is missing")
    surroundings = read_depth_file(clip.video, len(pose))
    grey = []
    for frame in read_frames(clip.video, wanted=range(min(limit, len(pose)))):
        width = round(HEIGHT * frame.shape[1] / frame.shape[0])
        grey.append(cv2.cvtColor(resize(frame, HEIGHT, width), cv2.COLOR_RGB2GRAY))
    if not has_frame(clip.video, len(pose) - 1):
        raise ClipError("short video", f"{clip.video}: frame {len(pose) - 1}, its last, cannot be decoded")
    if len(grey) < 2:
        raise ClipError("too short", f"{clip.metadata}: one frame, at least 2 needed")
    pictures = torch.from_numpy(np.stack(grey)).float()[:, None] / 255
    inverse = None
    if surroundings is not None:
        inverse = torch.from_numpy(decode_inverse_distance(surroundings.log_inverse[: len(grey)]))
    try:
        eye_height = float(content.get("eye_height", camera.EYE_HEIGHT))
    except (TypeError, ValueError):
        eye_height = camera.EYE_HEIGHT
    return _Track(clip.name, pictures, every[: len(grey) - 1], pose[: len(grey)], inverse, eye_height)


# ------------------------------------------------------------ alignment


def _align(tracks: list[_Track], measured: list[np.ndarray], axis: int) -> Axis | None:
    """Correlates measured and recorded turns about one axis (0 yaw, 1 pitch); None if too little turned."""
    for turn_only in (True, False):
        rows = [_changes(t, m, axis, turn_only) for t, m in zip(tracks, measured, strict=True)]
        rows = np.concatenate([*rows, np.zeros((0, 3 + len(LAGS)))])
        recorded = rows[:, 3:]
        near = (np.abs(recorded) > CHANGE).any(1)
        changes = int((np.abs(recorded[:, LAGS.index(0)]) > CHANGE).sum())
        if changes >= ENOUGH_CHANGES and (len(rows) >= ENOUGH_PAIRS or not turn_only):
            break
    else:
        return None
    limited = np.clip(rows[near], -LARGEST_CHANGE, LARGEST_CHANGE)
    correlation = {lag: _correlate(limited[:, 2], limited[:, 3 + i]) for i, lag in enumerate(LAGS)}
    turning = np.abs(rows[:, 1]) >= 2
    ratio = float(np.median(rows[turning, 0] / rows[turning, 1])) if turning.sum() >= ENOUGH_CHANGES else None
    return Axis(correlation, int(near.sum()), changes, turn_only, ratio)


def _changes(track: _Track, measured: np.ndarray, axis: int, turn_only: bool) -> np.ndarray:
    """[M, 3 + lags] degrees: measured and recorded turn, measured change, recorded change at each lag.

    Changes from one pair to the next, not the turns themselves: a held turn looks the same at every lag, and
    what walking adds to a measured turn changes little from pair to pair. All lags are judged on the same
    pairs: those measured well, near which (at whatever lag) the recorded speed changes.
    """
    recorded = track.actions[:, :2] * actions.DEGREES_PER_UNIT
    good = measured[:, 2] > GOOD_MATCH
    if turn_only:
        good = good & track.still & (np.abs(recorded[:, 1 - axis]) < OTHER_AXIS)
    k = np.arange(FIRST - min(LAGS), len(recorded) - max(LAGS))
    k = k[good[k] & good[k - 1]]
    change = np.diff(recorded[:, axis], prepend=0)
    lags = [change[k + lag] for lag in LAGS]
    turn, last = measured[k, axis], measured[k - 1, axis]
    return np.stack([turn, recorded[k, axis], turn - last, *lags], 1)


def _correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of them never changes."""
    if len(a) < 2 or a.std() < 1e-6 or b.std() < 1e-6:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _judge_alignment(found: Pictures, deltas: bool) -> None:
    """Turns the correlations into problems and notes."""
    if not deltas:
        found.notes.append("alignment: not available, the clips record no camera turns")
        return
    for name, axis in (("yaw", found.yaw), ("pitch", found.pitch)):
        if axis is None:
            found.notes.append(f"alignment of {name}: too little turning, or too plain pictures, to tell")
            continue
        at = axis.correlation
        best = max(at, key=lambda lag: abs(at[lag]))
        if abs(at[best]) < 0.5:
            found.problems.append(
                f"pictures and actions do not belong together: {name}_delta explains the pictures at no lag "
                f"(expected a correlation near 1 at lag 0, found {at[0]:.2f}, at best {at[best]:.2f}); check "
                "that each video belongs to its metadata, and the order of its entries"
            )
        elif best and abs(at[best]) > abs(at[0]) + 0.15:
            frames = f"{abs(best)} frame{'s' if abs(best) > 1 else ''} {'late' if best > 0 else 'early'}"
            found.problems.append(
                f"the actions are {frames} ({name}: best lag {best:+d}: {at[best]:.2f} against {at[0]:.2f} "
                "at lag 0): entry k must be the action that led from frame k-1 to frame k; shift them"
            )
        elif at[best] < 0:
            found.problems.append(
                f"{name}_delta has the wrong sign (correlation {at[best]:.2f}, expected near +1): "
                f"+{name} must be {'right' if name == 'yaw' else 'down'}; negate it"
            )
        elif axis.degrees_a_degree is not None and not 0.6 < axis.degrees_a_degree < 1.6:
            found.problems.append(
                f"{name}_delta has the wrong unit: the pictures turn {axis.degrees_a_degree:.2f} degrees for "
                "each recorded degree, expected about 1; deltas are in units of 15 degrees"
            )


# ------------------------------------------------------------ signs and field of view


def _pairs(chosen: np.ndarray) -> np.ndarray:
    """At most PAIRS_A_CLIP of the pairs [T-1] bool, evenly spaced -> their numbers."""
    numbers = np.flatnonzero(chosen)
    numbers = numbers[numbers >= FIRST]
    return numbers[np.linspace(0, len(numbers) - 1, min(PAIRS_A_CLIP, len(numbers))).astype(int)]


def _warp_error(
    track: _Track, pairs: np.ndarray, fov: float, signs: tuple[int, int, int, int], ground: bool = False
) -> float:
    """Sum over pairs of the mean error (of 0..1) of a picture warped into the next.

    `signs` multiply yaw, pitch, x and z. Errors beyond LARGEST_ERROR count as that.
    """
    yaw, pitch, x, z = signs
    poses = track.pose.astype(np.float64)
    poses[:, :3] -= poses[pairs[0], :3]
    poses = torch.from_numpy((poses * [x, 1, z, yaw, pitch]).astype(np.float32))
    old, new, size = poses[pairs], poses[pairs + 1], track.grey.shape[-2:]
    inverse = (
        camera.ground_plane(new, *size, fov, camera.EYE_HEIGHT, camera.FAR_RAY_DISTANCE) if ground else 0.0
    )
    grid, seen = camera.reproject(old, new, inverse, *size, fov)
    error = (
        (camera.warp(track.grey[pairs], grid) - track.grey[pairs + 1])[:, 0].abs().clamp(max=LARGEST_ERROR)
    )
    return float(((error * seen).sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)).sum())


def _name(signs: Iterable[int]) -> str:
    return "".join("+" if s > 0 else "-" for s in signs)


def _check_signs(found: Pictures, tracks: list[_Track], fov: float) -> tuple[int, int]:
    """Fills in the errors by signs, adds problems, and returns the best signs of yaw and pitch."""
    both = list(product((1, -1), repeat=2))
    turning = []
    for track in tracks:
        turned = np.linalg.norm(track.turned, axis=1) >= TURNED  # False where unknown
        only = _pairs(turned & track.still)
        turning.append(only if len(only) >= FEWEST_TURNS else _pairs(turned))
    found.turn_pairs = sum(map(len, turning))
    best = (1, 1)
    if found.turn_pairs >= FEWEST_PAIRS:
        used = [(t, p) for t, p in zip(tracks, turning, strict=True) if len(p)]
        errors = {
            s: sum(_warp_error(t, p, fov, (*s, 1, 1)) for t, p in used) / found.turn_pairs for s in both
        }
        found.turn_error = {_name(s): e for s, e in errors.items()}
        best = _judge_signs(found, errors, ("yaw", "pitch"), "+yaw is right, +pitch is down")
    else:
        found.notes.append("signs of yaw and pitch: not available, too few pairs with a recorded turn")
    walking = []
    for track in tracks:
        walked = np.linalg.norm(track.moved[:, [0, 2]], axis=1) >= WALKED
        walking.append(
            _pairs(walked & (np.abs(track.moved[:, 1]) < LEVEL) & np.isfinite(track.turned).all(1))
        )
    found.walk_pairs = sum(map(len, walking))
    if found.walk_pairs >= FEWEST_PAIRS:
        used = [(t, p) for t, p in zip(tracks, walking, strict=True) if len(p)]
        errors = {s: sum(_warp_error(t, p, fov, (*best, *s), True) for t, p in used) for s in both}
        errors = {s: e / found.walk_pairs for s, e in errors.items()}
        found.walk_error = {_name(s): e for s, e in errors.items()}
        rotation = sum(_warp_error(t, p, fov, (*best, 1, 1)) for t, p in used) / found.walk_pairs
        found.walk_error["rotation"] = rotation
        convention = "walking forward goes along (-sin yaw, 0, cos yaw) in [x, y, z]"
        _judge_signs(found, errors, ("x", "z"), convention)
    else:
        found.notes.append("signs of x and z: not available, too few pairs with a recorded walk")
    return best


def _judge_signs(found: Pictures, errors: dict, names: tuple[str, str], convention: str) -> tuple[int, int]:
    """Adds a problem if other signs than (+, +) are clearly better, and returns the better ones."""
    best = min(errors, key=errors.get)
    expected = errors[1, 1]
    if best == (1, 1) or errors[best] >= CLEARLY * expected:
        return 1, 1
    flipped = " and ".join(name for name, sign in zip(names, best, strict=True) if sign < 0)
    found.problems.append(
        f"{flipped} {'have' if 'and' in flipped else 'has'} the wrong sign in the poses: the pictures fit "
        f"{_name(best)} for ({', '.join(names)}) (error {errors[best]:.4f}), expected ++ ({expected:.4f}); "
        f"{convention}; negate {flipped}"
    )
    return best


def _check_fov(found: Pictures, tracks: list[_Track], signs: tuple[int, int]) -> None:
    """Fills in the field of view that explains turns best, a value for each clip, and judges the median."""
    values = []
    for found.fov_turn_only in (True, False):
        for track in tracks:
            turned = np.linalg.norm(track.turned, axis=1) >= TURNED
            pairs = _pairs(turned & track.still if found.fov_turn_only else turned)
            if len(pairs) >= FEWEST_TURNS:
                values += _best_fov(track, pairs, (*signs, 1, 1))
        if values:
            break
    if not values:
        found.notes.append("field of view: not available, too few turns to tell")
        return
    found.fov = float(np.median(values))
    found.fov_quartiles = tuple(float(q) for q in np.quantile(values, [0.25, 0.75]))
    found.fov_clips = len(values)
    if found.expected_fov is not None and abs(found.fov - found.expected_fov) > FOV_TOLERANCE:
        message = (
            f"vertical field of view: {found.fov:.1f} degrees explain the pictures best, expected "
            f"{found.expected_fov:g}; record with that, or give preprocess.py --vertical_fov {found.fov:.0f}"
        )
        aligned = found.yaw is None or max(found.yaw.correlation, key=found.yaw.correlation.get) == 0
        # Walking hides the field of view, and so do turns that belong to other pictures.
        (found.problems if found.fov_turn_only and aligned else found.notes).append(message)


def _best_fov(track: _Track, pairs: np.ndarray, signs: tuple[int, int, int, int]) -> list[float]:
    """[degrees] whose warp has the least error, coarse to fine and a parabola; [] at an end of the search."""
    errors: dict[float, float] = {}
    best = USUAL_FOV
    for step, reach in ((10.0, 40.0), (2.5, 7.5), (1.0, 2.0)):
        candidates = best + np.arange(-reach, reach + step, step)
        errors = {fov: _warp_error(track, pairs, fov, signs) for fov in candidates if 25 <= fov <= 115}
        best = min(errors, key=errors.get)
    values = -np.array(list(errors.values()))
    i = int(values.argmax())
    return [best + peak(values, i)] if 0 < i < len(values) - 1 else []


# ------------------------------------------------------------ depth


def _check_depth(found: Pictures, tracks: list[_Track], fov: float) -> None:
    """Fills in the errors of warps by depth; adds a problem where a frame's own depth is not the best."""
    tracks = [track for track in tracks if track.inverse is not None]
    found.depth_clips = len(tracks)
    sums: dict[str, float] = {}
    for track in tracks:
        pairs = _depth_pairs(track)
        found.depth_pairs += len(pairs)
        for name, error in _depth_errors(track, pairs, fov).items() if len(pairs) else ():
            sums[name] = sums.get(name, 0.0) + error
    if found.depth_pairs < FEWEST_PAIRS:
        if tracks:
            found.notes.append("depth: not verified, too few frames of a walk to tell")
        return
    found.depth_error = {name: error / found.depth_pairs for name, error in sums.items()}
    own, ground = found.depth_error[f"{0:+d}"], found.depth_error["ground"]
    best = min(DEPTH_LAGS, key=lambda lag: found.depth_error[f"{lag:+d}"])
    if own >= ground:
        found.problems.append(
            f"depth does not belong to the pictures: warped by it their error is {own:.4f}, over a flat "
            f"ground {ground:.4f}, expected less; check that each depth file belongs to its video, or record "
            "again"
        )
    elif best:
        found.problems.append(
            f"depth is one frame {'late' if best > 0 else 'early'}: the depth of frame k{best:+d} fits the "
            f"picture of frame k better than its own (error of the warp "
            f"{found.depth_error[f'{best:+d}']:.4f} against {own:.4f}); shift the depth files' frames, or "
            "record again"
        )


def _depth_pairs(track: _Track) -> np.ndarray:
    """Frames from which a walk leads to the frame DEPTH_STEPS later, the camera turning there if there are
    enough of them: a turn tells one frame's depth from the next one's."""
    steps = DEPTH_STEPS
    starts = np.arange(max(0, len(track.pose) - steps - 1))  # one frame follows the later one
    walked = np.linalg.norm(track.pose[starts + steps, :3] - track.pose[starts, :3], axis=1) >= DEPTH_WALKED
    walked &= np.isfinite(track.pose[starts]).all(1) & np.isfinite(track.pose[starts + steps]).all(1)
    turned = np.linalg.norm(track.turned, axis=1)
    turning = walked & (np.minimum(turned[starts + steps - 1], turned[starts + steps]) >= TURNED)
    chosen = _pairs(turning)
    return chosen if len(chosen) >= FEWEST_TURNS else _pairs(walked)


def _depth_errors(track: _Track, pairs: np.ndarray, fov: float) -> dict[str, float]:
    """Sum over pairs of the mean error of a picture warped into the one DEPTH_STEPS later, by the depth of
    that one ("+0"), of its neighbours, and of a flat ground, all over the same pixels."""
    size, later = track.grey.shape[-2:], pairs + DEPTH_STEPS
    poses = track.pose.astype(np.float64)
    poses[:, :3] -= poses[pairs[0], :3]
    poses = torch.from_numpy(poses.astype(np.float32))
    inverses = {
        f"{lag:+d}": F.interpolate(track.inverse[later + lag][:, None], size=size)[:, 0] for lag in DEPTH_LAGS
    }
    inverses["ground"] = camera.ground_plane(
        poses[later], *size, fov, track.eye_height, camera.FAR_RAY_DISTANCE
    )
    errors, seen = {}, torch.ones(len(pairs), *size, dtype=torch.bool)
    for name, inverse in inverses.items():
        grid, visible = camera.reproject(poses[pairs], poses[later], inverse, *size, fov)
        difference = (camera.warp(track.grey[pairs], grid) - track.grey[later])[:, 0].abs()
        errors[name] = difference.clamp(max=LARGEST_ERROR)
        seen &= visible
    counts = seen.sum((1, 2)).clamp(min=1)
    return {name: float(((error * seen).sum((1, 2)) / counts).sum()) for name, error in errors.items()}


# ------------------------------------------------------------ text


def _lines(report: Report) -> list[str]:
    lines = [f"{report.parent}: {report.clips} clips, {report.source}"]
    if report.source != "gamefactory":
        return [*lines, *(f"note: {note}" for note in report.notes)]
    lines.append(f"frames        {report.frames} in readable clips, {report.hours:.2f} hours")
    lines += [f"bad file      {bad}" for bad in report.bad_files]
    for name, counts in (
        ("biomes", report.biomes),
        ("weather", report.weather),
        ("start times", report.start_times),
        ("worlds", report.worlds),
        ("player", report.styles),
        ("ended early", Counter(report.ended_early.values())),
    ):
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        lines.append(f"{name:13} " + (", ".join(f"{value} {n}" for value, n in ranked) or "none"))
    lines.append(f"depth         {report.with_depth} clips, {report.with_nodes} with nodes")
    lines += ["", *_balance_lines(report.balance)] if report.balance else []
    lines += ["", *_picture_lines(report.pictures)] if report.pictures and report.pictures.clips else []
    lines.append("")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"PROBLEM: {problem}" for problem in report.problems] or ["no problem found"]
    return lines


def _balance_lines(balance: Balance) -> list[str]:
    lines = ["what the player does, share of frames"]
    lines += [f"  {name:11} {share:6.1%}" for name, share in balance.classes.items()]
    lines += [
        f"  transitions {balance.transitions:6.1%}  (keys differ from the frame before)",
        f"  turns       {balance.turns_left:6.1%} left, {balance.turns_right:.1%} right",
        f"  strafes     {balance.strafes_left:6.1%} left, {balance.strafes_right:.1%} right",
        "  turn speeds, degrees a frame: "
        + ", ".join(f"{name}: {share:.1%}" for name, share in balance.turn_speeds.items()),
    ]
    if balance.pitch_quartiles:
        low, median, high = balance.pitch_quartiles
        lines.append(
            f"  pitch       mean {balance.pitch_mean:.1f} degrees down, "
            f"quartiles {low:.1f} {median:.1f} {high:.1f}"
        )
    return lines


def _picture_lines(found: Pictures) -> list[str]:
    lines = [f"pictures of {len(found.clips)} clips, {found.pairs} pairs, {found.seconds:.0f} s"]
    heading = "  ".join(f"{lag:+d}".rjust(6) for lag in LAGS)
    lines.append(f"  turns in pictures and actions, correlation at lag  {heading}")
    for name, axis in (("yaw", found.yaw), ("pitch", found.pitch)):
        if axis is None:
            lines.append(f"    {name:5} not available")
            continue
        row = "  ".join(f"{axis.correlation[lag]:6.2f}" for lag in LAGS)
        which = "turn-only pairs" if axis.turn_only else "all pairs, walking too"
        lines.append(f"    {name:5} {axis.frames:5} frames, {which:24}        {row}")
    for title, errors, pairs in (
        ("signs of (yaw, pitch)", found.turn_error, found.turn_pairs),
        ("signs of (x, z)", found.walk_error, found.walk_pairs),
    ):
        row = ", ".join(f"{name} {error:.4f}" for name, error in (errors or {}).items())
        lines.append(
            f"  {title}: " + (f"error of the warp {row} ({pairs} pairs)" if row else "not available")
        )
    if found.fov is None:
        lines.append("  vertical field of view: not available")
    else:
        low, high = found.fov_quartiles
        which = "turn-only pairs" if found.fov_turn_only else "walking too"
        lines.append(
            f"  vertical field of view: {found.fov:.1f} degrees, quartiles {low:.1f} {high:.1f} over "
            f"{found.fov_clips} clips ({which})"
        )
    if found.depth_error is not None:
        row = ", ".join(f"{name} {error:.4f}" for name, error in found.depth_error.items())
        lines.append(
            f"  depth: error of the warp by lag {row} ({found.depth_pairs} pairs in {found.depth_clips} "
            f"clips, {DEPTH_STEPS} frames ahead)"
        )
    elif found.depth_clips:
        lines.append("  depth: not verified")
    return lines
