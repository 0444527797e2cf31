import asyncio

import pytest
import uvloop

from proxy.watch import Late, Watch
from tests.virtual_time import START, everybody_waits, in_virtual_time, loop


async def for_ever(*_):
    await loop().create_future()


async def lateness(expected, body):
    """What the body was late for; None if it was not."""
    caught = None
    try:
        async with Watch() as watch:
            watch.expect(*expected)
            await body(watch)
    except Late as late:
        caught = late
    assert not asyncio.current_task().cancelling()
    return None if caught is None else caught.what


@in_virtual_time
async def test_a_wait_that_lasts_too_long_ends_with_the_word_for_it():
    async def body(watch):
        await asyncio.sleep(4.0)
        watch.expect("idle", 3.0)
        await for_ever()

    assert await lateness(("first byte", 5.0), body) == "idle"
    assert loop().time() == START + 7.0


@in_virtual_time
async def test_what_comes_in_time_is_not_late():
    async with Watch() as watch:
        for _ in range(10):
            watch.expect("idle", 3.0)
            await asyncio.sleep(2.9)
    await asyncio.sleep(10.0)
    assert not loop().pending


@in_virtual_time
async def test_a_shorter_wait_that_follows_a_longer_one_is_held_to_its_own_time():
    async def body(watch):
        watch.expect("idle", 1.0)
        await for_ever()

    assert await lateness(("first byte", 600.0), body) == "idle"
    assert loop().time() == START + 1.0


def test_a_wait_that_is_as_good_as_over_may_be_said_anew():
    """On production's loop, whose timers count whole milliseconds."""

    async def live():
        async with Watch() as watch:
            for _ in range(3):
                watch.expect("idle", 1e-5)
                watch.expect("idle", 60.0)
            await asyncio.sleep(0.01)

    uvloop.run(live())


@in_virtual_time
async def test_at_rest_nothing_is_late():
    async with Watch() as watch:
        watch.expect("idle", 3.0)
        await asyncio.sleep(1.0)
        watch.rest()
        await asyncio.sleep(100.0)
        watch.expect("idle", 3.0)
        await asyncio.sleep(2.0)
    assert not loop().pending


@in_virtual_time
async def test_after_a_long_rest_a_wait_is_watched_as_before():
    async def body(watch):
        watch.rest()
        await asyncio.sleep(100.0)
        watch.expect("idle", 3.0)
        await for_ever()

    assert await lateness(("first byte", 5.0), body) == "idle"
    assert loop().time() == START + 103.0


@in_virtual_time
async def test_a_watch_that_expects_nothing_sets_no_timer():
    async with Watch():
        await asyncio.sleep(0)
    assert not loop().timers


@in_virtual_time
async def test_a_stream_of_many_chunks_costs_few_timers():
    async with Watch() as watch:
        for _ in range(10_000):
            watch.expect("idle", 120.0)
            await asyncio.sleep(0)
            watch.rest()
        loop().now += 60.0
        for _ in range(10_000):
            watch.expect("idle", 120.0)
            await asyncio.sleep(0)
            watch.rest()
    assert len(loop().timers) == 1


@in_virtual_time
async def test_a_long_stream_costs_a_timer_for_each_wait_that_might_have_been_late():
    async with Watch() as watch:
        for _ in range(1000):
            watch.expect("idle", 100.0)
            await asyncio.sleep(1.0)
    assert len(loop().timers) - 1000 <= 12  # but for those of `sleep`


@in_virtual_time
async def test_whoever_cancels_from_outside_is_not_answered_with_lateness():
    async def body():
        async with Watch() as watch:
            watch.expect("idle", 5.0)
            await for_ever()

    task = asyncio.create_task(body())
    await asyncio.sleep(3.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not loop().pending


@pytest.mark.parametrize("is_set_first", [True, False])
@in_virtual_time
async def test_cancelled_from_outside_in_the_same_instant_the_outside_wins(is_set_first):
    async def body():
        async with Watch() as watch:
            watch.expect("idle", 5.0)
            await for_ever()

    if is_set_first:
        loop().call_at(START + 5.0, lambda: task.cancel())
    task = asyncio.create_task(body())
    await everybody_waits()
    if not is_set_first:
        loop().call_at(START + 5.0, lambda: task.cancel())
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("error", [KeyError("x"), TimeoutError("its own")])
@in_virtual_time
async def test_errors_of_the_body_pass_through(error):
    async def body(_):
        raise error

    with pytest.raises(type(error)) as caught:
        await lateness(("idle", 5.0), body)
    assert caught.value is error
    assert not loop().pending


@pytest.mark.parametrize("is_first", [True, False])
@in_virtual_time
async def test_whoever_has_seen_what_came_at_the_last_instant_is_not_late(is_first):
    """The timer fires in the round of the loop in which the chunk comes: before it or after it."""
    arrived = loop().create_future()
    if is_first:
        loop().call_at(START + 5.0, arrived.set_result, b"chunk")
    seen = []

    async def body(watch):
        if not is_first:
            loop().call_at(START + 5.0, arrived.set_result, b"chunk")
        seen.append(await arrived)
        watch.rest()
        await asyncio.sleep(10.0)

    assert await lateness(("idle", 5.0), body) == (None if is_first else "idle")
    assert seen == ([b"chunk"] if is_first else [])


@in_virtual_time
async def test_what_cleans_up_after_lateness_is_not_watched_any_more():
    async def body(watch):
        try:
            await for_ever()
        finally:
            watch.rest()
            watch.expect("closing", 1.0)
            await asyncio.sleep(2.0)

    assert await lateness(("idle", 5.0), body) == "idle"
    assert loop().time() == START + 7.0
    assert not loop().pending


@in_virtual_time
async def test_one_watch_within_another_each_tells_its_own_lateness():
    async def body(_):
        assert await lateness(("inner", 5.0), for_ever) == "inner"
        await for_ever()

    assert await lateness(("outer", 8.0), body) == "outer"
    assert loop().time() == START + 8.0
