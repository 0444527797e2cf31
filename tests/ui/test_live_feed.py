"""The page's files and the feed over HTTP: who may read what, one snapshot for all, and nobody held up by a tab."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from proxy.api import ui
from proxy.app import NAME_SHOWN
from proxy.config import Gate, Limits, Secret, Server
from tests.e2e.running import Answer, until
from tests.ui.house import LIVELY, gateway, load, serving_feed, tab

FILES = sorted(file for file in Path(ui.__file__).parent.iterdir() if file.suffix in {".html", ".js", ".css", ".svg"})
KEY = "admin-key-0123456789"


class Counting:
    """Something to look at, that knows how often it was looked at."""

    def __init__(self, weight: int = 0) -> None:
        self.looks = 0
        self.weight = "x" * weight

    def __call__(self) -> Mapping[str, object]:
        self.looks += 1
        return {"look": self.looks, "weight": self.weight}


# ── the files ──


def test_the_page_is_small() -> None:
    assert sum(file.stat().st_size for file in FILES) < 60_000


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_names_another_host_or_holds_a_script_or_style_within_markup(file: Path) -> None:
    text = file.read_text()
    hosts = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+", text)) - {"http://www.w3.org"}
    assert not hosts
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    if file.suffix == ".html":
        assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]* src=)", text)


async def test_the_page_is_served_with_a_policy_that_lets_nothing_in_from_outside() -> None:
    async with gateway() as house, house.http.get(f"{house.admin}/ui") as answer:
        assert str(answer.url) == f"{house.admin}/ui/"
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
        named = re.findall(r'(?:src|href)="([\w.]+)"', await answer.text())
        for name in named:
            async with house.http.get(f"{house.admin}/ui/{name}") as file:
                assert (file.status, file.headers["X-Content-Type-Options"]) == (200, "nosniff")
        assert {"page.js", "style.css", "icon.svg"} <= set(named)


async def test_the_files_are_for_everybody_and_the_figures_for_who_has_the_key() -> None:
    async with gateway(server=Server(port=0, admin_port=0, admin_key=Secret(KEY))) as house:
        for path, status in (("/ui/", 200), ("/ui/page.js", 200), ("/ui/live", 401), ("/ui/live/", 401)):
            async with house.http.get(house.admin + path) as answer:
                assert answer.status == status, path
        async with tab(house.gateway.admin_port, key=KEY) as reader:
            assert (await reader.snapshot())["totals"]["calls"] == 0


# ── the figures ──


async def test_a_snapshot_says_what_metrics_say() -> None:
    async with gateway(LIVELY, limits=Limits(), gate=Gate(concurrency=40)) as house:
        await load(house, 60)
        await load(house, 3, model="unheard-of")
        metrics = await house.metrics()
        async with tab(house.gateway.admin_port) as reader:
            said = await reader.snapshot()
    totals, upstream = said["totals"], said["upstreams"]["up"]
    assert totals["calls"] == metrics("requests_total") == 63
    assert totals["failed"] == metrics("request_errors_total") - metrics("request_errors_total", source="client")
    assert totals["input_tokens"] == metrics("tokens_total", type="input")
    assert totals["output_tokens"] == metrics("tokens_total", type="output")
    assert upstream["attempts"] == metrics("upstream_attempts_total")
    assert upstream["throttled"] == metrics("rate_limited_total", source="upstream")
    assert said["minute"]["calls"] == metrics("request_duration_seconds_count")
    assert said["in_flight"]["calls"] == metrics("requests_in_flight") == 0
    gates = {gate["pool"]: gate for gate in said["gates"]}
    assert gates["process"]["concurrency"] == metrics("gate_limit", gate="process") == 40
    assert {limit["source"] for limit in gates["up/gpt-4o-mini"]["limits"]} == {"headers"}
    assert len(said["calls"]) >= 50


async def test_who_waits_is_told_by_gate_and_class() -> None:
    slow = LIVELY.__class__(first_token_seconds=30.0, first_token_sigma=0.0)
    async with gateway(slow, gate=Gate(concurrency=2)) as house, asyncio.TaskGroup() as group:

        def ask(*priorities: str) -> list[asyncio.Task[Answer]]:
            return [group.create_task(house.ask(headers={"x-penstock-priority": each})) for each in priorities]

        calls = ask("default", "default")
        await until(lambda: house.in_flight == 2)
        calls += ask("interactive", "batch", "batch")
        await until(lambda: house.waiting == 3)
        async with tab(house.gateway.admin_port) as reader:
            said = await reader.snapshot()
        for call in calls:
            call.cancel()
    assert said["queue"] == {"waiting": {"interactive": 1, "default": 0, "batch": 2}, "limit": 10_000}
    process = said["gates"][0]
    assert (process["pool"], process["in_use"], process["concurrency"]) == ("process", 2, 2)
    assert process["waiting"] == {"interactive": 1, "batch": 2}
    assert said["in_flight"] | {"oldest_seconds": 0} == {
        "calls": 5,
        "queued": 3,
        "backoff": 0,
        "waiting": 2,
        "streaming": 0,
        "oldest_seconds": 0,
    }


async def test_no_prompt_and_no_key_is_in_a_snapshot() -> None:
    key, prompt = "caller-key-0123456789", "a secret of mine"
    async with gateway(callers={"team": Secret(key)}) as house:
        asked = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": prompt}]}
        assert (await house.ask(asked, headers={"Authorization": f"Bearer {key}"})).status == 200
        async with house.http.get(f"{house.admin}/ui/live") as answer:
            frame = await answer.content.readuntil(b"\n\n")
    assert b'"caller":"team"' in frame
    for secret in (key, prompt, "sk-upstream-canary"):
        assert secret.encode() not in frame


async def test_hundreds_of_made_up_models_do_not_swell_the_snapshot() -> None:
    async with gateway() as house:
        for number in range(300):
            await house.ask({"model": f"{number}-" + "x" * 300, "messages": []})
        async with tab(house.gateway.admin_port) as reader:
            said = await reader.snapshot()
    assert len(said["gates"]) == 60
    assert said["gates"][0]["pool"] == "process"
    assert said["gates_left_out"] > 100
    assert max(len(gate["pool"]) for gate in said["gates"]) <= NAME_SHOWN


# ── many tabs, slow tabs, tabs that leave ──


async def test_all_tabs_share_one_snapshot_and_none_is_made_when_nobody_looks() -> None:
    look = Counting()
    feed = ui.Feed(look, tick_seconds=0.02)
    async with serving_feed(feed) as port:
        async with AsyncExitStack() as tabs:
            readers = [await tabs.enter_async_context(tab(port)) for _ in range(20)]
            for _ in range(10):
                seen = [await reader.snapshot() for reader in readers]
            assert feed.tabs == 20
            assert seen[0]["look"] < look.looks + 1 < 60
        await until(lambda: not feed.tabs)
        looks = look.looks
        await asyncio.sleep(0.1)  # five ticks, were there any
        assert look.looks == looks


async def test_a_second_tab_is_told_at_once_what_the_first_one_saw() -> None:
    look = Counting()
    async with serving_feed(ui.Feed(look, tick_seconds=60)) as port, tab(port) as first, tab(port) as second:
        assert await first.snapshot() == await second.snapshot()
        assert look.looks == 1


async def test_tabs_that_come_and_go_leave_nothing_behind() -> None:
    feed = ui.Feed(Counting(weight=20_000), tick_seconds=0.005)

    async def visit(count: int) -> int:
        for _ in range(count):
            async with tab(port) as reader:
                await reader.snapshot()
        await until(lambda: not feed.tabs)
        return sys.getallocatedblocks()

    async with serving_feed(feed) as port:
        await visit(20)
        before = await visit(20)
        assert await visit(100) - before < 3000  # thirty a tab would be more


async def test_a_tab_that_does_not_read_misses_snapshots_and_is_cut_off() -> None:
    look = Counting(weight=200_000)
    feed = ui.Feed(look, tick_seconds=0.001, stalled_seconds=0.3)
    async with serving_feed(feed) as port:
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.setblocking(False)
            raw.sendall(b"GET /ui/live HTTP/1.1\r\nHost: x\r\n\r\n")
            await until(lambda: feed.tabs)
            await until(lambda: not feed.tabs)
        assert look.looks > 100  # 20 MB, of which at most what the sockets hold was ever written


async def test_a_slow_tab_does_not_slow_down_another() -> None:
    feed = ui.Feed(Counting(weight=200_000), tick_seconds=0.005, stalled_seconds=5.0)
    async with serving_feed(feed) as port:
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.setblocking(False)
            raw.sendall(b"GET /ui/live HTTP/1.1\r\nHost: x\r\n\r\n")
            async with tab(port) as reader:
                seen = [(await reader.snapshot())["look"] for _ in range(50)]
                assert feed.tabs == 2
    assert seen == sorted(set(seen))


async def test_more_tabs_than_people_have_are_refused() -> None:
    async with serving_feed(ui.Feed(Counting(), tick_seconds=60)) as port, AsyncExitStack() as tabs:
        for _ in range(100):
            await tabs.enter_async_context(tab(port))
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/ui/live") as answer:
            assert answer.status == 503


# ── the end ──


async def test_an_open_tab_does_not_hold_up_the_stop_and_is_told_of_it() -> None:
    async with AsyncExitStack() as tabs:
        async with gateway() as house:
            readers = [await tabs.enter_async_context(tab(house.gateway.admin_port)) for _ in range(5)]
            for reader in readers:
                await reader.snapshot()
            began = time.monotonic()
        assert time.monotonic() - began < 0.9
        for reader in readers:
            events = [await reader.event() for _ in range(2)]
            assert events[-1][0] == "" or events[0][0] == "bye"


async def test_while_it_drains_the_page_says_so_and_goes_on() -> None:
    slow = LIVELY.__class__(first_token_seconds=30.0, first_token_sigma=0.0)
    async with gateway(slow) as house, asyncio.TaskGroup() as group:
        call = group.create_task(house.ask())
        await until(lambda: house.in_flight)
        async with tab(house.gateway.admin_port) as reader:
            assert (await reader.snapshot())["draining"] is False
            assert await house.gateway.drain(0.01) is False
            said = await reader.snapshot()
            assert (said["draining"], said["in_flight"]["calls"]) == (True, 1)
        call.cancel()
