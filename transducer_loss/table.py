"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of the columns' names and of the rows, each cell as wide as its column.

    Examples
    --------
    >>> print(aligned(["what", "bytes"], [["logits", "8"], ["loss", "4"]]))
    what    bytes
    logits  8
    loss    4
    """
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows))
    return "\n".join(line.rstrip() for line in lines)
