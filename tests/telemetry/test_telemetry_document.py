"""The page of the documentation says what the catalogue says."""

from __future__ import annotations

from pathlib import Path

from proxy.telemetry import catalogue, document

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_that_is_kept_is_the_catalogue():
    assert PAGE.read_text() == document.page(), "run `python -m proxy.telemetry.document > docs/metrics.md`"


def test_every_family_every_label_and_every_bound_stands_on_it():
    page = document.page()
    for family in catalogue.FAMILIES:
        assert f"| `{document.metric_name(family)}` | {family.kind.value} | {', '.join(family.labels)} |" in page
        for label in family.labels:
            if family.labels[label]:
                assert f"\n| {label} " in page
        if family.buckets:
            assert " ".join(f"{bound:.10g}" for bound in family.buckets) in page


def test_no_line_of_a_table_breaks_it():
    rows = [line for line in document.page().splitlines() if line.startswith("|")]
    assert all(line.count("|") - line.count("\\|") in (3, 5) for line in rows)
