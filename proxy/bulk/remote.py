"""A gateway's Files and Batches API, as the command line uses it: a connection a request, no file held in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

PATIENCE_SECONDS = 60.0  # for an answer; a file of 200 MB is stored before it comes
PIECE = 1 << 16  # bytes of a file that are sent or written at once
_BOUNDARY = "penstock-batch-of-prompts"
PAGE = 100  # batches listed at a time

Batch = Mapping[str, Any]


class Unreachable(Exception):
    """Nobody answers there; the message says what was tried."""


class Refused(Exception):
    """The gateway's own word why not."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Remote:
    """
    Args:
        url: the gateway's, with or without `/v1`.
        key: a caller's; "" where none is asked for.

    Every method raises:
        Unreachable: there is no answer.
        Refused: the answer is an error.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Unreachable(f"{url} is not the URL of a gateway; write it like http://127.0.0.1:8080")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def is_there(self) -> bool:
        """Whether a gateway of ours answers here; never raises."""
        try:
            with self._asked("GET", "/v1/models") as answer:
                return answer.getheader("server") == "penstock"
        except Unreachable:
            return False

    def upload(self, file: Path, name: str) -> str:
        """Hand in the lines of a batch; returns the file's id."""
        head = (
            f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n'
            "content-type: application/jsonl\r\n\r\n"
        ).encode()
        tail = f"\r\n--{_BOUNDARY}--\r\n".encode()
        headers = {
            "content-type": f"multipart/form-data; boundary={_BOUNDARY}",
            "content-length": str(len(head) + file.stat().st_size + len(tail)),
        }
        with (
            file.open("rb") as source,
            self._asked("POST", "/v1/files", headers, _between(head, source, tail)) as answer,
        ):
            return str(_said(answer)["id"])

    def create(self, file: str, url: str, metadata: Mapping[str, str]) -> Batch:
        return self._json(
            "POST",
            "/v1/batches",
            {"input_file_id": file, "endpoint": url, "completion_window": "24h", "metadata": metadata},
        )

    def batch(self, batch: str) -> Batch:
        return self._json("GET", f"/v1/batches/{quote(batch, safe='')}")

    def cancel(self, batch: str) -> Batch:
        return self._json("POST", f"/v1/batches/{quote(batch, safe='')}/cancel")

    def batches(self) -> Iterator[Batch]:
        """All of them, newest first."""
        after = ""
        while True:
            page = self._json("GET", f"/v1/batches?limit={PAGE}" + (f"&after={quote(after, safe='')}" if after else ""))
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]

    def download(self, file: str, into: IO[bytes]) -> None:
        with self._asked("GET", f"/v1/files/{quote(file, safe='')}/content") as answer:
            if answer.status >= 400:
                _said(answer)
            try:
                while piece := answer.read(PIECE):
                    into.write(piece)
            except (OSError, HTTPException) as error:
                raise Unreachable(f"{self.url} broke off while file {file} was read ({error})") from None

    def _json(self, method: str, path: str, said: object = None) -> dict[str, Any]:
        body = None if said is None else json.dumps(said).encode()
        with self._asked(method, path, {"content-type": "application/json"} if body else {}, body) as answer:
            return _said(answer)

    @contextmanager
    def _asked(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: Any = None
    ) -> Iterator[HTTPResponse]:
        kind = HTTPSConnection if self._secure else HTTPConnection
        connection = kind(self._host, self._port, timeout=PATIENCE_SECONDS)
        try:
            try:
                connection.request(method, self._path + path, body=body, headers={**self._headers, **(headers or {})})
                answer = connection.getresponse()
            except (OSError, HTTPException) as error:
                raise Unreachable(f"no gateway at {self.url} ({error}); is it running, and is --url right?") from None
            yield answer
        finally:
            connection.close()


def _between(head: bytes, source: IO[bytes], tail: bytes) -> Iterator[bytes]:
    yield head
    while piece := source.read(PIECE):
        yield piece
    yield tail


def _said(answer: HTTPResponse) -> dict[str, Any]:
    """What a JSON answer says.

    Raises:
        Refused: it is an error.
    """
    try:
        said = json.loads(answer.read())
    except (OSError, HTTPException, ValueError):
        said = {}
    if answer.status < 400 and isinstance(said, dict):
        return said
    error = said.get("error") if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    if answer.status == 401:
        raise Refused(401, f"{message or 'the gateway asks for a key'} (give it with --key or PENSTOCK_KEY)")
    raise Refused(answer.status, str(message or f"the gateway answered {answer.status} without saying why"))
