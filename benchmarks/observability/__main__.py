"""`python -m benchmarks.observability`: what observability costs, in microseconds of CPU per request.

Two gateways stand side by side, one with everything on (numbers, keys and cost, log to /dev/null, spans of 1 % of the
calls to a collector), one with everything off. They are loaded in turns, in many short rounds of as many calls, and the
CPU time that each process used is read from its threads' schedstat, in nanoseconds. What is told is the median over the
rounds; the difference is that of neighbouring rounds, so that what else runs on the machine meets both alike. Its
interval is that of the median, at 95 %, by the ranks of the differences.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from urllib.request import urlopen

from benchmarks.observability.gateway import KEY
from benchmarks.observability.provider import CHUNKS

TARGET = 25.0  # microseconds
BOUND_SECONDS = 80.0
CONNECTIONS = 32


@dataclass
class Kind:
    name: str
    body: bytes
    end: bytes
    calls: int  # of a round

    @property
    def request(self) -> bytes:
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer %s\r\nuser-agent: OpenAI/Python\r\nx-stainless-lang: python\r\n"
            b"accept: application/json\r\ncontent-length: %d\r\n\r\n%s" % (KEY.encode(), len(self.body), self.body)
        )


KINDS = (
    Kind("plain call", b'{"model":"m","messages":[{"role":"user","content":"hello there"}]}', b"}}", 400),
    Kind(
        f"stream of {CHUNKS} events",
        b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hello there"}]}',
        b"0\r\n\r\n",
        64,
    ),
)


@dataclass
class Gateway:
    mode: str
    port: int
    admin_port: int
    process: subprocess.Popen[bytes]
    spent: dict[str, list[float]] = field(default_factory=dict)  # microseconds per call of each round, by kind

    def cpu(self) -> float:
        """Seconds that all its threads have used; none of them ends while it runs."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def started(stack: ExitStack, module: str, *arguments: str | int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", f"benchmarks.observability.{module}", *map(str, arguments)])
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return process


async def load(port: int, kind: Kind, calls: int) -> None:
    """Send so many calls over `CONNECTIONS` connections, each its next when the last is answered."""
    request = kind.request

    async def ask(times: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(times):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readuntil(kind.end)
        writer.close()
        await writer.wait_closed()

    share, rest = divmod(calls, CONNECTIONS)
    await asyncio.gather(*(ask(share + (index < rest)) for index in range(CONNECTIONS)))


async def listening(port: int) -> None:
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise TimeoutError(f"nobody listens on {port}")


async def measure(gateways: list[Gateway], rounds: int, until: float) -> int:
    """Load them in turns; returns how many rounds there was time for."""
    for gateway in gateways:
        await listening(gateway.port)
        for kind in KINDS:
            await load(gateway.port, kind, CONNECTIONS * 10)
    for done in range(rounds):
        if time.monotonic() > until:
            return done
        for kind in KINDS:
            for gateway in gateways if done % 2 else gateways[::-1]:
                before = gateway.cpu()
                await load(gateway.port, kind, kind.calls)
                gateway.spent.setdefault(kind.name, []).append((gateway.cpu() - before) / kind.calls * 1e6)
    return rounds


def scrape(gateway: Gateway, times: int = 20) -> float:
    """Milliseconds of CPU that one scrape takes."""
    before = gateway.cpu()
    for _ in range(times):
        with urlopen(f"http://127.0.0.1:{gateway.admin_port}/metrics") as answer:
            answer.read()
    return (gateway.cpu() - before) / times * 1e3


def interval(found: list[float]) -> tuple[float, float]:
    """Within what the median lies, at 95 %: the ranks n/2 -+ 0.98 sqrt(n), by the normal approximation."""
    ordered, aside = sorted(found), 0.98 * math.sqrt(len(found))
    low = max(0, math.floor(len(found) / 2 - aside))
    return ordered[low], ordered[-1 - low]


def table(on: Gateway, off: Gateway) -> bool:
    """Print what was found; returns whether a plain call is within the target."""
    print(f"{'':26}{'off':>9}{'on':>9}{'difference':>13}   microseconds of CPU per call, medians")
    differences = {}
    for kind in KINDS:
        pairs = zip(on.spent[kind.name], off.spent[kind.name], strict=True)
        found = [with_all - without for with_all, without in pairs]
        differences[kind.name] = median(found)
        low, high = interval(found)
        print(
            f"{kind.name:26}{median(off.spent[kind.name]):9.0f}{median(on.spent[kind.name]):9.0f}"
            f"{differences[kind.name]:13.1f}   ({low:.1f} to {high:.1f})"
        )
    met = differences[KINDS[0].name] <= TARGET
    print(f"target: a plain call at most {TARGET:.0f}: {'met' if met else 'missed'}")
    print(f"a scrape of the loaded gateway: {scrape(on):.0f} ms of CPU, off the event loop")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.observability", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = max(2, parser.parse_args().rounds)
    until = time.monotonic() + BOUND_SECONDS
    with ExitStack() as stack:
        provider_port = free_port()
        started(stack, "provider", provider_port)
        gateways = []
        for mode in ("on", "off"):
            port, admin_port = free_port(), free_port()
            process = started(stack, "gateway", mode, port, admin_port, provider_port)
            gateways.append(Gateway(mode, port, admin_port, process))
        done = asyncio.run(measure(gateways, rounds, until))
        print(f"{done} rounds of {KINDS[0].calls} plain calls and {KINDS[1].calls} streams at each gateway")
        met = table(*gateways)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
