"""playing/web.py and playing/page.html: the server with real sockets, the page in Chromium."""

import asyncio
import json
import os
import re
import signal
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import cv2
import numpy as np
import pytest
from play_session import FPS, SENS, make_session
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from dataset.actions import JUMP, MOVE_X, MOVE_Z, PITCH, YAW
from playing import connections, web
from playing.controls import Controls, StepClock
from playing.session import Session
from playing.start_screen import TURN_PICTURES

PATIENCE = 30.0  # seconds to wait for what an idle machine does at once
CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


@pytest.fixture
def session(tiny, tmp_path):
    return make_session(tiny, tmp_path)


class Gate:
    """A clock that waits: `let` lets so many steps pass, `open` all of them, without waiting."""

    def __init__(self, is_open: bool = False):
        self.time, self.is_open, self.passes = 100.0, is_open, threading.Semaphore(0)

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        if not self.is_open:
            self.passes.acquire()
        self.time += seconds + 1e-9

    def let(self, steps: int = 1) -> None:
        self.passes.release(steps)

    def open(self) -> None:
        self.is_open = True
        self.let()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def until(condition, what: str) -> None:
    """Waits until the condition is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"did not happen: {what}"
        await asyncio.sleep(0.005)


class Page:
    """A page's end of the WebSocket, without a browser."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse):
        self.connection, self.received = connection, 0

    async def send(self, **message) -> None:
        await self.connection.send_json(message)

    async def receive(self) -> tuple[dict, bytes]:
        """The next message: header and PNG."""
        message = await self.connection.receive(PATIENCE)
        if message.type == aiohttp.WSMsgType.TEXT:
            return json.loads(message.data), b""
        assert message.type == aiohttp.WSMsgType.BINARY, message
        self.received += 1
        await self.send(shown=self.received)
        (length,) = struct.unpack_from("<I", message.data)
        return json.loads(message.data[4 : 4 + length]), message.data[4 + length :]

    async def receive_until(self, condition) -> tuple[dict, bytes]:
        """Reads messages up to the first for which the condition is true."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            header, picture = await self.receive()
            if condition(header):
                return header, picture
        raise AssertionError("no such message")

    async def closed(self) -> tuple[int, str]:
        """Reads until the connection is closed -> close code and reason."""
        while True:
            message = await self.connection.receive(PATIENCE)
            if message.type == aiohttp.WSMsgType.CLOSE:
                return message.data, message.extra
            assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message


class Served:
    """A running server and a client."""

    def __init__(self, server: web.Server, port: int, client: aiohttp.ClientSession):
        self.server, self.port, self.client = server, port, client
        self.url = f"http://127.0.0.1:{port}"

    async def connect(self, query: str = "", **headers: str) -> Page:
        headers = {"Origin": self.url, **headers}
        return Page(await self.client.ws_connect(f"{self.url}/play{query}", headers=headers))

    async def refused(self, **headers: str) -> int:
        """The status with which /play refuses these headers."""
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await self.client.ws_connect(f"{self.url}/play", headers=headers)
        return caught.value.status


@asynccontextmanager
async def served(session: Session, gate: Gate | None = None, token: str | None = None, choose: bool = False):
    """The server on a free port, in this event loop; gate None: an open one. `choose`: with the start
    screen."""
    gate = gate or Gate(is_open=True)
    server = web.Server(
        session, Controls(FPS, 15.0, SENS), StepClock(FPS, gate.now, gate.sleep), "127.0.0.1", token, choose
    )
    port = free_port()
    task = asyncio.create_task(server.serve("127.0.0.1", port))
    try:
        async with aiohttp.ClientSession() as client:
            end = time.monotonic() + PATIENCE
            while True:
                assert not task.done() and time.monotonic() < end, "the server did not start"
                with suppress(aiohttp.ClientConnectionError):
                    async with client.get(f"http://127.0.0.1:{port}/"):
                        break
                await asyncio.sleep(0.01)
            yield Served(server, port, client)
            assert not task.done(), "the server failed"
    finally:
        gate.open()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# ---------------------------------------------------------------- messages


def test_the_page_needs_no_other_files(session):
    async def scenario():
        async with served(session) as at, at.client.get(at.url + "/") as answer:
            assert answer.status == 200 and answer.content_type == "text/html"
            assert "no-referrer" in answer.headers["Referrer-Policy"]
            return await answer.text()

    text = asyncio.run(scenario())
    assert "<title>Ochre</title>" in text
    assert not re.findall(r"https?://|src=|@import|url\(", text)


def test_the_hello_contains_the_key_map_and_pictures_follow(session):
    async def scenario():
        async with served(session) as at:
            page = await at.connect()
            hello, _ = await page.receive()
            assert hello["kind"] == "hello" and hello["fps"] == FPS
            assert {(b["name"], b["code"]) for b in hello["controls"]} == {
                (b.name, b.code) for b in web.CONTROLS
            }
            assert len(hello["commands"]) == len(web.COMMANDS) and len(hello["view"]) == len(
                web.VIEW_COMMANDS
            )
            first, picture = await page.receive()
            assert first["kind"] == "frame" and first["stats"]["step"] == 0  # the start picture
            image = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
            assert image.shape == (16, 32, 3)
            second, _ = await page.receive()
            assert second["stats"]["step"] >= 1 and len(second["action"]) == 5

    asyncio.run(scenario())


def test_the_picture_arrives_unchanged(session):
    async def scenario():
        async with served(session, Gate()) as at:
            page = await at.connect()
            await page.receive()
            return (await page.receive())[1]

    image = cv2.imdecode(np.frombuffer(asyncio.run(scenario()), np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(image[..., ::-1], session.picture)


def test_input_before_a_step_acts_on_it(session):
    gate = Gate()

    async def scenario():
        async with served(session, gate) as at:
            page, controls = await at.connect(), at.server.controls

            async def step() -> list[float]:
                steps = len(session.actions_given)
                gate.let()
                await until(lambda: len(session.actions_given) > steps, "a step")
                return session.actions_given[-1]

            assert await step() == [0] * 5
            # The server waits for the next step, so this input is in time for it.
            await page.send(press="forward")
            await page.send(press="jump")
            await page.send(release="jump")
            await page.send(look=[20, -8.5])
            await until(lambda: controls.pending_turn[1] != 0, "the messages")
            action = await step()
            assert [action[MOVE_X], action[MOVE_Z], action[JUMP]] == [0, 1, 1]
            assert np.allclose(action[:2], [20 * SENS / 15, -8.5 * SENS / 15])
            assert await step() == [0, 0, 0, 1, 0]
            await page.send(blur=True)
            await until(lambda: not controls.pressed, "the release")
            assert await step() == [0] * 5
            assert len(session.actions_given) == 4

    asyncio.run(scenario())


def test_no_more_than_fps_steps_a_second(session):
    """In real time, however much the page sends."""

    async def scenario():
        port = free_port()
        server = web.Server(session, Controls(FPS), StepClock(FPS), "127.0.0.1", None)
        task = asyncio.create_task(server.serve("127.0.0.1", port))
        await asyncio.sleep(0.3)
        async with aiohttp.ClientSession() as client:
            url = f"http://127.0.0.1:{port}"
            page = Page(await client.ws_connect(f"{url}/play", headers={"Origin": url}))
            began = time.monotonic()
            while time.monotonic() - began < 1.5:
                for _ in range(20):
                    await page.send(look=[1, 0])
                    await page.send(shown=10**6)
                await asyncio.sleep(0.005)
            steps, seconds = len(session.actions_given), time.monotonic() - began
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return steps, seconds

    steps, seconds = asyncio.run(scenario())
    assert 2 < steps <= seconds * FPS + 1


MALFORMED = [
    "", "walk", "[" * 3000, "[]", "1", "{}", '{"press": "forward", "jump": true}', '{"press": "fly"}',
    '{"press": ["forward"]}', '{"release": {}}', '{"look": 3}', '{"look": [1]}', '{"look": ["1", 2]}',
    '{"look": [NaN, 0]}', '{"look": [Infinity, 0]}', f'{{"look": [1{"0" * 400}, 0]}}', '{"look": [true, 0]}',
    '{"place": -1}', '{"place": true}', '{"place": "forest"}', '{"file": ["photo.png", 0]}',
    '{"file": ["photo.png", 99999999999]}', '{"file": ["photo.png"]}', '{"file": [1, 2]}',
    '{"command": "quit"}', '{"command": "start place 10"}', '{"command": ["next"]}', '{"shown": "all"}',
    '{"walk": true}',
]  # fmt: skip


def test_malformed_messages_end_the_connection_only(session):
    async def scenario():
        async with served(session) as at:
            for text in MALFORMED:
                page = await at.connect()
                await page.connection.send_str(text)
                code, reason = await page.closed()
                assert code == web.MALFORMED and reason, text
                await page.connection.close()
            page = await at.connect()
            await page.connection.send_bytes(b'{"blur": true}')
            assert await page.closed() == (web.MALFORMED, "not text")
            page = await at.connect()
            await page.connection.send_str(json.dumps({"command": "x" * 10_000}))
            assert (await page.closed())[0] == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
            page = await at.connect()
            steps = session.steps
            await page.receive_until(
                lambda header: header["kind"] == "frame" and header["stats"]["step"] > steps
            )

    asyncio.run(scenario())


def test_every_control_and_command_of_the_key_map_is_understood():
    for binding in web.CONTROLS:
        assert web.parse(json.dumps({"press": binding.name})) == ("press", binding.name)
    for binding in web.COMMANDS:
        assert web.parse(json.dumps({"command": binding.name})) == ("command", binding.name)


# ---------------------------------------------------------------- access


def test_other_sites_and_other_names_are_refused(session):
    async def scenario():
        async with served(session) as at:
            here = f"localhost:{at.port}"
            assert await at.refused() == 403  # no Origin at all
            assert await at.refused(Origin="http://evil.example") == 403
            assert await at.refused(Origin="null") == 403
            assert await at.refused(Origin=f"http://{here}") == 403  # differs from the Host
            assert await at.refused(Origin="http://[") == 403
            # A foreign name that resolves to this machine has its own Origin and Host.
            evil = f"evil.example:{at.port}"
            assert await at.refused(Origin=f"http://{evil}", Host=evil) == 403
            for host, status in (
                (evil, 403),
                ("127.0.0.1.evil.example", 403),
                (here, 200),
                ("[::1]:8000", 200),
            ):
                async with at.client.get(at.url + "/", headers={"Host": host}) as answer:
                    assert answer.status == status, host
            assert at.server.player is None
            page = await at.connect(Origin=f"http://{here}", Host=here)
            assert (await page.receive())[0]["kind"] == "hello"

    asyncio.run(scenario())


def test_the_token_is_required_everywhere(session):
    async def scenario():
        async with served(session, token="s3cret") as at:
            for query, status in (
                ("", 403),
                ("?token=", 403),
                ("?token=s3crex", 403),
                ("?token=%ED%A0%80", 403),
            ):
                async with at.client.get(f"{at.url}/{query}") as answer:
                    assert answer.status == status and "token" in await answer.text()
            assert await at.refused(Origin=at.url) == 403
            page = await at.connect("?token=s3cret")
            assert (await page.receive())[0]["kind"] == "hello"
            await page.connection.close()

            # A browser: the first request moves the token out of the address, into a cookie.
            async with at.client.get(f"{at.url}/?token=s3cret", allow_redirects=False) as answer:
                assert answer.status == 303 and answer.headers["Location"] == "/"
                cookie = answer.headers["Set-Cookie"]
                assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and f"_{at.port}=s3cret" in cookie
            jar = aiohttp.CookieJar(unsafe=True)  # keeps those of IP addresses, too
            async with aiohttp.ClientSession(cookie_jar=jar) as at.client:
                async with at.client.get(f"{at.url}/?token=s3cret") as answer:
                    assert answer.status == 200 and str(answer.url) == at.url + "/"
                page = await at.connect()
                assert (await page.receive())[0]["kind"] == "hello"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("host", "require_token"), [("127.0.0.1", False), ("127.0.0.1", True), ("0.0.0.0", False)]
)
def test_serve_until_ctrl_c(session, host, require_token, capsys):
    """Prints the address, requires a token where others can connect or if asked to, and stops cleanly."""
    port, found = free_port(), {}
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with_token = require_token or host == "0.0.0.0"

    def status(query: str) -> int:
        try:
            return browser.open(f"http://127.0.0.1:{port}/{query}").status
        except urllib.error.HTTPError as error:
            return error.code

    def visit() -> None:
        try:
            end = time.monotonic() + PATIENCE
            while "out" not in found and time.monotonic() < end:
                with suppress(urllib.error.URLError, ConnectionError):
                    found["without"] = status("")
                    found["out"] = capsys.readouterr().out
                    found["with"] = status(re.search(r":\d+/(\S*)", found["out"])[1])
                time.sleep(0.02)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=visit)
    thread.start()
    web.serve(session, FPS, SENS, host, port, require_token)
    thread.join()
    assert f"ssh -L {port}:127.0.0.1:{port} USER@HOST" in found["out"]
    assert ("token=" in found["out"]) == with_token
    assert (found["without"], found["with"]) == (403 if with_token else 200, 200)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, port))


def test_a_port_in_use_is_named(session):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} .*in use.*--port"):
            web.serve(session, FPS, SENS, port=port)


async def exchange(port: int, content: bytes) -> bytes:
    """What the server answers to these bytes until it ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(content)
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_half_sent_requests_are_ended_and_starve_nobody(session, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.5)

    async def scenario():
        async with served(session, token="s3cret") as at:

            async def send_half():
                reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
                writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: ")
                return reader, writer

            before = [send_half() for _ in range(150)]
            after = [send_half() for _ in range(150)]
            found = await asyncio.gather(*before, at.connect("?token=s3cret"), *after)
            page = found.pop(len(before))
            half = found
            assert (await page.receive())[0]["kind"] == "hello"
            for reader, writer in half:  # each is ended, the first ones at once
                with suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
                writer.close()
            await page.receive_until(lambda header: header["kind"] == "frame")

    asyncio.run(scenario())


def test_the_number_of_connections_is_limited():
    class Transport:
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    async def scenario():
        door = connections.Connections(None)
        some = [door.new() for _ in range(connections.MAX_WAITING + 5)]
        for connection in some:
            connection.connection_made(Transport())
        assert [c.transport.aborted for c in some] == [True] * 5 + [False] * connections.MAX_WAITING
        assert list(door.waiting) == some[5:]
        some[9].data_received(b"x" * (connections.MAX_HEAD + 1))
        assert some[9].transport.aborted
        door.server._connections = dict.fromkeys(range(connections.MAX_CONNECTIONS))  # aiohttp's
        late = door.new()
        late.connection_made(Transport())
        assert late.transport.aborted and late not in door.waiting
        door.server._connections = {}
        await door.close(0.1)
        assert all(connection.transport.aborted for connection in some)

    asyncio.run(scenario())


MALFORMED_REQUESTS = [
    b"\r\n\r\n", b"hello\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"G\0T / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost 1\r\n\r\n", b"GET / HTTP/1.1\r\n: x\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: walk\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1:x\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 9000 + b"\r\n\r\n",
    b"GET /play HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\nUpgrade: walk\r\n\r\n",
    b"GET /play HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: short\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET /%00%ff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: \xff=\xfe; a=b; =; ochre_token_80=\xe9\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("token", [None, "s3cret"])
def test_malformed_requests_are_refused_without_a_traceback(session, caplog, capsys, token):
    async def scenario():
        async with served(session, token=token) as at:
            for content in MALFORMED_REQUESTS[: -1 if token is None else None]:
                answer = await exchange(at.port, content)
                assert re.match(rb"HTTP/1\.[01] 4\d\d ", answer), content
                assert b"Content-Security-Policy: default-src 'none'" in answer, content
                assert b"aiohttp" not in answer and b"Python" not in answer and b"Traceback" not in answer
            assert await exchange(at.port, b"x" * 20_000) == b""
            page = await at.connect(f"?token={token}")
            assert (await page.receive())[0]["kind"] == "hello"

    asyncio.run(scenario())
    printed = capsys.readouterr()
    assert not caplog.records and "Traceback" not in printed.out + printed.err


def test_every_answer_has_the_headers(session):
    async def scenario():
        async with served(session) as at:
            for method, path, status in (
                ("GET", "/", 200), ("GET", "/gone", 404), ("POST", "/", 405), ("GET", "/play", 403),
            ):  # fmt: skip
                async with at.client.request(method, at.url + path) as answer:
                    assert answer.status == status
                    policy = answer.headers["Content-Security-Policy"]
                    for part in (
                        "default-src 'none'",
                        "connect-src 'self';",
                        "base-uri 'none'",
                        "form-action",
                    ):
                        assert part in policy
                    assert answer.headers["X-Content-Type-Options"] == "nosniff"
                    assert answer.headers["Server"] == "Ochre" and answer.headers["Connection"] == "close"

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["look", "ping"])
def test_a_flood_is_slowed_down(session, monkeypatch, kind):
    """It waits in the buffers, so the world goes on."""
    handled = []
    monkeypatch.setattr(Controls, "look", lambda *_: handled.append(1))
    pong = aiohttp.web.WebSocketResponse.pong
    monkeypatch.setattr(aiohttp.web.WebSocketResponse, "pong", lambda *_: (handled.append(1), pong(*_))[1])

    async def scenario():
        async with served(session) as at:
            page = await at.connect()
            steps, began = session.steps, time.monotonic()

            async def flood():
                for number in range(20_000):
                    if kind == "look":
                        await page.send(look=[1, 0])
                    else:
                        await page.connection.ping()
                    if number % 20 == 0:
                        await asyncio.sleep(0)  # this loop is the server's, too

            task = asyncio.create_task(flood())
            await until(lambda: len(handled) > 5 * web.MAX_MESSAGES, "some of the messages")
            limit = web.MAX_MESSAGES * (2 + (time.monotonic() - began) / web.MESSAGES_SECONDS)
            assert len(handled) <= limit and session.steps > steps
            task.cancel()

    asyncio.run(scenario())


def test_a_second_page_is_refused_and_the_first_plays_on(session):
    async def scenario():
        async with served(session) as at:
            first = await at.connect()
            await first.receive()
            code, reason = await (await at.connect()).closed()
            assert code == web.BUSY and "another page is playing" in reason
            steps = session.steps
            await first.receive_until(lambda header: header["stats"]["step"] > steps + 3)
            await first.connection.close()
            await until(lambda: at.server.player is None, "the first page to disconnect")
            third = await at.connect()
            assert (await third.receive())[0]["kind"] == "hello"

    asyncio.run(scenario())


def test_the_world_pauses_without_a_player(session):
    async def scenario():
        async with served(session) as at:  # steps as fast as they go
            await asyncio.sleep(0.2)
            assert not session.actions_given
            page = await at.connect()
            await page.send(press="forward")
            await page.send(command="next")
            await until(lambda: session.actions_given and session.actions_given[-1][MOVE_Z] == 1, "walking")
            await page.connection.close()
            await until(lambda: at.server.player is None, "the player to disconnect")
            assert not at.server.controls.pressed
            await asyncio.sleep(0.2)
            steps, given = session.steps, len(session.actions_given)
            await asyncio.sleep(0.5)
            assert len(session.actions_given) == given
            page = await at.connect()
            header, _ = await page.receive_until(lambda header: header["kind"] == "frame")
            assert header["stats"]["step"] == steps and header["stats"]["start_place"] == "other"
            await page.receive_until(lambda header: header["stats"]["step"] > steps)
            assert session.actions_given[given] == [0] * 5

    asyncio.run(scenario())


@pytest.mark.parametrize("false_claims", [False, True], ids=["acknowledges nothing", "acknowledges too much"])
def test_a_page_that_never_reads_does_not_delay_the_world(session, monkeypatch, false_claims):
    """Unacknowledged messages are limited; with false acknowledgements, writes that do not drain are."""
    monkeypatch.setattr(web, "png", lambda picture: bytes(300_000))

    async def scenario():
        async with served(session) as at:
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", at.port))
            head = {
                "Host": f"127.0.0.1:{at.port}", "Origin": at.url, "Upgrade": "websocket",
                "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            }  # fmt: skip
            lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
            raw.sendall(f"GET /play HTTP/1.1\r\n{lines}\r\n".encode())
            await until(lambda: at.server.player is not None, "the player")
            player, most, sent = at.server.player, 0, []
            if false_claims:
                text = b'{"shown":1000000}'
                raw.sendall(bytes([0x81, 0x80 | len(text)]) + bytes(4) + text)
                await until(lambda: player.shown == 10**6, "the acknowledgement")
            end = time.monotonic() + PATIENCE
            for steps in (40, 80, 120):
                while len(session.actions_given) < steps:
                    most = max(most, len(player.frames))
                    await asyncio.sleep(0.001)
                    assert time.monotonic() < end, "the world stopped"
                sent.append(player.sent)
            raw.close()
            return most, sent

    most, sent = asyncio.run(scenario())
    assert most == web.FRAMES_WAITING
    assert sent[1] == sent[2] and (false_claims or sent[2] == web.IN_FLIGHT)  # blocked


def test_a_slow_page_gets_the_newest_frames_and_every_message(session):
    async def scenario():
        async with served(session) as at:
            page = await at.connect()
            await page.receive()
            await until(lambda: at.server.player.sent == web.IN_FLIGHT, "the page to lag behind")
            await page.send(command="hotter")
            await page.send(command="greedy")
            await until(lambda: session.rollout.sampling.greedy, "the commands")
            steps = session.steps
            await until(lambda: session.steps > steps + 10, "ten steps")
            for _ in range(web.IN_FLIGHT):
                await page.receive()
            header, _ = await page.receive()
            assert header["stats"]["step"] > steps + 5
            assert header["message"].startswith("temperature") and header["message"].endswith("; greedy")

    asyncio.run(scenario())


# ---------------------------------------------------------------- commands


def test_commands(session, monkeypatch):
    monkeypatch.setattr(web, "overlay", lambda session: np.full((8, 12, 3), 7, np.uint8))

    async def scenario():
        async with served(session) as at:
            page = await at.connect()

            async def command(name: str, condition) -> tuple[dict, bytes]:
                await page.send(command=name)
                return await page.receive_until(
                    lambda header: header["kind"] == "frame" and condition(header)
                )

            header, _ = await command("next", lambda header: header["message"])
            assert header["message"] == "start place 2 of 2: other"
            assert header["stats"]["step"] == 0  # the start picture is shown first
            header, _ = await command("start place 1", lambda header: header["message"])
            assert header["stats"]["start_place"] == "clip"
            header, _ = await command("pause", lambda header: header["stats"]["paused"])
            given = len(session.actions_given)
            await page.send(press="forward")  # while it is paused
            await page.send(release="forward")
            await page.send(look=[50, 0])
            await asyncio.sleep(0.3)
            assert len(session.actions_given) == given
            header, _ = await command("single step", lambda header: header["message"] == "single step")
            assert len(session.actions_given) == given + 1 and session.actions_given[-1] == [0] * 5
            header, _ = await command("pause", lambda header: not header["stats"]["paused"])
            steps = header["stats"]["step"]
            await page.receive_until(lambda header: header["stats"]["step"] > steps + 3)
            assert not np.any(session.actions_given[given:])  # input during the pause has no effect later
            header, picture = await command("compare", lambda header: header["stats"]["compare"])
            both = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
            assert both.shape == (16, 64, 3)
            assert np.array_equal(both[:, :32], both[:, 32:])  # the start picture is the same
            await command("compare", lambda header: not header["stats"]["compare"])
            await command("record", lambda header: header["stats"]["recording"])
            header, _ = await command("record", lambda header: header["message"].startswith("wrote"))
            assert list(session.out.rglob("*.mp4"))

    asyncio.run(scenario())


def test_the_truth_is_left_of_the_generated_picture(session):
    session.command("compare")
    session.truth = np.zeros_like(session.picture)
    server = web.Server(session, Controls(FPS), StepClock(FPS), "127.0.0.1", None)
    header, picture = server.frame()
    both = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert header["stats"]["compare"]
    assert not both[:, :32].any() and np.array_equal(both[:, 32:], session.picture)


def test_a_recording_that_cannot_be_written_is_reported(session, monkeypatch):
    async def scenario():
        async with served(session) as at:
            page = await at.connect()
            (session.out / "metadata").write_text("in the way")
            (session.out / "video").write_text("in the way")
            await page.send(command="record")
            header, _ = await page.receive_until(lambda header: header.get("message"))
            assert str(session.out) in header["message"]
            steps = session.steps
            await page.receive_until(lambda header: header["stats"]["step"] > steps)

    asyncio.run(scenario())


def test_the_overlay_is_drawn_only_on_request_and_at_a_limited_rate(session, monkeypatch):
    drawn = []

    def draw(session):
        drawn.append(session.steps)
        return np.full((8, 12, 3), len(drawn) % 250, np.uint8)

    monkeypatch.setattr(web, "overlay", draw)
    monkeypatch.setattr(web, "OVERLAY_SECONDS", 0.1)

    async def scenario():
        async with served(session) as at:
            page = await at.connect()
            await page.receive_until(lambda header: header.get("stats", {}).get("step", 0) > 50)
            assert not drawn
            began = time.monotonic()
            await page.send(command="overlay")
            _, picture = await page.receive_until(lambda header: header["kind"] == "overlay")
            assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape == (8, 12, 3)
            await page.receive_until(lambda header: len(drawn) >= 4)
            assert len(drawn) <= 2 + (time.monotonic() - began) / web.OVERLAY_SECONDS
            await page.send(command="overlay")
            await page.receive_until(lambda header: header.get("overlay") is False)
            count, steps = len(drawn), session.steps
            await page.receive_until(lambda header: header.get("stats", {}).get("step", 0) > steps + 50)
            assert len(drawn) == count

    asyncio.run(scenario())


def test_a_step_that_fails_ends_the_server(session):
    """The error must reach the person who started the server."""

    def broken(actions):
        raise RuntimeError("out of memory")

    async def scenario():
        session.rollout.predict = broken
        port = free_port()
        server = web.Server(session, Controls(FPS), StepClock(FPS), "127.0.0.1", None)
        task = asyncio.create_task(server.serve("127.0.0.1", port))
        await asyncio.sleep(0.3)
        async with aiohttp.ClientSession() as client:
            url = f"http://127.0.0.1:{port}"
            page = Page(await client.ws_connect(f"{url}/play", headers={"Origin": url}))
            assert (await page.closed())[0] == aiohttp.WSCloseCode.GOING_AWAY
        await asyncio.wait_for(task, PATIENCE)

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(scenario())


# ---------------------------------------------------------------- the start screen and dropped files


def test_the_start_screen_sends_each_picture_once_and_the_world_waits(session):
    async def scenario():
        async with served(session, choose=True) as at:
            page = await at.connect()
            hello, _ = await page.receive()
            assert hello["places"] == ["clip", "other"]
            first, _ = await page.receive()
            assert first["kind"] == "frame" and first["choosing"] and first["stats"]["step"] == 0
            found = []
            while len(found) < 2 * TURN_PICTURES:
                header, picture = await page.receive()
                assert header["kind"] == "thumbnail"
                found.append((header["place"], header["name"], header["number"]))
                assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape == (16, 32, 3)
            expected = [(n, name, k) for k in range(TURN_PICTURES) for n, name in enumerate(hello["places"])]
            assert sorted(found) == sorted(expected) and not session.actions_given
            await page.send(press="forward")
            await page.send(place=1)
            header, _ = await page.receive_until(lambda header: header["kind"] == "frame")
            assert not header["choosing"] and header["place"] == 1 and header["stats"]["step"] == 0
            await page.receive_until(lambda header: header["stats"]["step"] > 2)
            assert session.actions_given[-1][MOVE_Z] == 1
            await page.send(command="places")
            header, _ = await page.receive_until(lambda header: header.get("choosing"))
            given = len(session.actions_given)
            await asyncio.sleep(0.2)
            assert len(session.actions_given) == given
            await page.send(command="places")  # goes on
            await until(lambda: len(session.actions_given) > given, "the next step")
            await page.send(place=7)
            header, _ = await page.receive_until(lambda header: header.get("message"))
            assert header["message"] == "there are 2 start places" and not header["choosing"]

    asyncio.run(scenario())


async def drop(page: Page, name: str, content: bytes, announced: int | None = None) -> None:
    """Sends a file as the page does."""
    await page.send(file=[name, announced or len(content)])
    for first in range(0, len(content), web.FILE_PART):
        await page.connection.send_bytes(content[first : first + web.FILE_PART])


def encoded(ending: str = ".png") -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    return cv2.imencode(ending, noise)[1].tobytes()


def test_a_dropped_photo_is_played(session):
    async def scenario():
        async with served(session, choose=True) as at:
            page = await at.connect()
            assert len(encoded()) > 3 * web.FILE_PART
            await drop(page, "../../my photo!.PNG", encoded())
            header, _ = await page.receive_until(lambda header: header.get("message"))
            assert header["message"] == "start place 3 of 3: my_photo" and not header["choosing"]
            await page.receive_until(lambda header: header["stats"]["step"] > 2)
            assert session.name == "my_photo" and len(session.context) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("notes.txt", b"walk", "notes.txt: not a picture or a clip"),
        ("noending", b"walk", "not a picture or a clip"),
        ("broken.png", b"walk" * 2000, "broken.png: not a picture that can be read"),
        ("list.mp4", b"#EXTM3U\n/etc/passwd\n", "list.mp4: its content is not that of .mp4"),
        ("cut.mp4", b"\0\0\0\x20ftypisom" + bytes(100), "cut.mp4: cannot be opened as a video"),
        ("tokens.npz", b"PK", "tokens.npz"),
    ],
)
def test_other_dropped_files_are_refused_and_play_goes_on(session, name, content, part):
    async def scenario():
        async with served(session) as at:
            page = await at.connect()
            await drop(page, name, content)
            header, _ = await page.receive_until(lambda header: header.get("message"))
            assert part in header["message"] and "/tmp" not in header["message"]
            steps = session.steps
            await page.receive_until(lambda header: header["stats"]["step"] > steps)
            assert len(session.start_places) == 2

    asyncio.run(scenario())


def test_more_than_was_announced_ends_the_connection(session):
    async def scenario():
        async with served(session) as at:
            page = await at.connect()
            await drop(page, "photo.png", b"12345", announced=4)
            assert await page.closed() == (web.MALFORMED, "more than the 4 bytes of a file")
            assert len(session.start_places) == 2

    asyncio.run(scenario())


def test_the_inset_is_left_of_the_generated_picture(session):
    session.command("inset")
    session.truth = np.zeros_like(session.picture)
    header, picture = web.Server(session, Controls(FPS), StepClock(FPS), "127.0.0.1", None).frame()
    both = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    assert header["truth"] and header["stats"]["inset"] and not header["stats"]["compare"]
    assert both.shape == (16, 64, 3) and not both[:, :32].any()


# ---------------------------------------------------------------- the page, in Chromium


class Background:
    """A server in its own thread, in real time; after `stop`, `start` uses the same port again."""

    def __init__(self, session: Session, choose: bool = False):
        self.session, self.port, self.choose = session, free_port(), choose
        self.url = f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        ready = threading.Event()

        async def run() -> None:
            self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
            self.server = web.Server(
                self.session, Controls(FPS, 15.0, SENS), StepClock(FPS), "127.0.0.1", None, self.choose
            )
            ready.set()
            with suppress(asyncio.CancelledError):
                await self.server.serve("127.0.0.1", self.port)

        self.thread = threading.Thread(target=asyncio.run, args=(run(),))
        self.thread.start()
        assert ready.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert self.thread.is_alive() and time.monotonic() < end, "the server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()

    def cut(self) -> None:
        """Aborts the player's connection without a close frame."""

        def cut() -> None:
            self.server.player.connection._req.transport.abort()

        self.loop.call_soon_threadsafe(cut)


def chromium(*flags: str, **experimental) -> webdriver.Chrome:
    for needed in (CHROMIUM, CHROMEDRIVER):
        if not needed.exists():
            pytest.skip(f"{needed} is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *flags):
        options.add_argument(flag)
    for name, value in experimental.items():
        options.add_experimental_option(name, value)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(str(CHROMEDRIVER)))


@pytest.fixture(scope="module")
def desktop():
    driver = chromium("--window-size=1000,700")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def phone():
    metrics = {"width": 390, "height": 780, "pixelRatio": 3.0, "touch": True, "mobile": True}
    driver = chromium(mobileEmulation={"deviceMetrics": metrics})
    yield driver
    driver.quit()


class Browser:
    """The page in a browser, connected to a session."""

    def __init__(self, driver: webdriver.Chrome, background: Background):
        self.driver, self.background, self.session = driver, background, background.session
        driver.get(background.url)
        least = 0 if background.choose else 2  # the start screen has one frame
        self.wait(lambda: self.ochre("frames") > least, "frames")

    def wait(self, condition, what: str):
        wait = WebDriverWait(self.driver, PATIENCE, poll_frequency=0.02)
        return wait.until(lambda _: condition(), f"did not happen: {what}")

    def js(self, expression: str):
        return self.driver.execute_script(f"return {expression}")

    def ochre(self, name: str):
        return self.js(f"window.ochre.{name}")

    def press(self, key: str) -> None:
        ActionChains(self.driver).send_keys(key).perform()

    def act(self, axis: int, value: float, since: int = 0) -> None:
        """Waits for an action since the given one."""
        actions = self.session.actions_given
        self.wait(lambda: any(a[axis] == value for a in actions[since:]), f"{value} on axis {axis}")

    def acts(self, axis: int, value: float) -> None:
        """Waits until the latest action has this value."""
        self.wait(lambda: self.session.actions_given[-1][axis] == value, f"now {value} on axis {axis}")

    def lit(self) -> list[str]:
        return self.js("[...document.querySelectorAll('[data-lit].lit')].map(e => e.dataset.lit)")

    def shown(self, name: str) -> bool:
        return self.driver.find_element(By.ID, name).is_displayed()

    def message(self, part: str) -> None:
        self.wait(lambda: part in self.ochre("message"), part)

    def touch(self, kind: str, *points: tuple[int, int, int]) -> None:
        """Real touches: (finger, x, y)."""
        points = [{"id": finger, "x": x, "y": y} for finger, x, y in points]
        self.driver.execute_cdp_cmd(
            "Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points}
        )


@pytest.fixture
def background(session):
    background = Background(session)
    background.start()
    yield background
    background.stop()


@pytest.fixture
def browser(desktop, background):
    yield Browser(desktop, background)
    errors = [e for e in desktop.get_log("browser") if e["source"] in ("javascript", "security")]
    desktop.get("about:blank")
    assert not errors


@pytest.fixture
def mobile(phone, background):
    yield Browser(phone, background)
    phone.get("about:blank")


def test_frames_arrive_at_the_rate_of_the_data(browser):
    first = browser.ochre("frames")
    browser.wait(lambda: browser.ochre("frames") > first + 40, "forty frames")
    rate = browser.ochre("rate")
    print(f"{rate:.1f} frames/s in Chromium")
    assert 12 < rate < 17
    assert re.fullmatch(r"1\d\.\d frames/s", browser.driver.find_element(By.ID, "rate").text)
    assert browser.js("document.getElementById('world').width") == 32
    pixels = browser.js(
        "[...document.getElementById('world').getContext('2d').getImageData(0, 0, 32, 16).data]"
    )
    assert len(set(pixels)) > 10


def test_each_pixel_is_a_square_of_device_pixels(browser):
    scale = browser.ochre("scale")
    width, rendering = browser.js(
        "(e => [e.getBoundingClientRect().width * devicePixelRatio, getComputedStyle(e).imageRendering])"
        "(document.getElementById('world'))"
    )
    assert scale == int(scale) and scale > 10 and width == pytest.approx(32 * scale)
    assert rendering == "pixelated"


def test_keys_reach_the_world_and_light_up(browser):
    keys = (
        ("w", MOVE_Z, 1, "forward"), ("s", MOVE_Z, -1, "back"), ("a", MOVE_X, -1, "left"),
        ("d", MOVE_X, 1, "right"), (Keys.SPACE, JUMP, 1, "jump"),
        (Keys.ARROW_LEFT, YAW, -90 / FPS / 15, None), (Keys.ARROW_DOWN, PITCH, 90 / FPS / 15, None),
    )  # fmt: skip
    for key, axis, value, light in keys:
        ActionChains(browser.driver).key_down(key).perform()
        browser.acts(axis, np.float32(value))
        if light:
            browser.wait(lambda light=light: browser.lit() == [light], f"{light} to light up")
        ActionChains(browser.driver).key_up(key).perform()
        browser.acts(axis, 0)
    browser.wait(lambda: browser.lit() == [], "the lights to go out")


def test_a_tap_reaches_the_world(browser):
    since = len(browser.session.actions_given)
    browser.press(Keys.SPACE)
    browser.act(JUMP, 1, since)
    browser.acts(JUMP, 0)


def test_the_mouse_turns_only_while_it_is_locked(browser):
    def move(right: int, down: int) -> None:
        ActionChains(browser.driver, duration=0).move_by_offset(right, down).perform()

    world = browser.driver.find_element(By.ID, "world")
    ActionChains(browser.driver).move_to_element(world).perform()
    since = len(browser.session.actions_given)
    move(30, 0)
    browser.wait(lambda: len(browser.session.actions_given) > since + 5, "five steps")
    assert not any(a[YAW] for a in browser.session.actions_given)
    assert browser.js("document.pointerLockElement") is None
    ActionChains(browser.driver).move_to_element(world).click().perform()
    browser.wait(lambda: browser.js("document.pointerLockElement !== null"), "the pointer lock")
    since = len(browser.session.actions_given)
    move(40, -20)
    browser.wait(
        lambda: sum(a[YAW] for a in browser.session.actions_given[since:]) > 0, "a turn to the right"
    )
    browser.acts(YAW, 0)
    turned = np.sum(browser.session.actions_given[since:], 0)
    assert turned[:2] == pytest.approx([40 * SENS / 15, -20 * SENS / 15], abs=1e-4)
    since = len(browser.session.actions_given)
    move(-60, 0)
    browser.wait(lambda: sum(a[YAW] for a in browser.session.actions_given[since:]) < 0, "a turn to the left")
    browser.driver.execute_script("document.exitPointerLock()")  # headless Chromium does not do it on Esc


def test_leaving_the_page_releases_everything(browser):
    ActionChains(browser.driver).key_down("w").perform()
    browser.acts(MOVE_Z, 1)
    browser.driver.execute_script("dispatchEvent(new Event('blur'))")
    browser.acts(MOVE_Z, 0)
    ActionChains(browser.driver).key_up("w").key_down("w").perform()
    browser.acts(MOVE_Z, 1)
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.acts(MOVE_Z, 0)
    browser.driver.close()
    browser.driver.switch_to.window(first)
    ActionChains(browser.driver).key_up("w").perform()


def test_commands_of_the_page(browser):
    browser.press("n")
    browser.message("start place 2 of 2: other")
    browser.press("c")
    browser.message("truth | generated")
    browser.wait(lambda: browser.shown("truth") and browser.shown("generated"), "the labels")
    assert browser.shown("recording")
    browser.press("c")
    browser.wait(lambda: not browser.shown("truth"), "the labels to go")
    browser.press("p")
    browser.wait(lambda: browser.driver.find_element(By.ID, "rate").text == "PAUSED", "the pause")
    browser.press("p")
    browser.wait(lambda: browser.ochre("header.stats.paused") is False, "the pause to end")
    # A key with Ctrl belongs to the browser.
    before = browser.ochre("message")
    ActionChains(browser.driver).key_down(Keys.CONTROL).send_keys("n").key_up(Keys.CONTROL).perform()
    browser.press("g")
    browser.message("greedy")
    assert before != "greedy" and browser.ochre("header.stats.start_place") == "other"


def test_views_of_the_page(browser, monkeypatch):
    monkeypatch.setattr(web, "overlay", lambda session: np.full((24, 40, 3), 99, np.uint8))
    # Headless Chromium does not reload on F5, so the test checks that the page prevents it.
    browser.driver.execute_script(
        "addEventListener('keydown', e => { window.prevented = e.defaultPrevented; })"
    )
    alone = browser.js("document.getElementById('world').getBoundingClientRect()")
    for key, name in (("h", "help"), (Keys.F3, "stats"), (Keys.F4, "overlay")):
        assert not browser.shown(name)
        browser.press(key)
        browser.wait(lambda name=name: browser.shown(name), name)
        assert browser.js("window.prevented") is True
        if name == "help":
            assert "truth | generated" in browser.driver.find_element(By.ID, name).text
        if name == "stats":
            assert "step ms" in browser.driver.find_element(By.ID, name).text
        if name == "overlay":
            browser.wait(lambda: browser.js("document.getElementById('overlay').width") == 40, "the overlay")
            boxes = browser.js(
                "['world', 'overlay'].map(i => document.getElementById(i).getBoundingClientRect())"
            )
            assert boxes[0] == alone, "the picture keeps its size"
            assert boxes[1]["right"] <= 1000 and boxes[1]["top"] > 0
        browser.press(key)
        browser.wait(lambda name=name: not browser.shown(name), f"no {name}")
    browser.press(Keys.F5)
    browser.wait(lambda: browser.js("document.body.className") == "smooth", "smooth pixels")
    assert browser.js("getComputedStyle(document.getElementById('world')).imageRendering") == "auto"
    browser.press(Keys.F11)
    browser.wait(lambda: browser.js("document.fullscreenElement !== null"), "full screen")
    browser.press(Keys.F11)
    browser.wait(lambda: browser.js("document.fullscreenElement === null"), "no full screen")


def test_screenshot(browser, tmp_path):
    folder = tmp_path / "downloads"
    browser.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)}
    )
    browser.press("p")
    browser.wait(lambda: browser.ochre("header.stats.paused"), "the pause")
    browser.press(Keys.F12)
    (file,) = browser.wait(lambda: list(folder.glob("ochre_clip_*.png")), "the file")
    browser.wait(lambda: file.stat().st_size, "its content")
    assert np.array_equal(cv2.imread(str(file))[..., ::-1], browser.session.picture)


def test_the_page_reconnects_by_itself(browser):
    background = browser.background
    browser.press("n")
    browser.message("start place 2")
    background.cut()
    browser.wait(lambda: browser.ochre("connections") == 2, "a new connection")
    steps = browser.session.steps
    browser.wait(lambda: browser.session.steps > steps, "the next step")
    background.stop()
    browser.wait(lambda: not browser.ochre("connected"), "the end")
    browser.wait(lambda: "trying again" in browser.driver.find_element(By.ID, "banner").text, "the banner")
    steps = browser.session.steps
    background.start()
    browser.wait(lambda: browser.ochre("connections") == 3, "the restarted server")
    assert not browser.shown("banner")
    browser.wait(lambda: browser.session.steps > steps, "the same world")
    assert browser.ochre("header.stats.start_place") == "other"
    ActionChains(browser.driver).key_down("w").perform()
    browser.acts(MOVE_Z, 1)
    ActionChains(browser.driver).key_up("w").perform()
    browser.acts(MOVE_Z, 0)


def test_a_second_page_is_refused_and_takes_over_later(browser):
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.driver.get(browser.background.url)
    browser.wait(
        lambda: "another page is playing" in browser.driver.find_element(By.ID, "banner").text, "the banner"
    )
    second = browser.driver.current_window_handle
    browser.driver.switch_to.window(first)
    assert browser.ochre("connected")
    browser.driver.close()
    browser.driver.switch_to.window(second)
    browser.wait(lambda: browser.ochre("connected"), "the second page to connect")


def open_menu(mobile: Browser, entry: str) -> None:
    """Opens the menu of the phone and taps on an entry."""
    mobile.driver.find_element(By.ID, "open-menu").click()
    mobile.driver.find_element(By.CSS_SELECTOR, f"#menu {entry}").click()


def test_touch_controls(mobile):
    assert mobile.shown("stick") and mobile.shown("jump") and not mobile.shown("keys")
    mobile.touch("Start", (1, 90, 600))
    mobile.touch("Move", (1, 90, 540))
    mobile.acts(MOVE_Z, 1)
    assert mobile.session.actions_given[-1][MOVE_X] == 0
    mobile.touch("Move", (1, 130, 560))
    mobile.acts(MOVE_X, 1)
    since = len(mobile.session.actions_given)
    mobile.touch("Start", (1, 130, 560), (2, 300, 300))  # a second touch at the same time
    mobile.touch("Move", (1, 130, 560), (2, 320, 290))
    mobile.wait(
        lambda: any(a[YAW] > 0 and a[PITCH] < 0 for a in mobile.session.actions_given[since:]), "a turn"
    )
    assert mobile.session.actions_given[-1][MOVE_Z] == 1
    mobile.touch("End")
    mobile.acts(MOVE_Z, 0)
    mobile.acts(MOVE_X, 0)
    since = len(mobile.session.actions_given)
    box = mobile.js("document.getElementById('jump').getBoundingClientRect()")
    mobile.touch("Start", (1, int(box["x"]) + 40, int(box["y"]) + 40))
    mobile.act(JUMP, 1, since)
    mobile.touch("End")
    mobile.acts(JUMP, 0)
    open_menu(mobile, "[data-command=pause]")
    mobile.wait(lambda: mobile.ochre("header.stats.paused"), "the pause")
    assert not mobile.shown("menu")
    open_menu(mobile, "[data-view=help]")
    assert "left thumb" in mobile.driver.find_element(By.ID, "help").text


@pytest.fixture
def choosing(session):
    """A server that begins with the start screen."""
    background = Background(session, choose=True)
    background.start()
    yield background
    background.stop()


def tiles(browser: Browser) -> list:
    return browser.driver.find_elements(By.CSS_SELECTOR, "button.tile")


def test_the_start_screen_turns_and_any_key_starts(desktop, choosing):
    browser = Browser(desktop, choosing)
    browser.wait(lambda: len(tiles(browser)) == 2, "the places")
    assert browser.shown("places") and browser.shown("drop")
    browser.wait(lambda: not browser.shown("rate"), "no rate of a world that waits")
    assert [tile.text for tile in tiles(browser)] == ["1 clip", "2 other"]
    browser.wait(lambda: browser.js("tiles[1].pictures.length") == TURN_PICTURES, "all pictures")
    shown = "tiles[0].canvas.toDataURL()"
    before = browser.js(shown)
    browser.wait(lambda: browser.js(shown) != before, "a turn")
    assert not browser.session.actions_given
    browser.press(Keys.ARROW_RIGHT)
    browser.wait(lambda: "selected" in tiles(browser)[1].get_attribute("class"), "the selection")
    browser.press("t")
    browser.wait(lambda: not browser.shown("places"), "the start")
    browser.wait(lambda: browser.session.steps > 0, "a step")
    assert browser.session.name == "other" and browser.ochre("name") == "other"
    browser.press("m")
    browser.wait(lambda: browser.shown("places"), "the start screen again")
    browser.press("1")
    browser.wait(lambda: browser.session.name == "clip" and not browser.shown("places"), "the other place")
    browser.press("m")
    browser.wait(lambda: browser.shown("places"), "the start screen again")
    restarts = browser.session.restarts
    browser.press(Keys.ESCAPE)
    browser.wait(lambda: not browser.shown("places"), "play to go on")
    assert browser.session.restarts == restarts
    browser.press("m")
    browser.wait(lambda: browser.shown("places"), "the start screen again")
    tiles(browser)[1].click()
    browser.wait(lambda: browser.session.name == "other" and not browser.shown("places"), "a click to start")
    desktop.get("about:blank")


def test_a_file_dropped_on_the_page_is_played(browser, tmp_path):
    """A real drop event with a file; and the file chooser of phones."""
    photo = tmp_path / "beach.png"
    photo.write_bytes(encoded())
    chooser = browser.driver.find_element(By.CSS_SELECTOR, "#drop input")
    browser.press("m")
    browser.wait(lambda: browser.shown("places"), "the start screen")
    chooser.send_keys(str(photo))
    browser.message("start place 3 of 3: beach")
    browser.wait(lambda: browser.session.name == "beach", "the photo")
    drop = """
        const transfer = new DataTransfer();
        const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
        transfer.items.add(new File(["walk"], arguments[0]));
        document.body.dispatchEvent(new DragEvent("drop", options));
    """
    browser.driver.execute_script(drop, "notes.txt")
    browser.message("notes.txt: not a picture or a clip")
    browser.driver.execute_script("hello.largest_file = 3;" + drop, "clip.mp4")
    browser.message("clip.mp4 is larger than")


def test_another_run_of_the_server_goes_on_at_the_place_that_was_played(desktop, background, tiny, tmp_path):
    browser = Browser(desktop, background)
    browser.press("n")
    browser.wait(lambda: browser.ochre("place") == "other", "the second place")
    background.stop()
    browser.wait(lambda: not browser.ochre("connected"), "the end")
    background.session, background.choose = make_session(tiny, tmp_path), True
    background.start()
    browser.wait(lambda: browser.ochre("connections") == 2, "the new server")
    browser.wait(lambda: background.session.name == "other" and background.session.steps > 0, "the place")
    assert not browser.shown("places")
    desktop.get("about:blank")


def box(browser: Browser, name: str) -> dict:
    return browser.js(f"document.getElementById('{name}').getBoundingClientRect()")


def apart(a: dict, b: dict) -> bool:
    return (
        a["right"] <= b["left"]
        or b["right"] <= a["left"]
        or a["bottom"] <= b["top"]
        or b["bottom"] <= a["top"]
    )


def test_nothing_covers_the_labels_or_the_overlay(browser, monkeypatch):
    monkeypatch.setattr(web, "overlay", lambda session: np.full((392, 533, 3), 99, np.uint8))
    browser.press(Keys.F4)
    browser.wait(lambda: browser.js("document.getElementById('overlay').width") == 533, "the overlay")
    browser.driver.execute_script("toast('a long message '.repeat(40))")
    assert apart(box(browser, "toast"), box(browser, "overlay"))
    browser.press(Keys.F4)
    browser.press("c")
    browser.press(Keys.F3)
    browser.wait(lambda: browser.shown("truth") and browser.shown("stats"), "labels and statistics")
    for label in ("truth", "generated"):
        assert apart(box(browser, "stats"), box(browser, label))
    browser.press("c")
    browser.wait(lambda: not browser.shown("recording"), "compare to end")
    browser.press("i")
    browser.wait(lambda: browser.shown("recording"), "the inset")
    world, inset = box(browser, "world"), box(browser, "recording")
    assert inset["width"] == pytest.approx(0.3 * world["width"], rel=0.05) and not browser.shown("generated")
    assert apart(box(browser, "stats"), inset) and inset["left"] > world["left"]


def test_on_an_upright_phone_the_picture_fills_the_width_and_the_controls_are_below(mobile):
    world = box(mobile, "world")
    assert world["left"] == 0 and world["width"] == pytest.approx(390, abs=1)
    for name in ("stick", "jump"):
        assert box(mobile, name)["top"] >= world["bottom"]
    assert box(mobile, "open-menu")["bottom"] <= world["top"]
    open_menu(mobile, "[data-command=compare]")
    mobile.wait(lambda: mobile.shown("generated"), "compare")
    upper, lower = box(mobile, "recording"), box(mobile, "world")
    assert upper["width"] == lower["width"] == pytest.approx(390, abs=1)
    assert upper["bottom"] == pytest.approx(lower["top"], abs=1)
    open_menu(mobile, "[data-command=record]")
    mobile.wait(lambda: mobile.session.recorder is not None, "the recording")
    open_menu(mobile, "[data-view=places]")
    mobile.wait(lambda: mobile.shown("places") and len(tiles(mobile)) == 2, "the places")
    assert not mobile.shown("open-menu") and mobile.shown("go-on")
    tiles(mobile)[1].click()
    mobile.wait(lambda: mobile.session.name == "other" and not mobile.shown("places"), "the other place")
