"""Pages, rules and their provisioning: as files, by promtool, and against a Prometheus that scrapes the gateway."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(program: str) -> NoReturn:
    """A program that these tests start is not installed: tests are skipped at home, and fail in CI."""
    message = f"{program} is not installed; it is in Debian's package prometheus"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
