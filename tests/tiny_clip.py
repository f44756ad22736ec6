"""A tiny clip in GF-Minecraft's layout, for the tests of starts."""

import json
from pathlib import Path

import numpy as np

from runtime.video import write_video


def make_clip(folder: Path, entries: list[dict] | None, frames: int, fps: float = 16.0) -> Path:
    """A clip of 64x32 pictures in GF-Minecraft's layout; `entries` are its actions from "0" on."""
    rng = np.random.default_rng(1)
    pictures = [np.full((32, 64, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(frames)]
    clip = folder / "video" / "c.mp4"
    write_video(clip, pictures, fps)
    if entries is not None:
        (folder / "metadata").mkdir(exist_ok=True)
        content = {"actions": {str(k): entry for k, entry in enumerate(entries)}}
        (folder / "metadata" / "c.json").write_text(json.dumps(content))
    return clip


def entry(yaw: float = 0.0, ws: int = 0) -> dict:
    return {"ws": ws, "ad": 0, "scs": 0, "pitch_delta": 0.0, "yaw_delta": yaw}
