"""The sections of evaluate.py against worlds whose every picture is known: a room, rendered exactly.

The room's tokens say where the camera is, its tokenizer paints what is seen from there, and the worlds that
are judged walk in it as they are told, or do not.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PixelDistance
from torch import Tensor

from dataset.actions import MOVE_X, MOVE_Z, PITCH, YAW, from_keys
from dataset.token_files import ClipEntry, Manifest, write_token_file
from dataset.windows import TokenClips
from evaluation import controllability, long_rollouts, memory, rollouts, teacher_forced, tokenizer_quality
from evaluation.aggregate import Scores
from evaluation.held_out_clips import HeldOutClips, Judges, Plan
from geometry import camera
from metrics import PSNR_CEILING

HEIGHT, WIDTH, ROWS, COLUMNS = 72, 128, 18, 32
STEP = 0.1  # metres a frame
UNITS = torch.tensor([100.0, 100.0, 100.0, 50.0, 50.0])  # tokens a metre and a degree
MIDDLE = 30_000  # the token of 0
PLAN = Plan(
    contexts=(1, 6), horizons=(1, 4, 8, 20), windows=4, teacher_forced=60, starts=4, still=4, memory=2,
    recorded=2, streams=2, life=192,
)  # fmt: skip


class Room:
    """A room of 8 x 3 x 8 metres, built of blocks of a metre, each of a colour of its own."""

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        self.shades = torch.rand(10, 10, 10, 3, generator=rng)
        self.half = torch.tensor([4.0, 1.5, 4.0])
        self.quantizer = SimpleNamespace(codebook=torch.zeros(1))

    def decode_code(self, grids: Tensor) -> Tensor:
        pose = pose_of(grids)
        ahead = camera.rays(HEIGHT, WIDTH, 70.0)
        d = torch.einsum("bij,hwj->bhwi", camera.rotation(pose[:, 3], pose[:, 4]), ahead)
        d = d.where(d.abs() > 1e-6, torch.tensor(1e-6))
        eye = camera.position(pose)[:, None, None]
        far = ((torch.sign(d) * self.half - eye) / d).amin(-1)
        hit = eye + far[..., None] * d  # where the ray meets the nearest wall
        x, y, z = (hit * 1.001 + 5).long().unbind(-1)
        return self.shades[x, y, z].permute(0, 3, 1, 2)

    def encode(self, pictures: Tensor) -> Tensor:
        return torch.zeros(len(pictures), ROWS, COLUMNS, dtype=torch.int64)


def grid_of(pose: Tensor) -> Tensor:
    """Pose [..., 5] -> tokens [..., ROWS, COLUMNS]: five rows say it, the others tell places apart."""
    coded = (pose * UNITS).round().long() + MIDDLE  # [..., 5]
    coded = coded[..., [0, 1, 2, 3, 4, 3, 4, 3, 4] * 2]
    return coded[..., None].expand(*coded.shape, COLUMNS).clone()


def pose_of(grids: Tensor) -> Tensor:
    return (grids[..., :5, 0] - MIDDLE).float() / UNITS


def walk(start: Tensor, actions: Tensor) -> Tensor:
    """Poses [B, T, 5] that actions [B, T, 5] lead through from start [B, 5]."""
    pose, path = start.clone(), []
    for t in range(actions.shape[1]):
        a = actions[:, t]
        pose = pose.clone()
        pose[:, 3:] += a[:, [YAW, PITCH]] * 15
        yaw = torch.deg2rad(pose[:, 3])
        pose[:, 0] += STEP * (-yaw.sin() * a[:, MOVE_Z] - yaw.cos() * a[:, MOVE_X])
        pose[:, 2] += STEP * (yaw.cos() * a[:, MOVE_Z] - yaw.sin() * a[:, MOVE_X])
        pose[:, 1] = start[:, 1] + 0.1 * (t + 1) * a[:, 4].clamp(max=1) * (t < 5)
        pose[:, [0, 2]] = pose[:, [0, 2]].clamp(-3.8, 3.8)
        path.append(pose)
    return torch.stack(path, 1)


@dataclass
class Walker:
    """A world that does what it is told times `obeys`: 1 obeys, 0 is frozen, -1 does the opposite."""

    obeys: float = 1.0
    forgets: bool = False  # anything but the last seen place is elsewhere
    name: str = "walker"

    def rollout(self, seen: Tensor, actions: Tensor, pose: Tensor, what: str) -> Tensor:
        path = walk(pose_of(seen[:, -1]), self.obeys * actions[:, seen.shape[1] - 1 :])
        if self.forgets:
            path[..., 3] += 40.0
        return grid_of(path)


def clip_actions(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Stretches of 8 frames, each of one kind; every kind occurs."""
    kinds = ["still", "turn_right", "forward", "still", "turn_left", "back", "left", "right", "both", "look"]
    made = np.zeros((frames - 1, 5), np.float32)
    for i, first in enumerate(range(0, frames - 1, 8)):
        kind, now = kinds[(i + int(rng.integers(2))) % len(kinds)], slice(first, first + 8)
        made[now, 2:] = from_keys([kind] if kind != "both" else ["forward"])
        made[now, YAW] = {"turn_right": 0.1, "turn_left": -0.1, "both": 0.1}.get(kind, 0)
        made[now, PITCH] = 0.1 if kind == "look" and i % 20 < 10 else -0.1 if kind == "look" else 0
    return made


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> HeldOutClips:
    """Three clips of 240 frames in the room, without videos."""
    folder, rng = tmp_path_factory.mktemp("room"), np.random.default_rng(0)
    manifest = Manifest(16.0, [HEIGHT, WIDTH], [ROWS, COLUMNS], 65_536, "room", 70.0)
    for name in "abc":
        actions = torch.from_numpy(clip_actions(rng, 240))[None]
        start = torch.tensor(
            [[rng.uniform(-1, 1), 0.0, rng.uniform(-1, 1), rng.uniform(-90, 90), 5.0]]
        ).float()
        pose = torch.cat([start[:, None], walk(start, actions)], 1)[0]
        pose = pose_of(grid_of(pose))  # as exact as tokens are
        write_token_file(folder / f"{name}.npz", grid_of(pose).numpy(), actions[0].numpy(), pose.numpy())
        manifest.clips.append(ClipEntry(name, f"{name}.npz", 240, "val", f"{name}.mp4", [0, 239, 1]))
    manifest.save(folder)
    return HeldOutClips(TokenClips(folder, "val"), Room(), seed=0)


@pytest.fixture(scope="module")
def judges() -> Judges:
    distance = PixelDistance()
    return Judges({"perceptual": distance}, distance, None)


def measured(section, held: HeldOutClips, world: Walker, *more) -> dict[str, float]:
    scores = Scores(0)
    section(held, world, PLAN, *more, scores)
    return scores.metrics


# ---------------------------------------------------------------- obedience


@pytest.mark.parametrize("obeys, pairs", [(1.0, 1.0), (0.0, 0.0), (-1.0, 0.0)])
def test_pairs_of_opposite_commands(held, obeys, pairs):
    found = measured(controllability.obey, held, Walker(obeys))
    for name in controllability.PAIRS:
        assert found[f"obey.pairs_by_frame.{name}"] == pairs, name
    assert found["obey.command.jump"] == float(obeys > 0)


def test_one_right_command_of_two_is_no_pair(held):
    class TurnsRight(Walker):
        def rollout(self, seen, actions, pose, what):
            return super().rollout(seen, actions.abs(), pose, what)

    found = measured(controllability.obey, held, TurnsRight())
    assert found["obey.command.turn_right"] == 1.0 and found["obey.command.turn_left"] == 0.0
    assert found["obey.pairs.turn"] == found["obey.pairs_by_frame.turn"] == 0.0


def test_rotation_error_is_what_is_missing_of_the_turn(held):
    right = measured(controllability.turn, held, Walker(1.0))
    assert right["obey.rotation_deg_median"] < 0.4
    assert right["obey.rotation_deg_median.real"] < 0.3, "the method's own error"
    half = measured(controllability.turn, held, Walker(0.5))
    frozen = measured(controllability.turn, held, Walker(0.0))
    for name, speed in controllability.TURNS.items():
        assert right[f"obey.rotation_gain.{name}"] == pytest.approx(1.0, abs=0.15), name
        assert half[f"obey.rotation_gain.{name}"] == pytest.approx(0.5, abs=0.15), name
        assert frozen[f"obey.rotation_deg.{name}"] == pytest.approx(max(speed), abs=0.2), name


# ---------------------------------------------------------------- rollouts


def rolled(held: HeldOutClips, judges: Judges, world: Walker) -> dict[str, float]:
    recorded = rollouts.record(held, PLAN, judges)
    scores = Scores(0)
    rollouts.measure(held, world, PLAN, judges, recorded, scores)
    return scores.metrics


def test_a_world_that_does_as_recorded_is_perfect_and_a_frozen_one_is_the_copy(held, judges):
    right, frozen = (rolled(held, judges, Walker(obeys)) for obeys in (1.0, 0.0))
    for horizon in ("h1", "h8", "h20", "mean20"):
        for context in (1, 6):
            key = f"rollout.ctx{context}.{horizon}"
            assert right[f"{key}.psnr_tokens"] > 40, "as exact as a place in a token"
            assert frozen[f"{key}.psnr_tokens"] == pytest.approx(
                frozen[f"copy.ctx{context}.{horizon}.psnr_tokens"]
            )
    assert right["obey.flow_profile"] > 0.99 and right["obey.flow_ratio"] == pytest.approx(1, abs=0.05)
    assert frozen["obey.flow_profile"] == 0.0 and frozen["obey.flow_ratio"] < 1e-3
    assert right["obey.sign.turn"] == right["obey.sign.turn.real"] == 1.0
    assert frozen["obey.sign.turn"] == 0.0
    assert right["obey.delta_psnr"] > 3 and frozen["obey.delta_psnr"] == pytest.approx(0)
    assert frozen["rollout.ctx6.h20.perceptual"] > 5 * right["rollout.ctx6.h20.perceptual"]


def test_rows_beside_the_model_know_what_they_should(held, judges):
    """The camera turned with the truth; the ground plane helps where the player walks."""
    found = rolled(held, judges, Walker())
    for horizon in ("h4", "h8"):
        assert found[f"rot.ctx6.{horizon}.psnr_tokens"] > found[f"copy.ctx6.{horizon}.psnr_tokens"]
    assert found["geo.ctx6.mean20.psnr_tokens"] != found["rot.ctx6.mean20.psnr_tokens"]
    assert found["rot.ctx1.h8.ssim"] == found["rot.ctx6.h8.ssim"], "they do not depend on the context"


def test_a_turned_copy_is_exact_where_only_the_camera_turned(held):
    """Straight from the last seen picture: what it saw is where it belongs."""
    windows = controllability.pairs_at_rest(held, turning=True)[:3]
    last = held.decode(held.batch(windows, 2)[0])
    warped = rollouts.warp(held, windows, 2, last[:, :1], 0, np.array([1]), moved=False)
    inner = (slice(None), slice(None), slice(12, 60), slice(30, 98))
    error = (warped[:, 0] - last[:, 1])[inner].abs().mean()
    assert error < 0.5 * (last[:, 0] - last[:, 1])[inner].abs().mean()


def test_without_poses_there_is_no_ground_plane_and_turns_are_summed_up(held, judges, monkeypatch):
    known = held.turned(np.array([[0, 40]]), 30)
    monkeypatch.setattr(held.clips, "pose", [np.full_like(p, np.nan) for p in held.clips.pose])
    summed = held.turned(np.array([[0, 40]]), 30)
    assert torch.allclose(summed - summed[:, :1], known - known[:, :1], atol=0.5)
    found = rolled(held, judges, Walker())
    assert "rot.ctx6.h8.psnr_tokens" in found and "geo.ctx6.h8.psnr_tokens" not in found


def test_recorded_actions_ask_only_where_they_are_clear():
    actions = torch.zeros(1, 20, 5)
    actions[0, 4:8, YAW] = 0.1
    actions[0, 8:12, MOVE_X] = 1
    actions[0, 12:16, MOVE_Z] = -1
    actions[0, 12, YAW] = 0.1  # not backwards alone
    actions[0, 16:20, MOVE_Z] = 1
    recorded = SimpleNamespace(
        tokens=torch.zeros(1, 21, 2, 2), actions=actions, frames=np.array([1, 4, 8, 12, 16, 20])
    )
    asked = rollouts.commanded(recorded, 15.0)
    assert asked["turn"][0].tolist() == [[0, -1, 0, 0, 0]]
    assert asked["strafe"][0].tolist() == [[0, 0, -1, 0, 0]]
    assert asked["forward_back"][0].tolist() == [[0, 0, 0, 0, 1]]


# ---------------------------------------------------------------- stillness and memory


def test_standing_still(held):
    class Shimmers(Walker):
        def rollout(self, seen, actions, pose, what):
            shaken = super().rollout(seen, actions, pose, what)
            shaken[:, ::2, 3] += 50  # a degree
            return shaken

    found = measured(controllability.stand, held, Walker())
    assert found["still.change"] == 0.0 and found["still.change.truth"] == 0.0
    assert "still.change_ratio" not in found, "nothing over nothing is no number"
    shimmer = measured(controllability.stand, held, Shimmers())
    assert shimmer["still.change"] > 0.005 and shimmer["still.flicker"] > 0.02
    windows = controllability.still_windows(held, PLAN)
    assert len(windows) >= 3
    for clip, start in windows:
        assert not held.clips.actions[clip][start + 5 : start + 13].any()


@pytest.mark.parametrize(
    "world, returned, away", [(Walker(), 1.0, 0.0), (Walker(0.0), 1.0, 1.0), (Walker(forgets=True), 0.0, 0.0)]
)
def test_memory_of_the_view_that_was_left(held, judges, world, returned, away):
    found = measured(memory.measure, held, world, judges)
    for angle in (30, 90, 180):
        key = f"memory.deg{angle}"
        # Rows of the grid that say where the camera is, and not how it is turned, agree all the same.
        assert found[f"{key}.token_agreement"] >= returned
        assert (found[f"{key}.token_agreement"] > 0.9) == bool(returned)
        assert (found[f"{key}.away_agreement"] > 0.9) == bool(away), "a frozen world is found out"
        assert (found[f"{key}.psnr"] > 50) == bool(returned)
    if returned:
        assert found["memory.deg90.relative"] == found["memory.deg90.hidden_relative"] == 1.0


def test_recorded_look_aways_are_found():
    pose = np.zeros((100, 5))
    pose[10:20, 3] = np.linspace(0, 90, 10)
    pose[20:30, 3] = 90
    pose[30:40, 3] = np.linspace(90, 0, 10)
    pose[60:70, 3] = 15  # too little
    assert memory.look_aways(pose) == [(0, 39, 90.0)]
    pose[:, 0] = np.arange(100) / 10  # walked on: came back elsewhere
    assert memory.look_aways(pose) == []
    assert memory.look_aways(np.full((100, 5), np.nan)) == []


# ---------------------------------------------------------------- life, teacher-forced, tokenizer


def test_life_of_a_world_that_goes_on_and_of_one_that_freezes(held, judges):
    alive = measured(long_rollouts.measure, held, Walker(), judges)
    frozen = measured(long_rollouts.measure, held, Walker(0.0), judges)
    assert alive["long_rollouts.collapse_frame"] == -1
    assert frozen["long_rollouts.collapse_frame"] == 0
    assert alive["long_rollouts.fd_last"] < frozen["long_rollouts.fd_last"]
    assert alive["long_rollouts.codes_ratio"] == pytest.approx(1, abs=0.2)


def test_streams_of_short_clips_repeat_their_actions(held):
    plan = Plan(contexts=(6,), streams=2, life=600)
    clips, seen, actions = long_rollouts.streams(held, plan)
    assert len(clips) == 2 and seen.shape == (2, 6, ROWS, COLUMNS) and actions.shape == (2, 605, 5)
    assert torch.equal(actions[0, 239 : 2 * 239], actions[0, :239])


def test_stretches_share_the_frames_and_stay_inside():
    chosen = teacher_forced.stretches([10, 500, 30], 130)
    assert [clip for clip, _, _ in chosen] == [0, 1, 2]
    assert sum(count for _, _, count in chosen) == 130
    assert [count for _, _, count in chosen] == [9, 92, 29], "what short clips do not use goes to the others"
    assert all(0 <= start and start + count <= length - 1
               for (_, start, count), length in zip(chosen, [10, 500, 30], strict=True))  # fmt: skip
    assert teacher_forced.stretches([10, 500, 30], 10_000) == [(0, 0, 9), (1, 0, 499), (2, 0, 29)]


def test_tokens_of_a_still_camera_do_not_flip_in_a_perfect_tokenizer(held, judges):
    scores = Scores(0)
    tokenizer_quality.measure(held, rollouts.record(held, PLAN, judges), scores)
    assert scores.metrics["tokenizer.flip_rate"] == 0.0
    assert scores.metrics["tokenizer.used_codes"] == len(np.unique(np.concatenate(held.clips.tokens)))
    assert "tokenizer.psnr" not in scores.metrics, "there are no videos"


# ---------------------------------------------------------------- scores


def test_intervals_are_over_clips_not_windows():
    """20 windows of two clips: however many windows, only two independent things were seen."""
    clips = np.array([0] * 19 + [1])
    scores = Scores(0)
    scores.mean("x", np.where(clips == 0, 10.0, 20.0), clips)
    assert scores.metrics["x"] == pytest.approx(10.5) and scores.ci95["x"] == [10.0, 20.0]
    scores.statistic("median", np.where(clips == 0, 10.0, 20.0), clips, np.median)
    assert scores.metrics["median"] == 10.0 and scores.ci95["median"] == [10.0, 20.0]


def test_what_was_not_measured_has_no_entry():
    scores = Scores(0)
    scores.mean("nothing", np.full(3, np.nan), np.arange(3))
    scores.statistic("nothing too", np.zeros(0), np.zeros(0), np.median)
    scores.ratio("none", "nothing", "nothing too")
    assert scores.metrics == {}
    scores.mean("some", np.array([1.0, np.nan, 3.0]), np.arange(3))
    assert scores.metrics == {"some": 2.0}
    scores.mean("weighted", np.array([1.0, 9.0]), np.arange(2), np.array([1, 3]))
    assert scores.metrics["weighted"] == 2.5
    assert PSNR_CEILING > 50
