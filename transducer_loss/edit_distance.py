"""Edit distance of label sequences, batched. Launches `kernels/edit_distance.cu`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from transducer_loss.arrays import element_strides, on_host
from transducer_loss.checks import integers, lengths_on, on_processor, whole_number
from transducer_loss.processors import Allocate, processor_for

MOST_LABELS = (1 << 21) - 2
"""Of a sequence: its edits are counted in 21 bits (COUNT_BITS of the kernel)."""

# The longest reference whose diagonals the kernel holds in shared memory: SHARED_LABELS of kernels/edit_distance.cu.
_SHARED_LABELS = 1023


@dataclasses.dataclass(frozen=True, eq=False)
class EditDistance:
    """Edits that turn references into hypotheses, each (B,) or (B, N) int32; -1 for padding.

    Attributes
    ----------
    total : array
        The least number of edits.
    insertions, deletions, substitutions : array
        Labels that only the hypothesis has, that only the reference has, and that differ: of those alignments of `total` edits,
        the one with the most substitutions.
    """

    total: Any
    insertions: Any
    deletions: Any
    substitutions: Any


def edit_distance(
    hypotheses: Any,
    hypothesis_lengths: Any,
    references: Any,
    reference_lengths: Any,
    *,
    blank: int | None = None,
    validate: bool = False,
) -> EditDistance:
    """Edit distance of every hypothesis and the reference of its utterance.

    Parameters
    ----------
    hypotheses : (B, L) or (B, N, L) array or nested list of int
        One hypothesis an utterance, or N. Any integers, any strides; what is past a hypothesis's length is never read.
    hypothesis_lengths : (B,) or (B, N) array or list of int
        From 0 to L; -1 for padding, which is no hypothesis.
    references : (B, U) array or nested list of int
    reference_lengths : (B,) array or list of int
        From 0 to U.
    blank : int, optional
        A label that is left out of hypotheses and references before they are compared, as of frame-by-frame alignments.
    validate : bool
        Also check lengths that are on a device, which synchronises. Unchecked, a length out of range there gives -1.

    Returns
    -------
    EditDistance
        On the device of the hypotheses; else of the references, if they are on one; else on the host.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came. No sequence may have more than 2,097,150 labels.

    Notes
    -----
    Nothing is read back from a device. Labels are copied once, to 8 bytes each; a pair takes 24 bytes for each label of its
    reference where some may have more than 1,023.

    Examples
    --------
    >>> import transducer_loss as tl
    >>> edits = tl.edit_distance([[1, 2, 3, 4], [5, 6, 0, 0]], [4, 2], [[1, 3, 4], [5, 7, 6]], [3, 3])
    >>> edits.total, edits.insertions, edits.deletions
    (array([1, 1], dtype=int32), array([1, 0], dtype=int32), array([0, 1], dtype=int32))
    """
    return counted(hypotheses, hypothesis_lengths, references, reference_lengths, blank=blank, validate=validate)


def counted(
    hypotheses: Any, hypothesis_lengths: Any, references: Any, reference_lengths: Any, *, blank: int | None,
    validate: bool | None, threads: int | None = None, allocate: Allocate | None = None,
) -> EditDistance:  # fmt: skip
    """See `edit_distance`."""
    of, against = sequences(hypotheses, "hypotheses"), integers(references, "references")
    if against.ndim != 2 or against.shape[0] != of.shape[0]:
        raise ValueError(f"references: expected shape (B, U) = ({of.shape[0]}, U), got {tuple(against.shape)}")
    processor = processor_for(against if on_host(of) else of, threads, allocate)
    with processor:
        labels, counts = labels_of(processor, of, hypothesis_lengths, "hypothesis", blank, validate)
        reference_labels, reference_counts = labels_of(processor, against, reference_lengths, "reference", blank, validate)
        pairs, columns = len(counts), int(against.shape[1])
        scratch = None
        if columns > _SHARED_LABELS:
            scratch = processor.empty((pairs * 3 * (columns + 1),), "int64")
        outputs = [processor.output(tuple(of.shape[:-1]), "int32") for _ in range(4)]
        processor.launch(
            "edit_distance_counts", pairs, 1 + min(int(of.shape[-1]), columns),
            pairs, pairs // of.shape[0], labels, int(of.shape[-1]), counts, reference_labels, columns, reference_counts,
            scratch, *(view for _, view in outputs), steps=1 + int(of.shape[-1]) + columns, per_thread=1,
        )  # fmt: skip
    return EditDistance(*(native for native, _ in outputs))


def sequences(value: Any, name: str) -> Any:
    """Labels (B, L) or (B, N, L), of at least one sequence."""
    array = integers(value, name)
    if array.ndim not in (2, 3) or 0 in array.shape[:-1]:
        raise ValueError(f"{name}: expected shape (B, L) or (B, N, L) with at least one sequence, got {tuple(array.shape)}")
    return array


def labels_of(
    processor: Any, array: Any, lengths: Any, what: str, blank: int | None, validate: bool | None
) -> tuple[Any, Any]:
    """Labels without blanks, (sequences, L) int64, and their numbers, (sequences,) int64: negative where there is no length."""
    *batch, columns = (int(size) for size in array.shape)
    plural = "hypotheses" if what == "hypothesis" else "references"
    if columns > MOST_LABELS:
        raise ValueError(f"{plural}: expected at most {MOST_LABELS} labels, got shape {tuple(array.shape)}")
    left_out = 0 if blank is None else whole_number(blank, "blank")
    if not -(1 << 63) <= left_out < 1 << 63:
        raise ValueError(f"blank: expected a label of 64 bits, got {left_out}")
    shape = tuple(batch)
    low, bound = (-1, "L") if what == "hypothesis" else (0, "U")
    dims = f"{'(B,)' if len(shape) == 1 else '(B, N)'} {bound}"
    given = lengths_on(processor, lengths, f"{what}_lengths", shape, low, columns, dims, validate)
    if array.dtype.name not in ("int32", "int64"):
        array = array.astype(np.int64)
    array = on_processor(array, processor, plural)
    strides = element_strides(array)
    number = int(np.prod(shape))
    found, counts = processor.empty((number, columns), "int64"), processor.empty((number,), "int64")
    processor.launch(
        "edit_distance_labels", number, columns,
        number, number // shape[0], array, int(array.itemsize == 8), strides[0], strides[-2] if len(shape) == 2 else 0,
        strides[-1], columns, given, int(blank is not None), left_out, found, counts, per_thread=1,
    )  # fmt: skip
    return found, counts
