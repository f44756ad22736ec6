"""The pictures that the tokenizer is trained on, and its validation on those that are held out."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.token_files import DataError
from metrics import code_usage, frechet_distance, grid_energy, psnr, spatial_gradient
from metrics.perceptual import EffNetDistance
from runtime.arrays import ArraysError, read_arrays
from runtime.device import autocast
from runtime.video import grid, to_float, to_uint8
from vq_vae.vq_vae import VQVAE

INFLATION = 64  # the arrays of a picture file, which is written uncompressed, take at most so much more


def load_pictures(path: str, height: int, width: int) -> dict[str, np.ndarray]:
    """The arrays `train` and `val` [N, height, width, 3] uint8 of a picture file; `val` may be empty.

    Raises DataError if the file is missing or broken, or has pictures of another size.
    """
    try:
        most = INFLATION * Path(path).stat().st_size
        pictures = read_arrays(path, ("train", "val"), most_bytes=most)
    except FileNotFoundError:
        raise DataError(
            f"PICTURES={path}: no such file; make it: python vq_vae/preprocess_vqvae.py CLIPS {path} "
            "(seconds with CLIPS = samples)"
        ) from None
    except (OSError, ArraysError) as error:
        raise DataError(f"PICTURES={path}: {error}; make it with vq_vae/preprocess_vqvae.py") from None
    for split, array in pictures.items():
        enough = len(array) or split == "val"
        if array.shape[1:] != (height, width, 3) or not enough or array.dtype != np.uint8:
            raise DataError(
                f"PICTURES={path}: {split} is {array.dtype} {list(array.shape)}, expected uint8 "
                f"[N > 0, {height}, {width}, 3]; "
                "sample again with other --height, --width or --val_fraction"
            )
    return pictures


def held_out_pictures(pictures: np.ndarray, count: int, path: str) -> np.ndarray:
    """At most `count` of the pictures `val` of the file `path`, evenly spaced; warns if there are none."""
    count = min(count, len(pictures))
    if not count:
        print(
            f"warning: PICTURES={path}: no picture is held out; training without validation, and best.pt is "
            "the newest weights: record more, or give preprocess_vqvae.py another --val_fraction",
            file=sys.stderr,
        )
    return pictures[np.linspace(0, len(pictures) - 1, count).astype(int)]


def random_batch(pictures: np.ndarray, size: int, flip: bool, rng: np.random.Generator) -> Tensor:
    """`size` random pictures -> [B, H, W, 3] uint8; with `flip`, half of them mirrored left-right."""
    batch = torch.from_numpy(pictures[np.sort(rng.integers(0, len(pictures), size))])
    if flip:
        mirrored = torch.from_numpy(rng.random(size) < 0.5)
        batch = torch.where(mirrored[:, None, None, None], batch.flip(2), batch)
    return batch


@torch.no_grad()
def validate(
    model: VQVAE, distance: torch.nn.Module, pictures: np.ndarray, batch_size: int, dtype: torch.dtype
) -> tuple[dict[str, float], np.ndarray]:
    """Metrics over held-out pictures, and a picture of up to 8 originals above their reconstructions.

    `val_gradient` and `val_grid_energy` are over those of the originals (`metrics.spatial_gradient`,
    `metrics.grid_energy`). `val_frechet`, the Fréchet distance of both sets of pictures, only where
    `distance` is that of EffNet-Lite0.
    """
    device, codes = next(model.parameters()).device, model.config.codebook_size
    training = model.training
    model.eval()
    values: dict[str, list[Tensor]] = {}
    embeddings: tuple[list[Tensor], list[Tensor]] = ([], [])
    pairs = []
    counts = torch.zeros(codes, dtype=torch.long, device=device)
    for i in range(0, len(pictures), batch_size):
        truth = to_float(torch.from_numpy(pictures[i : i + batch_size]).to(device))
        with autocast(device, dtype):
            reconstruction, tokens, _ = model(truth)
        found = {
            "mse": (reconstruction - truth).square().mean((1, 2, 3)),
            "psnr": psnr(reconstruction, truth),
        }
        if isinstance(distance, EffNetDistance):  # its features serve both measures
            both = distance.features(reconstruction), distance.features(truth)
            found[distance.name] = distance.distance_of_features(*both)
            for embedding, features in zip(embeddings, both, strict=True):
                embedding.append(distance.embedding_of_features(features))
        else:
            found[distance.name] = distance(reconstruction, truth)
        for name, measure in (("gradient", spatial_gradient), ("grid_energy", grid_energy)):
            found |= {name: measure(reconstruction), f"recorded_{name}": measure(truth)}
        for name, value in found.items():
            values.setdefault(name, []).append(value)
        counts += torch.bincount(tokens.flatten(), minlength=codes)
        pairs.append(to_uint8(torch.stack([truth[0], reconstruction[0]])))
    model.train(training)
    used, perplexity = code_usage(counts)
    means = {name: torch.cat(parts).mean().item() for name, parts in values.items()}
    for name in ("gradient", "grid_energy"):
        means[name] /= means.pop(f"recorded_{name}") or 1.0
    if embeddings[0]:
        means["frechet"] = frechet_distance(*(torch.cat(features) for features in embeddings))
    metrics = {f"val_{name}": value for name, value in means.items()}
    metrics |= {"val_used_codes": used, "val_perplexity": perplexity}
    columns = min(8, len(pairs))
    shown = torch.stack(pairs)[np.linspace(0, len(pairs) - 1, columns).astype(int)]
    return metrics, grid(list(shown.transpose(0, 1).flatten(0, 1).numpy()), columns)
