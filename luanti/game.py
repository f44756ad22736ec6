"""One running game: started in a throw-away profile, held at every frame, closed without a trace."""

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
BITS, STRIP = 14, 16  # the barcode's bits, and the side of one of its cells in pixels (clientmods/ochre_log)
DEGREES_PER_PIXEL = 0.2354  # of the mouse, at the sensitivity in minetest.conf
NEAR, FAR = 0.1, 2000.0  # metres, the clipping planes of the game's depth buffer
EYE_HEIGHT = 1.47  # metres above the feet, in Minetest Game
TITLES = ("Minetest", "Luanti")  # in the title of the game's window
KEYSYMS = {"forward": "w", "back": "s", "left": "a", "right": "d", "jump": "space", "sneak": "Shift_L"}
PATIENCE = 60.0  # seconds without a new frame, or without an answer of the game, that mean it hangs
PACE = 8  # times real time, at most, while the game loads: its other threads should keep up
INSTALL = "apt-get install minetest xvfb gcc libc6-dev (newer systems: luanti luanti-game-minetest)"


class GameError(UserError):
    """The game, or something that it needs, is missing, has stopped, or does not answer."""


@dataclass(frozen=True)
class Picture:
    """The pictures to record: size in pixels, vertical field of view in degrees, and how the game draws them.

    The window shows `scale` x the size and a strip for the barcode above and below.
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
        """Pixels of the window on each side of what gets one ray distance."""
        return BLOCK * self.scale

    @property
    def fov_setting(self) -> float:
        """The game's `fov` at which the kept rows have the wanted field of view, in degrees.

        The game takes `fov` as the window's vertical angle and, below an aspect of 16:10, widens it by
        sqrt(1.6 / aspect) (Luanti's src/client/camera.cpp).
        """
        width, height = self.window
        focal = focal_length(self.height * self.scale, self.vertical_fov)
        whole = math.degrees(2 * math.atan(height / 2 / focal))
        return whole / min(max(math.sqrt(1.6 * height / width), 1.0), 1.4)


@dataclass(frozen=True)
class Frame:
    """A drawn frame and where it was seen from, in Minecraft's convention.

    Degrees: +yaw right (not wrapped), +pitch down. Metres: pos [x, y, z] of the feet, y up, forward is
    (-sin yaw, 0, cos yaw).
    """

    picture: np.ndarray  # [H, W, 3] uint8 RGB, as large as the window without its strips
    seconds: float  # of game time since the frame before
    yaw: float
    pitch: float
    pos: tuple[float, float, float]
    eye_before: tuple[float, float, float]  # the eye in the frame before: on a step it lags behind the feet
    keys: frozenset[str]  # held on the way to this frame
    eye_node: str  # what the eye is in
    feet_node: str
    daylight: int  # 0..15, at the eye at noon
    # What surroundings.py describes: inverse ray distances [H/4, W/4] float32 in 1/m; the nodes around
    # the player [7, 7, 7] uint8, and where they are.
    inverse_distance: np.ndarray | None = None
    nodes: np.ndarray | None = None
    origin: tuple[int, int, int] = (0, 0, 0)


def find_game() -> Path:
    """The game's program. Raises GameError that names the packages."""
    for name in ("minetest", "luanti"):
        found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/games:/usr/local/games")
        if found:
            return Path(found)
    raise GameError(f"the game is not installed: neither minetest nor luanti was found; {INSTALL}")


def game_version(program: Path) -> str:
    """First line of `--version`, such as "Minetest 5.6.1 (Linux)"."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return said.splitlines()[0] if said else "unknown"


def build_shim(target: Path) -> Path:
    """Compiles lockstep.c to `target` with the system's compiler. Raises GameError that names the package."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise GameError(f"no C compiler, which the recorder needs once, for 200 lines: {INSTALL}")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(target), str(FOLDER / "lockstep.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GameError(f"{' '.join(command)}: failed; {INSTALL}\n{done.stderr}")
    return target


def die_with_parent() -> None:
    """The calling process gets SIGTERM when its parent ends, however it ends (Linux's PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)


class VirtualDisplay:
    """An X server without a screen (Xvfb), for one window. Close it after use."""

    def __init__(self, width: int, height: int):
        program = shutil.which("Xvfb")
        if program is None:
            raise GameError(f"no Xvfb, the display for recording unseen: {INSTALL}")
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
    """Ends a process, by force if it does not end within some seconds."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Controls:
    """Keys and mouse of the game's window, by X's test extension: real input, as from a person's hands."""

    def __init__(self, display_name: str):
        self.display = display.Display(display_name)
        self.codes = {
            key: self.display.keysym_to_keycode(XK.string_to_keysym(name)) for key, name in KEYSYMS.items()
        }
        self.down: set[str] = set()

    def focus(self) -> bool:
        """Gives the game's window the keyboard; False while there is none."""
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
        """Holds exactly `keys` and moves the mouse by so many pixels. Raises GameError if the display has
        gone."""
        try:
            self._apply(set(keys), right, down)
        except ConnectionClosedError as error:
            raise GameError(f"the game's display has gone: {error}") from None

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
        """Leaves the display."""
        with contextlib.suppress(Exception):  # the server may have gone first
            self.display.close()


class Game:
    """The game in a new world, held at its current frame. Use it as a context manager.

    `profile` is a folder that is emptied at the start and removed at the end; `cache` outlives it, for the
    game's own media. Without `display_name` the game gets a virtual display. Raises GameError.
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
        self.answers: dict[str, dict] = defaultdict(dict)  # [what][id]: what the server's mod said
        self.line: dict = {}  # the client mod's last line
        self.nodes: np.ndarray | None = None  # the last that a line told, and the first node of them
        self.origin = (0, 0, 0)
        self.depth: np.ndarray | None = None  # the depth buffer at the blocks' centres, [H/4, W/4, 4]
        size = picture.height // BLOCK, picture.width // BLOCK
        self.cosine = rays(*size, picture.vertical_fov).numpy()[..., 2]  # of each block's ray to the axis
        self.yaw = 0.0  # degrees, not wrapped
        self.started = time.monotonic()
        self.controls: Controls | None = None
        self.process: subprocess.Popen | None = None
        self.virtual = None if display_name else VirtualDisplay(*(4 * side for side in picture.window))
        try:
            self.seen = display_name is not None
            name = display_name or self.virtual.name
            self._install(world_seed)
            self._start(find_game(), name, cache, shim)
            self.controls = None if self.seen else Controls(name)
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
        self.socket.settimeout(PATIENCE)
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
            "LP_NUM_THREADS": "1",  # llvmpipe: the second core belongs to the second game
            "LOCKSTEP_FD": str(theirs.fileno()),
            # The game draws its port from the time: two that start in one second would draw the same.
            "LOCKSTEP_DATE": str(random.SystemRandom().randrange(10**9, 2 * 10**9)),
            "LOCKSTEP_WIDTH": str(width),
            "LOCKSTEP_HEIGHT": str(height),
            "LOCKSTEP_STRIP": str(STRIP),
            "LOCKSTEP_BLOCK": str(self.picture.block),
            "LOCKSTEP_FPS": str(FPS),
            "LOCKSTEP_SPEED": "1" if self.seen else str(PACE),
            "LOCKSTEP_SHOW_EVERY": "1" if self.seen else "8",
        }
        self.log_path = self.profile / "game.log"
        self.log_path.touch()
        self.log = self.log_path.open(encoding="utf-8", errors="replace")
        self.rest = ""
        command = [program, "--config", self.home / "minetest.conf", "--world", self.world]
        command += ["--logfile", self.log_path, "--go"]
        with (self.profile / "game.out").open("wb") as said:
            self.process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], stdout=said, stderr=said,
                stdin=subprocess.DEVNULL, cwd=self.profile,
            )  # fmt: skip
        theirs.close()
        self._await_frame()

    def _wait_until_joined(self) -> None:
        deadline = time.monotonic() + PATIENCE
        focused = self.controls is None
        while not (focused and self.line and self.answers["joined"]):
            self.pass_frame()
            focused = focused or self.controls.focus()
            if time.monotonic() > deadline:
                raise GameError(f"the game did not begin within {PATIENCE:.0f} s{self._last_words()}")

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

    def _last_words(self) -> str:
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
            raise GameError(f"no new frame for {PATIENCE:.0f} s{self._last_words()}") from None
        except ConnectionError:
            raise self._ended() from None

    def _ended(self) -> GameError:
        """The error to raise once the game has left; from then on it is not `alive`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        return GameError(f"the game has ended{self._last_words()}")

    def _await_frame(self) -> np.ndarray | None:
        """Waits for the game's next frame -> the window's picture [H, W, 4] BGRA, if it was asked for."""
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
        return pixels[::-1] if pixels is not None else None  # OpenGL counts rows from below

    def _read_log(self) -> None:
        lines = (self.rest + self.log.read()).split("\n")
        self.rest = lines.pop()
        for line in lines:
            _, found, said = line.partition(": OCHRE ")
            if not found:
                continue
            what, _, content = said.partition(" ")
            content = json.loads(content) or {}
            if what == "frame":
                self.line = content
                if "nodes" in content:
                    self.nodes, self.origin = read_nodes(content["nodes"], content["middle"])
            else:
                self.answers[what][content.get("id", "")] = content

    def _release(self, order: bytes) -> None:
        try:
            self.socket.sendall(order)
        except OSError:
            raise self._ended() from None

    def pass_frame(self) -> bool:
        """Goes on by one frame without looking at it, at PACE times real time at most -> False if paused."""
        before = self.line.get("n")
        wait = self.started + 1 / (FPS * PACE) - time.monotonic()
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
        """Lets the game go on to its next frame, which `frame` then reads."""
        self._release(b"p")

    def frame(self) -> Frame | None:
        """Waits for the frame after `release`; None while the game is paused by its menu.

        Raises GameError if the barcode in the picture is not the number in the log: then they are no pair.
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
            raise GameError(f"the picture is of frame {number}, the log of frame {line['n']}: not a pair")
        # The camera looks along its yaw less 90, counted to the left.
        self.yaw += wrap(90.0 - line["yaw"] - self.yaw)
        return Frame(
            pixels[STRIP:-STRIP, :, 2::-1],
            line["dt"],
            yaw=self.yaw,
            pitch=-line["pitch"],
            pos=minecraft(line["pos"]),
            eye_before=minecraft(line["view"]),
            keys=frozenset(key for key, held in line["keys"].items() if held),
            eye_node=line["node"],
            feet_node=line["feet"],
            daylight=line["light"],
            inverse_distance=self._inverse_distance(),
            nodes=self.nodes,
            origin=self.origin,
        )

    def _inverse_distance(self) -> np.ndarray:
        """Inverse ray distances at the blocks' centres, [H/4, W/4] float32 in 1/m."""
        axial = centre_of_block(inverse_axial_depth(self.depth, NEAR, FAR))
        return (axial * self.cosine).astype(np.float32)

    # -------------------------------------------------------- places

    def _ask(self, file: str, request: dict) -> None:
        temporary = self.world / f"{file}.tmp"
        temporary.write_text(json.dumps(request))
        os.replace(temporary, self.world / file)

    def prepare(self, name: str, seed: int, biome: str = "") -> None:
        """Asks for a place in `biome` (any if empty), found with `seed`, and for the land around it."""
        self._ask("prepare.json", {"id": name, "seed": seed, "biome": biome})

    def go(self, name: str, time_of_day: float, weather: str, yaw: float) -> str:
        """Moves the player to the place prepared as `name`, looking along `yaw` -> the biome there.

        `time_of_day` is 0..1, 0.5 noon; `weather` clear, overcast or rain. Raises GameError.
        """
        self.yaw = wrap(self.yaw)  # each place counts its turns anew
        self._ask("go.json", {"id": name, "time": time_of_day, "weather": weather, "yaw": -yaw})
        deadline = time.monotonic() + PATIENCE
        while name not in self.answers["placed"]:
            self.pass_frame()
            if time.monotonic() > deadline:
                raise GameError(f"the game found no place within {PATIENCE:.0f} s{self._last_words()}")
        return self.answers["placed"][name]["biome"]


def minecraft(pos: list[float]) -> tuple[float, float, float]:
    """The game's [x, y, z] in Minecraft's axes: x is mirrored."""
    x, y, z = pos
    return -x, y, z


def read_nodes(digits: str, middle: list[int]) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The box of nodes in a line of the client mod and its middle, in the game's axes -> `nodes` and
    `origin` in Minecraft's axes, as surroundings.py describes them."""
    nodes = (np.frombuffer(digits.encode("ascii"), np.uint8) - ord("0")).reshape(BOX)
    x, y, z = map(int, middle)  # the game writes 3.0 for 3
    return nodes, (-x - REACH, y - REACH, z - REACH)


def read_barcode(pixels: np.ndarray) -> int | None:
    """The frame number drawn in the window's picture [H, W, 4], or None where the two strips disagree."""
    columns = np.arange(BITS) * STRIP + STRIP // 2
    above = pixels[STRIP // 2, columns, 1] > 127
    below = pixels[-STRIP // 2, columns, 1] > 127
    if (above == below).any():
        return None
    return int((above << np.arange(BITS)).sum())
