import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import backoff

draws = st.floats(0, 1, exclude_max=True)
seconds = st.floats(0.01, 1e4)


@given(st.integers(0, 10**6), draws, seconds, seconds, st.none() | st.floats(0, 1e5))
def test_a_pause_is_within_its_stretch_and_no_shorter_than_asked(attempt, draw, one, other, retry_after):
    base, cap = sorted((one, other))
    pause = backoff.delay(attempt, draw, base=base, cap=cap, retry_after=retry_after)
    assert pause >= (retry_after or 0.0)
    assert pause < min(cap, base * 2.0 ** min(attempt, 100)) or pause == retry_after


@given(draws, draws, st.integers(0, 20))
def test_the_stretch_doubles_until_its_cap_and_the_draw_ranges_over_all_of_it(one, other, attempt):
    def pause(draw, attempt):
        return backoff.delay(attempt, draw, base=1.0, cap=2.0**10, retry_after=None)

    assert pause(one, attempt + 1) == pytest.approx(pause(one, attempt) * (2 if attempt < 10 else 1))
    assert (pause(one, attempt) < pause(other, attempt)) <= (one < other)
    assert pause(0.0, attempt) == 0.0


@given(st.floats(0, 1e6), draws)
def test_those_told_to_come_back_come_within_a_fifth_of_the_time(wait, draw):
    assert wait * 0.8 <= backoff.spread(wait, draw) <= wait * 1.2
