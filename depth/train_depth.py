#!/usr/bin/env python3
"""Trains the depth network on recorded clips with depth (record.py writes them), or with poses alone.

    python depth/train_depth.py DATA_DIRS=data/luanti [NAME=value ...]
    python depth/train_depth.py DATA_DIRS=data/gf INIT_FROM=checkpoints/depth.pt REPROJECTION_WEIGHT=1 LR=1e-4

Loss (depth_loss.py): L1 in log inverse ray distance, near surfaces weighing more; + GRADIENT_WEIGHT *
differences of the error between neighbours; + UNCERTAINTY_WEIGHT * negative log likelihood of the error that
the network expects of itself. With REPROJECTION_WEIGHT, clips without depth take part: REPROJECTION_WEIGHT *
error of the recorded frames before and after, read where the predicted depth says; + SMOOTHNESS_WEIGHT *
roughness of the depth (reprojection.py). An exponential moving average of the weights is validated and used.

The first run decodes the clips and passes part of the frames through the tokenizer; the result is kept in
CACHE_DIR. Writes last.pt, best.pt, pictures and log.jsonl into OUT_DIR. best.pt has the lowest error in
held-out worlds, or, if none of their clips has depth, the highest PSNR of frames warped to later ones, or,
without held-out clips, the newest weights.
Ctrl-C saves; the same command then continues exactly where the run stopped.
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

from dataset.token_files import DataError
from depth.depth_clips import (
    DepthBatch,
    DepthClip,
    DepthFrames,
    augment,
    find_depth_clips,
    load_clips,
    split_clips,
    split_only_clip,
)
from depth.depth_loss import depth_error, error_likelihood, gradient_error
from depth.depth_net import DepthConfig, DepthNet
from depth.depth_pictures import depth_sheet
from depth.predictor import DEPTH_KIND, DepthPredictor
from depth.reprojection import reprojection_error, smoothness_error
from depth.warp_quality import EVERY, GROUND, HORIZONS, PREDICTED, warp_quality
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
)
from runtime.run_folder import last_good, set_aside
from runtime.run_log import Means, RunLog, StopRequest, WandbMode, announcement, ending
from runtime.training_state import MovingAverage, SaveTimer, TrainingState, warmup_cosine
from runtime.video import save_image
from vq_vae.tokenizer import load_tokenizer

# --- files ---
DATA_DIRS = "data/luanti"  # folders of clips, separated by commas; see REPROJECTION_WEIGHT
INIT_FROM = ""  # a depth network whose weights the run starts from, with a fresh optimizer
VQVAE_CKPT = "checkpoints/vqvae.pt"  # the tokenizer whose pictures the network shall also understand
CACHE_DIR = "runs/depth_cache"  # prepared frames; may be deleted
OUT_DIR = "runs/depth"
RESUME = True  # continue from OUT_DIR/last.pt if it exists

# --- data ---
FRAME_STEP: Positive = 4  # every so many frames of a clip; a frame takes 30 kB of memory
VAL_FRACTION: Share = 0.1  # share of the worlds held out, by the same rule as preprocess.py's
DECODED_SHARE: Share = 0.33  # share of the frames that is replaced by what the tokenizer decodes of it
DECODED_NOISE: Share = 0.2  # half of these have a share of their tokens, up to this, replaced by similar ones
UNKNOWN_PITCH: Share = 0.3  # share of the samples for which the camera's pitch is unknown, as for photos
FLIP = True  # mirror half of the pictures left-right
BRIGHTNESS: Share = 0.1  # pictures up to so much brighter or darker; stronger changes of colour cost accuracy

# --- model ---
HEIGHT: PictureSide = 72
WIDTH: PictureSide = 128
CHANNELS: Annotated[tuple, Range(4, 8192, multiple_of=4)] = (24, 48, 96, 128)  # of the levels, 36x64 to 5x8
BLOCKS: Annotated[tuple, Range(0, 100)] = (0, 1, 1, 1)  # residual blocks of each level of the encoder
DROPOUT: ShareBelowOne = 0.1
FROZEN_LEVELS: NonNegative = 0  # so many of the coarsest levels keep the weights of INIT_FROM

# --- optimization ---
STEPS: NonNegative = 12_000
BATCH_SIZE: Positive = 32
LR: PositiveNumber = 1.5e-3  # after a linear warm-up; then cosine decay to MIN_LR at STEPS
MIN_LR: NonNegativeNumber = 1e-5
WARMUP_STEPS: NonNegative = 200
WEIGHT_DECAY: NonNegativeNumber = 0.02
GRAD_CLIP: PositiveNumber = 1.0
AVERAGE_DECAY: ShareBelowOne = 0.999  # of the moving average of the weights
GRADIENT_WEIGHT: NonNegativeNumber = 0.5
UNCERTAINTY_WEIGHT: NonNegativeNumber = 0.05
REPROJECTION_WEIGHT: NonNegativeNumber = 0.0  # of clips without depth, which need poses; 0: they are left out
REPROJECTION_FRAMES: Positive = 4  # a frame is compared with those so many before and after; a multiple of
# FRAME_STEP
SMOOTHNESS_WEIGHT: NonNegativeNumber = 0.01  # of clips without depth
PRECISION: Precision = "auto"  # auto: bf16 where it is fast, fp16 on older CUDA cards, else fp32
DEVICE = "auto"  # auto, cuda, mps or cpu
SEED: Seed = 1

# --- logging and saving, every so many steps ---
LOG_STEPS: Positive = 50
VAL_STEPS: Positive = 500
VAL_FRAMES: Positive = 1024  # held-out frames that are looked at
SAVE_STEPS: Positive = 1000
SAVE_MINUTES: PositiveNumber = 10.0  # last.pt is also saved when so many minutes have passed
WANDB: WandbMode = "auto"  # online, offline, disabled, or auto: online where an API key is found
WANDB_PROJECT = "project-ochre-depth"


def load_frames(config: Any, network: DepthConfig, device: torch.device) -> dict[str, DepthFrames]:
    """The frames of the splits "train" and "val"; only the former, with a warning, if no clip is held out.

    Clips without depth are among them with REPROJECTION_WEIGHT, unless they have no poses either. Raises
    DataError if there is nothing to train on, or SettingError.
    """
    unlabelled = config.reprojection_weight > 0
    apart, rest = divmod(config.reprojection_frames, config.frame_step)
    if unlabelled and (rest or not apart):
        raise SettingError(
            f"REPROJECTION_FRAMES={config.reprojection_frames}: only every {config.frame_step}th frame is "
            "kept; give a multiple of FRAME_STEP, 1 or more times"
        )
    splits = split_clips(find_depth_clips(config.data_dirs, not unlabelled), config.val_fraction)
    tokenizer = load_tokenizer(config.vqvae_ckpt, device) if config.decoded_share else None
    usable: dict[str, list[DepthClip]] = {}
    for split, clips in splits.items():
        loaded = load_clips(
            clips,
            config.frame_step,
            (config.height, config.width),
            Path(config.cache_dir),
            tokenizer,
            config.decoded_share,
            config.decoded_noise,
        )
        usable[split] = [clip for clip in loaded if clip.codes is not None or np.isfinite(clip.pose).any()]
        if missing := len(loaded) - len(usable[split]):
            print(f"{split}: {missing} clips with neither depth nor poses are left out")
        for clip in usable[split]:
            if clip.codes is not None and clip.codes.shape[1:] != network.size:
                raise DataError(
                    f"{clip.name}: depth of {list(clip.codes.shape[1:])}, the network gives "
                    f"{list(network.size)}; change HEIGHT and WIDTH or record again"
                )
    if not usable["train"]:
        raise DataError(
            f"DATA_DIRS={config.data_dirs}: no clip to train on with VAL_FRACTION={config.val_fraction}; "
            "record more worlds or lower VAL_FRACTION"
        )
    if len(usable["train"]) == 1 and not usable["val"]:
        usable = split_only_clip(usable["train"][0], config.frame_step, config.val_fraction)
    if not usable["val"]:
        print(
            f"warning: DATA_DIRS={config.data_dirs}: no clip is held out with VAL_FRACTION="
            f"{config.val_fraction}; training without validation, and best.pt is the newest weights: record "
            "more worlds or raise VAL_FRACTION",
            file=sys.stderr,
        )
    return {split: DepthFrames(clips, network.farthest_m, apart) for split, clips in usable.items() if clips}


def loss_of(
    network: DepthNet, batch: DepthBatch, config: Any, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch, and its terms by name. Each sample weighs the same, labelled or not."""
    with autocast(batch.pictures.device, dtype):
        predicted, log_error = network(batch.pictures, batch.pitch)
    terms: dict[str, torch.Tensor] = {}
    count, bare = len(batch.pitch), len(batch.views.pose) if batch.views else 0
    loss = predicted.new_zeros(())
    if bare < count:
        labelled = batch.labelled
        guess, target = predicted[labelled], batch.target[labelled]
        terms["error"] = depth_error(guess, target)
        terms["gradient_error"] = gradient_error(guess, target)
        terms["error_likelihood"] = error_likelihood(log_error[labelled], guess, target)
        loss = loss + (count - bare) / count * (
            terms["error"]
            + config.gradient_weight * terms["gradient_error"]
            + config.uncertainty_weight * terms["error_likelihood"]
        )
    if batch.views:
        guess = predicted[~batch.labelled]
        terms["reprojection"], terms["compared_share"] = reprojection_error(
            guess, batch.views, network.config.vertical_fov_degrees
        )
        terms["smoothness"] = smoothness_error(guess, batch.views.picture)
        loss = loss + bare / count * (
            config.reprojection_weight * terms["reprojection"]
            + config.smoothness_weight * terms["smoothness"]
        )
    return loss, terms


@torch.no_grad()
def validate(
    network: DepthNet, frames: DepthFrames, config: Any, dtype: torch.dtype
) -> tuple[dict[str, float], np.ndarray]:
    """Errors over evenly spaced held-out frames, and a picture of some of them with both depths.

    `val_error` is `depth_error` of recorded pictures with the pitch known; `_no_pitch` without it, `_decoded`
    of pictures that went through the tokenizer, `_ground` that of the flat ground. Of clips without depth:
    `val_warp_gain`, see `warp_gain`.
    """
    device = next(network.parameters()).device
    network.eval()
    labelled = np.flatnonzero(frames.labelled)
    rows: dict[str, list[float]] = {}
    show = []
    if len(labelled):
        picked = np.linspace(0, len(labelled) - 1, min(config.val_frames, len(labelled))).astype(int)
        numbers = labelled[picked]
        decoded = frames.decoded[numbers]
        for name, chosen in (("", numbers[~decoded]), ("_decoded", numbers[decoded])):
            for part in np.array_split(chosen, -(-len(chosen) // config.batch_size)) if len(chosen) else []:
                batch = frames.batch(part).to(device)
                with autocast(device, dtype):
                    predicted, log_error = network(batch.pictures, batch.pitch)
                    blind, _ = network(batch.pictures)
                made = {name: predicted} | (
                    {} if name else {"_no_pitch": blind, "_ground": network.ground(batch.pitch)}
                )
                for key, log_inverse in made.items():
                    error = float(depth_error(log_inverse, batch.target))
                    rows.setdefault(f"val_error{key}", []).append(error)
                rows.setdefault("val_expected_over_made", []).append(
                    float(log_error.exp().mean() / (predicted - batch.target).abs().mean())
                )
                show.append((batch.pictures[0], predicted[0].exp(), batch.target[0].exp()))
    metrics = {name: float(np.mean(values)) for name, values in rows.items()}
    if len(labelled) < len(frames):
        metrics |= warp_gain(network, frames, config)
        bare = np.flatnonzero(~frames.labelled)
        batch = frames.batch(bare[np.linspace(0, len(bare) - 1, min(8, len(bare))).astype(int)]).to(device)
        predicted, _ = network(batch.pictures, batch.pitch)
        show += list(zip(batch.pictures, predicted.exp(), batch.target, strict=True))
    picks = [show[i] for i in np.linspace(0, len(show) - 1, min(8, len(show))).astype(int)]
    sheet = depth_sheet(*(torch.stack(column).cpu() for column in zip(*picks, strict=True)))
    return metrics, sheet


def warp_gain(network: DepthNet, frames: DepthFrames, config: Any) -> dict[str, float]:
    """`val_warp_gain`: dB by which a frame warped by its predicted depth shows later frames better than one
    warped over a flat ground (warp_quality.py), of the clips without depth; `val_warp_psnr`: that PSNR.

    Means over those of HORIZONS that are multiples of FRAME_STEP, over about VAL_FRAMES windows. Raises
    DataError if these clips are too short.
    """
    clips = [clip.as_recorded() for clip in frames.clips if clip.codes is None]
    horizons = [h // config.frame_step for h in HORIZONS if h % config.frame_step == 0] or [1]
    total = sum(len(clip.pictures) for clip in clips)
    every = max(1, EVERY // config.frame_step, total // config.val_frames)
    found = warp_quality(
        clips, network.config.vertical_fov_degrees, DepthPredictor(network), horizons=horizons, every=every
    )
    predicted, ground = (
        float(np.mean([found.rows[kind][h] for h in horizons])) for kind in (PREDICTED, GROUND)
    )
    return {"val_warp_gain": predicted - ground, "val_warp_psnr": predicted}


def main() -> int:
    """The command line; returns the exit status."""
    return run_script(lambda: run(load(globals())))


def run(config: Any) -> None:
    """Trains in OUT_DIR, which no other run may use. Raises UserError."""
    with lock_folder(config.out_dir, "train_depth.py", "OUT_DIR"), StopRequest() as stop:
        train(config, stop)


def train(config: Any, stop: StopRequest | None = None) -> None:
    """Trains until STEPS, or until SIGINT or SIGTERM, which save. Raises UserError."""
    out = Path(config.out_dir)
    make_folder(out)
    keep_freed_memory()
    device = pick_device(config.device)
    dtype = amp_dtype(device, config.precision)
    print(f"precision: {dtype}")
    torch.manual_seed(config.seed)

    # data
    try:
        network_config = DepthConfig(
            config.height, config.width, config.channels, config.blocks, dropout=config.dropout
        )
    except ValueError as error:
        raise SettingError(f"CHANNELS, BLOCKS, HEIGHT, WIDTH: {error}; change one of them") from None
    frames = load_frames(config, network_config, device)
    train_frames, held_out = frames["train"], frames.get("val")
    parts = [
        f"{len(part)} {name} frames of {len(part.clips)} clips, {int((~part.labelled).sum())} without depth"
        for name, part in (("train", train_frames), ("held-out", held_out))
        if part is not None
    ]
    megabytes = sum(part.nbytes for part in frames.values()) / 1e6
    print(f"data: {'; '.join(parts)}; {megabytes:.0f} MB of memory")

    # model, optimizer
    if config.frozen_levels >= len(config.channels) or (config.frozen_levels and not config.init_from):
        raise SettingError(
            f"FROZEN_LEVELS={config.frozen_levels}: fewer than the {len(config.channels)} levels can keep "
            f"their weights, and those need INIT_FROM (now {config.init_from!r}); change one of them"
        )
    network = DepthNet(network_config).to(device)
    network.freeze_coarse(config.frozen_levels)
    print(f"model: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, {network_config}")
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    average = MovingAverage(network, config.average_decay)
    state = TrainingState(network, optimizer, scaler, device, average=average)
    resumed = last_good(out, DEPTH_KIND, config.resume)
    if resumed:
        last, content = resumed
        state.restore(content, last)
    elif config.init_from:
        content = checkpoint.load(config.init_from, DEPTH_KIND)
        checkpoint.check_config(content, network.config, config.init_from)
        for part in (network, average.network):
            part.load_state_dict(content["model"])
        print(f"weights from {config.init_from}")

    constants = constants_of(config)

    def save(name: str) -> None:
        """`model` is the average, which is used; `trained` is what training continues from."""
        content = checkpoint.content_of(DEPTH_KIND, average.network, constants=constants)
        checkpoint.save(out / name, content | state.content())

    if not resumed:
        set_aside(out)
    log = RunLog(out, config.wandb, config.wandb_project, constants, state.step if resumed else None)
    means, save_timer = Means(), SaveTimer(config.save_steps, config.save_minutes)
    network.train()
    print(announcement(state.step, config.steps, out))
    bar = tqdm(total=config.steps, initial=state.step, unit="step", mininterval=2)
    while state.step < config.steps and not stop:
        lr = warmup_cosine(state.step, config.lr, config.min_lr, config.warmup_steps, config.steps)
        state.set_learning_rate(lr)
        rng = np.random.default_rng([config.seed, state.step])
        batch = train_frames.batch(np.sort(rng.integers(0, len(train_frames), config.batch_size)))
        batch = augment(batch, rng, config.flip, config.brightness, config.unknown_pitch).to(device)

        # forward, backward, clip, optimizer step
        loss, terms = loss_of(network, batch, config, dtype)
        grad_norm = state.update(loss, config.grad_clip)
        step = state.step
        bar.update()

        # log
        means.add(
            config.batch_size,
            {"loss": float(loss.detach()), "grad_norm": grad_norm}
            | {name: float(value.detach()) for name, value in terms.items()},
        )
        if step % config.log_steps == 0:
            row, pictures_per_s, seconds = means.take()
            state.seconds += seconds
            row |= {"lr": lr, "pictures_per_s": pictures_per_s, "skipped_steps": state.finite.skipped}
            log.write(step, row)
            bar.set_postfix(loss=f"{row.get('loss', math.nan):.4f}", lr=f"{lr:.1e}")

        # validate; an improvement saves best.pt
        validates = step % config.val_steps == 0 or step == config.steps
        if validates and held_out is None:
            save("best.pt")  # the newest weights
        elif validates:
            state.metrics, picture = validate(average.network, held_out, config, dtype)
            log.write(step, state.metrics)
            save_image(out / f"val_{step:06d}.png", picture)
            log.picture(step, "picture | predicted | recorded depth", picture)
            tqdm.write(f"step {step}: " + json.dumps({k: round(v, 4) for k, v in state.metrics.items()}))
            score = state.metrics.get("val_error", -state.metrics.get("val_warp_gain", 0.0))
            if score < state.best:
                state.best = score
                save("best.pt")
        if save_timer.due(step):
            save("last.pt")
    bar.close()
    save("last.pt")
    log.close()
    print(ending(state.step, config.steps, out))


if __name__ == "__main__":
    raise SystemExit(main())
