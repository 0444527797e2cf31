"""A program that opens many connections and says half of a request on each: `python -m tests.e2e.half_open PORT COUNT`.

It is one of its own because a process may open only so many files, and the gateway needs as many. When all connections
are there it prints "open"; when all have been closed, how many got a 408 first.
"""

from __future__ import annotations

import selectors
import socket
import sys

from proxy.app import allow_descriptors
from tests.e2e.wire import request

WHOLE = request()


def main(port: int, count: int) -> None:
    allow_descriptors()
    selector = selectors.DefaultSelector()
    for number in range(count):
        line = socket.create_connection(("127.0.0.1", port))
        line.sendall(WHOLE[: 1 + number % (len(WHOLE) - 1)])
        line.setblocking(False)
        selector.register(line, selectors.EVENT_READ, bytearray())
    print("open", flush=True)
    refused = 0
    while selector.get_map():
        for key, _ in selector.select():
            line = key.fileobj
            assert isinstance(line, socket.socket)
            try:
                told = line.recv(1 << 16)
            except ConnectionError:
                told = b""
            key.data.extend(told)
            if not told:
                refused += b" 408 " in key.data[:16] and key.data.endswith(b"}}")
                selector.unregister(line)
                line.close()
    print(refused, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
