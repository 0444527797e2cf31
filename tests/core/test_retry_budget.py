from hypothesis import given
from hypothesis import strategies as st

from proxy.core.retry_budget import FLOOR, SECONDS, SHARE, RetryBudget

events = st.lists(st.tuples(st.booleans(), st.floats(0, 3)), max_size=200)


@given(events)
def test_retries_never_exceed_a_tenth_of_the_successes_and_the_floor(history):
    budget, now = RetryBudget(), 0.0
    successes, retries = [], []
    for succeeded, gap in history:
        now += gap
        if succeeded:
            budget.succeeded(now)
            successes.append(now)
        elif budget.spend(now):
            retries.append(now)
        lately = sum(at > now - SECONDS for at in retries)
        before = sum(at > now - 2 * SECONDS for at in successes)
        assert lately <= SHARE * before + FLOOR * SECONDS


def test_the_floor_serves_who_has_no_successes():
    budget = RetryBudget()
    assert sum(budget.spend(0.0) for _ in range(100)) == FLOOR * SECONDS
    assert not budget.spend(5.0)
    assert sum(budget.spend(10.1) for _ in range(100)) == FLOOR * SECONDS


def test_successes_earn_retries_and_are_forgotten():
    budget = RetryBudget(floor=0.0)
    assert not budget.spend(0.0)
    for _ in range(50):
        budget.succeeded(0.0)
    assert sum(budget.spend(1.0) for _ in range(100)) == 5
    assert not budget.spend(20.0)


def test_a_clock_that_jumps_back_does_not_freeze_the_budget():
    budget = RetryBudget()
    while budget.spend(1000.0):
        pass
    assert not budget.spend(0.0)
    assert budget.spend(10.1)
