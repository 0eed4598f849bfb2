"""The reduced prediction network: the last labels' embeddings, averaged. Launches `kernels/reduced_predictor.cu`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from transducer_loss.arrays import COMPUTE, as_numpy, element_strides
from transducer_loss.checks import expect_labels, expect_shape, float_array, integers, lengths_on, looked_at, on_processor
from transducer_loss.processors import Allocate, processor_for

# Parts in which the gradient of the position vectors is summed, each of so many rows where there are many of them: whoever
# computes them, so that sums have one order.
_PARTS, _ROWS, _MOST_PARTS = 64, 64, 1024


@dataclasses.dataclass(frozen=True, eq=False)
class ReducedPredictorGrads:
    """Gradients of `reduced_predictor`, each shaped as its input.

    Attributes
    ----------
    embedding : (V, E) array
    positions : (heads, N, E) array
    """

    embedding: Any
    positions: Any


def reduced_predictor(
    embedding: Any, positions: Any, targets: Any, target_lengths: Any, *, last: bool = False, validate: bool = False
) -> Any:
    """Average of the embeddings of the last N labels, each weighted by position vectors (arXiv 2109.07513, section 3.1).

    Row u of the result, which follows label u, is the same as these lines::

        x = [embedding[targets[u - 1 - n]] if u - 1 - n >= 0 else zeros(E) for n in range(N)]
        sum(x[n] * (x[n] @ positions[h, n]) for h in range(heads) for n in range(N)) / (heads * N)

    Parameters
    ----------
    embedding : (V, E) array
        Any float dtype. In a tied decoder the output layer of the joint, whose `weight` it is: add both gradients.
    positions : (heads, N, E) array
        Position vectors, of the dtype of the embedding; n = 0 is the label just emitted.
    targets : (B, U) array or nested list of int
        Labels. Those beyond U_b are never read.
    target_lengths : (B,) array or list of int
        U_b, from 0 to U.
    last : bool
        Give row U_b alone: what decoding needs, where `targets` are the labels so far or the last N of them.
    validate : bool
        Also check labels and lengths that are on a device, which synchronises. Unchecked, rows that see a label that no class
        has, and those of a length out of range, are NaN and have no gradient.

    Returns
    -------
    (B, U+1, E) array
        In the dtype of the embedding; 0 past row U_b. With `last` (B, E). Its gradient is `reduced_predictor_backward`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Notes
    -----
    The formula is the paper's. As it is linear in the position vectors, heads act through their sum alone, which is what is
    computed with: more of them change how the vectors train, not what they can say.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> embedding, positions = np.eye(4), np.ones((1, 2, 4))
    >>> tl.reduced_predictor(embedding, positions, [[3, 1]], [2])[0]
    array([[0. , 0. , 0. , 0. ],
           [0. , 0. , 0. , 0.5],
           [0. , 0.5, 0. , 0.5]])
    """
    return averaged(embedding, positions, targets, target_lengths, last=last, validate=validate)


def reduced_predictor_backward(
    gradient: Any, embedding: Any, positions: Any, targets: Any, target_lengths: Any, *, last: bool = False
) -> ReducedPredictorGrads:
    """Gradient of `reduced_predictor`.

    Parameters
    ----------
    gradient : (B, U+1, E) array
        By the result, in its dtype; with `last` (B, E). What is past row U_b is not read.
    embedding, positions, targets, target_lengths, last
        As given to `reduced_predictor`.

    Returns
    -------
    ReducedPredictorGrads
        Sums in one order, whatever the number of threads. The embedding's is of all V rows.

    Notes
    -----
    Temporary memory is a vector of E sums a label. On a device CuPy before version 14 waits for its own sort of the labels.

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> grads = tl.reduced_predictor_backward(np.ones((1, 2, 2)), np.eye(2), np.ones((1, 1, 2)), [[1]], [1])
    >>> grads.embedding
    array([[0., 0.],
           [2., 2.]])
    """
    return averaged_backward(gradient, embedding, positions, targets, target_lengths, last=last, validate=False)


class _Seen:
    """Checked arguments, on their processor, and the scores of all rows."""

    def __init__(
        self, processor: Any, embedding: Any, positions: Any, targets: Any, target_lengths: Any, last: bool,
        validate: bool | None,
    ) -> None:  # fmt: skip
        self.processor, self.kind, self.real = processor, embedding.dtype.name, COMPUTE[embedding.dtype.name]
        self.classes, self.features = (int(size) for size in embedding.shape)
        self.heads, self.reach = (int(size) for size in positions.shape[:2])
        expect_shape(positions, "positions", "(heads, N, E)", (self.heads, self.reach, self.features))
        given = integers(targets, "targets")
        if given.ndim != 2 or given.shape[0] < 1:
            raise ValueError(f"targets: expected shape (B, U) of at least one utterance, got {tuple(given.shape)}")
        self.batch, self.columns = (int(size) for size in given.shape)
        counts = integers(target_lengths, "target_lengths")
        lengths = lengths_on(processor, counts, "target_lengths", (self.batch,), 0, self.columns, "(B,) U", validate)
        if looked_at(validate, given, counts):
            expect_labels(as_numpy(given), as_numpy(counts), self.classes)
        labels = processor.dense(on_processor(given, processor, "targets"), "int64")
        rows = processor.dense(embedding, self.kind) if element_strides(embedding)[-1] != 1 else embedding
        self.shape = (self.batch, self.features) if last else (self.batch, self.columns + 1, self.features)
        self.rows = self.batch if last else self.batch * (self.columns + 1)
        self.share = 1.0 / (self.heads * self.reach)
        self.positions = processor.dense(positions, self.real).sum(axis=0)
        self.inputs = (
            lengths, labels, self.columns, int(bool(last)), self.reach, rows, element_strides(rows)[0], self.classes,
            self.features,
        )  # fmt: skip
        self.scores = processor.empty((self.rows, self.reach), self.real)
        self.launch(
            "reduced_predictor_scores", self.rows, self.rows, *self.inputs, self.positions, self.scores, steps=self.reach
        )

    def launch(self, name: str, blocks: int, *arguments: Any, steps: int) -> None:
        """Of the instance for the dtype, over the features."""
        self.processor.launch(f"{name}<{self.kind}>", blocks, self.features, *arguments, steps=steps)


def _vectors(embedding: Any, positions: Any) -> tuple[Any, Any]:
    of = float_array(embedding, "embedding", "V E")
    return of, float_array(positions, "positions", "heads N E", of, "embedding")


def averaged(
    embedding: Any, positions: Any, targets: Any, target_lengths: Any, *, last: bool, validate: bool | None,
    threads: int | None = None, allocate: Allocate | None = None,
) -> Any:  # fmt: skip
    """See `reduced_predictor`."""
    embedding, positions = _vectors(embedding, positions)
    with processor_for(embedding, threads, allocate) as processor:
        of = _Seen(processor, embedding, positions, targets, target_lengths, last, validate)
        native, out = processor.output(of.shape, of.kind)
        of.launch("reduced_predictor_forward", of.rows, of.rows, *of.inputs, of.share, of.scores, out, steps=of.reach)
    return native


def averaged_backward(
    gradient: Any, embedding: Any, positions: Any, targets: Any, target_lengths: Any, *, last: bool, validate: bool | None,
    threads: int | None = None, allocate: Allocate | None = None,
) -> ReducedPredictorGrads:  # fmt: skip
    """See `reduced_predictor_backward`."""
    embedding, positions = _vectors(embedding, positions)
    given = float_array(gradient, "gradient", "B E" if last else "B U+1 E", embedding, "embedding")
    with processor_for(embedding, threads, allocate) as processor:
        of = _Seen(processor, embedding, positions, targets, target_lengths, last, validate)
        expect_shape(given, "gradient", "(B, E)" if last else "(B, U+1, E)", of.shape)
        given = given if element_strides(given)[-1] == 1 else given.copy()
        labels = of.batch * of.columns
        products = processor.empty((of.rows, of.reach), of.real)
        by_label = processor.empty((labels, of.features), of.real)
        keys = processor.empty((labels,), "int64")
        native, by_embedding = processor.output(tuple(embedding.shape), of.kind, zero=True)
        if labels:
            strides = element_strides(given)
            of.launch(
                "reduced_predictor_backward_labels", labels, labels, *of.inputs, of.share, of.scores, of.positions, given,
                strides[0], 0 if last else strides[1], products, by_label, keys, steps=2 * of.reach,
            )  # fmt: skip
            order = np.argsort(keys, kind="stable")
            processor.launch(
                f"reduced_predictor_backward_runs<{of.real}>", labels, of.features,
                labels, of.classes, of.features, keys, order, by_label, per_thread=2,
            )  # fmt: skip
            of.launch(
                "reduced_predictor_backward_embedding", labels, labels, of.classes, of.features, keys, order, by_label,
                by_embedding, steps=1,
            )  # fmt: skip
        parts = min(max(_PARTS, of.rows // _ROWS), _MOST_PARTS, of.rows)
        sums = processor.empty((parts, of.reach, of.features), of.real)
        of.launch(
            "reduced_predictor_backward_positions", parts * of.reach, parts, of.rows, *of.inputs, of.share, of.scores, products,
            sums, steps=-(-of.rows // parts),
        )  # fmt: skip
        native_positions, by_position = processor.output(tuple(positions.shape), of.kind)
        by_position[...] = sums.sum(axis=0)
    return ReducedPredictorGrads(native, native_positions)
