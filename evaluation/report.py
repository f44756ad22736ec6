"""The tables: every number beside what the other rows reach."""

from dataclasses import dataclass, field
from typing import Any

from evaluation.aggregate import Scores
from evaluation.held_out_clips import Plan, Subject
from evaluation.rollouts import MEAN

# Columns beside the models: how a model's key reads there.
BESIDE = {
    "geo": lambda key: key.replace("rollout.", "geo.", 1) if key.startswith("rollout.") else f"geo.{key}",
    "rot": lambda key: key.replace("rollout.", "rot.", 1) if key.startswith("rollout.") else f"rot.{key}",
    "copy": lambda key: key.replace("rollout.", "copy.", 1) if key.startswith("rollout.") else f"copy.{key}",
    "recording": lambda key: (
        key.replace("rollout.", "ceiling.", 1) if key.startswith("rollout.") else f"{key}.real"
    ),
}
UP, DOWN, NONE = " ↑", " ↓", ""  # the better direction
# Title, key, digits, direction. Sections are rows without a key.
SUMMARY = (
    ("**Teacher-forced**", "", 0, NONE),
    ("bits per token", "tf.bits_per_token", 2, DOWN),
    ("token accuracy", "tf.accuracy", 3, UP),
    ("… nothing done", "tf.still.accuracy", 3, UP),
    ("… turning only", "tf.turn.accuracy", 3, UP),
    ("… moving only", "tf.move.accuracy", 3, UP),
    ("… both", "tf.both.accuracy", 3, UP),
    ("… of cells that come into view", "tf.disoccluded_accuracy", 3, UP),
    ("**Rollouts from {ctx} frames**", "", 0, NONE),
    ("PSNR to decoded truth, mean of 20 frames, dB", "rollout.ctx{ctx}.mean20.psnr_tokens", 2, UP),
    ("PSNR to true pictures, mean of 20, dB", "rollout.ctx{ctx}.mean20.psnr_frames", 2, UP),
    ("token accuracy, mean of 20", "rollout.ctx{ctx}.mean20.token_acc", 3, UP),
    ("SSIM, frame 20", "rollout.ctx{ctx}.h20.ssim", 3, UP),
    ("perceptual distance, frame 1", "rollout.ctx{ctx}.h1.perceptual", 3, DOWN),
    ("perceptual distance, frame 20", "rollout.ctx{ctx}.h20.perceptual", 3, DOWN),
    ("perceptual distance, frame 64", "rollout.ctx{ctx}.h64.perceptual", 3, DOWN),
    ("edge F1, frame 20", "rollout.ctx{ctx}.h20.edge_f1", 3, UP),
    ("codes in a frame, frame 20", "rollout.ctx{ctx}.h20.codes", 0, NONE),
    ("**Obedience**", "", 0, NONE),
    ("flow profile", "obey.flow_profile", 3, UP),
    ("flow over the truth's", "obey.flow_ratio", 2, NONE),
    ("opposite turns both right", "obey.pairs.turn", 3, UP),
    ("opposite looks both right", "obey.pairs.look", 3, UP),
    ("forward and back both right", "obey.pairs.forward_back", 3, UP),
    ("… by neighbouring frames", "obey.pairs_by_frame.forward_back", 3, UP),
    ("strafes both right", "obey.pairs.strafe", 3, UP),
    ("… by neighbouring frames", "obey.pairs_by_frame.strafe", 3, UP),
    ("sign of the flow, recorded turns", "obey.sign.turn", 3, UP),
    ("sign, recorded strafes", "obey.sign.strafe", 3, UP),
    ("sign, recorded forward and back", "obey.sign.forward_back", 3, UP),
    ("rotation error, degrees a frame (median)", "obey.rotation_deg_median", 2, DOWN),
    ("read back by inverse dynamics: yaw error, degrees", "obey.idm.yaw_deg", 2, DOWN),
    ("… pitch error, degrees", "obey.idm.pitch_deg", 2, DOWN),
    ("… F1 left / none / right", "obey.idm.move_x_f1", 3, UP),
    ("… F1 back / none / forward", "obey.idm.move_z_f1", 3, UP),
    ("… F1 jump", "obey.idm.jump_f1", 3, UP),
    ("ΔPSNR true less random actions, frame 4, dB", "obey.delta_psnr", 2, UP),
    ("**Stillness**", "", 0, NONE),
    ("change between frames over the recording's", "still.change_ratio", 2, DOWN),
    ("edge flicker over the recording's", "still.flicker_ratio", 2, DOWN),
    ("**Memory**: tokens agree after turning away and back", "", 0, NONE),
    ("30 degrees (over that without turning)", "memory.deg30.token_agreement", 3, UP),
    ("60 degrees", "memory.deg60.token_agreement", 3, UP),
    ("90 degrees", "memory.deg90.token_agreement", 3, UP),
    ("180 degrees", "memory.deg180.token_agreement", 3, UP),
    ("**Life**", "", 0, NONE),
    ("first frame of a collapse (-1: none)", "life.collapse_frame", 0, NONE),
    ("Fréchet distance, last window over first", "life.fd_ratio", 2, DOWN),
    ("codes in a frame over the recording's, last window", "life.codes_ratio", 2, NONE),
    ("**Tokenizer**", "", 0, NONE),
    ("PSNR, dB", "tokenizer.psnr", 2, UP),
    ("SSIM", "tokenizer.ssim", 3, UP),
    ("perceptual distance", "tokenizer.perceptual", 3, DOWN),
    ("codes used", "tokenizer.used_codes", 0, UP),
    ("perplexity", "tokenizer.perplexity", 0, UP),
    ("codes that flip while all stands still", "tokenizer.flip_rate", 3, DOWN),
)
HORIZON_TITLES = {
    "psnr_tokens": "PSNR to the decoded true tokens, dB ↑",
    "psnr_frames": "PSNR to the true pictures, dB ↑",
    "ssim": "SSIM to the decoded true tokens ↑",
    "perceptual": "Perceptual distance (EffNet-Lite0) to the decoded true tokens ↓",
    "perceptual_frames": "Perceptual distance (EffNet-Lite0) to the true pictures ↓",
    "lpips": "LPIPS to the decoded true tokens ↓",
    "edge_f1": "Edge F1 to the decoded true tokens ↑",
    "token_acc": "Token accuracy ↑",
    "codes": "Different codes in a frame",
}
DIGITS = {"psnr_tokens": 2, "psnr_frames": 2, "codes": 0}


@dataclass
class Result:
    """What came of one world: its scores, and what is drawn."""

    subject: Subject
    scores: Scores
    shown: dict[str, Any] = field(default_factory=dict)  # what each section returned, to be drawn
    seconds: dict[str, float] = field(default_factory=dict)  # of each section


def heading(meta: dict) -> str:
    """What was measured, in two lines."""
    sampling = meta["sampling"]
    how = (
        "greedy"
        if sampling["greedy"]
        else f"temperature {sampling['temperature']:g}, top-k {sampling['top_k'] or 'off'}, "
        f"top-p {sampling['top_p']:g}, passes {sampling['passes']}"
    )
    return (
        f"{meta['checkpoint']}, step {meta['step']}, {meta['parameters']:,} parameters\n"
        f"{meta['data']}, split {meta['split']}: {len(meta['clips'])} clips, {meta['frames']:,} frames; "
        f"{how}, seed {meta['seed']}, {meta['precision']}; {meta['seconds']['all']} s"
    )


def cell(scores: Scores, key: str, digits: int, with_interval: bool = False) -> str:
    """One number of a table, with its interval where there is one; "-" where it was not measured."""
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


def summary(results: list[Result]) -> str:
    """The main table in Markdown: a column for each model (with 95 % intervals) and each row beside it.

    The column "recording" has what the same measurement gives on the recording itself, as the tokenizer
    reconstructs it; inverse dynamics reads the true pictures.
    """
    first = results[0].scores
    shown = [
        (title, key, digits, arrow)
        for title, key, digits, arrow in (
            (t.format(ctx=context(first)), k.format(ctx=context(first)), d, a) for t, k, d, a in SUMMARY
        )
        if not key or any(key in r.scores.metrics for r in results)
    ]
    # A heading stays only where something follows it.
    shown = [
        row for row, after in zip(shown, [*shown[1:], ("", "", 0, "")], strict=True) if row[1] or after[1]
    ]
    heads = ["", *(r.subject.name for r in results), *BESIDE]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for title, key, digits, arrow in shown:
        models = [cell(r.scores, key, digits, True) if key else "" for r in results]
        beside = [cell(first, name(key), digits) if key else "" for name in BESIDE.values()]
        lines.append("| " + " | ".join([title + arrow, *models, *beside]) + " |")
    return "\n".join(lines)


def context(scores: Scores) -> int:
    """The context of the main rollouts: 6 where it was measured, else the longest."""
    found = {int(key.split(".")[1][3:]) for key in scores.metrics if key.startswith("rollout.ctx")}
    return 6 if 6 in found or not found else max(found)


def horizons(results: list[Result], plan: Plan) -> str:
    """A table for each metric of the rollouts, over the horizons."""
    lines = []
    columns = [f"h{h}" for h in plan.horizons] + [f"mean{MEAN}"]
    heads = [f"frame {h}" for h in plan.horizons] + [f"mean of {MEAN}"]
    for metric, title in HORIZON_TITLES.items():
        rows = [
            (f"{r.subject.name}, {c} seen", r.scores, f"rollout.ctx{c}")
            for r in results
            for c in plan.contexts
        ]
        rows += [
            (name, results[0].scores, f"{name}.ctx{plan.main}") for name in ("geo", "rot", "copy", "ceiling")
        ]
        measured = [row for row in rows if f"{row[2]}.h{plan.horizons[0]}.{metric}" in row[1].metrics]
        if not measured:
            continue
        lines += ["", f"| {title} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name, scores, prefix in measured:
            cells = [cell(scores, f"{prefix}.{c}.{metric}", DIGITS.get(metric, 3)) for c in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])
