"""Production's event loop, watched for what would block it; and one browser for all tests that need one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop
from blockbuster import BlockBuster

from tests.ui.browser import chromium


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def _nothing_blocks() -> Iterator[None]:
    watch = BlockBuster("proxy")
    for function in watch.functions.values():
        function.can_block_in(
            "proxy/telemetry/telemetry.py", {"_version"}
        )  # reads the package's metadata, at the start
    watch.activate()
    yield
    watch.deactivate()


@pytest.fixture(scope="session")
def browser() -> Iterator[str]:
    """The DevTools address of a running Chromium."""
    with chromium() as address:
        yield address
