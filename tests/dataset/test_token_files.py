"""Token files, the manifest, and the windows that training samples from them."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.surroundings import BOX, SCALE
from dataset.token_files import (
    EXTRAS,
    MANIFEST,
    ClipEntry,
    DataError,
    Manifest,
    pack_indices,
    read_token_file,
    split_of,
    unpack_indices,
    with_first_pose,
    write_token_file,
)
from dataset.windows import TokenClips, epoch_windows

LENGTHS = {"alpha": 12, "beta": 7, "gamma": 9}  # frames
SPLITS = {"alpha": "train", "beta": "val", "gamma": "train"}


def content_of(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, actions and poses that differ in every cell of every clip."""
    frames, offset = LENGTHS[name], 1000 * list(LENGTHS).index(name)
    tokens = offset + np.arange(frames * 6).reshape(frames, 2, 3)
    actions = np.linspace(-1, 1, (frames - 1) * 5).reshape(frames - 1, 5)
    return tokens, actions, offset + np.arange(frames * 5).reshape(frames, 5) / 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clips of different length in two splits."""
    manifest = Manifest(16.0, [8, 12], [2, 3], 4096, "0123456789abcdef", 70.0)
    for name, frames in LENGTHS.items():
        write_token_file(tmp_path / f"{name}.npz", *content_of(name))
        entry = ClipEntry(name, f"{name}.npz", frames, SPLITS[name], f"../{name}.mp4", [0, frames - 1, 1])
        manifest.clips.append(entry)
    manifest.clips.reverse()
    manifest.skipped.append({"name": "delta", "reason": "no video"})
    manifest.save(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- the manifest


def test_manifest_round_trip(folder):
    manifest = Manifest.load(folder)
    assert [clip.name for clip in manifest.clips] == sorted(LENGTHS), "in the order of the names"
    before = (folder / MANIFEST).read_text()
    manifest.save(folder)
    assert (folder / MANIFEST).read_text() == before
    assert manifest.skipped == [{"name": "delta", "reason": "no video"}]
    assert manifest.action_names == ["yaw", "pitch", "move_x", "move_z", "jump"]
    assert [p.name for p in folder.glob("*.tmp")] == []


def test_missing_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json: no manifest; .*python preprocess\.py"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "clips": [{}]}', "7"]
)
def test_broken_manifest(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: .*preprocess again") as raised:
        Manifest.load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"format": 2}, "format 2, expected 1"),
        ({"action_names": ["yaw"]}, r"action_names is \['yaw'\]"),
        ({"unknown": 1}, "not a manifest"),
    ],
)
def test_manifest_with_wrong_fields(folder, change, told):
    content = asdict(Manifest.load(folder)) | change
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError, match=told):
        Manifest.load(folder)


# ---------------------------------------------------------------- splits and frame numbers


def test_split_is_the_same_in_every_run():
    """Fixed values: another result would move clips between train and val of existing data sets."""
    names = [f"clip_{i:04d}" for i in range(30)]
    assert [n for n in names if split_of(n, 0.1) == "val"] == ["clip_0011", "clip_0013", "clip_0018"]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_val_is_near_the_fraction(fraction):
    names = [f"world{i % 7}_clip{i}" for i in range(4000)]
    share = np.mean([split_of(name, fraction) == "val" for name in names])
    assert share == pytest.approx(fraction, abs=4 * np.sqrt(0.25 / 4000))


def test_a_larger_fraction_keeps_the_val_clips():
    names = [f"clip{i}" for i in range(500)]
    small, large = ({n for n in names if split_of(n, f) == "val"} for f in (0.1, 0.3))
    assert small < large


@pytest.mark.parametrize(
    "indices",
    [
        [0, 1, 2, 3, 4],
        [0, 2, 4, 6, 8, 10],
        [16, 17, 18, 19],
        [0, 1, 3, 4, 6],
        [0, 1, 2],
        [0, 5, 7],
        [3, 9],
        [4],
        [],
    ],
)
def test_frame_indices_round_trip(indices):
    packed = pack_indices(indices)
    assert unpack_indices(packed, len(indices)) == indices
    assert unpack_indices(json.loads(json.dumps(packed)), len(indices)) == indices


def test_regular_frame_indices_are_packed_into_three_numbers():
    assert pack_indices(list(range(0, 4000, 2))) == [0, 3998, 2]
    assert pack_indices(np.arange(5)) == [0, 4, 1], "numpy numbers too, as plain ones"
    assert all(type(i) is int for i in pack_indices(np.arange(5)))


# ---------------------------------------------------------------- token files


def test_token_file_round_trip(folder):
    tokens, actions, pose = content_of("beta")
    content = read_token_file(folder / "beta.npz")
    assert content["tokens"].dtype == np.uint16 and np.array_equal(content["tokens"], tokens)
    assert content["actions"].dtype == np.float32 and np.allclose(content["actions"], actions)
    assert content["pose"].dtype == np.float32 and np.array_equal(content["pose"], pose)


def test_missing_token_file(tmp_path):
    with pytest.raises(DataError, match=r"gone\.npz: no such token file"):
        read_token_file(tmp_path / "gone.npz")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_token_file(folder, share):
    whole = (folder / "beta.npz").read_bytes()
    (folder / "beta.npz").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=r"beta\.npz: not a token file .*run preprocess\.py again"):
        read_token_file(folder / "beta.npz")


def test_damaged_token_file(folder):
    """Flipped bytes fail in the checksum, in the headers, or in the middle of inflating."""
    whole = (folder / "alpha.npz").read_bytes()
    for position in range(30, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        (folder / "alpha.npz").write_bytes(damaged)
        try:
            read_token_file(folder / "alpha.npz")
        except DataError as error:
            assert "alpha.npz" in str(error)


@pytest.mark.parametrize(
    "change",
    [
        {"actions": np.zeros((7, 5))},
        {"actions": np.zeros((6, 4))},
        {"pose": np.zeros((6, 5))},
        {"tokens": np.zeros((7, 6))},
        {"tokens": np.zeros(())},
        {"actions": None},
    ],
)
def test_token_file_whose_arrays_disagree(folder, change):
    arrays = dict(zip(("tokens", "actions", "pose"), content_of("beta"), strict=True)) | change
    np.savez(folder / "beta.npz", **{name: a for name, a in arrays.items() if a is not None})
    with pytest.raises(DataError, match=r"beta\.npz: .*run preprocess\.py again"):
        read_token_file(folder / "beta.npz")


def extras_of(name: str) -> dict[str, np.ndarray]:
    """Depth and nodes that differ from frame to frame."""
    frames = LENGTHS[name]
    k = np.arange(frames)
    return {
        "depth": np.broadcast_to(k[:, None, None], (frames, 4, 6)).astype(np.uint8),
        "nodes": np.broadcast_to(k[:, None, None, None] % 5, (frames, *BOX)).astype(np.uint8),
        "origin": np.stack([k, -k, 3 * k], 1).astype(np.int32),
    }


def test_depth_and_nodes_are_read_if_requested_and_present(folder):
    write_token_file(folder / "alpha.npz", *content_of("alpha"), **extras_of("alpha"))
    assert set(read_token_file(folder / "alpha.npz")) == {"tokens", "actions", "pose"}
    assert set(read_token_file(folder / "beta.npz", EXTRAS)) == {"tokens", "actions", "pose"}
    content = read_token_file(folder / "alpha.npz", EXTRAS)
    for name, array in extras_of("alpha").items():
        np.testing.assert_array_equal(content[name], array)
    clips = TokenClips(folder, "all", extras=EXTRAS)
    np.testing.assert_array_equal(clips.extras["depth"][0], extras_of("alpha")["depth"])
    assert clips.extras["depth"][1:] == [None, None] and clips.extras["origin"][1:] == [None, None]
    assert TokenClips(folder, "all").extras == {}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"depth": np.zeros((12, 2, 3), np.uint8)}, r"depth uint8 \[12, 4, 6\], found uint8 \[12, 2, 3\]"),
        ({"depth": np.zeros((11, 4, 6), np.uint8)}, r"depth uint8 \[12, 4, 6\], found uint8 \[11, 4, 6\]"),
        ({"depth": np.zeros((12, 4, 6), np.float32)}, r"depth uint8 .*found float32"),
        ({"nodes": np.zeros((12, 5, 6, 5), np.uint8)}, r"nodes uint8 \[12, 7, 7, 7\], found"),
        ({"origin": np.zeros((12, 3), np.int64)}, r"origin int32 .*found int64"),
    ],
)
def test_depth_and_nodes_with_wrong_shapes_or_types_are_refused(folder, change, expected):
    write_token_file(folder / "alpha.npz", *content_of("alpha"), **extras_of("alpha") | change)
    with pytest.raises(DataError, match=r"alpha\.npz: expected " + expected + ".*run preprocess"):
        TokenClips(folder, "train", extras=EXTRAS)
    TokenClips(folder, "train")  # without the extras there is no error


def test_depth_on_another_scale_is_refused_when_it_is_read(folder):
    manifest = Manifest.load(folder)
    for scale, fits in ((None, True), (SCALE, True), ({**SCALE, "farthest_m": 100.0}, False)):
        manifest.depth_scale = scale
        manifest.save(folder)
        assert Manifest.load(folder).depth_scale == scale
        TokenClips(folder, "all", extras=["nodes"])
        if fits:
            TokenClips(folder, "all", extras=["depth"])
        else:
            with pytest.raises(DataError, match=r"manifest\.json: depth_scale is .*100.*expected"):
                TokenClips(folder, "all", extras=["depth"])


def test_a_crash_while_writing_leaves_the_old_file(folder, monkeypatch):
    before = (folder / "beta.npz").read_bytes()

    def crash(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", crash)
    with pytest.raises(KeyboardInterrupt):
        write_token_file(folder / "beta.npz", *content_of("alpha"))
    assert (folder / "beta.npz").read_bytes() == before


# ---------------------------------------------------------------- clips of a split


def test_splits_are_whole_clips(folder):
    names = {s: [e.name for e in TokenClips(folder, s).entries] for s in ("train", "val", "all")}
    assert names == {"train": ["alpha", "gamma"], "val": ["beta"], "all": ["alpha", "beta", "gamma"]}
    assert TokenClips(folder, "train").frames == 12 + 9


def test_another_tokenizer_is_refused(folder):
    TokenClips(folder, "all", tokenizer="0123456789abcdef")
    with pytest.raises(DataError) as raised:
        TokenClips(folder, "all", tokenizer="fedcba9876543210")
    message = str(raised.value)
    assert "0123456789abcdef" in message and "fedcba9876543210" in message and MANIFEST in message


def test_an_empty_split_is_refused_with_the_counts(folder):
    with pytest.raises(DataError, match=r"no clip in split 'test' .*'train': 2, 'val': 1"):
        TokenClips(folder, "test")


def test_a_file_with_another_length_than_in_the_manifest(folder):
    write_token_file(folder / "beta.npz", *(array[:-1] for array in content_of("beta")))
    with pytest.raises(DataError, match=r"beta\.npz: 6 frames, the manifest says 7"):
        TokenClips(folder, "val")


def test_a_file_with_another_grid_than_in_the_manifest(folder):
    tokens, actions, pose = content_of("beta")
    write_token_file(folder / "beta.npz", tokens.transpose(0, 2, 1), actions, pose)
    with pytest.raises(DataError, match=r"beta\.npz: grid \[3, 2\], the manifest says \[2, 3\]"):
        TokenClips(folder, "val")


def test_batch_is_slices_of_the_clips(folder):
    clips = TokenClips(folder, "all")
    windows = np.array([(0, 3), (2, 0), (1, 2), (0, 7)])
    tokens, actions, pose = clips.batch(windows, frames=5)
    assert tokens.shape == (4, 5, 2, 3) and tokens.dtype == torch.int64
    assert actions.shape == (4, 4, 5) and actions.dtype == torch.float32
    assert pose.shape == (4, 5, 5) and pose.dtype == torch.float32
    for i, (clip, start) in enumerate(windows):
        true_tokens, true_actions, true_pose = content_of(clips.entries[clip].name)
        assert np.array_equal(tokens[i].numpy(), true_tokens[start : start + 5])
        assert np.allclose(actions[i].numpy(), true_actions[start : start + 4]), (
            "action t leads from t to t+1"
        )
        true_pose = true_pose[start : start + 5]
        origin = np.round(true_pose[0, :3])
        assert np.allclose(pose[i, :, :3], true_pose[:, :3] - origin), "whole metres near the first frame"
        assert np.allclose(pose[i, :, 3:], true_pose[:, 3:]), "angles are absolute"


def test_a_batch_is_a_copy(folder):
    clips = TokenClips(folder, "val")
    clips.batch(np.array([(0, 0)]), 3)[1].fill_(99)
    assert np.array_equal(clips.actions[0], content_of("beta")[1].astype(np.float32))


# ---------------------------------------------------------------- windows

CLIP_LENGTHS = [50, 7, 31, 5, 6]
WINDOW = 6  # frames: 5 transitions


def test_windows_lie_within_a_clip():
    for epoch in range(20):
        for clip, start in epoch_windows(CLIP_LENGTHS, WINDOW, seed=0, epoch=epoch):
            assert 0 <= start and start + WINDOW <= CLIP_LENGTHS[clip]


def test_windows_of_an_epoch_do_not_overlap():
    for epoch in range(20):
        taken = set()
        for clip, start in epoch_windows(CLIP_LENGTHS, WINDOW, seed=0, epoch=epoch):
            transitions = {(clip, t) for t in range(start, start + WINDOW - 1)}
            assert not transitions & taken
            taken |= transitions
        assert len(taken) > 0.7 * sum(n - 1 for n in CLIP_LENGTHS if n >= WINDOW), "most transitions are used"


def test_epochs_differ_and_are_reproducible():
    first, second = (epoch_windows(CLIP_LENGTHS, WINDOW, seed=0, epoch=e) for e in (0, 1))
    assert {tuple(w) for w in first} != {tuple(w) for w in second}
    assert np.array_equal(first, epoch_windows(CLIP_LENGTHS, WINDOW, seed=0, epoch=0))
    assert not np.array_equal(first, epoch_windows(CLIP_LENGTHS, WINDOW, seed=1, epoch=0))
    clips_in_order = epoch_windows(CLIP_LENGTHS, WINDOW, seed=0, epoch=0)[:, 0]
    assert (np.diff(clips_in_order) < 0).any(), "clips are mixed"


def test_every_transition_occurs_in_some_epoch():
    seen = set()
    for epoch in range(60):
        for clip, start in epoch_windows(CLIP_LENGTHS, WINDOW, seed=0, epoch=epoch):
            seen |= {(clip, t) for t in range(start, start + WINDOW - 1)}
    assert seen == {(c, t) for c, n in enumerate(CLIP_LENGTHS) if n >= WINDOW for t in range(n - 1)}


def test_clips_shorter_than_a_window_give_none():
    assert epoch_windows([5, 3], WINDOW, seed=0, epoch=0).shape == (0, 2)
    assert epoch_windows([6], WINDOW, seed=0, epoch=0).tolist() == [[0, 0]]


def test_an_unknown_first_pose_is_computed_from_the_second():
    pose = np.array([[np.nan] * 5, [1, 2, 3, 50, 10], [2, 2, 3, 60, 10]], np.float32)
    actions = np.array([[1.0, -0.5, 0, 0, 0], [2 / 3, 0, 0, 0, 0]], np.float32)
    found = with_first_pose(pose, actions, 15.0)
    np.testing.assert_allclose(found[0], [1, 2, 3, 35, 17.5])
    assert np.array_equal(found[1:], pose[1:])
    unknown = np.full((3, 5), np.nan)
    assert with_first_pose(unknown, actions, 15.0) is unknown
    whole = np.zeros((3, 5))
    assert with_first_pose(whole, actions, 15.0) is whole
