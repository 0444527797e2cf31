"""Pipelines: what becomes of their steps, how long each takes, and where runs are meanwhile."""

from __future__ import annotations

from grafana.panels import Page, Query, figure, figures, graph, row
from grafana.promql import increase, mean, quantile, rate

RAN = "ok|fallback|skipped|failed|cancelled"  # all but the steps whose condition did not hold
ENDED = "ok|fallback|skipped|failed"  # those that were not given up with their run

PAGE = Page(
    "pipelines",
    "Penstock: pipelines",
    "What becomes of the steps of pipelines, and how long they take. Their calls are on the other pages, by model.",
    (
        figures(
            figure(
                "Steps a second",
                "Steps that ran, over all pipelines; a step that is mapped counts once.",
                "ops",
                rate("pipeline_steps", result=RAN),
            ),
            figure(
                "Steps in this time",
                "Steps that ran, over the time that this page shows.",
                "short",
                increase("pipeline_steps", result=RAN),
                decimals=0,
            ),
            figure(
                "Failed steps",
                "Share of the steps that ended in this time; each of them is a run that failed.",
                "percentunit",
                f"{increase('pipeline_steps', result='failed')} "
                f"/ clamp_min({increase('pipeline_steps', result=ENDED)}, 1)",
                decimals=1,
                steps=((0.01, "orange"), (0.1, "red")),
            ),
            figure(
                "Mended steps",
                "Share of the steps in this time that on_error mended: another model answered, or they gave nothing.",
                "percentunit",
                f"{increase('pipeline_steps', result='fallback|skipped')} "
                f"/ clamp_min({increase('pipeline_steps', result=ENDED)}, 1)",
                decimals=1,
                steps=((0.05, "orange"), (0.25, "red")),
            ),
            figure(
                "Steps under way",
                "In the mean, over all pipelines: the seconds that steps took, for each second that passed.",
                "short",
                rate("pipeline_step_duration_seconds", part="sum"),
                decimals=1,
            ),
        ),
        row(
            graph(
                "Steps by what became of them",
                "Fallback: another model answered. Skipped: it failed, and the run goes on without it. Omitted: its "
                "condition did not hold. Cancelled: its run failed elsewhere, or its client left.",
                "ops",
                Query(rate("pipeline_steps", "result"), "{{result}}"),
                stacked=True,
            ),
            graph(
                "Steps that failed",
                "By step; each is a run that failed.",
                "ops",
                Query(rate("pipeline_steps", "step", result="failed"), "{{step}}"),
            ),
            graph(
                "Steps that on_error mended",
                "By step, answered by another model or left empty.",
                "ops",
                Query(rate("pipeline_steps", "step", result="fallback|skipped"), "{{step}}"),
            ),
        ),
        row(
            graph(
                "Where runs are",
                "In the mean, steps under way by step. The highest is where runs spend their time.",
                "short",
                Query(rate("pipeline_step_duration_seconds", "step", part="sum"), "{{step}}"),
                stacked=True,
            ),
            graph(
                "Time of a step, mean",
                "From its start to its end, the waits of its calls and all items of a map among it.",
                "s",
                Query(mean("pipeline_step_duration_seconds", "step"), "{{step}}"),
            ),
            graph(
                "Time of a step, p95",
                "From its start to its end, the waits of its calls and all items of a map among it.",
                "s",
                Query(quantile(0.95, "pipeline_step_duration_seconds", "step"), "{{step}}"),
            ),
        ),
    ),
)
