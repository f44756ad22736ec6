"""What people look at: plots, strips of frames, and videos side by side."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import metrics
from evaluation.controllability import FRAMES, PAIRS
from evaluation.held_out_clips import HeldOutClips, Plan
from evaluation.long_rollouts import WINDOW
from evaluation.memory import ANGLES
from evaluation.report import HORIZON_TITLES, Result
from evaluation.rollouts import Recorded, warp
from runtime.video import enlarge, grid, label, save_image, to_uint8, write_video

SHOWN = 4  # windows, places or streams in a strip
VIDEO_WINDOWS = 6
COLOURS = {"geo": "tab:green", "rot": "tab:olive", "copy": "tab:gray", "ceiling": "black"}


def draw(
    folder: Path, held: HeldOutClips, plan: Plan, recorded: Recorded | None, results: list[Result]
) -> list[Path]:
    """Everything that there are numbers for, into `folder`; -> the files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    shown = results[0].shown
    if "rollouts" in shown:
        made += [horizon_plot(folder / "horizons.png", plan, results)]
        made += rollout_pictures(folder, held, plan, recorded, results)
    if "turn" in shown:
        made.append(obedience_plot(folder / "obedience.png", results))
    if {"memory", "life"} & set(shown):
        made.append(time_plot(folder / "memory_life.png", results))
    for result in results:
        name = result.subject.name
        if "obey" in shown:
            made.append(command_strip(folder / f"commands_{name}.png", result))
        if "memory" in shown:
            made.append(memory_strip(folder / f"memory_{name}.png", held, result))
        if "life" in shown:
            made += life_pictures(folder / f"life_{name}", held, result)
    return made


def frames(pictures: Tensor) -> list[np.ndarray]:
    """[N, 3, Hp, Wp] in [0, 1] -> N pictures [Hp, Wp, 3] uint8."""
    return list(to_uint8(pictures).numpy())


def strip(path: Path, rows: list[tuple[str, list[np.ndarray]]], captions: list[str], scale: int = 2) -> Path:
    """Rows of pictures, each picture under "row, caption"."""
    cells = [
        label(enlarge(picture, scale), f"{name}, {caption}")
        for name, pictures in rows
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    save_image(path, grid(cells, len(captions)))
    return path


# ---------------------------------------------------------------- strips and videos


def rollout_pictures(
    folder: Path, held: HeldOutClips, plan: Plan, recorded: Recorded, results: list[Result]
) -> list[Path]:
    """A strip of SHOWN windows at the horizons, and a video of VIDEO_WINDOWS: truth | models | geo | copy."""
    seen, last = max(plan.contexts) - 1, max(plan.horizons)
    numbers = np.unique(np.linspace(0, len(recorded.windows) - 1, VIDEO_WINDOWS).round().astype(int))
    windows, every = recorded.windows[numbers], np.arange(last + 1)
    tokens = recorded.tokens[numbers, seen:]
    decoded = held.decode(tokens)  # [n, 1+last, 3, Hp, Wp]
    true = dict(held.true_pictures(windows, seen + every))
    shown = {"truth": torch.stack([true.get(n, decoded[n]) for n in range(len(windows))])}
    shown["ceiling"] = decoded
    for result in results:
        generated = held.decode(result.shown["rollouts"][f"ctx{plan.main}"][numbers])
        shown[result.subject.name] = torch.cat([decoded[:, :1], generated], 1)
    for name, moved in (("geo", True), ("rot", False)):
        warped = warp(held, windows, plan.span, decoded[:, :1], seen, every, moved)
        if warped is not None:
            shown[name] = warped
    shown["copy"] = decoded[:, :1].expand_as(decoded)
    at = [0, *plan.horizons]
    rows = [
        (name, frames(pictures[n, at]))
        for n in range(min(SHOWN, len(windows)))
        for name, pictures in shown.items()
    ]
    made = [strip(folder / "rollouts.png", rows, [f"frame {h}" for h in at])]
    columns = {name: pictures for name, pictures in shown.items() if name not in ("ceiling", "rot")}
    video = []
    for n in range(len(windows)):
        for t in every:
            pictures = [enlarge(frames(p[n, t : t + 1])[0], 2) for p in columns.values()]
            video.append(
                grid([label(p, name) for p, name in zip(pictures, columns, strict=True)], len(columns))
            )
    write_video(folder / "rollouts.mp4", video, held.manifest.fps)
    return [*made, folder / "rollouts.mp4"]


def command_strip(path: Path, result: Result) -> Path:
    """What constant commands make of the first two places."""
    captions = [f"frame {t}" for t in range(0, FRAMES + 1, metrics.FLOW_EVERY)]
    both = min(2, len(next(iter(result.shown["obey"].values()))))
    rows = [
        (name, [f for place in range(both) for f in frames(pictures[place])])
        for name, pictures in result.shown["obey"].items()
    ]
    return strip(path, rows, captions * both)


def memory_strip(path: Path, held: HeldOutClips, result: Result) -> Path:
    """Turning away and back from the first two places, by each angle."""
    rows = []
    for place in range(min(2, len(result.shown["memory"][ANGLES[0]]))):
        for angle, tokens in result.shown["memory"].items():
            at = np.linspace(0, tokens.shape[1] - 1, 7).round().astype(int)
            rows.append((f"{angle} deg", frames(held.decode(tokens[place, at]))))
    return strip(path, rows, ["left", "1/3", "2/3", "far end", "2/3 back", "1/3 back", "returned"])


def life_pictures(stem: Path, held: HeldOutClips, result: Result) -> list[Path]:
    """A strip and a video of the first SHOWN long rollouts."""
    streams = result.shown["life"][1][:SHOWN]
    count = streams.shape[1]
    at = np.unique(np.concatenate([[0], np.arange(WINDOW, count, WINDOW), [count - 1]]))
    at = at[np.unique(np.linspace(0, len(at) - 1, 8).round().astype(int))]
    rows = [(f"stream {n}", frames(held.decode(streams[n, at]))) for n in range(len(streams))]
    strip(stem.with_suffix(".png"), rows, [f"frame {t + 1}" for t in at])

    def sheets():
        for t in range(count):
            yield grid([enlarge(f, 2) for f in frames(held.decode(streams[:, t]))], 2)

    write_video(stem.with_suffix(".mp4"), sheets(), held.manifest.fps)
    return [stem.with_suffix(".png"), stem.with_suffix(".mp4")]


# ---------------------------------------------------------------- plots


def figure(rows: int, columns: int):
    """A figure without a display, and its axes [rows * columns]."""
    from matplotlib.figure import Figure  # slow to import, and not needed where only numbers are

    made = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False).ravel()


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
    """Quality over the frames of a rollout: the models from each context, and the rows beside them."""
    names = ("psnr_tokens", "psnr_frames", "ssim", "perceptual", "token_acc", "codes")
    made, axes = figure(2, 3)
    for axis, metric in zip(axes, names, strict=True):
        for i, result in enumerate(results):
            for context, line in zip(plan.contexts, (":", "-", "--", "-."), strict=False):
                label = f"{result.subject.name}, {context} seen"
                prefix = f"rollout.ctx{context}"
                curve(axis, result, prefix, metric, plan.horizons, color=f"C{i}", ls=line, label=label)
        for row, colour in COLOURS.items():
            curve(axis, results[0], f"{row}.ctx{plan.main}", metric, plan.horizons, color=colour, label=row)
        axis.set(title=HORIZON_TITLES[metric], xlabel="frames into the rollout", xscale="log")
        axis.set_xticks(plan.horizons, [str(h) for h in plan.horizons])
        axis.title.set_fontsize(9)
    axes[0].legend(fontsize=7)
    made.savefig(path, dpi=110)
    return path


def obedience_plot(path: Path, results: list[Result]) -> Path:
    """Commanded against measured turns; opposite commands both right; what inverse dynamics reads back."""
    made, (turns, pairs, read) = figure(1, 3)
    width = 0.8 / len(results)
    for i, result in enumerate(results):
        asked, seen = result.shown["turn"]["commanded"], result.shown["turn"]["measured"]
        speeds = np.unique(asked)
        quartiles = np.array([np.quantile(seen[asked == s], [0.25, 0.5, 0.75]) for s in speeds])
        low, median, high = quartiles.T
        turns.errorbar(
            speeds, median, [median - low, high - median], fmt="o", ms=4, label=result.subject.name
        )
        shift = (i - (len(results) - 1) / 2) * width
        found = [result.scores.metrics.get(f"obey.pairs.{name}", np.nan) for name in PAIRS]
        pairs.bar(np.arange(len(PAIRS)) + shift, found, width)
        keys = ("move_x_f1", "move_z_f1", "jump_f1")
        found = [result.scores.metrics.get(f"obey.idm.{key}", np.nan) for key in keys]
        read.bar(np.arange(len(keys)) + shift, found, width)
    for suffix, marker in ((".decoded", "_"), (".real", "x")):
        found = [results[0].scores.metrics.get(f"obey.idm.{key}{suffix}", np.nan) for key in keys]
        read.plot(np.arange(len(keys)), found, marker, color="black", ms=10, label=f"recording{suffix}")
    ends = [min(speeds), max(speeds)]
    turns.plot(ends, ends, color="black", lw=0.8, label="obeyed")
    turns.set(title="Turn seen, by the best homography (quartiles)", xlabel="commanded, degrees a frame",
              ylabel="degrees a frame")  # fmt: skip
    pairs.axhline(0.25, color="black", ls=":", lw=0.8, label="chance")
    pairs.set(title="Opposite commands, both right", ylim=(0, 1))
    pairs.set_xticks(range(len(PAIRS)), PAIRS)
    read.set(title="Keys read back by inverse dynamics, macro-F1", ylim=(0, 1))
    read.set_xticks(range(len(keys)), ["left/right", "forward/back", "jump"])
    for axis in (turns, pairs, read):
        axis.legend(fontsize=7)
        axis.title.set_fontsize(9)
    made.savefig(path, dpi=110)
    return path


def time_plot(path: Path, results: list[Result]) -> Path:
    """What is kept of a view that was left, and how a long rollout fares."""
    made, (memory, distance, divergence, codes) = figure(1, 4)
    for i, result in enumerate(results):
        name, found = result.subject.name, result.scores.metrics
        for key, line in (("token_agreement", "-"), ("stood_agreement", ":"), ("away_agreement", "--")):
            values = [found.get(f"memory.deg{angle}.{key}", np.nan) for angle in ANGLES]
            what = {
                "token_agreement": "returned",
                "stood_agreement": "never turned",
                "away_agreement": "far end",
            }
            memory.plot(ANGLES, values, color=f"C{i}", ls=line, marker=".", label=f"{name}, {what[key]}")
        series = result.shown["life"][0] if "life" in result.shown else {}
        if series:
            at = WINDOW * (0.5 + np.arange(len(series["fd"])))
            for axis, key in ((distance, "fd"), (divergence, "divergence"), (codes, "codes")):
                axis.plot(at, series[key], color=f"C{i}", marker=".", label=name)
    if series:
        distance.plot(
            at[: len(series["fd_truth"])], series["fd_truth"], color="black", lw=0.8, label="recording"
        )
        codes.axhline(series["truth_codes"][0], color="black", lw=0.8, label="recording")
    titles = {
        memory: ("Tokens that agree with the view left", "degrees turned away"),
        distance: ("Fréchet distance to the recordings", "frame"),
        divergence: ("Divergence of the codes used, bits", "frame"),
        codes: ("Different codes in a frame", "frame"),
    }
    for axis, (title, below) in titles.items():
        axis.set(title=title, xlabel=below, ylim=(0, None))
        axis.title.set_fontsize(9)
        if axis.lines:
            axis.legend(fontsize=7)
    made.savefig(path, dpi=110)
    return path
