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
    """(count, 7) int64 on the processor: the kernels' `Utterance`."""
    spans: Any
    """First label and one past the last of every lattice row, (rows, 2) int32, or None: full rows. `Span` of the kernels."""
    offsets: Ints
    """First cell of each utterance, and the number of cells, on the host."""
    by_encoder: Any = None
    """(count,) int64 on the processor: the utterances by encoder, where they share them."""

    def select(self, begin: int, end: int) -> tuple[Any, int]:
        """Utterances [begin, end) of the group, as kernels take them: table and count."""
        return self.table[begin:end], end - begin


def label_table(processor: Any, labels: Ints) -> Any:
    """The kernels' table of utterances, for those kernels that look at labels alone."""
    return Cells.full(np.ones_like(labels), labels).group(processor).table


@dataclasses.dataclass(frozen=True)
class Cells:
    """Which cells (b, t, u) of a batch are real and stored.

    Attributes
    ----------
    frames, labels : (B,) int64
        T_b and U_b.
    width : (B,) int64
        Cells stored per lattice row: U_b + 1, or at most the width of a band.
    first, end : (B, T) int32 on the processor, or None
        The labels [first, end) of each lattice row of a band; without `end` all that fit its width.
    columns : int or None
        Of padded arrays of a band's cells, (B, T, columns).
    encoders : (B,) int64 or None
        Whose encoder rows each utterance has, where they share them.
    """

    frames: Ints
    labels: Ints
    width: Ints
    first: Any = None
    end: Any = None
    columns: int | None = None
    encoders: Ints | None = None

    @classmethod
    def full(cls, frames: Ints, labels: Ints) -> Cells:
        """The whole lattice of every utterance."""
        return cls(frames, labels, labels + 1)

    @classmethod
    def of_band(cls, band: Any) -> Cells:
        """The cells of a band."""
        return cls(band.frames, band.labels, np.minimum(band.width, band.labels + 1), band.first, band.end, band.width)

    @property
    def counts(self) -> Ints:
        """Cells of each utterance."""
        return self.frames * self.width

    def group(
        self, processor: Any, begin: int = 0, end: int | None = None, padded: tuple[int, int] | None = None
    ) -> Group:
        """Utterances [begin, end) as the kernels take them; with `padded` = (T, U + 1), cells in a (B, T, U + 1) array."""
        part = slice(begin, len(self.frames) if end is None else end)
        frames, labels, width = self.frames[part], self.labels[part], self.width[part]
        if padded is not None:
            width = np.full_like(width, padded[1])
        sizes = frames * width if padded is None else padded[0] * width
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        rows = np.concatenate([[0], np.cumsum(frames)]).astype(np.int64)
        index = np.arange(begin, begin + len(frames))
        encoders = index if self.encoders is None else self.encoders[part]
        order = None if self.encoders is None else processor.to_device(np.argsort(encoders, kind="stable"))
        table = np.stack([index, offsets[:-1], rows[:-1], frames, labels, width, encoders], axis=1).astype(np.int64)
        return Group(
            begin, len(frames), int(offsets[-1]), int(rows[-1]), int(labels.max()) + 1,
            processor.to_device(table), self._spans(processor, part), offsets, order,
        )  # fmt: skip

    def _spans(self, processor: Any, part: slice) -> Any:
        if self.first is None:
            return None
        frames, padded = self.frames[part], self.first.shape[1]
        begin = part.start * padded + np.arange(len(frames)) * padded
        rows = processor.to_device(np.concatenate([np.arange(at, at + count) for at, count in zip(begin, frames, strict=True)]))
        past = processor.to_device(np.repeat(self.labels[part] + 1, frames))
        width = processor.to_device(np.repeat(self.width[part], frames))
        # Whatever a device holds, no kernel leaves its rows; the lattice finds those that end below 0, or out of order.
        given = self.first.reshape(-1)[rows]
        first = np.clip(given, 0, past)
        end = np.minimum(first + width, past)
        if self.end is not None:
            end = np.minimum(self.end.reshape(-1)[rows], end)
        end = np.where(given < 0, -1, end)
        return np.stack([first, end], axis=1).astype(np.int32)
