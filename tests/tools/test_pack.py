"""Packing clips: smaller pictures, the same actions, in the same layout."""

import json
import shutil

import numpy as np
import pytest

from dataset.recordings import clip_paths, find_clips
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


def test_a_folder_without_clips_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        pack.main([str(tmp_path), str(tmp_path / "packed")])
