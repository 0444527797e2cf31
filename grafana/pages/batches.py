"""Batches: what there is to do, how fast it goes, and what it waits for."""

from __future__ import annotations

from grafana.panels import Page, Query, figure, figures, graph, percentiles, row
from grafana.promql import gauge, increase, level, most, or_zero, quantile, rate

PAGE = Page(
    "batches",
    "Penstock: batches",
    "What the batches that this gateway keeps have still to do, and how fast they do it.",
    (
        figures(
            figure(
                "Open batches",
                "Batches that have not ended.",
                "none",
                level("batch_jobs"),
                decimals=0,
            ),
            figure(
                "Items left",
                "Items of all batches that have not ended.",
                "short",
                level("batch_items_pending"),
                decimals=0,
            ),
            figure(
                "Oldest item",
                "Since when the oldest batch with an item left has been waiting for it.",
                "s",
                or_zero(f"max(time() - {gauge('batch_oldest_item_timestamp_seconds')})"),
                decimals=0,
                steps=((21_600, "orange"), (72_000, "red")),
            ),
            figure(
                "Items ended in this time",
                "Done or failed, over the time that this page shows.",
                "short",
                increase("batch_items", outcome="done|failed"),
                decimals=0,
            ),
            figure(
                "Failed items",
                "Share of the items that ended in this time.",
                "percentunit",
                f"{increase('batch_items', outcome='failed')} "
                f"/ clamp_min({increase('batch_items', outcome='done|failed')}, 1)",
                decimals=1,
                steps=((0.01, "orange"), (0.1, "red")),
            ),
            figure(
                "Until all is done",
                "At the present pace; nothing where nothing ends.",
                "s",
                f"{level('batch_items_pending')} / ({rate('batch_items', outcome='done|failed')} > 0)",
                decimals=0,
            ),
        ),
        row(
            graph(
                "Batches by state",
                "Batches that have not ended.",
                "short",
                Query(level("batch_jobs", "state"), "{{state}}"),
                stacked=True,
            ),
            graph(
                "Items left over time",
                "Items of all batches that have not ended.",
                "short",
                Query(level("batch_items_pending"), "left"),
            ),
            graph(
                "Runs of items by what they came to",
                "Done and failed end an item; again: it is given back, to be run again; pause: given back too, for all "
                "others would be refused as well, for want of money, of a valid credential or of a connection.",
                "ops",
                Query(rate("batch_items", "outcome"), "{{outcome}}"),
                stacked=True,
            ),
        ),
        row(
            graph(
                "Batches ended",
                "In this time, by how.",
                "short",
                Query(increase("batch_jobs_finished", "outcome"), "{{outcome}}"),
            ),
            graph(
                "Time of a batch",
                "From its making to its end.",
                "s",
                *percentiles("batch_job_duration_seconds"),
            ),
            graph(
                "Webhook",
                "Tries to tell of a batch's end. Failed ones are tried again, for days; dropped: nobody was told.",
                "short",
                Query(increase("batch_webhooks", "result"), "{{result}}"),
            ),
            graph(
                "Oldest item by gateway",
                "Since when the oldest batch with an item left has been waiting for it, by gateway.",
                "s",
                Query(
                    most("instance", f"time() - {gauge('batch_oldest_item_timestamp_seconds')}"),
                    "{{instance}}",
                ),
            ),
        ),
        row(
            graph(
                "Batch calls before the gates",
                "Calls of class batch that wait, by the gate that keeps them. Few of each batch stand there, however "
                "many items it has.",
                "short",
                Query(level("gate_queue_depth", "gate", priority="batch"), "{{gate}}"),
            ),
            graph(
                "Wait of batch calls for a place, p95",
                "By gate; one admitted at once counts as 0. Interactive and default calls go first.",
                "s",
                Query(quantile(0.95, "gate_queue_wait_seconds", "gate", priority="batch"), "{{gate}}"),
            ),
            graph(
                "Batch calls let in",
                "Calls of class batch that asked for their places: let in at once, after a wait, or refused and why.",
                "reqps",
                Query(rate("gate_admissions", "result", priority="batch"), "{{result}}"),
                stacked=True,
            ),
        ),
    ),
)
