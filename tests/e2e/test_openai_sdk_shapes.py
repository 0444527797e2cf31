"""Tools and structured answers with the official SDK, whole and streamed, over chat and responses."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.e2e.running import HELLO
from tests.e2e.simulated import SAID, through

PARAMETERS = {
    "type": "object",
    "properties": {"of": {"type": "string"}, "in": {"type": "string", "enum": ["m", "ft"]}},
    "required": ["of", "in"],
    "additionalProperties": False,
}
HEIGHT: Any = {"type": "function", "function": {"name": "height", "strict": True, "parameters": PARAMETERS}}
OTHER: Any = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
FLAT: Any = {"type": "function", "name": "height", "strict": True, "parameters": PARAMETERS}
CALLED = {"of": SAID, "in": "m"}
NAMED: Any = {"type": "function", "function": {"name": "height"}}


class Turbine(BaseModel):
    name: str
    kind: Literal["pelton", "francis"]
    heads: list[float]


TURBINE = Turbine(name=SAID, kind="pelton", heads=[0])


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["any", "named"])
async def test_a_tool_is_called_whole_and_streamed(choice: Any) -> None:
    tools = [HEIGHT] if choice == "required" else [OTHER, HEIGHT]
    async with through() as (house, client, _):
        whole = await client.chat.completions.create(model="m", messages=HELLO, tools=tools, tool_choice=choice)
        parts = [
            part
            async for part in await client.chat.completions.create(
                model="m", messages=HELLO, tools=tools, tool_choice=choice, stream=True
            )
        ]
        metrics = await house.metrics()
    (called,) = whole.choices[0].message.tool_calls or ()
    assert called.type == "function"
    assert (called.function.name, json.loads(called.function.arguments)) == ("height", CALLED)
    assert whole.choices[0].finish_reason == parts[-1].choices[0].finish_reason == "tool_calls"
    deltas = [delta for part in parts for delta in part.choices[0].delta.tool_calls or ()]
    assert deltas[0].id
    assert [delta.function.name for delta in deltas if delta.function and delta.function.name] == ["height"]
    told = [delta.function.arguments or "" for delta in deltas if delta.function]
    assert json.loads("".join(told)) == CALLED
    assert sum(map(bool, told)) > 3
    assert metrics("requests_total", operation="chat", outcome="ok") == 2
    assert metrics("time_to_first_token_seconds_count") == 1


async def test_the_streaming_helper_parses_the_arguments_of_a_tool() -> None:
    async with (
        through() as (_, client, _),
        client.chat.completions.stream(model="m", messages=HELLO, tools=[HEIGHT], tool_choice="required") as events,
    ):
        done = [event async for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [CALLED]


async def test_a_structured_answer_is_parsed_whole_and_streamed() -> None:
    async with through() as (_, client, _):
        whole = await client.chat.completions.parse(model="m", messages=HELLO, response_format=Turbine)
        async with client.chat.completions.stream(model="m", messages=HELLO, response_format=Turbine) as events:
            streamed = await events.get_final_completion()
        free = await client.chat.completions.create(model="m", messages=HELLO, response_format={"type": "json_object"})
        with pytest.raises(openai.LengthFinishReasonError):
            await client.chat.completions.parse(model="m", messages=HELLO, response_format=Turbine, max_tokens=2)
    assert whole.choices[0].message.parsed == streamed.choices[0].message.parsed == TURBINE
    assert json.loads(free.choices[0].message.content or "") == {"text": SAID}


async def test_a_response_calls_a_tool_whole_and_streamed() -> None:
    choice: Any = {"type": "function", "name": "height"}
    async with through() as (_, client, _):
        whole = await client.responses.create(model="m", input="hello", tools=[FLAT], tool_choice=choice)
        async with client.responses.stream(model="m", input="hello", tools=[FLAT], tool_choice=choice) as events:
            told = [event async for event in events]
            streamed = await events.get_final_response()
    for response in (whole, streamed):
        (item,) = response.output
        assert item.type == "function_call"
        assert (item.name, json.loads(item.arguments), item.status) == ("height", CALLED, "completed")
    deltas = [event.delta for event in told if event.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == CALLED


async def test_a_structured_response_is_parsed_whole_and_streamed() -> None:
    async with through() as (_, client, _):
        whole = await client.responses.parse(model="m", input="hello", text_format=Turbine)
        async with client.responses.stream(model="m", input="hello", text_format=Turbine) as events:
            streamed = await events.get_final_response()
    assert whole.output_parsed == streamed.output_parsed == TURBINE


async def test_the_synchronous_client_calls_tools_and_parses() -> None:
    def talk(base_url: str) -> None:
        with OpenAI(base_url=base_url, api_key="sk-client", max_retries=0) as client:
            parsed = client.chat.completions.parse(model="m", messages=HELLO, response_format=Turbine)
            assert parsed.choices[0].message.parsed == TURBINE
            with client.chat.completions.stream(
                model="m", messages=HELLO, tools=[HEIGHT], tool_choice="required"
            ) as events:
                (called,) = events.get_final_completion().choices[0].message.tool_calls or ()
            assert json.loads(called.function.arguments) == CALLED
            with client.responses.stream(model="m", input="hello", text_format=Turbine) as told:
                assert told.get_final_response().output_parsed == TURBINE

    async with through() as (house, _, _):
        await asyncio.to_thread(talk, house.base_url)
