"""The scripted player: seeded, without a bias to the left or right, balanced over the actions to be learned.

It performs one short behaviour after another. A behaviour is a generator of commands, one per frame. The
next one is sampled in proportion to how far its share of the frames so far is below the share in the
player's style. A wall or water interrupts a behaviour. A clip's seed selects one of STYLES, which sets the
shares of the behaviours, how long keys are pressed, and how fast the camera turns.
"""

import math
import random
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dataset.actions import wrap
from dataset.surroundings import LIQUID, REACH, SOLID, UNKNOWN
from geometry.camera import focal_length

MAX_TURN = 15.0  # degrees per frame: an action of 1
MAX_PITCH = 70.0  # degrees from the horizon


@dataclass(frozen=True)
class Style:
    """Parameters of a player."""

    name: str
    chance: float  # probability of a clip to get this style
    # Shares of frames by behaviour. "turn", "look", "walk" and "strafe" are single actions, so that each
    # effect can be learned alone. "look away" and "walk away" leave a view and return to it, which tests
    # memory. The last four involve the ground and obstacles.
    shares: dict[str, float]
    duration_scale: float = 1.0  # multiplies the duration of behaviours
    turn_speeds: tuple[float, float] = (0.7, MAX_TURN)  # degrees per frame, slowest and fastest
    pause_chance: float = 0.0  # probability of a pause after a behaviour


BEHAVIOURS = (
    "still", "turn", "look", "walk", "strafe", "jump", "walk+turn", "look away", "walk away",
    "straight", "approach", "climb", "drop",
)  # fmt: skip
SEARCH_ANGLES = tuple(15.0 * k for k in range(24))  # degrees from the view direction, for climb and drop


def _shares(*percent: int) -> dict[str, float]:
    """Percentages in the order of BEHAVIOURS -> shares by behaviour."""
    return {name: share / 100 for name, share in zip(BEHAVIOURS, percent, strict=True)}


STYLES = {
    style.name: style
    for style in (
        Style("even", 0.3, _shares(6, 12, 6, 11, 8, 6, 17, 8, 6, 5, 7, 4, 4)),
        Style("calm", 0.15, _shares(11, 14, 8, 12, 6, 3, 20, 7, 5, 6, 4, 2, 2), 1.8, (0.5, 5.0), 0.3),
        Style("brisk", 0.15, _shares(3, 13, 7, 10, 12, 9, 24, 7, 4, 2, 3, 3, 3), 0.5, (3.0, MAX_TURN)),
        Style("walker", 0.2, _shares(3, 7, 4, 10, 4, 4, 20, 3, 5, 28, 6, 3, 3), 1.3, (0.7, 8.0), 0.05),
        Style("explorer", 0.2, _shares(3, 7, 4, 6, 5, 7, 12, 3, 3, 8, 22, 10, 10), 1.0, (0.7, 12.0), 0.1),
    )
}
# Frames of walking against a wall before the player reacts. A few are kept: they show that walls block.
BLOCKED_FRAMES = 10
BLOCKED_SPEED = 0.08  # metres per frame, below which a walk counts as blocked; unblocked it is 0.25
WET_FRAMES = 6  # frames in water before the player heads for the shore
ASHORE_FRAMES = 24  # frames with dry feet that count as ashore; a swimmer's feet leave the water briefly
TOUCHING = 0.05  # metres per frame, below which a walking player touches an obstacle
NEAR_OBSTACLE, FAR_OBSTACLE = 2.0, 12.0  # metres, range of obstacles to approach
LOOKAHEAD = 3.0  # metres to search for a step in the ground
SWIM_CHANCE = 0.3  # probability of swimming on for a while before heading for the shore
TOO_DEEP = -REACH  # the rise reported where there is no ground in the box of nodes


@dataclass(frozen=True)
class Command:
    """Input until the next frame: pressed keys, and the camera's turn in degrees (+right, +down)."""

    keys: frozenset[str] = frozenset()
    yaw: float = 0.0
    pitch: float = 0.0


@dataclass(frozen=True)
class Observation:
    """The player's input for one frame. Nodes and origin are described in surroundings.py."""

    yaw: float  # degrees
    pitch: float
    pos: tuple[float, float, float]  # metres, of the feet
    wet: bool = False  # feet in water
    inverse_ray_distance: np.ndarray | None = None  # [h, w] in 1/m
    vertical_fov: float = 70.0  # degrees
    nodes: np.ndarray | None = None  # [7, 7, 7]
    origin: tuple[int, int, int] = (0, 0, 0)


Commands = Iterator[Command]
HORIZONTAL = {"forward", "back", "left", "right"}


def style_of(seed: int | str) -> Style:
    """The style of the clip with this seed."""
    styles = list(STYLES.values())
    return random.Random(f"{seed} style").choices(styles, [style.chance for style in styles])[0]


class Player:
    """Call it with the observation of each frame; it returns the command until the next frame.

    Without a style it uses "even".
    """

    def __init__(self, seed: int | str, style: Style | None = None):
        self.random, self.style = random.Random(seed), style or STYLES["even"]
        self.spent = dict.fromkeys(BEHAVIOURS, 0)  # frames by behaviour
        self.behaviour = "still"
        self.commands: Commands = iter(())
        self.observation = Observation(0.0, 0.0, (0.0, 0.0, 0.0))
        self.moved = 0.0  # horizontal metres since the previous frame
        self.positions: deque[tuple[float, float]] = deque(maxlen=BLOCKED_FRAMES + 1)  # x, z while walking
        self.wet = self.dry = 0  # frames with wet feet since it was ashore; consecutive frames with dry feet
        self.shore: tuple[float, float] | None = None  # x, z where it was last ashore
        self.leaving_water = False
        self.swam = False  # has swum on since it was last ashore
        self.escapes = 0  # consecutive attempts to get away from a wall

    def __call__(self, observation: Observation) -> Command:
        self.moved = math.dist(observation.pos[::2], self.observation.pos[::2])
        self.observation = observation
        self._interrupt()
        command = next(self.commands, None)
        while command is None:
            if self.random.random() < self.style.pause_chance:
                self.behaviour, self.commands = "still", self._press(set(), self.random.randint(2, 14))
            else:
                self.behaviour = self._sample_behaviour()
                method = "_" + self.behaviour.replace(" ", "_").replace("+", "_")
                self.commands = getattr(self, method)()
            command = next(self.commands, None)
        self.spent[self.behaviour] += 1
        if command.keys & HORIZONTAL:
            self.positions.append((observation.pos[0], observation.pos[2]))
        else:
            self.positions.clear()
        limit = MAX_PITCH - observation.pitch if command.pitch > 0 else -MAX_PITCH - observation.pitch
        pitch = command.pitch if abs(command.pitch) < abs(limit) else limit
        return Command(command.keys, _clip(command.yaw), _clip(pitch))

    def _sample_behaviour(self) -> str:
        total = sum(self.spent.values()) + 100  # without the 100 the first behaviours would not be random
        shares = self.style.shares
        lacking = [max(share * total - self.spent[name], 0.0) for name, share in shares.items()]
        return self.random.choices(list(shares), lacking)[0]

    # -------------------------------------------------------- walls and water

    def _interrupt(self) -> None:
        """Replaces the behaviour where the player is in water or blocked by a wall."""
        if self.observation.wet:
            self.wet += 1
            self.dry = 0
        else:
            self.dry += 1
        if self.dry >= ASHORE_FRAMES:
            self.wet, self.swam = 0, False
            self.shore = self.observation.pos[0], self.observation.pos[2]
        if self.wet >= WET_FRAMES and not self.leaving_water:
            self.commands = self._leave_water()
        elif len(self.positions) == self.positions.maxlen:
            if sum(math.dist(a, b) for a, b in pairwise(self.positions)) < BLOCKED_SPEED * BLOCKED_FRAMES:
                self.commands = self._leave_wall()
                self.escapes += 1
                self.positions.clear()
                if self.leaving_water:  # the bank is too high to climb: go elsewhere before trying again
                    self.leaving_water, self.wet = False, -ASHORE_FRAMES
            else:
                self.escapes = 0

    def _leave_wall(self) -> Commands:
        """Tries to jump onto the wall; if the player is still blocked, turns away and walks on."""
        if self.escapes % 3 == 1:  # `escapes` counts this attempt already
            self.behaviour = "jump"
            yield from self._press({"forward", "jump"}, self.random.randint(10, 18))
        else:
            self.behaviour = "walk+turn"
            yield from self._turn_by(self._sign() * self.random.uniform(50, 170), self._log_uniform(3, 12))
            yield from self._press({"forward"}, self.random.randint(12, 30))

    def _leave_water(self) -> Commands:
        """Turns to where the player was last ashore, else by 180 degrees, and swims there.

        Sometimes swims on for a while first.
        """
        self.behaviour, self.leaving_water = "walk+turn", True
        keys = {"forward", "jump"}
        if not self.swam and self.random.random() < SWIM_CHANCE:
            yield from self._press(keys, self.random.randint(6, 20))
        self.swam = True
        turn = 180.0 * self._sign()
        if self.shore is not None:
            x, _, z = self.observation.pos
            there = math.degrees(math.atan2(x - self.shore[0], self.shore[1] - z))
            turn = wrap(there - self.observation.yaw)
        yield from self._turn_by(turn, self._log_uniform(5, 12), keys)
        yield from self._press(keys, self.random.randint(24, 48))
        self.wet, self.leaving_water = 0, False  # if the feet are still wet, it starts again

    # -------------------------------------------------------- parts of behaviours

    def _sign(self) -> int:
        return self.random.choice((-1, 1))

    def _log_uniform(self, low: float, high: float) -> float:
        return math.exp(self.random.uniform(math.log(low), math.log(high)))

    def _frames(self, low: int, high: int) -> int:
        """A random duration in frames, scaled by the style."""
        return max(1, round(self.random.randint(low, high) * self.style.duration_scale))

    def _turn_speed(self, low: float, high: float) -> float:
        """Degrees per frame of a turn to a given angle, at most the style's fastest."""
        return min(self._log_uniform(low, high), self.style.turn_speeds[1])

    def _press(self, keys: set[str], frames: int) -> Commands:
        for _ in range(frames):
            yield Command(frozenset(keys))

    def _turn_by(self, yaw: float, speed: float, keys: set[str] = frozenset()) -> Commands:
        """Turns by `yaw` degrees at `speed` degrees per frame; the last frame turns by the rest."""
        while abs(yaw) > 1e-6:
            step = math.copysign(min(abs(yaw), speed), yaw)
            yaw -= step
            yield Command(frozenset(keys), yaw=step)

    def _pitch_to(self, goal: float, speed: float, keys: set[str] = frozenset()) -> Commands:
        uneven = self.random.random() < 0.6
        for _ in range(200):
            missing = goal - self.observation.pitch
            if abs(missing) < 0.3:  # about one pixel of the mouse
                return
            step = speed * self.random.uniform(0.2, 1.0) if uneven else speed
            yield Command(frozenset(keys), pitch=math.copysign(min(abs(missing), step), missing))

    def _pitch_step(self, goal: float, speed: float) -> float:
        """The pitch change of one frame towards `goal`."""
        missing = goal - self.observation.pitch
        return math.copysign(min(abs(missing), speed), missing) if abs(missing) > 0.3 else 0.0

    def _yaw_rates(self, frames: int) -> list[float]:
        """Degrees per frame of one turn: constant, smooth, uneven, or to one side and back."""
        shape = self.random.choice(("constant", "smooth", "uneven", "back and forth"))
        peak = self._sign() * self._log_uniform(*self.style.turn_speeds)
        if shape == "constant":
            return [peak] * frames
        if shape == "uneven":
            return [peak * self.random.uniform(0.1, 1.0) for _ in range(frames)]
        angle = math.pi if shape == "smooth" else 2 * math.pi
        wave = np.sin(angle * (np.arange(frames) + 0.5) / frames)
        return (peak * np.sign(wave) * wave**2).tolist()

    def _level(self) -> float:
        """A random pitch near the horizon."""
        return self.random.gauss(2, 9)

    def _direction(self) -> set[str]:
        along, across = (
            self.random.choice(("forward",) * 3 + ("back",)),
            self.random.choice(("left", "right")),
        )
        return self.random.choices(({along}, {across}, {along, across}), (6, 2, 2))[0]

    # -------------------------------------------------------- behaviours

    def _still(self) -> Commands:
        yield from self._press(set(), self._frames(4, 24))

    def _turn(self) -> Commands:
        for rate in self._yaw_rates(self._frames(6, 32)):
            yield Command(yaw=rate)

    def _look(self) -> Commands:
        """Looks up or down, and back to the horizon."""
        goal = self._sign() * self.random.triangular(5, 60, 15)
        yield from self._pitch_to(goal, self._turn_speed(0.5, 12))
        yield from self._press(set(), self.random.randint(0, 6))
        yield from self._pitch_to(self._level(), self._turn_speed(1, 12))

    def _walk(self) -> Commands:
        yield from self._press({self.random.choice(("forward",) * 3 + ("back",))}, self._frames(8, 48))

    def _strafe(self) -> Commands:
        keys = {self.random.choice(("left", "right"))}
        if self.random.random() < 0.35:
            keys.add(self.random.choice(("forward", "back")))
        yield from self._press(keys, self._frames(6, 28))

    def _jump(self) -> Commands:
        keys = {"jump"} | self.random.choice((set(), {"forward"}, {"forward"}, self._direction()))
        frames = self._frames(4, 26)
        turning = self.random.random() < 0.3
        for rate in self._yaw_rates(frames) if turning else [0.0] * frames:
            yield Command(frozenset(keys), yaw=rate)

    def _walk_turn(self) -> Commands:
        keys = self._direction()
        frames = self._frames(8, 48)
        goal = self._level() if self.random.random() < 0.4 else self.observation.pitch
        speed = self._log_uniform(0.4, 4)
        hop = self.random.randrange(frames) if self.random.random() < 0.25 else -1
        for k, rate in enumerate(self._yaw_rates(frames)):
            jumping = {"jump"} if hop >= 0 and k in range(hop, hop + 4) else set()
            yield Command(frozenset(keys | jumping), yaw=rate, pitch=self._pitch_step(goal, speed))

    def _look_away(self) -> Commands:
        """Turns away, waits, and turns back to the same view."""
        angle = self._sign() * self.random.choice((30, 60, 90, 180)) * self.random.uniform(0.85, 1.15)
        start = self.observation.yaw
        yield from self._press(set(), self.random.randint(1, 4))
        yield from self._turn_by(angle, self._turn_speed(3, 14))
        yield from self._press(set(), self.random.randint(0, 16))
        yield from self._turn_by(start - self.observation.yaw, self._turn_speed(3, 14))
        yield from self._press(set(), self.random.randint(2, 6))

    def _walk_away(self) -> Commands:
        """Walks away and back to the same view, by the opposite key or by turning by 180 degrees."""
        frames = self._frames(12, 40)
        start = self.observation.yaw
        if self.random.random() < 0.5:
            out, back = self.random.choice(
                (("forward", "back"), ("back", "forward"), ("left", "right"), ("right", "left"))
            )
            yield from self._press({out}, frames)
            yield from self._press(set(), self.random.randint(0, 4))
            yield from self._press({back}, frames)
        else:
            speed = self._turn_speed(5, 14)
            yield from self._press({"forward"}, frames)
            yield from self._turn_by(180.0 * self._sign(), speed)
            yield from self._press({"forward"}, frames)
            yield from self._turn_by(wrap(start - self.observation.yaw), speed)
        yield from self._press(set(), self.random.randint(2, 6))

    def _straight(self) -> Commands:
        """Walks far, straight or in a wide bend, and jumps over steps of one block."""
        bend = self._sign() * self.random.choice((0.0, 0.0, 0.3, 0.8))
        goal, speed = self._level(), self._log_uniform(0.2, 3)
        for _ in range(self._frames(48, 144)):
            yield Command(
                frozenset({"forward"} | self._jump_key()), yaw=bend, pitch=self._pitch_step(goal, speed)
            )

    def _approach(self) -> Commands:
        """Walks up to an obstacle, pushes against it for a moment, then slides along it, steps aside, or goes
        back."""
        yield from self._turn_by(self._angle_to_obstacle(), self._turn_speed(2, 12))
        touched, enough = 0, self.random.randint(2, 7)
        goal, speed = self._level(), self._log_uniform(0.2, 3)
        for k in range(56):
            touched = touched + 1 if k > 3 and self.moved < TOUCHING else 0
            if touched >= enough:
                break
            yield Command(frozenset({"forward"}), pitch=self._pitch_step(goal, speed))
        side = self._sign()
        what = self.random.choices(("slide", "sidestep", "back"), (5, 2, 2))[0]
        if what == "slide":
            yield from self._turn_by(side * self.random.uniform(25, 85), self._turn_speed(2, 12), {"forward"})
            yield from self._press({"forward"}, self._frames(8, 32))
        elif what == "sidestep":
            keys = {"forward", "right" if side > 0 else "left"}
            yield from self._press(keys, self._frames(8, 24))
        else:
            yield from self._press({"back"}, self._frames(6, 20))

    def _climb(self) -> Commands:
        """Walks to ground that is one block higher and jumps onto it."""
        yield from self._step((1,))

    def _drop(self) -> Commands:
        """Steps down by one or two blocks, not into a hole deeper than the box of nodes, often a cave."""
        yield from self._step(range(TOO_DEEP + 1, 0))

    # -------------------------------------------------------- ground and obstacles

    def _step(self, rises: Collection[int]) -> Commands:
        """Turns to a direction where the ground rises by one of `rises` blocks, and walks there.

        If there is none, walks a short way in a random direction.
        """
        candidates = [turn for turn in SEARCH_ANGLES if self._rise(self.observation.yaw + turn) in rises]
        if not candidates:
            yield from self._turn_by(self._sign() * self.random.uniform(0, 90), self._turn_speed(3, 12))
            yield from self._press({"forward"}, self._frames(8, 24))
            return
        turn = wrap(self.random.choice(candidates))
        yield from self._turn_by(turn, self._turn_speed(3, 14))
        start = self.observation.pos[1]
        goal, speed = (
            self.random.triangular(-5, 45, 10),
            self._log_uniform(0.5, 6),
        )  # mostly down, at the step
        for _ in range(32):
            if abs(self.observation.pos[1] - start) > 0.7 and self.random.random() < 0.2:
                break
            yield Command(frozenset({"forward"} | self._jump_key()), pitch=self._pitch_step(goal, speed))

    def _ground(self, ahead: float, yaw: float) -> int | None:
        """Height in metres of the ground `ahead` metres along `yaw`, relative to the feet's node.

        TOO_DEEP if it is below the box; None if it is unknown or covered by water.
        """
        column = self._column(ahead, yaw)
        for j in range(REACH + 2, -1, -1):  # from above the head down
            if column is None or column[j] in (UNKNOWN, LIQUID):
                return None
            if column[j] == SOLID:
                return j + 1 - REACH
        return TOO_DEEP

    def _column(self, ahead: float, yaw: float) -> np.ndarray | None:
        """The column of nodes [7] `ahead` metres along `yaw`, from bottom to top; None outside the box."""
        nodes, (x, _, z) = self.observation.nodes, self.observation.pos
        if nodes is None:
            return None
        x, z = x - ahead * math.sin(math.radians(yaw)), z + ahead * math.cos(math.radians(yaw))
        i, k = round(x) - self.observation.origin[0], round(z) - self.observation.origin[2]
        return nodes[i, :, k] if 0 <= i < len(nodes) and 0 <= k < len(nodes) else None

    def _rise(self, yaw: float) -> int:
        """The first change of ground height within LOOKAHEAD metres along `yaw`; 0 if there is none."""
        for step in range(1, round(LOOKAHEAD / 0.5)):
            if rise := self._ground(0.5 * step, yaw):
                return rise
        return 0

    def _jump_key(self) -> set[str]:
        """{"jump"} if the ground just ahead is one block higher, else nothing."""
        return (
            {"jump"} if any(self._ground(ahead, self.observation.yaw) == 1 for ahead in (0.6, 0.9)) else set()
        )

    def _angle_to_obstacle(self) -> float:
        """Degrees to turn to face an obstacle at eye level; a random angle if none is in view."""
        observation = self.observation
        inverse = observation.inverse_ray_distance
        if inverse is not None:
            height, width = inverse.shape
            focal = focal_length(height, observation.vertical_fov)
            horizon = round(height / 2 - focal * math.tan(math.radians(observation.pitch)))
            if 0 <= horizon < height:
                row = inverse[horizon]
                columns = np.flatnonzero((row > 1 / FAR_OBSTACLE) & (row < 1 / NEAR_OBSTACLE))
                if len(columns):
                    column = self.random.choice(columns.tolist())
                    return math.degrees(math.atan((column + 0.5 - width / 2) / focal))
        return self._sign() * self.random.uniform(30, 150)


def _clip(turn: float) -> float:
    return max(-MAX_TURN, min(MAX_TURN, turn))
