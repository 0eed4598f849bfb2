"""The last labels of each prefix -> what the reduced decoder knows of them, and the gradients by its parameters."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from transducer_loss.reference.lattice import F8


def reduced_predictor(embedding: ArrayLike, positions: ArrayLike, targets: ArrayLike, target_lengths: ArrayLike, *,
                      last: bool = False) -> F8:
    """Average of the embeddings of the last N labels, each weighted by how it fits the vectors of its position.

    With x_n the embedding of label u - n, that of n = 0 the label just emitted, and x_n = 0 before the start ::

        out[b, u] = 1 / (heads N) sum_h sum_n x_n (x_n . positions[h, n])

    Parameters
    ----------
    embedding : array_like, float, shape (V, E)
        Row v is the embedding of label v.
    positions : array_like, float, shape (heads, N, E)
        Vectors of the heads.
    targets, target_lengths : array_like, int, shape (B, U) and (B,)
        Labels, and how many are real: those beyond U_b are never read.
    last : bool
        Only row U_b of each utterance, (B, E).

    Returns
    -------
    ndarray, float64, shape (B, U + 1, E)
        Row u follows label u. Zero in rows beyond U_b, and in row 0.

    Raises
    ------
    ValueError
        For a label or a length out of range.

    References
    ----------
    Botros et al., arXiv 2109.07513.

    Examples
    --------
    >>> reduced_predictor([[1.0, 0.0], [0.5, 2.0]], [[[1.0, 0.0], [0.0, 1.0]]], [[0, 1]], [2])
    array([[[0.   , 0.   ],
            [0.5  , 0.   ],
            [0.125, 0.5  ]]])
    """
    x, P = np.asarray(embedding, np.float64), np.asarray(positions, np.float64)
    out = np.zeros((*_rows(targets, last), x.shape[1]))
    for row, n, label in _seen(targets, target_lengths, len(x), P.shape[1], last):
        for h in range(len(P)):
            out[row] += x[label] * (x[label] @ P[h, n]) / (P.shape[0] * P.shape[1])
    return out


def reduced_predictor_backward(gradient: ArrayLike, embedding: ArrayLike, positions: ArrayLike, targets: ArrayLike,
                               target_lengths: ArrayLike, *, last: bool = False) -> tuple[F8, F8]:
    """Gradients of ``sum(gradient * reduced_predictor(...))``.

    Parameters
    ----------
    gradient : array_like, float, the shape of the result
        Rows beyond U_b are never read.
    embedding, positions, targets, target_lengths, last
        As in `reduced_predictor`.

    Returns
    -------
    by_embedding, by_positions : ndarray, float64, shape (V, E) and (heads, N, E)

    Examples
    --------
    The derivative of x . g times x . p by x has two parts:

    >>> dx, dP = reduced_predictor_backward([[[9.0], [3.0]]], [[0.0], [2.0]], [[[5.0]]], [[1]], [1])
    >>> dx[1], dP[0, 0]
    (array([60.]), array([12.]))
    """
    g, x, P = (np.asarray(a, np.float64) for a in (gradient, embedding, positions))
    dx, dP = np.zeros_like(x), np.zeros_like(P)
    for row, n, label in _seen(targets, target_lengths, len(x), P.shape[1], last):
        for h in range(len(P)):
            share = g[row] / (P.shape[0] * P.shape[1])
            dx[label] += share * (x[label] @ P[h, n]) + (share @ x[label]) * P[h, n]
            dP[h, n] += (share @ x[label]) * x[label]
    return dx, dP


def _rows(targets: ArrayLike, last: bool) -> tuple[int, ...]:
    """Shape of what has a vector for each row."""
    B, U = np.shape(targets)
    return (B,) if last else (B, U + 1)


def _seen(targets: ArrayLike, target_lengths: ArrayLike, classes: int, context: int,
          last: bool) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Index of each row, and each position and label that it sees."""
    y = np.asarray(targets)
    for b, U in enumerate(np.asarray(target_lengths)):
        if not 0 <= U <= y.shape[1]:
            raise ValueError(f"target_lengths: expected 0 to {y.shape[1]}, got {U} for utterance {b}")
        if not all(0 <= label < classes for label in y[b, :U]):
            raise ValueError(f"targets: utterance {b} has a label out of range: {y[b, :U]}")
        for u in range(U if last else 0, U + 1):
            for n in range(min(context, u)):
                yield (b,) if last else (b, u), n, int(y[b, u - 1 - n])
