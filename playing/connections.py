"""The connections to the page's server: how many, how long, and the headers of every answer.

Each connection carries one request. Its head is read here, within limits that hold before anything is known
about the sender; then aiohttp takes over.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable

from aiohttp import web

HEADER_SECONDS = 5.0  # in which a new connection must send the head of its request
MAX_HEAD = 16_384  # bytes
BACKLOG = 64  # connections that are accepted at once
# Connections without a complete head; a further one ends the one that waited longest. Several times BACKLOG,
# so that a request that has arrived is read before as many others can be accepted.
MAX_WAITING = 256
MAX_CONNECTIONS = 320  # in all; a further one is ended at once
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the first address contains the token
    "Server": "Ochre",  # instead of the versions of aiohttp and Python
    "X-Content-Type-Options": "nosniff",
}
REQUEST_LINE = re.compile(rb"[A-Z]+ [!-~]+ HTTP/1\.[01]\r\n")
NOT_HTTP = "\r\n".join(
    ["HTTP/1.1 400 Bad Request", *(f"{name}: {value}" for name, value in HEADERS.items())]
    + ["Connection: close", "Content-Length: 0", "", ""]
).encode()
Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class RequestHandler(web.RequestHandler):
    """aiohttp's handler of a connection. A malformed request is answered without a traceback on the
    console."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= 500:
            self.log_exception("Error handling request", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer has been sent already")
        reason = "The server failed.\n" if status >= 500 else "This is not a valid request.\n"
        response = web.Response(status=status, text=reason, headers=HEADERS)
        response.force_close()
        return response


class Connections:
    """Makes the protocol of each new connection: `asyncio.loop.create_server(connections.new, ...)`."""

    def __init__(self, answer: Answer):
        """`answer` turns a request into a response, which gets HEADERS. It may raise web.HTTPException.

        Needs a running event loop.
        """
        self.answer = answer
        self.server = web.Server(self._answer)  # holds the connections that aiohttp has
        self.waiting: dict[NewConnection, None] = {}  # in the order of their arrival

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            response = await self.answer(request)
        except web.HTTPException as refusal:
            refusal.headers.update(HEADERS)
            refusal.force_close()
            raise
        if not response.prepared:
            response.headers.update(HEADERS)
            response.force_close()
        return response

    def new(self) -> "NewConnection":
        """The protocol of a new connection."""
        return NewConnection(self)

    def admit(self, connection: "NewConnection") -> None:
        """Registers a connection; ends it, or another one, where there are too many."""
        if len(self.waiting) >= MAX_WAITING:
            self.drop(next(iter(self.waiting)))
        self.waiting[connection] = None
        if len(self.waiting) + len(self.server.connections) > MAX_CONNECTIONS:
            self.drop(connection)

    def drop(self, connection: "NewConnection") -> None:
        """Ends a connection whose request has not arrived."""
        self.waiting.pop(connection, None)
        connection.transport.abort()

    def take_over(self, connection: "NewConnection", head: bytes) -> None:
        """Hands a connection and the head of its request to aiohttp."""
        self.waiting.pop(connection, None)
        handler = RequestHandler(
            self.server,
            loop=asyncio.get_running_loop(),
            access_log=None,
            lingering_time=0,
            keepalive_timeout=HEADER_SECONDS,
        )
        connection.transport.set_protocol(handler)
        handler.connection_made(connection.transport)
        handler.data_received(head)

    async def close(self, seconds: float) -> None:
        """Ends all connections; those with a request have so many seconds."""
        for connection in list(self.waiting):
            self.drop(connection)
        await self.server.shutdown(seconds)


class NewConnection(asyncio.Protocol):
    """A connection until the head of its request has arrived."""

    def __init__(self, connections: Connections):
        self.connections, self.head = connections, b""
        self.transport: asyncio.Transport | None = None
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        drop = self.connections.drop
        self.timer = asyncio.get_running_loop().call_later(HEADER_SECONDS, drop, self)
        self.connections.admit(self)

    def data_received(self, data: bytes) -> None:
        self.head += data
        end = self.head.find(b"\r\n\r\n") + 4
        if end >= 4 and REQUEST_LINE.match(self.head):
            self.timer.cancel()
            # What follows is not read: no page sends more before the answer.
            self.connections.take_over(self, self.head[:end])
        elif end >= 4:
            self.transport.write(NOT_HTTP)
            self.transport.close()
        elif len(self.head) > MAX_HEAD:
            self.connections.drop(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.timer.cancel()
        self.connections.waiting.pop(self, None)
