"""python -m benchmarks.batches kill | large: batches under SIGKILL, and a batch as large as there may be."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.batches import kill as killing
from benchmarks.batches import large as size

cli = typer.Typer(add_completion=False, no_args_is_help=True)


@cli.command()
def kill(
    lines: Annotated[int, typer.Option(help="Items of all batches, 2,000 in each.")] = 20_000,
    kills: Annotated[int, typer.Option(help="Kills at random moments, beside those at named points.")] = 300,
    seed: int = 0,
) -> None:
    """Run batches through a gateway that is killed again and again; exit 1 if anything was lost or doubled."""
    with tempfile.TemporaryDirectory() as directory:
        ok = asyncio.run(killing.run(Path(directory), lines=lines, kills=kills, seed=seed))
    sys.exit(not ok)


@cli.command()
def large(
    lines: int = 50_000,
    per_minute: Annotated[int, typer.Option(help="The provider's limit of requests.")] = 12_000,
    live_seconds: Annotated[float, typer.Option(help="How long live calls are measured, without and beside.")] = 45.0,
) -> None:
    """Run one large batch, with live calls beside it for a while; exit 1 if a target was missed."""
    with tempfile.TemporaryDirectory() as directory:
        ok = asyncio.run(size.run(Path(directory), lines=lines, per_minute=per_minute, live_seconds=live_seconds))
    sys.exit(not ok)


if __name__ == "__main__":
    cli()
