"""What comes with the repo: weights, sample clips and their tokens go together and do what they are for."""

import numpy as np
import pytest
import torch

import checkpoint
import live_inference
from data import SAMPLE_TOKENS, SAMPLES, TokenClips, unpack_indices
from metrics import psnr
from sampling import Choice, Dream, to_float
from video import read_frames, resize


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer(checkpoint.SHIPPED_TOKENIZER)


@pytest.fixture(scope="module")
def clips(tokenizer) -> TokenClips:
    return TokenClips(SAMPLE_TOKENS, "all", tokenizer.fingerprint)


def test_sample_tokens_paint_the_sample_clips(tokenizer, clips):
    assert len(clips.entries) == len(list((SAMPLES / "video").glob("*.mp4"))) >= 3
    for entry, tokens in zip(clips.entries, clips.tokens, strict=True):
        kept = unpack_indices(entry.kept, entry.frames)
        frame = next(f for i, f in enumerate(read_frames(SAMPLE_TOKENS / entry.video)) if i == kept[100])
        height, width = clips.manifest.picture_size
        truth = to_float(torch.from_numpy(resize(frame, height, width)[None]))
        made = tokenizer.decode_code(torch.from_numpy(tokens[100:101].astype(np.int64)))
        assert psnr(made, truth).item() > 24, entry.name


def test_the_shipped_world_foretells_better_than_chance(tokenizer, clips):
    model, content = checkpoint.load_world_model(checkpoint.SHIPPED_WORLD, tokenizer)
    assert content["data"]["fps"] == clips.manifest.fps
    tokens, actions = clips.batch(np.array([[c, 40] for c in range(len(clips.entries))]), 12)
    with torch.inference_mode():
        logits, _ = model(tokens[:, :-1], actions)
    nats = torch.nn.functional.cross_entropy(logits[:, 4:].flatten(0, 1), tokens[:, 5:].flatten(0, 1))
    assert nats < 0.7 * np.log(1024)


def test_the_shipped_world_can_be_walked_in(tokenizer, clips):
    model, _ = checkpoint.load_world_model(checkpoint.SHIPPED_WORLD, tokenizer)
    dream = Dream(model, tokenizer, Choice(top_k=50))
    tokens, actions = clips.batch(np.array([[0, 0]]), 15)
    dream.prime(tokens, actions)
    start = dream.pictures()
    made = dream.rollout(torch.tensor([0.0, 0, 0, 1, 0]).repeat(1, 8, 1))
    assert made.shape == (1, 8, *clips.manifest.latent_size)
    assert not torch.equal(dream.pictures(), start)


def test_make_play_without_a_display(tmp_path, monkeypatch, capsys):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(live_inference, "OUT", tmp_path / "play.mp4")
    monkeypatch.setattr("sys.platform", "linux")
    assert live_inference.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "no display" in said and "frames/s" in said
    frames = list(read_frames(tmp_path / "play.mp4"))
    assert len(frames) == len(live_inference.parse(live_inference.WALK))
    assert frames[0].shape == (72 * live_inference.VIDEO_SCALE, 128 * live_inference.VIDEO_SCALE, 3)
    assert (tmp_path / "play.png").is_file()
