"""Depth files, held-out worlds, the cache, and batches."""

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from test_depth_net import TINY

from dataset.recordings import ClipError
from dataset.surroundings import decode_inverse_ray_distance
from dataset.token_files import DataError
from depth.depth_clips import (
    DepthClip,
    DepthFrames,
    augment,
    find_depth_clips,
    load_clips,
    pass_through,
    read_clip,
    split_clips,
)

SIZE = (16, 32)


def test_clips_without_depth_do_not_count(depth_data, tmp_path):
    assert {clip.name for clip in find_depth_clips(str(depth_data.folder))} == set(depth_data.worlds)
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"no clip with depth in it; expected depth/NAME\.npz"):
        find_depth_clips(str(tmp_path))
    both = find_depth_clips(f"{tmp_path},{depth_data.folder}")
    assert len(both) == len(depth_data.worlds)
    assert len(find_depth_clips(f"{tmp_path},{depth_data.folder}", need_depth=False)) == len(both) + 1
    with pytest.raises(DataError, match=r"no clip in it; expected metadata/NAME\.json"):
        find_depth_clips("", need_depth=False)


def test_whole_worlds_are_held_out(depth_data):
    splits = split_clips(find_depth_clips(str(depth_data.folder)), 0.5)
    worlds = {split: {depth_data.worlds[c.name] for c in clips} for split, clips in splits.items()}
    assert len(worlds["train"]) == 2 and len(worlds["val"]) == 1
    assert not worlds["train"] & worlds["val"]
    assert all(len(clips) == 2 * len(worlds[split]) for split, clips in splits.items())


def test_frames_poses_and_depth_belong_together(depth_data):
    clip = find_depth_clips(str(depth_data.folder))[0]
    whole, third = read_clip(clip, 1, SIZE), read_clip(clip, 3, SIZE)
    assert whole.pictures.shape == (12, *SIZE, 3) and whole.codes.shape == (12, 8, 16)
    np.testing.assert_allclose(whole.pose[:, 4], np.arange(12))
    for part in ("pictures", "codes", "pose"):
        np.testing.assert_array_equal(getattr(third, part), getattr(whole, part)[::3])
    red = whole.pictures[:, ::2, ::2, 0] > whole.pictures[:, ::2, ::2, 2]
    assert ((whole.codes > 150) == red).mean() > 0.97, "red is near"


def test_a_clip_is_prepared_once(depth_data, tmp_path, monkeypatch):
    clips = find_depth_clips(str(depth_data.folder))[:2]
    first = load_clips(clips, 2, SIZE, tmp_path)
    monkeypatch.setattr("depth.depth_clips.read_frames", lambda *_: pytest.fail("decoded again"))
    second = load_clips(clips, 2, SIZE, tmp_path)
    for a, b in zip(first, second, strict=True):
        assert a.name == b.name
        for part in ("pictures", "decoded", "codes", "pose"):
            np.testing.assert_array_equal(getattr(a, part), getattr(b, part))
    monkeypatch.undo()
    assert len(load_clips(clips, 3, SIZE, tmp_path)[0].pictures) == 4, "another step is prepared anew"
    broken = sorted(tmp_path.glob("*.npz"))[0]
    broken.write_bytes(b"PK")
    with pytest.raises(DataError, match="delete it, it is made again"):
        load_clips(clips, 2, SIZE, tmp_path)
        load_clips(clips, 3, SIZE, tmp_path)


def test_metadata_with_a_gap(depth_data, tmp_path):
    clip = find_depth_clips(str(depth_data.folder))[0]
    entries = clip.metadata.read_text().replace('"11":', '"99":')
    metadata = tmp_path / "metadata" / "a.json"
    metadata.parent.mkdir()
    metadata.write_text(entries)
    with pytest.raises(ClipError, match=r"a\.json: entry 11 of 0\.\.11 is missing"):
        read_clip(type(clip)("a", "a", clip.video, metadata), 1, SIZE)


# ---------------------------------------------------------------- decoded pictures


def frames_of(count: int, seed: int = 0) -> DepthClip:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)
    codes = rng.integers(0, 256, (count, *TINY.size), dtype=np.uint8)
    pose = rng.uniform(-20, 20, (count, 5)).astype(np.float32)
    return DepthClip(f"clip{seed}", pictures, np.zeros(count, bool), codes, pose)


def test_a_share_of_the_pictures_goes_through_the_tokenizer():
    clip, tokenizer = frames_of(20), tiny_tokenizer()
    clean = pass_through(clip, tokenizer, 0.3, 0.0, seed=1)
    noisy = pass_through(clip, tokenizer, 0.3, 0.9, seed=1)
    assert clean.decoded.sum() == 6
    np.testing.assert_array_equal(clean.pictures[~clean.decoded], clip.pictures[~clean.decoded])
    tokens = tokenizer.encode_frames(clip.pictures[clean.decoded])
    expected = torch.cat(list(tokenizer.decode_frames(tokens)))
    made = torch.from_numpy(clean.pictures[clean.decoded]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(made, expected, atol=0.5 / 255 + 1e-4, rtol=0)
    changed = [(a != b).any() for a, b in zip(clean.pictures, noisy.pictures, strict=True)]
    changed = np.array(changed)[clean.decoded]
    assert changed.tolist() == [False, True] * 3, "every second one from tokens with errors"


# ---------------------------------------------------------------- batches


def test_batches_take_frames_of_all_clips():
    clips = [frames_of(3, 1), frames_of(5, 2)]
    frames = DepthFrames(clips, farthest_m=50.0)
    assert len(frames) == 8
    batch = frames.batch(np.array([0, 2, 3, 7]))
    for i, (clip, row) in enumerate([(0, 0), (0, 2), (1, 0), (1, 4)]):
        expected = torch.from_numpy(clips[clip].pictures[row]).permute(2, 0, 1) / 255
        torch.testing.assert_close(batch.pictures[i], expected)
        inverse = np.maximum(decode_inverse_ray_distance(clips[clip].codes[row]), 1 / 50)
        torch.testing.assert_close(batch.target[i], torch.from_numpy(np.log(inverse)))
        assert batch.pitch[i].item() == pytest.approx(float(clips[clip].pose[row, 4]))


def test_a_flip_mirrors_pictures_and_depth_alike():
    clip = frames_of(6)
    mirrored = DepthClip("m", clip.pictures[:, :, ::-1], clip.decoded, clip.codes[:, :, ::-1], clip.pose)
    numbers = np.arange(6)
    one, other = (DepthFrames([c], 100.0).batch(numbers) for c in (clip, mirrored))
    where = torch.tensor([True, False] * 3)
    flipped = one.flip(where)
    for name in ("pictures", "target", "pitch"):
        found, plain, mirror = (getattr(batch, name) for batch in (flipped, one, other))
        torch.testing.assert_close(found[where], mirror[where])
        torch.testing.assert_close(found[~where], plain[~where])


def test_augmentation_is_mild_and_repeats_with_its_seed():
    batch = DepthFrames([frames_of(400)], 100.0).batch(np.arange(400))
    made, again = (augment(batch, np.random.default_rng(3), True, 0.1, 0.25) for _ in range(2))
    torch.testing.assert_close(made.pictures, again.pictures)
    assert 0.15 < made.pitch.isnan().float().mean() < 0.35
    plain = augment(batch, np.random.default_rng(3), False, 0.1, 0.25)
    torch.testing.assert_close(plain.target, batch.target)
    gain = plain.pictures.mean((1, 2, 3)) / batch.pictures.mean((1, 2, 3))
    assert 0.89 < gain.min() < 0.93 and 1.05 < gain.max() < 1.11
    mirrored = (made.target != batch.target).flatten(1).any(1)
    assert 0.4 < mirrored.float().mean() < 0.6
    same = augment(batch, np.random.default_rng(3), False, 0.0, 0.0)
    torch.testing.assert_close(same.pictures, batch.pictures)
    torch.testing.assert_close(same.pitch, batch.pitch)
