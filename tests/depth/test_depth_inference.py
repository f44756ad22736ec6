"""The script that shows depth, run for real with a tiny network."""

from functools import partial

import numpy as np
import pytest
from test_depth_net import tiny_net

from depth import depth_inference
from depth.predictor import DEPTH_KIND
from depth.warp_quality import warp_quality
from runtime import checkpoint
from runtime.video import read_image, save_image


@pytest.fixture
def flags(tiny, tmp_path) -> list[str]:
    checkpoint.save(tmp_path / "depth.pt", checkpoint.content_of(DEPTH_KIND, tiny_net()))
    files = {"--depth_ckpt": tmp_path / "depth.pt", "--vqvae_ckpt": tiny.tokenizer}
    files |= {"--out": tmp_path / "sheet.png", "--device": "cpu"}
    return [str(word) for pair in files.items() for word in pair]


@pytest.mark.parametrize("extra", [[], ["--decoded"]])
def test_a_sheet_of_clips_with_the_error(depth_data, flags, tmp_path, capsys, extra):
    clips = sorted(str(path) for path in (depth_data.folder / "video").glob("*.mp4"))[:2]
    assert depth_inference.main([*flags, "--clips", *clips, "--count", "3", *extra]) == 0
    assert "3 pictures with recorded depth" in capsys.readouterr().out
    assert read_image(tmp_path / "sheet.png").shape[1] == 3 * (64 + 4)


def test_photos_have_no_recorded_depth(flags, tmp_path, capsys):
    save_image(tmp_path / "house.png", np.zeros((90, 120, 3), np.uint8))
    assert depth_inference.main([*flags, "--photos", str(tmp_path / "house.png")]) == 0
    assert "recorded depth" not in capsys.readouterr().out
    assert read_image(tmp_path / "sheet.png").shape[1] == 2 * (64 + 4)


def test_the_warp_table(depth_data, flags, capsys, monkeypatch):
    words = ["--warp", str(depth_data.folder), "--held_out", "--val_fraction", "0.5"]
    assert depth_inference.main([*flags, *words]) == 2
    assert "none of the clips has 27 frames" in capsys.readouterr().err
    short = partial(warp_quality, horizons=(1, 4), every=1)
    monkeypatch.setattr(depth_inference, "warp_quality", short)
    assert depth_inference.main([*flags, *words]) == 0
    out = capsys.readouterr().out
    assert "4 windows" in out and "predicted depth of decoded pictures: share of gain" in out


def test_errors_are_one_line(depth_data, flags, tmp_path, capsys):
    assert depth_inference.main([*flags, "--warp", str(tmp_path / "none")]) == 2
    assert depth_inference.main([*flags, "--clips", str(tmp_path / "none.mp4")]) == 2
    words = ["--warp", str(depth_data.folder), "--held_out", "--val_fraction", "0"]
    assert depth_inference.main([*flags, *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "leave out --held_out" in errors[2]
