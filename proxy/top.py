"""`penstock top`: the figures of the live page in a terminal, read from the admin port of a running gateway.

    a thread: /ui/live -> the newest snapshot        this thread: keys -> draw, when there is something new

On a terminal it draws in place, once a second, until `q` or Ctrl-C; elsewhere, or when asked to, it prints one
snapshot.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import select
import sys
import termios
import threading
import time
import tty
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

SILENCE_SECONDS = 10.0  # without a line, after which the connection is dead; a snapshot comes every second
STALE_SECONDS = 3.0
LOOK_SECONDS = 0.2  # between two looks at what there is to draw; a key is seen at once
KEYS_READ = 64  # bytes at a time
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before the next try to connect
CALLS_PRINTED = 20
HEAD_LINES = 2  # of a table
WIDE = 112  # columns; with fewer some figures are left out
PRINTED = 120  # columns of what is printed into a file or a pipe
_NONE = "–"  # noqa: RUF001 - a dash as wide as a figure
_STEPS = "▁▂▃▄▅▆▇█"
_SPARKS = 30  # characters that stand for five minutes
_FALL = 24  # characters of a call's phases
_CLASSES = ("interactive", "default", "batch")
_COLOUR = itemgetter(1)
_PHASES = {
    "queue": ("─", "yellow"),
    "backoff": ("─", "magenta"),
    "attempt": ("█", "bright_black"),
    "first_token": ("█", "cyan"),
    "stream": ("█", "blue"),
}

Snapshot = Mapping[str, Any]


class NotAllowed(Exception):
    """The gateway asks for its admin key."""


class Unreachable(Exception):
    """There is no gateway, or none that answers so; the message says what was tried."""


def snapshots(admin: str, key: str | None) -> Iterator[Snapshot]:
    """What the gateway tells, once a second, until it stops or the reader does.

    Raises:
        NotAllowed: it asks for another key.
        Unreachable: nobody answers at `admin`, or no longer.
    """
    url = f"{admin.rstrip('/')}/ui/live"
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})  # noqa: S310 - the operator's own address
        with urllib.request.urlopen(request, timeout=SILENCE_SECONDS) as answer:  # noqa: S310 - as above
            event = b""
            for line in answer:
                if line.startswith(b"event:"):
                    event = line[6:].strip()
                elif line.startswith(b"data:") and not event:
                    yield json.loads(line[5:])
                elif not line.strip():
                    event = b""
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        if error.code == 401:
            raise NotAllowed from None
        raise Unreachable(f"{url} answered {error.code}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(f"no gateway at {url} ({error}); is it running, and is --admin right?") from None


def run(
    admin: str, key: str | None, *, once: bool = False, as_json: bool = False, console: Console | None = None
) -> None:
    """Show the figures: in place on a terminal, until `q` or Ctrl-C; else one snapshot.

    Args:
        admin: address of the gateway's admin port.
        once: one snapshot, on a terminal as well.
        as_json: one snapshot, as it was told.

    Raises:
        NotAllowed, Unreachable: before the first snapshot; later a gateway that is gone is waited for.
    """
    console = console or Console(highlight=False)
    if as_json or once or not console.is_terminal:
        said = _first(admin, key)
        if as_json:
            console.print(json.dumps(said), soft_wrap=True, markup=False, emoji=False)
        else:
            console.width = console.width if console.is_terminal else PRINTED
            console.print(screen(said, console, calls=CALLS_PRINTED))
        return
    _first(admin, key)
    with _Follower(admin, key) as follower, _keys() as pressed:
        _draw_until_quit(console, follower, pressed)


def _first(admin: str, key: str | None) -> Snapshot:
    for said in snapshots(admin, key):
        return said
    raise Unreachable(f"the gateway at {admin} is stopping")


class _Follower:
    """A thread that reads the feed, and keeps the newest snapshot only."""

    def __init__(self, admin: str, key: str | None) -> None:
        self._admin, self._key = admin, key
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="penstock top", daemon=True)
        self.newest: tuple[Snapshot, float] | None = None  # and when it came
        self.problem = ""

    def __enter__(self) -> _Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()  # the thread sees it with the next snapshot; nobody waits for it

    def _follow(self) -> None:
        failures = 0
        while not self._ended.is_set():
            try:
                for said in snapshots(self._admin, self._key):
                    self.newest, self.problem, failures = (said, time.monotonic()), "", 0
                    if self._ended.is_set():
                        return
                self.problem = "the gateway stopped"
            except NotAllowed:
                self.problem = "the gateway asks for another key"
            except Unreachable:
                self.problem = "connection lost"
            self._ended.wait(WAITS[min(failures, len(WAITS) - 1)])
            failures += 1


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[], bytes]]:
    """A function that waits a moment for keys and returns what they wrote. The terminal is as before afterwards."""
    if not sys.stdin.isatty():
        never = threading.Event()
        yield lambda: b"q" if never.wait(LOOK_SECONDS) else b""
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)

    def pressed() -> bytes:
        ready, _, _ = select.select([descriptor], [], [], LOOK_SECONDS)
        return os.read(descriptor, KEYS_READ) if ready else b""  # not sys.stdin, which keeps what `select` cannot see

    try:
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _draw_until_quit(console: Console, follower: _Follower, pressed: Callable[[], bytes]) -> None:
    drawn: tuple[float, str] | None = None
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while b"q" not in pressed().lower():
            if follower.newest is None:
                continue
            said, came = follower.newest
            age = time.monotonic() - came
            stale = ""
            if follower.problem or age > STALE_SECONDS:
                stale = f"{follower.problem or 'no figures'}, these are {age:.0f} s old"
            if (came, stale) != drawn:
                drawn = came, stale
                live.update(screen(said, console, height=console.height, stale=stale), refresh=True)


# ── what is drawn ──


def screen(
    said: Snapshot, console: Console, *, calls: int = 50, height: int | None = None, stale: str = ""
) -> RenderableType:
    """One snapshot; the calls take what the rest leaves of `height` lines."""
    wide = console.width >= WIDE
    parts: list[RenderableType] = [_head(said, stale), _vitals(said, wide), _gates(said, wide), _upstreams(said, wide)]
    if said["errors"]:
        parts.append(_errors(said))
    if said["batches"]:
        parts.append(_batches(said, wide))
    above = Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))
    if height is not None:
        calls = min(calls, height - len(console.render_lines(above, pad=False)) - HEAD_LINES)
    return Group(above, _calls(said["calls"][:calls], wide)) if calls > 0 else above


def _head(said: Snapshot, stale: str) -> Text:
    totals = said["totals"]
    tokens = totals["input_tokens"] + totals["output_tokens"]
    told = f"{_count(totals['calls'])} calls, {_large(tokens)} tokens in {_long(said['uptime_seconds'])}"
    head = Text("Penstock ", "bold") + Text(f"{_harmless(said['version'])}  {told}  ", "dim")
    if stale:
        head.append(stale, "bold yellow")
    elif said["draining"]:
        head.append("draining: takes no new calls", "bold yellow")
    return head


def _vitals(said: Snapshot, wide: bool) -> Table:
    rates, minute, history, flight = said["rates"], said["minute"], said["history"], said["in_flight"]
    table = Table.grid(padding=(0, 2), expand=not wide)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(ratio=1)
    table.add_column(no_wrap=True)
    tokens = [one + other for one, other in zip(history["input_tokens"], history["output_tokens"], strict=True)]
    sparks = _SPARKS if wide else _SPARKS // 2
    calls = _sparks(history["calls"], history["seconds"], sparks)
    table.add_row("requests", f"{rates['calls']:,.1f} /s", f"{rates['failed']:,.1f} /s failed", calls)
    told = f"{_rate(rates['input_tokens'])} in, {_rate(rates['output_tokens'])} out"
    every = _rate(rates["input_tokens"] + rates["output_tokens"])
    table.add_row("tokens", f"{every} /s", told, _sparks(tokens, history["seconds"], sparks))
    for name, title in (("first_token", "first token p95"), ("duration", "duration p95")):
        p50, p95, p99 = minute[name]
        past = _sparks([each[1] or 0.0 for each in history[name]], history["span_seconds"], sparks)
        table.add_row(title, _seconds(p95), f"p50 {_seconds(p50)}, p99 {_seconds(p99)}", past)
    doing = {"queued": "not sent", "backoff": "pausing", "waiting": "sent", "streaming": "answering"}
    phases = ", ".join(f"{_count(flight[phase])} {word}" for phase, word in doing.items() if flight[phase])
    table.add_row("in flight", _count(flight["calls"]), _name(phases), "")
    waiting = said["queue"]["waiting"]
    who = ", ".join(f"{_count(waiting[name])} {name}" for name in _CLASSES if waiting.get(name)) or "nobody"
    limit = f"{who}, of at most {_count(said['queue']['limit'])}"
    table.add_row("waiting", _count(sum(waiting.values())), _name(limit), "")
    return table


def _gates(said: Snapshot, wide: bool) -> Table:
    """Each gate with its places and who waits; each of its limits in a line."""
    waiting = _CLASSES if wide else ("waiting",)
    table = _table(
        "gate", "limit", *(("source",) if wide else ()), numbers=("per minute", "left now", "in use", *waiting, "hold")
    )
    for gate in said["gates"]:
        places = _count(gate["in_use"]) + ("" if gate["concurrency"] is None else f"/{gate['concurrency']}")
        counts = [gate["waiting"].get(name, 0) for name in _CLASSES]
        who = [_few(count) for count in (counts if wide else [sum(counts)])]
        hold = gate["hold_seconds"]
        own: tuple[str | Text, ...] = (
            places,
            *who,
            Text(f"{hold:.1f} s", "bold yellow") if hold > 0 else Text(_NONE, "dim"),
        )
        name = _name(gate["pool"])
        if not gate["limits"]:
            cold = gate["cold_calls"] is not None
            at_once = f"{math.floor(gate['cold_calls'])} at once" if cold else _NONE
            source = ("cold start" if cold else _NONE,) if wide else ()
            table.add_row(name, _name(at_once), *source, _NONE, _NONE, *own)
        for limit in gate["limits"]:
            left = _large(limit["level"]) + ("" if limit["burst"] is None else f"/{_large(limit['burst'])}")
            source = (limit["source"],) if wide else ()
            table.add_row(name, _name(limit["limit"]), *source, _large(limit["per_minute"]), left, *own)
            name, own = Text(), ("",) * len(own)
    return table


def _upstreams(said: Snapshot, wide: bool) -> Table:
    circuits = {each["upstream"]: each for each in said["circuits"]}
    numbers = ("in flight", "attempts/s", "ok", "refused", "errors", *(("rejected",) if wide else ()))
    table = _table("upstream", "circuit", numbers=numbers)
    for name, told in said["upstreams"].items():
        circuit = circuits.get(name, {"state": "closed", "reason": "", "shut_seconds": 0.0})
        state = circuit["state"]
        if state == "shut":
            state = f"shut: {circuit['reason']}, {_long(circuit['shut_seconds'])}"
        ok = f"{100 * told['ok'] / told['attempts']:.1f} %" if told["attempts"] else _NONE
        table.add_row(
            _name(name),
            Text(_harmless(state), "" if state == "closed" else "bold yellow"),
            _count(told["in_flight"]),
            f"{told['per_second']:.1f}",
            ok,
            _few(told["throttled"] + told["overloaded"]),
            _few(told["failed"] + told["truncated"]),
            *((_few(told["rejected"]),) if wide else ()),
        )
    return table


def _errors(said: Snapshot) -> Table:
    table = _table("error", "whose", numbers=("last minute", "five minutes"))
    for error in said["errors"]:
        kind = error["type"].replace("_", " ")
        table.add_row(kind, error["source"], _few(error["minute"]), _count(error["five_minutes"]))
    return table


def _batches(said: Snapshot, wide: bool) -> Table:
    """Those that have not ended, oldest first."""
    numbers = ("items ended", "under way", *(("age", "expires in") if wide else ()))
    table = _table("batch", "model", *(("caller",) if wide else ()), "state", "waits for", numbers=numbers)
    for batch in said["batches"]:
        times = (_long(batch["age_seconds"]), _long(batch["expires_seconds"]))
        table.add_row(
            _name(batch["id"]),
            _name(batch["model"] or _NONE),
            *((_name(batch["owner"] or _NONE),) if wide else ()),
            _name(batch["status"].replace("_", " ")),
            Text(batch["waits_for"].replace("_", " ") or _NONE, "bold yellow" if batch["waits_for"] else "dim"),
            f"{_count(batch['items'] - batch['left'])}/{_count(batch['items'])}",
            _few(batch["running"]),
            *(times if wide else ()),
        )
    if besides := said["batches_left_out"]:
        table.add_row(Text(f"and {_count(besides)} more", "dim"))
    return table


def _calls(calls: Sequence[Mapping[str, Any]], wide: bool) -> Table:
    more = ("in", "out") if wide else ()
    table = _table("ended", "model", *(("upstream",) if wide else ()), "outcome", numbers=("took", "first", *more))
    table.add_column("where the time went", no_wrap=True)
    for call in calls:
        style = "" if call["outcome"] == "ok" else "yellow" if call["source"] == "client" else "bold red"
        outcome = call["outcome"] if call["status"] == 200 else f"{call['outcome']} {call['status']}"
        tokens = [_NONE if count is None else _count(count) for count in (call["input_tokens"], call["output_tokens"])]
        table.add_row(
            Text(datetime.fromtimestamp(call["ended"]).strftime("%H:%M:%S"), no_wrap=True),
            _name(call["model"]),
            *([_name(call["upstream"] or _NONE)] if wide else []),
            Text(outcome, style, no_wrap=True),
            _seconds(call["seconds"]),
            _seconds(call["first_token"]),
            *(tokens if wide else []),
            _fall(call),
        )
    return table


def _fall(call: Mapping[str, Any]) -> Text:
    """The call's phases, over its own length."""
    whole = max(call["seconds"], 1e-9)
    cells = [(" ", "")] * _FALL
    for phase in call["phases"]:
        mark, colour = _PHASES.get(phase["kind"], ("█", ""))
        if phase["kind"] == "attempt" and phase["result"] not in ("ok", "cancelled"):
            colour = "red"
        first = min(_FALL - 1, int(phase["from"] / whole * _FALL))
        last = min(_FALL, max(first + 1, round(phase["to"] / whole * _FALL)))
        cells[first:last] = [(mark, colour)] * (last - first)
    return Text.assemble(*(("".join(mark for mark, _ in run), colour) for colour, run in groupby(cells, _COLOUR)))


def _table(*names: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), header_style="dim")
    for name in names:
        table.add_column(name)  # what wraps is made narrower first; its cells do not wrap by themselves
    for name in numbers:
        table.add_column(name, no_wrap=True, justify="right")
    return table


def _sparks(values: Sequence[float], step: int, length: int) -> Text:
    """Five minutes in `length` characters, the mean of each stretch; stretches nothing is known of stay empty."""
    each = max(1, 300 // step // length)
    lately = list(values[-each * length :])
    lately = lately[len(lately) % each :]
    means = [sum(lately[at : at + each]) / each for at in range(0, len(lately), each)]
    most = max(means, default=0.0)
    marks = (_STEPS[min(7, int(8 * mean / most))] if most else _STEPS[0] for mean in means)
    return Text("".join(marks).rjust(length), "cyan")


def _harmless(said: object) -> str:
    """Text from outside: one line, and nothing that a terminal obeys."""
    return "".join(sign if sign.isprintable() else "·" for sign in str(said))


def _name(said: object) -> Text:
    """A name, which gives way to the figures where there is no room for both."""
    return Text(_harmless(said), no_wrap=True, overflow="ellipsis")


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _few(value: float) -> Text:
    return Text(_count(value)) if value else Text(_NONE, "dim")


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 99.95 else f"{value:,.0f}"


def _large(value: float | None) -> str:
    if value is None:
        return _NONE
    for unit, sign in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= max(unit, 1e5):
            return f"{value / unit:.1f}".removesuffix(".0") + sign
    return _count(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    if value < 0.9995:
        return f"{value * 1e3:.{1 if value < 0.00995 else 0}f} ms"
    if value < 99.95:
        return f"{value:.{2 if value < 9.995 else 1}f} s"
    return _long(value)


def _long(value: float) -> str:
    if value < 99.5:
        return f"{value:.0f} s"
    if value < 3600:
        return f"{value / 60:.0f} min"
    return f"{value // 3600:.0f} h {value % 3600 / 60:.0f} min"
