"""What a batch may do, what its input must be, and what became of an item. Rules are those of proxy/core/batch.py."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import batch as rules
from proxy.core.batch import LINES_MAX, MISTAKES_TOLD, Batch, End, Input, NotPossible, Status
from proxy.core.outcome import Outcome, Reason

CHAT = "/v1/chat/completions"


def batch(**said):
    told = {"input_file_id": "i", "output_file_id": "o", "error_file_id": "e", "created_at": 0, "expires_at": 86_400}
    return Batch(id="batch_7f", owner="team", endpoint=CHAT, **told | said)


def request(custom_id="c-1", **said):
    told = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"model": "m", "messages": []}}
    return json.dumps({name: value for name, value in (told | said).items() if value is not None}).encode()


def read(*lines, endpoint=CHAT, line_bytes_max=10_000):
    found, start, taken = Input(endpoint, line_bytes_max), 0, []
    for number, line in enumerate(lines, 1):
        taken.append(found.take(line, number, start))
        start += len(line) + 1
    found.close()
    return found, taken


def mistake(*lines, **how):
    """The only mistake of these lines, as code, line and param."""
    found, _ = read(*lines, **how)
    (only,) = found.mistakes
    return only.code, only.line, only.param


# ── states ──


@given(st.lists(st.sampled_from(Status)))
def test_a_batch_moves_along_the_arrows_and_ends_once(wanted):
    now, ends = batch(), 0
    for number, status in enumerate(wanted):
        try:
            now = rules.moved(now, status, number)
        except NotPossible:
            continue
        ends += now.status.is_final
        assert now.entered[status.value] == number
    assert ends == now.status.is_final
    assert now.status is Status.VALIDATING or now.status.value in now.entered


def test_the_arrows_are_those_that_are_drawn():
    drawn = {
        (Status.VALIDATING, Status.FAILED),
        (Status.VALIDATING, Status.IN_PROGRESS),
        (Status.VALIDATING, Status.CANCELLING),
        (Status.VALIDATING, Status.EXPIRED),
        (Status.IN_PROGRESS, Status.FINALIZING),
        (Status.IN_PROGRESS, Status.CANCELLING),
        (Status.IN_PROGRESS, Status.EXPIRED),
        (Status.FINALIZING, Status.COMPLETED),
        (Status.CANCELLING, Status.CANCELLED),
    }
    for begin in Status:
        for end in Status:
            if (begin, end) in drawn:
                assert rules.moved(batch(status=begin), end, 1.0).status is end
            else:
                with pytest.raises(NotPossible, match=f"is {begin.value} and cannot become {end.value}"):
                    rules.moved(batch(status=begin), end, 1.0)


def test_an_item_has_the_same_id_at_every_run_and_another_one_in_every_batch():
    assert batch().item_id(3) == "batch_req_7f00003" == batch().item_id(3)
    assert len({batch().item_id(line) for line in range(1, LINES_MAX + 1)}) == LINES_MAX


# ── the input ──


def test_lines_are_taken_with_the_place_they_stand_at():
    found, taken = read(request("a"), request("b"))
    assert [(line.number, line.start, line.length, line.custom_id) for line in taken] == [
        (1, 0, len(request("a")), "a"),
        (2, len(request("a")) + 1, len(request("b")), "b"),
    ]
    assert (found.count, found.model, found.mistakes) == (2, "m", [])


def test_blank_lines_and_a_byte_order_mark_are_no_requests():
    found, taken = read(b"\xef\xbb\xbf" + request("a"), b"", b"  \t", request("b"))
    assert [line and (line.number, line.start) for line in taken][:1] == [(1, 3)]
    assert (found.count, found.mistakes) == (2, [])
    assert [line.number for line in taken if line] == [1, 4]


@pytest.mark.parametrize("line", [b"{", b"[1]", b'"text"', b"null", b"\xff\xfe{", b"{}x", b"[" * 9_000])
def test_a_line_that_is_no_object_is_told(line):
    assert mistake(request("a"), line) == ("invalid_json_line", 2, None)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"custom_id": None}, ("missing_required_parameter", 1, "custom_id")),
        ({"custom_id": ""}, ("invalid_type", 1, "custom_id")),
        ({"custom_id": 7}, ("invalid_type", 1, "custom_id")),
        ({"method": None}, ("missing_required_parameter", 1, "method")),
        ({"method": "GET"}, ("invalid_method", 1, "method")),
        ({"url": None}, ("missing_required_parameter", 1, "url")),
        ({"url": "/v1/embeddings"}, ("invalid_url", 1, "url")),
        ({"body": None}, ("missing_required_parameter", 1, "body")),
        ({"body": "text"}, ("invalid_json", 1, "body")),
        ({"body": {"messages": []}}, ("missing_model", 1, "body.model")),
        ({"body": {"model": 7}}, ("invalid_request", 1, "body.model")),
        ({"body": {"model": "m", "stream": True}}, ("invalid_request", 1, "body.stream")),
    ],
)
def test_what_is_wrong_with_a_request_is_told_with_its_line_and_field(wrong, told):
    assert mistake(request(**wrong)) == told


def test_a_custom_id_that_comes_twice_is_told():
    assert mistake(request("a"), request("b"), request("a")) == ("duplicate_custom_id", 3, "custom_id")


def test_all_requests_of_a_batch_ask_one_model():
    other = request("b", body={"model": "other"})
    assert mistake(request("a"), other, request("c")) == ("mismatched_model", 2, "body.model")


def test_an_empty_input_is_told():
    assert mistake() == ("empty_file", None, None)
    assert mistake(b"", b" ") == ("empty_file", None, None)


def test_a_line_too_long_to_be_run_is_told():
    assert mistake(request("a", body={"model": "m", "x": "y" * 10_000})) == ("request_too_large", 1, None)


def test_one_request_too_many_is_told_and_the_rest_need_not_be_read():
    found = Input(CHAT, 10_000)
    for number in range(1, LINES_MAX + 1):
        found.take(request(f"c-{number}"), number, 0)
    assert not found.mistakes
    assert not found.is_hopeless
    assert found.take(request("one more"), LINES_MAX + 1, 0) is None
    assert [(each.code, each.line) for each in found.mistakes] == [("too_many_tasks", None)]
    assert found.is_hopeless


def test_mistakes_are_all_told_up_to_a_bound():
    found, _ = read(*[b"{"] * 3)
    assert [each.line for each in found.mistakes] == [1, 2, 3]
    assert not found.is_hopeless
    found, _ = read(*[b"{"] * MISTAKES_TOLD)
    assert found.is_hopeless


@given(
    st.binary(max_size=200) | st.text().map(str.encode) | st.dictionaries(st.text(), st.text()).map(msgspec.json.encode)
)
def test_no_line_is_beyond_understanding(line):
    found, taken = read(line)
    assert (taken == [None]) or not found.mistakes


# ── what became of an item ──


def test_what_a_limit_or_the_gateway_refused_is_run_again():
    for reason in (Reason.REQUESTS, Reason.TOKENS, Reason.UNNAMED, Reason.SLOW_DOWN, Reason.FULL):
        assert rules.end_of(Outcome.THROTTLED, reason, 429) is End.AGAIN
    assert rules.end_of(Outcome.CANCELLED, Reason.NONE, 0) is End.AGAIN


def test_what_all_others_would_meet_as_well_pauses():
    assert rules.end_of(Outcome.REJECTED, Reason.MONEY, 429) is End.PAUSE
    assert rules.end_of(Outcome.REJECTED, Reason.AUTH, 401) is End.PAUSE
    assert rules.end_of(Outcome.FAILED, Reason.CONNECT, 0) is End.PAUSE


def test_what_is_the_items_own_matter_is_its_end():
    assert rules.end_of(Outcome.OK, Reason.NONE, 200) is End.DONE
    assert rules.end_of(Outcome.REJECTED, Reason.CALLER, 400) is End.FAILED
    assert rules.end_of(Outcome.REJECTED, Reason.TOO_LARGE, 429) is End.FAILED
    assert rules.end_of(Outcome.REJECTED, Reason.AUTH, 403) is End.FAILED
    assert rules.end_of(Outcome.FAILED, Reason.SERVER, 500) is End.FAILED


@given(st.sampled_from(Outcome), st.sampled_from(Reason), st.sampled_from([0, 200, 400, 401, 429, 500]))
def test_money_is_never_an_items_failure(outcome, reason, status):
    if reason is Reason.MONEY and outcome is not Outcome.OK:
        assert rules.end_of(outcome, reason, status) is End.PAUSE


# ── lines of results ──


def test_an_answer_is_one_line_whatever_its_body():
    pretty = b'{\n  "a": 1.10,\n  "b": "x\\ny"\n}'
    line = rules.answered("id", "c", 200, "r", pretty)
    assert line.count(b"\n") == 1
    assert b'{"a":1.10,"b":"x\\ny"}' in line
    assert json.loads(line) == {
        "id": "id",
        "custom_id": "c",
        "response": {"status_code": 200, "request_id": "r", "body": {"a": 1.1, "b": "x\ny"}},
        "error": None,
    }


@given(st.binary())
def test_a_body_that_is_no_json_is_kept_as_a_text(body):
    line = rules.answered("id", "c", 502, "r", body)
    assert line.count(b"\n") == 1
    told = json.loads(line)["response"]["body"]
    assert told == body.decode("utf-8", "replace") or json.loads(body) == told


def test_the_bytes_of_an_answer_stay_as_they_were():
    body = b'{"n":1.0e5,"big":12345678901234567890123,"u":"\\u00e9"}'
    assert body in rules.answered("id", "c", 200, "r", body)


def test_an_item_that_was_not_run_says_why():
    for status, code in ((Status.EXPIRED, "batch_expired"), (Status.CANCELLED, "batch_cancelled")):
        result = rules.unrun(batch(status=status), 2, "c-2")
        told = json.loads(result.line)
        assert not result.is_done
        assert (told["id"], told["custom_id"], told["response"], told["error"]["code"]) == (
            "batch_req_7f00002",
            "c-2",
            None,
            code,
        )
