"""The packed cells of a batch: what `kernels/cells.cuh` reads, and how utterances are grouped."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive utterances whose per-cell arrays exist together."""

    begin: int
    """Its first utterance."""
    count: int
    cells: int
    rows: int
    columns: int
    """Labels plus one of its longest transcript."""
    table: Any
    """(count, 6) int64 on the processor: the kernels' `Utterance`."""
    first: Any
    """First label of every lattice row, (rows,) int32, or None: all 0."""
    offsets: Ints
    """First cell of each utterance, and the number of cells, on the host."""

    def select(self, begin: int, end: int) -> tuple[Any, int]:
        """Utterances [begin, end) of the group, as kernels take them: table and count."""
        return self.table[begin:end], end - begin


@dataclasses.dataclass(frozen=True)
class Cells:
    """Which cells (b, t, u) of a batch are real and stored.

    Attributes
    ----------
    frames, labels : (B,) int64
        T_b and U_b.
    width : (B,) int64
        Cells stored per lattice row: U_b + 1, or the width of a band.
    first : (B, T) int32 or None
        First label of each lattice row of a band.
    """

    frames: Ints
    labels: Ints
    width: Ints
    first: np.ndarray[Any, np.dtype[np.int32]] | None = None

    @classmethod
    def full(cls, frames: Ints, labels: Ints) -> Cells:
        """The whole lattice of every utterance."""
        return cls(frames, labels, labels + 1)

    @property
    def counts(self) -> Ints:
        """Cells of each utterance."""
        return self.frames * self.width

    def group(self, processor: Any, begin: int = 0, end: int | None = None) -> Group:
        """Utterances [begin, end) as the kernels take them."""
        part = slice(begin, len(self.frames) if end is None else end)
        frames, labels, width = self.frames[part], self.labels[part], self.width[part]
        offsets = np.concatenate([[0], np.cumsum(frames * width)]).astype(np.int64)
        rows = np.concatenate([[0], np.cumsum(frames)]).astype(np.int64)
        index = np.arange(begin, begin + len(frames))
        table = np.stack([index, offsets[:-1], rows[:-1], frames, labels, width], axis=1).astype(np.int64)
        first = None
        if self.first is not None:
            first = np.concatenate([
                row[:count] for row, count in zip(self.first[part], frames, strict=True)
            ]).astype(np.int32)
        return Group(
            begin, len(frames), int(offsets[-1]), int(rows[-1]), int(labels.max()) + 1,
            processor.to_device(table), None if first is None else processor.to_device(first), offsets,
        )  # fmt: skip
