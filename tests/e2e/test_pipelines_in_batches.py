"""A batch of a pipeline: each item a run of its own, whose finished steps outlive the process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from proxy.config import Limits, State
from proxy.simulator import profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import House, at, serving, settings, until
from tests.e2e.scripted import Act, Scripted, answer
from tests.e2e.test_batches import ended, jsonl, lines, request, submit

STEPS: Mapping[str, Mapping[str, Any]] = {
    "extract": {"model": "m", "prompt": "1 {input}"},
    "analyse": {
        "model": "m",
        "prompt": "2 {steps.extract}",
        "when": {"value": "{input}", "contains": "bad"},
        "output": {"type": "object"},
    },
    "summarise": {"model": "m", "prompt": "3 {steps.extract}", "max_tokens": 1},
}


@asynccontextmanager
async def through(base_url: str, state: Path, steps: Mapping[str, Any]) -> AsyncIterator[tuple[House, AsyncOpenAI]]:
    up = at(base_url, limits=Limits(learn=False))
    said = settings(up, state=State(path=str(state)), pipelines={"digest": {"steps": steps}})
    async with serving(said) as house, house.sdk() as client:
        yield house, client


def item(number: int, text: str) -> dict[str, Any]:
    return request(number, model="pipeline/digest", messages=[{"role": "user", "content": text}])


def says(words: str) -> list[Any]:
    message = {"role": "assistant", "content": words}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return answer({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage})


async def test_an_item_that_fails_in_its_second_stage_fails_alone_and_the_order_holds(tmp_path: Path) -> None:
    async with (
        simulating(replace(profiles.INSTANT, output_tokens=1)) as provider,
        through(provider.base_url, tmp_path, STEPS) as (house, client),
    ):
        items = [item(number, "bad" if number == 3 else f"text {number}") for number in range(8)]
        batch = await ended(client, await submit(client, jsonl(items)))
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (7, 1)
        done = await lines(client, batch.output_file_id)
        assert [line["custom_id"] for line in done] == [f"c-{number}" for number in range(8) if number != 3]
        for line in done:
            number = line["custom_id"].removeprefix("c-")
            said = line["response"]["body"]["choices"][0]["message"]["content"]
            assert said == f"echo: 3 echo: 1 text {number}"
        (failed,) = await lines(client, batch.error_file_id)
        error = failed["response"]["body"]["error"]
        assert (failed["custom_id"], failed["response"]["status_code"]) == ("c-3", 502)
        assert (error["step"], error["code"]) == ("analyse", "step_unfit")
        assert error["completed_steps"] == {"extract": "echo: 1 bad"}
        told = await house.metrics()
        assert told("batch_items_total", outcome="done") == 7
        assert batch.usage is not None
        assert batch.usage.output_tokens == 14  # two calls of each item that was done


async def test_steps_that_have_ended_are_not_paid_again_when_the_process_has_gone(
    upstream: Scripted, tmp_path: Path
) -> None:
    steps = {
        "extract": {"model": "m", "prompt": "1 {input}"},
        "each": {"model": "m", "prompt": "2 {item}", "map": {"over": "{steps.extract}", "concurrency": 1}},
        "summarise": {"model": "m", "prompt": "3 {steps.each}"},
    }
    upstream.plays(says('["a", "b"]'), says("A"), [Act.SILENCE])
    async with through(upstream.base_url, tmp_path, steps) as (_, client):
        batch = await submit(client, jsonl([item(1, "text")]))
        await upstream.exchange(2)
    await until(lambda: not upstream.in_flight)
    upstream.plays(says("B"), says("sum"))
    async with through(upstream.base_url, tmp_path, steps) as (_, client):
        batch = await ended(client, batch)
        (done,) = await lines(client, batch.output_file_id)
    assert done["response"]["body"]["choices"][0]["message"]["content"] == "sum"
    assert (
        done["response"]["body"]["usage"]["total_tokens"] == 20
    )  # four that were answered; what was cut off told none
    prompts = [json.loads(exchange.body)["messages"][0]["content"] for exchange in upstream.exchanges]
    assert prompts == ["1 text", "2 a", "2 b", "2 b", '3 ["A", "B"]']


async def test_a_pipeline_that_is_unknown_fails_its_batch_at_once(upstream: Scripted, tmp_path: Path) -> None:
    async with through(upstream.base_url, tmp_path, STEPS) as (_, client):
        batch = await ended(client, await submit(client, jsonl([request(1, model="pipeline/digset")])))
        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert "Did you mean 'pipeline/digest'?" in (batch.errors.data[0].message or "")
