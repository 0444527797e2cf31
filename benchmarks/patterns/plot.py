"""Bars as SVG, by hand: a row for each pattern, what was answered and what failed, and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, ROW, LEFT = 760, 26, 250


def bars(title: str, rows: Sequence[tuple[str, int, int, float]]) -> str:
    """
    Args:
        rows: (name, answered, failed, calls a second).
    """
    most = max((rate for *_, rate in rows), default=1.0)
    room = WIDTH - LEFT - 190
    parts = [f'<text x="0" y="16" font-weight="bold">{escape(title)}</text>']
    for number, (name, answered, failed, rate) in enumerate(rows):
        top = 30 + number * ROW
        length = max(1.0, room * rate / most)
        lost = length * failed / max(1, answered + failed)
        told = f"{rate:.1f}/s" + (f", {failed} failed" if failed else "")
        parts += [
            f'<text x="0" y="{top + 14}">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{length - lost:.1f}" height="18" fill="#2b7bba"/>',
            f'<rect x="{LEFT + length - lost:.1f}" y="{top}" width="{lost:.1f}" height="18" fill="#c8452f"/>',
            f'<text x="{LEFT + length + 8:.1f}" y="{top + 14}">{told}</text>',
        ]
    height = 40 + len(rows) * ROW
    box = f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"
