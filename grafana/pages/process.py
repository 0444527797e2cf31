"""The gateway itself: what it spends of time, CPU and memory, and what it runs."""

from __future__ import annotations

from grafana.pages import shared
from grafana.panels import Page, Query, figure, figures, graph, percentiles, row
from grafana.promql import GARBAGE, WITHIN, gauge, increase, level, quantile, rate, target

PAGE = Page(
    "process",
    "Penstock: process",
    "What the gateway itself spends, and whether its configuration, its logs and its metrics are whole.",
    (
        figures(
            figure(
                "Running",
                "Version, revision and Python of each gateway.",
                "none",
                level("build_info", "version, revision, python", how="count"),
                names="{{version}} {{revision}}, Python {{python}}",
            ),
            figure(
                "Up for",
                "Since the start of the youngest process.",
                "s",
                f"time() - max({target('process_start_time_seconds')})",
                decimals=0,
            ),
            figure(
                "Configuration",
                "Whether the configuration on file is the one in force, on every gateway.",
                "none",
                level("config_last_reload_successful", how="min"),
                words={1: ("in force", "green"), 0: ("refused", "red")},
            ),
            figure(
                "Taking calls",
                "Whether any gateway finishes its calls and takes no new ones.",
                "none",
                level("draining", how="max"),
                words={0: ("yes", "green"), 1: ("draining", "orange")},
            ),
            figure(
                "Telemetry lost",
                "Spans and lines of the logs that were not written, over the time that this page shows.",
                "short",
                increase("telemetry_dropped"),
                decimals=0,
                steps=((1, "orange"),),
            ),
            figure(
                "Series",
                "Series that the gateways tell at a scrape, all together.",
                "short",
                f"sum({target('scrape_samples_scraped')})",
                decimals=0,
                steps=((25_000, "orange"), (50_000, "red")),
            ),
        ),
        row(
            shared.overhead(),
            graph(
                "Overhead, streams and others, p95",
                "What the gateway itself spent; a stream's grows with its chunks.",
                "s",
                Query(quantile(0.95, "overhead_seconds", "stream"), "stream: {{stream}}"),
            ),
            graph(
                "Stages, p95",
                "Where the gateway's own time goes in one request, waits taken out: auth (the key), parse (the body "
                "and its route), route (the gates), send (the request made), relay (the answer passed on), usage "
                "(settled), log (this accounting).",
                "s",
                Query(quantile(0.95, "stage_duration_seconds", "stage"), "{{stage}}"),
            ),
        ),
        row(
            graph(
                "Stages, of each second",
                "How much of a second all requests together spend in each stage: what there is to gain.",
                "percentunit",
                Query(rate("stage_duration_seconds", "stage", part="sum"), "{{stage}}"),
                stacked=True,
            ),
            graph(
                "Lag of the event loop",
                "How much later than asked for the loop woke a sleeper. What blocks it delays every call.",
                "s",
                *percentiles("event_loop_lag_seconds"),
                lines=((0.1, "orange"),),
            ),
            graph(
                "CPU",
                "Of one core; the event loop has no more than one.",
                "percentunit",
                Query(f"rate({target('process_cpu_seconds_total')}[{WITHIN}])", "{{instance}}"),
                lines=((0.8, "orange"),),
            ),
        ),
        row(
            graph(
                "Memory",
                "What the process holds of it.",
                "bytes",
                Query(target("process_resident_memory_bytes"), "{{instance}}"),
            ),
            graph(
                "Descriptors",
                "Open files, of which each call in flight needs two; and how many there may be.",
                "short",
                Query(target("process_open_fds"), "{{instance}} open"),
                Query(target("process_max_fds"), "{{instance}} most"),
            ),
            graph(
                "Garbage collections",
                "By generation. Those of the oldest stop the process for longest.",
                "cps",
                Query(f"sum by (generation) (rate({target(GARBAGE)}[{WITHIN}]))", "generation {{generation}}"),
            ),
        ),
        row(
            graph(
                "Reloads of the configuration",
                "In this time, by how they ended. One that failed left the old configuration in force.",
                "short",
                Query(increase("config_reloads", "result"), "{{result}}"),
            ),
            graph(
                "Age of the configuration",
                "How long ago the configuration in force was loaded, of the gateway where it is oldest.",
                "s",
                Query(f"time() - min({gauge('config_last_reload_success_timestamp_seconds')})", "oldest"),
            ),
            graph(
                "Telemetry lost, and why",
                "Spans and lines of the logs that were not written.",
                "cps",
                Query(rate("telemetry_dropped", "signal, reason"), "{{signal}}: {{reason}}"),
            ),
        ),
        row(
            graph(
                "Label values replaced",
                "Values that became `other`: not in the configuration, or beyond the label's cap.",
                "cps",
                Query(rate("label_overflow", "label"), "{{label}}"),
            ),
            graph(
                "Scrapes",
                "How long Prometheus waits for the metrics.",
                "s",
                Query(target("scrape_duration_seconds"), "{{instance}}"),
            ),
            shared.ages(),
        ),
    ),
)
