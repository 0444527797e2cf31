"""The rules of `proxy.api.bodies`."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.api.bodies import SMALL, Bodies
from proxy.errors import BodiesFull
from tests.virtual_time import in_virtual_time, run

MIB = 1 << 20
BUDGET = 2 * MIB


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


def taking(bodies, size, seconds=10.0):
    return asyncio.ensure_future(bodies.take(size, BUDGET, seconds))


@in_virtual_time
async def test_a_small_body_never_waits():
    """Rule 2."""
    bodies = Bodies()
    await bodies.take(BUDGET, BUDGET, 0.0)
    for _ in range(100):
        await bodies.take(SMALL, BUDGET, 0.0)
        bodies.grow(SMALL, 0, BUDGET)
    assert bodies.held == BUDGET + 200 * SMALL


@in_virtual_time
async def test_large_bodies_wait_their_turn():
    """Rules 1 and 3."""
    bodies = Bodies()
    await bodies.take(BUDGET, BUDGET, 0.0)
    first, second, third = taking(bodies, MIB), taking(bodies, 2 * MIB), taking(bodies, MIB)
    await settled()
    assert not first.done()
    bodies.leave(BUDGET)
    await settled()
    assert (first.done(), second.done(), third.done()) == (True, False, False)  # the third would fit, but came later
    bodies.leave(MIB)
    await settled()
    assert (second.done(), third.done(), bodies.held) == (True, False, 2 * MIB)
    bodies.leave(2 * MIB)
    await third
    assert bodies.held == MIB


@in_virtual_time
async def test_who_finds_no_room_in_time_is_refused_and_those_behind_go_on():
    bodies = Bodies()
    await bodies.take(MIB, BUDGET, 0.0)
    late, behind = taking(bodies, 2 * MIB, 3.0), taking(bodies, MIB)
    began = asyncio.get_running_loop().time()
    with pytest.raises(BodiesFull, match="no room"):
        await late
    assert asyncio.get_running_loop().time() - began == 3.0
    await behind
    assert bodies.held == 2 * MIB


@in_virtual_time
async def test_a_body_that_grows_too_large_is_refused():
    """Rule 4."""
    bodies = Bodies()
    await bodies.take(BUDGET - 2 * SMALL, BUDGET, 0.0)
    bodies.grow(SMALL, 0, BUDGET)
    bodies.grow(SMALL, SMALL, BUDGET)
    with pytest.raises(BodiesFull):
        bodies.grow(1, 2 * SMALL, BUDGET)
    assert bodies.held == BUDGET


@given(st.lists(st.tuples(st.sampled_from(["take", "leave", "cancel", "wait"]), st.integers(0, 9)), max_size=60))
def test_what_is_held_is_what_was_let_in_whatever_happens(steps):
    """Rules 1 to 3, over every history; whoever is cancelled in the moment of its turn among them."""

    async def live():
        bodies, waiting, inside = Bodies(), [], []

        def let_in():
            inside.extend(size for size, task in waiting if task.done() and not task.cancelled())
            waiting[:] = [(size, task) for size, task in waiting if not task.done()]

        for step, number in steps:
            if step == "take":
                size = (number + 1) * 200_000
                waiting.append((size, taking(bodies, size)))
            elif step == "leave" and inside:
                bodies.leave(inside.pop(number % len(inside)))
            elif step == "cancel" and waiting:
                waiting[number % len(waiting)][1].cancel()
            elif step == "wait":
                await settled()
                let_in()
                assert bodies.held == sum(inside) <= BUDGET
                assert not waiting or bodies.held + waiting[0][0] > BUDGET
        for _, task in waiting:
            task.cancel()
        await settled()
        let_in()
        assert (bodies.held, waiting) == (sum(inside), [])

    run(live())
