"""The service of small jobs, over plain HTTP: one prompt, and many."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.config import Jobs, Model, Price, Secret, State
from proxy.simulator import ALWAYS, Profile, Simulator, profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import House, at, serving, settings, until

UNEVEN = replace(profiles.INSTANT, first_token_seconds=0.02, first_token_sigma=1.0, output_tokens=4)
ONE, OTHER = "caller-key-one-0123456789", "caller-key-two-0123456789"


@asynccontextmanager
async def through(folder: Path, profile: Profile = UNEVEN, **sections: Any) -> AsyncIterator[tuple[House, Simulator]]:
    async with simulating(profile, remember=10_000) as simulator:
        said = settings(at(simulator.base_url), state=State(path=str(folder / "state")), **sections)
        async with serving(said) as house:
            yield house, simulator


async def job(house: House, job_id: str, **asked: Any) -> Any:
    answer = await house.ask(b"", f"/batch/{job_id}", method="GET", **asked)
    assert answer.status == 200, answer.body
    return answer.json


async def ended(house: House, job_id: str, *, seconds: float = 15.0, **asked: Any) -> Any:
    async with asyncio.timeout(seconds):
        while (said := await job(house, job_id, **asked))["status"] in ("queued", "running", "cancelling"):
            assert said["completed"] <= sum(result is not None for result in said["results"])
            await asyncio.sleep(0.02)
    return said


# ── one prompt ──


async def test_a_prompt_is_completed(tmp_path: Path) -> None:
    async with through(tmp_path) as (house, simulator):
        answer = await house.ask({"prompt": "hello", "model": "m", "system": "be brief", "max_tokens": 9}, "/complete")
        assert (answer.status, set(answer.json)) == (200, {"result"})
        assert answer.json["result"].startswith("echo: hello")
        assert simulator.seen[0].path.endswith("/chat/completions")
        metrics = await house.metrics()
    assert metrics("requests_total", operation="complete", outcome="ok", code="200") == 1
    assert metrics("tokens_total") > 0


async def test_who_names_no_model_gets_the_usual_one_or_the_only_one(tmp_path: Path) -> None:
    async with through(tmp_path, jobs=Jobs(model="usual")) as (house, simulator):
        assert (await house.ask({"prompt": "a"}, "/complete")).status == 200
        assert b'"usual"' in simulator.seen[0].body
    async with through(tmp_path, models={"only": Model(upstreams=("up",))}) as (house, simulator):
        assert (await house.ask({"prompt": "a"}, "/complete")).status == 200
        assert b'"only"' in simulator.seen[0].body
    async with through(tmp_path) as (house, _):
        answer = await house.ask({"prompt": "a"}, "/complete")
        assert (answer.status, answer.error["code"]) == (400, "missing_model")


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (b"{", "not JSON"),
        (b"[]", "object"),
        (b"\xff\xfe", "JSON"),
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": "a", "promt": "b"}, "promt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ],
)
async def test_a_wrong_prompt_is_told(tmp_path: Path, said: object, word: str) -> None:
    async with through(tmp_path) as (house, simulator):
        answer = await house.ask(said, "/complete")
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
        assert word in answer.error["message"]
        assert not simulator.seen


async def test_what_an_upstream_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    async with through(tmp_path, replace(UNEVEN, models=("known",))) as (house, _):
        answer = await house.ask({"prompt": "a", "model": "unknown"}, "/complete")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")


# ── many ──


async def test_results_stand_at_the_place_of_their_prompts_whatever_ends_first(tmp_path: Path) -> None:
    prompts = [f"question {number}" for number in range(80)]
    priced = {"*": Model(upstreams=("up",), price=Price(input=1000.0, output=1000.0))}
    async with through(tmp_path, models=priced) as (house, _):
        answer = await house.ask({"prompts": prompts, "model": "m"}, "/batch")
        assert (answer.status, set(answer.json)) == (200, {"job_id"})
        said = await ended(house, answer.json["job_id"])
    assert {key: said[key] for key in ("status", "completed", "failed", "total")} == {
        "status": "completed",
        "completed": 80,
        "failed": 0,
        "total": 80,
    }
    assert said["cost_usd"] > 0
    assert all(result.startswith(f"echo: {prompt}") for prompt, result in zip(prompts, said["results"], strict=True))


async def test_a_failed_prompt_has_its_error_in_its_place(tmp_path: Path) -> None:
    async with through(tmp_path, replace(UNEVEN, error_rate=0.5, error_status=400)) as (house, _):
        answer = await house.ask({"prompts": ["a"] * 40, "model": "m"}, "/batch")
        said = await ended(house, answer.json["job_id"])
    failed = [result for result in said["results"] if isinstance(result, dict)]
    assert 0 < len(failed) == said["failed"] < 40
    assert said["completed"] == said["total"] == 40
    assert all(result["error"]["message"] for result in failed)


async def test_completed_counts_only_what_is_there_and_never_falls(tmp_path: Path) -> None:
    slow = replace(UNEVEN, requests_per_minute=6000, requests_burst=5)
    async with through(tmp_path, slow) as (house, _):
        job_id = (await house.ask({"prompts": ["a"] * 60, "model": "m"}, "/batch")).json["job_id"]
        counts = []
        while (said := await job(house, job_id))["status"] != "completed":
            assert said["total"] == len(said["results"]) == 60
            assert said["completed"] <= sum(result is not None for result in said["results"])
            counts.append(said["completed"])
            await asyncio.sleep(0.01)
    assert counts == sorted(counts)
    assert len(set(counts)) > 3


async def test_a_job_is_found_by_its_caller_alone(tmp_path: Path) -> None:
    callers = {"one": Secret(ONE), "two": Secret(OTHER)}
    mine, foreign = ({"authorization": f"Bearer {key}"} for key in (ONE, OTHER))
    async with through(tmp_path, callers=callers) as (house, _):
        assert (await house.ask({"prompts": ["a"], "model": "m"}, "/batch")).status == 401
        job_id = (await house.ask({"prompts": ["a"], "model": "m"}, "/batch", headers=mine)).json["job_id"]
        assert (await ended(house, job_id, headers=mine))["status"] == "completed"
        near = f"{job_id[:-1]}x"
        unknown = await house.ask(b"", f"/batch/{near}", method="GET", headers=mine)
        for method in ("GET", "DELETE"):
            theirs = await house.ask(b"", f"/batch/{job_id}", method=method, headers=foreign)
            assert (theirs.status, theirs.error["code"]) == (404, "not_found")
            assert theirs.error["message"].replace(job_id, "") == unknown.error["message"].replace(near, "")


async def test_a_batch_that_is_no_job_is_not_found_as_one(tmp_path: Path) -> None:
    line = (
        b'{"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": []}}'
    )
    async with through(tmp_path) as (house, _), house.sdk() as client:
        file = await client.files.create(file=("in.jsonl", line), purpose="batch")
        for metadata, status in (({}, 404), ({"penstock_prompts": "1"}, 200)):
            batch = await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata=metadata,
            )
            answer = await house.ask(b"", f"/batch/{batch.id.replace('batch_', 'job_')}", method="GET")
            assert answer.status == status
        assert (await house.ask(b"", "/batch/", method="GET")).status == 404


async def test_a_cancelled_job_keeps_what_it_has(tmp_path: Path) -> None:
    slow = replace(UNEVEN, requests_per_minute=3000, requests_burst=5)
    async with through(tmp_path, slow) as (house, simulator):
        job_id = (await house.ask({"prompts": ["a"] * 200, "model": "m"}, "/batch")).json["job_id"]
        await until(lambda: len(simulator.seen) > 3)
        answer = await house.ask(b"", f"/batch/{job_id}", method="DELETE")
        assert answer.status == 200
        said = await ended(house, job_id)
        again = await house.ask(b"", f"/batch/{job_id}", method="DELETE")
    assert said["status"] == "cancelled"
    assert 0 < sum(isinstance(result, str) for result in said["results"]) < 200
    assert said["results"][-1]["error"]["code"] == "batch_cancelled"
    assert (again.status, again.error["code"]) == (409, "wrong_state")


async def test_a_job_that_waits_for_money_says_so(tmp_path: Path) -> None:
    async with through(tmp_path, replace(UNEVEN, out_of_money=ALWAYS)) as (house, _):
        job_id = (await house.ask({"prompts": ["a"], "model": "m"}, "/batch")).json["job_id"]
        said = await job(house, job_id)
        async with asyncio.timeout(10):
            while "paused" not in said:
                await asyncio.sleep(0.02)
                said = await job(house, job_id)
    assert (said["status"], said["completed"], said["results"]) == ("running", 0, [None])
    assert said["paused"]["reason"] == "money"


@pytest.mark.parametrize(
    "prompts", [[], "a", [""], [1], ["a"] * 50_001], ids=["none", "a text", "an empty one", "a number", "too many"]
)
async def test_wrong_prompts_are_told_before_anything_is_kept(tmp_path: Path, prompts: object) -> None:
    async with through(tmp_path) as (house, _):
        answer = await house.ask({"prompts": prompts, "model": "m"}, "/batch")
        assert answer.status == 400
        assert "prompts" in answer.error["message"]
        assert (await house.ask(b"", "/v1/files", method="GET")).json["data"] == []


async def test_an_acknowledged_job_outlives_kill_9(tmp_path: Path) -> None:
    prompts = [f"question {number}" for number in range(60)]
    slow = replace(UNEVEN, requests_per_minute=6000, requests_burst=5)
    async with simulating(slow, remember=10_000) as simulator:
        configured(tmp_path, simulator)
        async with aiohttp.ClientSession() as http:
            async with alone(tmp_path, signal.SIGKILL) as origin:
                async with http.post(f"{origin}/batch", json={"prompts": prompts}) as answer:
                    job_id = (await answer.json())["job_id"]
                await until(lambda: len(simulator.seen) > 20)
            async with alone(tmp_path) as origin:
                said = await completed(http, f"{origin}/batch/{job_id}")
    assert all(result.startswith(f"echo: {prompt}") for prompt, result in zip(prompts, said["results"], strict=True))


async def test_a_process_that_is_asked_to_stop_ends_well_and_the_next_one_goes_on(tmp_path: Path) -> None:
    prompts = [f"question {number}" for number in range(40)]
    slow = replace(UNEVEN, first_token_seconds=0.2, first_token_sigma=0.0)
    async with simulating(slow, remember=10_000) as simulator, aiohttp.ClientSession() as http:
        configured(tmp_path, simulator, gate="{concurrency: 4}")
        async with alone(tmp_path) as origin:
            async with http.post(f"{origin}/batch", json={"prompts": prompts}) as answer:
                job_id = (await answer.json())["job_id"]
            await until(lambda: len(simulator.seen) > 8)
        assert len(simulator.seen) < len(prompts)
        async with alone(tmp_path) as origin:
            said = await completed(http, f"{origin}/batch/{job_id}")
    assert all(result.startswith(f"echo: {prompt}") for prompt, result in zip(prompts, said["results"], strict=True))
    assert len(simulator.seen) == len(prompts)  # what was sent had ended, so nothing is asked twice


def configured(folder: Path, simulator: Simulator, gate: str = "{}") -> None:
    (folder / "penstock.yaml").write_text(
        f"server: {{port: 0, admin_port: 0}}\nstate: {{path: {folder}/state}}\ngate: {gate}\n"
        f'upstreams: {{up: {{base_url: "{simulator.base_url}", api_key: "sk-x"}}}}\n'
        "models: {m: {upstreams: [up]}}\n"
    )


async def completed(http: aiohttp.ClientSession, url: str) -> Any:
    """A job, once it is completed."""
    async with asyncio.timeout(20):
        while True:
            async with http.get(url) as answer:
                said = await answer.json()
            if said["status"] == "completed":
                return said
            await asyncio.sleep(0.05)


@asynccontextmanager
async def alone(folder: Path, ended_by: signal.Signals = signal.SIGTERM) -> AsyncIterator[str]:
    """`penstock serve` in a process of its own, and its address; ended with the block, by this signal."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "-c", "penstock.yaml"),
        cwd=folder,
        env=os.environ | {"PENSTOCK_TELEMETRY__LOG": "false"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        lines = [(await process.stderr.readline()).decode()]
        while "base_url = " not in lines[-1]:
            assert lines[-1], "".join(lines)
            lines.append((await process.stderr.readline()).decode())
        yield lines[-1].split("base_url = ")[1].strip().removesuffix("/v1")
        process.send_signal(ended_by)
        await process.communicate()
        assert process.returncode == (0 if ended_by is signal.SIGTERM else -ended_by)
    finally:
        if process.returncode is None:
            process.kill()
