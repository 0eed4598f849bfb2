"""One utterance: the weights of its arcs -> its loss, and the posterior of every arc."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]


def lattice_loss(blank_logp: ArrayLike, label_logp: ArrayLike, num_labels: int, *, topology: str = "regular",
                 first: ArrayLike | None = None, end: ArrayLike | None = None,
                 delay_penalty: float = 0.0) -> tuple[float, F8, F8]:
    """Negative log of the summed weight of all paths of one utterance, and the posterior of every arc.

    Parameters
    ----------
    blank_logp, label_logp : array_like, float, shape (T, W)
        lb and le; column s of row t is the cell (t, first[t] + s). Only cells with 0 <= u <= U exist, and
        label arcs with u < U. -inf is a legal weight: probability zero.
    num_labels : int
        U.
    topology, first, end, delay_penalty
        As in `rnnt_loss`, for one utterance: `first` and `end` have shape (T,). Without `first` W must be U + 1.

    Returns
    -------
    loss : float
        +inf where no path has any probability; NaN where the weight of an arc is NaN or +inf.
    blank_occupancy, label_occupancy : ndarray, float64, shape (T, W)
        Posteriors; over any cut of the lattice they sum to 1. All zero where the loss is not finite.

    Raises
    ------
    ValueError
        For an unknown topology, or a width that is not U + 1 without `first`.

    Examples
    --------
    >>> lattice_loss([[0.0, -1.0]], [[-2.0, 0.0]], 1)
    (3.0, array([[0., 1.]]), array([[1., 0.]]))
    """
    lb, label = _lattice(blank_logp, label_logp, num_labels, topology, first, delay_penalty, end)
    T, U, step = len(lb), num_labels, _step(topology)
    gb, ge = np.zeros((2, *np.shape(blank_logp)))
    if np.isnan(lb).any():
        return math.nan, gb, ge
    alpha = _forward(lb, label, step, np.logaddexp)
    beta = np.full_like(alpha, -np.inf)  # log-sum over the paths from a node to the end
    beta[T, U] = 0.0
    for t in reversed(range(T)):
        for u in reversed(range(U + 1)):
            by_label = label[t, u] + beta[t + step, u + 1] if u < U else -np.inf
            beta[t, u] = np.logaddexp(lb[t, u] + beta[t + 1, u], by_label)
    loss = -float(alpha[T, U])
    if loss < math.inf:
        for t, s, u in _cells(T, gb.shape[1], U, first, end):
            gb[t, s] = np.exp(alpha[t, u] + lb[t, u] + beta[t + 1, u] + loss)
            ge[t, s] = np.exp(alpha[t, u] + label[t, u] + beta[t + step, u + 1] + loss) if u < U else 0.0
    return loss, gb, ge


def effective_occupancy(blank_occupancy: ArrayLike, label_occupancy: ArrayLike, *, topology: str = "regular",
                        fastemit_lambda: float = 0.0) -> tuple[F8, F8]:
    """Minus the derivative of the loss by lb and by le, FastEmit included.

    Parameters
    ----------
    blank_occupancy, label_occupancy : array_like, float, shape (..., W)
        Posteriors of `lattice_loss`. In `constrained` the label arc of (t, u - 1) uses lb(t, u) too: its
        posterior is added there. A band needs no more, for neighbours in u share a row.
    topology, fastemit_lambda
        As in `rnnt_loss`. FastEmit multiplies the labels by 1 + lambda, not the blank that was added.

    Returns
    -------
    blank_occupancy, label_occupancy : ndarray, float64, shape (..., W)
        New arrays.

    Examples
    --------
    >>> effective_occupancy([0.25, 0.0], [0.5, 0.0], topology="constrained", fastemit_lambda=1.0)
    (array([0.25, 0.5 ]), array([1., 0.]))
    """
    gb, ge = np.array([blank_occupancy, label_occupancy], dtype=np.float64)
    _step(topology)  # refuses an unknown one
    if topology == "constrained":
        gb[..., 1:] += ge[..., :-1]
    return gb, ge * (1.0 + fastemit_lambda)


def _lattice(blank_logp: ArrayLike, label_logp: ArrayLike, num_labels: int, topology: str,
             first: ArrayLike | None, delay_penalty: float, end: ArrayLike | None = None) -> tuple[F8, F8]:
    """Weights of the arcs of the full lattice, (T, U + 1) each; all NaN if one of them is NaN or +inf."""
    rows = np.array([blank_logp, label_logp], dtype=np.float64)
    T, W = rows.shape[1:]
    if first is None and num_labels + 1 != W:
        raise ValueError(f"blank_logp: expected U + 1 = {num_labels + 1} columns without first, got {W}")
    lb, label = arcs = np.full((2, T, num_labels + 1), -np.inf)
    t, s, u = _cells(T, W, num_labels, first, end).T
    arcs[:, t, u] = rows[:, t, s]
    label += delay_penalty * ((T - 1) / 2 - np.arange(T)[:, None])
    label[:, num_labels] = -np.inf
    if np.isnan(arcs).any() or np.isposinf(arcs).any():
        arcs[:] = np.nan
    if topology == "constrained":
        label[:, :-1] += lb[:, 1:]
    return lb, label


def _forward(lb: F8, label: F8, step: int, plus: Callable[[Any, Any], Any]) -> F8:
    """Log-sum over the paths from (0, 0) to each node (T + 1, U + 1); the best path if `plus` is maximum."""
    T, columns = lb.shape
    alpha = np.full((T + 1, columns), -np.inf)
    alpha[0, 0] = 0.0
    for t in range(T + 1):
        for u in range(columns):
            if t > 0:
                alpha[t, u] = plus(alpha[t, u], alpha[t - 1, u] + lb[t - 1, u])
            if u > 0 and step <= t < T + step:
                alpha[t, u] = plus(alpha[t, u], alpha[t - step, u - 1] + label[t - step, u - 1])
    return alpha


def _cells(num_frames: int, width: int, num_labels: int, first: ArrayLike | None,
           end: ArrayLike | None = None) -> I8:
    """Row t, column s and label count u of each cell that exists, (N, 3)."""
    start = np.zeros(num_frames, np.int64) if first is None else np.asarray(first, np.int64)[:num_frames]
    u = start[:, None] + np.arange(width)
    exists = (u >= 0) & (u <= num_labels)
    if end is not None:
        exists &= u < np.asarray(end, np.int64)[:num_frames, None]
    t, s = np.nonzero(exists)
    return np.stack([t, s, u[t, s]], axis=1)


def _step(topology: str) -> int:
    """Frames that a label arc advances."""
    if topology not in ("regular", "modified", "constrained"):
        raise ValueError(f"topology: expected 'regular', 'modified' or 'constrained', got {topology!r}")
    return 0 if topology == "regular" else 1


def _settle(loss: F8, infeasible: str) -> F8:
    """Treat utterances without a path as asked."""
    if infeasible not in ("inf", "zero", "raise"):
        raise ValueError(f"infeasible: expected 'inf', 'zero' or 'raise', got {infeasible!r}")
    missing = np.isposinf(loss)
    if infeasible == "raise" and missing.any():
        raise ValueError(f"no path for utterances {np.flatnonzero(missing).tolist()}")
    return np.where(missing, 0.0, loss) if infeasible == "zero" else loss
