"""The PSNR of warped frames, on a wall whose depth is known exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from wall_clip import FOV, wall_clip

from dataset.token_files import DataError
from depth.depth_pictures import depth_colours, depth_sheet
from depth.warp_quality import (
    COPY,
    GROUND,
    RECORDED,
    ROTATION,
    VISIBLE,
    WarpQuality,
    read_source,
    warp_quality,
)
from geometry import camera


def test_recorded_depth_warps_best():
    found = warp_quality([wall_clip()], FOV, horizons=(1, 8, 16), every=8)
    assert found.windows == 3
    for horizon in (8, 16):
        row = {kind: values[horizon] for kind, values in found.rows.items()}
        assert row[ROTATION] == pytest.approx(row[COPY], abs=0.3), "the camera does not turn"
        assert row[RECORDED] > row[GROUND] + 5 and row[RECORDED] > row[COPY] + 5
        assert 0.95 < row[VISIBLE] <= 1
    assert found.rows[RECORDED][8] > 30
    text = found.table()
    assert "3 windows" in text and all(kind in text for kind in found.rows)


def test_clips_without_recorded_depth_have_the_other_rows():
    clip = wall_clip()
    bare = replace(clip, codes=None)
    found = warp_quality([bare], FOV, horizons=(1, 8), every=8)
    assert set(found.rows) == {COPY, ROTATION, GROUND}
    whole = warp_quality([clip, bare], FOV, horizons=(1, 8), every=8)
    assert RECORDED not in whole.rows, "the mean would be over other windows"
    assert whole.windows == 2 * found.windows and whole.rows[GROUND][8] == pytest.approx(
        found.rows[GROUND][8]
    )


def test_windows_without_poses_are_left_out():
    clip = wall_clip()
    pose = clip.pose.copy()
    pose[[0, 15]] = np.nan  # windows start at 6, 14, 22 and 30
    found = warp_quality([replace(clip, pose=pose)], FOV, horizons=(1, 8), every=8)
    assert found.windows == 3 and np.isfinite(found.rows[RECORDED][8])
    with pytest.raises(DataError, match="15 frames with poses"):
        warp_quality([replace(clip, pose=np.full_like(pose, np.nan))], FOV, horizons=(1, 8), every=8)


def test_gain_share_by_hand():
    quality = WarpQuality({GROUND: {1: 20.0}, RECORDED: {1: 24.0}, "predicted depth": {1: 22.0}}, 1)
    assert quality.gain_share("predicted depth", 1) == 0.5
    assert quality.gain_share(GROUND, 1) == 0


def test_reading_at_the_identity_changes_nothing():
    pictures = torch.rand(2, 3, 72, 128)
    grid = camera.identity_grid(36, 64).movedim(0, -1).expand(2, 36, 64, 2)
    torch.testing.assert_close(read_source(pictures, grid), pictures, atol=1e-4, rtol=0)


def test_near_is_bright_and_the_sheet_has_a_row_for_each_frame():
    shade = depth_colours(torch.tensor([[1.0, 0.1, 0.0]])).astype(int).sum(-1)[0]
    assert shade[0] > shade[1] > shade[2]
    pictures, inverse = torch.rand(2, 3, 16, 32), torch.rand(2, 8, 16)
    assert depth_sheet(pictures, inverse, inverse).shape == (2 * (32 + 16 + 4), 3 * (64 + 4), 3)
    assert depth_sheet(pictures, inverse).shape[1] == 2 * (64 + 4)
