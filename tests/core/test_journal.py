from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.journal import JITTER, Journal, features

gaps = st.lists(st.floats(0, 0.3), max_size=60)


@given(gaps)
def test_a_mark_knows_who_was_sent_shortly_before_and_after(pauses):
    journal, now, marks = Journal(), 0.0, []
    for pause in pauses:
        now += pause
        marks.append(journal.write(features(1_000.0, None), now))
    later = journal.write(features(0.0, 0), now + 10.0)
    for mark in marks:
        before = sum(0.0 <= mark.at - other.at <= JITTER and other.calls < mark.calls for other in marks)
        around, sums = journal.around(mark)
        assert sums == (float(around), 0.0, float(around))
        assert mark.calls - 1 - mark.since[0] == before
        after = around - before
        exact = sum(other.calls > mark.calls and other.at - mark.at <= JITTER for other in marks)
        assert exact <= after <= later.calls - mark.calls
        assert after == exact or marks[-1].at - mark.at <= JITTER or after <= exact + 1


def test_what_was_sent_before_an_instant_is_remembered_for_a_minute():
    journal = Journal()
    for second in range(200):
        journal.write(features(500.0, None), float(second))
    assert journal.before(190.0)[0] == 190
    assert journal.before(150.5)[0] == 150
    assert journal.before(0.0)[0] >= 200 - 63  # long ago: the earliest that is remembered
    assert Journal().before(0.0)[0] == 0
    assert journal.began == 0.0
