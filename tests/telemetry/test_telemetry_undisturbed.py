"""Whatever becomes of what is told, calls are not touched; and nothing a client says makes a series."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import replace

import pytest

from proxy import app
from proxy.config import Model
from proxy.simulator import profiles
from tests.telemetry.house import CHAT, MODEL, Metrics, fronting, until, upstream

CALLS = 40
MADE_UP = 10_000
ABREAST = 8  # connections, each with all of its requests sent at once


@pytest.fixture
def hurried(monkeypatch):
    for name, said in {
        "OTEL_BSP_SCHEDULE_DELAY": "20",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.2",
        "OTEL_BSP_EXPORT_TIMEOUT": "200",
        "OTEL_BSP_MAX_QUEUE_SIZE": "30",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "30",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, said)
    monkeypatch.setattr(app, "FLUSH_SECONDS", 0.3)


async def _calls(folder) -> tuple[list[int], float, Metrics]:
    """Statuses of many calls, the seconds they and the stop took, and the metrics once drops were counted."""
    began = time.monotonic()
    async with fronting(profiles.INSTANT, folder) as (_, gateway):
        answers = [await gateway.ask() for _ in range(CALLS)]
        taken = time.monotonic() - began
        deadline = began + 10.0
        while not (metrics := await gateway.metrics())("telemetry_dropped_total", signal="span"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert len(gateway.lines()) <= CALLS
        stopping = time.monotonic()
    return [status for status, _ in answers], taken + time.monotonic() - stopping, metrics


def _check(statuses: list[int], seconds: float, metrics: Metrics) -> None:
    assert statuses == [200] * CALLS
    assert seconds < 5.0
    assert metrics("requests_total", outcome="ok") == CALLS
    dropped = metrics("telemetry_dropped_total", signal="span")
    assert 0 < dropped <= 3 * CALLS
    assert metrics("telemetry_dropped_total", signal="log") == 0


@pytest.mark.usefixtures("hurried")
async def test_a_collector_that_is_dead_costs_spans_and_no_call(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    _check(*await _calls(tmp_path))


@pytest.mark.usefixtures("hurried")
async def test_a_collector_that_never_answers_costs_spans_and_no_call(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        _check(*await _calls(tmp_path))


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("status", [400, 503])
async def test_a_collector_that_refuses_costs_spans_and_no_call(tmp_path, monkeypatch, collector, status):
    collector.status = status
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    _check(*await _calls(tmp_path))
    assert collector.headers
    assert not collector.requests


async def _send(port: int, requests: list[bytes], ends: bytes) -> int:
    """Send all of them on one connection without waiting; returns how many answers came that end so."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"".join(requests))
    answers = 0
    for _ in requests:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: "))
        body = await reader.readexactly(int(length.removeprefix(b"content-length: ")))
        answers += ends in body
    writer.close()
    await writer.wait_closed()
    return answers


def _request(headers: dict[str, str], said: dict[str, object]) -> bytes:
    body = json.dumps(said).encode()
    told = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{told}content-length: {len(body)}\r\n\r\n".encode() + body


async def test_ten_thousand_made_up_models_make_no_series(tmp_path):
    """Most are known to nobody; some stand behind a wildcard and are answered."""
    models = {MODEL: Model(upstreams=("up",)), "made-up-*": Model(upstreams=("up",))}
    async with fronting(profiles.INSTANT, tmp_path, models=models) as (_, gateway):

        async def ask(names: list[str], ends: bytes) -> int:
            share = [names[start::ABREAST] for start in range(ABREAST)]
            requests = [[_request(gateway.headers(), gateway.said(model=name)) for name in part] for part in share]
            return sum(await asyncio.gather(*(_send(gateway.gateway.port, part, ends) for part in requests)))

        assert await ask([f"none-{number}" for number in range(20)], b"model_not_found") == 20
        assert await ask([f"made-up-{number}" for number in range(20)], b"chat.completion") == 20
        before = await gateway.metrics()
        unknown = [f"none-{number}" for number in range(20, MADE_UP - 500)]
        assert await ask(unknown, b"model_not_found") == len(unknown)
        open_ended = [f"made-up-{number}" for number in range(20, 500)]
        assert await ask(open_ended, b"chat.completion") == len(open_ended)
        await gateway.ended()
        after = await gateway.metrics()
    assert {(s.name, *s.labels.items()) for s in after.samples} == {(s.name, *s.labels.items()) for s in before.samples}
    assert after("requests_total", model="other", code="404") == MADE_UP - 500
    assert after("requests_total", model="made-up-*", code="200") == 500
    assert "none-1" not in after.text
    assert "made-up-1" not in after.text


async def test_levels_counters_and_connections_agree_with_what_was_asked(tmp_path):
    """The families that are read from live objects, through a running gateway."""
    paced = replace(profiles.INSTANT, requests_per_minute=60_000, first_token_seconds=0.2)
    up = {"limits": {"learn": True}, "connections": 2}
    async with fronting(paced, tmp_path, up=up, telemetry={"per_caller": True}) as (provider, gateway):
        calls = [asyncio.ensure_future(gateway.ask()) for _ in range(4)]
        await until(lambda: provider.provider.stats.in_flight == 2)
        during = await gateway.metrics()
        await asyncio.gather(*calls)
        await gateway.ended()
        after = await gateway.metrics()
    assert during("upstream_in_flight", provider="up") == during("requests_in_flight", operation="chat") == 4
    assert during("requests_in_flight_age", age="0-10s") == 4
    assert during("upstream_connections", state="active") == 2
    assert during("upstream_connections_limit", provider="up") == 2
    assert after("upstream_in_flight") == after("upstream_connections", state="active") == 0
    assert after("upstream_connections", state="idle") == 2
    assert after("upstream_connection_acquires_total", how="new") == after("upstream_connect_seconds_count") == 2
    assert after("upstream_connection_acquires_total", how="reused") == 2
    assert after("upstream_connection_wait_seconds_count") == 2
    assert after("upstream_connection_wait_seconds_sum") > 0.1
    room = {"provider": "up", "credential": "up", "model": MODEL, "kind": "requests"}
    assert after("ratelimit_limit", **room) == pytest.approx(60_000, rel=0.01)
    assert 0 < after("ratelimit_remaining", **room) <= 60_000
    assert after("ratelimit_observed_timestamp_seconds") == pytest.approx(time.time(), abs=5)
    assert after("key_requests_total", key="team-a", outcome="ok") == 4
    assert after("key_cost_usd_total", key="team-a") == after("cost_usd_total", provider="up") > 0
    assert after("circuit_state", provider="up", state="closed") == 1
    for stage in ("auth", "parse", "route", "send", "relay", "usage", "log"):
        assert after("stage_duration_seconds_count", stage=stage) == 4, stage
    assert after("event_loop_lag_seconds_count") >= 1


@pytest.mark.parametrize(
    ("base_url", "reason"),
    [("http://127.0.0.1:1/v1", "tcp"), ("http://no-such-host.invalid/v1", "dns"), ("https://127.0.0.1:{}/v1", "tls")],
)
async def test_connections_that_do_not_stand_are_told_by_their_reason(tmp_path, base_url, reason):
    async with fronting(profiles.INSTANT, tmp_path) as (provider, gateway):
        said = gateway.gateway.plan.settings
        broken = said.model_copy(update={"upstreams": {"up": upstream(base_url.format(provider.port))}})
        gateway.gateway._load = lambda: broken
        await gateway.gateway.reload()
        status, _ = await gateway.ask()
        metrics = await gateway.metrics()
    assert status == 502
    assert metrics("upstream_connect_errors_total", provider="up", reason=reason) == 3
    assert metrics("upstream_retries_exhausted_total", provider="up", reason="connect") == 1
    assert metrics("upstream_connections", state="active") == 0
