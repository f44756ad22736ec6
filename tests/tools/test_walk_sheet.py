"""tools/walk_sheet.py at a tiny size: a block of lines for each start, one picture a second."""

import numpy as np
import pytest
import torch

from rollout.context import load_recording, load_world, prime
from rollout.mixed_walk import mixed_walk
from rollout.rollout import Rollout
from runtime.video import read_image
from tools import walk_sheet


def test_the_sheet_has_a_block_for_each_start(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(walk_sheet, "PER_LINE", 2)
    out = tmp_path / "deep" / "walk.png"
    starts = ("--start", str(tiny.tokens), str(tiny.tokens))
    assert walk_sheet.main([*tiny.flags, *starts, "--seconds", "3", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    # Two lines of pictures of 96x48 under a strip of 16 pixels, for each of the two starts.
    assert read_image(out).shape == (2 * (2 * 48 + 16), 2 * 96, 3)


def test_the_pictures_are_those_of_the_mixed_walk(tiny):
    world = load_world(tiny.world, tiny.tokenizer, "cpu", "fp32")
    config = walk_sheet.config_of(parsed(tiny, "--start", str(tiny.tokens), "--seed", "5"))
    shown = list(walk_sheet.generate(world, config, [tiny.tokens], 3))
    rollout = Rollout(world.model, config.sampling, 5, world.dtype)
    prime(rollout, [load_recording(tiny.tokens, world).first(config.context_frames)])
    expected = [rollout.pictures().numpy()]
    for action in torch.from_numpy(mixed_walk(32, 5)):
        rollout.step(action[None])
        expected.append(rollout.pictures().numpy())
    assert len(shown) == 3
    assert all(np.array_equal(a, b) for a, b in zip(shown, expected[::16], strict=True))


def parsed(tiny, *flags: str):
    parser = walk_sheet.argparse.ArgumentParser()
    walk_sheet.add_arguments(parser)
    return parser.parse_args([*tiny.flags, *flags])


@pytest.mark.parametrize("name, part", [("walk.gif", "ends in .jpg or .png"), ("photo.png", "is read by")])
def test_bad_outputs_are_refused(tiny, tmp_path, capsys, name, part):
    photo = tmp_path / "photo.png"
    walk_sheet.Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(photo)
    before = photo.read_bytes()
    flags = [*tiny.flags, "--start", str(photo), "--out", str(tmp_path / name)]
    assert walk_sheet.main(flags) == 2
    assert part in capsys.readouterr().err and photo.read_bytes() == before
