"""Launches of `kernels/compact.cu`: the cells whose gradient matters."""

from __future__ import annotations

from typing import Any, NamedTuple

from transducer_loss.cells import Group


class Kept(NamedTuple):
    """The cells of a group that get a gradient; with ``cells=None`` all of them."""

    cells: Any
    """(number,) int64: which, in order."""
    positions: Any
    """(cells + 1,) int64: how many kept cells lie before each cell."""
    number: int
    before_row: Any
    """(rows + 1,) int64: how many kept cells lie before each lattice row."""


def kept_cells(
    processor: Any, group: Group, occupancy: tuple[Any, Any], loss: Any, weights: Any, floor: float, scratch: Any
) -> Kept:
    """Drop what lies below the floor; one read-back on CUDA. `scratch`: 16 bytes a cell and 16 more."""
    cells, positions = scratch[: 8 * group.cells], scratch[8 * group.cells : 16 * group.cells + 8]
    counts = processor.empty((group.rows + 1,), "int64")
    real = loss.dtype.name
    shared = (group.rows, group.table, group.count, *occupancy, loss, weights, floor)
    processor.launch(f"compact_count<{real}>", group.rows, group.columns, *shared, counts, per_thread=1)
    processor.launch("compact_scan", 1, group.rows, group.rows, counts, alone=True, per_thread=1)
    processor.launch(f"compact_write<{real}>", group.rows, group.columns, *shared, counts, cells, positions, per_thread=1)
    return Kept(cells, positions, int(processor.to_host(counts[-1:])[0]), counts)
