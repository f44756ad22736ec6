"""rollout/context.py: token files, pictures and clips as recordings."""

import numpy as np
import pytest
import torch
from tiny_clip import entry, make_clip

from rollout import context
from rollout.rollout import Rollout
from runtime.video import read_frames, save_image


@pytest.fixture(scope="module")
def world(tiny):
    return context.load_world(tiny.world, tiny.tokenizer, "cpu")


def test_entry_k_leads_from_frame_k_minus_1_to_k(world, tmp_path):
    clip = make_clip(tmp_path, [entry(0.9, ws=2), *[entry(0.05 * k, ws=1) for k in range(1, 8)]], 8)
    recording = context.load_clip(clip, world)
    assert len(recording) == 8 and len(recording.actions) == 7
    assert np.allclose(recording.actions[:, 0], 0.05 * np.arange(1, 8))
    assert (recording.actions[:, 3] == 1).all()  # entry "0" belongs to no frame
    frames = np.stack([context.resize_picture(f, world) for f in read_frames(clip)])
    assert torch.equal(recording.tokens, world.tokenizer.encode_frames(frames))


def test_a_faster_clip_is_thinned_out_and_its_actions_pooled(world, tmp_path):
    clip = make_clip(tmp_path, [entry(9), *[entry(0.05 * k) for k in range(1, 10)]], 10, fps=32)
    recording = context.load_clip(clip, world)
    assert len(recording) == 5  # frames 0, 2, 4, 6, 8; the turns between them add up
    assert np.allclose(recording.actions[:, 0], [0.15, 0.35, 0.55, 0.75])


def test_metadata_beside_the_clip_is_found_first(world, tmp_path):
    clip = make_clip(tmp_path, [entry(), *[entry(0.5)] * 5], 6)
    (tmp_path / "metadata" / "c.json").rename(clip.with_suffix(".json"))
    assert np.allclose(context.load_clip(clip, world).actions[:, 0], 0.5)
    clip.with_suffix(".json").unlink()
    assert context.find_metadata(clip) is None
    assert len(context.load_clip(clip, world)) == 1


@pytest.mark.parametrize("size", [(16, 32), (200, 300), (5, 7)])
def test_a_picture_of_any_size_is_one_frame(world, tmp_path, size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    save_image(tmp_path / "start.png", picture)
    recording = context.load_recording(tmp_path / "start.png", world)
    assert recording.tokens.shape == (1, 4, 8) and recording.actions.shape == (0, 5)
    rollout = Rollout(world.model, dtype=world.dtype)
    context.prime(rollout, [recording])
    rollout.step(torch.zeros(1, 5))
    assert rollout.pictures().shape == (1, 16, 32, 3)


def test_parts_of_a_recording_keep_frames_and_actions_aligned(world, tiny):
    recording = context.load_recording(tiny.tokens, world)
    first, last = recording.first(10), recording.last(30)
    assert len(first) == 10 and len(first.actions) == 9 and len(last) == 30 and len(last.actions) == 29
    assert torch.equal(recording.first(0).tokens, recording.tokens) and len(recording.first(99)) == 40
    assert torch.equal(last.tokens[0], recording.tokens[10]) and torch.equal(last.pose, recording.pose[10:])
    assert torch.equal(last.actions[0], recording.actions[10])
