import asyncio
import logging

import pytest

from proxy.tasks import Tasks
from tests.virtual_time import everybody_waits, in_virtual_time, loop


async def for_ever():
    await loop().create_future()


@in_virtual_time
async def test_a_task_runs_under_its_name_until_it_ends():
    tasks = Tasks()
    task = tasks.spawn("sweeper", asyncio.sleep(5.0))
    assert (task.get_name(), len(tasks)) == ("sweeper", 1)
    await asyncio.sleep(6.0)
    assert task.done()
    assert len(tasks) == 0


@in_virtual_time
async def test_a_task_that_dies_is_logged_with_its_name(caplog):
    async def die():
        raise ValueError("no more")

    tasks = Tasks()
    tasks.spawn("sweeper", die())
    await everybody_waits()
    assert len(tasks) == 0
    (told,) = caplog.records
    assert (told.levelno, told.getMessage()) == (logging.ERROR, "background task sweeper died")
    assert "no more" in caplog.text


@in_virtual_time
async def test_stopping_cancels_all_and_waits_until_they_have_ended(caplog):
    ended = []

    async def work(name):
        try:
            await for_ever()
        finally:
            await asyncio.sleep(3.0)
            ended.append(name)

    tasks = Tasks()
    for name in ("a", "b"):
        tasks.spawn(name, work(name))
    await everybody_waits()
    await tasks.stop()
    assert (sorted(ended), len(tasks)) == (["a", "b"], 0)
    assert not caplog.records  # to be cancelled is no death
    await tasks.stop()


@in_virtual_time
async def test_what_a_task_starts_at_its_end_is_stopped_too():
    tasks = Tasks()

    async def work():
        try:
            await for_ever()
        finally:
            tasks.spawn("late", for_ever())

    tasks.spawn("early", work())
    await everybody_waits()
    await tasks.stop()
    assert len(tasks) == 0


@in_virtual_time
async def test_a_task_that_dies_while_it_is_stopped_is_logged_and_does_not_stop_the_others(caplog):
    async def die():
        try:
            await for_ever()
        finally:
            raise ValueError("at the end")

    tasks = Tasks()
    tasks.spawn("sweeper", die())
    other = tasks.spawn("other", for_ever())
    await everybody_waits()
    await tasks.stop()
    assert other.cancelled()
    assert "background task sweeper died" in caplog.text


@in_virtual_time
async def test_one_task_can_be_ended_alone():
    tasks = Tasks()
    one, other = tasks.spawn("one", for_ever()), tasks.spawn("other", for_ever())
    await everybody_waits()
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    assert not other.done()
    await tasks.stop()
