"""A playable world: start places, steps, commands and recordings of play. Independent of any display."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from dataset.actions import ACTION_DIM, PITCH, YAW, wrap
from playing.play_recorder import PlayRecorder
from rollout.context import Recording, World, decode, prime
from rollout.recovery import Recovery
from rollout.rollout import Rollout
from runtime.errors import UserError
from runtime.video import save_image

OUT = Path("outputs/play")  # recordings of play and screenshots
STEP_PARTS = ("model", "sampling", "decode")
RECENT_STEPS = 32  # over which the times shown are medians
TEMPERATURE_STEP, MAX_PASSES = 0.1, 8
START_PLACE = "start place "  # and a number: the command that goes there
FADE_STEPS = 8  # from a picture without detail to the good one that play goes back to


class Session:
    """A rollout, primed on one of several recordings: takes actions, gives pictures.

    While `compare` is on, the recorded actions are used. While it or `inset` is on, `truth` is the recorded
    picture of the same time, decoded; None beyond the end of the recording.
    """

    def __init__(
        self,
        world: World,
        rollout: Rollout,
        start_places: list[Recording],
        context_frames: int = 0,
        out: Path = OUT,
        recover: bool = True,
    ):
        """`context_frames` of each recording prime the model; 0: all of them. `recover`: a picture that has
        lost its detail fades back to the last good one."""
        self.world, self.rollout, self.start_places, self.out = world, rollout, start_places, out
        self.context_frames, self.recover = context_frames, recover
        self.first_seed = rollout.seed
        self.start_index = 0  # in start_places
        self.paused = self.compare = self.inset = False
        self.step_requested = False  # one step although paused
        self.recorder: PlayRecorder | None = None  # while play is recorded
        self.notices: list[str] = []  # for the player, of what happened without a command
        self.restarts = 0  # how often the rollout was primed
        self.seconds: deque[tuple[float, ...]] = deque(maxlen=100_000)  # per step, of each of STEP_PARTS
        self.commands: dict[str, Callable[[], str]] = {
            "restart": lambda: self.restart_with_seed(self.first_seed),
            "new seed": lambda: self.restart_with_seed(self.rollout.seed + 1),
            "next": lambda: self.go_to((self.start_index + 1) % len(self.start_places)),
            "pause": self.toggle_pause,
            "single step": self.request_step,
            "greedy": self.toggle_greedy,
            "hotter": lambda: self.change_temperature(TEMPERATURE_STEP),
            "colder": lambda: self.change_temperature(-TEMPERATURE_STEP),
            "more passes": lambda: self.change_passes(1),
            "fewer passes": lambda: self.change_passes(-1),
            "go back": self.go_back,
            "compare": self.toggle_compare,
            "inset": self.toggle_inset,
            "record": self.toggle_recording,
        }
        self.restart()

    # ------------------------------------------------------------ starting

    @property
    def recording(self) -> Recording:
        """The recording that the rollout starts from."""
        return self.start_places[self.start_index]

    def restart(self) -> None:
        """Primes the rollout anew, with its current seed; ends a recording of play."""
        if message := self.stop_recording():
            self.notices.append(message)
        self.restarts += 1
        self.context = self.recording.first(self.context_frames)
        prime(self.rollout, [self.context])
        self.picture = self.rollout.pictures()[0].numpy()  # [H, W, 3] uint8
        self.action = np.zeros(ACTION_DIM, np.float32)  # that led to the picture
        self.turned = np.zeros(2)  # degrees of yaw and pitch since the start
        self.prediction = None  # of the last step
        self.steps = 0
        self.recovery = Recovery(self.rollout, self.context.tokens, self.world.fps, self.turned)
        self.fade: deque[np.ndarray] = deque()  # pictures still to be shown on the way back to a good one
        if self.compare and not self.recorded_actions:
            self.compare = False
        self.truth = self.true_picture()

    @property
    def recorded_actions(self) -> int:
        """The number of recorded actions after the context."""
        return len(self.recording) - len(self.context)

    def true_picture(self) -> np.ndarray | None:
        """The recorded frame of the current step, decoded: [H, W, 3] uint8; None if none is to be shown, or
        beyond the end of the recording."""
        frame = len(self.context) - 1 + self.steps
        if not (self.compare or self.inset) or not self.recorded_actions or frame >= len(self.recording):
            return None
        return decode(self.recording.tokens[frame : frame + 1], self.world)[0].numpy()

    # ------------------------------------------------------------ stepping

    @property
    def step_due(self) -> bool:
        """Whether to make a step now: not paused, or a single step was requested."""
        return self.step_requested or not self.paused

    def step(self, action: np.ndarray) -> np.ndarray:
        """Action [5] -> the next picture [H, W, 3] uint8.

        While comparing, the recorded action is used instead; after the last one the session restarts. On the
        way back to a good picture the action has no effect.
        """
        self.step_requested = False
        if self.fade:
            self.picture = self.fade.popleft()
            return self.picture
        if self.compare:
            if self.steps == self.recorded_actions:
                self.restart()
                return self.picture
            action = self.recording.actions[len(self.context) - 1 + self.steps].numpy()
        times = [time.perf_counter()]
        self.prediction = self.rollout.predict(torch.from_numpy(action)[None])
        times.append(time.perf_counter())
        self.rollout.sample(self.prediction)
        times.append(time.perf_counter())
        self.picture = self.rollout.pictures()[0].numpy()
        times.append(time.perf_counter())
        self.seconds.append(tuple(np.diff(times)))
        self.action = action
        self.turned = self.turned + action[[YAW, PITCH]] * self.world.degrees_per_unit
        self.steps += 1
        self.truth = self.true_picture()
        if self.recorder is not None:
            try:
                self.recorder.add(self.picture, self.action, self.pose)
            except UserError as error:  # play goes on
                self.recorder = None
                self.notices.append(f"recording dropped: {error}")
        lost = self.recovery.watch(bool(np.any(action)), self.turned)
        if lost and self.recover and not self.compare:
            self.notices.append(f"the picture had lost its detail: {self.go_back()}")
        return self.picture

    def take_notices(self) -> str:
        """What happened since the last call, for the player; empty if nothing did."""
        message, self.notices = "; ".join(self.notices), []
        return message

    # ------------------------------------------------------------ commands

    def command(self, name: str) -> str:
        """Runs a command, one of bindings.COMMANDS -> the message for the player.

        Raises ValueError for an unknown name.
        """
        if name.startswith(START_PLACE):
            return self.go_to(int(name.removeprefix(START_PLACE)) - 1)
        if name not in self.commands:
            raise ValueError(f"no command {name!r}")
        return self.commands[name]()

    def restart_with_seed(self, seed: int) -> str:
        self.rollout.seed = seed
        self.restart()
        return f"{self.name}: restarted, seed {seed}"

    def go_to(self, index: int) -> str:
        """Restarts from another start place, if there is one of that index."""
        if index >= len(self.start_places):
            return f"there are {len(self.start_places)} start places"
        self.start_index = index
        self.restart()
        return f"start place {index + 1} of {len(self.start_places)}: {self.name}"

    def go_back(self) -> str:
        """Fades back to the last good picture -> the message for the player. Ends a recording of play, which
        could not be played again otherwise."""
        if self.compare:
            return "no way back while the recorded actions are played"
        if message := self.stop_recording():
            self.notices.append(message)
        lost = self.picture.astype(np.float32)
        steps, self.turned = self.recovery.go_back()
        good = self.rollout.pictures()[0].numpy()
        shares = np.linspace(0, 1, FADE_STEPS + 1)[1:]
        faded = [(lost + share * (good - lost)).round().astype(np.uint8) for share in shares]
        if self.paused:
            faded, self.picture = [], good
        self.fade = deque(faded)
        return f"back to where it was {steps / self.world.fps:.0f} s ago"

    def toggle_pause(self) -> str:
        self.paused = not self.paused
        return "paused" if self.paused else "running"

    def request_step(self) -> str:
        """Pauses after one more step."""
        self.paused = self.step_requested = True
        return "single step"

    def toggle_greedy(self) -> str:
        return self.change_sampling(greedy=not self.rollout.sampling.greedy)

    def change_temperature(self, change: float) -> str:
        temperature = round(self.rollout.sampling.temperature + change, 2)
        return self.change_sampling(temperature=max(TEMPERATURE_STEP, temperature))

    def change_passes(self, change: int) -> str:
        passes = self.rollout.sampling.passes + change
        return self.change_sampling(passes=min(max(passes, 1), MAX_PASSES))

    def change_sampling(self, **fields: bool | float | int) -> str:
        """Changes fields of the SamplingConfig."""
        self.rollout.sampling = replace(self.rollout.sampling, **fields)
        return self.sampling_label

    def toggle_compare(self) -> str:
        if not self.compare and not self.recorded_actions:
            return f"{self.name}: no recorded actions after the start, nothing to compare with"
        self.compare = not self.compare
        self.restart()
        return "truth | generated, with the recorded actions" if self.compare else "you control the player"

    def toggle_inset(self) -> str:
        if not self.inset and not self.recorded_actions:
            return f"{self.name}: no recorded frames after the start, nothing to show beside it"
        self.inset = not self.inset
        self.truth = self.true_picture()
        return "inset: the recording at the same time" if self.inset else "no inset"

    def toggle_recording(self) -> str:
        return self.start_recording() if self.recorder is None else self.stop_recording()

    # ------------------------------------------------------------ what a display shows

    @property
    def name(self) -> str:
        """Of the start place."""
        return Path(self.recording.name).stem

    @property
    def sampling_label(self) -> str:
        """How tokens are sampled."""
        sampling = self.rollout.sampling
        if sampling.greedy:
            return "greedy"
        return f"temperature {sampling.temperature:g}, passes {sampling.passes}"

    @property
    def pose(self) -> np.ndarray:
        """Pose relative to the start of the rollout [5]: x, y, z in metres (NaN for a model without a pose),
        yaw to the right and pitch down in degrees."""
        pose = self.rollout.model.pose_of(self.rollout.state)
        if pose is None:
            return np.array([np.nan] * 3 + [*self.turned])
        return pose[0].float().cpu().numpy()

    def stats(self) -> dict[str, float | int | str | list[float]]:
        """The statistics of the last step, ready for JSON; `position` is empty where it is unknown."""
        recent = np.array(list(self.seconds)[-RECENT_STEPS:] or [[0.0] * len(STEP_PARTS)])
        milliseconds = np.median(recent, 0) * 1000
        pose = self.pose
        return {
            "start_place": self.name,
            "step": self.steps,
            "step_ms": round(float(np.median(recent.sum(1)) * 1000), 1),
            **{f"{part}_ms": round(float(ms), 1) for part, ms in zip(STEP_PARTS, milliseconds, strict=True)},
            "sampling": self.sampling_label,
            "unique_codes": int(self.rollout.tokens.unique().numel()),
            "position": [round(float(x), 2) for x in pose[:3]] if np.isfinite(pose[0]) else [],
            "yaw": round(float(wrap(pose[3])), 1),
            "pitch": round(float(pose[4]), 1),
            "paused": self.paused,
            "recording": self.recorder is not None,
            "compare": self.compare,
            "inset": self.inset and self.truth is not None,
        }

    # ------------------------------------------------------------ files

    def file_stem(self) -> str:
        """A name for a file: the start place and the time, to the millisecond."""
        return f"{self.name}_{datetime.now():%Y%m%d_%H%M%S_%f}"[:-3]

    def start_recording(self) -> str:
        """Starts a recording of play -> the message for the player, also if it cannot be written."""
        try:
            recorder = PlayRecorder(self.out, self.file_stem(), self.world.fps)
            recorder.add(self.picture, self.action, self.pose)
        except UserError as error:
            return f"not recording: {error}"
        self.recorder = recorder
        return f"recording {recorder.name}"

    def stop_recording(self) -> str:
        """Ends the recording of play -> the message for the player, also if it cannot be written; empty if
        there is none."""
        if self.recorder is None:
            return ""
        recorder, self.recorder = self.recorder, None
        try:
            return f"wrote {recorder.finish()} and its actions"
        except UserError as error:
            return f"recording dropped: {error}"

    def screenshot(self, picture: np.ndarray | None = None) -> str:
        """Writes a picture [H, W, 3] uint8 (None: that of the world) -> the message for the player."""
        path = self.out / f"{self.file_stem()}.png"
        try:
            save_image(path, self.picture if picture is None else picture)
        except UserError as error:
            return str(error)
        return f"wrote {path}"
