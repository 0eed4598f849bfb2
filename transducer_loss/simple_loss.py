"""The simple (smoothed) transducer loss of pruned RNN-T: a joiner that only adds, at the cost of a matrix product."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from transducer_loss import lattice, simple_joint
from transducer_loss.arrays import element_strides
from transducer_loss.cells import Cells
from transducer_loss.checks import Options, expect_shape, finite, float_array, lengths, targets_for
from transducer_loss.logits_loss import raise_infeasible, weights_of
from transducer_loss.paths import Occupancy
from transducer_loss.processors import Allocate, Workers, processor_for
from transducer_loss.simple_joint import SimpleJoint
from transducer_loss.softmax import Arcs

# What a task's matrix products may take on CUDA, where it has several utterances; on the host it has one.
_TASK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class SimpleGrads:
    """Gradients of `simple_rnnt_loss`, each shaped as its input.

    Attributes
    ----------
    am, lm : array
    """

    am: Any
    lm: Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """Checked arguments of `simple_rnnt_loss`, on their processor."""

    joint: SimpleJoint
    cells: Cells
    options: Options

    @property
    def processor(self) -> Any:
        """Where the inputs live."""
        return self.joint.processor

    @property
    def dtype(self) -> str:
        """Of losses and occupancies."""
        return self.joint.dtype


@dataclasses.dataclass(frozen=True)
class Forward:
    """The loss and what came with it: arrays of the caller's framework."""

    loss: Any
    occupancy: tuple[Any, Any]
    """Raw, (B, T, U+1): as arrays of the caller's framework."""
    gradients: tuple[Any, Any] | None
    """By am and lm, in the compute dtype."""


def problem(
    am: Any, lm: Any, targets: Any, am_lengths: Any, target_lengths: Any, /, *, lm_only_scale: float = 0.0,
    am_only_scale: float = 0.0, shared_unigram: bool = False, validate: bool = False, threads: int | None = None,
    allocate: Allocate | None = None, **options: Any,
) -> Problem:  # fmt: skip
    """Check the arguments of `simple_rnnt_loss`. `shared_unigram`: of all rows of the batch, padding included, as in k2."""
    am = float_array(am, "am", "B T V")
    lm = float_array(lm, "lm", "B U+1 V", am, "am")
    batch, most_frames, classes = am.shape
    expect_shape(lm, "lm", "(B, U+1, V)", (batch, lm.shape[1], classes))
    for name, scale in (("lm_only_scale", lm_only_scale), ("am_only_scale", am_only_scale)):
        if not 0.0 <= finite(scale, name) <= 1.0:
            raise ValueError(f"{name}: expected a share in [0, 1], got {scale}")
    if lm_only_scale + am_only_scale > 1.0:
        raise ValueError(f"am_only_scale: expected at most 1 - lm_only_scale = {1.0 - lm_only_scale}, got {am_only_scale}")
    checked = Options.checked(classes, normalized=False, hat=False, **options)
    frames = lengths(am_lengths, "am_lengths", batch, 1, most_frames, "T")
    labels = lengths(target_lengths, "target_lengths", batch, 0, lm.shape[1] - 1, "U")
    processor = processor_for(am, threads, allocate)
    with processor:
        am, lm = (
            array if classes == 1 or element_strides(array)[-1] == 1 else array.copy() for array in (am, lm)
        )
        cells = Cells.full(frames, labels)
        group = cells.group(processor, padded=(most_frames, lm.shape[1]))
        joint = SimpleJoint(
            processor, group, am, lm, targets_for(targets, processor, labels, classes, checked, validate), checked.blank,
            float(lm_only_scale), float(am_only_scale), shared_unigram,
        )  # fmt: skip
        return Problem(joint, cells, checked)


def utterances_of_a_task(host: bool, batch: int, rows: int, classes: int) -> int:
    """How many utterances, of am and lm of `rows` rows together, a task multiplies."""
    return 1 if host else max(1, min(batch, _TASK_BYTES // (4 * classes * rows)))


def forward(of: Problem, weights: Any = None, gradient: bool = True) -> Forward:
    """Losses, occupancies, and the gradient of ``sum_b weights_b loss_b``."""
    joint = of.joint
    with joint.processor as processor:
        batch, frames, columns = joint.shape
        rows = (frames, columns)
        per_task = utterances_of_a_task(processor.host, batch, frames + columns, joint.classes)
        parts = [(begin, min(begin + per_task, batch)) for begin in range(0, batch, per_task)]
        workers = min(processor.threads, len(parts))

        def scratch() -> list[Any]:
            return [processor.empty((per_task, each, joint.classes), joint.dtype) for each in rows]

        sums = simple_joint.empty_sums(joint)
        natives, gradients = [], []
        if gradient:
            for each in rows:
                native, view = processor.output((batch, each, joint.classes), joint.dtype)
                natives.append(native)
                gradients.append(view)
        exponentials = None if gradient else Workers(scratch, workers)

        def multiply(begin: int, end: int, am: Any, lm: Any) -> None:
            simple_joint.exponentials(joint, sums, begin, end, am, lm)
            for b in range(begin, end):
                count, labels = int(of.cells.frames[b]), int(of.cells.labels[b]) + 1
                processor.gemm(am[b - begin, :count], lm[b - begin, :labels].T, sums.products[b, :count, :labels])

        def products(begin: int, end: int) -> None:
            if exponentials is None:
                multiply(begin, end, *(view[begin:end] for view in gradients))
            else:
                with exponentials.one() as arrays:
                    multiply(begin, end, *arrays)

        processor.run([functools.partial(products, *part) for part in parts])
        if sums.unigram is not None:
            simple_joint.unigram(joint, sums)
        log_blank, log_label = (processor.empty(joint.shape, joint.dtype) for _ in range(2))
        simple_joint.arcs(joint, sums, log_blank, log_label)
        arcs = Arcs(log_blank, log_label, None)

        loss = processor.empty((batch,), joint.dtype)
        native_loss, reported = processor.output((batch,), joint.dtype)
        values = lattice.sums(processor, joint.group, arcs, of.options, loss, reported)
        raise_infeasible(processor, loss, of.options)
        raw = [processor.output(joint.shape, joint.dtype, zero=True) for _ in range(2)]
        occupancy = (raw[0][1], raw[1][1])
        lattice.occupancy(processor, joint.group, arcs, of.options, values, False, occupancy)
        done = Forward(native_loss, (raw[0][0], raw[1][0]), (natives[0], natives[1]) if gradient else None)
        if not gradient:
            return done
        effective = occupancy
        if of.options.changes_occupancy:
            effective = (processor.empty(joint.shape, joint.dtype), processor.empty(joint.shape, joint.dtype))
            lattice.occupancy(processor, joint.group, arcs, of.options, values, True, effective)
        shares = simple_joint.shares(joint, sums, effective, loss, weights)
        spreads = Workers(scratch, workers)

        def backward(begin: int, end: int) -> None:
            with spreads.one() as (am_spread, lm_spread):
                am, lm = (view[begin:end] for view in gradients)
                for b in range(begin, end):
                    count, labels = int(of.cells.frames[b]), int(of.cells.labels[b]) + 1
                    ratios = sums.products[b, :count, :labels]
                    if labels == 1:  # BLAS sums vectors of other strides in another order: padding must not change a bit
                        ratios = ratios.copy()
                    processor.gemm(ratios, lm[b - begin, :labels], am_spread[b - begin, :count])
                    processor.gemm(ratios.T, am[b - begin, :count], lm_spread[b - begin, :labels])
                simple_joint.backward(joint, sums, shares, begin, end, am_spread, lm_spread, am, lm)

        processor.run([functools.partial(backward, *part) for part in parts])
        return done


def simple_rnnt_loss(
    am: Any,
    lm: Any,
    targets: Any,
    am_lengths: Any,
    target_lengths: Any,
    *,
    lm_only_scale: float = 0.0,
    am_only_scale: float = 0.0,
    blank: int = 0,
    topology: str = "regular",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    infeasible: str = "inf",
    weights: Any = None,
    gradient: bool = True,
    validate: bool = False,
) -> tuple[Any, SimpleGrads | None, Occupancy]:
    """Transducer loss of ``logits(t, u) = am_t + lm_u``, smoothed, whose occupancies say where to prune.

    The first step of pruned RNN-T (arXiv 2206.13236, sections 3.1 and 4.1): without any (B, T, U, V) array, at the cost of
    three small matrix products. The log-probability of a class is::

        (1 - lm_only_scale - am_only_scale) * log_softmax(am_t + lm_u)
            + lm_only_scale * log_softmax(lm_u)
            + am_only_scale * log_softmax(am_t + log(mean over the utterance's u of softmax(lm_u)))

    Parameters
    ----------
    am : (B, T, V) array
        float16, bfloat16, float32 or float64; the encoder, projected to the classes. Padding may hold anything.
    lm : (B, U+1, V) array
        Likewise, the predictor.
    targets : (B, U) array or nested list of int
    am_lengths, target_lengths : (B,) array or list of int
        T_b >= 1 and U_b >= 0.
    lm_only_scale, am_only_scale : float
        Shares, which sum to at most 1.
    blank, topology, fastemit_lambda, delay_penalty, infeasible, weights, gradient, validate
        As of `rnnt_loss`.

    Returns
    -------
    loss : (B,) array
        float32, or float64 for float64 inputs. NaN for an utterance with a NaN or +inf logit, whose gradient is 0.
    grads : SimpleGrads or None
        Of ``sum_b weights_b loss_b``, in the inputs' dtype.
    occupancy : Occupancy
        Of the arcs, for `prune`.

    Notes
    -----
    Temporary memory: 36 bytes a cell (44 with `constrained` or FastEmit; twice that for float64) and, per thread of the host,
    (T + U + 1) V numbers; on CUDA at most 64 MiB of those, or one utterance's. Gradients of half types
    are made in float32 and then cast. The same input gives the same bits for any
    number of threads.

    The normaliser is exact at any scale of the logits: cells whose largest am and lm lie too far apart for a product of
    exponentials are summed directly.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> loss, grads, occupancy = tl.simple_rnnt_loss(np.zeros((1, 4, 5)), np.zeros((1, 3, 5)), [[1, 2]], [4], [2])
    >>> bool(np.isclose(loss[0], 6 * np.log(5) - np.log(10))), grads.lm.shape, occupancy.blank.shape
    (True, (1, 3, 5), (1, 4, 3))
    """
    of = problem(
        am, lm, targets, am_lengths, target_lengths, lm_only_scale=lm_only_scale, am_only_scale=am_only_scale,
        validate=validate, blank=blank, topology=topology, fastemit_lambda=fastemit_lambda, delay_penalty=delay_penalty,
        infeasible=infeasible,
    )  # fmt: skip
    done = forward(of, weights_of(of, weights), gradient)
    grads = None
    if done.gradients is not None:
        kind = of.joint.am.dtype
        grads = SimpleGrads(*(each if each.dtype == kind else each.astype(kind) for each in done.gradients))
    return done.loss, grads, Occupancy(*done.occupancy, done.loss)
