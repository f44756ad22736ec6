"""Section "train" of benchmark.py: an optimizer step of train.py's default model, on windows and on pairs."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarking.measure import BenchmarkConfig, Metrics, peak_resident, print_table, time_alternately
from dataset.token_files import DataError
from dataset.windows import TokenClips, epoch_windows
from depth.predictor import DepthPredictor, load_depth
from model_geometry import GeometryConfig, GeometryWorldModel
from rollout.context import World
from rollout.sampling import SamplingConfig
from runtime.device import amp_dtype, autocast
from training.geometry_window import geometry_window_loss, pair_loss
from training.pair_pool import PairPool
from training.pairs import SCENE_PAIRS, PairConfig, make_pairs
from training.window_parts import InputConfig, LossWeights, StepLoss
from vq_vae.tokenizer import Tokenizer, load_tokenizer

QUICK_WINDOWS = 2  # of a batch, with --quick
# Defaults of train.py; tests/test_benchmark.py compares them.
WINDOWS, TRANSITIONS = 8, 12
PAIRS, PAIR_PASSES, RECORDED_DEPTH = 32, 4, 0.3  # pairs for WINDOWS windows; how often each is used
LR, BETAS, WEIGHT_DECAY, GRAD_CLIP = 1e-3, (0.9, 0.95), 0.01, 1.0
WEIGHTS = LossWeights(ce=1.0, label_smoothing=0.0, disoccluded=3.0, magnified=2.0, cells=0.3)
TEACHER_FORCED = InputConfig(
    ar_len=0, teacher_prob=0.15, sampling=SamplingConfig(temperature=0.9), token_noise=0.15,
    similar_share=0.7, masked_decoding=0.1,
)  # fmt: skip
# Each window is self-fed in its last 0..8 steps: the end of train.py's curriculum.
INPUTS = {"teacher_forced": TEACHER_FORCED, "self_fed": replace(TEACHER_FORCED, ar_len=8)}
KINDS = (*INPUTS, "pairs")  # of steps

MATMUL_SIZES = {"cuda": (2048, 4096, 8192), "mps": (1024, 2048, 4096), "cpu": (512, 1024, 2048)}


class TrainingStep:
    """The geometry model and one batch; each call is a whole step of train.py's loop on that batch."""

    def __init__(
        self,
        kind: str,
        windows: int,
        tokenizer: Tokenizer,
        depth: DepthPredictor,
        clips: TokenClips,
        dtype: torch.dtype,
    ):
        """`kind` is one of KINDS. `windows` recorded windows of TRANSITIONS transitions, or as many pairs as
        train.py takes for so many windows; a small data set repeats its windows.

        Raises DataError if no clip is long enough, or none has poses for pairs.
        """
        found = epoch_windows([len(tokens) for tokens in clips.tokens], TRANSITIONS + 1, 0, 0)
        if not len(found):
            raise DataError(
                f"{clips.directory}: no clip has {TRANSITIONS + 1} frames, the length of a training window; "
                "give other token files with --data_dir"
            )
        device, size = tokenizer.device, tokenizer.config
        self.kind, self.device, self.dtype = kind, device, dtype
        config = GeometryConfig(
            size.codebook_size, *size.latent_size, size.height, size.width,
            clips.manifest.vertical_fov_degrees, clips.manifest.camera_degrees_per_unit,
        )  # fmt: skip
        self.model = GeometryWorldModel(config, tokenizer, depth).to(device)
        self.model.init_from_codebook()
        self.pool, self.batch = None, ()
        if kind == "pairs":
            inputs = TEACHER_FORCED
            self.frames = max(1, windows * PAIRS // WINDOWS)  # predicted in one step
            pair_config = PairConfig(
                batch=self.frames,
                size=self.frames,
                passes=PAIR_PASSES,
                recorded_depth=RECORDED_DEPTH,
                token_noise=inputs.token_noise,
                similar_share=inputs.similar_share,
            )
            self.pool = PairPool(self.model, clips, pair_config, seed=0)
            self.batch = self.pool.next()
        else:
            self.frames = windows * TRANSITIONS
            batch = clips.batch(np.resize(found, (windows, 2)), TRANSITIONS + 1)
            self.batch = tuple(part.to(device) for part in batch)
        self.step_loss = StepLoss(tokenizer, None, WEIGHTS)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def loss(self) -> Tensor:
        """The loss of the batch."""
        if self.kind == "pairs":
            masked_decoding = TEACHER_FORCED.masked_decoding
            return pair_loss(self.model, self.step_loss, *self.batch, masked_decoding).loss
        return geometry_window_loss(self.model, self.step_loss, *self.batch, INPUTS[self.kind]).loss

    def make_scene(self) -> None:
        """Makes the SCENE_PAIRS pairs of one scene, as `PairPool.make_round` does for each of its scenes."""
        rng = np.random.default_rng(0)
        make_pairs(self.model, self.pool.clips, self.pool.draw_scene(rng), self.pool.config, rng)

    def __call__(self) -> None:
        """Forward, backward, gradient clipping, optimizer."""
        with autocast(self.device, self.dtype):
            loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call, backward included."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matrix_product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A product of two random matrices [size, size]."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return lambda: a @ b


def resident_bytes() -> int:
    """Resident memory of this process, in bytes."""
    return psutil.Process().memory_info().rss


def run_two_steps(config: BenchmarkConfig, kind: str) -> None:
    """Loads the data and runs two steps; for a process of its own, whose memory is polled.

    The optimizer's state is allocated in the first step, so only the second one has all of it.
    """
    tokenizer, depth = load_tokenizer(config.vqvae_ckpt), load_depth(config.depth_ckpt)
    clips = TokenClips(config.data_dir, "all", tokenizer.fingerprint)
    dtype = amp_dtype(tokenizer.device, config.precision)
    step = TrainingStep(kind, config.windows, tokenizer, depth, clips, dtype)
    step()
    step()


def peak_megabytes(config: BenchmarkConfig, kind: str, step: TrainingStep) -> float | None:
    """Peak memory of a training step in MB; None where the device does not report it.

    CUDA: allocated memory, the tokenizer and all timed models included. CPU: resident memory of a new
    process, less what it holds after its imports.
    """
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
        step()
        return torch.cuda.max_memory_allocated(step.device) / 1e6
    if step.device.type != "cpu":
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        process = psutil.Process(pool.submit(os.getpid).result())
        before = pool.submit(resident_bytes).result()
        steps = pool.submit(run_two_steps, config, kind)
        peak = peak_resident(process, lambda: not steps.done())
        steps.result()
    return (peak - before) / 1e6


def bench_train(config: BenchmarkConfig, world: World, clips: TokenClips) -> Metrics:
    """The training step, teacher-forced, self-fed and on pairs: frames/s, steps/hour, peak memory, MFU.

    A step on pairs includes its share of the time in which they are made: each pair is used PAIR_PASSES
    times. MFU (model FLOPs utilization): FLOP/s of the step over those of the fastest matrix product
    measured, both in the same precision. Only the teacher-forced step has one: the work of a self-fed step is
    random.
    """
    device, dtype, sizes = world.device, world.dtype, MATMUL_SIZES[world.device.type]
    torch.manual_seed(0)
    depth = load_depth(config.depth_ckpt, device)
    steps = {kind: TrainingStep(kind, config.windows, world.tokenizer, depth, clips, dtype) for kind in KINDS}
    flops = count_flops(steps["teacher_forced"])
    products = {f"matmul{size}": matrix_product(size, device, dtype) for size in sizes}
    making = {"make_pairs": steps["pairs"].make_scene}
    seconds = time_alternately(steps | making | products, config.repeats, device, "train")
    best = max(2 * size**3 / np.median(seconds[f"matmul{size}"]) for size in sizes)
    pairs_per_s = SCENE_PAIRS / np.median(seconds["make_pairs"])
    metrics: Metrics = {
        "train.flops_per_step": flops,
        "train.matmul_flops_per_s": best,
        "train.pairs.made_per_s": pairs_per_s,
    }
    rows = []
    for kind, step in steps.items():
        median = np.median(seconds[kind])
        if kind == "pairs":
            median += step.frames / PAIR_PASSES / pairs_per_s
        row = {
            "frames_per_s": step.frames / median,
            "steps_per_hour": 3600 / median,
            "mfu": flops / median / best if kind == "teacher_forced" else None,
            "peak_mb": peak_megabytes(config, kind, step),
        }
        metrics |= {f"train.{kind}.{key}": value for key, value in row.items() if value is not None}
        mfu = None if row["mfu"] is None else f"{row['mfu']:.1%}"
        rows.append([kind, row["frames_per_s"], row["steps_per_hour"], mfu, row["peak_mb"]])
    title = f"training step, {config.windows} windows of {TRANSITIONS} transitions, or {step.frames} pairs"
    print_table([title, "frames/s", "steps/hour", "MFU", "peak MB"], rows)
    print(
        f"\n{pairs_per_s:.3g} pairs are made per second, each is used {PAIR_PASSES} times; included above. "
        f"A teacher-forced step takes {flops / 1e12:.3g} TFLOP; the fastest matrix product reaches "
        f"{best / 1e12:.3g} TFLOP/s."
    )
    return metrics
