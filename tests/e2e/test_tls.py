"""Certificates and proxies, made here by openssl: the gateway's own, an upstream's, and those on the way to it."""

from __future__ import annotations

import asyncio
import base64
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy import config
from proxy.config import ConfigError, Secret, Server, Settings, Tls, describe
from tests.e2e.running import ASK, CHAT, at, serving, settings
from tests.e2e.scripted import ECHO, Scripted, answer, scripted

SECRET = "proxy-canary-7d1e"


@dataclass(frozen=True)
class Pair:
    cert: str
    key: str


def certificate(folder: Path, name: str, authority: Pair | None = None) -> Pair:
    """A certificate for 127.0.0.1, of this authority or its own."""
    made = Pair(str(folder / f"{name}.pem"), str(folder / f"{name}.key"))
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", made.key, "-out", made.cert),
            *(("-CA", authority.cert, "-CAkey", authority.key) if authority else ()),
        ],
        check=True,
        capture_output=True,
    )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Pair:
    return certificate(folder, "authority")


@pytest.fixture(scope="module")
def leaf(folder: Path, authority: Pair) -> Pair:
    return certificate(folder, "leaf", authority)


def trusting(authority: Pair, shown: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.cert)
    if shown is not None:
        context.load_cert_chain(shown.cert, shown.key)
    return context


def listening(shown: Pair, asks_for: Pair | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown.cert, shown.key)
    if asks_for is not None:
        context.load_verify_locations(asks_for.cert)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


async def made(upstream: str, **said: Any) -> Settings:
    """Settings whose files are read beside the event loop, as they are when a gateway starts."""
    server = said.pop("server", None) or Server(port=0, admin_port=0)
    return await asyncio.to_thread(lambda: settings(at(upstream, **said), server=server))


async def secured(shown: Pair, **said: Any) -> Server:
    return await asyncio.to_thread(
        lambda: Server(port=0, admin_port=0, tls=Tls(cert_file=shown.cert, key_file=shown.key, **said))
    )


async def asked(port: int, context: ssl.SSLContext) -> int:
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"https://127.0.0.1:{port}{CHAT}", json=ASK, ssl=context) as answered,
    ):
        await answered.read()
        return answered.status


async def shown(port: int, context: ssl.SSLContext) -> bytes | None:
    """The certificate that a new connection is shown."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    certificate = writer.get_extra_info("ssl_object").getpeercert(True)
    writer.transport.abort()
    return bytes(certificate)


# ── the gateway's own ──


async def test_clients_are_served_over_tls_and_a_reload_renews_the_certificate(
    upstream: Scripted, tmp_path: Path, authority: Pair
) -> None:
    pair = await asyncio.to_thread(certificate, tmp_path, "gateway", authority)
    trusts = trusting(authority)
    said = await made(upstream.base_url, server=await secured(pair))
    async with serving(said) as house, aiohttp.ClientSession() as http:
        url = f"https://127.0.0.1:{house.port}{CHAT}"
        async with http.post(url, json=ASK, ssl=trusts) as answered:
            assert (await answered.json()) == ECHO
        with pytest.raises(aiohttp.ClientError):
            await house.ask()
        first = await shown(house.port, trusts)
        await asyncio.to_thread(certificate, tmp_path, "gateway", authority)
        assert list(await house.gateway.reload()) == []
        assert await shown(house.port, trusts) != first
        async with http.post(url, json=ASK, ssl=trusts) as answered:
            assert answered.status == 200, "on the connection that it had"


async def test_a_client_without_a_certificate_of_the_authority_is_refused(
    upstream: Scripted, authority: Pair, leaf: Pair
) -> None:
    said = await made(upstream.base_url, server=await secured(leaf, client_ca_file=authority.cert))
    async with serving(said) as house:
        assert await asked(house.port, trusting(authority, leaf)) == 200
        with pytest.raises(aiohttp.ClientError):
            await asked(house.port, trusting(authority))
    assert len(upstream.exchanges) == 1


async def test_files_that_do_not_do_are_mistakes_of_the_configuration(
    folder: Path, authority: Pair, leaf: Pair, tmp_path: Path
) -> None:
    (tmp_path / "words.pem").write_text("no certificate")
    file = tmp_path / "penstock.yaml"
    wrong = {
        f"server: {{tls: {{cert_file: nowhere.pem, key_file: {leaf.key}}}}}": "cannot be read (No such file",
        f"server: {{tls: {{cert_file: {leaf.cert}, key_file: {authority.key}}}}}": "give two that fit",
        f"server: {{tls: {{cert_file: words.pem, key_file: {leaf.key}}}}}": "give two that fit",
        f"server: {{tls: {{cert_file: {leaf.cert}, key_file: {leaf.key}, client_ca_file: words.pem}}}}": "holds no",
    }
    for line, told in wrong.items():
        file.write_text(f'upstreams: {{up: {{base_url: "http://x"}}}}\nmodels: {{"*": {{upstreams: [up]}}}}\n{line}\n')
        with pytest.raises(ConfigError) as refused:
            await asyncio.to_thread(config.load, file, {})
        [problem] = refused.value.problems
        assert (problem.line, problem.key) == (3, "server.tls")
        assert told in problem.message
    file.write_text('models: {"*": {upstreams: [up]}}\nupstreams:\n  up: {base_url: "http://x", ca_file: words.pem}\n')
    with pytest.raises(ConfigError) as refused:
        await asyncio.to_thread(config.load, file, {})
    assert [(problem.line, problem.key) for problem in refused.value.problems] == [(3, "upstreams.up")]


# ── an upstream's ──


async def test_an_upstream_s_certificate_has_to_be_of_the_authority_that_is_named(authority: Pair, leaf: Pair) -> None:
    async with scripted(tls=listening(leaf)) as upstream:
        async with serving(await made(upstream.base_url)) as house:
            refused = await house.ask()
            assert (refused.status, refused.error["code"]) == (502, "upstream_unreachable")
            assert (await house.metrics())("upstream_connect_errors_total", reason="tls") > 0
        async with serving(await made(upstream.base_url, ca_file=authority.cert)) as house:
            assert (await house.ask()).json == ECHO


async def test_an_upstream_is_shown_the_certificate_that_it_asks_for(authority: Pair, leaf: Pair) -> None:
    async with scripted(tls=listening(leaf, asks_for=authority)) as upstream:
        async with serving(await made(upstream.base_url, ca_file=authority.cert)) as house:
            assert (await house.ask()).status == 502
        mine = {"client_cert_file": leaf.cert, "client_key_file": leaf.key}
        async with serving(await made(upstream.base_url, ca_file=authority.cert, **mine)) as house:
            assert (await house.ask()).status == 200


# ── proxies ──


class Proxy:
    """An HTTP proxy: CONNECT, and requests in absolute form. `heads` are those it was sent."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        self.port = 0
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://user:{SECRET}@127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.heads.append(head)
            if self.refuses:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
                writer.close()
                return
            method, target, _ = head.split(" ", 2)
            place = target if method == "CONNECT" else target.split("/")[2]
            host, _, port = place.partition(":")
            there, back = await asyncio.open_connection(host, int(port))
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                back.write(head.replace(f"http://{place}", "", 1).encode("latin-1"))
            await asyncio.gather(_pump(reader, back), _pump(there, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
    writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    running = Proxy()
    server = await asyncio.start_server(running.serve, "127.0.0.1", 0)
    running.port = server.sockets[0].getsockname()[1]
    yield running
    server.close()


@asynccontextmanager
async def upstream_of(kind: str, leaf: Pair) -> AsyncIterator[Scripted]:
    async with scripted(tls=listening(leaf) if kind == "https" else None) as upstream:
        yield upstream


@pytest.mark.parametrize("kind", ["https", "http"])
async def test_an_upstream_is_reached_through_its_proxy(kind: str, proxy: Proxy, authority: Pair, leaf: Pair) -> None:
    async with upstream_of(kind, leaf) as upstream:
        said = await made(upstream.base_url, ca_file=authority.cert, proxy=Secret(proxy.url))
        async with serving(said) as house:
            assert (await house.ask()).json == ECHO
        [head] = proxy.heads
        assert head.startswith("CONNECT 127.0.0.1" if kind == "https" else f"POST {upstream.base_url}/chat")
        credentials = base64.b64encode(f"user:{SECRET}".encode()).decode()
        assert f"proxy-authorization: basic {credentials}".lower() in head.lower()
        assert ("sk-upstream" in head) is (kind == "http"), "within TLS the proxy sees nothing of the call"
        [exchange] = upstream.exchanges
        assert kind == "http" or "proxy-authorization" not in exchange.headers
    assert SECRET not in str(describe(said)) + repr(said)


@pytest.mark.parametrize("how", ["refuses", "is down"])
async def test_a_proxy_that_does_not_let_through_is_an_upstream_that_is_not_reached(
    how: str, proxy: Proxy, authority: Pair, leaf: Pair
) -> None:
    proxy.refuses = how == "refuses"
    url = proxy.url if proxy.refuses else f"http://user:{SECRET}@127.0.0.1:1"
    async with upstream_of("https", leaf) as upstream:
        async with serving(await made(upstream.base_url, ca_file=authority.cert, proxy=Secret(url))) as house:
            refused = await house.ask()
        assert (refused.status, refused.error["code"]) == (502, "upstream_unreachable")
        assert SECRET.encode() not in refused.body
        assert upstream.exchanges == []


async def test_the_environment_s_proxy_is_taken_only_where_the_configuration_says_so(
    upstream: Scripted, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy.url)
    upstream.plays(answer(ECHO), answer(ECHO), answer(ECHO))
    through = []
    for said, kept_out in (({}, ""), ({"proxy": "env"}, ""), ({"proxy": "env"}, "localhost,127.0.0.1")):
        monkeypatch.setenv("no_proxy", kept_out)
        async with serving(await made(upstream.base_url, **said)) as house:
            assert (await house.ask()).status == 200
        through.append(len(proxy.heads))
    assert through == [0, 1, 1]


@pytest.mark.parametrize(
    "url", ["https://proxy:1", "socks5://proxy:1", "proxy:3128", "http://", "http://p/x", "http://p:0"]
)
async def test_what_is_no_proxy_is_a_mistake(url: str) -> None:
    with pytest.raises(ValueError, match="must be an http URL with a host, or env"):
        at("http://x", proxy=url)
