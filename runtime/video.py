"""Pictures and videos: decoding clips in order, writing videos that browsers play, contact sheets."""

import math
import os
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from runtime.errors import UserError, one_line
from runtime.outputs import commit, open_part, output_error, replacing, write_bytes

RESIZE = {"area": cv2.INTER_AREA, "bicubic": cv2.INTER_CUBIC}
CODECS = {
    ".mp4": ("libx264", {"crf": "18", "preset": "medium"}),
    ".webm": ("libvpx-vp9", {"crf": "24", "b": "0"}),
}
GIF_COLOURS, GIF_SAMPLE = 256, 1_000_000  # palette size; number of pixels it is computed from
GIF_TICK, GIF_MIN = 10, 20  # ms: unit of durations; shortest duration that players do not slow down
SHEET_CELLS, SHEET_HEIGHT = 24, 144  # of a contact sheet: number of pictures, their height in pixels


class VideoError(UserError):
    """A video that is missing, cannot be decoded, or cannot be written."""


class ShortVideoError(VideoError):
    """A video with fewer frames than needed."""


@contextmanager
def _opened(path: str | Path) -> Iterator[cv2.VideoCapture]:
    """An open video, closed at the end of the `with` block. Raises VideoError if it cannot be opened."""
    if not Path(path).is_file():
        raise VideoError(f"{path}: no such video")
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise VideoError(f"{path}: cannot be opened as a video; it may be truncated")
        yield capture
    finally:
        capture.release()


def read_frames(
    path: str | Path, wanted: Sequence[int] | None = None, at_least: int = 1
) -> Iterator[np.ndarray]:
    """Yields the frames of a video in order, [H, W, 3] uint8 RGB. Frames are decoded in order: seeking is
    slow.

    With `wanted` (increasing frame indices) yields only those. Decoding stops after the last of them, but
    not before `at_least` frames. Raises VideoError if the file is missing or has no decodable frame,
    ShortVideoError if it has fewer than `at_least` frames or lacks one of `wanted`.
    """
    needed = at_least if wanted is None else max(at_least, wanted[-1] + 1)
    pending = None if wanted is None else iter([*wanted, -1])
    following = 0 if pending is None else next(pending)
    with _opened(path) as capture:
        number = 0
        while (wanted is None or number < needed) and capture.grab():
            if number == following:
                yield cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
                following = number + 1 if pending is None else next(pending)
            number += 1
    if not number:
        raise VideoError(f"{path}: no frame could be decoded; it may be truncated")
    if number < needed:
        raise ShortVideoError(f"{path}: {number} frames can be decoded, {needed} are needed")


def count_frames(path: str | Path) -> int:
    """The number of frames that can be decoded; a header may state more. Raises VideoError like
    `read_frames`.
    """
    with _opened(path) as capture:
        number = 0
        while capture.grab():
            number += 1
        return number


def video_fps(path: str | Path) -> float:
    """Frames per second by the video's header; 0.0 if it has none.

    Raises VideoError if the file is missing or cannot be opened.
    """
    with _opened(path) as capture:
        return max(0.0, capture.get(cv2.CAP_PROP_FPS))


def header_frames(path: str | Path) -> int:
    """The number of frames by the video's header; 0 if it has none. Raises VideoError like `video_fps`."""
    with _opened(path) as capture:
        return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))


def has_frame(path: str | Path, number: int) -> bool:
    """True if frame `number` can be decoded. Seeking takes about a quarter of a second.

    Raises VideoError like `video_fps`.
    """
    with _opened(path) as capture:
        return bool(capture.set(cv2.CAP_PROP_POS_FRAMES, number) and capture.grab())


def resize(frame: np.ndarray, height: int, width: int, method: str = "area") -> np.ndarray:
    """[H, W, 3] -> [height, width, 3]; `method` is "area" or "bicubic". A frame of that size is returned
    unchanged."""
    if frame.shape[:2] == (height, width):
        return frame
    return cv2.resize(frame, (width, height), interpolation=RESIZE[method])


def enlarge(frame: np.ndarray, scale: int) -> np.ndarray:
    """[H, W, 3] -> [H*scale, W*scale, 3] with sharp pixels."""
    return np.repeat(np.repeat(frame, scale, 0), scale, 1)


def check_ending(path: str | Path, endings: Collection[str] = (*CODECS, ".gif")) -> None:
    """Raises VideoError unless `write_video` supports the ending. Call it before a long rollout."""
    ending = Path(path).suffix
    if ending not in endings:
        *others, last = endings
        raise VideoError(
            f"{path}: cannot write {ending or 'a file without an ending'}; use {', '.join(others)} or {last}"
        )


class _Sink:
    """The file that PyAV writes a video to, which never fails: PyAV ends the interpreter if it is to close a
    video whose header could not be written. After an error the rest is dropped; `error` keeps it.
    """

    def __init__(self, path: Path):
        self.file = open(path, "wb", buffering=0)
        self.name = path.name  # PyAV chooses the format by the ending
        self.position = self.end = 0
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        view = memoryview(content)
        while len(view) and self.error is None:
            try:
                view = view[self.file.write(view) :]  # the system may take only a part
            except OSError as error:
                self.error = error
        self.position += len(content)
        self.end = max(self.end, self.position)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.end}[whence]
        if self.error is None:
            self.file.seek(self.position)
        return self.position

    def tell(self) -> int:
        return self.position


class VideoWriter:
    """Writes a video frame by frame, .mp4 (H.264) or .webm (VP9), which browsers play.

    The video has its name only once it is complete: after `close`, or at the end of a `with` block. An
    exception in the block, or `discard`, leaves a file of that name as it was. `options` override those of
    CODECS. Raises VideoError for another ending, or an odd width or height; OutputError if the file cannot be
    written.
    """

    def __init__(self, path: str | Path, fps: float, **options: str):
        self.path = Path(path)
        check_ending(path, CODECS)
        codec, usual = CODECS[self.path.suffix]
        self.part, self.target = open_part(path)
        try:
            self.sink = _Sink(self.part)
        except OSError as error:
            raise output_error(path, error) from None
        self.container = av.open(self.sink, "w", format=self.path.suffix.removeprefix("."))
        rate = Fraction(fps).limit_denominator(1000)
        self.stream = self.container.add_stream(codec, rate=rate, options={**usual, **options})
        self.stream.pix_fmt = "yuv420p"
        self.size: tuple[int, int] | None = None  # height, width
        self.frames = 0  # written so far
        self.closed = False

    def write(self, frame: np.ndarray) -> None:
        """Adds a frame, [H, W, 3] uint8 RGB."""
        if self.size is None:
            height, width = frame.shape[:2]
            if height % 2 or width % 2:
                raise VideoError(f"{self.path}: frames are {width}x{height}; width and height must be even")
            self.size = height, width
            self.stream.width, self.stream.height = width, height
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        self.container.mux(self.stream.encode(picture))
        self._check()
        self.frames += 1

    def _check(self) -> None:
        """Raises OutputError if the file could not be written."""
        if self.sink.error is not None:
            raise output_error(self.path, self.sink.error)

    def close(self) -> None:
        """Completes the video and gives it its name. A second call does nothing.

        Raises OutputError, or VideoError if it has no frame.
        """
        if self.closed:
            return
        try:
            if not self.frames:
                raise VideoError(f"{self.path}: no frame to write")
            self.container.mux(self.stream.encode())
            self.container.close()
            self._check()
            commit(self.part, self.target)
        except OSError as error:
            raise output_error(self.path, error) from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Drops what has no name yet. A second call does nothing."""
        if self.closed:
            return
        self.closed = True
        with suppress(av.FFmpegError):
            self.container.close()
        self.sink.file.close()
        self.part.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes [H, W, 3] uint8 RGB frames as a video, see VideoWriter, or as a .gif."""
    if Path(path).suffix == ".gif":
        return write_gif(path, frames, fps)
    with VideoWriter(path, fps) as video:
        for frame in frames:
            video.write(frame)


def write_gif(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes [H, W, 3] uint8 RGB frames as a GIF that repeats, with one palette for all frames.

    Durations in a GIF are hundredths of a second. They vary by one, so that the total is right (16 frames/s,
    62.5 ms: 60, 70, 60, 60 ms). Equal frames in a row become one longer frame. The rate is limited to 50
    frames/s.
    """
    compressed, shape = [], (0, 0, 3)
    for frame in frames:
        shape = frame.shape
        compressed.append(
            zlib.compress(np.ascontiguousarray(frame), 1)
        )  # uncompressed they may fill the memory
    if not compressed:
        raise VideoError(f"{path}: no frame to write")

    def picture(n: int) -> np.ndarray:
        return np.frombuffer(zlib.decompress(compressed[n]), np.uint8).reshape(shape)

    # One palette: with one per frame, constant colours would change from frame to frame.
    step = math.ceil(math.sqrt(len(compressed) * shape[0] * shape[1] / GIF_SAMPLE))
    together = Image.fromarray(np.concatenate([picture(n)[::step, ::step] for n in range(len(compressed))]))
    palette = together.quantize(GIF_COLOURS, dither=Image.Dither.NONE)
    duration = max(1000 / fps, GIF_MIN)
    ends = [int(duration * (n + 1) / GIF_TICK + 0.5) * GIF_TICK for n in range(len(compressed))]
    durations = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    quantized = (
        Image.fromarray(picture(n)).quantize(palette=palette, dither=Image.Dither.NONE)
        for n in range(len(compressed))
    )
    with replacing(path) as part:
        # disposal 1: only changed pixels are stored.
        next(quantized).save(
            part, save_all=True, append_images=quantized, duration=durations, loop=0, disposal=1
        )


def label(frame: np.ndarray, text: str) -> np.ndarray:
    """The frame under a strip of 16 pixels with `text`."""
    strip = np.zeros((16, frame.shape[1], 3), np.uint8)
    cv2.putText(strip, text, (3, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([strip, frame])


def grid(frames: list[np.ndarray], columns: int) -> np.ndarray:
    """Frames of one size [H, W, 3] in rows of `columns`, left to right; missing frames are black."""
    blank = np.zeros_like(frames[0])
    padded = frames + [blank] * (-len(frames) % columns)
    rows = [np.concatenate(padded[i : i + columns], 1) for i in range(0, len(padded), columns)]
    return np.concatenate(rows)


def spread(count: int, most: int = SHEET_CELLS) -> list[int]:
    """At most `most` of the numbers 0..count-1, evenly spaced, including the first and last."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


def contact_sheet(frames: list[np.ndarray], captions: list[str], cells: int = SHEET_CELLS) -> np.ndarray:
    """At most `cells` of the frames [H, W, 3], evenly spaced, with captions, in rows of 1,500 pixels."""
    selected = spread(len(frames), cells)
    scale = max(1, round(SHEET_HEIGHT / frames[0].shape[0]))
    pictures = [label(enlarge(frames[i], scale), captions[i]) for i in selected]
    return grid(pictures, min(len(pictures), max(1, 1536 // pictures[0].shape[1])))


def save_image(path: str | Path, image: np.ndarray) -> None:
    """Writes an [H, W, 3] uint8 RGB picture in the format of the ending (.png, .jpg).

    Raises VideoError for another ending, OutputError if the file cannot be written.
    """
    try:
        encoded = cv2.imencode(Path(path).suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    except cv2.error:
        raise VideoError(f"{path}: cannot write a picture with this ending; use .png or .jpg") from None
    write_bytes(path, encoded.tobytes())


def read_image(path: str | Path) -> np.ndarray:
    """[H, W, 3] uint8 RGB. Raises VideoError if the file is missing or not a picture."""
    if not Path(path).is_file():
        raise VideoError(f"{path}: no such picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Image.open(path).close()  # reads the header; raises for more than 90 million pixels
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except Exception as error:  # a damaged picture can fail in any way
        raise VideoError(f"{path}: not a picture that can be read ({one_line(error)}); use another") from None
    if image is None:
        raise VideoError(f"{path}: not a picture that can be read; use another")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def to_uint8(pictures: Tensor) -> Tensor:
    """[B, 3, Hp, Wp] in [0, 1] -> [B, Hp, Wp, 3] uint8 on the CPU."""
    return pictures.float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()


def to_float(pictures: Tensor) -> Tensor:
    """[B, Hp, Wp, 3] uint8 -> [B, 3, Hp, Wp] float32 in [0, 1], channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float().div(255)
