"""Section "train" of benchmark.py: one optimizer step of train.py's default model, on recorded windows."""

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
from model_geometry import GeometryConfig, GeometryWorldModel
from rollout.context import World
from rollout.sampling import SamplingConfig
from runtime.device import amp_dtype, autocast
from training.geometry_window import geometry_window_loss
from training.window_parts import InputConfig, LossWeights, StepLoss
from vq_vae.tokenizer import Tokenizer, load_tokenizer

QUICK_WINDOWS = 2  # of a batch, with --quick
# Defaults of train.py; tests/test_benchmark.py compares them.
WINDOWS, TRANSITIONS = 8, 12
LR, BETAS, WEIGHT_DECAY, GRAD_CLIP = 1e-3, (0.9, 0.95), 0.01, 1.0
WEIGHTS = LossWeights(
    ce=1.0, label_smoothing=0.05, reprojection=5.0, smoothness=0.01, motion=2.0, disoccluded=3.0, cells=0.3
)
TEACHER_FORCED = InputConfig(
    ar_len=0, teacher_prob=0.15, sampling=SamplingConfig(temperature=0.9), token_noise=0.15,
    similar_share=0.7, masked_decoding=0.5,
)  # fmt: skip
# Each window is self-fed in its last 0..8 steps: the end of train.py's curriculum.
INPUTS = {"teacher_forced": TEACHER_FORCED, "self_fed": replace(TEACHER_FORCED, ar_len=8)}

MATMUL_SIZES = {"cuda": (2048, 4096, 8192), "mps": (1024, 2048, 4096), "cpu": (512, 1024, 2048)}


class TrainingStep:
    """The geometry model and one batch; each call is a whole step of train.py's loop on that batch."""

    def __init__(
        self, inputs: InputConfig, windows: int, tokenizer: Tokenizer, clips: TokenClips, dtype: torch.dtype
    ):
        """`windows` recorded windows of TRANSITIONS transitions; a small data set repeats its windows.

        Raises DataError if no clip is long enough.
        """
        found = epoch_windows([len(tokens) for tokens in clips.tokens], TRANSITIONS + 1, 0, 0)
        if not len(found):
            raise DataError(
                f"{clips.directory}: no clip has {TRANSITIONS + 1} frames, the length of a training window; "
                "give other token files with --data_dir"
            )
        device, size = tokenizer.device, tokenizer.config
        batch = clips.batch(np.resize(found, (windows, 2)), TRANSITIONS + 1)
        self.batch: tuple[Tensor, ...] = tuple(part.to(device) for part in batch)
        self.inputs, self.device, self.dtype = inputs, device, dtype
        self.frames = windows * TRANSITIONS  # predicted in one step
        config = GeometryConfig(
            size.codebook_size, *size.latent_size, size.height, size.width,
            clips.manifest.vertical_fov_degrees, clips.manifest.camera_degrees_per_unit,
        )  # fmt: skip
        self.model = GeometryWorldModel(config, tokenizer).to(device)
        self.model.init_from_codebook()
        self.step_loss = StepLoss(tokenizer, None, WEIGHTS)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def __call__(self) -> None:
        """Forward, backward, gradient clipping, optimizer."""
        with autocast(self.device, self.dtype):
            loss = geometry_window_loss(self.model, self.step_loss, *self.batch, self.inputs).loss
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
    tokenizer = load_tokenizer(config.vqvae_ckpt)
    clips = TokenClips(config.data_dir, "all", tokenizer.fingerprint)
    dtype = amp_dtype(tokenizer.device, config.precision)
    step = TrainingStep(INPUTS[kind], config.windows, tokenizer, clips, dtype)
    step()
    step()


def peak_megabytes(config: BenchmarkConfig, kind: str, step: TrainingStep) -> float | None:
    """Peak memory of a training step in MB; None where the device does not report it.

    CUDA: allocated memory, the tokenizer and both timed models included. CPU: resident memory of a new
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
    """The training step, teacher-forced and self-fed: frames/s, steps/hour, peak memory, MFU.

    MFU (model FLOPs utilization): FLOP/s of the step over those of the fastest matrix product measured, both
    in the same precision. Only the teacher-forced step has one: the work of a self-fed step is random.
    """
    device, dtype, sizes = world.device, world.dtype, MATMUL_SIZES[world.device.type]
    torch.manual_seed(0)
    steps = {
        kind: TrainingStep(inputs, config.windows, world.tokenizer, clips, dtype)
        for kind, inputs in INPUTS.items()
    }
    flops = count_flops(steps["teacher_forced"])
    products = {f"matmul{size}": matrix_product(size, device, dtype) for size in sizes}
    seconds = time_alternately(steps | products, config.repeats, device, "train")
    best = max(2 * size**3 / np.median(seconds[f"matmul{size}"]) for size in sizes)
    metrics: Metrics = {"train.flops_per_step": flops, "train.matmul_flops_per_s": best}
    rows = []
    for kind, step in steps.items():
        median = np.median(seconds[kind])
        row = {
            "frames_per_s": step.frames / median,
            "steps_per_hour": 3600 / median,
            "mfu": flops / median / best if kind == "teacher_forced" else None,
            "peak_mb": peak_megabytes(config, kind, step),
        }
        metrics |= {f"train.{kind}.{key}": value for key, value in row.items() if value is not None}
        mfu = None if row["mfu"] is None else f"{row['mfu']:.1%}"
        rows.append([kind, row["frames_per_s"], row["steps_per_hour"], mfu, row["peak_mb"]])
    title = f"training step, {config.windows} windows of {TRANSITIONS} transitions"
    print_table([title, "frames/s", "steps/hour", "MFU", "peak MB"], rows)
    print(
        f"\nA teacher-forced step takes {flops / 1e12:.3g} TFLOP; the fastest matrix product reaches "
        f"{best / 1e12:.3g} TFLOP/s."
    )
    return metrics
