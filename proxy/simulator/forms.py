"""Forms (multipart/form-data) as they are uploaded: bytes -> fields and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message

from proxy.simulator.asks import BadAsk


@dataclass(frozen=True, slots=True)
class File:
    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """`files` stand in their order, under their fields' names without the `[]` of a list."""

    fields: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, list[File]] = field(default_factory=dict)

    def must(self, name: str) -> str:
        """A field. Raises BadAsk where it is missing."""
        if not self.fields.get(name):
            raise BadAsk(f"Missing required parameter: '{name}'.")
        return self.fields[name]

    def file(self, name: str) -> File:
        """The first file of that name. Raises BadAsk where it is missing."""
        if name not in self.files:
            raise BadAsk(f"Missing required file: '{name}'.")
        return self.files[name][0]


def read(body: bytes, content_type: str) -> Form:
    """Raises BadAsk."""
    boundary = _parameters("content-type", content_type).get("boundary", "")
    if not content_type.lower().startswith("multipart/form-data") or not boundary:
        raise BadAsk("Send the body as multipart/form-data, with a boundary.")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode())
    if len(parts) < 2 or not parts[-1].startswith(b"--"):
        raise BadAsk("The form breaks off before its end.")
    fields: dict[str, str] = {}
    files: dict[str, list[File]] = {}
    for part in parts[1:-1]:
        head, blank, content = part.partition(b"\r\n\r\n")
        said = next((line for line in head.split(b"\r\n") if line.lower().startswith(b"content-disposition:")), b"")
        told = _parameters("content-disposition", said.partition(b":")[2].decode(errors="replace").strip())
        if not blank or "name" not in told:
            raise BadAsk("A part of the form has no name.")
        name = told["name"].removesuffix("[]")
        if "filename" in told:
            files.setdefault(name, []).append(File(told["filename"], content))
        else:
            fields[name] = content.decode(errors="replace")
    return Form(fields, files)


def _parameters(name: str, value: str) -> dict[str, str]:
    message = Message()
    message[name] = value
    return {key.lower(): said for key, said in message.get_params([], header=name) if isinstance(said, str)}
