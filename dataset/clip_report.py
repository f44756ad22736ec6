"""Formats the result of the data check (clip_check.py) as a table for the terminal."""

from collections import Counter

from dataset.clip_check import ActionBalance, Report
from dataset.picture_check import DEPTH_STEPS, LAGS, PictureCheck


def report_text(report: Report) -> str:
    """The whole table; its last lines are the problems, or "no problem found"."""
    lines = [f"{report.parent}: {report.clips} clips, {report.source}"]
    if report.source != "gamefactory":
        return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
    lines.append(f"frames        {report.frames} in readable clips, {report.hours:.2f} hours")
    lines += [f"bad file      {bad}" for bad in report.bad_files]
    for name, counts in (
        ("biomes", report.biomes),
        ("worlds", report.worlds),
        ("player", report.styles),
        ("ended early", Counter(report.ended_early.values())),
    ):
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        lines.append(f"{name:13} " + (", ".join(f"{value} {n}" for value, n in ranked) or "none"))
    lines.append(f"depth         {report.with_depth} clips, {report.with_nodes} with nodes")
    lines += ["", *_balance_lines(report.balance)] if report.balance else []
    lines += ["", *_picture_lines(report.pictures)] if report.pictures and report.pictures.clips else []
    lines.append("")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"PROBLEM: {problem}" for problem in report.problems] or ["no problem found"]
    return "\n".join(lines)


def _balance_lines(balance: ActionBalance) -> list[str]:
    lines = ["share of frames by action"]
    lines += [f"  {name:11} {share:6.1%}" for name, share in balance.classes.items()]
    lines += [
        f"  turns       {balance.turns_left:6.1%} left, {balance.turns_right:.1%} right",
        f"  strafes     {balance.strafes_left:6.1%} left, {balance.strafes_right:.1%} right",
    ]
    if balance.pitch_mean is not None:
        lines.append(f"  pitch       mean {balance.pitch_mean:.1f} degrees down")
    return lines


def _picture_lines(result: PictureCheck) -> list[str]:
    heading = "  ".join(f"{lag:+d}".rjust(6) for lag in LAGS)
    lines = [
        f"pictures of {len(result.clips)} clips",
        f"  turns in pictures and actions, correlation at lag  {heading}",
    ]
    for name, axis in (("yaw", result.yaw), ("pitch", result.pitch)):
        if axis is None:
            lines.append(f"    {name:5} not available")
            continue
        row = "  ".join(f"{axis.correlation[lag]:6.2f}" for lag in LAGS)
        lines.append(f"    {name:5} {axis.frames:5} frames, {_which(axis.turn_only):24}        {row}")
    for title, errors, pairs in (
        ("signs of (yaw, pitch)", result.turn_error, result.turn_pairs),
        ("signs of (x, z)", result.walk_error, result.walk_pairs),
    ):
        lines.append(
            f"  {title}: " + (f"warp error {_row(errors)} ({pairs} pairs)" if errors else "not available")
        )
    if result.fov is None:
        lines.append("  vertical field of view: not available")
    else:
        lines.append(
            f"  vertical field of view: {result.fov:.1f} degrees, median of {result.fov_clips} clips "
            f"({_which(result.fov_turn_only)})"
        )
    if result.depth_error:
        lines.append(
            f"  depth: warp error by lag {_row(result.depth_error)} ({result.depth_pairs} pairs in "
            f"{result.depth_clips} clips, {DEPTH_STEPS} frames apart)"
        )
    elif result.depth_clips:
        lines.append("  depth: not verified")
    return lines


def _which(turn_only: bool) -> str:
    return "turn-only pairs" if turn_only else "all pairs, walking too"


def _row(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
