"""The classes that a sampled softmax looks at."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from transducer_loss.arrays import as_array, as_numpy
from transducer_loss.checks import blank_class, looked_at, on_processor, whole_number
from transducer_loss.processors import processor_for

MOST_CLASSES = 1 << 22
"""Vocabularies that sampling has room for."""


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
    """Blank, labels and negatives: the classes that a loss is normalised over (arXiv 2203.16868).

    Made by `sample_classes` or `from_ids`; `joint_rnnt_loss` takes it as ``classes=``.

    Attributes
    ----------
    ids : (K,) or (B, K) array of int32
        Classes of the whole batch, or of each utterance: the blank, then the others in rising order.
    probability : like `ids`, float32
        Probability with which a class was drawn; 1 for blank, labels, and whatever was certain to be taken.
    vocab_size : int
        V.
    blank : int
        Class of the blank.
    correction : bool
        Whether ``-log(probability)`` is added to the logits, so that their exponentials sum, on average, to those of all V.
    """

    ids: Any
    probability: Any
    vocab_size: int
    blank: int
    correction: bool

    @property
    def slots(self) -> int:
        """K."""
        return int(self.ids.shape[-1])

    @property
    def per_utterance(self) -> bool:
        """Whether every utterance has classes of its own."""
        return bool(self.ids.ndim == 2)

    @classmethod
    def from_ids(cls, ids: Any, vocab_size: int, *, blank: int = 0, probability: Any = None) -> Classes:
        """Classes that you have chosen yourself.

        Parameters
        ----------
        ids : (K,) or (B, K) array or list of int
            Distinct classes, in any order, with the blank among them. On a device they are copied to be checked, which
            synchronises, and the result is on the device.
        vocab_size : int
            V.
        blank : int
            Negative counts from the end.
        probability : array or list of float, shaped as `ids`, optional
            In (0, 1], of having been drawn: its logarithm is taken off the logits, as `correction` does.

        Returns
        -------
        Classes

        Examples
        --------
        >>> import transducer_loss as tl
        >>> tl.Classes.from_ids([7, 0, 3], vocab_size=10).ids
        array([0, 3, 7], dtype=int32)
        """
        vocabulary = vocabulary_size(vocab_size)
        nothing = blank_class(blank, vocabulary)
        given = _array(ids, "ids", "iu")
        host = as_numpy(given)
        outside = (host < 0) | (host >= vocabulary)
        if outside.any():
            raise ValueError(f"ids: expected classes in [0, V = {vocabulary}), got {host[outside][0]}")
        host = host.astype(np.int64)
        if not (host == nothing).any(axis=-1).all():
            raise ValueError(f"ids: expected the blank ({nothing}) among them, got {host.tolist()}")
        order = np.argsort(np.where(host == nothing, -1, host), axis=-1, kind="stable")
        ordered = np.take_along_axis(host, order, axis=-1)
        again = np.diff(np.sort(host, axis=-1), axis=-1) == 0
        if again.any():
            raise ValueError(f"ids: expected distinct classes, got {np.sort(host, axis=-1)[..., 1:][again][0]} twice")
        shares = np.ones(host.shape, np.float32)
        if probability is not None:
            of_ids = _array(probability, "probability", "f")
            shares = as_numpy(of_ids).astype(np.float32)
            if shares.shape != host.shape:
                raise ValueError(f"probability: expected shape {host.shape} as ids, got {shares.shape}")
            if not ((shares > 0) & (shares <= 1)).all():
                raise ValueError(f"probability: expected probabilities in (0, 1], got {shares.tolist()}")
            shares = np.take_along_axis(shares, order, axis=-1)
        processor = processor_for(given)
        with processor:
            classes, shares = processor.to_device(ordered.astype(np.int32)), processor.to_device(shares)
            return cls(classes, shares, vocabulary, nothing, probability is not None)


def _array(value: Any, name: str, kinds: str) -> Any:
    """An array of one or two dimensions, not empty, of a kind of numbers."""
    if isinstance(value, (list, tuple)):
        try:
            value = np.asarray(value)
        except ValueError:
            raise ValueError(f"{name}: expected shape (K,) or (B, K), in rows of one length, got {value}") from None
    array = as_array(value, name)
    if array.ndim not in (1, 2) or 0 in array.shape:
        raise ValueError(f"{name}: expected shape (K,) or (B, K), got {tuple(array.shape)}")
    if array.dtype.kind not in kinds and (kinds == "iu" or array.dtype.name != "bfloat16"):
        raise TypeError(f"{name}: expected {'integers' if 'i' in kinds else 'floats'}, got dtype {array.dtype.name}")
    return array


def vocabulary_size(value: Any) -> int:
    """V of `vocab_size`."""
    vocabulary = whole_number(value, "vocab_size", 1)
    if vocabulary > MOST_CLASSES:
        raise ValueError(f"vocab_size: expected at most {MOST_CLASSES} classes to draw from, got {vocabulary}")
    return vocabulary


def expect_classes(classes: Any) -> None:
    """Raise unless `classes` are such."""
    if not isinstance(classes, Classes):
        raise TypeError(f"classes: expected Classes, got {type(classes).__name__}")


def classes_for(
    classes: Any, processor: Any, vocabulary: int, blank: int, targets: Any, labels: Any, validate: bool | None
) -> Classes:
    """Check classes against the utterances they are used for, and bring them to the processor.

    Labels that are not among the classes are found where both are on the host, or with `validate`; else they make an
    utterance's loss NaN.
    """
    expect_classes(classes)
    for name, mine, theirs in (("vocabulary", classes.vocab_size, vocabulary), ("blank", classes.blank, blank)):
        if mine != theirs:
            raise ValueError(f"classes: expected those of {name} {theirs}, got {mine}")
    if classes.ids.ndim not in (1, 2) or tuple(classes.probability.shape) != tuple(classes.ids.shape):
        shapes = tuple(classes.ids.shape), tuple(classes.probability.shape)
        raise ValueError(f"classes: expected ids and probability of one shape, (K,) or (B, K), got {shapes[0]} and {shapes[1]}")
    if classes.per_utterance and len(classes.ids) != len(labels):
        raise ValueError(f"classes: expected those of {len(labels)} utterances, got {len(classes.ids)}")
    if looked_at(validate, classes.ids, targets):
        ids, known = map(as_numpy, (classes.ids, targets))
        for b, length in enumerate(labels):
            missing = ~np.isin(known[b, :length], ids[b] if classes.per_utterance else ids)
            if missing.any():
                u = int(np.argmax(missing))
                raise ValueError(
                    f"targets: expected labels among the sampled classes, as sample_classes keeps those of its own batch, "
                    f"got {known[b, u]} at index ({b}, {u})"
                )
    ids, probability = (on_processor(array, processor, "classes") for array in (classes.ids, classes.probability))
    # As kernels read them, whoever has made them.
    checked: Classes = dataclasses.replace(
        classes, ids=processor.dense(ids, "int32"), probability=processor.dense(probability, "float32")
    )  # fmt: skip
    return checked
