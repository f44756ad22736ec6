"""Play in a browser: serves one page, sends it pictures, and receives its keys, mouse motion and touches.

Messages on the WebSocket /play:

    server -> page   text, once: {"kind": "hello", "fps", "controls", "commands", "view", "help"}; then binary
                     [n: uint32 little-endian] [n bytes of JSON] [a PNG, empty if there is no picture]
                     with "kind": "frame" (stats, action, overlay, message) or "overlay"
    page -> server   text, one of {"press": control}, {"release": control}, {"look": [right, down]} in CSS
                     pixels, {"command": name}, {"blur": true}, {"shown": number of binary messages so far}
"""

import asyncio
import errno
import ipaddress
import json
import secrets
import socket
import struct
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
MAX_MESSAGES, MESSAGES_SECONDS = 50, 0.1  # messages of a page in so many seconds; more wait in its buffers
CONTROL_NAMES = frozenset(b.name for b in CONTROLS)
COMMAND_NAMES = frozenset(b.name for b in COMMANDS) | {"overlay"}  # the page handles the other view commands


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


def pack(header: dict, picture: bytes) -> bytes:
    """A binary message."""
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + picture


def hello(fps: float) -> dict:
    """The first message: what a page has to know before the first picture."""

    def keys(bindings: tuple[Binding, ...]) -> list[dict[str, str]]:
        return [asdict(binding) for binding in bindings]

    return {
        "kind": "hello",
        "fps": fps,
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
    else:
        valid = kind == "blur"
    if not valid:
        raise ValueError(f"unknown: {text[:60]}")
    return kind, value


@dataclass
class Update:
    """The result of one turn of the world loop."""

    frame: tuple[dict, bytes] | None = None  # header and PNG; None if nothing changed
    overlay: bytes | None = None  # PNG, empty if there is no overlay; None if there is no new one
    message: str = ""  # for the player


class Player:
    """The page that plays, and the messages waiting to be sent to it."""

    def __init__(self, connection: web.WebSocketResponse):
        self.connection = connection
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
        return None

    async def send(self, fps: float) -> None:
        """Sends the queue, as fast as the page accepts it, until the connection ends."""
        with suppress(ConnectionError):  # `Server.listen` sees the end too
            await self.connection.send_json(hello(fps))
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

    def __init__(self, session: Session, controls: Controls, clock: StepClock, host: str, token: str | None):
        """`token` None: none is required."""
        self.session, self.controls, self.clock = session, controls, clock
        self.local, self.token = is_loopback(host), token
        self.player: Player | None = None
        self.player_connected = asyncio.Event()  # set while there is a player
        self.commands: deque[str] = deque(maxlen=COMMANDS_WAITING)
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
                player.offer(
                    await loop.run_in_executor(worker, self.advance, action, command, player.wants_overlay)
                )

    def advance(self, action: np.ndarray | None, command: str | None, wants_overlay: bool) -> Update:
        """Runs a command and makes a step if one is due.

        Action None: no step, the world is shown as it stands. After a restart the start picture is shown.
        """
        session, update, restarts = self.session, Update(), self.session.restarts
        if command not in (None, "overlay"):
            update.message = session.command(command)
        start = action is None or session.restarts > restarts
        if start:
            self.clock.restart()
        step = session.step_due and not start
        if step:
            session.step(action)
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

    def frame(self) -> tuple[dict, bytes]:
        """The world as it stands: header and PNG. While comparing, the truth is on the left."""
        session, picture = self.session, self.session.picture
        if session.truth is not None:
            picture = np.concatenate([session.truth, picture], 1)
        stats = {**session.stats(), "steps_per_second": round(self.clock.rate, 1)}
        action = [round(float(a), 3) for a in session.action]
        return {"kind": "frame", "stats": stats, "action": action}, png(picture)

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
        player = self.player = Player(connection)
        self.player_connected.set()
        sender = asyncio.create_task(player.send(self.clock.fps))
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
            if message.type != WSMsgType.TEXT:
                return "not text"
            try:
                kind, value = parse(message.data)
            except ValueError as error:
                return str(error)
            if kind == "press":
                self.controls.press(value)
            elif kind == "release":
                self.controls.release(value)
            elif kind == "look":
                self.controls.look(*value)
            elif kind == "command":
                self.commands.append(value)
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
) -> None:
    """Serves the session to one page at a time, until Ctrl-C. The caller ends the session.

    `degrees_per_pixel`: turn for a CSS pixel of mouse motion. On any host but loopback, or with
    `require_token`, the page asks for a random token, which is in the address that is printed. Raises OSError
    if nothing can be bound to the port.
    """
    token = secrets.token_urlsafe(16) if require_token or not is_loopback(host) else None

    async def run() -> None:  # asyncio's objects belong to the running loop
        controls = Controls(fps, session.world.degrees_per_unit, degrees_per_pixel)
        await Server(session, controls, StepClock(fps), host, token).serve(host, port)

    with suppress(KeyboardInterrupt):
        asyncio.run(run())
