"""`penstock batch`: against a gateway that runs, and with one of its own."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, chdir
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from proxy.cli import cli
from proxy.config import Model, Price, Secret, State
from proxy.simulator import Profile, Simulator, profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import House, at, serving, settings, until
from tests.e2e.test_tls import certificate

UNEVEN = replace(profiles.INSTANT, first_token_seconds=0.02, first_token_sigma=1.0, output_tokens=4)
SLOW = replace(UNEVEN, requests_per_minute=6000, requests_burst=10)
KEY = "caller-key-0123456789"
PROMPTS = 60


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def results(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


class Command:
    """One `penstock batch …` in a directory of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ended(self) -> Ended:
        out, err = await asyncio.wait_for(self.process.communicate(), 30)
        assert self.process.returncode is not None
        return Ended(self.process.returncode, out.decode(), err.decode())


async def start(folder: Path, *arguments: str) -> Command:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "proxy",
        "batch",
        *arguments,
        cwd=folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whatever starts the tests may ignore it
    )
    return Command(process)


async def run(folder: Path, *arguments: str) -> Ended:
    """The same in this process, from start to end: a process of its own takes a second to begin."""

    def invoke() -> Result:
        with chdir(folder):
            return CliRunner().invoke(cli, ["batch", *arguments])

    ended = await asyncio.to_thread(invoke)
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exc_info
    return Ended(ended.exit_code, ended.stdout, ended.stderr)


@asynccontextmanager
async def through(state: Path, profile: Profile = UNEVEN, **sections: Any) -> AsyncIterator[tuple[House, Simulator]]:
    async with simulating(profile, remember=10_000) as simulator:
        said = settings(at(simulator.base_url), state=State(path=str(state / "state")), **sections)
        async with serving(said) as house:
            yield house, simulator


def prompts(folder: Path, count: int = PROMPTS) -> Sequence[str]:
    said = [f"question {number}" for number in range(count)]
    (folder / "in.txt").write_text("\n".join(said) + "\n")
    return said


def asked(simulator: Simulator) -> Counter[str]:
    """How often each prompt was sent to the provider."""
    return Counter(json.loads(seen.body)["messages"][-1]["content"] for seen in simulator.seen)


def is_answered(results: Sequence[Any], said: Sequence[str]) -> bool:
    """Each result stands at its prompt's place."""
    return [each["index"] for each in results] == list(range(len(said))) and all(
        each["result"].startswith(f"echo: {prompt}") for each, prompt in zip(results, said, strict=True)
    )


async def test_results_come_in_the_order_of_the_prompts_and_pipe_cleanly(tmp_path: Path) -> None:
    said = prompts(tmp_path)
    async with through(tmp_path) as (house, _):
        ended = await run(tmp_path, "run", "in.txt", "-m", "m", "--url", house.origin)
    assert ended.code == 0
    assert is_answered(ended.results, said)
    assert f"{PROMPTS} answered, 0 failed" in ended.err


async def test_a_csv_fills_a_template_and_costs_are_told(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('text,language\n"good, really",en\nbon,fr\n')
    priced = {"*": Model(upstreams=("up",), price=Price(input=1000.0, output=1000.0))}
    arguments = ("--template", "{language}: {text}", "--system", "classify")
    async with through(tmp_path, models=priced) as (house, simulator):
        ended = await run(tmp_path, "run", "in.csv", "-m", "m", "--url", house.origin, *arguments, "-o", "out.jsonl")
        sent = [json.loads(seen.body)["messages"] for seen in simulator.seen]
        listed = await run(tmp_path, "list", "--url", house.origin, "--json")
    assert ended.code == 0
    assert ended.out == ""
    assert {each[1]["content"] for each in sent} == {"en: good, really", "fr: bon"}
    assert {each[0]["content"] for each in sent} == {"classify"}
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert is_answered(results, ["en: good, really", "fr: bon"])
    (batch,) = listed.results
    assert batch["penstock"]["cost_usd"] == batch["usage"]["total_tokens"] / 1000


async def test_killed_at_any_time_the_same_command_goes_on_and_nothing_is_paid_twice(tmp_path: Path) -> None:
    said = prompts(tmp_path, 300)
    async with through(tmp_path, SLOW) as (house, simulator):
        arguments = ("run", "in.txt", "-m", "m", "--url", house.origin, "-o", "out.jsonl")
        for answered in (0, 1, 100):
            command = await start(tmp_path, *arguments)
            notes = tmp_path / "out.jsonl.penstock"
            await until(lambda: notes.exists() and len(simulator.seen) >= answered, seconds=20)  # noqa: B023
            command.process.send_signal(signal.SIGKILL)
            await command.process.wait()
        assert not (tmp_path / "out.jsonl").exists()
        ended = await run(tmp_path, *arguments)
        assert ended.code == 0
        assert is_answered([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], said)
        assert asked(simulator) == Counter(said)
        again = await run(tmp_path, *arguments)
        assert (again.code, len(simulator.seen)) == (0, 300)


async def test_a_gateway_of_its_own_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """The configuration is that of a gateway which serves TLS; the command's own needs none, on loopback."""
    said = prompts(tmp_path, 200)
    own = certificate(tmp_path, "own")
    async with simulating(SLOW, remember=10_000) as simulator:
        (tmp_path / "penstock.yaml").write_text(
            f"server: {{port: 1, admin_port: 0, tls: {{cert_file: {own.cert}, key_file: {own.key}}}}}\n"
            f"state: {{path: {tmp_path}/state}}\n"
            f'upstreams: {{up: {{base_url: "{simulator.base_url}", api_key: "sk-x"}}}}\n'
            "models: {m: {upstreams: [up]}}\n"
        )
        arguments = ("run", "in.txt", "-m", "m", "-c", "penstock.yaml", "-o", "out.jsonl", "--concurrency", "8")
        command = await start(tmp_path, *arguments)
        await until(lambda: len(simulator.seen) > 60, seconds=20)
        command.process.send_signal(signal.SIGKILL)
        await command.process.wait()
        ended = await run(tmp_path, *arguments)
        assert ended.code == 0, ended.err
        assert is_answered([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], said)
        assert len(simulator.seen) <= 200 + 8  # only what was in flight at the kill was asked twice
        assert simulator.provider.stats.peak_in_flight <= 8


async def test_a_failure_stands_at_its_place_and_can_be_asked_anew(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "model": "known"}, {"prompt": "b", "model": "unknown"}, {"prompt": "c", "model": "known"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    async with through(tmp_path, replace(UNEVEN, models=("known",))) as (house, simulator):
        arguments = ("run", "in.jsonl", "--url", house.origin, "-o", "out.jsonl")
        ended = await run(tmp_path, *arguments)
        assert ended.code == 1
        assert "2 answered, 1 failed (model_not_found x 1)" in ended.err
        results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [each["index"] for each in results] == [0, 1, 2]
        assert results[1]["error"]["code"] == "model_not_found"
        again = await run(tmp_path, *arguments, "--retry-failed")
        assert again.code == 1
        assert asked(simulator) == {"a": 1, "b": 2, "c": 1}


async def test_what_still_runs_has_not_failed_and_is_not_asked_anew(tmp_path: Path) -> None:
    said = prompts(tmp_path, 200)
    async with through(tmp_path, SLOW) as (house, simulator):
        arguments = ("run", "in.txt", "-m", "m", "--url", house.origin, "-o", "out.jsonl", "--retry-failed")
        command = await start(tmp_path, *arguments)
        await until(lambda: len(simulator.seen) > 40, seconds=20)
        command.process.send_signal(signal.SIGKILL)
        await command.process.wait()
        ended = await run(tmp_path, *arguments)
        assert ended.code == 0, ended.err
        assert is_answered([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], said)
        assert asked(simulator) == Counter(said)


async def test_lines_of_a_batch_come_back_as_lines_of_its_output(tmp_path: Path) -> None:
    body = {"model": "m", "input": "a"}
    lines = [{"custom_id": f"mine-{each}", "method": "POST", "url": "/v1/embeddings", "body": body} for each in "xy"]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    async with through(tmp_path) as (house, _):
        ended = await run(tmp_path, "run", "in.jsonl", "--url", house.origin)
    assert [each["custom_id"] for each in ended.results] == ["mine-x", "mine-y"]
    assert all(each["response"]["body"]["object"] == "list" and each["error"] is None for each in ended.results)


async def test_bad_input_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "fine"}\nno\n{"other": 1, "thing": 2}\n')
    async with through(tmp_path) as (house, simulator):
        ended = await run(tmp_path, "run", "in.jsonl", "-m", "m", "--url", house.origin, "-o", "out.jsonl")
        missing = await run(tmp_path, "run", "none.txt", "-m", "m", "--url", house.origin)
        bound = await run(tmp_path, "run", "in.jsonl", "-m", "m", "--url", house.origin, "--concurrency", "5")
        assert not simulator.seen
    assert (ended.code, missing.code, bound.code) == (2, 2, 2)
    assert "in.jsonl: line 2: is not JSON" in ended.err
    assert "in.jsonl: line 3: has no field `prompt`" in ended.err
    assert "cannot be read" in missing.err
    assert "paces itself" in bound.err
    assert not (tmp_path / "out.jsonl.penstock").exists()


async def test_results_of_another_run_are_not_written_over(tmp_path: Path) -> None:
    prompts(tmp_path, 2)
    async with through(tmp_path) as (house, simulator):
        arguments = ("run", "in.txt", "-m", "m", "--url", house.origin, "-o", "out.jsonl")
        (tmp_path / "out.jsonl").write_text("precious\n")
        foreign = await run(tmp_path, *arguments)
        assert (foreign.code, (tmp_path / "out.jsonl").read_text()) == (2, "precious\n")
        (tmp_path / "out.jsonl").unlink()
        assert (await run(tmp_path, *arguments)).code == 0
        other = await run(tmp_path, *arguments, "--template", "other: {text}")
        assert other.code == 2
        assert "--fresh" in other.err
        assert (await run(tmp_path, *arguments, "--template", "other: {text}", "--fresh")).code == 0
        assert len(simulator.seen) == 4


async def test_ctrl_c_ends_it_and_says_how_to_go_on(tmp_path: Path) -> None:
    prompts(tmp_path, 300)
    async with through(tmp_path, SLOW) as (house, simulator):
        command = await start(tmp_path, "run", "in.txt", "-m", "m", "--url", house.origin, "-o", "out.jsonl")
        await until(lambda: simulator.seen, seconds=20)
        command.process.send_signal(signal.SIGINT)
        ended = await command.ended()
    assert ended.code == 130
    assert "go on with: penstock batch run in.txt" in ended.err
    assert "Traceback" not in ended.err


async def test_batches_are_listed_shown_and_cancelled_by_who_has_the_key(tmp_path: Path) -> None:
    prompts(tmp_path, 300)
    async with through(tmp_path, SLOW, callers={"team": Secret(KEY)}) as (house, simulator):
        at_house = ("--url", house.origin)
        without = await run(tmp_path, "list", *at_house)
        assert without.code == 2
        assert "--key" in without.err
        command = await start(tmp_path, "run", "in.txt", "-m", "m", *at_house, "--key", KEY, "-o", "out.jsonl")
        await until(lambda: simulator.seen, seconds=20)
        (batch,) = (await run(tmp_path, "list", *at_house, "--key", KEY, "--json")).results
        cancelled = await run(tmp_path, "cancel", batch["id"], *at_house, "--key", KEY, "--json")
        assert cancelled.results[0]["status"] in ("cancelling", "cancelled")
        ended = await command.ended()
        assert ended.code == 1
        shown = await run(tmp_path, "show", batch["id"], *at_house, "--key", KEY)
        unknown = await run(tmp_path, "show", "batch_none", *at_house, "--key", KEY)
    assert batch["id"] in shown.out
    assert unknown.code == 2
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["index"] for each in results] == list(range(300))
    assert 0 < sum("error" in each for each in results) < 300


async def test_where_nobody_answers_it_says_so(tmp_path: Path) -> None:
    prompts(tmp_path, 1)
    ended = await run(tmp_path, "run", "in.txt", "-m", "m", "--url", "http://127.0.0.1:1")
    assert ended.code == 2
    assert "is it running" in ended.err
