#!/usr/bin/env python3
"""Trains the tokenizer on pictures from preprocess_vqvae.py.

    python vq_vae/preprocess_vqvae.py CLIPS runs/pictures.npz
    python vq_vae/train_vqvae.py [NAME=value ...]

Loss: mean squared error + COMMITMENT * commitment + a perceptual term whose weight grows on a schedule.
Writes last.pt, best.pt (lowest validation MSE; the newest weights where no picture is held out), pictures of
reconstructions and log.jsonl into OUT_DIR.
Ctrl-C saves; the same command then continues where the run stopped.
"""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metrics import code_usage
from metrics.perceptual import Perceptual, perceptual_distance
from runtime import checkpoint
from runtime.config import SettingError, constants_of, load
from runtime.device import amp_dtype, autocast, keep_freed_memory, pick_device
from runtime.errors import run_script
from runtime.folder_lock import lock_folder
from runtime.outputs import make_folder
from runtime.ranges import (
    NonNegative,
    NonNegativeNumber,
    PictureSide,
    Positive,
    PositiveNumber,
    Precision,
    Range,
    Seed,
    Share,
    ShareBelowOne,
    Width,
)
from runtime.run_folder import last_good, set_aside
from runtime.run_log import Means, RunLog, StopRequest, WandbMode, announcement, ending
from runtime.training_state import SaveTimer, TrainingState, warmup_cosine
from runtime.video import save_image, to_float
from vq_vae.tokenizer import TOKENIZER_KIND, tokenizer_content
from vq_vae.training_pictures import held_out_pictures, load_pictures, random_batch, validate
from vq_vae.vq_vae import VQVAE, VQVAEConfig

# --- files ---
PICTURES = "runs/pictures.npz"  # from preprocess_vqvae.py
OUT_DIR = "runs/vqvae"
RESUME = True  # continue from OUT_DIR/last.pt if it exists

# --- model; a picture of HEIGHT x WIDTH becomes a grid of a quarter of each side ---
HEIGHT: PictureSide = 72
WIDTH: PictureSide = 128
CODEBOOK_SIZE: Annotated[int, Range(2, 65536)] = 1024
EMBEDDING_DIM: Width = 384
HIDDEN_DIM: Annotated[int, Range(2, 8192, multiple_of=2)] = 128
RESIDUAL_BLOCKS: Annotated[int, Range(0, 100)] = 2
COMMITMENT: NonNegativeNumber = 0.05
EMA_DECAY: ShareBelowOne = 0.99  # of the codebook

# --- training ---
STEPS: NonNegative = 20_000
BATCH_SIZE: Positive = 24
LR: PositiveNumber = 8e-4  # after a linear warm-up; then cosine decay to LR * FINAL_LR_FACTOR at STEPS
WARMUP_STEPS: NonNegative = 200
FINAL_LR_FACTOR: Share = 0.05
GRAD_CLIP: PositiveNumber = 1.0
FLIP = True  # mirror half of the pictures left-right
PERCEPTUAL: Perceptual = "auto"  # auto, lpips-alex or effnet-lite0
PERCEPTUAL_WEIGHT: NonNegativeNumber = 0.005  # 0: no perceptual term
PERCEPTUAL_START: Share = 0.3  # share of STEPS before its weight starts to grow
PERCEPTUAL_RAMP: Share = 0.2  # share of STEPS over which it grows
PERCEPTUAL_BATCH: Positive = 8  # pictures of each batch that it is computed on
PRECISION: Precision = "auto"  # auto: bf16 where it is fast, fp16 on older CUDA cards, else fp32
DEVICE = "auto"  # auto, cuda, mps or cpu
SEED: Seed = 1

# --- logging and saving, every so many steps ---
LOG_STEPS: Positive = 50
VAL_STEPS: Positive = 500
VAL_PICTURES: Positive = 512
SAVE_STEPS: Positive = 1000
SAVE_MINUTES: PositiveNumber = 10.0  # last.pt is also saved when so many minutes have passed
WANDB: WandbMode = "auto"  # online, offline, disabled, or auto: online where an API key is found
WANDB_PROJECT = "project-ochre-vqvae"


def perceptual_weight(done: float, weight: float, start: float, ramp: float) -> float:
    """0 up to `start`, then linear growth to `weight` over `ramp`; all but `weight` are shares of STEPS."""
    return weight * min(1.0, max(0.0, (done - start) / max(ramp, 1e-9)))


def main() -> int:
    """The command line; returns the exit status."""
    return run_script(lambda: run(load(globals())))


def run(config: Any) -> None:
    """Trains in OUT_DIR, which no other run may use. Raises UserError."""
    with lock_folder(config.out_dir, "train_vqvae.py", "OUT_DIR"), StopRequest() as stop:
        train(config, stop)


def train(config: Any, stop: StopRequest | None = None) -> None:
    """Trains until STEPS, or until SIGINT or SIGTERM, which save. Raises UserError.

    `config` has the constants above as lowercase fields.
    """
    out = Path(config.out_dir)
    make_folder(out)
    keep_freed_memory()
    device = pick_device(config.device)
    dtype = amp_dtype(device, config.precision)
    print(f"precision: {dtype}")
    torch.manual_seed(config.seed)

    # data, model, optimizer, loss
    pictures = load_pictures(config.pictures, config.height, config.width)
    held_out = held_out_pictures(pictures["val"], config.val_pictures, config.pictures)
    model = VQVAE(
        VQVAEConfig(
            height=config.height,
            width=config.width,
            codebook_size=config.codebook_size,
            embedding_dim=config.embedding_dim,
            hidden_dim=config.hidden_dim,
            residual_blocks=config.residual_blocks,
            commitment=config.commitment,
            ema_decay=config.ema_decay,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = TrainingState(model, optimizer, scaler, device)
    distance = perceptual_distance(config.perceptual).to(device)
    least = getattr(distance, "least_side", 1)
    if min(config.height, config.width) < least:
        raise SettingError(
            f"HEIGHT={config.height}, WIDTH={config.width}: {distance.name} needs {least} pixels or more"
        )
    resumed = last_good(out, TOKENIZER_KIND, config.resume)
    if resumed:
        last, content = resumed
        state.restore(content, last)

    constants = constants_of(config)

    def save(name: str) -> None:
        checkpoint.save(out / name, tokenizer_content(model, constants=constants, **state.content()))

    if not resumed:
        set_aside(out)
    log = RunLog(out, config.wandb, config.wandb_project, constants, state.step if resumed else None)
    means, save_timer = Means(), SaveTimer(config.save_steps, config.save_minutes)
    counts = torch.zeros(config.codebook_size, dtype=torch.long, device=device)  # since the last log line
    model.train()
    print(announcement(state.step, config.steps, out))
    bar = tqdm(total=config.steps, initial=state.step, unit="step", mininterval=2)
    while state.step < config.steps and not stop:
        final_lr = config.lr * config.final_lr_factor
        lr = warmup_cosine(state.step, config.lr, final_lr, config.warmup_steps, config.steps)
        state.set_learning_rate(lr)
        rng = np.random.default_rng([config.seed, state.step])
        truth = to_float(random_batch(pictures["train"], config.batch_size, config.flip, rng).to(device))

        # forward, backward, clip, optimizer step
        with autocast(device, dtype):
            reconstruction, tokens, commitment = model(truth)
        mse = (reconstruction - truth).square().mean()
        terms = {"mse": mse, "commitment": commitment}
        loss = mse + config.commitment * commitment
        weight = perceptual_weight(
            state.step / config.steps,
            config.perceptual_weight,
            config.perceptual_start,
            config.perceptual_ramp,
        )
        if weight > 0:
            n = config.perceptual_batch
            with autocast(device, dtype):
                terms[distance.name] = distance(reconstruction[:n], truth[:n]).mean()
            loss = loss + weight * terms[distance.name]
        grad_norm = state.update(loss, config.grad_clip)
        step = state.step
        bar.update()

        # log
        counts += torch.bincount(tokens.flatten(), minlength=config.codebook_size)
        values = {name: float(value.detach()) for name, value in {"loss": loss, **terms}.items()}
        means.add(config.batch_size, values | {"grad_norm": grad_norm})
        if step % config.log_steps == 0:
            row, pictures_per_s, seconds = means.take()
            state.seconds += seconds
            used, perplexity = code_usage(counts)
            counts.zero_()
            row |= {"used_codes": used, "perplexity": perplexity, "lr": lr}
            row |= {"perceptual_weight": weight, "pictures_per_s": pictures_per_s}
            row |= {"skipped_steps": state.finite.skipped}
            log.write(step, row)
            bar.set_postfix(loss=f"{row.get('loss', math.nan):.4f}", codes=used)

        # validate
        validates = step % config.val_steps == 0 or step == config.steps
        if validates and not len(held_out):
            save("best.pt")  # the newest weights
        elif validates:
            state.metrics, picture = validate(model, distance, held_out, config.batch_size, dtype)
            log.write(step, state.metrics)
            save_image(out / f"reconstruction_{step:06d}.png", picture)
            log.picture(step, "original | reconstruction", picture)
            tqdm.write(f"step {step}: " + json.dumps({k: round(v, 5) for k, v in state.metrics.items()}))
            if state.metrics["val_mse"] < state.best:
                state.best = state.metrics["val_mse"]
                save("best.pt")
        if save_timer.due(step):
            save("last.pt")
    bar.close()
    save("last.pt")
    log.close()
    print(ending(state.step, config.steps, out))


if __name__ == "__main__":
    raise SystemExit(main())
