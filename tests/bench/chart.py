"""A bar chart as SVG text, without dependencies."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from textwrap import wrap
from typing import NamedTuple

ROW, GAP, LABEL, WIDTH, REST = 14, 10, 260, 420, 180  # pixels
LEGEND_COLUMNS, LEGEND_WIDTH = 5, 150
CAPTION_LETTERS = 150  # in a line
COLOURS = ("#3b6ea8", "#8ab17d", "#e9c46a", "#c8553d", "#6d597a", "#2a9d8f", "#b5838d", "#555555", "#a3b18a", "#023047")


class Bar(NamedTuple):
    """One value; `note` is written behind it."""

    group: str
    series: str
    value: float
    note: str = ""


def bars(title: str, values: Sequence[Bar], caption: str = "") -> str:
    """Horizontal bars: groups from above in their order, one colour for each series; the caption below them."""
    groups = list(dict.fromkeys(bar.group for bar in values))
    series = list(dict.fromkeys(bar.series for bar in values))
    highest = max((bar.value for bar in values), default=1.0) or 1.0
    parts = []
    for index, name in enumerate(series):
        row, column = divmod(index, LEGEND_COLUMNS)
        x, y = 10 + LEGEND_WIDTH * column, 24 + ROW * row
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{COLOURS[index % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 14}" y="{y + 9}">{escape(name)}</text>')
    y = 44 + ROW * ((len(series) - 1) // LEGEND_COLUMNS)
    for group in groups:
        mine = [bar for bar in values if bar.group == group]
        parts.append(
            f'<text x="{LABEL - 6}" y="{y + ROW * len(mine) / 2 + 4:.0f}" text-anchor="end">{escape(group)}</text>'
        )
        for bar in mine:
            width = WIDTH * bar.value / highest
            colour = COLOURS[series.index(bar.series) % len(COLOURS)]
            text = f"{_number(bar.value)} {bar.note}".rstrip()
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{ROW - 2}" fill="{colour}"/>')
            parts.append(f'<text x="{LABEL + width + 4:.1f}" y="{y + ROW - 4}">{escape(text)}</text>')
            y += ROW
        y += GAP
    for line in wrap(caption, CAPTION_LETTERS):
        parts.append(f'<text x="10" y="{y + ROW - 4}" font-size="10">{escape(line)}</text>')
        y += ROW
    size = f'width="{LABEL + WIDTH + REST}" height="{y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join(
        [head, ground, f'<text x="10" y="15" font-weight="bold">{escape(title)}</text>', *parts, "</svg>\n"]
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"
