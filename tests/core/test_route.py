import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.route import PACED_LIMIT, Tries


def tried(tries, failures):
    """The targets that are asked, where the best one is always free, and each fails."""
    order = [tries.targets[0]]
    while len(order) < failures and tries.failed(order[-1]):
        order.append(tries.targets[0])
    return "".join(order)


def test_each_target_is_tried_once_before_any_is_tried_again():
    assert tried(Tries(tuple("abc"), 10), 8) == "abcabcab"


def test_a_target_that_failed_is_left_alone_though_another_was_chosen():
    a, b, c = targets = tuple("abc")
    tries = Tries(targets, 10)
    tries.failed(b)
    assert tries.targets == (a, c)
    tries.failed(a)
    assert tries.targets == (c,)
    tries.failed(c)
    assert tries.targets == targets


@given(st.integers(1, 5), st.integers(1, 10))
def test_no_more_attempts_fail_than_allowed(targets, attempts):
    tries = Tries(tuple(range(targets)), attempts)
    made = 1
    while tries.failed(tries.targets[0]):
        made += 1
    assert made == attempts == tries.failures


@pytest.mark.parametrize("targets", ["a", "ab", "abc"])
def test_a_target_not_tried_yet_is_no_reason_to_pause(targets):
    tries = Tries(tuple(targets), 10)
    for number in range(1, 7):
        tries.failed(tries.targets[0])
        assert tries.is_fresh == (number < len(targets))


def test_a_refusal_by_a_limit_is_no_failure_and_keeps_the_target():
    tries = Tries(tuple("ab"), 1)
    for _ in range(PACED_LIMIT):
        assert tries.refused()
    assert (tries.failures, tries.targets) == (0, ("a", "b"))
    assert not tries.refused()
