"""What becomes of connections to upstreams, told by the transport; see `proxy.upstreams.ConnectionNotes`."""

from __future__ import annotations

from proxy.telemetry.recorder import Recorder


class Connections:
    def __init__(self, recorder: Recorder) -> None:
        self._waits = recorder.histograms["upstream_connection_wait_seconds"]
        self._connects = recorder.histograms["upstream_connect_seconds"]
        self._errors = recorder.counters["upstream_connect_errors"]
        self._stale = recorder.counters["upstream_connections_stale"]

    def waited(self, upstream: str, seconds: float) -> None:
        self._waits[upstream,].observe(seconds)

    def connected(self, upstream: str, seconds: float) -> None:
        self._connects[upstream,].observe(seconds)

    def failed(self, upstream: str, reason: str) -> None:
        self._errors[upstream, reason].value += 1

    def stale(self, upstream: str) -> None:
        self._stale[upstream,].value += 1
