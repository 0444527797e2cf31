"""Killed again and again while it runs batches: what was told stays true, and no call is made twice without need.

    batches -> gateway (killed with SIGKILL, at random or at a named point, and started again) -> provider

What is checked, at the end and over all of it:

- lost: lines that the API had given out as results, and that are not in the final files as they were;
- duplicated: items that are in the final files more than once;
- repeated: calls for an item beyond its first. After each kill the database tells which answers had been kept; all
  other calls that the provider has seen were in flight, and only these may be made again;
- counts: completed + failed of each batch = its lines = the lines of its files.
"""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.batches.gateway import OFTEN, POINTS, Nursery, Running
from proxy.batches.sqlite import FILE
from proxy.simulator import Simulator, profiles
from proxy.simulator import serving as simulating

PROVIDER = replace(profiles.INSTANT, first_token_seconds=0.02, first_token_sigma=0.5, output_tokens=4)
LINES = 2_000  # of one batch
FEW_LINES = 40  # of one that is handed in to reach a named point: all of them are on its way
OPEN = 2  # batches at once
CALLS = (1, 110)  # that a life sees, drawn for each, until it is killed
LIFE_SECONDS = 20.0  # a life in which nothing is called is over then
PASSES = 4  # kills at each named point


@dataclass(slots=True)
class Tally:
    told: dict[str, bytes] = field(default_factory=dict)  # batch/custom_id -> its line, as the API gave it out
    batches: dict[str, int] = field(default_factory=dict)  # acknowledged -> its lines
    kills: Counter[str] = field(default_factory=Counter)  # by point; "" at random
    in_flight: int = 0  # at all the kills


class Story:
    """
    Args:
        lines: of all batches together.
        kills: at random.
    """

    def __init__(self, directory: Path, simulator: Simulator, lines: int, kills: int, seed: int) -> None:
        self._directory, self._simulator = directory, simulator
        self._nursery = Nursery(directory, simulator.base_url)
        self._random = random.Random(seed)
        self._wanted, self._kills = lines // LINES, kills
        self._open: set[str] = set()
        self.tally = Tally()
        self.final: dict[str, tuple[dict[str, Any], list[bytes]]] = {}

    async def run(self) -> None:
        points = [point for point in POINTS for _ in range(PASSES)]
        self._random.shuffle(points)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:
            while points or (not self._is_over and self.tally.kills[""] < self._kills):
                wants_point = points and (self._random.random() < 0.25 or self._is_over)
                await self._life(http, points.pop() if wants_point else "")
            await self._last_life(http)

    @property
    def _is_over(self) -> bool:
        return self._handed_in >= self._wanted and not self._open

    @property
    def _handed_in(self) -> int:
        return sum(lines == LINES for lines in self.tally.batches.values())

    async def _life(self, http: aiohttp.ClientSession, point: str) -> None:
        """From a start to a kill."""
        passes = self._random.randint(1, 3) if point in OFTEN else 1
        gateway = await asyncio.to_thread(self._nursery.begin, point, passes)
        if gateway is None:
            self._killed(point)
            return
        until = len(self._simulator.seen) + self._random.randint(*CALLS)
        deadline = time.monotonic() + LIFE_SECONDS
        asking = asyncio.create_task(self._ask(http, gateway, extra=bool(point)))
        while gateway.is_up and time.monotonic() < deadline:
            if not point and len(self._simulator.seen) >= until:
                break
            if not point and asking.done() and self._is_over:
                break
            await asyncio.sleep(0.002)
        died_by_itself = not gateway.is_up
        await asyncio.to_thread(gateway.kill)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        self._killed(point if died_by_itself else "")

    def _killed(self, point: str) -> None:
        """What the provider has seen and the database has not kept was in flight."""
        self.tally.kills[point] += 1
        seen = {call.headers["idempotency-key"] for call in self._simulator.seen}
        self.tally.in_flight += len(seen) - self._kept()

    def _kept(self) -> int:
        path = self._directory / FILE
        if not path.exists():
            return 0
        with sqlite3.connect(path) as db:
            tables = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'items'").fetchone()[0]
            kept = db.execute("SELECT count(*) FROM items WHERE state >= 2").fetchone()[0] if tables else 0
        db.close()
        return int(kept)

    async def _ask(self, http: aiohttp.ClientSession, gateway: Running, *, extra: bool) -> None:
        """What a client does: hands in batches until there are enough, and reads what has come of them."""
        base = f"http://127.0.0.1:{gateway.port}/v1"
        try:
            if extra:
                await self._submit(http, base, FEW_LINES)
            while True:
                while len(self._open) < OPEN and self._handed_in < self._wanted:
                    await self._submit(http, base, LINES)
                for batch in list(self._open):
                    await self._look(http, base, batch)
                if not self._open:
                    return
                await asyncio.sleep(0.05)
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            return  # it was killed; the next life goes on

    async def _submit(self, http: aiohttp.ClientSession, base: str, lines: int) -> None:
        batch_id = await submitted(http, base, lines)
        self.tally.batches[batch_id] = lines
        self._open.add(batch_id)

    async def _look(self, http: aiohttp.ClientSession, base: str, batch_id: str) -> None:
        batch = await told(http.get(f"{base}/batches/{batch_id}"))
        if batch["output_file_id"] is not None:
            async with http.get(f"{base}/files/{batch['output_file_id']}/content") as answer:
                content = await answer.read()
            self.tally.told |= {f"{batch_id}/{json.loads(line)['custom_id']}": line for line in content.splitlines()}
        if batch["status"] == "completed":
            self._open.discard(batch_id)

    async def _last_life(self, http: aiohttp.ClientSession) -> None:
        gateway = await asyncio.to_thread(self._nursery.begin)
        assert gateway is not None
        await self._ask(http, gateway, extra=False)
        base = f"http://127.0.0.1:{gateway.port}/v1"
        self.final = {batch: await self._final(http, base, batch) for batch in self.tally.batches}
        await asyncio.to_thread(gateway.kill)

    async def _final(self, http: aiohttp.ClientSession, base: str, batch_id: str) -> tuple[dict[str, Any], list[bytes]]:
        batch = await told(http.get(f"{base}/batches/{batch_id}"))
        lines: list[bytes] = []
        for file_id in filter(None, (batch["output_file_id"], batch["error_file_id"])):
            async with http.get(f"{base}/files/{file_id}/content") as answer:
                lines += (await answer.read()).splitlines()
        return batch, lines


async def run(directory: Path, *, lines: int, kills: int, seed: int) -> bool:
    """Tell the story and print what became of it; whether nothing was lost, doubled or miscounted."""
    async with simulating(PROVIDER, remember=10 * lines) as simulator:
        story = Story(directory, simulator, lines, kills, seed)
        began = time.monotonic()
        await story.run()
        seconds = time.monotonic() - began
    tally, final = story.tally, story.final
    ids = [f"{batch}/{json.loads(line)['custom_id']}" for batch, (_, found) in final.items() for line in found]
    by_id = dict(zip(ids, (line for _, found in final.values() for line in found), strict=True))
    lost = [key for key, line in tally.told.items() if by_id.get(key) != line]
    doubled = len(ids) - len(set(ids))
    calls = Counter(call.headers["idempotency-key"] for call in simulator.seen)
    repeated = sum(calls.values()) - len(calls)
    counted = all(
        batch["request_counts"] == {"total": tally.batches[batch_id], "completed": len(found), "failed": 0}
        and len(found) == tally.batches[batch_id]
        for batch_id, (batch, found) in final.items()
    )
    at_points = {point: tally.kills[point] for point in POINTS}
    missed = [point for point, times in at_points.items() if not times]
    print(f"items                      {len(ids):>8,}   in {len(final)} batches, {seconds:.0f} s")
    print(f"kills at random            {tally.kills['']:>8,}")
    print(f"kills at named points      {sum(at_points.values()):>8,}   at {len(POINTS) - len(missed)} of {len(POINTS)}")
    print(f"results given out early    {len(tally.told):>8,}")
    print(f"lost                       {len(lost):>8,}")
    print(f"duplicated                 {doubled:>8,}")
    print(f"calls in flight at kills   {tally.in_flight:>8,}")
    print(f"repeated calls             {repeated:>8,}")
    print(f"counts are lines           {'yes' if counted else 'no':>8}")
    if missed:
        print(f"points never reached: {', '.join(missed)}")
    return not lost and not doubled and repeated <= tally.in_flight and counted and not missed


async def submitted(http: aiohttp.ClientSession, base: str, lines: int) -> str:
    """The id of a new batch of so many lines."""
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", await asyncio.to_thread(_input, lines), filename="in.jsonl")
    file = await told(http.post(f"{base}/files", data=form))
    said = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return str((await told(http.post(f"{base}/batches", json=said)))["id"])


def _input(lines: int) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    return b"".join(
        json.dumps({"custom_id": f"c-{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()
        + b"\n"
        for n in range(lines)
    )


async def told(asking: Any) -> Any:
    """The JSON of a good answer."""
    async with asking as answer:
        said = await answer.json()
        assert answer.status == 200, said
        return said
