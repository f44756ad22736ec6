"""Records clips in a running game: goes to a place, plays, cuts where play went wrong, writes the clip."""

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
from dataset.surroundings import Surroundings, encode_inverse_distance
from luanti.game import DEGREES_PER_PIXEL, EYE_HEIGHT, FPS, Frame, Game, GameError, Picture
from luanti.player import HORIZONTAL, MAX_TURN, Player, Senses, style_of
from runtime.video import resize

TIMES = {"dawn": 0.23, "morning": 0.32, "noon": 0.5, "evening": 0.74, "night": 0.0}  # parts of a day
WEATHERS = ("clear", "overcast", "rain")
BIOMES = (
    "icesheet", "tundra", "tundra_highland", "taiga", "snowy_grassland", "grassland", "grassland_dunes",
    "coniferous_forest", "coniferous_forest_dunes", "deciduous_forest", "deciduous_forest_shore", "desert",
    "sandstone_desert", "cold_desert", "savanna", "savanna_shore", "rainforest", "rainforest_swamp",
)  # fmt: skip
ATTEMPTS = 6  # places tried for one clip
STARTS = 3  # tries to start the game
SHORTEST = 0.25  # of the wanted length: a clip cut earlier is thrown away and recorded elsewhere
MOST_MEMORY = 1800.0  # MB, above which the game is started anew
SETTLED = 0.4  # mean change between frames, in 1/255, below which the land around has loaded
SETTLE_FRAMES = (64, 400)  # at least, at most
QUIET_FRAMES = 24  # in a row without a change
ADRIFT_FRAMES = 192  # with the feet in water on half of them: it will not come ashore again
STUCK_FRAMES = 112  # with keys held on most of them and hardly a metre made: stuck
DARK_FRAMES = 16  # below DARK at noon's light: in a cave
DARK = 6


@dataclass(frozen=True)
class ClipPlan:
    """What one clip shall be, from the run's seed alone."""

    name: str
    world_seed: int
    seed: str  # of place and player
    biome: str  # "" for any
    time: str
    weather: str


@dataclass(frozen=True)
class Options:
    """What all clips of a run share."""

    out: Path
    frames: int
    picture: Picture
    human: bool = False
    labels: dict = field(default_factory=dict)  # further metadata of each clip


class ClipRejected(RuntimeError):
    """A clip that is not worth keeping, and why."""


def plan_clips(
    seed: int, clips: int, clips_per_world: int, biomes: list[str], times: list[str], weathers: list[str]
) -> list[ClipPlan]:
    """The clips of a run: every `clips_per_world` in a world of their own, biomes in turn in random order."""
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
                time=choose.sampling(times),
                weather=choose.sampling(weathers),
            )
        )
    return plans


# ------------------------------------------------------------ one clip


def place_of(plan: ClipPlan, attempt: int) -> tuple[str, int, str]:
    """Name, seed and biome of the place for one attempt at a clip: other attempts, other places."""
    return f"{plan.name}-{attempt}", random.Random(f"{plan.seed} {attempt}").getrandbits(31), plan.biome


def settle(game: Game) -> None:
    """Lets frames pass until the land around has loaded: until the picture has stopped changing.

    Turns once around meanwhile, since the game loads what is in view first.
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
        time.sleep(0.01)  # the threads that build the land want the processor, too


class Watch:
    """Sees where a clip must be cut."""

    def __init__(self) -> None:
        self.places: deque[tuple[float, float]] = deque(maxlen=STUCK_FRAMES)
        self.walking: deque[bool] = deque(maxlen=STUCK_FRAMES)
        self.wet: deque[bool] = deque(maxlen=ADRIFT_FRAMES)
        self.dark = 0

    def __call__(self, frame: Frame) -> str:
        """Why the clip ends before this frame; "" if it goes on."""
        self.places.append((frame.pos[0], frame.pos[2]))
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
        if sum(self.walking) > 0.6 * STUCK_FRAMES:
            x, z = np.ptp(np.array(self.places), axis=0)
            if math.hypot(x, z) < 1.0:
                return "stuck"
        return ""


def is_liquid(node: str) -> bool:
    """Whether a node's name is water or lava."""
    return "water" in node or "lava" in node


class Mouse:
    """Turns wanted in degrees into whole pixels; what rounding left over is made up for in the next frame."""

    def __init__(self, yaw: float, pitch: float):
        self.yaw, self.pitch = yaw, pitch  # where the camera should be by now

    def pixels(self, frame: Frame, yaw: float, pitch: float) -> tuple[int, int]:
        """Pixels right and down from where the camera is in `frame` to where it should be in the next."""
        self.yaw += yaw
        self.pitch = min(max(self.pitch + pitch, -89.0), 89.0)
        return self._pixels(self.yaw - frame.yaw), self._pixels(self.pitch - frame.pitch)

    @staticmethod
    def _pixels(degrees: float) -> int:
        most = int(MAX_TURN / DEGREES_PER_PIXEL)
        return min(max(round(degrees / DEGREES_PER_PIXEL), -most), most)


def entries(frames: list[Frame], count: int) -> dict[str, dict]:
    """GF-Minecraft's `actions` of the first `count` frames.

    The place of a frame is that of its eye less EYE_HEIGHT, which the frame after it tells; without one, in a
    clip that was broken off, that of the feet.
    """
    found = {}
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
        found[str(k)] = {
            **entry,
            "yaw_delta": round(turn / actions.DEGREES_PER_UNIT, 5),
            "pitch_delta": round(tilt / actions.DEGREES_PER_UNIT, 5),
            "yaw": round(frame.yaw, 4),
            "pitch": round(frame.pitch, 4),
            "pos": [round(x, 4), round(y, 4), round(z, 4)],
        }
    return found


def record_clip(
    game: Game,
    plan: ClipPlan,
    attempt: int,
    options: Options,
    seen: Callable[[int], None],
    ahead: Callable[[], None],
) -> str:
    """Records one clip and writes it -> how it ended, "complete" or why it was cut.

    `seen` is told how many frames are recorded; `ahead` is called once the place is reached, to prepare the
    next. Raises ClipRejected if too little could be recorded, GameError if the game failed.
    """
    while options.human and not game.pass_frame():
        pass  # in the pause menu
    place, seed, biome = place_of(plan, attempt)
    game.prepare(place, seed, biome)
    biome = game.go(place, TIMES[plan.time], plan.weather, yaw=seed % 360)
    ahead()
    settle(game)
    with ClipWriter(options.out, plan.name, FPS, preset="veryfast") as clip:
        kept, ended = play(game, plan.seed, options, clip, seen)
        seen(clip.frames % FPS)
        told = {} if options.human else {"player_style": style_of(plan.seed).name}
        shortest = 2 * FPS if options.human else SHORTEST * options.frames
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
                "player": "human" if options.human else "scripted",
                **told,
                "ended": ended,
                **options.labels,
                "actions": entries(kept, clip.frames),
            },
            surroundings_of(kept[: clip.frames]),
        )
    return ended


def surroundings_of(frames: list[Frame]) -> Surroundings:
    """Depth and nodes of the frames; their `inverse_distance` is encoded already. Raises GameError."""
    if any(frame.nodes is None for frame in frames):
        raise GameError("the game's log tells no nodes around the player")
    return Surroundings(
        np.stack([frame.inverse_distance for frame in frames]),
        np.stack([frame.nodes for frame in frames]),
        np.array([frame.origin for frame in frames], np.int32),
    )


def play(
    game: Game, seed: str, options: Options, clip: ClipWriter, seen: Callable[[int], None]
) -> tuple[list[Frame], str]:
    """Plays one clip -> its frames and the one after them, without pictures and with `inverse_distance`
    encoded, and how it ended."""
    player, watch = Player(seed, style_of(seed)), Watch()
    kept: list[Frame] = []
    size = options.picture.height, options.picture.width
    game.release()
    frame = game.frame()
    if frame is None:
        raise ClipRejected("paused at the start")
    mouse = Mouse(frame.yaw, frame.pitch)
    due = time.monotonic()
    while True:
        ended = "" if options.human else watch(frame)
        if len(kept) == options.frames:
            ended = ended or "complete"
        # The pixels go into the video; what stays in memory for the whole clip should be small.
        codes = encode_inverse_distance(frame.inverse_distance)
        kept.append(replace(frame, picture=None, inverse_distance=codes))
        if ended:
            return kept, ended
        if options.human:
            due = max(due + 1 / FPS, time.monotonic() - 1 / FPS)
            time.sleep(max(0.0, due - time.monotonic()))
        else:
            command = player(senses_of(frame, options.picture.vertical_fov))
            game.controls.apply(command.keys, *mouse.pixels(frame, command.yaw, command.pitch))
        try:
            game.release()
            clip.write(resize(frame.picture, *size))  # while the game draws the next
            frame = game.frame()
        except GameError:
            if options.human and not game.alive:
                return kept, "quit"
            raise
        if clip.frames % FPS == 0:
            seen(FPS)
        if frame is None:
            if options.human:
                return kept, paused_or_quit(game)
            raise GameError("the game has paused itself")
        if abs(frame.seconds - 1 / FPS) > 1e-4:
            raise GameError(f"a frame took {frame.seconds:.4f} s of game time, expected {1 / FPS:.4f}")


def senses_of(frame: Frame, vertical_fov: float) -> Senses:
    """What the player knows of a frame."""
    return Senses(
        frame.yaw,
        frame.pitch,
        frame.pos,
        is_liquid(frame.feet_node),
        frame.inverse_distance,
        vertical_fov,
        frame.nodes,
        frame.origin,
    )


def paused_or_quit(game: Game) -> str:
    """Waits until a person has left the pause menu, or the game: a closing window stands still first, too."""
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
    plans: list[ClipPlan], options: Options, work: Path, job: int, tell: Callable[[str, object], None]
) -> None:
    """Records clips that share a world, restarting the game where it fails or grows.

    `tell(what, value)` reports: ("frames", n) recorded, ("lost", n) of them thrown away, ("clip", (name,
    ended)), ("note", text), ("failed", (name, reasons)), ("quit", None) when a person closed the window.
    Raises GameError if the game cannot be started.
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
                    game = start_game(plan.world_seed, options, work, job, tell)
                frames = 0

                def seen(count: int) -> None:
                    nonlocal frames
                    frames += count
                    tell("frames", count)

                def ahead(game: Game = game, later: list[ClipPlan] = plans[k + 1 : k + 2]) -> None:
                    for plan in later:
                        game.prepare(*place_of(plan, 0))

                try:
                    tell("clip", (plan.name, record_clip(game, plan, attempt, options, seen, ahead)))
                    break
                except (ClipRejected, GameError) as error:
                    reasons.append(str(error))
                    tell("lost", frames)
                    if options.human and not game.alive:
                        break
                    tell("note", f"{plan.name}: {error}; again at another place")
                    if isinstance(error, GameError):
                        game.close()
                        game = None
            else:
                tell("failed", (plan.name, "; ".join(reasons)))
            if options.human and game is not None and not game.alive:
                tell("quit", None)
                return
    finally:
        if game is not None:
            game.close()


def start_game(
    world_seed: int, options: Options, work: Path, job: int, tell: Callable[[str, object], None]
) -> Game:
    """A game in that world: in a window for a person, else unseen, and started again if that failed."""
    tries = 1 if options.human else STARTS
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
            tries -= 1
            if not tries:
                raise
            tell("note", f"the game did not start: {error}; again")
