"""Every example runs, without the gateway and with it; with it nothing fails and the order holds."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from examples import retry
from examples.__main__ import NAMES, SPEED, failed, run

HELPERS = {"__init__", "__main__", "asking"}
REFUSED = {"gather", "batch_service", "anthropic_client"}  # all at once, whatever the pace of the machine


def test_every_example_is_run() -> None:
    files = {file.stem for file in (Path(__file__).parents[2] / "examples").glob("*.py")} - HELPERS
    assert files == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
async def test_an_example_loses_nothing_through_the_gateway(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "UNIT_SECONDS", 1 / SPEED)
    example = import_module(f"examples.{name}")
    without, through = await run(example)
    assert len(without) == len(through) == example.COUNT
    assert not failed(through)
    assert [_number(answer) for answer in through] == list(range(example.COUNT))
    if name in REFUSED:
        assert failed(without)


def _number(answer: object) -> int:
    """The number of the question that an answer echoes."""
    return next(int(word) for word in str(answer).split() if word.isdecimal())
