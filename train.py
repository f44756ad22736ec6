#!/usr/bin/env python3
"""Trains the world model on token files.

    python preprocess.py --parent_dir CLIPS --out_dir tokens/mine
    python train.py DATA_DIR=tokens/mine [RECIPE=v4.5.2] [NAME=value ...]

Each sample is a window of SEQ_LEN transitions within one clip. The loss is taken at every step of the window,
as the recurrent state streams along it; in its last `ar_len` steps the model is fed its own samples instead
of the truth (scheduled sampling, arXiv 1506.03099).

MODEL is the world model that carries what was seen (model_geometry.py). RECIPE=v4.5.2 is the earlier system.

Writes last.pt, step_N.pt, best.pt (by validation bits per token), pictures and log.jsonl into OUT_DIR. Ctrl-C
saves; run the same command again to go on exactly where it stopped.

Several GPUs: `torchrun --nproc_per_node 4 train.py DATA_DIR=tokens/mine`. BATCH_SIZE is that of all together.
"""

import json
import math
import os
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.actions import CLASS_NAMES, action_class
from dataset.token_files import DataError, Manifest
from dataset.windows import TokenClips, class_shares, epoch_windows, sample_by_class
from geometry import camera
from metrics import bits_per_token, psnr, unique_codes
from metrics.perceptual import perceptual_distance
from model_convGru import ConvGRUWorldModel, WorldModelConfig
from model_geometry import GeometryConfig, GeometryWorldModel
from rollout.rollout import Rollout
from rollout.sampling import PLAY, SamplingConfig
from rollout.world_model import WORLD_KIND, WorldModel, load_world_model, world_content
from runtime import checkpoint
from runtime import config as settings
from runtime.device import amp_dtype, autocast, pick_device
from runtime.errors import UserError, run_script
from runtime.run_log import RunLog, StopRequest
from runtime.video import grid, save_image, to_uint8
from training import distributed
from training import loss_terms as losses
from training.convgru_window import convgru_window_loss
from training.geometry_window import geometry_window_loss
from training.motion_pretraining import pretrain_motion
from training.window import InputConfig, LossWeights, StepLoss, WindowResult
from vq_vae.tokenizer import Tokenizer, check_tokenizer, load_tokenizer

# --- data and places ---
DATA_DIR = "tokens/luanti"  # made by preprocess.py
VQVAE_CKPT = "checkpoints/vqvae.pt"  # the tokenizer that made the tokens
OUT_DIR = "runs/world"
RESUME = True  # go on from OUT_DIR/last.pt where there is one
INIT_FROM = ""  # start from the weights of this world model, with a fresh optimizer

# --- recipe: a named set of values (RECIPES below) put over this file's; "" takes the file as it stands ---
RECIPE = ""

# --- model (codebook, picture and latent size come from the tokenizer, the field of view from the data) ---
MODEL = "geometry"  # geometry (carries what was seen) or convgru (the earlier system's)
CODEBOOK_INIT = True  # start on the tokenizer's codebook instead of at random

# geometry: sizes, and each mechanism's switch
CHANNELS = 64  # of the level at 18x32
COARSE_CHANNELS = 96  # of those at 9x16 and 5x8
PRIOR = True  # the carried picture reaches the logits; False: the features only
KEYFRAMES = 64  # places in the memory at play; 0 for none
SOURCES = 2  # keyframes from which one view is drawn

# convgru
EMBED_DIM = 128
HIDDEN_DIM = 128
LAYERS = 3
KERNEL_SIZE = 3
GRADIENT_CHECKPOINTING = False  # recompute each step in the backward pass: less memory, about a third slower

# --- optimization ---
STEPS = 30_000
BATCH_SIZE = 8
LR = 1e-3
MIN_LR = 1e-5
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.01
GRAD_CLIP = 1.0
PRECISION = (
    "auto"  # auto (bf16 where the hardware has it, fp16 on older CUDA cards, else fp32), fp32, bf16, fp16
)
DEVICE = "auto"  # auto, cuda, mps or cpu
SEED = 1

# --- sequence: transitions in a window, and its growth (v3) ---
SEQ_LEN = 12
SEQ_LEN_MAX = 12  # above SEQ_LEN: the window grows by one ...
SEQ_LEN_GROW_STEPS = 5000  # ... every so many steps

BALANCE = 0.5  # windows of rare actions are drawn more often: by share^-BALANCE; 0 draws evenly

# --- curriculum: how much of the window is self-fed, and how often ---
AR_GROWTH = "rollout"  # ar_len grows by AR_STEP whenever the held-out rollouts have become better, or "ramp"
AR_STEP = 2
AR_START_STEP = 0  # no self-fed step before this one
AR_RAMP_STEPS = 4000  # ramp: ar_len grows from 0 to AR_LEN_MAX over so many steps
AR_LEN_MAX = 8  # capped at the window's length - 1: the first step always sees the truth
# The two models spend it otherwise: in geometry, a sample is self-fed in its last 0..ar_len steps, or with
# the probability SS_MIN_TEACHER_PROB not at all; in convgru, each of the last ar_len steps is drawn alone.
SS_MIDPOINT_STEP = (
    6000  # within the self-fed part the truth is shown with probability 1/(1+exp((step-mid)/k)) ...
)
SS_STEEPNESS = 1500.0
SS_MAX_TEACHER_PROB = 0.95  # ... kept below this ...
SS_MIN_TEACHER_PROB = 0.15  # ... and above this
SELF_FED_GREEDY = False  # feed back the likeliest token instead of a sample
SELF_FED_TEMPERATURE = 0.9

# --- noise on the input (v2.1), so that the model learns to recover from its own errors ---
TOKEN_NOISE = 0.15  # each sample replaces a share of its input tokens, drawn from 0..this, by other codes
SIMILAR_CODES = 0.7  # geometry: of these, so many by codes like the true one; the model is told the share
LATENT_NOISE = 0.0  # convgru: standard deviation of Gaussian noise on the embedded input

# --- loss weights (each term is a function of losses.py) ---
CE_WEIGHT = 1.0
LABEL_SMOOTHING = 0.05
PERCEPTUAL_WEIGHT = 0.0  # at every step or not at all: every n-th step makes every n-th frame flash
PERCEPTUAL = "auto"  # auto, lpips-alex or effnet-lite0
# geometry
DISOCCLUDED_WEIGHT = 3.0  # of a cell that comes into view; one that was seen before counts 1
LOSS_CELLS = 0.3  # share of the cells that is drawn, by their weight, for the cross entropy
MASKED_DECODING = (
    0.5  # share of the samples to which part of the answer is shown, for masked parallel decoding
)
REPROJECTION_WEIGHT = 5.0
SMOOTHNESS_WEIGHT = 0.01
MOTION_WEIGHT = 2.0
MOTION_STEPS = 3000  # on actions and poses alone before the first step: the displacement is learnt in seconds
# convgru
NEIGHBOR_WEIGHT = 0.0
NEIGHBOR_KERNEL = 3
NEIGHBOR_EXACT_MIX = 0.3
SEMANTIC_WEIGHT = 0.0
ENTROPY_WEIGHT = 0.0
ENTROPY_FLOOR = 4.5  # nats
SHARPNESS_WEIGHT = 0.0
TEMPORAL_WEIGHT = 0.0

# --- logging and saving ---
LOG_STEPS = 20
VAL_STEPS = 500
VAL_WINDOWS = 48
VAL_ROLLOUTS = 16  # rollouts of ROLLOUT frames from CONTEXT seen ones; 0 for none
PICTURE_STEPS = 500
SENSITIVITY_STEPS = 500
SPIKE_FACTOR = 3.0  # report a step whose loss or gradient norm is so many times the mean of the last 100
SAVE_STEPS = 1000
SAVE_MINUTES = 10.0
KEEP = 3  # step_N.pt files kept
WANDB = "auto"  # auto (online if logged in, else off), online, offline or disabled
WANDB_PROJECT = "project-ochre"

RECIPES: dict[str, dict] = {
    # The earlier system's last ConvGRU recipe: its schedule and its weights. Those of the entropy, sharpness
    # and temporal terms were never written down; with these each starts below a tenth of the whole.
    "v4.5.2": {
        "MODEL": "convgru", "AR_GROWTH": "ramp", "SELF_FED_TEMPERATURE": 1.0, "BALANCE": 0.0,
        "EMBED_DIM": 256, "HIDDEN_DIM": 384, "LAYERS": 6, "CODEBOOK_INIT": False, "BATCH_SIZE": 16,
        "LR": 3e-5, "MIN_LR": 1e-6, "WARMUP_STEPS": 500, "GRAD_CLIP": 0.5, "SEQ_LEN": 20, "SEQ_LEN_MAX": 20,
        "AR_START_STEP": 0, "AR_RAMP_STEPS": 10_000, "AR_LEN_MAX": 18,
        "SS_MIDPOINT_STEP": 10_000, "SS_STEEPNESS": 4000.0, "SS_MAX_TEACHER_PROB": 0.95,
        "SS_MIN_TEACHER_PROB": 0.15, "SELF_FED_GREEDY": True, "TOKEN_NOISE": 0.0, "LATENT_NOISE": 0.0,
        "CE_WEIGHT": 0.0, "LABEL_SMOOTHING": 0.0, "NEIGHBOR_WEIGHT": 2.0, "NEIGHBOR_KERNEL": 3,
        "NEIGHBOR_EXACT_MIX": 0.3, "SEMANTIC_WEIGHT": 3.0, "ENTROPY_WEIGHT": 0.05, "ENTROPY_FLOOR": 4.5,
        "SHARPNESS_WEIGHT": 0.05, "TEMPORAL_WEIGHT": 0.05, "PERCEPTUAL_WEIGHT": 0.0,
    },
}  # fmt: skip


CONTEXT, ROLLOUT = 6, 20  # frames


# ---------------------------------------------------------------- from constants and schedules


def learning_rate(step: int) -> float:
    """Linear warm-up over WARMUP_STEPS, then cosine decay from LR to MIN_LR at STEPS."""
    if step < WARMUP_STEPS:
        return LR * (step + 1) / WARMUP_STEPS
    done = min(1.0, (step - WARMUP_STEPS) / max(1, STEPS - WARMUP_STEPS))
    return MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * done))


def sequence_length(step: int) -> int:
    """Transitions in a window: SEQ_LEN, one more every SEQ_LEN_GROW_STEPS, up to SEQ_LEN_MAX."""
    return min(max(SEQ_LEN, SEQ_LEN_MAX), SEQ_LEN + step // SEQ_LEN_GROW_STEPS)


def self_fed_length(step: int, seq_len: int) -> int:
    """`ar_len`: how many of the window's last steps may be self-fed."""
    ramp = (step - AR_START_STEP) / max(1, AR_RAMP_STEPS)
    return min(int(AR_LEN_MAX * min(1.0, max(0.0, ramp))), seq_len - 1)


def teacher_probability(step: int) -> float:
    """Probability that a self-fed step is shown the truth after all: inverse sigmoid, with ceiling and
    floor."""
    p = 1 / (1 + math.exp(min(50.0, (step - SS_MIDPOINT_STEP) / SS_STEEPNESS)))
    return min(SS_MAX_TEACHER_PROB, max(SS_MIN_TEACHER_PROB, p))


def input_config(step: int, seq_len: int, grown: int = 0) -> InputConfig:
    """What the model is shown at this step; `grown`: the `ar_len` that held-out rollouts have allowed."""
    if AR_GROWTH == "rollout":
        ar_len, teacher_prob = min(grown, seq_len - 1), SS_MIN_TEACHER_PROB
    else:
        ar_len, teacher_prob = self_fed_length(step, seq_len), teacher_probability(step)
    return InputConfig(
        ar_len=ar_len,
        teacher_prob=teacher_prob,
        sampling=SamplingConfig(greedy=SELF_FED_GREEDY, temperature=SELF_FED_TEMPERATURE),
        token_noise=TOKEN_NOISE,
        latent_noise=LATENT_NOISE,
        similar_share=SIMILAR_CODES,
        masked_decoding=MASKED_DECODING,
    )


def loss_weights() -> LossWeights:
    """The weights above; those of the other model stay 0."""
    if MODEL == "geometry":
        return LossWeights(
            ce=CE_WEIGHT,
            label_smoothing=LABEL_SMOOTHING,
            perceptual=PERCEPTUAL_WEIGHT,
            reprojection=REPROJECTION_WEIGHT,
            smoothness=SMOOTHNESS_WEIGHT,
            motion=MOTION_WEIGHT,
            disoccluded=DISOCCLUDED_WEIGHT,
            cells=LOSS_CELLS,
        )
    return LossWeights(
        ce=CE_WEIGHT,
        label_smoothing=LABEL_SMOOTHING,
        neighbor=NEIGHBOR_WEIGHT,
        neighbor_kernel=NEIGHBOR_KERNEL,
        neighbor_exact_mix=NEIGHBOR_EXACT_MIX,
        semantic=SEMANTIC_WEIGHT,
        entropy=ENTROPY_WEIGHT,
        entropy_floor=ENTROPY_FLOOR,
        sharpness=SHARPNESS_WEIGHT,
        temporal=TEMPORAL_WEIGHT,
        perceptual=PERCEPTUAL_WEIGHT,
    )


def build_model(tokenizer: Tokenizer, manifest: Manifest) -> WorldModel:
    """The untrained model that the constants describe, for these tokens."""
    t, (rows, columns) = tokenizer.config, manifest.latent_size
    if MODEL == "convgru":
        config = WorldModelConfig(t.codebook_size, rows, columns, EMBED_DIM, HIDDEN_DIM, LAYERS, KERNEL_SIZE)
        model = ConvGRUWorldModel(config, tokenizer)
        model.gradient_checkpointing = GRADIENT_CHECKPOINTING
    elif MODEL == "geometry":
        config = GeometryConfig(
            t.codebook_size, rows, columns, t.height, t.width,
            manifest.vertical_fov_degrees, manifest.camera_degrees_per_unit,
            channels=CHANNELS, coarse_channels=COARSE_CHANNELS, keyframes=KEYFRAMES, sources=SOURCES,
            prior=PRIOR,
        )  # fmt: skip
        model = GeometryWorldModel(config, tokenizer)
    else:
        raise UserError(f"MODEL={MODEL}: must be geometry or convgru")
    if MODEL == "geometry" or CODEBOOK_INIT:
        model.init_from_codebook()
    return model


# ---------------------------------------------------------------- data


class Batches:
    """An endless stream of batches, pass after pass; its `position` is all that is needed to go on.

    With several `processes`, the one of this `rank` takes its own slice of each batch, so that all together
    see the windows that one alone would see. `batch_size` counts them all. `balance`: see `sample_by_class`.
    """

    def __init__(
        self,
        clips: TokenClips,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        balance: float = 0.0,
    ):
        self.clips, self.batch_size, self.seed, self.balance = clips, batch_size, seed, balance
        self.kinds = [action_class(actions) for actions in clips.actions]
        share = batch_size // processes
        self.own = slice(rank * share, (rank + 1) * share)
        self.lengths = [len(tokens) for tokens in clips.tokens]
        self.position = {"epoch": 0, "index": 0, "seq_len": 0}
        self._windows: np.ndarray | None = None

    def restore(self, position: dict) -> None:
        """Goes on from a saved `position`."""
        self.position = dict(position)
        self._windows = None

    def draw(self, seq_len: int, epoch: int) -> np.ndarray:
        """The windows [N, 2] of a pass, in their order."""
        windows = epoch_windows(self.lengths, seq_len + 1, self.seed, epoch)
        return sample_by_class(windows, self.kinds, seq_len + 1, self.balance, self.seed, epoch)

    def shares(self, seq_len: int) -> str:
        """The share of each class of action in the data and among the windows that are drawn from it."""
        data = epoch_windows(self.lengths, seq_len + 1, self.seed, 0)
        before, after = (
            class_shares(w, self.kinds, seq_len + 1, len(CLASS_NAMES)) for w in (data, self.draw(seq_len, 0))
        )
        return ", ".join(
            f"{name} {a:.1%} -> {b:.1%}" for name, a, b in zip(CLASS_NAMES, before, after, strict=True)
        )

    def next(self, seq_len: int) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        """-> windows [B, 2], tokens [B, seq_len+1, H, W], actions [B, seq_len, 5], pose [B, seq_len+1, 5], of
        its own slice.

        A pass ends when fewer than a batch of windows is left. When `seq_len` changes, a new pass begins.
        Raises DataError if no clip is long enough for one batch.
        """
        p = self.position
        if p["seq_len"] != seq_len:
            new_pass = p["seq_len"] != 0
            p.update(epoch=p["epoch"] + new_pass, index=0, seq_len=seq_len)
            self._windows = None
        if self._windows is None:
            self._windows = self.draw(seq_len, p["epoch"])
        if p["index"] + self.batch_size > len(self._windows):
            p.update(epoch=p["epoch"] + 1, index=0)
            self._windows = self.draw(seq_len, p["epoch"])
            if len(self._windows) < self.batch_size:
                raise DataError(
                    f"{self.clips.directory}: only {len(self._windows)} windows of {seq_len} steps for a "
                    f"batch of {self.batch_size}; lower BATCH_SIZE or SEQ_LEN, or record more"
                )
        windows = self._windows[p["index"] : p["index"] + self.batch_size]
        p["index"] += self.batch_size
        windows = windows[self.own]
        return windows, *self.clips.batch(windows, seq_len + 1)

    @property
    def completion(self) -> float:
        """Per cent of the current pass that has been drawn."""
        return 100 * self.position["index"] / max(1, len(self._windows) if self._windows is not None else 0)


# ---------------------------------------------------------------- what is watched


def masked_mean(values: Tensor, mask: Tensor) -> float:
    """Mean of the values where the mask is true; NaN where it never is."""
    return float(values[mask].mean()) if mask.any() else math.nan


def diagnostics(result: WindowResult, target: Tensor, tokenizer: Tokenizer) -> dict[str, float]:
    """Numbers about the window's last prediction against its target [B, H, W]; see README for what each
    means."""
    log_probs = result.last_log_probs
    confidence = log_probs.amax(-1).exp()
    made = log_probs.argmax(-1)
    picture = tokenizer.decode(made[:1])[0]
    return {
        "entropy": float(losses.entropy(log_probs).mean()),
        "confidence_mean": float(confidence.mean()),
        "confidence_std": float(confidence.std()),
        "confidence_min": float(confidence.min()),
        "unique_codes": float(unique_codes(made).float().mean()),
        "unique_codes_target": float(unique_codes(target).float().mean()),
        "spatial_gradient": float(picture.diff(dim=1).abs().mean() + picture.diff(dim=2).abs().mean()),
        **film_strength(result.film),
    }


def film_strength(film: Tensor | None) -> dict[str, float]:
    """How far the action turns the plain model's features: mean |gamma| and |beta|."""
    if film is None:
        return {}
    return {f"film_{name}": float(film[..., i, :].abs().mean()) for i, name in enumerate(("gamma", "beta"))}


@torch.no_grad()
def action_sensitivity(model: WorldModel, tokens: Tensor, actions: Tensor, pose: Tensor) -> float:
    """How much the next frame's probabilities change when the last action is another sample's: mean total
    variation distance over the cells, 0 (ignored) to 1. Seen frames and all earlier actions stay the same."""
    state = model.init_state(len(tokens), tokens.device)
    for t in range(actions.shape[1] - 1):
        _, state = model.predict(tokens[:, t], actions[:, t], state, true_pose=pose[:, t])

    def probabilities(last: Tensor) -> Tensor:
        prediction, _ = model.predict(tokens[:, -2], last, state, true_pose=pose[:, -2])
        return model.logits(prediction).float().softmax(1)

    before, after = probabilities(actions[:, -1]), probabilities(actions[:, -1].roll(1, 0))
    return float((before - after).abs().sum(1).mean() / 2)


@torch.no_grad()
def validate(model: WorldModel, clips: TokenClips, seq_len: int, tokenizer: Tokenizer, dtype: torch.dtype):
    """Over fixed held-out windows, teacher-forced: bits per token, accuracy, accuracy of the cells that come
    into view (where poses are known), and a picture. Touches no random state, so that a run is the same with
    more or fewer validations."""
    device = next(model.parameters()).device
    windows = epoch_windows([len(t) for t in clips.tokens], seq_len + 1, SEED, 0)[:VAL_WINDOWS]
    nats, right, cells, picture = 0.0, 0, 0, None
    disoccluded_right, disoccluded_cells = 0, 0
    model.eval()
    for i in range(0, len(windows), BATCH_SIZE):
        part = windows[i : i + BATCH_SIZE]
        tokens, actions, pose = (x.to(device) for x in clips.batch(part, seq_len + 1))
        state = model.init_state(len(tokens), device)
        with autocast(device, dtype):
            for t in range(seq_len):
                prediction, state = model.predict(tokens[:, t], actions[:, t], state, true_pose=pose[:, t])
                log_probs, target = losses.log_probabilities(model.logits(prediction)), tokens[:, t + 1]
                nats += float(losses.cross_entropy(log_probs, target).sum()) * target[0].numel()
                good = log_probs.argmax(-1) == target
                right += int(good.sum())
                cells += target.numel()
                new = camera.disoccluded_mask(
                    pose[:, t], pose[:, t + 1], *target.shape[1:], clips.manifest.vertical_fov_degrees
                )
                disoccluded_right += int((good & new).sum())
                disoccluded_cells += int(new.sum())
        if picture is None:
            picture = truth_and_prediction(tokenizer, tokens[:4, -1], log_probs[:4].argmax(-1))
    found = {"val_bits_per_token": bits_per_token(nats, cells), "val_accuracy": right / cells}
    if disoccluded_cells:
        found["val_disoccluded_accuracy"] = disoccluded_right / disoccluded_cells
    if VAL_ROLLOUTS:
        found["val_rollout_psnr"] = rollout_psnr(model, clips, tokenizer, dtype)
    model.train()
    return found, picture


@torch.no_grad()
def rollout_psnr(model: WorldModel, clips: TokenClips, tokenizer: Tokenizer, dtype: torch.dtype) -> float:
    """PSNR in dB of ROLLOUT generated frames after CONTEXT seen ones against the decoded truth, mean over all
    frames of VAL_ROLLOUTS fixed held-out windows; NaN where no clip is long enough."""
    span = CONTEXT + ROLLOUT
    windows = epoch_windows([len(t) for t in clips.tokens], span, SEED, 0)[:VAL_ROLLOUTS]
    if not len(windows):
        return math.nan
    tokens, actions, pose = clips.batch(windows, span)
    rollout = Rollout(model, PLAY, SEED, dtype)
    rollout.prime(tokens[:, :CONTEXT], actions[:, : CONTEXT - 1], pose[:, :CONTEXT])
    found = []
    for t in range(CONTEXT, CONTEXT + ROLLOUT):
        made = rollout.step(actions[:, t - 1])
        pictures = (tokenizer.decode(x.to(made.device)) for x in (made, tokens[:, t]))
        found.append(psnr(*(p.cpu() for p in pictures)).mean())
    return float(torch.stack(found).mean())


@torch.no_grad()
def truth_and_prediction(tokenizer: Tokenizer, truth: Tensor, made: Tensor) -> np.ndarray:
    """Decoded truth in the left column, prediction in the right: [N, H, W] tokens each -> one picture."""
    pictures = to_uint8(tokenizer.decode(torch.stack([truth, made], 1).flatten(0, 1)))
    return grid(list(pictures.numpy()), columns=2)


class SpikeWatch:
    """Reports steps whose loss or gradient norm is SPIKE_FACTOR times the mean of the last 100."""

    def __init__(self, path: Path, clips: TokenClips):
        self.path, self.clips = path, clips
        self.recent = {"loss": deque(maxlen=100), "grad_norm": deque(maxlen=100)}

    def look(self, step: int, loss: float, grad_norm: float, windows: np.ndarray, terms: dict) -> None:
        """Prints a spike and appends it, with the clips of its batch, to spikes.jsonl."""
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            past = self.recent[name]
            if len(past) >= 20 and not value <= SPIKE_FACTOR * (sum(past) / len(past)):
                where = [f"{self.clips.entries[clip].name}:{start}" for clip, start in windows]
                row = {"step": step, "what": name, "value": value, "mean": sum(past) / len(past),
                       "terms": {k: float(v) for k, v in terms.items()}, "windows": where}  # fmt: skip
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
                tqdm.write(
                    f"step {step}: {name} {value:.3g} against a mean of {row['mean']:.3g}; see {self.path}"
                )
            if math.isfinite(value):
                past.append(value)


# ---------------------------------------------------------------- the run


def main() -> int:
    """The command line; returns the exit status."""
    return run_script(run)


def run() -> None:
    """Trains until STEPS, or until SIGINT/SIGTERM, which save. Raises UserError."""
    if distributed.rank() > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    constants = settings.apply(globals(), recipes=RECIPES)
    if BATCH_SIZE % distributed.size():
        raise UserError(
            f"BATCH_SIZE={BATCH_SIZE} is the whole batch and cannot be split evenly over "
            f"{distributed.size()} processes; give a multiple of {distributed.size()}"
        )
    device = pick_device(distributed.start(DEVICE))
    dtype = amp_dtype(device, PRECISION)
    print(f"precision: {dtype}")
    if distributed.size() > 1:
        print(f"processes: {distributed.size()}, {BATCH_SIZE // distributed.size()} windows each")
    train(constants, device, dtype)
    distributed.stop()


def train(constants: dict, device: torch.device, dtype: torch.dtype) -> None:
    """The training run; `constants` go into the checkpoints and the log.

    Each of several processes runs all of it but what is under `first`, which the first does for all.
    """
    first = distributed.rank() == 0
    out = Path(OUT_DIR)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(VQVAE_CKPT, device)
    clips = TokenClips(DATA_DIR, "train", tokenizer.fingerprint, progress=True)
    held_out = TokenClips(DATA_DIR, "val", tokenizer.fingerprint)
    manifest = clips.manifest
    print(
        f"data: {clips.frames} train frames in {len(clips.entries)} clips, {held_out.frames} held out in "
        f"{len(held_out.entries)}; {sum(t.nbytes for t in clips.tokens) / 1e6:.0f} MB of tokens in RAM"
    )
    model = build_model(tokenizer, manifest).to(device)
    config = model.config
    print(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {config}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    distance = perceptual_distance(PERCEPTUAL).to(device) if PERCEPTUAL_WEIGHT else None
    step_loss = StepLoss(tokenizer, distance, loss_weights())
    batches = Batches(clips, BATCH_SIZE, SEED, distributed.rank(), distributed.size(), BALANCE)
    if BALANCE:
        print(f"windows by action: {batches.shares(sequence_length(0))}")
    step, best, seconds = 0, math.inf, 0.0
    best_rollout, grown = -math.inf, AR_STEP
    metrics: dict[str, float] = {}  # of the last validation

    last = out / "last.pt"
    if RESUME and last.is_file():
        content = checkpoint.load(last, WORLD_KIND)
        check_tokenizer(content["tokenizer"], tokenizer.fingerprint, VQVAE_CKPT, str(last))
        checkpoint.check_config(content, config, last)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        batches.restore(content["position"])
        checkpoint.restore_rng(content["rng"], device)
        step, best, seconds = content["step"], content["best"], content["seconds"]
        best_rollout, grown = content["best_rollout"], content["grown"]
        metrics = content["metrics"]
        print(f"resumed {last} at step {step}")
    elif INIT_FROM:
        source, content = load_world_model(INIT_FROM, tokenizer)
        checkpoint.check_config(content, config, INIT_FROM)
        model.load_state_dict(source.state_dict())
        print(f"weights from {INIT_FROM}")
    if MODEL == "geometry" and not step and not INIT_FROM:
        error = pretrain_motion(model, clips, MOTION_STEPS, SEED)
        print(f"displacement predicted from actions alone: mean error {error:.3f} m a frame")
    distributed.share_weights(model)

    log = RunLog(out, WANDB, WANDB_PROJECT, constants) if first else None
    spikes = SpikeWatch(out / "spikes.jsonl", clips)
    # What play has to know about the recordings.
    names = ("fps", "camera_degrees_per_unit", "vertical_fov_degrees", "action_names")
    data = {name: getattr(manifest, name) for name in names}

    def save(name: str) -> None:
        content = world_content(
            model,
            constants=constants,
            data=data,
            step=step,
            best=best,
            best_rollout=best_rollout,
            grown=grown,
            seconds=seconds,
            metrics=metrics,
            position=dict(batches.position),
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
            rng=checkpoint.rng_state(device),
        )
        checkpoint.save(out / name, content)

    stop = StopRequest()
    sums: dict[str, list[float]] = {}
    frames = 0
    clock = saved = time.monotonic()
    model.train()
    bar = tqdm(total=STEPS, initial=step, unit="step", mininterval=2, disable=not first)
    # A signal to one process ends all of them after the same step.
    while step < STEPS and not distributed.any_process(bool(stop), device):
        seq_len = sequence_length(step)
        inputs = input_config(step, seq_len, grown)
        distributed.reseed(SEED, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        windows, *batch = batches.next(seq_len)
        tokens, actions, pose = (x.to(device, non_blocking=True) for x in batch)

        # forward, backward, clip, step
        with autocast(device, dtype):
            if MODEL == "geometry":
                result = geometry_window_loss(model, step_loss, tokens, actions, pose, inputs)
            else:
                result = convgru_window_loss(model, step_loss, tokens, actions, inputs)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(result.loss).backward()
        distributed.average_gradients(model)
        scaler.unscale_(optimizer)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP))
        scaler.step(optimizer)
        scaler.update()
        step += 1
        frames += BATCH_SIZE * seq_len
        bar.update()
        if not first:
            continue

        # watch: losses are those of the first process's slice of the batch
        loss = float(result.loss.detach())
        spikes.look(step, loss, grad_norm, windows, result.terms)
        row = {"loss": loss, "grad_norm": grad_norm,
               "loss_teacher": masked_mean(result.step_loss, ~result.self_fed),
               "loss_self_fed": masked_mean(result.step_loss, result.self_fed),
               **{f"loss_{name}": float(value) for name, value in result.terms.items()}}  # fmt: skip
        for name, value in row.items():
            if not math.isnan(value):
                sums.setdefault(name, []).append(value)
        if step % LOG_STEPS == 0:
            elapsed = time.monotonic() - clock
            row = {name: sum(values) / len(values) for name, values in sums.items()}
            if "loss_self_fed" in row:
                row["loss_gap"] = row["loss_self_fed"] - row["loss_teacher"]
            row |= diagnostics(result, tokens[:, -1], tokenizer)
            row |= {"teacher_prob": inputs.teacher_prob, "seq_len": seq_len, "ar_len": inputs.ar_len}
            row |= {"lr": learning_rate(step - 1), "frames_per_s": frames / elapsed}
            row |= {"epoch": batches.position["epoch"], "epoch_completion": batches.completion}
            if step % SENSITIVITY_STEPS < LOG_STEPS:
                with autocast(device, dtype):
                    row["action_sensitivity"] = action_sensitivity(model, tokens, actions, pose)
            log.write(step, row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", fps=f"{row['frames_per_s']:.0f}")
            sums.clear()
            seconds, frames, clock = seconds + elapsed, 0, time.monotonic()
        if step % PICTURE_STEPS == 0:
            picture = truth_and_prediction(tokenizer, tokens[:4, -1], result.last_log_probs[:4].argmax(-1))
            save_image(out / f"train_{step:06d}.png", picture)
            log.picture(step, "train truth | prediction", picture)
        if step % VAL_STEPS == 0 or step == STEPS:
            metrics, picture = validate(model, held_out, SEQ_LEN, tokenizer, dtype)
            log.write(step, metrics)
            save_image(out / f"val_{step:06d}.png", picture)
            log.picture(step, "val truth | prediction", picture)
            tqdm.write(f"step {step}: " + json.dumps({k: round(v, 4) for k, v in metrics.items()}))
            rollout = metrics.get("val_rollout_psnr", math.nan)
            if rollout > best_rollout:
                best_rollout, grown = rollout, min(grown + AR_STEP, AR_LEN_MAX)
            if metrics["val_bits_per_token"] < best:
                best = metrics["val_bits_per_token"]
                save("best.pt")
        if step % SAVE_STEPS == 0:
            save(f"step_{step:06d}.pt")
            for old in sorted(out.glob("step_*.pt"))[:-KEEP]:
                old.unlink()
        if step % SAVE_STEPS == 0 or time.monotonic() - saved > 60 * SAVE_MINUTES:
            save("last.pt")
            saved = time.monotonic()
    bar.close()
    if first:
        save("last.pt")
        log.close()
    stop.release()
    print(f"{'finished' if step >= STEPS else 'stopped'} at step {step}; weights in {out}")


if __name__ == "__main__":
    raise SystemExit(main())
