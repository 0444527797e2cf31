"""`penstock pipeline`: a pipeline drawn from its configuration, and run from a terminal.

The answer goes to stdout as it comes, what is told of the steps to stderr.
"""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from proxy.app import Gateway
from proxy.config import PIPELINE, Pipeline, Server, Settings, State, Step
from proxy.core import pipeline

CONDITIONS = ("equals", "differs", "contains", "lacks")


class Failed(Exception):
    """The pipeline gave no whole answer; the message says why."""


def drawing(name: str, said: Pipeline) -> str:
    """The steps from top to bottom; those that may run at the same time stand together."""
    stages = pipeline.stages(said.waits())
    names, models = max(map(len, said.steps)), max(len(step.model) for step in said.steps.values())
    lines = [f"{PIPELINE}{name}"]
    for stage in stages:
        lines.append("│")
        for step in stage:
            told = said.steps[step]
            branch = "└─" if stage is stages[-1] else "├─"
            lines.append(f"{branch} {step:{names}}  {told.model:{models}}  {'; '.join(_notes(told))}".rstrip())
    return "\n".join(lines)


def _notes(step: Step) -> Iterator[str]:
    """What a step does besides asking its model."""
    if step.when is not None:
        for word in CONDITIONS:
            if texts := getattr(step.when, word):
                yield f"if {step.when.value} {word} {' or '.join(texts)}"
    if step.map is not None:
        yield f"for each of {step.map.over}, {step.map.concurrency} at once"
    if step.output is not None:
        yield "gives JSON"
    if step.concurrency is not None:
        yield f"at most {step.concurrency} calls"
    if step.timeout_seconds is not None:
        yield f"within {step.timeout_seconds:g} s"
    if step.on_error.fallback is not None:
        yield f"else {step.on_error.fallback}"
    if step.on_error.skip:
        yield "may be skipped"


async def run(settings: Settings, name: str, text: str, tell: Callable[[str], None]) -> None:
    """Run it by a gateway of our own, for the length of the run.

    Raises:
        Failed: as `ask` does.
    """
    told = settings.pipelines[name].model_copy(update={"progress": True})
    ours = settings.model_copy(
        update={
            "server": Server(port=0, admin_port=0),
            "callers": {},
            "state": State(path=None),
            "pipelines": {**settings.pipelines, name: told},
        }
    )
    async with Gateway(ours) as gateway:
        await asyncio.to_thread(ask, f"http://127.0.0.1:{gateway.port}", None, name, text, tell)


def ask(url: str, key: str | None, name: str, text: str, tell: Callable[[str], None]) -> None:
    """Run it by the gateway at `url`, and write its answer to stdout; `tell` hears of its steps.

    Raises:
        Failed: it was refused, or broke off.
    """
    said = {"model": f"{PIPELINE}{name}", "stream": True, "messages": [{"role": "user", "content": text}]}
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    address = f"{url.rstrip('/')}/v1/chat/completions"
    request = urllib.request.Request(address, json.dumps(said).encode(), headers)  # noqa: S310 - the operator's own address
    try:
        with urllib.request.urlopen(request) as answer:  # noqa: S310 - as above
            _pass_on(answer, tell)
    except urllib.error.HTTPError as error:
        raise Failed(_why(error.read()) or f"{address} answered {error.code}") from None
    except OSError as error:
        raise Failed(f"no gateway at {url} ({error}); is it running, and is --url right?") from None


def _pass_on(answer: Any, tell: Callable[[str], None]) -> None:
    """The words of a stream; returns at its end mark."""
    for line in answer:
        if line.startswith(b": step "):
            tell(line[2:].decode().strip())
        elif line.startswith(b"data: [DONE]"):
            sys.stdout.write("\n")
            return
        elif line.startswith(b"data: "):
            if why := _why(line[6:]):
                raise Failed(why)
            for choice in json.loads(line[6:]).get("choices", ()):
                sys.stdout.write(choice["delta"].get("content") or "")
            sys.stdout.flush()
    raise Failed("the answer broke off; it is not whole")


def _why(body: bytes) -> str | None:
    """What an error says, and what the steps before it gave; None: it is no error."""
    try:
        error = json.loads(body)["error"]
        told = [str(error["message"])]
        told += [f"{step} gave: {json.dumps(gave)}" for step, gave in error.get("completed_steps", {}).items()]
    except (ValueError, LookupError, TypeError):
        return None
    return "\n".join(told)
