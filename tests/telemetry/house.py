"""The gateway as production makes it, in front of a simulated provider, with both of its logs in files."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from proxy import simulator
from proxy.app import Gateway
from proxy.config import Model, Price, Retry, Secret, Server, Settings, Upstream
from proxy.simulator import Profile, Simulator

UPSTREAM_KEY = "sk-upstream-canary-4711"
CALLER_KEY = "sk-caller-canary-4711"
ADMIN_KEY = "sk-admin-canary-4711"
CHAT = "/v1/chat/completions"
MODEL = "gpt-4o-mini"


def upstream(base_url: str, **said: Any) -> Upstream:
    return Upstream(**{"base_url": base_url, "api_key": Secret(UPSTREAM_KEY), "limits": {"learn": False}} | said)


def settings(upstreams: Mapping[str, Upstream], **sections: Any) -> Settings:
    """One priced model on all upstreams, one caller, free ports, hurried retries, every trace kept."""
    told: dict[str, Any] = {
        "server": Server(port=0, admin_port=0),
        "upstreams": upstreams,
        "models": {MODEL: Model(upstreams=tuple(upstreams), price=Price(input=0.15, output=0.6))},
        "callers": {"team-a": Secret(CALLER_KEY)},
        "retry": Retry(base_seconds=0.001, cap_seconds=0.01),
        "telemetry": {"trace_ratio": 1.0},
    }
    return Settings(**told | sections)


async def until(condition: Callable[[], object], *, seconds: float = 5.0) -> None:
    """Return as soon as `condition` holds; fail if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        await asyncio.sleep(0.002)


@dataclass
class House:
    gateway: Gateway
    http: aiohttp.ClientSession
    log: Path
    audit_log: Path

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.gateway.admin_port}"

    def headers(self, **more: str) -> dict[str, str]:
        return {"authorization": f"Bearer {CALLER_KEY}"} | {name.replace("_", "-"): said for name, said in more.items()}

    def said(self, *, model: str = MODEL, prompt: str = "hello", **more: object) -> dict[str, object]:
        return {"model": model, "messages": [{"role": "user", "content": prompt}], **more}

    async def ask(self, *, headers: Mapping[str, str] | None = None, **said: Any) -> tuple[int, bytes]:
        """One chat call, its answer read whole."""
        async with self.http.post(
            self.origin + CHAT, json=self.said(**said), headers=self.headers() if headers is None else headers
        ) as answer:
            return answer.status, await answer.read()

    async def metrics(self) -> Metrics:
        async with self.http.get(f"{self.admin}/metrics", headers={"authorization": f"Bearer {ADMIN_KEY}"}) as answer:
            assert answer.status == 200
            return Metrics(await answer.text())

    async def ended(self) -> None:
        """Every call has been accounted for, and what is to be written of them is written."""
        await until(lambda: not self.gateway.telemetry._open)
        self.gateway.telemetry.settle()
        assert await asyncio.to_thread(self.gateway.telemetry.flush, 5.0)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def audited(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit_log.read_text().splitlines()]


class Metrics:
    """One scrape. `metrics("requests_total", outcome="ok")` is the sum of all samples that fit."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        wanted = labels.items()
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == f"penstock_{name}" and wanted <= sample.labels.items()
        )


@asynccontextmanager
async def house(said: Settings, folder: Path, *, load: Callable[[], Settings] | None = None) -> AsyncIterator[House]:
    """A gateway with these settings, for the length of the block."""
    log, audit_log = folder / "access.log", folder / "audit.log"
    log_fd, audit_fd = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (log, audit_log))
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
            Gateway(said, load=load, log_fd=log_fd, audit_fd=audit_fd) as gateway,
        ):
            yield House(gateway, http, log, audit_log)
    finally:
        os.close(log_fd)
        os.close(audit_fd)


@asynccontextmanager
async def fronting(
    profile: Profile, folder: Path, *, up: Mapping[str, Any] | None = None, remember: int = 0, **sections: Any
) -> AsyncIterator[tuple[Simulator, House]]:
    """A gateway in front of one simulated provider, `up`, for the length of the block."""
    async with simulator.serving(profile, remember=remember) as provider:
        said = settings({"up": upstream(provider.base_url, **up or {})}, **sections)
        async with house(said, folder) as running:
            yield provider, running
