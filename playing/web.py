"""Play in a browser: serves one page, sends it the world's pictures and takes its keys, mouse and thumbs.

Over the WebSocket /play go

    server -> page   once, text: {"kind": "hello", "fps", "controls", "commands", "view", "help"}; then binary
                     [n: uint32 little-endian] [n bytes of JSON] [a PNG, empty where there is no picture]
                     with "kind": "frame" (facts, action, beliefs, message) or "beliefs"
    page -> server   text, one of {"press": control}, {"release": control}, {"look": [right, down]} in CSS
                     pixels, {"command": name}, {"blur": true}, {"seen": how many binary messages so far}
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
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import cv2
import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web

from playing.bindings import COMMANDS, CONTROLS, VIEW_COMMANDS, Binding
from playing.controls import Controls, StepClock
from playing.overlay import beliefs
from playing.session import Session

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address has the token in it
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self' ws: wss:; frame-ancestors 'none'",
}
BUSY, NOT_UNDERSTOOD = 4001, 4002  # close codes of our own
FRAMES_WAITING = 2  # to be sent; a slow page misses the older ones
# Sent and not seen by the page yet. More would pile up in the buffers of the system, or of an ssh tunnel,
# where nobody can drop them; fewer would slow down a page that is far away.
IN_FLIGHT = 8
COMMANDS_WAITING = 8
BELIEFS_SECONDS = 0.25
HEARTBEAT_SECONDS = 10.0
CLOSE_SECONDS = 2.0  # that a page has to answer when it is told to go
MAX_MESSAGE = 4096  # bytes
MAX_LOOK = 1e6  # pixels
CONTROL_NAMES = frozenset(b.does for b in CONTROLS)
COMMAND_NAMES = frozenset(b.does for b in COMMANDS) | {"beliefs"}  # the page sees to the rest by itself


def is_loopback(host: str | None) -> bool:
    """Whether a name or address can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def png(picture: np.ndarray) -> bytes:
    """A picture [H, W, 3] uint8 as a PNG, made quickly rather than small."""
    bgr = np.ascontiguousarray(picture[..., ::-1])
    return cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def pack(header: dict, picture: bytes) -> bytes:
    """A binary message."""
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + picture


def hello(fps: float) -> dict:
    """What a page has to know before the first picture."""

    def keys(bindings: tuple[Binding, ...]) -> list[dict[str, str]]:
        return [asdict(binding) for binding in bindings]

    said = [b.says for b in (*CONTROLS, *COMMANDS, *VIEW_COMMANDS) if b.says]
    return {
        "kind": "hello",
        "fps": fps,
        "controls": keys(CONTROLS),
        "commands": keys(COMMANDS),
        "view": keys(VIEW_COMMANDS),
        "help": [*said, "Esc: free the mouse"],
    }


def parse(text: str) -> tuple[str, object]:
    """A page's message -> what it says and of what. Raises ValueError, with a reason, if it is malformed."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(content, dict) or len(content) != 1:
        raise ValueError("not an object with one entry")
    ((says, value),) = content.items()
    if says in ("press", "release"):
        fine = isinstance(value, str) and value in CONTROL_NAMES
    elif says == "command":
        fine = isinstance(value, str) and value in COMMAND_NAMES
    elif says == "look":
        # JSON of Python's kind has NaN and Infinity too; neither is within the limit.
        fine = isinstance(value, list) and len(value) == 2
        fine = fine and all(type(v) in (int, float) and abs(v) <= MAX_LOOK for v in value)
    elif says == "seen":
        fine = type(value) is int
    else:
        fine = says == "blur"
    if not fine:
        raise ValueError(f"unknown: {text[:60]}")
    return says, value


class Player:
    """The page that plays, and what waits to be sent to it."""

    def __init__(self, connection: web.WebSocketResponse):
        self.connection = connection
        self.frames: deque[tuple[dict, bytes]] = deque(maxlen=FRAMES_WAITING)  # the oldest makes room
        self.beliefs: bytes | None = None  # only the latest
        self.messages: list[str] = []  # to tell the player; they go with the next frame, none is dropped
        self.wants_beliefs = False
        self.met = False  # whether it was shown the world as it stands
        self.sent = self.seen = 0  # binary messages
        self.wake = asyncio.Event()

    def offer(self, frame: tuple[dict, bytes] | None, believed: bytes | None, message: str) -> None:
        """Takes what is to be sent; never waits."""
        if frame is not None:
            self.frames.append(frame)
        if believed is not None:
            self.beliefs = believed
        if message:
            self.messages.append(message)
        self.wake.set()

    def next_message(self) -> bytes | None:
        """The binary message to be sent next; None if there is none, or if the page has not kept up."""
        if self.sent - self.seen >= IN_FLIGHT:
            return None
        if self.beliefs is not None:
            picture, self.beliefs = self.beliefs, None
            return pack({"kind": "beliefs"}, picture)
        if self.frames:
            header, picture = self.frames.popleft()
            message, self.messages = "; ".join(self.messages), []
            return pack({**header, "beliefs": self.wants_beliefs, "message": message}, picture)
        return None

    async def send(self, fps: float) -> None:
        """Sends what waits, as fast as the page takes it, until the connection ends."""
        with suppress(ConnectionError):  # the one who listens sees the end too
            await self.connection.send_json(hello(fps))
            while True:
                await self.wake.wait()
                self.wake.clear()
                while (message := self.next_message()) is not None:
                    self.sent += 1
                    await self.connection.send_bytes(message)


class Server:
    """The world's loop and the pages that look at it. Everything that touches the session or the clock runs
    in one worker thread; everything else in the event loop, which therefore always answers."""

    def __init__(self, session: Session, controls: Controls, clock: StepClock, host: str, token: str | None):
        """`token` None: none is needed."""
        self.session, self.controls, self.clock = session, controls, clock
        self.local, self.token = is_loopback(host), token
        self.player: Player | None = None
        self.arrived = asyncio.Event()  # set while there is a player
        self.commands: deque[str] = deque(maxlen=COMMANDS_WAITING)
        self.believed_at = -1e9  # when the beliefs were painted last
        self.believed_old = True  # the world has moved since
        self.app = web.Application(middlewares=[self.guard])
        self.app.router.add_get("/", self.page)
        self.app.router.add_get("/play", self.play)
        self.app.on_shutdown.append(self.dismiss)

    # ------------------------------------------------------------ the world

    async def run(self) -> None:
        """Takes fps steps a second while somebody plays, until it is cancelled or a step fails."""
        with ThreadPoolExecutor(1, "world") as worker:
            loop = asyncio.get_running_loop()
            while True:
                await self.arrived.wait()
                player, action = self.player, None
                if player.met:
                    await loop.run_in_executor(worker, self.clock.wait)
                    await asyncio.sleep(0)  # takes in what came meanwhile
                    if self.player is not player:
                        continue
                    # Taken also while the world is paused: what is done meanwhile does not count later.
                    action = self.controls.take_action()
                command = self.commands.popleft() if self.commands and player.met else None
                if command == "beliefs":
                    player.wants_beliefs, self.believed_old = not player.wants_beliefs, True
                player.met = True
                news = await loop.run_in_executor(worker, self.advance, action, command, player.wants_beliefs)
                player.offer(*news)

    def advance(
        self, action: np.ndarray | None, command: str | None, wants_beliefs: bool
    ) -> tuple[tuple[dict, bytes] | None, bytes | None, str]:
        """Does a command and makes a step, if one is due -> the frame to show, or None if nothing changed;
        the beliefs, or None if there are no new ones; what to tell the player.

        Action None: no step, the world is shown as it stands. After a command that starts over, its start is.
        """
        session, message, starts = self.session, "", self.session.starts
        if command not in (None, "beliefs"):
            try:
                message = session.command(command)
            except OSError as error:  # a recording that cannot be written
                message = str(error)
        start = action is None or session.starts > starts
        if start:
            self.clock.restart()
        steps = session.moves and not start
        if steps:
            session.step(action)
        frame = believed = None
        if steps or start or command is not None:
            self.believed_old = True
            frame = self.frame()
        if wants_beliefs and self.believed_old and time.monotonic() - self.believed_at >= BELIEFS_SECONDS:
            self.believed_at, self.believed_old = time.monotonic(), False
            picture = beliefs(session)
            believed = b"" if picture is None else png(picture)
        return frame, believed, message

    def frame(self) -> tuple[dict, bytes]:
        """The world as it stands: header and PNG; comparing, the truth lies left of the rollout."""
        session, picture = self.session, self.session.picture
        if session.truth is not None:
            picture = np.concatenate([session.truth, picture], 1)
        facts = {**session.facts(), "steps_a_second": round(self.clock.rate, 1)}
        action = [round(float(a), 3) for a in session.action]
        return {"kind": "frame", "facts": facts, "action": action}, png(picture)

    # ------------------------------------------------------------ the pages

    @web.middleware
    async def guard(self, request: web.Request, handler) -> web.StreamResponse:
        """Refuses who has no business here, also another site's page in the player's own browser."""
        try:
            name = urlsplit(f"//{request.host}").hostname
        except ValueError:
            name = None
        if self.local and not is_loopback(name):  # another site's name, made to point here
            raise web.HTTPForbidden(
                text=f"This world is on this machine only; open http://localhost/, not {request.host}.\n"
            )
        if self.token is not None:
            given = request.query.get("token", "").encode(errors="replace")
            if not secrets.compare_digest(given, self.token.encode()):
                raise web.HTTPForbidden(
                    text="The token is missing or wrong: open the address that live_inference.py printed.\n"
                )
        return await handler(request)

    async def page(self, request: web.Request) -> web.Response:
        """GET /"""
        return web.Response(text=PAGE.read_text("utf-8"), content_type="text/html", headers=PAGE_HEADERS)

    async def play(self, request: web.Request) -> web.StreamResponse:
        """GET /play: lets one page play, tells a second one that it cannot."""
        try:
            origin = urlsplit(request.headers.get("Origin", "")).netloc
        except ValueError:
            origin = ""
        if origin.lower() != request.host.lower():
            raise web.HTTPForbidden(text="Only this server's own page may play.\n")
        connection = web.WebSocketResponse(
            heartbeat=HEARTBEAT_SECONDS, max_msg_size=MAX_MESSAGE, compress=False
        )
        await connection.prepare(request)
        if self.player is not None:
            await self.close(request, connection, BUSY, "somebody is playing; only one can play at a time")
            return connection
        player = self.player = Player(connection)
        self.arrived.set()
        sender = asyncio.create_task(player.send(self.clock.fps))
        try:
            problem = await self.listen(player)
        finally:
            self.player = None
            self.arrived.clear()
            self.controls.let_go()
            self.commands.clear()
            sender.cancel()
        if problem:
            await self.close(request, connection, NOT_UNDERSTOOD, problem)
        return connection

    async def listen(self, player: Player) -> str:
        """Takes in what the page says, until it goes or says something malformed -> what was wrong."""
        async for message in player.connection:
            if message.type == WSMsgType.ERROR:  # aiohttp has closed the connection
                return ""
            if message.type != WSMsgType.TEXT:
                return "not text"
            try:
                says, value = parse(message.data)
            except ValueError as error:
                return str(error)
            if says == "press":
                self.controls.press(value)
            elif says == "release":
                self.controls.release(value)
            elif says == "look":
                self.controls.look(*value)
            elif says == "command":
                self.commands.append(value)
            elif says == "seen":
                player.seen = value
                player.wake.set()
            else:
                self.controls.let_go()
        return ""

    async def close(
        self, request: web.Request, connection: web.WebSocketResponse, code: int, reason: str
    ) -> None:
        """Ends a connection, also one whose page does not read."""
        cut = reason.encode()[:120].decode(errors="ignore").encode()  # a close frame has room for 123 bytes
        try:
            await asyncio.wait_for(connection.close(code=code, message=cut), CLOSE_SECONDS)
        except asyncio.TimeoutError:
            if request.transport is not None:
                request.transport.abort()

    async def dismiss(self, app: web.Application) -> None:
        """Tells the player that the server stops."""
        if self.player is not None:
            with suppress(asyncio.TimeoutError):
                closing = self.player.connection.close(
                    code=WSCloseCode.GOING_AWAY, message=b"the server stopped"
                )
                await asyncio.wait_for(closing, CLOSE_SECONDS)

    # ------------------------------------------------------------ coming and going

    async def serve(self, host: str, port: int) -> None:
        """Serves until it is cancelled. Raises OSError if nothing can be bound to the port."""
        runner = web.AppRunner(self.app, access_log=None, shutdown_timeout=CLOSE_SECONDS)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise OSError(f"port {port} of {host} is in use; give another one with --port") from None
                raise OSError(f"cannot serve on {host}, port {port} (--host, --port): {error}") from None
            print(self.address(host, runner.addresses[0][1]), flush=True)
            await self.run()
        finally:
            await runner.cleanup()

    def address(self, host: str, port: int) -> str:
        """What to open, in words."""
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
    token: str | None = None,
) -> None:
    """Lets one browser play the session, until Ctrl-C; ending the session is the caller's.

    `degrees_per_pixel`: turn for a CSS pixel of mouse motion. `token` None: none on loopback, a random one on
    any other host. Raises OSError if nothing can be bound to the port.
    """
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(16)

    async def run() -> None:  # what asyncio makes belongs to the running loop
        controls = Controls(fps, session.world.degrees_per_unit, degrees_per_pixel)
        await Server(session, controls, StepClock(fps), host, token).serve(host, port)

    with suppress(KeyboardInterrupt):
        asyncio.run(run())
