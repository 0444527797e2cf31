"""Nothing secret in anything that is told: keys and prompts run through everything that can happen, and are then
searched for in every log, span, metric and error of the gateway's own."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from io import StringIO
from urllib.parse import quote

import pytest
from aiohttp import web

from proxy.api import connections
from proxy.api.answering import Streams
from proxy.api.connections import Patience
from proxy.api.dialects import OPENAI
from proxy.api.edge import Edge, Endpoint, Visit
from proxy.app import Gateway
from proxy.config import ConfigError, Model, Problem, Server, Settings
from proxy.simulator import ALWAYS, Simulator, profiles, serving
from tests.telemetry.house import ADMIN_KEY, CALLER_KEY, CHAT, MODEL, UPSTREAM_KEY, House, house, settings, upstream

PROMPT = "tell-nobody-canary-0815"  # a provider's answer repeats it
WRONG_KEY = "sk-wrong-canary-4711"
OTHER_KEY = "sk-rotated-canary-4711"
QUERY, HEADER, COOKIE = "query-canary-4711", "header-canary-4711", "cookie-canary-4711"
SECRETS = (PROMPT, WRONG_KEY, OTHER_KEY, CALLER_KEY, UPSTREAM_KEY, ADMIN_KEY, QUERY, HEADER, COOKIE)


@pytest.fixture
def logged():
    """All that Python's logging is told by anybody, at its most talkative, as it would be written."""
    written = StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in ("", "penstock", "aiohttp", "asyncio")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.DEBUG)
    root.addHandler(handler)
    yield written
    root.removeHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@asynccontextmanager
async def _echoing() -> AsyncIterator[str]:
    """A provider whose errors repeat what was asked, in the body and in headers; the path says which error."""

    async def answer(request: web.Request) -> web.Response:
        said = (await request.read()).decode()
        status = int(json.loads(said)["max_tokens"])
        error = {"message": f"cannot serve {said}", "type": PROMPT, "code": f"bad {said}", "param": said}
        return web.json_response(
            {"error": error}, status=status, headers={"x-request-id": f"up-{PROMPT}"[:6], "retry-after": "0"}
        )

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def _raw(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def _live_through(gateway: House, provider: Simulator) -> list[bytes]:
    """Everything that can become of a call; returns the bodies of errors that are the gateway's own."""
    own: list[bytes] = []
    secret = {"x-secret": HEADER, "cookie": COOKIE, "x-request-id": "mine", "x-request-timeout": "0.2"}

    async def ask(*, status: int, ours: bool = False, path: str = CHAT, **said: object) -> None:
        async with gateway.http.post(
            f"{gateway.origin}{path}?token={QUERY}",
            json=gateway.said(prompt=PROMPT, user=PROMPT, **said),
            headers=gateway.headers() | secret,
        ) as answer:
            body = await answer.read()
            assert answer.status == status, body
            assert not any(key in str(answer.headers) for key in SECRETS)
            if ours:
                own.append(body)

    await ask(status=200)
    await ask(status=200, stream=True)
    for said in (400, 401, 403, 404, 422, 429, 500, 503):
        await ask(status=said, model="echo", max_tokens=said)
    await ask(status=404, ours=True, model="unknown-model")
    await ask(status=404, ours=True, path="/v1/nowhere")
    await ask(status=400, ours=True, model=7)
    await ask(status=504, ours=True, model="slow")
    await ask(status=502, ours=True, model="nobody")
    provider.provider.outage = ALWAYS
    await ask(status=500)
    await ask(status=500, stream=True)
    provider.provider.outage = None
    async with gateway.http.post(
        gateway.origin + CHAT, data=f'{{"model": "{PROMPT}'.encode(), headers=gateway.headers()
    ) as bad:
        assert bad.status == 400
        own.append(await bad.read())
    for denied in ({"authorization": f"Bearer {WRONG_KEY}"}, {"x-api-key": WRONG_KEY}, {}):
        async with gateway.http.post(
            gateway.origin + CHAT, json=gateway.said(prompt=PROMPT), headers=denied | secret
        ) as refused:
            assert refused.status == 401
            own.append(await refused.read())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await ask(status=200, model="slow")
    port = gateway.gateway.port
    malformed = (
        f"POST {CHAT}?token={QUERY} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {CALLER_KEY}\x01\r\n\r\n",
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{HEADER} {WRONG_KEY}\r\ncontent-length: 3\r\n\r\nabc",
        f"{PROMPT} {QUERY} {HEADER}\r\n\r\n",
    )
    return own + [await _raw(port, request.encode()) for request in malformed]


async def _administer(gateway: House) -> list[bytes]:
    own: list[bytes] = []
    for key, status in ((ADMIN_KEY, 200), (WRONG_KEY, 401)):
        async with gateway.http.post(
            f"{gateway.admin}/admin/reload?token={QUERY}", headers={"authorization": f"Bearer {key}"}
        ) as answer:
            assert answer.status == status
            own.append(await answer.read())
    return own


async def test_no_key_and_no_prompt_is_found_in_anything_that_is_told(tmp_path, collector, monkeypatch, logged):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    stalled = replace(profiles.INSTANT, first_token_seconds=3600.0)
    async with serving(profiles.INSTANT) as provider, serving(stalled) as slow, _echoing() as echoing:
        upstreams = {
            "up": upstream(provider.base_url, propagate_trace=True),
            "echo": upstream(echoing),
            "slow": upstream(slow.base_url, connect_seconds=0.1, first_byte_seconds=0.3),
            "nobody": upstream("http://127.0.0.1:1/v1"),
        }
        sections = {
            "server": Server(port=0, admin_port=0, admin_key=ADMIN_KEY),
            "models": {MODEL: Model(upstreams=("up",))}
            | {name: Model(upstreams=(name,)) for name in ("echo", "slow", "nobody")},
            "retry": {"attempts": 1},
            "telemetry": {"trace_ratio": 1.0, "per_caller": True, "slow_log_seconds": 0.05},
        }
        rotated = upstreams | {"up": upstream(provider.base_url, api_key=OTHER_KEY)}
        wanted: list[Settings | ConfigError] = [settings(rotated, **sections)]

        def load() -> Settings:
            found = wanted[0]
            if isinstance(found, ConfigError):
                raise found
            return found

        async with house(settings(upstreams, **sections), tmp_path, load=load) as gateway:
            own = await _live_through(gateway, provider)
            own += await _administer(gateway)
            wanted[0] = ConfigError([Problem("p.yaml", 3, "upstreams.up.api_key", "must not be empty")])
            with pytest.raises(ConfigError):
                await gateway.gateway.reload()
            async with gateway.http.post(
                f"{gateway.origin}{CHAT}", json=gateway.said(prompt=PROMPT), headers=gateway.headers()
            ) as answer:
                assert answer.status == 200
            await gateway.ended()
            metrics = (await gateway.metrics()).text
            async with gateway.http.get(
                f"{gateway.admin}/metrics",
                headers={"authorization": f"Bearer {ADMIN_KEY}", "accept": "application/openmetrics-text"},
            ) as answer:
                metrics += await answer.text()
    told = {
        "access log": gateway.log.read_bytes(),
        "audit log": gateway.audit_log.read_bytes(),
        "spans": b"".join(request.SerializeToString() for request in collector.requests),
        "metrics": metrics.encode(),
        "errors": b"".join(own),
        "logging": logged.getvalue().encode(),
    }
    for where, text in told.items():
        assert text, where
        for secret in SECRETS:
            for form in (secret, quote(secret), secret[3:]):
                assert form.encode() not in text, (where, form)
    assert b"slow_request" in told["access log"]
    assert {line["event"] for line in gateway.audited()} == {"start", "reload", "key_denied", "admin", "stop"}
    assert [line["ok"] for line in gateway.audited() if line["event"] == "reload"] == [True, False]


async def test_what_an_unforeseen_error_says_is_told_to_nobody(tmp_path, logged):
    """An endpoint that fails over what it was given, in the edge as production makes it."""

    async def fall(visit: Visit) -> None:
        raise KeyError(await visit.body())

    said = settings({"up": upstream("http://127.0.0.1:1/v1")})
    gateway = Gateway(said)
    edge = Edge(
        lambda: gateway.plan,
        {OPENAI: {CHAT: Endpoint("chat", CHAT, {"POST": fall})}},
        gateway.telemetry,
        Streams(0, 60),
        asyncio.get_running_loop().time,
    )
    runner = web.ServerRunner(connections.Server(edge, Patience(), most=10))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        answer = await _raw(
            runner.addresses[0][1],
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-api-key: {CALLER_KEY}\r\n"
            f"content-length: {len(PROMPT)}\r\n\r\n{PROMPT}".encode(),
        )
    finally:
        await runner.cleanup()
        await asyncio.to_thread(gateway.telemetry.close, 1.0)
    assert b"500 Internal Server Error" in answer
    written = logged.getvalue()
    assert "KeyError" in written
    assert "in fall" in written
    for secret in (PROMPT, CALLER_KEY):
        assert secret.encode() not in answer
        assert secret not in written
