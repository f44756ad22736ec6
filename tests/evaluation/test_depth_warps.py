"""Section depth, on a wall whose depth is known exactly."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from wall_clip import FOV, wall_clip

from dataset.surroundings import decode_inverse_ray_distance
from dataset.token_files import PREDICTED, RECORDED
from depth.depth_clips import DepthClip
from evaluation import depth_warps, report
from evaluation.aggregate import Scores
from evaluation.plan import Plan
from geometry import camera
from runtime.video import to_float

PLAN = Plan(depth_windows=6)


class KnownDepth:
    """Stands in for the depth network: a share of the way from the flat ground to the recorded depth."""

    path = "depth.pt"

    def __init__(self, clip: DepthClip, share: float, height: int = 72):
        self.config = SimpleNamespace(height=height, width=128)
        self.known = {
            picture.tobytes(): codes for picture, codes in zip(clip.pictures, clip.codes, strict=True)
        }
        self.share = share

    def predict(self, pictures: Tensor, pitch: Tensor) -> Tensor:
        bytes_of = (pictures * 255).round().byte().movedim(1, -1).contiguous().numpy()
        codes = np.stack([self.known[picture.tobytes()] for picture in bytes_of])
        pose = torch.cat([torch.zeros(len(pitch), 4), pitch[:, None]], 1)
        ground = camera.ground_plane(pose, *codes.shape[1:], FOV)
        return self.share * torch.from_numpy(decode_inverse_ray_distance(codes)) + (1 - self.share) * ground


class Lossless:
    """A tokenizer that loses nothing: its tokens are the pictures."""

    def encode_frames(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode_frames(self, tokens: Tensor):
        yield tokens


def held_out_of(clip: DepthClip, depths: list[str], videos: bool = True) -> SimpleNamespace:
    """The wall once for each of `depths`: where the token file's depth comes from, "" for none."""
    entries = [SimpleNamespace(name=f"wall{i}", depth=depth) for i, depth in enumerate(depths)]
    loaded = [clip.codes if depth else None for depth in depths]
    clips = SimpleNamespace(
        entries=entries, pose=[clip.pose.copy() for _ in depths], extras={"depth": loaded}
    )

    def original_pictures(windows: np.ndarray, frames: np.ndarray) -> dict[int, Tensor]:
        pictures = to_float(torch.from_numpy(clip.pictures))
        return {n: pictures[start + frames] for n, (_, start) in enumerate(windows)} if videos else {}

    return SimpleNamespace(
        clips=clips, lengths=[len(clip.pictures)] * len(depths), seed=0, fov=FOV, tokenizer=Lossless(),
        manifest=SimpleNamespace(picture_size=[72, 128]), original_pictures=original_pictures,
    )  # fmt: skip


def measured(held_out: SimpleNamespace, predictor: KnownDepth) -> Scores:
    scores = Scores(0)
    depth_warps.report(depth_warps.read(held_out, PLAN, predictor), scores)
    return scores


@pytest.fixture(scope="module")
def clip() -> DepthClip:
    return wall_clip()


def test_the_share_of_the_gain_is_that_of_the_depth(clip):
    held_out = held_out_of(clip, [RECORDED, RECORDED])
    perfect, ground = (measured(held_out, KnownDepth(clip, share)).metrics for share in (1.0, 0.0))
    for horizon in (8, 20):
        key = f"depth.h{horizon}"
        assert perfect[f"{key}.psnr"] == pytest.approx(perfect[f"recording.{key}.psnr"], abs=0.1)
        assert perfect[f"{key}.gain_share"] == pytest.approx(1, abs=0.02)
        assert perfect[f"{key}.gain_share_decoded"] == pytest.approx(1, abs=0.02), "nothing is lost"
        assert abs(ground[f"{key}.gain_share"]) < 0.2
        assert perfect[f"recording.{key}.psnr"] > perfect[f"geo.{key}.psnr"] + 5
        assert 0.8 < perfect[f"recording.{key}.visible"] <= 1
    assert perfect["depth.windows"] == 6
    assert perfect["copy.depth.h1.psnr"] == pytest.approx(ground["copy.depth.h1.psnr"])


def test_intervals_and_the_table(clip):
    scores = measured(held_out_of(clip, [RECORDED, RECORDED]), KnownDepth(clip, 1.0))
    low, high = scores.ci95["depth.h8.gain_share"]
    assert low <= scores.metrics["depth.h8.gain_share"] <= high
    (table,) = report.more_tables([SimpleNamespace(scores=scores)])
    assert table.startswith("| Depth, PSNR in dB, 6 windows | 1 frames ahead | 4 frames ahead |")
    assert "| predicted: share of the gain | " in table


def test_only_clips_with_recorded_depth_are_measured_if_there_are_any(clip):
    held_out = held_out_of(clip, [PREDICTED, RECORDED, ""])
    assert depth_warps.usable_clips(held_out).tolist() == [False, True, False]
    warps = depth_warps.read(held_out, PLAN, KnownDepth(clip, 1.0))
    assert set(warps.clips) == {1}
    bare = measured(held_out_of(clip, [PREDICTED, ""]), KnownDepth(clip, 1.0)).metrics
    assert "depth.h8.psnr" in bare and "geo.depth.h8.psnr" in bare
    assert not any(key.startswith("recording.") or "gain_share" in key for key in bare)


def test_what_is_missing_is_left_out_with_a_message(clip, capsys):
    predictor = KnownDepth(clip, 1.0)
    found = measured(held_out_of(clip, [RECORDED]), KnownDepth(clip, 1.0, height=64)).metrics
    assert "recording.depth.h8.psnr" in found and "depth.h8.psnr" not in found
    assert "depth.pt takes 128x64" in capsys.readouterr().out
    assert measured(held_out_of(clip, [RECORDED], videos=False), predictor).metrics == {}
    assert "no video can be opened" in capsys.readouterr().out
    without_poses = held_out_of(clip, [RECORDED])
    without_poses.clips.pose[0][:] = np.nan
    assert measured(without_poses, predictor).metrics == {}
    assert "no clip of 21 frames has poses" in capsys.readouterr().out
