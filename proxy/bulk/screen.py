"""How far a run is: a bar on a terminal, a line now and then elsewhere; and batches as a table."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 5.0  # between two lines where there is no terminal
RATE_SECONDS = 15.0  # a rate is that of the last so many seconds
BAR_WIDTH = 24  # columns
ID_WIDTH = 38  # columns

Batch = Mapping[str, Any]


class Progress:
    """Shown while its block lasts.

    Args:
        console: of stderr; results may go to stdout.
        quiet: show nothing.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self._live: Live | None = None
        self._seen: deque[tuple[float, int, int]] = deque()  # time, answered or failed, tokens
        self._told_at = -LINE_SECONDS
        self._told = ""

    def __enter__(self) -> Progress:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, batches: Sequence[Batch]) -> None:
        """The batches as they are now."""
        if self._quiet:
            return
        counts = [batch.get("request_counts") or {} for batch in batches]
        total = sum(count.get("total", 0) for count in counts)
        failed = sum(count.get("failed", 0) for count in counts)
        done = failed + sum(count.get("completed", 0) for count in counts)
        now = time.monotonic()
        self._seen.append((now, done, sum(_tokens(batch) for batch in batches)))
        while len(self._seen) > 2 and self._seen[1][0] < now - RATE_SECONDS:
            self._seen.popleft()
        told = self._figures(batches, total, done, failed)
        if self._live is not None:
            row = Table.grid(padding=(0, 1))
            row.add_row(ProgressBar(total=max(1, total), completed=done, width=BAR_WIDTH), Text(told))
            self._live.update(row, refresh=True)
        elif now - self._told_at >= LINE_SECONDS and told != self._told:
            self._told_at, self._told = now, told
            self._console.print(told, highlight=False)

    def _figures(self, batches: Sequence[Batch], total: int, done: int, failed: int) -> str:
        (began, done_then, tokens_then), (now, _, tokens) = self._seen[0], self._seen[-1]
        seconds = max(1e-6, now - began)
        rate = (done - done_then) / seconds
        parts = [f"{done:,} of {total:,}" if total else " ".join(sorted({str(batch["status"]) for batch in batches}))]
        if failed:
            parts.append(f"{failed:,} failed")
        if rate:
            parts.append(f"{rate:,.1f}/s")
        if tokens > tokens_then:
            parts.append(f"{(tokens - tokens_then) / seconds:,.0f} tokens/s")
        costs = [cost for batch in batches if (cost := _ours(batch).get("cost_usd")) is not None]
        if costs:
            parts.append(f"${sum(costs):,.4f}")
        if rate and done < total:
            parts.append(f"{_span((total - done) / rate)} left")
        parts += [f"paused: {why}" for batch in batches if (why := _pause(batch))]
        return " · ".join(parts)


def table(batches: Iterable[Batch]) -> Table:
    """Batches, a row each."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("batch", no_wrap=True, min_width=ID_WIDTH)  # to be copied whole
    for heading in ("state", "endpoint", "made"):
        shown.add_column(heading)
    for heading in ("lines", "done", "failed", "tokens"):
        shown.add_column(heading, justify="right")
    for batch in batches:
        counts = batch.get("request_counts") or {}
        figures = (counts.get("total", 0), counts.get("completed", 0), counts.get("failed", 0), _tokens(batch))
        made = datetime.fromtimestamp(batch["created_at"]).strftime("%Y-%m-%d %H:%M:%S")
        shown.add_row(batch["id"], _state(batch), batch["endpoint"], made, *(f"{figure:,}" for figure in figures))
    return shown


def _state(batch: Batch) -> str:
    why = _pause(batch)
    return f"{batch['status']} (paused: {why})" if why else str(batch["status"])


def _ours(batch: Batch) -> Mapping[str, Any]:
    """What the gateway says of a batch beside OpenAI's fields."""
    said = batch.get("penstock")
    return said if isinstance(said, Mapping) else {}


def _pause(batch: Batch) -> str:
    """Why it does not go on; "" if it does."""
    said = _ours(batch).get("paused")
    return str(said.get("reason", "")) if isinstance(said, Mapping) else ""


def _tokens(batch: Batch) -> int:
    return int((batch.get("usage") or {}).get("total_tokens") or 0)


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
