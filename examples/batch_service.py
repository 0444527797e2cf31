"""A service that takes many prompts, gives a job's id, and is asked how far it is: here its heart, a dictionary."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field

from openai import AsyncOpenAI

from examples.asking import MODEL, Answers, ask, client, prompts

COUNT = 40
POLL_SECONDS = 0.05


@dataclass
class Job:
    """As articles keep it: in memory, and gone with the process."""

    total: int
    answers: dict[int, str | BaseException] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return len(self.answers) == self.total


async def work(openai: AsyncOpenAI, job: Job, number: int, prompt: str) -> None:
    try:
        job.answers[number] = await ask(openai, prompt)
    except Exception as error:  # noqa: BLE001  # as it is copied: whatever it was, it is the item's
        job.answers[number] = error


async def copied(base_url: str) -> Answers:
    async with client(base_url) as openai, asyncio.TaskGroup() as group:
        job = Job(COUNT)
        for number, prompt in enumerate(prompts(COUNT)):
            group.create_task(work(openai, job, number, prompt))
        while not job.is_done:  # noqa: ASYNC110  # it is asked from outside, as such services are
            await asyncio.sleep(POLL_SECONDS)
        return [job.answers[number] for number in range(COUNT)]


async def through(base_url: str) -> Answers:
    """The gateway keeps the job: it outlives the program, the process and the machine's restart."""
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": _body(prompt)}
        for number, prompt in enumerate(prompts(COUNT))
    ]
    async with client(base_url) as openai:
        content = "\n".join(map(json.dumps, lines)).encode()
        file = await openai.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await openai.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            await asyncio.sleep(POLL_SECONDS)
            batch = await openai.batches.retrieve(batch.id)
        output = (await openai.files.content(batch.output_file_id or "")).text
        return [_text(json.loads(line)["response"]["body"]) for line in output.splitlines()]


def _body(prompt: str) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}


def _text(body: dict[str, list[dict[str, dict[str, str]]]]) -> str:
    return body["choices"][0]["message"]["content"]
