"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1, gap: str = "  ") -> str:
    """Cells as columns, the first `left` of them flush left, the others flush right.

    :param gap: between two columns.
    """
    widths = _widths(rows)
    return "\n".join(gap.join(_padded(row, widths, left)).rstrip() for row in rows)


def markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table, aligned for a terminal as `aligned` does; the first row is its
    head.
    """
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, width) for width in _widths(rows)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    head, *others = (_padded(row, widths, left) for row in rows)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *others)]


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _padded(row: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    return [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
