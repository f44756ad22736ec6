"""tools/rank_start_places.py: which frames are candidates, how long they hold, and a run at a tiny size."""

import numpy as np
import pytest

from dataset.token_files import ClipEntry, Manifest, read_token_file, write_token_file
from runtime.video import read_image
from tools import rank_start_places as ranking
from vq_vae.tokenizer import load_tokenizer


def still_clip(frames: int = 260) -> tuple[np.ndarray, np.ndarray]:
    """Actions and poses of a player who walks, but stands before frames 40 to 50."""
    actions, pose = np.zeros((frames - 1, 5), np.float32), np.zeros((frames, 5), np.float32)
    actions[:, 3] = 1
    actions[30:50, 3] = 0
    pose[1:, 2] = np.cumsum(0.25 * actions[:, 3])
    return actions, pose


def test_candidates_stand_still_and_level():
    actions, pose = still_clip()
    assert ranking.still_frames(actions, pose, 6).tolist() == list(range(36, 51))
    turning = actions.copy()
    turning[45, 0] = 0.1
    assert ranking.still_frames(turning, pose, 6).tolist() == list(range(36, 46))
    falling, looking_up = pose.copy(), pose.copy()
    falling[30:60, 1] -= np.arange(30)
    looking_up[:, 4] = -30
    for other in (falling, looking_up, np.full_like(pose, np.nan)):
        assert not len(ranking.still_frames(actions, other, 6))
    assert not len(ranking.still_frames(actions[:179], pose[:180], 6)), "too short for a start place"


def test_how_long_codes_hold():
    codes = np.array([1.0] * 10 + [0.3] * 10)
    assert ranking.held_frames(codes, 4) == 8
    assert ranking.held_frames(np.ones(20), 4) == 20


def test_the_ranking_prints_what_the_cutting_reads_and_writes_a_sheet(tiny, tmp_path, capsys):
    folder, out = tmp_path / "tokens", tmp_path / "places.png"
    folder.mkdir()
    actions, pose = still_clip()
    tokens = np.random.default_rng(0).integers(0, 64, (len(pose), 4, 8))
    write_token_file(folder / "c.npz", tokens, actions, pose)
    clip = ClipEntry("c", "c.npz", len(pose), "val", "c.mp4", [0, len(pose) - 1, 1])
    fingerprint = load_tokenizer(tiny.tokenizer).fingerprint
    Manifest(16.0, [16, 32], [4, 8], 64, fingerprint, 70.0, clips=[clip]).save(folder)
    before = read_token_file(folder / "c.npz")["tokens"]
    assert ranking.main([str(folder), *tiny.flags, "--seconds", "0.5", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "NAME=c:21" in printed and f"cut_start_places.py {folder}" in printed
    assert read_image(out).shape == (80 + 16, 7 * 160, 3)
    assert np.array_equal(read_token_file(folder / "c.npz")["tokens"], before)


def test_no_candidate_is_refused(tiny, tmp_path, capsys):
    arguments = [str(tiny.tokens.parent), *tiny.flags, "--split", "train", "--out", str(tmp_path / "p.jpg")]
    assert ranking.main(arguments) == 2
    assert "stands still and level" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["places.gif"])
def test_bad_outputs_are_refused(tiny, tmp_path, capsys, name):
    assert ranking.main([str(tiny.tokens.parent), *tiny.flags, "--out", str(tmp_path / name)]) == 2
    assert "ends in .jpg or .png" in capsys.readouterr().err
