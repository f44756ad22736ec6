#!/usr/bin/env python3
"""How fast is it, and how far from what the hardware can do?

    python benchmark.py                         # everything, about eight minutes on two CPU cores
    python benchmark.py train --model v4.5.2    # one part: train, data or play
    python benchmark.py --quick

train: the earlier system's training step, ours against a plain implementation (`reference_step`), against the
device's own speed at multiplying matrices, and with its sizes and number of processes; the geometry model's.
data: the loader against opening a file for each sample; the stages of preprocessing.
play: one whole step, action to picture on the screen, and its parts; the time to the first frame.

What is compared runs in turn, A B A B ..., in one process, and medians are taken: a noisy moment of the
machine then hits all alike. Prints tables in Markdown and writes outputs/benchmark.json: `metrics` (flat) and
`meta`.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarking.loading import bench_data
from benchmarking.measure import Metrics, Task, in_turn, name_of, random_batch, run_python, table
from benchmarking.play import bench_play
from dataset.token_files import SAMPLE_TOKENS, ClipEntry, Manifest, write_token_file
from model_convGru import ConvGRUWorldModel, WorldModelConfig
from model_geometry import GeometryConfig, GeometryWorldModel
from rollout.context import World, load_world
from rollout.sampling import SamplingConfig
from rollout.world_model import SHIPPED_WORLD, architecture_of
from runtime.config import positive_int
from runtime.device import autocast
from runtime.errors import UserError, run_script
from runtime.provenance import ROOT, command_line, commit, machine, shown, versions, write_json
from training.convgru_window import convgru_window_loss
from training.geometry_window import geometry_window_loss
from training.window import InputConfig, LossWeights, StepLoss
from vq_vae.tokenizer import SHIPPED_TOKENIZER, Tokenizer, load_tokenizer

REPEATS, QUICK_REPEATS = 5, 2
# The recipe v4.5.2 of train.py at its step 10,000, where half of the last 18 steps are self-fed.
WEIGHTS = LossWeights(
    ce=0.0, neighbor=2.0, neighbor_kernel=3, neighbor_exact_mix=0.3, semantic=3.0, entropy=0.05,
    entropy_floor=4.5, sharpness=0.05, temporal=0.05,
)  # fmt: skip
AR_LEN, TEACHER_PROB, LR, GRAD_CLIP = 18, 0.5, 3e-5, 0.5
# Sizes of the first world that shipped; train.py's default step.
SMALL_SIZE = {"embed_dim": 96, "hidden_dim": 96, "layers": 3}
GEOMETRY_STEP = (8, 12)  # windows, transitions
GEOMETRY_WEIGHTS = LossWeights(
    label_smoothing=0.05, reprojection=5.0, smoothness=0.01, motion=2.0, disoccluded=3.0, cells=0.3
)
FULL_SIZE = {"embed_dim": 256, "hidden_dim": 384, "layers": 6}  # of that recipe
WINDOWS, QUICK_WINDOWS = 16, 2  # in a batch: the earlier system's
VARIED = 4  # windows on a CPU where one size is changed at a time, for time and memory
FEWER, ROOMY = 4, 16e9  # in a batch where less memory than this is free, bytes
TRANSITIONS, QUICK_TRANSITIONS = 20, 10  # in a window
# What is varied, one at a time; --quick takes the first two of each.
SCALING = {"windows": (1, 4, 16, 32), "transitions": (5, 10, 20, 40), "hidden": (64, 128, 256)}
MATMUL = {"cuda": (2048, 4096, 8192), "mps": (1024, 2048, 4096), "cpu": (512, 1024, 2048)}  # sides
PROCESSES, RUN_STEPS, RUN_TRANSITIONS = (1, 2), 12, 10  # of the runs of train.py


# ---------------------------------------------------------------- train: ours and a plain one


def reference_step(
    model: ConvGRUWorldModel,
    tokenizer: Tokenizer,
    tokens: Tensor,
    actions: Tensor,
    ar_len: int,
    teacher_prob: float,
) -> Tensor:
    """The v4.5.2 step written out plainly: tokens [B, T+1, H, W], actions [B, T, A] -> scalar loss.

    Frame after frame is embedded and modulated by itself, and each term of the loss takes its own softmax.
    Same formulas as training.convgru_window_loss, same random draws, same gradients.
    """
    steps = actions.shape[1]
    state = logits = previous = None
    total = 0.0
    for t in range(steps):
        seen = tokens[:, t]
        if t >= steps - ar_len and logits is not None:
            own = torch.rand(len(tokens), device=tokens.device) >= teacher_prob
            seen = torch.where(own[:, None, None], logits.argmax(1), seen)
        logits, state = model.step(seen, actions[:, t], state)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = logits.float().contiguous()  # [B, V, H, W]
            total = total + reference_loss(logits, tokens[:, t + 1], previous, tokenizer.codebook)
        previous = logits.detach()
    return total / steps


def reference_loss(logits: Tensor, target: Tensor, previous: Tensor | None, codebook: Tensor) -> Tensor:
    """One step: logits [B, V, H, W], target [B, H, W], logits of the step before, codebook [V, D]."""
    height, width = target.shape[1:]
    # Any code that the target has in the 3x3 cells around is right; mixed with the exact cross-entropy.
    around = F.pad(target[:, None].float(), (1, 1, 1, 1), mode="replicate").long()
    near = torch.zeros_like(logits, dtype=torch.bool)
    for row in range(3):
        for column in range(3):
            near.scatter_(1, around[:, :, row : row + height, column : column + width], True)
    neighbor = -(logits.softmax(1) * near).sum(1).log().mean()
    loss = 2.0 * (0.3 * F.cross_entropy(logits, target) + 0.7 * neighbor)
    expected = torch.einsum("bvhw,vd->bhwd", logits.softmax(1), codebook)
    loss = loss + 3.0 * F.mse_loss(expected, codebook[target])
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    loss = loss + 0.05 * F.relu(4.5 - entropy).mean()
    loss = loss + 0.05 * (1 - logits.softmax(1).amax(1)).mean()
    if previous is not None:
        moved = previous.softmax(1) * (previous.log_softmax(1) - logits.log_softmax(1))
        loss = loss + 0.05 * moved.sum(1).mean()
    return loss


def training_step(which: str, task: Task, tokenizer: Tokenizer, dtype: torch.dtype) -> Callable[[], None]:
    """A whole training step, "ours" or "reference", on one batch: forward, backward, clip, optimizer."""
    device = tokenizer.codebook.device
    tokens, actions = random_batch(task, device)
    model = ConvGRUWorldModel(task.config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    terms = StepLoss(tokenizer, None, WEIGHTS)
    inputs = InputConfig(min(AR_LEN, task.transitions - 1), TEACHER_PROB, SamplingConfig(greedy=True))

    def step() -> None:
        with autocast(device, dtype):
            if which == "ours":
                loss = convgru_window_loss(model, terms, tokens, actions, inputs).loss
            else:
                loss = reference_step(model, tokenizer, tokens, actions, inputs.ar_len, TEACHER_PROB)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        scaler.step(optimizer)
        scaler.update()

    return step


def flops(call: Callable[[], object]) -> int:
    """Floating point operations of the matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def training_flops(task: Task, tokenizer: Tokenizer) -> int:
    """FLOPs of forward and backward where every step is shown the truth, without the optimizer."""
    device = tokenizer.codebook.device
    tokens, actions = random_batch(task, device)
    model, terms = ConvGRUWorldModel(task.config).to(device), StepLoss(tokenizer, None, WEIGHTS)
    return flops(lambda: convgru_window_loss(model, terms, tokens, actions, InputConfig()).loss.backward())


def matmul(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A product of two square matrices."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return lambda: a @ b


def resident() -> int:
    """Bytes of memory that this process holds."""
    return psutil.Process().memory_info().rss


def two_steps(which: str, task: Task, vqvae_ckpt: Path, dtype: torch.dtype) -> None:
    """For a process of its own, whose memory is watched: the second step finds optimizer states in place."""
    step = training_step(which, task, load_tokenizer(vqvae_ckpt), dtype)
    step()
    step()


def peak_memory(which: str, task: Task, world: World, vqvae_ckpt: Path) -> float | None:
    """MB that a training step takes at most; None where the device does not tell."""
    if world.device.type == "cuda":
        step = training_step(which, task, world.tokenizer, world.dtype)
        torch.cuda.reset_peak_memory_stats(world.device)
        before = torch.cuda.memory_allocated(world.device)
        step()
        return (torch.cuda.max_memory_allocated(world.device) - before) / 1e6
    if world.device.type != "cpu":
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        process = psutil.Process(pool.submit(os.getpid).result())
        before = peak = pool.submit(resident).result()
        steps = pool.submit(two_steps, which, task, vqvae_ckpt, world.dtype)
        while not steps.done():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)
        steps.result()
    return (peak - before) / 1e6


def bench_train(args: argparse.Namespace, world: World, notes: list[str]) -> Metrics:
    """The training step: against the plain one and the hardware; over sizes and processes; geometry's."""
    plain = plain_config(world)
    configs = {"plain": plain, "v4.5.2": replace(plain, **FULL_SIZE)}
    tasks = {name: Task(config, args.windows, args.transitions) for name, config in configs.items()}
    found: Metrics = {}
    both = world.device.type == "cuda" and args.model == "plain"
    for name in tasks if both else [args.model]:
        found |= against_reference(args, world, name, tasks[name])
    if args.model == "plain":
        found |= geometry(args, world)
        found |= scaling(args, world, tasks["plain"], found.get("train.plain.ours.peak_mb", 0.0), notes)
        found |= with_processes(args, world, notes)
    return found


def plain_config(world: World) -> WorldModelConfig:
    """The size of the earlier system's model that is timed: the world's own if it is one, else SMALL_SIZE."""
    config = world.model.config
    if isinstance(config, WorldModelConfig):
        return config
    grid = config.latent_height, config.latent_width
    return WorldModelConfig(config.codebook_size, *grid, **SMALL_SIZE)


def geometry(args: argparse.Namespace, world: World) -> Metrics:
    """The training step of train.py's default, the model that carries what was seen, in GEOMETRY_STEP's size:
    all steps shown the truth, and all but the first self-fed."""
    tokenizer, device = world.tokenizer, world.device
    size = tokenizer.config
    config = GeometryConfig(size.codebook_size, *size.latent_size, size.height, size.width)
    windows, transitions = GEOMETRY_STEP
    tokens, actions = random_batch(Task(config, windows, transitions), device)
    pose = torch.zeros(windows, transitions + 1, 5, device=device)
    model = GeometryWorldModel(config, tokenizer).to(device)
    model.init_from_codebook()
    terms = StepLoss(tokenizer, None, GEOMETRY_WEIGHTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def step(ar_len: int) -> None:
        with autocast(device, world.dtype):
            inputs = InputConfig(ar_len, 0.0, token_noise=0.1, masked_decoding=0.5)
            loss = geometry_window_loss(model, terms, tokens, actions, pose, inputs).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    calls = {"shown": lambda: step(0), "self_fed": lambda: step(transitions - 1)}
    taken = in_turn(calls, max(1, args.repeats // 2), device, "train geometry")
    found = {kind: windows * transitions / np.median(seconds) for kind, seconds in taken.items()}
    rows = [[kind, rate] for kind, rate in found.items()]
    table(
        [f"train, geometry ({config.channels} channels, {windows} windows x {transitions})", "frames/s"], rows
    )
    return {f"train.geometry.{kind}.frames_per_s": rate for kind, rate in found.items()}


def against_reference(args: argparse.Namespace, world: World, name: str, task: Task) -> Metrics:
    """Ours, the plain step and large matrix products, in turn."""
    device, dtype, sides = world.device, world.dtype, MATMUL[world.device.type]
    calls = {kind: training_step(kind, task, world.tokenizer, dtype) for kind in ("ours", "reference")}
    calls |= {f"matmul{side}": matmul(side, device, dtype) for side in sides}
    taken = in_turn(calls, args.repeats, device, f"train {name}")
    peak = max(2 * side**3 / np.median(taken[f"matmul{side}"]) for side in sides)
    work = task.windows * training_flops(task._replace(windows=1), world.tokenizer)
    found = {"flops_per_step": work, "matmul_flops_per_s": peak}
    found["speedup"] = np.median(taken["reference"] / taken["ours"])
    rows = []
    for kind in ("ours", "reference"):
        seconds, memory = np.median(taken[kind]), peak_memory(kind, task, world, args.vqvae_ckpt)
        frames, steps = task.windows * task.transitions / seconds, 3600 / seconds
        mfu = work / seconds / peak
        rows.append([kind, frames, steps, f"{mfu:.1%}", memory])
        row = {"frames_per_s": frames, "steps_per_hour": steps, "mfu": mfu, "peak_mb": memory}
        found |= {f"{kind}.{key}": value for key, value in row.items() if value is not None}
    sizes = f"{task.config.layers} x {task.config.hidden_dim}, {task.windows} windows x {task.transitions}"
    table([f"train, {name} ({sizes})", "frames/s", "steps/hour", "MFU", "peak MB"], rows)
    print(
        f"\nOurs is {found['speedup']:.2f} times as fast. A step is {work / 1e12:.3g} TFLOP; the best matrix "
        f"product makes {peak / 1e12:.3g} TFLOP/s in {dtype}."
    )
    return {f"train.{name}.{key}": value for key, value in found.items()}


def resized(task: Task, size: str, value: int) -> Task:
    """The task with one of its SCALING sizes changed."""
    if size == "hidden":
        return task._replace(config=replace(task.config, hidden_dim=value, embed_dim=value))
    return task._replace(**{size: value})


def varied(windows: int, world: World) -> int:
    """Windows of a batch whose other sizes are changed."""
    return min(windows, VARIED) if world.device.type == "cpu" else windows


def scaling(
    args: argparse.Namespace, world: World, measured: Task, base_mb: float, notes: list[str]
) -> Metrics:
    """Our step with one size changed at a time, without those that could fill the memory."""
    base = measured._replace(windows=varied(measured.windows, world))
    values = {size: found[:2] if args.quick else found for size, found in SCALING.items()}
    tasks = {f"{size}{v}": resized(base, size, v) for size in values for v in values[size]}
    cuda = world.device.type == "cuda"
    free = (torch.cuda.mem_get_info(world.device)[0] if cuda else psutil.virtual_memory().available) / 1e6
    for key, task in list(tasks.items()):
        need = base_mb * task.windows * task.transitions / (measured.windows * measured.transitions)
        if need > 0.6 * free:
            notes.append(f"train.scaling.{key}: left out, it takes about {need:,.0f} MB")
            del tasks[key]
    # Sizes that are the same task, under two names, are measured once.
    calls = {task: training_step("ours", task, world.tokenizer, world.dtype) for task in tasks.values()}
    taken = in_turn(calls, max(1, args.repeats // 2), world.device, "train, sizes")
    found, rows = {}, []
    for key, task in tasks.items():
        row = {"frames_per_s": task.windows * task.transitions / np.median(taken[task])}
        if cuda:  # elsewhere it would take a process each
            row["peak_mb"] = peak_memory("ours", task, world, args.vqvae_ckpt)
        found |= {f"train.scaling.{key}.{name}": value for name, value in row.items()}
        rows.append([key, row["frames_per_s"], row.get("peak_mb")])
    table([f"train, {base.windows} windows x {base.transitions}, but for", "frames/s", "peak MB"], rows)
    return found


def with_processes(args: argparse.Namespace, world: World, notes: list[str]) -> Metrics:
    """train.py itself on random tokens under torchrun; on a CPU the processes share the same threads."""
    numbers = PROCESSES
    if world.device.type != "cpu":
        numbers = [n for n in PROCESSES if n <= max(1, torch.cuda.device_count())]
        left_out = [n for n in PROCESSES if n not in numbers]
        notes += [f"train.processes{n}: left out, there are fewer GPUs here" for n in left_out]
    elif torch.get_num_threads() < max(numbers):
        notes.append(f"train.processes: {torch.get_num_threads()} thread in one process, one each in several")
    config, rates = plain_config(world), {n: [] for n in numbers}
    windows = varied(args.windows, world) // max(PROCESSES) * max(PROCESSES) or max(PROCESSES)
    with tempfile.TemporaryDirectory() as folder:
        random_tokens(Path(folder), world, windows)
        settings = {
            "DATA_DIR": folder, "Tokenizer_CKPT": args.vqvae_ckpt, "DEVICE": world.device.type,
            "EMBED_DIM": config.embed_dim, "HIDDEN_DIM": config.hidden_dim, "LAYERS": config.layers,
            "KERNEL_SIZE": config.kernel_size, "BATCH_SIZE": windows, "SEQ_LEN": RUN_TRANSITIONS,
            "SEQ_LEN_MAX": RUN_TRANSITIONS, "STEPS": RUN_STEPS // (2 if args.quick else 1),
            "LOG_STEPS": 1, "VAL_WINDOWS": 1, "VAL_ROLLOUTS": 0, "WANDB": "disabled",
            "MODEL": "convgru", "AR_GROWTH": "ramp", "BALANCE": 0.0,
        }  # fmt: skip
        turns = [n for _ in range(1 if args.quick else 2) for n in numbers]
        for i, n in enumerate(tqdm(turns, desc="train, processes", unit="run", leave=False)):
            out = Path(folder) / f"run{i}"
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n]
            words = [f"{name}={value}" for name, value in {**settings, "OUT_DIR": out}.items()]
            threads = str(max(1, torch.get_num_threads() // n))
            run_python([*torchrun, ROOT / "train.py", *words], OMP_NUM_THREADS=threads)
            rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            rates[n] += [row["frames_per_s"] for row in rows if "frames_per_s" in row][2:]  # past the warm-up
    found = {n: np.median(rates[n]) for n in numbers}
    table(["train.py, processes", "frames/s"], [[str(n), rate] for n, rate in found.items()])
    return {f"train.processes{n}.frames_per_s": rate for n, rate in found.items()}


def random_tokens(folder: Path, world: World, windows: int) -> None:
    """Token files of random codes: enough for a batch, and one that is held out."""
    config, size = plain_config(world), world.tokenizer.config
    grid, tokenizer = [config.latent_height, config.latent_width], world.tokenizer.fingerprint
    manifest = Manifest(world.fps, [size.height, size.width], grid, config.codebook_size, tokenizer, 70.0)
    for name, length in (("train", (windows + 1) * RUN_TRANSITIONS), ("val", 2 * RUN_TRANSITIONS)):
        tokens, actions = random_batch(Task(config, 1, length), torch.device("cpu"))
        pose = np.zeros((length + 1, 5))
        write_token_file(folder / f"{name}.npz", tokens[0].numpy(), actions[0].numpy(), pose)
        manifest.clips.append(ClipEntry(name, f"{name}.npz", length + 1, name, "", [0, length, 1]))
    manifest.save(folder)


# ---------------------------------------------------------------- the run

SECTIONS = {"train": bench_train, "data": bench_data, "play": bench_play}


def benchmark(args: argparse.Namespace, arguments: list[str]) -> dict:
    """Runs the sections -> what is written as JSON. Raises one of USER_ERRORS."""
    world = load_world(args.checkpoint, args.vqvae_ckpt, args.device, args.precision)
    roomy = world.device.type != "cpu" or psutil.virtual_memory().available > ROOMY
    args.windows = args.windows or (QUICK_WINDOWS if args.quick else WINDOWS if roomy else FEWER)
    args.transitions = QUICK_TRANSITIONS if args.quick else TRANSITIONS
    args.repeats = args.repeats or (QUICK_REPEATS if args.quick else REPEATS)
    print(f"precision: {world.dtype}")
    metrics, notes = {}, []
    load = psutil.getloadavg()[0]
    if load > 0.5:
        busy = f"the load was {load:.1f} on {os.cpu_count()} CPUs before this began"
        notes.append(f"{busy}; several threads suffer most, OMP_NUM_THREADS=1 gives steadier numbers")
    for name, section in SECTIONS.items():
        if args.section in ("all", name):
            metrics |= section(args, world, notes)
    print("".join(f"\nnote: {note}" for note in notes))
    config = plain_config(world)
    return {
        "metrics": {name: float(value) for name, value in metrics.items()},
        "meta": {
            "command": command_line(__file__, arguments),
            "commit": commit(),
            "machine": machine(world.device),
            "versions": versions(),
            "device": str(world.device),
            "threads": torch.get_num_threads(),
            "precision": name_of(world.dtype),
            "checkpoint": shown(args.checkpoint),
            "architecture": architecture_of(world.model),
            "plain_model": f"{config.layers} x {config.hidden_dim}",
            "parameters": sum(p.numel() for p in world.model.parameters()),
            "windows": args.windows,
            "transitions": args.transitions,
            "repeats": args.repeats,
            "quick": args.quick,
            "notes": notes,
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("section", nargs="?", choices=(*SECTIONS, "all"), default="all", help="default: all")
    add("--out", type=Path, default=Path("outputs/benchmark.json"), help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--quick", action="store_true", help="fewer repeats and smaller sizes")
    add(
        "--repeats",
        type=positive_int,
        help=f"measured rounds (default: {REPEATS}; {QUICK_REPEATS} with --quick)",
    )
    add("--windows", type=positive_int, help="in a training batch (default: 16; 4 where memory is short)")
    model_help = (
        "size of the earlier system's model (default: plain, a small one; on CUDA then the other, too)"
    )
    add("--model", choices=("plain", "v4.5.2"), default="plain", help=model_help)
    add("--checkpoint", type=Path, default=SHIPPED_WORLD, help="world model (default: the one that ships)")
    add("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="its tokenizer (default: ships)")
    add("--data_dir", type=Path, default=SAMPLE_TOKENS, help="token files to load (default: the samples)")
    parser.set_defaults(precision="auto")
    args = parser.parse_args(arguments)
    for name in ("out", "checkpoint", "vqvae_ckpt", "data_dir"):
        setattr(args, name, getattr(args, name).resolve())  # other processes start in other folders

    def run() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)  # better to fail now than after minutes
        try:
            write_json(args.out, benchmark(args, arguments))
        except torch.OutOfMemoryError:
            raise UserError(f"--windows {args.windows}: the device is out of memory; give fewer") from None
        print(f"wrote {shown(args.out)}")

    return run_script(run)


if __name__ == "__main__":
    raise SystemExit(main())
