"""From occupancies to a band, and the predictor's rows that a band needs. Launches `kernels/band.cu`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from transducer_loss import lattice, monitor
from transducer_loss.arrays import COMPUTE, element_strides
from transducer_loss.band import Band, expect_band, on_processor
from transducer_loss.cells import Cells, Ints
from transducer_loss.checks import TOPOLOGIES, Options, choice, expect_shape, float_array, lengths, whole_number
from transducer_loss.processors import Allocate, processor_for
from transducer_loss.softmax import Arcs

STRATEGIES = ("local", "optimal")


def least_width(frames: Ints, labels: Ints, topology: str) -> int:
    """The narrowest band that has a path for every utterance which has one at all."""
    if topology == "regular":
        return int((1 + -(-labels // frames)).max())
    needs_two = labels > 0 if topology == "constrained" else (labels > 0) & (frames <= labels)
    return 2 if needs_two.any() else 1


def prune(
    occupancy: Any,
    am_lengths: Any,
    target_lengths: Any,
    *,
    s_range: int = 5,
    strategy: str = "local",
    topology: str = "regular",
) -> Band:
    """Band of the labels that matter in each frame (arXiv 2206.13236, section 3.2).

    Parameters
    ----------
    occupancy : Occupancy
        Of the lattice to prune, as `simple_rnnt_loss` and `occupancy` return it.
    am_lengths, target_lengths : (B,) array or list of int
        T_b and U_b.
    s_range : int
        S, labels kept per frame. Raised where no path would fit, and lowered to the longest transcript's U + 1: the
        band's `width` says what it is.
    strategy : {"local", "optimal"}
        "local" takes the best place of each row for itself and then makes them a band, as k2 does. "optimal" takes the band
        of the highest sum over all rows by dynamic programming, and keeps it where it holds more of the paths' probability
        than the local one.
    topology : {"regular", "modified", "constrained"}
        Of the lattice.

    Returns
    -------
    Band
        On the device of the occupancy; nothing synchronises.

    Notes
    -----
    A row's score at p is the occupancy of blanks out of labels [p, p + S), less that of the label arc into p (`regular`), or
    the occupancy of all arcs out of them (`modified`; in `constrained` without the last label's, whose arc such a band cuts).
    Ties take the lowest p.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> rng = np.random.default_rng(0)
    >>> am, lm = rng.normal(size=(1, 12, 8)).astype("f"), rng.normal(size=(1, 7, 8)).astype("f")
    >>> _, _, occupancy = tl.simple_rnnt_loss(am, lm, [[1, 2, 3, 4, 5, 6]], [12], [6])
    >>> band = tl.prune(occupancy, [12], [6], s_range=4, strategy="optimal")
    >>> band.width, band.first[0, 0], band.first[0, -1]
    (4, np.int32(0), np.int32(3))
    """
    return pruned(occupancy, am_lengths, target_lengths, s_range=s_range, strategy=strategy, topology=topology)


def pruned(
    occupancy: Any, am_lengths: Any, target_lengths: Any, *, s_range: int, strategy: str, topology: str,
    as_k2: bool = False, threads: int | None = None, allocate: Allocate | None = None,
) -> Band:  # fmt: skip
    """See `prune`.

    With `as_k2`, scores are those of `regular` for every topology, places are as many for every utterance as for the longest,
    and the width is not raised.
    """
    for name in ("blank", "label"):
        if not hasattr(occupancy, name):
            raise TypeError(f"occupancy: expected an Occupancy, got {type(occupancy).__name__}")
    blank = float_array(occupancy.blank, "occupancy.blank", "B T U+1")
    label = float_array(occupancy.label, "occupancy.label", "B T U+1", blank, "occupancy.blank")
    expect_shape(label, "occupancy.label", "(B, T, U+1)", tuple(blank.shape))
    batch, most_frames, columns = blank.shape
    frames = lengths(am_lengths, "am_lengths", batch, 1, most_frames, "T")
    labels = lengths(target_lengths, "target_lengths", batch, 0, columns - 1, "U")
    asked = whole_number(s_range, "s_range", 1)
    optimal = choice(strategy, STRATEGIES, "strategy") == 1
    kind = choice(topology, TOPOLOGIES, "topology")
    wide, most = (asked, columns) if as_k2 else (max(asked, least_width(frames, labels, topology)), int(labels.max()) + 1)
    width = min(wide, most)
    step = width - 1 if kind == 0 else 1
    processor = processor_for(blank, threads, allocate)
    with processor:
        real = COMPUTE[blank.dtype.name]
        pair = (processor.dense(blank, real), processor.dense(label, real))
        group = Cells.full(frames, labels).group(processor, padded=(most_frames, columns))
        scores = processor.empty((batch, most_frames, columns), real)
        first = processor.empty((batch, most_frames), "int32")
        processor.launch(
            f"band_scores<{real}>", group.rows, columns,
            group.rows, group.table, group.count, *pair, width, 0 if as_k2 else kind, int(as_k2), scores, most_frames, first,
            steps=width, per_thread=1,
        )  # fmt: skip
        processor.launch(
            "band_local", batch, most_frames, batch, group.table, width, step, most_frames, first, per_thread=1
        )
        ends = processor.to_device((labels + 1).astype(np.int32))[:, None]

        def band_of(first: Any) -> Band:
            band = Band(first, np.minimum(first + np.int32(width), ends), width, frames, labels, asked)
            # k2 knows no mass.
            return band if as_k2 else dataclasses.replace(band, mass=_mass(processor, band, pair, topology))

        band = band_of(first)
        if optimal:
            best = first.copy()
            processor.launch(
                f"band_optimal<{real}>", batch, columns,
                batch, group.table, width, step, scores, processor.empty((batch, 2, columns), "float64"),
                processor.empty((batch, most_frames, columns), "int32"), most_frames, best, steps=step * most_frames,
                per_thread=1,
            )  # fmt: skip
            other = band_of(best)
            better = other.mass > band.mass
            rows = better[:, None]
            band = dataclasses.replace(
                band, first=np.where(rows, best, first), end=np.where(rows, other.end, band.end),
                mass=np.where(better, other.mass, band.mass),
            )  # fmt: skip
        if band.mass is not None:
            monitor.kept_mass(band.mass)
        return band


def _mass(processor: Any, band: Band, occupancy: tuple[Any, Any], topology: str) -> Any:
    """Share of the paths' probability that stays in the band."""
    real = occupancy[0].dtype.name
    group = Cells.of_band(band).group(processor)
    arcs = Arcs(processor.empty((group.cells,), real), processor.empty((group.cells,), real), None)
    _, padded, columns = occupancy[0].shape
    processor.launch(
        f"band_arcs<{real}>", group.rows, band.width,
        group.rows, group.table, group.count, group.spans, *occupancy, padded, columns, TOPOLOGIES.index(topology),
        arcs.log_blank, arcs.log_label, per_thread=1,
    )  # fmt: skip
    # The label arcs of `constrained` have been cut already, and their weight is the whole arc's.
    options = Options.checked(
        1, blank=0, topology="regular" if topology == "regular" else "modified", normalized=True, fastemit_lambda=0.0,
        delay_penalty=0.0, hat=False, infeasible="inf",
    )  # fmt: skip
    loss, reported = (processor.empty((group.count,), real) for _ in range(2))
    lattice.sums(processor, group, arcs, options, loss, reported)
    return np.minimum(np.exp(-loss), loss.dtype.type(1))


def gather_predictor(predictor: Any, band: Band) -> Any:
    """The predictor's rows of a band's cells, for those who run a joiner of their own on them.

    Parameters
    ----------
    predictor : (B, U+1, H) array
        Any float dtype, any strides.
    band : Band

    Returns
    -------
    (B, T, S, H) array
        ``predictor[b, band.first[b, t] + s]``; 0 where the band has no such cell. Its gradient is `gather_predictor_backward`.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> band = tl.Band.from_ranges([[[0, 1], [1, 2]]], [2], [2])
    >>> tl.gather_predictor(np.arange(3.0)[None, :, None], band)[0, :, :, 0]
    array([[0., 1.],
           [1., 2.]])
    """
    return gathered(predictor, band)


def gathered(predictor: Any, band: Band, threads: int | None = None, allocate: Allocate | None = None) -> Any:
    """See `gather_predictor`."""
    rows = float_array(predictor, "predictor", "B U+1 H")
    batch, labels, features = rows.shape
    frames, width = _expect_gatherable(band, batch, labels)
    with processor_for(rows, threads, allocate) as processor:
        rows = rows if features == 1 or element_strides(rows)[-1] == 1 else rows.copy()
        native, out = processor.output((batch, frames, width, features), rows.dtype.name)
        processor.launch(
            f"band_gather<{rows.dtype.name}>", batch * frames * width, features,
            batch * frames * width, *_rows_of(processor, band), frames, width, rows, *element_strides(rows)[:2], labels,
            features, out,
        )  # fmt: skip
    return native


def gather_predictor_backward(gradient: Any, band: Band, labels: int) -> Any:
    """Gradient of `gather_predictor` by its rows.

    Parameters
    ----------
    gradient : (B, T, S, H) array
    band : Band
    labels : int
        Rows of the predictor, U + 1.

    Returns
    -------
    (B, U+1, H) array
        Sums over the frames, in their order.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> band = tl.Band.from_ranges([[[0, 1], [1, 2]]], [2], [2])
    >>> tl.gather_predictor_backward(np.ones((1, 2, 2, 1)), band, 3)[0, :, 0]
    array([1., 2., 1.])
    """
    return gathered_backward(gradient, band, labels)


def gathered_backward(
    gradient: Any, band: Band, labels: int, threads: int | None = None, allocate: Allocate | None = None
) -> Any:
    """See `gather_predictor_backward`."""
    given = float_array(gradient, "gradient", "B T S H")
    batch, features = given.shape[0], given.shape[3]
    labels = whole_number(labels, "labels", 1)
    frames, width = _expect_gatherable(band, batch, labels)
    expect_shape(given, "gradient", "(B, T, S, H)", (batch, frames, width, features))
    with processor_for(given, threads, allocate) as processor:
        given = given if features == 1 or element_strides(given)[-1] == 1 else given.copy()
        native, out = processor.output((batch, labels, features), given.dtype.name)
        processor.launch(
            f"band_gather_backward<{given.dtype.name}>", batch * labels, features,
            batch * labels, *_rows_of(processor, band), frames, width, given, *element_strides(given)[:3], labels,
            features, out, steps=frames,
        )  # fmt: skip
    return native


def _expect_gatherable(band: Any, batch: int, labels: int) -> tuple[int, int]:
    """Padded frames and width of a band of `batch` utterances of less than `labels` labels."""
    expect_band(band)
    if len(band.labels) != batch or int(band.labels.max()) >= labels:
        raise ValueError(
            f"band: expected one of {batch} utterances of less than {labels} labels, got target lengths {band.labels.tolist()}"
        )
    return int(band.first.shape[1]), band.width


def _rows_of(processor: Any, band: Band) -> tuple[Any, Any, Any]:
    """Table of utterances, first and end, on the processor."""
    band = on_processor(band, processor)
    first, end = (processor.dense(array, "int32") for array in (band.first, band.end))
    return Cells.full(band.frames, band.labels).group(processor).table, first, end
