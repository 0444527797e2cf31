"""Durable work: files and batches that outlive the process.

    store.py    what a store can do, and its rules            <- begin here
    sqlite.py   the one that lasts          memory.py  its twin for tests
    inputs.py   the bytes of uploaded files
    runner.py   every open batch, from its first state to its last
    lane.py     how many items stand before the gate
    item.py     one item as an ordinary call
    handing.py  a batch that its provider runs, by provider.py, its Files and Batch API
    webhook.py  who is told that a batch has ended
    service.py  all of it, as the endpoints ask for it

What a batch may do is decided in `proxy.core.batch`.
"""

from proxy.batches.inputs import Arrival
from proxy.batches.lane import Pause
from proxy.batches.service import Batches, Wanted
from proxy.batches.store import Page

__all__ = ["Arrival", "Batches", "Page", "Pause", "Wanted"]
