"""Measures on the pictures of recorded clips whether actions, poses and depth belong to them.

A wrong convention raises no error in training; the model then learns to ignore its actions. So each
convention is measured from the pictures:

- alignment: correlation of the camera turn measured between pictures k-1 and k with the recorded deltas
- signs: the signs of yaw, pitch, x and z with which a picture, warped to the next pose, matches the next
  picture
- field of view: the one with which warps of turning pairs have the smallest error
- depth, where the clips have it (surroundings.py): a picture warped with the depth of a later frame must
  match that frame better than with the depth of the frame before or after it, and better than with a flat
  ground plane
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset import actions
from dataset.recordings import (
    Clip,
    ClipError,
    gamefactory_track,
    read_depth_file,
    read_gamefactory_entries,
    read_json,
)
from dataset.surroundings import decode_inverse_ray_distance
from geometry import camera
from metrics import measure_turns, peak
from runtime.video import VideoError, has_frame, read_frames, resize

HEIGHT = 72  # pixels of the grey pictures that are compared
USUAL_FOV = 70.0  # degrees, vertical; used where the caller expects none. The default of Minecraft and Luanti
FIRST_PAIR = 2  # pairs before it are ignored: the world may still be loading

# Alignment of turns
LAGS = (-2, -1, 0, 1, 2)
STANDING = 0.02  # metres a frame; below it a pair is turn-only: the player does not walk
OTHER_AXIS = 1.0  # degrees a frame that the other axis may turn in a turn-only pair
ENOUGH_PAIRS = 150  # with this many turn-only pairs, pairs of walking players are not used
ENOUGH_CHANGES = 20  # changes of the turning speed needed to tell lags apart
CHANGE = 0.5  # degrees a frame: least difference of turning speed that counts as a change
LARGEST_CHANGE = 5.0  # degrees a frame; larger changes are clipped, so that an outlier does not dominate
GOOD_MATCH = 0.7  # least correlation of two unrolled pictures for a measured turn to be used
LEAST_CORRELATION = 0.5  # below it at every lag, pictures and actions do not belong together
LAG_MARGIN = 0.15  # another lag's correlation must exceed that of lag 0 by this much
TURN_RATIOS = (0.6, 1.6)  # measured over recorded degrees; outside this range the unit is wrong

# Signs and field of view
TURNED = 1.0  # degrees: least turn of a turning pair
WALKED, LEVEL = 0.1, 0.05  # metres: least horizontal and largest vertical displacement of a walking pair
PAIRS_PER_CLIP = 32
LARGEST_ERROR = 0.15  # of 0..1; pixel errors are clipped here, since disoccluded pixels have no correct value
SIGN_MARGIN = 0.97  # other signs need an error below this share of the expected signs' error
FEWEST_PAIRS = 20  # needed to judge signs or depth
FEWEST_TURNS = 5  # turn-only pairs needed for the field of view of a clip
FOV_TOLERANCE = 2.0  # degrees

# Depth
DEPTH_LAGS = (-1, 0, 1)
DEPTH_STEPS = 4  # frames between the picture that is warped and the picture it is compared with
DEPTH_WALKED = 0.3  # metres: least horizontal displacement between the two


@dataclass
class TurnAlignment:
    """Agreement of measured and recorded turns about one axis."""

    correlation: dict[int, float]  # by lag
    frames: int  # number of frames near a change of the recorded speed; the correlation is over these
    turn_only: bool  # only frames where the player stood and the other axis did not turn
    turn_ratio: float | None  # measured over recorded degrees, median over turns of at least 2 degrees


@dataclass
class PictureCheck:
    """Measurements on the pictures of a sample of clips. None: not available."""

    clips: list[str] = field(default_factory=list)
    yaw: TurnAlignment | None = None
    pitch: TurnAlignment | None = None
    turn_error: dict[str, float] | None = None  # mean warp error by signs of (yaw, pitch), such as "+-"
    walk_error: dict[str, float] | None = None  # by signs of (x, z); "rotation": without translation
    turn_pairs: int = 0  # number of pairs in turn_error
    walk_pairs: int = 0
    fov: float | None = None  # vertical field of view in degrees, median over clips
    fov_clips: int = 0
    fov_turn_only: bool = True
    expected_fov: float | None = None
    depth_error: dict[str, float] | None = None  # mean warp error by lag of the depth ("+0"), and "ground"
    depth_pairs: int = 0
    depth_clips: int = 0  # number of `clips` with depth
    bad_files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Track:
    """The start of one sampled clip."""

    grey: Tensor  # [T, 1, H, W] in 0..1
    actions: np.ndarray  # [T-1, 5]
    pose: np.ndarray  # [T, 5]
    inverse_ray_distance: Tensor | None = None  # [T, h, w] in 1/m, where the clip has depth
    eye_height: float = camera.EYE_HEIGHT  # metres

    def __post_init__(self):
        self.turned = actions.wrap(np.diff(self.pose[:, 3:], axis=0))  # [T-1, 2] degrees of yaw and pitch
        self.moved = np.diff(self.pose[:, :3], axis=0)  # [T-1, 3] metres

    @property
    def standing(self) -> np.ndarray:
        """[T-1] bool: pairs between which the player does not move; False where the pose is unknown."""
        return np.linalg.norm(self.moved, axis=1) < STANDING

    @property
    def turning(self) -> np.ndarray:
        """[T-1] bool: pairs between which the camera turns by TURNED; False where the pose is unknown."""
        return np.linalg.norm(self.turned, axis=1) >= TURNED

    def poses_near(self, frame: int) -> Tensor:
        """Poses [T, 5] float32 with positions relative to those of `frame`."""
        pose = torch.from_numpy(self.pose.astype(np.float64))
        return camera.relative_to(pose, pose[frame]).float()


def check_pictures(
    sample: Iterable[Clip], limit_frames: int = 200, expected_fov: float | None = None, progress: bool = True
) -> PictureCheck:
    """Compares the first `limit_frames` pictures of each GF-Minecraft clip in `sample` with its metadata.

    A measurement with too little data becomes a note, never a problem.
    """
    result = PictureCheck(expected_fov=expected_fov)
    fov = expected_fov or USUAL_FOV
    tracks, measured = [], []
    for clip in tqdm(list(sample), desc="pictures", unit="clip", disable=not progress):
        try:
            track = _read_track(clip, limit_frames)
        except (ClipError, VideoError, cv2.error) as error:
            result.bad_files.append(str(error))
            continue
        tracks.append(track)
        measured.append(measure_turns(track.grey[:-1], track.grey[1:], track.pose[:-1, 4], fov))
        result.clips.append(clip.name)
    result.yaw = _align(tracks, measured, actions.YAW)
    result.pitch = _align(tracks, measured, actions.PITCH)
    _judge_alignment(result, any(track.actions[:, :2].any() for track in tracks))
    signs = _check_signs(result, tracks, fov)
    _check_fov(result, tracks, signs)
    _check_depth(result, tracks, fov)
    return result


def _read_track(clip: Clip, limit: int) -> _Track:
    """Reads the start of a clip and verifies that its end can be decoded. Raises ClipError or VideoError."""
    content = read_json(clip.metadata)
    vectors, pose = gamefactory_track(read_gamefactory_entries(clip.metadata, content), clip.metadata)
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
    inverse = None
    if surroundings is not None:
        inverse = torch.from_numpy(decode_inverse_ray_distance(surroundings.log_inverse[: len(grey)]))
    try:
        eye_height = float(content.get("eye_height", camera.EYE_HEIGHT))
    except (TypeError, ValueError):
        eye_height = camera.EYE_HEIGHT
    pictures = torch.from_numpy(np.stack(grey)).float()[:, None] / 255
    return _Track(pictures, vectors[: len(grey) - 1], pose[: len(grey)], inverse, eye_height)


# ------------------------------------------------------------ alignment


def _align(tracks: list[_Track], measured: list[np.ndarray], axis: int) -> TurnAlignment | None:
    """Correlates measured and recorded turns about one axis (0 yaw, 1 pitch); None with too few turns."""
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
    clipped = np.clip(rows[near], -LARGEST_CHANGE, LARGEST_CHANGE)
    correlation = {lag: _correlate(clipped[:, 2], clipped[:, 3 + i]) for i, lag in enumerate(LAGS)}
    turning = np.abs(rows[:, 1]) >= 2
    ratio = float(np.median(rows[turning, 0] / rows[turning, 1])) if turning.sum() >= ENOUGH_CHANGES else None
    return TurnAlignment(correlation, int(near.sum()), turn_only, ratio)


def _changes(track: _Track, measured: np.ndarray, axis: int, turn_only: bool) -> np.ndarray:
    """[M, 3 + lags] degrees: measured and recorded turn, measured change, recorded change at each lag.

    Changes of the turning speed are compared, not turns: a constant turn looks the same at every lag, and the
    error that walking adds to a measured turn changes little from pair to pair. All lags use the same pairs:
    those measured well.
    """
    recorded = track.actions[:, :2] * actions.DEGREES_PER_UNIT
    good = measured[:, 2] > GOOD_MATCH
    if turn_only:
        good = good & track.standing & (np.abs(recorded[:, 1 - axis]) < OTHER_AXIS)
    k = np.arange(FIRST_PAIR - min(LAGS), len(recorded) - max(LAGS))
    k = k[good[k] & good[k - 1]]
    change = np.diff(recorded[:, axis], prepend=0)
    lags = [change[k + lag] for lag in LAGS]
    turn, last = measured[k, axis], measured[k - 1, axis]
    return np.stack([turn, recorded[k, axis], turn - last, *lags], 1)


def _correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of them is constant."""
    if len(a) < 2 or a.std() < 1e-6 or b.std() < 1e-6:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _judge_alignment(result: PictureCheck, has_deltas: bool) -> None:
    """Adds problems and notes for the correlations."""
    if not has_deltas:
        result.notes.append("alignment: not available, the clips record no camera turns")
        return
    for name, axis in (("yaw", result.yaw), ("pitch", result.pitch)):
        if axis is None:
            result.notes.append(
                f"alignment of {name}: not available, too few turns or too little texture in the pictures"
            )
            continue
        at = axis.correlation
        best = max(at, key=lambda lag: abs(at[lag]))
        if abs(at[best]) < LEAST_CORRELATION:
            result.problems.append(
                f"pictures and actions do not belong together: {name}_delta does not correlate with the "
                f"pictures at any lag (expected near 1 at lag 0, found {at[0]:.2f}, at best {at[best]:.2f}); "
                "check that each video belongs to its metadata, and the order of its entries"
            )
        elif best and abs(at[best]) > abs(at[0]) + LAG_MARGIN:
            frames = f"{abs(best)} frame{'s' if abs(best) > 1 else ''} {'late' if best > 0 else 'early'}"
            result.problems.append(
                f"the actions are {frames} ({name}: best lag {best:+d}: {at[best]:.2f} against {at[0]:.2f} "
                "at lag 0): entry k must be the action that led from frame k-1 to frame k; shift them"
            )
        elif at[best] < 0:
            result.problems.append(
                f"{name}_delta has the wrong sign (correlation {at[best]:.2f}, expected near +1): "
                f"+{name} must be {'right' if name == 'yaw' else 'down'}; negate it"
            )
        elif axis.turn_ratio is not None and not TURN_RATIOS[0] < axis.turn_ratio < TURN_RATIOS[1]:
            result.problems.append(
                f"{name}_delta has the wrong unit: the pictures turn {axis.turn_ratio:.2f} degrees for "
                "each recorded degree, expected about 1; deltas are in units of 15 degrees"
            )


# ------------------------------------------------------------ signs and field of view


def _sample_pairs(usable: np.ndarray) -> np.ndarray:
    """At most PAIRS_PER_CLIP of the pairs [T-1] bool, evenly spaced -> their indices."""
    indices = np.flatnonzero(usable)
    indices = indices[indices >= FIRST_PAIR]
    return indices[np.linspace(0, len(indices) - 1, min(PAIRS_PER_CLIP, len(indices))).astype(int)]


def _clipped_error(warped: Tensor, target: Tensor) -> Tensor:
    """Absolute pixel errors [B, H, W] of grey pictures [B, 1, H, W], at most LARGEST_ERROR."""
    return (warped - target)[:, 0].abs().clamp(max=LARGEST_ERROR)


def _sum_of_means(error: Tensor, visible: Tensor) -> float:
    """Sum over pictures [B, H, W] of the mean error over visible pixels."""
    return float(((error * visible).sum((1, 2)) / visible.sum((1, 2)).clamp(min=1)).sum())


def _warp_error(
    track: _Track, pairs: np.ndarray, fov: float, signs: tuple[int, int, int, int], ground: bool = False
) -> float:
    """Sum over pairs of the mean error (of 0..1) of a picture warped to the next pose.

    `signs` multiply yaw, pitch, x and z. Without `ground` only the rotation is used.
    """
    yaw, pitch, x, z = signs
    poses = track.poses_near(pairs[0]) * torch.tensor([x, 1, z, yaw, pitch])
    old, new, size = poses[pairs], poses[pairs + 1], track.grey.shape[-2:]
    inverse = (
        camera.ground_plane(new, *size, fov, camera.EYE_HEIGHT, camera.FAR_RAY_DISTANCE) if ground else 0.0
    )
    grid, visible = camera.reproject(old, new, inverse, *size, fov)
    return _sum_of_means(_clipped_error(camera.warp(track.grey[pairs], grid), track.grey[pairs + 1]), visible)


def _mean_errors(
    tracks: list[_Track],
    pairs: list[np.ndarray],
    fov: float,
    candidates: Iterable[tuple[int, int, int, int]],
    ground: bool = False,
) -> list[float]:
    """The mean warp error over all pairs for each candidate of signs."""
    used = [(t, p) for t, p in zip(tracks, pairs, strict=True) if len(p)]
    count = sum(map(len, pairs))
    return [sum(_warp_error(t, p, fov, signs, ground) for t, p in used) / count for signs in candidates]


def _name(signs: Iterable[int]) -> str:
    """(1, -1) -> "+-"."""
    return "".join("+" if s > 0 else "-" for s in signs)


def _check_signs(result: PictureCheck, tracks: list[_Track], fov: float) -> tuple[int, int]:
    """Measures the errors by signs, adds problems, and returns the best signs of yaw and pitch."""
    candidates = list(product((1, -1), repeat=2))
    turning = []
    for track in tracks:
        turn_only = _sample_pairs(track.turning & track.standing)
        turning.append(turn_only if len(turn_only) >= FEWEST_TURNS else _sample_pairs(track.turning))
    result.turn_pairs = sum(map(len, turning))
    best = (1, 1)
    if result.turn_pairs >= FEWEST_PAIRS:
        means = _mean_errors(tracks, turning, fov, [(*s, 1, 1) for s in candidates])
        errors = dict(zip(candidates, means, strict=True))
        result.turn_error = {_name(s): e for s, e in errors.items()}
        best = _judge_signs(result, errors, ("yaw", "pitch"), "+yaw is right, +pitch is down")
    else:
        result.notes.append("signs of yaw and pitch: not available, too few pairs with a recorded turn")
    walking = []
    for track in tracks:
        walked = np.linalg.norm(track.moved[:, [0, 2]], axis=1) >= WALKED
        level = np.abs(track.moved[:, 1]) < LEVEL
        walking.append(_sample_pairs(walked & level & np.isfinite(track.turned).all(1)))
    result.walk_pairs = sum(map(len, walking))
    if result.walk_pairs >= FEWEST_PAIRS:
        means = _mean_errors(tracks, walking, fov, [(*best, *s) for s in candidates], ground=True)
        errors = dict(zip(candidates, means, strict=True))
        result.walk_error = {_name(s): e for s, e in errors.items()}
        [result.walk_error["rotation"]] = _mean_errors(tracks, walking, fov, [(*best, 1, 1)])
        convention = "walking forward goes along (-sin yaw, 0, cos yaw) in [x, y, z]"
        _judge_signs(result, errors, ("x", "z"), convention)
    else:
        result.notes.append("signs of x and z: not available, too few pairs with a recorded walk")
    return best


def _judge_signs(
    result: PictureCheck,
    errors: dict[tuple[int, int], float],
    names: tuple[str, str],
    convention: str,
) -> tuple[int, int]:
    """Adds a problem if signs other than (+, +) are clearly better, and returns the better ones."""
    best = min(errors, key=errors.get)
    expected = errors[1, 1]
    if best == (1, 1) or errors[best] >= SIGN_MARGIN * expected:
        return 1, 1
    flipped = " and ".join(name for name, sign in zip(names, best, strict=True) if sign < 0)
    result.problems.append(
        f"{flipped} {'have' if 'and' in flipped else 'has'} the wrong sign in the poses: the pictures fit "
        f"{_name(best)} for ({', '.join(names)}) (error {errors[best]:.4f}), expected ++ ({expected:.4f}); "
        f"{convention}; negate {flipped}"
    )
    return best


def _check_fov(result: PictureCheck, tracks: list[_Track], signs: tuple[int, int]) -> None:
    """Measures the field of view of each clip with enough turns and judges the median."""
    values = []
    for result.fov_turn_only in (True, False):
        for track in tracks:
            usable = track.turning & track.standing if result.fov_turn_only else track.turning
            pairs = _sample_pairs(usable)
            if len(pairs) >= FEWEST_TURNS:
                values += _best_fov(track, pairs, (*signs, 1, 1))
        if values:
            break
    if not values:
        result.notes.append("field of view: not available, too few turns")
        return
    result.fov = float(np.median(values))
    result.fov_clips = len(values)
    if result.expected_fov is not None and abs(result.fov - result.expected_fov) > FOV_TOLERANCE:
        message = (
            f"vertical field of view: {result.fov:.1f} degrees fit the pictures best, expected "
            f"{result.expected_fov:g}; record with that, or give preprocess.py --vertical_fov "
            f"{result.fov:.0f}"
        )
        aligned = result.yaw is None or max(result.yaw.correlation, key=result.yaw.correlation.get) == 0
        # The estimate is unreliable where the player walks or where turns belong to other pictures.
        (result.problems if result.fov_turn_only and aligned else result.notes).append(message)


def _best_fov(track: _Track, pairs: np.ndarray, signs: tuple[int, int, int, int]) -> list[float]:
    """[degrees] of least warp error: a search from coarse to fine, then a parabola; [] at an end of the
    range.
    """
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


def _check_depth(result: PictureCheck, tracks: list[_Track], fov: float) -> None:
    """Measures the errors of warps with depth; adds a problem where a frame's own depth is not the best."""
    tracks = [track for track in tracks if track.inverse_ray_distance is not None]
    result.depth_clips = len(tracks)
    sums: dict[str, float] = {}
    for track in tracks:
        frames = _depth_frames(track)
        result.depth_pairs += len(frames)
        for name, error in _depth_errors(track, frames, fov).items() if len(frames) else ():
            sums[name] = sums.get(name, 0.0) + error
    if result.depth_pairs < FEWEST_PAIRS:
        if tracks:
            result.notes.append("depth: not verified, too few frames of a walk")
        return
    result.depth_error = {name: error / result.depth_pairs for name, error in sums.items()}
    own, ground = result.depth_error[f"{0:+d}"], result.depth_error["ground"]
    best = min(DEPTH_LAGS, key=lambda lag: result.depth_error[f"{lag:+d}"])
    if own >= ground:
        result.problems.append(
            f"depth does not belong to the pictures: the warp error with it is {own:.4f}, over a flat ground "
            f"{ground:.4f}, expected less; check that each depth file belongs to its video, or record again"
        )
    elif best:
        result.problems.append(
            f"depth is one frame {'late' if best > 0 else 'early'}: the depth of frame k{best:+d} fits the "
            f"picture of frame k better than its own (warp error {result.depth_error[f'{best:+d}']:.4f} "
            f"against {own:.4f}); shift the depth files' frames, or record again"
        )


def _depth_frames(track: _Track) -> np.ndarray:
    """Frames k with a walk from k to k + DEPTH_STEPS, evenly spaced.

    Prefers walks at whose end the camera turns, if there are enough: without a turn, the depth of
    neighbouring frames is too similar to be told apart.
    """
    steps = DEPTH_STEPS
    starts = np.arange(max(0, len(track.pose) - steps - 1))  # frame k + steps + 1 is needed too
    walked = np.linalg.norm(track.pose[starts + steps, :3] - track.pose[starts, :3], axis=1) >= DEPTH_WALKED
    walked &= np.isfinite(track.pose[starts]).all(1) & np.isfinite(track.pose[starts + steps]).all(1)
    turning = walked & track.turning[starts + steps - 1] & track.turning[starts + steps]
    frames = _sample_pairs(turning)
    return frames if len(frames) >= FEWEST_TURNS else _sample_pairs(walked)


def _depth_errors(track: _Track, frames: np.ndarray, fov: float) -> dict[str, float]:
    """Sums over frames k of the mean error of picture k warped to the pose of frame k + DEPTH_STEPS.

    By the inverse ray distances used: those of that later frame ("+0"), of its neighbours ("-1", "+1"), and
    of a flat ground ("ground"). All use the same pixels: those visible with each of them.
    """
    size, later = track.grey.shape[-2:], frames + DEPTH_STEPS
    poses = track.poses_near(frames[0])
    inverses = {
        f"{lag:+d}": F.interpolate(track.inverse_ray_distance[later + lag][:, None], size=size)[:, 0]
        for lag in DEPTH_LAGS
    }
    inverses["ground"] = camera.ground_plane(
        poses[later], *size, fov, track.eye_height, camera.FAR_RAY_DISTANCE
    )
    errors, visible = {}, torch.ones(len(frames), *size, dtype=torch.bool)
    for name, inverse in inverses.items():
        grid, in_view = camera.reproject(poses[frames], poses[later], inverse, *size, fov)
        errors[name] = _clipped_error(camera.warp(track.grey[frames], grid), track.grey[later])
        visible &= in_view
    return {name: _sum_of_means(error, visible) for name, error in errors.items()}
