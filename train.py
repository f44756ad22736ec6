#!/usr/bin/env python3
"""Trains the world model on token files.

    python preprocess.py --parent_dir CLIPS --out_dir tokens/mine
    python train.py DATA_DIR=tokens/mine [RECIPE=v4.5.2] [NAME=value ...]

Edit the constants below, or give them as NAME=value. MODEL=geometry is the world model (model_geometry.py);
RECIPE=v4.5.2 trains the ConvGRU + FiLM baseline (model_convGru.py).

Each sample is a window of SEQ_LEN transitions of one clip. The recurrent state runs along the window, and
each step has a loss. In the last `ar_len` steps the model is given its own samples instead of the recorded
tokens (scheduled sampling, arXiv 1506.03099).

Writes last.pt, step_N.pt, best.pt (lowest validation bits per token; the newest weights where no clip is held
out), pictures and log.jsonl into OUT_DIR.
Ctrl-C saves; the same command then continues exactly where the run stopped.

Several GPUs: `torchrun --nproc_per_node 4 train.py DATA_DIR=tokens/mine`. BATCH_SIZE counts all of them.
"""

import json
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.windows import TokenClips, WindowBatches
from depth.predictor import load_depth
from metrics.perceptual import perceptual_distance
from rollout.world_model import WORLD_KIND, check_depth, load_world_model, world_content
from runtime import checkpoint
from runtime.config import SettingError, constants_of, load
from runtime.device import amp_dtype, autocast, keep_freed_memory, pick_device
from runtime.errors import run_script
from runtime.folder_lock import lock_folder
from runtime.outputs import make_folder
from runtime.run_folder import last_good, remove_old_steps, set_aside
from runtime.run_log import Means, RunLog, StopRequest, announcement, ending
from runtime.training_state import MovingAverage, SaveTimer, TrainingState, warmup_cosine
from runtime.video import save_image
from training import distributed
from training.adversarial import AdversarialLoss
from training.curriculum import Curriculum
from training.diagnostics import SpikeWatch, action_sensitivity, prediction_values, step_values
from training.geometry_window import pair_loss
from training.models import build_model, loss_weights, trained_parameters, window_loss
from training.motion_pretraining import pretrain_player_motion, without_poses
from training.pair_pool import PairPool, pair_step
from training.pairs import PairConfig
from training.predicted_depth import motion_clips
from training.train_config import RECIPES, TrainConfig
from training.validation import load_held_out, truth_and_prediction, validate
from training.window_parts import StepLoss
from vq_vae.tokenizer import check_tokenizer, load_tokenizer

# --- files ---
DATA_DIR = "tokens/default"  # token files, from preprocess.py
VQVAE_CKPT = "checkpoints/vqvae.pt"  # the tokenizer that made the tokens
DEPTH_CKPT = "checkpoints/depth.pt"  # geometry only: the depth network
OUT_DIR = "runs/world"
RESUME = True  # continue from OUT_DIR/last.pt if it exists
INIT_FROM = ""  # a world model to start from, with a fresh optimizer; its depth network may be another one
RECIPE = ""  # name of a file of values in training/recipes/; values that you edit here win over it

# --- model (codebook, picture and grid size come from the tokenizer, the field of view from the data) ---
MODEL = "geometry"  # geometry or convgru (the baseline)
# geometry only
CHANNELS = 64  # of the level at 18x32
COARSE_CHANNELS = 96  # of the levels at 9x16 and 5x8
PRIOR = True  # the warped views are a prior on the logits; False: they are features only
KEYFRAMES = 64  # capacity of the memory; 0: no memory
SOURCES = 3  # keyframes from which a view is composed, besides the last frame
# convgru only
CODEBOOK_INIT = True  # initialise embedding and head from the tokenizer's codebook (geometry always does)
EMBED_DIM = 128
HIDDEN_DIM = 128
LAYERS = 3
KERNEL_SIZE = 3
GRADIENT_CHECKPOINTING = False  # recompute each step in the backward pass: less memory, a third slower

# --- optimization ---
STEPS = 30_000
TRAINED_PARTS = ""  # "": all; or names of the model's parts, by commas: the others stay those of INIT_FROM
BATCH_SIZE = 8
LR = 1e-3  # after a linear warm-up; then cosine decay to MIN_LR at STEPS
MIN_LR = 1e-5
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.01
GRAD_CLIP = 1.0
AVERAGE_DECAY = 0.998  # of the moving average of the weights, which is validated and saved; 0: none
PRECISION = "auto"  # fp32, bf16, fp16, or auto: bf16 where it is fast, fp16 on older CUDA cards, else fp32
DEVICE = "auto"  # auto, cuda, mps or cpu
SEED = 1

# --- windows ---
SEQ_LEN = 12  # transitions in a window
SEQ_LEN_MAX = 12  # above SEQ_LEN: the window grows by one ...
SEQ_LEN_GROW_STEPS = 5000  # ... every so many steps
BALANCE = 0.5  # windows of rare actions are sampled more often, by share^-BALANCE; 0: all alike

# --- pairs, geometry only: a frame, and the view of it composed from 1 to 4 frames up to 128 before it ---
PAIR_SHARE = 0.75  # share of the steps that train on pairs; the others on windows
PAIR_BATCH = 32
PAIR_POOL = 1536  # pairs that are made at once: 33 kB each
PAIR_PASSES = 4  # how often each is used
PAIR_GENERATED = 0.4  # share of them whose sources the model generated, as at play
PAIR_INVENTED = 0.0  # share of those without a target, since it invents the disoccluded cells: see
# ADVERSARIAL_WEIGHT, which alone judges them
RECORDED_DEPTH = 0.3  # share of the pairs that are warped by recorded depth, where there is any

# --- curriculum: the last `ar_len` steps of a window may be self-fed ---
AR_GROWTH = "rollout"  # `ar_len` grows when the validation rollouts improve; ramp: with the step
AR_LEN_MAX = 8  # at most; and always below the window's length
AR_START_STEP = 0  # no self-fed step before this training step
AR_STEP = 2  # rollout only: `ar_len` starts at this and grows by it
AR_RAMP_STEPS = 4000  # ramp only: `ar_len` grows from 0 to AR_LEN_MAX over so many steps
# Probability p that recorded tokens are given after all. rollout: p = SS_MIN_TEACHER_PROB. ramp:
# p = 1 / (1 + exp((step - SS_MIDPOINT_STEP) / SS_STEEPNESS)), kept between the two bounds. The geometry model
# samples this once per window, and else self-feeds the last 0..ar_len steps; convgru samples it at each step.
SS_MIN_TEACHER_PROB = 0.15
SS_MAX_TEACHER_PROB = 0.95  # ramp only
SS_MIDPOINT_STEP = 6000  # ramp only
SS_STEEPNESS = 1500.0  # ramp only
SELF_FED_GREEDY = False  # self-fed tokens: the most likely ones instead of samples
SELF_FED_TEMPERATURE = 0.9

# --- noise on the input, from which the model learns to recover from its own errors ---
TOKEN_NOISE = 0.15  # each sample has a share of its input tokens, from 0..this, replaced by other codes
SIMILAR_CODES = 0.7  # geometry only: share of the replacements that are similar codes
LATENT_NOISE = 0.0  # convgru only: standard deviation of Gaussian noise on the embedded input

# --- loss weights (training/loss_terms.py has the terms) ---
CE_WEIGHT = 1.0  # cross-entropy
LABEL_SMOOTHING = 0.0  # above 0 the probabilities that play samples from have a tail of wrong codes
PERCEPTUAL_WEIGHT = 0.0  # distance of the decoded prediction to the decoded target
PERCEPTUAL = "auto"  # the distance: auto, lpips-alex or effnet-lite0
# geometry only
ADVERSARIAL_WEIGHT = 0.0  # of a discriminator's judgement of sampled frames; in steps on pairs
ADVERSARIAL_BATCH = 8  # samples of such a step that it is computed on
DISOCCLUDED_WEIGHT = 3.0  # of a disoccluded cell in the cross-entropy; a visible one has 1
LOSS_CELLS = 0.3  # share of the cells that is sampled, by weight, for the cross-entropy
MASKED_DECODING = 0.1  # share of the samples that are given part of the target, for masked parallel decoding
MAGNIFIED_WEIGHT = 2.0  # in pairs, of a visible cell that has lost so much resolution that it is refined
MOTION_STEPS = 300  # of the motion model, which is trained first, alone (minutes); 0: as it is in INIT_FROM
MOTION_FRAMES = 6000  # keyframes whose depth is predicted for it
# convgru only
NEIGHBOR_WEIGHT = 0.0  # cross-entropy to any code of the target in ...
NEIGHBOR_KERNEL = 3  # ... so many cells square ...
NEIGHBOR_EXACT_MIX = 0.3  # ... mixed with this share of the exact one
SEMANTIC_WEIGHT = 0.0  # squared error of the expected code vector
ENTROPY_WEIGHT = 0.0  # entropy of a cell below ...
ENTROPY_FLOOR = 4.5  # ... this, in nats
SHARPNESS_WEIGHT = 0.0  # 1 - probability of the most likely code
TEMPORAL_WEIGHT = 0.0  # KL divergence from the prediction of the previous step

# --- logging and saving, every so many steps ---
LOG_STEPS = 20
VAL_STEPS = 500
VAL_WINDOWS = 48
VAL_ROLLOUTS = 16  # rollouts of 20 frames from 6 recorded ones; 0: none
PICTURE_STEPS = 500
SENSITIVITY_STEPS = 500
SPIKE_FACTOR = 3.0  # report a step whose loss or gradient norm is so many times the mean of the last 100
SAVE_STEPS = 1000
SAVE_MINUTES = 10.0  # last.pt is also saved when so many minutes have passed
KEEP = 3  # step_N.pt files kept
WANDB = "auto"  # online, offline, disabled, or auto: online where an API key is found
WANDB_PROJECT = "project-ochre"


def main() -> int:
    """The command line; returns the exit status."""
    return run_script(run)


def run() -> None:
    """Trains until STEPS, or until SIGINT or SIGTERM, which save. Raises UserError."""
    if distributed.rank() > 0:
        sys.stdout = open(os.devnull, "w")  # only the first process prints
    config = load(globals(), config_class=TrainConfig, recipes=RECIPES)
    if config.batch_size % distributed.size():
        raise SettingError(
            f"BATCH_SIZE={config.batch_size} is the whole batch and cannot be split evenly over "
            f"{distributed.size()} processes; give a multiple of {distributed.size()}"
        )
    keep_freed_memory()
    device = pick_device(distributed.start(config.device))
    dtype = amp_dtype(device, config.precision)
    print(f"precision: {dtype}")
    if distributed.size() > 1:
        print(f"processes: {distributed.size()}, {config.batch_size // distributed.size()} windows each")
    first = distributed.rank() == 0
    lock = lock_folder(config.out_dir, "train.py", "OUT_DIR") if first else nullcontext()
    with lock, StopRequest() as stop:
        train(config, device, dtype, stop)
    distributed.stop()


def train(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, stop: StopRequest | None = None
) -> None:
    """The training run. Every process runs all of it, except what only the `first` does for all."""
    first = distributed.rank() == 0
    out = Path(config.out_dir)
    make_folder(out)
    torch.manual_seed(config.seed)

    # data
    tokenizer = load_tokenizer(config.vqvae_ckpt, device)
    geometry = config.model == "geometry"
    extras = []  # optional arrays that the pairs and the motion model need
    if geometry and config.pair_share and config.recorded_depth:
        extras.append("depth")
    if geometry and config.motion_steps:
        extras += ["nodes", "origin"]
    clips = TokenClips(config.data_dir, "train", tokenizer.fingerprint, progress=True, extras=extras)
    held_out = load_held_out(config.data_dir, tokenizer.fingerprint, config.seq_len + 1)
    manifest = clips.manifest
    print(
        f"data: {clips.frames} train frames in {len(clips.entries)} clips, "
        + (f"{held_out.frames} held out in {len(held_out.entries)}; " if held_out else "none held out; ")
        + f"{sum(t.nbytes for t in clips.tokens) / 1e6:.0f} MB of tokens in RAM"
    )
    curriculum = Curriculum(config)
    batches = WindowBatches(
        clips, config.batch_size, config.seed, distributed.rank(), distributed.size(), config.balance
    )
    if config.balance:
        shares = batches.class_shares(curriculum.sequence_length(0)).items()
        print("windows by action: " + ", ".join(f"{name} {a:.1%} -> {b:.1%}" for name, (a, b) in shares))

    # model, optimizer, loss
    depth = load_depth(config.depth_ckpt, device) if geometry else None
    model = build_model(config, tokenizer, manifest, depth).to(device)
    print(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {model.config}")
    optimizer = torch.optim.AdamW(
        trained_parameters(model, config.trained_parts),
        lr=config.lr,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    average = MovingAverage(model, config.average_decay) if config.average_decay else None
    state = TrainingState(model, optimizer, scaler, device, average=average)
    distance = perceptual_distance(config.perceptual).to(device) if config.perceptual_weight else None
    step_loss = StepLoss(tokenizer, distance, loss_weights(config))
    pairs = None
    if geometry and config.pair_share and clips.with_poses:
        pair_config = PairConfig(
            batch=config.pair_batch // distributed.size(),
            size=config.pair_pool,
            passes=config.pair_passes,
            recorded_depth=config.recorded_depth,
            generated=config.pair_generated,
            invented=config.pair_invented,
            token_noise=config.token_noise,
            similar_share=config.similar_codes,
        )
        pairs = PairPool(
            state.used, clips, pair_config, config.seed * distributed.size() + distributed.rank()
        )

    adversarial = None
    if pairs and config.adversarial_weight:
        adversarial = AdversarialLoss(tokenizer, min(config.adversarial_batch, pair_config.batch))

    # resume, or start from the weights of another run
    resumed = last_good(out, WORLD_KIND, config.resume)
    if resumed:
        last, content = resumed
        checkpoint.require(content, ("tokenizer", "position", *curriculum.content()), last)
        check_tokenizer(content["tokenizer"], tokenizer.fingerprint, config.vqvae_ckpt, str(last))
        if geometry:
            check_depth(content, depth, "DEPTH_CKPT", last)
        state.restore(content, last)
        with checkpoint.restoring(last):
            batches.restore(content["position"])
            if pairs and "pairs" in content:  # a run without pairs may go on with them
                pairs.restore(content["pairs"], content.get("pair_maker"))
            if adversarial:
                adversarial.restore(content)
            curriculum.restore(content)
    elif config.init_from:
        source, content = load_world_model(
            config.init_from, tokenizer, device, config.depth_ckpt, other_depth=True
        )
        checkpoint.check_config(content, model.config, config.init_from)
        model.load_state_dict(source.state_dict())
        print(f"weights from {config.init_from}")
        if geometry and content.get("depth", depth.fingerprint) != depth.fingerprint:
            print(f"note: they were trained with depth network {content['depth']}, not {depth.fingerprint}")
    if geometry and not clips.with_poses:
        print(f"note: {without_poses(model.motion_model, bool(resumed or config.init_from))}")
    elif geometry and not resumed and config.motion_steps:
        seen = motion_clips(model, clips, config.motion_frames, config.seed)
        fov = manifest.vertical_fov_degrees
        error = pretrain_player_motion(model.motion_model, seen, fov, config.motion_steps, config.seed)
        nodes = "not trained, no clip has any" if math.isnan(error) else f"cross-entropy {error:.3f}"
        print(f"motion: {model.motion_model.constants}, nodes: {nodes}")
    distributed.share_weights(model)
    if average and not resumed:
        average.network.load_state_dict(model.state_dict())

    constants = constants_of(config)
    names = ("fps", "camera_degrees_per_unit", "vertical_fov_degrees", "action_names")
    data = {name: getattr(manifest, name) for name in names}  # what a rollout needs to know of the recordings

    def save(name: str) -> None:
        content = {"constants": constants, "data": data, "position": dict(batches.position)}
        if pairs:
            content |= {"pairs": dict(pairs.position), "pair_maker": pairs.maker}
        if adversarial:
            content |= adversarial.content()
        content |= curriculum.content() | state.content()
        checkpoint.save(out / name, world_content(state.used, **content))

    if first and not resumed:
        set_aside(out)
    resumed_step = state.step if resumed else None
    log = RunLog(out, config.wandb, config.wandb_project, constants, resumed_step) if first else None
    spikes = SpikeWatch(out / "spikes.jsonl", clips, config.spike_factor)
    means, save_timer = Means(), SaveTimer(config.save_steps, config.save_minutes)
    window = None  # the last batch of windows: tokens, actions, poses
    model.train()
    print(announcement(state.step, config.steps, out))
    bar = tqdm(total=config.steps, initial=state.step, unit="step", mininterval=2, disable=not first)
    # A signal to one process stops all of them after the same step.
    while state.step < config.steps and not distributed.any_process(bool(stop), device):
        seq_len = curriculum.sequence_length(state.step)
        inputs = curriculum.inputs(state.step, seq_len)
        lr = warmup_cosine(state.step, config.lr, config.min_lr, config.warmup_steps, config.steps)
        state.set_learning_rate(lr)
        distributed.reseed(config.seed, state.step)
        on_pairs = pairs is not None and pair_step(state.step, config.pair_share)

        # forward, backward, clip, optimizer step
        if on_pairs:
            view, target = pairs.next()
            windows, tokens = [], target[:, None]
            with autocast(device, dtype):
                result = pair_loss(model, step_loss, view, target, config.masked_decoding, adversarial)
        else:
            windows, *batch = batches.next(seq_len)
            window = tuple(x.to(device, non_blocking=True) for x in batch)
            tokens = window[0]
            with autocast(device, dtype):
                result = window_loss(model, step_loss, *window, inputs)
        grad_norm = state.update(result.loss, config.grad_clip, distributed.average_gradients)
        judged = {}
        if on_pairs and adversarial:
            judged["loss_discriminator"] = adversarial.update(target)
            judged["loss_adversarial"] = float(result.terms["adversarial"])
        step = state.step
        bar.update()
        if not first:
            continue

        # log: losses are those of the first process's slice of the batch
        loss = float(result.loss.detach())
        spikes.check(step, loss, grad_norm, windows, result.terms)
        if on_pairs:
            means.add(config.pair_batch, {"loss_pairs": loss, "grad_norm": grad_norm, **judged})
        else:
            means.add(config.batch_size * seq_len, step_values(result, loss, grad_norm))
        if step % config.log_steps == 0:
            row, frames_per_s, seconds = means.take()
            state.seconds += seconds
            if "loss_self_fed" in row:
                row["loss_gap"] = row["loss_self_fed"] - row["loss_teacher"]
            row |= prediction_values(result, tokens[:, -1], tokenizer)
            row |= {"teacher_prob": inputs.teacher_prob, "seq_len": seq_len, "ar_len": inputs.ar_len}
            row |= {"lr": lr, "frames_per_s": frames_per_s, "skipped_steps": state.finite.skipped}
            row |= {"epoch": batches.position["epoch"], "epoch_completion": batches.completion}
            if window and step % config.sensitivity_steps < config.log_steps:
                with autocast(device, dtype):
                    row["action_sensitivity"] = action_sensitivity(model, *window)
            log.write(step, row)
            losses = {name: f"{row[name]:.3f}" for name in ("loss", "loss_pairs") if name in row}
            bar.set_postfix(**losses, fps=f"{frames_per_s:.0f}")
        if step % config.picture_steps == 0:
            picture = truth_and_prediction(tokenizer, tokens[:4, -1], result.last_log_probs[:4].argmax(-1))
            save_image(out / f"train_{step:06d}.png", picture)
            log.picture(step, "train truth | prediction", picture)

        # validate; an improvement saves best.pt and may extend `ar_len`
        validates = step % config.val_steps == 0 or step == config.steps
        if validates and held_out is None:
            save("best.pt")  # the newest weights
        elif validates:
            state.metrics, picture = validate(state.used, held_out, config, dtype)
            model.train()
            log.write(step, state.metrics)
            save_image(out / f"val_{step:06d}.png", picture)
            log.picture(step, "val truth | prediction", picture)
            tqdm.write(f"step {step}: " + json.dumps({k: round(v, 4) for k, v in state.metrics.items()}))
            curriculum.validated(state.metrics.get("val_rollout_psnr", math.nan))
            if state.metrics["val_bits_per_token"] < state.best:
                state.best = state.metrics["val_bits_per_token"]
                save("best.pt")

        # save
        if step % config.save_steps == 0:
            save(f"step_{step:06d}.pt")
            remove_old_steps(out, config.keep, step)
        if save_timer.due(step):
            save("last.pt")
    bar.close()
    if first:
        save("last.pt")
        log.close()
    print(ending(state.step, config.steps, out))


if __name__ == "__main__":
    raise SystemExit(main())
