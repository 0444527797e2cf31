"""What is refused before anybody looks at what a request asks for: how it is framed, and where it points.

A parser lets through what two of them would read differently, and what is read differently is how a request is
smuggled past a check. So a request is refused, and its connection ended, unless there is one way to read it. Nothing
here or behind it decides by a request's host, or by its URL as a library made it up: only by the target as it came.
"""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import unquote

from aiohttp import web
from aiohttp.http import HttpVersion10, HttpVersion11
from aiohttp.typedefs import RawHeaders

from proxy.errors import (
    GatewayError,
    HeadersTooLarge,
    InvalidRequest,
    Malformed,
    MethodNotImplemented,
    VersionNotSupported,
)

HEADERS = 128
HEADERS_BYTES = 16 << 10  # names and values
LINE_BYTES = 8190  # the longest target, and the longest header
HEAD_BYTES = HEADERS_BYTES + LINE_BYTES + (1 << 10)  # all of a head as it comes, with what separates its parts

_NAMES = "/v1/models/"  # what follows is one name, and may have slashes of its own, encoded or not
_PATH = re.compile(r"/[!$%&'()*+,\-./0-9:;=@A-Z_a-z~]*")
_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_STRAY = re.compile(r"%(?![0-9A-Fa-f]{2})")


def objection(request: web.BaseRequest, longest_head: int) -> GatewayError | None:
    """What is wrong with how a request is framed; None if there is one way to read it.

    Args:
        longest_head: bytes that its head does not exceed; its headers are counted only where they may be too many.
    """
    headers, version = request.headers, request.version
    if version != HttpVersion11 and version != HttpVersion10:
        return VersionNotSupported("this is neither HTTP/1.1 nor HTTP/1.0; speak one of them")
    if request.method in ("TRACE", "CONNECT"):
        return MethodNotImplemented(f"{request.method} is not possible here; a gateway is no proxy")
    if "transfer-encoding" in headers:
        if version == HttpVersion10:
            return Malformed("HTTP/1.0 has no transfer-encoding; send content-length, or speak HTTP/1.1")
        if headers["transfer-encoding"].lower() != "chunked":
            return Malformed("the only transfer-encoding understood here is chunked; send the body as it is")
    if "#" in request.raw_path:
        return Malformed("the target holds a fragment (#), which is the client's own; take it out")
    if not _is_host(headers.get("host", "")):
        return Malformed("the header host is not a host with a port; send one")
    if longest_head > HEADERS_BYTES and _size(request.raw_headers) > HEADERS_BYTES:
        return HeadersTooLarge(f"the headers are larger than {HEADERS_BYTES} bytes; send fewer or shorter ones")
    return None


def _size(headers: RawHeaders) -> int:
    return sum(len(name) + len(value) for name, value in headers)


@lru_cache(maxsize=128)  # nearly always the same one
def _is_host(said: str) -> bool:
    return _HOST.fullmatch(said) is not None


def path(target: str) -> str:
    """The path of a target (without its query), decoded once: what routes are looked up by.

    Raises:
        InvalidRequest: there are two ways to read it. It is no path of ours, or it leads upwards, has empty parts, or
            hides a slash, a backslash or what is no character in an encoding.
    """
    if not _PATH.fullmatch(target) or _STRAY.search(target):
        raise _invalid("must be a path that begins with a slash, without host or fragment, and percent-encoded")
    try:
        decoded = unquote(target, errors="strict")
    except UnicodeDecodeError:
        raise _invalid("is not UTF-8 where it is percent-encoded") from None
    if not decoded.isprintable() or "\\" in decoded:
        raise _invalid("holds a backslash or a control character")
    parts = decoded.split("/") if target.startswith(_NAMES) else [unquote(part) for part in target.split("/")]
    if "" in parts[1:-1]:
        raise _invalid("has an empty part (//); does base_url end in a slash too many?")
    if any(part in (".", "..") or "/" in part for part in parts):
        raise _invalid("leads elsewhere (`.`, `..` or an encoded slash); write it out")
    return decoded


def _invalid(what: str) -> InvalidRequest:
    return InvalidRequest(f"the request's path {what}", code="invalid_path")
