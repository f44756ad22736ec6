"""Recording: parts that need no game, then recordings with the game, which are also interrupted and killed.

The second part needs Luanti, Xvfb and a C compiler, and is skipped where they are missing. It finds the
processes of its recordings by a variable in their environment.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from Xlib.protocol import event

import record
from dataset import actions
from dataset.actions import DEGREES_PER_UNIT
from dataset.clip_check import check_clips
from dataset.clip_report import report_text
from dataset.recordings import (
    clip_paths,
    depth_path,
    find_clips,
    gamefactory_actions,
    gamefactory_track,
    read_depth_file,
    world_key,
)
from dataset.surroundings import (
    BOX,
    FREE,
    LIQUID,
    LOW,
    REACH,
    SOLID,
    decode_inverse_ray_distance,
    encode_inverse_ray_distance,
)
from luanti import game
from luanti.game import (
    BITS,
    DEGREES_PER_PIXEL,
    EYE_HEIGHT,
    FPS,
    INSTALL,
    KEYSYMS,
    STRIP,
    Controls,
    Frame,
    GameError,
    Picture,
    VirtualDisplay,
    build_shim,
    find_game,
    minecraft,
    read_barcode,
    read_nodes,
)
from luanti.player import MAX_TURN, Observation, style_of
from luanti.recorder import (
    ADRIFT_FRAMES,
    BIOMES,
    DARK,
    DARK_FRAMES,
    STUCK_FRAMES,
    TIMES,
    WEATHERS,
    CutDetector,
    HoldingForward,
    Mouse,
    action_entries,
    plan_clips,
    stack_surroundings,
    start_place,
)
from runtime.config import SettingError
from runtime.video import count_frames, read_frames, video_fps

ROOT = Path(__file__).resolve().parents[1]
MARK = "OCHRE_TEST_RECORDING"  # variable in the environment of all processes that a test starts


# ------------------------------------------------------------ plans


def plan(clips: int, seed: int = 1, clips_per_world: int = 4, biomes=BIOMES, times=("noon",)):
    return plan_clips(seed, clips, clips_per_world, list(biomes), list(times), list(WEATHERS))


def test_plans_depend_on_the_seed_alone_and_more_clips_extend_them():
    assert plan(30) == plan(30)
    assert plan(30)[:12] == plan(12)
    assert plan(30, seed=2) != plan(30)


def test_clips_share_worlds_and_nothing_else():
    plans = plan(12, clips_per_world=4)
    worlds = [p.world_seed for p in plans]
    assert worlds == [worlds[0]] * 4 + [worlds[4]] * 4 + [worlds[8]] * 4
    assert len(set(worlds)) == 3
    assert len({p.seed for p in plans}) == len({p.name for p in plans}) == 12
    assert {p.world_seed for p in plan(12)}.isdisjoint(p.world_seed for p in plan(12, seed=2))
    assert {p.name for p in plan(12)}.isdisjoint(p.name for p in plan(12, seed=2))


def test_all_biomes_times_and_weathers_occur():
    plans = plan(3 * len(BIOMES), times=TIMES)
    for start in range(0, len(plans), len(BIOMES)):
        assert {p.biome for p in plans[start : start + len(BIOMES)]} == set(BIOMES)
    assert [p.biome for p in plans[: len(BIOMES)]] != list(BIOMES)
    assert {p.time for p in plans} == set(TIMES) and {p.weather for p in plans} == set(WEATHERS)
    assert {p.biome for p in plan(20, biomes=["taiga", "desert"])} == {"taiga", "desert"}


def test_each_attempt_at_a_clip_has_its_own_start_place():
    places = [start_place(p, attempt) for p in plan(5) for attempt in range(6)]
    assert len({name for name, _, _ in places}) == len({seed for _, seed, _ in places}) == 30
    assert all(0 <= seed < 2**31 for _, seed, _ in places)
    assert places == [start_place(p, attempt) for p in plan(5) for attempt in range(6)]


def test_clips_are_grouped_by_world():
    plans = plan(10, clips_per_world=4)
    groups = record.by_world(plans)
    assert [len(group) for group in groups] == [4, 4, 2]
    assert all(len({p.world_seed for p in group}) == 1 for group in groups)
    assert sum(groups, []) == plans


# ------------------------------------------------------------ frames and entries


def frame(**changes) -> Frame:
    """A frame on open ground at noon."""
    usual = Frame(
        None, 1 / FPS, 0.0, 0.0, (0.0, 0.0, 0.0), (0.0, EYE_HEIGHT, 0.0), frozenset(), "air", "air", 15
    )
    return replace(usual, **changes)


def walk_of(keys: list[set[str]], turn: float = 0.0) -> list[Frame]:
    """A frame for each set of keys, 0.25 m apart; each reports the eye of the previous frame."""
    return [
        frame(
            yaw=turn * k,
            pitch=-turn * k / 2,
            pos=(9.0, 9.0, 0.25 * k),  # of the feet, not used
            eye_before=(1.0, 20.0 + EYE_HEIGHT, 0.25 * (k - 1)),
            keys=frozenset(pressed),
        )
        for k, pressed in enumerate(keys)
    ]


def test_entry_k_has_the_action_that_led_to_frame_k():
    frames = walk_of([set(), {"forward"}, {"back", "left"}, {"right", "jump"}, set(), set()], turn=6.0)
    found = action_entries(frames, 5)
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert [(e["ws"], e["ad"], e["scs"]) for e in found.values()] == [
        (0, 0, 0), (1, 0, 0), (2, 1, 0), (0, 2, 1), (0, 0, 0),
    ]  # fmt: skip
    assert [e["yaw_delta"] for e in found.values()] == pytest.approx([0, 0.4, 0.4, 0.4, 0.4])
    assert [e["pitch_delta"] for e in found.values()] == pytest.approx([0, -0.2, -0.2, -0.2, -0.2])
    assert [e["yaw"] for e in found.values()] == pytest.approx([0, 6, 12, 18, 24])
    assert [e["pitch"] for e in found.values()] == pytest.approx([0, -3, -6, -9, -12])


def test_positions_are_those_of_the_eye_reported_with_the_next_frame():
    frames = walk_of([set()] * 4)
    for k, entry in action_entries(frames, 3).items():
        assert entry["pos"] == pytest.approx([1.0, 20.0, 0.25 * int(k)])
    broken_off = action_entries(frames[:3], 3)["2"]
    assert broken_off["pos"] == pytest.approx([9.0, 9.0, 0.5])  # no next frame: position of the feet


def test_entries_are_read_back_as_the_same_actions():
    keys = [set(), {"forward"}, {"forward", "right"}, {"left", "jump"}, {"back"}, set()]
    found = action_entries(walk_of(keys, turn=-7.5), 5)
    read = gamefactory_actions(json.loads(json.dumps(found)), Path("clip.json"))
    expected = [[-0.5, 0.25, *actions.from_keys(pressed)] for pressed in keys[1:5]]
    np.testing.assert_allclose(read, expected, atol=1e-5)
    _, pose = gamefactory_track(found, Path("clip.json"))
    assert np.isfinite(pose).all()  # including frame 0


def test_sneaking_has_its_own_code_unless_the_player_jumps():
    found = action_entries(walk_of([set(), {"sneak"}, {"sneak", "jump"}, {"sneak", "forward"}, set()]), 4)
    assert [e["scs"] for e in found.values()] == [0, 2, 1, 2]


def test_angles_are_wrapped():
    assert [actions.wrap(a) for a in (0, 190, -190, 360, 725, -540)] == [0, -170, 170, 0, 5, -180]


def test_minecraft_axes_have_x_mirrored():
    assert minecraft([1.0, 2.0, 3.0]) == (-1.0, 2.0, 3.0)


# ------------------------------------------------------------ surroundings


def test_logged_nodes_are_converted_to_minecraft_axes():
    """The mod lists x descending, then y and z ascending; one node, two metres along the game's +x, is
    solid.
    """
    digits = [
        "3" if (x, y, z) == (12, 5, -3) else "1"
        for x in range(10 + REACH, 9 - REACH, -1)
        for y in range(5 - REACH, 6 + REACH)
        for z in range(-4 - REACH, -3 + REACH)
    ]
    nodes, origin = read_nodes("".join(digits), [10.0, 5.0, -4.0])
    assert nodes.shape == BOX and set(nodes.ravel().tolist()) == {FREE, SOLID}
    solid = np.array(origin) + np.argwhere(nodes == SOLID)[0]
    assert tuple(solid) == minecraft([12, 5, -3])
    assert tuple(np.array(origin) + REACH) == minecraft([10, 5, -4])


def test_surroundings_are_stacked_and_frames_without_nodes_refused():
    codes = encode_inverse_ray_distance(np.full((2, 3), 0.5))
    frames = [
        frame(inverse_ray_distance=codes + k, nodes=np.full(BOX, FREE, np.uint8), origin=(k, 2, 3))
        for k in (0, 1)
    ]
    found = stack_surroundings(frames)
    assert found.log_inverse.shape == (2, 2, 3) and (found.log_inverse[1] == codes + 1).all()
    assert found.nodes.shape == (2, *BOX) and found.origin.tolist() == [[0, 2, 3], [1, 2, 3]]
    with pytest.raises(GameError, match="nodes"):
        stack_surroundings([frames[0], frame(inverse_ray_distance=codes)])


def test_block_size_scales_with_the_window():
    assert Picture().block == 4 and Picture(128, 72, scale=2).block == 8


# ------------------------------------------------------------ where a clip is cut


def cut_of(frames: Iterator[Frame]) -> tuple[str, int]:
    """The reason why a clip ends and its frame; ("", number of frames) if it does not end."""
    watch, count = CutDetector(), 0
    for seen in frames:
        if why := watch(seen):
            return why, count
        count += 1
    return "", count


def test_normal_play_is_not_cut():
    walking = (frame(pos=(0.0, 0.0, 0.25 * k), keys=frozenset({"forward"})) for k in range(1200))
    assert cut_of(walking) == ("", 1200)
    standing = (frame(yaw=float(k)) for k in range(1200))
    assert cut_of(standing) == ("", 1200)
    swims = (frame(feet_node="default:water_source" if k % 300 < 90 else "air") for k in range(1200))
    assert cut_of(swims) == ("", 1200)


@pytest.mark.parametrize(
    "node, why",
    [
        ("default:water_source", "drowned"),
        ("default:river_water_flowing", "drowned"),
        ("default:lava_source", "drowned"),
        ("ignore", "unloaded"),
        ("", "unloaded"),
    ],
)
def test_a_clip_ends_where_the_eye_is_not_in_air(node, why):
    frames = [frame()] * 5 + [frame(eye_node=node)]
    assert cut_of(frames) == (why, 5)


def test_a_clip_ends_after_several_dark_frames():
    dark = [frame(daylight=DARK - 1)]
    assert cut_of(dark * 200) == ("dark", DARK_FRAMES - 1)
    assert cut_of((dark * (DARK_FRAMES - 1) + [frame()]) * 5)[0] == ""


def test_a_clip_ends_where_the_player_is_stuck():
    rng = np.random.default_rng(0)
    at_wall = [frame(pos=(*rng.uniform(0, 0.4, 3),), keys=frozenset({"forward"})) for _ in range(300)]
    why, count = cut_of(at_wall)
    assert why == "stuck" and count <= STUCK_FRAMES


def test_a_clip_ends_where_the_player_keeps_swimming():
    swimming = [frame(pos=(0.0, 0.0, k / 5), feet_node="default:water_source") for k in range(400)]
    why, count = cut_of(swimming)
    assert why == "adrift" and count <= ADRIFT_FRAMES


# ------------------------------------------------------------ mouse and camera


def test_rounding_to_mouse_pixels_does_not_accumulate():
    mouse, yaw, pitch, wanted = Mouse(10.0, 0.0), 10.0, 0.0, 10.0
    rng = np.random.default_rng(0)
    for turn in rng.uniform(-14, 14, 500):
        wanted += turn
        right, down = mouse.pixels(frame(yaw=yaw, pitch=pitch), turn, -0.03)
        yaw, pitch = yaw + right * DEGREES_PER_PIXEL, pitch + down * DEGREES_PER_PIXEL
        assert abs(yaw - wanted) <= DEGREES_PER_PIXEL / 2 + 1e-9
    assert pitch == pytest.approx(-15.0, abs=DEGREES_PER_PIXEL)  # 500 steps, each far below a pixel


def test_the_mouse_turns_at_most_by_an_action_of_1():
    mouse = Mouse(0.0, 0.0)
    for turn in (40.0, -90.0, 15.0):
        right, down = mouse.pixels(frame(), turn, turn)
        assert max(abs(right), abs(down)) * DEGREES_PER_PIXEL <= MAX_TURN
    assert abs(Mouse(0.0, 0.0).pixels(frame(), 15.0, 0.0)[0] * DEGREES_PER_PIXEL - 15) < DEGREES_PER_PIXEL


def barcode(number: int, height: int = 176, width: int = 256) -> np.ndarray:
    """A window's picture with the number in both strips."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    for bit in range(BITS):
        columns = slice(bit * STRIP, (bit + 1) * STRIP)
        white = number >> bit & 1
        pixels[:STRIP, columns] = 255 * white
        pixels[-STRIP:, columns] = 255 * (1 - white)
    return pixels


@pytest.mark.parametrize("number", [0, 1, 2, 1199, 2**BITS - 1])
def test_barcode_round_trip(number):
    assert read_barcode(barcode(number)) == number
    assert read_barcode(barcode(number, height=608, width=1024)) == number


def test_an_inconsistent_barcode_is_not_read():
    """Strips of two frames, a dark screen, or something drawn over a strip."""
    torn = barcode(5)
    torn[-STRIP:] = barcode(6)[-STRIP:]
    assert read_barcode(torn) is None
    assert read_barcode(np.zeros_like(torn)) is None
    covered = barcode(5)
    covered[:STRIP, :64] = 255
    assert read_barcode(covered) is None


def test_the_window_has_room_for_both_strips():
    assert Picture().window == (256, 144 + 2 * STRIP)
    assert Picture(128, 72, scale=2).window == (256, 144 + 2 * STRIP)


def test_the_recorded_rows_have_the_wanted_field_of_view():
    assert Picture(256, 144, 70.0).fov_setting == pytest.approx(77.34, abs=0.005)
    wide = Picture(320, 144, 70.0)  # wider than 16:10, where the game takes the angle as it is
    whole = math.tan(math.radians(wide.fov_setting / 2))
    assert whole * 144 / (144 + 2 * STRIP) == pytest.approx(math.tan(math.radians(35)))
    assert Picture(320, 144, 90.0).fov_setting > wide.fov_setting


# ------------------------------------------------------------ the command line


def config_of(*words: object) -> record.RecordConfig:
    return record.parse(list(map(str, words)))


def usage_error(capsys, *words: object) -> str:
    """The message on stderr for a command line that is not valid."""
    with pytest.raises(SystemExit) as ended:
        config_of(*words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def run_error(capsys, *words: object) -> str:
    """The message on stderr of a run that is refused."""
    assert record.main(list(map(str, words))) == 2
    return capsys.readouterr().err


def settings_error(*words: object) -> str:
    """The message for a folder with other settings."""
    with pytest.raises(SettingError) as refused:
        record.check_same_settings(config_of(*words))
    return str(refused.value)


def test_sizes_must_be_multiples_of_the_block(capsys):
    assert record.size("256x144") == (256, 144)
    assert "multiples of 4" in usage_error(capsys, "--out", "x", "--size", "254x144")
    assert "multiples of 4" in usage_error(capsys, "--out", "x", "--size", "256x143")
    for text in ("256", "0x144", "256x", "-2x4", "axb", "256x144x3"):
        assert "WIDTHxHEIGHT" in usage_error(capsys, "--out", "x", "--size=" + text)


def test_unknown_names_in_lists_are_refused(capsys):
    config = config_of("--out", "x", "--biomes", "taiga,desert", "--time", "any", "--weather", "rain")
    assert config.biomes == ["taiga", "desert"] and config.weathers == ["rain"]
    assert config.times == list(TIMES)
    assert config_of("--out", "x").biomes == list(BIOMES)
    assert "taiga" in usage_error(capsys, "--out", "x", "--biomes", "taigga")
    assert "noon" in usage_error(capsys, "--out", "x", "--time", "noon,tea")
    assert "clear" in usage_error(capsys, "--out", "x", "--weather", "")


def test_out_and_check_exclude_each_other_and_one_is_needed(capsys):
    assert "not allowed with" in usage_error(capsys, "--out", "x", "--check", "y")
    assert "required" in usage_error(capsys)


def test_counts_must_be_positive(capsys):
    for flag in ("--clips", "--frames", "--clips_per_world", "--jobs"):
        assert flag in usage_error(capsys, "--out", "x", flag, "0")
    assert "--vertical_fov" in usage_error(capsys, "--out", "x", "--vertical_fov", "0")


def test_the_window_is_large_enough_for_barcode_and_person():
    assert config_of("--out", "x").picture == Picture(256, 144, 70.0, scale=1)
    assert config_of("--out", "x", "--size", "128x72").picture.scale == 2
    for size in ("64x36", "128x72", "224x100", "256x144", "1920x1080"):
        assert config_of("--out", "x", "--size", size).picture.window[0] >= BITS * STRIP
        human = config_of("--out", "x", "--size", size, "--human").picture
        assert human.window[0] >= record.HUMAN_WIDTH


def test_checking_a_folder_without_clips_is_refused(capsys, tmp_path):
    assert str(tmp_path) in run_error(capsys, "--check", tmp_path)
    missing = tmp_path / "missing"
    assert str(missing) in run_error(capsys, "--check", missing)
    assert not missing.exists()


def test_a_folder_with_other_settings_is_refused(tmp_path):
    record.check_same_settings(config_of("--out", tmp_path, "--seed", 3))
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "clip_03_00000.json").write_text("{}")
    same = config_of("--out", tmp_path, "--seed", 3, "--clips", 500, "--jobs", 1)  # these two may differ
    record.check_same_settings(same)
    for flag, value in (
        ("--seed", "4"), ("--frames", "64"), ("--clips_per_world", "2"), ("--size", "128x72"),
        ("--vertical_fov", "60"), ("--biomes", "taiga"), ("--time", "any"), ("--weather", "rain"),
    ):  # fmt: skip
        message = settings_error("--out", tmp_path, "--seed", 3, flag, value)
        assert flag in message and str(tmp_path) in message
    for player in ("human", "forward"):
        assert player in settings_error("--out", tmp_path, "--seed", 3, f"--{player}")
    path = tmp_path / ".recording.json"  # of a version without --forward
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "forward"}))
    record.check_same_settings(same)


def test_a_folder_of_clips_without_depth_is_refused(tmp_path):
    record.check_same_settings(config_of("--out", tmp_path))
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "clip_01_00000.json").write_text("{}")
    path = tmp_path / ".recording.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "depth"}))
    message = settings_error("--out", tmp_path)
    assert str(path) in message and "without depth" in message


def test_a_folder_without_clips_accepts_other_settings(tmp_path):
    record.check_same_settings(config_of("--out", tmp_path, "--frames", 64))
    record.check_same_settings(config_of("--out", tmp_path, "--frames", 128))
    assert json.loads((tmp_path / ".recording.json").read_text())["frames"] == 128


def test_a_second_recorder_in_a_folder_is_refused(capsys, tmp_path):
    lock = tmp_path / ".lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another record.py" in run_error(capsys, "--out", tmp_path)
        assert lock.is_file()  # the other recorder's
    assert not (tmp_path / ".recording.json").exists()


def test_human_play_without_a_display_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    assert "DISPLAY" in run_error(capsys, "--out", tmp_path / "mine", "--human")
    assert not (tmp_path / "mine").exists()


# ------------------------------------------------------------ what must be installed


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path) -> Path:
    """A PATH with only an empty folder."""
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.delenv("CC", raising=False)
    return empty


def test_a_missing_compiler_is_refused_with_its_package(nothing_installed, tmp_path):
    with pytest.raises(GameError, match="compiler.*apt-get install.*gcc"):
        build_shim(tmp_path / "lockstep.so")


def test_a_missing_display_server_is_refused_with_its_package(nothing_installed):
    with pytest.raises(GameError, match="Xvfb.*apt-get install.*xvfb"):
        VirtualDisplay(64, 64)


def test_a_missing_game_is_refused_with_its_packages(nothing_installed, monkeypatch):
    which = shutil.which  # it may well be installed here, in /usr/games
    monkeypatch.setattr(game.shutil, "which", lambda name, path=None: which(name))
    with pytest.raises(GameError, match="apt-get install minetest.*luanti"):
        find_game()


def test_the_game_is_found_in_the_path_under_both_of_its_names(nothing_installed):
    for name in ("luanti", "minetest"):  # the older name is looked for first
        program = nothing_installed / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert find_game() == program or find_game().parent.parent in (Path("/usr"), Path("/usr/local"))
    assert find_game() == nothing_installed / "minetest"


def test_a_missing_program_gives_one_line_and_exit_status_2(nothing_installed, tmp_path):
    """Without a PATH the game may still be found in /usr/games; the compiler cannot."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "record.py"), "--out", str(tmp_path / "out"), "--clips", "1"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert INSTALL in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / ".recorder").exists()


def compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


needs_compiler = pytest.mark.skipif(compiler() is None, reason=f"no C compiler: {INSTALL}")


@needs_compiler
def test_the_shim_compiles_without_a_warning(tmp_path):
    command = [compiler(), "-Wall", "-Wextra", "-Wconversion", "-Werror", "-O2", "-shared", "-fPIC"]
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" in version:  # GCC, which alone has this
        command.append("-fanalyzer")
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "x.so"), str(ROOT / "luanti" / "lockstep.c"), "-ldl"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """Runs tests/luanti/waits.c with lockstep.c; gives its exit status, stdout and stderr."""
    folder = tmp_path_factory.mktemp("shim")
    library = build_shim(folder / "lockstep.so")
    source = ROOT / "tests" / "luanti" / "waits.c"
    command = [compiler(), "-O1", "-pthread", "-o", str(folder / "waits"), str(source)]
    subprocess.run(command, check=True)

    def shim(what: str, **variables: int | str) -> tuple[int, str, str]:
        ours, theirs = socket.socketpair()
        size = {"WIDTH": 64, "HEIGHT": 32, "SPEED": 10, "FD": theirs.fileno()}
        env = {f"LOCKSTEP_{name}": str(value) for name, value in {**size, **variables}.items()}
        done = subprocess.run(
            [folder / "waits", what], env={**env, "LD_PRELOAD": str(library)}, pass_fds=[theirs.fileno()],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        ours.close()
        theirs.close()
        return done.returncode, done.stdout, done.stderr

    return shim


@needs_compiler
@pytest.mark.parametrize("what", ["cond", "cond_monotonic", "cond_clock", "mutex", "mutex_clock", "sem"])
def test_waits_with_a_deadline_are_on_the_virtual_clock(shim, what):
    """Two virtual seconds at ten times the speed, not at once or never. In the main thread the clock then
    shows the deadline."""
    status, out, error = shim(what)
    assert status == 0, error
    for line in out.splitlines():
        thread, timed_out, real, virtual = line.split()
        assert timed_out == "1" and 0.15 < float(real) < 1.5, line
        assert thread == "other" or 2 <= float(virtual) < 2.1, line
    assert len(out.splitlines()) == 2


@needs_compiler
def test_waits_for_ever_do_not_end(shim):
    assert shim("for_ever")[:2] == (0, "signalled\n")


@needs_compiler
@pytest.mark.parametrize(
    ("name", "value"),
    [("FPS", 0), ("FPS", "x"), ("WIDTH", -1), ("HEIGHT", 10**9), ("SPEED", 0), ("BLOCK", 0), ("STRIP", 16),
     ("FD", "9" * 30), ("SHOW_EVERY", 0)],
)  # fmt: skip
def test_impossible_settings_of_the_shim_are_named(shim, name, value):
    status, out, error = shim("cond", **{name: value})
    assert (status, out) == (2, "")
    assert error.startswith(f"lockstep: LOCKSTEP_{name}={value}: expected a whole number from ")
    assert error.count("\n") == 1


def test_the_output_of_a_failing_compiler_is_shown(tmp_path, monkeypatch):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho no headers >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(GameError, match="(?s)broken-cc.*apt-get install.*no headers"):
        build_shim(tmp_path / "lockstep.so")


# ------------------------------------------------------------ the game itself


def missing() -> list[str]:
    """What the recorder needs and this machine lacks."""
    try:
        find_game()
        lacking = []
    except GameError:
        lacking = ["the game (minetest or luanti)"]
    return lacking + ["Xvfb"] * (shutil.which("Xvfb") is None) + ["C compiler"] * (compiler() is None)


needs_game = pytest.mark.skipif(
    bool(missing()), reason=f"NOT TESTED, no {', no '.join(missing())}: {INSTALL}"
)
FEW = ("--clips", "2", "--clips_per_world", "2", "--jobs", "1", "--seed", "6", "--biomes", "grassland")
# Seed 6: styles even and brisk, with enough changes of the turning speed in two clips to tell lags apart.
LENGTH = 300  # frames
FEW += ("--frames", str(LENGTH))


SCRIPT = (str(ROOT / "record.py"),)
# The same with a window that a processor draws fast enough.
SMALL_WINDOW = ("-c", "import record; record.HUMAN_WIDTH = 256; raise SystemExit(record.main())")


class Run:
    """record.py in its own process group. `log` is its output."""

    def __init__(self, out: Path, *words: str, program: tuple[str, ...] = SCRIPT, **environment: str):
        self.out, self.mark, self.began = out, f"{out}-{time.monotonic_ns()}", time.time()
        self.log_path = out.with_name(f"{out.name}-{time.monotonic_ns()}.log")
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, "--out", str(out), *words],
                stdout=log, stderr=log, start_new_session=True, cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark, **environment},
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)

    def until(self, condition: Callable[[], object], what: str, seconds: float = 240) -> object:
        """Waits for a condition; fails if the run ends or it takes too long."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            ended = self.process.poll() is not None
            assert not ended and time.monotonic() < deadline, f"waited for {what}\n{self.log}"
            time.sleep(0.02)
        return found

    def until_playing(self, clip: str) -> None:
        """Waits until some frames of that clip are written."""
        name = f".{clip}*.part.mp4"  # with random digits, see runtime/outputs.py

        def begun() -> bool:
            parts = (self.out / "video").glob(name)
            return any(part.stat().st_mtime > self.began for part in parts)

        self.until(begun, name)

    def processes(self) -> dict[int, str]:
        """This run's processes and all their descendants: pid -> program."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "exe").resolve().name
        return found

    def gone(self, seconds: float = 30) -> bool:
        """Whether all processes end within that time."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.processes()

    def close(self) -> None:
        """Kills the remaining processes."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """Starts recordings; kills them at the end of the test."""
    runs: list[Run] = []

    def begin(*words, **environment) -> Run:
        runs.append(Run(*words, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Run:
    """A finished recording of two clips."""
    run = Run(tmp_path_factory.mktemp("recorded") / "data", *FEW)
    try:
        assert run.wait() == 0, run.log
        yield run
    finally:
        run.close()


def content_of(out: Path, name: str) -> dict:
    return json.loads(clip_paths(out, name)[0].read_text())


def files_of(out: Path, name: str) -> list[Path]:
    """Metadata, video and depth of a clip."""
    metadata, video = clip_paths(out, name)
    return [metadata, video, depth_path(video)]


def assert_complete(out: Path, name: str, frames: int) -> None:
    """Asserts that a clip has a frame for each entry, and `frames` of them unless it ended early."""
    content = content_of(out, name)
    assert list(content["actions"]) == [str(k) for k in range(len(content["actions"]))]
    assert count_frames(clip_paths(out, name)[1]) == len(content["actions"])
    surroundings = read_depth_file(clip_paths(out, name)[1], len(content["actions"]))
    height, width = next(read_frames(clip_paths(out, name)[1])).shape[:2]
    assert surroundings.log_inverse.shape[1:] == (height // 4, width // 4)
    assert surroundings.nodes is not None
    if content["ended"] == "complete":
        assert len(content["actions"]) == frames
    else:
        assert len(content["actions"]) < frames


def assert_tidy(out: Path, names: list[str]) -> None:
    """Asserts that the folder has complete clips with these names and nothing else."""
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    clips = {path.relative_to(out).as_posix() for name in names for path in files_of(out, name)}
    assert files == clips | {".recording.json"}
    assert not (out / ".recorder").exists()


CLIPS = ["clip_06_00000", "clip_06_00001"]


@needs_game
def test_a_recording_is_complete_and_leaves_no_other_files(recorded):
    assert_tidy(recorded.out, CLIPS)
    for name in CLIPS:
        assert_complete(recorded.out, name, LENGTH)
    assert recorded.gone(), recorded.processes()
    assert "2 clips, 0 of them recorded already" in recorded.log
    assert "Traceback" not in recorded.log


@needs_game
def test_metadata_describe_the_recording(recorded):
    for name, planned in zip(CLIPS, plan_clips(6, 2, 2, ["grassland"], ["noon"], ["clear"]), strict=True):
        content = content_of(recorded.out, name)
        assert content["biome"] == "grassland"
        assert content["initial_weather"] == "clear" and content["start_time"] == "noon"
        assert content["convention"] == "minecraft" and content["player"] == "scripted"
        assert content["player_style"] == style_of(planned.seed).name
        assert content["vertical_fov_degrees"] == 70.0 and content["eye_height"] == EYE_HEIGHT
        assert world_key(content) == f"world_{planned.world_seed}"
        assert re.match(r"(Minetest|Luanti) \d", content["game"])
        video = clip_paths(recorded.out, name)[1]
        assert video_fps(video) == FPS
        assert next(read_frames(video)).shape == (144, 256, 3)


@needs_game
def test_pictures_actions_and_poses_belong_together(recorded):
    report = check_clips(recorded.out, progress=False, limit_frames=LENGTH, expected_fov=70.0)
    assert report.problems == [], report_text(report)
    assert report.clips == 2 and not report.bad_files
    assert report.pictures.yaw is not None
    lags = report.pictures.yaw.correlation
    assert max(lags, key=lags.get) == 0 and lags[0] > 0.9


@needs_game
def test_poses_follow_from_the_actions(recorded):
    along = []  # metres per frame in the direction of the pressed key; near 0 at a wall
    for name in CLIPS:
        vectors, pose = gamefactory_track(content_of(recorded.out, name)["actions"], Path(name))
        turned = np.diff(pose[:, 3:], axis=0)
        np.testing.assert_allclose(turned, actions.camera_degrees(vectors), atol=0.01)
        assert np.abs(turned).max() <= MAX_TURN and np.abs(turned[:, 0]).max() > 1
        yaw = np.radians(pose[1:, 3])
        moved = np.diff(pose[:, [0, 2]], axis=0)
        ahead = -np.sin(yaw) * moved[:, 0] + np.cos(yaw) * moved[:, 1]
        aside = -np.cos(yaw) * moved[:, 0] - np.sin(yaw) * moved[:, 1]
        along += [*(ahead * vectors[:, actions.MOVE_Z]), *(aside * vectors[:, actions.MOVE_X])]
        still = (vectors[:, actions.MOVE_X :] == 0).all(1)
        assert np.median(np.hypot(ahead, aside)[still]) < 0.02
    assert (np.array(along) > 0.1).sum() > 5 * (np.array(along) < -0.1).sum()


@needs_game
def test_depth_and_nodes_agree_on_the_ground(recorded):
    """Where the ground is level by the nodes, the depth of the lowest row must be that of the ground."""
    ratios = []
    for name in CLIPS:
        video = clip_paths(recorded.out, name)[1]
        _, pose = gamefactory_track(content_of(recorded.out, name)["actions"], Path(name))
        found = read_depth_file(video, len(pose))
        inverse = decode_inverse_ray_distance(found.log_inverse)
        assert set(np.unique(found.nodes)) <= {FREE, LIQUID, SOLID, LOW}
        for nodes, origin, (x, y, z, yaw, pitch), row in zip(
            found.nodes, found.origin, pose, inverse[:, -1], strict=True
        ):
            assert (np.abs([x, y, z] - origin - REACH) <= [0.6, 1.6, 0.6]).all()
            assert nodes[REACH, REACH, REACH] != SOLID
            height = (
                EYE_HEIGHT + y - (origin[1] + REACH - 0.5)
            )  # of the eye, over the floor of the feet's node
            down = np.radians(pitch + 34.4)  # of the lowest row's centre: atan(17.5 / 18 * tan(35))
            ahead = np.linspace(0, height / np.tan(down), 9)
            i = np.rint(x - ahead * np.sin(np.radians(yaw)) - origin[0]).astype(int)
            k = np.rint(z + ahead * np.cos(np.radians(yaw)) - origin[2]).astype(int)
            if min(i.min(), k.min()) < 0 or max(i.max(), k.max()) >= BOX[0]:
                continue
            if (nodes[i, REACH - 1, k] == SOLID).all() and (nodes[i, REACH, k] == FREE).all():
                ratios.append(row[31:33].mean() * height / np.sin(down))
    assert len(ratios) > 50
    assert np.median(ratios) == pytest.approx(1, abs=0.03)  # grass on some of them is nearer


@needs_game
def test_a_second_run_records_nothing(recorded, start):
    before = {path: path.stat().st_mtime_ns for path in recorded.out.rglob("*.*4")}
    run = start(recorded.out, *FEW)
    assert run.wait() == 0, run.log
    assert "2 of them recorded already" in run.log
    assert before == {path: path.stat().st_mtime_ns for path in recorded.out.rglob("*.*4")}
    assert_tidy(recorded.out, CLIPS)


@pytest.fixture
def half(recorded, tmp_path) -> Path:
    """The recording without its second clip."""
    out = shutil.copytree(recorded.out, tmp_path / "half")
    for path in files_of(out, CLIPS[1]):
        path.unlink()
    return out


@needs_game
def test_ctrl_c_ends_all_processes_and_keeps_complete_clips(half, start):
    run = start(half, *FEW)
    run.until_playing(CLIPS[1])
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    assert run.wait() == 130, run.log
    assert "stopped; finished clips are kept" in run.log and "Traceback" not in run.log
    assert run.gone(), run.processes()
    assert_tidy(half, CLIPS[:1])


@needs_game
def test_killing_the_recorder_or_the_game_loses_only_the_current_clip(half, start):
    kept = {path: path.stat().st_mtime_ns for path in clip_paths(half, CLIPS[0])}
    run = start(half, *FEW)
    run.until_playing(CLIPS[1])
    assert len(run.processes()) >= 4  # the recorder, its worker, the game, its display
    run.process.kill()
    assert run.wait() == -signal.SIGKILL
    assert run.gone(), run.processes()
    assert [clip.name for clip in find_clips(half, "auto", half)[1]] == CLIPS[:1]

    run = start(half, *FEW)
    run.until_playing(CLIPS[1])
    games = [pid for pid, program in run.processes().items() if program in ("minetest", "luanti")]
    assert len(games) == 1
    os.kill(games[0], signal.SIGKILL)
    assert run.wait() == 0, run.log
    assert "the game has ended" in run.log and "Traceback" not in run.log
    assert_tidy(half, CLIPS)
    assert_complete(half, CLIPS[1], LENGTH)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert run.gone(), run.processes()


@needs_game
def test_two_games_record_another_size_in_different_worlds(tmp_path, start):
    words = "--clips 2 --clips_per_world 1 --jobs 2 --frames 32 --size 128x72 --vertical_fov 60".split()
    run = start(tmp_path / "small", *words)
    assert run.wait() == 0, run.log
    names = ["clip_01_00000", "clip_01_00001"]
    assert_tidy(run.out, names)
    for name in names:
        assert_complete(run.out, name, 32)
        assert content_of(run.out, name)["vertical_fov_degrees"] == 60.0
        picture = next(read_frames(clip_paths(run.out, name)[1]))
        assert picture.shape == (72, 128, 3) and picture.std() > 5
    assert len({content_of(run.out, name)["world_seed"] for name in names}) == 2


# ------------------------------------------------------------ the player that holds W


def test_the_player_that_holds_w_turns_where_it_is_held_up():
    """It walks south for a second, then stands before a wall until it has turned by 60 degrees."""
    player, at, yaw, turned = HoldingForward(), 0.0, 0.0, []
    for _ in range(48):
        command = player(Observation(yaw, 5.0, (0.0, 10.0, at)))
        assert command.keys == {"forward"} and command.pitch == -5.0, "level"
        yaw += command.yaw
        turned.append(command.yaw)
        at += 0.25 if at < 4.0 or yaw >= 60 else 0.0
    first = next(t for t, turn in enumerate(turned) if turn)
    assert 16 + 7 <= first <= 16 + 9 and turned[first : first + 8] == [7.5] * 8
    assert yaw == 60 and at > 5


def test_only_the_player_that_holds_w_may_get_nowhere():
    frame = SimpleNamespace(
        pos=(0.0, 0.0, 0.0), keys={"forward"}, feet_node="air", eye_node="air", daylight=15
    )
    detect, holding = CutDetector(), CutDetector(stuck=False)
    assert [detect(frame) for _ in range(112)][-1] == "stuck"
    assert not any(holding(frame) for _ in range(112))


@needs_game
def test_a_clip_of_the_player_that_holds_w(tmp_path, start):
    words = "--forward --clips 1 --frames 48 --size 128x72 --biomes grassland".split()
    run = start(tmp_path / "forward", *words)
    assert run.wait() == 0, run.log
    content = content_of(run.out, "clip_01_00000")
    assert content["player"] == "forward" and "player_style" not in content
    entries = list(content["actions"].values())[1:]  # the first one is of the action before the clip
    assert all(entry["ws"] == 1 for entry in entries)


# ------------------------------------------------------------ human play


class Desktop(VirtualDisplay):
    """A virtual display whose windows can be closed as by a window manager, with its own keys and mouse."""

    def __init__(self):
        super().__init__(1280, 800)
        self.controls = Controls(self.name)
        self.protocols, self.delete = map(
            self.controls.display.intern_atom, ("WM_PROTOCOLS", "WM_DELETE_WINDOW")
        )
        self.controls.display.sync()

    def close_window(self) -> None:
        """Sends a close request to every window."""
        for window in self.controls.display.screen().root.query_tree().children:
            window.send_event(
                event.ClientMessage(
                    window=window, client_type=self.protocols, data=(32, [self.delete, 0, 0, 0, 0])
                )
            )
        self.controls.display.sync()

    def close(self) -> None:
        self.controls.close()
        super().close()


def recorded_frames(run: Run) -> int:
    """Frames so far, by the progress bar."""
    return max(map(int, re.findall(r"(\d+)/\d+ \[", run.log)), default=0)


@needs_game
def test_human_play_until_the_window_is_closed(tmp_path, start):
    """In the first clip w is pressed while the mouse moves, then other keys; the second is left early."""
    desktop = Desktop()
    try:
        words = "--human --clips 3 --clips_per_world 3 --frames 64 --size 128x72 --biomes grassland".split()
        run = start(tmp_path / "mine", *words, program=SMALL_WINDOW, DISPLAY=desktop.name)
        run.until(desktop.controls.focus, "the game's window")
        run.until_playing("clip_01_00000")
        desktop.controls.focus()
        for _ in range(20):
            desktop.controls.apply({"forward"}, right=8, down=2)
            time.sleep(0.06)
        for keys in ({"jump"}, {"left", "sneak"}, set()):
            desktop.controls.apply(keys)
            time.sleep(0.7)
        metadata = clip_paths(run.out, "clip_01_00000")[0]
        run.until(metadata.is_file, "the first clip")
        run.until(lambda: recorded_frames(run) >= 64 + 2 * FPS, "two seconds of the second clip")
        desktop.close_window()
        assert run.wait() == 0, run.log
    finally:
        desktop.close()
    assert run.gone(), run.processes()
    assert "Traceback" not in run.log
    names = ["clip_01_00000", "clip_01_00001"]
    assert_tidy(run.out, names)
    for name, ended in zip(names, ("complete", "quit"), strict=True):
        assert_complete(run.out, name, 64)
        assert content_of(run.out, name)["ended"] == ended
        assert content_of(run.out, name)["player"] == "human"
    found = content_of(run.out, names[0])["actions"].values()
    assert any(e["ws"] == 1 and e["yaw_delta"] > 0 for e in found)
    # A slow game may lose mouse movements; the actions must contain those that it received.
    right, down = (DEGREES_PER_UNIT * sum(e[name] for e in found) for name in ("yaw_delta", "pitch_delta"))
    assert 40 * DEGREES_PER_PIXEL < right < 161 * DEGREES_PER_PIXEL
    assert down == pytest.approx(right / 4, abs=1.5)
    assert {e["scs"] for e in found} == {0, 1, 2} and {e["ad"] for e in found} == {0, 1}
    assert len(content_of(run.out, names[1])["actions"]) >= 2 * FPS


def test_every_key_has_a_keysym():
    assert set(KEYSYMS) == {"forward", "back", "left", "right", "jump", "sneak"}
