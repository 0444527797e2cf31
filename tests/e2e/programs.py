"""Clients that are programs of their own."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Ran:
    code: int
    out: bytes
    err: str


def found(name: str, *, as_well: str = "") -> str:
    """A program's path; without it, or what is needed `as_well`, the test is skipped, and fails in CI."""
    path = shutil.which(name)
    missing = as_well if path is not None else name
    if path is None or missing:
        assert os.environ.get("CI") != "true", f"{missing} is missing; .ci/run installs it"
        pytest.skip(f"{missing} is not installed")
    return path


async def run(*command: str, given: bytes = b"", env: Mapping[str, str] | None = None) -> Ran:
    """Run a program to its end; if this is cancelled, to that one's.

    Args:
        given: what stands on its stdin.
        env: all of its environment but PATH.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], **(env or {})},
    )
    try:
        out, err = await process.communicate(given)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Ran(process.returncode, out, err.decode())
