"""Reading and writing videos, GIFs and contact sheets, and refusal of other files."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from runtime import video
from runtime.video import (
    ShortVideoError,
    VideoError,
    VideoWriter,
    check_ending,
    count_frames,
    read_frames,
    video_fps,
    write_video,
)

LEVELS = range(10, 250, 12)  # 20 frames, each of its own grey


def greys(height=32, width=64) -> list[np.ndarray]:
    return [np.full((height, width, 3), level, np.uint8) for level in LEVELS]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, greys(), 16)
    return path


@pytest.mark.parametrize("ending", [".mp4", ".webm"])
def test_frames_come_back_in_order(tmp_path, ending):
    path = tmp_path / f"clip{ending}"
    write_video(path, greys(), 16)
    frames = list(read_frames(path))
    assert frames[0].shape == (32, 64, 3) and frames[0].dtype == np.uint8
    np.testing.assert_allclose([f.mean() for f in frames], LEVELS, atol=2)
    assert video_fps(path) == pytest.approx(16)
    assert count_frames(path) == len(LEVELS)


def test_colours_are_rgb(tmp_path):
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    write_video(tmp_path / "red.mp4", [red] * 3, 16)
    assert next(read_frames(tmp_path / "red.mp4"))[16, 16].argmax() == 0
    video.save_image(tmp_path / "red.png", red)
    np.testing.assert_array_equal(video.read_image(tmp_path / "red.png"), red)


def test_only_the_wanted_frames_are_returned(clip):
    chosen = [0, 3, 4, 11]
    means = [frame.mean() for frame in read_frames(clip, wanted=chosen)]
    np.testing.assert_allclose(means, [LEVELS[i] for i in chosen], atol=2)
    assert len(list(read_frames(clip, wanted=[5], at_least=20))) == 1


@pytest.mark.parametrize("asked", [{"wanted": [2, 20]}, {"at_least": 21}, {"wanted": [0], "at_least": 21}])
def test_a_video_that_is_too_short_is_refused(clip, asked):
    with pytest.raises(ShortVideoError, match="20 frames can be decoded, 21 are needed"):
        list(read_frames(clip, **asked))


def test_files_that_are_not_videos_are_refused(clip, tmp_path):
    truncated, text = tmp_path / "truncated.mp4", tmp_path / "text.mp4"
    truncated.write_bytes(clip.read_bytes()[:-300])
    text.write_text("not a video")
    for path in (truncated, text):
        for reader in (lambda p: list(read_frames(p)), count_frames, video_fps):
            with pytest.raises(VideoError, match=f"{path.name}: .*truncated"):
                reader(path)
    with pytest.raises(VideoError, match="no such video"):
        next(read_frames(tmp_path / "none.mp4"))


def test_odd_sizes_and_unknown_endings_are_refused(tmp_path):
    with pytest.raises(VideoError, match="63x32; width and height must be even"):
        write_video(tmp_path / "odd.mp4", greys(32, 63), 16)
    with pytest.raises(VideoError, match=r"cannot write \.avi; use \.mp4, \.webm or \.gif"):
        check_ending(tmp_path / "clip.avi")
    with pytest.raises(VideoError, match=r"cannot write \.gif; use \.mp4 or \.webm"):
        VideoWriter(tmp_path / "clip.gif", 16)


def test_gif_durations_sum_to_the_frame_rate(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 4, (18, 32, 3)).astype(np.uint8) * 80 for _ in range(16)]  # 64 colours
    write_video(tmp_path / "a" / "clip.gif", frames, 16)
    with Image.open(tmp_path / "a" / "clip.gif") as gif:
        assert gif.n_frames == 16 and gif.info["loop"] == 0
        durations = []
        for n, frame in enumerate(frames):
            gif.seek(n)
            durations.append(gif.info["duration"])
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - frame).max() <= 4
    assert durations == [60, 70, 60, 60] * 4  # 62.5 ms each


def test_gif_merges_equal_frames_and_limits_the_rate(tmp_path):
    def lasts(frames: list[np.ndarray], fps: float) -> list[int]:
        write_video(tmp_path / "clip.gif", iter(frames), fps)
        with Image.open(tmp_path / "clip.gif") as gif:
            return [gif.info["duration"] for n in range(gif.n_frames) if gif.seek(n) is None]

    dark, light = greys()[0], greys()[-1]
    assert lasts([dark, dark, dark, light, dark], 10) == [300, 100, 100]
    assert lasts([dark, light] * 3, 1000) == [20] * 6
    with pytest.raises(VideoError, match="no frame"):
        lasts([], 10)


def test_all_gif_frames_share_one_palette(tmp_path):
    """The palette includes rare colours, and constant pixels keep their colour."""
    frames = greys()
    for frame in frames:
        frame[:4] = (200, 30, 30)
    write_video(tmp_path / "clip.gif", frames, 16)
    with Image.open(tmp_path / "clip.gif") as gif:
        for n, level in enumerate(LEVELS):
            gif.seek(n)
            shown = np.asarray(gif.convert("RGB")).astype(int)
            assert np.abs(shown[4:] - level).max() <= 8 and np.abs(shown[:4] - (200, 30, 30)).max() <= 8


def test_area_resize_averages_and_equal_sizes_are_unchanged():
    picture = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    means = picture.reshape(4, 2, 8, 2, 3).mean((1, 3))
    np.testing.assert_allclose(video.resize(picture, 4, 8, "area"), means, atol=0.51)
    assert (video.resize(picture, 4, 8, "bicubic") != video.resize(picture, 4, 8, "area")).any()
    assert video.resize(picture, 8, 16) is picture


@pytest.mark.parametrize("count", [1, 5, 24, 25, 161])
def test_spread_indices_include_the_first_and_last(count):
    chosen = video.spread(count, 24)
    assert chosen[0] == 0 and chosen[-1] == count - 1 and len(chosen) == min(count, 24)
    assert len(set(np.diff(chosen))) <= 2  # evenly, but for rounding


def test_grid_fills_rows_and_pads_with_black():
    sheet = video.grid(greys(2, 4)[:3], columns=2)
    assert sheet.shape == (4, 8, 3)
    assert sheet[0, 0, 0] == LEVELS[0] and sheet[0, 4, 0] == LEVELS[1] and sheet[2, 0, 0] == LEVELS[2]
    assert (sheet[2:, 4:] == 0).all()


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(VideoError, match="a.png: not a picture that can be read .*exceeds limit"):
        video.read_image(tmp_path / "a.png")
