"""Bands: the few labels of each lattice row that a pruned or alignment-restricted loss looks at."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from transducer_loss.arrays import as_array, as_numpy, on_host
from transducer_loss.cells import Cells, Ints
from transducer_loss.checks import TOPOLOGIES, choice, lengths, whole_number
from transducer_loss.processors import processor_for

# Labels that 32 bits hold, with room for a width and a frame.
_MOST = 1 << 30


@dataclasses.dataclass(frozen=True)
class Band:
    """Which cells of a lattice are looked at: the labels [first, end) of each row.

    Made by `prune`, `from_alignment` or `from_ranges`; the losses take it as ``band=``.

    Attributes
    ----------
    first, end : (B, T) array of int32
        First label of each lattice row, and one past the last. Rows past T_b repeat the last real one.
    width : int
        S, the most labels of a row. More than was asked for (`s_range`) where no path would fit otherwise.
    frames, labels : (B,) int64
        T_b and U_b of the utterances that the band was made for, on the host.
    s_range : int
        Labels per row that were asked for.
    mass : (B,) array or None
        Probability in [0, 1] that a whole path stays in the band, by the occupancies that it was made from: small for long
        utterances, as every frame counts. 0 for an utterance without a path.
    """

    first: Any
    end: Any
    width: int
    frames: Ints
    labels: Ints
    s_range: int
    mass: Any = None

    @classmethod
    def from_alignment(
        cls, frames: Any, encoder_lengths: Any, target_lengths: Any, left: int, right: int, topology: str = "regular"
    ) -> Band:
        """Alignment-restricted lattice (arXiv 2011.03072): a label may be emitted near its frame only.

        Parameters
        ----------
        frames : (B, U) array of int
            Frame of each label, never falling, as of `Alignment.frames`. On a device it costs one synchronising copy, and
            the band is made there.
        encoder_lengths, target_lengths : (B,) array or list of int
            T_b and U_b.
        left, right : int
            A label may be emitted up to `left` frames before its own and up to `right` frames after.
        topology : {"regular", "modified", "constrained"}
            Of the loss. In `modified` the arc of a label ends one frame later, which cells have to make up for.

        Returns
        -------
        Band
            Cell (t, u) is kept if every label whose last frame lies before t is among the u emitted ones, and none of them
            has a first frame after t.

        Examples
        --------
        >>> import transducer_loss as tl
        >>> band = tl.Band.from_alignment([[1, 3]], [5], [2], left=0, right=1)
        >>> band.first.tolist(), band.end.tolist()
        ([[0, 0, 0, 1, 1]], [[1, 2, 2, 3, 3]])
        """
        given = _integers(frames, "frames", "B, U")
        if not given.shape[0]:
            raise ValueError(f"frames: expected integers of shape (B, U) of at least one utterance, got shape {given.shape}")
        left, right = (min(whole_number(value, name, 0), _MOST) for value, name in ((left, "left"), (right, "right")))
        host = as_numpy(given).astype(np.int64)
        batch, most = host.shape
        counts = lengths(encoder_lengths, "encoder_lengths", batch, 1, 2**31 - 1, "T")
        labels = lengths(target_lengths, "target_lengths", batch, 0, most, "U")
        real = np.arange(most)[None] < labels[:, None]
        falling = np.diff(host, axis=1, prepend=0) < 0
        bad = real & ((host < 0) | (host >= counts[:, None]) | falling)
        if bad.any():
            b, u = (int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"frames: expected frames in [0, T_b = {counts[b]}) that never fall, got {host[b, u]} at index ({b}, {u})"
            )
        side: Literal["left", "right"] = "left" if choice(topology, TOPOLOGIES, "topology") == 1 else "right"
        row = np.arange(int(counts.max()))
        first, end = (np.zeros((batch, len(row)), np.int32) for _ in range(2))
        for b, (count, number) in enumerate(zip(counts, labels, strict=True)):
            at = np.minimum(row, count - 1)
            first[b] = np.searchsorted(host[b, :number] + right, at, side="left")
            end[b] = np.searchsorted(host[b, :number] - left, at, side=side) + 1
        width = int((end - first).max())
        processor = processor_for(given)
        with processor:
            return cls(processor.to_device(first), processor.to_device(end), width, counts, labels, width)

    @classmethod
    def from_ranges(cls, ranges: Any, encoder_lengths: Any, target_lengths: Any) -> Band:
        """Band of k2's ranges.

        Parameters
        ----------
        ranges : (B, T, S) array of int
            Consecutive labels of each row. On a device they are copied to be checked, which synchronises.
        encoder_lengths, target_lengths : (B,) array or list of int
            T_b and U_b.

        Returns
        -------
        Band

        Raises
        ------
        ValueError
            Where a row is not consecutive, begins below 0 or lower than the row before it.

        Examples
        --------
        >>> import transducer_loss as tl
        >>> band = tl.Band.from_ranges([[[0, 1], [0, 1], [1, 2]]], [3], [2])
        >>> band.width, band.first.tolist()
        (2, [[0, 0, 1]])
        """
        given = _integers(ranges, "ranges", "B, T, S")
        if 0 in given.shape:
            raise ValueError(f"ranges: expected integers of shape (B, T, S), got {given.dtype.name} of shape {given.shape}")
        host = as_numpy(given).astype(np.int64)
        batch, frames, width = host.shape
        counts = lengths(encoder_lengths, "encoder_lengths", batch, 1, frames, "T")
        labels = lengths(target_lengths, "target_lengths", batch, 0, 2**31 - 1, "U")
        first = host[..., 0]
        real = np.arange(frames)[None] < counts[:, None]
        odd = real & ((np.diff(host, axis=2) != 1).any(axis=2) | (np.diff(first, axis=1, prepend=0) < 0) | (first > _MOST))
        if odd.any():
            b, t = (int(i) for i in np.argwhere(odd)[0])
            raise ValueError(
                f"ranges: expected consecutive labels from 0 on, never falling from row to row, got {host[b, t].tolist()} "
                f"after {host[b, max(t - 1, 0)].tolist()} at index ({b}, {t})"
            )
        first = np.take_along_axis(first, np.minimum(np.arange(frames)[None], counts[:, None] - 1), axis=1)
        end = np.minimum(first + width, labels[:, None] + 1)
        processor = processor_for(given)
        with processor:
            start, past = (processor.to_device(array.astype(np.int32)) for array in (first, end))
            return cls(start, past, width, counts, labels, width)

    def to_ranges(self) -> Any:
        """The labels of each row as k2 has them, (B, T, S) int64; those past the last label are there, too."""
        first, labels = as_array(self.first, "first"), np.arange(int(self.width))
        if not on_host(first):
            with processor_for(first) as processor:
                labels = processor.to_device(labels)
        return first[..., None].astype(np.int64) + labels


def _integers(value: Any, name: str, dims: str) -> Any:
    """An array of integers whose dimensions are named by `dims`."""
    if isinstance(value, (list, tuple)):
        try:
            value = np.asarray(value)
        except ValueError:
            raise ValueError(f"{name}: expected integers of shape ({dims}), in rows of one length, got {value}") from None
        value = value if value.size else value.astype(np.int64)
    array = as_array(value, name)
    if array.ndim != len(dims.split(",")) or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers of shape ({dims}), got {array.dtype.name} of shape {array.shape}")
    return array


def expect_band(band: Any) -> None:
    """Raise unless `band` is one."""
    if not isinstance(band, Band):
        raise TypeError(f"band: expected a Band, got {type(band).__name__}")


def on_processor(band: Band, processor: Any) -> Band:
    """A band whose rows the processor can read."""
    if on_host(band.first) == processor.host:
        return band
    if processor.host:
        raise ValueError("band: expected one on the host, as the inputs, got one on a device")
    return dataclasses.replace(band, first=processor.to_device(band.first), end=processor.to_device(band.end))


def band_for(band: Any, processor: Any, frames: Ints, labels: Ints) -> Cells:
    """Cells of a band that belongs to utterances of these lengths, on their processor; full rows where it is None."""
    if band is None:
        return Cells.full(frames, labels)
    expect_band(band)
    for name, mine, theirs in (("frame", band.frames, frames), ("target", band.labels, labels)):
        if not np.array_equal(mine, theirs):
            raise ValueError(f"band: expected the band of this batch, of {name} lengths {theirs.tolist()}, got {mine.tolist()}")
    return Cells.of_band(on_processor(band, processor))
