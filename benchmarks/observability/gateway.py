"""The gateway to be measured, in a process of its own: `python -m ... on|off PORT ADMIN_PORT PROVIDER_PORT`.

Off, the record that the relay writes to is all that is left: no ids, no numbers, no spans, no log, no Server-Timing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import uvloop

from proxy import app
from proxy.api import answering
from proxy.config import Model, Price, Secret, Server, Settings, Upstream
from proxy.telemetry import Attempt, Record, Telemetry

KEY = "sk-benchmark-0123456789"


class Silent(Telemetry):
    def begin(self, operation: str, method: str, route: str, *, request_id: str, **_: str | None) -> Record:  # type: ignore[override]
        return Record(request_id, operation, method, route, self._now(), 0.0)

    def request(self, record: Record) -> nullcontext[Record]:  # type: ignore[override]
        return nullcontext(record)

    def attempt(self, record: Record, upstream: str, model: str, *_: str | int) -> _Bare:  # type: ignore[override]
        return _Bare(record, Attempt(upstream, model, 0.0))

    def beat(self, late_seconds: float) -> None:
        pass


class _Bare:
    __slots__ = ("attempt", "record")

    def __init__(self, record: Record, attempt: Attempt) -> None:
        self.record, self.attempt = record, attempt

    def __enter__(self) -> Attempt:
        self.record.attempts.append(self.attempt)
        return self.attempt

    def __exit__(self, *_: object) -> None:
        pass


def silence() -> None:
    """Switch everything off that can be switched off from outside; the product has no such switch."""
    app.Telemetry = Silent  # type: ignore[misc]
    answering.server_timing = lambda record, now: ""


def settings(port: int, admin_port: int, provider_port: int) -> Settings:
    return Settings(
        server=Server(port=port, admin_port=admin_port),
        upstreams={"up": Upstream(base_url=f"http://127.0.0.1:{provider_port}/v1", api_key=Secret("sk-up"))},
        models={"m": Model(upstreams=("up",), price=Price(input=0.15, output=0.6, cached_input=0.075))},
        callers={"team-a": Secret(KEY)},
        telemetry={"trace_ratio": 0.01, "per_caller": True},
    )


@contextmanager
def nowhere() -> Iterator[int]:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def main(mode: str, port: int, admin_port: int, provider_port: int) -> None:
    said = settings(port, admin_port, provider_port)
    with nowhere() as descriptor:
        if mode == "off":
            silence()
            uvloop.run(app.serve(said, lambda: said, audit_fd=None))
        else:
            os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{provider_port}"
            uvloop.run(app.serve(said, lambda: said, log_fd=descriptor, audit_fd=descriptor))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
