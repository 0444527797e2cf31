"""Reads a form as it passes by in pieces: which fields it has and where they stand, and whether it is one at all.

    START -> HEAD <-> BODY -> END         a boundary line ends START and each BODY; `--` after it ends the form

1. However its bytes are cut, the same form gives the same fields, or the same mistake at the latest with the same byte.
2. It is read strictly: what two readers could take for two different forms is a mistake. So no text stands before the
   first boundary or behind the last, no part is a form of its own, no parameter comes twice, and no header is folded.
3. Of a file nothing is kept, but what came last of the one that is wanted; of a wanted field its value, which is short.

Source: RFC 7578 (multipart/form-data), RFC 2046, 5.1.1 (boundaries).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import Enum, auto

BOUNDARY_MAX = 70  # characters (RFC 2046)
HEAD_MAX = 16 << 10  # bytes of a part's headers
VALUE_MAX = 1024  # bytes of a wanted field
PARTS_MAX = 1000

_WORD = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_PARAMETER = re.compile(rf'\s*;\s*({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s";]+))')
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]*[0-9A-Za-z'()+_,./:=?-]")


class Malformed(ValueError):
    """The body is not a form that has one reading. The message says why."""


@dataclass(slots=True, frozen=True)
class Field:
    """A field that is no file: its value, and the bytes of the body at which it begins and ends."""

    value: bytes
    start: int
    end: int


class _State(Enum):
    START = auto()
    AFTER_BOUNDARY = auto()
    HEAD = auto()
    BODY = auto()
    END = auto()


def boundary_of(content_type: str) -> bytes:
    """The boundary that a content type names.

    Raises:
        Malformed: it is not multipart/form-data, or names none that may be one.
    """
    kind, parameters = _parameters(content_type)
    if kind.lower() != "multipart/form-data":
        raise Malformed("the body must be multipart/form-data")
    boundary = parameters.get("boundary", "")
    if len(boundary) > BOUNDARY_MAX or not _BOUNDARY.fullmatch(boundary):
        raise Malformed(f"the content type must name a boundary of 1 to {BOUNDARY_MAX} characters")
    return boundary.encode()


class Scanner:
    """The state of one form, as far as its bytes have been fed.

    Args:
        wanted: names of the fields whose values are kept.
        file: name of the file whose bytes are wanted, see `taken`; None: of none.

    Attributes:
        fields: the wanted ones that have passed whole.
        filename: of the wanted file, "" where it has no name; None until it has begun.
    """

    __slots__ = (
        "_at",
        "_delimiter",
        "_file",
        "_held",
        "_in_file",
        "_name",
        "_parts",
        "_start",
        "_state",
        "_taken",
        "_value",
        "_wanted",
        "fields",
        "filename",
    )

    def __init__(self, boundary: bytes, wanted: Set[str], file: str | None = None) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._wanted, self._file = wanted, file
        self._held = b"\r\n"  # as if a line had ended: then the first boundary is like the others
        self._at = -2  # where in the body `_held` begins
        self._state = _State.START
        self._parts = 0
        self._name: str | None = None  # of the part that is being read, where it is wanted
        self._start = 0
        self._value = b""
        self._in_file = False
        self._taken: list[bytes] = []
        self.fields: dict[str, Field] = {}
        self.filename: str | None = None

    def taken(self) -> bytes:
        """What has passed of the wanted file since the last call."""
        taken = b"".join(self._taken)
        self._taken.clear()
        return taken

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes, cut anywhere. Raises Malformed."""
        self._held += chunk
        while self._step():
            pass

    def close(self) -> None:
        """The body is over.

        Raises:
            Malformed: the form is not.
        """
        if self._state is not _State.END:
            raise Malformed("the form has no end: its last boundary is missing")

    def _step(self) -> bool:
        """Read on. False: more bytes are needed."""
        match self._state:
            case _State.START:
                return self._begin()
            case _State.AFTER_BOUNDARY:
                return self._after_boundary()
            case _State.HEAD:
                return self._head()
            case _State.BODY:
                return self._body()
            case _State.END:
                if self._held.strip(b"\r\n"):
                    raise Malformed("there is something behind the form's last boundary")
                self._take(len(self._held))
                return False

    def _take(self, count: int) -> bytes:
        taken, self._held = self._held[:count], self._held[count:]
        self._at += count
        return taken

    def _begin(self) -> bool:
        seen = self._held[: len(self._delimiter)]
        if not self._delimiter.startswith(seen):
            raise Malformed("the form does not begin with its boundary")
        if len(seen) < len(self._delimiter):
            return False
        self._take(len(seen))
        self._state = _State.AFTER_BOUNDARY
        return True

    def _after_boundary(self) -> bool:
        """`--` ends the form; spaces and a line's end begin a part."""
        if self._held.startswith(b"--"):
            self._take(2)
            self._state = _State.END
            return True
        line, found, _ = self._held.partition(b"\r\n")
        rest = line.strip(b" \t")
        if (rest and rest not in (b"-", b"\r")) or len(line) > HEAD_MAX or (found and rest):
            raise Malformed("a boundary is followed by something else than the end of its line")
        if not found:
            return False
        self._parts += 1
        if self._parts > PARTS_MAX:
            raise Malformed(f"the form has more than {PARTS_MAX} parts")
        self._take(len(line))  # the line's end is the head's, which may be empty
        self._state = _State.HEAD
        return True

    def _head(self) -> bool:
        end = self._held.find(b"\r\n\r\n")
        if end > HEAD_MAX or (end < 0 and len(self._held) > HEAD_MAX + 4):
            raise Malformed(f"the headers of a part are longer than {HEAD_MAX} bytes")
        if end < 0:
            return False
        head = self._take(end + 4)[2:-4]
        self._begin_part(head)
        self._start, self._value = self._at, b""
        # The part's body may be empty: then its boundary's line end is the head's.
        self._held, self._at = b"\r\n" + self._held, self._at - 2
        self._state = _State.BODY
        return True

    def _begin_part(self, head: bytes) -> None:
        name, filename = _described(head)
        self._name = name if name in self._wanted else None
        self._in_file = name == self._file
        if self._name is not None and filename is not None:
            raise Malformed(f"`{name}` is a file; send it as a plain field")
        if name in self.fields or (self._in_file and self.filename is not None):
            raise Malformed(f"the form has `{name}` twice")
        if self._in_file:
            self.filename = filename or ""

    def _body(self) -> bool:
        end = self._held.find(self._delimiter)
        passed = len(self._held) - len(self._delimiter) + 1 if end < 0 else end
        if passed > 0:
            begin = max(0, self._start - self._at)
            taken = self._take(passed)
            if self._in_file:
                self._taken.append(taken[begin:])
            elif self._name is not None:
                self._value += taken[begin:]
                if len(self._value) > VALUE_MAX:
                    raise Malformed(f"`{self._name}` is longer than {VALUE_MAX} bytes")
        if end < 0:
            return False
        if self._name is not None:
            self.fields[self._name] = Field(self._value, self._start, max(self._start, self._at))
        self._take(len(self._delimiter))
        self._state = _State.AFTER_BOUNDARY
        return True


def _described(head: bytes) -> tuple[str, str | None]:
    """The name of a part, and that of its file; None where it is none."""
    headers: dict[str, str] = {}
    for line in head.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        text = name.decode("latin-1")
        if not colon or not re.fullmatch(_WORD, text):
            raise Malformed("a part of the form has a line among its headers that is none")
        if text.lower() in headers:
            raise Malformed(f"a part of the form has the header {text[:100]} twice")
        headers[text.lower()] = value.decode("utf-8", "replace").strip()
    if headers.get("content-type", "").lower().startswith("multipart/"):
        raise Malformed("a part of the form is a form itself; send its fields one by one")
    kind, parameters = _parameters(headers.get("content-disposition", ""))
    if kind.lower() != "form-data" or "name" not in parameters:
        raise Malformed("a part of the form does not say which field it is (content-disposition: form-data; name=)")
    return parameters["name"], parameters.get("filename", "" if "filename*" in parameters else None)


def _parameters(said: str) -> tuple[str, Mapping[str, str]]:
    """The value of a header, and its parameters."""
    kind, _, _ = said.partition(";")
    found: dict[str, str] = {}
    at = len(kind)
    while match := _PARAMETER.match(said, at):
        name = match[1].lower()
        if name in found:
            raise Malformed(f"a header has the parameter {name[:100]} twice")
        found[name] = match[3] if match[2] is None else re.sub(r"\\(.)", r"\1", match[2])
        at = match.end()
    if said[at:].strip("; \t"):
        raise Malformed("a header has a parameter that cannot be read")
    return kind.strip(), found
