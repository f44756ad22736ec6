"""Plots, strips of frames and videos of a run."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import metrics
from evaluation.controllability import FRAMES, PAIRS
from evaluation.held_out_clips import HeldOutClips
from evaluation.long_rollouts import WINDOW
from evaluation.memory import ANGLES
from evaluation.plan import Plan
from evaluation.report import HORIZON_TITLES, Result
from evaluation.rollouts import RecordedWindows, warp_picture
from evaluation.walk import CHANGE, DETAIL
from runtime.outputs import replacing
from runtime.video import enlarge, grid, label, save_image, to_uint8, write_video

STRIP_WINDOWS = 4  # windows or long rollouts in a strip
VIDEO_WINDOWS = 6
COLOURS = {"geo": "tab:green", "rot": "tab:olive", "copy": "tab:gray", "recording": "black"}


def draw(
    folder: Path, held_out: HeldOutClips, plan: Plan, recorded: RecordedWindows | None, results: list[Result]
) -> list[Path]:
    """Draws everything that was measured into `folder`; returns the files."""
    files = []
    sections = results[0].outputs
    if "rollouts" in sections:
        files.append(horizon_plot(folder / "horizons.png", plan, results))
        files += rollout_pictures(folder, held_out, plan, recorded, results)
    if "rotation" in sections:
        files.append(control_plot(folder / "control.png", results))
    if {"memory", "long"} & set(sections):
        files.append(memory_and_long_plot(folder / "memory_long.png", results))
    if sections.get("walk"):
        files.append(walk_plot(folder / "walk.png", results))
    for result in results:
        name = result.evaluated.name
        if "control" in sections:
            files.append(command_strip(folder / f"commands_{name}.png", result))
        if "memory" in sections:
            files.append(memory_strip(folder / f"memory_{name}.png", held_out, result))
        if sections.get("walk"):
            files.append(walk_strip(folder / f"walk_{name}.png", result))
        if "long" in sections:
            files += long_pictures(folder / f"long_{name}", held_out, result)
    return files


def frames(pictures: Tensor) -> list[np.ndarray]:
    """[N, 3, Hp, Wp] in [0, 1] -> N pictures [Hp, Wp, 3] uint8."""
    return list(to_uint8(pictures).numpy())


def strip(path: Path, rows: list[tuple[str, list[np.ndarray]]], captions: list[str], scale: int = 2) -> Path:
    """Writes rows of pictures, each picture under "row, caption"."""
    labelled = [
        label(enlarge(picture, scale), f"{name}, {caption}")
        for name, pictures in rows
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    save_image(path, grid(labelled, len(captions)))
    return path


def rollout_pictures(
    folder: Path, held_out: HeldOutClips, plan: Plan, recorded: RecordedWindows, results: list[Result]
) -> list[Path]:
    """A strip of STRIP_WINDOWS windows at the horizons, and a video of VIDEO_WINDOWS windows side by side:
    truth | models | geo | copy."""
    last, frame_count = max(plan.contexts) - 1, max(plan.horizons) + 1
    indices = np.unique(np.linspace(0, len(recorded.windows) - 1, VIDEO_WINDOWS).round().astype(int))
    windows, every = recorded.windows[indices], np.arange(frame_count)
    decoded = held_out.decode(recorded.tokens[indices, last:])  # [n, frame_count, 3, Hp, Wp]
    original = held_out.original_pictures(windows, last + every)
    columns = {"truth": torch.stack([original.get(n, decoded[n]) for n in range(len(windows))])}
    columns["recording"] = decoded
    for result in results:
        generated = held_out.decode(result.outputs["rollouts"][f"ctx{plan.main_context}"][indices])
        columns[result.evaluated.name] = torch.cat([decoded[:, :1], generated], 1)
    for name, moves in (("geo", True), ("rot", False)):
        warped = warp_picture(held_out, windows, plan.span, decoded[:, :1], last, every, moves)
        if warped is not None:
            columns[name] = warped
    columns["copy"] = decoded[:, :1].expand_as(decoded)
    at = [0, *plan.horizons]
    rows = [
        (name, frames(pictures[n, at]))
        for n in range(min(STRIP_WINDOWS, len(windows)))
        for name, pictures in columns.items()
    ]
    files = [strip(folder / "rollouts.png", rows, [f"frame {h}" for h in at]), folder / "rollouts.mp4"]
    shown = {name: pictures for name, pictures in columns.items() if name not in ("recording", "rot")}
    video = []
    for n in range(len(windows)):
        for t in every:
            pictures = [label(enlarge(frames(p[n, t : t + 1])[0], 2), name) for name, p in shown.items()]
            video.append(grid(pictures, len(shown)))
    write_video(files[1], video, held_out.manifest.fps)
    return files


def command_strip(path: Path, result: Result) -> Path:
    """Constant commands from the first two start windows."""
    captions = [f"frame {t}" for t in range(0, FRAMES + 1, metrics.FLOW_EVERY)]
    examples = result.outputs["control"]
    count = min(2, len(next(iter(examples.values()))))
    rows = [
        (name, [f for window in range(count) for f in frames(pictures[window])])
        for name, pictures in examples.items()
    ]
    return strip(path, rows, captions * count)


def memory_strip(path: Path, held_out: HeldOutClips, result: Result) -> Path:
    """Turning away and back by each angle, from the first two start windows."""
    rows = []
    for window in range(min(2, len(result.outputs["memory"][ANGLES[0]]))):
        for angle, tokens in result.outputs["memory"].items():
            at = np.linspace(0, tokens.shape[1] - 1, 7).round().astype(int)
            rows.append((f"{angle} deg", frames(held_out.decode(tokens[window, at]))))
    return strip(path, rows, ["left", "1/3", "2/3", "far end", "2/3 back", "1/3 back", "returned"])


def walk_strip(path: Path, result: Result) -> Path:
    """The first STRIP_WINDOWS starts of each walk, at the reported seconds."""
    rows = []
    for kind, output in result.outputs["walk"].items():
        shown = output["pictures"]
        for n in range(min(STRIP_WINDOWS, len(shown[0]))):
            rows.append((f"{kind} {n}", frames(torch.stack([pictures[n] for pictures in shown.values()]))))
    return strip(path, rows, [f"{second} s" for second in shown])


def long_pictures(stem: Path, held_out: HeldOutClips, result: Result) -> list[Path]:
    """A strip and a video of the first STRIP_WINDOWS long rollouts."""
    tokens = result.outputs["long"][1][:STRIP_WINDOWS]
    count = tokens.shape[1]
    at = np.unique(np.concatenate([[0], np.arange(WINDOW, count, WINDOW), [count - 1]]))
    at = at[np.unique(np.linspace(0, len(at) - 1, 8).round().astype(int))]
    rows = [(f"rollout {n}", frames(held_out.decode(tokens[n, at]))) for n in range(len(tokens))]
    strip(stem.with_suffix(".png"), rows, [f"frame {t + 1}" for t in at])
    video = (grid([enlarge(f, 2) for f in frames(held_out.decode(tokens[:, t]))], 2) for t in range(count))
    write_video(stem.with_suffix(".mp4"), video, held_out.manifest.fps)
    return [stem.with_suffix(".png"), stem.with_suffix(".mp4")]


def figure(rows: int, columns: int):
    """A figure without a display, and its axes [rows * columns]."""
    from matplotlib.figure import Figure  # slow to import, and only needed for plots

    plot = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    return plot, plot.subplots(rows, columns, squeeze=False).ravel()


def save_plot(plot, path: Path) -> Path:
    """Writes a figure, and returns the path. Raises OutputError."""
    with replacing(path) as part:
        plot.savefig(part, dpi=110)
    return path


def curve(axis, result: Result, prefix: str, metric: str, horizons: tuple[int, ...], **style) -> None:
    """A metric over the horizons, its 95 % interval as a band."""
    keys = [f"{prefix}.h{h}.{metric}" for h in horizons]
    if any(key not in result.scores.metrics for key in keys):
        return
    axis.plot(horizons, [result.scores.metrics[key] for key in keys], marker=".", **style)
    if all(key in result.scores.ci95 for key in keys):
        low, high = np.array([result.scores.ci95[key] for key in keys]).T
        axis.fill_between(horizons, low, high, alpha=0.12, color=axis.lines[-1].get_color(), linewidth=0)


def horizon_plot(path: Path, plan: Plan, results: list[Result]) -> Path:
    """Quality over the frames of a rollout: the models from each context, the baselines and the recording."""
    names = ("psnr_tokens", "psnr_frames", "ssim", "perceptual", "token_acc", "codes")
    plot, axes = figure(2, 3)
    for axis, metric in zip(axes, names, strict=True):
        for i, result in enumerate(results):
            for context, line in zip(plan.contexts, (":", "-", "--", "-."), strict=False):
                label = f"{result.evaluated.name}, context {context}"
                prefix = f"rollout.ctx{context}"
                curve(axis, result, prefix, metric, plan.horizons, color=f"C{i}", ls=line, label=label)
        for name, colour in COLOURS.items():
            prefix = f"{name}.rollout.ctx{plan.main_context}"
            curve(axis, results[0], prefix, metric, plan.horizons, color=colour, label=name)
        axis.set(title=HORIZON_TITLES[metric], xlabel="frames into the rollout", xscale="log")
        axis.set_xticks(plan.horizons, [str(h) for h in plan.horizons])
        axis.title.set_fontsize(9)
    axes[0].legend(fontsize=7)
    return save_plot(plot, path)


def control_plot(path: Path, results: list[Result]) -> Path:
    """Commanded and measured rotations; pairs of opposite commands; keys read by inverse dynamics."""
    plot, (turns, pairs, keys) = figure(1, 3)
    width = 0.8 / len(results)
    key_names = ("move_x_f1", "move_z_f1", "jump_f1")
    for i, result in enumerate(results):
        commanded, measured = (result.outputs["rotation"][name] for name in ("commanded", "measured"))
        speeds = np.unique(commanded)
        quartiles = np.array([np.quantile(measured[commanded == s], [0.25, 0.5, 0.75]) for s in speeds])
        low, median, high = quartiles.T
        spread = [median - low, high - median]
        turns.errorbar(speeds, median, spread, fmt="o", ms=4, label=result.evaluated.name)
        shift = (i - (len(results) - 1) / 2) * width
        found = [result.scores.metrics.get(f"control.pairs.{name}", np.nan) for name in PAIRS]
        pairs.bar(np.arange(len(PAIRS)) + shift, found, width)
        found = [result.scores.metrics.get(f"control.idm.{name}", np.nan) for name in key_names]
        keys.bar(np.arange(len(key_names)) + shift, found, width)
    for source, marker in (("recording", "_"), ("original", "x")):
        found = [results[0].scores.metrics.get(f"{source}.control.idm.{name}", np.nan) for name in key_names]
        keys.plot(np.arange(len(key_names)), found, marker, color="black", ms=10, label=source)
    ends = [min(speeds), max(speeds)]
    turns.plot(ends, ends, color="black", lw=0.8, label="exact")
    turns.set(title="Measured rotation (quartiles)", xlabel="commanded, degrees per frame",
              ylabel="measured, degrees per frame")  # fmt: skip
    pairs.axhline(0.25, color="black", ls=":", lw=0.8, label="chance")
    pairs.set(title="Opposite commands, both in the right direction", ylim=(0, 1))
    pairs.set_xticks(range(len(PAIRS)), PAIRS)
    keys.set(title="Keys read by inverse dynamics, macro-F1", ylim=(0, 1))
    keys.set_xticks(range(len(key_names)), ["left/right", "forward/back", "jump"])
    for axis in (turns, pairs, keys):
        axis.legend(fontsize=7)
        axis.title.set_fontsize(9)
    return save_plot(plot, path)


def walk_plot(path: Path, results: list[Result]) -> Path:
    """Over the seconds of the walks: the share of starts that have held, and means of what is measured."""
    titles = {
        "held": ("Starts that have held all along", ()),
        "codes": ("Different codes over the recording's", DETAIL),
        "gradient": ("Spatial gradient over the recording's", DETAIL),
        "change": ("Change over the recording's", CHANGE),
    }
    plot, axes = figure(1, len(titles))
    for axis, (name, (title, bounds)) in zip(axes, titles.items(), strict=True):
        for i, result in enumerate(results):
            for (kind, output), line in zip(result.outputs["walk"].items(), ("-", ":"), strict=False):
                values = np.array(output["series"][name], float)
                at = np.arange(1, len(values) + 1)
                axis.plot(at, values, line, color=f"C{i}", label=f"{result.evaluated.name}, {kind}")
        for bound in bounds:
            axis.axhline(bound, color="black", lw=0.8)
        axis.set(title=title, xlabel="second of the walk", ylim=(0, None))
        axis.title.set_fontsize(9)
    axes[0].legend(fontsize=7)
    return save_plot(plot, path)


def memory_and_long_plot(path: Path, results: list[Result]) -> Path:
    """Memory of a view over the angle turned away, and the series of the long rollouts."""
    plot, (memory, distance, divergence, codes) = figure(1, 4)
    agreements = {
        "token_agreement": ("-", "returned"),
        "idle_agreement": (":", "without turning"),
        "away_agreement": ("--", "far end"),
    }
    for i, result in enumerate(results):
        name, found = result.evaluated.name, result.scores.metrics
        for key, (line, when) in agreements.items():
            values = [found.get(f"memory.deg{angle}.{key}", np.nan) for angle in ANGLES]
            memory.plot(ANGLES, values, color=f"C{i}", ls=line, marker=".", label=f"{name}, {when}")
        series = result.outputs["long"][0] if "long" in result.outputs else {}
        if series:
            at = WINDOW * (0.5 + np.arange(len(series["fd"])))
            for axis, key in ((distance, "fd"), (divergence, "divergence"), (codes, "codes")):
                axis.plot(at, series[key], color=f"C{i}", marker=".", label=name)
    if series:
        recorded = series["fd_recording"]
        distance.plot(at[: len(recorded)], recorded, color="black", lw=0.8, label="recording")
        codes.axhline(series["codes_recording"][0], color="black", lw=0.8, label="recording")
    titles = {
        memory: ("Tokens equal to the view left", "degrees turned away"),
        distance: ("Fréchet distance to the recordings", "frame"),
        divergence: ("Divergence of the codes used, bits", "frame"),
        codes: ("Different codes in a frame", "frame"),
    }
    for axis, (title, below) in titles.items():
        axis.set(title=title, xlabel=below, ylim=(0, None))
        axis.title.set_fontsize(9)
        if axis.lines:
            axis.legend(fontsize=7)
    return save_plot(plot, path)
