"""`penstock pipeline`: drawn from its configuration, and run from a terminal."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from click.testing import Result
from typer.testing import CliRunner

from proxy import piping, simulator
from proxy.cli import cli
from proxy.config import Limits, Pipeline
from proxy.simulator import profiles
from tests.e2e.running import at, serving, settings
from tests.e2e.scripted import Scripted, refusal

STEPS = {
    "topics": {"model": "m", "prompt": "{input}", "output": {"type": "array"}, "on_error": {"fallback": "n"}},
    "mood": {"model": "fast", "prompt": "{input}", "parallel": True, "on_error": "skip"},
    "notes": {"model": "m", "prompt": "{item}", "map": "{steps.topics}", "concurrency": 4, "timeout_seconds": 9},
    "end": {"model": "m", "prompt": "{input}", "when": {"value": "{steps.mood}", "contains": ["a", "b"]}},
}
DIGEST = {
    "extract": {"model": "m", "prompt": "1 {input}"},
    "summarise": {"model": "m", "prompt": "2 {steps.extract}"},
}


async def test_a_drawing_has_the_steps_by_stages_and_what_each_does() -> None:
    assert piping.drawing("digest", Pipeline(steps=STEPS)).splitlines() == [  # type: ignore[arg-type]
        "pipeline/digest",
        "│",
        "├─ topics  m     gives JSON; else n",
        "├─ mood    fast  may be skipped",
        "│",
        "├─ notes   m     for each of {steps.topics}, 100 at once; at most 4 calls; within 9 s",
        "│",
        "└─ end     m     if {steps.mood} contains a or b",
    ]


async def test_a_run_writes_the_answer_to_stdout_and_tells_of_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    async with simulator.serving(replace(profiles.INSTANT, output_tokens=1)) as provider:
        said = settings(at(provider.base_url), pipelines={"digest": {"steps": DIGEST}})
        await piping.run(said, "digest", "hello [x]", told.append)
    assert capsys.readouterr().out == "echo: 2 echo: 1 hello [x]\n"
    assert [line.split(",")[0] for line in told] == ["step extract ok"]


async def test_a_run_by_a_running_gateway_that_fails_says_which_step_and_what_the_others_gave(
    upstream: Scripted,
) -> None:
    said = settings(at(upstream.base_url, limits=Limits(learn=False)), pipelines={"digest": {"steps": DIGEST}})
    upstream.plays(refusal(400, "no", message="not this"))
    async with serving(said) as house:
        with pytest.raises(piping.Failed, match="step extract: its upstream answered 400: not this"):
            await asyncio.to_thread(piping.ask, house.origin, None, "digest", "x", print)
        with pytest.raises(piping.Failed, match="is not known here; did you mean `pipeline/digest`"):
            await asyncio.to_thread(piping.ask, house.origin, None, "digset", "x", print)


async def test_without_a_gateway_a_run_says_what_to_look_at() -> None:
    with pytest.raises(piping.Failed, match="is it running, and is --url right"):
        await asyncio.to_thread(piping.ask, "http://127.0.0.1:9", None, "digest", "x", print)


async def invoked(*said: str) -> Result:
    """The command, beside the event loop as it is in production."""
    return await asyncio.to_thread(CliRunner().invoke, cli, ["pipeline", *said])


async def test_an_unknown_pipeline_is_told_with_those_there_are() -> None:
    shown = await invoked("show", "nope", "--config", "config/pipelines.yaml")
    assert shown.exit_code == 1
    assert "there is no pipeline `nope`; there are: digest" in " ".join(shown.output.split())
    shown = await invoked("show", "digest", "--config", "config/pipelines.yaml")
    assert shown.exit_code == 0
    assert shown.output.startswith("pipeline/digest\n")
