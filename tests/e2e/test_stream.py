"""Prompts over the WebSocket /stream: words in, words out, several at once, over real sockets."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from proxy.api import stream
from proxy.api.line import MESSAGE_LIMIT, READ_LIMIT
from proxy.config import Gate, Jobs, Limits, Model, Secret, Server
from proxy.simulator import Profile, Simulator, profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import House, at, serving, settings, until, until_still
from tests.e2e.scripted import (
    DONE,
    EVENT_STREAM,
    LAST,
    USAGE,
    Act,
    Play,
    Scripted,
    answer,
    chunk,
    event,
    refusal,
    words,
)
from tests.e2e.scripted import stream as streamed
from tests.e2e.test_realtime import CLOSE, TEXT, Frames, closing, frame, upgrade
from tests.e2e.wire import wire

FOUR_TOKENS = replace(profiles.INSTANT, output_tokens=4)
ONE, OTHER = "caller-key-one-0123456789", "caller-key-two-0123456789"


@asynccontextmanager
async def through(profile: Profile = FOUR_TOKENS, **sections: Any) -> AsyncIterator[tuple[House, Simulator]]:
    async with (
        simulating(profile, remember=1000) as simulator,
        serving(settings(at(simulator.base_url), **{"jobs": Jobs(model="m")} | sections)) as house,
    ):
        yield house, simulator


@asynccontextmanager
async def before(upstream: Scripted, **sections: Any) -> AsyncIterator[House]:
    told = at(upstream.base_url, limits=Limits(learn=False))
    async with serving(settings(told, **{"jobs": Jobs(model="m")} | sections)) as house:
        yield house


def connecting(house: House, **said: Any) -> Any:
    return house.http.ws_connect(f"{house.origin}/stream", **said)


async def ended(socket: Any, name: object = None) -> tuple[str, Any]:
    """The words of the prompt of this name up to its last message, and that. Other prompts' messages are lost."""
    text = ""
    while True:
        said = await socket.receive_json()
        if said.pop("id", None) != name:
            continue
        if "token" not in said:
            return text, said
        text += said["token"]


# ── what works ──


async def test_prompts_are_answered_one_after_the_other() -> None:
    async with through() as (house, simulator), connecting(house) as socket:
        for word in ("hello", "again"):
            await socket.send_json({"prompt": word, "model": "m", "system": "be brief", "max_tokens": 9})
            tokens = []
            while "token" in (said := await socket.receive_json()):
                tokens.append(said["token"])
            assert "".join(tokens).startswith(f"echo: {word}")
            used = said["usage"]
            assert said == {"done": True, "usage": used, "finish_reason": "stop"}
            assert used["input_tokens"] > 0
            assert used["total_tokens"] == used["input_tokens"] + used["output_tokens"]
        await socket.close()
        await house.until_idle()
        metrics = await house.metrics()
    asked = json.loads(simulator.seen[0].body)
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    assert asked["stream_options"] == {"include_usage": True}
    assert metrics("requests_total", operation="complete", stream="true", code="200", outcome="ok") == 2
    assert metrics("requests_total", operation="stream", code="101", outcome="ok") == 1
    assert metrics("time_to_first_token_seconds_count") == 2
    assert metrics("tokens_total", type="output") > 0


async def test_words_are_passed_on_as_they_come(upstream: Scripted) -> None:
    go = asyncio.Event()
    upstream.plays([EVENT_STREAM, chunk(words("one ")), go, chunk(words("two ") + words("three", "stop") + DONE), LAST])
    async with before(upstream) as house, connecting(house) as socket:
        await socket.send_json({"prompt": "a"})
        assert await socket.receive_json() == {"token": "one "}
        go.set()
        assert await socket.receive_json() == {"token": "two three"}
        assert await socket.receive_json() == {"done": True, "usage": None, "finish_reason": "stop"}


async def test_a_prompt_may_follow_what_was_said_before() -> None:
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    async with through() as (house, simulator), connecting(house) as socket:
        await socket.send_json({"prompt": "three", "messages": talk})
        await ended(socket)
        await socket.send_json({"messages": [*talk, {"role": "user", "content": [{"type": "text", "text": "four"}]}]})
        await ended(socket)
    first, second = (json.loads(seen.body) for seen in simulator.seen)
    assert first["messages"] == [*talk, {"role": "user", "content": "three"}]
    assert second["messages"][2]["content"] == [{"type": "text", "text": "four"}]


async def test_many_prompts_run_at_once_and_each_message_names_its_own(upstream: Scripted) -> None:
    names = [*range(60), *(f"name {number}" for number in range(stream.AT_ONCE - 60))]
    go = asyncio.Event()

    def echo() -> Play:
        (said,) = upstream.exchanges[-1].json["messages"]
        return [EVENT_STREAM, chunk(words(said["content"])), go, chunk(words("!", "stop") + DONE), LAST]

    upstream.improvises = echo
    async with before(upstream) as house, connecting(house) as socket:
        for name in names:
            await socket.send_json({"prompt": f"<{name}>", "id": name})
        said = {}
        for _ in names:
            message = await socket.receive_json()
            said[message["id"]] = message["token"]
        assert said == {name: f"<{name}>" for name in names}
        assert house.in_flight == len(names)
        go.set()
        left = set(names)
        while left:
            message = await socket.receive_json()
            if "done" in message:
                left.remove(message["id"])
            else:
                assert message["token"] == "!"


async def test_an_id_is_free_as_soon_as_its_last_message_has_come() -> None:
    async with through() as (house, _), connecting(house) as socket:
        for _ in range(50):
            await socket.send_json({"prompt": "again", "id": "same"})
            text, said = await ended(socket, "same")
            assert (text[:11], said["done"]) == ("echo: again", True)


async def test_a_stream_that_is_cut_anywhere_has_its_words_told_whole(upstream: Scripted) -> None:
    told = b"".join((words("är "), words("\u2028"), words("\N{WAVING HAND SIGN}"), words("", "stop"), USAGE, DONE))
    upstream.plays([EVENT_STREAM, *(chunk(bytes([byte])) for byte in told), LAST])
    async with before(upstream) as house, connecting(house) as socket:
        await socket.send_json({"prompt": "a"})
        text, said = await ended(socket)
    assert text == "är \u2028\N{WAVING HAND SIGN}"
    assert said["usage"] == {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}


async def test_an_upstream_that_does_not_stream_is_told_as_one_word(upstream: Scripted) -> None:
    async with before(upstream) as house, connecting(house) as socket:
        await socket.send_json({"prompt": "a"})
        text, said = await ended(socket)
    assert (text, said["finish_reason"]) == ("hi", "stop")
    assert said["usage"] == {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}


# ── what is wrong is told, and the connection stays ──


@pytest.mark.parametrize(
    ("said", "code", "word"),
    [
        (b"{", "invalid_json", "JSON"),
        (b"\xff", "invalid_json", "JSON"),
        (b'{"messages": [{"a": ' + b"[" * 5000, "invalid_json", "JSON"),
        (b"[]", "invalid_request", "object"),
        ({}, "invalid_request", "prompt"),
        ({"prompt": ""}, "invalid_request", "prompt"),
        ({"prompt": 1}, "invalid_request", "prompt"),
        ({"promt": "a"}, "invalid_request", "promt"),
        ({"prompt": "a", "max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"prompt": "a", "id": [1]}, "invalid_request", "id"),
        ({"prompt": "a", "id": "x" * 201}, "invalid_request", "id"),
        ({"prompt": "a", "messages": ["b"]}, "invalid_request", "messages"),
        ({"prompt": "a", "model": "unknown"}, "model_not_found", "unknown"),
        ({"cancel": "nobody"}, "not_found", "nobody"),
        ({"cancel": None}, "not_found", "null"),
        ({"cancel": "a", "prompt": "b"}, "invalid_request", "cancel"),
        (b" " * MESSAGE_LIMIT + b"{}", "request_too_large", "/complete"),
    ],
)
async def test_a_message_that_is_wrong_is_told_and_the_next_one_is_answered(said: object, code: str, word: str) -> None:
    models = {"m": Model(upstreams=("up",))}
    async with through(models=models) as (house, simulator), connecting(house) as socket:
        await socket.send_bytes(said if isinstance(said, bytes) else json.dumps(said).encode())
        error = (await socket.receive_json())["error"]
        assert (error["code"], error["type"]) == (code, "invalid_request_error")
        assert word in error["message"]
        assert not simulator.seen
        await socket.send_json({"prompt": "well", "id": 1})
        assert (await ended(socket, 1))[1]["done"] is True
        metrics = await house.metrics()
    assert metrics("requests_total", operation="complete", outcome="rejected") == 1


async def test_a_message_that_cannot_be_taken_is_refused_under_its_id() -> None:
    async with through() as (house, _), connecting(house) as socket:
        await socket.send_json({"prompt": "a", "id": "mine", "promt": "b"})
        said = await socket.receive_json()
        assert (said["id"], said["error"]["code"]) == ("mine", "invalid_request")


async def test_of_an_id_that_is_taken_the_first_one_s_end_is_not_told(upstream: Scripted) -> None:
    go = asyncio.Event()
    upstream.plays([go, *streamed(words("one", "stop"), DONE)])
    async with before(upstream) as house, connecting(house) as socket:
        await socket.send_json({"prompt": "a", "id": "x"})
        await socket.send_json({"prompt": "b", "id": "x"})
        said = await socket.receive_json()
        assert (said.get("id"), said["error"]["param"]) == (None, "id")
        go.set()
        assert (await ended(socket, "x"))[0] == "one"
    assert len(upstream.exchanges) == 1


async def test_more_at_once_than_a_connection_may_have_are_refused(
    upstream: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "AT_ONCE", 2)
    upstream.otherwise = [Act.SILENCE]
    async with before(upstream) as house, connecting(house) as socket:
        for name in range(3):
            await socket.send_json({"prompt": "a", "id": name})
        said = await socket.receive_json()
        assert (said["id"], said["error"]["code"]) == (2, "queue_full")


async def test_a_frame_too_large_to_be_read_ends_the_connection() -> None:
    async with through() as (house, _), wire(house.port) as client:
        client.send(upgrade("/stream"))
        assert await client.head() == 101
        client.send(frame(TEXT, b" " * (READ_LIMIT + 1), mask=True)[:20])
        opcode, data = await Frames(client.reader).next()
        assert (opcode, data[:2]) == (CLOSE, closing(1009))


async def test_what_an_upstream_refuses_is_told_in_its_words(upstream: Scripted) -> None:
    upstream.plays(refusal(400, "context_length_exceeded", message="too long"), answer(b"no JSON", 403))
    async with before(upstream) as house, connecting(house) as socket:
        await socket.send_json({"prompt": "a"})
        assert (await ended(socket))[1]["error"]["code"] == "context_length_exceeded"
        await socket.send_json({"prompt": "a"})
        assert (await ended(socket))[1] == {"error": {"code": 403, "message": "no JSON"}}
        await socket.send_json({"prompt": "a"})
        assert (await ended(socket))[0] == "hi"


@pytest.mark.parametrize("end", [Act.RST, Act.FIN, LAST])
async def test_a_stream_that_breaks_off_ends_with_an_error_and_never_with_done(
    upstream: Scripted, end: Act | bytes
) -> None:
    upstream.plays([EVENT_STREAM, chunk(words("half")), end])
    async with before(upstream) as house, connecting(house) as socket:
        await socket.send_json({"prompt": "a"})
        text, said = await ended(socket)
        assert (text, said["error"]["code"]) == ("half", "stream_truncated")
        metrics = await house.metrics()
    assert metrics("requests_total", operation="complete", outcome="truncated") == 1


async def test_an_error_within_a_stream_is_its_end(upstream: Scripted) -> None:
    upstream.plays(streamed(words("half"), event({"error": {"message": "overloaded", "code": "busy"}})))
    async with before(upstream) as house, connecting(house) as socket:
        await socket.send_json({"prompt": "a"})
        assert await ended(socket) == ("half", {"error": {"message": "overloaded", "code": "busy"}})


async def test_an_answer_that_is_no_chat_completion_is_the_upstream_s_failure(upstream: Scripted) -> None:
    upstream.plays(answer({"choices": []}))
    async with before(upstream) as house, connecting(house) as socket:
        await socket.send_json({"prompt": "a"})
        assert (await ended(socket))[1]["error"]["code"] == "upstream_garbage"
        metrics = await house.metrics()
    assert metrics("requests_total", operation="complete", outcome="failed") == 1


async def test_a_model_of_anthropic_s_is_refused_as_complete_refuses_it(upstream: Scripted) -> None:
    other = at(upstream.base_url.removesuffix("/v1"), dialect="anthropic")
    async with serving(settings(other)) as house, connecting(house) as socket:
        await socket.send_json({"prompt": "a", "model": "claude"})
        assert (await ended(socket))[1]["error"]["code"] == "wrong_dialect"


NAMES = ("prompt", "id", "cancel", "messages", "model", "system", "max_tokens", "stream")
VALUES = (None, True, 0, -1, 1 << 70, 1.5, "", "a", "\x00", "\ud800", [], [{}], [{"role": "user"}], {}, "x" * 300)


def nonsense(chance: random.Random) -> bytes:
    """What no well-meaning client sends, or nearly what one does."""
    if chance.random() < 0.2:
        return chance.randbytes(chance.randrange(60))
    said = json.dumps({chance.choice(NAMES): chance.choice(VALUES) for _ in range(chance.randrange(5))}).encode()
    return said[: chance.randrange(len(said))] if chance.random() < 0.2 else said


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_sent_a_prompt_after_it_is_answered(seed: int) -> None:
    chance = random.Random(seed)
    async with through() as (house, _), connecting(house) as socket:
        for _ in range(500):
            await socket.send_bytes(nonsense(chance))
        await socket.send_json({"prompt": "well", "id": "the last one"})
        text, said = await ended(socket, "the last one")
        assert (text[:10], said["done"]) == ("echo: well", True)


# ── who leaves, cancels or does not read ──


async def test_a_cancelled_prompt_says_so_and_frees_its_place_and_the_upstream(upstream: Scripted) -> None:
    upstream.plays([EVENT_STREAM, chunk(words("half")), Act.SILENCE], [Act.SILENCE])
    async with before(upstream, gate=Gate(concurrency=1)) as house, connecting(house) as socket:
        await socket.send_json({"prompt": "a", "id": "x"})
        await socket.send_json({"prompt": "b"})
        assert (await socket.receive_json()) == {"id": "x", "token": "half"}
        assert (house.in_flight, house.waiting) == (1, 1)
        await socket.send_json({"cancel": "x"})
        text, said = await ended(socket, "x")
        assert (text, said["error"]["code"]) == ("", "cancelled")
        await asyncio.wait_for(upstream.exchanges[0].gone.wait(), 5.0)
        await upstream.exchange(1)
        await socket.send_json({"cancel": None})
        assert (await ended(socket))[1]["error"]["code"] == "cancelled"
        await house.until_idle()
        metrics = await house.metrics()
    assert metrics("requests_total", operation="complete", outcome="cancelled") == 2
    assert metrics("client_disconnects_total", operation="complete") == 2


async def test_a_prompt_may_be_cancelled_in_one_breath_with_its_sending() -> None:
    async with through() as (house, _), wire(house.port) as client:
        client.send(upgrade("/stream"))
        assert await client.head() == 101
        said = [told for name in range(20) for told in ({"prompt": "a", "id": name}, {"cancel": name})]
        client.send(b"".join(frame(TEXT, json.dumps(told).encode(), mask=True) for told in said))
        heard = Frames(client.reader)
        for _ in range(20):
            _, data = await heard.next()
            assert json.loads(data)["error"]["code"] == "cancelled"
        await house.until_idle()


async def test_a_client_that_leaves_takes_all_its_prompts_with_it(upstream: Scripted) -> None:
    upstream.otherwise = [EVENT_STREAM, chunk(words("half")), Act.SILENCE]
    async with before(upstream) as house:
        async with connecting(house) as socket:
            for name in range(20):
                await socket.send_json({"prompt": "a", "id": name})
            for _ in range(20):
                await socket.receive_json()
            assert house.in_flight == 20
        await house.until_idle()
        assert all(exchange.gone.is_set() for exchange in upstream.exchanges)
        metrics = await house.metrics()
    assert metrics("requests_total", operation="complete", outcome="cancelled") == 20


async def test_a_client_that_does_not_read_stops_the_reading_of_its_upstreams(upstream: Scripted) -> None:
    upstream.otherwise = [EVENT_STREAM, *[chunk(words("x" * 10_000))] * 5000, LAST]
    async with before(upstream) as house, wire(house.port) as client:
        client.send(upgrade("/stream"))
        assert await client.head() == 101
        client.writer.transport.pause_reading()
        for name in range(4):
            client.send(frame(TEXT, json.dumps({"prompt": "a", "id": name}).encode(), mask=True))
        await upstream.exchange(3)
        sent = await until_still(lambda: sum(exchange.sent for exchange in upstream.exchanges))
        assert sent < 4 * 10_000_000


async def test_a_dead_reader_is_dropped_and_holds_nothing(upstream: Scripted) -> None:
    upstream.otherwise = [EVENT_STREAM, *[chunk(words("x" * 10_000))] * 5000, LAST]
    patient = Server(port=0, admin_port=0, write_stall_seconds=0.3)
    async with before(upstream, server=patient) as house, wire(house.port) as client:
        client.send(upgrade("/stream"))
        assert await client.head() == 101
        client.writer.transport.pause_reading()
        for name in range(4):
            client.send(frame(TEXT, json.dumps({"prompt": "a", "id": name}).encode(), mask=True))
        await upstream.exchange(3)
        await house.until_idle()
        metrics = await house.metrics()
    assert metrics("client_disconnects_total", operation="complete", phase="stalled") >= 1
    assert metrics("requests_total", operation="complete", outcome="cancelled") == 4


async def test_prompts_are_counted_among_the_bodies_in_memory_and_given_back(upstream: Scripted) -> None:
    upstream.otherwise = [Act.SILENCE]
    async with before(upstream) as house:
        bodies = house.gateway._edge._bodies
        async with connecting(house) as socket:
            for name in range(3):
                await socket.send_json({"prompt": "x" * 100_000, "id": name})
            await upstream.exchange(2)
            assert bodies.held > 300_000
        await house.until_idle()
        await until(lambda: not bodies.held, "nothing is held")


# ── who may ask ──


async def test_a_key_is_needed_where_there_are_callers_and_a_page_sends_it_as_a_subprotocol() -> None:
    callers = {"one": Secret(ONE)}
    async with through(callers=callers) as (house, simulator):
        answered = await house.ask(b"", "/stream", method="GET")
        assert (answered.status, answered.error["code"]) == (401, "invalid_api_key")
        protocols = ("prompts", f"openai-insecure-api-key.{ONE}")
        async with connecting(house, protocols=protocols, headers={"origin": "https://page"}) as socket:
            assert socket.protocol == "prompts"
            await socket.send_json({"prompt": "a"})
            assert (await ended(socket))[1]["done"] is True
    assert ONE not in str(simulator.seen)


async def test_a_strange_page_cannot_use_a_gateway_that_asks_for_no_key() -> None:
    async with through() as (house, simulator), connecting(house, headers={"origin": "https://page"}) as socket:
        await socket.send_json({"prompt": "a"})
        assert (await ended(socket))[1]["error"]["code"] == "invalid_api_key"
    assert not simulator.seen


async def test_a_prompt_keeps_the_plan_that_it_arrived_with_and_a_key_that_was_taken_away_ends_its_prompts() -> None:
    async with simulating(FOUR_TOKENS, remember=10) as simulator:
        first = settings(at(simulator.base_url), callers={"one": Secret(ONE)}, jobs=Jobs(model="m"))
        later = settings(at(simulator.base_url), callers={"two": Secret(OTHER)}, jobs=Jobs(model="m"))
        async with (
            serving(first, load=lambda: later) as house,
            connecting(house, headers={"authorization": f"Bearer {ONE}"}) as socket,
        ):
            await socket.send_json({"prompt": "a"})
            assert (await ended(socket))[1]["done"] is True
            await house.gateway.reload()
            await socket.send_json({"prompt": "a"})
            assert (await ended(socket))[1]["error"]["code"] == "invalid_api_key"


async def test_what_is_no_upgrade_is_answered_as_any_other(house: House) -> None:
    for method, status, code in (("GET", 400, "invalid_request"), ("POST", 405, "method_not_allowed")):
        answered = await house.ask(b"{}", "/stream", method=method)
        assert (answered.status, answered.error["code"]) == (status, code)


# ── the stop ──


async def test_a_stop_lets_prompts_end_takes_no_more_and_closes_with_1001(upstream: Scripted) -> None:
    go = asyncio.Event()
    upstream.plays([EVENT_STREAM, chunk(words("half ")), go, chunk(words("whole", "stop") + DONE), LAST])
    async with before(upstream) as house, connecting(house) as socket, connecting(house) as idle:
        await socket.send_json({"prompt": "a", "id": 1})
        assert (await socket.receive_json())["token"] == "half "
        draining = asyncio.create_task(house.gateway.drain(5.0))
        assert (await idle.receive()).data == 1001
        await socket.send_json({"prompt": "b", "id": 2})
        said = await socket.receive_json()
        assert (said["id"], said["error"]["code"]) == (2, "draining")
        go.set()
        text, said = await ended(socket, 1)
        assert (text, said["done"]) == ("whole", True)
        assert (await socket.receive()).data == 1001
        assert await draining


async def test_prompts_that_outlive_the_stop_are_told_so_and_closed_with_1001(upstream: Scripted) -> None:
    upstream.otherwise = [EVENT_STREAM, chunk(words("half")), Act.SILENCE]
    async with AsyncExitStack() as running:
        house = await running.enter_async_context(before(upstream))
        async with connecting(house) as socket:
            for name in range(3):
                await socket.send_json({"prompt": "a", "id": name})
            for _ in range(3):
                assert "token" in await socket.receive_json()
            stopping = asyncio.create_task(running.aclose())
            told = {}
            for _ in range(3):
                said = await socket.receive_json()
                told[said["id"]] = said["error"]["code"]
            assert told == dict.fromkeys(range(3), "draining")
            assert (await socket.receive()).data == 1001
            await stopping
    await until(lambda: all(exchange.gone.is_set() for exchange in upstream.exchanges), "the upstreams are let go")
