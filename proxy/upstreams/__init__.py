"""HTTP out: the only package that opens connections to providers.

`Transport` is all the relay knows of it; `http` carries it out with aiohttp's client.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from proxy.core.headers import location
from proxy.core.outcome import Reason


@dataclass(slots=True, frozen=True)
class Upstream:
    """A provider's endpoint with one credential.

    Attributes:
        base_url: stands for the client's `/v1`; has no slash at its end.
        headers: what every request to it carries, its credential among them; hidden from `repr`.
        passthrough: the client's own credential is sent along instead.
        connect_seconds, first_byte_seconds, idle_seconds: the three ways to be late.
        connections: most sockets at once, 0 for no bound.
        idle_connections, keep_alive_seconds: how many that nobody uses are kept, and how long.
        drain_seconds: how long an answer whose client has left is read on; 0: not at all.
        proxy: the URL of an HTTP proxy on the way to it, with what that asks for; hidden from `repr`.
        ca_file, client_cert_file, client_key_file: in PEM; what it has to show, and what it is shown.
        certificates: changes when one of these files does.
    """

    name: str
    base_url: str
    host: str
    port: int
    headers: Mapping[str, str] = field(repr=False, default_factory=dict)
    passthrough: bool = False
    dialect: str = "openai"
    connect_seconds: float = 5.0
    first_byte_seconds: float = 600.0
    idle_seconds: float = 120.0
    connections: int = 0
    idle_connections: int = 100
    keep_alive_seconds: float = 30.0
    drain_seconds: float = 0.0
    propagate_trace: bool = False
    proxy: str | None = field(repr=False, default=None)
    ca_file: str | None = None
    client_cert_file: str | None = None
    client_key_file: str | None = None
    certificates: str = ""

    def scrubbed(self, body: bytes) -> bytes:
        """An error body without our credential: some servers repeat the key they refuse."""
        for name in ("Authorization", "x-api-key"):
            key = self.headers.get(name, "").removeprefix("Bearer ").encode()
            if key and key in body:
                body = body.replace(key, b"*" * len(key))  # of the same length, as content-length has it
        return body

    def heard(self, said: Mapping[str, str], asked: object) -> dict[str, str]:
        """The headers of an answer, names in lower case; its `location` as a client of the gateway can go there.

        Args:
            asked: the URL that was asked for, as text or what becomes it.
        """
        told = {name.lower(): value for name, value in said.items()}
        if "location" in told:
            place = location(told.pop("location"), str(asked), self.base_url)
            if place and place.isprintable() and self.scrubbed(place.encode()) == place.encode():
                told["location"] = place
        return told


class AttemptFailed(Exception):
    """An attempt broke instead of ending.

    Attributes:
        reason: CONNECT, FIRST_BYTE, IDLE, RESET, GARBAGE or EOF.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason


@dataclass(slots=True, frozen=True)
class Connections:
    """The connections to one upstream as they stand; `limit` is 0 where there is no bound.

    Attributes:
        active, idle: those that attempts have now, and those that are kept.
        opened, acquired: how many were ever made, and how often an attempt was given one.
    """

    upstream: str
    active: int
    idle: int
    limit: int
    opened: int
    acquired: int


class ConnectionNotes(Protocol):
    """Where a transport writes down what becomes of its connections; telemetry does."""

    def waited(self, upstream: str, seconds: float) -> None:
        """All connections were in use; after so long the attempt had one."""

    def connected(self, upstream: str, seconds: float) -> None:
        """Connecting took so long."""

    def failed(self, upstream: str, reason: str) -> None:
        """No connection came to stand: dns, tcp, tls or timeout."""

    def stale(self, upstream: str) -> None:
        """A kept connection was closed by the time it was used; the request is sent again on a new one."""


@dataclass(slots=True, frozen=True)
class Upgrade:
    """In the place of a body: the connection is to become a WebSocket.

    Attributes:
        path: instead of the call's; it has the model's name in it.
        protocols: the subprotocols that the client knows, its favourite first.
    """

    path: str
    protocols: tuple[str, ...]


@dataclass(slots=True, frozen=True)
class Streamed:
    """A request's body that is made while it is sent, once.

    What `parts` raises is no failure of the upstream: it leaves `Transport.send` as it is.

    Attributes:
        length: bytes of all parts together; None: nobody knows, so it is sent in chunks.
    """

    parts: AsyncIterator[bytes]
    length: int | None


Body = bytes | Streamed | Upgrade


@dataclass(slots=True, frozen=True)
class Message:
    """A whole message on a WebSocket."""

    data: bytes
    is_text: bool


@dataclass(slots=True, frozen=True)
class Closing:
    """The other side closes a WebSocket, in order."""

    code: int
    reason: str


class Line(Protocol):
    """A WebSocket to one side, the client's or the upstream's.

    What a side does wrong is raised by the methods of its own line: `AttemptFailed` by an upstream's, `ClientGone` and
    `InvalidRequest` by a client's.
    """

    @property
    def protocol(self) -> str | None:
        """The subprotocol that both agreed on."""
        ...

    async def receive(self) -> Message | Closing:
        """What it says next."""
        ...

    async def send(self, message: Message) -> None:
        """Returns when there is room for more."""
        ...

    async def close(self, closing: Closing) -> None:
        """Say so, and wait a little for it to do the same. Raises nothing: a line that was lost is closed."""
        ...

    def abort(self) -> None:
        """Drop the connection."""


class Reply(Protocol):
    """An upstream's answer whose headers have come."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case; of a name that came twice, the last."""
        ...

    async def read(self) -> bytes:
        """The next bytes of the body, cut where the network cut them; b"" at its end.

        Raises:
            AttemptFailed: RESET, the body broke off; GARBAGE, it was malformed. Silence longer than `idle_seconds` ends
                the whole block with IDLE.
        """
        ...

    async def drain(self, seconds: float) -> None:
        """Wait at most so long for the end of the body, so that its connection can serve again; what comes is thrown
        away. Never raises."""
        ...

    async def body(self, limit: int) -> bytes:
        """The whole body, or its first `limit` bytes. Raises as `read` does."""
        ...

    def line(self) -> Line:
        """The WebSocket that it has become: of the answer to an `Upgrade`, unless it is a refusal (400 and above)."""
        ...


class Transport(Protocol):
    def send(
        self, upstream: Upstream, method: str, path: str, headers: Mapping[str, str], body: Body
    ) -> AbstractAsyncContextManager[Reply]:
        """Send one request; the block lasts as long as its answer is read.

        Leaving the block gives the connection back if the body was sent and the answer read to its end, and closes it
        otherwise. An answer may come before the body is whole: the rest is not sent then.

        Args:
            path: what followed `/v1`, beginning with a slash, with its query.
            headers: besides the upstream's own.

        Raises:
            AttemptFailed: CONNECT, FIRST_BYTE, RESET or GARBAGE on entering; IDLE from within.
        """
        ...
