"""Launches of `kernels/lattice.cu`: arcs to loss, occupancy and best path."""

from __future__ import annotations

from typing import Any

from transducer_loss.arrays import COMPUTE
from transducer_loss.cells import Group
from transducer_loss.checks import Options
from transducer_loss.softmax import Arcs

# The widest lattice whose steps the kernel exchanges in shared memory: SHARED_COLUMNS of kernels/lattice.cu.
_SHARED_COLUMNS = 1024

# A lattice cell costs the host about as much as so many columns of a softmax.
_STEPS = 16


def scaled_bytes(dtype: str) -> int:
    """Bytes of one forward or backward value (mantissa and exponent)."""
    return 8 if COMPUTE[dtype] == "float32" else 16


def scratch_columns(columns: int) -> int:
    """Columns of the exchange rows in global memory: none for lattices that fit the shared memory."""
    return columns if columns > _SHARED_COLUMNS else 0


def sums(
    processor: Any, group: Group, arcs: Arcs, options: Options, loss: Any, reported: Any, scratch: Any = None
) -> tuple[Any, Any, Any]:
    """Forward and backward values of every cell; the loss of every utterance, true and as `infeasible` reports it.

    `scratch` is memory of ``2 * scaled_bytes`` a cell, made here where it is None. Returns the values, to be handed to
    `occupancy`.
    """
    real = arcs.log_blank.dtype.name
    size, columns = scaled_bytes(real), scratch_columns(group.columns)
    if scratch is None:
        scratch = processor.empty((2 * size * group.cells,), "uint8")
    ahead, back = scratch[: size * group.cells], scratch[size * group.cells : 2 * size * group.cells]
    exchange = processor.empty((4 * size * columns * group.count,), "uint8") if columns else None
    processor.launch(
        f"lattice_sums<{real}>", 2 * group.count, group.columns,
        group.count, group.table, group.spans, arcs.log_blank, arcs.log_label, options.topology, options.delay_penalty,
        ahead, back, exchange, columns, loss, reported, int(options.infeasible == "zero"),
        steps=_STEPS * group.rows // group.count, per_thread=1,
    )  # fmt: skip
    return ahead, back, loss


def occupancy(
    processor: Any, group: Group, arcs: Arcs, options: Options, values: tuple[Any, Any, Any], effective: bool, out: Any
) -> None:
    """Occupancy of the blank and label arcs into the pair `out`; raw, or what the gradient needs."""
    real = arcs.log_blank.dtype.name
    processor.launch(
        f"lattice_occupancy<{real}>", group.rows, group.columns,
        group.rows, group.table, group.count, group.spans, arcs.log_blank, arcs.log_label, options.topology,
        options.delay_penalty, *values, int(effective), options.fastemit_lambda, *out, steps=_STEPS, per_thread=1,
    )  # fmt: skip


def best_path(processor: Any, group: Group, arcs: Arcs, options: Options, frames: Any, score: Any) -> None:
    """Frames (B, U) int64 of the labels on the best path, and its log-probability (B,) float64."""
    columns = scratch_columns(group.columns)
    ahead = processor.empty((group.cells,), "float64")
    exchange = processor.empty((2 * columns * group.count,), "float64") if columns else None
    processor.launch(
        f"lattice_best_path<{arcs.log_blank.dtype.name}>", group.count, group.columns,
        group.count, group.table, group.spans, arcs.log_blank, arcs.log_label, options.topology, options.delay_penalty,
        ahead, exchange, columns, frames, frames.shape[1], score,
        steps=_STEPS * group.rows // group.count, per_thread=1,
    )  # fmt: skip
