"""Section walk: a minute of walking from random held-out starts. Does the world keep its detail?

`forward`: W is held; a player who is held up for half a second turns by 60 degrees and goes on. `mixed`: a
seeded mix of walking, turning, looking back, strafing, jumping and pauses (rollout/mixed_walk.py).

Different codes in a frame, spatial gradient and change per frame are averaged over each second, and compared
with their means over the frames of the same recording in which its player walks straight on. A start holds
a second while codes and gradient stay within DETAIL and change within CHANGE. In the mixed walk the change is
that of its frames that walk straight on, since pauses and turns change as much as they should; a second
with fewer than MIN_STRAIGHT of them is judged by the detail alone.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import metrics
from dataset.actions import (
    BLOCKED_METRES,
    CAMERA_MOVES,
    JUMP,
    KEY_PRESSED,
    MOVE_X,
    MOVE_Z,
    PITCH,
    YAW,
    horizontal_metres,
)
from dataset.token_files import DataError, Manifest
from evaluation.aggregate import Scores
from evaluation.evaluated_model import EvaluatedModel
from evaluation.held_out_clips import HeldOutClips, spread_windows, thin
from evaluation.picture_networks import PictureNetworks
from evaluation.plan import BATCH, Plan
from rollout.context import START_PLACES
from rollout.forward_walk import ForwardPlayer
from rollout.mixed_walk import mixed_walk
from runtime.video import to_float

SECONDS = (1, 2, 5, 10, 30, 60)  # after which results are reported
DETAIL = 0.67, 1.5  # different codes and gradient over the recording's
CHANGE = 0.5, 2.0  # change between frames over the recording's
MIN_STRAIGHT = 4  # frames of a second that walk straight on, for its change to be judged
FLICKER_EVERY, EMBED_EVERY = 8, 2  # frames, of the slow measures
RECORDED_SECONDS = 16  # of each recording, at most
HOLDS_W = 0.95  # share of the frames of a recording with W held, above which it is of `ForwardPlayer`
MIN_WALKING = 16  # frames that walk straight on, for a recording to be compared with
MOSTLY = 0.75  # share of such frames in a recorded second that counts as walking
DETAIL_MEASURES = ("codes", "gradient")
MEASURES = (*DETAIL_MEASURES, "change", "flicker")


# ---------------------------------------------------------------- frames and seconds


@dataclass
class WalkFrames:
    """Measures of the frames of N walks of T frames: by name of MEASURES [N, T], NaN where not measured."""

    values: dict[str, np.ndarray]
    straight: np.ndarray  # [N, T] bool: walks forward without turning or being held up

    @classmethod
    def empty(cls, walks: int, frames: int) -> "WalkFrames":
        """Nothing is measured yet."""
        values = {name: np.full((walks, frames), np.nan) for name in MEASURES}
        return cls(values, np.zeros((walks, frames), bool))

    def measure(self, walks: slice | int, t: int, tokens: Tensor, picture: Tensor, previous: Tensor) -> None:
        """Fills in frame t of some walks: tokens [n, H, W], pictures [n, 3, Hp, Wp] of it and of the one
        before."""
        pair = torch.stack([previous, picture], 1)
        found = {
            "codes": metrics.unique_codes(tokens),
            "gradient": metrics.spatial_gradient(picture),
            "change": metrics.mean_change(pair),
        }
        if t % FLICKER_EVERY == 0:
            found["flicker"] = metrics.warp_error(previous, picture)
        for name, value in found.items():
            self.values[name][walks, t] = value.numpy()

    def seconds(self, name: str, rate: int, where: np.ndarray | None = None, least: int = 1) -> np.ndarray:
        """Means over each second of `rate` frames, of the frames `where` [N, T] if given: [N, S].

        NaN for a second with fewer than `least` such frames.
        """
        values = self.values[name] if where is None else np.where(where, self.values[name], np.nan)
        values = values[:, : values.shape[1] // rate * rate].reshape(len(values), -1, rate)
        count = np.isfinite(values).sum(2)
        sums = np.nansum(values, 2)
        return np.where(count >= least, sums / np.maximum(count, 1), np.nan)


def straight_on(actions: np.ndarray, metres: np.ndarray) -> np.ndarray:
    """Frames that walk forward without turning or being held up: actions [..., 5], metres [...] moved by
    each, NaN where unknown -> [...] bool."""
    turns = (np.abs(actions[..., [YAW, PITCH]]) > CAMERA_MOVES).any(-1)
    others = (np.abs(actions[..., [MOVE_X, JUMP]]) > KEY_PRESSED).any(-1)
    return (actions[..., MOVE_Z] > KEY_PRESSED) & ~turns & ~others & ~(metres < BLOCKED_METRES)


def ratios(
    frames: WalkFrames, reference: dict[str, np.ndarray], rate: int, straight: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Means over each second, over the `reference` [N] of each walk: [N, S] by name of MEASURES.

    The measures named in `straight` are means over the frames that walk straight on, NaN where a second has
    fewer than MIN_STRAIGHT of them.
    """
    found = {}
    for name in MEASURES:
        only = (frames.straight, MIN_STRAIGHT) if name in straight else (None, 1)
        found[name] = frames.seconds(name, rate, *only) / reference[name][:, None]
    return found


def holds(by_second: dict[str, np.ndarray]) -> np.ndarray:
    """Which seconds hold: `ratios` -> [N, S] bool. A second without a change to judge holds by its detail."""

    def within(name: str, bounds: tuple[float, float]) -> np.ndarray:
        return (by_second[name] >= bounds[0]) & (by_second[name] <= bounds[1])

    change = within("change", CHANGE) | np.isnan(by_second["change"])
    return np.logical_and.reduce([within(name, DETAIL) for name in DETAIL_MEASURES] + [change])


# ---------------------------------------------------------------- recordings


@dataclass(frozen=True)
class RecordedWalks:
    """The starts, and how their recordings walk straight on."""

    starts: np.ndarray  # [N, 2] of (clip, first frame of the context)
    reference: dict[str, np.ndarray]  # means over such frames of each start's recording: [N] by MEASURES
    features: Tensor  # [M, D] embeddings of such frames of all of them
    frames: WalkFrames  # of recorded seconds [n, rate]
    clips: np.ndarray  # [n] of each recorded second
    walking: np.ndarray  # [n] bool: most of its frames walk straight on
    whole: np.ndarray  # [n] bool: of a recording with W held all along, of which each second is here in order


def shipped_videos() -> set[str]:
    """File names of the videos that the shipped start places were cut from."""
    return {place.video.rsplit("/", 1)[-1] for place in Manifest.load(START_PLACES).clips}


def recorded_straight_on(held_out: HeldOutClips, clip: int) -> np.ndarray:
    """Which transitions of a clip walk straight on: [K-1] bool."""
    return straight_on(held_out.clips.actions[clip], horizontal_metres(held_out.clips.pose[clip]))


def choose_starts(held_out: HeldOutClips, plan: Plan) -> np.ndarray:
    """Windows [N, 2] of `plan.main_context` frames, at random over the clips.

    Clips with fewer than MIN_WALKING frames that walk straight on, and those that the shipped start places
    were cut from, are left out. Empty if no clip is left.
    """
    shipped = shipped_videos()
    lengths = [
        frames
        if entry.video.rsplit("/", 1)[-1] not in shipped
        and recorded_straight_on(held_out, clip).sum() >= MIN_WALKING
        else 0
        for clip, (entry, frames) in enumerate(zip(held_out.clips.entries, held_out.lengths, strict=True))
    ]
    try:
        return spread_windows(lengths, plan.main_context, plan.walk_starts, held_out.seed)
    except DataError:
        return np.zeros((0, 2), int)


def holds_forward(actions: np.ndarray) -> bool:
    """Whether a recording [K, 5] is of a player that holds W (`record.py --forward`)."""
    return (actions[:, MOVE_Z] > KEY_PRESSED).mean() > HOLDS_W


def recorded_seconds(straight: np.ndarray, rate: int) -> np.ndarray:
    """First transitions of at most RECORDED_SECONDS seconds of a clip: those that walk straight on for most
    of their frames, and as many others, in order."""
    first = np.arange(0, len(straight) - rate + 1, rate)
    walked = np.array([straight[i : i + rate].sum() for i in first])
    most = np.argsort(-walked, kind="stable")[: RECORDED_SECONDS // 2]
    others = thin(np.setdiff1d(np.arange(len(first)), most), RECORDED_SECONDS // 2)
    return first[np.sort(np.concatenate([most, others]).astype(int))]


@torch.inference_mode()
def read_walks(held_out: HeldOutClips, plan: Plan, networks: PictureNetworks) -> RecordedWalks | None:
    """The starts and their recordings, as the tokenizer reconstructs them.

    None, with a message, if no clip has a walk.
    """
    starts, rate = choose_starts(held_out, plan), round(held_out.manifest.fps)
    if not len(starts):
        tqdm.write(
            f"section walk: in no clip the player walks straight on for {MIN_WALKING} frames; left out"
        )
        return None
    parts: list[WalkFrames] = []
    clips, walking, whole, features = [], [], [], []
    reference: dict[int, dict[str, float]] = {}
    for clip in tqdm(np.unique(starts[:, 0]), desc="recorded walks", unit="clip", leave=False):
        straight = recorded_straight_on(held_out, clip)
        forward = holds_forward(held_out.clips.actions[clip])
        if forward:
            first = np.arange(min(len(straight) // rate, plan.walk_seconds)) * rate
        else:
            first = recorded_seconds(straight, rate)
        at = first[:, None] + np.arange(rate)  # transitions [n, rate]
        frames = WalkFrames.empty(len(first), rate)
        frames.straight = straight[at]
        tokens = held_out.clips.batch(np.stack([np.full(len(first), clip), first], 1), rate + 1)[0]
        for n in range(len(first)):
            pictures = held_out.decode(tokens[n])
            for t in range(rate):
                frames.measure(slice(n, n + 1), t, tokens[n, t + 1 : t + 2], *pictures[[t + 1, t]].split(1))
            walked = pictures[1:][straight[at[n]]][::EMBED_EVERY]
            if len(walked):
                features.append(networks.embeddings(walked))
        reference[clip] = {
            name: float(nan_mean(values[frames.straight][:, None])[0])
            for name, values in frames.values.items()
        }
        parts.append(frames)
        clips += [clip] * len(first)
        walking.append(frames.straight.mean(1) >= MOSTLY)
        whole += [forward] * len(first)
    together = WalkFrames(
        {name: np.concatenate([part.values[name] for part in parts]) for name in MEASURES},
        np.concatenate([part.straight for part in parts]),
    )
    of_start = {name: np.array([reference[c][name] for c in starts[:, 0]]) for name in MEASURES}
    return RecordedWalks(
        starts,
        of_start,
        torch.cat(features),
        together,
        np.array(clips),
        np.concatenate(walking),
        np.array(whole),
    )


# ---------------------------------------------------------------- generated walks


class MixedPlayer:
    """Plays the script of a mixed walk, another one for each seed."""

    def __init__(self, seeds: list[int], frames: int, degrees_per_unit: float):
        self.actions = np.stack([mixed_walk(frames, seed, degrees_per_unit) for seed in seeds])

    def __call__(self, metres: np.ndarray) -> np.ndarray:
        """As `ForwardPlayer.__call__`."""
        return self.actions[:, metres.shape[1]]


Player = Callable[[np.ndarray], np.ndarray]


@dataclass
class GeneratedWalks:
    """N walks of T frames."""

    frames: WalkFrames
    metres: np.ndarray  # [N, T] moved over the ground by each frame, NaN where the model has no pose
    features: dict[int, list[Tensor]] = field(default_factory=dict)  # second -> embeddings of its frames
    pictures: dict[int, list[Tensor]] = field(
        default_factory=dict
    )  # second -> its last picture, 0: the start


def reported_seconds(plan: Plan) -> list[int]:
    """Those of SECONDS that walks of this plan reach."""
    return [second for second in SECONDS if second <= plan.walk_seconds]


def kinds(held_out: HeldOutClips, plan: Plan) -> Iterator[tuple[str, Callable[[np.ndarray], Player]]]:
    """The walks by name, and what makes their player for the starts with the numbers [n]."""
    rate, unit = round(held_out.manifest.fps), held_out.degrees_per_unit
    frames = plan.walk_seconds * rate
    yield "forward", lambda numbers: ForwardPlayer(len(numbers), rate, unit)
    yield "mixed", lambda numbers: MixedPlayer([held_out.seed + int(n) for n in numbers], frames, unit)


@torch.inference_mode()
def generate(
    held_out: HeldOutClips,
    evaluated: EvaluatedModel,
    plan: Plan,
    networks: PictureNetworks,
    starts: np.ndarray,
    player_of: Callable[[np.ndarray], Player],
    description: str,
) -> GeneratedWalks:
    """Walks for `plan.walk_seconds` from the starts [N, 2], in batches, measuring each frame as it comes."""
    rate, count = round(held_out.manifest.fps), len(starts)
    frames = plan.walk_seconds * rate
    walks = GeneratedWalks(WalkFrames.empty(count, frames), np.full((count, frames), np.nan))
    context, before, recorded_pose = held_out.clips.batch(starts, plan.main_context)
    with tqdm(
        total=count * frames, desc=f"{evaluated.name}: {description}", unit="frame", leave=False
    ) as bar:
        for first in range(0, count, BATCH):
            part = slice(first, min(first + BATCH, count))
            rollout = evaluated.primed_rollout(first, context[part], before[part], recorded_pose[part])
            player = player_of(np.arange(part.start, part.stop))
            picture, pose = to_float(rollout.pictures()), rollout.model.pose_of(rollout.state)
            walks.pictures.setdefault(0, []).append(picture)
            for t in range(frames):
                actions = player(walks.metres[part, :t])
                tokens = rollout.step(torch.from_numpy(actions)).cpu()
                previous, picture = picture, to_float(rollout.pictures())
                before_step, pose = pose, rollout.model.pose_of(rollout.state)
                if pose is not None:
                    both = torch.stack([before_step, pose], 1).cpu().numpy()
                    walks.metres[part, t] = horizontal_metres(both)[:, 0]
                walks.frames.straight[part, t] = straight_on(actions, walks.metres[part, t])
                walks.frames.measure(part, t, tokens, picture, previous)
                second = t // rate + 1
                if second in SECONDS and t % EMBED_EVERY == 0:
                    walks.features.setdefault(second, []).append(networks.embeddings(picture))
                if second in SECONDS and (t + 1) % rate == 0:
                    walks.pictures.setdefault(second, []).append(picture)
                bar.update(len(tokens))
    return walks


def measure(
    held_out: HeldOutClips,
    evaluated: EvaluatedModel,
    plan: Plan,
    networks: PictureNetworks,
    recorded: RecordedWalks | None,
    scores: Scores,
) -> dict[str, dict]:
    """`walk.forward.*` and `walk.mixed.*`.

    In second S of SECONDS: `sS.held`, share of the starts that have held in all seconds so far;
    `sS.codes_ratio`, `sS.gradient_ratio`, `sS.change_ratio`, `sS.flicker_ratio`: over those of the
    recording's frames that walk straight on (flicker: `metrics.warp_error`); `sS.fd_ratio`: Fréchet distance
    to such frames of the recordings, over that of the first second. `held_seconds`: median time that a start
    has held; `holds`: share of all seconds that hold; `flicker_ratio`: over all seconds; `metres`: walked.
    `recording.walk.*.holds`: share of the recorded seconds that hold: for `forward` of those that mostly walk
    straight on, by these frames; for `mixed` of all that were measured.

    Returns by kind: "series", lists over the seconds, and "pictures" by second [N, 3, Hp, Wp].
    """
    if recorded is None:
        return {}
    rate, clips, outputs = round(held_out.manifest.fps), recorded.starts[:, 0], {}
    for kind, player_of in kinds(held_out, plan):
        walks = generate(held_out, evaluated, plan, networks, recorded.starts, player_of, f"{kind} walk")
        key = f"walk.{kind}"
        by_second = ratios(walks.frames, recorded.reference, rate, ("change",) if kind == "mixed" else ())
        held = holds(by_second)
        all_along = np.logical_and.accumulate(held, 1)
        for second in reported_seconds(plan):
            at = f"{key}.s{second}"
            scores.mean(f"{at}.held", all_along[:, second - 1], clips)
            for name in MEASURES:
                scores.mean(f"{at}.{name}_ratio", by_second[name][:, second - 1], clips)
            features = torch.cat(walks.features[second])
            scores.add(f"{at}.fd", metrics.frechet_distance(features, recorded.features))
            scores.ratio(f"{at}.fd_ratio", f"{at}.fd", f"{key}.s1.fd")
        scores.statistic(f"{key}.held_seconds", all_along.sum(1), clips, np.median)
        scores.mean(f"{key}.holds", held, clips)
        scores.mean(f"{key}.flicker_ratio", by_second["flicker"], clips)
        scores.mean(f"{key}.metres", walks.metres.sum(1), clips)
        series = {"held": all_along.mean(0).tolist()}
        for name in MEASURES:
            means = nan_mean(by_second[name])
            series[name] = [
                float(value) if np.isfinite(value) else None for value in means
            ]  # JSON has no NaN
        pictures = {second: torch.cat(shown) for second, shown in walks.pictures.items()}
        outputs[kind] = {"series": series, "pictures": pictures}
    report_recordings(recorded, rate, scores)
    return outputs


def nan_mean(values: np.ndarray) -> np.ndarray:
    """Means over the rows of [N, S] that are finite: [S], NaN where there is none."""
    finite = np.isfinite(values)
    count = finite.sum(0)
    return np.where(count, np.where(finite, values, 0).sum(0) / np.maximum(count, 1), np.nan)


def report_recordings(recorded: RecordedWalks, rate: int, scores: Scores) -> None:
    """`recording.walk.*.holds`: share of the recorded seconds that hold, against their own recording.

    `recording.walk.forward.sS.held`: of the recordings with W held all along that last for S seconds, the
    share that has held in all of them: the game itself, walked as the world is.
    """
    of_clip = {clip: n for n, clip in enumerate(recorded.starts[:, 0])}
    start = [of_clip[clip] for clip in recorded.clips]
    reference = {name: values[start] for name, values in recorded.reference.items()}
    for kind, straight, seconds in (
        ("forward", MEASURES, recorded.walking),
        ("mixed", ("change",), np.full(len(start), True)),
    ):
        held = holds(ratios(recorded.frames, reference, rate, straight))[:, 0]
        scores.mean(f"recording.walk.{kind}.holds", held[seconds], recorded.clips[seconds])
    by_second = holds(ratios(recorded.frames, reference, rate))[:, 0]
    walks = {clip: by_second[recorded.clips == clip] for clip in np.unique(recorded.clips[recorded.whole])}
    for second in SECONDS:
        lasting = {clip: held[:second].all() for clip, held in walks.items() if len(held) >= second}
        if lasting:
            at = f"recording.walk.forward.s{second}.held"
            scores.mean(at, np.array(list(lasting.values())), np.array(list(lasting)))
