"""Ten thousand connections on which half of a request comes, and no more, are ended, and meanwhile in nobody's way."""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
from pathlib import Path

import pytest
import uvloop

from proxy.api.connections import Connection
from proxy.app import allow_descriptors
from proxy.config import Limits, Server
from tests.e2e.running import at, descriptors, serving, settings, until
from tests.e2e.scripted import scripted

CONNECTIONS = 10_000
SERVER = Server(port=0, admin_port=0, read_seconds=5.0, max_connections=CONNECTIONS + 100)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def opened_and_ended(count: int) -> None:
    async with (
        scripted() as upstream,
        serving(settings(at(upstream.base_url, limits=Limits(learn=False)), server=SERVER)) as house,
    ):
        assert (await house.ask()).status == 200
        opened, before = descriptors(), resident()
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.e2e.half_open", str(house.port), str(count), stdout=asyncio.subprocess.PIPE
        )
        assert program.stdout is not None
        assert await program.stdout.readline() == b"open\n"
        assert (await house.ask()).status == 200
        grown = resident() - before
        refused = int(await program.stdout.readline())
        assert await program.wait() == 0
        await until(lambda: descriptors() == opened, "descriptors")
        assert (await house.ask()).status == 200
        metrics = await house.metrics()
        gc.collect()
        left = sum(isinstance(thing, Connection) for thing in gc.get_objects())
    assert refused == metrics("requests_total", code="408") == count
    assert grown < count * (32 << 10), f"{grown >> 20} MiB"
    assert left < 10


@pytest.mark.timeout(120)  # they are waited for until they are late, and each is told so
def test_ten_thousand_half_open_connections_are_ended_and_leave_nothing_behind() -> None:
    allow_descriptors()
    uvloop.run(opened_and_ended(min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1000)))
