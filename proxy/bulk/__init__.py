"""`penstock batch`: a file of prompts, answered in its order, by the batches of a gateway.

    prompts.py    a file (.txt, .csv, .jsonl) -> lines of a batch, or every mistake with its row
    gateways.py   the gateway that does it: one that runs, or one in this process
    remote.py     a gateway's Files and Batches API
    run.py        the life of one run, and what is noted so that it can be taken up again      <- begin here
    screen.py     how far it is, and the tables

The gateway does the work: it keeps the batch on disk, paces it and tries again. This package hands in and collects, so
a command that is killed loses nothing, and neither does a gateway.
"""

from proxy.bulk.gateways import gateway, running
from proxy.bulk.prompts import BadInput, Wanted, opened, rows
from proxy.bulk.remote import Batch, Refused, Remote, Unreachable
from proxy.bulk.run import Run, Stopped, run
from proxy.bulk.screen import Progress, table

__all__ = [
    "BadInput",
    "Batch",
    "Progress",
    "Refused",
    "Remote",
    "Run",
    "Stopped",
    "Unreachable",
    "Wanted",
    "gateway",
    "opened",
    "rows",
    "run",
    "running",
    "table",
]
