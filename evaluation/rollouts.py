"""Section rollouts: recorded windows are rolled out under their own actions and compared with the recording.

The contexts of all lengths end at the same frame, so that all rows of the table compare the same pictures.
Visible cells, which the context shows, and disoccluded ones, which it does not, are also measured apart.
The baselines are the last context frame: copied (`copy`), warped as the camera rotated (`rot`), and warped as
the camera rotated and moved over a flat ground (`geo`). The last two are given the true poses.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import metrics
from dataset.actions import MOVE_X, MOVE_Z, PITCH, YAW
from dataset.surroundings import FARTHEST, decode_inverse_ray_distance
from evaluation import inverse_dynamics
from evaluation.aggregate import Scores
from evaluation.evaluated_model import EvaluatedModel
from evaluation.held_out_clips import HeldOutClips, has_recorded_depth
from evaluation.picture_networks import PictureNetworks
from evaluation.plan import Plan
from geometry import camera
from geometry.zbuffer import warp_by_zbuffer

MEAN = 20  # frames over which the cheap metrics are also averaged
HORIZON_METRICS = ("ssim", "perceptual", "lpips", "edge_f1")  # slow: at the horizons only
MIN_TURN = 2.0  # degrees in FLOW_EVERY frames: the least recorded turn whose sign is measured
RANDOM_FRAMES = 20  # of the rollout under another window's actions
BASELINES = ("copy", "rot", "geo")
PARTS = ("visible", "disoccluded")
MIN_CELLS = 16  # of a picture that are visible, or disoccluded, for them to be measured apart
LENGTH, HORIZONTAL, RADIAL, VERTICAL = range(4)  # of `flow_measures`


@dataclass
class FrameSet:
    """Frames of all windows from one source: the recording, a baseline or a model.

    F frames of each window are measured, see `measured_frames`.
    """

    tokens: Tensor  # [N, F, H, W] int64
    pictures: Tensor  # [N, F, 3, Hp, Wp]
    values: dict[str, np.ndarray] = field(default_factory=dict)  # metric -> [N, F], NaN where not measured
    flow: np.ndarray | None = None  # [N, K, 4] of `flow_measures`, every FLOW_EVERY frames


@dataclass
class RecordedWindows:
    """The recorded windows, and everything about them that does not depend on the model."""

    windows: np.ndarray  # [N, 2]
    tokens: Tensor  # [N, span, H, W]
    actions: Tensor  # [N, span-1, 5]
    frames: np.ndarray  # [F] measured frames, counted from the last frame of the context
    sources: dict[str, FrameSet]  # "recording" (decoded true tokens) and the baselines
    # Window index -> original pictures [1+F, 3, Hp, Wp], the context's last frame first.
    original_pictures: dict[int, Tensor]
    visible: Tensor | None = None  # [N, F, H, W] bool: cells that the context shows; None without poses

    @property
    def clips(self) -> np.ndarray:
        """The clip of each window [N]."""
        return self.windows[:, 0]


def measured_frames(plan: Plan) -> np.ndarray:
    """Frames of the rollout that are measured [F]: the first MEAN, every FLOW_EVERY-th, and the horizons."""
    last = max(plan.horizons)
    every = range(metrics.FLOW_EVERY, last + 1, metrics.FLOW_EVERY)
    return np.array(sorted({*range(1, min(MEAN, last) + 1), *every, *plan.horizons}))


def read_windows(held_out: HeldOutClips, plan: Plan, networks: PictureNetworks) -> RecordedWindows:
    """The recorded windows with their original pictures, and the baselines with their metrics."""
    windows = held_out.windows(plan.span, plan.windows)
    frames, last = measured_frames(plan), max(plan.contexts) - 1
    original_pictures = held_out.original_pictures(windows, last + np.concatenate([[0], frames]))
    tokens, actions, _ = held_out.clips.batch(windows, plan.span)
    recorded = RecordedWindows(windows, tokens, actions, frames, {}, original_pictures)
    recorded.visible = visible_cells(held_out, windows, plan, last, frames)
    truth, last_tokens = tokens[:, last + frames], tokens[:, last : last + 1]
    last_picture = held_out.decode(last_tokens)  # [N, 1, 3, Hp, Wp]
    recorded.sources["recording"] = FrameSet(truth, held_out.decode(truth))
    if recorded.visible is not None:
        share = recorded.visible.float().mean((2, 3)).numpy()
        recorded.sources["recording"].values["visible_share"] = share
    recorded.sources["copy"] = FrameSet(
        last_tokens.expand_as(truth), last_picture.expand(-1, len(frames), -1, -1, -1)
    )
    for name, moves in (("rot", False), ("geo", True)):
        warped = warp_picture(held_out, windows, plan.span, last_picture, last, frames, moves)
        if warped is not None:
            recorded.sources[name] = FrameSet(held_out.encode(warped), warped)
    for name, source in tqdm(recorded.sources.items(), desc="baselines", leave=False):
        compare(source, recorded, plan, networks, with_tokens=name != "recording")
        source.flow = flow_series(last_picture, source, frames)
    return recorded


def visible_cells(
    held_out: HeldOutClips, windows: np.ndarray, plan: Plan, last: int, frames: np.ndarray
) -> Tensor | None:
    """The cells [N, F, H, W] bool of the frames last + `frames` [F] that the context shows.

    The context is the first and the last frame of the main one, which ends at frame `last` of the windows.
    Where its depth was recorded and is loaded (`TokenClips`, extras "depth"), the depth is warped with a
    z-buffer; elsewhere the ground is taken to be flat. None where poses were not recorded.
    """
    pose = held_out.clips.batch(windows, plan.span)[2]
    if not pose.isfinite().all():
        return None
    height, width = held_out.manifest.latent_size
    depth = held_out.clips.extras.get("depth")
    visible = torch.zeros(len(windows), len(frames), height, width, dtype=torch.bool)
    for n, (clip, start) in enumerate(windows):
        pose_to = pose[n, last + frames]
        for source in {last - plan.main_context + 1, last}:
            pose_from = pose[n, source].expand_as(pose_to)
            if has_recorded_depth(held_out, clip):
                inverse = torch.from_numpy(decode_inverse_ray_distance(depth[clip][start + source]))
                inverse = inverse.clamp(min=1 / FARTHEST).expand(len(frames), -1, -1)
                fallback = camera.ground_plane(pose_to, *inverse.shape[1:], held_out.fov)
                shown = warp_by_zbuffer(inverse, pose_from, pose_to, fallback, held_out.fov)[2]
                visible[n] |= F.adaptive_avg_pool2d(shown.float(), (height, width)) >= 0.5
            else:
                visible[n] |= ~camera.disoccluded_mask(pose_from, pose_to, height, width, held_out.fov)
    return visible


def compare_parts(source: FrameSet, recorded: RecordedWindows) -> None:
    """Fills in `source.values` of visible and of disoccluded cells, against the decoded true tokens.

    `psnr_PART`, `token_acc_PART`, and `gradient_ratio_PART`: their mean gradient over the truth's. NaN where
    a picture has fewer than MIN_CELLS of them.
    """
    truth = recorded.sources["recording"]
    size = truth.tokens.shape[-2:]
    names = [f"{m}_{part}" for m in ("psnr", "token_acc", "gradient_ratio") for part in PARTS]
    found = {name: [] for name in names}
    for n in range(len(source.tokens)):  # window by window: the pictures of all are large
        error = (source.pictures[n] - truth.pictures[n]).square().mean(1)  # [F, Hp, Wp]
        gradients = [metrics.gradient_map(frames.pictures[n]) for frames in (source, truth)]
        error, gradient, true_gradient = (F.adaptive_avg_pool2d(x, size) for x in (error, *gradients))
        same = (source.tokens[n] == truth.tokens[n]).float()
        for part, cells in zip(PARTS, (recorded.visible[n], ~recorded.visible[n]), strict=True):
            found[f"psnr_{part}"].append(
                -10 * mean_of_cells(error, cells).clamp_min(metrics.MSE_FLOOR).log10()
            )
            found[f"token_acc_{part}"].append(mean_of_cells(same, cells))
            ratio = mean_of_cells(gradient, cells) / mean_of_cells(true_gradient, cells)
            found[f"gradient_ratio_{part}"].append(ratio)
    source.values |= {name: torch.stack(values).numpy() for name, values in found.items()}


def mean_of_cells(values: Tensor, cells: Tensor) -> Tensor:
    """Values [F, H, W], averaged over some cells [F, H, W] bool -> [F], NaN for fewer than MIN_CELLS."""
    count = cells.sum((1, 2))
    return torch.where(count >= MIN_CELLS, (values * cells).sum((1, 2)) / count, torch.nan)


def warp_picture(
    held_out: HeldOutClips,
    windows: np.ndarray,
    span: int,
    picture: Tensor,
    at: int,
    frames: np.ndarray,
    moves: bool,
) -> Tensor | None:
    """The picture [N, 1, 3, Hp, Wp] of frame `at`, warped to the true poses of the frames at + `frames` [F]:
    [N, F, 3, Hp, Wp].

    The camera rotates; with `moves` it also moves, over a flat ground. Each frame is warped directly from the
    picture, since a chain of warps would blur. None with `moves` where poses were not recorded.
    """
    angles = held_out.view_angles(windows, span)
    place = held_out.clips.batch(windows, span)[2][..., :3] if moves else torch.zeros(*angles.shape[:2], 3)
    if not place.isfinite().all():
        return None
    pose = torch.cat([place, angles], -1)
    size, warped = picture.shape[-2:], []
    for n in range(len(windows)):
        pose_to = pose[n, at + frames]
        pose_from = pose[n, at].expand_as(pose_to)
        inverse_ray_distance = camera.ground_plane(pose_to, *size, held_out.fov) if moves else 0.0
        grid, _ = camera.reproject(pose_from, pose_to, inverse_ray_distance, *size, held_out.fov)
        warped.append(camera.warp(picture[n].expand(len(pose_to), -1, -1, -1), grid))
    return torch.stack(warped)


def compare(
    source: FrameSet,
    recorded: RecordedWindows,
    plan: Plan,
    networks: PictureNetworks,
    with_tokens: bool = True,
) -> None:
    """Fills in `source.values`, against the original pictures and, `with_tokens`, the decoded true tokens.

    `psnr_tokens`, `ssim`, `perceptual`, `edge_f1` are against the decoded true tokens; `psnr_frames`,
    `ssim_frames`, ... against the original pictures. Those of `compare_parts` are filled in, too.
    """
    truth, N, F = recorded.sources["recording"], len(source.tokens), len(recorded.frames)
    at_horizons = np.isin(recorded.frames, plan.horizons)

    def store(
        name: str, window: int | slice, value: Tensor, frames: np.ndarray | slice = slice(None)
    ) -> None:
        source.values.setdefault(name, np.full((N, F), np.nan))[window, frames] = value.numpy()

    def compare_pictures(window: int, true: Tensor, psnr: str, suffix: str) -> None:
        pictures = source.pictures[window]
        store(psnr, window, metrics.psnr(pictures, true))
        pictures, true = pictures[at_horizons], true[at_horizons]
        store(f"ssim{suffix}", window, metrics.ssim(pictures, true), at_horizons)
        store(f"edge_f1{suffix}", window, metrics.edge_f1(pictures, true), at_horizons)
        for name, distance in networks.distances(pictures, true).items():
            store(f"{name}{suffix}", window, distance, at_horizons)

    store("codes", slice(None), metrics.unique_codes(source.tokens))
    if with_tokens:
        if recorded.visible is not None:
            compare_parts(source, recorded)
        store("token_acc", slice(None), metrics.token_accuracy(source.tokens, truth.tokens))
        store("codes_ratio", slice(None), metrics.codes_ratio(source.tokens, truth.tokens))
    for window in range(N):
        if with_tokens:
            compare_pictures(window, truth.pictures[window], "psnr_tokens", "")
        if window in recorded.original_pictures:
            compare_pictures(window, recorded.original_pictures[window][1:], "psnr_frames", "_frames")


def flow_series(last_picture: Tensor, source: FrameSet, frames: np.ndarray) -> np.ndarray:
    """`flow_measures` of every FLOW_EVERY-th frame, from the context's last picture on: [N, K, 4]."""
    every = np.flatnonzero(frames % metrics.FLOW_EVERY == 0)
    return flow_measures(torch.cat([last_picture, source.pictures[:, every]], 1))


def flow_measures(pictures: Tensor) -> np.ndarray:
    """Optical flow between neighbouring pictures [N, K+1, 3, Hp, Wp], in four measures: [N, K, 4].

    LENGTH, HORIZONTAL, RADIAL and VERTICAL flow.
    """
    flow = metrics.optical_flow(pictures[:, :-1], pictures[:, 1:])
    measures = metrics.flow_magnitude, metrics.horizontal_flow, metrics.radial_flow, metrics.vertical_flow
    return torch.stack([measure(flow) for measure in measures], -1).numpy()


def measure(
    held_out: HeldOutClips,
    evaluated: EvaluatedModel,
    plan: Plan,
    networks: PictureNetworks,
    recorded: RecordedWindows,
    scores: Scores,
) -> dict[str, Tensor]:
    """`rollout.*`, those `control.*` that need the recorded windows, and the same of the baselines.

    Returns the generated tokens [N, horizon, H, W] of each context, as "ctx6".
    """
    last = max(plan.contexts) - 1
    last_picture = held_out.decode(recorded.tokens[:, last : last + 1])
    rollouts, sources = {}, {}
    for context in plan.contexts:
        name, given = f"ctx{context}", slice(last - context + 1, last + 1)
        rollouts[name] = evaluated.rollout(
            recorded.tokens[:, given],
            recorded.actions[:, given.start :],
            held_out.clips.batch(recorded.windows + [0, given.start], context)[2],
            f"rollouts, context {context}",
        )
        generated = rollouts[name][:, recorded.frames - 1]
        sources[name] = FrameSet(generated, held_out.decode(generated))
        compare(sources[name], recorded, plan, networks)
        report_values(scores, f"rollout.{name}", sources[name], recorded, plan)
        # These do not depend on the context; each context has them, so that the keys match the model's.
        for source in recorded.sources:
            report_values(scores, f"{source}.rollout.{name}", recorded.sources[source], recorded, plan)
    main = sources[f"ctx{plan.main_context}"]
    main.flow = flow_series(last_picture, main, recorded.frames)
    compared = {"": main}
    compared |= {f"{name}.": recorded.sources[name] for name in BASELINES if name in recorded.sources}
    report_flow(scores, recorded, compared, held_out.degrees_per_unit)
    if networks.inverse_dynamics is not None:
        report_inverse_dynamics(scores, networks.inverse_dynamics, recorded, last_picture, compared)
    report_delta_psnr(scores, held_out, evaluated, plan, recorded, main)
    return rollouts


def report_values(
    scores: Scores, prefix: str, source: FrameSet, recorded: RecordedWindows, plan: Plan
) -> None:
    """`PREFIX.hH.METRIC` at each horizon H, and `PREFIX.mean20.METRIC` of the metrics of every frame."""
    columns = {f"h{h}": recorded.frames == h for h in plan.horizons}
    columns[f"mean{MEAN}"] = recorded.frames <= MEAN
    for metric, values in source.values.items():
        for column, frames in columns.items():
            if column.startswith("h") or metric.removesuffix("_frames") not in HORIZON_METRICS:
                scores.mean(f"{prefix}.{column}.{metric}", values[:, frames], recorded.clips)


def report_flow(
    scores: Scores, recorded: RecordedWindows, compared: dict[str, FrameSet], degrees_per_unit: float
) -> None:
    """`control.flow_profile` and `control.flow_ratio` of the model (prefix "") and the baselines, and
    `control.sign.*`: share of the recorded commands under which the flow has the right sign."""
    truth = recorded.sources["recording"].flow
    for prefix, source in compared.items():
        lengths = source.flow[..., LENGTH], truth[..., LENGTH]
        profile = metrics.flow_profile(*map(torch.from_numpy, lengths))
        scores.mean(f"{prefix}control.flow_profile", profile.numpy(), recorded.clips)
        sums = [length.sum(1) for length in lengths]
        scores.mean(f"{prefix}control.flow_ratio", sums[0], recorded.clips, sums[1])
    for name, (sign, kind) in commanded_signs(recorded, degrees_per_unit).items():
        if (sign != 0).any():
            for prefix, flow in (("", compared[""].flow), ("recording.", truth)):
                correct = np.where(sign == 0, np.nan, metrics.flow_sign(flow[..., kind]) == sign)
                scores.mean(f"{prefix}control.sign.{name}", correct, recorded.clips)


def commanded_signs(recorded: RecordedWindows, degrees_per_unit: float) -> dict[str, tuple[np.ndarray, int]]:
    """The sign of the flow that the recorded actions demand in each stretch of FLOW_EVERY frames.

    Returns name -> (signs [N, K], 0 where there is no demand; index into `flow_measures`). A stretch has a
    sign only if one command is constant throughout and there is no other. A turn or step to the right moves
    the picture to the left.
    """
    first = recorded.tokens.shape[1] - 1 - recorded.frames[-1]
    stretches = len(recorded.frames[recorded.frames % metrics.FLOW_EVERY == 0])
    actions = recorded.actions[:, first : first + stretches * metrics.FLOW_EVERY].numpy()
    actions = actions.reshape(len(actions), stretches, metrics.FLOW_EVERY, -1)

    def constant_sign(axis: int) -> np.ndarray:
        low, high = actions[..., axis].min(2), actions[..., axis].max(2)
        return np.where(low > 0, 1, np.where(high < 0, -1, 0))

    turning = np.abs(actions[..., [YAW, PITCH]]).sum((2, 3)) > 0
    keys = np.abs(actions[..., [MOVE_X, MOVE_Z]]).max(2)  # [N, K, 2]
    large = np.abs(actions[..., YAW].sum(2)) * degrees_per_unit >= MIN_TURN
    return {
        "turn": (-constant_sign(YAW) * large, HORIZONTAL),
        "strafe": (-constant_sign(MOVE_X) * ~turning * (keys[..., 1] == 0), HORIZONTAL),
        "forward_back": (constant_sign(MOVE_Z) * ~turning * (keys[..., 0] == 0), RADIAL),
    }


def report_inverse_dynamics(
    scores: Scores,
    network: inverse_dynamics.InverseDynamics,
    recorded: RecordedWindows,
    last_picture: Tensor,
    compared: dict[str, FrameSet],
) -> None:
    """`control.idm.*`: errors of the actions that the network predicts from the rollout's first MEAN frames.

    Of the model (prefix ""), the baselines, the decoded recording and the original pictures
    (`original.control.idm.*`).
    """
    steps = int((np.diff(recorded.frames, prepend=0) == 1).cumprod().sum())  # measured without a gap
    first = recorded.tokens.shape[1] - 1 - recorded.frames[-1]
    actions = recorded.actions[:, first : first + steps]

    def report(prefix: str, pictures: Tensor, windows: np.ndarray) -> None:
        """Pictures [n, 1+steps, 3, Hp, Wp] of the windows [n], the context's last one first."""
        before, after = pictures[:, :-1].flatten(0, 1), pictures[:, 1:].flatten(0, 1)
        found = inverse_dynamics.predict(network, before, after)
        true = inverse_dynamics.labels(actions[windows].flatten(0, 1), network.config.degrees_per_unit)
        clips = recorded.clips[windows].repeat(steps)
        for name in ("yaw", "pitch"):
            error = np.abs(found[name] - true[name].numpy())
            scores.mean(f"{prefix}control.idm.{name}_deg", error, clips)
        for name, classes in inverse_dynamics.KEYS.items():
            pairs = np.stack([found[name], true[name].numpy()], 1)

            def f1(pairs: np.ndarray, classes: int = classes) -> float:
                return metrics.macro_f1(metrics.confusion(pairs[:, 0], pairs[:, 1], classes))

            scores.statistic(f"{prefix}control.idm.{name}_f1", pairs, clips, f1)

    every = np.arange(len(recorded.windows))
    for prefix, source in {**compared, "recording.": recorded.sources["recording"]}.items():
        report(prefix, torch.cat([last_picture, source.pictures[:, :steps]], 1), every)
    if recorded.original_pictures:
        pictures = torch.stack([p[: 1 + steps] for p in recorded.original_pictures.values()])
        report("original.", pictures, np.array(list(recorded.original_pictures)))


def report_delta_psnr(
    scores: Scores,
    held_out: HeldOutClips,
    evaluated: EvaluatedModel,
    plan: Plan,
    recorded: RecordedWindows,
    main: FrameSet,
) -> None:
    """`control.delta_psnr.hH` at each horizon H: PSNR under the true actions minus PSNR under those of
    another window, and `control.delta_psnr` at frame 4, as in its source (`metrics.delta_psnr`)."""
    context = plan.main_context
    begin = max(plan.contexts) - context
    steps = min(RANDOM_FRAMES, max(plan.horizons))
    actions = recorded.actions[:, begin : begin + context - 1 + steps].clone()
    # The window half the list away is of another clip wherever there are two.
    others = np.roll(np.arange(len(actions)), len(actions) // 2)
    actions[:, context - 1 :] = actions[others, context - 1 :]
    generated = evaluated.rollout(
        recorded.tokens[:, begin : begin + context],
        actions,
        held_out.clips.batch(recorded.windows + [0, begin], context)[2],
        "other actions",
    )
    truth = recorded.sources["recording"].pictures
    for horizon in (h for h in plan.horizons if h <= steps):
        at = np.flatnonzero(recorded.frames == horizon)[0]
        wrong = metrics.psnr(held_out.decode(generated[:, horizon - 1]), truth[:, at])
        right = torch.from_numpy(main.values["psnr_tokens"][:, at])
        value = metrics.delta_psnr(right, wrong).numpy()
        scores.mean(f"control.delta_psnr.h{horizon}", value, recorded.clips)
        if horizon == 4:
            scores.mean("control.delta_psnr", value, recorded.clips)
