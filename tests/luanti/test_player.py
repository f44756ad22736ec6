"""The scripted player, in the body of a walker on flat ground: fair to both sides, balanced, never stuck."""

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
    Player,
    Observation,
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
    """A body that does what it is told: turned by whole mouse pixels, held up by walls, slow in water."""

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
    """One frame of play: what the player saw, did, and what kind of behaviour that was."""

    observation: Observation
    command: Command
    kind: str
    behaviour: int  # number of the behaviour in this play


def play(
    seed: int | str, frames: int = FRAMES, body: Body | None = None, style: str = "even"
) -> list[Moment]:
    """What a player does with a body, by default on open ground."""
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
    """Twenty minutes and more on open ground, one play a seed."""
    return [play(seed) for seed in SEEDS]


def behaviours(plays: list[list[Moment]], kind: str) -> list[list[Moment]]:
    """The whole behaviours of a kind, each with the moment after its end."""
    found = []
    for moments in plays:
        starts = [0, *(k for k in range(1, FRAMES) if moments[k].behaviour != moments[k - 1].behaviour)]
        for start, end in zip(starts, starts[1:], strict=False):
            if moments[start].kind == kind:
                found.append(moments[start : end + 1])
    return found


def commands(moments: list[Moment]) -> list[Command]:
    return [moment.command for moment in moments]


# ------------------------------------------------------------ seeds


def test_same_seed_same_commands_and_other_seed_others():
    assert commands(play("7 clip 3")) == commands(play("7 clip 3"))
    assert commands(play("7 clip 3")) != commands(play("7 clip 4"))


# ------------------------------------------------------------ balance on open ground


def z_score(signed: list[float]) -> float:
    """How many standard errors the sum of independent signed amounts lies from zero."""
    amounts = np.array(signed)
    return abs(amounts.sum()) / math.sqrt((amounts**2).sum())


def test_left_and_right_are_equally_frequent(plays):
    """Each behaviour goes to one side or the other by a fair coin: the sums over behaviours are unbiased."""
    turned, strafed = [], []
    for moments in plays:
        sums = Counter(), Counter()
        for moment in moments:
            sums[0][moment.behaviour] += moment.command.yaw
            sums[1][moment.behaviour] += ("right" in moment.command.keys) - ("left" in moment.command.keys)
        turned += sums[0].values()
        strafed += sums[1].values()
    assert len(turned) > 500
    assert z_score(turned) < 3
    assert z_score(strafed) < 3
    frames = Counter(side for p in plays for m in p for side in m.command.keys & {"left", "right"})
    assert min(frames.values()) > 0.7 * max(frames.values())  # some 250 strafes of 17 frames: 0.8 is 2 sigma


def test_the_wanted_shares_are_reached(plays):
    kinds = Counter(moment.kind for moments in plays for moment in moments)
    assert set(kinds) == set(EVEN.shares)
    for kind, share in EVEN.shares.items():
        assert kinds[kind] / (len(SEEDS) * FRAMES) == pytest.approx(share, abs=0.04), (
            kind
        )  # long ones are few


def test_each_style_names_every_kind_and_its_shares_and_chances_add_up():
    for style in STYLES.values():
        assert sum(style.shares.values()) == pytest.approx(1), style.name
        assert set(style.shares) == set(EVEN.shares)
    assert sum(style.chance for style in STYLES.values()) == pytest.approx(1)


def test_a_seed_chooses_a_style_and_each_as_often_as_it_should():
    assert style_of("7 clip 3") is style_of("7 clip 3")
    names = Counter(style_of(f"1 clip {k}").name for k in range(2000))
    for style in STYLES.values():
        assert names[style.name] / 2000 == pytest.approx(style.chance, abs=0.04), style.name


def test_styles_differ_in_how_fast_they_turn_and_how_long_they_hold():
    turns, holds, straight = {}, {}, {}
    for style in STYLES:
        moments = [m for seed in range(6) for m in play(seed, FRAMES, style=style)]
        speeds = [abs(m.command.yaw) for m in moments if m.kind in ("turn", "walk+turn") and m.command.yaw]
        turns[style] = np.median(speeds)
        lengths = Counter(m.behaviour for m in moments if m.kind == "strafe")
        holds[style] = np.median(list(lengths.values()))
        straight[style] = np.mean([m.kind == "straight" for m in moments])
    assert turns["calm"] < 0.8 * turns["even"] < turns["brisk"]
    assert holds["brisk"] < holds["even"] < holds["calm"]
    assert straight["walker"] > 0.2


def test_turns_of_every_speed_occur_and_none_is_too_fast(plays):
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


def test_pitch_is_bounded_even_where_the_game_starts_beyond(plays):
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


def test_no_frame_holds_opposite_keys_or_sneaks(plays):
    for moments in plays:
        for command in commands(moments):
            assert not {"forward", "back"} <= command.keys and not {"left", "right"} <= command.keys
            assert command.keys <= HORIZONTAL | {"jump"}


@pytest.mark.parametrize("kind", ["turn", "look", "still", "look away"])
def test_pure_camera_kinds_hold_no_key(plays, kind):
    assert not any(moment.command.keys for p in plays for moment in p if moment.kind == kind)


@pytest.mark.parametrize("kind", ["walk", "strafe"])
def test_pure_walking_kinds_do_not_turn(plays, kind):
    found = [m.command for p in plays for m in p if m.kind == kind]
    assert found and not any(command.yaw or command.pitch for command in found)
    assert all(command.keys for command in found)


# ------------------------------------------------------------ there and back


def test_look_away_comes_back_to_the_view_it_left(plays):
    found = behaviours(plays, "look away")
    assert len(found) > 20
    farthest = []
    for moments in found:
        yaws = [moment.observation.yaw for moment in moments]
        assert yaws[-1] == pytest.approx(yaws[0], abs=1.5 * DEGREES_PER_PIXEL)
        assert {moment.observation.pos for moment in moments} == {moments[0].observation.pos}
        farthest.append(max(abs(yaw - yaws[0]) for yaw in yaws))
    assert min(farthest) > 20 and max(farthest) > 150


def test_walk_away_comes_back_to_the_place_and_view_it_left(plays):
    found = behaviours(plays, "walk away")
    assert len(found) > 20
    turned_round = 0
    for moments in found:
        places = [(moment.observation.pos[0], moment.observation.pos[2]) for moment in moments]
        farthest = max(math.dist(places[0], place) for place in places)
        assert farthest > 10 * STEP
        assert math.dist(places[0], places[-1]) < 2 * STEP
        turn = wrap(moments[-1].observation.yaw - moments[0].observation.yaw)
        assert abs(turn) < 1.5 * DEGREES_PER_PIXEL
        turned_round += max(abs(m.observation.yaw - moments[0].observation.yaw) for m in moments) > 170
    assert 0 < turned_round < len(found)


# ------------------------------------------------------------ walls


class Straight(Player):
    """A player that wants nothing but to walk straight on."""

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


def test_a_jump_that_helps_ends_the_escape():
    """A step that only a jumping player gets up: it jumps, walks on, and needs no turn away."""
    taken, player, z = [], Straight(1), 0.0
    for _ in range(60):
        taken.append(player(Observation(0.0, 0.0, (0.0, 0.0, z))))
        if not 2 <= z < 3 or "jump" in taken[-1].keys:
            z += STEP
    assert z > 6
    assert any("jump" in command.keys for command in taken)
    assert not any(command.yaw for command in taken)


def test_walking_to_and_fro_is_not_taken_for_a_wall():
    """Turning back on the spot brings a player to where it was without anything in its way."""

    class ToAndFro(Straight):
        def _walk(self):
            yield from self._press({"forward"}, 7)
            yield from self._press({"back"}, 7)

    body, player = Body(), ToAndFro(1)
    for _ in range(100):
        command = player(body.observation)
        assert "jump" not in command.keys and not command.yaw
        body.follow(command)


def test_a_player_in_a_pen_touches_its_walls_and_never_stands_at_them_for_good():
    """In a pen of 6 m: it walks into walls, and within some seconds it is away from each of them."""
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


# ------------------------------------------------------------ the ground and what stands on it


class Terrain(Body):
    """A body on ground of whole metres that the player is told of. Jumps get it one higher, and it falls."""

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
        return Observation(self.yaw, self.pitch, (self.x, float(self.y), self.z), wet, nodes=nodes, origin=origin)

    def follow(self, command: Command) -> None:
        x, z = self.x, self.z
        super().follow(command)
        rise = self.ground(round(self.x), round(self.z)) - self.y
        if rise > ("jump" in command.keys):
            self.x, self.z = x, z
        else:
            self.y += rise


def kind_play(kind: str, seed: int, body: Body, frames: int) -> list[Moment]:
    """The first behaviour of one kind."""

    class Only(Player):
        def _sample_behaviour(self) -> str:
            return kind

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


@pytest.mark.parametrize("kind, height", [("climb", 1), ("drop", -1), ("drop", -2)])
def test_a_player_goes_to_where_the_ground_is_another(kind, height):
    """A plateau or a hollow two metres away, in one direction: it turns there, and gets up or down."""
    for seed in range(12):
        body = Terrain(lambda x, z: height if x > 1 else 0)
        body.yaw = body.mouse.yaw = 30.0 * seed
        kind_play(kind, seed, body, 80)
        assert body.y == height, seed


@pytest.mark.parametrize(
    "kind, height, water", [("climb", 2, nowhere), ("drop", -9, nowhere), ("drop", 0, lambda x, z: x > 1)]
)
def test_a_player_seeks_no_wall_no_deep_fall_and_no_water(kind, height, water):
    """Where there is nothing else it goes anywhere: as often to the east, where that lies, as to the west."""
    east = 0
    for seed in range(40):
        body = Terrain(lambda x, z: height if x > 1 else 0, water)
        body.yaw = body.mouse.yaw = 9.0 * seed
        east += kind_play(kind, seed, body, 12)[-1].observation.yaw % 360 > 180
    assert 8 < east < 32


def test_a_long_walk_jumps_over_what_is_one_high_and_nowhere_else():
    moments = kind_play("straight", 3, Terrain(lambda x, z: int(abs(z) >= 4)), 60)
    jumps = [m.observation.pos[2] for m in moments if "jump" in m.command.keys]
    assert jumps and all(2 < abs(z) < 4 for z in jumps)
    assert all("forward" in m.command.keys for m in moments)


def test_a_player_that_approaches_walks_up_to_what_stands_in_its_way_and_then_along_or_back():
    """A wall to the west, a gap in it nowhere: the player's eyes find it, its body meets it, then leaves."""

    class Seeing(Body):
        @property
        def observation(self) -> Observation:
            inverse = np.full((36, 64), 1 / 50, np.float32)
            inverse[:, 44:54] = 1 / 5  # something to the right of the view's middle
            return Observation(self.yaw, self.pitch, (self.x, 0.0, self.z), inverse_ray_distance=inverse)

    after = Counter()
    for seed in range(30):
        body = Seeing(free=lambda x, z: math.hypot(x, z) < 5)
        moments = kind_play("approach", seed, body, 200)
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
    """From wherever it enters, it swims towards land within the frames that a turn and a swim take."""
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


def test_a_swimmer_paddles_with_forward_and_jump_and_turns_to_the_land():
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


def test_once_ashore_it_plays_on_as_on_land():
    """On dry land again, the player gets out of no water: all kinds come back, and no swim begins."""
    body, player = Body(water=lambda x, z: z > 0), Player(5)
    body.z = 3.0
    for _ in range(400):
        body.follow(player(body.observation))
    body.water = nowhere
    kinds = Counter()
    for k in range(2500):
        body.follow(player(body.observation))
        if k > 150:
            assert not player.leaving_water
            kinds[player.behaviour] += 1
    assert set(kinds) == set(EVEN.shares)


def test_a_bank_too_high_to_climb_does_not_end_the_search_for_another():
    """Held up by the bank while swimming to it, the player goes elsewhere, then tries to get ashore again."""

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
