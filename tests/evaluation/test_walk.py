"""Section walk, on a panorama of textured cells: a world that walks on, and ones that fail in known ways."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PixelDistance
from torch import Tensor, nn

from dataset.actions import JUMP, MOVE_X, MOVE_Z, PITCH, YAW
from dataset.token_files import ClipEntry, Manifest, write_token_file
from dataset.windows import TokenClips
from evaluation import report, walk
from evaluation.aggregate import Scores
from evaluation.evaluated_model import EvaluatedModel
from evaluation.held_out_clips import HeldOutClips
from evaluation.picture_networks import PictureNetworks
from evaluation.plan import Plan
from model_convGru import Prediction
from rollout.context import start_places
from rollout.forward_walk import ForwardPlayer
from rollout.mixed_walk import mixed_walk
from rollout.sampling import SamplingConfig

ROWS, COLUMNS, CODES, SIDE = 6, 24, 64, 4
STEP = 0.25  # metres a frame; the panorama moves by a cell
PLAN = Plan(contexts=(2,), walk_starts=3, walk_seconds=5)


class Tiles:
    """The tokenizer of the panorama: each code is a smooth tile of its own brightness; 0 is flat grey."""

    device = torch.device("cpu")
    fingerprint = "tiles"

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        slopes = torch.linspace(-0.5, 0.5, SIDE)
        pattern = slopes * torch.randn(CODES, 1, 1, 1, generator=rng) * 0.4
        level = torch.rand(CODES, 3, 1, 1, generator=rng)
        self.tiles = (level + pattern).clamp(0, 1).expand(CODES, 3, SIDE, SIDE).clone()
        self.tiles[0] = 0.5

    def decode(self, tokens: Tensor) -> Tensor:
        pictures = self.tiles[tokens]  # [B, H, W, 3, SIDE, SIDE]
        return pictures.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def decode_frames(self, tokens: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        yield self.decode(tokens)


Rule = Callable[[Tensor, Tensor, int], Tensor]  # tokens [B, H, W], moved [B] bool, frame -> next tokens


class FakeWorld(nn.Module):
    """A world whose next tokens are those of a rule. It walks by STEP, or stands before a wall."""

    def __init__(self, rule: Rule, posed: bool = True, wall: bool = False):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.rule, self.posed, self.wall, self.tokenizer = rule, posed, wall, Tiles()

    def init_state(self, batch, device=None):
        return 0, torch.zeros(batch, 5)

    def predict(self, tokens, actions, state, observed=True, picture=None, true_pose=None):
        frame, pose = state
        pose = pose.clone()
        pose[:, YAW + 3] += actions[:, YAW] * 15
        if not self.wall:
            pose[:, 2] += STEP * actions[:, MOVE_Z]
        moved = (actions.abs() > 0).any(1)
        if not observed or frame >= PLAN.main_context - 1:
            tokens = self.rule(tokens, moved, frame)
        return Prediction(tokens), (frame + 1, pose)

    def logits(self, prediction, cells=None, trust=None):
        return 50 * nn.functional.one_hot(prediction.features, CODES).movedim(-1, 1).float()

    def pose_of(self, state):
        return state[1] if self.posed else None


def exact(tokens: Tensor, moved: Tensor, frame: int) -> Tensor:
    return torch.where(moved[:, None, None], tokens.roll(-1, 2), tokens)


def frozen(tokens: Tensor, moved: Tensor, frame: int) -> Tensor:
    return tokens


def fading(tokens: Tensor, moved: Tensor, frame: int) -> Tensor:
    """After 1.5 seconds half of the columns become one flat code."""
    following = exact(tokens, moved, frame)
    if frame > 24:
        following[:, :, : COLUMNS // 2] = 0
    return following


def scrambled(tokens: Tensor, moved: Tensor, frame: int) -> Tensor:
    """Another panorama in each frame: as much detail, but it flickers."""
    rng = torch.Generator().manual_seed(frame)
    return torch.randint(1, CODES, tokens.shape, generator=rng)


def write_clips(folder: Path, name: str = "walks", videos: tuple[str, ...] = ("a", "b", "c")) -> HeldOutClips:
    """Three clips of 100 frames that walk straight on, stand for a second, and walk on again."""
    rng = np.random.default_rng(0)
    manifest = Manifest(16.0, [ROWS * SIDE, COLUMNS * SIDE], [ROWS, COLUMNS], CODES, "tiles", 70.0)
    for video in videos:
        tokens = [rng.integers(1, CODES, (ROWS, COLUMNS))]
        actions, pose = np.zeros((99, 5), np.float32), np.zeros((100, 5), np.float32)
        for k in range(99):
            if not 48 <= k < 64:
                actions[k, MOVE_Z] = 1
            tokens.append(np.roll(tokens[-1], -int(actions[k, MOVE_Z]), 1))
            pose[k + 1, 2] = pose[k, 2] + STEP * actions[k, MOVE_Z]
        write_token_file(folder / f"{video}.npz", np.stack(tokens), actions, pose)
        manifest.clips.append(ClipEntry(video, f"{video}.npz", 100, "val", f"../v/{video}.mp4", [0, 99, 1]))
    manifest.save(folder)
    return HeldOutClips(TokenClips(folder, "val"), Tiles(), seed=0)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> HeldOutClips:
    return write_clips(tmp_path_factory.mktemp("walks"))


@pytest.fixture(scope="module")
def networks() -> PictureNetworks:
    distance = PixelDistance()
    return PictureNetworks({"perceptual": distance}, distance, None)


@pytest.fixture(scope="module")
def recorded(held_out, networks) -> walk.RecordedWalks:
    return walk.read_walks(held_out, PLAN, networks)


def evaluated(world: FakeWorld) -> EvaluatedModel:
    greedy = SamplingConfig(greedy=True)
    return EvaluatedModel("world", Path("world.pt"), world, {}, greedy, 0, torch.float32)


@pytest.fixture
def measured(held_out, networks, recorded):
    def run(rule: Rule, **world) -> tuple[dict[str, float], dict]:
        scores, fake = Scores(0), evaluated(FakeWorld(rule, **world))
        outputs = walk.measure(held_out, fake, PLAN, networks, recorded, scores)
        return scores.metrics, outputs

    return run


def held(metrics: dict[str, float], kind: str = "forward") -> list[float]:
    return [metrics[f"walk.{kind}.s{second}.held"] for second in (1, 2, 5)]


def test_a_world_that_is_the_recording_holds(measured):
    metrics, outputs = measured(exact)
    assert held(metrics) == held(metrics, "mixed") == [1, 1, 1]
    for name in ("codes", "gradient", "change", "flicker"):
        assert metrics[f"walk.forward.s5.{name}_ratio"] == pytest.approx(1, abs=0.05), name
    assert metrics["walk.forward.held_seconds"] == 5 and metrics["walk.forward.holds"] == 1
    assert metrics["walk.forward.metres"] == pytest.approx(5 * 16 * STEP)
    assert metrics["walk.forward.s5.fd_ratio"] == pytest.approx(1, abs=0.5)
    assert outputs["forward"]["series"]["held"] == [1] * 5
    assert [len(pictures) for pictures in outputs["mixed"]["pictures"].values()] == [3] * 4


def test_a_picture_that_stands_still_does_not_hold(measured):
    """Though it keeps all of its detail, and says that it moves."""
    metrics, _ = measured(frozen)
    assert held(metrics) == held(metrics, "mixed") == [0, 0, 0]
    assert metrics["walk.forward.s1.codes_ratio"] == pytest.approx(1)
    assert metrics["walk.forward.s1.change_ratio"] < 0.1
    assert metrics["walk.forward.held_seconds"] == 0


def test_a_world_that_fades_holds_until_it_does(measured):
    metrics, _ = measured(fading)
    assert held(metrics) == [1, 1, 0]
    assert metrics["walk.forward.s5.codes_ratio"] < 0.67 and metrics["walk.forward.s5.gradient_ratio"] < 0.67
    assert metrics["walk.forward.s5.fd_ratio"] > 1.5
    assert metrics["walk.forward.held_seconds"] in (1, 2)


def test_flicker_is_change_that_no_motion_explains(measured):
    metrics, _ = measured(scrambled)
    assert metrics["walk.forward.flicker_ratio"] > 1.2
    assert metrics["walk.forward.s2.codes_ratio"] == pytest.approx(1, abs=0.3)


def test_the_recordings_are_measured_the_same_way(held_out, networks, recorded, measured, tmp_path):
    metrics, _ = measured(exact)
    assert metrics["recording.walk.forward.holds"] == 1.0
    assert metrics["recording.walk.mixed.holds"] == 1.0, "the pause changes nothing, and is not judged by it"
    broken = write_clips(tmp_path)
    for tokens in broken.clips.tokens:
        tokens[81:97, :, 4:] = 1  # one second of the five that walk
    scores = Scores(0)
    walk.report_recordings(walk.read_walks(broken, PLAN, networks), 16, scores)
    assert scores.metrics["recording.walk.forward.holds"] == pytest.approx(4 / 5)


def test_recordings_with_w_held_are_walks_of_the_game_itself(networks, tmp_path):
    """One of three recordings loses its detail in its third second."""
    clips = write_clips(tmp_path)
    for actions in clips.clips.actions:
        actions[:] = 0
        actions[:, MOVE_Z] = 1
    for tokens, pose in zip(clips.clips.tokens, clips.clips.pose, strict=True):
        tokens[:] = [np.roll(tokens[0], -t, 1) for t in range(len(tokens))]
        pose[:, 2] = STEP * np.arange(len(pose))
    clips.clips.tokens[0][2 * 16 + 1 : 3 * 16 + 1, :, 4:] = 1
    scores = Scores(0)
    recorded = walk.read_walks(clips, PLAN, networks)
    assert recorded.whole.all()
    walk.report_recordings(recorded, 16, scores)
    found = [scores.metrics.get(f"recording.walk.forward.s{second}.held") for second in (1, 2, 5, 10)]
    assert found == [1, 1, pytest.approx(2 / 3), None]


def test_a_player_before_a_wall_turns_and_goes_on(measured):
    metrics, _ = measured(exact, wall=True)
    assert metrics["walk.forward.metres"] == 0
    player = ForwardPlayer(2, 16, 15.0)
    metres = np.zeros((2, 0))
    turned = []
    for t in range(48):
        actions = player(metres)
        assert (actions[:, MOVE_Z] == 1).all()
        turned.append(actions[:, YAW] * 15)
        # The second one is held up by the wall at first only.
        metres = np.concatenate([metres, [[STEP], [0.0 if t < 20 else STEP]]], 1)
    turned = np.array(turned)
    assert not turned[:, 0].any(), "is never held up"
    assert not turned[:8, 1].any() and turned[8, 1] > 0, "after half a second"
    assert turned[:, 1].sum() == pytest.approx(60)


def test_a_world_without_a_pose_is_never_held_up(measured):
    metrics, _ = measured(exact, posed=False)
    assert held(metrics) == [1, 1, 1] and "walk.forward.metres" not in metrics


def test_the_mean_of_a_second_by_hand():
    frames = walk.WalkFrames.empty(1, 35)
    frames.values["change"][0] = np.arange(35)
    frames.straight[0, [0, 2, 16]] = True
    assert frames.seconds("change", 16).tolist() == [[7.5, 23.5]], "what is left over is no second"
    found = frames.seconds("change", 16, frames.straight, least=2)
    assert found[0, 0] == 1.0 and np.isnan(found[0, 1])


@pytest.mark.parametrize(
    "codes, gradient, change, expected",
    [(1, 1, 1, True), (0.66, 1, 1, False), (1, 1.51, 1, False), (1, 1, 0.49, False), (1, 1, 2.01, False),
     (0.68, 1.49, 1.99, True), (1, 1, np.nan, True), (np.nan, 1, 1, False)],
)  # fmt: skip
def test_what_holds(codes, gradient, change, expected):
    second = {"codes": codes, "gradient": gradient, "change": change}
    assert walk.holds({name: np.array([[value]]) for name, value in second.items()})[0, 0] == expected


def test_straight_on():
    actions = np.zeros((6, 5), np.float32)
    actions[:, MOVE_Z] = 1
    actions[1, YAW] = 0.1
    actions[2, MOVE_X] = 1
    actions[3, MOVE_Z] = -1
    metres = np.array([0.25, 0.25, 0.25, 0.25, 0.01, np.nan])
    assert walk.straight_on(actions, metres).tolist() == [True, False, False, False, False, True]


def test_starts_are_not_those_that_ship_and_need_a_recording_that_walks(tmp_path, networks, capsys):
    shipped = sorted(walk.shipped_videos())
    assert len(shipped) == len(start_places())
    held_out = write_clips(tmp_path, videos=(shipped[0].removesuffix(".mp4"), "zz_other", "zz_stands"))
    held_out.clips.actions[2][:] = 0
    starts = walk.choose_starts(held_out, replace(PLAN, walk_starts=8))
    assert len(starts) == 8 and set(starts[:, 0]) == {1}
    assert len(set(starts[:, 1])) > 4, "at random along the clip"
    held_out.clips.actions[1][:] = 0
    assert walk.read_walks(held_out, PLAN, networks) is None
    assert "section walk: in no clip" in capsys.readouterr().out
    scores = Scores(0)
    assert walk.measure(held_out, evaluated(FakeWorld(exact)), PLAN, networks, None, scores) == {}
    assert scores.metrics == {}


def test_tables_by_second(measured, held_out, networks, recorded):
    scores, world = Scores(0), evaluated(FakeWorld(fading))
    outputs = walk.measure(held_out, world, PLAN, networks, recorded, scores)
    result = report.Result(world, scores, {"walk": outputs})
    forward, mixed = report.more_tables([result])
    lines = forward.splitlines()
    assert lines[0] == "| Walks, W held | second 1 | second 2 | second 5 |"
    assert lines[2] == "| world: starts that have held all along | 1.00 | 1.00 | 0.00 |"
    assert "mixed walk" in mixed and len({line.count("|") for line in lines}) == 1
    series = report.series(result)
    assert len(series["walk.forward.held"]) == 5 and len(series["walk.mixed.flicker"]) == 5


def test_the_mixed_walk_has_everything_and_keeps_the_pitch():
    actions = mixed_walk(960, seed=3)
    assert actions.shape == (960, 5) and np.abs(actions).max() <= 1
    assert np.array_equal(actions, mixed_walk(960, seed=3))
    assert not np.array_equal(actions, mixed_walk(960, seed=4))
    assert np.array_equal(mixed_walk(100, seed=3), actions[:100]), "a shorter walk is its beginning"
    assert (actions[:16, MOVE_Z] == 1).all() and not actions[:16, [YAW, PITCH]].any()
    for axis, sign in ((MOVE_Z, 1), (MOVE_Z, -1), (MOVE_X, 1), (MOVE_X, -1), (JUMP, 1), (YAW, 1), (YAW, -1)):
        assert (np.sign(actions[:, axis]) == sign).any(), (axis, sign)
    assert (~actions.any(1)).sum() > 32, "pauses"
    looked_back = np.convolve(actions[:, YAW] * 15, np.ones(18))
    assert np.abs(looked_back).max() >= 180 - 1e-3
    pitch = np.cumsum(actions[:, PITCH] * 15)
    assert 5 < np.abs(pitch).max() <= 30 and np.abs(pitch).min() < 1e-3
    assert np.array_equal(mixed_walk(960, 3, degrees_per_unit=30.0)[:, YAW], actions[:, YAW] / 2)
