"""A file of prompts as lines of a batch.

    .txt     a prompt a line; empty lines are passed over       {text}
    .csv     a header, then a prompt a row                      {column}
    .jsonl   a JSON object or a string a line                   {field}
             or whole lines of OpenAI's batch format, taken as they are

Without a template the prompt is the line, the string, or the field `prompt` or `text`; `messages` in an object are
taken as they are. Every mistake is found before anything is sent.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROBLEMS_TOLD = 20
_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_ .-]*)\}")
_OF_BATCH = {"custom_id", "method", "url", "body"}
CHAT = "/v1/chat/completions"
KINDS = ("txt", "csv", "jsonl")


class BadInput(Exception):
    """The input cannot be run; `problems` are all that was found, each with its row."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(slots=True, frozen=True)
class Wanted:
    """How prompts become calls.

    Attributes:
        model: "" only where every line names its own.
        template: with `{field}` for what each row has; "": the prompt as it is.
        system: a system message before each prompt; "": none.
        max_tokens: the most an answer may have; None: as the model will.
    """

    model: str = ""
    template: str = ""
    system: str = ""
    max_tokens: int | None = None


@contextmanager
def opened(name: str, kind: str) -> Iterator[tuple[Iterable[str], str]]:
    """The input's lines, and what kind of file it is.

    Args:
        name: of the file; `-` is stdin.
        kind: as told, or "": by the name.

    Raises:
        BadInput: it cannot be read, or what it is cannot be told.
    """
    kind = kind or Path(name).suffix.lstrip(".").lower()
    if kind not in KINDS:
        raise BadInput(f"is of no kind known here; say --format {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if name == "-":
        yield _text_of(sys.stdin.buffer), kind
        return
    try:
        file = open(name, "rb")  # noqa: SIM115  # closed below; an error of its reader is not one of opening it
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}") from None
    with file:
        yield _text_of(file), kind


def _text_of(lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise BadInput(f"line {number}: is not UTF-8 (at byte {error.start + 1}); save it as UTF-8") from None


@dataclass(slots=True, frozen=True)
class Row:
    """One prompt on its way.

    Attributes:
        number: its place in the input, from 0.
        url: the endpoint that is asked.
        body: of the call.
        own_id: the `custom_id` that the input gave it; "" if none.
    """

    number: int
    url: str
    body: Mapping[str, Any]
    own_id: str = ""

    @property
    def model(self) -> str:
        return sys.intern(str(self.body.get("model", "")))

    @property
    def line(self) -> bytes:
        """Its line in a batch. The place is its `custom_id`, so any answer finds its way back."""
        said = {"custom_id": f"row-{self.number}", "method": "POST", "url": self.url, "body": self.body}
        return encoded(said) + b"\n"


def encoded(said: object) -> bytes:
    """JSON in UTF-8; escaped throughout where it holds half a surrogate pair, which UTF-8 has no bytes for."""
    try:
        return json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(said, separators=(",", ":")).encode()


def rows(lines: Iterable[str], kind: str, wanted: Wanted) -> Iterator[Row]:
    """Read the input.

    Args:
        lines: of text, with their ends.
        kind: txt, csv or jsonl.

    Raises:
        BadInput: after the last line, with every mistake; what came before it is of no use then.
    """
    problems: list[str] = []
    urls: set[str] = set()
    number = 0
    for where, said in _read(lines, kind, problems):
        try:
            row = _row(number, said, wanted)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        if row.url not in urls and urls:
            problems.append(f"{where}: its url is {row.url}, but that of the lines before is {min(urls)}; split them")
        urls.add(row.url)
        number += 1
        if not problems:
            yield row
    if not number and not problems:
        problems.append("there is no prompt in it")
    if problems:
        more = len(problems) - PROBLEMS_TOLD
        raise BadInput(*problems[:PROBLEMS_TOLD], *([f"... and {more} more"] if more > 0 else []))


def _read(lines: Iterable[str], kind: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """(where it stands, what it says) of each row; what cannot be read goes to `problems`."""
    if kind == "csv":
        yield from _of_csv(lines, problems)
        return
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n").removeprefix("\ufeff" if number == 1 else "")
        if not text.strip():
            continue
        if kind == "txt":
            yield f"line {number}", text
            continue
        try:
            said = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: is not JSON: {error}")
            continue
        if not isinstance(said, dict | str):
            problems.append(f"line {number}: must be a JSON object or a string")
            continue
        yield f"line {number}", said


def _of_csv(lines: Iterable[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(_without_mark(lines), strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            problems.append("line 1: two columns have the same name; rename one")
            return
        for said in reader:
            where = f"line {reader.line_num}"
            if None in said or None in said.values():
                problems.append(f"{where}: has not as many fields as the header, which has {len(names)}")
                continue
            if any(said.values()):
                yield where, said
    except csv.Error as error:
        problems.append(f"line {reader.line_num + 1}: {error}")


def _without_mark(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield line if number else line.removeprefix("\ufeff")


def _no_constant(said: str) -> None:
    raise ValueError(f"{said} is no JSON")


def _row(number: int, said: Any, wanted: Wanted) -> Row:
    """
    Raises:
        ValueError: says what is wrong with it.
    """
    if isinstance(said, dict) and said.keys() >= {"custom_id", "body"}:
        return _of_batch(number, said, wanted)
    fields = {"text": said, "prompt": said} if isinstance(said, str) else said
    messages = fields.get("messages")
    if wanted.template or messages is None:
        messages = [{"role": "user", "content": _prompt(fields, wanted.template)}]
    elif not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ValueError("`messages` must be a list of objects with role and content")
    if wanted.system:
        messages = [{"role": "system", "content": wanted.system}, *messages]
    model = wanted.model or fields.get("model", "")
    if not isinstance(model, str) or not model:
        raise ValueError("names no model; give one with -m, or a field `model`")
    body: dict[str, Any] = {"model": model, "messages": messages}
    if wanted.max_tokens is not None:
        body["max_tokens"] = wanted.max_tokens
    return Row(number, CHAT, body)


def _of_batch(number: int, said: Mapping[str, Any], wanted: Wanted) -> Row:
    """A line of OpenAI's batch format; only the model of the command line is set in."""
    if unknown := said.keys() - _OF_BATCH:
        raise ValueError(f"a line of a batch has no field `{min(unknown)}`")
    own_id, url, body = said["custom_id"], said.get("url", CHAT), said["body"]
    if not isinstance(own_id, str) or not isinstance(url, str) or not isinstance(body, dict):
        raise ValueError("`custom_id` and `url` must be strings, and `body` an object")
    if wanted.template or wanted.system:
        raise ValueError("is a whole line of a batch; --template and --system have no place in it")
    return Row(number, url, {**body, "model": wanted.model} if wanted.model else body, own_id)


def _prompt(fields: Mapping[str, Any], template: str) -> str:
    """The template with the row's values set in, each once: what is set in is not looked at again."""
    if not template:
        for name in ("prompt", "text"):
            if name in fields:
                return _text(fields, name)
        if len(fields) == 1:
            return _text(fields, next(iter(fields)))
        raise ValueError(
            f"has no field `prompt`; name the field in a --template, such as '{{{next(iter(fields), '')}}}'"
        )

    def value(found: re.Match[str]) -> str:
        if found[1] not in fields:
            there = ", ".join(f"{{{name}}}" for name in fields) or "none"
            raise ValueError(f"has nothing for {found[0]} of the template; there is {there}")
        return _text(fields, found[1])

    return _FIELD.sub(value, template)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
