"""Training pairs: a recorded frame, and the view of it composed from earlier frames of the same clip.

At play a view is composed from keyframes that may be 100 frames old, three times magnified and half missing.
Windows of consecutive frames show nothing like it; pairs do, and need no backpropagation through time.
Composing a view costs about as much as a training step, so each one is used several times: pairs are made in
rounds, and each round is gone through in several passes.
"""

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.surroundings import FARTHEST, decode_inverse_ray_distance
from dataset.token_files import DataError
from dataset.windows import TokenClips
from geometry import camera
from geometry.keyframes import GENERATED_PENALTY, RESAMPLED_PENALTY
from geometry.motion import displacement_between
from geometry.warping import SourceFrames, compose_view
from model_geometry import GENERATION_MAX, GeometryWorldModel, ViewInput
from training.window_parts import CLEAN_SHARE, SIMILAR_COUNT, corrupt_tokens

SCENE_FRAMES = 160  # a scene is so many consecutive frames of a clip
SCENE_SOURCES, SCENE_PAIRS = 12, 24  # frames of a scene that serve as sources, and pairs made of them
NEAREST_GAP, FARTHEST_GAP = 8, 128  # frames from the first source to the view: up to the first in half of the
NEAR_SHARE = 0.5  # ... pairs, and in the others up to the second, on a logarithmic scale
WALK_METRES, WALK_SHARE = 3.0, 0.7  # share of the scenes in which the player must come so far
TRIES = 20  # scenes that are drawn until one is long enough


def pair_step(step: int, share: float) -> bool:
    """Whether a step trains on pairs: evenly spread, so that `share` of the steps do."""
    return int((step + 1) * share) > int(step * share)


class PairPool:
    """An endless stream of batches of pairs. Its `position` is all that a resumed run needs.

    A round is made from (seed, round) alone, so a resumed run continues with the same pairs.
    """

    def __init__(
        self,
        model: GeometryWorldModel,
        clips: TokenClips,
        batch: int,
        size: int,
        passes: int,
        recorded_depth: float,
        token_noise: float,
        similar_share: float,
        seed: int,
    ):
        """`size`: pairs of a round; `passes`: how often each is used. `recorded_depth`: share of the scenes
        warped by recorded depth, where there is any, instead of predicted depth. Raises DataError if no clip
        has poses and is long enough."""
        self.model, self.clips, self.batch, self.size, self.passes = model, clips, batch, size, passes
        self.recorded_depth, self.token_noise, self.similar_share = recorded_depth, token_noise, similar_share
        self.similar = model.code_space.similar_codes(SIMILAR_COUNT)
        self.seed = seed
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
        self._inputs: ViewInput | None = None
        self._target: Tensor | None = None
        self._order = np.empty(0, int)

    def restore(self, position: dict) -> None:
        """Continues from a saved `position`."""
        self.position, self._inputs = dict(position), None

    def next(self) -> tuple[ViewInput, Tensor]:
        """The next batch: the network's input, and the recorded tokens [B, H, W]."""
        p = self.position
        if self._inputs is None:
            self.make_round(p["round"])
        if p["index"] + self.batch > len(self._order):
            p.update(round=p["round"] + 1, index=0)
            self.make_round(p["round"])
        device = next(self.model.parameters()).device
        rows = torch.from_numpy(self._order[p["index"] : p["index"] + self.batch])
        p["index"] += self.batch
        inputs = {f.name: getattr(self._inputs, f.name)[rows].to(device).float() for f in fields(ViewInput)}
        return ViewInput(**inputs), self._target[rows].to(device).long()

    def make_round(self, number: int) -> None:
        """Makes the pairs of a round and their order."""
        # Global random state is left alone: a resumed run makes its round at another time.
        device = next(self.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed * 1_000_003 + number)
            rng = np.random.default_rng([self.seed, number, 7])
            parts = [
                make_pairs(self.model, self.clips, self.draw_scene(rng), self, rng)
                for _ in tqdm(range(-(-self.size // SCENE_PAIRS)), desc="pairs", leave=False, mininterval=5)
            ]
        self._inputs = ViewInput(
            **{f.name: torch.cat([getattr(part[0], f.name) for part in parts]) for f in fields(ViewInput)}
        )
        self._target = torch.cat([part[1] for part in parts])
        count = len(self._target)
        self._order = np.concatenate([rng.permutation(count) for _ in range(self.passes)])

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


@torch.no_grad()
def make_pairs(
    model: GeometryWorldModel,
    clips: TokenClips,
    scene: tuple[int, int, int],
    pool: PairPool,
    rng: np.random.Generator,
) -> tuple[ViewInput, Tensor]:
    """SCENE_PAIRS pairs of a scene (clip, start, end), in half precision on the CPU: inputs and targets.

    Each view is composed from 1 to 1 + `config.sources` frames before it. The first one takes the place of
    the last frame of a rollout, the others that of the keyframes.
    """
    clip, start, end = scene
    device, g, K = next(model.parameters()).device, model.config, 1 + model.config.sources
    count = min(SCENE_SOURCES, end - start - 1)
    frames = start + np.sort(rng.choice(end - start - 1, count, replace=False))
    # Which sources, and which frame, for each pair.
    chosen, targets = np.zeros((SCENE_PAIRS, K), int), np.zeros(SCENE_PAIRS, int)
    usable = np.zeros((SCENE_PAIRS, K), bool)
    for i in range(SCENE_PAIRS):
        first = int(rng.integers(count))
        if rng.random() < NEAR_SHARE:
            gap = int(rng.integers(1, NEAREST_GAP + 1))
        else:
            gap = round(NEAREST_GAP * (FARTHEST_GAP / NEAREST_GAP) ** rng.random())
        targets[i] = min(frames[first] + gap, end - 1)
        others = [k for k in range(count) if frames[k] < targets[i] and k != first]
        others = rng.permutation(others)[: int(rng.integers(K))].astype(int)
        chosen[i, 0], chosen[i, 1 : 1 + len(others)] = first, others
        usable[i, : 1 + len(others)] = True

    tokens = torch.from_numpy(clips.tokens[clip][frames].astype(np.int64)).to(device)
    given, level = corrupt_tokens(
        tokens[:, None], g.codebook_size, pool.token_noise, CLEAN_SHARE, pool.similar, pool.similar_share
    )
    given = given[:, 0]
    pictures = model.tokenizer.decode(given)
    pose = torch.from_numpy(clips.pose[clip][np.r_[frames, targets, targets - 1]]).double()
    pose = camera.relative_to(pose, pose[:1]).float().to(device)
    pose, pose_to, before = pose.split([count, SCENE_PAIRS, SCENE_PAIRS])
    recorded = clips.extras["depth"][clip] if "depth" in clips.extras else None
    if recorded is not None and rng.random() < pool.recorded_depth:
        inverse = torch.from_numpy(decode_inverse_ray_distance(recorded[frames])).to(device)
        inverse = inverse.clamp(min=1 / FARTHEST)
    else:
        inverse = model.predict_depth(pictures, pose[:, 4])

    index = torch.from_numpy(chosen).to(device).flatten()
    sources = SourceFrames(pictures[index].float(), given[index], inverse[index], pose[index])
    # Some first sources count as generated, so that the network sees both.
    generation = torch.from_numpy(rng.integers(0, 3, (SCENE_PAIRS, K)) * (rng.random((SCENE_PAIRS, 1)) < 0.5))
    generation = generation.float().to(device)
    penalty = GENERATED_PENALTY * generation
    penalty[:, 0] = RESAMPLED_PENALTY * (generation[:, 0] > 0)
    view = compose_view(
        sources,
        torch.from_numpy(usable).to(device),
        penalty,
        pose_to,
        model.ground(pose_to),
        g.vertical_fov_degrees,
    )
    cells = generation[:, :, None, None].expand(-1, -1, *view.source.shape[1:])
    inputs = model.encode_view(
        view,
        cells.gather(1, view.source[:, None])[:, 0].clamp(max=GENERATION_MAX),
        pose_to,
        torch.from_numpy(clips.actions[clip][targets - 1]).float().to(device),
        displacement_between(before, pose_to),
        generation[:, 0] == 0,
        level[index.view(SCENE_PAIRS, K)[:, 0]],
    )
    target = torch.from_numpy(clips.tokens[clip][targets].astype(np.int16))
    half = {f.name: getattr(inputs, f.name).half().cpu() for f in fields(ViewInput)}
    return ViewInput(**half), target
