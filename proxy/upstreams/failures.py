"""What aiohttp's client raises, in the words of the relay."""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp.http import HttpProcessingError

from proxy.core.outcome import Reason


def reason_of(error: BaseException) -> Reason:
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.ClientHttpProxyError):
        return Reason.CONNECT
    if isinstance(error, aiohttp.ClientPayloadError):
        return Reason.RESET
    if isinstance(error, aiohttp.ClientResponseError | HttpProcessingError | aiohttp.InvalidURL):
        return Reason.GARBAGE
    if isinstance(error, asyncio.TimeoutError):
        return Reason.CONNECT
    return Reason.RESET
