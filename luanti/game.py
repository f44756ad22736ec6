"""One running game, stepped frame by frame. It runs in a temporary profile, which is removed at the end."""

import contextlib
import ctypes
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from Xlib import XK, X, display
from Xlib.error import ConnectionClosedError, XError
from Xlib.ext import xtest

from dataset.actions import wrap
from dataset.surroundings import BLOCK, BOX, REACH, centre_of_block, inverse_axial_depth
from geometry.camera import focal_length, rays
from runtime.errors import UserError

FOLDER = Path(__file__).resolve().parent
FPS = 16
BITS, STRIP = 14, 16  # bits of the barcode, side in pixels of the square of one bit (clientmods/ochre_log)
DEGREES_PER_PIXEL = 0.2354  # of the mouse, at the sensitivity in minetest.conf
NEAR, FAR = 0.1, 2000.0  # metres, the clipping planes of the game's depth buffer
EYE_HEIGHT = 1.47  # metres above the feet, in Minetest Game
TITLES = ("Minetest", "Luanti")  # in the title of the game's window
KEYSYMS = {"forward": "w", "back": "s", "left": "a", "right": "d", "jump": "space", "sneak": "Shift_L"}
TIMEOUT = 60.0  # seconds without a new frame or an answer, after which the game counts as hanging
LOADING_SPEED = 8  # times real time at most while the game loads, so that its other threads keep up
INSTALL = "apt-get install minetest xvfb gcc libc6-dev (newer systems: luanti luanti-game-minetest)"


class GameError(UserError):
    """The game or a program that it needs is missing, has stopped, or does not answer."""


@dataclass(frozen=True)
class Picture:
    """The pictures to record: size in pixels, vertical field of view in degrees, scale of the game's window.

    The window has `scale` times the size, and a strip for the barcode above and below.
    """

    width: int = 256
    height: int = 144
    vertical_fov: float = 70.0
    scale: int = 1

    @property
    def window(self) -> tuple[int, int]:
        """Width and height of the game's window in pixels."""
        return self.width * self.scale, self.height * self.scale + 2 * STRIP

    @property
    def block(self) -> int:
        """Side in window pixels of a block that shares one ray distance."""
        return BLOCK * self.scale

    @property
    def fov_setting(self) -> float:
        """The game's setting `fov` in degrees for which the rows between the strips have `vertical_fov`.

        The game uses `fov` as the window's vertical angle and, below an aspect ratio of 16:10, multiplies
        it by sqrt(1.6 / aspect) (Luanti's src/client/camera.cpp).
        """
        width, height = self.window
        focal = focal_length(self.height * self.scale, self.vertical_fov)
        whole = math.degrees(2 * math.atan(height / 2 / focal))
        return whole / min(max(math.sqrt(1.6 * height / width), 1.0), 1.4)


@dataclass(frozen=True)
class Frame:
    """A drawn frame with its pose in Minecraft's convention.

    Degrees: +yaw right (not wrapped), +pitch down. Metres: pos [x, y, z] of the feet, y up, forward is
    (-sin yaw, 0, cos yaw).
    """

    picture: np.ndarray  # [H, W, 3] uint8 RGB, the window without its strips
    seconds: float  # of game time since the previous frame
    yaw: float
    pitch: float
    pos: tuple[float, float, float]
    eye_before: tuple[float, float, float]  # eye in the previous frame; on a step it lags behind the feet
    keys: frozenset[str]  # pressed between the previous frame and this one
    eye_node: str  # name of the node that the eye is in
    feet_node: str
    daylight: int  # 0..15, the light at the eye at noon
    inverse_ray_distance: np.ndarray | None = None  # [H/4, W/4] float32 in 1/m
    nodes: np.ndarray | None = None  # [7, 7, 7] uint8, see surroundings.py
    origin: tuple[int, int, int] = (0, 0, 0)


def find_game() -> Path:
    """Path of the game's program. Raises GameError, which names the packages to install."""
    for name in ("minetest", "luanti"):
        found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/games:/usr/local/games")
        if found:
            return Path(found)
    raise GameError(f"the game is not installed: neither minetest nor luanti was found; {INSTALL}")


def game_version(program: Path) -> str:
    """First line of `--version`, such as "Minetest 5.6.1 (Linux)"."""
    output = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return output.splitlines()[0] if output else "unknown"


def build_shim(target: Path) -> Path:
    """Compiles lockstep.c to `target` with the system's compiler. Raises GameError, which names the
    package.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise GameError(f"no C compiler found; the recorder needs one for luanti/lockstep.c: {INSTALL}")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(target), str(FOLDER / "lockstep.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GameError(f"{' '.join(command)}: failed; {INSTALL}\n{done.stderr}")
    return target


def die_with_parent() -> None:
    """Makes the calling process receive SIGTERM when its parent ends for any reason (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)


class VirtualDisplay:
    """An X server without a screen (Xvfb), for one window. Close it after use."""

    def __init__(self, width: int, height: int):
        program = shutil.which("Xvfb")
        if program is None:
            raise GameError(f"no Xvfb found; the recorder needs it as a virtual display: {INSTALL}")
        reading, writing = os.pipe()
        command = [
            program,
            "-displayfd",
            str(writing),
            "-screen",
            "0",
            f"{width}x{height}x24",
            "-nolisten",
            "tcp",
        ]
        self.process = subprocess.Popen(
            command, pass_fds=[writing], preexec_fn=die_with_parent, stderr=subprocess.DEVNULL
        )
        os.close(writing)
        with os.fdopen(reading) as pipe:
            number = pipe.readline().strip()
        if not number:
            self.close()
            raise GameError(f"{' '.join(command)}: did not start")
        self.name = f":{number}"

    def close(self) -> None:
        """Ends the server."""
        stop(self.process)


def stop(process: subprocess.Popen) -> None:
    """Ends a process; kills it if it does not end within 5 seconds."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Controls:
    """Sends keys and mouse movements to the game's window with X's test extension."""

    def __init__(self, display_name: str):
        self.display = display.Display(display_name)
        self.codes = {
            key: self.display.keysym_to_keycode(XK.string_to_keysym(name)) for key, name in KEYSYMS.items()
        }
        self.down: set[str] = set()

    def focus(self) -> bool:
        """Gives the game's window the keyboard focus; returns False while there is no window."""
        root = self.display.screen().root
        for window in root.query_tree().children:
            with contextlib.suppress(XError):
                title = window.get_wm_name() or ""
                if any(name in str(title) for name in TITLES) and window.get_attributes().map_state:
                    # In the middle of the screen, so that the mouse has room on every side.
                    size, area = window.get_geometry(), root.get_geometry()
                    window.configure(x=(area.width - size.width) // 2, y=(area.height - size.height) // 2)
                    window.set_input_focus(X.RevertToParent, X.CurrentTime)
                    self.display.sync()
                    return True
        return False

    def apply(self, keys: Collection[str], right: int = 0, down: int = 0) -> None:
        """Presses exactly `keys` and moves the mouse by pixels. Raises GameError if the display has ended."""
        try:
            self._apply(set(keys), right, down)
        except ConnectionClosedError as error:
            raise GameError(f"the game's display has ended: {error}") from None

    def _apply(self, wanted: set[str], right: int, down: int) -> None:
        for key in self.down - wanted:
            xtest.fake_input(self.display, X.KeyRelease, self.codes[key])
        for key in wanted - self.down:
            xtest.fake_input(self.display, X.KeyPress, self.codes[key])
        self.down = wanted
        if right or down:
            xtest.fake_input(self.display, X.MotionNotify, detail=True, x=right, y=down)
        self.display.sync()

    def close(self) -> None:
        """Disconnects from the display."""
        with contextlib.suppress(Exception):  # the server may have ended first
            self.display.close()


class Game:
    """The game in a new world, paused at its current frame. Use it as a context manager.

    `profile` is a folder that is emptied at the start and removed at the end. `cache` keeps the game's own
    media between games. Without `display_name` the game gets a virtual display. Raises GameError.
    """

    def __init__(
        self,
        profile: Path,
        cache: Path,
        shim: Path,
        picture: Picture,
        world_seed: int,
        display_name: str | None = None,
    ):
        self.profile, self.picture = profile, picture
        self.home = profile / ".minetest"
        self.world = self.home / "worlds" / "world"
        self.answers: dict[str, dict] = defaultdict(dict)  # [event][id]: answers of the server mod
        self.line: dict = {}  # the client mod's last line
        self.nodes: np.ndarray | None = None  # from the last line that had nodes
        self.origin = (0, 0, 0)
        self.depth: np.ndarray | None = None  # depth buffer around the blocks' centres, [H/4, W/4, 4]
        size = picture.height // BLOCK, picture.width // BLOCK
        self.cosine = rays(*size, picture.vertical_fov).numpy()[
            ..., 2
        ]  # between each block's ray and the axis
        self.yaw = 0.0  # degrees, not wrapped
        self.started = time.monotonic()
        self.controls: Controls | None = None
        self.process: subprocess.Popen | None = None
        self.virtual = None if display_name else VirtualDisplay(*(4 * side for side in picture.window))
        try:
            self.visible = display_name is not None
            name = display_name or self.virtual.name
            self._install(world_seed)
            self._start(find_game(), name, cache, shim)
            self.controls = None if self.visible else Controls(name)
            self._wait_until_joined()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Game":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------- start and end

    def _install(self, world_seed: int) -> None:
        shutil.rmtree(self.profile, ignore_errors=True)
        self.world.mkdir(parents=True)
        shutil.copytree(FOLDER / "clientmods", self.home / "clientmods")
        shutil.copytree(FOLDER / "worldmods", self.world / "worldmods")
        width, height = self.picture.window
        own = {
            "screen_w": width,
            "screen_h": height,
            "fov": f"{self.picture.fov_setting:.4f}",
            "fixed_map_seed": world_seed,
        }
        settings = [(FOLDER / "minetest.conf").read_text(), *(f"{k} = {v}" for k, v in own.items())]
        (self.home / "minetest.conf").write_text("\n".join(settings) + "\n")
        backends = ("backend", "player_backend", "auth_backend", "mod_storage_backend")
        (self.world / "world.mt").write_text(
            "gameid = minetest\nworld_name = world\n" + "".join(f"{b} = sqlite3\n" for b in backends)
        )

    def _start(self, program: Path, display_name: str, cache: Path, shim: Path) -> None:
        width, height = self.picture.window
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(TIMEOUT)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, width * height * 4 + 1)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, width * height * 4 + 1)
        home = os.environ.get("HOME", "")
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "MINETEST_", "LUANTI_"))},
            "HOME": str(self.profile),
            "XDG_CACHE_HOME": str(cache),
            "XAUTHORITY": os.environ.get("XAUTHORITY", str(Path(home) / ".Xauthority")),
            "DISPLAY": display_name,
            "LD_PRELOAD": str(shim),
            "LP_NUM_THREADS": "1",  # of llvmpipe; other cores are used by other games
            "LOCKSTEP_FD": str(theirs.fileno()),
            # The game derives its port from the time: two games started in one second would use the same.
            "LOCKSTEP_DATE": str(random.SystemRandom().randrange(10**9, 2 * 10**9)),
            "LOCKSTEP_WIDTH": str(width),
            "LOCKSTEP_HEIGHT": str(height),
            "LOCKSTEP_STRIP": str(STRIP),
            "LOCKSTEP_BLOCK": str(self.picture.block),
            "LOCKSTEP_FPS": str(FPS),
            "LOCKSTEP_SPEED": "1" if self.visible else str(LOADING_SPEED),
            "LOCKSTEP_SHOW_EVERY": "1" if self.visible else "8",
        }
        self.log_path = self.profile / "game.log"
        self.log_path.touch()
        self.log = self.log_path.open(encoding="utf-8", errors="replace")
        self.rest = ""
        command = [program, "--config", self.home / "minetest.conf", "--world", self.world]
        command += ["--logfile", self.log_path, "--go"]
        with (self.profile / "game.out").open("wb") as output:
            self.process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, cwd=self.profile,
            )  # fmt: skip
        theirs.close()
        self._await_frame()

    def _wait_until_joined(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        focused = self.controls is None
        while not (focused and self.line and self.answers["joined"]):
            self.pass_frame()
            focused = focused or self.controls.focus()
            if time.monotonic() > deadline:
                raise GameError(f"the game did not begin within {TIMEOUT:.0f} s{self._last_output()}")

    def close(self) -> None:
        """Ends the game and its display and removes the profile."""
        if self.controls:
            self.controls.close()
        if self.process:
            self.socket.close()
            stop(self.process)
            self.log.close()
        if self.virtual:
            self.virtual.close()
        shutil.rmtree(self.profile, ignore_errors=True)

    def _last_output(self) -> str:
        """The end of what the game printed, for an error message."""
        lines = []
        for path in (self.profile / "game.out", self.log_path):
            if path.is_file():
                text = [line for line in path.read_text(errors="replace").splitlines() if "OCHRE" not in line]
                wrong = [line for line in text if re.search("ERROR|error|terminate|signal", line)]
                lines += (wrong or text)[-5:]
        return "".join(f"\n  {line}" for line in lines)

    @property
    def memory_mb(self) -> float:
        """Resident memory of the game's process in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    # -------------------------------------------------------- frames

    def _receive(self, buffer: memoryview) -> None:
        try:
            while buffer:
                got = self.socket.recv_into(buffer)
                if not got:
                    raise self._ended()
                buffer = buffer[got:]
        except TimeoutError:
            raise GameError(f"no new frame for {TIMEOUT:.0f} s{self._last_output()}") from None
        except ConnectionError:
            raise self._ended() from None

    def _ended(self) -> GameError:
        """Waits for the game's process to end and returns the error to raise."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        return GameError(f"the game has ended{self._last_output()}")

    def _await_frame(self) -> np.ndarray | None:
        """Waits for the game's next frame -> the window's picture [H, W, 4] BGRA, if it was requested."""
        kind = bytearray(1)
        self._receive(memoryview(kind))
        pixels = None
        if kind == b"p":
            width, height = self.picture.window
            pixels = np.empty((height, width, 4), np.uint8)
            self._receive(memoryview(pixels).cast("B"))
            depth = np.empty((*self.cosine.shape, 4), np.float32)
            self._receive(memoryview(depth).cast("B"))
            self.depth = depth[::-1]
        self._read_log()
        return pixels[::-1] if pixels is not None else None  # OpenGL counts rows from the bottom

    def _read_log(self) -> None:
        lines = (self.rest + self.log.read()).split("\n")
        self.rest = lines.pop()
        for line in lines:
            _, marker, message = line.partition(": OCHRE ")
            if not marker:
                continue
            event, _, content = message.partition(" ")
            content = json.loads(content) or {}
            if event == "frame":
                self.line = content
                if "nodes" in content:
                    self.nodes, self.origin = read_nodes(content["nodes"], content["middle"])
            else:
                self.answers[event][content.get("id", "")] = content

    def _release(self, order: bytes) -> None:
        try:
            self.socket.sendall(order)
        except OSError:
            raise self._ended() from None

    def pass_frame(self) -> bool:
        """Advances by one frame without reading the picture, at most LOADING_SPEED times real time.

        Returns False if the game is paused.
        """
        before = self.line.get("n")
        wait = self.started + 1 / (FPS * LOADING_SPEED) - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        self.started = time.monotonic()
        self._release(b"b")
        self._await_frame()
        return self.line.get("n") != before

    @property
    def alive(self) -> bool:
        """Whether the game still runs."""
        return self.process.poll() is None

    def release(self) -> None:
        """Lets the game draw its next frame, which `frame` then reads."""
        self._release(b"p")

    def frame(self) -> Frame | None:
        """Waits for the frame after `release`; None while the game is paused by its menu.

        Raises GameError if the barcode in the picture is not the frame number in the log.
        """
        before = self.line["n"]
        pixels = self._await_frame()
        line = self.line
        if line["n"] == before:
            return None
        if line["n"] != before + 1:
            raise GameError(f"frame {before} is followed by frame {line['n']}")
        number = read_barcode(pixels)
        if number != line["n"] % 2**BITS:
            raise GameError(f"the picture is of frame {number}, the log line of frame {line['n']}")
        # The game's camera yaw is positive to the left and 90 degrees off.
        self.yaw += wrap(90.0 - line["yaw"] - self.yaw)
        return Frame(
            pixels[STRIP:-STRIP, :, 2::-1],
            line["dt"],
            yaw=self.yaw,
            pitch=-line["pitch"],
            pos=minecraft(line["pos"]),
            eye_before=minecraft(line["view"]),
            keys=frozenset(key for key, pressed in line["keys"].items() if pressed),
            eye_node=line["node"],
            feet_node=line["feet"],
            daylight=line["light"],
            inverse_ray_distance=self._inverse_ray_distance(),
            nodes=self.nodes,
            origin=self.origin,
        )

    def _inverse_ray_distance(self) -> np.ndarray:
        """Inverse ray distances at the blocks' centres [H/4, W/4] float32, in 1/m."""
        axial = centre_of_block(inverse_axial_depth(self.depth, NEAR, FAR))
        return (axial * self.cosine).astype(np.float32)

    # -------------------------------------------------------- start places

    def _ask(self, file: str, request: dict) -> None:
        temporary = self.world / f"{file}.tmp"
        temporary.write_text(json.dumps(request))
        os.replace(temporary, self.world / file)

    def prepare(self, name: str, seed: int, biome: str = "") -> None:
        """Asks the server mod to find a start place in `biome` (any if empty) and load the terrain around
        it.
        """
        self._ask("prepare.json", {"id": name, "seed": seed, "biome": biome})

    def go(self, name: str, time_of_day: float, weather: str, yaw: float) -> str:
        """Moves the player to the start place prepared as `name`, looking along `yaw` -> the biome there.

        `time_of_day` is 0..1, 0.5 noon; `weather` is clear, overcast or rain. Raises GameError.
        """
        self.yaw = wrap(self.yaw)
        self._ask("go.json", {"id": name, "time": time_of_day, "weather": weather, "yaw": -yaw})
        deadline = time.monotonic() + TIMEOUT
        while name not in self.answers["placed"]:
            self.pass_frame()
            if time.monotonic() > deadline:
                raise GameError(f"no start place was found within {TIMEOUT:.0f} s{self._last_output()}")
        return self.answers["placed"][name]["biome"]


def minecraft(pos: list[float]) -> tuple[float, float, float]:
    """The game's [x, y, z] in Minecraft's axes: x is mirrored."""
    x, y, z = pos
    return -x, y, z


def read_nodes(digits: str, middle: list[int]) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The nodes in a line of the client mod and their middle, in the game's axes -> `nodes` and `origin` in
    Minecraft's axes (surroundings.py)."""
    nodes = (np.frombuffer(digits.encode("ascii"), np.uint8) - ord("0")).reshape(BOX)
    x, y, z = map(int, middle)  # the game writes 3.0 for 3
    return nodes, (-x - REACH, y - REACH, z - REACH)


def read_barcode(pixels: np.ndarray) -> int | None:
    """The frame number in the barcodes of the window's picture [H, W, 4]; None if the two strips disagree."""
    columns = np.arange(BITS) * STRIP + STRIP // 2
    above = pixels[STRIP // 2, columns, 1] > 127
    below = pixels[-STRIP // 2, columns, 1] > 127
    if (above == below).any():
        return None
    return int((above << np.arange(BITS)).sum())
