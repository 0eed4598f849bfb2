"""Launches of `kernels/output_layer.cu`: the output layer's rows that a sampled softmax looks at, and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from transducer_loss.arrays import element_strides, on_host
from transducer_loss.cells import Cells
from transducer_loss.checks import ANY_LABELS, Targets, integers, lengths, targets_for
from transducer_loss.classes import Classes, classes_for
from transducer_loss.processors import Allocate, processor_for


def labels_in(
    classes: Classes, targets: Any, target_lengths: Any, threads: int | None = None, allocate: Allocate | None = None
) -> Any:
    """Labels (B, U) as positions among the sampled classes, (B, max U_b) int32, for losses of logits over these alone."""
    given = integers(targets, "targets")
    labels = lengths(target_lengths, "target_lengths", given.shape[0], 0, given.shape[-1], "U")
    with processor_for(classes.ids if on_host(given) else given, threads, allocate) as processor:
        known = targets_for(given, processor, labels, classes.vocab_size, ANY_LABELS, False)
        here = classes_for(classes, processor, classes.vocab_size, classes.blank, known.array, labels, False)
        return slots_of(processor, here, Cells.full(np.ones_like(labels), labels), known).array


def slots_of(processor: Any, classes: Classes, cells: Cells, targets: Targets) -> Targets:
    """Labels as slots of the classes, (B, U); -1 for a label that has none."""
    batch, columns = len(cells.frames), max(int(cells.labels.max()), 1)
    found = processor.empty((batch, columns), "int32")
    processor.launch(
        "output_layer_targets", batch, columns,
        batch, Cells.full(cells.frames, cells.labels).group(processor).table, *targets.arguments, classes.ids,
        classes.slots if classes.per_utterance else 0, classes.slots, columns, found, per_thread=1,
    )  # fmt: skip
    return Targets(found)


def gather(processor: Any, classes: Classes, row: int, weight: Any, bias: Any, rows: Any, offsets: Any) -> None:
    """Weight (V, H) and bias (V,) or None of a row of classes -> `rows` (K, H) and `offsets` (K,) or None."""
    ids, probability = _row(classes, row)
    processor.launch(
        f"output_layer_gather<{weight.dtype.name},{rows.dtype.name}>", classes.slots, rows.shape[1],
        classes.slots, ids, probability if classes.correction else None, classes.blank, classes.vocab_size, weight,
        *element_strides(weight), rows.shape[1], bias, 0 if bias is None else element_strides(bias)[0], rows, offsets,
    )  # fmt: skip


def scatter(processor: Any, classes: Classes, row: int, rows: Any, offsets: Any, weight: Any, bias: Any) -> None:
    """Add the gradients of gathered rows to those of the whole layer."""
    processor.launch(
        f"output_layer_scatter<{rows.dtype.name}>", classes.slots, rows.shape[1],
        classes.slots, _row(classes, row)[0], classes.vocab_size, rows.shape[1], rows, offsets, weight, bias,
    )  # fmt: skip


def _row(classes: Classes, row: int) -> tuple[Any, Any]:
    """Ids and probabilities of an utterance, or of all."""
    return (classes.ids[row], classes.probability[row]) if classes.per_utterance else (classes.ids, classes.probability)
