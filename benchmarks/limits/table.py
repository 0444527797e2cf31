"""Tables of figures: for a terminal, or as the documentation has them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show(headings: Sequence[str], lines: Sequence[Sequence[str]], *, markdown: bool) -> None:
    """Print it."""
    if markdown:
        print(*("| " + " | ".join(line) + " |" for line in (headings, ["---"] * len(headings), *lines)), sep="\n")
        return
    table = Table(*headings)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 220).print(table)
