#!/usr/bin/env python3
"""Trains a sharper decoder for a tokenizer whose encoder and codebook stay as they are.

    python vq_vae/preprocess_vqvae.py CLIPS runs/pictures.npz
    python vq_vae/train_decoder.py [NAME=value ...]

Tokens stay valid: the result has the fingerprint of the tokenizer in INIT_FROM. The decoder starts from that
one's weights, with pixel shuffles in place of transposed convolutions, which leave a pattern of dots.
Loss: L1 + PERCEPTUAL_WEIGHT * perceptual distance (EffNet-Lite0) + the loss of a discriminator
(discriminator.py), as in VQGAN (arXiv 2012.09841). An exponential moving average of the weights is validated
and used.

Writes last.pt, best.pt (lowest Fréchet distance of the held-out pictures; the newest weights where none is
held out), pictures of reconstructions and log.jsonl into OUT_DIR. A sharper picture is often farther from the
original by PSNR and perceptual distance.
Ctrl-C saves; the same command then continues where the run stopped.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metrics.perceptual import EffNetDistance
from runtime import checkpoint
from runtime.config import constants_of, load
from runtime.device import amp_dtype, autocast, keep_freed_memory, pick_device
from runtime.errors import run_script
from runtime.folder_lock import lock_folder
from runtime.outputs import check_outputs, make_folder
from runtime.ranges import (
    NonNegative,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    Precision,
    Seed,
    Share,
    ShareBelowOne,
)
from runtime.run_folder import last_good, set_aside
from runtime.run_log import Means, RunLog, StopRequest, WandbMode, announcement, ending
from runtime.training_state import MovingAverage, SaveTimer, TrainingState, warmup_cosine
from runtime.video import save_image, to_float
from vq_vae.discriminator import build_discriminator, update_discriminator
from vq_vae.tokenizer import TOKENIZER_KIND, load_tokenizer, tokenizer_content
from vq_vae.training_pictures import held_out_pictures, load_pictures, random_batch, validate
from vq_vae.vq_vae import TRANSPOSED, VQVAE, with_shuffle_decoder

# --- files ---
PICTURES = "runs/pictures.npz"  # from preprocess_vqvae.py
INIT_FROM = "checkpoints/vqvae.pt"  # the tokenizer; its decoder is what the new one starts from
OUT_DIR = "runs/decoder"
RESUME = True  # continue from OUT_DIR/last.pt if it exists

# --- model ---
FINE_BLOCKS: NonNegative = 2  # residual blocks at half of the picture's size (INIT_FROM may have its own)

# --- training ---
STEPS: NonNegative = 4_000
BATCH_SIZE: Positive = 8
LR: PositiveNumber = 1.5e-4  # after a linear warm-up; then cosine decay to LR * FINAL_LR_FACTOR at STEPS
DISCRIMINATOR_LR_FACTOR: PositiveNumber = 2.0  # its learning rate, over the decoder's
WARMUP_STEPS: NonNegative = 200
FINAL_LR_FACTOR: Share = 0.1
GRAD_CLIP: PositiveNumber = 1.0
AVERAGE_DECAY: ShareBelowOne = 0.995  # of the moving average of the weights
FLIP = True  # mirror half of the pictures left-right
PERCEPTUAL_WEIGHT: NonNegativeNumber = 0.1
# Norm of the adversarial loss's gradient with respect to the picture, over the other terms'.
ADVERSARIAL_WEIGHT: NonNegativeNumber = 0.5
ADVERSARIAL_START: Share = 0.1  # share of STEPS before it; the discriminator learns from the start
PRECISION: Precision = "auto"  # auto: bf16 where it is fast, else fp32
DEVICE = "auto"  # auto, cuda, mps or cpu
SEED: Seed = 1

# --- logging and saving, every so many steps ---
LOG_STEPS: Positive = 20
VAL_STEPS: Positive = 500
VAL_PICTURES: Positive = 256
SAVE_STEPS: Positive = 1000
SAVE_MINUTES: PositiveNumber = 10.0  # last.pt is also saved when so many minutes have passed
WANDB: WandbMode = "auto"  # online, offline, disabled, or auto: online where an API key is found
WANDB_PROJECT = "project-ochre-vqvae"


def main() -> int:
    """The command line; returns the exit status."""
    return run_script(lambda: run(load(globals())))


def run(config: Any) -> None:
    """Trains in OUT_DIR, which no other run may use. Raises UserError."""
    with lock_folder(config.out_dir, "train_decoder.py", "OUT_DIR"), StopRequest() as stop:
        train(config, stop)


def combined_gradient(
    reconstruction: Tensor, likeness: Tensor, adversarial: Tensor | None, weight: float
) -> Tensor:
    """The gradient of both losses with respect to the pictures [B, 3, Hp, Wp].

    The adversarial part is scaled to `weight` times the norm of the other one, as in VQGAN, which compares
    the gradients of the last layer.
    """
    (gradient,) = torch.autograd.grad(likeness, reconstruction, retain_graph=True)
    if adversarial is None:
        return gradient
    (other,) = torch.autograd.grad(adversarial, reconstruction, retain_graph=True)
    return gradient + weight * gradient.norm() / other.norm().clamp_min(1e-12) * other


def train(config: Any, stop: StopRequest | None = None) -> None:
    """Trains until STEPS, or until SIGINT or SIGTERM, which save. Raises UserError.

    `config` has the constants above as lowercase fields.
    """
    out = Path(config.out_dir)
    check_outputs([out / "last.pt", out / "best.pt"], [config.init_from, config.pictures])
    make_folder(out)
    keep_freed_memory()
    device = pick_device(config.device)
    dtype = amp_dtype(device, config.precision)
    print(f"precision: {dtype}")
    torch.manual_seed(config.seed)

    # data, models, optimizers, loss
    source = load_tokenizer(config.init_from)
    model: VQVAE = source.vqvae
    if model.config.upsampling == TRANSPOSED:
        model = with_shuffle_decoder(model, config.fine_blocks)
    model = model.to(device).requires_grad_(False).eval()
    model.decoder.requires_grad_(True)
    pictures = load_pictures(config.pictures, model.config.height, model.config.width)
    held_out = held_out_pictures(pictures["val"], config.val_pictures, config.pictures)
    distance = EffNetDistance().to(device)
    discriminator = build_discriminator(distance, model.config)
    parts = {"model": model.decoder, "discriminator": discriminator}
    optimizers = {
        name: torch.optim.AdamW(part.parameters(), lr=config.lr, betas=(0.5, 0.99), weight_decay=0.0)
        for name, part in parts.items()
    }
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    average = MovingAverage(model, config.average_decay)
    state = TrainingState(model, optimizers["model"], scaler, device, average=average)
    resumed = last_good(out, TOKENIZER_KIND, config.resume)
    if resumed:
        last, content = resumed
        state.restore(content, last)
        checkpoint.require(content, ("discriminator", "discriminator_optimizer"), last)
        with checkpoint.restoring(last):
            discriminator.load_state_dict(content["discriminator"])
            optimizers["discriminator"].load_state_dict(content["discriminator_optimizer"])

    constants = constants_of(config)

    def save(name: str) -> None:
        content = tokenizer_content(
            average.network,
            source.fingerprint,
            constants=constants,
            discriminator=discriminator.state_dict(),
            discriminator_optimizer=optimizers["discriminator"].state_dict(),
            **state.content(),
        )
        checkpoint.save(out / name, content)

    if not resumed:
        set_aside(out)
    log = RunLog(out, config.wandb, config.wandb_project, constants, state.step if resumed else None)
    means, save_timer = Means(), SaveTimer(config.save_steps, config.save_minutes)
    print(announcement(state.step, config.steps, out))
    bar = tqdm(total=config.steps, initial=state.step, unit="step", mininterval=2)
    while state.step < config.steps and not stop:
        final_lr = config.lr * config.final_lr_factor
        lr = warmup_cosine(state.step, config.lr, final_lr, config.warmup_steps, config.steps)
        state.set_learning_rate(lr)
        optimizers["discriminator"].param_groups[0]["lr"] = lr * config.discriminator_lr_factor
        rng = np.random.default_rng([config.seed, state.step])
        truth = to_float(random_batch(pictures["train"], config.batch_size, config.flip, rng).to(device))

        # the decoder
        discriminator.requires_grad_(False)
        with autocast(device, dtype):
            with torch.no_grad():
                wanted = distance.features(truth)
            reconstruction = model.decode_code(model.encode(truth))
            features = distance.features(reconstruction)
            terms = {
                "l1": (reconstruction - truth).abs().mean(),
                distance.name: distance.distance_of_features(features, wanted).mean(),
            }
            likeness = terms["l1"] + config.perceptual_weight * terms[distance.name]
            terms["adversarial"] = -discriminator(reconstruction, features).mean()
        adversarial = state.step >= config.adversarial_start * config.steps and config.adversarial_weight > 0
        gradient = combined_gradient(
            reconstruction,
            likeness,
            terms["adversarial"] if adversarial else None,
            config.adversarial_weight,
        )
        grad_norm = state.update((reconstruction * gradient).sum(), config.grad_clip)

        # the discriminator
        discriminator.requires_grad_(True)
        with autocast(device, dtype):
            recorded = discriminator(truth, wanted)
            reconstructed = discriminator(reconstruction.detach(), [f.detach() for f in features])
        terms["discriminator"] = update_discriminator(optimizers["discriminator"], recorded, reconstructed)
        step = state.step
        bar.update()

        # log
        values = {name: float(value.detach()) for name, value in terms.items()}
        means.add(config.batch_size, values | {"grad_norm": grad_norm})
        if step % config.log_steps == 0:
            row, pictures_per_s, seconds = means.take()
            state.seconds += seconds
            row |= {"lr": lr, "pictures_per_s": pictures_per_s, "skipped_steps": state.finite.skipped}
            log.write(step, row)
            bar.set_postfix({distance.name: f"{row.get(distance.name, math.nan):.4f}"})

        # validate
        validates = step % config.val_steps == 0 or step == config.steps
        if validates and not len(held_out):
            save("best.pt")  # the newest weights
        elif validates:
            state.metrics, picture = validate(average.network, distance, held_out, config.batch_size, dtype)
            log.write(step, state.metrics)
            save_image(out / f"reconstruction_{step:06d}.png", picture)
            log.picture(step, "original | reconstruction", picture)
            tqdm.write(f"step {step}: " + json.dumps({k: round(v, 5) for k, v in state.metrics.items()}))
            if state.metrics["val_frechet"] < state.best:
                state.best = state.metrics["val_frechet"]
                save("best.pt")
        if save_timer.due(step):
            save("last.pt")
    bar.close()
    save("last.pt")
    log.close()
    print(ending(state.step, config.steps, out))


if __name__ == "__main__":
    raise SystemExit(main())
