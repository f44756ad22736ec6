#!/usr/bin/env python3
"""Trains the tokenizer on pictures that preprocess_vqvae.py sampled.

    python vq_vae/preprocess_vqvae.py CLIPS runs/pictures.npz
    python vq_vae/train_vqvae.py [NAME=value ...]

Loss: mean squared error + COMMITMENT * commitment + a perceptual term that fades in on a schedule.
Writes last.pt, best.pt (by validation MSE), reconstruction grids and log.jsonl into OUT_DIR. Run it again to
go on where it stopped.
"""

import json
import math
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.token_files import DataError
from metrics import code_usage, psnr
from metrics.perceptual import perceptual_distance
from runtime import checkpoint
from runtime import config as settings
from runtime.device import amp_dtype, autocast, pick_device
from runtime.errors import run_script
from runtime.run_log import RunLog, StopRequest
from runtime.video import grid, save_image, to_float, to_uint8
from vq_vae.tokenizer import TOKENIZER_KIND, tokenizer_content
from vq_vae.vq_vae import VQVAE, VQVAEConfig

# --- data and places ---
PICTURES = "runs/pictures.npz"  # from preprocess_vqvae.py
OUT_DIR = "runs/vqvae"
RESUME = True  # go on from OUT_DIR/last.pt where there is one

# --- model (v2.1.6); for v3's 64x64 -> 16x16 give HEIGHT=64 WIDTH=64 ---
HEIGHT = 72
WIDTH = 128
CODEBOOK_SIZE = 1024
EMBEDDING_DIM = 384
HIDDEN_DIM = 128
RESIDUAL_BLOCKS = 2
COMMITMENT = 0.05
EMA_DECAY = 0.99

# --- training ---
STEPS = 20_000
BATCH_SIZE = 24
LR = 8e-4
WARMUP_STEPS = 200
FINAL_LR_FACTOR = 0.05  # cosine decay to LR * this at STEPS
GRAD_CLIP = 1.0
FLIP = True  # mirror half of the pictures left-right
PERCEPTUAL = "auto"  # auto, lpips-alex or effnet-lite0
PERCEPTUAL_WEIGHT = 0.005  # 0 switches the term off
PERCEPTUAL_START = 0.3  # share of STEPS before the term starts to fade in
PERCEPTUAL_RAMP = 0.2  # share of STEPS over which it fades in
PERCEPTUAL_BATCH = 8  # pictures of each batch that the term is computed on
PRECISION = "auto"  # auto, fp32, bf16 or fp16
DEVICE = "auto"
SEED = 1

# --- logging ---
LOG_STEPS = 50
VAL_STEPS = 500
VAL_PICTURES = 512
SAVE_STEPS = 1000
SAVE_MINUTES = 10.0  # a safety save by the clock, whatever the step
WANDB = "auto"  # auto (online if logged in, else off), online, offline or disabled
WANDB_PROJECT = "project-ochre-vqvae"


def learning_rate(step: int) -> float:
    """Linear warm-up, then cosine decay to LR * FINAL_LR_FACTOR at STEPS."""
    if step < WARMUP_STEPS:
        return LR * (step + 1) / WARMUP_STEPS
    done = min(1.0, (step - WARMUP_STEPS) / max(1, STEPS - WARMUP_STEPS))
    return LR * (FINAL_LR_FACTOR + (1 - FINAL_LR_FACTOR) * 0.5 * (1 + math.cos(math.pi * done)))


def perceptual_weight(step: int) -> float:
    """0 before PERCEPTUAL_START * STEPS, then linearly up to PERCEPTUAL_WEIGHT."""
    ramp = (step / STEPS - PERCEPTUAL_START) / max(PERCEPTUAL_RAMP, 1e-9)
    return PERCEPTUAL_WEIGHT * min(1.0, max(0.0, ramp))


def load_pictures(path: str) -> dict[str, np.ndarray]:
    """The `train` and `val` arrays [N, H, W, 3] uint8 of a picture file; raises DataError if unfit."""
    try:
        with np.load(path) as arrays:
            pictures = {split: arrays[split] for split in ("train", "val")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"PICTURES={path}: {error}; make it with vq_vae/preprocess_vqvae.py") from None
    for split, array in pictures.items():
        if array.shape[1:] != (HEIGHT, WIDTH, 3) or not len(array):
            raise DataError(
                f"PICTURES={path}: {split} is {array.shape}, expected [N > 0, {HEIGHT}, {WIDTH}, 3]; "
                "sample again with other --height, --width or --val_fraction"
            )
    return pictures


def draw_batch(pictures: np.ndarray, rng: np.random.Generator, device: torch.device) -> Tensor:
    """BATCH_SIZE random pictures -> [B, 3, H, W] in [0, 1]."""
    batch = torch.from_numpy(pictures[np.sort(rng.integers(0, len(pictures), BATCH_SIZE))])
    batch = to_float(batch.to(device))
    if FLIP:
        flip = torch.from_numpy(rng.random(BATCH_SIZE) < 0.5).to(device)
        batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
    return batch


@torch.no_grad()
def validate(
    model: VQVAE, distance: torch.nn.Module, pictures: np.ndarray, dtype: torch.dtype
) -> tuple[dict, Tensor]:
    """Metrics over evenly spaced held-out pictures, and 8 originals above 8 reconstructions [16, H, W, 3]."""
    device = next(model.parameters()).device
    chosen = pictures[np.linspace(0, len(pictures) - 1, min(VAL_PICTURES, len(pictures))).astype(int)]
    model.eval()
    errors, decibels, distances, show = [], [], [], []
    counts = torch.zeros(CODEBOOK_SIZE, dtype=torch.long, device=device)
    for i in range(0, len(chosen), BATCH_SIZE):
        truth = to_float(torch.from_numpy(chosen[i : i + BATCH_SIZE]).to(device))
        with autocast(device, dtype):
            made, tokens, _ = model(truth)
        errors.append((made - truth).square().mean((1, 2, 3)))
        decibels.append(psnr(made, truth))
        distances.append(distance(made, truth))
        counts += torch.bincount(tokens.flatten(), minlength=CODEBOOK_SIZE)
        show.append(to_uint8(torch.stack([truth[0], made[0]])))
    model.train()
    used, perplexity = code_usage(counts)
    metrics = {
        "val_mse": torch.cat(errors).mean().item(),
        "val_psnr": torch.cat(decibels).mean().item(),
        f"val_{distance.name}": torch.cat(distances).mean().item(),
        "val_used_codes": used,
        "val_perplexity": perplexity,
    }
    pairs = torch.stack(show)[np.linspace(0, len(show) - 1, min(8, len(show))).astype(int)]
    return metrics, pairs.transpose(0, 1).flatten(0, 1)


def main() -> int:
    """The command line; returns the exit status."""
    return run_script(lambda: train(settings.apply(globals())))


def train(constants: dict) -> None:
    """Trains until STEPS, or until interrupted (which saves). Raises UserError."""
    out = Path(OUT_DIR)
    out.mkdir(parents=True, exist_ok=True)
    device = pick_device(DEVICE)
    dtype = amp_dtype(device, PRECISION)
    print(f"precision: {dtype}")
    torch.manual_seed(SEED)
    pictures = load_pictures(PICTURES)
    model = VQVAE(
        VQVAEConfig(
            HEIGHT, WIDTH, CODEBOOK_SIZE, EMBEDDING_DIM, HIDDEN_DIM, RESIDUAL_BLOCKS, COMMITMENT, EMA_DECAY
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    distance = perceptual_distance(PERCEPTUAL).to(device)
    step, best, seconds = 0, math.inf, 0.0
    metrics: dict[str, float] = {}  # of the last validation
    last = out / "last.pt"
    if RESUME and last.is_file():
        content = checkpoint.load(last, TOKENIZER_KIND)
        checkpoint.check_config(content, model.config, last)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        checkpoint.restore_rng(content["rng"], device)
        step, best, seconds = content["step"], content["best"], content["seconds"]
        metrics = content["metrics"]
        print(f"resumed {last} at step {step}")

    log = RunLog(out, WANDB, WANDB_PROJECT, constants)
    stop = StopRequest()

    def save(name: str) -> None:
        checkpoint.save(
            out / name,
            tokenizer_content(
                model,
                constants=constants,
                step=step,
                best=best,
                seconds=seconds,
                metrics=metrics,
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
                rng=checkpoint.rng_state(device),
            ),
        )

    # Since the last log, which was fewer than LOG_STEPS ago after a resume between two.
    sums: dict[str, float] = {}
    summed = 0
    counts = torch.zeros(CODEBOOK_SIZE, dtype=torch.long, device=device)
    clock = saved = time.monotonic()
    model.train()
    bar = tqdm(total=STEPS, initial=step, unit="step", mininterval=2)
    while step < STEPS and not stop:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        truth = draw_batch(pictures["train"], np.random.default_rng([SEED, step]), device)
        with autocast(device, dtype):
            made, tokens, commitment = model(truth)
        mse = (made - truth).square().mean()
        terms = {"mse": mse, "commitment": commitment}
        loss = mse + COMMITMENT * commitment
        weight = perceptual_weight(step)
        if weight > 0:
            n = PERCEPTUAL_BATCH
            with autocast(device, dtype):
                terms[distance.name] = distance(made[:n], truth[:n]).mean()
            loss = loss + weight * terms[distance.name]
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        scaler.step(optimizer)
        scaler.update()
        step += 1
        bar.update()

        counts += torch.bincount(tokens.flatten(), minlength=CODEBOOK_SIZE)
        for name, value in {"loss": loss, "grad_norm": norm, **terms}.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        summed += 1
        if step % LOG_STEPS == 0:
            elapsed = time.monotonic() - clock
            used, perplexity = code_usage(counts)
            row = {name: total / summed for name, total in sums.items()}
            row |= {
                "used_codes": used,
                "perplexity": perplexity,
                "lr": learning_rate(step),
                "perceptual_weight": weight,
                "pictures_per_s": summed * BATCH_SIZE / elapsed,
            }
            log.write(step, row)
            bar.set_postfix(loss=f"{row['loss']:.4f}", codes=used)
            seconds += elapsed
            clock = time.monotonic()
            sums.clear()
            summed = 0
            counts.zero_()
        if step % VAL_STEPS == 0 or step == STEPS:
            metrics, show = validate(model, distance, pictures["val"], dtype)
            log.write(step, metrics)
            picture = grid(list(show.numpy()), columns=len(show) // 2)
            save_image(out / f"reconstruction_{step:06d}.png", picture)
            log.picture(step, "original | reconstruction", picture)
            tqdm.write(f"step {step}: " + json.dumps({k: round(v, 5) for k, v in metrics.items()}))
            if metrics["val_mse"] < best:
                best = metrics["val_mse"]
                save("best.pt")
        if step % SAVE_STEPS == 0 or time.monotonic() - saved > 60 * SAVE_MINUTES:
            save("last.pt")
            saved = time.monotonic()
    bar.close()
    save("last.pt")
    log.close()
    stop.release()
    print(f"{'stopped' if stop else 'finished'} at step {step}; weights in {out}")


if __name__ == "__main__":
    raise SystemExit(main())
