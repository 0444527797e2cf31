"""Headless Chromium, driven over the DevTools protocol: what a person sees and does, and what went wrong meanwhile."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

START_SECONDS = 30.0
WAIT_SECONDS = 15.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-proxy-server",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)


def executable() -> str:
    """Chromium; without it the test is skipped, and fails in CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        assert os.environ.get("CI") != "true", "chromium is missing: apt-get install chromium"
        pytest.skip("chromium is not installed")
    return found


@contextmanager
def chromium() -> Iterator[str]:
    """A running browser; its DevTools address."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [executable(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": profile, "XDG_CONFIG_HOME": profile, "XDG_CACHE_HOME": profile},
        )
        try:
            yield _address(process, Path(profile) / "DevToolsActivePort")
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], file: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"chromium ended with {process.returncode}"
        with contextlib.suppress(OSError, ValueError):  # not written yet, or not whole
            port, path = file.read_text().split()
            return f"ws://127.0.0.1:{port}{path}"
        time.sleep(0.02)
    raise AssertionError(f"chromium did not start within {START_SECONDS} s")


class Page:
    """One tab. `problems` are errors on its console, exceptions, and what its policy blocked."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, expected: tuple[str, ...]) -> None:
        self.problems: list[str] = []
        self.expected = expected  # texts of problems that a test means to make
        self._socket = socket
        self._session: str | None = None
        self._target = ""
        self._asked: dict[int, asyncio.Future[Any]] = {}

    async def ask(self, method: str, **params: Any) -> Any:
        number = len(self._asked) + 1
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        said = {"id": number, "method": method, "params": params}
        await self._socket.send_json(said | ({"sessionId": self._session} if self._session else {}))
        async with asyncio.timeout(WAIT_SECONDS):
            return await answer

    async def listen(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                answer = self._asked[said["id"]]
                if answer.done():
                    continue
                if "error" in said:
                    answer.set_exception(RuntimeError(said["error"]["message"]))
                else:
                    answer.set_result(said["result"])
            elif said["method"] == "Runtime.exceptionThrown":
                details = said["params"]["exceptionDetails"]
                self._note(details.get("exception", {}).get("description", details["text"]))
            elif said["method"] == "Runtime.consoleAPICalled" and said["params"]["type"] in (
                "error",
                "warning",
                "assert",
            ):
                self._note(" ".join(str(each.get("value", each.get("description"))) for each in said["params"]["args"]))
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["level"] in ("error", "warning"):
                entry = said["params"]["entry"]
                self._note(f"{entry['text']} {entry.get('url', '')}")

    def _note(self, problem: str) -> None:
        if not any(text in problem for text in self.expected):
            self.problems.append(problem)

    async def open(self) -> None:
        self._target = (await self.ask("Target.createTarget", url="about:blank", newWindow=False))["targetId"]
        self._session = (await self.ask("Target.attachToTarget", targetId=self._target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.ask(f"{domain}.enable")
        await self.resize(1280)

    async def close(self) -> None:
        self._session = None
        await self.ask("Target.closeTarget", targetId=self._target)

    async def resize(self, width: int, height: int = 1000, *, scale: float = 1) -> None:
        await self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    async def prefer(self, **features: str) -> None:
        """Media features, `_` for `-`: `prefers_color_scheme="dark"`."""
        said = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        await self.ask("Emulation.setEmulatedMedia", features=said)

    async def go(self, url: str) -> None:
        await self.ask("Page.navigate", url=url)

    async def run(self, script: str) -> Any:
        """The value of an expression; a promise's when it is there."""
        said = await self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]["exception"].get("description")
        return said["result"].get("value")

    async def until(self, script: str, *, seconds: float = WAIT_SECONDS) -> Any:
        """The value of an expression once it is true."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(AssertionError, RuntimeError):  # of a page that is not there yet
                if value := await self.run(script):
                    return value
            assert time.monotonic() < deadline, f"not within {seconds} s: {script}; {self.problems}"
            await asyncio.sleep(0.05)

    async def text(self, selector: str) -> str:
        return str(await self.run(f"document.querySelector({json.dumps(selector)}).textContent"))

    async def press(self, key: str, *, shift: bool = False) -> None:
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowUp": 38, "ArrowDown": 40, " ": 32}
        said = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        typed = {"Enter": "\r", " ": " "}.get(key)
        await self.ask("Input.dispatchKeyEvent", type="keyDown", **said, **({"text": typed} if typed else {}))
        await self.ask("Input.dispatchKeyEvent", type="keyUp", **said)

    async def type(self, text: str) -> None:
        await self.ask("Input.insertText", text=text)

    async def screenshot(self) -> bytes:
        return base64.b64decode((await self.ask("Page.captureScreenshot", format="png"))["data"])


@asynccontextmanager
async def opened(address: str, url: str, *, expected: tuple[str, ...] = ()) -> AsyncIterator[Page]:
    """A tab at `url`, for the length of the block; at its end nothing may have gone wrong but what is `expected`."""
    async with aiohttp.ClientSession() as http, http.ws_connect(address, max_msg_size=0) as socket:
        page = Page(socket, expected)
        listening = asyncio.ensure_future(page.listen())
        try:
            await page.open()
            await page.go(url)
            yield page
            assert page.problems == []
            await page.close()
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening
