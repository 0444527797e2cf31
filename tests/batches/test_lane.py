"""How many items stand before the gate, and when none but a probe does."""

import asyncio

import pytest

from proxy.batches.lane import AHEAD, BREATH_SECONDS, PAUSE_SECONDS, Lane, Pause
from tests.virtual_time import START, everybody_waits, in_virtual_time, loop

MONEY = Pause("money", "no credit", 0.0)


def lane(ahead=AHEAD):
    return Lane(loop().time, lambda: ahead)


async def waits(task):
    await everybody_waits()
    return not task.done()


@in_virtual_time
async def test_items_are_taken_up_to_a_bound_and_more_when_half_of_them_were_let_in():
    one = lane(8)
    assert await one.room() == 8
    more = asyncio.create_task(one.room())
    for _ in range(3):
        one.leave()
    assert await waits(more)
    one.leave()
    assert await more == 4


@in_virtual_time
async def test_where_there_are_more_lanes_each_has_fewer_and_at_least_one():
    most = 8
    one = Lane(loop().time, lambda: most)
    assert await one.room() == 8
    most = 1
    more = asyncio.create_task(one.room())
    for _ in range(7):
        one.leave()
    assert await waits(more)
    one.leave()
    assert await more == 1


@in_virtual_time
async def test_several_batches_take_turns():
    one = lane(2)
    assert await one.room() == 2
    first, second = asyncio.create_task(one.room()), asyncio.create_task(one.room())
    await everybody_waits()
    one.leave()
    assert await first == 1
    assert await waits(second)
    one.leave()
    assert await second == 1


@in_virtual_time
async def test_places_that_were_not_used_are_free_at_once():
    one = lane(8)
    one.give_back(await one.room())
    assert await one.room() == 8


@in_virtual_time
async def test_a_pause_lets_one_probe_go_after_5_then_10_then_20_seconds_and_its_answer_ends_it():
    one = lane(8)
    for _ in range(await one.room()):
        one.leave()
        one.stop(MONEY, None)  # all that were under way are refused alike: that is one refusal
    assert one.pause is MONEY
    waited = []
    for _ in range(3):
        began = loop().time()
        assert await one.room() == 1
        waited.append(round(loop().time() - began, 3))
        one.leave()
        another = asyncio.create_task(one.room())
        assert await waits(another)  # one probe at a time
        another.cancel()
        one.stop(MONEY, None)
    assert waited == [5.0, 10.0, 20.0]
    assert await one.room() == 1
    one.leave()
    one.answered()
    assert one.pause is None
    assert await one.room() == 8


@in_virtual_time
async def test_a_pause_is_as_long_as_was_said_but_a_minute_at_most():
    one = lane()
    one.stop(MONEY, 900.0)
    await one.room()
    assert loop().time() - START == pytest.approx(PAUSE_SECONDS[1])


@in_virtual_time
async def test_a_probe_that_is_taken_away_makes_room_for_another():
    one = lane()
    one.stop(MONEY, None)
    assert await one.room() == 1
    one.leave()
    one.given_up()
    assert await one.room() == 1
    one.give_back(1)  # a batch that had no item left to probe with
    assert await one.room() == 1


@in_virtual_time
async def test_after_a_refusal_at_the_gate_the_next_come_a_little_later_and_after_an_items_own_failure_at_once():
    one = lane()
    one.breathe(0.0)
    one.give_back(await one.room())
    assert loop().time() == START
    one.breathe(None)
    await one.room()
    assert loop().time() - START == pytest.approx(BREATH_SECONDS)
