"""Recordings of play: video and actions as a clip in GF-Minecraft's layout.

inference.py replays such a clip, preprocess.py encodes it.
"""

from pathlib import Path

import numpy as np

from dataset.actions import to_gamefactory
from dataset.recordings import ClipWriter
from runtime.video import enlarge

SCALE = 4  # size of a pixel of the world in the video


class PlayRecorder:
    """Writes one clip: `add` each frame, then `finish`.

    Raises OutputError where a file cannot be written; the clip is then dropped.
    """

    def __init__(self, out: Path, name: str, fps: float):
        self.out, self.name = out, name
        # Almost lossless, because a replay starts from the first frame.
        self.writer = ClipWriter(out, name, fps, crf="10", preset="veryfast")
        self.entries: dict[str, dict] = {}

    def add(self, picture: np.ndarray, action: np.ndarray, pose: np.ndarray) -> None:
        """Adds a picture [H, W, 3] uint8, the action [5] that led to it, and its pose [5] (metres, degrees;
        NaN, written as 0, where unknown)."""
        try:
            self.writer.write(enlarge(picture, SCALE))
        except BaseException:
            self.writer.discard()
            raise
        x, y, z, yaw, pitch = (float(v) for v in np.nan_to_num(pose))
        entry = {**to_gamefactory(action), "yaw": yaw, "pitch": pitch, "pos": [x, y, z]}
        self.entries[str(len(self.entries))] = entry

    def finish(self) -> Path:
        """Completes the clip and returns the path of its video."""
        about = {"biome": self.name, "initial_weather": "", "start_time": "", "player": "rollout"}
        self.writer.finish({**about, "actions": self.entries})
        return self.writer.video
