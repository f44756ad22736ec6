"""The sections of evaluate.py on a room that is rendered exactly, so that all results are known.

A grid of tokens encodes the camera's pose, the tokenizer renders the view from it, and the evaluated models
move the camera as commanded, or fail in a known way.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PixelDistance
from torch import Tensor

from dataset.actions import MOVE_X, MOVE_Z, PITCH, YAW, from_keys
from dataset.surroundings import encode_inverse_ray_distance
from dataset.token_files import RECORDED, ClipEntry, Manifest, write_token_file
from dataset.windows import TokenClips
from evaluation import controllability, long_rollouts, memory, rollouts, teacher_forced, tokenizer_quality
from evaluation.aggregate import Scores
from evaluation.held_out_clips import HeldOutClips
from evaluation.picture_networks import PictureNetworks
from evaluation.plan import Plan
from geometry import camera
from metrics import PSNR_CEILING

HEIGHT, WIDTH, ROWS, COLUMNS = 72, 128, 18, 32
STEP = 0.1  # metres per frame
UNITS = torch.tensor([100.0, 100.0, 100.0, 50.0, 50.0])  # tokens per metre and per degree
MIDDLE = 30_000  # the token of 0
PLAN = Plan(
    contexts=(1, 6), horizons=(1, 4, 8, 20), windows=4, teacher_forced_frames=60, start_windows=4,
    still_windows=4, still_starts=2, still_seconds=4, memory_windows=2, look_aways=2, long_rollouts=2,
    long_frames=192,
)  # fmt: skip


class Room:
    """The tokenizer of a room of 8 x 3 x 8 metres, built of blocks of 1 metre with a random colour each."""

    device = torch.device("cpu")

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        self.shades = torch.rand(10, 10, 10, 3, generator=rng)
        self.half = torch.tensor([4.0, 1.5, 4.0])

    def decode_frames(self, tokens: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        yield from (self.render(part) for part in tokens.split(64))

    def encode_frames(self, pictures: Tensor) -> Tensor:
        return torch.zeros(len(pictures), ROWS, COLUMNS, dtype=torch.int64)

    def render(self, grids: Tensor) -> Tensor:
        pose = pose_of(grids)
        ahead = camera.rays(HEIGHT, WIDTH, 70.0)
        d = torch.einsum("bij,hwj->bhwi", camera.rotation(pose[:, 3], pose[:, 4]), ahead)
        d = d.where(d.abs() > 1e-6, torch.tensor(1e-6))
        eye = camera.position(pose)[:, None, None]
        far = ((torch.sign(d) * self.half - eye) / d).amin(-1)
        hit = eye + far[..., None] * d  # on the nearest wall
        x, y, z = (hit * 1.001 + 5).long().unbind(-1)
        return self.shades[x, y, z].permute(0, 3, 1, 2)


def grid_of(pose: Tensor) -> Tensor:
    """Pose [..., 5] -> tokens [..., ROWS, COLUMNS]: the first five rows encode it, the others repeat it."""
    coded = (pose * UNITS).round().long() + MIDDLE  # [..., 5]
    coded = coded[..., [0, 1, 2, 3, 4, 3, 4, 3, 4] * 2]
    return coded[..., None].expand(*coded.shape, COLUMNS).clone()


def pose_of(grids: Tensor) -> Tensor:
    return (grids[..., :5, 0] - MIDDLE).float() / UNITS


def walk(start: Tensor, actions: Tensor) -> Tensor:
    """The poses [B, T, 5] after the actions [B, T, 5] from `start` [B, 5]."""
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
    """An evaluated model that follows `gain` times the commands: 1 is exact, 0 frozen, -1 the opposite."""

    gain: float = 1.0
    forgets: bool = False  # every generated view is 40 degrees off
    name: str = "walker"

    def rollout(self, context: Tensor, actions: Tensor, pose: Tensor, description: str) -> Tensor:
        path = walk(pose_of(context[:, -1]), self.gain * actions[:, context.shape[1] - 1 :])
        if self.forgets:
            path[..., 3] += 40.0
        return grid_of(path)


def clip_actions(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Stretches of 8 frames with one kind of action each; every kind occurs."""
    kinds = ["still", "turn_right", "forward", "still", "turn_left", "back", "left", "right", "both", "look"]
    made = np.zeros((frames - 1, 5), np.float32)
    for i, first in enumerate(range(0, frames - 1, 8)):
        kind, now = kinds[(i + int(rng.integers(2))) % len(kinds)], slice(first, first + 8)
        made[now, 2:] = from_keys([kind] if kind != "both" else ["forward"])
        made[now, YAW] = {"turn_right": 0.1, "turn_left": -0.1, "both": 0.1}.get(kind, 0)
        made[now, PITCH] = 0.1 if kind == "look" and i % 20 < 10 else -0.1 if kind == "look" else 0
    return made


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> HeldOutClips:
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
def networks() -> PictureNetworks:
    distance = PixelDistance()
    return PictureNetworks({"perceptual": distance}, distance, None)


def measured(section, held_out: HeldOutClips, world: Walker, *more, plan: Plan = PLAN) -> dict[str, float]:
    scores = Scores(0)
    section(held_out, world, plan, *more, scores)
    return scores.metrics


@pytest.mark.parametrize("gain, pairs", [(1.0, 1.0), (0.0, 0.0), (-1.0, 0.0)])
def test_pairs_of_opposite_commands(held_out, gain, pairs):
    found = measured(controllability.control, held_out, Walker(gain), plan=replace(PLAN, start_windows=2))
    for name in controllability.PAIRS:
        assert found[f"control.pairs_by_frame.{name}"] == pairs, name
    assert found["control.command.jump"] == float(gain > 0)


def test_a_pair_needs_both_commands(held_out, monkeypatch):
    turns = {name: controllability.COMMANDS[name] for name in ("turn_left", "turn_right")}
    monkeypatch.setattr(controllability, "COMMANDS", turns)
    monkeypatch.setattr(controllability, "PAIRS", {"turn": tuple(turns)})

    class TurnsRight(Walker):
        def rollout(self, context, actions, pose, description):
            return super().rollout(context, actions.abs(), pose, description)

    found = measured(controllability.control, held_out, TurnsRight())
    assert found["control.command.turn_right"] == 1.0 and found["control.command.turn_left"] == 0.0
    assert found["control.pairs.turn"] == found["control.pairs_by_frame.turn"] == 0.0


def test_rotation_error_is_the_missing_rotation(held_out):
    right = measured(controllability.rotation, held_out, Walker(1.0))
    assert right["rotation.error_deg"] < 0.4
    assert right["recording.rotation.error_deg"] < 0.3, "the error of the method"
    half = measured(controllability.rotation, held_out, Walker(0.5))
    frozen = measured(controllability.rotation, held_out, Walker(0.0))
    for name, speed in controllability.ROTATIONS.items():
        assert right[f"rotation.gain.{name}"] == pytest.approx(1.0, abs=0.15), name
        assert half[f"rotation.gain.{name}"] == pytest.approx(0.5, abs=0.15), name
        assert frozen[f"rotation.error_deg.{name}"] == pytest.approx(max(speed), abs=0.2), name


def rolled_out(held_out: HeldOutClips, networks: PictureNetworks, world: Walker) -> dict[str, float]:
    recorded = rollouts.read_windows(held_out, PLAN, networks)
    scores = Scores(0)
    rollouts.measure(held_out, world, PLAN, networks, recorded, scores)
    return scores.metrics


def test_an_exact_model_is_perfect_and_a_frozen_one_equals_the_copy(held_out, networks):
    right, frozen = (rolled_out(held_out, networks, Walker(gain)) for gain in (1.0, 0.0))
    for horizon in ("h1", "h8", "h20", "mean20"):
        for context in (1, 6):
            key = f"rollout.ctx{context}.{horizon}"
            assert right[f"{key}.psnr_tokens"] > 40, "as exact as the tokens' rounding"
            assert frozen[f"{key}.psnr_tokens"] == pytest.approx(
                frozen[f"copy.rollout.ctx{context}.{horizon}.psnr_tokens"]
            )
    assert right["control.flow_profile"] > 0.99 and right["control.flow_ratio"] == pytest.approx(1, abs=0.05)
    assert frozen["control.flow_profile"] == 0.0 and frozen["control.flow_ratio"] < 1e-3
    assert right["control.sign.turn"] == right["recording.control.sign.turn"] == 1.0
    assert frozen["control.sign.turn"] == 0.0
    assert right["control.delta_psnr"] > 3 and frozen["control.delta_psnr"] == pytest.approx(0)
    assert frozen["rollout.ctx6.h20.perceptual"] > 5 * right["rollout.ctx6.h20.perceptual"]


def test_baselines_are_warped_by_the_true_poses(held_out, networks):
    """The rotated copy is better than the copy, and the ground plane changes it where the player walks."""
    found = rolled_out(held_out, networks, Walker())
    for horizon in ("h4", "h8"):
        assert (
            found[f"rot.rollout.ctx6.{horizon}.psnr_tokens"]
            > found[f"copy.rollout.ctx6.{horizon}.psnr_tokens"]
        )
    assert found["geo.rollout.ctx6.mean20.psnr_tokens"] != found["rot.rollout.ctx6.mean20.psnr_tokens"]
    assert found["rot.rollout.ctx1.h8.ssim"] == found["rot.rollout.ctx6.h8.ssim"], (
        "they do not depend on the context"
    )


def test_the_rotated_copy_is_exact_where_only_the_camera_rotated(held_out):
    """Compared in the middle, which both pictures show."""
    windows = controllability.pairs_at_rest(held_out, turning=True)[:3]
    last = held_out.decode(held_out.clips.batch(windows, 2)[0])
    warped = rollouts.warp_picture(held_out, windows, 2, last[:, :1], 0, np.array([1]), moves=False)
    inner = (slice(None), slice(None), slice(12, 60), slice(30, 98))
    error = (warped[:, 0] - last[:, 1])[inner].abs().mean()
    assert error < 0.5 * (last[:, 0] - last[:, 1])[inner].abs().mean()


def test_without_poses_there_is_no_ground_plane_and_rotations_are_summed_up(held_out, networks, monkeypatch):
    known = held_out.view_angles(np.array([[0, 40]]), 30)
    monkeypatch.setattr(held_out.clips, "pose", [np.full_like(p, np.nan) for p in held_out.clips.pose])
    summed = held_out.view_angles(np.array([[0, 40]]), 30)
    assert torch.allclose(summed - summed[:, :1], known - known[:, :1], atol=0.5)
    found = rolled_out(held_out, networks, Walker())
    assert "rot.rollout.ctx6.h8.psnr_tokens" in found and "geo.rollout.ctx6.h8.psnr_tokens" not in found


def test_recorded_actions_have_a_sign_only_where_a_single_command_is_constant():
    actions = torch.zeros(1, 20, 5)
    actions[0, 4:8, YAW] = 0.1
    actions[0, 8:12, MOVE_X] = 1
    actions[0, 12:16, MOVE_Z] = -1
    actions[0, 12, YAW] = 0.1  # not only backwards
    actions[0, 16:20, MOVE_Z] = 1
    recorded = SimpleNamespace(
        tokens=torch.zeros(1, 21, 2, 2), actions=actions, frames=np.array([1, 4, 8, 12, 16, 20])
    )
    signs = rollouts.commanded_signs(recorded, 15.0)
    assert signs["turn"][0].tolist() == [[0, -1, 0, 0, 0]]
    assert signs["strafe"][0].tolist() == [[0, 0, -1, 0, 0]]
    assert signs["forward_back"][0].tolist() == [[0, 0, 0, 0, 1]]


def test_change_while_standing_still(held_out):
    class Shimmers(Walker):
        def rollout(self, context, actions, pose, description):
            shaken = super().rollout(context, actions, pose, description)
            shaken[:, ::2, 3] += 50  # a degree
            return shaken

    found = measured(controllability.standing_still, held_out, Walker())
    assert found["still.change"] == 0.0 and found["recording.still.change"] == 0.0
    assert "still.change_ratio" not in found, "0 over 0 is left out"
    shimmer = measured(controllability.standing_still, held_out, Shimmers())
    assert shimmer["still.change"] > 0.005 and shimmer["still.flicker"] > 0.02
    windows = controllability.still_windows(held_out, PLAN)
    assert len(windows) >= 3
    for clip, start in windows:
        assert not held_out.clips.actions[clip][start + 5 : start + 13].any()


def test_standing_still_for_long(held_out):
    still = measured(controllability.standing_still, held_out, Walker())
    assert still["still.long.agreement"] == 1 and still["still.long.change"] == 0
    assert still["still.long.codes_ratio"] == still["still.long.gradient_ratio"] == 1
    assert still["still.long.psnr"] == pytest.approx(PSNR_CEILING)

    class Drifts(Walker):
        def rollout(self, context, actions, pose, description):
            drifting = super().rollout(context, actions, pose, description)
            turned = torch.arange(drifting.shape[1]) * 50  # a degree a frame
            drifting[:, :, [3, 5, 7]] += turned[None, :, None, None]
            return drifting

    drift = measured(controllability.standing_still, held_out, Drifts())
    assert drift["still.long.agreement"] < 0.9 and drift["still.long.change"] > 0.1
    assert drift["still.long.psnr"] < 20


def test_pairs_without_those_that_the_recording_blocks(held_out, monkeypatch):
    """At one start the recorded player walks against a wall, and so does the model."""
    plan = replace(PLAN, start_windows=4)
    windows = controllability.start_windows(held_out, plan)
    at_wall = int(windows[0, 1]) + plan.main_context - 1
    actions = [a.copy() for a in held_out.clips.actions]
    pose = [p.copy() for p in held_out.clips.pose]
    clip = int(windows[0, 0])
    actions[clip][at_wall : at_wall + 3] = [0, 0, 0, 1, 0]
    pose[clip][at_wall : at_wall + 4] = pose[clip][at_wall]
    monkeypatch.setattr(held_out.clips, "actions", actions)
    monkeypatch.setattr(held_out.clips, "pose", pose)
    blocked = controllability.blocked_commands(held_out, windows, plan)
    assert blocked["forward"].tolist() == [True, False, False, False]
    assert not any(blocked[name].any() for name in ("back", "left", "right"))

    class Walled(Walker):
        def rollout(self, context, actions, pose, description):
            actions = actions.clone()
            actions[0, :, MOVE_Z] = actions[0, :, MOVE_Z].clamp(max=0)  # a wall before the first start
            return super().rollout(context, actions, pose, description)

    found = measured(controllability.control, held_out, Walled(), plan=plan)
    assert found["control.blocked.forward_back"] == 0.25 and found["control.blocked.strafe"] == 0
    assert found["control.pairs_by_frame.forward_back"] == 0.75
    assert found["control.pairs_unblocked_by_frame.forward_back"] == 1
    assert found["control.pairs_unblocked_by_frame.strafe"] == found["control.pairs_by_frame.strafe"]
    assert "control.pairs_unblocked.turn" not in found, "nothing blocks a turn"


def test_visible_and_disoccluded_cells_are_measured_apart(held_out, networks):
    """A model that is right where the context shows the cell and grey elsewhere."""
    plan = replace(PLAN, contexts=(6,), windows=3)
    recorded = rollouts.read_windows(held_out, plan, networks)
    share = recorded.sources["recording"].values["visible_share"]
    assert share[:, 0].min() > 0.8 and share[:, -1].min() < share[:, 0].min()
    visible = recorded.visible[..., None, :, :].repeat_interleave(4, -1).repeat_interleave(4, -2)
    truth = recorded.sources["recording"]
    grey = torch.where(visible, truth.pictures, torch.full_like(truth.pictures, 0.5))
    tokens = torch.where(recorded.visible, truth.tokens, -1)
    source = rollouts.FrameSet(tokens, grey)
    rollouts.compare_parts(source, recorded)
    far = ((~recorded.visible).sum((2, 3)) >= rollouts.MIN_CELLS).numpy()
    assert far.any() and not far.all()
    for name, right in (("psnr", PSNR_CEILING), ("token_acc", 1.0), ("gradient_ratio", 1.0)):
        shown, hidden = (source.values[f"{name}_{part}"] for part in rollouts.PARTS)
        assert shown == pytest.approx(right, rel=0.2 if name == "gradient_ratio" else 1e-4), name
        assert np.isnan(hidden[~far]).all(), "too few cells"
        assert np.median(hidden[far]) < 0.6 * right, name
    found = rolled_out(held_out, networks, Walker())
    assert found["rollout.ctx6.h20.psnr_visible"] > 40 and found["rollout.ctx6.h20.psnr_disoccluded"] > 40
    assert "geo.rollout.ctx6.mean20.psnr_visible" in found
    assert 0 < found["recording.rollout.ctx6.h20.visible_share"] < 1


def test_recorded_depth_says_what_is_visible(held_out, networks, monkeypatch):
    """A wall just before the player is behind it after a step or two, so the old frame shows nothing new."""
    plan = replace(PLAN, contexts=(6,), windows=3)
    windows = held_out.windows(plan.span, plan.windows)
    frames = rollouts.measured_frames(plan)
    shares = {}
    for metres in (0.2, 100.0):
        code = encode_inverse_ray_distance(np.float32(1 / metres))
        depth = [np.full((240, 2 * ROWS, 2 * COLUMNS), code, np.uint8) for _ in held_out.lengths]
        monkeypatch.setattr(held_out.clips, "extras", {"depth": depth})
        monkeypatch.setattr(
            held_out.clips, "entries", [replace(e, depth=RECORDED) for e in held_out.clips.entries]
        )
        shares[metres] = rollouts.visible_cells(held_out, windows, plan, 5, frames).float().mean()
    assert shares[100.0] > shares[0.2] + 0.02


@pytest.mark.parametrize(
    "world, returned, away", [(Walker(), 1.0, 0.0), (Walker(0.0), 1.0, 1.0), (Walker(forgets=True), 0.0, 0.0)]
)
def test_memory_of_the_view_that_was_left(held_out, networks, world, returned, away):
    found = measured(memory.measure, held_out, world, networks)
    for angle in (30, 90, 180):
        key = f"memory.deg{angle}"
        # The rows of the grid that encode the position, which does not change, agree in any case.
        assert found[f"{key}.token_agreement"] >= returned
        assert (found[f"{key}.token_agreement"] > 0.9) == bool(returned)
        assert (found[f"{key}.away_agreement"] > 0.9) == bool(away), "a frozen model is recognised"
        assert (found[f"{key}.psnr"] > 50) == bool(returned)
    if returned:
        assert found["memory.deg90.relative"] == found["memory.deg90.out_of_view_relative"] == 1.0


def test_recorded_look_aways_are_found():
    pose = np.zeros((100, 5))
    pose[10:20, 3] = np.linspace(0, 90, 10)
    pose[20:30, 3] = 90
    pose[30:40, 3] = np.linspace(90, 0, 10)
    pose[60:70, 3] = 15  # too little
    assert memory.look_aways(pose) == [(0, 39, 90.0)]
    pose[:, 0] = np.arange(100) / 10  # walks on, so it never returns to the same place
    assert memory.look_aways(pose) == []
    assert memory.look_aways(np.full((100, 5), np.nan)) == []


def test_long_rollouts_of_an_exact_and_of_a_frozen_model(held_out, networks):
    exact = measured(long_rollouts.measure, held_out, Walker(), networks)
    frozen = measured(long_rollouts.measure, held_out, Walker(0.0), networks)
    assert exact["long.collapse_frame"] == -1
    assert frozen["long.collapse_frame"] == 0
    assert exact["long.fd_last"] < frozen["long.fd_last"]
    assert exact["long.codes_ratio"] == pytest.approx(1, abs=0.2)


def test_long_rollouts_from_short_clips_repeat_their_actions(held_out):
    plan = Plan(contexts=(6,), long_rollouts=2, long_frames=600)
    clips, actions = long_rollouts.long_contexts(held_out, plan)
    assert len(clips) == 2 and actions.shape == (2, 605, 5)
    assert torch.equal(actions[0, 239 : 2 * 239], actions[0, :239])


def test_stretches_share_the_frames_and_stay_inside_the_clips():
    chosen = teacher_forced.stretches([10, 500, 30], 130)
    assert [clip for clip, _, _ in chosen] == [0, 1, 2]
    assert sum(count for _, _, count in chosen) == 130
    assert [count for _, _, count in chosen] == [9, 92, 29], "what short clips lack is given to longer ones"
    assert all(0 <= start and start + count <= length - 1
               for (_, start, count), length in zip(chosen, [10, 500, 30], strict=True))  # fmt: skip
    assert teacher_forced.stretches([10, 500, 30], 10_000) == [(0, 0, 9), (1, 0, 499), (2, 0, 29)]


def test_tokens_of_a_still_camera_do_not_flip_in_a_perfect_tokenizer(held_out, networks):
    scores = Scores(0)
    tokenizer_quality.measure(held_out, rollouts.read_windows(held_out, PLAN, networks), scores)
    assert scores.metrics["tokenizer.flip_rate"] == 0.0
    assert scores.metrics["tokenizer.used_codes"] == len(np.unique(np.concatenate(held_out.clips.tokens)))
    assert "tokenizer.psnr" not in scores.metrics, "the room has no videos"


def test_intervals_are_over_clips_not_windows():
    """20 windows of two clips are only two independent samples."""
    clips = np.array([0] * 19 + [1])
    scores = Scores(0)
    scores.mean("x", np.where(clips == 0, 10.0, 20.0), clips)
    assert scores.metrics["x"] == pytest.approx(10.5) and scores.ci95["x"] == [10.0, 20.0]
    scores.statistic("median", np.where(clips == 0, 10.0, 20.0), clips, np.median)
    assert scores.metrics["median"] == 10.0 and scores.ci95["median"] == [10.0, 20.0]


def test_a_metric_without_values_has_no_entry():
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
