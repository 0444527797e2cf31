"""Production's event loop, and two watchmen: nothing blocks it, and nothing goes wrong unseen."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop
from blockbuster import BlockBuster

from proxy.config import Limits
from tests.e2e.running import House, at, serving, settings
from tests.e2e.scripted import Scripted, scripted

HERE = Path(__file__).parent
TEST_SECONDS = 40.0


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that hangs fails. The alarm signal of pytest-timeout does not reach a loop that sleeps in libuv: what
    hangs outside the test's own body ends the run, with every stack."""
    for item in items:
        if isinstance(item, pytest.Function) and item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.timeout(2 * TEST_SECONDS, method="thread"))
            item.obj = _bounded(item.obj)


def _bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def bounded(*args: object, **named: object) -> None:
        async with asyncio.timeout(TEST_SECONDS):
            await test(*args, **named)

    return bounded


@pytest.fixture(autouse=True)
def _nothing_blocks() -> Iterator[None]:
    """A call from our code that would block the event loop raises; where that is caught it is logged, see below."""
    watch = BlockBuster("proxy")
    for function in watch.functions.values():
        function.can_block_in(
            "proxy/telemetry/telemetry.py", {"_version"}
        )  # reads the package's metadata, at the start
    watch.activate()
    yield
    watch.deactivate()


@pytest.fixture(autouse=True)
def _nothing_goes_wrong_unseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails a test after which an error stands in the log. A test that means it looks at it, and clears it."""
    yield
    errors = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not errors, [record.getMessage() + str(record.exc_info or "") for record in errors]


@pytest.fixture
async def upstream() -> AsyncIterator[Scripted]:
    async with scripted() as running:
        yield running


@pytest.fixture
async def house(upstream: Scripted) -> AsyncIterator[House]:
    """A gateway that sends every model to `upstream`, and takes its limits as they are: none."""
    async with serving(settings(at(upstream.base_url, limits=Limits(learn=False)))) as running:
        yield running
