"""A bar chart as SVG text, without dependencies."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

ROW, GAP, LABEL, WIDTH = 14, 10, 300, 420  # pixels
LEGEND_COLUMNS, LEGEND_WIDTH = 5, 150
COLOURS = ("#3b6ea8", "#8ab17d", "#e9c46a", "#c8553d", "#6d597a", "#2a9d8f", "#b5838d", "#555555", "#a3b18a", "#023047")


def bars(title: str, values: Sequence[tuple[str, str, float]]) -> str:
    """Horizontal bars of (group, series, value): groups from above in their order, one colour for each series."""
    groups = list(dict.fromkeys(group for group, _, _ in values))
    series = list(dict.fromkeys(name for _, name, _ in values))
    highest = max((value for _, _, value in values), default=1.0) or 1.0
    parts = []
    for index, name in enumerate(series):
        row, column = divmod(index, LEGEND_COLUMNS)
        x, y = 10 + LEGEND_WIDTH * column, 24 + ROW * row
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{COLOURS[index % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 14}" y="{y + 9}">{escape(name)}</text>')
    y = 44 + ROW * ((len(series) - 1) // LEGEND_COLUMNS)
    for group in groups:
        mine = [(name, value) for of, name, value in values if of == group]
        parts.append(
            f'<text x="{LABEL - 6}" y="{y + ROW * len(mine) / 2 + 4:.0f}" text-anchor="end">{escape(group)}</text>'
        )
        for name, value in mine:
            width = WIDTH * value / highest
            colour = COLOURS[series.index(name) % len(COLOURS)]
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{ROW - 2}" fill="{colour}"/>')
            parts.append(f'<text x="{LABEL + width + 4:.1f}" y="{y + ROW - 4}">{value:,.1f}</text>')
            y += ROW
        y += GAP
    size = f'width="{LABEL + WIDTH + 80}" height="{y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, f'<text x="10" y="15" font-weight="bold">{escape(title)}</text>', *parts, "</svg>\n"])
