"""Preprocessing: selected frames and actions, broken recordings, interrupted and parallel runs.

The pictures of the small clips are plain greys, and the tokenizer's codes are greys too: the token in the
middle of a frame is the index of the video frame.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import preprocess
from dataset.picture_check import GOOD_MATCH
from dataset.recordings import depth_path
from dataset.surroundings import (
    BOX,
    SCALE,
    Surroundings,
    encode_inverse_ray_distance,
    write_surroundings,
)
from dataset.token_files import EXTRAS, SAMPLES, Manifest, read_token_file, split_of, unpack_indices
from dataset.windows import TokenClips
from depth.depth_net import DepthConfig, DepthNet
from depth.predictor import DEPTH_KIND, load_depth
from metrics import measure_turns
from runtime import checkpoint
from runtime.video import read_frames, resize, to_float, write_video
from vq_vae.tokenizer import load_tokenizer, tokenizer_content
from vq_vae.vq_vae import VQVAE, VQVAEConfig

ROOT = Path(__file__).resolve().parents[1]
CODES, LEVELS_A_CODE = 32, 8  # so clips have 32 frames at most, and codes outlive the video codec
FPS = 16


def grey(code: int) -> int:
    """The grey level (0..255) that the tokenizer below reads as `code`."""
    return code * LEVELS_A_CODE + LEVELS_A_CODE // 2


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    """Ties between codes fall differently with another number of threads, and workers have one each."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that the tests start
    yield
    torch.set_num_threads(threads)
    if variable is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = variable


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer for 32x16 pictures with random weights; its codes are its encodings of 32 greys."""
    torch.manual_seed(0)
    size = {"height": 16, "width": 32, "hidden_dim": 8, "residual_blocks": 1}
    model = VQVAE(VQVAEConfig(codebook_size=CODES, embedding_dim=8, **size))
    levels = torch.tensor([grey(code) / 255 for code in range(CODES)]).view(-1, 1, 1, 1)
    with torch.no_grad():
        model.quantizer.codebook.copy_(model.encoder(levels.expand(-1, 3, 16, 32))[:, :, 2, 4])
    path = tmp_path_factory.mktemp("tokenizer") / "grey.pt"
    checkpoint.save(path, tokenizer_content(model))
    return path


def grey_video(path: Path, frames: int, fps: float = FPS) -> None:
    """A 64x32 video whose frame k is plain grey(k)."""
    write_video(path, [np.full((32, 64, 3), grey(k), np.uint8) for k in range(frames)], fps)


def gamefactory_entry(k: int) -> dict:
    """Entry k of the small clips; every field depends on k."""
    return {
        "ws": k % 3,
        "ad": k // 3 % 3,
        "scs": k % 4,
        "yaw": 170 + 0.15 * k * (k + 1) / 2,
        "pitch": -0.075 * k * (k + 1) / 2,
        "yaw_delta": 0.01 * k,
        "pitch_delta": -0.005 * k,
        "pos": [k, 64.0, -2 * k],
    }


def gamefactory_action(k: int) -> list[float]:
    """The action vector of entry k."""
    return [0.01 * k, -0.005 * k, (0, -1, 1)[k // 3 % 3], (0, 1, -1)[k % 3], float(k % 4 == 1)]


def gamefactory_clip(
    parent: Path, name: str = "clip", frames: int = 20, extra: int = 0, fps: float = FPS, flat: bool = False
) -> tuple[Path, Path]:
    """A clip of `frames` entries whose video has `extra` frames more. Returns the paths of json and video."""
    metadata = parent / ("" if flat else "metadata") / f"{name}.json"
    video = parent / ("" if flat else "video") / f"{name}.mp4"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    entries = {str(k): gamefactory_entry(k) for k in range(frames)}
    entries["0"] = {"unknown": "must be ignored"}
    content = {"biome": "plains", "initial_weather": "clear", "start_time": "noon", "actions": entries}
    metadata.write_text(json.dumps(content))
    grey_video(video, frames + extra, fps)
    return metadata, video


def minerl_clip(
    parent: Path,
    name: str,
    actions: int,
    before: int = 0,
    fps: float = 20,
    success: object = "True",
    **changes,
) -> Path:
    """A trajectory of N actions whose video has `before` frames ahead of the N+1 observations."""
    folder = parent / name
    folder.mkdir(parents=True)
    frames = before + actions + 1
    grey_video(folder / "recording.mp4", changes.pop("frames", frames))
    metadata = {
        "success": success,
        "duration_ms": int(1000 * actions / fps),
        "duration_steps": actions,
        "true_video_frame_count": frames,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata | changes))
    step = np.arange(actions)
    np.savez(
        folder / "rendered.npz",
        **{
            "reward": np.zeros(actions),
            "action$camera": np.column_stack([-0.1 * step, 0.3 * step]).astype(np.float32),
            "action$forward": step % 2,
            "action$back": np.zeros(actions, int),
            "action$left": np.zeros(actions, int),
            "action$right": step // 2 % 2,
            "action$jump": step % 3 == 0,
            "action$equip": np.array(["none"] * actions),
        },
    )
    return folder


def minerl_action(k: int) -> list[float]:
    """The action vector of step k of `minerl_clip`."""
    return [0.02 * k, -0.1 * k / 15, k // 2 % 2, k % 2, k % 3 == 0]


def arguments(clips: Path, out: Path, tokenizer: Path, *more: str) -> list[str]:
    flags = {"--parent_dir": clips, "--out_dir": out, "--vqvae_ckpt": tokenizer, "--device": "cpu"}
    return [str(word) for pair in flags.items() for word in pair] + ["--encode_batch", "7", *more]


def encode(clips: Path, out: Path, tokenizer: Path, *more: str, status: int = 0) -> Manifest | None:
    """Runs preprocess in this process and returns the manifest that it left."""
    assert preprocess.main(arguments(clips, out, tokenizer, *more)) == status
    return Manifest.load(out) if status == 0 else None


def frame_numbers(tokens: np.ndarray) -> list[int]:
    """The video frames that tokens [K, H, W] were made from."""
    return tokens[:, 2, 4].tolist()


def entry_of(manifest: Manifest, name: str):
    return next(clip for clip in manifest.clips if clip.name == name)


def reasons(manifest: Manifest) -> dict[str, str]:
    return {skipped["name"]: skipped["reason"] for skipped in manifest.skipped}


def same_tokens(one: Path, other: Path) -> None:
    """Asserts that two folders hold the same token files with the same content."""
    files = sorted(path.name for path in one.glob("*.npz"))
    assert files and files == sorted(path.name for path in other.glob("*.npz"))
    for file in files:
        first, second = read_token_file(one / file), read_token_file(other / file)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=f"{file} {name}")


def listing(manifest: Manifest) -> list:
    """The clips of a manifest, without the paths of their videos."""
    return [(c.name, c.file, c.frames, c.split, c.kept) for c in manifest.clips]


# ------------------------------------------------------------ GF-Minecraft


@pytest.mark.parametrize("flat", [False, True])
def test_entry_k_leads_from_frame_k_minus_1_to_frame_k(tmp_path, tokenizer, flat):
    gamefactory_clip(tmp_path / "clips", frames=20, extra=3, flat=flat)
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    content = read_token_file(tmp_path / "out" / "clip.npz")
    assert content["tokens"].shape == (20, 4, 8) and content["tokens"].dtype == np.uint16
    assert frame_numbers(content["tokens"]) == list(range(20))
    np.testing.assert_allclose(content["actions"], [gamefactory_action(t + 1) for t in range(19)], atol=1e-6)
    poses = [gamefactory_entry(k) for k in range(1, 20)]
    expected = [[*e["pos"], e["yaw"], e["pitch"]] for e in poses]
    np.testing.assert_allclose(content["pose"][1:], expected, rtol=1e-6)
    assert np.isnan(content["pose"][0]).all()
    assert manifest.fps == 16 and manifest.camera_degrees_per_unit == 15 and manifest.resize == "area"
    assert manifest.picture_size == [16, 32] and manifest.latent_size == [4, 8]
    assert manifest.tokenizer == load_tokenizer(tokenizer).fingerprint
    entry = entry_of(manifest, "clip")
    assert (entry.frames, entry.split, entry.kept) == (20, split_of("clip", 0.1), [0, 19, 1])
    assert (tmp_path / "out" / entry.video).samefile(next((tmp_path / "clips").rglob("clip.mp4")))


def test_entry_0_is_the_first_pose_if_entry_1_follows_from_it(tmp_path, tokenizer):
    metadata, _ = gamefactory_clip(tmp_path / "clips")
    content = json.loads(metadata.read_text())
    content["actions"]["0"] = gamefactory_entry(0)
    metadata.write_text(json.dumps(content))
    encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    pose = read_token_file(tmp_path / "out" / "clip.npz")["pose"]
    np.testing.assert_allclose(pose[0], [0, 64, 0, 170, 0])


def test_keyboard_only_clips_have_no_camera_turn_and_no_pose(tmp_path, tokenizer):
    metadata, _ = gamefactory_clip(tmp_path / "clips")
    content = json.loads(metadata.read_text())
    keys = {k: {n: e[n] for n in ("ws", "ad", "scs") if n in e} for k, e in content["actions"].items()}
    metadata.write_text(json.dumps(content | {"actions": keys}))
    encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    found = read_token_file(tmp_path / "out" / "clip.npz")
    expected = [[0, 0, *gamefactory_action(t + 1)[2:]] for t in range(19)]
    np.testing.assert_array_equal(found["actions"], expected)
    assert np.isnan(found["pose"]).all()


def test_half_the_rate_keeps_every_second_frame_and_pools_the_actions_between(tmp_path, tokenizer):
    gamefactory_clip(tmp_path / "clips", frames=20)
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer, "--fps_target", "8")
    found = read_token_file(tmp_path / "out" / "clip.npz")
    assert frame_numbers(found["tokens"]) == list(range(0, 20, 2))
    single = np.array([gamefactory_action(k) for k in range(20)])
    np.testing.assert_allclose(found["actions"], (single[1:18:2] + single[2:19:2]) / 2, atol=1e-6)
    np.testing.assert_allclose(found["pose"][1:, 0], range(2, 20, 2))
    assert manifest.camera_degrees_per_unit == 30
    assert entry_of(manifest, "clip").kept == [0, 18, 2]


def test_max_pooling_keeps_a_short_press(tmp_path, tokenizer):
    gamefactory_clip(tmp_path / "clips", frames=20)
    encode(tmp_path / "clips", tmp_path / "out", tokenizer, "--fps_target", "8", "--pool_keys", "max")
    found = read_token_file(tmp_path / "out" / "clip.npz")["actions"]
    single = np.array([gamefactory_action(k) for k in range(20)])
    np.testing.assert_allclose(found[:, :2], (single[1:18:2, :2] + single[2:19:2, :2]) / 2, atol=1e-6)
    np.testing.assert_array_equal(found[:, 4], np.maximum(single[1:18:2, 4], single[2:19:2, 4]))
    assert set(np.unique(found[:, 2:])) == {-1, 0, 1}


def test_degrees_are_kept_for_a_non_integer_ratio_of_rates(tmp_path, tokenizer):
    """20 FPS to 16: kept frames are one or two steps apart, a unit is 18.75 degrees in every window."""
    gamefactory_clip(tmp_path / "clips", frames=21, fps=20)
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    found = read_token_file(tmp_path / "out" / "clip.npz")
    kept = frame_numbers(found["tokens"])
    assert kept == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15, 16, 18, 19, 20]
    assert unpack_indices(entry_of(manifest, "clip").kept, len(kept)) == kept
    turned = [sum(15 * 0.01 * k for k in range(a + 1, b + 1)) for a, b in zip(kept, kept[1:], strict=False)]
    np.testing.assert_allclose(found["actions"][:, 0] * manifest.camera_degrees_per_unit, turned, atol=1e-4)


def test_clips_of_other_rates_are_converted_or_skipped(tmp_path, tokenizer):
    for name, fps in (("a16", 16), ("b32", 32), ("c10", 10), ("d15.9", 15.9)):
        gamefactory_clip(tmp_path / "clips", name, fps=fps)
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    assert [c.name for c in manifest.clips] == ["a16", "b32", "d15.9"]
    assert "10 FPS, --fps_target is 16; use 10 or less" in reasons(manifest)["c10"]
    assert manifest.camera_degrees_per_unit == 15
    fast = read_token_file(tmp_path / "out" / "b32.npz")
    assert frame_numbers(fast["tokens"]) == list(range(0, 20, 2))
    np.testing.assert_allclose(
        fast["actions"][:, 0], [0.01 * (2 * k + 2 * k - 1) for k in range(1, 10)], atol=1e-6
    )


def test_trimming_drops_the_start_of_a_clip(tmp_path, tokenizer):
    gamefactory_clip(tmp_path / "clips", frames=30)
    encode(tmp_path / "clips", tmp_path / "out", tokenizer, "--trim_seconds", "1")
    found = read_token_file(tmp_path / "out" / "clip.npz")
    assert frame_numbers(found["tokens"]) == list(range(16, 30))
    np.testing.assert_allclose(found["actions"][0], gamefactory_action(17), atol=1e-6)
    np.testing.assert_allclose(found["pose"][0, 0], 16)


def test_equal_names_in_different_folders_get_different_files(tmp_path, tokenizer):
    clips = tmp_path / "clips"
    gamefactory_clip(clips, "x", frames=12)
    gamefactory_clip(clips / "other", "x", frames=14)
    gamefactory_clip(clips / "other", "x", frames=16, flat=True)
    manifest = encode(clips, tmp_path / "out", tokenizer)
    found = {c.name: c.frames for c in manifest.clips}
    assert found == {"x": 12, "other__metadata__x": 14, "other__x": 16}
    assert {c.group for c in manifest.clips} == {"x"}


def test_a_file_made_from_another_video_does_not_count_as_done(tmp_path, tokenizer):
    gamefactory_clip(tmp_path / "one", "x", frames=12)
    gamefactory_clip(tmp_path / "two", "x", frames=14)
    encode(tmp_path / "one", tmp_path / "out", tokenizer)
    manifest = encode(tmp_path / "two", tmp_path / "out", tokenizer)
    assert entry_of(manifest, "x").frames == 12
    assert "use another --out_dir" in reasons(manifest)["x"]


def test_clips_can_move(tmp_path, tokenizer):
    gamefactory_clip(tmp_path / "one", "x")
    encode(tmp_path / "one", tmp_path / "out", tokenizer)
    shutil.move(tmp_path / "one", tmp_path / "two")
    manifest = encode(tmp_path / "two", tmp_path / "out", tokenizer)
    assert entry_of(manifest, "x").video == "../two/video/x.mp4" and not manifest.skipped


def test_the_resize_filter_is_used(tmp_path, tokenizer):
    """Area averages stripes of one pixel to one grey, bicubic does not."""
    _, path = gamefactory_clip(tmp_path / "clips", frames=4)
    stripes = np.zeros((32, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    write_video(path, [stripes] * 4, FPS)
    encode(tmp_path / "clips", tmp_path / "area", tokenizer)
    manifest = encode(tmp_path / "clips", tmp_path / "cubic", tokenizer, "--resize", "bicubic")
    assert manifest.resize == "bicubic"
    area, cubic = (read_token_file(tmp_path / d / "clip.npz")["tokens"] for d in ("area", "cubic"))
    assert abs(int(area[0, 2, 4]) - CODES // 2) <= 1
    assert (area != cubic).any()


# ------------------------------------------------------------ MineRL


@pytest.mark.parametrize("success", ["True", True])  # data v3 and v4
def test_minerl_is_aligned_at_its_end_and_action_k_leads_to_frame_k_plus_1(tmp_path, tokenizer, success):
    minerl_clip(tmp_path / "clips", "v3_run", actions=20, before=7, success=success)
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer, "--fps_target", "20")
    found = read_token_file(tmp_path / "out" / "v3_run.npz")
    assert frame_numbers(found["tokens"]) == list(range(7, 28))
    np.testing.assert_allclose(found["actions"], [minerl_action(k) for k in range(20)], atol=1e-6)
    assert np.isnan(found["pose"]).all() and found["pose"].shape == (21, 5)
    assert manifest.source == "minerl" and manifest.camera_degrees_per_unit == 15
    entry = entry_of(manifest, "v3_run")
    assert entry.kept == [7, 27, 1] and entry.split == split_of("v3_run", 0.1)


def test_minerl_frames_are_selected_by_step(tmp_path, tokenizer):
    minerl_clip(tmp_path / "clips", "run", actions=21, before=5)
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer, "--fps_target", "10")
    found = read_token_file(tmp_path / "out" / "run.npz")
    assert frame_numbers(found["tokens"]) == list(range(5, 27, 2))
    single = np.array([minerl_action(k) for k in range(21)])
    np.testing.assert_allclose(found["actions"], (single[0:20:2] + single[1:20:2]) / 2, atol=1e-6)
    assert manifest.camera_degrees_per_unit == 30


def test_minerl_rate_is_computed_from_its_durations(tmp_path, tokenizer):
    minerl_clip(tmp_path / "clips", "run", actions=30, fps=30)
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer, "--fps_target", "10")
    assert frame_numbers(read_token_file(tmp_path / "out" / "run.npz")["tokens"]) == list(range(0, 31, 3))
    assert manifest.camera_degrees_per_unit == 45


def test_minerl_steps_are_mapped_to_a_video_of_another_rate(tmp_path, tokenizer):
    """40 steps over 21 frames: at a quarter of the step rate, every second frame."""
    minerl_clip(tmp_path / "clips", "run", actions=40, frames=21, true_video_frame_count=21)
    encode(tmp_path / "clips", tmp_path / "out", tokenizer, "--fps_target", "5")
    assert frame_numbers(read_token_file(tmp_path / "out" / "run.npz")["tokens"]) == list(range(0, 21, 2))


def test_broken_minerl_trajectories_are_skipped_with_their_reasons(tmp_path, tokenizer, capsys):
    clips = tmp_path / "clips"
    minerl_clip(clips, "good", actions=20)
    minerl_clip(clips, "failed3", actions=20, success="False")
    minerl_clip(clips, "failed4", actions=20, success=False)
    minerl_clip(clips, "cut", actions=20, before=5, frames=15)
    minerl_clip(clips, "dense", actions=40, frames=21, true_video_frame_count=21)
    minerl_clip(clips, "timeless", actions=20, duration_ms=0)
    minerl_clip(clips, "uncounted", actions=20, true_video_frame_count=None)
    (minerl_clip(clips, "unseen", actions=20) / "recording.mp4").unlink()
    (minerl_clip(clips, "unlabelled", actions=20) / "rendered.npz").unlink()
    (minerl_clip(clips, "undescribed", actions=20) / "metadata.json").unlink()
    archive = minerl_clip(clips, "torn", actions=20) / "rendered.npz"
    archive.write_bytes(archive.read_bytes()[:200])
    np.savez(
        minerl_clip(clips, "nan", actions=20) / "rendered.npz", **{"action$camera": np.full((20, 2), np.nan)}
    )
    manifest = encode(clips, tmp_path / "out", tokenizer)
    expected = {
        "failed3": "not successful",
        "failed4": "not successful",
        "cut": "truncated video: .*15 of 26 frames",
        "dense": "fewer frames than actions: .*21 frames",
        "timeless": "broken metadata: .*duration_ms",
        "uncounted": "broken metadata: .*true_video_frame_count",
        "unseen": "no video: .*recording.mp4",
        "unlabelled": "no actions: .*rendered.npz",
        "undescribed": "no metadata: .*metadata.json",
        "torn": "broken actions: .*rendered.npz",
        "nan": "bad action: .*not finite",
    }
    check_skipped(manifest, expected, ["good"], capsys)
    kept = encode(clips, tmp_path / "all", tokenizer, "--keep_failed")
    assert [c.name for c in kept.clips] == ["failed3", "failed4", "good"]


def check_skipped(manifest: Manifest, expected: dict[str, str], good: list[str], capsys) -> None:
    """Asserts that each clip was skipped for its reason, in the manifest and in print, and `good` kept."""
    found = reasons(manifest)
    printed = capsys.readouterr().out
    assert sorted(found) == sorted(expected)
    for name, pattern in expected.items():
        assert re.search(pattern, found[name]), (name, found[name])
        assert f"skipped {name}: {found[name]}" in printed
    assert [c.name for c in manifest.clips] == good
    assert f"{len(good)} clips kept, 0 already done, {len(expected)} skipped (" in printed


# ------------------------------------------------------------ broken recordings


def short_video(path: Path, keep: float) -> None:
    """A video whose header comes first and promises 20 frames, cut off after a share `keep` of its bytes."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(20):
            noise = rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def test_broken_clips_are_skipped_with_their_reasons(tmp_path, tokenizer, capsys):
    clips = tmp_path / "clips"

    def edit(name: str, change) -> None:
        metadata, _ = gamefactory_clip(clips, name)
        content = json.loads(metadata.read_text())
        change(content["actions"])
        metadata.write_text(json.dumps(content))

    for name in ("good_1", "good_2"):
        gamefactory_clip(clips, name)
    gamefactory_clip(clips, "few_frames", extra=-1)
    gamefactory_clip(clips, "one_frame", frames=1)
    gamefactory_clip(clips, "no_json")[0].unlink()
    gamefactory_clip(clips, "no_video")[1].unlink()
    gamefactory_clip(clips, "empty_json")[0].write_text("")
    gamefactory_clip(clips, "torn_json")[0].write_text('{"actions": {"0": {"ws"')
    gamefactory_clip(clips, "list_json")[0].write_text("[]")
    gamefactory_clip(clips, "no_actions")[0].write_text('{"actions": {}}')
    gamefactory_clip(clips, "empty_video")[1].write_bytes(b"")
    _, video = gamefactory_clip(clips, "torn_video")
    video.write_bytes(video.read_bytes()[:-200])
    short_video(gamefactory_clip(clips, "short_video")[1], keep=0.6)
    edit("nan", lambda a: a["5"].update(yaw_delta=float("nan")))
    edit("code", lambda a: a["7"].update(ws=5))
    edit("keyless", lambda a: a["7"].pop("ad"))
    edit("gap", lambda a: a.pop("9"))
    expected = {
        "few_frames": "fewer frames than actions: .*19 frames can be decoded, 20 are needed",
        "one_frame": "too short",
        "no_json": "no metadata: .*no_json.json",
        "no_video": "no video: .*no_video.mp4",
        "empty_json": "broken metadata: .*empty_json.json: not readable as JSON",
        "torn_json": "broken metadata: .*torn_json.json: not readable as JSON",
        "list_json": "broken metadata: .*expected an object, found list",
        "no_actions": "broken metadata: .*no actions",
        "empty_video": "broken video: .*truncated",
        "torn_video": "broken video: .*truncated",
        "short_video": r"fewer frames than actions: .* \d+ frames can be decoded, 20 are needed",
        "nan": "bad action: .*entry 5: yaw_delta nan",
        "code": "bad action: .*entry 7: .*ws",
        "keyless": "bad action: .*entry 7: .*ad",
        "gap": "broken metadata: .*entry 9 of 0..18 is missing",
    }
    check_skipped(encode(clips, tmp_path / "out", tokenizer), expected, ["good_1", "good_2"], capsys)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "contact_sheet.png",
        "good_1.npz",
        "good_2.npz",
        "manifest.json",
    ]


def test_a_repaired_clip_is_encoded_by_the_next_run(tmp_path, tokenizer):
    gamefactory_clip(tmp_path / "clips", "a")
    metadata, _ = gamefactory_clip(tmp_path / "clips", "b")
    whole = metadata.read_text()
    metadata.write_text("")
    assert set(reasons(encode(tmp_path / "clips", tmp_path / "out", tokenizer))) == {"b"}
    metadata.write_text(whole)
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    assert not manifest.skipped and [c.name for c in manifest.clips] == ["a", "b"]


def test_no_usable_clip_gives_exit_status_1(tmp_path, tokenizer, capsys):
    gamefactory_clip(tmp_path / "clips", "a")[1].unlink()
    encode(tmp_path / "clips", tmp_path / "out", tokenizer, status=1)
    assert "0 clips kept, 0 already done, 1 skipped (1 no video)" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["missing", "empty", "mixed"])
def test_a_folder_without_clips_or_with_two_sources_is_refused(tmp_path, tokenizer, capsys, case):
    clips = tmp_path / "clips"
    if case == "mixed":
        gamefactory_clip(clips, "a")
        minerl_clip(clips, "b", actions=20)
    elif case == "empty":
        clips.mkdir()
    encode(clips, tmp_path / "out", tokenizer, status=2)
    message = {
        "missing": "no such folder",
        "empty": "no gamefactory clip",
        "mixed": "choose one with --source",
    }
    assert message[case] in capsys.readouterr().err
    if case == "mixed":
        assert [c.name for c in encode(clips, tmp_path / "out", tokenizer, "--source", "minerl").clips] == [
            "b"
        ]


# ------------------------------------------------------------ many runs, many processes

DIES_AT_THE_THIRD_FILE = """
import os, signal, sys
import preprocess
from preprocessing import clip_encoder
write, calls = clip_encoder.write_token_file, []
def dying(path, *arrays):
    calls.append(path)
    if len(calls) == 3:
        path.with_name(path.name + ".tmp").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *arrays)
clip_encoder.write_token_file = dying
preprocess.main(sys.argv[1:])
"""


def script(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def five(tmp_path_factory, tokenizer) -> tuple[Path, Path]:
    """Five clips, one of them broken, and the folder of an unbroken run over them."""
    folder = tmp_path_factory.mktemp("five")
    for name, frames in zip("abcd", (20, 30, 16, 25), strict=True):
        gamefactory_clip(folder / "clips", name, frames)
    gamefactory_clip(folder / "clips", "broken")[1].unlink()
    encode(folder / "clips", folder / "whole", tokenizer)
    return folder / "clips", folder / "whole"


def test_a_killed_run_continues(five, tmp_path, tokenizer, capsys):
    clips, whole = five
    killed = script("-c", DIES_AT_THE_THIRD_FILE, *arguments(clips, tmp_path, tokenizer))
    assert killed.returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert len(finished) == 2 and list(tmp_path.glob("*.npz.tmp"))
    capsys.readouterr()
    manifest = encode(clips, tmp_path, tokenizer)
    assert "2 clips kept, 2 already done, 1 skipped (1 no video)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert listing(manifest) == listing(Manifest.load(whole))
    same_tokens(tmp_path, whole)


def test_only_missing_and_damaged_files_are_encoded_again(five, tmp_path, tokenizer, capsys):
    clips, whole = five
    shutil.copytree(whole, tmp_path / "out")
    out = tmp_path / "out"
    (out / "a.npz").write_bytes((out / "a.npz").read_bytes()[:-40])
    (out / "b.npz").unlink()
    before = (out / "c.npz").stat().st_mtime_ns
    manifest = encode(clips, out, tokenizer)
    assert "2 clips kept, 2 already done" in capsys.readouterr().out
    assert (out / "c.npz").stat().st_mtime_ns == before
    assert listing(manifest) == listing(Manifest.load(whole))
    same_tokens(out, whole)


def test_files_without_a_manifest_are_encoded_again(five, tmp_path, tokenizer, capsys):
    """Without a manifest the tokenizer of a token file is unknown."""
    clips, whole = five
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    encode(clips, tmp_path / "out", tokenizer)
    assert "4 clips kept, 0 already done" in capsys.readouterr().out


# ------------------------------------------------------------ depth and nodes


def give_depth(video: Path, frames: int, size: tuple[int, int] = (8, 16)) -> None:
    """Writes a depth file: frame k has origin k, and code k plus an offset by column."""
    k, columns = np.arange(frames, dtype=np.uint8), np.arange(size[1], dtype=np.uint8)
    write_surroundings(
        depth_path(video),
        Surroundings(
            np.broadcast_to(k[:, None, None] + 32 * (columns % 4), (frames, *size)),
            np.broadcast_to(k[:, None, None, None] % 5, (frames, *BOX)),
            np.repeat(k[:, None], 3, 1).astype(np.int32),
        ),
    )


@pytest.mark.parametrize(
    "flags, kept", [((), range(20)), (("--fps_target", "8", "--trim_seconds", "0.25"), range(4, 20, 2))]
)
def test_depth_and_nodes_are_those_of_the_kept_frames(tmp_path, tokenizer, flags, kept):
    _, video = gamefactory_clip(tmp_path / "clips", frames=20, extra=3)
    give_depth(video, 20)
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer, *flags)
    assert manifest.depth_scale == SCALE
    content = read_token_file(tmp_path / "out" / "clip.npz", EXTRAS)
    assert frame_numbers(content["tokens"]) == list(kept)
    assert content["depth"].shape == (len(kept), 8, 16)
    assert content["depth"][:, 3, 4].tolist() == list(kept)
    assert content["depth"][0, 0].tolist() == [kept[0] + 32 * (c % 4) for c in range(16)]
    assert content["nodes"][:, 0, 0, 0].tolist() == [k % 5 for k in kept]
    assert content["origin"].tolist() == [[k] * 3 for k in kept]


def test_depth_of_another_size_is_sampled_at_the_nearest_positions(tmp_path, tokenizer):
    _, video = gamefactory_clip(tmp_path / "clips", frames=5)
    give_depth(video, 5, (24, 48))
    encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    depth = read_token_file(tmp_path / "out" / "clip.npz", EXTRAS)["depth"]
    assert depth.shape == (5, 8, 16)
    assert depth[2, 0].tolist() == [2 + 32 * ((3 * c + 1) % 4) for c in range(16)]  # the middle of three


def test_token_files_of_clips_without_depth_have_no_extras(tmp_path, tokenizer):
    gamefactory_clip(tmp_path / "clips")
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    assert manifest.depth_scale is None
    with np.load(tmp_path / "out" / "clip.npz") as arrays:
        assert set(arrays) == {"tokens", "actions", "pose"}


def test_a_clip_with_a_bad_depth_file_is_skipped(tmp_path, tokenizer):
    for name in ("good", "short", "torn"):
        _, video = gamefactory_clip(tmp_path / "clips", name)
        give_depth(video, 19 if name == "short" else 20)
    torn = depth_path(tmp_path / "clips" / "video" / "torn.mp4")
    torn.write_bytes(torn.read_bytes()[:100])
    found = reasons(encode(tmp_path / "clips", tmp_path / "out", tokenizer))
    assert set(found) == {"short", "torn"}
    assert "short.npz: 19 frames, its clip has 20" in found["short"]
    assert "broken depth" in found["torn"] and "torn.npz: cannot be read" in found["torn"]


def test_token_files_made_before_the_clip_had_depth_are_encoded_again(tmp_path, tokenizer, capsys):
    clips, out = tmp_path / "clips", tmp_path / "out"
    videos = [gamefactory_clip(clips, name)[1] for name in ("a", "b")]
    encode(clips, out, tokenizer)
    give_depth(videos[0], 20)
    before = (out / "b.npz").stat().st_mtime_ns
    capsys.readouterr()
    assert encode(clips, out, tokenizer).depth_scale == SCALE
    assert "1 clips kept, 1 already done" in capsys.readouterr().out
    assert "depth" in read_token_file(out / "a.npz", EXTRAS)
    assert (out / "b.npz").stat().st_mtime_ns == before
    encode(clips, out, tokenizer)
    assert "0 clips kept, 2 already done" in capsys.readouterr().out


def test_a_folder_with_depth_on_another_scale_is_refused(tmp_path, tokenizer, capsys):
    _, video = gamefactory_clip(tmp_path / "clips")
    give_depth(video, 20)
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    manifest.depth_scale = {**SCALE, "nearest_m": 1.0}
    manifest.save(tmp_path / "out")
    encode(tmp_path / "clips", tmp_path / "out", tokenizer, status=2)
    assert "depth_scale" in capsys.readouterr().err


@pytest.mark.parametrize("folders", ["one", "two"])
def test_two_shards_give_the_same_files_as_one_run(five, tmp_path, tokenizer, folders):
    clips, whole = five
    first = tmp_path / "first"
    second = first if folders == "one" else tmp_path / "second"
    encode(clips, first, tokenizer, "--shard", "1/2")
    assert len(list(first.glob("*.npz"))) in (2, 3)
    manifest = encode(clips, second, tokenizer, "--shard", "2/2")
    if folders == "two":  # as copied together from two machines, and a last run over all
        for path in [*second.glob("*.npz"), *second.glob("manifest-shard-*.json")]:
            shutil.copy(path, first)
        before = {path: path.stat().st_mtime_ns for path in first.glob("*.npz")}
        manifest = encode(clips, first, tokenizer)
        assert {path: path.stat().st_mtime_ns for path in first.glob("*.npz")} == before
    assert listing(manifest) == listing(Manifest.load(whole))
    assert set(reasons(manifest)) == {"broken"}
    same_tokens(first, whole)


def test_two_workers_give_the_same_files_as_one(five, tmp_path, tokenizer):
    clips, whole = five
    result = script("preprocess.py", *arguments(clips, tmp_path, tokenizer, "--workers", "2"))
    assert result.returncode == 0, result.stderr
    assert "4 clips kept, 0 already done, 1 skipped (1 no video); 91 frames" in result.stdout
    assert listing(Manifest.load(tmp_path)) == listing(Manifest.load(whole))
    same_tokens(tmp_path, whole)


@pytest.mark.parametrize(
    "flags, field",
    [
        (["--fps_target", "8"], "fps = 16.0, this run has 8.0"),
        (["--resize", "bicubic"], "resize = area, this run has bicubic"),
        (["--pool_keys", "max"], "pool_keys = mean"),
        (["--trim_seconds", "1"], "trim_seconds = 0.0"),
        (["--vertical_fov", "60"], "vertical_fov_degrees = 70.0"),
        (["--val_fraction", "0.5"], "val_fraction = 0.1"),
        (["--precision", "bf16"], "precision = fp32"),
        (["--shard", "1/2", "--resize", "bicubic"], "resize = area"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(five, tokenizer, capsys, flags, field):
    clips, whole = five
    before = {path: path.read_bytes() for path in whole.iterdir()}
    encode(clips, whole, tokenizer, *flags, status=2)
    message = capsys.readouterr().err
    assert field in message and "manifest.json" in message and "choose another --out_dir" in message
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_another_tokenizer_in_the_same_folder_is_refused(five, tmp_path, tokenizer, capsys):
    clips, whole = five
    model = load_tokenizer(tokenizer).vqvae
    model.quantizer.codebook.add_(1)
    checkpoint.save(tmp_path / "other.pt", tokenizer_content(model))
    encode(clips, whole, tmp_path / "other.pt", status=2)
    assert f"tokenizer = {Manifest.load(whole).tokenizer}" in capsys.readouterr().err


def test_a_missing_tokenizer_is_named(five, tmp_path, capsys):
    encode(five[0], tmp_path / "out", tmp_path / "none.pt", status=2)
    assert "none.pt: no such checkpoint" in capsys.readouterr().err


def test_whole_clips_are_split_the_same_way_in_every_run(tmp_path, tokenizer):
    for name in "abcdefgh":
        gamefactory_clip(tmp_path / "clips", name, frames=3)
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer, "--val_fraction", "0.5")
    splits = {c.name: c.split for c in manifest.clips}
    assert splits == {name: split_of(name, 0.5) for name in "abcdefgh"}
    assert set(splits.values()) == {"train", "val"}


def test_all_clips_of_one_world_are_in_one_split(tmp_path, tokenizer):
    worlds = {name: "12" if name < "e" else 7 for name in "abcdefgh"}
    for name, seed in worlds.items():
        metadata, _ = gamefactory_clip(tmp_path / "clips", name, frames=3)
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"world_seed": seed}))
    for name in ("i", "j"):
        gamefactory_clip(tmp_path / "clips", name, frames=3)
    fraction = next(
        f / 100 for f in range(100) if split_of("world_12", f / 100) != split_of("world_7", f / 100)
    )
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer, "--val_fraction", str(fraction))
    expected = {name: split_of(f"world_{seed}", fraction) for name, seed in worlds.items()}
    expected |= {name: split_of(name, fraction) for name in ("i", "j")}
    assert {c.name: c.split for c in manifest.clips} == expected
    assert expected["a"] != expected["h"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "-1/2"])
def test_a_shard_that_does_not_exist_is_refused(tmp_path, tokenizer, capsys, text):
    with pytest.raises(SystemExit) as refused:
        preprocess.main(arguments(tmp_path, tmp_path, tokenizer, f"--shard={text}"))
    assert refused.value.code == 2 and "expected I/N" in capsys.readouterr().err


def test_help_works_without_data(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "preprocess.py"), "--help"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    for flag in (
        "--parent_dir",
        "--out_dir",
        "--fps_target",
        "--vqvae_ckpt",
        "--encode_batch",
        "--shard",
        "--no_check",
    ):
        assert flag in result.stdout


# ------------------------------------------------------------ predicted depth


def depth_network(path: Path, seed: int = 0, height: int = 16, width: int = 32) -> Path:
    """A tiny depth network with random weights whose output differs from picture to picture."""
    torch.manual_seed(seed)
    net = DepthNet(DepthConfig(height, width, channels=(4, 8, 8, 8), heads=2))
    net.output.weight.data.mul_(20)
    checkpoint.save(path, checkpoint.content_of(DEPTH_KIND, net))
    return path


def predicting(network: Path) -> tuple[str, ...]:
    return "--depth", "predicted", "--depth_ckpt", str(network)


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Two clips, of which `a` has recorded depth."""
    for name in "ab":
        _, video = gamefactory_clip(tmp_path / "clips", name)
        if name == "a":
            give_depth(video, 20)
    return tmp_path / "clips"


def test_recorded_depth_is_kept_and_other_clips_get_predicted_depth(mixed, tmp_path, tokenizer, capsys):
    network = depth_network(tmp_path / "depth.pt")
    plain = encode(mixed, tmp_path / "plain", tokenizer)
    assert {c.name: c.depth for c in plain.clips} == {"a": "recorded", "b": ""}
    assert plain.depth_network == "" and plain.depth_scale == SCALE
    capsys.readouterr()
    manifest = encode(mixed, tmp_path / "out", tokenizer, *predicting(network))
    assert "depth of the clips: 1 recorded, 1 predicted" in capsys.readouterr().out
    assert {c.name: c.depth for c in manifest.clips} == {"a": "recorded", "b": "predicted"}
    assert manifest.depth_network == load_depth(network).fingerprint and manifest.depth_scale == SCALE
    with np.load(tmp_path / "plain" / "a.npz") as one, np.load(tmp_path / "out" / "a.npz") as other:
        assert set(one) == set(other) == {"tokens", "actions", "pose", *EXTRAS}
        np.testing.assert_array_equal(one["depth"], other["depth"])
    same_tokens(tmp_path / "plain", tmp_path / "out")
    with np.load(tmp_path / "out" / "b.npz") as arrays:
        assert set(arrays) == {"tokens", "actions", "pose", "depth", "depth_network"}
        assert str(arrays["depth_network"]) == manifest.depth_network
    none = encode(mixed, tmp_path / "none", tokenizer, "--depth", "none")
    assert {c.name: c.depth for c in none.clips} == {"a": "", "b": ""} and none.depth_scale is None
    with np.load(tmp_path / "none" / "a.npz") as arrays:
        assert set(arrays) == {"tokens", "actions", "pose"}


@pytest.mark.parametrize("size", [(16, 32), (24, 48)])  # the tokenizer's, and another one
def test_predicted_depth_is_the_code_of_the_prediction(tmp_path, tokenizer, size):
    _, video = gamefactory_clip(tmp_path / "clips")
    network = depth_network(tmp_path / "depth.pt", 0, *size)
    flags = ("--fps_target", "8", *predicting(network))
    encode(tmp_path / "clips", tmp_path / "out", tokenizer, *flags)
    content = read_token_file(tmp_path / "out" / "clip.npz", EXTRAS)
    assert content["depth"].shape == (10, 8, 16) and content["depth"].dtype == np.uint8
    frames = [resize(frame, *size) for frame in read_frames(video, wanted=range(0, 20, 2))]
    pictures, pitch = to_float(torch.from_numpy(np.stack(frames))), torch.from_numpy(content["pose"][:, 4])
    assert pitch[0].isnan() and pitch[1:].isfinite().all()
    predictor = load_depth(network)
    batches = [predictor.predict(pictures[part], pitch[part]) for part in (slice(0, 7), slice(7, 10))]
    expected = encode_inverse_ray_distance(torch.cat(batches).numpy())
    if size == (24, 48):
        nearest = [int(1.5 * (i + 0.5)) for i in range(16)]  # 0, 2, 3, 5, 6, 8, ... of 12 rows, 24 columns
        expected = expected[:, nearest[:8]][:, :, nearest]
    np.testing.assert_array_equal(content["depth"], expected)
    assert len(np.unique(expected)) > 10 and (expected[1] != expected[9]).any()


def test_clips_without_poses_get_depth_of_an_unknown_pitch(tmp_path, tokenizer):
    minerl_clip(tmp_path / "clips", "run", actions=6)
    network = depth_network(tmp_path / "depth.pt")
    encode(tmp_path / "clips", tmp_path / "out", tokenizer, *predicting(network))
    depth = read_token_file(tmp_path / "out" / "run.npz", EXTRAS)["depth"]
    video = tmp_path / "clips" / "run" / "recording.mp4"
    entry = entry_of(Manifest.load(tmp_path / "out"), "run")
    wanted = unpack_indices(entry.kept, entry.frames)
    frames = [resize(frame, 16, 32) for frame in read_frames(video, wanted=wanted)]
    inverse = load_depth(network).predict(to_float(torch.from_numpy(np.stack(frames))))
    np.testing.assert_array_equal(depth, encode_inverse_ray_distance(inverse.numpy()))


def test_only_what_lacks_the_wanted_depth_is_encoded_again(mixed, tmp_path, tokenizer, capsys):
    out, flags = tmp_path / "out", predicting(depth_network(tmp_path / "depth.pt"))
    encode(mixed, out, tokenizer)
    before = (out / "a.npz").stat().st_mtime_ns
    expected = {"a": "recorded", "b": "predicted"}
    runs = [  # flags, clips encoded, clips kept
        (flags, 1, 1),  # predicts what was missing
        (flags, 0, 2),
        ((), 0, 2),  # depth that is there stays, and the manifest says so
        (("--depth", "none"), 0, 2),
        (flags, 0, 2),
    ]
    for words, encoded, done in runs:
        capsys.readouterr()
        manifest = encode(mixed, out, tokenizer, *words)
        assert f"{encoded} clips kept, {done} already done" in capsys.readouterr().out
        assert {c.name: c.depth for c in manifest.clips} == expected
        assert manifest.depth_network == load_depth(tmp_path / "depth.pt").fingerprint
    assert (out / "a.npz").stat().st_mtime_ns == before
    give_depth(mixed / "video" / "b.mp4", 20)
    assert entry_of(encode(mixed, out, tokenizer), "b").depth == "recorded"
    assert read_token_file(out / "b.npz", EXTRAS)["depth"][:, 3, 4].tolist() == list(range(20))


def test_token_files_that_no_manifest_lists_keep_their_source_of_depth(mixed, tmp_path, tokenizer, capsys):
    """A run may be killed after it wrote a token file and before it saved the manifest again."""
    flags = predicting(depth_network(tmp_path / "depth.pt"))
    manifest = encode(mixed, tmp_path / "out", tokenizer, *flags)
    listed = [(c.name, c.depth) for c in manifest.clips]
    manifest.clips = []
    manifest.save(tmp_path / "out")
    capsys.readouterr()
    again = encode(mixed, tmp_path / "out", tokenizer)
    assert "0 clips kept, 2 already done" in capsys.readouterr().out
    assert [(c.name, c.depth) for c in again.clips] == listed


def test_token_files_never_replace_files_of_the_clips(mixed, tokenizer, capsys):
    depth = mixed / "depth" / "a.npz"
    before = depth.read_bytes()
    encode(mixed, depth.parent, tokenizer, status=2)
    assert f"{depth}: is read by this run and would be overwritten" in capsys.readouterr().err
    assert depth.read_bytes() == before and [path.name for path in depth.parent.iterdir()] == ["a.npz"]


def test_manifests_without_the_fields_of_depth_can_be_read(mixed, tmp_path, tokenizer):
    encode(mixed, tmp_path / "out", tokenizer)
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    del content["depth_network"]
    for clip in content["clips"]:
        del clip["depth"]
    path.write_text(json.dumps(content))
    assert [c.depth for c in Manifest.load(tmp_path / "out").clips] == ["", ""]
    assert [c.depth for c in encode(mixed, tmp_path / "out", tokenizer).clips] == ["recorded", ""]


def test_another_depth_network_in_the_same_folder_is_refused(mixed, tmp_path, tokenizer, capsys):
    one, other = (depth_network(tmp_path / f"{seed}.pt", seed) for seed in (0, 1))
    encode(mixed, tmp_path / "out", tokenizer, *predicting(one))
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    encode(mixed, tmp_path / "out", tokenizer, *predicting(other), status=2)
    message = capsys.readouterr().err
    found, wanted = (load_depth(path).fingerprint for path in (one, other))
    assert f"made with depth_network = {found}, this run has {wanted}" in message
    assert "choose another --out_dir" in message and message.count("\n") == 1
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_missing_depth_network_is_named_before_anything_is_encoded(mixed, tmp_path, tokenizer, capsys):
    encode(mixed, tmp_path / "out", tokenizer, *predicting(tmp_path / "none.pt"), status=2)
    message = capsys.readouterr().err
    assert "none.pt: no such checkpoint" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_depth_network_of_another_field_of_view_gives_a_warning(mixed, tmp_path, tokenizer, capsys):
    flags = (*predicting(depth_network(tmp_path / "depth.pt")), "--no_check")
    encode(mixed, tmp_path / "out", tokenizer, *flags)
    assert "warning" not in capsys.readouterr().err
    encode(mixed, tmp_path / "narrow", tokenizer, *flags, "--vertical_fov", "50")
    assert "of 70 degrees, --vertical_fov is 50" in capsys.readouterr().err


def test_workers_and_shards_predict_as_one_process_does(mixed, tmp_path, tokenizer):
    flags = predicting(depth_network(tmp_path / "depth.pt"))
    gamefactory_clip(mixed, "c", 12)
    whole = encode(mixed, tmp_path / "whole", tokenizer, *flags)
    result = script("preprocess.py", *arguments(mixed, tmp_path / "two", tokenizer, *flags, "--workers", "2"))
    assert result.returncode == 0, result.stderr
    for part in ("1/2", "2/2"):
        shards = encode(mixed, tmp_path / "shards", tokenizer, *flags, "--shard", part)
    for folder in ("two", "shards"):
        same_tokens(tmp_path / folder, tmp_path / "whole")
        for name in "bc":
            one, other = (
                read_token_file(tmp_path / f / f"{name}.npz", EXTRAS)["depth"] for f in (folder, "whole")
            )
            assert abs(one.astype(int) - other).max() <= 1, "threads may sum in another order"
    expected = [("a", "recorded"), ("b", "predicted"), ("c", "predicted")]
    for manifest in (whole, shards, Manifest.load(tmp_path / "two")):
        assert [(c.name, c.depth) for c in manifest.clips] == expected
        assert manifest.depth_network == whole.depth_network


# ------------------------------------------------------------ alignment on real pictures


def shipped_clips(folder: Path, clips: int, frames: int) -> Path:
    """A folder with the first frames of some shipped clips: the metadata are cut, the videos are links."""
    (folder / "metadata").mkdir(parents=True)
    (folder / "video").mkdir()
    for path in sorted((SAMPLES / "metadata").glob("*.json"))[:clips]:
        content = json.loads(path.read_text())
        content["actions"] = {str(k): content["actions"][str(k)] for k in range(frames)}
        (folder / "metadata" / path.name).write_text(json.dumps(content))
        (folder / "video" / f"{path.stem}.mp4").symlink_to(SAMPLES / "video" / f"{path.stem}.mp4")
    return folder


def test_turns_in_the_actions_match_turns_in_the_pictures(tmp_path, tokenizer):
    """Actions must not be off by one frame, or a model learns to ignore them.

    Compares the turn between kept frames t and t+1 of shipped clips, measured from the pictures, with
    actions[t].yaw in the token files. Constant turns look the same at lags 0 and 1, so changes of the turning
    speed are compared, near frames where it changes and where both turns were measured well.
    """
    manifest = encode(shipped_clips(tmp_path / "clips", 3, 300), tmp_path, tokenizer)
    assert len(manifest.clips) == 3
    rows = []  # measured change, and the recorded ones at lags -1, 0, +1
    for entry in manifest.clips:
        content = read_token_file(tmp_path / entry.file)
        kept = unpack_indices(entry.kept, entry.frames)[:300]
        frames = [resize(frame, 72, 128) for frame in read_frames(tmp_path / entry.video, wanted=kept)]
        grey = torch.from_numpy(np.stack(frames)).float().mean(-1)[:, None] / 255
        fov, pitch = manifest.vertical_fov_degrees, content["pose"][: len(grey) - 1, 4]
        turns = measure_turns(grey[:-1], grey[1:], pitch, fov)
        measured = np.diff(turns[:, 0])
        sure = np.minimum(turns[1:, 2], turns[:-1, 2]) > GOOD_MATCH
        recorded = np.diff(content["actions"][:299, 0] * manifest.camera_degrees_per_unit)
        for t in np.flatnonzero(sure)[1:-1]:
            around = recorded[max(t - 1, 0) : t + 2]
            if len(around) == 3 and abs(around).max() > 0.5:
                rows.append([measured[t], *around])
    rows = np.clip(rows, -5, 5)
    before, same, after = (np.corrcoef(rows[:, 0], rows[:, lag])[0, 1] for lag in (1, 2, 3))
    print(f"{len(rows)} frames: {before:.3f} {same:.3f} {after:.3f}")
    assert len(rows) > 60 and same > 0.85
    assert max(abs(before), abs(after)) < same - 0.4


def test_late_actions_give_a_warning_and_the_run_continues(tmp_path, tokenizer, capsys):
    clips = shipped_clips(tmp_path / "clips", 4, 200)
    for path in (clips / "metadata").glob("*.json"):
        content = json.loads(path.read_text())
        entries = content["actions"]
        turns = [entries[str(k)]["yaw_delta"] for k in range(len(entries))]
        for k in range(1, len(entries)):
            entries[str(k)]["yaw_delta"] = turns[k - 1]
        path.write_text(json.dumps(content))
    encode(clips, tmp_path / "silent", tokenizer, "--no_check")
    assert "warning" not in capsys.readouterr().err
    manifest = encode(clips, tmp_path / "out", tokenizer)
    assert manifest.clips and "warning: the actions are 1 frame late" in capsys.readouterr().err
    encode(clips, tmp_path / "out", tokenizer)  # nothing left to encode
    assert "warning" not in capsys.readouterr().err


def test_too_little_data_gives_no_warning(tmp_path, tokenizer, capsys):
    gamefactory_clip(tmp_path / "clips")
    gamefactory_clip(tmp_path / "clips", "one_frame", frames=1)
    encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    assert "warning" not in capsys.readouterr().err


# ---------------------------------------------------------------- few clips


def long_clip(parent: Path, name: str, frames: int = 100, world: str = "") -> None:
    """A clip whose greys repeat, of a world if one is named."""
    metadata = parent / "metadata" / f"{name}.json"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    entries = {str(k): gamefactory_entry(k % 20) for k in range(frames)}
    metadata.write_text(json.dumps({"actions": entries} | ({"world_seed": world} if world else {})))
    pictures = [np.full((32, 64, 3), grey(k % CODES), np.uint8) for k in range(frames)]
    write_video(parent / "video" / f"{name}.mp4", pictures, FPS)


def test_of_clips_of_one_world_some_are_held_out_and_more_clips_change_that(tmp_path, tokenizer, capsys):
    for name in "ab":
        gamefactory_clip(tmp_path / "clips", name)
        path = tmp_path / "clips" / "metadata" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"world_seed": "7"}))
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    assert sorted(c.split for c in manifest.clips) == ["train", "val"] and manifest.held_out == "clips"
    assert "1 of 2 clips, which may show the same ground" in capsys.readouterr().out
    # With a second world that one is held out, and no clip is encoded again.
    long_clip(tmp_path / "clips", "c", frames=20, world="8")
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    assert {c.name: c.split for c in manifest.clips} == {"a": "train", "b": "train", "c": "val"}
    assert manifest.held_out == "worlds" and "1 clips kept, 2 already done" in capsys.readouterr().out


def test_of_a_single_clip_the_end_is_held_out(tmp_path, tokenizer, capsys):
    long_clip(tmp_path / "clips", "only")
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    assert manifest.held_out == "end" and "the end of the only clip, after a gap" in capsys.readouterr().out
    whole = TokenClips(tmp_path / "out", "all")
    train, val = (TokenClips(tmp_path / "out", split) for split in ("train", "val"))
    assert [len(clips.tokens[0]) for clips in (whole, train, val)] == [100, 63, 25]
    for clips, part in ((train, slice(0, 63)), (val, slice(75, 100))):
        np.testing.assert_array_equal(clips.tokens[0], whole.tokens[0][part])
        np.testing.assert_array_equal(clips.actions[0], whole.actions[0][part.start : part.stop - 1])
        np.testing.assert_array_equal(clips.pose[0], whole.pose[0][part])
        assert unpack_indices(clips.entries[0].kept, clips.entries[0].frames) == list(range(100))[part]
    encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    assert "0 clips kept, 1 already done" in capsys.readouterr().out
    long_clip(tmp_path / "clips", "second")
    manifest = encode(tmp_path / "clips", tmp_path / "out", tokenizer)
    assert manifest.held_out == "clips" and all(c.cut == [] for c in manifest.clips)
    assert {c.frames for c in manifest.clips} == {100}
