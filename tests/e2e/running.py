"""The gateway as production makes it, in this process, with what a test needs to ask it and to look at it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from openai import AsyncOpenAI
from yarl import URL

from proxy.app import Gateway
from proxy.config import Model, Retry, Secret, Server, Settings, Upstream

UPSTREAM_KEY = "sk-upstream-canary-5f3a"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
ASK = {"model": "m", "messages": HELLO}
CHAT = "/v1/chat/completions"
HURRIED = Retry(base_seconds=0.001, cap_seconds=0.01)


async def until(condition: Callable[[], object], what: str = "", *, seconds: float = 5.0) -> None:
    """Return as soon as `condition` holds; fail if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        await asyncio.sleep(0.001)


async def until_still(level: Callable[[], int], *, for_seconds: float = 0.3, seconds: float = 20.0) -> int:
    """Return `level` once it is above 0 and has not moved for `for_seconds`."""
    deadline = time.monotonic() + seconds
    last, since = 0, time.monotonic()
    while not last or time.monotonic() - since < for_seconds:
        assert time.monotonic() < deadline, f"still moving after {seconds} s, at {last}"
        await asyncio.sleep(0.01)
        if (now := level()) != last:
            last, since = now, time.monotonic()
    return last


def descriptors() -> dict[str, str]:
    """What this process holds open: number -> what it is."""
    found = {}
    for entry in os.scandir("/proc/self/fd"):
        try:
            found[entry.name] = os.readlink(entry.path)
        except OSError:  # the one the listing itself was read through
            continue
    return found


def at(base_url: str, **said: Any) -> Upstream:
    """An upstream with a credential of its own."""
    told: dict[str, Any] = {"base_url": base_url, "api_key": Secret(UPSTREAM_KEY)} | said
    return Upstream(**told)


def settings(upstreams: Upstream | Mapping[str, Upstream], **sections: Any) -> Settings:
    """A configuration on free ports, with hurried retries; one model, `*`, on all upstreams in their order."""
    named = {"up": upstreams} if isinstance(upstreams, Upstream) else upstreams
    told: dict[str, Any] = {
        "server": Server(port=0, admin_port=0),
        "upstreams": named,
        "models": {"*": Model(upstreams=tuple(named))},
        "retry": HURRIED,
    } | sections
    return Settings(**told)


_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Metrics:
    """One scrape. `metrics("requests_total", outcome="ok")` is the sum of all samples that fit."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, name: str, **labels: str) -> float:
        samples = re.findall(rf"^penstock_{name}(?:{{(.*)}})? (\S+)$", self.text, re.MULTILINE)
        return sum(float(value) for said, value in samples if labels.items() <= dict(_LABEL.findall(said)).items())


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


class House:
    """A running gateway and a plain HTTP client for it."""

    def __init__(self, gateway: Gateway, http: aiohttp.ClientSession) -> None:
        self.gateway, self.http = gateway, http

    @property
    def port(self) -> int:
        return self.gateway.port

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"

    @property
    def base_url(self) -> str:
        return f"{self.origin}/v1"

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.gateway.admin_port}"

    def sdk(self, **said: Any) -> AsyncOpenAI:
        """The official client, without retries of its own unless told; close it with `async with`."""
        told: dict[str, Any] = {"base_url": self.base_url, "api_key": "sk-client", "max_retries": 0} | said
        return AsyncOpenAI(**told)

    async def ask(
        self, said: object = ASK, path: str = CHAT, *, method: str = "POST", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request, its answer read whole; `said` is sent as it is if it is bytes, else as JSON."""
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        sent = {"content-type": "application/json"} | dict(headers or {})
        url = URL(self.origin + path, encoded=True)
        async with self.http.request(method, url, data=io.BytesIO(body), headers=sent) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def stream(self, headers: Mapping[str, str] | None = None, **said: object) -> Answer:
        return await self.ask(ASK | {"stream": True} | said, headers=headers)

    async def metrics(self) -> Metrics:
        async with self.http.get(f"{self.admin}/metrics") as answer:
            assert answer.status == 200
            return Metrics(await answer.text())

    @property
    def in_flight(self) -> int:
        return self.gateway.limits.process.in_use

    @property
    def waiting(self) -> int:
        return self.gateway.limits.waiting

    async def until_idle(self, *, seconds: float = 5.0) -> None:
        await until(lambda: not self.in_flight and not self.waiting, "idle", seconds=seconds)


@asynccontextmanager
async def serving(
    said: Settings, *, load: Callable[[], Settings] | None = None, log_fd: int | None = None
) -> AsyncIterator[House]:
    """A gateway with these settings, for the length of the block; both of its logs go to `log_fd`."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as http,
        Gateway(said, load=load, log_fd=log_fd, audit_fd=log_fd) as gateway,
    ):
        yield House(gateway, http)
