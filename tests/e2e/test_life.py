"""A gateway's life as an operator sees it: `penstock serve` as a process of its own, from its start to its end."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import aiohttp
import pytest

from tests.e2e.running import ASK, CHAT, Answer, Metrics, until
from tests.e2e.scripted import ECHO, EVENT_STREAM, LAST, TELLING, Act, Scripted, answer, chunk
from tests.e2e.wire import request, wire

STREAM = ASK | {"stream": True}


class Process:
    """`penstock serve --config FILE`, running."""

    def __init__(self, process: asyncio.subprocess.Process, http: aiohttp.ClientSession, file: Path, log: Path) -> None:
        self.process, self.http, self.file, self.log = process, http, file, log
        self.said = ""  # on stderr, so far
        self.origin = self.admin = ""

    @property
    def port(self) -> int:
        return int(self.origin.rpartition(":")[2])

    async def listen(self) -> None:
        """Take in what it says until it ends."""
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.said += line.decode()
            if found := re.search(rb"(http://127\.0\.0\.1:\d+)/v1\b", line):
                self.origin = found[1].decode()
            elif found := re.search(rb"(http://127\.0\.0\.1:\d+)", line):
                self.admin = found[1].decode()

    async def ask(self, said: object = ASK, path: str = CHAT) -> Answer:
        async with self.http.post(self.origin + path, json=said) as answered:
            return Answer(answered.status, answered.headers, await answered.read())

    async def get(self, path: str) -> Answer:
        async with self.http.get(self.admin + path) as answered:
            return Answer(answered.status, answered.headers, await answered.read())

    async def reload(self) -> Answer:
        async with self.http.post(f"{self.admin}/admin/reload") as answered:
            return Answer(answered.status, answered.headers, await answered.read())

    async def metrics(self) -> Metrics:
        return Metrics((await self.get("/metrics")).body.decode())

    async def reaches(self, name: str, value: float, **labels: str) -> None:
        """Return once a metric has this value."""
        deadline = time.monotonic() + 5.0
        while (metrics := await self.metrics())(name, **labels) != value:
            assert time.monotonic() < deadline, metrics.text
            await asyncio.sleep(0.005)

    def write(self, said: object) -> None:
        self.file.write_text(said if isinstance(said, str) else json.dumps(said))  # JSON is YAML


def configuration(upstream: Scripted, **sections: Any) -> dict[str, Any]:
    return {
        "server": {"port": 0, "admin_port": 0},
        "upstreams": {"up": {"base_url": upstream.base_url, "api_key": "sk-upstream", "limits": {"learn": False}}},
        "models": {"m": {"upstreams": ["up"], "limits": {"concurrency": 1}}},
    } | sections


@asynccontextmanager
async def penstock(said: object, folder: Path) -> AsyncIterator[Process]:
    file, log = folder / "penstock.yaml", folder / "access.log"
    with log.open("wb") as stdout:
        file.write_text(json.dumps(said))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy", "serve", "--config", str(file), stdin=DEVNULL, stdout=stdout, stderr=PIPE
        )
    async with aiohttp.ClientSession() as http:
        running = Process(process, http, file, log)
        listening = asyncio.create_task(running.listen())
        try:
            await until(lambda: (running.admin and running.origin) or listening.done(), "up", seconds=15.0)
            assert running.admin, running.said
            yield running
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await listening
    assert "Traceback" not in running.said, running.said


async def test_it_starts_serves_and_tells_of_itself(upstream: Scripted, tmp_path: Path) -> None:
    async with penstock(configuration(upstream), tmp_path) as running:
        assert (await running.get("/healthz")).json == {"status": "ok"}
        assert (await running.get("/readyz")).json == {"status": "ready"}
        answered = await running.ask()
        assert answered.status == 200
        assert (await running.ask(path="/metrics")).status == 404, "the admin port's paths are not the clients'"
        metrics = await running.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain; version=")
        counted = Metrics(metrics.body.decode())
        running.process.send_signal(signal.SIGTERM)
        assert await running.process.wait() == 0
        lines = [json.loads(line) for line in running.log.read_text().splitlines()]
    assert counted("requests_total", model="m", code="200") == 1
    assert counted("config_last_reload_successful") == 1
    assert counted("draining") == 0
    assert lines[0]["request_id"] == answered.headers["x-request-id"]
    assert len(lines) == 2
    assert "sk-upstream" not in running.said


@pytest.mark.parametrize("how", ["SIGHUP", "POST"])
async def test_a_reload_drops_neither_a_call_nor_a_waiter(upstream: Scripted, tmp_path: Path, how: str) -> None:
    done = asyncio.Event()
    upstream.plays([EVENT_STREAM, chunk(TELLING[0]), done, *map(chunk, TELLING[1:]), LAST])
    async with penstock(configuration(upstream), tmp_path) as running, wire(running.port) as line:
        line.send(request(STREAM))
        assert await line.head() == 200
        assert await line.chunk() == TELLING[0]
        waiter = asyncio.create_task(running.ask())
        await running.reaches("gate_queue_depth", 1, gate="model/m")

        new = {"m": {"upstreams": ["up"], "limits": {"concurrency": 2}}, "n": {"upstreams": ["up"]}}
        running.write(configuration(upstream, models=new))
        if how == "SIGHUP":
            running.process.send_signal(signal.SIGHUP)
            await running.reaches("config_reloads_total", 1, result="success")
        else:
            answered = await running.reload()
            assert (answered.status, answered.json) == (200, {"status": "reloaded", "notes": []})

        assert (await waiter).status == 200, "the waiter has the place that the new plan gave"
        assert (await running.ask(ASK | {"model": "n"})).status == 200
        done.set()
        assert await line.rest() == b"".join(TELLING[1:])
        metrics = await running.metrics()
    assert metrics("gate_limit", gate="model/m") == 2
    assert metrics("gate_in_use") == 0
    assert metrics("requests_total", outcome="ok") == 3


async def test_a_call_keeps_the_plan_it_came_with(upstream: Scripted, tmp_path: Path) -> None:
    done = asyncio.Event()
    upstream.plays([done, *answer(ECHO)])
    async with penstock(configuration(upstream), tmp_path) as running:
        old = asyncio.create_task(running.ask())
        await upstream.exchange()
        running.write(configuration(upstream, models={"n": {"upstreams": ["up"]}}, server={"port": 0, "admin_port": 1}))
        assert (await running.reload()).json["notes"] == ["server takes effect at the next start"]
        assert (await running.ask()).error["code"] == "model_not_found"
        done.set()
        assert (await old).status == 200
        assert (await running.metrics())("gate_in_use") == 0


async def test_a_bad_file_leaves_the_old_plan_running_and_says_so(upstream: Scripted, tmp_path: Path) -> None:
    async with penstock(configuration(upstream), tmp_path) as running:
        running.write(
            "upstreams:\n  up: {base_url: nowhere, api_keys: sk-upstream}\nmodels:\n  m: {upstreams: [upp]}\n"
        )
        refused = await running.reload()
        assert refused.status == 422
        assert refused.json["status"] == "refused"
        problems = "\n".join(refused.json["problems"])
        for told in ("penstock.yaml", "upstreams.up.base_url", "api_key", "models.m.upstreams"):
            assert told in problems
        assert "sk-upstream" not in problems
        metrics = await running.metrics()
        assert metrics("config_last_reload_successful") == 0
        assert metrics("config_reloads_total", result="failure") == 1
        assert (await running.ask()).status == 200

        running.write("{ not: yaml")
        running.process.send_signal(signal.SIGHUP)
        await running.reaches("config_reloads_total", 2, result="failure")
        running.file.unlink()
        assert (await running.reload()).status == 422
        assert (await running.ask()).status == 200
        await until(lambda: running.said.count("reload refused") >= 3)

        running.write(configuration(upstream))
        assert (await running.reload()).status == 200
        assert (await running.metrics())("config_last_reload_successful") == 1
        assert (await running.ask()).status == 200
    assert "sk-upstream" not in running.said


async def test_when_it_is_told_to_stop_calls_in_flight_end_whole(upstream: Scripted, tmp_path: Path) -> None:
    done = asyncio.Event()
    upstream.plays([EVENT_STREAM, chunk(TELLING[0]), done, *map(chunk, TELLING[1:]), LAST], answer(ECHO))
    async with penstock(configuration(upstream), tmp_path) as running, wire(running.port) as line:
        line.send(request(STREAM))
        assert await line.head() == 200
        assert await line.chunk() == TELLING[0]
        waiter = asyncio.create_task(running.ask())
        await running.reaches("gate_queue_depth", 1, gate="model/m")
        running.process.send_signal(signal.SIGTERM)
        await running.reaches("draining", 1)

        ready = await running.get("/readyz")
        assert (ready.status, ready.json) == (503, {"status": "draining"})
        assert (await running.get("/healthz")).status == 200
        late = await running.ask()
        assert (late.status, late.error["code"]) == (503, "draining")
        assert late.headers["x-should-retry"] == "true"
        assert int(late.headers["retry-after-ms"]) > 0

        done.set()
        assert await line.rest() == b"".join(TELLING[1:])
        assert (await waiter).status == 200
        assert await running.process.wait() == 0
        lines = [json.loads(line) for line in running.log.read_text().splitlines()]
    assert sorted(line["status"] for line in lines) == [200, 200, 503], "the log is whole"


async def test_what_outlasts_the_drain_is_cut_off_and_never_looks_whole(upstream: Scripted, tmp_path: Path) -> None:
    upstream.plays([EVENT_STREAM, chunk(TELLING[0]), Act.SILENCE])
    server = {"port": 0, "admin_port": 0, "drain_seconds": 0.2}
    async with penstock(configuration(upstream, server=server), tmp_path) as running, wire(running.port) as line:
        line.send(request(STREAM))
        assert await line.head() == 200
        assert await line.chunk() == TELLING[0]
        running.process.send_signal(signal.SIGTERM)
        rest = await line.until_closed()
        async with asyncio.timeout(5.0):
            assert await running.process.wait() == 0
    assert b"[DONE]" not in rest
    assert b'"code":"draining"' in rest  # it ends as chunks do, and is told in band to be broken
    assert "cut off" in running.said


async def test_a_second_signal_cuts_the_drain_short(upstream: Scripted, tmp_path: Path) -> None:
    upstream.plays([Act.SILENCE])
    async with penstock(configuration(upstream), tmp_path) as running, wire(running.port) as line:
        line.send(request())
        await upstream.exchange()
        running.process.send_signal(signal.SIGINT)
        await running.reaches("draining", 1)
        running.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(5.0):
            assert await running.process.wait() == 0
