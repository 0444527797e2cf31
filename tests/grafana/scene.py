"""A gateway before providers of every temper, under a load that has something of everything, and a Prometheus that
scrapes it: the picture of a day in a quarter of a minute.

    callers a, b -> gateway -> main     a provider that tells its limits
                           -> strict   refuses for a limit, always
                           -> flaky    answers 500, resets connections, breaks streams off
                           -> dead     nobody listens
                           -> broke    is out of money
                           -> narrow   few connections
                           -> local    a server of one's own
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp
import yaml
from openai import AsyncOpenAI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from proxy.config import Gate, Limits, Model, Price, Retry, Secret, Settings, State
from proxy.simulator import ALWAYS, Simulator, profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import CHAT, House, at, serving, settings
from tests.e2e.scripted import refusal, scripted
from tests.grafana.asking import Prometheus, Refused

ROOT = Path(__file__).parents[2]
SCRAPE_SECONDS = 1
SCRAPES = 12  # that the load lasts for; a rate is over four of them
TICK_SECONDS = 0.4
MOST_SECONDS = 120.0  # until all of them have succeeded; it takes 17, more on a machine with other work
KEYS = {"team-a": "sk-team-a-canary-0001", "team-b": "sk-team-b-canary-0002"}
PRICE = Price(input=2.5, output=10.0, cached_input=1.25)
PRIORITIES = ("interactive", "default", "batch")

BRISK = replace(profiles.ROOMY, first_token_seconds=0.02, tokens_per_second=1_000.0, output_tokens=30.0)
FLAKY = replace(BRISK, error_rate=0.15, reset_rate=0.1, cut_rate=0.1, abort_rate=0.1, error_event_rate=0.05)
BROKE = replace(BRISK, out_of_money=ALWAYS)
LOCAL = replace(profiles.SELF_HOSTED, speed=20.0)


def configured(main: Simulator, flaky: Simulator, broke: Simulator, local: Simulator, strict: str) -> Settings:
    as_it_is = Limits(learn=False)
    upstreams = {
        "main": at(main.base_url),
        "strict": at(strict),
        "flaky": at(flaky.base_url, limits=as_it_is),
        "dead": at(f"http://127.0.0.1:{free_port()}/v1"),
        "broke": at(broke.base_url),
        "narrow": at(main.base_url, connections=2, limits=as_it_is),
        "local": at(local.base_url, self_hosted=True),
    }
    models = {
        "priced": Model(upstreams=("main",), price=PRICE),
        "unpriced": Model(upstreams=("main",)),
        "guarded": Model(upstreams=("strict", "main"), price=PRICE),
        "flaky": Model(upstreams=("flaky",)),
        "dead": Model(upstreams=("dead", "main")),
        "broke": Model(upstreams=("broke", "main")),
        "narrow": Model(upstreams=("narrow",)),
        "local": Model(upstreams=("local",)),
        "few": Model(upstreams=("main",), limits=Limits(concurrency=2, learn=False)),
    }
    return settings(
        upstreams,
        models=models,
        pipelines={"digest": DIGEST},
        gate=Gate(concurrency=200, queue_limit=8),
        callers={alias: Secret(key) for alias, key in KEYS.items()},
        retry=Retry(attempts=2, base_seconds=0.02, cap_seconds=0.1),
        telemetry={"trace_ratio": 1.0, "per_caller": True},
    )


DIGEST: dict[str, Any] = {  # its first step never fails, the others do now and then
    "steps": {
        "extract": {"model": "priced", "prompt": "Facts in: {input}"},
        "doubt": {"model": "flaky", "prompt": "What is wrong in: {steps.extract}", "on_error": "skip"},
        "weigh": {"model": "flaky", "prompt": "Weigh: {steps.doubt}", "on_error": {"fallback": "priced"}},
        "sum": {"model": "flaky", "prompt": "Sum up: {steps.weigh}"},
    }
}


class Load:
    """Calls, as many at once as come. What becomes of one is the gateway's to count."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._draw = random.Random(1)
        self._turn = 0

    async def run(self, enough: Callable[[], Awaitable[bool]]) -> None:
        """A batch that is not over soon, and a mix each tick until it is enough; nobody waits for what is left then."""
        calls: set[asyncio.Task[None]] = set()
        await self.batch("few", 500)
        try:
            while not await enough():
                for call in self._mix():
                    task = asyncio.create_task(call)
                    calls.add(task)
                    task.add_done_callback(calls.discard)
                await asyncio.sleep(TICK_SECONDS)
        finally:
            for task in calls:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    def _mix(self) -> Iterator[Any]:
        self._turn += 1
        for model in ("priced", "unpriced", "guarded", "flaky", "dead", "broke", "pipeline/digest"):
            yield self.ask(model)
            yield self.ask(model, stream=True)
        yield from (self.ask("flaky", stream=True) for _ in range(3))
        yield from (self.ask("narrow") for _ in range(5))
        yield from (self.ask("local", stream=True) for _ in range(3))
        yield from (self.ask("few", max_tokens=60) for _ in range(4))
        yield self.leave("priced")
        yield self.batch("priced", 2)
        yield self.ask("nobody-knows-it")
        if self._turn % 4 == 0:
            yield from (self.ask("few", max_tokens=60, patience=0.3) for _ in range(14))

    def _headers(self, patience: float | None = None) -> dict[str, str]:
        said = {
            "authorization": f"Bearer {self._draw.choice(list(KEYS.values()))}",
            "x-penstock-priority": self._draw.choice(PRIORITIES),
        }
        return said if patience is None else said | {"x-request-timeout": str(patience)}

    async def batch(self, model: str, items: int) -> None:
        """Submit a batch of so many items; nobody waits for it."""
        said = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 60}
        lines = [{"custom_id": str(number), "method": "POST", "url": CHAT, "body": said} for number in range(items)]
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        async with AsyncOpenAI(base_url=f"{self._house.origin}/v1", api_key=KEYS["team-a"]) as client:
            file = await client.files.create(file=("in.jsonl", content), purpose="batch")
            await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")

    async def ask(
        self, model: str, *, stream: bool = False, max_tokens: int = 20, patience: float | None = None
    ) -> None:
        said = {"model": model, "messages": [{"role": "user", "content": "hello " * 20}], "max_tokens": max_tokens}
        try:
            await self._house.ask(said | {"stream": stream}, headers=self._headers(patience))
        except aiohttp.ClientPayloadError:
            return  # a stream that broke off, as it was meant to

    async def leave(self, model: str) -> None:
        """Read the beginning of a long stream."""
        said = {"model": model, "messages": [{"role": "user", "content": "hello"}], "stream": True}
        async with self._house.http.post(
            self._house.origin + CHAT, data=json.dumps(said | {"max_tokens": 500}), headers=self._headers()
        ) as answer:
            await answer.content.readany()
            answer.close()


@asynccontextmanager
async def acting(state: Path) -> AsyncIterator[House]:
    """The gateway and all its providers."""
    refuse = refusal(
        429, "rate_limit_exceeded", "requests", "Rate limit reached on requests per min", retry_after_ms="300"
    )
    async with (
        simulating(BRISK) as main,
        simulating(FLAKY, seed=1) as flaky,
        simulating(BROKE) as broke,
        simulating(LOCAL) as local,
        scripted() as strict,
    ):
        strict.otherwise = refuse
        said = configured(main, flaky, broke, local, strict.base_url)
        async with serving(said.model_copy(update={"state": State(path=str(state))})) as house:
            yield house


@contextmanager
def collecting() -> Iterator[set[str]]:
    """An OTLP receiver, named to whoever looks at the environment; yields the ids of the traces that it was sent."""
    traces: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            for resource in sent.resource_spans:
                for scope in resource.scope_spans:
                    traces.update(span.trace_id.hex() for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        told = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "500",  # milliseconds; every trace is kept here, and none may be dropped
            "NO_PROXY": "127.0.0.1",
        }
        before = {name: os.environ.get(name) for name in told}
        os.environ.update(told)
        try:
            yield traces
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
            server.shutdown()
            thread.join()


def scrape_config(targets: list[str], directory: Path) -> Path:
    """The committed configuration with other addresses, and everything once a second."""
    committed = ROOT / "grafana" / "prometheus" / "prometheus.yml"
    said = yaml.safe_load(committed.read_text())
    every = f"{SCRAPE_SECONDS}s"
    said["global"] = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    said["rule_files"] = [str(committed.parent / files) for files in said["rule_files"]]
    (job,) = said["scrape_configs"]
    del job["dns_sd_configs"], job["relabel_configs"]  # there is no name server here that knows them
    job["static_configs"] = [{"targets": targets}]
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(said))
    return file


def started(binary: str, targets: list[str], directory: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A Prometheus with the features of docker-compose.yml, on a free port, and that port."""
    composed = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["command"]
    features = [option for option in composed if option.startswith("--enable-feature")]
    port = free_port()
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={scrape_config(targets, directory)}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                *features,
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return process, port


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


async def play(binary: str, directory: Path) -> tuple[subprocess.Popen[bytes], Prometheus]:
    """The whole scene. Returns a Prometheus that has seen it, to be ended by the caller."""
    async with (
        acting(directory / "state") as house,
        serving(settings(at(f"http://127.0.0.1:{free_port()}/v1"))) as idle,
    ):
        targets = [f"127.0.0.1:{each.gateway.admin_port}" for each in (house, idle)]
        process, port = started(binary, targets, directory)
        began = time.monotonic()

        async def enough() -> bool:
            if await asyncio.to_thread(_scrapes, port) >= SCRAPES:
                return True
            assert time.monotonic() - began < MOST_SECONDS, (directory / "prometheus.log").read_text()
            return False

        try:
            since = time.time()
            await house.gateway.reload()
            await Load(house).run(enough)
            return process, Prometheus(port, since, time.time(), SCRAPE_SECONDS)
        except BaseException:
            end(process)
            raise


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(10)


def _scrapes(port: int) -> int:
    """How many of a Prometheus's have succeeded; 0 as long as it does not answer."""
    now = time.time()
    try:
        found = Prometheus(port, now, now, SCRAPE_SECONDS).get("query", query="sum_over_time(up[1h])")["result"]
    except (ConnectionError, Refused):
        return 0
    return min((int(each["value"][1]) for each in found), default=0)
