"""A batch of a pipeline: each item a run of its own, whose finished steps outlive the process."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from openai import AsyncOpenAI

from proxy.config import Limits, State
from proxy.simulator import profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import House, at, serving, settings, until
from tests.e2e.scripted import Act, Scripted, refusal
from tests.e2e.test_batches import ended, jsonl, lines, request, submit
from tests.e2e.test_jobs import alone, completed
from tests.e2e.test_pipelines import says

STEPS: Mapping[str, Mapping[str, Any]] = {
    "extract": {"model": "m", "prompt": "1 {input}"},
    "analyse": {
        "model": "m",
        "prompt": "2 {steps.extract}",
        "when": {"value": "{input}", "contains": "bad"},
        "map": "{steps.extract}",  # which is no list
    },
    "summarise": {"model": "m", "prompt": "3 {steps.extract}", "max_tokens": 1},
}
MAPPED: Mapping[str, Mapping[str, Any]] = {
    "extract": {"model": "m", "prompt": "1 {input}"},
    "each": {"model": "m", "prompt": "2 {item}", "map": {"over": "{steps.extract}", "concurrency": 1}},
    "summarise": {"model": "m", "prompt": "3 {steps.each}"},
}


@asynccontextmanager
async def through(base_url: str, state: Path, steps: Mapping[str, Any]) -> AsyncIterator[tuple[House, AsyncOpenAI]]:
    up = at(base_url, limits=Limits(learn=False))
    said = settings(up, state=State(path=str(state)), pipelines={"digest": {"steps": steps}})
    async with serving(said) as house, house.sdk() as client:
        yield house, client


def item(number: int, text: str) -> dict[str, Any]:
    return request(number, model="pipeline/digest", messages=[{"role": "user", "content": text}])


def prompts(upstream: Scripted) -> list[str]:
    return [json.loads(exchange.body)["messages"][0]["content"] for exchange in upstream.exchanges]


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


async def test_items_overlap_between_the_stages(tmp_path: Path) -> None:
    steps = {
        "extract": {"model": "m", "prompt": "1 {input}", "concurrency": 1},
        "summarise": {"model": "m", "prompt": "2 {steps.extract}", "concurrency": 1},
    }
    slow = replace(profiles.INSTANT, first_token_seconds=0.02, output_tokens=1)
    async with (
        simulating(slow, remember=100) as provider,
        through(provider.base_url, tmp_path, steps) as (_, client),
    ):
        items = [item(number, f"text {number}") for number in range(8)]
        batch = await ended(client, await submit(client, jsonl(items)))
        assert batch.status == "completed"
        sent = "".join(json.loads(seen.body)["messages"][0]["content"][0] for seen in provider.seen)
        assert sent.index("2") < sent.rindex("1")  # the second is extracted while the first is summed up
        assert sorted(sent) == sorted("12" * 8)
        assert provider.provider.stats.peak_in_flight == 2


async def test_steps_that_have_ended_are_not_paid_again_after_kill_9(upstream: Scripted, tmp_path: Path) -> None:
    (tmp_path / "penstock.yaml").write_text(
        f"server: {{port: 0, admin_port: 0}}\nstate: {{path: {tmp_path}/state}}\n"
        f'upstreams: {{up: {{base_url: "{upstream.base_url}", api_key: "sk-x", limits: {{learn: false}}}}}}\n'
        f"models: {{m: {{upstreams: [up]}}}}\npipelines: {{digest: {{steps: {json.dumps(MAPPED)}}}}}\n"
    )
    upstream.plays(says('["a", "b"]'), says("A"), [Act.SILENCE])
    async with aiohttp.ClientSession() as http:
        async with alone(tmp_path, signal.SIGKILL) as origin:
            asked = {"prompts": ["text"], "model": "pipeline/digest"}
            async with http.post(f"{origin}/batch", json=asked) as said:
                job_id = (await said.json())["job_id"]
            await upstream.exchange(2)
        upstream.plays(says("B"), says("sum"))
        async with alone(tmp_path) as origin:
            job = await completed(http, f"{origin}/batch/{job_id}")
    assert job["results"] == ["sum"]
    assert prompts(upstream) == ["1 text", "2 a", "2 b", "2 b", '3 ["A", "B"]']  # what was cut off, and nothing else


async def test_steps_that_have_ended_are_not_paid_again_when_the_process_was_stopped(
    upstream: Scripted, tmp_path: Path
) -> None:
    upstream.plays(says('["a", "b"]'), says("A"), [Act.SILENCE])
    async with through(upstream.base_url, tmp_path, MAPPED) as (_, client):
        batch = await submit(client, jsonl([item(1, "text")]))
        await upstream.exchange(2)
    await until(lambda: not upstream.in_flight)
    upstream.plays(says("B"), says("sum"))
    async with through(upstream.base_url, tmp_path, MAPPED) as (_, client):
        batch = await ended(client, batch)
        (done,) = await lines(client, batch.output_file_id)
    assert done["response"]["body"]["choices"][0]["message"]["content"] == "sum"
    assert (
        done["response"]["body"]["usage"]["total_tokens"] == 20
    )  # four that were answered; what was cut off told none
    assert prompts(upstream) == ["1 text", "2 a", "2 b", "2 b", '3 ["A", "B"]']


async def test_a_step_that_may_be_skipped_is_not_for_want_of_money(upstream: Scripted, tmp_path: Path) -> None:
    """The batch waits for it: thousands of items without that step are not what anybody wants."""
    steps = {
        "maybe": {"model": "m", "prompt": "1 {input}", "on_error": "skip"},
        "last": {"model": "m", "prompt": "2 {steps.maybe}"},
    }
    upstream.plays(refusal(429, "insufficient_quota", "insufficient_quota", "pay first"))
    async with through(upstream.base_url, tmp_path, steps) as (house, _):
        asked = {"prompts": ["text"], "model": "pipeline/digest"}
        job_id = (await house.ask(asked, "/batch")).json["job_id"]
        async with asyncio.timeout(5):
            while "paused" not in (job := (await house.ask(b"", f"/batch/{job_id}", method="GET")).json):
                assert job["status"] in ("queued", "running")
                await asyncio.sleep(0.01)
        assert job["paused"]["reason"] == "money"
        assert prompts(upstream) == ["1 text"]


async def test_a_step_that_may_be_skipped_is_where_its_own_call_is_refused(upstream: Scripted, tmp_path: Path) -> None:
    steps = {
        "maybe": {"model": "m", "prompt": "1 {input}", "on_error": "skip"},
        "last": {"model": "m", "prompt": "2 {steps.maybe}"},
    }
    upstream.plays(refusal(400, "too_long", "invalid_request_error", "too long"), says("sum"))
    async with through(upstream.base_url, tmp_path, steps) as (_, client):
        batch = await ended(client, await submit(client, jsonl([item(1, "text")])))
        assert batch.status == "completed"
        assert prompts(upstream) == ["1 text", "2 "]


async def test_a_pipeline_that_is_unknown_fails_its_batch_at_once(upstream: Scripted, tmp_path: Path) -> None:
    async with through(upstream.base_url, tmp_path, STEPS) as (_, client):
        batch = await ended(client, await submit(client, jsonl([request(1, model="pipeline/digset")])))
        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert "Did you mean 'pipeline/digest'?" in (batch.errors.data[0].message or "")
