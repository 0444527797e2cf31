"""YAML text -> plain values and the line of each, or what is wrong with the text.

Stricter than YAML: a key written twice is a mistake, every key is text as it stands (`on`, `5` and `null` may be
names), a date is text, and tags are refused. Anchors, aliases and `<<` work, within bounds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from proxy.config.problems import Path

DEPTH_MAX = 32  # the deepest setting is at 5
VALUES_MAX = 50_000  # after aliases are followed: ten levels of ten aliases each would be 10**10

_TAG = "tag:yaml.org,2002:"
_QUOTED = re.compile(r"['\"](.*?)['\"]")
_TOKEN = re.compile(r"<[a-z ]+>|\\?.")  # the name of a token, or one character


@dataclass(slots=True)
class Document:
    """What was read. `value` holds dicts with text keys, lists, text, numbers, booleans and None, and nothing else."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)  # of the key, or of the item of a list; counted from 1
    mistakes: list[tuple[Path, int | None, str]] = field(default_factory=list)
    broken: set[Path] = field(default_factory=set)  # values that could not be read, None in `value`
    whole: bool = True  # False: the text could not be read to its end, so `value` says nothing


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEPTH_MAX:  # the composer calls itself: the interpreter's stack is not to decide this
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=parent.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read(text: str) -> Document:
    """Reads one YAML document. Never raises: what is wrong stands in `mistakes`, and quotes no value."""
    document = Document()
    try:
        loader = _Loader(text)
        document.value = _Reader(document, loader).value(loader.get_single_node(), (), 0)
    except yaml.reader.ReaderError as error:
        at = text.count("\n", 0, error.position) + 1
        return Document(mistakes=[((), at, "holds a character that YAML does not allow; take it out")], whole=False)
    except yaml.MarkedYAMLError as error:
        return Document(mistakes=[((), *_syntax(error, text))], whole=False)
    return document


class _Reader:
    def __init__(self, document: Document, loader: _Loader) -> None:
        self.document = document
        self.loader = loader
        self.seen = 0

    def value(self, node: yaml.Node | None, path: Path, depth: int) -> Any:
        self.seen += 1
        if depth > DEPTH_MAX or self.seen > VALUES_MAX:
            assert node is not None  # only the document itself may be empty
            raise yaml.MarkedYAMLError(problem="too many values or levels", problem_mark=node.start_mark)
        match node:
            case yaml.MappingNode() if node.tag == f"{_TAG}map":
                return self.mapping(node, path, depth)
            case yaml.SequenceNode() if node.tag == f"{_TAG}seq":
                items = []
                for index, item in enumerate(node.value):
                    self.document.lines[*path, index] = _line(item)
                    items.append(self.value(item, (*path, index), depth + 1))
                return items
            case yaml.ScalarNode():
                return self.scalar(node, path)
            case None:
                return None
        return self.unusable(path, node, "has a YAML tag (!); take the tag out")

    def mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            line = _line(key_node)
            if key_node.tag == f"{_TAG}merge":
                sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for source in reversed(sources):  # the first source wins
                    said = self.value(source, path, depth + 1)
                    if isinstance(said, dict):
                        merged |= said
                    else:
                        self.mistake(path, key_node, "`<<` takes a mapping or a list of mappings; give it one")
            elif not isinstance(key, str) or _broken(key):
                self.mistake(path, key_node, "holds a key that is not text; write it as plain text")
            else:
                here = (*path, key)
                if key in first:
                    self.mistake(here, key_node, f"stands twice, first on line {first[key]}; keep one of them")
                first[key] = self.document.lines[here] = line
                own[key] = self.value(value_node, here, depth + 1)
        return merged | own

    def scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        text: str = node.value
        try:
            match node.tag.removeprefix(_TAG):
                case "str" | "timestamp" | "value" | "merge":  # a lone `=` or `<<` means itself
                    return text if not _broken(text) else self.unusable(path, node, "holds half a character")
                case "null":
                    return None
                case "bool":
                    return self.loader.construct_yaml_bool(node)
                case "int":
                    return self.loader.construct_yaml_int(node)
                case "float":
                    return self.loader.construct_yaml_float(node)
        except (ValueError, KeyError, IndexError):  # too many digits, or a tag on what is no number
            return self.unusable(path, node, "is not a number that can be read; write it in plain digits")
        return self.unusable(path, node, "has a YAML tag (!); take the tag out")

    def unusable(self, path: Path, node: yaml.Node, message: str) -> Any:
        self.document.broken.add(path)
        self.mistake(path, node, message)
        return None

    def mistake(self, path: Path, node: yaml.Node, message: str) -> None:
        self.document.mistakes.append((path, _line(node), message))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _broken(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _syntax(error: yaml.MarkedYAMLError, text: str) -> tuple[int | None, str]:
    """Line and message. The parser's words may quote what it found: the value of a secret, if it is not quoted well."""
    said = _QUOTED.sub(lambda quoted: quoted[0] if _TOKEN.fullmatch(quoted[1]) else "…", error.problem or "unreadable")
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return None, f"is not YAML: {said}"
    line = text.splitlines()[mark.line : mark.line + 1]
    hint = "; put ${NAME} in quotes" if line and "${" in line[0] else ""  # its { opens a mapping within { } and [ ]
    return mark.line + 1, f"is not YAML: {said}, in column {mark.column + 1}{hint}"
