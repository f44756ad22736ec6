"""The files that ship: weights, sample clips, their tokens and the start places fit together and work."""

import hashlib

import numpy as np
import pytest
import torch

import live_inference
from dataset.token_files import SAMPLE_TOKENS, SAMPLES, Manifest, read_token_file, unpack_indices
from dataset.windows import TokenClips
from depth.depth_clips import find_depth_clips, read_clip
from depth.predictor import load_depth
from depth.warp_quality import GROUND, PREDICTED, warp_quality
from metrics import psnr, token_accuracy
from rollout.action_script import WALK, parse
from rollout.context import START_PLACES
from rollout.rollout import Rollout
from rollout.sampling import PLAY
from rollout.world_model import SHIPPED_WORLD, load_world_model
from runtime import checkpoint
from runtime.video import read_frames, resize, to_float
from tools.cut_start_places import START_PLACE_FRAMES
from vq_vae.tokenizer import SHIPPED_TOKENIZER, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED_TOKENIZER)


@pytest.fixture(scope="module")
def clips(tokenizer) -> TokenClips:
    return TokenClips(SAMPLE_TOKENS, "all", tokenizer.fingerprint)


def test_checksums_are_those_of_the_files():
    listed = dict(reversed(line.split("  ")) for line in checkpoint.SUMS.read_text().splitlines())
    files = [*checkpoint.SHIPPED.glob("*.pt"), *START_PLACES.glob("*.npz")]
    assert {str(file.relative_to(checkpoint.SHIPPED)) for file in files} == set(listed)
    for file in files:
        assert (
            hashlib.sha256(file.read_bytes()).hexdigest() == listed[str(file.relative_to(checkpoint.SHIPPED))]
        )


def test_damaged_file_that_ships_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "world.pt"
    content = bytearray(SHIPPED_WORLD.read_bytes())
    path.write_bytes(content)
    (tmp_path / "SHA256SUMS").write_text(checkpoint.SUMS.read_text())
    monkeypatch.setattr(checkpoint, "SUMS", tmp_path / "SHA256SUMS")
    assert checkpoint.load(path)["kind"] == "world_model"
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="world.pt: its sha256 begins with"):
        checkpoint.load(path)
    checkpoint.write_sums()  # for weights of one's own
    assert checkpoint.load(path)["kind"] == "world_model"


def test_start_places_are_of_held_out_worlds_with_recorded_frames_to_compare(tokenizer):
    manifest = Manifest.load(START_PLACES)
    assert manifest.tokenizer == tokenizer.fingerprint and len(manifest.clips) >= 5
    for clip in manifest.clips:
        content = read_token_file(START_PLACES / clip.file)
        assert clip.split == "val" and len(content["tokens"]) == clip.frames == START_PLACE_FRAMES
        assert np.isfinite(content["pose"]).all() and len(np.unique(content["tokens"][15])) > 60


def test_sample_tokens_decode_to_the_sample_clips(tokenizer, clips):
    assert len(clips.entries) == len(list((SAMPLES / "video").glob("*.mp4"))) >= 3
    for entry, tokens in zip(clips.entries, clips.tokens, strict=True):
        kept = unpack_indices(entry.kept, entry.frames)
        frame = next(f for i, f in enumerate(read_frames(SAMPLE_TOKENS / entry.video)) if i == kept[100])
        height, width = clips.manifest.picture_size
        truth = to_float(torch.from_numpy(resize(frame, height, width)[None]))
        made = tokenizer.decode(torch.from_numpy(tokens[100:101].astype(np.int64)))
        assert psnr(made, truth).item() > 24, entry.name


@pytest.fixture(scope="module")
def world(tokenizer):
    return load_world_model(SHIPPED_WORLD, tokenizer)


@pytest.fixture(scope="module")
def windows_of_samples(clips):
    """Frames of each sample clip: tokens [N, 13, H, W], actions [N, 12, 5], pose [N, 13, 5]."""
    windows = np.array([[c, start] for c in range(len(clips.entries)) for start in (40, 70, 100)])
    return clips.batch(windows, 13)


@torch.inference_mode()
def test_shipped_world_predicts_a_turning_camera_better_than_a_copy(world, windows_of_samples, clips):
    model, content = world
    assert content["data"]["fps"] == clips.manifest.fps
    tokens, actions, pose = windows_of_samples
    state, nats, right, copied = model.init_state(len(tokens)), [], [], []
    for t in range(12):
        prediction, state = model.predict(tokens[:, t], actions[:, t], state, true_pose=pose[:, t])
        logits = model.logits(prediction)
        nats.append(torch.nn.functional.cross_entropy(logits, tokens[:, t + 1]))
        turns = actions[:, t, :2].abs().amax(1) * 15 > 1  # degrees
        right.append(token_accuracy(logits.argmax(1), tokens[:, t + 1])[turns])
        copied.append(token_accuracy(tokens[:, t], tokens[:, t + 1])[turns])
    assert torch.stack(nats[4:]).mean() < 0.45 * np.log(1024)
    right, copied = torch.cat(right), torch.cat(copied)
    assert len(right) > 20 and right.mean() > 1.2 * copied.mean()


def test_shipped_world_turns_and_comes_back_to_the_same_view(world, tokenizer, windows_of_samples):
    """Standing still keeps nearly all codes; after 60 degrees away and back most of them are there again."""
    tokens, actions, pose = (x[::3] for x in windows_of_samples)  # one window of each clip
    rollout = Rollout(world[0], PLAY)
    rollout.prime(tokens[:, :1], actions[:, :0], pose[:, :1])
    left = rollout.run(torch.zeros(len(tokens), 8, 5))[:, -1]
    assert token_accuracy(left, tokens[:, 0]).mean() > 0.9
    turn = torch.tensor([0.4, 0, 0, 0, 0]).expand(len(tokens), 10, 5)
    away = rollout.run(turn)[:, -1]
    assert token_accuracy(away, left).mean() < 0.4
    back = rollout.run(-turn)[:, -1]
    assert token_accuracy(back, left).mean() > 0.75


def test_shipped_depth_network_warps_better_than_a_flat_ground():
    """On the sample clips, whose world it was not trained on."""
    predictor = load_depth()
    size = predictor.config.height, predictor.config.width
    clips = find_depth_clips(str(SAMPLES), need_depth=False)
    whole = (read_clip(clip, 1, size) for clip in clips)
    rows = warp_quality(whole, predictor.config.vertical_fov_degrees, predictor, horizons=(4, 16)).rows
    for horizon in (4, 16):
        assert rows[PREDICTED][horizon] > rows[GROUND][horizon] + 0.3


def test_make_play_without_a_display(tmp_path, monkeypatch, capsys):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(live_inference, "OUT", tmp_path / "play.mp4")
    monkeypatch.setattr("sys.platform", "linux")
    assert live_inference.main(["--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "no display" in printed and "frames/s" in printed
    frames = list(read_frames(tmp_path / "play.mp4"))
    assert len(frames) == len(parse(WALK))
    assert frames[0].shape == (72 * live_inference.VIDEO_SCALE, 128 * live_inference.VIDEO_SCALE, 3)
    assert (tmp_path / "play_sheet.png").is_file()
