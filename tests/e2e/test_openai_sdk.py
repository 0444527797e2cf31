"""The official SDK through the gateway: whatever it does with the provider itself, it does here."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from proxy.config import Gate, Model, Secret
from proxy.simulator import Profile, profiles
from tests.e2e.running import HELLO, House, at, serving, settings, until
from tests.e2e.scripted import ECHO, TELLING, USAGE, Scripted, answer, stream, words
from tests.e2e.simulated import FOUR_TOKENS, SAID, through
from tests.e2e.wire import request, wire

TIMING = re.compile(
    r"queue;dur=([\d.]+), backoff;dur=([\d.]+), upstream;dur=([\d.]+), ttft;dur=([\d.]+), overhead;dur=([\d.]+)"
)
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "höhe",
        "strict": True,
        "parameters": {"type": "object", "properties": {"of": {"type": "string", "enum": ["Zürich", "\u2028", "🏔"]}}},
    },
}


# ── what works ──


async def test_a_chat_is_answered() -> None:
    async with through() as (_, client, _):
        answer = await client.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
    assert answer.choices[0].message.content == SAID
    assert answer.model == "gpt-4o-mini"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 4)


async def test_a_chat_is_streamed() -> None:
    async with through() as (_, client, _):
        parts = [part async for part in await client.chat.completions.create(model="m", messages=HELLO, stream=True)]
    assert "".join(part.choices[0].delta.content or "" for part in parts) == SAID
    assert parts[-1].choices[0].finish_reason == "stop"
    assert [part for part in parts if part.usage] == []


async def test_the_usage_of_a_stream_comes_when_it_is_asked_for() -> None:
    async with through() as (_, client, _):
        parts = [
            part
            async for part in await client.chat.completions.create(
                model="m", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        ]
    assert parts[-1].choices == []
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == 4


async def test_the_streaming_helper_of_the_sdk_works() -> None:
    async with through() as (_, client, _), client.chat.completions.stream(model="m", messages=HELLO) as events:
        kinds = {event.type async for event in events}
        final = await events.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == SAID


async def test_a_synchronous_client_works() -> None:
    def talk(base_url: str) -> tuple[str | None, str]:
        with OpenAI(base_url=base_url, api_key="sk-client", max_retries=0) as client:
            whole = client.chat.completions.create(model="m", messages=HELLO)
            with client.chat.completions.create(model="m", messages=HELLO, stream=True) as parts:
                told = "".join(part.choices[0].delta.content or "" for part in parts)
            return whole.choices[0].message.content, told

    async with through() as (house, _, _):
        assert await asyncio.to_thread(talk, house.base_url) == (SAID, SAID)


async def test_completions_are_answered_and_streamed() -> None:
    async with through() as (_, client, _):
        whole = await client.completions.create(model="m", prompt="hello")
        parts = [part async for part in await client.completions.create(model="m", prompt="hello", stream=True)]
    assert whole.choices[0].text == SAID
    assert "".join(part.choices[0].text for part in parts) == SAID
    assert [part for part in parts if part.usage] == []


async def test_embeddings_come_in_order_and_at_the_length_asked_for() -> None:
    async with through() as (house, client, _):
        both = await client.embeddings.create(model="e", input=["one", "two"], dimensions=8)
        swapped = await client.embeddings.create(model="e", input=["two", "one"], dimensions=8, encoding_format="float")
        metrics = await house.metrics()
    assert [len(item.embedding) for item in both.data] == [8, 8]
    assert both.data[0].embedding == pytest.approx(swapped.data[1].embedding)
    assert both.data[0].embedding != pytest.approx(swapped.data[0].embedding)
    assert metrics("tokens_total", type="input") == 2


async def test_responses_are_answered_and_streamed() -> None:
    async with through() as (house, client, _):
        whole = await client.responses.create(model="m", input="hello")
        kinds = [event.type async for event in await client.responses.create(model="m", input="hello", stream=True)]
        async with client.responses.stream(model="m", input="hello") as events:
            final = await events.get_final_response()
        metrics = await house.metrics()
    assert whole.output_text == SAID
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert final.output_text == SAID
    assert metrics("requests_total", operation="responses", outcome="ok") == 3
    assert metrics("tokens_total", type="output") == 12


async def test_configured_models_are_listed_and_found() -> None:
    async with through(names=("gpt-4o-mini", "org/model:7b", "claude-*")) as (_, client, simulator):
        listed = [model.id async for model in client.models.list()]
        found = await client.models.retrieve("org/model:7b")
        asked = len(simulator.seen)
    assert listed == ["gpt-4o-mini", "org/model:7b"]
    assert found.id == "org/model:7b"
    assert asked == 0


async def test_behind_a_wildcard_the_upstream_says_which_models_there_are() -> None:
    async with through(replace(FOUR_TOKENS, models=("served", "with/slash"))) as (_, client, simulator):
        listed = [model.id async for model in client.models.list()]
        found = await client.models.retrieve("with/slash")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("unserved")
        paths = [seen.path for seen in simulator.seen]
    assert listed == ["served", "with/slash"]
    assert found.id == "with/slash"
    assert paths[0] == "/v1/models"


async def test_every_answer_carries_its_id_and_where_its_time_went() -> None:
    async with through() as (house, client, _):
        raw = await client.chat.completions.with_raw_response.create(model="m", messages=HELLO)
        parsed = raw.parse()
        async with client.chat.completions.with_streaming_response.create(
            model="m", messages=HELLO, stream=True, extra_headers={"x-request-id": "mine-1"}
        ) as streamed:
            told = [line async for line in streamed.iter_lines()]
        models = await client.models.with_raw_response.list()
        refused = await house.ask(b"{")
        lost = await house.ask(path="/nowhere")
    assert raw.headers["x-request-id"] == raw.request_id == parsed._request_id
    assert re.fullmatch(r"req_[0-9a-f]{32}", raw.headers["x-request-id"])
    assert streamed.headers["x-request-id"] == "mine-1"
    assert told[-2:] == ["data: [DONE]", ""]
    for headers in (raw.headers, streamed.headers, models.headers, refused.headers, lost.headers):
        timing = TIMING.fullmatch(headers["server-timing"])
        assert timing is not None, headers["server-timing"]
        queue, backoff, upstream, first, overhead = map(float, timing.groups())
        assert queue == backoff == 0.0
        assert 0.0 <= overhead <= first
        assert upstream <= first
        assert headers["server"] == "penstock"


async def test_what_the_provider_says_of_its_limits_reaches_the_client_and_its_account_does_not() -> None:
    async with through(replace(profiles.ROOMY, first_token_seconds=0.0)) as (_, client, _):
        raw = await client.chat.completions.with_raw_response.create(model="m", messages=HELLO, max_tokens=1)
    assert raw.headers["x-ratelimit-limit-requests"] == "30000"
    assert raw.headers["openai-processing-ms"]
    assert "openai-organization" not in raw.headers


# ── what is not touched ──


async def test_a_request_reaches_the_upstream_as_the_sdk_wrote_it(upstream: Scripted, house: House) -> None:
    async with house.sdk() as client:
        raw = await client.chat.completions.with_raw_response.create(
            model="org/modèle",
            messages=[{"role": "user", "content": "a\u2028b 🏔 \x00 ünï"}],
            tools=[TOOL],
            tool_choice="required",
            seed=2**53 + 1,
            temperature=1e-7,
            extra_body={"vendor": {"nested": [1.0, 1, 12345678901234567890]}},
        )
    sent = raw.http_response.request.content
    seen = upstream.exchanges[0]
    assert seen.body == sent
    assert (seen.method, seen.path) == ("POST", "/v1/chat/completions")


async def test_only_the_wish_for_usage_is_set_into_a_stream_s_request(upstream: Scripted, house: House) -> None:
    upstream.plays(stream(*TELLING), stream(*TELLING), stream(*TELLING))
    body = b'{"model": "m",  "stream":true, "vendor": [1.0, 1e2, "\\u00e9"], "messages":[]}'
    await house.ask(body)
    await house.ask(body[:-1] + b', "stream_options": {"extra": 1.50}}')
    wanted = body[:-1] + b', "stream_options": {"include_usage":true}}'
    await house.ask(wanted)
    first, second, third = upstream.exchanges
    assert first.json == json.loads(body) | {"stream_options": {"include_usage": True}}
    assert b'[1.0, 1e2, "\\u00e9"]' in first.body
    assert second.json["stream_options"] == {"extra": 1.5, "include_usage": True}
    assert b"1.50" in second.body
    assert third.body == wanted


async def test_the_usage_nobody_asked_for_is_taken_out_and_no_other_byte(upstream: Scripted, house: House) -> None:
    usage_last = (*TELLING[:-1], USAGE, TELLING[-1])
    upstream.plays(stream(*usage_last), stream(b"".join(usage_last)), stream(*usage_last))
    async with house.sdk() as client:
        bodies = []
        for wish in (None, None, {"include_usage": True}):
            options: Any = {} if wish is None else {"stream_options": wish}
            async with client.chat.completions.with_streaming_response.create(
                model="m", messages=HELLO, stream=True, **options
            ) as raw:
                bodies.append(b"".join([part async for part in raw.iter_bytes()]))
    without = b"".join(TELLING)
    assert bodies == [without, without, b"".join(usage_last)]
    assert upstream.exchanges[0].json["stream_options"] == {"include_usage": True}
    metrics = await house.metrics()
    assert metrics("tokens_total", type="input") == 9
    assert metrics("tokens_total", type="output") == 6


async def test_the_arguments_of_a_tool_pass_unchanged_both_ways(upstream: Scripted, house: House) -> None:
    arguments = '{"of": "Z\\u00fcrich",\n  "at" : 1.0e3 , "note": "\u2028 \\ud83c\\udfd4"}'
    call = {"id": "call_1", "type": "function", "function": {"name": "höhe", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    whole = ECHO | {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    pieces = [arguments[at : at + 7] for at in range(0, len(arguments), 7)]
    begun = {**call, "index": 0, "function": {"name": "höhe", "arguments": ""}}
    deltas: list[Any] = [begun, *({"index": 0, "function": {"arguments": piece}} for piece in pieces)]
    events = [
        b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": [delta]}}]}).encode()
        for delta in deltas
    ]
    upstream.plays(answer(whole), stream(*events, words("", "tool_calls"), b"data: [DONE]\n\n"))
    async with house.sdk() as client:
        answered = await client.chat.completions.create(model="m", messages=HELLO, tools=[TOOL])
        calls = answered.choices[0].message.tool_calls
        assert calls is not None
        back: Any = answered.choices[0].message.model_dump(exclude_none=True)
        told = ""
        async for part in await client.chat.completions.create(
            model="m", messages=[*HELLO, back], tools=[TOOL], stream=True
        ):
            for delta in part.choices[0].delta.tool_calls or ():
                told += (delta.function and delta.function.arguments) or ""
    assert calls[0].type == "function"
    assert calls[0].function.arguments == arguments
    assert told == arguments
    assert upstream.exchanges[1].json["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments
    assert (await house.metrics())("time_to_first_token_seconds_count") == 1  # arguments are content


async def test_structured_answers_are_parsed_by_the_sdk(upstream: Scripted, house: House) -> None:
    class Turbine(BaseModel):
        name: str
        head: float

    content = '{"name":"Grande Dixence","head":1883.0}'
    upstream.plays(answer(ECHO | {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}))
    async with house.sdk() as client:
        answered = await client.chat.completions.parse(model="m", messages=HELLO, response_format=Turbine)
    assert answered.choices[0].message.parsed == Turbine(name="Grande Dixence", head=1883.0)
    schema = upstream.exchanges[0].json["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert list(schema["schema"]["properties"]) == ["name", "head"]


async def test_a_model_by_another_name_upstream_is_asked_for_by_that_name(upstream: Scripted) -> None:
    models = {"fast": Model(upstreams=("up",), upstream_model="qwen3/large")}
    async with serving(settings(at(upstream.base_url), models=models)) as house, house.sdk() as client:
        await client.chat.completions.create(model="fast", messages=HELLO)
        assert (await house.metrics())("requests_total", model="fast") == 1
    assert upstream.exchanges[0].json == {"model": "qwen3/large", "messages": HELLO}


# ── errors are the SDK's own exceptions ──


async def test_a_wrong_key_is_an_authentication_error(upstream: Scripted) -> None:
    said = settings(at(upstream.base_url), callers={"team": Secret("sk-team-0123456789abcdef")})
    async with serving(said) as house, house.sdk(api_key="sk-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model="m", messages=HELLO)
    assert caught.value.code == "invalid_api_key"
    assert upstream.exchanges == []


async def test_an_unknown_model_is_a_not_found_error_that_names_the_nearest() -> None:
    async with through(names=("gpt-4o-mini", "qwen3-coder")) as (_, client, simulator):
        with pytest.raises(openai.NotFoundError, match="`gpt-4o-mini`") as caught:
            await client.chat.completions.create(model="gpt4o-mini", messages=HELLO)
        with pytest.raises(openai.NotFoundError, match="`qwen3-coder`"):
            await client.models.retrieve("qwen-coder")
        with pytest.raises(openai.NotFoundError, match="GET /v1/models"):
            await client.embeddings.create(model="nothing-like-it", input="x")
        assert len(simulator.seen) == 0
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.type == "invalid_request_error"


async def test_a_body_that_cannot_be_routed_is_a_bad_request_error(house: House) -> None:
    async with house.sdk() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("missing_model", "model")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
async def test_the_last_word_of_the_upstream_reaches_the_client_as_it_is(
    upstream: Scripted, house: House, status: int, kind: type[openai.APIStatusError]
) -> None:
    code = "insufficient_quota" if status == 429 else "their_code"  # any other 429 is waited out here
    error = {"message": "why", "type": "their_type", "param": None, "code": code}
    body = json.dumps({"error": error}, indent=3).encode()
    upstream.otherwise = answer(body, status)
    async with house.sdk(max_retries=2) as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model="m", messages=HELLO, stream=True)
    assert (caught.value.code, caught.value.type) == (code, "their_type")
    assert caught.value.response.content == body
    assert (await house.metrics())("requests_total") == 1, "the SDK asked again, though it was retried here"


async def test_a_full_queue_is_a_rate_limit_error(upstream: Scripted) -> None:
    hold = asyncio.Event()
    upstream.plays([hold, *answer(ECHO)])
    said = settings(at(upstream.base_url), gate=Gate(concurrency=1, queue_limit=0))
    async with serving(said) as house, house.sdk() as client:
        first = asyncio.create_task(client.chat.completions.create(model="m", messages=HELLO))
        await upstream.exchange()
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="m", messages=HELLO)
        hold.set()
        await first
    assert caught.value.code == "queue_full"


async def test_a_client_with_retries_of_its_own_gets_in_after_a_full_queue(upstream: Scripted) -> None:
    hold = asyncio.Event()
    upstream.plays([hold, *answer(ECHO)])
    said = settings(at(upstream.base_url), gate=Gate(concurrency=1, queue_limit=0))
    async with serving(said) as house, house.sdk() as naive, house.sdk(max_retries=2) as patient:
        first = asyncio.create_task(naive.chat.completions.create(model="m", messages=HELLO))
        await upstream.exchange()
        second = asyncio.create_task(patient.chat.completions.create(model="m", messages=HELLO))
        async with wire(house.port) as line:  # as long as it is refused too, the place is taken
            line.send(request())
            assert await line.head() == 429
        await until(lambda: len(upstream.exchanges) == 1)
        hold.set()
        await first
        answered = await second
    assert answered.choices[0].message.content == "hi"


async def test_an_unreachable_upstream_is_an_internal_server_error_that_is_not_tried_again() -> None:
    async with serving(settings(at("http://127.0.0.1:1/v1"))) as house, house.sdk(max_retries=2) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="m", messages=HELLO)
        assert (await house.metrics())("requests_total") == 1
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_unreachable")


BREAKING = replace(profiles.INSTANT, output_tokens=40, tokens_per_second=4000.0)


@pytest.mark.parametrize("profile", [replace(BREAKING, abort_rate=1.0), replace(BREAKING, cut_rate=1.0)])
@pytest.mark.parametrize("endpoint", ["chat", "responses"])
async def test_a_stream_that_breaks_raises_and_never_ends_as_if_it_were_whole(profile: Profile, endpoint: str) -> None:
    async with through(profile) as (house, client, _):
        events: Any
        if endpoint == "chat":
            events = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
        else:
            events = await client.responses.create(model="m", input="hello", stream=True)
        parts = 0
        with pytest.raises(openai.APIError) as caught:  # noqa: PT012  # it raises as it is read
            async for _event in events:
                parts += 1
        metrics = await house.metrics()
    assert parts
    assert caught.value.code == "stream_truncated"
    assert metrics("requests_total", outcome="truncated", code="200") == 1
    assert metrics("stream_aborts_total") == 1


async def test_an_error_that_the_upstream_tells_in_a_stream_is_the_last_that_the_client_hears() -> None:
    async with through(replace(BREAKING, error_event_rate=1.0)) as (house, client, _):
        chat = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="server had an error"):
            [part async for part in chat]
        events = [
            event async for event in await client.responses.create(model="m", input="hello", stream=True)
        ]  # which the SDK does not raise
        metrics = await house.metrics()
    assert [event.type for event in events if event.type == "error"] == [events[-1].type]
    assert metrics("requests_total", outcome="failed", code="200") == 2
    assert metrics("stream_aborts_total", reason="error_event") == 2


async def test_a_provider_in_trouble_costs_the_client_nothing_while_retries_help() -> None:
    profile = replace(FOUR_TOKENS, error_rate=0.1, reset_rate=0.1)
    async with through(profile) as (house, client, simulator):
        answers = await asyncio.gather(
            *(client.chat.completions.create(model="m", messages=HELLO, stream=False) for _ in range(20)),
            return_exceptions=True,
        )
        served = [answer for answer in answers if not isinstance(answer, BaseException)]
        metrics = await house.metrics()
    assert len(served) >= 18  # each has three attempts, of which one in five fails
    assert metrics("upstream_retries_total") == simulator.provider.stats.arrived - 20
