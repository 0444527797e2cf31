"""`penstock top`: the page's figures in a terminal."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from proxy import top
from proxy.cli import cli
from proxy.config import Limits, Secret, Server, State
from tests.e2e.running import ASK, CHAT, until
from tests.ui.house import LIVELY, QUICK, gateway, load, snapshot_of, tab

KEY = "admin-key-0123456789"
COMMAND = (sys.executable, "-m", "proxy", "top")


def drawn(said: Any, *, width: int = 120, height: int | None = None, stale: str = "") -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(top.screen(said, console, height=height, stale=stale))
    text = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO from above
    return str(text)


async def run(*arguments: str) -> Any:
    return await asyncio.to_thread(CliRunner().invoke, cli, ["top", *arguments])


@pytest.fixture
async def said() -> Any:
    async with gateway(replace(QUICK, requests_per_minute=6000), limits=Limits()) as house:
        await load(house, 30)
        await house.ask({"model": "\x1b[2Jnope", "stream": 5})
        async with tab(house.gateway.admin_port) as reader:
            return await reader.snapshot()


# ── what is printed ──


async def test_one_snapshot_is_printed_into_a_pipe_and_agrees_with_metrics() -> None:
    async with gateway(LIVELY, limits=Limits()) as house:
        await load(house, 30)
        metrics = await house.metrics()
        result = await run("--admin", house.admin)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert f"{metrics('requests_total'):,.0f} calls, {metrics('tokens_total'):,.0f} tokens in " in lines[0]
    assert any(line.startswith("up/gpt-4o-mini") and "requests" in line and "headers" in line for line in lines)
    assert sum("gpt-4o-mini" in line and ("█" in line or "─" in line) for line in lines) == top.CALLS_PRINTED


async def test_the_figures_come_as_json_too() -> None:
    async with gateway() as house:
        await load(house, 3)
        result = await run("--admin", house.admin, "--json")
    assert json.loads(result.stdout)["totals"]["calls"] == 3


async def test_the_key_is_asked_for_and_taken() -> None:
    async with gateway(server=Server(port=0, admin_port=0, admin_key=Secret(KEY))) as house:
        without = await run("--admin", house.admin, "--once")
        wrong = await run("--admin", house.admin, "--once", "--key", "another")
        right = await run("--admin", house.admin, "--once", "--key", KEY)
    assert (without.exit_code, wrong.exit_code, right.exit_code) == (1, 1, 0)
    assert "--key" in without.stderr
    assert KEY not in right.stdout


async def test_where_no_gateway_answers_it_says_so() -> None:
    result = await run("--admin", "http://127.0.0.1:1", "--once")
    assert result.exit_code == 1
    assert "no gateway at http://127.0.0.1:1" in result.stderr


async def test_what_is_no_gateway_is_not_believed() -> None:
    async with gateway() as house:
        result = await run("--admin", house.origin, "--once")
    assert (result.exit_code, "answered 404" in result.stderr) == (1, True)


def test_no_line_is_longer_than_the_terminal_and_no_name_pushes_a_figure_out(said: Any) -> None:
    said["gates"][1]["pool"] = "upstream/" + "x" * 100
    for width in (80, 120, 200):
        lines = drawn(said, width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert any("50" in line or "20" in line for line in lines)
        gate = next(line for line in lines if line.startswith("up"))
        assert "…" in gate


def test_the_calls_take_what_is_left_of_the_screen(said: Any) -> None:
    for height in (30, 40, 60):
        assert len(drawn(said, height=height).splitlines()) <= height
    assert len(drawn(said, height=60).splitlines()) > len(drawn(said, height=40).splitlines())


def test_nothing_a_client_wrote_is_obeyed_by_the_terminal(said: Any) -> None:
    said["gates"][1]["pool"] = "up/\x1b]0;hacked\x07[red]name[/red]"
    text = drawn(said, width=200)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]name[/red]" in text


def test_a_hold_and_a_shut_circuit_and_draining_are_told(said: Any) -> None:
    said["gates"][1]["hold_seconds"] = 12.34
    said["circuits"] = [{"upstream": "up", "state": "shut", "reason": "money", "shut_seconds": 42.0}]
    said["draining"] = True
    text = drawn(said)
    assert "12.3 s" in text
    assert "shut: money, 42 s" in text
    assert "draining" in text


async def test_a_gateway_that_refuses_is_not_left_with_a_connection() -> None:
    async with gateway(server=Server(port=0, admin_port=0, admin_key=Secret(KEY))) as house:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            await asyncio.to_thread(_refused, house.admin)


def _refused(admin: str) -> None:
    with pytest.raises(top.NotAllowed) as told:
        next(iter(top.snapshots(admin, None)))
    context = told.value.__context__
    assert isinstance(context, urllib.error.HTTPError)
    assert context.closed


async def test_open_batches_are_listed_with_what_is_left_of_them(tmp_path: Path) -> None:
    line = {"custom_id": "one", "method": "POST", "url": CHAT, "body": ASK}
    slow = replace(QUICK, first_token_seconds=3600.0)
    async with gateway(slow, state=State(path=str(tmp_path))) as house, house.sdk() as client:
        before = await snapshot_of(house)
        assert (before["batches"], before["batches_left_out"]) == ([], 0)
        assert "in_progress" not in drawn(before)
        content = b"".join(json.dumps(line | {"custom_id": str(number)}).encode() + b"\n" for number in range(3))
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        await until(lambda: house.gateway._batches.report(1)[0][0]["running"] == 3)
        after = await snapshot_of(house)
    (told,) = after["batches"]
    assert (told["id"], told["status"], told["items"], told["left"]) == (batch.id, "in_progress", 3, 3)
    assert (told["owner"], told["model"], told["waits_for"]) == ("", ASK["model"], "")
    assert told["expires_seconds"] == pytest.approx(86_400, abs=60)
    for width in (80, 200):
        row = next(row for row in drawn(after, width=width).splitlines() if row.startswith("batch_"))
        assert "in progress" in row
        assert "0/3" in row
    many = after | {"batches_left_out": 4, "batches": [told | {"waits_for": "money"}]}
    assert "and 4 more" in drawn(many)
    assert "money" in drawn(many)


def test_figures_that_are_old_are_called_so(said: Any) -> None:
    assert "connection lost, these are 5 s old" in drawn(said, stale="connection lost, these are 5 s old")


# ── on a terminal ──


class Terminal:
    """A process on a terminal of its own, and what it wrote there."""

    def __init__(self, *arguments: str) -> None:
        self.screen = b""
        self._main, inner = pty.openpty()
        environ = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
        self._process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=inner, stdout=inner, stderr=inner, env=environ, start_new_session=True
        )
        os.close(inner)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._main, 1 << 16):
                self.screen += part
        except OSError:  # the other end is closed
            return

    def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.screen[-2000:]
            time.sleep(0.02)

    def press(self, key: bytes) -> None:
        os.write(self._main, key)

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)  # what Ctrl-C is on a terminal of one's own

    def ended(self, seconds: float = 10.0) -> int:
        return self._process.wait(seconds)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        os.close(self._main)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    running = Terminal(*arguments)
    try:
        yield running
    finally:
        running.close()


async def test_on_a_terminal_it_draws_until_q_and_leaves_the_terminal_as_it_was() -> None:
    async with gateway() as house:

        def watch(loop: asyncio.AbstractEventLoop) -> int:
            with terminal("--admin", house.admin) as screen:
                screen.until(lambda: b"0 calls" in screen.screen)
                asyncio.run_coroutine_threadsafe(load(house, 3), loop).result(10)
                screen.until(lambda: b"3 calls" in screen.screen)
                screen.press(b"x")
                screen.press(b"q")
                code = screen.ended()
            # The cursor is shown again, and what was there before.
            assert screen.screen.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")
            return code

        assert await asyncio.to_thread(watch, asyncio.get_running_loop()) == 0
    # The gateway sees that nobody looks any more with its next snapshot; its stop waits for nobody.


async def test_ctrl_c_ends_it_and_a_gateway_that_is_gone_is_waited_for() -> None:
    def watch(loop: asyncio.AbstractEventLoop, stop: Callable[[], object]) -> int:
        with terminal("--admin", admin) as screen:
            screen.until(lambda: b"0 calls" in screen.screen)
            loop.call_soon_threadsafe(stop)
            screen.until(lambda: b"s old" in screen.screen)
            screen.interrupt()
            return screen.ended()

    async with gateway() as house:
        admin, stopped = house.admin, asyncio.Event()
        watching = asyncio.ensure_future(asyncio.to_thread(watch, asyncio.get_running_loop(), stopped.set))
        await asyncio.wait({watching, asyncio.ensure_future(stopped.wait())}, return_when=asyncio.FIRST_COMPLETED)
    assert await watching == 0
