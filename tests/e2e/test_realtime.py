"""A realtime session through the gateway: a WebSocket on both sides, and the gate between them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from openai import OpenAI

from proxy import conversation
from proxy.api.line import MESSAGE_LIMIT
from proxy.config import PASSTHROUGH, Gate, Limits, Model, Secret, Upstream
from proxy.simulator import Profile, Simulator, profiles
from proxy.simulator import serving as simulating
from proxy.upstreams import websocket
from tests.e2e.running import UPSTREAM_KEY, House, at, serving, settings, until
from tests.e2e.scripted import Act, Exchange, Scripted, refusal
from tests.e2e.wire import Wire, wire

FOUR_TOKENS = replace(profiles.INSTANT, output_tokens=4)
ASKED = "/v1/realtime?model=gpt-realtime"
HELLO: Any = {
    "type": "conversation.item.create",
    "item": {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
}
RESPOND = {"type": "response.create"}
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


@asynccontextmanager
async def through(
    profile: Profile = FOUR_TOKENS, said: dict[str, Any] | None = None, **sections: Any
) -> AsyncIterator[tuple[House, Simulator]]:
    """The gateway in front of a simulated provider; `said` is the upstream's configuration."""
    async with (
        simulating(profile, remember=100) as simulator,
        serving(settings(at(simulator.base_url, **said or {}), **sections)) as house,
    ):
        yield house, simulator


@asynccontextmanager
async def before(upstream: Scripted, *, idle_seconds: float = 120.0, **sections: Any) -> AsyncIterator[House]:
    told: Upstream = at(upstream.base_url, limits=Limits(learn=False), idle_seconds=idle_seconds)
    async with serving(settings(told, **sections)) as house:
        yield house


def connecting(house: House, path: str = ASKED, **said: Any) -> Any:
    """A client's WebSocket, for the length of a block; it closes when the block ends."""
    return house.http.ws_connect(house.origin + path, **said)


# ── a client and an upstream over raw TCP ──


def frame(opcode: int, data: bytes = b"", *, mask: bool = False, fin: bool = True) -> bytes:
    """One frame; a client's is masked."""
    size = len(data)
    length = (
        bytes([size])
        if size < 126
        else b"\x7e" + struct.pack("!H", size)
        if size < 65_536
        else b"\x7f" + struct.pack("!Q", size)
    )
    head = bytes([(0x80 if fin else 0) | opcode, length[0] | (0x80 if mask else 0)]) + length[1:]
    if not mask:
        return head + data
    key = b"\x00\x00\x00\x00"  # a mask that changes nothing is a mask
    return head + key + data


def closing(code: int, reason: str = "") -> bytes:
    return struct.pack("!H", code) + reason.encode()


class Frames:
    """Frames out of a stream of bytes."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def next(self) -> tuple[int, bytes]:
        """Raises asyncio.IncompleteReadError at the end."""
        first, second = await self._reader.readexactly(2)
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", await self._reader.readexactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self._reader.readexactly(8))
        key = await self._reader.readexactly(4) if second & 0x80 else b"\x00" * 4
        data = await self._reader.readexactly(size)
        mask = int.from_bytes((key * (size // 4 + 1))[:size])
        return first & 0x0F, (int.from_bytes(data) ^ mask).to_bytes(size)


def upgrade(path: str = ASKED, **headers: str) -> bytes:
    told = {"host": "x", "connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    told |= {"sec-websocket-key": base64.b64encode(os.urandom(16)).decode()}
    told |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode()


def agreed(exchange: Exchange) -> bytes:
    """The upstream's answer to an upgrade."""
    accept = base64.b64encode(hashlib.sha1(exchange.headers["sec-websocket-key"].encode() + GUID).digest())
    head = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    return head + b"sec-websocket-accept: %b\r\n\r\n" % accept


@asynccontextmanager
async def both(upstream: Scripted, house: House) -> AsyncIterator[tuple[Wire, Frames, Frames, Any]]:
    """A session between two that speak raw TCP: the client's wire and frames, the upstream's frames and its line."""
    talking = asyncio.Event()
    upstream.otherwise = [talking]
    async with wire(house.port) as client:
        client.send(upgrade())
        exchange = await upstream.exchange()
        (line,) = upstream._lines
        line.writer.write(agreed(exchange))
        assert await client.head() == 101
        yield client, Frames(client.reader), Frames(line.reader), line
        talking.set()


# ── what works ──


async def test_a_session_is_passed_through_and_its_responses_are_counted() -> None:
    models = {"gpt-realtime": Model(upstreams=("up",))}
    async with through(models=models) as (house, simulator), connecting(house) as socket:
        opened = await socket.receive_json()
        assert house.in_flight == 1
        words = []
        for _ in range(2):
            await socket.send_json(HELLO)
            await socket.send_json(RESPOND)
            while (event := await socket.receive_json())["type"] != "response.done":
                words.append(event.get("delta", ""))
        await socket.send_bytes(b"\x00\xffbinary")
        assert await socket.receive_bytes() == b"\x00\xffbinary"
        await socket.close()
        await house.until_idle()
        metrics = await house.metrics()
    assert opened["type"] == "session.created"
    assert "".join(words) == "echo: hello runs down the" * 2
    assert socket.close_code == 1000
    assert simulator.seen[0].path == ASKED
    assert simulator.seen[0].headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert metrics("requests_total", operation="realtime", model="gpt-realtime", code="101", outcome="ok") == 1
    assert metrics("tokens_total", model="gpt-realtime", type="output") == 8
    assert metrics("request_bytes_total", operation="realtime", direction="in") > 100
    assert metrics("upstream_attempts_total", result="ok") == 1
    assert metrics("time_to_first_token_seconds_count") == 0


async def test_the_official_sdk_talks_through_it() -> None:
    async with through() as (house, _), house.sdk() as client, client.realtime.connect(model="gpt-realtime") as session:
        await session.session.update(session={"type": "realtime", "output_modalities": ["text"]})
        await session.conversation.item.create(item=HELLO["item"])
        await session.response.create()
        words = ""
        async for event in session:
            if event.type == "response.output_text.delta":
                words += event.delta
            elif event.type == "response.done":
                break
    assert words == "echo: hello runs down the"
    assert event.response.usage is not None
    assert event.response.usage.output_tokens == 4


async def test_the_official_sdk_talks_synchronously_too() -> None:
    def talk(base_url: str) -> str:
        words = ""
        with (
            OpenAI(base_url=base_url, api_key="sk-client") as client,
            client.realtime.connect(model="gpt-realtime") as session,
        ):
            session.conversation.item.create(item=HELLO["item"])
            session.response.create()
            for event in session:
                if event.type == "response.output_text.delta":
                    words += event.delta
                elif event.type == "response.done":
                    break
        return words

    async with through() as (house, _):
        assert await asyncio.to_thread(talk, house.base_url) == "echo: hello runs down the"


async def test_the_model_is_called_as_the_upstream_knows_it() -> None:
    models = {"voice": Model(upstreams=("up",), upstream_model="gpt-realtime")}
    path = "/v1/realtime?model=voice&intent=a%20b"
    async with through(models=models) as (house, simulator), connecting(house, path) as socket:
        opened = await socket.receive_json()
    assert opened["session"]["model"] == "gpt-realtime"
    assert simulator.seen[0].path == "/v1/realtime?model=gpt-realtime&intent=a+b"


async def test_a_session_without_a_model_goes_where_everything_goes_that_names_none(upstream: Scripted) -> None:
    upstream.otherwise = refusal(400, "as_you_like")
    async with before(upstream) as house, wire(house.port) as client:
        for query in ("call_id=rtc_1", "intent=transcription"):
            client.send(upgrade(f"/v1/realtime?{query}"))
            assert (await client.answer()).error["code"] == "as_you_like"
    assert [exchange.path for exchange in upstream.exchanges] == [
        "/v1/realtime?call_id=rtc_1",
        "/v1/realtime?intent=transcription",
    ]


async def test_what_the_gateway_says_of_the_call_stands_in_the_answer_to_the_upgrade() -> None:
    async with through() as (house, _), wire(house.port) as client:
        client.send(upgrade())
        assert await client.head() == 101
        assert client.headers["x-request-id"].startswith("req_")
        assert client.headers["server"] == "penstock"


@pytest.mark.parametrize("sent", [1000, 1001, 3000, 4999])
async def test_a_client_that_closes_is_closed_with_its_code_on_both_sides(upstream: Scripted, sent: int) -> None:
    async with before(upstream) as house, both(upstream, house) as (client, said, heard, line):
        client.send(frame(CLOSE, closing(sent, "bye"), mask=True))
        assert await heard.next() == (CLOSE, closing(sent, "bye"))
        line.writer.write(frame(CLOSE, closing(sent)))
        assert await said.next() == (CLOSE, closing(sent, "bye"))
        await house.until_idle()
        assert (await house.metrics())("requests_total", operation="realtime", outcome="ok") == 1


async def test_who_says_goodbye_and_hangs_up_in_one_breath_closed_in_order_too(upstream: Scripted) -> None:
    async with before(upstream) as house, both(upstream, house) as (client, _, _, _):
        client.send(frame(CLOSE, closing(1000), mask=True))
        client.leave()
        await house.until_idle()
        assert (await house.metrics())("requests_total", operation="realtime", outcome="ok") == 1


@pytest.mark.parametrize(("sent", "outcome"), [(1000, "ok"), (1001, "ok"), (1008, "failed"), (4001, "failed")])
async def test_an_upstream_that_closes_is_passed_on_with_its_code(upstream: Scripted, sent: int, outcome: str) -> None:
    async with before(upstream) as house, both(upstream, house) as (client, said, _, line):
        line.writer.write(frame(TEXT, b'{"type":"x"}') + frame(CLOSE, closing(sent, "session expired")))
        assert await said.next() == (TEXT, b'{"type":"x"}')
        assert await said.next() == (CLOSE, closing(sent, "session expired"))
        client.send(frame(CLOSE, closing(sent), mask=True))
        await house.until_idle()
        assert (await house.metrics())("requests_total", operation="realtime", outcome=outcome) == 1


async def test_a_client_that_is_gone_as_soon_as_it_has_said_goodbye_closed_in_order(upstream: Scripted) -> None:
    async with before(upstream) as house, both(upstream, house) as (client, _, heard, _):
        client.send(frame(CLOSE, closing(1000), mask=True))
        assert (await heard.next())[0] == CLOSE
        client.vanish()
        await house.until_idle()
        assert (await house.metrics())("requests_total", operation="realtime", outcome="ok") == 1


async def test_messages_are_whole_wherever_their_bytes_and_frames_were_cut(upstream: Scripted) -> None:
    told = '{"type":"response.done","words":"🏔 \u2028"}'.encode()
    raw = frame(TEXT, told[:10], mask=True, fin=False) + frame(PING, b"now", mask=True)
    raw += frame(0, told[10:], mask=True) + frame(BINARY, b"\x00" * 300, mask=True)
    async with before(upstream) as house, both(upstream, house) as (client, said, heard, line):
        for at in range(len(raw)):
            client.send(raw[at : at + 1])
            await asyncio.sleep(0)
        assert await heard.next() == (TEXT, told)
        assert await heard.next() == (BINARY, b"\x00" * 300)
        assert await said.next() == (PONG, b"now")
        line.writer.write(frame(TEXT, told[:3], fin=False) + frame(0, told[3:]) + frame(PING, b"there"))
        assert await said.next() == (TEXT, told)
        assert await heard.next() == (PONG, b"there")


# ── back-pressure ──


async def flood(line: Any, message: bytes) -> int:
    """Write as much as is taken. Returns the bytes of it."""
    sent = 0
    while True:
        line.writer.write(message)
        try:
            async with asyncio.timeout(0.5):
                await line.writer.drain()
        except TimeoutError:
            return sent
        sent += len(message)
        assert sent < 64 << 20, "nothing holds it back"


async def test_a_client_that_does_not_read_stops_the_reading_of_the_upstream(upstream: Scripted) -> None:
    message = frame(TEXT, b"x" * 100_000)
    async with before(upstream) as house, both(upstream, house) as (_, said, _, line):
        sent = await flood(line, message)
        assert house.in_flight == 1
        for _ in range(sent // len(message)):  # it reads after all, and nothing is missing
            assert await said.next() == (TEXT, b"x" * 100_000)


async def test_an_upstream_that_does_not_read_stops_the_reading_of_the_client(upstream: Scripted) -> None:
    message = frame(BINARY, b"y" * 100_000, mask=True)
    async with before(upstream) as house, both(upstream, house) as (client, _, heard, line):
        line.writer.transport.pause_reading()
        sent = await flood(client, message)
        line.writer.transport.resume_reading()
        for _ in range(sent // len(message)):
            assert await heard.next() == (BINARY, b"y" * 100_000)


async def test_a_reader_that_is_dead_does_not_hold_its_place(
    upstream: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "STALL_SECONDS", 0.2)
    async with before(upstream) as house, both(upstream, house) as (_, _, _, line):
        exchange = upstream.exchanges[0]
        writing = asyncio.create_task(flood(line, frame(TEXT, b"x" * 100_000)))
        await until(exchange.gone.is_set, "the upstream is let go")
        await house.until_idle()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        assert (await house.metrics())("requests_total", operation="realtime", outcome="cancelled") == 1


# ── who is lost ──


async def test_a_client_that_vanishes_takes_its_upstream_with_it_at_once(upstream: Scripted) -> None:
    async with before(upstream) as house, both(upstream, house) as (client, _, _, _):
        client.vanish()
        await until(upstream.exchanges[0].gone.is_set, "the upstream is let go", seconds=1.0)
        await house.until_idle()
        metrics = await house.metrics()
    assert metrics("requests_total", operation="realtime", outcome="cancelled") == 1
    assert metrics("client_disconnects_total", operation="realtime", phase="streaming") == 1


@pytest.mark.parametrize("act", [Act.FIN, Act.RST])
async def test_an_upstream_that_is_lost_is_told_as_an_event_and_a_code(upstream: Scripted, act: Act) -> None:
    async with before(upstream) as house, both(upstream, house) as (client, said, _, line):
        line.end(act)
        opcode, data = await said.next()
        event = json.loads(data)
        assert (opcode, event["type"], event["error"]["code"]) == (TEXT, "error", "stream_truncated")
        assert await said.next() == (CLOSE, closing(1011, "stream_truncated"))
        client.send(frame(CLOSE, closing(1011), mask=True))
        await house.until_idle()
        metrics = await house.metrics()
    assert metrics("requests_total", operation="realtime", outcome="truncated") == 1


async def test_an_upstream_that_sends_what_is_no_frame_is_lost_too(upstream: Scripted) -> None:
    async with before(upstream) as house, both(upstream, house) as (_, said, _, line):
        line.writer.write(b"\xff" * 20)
        assert json.loads((await said.next())[1])["error"]["code"] == "stream_truncated"
        assert await said.next() == (CLOSE, closing(1011, "stream_truncated"))


async def test_an_upstream_that_answers_no_ping_is_lost(upstream: Scripted) -> None:
    """It is told of as silent: `idle_seconds` without a sign of life, an answer to a ping among them."""
    async with before(upstream, idle_seconds=0.3) as house, both(upstream, house) as (_, said, _, _):
        event = json.loads((await said.next())[1])
        assert "idle" in event["error"]["message"]
        assert (await said.next())[0] == CLOSE


async def test_a_session_in_which_nobody_says_anything_is_kept() -> None:
    async with through(said={"idle_seconds": 0.2}) as (house, _), connecting(house) as socket:
        assert (await socket.receive_json())["type"] == "session.created"
        with pytest.raises(TimeoutError):
            await socket.receive(timeout=1.0)
        await socket.send_json(RESPOND)
        assert (await socket.receive_json())["type"] == "response.created"


# ── what is refused ──


async def test_a_message_that_is_too_large_closes_with_1009(upstream: Scripted) -> None:
    async with before(upstream) as house, both(upstream, house) as (client, said, heard, _):
        client.send(frame(BINARY, b"x" * MESSAGE_LIMIT, mask=True))
        assert await heard.next() == (BINARY, b"x" * MESSAGE_LIMIT)
        client.send(frame(BINARY, b"x" * (MESSAGE_LIMIT + 1), mask=True))
        opcode, data = await said.next()
        assert (opcode, data[:2]) == (CLOSE, closing(1009))
        client.send(frame(CLOSE, closing(1009), mask=True))
        await house.until_idle()
        metrics = await house.metrics()
    assert metrics("requests_total", operation="realtime", outcome="rejected") == 1
    assert metrics("request_errors_total", operation="realtime", source="client", error_type="invalid_request") == 1


@pytest.mark.parametrize(
    "raw",
    [frame(3, b"x", mask=True), b"\xc1\x80\x00\x00\x00\x00", frame(0, b"x", mask=True)],
    ids=["opcode", "rsv", "no start"],
)
async def test_what_is_no_frame_closes_with_1002(upstream: Scripted, raw: bytes) -> None:
    async with before(upstream) as house, both(upstream, house) as (client, said, _, _):
        client.send(raw)
        opcode, data = await said.next()
        assert (opcode, data[:2]) == (CLOSE, closing(1002))
        client.leave()
        await house.until_idle()
        assert (await house.metrics())("requests_total", operation="realtime", outcome="rejected") == 1


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (f"GET {ASKED} HTTP/1.1\r\nhost: x\r\n\r\n".encode(), "invalid_request"),
        (upgrade(sec_websocket_version="12"), "invalid_request"),
        (upgrade(sec_websocket_key="short"), "invalid_request"),
        (upgrade("/v1/realtime"), "missing_model"),
        (upgrade("/v1/realtime?model="), "missing_model"),
        (upgrade("/v1/realtime?model=a&model=b"), "missing_model"),
        (upgrade("/v1/realtime?model=" + "x" * 600), "model_not_found"),
    ],
)
async def test_what_is_no_such_request_is_answered_as_any_other(upstream: Scripted, raw: bytes, code: str) -> None:
    async with before(upstream) as house, wire(house.port) as client:
        client.send(raw)
        answered = await client.answer()
    assert (answered.status // 100, answered.error["code"]) == (4, code)
    assert not upstream.exchanges


async def test_a_model_of_anthropic_s_has_no_such_endpoint(upstream: Scripted) -> None:
    async with serving(settings(at(upstream.base_url, dialect="anthropic"))) as house, wire(house.port) as client:
        client.send(upgrade())
        answered = await client.answer()
    assert (answered.status, answered.error["code"]) == (400, "wrong_dialect")


async def test_a_refusal_of_the_upstream_is_the_client_s_answer(upstream: Scripted) -> None:
    upstream.plays(refusal(403, "no_access", message="not for you"))
    async with before(upstream) as house, wire(house.port) as client:
        client.send(upgrade())
        answered = await client.answer()
        await house.until_idle()
        metrics = await house.metrics()
    assert (answered.status, answered.error["message"]) == (403, "not for you")
    assert metrics("requests_total", operation="realtime", code="403", outcome="rejected") == 1


async def test_an_upgrade_that_fails_is_tried_again_elsewhere(upstream: Scripted) -> None:
    upstream.otherwise = refusal(503)
    async with simulating(FOUR_TOKENS) as simulator:
        both_of_them = {"first": at(upstream.base_url), "second": at(simulator.base_url)}
        async with serving(settings(both_of_them)) as house, connecting(house) as socket:
            assert (await socket.receive_json())["type"] == "session.created"
    assert len(upstream.exchanges) == 1


@pytest.mark.parametrize("status", [b"200 OK", b"302 Found", b"101 Switching Protocols"])
async def test_an_answer_that_is_no_upgrade_is_the_upstream_s_mistake(upstream: Scripted, status: bytes) -> None:
    upstream.otherwise = [b"HTTP/1.1 %b\r\ncontent-length: 0\r\n\r\n" % status, Act.FIN]
    async with before(upstream) as house, wire(house.port) as client:
        client.send(upgrade())
        answered = await client.answer()
    assert (answered.status, answered.error["code"]) == (502, "upstream_garbage")


async def test_an_upstream_that_does_not_answer_the_upgrade_is_late(
    upstream: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "OPENING_SECONDS", 0.1)
    upstream.otherwise = [Act.SILENCE]
    told = at(upstream.base_url, connect_seconds=0.1)
    async with serving(settings(told)) as house, wire(house.port) as client:
        client.send(upgrade())
        answered = await client.answer()
    assert (answered.status, answered.error["code"]) == (504, "upstream_timeout")


async def test_a_session_holds_its_place_and_the_next_one_waits_for_it() -> None:
    async with through(gate=Gate(concurrency=1)) as (house, _):
        async with connecting(house) as first:
            await first.receive_json()
            second = asyncio.create_task(connecting(house).__aenter__())
            await until(lambda: house.waiting, "the second waits")
            await first.close()
        socket = await second
        assert (await socket.receive_json())["type"] == "session.created"
        await socket.close()


async def test_a_client_that_leaves_the_queue_is_gone_from_it() -> None:
    async with through(gate=Gate(concurrency=1)) as (house, simulator), connecting(house) as first:
        await first.receive_json()
        async with wire(house.port) as client:
            client.send(upgrade())
            await until(lambda: house.waiting, "it waits")
            client.vanish()
            await until(lambda: not house.waiting, "it does not wait")
        assert len(simulator.seen) == 1


# ── keys ──

KEY = "a-key-of-team-a-0123456789"


async def test_a_page_in_a_browser_may_send_its_key_as_a_subprotocol_and_no_upstream_sees_it() -> None:
    async with through(callers={"team-a": Secret(KEY)}) as (house, simulator):
        protocols = ("realtime", f"openai-insecure-api-key.{KEY}", "openai-beta.realtime-v1")
        origin = {"origin": "https://example.com"}
        async with connecting(house, protocols=protocols, headers=origin) as socket:
            assert socket.protocol == "realtime"
            assert (await socket.receive_json())["type"] == "session.created"
        async with connecting(house, protocols=(f"openai-insecure-api-key.{KEY}",)) as socket:
            assert socket.protocol is None
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await connecting(house, protocols=("realtime", "openai-insecure-api-key.wrong"))
    assert refused.value.status == 401
    assert [seen.headers.get("sec-websocket-protocol") for seen in simulator.seen] == [
        "realtime,openai-beta.realtime-v1",
        None,
    ]
    assert all(KEY not in str(seen.headers) for seen in simulator.seen)


async def test_a_page_s_own_key_is_passed_through_where_keys_are() -> None:
    async with through(said={"api_key": PASSTHROUGH}) as (house, simulator):
        protocols = ("realtime", "openai-insecure-api-key.sk-own")
        async with connecting(house, protocols=protocols, headers={"origin": "https://example.com"}) as socket:
            await socket.receive_json()
    assert simulator.seen[0].headers["authorization"] == "Bearer sk-own"


async def test_a_strange_page_cannot_use_a_gateway_that_asks_for_no_key() -> None:
    """Browsers let any page open a WebSocket to this machine."""
    async with through() as (house, simulator), wire(house.port) as client:
        client.send(upgrade(origin="https://evil.example"))
        answered = await client.answer()
    assert (answered.status, answered.error["code"]) == (401, "invalid_api_key")
    assert not simulator.seen


async def test_no_key_gets_into_a_log(upstream: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    protocols = ("openai-insecure-api-key.canary-key",)
    async with through() as (house, _), connecting(house, protocols=protocols) as socket:
        await socket.receive_json()
    assert "canary" not in caplog.text


# ── the stop ──


async def test_a_stop_lets_a_session_end(upstream: Scripted) -> None:
    async with through() as (house, _), connecting(house) as socket:
        await socket.receive_json()
        draining = asyncio.create_task(house.gateway.drain(5.0))
        await socket.send_json(RESPOND)
        assert (await socket.receive_json())["type"] == "response.created"
        await socket.close()
        assert await draining


async def test_a_session_that_outlives_the_stop_is_told_so_and_closed_with_1001(upstream: Scripted) -> None:
    async with AsyncExitStack() as running:
        house = await running.enter_async_context(before(upstream))
        async with both(upstream, house) as (client, said, _, _):
            stopping = asyncio.create_task(running.aclose())
            opcode, data = await said.next()
            event = json.loads(data)
            assert (opcode, event["type"], event["error"]["code"]) == (TEXT, "error", "draining")
            assert await said.next() == (CLOSE, closing(1001, "draining"))
            client.send(frame(CLOSE, closing(1001), mask=True))
            await until(upstream.exchanges[0].gone.is_set, "the upstream is let go")
            await stopping
