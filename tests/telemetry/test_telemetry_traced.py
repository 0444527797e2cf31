"""The trees that a collector receives from a running gateway."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from proxy.config import Gate
from proxy.simulator import ALWAYS, profiles, serving
from tests.telemetry.house import CHAT, MODEL, fronting, house, settings, until, upstream

ROOT, OPERATION = f"POST {CHAT}", f"chat {MODEL}"
UNSET, ERROR = Status.STATUS_CODE_UNSET, Status.STATUS_CODE_ERROR
SLOW = replace(profiles.INSTANT, tokens_per_second=20.0, output_tokens=200)
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(autouse=True)
def _traces_go_to_the_collector(collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _within(inner, outer):
    return (
        outer.start_time_unix_nano <= inner.start_time_unix_nano <= inner.end_time_unix_nano <= outer.end_time_unix_nano
    )


def _check(collector):
    """What holds for every tree: one trace, one root, every span within its parent and ended after it began."""
    spans = {span.span_id: span for span in collector.spans}
    assert len(spans) == len(collector.spans)
    assert len({span.trace_id for span in collector.spans}) == 1
    for span in collector.spans:
        if span.parent_span_id in spans:
            assert _within(span, spans[span.parent_span_id]), span.name


async def test_a_plain_call(collector, attributes_of, tmp_path):
    async with fronting(profiles.INSTANT, tmp_path) as (provider, gateway):
        status, _ = await gateway.ask(max_tokens=7)
        await gateway.ended()
        (line,) = gateway.lines()
        metrics = await gateway.metrics()
    assert status == 200
    assert collector.tree() == [(0, ROOT), (1, OPERATION), (2, "POST")]
    _check(collector)
    root, operation, attempt = collector.one(ROOT), collector.one(OPERATION), collector.one("POST")
    assert [span.kind for span in (root, operation, attempt)] == [
        Span.SPAN_KIND_SERVER,
        Span.SPAN_KIND_CLIENT,
        Span.SPAN_KIND_CLIENT,
    ]
    assert {span.status.code for span in collector.spans} == {UNSET}
    assert not any(span.links for span in collector.spans)
    assert attributes_of(root) == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "url.path": CHAT,
        "http.response.status_code": 200,
        "penstock.key": "team-a",
        "penstock.request_id": line["request_id"],
        "penstock.outcome": "ok",
    }
    told = attributes_of(operation)
    cost = told["penstock.cost_usd"]
    assert cost == line["cost_usd"] == metrics("cost_usd_total", provider="up", model=MODEL) > 0
    assert told.pop("penstock.overhead_seconds") >= 0
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "up",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.response.id": told["gen_ai.response.id"],
        "gen_ai.response.model": told["gen_ai.response.model"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": line["tokens_in"],
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.cache_write.input_tokens": 0,
        "gen_ai.usage.reasoning.output_tokens": 0,
        "penstock.attempts": 1,
        "penstock.cost_usd": cost,
    }
    assert attributes_of(attempt) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": provider.port,
        "url.full": f"{provider.base_url}/chat/completions",
        "gen_ai.request.model": MODEL,
        "penstock.upstream": "up",
        "penstock.upstream_request_id": line["upstream_request_id"],
    }


async def test_a_stream(collector, attributes_of, tmp_path):
    paced = replace(profiles.INSTANT, tokens_per_second=500.0)
    async with fronting(paced, tmp_path) as (_, gateway):
        _, body = await gateway.ask(stream=True)
        await gateway.ended()
    assert body.endswith(b"data: [DONE]\n\n")
    assert collector.tree() == [(0, ROOT), (1, OPERATION), (2, "POST"), (2, "stream")]
    _check(collector)
    operation, stream = collector.one(OPERATION), collector.one("stream")
    assert {span.status.code for span in collector.spans} == {UNSET}
    assert [event.name for event in operation.events] == ["gen_ai.first_chunk"]
    told = attributes_of(operation)
    assert told["gen_ai.request.stream"] is True
    assert 0 < told["gen_ai.response.time_to_first_chunk"] < 5
    said = attributes_of(stream)
    assert said["penstock.stream.end_reason"] == "done"
    assert said["penstock.stream.chunks"] > 1
    assert said["penstock.stream.bytes"] == len(body)
    assert stream.kind == Span.SPAN_KIND_INTERNAL


async def test_a_retried_call(collector, attributes_of, tmp_path):
    """Two calls at a provider that lets one through at a time: the second is refused, waits, and is let through."""
    one_at_once = replace(profiles.INSTANT, requests_per_minute=600, requests_burst=1)
    async with fronting(one_at_once, tmp_path) as (_, gateway):
        answers = await asyncio.gather(gateway.ask(), gateway.ask())
        await gateway.ended()
        metrics = await gateway.metrics()
    assert [status for status, _ in answers] == [200, 200]
    (retried,) = (span.trace_id for span in collector.named("POST") if span.links)
    for request in collector.requests:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                kept = [span for span in scope.spans if span.trace_id == retried]
                del scope.spans[:]
                scope.spans.extend(kept)
    assert collector.tree() == [(0, ROOT), (1, OPERATION), (2, "POST"), (2, "retry.backoff"), (2, "POST")]
    _check(collector)
    first, second = collector.named("POST")
    assert first.status.code == ERROR
    refused = attributes_of(first)
    assert refused["http.response.status_code"] == 429
    assert refused["error.type"] == "429"
    assert refused["penstock.retry_after_seconds"] > 0
    assert "http.request.resend_count" not in refused
    assert second.status.code == UNSET
    assert attributes_of(second)["http.request.resend_count"] == 1
    assert [link.span_id for link in second.links] == [first.span_id]
    assert [link.trace_id for link in second.links] == [retried]
    backoff = collector.one("retry.backoff")
    told = attributes_of(backoff)
    assert told["penstock.backoff.source"] in ("retry_after", "limit")
    assert told["penstock.backoff.reason"] == "requests"
    assert told["penstock.backoff.seconds"] == pytest.approx(
        (backoff.end_time_unix_nano - backoff.start_time_unix_nano) / 1e9, abs=1e-6
    )
    for recovered in (collector.one(ROOT), collector.one(OPERATION)):
        assert recovered.status.code == UNSET
        assert "error.type" not in attributes_of(recovered)
    assert attributes_of(collector.one(OPERATION))["penstock.attempts"] == 2
    assert metrics("upstream_retries_total", provider="up", reason="requests") == 1
    assert metrics("cooldowns_total", provider="up", cause="requests") == 1
    assert metrics("fallbacks_total") == 0


async def test_a_failover(collector, attributes_of, tmp_path):
    async with serving(replace(profiles.INSTANT, outage=ALWAYS)) as broken, serving(profiles.INSTANT) as sound:
        both = {"first": upstream(broken.base_url), "second": upstream(sound.base_url)}
        async with house(settings(both), tmp_path) as gateway:
            status, _ = await gateway.ask()
            await gateway.ended()
            metrics = await gateway.metrics()
    assert status == 200
    assert collector.tree() == [(0, ROOT), (1, OPERATION), (2, "POST"), (2, "POST")]
    _check(collector)
    first, second = collector.named("POST")
    assert (first.status.code, second.status.code) == (ERROR, UNSET)
    assert attributes_of(first)["error.type"] == "500"
    assert attributes_of(first)["penstock.upstream"] == "first"
    assert attributes_of(second)["penstock.upstream"] == "second"
    assert attributes_of(second)["server.port"] == sound.port
    assert attributes_of(second)["http.request.resend_count"] == 1
    assert [link.span_id for link in second.links] == [first.span_id]
    operation = collector.one(OPERATION)
    assert attributes_of(operation)["gen_ai.provider.name"] == "second"
    assert operation.status.code == collector.one(ROOT).status.code == UNSET
    assert metrics("fallbacks_total", from_provider="first", to_provider="second", reason="server") == 1


async def test_a_client_that_left(collector, attributes_of, tmp_path):
    async with fronting(SLOW, tmp_path) as (_, gateway):
        async with gateway.http.post(
            gateway.origin + CHAT, json=gateway.said(stream=True), headers=gateway.headers()
        ) as answer:
            await answer.content.readany()
            answer.close()
        await gateway.ended()
        (line,) = gateway.lines()
    assert collector.tree() == [(0, ROOT), (1, OPERATION), (2, "POST"), (2, "stream")]
    _check(collector)
    assert {span.status.code for span in collector.spans} == {UNSET}
    root = attributes_of(collector.one(ROOT))
    assert root["error.type"] == "client_disconnected"
    assert root["penstock.outcome"] == "cancelled"
    assert root["http.response.status_code"] == 200
    operation = collector.one(OPERATION)
    assert "error.type" not in attributes_of(operation)
    assert [event.name for event in operation.events] == ["gen_ai.first_chunk", "client.disconnected"]
    assert line["outcome"] == "cancelled"


async def test_the_wait_that_a_client_did_not_sit_out_is_the_upstream_s_and_no_overhead(tmp_path):
    async with fronting(replace(profiles.INSTANT, first_token_seconds=3600.0), tmp_path) as (_, gateway):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gateway.ask(), 0.3)
        await gateway.ended()
        (line,) = gateway.lines()
    assert line["status"] == 499
    assert line["duration_ms"] > 200
    assert line["overhead_ms"] < 100


async def test_a_refused_call(collector, attributes_of, tmp_path):
    full = Gate(concurrency=1, queue_limit=0)
    async with fronting(SLOW, tmp_path, gate=full) as (_, gateway):
        first = asyncio.ensure_future(gateway.ask(stream=True))
        await until(lambda: gateway.gateway.limits.process.in_use == 1)
        status, _ = await gateway.ask()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await gateway.ended()
    assert status == 429
    (refused,) = (span for span in collector.named("gate.wait"))
    spans = [span for span in collector.spans if span.trace_id == refused.trace_id]
    by_name = {span.name: span for span in spans}
    assert by_name.keys() == {ROOT, OPERATION, "gate.wait"}
    root, operation = by_name[ROOT], by_name[OPERATION]
    assert (operation.parent_span_id, refused.parent_span_id) == (root.span_id, operation.span_id)
    assert root.status.code == UNSET
    assert operation.status.code == ERROR
    assert attributes_of(root)["http.response.status_code"] == 429
    assert attributes_of(root)["error.type"] == attributes_of(operation)["error.type"] == "queue_full"
    assert attributes_of(refused)["penstock.gate.name"] == "process"
    assert attributes_of(refused)["penstock.gate.result"] == "rejected_full"


async def test_a_call_that_waited_for_its_place(collector, attributes_of, tmp_path):
    paced = replace(profiles.INSTANT, first_token_seconds=0.1)
    async with fronting(paced, tmp_path, gate=Gate(concurrency=1)) as (_, gateway):
        await asyncio.gather(gateway.ask(), gateway.ask(headers=gateway.headers(x_penstock_priority="batch")))
        await gateway.ended()
    (wait,) = collector.named("gate.wait")
    told = attributes_of(wait)
    assert (told["penstock.gate.name"], told["penstock.gate.result"]) == ("process", "admitted")
    assert (told["penstock.gate.limit"], told["penstock.gate.in_use"], told["penstock.gate.queue_depth"]) == (1, 1, 1)
    assert told["penstock.gate.priority"] in ("batch", "default")
    assert 0.05 < (wait.end_time_unix_nano - wait.start_time_unix_nano) / 1e9 < 5


async def test_a_stream_that_is_cut_is_an_error_under_status_200(collector, attributes_of, tmp_path):
    async with fronting(replace(profiles.INSTANT, cut_rate=1.0), tmp_path) as (_, gateway):
        status, _ = await gateway.ask(stream=True)
        await gateway.ended()
    assert status == 200
    assert collector.one(ROOT).status.code == collector.one(OPERATION).status.code == ERROR
    assert attributes_of(collector.one(ROOT))["error.type"] == "stream_broken"
    assert attributes_of(collector.one("stream"))["penstock.stream.end_reason"] == "eof"


async def test_the_asker_s_trace_goes_on_and_reaches_those_upstreams_that_may_know_it(collector, tmp_path):
    asked = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1", "baggage": "secret=1"}
    async with (
        serving(replace(profiles.INSTANT, outage=ALWAYS), remember=1) as theirs,
        serving(profiles.INSTANT, remember=1) as ours,
    ):
        both = {"theirs": upstream(theirs.base_url), "ours": upstream(ours.base_url, propagate_trace=True)}
        async with house(settings(both), tmp_path) as gateway:
            status, _ = await gateway.ask(headers=gateway.headers(**asked))
            await gateway.ended()
    assert status == 200
    assert collector.one(ROOT).trace_id.hex() == TRACE
    assert collector.one(ROOT).parent_span_id.hex() == SPAN
    (kept_from,), (told,) = theirs.seen, ours.seen
    assert not {"traceparent", "tracestate", "baggage"} & {name.lower() for name in kept_from.headers}
    second = collector.named("POST")[1]
    assert told.headers["traceparent"] == f"00-{TRACE}-{second.span_id.hex()}-01"
    assert told.headers["tracestate"] == "vendor=1"
    assert "baggage" not in told.headers


async def test_a_trace_of_its_own_is_begun_for_who_brings_none(collector, tmp_path):
    async with fronting(profiles.INSTANT, tmp_path, remember=1, up={"propagate_trace": True}) as (provider, gateway):
        await gateway.ask()
        await gateway.ended()
        (line,) = gateway.lines()
    (seen,) = provider.seen
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", seen.headers["traceparent"])
    assert seen.headers["traceparent"][3:35] == line["trace_id"] == collector.one(ROOT).trace_id.hex()
    assert "tracestate" not in seen.headers


async def test_what_is_done_later_for_a_request_is_a_trace_of_its_own_that_links_to_it(collector, tmp_path):
    async with fronting(profiles.INSTANT, tmp_path, state={"path": str(tmp_path / "state")}) as (_, gateway):
        prompts = {"prompts": ["one", "two"], "model": MODEL}
        async with gateway.http.post(f"{gateway.origin}/batch", json=prompts, headers=gateway.headers()) as answer:
            job_id = (await answer.json())["job_id"]
        status = ""
        while status != "completed":
            async with gateway.http.get(f"{gateway.origin}/batch/{job_id}", headers=gateway.headers()) as answer:
                status = (await answer.json())["status"]
        await gateway.ended()
    submitted, items = collector.one("POST /batch"), collector.named(ROOT)
    assert len(items) == 2
    for item in items:
        (link,) = item.links
        assert (link.trace_id, link.span_id) == (submitted.trace_id, submitted.span_id)
        assert item.trace_id != submitted.trace_id


async def test_server_timing_and_the_request_id_are_always_answered(tmp_path):
    async with fronting(profiles.INSTANT, tmp_path) as (_, gateway):
        for headers, status in ((gateway.headers(x_request_id="mine-1"), 200), ({"x-request-id": "mine-1"}, 401)):
            async with gateway.http.post(gateway.origin + CHAT, json=gateway.said(), headers=headers) as answer:
                assert answer.status == status
                assert answer.headers["x-request-id"] == "mine-1"
                parts = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
                assert parts.keys() == {"queue", "backoff", "upstream", "ttft", "overhead"}
                assert all(float(part) >= 0 for part in parts.values())


async def test_a_pipeline(collector, attributes_of, tmp_path):
    """Its steps stand below it, each with its own call; so do those that it is mapped over."""
    steps = {
        "extract": {"model": MODEL, "prompt": "Facts in {input}"},
        "sum": {"model": MODEL, "prompt": "Sum up {steps.extract}"},
    }
    async with fronting(profiles.INSTANT, tmp_path, pipelines={"digest": {"steps": steps}}) as (_, gateway):
        status, _ = await gateway.ask(model="pipeline/digest")
        await gateway.ended()
        lines = gateway.lines()
    assert status == 200
    below = [(2, OPERATION), (3, "POST")]
    assert [span for span in collector.tree() if "pipeline" not in span[1]] == [
        (0, ROOT),
        (1, "step extract"),
        *below,
        (1, "step sum"),
        *below,
    ]
    _check(collector)
    step = attributes_of(collector.one("step sum"))
    assert (step["penstock.pipeline"], step["penstock.step"]) == ("digest", "sum")
    assert collector.one("step sum").kind == Span.SPAN_KIND_INTERNAL
    assert [(line["event"], line.get("step", "")) for line in lines] == [
        ("step", "digest/extract"),
        ("step", "digest/sum"),
        ("request", ""),
    ]
    assert len({line["trace_id"] for line in lines}) == 1
    costs = [line["cost_usd"] for line in lines]
    assert costs[-1] == pytest.approx(sum(costs[:-1])) == attributes_of(collector.one(ROOT))["penstock.cost_usd"]
