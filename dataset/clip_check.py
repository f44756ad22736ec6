"""Checks recorded clips in GF-Minecraft's layout: files, pictures against metadata, and what the player does.

Used by `python record.py --check DIR`. File errors and the statistics of actions and metadata come from all
clips, the measurements of picture_check.py from a sample. MineRL trajectories are not checked.
clip_report.py prints the result.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import actions
from dataset.picture_check import PictureCheck, check_pictures
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
from dataset.surroundings import REACH
from runtime.video import VideoError, header_frames, video_fps

NODES_OFFSET = (
    1.6  # metres: largest distance of the feet from the box's centre; on a step the eye lags behind
)


@dataclass
class ActionBalance:
    """Shares of frames by action over all readable clips."""

    classes: dict[str, float] = field(default_factory=dict)
    turns_left: float = 0.0
    turns_right: float = 0.0
    strafes_left: float = 0.0
    strafes_right: float = 0.0
    pitch_mean: float | None = None  # degrees, + down; None without poses


@dataclass
class Report:
    """The result of `check_clips`, as plain values. Counts by value are numbers of clips."""

    parent: str
    source: str
    clips: int = 0
    frames: int = 0  # of readable clips
    hours: float = 0.0
    bad_files: list[str] = field(default_factory=list)
    pictures: PictureCheck | None = None
    balance: ActionBalance | None = None
    biomes: dict[str, int] = field(default_factory=dict)
    worlds: dict[str, int] = field(default_factory=dict)
    styles: dict[str, int] = field(default_factory=dict)  # of the scripted player
    with_depth: int = 0
    with_nodes: int = 0
    ended_early: dict[str, str] = field(default_factory=dict)  # clip -> reason
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_clips(
    parent: Path,
    clips: int = 24,
    seed: int = 0,
    progress: bool = True,
    limit_frames: int = 200,
    expected_fov: float | None = None,
) -> Report:
    """Checks the data set in `parent`: metadata and headers of all clips, pictures of `clips` sampled clips.

    Of each sampled clip the first `limit_frames` frames are decoded. `expected_fov` (degrees, vertical) is
    compared with the measured one. Raises DataError if there is no clip.
    """
    source, all_clips = find_clips(parent, "auto", parent)
    report = Report(str(parent), source, len(all_clips))
    if source != "gamefactory":
        report.notes.append(
            "MineRL trajectories are not checked: they have no pose, and preprocess.py aligns their pictures "
            "itself"
        )
        return report
    readable, vectors, pitch = [], [], []
    for clip in tqdm(all_clips, desc="metadata", unit="clip", disable=not progress):
        try:
            clip_actions, pose = _check_files(clip, report)
        except (ClipError, VideoError) as error:
            report.bad_files.append(str(error))
            continue
        readable.append(clip)
        vectors.append(clip_actions)
        pitch.append(pose[:, 4])
    report.frames = sum(len(p) for p in pitch)
    if sum(map(len, vectors)):
        report.balance = measure_balance(vectors, np.concatenate(pitch))
    sample = random.Random(seed).sample(readable, min(clips, len(readable)))
    report.pictures = check_pictures(sample, limit_frames, expected_fov, progress)
    report.bad_files += report.pictures.bad_files
    if report.bad_files:
        report.problems.append(
            f"{len(report.bad_files)} of {len(all_clips)} clips cannot be used and preprocess.py will skip "
            "them: delete them, record them again, or repair the files listed as bad"
        )
    report.problems += report.pictures.problems
    report.notes += report.pictures.notes
    return report


def _check_files(clip: Clip, report: Report) -> tuple[np.ndarray, np.ndarray]:
    """Reads metadata, depth file and video header of a clip and adds them to the counts of `report`.

    Returns its actions [N, 5] and poses [N+1, 5]. Raises ClipError or VideoError for a bad file; the report
    is then unchanged, but for the counts of depth.
    """
    content = read_json(clip.metadata)
    vectors, pose = gamefactory_track(read_gamefactory_entries(clip.metadata, content), clip.metadata)
    _check_header(clip, len(pose))
    surroundings = read_depth_file(clip.video, len(pose))
    if surroundings is not None:
        report.with_depth += 1
        if surroundings.nodes is not None:
            report.with_nodes += 1
            _check_nodes(clip, surroundings.origin, pose)
    report.hours += len(pose) / (video_fps(clip.video) or GAMEFACTORY_FPS) / 3600
    ended = str(content.get("ended", "complete"))
    if ended != "complete":
        report.ended_early[clip.name] = ended
    for counts, value in (
        (report.biomes, content.get("biome", "unknown")),
        (report.worlds, world_key(content) or "unknown"),
        (report.styles, content.get("player_style", content.get("player", "unknown"))),
    ):
        counts[str(value)] = counts.get(str(value), 0) + 1
    return vectors, pose


def _check_header(clip: Clip, needed: int) -> None:
    """Raises ClipError or VideoError if the video is missing or its header states too few frames."""
    if not clip.video.is_file():
        raise ClipError("no video", f"{clip.video} is missing")
    stated = header_frames(clip.video)
    if 0 < stated < needed:
        raise ClipError("short video", f"{clip.video}: {stated} frames, its metadata has {needed} entries")


def _check_nodes(clip: Clip, origin: np.ndarray, pose: np.ndarray) -> None:
    """Raises ClipError if the boxes of nodes [K] of most frames are not centred on the player."""
    offset = np.abs(origin + REACH - pose[:, :3]).max(1)
    offset = offset[np.isfinite(offset)]
    if len(offset) and (offset > NODES_OFFSET).mean() > 0.05:
        raise ClipError(
            "broken depth",
            f"{clip.video}: its nodes lie {np.median(offset):.1f} m from its poses (median), expected at "
            f"most {NODES_OFFSET}; depth and metadata are of different recordings, record the clip again",
        )


def measure_balance(vectors: list[np.ndarray], pitch: np.ndarray) -> ActionBalance:
    """Shares of frames by action, from the action vectors [N, 5] of each clip and pitches [M] (degrees)."""
    every = np.concatenate(vectors)
    yaw, move_x = every[:, actions.YAW], every[:, actions.MOVE_X]
    classes = np.bincount(actions.action_class(every), minlength=len(actions.CLASS_NAMES)) / len(every)
    pitch = pitch[np.isfinite(pitch)]
    return ActionBalance(
        classes={name: float(s) for name, s in zip(actions.CLASS_NAMES, classes, strict=True)},
        turns_left=float((yaw < -actions.CAMERA_MOVES).mean()),
        turns_right=float((yaw > actions.CAMERA_MOVES).mean()),
        strafes_left=float((move_x < -actions.KEY_PRESSED).mean()),
        strafes_right=float((move_x > actions.KEY_PRESSED).mean()),
        pitch_mean=float(pitch.mean()) if len(pitch) else None,
    )
