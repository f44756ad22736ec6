"""The check of recorded clips: the shipped clips pass, and problems in damaged copies are reported."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import record
from dataset import actions, picture_check
from dataset.clip_check import Report, check_clips
from dataset.clip_report import report_text
from dataset.picture_check import GOOD_MATCH, check_pictures
from dataset.recordings import ClipWriter, clip_paths, depth_path, find_clips, read_depth_file
from dataset.surroundings import (
    BOX,
    FREE,
    REACH,
    Surroundings,
    encode_inverse_ray_distance,
    write_surroundings,
)
from dataset.token_files import SAMPLES
from geometry import camera
from metrics import measure_turns
from runtime.video import read_frames, write_video

LIMIT = 500  # frames of each clip: few of them change the pitch
FEW = 3  # shipped clips in a damaged copy


@pytest.fixture(scope="module", autouse=True)
def measured_once():
    """Most tests change the metadata alone: turns of the same pictures are measured once."""
    memory, measure = {}, picture_check.measure_turns

    def remember(before, after, pitch, fov):
        key = (hash(before.numpy().tobytes()), hash(after.numpy().tobytes()), pitch.tobytes(), fov)
        if key not in memory:
            memory[key] = measure(before, after, pitch, fov)
        return memory[key]

    picture_check.measure_turns = remember
    yield
    picture_check.measure_turns = measure


def copy_of(folder: Path, change: Callable[[dict], dict] | None = None, clips: int = FEW) -> Path:
    """Copies some shipped clips; `change` maps their entries {number: entry} to those to write."""
    for clip in find_clips(SAMPLES, "gamefactory", SAMPLES)[1][:clips]:
        content = json.loads(clip.metadata.read_text())
        if change:
            entries = {int(k): v for k, v in content["actions"].items()}
            content["actions"] = {str(k): v for k, v in sorted(change(entries).items())}
        (folder / "metadata").mkdir(parents=True, exist_ok=True)
        (folder / "video").mkdir(exist_ok=True)
        (folder / "metadata" / clip.metadata.name).write_text(json.dumps(content))
        (folder / "video" / clip.video.name).symlink_to(clip.video)
    return folder


def check(folder: Path, **options) -> Report:
    return check_clips(folder, progress=False, limit_frames=LIMIT, **options)


def shifted(by: int) -> Callable[[dict], dict]:
    """Moves turns and keys from entry k to entry k + by; poses stay."""

    def change(entries: dict) -> dict:
        keys = ("ws", "ad", "scs", "yaw_delta", "pitch_delta")
        last = max(entries)
        return {k: e | {n: entries[min(max(k - by, 0), last)][n] for n in keys} for k, e in entries.items()}

    return change


def scaled(**factors: float) -> Callable[[dict], dict]:
    """Multiplies fields of all entries; x and z are those of pos."""

    def change(entries: dict) -> dict:
        for entry in entries.values():
            x, y, z = entry["pos"]
            entry["pos"] = [x * factors.get("x", 1), y, z * factors.get("z", 1)]
            entry.update({n: entry[n] * f for n, f in factors.items() if n not in "xz"})
        return entries

    return change


@pytest.fixture(scope="module")
def good() -> Report:
    return check(SAMPLES, expected_fov=70.0)


def test_the_shipped_clips_pass(good):
    assert good.problems == [] and good.bad_files == []
    pictures = good.pictures
    for axis in (pictures.yaw, pictures.pitch):
        others = [abs(c) for lag, c in axis.correlation.items() if lag]
        assert axis.correlation[0] > 0.9 and max(others) < axis.correlation[0] - 0.4
    assert pictures.yaw.turn_ratio == pytest.approx(1, abs=0.1)
    assert pictures.fov == pytest.approx(70, abs=1.5)
    assert min(pictures.turn_error, key=pictures.turn_error.get) == "++"
    assert min(pictures.walk_error, key=pictures.walk_error.get) == "++"


def test_the_report_has_plain_values_and_a_table(good):
    content = json.loads(json.dumps(asdict(good)))
    assert content["clips"] == len(list((SAMPLES / "metadata").glob("*.json")))
    assert content["frames"] == sum(
        len(json.loads(path.read_text())["actions"]) for path in (SAMPLES / "metadata").glob("*.json")
    )
    assert sum(content["balance"]["classes"].values()) == pytest.approx(1)
    assert sum(content["biomes"].values()) == content["clips"]
    text = report_text(good)
    for words in ("no problem found", "at lag", "vertical field of view", "walk+turn", "biomes"):
        assert words in text


@pytest.mark.parametrize("by, words", [(1, "1 frame late"), (-1, "1 frame early")])
def test_shifted_actions_are_a_problem(tmp_path, by, words):
    report = check(copy_of(tmp_path, shifted(by)))
    assert any(f"the actions are {words} (yaw: best lag {by:+d}" in p for p in report.problems), report_text(
        report
    )
    assert "shift them" in report_text(report)
    correlation = report.pictures.yaw.correlation
    assert max(correlation, key=correlation.get) == by


@pytest.mark.parametrize(
    "factors, expected",
    [
        (
            {"yaw": -1, "yaw_delta": -1},
            ["yaw_delta has the wrong sign", "yaw has the wrong sign in the poses"],
        ),
        ({"pitch": -1}, ["pitch has the wrong sign in the poses"]),
        ({"pitch_delta": -1}, ["pitch_delta has the wrong sign"]),
        ({"z": -1}, ["z has the wrong sign in the poses"]),
        ({"x": -1, "z": -1}, ["x and z have the wrong sign in the poses"]),
        ({"yaw_delta": 0.3}, ["yaw_delta has the wrong unit"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_flipped_signs_and_wrong_units_are_the_only_problems(tmp_path, factors, expected):
    report = check(copy_of(tmp_path, scaled(**factors)))
    assert len(report.problems) == len(expected), report_text(report)
    for words in expected:
        assert any(words in problem for problem in report.problems)


def test_metadata_of_another_video_is_a_problem(tmp_path):
    """The turns of the entries are in reverse order, so they do not match the pictures."""

    def change(entries: dict) -> dict:
        backwards = {k: entries[max(entries) - k] for k in entries}
        return {k: e | {"yaw_delta": backwards[k]["yaw_delta"]} for k, e in entries.items()}

    report = check(copy_of(tmp_path, change))
    assert any("pictures and actions do not belong together" in p for p in report.problems), report_text(
        report
    )


def test_an_unexpected_field_of_view_is_a_problem():
    report = check_pictures(
        find_clips(SAMPLES, "auto", SAMPLES)[1][:FEW], LIMIT, expected_fov=80.0, progress=False
    )
    assert len(report.problems) == 1 and "expected 80; record with that" in report.problems[0]


def test_keyboard_only_clips_give_notes_but_no_problem(tmp_path):
    def change(entries: dict) -> dict:
        return {k: {n: e[n] for n in ("ws", "ad", "scs")} for k, e in entries.items()}

    report = check(copy_of(tmp_path, change, clips=1), expected_fov=70.0)
    found = report.pictures
    assert report.problems == []
    assert found.yaw is found.pitch is found.turn_error is found.walk_error is found.fov is None
    assert report.balance.pitch_mean is None and "record no camera turns" in report_text(report)


def test_pictures_without_texture_give_notes_but_no_problem(tmp_path):
    clip = find_clips(SAMPLES, "gamefactory", SAMPLES)[1][0]
    content = json.loads(clip.metadata.read_text())
    content["actions"] = {k: e for k, e in content["actions"].items() if int(k) < 20}
    (tmp_path / "a.json").write_text(json.dumps(content))
    write_video(tmp_path / "a.mp4", [np.full((72, 128, 3), 90, np.uint8)] * 20, 16)
    report = check(tmp_path, expected_fov=70.0)
    assert report.problems == [] and report.pictures.yaw is None
    assert any("too few turns or too little texture" in note for note in report.notes)


def test_broken_files_are_listed_one_per_line(tmp_path):
    clip = find_clips(SAMPLES, "gamefactory", SAMPLES)[1][0]
    content = json.loads(clip.metadata.read_text())
    content["actions"] = {k: e for k, e in content["actions"].items() if int(k) < 30}
    frames = list(read_frames(clip.video, wanted=range(30)))
    write_video(tmp_path / "good.mp4", frames, 16)
    (tmp_path / "good.json").write_text(json.dumps(content | {"ended": "crash", "world_seed": "7"}))
    names = ("no_json", "no_video", "torn_json", "gap", "code", "torn_video", "short_video")
    for name in names:
        shutil.copy(tmp_path / "good.mp4", tmp_path / f"{name}.mp4")
        shutil.copy(tmp_path / "good.json", tmp_path / f"{name}.json")
    (tmp_path / "no_json.json").unlink()
    (tmp_path / "no_video.mp4").unlink()
    (tmp_path / "torn_json.json").write_text('{"actions": {"0"')
    gap = {k: e for k, e in content["actions"].items() if k != "9"}
    (tmp_path / "gap.json").write_text(json.dumps({"actions": gap}))
    code = content["actions"] | {"4": content["actions"]["4"] | {"ws": 9}}
    (tmp_path / "code.json").write_text(json.dumps({"actions": code}))
    (tmp_path / "torn_video.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:-3000])
    write_video(tmp_path / "short_video.mp4", frames[:25], 16)
    report = check(tmp_path)
    assert len(report.bad_files) == len(names)
    for name in names:
        assert sum(f"{name}." in line for line in report.bad_files) == 1, (name, report.bad_files)
    assert len(report.problems) == 1 and f"{len(names)} of {len(names) + 1} clips" in report.problems[0]
    assert (report.frames, report.ended_early, report.worlds) == (30, {"good": "crash"}, {"world_7": 1})


# ------------------------------------------------------------ depth

ROOM_FRAMES = 60
EYE = 1.47


def room_pose() -> np.ndarray:
    """[T, 5]: a walk along a circle of about 3 m; the camera turns with it at varying speed."""
    t = np.arange(ROOM_FRAMES)
    yaw = 3 * t + 12 * np.sin(t / 4)
    step = 0.15 * np.stack([-np.sin(np.radians(yaw)), np.cos(np.radians(yaw))], 1)
    x, z = (np.cumsum(step, 0) - [2.8, 0]).T
    return np.stack([x, np.zeros_like(x), z, yaw, np.full_like(x, 8.0)], 1)


def room_view(pose: np.ndarray, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The view at `pose` [5] in a room of 14 m with noise on all surfaces: grey [h, w] and the ray distance
    [h, w] in metres."""
    pose = torch.from_numpy(pose).float()
    directions = camera.rays(height, width, 70.0) @ camera.rotation(pose[3], pose[4]).mT
    eye = camera.position(pose)
    low, high = torch.tensor([-7.0, -3.0, -7.0]), torch.tensor([7.0, EYE, 7.0])  # y is down
    distance = torch.where(directions > 0, (high - eye) / directions, (low - eye) / directions).amin(-1)
    points = eye + distance[..., None] * directions
    noise = torch.from_numpy(np.random.default_rng(0).random((1, 1, 16, 16, 16), np.float32))
    grey = torch.nn.functional.grid_sample(noise, points[None, None] / 8, align_corners=False)
    return grey[0, 0, 0], distance


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A clip of the room with its depth and nodes."""
    folder, pose = tmp_path_factory.mktemp("room"), room_pose()
    entries, codes = {}, []
    with ClipWriter(folder, "room", 16) as clip:
        for k, (x, y, z, yaw, pitch) in enumerate(pose):
            grey, _ = room_view(pose[k], 72, 128)
            clip.write(np.repeat((grey.numpy() * 255).astype(np.uint8)[..., None], 3, 2))
            codes.append(encode_inverse_ray_distance(1 / room_view(pose[k], 36, 64)[1].numpy()))
            turned = (yaw - pose[k - 1, 3]) / 15 if k else 0
            entries[str(k)] = {
                "ws": 1, "ad": 0, "scs": 0, "yaw_delta": turned, "pitch_delta": 0.0,
                "yaw": yaw, "pitch": pitch, "pos": [x, y, z],
            }  # fmt: skip
        nodes = np.full((len(pose), *BOX), FREE, np.uint8)
        origin = np.rint(pose[:, :3]).astype(np.int32) - REACH
        clip.finish({"eye_height": EYE, "actions": entries}, Surroundings(np.stack(codes), nodes, origin))
    return folder


def with_depth(room: Path, folder: Path, **changes: np.ndarray) -> Path:
    """A copy of the room's clip with other arrays in its depth file."""
    shutil.copytree(room, folder, dirs_exist_ok=True)
    video = clip_paths(folder, "room")[1]
    write_surroundings(depth_path(video), replace(read_depth_file(video), **changes))
    return folder


def test_correct_depth_passes(room):
    report = check(room)
    assert report.problems == [] and (report.with_depth, report.with_nodes) == (1, 1)
    errors = report.pictures.depth_error
    assert list(errors) == ["-1", "+0", "+1", "ground"]
    assert errors["+0"] < 0.95 * min(errors["-1"], errors["+1"], errors["ground"])
    assert "depth: warp error by lag -1" in report_text(report)


@pytest.mark.parametrize("shift, said", [(1, "depth is one frame late"), (-1, "depth is one frame early")])
def test_shifted_depth_is_a_problem_and_gives_exit_status_1(room, tmp_path, shift, said, capsys):
    """Depth file entry k has the depth of frame k - shift."""
    codes = read_depth_file(clip_paths(room, "room")[1]).log_inverse
    folder = with_depth(room, tmp_path, log_inverse=np.roll(codes, shift, 0))
    assert record.main(["--check", str(folder)]) == 1
    text = capsys.readouterr().out
    assert text.count("PROBLEM") == 1 and said in text and "shift the depth files' frames" in text


def test_wrong_depth_is_a_problem(room, tmp_path):
    codes = read_depth_file(clip_paths(room, "room")[1]).log_inverse
    report = check(with_depth(room, tmp_path, log_inverse=np.full_like(codes, 240)))
    assert len(report.problems) == 1 and "depth does not belong to the pictures" in report.problems[0]
    assert "over a flat ground" in report.problems[0]


def test_broken_depth_files_and_misplaced_nodes_are_bad_files(room, tmp_path):
    found = read_depth_file(clip_paths(room, "room")[1])
    for name, changes, said in (
        ("short", {n: a[:-1] for n, a in found.arrays().items()}, "59 frames, its clip has 60"),
        ("elsewhere", {"origin": found.origin + np.int32(5)}, "nodes lie"),
    ):
        report = check(with_depth(room, tmp_path / name, **changes))
        assert len(report.bad_files) == len(report.problems) == 1
        assert "broken depth" in report.bad_files[0] and said in report.bad_files[0]
    folder = with_depth(room, tmp_path / "torn")
    path = depth_path(clip_paths(folder, "room")[1])
    path.write_bytes(path.read_bytes()[:100])
    assert str(path) in check(folder).bad_files[0]


def test_clips_without_depth_pass(good):
    assert good.with_depth == 0 and good.pictures.depth_error is None
    assert "depth         0 clips" in report_text(good)


def test_depth_is_not_verified_without_a_walk(room, tmp_path):
    origin = read_depth_file(clip_paths(room, "room")[1]).origin
    with_depth(room, tmp_path, origin=np.repeat(origin[:1], len(origin), 0))
    metadata = clip_paths(tmp_path, "room")[0]
    content = json.loads(metadata.read_text())
    for entry in content["actions"].values():
        entry["pos"] = content["actions"]["0"]["pos"]
    metadata.write_text(json.dumps(content))
    report = check(tmp_path)
    assert report.pictures.depth_error is None and any("depth: not verified" in n for n in report.notes)


def test_minerl_gives_a_note_that_it_is_not_checked(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("recording.mp4", "metadata.json", "rendered.npz"):
        (folder / name).write_bytes(b"")
    report = check(tmp_path)
    assert report.problems == [] and "MineRL trajectories are not checked" in report_text(report)


def test_turns_up_to_15_degrees_are_measured():
    """A turning camera inside a sphere with noise."""
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.random((1, 1, 90, 180), np.float32))
    yaw, pitch = np.array([0, 15, 0.0, 4.3, 4.3, -10.5]), np.array([10, 10, 10, 10, 18, 18.0])
    rays = torch.einsum(
        "bij,hwj->bhwi",
        camera.rotation(torch.tensor(yaw), torch.tensor(pitch)).float(),
        camera.rays(72, 128, 70.0),
    )
    x, y, z = rays.unbind(-1)
    places = torch.stack([torch.atan2(x, z) / torch.pi, y.asin() / (torch.pi / 2)], -1)
    grey = camera.warp(noise.expand(len(yaw), -1, -1, -1), places)
    turns = measure_turns(grey[:-1], grey[1:], pitch[:-1], 70.0)
    np.testing.assert_allclose(turns[:, 0], np.diff(yaw), atol=0.05)
    np.testing.assert_allclose(turns[:, 1], np.diff(pitch), atol=0.05)
    assert (turns[:, 2] > GOOD_MATCH).all()


def test_action_classes():
    cases = {
        "still": [[0, 0, 0, 0, 0], [0.005, -0.005, 0, 0, 0]],
        "turn": [[0.1, 0, 0, 0, 0], [-0.1, 0.3, 0, 0, 0]],
        "look": [[0, -0.2, 0, 0, 0]],
        "walk": [[0, 0, 0, 1, 0], [0, 0, 0, -0.5, 0]],
        "strafe": [[0, 0, 1, 0, 0], [0, 0, -1, 1, 0]],
        "jump": [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]],
        "walk+turn": [[0.1, 0, 0, 1, 0], [0, 0.1, -1, 0, 0], [0.1, 0, 0, 0, 1]],
    }
    assert tuple(cases) == actions.CLASS_NAMES
    for name, vectors in cases.items():
        found = actions.action_class(np.array(vectors, np.float32))
        assert [actions.CLASS_NAMES[c] for c in found] == [name] * len(vectors)
    assert actions.action_class(np.zeros((0, 5))).shape == (0,)
