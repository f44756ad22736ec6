#!/usr/bin/env python3
"""Measures a world model on whole clips that it was not trained on, beside copying the last frame.

    python evaluate.py                                   # the shipped world on the sample clips
    python evaluate.py --quick --checkpoint runs/world/best.pt --data_dir tokens/mine

Teacher-forced: the model is shown every true frame of a clip and foretells the next one's tokens.
Free-running: it sees 1, 6 or 16 frames, then dreams 20 on its own samples under the recorded actions. All
contexts end at the same frame, so that every row is compared on the same pictures.
Prints tables in Markdown and writes outputs/eval/NAME.json: `metrics` (flat), `ci95` (95 % intervals by
bootstrap over clips) and `meta`.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import SHIPPED_TOKENIZER, SHIPPED_WORLD, CheckpointError, load_tokenizer, load_world_model
from data import MANIFEST, SAMPLE_TOKENS, DataError, TokenClips, unpack_indices
from device import pick_device
from metrics import bits_per_token, bootstrap_interval, codes_ratio, psnr, token_accuracy, unique_codes
from model_convGru import ConvGRUWorldModel
from sampling import PLAY_TEMPERATURE, Choice, Dream, to_float
from settings import fail
from video import VideoError, read_frames, resize
from vq_vae.vq_vae import VQVAE

ROOT = Path(__file__).resolve().parent
CONTEXTS = (1, 6, 16)  # frames seen before the dream starts
HORIZONS = (1, 4, 8, 16, 20)  # frames into the dream that are reported
DREAM = max(HORIZONS)
SPAN = max(CONTEXTS) + DREAM  # frames of a window
BATCH = 16  # windows or clips that go through the model together
WINDOWS, QUICK_WINDOWS, QUICK_CLIPS = 64, 8, 4

# Row of the table -> metric -> its values [N, DREAM] at each dreamt frame of N windows, NaN where there is no
# picture to compare with.
Rows = dict[str, dict[str, np.ndarray]]
TITLES = {
    "psnr_tokens": "PSNR against the decoded true tokens (dB)",
    "psnr_frames": "PSNR against the true pictures (dB)",
    "token_acc": "Token accuracy",
    "codes": "Different codes in a frame",
    "codes_ratio": "Different codes in a frame, over the truth's",
}


# ---------------------------------------------------------------- what is compared


def spread_windows(lengths: list[int], span: int, count: int, seed: int) -> np.ndarray:
    """`count` windows of `span` frames, even over the clips and along each: [N, 2] of (clip, start).

    Each clip is cut into as many stretches as it gives windows; each window starts somewhere in its stretch.
    Clips shorter than a window give none; raises DataError if that leaves none at all.
    """
    usable = [clip for clip, frames in enumerate(lengths) if frames >= span]
    if not usable:
        raise DataError(f"no clip has the {span} frames of a window (the longest has {max(lengths)})")
    rng = np.random.default_rng(seed)
    # With fewer windows than clips, the clips that give one are spread over the list.
    shares = np.diff(np.linspace(0, count, len(usable) + 1).round().astype(int))
    windows = []
    for clip, share in zip(usable, shares, strict=True):
        starts = (np.arange(share) + rng.random(share)) / max(share, 1) * (lengths[clip] - span + 1)
        windows += [(clip, int(start)) for start in starts]
    return np.array(windows)


def true_pictures(clips: TokenClips, windows: np.ndarray, skip: int) -> Iterator[tuple[int, np.ndarray]]:
    """For each window whose video can be opened: its number, and the DREAM pictures after its first `skip`.

    Pictures are [DREAM, Hp, Wp, 3] uint8, of the manifest's size. Each video is decoded once, in order.
    """
    manifest = clips.manifest
    for clip in tqdm(np.unique(windows[:, 0]), desc="true pictures", unit="clip"):
        entry = clips.entries[clip]
        video_frame = unpack_indices(entry.kept, entry.frames)  # of each frame of the token file
        numbers = np.flatnonzero(windows[:, 0] == clip)
        wanted = {n: video_frame[windows[n, 1] + skip :][:DREAM] for n in numbers}
        needed, found = {i for frames in wanted.values() for i in frames}, {}
        try:
            for i, frame in enumerate(read_frames(clips.directory / entry.video)):
                if i in needed:
                    found[i] = resize(frame, *manifest.picture_size, manifest.resize)
                if len(found) == len(needed):
                    break
        except VideoError as error:
            tqdm.write(f"no true pictures of {entry.name}: {error}")
            continue
        for n, frames in wanted.items():
            if all(i in found for i in frames):
                yield n, np.stack([found[i] for i in frames])


def decode(tokenizer: VQVAE, tokens: Tensor) -> Tensor:
    """Tokens [B, T, H, W] -> pictures [B, T, 3, Hp, Wp] in [0, 1]."""
    return torch.stack([tokenizer.decode_code(grids) for grids in tokens])


# ---------------------------------------------------------------- the two measurements


@torch.inference_mode()
def teacher_forced(
    model: ConvGRUWorldModel, clips: TokenClips, chosen: list[int], device: torch.device
) -> dict[str, np.ndarray]:
    """One pass over whole clips with the true frame as input at every step; the state runs on all along.

    -> for each chosen clip: `nats` (summed cross entropy), `right` and `copied` (cells foretold by the model,
    and by repeating the frame before), `tokens` (cells in all). Every frame but a clip's first is foretold.
    """
    sums = {name: np.zeros(len(chosen)) for name in ("nats", "right", "copied", "tokens")}
    # Longest first: clips that have ended are then always at the end of the batch, and are dropped from it.
    order = sorted(range(len(chosen)), key=lambda i: -clips.entries[chosen[i]].frames)
    parts = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    total = sum(clips.entries[c].frames - 1 for c in chosen)
    with tqdm(total=total, desc="teacher-forced", unit="frame", mininterval=1) as bar:
        for part in parts:
            grids = [torch.from_numpy(clips.tokens[chosen[i]].astype(np.int64)).to(device) for i in part]
            actions = [torch.from_numpy(clips.actions[chosen[i]]).to(device) for i in part]
            state = model.init_state(len(part), device)
            for t in range(len(actions[0])):
                n = sum(t < len(a) for a in actions)
                now = torch.stack([g[t] for g in grids[:n]])  # [n, H, W]
                following = torch.stack([g[t + 1] for g in grids[:n]])
                action = torch.stack([a[t] for a in actions[:n]])  # [n, A]
                logits, state = model.step(now, action, state[:, :n])
                step = {
                    "nats": F.cross_entropy(logits, following, reduction="none").sum((1, 2)),
                    "right": (logits.argmax(1) == following).sum((1, 2)),
                    "copied": (now == following).sum((1, 2)),
                    "tokens": torch.full((n,), following[0].numel()),
                }
                for name, values in step.items():
                    sums[name][part[:n]] += values.cpu().numpy()
                bar.update(n)
    return sums


@torch.inference_mode()
def free_running(
    model: ConvGRUWorldModel,
    tokenizer: VQVAE,
    clips: TokenClips,
    windows: np.ndarray,
    choice: Choice,
    seed: int,
    device: torch.device,
) -> Rows:
    """Dreams DREAM frames in each window from each of CONTEXTS, and compares them with what was recorded.

    Rows: `rollout.ctxN` for the model; `copy` for repeating the last frame seen; `truth` for the true tokens
    themselves, whose `psnr_frames` is what the tokenizer makes possible.
    """
    seen = max(CONTEXTS)
    pictures = dict(true_pictures(clips, windows, seen))
    rows: Rows = {}

    def note(row: str, first: int, **values: Tensor) -> None:
        for name, value in values.items():
            empty = np.full((len(windows), DREAM), np.nan)
            kept = rows.setdefault(row, {}).setdefault(name, empty)
            kept[first : first + len(value)] = value.float().cpu().numpy()

    def compare(row: str, first: int, tokens: Tensor, truth: Tensor, painted: Tensor) -> None:
        """Tokens and truth [B, DREAM, H, W], `painted` the decoded truth, of the windows from `first` on."""
        made = decode(tokenizer, tokens) if row != "truth" else painted
        note(row, first, codes=unique_codes(tokens))
        if row != "truth":
            note(
                row,
                first,
                psnr_tokens=psnr(made, painted),
                token_acc=token_accuracy(tokens, truth),
                codes_ratio=codes_ratio(tokens, truth),
            )
        for i in range(len(tokens)):
            if first + i in pictures:
                real = to_float(torch.from_numpy(pictures[first + i]).to(device))
                note(row, first + i, psnr_frames=psnr(made[i], real)[None])

    with tqdm(total=len(windows) * len(CONTEXTS), desc="free-running", unit="rollout") as bar:
        for first in range(0, len(windows), BATCH):
            tokens, actions = clips.batch(windows[first : first + BATCH], SPAN - 1)
            tokens, actions = tokens.to(device), actions.to(device)  # [B, SPAN, H, W], [B, SPAN-1, A]
            truth, last = tokens[:, seen:], tokens[:, seen - 1 : seen]
            painted = decode(tokenizer, truth)
            compare("truth", first, truth, truth, painted)
            compare("copy", first, last.expand_as(truth), truth, painted)
            for context in CONTEXTS:
                dream = Dream(model, tokenizer, choice, seed=seed + first)
                dream.prime(tokens[:, seen - context : seen], actions[:, seen - context : seen - 1])
                made = dream.rollout(actions[:, seen - 1 :])
                compare(f"rollout.ctx{context}", first, made, truth, painted)
                bar.update(len(tokens))
    return rows


# ---------------------------------------------------------------- numbers and tables


def teacher_forced_metrics(sums: dict[str, np.ndarray], seed: int) -> tuple[dict, dict]:
    """The sums of each clip -> (flat metrics, their 95 % intervals)."""
    total = {name: values.sum() for name, values in sums.items()}
    bits = bits_per_token(1.0, 1)  # of one nat, to turn the bounds into bits too
    found = {
        "tf.bits_per_token": ("nats", bits),
        "tf.accuracy": ("right", 1.0),
        "copy.tf.accuracy": ("copied", 1.0),
    }
    metrics, intervals = {}, {}
    for key, (name, factor) in found.items():
        metrics[key] = total[name] / total["tokens"] * factor
        bounds = bootstrap_interval(sums[name] * factor, sums["tokens"], seed)
        intervals[key] = list(bounds)
    return metrics, intervals


def rollout_metrics(rows: Rows, clip_of_window: np.ndarray, seed: int) -> tuple[dict, dict]:
    """Values of each window -> flat metrics at HORIZONS and over all DREAM frames, and 95 % intervals.

    Copying does not depend on the context; its numbers are given under each, so that keys match the model's.
    """
    metrics, intervals = {}, {}
    clips = np.unique(clip_of_window)
    columns = {f"h{h}": slice(h - 1, h) for h in HORIZONS} | {f"mean{DREAM}": slice(None)}
    for row, found in rows.items():
        prefixes = [f"copy.ctx{c}" for c in CONTEXTS] if row == "copy" else [row]
        for name, values in found.items():
            for column, part in columns.items():
                values_here = values[:, part]
                there = ~np.isnan(values_here)
                sums = [values_here[clip_of_window == c][there[clip_of_window == c]].sum() for c in clips]
                weights = np.array([there[clip_of_window == c].sum() for c in clips])
                kept = weights > 0
                sums, weights = np.array(sums)[kept], weights[kept]
                bounds = bootstrap_interval(sums, weights, seed)
                for prefix in prefixes:
                    metrics[f"{prefix}.{column}.{name}"] = float(sums.sum() / weights.sum())
                    intervals[f"{prefix}.{column}.{name}"] = list(bounds)
    if "psnr_frames" in rows["truth"]:
        metrics["tokenizer.psnr"] = metrics[f"truth.mean{DREAM}.psnr_frames"]
        intervals["tokenizer.psnr"] = intervals[f"truth.mean{DREAM}.psnr_frames"]
    return metrics, intervals


def cell(metrics: dict, intervals: dict, key: str, digits: int, with_interval: bool = False) -> str:
    """One number of a table, with its interval where there is one; "-" where it was not measured."""
    if key not in metrics:
        return "-"
    text = f"{metrics[key]:.{digits}f}"
    if with_interval and key in intervals:
        low, high = intervals[key]
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text


def tables(metrics: dict, intervals: dict) -> str:
    """All numbers as Markdown. The brackets hold 95 % intervals over clips."""
    lines = ["| teacher-forced | bits per token | token accuracy |", "|---|---|---|"]
    for title, bits, accuracy in (
        ("model", "tf.bits_per_token", "tf.accuracy"),
        ("copy last frame", "-", "copy.tf.accuracy"),
    ):
        lines.append(
            f"| {title} | {cell(metrics, intervals, bits, 3, True)} "
            f"| {cell(metrics, intervals, accuracy, 3, True)} |"
        )
    names = {f"rollout.ctx{c}": f"model, {c} frame{'s' if c > 1 else ''} of context" for c in CONTEXTS}
    names |= {f"copy.ctx{CONTEXTS[0]}": "copy last frame", "truth": "true tokens"}
    columns = [f"h{h}" for h in HORIZONS] + [f"mean{DREAM}"]
    for metric, title in TITLES.items():
        digits = 3 if metric in ("token_acc", "codes_ratio") else 1 if metric == "codes" else 2
        shown = [row for row in names if f"{row}.h1.{metric}" in metrics]
        if not shown:
            continue
        heads = [f"frame {h}" for h in HORIZONS] + [f"mean of {DREAM}"]
        lines += ["", f"| {title} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for row in shown:
            cells = [
                cell(metrics, intervals, f"{row}.{c}.{metric}", digits, c == columns[-1]) for c in columns
            ]
            lines.append(f"| {names[row]} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- where the numbers come from


def shown(path: str | Path) -> str:
    """A path without what is private to this machine: relative to the repo, or the bare name outside it."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def command_line(arguments: list[str]) -> str:
    """The command that repeats this run, without absolute paths."""
    return shlex.join(["python", "evaluate.py", *(shown(a) if os.path.isabs(a) else a for a in arguments)])


def commit() -> str:
    """The commit of this code, "+" behind it where files differ from it; "unknown" outside a clone."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: torch.device) -> str:
    """The machine in words."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, "
        f"run on {device.type}{gpu}"
    )


def default_out(checkpoint: Path, quick: bool) -> Path:
    """outputs/eval/NAME.json; NAME tells runs/a/best.pt and runs/b/best.pt apart."""
    folder = (
        "" if checkpoint.resolve().parent == SHIPPED_WORLD.parent else f"{checkpoint.resolve().parent.name}_"
    )
    return Path("outputs/eval") / f"{folder}{checkpoint.stem}{'_quick' if quick else ''}.json"


def check_rates(content: dict, clips: TokenClips, checkpoint: Path) -> None:
    """Raises DataError if the world was trained at another frame rate or camera scale than the tokens'."""
    for name in ("fps", "camera_degrees_per_unit"):
        trained, found = (content.get("data") or {}).get(name), getattr(clips.manifest, name)
        if trained is not None and trained != found:
            raise DataError(
                f"{clips.directory / MANIFEST}: {name} is {found:g}, {checkpoint} was trained at "
                f"{trained:g}; its actions would mean something else: give tokens made as its own were"
            )


# ---------------------------------------------------------------- the run


def evaluate(args: argparse.Namespace, arguments: list[str]) -> dict:
    """Runs all measurements; -> what is written as JSON. Raises CheckpointError, DataError or ValueError."""
    count = args.windows if args.windows is not None else QUICK_WINDOWS if args.quick else WINDOWS
    if count < 1:
        raise ValueError(f"--windows {count}: must be at least 1")
    choice = Choice(greedy=args.greedy, temperature=args.temperature, top_k=args.topk)
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.vqvae_ckpt, device)
    model, content = load_world_model(args.checkpoint, tokenizer, device)
    clips = TokenClips(args.data_dir, args.split, tokenizer.fingerprint)
    check_rates(content, clips, args.checkpoint)

    n = len(clips.entries)
    chosen = list(range(n))
    if args.quick and n > QUICK_CLIPS:
        chosen = np.linspace(0, n - 1, QUICK_CLIPS).round().astype(int).tolist()
    windows = spread_windows([clips.entries[c].frames for c in chosen], SPAN, count, args.seed)
    windows[:, 0] = np.array(chosen)[windows[:, 0]]
    sums = teacher_forced(model, clips, chosen, device)
    rows = free_running(model, tokenizer, clips, windows, choice, args.seed, device)
    metrics, intervals = teacher_forced_metrics(sums, args.seed)
    more = rollout_metrics(rows, windows[:, 0], args.seed)
    metrics, intervals = metrics | more[0], intervals | more[1]
    return {
        "metrics": metrics,
        "ci95": {key: bounds for key, bounds in intervals.items() if not np.isnan(bounds).any()},
        "meta": {
            "checkpoint": shown(args.checkpoint),
            "step": content.get("step"),
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": shown(args.data_dir),
            "tokenizer": tokenizer.fingerprint,
            "split": args.split,
            "clips": [clips.entries[c].name for c in chosen],
            "frames": int(sum(clips.entries[c].frames for c in chosen)),
            "windows": len(windows),
            "contexts": list(CONTEXTS),
            "sampling": {
                "greedy": choice.greedy,
                "temperature": choice.temperature,
                "top_k": choice.top_k,
            },
            "quick": args.quick,
            "seed": args.seed,
            "command": command_line(arguments),
            "commit": commit(),
            "machine": machine(device),
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_WORLD, help="world model")
    parser.add_argument("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="tokenizer of the tokens")
    parser.add_argument(
        "--data_dir", type=Path, default=SAMPLE_TOKENS, help="folder of tokens with its manifest"
    )
    parser.add_argument("--split", choices=("val", "train", "all"), default="val")
    parser.add_argument("--out", type=Path, help="JSON to write (default outputs/eval/NAME.json)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_CLIPS} clips and {QUICK_WINDOWS} windows at most"
    )
    parser.add_argument("--windows", type=int, help=f"rollouts from each context (default {WINDOWS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--temperature", type=float, default=PLAY_TEMPERATURE)
    parser.add_argument("--topk", type=int, default=0, help="sample among the k likeliest codes (0: all)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(arguments)
    try:
        result = evaluate(args, arguments)
    except (CheckpointError, DataError, OSError, ValueError) as error:
        fail(str(error))
    out = args.out or default_out(args.checkpoint, args.quick)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, out)
    meta, choice = result["meta"], result["meta"]["sampling"]
    sampled = f"temperature {choice['temperature']:g}, top-k {choice['top_k'] or 'off'}"
    print(f"\n{meta['checkpoint']}, step {meta['step']}, {meta['parameters']:,} parameters")
    print(f"{meta['data']}, split {meta['split']}: {len(meta['clips'])} clips, {meta['windows']} windows")
    print(f"{'greedy' if choice['greedy'] else sampled}, seed {meta['seed']}\n")
    print(tables(result["metrics"], result["ci95"]))
    print(f"\n{out}")


if __name__ == "__main__":
    main()
