"""What the demo shows: a live table on a terminal, plain lines elsewhere; then the result, and what to do with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from textwrap import wrap

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from proxy.demo.client import MODEL, Tally
from proxy.demo.scrape import Scrape
from proxy.demo.side import Figures, Side
from proxy.simulator import Profile

STRAIGHT = "straight to provider"
THROUGH = "through Penstock"
_LINE_SECONDS = 3.0  # between two plain lines
_NONE = "-"
_COLUMN = 20  # characters
_WIDTH = 100  # characters of running text; longer lines are hard to read

Show = Callable[[Figures], None]


def introduction(console: Console, profile: Profile, calls: int) -> None:
    console.print("\nPenstock demo", style="bold")
    _say(
        console,
        f"A client sends {calls:,d} calls at the same moment, half of them streamed: asyncio.gather and the OpenAI "
        f"SDK, no semaphore. The provider, simulated on this machine, {_limits(profile)}.",
    )
    console.print()


def _limits(profile: Profile) -> str:
    limit = profile.requests_per_minute
    if limit is None:
        return "has no limit of requests"
    burst = limit if profile.requests_burst is None else profile.requests_burst
    return f"takes {limit:,.0f} requests a minute, in bursts of at most {burst:,.0f}"


@contextmanager
def watching(console: Console, before: Figures | None) -> Iterator[Show]:
    """A function that shows the figures as they are now: in place on a terminal, else as a line now and then.

    Args:
        before: the result of the first side, while the second is shown.
    """
    if console.is_interactive and console.file.isatty():
        # Drawn by `show` alone: a thread that draws would do so between two figures.
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield lambda now: live.update(_table(before or now, now if before else None, over=False), refresh=True)
        return
    name = THROUGH if before else STRAIGHT
    due, last = time.monotonic() + _LINE_SECONDS, None

    def show(now: Figures) -> None:
        nonlocal due, last
        last = now
        if time.monotonic() >= due:
            due, last = time.monotonic() + _LINE_SECONDS, None
            console.print(Text(_line(name, now)), soft_wrap=True)

    yield show
    if last is not None:
        console.print(Text(_line(name, last)), soft_wrap=True)


def _line(name: str, now: Figures) -> str:
    retries = now.sdk_retries + (now.gateway_retries or 0)
    return (
        f"  {name:<{_COLUMN}} {now.seconds:5.1f} s  {now.answered:4d} answered  {now.failed:4d} failed"
        f"  {now.in_flight:4d} in flight  {_count(now.queued):>4} queued  {now.answered_per_second:5.1f} requests/s"
        f"  {now.tokens_per_second:6,.0f} tokens/s  p95 first token {_seconds(now.first_token_p95):>6}"
        f"  {now.refused:4d} refused  {retries:4d} retries"
    )


def _table(straight: Figures, through: Figures | None, *, over: bool) -> RenderableType:
    """Both sides beside each other; `over` leaves out what has a meaning only while it goes on."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("", min_width=26)
    table.add_column(STRAIGHT, justify="right", min_width=_COLUMN)
    table.add_column(THROUGH, justify="right", min_width=_COLUMN, header_style="bold cyan")
    sides = (straight, through)

    def row(name: str, say: Callable[[Figures], RenderableType], *, last: bool = False) -> None:
        table.add_row(name, *("" if side is None else say(side) for side in sides), end_section=last)

    if not over:
        row("", lambda side: ProgressBar(side.calls, side.answered, width=_COLUMN, finished_style="bar.complete"))
    row("answered", lambda side: Text(f"{side.answered:,d} of {side.calls:,d}", _good(side.answered == side.calls)))
    if over:
        row("in the order asked", _order)
    row("failed", lambda side: Text(f"{side.failed:,d}", _bad(side.failed > 0)), last=True)
    if not over:
        row("in flight at the provider", lambda side: f"{side.in_flight:,d}")
        row("queued in the gateway", lambda side: _count(side.queued), last=True)
    row("wall time", lambda side: f"{side.seconds:.1f} s")
    row("answered requests/s", lambda side: f"{side.answered_per_second:.1f}")
    row("output tokens/s", lambda side: f"{side.tokens_per_second:,.0f}")
    row("first token, p95", lambda side: _seconds(side.first_token_p95), last=True)
    row("refused by the provider", lambda side: f"{side.refused:,d}")
    row("retries by the SDK", lambda side: f"{side.sdk_retries:,d}")
    row("retries by the gateway", lambda side: _count(side.gateway_retries))
    return Padding(table, (0, 0, 0, 2), expand=False)


def summary(console: Console, straight: Side, through: Side, results: tuple[Figures, Figures], floor: float) -> None:
    """The result of both bursts.

    Args:
        floor: seconds that the provider's limit takes for all calls, however they are sent.
    """
    console.print(_table(*results, over=True))
    console.print()
    _say(console, _conclusion(straight.tally, through.tally, floor), style="bold")
    if through.scrape is not None:
        _say(console, _account(through.scrape))
        _say(console, _agreement(through, through.scrape))
    console.print()


def _conclusion(straight: Tally, through: Tally, floor: float) -> str:
    calls = f"{straight.calls:,d} calls"
    all_of_them = "all were answered" + (", in order," if through.in_order else "")
    answered = all_of_them if through.answered == through.calls else f"{through.answered:,d} were answered"
    least = f"; the limit alone takes {floor:.1f} s" if floor > 0 else ""
    return (
        f"Of {calls} straight to the provider {straight.answered:,d} were answered{_blame(straight)}; "
        f"through Penstock {answered}{_blame(through)} in {through.seconds:.1f} s{least}."
    )


def _blame(side: Tally) -> str:
    if not side.failed:
        return ""
    return f" ({side.failed:,d} failed: {', '.join(sorted(side.errors)) or 'cut off'})"


def _account(own: Scrape) -> str:
    """Where the time went; exact, since sums are counted and not guessed from buckets."""
    calls = own.total("requests_total") or 1.0
    waited = (own.total("gate_queue_wait_seconds_sum") + own.total("backoff_seconds_sum")) / calls
    there = own.total("upstream_attempt_duration_seconds_sum") / calls
    here = own.total("overhead_seconds_sum") / calls
    return (
        f"An average call spent {waited:.1f} s waiting for its turn, {there:.1f} s at the provider "
        f"and {here * 1e3:.1f} ms in the gateway."
    )


def _agreement(side: Side, own: Scrape) -> str:
    seen = (side.tally.answered, side.tally.tokens, side.provider.provider.stats.refusals)
    counted = (
        int(own.total("requests_total", outcome="ok")),
        int(own.total("tokens_total", type="output")),
        int(own.total("rate_limited_total", source="upstream")),
    )
    if counted == seen:
        return "The gateway's /metrics count the same as client and provider: " + _counts(counted)
    return "The gateway's /metrics count " + _counts(counted) + " Client and provider count " + _counts(seen)


def _counts(counts: tuple[int, int, int]) -> str:
    answers, tokens, refusals = counts
    return f"{answers:,d} answers, {tokens:,d} output tokens, {refusals:,d} refused by the provider."


def directions(console: Console, port: int, admin_port: int | None = None) -> None:
    """How to point a client at this gateway, which stays up; or, without an admin port, at one to be started."""
    base_url = f"http://127.0.0.1:{port}/v1"
    console.print("Point a client at it", style="bold")
    if admin_port is None:
        _copy(console, "OPENAI_API_KEY=sk-... penstock serve")
    _copy(console, "from openai import AsyncOpenAI", f'client = AsyncOpenAI(base_url="{base_url}", api_key="any")')
    _copy(
        console,
        f"curl {base_url}/chat/completions \\",
        "  -H 'Content-Type: application/json' \\",
        f"""  -d '{{"model":"{MODEL}","messages":[{{"role":"user","content":"Hi"}}]}}'""",
    )
    if admin_port is None:
        _say(console, "`penstock demo --keep` stays up, to be tried out without a key.")
    else:
        _say(console, f"Metrics are at http://127.0.0.1:{admin_port}/metrics. It stays up until Ctrl-C.")


def stopped(console: Console) -> None:
    _say(console, "Stopped.")


def no_sdk(console: Console) -> None:
    _say(console, "The demo's client is the OpenAI SDK, which is not installed: pip install 'penstock[demo]'")


def _say(console: Console, text: str, *, style: str = "") -> None:
    for line in wrap(text, min(console.width, _WIDTH) - 2, break_long_words=False, break_on_hyphens=False):
        console.print(Text(f"  {line}", style), soft_wrap=True)


def _copy(console: Console, *lines: str) -> None:
    """Lines to be copied: never wrapped."""
    for line in lines:
        console.print(Text(f"    {line}", "cyan"), soft_wrap=True)
    console.print()


def _order(side: Figures) -> Text:
    if not side.answered:
        return Text(_NONE)
    return Text("yes") if side.in_order else Text("no", "red")


def _good(good: bool) -> str:
    return "green" if good else ""


def _bad(bad: bool) -> str:
    return "red" if bad else ""


def _count(count: int | None) -> str:
    return _NONE if count is None else f"{count:,d}"


def _seconds(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{seconds:.1f} s"
