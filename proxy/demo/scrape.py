"""The gateway's own figures, read as Prometheus reads them: over HTTP, from /metrics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from http.client import HTTPConnection

_SAMPLE = re.compile(r"penstock_(\w+)(?:\{(.*)\})? (\S+)")  # name, labels, value
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_SCRAPE_SECONDS = 5.0


class Scrape:
    """One reading of the text exposition."""

    def __init__(self, text: str) -> None:
        self._samples = list(_read(text))

    def total(self, name: str, **labels: str) -> float:
        """The sum of a family's samples that have these labels; 0.0 where there is none.

        Args:
            name: without the prefix, with the suffix: `requests_total`.
        """
        return sum(
            value
            for sample, said, value in self._samples
            if sample == name and all(said.get(label) == wanted for label, wanted in labels.items())
        )


async def scrape(port: int) -> Scrape:
    """Read /metrics of the admin port on loopback.

    Raises:
        OSError: nobody answers there.
    """
    return await asyncio.to_thread(_fetch, port)


def _fetch(port: int) -> Scrape:
    connection = HTTPConnection("127.0.0.1", port, timeout=_SCRAPE_SECONDS)
    try:
        connection.request("GET", "/metrics")
        return Scrape(connection.getresponse().read().decode())
    finally:
        connection.close()


def _read(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in text.splitlines():
        found = _SAMPLE.fullmatch(line)
        if found is not None and not found[1].endswith("_bucket"):
            yield found[1], dict(_LABEL.findall(found[2] or "")), float(found[3])
