"""One utterance's lattice on the host, as `transducer_loss.plot` draws it: cells, the rows of a band, the corners of a path."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from transducer_loss.arrays import FLOATS, as_array, as_numpy
from transducer_loss.band import Band, expect_band
from transducer_loss.cells import Ints
from transducer_loss.checks import TOPOLOGIES, choice, expect_shape, lengths, whole_number
from transducer_loss.paths import Alignment

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class View:
    """What there is to see of one utterance.

    Attributes
    ----------
    cells : (T_b, U_b+1) array of float64
        Probability that a path passes each cell; 0 where an occupancy of a band has none.
    rows : pair of (T_b,) arrays of int64, or None
        First label of each row of the band, and one past the last.
    path : (2, n) array of float64, or None
        Corners of the best path in frames and labels, a cell's middle being at (t + 0.5, u); None where there is none.
    loss : float or None
    """

    cells: Array
    rows: tuple[Array, Array] | None
    path: Array | None
    loss: float | None


def view(
    occupancy: Any, encoder_lengths: Any, target_lengths: Any, utterance: int, alignment: Any, band: Any, banded: bool | None,
    topology: str,
) -> View:  # fmt: skip
    """Read and check the arguments of `transducer_loss.plot.lattice`; of a device's arrays the utterance's rows are copied."""
    if not hasattr(occupancy, "blank") or not hasattr(occupancy, "label"):
        raise TypeError(f"occupancy: expected an Occupancy, got {type(occupancy).__name__}")
    blank, label = (as_array(getattr(occupancy, name), f"occupancy.{name}") for name in ("blank", "label"))
    if blank.ndim != 3 or blank.dtype.name not in FLOATS:
        raise ValueError(f"occupancy: expected floats (B, T, U+1), got {blank.dtype.name} of shape {blank.shape}")
    expect_shape(label, "occupancy.label", "of occupancy.blank (B, T, U+1)", blank.shape)
    batch, most_frames, columns = blank.shape
    b = whole_number(utterance, "utterance", 0)
    if b >= batch:
        raise ValueError(f"utterance: expected one of the batch's B = {batch}, got {utterance}")
    kind = choice(topology, TOPOLOGIES, "topology")
    if band is None and banded:
        raise ValueError("banded: expected a band with banded=True, got none")
    most_labels = columns - 1
    if band is not None:
        expect_band(band)
        banded = _is_banded(band, banded, columns)
        most_labels = int(band.labels.max()) if banded else most_labels
    frames, labels = (
        int(_counts(*each, band, batch)[b])
        for each in (("encoder_lengths", encoder_lengths, 1, most_frames), ("target_lengths", target_lengths, 0, most_labels))
    )

    width = columns if banded else labels + 1
    cells = np.add(*(as_numpy(each[b, :frames, :width]).astype(np.float64) for each in (blank, label)))
    rows = None
    if band is not None:
        first, end = (as_numpy(as_array(each, "band")[b, :frames]).astype(np.int64) for each in (band.first, band.end))
        rows = first, end
        if banded:
            cells = _spread(cells, first, end, labels + 1)
    path = None if alignment is None else _path(alignment, b, batch, frames, labels, kind)
    loss = getattr(occupancy, "loss", None)
    return View(cells, rows, path, None if loss is None else as_numpy(as_array(loss, "occupancy.loss")[b : b + 1]).item())


def frames_of(alignment: Any, name: str) -> Array:
    """Frames (B, U) of an alignment, or any numbers of such a shape, on the host in float64."""
    value = alignment.frames if isinstance(alignment, Alignment) else alignment
    if isinstance(value, (list, tuple)):
        try:
            array = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: expected numbers (B, U), in rows of one length, got {value}") from None
    else:
        array = as_numpy(as_array(value, name))
    if array.ndim != 2 or (array.dtype.kind not in "iu" and array.dtype.name not in FLOATS):
        raise ValueError(f"{name}: expected an Alignment or numbers (B, U), got {array.dtype.name} of shape {array.shape}")
    return array.astype(np.float64)


def _is_banded(band: Band, banded: bool | None, columns: int) -> bool:
    """Whether an occupancy of so many columns has the cells of the band, not of the lattice."""
    most = int(band.labels.max()) + 1
    of_band, of_lattice = columns == band.width, columns >= most
    if banded is None:
        if of_band and of_lattice and as_numpy(as_array(band.first, "band")).any():
            raise ValueError(f"banded: expected True or False, as band and lattice both have {columns} columns, got None")
        banded = of_band and not of_lattice
    if not (of_band if banded else of_lattice):
        expected = "" if banded else f"at least the U+1 = {most} columns of the lattice, or "
        raise ValueError(f"occupancy: expected {expected}the S = {band.width} columns of the band, got {columns}")
    return bool(banded)


def _counts(name: str, value: Any, low: int, high: int, band: Band | None, batch: int) -> Ints:
    """Lengths (B,): as given, else those of the band, else the most."""
    of_band = None if band is None else band.frames if name == "encoder_lengths" else band.labels
    default = np.full(batch, high) if of_band is None else of_band
    counts = lengths(default if value is None else value, name, batch, low, high, "T" if low else "U")
    if of_band is not None and not np.array_equal(counts, of_band):
        raise ValueError(f"band: expected the band of this batch, of {name} {counts.tolist()}, got {of_band.tolist()}")
    return counts


def _spread(cells: Array, first: Array, end: Array, columns: int) -> Array:
    """Cells (T, S) of a band in the lattice (T, columns); 0 where it has none."""
    to = first[:, None] + np.arange(cells.shape[1])
    inside = to < end[:, None]
    spread = np.zeros((len(cells), columns))
    spread[np.nonzero(inside)[0], to[inside]] = cells[inside]
    return spread


def _path(alignment: Any, b: int, batch: int, frames: int, labels: int, topology: int) -> Array | None:
    given = frames_of(alignment, "alignment")
    if given.shape[0] != batch or given.shape[1] < labels:
        raise ValueError(f"alignment: expected shape (B, U) = ({batch}, {labels}), got {given.shape}")
    at = given[b, :labels]
    if (at == -1).any():
        return None
    step = 0 if topology == TOPOLOGIES.index("regular") else 1
    if not ((at >= 0) & (at < frames)).all() or (np.diff(at) < step).any():
        order = "rise" if step else "never fall"
        raise ValueError(f"alignment: expected frames in [0, T_b = {frames}) that {order}, got {at.tolist()}")
    # From the middle of a label's cell to that of the next cell, which is of the same frame or of the one after.
    times = np.repeat(at, 2) + 0.5
    times[1::2] += step
    return np.array([[0.0, *times, max([frames, *times])], np.repeat(np.arange(labels + 1), 2)])
