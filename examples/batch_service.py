"""A service that takes many prompts, gives a job's id, and is asked how far it is: here its heart, a dictionary."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import aiohttp
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
    service = base_url.removesuffix("/v1")
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{service}/batch", json={"prompts": prompts(COUNT), "model": MODEL}) as answer:
            job = await answer.json()
        while job.get("status") != "completed":
            await asyncio.sleep(POLL_SECONDS)
            async with http.get(f"{service}/batch/{job['job_id']}") as answer:
                job = await answer.json()
        results: list[str] = job["results"]
        return results
