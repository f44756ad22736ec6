"""A world model under evaluation: rolls it out in batches."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dataset.token_files import MANIFEST, DataError
from dataset.windows import TokenClips
from evaluation.plan import BATCH
from rollout.rollout import Rollout
from rollout.sampling import SamplingConfig
from rollout.world_model import WorldModel, load_world_model
from vq_vae.tokenizer import Tokenizer


@dataclass
class EvaluatedModel:
    """A world model with its checkpoint and sampling."""

    name: str  # unique among the models of a run
    path: Path
    model: WorldModel
    content: dict  # of the checkpoint
    sampling: SamplingConfig
    seed: int
    dtype: torch.dtype
    # First window of a batch -> (context, rollout primed on it).
    primed: dict[int, tuple[tuple[Tensor, ...], Rollout]] = field(default_factory=dict)

    def rollout(self, context: Tensor, actions: Tensor, pose: Tensor, description: str) -> Tensor:
        """The K frames that follow a context of C frames: tokens [N, K, H, W] int64 on the CPU.

        context [N, C, H, W]; actions [N, C-1+K, 5], those between the context's frames first; pose [N, C, 5]
        of the context, NaN where unknown. `description` is shown in the progress bar.
        """
        given, batches = context.shape[1], []
        total = len(context) * (actions.shape[1] - given + 1)
        with tqdm(total=total, desc=f"{self.name}: {description}", unit="frame", leave=False) as bar:
            for first in range(0, len(context), BATCH):
                batch = slice(first, first + BATCH)
                rollout = self.primed_rollout(first, context[batch], actions[batch, : given - 1], pose[batch])
                frames = []
                for t in range(given - 1, actions.shape[1]):
                    frames.append(rollout.step(actions[batch, t]).cpu())
                    bar.update(len(frames[-1]))
                batches.append(torch.stack(frames, 1))
        return torch.cat(batches)

    def primed_rollout(self, first: int, *context: Tensor) -> Rollout:
        """A rollout of the batch that begins at window `first`, primed on `context` (see `Rollout.prime`).

        The last one of each batch is kept, because a section rolls out the same context under one command
        after another.
        """
        kept, rollout = self.primed.get(first, ((), None))
        if len(kept) != len(context) or not all(map(equal, kept, context)):
            rollout = Rollout(self.model, self.sampling, self.seed + first, self.dtype)
            rollout.prime(*context)
            self.primed[first] = context, rollout
        return rollout.copy()


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def load_model(
    name: str,
    path: Path,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    seed: int,
    dtype: torch.dtype,
    depth_ckpt: Path,
) -> EvaluatedModel:
    """The world model in `path`, on the tokenizer's device, with the depth network in `depth_ckpt`.

    Raises CheckpointError.
    """
    model, content = load_world_model(path, tokenizer, tokenizer.device, depth_ckpt)
    return EvaluatedModel(name, path, model, content, sampling, seed, dtype)


def check_rates(model: EvaluatedModel, clips: TokenClips) -> None:
    """Raises DataError unless the model was trained at the frame rate and camera scale of the tokens."""
    for name in ("fps", "camera_degrees_per_unit"):
        trained, found = (model.content.get("data") or {}).get(name), getattr(clips.manifest, name)
        if trained is not None and trained != found:
            raise DataError(
                f"{clips.directory / MANIFEST}: {name} is {found:g}, {model.path} was trained at "
                f"{trained:g}, so the actions differ in meaning; give tokens made like its training data"
            )
