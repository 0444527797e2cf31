"""The least time that a provider's limits and latencies allow for documents that pass through stages."""

from __future__ import annotations

import heapq


def least_seconds(documents: int, stages: int, latency: float, *, per_second: float, burst: float) -> float:
    """Seconds until the last document is through, if every call is sent at the first moment at which it may be.

    All take equally long, so the order that ends soonest is that who has most stages before them goes first.

    Args:
        latency: of every call, in seconds.
        per_second, burst: the limit of requests, a bucket that is full at the start.
    """
    left, refilled, now, end = burst, 0.0, 0.0, 0.0
    coming = [(0.0, 0)] * documents  # (when it may go, its stage)
    ready: list[int] = []
    while coming or ready:
        while coming and coming[0][0] <= now:
            heapq.heappush(ready, heapq.heappop(coming)[1])
        left, refilled = min(burst, left + (now - refilled) * per_second), now
        if not ready:
            now = coming[0][0]
        elif left < 1.0 - 1e-9:
            now += (1.0 - left) / per_second
        else:
            left -= 1.0
            stage = heapq.heappop(ready) + 1
            end = max(end, now + latency)
            if stage < stages:
                heapq.heappush(coming, (now + latency, stage))
    return end
