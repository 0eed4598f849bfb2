"""Launches of `kernels/output_layer.cu`: the output layer's rows that a sampled softmax looks at, and their gradients."""

from __future__ import annotations

from typing import Any

from transducer_loss.arrays import element_strides, on_host
from transducer_loss.cells import Ints, label_table
from transducer_loss.checks import ANY_LABELS, Targets, integers, lengths, targets_for
from transducer_loss.classes import Classes, classes_for, expect_classes
from transducer_loss.processors import Allocate, processor_for


def labels_in(classes: Classes, targets: Any, target_lengths: Any, *, validate: bool = False) -> Any:
    """Labels as positions among the sampled classes, for losses of logits over these alone.

    Parameters
    ----------
    classes : Classes
    targets : (B, U) array or nested list of int
    target_lengths : (B,) array or list of int
    validate : bool
        Also check what is on a device, which synchronises.

    Returns
    -------
    (B, max U_b) array of int32
        On the device of `targets` or `classes`, if one is on a device. The blank is class 0 there. -1 past the last label, and
        for an unchecked label that is not among the classes.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Examples
    --------
    >>> import transducer_loss as tl
    >>> tl.labels_in(tl.Classes.from_ids([0, 4, 7, 9], vocab_size=10), [[7, 4], [9, 0]], [2, 1])
    array([[ 2,  1],
           [ 3, -1]], dtype=int32)
    """
    return found_in(classes, targets, target_lengths, validate)


def found_in(
    classes: Any, targets: Any, target_lengths: Any, validate: bool, threads: int | None = None,
    allocate: Allocate | None = None,
) -> Any:  # fmt: skip
    """See `labels_in`."""
    expect_classes(classes)
    given = integers(targets, "targets")
    if given.ndim != 2 or given.shape[0] < 1:
        raise ValueError(f"targets: expected shape (B, U) of at least one utterance, got {tuple(given.shape)}")
    labels = lengths(target_lengths, "target_lengths", given.shape[0], 0, given.shape[-1], "U")
    with processor_for(classes.ids if on_host(given) else given, threads, allocate) as processor:
        known = targets_for(given, processor, labels, classes.vocab_size, ANY_LABELS, validate)
        here = classes_for(classes, processor, classes.vocab_size, classes.blank, given, labels, validate)
        return slots_of(processor, here, labels, known).array


def slots_of(processor: Any, classes: Classes, labels: Ints, targets: Targets) -> Targets:
    """Labels as slots of the classes, (B, U); -1 for a label that has none."""
    batch, columns = len(labels), max(int(labels.max()), 1)
    found = processor.empty((batch, columns), "int32")
    processor.launch(
        "output_layer_targets", batch, columns,
        batch, label_table(processor, labels), *targets.arguments, classes.ids,
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
