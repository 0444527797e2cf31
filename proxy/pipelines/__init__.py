"""Pipelines: several calls that are one to whoever makes it.

running.py   one run: which steps begin when, what becomes of those that fail      <- begin here
asking.py    one call of a step: its request, and what its answer gave
giving.py    the answer of the whole, at once or as a stream
"""

from proxy.pipelines.running import Pipelines

__all__ = ["Pipelines"]
