"""Packing clips: smaller pictures, the same actions, in the same layout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dataset.recordings import clip_paths, depth_path, find_clips, read_depth_file
from dataset.surroundings import BOX, FREE, Surroundings, write_surroundings
from dataset.token_files import SAMPLES
from runtime.video import read_frames, resize
from tools import pack


@pytest.fixture
def clips(tmp_path):
    """Two shipped clips in a folder of their own."""
    for clip in find_clips(SAMPLES, "gamefactory", SAMPLES)[1][:2]:
        metadata, video = clip_paths(tmp_path / "clips", clip.name)
        metadata.parent.mkdir(parents=True, exist_ok=True)
        video.parent.mkdir(exist_ok=True)
        shutil.copy(clip.metadata, metadata)
        shutil.copy(clip.video, video)
    return tmp_path / "clips"


def test_packed_clips_are_smaller_pictures_of_the_same_play(clips, tmp_path, capsys):
    out = tmp_path / "packed"
    assert pack.main([str(clips), str(out), "--jobs", "1", "--crf", "18"]) == 0
    assert "2 clips, 1000 frames" in capsys.readouterr().out
    for clip in find_clips(clips, "gamefactory", out)[1]:
        metadata, video = clip_paths(out, clip.name)
        assert json.loads(metadata.read_text()) == json.loads(clip.metadata.read_text())
        assert video.stat().st_size < clip.video.stat().st_size
        old = [resize(frame, 72, 128) for frame in read_frames(clip.video, wanted=[0, 250, 499])]
        new = list(read_frames(video, wanted=[0, 250, 499]))
        error = np.mean((np.stack(old).astype(float) - np.stack(new)) ** 2)
        assert 10 * np.log10(255**2 / error) > 28


def test_packing_again_packs_only_what_is_missing_and_names_what_is_broken(clips, tmp_path, capsys):
    out = tmp_path / "packed"
    first, second = find_clips(clips, "gamefactory", out)[1]
    whole = second.video.read_bytes()
    second.video.write_bytes(whole[:1000])
    assert pack.main([str(clips), str(out), "--jobs", "1", "--crf", "28"]) == 0
    said = capsys.readouterr()
    assert f"skipped {second.name}" in said.err and "1 clips, 500 frames" in said.out
    before = clip_paths(out, first.name)[1].stat().st_mtime_ns
    second.video.write_bytes(whole)
    assert pack.main([str(clips), str(out), "--jobs", "1", "--crf", "28"]) == 0
    assert "2 clips, 1000 frames" in capsys.readouterr().out
    assert clip_paths(out, first.name)[1].stat().st_mtime_ns == before
    assert not list(out.rglob(".*"))


def give_depth(clips: Path, frames: int = 500) -> dict[str, Surroundings]:
    """A depth file for each clip."""
    rng, given = np.random.default_rng(0), {}
    for clip in find_clips(clips, "gamefactory", clips / "none")[1]:
        given[clip.name] = Surroundings(
            rng.integers(0, 256, (frames, 36, 64), np.uint8),
            np.full((frames, *BOX), FREE, np.uint8),
            rng.integers(-99, 99, (frames, 3)).astype(np.int32),
        )
        write_surroundings(depth_path(clip.video), given[clip.name])
    return given


def test_depth_and_nodes_are_carried_along_also_by_clips_that_were_packed_without(clips, tmp_path):
    out = tmp_path / "packed"
    words = [str(clips), str(out), "--jobs", "1", "--crf", "28"]
    assert pack.main(words) == 0
    assert not (out / "depth").exists()
    given = give_depth(clips)
    assert pack.main(words) == 0
    for name, expected in given.items():
        packed = read_depth_file(clip_paths(out, name)[1], 500)
        for key, array in expected.arrays().items():
            np.testing.assert_array_equal(packed.arrays()[key], array)
    before = [path.stat().st_mtime_ns for path in sorted(out.rglob("*.*"))]
    assert pack.main(words) == 0
    assert before == [path.stat().st_mtime_ns for path in sorted(out.rglob("*.*"))]


def test_a_clip_whose_depth_is_of_another_length_is_skipped_and_named(clips, tmp_path, capsys):
    give_depth(clips, frames=499)
    with pytest.raises(SystemExit):
        pack.main([str(clips), str(tmp_path / "packed"), "--jobs", "1"])
    said = capsys.readouterr().err
    assert "broken depth" in said and "499 frames, its clip has 500" in said


def test_a_folder_without_clips_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        pack.main([str(tmp_path), str(tmp_path / "packed")])
