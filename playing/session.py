"""A running world that a person plays: places to start from, steps, pauses, choices, recordings of play."""

import time
from collections import deque
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from dataset.actions import ACTION_DIM, PITCH, YAW, wrap
from playing.play_recorder import Take
from rollout.context import Recording, World, decode, prime
from rollout.rollout import Rollout
from runtime.video import save_image

OUT = Path("outputs/play")  # recordings of play and screenshots
PARTS = ("model", "sampling", "decode")  # of a step
RECENT = 32  # steps that the figures shown are medians of
TEMPERATURE_STEP, MAX_PASSES = 0.1, 8


class Session:
    """A world, primed on one of several recordings: actions in, pictures out. Knows nothing of windows.

    While `compare` is on, the recording's own actions are played and `truth` is the picture that it has.
    """

    def __init__(
        self,
        world: World,
        rollout: Rollout,
        places: list[Recording],
        context_frames: int = 0,
        out: Path = OUT,
    ):
        """`context_frames` of each recording prime the world; 0: all of them."""
        self.world, self.rollout, self.places, self.out = world, rollout, places, out
        self.context_frames = context_frames
        self.first_seed = rollout.seed
        self.place = 0
        self.paused = self.due = self.compare = False  # due: one step although paused
        self.take: Take | None = None  # the recording of play that is being made
        self.starts = 0  # how often it was primed
        self.seconds: deque[tuple[float, ...]] = deque(maxlen=100_000)  # that the PARTS of each step took
        self.reset()

    # ------------------------------------------------------------ starting

    @property
    def recording(self) -> Recording:
        """What the rollout started from."""
        return self.places[self.place]

    def reset(self) -> None:
        """Back to the end of the context, with the rollout's seed as at first."""
        self.end_take()
        self.starts += 1
        self.context = self.recording.first(self.context_frames)
        prime(self.rollout, [self.context])
        self.picture = self.rollout.pictures()[0].numpy()  # [H, W, 3] uint8
        self.action = np.zeros(ACTION_DIM, np.float32)  # that led to it
        self.turned = np.zeros(2)  # degrees of yaw and pitch since the start
        self.prediction = None  # of the step that was made last
        self.steps = 0
        if self.compare and not self.recorded_actions:
            self.compare = False
        self.truth = self.true_picture() if self.compare else None

    @property
    def recorded_actions(self) -> int:
        """How many actions were recorded after the context."""
        return len(self.recording) - len(self.context)

    def true_picture(self) -> np.ndarray:
        """The recording's picture at this step, as the tokenizer paints it, [H, W, 3] uint8."""
        frame = len(self.context) - 1 + self.steps
        return decode(self.recording.tokens[frame : frame + 1], self.world)[0].numpy()

    # ------------------------------------------------------------ stepping

    @property
    def moves(self) -> bool:
        """Whether a step is to be made now: not paused, or asked for."""
        return self.due or not self.paused

    def step(self, action: np.ndarray) -> np.ndarray:
        """Action [5] -> the next picture [H, W, 3] uint8. Comparing, the recorded action counts instead, and
        after the last one the recording starts over."""
        self.due = False
        if self.compare:
            if self.steps == self.recorded_actions:
                self.reset()
                return self.picture
            action = self.recording.actions[len(self.context) - 1 + self.steps].numpy()
        clock = [time.perf_counter()]
        self.prediction = self.rollout.predict(torch.from_numpy(action)[None])
        clock.append(time.perf_counter())
        self.rollout.sample(self.prediction)
        clock.append(time.perf_counter())
        self.picture = self.rollout.pictures()[0].numpy()
        clock.append(time.perf_counter())
        self.seconds.append(tuple(np.diff(clock)))
        self.action = action
        self.turned = self.turned + action[[YAW, PITCH]] * self.world.degrees_per_unit
        self.steps += 1
        if self.compare:
            self.truth = self.true_picture()
        if self.take is not None:
            self.take.add(self.picture, self.action, self.pose)
        return self.picture

    # ------------------------------------------------------------ what the player asks for

    def command(self, name: str) -> str:
        """Does what one of bindings.COMMANDS says -> what to tell the player.

        Raises ValueError for a name that is none.
        """
        sampling = self.rollout.sampling
        if name == "reset":
            self.rollout.seed = self.first_seed
            self.reset()
            return f"{self.name}: from the start"
        if name == "again":
            self.rollout.seed += 1
            self.reset()
            return f"{self.name}: another rollout (seed {self.rollout.seed})"
        if name == "next" or name.startswith("place "):
            place = (self.place + 1) % len(self.places) if name == "next" else int(name[6:]) - 1
            if place >= len(self.places):
                return f"there are {len(self.places)} places"
            self.place = place
            self.reset()
            return f"place {place + 1} of {len(self.places)}: {self.name}"
        if name == "pause":
            self.paused = not self.paused
            return "paused" if self.paused else "goes on"
        if name == "single":
            self.paused = self.due = True
            return "one step"
        if name == "greedy":
            self.rollout.sampling = replace(sampling, greedy=not sampling.greedy)
        elif name in ("hotter", "colder"):
            change = TEMPERATURE_STEP if name == "hotter" else -TEMPERATURE_STEP
            temperature = max(TEMPERATURE_STEP, round(sampling.temperature + change, 2))
            self.rollout.sampling = replace(sampling, temperature=temperature)
        elif name in ("more passes", "fewer passes"):
            passes = sampling.passes + (1 if name == "more passes" else -1)
            self.rollout.sampling = replace(sampling, passes=min(max(passes, 1), MAX_PASSES))
        elif name == "compare":
            if not self.compare and not self.recorded_actions:
                return f"{self.name}: no recorded actions after the start, so nothing to compare with"
            self.compare = not self.compare
            self.reset()
            return "truth | rollout, by the recorded actions" if self.compare else "you play"
        elif name == "record":
            return self.begin_take() if self.take is None else self.end_take()
        else:
            raise ValueError(f"no command {name!r}")
        return self.chosen

    # ------------------------------------------------------------ what there is to show

    @property
    def name(self) -> str:
        """Of the place."""
        return Path(self.recording.name).stem

    @property
    def chosen(self) -> str:
        """How tokens are chosen."""
        sampling = self.rollout.sampling
        if sampling.greedy:
            return "greedy"
        return f"temperature {sampling.temperature:g}, {sampling.passes} passes"

    @property
    def pose(self) -> np.ndarray:
        """Since the rollout began: x, y, z in metres (NaN for a world that keeps none), yaw and pitch in
        degrees [5]. Camera as Minecraft has it: yaw to the right, pitch down."""
        pose = self.rollout.model.pose_of(self.rollout.state)
        if pose is None:
            return np.array([np.nan] * 3 + [*self.turned])
        return pose[0].float().cpu().numpy()

    def facts(self) -> dict[str, float | int | str | list[float]]:
        """The figures of the last step, ready for JSON."""
        recent = np.array(list(self.seconds)[-RECENT:] or [[0.0] * len(PARTS)])
        parts = np.median(recent, 0) * 1000
        pose = self.pose
        return {
            "place": self.name,
            "step": self.steps,
            "step_ms": round(float(np.median(recent.sum(1)) * 1000), 1),
            **{f"{part}_ms": round(float(ms), 1) for part, ms in zip(PARTS, parts, strict=True)},
            "chosen": self.chosen,
            "unique_codes": int(self.rollout.tokens.unique().numel()),
            "position": [round(float(x), 2) for x in pose[:3]] if np.isfinite(pose[0]) else [],
            "yaw": round(float(wrap(pose[3])), 1),
            "pitch": round(float(pose[4]), 1),
            "paused": self.paused,
            "recording": self.take is not None,
            "compare": self.compare,
        }

    # ------------------------------------------------------------ what is kept

    def stamp(self) -> str:
        """A name for a file: the place and the time, to the millisecond."""
        return f"{self.name}_{datetime.now():%Y%m%d_%H%M%S_%f}"[:-3]

    def begin_take(self) -> str:
        """Starts a recording of play -> what to tell the player."""
        self.take = Take(self.out, self.stamp(), self.world.fps)
        self.take.add(self.picture, self.action, self.pose)
        return f"recording {self.take.name}"

    def end_take(self) -> str:
        """Ends the recording of play, if one is being made -> what to tell the player."""
        if self.take is None:
            return ""
        take, self.take = self.take, None
        return f"wrote {take.finish()} and its actions"

    def screenshot(self, picture: np.ndarray | None = None) -> str:
        """Writes a picture [H, W, 3] uint8 (None: the world's own) -> what to tell the player."""
        path = self.out / f"{self.stamp()}.png"
        save_image(path, self.picture if picture is None else picture)
        return f"wrote {path}"
