"""The result of a run as JSON and as tables in Markdown."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from depth.warp_quality import HORIZONS as DEPTH_HORIZONS
from evaluation.aggregate import Scores
from evaluation.evaluated_model import EvaluatedModel
from evaluation.plan import Plan
from evaluation.rollouts import MEAN, PARTS
from evaluation.walk import SECONDS
from runtime import provenance

COMPARED = ("geo", "rot", "copy", "recording")  # columns beside the models


class Row(NamedTuple):
    """A row of the main table."""

    title: str
    key: str  # of the metric; "{ctx}" is replaced by the main context
    digits: int
    better: str = ""  # the better direction


class Heading(NamedTuple):
    """A heading of the main table."""

    title: str


UP, DOWN = " ↑", " ↓"
SUMMARY: tuple[Row | Heading, ...] = (
    Heading("Prediction of the next frame, every true frame given (teacher-forced)"),
    Row("bits per token", "tf.bits_per_token", 2, DOWN),
    Row("token accuracy", "tf.accuracy", 3, UP),
    Row("… frames without an action", "tf.still.accuracy", 3, UP),
    Row("… frames that only turn", "tf.turn.accuracy", 3, UP),
    Row("… frames that only move", "tf.move.accuracy", 3, UP),
    Row("… frames that turn and move", "tf.both.accuracy", 3, UP),
    Row("… disoccluded cells only", "tf.disoccluded_accuracy", 3, UP),
    Heading("Rollouts from {ctx} recorded frames, under the recorded actions"),
    Row("PSNR to the decoded recording, mean of 20 frames, dB", "rollout.ctx{ctx}.mean20.psnr_tokens", 2, UP),
    Row("PSNR to the original pictures, mean of 20 frames, dB", "rollout.ctx{ctx}.mean20.psnr_frames", 2, UP),
    Row("token accuracy, mean of 20 frames", "rollout.ctx{ctx}.mean20.token_acc", 3, UP),
    Row("SSIM, frame 20", "rollout.ctx{ctx}.h20.ssim", 3, UP),
    Row("perceptual distance, frame 1", "rollout.ctx{ctx}.h1.perceptual", 3, DOWN),
    Row("perceptual distance, frame 20", "rollout.ctx{ctx}.h20.perceptual", 3, DOWN),
    Row("perceptual distance, frame 64", "rollout.ctx{ctx}.h64.perceptual", 3, DOWN),
    Row("edge F1, frame 20", "rollout.ctx{ctx}.h20.edge_f1", 3, UP),
    Row("different codes in a frame, frame 20", "rollout.ctx{ctx}.h20.codes", 0),
    Row("visible cells: PSNR, frame 20, dB", "rollout.ctx{ctx}.h20.psnr_visible", 2, UP),
    Row("disoccluded cells: PSNR, frame 20, dB", "rollout.ctx{ctx}.h20.psnr_disoccluded", 2, UP),
    Row("… spatial gradient over the recording's", "rollout.ctx{ctx}.h20.gradient_ratio_disoccluded", 2),
    Heading("Control"),
    Row("moves when the recording moves (flow profile)", "control.flow_profile", 3, UP),
    Row("amount of motion over the recording's (flow ratio)", "control.flow_ratio", 2),
    Row("opposite turns, both in the right direction", "control.pairs.turn", 3, UP),
    Row("looking up and down, both in the right direction", "control.pairs.look", 3, UP),
    Row("walking forward and back, both in the right direction", "control.pairs.forward_back", 3, UP),
    Row("… measured between neighbouring frames", "control.pairs_by_frame.forward_back", 3, UP),
    Row("… where the recording blocks neither", "control.pairs_unblocked.forward_back", 3, UP),
    Row("walking left and right, both in the right direction", "control.pairs.strafe", 3, UP),
    Row("… measured between neighbouring frames", "control.pairs_by_frame.strafe", 3, UP),
    Row("… where the recording blocks neither", "control.pairs_unblocked.strafe", 3, UP),
    Row("recorded turns, share in the right direction", "control.sign.turn", 3, UP),
    Row("recorded walks left and right, share in the right direction", "control.sign.strafe", 3, UP),
    Row("recorded walks forward and back, share in the right direction", "control.sign.forward_back", 3, UP),
    Row("rotation error, degrees per frame (median)", "rotation.error_deg", 2, DOWN),
    Row("action read from the pictures: yaw error, degrees", "control.idm.yaw_deg", 2, DOWN),
    Row("… pitch error, degrees", "control.idm.pitch_deg", 2, DOWN),
    Row("… F1 of left / none / right", "control.idm.move_x_f1", 3, UP),
    Row("… F1 of back / none / forward", "control.idm.move_z_f1", 3, UP),
    Row("… F1 of jump", "control.idm.jump_f1", 3, UP),
    Row("PSNR lost under another clip's actions, frame 4, dB", "control.delta_psnr", 2, UP),
    Heading("Stability without an action"),
    Row("change between frames over the recording's", "still.change_ratio", 2, DOWN),
    Row("edge flicker over the recording's", "still.flicker_ratio", 2, DOWN),
    Row("tokens after 30 s equal to those after 2 s", "still.long.agreement", 3, UP),
    Row("spatial gradient after 30 s over that after 2 s", "still.long.gradient_ratio", 2),
    Heading("Memory: tokens equal to the view left, after turning away and back"),
    Row("30 degrees (over the share without turning)", "memory.deg30.token_agreement", 3, UP),
    Row("60 degrees", "memory.deg60.token_agreement", 3, UP),
    Row("90 degrees", "memory.deg90.token_agreement", 3, UP),
    Row("180 degrees", "memory.deg180.token_agreement", 3, UP),
    Heading("Long rollouts"),
    Row("first frame of a collapse (-1: none)", "long.collapse_frame", 0),
    Row("Fréchet distance to the recordings, last window over first", "long.fd_ratio", 2, DOWN),
    Row("different codes in a frame over the recording's, last window", "long.codes_ratio", 2),
    Heading("A minute's walk from random starts, W held"),
    Row("starts that have held all along after 2 s", "walk.forward.s2.held", 2, UP),
    Row("… 5 s", "walk.forward.s5.held", 2, UP),
    Row("… 10 s", "walk.forward.s10.held", 2, UP),
    Row("… 30 s", "walk.forward.s30.held", 2, UP),
    Row("… 60 s", "walk.forward.s60.held", 2, UP),
    Row("median time that a start has held, s", "walk.forward.held_seconds", 1, UP),
    Row("share of all seconds that hold", "walk.forward.holds", 2, UP),
    Row("different codes over the recording's, second 10", "walk.forward.s10.codes_ratio", 2),
    Row("spatial gradient over the recording's, second 10", "walk.forward.s10.gradient_ratio", 2),
    Row("flicker (warp error between frames) over the recording's", "walk.forward.flicker_ratio", 2, DOWN),
    Row("metres walked", "walk.forward.metres", 0, UP),
    Heading("A minute's mixed walk from the same starts"),
    Row("starts that have held all along after 10 s", "walk.mixed.s10.held", 2, UP),
    Row("… 60 s", "walk.mixed.s60.held", 2, UP),
    Row("median time that a start has held, s", "walk.mixed.held_seconds", 1, UP),
    Row("share of all seconds that hold", "walk.mixed.holds", 2, UP),
    Row("flicker over the recording's", "walk.mixed.flicker_ratio", 2, DOWN),
    Heading("Recovery: play goes back when the picture has lost its detail, walks of half a minute"),
    Row("W held: share of the walks that are interrupted", "recovery.forward.interrupted", 2, DOWN),
    Row("… median time to the first, s", "recovery.forward.first_seconds", 1, UP),
    Row("… interruptions a minute", "recovery.forward.per_minute", 2, DOWN),
    Row("… of pictures that had kept their gradient", "recovery.forward.sharp", 2, DOWN),
    Row("… different codes over the start's, the second after", "recovery.forward.after", 2, UP),
    Row("mixed walk: share of the walks that are interrupted", "recovery.mixed.interrupted", 3, DOWN),
    Row("… median time to the first, s", "recovery.mixed.first_seconds", 1, UP),
    Row("… interruptions a minute", "recovery.mixed.per_minute", 3, DOWN),
    Row("… of pictures that had kept their gradient", "recovery.mixed.sharp", 2, DOWN),
    Row("… different codes over the start's, the second after", "recovery.mixed.after", 2, UP),
    Heading("Motion: the player's way under the recorded actions"),
    Row("error after 8 frames, m", "motion.h8.error", 3, DOWN),
    Row("error after 20 frames, m", "motion.h20.error", 3, DOWN),
    Row("… median", "motion.h20.median", 3, DOWN),
    Row("… vertical", "motion.h20.up", 3, DOWN),
    Row("blocked steps, F1", "motion.blocked_f1", 2, UP),
    Row("stops at an obstacle where the recording stopped", "motion.stops", 2, UP),
    Row("free paths that are walked to the end", "motion.free", 2, UP),
    Row("vertical error 16 frames after a jump or step (median), m", "motion.landing", 3, DOWN),
    Heading("Depth network: a recorded frame warped to a later pose (recording: by the recorded depth)"),
    Row("PSNR to the later frame, 8 frames ahead, dB", "depth.h8.psnr", 2, UP),
    Row("PSNR to the later frame, 20 frames ahead, dB", "depth.h20.psnr", 2, UP),
    Row(
        "share of the recorded depth's gain over the flat ground, 8 frames ahead",
        "depth.h8.gain_share",
        2,
        UP,
    ),
    Row("… by the depth of decoded pictures", "depth.h8.gain_share_decoded", 2, UP),
    Heading("Tokenizer: reconstruction of the original pictures"),
    Row("PSNR, dB", "tokenizer.psnr", 2, UP),
    Row("SSIM", "tokenizer.ssim", 3, UP),
    Row("perceptual distance", "tokenizer.perceptual", 3, DOWN),
    Row("codes used", "tokenizer.used_codes", 0, UP),
    Row("perplexity (effective number of codes)", "tokenizer.perplexity", 0, UP),
    Row("codes that change between two pictures of the same view", "tokenizer.flip_rate", 3, DOWN),
)
HORIZON_TITLES = {
    "psnr_tokens": "PSNR to the decoded recording, dB ↑",
    "psnr_frames": "PSNR to the original pictures, dB ↑",
    "ssim": "SSIM to the decoded recording ↑",
    "perceptual": "Perceptual distance (EffNet-Lite0) to the decoded recording ↓",
    "perceptual_frames": "Perceptual distance (EffNet-Lite0) to the original pictures ↓",
    "lpips": "LPIPS to the decoded recording ↓",
    "edge_f1": "Edge F1 to the decoded recording ↑",
    "psnr_visible": "PSNR of visible cells to the decoded recording, dB ↑",
    "psnr_disoccluded": "PSNR of disoccluded cells to the decoded recording, dB ↑",
    "gradient_ratio_visible": "Spatial gradient of visible cells over the recording's",
    "gradient_ratio_disoccluded": "Spatial gradient of disoccluded cells over the recording's",
    "token_acc": "Token accuracy ↑",
    "codes": "Different codes in a frame",
}
WALK_TITLES = {"forward": "W held", "mixed": "mixed walk"}
WALK_ROWS = {
    "held": "starts that have held all along",
    "codes_ratio": "different codes over the recording's",
    "gradient_ratio": "spatial gradient over the recording's",
    "change_ratio": "change between frames over the recording's",
    "flicker_ratio": "flicker over the recording's",
    "fd_ratio": "Fréchet distance over the first second's",
}
DEPTH_ROWS = {
    "copy.depth.h{}.psnr": "copy",
    "rot.depth.h{}.psnr": "rotation",
    "geo.depth.h{}.psnr": "flat ground",
    "recording.depth.h{}.psnr": "recorded depth",
    "depth.h{}.psnr": "predicted depth",
    "depth.h{}.psnr_decoded": "predicted depth of decoded pictures",
    "depth.h{}.gain_share": "predicted: share of the gain",
    "depth.h{}.gain_share_decoded": "predicted, decoded pictures: share of the gain",
    "recording.depth.h{}.visible": "share of the view that the source shows",
}
HORIZON_DIGITS = {"codes": 0} | {f"psnr_{name}": 2 for name in ("tokens", "frames", *PARTS)}  # others: 3


@dataclass
class Result:
    """The result of one model."""

    evaluated: EvaluatedModel
    scores: Scores
    outputs: dict[str, Any] = field(default_factory=dict)  # section -> what it returned, for the plots
    seconds: dict[str, float] = field(default_factory=dict)  # per section


def as_json(result: Result, run_meta: dict) -> dict:
    """A model's metrics, intervals, series and metadata; `run_meta` is the run's."""
    evaluated = result.evaluated
    return {
        "metrics": result.scores.metrics,
        "ci95": result.scores.ci95,
        "series": series(result),
        "meta": {
            "checkpoint": provenance.display_path(evaluated.path),
            "name": evaluated.name,
            "step": evaluated.content.get("step"),
            "parameters": sum(p.numel() for p in evaluated.model.parameters()),
            **run_meta,
            "seconds": {**run_meta["seconds"], **result.seconds},
        },
    }


def series(result: Result) -> dict[str, list[float]]:
    """Lists over the windows of the long rollouts, and over the seconds of the walks as "walk.KIND.NAME"."""
    found = dict(result.outputs["long"][0]) if "long" in result.outputs else {}
    for kind, output in result.outputs.get("walk", {}).items():
        found |= {f"walk.{kind}.{name}": values for name, values in output["series"].items()}
    return found


def heading(meta: dict) -> str:
    """Two lines above the tables: the model, the data and the sampling."""
    sampling = meta["sampling"]
    how = (
        "greedy"
        if sampling["greedy"]
        else f"temperature {sampling['temperature']:g}, top-k {sampling['top_k'] or 'off'}, "
        f"top-p {sampling['top_p']:g}, passes {sampling['passes']}, code balance {sampling['code_balance']:g}"
    )
    return (
        f"{meta['checkpoint']}, step {meta['step']}, {meta['parameters']:,} parameters\n"
        f"{meta['data']}, split {meta['split']}: {len(meta['clips'])} clips, {meta['frames']:,} frames; "
        f"{how}, seed {meta['seed']}, {meta['precision']}; {meta['seconds']['all']} s"
    )


def cell(scores: Scores, key: str, digits: int, with_interval: bool = False) -> str:
    """One number of a table, `with_interval` its 95 % interval; "-" where it was not measured."""
    if key not in scores.metrics:
        return "-"
    text = f"{scores.metrics[key]:.{digits}f}"
    if with_interval and key in scores.ci95:
        low, high = scores.ci95[key]
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    relative = key.replace(".token_agreement", ".relative")
    if relative != key and relative in scores.metrics:
        text += f" ({scores.metrics[relative]:.2f})"
    return text


def compared_key(name: str, key: str) -> str:
    """The key of a model's metric in the column `name` of COMPARED.

    The inverse-dynamics network was trained on original pictures, so its recording is the original pictures.
    """
    if name == "recording" and key.startswith("control.idm."):
        name = "original"
    return f"{name}.{key}"


def summary(results: list[Result], plan: Plan) -> str:
    """The main table: a column per model, with 95 % intervals, and the columns COMPARED.

    The column "recording" is the same measurement on the recording, as the tokenizer reconstructs it.
    """
    first = results[0].scores
    columns = ["", *(r.evaluated.name for r in results), *COMPARED]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    pending = ""  # a heading without rows is left out
    for row in SUMMARY:
        if isinstance(row, Heading):
            title = row.title.format(ctx=plan.main_context)
            pending = f"| **{title}** |" + "  |" * (len(columns) - 1)
            continue
        key = row.key.format(ctx=plan.main_context)
        if not any(key in r.scores.metrics for r in results):
            continue
        if pending:
            lines.append(pending)
            pending = ""
        models = [cell(r.scores, key, row.digits, with_interval=True) for r in results]
        compared = [cell(first, compared_key(name, key), row.digits) for name in COMPARED]
        lines.append("| " + " | ".join([row.title + row.better, *models, *compared]) + " |")
    return "\n".join(lines)


def horizons(results: list[Result], plan: Plan) -> str:
    """A table per metric of the rollouts, with a column per horizon."""
    columns = {f"h{h}": f"frame {h}" for h in plan.horizons} | {f"mean{MEAN}": f"mean of {MEAN}"}
    rows = [
        (f"{r.evaluated.name}, context {context}", r.scores, f"rollout.ctx{context}")
        for r in results
        for context in plan.contexts
    ]
    rows += [(name, results[0].scores, f"{name}.rollout.ctx{plan.main_context}") for name in COMPARED]
    lines = []
    for metric, title in HORIZON_TITLES.items():
        measured = [row for row in rows if f"{row[2]}.h{plan.horizons[0]}.{metric}" in row[1].metrics]
        if not measured:
            continue
        digits = HORIZON_DIGITS.get(metric, 3)
        found = {
            name: [cell(scores, f"{prefix}.{column}.{metric}", digits) for column in columns]
            for name, scores, prefix in measured
        }
        lines += ["", table(title, list(columns.values()), found)]
    return "\n".join(lines[1:])


def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    """A table in Markdown: the cells of each row by its name."""
    lines = [[title, *columns], *([name, *cells] for name, cells in rows.items())]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|---" * (len(columns) + 1) + "|", *text[1:]])


def more_tables(results: list[Result]) -> list[str]:
    """The tables of the walks, by second, and of the depth, by horizon; those that were measured."""
    tables = []
    for kind, title in WALK_TITLES.items():
        columns = [second for second in SECONDS if f"walk.{kind}.s{second}.held" in results[0].scores.metrics]
        if not columns:
            continue
        found = {
            f"{r.evaluated.name}: {name}": [
                cell(r.scores, f"walk.{kind}.s{second}.{key}", 2) for second in columns
            ]
            for r in results
            for key, name in WALK_ROWS.items()
        }
        tables.append(table(f"Walks, {title}", [f"second {second}" for second in columns], found))
    scores = results[0].scores
    rows = {
        name: [cell(scores, key.format(h), 2) for h in DEPTH_HORIZONS]
        for key, name in DEPTH_ROWS.items()
        if key.format(DEPTH_HORIZONS[0]) in scores.metrics
    }
    if rows:
        title = f"Depth, PSNR in dB, {scores.metrics['depth.windows']:.0f} windows"
        tables.append(table(title, [f"{h} frames ahead" for h in DEPTH_HORIZONS], rows))
    return tables
