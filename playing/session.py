"""A running world that a person plays: places to start from, steps, pauses, choices, recordings of play."""

import time
from collections import deque
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from actions import ACTION_DIM, PITCH, YAW, wrap
from playing.take import Take
from sampling import Dream
from start import Recording, World, decode, prime
from video import save_image

OUT = Path("outputs/play")  # recordings of play and screenshots
PARTS = ("model", "choice", "decode")  # of a step
RECENT = 32  # steps that the figures shown are medians of
TEMPERATURE_STEP, MAX_PASSES = 0.1, 8


class Session:
    """A world, primed on one of several recordings: actions in, pictures out. Knows nothing of windows.

    While `compare` is on, the recording's own actions are played and `truth` is the picture that it has.
    """

    def __init__(
        self, world: World, dream: Dream, places: list[Recording], context_frames: int = 0, out: Path = OUT
    ):
        """`context_frames` of each recording prime the world; 0: all of them."""
        self.world, self.dream, self.places, self.out = world, dream, places, out
        self.context_frames = context_frames
        self.first_seed = dream.seed
        self.place = 0
        self.paused = self.due = self.compare = False  # due: one step although paused
        self.take: Take | None = None  # the recording of play that is being made
        self.starts = 0  # how often it was primed
        self.seconds: deque[tuple[float, ...]] = deque(maxlen=100_000)  # that the PARTS of each step took
        self.reset()

    # ------------------------------------------------------------ starting

    @property
    def recording(self) -> Recording:
        """What the dream started from."""
        return self.places[self.place]

    def reset(self) -> None:
        """Back to the end of the context, with the dream's seed as at first."""
        self.end_take()
        self.starts += 1
        self.context = self.recording.first(self.context_frames)
        prime(self.dream, [self.context])
        self.picture = self.dream.pictures()[0].numpy()  # [H, W, 3] uint8
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
        self.prediction = self.dream.foresee(torch.from_numpy(action)[None])
        clock.append(time.perf_counter())
        self.dream.take(self.prediction)
        clock.append(time.perf_counter())
        self.picture = self.dream.pictures()[0].numpy()
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
        choice = self.dream.choice
        if name == "reset":
            self.dream.seed = self.first_seed
            self.reset()
            return f"{self.name}: from the start"
        if name == "again":
            self.dream.seed += 1
            self.reset()
            return f"{self.name}: another dream (seed {self.dream.seed})"
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
            self.dream.choice = replace(choice, greedy=not choice.greedy)
        elif name in ("hotter", "colder"):
            change = TEMPERATURE_STEP if name == "hotter" else -TEMPERATURE_STEP
            temperature = max(TEMPERATURE_STEP, round(choice.temperature + change, 2))
            self.dream.choice = replace(choice, temperature=temperature)
        elif name in ("more passes", "fewer passes"):
            passes = choice.passes + (1 if name == "more passes" else -1)
            self.dream.choice = replace(choice, passes=min(max(passes, 1), MAX_PASSES))
        elif name == "compare":
            if not self.compare and not self.recorded_actions:
                return f"{self.name}: no recorded actions after the start, so nothing to compare with"
            self.compare = not self.compare
            self.reset()
            return "truth | dream, by the recorded actions" if self.compare else "you play"
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
        choice = self.dream.choice
        if choice.greedy:
            return "greedy"
        return f"temperature {choice.temperature:g}, {choice.passes} passes"

    @property
    def pose(self) -> np.ndarray:
        """Since the dream began: x, y, z in metres (NaN for a world that keeps none), yaw and pitch in
        degrees [5]. Camera as Minecraft has it: yaw to the right, pitch down."""
        pose = getattr(self.dream.state, "pose", None)
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
            "unique_codes": int(self.dream.tokens.unique().numel()),
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
