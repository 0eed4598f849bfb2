"""Launches of `kernels/softmax.cu`: logits to arcs, occupancies to the gradient of the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

from transducer_loss.arrays import element_strides
from transducer_loss.cells import Group
from transducer_loss.checks import Options, Targets
from transducer_loss.shard import Shard

_CELLS_OF_BLOCK = 1024
"""As in the kernels where a cell is a few numbers."""


def _per_thread(logits: Any) -> int:
    """Numbers of a row for one thread of the kernels: as many as it holds at once where the row lies dense (`InPackets`)."""
    if element_strides(logits)[-1] != 1:
        return 4
    return 2 if logits.dtype.name == "float64" else 16


class Arcs(NamedTuple):
    """Per cell: log-probabilities of the blank and of the label arc, and what the gradient needs to make probabilities."""

    log_blank: Any
    log_label: Any
    normaliser: Any


def empty_arcs(processor: Any, cells: int, dtype: str) -> Arcs:
    """Arrays for the arcs of a number of cells."""
    return Arcs(*(processor.empty((cells,), dtype) for _ in range(3)))


def _strides(logits: Any) -> tuple[int, ...]:
    """Whether logits are packed (cells, V), and their strides by utterance, frame, label (or cell) and class."""
    if logits.ndim == 2:
        return (1, 0, 0, *element_strides(logits))
    return (0, *element_strides(logits))


def forward(
    processor: Any, group: Group, logits: Any, targets: Targets, options: Options, arcs: Arcs,
    begin: int = 0, cells: int | None = None, keep: bool = False, alone: bool = False, bias: Any = None,
    shard: Shard | None = None, log_sum: Any = None,
) -> None:  # fmt: skip
    """Arcs of cells [begin, begin + cells) of the group from their logits, padded or packed, plus a bias.

    With a shard the arcs get its own logits, and `log_sum` the logarithm of its sum: `join` makes arcs of them.
    """
    count, classes = group.cells if cells is None else cells, logits.shape[-1]
    processor.launch(
        f"softmax_forward<{logits.dtype.name}>", count, classes,
        count, begin, group.table, group.count, group.spans, logits, *_strides(logits), classes, *_place(shard, classes),
        bias, *targets.arguments, options.blank, options.distribution, int(keep), *arcs, log_sum, alone=alone,
        per_thread=_per_thread(logits),
    )  # fmt: skip


def _place(shard: Shard | None, classes: int) -> tuple[int, int]:
    """The first class of a row, and the number of all classes."""
    return (0, classes) if shard is None else (shard.first, shard.vocab_size)


def sharded_arcs(processor: Any, cells: int, dtype: str) -> tuple[Arcs, Any, Any]:
    """Arrays as of `empty_arcs`, one for `log_sum`, and those that shards take the largest of."""
    exchanged = processor.empty((3, cells), dtype)
    return Arcs(exchanged[0], exchanged[1], processor.empty((cells,), dtype)), processor.empty((cells,), dtype), exchanged


def join(processor: Any, shard: Shard, options: Options, keep: bool, arcs: Arcs, log_sum: Any, exchanged: Any) -> None:
    """Arcs of all classes from those of every shard, in two exchanges."""
    cells, blocks = len(log_sum), -(-len(log_sum) // _CELLS_OF_BLOCK)
    largest = exchanged[2]
    largest[...] = log_sum
    shard.all_reduce(exchanged, "max")
    shares = processor.empty((cells,), log_sum.dtype.name)
    processor.launch(f"softmax_share<{shares.dtype.name}>", blocks, _CELLS_OF_BLOCK, cells, log_sum, largest, shares)
    shard.all_reduce(shares, "sum")
    processor.launch(
        f"softmax_join<{shares.dtype.name}>", blocks, _CELLS_OF_BLOCK,
        cells, log_sum, largest, shares, shard.vocab_size, options.distribution, int(keep), *arcs,
    )  # fmt: skip


def backward(
    processor: Any, group: Group, kept: Any, begin: int, logits: Any, retained: bool, bias: Any, targets: Targets,
    options: Options, normaliser: Any, occupancy: tuple[Any, Any], weights: Any, weight: float, gradient: Any,
    shard: Shard | None = None,
) -> None:  # fmt: skip
    """Gradient of a tile's logits, row i for item begin + i of the list `kept` (None: of the group's cells)."""
    cells, classes = gradient.shape
    processor.launch(
        f"softmax_backward<{logits.dtype.name},{gradient.dtype.name}>", cells, classes,
        cells, begin, kept, group.table, group.count, group.spans, logits, int(retained), classes,
        _place(shard, classes)[0], bias, *targets.arguments, options.blank, options.distribution, normaliser, *occupancy,
        weights, weight, gradient, per_thread=_per_thread(logits), alone=True,
    )  # fmt: skip


def backward_logits(
    processor: Any, group: Group, logits: Any, targets: Targets, options: Options, normaliser: Any,
    occupancy: tuple[Any, Any], weights: Any, clamp: float, gradient: Any,
) -> None:  # fmt: skip
    """Gradient of the caller's logits, zeros in the padding; `gradient` may be `logits`. `clamp`: its bound before weights."""
    classes = logits.shape[-1]
    frames, columns = (0, 0) if logits.ndim == 2 else logits.shape[1:3]
    rows = logits.shape[0] if logits.ndim == 2 else logits.shape[0] * frames * columns
    processor.launch(
        f"softmax_backward_logits<{logits.dtype.name}>", rows, classes,
        rows, group.table, group.count, group.spans, frames, columns, logits, *_strides(logits), classes,
        *targets.arguments, options.blank, options.distribution, normaliser, *occupancy, weights,
        clamp, gradient, *_strides(gradient)[1:], per_thread=_per_thread(logits),
    )  # fmt: skip
