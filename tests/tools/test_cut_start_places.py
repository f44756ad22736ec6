"""tools/cut_start_places.py: cuts out of token files, refusals."""

import numpy as np
import pytest

from dataset.token_files import ClipEntry, Manifest, read_token_file, write_token_file
from tools import cut_start_places


@pytest.fixture
def tokens(tmp_path):
    """A folder with one token file of 400 frames."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "tokens"
    folder.mkdir()
    content = rng.integers(0, 64, (400, 4, 8)), rng.uniform(-1, 1, (399, 5)), rng.uniform(-9, 9, (400, 5))
    write_token_file(folder / "c.npz", *content)
    clip = ClipEntry("c", "c.npz", 400, "val", "../video/c.mp4", [0, 399, 1])
    skipped = [{"name": "d", "reason": "dark"}]
    Manifest(16.0, [16, 32], [4, 8], 64, "0123456789abcdef", 70.0, clips=[clip], skipped=skipped).save(folder)
    return folder


def test_start_places_are_cut_out_of_clips(tokens, tmp_path):
    assert cut_start_places.main([str(tokens), str(tmp_path / "out"), "beach=c:100", "cave=c:0"]) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert [(c.name, c.frames, c.split, c.kept) for c in manifest.clips] == [
        ("beach", 161, "val", [100, 260, 1]),
        ("cave", 161, "val", [0, 160, 1]),
    ]
    assert manifest.tokenizer == "0123456789abcdef" and not manifest.skipped
    whole, cut = read_token_file(tokens / "c.npz"), read_token_file(tmp_path / "out" / "beach.npz")
    assert np.array_equal(cut["tokens"], whole["tokens"][100:261])
    assert np.array_equal(cut["actions"], whole["actions"][100:260])
    assert np.array_equal(cut["pose"], whole["pose"][100:261])


@pytest.mark.parametrize(
    "word, part",
    [("x=c:300", "no clip c of 461 frames"), ("x=e:0", "no clip e"), ("x=c", "expected NAME=CLIP:FRAME")],
)
def test_what_cannot_be_cut_is_refused(tokens, tmp_path, capsys, word, part):
    assert cut_start_places.main([str(tokens), str(tmp_path / "out"), word]) == 2
    assert part in capsys.readouterr().err
