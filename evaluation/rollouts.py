"""Section 2 and the recorded half of section 3: recorded stretches are generated again under their own actions.

All contexts end at the same frame, so that every row of the table is compared on the same pictures.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import metrics
from dataset.actions import MOVE_X, MOVE_Z, PITCH, YAW
from evaluation import inverse_dynamics
from evaluation.aggregate import Scores
from evaluation.held_out_clips import HeldOutClips, Judges, Plan, Subject
from geometry import camera

MEAN = 20  # frames over which the cheap metrics are averaged as well
COSTLY = ("ssim", "perceptual", "lpips", "edge_f1")  # only at the horizons
TURNS = 2.0  # degrees in FLOW_EVERY frames: a turn whose sign is asked for
RANDOM_STEPS = 20  # frames of the rollout under random actions


@dataclass
class Row:
    """A prediction of the windows. F are the frames that are looked at, as offsets from the last seen one."""

    tokens: Tensor  # [N, F, H, W] int64
    pictures: Tensor  # [N, F, 3, Hp, Wp]
    values: dict[str, np.ndarray] = field(default_factory=dict)  # metric -> [N, F], NaN where not measured
    flow: np.ndarray | None = None  # [N, K, 4] of flow_of, every FLOW_EVERY frames


@dataclass
class Recorded:
    """The windows and all that does not depend on the world."""

    windows: np.ndarray  # [N, 2]
    tokens: Tensor  # [N, span, H, W]
    actions: Tensor  # [N, span-1, 5]
    frames: np.ndarray  # [F]
    rows: dict[str, Row]  # truth (decoded true tokens), copy, rot, geo
    real: dict[
        int, Tensor
    ]  # of windows whose video can be opened: true pictures [1+F, 3, Hp, Wp], last seen first

    @property
    def clips(self) -> np.ndarray:
        return self.windows[:, 0]


def looked_at(plan: Plan) -> np.ndarray:
    """Frames of the rollout that are decoded: the first MEAN, every FLOW_EVERY-th, and the horizons."""
    last = max(plan.horizons)
    every = range(metrics.FLOW_EVERY, last + 1, metrics.FLOW_EVERY)
    return np.array(sorted({*range(1, min(MEAN, last) + 1), *every, *plan.horizons}))


def record(held: HeldOutClips, plan: Plan, judges: Judges) -> Recorded:
    """The windows, their true pictures, and the rows beside the model."""
    windows = held.windows(plan.span, plan.windows)
    tokens, actions = held.batch(windows, plan.span)
    frames, seen = looked_at(plan), max(plan.contexts) - 1
    real = dict(held.true_pictures(windows, seen + np.concatenate([[0], frames])))
    recorded = Recorded(windows, tokens, actions, frames, {}, real)
    truth = tokens[:, seen + frames]
    last = held.decode(tokens[:, seen : seen + 1])  # [N, 1, 3, Hp, Wp]
    recorded.rows["truth"] = Row(truth, held.decode(truth))
    copied = tokens[:, seen : seen + 1].expand_as(truth)
    recorded.rows["copy"] = Row(copied, last.expand(-1, len(frames), -1, -1, -1))
    for name, moved in (("rot", False), ("geo", True)):
        warped = warp(held, windows, plan.span, last, seen, frames, moved)
        if warped is not None:
            recorded.rows[name] = Row(held.encode(warped), warped)
    for name, row in tqdm(recorded.rows.items(), desc="rows beside the model", leave=False):
        compare(row, recorded, plan, judges, against_tokens=name != "truth")
        row.flow = flow_series(last, row, frames)
    return recorded


def warp(
    held: HeldOutClips,
    windows: np.ndarray,
    span: int,
    last: Tensor,
    seen: int,
    frames: np.ndarray,
    moved: bool,
) -> Tensor | None:
    """The last seen picture [N, 1, 3, Hp, Wp] as the true poses of `frames` would see it: [N, F, 3, Hp, Wp].

    The camera turns; with `moved` it also goes where the player went, over a flat ground.
    Each frame is warped straight from the last seen picture, not step by step, which would blur. None where
    `moved` is asked for and poses were not recorded.
    """
    angles = held.turned(windows, span)
    place = held.pose(windows, span)[..., :3] if moved else torch.zeros(*angles.shape[:2], 3)
    if not place.isfinite().all():
        return None
    pose = torch.cat([place - place[:, :1], angles], -1)
    size, made = last.shape[-2:], []
    for n in range(len(windows)):
        new = pose[n, seen + frames]
        old = pose[n, seen].expand_as(new)
        far = (
            camera.ground_plane(new, *size, held.fov, camera.EYE_HEIGHT, camera.FAR_RAY_DISTANCE)
            if moved
            else 0.0
        )
        grid, _ = camera.reproject(old, new, far, *size, held.fov)
        made.append(camera.warp(last[n].expand(len(new), -1, -1, -1), grid))
    return torch.stack(made)


def compare(row: Row, recorded: Recorded, plan: Plan, judges: Judges, against_tokens: bool = True) -> None:
    """Fills in `row.values`: against the decoded true tokens (unless the row is them) and the true pictures.

    `ssim`, `perceptual` and `edge_f1` are against the decoded tokens, `ssim_frames` … against the pictures.
    """
    truth, n, f = recorded.rows["truth"], len(row.tokens), len(recorded.frames)
    costly = np.isin(recorded.frames, plan.horizons)

    def note(name: str, window: int | slice, value: Tensor, where: np.ndarray | slice = slice(None)) -> None:
        row.values.setdefault(name, np.full((n, f), np.nan))[window, where] = value.numpy()

    def pictures(window: int, real: Tensor, psnr: str, suffix: str) -> None:
        made = row.pictures[window]
        note(psnr, window, metrics.psnr(made, real))
        made, real = made[costly], real[costly]
        note(f"ssim{suffix}", window, metrics.ssim(made, real), costly)
        note(f"edge_f1{suffix}", window, metrics.edge_f1(made, real), costly)
        for name, distance in judges.distances(made, real).items():
            note(f"{name}{suffix}", window, distance, costly)

    note("codes", slice(None), metrics.unique_codes(row.tokens))
    if against_tokens:
        note("token_acc", slice(None), metrics.token_accuracy(row.tokens, truth.tokens))
        note("codes_ratio", slice(None), metrics.codes_ratio(row.tokens, truth.tokens))
    for window in range(n):
        if against_tokens:
            pictures(window, truth.pictures[window], "psnr_tokens", "")
        if window in recorded.real:
            pictures(window, recorded.real[window][1:], "psnr_frames", "_frames")


def flow_series(last: Tensor, row: Row, frames: np.ndarray) -> np.ndarray:
    """Optical flow from the last seen picture on, every FLOW_EVERY frames: [N, K, 4], see `flow_of`."""
    at = np.flatnonzero(frames % metrics.FLOW_EVERY == 0)
    return flow_of(torch.cat([last, row.pictures[:, at]], 1))


def flow_of(pictures: Tensor) -> np.ndarray:
    """Pictures [N, K+1, 3, Hp, Wp] -> between neighbours [N, K, 4]: length, horizontal, radial and vertical
    flow."""
    flow = metrics.optical_flow(pictures[:, :-1], pictures[:, 1:])
    kinds = (metrics.flow_magnitude, metrics.horizontal_flow, metrics.radial_flow, metrics.vertical_flow)
    return torch.stack([kind(flow) for kind in kinds], -1).numpy()


# ---------------------------------------------------------------- what the model does


def measure(
    held: HeldOutClips, subject: Subject, plan: Plan, judges: Judges, recorded: Recorded, scores: Scores
) -> dict[str, Tensor]:
    """All numbers of the rollouts; -> the generated tokens [N, horizon, H, W] by "ctxN"."""
    seen = max(plan.contexts) - 1
    last = held.decode(recorded.tokens[:, seen : seen + 1])
    rollouts, rows = {}, {}
    for context in plan.contexts:
        begin = seen - context + 1
        name = f"ctx{context}"
        rollouts[name] = subject.rollout(
            recorded.tokens[:, begin : seen + 1],
            recorded.actions[:, begin:],
            held.pose(recorded.windows + [0, begin], context),
            f"{context} seen",
        )
        made = rollouts[name][:, recorded.frames - 1]
        rows[name] = Row(made, held.decode(made))
        compare(rows[name], recorded, plan, judges)
        report_values(scores, f"rollout.{name}", rows[name], recorded, plan)
    for name, row in recorded.rows.items():
        # What does not depend on the context is given under each, so that keys match the model's.
        for context in plan.contexts:
            report_values(
                scores, f"{'ceiling' if name == 'truth' else name}.ctx{context}", row, recorded, plan
            )
    main = rows[f"ctx{plan.main}"]
    main.flow = flow_series(last, main, recorded.frames)
    beside = {f"{name}.": recorded.rows.get(name) for name in ("copy", "rot", "geo")}
    report_flow(scores, recorded, {"": main, **beside}, held.degrees_per_unit)
    if judges.inverse_dynamics is not None:
        report_inverse_dynamics(scores, judges.inverse_dynamics, recorded, last, main, beside)
    report_delta(scores, held, subject, plan, recorded, main)
    return rollouts


def report_values(scores: Scores, prefix: str, row: Row, recorded: Recorded, plan: Plan) -> None:
    """`PREFIX.hH.METRIC` at the horizons and `PREFIX.mean20.METRIC` for what was measured at each of them."""
    columns = {f"h{h}": recorded.frames == h for h in plan.horizons}
    columns[f"mean{MEAN}"] = recorded.frames <= MEAN
    for metric, values in row.values.items():
        for column, chosen in columns.items():
            costly = metric.removesuffix("_frames") in COSTLY
            if not (costly and column.startswith("mean")):
                scores.mean(f"{prefix}.{column}.{metric}", values[:, chosen], recorded.clips)


def report_flow(
    scores: Scores, recorded: Recorded, rows: dict[str, Row | None], degrees_per_unit: float
) -> None:
    """`obey.flow_profile`, `obey.flow_ratio` and signs, of the model ("") and of the rows beside it."""
    truth = recorded.rows["truth"].flow
    commands = commanded(recorded, degrees_per_unit)
    for prefix, row in rows.items():
        if row is None:
            continue
        length = torch.from_numpy(row.flow[..., 0]), torch.from_numpy(truth[..., 0])
        scores.mean(f"{prefix}obey.flow_profile", metrics.flow_profile(*length).numpy(), recorded.clips)
        scores.mean(f"{prefix}obey.flow_ratio", row.flow[..., 0].sum(1), recorded.clips, truth[..., 0].sum(1))
    for name, (sign, kind) in commands.items():
        if (sign != 0).any():
            for suffix, flow in (("", rows[""].flow), (".real", truth)):
                right = np.where(sign == 0, np.nan, metrics.flow_sign(flow[..., kind]) == sign)
                scores.mean(f"obey.sign.{name}{suffix}", right, recorded.clips)


def commanded(recorded: Recorded, degrees_per_unit: float) -> dict[str, tuple[np.ndarray, int]]:
    """What the recorded actions ask of the optical flow in each stretch of FLOW_EVERY frames:
    name -> (signs [N, K], 0 where nothing is asked; which number of `flow_of`).

    A stretch asks only if the same is held throughout and nothing else happens. Turning right and strafing to
    the right move the picture to the left.
    """
    first = recorded.tokens.shape[1] - 1 - recorded.frames[-1]
    stretches = len(recorded.frames[recorded.frames % metrics.FLOW_EVERY == 0])
    parts = recorded.actions[:, first : first + stretches * metrics.FLOW_EVERY].numpy()
    parts = parts.reshape(len(parts), stretches, metrics.FLOW_EVERY, -1)

    def held_sign(axis: int) -> np.ndarray:
        low, high = parts[..., axis].min(2), parts[..., axis].max(2)
        return np.where(low > 0, 1, np.where(high < 0, -1, 0))

    turning = np.abs(parts[..., [YAW, PITCH]]).sum((2, 3)) > 0
    keys = np.abs(parts[..., [MOVE_X, MOVE_Z]]).max(2)  # [N, K, 2]
    large = np.abs(parts[..., YAW].sum(2)) * degrees_per_unit >= TURNS
    return {
        "turn": (-held_sign(YAW) * large, 1),
        "strafe": (-held_sign(MOVE_X) * ~turning * (keys[..., 1] == 0), 1),
        "forward_back": (held_sign(MOVE_Z) * ~turning * (keys[..., 0] == 0), 2),
    }


def report_inverse_dynamics(
    scores: Scores,
    judge: inverse_dynamics.InverseDynamics,
    recorded: Recorded,
    last: Tensor,
    made: Row,
    beside: dict[str, Row | None],
) -> None:
    """`obey.idm.*`: what the inverse-dynamics network reads from the rollout's first MEAN frames; `.decoded`
    from the decoded true tokens, `.real` from the true pictures. `geo.obey.idm.*` … of the rows beside."""
    # Those that follow each other without a gap.
    steps = int((np.diff(recorded.frames, prepend=0) == 1).cumprod().sum())
    first = recorded.tokens.shape[1] - 1 - recorded.frames[-1]
    actions = recorded.actions[:, first : first + steps]

    def read(prefix: str, suffix: str, pictures: Tensor, windows: np.ndarray) -> None:
        """Pictures [n, 1+steps, 3, Hp, Wp], the last seen one first."""
        before, after = pictures[:, :-1].flatten(0, 1), pictures[:, 1:].flatten(0, 1)
        found = inverse_dynamics.predict(judge, before, after)
        asked = inverse_dynamics.labels(actions[windows].flatten(0, 1), judge.config.degrees_per_unit)
        clips = recorded.clips[windows].repeat(steps)
        for name in ("yaw", "pitch"):
            error = np.abs(found[name] - asked[name].numpy())
            scores.mean(f"{prefix}obey.idm.{name}_deg{suffix}", error, clips)
        for name, classes in inverse_dynamics.KEYS.items():
            pairs = np.stack([found[name], asked[name].numpy()], 1)

            def f1(pairs: np.ndarray, classes: int = classes) -> float:
                return metrics.macro_f1(metrics.confusion(pairs[:, 0], pairs[:, 1], classes))

            scores.statistic(f"{prefix}obey.idm.{name}_f1{suffix}", pairs, clips, f1)

    every = np.arange(len(recorded.windows))
    for prefix, row in {"": made, **beside}.items():
        if row is not None:
            read(prefix, "", torch.cat([last, row.pictures[:, :steps]], 1), every)
    read("", ".decoded", torch.cat([last, recorded.rows["truth"].pictures[:, :steps]], 1), every)
    if recorded.real:
        pictures = torch.stack([p[: 1 + steps] for p in recorded.real.values()])
        read("", ".real", pictures, np.array(list(recorded.real)))


def report_delta(
    scores: Scores, held: HeldOutClips, subject: Subject, plan: Plan, recorded: Recorded, made: Row
) -> None:
    """`obey.delta_psnr` at 4 frames, as in its source, and `obey.delta_psnr.hH`: PSNR under the true actions
    less that under the actions of another window."""
    begin = max(plan.contexts) - plan.main
    steps = min(RANDOM_STEPS, max(plan.horizons))
    seen = recorded.tokens[:, begin : begin + plan.main]
    actions = recorded.actions[:, begin : begin + plan.main - 1 + steps].clone()
    # The window half the list away is of another clip wherever there are two.
    others = np.roll(np.arange(len(actions)), len(actions) // 2)
    actions[:, plan.main - 1 :] = actions[others, plan.main - 1 :]
    generated = subject.rollout(
        seen, actions, held.pose(recorded.windows + [0, begin], plan.main), "random actions"
    )
    for horizon in (h for h in plan.horizons if h <= steps):
        at = np.flatnonzero(recorded.frames == horizon)[0]
        wrong = metrics.psnr(held.decode(generated[:, horizon - 1]), recorded.rows["truth"].pictures[:, at])
        right = torch.from_numpy(made.values["psnr_tokens"][:, at])
        value = metrics.delta_psnr(right, wrong).numpy()
        scores.mean(f"obey.delta_psnr.h{horizon}", value, recorded.clips)
        if horizon == 4:
            scores.mean("obey.delta_psnr", value, recorded.clips)
