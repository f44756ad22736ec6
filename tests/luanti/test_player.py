"""The scripted player in a simulated body: no bias to left or right, balanced, never stuck."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from dataset.actions import wrap
from dataset.surroundings import BOX, FREE, LIQUID, REACH, SOLID
from luanti.game import DEGREES_PER_PIXEL
from luanti.player import (
    BLOCKED_FRAMES,
    HORIZONTAL,
    MAX_PITCH,
    MAX_TURN,
    STYLES,
    WET_FRAMES,
    Command,
    Observation,
    Player,
    style_of,
)
from luanti.recorder import Mouse

STEP = 0.25  # metres a frame on foot
EVEN = STYLES["even"]
SEEDS, FRAMES = range(20), 1200


def anywhere(x: float, z: float) -> bool:
    return True


def nowhere(x: float, z: float) -> bool:
    return False


class Body:
    """A simulated body: it turns by whole mouse pixels, is blocked by walls, and is slow in water."""

    def __init__(
        self, free: Callable[[float, float], bool] = anywhere, water: Callable[[float, float], bool] = nowhere
    ):
        self.free, self.water = free, water
        self.yaw = self.pitch = self.x = self.z = 0.0
        self.mouse = Mouse(0.0, 0.0)

    @property
    def observation(self) -> Observation:
        return Observation(self.yaw, self.pitch, (self.x, 0.0, self.z), self.water(self.x, self.z))

    def follow(self, command: Command) -> None:
        right, down = self.mouse.pixels(self, command.yaw, command.pitch)
        self.yaw += right * DEGREES_PER_PIXEL
        self.pitch += down * DEGREES_PER_PIXEL
        ahead = ("forward" in command.keys) - ("back" in command.keys)
        aside = ("right" in command.keys) - ("left" in command.keys)
        if ahead or aside:
            heading = math.radians(self.yaw) + math.atan2(aside, ahead)
            step = STEP / 2 if self.water(self.x, self.z) else STEP
            x, z = self.x - step * math.sin(heading), self.z + step * math.cos(heading)
            if self.free(x, z):
                self.x, self.z = x, z


@dataclass(frozen=True)
class Moment:
    """One frame of play: observation, command, and behaviour."""

    observation: Observation
    command: Command
    behaviour: str
    index: int  # of the behaviour in this play


def play(
    seed: int | str, frames: int = FRAMES, body: Body | None = None, style: str = "even"
) -> list[Moment]:
    """Lets a player control a body, by default on open ground."""
    body, player, moments, count, last = body or Body(), Player(seed, STYLES[style]), [], 0, None
    for _ in range(frames):
        observation = body.observation
        command = player(observation)
        count += player.commands is not last
        last = player.commands
        moments.append(Moment(observation, command, player.behaviour, count))
        body.follow(command)
    return moments


@pytest.fixture(scope="module")
def plays() -> list[list[Moment]]:
    """More than twenty minutes on open ground, one play per seed."""
    return [play(seed) for seed in SEEDS]


def behaviours(plays: list[list[Moment]], name: str) -> list[list[Moment]]:
    """The complete behaviours with that name, each with the moment after its end."""
    result = []
    for moments in plays:
        starts = [0, *(k for k in range(1, FRAMES) if moments[k].index != moments[k - 1].index)]
        for start, end in zip(starts, starts[1:], strict=False):
            if moments[start].behaviour == name:
                result.append(moments[start : end + 1])
    return result


def commands(moments: list[Moment]) -> list[Command]:
    return [moment.command for moment in moments]


# ------------------------------------------------------------ seeds


def test_commands_depend_on_the_seed_alone():
    assert commands(play("7 clip 3")) == commands(play("7 clip 3"))
    assert commands(play("7 clip 3")) != commands(play("7 clip 4"))


# ------------------------------------------------------------ balance on open ground


def z_score(signed: list[float]) -> float:
    """Distance from zero of the sum of independent signed amounts, in standard errors."""
    amounts = np.array(signed)
    return abs(amounts.sum()) / math.sqrt((amounts**2).sum())


def test_left_and_right_are_equally_frequent(plays):
    """Each behaviour goes left or right with equal probability: the sums over behaviours are unbiased."""
    turned, strafed = [], []
    for moments in plays:
        sums = Counter(), Counter()
        for moment in moments:
            sums[0][moment.index] += moment.command.yaw
            sums[1][moment.index] += ("right" in moment.command.keys) - ("left" in moment.command.keys)
        turned += sums[0].values()
        strafed += sums[1].values()
    assert len(turned) > 500
    assert z_score(turned) < 3
    assert z_score(strafed) < 3
    frames = Counter(side for p in plays for m in p for side in m.command.keys & {"left", "right"})
    assert min(frames.values()) > 0.7 * max(frames.values())  # some 250 strafes of 17 frames: 0.8 is 2 sigma


def test_behaviours_reach_their_shares(plays):
    counts = Counter(moment.behaviour for moments in plays for moment in moments)
    assert set(counts) == set(EVEN.shares)
    for name, share in EVEN.shares.items():
        assert counts[name] / (len(SEEDS) * FRAMES) == pytest.approx(share, abs=0.04), (
            name
        )  # long ones are few


def test_styles_have_all_behaviours_and_shares_and_chances_sum_to_1():
    for style in STYLES.values():
        assert sum(style.shares.values()) == pytest.approx(1), style.name
        assert set(style.shares) == set(EVEN.shares)
    assert sum(style.chance for style in STYLES.values()) == pytest.approx(1)


def test_styles_are_sampled_by_seed_with_their_chances():
    assert style_of("7 clip 3") is style_of("7 clip 3")
    names = Counter(style_of(f"1 clip {k}").name for k in range(2000))
    for style in STYLES.values():
        assert names[style.name] / 2000 == pytest.approx(style.chance, abs=0.04), style.name


def test_styles_differ_in_turning_speed_and_duration():
    turns, durations, straight = {}, {}, {}
    for style in STYLES:
        moments = [m for seed in range(6) for m in play(seed, FRAMES, style=style)]
        speeds = [
            abs(m.command.yaw) for m in moments if m.behaviour in ("turn", "walk+turn") and m.command.yaw
        ]
        turns[style] = np.median(speeds)
        lengths = Counter(m.index for m in moments if m.behaviour == "strafe")
        durations[style] = np.median(list(lengths.values()))
        straight[style] = np.mean([m.behaviour == "straight" for m in moments])
    assert turns["calm"] < 0.8 * turns["even"] < turns["brisk"]
    assert durations["brisk"] < durations["even"] < durations["calm"]
    assert straight["walker"] > 0.2


def test_all_turning_speeds_occur_up_to_the_limit(plays):
    speeds = np.array([abs(moment.command.yaw) for moments in plays for moment in moments])
    assert 14 < speeds.max() <= MAX_TURN
    counts = np.histogram(speeds[speeds > 0], [1e-9, 1, 2, 4, 6, 8, 10, 12, MAX_TURN])[0]
    assert (counts > 0.01 * (speeds > 0).sum()).all(), counts
    assert max(abs(m.command.pitch) for p in plays for m in p) <= MAX_TURN


def test_pitch_stays_in_bounds_and_mostly_near_the_horizon(plays):
    pitch = np.array([moment.observation.pitch for moments in plays for moment in moments])
    assert np.abs(pitch).max() <= MAX_PITCH + DEGREES_PER_PIXEL
    assert np.abs(pitch).max() > 40  # but up and down are seen, too
    assert -5 < pitch.mean() < 9
    low, high = np.quantile(pitch, [0.25, 0.75])
    assert -12 < low < high < 16


def test_pitch_returns_from_beyond_its_bounds(plays):
    body = Body()
    body.pitch = body.mouse.pitch = 85.0
    player = Player(1)
    for _ in range(FRAMES):
        body.follow(player(body.observation))
    assert abs(body.pitch) <= MAX_PITCH + DEGREES_PER_PIXEL


def test_every_action_occurs_alone_and_in_combination(plays):
    seen = Counter()
    for moments in plays:
        for _, command in ((m.observation, m.command) for m in moments):
            yaw = "" if not command.yaw else "turn right" if command.yaw > 0 else "turn left"
            pitch = "" if not command.pitch else "look down" if command.pitch > 0 else "look up"
            seen[frozenset({*command.keys, yaw, pitch} - {""})] += 1
    single = ("forward", "back", "left", "right", "jump", "turn left", "turn right", "look up", "look down")
    for action in single:
        assert seen[frozenset({action})] > 50, action
    assert seen[frozenset()] > 1000  # still
    for several in (
        {"forward", "left"}, {"forward", "right"}, {"back", "left"}, {"back", "right"}, {"forward", "jump"},
        {"forward", "turn left"}, {"forward", "turn right"}, {"back", "turn left"}, {"back", "turn right"},
        {"left", "turn right"}, {"right", "turn left"}, {"forward", "jump", "turn left"},
        {"forward", "turn right", "look up"}, {"forward", "turn left", "look down"},
    ):  # fmt: skip
        assert seen[frozenset(several)] > 5, several


def test_opposite_keys_and_sneak_are_never_pressed(plays):
    for moments in plays:
        for command in commands(moments):
            assert not {"forward", "back"} <= command.keys and not {"left", "right"} <= command.keys
            assert command.keys <= HORIZONTAL | {"jump"}


@pytest.mark.parametrize("name", ["turn", "look", "still", "look away"])
def test_pure_camera_behaviours_press_no_key(plays, name):
    assert not any(moment.command.keys for p in plays for moment in p if moment.behaviour == name)


@pytest.mark.parametrize("name", ["walk", "strafe"])
def test_pure_walking_behaviours_do_not_turn(plays, name):
    result = [m.command for p in plays for m in p if m.behaviour == name]
    assert result and not any(command.yaw or command.pitch for command in result)
    assert all(command.keys for command in result)


# ------------------------------------------------------------ behaviours that return


def test_look_away_returns_to_the_same_view(plays):
    result = behaviours(plays, "look away")
    assert len(result) > 20
    farthest = []
    for moments in result:
        yaws = [moment.observation.yaw for moment in moments]
        assert yaws[-1] == pytest.approx(yaws[0], abs=1.5 * DEGREES_PER_PIXEL)
        assert {moment.observation.pos for moment in moments} == {moments[0].observation.pos}
        farthest.append(max(abs(yaw - yaws[0]) for yaw in yaws))
    assert min(farthest) > 20 and max(farthest) > 150


def test_walk_away_returns_to_the_same_position_and_view(plays):
    result = behaviours(plays, "walk away")
    assert len(result) > 20
    turned_round = 0
    for moments in result:
        places = [(moment.observation.pos[0], moment.observation.pos[2]) for moment in moments]
        farthest = max(math.dist(places[0], place) for place in places)
        assert farthest > 10 * STEP
        assert math.dist(places[0], places[-1]) < 2 * STEP
        turn = wrap(moments[-1].observation.yaw - moments[0].observation.yaw)
        assert abs(turn) < 1.5 * DEGREES_PER_PIXEL
        turned_round += max(abs(m.observation.yaw - moments[0].observation.yaw) for m in moments) > 170
    assert 0 < turned_round < len(result)


# ------------------------------------------------------------ walls


class Straight(Player):
    """A player that always walks straight ahead."""

    def _sample_behaviour(self) -> str:
        return "walk"

    def _walk(self):
        yield from self._press({"forward"}, 8)


def test_a_blocked_player_jumps_first_and_then_turns_away():
    forward, jump = Command(frozenset({"forward"})), Command(frozenset({"forward", "jump"}))
    for seed in range(30):
        body, player, taken = Body(free=nowhere), Straight(seed), []
        for _ in range(100):
            taken.append(player(body.observation))
            body.follow(taken[-1])
        assert taken[: BLOCKED_FRAMES + 1] == [forward] * (BLOCKED_FRAMES + 1)
        assert taken[BLOCKED_FRAMES + 1 : 2 * BLOCKED_FRAMES + 1] == [jump] * BLOCKED_FRAMES
        later = taken[2 * BLOCKED_FRAMES + 1 : 80]
        assert max(abs(sum(c.yaw for c in later[:k])) for k in range(60)) > 49, seed
        assert not any(command.keys for command in later if command.yaw)


def test_a_successful_jump_ends_the_escape():
    """At a step that only a jumping player can climb, the player jumps and walks on without turning away."""
    taken, player, z = [], Straight(1), 0.0
    for _ in range(60):
        taken.append(player(Observation(0.0, 0.0, (0.0, 0.0, z))))
        if not 2 <= z < 3 or "jump" in taken[-1].keys:
            z += STEP
    assert z > 6
    assert any("jump" in command.keys for command in taken)
    assert not any(command.yaw for command in taken)


def test_walking_back_and_forth_does_not_count_as_blocked():
    """Walking forward and back returns to the same position without an obstacle."""

    class ToAndFro(Straight):
        def _walk(self):
            yield from self._press({"forward"}, 7)
            yield from self._press({"back"}, 7)

    body, player = Body(), ToAndFro(1)
    for _ in range(100):
        command = player(body.observation)
        assert "jump" not in command.keys and not command.yaw
        body.follow(command)


def test_an_enclosed_player_touches_walls_but_is_not_blocked_for_long():
    """In a square of 6 m the player walks into walls, and leaves each of them within some seconds."""
    longest = 0
    for seed in range(10):
        body = Body(free=lambda x, z: max(abs(x), abs(z)) < 3)
        moments = play(seed, FRAMES, body)
        vain = 0
        for before, after in zip(moments, moments[1:], strict=False):
            walking = bool(before.command.keys & HORIZONTAL)
            vain = vain + 1 if walking and before.observation.pos == after.observation.pos else 0
            longest = max(longest, vain)
    assert BLOCKED_FRAMES <= longest < 80


# ------------------------------------------------------------ ground and obstacles


class Terrain(Body):
    """A body on ground of integer heights that the player observes. A jump climbs one metre; it can fall."""

    def __init__(self, ground: Callable[[int, int], int], water: Callable[[int, int], bool] = nowhere):
        super().__init__(water=lambda x, z: water(round(x), round(z)))
        self.ground, self.lake, self.y = ground, water, ground(0, 0)

    @property
    def observation(self) -> Observation:
        origin = round(self.x) - REACH, self.y - REACH, round(self.z) - REACH
        nodes = np.full(BOX, FREE, np.uint8)
        for i, j, k in np.ndindex(*BOX):
            x, y, z = origin[0] + i, origin[1] + j, origin[2] + k
            if y < self.ground(x, z):
                nodes[i, j, k] = LIQUID if self.lake(x, z) else SOLID
        wet = self.water(self.x, self.z)
        return Observation(
            self.yaw, self.pitch, (self.x, float(self.y), self.z), wet, nodes=nodes, origin=origin
        )

    def follow(self, command: Command) -> None:
        x, z = self.x, self.z
        super().follow(command)
        rise = self.ground(round(self.x), round(self.z)) - self.y
        if rise > ("jump" in command.keys):
            self.x, self.z = x, z
        else:
            self.y += rise


def play_only(name: str, seed: int, body: Body, frames: int) -> list[Moment]:
    """Lets a player perform one behaviour, once."""

    class Only(Player):
        def _sample_behaviour(self) -> str:
            return name

    player, moments, first = Only(seed), [], None
    for _ in range(frames):
        observation = body.observation
        command = player(observation)
        first = first or player.commands
        if player.commands is not first:
            break
        moments.append(Moment(observation, command, player.behaviour, 0))
        body.follow(command)
    return moments


@pytest.mark.parametrize("name, height", [("climb", 1), ("drop", -1), ("drop", -2)])
def test_climb_and_drop_reach_ground_of_another_height(name, height):
    """Higher or lower ground is two metres away in one direction; the player turns and walks there."""
    for seed in range(12):
        body = Terrain(lambda x, z: height if x > 1 else 0)
        body.yaw = body.mouse.yaw = 30.0 * seed
        play_only(name, seed, body, 80)
        assert body.y == height, seed


@pytest.mark.parametrize(
    "name, height, water", [("climb", 2, nowhere), ("drop", -9, nowhere), ("drop", 0, lambda x, z: x > 1)]
)
def test_climb_and_drop_avoid_walls_deep_falls_and_water(name, height, water):
    """With no suitable step the direction is random: as often east, where the terrain differs, as west."""
    east = 0
    for seed in range(40):
        body = Terrain(lambda x, z: height if x > 1 else 0, water)
        body.yaw = body.mouse.yaw = 9.0 * seed
        east += play_only(name, seed, body, 12)[-1].observation.yaw % 360 > 180
    assert 8 < east < 32


def test_straight_walks_jump_only_at_steps_of_one_block():
    moments = play_only("straight", 3, Terrain(lambda x, z: int(abs(z) >= 4)), 60)
    jumps = [m.observation.pos[2] for m in moments if "jump" in m.command.keys]
    assert jumps and all(2 < abs(z) < 4 for z in jumps)
    assert all("forward" in m.command.keys for m in moments)


def test_approach_walks_to_an_obstacle_and_then_along_it_or_back():
    """An obstacle is right of the centre; the player turns there, reaches a wall, and leaves it."""

    class Seeing(Body):
        @property
        def observation(self) -> Observation:
            inverse = np.full((36, 64), 1 / 50, np.float32)
            inverse[:, 44:54] = 1 / 5  # something to the right of the view's middle
            return Observation(self.yaw, self.pitch, (self.x, 0.0, self.z), inverse_ray_distance=inverse)

    after = Counter()
    for seed in range(30):
        body = Seeing(free=lambda x, z: math.hypot(x, z) < 5)
        moments = play_only("approach", seed, body, 200)
        turned = [m.observation.yaw for m in moments if m.command.keys][0]
        assert 20 < turned < 45, seed
        reached = max(math.hypot(m.observation.pos[0], m.observation.pos[2]) for m in moments)
        assert reached > 4.5
        vain = [a.observation.pos == b.observation.pos and bool(a.command.keys) for a, b in pairwise(moments)]
        assert 2 <= sum(vain[: 3 + vain.index(True) + 7])
        after.update({key for m in moments for key in m.command.keys})
    assert set(after) == HORIZONTAL


# ------------------------------------------------------------ water


def lake(x: float, z: float) -> bool:
    return z > 2


def test_a_player_in_water_heads_for_the_shore():
    """Wherever the player enters the water, it returns to land within the time of a turn and a swim."""
    swims = 0
    for seed in range(20):
        moments = play(seed, FRAMES, Body(water=lake))
        stretch = 0
        for moment in moments:
            stretch = stretch + 1 if moment.observation.wet else 0
            assert stretch < 125, seed
            swims += stretch == WET_FRAMES
        assert max(moment.observation.pos[2] for moment in moments) < 13
    assert swims > 5


def test_a_swimmer_presses_forward_and_jump_and_turns_to_the_shore():
    body, player = Body(water=lake), Player(3)
    for _ in range(40):
        player(Observation(0.0, 0.0, (0.0, 0.0, 0.0)))  # ashore at 0, 0
    body.z = 10.0
    taken, yaws = [], []
    for _ in range(70):
        taken.append(player(body.observation))
        body.follow(taken[-1])
        yaws.append(abs(wrap(body.yaw)))
    swim = taken[WET_FRAMES : WET_FRAMES + 30]
    assert all({"forward", "jump"} <= command.keys for command in swim)
    assert max(yaws) > 175  # it began with its face to the lake


def test_after_swimming_all_behaviours_continue():
    """Back on dry land, all behaviours occur and the player does not try to leave water."""
    body, player = Body(water=lambda x, z: z > 0), Player(5)
    body.z = 3.0
    for _ in range(400):
        body.follow(player(body.observation))
    body.water = nowhere
    counts = Counter()
    for k in range(2500):
        body.follow(player(body.observation))
        if k > 150:
            assert not player.leaving_water
            counts[player.behaviour] += 1
    assert set(counts) == set(EVEN.shares)


def test_a_player_blocked_by_a_high_bank_looks_for_another():
    """Blocked by the bank, the player swims elsewhere and then tries to get ashore again."""

    def free(x: float, z: float) -> bool:
        return z > 2 or abs(x) > 4  # where it was ashore last there is a bank; to its sides there is a beach

    ashore = 0
    for seed in range(10):
        body, player = Body(free=free, water=lake), Player(seed)
        for _ in range(40):
            player(Observation(0.0, 0.0, (0.0, 0.0, 0.0)))
        body.z = 6.0
        begun, was = 0, False
        for _ in range(1500):
            body.follow(player(body.observation))
            begun += player.leaving_water and not was
            was = player.leaving_water
            if not lake(body.x, body.z):
                break
        assert begun >= 2
        ashore += not lake(body.x, body.z)
    assert ashore >= 5
