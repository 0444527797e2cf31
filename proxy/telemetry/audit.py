"""The audit log: who started, stopped, changed or was kept out of the gateway, one line of JSON for each.

A stream of its own, so that it can be kept for longer, and elsewhere, than what calls leave behind. It holds names of
the configuration and never a value: no key, no address of a provider, no limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from proxy.telemetry.log import text
from proxy.telemetry.record import Record
from proxy.telemetry.writer import Writer


class Names(msgspec.Struct, omit_defaults=True):
    """What became of the names of one section of the configuration."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


class Line(msgspec.Struct, omit_defaults=True):
    """The allow-list."""

    ts: datetime
    level: str
    event: str  # start, stop, reload, key_denied or admin
    ok: bool
    version: str = ""
    listeners: tuple[str, ...] = ()
    drained: bool | None = None  # at the stop: whether every call had ended
    names: Mapping[str, Names] = {}
    sections: tuple[str, ...] = ()  # without names of their own, that changed
    problems: int = 0  # a reload's that was refused
    request_id: str = ""
    trace_id: str = ""
    method: str = ""
    route: str = ""
    status: int = 0


_encode = msgspec.json.Encoder().encode
_NAMED = ("upstreams", "pools", "models", "callers")


class Audit:
    """
    Args:
        writer: where to; None: nothing is written.
        wall: seconds since the epoch.
    """

    def __init__(self, writer: Writer | None, wall: Callable[[], float]) -> None:
        self._writer, self._wall = writer, wall

    def started(self, version: str, listeners: tuple[str, ...]) -> None:
        self._write(self._line("start", version=version, listeners=listeners))

    def stopped(self, *, drained: bool) -> None:
        self._write(self._line("stop", ok=drained, drained=drained))

    def reloaded(self, old: Mapping[str, object], new: Mapping[str, object]) -> None:
        """Another configuration is in force. `old` and `new` are its sections by name."""
        named = {section: difference(_part(old, section), _part(new, section)) for section in _NAMED}
        self._write(
            self._line(
                "reload",
                names={section: names for section, names in named.items() if names != Names()},
                sections=tuple(name for name in new if name not in _NAMED and old.get(name) != new[name]),
            )
        )

    def refused(self, problems: int) -> None:
        """A reload was refused: the configuration was wrong in so many places."""
        self._write(self._line("reload", ok=False, problems=problems))

    def denied(self, record: Record) -> None:
        """A call came without a key, or with one that is not known."""
        self._write(
            self._line(
                "key_denied",
                ok=False,
                request_id=text(record.request_id),
                trace_id=f"{record.trace_id:032x}",
                method=text(record.method),
                route=record.route,
                status=record.status,
            )
        )

    def administered(self, method: str, path: str, status: int) -> None:
        """Something was asked of the admin port that changes the gateway, or that was refused there."""
        self._write(self._line("admin", ok=status < 400, method=text(method), route=text(path), status=status))

    def _line(self, event: str, *, ok: bool = True, **said: Any) -> Line:
        now = datetime.fromtimestamp(self._wall(), UTC)
        return Line(ts=now, level="info" if ok else "warning", event=event, ok=ok, **said)

    def _write(self, line: Line) -> None:
        if self._writer is not None:
            self._writer.take(_encode(line) + b"\n")


def difference(old: Mapping[str, object], new: Mapping[str, object]) -> Names:
    return Names(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        changed=tuple(name for name in new if name in old and old[name] != new[name]),
    )


def _part(sections: Mapping[str, object], name: str) -> Mapping[str, object]:
    part = sections.get(name)
    return part if isinstance(part, Mapping) else {}
