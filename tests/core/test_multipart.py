"""Rules 1 to 3 of `proxy.core.multipart`."""

import re
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.multipart import HEAD_MAX, PARTS_MAX, VALUE_MAX, Malformed, Scanner, boundary_of

WANTED = frozenset({"model", "stream"})


def part(name, value, more=b"", headers=b""):
    return b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n%b\r\n%b\r\n' % (name, more, headers, value)


FILE = part(b"file", b"\x00\r\n--\r\n--a\r\r\n-", b'; filename="a.wav"', b"Content-Type: audio/wav\r\n")
FORM = FILE + part(b"model", b"whisper-1") + part(b"stream", b"true") + b"--b--\r\n"


def read(form, *cuts):
    scanner = Scanner(b"b", WANTED)
    at = [0, *sorted(cuts), len(form)]
    for begin, end in pairwise(at):
        scanner.feed(form[begin:end])
    scanner.close()
    return {name: (field.value, field.start, field.end) for name, field in scanner.fields.items()}


def told(form, *cuts):
    """What comes of a form: its fields, or what is wrong with it."""
    try:
        return read(form, *cuts)
    except Malformed as error:
        return str(error)


def test_the_wanted_fields_are_found_and_where_they_stand():
    found = read(FORM)
    assert {name: value for name, (value, *_) in found.items()} == {"model": b"whisper-1", "stream": b"true"}
    assert all(FORM[start:end] == value for value, start, end in found.values())


def test_a_form_is_the_same_however_it_is_cut():
    """Rule 1."""
    whole = read(FORM)
    for cut in range(len(FORM) + 1):
        assert read(FORM, cut) == whole
    assert read(FORM, *range(len(FORM))) == whole


@given(st.binary(max_size=60), st.lists(st.integers(0, 400), max_size=8))
def test_any_bytes_may_be_in_a_file(data, cuts):
    form = part(b"file", data, b"; filename=x") + part(b"model", b"m") + b"--b--"
    if b"\r\n--b" in b"\r\n" + data:
        return
    assert read(form, *(min(cut, len(form)) for cut in cuts))["model"][0] == b"m"


@given(st.binary(max_size=60), st.lists(st.integers(0, 400), max_size=8))
def test_the_wanted_file_is_told_as_it_passes(data, cuts):
    """Rules 1 and 3."""
    form = (
        part(b"other", b"y", b"; filename=o") + part(b"file", data, b"; filename=x") + part(b"model", b"m") + b"--b--"
    )
    if b"\r\n--b" in b"\r\n" + data:
        return
    scanner, told = Scanner(b"b", WANTED, "file"), b""
    for begin, end in pairwise([0, *sorted(min(cut, len(form)) for cut in cuts), len(form)]):
        scanner.feed(form[begin:end])
        told += scanner.taken()
    assert (told, scanner.filename, scanner.fields["model"].value) == (data, "x", b"m")


@pytest.mark.parametrize(("said", "name"), [(b"; filename=x", "x"), (b"", ""), (b"; filename*=UTF-8''x", "")])
def test_the_wanted_file_may_have_no_name(said, name):
    scanner = Scanner(b"b", frozenset(), "file")
    scanner.feed(part(b"x", b"") + b"--b\r\n")
    assert scanner.filename is None
    scanner.feed(part(b"file", b"data", said).removeprefix(b"--b\r\n") + b"--b--")
    assert (scanner.filename, scanner.taken(), scanner.taken()) == (name, b"data", b"")


def test_the_wanted_file_does_not_come_twice():
    scanner = Scanner(b"b", frozenset(), "file")
    with pytest.raises(Malformed, match="`file` twice"):
        scanner.feed(part(b"file", b"") * 2)


PIECES = [b"\r\n", b"--b", b"--", b"-", b"\r", b"\n", b" ", b"x", b'Content-Disposition: form-data; name="model"', b":"]


@given(st.lists(st.sampled_from(PIECES), max_size=30), st.lists(st.integers(0, 400), max_size=8))
def test_no_cut_changes_what_is_told_of_any_bytes(pieces, cuts):
    """Rule 1, for what is no form."""
    form = b"".join(pieces)
    one_by_one = told(form, *range(len(form)))
    assert isinstance(told(form), str) == isinstance(one_by_one, str)
    assert told(form, *(min(cut, len(form)) for cut in cuts)) == told(form) or isinstance(told(form), str)


@pytest.mark.parametrize("value", [b"", b"m", b"\r\n", b"\r\n-", b"a\r\n--a", b"x" * VALUE_MAX], ids=repr)
def test_a_value_is_all_that_stands_between(value):
    found, start, end = read(part(b"model", value) + b"--b--\r\n")["model"]
    assert (found, end - start) == (value, len(value))


def test_a_name_may_be_written_in_several_ways():
    for name in (b'name="model"', b"name=model", b'NAME="model"', b'name="mo\\del"'):
        form = b"--b\r\ncontent-disposition: form-data ; %b\r\n\r\nm\r\n--b--" % name
        assert read(form)["model"][0] == b"m"


def test_spaces_may_follow_a_boundary():
    assert read(b'--b \t\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n')["model"][0] == b"m"


MALFORMED = {
    "nothing": b"",
    "no form": b'{"model": "m"}',
    "text before it": b"hello\r\n" + FORM,
    "no end": FORM.removesuffix(b"--b--\r\n"),
    "half an end": FORM.removesuffix(b"--\r\n"),
    "text behind it": FORM + b"hello",
    "another form behind it": FORM + FORM,
    "another boundary": FORM.replace(b"--b", b"--c"),
    "a boundary that goes on": FORM.replace(b"--b\r\n", b"--bb\r\n"),
    "two models": part(b"model", b"a") + part(b"model", b"b") + b"--b--",
    "a model that is a file": part(b"model", b"a", b"; filename=x") + b"--b--",
    "a model without end": part(b"model", b"a" * (VALUE_MAX + 1)) + b"--b--",
    "a form in a form": part(b"x", b"", b"", b"Content-Type: multipart/mixed; boundary=y\r\n") + b"--b--",
    "no name": b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--",
    "no disposition": b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n--b--",
    "no headers": b"--b\r\n\r\nx\r\n--b--",
    "another disposition": b"--b\r\nContent-Disposition: attachment; name=model\r\n\r\nx\r\n--b--",
    "two names": b"--b\r\nContent-Disposition: form-data; name=x; name=model\r\n\r\nx\r\n--b--",
    "two dispositions": b"--b\r\n" + b"Content-Disposition: form-data; name=model\r\n" * 2 + b"\r\nx\r\n--b--",
    "a folded header": b"--b\r\nContent-Disposition: form-data;\r\n name=model\r\n\r\nx\r\n--b--",
    "a line that is no header": b"--b\r\nmodel\r\n\r\nx\r\n--b--",
    "an open quote": b'--b\r\nContent-Disposition: form-data; name="model\r\n\r\nx\r\n--b--',
    "headers without end": b"--b\r\n" + b"x" * (HEAD_MAX + 10),
    "long headers": part(b"x", b"", b"", b"X: %b\r\n" % (b"y" * HEAD_MAX)) + b"--b--",
    "too many parts": part(b"x", b"") * (PARTS_MAX + 1) + b"--b--",
    "ends of lines without CR": FORM.replace(b"\r\n", b"\n"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_has_no_one_reading_is_a_mistake(name):
    """Rule 2."""
    form = MALFORMED[name]
    assert isinstance(told(form), str)
    assert isinstance(told(form, *range(0, len(form), 7)), str)


def test_as_many_parts_as_there_may_be():
    assert read(part(b"x", b"") * PARTS_MAX + b"--b--") == {}


@pytest.mark.parametrize("name", ["b", "a b", "x" * 70, "'()+_,./:=?-"])
def test_a_boundary_is_found(name):
    assert boundary_of(f'multipart/form-data; charset=utf-8; boundary="{name}"') == name.encode()


@pytest.mark.parametrize(
    "said",
    [
        "",
        "application/json",
        "multipart/mixed; boundary=b",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        'multipart/form-data; boundary="b "',
        "multipart/form-data; boundary=" + "x" * 71,
        "multipart/form-data; boundary=a; boundary=b",
        'multipart/form-data; boundary="a\r\nb"',
        "multipart/form-data; boundary=é",
    ],
)
def test_no_boundary_is_a_mistake(said):
    with pytest.raises(Malformed):
        boundary_of(said)


@given(st.text())
def test_no_content_type_does_any_harm(said):
    with suppress(Malformed):
        assert re.fullmatch(rb"[ -~]{1,70}", boundary_of(said))
