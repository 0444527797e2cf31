"""Small runs of the rows of `python -m benchmarks.limits`: the table itself takes a minute."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from benchmarks.limits import stories
from benchmarks.limits.__main__ import all_done
from benchmarks.limits.rows import Load, saturation
from benchmarks.limits.table import show
from benchmarks.limits.targets import ROWS, Work, done
from proxy.simulator.profile import Profile, Style

ONE = range(1)


def test_every_target_has_its_row():
    assert {row.number for row in ROWS} == {f"T{number}" for number in range(14)}


@pytest.mark.parametrize(("style", "most"), [(Style.OPENAI, 2), (Style.NONE, 10)])
def test_a_cold_burst_at_an_unknown_provider_is_served_with_hardly_a_refusal(style, most):
    assert stories.cold_burst("", style, most).measure(ONE).met


@pytest.mark.parametrize(
    ("load", "used", "refused"),
    [
        (Load(Profile(requests_per_minute=600, output_tokens=100), 90.0), 0.99, 0.0),
        (Load(Profile(tokens_per_minute=150_000, max_tokens_weight=1.0), 180.0, max_tokens=500), 0.99, 0.002),
        (Load(Profile(requests_per_minute=300, style=Style.NONE, output_tokens=100), 400.0), 0.98, 0.01),
        (Load(Profile(requests_per_minute=120, window_seconds=10, style=Style.NONE), 600.0), 0.95, 0.01),
    ],
)
def test_a_limit_nobody_told_is_used_and_hardly_exceeded(load, used, refused):
    result = saturation("", "", load, used=used, refused=refused).measure(ONE)
    assert result.met, result.text


def test_a_story_that_misses_its_target_says_so():
    row = stories.cold_burst("", Style.NONE, -1)
    assert row.measure(ONE).met is False
    assert "300 served" in row.measure(ONE).text


def test_the_baselines_run_on_the_same_provider():
    row = stories.cold_burst("", Style.OPENAI, 2)
    assert row.baseline is not None
    assert row.baseline(0, "fixed 64").endswith("refused")


def test_runs_in_other_processes_are_the_same_runs():
    short = [number for number, row in enumerate(ROWS) if row.number in ("T0", "T13")]
    works = [Work(number, seed) for number in short for seed in range(2)] + [Work(short[0], 0, "AIMD")]
    assert all_done(works, 2) == {work: done(work) for work in works}


def test_an_interrupt_ends_all_processes_and_is_no_crash():
    command = [sys.executable, "-m", "benchmarks.limits", "--row", "T2", "--seeds", "9"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0) as run:
        assert run.stderr is not None
        assert run.stderr.readline().startswith("1 of ")
        os.killpg(run.pid, signal.SIGINT)
        assert run.stderr.read().endswith("interrupted\n")  # to the end: no process holds it any more
        assert run.wait() == 130


def test_a_table_can_be_put_into_the_documentation(capsys):
    show(("row", "used"), [("T1", "99 %"), ("T2", "98 %")], markdown=True)
    assert capsys.readouterr().out == "| row | used |\n| --- | --- |\n| T1 | 99 % |\n| T2 | 98 % |\n"
