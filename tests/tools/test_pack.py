"""Packing clips: smaller pictures, the same actions, in the same layout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dataset.recordings import ClipWriter, clip_paths, depth_path, find_clips, read_depth_file
from dataset.surroundings import BOX, FREE, Surroundings, write_surroundings
from dataset.token_files import SAMPLES
from runtime.video import read_frames, resize
from tools import pack

FRAMES = 100  # per clip


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """The first frames of two shipped clips."""
    folder = tmp_path_factory.mktemp("originals")
    for clip in find_clips(SAMPLES, "gamefactory", SAMPLES)[1][:2]:
        content = json.loads(clip.metadata.read_text())
        content["actions"] = {str(k): content["actions"][str(k)] for k in range(FRAMES)}
        with ClipWriter(folder, clip.name, 16, crf="12", preset="veryfast") as writer:
            for frame in read_frames(clip.video, wanted=range(FRAMES)):
                writer.write(frame)
            writer.finish(content)
    return folder


@pytest.fixture
def clips(originals, tmp_path) -> Path:
    """A copy of the originals that a test may change."""
    return shutil.copytree(originals, tmp_path / "clips")


def test_packed_clips_have_smaller_pictures_and_the_same_metadata(clips, tmp_path, capsys):
    out = tmp_path / "packed"
    assert pack.main([str(clips), str(out), "--jobs", "1", "--crf", "18"]) == 0
    assert "2 clips, 200 frames" in capsys.readouterr().out
    for clip in find_clips(clips, "gamefactory", out)[1]:
        metadata, video = clip_paths(out, clip.name)
        assert json.loads(metadata.read_text()) == json.loads(clip.metadata.read_text())
        assert video.stat().st_size < clip.video.stat().st_size
        old = [resize(frame, 72, 128) for frame in read_frames(clip.video, wanted=[0, 50, 99])]
        new = list(read_frames(video, wanted=[0, 50, 99]))
        error = np.mean((np.stack(old).astype(float) - np.stack(new)) ** 2)
        assert 10 * np.log10(255**2 / error) > 28


def test_packing_again_packs_missing_clips_and_reports_broken_ones(clips, tmp_path, capsys):
    out = tmp_path / "packed"
    first, second = find_clips(clips, "gamefactory", out)[1]
    complete = second.video.read_bytes()
    second.video.write_bytes(complete[:1000])
    assert pack.main([str(clips), str(out), "--jobs", "1", "--crf", "28"]) == 0
    output = capsys.readouterr()
    assert f"skipped {second.name}" in output.err and "1 clips, 100 frames" in output.out
    before = clip_paths(out, first.name)[1].stat().st_mtime_ns
    second.video.write_bytes(complete)
    assert pack.main([str(clips), str(out), "--jobs", "1", "--crf", "28"]) == 0
    assert "2 clips, 200 frames" in capsys.readouterr().out
    assert clip_paths(out, first.name)[1].stat().st_mtime_ns == before
    assert not list(out.rglob(".*"))


def give_depth(clips: Path, frames: int = FRAMES) -> dict[str, Surroundings]:
    """Writes a depth file for each clip."""
    rng, given = np.random.default_rng(0), {}
    for clip in find_clips(clips, "gamefactory", clips / "none")[1]:
        given[clip.name] = Surroundings(
            rng.integers(0, 256, (frames, 36, 64), np.uint8),
            np.full((frames, *BOX), FREE, np.uint8),
            rng.integers(-99, 99, (frames, 3)).astype(np.int32),
        )
        write_surroundings(depth_path(clip.video), given[clip.name])
    return given


def test_depth_and_nodes_are_copied_even_if_added_after_packing(clips, tmp_path):
    out = tmp_path / "packed"
    words = [str(clips), str(out), "--jobs", "1", "--crf", "28"]
    assert pack.main(words) == 0
    assert not (out / "depth").exists()
    given = give_depth(clips)
    assert pack.main(words) == 0
    for name, expected in given.items():
        packed = read_depth_file(clip_paths(out, name)[1], FRAMES)
        for key, array in expected.arrays().items():
            np.testing.assert_array_equal(packed.arrays()[key], array)
    before = [path.stat().st_mtime_ns for path in sorted(out.rglob("*.*"))]
    assert pack.main(words) == 0
    assert before == [path.stat().st_mtime_ns for path in sorted(out.rglob("*.*"))]


def test_a_clip_with_depth_of_another_length_is_skipped(clips, tmp_path, capsys):
    give_depth(clips, frames=FRAMES - 1)
    assert pack.main([str(clips), str(tmp_path / "packed"), "--jobs", "1"]) == 2
    errors = capsys.readouterr().err
    assert "broken depth" in errors and "99 frames, its clip has 100" in errors
    assert "none of 2 clips could be packed" in errors


def test_a_folder_without_clips_is_refused(tmp_path, capsys):
    assert pack.main([str(tmp_path), str(tmp_path / "packed")]) == 2
    assert f"{tmp_path}: has no gamefactory clip" in capsys.readouterr().err


def test_clips_are_not_packed_over_themselves(clips, capsys):
    before = {path: path.read_bytes() for path in clips.rglob("*") if path.is_file()}
    assert pack.main([str(clips), str(clips)]) == 2
    assert "is read by this run and would be overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in clips.rglob("*") if path.is_file()} == before
    assert pack.main([str(clips), str(next(iter(before)))]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err
