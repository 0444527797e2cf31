"""The simulated provider over HTTP, as the official SDK and a raw socket see it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest
import uvloop
from openai import AsyncOpenAI, OpenAI

from proxy.core import usage
from proxy.simulator import ALWAYS, Profile, Simulator, profiles, serving

HELLO: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
FOUR_TOKENS = replace(profiles.INSTANT, output_tokens=4)
ECHO = "echo: hello runs down the"


@asynccontextmanager
async def speaking(profile: Profile, *, remember: int = 0) -> AsyncIterator[tuple[Simulator, AsyncOpenAI]]:
    async with (
        serving(profile, remember=remember) as simulator,
        AsyncOpenAI(base_url=simulator.base_url, api_key="sk-test", max_retries=0) as client,
    ):
        yield simulator, client


async def raw(simulator: Simulator, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and the undecoded body up to the end of the connection."""
    reader, writer = await asyncio.open_connection(simulator.host, simulator.port)
    writer.write(request)
    head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    first, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
    return int(first.split()[1]), headers, body


def post(path: str, said: object, *, key: str = "Authorization: Bearer sk-test\r\n") -> bytes:
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: simulator\r\n{key}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def events(body: bytes) -> list[Any]:
    """The data of a chunked stream's events, `[DONE]` as a string."""
    data = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        data, body = data + body[: int(size, 16)], body[int(size, 16) + 2 :]
    lines = [line[6:] for line in data.decode().split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_chat_echoes_the_last_thing_the_user_said_and_counts_its_tokens() -> None:
    async with speaking(FOUR_TOKENS) as (_, client):
        answer = await client.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    assert answer.choices[0].message.content == ECHO
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "gpt-4o-mini"
    assert answer.usage is not None
    assert usage.of(answer.usage.model_dump()) == usage.Usage(input=3, output=4)  # 14 characters


async def test_parts_and_several_choices_are_understood() -> None:
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    async with speaking(FOUR_TOKENS) as (_, client):
        answer = await client.chat.completions.create(model="m", messages=parts, n=2, max_completion_tokens=1)
    assert [choice.message.content for choice in answer.choices] == ["echo: ab", "echo: ab"]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("each", [1, 3])
async def test_a_streamed_chat_is_the_same_answer_in_chunks(each: int) -> None:
    async with speaking(replace(FOUR_TOKENS, chunk_tokens=each)) as (_, client):
        stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ECHO
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len(chunks) == 1 + -(-4 // each) + 1
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


async def test_usage_is_a_last_chunk_of_its_own_and_null_before_it() -> None:
    said = {"model": "m", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    async with serving(FOUR_TOKENS) as simulator:
        status, headers, body = await raw(simulator, post("/v1/chat/completions", said))
    *chunks, last, done = events(body)
    assert (status, headers["content-type"], done) == (200, "text/event-stream; charset=utf-8", "[DONE]")
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 7


async def test_completions_answer_each_prompt_streamed_or_not() -> None:
    async with speaking(replace(FOUR_TOKENS, output_tokens=2)) as (_, client):
        whole = await client.completions.create(model="m", prompt=["a", "b"])
        texts = {0: "", 1: ""}
        async for chunk in await client.completions.create(model="m", prompt=["a", "b"], stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        tokens = await client.completions.create(model="m", prompt=[5, 6, 7])
    assert [choice.text for choice in whole.choices] == list(texts.values()) == ["echo: a runs", "echo: b runs"]
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == 3


async def test_embeddings_depend_on_their_text_alone_however_they_are_encoded() -> None:
    async with speaking(profiles.INSTANT) as (_, client):
        both = await client.embeddings.create(model="m", input=["alpha", "beta"], encoding_format="float")
        one = await client.embeddings.create(model="m", input="beta", dimensions=256)  # the SDK asks for base64
    assert [item.index for item in both.data] == [0, 1]
    assert both.data[1].embedding == pytest.approx(one.data[0].embedding, rel=1e-6)
    assert both.data[0].embedding != both.data[1].embedding
    assert sum(value * value for value in one.data[0].embedding) == pytest.approx(1.0)
    assert both.usage.total_tokens == 2


async def test_responses_answer_whole_and_as_typed_events() -> None:
    async with speaking(FOUR_TOKENS) as (_, client):
        whole = await client.responses.create(model="m", input="hello", instructions="Be brief.")
        seen = [event async for event in await client.responses.create(model="m", input=HELLO, stream=True)]
    assert (whole.output_text, whole.status) == (ECHO, "completed")
    assert whole.usage is not None
    assert usage.of(whole.usage.model_dump()) == usage.Usage(input=3, output=4)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == ECHO
    assert [seen[0].type, seen[1].type] == ["response.created", "response.in_progress"]
    last = seen[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == ECHO
    assert last.response.usage == whole.usage


async def test_a_response_cut_by_its_maximum_is_incomplete() -> None:
    async with speaking(FOUR_TOKENS) as (_, client):
        whole = await client.responses.create(model="m", input="hello", max_output_tokens=2)
        seen = [e async for e in await client.responses.create(model="m", input="x", max_output_tokens=2, stream=True)]
    assert (whole.status, whole.output_text) == ("incomplete", "echo: hello runs")
    assert seen[-1].type == "response.incomplete"


async def test_models_are_those_of_the_profile_and_an_unknown_one_is_404() -> None:
    async with speaking(replace(profiles.INSTANT, models=("org/one", "two"))) as (_, client):
        assert [model.id async for model in client.models.list()] == ["org/one", "two"]
        assert (await client.models.retrieve("org/one")).id == "org/one"
        with pytest.raises(openai.NotFoundError) as of_list:
            await client.models.retrieve("three")
        with pytest.raises(openai.NotFoundError) as of_call:
            await client.chat.completions.create(model="three", messages=HELLO)
    assert of_list.value.code == of_call.value.code == "model_not_found"


async def test_the_blocking_client_works_too() -> None:
    answers: list[str | None] = []

    def talk(base_url: str) -> None:
        with OpenAI(base_url=base_url, api_key="sk-test", max_retries=0) as client:
            whole = client.chat.completions.create(model="m", messages=HELLO)
            streamed = client.chat.completions.create(model="m", messages=HELLO, stream=True)
            answers.append(whole.choices[0].message.content)
            answers.append("".join(chunk.choices[0].delta.content or "" for chunk in streamed))

    async with serving(FOUR_TOKENS) as simulator:
        thread = threading.Thread(target=talk, args=(simulator.base_url,))
        thread.start()
        await asyncio.to_thread(thread.join)
    assert answers == [ECHO, ECHO]


async def test_every_answer_carries_the_headers_of_the_real_one() -> None:
    limited = replace(FOUR_TOKENS, requests_per_minute=500, requests_burst=50, tokens_per_minute=200_000)
    async with speaking(limited) as (_, client):
        told = await client.chat.completions.with_raw_response.create(model="m", messages=HELLO)
        again = await client.chat.completions.with_raw_response.create(model="m", messages=HELLO, stream=True)
        async for _ in again.parse():
            pass
    headers = told.headers
    assert headers["x-ratelimit-limit-requests"] == "50"
    assert headers["x-ratelimit-remaining-requests"] == "49"
    assert headers["x-ratelimit-reset-requests"] == "120ms"
    assert headers["x-ratelimit-limit-tokens"] == "200000"
    assert headers["openai-version"] == "2020-10-01"
    assert headers["openai-processing-ms"].isdigit()
    assert headers["x-request-id"] != again.headers["x-request-id"]
    assert "x-ratelimit-remaining-requests" in again.headers


async def test_a_burst_is_refused_as_the_real_one_refuses() -> None:
    async with speaking(replace(FOUR_TOKENS, requests_per_minute=6, requests_burst=5)) as (simulator, client):
        calls = [client.chat.completions.create(model="m", messages=HELLO) for _ in range(20)]
        said = await asyncio.gather(*calls, return_exceptions=True)
    refusals = [error for error in said if isinstance(error, openai.RateLimitError)]
    assert len(refusals) == simulator.provider.stats.refused["requests"] == 15
    assert refusals[-1].code == "rate_limit_exceeded"
    assert refusals[-1].type == "requests"
    assert int(refusals[-1].response.headers["retry-after-ms"]) <= 10_000
    assert "Limit 6, Used 6, Requested 1." in refusals[-1].message


async def test_a_silent_provider_has_no_headers_over_http_either() -> None:
    async with speaking(replace(profiles.SELF_HOSTED, first_token_seconds=0)) as (_, client):
        told = await client.embeddings.with_raw_response.create(model="m", input="a")
    assert not [name for name in told.headers if "ratelimit" in name or "openai" in name]


@pytest.mark.parametrize(
    ("request_bytes", "status", "says"),
    [
        (post("/v1/chat/completions", b'{"model": '), 400, "could not parse the JSON body"),
        (post("/v1/chat/completions", b'{"model": "\xff"}'), 400, "could not parse the JSON body"),
        (post("/v1/chat/completions", {"messages": []}), 400, "missing required field `model`"),
        (post("/v1/embeddings", {"model": "m", "input": 3}), 400, "$.input"),
        (post("/v1/chat/completions", {}, key=""), 401, "didn't provide an API key"),
        (post("/v1/chat/completions", {}, key="Authorization: Bearer sk-other\r\n"), 401, "Incorrect API key"),
        (post("/v1/nothing", {}), 404, "Invalid URL (POST /v1/nothing)"),
        (post("/v1/models", {}), 405, "Not allowed to POST"),
    ],
)
async def test_bad_calls_are_told_in_openais_shape(request_bytes: bytes, status: int, says: str) -> None:
    async with serving(replace(profiles.INSTANT, keys=("sk-test",))) as simulator:
        answered, headers, body = await raw(simulator, request_bytes)
    error = json.loads(body)["error"]
    assert (answered, headers["content-type"]) == (status, "application/json")
    assert says in error["message"]
    assert "sk-other" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert headers["x-request-id"].startswith("req_")
    assert simulator.provider.stats.arrived == 0


async def test_the_latest_requests_are_remembered() -> None:
    async with speaking(FOUR_TOKENS, remember=2) as (simulator, client):
        for number in range(3):
            await client.embeddings.create(model="m", input=str(number), extra_headers={"X-Number": str(number)})
    assert [seen.headers["x-number"] for seen in simulator.seen] == ["1", "2"]
    assert json.loads(simulator.seen[-1].body)["input"] == "2"
    assert simulator.seen[-1].path == "/v1/embeddings"


async def test_switches_work_while_it_runs() -> None:
    async with speaking(FOUR_TOKENS) as (simulator, client):
        await client.embeddings.create(model="m", input="a")
        simulator.provider.out_of_money = ALWAYS
        with pytest.raises(openai.RateLimitError, match="exceeded your current quota"):
            await client.embeddings.create(model="m", input="a")
        simulator.provider.out_of_money, simulator.provider.outage = None, ALWAYS
        with pytest.raises(openai.InternalServerError):
            await client.embeddings.create(model="m", input="a")


async def broken(fault: str, said: dict[str, object], path: str = "/v1/chat/completions") -> tuple[int, bytes]:
    profile = replace(FOUR_TOKENS, stall_seconds=0.0)
    async with serving(replace(profile, **{fault: 1.0})) as simulator:  # type: ignore[arg-type]  # a rate's name
        status, _, body = await raw(simulator, post(path, said))
        assert simulator.provider.stats.in_flight == 0
    return status, body


STREAMED: dict[str, object] = {"model": "m", "messages": HELLO, "stream": True}
WHOLE: dict[str, object] = {"model": "m", "messages": HELLO}
Running = Callable[[Awaitable[tuple[int, bytes]]], tuple[int, bytes]]
on_each_loop = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


@on_each_loop
def test_a_reset_comes_before_any_byte(run: Running) -> None:
    for said in (WHOLE, STREAMED):
        with pytest.raises(ConnectionResetError):
            run(broken("reset_rate", said))


@on_each_loop
def test_a_cut_stream_ends_cleanly_without_its_mark(run: Running) -> None:
    _, body = run(broken("cut_rate", STREAMED))
    assert body.endswith(b"0\r\n\r\n")
    assert ECHO[:11] in body.decode()
    assert b"[DONE]" not in body
    assert b'"finish_reason":"stop"' not in body


@on_each_loop
def test_an_aborted_stream_ends_without_its_last_chunk_but_what_was_sent_arrives(run: Running) -> None:
    _, body = run(broken("abort_rate", STREAMED))
    assert ECHO[:11] in body.decode()
    assert b"[DONE]" not in body
    assert not body.endswith(b"0\r\n\r\n")


def test_an_error_told_in_a_stream_is_its_last_event() -> None:
    status, body = asyncio.run(broken("error_event_rate", STREAMED))
    assert status == 200
    assert events(body)[-1]["error"]["type"] == "server_error"
    _, body = asyncio.run(broken("error_event_rate", {"model": "m", "input": "x", "stream": True}, "/v1/responses"))
    assert events(body)[-1]["type"] == "error"


def test_a_stalled_answer_goes_on_when_the_stall_is_over() -> None:
    _, body = asyncio.run(broken("stall_rate", STREAMED))
    assert events(body)[-1] == "[DONE]"
    assert asyncio.run(broken("stall_rate", WHOLE))[0] == 200


@pytest.mark.parametrize(("fault", "status"), [("cut_rate", 200), ("abort_rate", 200), ("error_event_rate", 500)])
def test_whole_answers_break_too(fault: str, status: int) -> None:
    answered, body = asyncio.run(broken(fault, WHOLE))
    assert answered == status
    assert body.endswith(b"0\r\n\r\n") == (fault == "cut_rate")
    assert b'"usage"' not in body


async def test_a_client_that_leaves_a_stalled_stream_gives_its_place_back() -> None:
    async with serving(replace(FOUR_TOKENS, stall_rate=1.0)) as simulator:
        reader, writer = await asyncio.open_connection(simulator.host, simulator.port)
        writer.write(post("/v1/chat/completions", STREAMED))
        await reader.readuntil(b"echo: hello")
        assert simulator.provider.stats.in_flight == 1
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(5):
            while simulator.provider.stats.in_flight:  # noqa: ASYNC110  # the provider is pure: it has no events
                await asyncio.sleep(0)


async def test_a_client_that_leaves_while_it_is_written_to_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Each resets its connection at another moment of its stream; some of them are between two writes of one turn."""
    profile = replace(profiles.INSTANT, output_tokens=2000, tokens_per_second=2000)
    async with serving(profile) as simulator:

        async def leave(after: float) -> None:
            reader, writer = await asyncio.open_connection(simulator.host, simulator.port)
            writer.write(post("/v1/chat/completions", STREAMED))
            await reader.readuntil(b"data")
            await asyncio.sleep(after)
            hard = struct.pack("ii", 1, 0)  # what close() then sends is a reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, hard)
            writer.transport.abort()

        await asyncio.gather(*(leave(number / 1000) for number in range(60)))
        async with asyncio.timeout(5):
            while simulator.provider.stats.in_flight:  # noqa: ASYNC110  # the provider is pure: it has no events
                await asyncio.sleep(0)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_its_end_waits_for_nobody() -> None:
    async with asyncio.timeout(5), serving(replace(FOUR_TOKENS, stall_rate=1.0)) as simulator:
        reader, writer = await asyncio.open_connection(simulator.host, simulator.port)
        writer.write(post("/v1/chat/completions", STREAMED))
        await reader.readuntil(b"echo: hello")
    writer.close()
    assert simulator.provider.stats.in_flight == 0


async def test_tokens_come_at_their_pace() -> None:
    profile = replace(FOUR_TOKENS, first_token_seconds=0.04, tokens_per_second=100, output_tokens=5)
    async with speaking(profile) as (_, client):
        clock = asyncio.get_running_loop().time
        began = clock()
        stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
        times = [clock() - began async for _ in stream]
    assert times[0] >= 0.04
    assert times[-1] >= 0.04 + 4 / 100
