"""Records clips in a running game: moves to a start place, plays, ends the clip where play fails, writes
it.
"""

import math
import os
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dataset import actions
from dataset.recordings import ClipWriter
from dataset.surroundings import Surroundings, encode_inverse_ray_distance
from luanti.game import DEGREES_PER_PIXEL, EYE_HEIGHT, FPS, Frame, Game, GameError, Picture
from luanti.player import HORIZONTAL, MAX_TURN, Command, Observation, Player, style_of
from rollout.forward_walk import ForwardPlayer
from runtime.video import resize

TIMES = {"dawn": 0.23, "morning": 0.32, "noon": 0.5, "evening": 0.74, "night": 0.0}  # fraction of a day
WEATHERS = ("clear", "overcast", "rain")
BIOMES = (
    "icesheet", "tundra", "tundra_highland", "taiga", "snowy_grassland", "grassland", "grassland_dunes",
    "coniferous_forest", "coniferous_forest_dunes", "deciduous_forest", "deciduous_forest_shore", "desert",
    "sandstone_desert", "cold_desert", "savanna", "savanna_shore", "rainforest", "rainforest_swamp",
)  # fmt: skip
ATTEMPTS = 6  # start places tried for one clip
STARTS = 3  # attempts to start the game
SHORTEST = 0.25  # of the wanted length; a shorter clip is discarded and recorded at another start place
MOST_MEMORY = 1800.0  # MB, above which the game is restarted
SETTLED = 0.4  # mean pixel change between frames, of 255, below which the terrain has loaded
SETTLE_FRAMES = (64, 400)  # least and most frames to wait for that
QUIET_FRAMES = 24  # consecutive frames without a change
ADRIFT_FRAMES = 192  # a clip ends if the feet are in water on half of so many frames
STUCK_FRAMES = 112  # a clip ends if the player walks on most of so many frames and moves less than a metre
DARK_FRAMES = 16  # a clip ends after so many frames with daylight below DARK: the player is in a cave
DARK = 6


@dataclass(frozen=True)
class ClipPlan:
    """The parameters of one clip; they depend on the run's seed alone."""

    name: str
    world_seed: int
    seed: str  # of start place and player
    biome: str  # "" for any
    time: str
    weather: str


@dataclass(frozen=True)
class RecorderOptions:
    """The settings that all clips of a run share."""

    out: Path
    frames: int
    picture: Picture
    human: bool = False
    forward: bool = False  # the player holds W (`ForwardPlayer`)
    labels: dict = field(default_factory=dict)  # additional metadata of each clip


class ClipRejected(RuntimeError):
    """A clip is too short to keep. The message says why it ended."""


def plan_clips(
    seed: int, clips: int, clips_per_world: int, biomes: list[str], times: list[str], weathers: list[str]
) -> list[ClipPlan]:
    """The clips of a run: `clips_per_world` share a world; each biome once in random order, then again."""
    plans = []
    bag: list[str] = []
    choose = random.Random(f"{seed}")
    for k in range(clips):
        world = k // clips_per_world
        if not bag:
            bag = choose.sample(biomes, len(biomes)) if biomes else [""]
        plans.append(
            ClipPlan(
                name=f"clip_{seed:02d}_{k:05d}",
                world_seed=random.Random(f"{seed} world {world}").getrandbits(32),
                seed=f"{seed} clip {k}",
                biome=bag.pop(),
                time=choose.choice(times),
                weather=choose.choice(weathers),
            )
        )
    return plans


# ------------------------------------------------------------ one clip


def start_place(plan: ClipPlan, attempt: int) -> tuple[str, int, str]:
    """Name, seed and biome of the start place for one attempt at a clip; each attempt has another place."""
    return f"{plan.name}-{attempt}", random.Random(f"{plan.seed} {attempt}").getrandbits(31), plan.biome


def settle(game: Game) -> None:
    """Skips frames until the surrounding terrain has loaded: until the picture no longer changes.

    The camera first turns once around, since the game loads the terrain in view first.
    """
    at_least, at_most = SETTLE_FRAMES
    last, quiet = None, 0
    for k in range(at_most):
        if game.controls and k < 12:
            game.controls.apply((), round(30 / DEGREES_PER_PIXEL))
        elif game.controls and k == 12:
            game.controls.apply(())
        game.release()
        frame = game.frame()
        if frame is not None:
            picture = frame.picture[::4, ::4].astype(np.int16)
            change = 255.0 if last is None else float(np.abs(picture - last).mean())
            last = picture
            quiet = quiet + 1 if change < SETTLED else 0
        if k >= at_least and quiet >= QUIET_FRAMES:
            return
        time.sleep(0.01)  # leaves the processor to the threads that build the terrain


class CutDetector:
    """Decides where a clip must end early. Call it with each frame."""

    def __init__(self, stuck: bool = True) -> None:
        """`stuck`: also where the player gets nowhere."""
        self.stuck = stuck
        self.positions: deque[tuple[float, float]] = deque(maxlen=STUCK_FRAMES)  # x, z
        self.walking: deque[bool] = deque(maxlen=STUCK_FRAMES)
        self.wet: deque[bool] = deque(maxlen=ADRIFT_FRAMES)
        self.dark = 0

    def __call__(self, frame: Frame) -> str:
        """The reason why the clip ends before this frame; "" if it continues."""
        self.positions.append((frame.pos[0], frame.pos[2]))
        self.walking.append(bool(frame.keys & HORIZONTAL))
        self.dark = self.dark + 1 if frame.daylight < DARK else 0
        self.wet.append(is_liquid(frame.feet_node))
        if sum(self.wet) > ADRIFT_FRAMES / 2:
            return "adrift"
        if is_liquid(frame.eye_node):
            return "drowned"
        if frame.eye_node in ("", "ignore"):
            return "unloaded"
        if self.dark >= DARK_FRAMES:
            return "dark"
        if self.stuck and sum(self.walking) > 0.6 * STUCK_FRAMES:
            x, z = np.ptp(np.array(self.positions), axis=0)
            if math.hypot(x, z) < 1.0:
                return "stuck"
        return ""


def is_liquid(node: str) -> bool:
    """Whether a node's name is that of water or lava."""
    return "water" in node or "lava" in node


class Mouse:
    """Converts turns in degrees to whole mouse pixels; rounding errors are corrected in the next frame."""

    def __init__(self, yaw: float, pitch: float):
        self.yaw, self.pitch = yaw, pitch  # the wanted camera angles so far

    def pixels(self, frame: Frame, yaw: float, pitch: float) -> tuple[int, int]:
        """Pixels right and down that turn the camera of `frame` to the wanted angles of the next frame."""
        self.yaw += yaw
        self.pitch = min(max(self.pitch + pitch, -89.0), 89.0)
        return self._pixels(self.yaw - frame.yaw), self._pixels(self.pitch - frame.pitch)

    @staticmethod
    def _pixels(degrees: float) -> int:
        most = int(MAX_TURN / DEGREES_PER_PIXEL)
        return min(max(round(degrees / DEGREES_PER_PIXEL), -most), most)


def action_entries(frames: list[Frame], count: int) -> dict[str, dict]:
    """GF-Minecraft's `actions` of the first `count` frames.

    The position of a frame is that of its eye minus EYE_HEIGHT. The game reports the eye with the next frame;
    for the last frame of an aborted clip, the position of the feet is used.
    """
    result = {}
    for k, frame in enumerate(frames[:count]):
        turn, tilt = (frame.yaw - frames[k - 1].yaw, frame.pitch - frames[k - 1].pitch) if k else (0.0, 0.0)
        move_x, move_z, jump = actions.from_keys(frame.keys)
        vector = actions.encode(turn, tilt, move_x, move_z, jump)
        entry = actions.to_gamefactory(vector)
        if "sneak" in frame.keys and not jump:
            entry["scs"] = 2
        x, y, z = frame.pos
        if k + 1 < len(frames):
            x, eye, z = frames[k + 1].eye_before
            y = eye - EYE_HEIGHT
        result[str(k)] = {
            **entry,
            "yaw_delta": round(turn / actions.DEGREES_PER_UNIT, 5),
            "pitch_delta": round(tilt / actions.DEGREES_PER_UNIT, 5),
            "yaw": round(frame.yaw, 4),
            "pitch": round(frame.pitch, 4),
            "pos": [round(x, 4), round(y, 4), round(z, 4)],
        }
    return result


def record_clip(
    game: Game,
    plan: ClipPlan,
    attempt: int,
    options: RecorderOptions,
    on_frames: Callable[[int], None],
    on_start: Callable[[], None],
) -> str:
    """Records one clip and writes it; returns "complete" or the reason why it ended early.

    `on_frames` is called with the number of frames recorded since the last call; `on_start` is called when
    the player has reached the start place. Raises ClipRejected if the clip is too short, GameError if the
    game failed.
    """
    while options.human and not game.pass_frame():
        pass  # in the pause menu
    place, seed, biome = start_place(plan, attempt)
    game.prepare(place, seed, biome)
    biome = game.go(place, TIMES[plan.time], plan.weather, yaw=seed % 360)
    on_start()
    settle(game)
    with ClipWriter(options.out, plan.name, FPS, preset="veryfast") as clip:
        kept, ended = play(game, plan.seed, options, clip, on_frames)
        on_frames(clip.frames % FPS)
        scripted = not (options.human or options.forward)
        style = {"player_style": style_of(plan.seed).name} if scripted else {}
        shortest = SHORTEST * options.frames if scripted else 2 * FPS
        if clip.frames < min(shortest, options.frames):
            raise ClipRejected(f"{ended} after {clip.frames} frames in {biome}")
        clip.finish(
            {
                "biome": biome,
                "initial_weather": plan.weather,
                "start_time": plan.time,
                "convention": "minecraft",
                "world_seed": str(plan.world_seed),
                "vertical_fov_degrees": options.picture.vertical_fov,
                "eye_height": EYE_HEIGHT,
                "player": "human" if options.human else "forward" if options.forward else "scripted",
                **style,
                "ended": ended,
                **options.labels,
                "actions": action_entries(kept, clip.frames),
            },
            stack_surroundings(kept[: clip.frames]),
        )
    return ended


def stack_surroundings(frames: list[Frame]) -> Surroundings:
    """Depth and nodes of the frames, whose `inverse_ray_distance` is already encoded. Raises GameError."""
    if any(frame.nodes is None for frame in frames):
        raise GameError("the game's log has no nodes around the player")
    return Surroundings(
        np.stack([frame.inverse_ray_distance for frame in frames]),
        np.stack([frame.nodes for frame in frames]),
        np.array([frame.origin for frame in frames], np.int32),
    )


def play(
    game: Game, seed: str, options: RecorderOptions, clip: ClipWriter, on_frames: Callable[[int], None]
) -> tuple[list[Frame], str]:
    """Plays one clip. Returns its frames and the one after them, and "complete" or why the clip ended early.

    The frames are without pictures, and their `inverse_ray_distance` is encoded.
    """
    player = HoldingForward() if options.forward else Player(seed, style_of(seed))
    detect_cut = CutDetector(stuck=not options.forward)
    kept: list[Frame] = []
    size = options.picture.height, options.picture.width
    game.release()
    frame = game.frame()
    if frame is None:
        raise ClipRejected("paused at the start")
    mouse = Mouse(frame.yaw, frame.pitch)
    due = time.monotonic()
    while True:
        ended = "" if options.human else detect_cut(frame)
        if len(kept) == options.frames:
            ended = ended or "complete"
        # The picture is written to the video; what is kept in memory for the whole clip should be small.
        codes = encode_inverse_ray_distance(frame.inverse_ray_distance)
        kept.append(replace(frame, picture=None, inverse_ray_distance=codes))
        if ended:
            return kept, ended
        if options.human:
            due = max(due + 1 / FPS, time.monotonic() - 1 / FPS)
            time.sleep(max(0.0, due - time.monotonic()))
        else:
            command = player(observe(frame, options.picture.vertical_fov))
            game.controls.apply(command.keys, *mouse.pixels(frame, command.yaw, command.pitch))
        try:
            game.release()
            clip.write(resize(frame.picture, *size))  # while the game draws the next frame
            frame = game.frame()
        except GameError:
            if options.human and not game.alive:
                return kept, "quit"
            raise
        if clip.frames % FPS == 0:
            on_frames(FPS)
        if frame is None:
            if options.human:
                return kept, paused_or_quit(game)
            raise GameError("the game has paused itself")
        if abs(frame.seconds - 1 / FPS) > 1e-4:
            raise GameError(f"a frame took {frame.seconds:.4f} s of game time, expected {1 / FPS:.4f}")


class HoldingForward:
    """`ForwardPlayer` in the game: it also levels the camera first. Call it as `Player`."""

    def __init__(self) -> None:
        self.player = ForwardPlayer(1, FPS, MAX_TURN)
        self.metres: list[float] = []
        self.before: tuple[float, float] | None = None  # x, z

    def __call__(self, observation: Observation) -> Command:
        place = observation.pos[0], observation.pos[2]
        if self.before is not None:
            self.metres.append(math.dist(self.before, place))
        self.before = place
        turn = float(self.player(np.array([self.metres]))[0, actions.YAW]) * MAX_TURN
        return Command(frozenset({"forward"}), turn, -observation.pitch)


def observe(frame: Frame, vertical_fov: float) -> Observation:
    """The player's observation of a frame."""
    return Observation(
        frame.yaw,
        frame.pitch,
        frame.pos,
        is_liquid(frame.feet_node),
        frame.inverse_ray_distance,
        vertical_fov,
        frame.nodes,
        frame.origin,
    )


def paused_or_quit(game: Game) -> str:
    """Waits until a person leaves the pause menu or closes the window; returns "paused" or "quit".

    A window that is being closed also stops drawing, so the two cannot be told apart at once.
    """
    try:
        while not game.pass_frame():
            pass
    except GameError:
        if game.alive:
            raise
        return "quit"
    return "paused"


# ------------------------------------------------------------ one world


def record_world(
    plans: list[ClipPlan],
    options: RecorderOptions,
    work: Path,
    job: int,
    report: Callable[[str, object], None],
) -> None:
    """Records clips that share a world; restarts the game where it fails or uses too much memory.

    `report(event, value)` is called with ("frames", n) recorded, ("lost", n) of them discarded, ("clip",
    (name, ended)), ("note", text), ("failed", (name, reasons)), and ("quit", None) when a person closed the
    window. Raises GameError if the game cannot be started.
    """
    game: Game | None = None
    try:
        for k, plan in enumerate(plans):
            reasons: list[str] = []
            for attempt in range(ATTEMPTS):
                if game is not None and game.memory_mb > MOST_MEMORY:
                    game.close()
                    game = None
                if game is None:
                    game = start_game(plan.world_seed, options, work, job, report)
                frames = 0

                def on_frames(count: int) -> None:
                    nonlocal frames
                    frames += count
                    report("frames", count)

                def prepare_next(game: Game = game, following: list[ClipPlan] = plans[k + 1 : k + 2]) -> None:
                    for plan in following:
                        game.prepare(*start_place(plan, 0))

                try:
                    ended = record_clip(game, plan, attempt, options, on_frames, prepare_next)
                    report("clip", (plan.name, ended))
                    break
                except (ClipRejected, GameError) as error:
                    reasons.append(str(error))
                    report("lost", frames)
                    if options.human and not game.alive:
                        break
                    report("note", f"{plan.name}: {error}; trying another start place")
                    if isinstance(error, GameError):
                        game.close()
                        game = None
            else:
                report("failed", (plan.name, "; ".join(reasons)))
            if options.human and game is not None and not game.alive:
                report("quit", None)
                return
    finally:
        if game is not None:
            game.close()


def start_game(
    world_seed: int, options: RecorderOptions, work: Path, job: int, report: Callable[[str, object], None]
) -> Game:
    """Starts the game in that world: in a window for a person, else on a virtual display.

    Without a person it tries STARTS times. Raises GameError.
    """
    attempts = 1 if options.human else STARTS
    while True:
        try:
            return Game(
                work / f"profile-{job}",
                work / f"cache-{job}",
                work / "lockstep.so",
                options.picture,
                world_seed,
                os.environ.get("DISPLAY") if options.human else None,
            )
        except GameError as error:
            attempts -= 1
            if not attempts:
                raise
            report("note", f"the game did not start: {error}; trying again")
