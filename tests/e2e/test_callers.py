"""Who may call, and whose key goes where: a caller's never leaves the gateway, an upstream's is never shown."""

from __future__ import annotations

import base64
import hashlib
import tempfile

import pytest
from openai import AsyncOpenAI

from proxy.config import PASSTHROUGH, Limits, Model, Retry, Secret
from proxy.simulator import profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import ASK, HELLO, UPSTREAM_KEY, Answer, House, at, serving, settings
from tests.e2e.scripted import TELLING, Act, Scripted, refusal, scripted, stream
from tests.e2e.wire import request, wire

TEAM_KEY, BATCH_KEY = "sk-team-canary-0123456789", "sk-batch-canary-0123456789"
CALLERS = {"team-a": Secret(TEAM_KEY), "batch-jobs": Secret(BATCH_KEY)}


@pytest.fixture
async def house(upstream: Scripted) -> object:
    """A gateway that knows two callers."""
    async with serving(settings(at(upstream.base_url, limits=Limits(learn=False)), callers=CALLERS)) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# ── who may call ──


@pytest.mark.parametrize(
    "headers",
    [
        bearer(TEAM_KEY),
        bearer(BATCH_KEY),
        {"authorization": f"bearer {TEAM_KEY}"},
        {"authorization": f"BEARER  {TEAM_KEY} "},
        {"x-api-key": TEAM_KEY},
        {"x-api-key": TEAM_KEY, "authorization": "Basic dXNlcjpwYXNz"},
        {"x-api-key": TEAM_KEY, "authorization": "Bearer "},
    ],
    ids=["bearer", "another", "lower", "spaced", "x-api-key", "beside basic", "beside nothing"],
)
async def test_a_known_key_is_let_in(upstream: Scripted, house: House, headers: dict[str, str]) -> None:
    assert (await house.ask(headers=headers)).status == 200
    assert len(upstream.exchanges) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": TEAM_KEY},
        {"authorization": "Basic " + base64.b64encode(f":{TEAM_KEY}".encode()).decode()},
        bearer("sk-wrong"),
        bearer(TEAM_KEY[:-1]),
        bearer(TEAM_KEY + "0"),
        bearer(TEAM_KEY.upper()),
        bearer(f"{TEAM_KEY} {TEAM_KEY}"),
        bearer(f"{TEAM_KEY},{BATCH_KEY}"),
        bearer(hashlib.sha256(TEAM_KEY.encode()).hexdigest()),
        bearer("team-a"),
        bearer("*"),
        bearer("' OR 1=1 --"),
        bearer("ключ"),
        bearer("x" * 7_000),
        bearer(UPSTREAM_KEY),
        {"x-api-key": "sk-wrong"},
        {"x-api-key": TEAM_KEY, **bearer("sk-wrong")},
        {"api-key": TEAM_KEY},
        {"cookie": f"key={TEAM_KEY}"},
    ],
)
async def test_anybody_else_is_not(upstream: Scripted, house: House, headers: dict[str, str]) -> None:
    answered = await house.ask(headers=headers)
    assert (answered.status, answered.error["code"]) == (401, "invalid_api_key")
    assert answered.error["type"] == "invalid_request_error"
    for sent in headers.values():
        assert len(sent) < 8 or sent.removeprefix("Bearer ") not in answered.body.decode()
    assert upstream.exchanges == []
    metrics = await house.metrics()
    assert metrics("requests_total", code="401", outcome="rejected") == 1
    assert metrics("request_errors_total", source="client", error_type="auth") == 1


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("GET", "/v1/models/m")]
)
async def test_every_endpoint_asks_for_a_key(upstream: Scripted, house: House, method: str, path: str) -> None:
    assert (await house.ask(b"", path, method=method)).status == 401
    body = ASK if method == "POST" else b""
    assert (await house.ask(body, path, method=method, headers=bearer(TEAM_KEY))).status == 200
    assert len(upstream.exchanges) == 1


async def test_a_stranger_s_body_is_not_read(house: House) -> None:
    async with wire(house.port) as line:
        line.send(request(b"", headers={"content-length": "50000000"}))
        assert (await line.answer()).status == 401


async def test_without_callers_anybody_is_let_in(upstream: Scripted) -> None:
    async with serving(settings(at(upstream.base_url))) as house:
        assert (await house.ask()).status == 200
        assert (await house.ask(headers=bearer("anything"))).status == 200


# ── whose key goes where ──


async def test_a_caller_s_key_never_reaches_an_upstream() -> None:
    async with (
        simulating(profiles.INSTANT, remember=100) as simulator,
        serving(settings(at(simulator.base_url), callers=CALLERS)) as house,
        house.sdk(api_key=TEAM_KEY) as client,
    ):
        await client.chat.completions.create(model="m", messages=HELLO)
        [part async for part in await client.chat.completions.create(model="m", messages=HELLO, stream=True)]
        await client.embeddings.create(model="m", input="x")
        await client.responses.create(model="m", input="x")
        [model async for model in client.models.list()]
        await client.models.retrieve("m")
        await house.ask(headers={"x-api-key": BATCH_KEY})
        seen = list(simulator.seen)
    assert len(seen) == 7
    for each in seen:
        assert each.headers["Authorization"] == f"Bearer {UPSTREAM_KEY}"
        assert "x-api-key" not in each.headers
        for key in (TEAM_KEY, BATCH_KEY):
            assert key not in str(dict(each.headers))
            assert key.encode() not in each.body


async def test_only_headers_that_are_on_the_list_reach_an_upstream(upstream: Scripted, house: House) -> None:
    passing = {"idempotency-key": "once", "openai-beta": "assistants=v2", "openai-project": "proj_1"}
    staying = {
        "cookie": "session=1",
        "forwarded": "for=10.0.0.1",
        "x-forwarded-for": "10.0.0.1",
        "x-real-ip": "10.0.0.1",
        "proxy-authorization": "Basic x",
        "x-api-key": BATCH_KEY,
        "api-key": "k",
        "x-penstock-priority": "batch",
        "x-request-timeout": "30",
        "x-request-id": "mine",
        "x-stainless-lang": "python",
        "user-agent": "client/1",
        "te": "trailers",
        "referer": "https://intranet/",
        "accept-encoding": "br",
    }
    assert (await house.ask(headers=bearer(TEAM_KEY) | passing | staying)).status == 200
    seen = upstream.exchanges[0].headers
    ours = {"authorization": f"Bearer {UPSTREAM_KEY}", "user-agent": "penstock", "accept-encoding": "identity"}
    assert seen.items() >= passing.items()
    assert seen.items() >= ours.items()
    assert not staying.keys() & (seen.keys() - ours.keys())
    assert set(seen) <= {*passing, *ours, "host", "content-type", "content-length", "accept", "connection"}


async def test_a_passthrough_upstream_gets_the_client_s_own_credential(upstream: Scripted) -> None:
    async with (
        serving(settings(at(upstream.base_url, api_key=PASSTHROUGH))) as house,
        house.sdk(api_key="sk-client-own") as client,
    ):
        await client.chat.completions.create(model="m", messages=HELLO)
        await house.ask(headers={"x-api-key": "sk-other-own"})
        await house.ask()
    first, second, third = (exchange.headers for exchange in upstream.exchanges)
    assert first["authorization"] == "Bearer sk-client-own"
    assert second["x-api-key"] == "sk-other-own"
    assert "authorization" not in second
    assert not {"authorization", "x-api-key"} & third.keys()


async def test_a_client_s_credential_goes_to_no_upstream_but_its_own(upstream: Scripted) -> None:
    """On one route: the first passes it through and fails, the second has a key of its own."""
    upstream.otherwise = refusal(500)
    async with scripted() as second:
        both = {"own": at(upstream.base_url, api_key=PASSTHROUGH), "ours": at(second.base_url)}
        async with serving(settings(both)) as house:
            await house.ask(headers=bearer("sk-client-own") | {"x-api-key": "sk-other-own"})
    assert upstream.exchanges[0].headers["authorization"] == "Bearer sk-client-own"
    assert second.exchanges[0].headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert "sk-client-own" not in str(second.exchanges[0].headers)
    assert "sk-other-own" not in str(second.exchanges[0].headers)


async def test_an_upstream_without_a_key_gets_none(upstream: Scripted) -> None:
    async with serving(settings(at(upstream.base_url, api_key=None))) as house:
        await house.ask(headers=bearer("sk-client-own"))
    assert "authorization" not in upstream.exchanges[0].headers


# ── the canary ──


async def test_no_key_stands_in_an_answer_a_metric_or_a_log(
    upstream: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    closed = at("http://127.0.0.1:1/v1", api_key=Secret("sk-closed-canary"))
    models = {"m": Model(upstreams=("up",)), "closed": Model(upstreams=("closed",))}
    upstreams = {"up": at(upstream.base_url), "closed": closed}
    said = settings(upstreams, models=models, callers=CALLERS, retry=Retry(attempts=1))
    upstream.plays(
        stream(*TELLING),
        refusal(401, "invalid_api_key", message="Incorrect API key provided: sk-up...5f3a."),
        refusal(500),
        [b"garbage\r\n\r\n", Act.FIN],
        [Act.RST],
        stream(TELLING[0]),
        refusal(429, "insufficient_quota"),
    )
    answers: list[Answer] = []
    with tempfile.TemporaryFile() as log:
        async with serving(said, load=lambda: said, log_fd=log.fileno()) as house:
            for model in ("m",) * 7 + ("closed", "nobody", TEAM_KEY):
                key = bearer(TEAM_KEY)
                answers.append(await house.ask(ASK | {"model": model, "stream": True}, headers=key))
            answers.append(await house.ask(headers=bearer("sk-wrong-canary")))
            answers.append(await house.ask(b"{", headers={"x-api-key": BATCH_KEY}))
            answers.append(await house.ask(path=f"/v1/{BATCH_KEY}", headers=bearer(TEAM_KEY)))
            answers.append(await house.ask(b"", "/v1/models", method="GET", headers=bearer(TEAM_KEY)))
            told = [(await house.metrics()).text]
            for method, path in (("POST", "/admin/reload"), ("GET", "/admin/limits"), ("GET", "/readyz")):
                async with house.http.request(method, house.admin + path) as answered:
                    told.append(await answered.text())
            inside = repr(house.gateway.plan.settings) + repr(house.gateway.plan.upstreams)
        log.seek(0)
        told.append(log.read().decode())
    assert len(told[-1].splitlines()) >= len(answers)
    told += [inside, caplog.text]
    told += [str(answered.headers) + answered.body.decode() for answered in answers[:9] + answers[10:]]
    text = "\n".join(told)
    for canary in (UPSTREAM_KEY, "sk-closed-canary", BATCH_KEY, "sk-wrong-canary"):
        assert canary not in text, canary
    assert TEAM_KEY not in text.replace(f"`{TEAM_KEY}`", "")
    assert "team-a" in told[4], "the caller's alias is what a log names"


async def test_keys_are_compared_whole() -> None:
    """Keys that share a long beginning, a hash's beginning or a length are told apart."""
    keys = {f"c{number}": Secret("sk-shared-" + "x" * 100 + str(number)) for number in range(10)}
    async with scripted() as upstream, serving(settings(at(upstream.base_url), callers=keys)) as house:
        for key in keys.values():
            async with AsyncOpenAI(base_url=house.base_url, api_key=key.reveal(), max_retries=0) as client:
                await client.chat.completions.create(model="m", messages=HELLO)
        assert (await house.ask(headers=bearer("sk-shared-" + "x" * 100))).status == 401
    assert len(upstream.exchanges) == 10
