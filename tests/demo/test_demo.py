"""The demo as it is run: what it prints is what happened, and it ends by itself or when it is told to."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from http.client import HTTPConnection
from io import StringIO

import pytest
from rich.console import Console

from proxy import demo, simulator
from proxy.demo import screen
from proxy.simulator import Profile, Simulator, profiles

TIGHT = replace(profiles.INSTANT, requests_per_minute=3000, requests_burst=20)  # 50 a second, 20 at once
CALLS = 50
ESCAPE = "\x1b"


class Paper(StringIO):
    """Takes what is printed, and tells who waits for some words that they are there."""

    def __init__(self) -> None:
        super().__init__()
        self._awaited: list[tuple[str, asyncio.Event]] = []

    def write(self, text: str) -> int:
        written = super().write(text)
        for words, event in self._awaited:
            if words in self.getvalue():
                event.set()
        return written

    async def says(self, words: str) -> None:
        event = asyncio.Event()
        self._awaited.append((words, event))
        if words not in self.getvalue():
            await event.wait()


class Terminal(Paper):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> list[Simulator]:
    """The simulated providers that the demo starts: the first for the straight burst, the second for the gateway's."""
    started: list[Simulator] = []

    @asynccontextmanager
    async def serving(profile: Profile, *, seed: int = 0) -> AsyncIterator[Simulator]:
        async with simulator.serving(profile, seed=seed) as running:
            started.append(running)
            yield running

    monkeypatch.setattr(demo, "serving", serving)
    return started


def row(printed: str, name: str) -> list[str]:
    """The figures of a row of the summary."""
    found = re.search(rf"^  {re.escape(name)}  +(.*?)$", printed, re.MULTILINE)
    assert found is not None, f"no row {name!r} in:\n{printed}"
    return re.split(r" {2,}", found[1].strip())


async def test_the_summary_says_what_the_providers_counted(providers: list[Simulator]) -> None:
    paper = Paper()
    code = await demo.run(calls=CALLS, console=Console(file=paper, width=100), profile=TIGHT)
    printed = paper.getvalue()
    straight, through = (running.provider.stats for running in providers)

    assert code == 0
    assert row(printed, "answered") == [f"{straight.admitted} of {CALLS}", f"{CALLS} of {CALLS}"]
    assert row(printed, "failed") == [str(CALLS - straight.admitted), "0"]
    assert row(printed, "in the order asked") == ["yes", "yes"]
    assert row(printed, "refused by the provider") == [str(straight.refusals), str(through.refusals)]
    assert row(printed, "retries by the SDK") == [str(straight.arrived - CALLS), "0"]
    assert row(printed, "retries by the gateway") == ["-", str(through.arrived - CALLS)]
    assert through.admitted == CALLS
    assert straight.refusals > through.refusals
    assert "/metrics count the same as client and provider" in " ".join(printed.split())


async def test_without_a_terminal_it_prints_plain_lines() -> None:
    paper = Paper()
    await demo.run(calls=4, console=Console(file=paper), profile=profiles.INSTANT)
    printed = paper.getvalue()

    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", printed)
    assert re.search(rf"{screen.THROUGH} .* 4 answered     0 failed", printed)


async def test_on_a_terminal_the_table_lives_and_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    paper = Terminal()
    await demo.run(calls=4, console=Console(file=paper, width=100, color_system="standard"), profile=profiles.INSTANT)
    printed = paper.getvalue()

    assert "in flight at the provider" in printed
    assert printed.rindex(f"{ESCAPE}[?25h") > printed.rindex(f"{ESCAPE}[?25l")
    assert f"{ESCAPE}[32m" in printed


async def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    paper = Terminal()
    await demo.run(calls=4, console=Console(file=paper, width=100, color_system="standard"), profile=profiles.INSTANT)

    codes = {code for said in re.findall(rf"{ESCAPE}\[([\d;]*)m", paper.getvalue()) for code in said.split(";")}
    assert codes <= {"", "0", "1"}  # bold at most


async def test_a_missing_sdk_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    paper = Paper()
    code = await demo.run(console=Console(file=paper, width=40))

    assert code == 1
    assert "pip install 'penstock[demo]'" in paper.getvalue().replace("\n ", "")
    assert "Traceback" not in paper.getvalue()


async def test_calls_that_the_gateway_could_not_bring_through_make_the_exit_code_1() -> None:
    paper = Paper()
    locked = replace(profiles.INSTANT, keys=("sk-another-one",))
    code = await demo.run(calls=4, console=Console(file=paper, width=100), profile=locked)

    assert code == 1
    assert row(paper.getvalue(), "answered") == ["0 of 4", "0 of 4"]
    assert row(paper.getvalue(), "in the order asked") == ["-", "-"]
    assert "(4 failed: AuthenticationError)" in paper.getvalue()


async def test_a_burst_that_does_not_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SLACK_SECONDS", 0.5)
    paper = Paper()
    silent = replace(profiles.INSTANT, first_token_seconds=3600.0)
    code = await demo.run(calls=4, console=Console(file=paper, width=100), profile=silent)

    assert code == 1
    assert row(paper.getvalue(), "failed") == ["4", "4"]
    assert "(4 failed: cut off)" in paper.getvalue()


async def test_kept_up_it_serves_at_the_addresses_it_tells_until_it_is_interrupted() -> None:
    paper = Paper()
    running = asyncio.ensure_future(
        demo.run(keep=True, calls=4, console=Console(file=paper, width=100), profile=profiles.INSTANT)
    )
    await paper.says("until Ctrl-C")
    port, admin_port = map(int, re.findall(r"127\.0\.0\.1:(\d+)/(?:v1/chat|metrics)", paper.getvalue()))
    assert await asyncio.to_thread(get, port, "/v1/models") == 200
    assert await asyncio.to_thread(get, admin_port, "/metrics") == 200

    os.kill(os.getpid(), signal.SIGINT)
    assert await running == 0
    assert paper.getvalue().endswith("Stopped.\n")


async def test_ports_that_are_taken_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = taken.getsockname()[1]
        monkeypatch.setattr(demo, "PORT", busy)
        monkeypatch.setattr(demo, "ADMIN_PORT", busy)
        paper = Paper()
        running = asyncio.ensure_future(
            demo.run(keep=True, calls=2, console=Console(file=paper, width=100), profile=profiles.INSTANT)
        )
        await paper.says("until Ctrl-C")
        assert f":{busy}/" not in paper.getvalue()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0


async def test_an_interrupt_in_the_middle_ends_it_cleanly() -> None:
    before = asyncio.all_tasks()
    paper = Terminal()
    silent = replace(profiles.INSTANT, first_token_seconds=3600.0)
    running = asyncio.ensure_future(
        demo.run(calls=20, console=Console(file=paper, width=100, force_terminal=True), profile=silent)
    )
    await paper.says("in flight at the provider")
    os.kill(os.getpid(), signal.SIGINT)

    assert await running == demo.INTERRUPTED
    assert "Stopped." in paper.getvalue()
    assert asyncio.all_tasks() == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("profile", "calls", "seconds"),
    [
        (profiles.TIGHT, 300, 30.0),
        (profiles.TIGHT, 50, 0.0),
        (Profile(requests_per_minute=60), 61, 1.0),  # without a burst of its own, a minute's worth
        (profiles.INSTANT, 300, 0.0),
    ],
)
def test_the_limit_alone_takes_what_exceeds_the_burst(profile: Profile, calls: int, seconds: float) -> None:
    assert demo.limit_seconds(profile, calls) == pytest.approx(seconds)


def get(port: int, path: str) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()
