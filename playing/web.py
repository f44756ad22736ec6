"""Play in a browser: serves one page, sends it pictures, and receives its keys, mouse motion and touches.

Messages on the WebSocket /play:

    server -> page   text, once: {"kind": "hello", "run", "fps", "places", "controls", "commands", "view",
                     "help", "largest_file", "part"}; then binary
                     [n: uint32 little-endian] [n bytes of JSON] [a PNG, empty if there is no picture]
                     with "kind": "frame" (stats, action, overlay, choosing, message), "overlay", or
                     "thumbnail" (place, name, number), a JPEG, of the start screen
    page -> server   text, one of {"press": control}, {"release": control}, {"look": [right, down]} in CSS
                     pixels, {"command": name}, {"place": number from 0}, {"blur": true}, {"shown": number of
                     binary messages so far}, {"file": [name, bytes]}; after that the content of the file, in
                     binary messages of at most "part" bytes
"""

import asyncio
import errno
import ipaddress
import json
import re
import secrets
import socket
import struct
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import cv2
import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web

from playing.bindings import COMMANDS, CONTROLS, VIEW_COMMANDS, Binding, help_lines
from playing.connections import BACKLOG, HEADERS, Connections
from playing.controls import Controls, StepClock
from playing.overlay import overlay
from playing.session import Session
from playing.start_screen import StartScreen
from rollout.context import PICTURE_ENDINGS

PAGE = Path(__file__).with_name("page.html")
BUSY, MALFORMED = 4001, 4002  # close codes in the range for applications
FRAMES_WAITING = 2  # frames to be sent; a slow page misses the older ones
# Messages that are sent and not shown by the page yet. More would queue up in the buffers of the system or of
# an ssh tunnel, where they cannot be dropped; fewer would slow down a page with a long round trip.
IN_FLIGHT = 8
COMMANDS_WAITING = 8
OVERLAY_SECONDS = 0.25  # between two overlays
HEARTBEAT_SECONDS = 10.0
CLOSE_SECONDS = 2.0  # that a page has to answer a close frame
MAX_MESSAGE = 4096  # bytes
MAX_LOOK = 1e6  # pixels
FILE_PART = 4000  # bytes of a message with a part of a file; aiohttp wants less than MAX_MESSAGE
MAX_FILE = 16_000_000  # bytes of a dropped file; the page sends it in ten seconds
MAX_MESSAGES, MESSAGES_SECONDS = 50, 0.1  # messages of a page in so many seconds; more wait in its buffers
CONTROL_NAMES = frozenset(b.name for b in CONTROLS)
# The page handles the other view commands itself.
COMMAND_NAMES = frozenset(b.name for b in COMMANDS) | {"overlay", "places"}
# The beginnings of clips, by ending. The decoder itself goes by the content, and would open a playlist, too,
# which names other files.
CLIP_BEGINNINGS = {
    ".mp4": rb".{4}ftyp", ".mov": rb".{4}ftyp", ".webm": rb"\x1a\x45\xdf\xa3", ".mkv": rb"\x1a\x45\xdf\xa3",
    ".avi": rb"RIFF", ".gif": rb"GIF8",
}  # fmt: skip
FILE_ENDINGS = (*PICTURE_ENDINGS, *CLIP_BEGINNINGS, ".npz")


def is_loopback(host: str | None) -> bool:
    """Whether a name or address can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def png(picture: np.ndarray) -> bytes:
    """A picture [H, W, 3] uint8 as a PNG, compressed for speed."""
    bgr = np.ascontiguousarray(picture[..., ::-1])
    return cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def jpeg(picture: np.ndarray) -> bytes:
    """A picture [H, W, 3] uint8 as a JPEG, for the small ones of the start screen."""
    bgr = np.ascontiguousarray(picture[..., ::-1])
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()


def pack(header: dict, picture: bytes) -> bytes:
    """A binary message."""
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + picture


def hello(fps: float, run: str, places: list[str]) -> dict:
    """The first message: what a page has to know before the first picture. `run` names this server's run, so
    that a page that reconnects knows whether its world goes on."""

    def keys(bindings: tuple[Binding, ...]) -> list[dict[str, str]]:
        return [asdict(binding) for binding in bindings]

    return {
        "kind": "hello",
        "run": run,
        "fps": fps,
        "places": places,
        "largest_file": MAX_FILE,
        "part": FILE_PART,
        "controls": keys(CONTROLS),
        "commands": keys(COMMANDS),
        "view": keys(VIEW_COMMANDS),
        "help": help_lines("free the mouse"),
    }


def parse(text: str) -> tuple[str, object]:
    """A page's message -> its kind and value. Raises ValueError, with the reason, if it is malformed."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(content, dict) or len(content) != 1:
        raise ValueError("not an object with one entry")
    ((kind, value),) = content.items()
    if kind in ("press", "release"):
        valid = isinstance(value, str) and value in CONTROL_NAMES
    elif kind == "command":
        valid = isinstance(value, str) and value in COMMAND_NAMES
    elif kind == "look":
        # Python's JSON also has NaN and Infinity; neither is within the limit.
        valid = isinstance(value, list) and len(value) == 2
        valid = valid and all(type(v) in (int, float) and abs(v) <= MAX_LOOK for v in value)
    elif kind == "shown":
        valid = type(value) is int
    elif kind == "place":
        valid = type(value) is int and 0 <= value < 1000
    elif kind == "file":
        valid = (
            isinstance(value, list) and [type(v) for v in value] == [str, int] and 0 < value[1] <= MAX_FILE
        )
    else:
        valid = kind == "blur"
    if not valid:
        raise ValueError(f"unknown: {text[:60]}")
    return kind, value


@dataclass(frozen=True)
class Dropped:
    """A file that was dropped on the page."""

    name: str  # by the page: any text
    content: bytes

    @property
    def file_name(self) -> str:
        """A safe name with its ending in lower case."""
        stem, _, ending = self.name.rpartition(".")
        return re.sub(r"[^\w-]+", "_", stem)[-60:].strip("_") + "." + re.sub(r"\W", "", ending.lower())

    @property
    def problem(self) -> str:
        """Why it is not read; "" if its loader may try."""
        ending = Path(self.file_name).suffix
        if ending not in FILE_ENDINGS:
            return f"{self.file_name}: not a picture or a clip; drop one of {', '.join(FILE_ENDINGS)}"
        beginning = CLIP_BEGINNINGS.get(ending, b"")
        if not re.match(beginning, self.content, re.DOTALL):
            return f"{self.file_name}: its content is not that of {ending}; drop another file"
        return ""


@dataclass
class Update:
    """The result of one turn of the world loop."""

    frame: tuple[dict, bytes] | None = None  # header and PNG; None if nothing changed
    overlay: bytes | None = None  # PNG, empty if there is no overlay; None if there is no new one
    thumbnail: bytes | None = None  # a new message of the start screen
    message: str = ""  # for the player


class Player:
    """The page that plays, and the messages waiting to be sent to it."""

    def __init__(self, connection: web.WebSocketResponse, thumbnails: list[bytes]):
        """`thumbnails`: all messages of the start screen so far; the list grows."""
        self.connection = connection
        self.thumbnails, self.thumbnails_sent, self.choosing = thumbnails, 0, False
        self.file: tuple[str, int] | None = None  # name and size of a file that the page is sending
        self.file_content = bytearray()
        self.frames: deque[tuple[dict, bytes]] = deque(maxlen=FRAMES_WAITING)  # drops the oldest
        self.overlay: bytes | None = None  # the latest
        self.messages: deque[str] = deque(maxlen=COMMANDS_WAITING)  # sent with the next frame
        self.wants_overlay = False
        self.greeted = False  # the world as it stands has been offered
        self.sent = self.shown = 0  # numbers of binary messages
        self.wake = asyncio.Event()

    def offer(self, update: Update) -> None:
        """Queues an update for sending; never waits."""
        if update.frame is not None:
            self.frames.append(update.frame)
            self.choosing = update.frame[0]["choosing"]
        if update.overlay is not None:
            self.overlay = update.overlay
        if update.message:
            self.messages.append(update.message)
        self.wake.set()

    def next_message(self) -> bytes | None:
        """The binary message to send next; None if there is none, or if the page has not kept up."""
        if self.sent - self.shown >= IN_FLIGHT:
            return None
        if self.overlay is not None:
            picture, self.overlay = self.overlay, None
            return pack({"kind": "overlay"}, picture)
        if self.frames:
            header, picture = self.frames.popleft()
            message = "; ".join(self.messages)
            self.messages.clear()
            return pack({**header, "overlay": self.wants_overlay, "message": message}, picture)
        if self.choosing and self.thumbnails_sent < len(self.thumbnails):
            self.thumbnails_sent += 1
            return self.thumbnails[self.thumbnails_sent - 1]
        return None

    def receive(self, content: bytes) -> Dropped | None:
        """Takes a part of a file -> the file once it is complete. Raises ValueError for what was not
        announced."""
        if self.file is None:
            raise ValueError("not text")
        name, size = self.file
        self.file_content += content
        if len(self.file_content) > size:
            raise ValueError(f"more than the {size} bytes of a file")
        if len(self.file_content) < size:
            return None
        dropped, self.file, self.file_content = Dropped(name, bytes(self.file_content)), None, bytearray()
        return dropped

    async def send(self, first: dict) -> None:
        """Sends the first message and then the queue, as fast as the page accepts it, until the connection
        ends."""
        with suppress(ConnectionError):  # `Server.listen` sees the end too
            await self.connection.send_json(first)
            while True:
                await self.wake.wait()
                self.wake.clear()
                while (message := self.next_message()) is not None:
                    self.sent += 1
                    await self.connection.send_bytes(message)


class Server:
    """The world loop and the HTTP server.

    Everything that uses the session or the clock runs in one worker thread. Everything else runs in the event
    loop, which therefore always responds.
    """

    def __init__(
        self,
        session: Session,
        controls: Controls,
        clock: StepClock,
        host: str,
        token: str | None,
        choose: bool = False,
        dropped_frames: int | None = None,
    ):
        """`token` None: none is required. `choose`: begin with the start screen. Of a dropped clip at most
        `dropped_frames` are read."""
        self.session, self.controls, self.clock = session, controls, clock
        self.start_screen, self.dropped_frames = StartScreen(session, choose), dropped_frames
        self.thumbnails: list[bytes] = []  # all messages of the start screen so far
        self.run_name = secrets.token_hex(8)
        self.local, self.token = is_loopback(host), token
        self.player: Player | None = None
        self.player_connected = asyncio.Event()  # set while there is a player
        # Names of commands, numbers of start places, dropped files.
        self.commands: deque[str | int | Dropped] = deque(maxlen=COMMANDS_WAITING)
        self.overlay_time = -1e9  # when the overlay was drawn last
        self.overlay_outdated = True  # the world has changed since

    # ------------------------------------------------------------ the world loop

    async def run(self) -> None:
        """Makes fps steps per second while a player is connected, until it is cancelled or a step fails."""
        with ThreadPoolExecutor(1, "world") as worker:
            loop = asyncio.get_running_loop()
            while True:
                await self.player_connected.wait()
                player, action = self.player, None
                if player.greeted:
                    await loop.run_in_executor(worker, self.clock.wait)
                    await asyncio.sleep(0)  # handles the messages that arrived during the wait
                    if self.player is not player:
                        continue
                    # Taken also while the world is paused, so that input of the pause does not act later.
                    action = self.controls.take_action()
                command = self.commands.popleft() if self.commands and player.greeted else None
                if command == "overlay":
                    player.wants_overlay, self.overlay_outdated = not player.wants_overlay, True
                player.greeted = True
                update = await loop.run_in_executor(
                    worker, self.advance, action, command, player.wants_overlay
                )
                if update.thumbnail is not None:
                    self.thumbnails.append(update.thumbnail)
                player.offer(update)

    def advance(
        self, action: np.ndarray | None, command: str | int | Dropped | None, wants_overlay: bool
    ) -> Update:
        """Runs a command and makes a step if one is due; on the start screen it turns one of the places.

        Action None: no step, the world is shown as it stands. After a restart the start picture is shown.
        """
        session, update, restarts = self.session, Update(), self.session.restarts
        if command is not None:
            update.message = self.run_command(command)
        if session.restarts > restarts:
            self.start_screen.close()
        start = action is None or session.restarts > restarts
        if start or command == "pause":  # a pause does not count as slow
            self.clock.restart()
        choosing = self.start_screen.is_open
        step = session.step_due and not start and not choosing
        if step:
            session.step(action)
        elif choosing:
            update.thumbnail = self.thumbnail(self.start_screen.advance())
        update.message = "; ".join(filter(None, (session.take_notices(), update.message)))
        if step or start or command is not None:
            self.overlay_outdated = True
            update.frame = self.frame()
        now = time.monotonic()
        if wants_overlay and self.overlay_outdated and now - self.overlay_time >= OVERLAY_SECONDS:
            self.overlay_time, self.overlay_outdated = now, False
            picture = overlay(session)
            update.overlay = b"" if picture is None else png(picture)
        return update

    def run_command(self, command: str | int | Dropped) -> str:
        """Runs a command, goes to a start place, or starts from a file -> the message for the player."""
        if isinstance(command, int):
            return self.start_screen.choose(command)
        if isinstance(command, Dropped):
            return self.add(command)
        if command == "places":
            if self.start_screen.is_open:
                self.start_screen.close()
            else:
                self.start_screen.open()
            return ""
        return "" if command == "overlay" else self.session.command(command)

    def add(self, dropped: Dropped) -> str:
        """Starts from a dropped file -> the message for the player."""
        if dropped.problem:
            return dropped.problem
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / dropped.file_name
            path.write_bytes(dropped.content)
            return self.start_screen.add(path, self.dropped_frames).replace(f"{path}", path.name)

    def thumbnail(self, place: int | None) -> bytes | None:
        """The message with the newest picture of a place on the start screen; None without a place."""
        if place is None:
            return None
        pictures = self.start_screen.turns[place].pictures
        name = self.start_screen.names[place]
        header = {"kind": "thumbnail", "place": place, "name": name, "number": len(pictures) - 1}
        return pack(header, jpeg(pictures[-1]))

    def frame(self) -> tuple[dict, bytes]:
        """The world as it stands: header and PNG. While comparing, or with the inset, the truth is on the
        left of it."""
        session, picture = self.session, self.session.picture
        if session.truth is not None:
            picture = np.concatenate([session.truth, picture], 1)
        stats = {**session.stats(), "steps_per_second": round(self.clock.rate, 1)}
        action = [round(float(a), 3) for a in session.action]
        header = {
            "kind": "frame",
            "stats": stats,
            "action": action,
            "place": session.start_index,
            "choosing": self.start_screen.is_open,
            "truth": session.truth is not None,
        }
        return header, png(picture)

    # ------------------------------------------------------------ requests

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Refuses requests without the token, and those of other sites' pages in the player's browser."""
        try:
            address = urlsplit(f"//{request.host}")
            name, port = address.hostname, address.port or 80
        except ValueError:
            name, port = None, 0
        if self.local and not is_loopback(name):  # another site's name that resolves to this machine
            raise web.HTTPForbidden(
                text=f"This server is for this machine only; open http://localhost/, not {request.host}.\n"
            )
        cookie = f"ochre_token_{port}"  # cookies know no ports
        in_address = self.is_token(request.query.get("token"))
        if not (in_address or self.is_token(request.cookies.get(cookie))):
            raise web.HTTPForbidden(
                text="The token is missing or wrong; open the address that live_inference.py printed.\n"
            )
        if request.method != "GET":
            raise web.HTTPMethodNotAllowed(request.method, ["GET"])
        if request.path == "/play":
            return await self.play(request)
        if request.path != "/":
            raise web.HTTPNotFound()
        if "token" in request.query:  # from now on in a cookie: an address stays in the browser's history
            there = web.HTTPSeeOther("/")
            if self.token is not None:
                there.set_cookie(cookie, self.token, httponly=True, samesite="Lax")
            raise there
        return web.Response(text=PAGE.read_text("utf-8"), content_type="text/html")

    def is_token(self, given: str | None) -> bool:
        """Whether this is the token. Anything is if none is required."""
        return self.token is None or secrets.compare_digest(
            (given or "").encode(errors="replace"), self.token.encode()
        )

    async def play(self, request: web.BaseRequest) -> web.StreamResponse:
        """GET /play: the WebSocket of the page that plays. A second page is refused with BUSY."""
        try:
            origin = urlsplit(request.headers.get("Origin", "")).netloc
        except ValueError:
            origin = ""
        if origin.lower() != request.host.lower():
            raise web.HTTPForbidden(text="Only this server's own page may play.\n")
        connection = web.WebSocketResponse(
            heartbeat=HEARTBEAT_SECONDS, max_msg_size=MAX_MESSAGE, compress=False, autoping=False
        )
        connection.headers.update(HEADERS)
        await connection.prepare(request)
        if self.player is not None:
            await self.close(
                request, connection, BUSY, "another page is playing; only one can play at a time"
            )
            return connection
        player = self.player = Player(connection, self.thumbnails)
        self.player_connected.set()
        greeting = hello(self.clock.fps, self.run_name, self.start_screen.names)
        sender = asyncio.create_task(player.send(greeting))
        try:
            problem = await self.listen(player)
        finally:
            self.player = None
            self.player_connected.clear()
            self.controls.release_all()
            self.commands.clear()
            sender.cancel()
        if problem:
            await self.close(request, connection, MALFORMED, problem)
        return connection

    async def listen(self, player: Player) -> str:
        """Handles messages until the page disconnects (-> "") or sends a malformed one (-> the reason).

        A page that sends more than MAX_MESSAGES has to wait, so that a flood does not slow the world.
        """
        began, count = 0.0, 0
        async for message in player.connection:
            now = time.monotonic()
            if now - began > MESSAGES_SECONDS:
                began, count = now, 0
            count += 1
            if count > MAX_MESSAGES:
                await asyncio.sleep(began + MESSAGES_SECONDS - now)
            if message.type == WSMsgType.ERROR:  # aiohttp has closed the connection
                return ""
            if message.type == WSMsgType.PING:
                await player.connection.pong(message.data)
            if message.type in (WSMsgType.PING, WSMsgType.PONG):
                continue
            try:
                if message.type == WSMsgType.BINARY:
                    if (dropped := player.receive(message.data)) is not None:
                        self.commands.append(dropped)
                    continue
                if message.type != WSMsgType.TEXT:
                    return "not text"
                kind, value = parse(message.data)
            except ValueError as error:
                return str(error)
            if kind == "press":
                self.controls.press(value)
            elif kind == "release":
                self.controls.release(value)
            elif kind == "look":
                self.controls.look(*value)
            elif kind in ("command", "place"):
                self.commands.append(value)
            elif kind == "file":
                player.file, player.file_content = tuple(value), bytearray()
            elif kind == "shown":
                player.shown = value
                player.wake.set()
            else:
                self.controls.release_all()
        return ""

    async def close(
        self, request: web.BaseRequest, connection: web.WebSocketResponse, code: int, reason: str
    ) -> None:
        """Closes a connection; aborts it if the page does not answer."""
        short = reason.encode()[:120].decode(errors="ignore").encode()  # at most 123 bytes fit
        try:
            await asyncio.wait_for(connection.close(code=code, message=short), CLOSE_SECONDS)
        except asyncio.TimeoutError:
            if request.transport is not None:
                request.transport.abort()

    async def dismiss(self) -> None:
        """Closes the player's connection when the server stops."""
        if self.player is not None:
            with suppress(asyncio.TimeoutError):
                closing = self.player.connection.close(
                    code=WSCloseCode.GOING_AWAY, message=b"the server stopped"
                )
                await asyncio.wait_for(closing, CLOSE_SECONDS)

    # ------------------------------------------------------------ start and stop

    async def serve(self, host: str, port: int) -> None:
        """Serves until it is cancelled. Raises OSError if nothing can be bound to the port."""
        connections = Connections(self.answer)
        try:
            listener = await asyncio.get_running_loop().create_server(
                connections.new, host or None, port, backlog=BACKLOG
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(f"port {port} of {host} is in use; give another one with --port") from None
            raise OSError(f"cannot serve on {host}, port {port} (--host, --port): {error}") from None
        try:
            print(self.address(host, listener.sockets[0].getsockname()[1]), flush=True)
            await self.run()
        finally:
            listener.close()
            await self.dismiss()
            await connections.close(CLOSE_SECONDS)

    def address(self, host: str, port: int) -> str:
        """The message that names the address to open."""
        everywhere = host in ("", "0.0.0.0", "::")
        shown = socket.gethostname() if everywhere else host
        query = "" if self.token is None else "?" + urlencode({"token": self.token})
        shown, target = (f"[{h}]" if ":" in h else h for h in (shown, "127.0.0.1" if everywhere else host))
        return (
            f"play at http://{shown}:{port}/{query} (Ctrl-C stops)\n"
            f"from another machine: ssh -L {port}:{target}:{port} USER@HOST "
            f"and open http://localhost:{port}/{query} there"
        )


def serve(
    session: Session,
    fps: float,
    degrees_per_pixel: float,
    host: str = "127.0.0.1",
    port: int = 8000,
    require_token: bool = False,
    choose: bool = False,
    dropped_frames: int | None = None,
) -> None:
    """Serves the session to one page at a time, until Ctrl-C. The caller ends the session.

    `degrees_per_pixel`: turn for a CSS pixel of mouse motion. On any host but loopback, or with
    `require_token`, the page asks for a random token, which is in the address that is printed. Raises OSError
    if nothing can be bound to the port. `choose` and `dropped_frames`: see `Server`.
    """
    token = secrets.token_urlsafe(16) if require_token or not is_loopback(host) else None

    async def run() -> None:  # asyncio's objects belong to the running loop
        controls = Controls(fps, session.world.degrees_per_unit, degrees_per_pixel)
        server = Server(session, controls, StepClock(fps), host, token, choose, dropped_frames)
        await server.serve(host, port)

    with suppress(KeyboardInterrupt):
        asyncio.run(run())
