"""Launches of `kernels/sampling.cu`: negatives of a sampled softmax, drawn without a round trip to the host."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from transducer_loss.arrays import as_array, as_numpy, element_strides, on_host
from transducer_loss.cells import Cells, label_table
from transducer_loss.checks import (
    ANY_LABELS,
    blank_class,
    choice,
    expect_shape,
    float_array,
    integers,
    lengths,
    looked_at,
    targets_for,
    whole_number,
)
from transducer_loss.classes import Classes, vocabulary_size
from transducer_loss.processors import Allocate, processor_for

PROPOSALS = ("uniform", "unigram", "ctc")
SCOPES = ("batch", "utterance")

# Scratch of the utterances that are drawn for at once, each with classes of its own.
_SCRATCH = 16 << 20

# Classes of an utterance that one block adds the posteriors of.
_PART = 2048


def sample_classes(
    targets: Any,
    target_lengths: Any,
    *,
    vocab_size: int,
    num_samples: int,
    proposal: str = "uniform",
    scope: str = "batch",
    counts: Any = None,
    ctc_logits: Any = None,
    ctc_lengths: Any = None,
    blank: int = 0,
    correction: bool = False,
    seed: int = 0,
    step: int = 0,
    validate: bool = False,
) -> Classes:
    """Classes for a sampled softmax: the blank, the labels at hand, and negatives drawn without replacement.

    Sampled softmax for RNN-T (arXiv 2203.16868, section 3): the loss normalises over these K classes instead of V.

    Parameters
    ----------
    targets : (B, U) array or nested list of int
        Labels, all of which are kept. Those beyond U_b are never read.
    target_lengths : (B,) array or list of int
    vocab_size : int
        V, at most 4,194,304.
    num_samples : int
        Negatives k. There are ``K = min(V, 1 + B U + k)`` slots (``1 + U + k`` with ``scope="utterance"``), a number
        that depends on shapes alone: those that labels leave empty, because they repeat, hold more negatives. With 0
        these are the only ones; where no more than k classes are left, all are taken and the loss is the exact one.
    proposal : {"uniform", "unigram", "ctc"}
        What negatives are drawn by: all classes alike; `counts`, of which those below 2^-40 of the largest are alike; or the
        posteriors of an auxiliary CTC head (`ctc_logits`), averaged over the frames, which finds the classes that the loss
        could confuse with the labels.
    scope : {"batch", "utterance"}
        Whether one set of classes serves the batch, or each utterance has its own.
    counts : (V,) array or list of float or int
        Of the classes in the training text, for ``proposal="unigram"``: not negative, not all 0. They are checked on the host;
        on a device with `validate`, and unchecked what is no count is 0.
    ctc_logits : (B, T, V) array
        Any float dtype, any strides, for ``proposal="ctc"``. Read twice, never copied. A NaN is a probability of 0; a frame
        with +inf is left out.
    ctc_lengths : (B,) array or list of int
        T_b of `ctc_logits`.
    blank : int
        Class of the blank; negative counts from the end.
    correction : bool
        Draw by 99 % `proposal` and 1 % uniform, and raise the logit of a negative that was drawn with probability pi by
        ``-log(pi)``. The expected sum of exponentials is then that of all V classes; its logarithm, and so the loss, is still
        too low on average. Without it the loss is lower still, but rivals weigh more in the gradient.
    seed, step : int
        The same classes for the same numbers, modulo 2^63, on every processor: count `step` up in training. Give
        data-parallel workers a seed each.
    validate : bool
        Also check targets and counts that are on a device, which synchronises.

    Returns
    -------
    Classes
        On the device of `ctc_logits`; else on that of `counts` or `targets`, if one is on a device; else on the host.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Notes
    -----
    A class v is drawn with probability ``min(1, n w_v / sum w)``, w being the proposal among the classes that are not kept, n
    the number of negatives, and the sum over those whose probability is below 1. Classes of weight 0 are drawn only where too
    few others are left. Systematic sampling over a random order of the classes makes this exact, with no class twice.

    The classes' own memory is 8 K bytes, or 8 B K; temporary memory is 9 V bytes, with counts 8 V more where they are no
    float64 or to be brought to a device, with ``proposal="ctc"`` 12 a frame, and with ``scope="utterance"`` as much for each of
    the utterances drawn at once, as many as 16 MiB hold. Nothing is read back from the device but lengths that are there.

    Use the framework's own CTC loss to train the auxiliary head, on the same logits: they are not changed here.

    Examples
    --------
    >>> import transducer_loss as tl
    >>> classes = tl.sample_classes([[3, 5], [3, 1]], [2, 1], vocab_size=1000, num_samples=4)
    >>> classes.ids.shape, [v in classes.ids for v in (0, 3, 5)]
    ((9,), [True, True, True])
    """
    return draw(
        targets, target_lengths, vocab_size=vocab_size, num_samples=num_samples, proposal=proposal, scope=scope,
        counts=counts, ctc_logits=ctc_logits, ctc_lengths=ctc_lengths, blank=blank, correction=correction, seed=seed,
        step=step, validate=validate,
    )  # fmt: skip


def draw(
    targets: Any, target_lengths: Any, *, vocab_size: int, num_samples: int, proposal: str, scope: str, counts: Any,
    ctc_logits: Any, ctc_lengths: Any, blank: int, correction: bool, seed: int, step: int, validate: bool,
    threads: int | None = None, allocate: Allocate | None = None,
) -> Classes:  # fmt: skip
    """See `sample_classes`."""
    vocabulary = vocabulary_size(vocab_size)
    silent = blank_class(blank, vocabulary)
    samples = whole_number(num_samples, "num_samples", 0)
    each = SCOPES[choice(scope, SCOPES, "scope")] == "utterance"
    drawn_from, drawn_at = (whole_number(value, name) & (1 << 63) - 1 for value, name in ((seed, "seed"), (step, "step")))
    choice(proposal, PROPOSALS, "proposal")
    needed = {"counts": (counts, "unigram"), "ctc_logits": (ctc_logits, "ctc"), "ctc_lengths": (ctc_lengths, "ctc")}
    for name, (value, of) in needed.items():
        if (value is not None) != (proposal == of):
            wanted = "an array" if proposal == of else "None"
            raise ValueError(f"{name}: expected {wanted} with proposal={proposal!r}, got {type(value).__name__}")
    given = integers(targets, "targets")
    if given.ndim != 2 or given.shape[0] < 1:
        raise ValueError(f"targets: expected shape (B, U) of at least one utterance, got {tuple(given.shape)}")
    batch, columns = given.shape
    labels = lengths(target_lengths, "target_lengths", batch, 0, columns, "U")
    logits = None if ctc_logits is None else float_array(ctc_logits, "ctc_logits", "B T V")
    if logits is not None:
        expect_shape(logits, "ctc_logits", "(B, T, V)", (batch, logits.shape[1], vocabulary))
    numbers = None if counts is None else _counts(counts, vocabulary, validate)
    on_device = (array for array in (logits, numbers, given) if array is not None and not on_host(array))
    source = next(on_device, given) if logits is None else logits
    slots = min(vocabulary, 1 + (columns if each else batch * columns) + samples)
    rows = batch if each else 1

    with processor_for(source, threads, allocate) as processor:
        table = label_table(processor, labels)
        known = targets_for(given, processor, labels, vocabulary, ANY_LABELS, validate)
        frames = None if logits is None else _Frames(processor, logits, ctc_lengths, labels)
        weights, by_row = None, 0
        if numbers is not None:
            weights = processor.empty((vocabulary,), "int64")
            if on_host(numbers):
                numbers = processor.to_device(numbers.astype(np.float64, copy=False))
            read = processor.dense(numbers, "float64")
            processor.launch("sampling_counts", 1, vocabulary, vocabulary, read, weights, alone=True)
        at_once = max(1, min(rows, _SCRATCH // (9 * vocabulary)))
        marks = processor.empty((at_once, vocabulary), "uint8")
        if frames is not None:
            weights, by_row = processor.empty((at_once, vocabulary), "int64"), vocabulary if each else 0
        shape = (rows, slots) if each else (slots,)
        ids, probability = (processor.output(shape, kind)[1] for kind in ("int32", "float32"))
        for begin, end in itertools.pairwise([*range(0, rows, at_once), rows]):
            if frames is not None:
                first, last = (begin, end) if each else (0, batch)
                frames.average(weights, first, last, by_row)
            processor.launch(
                "sampling_draw", end - begin, vocabulary,
                end - begin, begin, table, batch, int(each), *known.arguments, silent, vocabulary, weights, by_row,
                int(bool(correction)), slots, drawn_from, drawn_at, marks, ids, probability, steps=20,
            )  # fmt: skip
    return Classes(ids, probability, vocabulary, silent, bool(correction))


def _counts(counts: Any, vocabulary: int, validate: bool | None) -> Any:
    """Counts of classes (V,)."""
    try:
        array: Any = np.asarray(counts) if isinstance(counts, (list, tuple)) else as_array(counts, "counts")
    except ValueError:
        raise ValueError(f"counts: expected numbers of shape (V,), got {counts}") from None
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"counts: expected numbers, got dtype {array.dtype.name}")
    expect_shape(array, "counts", "(V,)", (vocabulary,))
    if looked_at(validate, array):
        host = as_numpy(array).astype(np.float64, copy=False)
        bad = ~(np.isfinite(host) & (host >= 0))
        if bad.any():
            v = int(np.argmax(bad))
            raise ValueError(f"counts: expected finite numbers of 0 or more, got {host[v]} at index {v}")
        if not host.any():
            raise ValueError("counts: expected some above 0, got none")
    return array


class _Frames:
    """Posteriors of the frames of CTC logits, averaged class by class."""

    def __init__(self, processor: Any, logits: Any, ctc_lengths: Any, labels: Any) -> None:
        batch, most, self.classes = logits.shape
        frames = lengths(ctc_lengths, "ctc_lengths", batch, 1, most, "T")
        self.processor, self.logits = processor, logits
        self.group = Cells.full(frames, labels).group(processor)
        self.highest = processor.empty((self.group.rows,), "float32")
        self.share = processor.empty((self.group.rows,), "int64")
        processor.launch(
            f"sampling_frames<{logits.dtype.name}>", self.group.rows, self.classes,
            self.group.rows, self.group.table, batch, logits, *element_strides(logits), self.classes, self.highest, self.share,
        )  # fmt: skip

    def average(self, weights: Any, begin: int, end: int, by_row: int) -> None:
        """Sums over the frames of utterances [begin, end), each in a row of its own or all in one."""
        self.processor.zero(weights)
        table, count = self.group.select(begin, end)
        self.processor.launch(
            f"sampling_posteriors<{self.logits.dtype.name}>", count * -(-self.classes // _PART), _PART,
            _PART, table, count, self.logits, *element_strides(self.logits), self.classes, self.highest, self.share, weights,
            by_row, steps=self.logits.shape[1],
        )  # fmt: skip
