"""A recording of play: video and actions in GF-Minecraft's layout, which inference.py plays again and
preprocess.py reads."""

from pathlib import Path

import numpy as np

from dataset.actions import to_gamefactory
from dataset.recordings import ClipWriter
from runtime.video import enlarge

SCALE = 4  # pixels of the video for one of the world


class Take:
    """A clip that is being written: `add` each picture, then `finish`."""

    def __init__(self, out: Path, name: str, fps: float):
        self.out, self.name = out, name
        # Hardly lossy: a replay starts from the first frame.
        self.writer = ClipWriter(out, name, fps, crf="10", preset="veryfast")
        self.entries: dict[str, dict] = {}

    def add(self, picture: np.ndarray, action: np.ndarray, pose: np.ndarray) -> None:
        """A picture [H, W, 3] uint8, the action that led to it [5], and from where it is seen [5] (metres,
        degrees; NaN where unknown)."""
        self.writer.write(enlarge(picture, SCALE))
        x, y, z, yaw, pitch = (float(v) for v in np.nan_to_num(pose))
        entry = {**to_gamefactory(action), "yaw": yaw, "pitch": pitch, "pos": [x, y, z]}
        self.entries[str(len(self.entries))] = entry

    def finish(self) -> Path:
        """Ends the clip -> its video."""
        about = {"biome": self.name, "initial_weather": "", "start_time": "", "player": "rollout"}
        self.writer.finish({**about, "actions": self.entries})
        return self.writer.video
