"""Anthropic's official SDK through the gateway: whatever it does with the provider itself, it does here."""

from __future__ import annotations

import asyncio
import json
import random
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

from proxy.config import PASSTHROUGH, Gate, Limits, Model, Secret, load
from proxy.simulator import ALWAYS, Profile, Simulator, Style, profiles
from proxy.simulator import serving as simulating
from proxy.simulator.messages import SIGNATURE, THOUGHT
from tests.e2e.running import HELLO, UPSTREAM_KEY, House, at, serving, settings, until
from tests.e2e.scripted import EVENT_STREAM, LAST, Act, Scripted, answer, chunk
from tests.e2e.wire import request, wire

FOUR_TOKENS = replace(profiles.INSTANT, output_tokens=4, style=Style.ANTHROPIC)
SAID = "echo: hello runs down the"
MESSAGES = "/v1/messages"
ASKED: Any = {"model": "claude-test", "max_tokens": 100, "messages": HELLO}
TOOL: Any = {"name": "höhe", "input_schema": {"type": "object", "properties": {"text": {"type": "string"}}}}
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


def speaking(house: House, **said: Any) -> AsyncAnthropic:
    """The official client, without retries of its own unless told; close it with `async with`."""
    told: dict[str, Any] = {"base_url": house.origin, "api_key": "sk-client", "max_retries": 0} | said
    return AsyncAnthropic(**told)


@asynccontextmanager
async def through(
    profile: Profile = FOUR_TOKENS, *, names: tuple[str, ...] = (), **sections: Any
) -> AsyncIterator[tuple[House, AsyncAnthropic, Simulator]]:
    """The gateway in front of a simulated provider, and a client of it; `names` are configured models."""
    async with simulating(profile, remember=100) as simulator:
        if names:
            sections["models"] = {name: Model(upstreams=("up",)) for name in names}
        upstream = at(simulator.base_url, dialect="anthropic")
        async with serving(settings(upstream, **sections)) as house, speaking(house) as client:
            yield house, client, simulator


@asynccontextmanager
async def before(upstream: Scripted, **sections: Any) -> AsyncIterator[tuple[House, AsyncAnthropic]]:
    """The gateway in front of a scripted upstream that speaks Anthropic's API, and a client of it."""
    said = at(upstream.base_url, dialect="anthropic", limits=Limits(learn=False))
    async with serving(settings(said, **sections)) as house, speaking(house) as client:
        yield house, client


WHOLE = {"type": "message", "content": [], "usage": {"input_tokens": 1, "output_tokens": 1}}


def event(kind: str, **said: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **said})}\n\n".encode()


BEGUN = event(
    "message_start",
    message={
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": "claude-test",
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 3,
            "cache_read_input_tokens": 20,
            "output_tokens": 1,
        },
    },
)
OPENED = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
PING = event("ping")
HI = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "hi"})
CLOSED = event("content_block_stop", index=0)
ENDED = event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 7})
STOPPED = event("message_stop")
TOLD = (BEGUN, OPENED, PING, HI, CLOSED, ENDED, STOPPED)


# ── what works ──


async def test_a_message_is_answered() -> None:
    async with through() as (house, client, simulator):
        message = await client.messages.create(**ASKED)
        metrics = await house.metrics()
    assert [(block.type, block.text) for block in message.content if block.type == "text"] == [("text", SAID)]
    assert (message.model, message.stop_reason) == ("claude-test", "end_turn")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (1, 4)
    assert simulator.seen[0].path == MESSAGES
    assert metrics("requests_total", operation="messages", outcome="ok", stream="false") == 1
    assert metrics("tokens_total", type="output") == 4


async def test_a_message_is_streamed() -> None:
    async with through() as (house, client, _):
        events = [event async for event in await client.messages.create(**ASKED, stream=True)]
        metrics = await house.metrics()
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta") == SAID
    assert metrics("requests_total", operation="messages", outcome="ok", stream="true") == 1
    assert metrics("tokens_total", type="output") == 4
    assert metrics("time_to_first_token_seconds_count") == 1


async def test_the_streaming_helper_of_the_sdk_works() -> None:
    async with through() as (_, client, _), client.messages.stream(**ASKED) as stream:
        told = "".join([text async for text in stream.text_stream])
        final = await stream.get_final_message()
    assert told == SAID
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 4)


async def test_a_synchronous_client_works() -> None:
    def talk(origin: str) -> tuple[str, str]:
        with Anthropic(base_url=origin, api_key="sk-client", max_retries=0) as client:
            whole = client.messages.create(**ASKED)
            with client.messages.stream(**ASKED) as stream:
                told = "".join(stream.text_stream)
            block = whole.content[0]
            assert block.type == "text"
            return block.text, told

    async with through() as (house, _, _):
        assert await asyncio.to_thread(talk, house.origin) == (SAID, SAID)


@pytest.mark.parametrize("forced", [{"type": "any"}, {"type": "tool", "name": "höhe"}], ids=["any", "named"])
async def test_a_tool_is_used_streamed_or_not(forced: Any) -> None:
    async with through() as (_, client, _):
        whole = await client.messages.create(**ASKED, tools=[TOOL], tool_choice=forced)
        async with client.messages.stream(**ASKED, tools=[TOOL], tool_choice=forced) as stream:
            streamed = await stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        (block,) = message.content
        assert block.type == "tool_use"
        assert (block.name, block.input) == ("höhe", {"text": SAID})


class Turbine(BaseModel):
    name: str
    head: float


async def test_a_structured_answer_is_parsed_streamed_or_not() -> None:
    async with through() as (_, client, simulator):
        whole = await client.messages.parse(**ASKED, output_format=Turbine)
        async with client.messages.stream(**ASKED, output_format=Turbine) as stream:
            streamed = await stream.get_final_message()
        asked = json.loads(simulator.seen[0].body)["output_config"]["format"]["type"]
    assert asked == "json_schema"
    assert whole.parsed_output == streamed.parsed_output == Turbine(name=SAID, head=0)


async def test_the_synchronous_client_counts_tokens_uses_tools_and_parses() -> None:
    forced: Any = {"type": "any"}

    def talk(origin: str) -> None:
        with Anthropic(base_url=origin, api_key="sk-client", max_retries=0) as client:
            assert client.messages.count_tokens(model="claude-test", messages=HELLO).input_tokens == 1
            whole = client.messages.create(**ASKED, tools=[TOOL], tool_choice=forced)
            with client.messages.stream(**ASKED, tools=[TOOL], tool_choice=forced) as stream:
                parts = [event.partial_json for event in stream if event.type == "input_json"]
                streamed = stream.get_final_message()
            for message in (whole, streamed):
                assert message.content[0].type == "tool_use"
                assert message.content[0].input == {"text": SAID}
            assert json.loads("".join(parts)) == {"text": SAID}
            parsed = client.messages.parse(**ASKED, output_format=Turbine)
            assert parsed.parsed_output == Turbine(name=SAID, head=0)
            raw = client.messages.with_raw_response.create(**ASKED)
            assert raw.headers["request-id"] == raw.parse()._request_id

    async with through() as (house, _, _):
        await asyncio.to_thread(talk, house.origin)


async def test_a_picture_in_a_message_arrives_as_it_was_sent() -> None:
    data = b64encode(random.Random(4).randbytes(2 << 20)).decode()
    picture: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    told: Any = [{"role": "user", "content": [picture, {"type": "text", "text": "hello"}]}]
    async with through() as (_, client, simulator):
        message = await client.messages.create(**ASKED | {"messages": told})
        came = json.loads(simulator.seen[0].body)
    assert message.content[0].type == "text"
    assert message.content[0].text == SAID
    assert came["messages"] == told


async def test_a_file_is_uploaded_listed_read_and_deleted() -> None:
    sent = random.Random(5).randbytes(3 << 20)

    def talk(origin: str) -> bytes:
        with Anthropic(base_url=origin, api_key="sk-client", max_retries=0) as client:
            return client.files.download(client.files.upload(file=("b.bin", sent)).id).read()

    async with through() as (house, client, _):
        made = await client.files.upload(file=("a.pdf", sent, "application/pdf"))
        shown = await client.files.retrieve_metadata(made.id)
        listed = [file.id async for file in client.files.list()]
        content = await (await client.files.download(made.id)).read()
        deleted = await client.files.delete(made.id)
        with pytest.raises(anthropic.NotFoundError, match=made.id):
            await client.files.retrieve_metadata(made.id)
        other = await asyncio.to_thread(talk, house.origin)
    assert (made.filename, made.size_bytes, made.mime_type) == ("a.pdf", len(sent), "application/pdf")
    assert (shown, listed, deleted.id) == (made, [made.id], made.id)
    assert content == other == sent


async def test_a_tool_s_result_is_taken_back(upstream: Scripted) -> None:
    history: Any = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "höhe", "input": {"of": "🏔"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "4,478 m \u2028"}]},
    ]
    upstream.otherwise = answer(WHOLE)
    async with before(upstream) as (_, client):
        await client.messages.create(**ASKED | {"messages": history}, tools=[TOOL])
    assert upstream.exchanges[0].json["messages"] == history


async def test_thinking_comes_before_the_answer_streamed_or_not() -> None:
    async with through() as (_, client, _):
        whole = await client.messages.create(**ASKED, thinking=THINKING)
        async with client.messages.stream(**ASKED, thinking=THINKING) as stream:
            streamed = await stream.get_final_message()
    for message in (whole, streamed):
        thought, told = message.content
        assert thought.type == "thinking"
        assert (thought.thinking, thought.signature) == (THOUGHT, SIGNATURE)
        assert told.type == "text"
        assert told.text == SAID


async def test_tokens_are_counted_and_none_are_charged() -> None:
    async with through() as (house, client, simulator):
        counted = await client.messages.count_tokens(model="claude-test", messages=HELLO)
        metrics = await house.metrics()
    assert counted.input_tokens == 1
    assert simulator.seen[0].path == "/v1/messages/count_tokens"
    assert metrics("requests_total", operation="count_tokens", outcome="ok") == 1
    assert metrics("tokens_total") == 0
    assert metrics("usage_missing_total") == 0


async def test_beta_features_are_asked_for_by_their_header_and_query() -> None:
    async with through() as (house, client, simulator):
        await client.beta.messages.create(**ASKED, betas=["interleaved-thinking-2025-05-14"])
        await house.ask(ASKED, "/v1/messages?beta=true")
    assert [seen.path for seen in simulator.seen] == ["/v1/messages", "/v1/messages?beta=true"]
    assert simulator.seen[0].headers["anthropic-beta"] == "interleaved-thinking-2025-05-14"


async def test_what_the_client_sends_arrives_byte_for_byte(upstream: Scripted) -> None:
    raw = (
        '{"messages": [{"role": "user",  "content": "\\u2028 é 🏔"}],\n"max_tokens":100, "model":"claude-test"}'.encode()
    )
    async with before(upstream) as (house, _):
        await house.ask(raw, MESSAGES)
    assert upstream.exchanges[0].body == raw


async def test_a_stream_comes_through_byte_for_byte(upstream: Scripted) -> None:
    upstream.plays([EVENT_STREAM, *map(chunk, TOLD), LAST])
    async with before(upstream) as (house, _):
        answered = await house.ask(ASKED | {"stream": True}, MESSAGES)
    assert answered.body == b"".join(TOLD)


async def test_a_key_in_the_environment_is_enough_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `ANTHROPIC_API_KEY=... penstock serve`, and a program that knows nothing but ANTHROPIC_BASE_URL."""
    async with simulating(FOUR_TOKENS, remember=1) as simulator:
        known = {"ANTHROPIC_API_KEY": UPSTREAM_KEY, "PENSTOCK_UPSTREAMS__ANTHROPIC__BASE_URL": simulator.base_url}
        known |= {"PENSTOCK_SERVER__PORT": "0", "PENSTOCK_SERVER__ADMIN_PORT": "0"}
        async with serving(load(None, known)) as house:
            monkeypatch.setenv("ANTHROPIC_BASE_URL", house.origin)
            monkeypatch.setenv("ANTHROPIC_API_KEY", "unused")
            async with AsyncAnthropic() as client:
                message = await client.messages.create(**ASKED)
    assert message.usage.output_tokens == 4
    assert simulator.seen[0].headers["x-api-key"] == UPSTREAM_KEY


# ── message batches ──

BATCH: Any = [{"custom_id": name, "params": ASKED} for name in ("a", "b")]


async def test_a_batch_is_made_ended_and_read_and_all_of_it_goes_through_the_gateway() -> None:
    async with through() as (house, client, simulator):
        made = await client.messages.batches.create(requests=BATCH)
        listed = [batch.id async for batch in client.messages.batches.list(limit=5)]
        ended = await client.messages.batches.retrieve(made.id)
        results = {line.custom_id: line.result.type async for line in await client.messages.batches.results(made.id)}
        cancelled = await client.messages.batches.cancel((await client.messages.batches.create(requests=BATCH)).id)
        deleted = await client.messages.batches.delete(made.id)
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.batches.retrieve(made.id)
        metrics = await house.metrics()
    assert listed == [made.id]
    assert ended.processing_status == "ended"
    assert ended.results_url == f"/v1/messages/batches/{made.id}/results"
    assert results == {"a": "succeeded", "b": "succeeded"}
    assert (cancelled.processing_status, deleted.id) == ("canceling", made.id)
    seen = [(seen.method, seen.path.removeprefix("/v1/messages/batches")) for seen in simulator.seen]
    assert seen[:5] == [("POST", ""), ("GET", "?limit=5")] + [("GET", f"/{made.id}")] * 2 + [
        ("GET", f"/{made.id}/results")
    ]
    assert all(seen.headers["x-api-key"] == UPSTREAM_KEY for seen in simulator.seen)
    assert metrics("requests_total", operation="message_batches") == 9
    assert metrics("requests_total", operation="message_batches", outcome="ok") == 8
    assert metrics("usage_missing_total") == 0


async def test_a_synchronous_client_reads_the_results_of_a_batch() -> None:
    def talk(origin: str) -> list[str]:
        with Anthropic(base_url=origin, api_key="sk-client", max_retries=0) as client:
            made = client.messages.batches.create(requests=BATCH)
            client.messages.batches.retrieve(made.id)
            return [line.custom_id for line in client.messages.batches.results(made.id)]

    async with through() as (house, _, _):
        assert await asyncio.to_thread(talk, house.origin) == ["a", "b"]


async def test_results_stream_through_as_they_come(upstream: Scripted) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-jsonl\r\ntransfer-encoding: chunked\r\n\r\n"
    line, held = b'{"custom_id":"a","result":{"type":"expired"}}\n', asyncio.Event()
    upstream.plays([head, chunk(line), held, chunk(line), LAST])
    async with before(upstream) as (house, _), wire(house.port) as client:
        client.send(request(b"", "/v1/messages/batches/msgbatch_1/results", method="GET"))
        assert await client.head() == 200
        assert await client.chunk() == line
        held.set()
        assert await client.rest() == line


async def test_of_what_is_told_of_a_batch_nothing_changes_but_the_address_of_its_results(upstream: Scripted) -> None:
    told = '{ "results_url" :"https://api.example/v1/messages/batches/b1/results", "x": "é\\u2028", "next":null}'
    upstream.plays(answer(told.encode()), answer(b'{"results_url": null}'), answer(b"{broken", 500))
    async with before(upstream) as (house, _):
        bodies = [(await house.ask(b"", "/v1/messages/batches/b1", method="GET")).body for _ in range(2)]
    assert bodies[0] == told.replace("https://api.example", "").encode()
    assert bodies[1] == b'{"results_url": null}'


async def test_a_batch_whose_telling_breaks_off_is_an_error(upstream: Scripted) -> None:
    cut = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"id":'
    upstream.otherwise = [cut, Act.FIN]
    async with before(upstream) as (house, _):
        answered = await house.ask(b"", "/v1/messages/batches/b1", method="GET")
    assert (answered.status, answered.error["details"]["error_code"]) == (502, "stream_truncated")


async def test_counting_tokens_takes_nothing_from_the_limits_of_messages() -> None:
    """Anthropic limits the two apart."""
    said = Model(upstreams=("up",), upstream_model="claude-there")
    async with through(models={"claude-test": said}) as (house, client, simulator):
        await client.messages.count_tokens(model="claude-test", messages=HELLO)
        async with house.http.get(f"{house.admin}/admin/limits") as answered:
            pools = {pool["pool"]: pool for pool in (await answered.json())["limits"]}
    assert json.loads(simulator.seen[0].body)["model"] == "claude-there"
    assert pools["up/claude-there"]["cold_calls"] == 8


async def test_everything_else_of_anthropic_s_api_goes_to_the_upstream_that_speaks_it() -> None:
    async with simulating(FOUR_TOKENS, remember=10) as simulator, simulating(FOUR_TOKENS, remember=10) as other:
        upstreams = {"o": at(other.base_url), "a": at(simulator.base_url, dialect="anthropic")}
        models = {"gpt": Model(upstreams=("o",)), "claude": Model(upstreams=("a",))}
        async with serving(settings(upstreams, models=models)) as house:
            await house.ask(b"", "/v1/skills?limit=1", method="GET", headers={"anthropic-version": "2023-06-01"})
    assert [seen.path for seen in simulator.seen] == ["/v1/skills?limit=1"]
    assert not other.seen


# ── models ──


async def test_a_client_of_anthropic_s_sees_the_models_that_it_can_use() -> None:
    async with simulating(FOUR_TOKENS) as simulator:
        upstreams = {"a": at(simulator.base_url, dialect="anthropic"), "o": at(simulator.base_url)}
        models = {name: Model(upstreams=("a",)) for name in ("claude-1", "claude-2", "claude-3")}
        said = settings(upstreams, models=models | {"gpt": Model(upstreams=("o",))})
        async with serving(said) as house, speaking(house) as client, house.sdk() as other:
            listed = [model async for model in client.models.list()]
            paged = [model.id async for model in client.models.list(limit=2)]
            back = await client.models.list(limit=1, before_id="claude-3")
            one = await client.models.retrieve("claude-2")
            theirs = [model.id async for model in other.models.list()]
            with pytest.raises(anthropic.BadRequestError, match="limit must be"):
                await client.models.list(limit=0)
            with pytest.raises(anthropic.BadRequestError, match="after_id is no model"):
                await client.models.list(after_id="gpt")
    assert [(model.id, model.display_name, model.type) for model in listed] == [
        (name, name, "model") for name in ("claude-1", "claude-2", "claude-3")
    ]
    assert paged == ["claude-1", "claude-2", "claude-3"]
    assert ([model.id for model in back.data], back.has_more) == (["claude-2"], True)
    assert one.id == "claude-2"
    assert theirs == ["gpt"]


async def test_behind_a_wildcard_the_provider_s_own_list_is_told() -> None:
    async with through() as (_, client, simulator):
        listed = [model.id async for model in client.models.list(limit=5)]
        one = await client.models.retrieve("claude-opus-4-8")
    assert "claude-opus-4-8" in listed
    assert one.display_name == "Claude Opus 4 8"
    assert [seen.path for seen in simulator.seen] == ["/v1/models?limit=5", "/v1/models/claude-opus-4-8"]


# ── who calls, and with what ──


async def test_the_upstream_gets_its_own_key_and_the_client_s_version() -> None:
    async with through() as (_, client, simulator):
        await client.messages.create(**ASKED)
    headers = simulator.seen[0].headers
    assert headers["x-api-key"] == UPSTREAM_KEY
    assert headers["anthropic-version"] == client.default_headers["anthropic-version"]
    assert "authorization" not in headers
    assert "sk-client" not in str(headers)


async def test_a_client_that_names_no_version_speaks_the_one_there_is() -> None:
    async with through() as (house, _, simulator):
        assert (await house.ask(ASKED, MESSAGES)).status == 200
        assert (await house.ask(ASKED, MESSAGES, headers={"anthropic-version": "2029-01-01"})).status == 200
    assert [seen.headers["anthropic-version"] for seen in simulator.seen] == ["2023-06-01", "2029-01-01"]


async def test_a_caller_s_key_is_taken_as_bearer_or_as_x_api_key() -> None:
    """The SDK sends it as bearer, its older versions as x-api-key."""
    key = "a-key-of-team-a-0123456789"
    async with through(callers={"team-a": Secret(key)}) as (house, _, simulator):
        async with speaking(house, api_key=key) as client:
            await client.messages.create(**ASKED)
        assert (await house.ask(ASKED, MESSAGES, headers={"x-api-key": key})).status == 200
        async with speaking(house, api_key="another-key") as client:
            with pytest.raises(anthropic.AuthenticationError, match="not known here") as refused:
                await client.messages.create(**ASKED)
    assert refused.value.type == "authentication_error"
    assert refused.value.error_code == "invalid_api_key"
    assert [seen.headers["x-api-key"] for seen in simulator.seen] == [UPSTREAM_KEY] * 2
    assert all("authorization" not in seen.headers for seen in simulator.seen)


@pytest.mark.parametrize("sent", [{"x-api-key": "sk-client"}, {"authorization": "Bearer sk-oauth"}], ids=str)
async def test_a_credential_is_passed_through_as_it_came(sent: dict[str, str]) -> None:
    async with simulating(FOUR_TOKENS, remember=1) as simulator:
        upstream = at(simulator.base_url, dialect="anthropic", api_key=PASSTHROUGH)
        async with serving(settings(upstream)) as house:
            assert (await house.ask(ASKED, MESSAGES, headers=sent)).status == 200
    came = {name: simulator.seen[0].headers.get(name) for name in ("x-api-key", "authorization")}
    assert {name: value for name, value in came.items() if value} == sent


# ── what is refused ──


@pytest.mark.parametrize(
    ("change", "kind", "code", "message"),
    [
        ({"model": 3}, "invalid_request_error", "invalid_request", "`model` is of the wrong type"),
        ({"model": ""}, "invalid_request_error", "missing_model", "`model` is empty"),
        ({"model": "claude-tset"}, "not_found_error", "model_not_found", "did you mean `claude-test`"),
    ],
    ids=["type", "empty", "unknown"],
)
async def test_a_mistake_is_told_in_anthropic_s_shape(change: Any, kind: str, code: str, message: str) -> None:
    async with through(names=("claude-test",)) as (_, client, simulator):
        with pytest.raises(anthropic.APIStatusError, match=message) as refused:
            await client.messages.create(**ASKED | change)
    error = refused.value
    assert (error.type, error.error_code) == (kind, code)
    assert isinstance(error.body, dict)
    assert error.body["type"] == "error"
    assert error.body["request_id"] == error.request_id == error.response.headers["x-request-id"]
    assert not simulator.seen


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "kind"),
    [
        ("POST", "/v1/v1/nowhere", {"anthropic-version": "2023-06-01"}, 404, "not_found_error"),
        ("GET", "/v1/messages", {}, 405, "invalid_request_error"),
        ("POST", "/v1/messages", {"content-length": "0"}, 400, "invalid_request_error"),
        ("POST", "/v1/messages", {"x-penstock-priority": "urgent"}, 400, "invalid_request_error"),
        ("GET", "/v1/models/", {"anthropic-version": "x"}, 404, "not_found_error"),
    ],
)
async def test_the_shape_is_anthropic_s_whatever_is_wrong(
    method: str, path: str, headers: dict[str, str], status: int, kind: str
) -> None:
    async with through() as (house, _, _):
        said = b"" if "content-length" in headers else ASKED
        answered = await house.ask(said, path, method=method, headers=headers)
    assert (answered.status, answered.json["type"], answered.error["type"]) == (status, "error", kind)
    assert answered.headers["request-id"] == answered.headers["x-request-id"] == answered.json["request_id"]


async def test_a_base_url_with_v1_at_its_end_is_told_of() -> None:
    async with through() as (house, _, _), speaking(house, base_url=house.base_url) as client:
        with pytest.raises(anthropic.NotFoundError, match="base_url ends before /v1"):
            await client.messages.create(**ASKED)


async def test_a_model_of_the_other_dialect_is_refused_with_the_way_to_it() -> None:
    async with simulating(FOUR_TOKENS, remember=1) as simulator:
        upstreams = {"a": at(simulator.base_url, dialect="anthropic"), "o": at(simulator.base_url)}
        models = {"claude": Model(upstreams=("a",)), "gpt": Model(upstreams=("o",))}
        async with (
            serving(settings(upstreams, models=models)) as house,
            speaking(house) as client,
            house.sdk() as other,
        ):
            with pytest.raises(anthropic.BadRequestError, match="POST /v1/chat/completions") as refused:
                await client.messages.create(**ASKED | {"model": "gpt"})
            with pytest.raises(openai.BadRequestError, match="POST /v1/messages") as refused_too:
                await other.chat.completions.create(model="claude", messages=HELLO)
    assert (refused.value.type, refused.value.error_code) == ("invalid_request_error", "wrong_dialect")
    assert refused_too.value.code == "wrong_dialect"
    assert not simulator.seen


async def test_too_large_a_body_is_refused_in_its_shape() -> None:
    async with through() as (house, _, _), wire(house.port) as line:
        most = house.gateway.plan.settings.server.max_body_bytes
        line.send(request(b"", MESSAGES, headers={"content-length": str(most + 1)}))
        refused = await line.answer()
    assert (refused.status, refused.error["type"]) == (413, "request_too_large")


async def test_a_full_queue_and_a_late_place_are_told_so_that_the_sdk_comes_back(upstream: Scripted) -> None:
    upstream.plays([Act.SILENCE])
    async with before(upstream, gate=Gate(concurrency=1, queue_limit=0)) as (house, client):
        first = asyncio.create_task(client.messages.create(**ASKED))
        await upstream.exchange()
        with pytest.raises(anthropic.RateLimitError) as refused:
            await client.messages.create(**ASKED)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await house.until_idle()
    assert (refused.value.type, refused.value.error_code) == ("rate_limit_error", "queue_full")
    assert refused.value.response.headers["x-should-retry"] == "true"


async def test_the_sdk_s_retry_after_a_full_queue_succeeds(upstream: Scripted) -> None:
    free = asyncio.Event()
    upstream.plays([free, *answer(WHOLE)], answer(WHOLE))
    async with before(upstream, gate=Gate(concurrency=1, queue_limit=0)) as (house, client):
        first = asyncio.create_task(client.messages.create(**ASKED))
        await upstream.exchange()
        second = asyncio.create_task(client.with_options(max_retries=5).messages.create(**ASKED))
        refusals = 0.0
        while not refusals:
            refusals = (await house.metrics())("requests_total", code="429")
        free.set()
        await asyncio.gather(first, second)
    assert len(upstream.exchanges) == 2


async def test_a_gateway_that_stops_sends_the_sdk_to_another_one() -> None:
    async with through() as (house, client, simulator):
        await house.gateway.drain(0.0)
        with pytest.raises(anthropic.APIStatusError) as refused:
            await client.messages.create(**ASKED)
    error = refused.value
    assert (error.status_code, error.type, error.error_code) == (503, "overloaded_error", "draining")
    assert error.response.headers["x-should-retry"] == "true"
    assert not simulator.seen


# ── what an upstream refuses ──


async def test_an_overloaded_provider_is_tried_again_and_its_word_is_the_last() -> None:
    async with through(replace(FOUR_TOKENS, concurrency=0)) as (house, client, simulator):
        with pytest.raises(anthropic.APIStatusError) as refused:
            await client.messages.create(**ASKED)
        metrics = await house.metrics()
    assert (refused.value.status_code, refused.value.type) == (529, "overloaded_error")
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert len(simulator.seen) == 3
    assert metrics("upstream_attempts_total", result="529") == 3
    assert metrics("requests_total", code="529", outcome="overloaded") == 1


async def test_an_error_of_the_provider_comes_as_it_was_written(upstream: Scripted) -> None:
    said = {"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens: too large"}}
    upstream.plays(answer(said, 400, {"request-id": "req_theirs"}))
    async with before(upstream) as (_, client):
        with pytest.raises(anthropic.BadRequestError) as refused:
            await client.messages.create(**ASKED)
    assert refused.value.body == said
    assert refused.value.request_id == "req_theirs"


async def test_its_limits_are_learned_from_its_headers_and_no_answer_is_told_to_wait() -> None:
    profile = replace(FOUR_TOKENS, requests_per_minute=600, tokens_per_minute=60_000)
    async with through(profile, names=("claude-test",)) as (house, client, _):
        raw = await client.messages.with_raw_response.create(**ASKED)
        async with house.http.get(f"{house.admin}/admin/limits") as answered:
            pools = {pool["pool"]: pool for pool in (await answered.json())["limits"]}
    assert raw.headers["anthropic-ratelimit-requests-limit"] == "600"
    assert "retry-after" not in raw.headers
    learned = {limit["limit"]: limit["per_minute"] for limit in pools["up/claude-test"]["limits"]}
    assert learned["requests"] == pytest.approx(600)
    assert learned["input_tokens"] == pytest.approx(60_000)


async def test_a_call_that_a_limit_refused_is_sent_again_when_it_may(upstream: Scripted) -> None:
    message = "This request would exceed your organization's rate limit of 50 requests per minute."
    said = {"type": "error", "error": {"type": "rate_limit_error", "message": message}}
    upstream.plays(answer(said, 429, {"retry-after": "1"}), answer(WHOLE))
    async with before(upstream) as (house, client):
        await client.messages.create(**ASKED)
        metrics = await house.metrics()
    first, second = upstream.exchanges
    assert second.at - first.at >= 1.0
    assert metrics("rate_limited_total", source="upstream", scope="requests") == 1


async def test_no_money_is_an_error_and_shuts_the_upstream() -> None:
    async with through() as (_, client, simulator):
        simulator.provider.out_of_money = ALWAYS
        with pytest.raises(anthropic.RateLimitError, match="usage limits"):
            await client.messages.create(**ASKED)
        with pytest.raises(anthropic.APIStatusError) as shut:
            await client.messages.create(**ASKED)
    assert (shut.value.type, shut.value.error_code) == ("overloaded_error", "upstream_shut")


# ── streams that break ──


async def told(client: AsyncAnthropic, kinds: list[str]) -> None:
    """Read a whole stream; `kinds` has what came before an error."""
    async for event in await client.messages.create(**ASKED, stream=True):
        kinds.append(event.type)  # noqa: PERF401 - what came before the error is to be there


async def test_a_stream_that_breaks_off_raises_in_the_sdk() -> None:
    kinds: list[str] = []
    async with through(replace(FOUR_TOKENS, output_tokens=40, cut_rate=1.0)) as (house, client, _):
        with pytest.raises(anthropic.APIStatusError, match="not whole") as broken:
            await told(client, kinds)
        metrics = await house.metrics()
    assert "content_block_delta" in kinds
    assert "message_stop" not in kinds
    assert (broken.value.type, broken.value.error_code) == ("api_error", "stream_truncated")
    assert metrics("requests_total", operation="messages", outcome="truncated") == 1


async def test_an_error_told_in_the_stream_is_passed_on_and_the_call_has_failed() -> None:
    async with through(replace(FOUR_TOKENS, output_tokens=40, error_event_rate=1.0)) as (house, client, _):
        with pytest.raises(anthropic.APIStatusError, match="Internal server error") as broken:
            await told(client, [])
        metrics = await house.metrics()
    assert broken.value.type == "api_error"
    assert metrics("requests_total", operation="messages", outcome="failed") == 1
    assert metrics("stream_aborts_total", reason="error_event") == 1


async def test_a_stream_that_outlives_the_stop_raises_in_the_sdk(upstream: Scripted) -> None:
    upstream.plays([EVENT_STREAM, *map(chunk, TOLD[:4]), Act.SILENCE])
    kinds: list[str] = []
    async with AsyncExitStack() as running:
        said = settings(at(upstream.base_url, dialect="anthropic"))
        house = await running.enter_async_context(serving(said))
        async with speaking(house) as client:
            reading = asyncio.create_task(told(client, kinds))
            await until(lambda: "content_block_delta" in kinds, "it has begun")
            await running.aclose()
            with pytest.raises(anthropic.APIStatusError) as stopped:
                await reading
    assert (stopped.value.type, stopped.value.error_code) == ("overloaded_error", "draining")


@pytest.mark.parametrize("cut", range(1, len(TOLD) - 2))
async def test_a_stream_is_whole_only_with_its_last_word(upstream: Scripted, cut: int) -> None:
    upstream.plays([EVENT_STREAM, *map(chunk, TOLD[:cut]), LAST])
    async with before(upstream) as (house, client):
        with pytest.raises(anthropic.APIStatusError, match="not whole"):
            await told(client, [])
        assert (await house.metrics())("requests_total", outcome="truncated") == 1


async def test_what_was_cached_is_counted_and_a_ping_is_no_token(upstream: Scripted) -> None:
    """The input stands in message_start, cached tokens beside it; the output in message_delta, as a total."""
    held, pinged = asyncio.Event(), len(BEGUN + OPENED + PING)
    upstream.plays([EVENT_STREAM, *map(chunk, TOLD[:3]), held, *map(chunk, TOLD[3:]), LAST])
    async with before(upstream, models={"claude-test": Model(upstreams=("up",))}) as (house, client):
        seen = b""
        async with client.messages.with_streaming_response.create(**ASKED, stream=True) as response:
            async for part in response.iter_bytes():
                seen += part
                if len(seen) == pinged:
                    assert (await house.metrics())("streams_in_flight") == 1
                    held.set()
        await until(lambda: not house.in_flight)
        metrics = await house.metrics()
    assert seen == b"".join(TOLD)
    assert metrics("tokens_total", type="input") == 33
    assert metrics("tokens_total", type="output") == 7
    assert metrics("input_tokens_cached_total") == 20
    assert metrics("input_tokens_cache_write_total") == 3


async def test_a_call_leaves_one_line_and_one_id(upstream: Scripted) -> None:
    upstream.plays(answer(WHOLE, headers={"request-id": "req_theirs"}))
    async with before(upstream) as (_, client):
        raw = await client.messages.with_raw_response.create(**ASKED)
    assert raw.headers["request-id"] == "req_theirs"
    assert re.fullmatch(r"req_[0-9a-f]{32}", raw.headers["x-request-id"])
