"""Bars as SVG, by hand: a row for each pattern, as long as the calls a second that it has answered, and what failed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, ROW, LEFT, EDGE = 760, 26, 260, 12
ANSWERED, FAILED = "#2b7bba", "#b3261e"


def bars(title: str, rows: Sequence[tuple[str, int, int, float]]) -> str:
    """
    Args:
        rows: (name, answered, failed, answered a second).
    """
    most = max((rate for *_, rate in rows), default=1.0)
    room = WIDTH - LEFT - 220
    parts = [f'<text x="{EDGE}" y="22" font-weight="bold">{escape(title)}</text>']
    for number, (name, answered, failed, rate) in enumerate(rows):
        top = 36 + number * ROW
        length = max(1.0, room * rate / most)
        lost = f' <tspan fill="{FAILED}">{failed} of {answered + failed} failed</tspan>' if failed else ""
        parts += [
            f'<text x="{EDGE}" y="{top + 14}">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="18" fill="{ANSWERED}"/>',
            f'<text x="{LEFT + length + 8:.1f}" y="{top + 14}">{rate:.1f}/s{lost}</text>',
        ]
    height = 46 + len(rows) * ROW
    box = f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"
