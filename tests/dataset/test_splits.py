"""What is held out when there are many worlds, few, one, or a single clip."""

import pytest

from dataset.splits import GAP_FRAMES, LEAST_FRAMES, HeldOut, assign_splits, cut_of
from dataset.token_files import ClipEntry, split_of


def test_many_worlds_are_held_out_by_the_hash_of_their_names():
    groups = {f"clip{n}": f"world_{n // 3}" for n in range(120)}
    splits, held_out = assign_splits(groups, 0.1)
    assert splits == {name: split_of(group, 0.1) for name, group in groups.items()}
    assert held_out == HeldOut.WORLDS and set(splits.values()) == {"train", "val"}


def test_of_two_worlds_the_smaller_one_is_held_out():
    groups = {name: "world_1" for name in "abc"} | {"d": "world_2"}
    assert {split_of(group, 0.01) for group in groups.values()} == {"train"}
    splits, held_out = assign_splits(groups, 0.01)
    assert splits == {"a": "train", "b": "train", "c": "train", "d": "val"} and held_out == HeldOut.WORLDS


@pytest.mark.parametrize("groups", [{"a": "world_1", "b": "world_1"}, {"a": "a", "b": "b"}])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.9, 0.99])
def test_of_two_clips_of_one_world_or_of_none_one_is_held_out(groups, fraction):
    splits, held_out = assign_splits(groups, fraction)
    assert sorted(splits.values()) == ["train", "val"] and held_out == HeldOut.CLIPS


def test_nothing_and_everything_can_be_held_out():
    groups = {"a": "world_1", "b": "world_2"}
    assert assign_splits(groups, 0) == ({"a": "train", "b": "train"}, HeldOut.NOTHING)
    assert assign_splits(groups, 1) == ({"a": "val", "b": "val"}, HeldOut.WORLDS)
    assert assign_splits({}, 0.1) == ({}, HeldOut.NOTHING)


@pytest.mark.parametrize("frames", [LEAST_FRAMES, 100, 500, 5000])
def test_the_end_of_a_single_clip_is_held_out_after_a_gap(frames):
    assert assign_splits({"a": "world_1"}, 0.1) == ({"a": "train"}, HeldOut.NOTHING)
    first, second = cut_of(frames, 0.1)
    assert second - first == min(GAP_FRAMES, frames // 8)
    assert frames * 0.09 < frames - second <= frames // 4 and first >= frames / 2
    assert cut_of(frames, 0) == cut_of(LEAST_FRAMES - 1, 0.1) == []


def test_parts_of_a_cut_clip():
    clip = ClipEntry("a", "a.npz", 100, "train", "a.mp4", [10, 307, 3], cut=[60, 80])
    train, frames = clip.part("train")
    assert (train.frames, train.split, train.kept, frames) == (60, "train", [10, 187, 3], slice(0, 60))
    val, frames = clip.part("val")
    assert (val.frames, val.split, val.kept, frames) == (20, "val", [250, 307, 3], slice(80, 100))
    assert clip.part("all") == (clip, slice(0, 100)) and not clip.problem()
    for cut in ([60], [80, 60], [0, 60], [60, 100], ["60", 80]):
        clip.cut = cut
        try:
            assert clip.problem()
        except (TypeError, ValueError):
            pass  # Manifest.load reports these as well
