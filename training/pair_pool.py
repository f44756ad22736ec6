"""The stream of training pairs: of recorded sources (pairs.py) and of generated ones (generated_pairs.py).

Composing a view costs about as much as a training step, so each one is used several times: pairs are made in
rounds, and each round is gone through in several passes.
"""

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.token_files import DataError
from dataset.windows import TokenClips
from model_geometry import GeometryWorldModel, ViewInput
from training.generated_pairs import GENERATED_PAIRS, make_generated_pairs
from training.pairs import (
    NEAREST_GAP,
    SCENE_PAIRS,
    SCENE_SOURCES,
    PairConfig,
    has_no_target,
    join_pairs,
    make_pairs,
)

SCENE_FRAMES = 160  # a scene is so many consecutive frames of a clip
WALK_METRES, WALK_SHARE = 3.0, 0.7  # share of the scenes in which the player must come so far
TRIES = 20  # scenes that are drawn until one is long enough
BAR = {"leave": False, "mininterval": 5}  # of the progress bars


def pair_step(step: int, share: float) -> bool:
    """Whether a step trains on pairs: evenly spread, so that `share` of the steps do."""
    return int((step + 1) * share) > int(step * share)


class PairPool:
    """An endless stream of batches of pairs. Its `position` and `maker` are all that a resumed run needs.

    A round is made from the seed, its number and the weights that the model had then (`maker`), so a resumed
    run continues with the same pairs.
    """

    def __init__(self, model: GeometryWorldModel, clips: TokenClips, config: PairConfig, seed: int):
        """`model` makes the pairs; it should be the one that is used in the end (the average).

        Raises DataError if no clip has poses and is long enough.
        """
        self.model, self.clips, self.config, self.seed = model, clips, config, seed
        self.usable = [
            c
            for c, pose in enumerate(clips.pose)
            if len(pose) > SCENE_SOURCES + NEAREST_GAP and np.isfinite(pose).all()
        ]
        if not self.usable:
            raise DataError(
                f"{clips.directory}: no clip of more than {SCENE_SOURCES + NEAREST_GAP} frames has poses, "
                "but pairs need them; PAIR_SHARE=0 trains on windows alone"
            )
        self.position = {"round": 0, "index": 0}
        self.maker: dict[str, Tensor] | None = None  # the weights that made this round
        self._inputs: ViewInput | None = None
        self._target: Tensor | None = None
        self._order = np.empty(0, int)

    def restore(self, position: dict, maker: dict[str, Tensor] | None = None) -> None:
        """Continues from a saved `position`, whose round was made with the weights `maker`; None: with those
        of now."""
        self.position, self._inputs, self.maker = dict(position), None, maker

    def next(self) -> tuple[ViewInput, Tensor]:
        """The next batch: the network's input, and the recorded tokens [B, H, W]. Samples without a target
        (NO_TARGET) come last."""
        p = self.position
        if self._inputs is None:
            self.make_round(p["round"], self.maker)
        if p["index"] + self.config.batch > len(self._order):
            p.update(round=p["round"] + 1, index=0)
            self.make_round(p["round"])
        device = next(self.model.parameters()).device
        rows = torch.from_numpy(self._order[p["index"] : p["index"] + self.config.batch])
        p["index"] += self.config.batch
        rows = rows[has_no_target(self._target[rows]).int().argsort(stable=True)]
        inputs = {f.name: getattr(self._inputs, f.name)[rows].to(device).float() for f in fields(ViewInput)}
        return ViewInput(**inputs), self._target[rows].to(device).long()

    def make_round(self, number: int, maker: dict[str, Tensor] | None = None) -> None:
        """Makes the pairs of a round and their order, with the weights `maker` or those of now."""
        now = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.maker = now if maker is None else maker
        self.model.load_state_dict(self.maker)
        # Global random state is left alone: a resumed run makes its round at another time.
        device = next(self.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed * 1_000_003 + number)
            rng = np.random.default_rng([self.seed, number, 7])
            generated = round(self.config.generated * self.config.size)
            parts = [
                make_generated_pairs(self.model, self.clips, self.draw_scene, rng, self.config.invented)
                for _ in tqdm(range(-(-generated // GENERATED_PAIRS)), "generated pairs", **BAR)
            ]
            parts += [
                make_pairs(self.model, self.clips, self.draw_scene(rng), self.config, rng)
                for _ in tqdm(range(-(-(self.config.size - generated) // SCENE_PAIRS)), "pairs", **BAR)
            ]
        self.model.load_state_dict(now)
        self._inputs, self._target = join_pairs(parts)
        count = len(self._target)
        self._order = np.concatenate([rng.permutation(count) for _ in range(self.config.passes)])

    def draw_scene(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """(clip, first frame, end) of a scene; of several draws the first in which the player walks enough,
        or, in the other scenes, the first one."""
        walk = rng.random() < WALK_SHARE
        for _ in range(TRIES):
            clip = int(rng.choice(self.usable))
            pose = self.clips.pose[clip]
            start = int(rng.integers(max(1, len(pose) - SCENE_FRAMES)))
            end = min(len(pose), start + SCENE_FRAMES)
            way = pose[start:end, :3]
            if not walk or np.linalg.norm(way - way[0], axis=1).max() >= WALK_METRES:
                break
        return clip, start, end
