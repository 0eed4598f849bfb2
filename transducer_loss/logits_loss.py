"""The transducer loss of logits that the caller has made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from transducer_loss import lattice, monitor, softmax
from transducer_loss.arrays import COMPUTE
from transducer_loss.band import Band, band_for
from transducer_loss.cells import Cells, Group
from transducer_loss.checks import Options, Targets, expect_shape, finite, float_array, lengths, targets_for, weights_for
from transducer_loss.processors import Allocate, processor_for


@dataclasses.dataclass(frozen=True)
class Problem:
    """Checked arguments of `rnnt_loss`, on their processor."""

    processor: Any
    logits: Any
    cells: Cells
    group: Group
    targets: Targets
    options: Options
    clamp: float
    """Bound of the gradient before the upstream weights, which may be infinite."""

    @property
    def dtype(self) -> str:
        """Of losses and occupancies."""
        return COMPUTE[self.logits.dtype.name]


@dataclasses.dataclass(frozen=True)
class Saved:
    """What the gradient needs beside the logits: 12 bytes a cell (24 for float64). Never modified."""

    normaliser: Any
    blank_occupancy: Any
    label_occupancy: Any


def problem(
    logits: Any, targets: Any, logit_lengths: Any, target_lengths: Any, /, *, band: Band | None = None, clamp: float = 0.0,
    validate: bool = False, threads: int | None = None, allocate: Allocate | None = None, **options: Any,
) -> Problem:  # fmt: skip
    """Check the arguments of `rnnt_loss`."""
    packed = getattr(logits, "ndim", 0) == 2
    columns = "U+1" if band is None else "S"
    array = float_array(logits, "logits", "cells V" if packed else f"B T {columns} V")
    checked = Options.checked(array.shape[-1], **options)
    if finite(clamp, "clamp") < 0:
        raise ValueError(f"clamp: expected a bound of the gradient, or 0 for none, got {clamp}")
    if packed:
        if not hasattr(logit_lengths, "__len__") or getattr(logit_lengths, "ndim", 1) == 0:
            raise ValueError(f"logit_lengths: expected shape (B,), got {logit_lengths}")
        batch = len(logit_lengths)
        high_frames = high_labels = int(array.shape[0])
    else:
        batch, high_frames, high_labels = array.shape[0], array.shape[1], array.shape[2] - 1
    if band is not None:
        high_labels = 2**31 - 1  # as the band's own
    if batch < 1:
        raise ValueError("logit_lengths: expected at least one utterance, got none")
    frames = lengths(logit_lengths, "logit_lengths", batch, 1, high_frames, "cells" if packed else "T")
    labels = lengths(target_lengths, "target_lengths", batch, 0, high_labels, "cells" if packed else "U")
    processor = processor_for(array, threads, allocate)
    with processor:
        cells = band_for(band, processor, frames, labels)
        if packed:
            each = "(U_b + 1)" if band is None else "min(S, U_b + 1)"
            expect_shape(array, "logits", f"(sum of T_b {each}, V)", (int(cells.counts.sum()), array.shape[1]))
        elif band is not None:
            expect_shape(array, "logits", "(B, T, S, V)", (batch, high_frames, band.width, array.shape[3]))
        checked_targets = targets_for(targets, processor, labels, array.shape[-1], checked, validate)
        return Problem(processor, array, cells, cells.group(processor), checked_targets, checked, float(clamp) or math.inf)


def forward(of: Problem, effective: bool = True, keep: bool = True) -> tuple[Any, Any, Saved | None]:
    """Loss (B,) as the caller's framework's array and as its view; and, with `keep`, what the gradient needs."""
    with of.processor as processor:
        arcs = softmax.empty_arcs(processor, of.group.cells, of.dtype)
        softmax.forward(processor, of.group, of.logits, of.targets, of.options, arcs)
        loss = processor.empty((of.group.count,), of.dtype)
        native, reported = processor.output((of.group.count,), of.dtype)
        values = lattice.sums(processor, of.group, arcs, of.options, loss, reported)
        raise_infeasible(processor, loss, of.options)
        if not keep:
            return native, reported, None
        occupancy = (processor.empty((of.group.cells,), of.dtype), processor.empty((of.group.cells,), of.dtype))
        lattice.occupancy(processor, of.group, arcs, of.options, values, effective, occupancy)
        monitor.emission_delay(of.cells, of.group, occupancy[1], of.options.fastemit_lambda if effective else 0.0)
        return native, reported, Saved(arcs.normaliser, *occupancy)


def backward(of: Problem, saved: Saved, weights: Any, inplace: bool) -> Any:
    """Gradient of ``sum_b weights_b loss_b`` by the logits, in a new array or over them."""
    with of.processor as processor:
        native, gradient = (of.logits, of.logits) if inplace else processor.output(of.logits.shape, of.logits.dtype.name)
        softmax.backward_logits(
            processor, of.group, of.logits, of.targets, of.options, saved.normaliser,
            (saved.blank_occupancy, saved.label_occupancy), weights, of.clamp, gradient,
        )  # fmt: skip
        return native


def weights_of(of: Any, weights: Any) -> Any:
    """Upstream weights (B,) as the kernels of a problem read them."""
    with of.processor:
        return weights_for(weights, of.processor, len(of.cells.frames), of.dtype)


def raise_infeasible(processor: Any, loss: Any, options: Options) -> None:
    """Raise where an utterance has no path and ``infeasible="raise"``; synchronises, then."""
    if options.infeasible == "raise":
        expect_paths(processor.to_host(loss))


def expect_paths(loss: np.ndarray[Any, Any]) -> None:
    """Raise unless every utterance has a path, as losses (B,) on the host tell."""
    without = np.flatnonzero(np.isposinf(loss))
    if without.size:
        raise ValueError(f"targets: expected a path for every utterance, got none for utterances {without.tolist()}")


def rnnt_loss(
    logits: Any,
    targets: Any,
    logit_lengths: Any,
    target_lengths: Any,
    *,
    blank: int = 0,
    topology: str = "regular",
    normalized: bool = False,
    band: Band | None = None,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    clamp: float = 0.0,
    weights: Any = None,
    gradient: bool = True,
    inplace: bool = False,
    validate: bool = False,
) -> tuple[Any, Any]:
    """Transducer (RNN-T) loss of logits, and its gradient.

    The negative log-probability of the targets, summed over all alignments; with ``normalized=False`` the softmax is part of
    the loss, and the gradient is by the logits.

    Parameters
    ----------
    logits : (B, T, U+1, V), or (B, T, S, V) with `band`, or (cells, V) array
        float16, bfloat16, float32 or float64, any strides: NumPy, CuPy, or anything with ``__dlpack__``. Packed logits hold
        only the real cells, utterance after utterance, in each the T_b rows of U_b + 1, or of min(S, U_b + 1), cells.
    targets : (B, U) array or nested list of int
        Labels. Those beyond U_b are never read.
    logit_lengths, target_lengths : (B,) array or list of int
        T_b >= 1 and U_b >= 0. On a device they cost one synchronising copy, on the host nothing.
    blank : int
        Class of the blank; negative counts from the end.
    topology : {"regular", "modified", "constrained"}
        Whether a label stays in its frame (Graves 2012), moves to the next one, or moves and also pays the blank above it.
    normalized : bool
        `logits` are log-probabilities already; the gradient is by them.
    band : Band, optional
        Pruned (arXiv 2206.13236) or alignment-restricted loss: only the paths in the band count. Column s of row t is the
        cell of label ``band.first[b, t] + s``.
    fastemit_lambda : float
        FastEmit (arXiv 2010.11148): the gradient of label arcs is scaled by ``1 + fastemit_lambda``; the loss is not.
    delay_penalty : float
        Added to a label's log-probability as ``delay_penalty * ((T_b - 1) / 2 - t)`` (arXiv 2211.00490); any sign.
    hat : bool
        Hybrid autoregressive transducer (arXiv 2003.07705): the blank is a sigmoid, the labels a softmax without it.
    infeasible : {"inf", "zero", "raise"}
        Loss of an utterance without any path; its gradient is 0. ``"raise"`` synchronises.
    clamp : float
        Bring every element of the gradient into [-clamp, clamp], before it is multiplied by `weights`; 0 for no bound.
    weights : (B,) array or list of float, optional
        Any sign; all 1 by default.
    gradient : bool
        Whether to make it.
    inplace : bool
        Write the gradient over `logits`, which saves its memory.
    validate : bool
        Also check targets that are on a device, which synchronises. Unchecked, an utterance with a label out of range has loss
        NaN and gradient 0.

    Returns
    -------
    loss : (B,) array
        float32, or float64 for float64 logits, not weighted. NaN for an utterance with a NaN or +inf logit, or log-probability,
        whose gradient is 0 (one that `delay_penalty` raises above 10,000 counts, too); a logit of -inf is a probability of 0.
    grad : array like `logits`, or None
        Of ``sum_b weights_b loss_b``; 0 in the padding.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Notes
    -----
    Temporary memory: 36 bytes a cell (72 for float64). The same input gives the same bits for any number of threads, which is
    ``OMP_NUM_THREADS`` or the number of available processors.

    Examples
    --------
    Uniform logits have a closed form, ``(T + U) log V - log C(T - 1 + U, U)``:

    >>> import numpy as np, transducer_loss as tl
    >>> loss, grad = tl.rnnt_loss(np.zeros((1, 4, 3, 5), np.float32), [[1, 2]], [4], [2])
    >>> bool(np.isclose(loss[0], 6 * np.log(5) - np.log(10)))
    True
    >>> grad.shape
    (1, 4, 3, 5)
    """
    of = problem(
        logits, targets, logit_lengths, target_lengths, band=band, validate=validate, blank=blank, topology=topology,
        normalized=normalized, fastemit_lambda=fastemit_lambda, delay_penalty=delay_penalty, hat=hat, infeasible=infeasible,
        clamp=clamp,
    )  # fmt: skip
    check_inplace(of, gradient and inplace)
    utterance_weights = weights_of(of, weights)
    loss, _, saved = forward(of, keep=gradient)
    return loss, None if saved is None else backward(of, saved, utterance_weights, inplace)


def check_inplace(of: Problem, inplace: bool) -> None:
    """Raise where a gradient cannot be written over the logits."""
    if not inplace:
        return
    if any(stride == 0 and size > 1 for stride, size in zip(of.logits.strides, of.logits.shape, strict=True)):
        raise ValueError("logits: expected no broadcast dimension with inplace=True, got strides of 0")
    if of.processor.host and not of.logits.flags.writeable:
        raise ValueError("logits: expected a writable array with inplace=True, got a read-only one")
