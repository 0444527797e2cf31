"""The files of either API, and OpenAI's uploads that make large ones out of parts; in memory, as much of them as
KEPT_BYTES.

create -> listed, shown, read, deleted        upload -> part ... part -> complete -> a file
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from mimetypes import guess_type
from typing import Annotated

import msgspec

from proxy.simulator.asks import BadAsk, NoSuch, decode
from proxy.simulator.rooms import Content, Deed, Sent, listed

KEPT_BYTES = 256 << 20
_LEAST = 1 << 10  # bytes that the smallest one is counted as
_PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
_LISTED = 10_000
_UPLOAD_SECONDS = 3600
_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class _File:
    id: str
    name: str
    purpose: str
    content: bytes
    created: int

    def told(self, *, to_anthropics: bool = False) -> dict[str, object]:
        if to_anthropics:
            return {
                "id": self.id,
                "type": "file",
                "filename": self.name,
                "mime_type": guess_type(self.name)[0] or "application/octet-stream",
                "size_bytes": len(self.content),
                "created_at": datetime.fromtimestamp(self.created, UTC).isoformat(),
                "downloadable": True,
            }
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": self.created,
            "expires_at": None,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class _Beginning(msgspec.Struct):
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    filename: str
    mime_type: str
    purpose: str


class _End(msgspec.Struct):
    part_ids: list[str]


@dataclass(slots=True)
class _Upload:
    id: str
    said: _Beginning
    created: int
    status: str = "pending"
    parts: dict[str, bytes] = field(default_factory=dict)
    file: _File | None = None

    def told(self) -> bytes:
        said = self.said
        return _encode(
            {
                "id": self.id,
                "object": "upload",
                "bytes": said.bytes,
                "created_at": self.created,
                "expires_at": self.created + _UPLOAD_SECONDS,
                "filename": said.filename,
                "purpose": said.purpose,
                "status": self.status,
                "file": self.file.told() if self.file else None,
            }
        )


class Files:
    """All files and uploads of one provider."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._uploads: dict[str, _Upload] = {}
        self._size = 0

    def deeds(self) -> list[tuple[str, str, Deed]]:
        return [
            ("POST", "/v1/files", self._create),
            ("GET", "/v1/files", self._list),
            ("GET", "/v1/files/{id}", self._show),
            ("DELETE", "/v1/files/{id}", self._delete),
            ("GET", "/v1/files/{id}/content", self._content),
            ("POST", "/v1/uploads", self._begin),
            ("POST", "/v1/uploads/{id}/parts", self._add),
            ("POST", "/v1/uploads/{id}/complete", self._complete),
            ("POST", "/v1/uploads/{id}/cancel", self._cancel),
        ]

    def _create(self, sent: Sent) -> bytes:
        form = sent.form()
        file = form.file("file")
        purpose = "user_data" if sent.is_anthropics else _purpose(form.must("purpose"))
        self._make_room(file.content)
        made = self._put(sent.serial, file.name, purpose, file.content)
        return _encode(made.told(to_anthropics=sent.is_anthropics))

    def _list(self, sent: Sent) -> bytes:
        """The newest first, unless it is asked for otherwise."""
        query = sent.query
        limit = query.get("limit", str(_LISTED))
        if not limit.isdecimal() or not 1 <= int(limit) <= _LISTED:
            raise BadAsk(f"Invalid 'limit': must be from 1 to {_LISTED}.")
        found = [file for file in self._files.values() if query.get("purpose", file.purpose) == file.purpose]
        if query.get("order", "desc") == "desc":
            found.reverse()
        names = [file.id for file in found]
        after = query.get("after_id" if sent.is_anthropics else "after", "")
        begin = names.index(after) + 1 if after in names else 0
        page = found[begin : begin + int(limit)]
        told = [file.told(to_anthropics=sent.is_anthropics) for file in page]
        return listed(told, has_more=begin + len(page) < len(found))

    def _show(self, sent: Sent) -> bytes:
        return _encode(self._find(sent.id).told(to_anthropics=sent.is_anthropics))

    def _content(self, sent: Sent) -> Content:
        file = self._find(sent.id)
        return Content(file.content, file.name)

    def _delete(self, sent: Sent) -> bytes:
        file = self._find(sent.id)
        del self._files[file.id]
        self._size -= _weight(file.content)
        if sent.is_anthropics:
            return _encode({"id": file.id, "type": "file_deleted"})
        return _encode({"id": file.id, "object": "file", "deleted": True})

    def _begin(self, sent: Sent) -> bytes:
        said = decode(sent.body, _Beginning)
        _purpose(said.purpose)
        self._make_room(b"")
        upload = _Upload("upload_" + sent.serial, said, int(time.time()))
        self._uploads[upload.id] = upload
        return upload.told()

    def _add(self, sent: Sent) -> bytes:
        upload = self._pending(sent.id)
        data = sent.form().file("data").content
        self._make_room(data)
        identity = "part_" + sent.serial
        upload.parts[identity] = data
        told = {"id": identity, "object": "upload.part", "created_at": int(time.time()), "upload_id": upload.id}
        return _encode(told)

    def _complete(self, sent: Sent) -> bytes:
        upload = self._pending(sent.id)
        wanted = decode(sent.body, _End).part_ids
        if missing := [part for part in wanted if part not in upload.parts]:
            raise BadAsk(f"Invalid part_ids: the upload has no part '{missing[0]}'.")
        content = b"".join(upload.parts[part] for part in wanted)
        if len(content) != upload.said.bytes:
            raise BadAsk(f"The parts have {len(content)} bytes, the upload was to have {upload.said.bytes}.")
        self._give_up(upload)
        self._make_room(content)
        upload.status = "completed"
        upload.file = self._put(sent.serial, upload.said.filename, upload.said.purpose, content)
        return upload.told()

    def _cancel(self, sent: Sent) -> bytes:
        upload = self._pending(sent.id)
        self._give_up(upload)
        upload.status = "cancelled"
        return upload.told()

    def _put(self, serial: str, name: str, purpose: str, content: bytes) -> _File:
        file = _File("file-" + serial, name, purpose, content, int(time.time()))
        self._files[file.id] = file
        return file

    def _make_room(self, content: bytes) -> None:
        """For what is to be kept. Raises BadAsk where there is none."""
        for upload in list(self._uploads.values()):  # the oldest first
            if time.time() < upload.created + _UPLOAD_SECONDS:
                break
            self._give_up(upload)
        if self._size + _weight(content) > KEPT_BYTES:
            raise BadAsk(f"No more than {KEPT_BYTES >> 20} MB of files are kept here; delete some.")
        self._size += _weight(content)

    def _give_up(self, upload: _Upload) -> None:
        """Forget its parts, and the upload itself."""
        del self._uploads[upload.id]
        self._size -= _weight(b"") + sum(map(_weight, upload.parts.values()))

    def _find(self, identity: str) -> _File:
        if identity not in self._files:
            raise NoSuch(f"No such File object: {identity}")
        return self._files[identity]

    def _pending(self, identity: str) -> _Upload:
        if identity not in self._uploads:
            raise NoSuch(f"No such Upload object that is pending: {identity}")
        return self._uploads[identity]


def _purpose(said: str) -> str:
    if said not in _PURPOSES:
        raise BadAsk(f"Invalid 'purpose': '{said}'. Supported values are: {', '.join(_PURPOSES)}.")
    return said


def _weight(content: bytes) -> int:
    return max(_LEAST, len(content))
