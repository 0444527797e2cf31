"""What a file of prompts becomes, and what it is told where it is wrong."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.bulk.prompts import CHAT, PROBLEMS_TOLD, BadInput, Row, Wanted, opened, rows

M = Wanted("m")


def read(text: str, kind: str, wanted: Wanted = M) -> list[Row]:
    return list(rows(io.StringIO(text, newline=""), kind, wanted))


def prompts(found: list[Row]) -> list[Any]:
    return [row.body["messages"][-1]["content"] for row in found]


def problems(text: str, kind: str, wanted: Wanted = M) -> tuple[str, ...]:
    with pytest.raises(BadInput) as refused:
        read(text, kind, wanted)
    return refused.value.problems


def test_text_is_a_prompt_a_line_without_the_empty_ones() -> None:
    found = read("one\r\n\n  \ntwo {x}\n", "txt")
    assert prompts(found) == ["one", "two {x}"]
    assert [row.number for row in found] == [0, 1]
    assert found[0].body == {"model": "m", "messages": [{"role": "user", "content": "one"}]}


def test_a_csv_fills_the_template_by_its_columns() -> None:
    found = read('\ufeffid,the review\n1,"good, really"\n2,"two\nlines"\n', "csv", Wanted("m", "{id}: {the review}!"))
    assert prompts(found) == ["1: good, really!", "2: two\nlines!"]


def test_a_csv_of_one_column_needs_no_template() -> None:
    assert prompts(read("question\nwhy\nhow\n", "csv")) == ["why", "how"]


def test_json_lines_are_strings_prompts_messages_or_fields() -> None:
    asked = [{"role": "user", "content": "b"}]
    text = "\n".join(map(json.dumps, ("a", {"prompt": "p"}, {"text": "t"}, {"messages": asked}, {"only": [1]})))
    assert prompts(read(text, "jsonl")) == ["a", "p", "t", "b", "[1]"]


def test_a_line_may_name_its_own_model_and_the_command_line_wins() -> None:
    line = json.dumps({"prompt": "p", "model": "own"})
    assert read(line, "jsonl", Wanted())[0].body["model"] == "own"
    assert read(line, "jsonl")[0].body["model"] == "m"


def test_a_system_message_goes_before_and_a_bound_beside() -> None:
    body = read("p\n", "txt", Wanted("m", system="be brief", max_tokens=5))[0].body
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert body["max_tokens"] == 5


def test_lines_of_a_batch_are_taken_as_they_are_but_for_the_model() -> None:
    line = {"custom_id": "mine", "method": "POST", "url": "/v1/embeddings", "body": {"model": "x", "input": "a"}}
    row = read(json.dumps(line), "jsonl", Wanted())[0]
    assert (row.url, row.own_id, row.body) == ("/v1/embeddings", "mine", {"model": "x", "input": "a"})
    assert json.loads(row.line)["custom_id"] == "row-0"
    assert read(json.dumps(line), "jsonl")[0].body == {"model": "m", "input": "a"}


@given(value=st.text(alphabet=st.characters(exclude_categories=["Cs"])), other=st.sampled_from(["{text}", "{a}{b}"]))
def test_what_is_set_into_a_template_is_never_looked_at_again(value: str, other: str) -> None:
    line = json.dumps({"a": value, "text": other})
    assert prompts(read(line, "jsonl", Wanted("m", "<{a}|{text}|{}|{1}>"))) == [f"<{value}|{other}|{{}}|{{1}}>"]


@given(
    st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip), min_size=1)
)
def test_every_prompt_of_a_csv_comes_through_in_its_place(said: list[str]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([["number", "prompt"], *([number, prompt] for number, prompt in enumerate(said))])
    found = read(text.getvalue(), "csv")
    assert prompts(found) == said
    assert [json.loads(row.line)["custom_id"] for row in found] == [f"row-{number}" for number in range(len(said))]


def test_every_mistake_is_told_with_its_line() -> None:
    text = '{"prompt": "fine"}\nno json\n[1]\n{"x": 1, "y": 2}\n{"prompt": NaN}\n{"messages": "hello"}\n'
    told = problems(text, "jsonl")
    assert [line.partition(":")[0] for line in told] == ["line 2", "line 3", "line 4", "line 5", "line 6"]
    assert "--template" in told[2]


@pytest.mark.parametrize(
    ("text", "kind", "wanted", "word"),
    [
        ("", "txt", M, "no prompt"),
        ("a\n", "txt", Wanted(), "-m"),
        ("a\n", "txt", Wanted("m", "{nothing}"), "{text}"),
        ("a,a\n1,2\n", "csv", M, "same name"),
        ("a,b\n1\n", "csv", M, "line 2: has not as many fields"),
        ("a,b\n1,2,3\n", "csv", M, "line 2: has not as many fields"),
        ('a\n"open\n', "csv", M, "line"),
        ('{"custom_id": "1", "url": "/v1/embeddings", "body": {}}\n{"prompt": "x"}\n', "jsonl", M, "split them"),
        ('{"custom_id": "1", "body": {}, "extra": 1}\n', "jsonl", M, "`extra`"),
        ('{"custom_id": 1, "body": {}}\n', "jsonl", M, "`custom_id`"),
        ('{"custom_id": "1", "body": {}}\n', "jsonl", Wanted("m", system="s"), "--system"),
        ("[" * 100_000 + "\n", "jsonl", M, "line 1"),
    ],
)
def test_bad_input_says_what_would_be_right(text: str, kind: str, wanted: Wanted, word: str) -> None:
    assert word in " ".join(problems(text, kind, wanted))


def test_not_more_is_told_than_can_be_read() -> None:
    told = problems("x\n" * 1000, "jsonl")
    assert len(told) == PROBLEMS_TOLD + 1
    assert told[-1] == "... and 980 more"


def test_the_kind_is_known_by_the_name_or_told(tmp_path: Path) -> None:
    (tmp_path / "some.TXT").write_bytes(b"one\ntwo\n")
    with opened(str(tmp_path / "some.TXT"), "") as (lines, kind):
        assert (list(lines), kind) == (["one\n", "two\n"], "txt")
    with pytest.raises(BadInput, match="--format"), opened(str(tmp_path / "some"), ""):
        pass
    with pytest.raises(BadInput, match="cannot be read"), opened(str(tmp_path / "none"), "csv"):
        pass


def test_what_is_not_utf_8_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with (
        opened(str(tmp_path / "latin.txt"), "") as (lines, kind),
        pytest.raises(BadInput, match="line 2: is not UTF-8"),
    ):
        list(rows(lines, kind, M))


def test_a_lone_surrogate_passes() -> None:
    row = read('{"prompt": "\\ud83d"}', "jsonl")[0]
    assert json.loads(row.line)["body"]["messages"][0]["content"] == "\ud83d"
    assert row.url == CHAT
