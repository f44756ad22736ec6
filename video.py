"""Pictures in and out: decoding clips in order, writing videos that a browser plays, contact sheets."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

RESIZE = {"area": cv2.INTER_AREA, "bicubic": cv2.INTER_CUBIC}
CODECS = {
    ".mp4": ("libx264", {"crf": "18", "preset": "medium"}),
    ".webm": ("libvpx-vp9", {"crf": "24", "b": "0"}),
}


class VideoError(RuntimeError):
    """A video that is missing, cannot be decoded, or cannot be written."""


def read_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Yields the frames of a video in order, [H, W, 3] uint8 RGB. Seeking is slow: decode once, in order.

    Raises VideoError if the file is missing or no frame of it can be decoded.
    """
    if not Path(path).is_file():
        raise VideoError(f"{path}: no such video")
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise VideoError(f"{path}: cannot be opened as a video; it may be truncated")
        decoded = 0
        while True:
            ok, frame = capture.read()
            if not ok:
                break
            decoded += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if not decoded:
            raise VideoError(f"{path}: not one frame could be decoded; it may be truncated")
    finally:
        capture.release()


def resize(frame: np.ndarray, height: int, width: int, method: str = "area") -> np.ndarray:
    """[H, W, 3] -> [height, width, 3]; `method` is "area" or "bicubic". A frame of that size is returned as it is."""
    if frame.shape[:2] == (height, width):
        return frame
    return cv2.resize(frame, (width, height), interpolation=RESIZE[method])


def enlarge(frame: np.ndarray, scale: int) -> np.ndarray:
    """[H, W, 3] -> [H*scale, W*scale, 3] with sharp pixels."""
    return np.repeat(np.repeat(frame, scale, 0), scale, 1)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes [H, W, 3] uint8 RGB frames as .mp4 (H.264) or .webm (VP9), both played by any browser.

    Sides must be even. Raises VideoError for another ending or a size that the codec refuses.
    """
    path = Path(path)
    if path.suffix not in CODECS:
        raise VideoError(
            f"{path}: cannot write {path.suffix or 'a file without an ending'}; use {' or '.join(CODECS)}"
        )
    codec, options = CODECS[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            height, width = frame.shape[:2]
            if height % 2 or width % 2:
                raise VideoError(f"{path}: frames are {width}x{height}; both sides must be even")
            if number == 0:
                stream.width, stream.height = width, height
            for packet in stream.encode(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            ):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def label(frame: np.ndarray, text: str) -> np.ndarray:
    """The frame under a strip of 16 pixels that bears `text`."""
    strip = np.zeros((16, frame.shape[1], 3), np.uint8)
    cv2.putText(strip, text, (3, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([strip, frame])


def grid(frames: list[np.ndarray], columns: int) -> np.ndarray:
    """Frames of one size [H, W, 3] in rows of `columns`, left to right; empty places are black."""
    blank = np.zeros_like(frames[0])
    padded = frames + [blank] * (-len(frames) % columns)
    rows = [np.concatenate(padded[i : i + columns], 1) for i in range(0, len(padded), columns)]
    return np.concatenate(rows)


def save_image(path: str | Path, image: np.ndarray) -> None:
    """Writes an [H, W, 3] uint8 RGB picture; the ending (.png, .jpg) chooses the format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
        raise VideoError(f"{path}: could not be written; use .png or .jpg")


def read_image(path: str | Path) -> np.ndarray:
    """[H, W, 3] uint8 RGB. Raises VideoError if the file is missing or not a picture."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise VideoError(f"{path}: not a picture that can be read")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
