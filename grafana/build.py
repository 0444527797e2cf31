"""Writes dashboards/*.json anew, from pages/.

python -m grafana.build
"""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana.pages import batches, cost, gate, overview, pipelines, process, streaming
from grafana.panels import Page, assembled

DASHBOARDS = Path(__file__).parent / "dashboards"
PAGES: tuple[Page, ...] = (
    overview.PAGE,
    gate.PAGE,
    streaming.PAGE,
    cost.PAGE,
    process.PAGE,
    batches.PAGE,
    pipelines.PAGE,
)


def written(page: Page) -> str:
    """The page's JSON; the same page is always the same text."""
    return JSONEncoder(sort_keys=True, indent=2).encode(assembled(page)) + "\n"


def main() -> None:
    for page in PAGES:
        (DASHBOARDS / f"{page.name}.json").write_text(written(page))


if __name__ == "__main__":
    main()
