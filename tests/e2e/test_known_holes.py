"""Holes that gateways have had, one class for each: none of them is here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from proxy.config import Limits, Secret, Server, hashed
from tests.e2e.running import ASK, CHAT, UPSTREAM_KEY, House, at, serving, settings
from tests.e2e.scripted import Scripted, scripted
from tests.e2e.wire import request, wire

KEY = "sk-team-0123456789abcdef0123456789abcdef"
ADMIN_KEY = "sk-admin-0123456789abcdef"
OTHER_KEY = "sk-other-fedcba9876543210fedcba9876543210"
MINE = {"authorization": f"Bearer {KEY}"}


@pytest.fixture
async def house(upstream: Scripted) -> AsyncIterator[House]:
    """Two callers, one of them known by the hash of its key alone."""
    said = settings(
        at(upstream.base_url, limits=Limits(learn=False)),
        server=Server(port=0, admin_port=0, admin_key=Secret(ADMIN_KEY)),
        callers={"team": Secret(KEY), "other": Secret(hashed(OTHER_KEY))},
    )
    async with serving(said) as running:
        yield running


class TestAClientChoosesNoUpstream:
    """SSRF: an address in a body or a header that the gateway calls, with its key."""

    @pytest.mark.parametrize("field", ["api_base", "base_url", "api_url", "azure_endpoint", "proxy", "extra_headers"])
    async def test_an_address_in_a_body_is_data(self, upstream: Scripted, house: House, field: str) -> None:
        async with scripted() as trap:
            said = ASK | {field: trap.base_url if field != "extra_headers" else {"authorization": "Bearer mine"}}
            assert (await house.ask(said, headers=MINE)).status == 200
            assert trap.exchanges == []
        [exchange] = upstream.exchanges
        assert exchange.json == said
        assert exchange.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"

    async def test_a_picture_s_address_is_not_fetched(self, upstream: Scripted, house: House) -> None:
        async with scripted() as trap:
            picture = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{trap.port}/a.png"}}
            said = ASK | {"messages": [{"role": "user", "content": [picture]}]}
            assert (await house.ask(said, headers=MINE)).status == 200
            assert trap.exchanges == []
        assert upstream.exchanges[0].json == said

    async def test_headers_about_places_lead_nowhere(self, upstream: Scripted, house: House) -> None:
        places = {
            "x-forwarded-host": "evil",
            "forwarded": "host=evil",
            "x-original-url": "/admin",
            "x-api-base": "http://e",
        }
        assert (await house.ask(headers=MINE | places | {"cookie": "a=b", "x-api-key": "mine"})).status == 200
        [exchange] = upstream.exchanges
        assert exchange.path == CHAT
        assert exchange.headers["host"] == f"127.0.0.1:{upstream.port}"
        assert not {*places, "cookie", "x-api-key", "x-request-id"} & exchange.headers.keys()


class TestNothingAClientWritesIsCarriedOut:
    """Templates, expressions and formats in any text."""

    @pytest.mark.parametrize(
        "text", ["{{7*7}}", "${7*7}", "__import__('os').getpid()", "%(asctime)s{0.__class__}", "$(id)"]
    )
    async def test_text_stays_text(self, upstream: Scripted, house: House, text: str) -> None:
        said = {
            "model": f"m{text}",
            "messages": [{"role": text, "content": text}],
            "user": text,
            "metadata": {text: text},
        }
        assert (await house.ask(said, headers=MINE)).status == 200
        assert upstream.exchanges[0].json == said
        refused = await house.ask({"model": text, "model_": 1, "stream": text}, headers=MINE)
        assert "49" not in refused.error["message"]


class TestAKeyIsComparedAsAWhole:
    """SQL in the key's place, a cache by its first characters, the stored hash taken for the key."""

    @pytest.mark.parametrize(
        "key",
        [
            "' OR '1'='1",
            "x' UNION SELECT * FROM keys --",
            KEY[:-1],
            KEY[:20],
            KEY + "0",
            KEY.upper(),
            hashed(KEY),
            hashed(KEY).removeprefix("sha256:"),
            hashed(OTHER_KEY),
            hashed(OTHER_KEY).removeprefix("sha256:"),
            UPSTREAM_KEY,
            ADMIN_KEY,
            "*",
            "null",
        ],
    )
    async def test_another_text_is_no_key(self, upstream: Scripted, house: House, key: str) -> None:
        assert (await house.ask(headers=MINE)).status == 200, "what was known before changes nothing"
        for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
            refused = await house.ask(headers=headers)
            assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
            assert key not in refused.error["message"]
        assert len(upstream.exchanges) == 1

    async def test_a_caller_known_by_a_hash_is_let_in_by_its_key(self, house: House) -> None:
        assert (await house.ask(headers={"authorization": f"Bearer {OTHER_KEY}"})).status == 200

    async def test_two_keys_are_none(self, house: House) -> None:
        async with wire(house.port) as line:
            key = f"\r\nauthorization: Bearer {KEY}".encode()
            twice = request().replace(b"\r\n\r\n", key * 2 + b"\r\n\r\n", 1)
            line.send(twice)
            refused = await line.answer()
        assert (refused.status, refused.error["code"]) == (400, "duplicate_header")

    async def test_the_connection_header_does_not_take_the_key_away(self, upstream: Scripted, house: House) -> None:
        told = MINE | {"connection": "authorization, openai-beta", "openai-beta": "x", "anthropic-beta": "y"}
        async with wire(house.port) as line:
            line.send(request(headers=told))
            assert (await line.answer()).status == 200
        assert "openai-beta" not in upstream.exchanges[0].headers
        assert upstream.exchanges[0].headers["anthropic-beta"] == "y"


class TestTheAdminPortIsReachedFromNoOtherOne:
    """By a path that means another, or a host that names it."""

    @pytest.mark.parametrize(
        "path",
        ["/admin/reload", "/metrics", "/v1/../admin/reload", "/v1/%2e%2e/metrics", "/v1/..%2fmetrics", "//metrics"],
    )
    async def test_by_no_path_and_no_host(self, house: House, path: str) -> None:
        for host in ("penstock", f"127.0.0.1:{house.gateway.admin_port}", "localhost"):
            async with wire(house.port) as line:
                line.send(request(b"", path, method="GET", headers=MINE | {"host": host, "x-forwarded-host": host}))
                answered = await line.answer()
            assert answered.status in (400, 404)
            assert b"penstock_" not in answered.body

    @pytest.mark.parametrize("key", ["", ADMIN_KEY[:-1], hashed(ADMIN_KEY), KEY])
    async def test_its_own_port_asks_for_its_own_key(self, house: House, key: str) -> None:
        for path in ("/metrics", "/admin/limits", "//metrics", "/healthz/../metrics"):
            async with wire(house.gateway.admin_port) as line:
                line.send(request(b"", path, method="GET", headers={"authorization": f"Bearer {key}"}))
                assert await line.head() in (401, 404)


class TestNoAnswerShowsAKey:
    """In health, in errors, in what an upstream repeats."""

    async def test_neither_health_nor_an_error_does(self, upstream: Scripted, house: House) -> None:
        repeats = json.dumps({"error": {"message": f"Incorrect API key provided: {UPSTREAM_KEY}"}}).encode()
        head = b"HTTP/1.1 401 No\r\ncontent-type: application/json\r\nset-cookie: a=b\r\nserver: x\r\ncf-ray: 1\r\n"
        head += b"openai-organization: org\r\nretry-after: " + b"9" * 400 + b"\r\nrequest-id: a\x01b\r\n"
        upstream.plays([head + b"content-length: %d\r\n\r\n" % len(repeats) + repeats])
        refused = await house.ask(headers=MINE)
        assert refused.status == 401
        hidden = {"set-cookie", "cf-ray", "openai-organization", "request-id"}
        assert not hidden & {name.lower() for name in refused.headers}
        assert refused.headers["server"] == "penstock"
        async with house.http.get(f"{house.admin}/healthz") as health, house.http.get(f"{house.admin}/readyz") as ready:
            told = await health.read() + await ready.read()
        for body in (refused.body, str(refused.headers).encode(), told):
            for key in (UPSTREAM_KEY, KEY, OTHER_KEY, ADMIN_KEY):
                assert key.encode() not in body


class TestAFormDoesNotHoldTheGatewayUp:
    """A boundary of a megabyte, and other headers that are long to read."""

    async def test_a_boundary_of_a_megabyte_is_refused_at_once(self, upstream: Scripted, house: House) -> None:
        long = "multipart/form-data; boundary=" + "b" * (1 << 20)
        async with wire(house.port) as line, asyncio.timeout(5.0):
            line.send(request(b"--", "/v1/files", headers=MINE | {"content-type": long}))
            assert (await line.answer()).status == 431
        assert (await house.ask(headers=MINE)).status == 200

    @pytest.mark.parametrize("seconds", ["9" * 400, "1e999", "nan", "-1", "0", "one"])
    async def test_a_number_that_is_none_is_refused(self, house: House, seconds: str) -> None:
        refused = await house.ask(headers=MINE | {"x-request-timeout": seconds})
        assert (refused.status, refused.error["param"]) == (400, "timeout")
