"""The logits of a batch -> its losses and their gradient, the posteriors of its arcs, its best paths."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from transducer_loss.reference.lattice import (
    F8,
    I8,
    _forward,
    _lattice,
    _settle,
    _step,
    effective_occupancy,
    lattice_loss,
)
from transducer_loss.reference.softmax import _log_softmax, _sigmoid, log_probs


def rnnt_loss(logits: ArrayLike, targets: ArrayLike, logit_lengths: ArrayLike, target_lengths: ArrayLike, *,
              blank: int = 0, topology: str = "regular", normalized: bool = False,
              first: ArrayLike | None = None, end: ArrayLike | None = None, fastemit_lambda: float = 0.0,
              delay_penalty: float = 0.0, hat: bool = False, infeasible: str = "inf",
              clamp: float = 0.0, weights: ArrayLike | None = None) -> tuple[F8, F8]:
    """Transducer loss of a batch, and its gradient by the logits.

    Parameters
    ----------
    logits : array_like, float, shape (B, T, U + 1, V), or (B, T, S, V) with `first`
        Padding (frames from T_b on, cells with u > U_b) is never read.
    targets : array_like, int, shape (B, U)
        Labels; those beyond U_b are never read. A target may equal blank, save with `hat`.
    logit_lengths, target_lengths : array_like, int, shape (B,)
        T_b >= 1 and U_b >= 0.
    blank : int
        Class of blank; negative counts from the end.
    topology : {"regular", "modified", "constrained"}
        Which arcs there are: see the head of `transducer_loss.reference`.
    normalized : bool
        The logits are log-probabilities already, and the gradient is by them.
    first : array_like, int, shape (B, T), optional
        First u of each row of a band of S columns.
    end : array_like, int, shape (B, T), optional
        One past the last u of each row; without it, and at most, that of the last column.
    fastemit_lambda : float
        As in `effective_occupancy`: changes the gradient, never the loss.
    delay_penalty : float
        ``delay_penalty * ((T_b - 1) / 2 - t)`` is added to le(t, u), after the softmax.
    hat : bool
        Blank is a sigmoid of its own; labels are a softmax without blank, times 1 - sigmoid.
    infeasible : {"inf", "zero", "raise"}
        The loss of an utterance without a path. Its gradient is zero.
    clamp : float
        Bound of the gradient's absolute values before they are weighted; 0 for none.
    weights : array_like, float, shape (B,), optional
        w_b, of either sign; ones by default.

    Returns
    -------
    loss : ndarray, float64, shape (B,)
        Negative log-likelihoods, not weighted; NaN where `lattice_loss` is.
    grad : ndarray, float64, the shape of `logits`
        Gradient of sum_b w_b loss_b; zero in padding, and where the loss is not finite.

    Raises
    ------
    ValueError
        For an argument out of range, and with ``infeasible="raise"`` for utterances without a path.

    References
    ----------
    Graves, arXiv 1211.3711; bands: 2206.13236; FastEmit: 2010.11148; delay penalty: 2211.00490;
    HAT: 2003.07705.

    Examples
    --------
    With uniform logits each of the C(T - 1 + U, U) paths has probability V ** -(T + U):

    >>> loss, grad = rnnt_loss(np.zeros((1, 2, 2, 4)), [[3]], [2], [1])
    >>> bool(np.isclose(loss[0], 3 * np.log(4) - np.log(2))), grad[0, 0, 1]
    (True, array([-0.375,  0.125,  0.125,  0.125]))
    """
    loss, *raw = occupancy(logits, targets, logit_lengths, target_lengths, topology=topology, first=first,
                           end=end, delay_penalty=delay_penalty, infeasible=infeasible, blank=blank,
                           normalized=normalized, hat=hat)
    gb, ge = effective_occupancy(*raw, topology=topology, fastemit_lambda=fastemit_lambda)
    x, grad = np.asarray(logits, dtype=np.float64), np.zeros(np.shape(logits))
    for b, t, s in np.argwhere((gb != 0.0) | (ge != 0.0)):  # never padding, nor an invalid utterance
        n, g = gb[b, t, s] + ge[b, t, s], grad[b, t, s]
        if hat:
            q = np.exp(_log_softmax(np.delete(x[b, t, s], blank)))  # the softmax without blank
            g += np.insert(ge[b, t, s] * q, blank % len(g), n * _sigmoid(x[b, t, s, blank]))
        elif not normalized:
            g += n * np.exp(_log_softmax(x[b, t, s]))
        g[blank] -= gb[b, t, s]
        if ge[b, t, s] != 0.0:
            g[np.asarray(targets)[b, s if first is None else s + np.asarray(first)[b, t]]] -= ge[b, t, s]
        g[:] = np.clip(g, -clamp, clamp) if clamp else g
        g *= 1.0 if weights is None else np.asarray(weights)[b]
    return loss, grad


def occupancy(logits: ArrayLike, targets: ArrayLike, logit_lengths: ArrayLike, target_lengths: ArrayLike, *,
              topology: str = "regular", delay_penalty: float = 0.0, infeasible: str = "inf",
              **options: Any) -> tuple[F8, F8, F8]:
    """Losses of a batch, and the posterior of every arc.

    Parameters
    ----------
    logits, targets, logit_lengths, target_lengths, topology, delay_penalty, infeasible, **options
        As in `rnnt_loss`, without `weights`; `fastemit_lambda` is taken and changes nothing.

    Returns
    -------
    loss, blank_occupancy, label_occupancy : ndarray, float64, shape (B,), and twice that of logits[..., 0]
        As in `rnnt_loss` and in `lattice_loss`; zero in padding.

    Examples
    --------
    >>> occupancy(np.zeros((1, 2, 2, 4)), [[3]], [2], [1])[2]
    array([[[0.5, 0. ],
            [0.5, 0. ]]])
    """
    loss, (gb, ge) = np.zeros(np.shape(logits)[0]), np.zeros((2, *np.shape(logits)[:3]))
    for b, U, first, lb, le in _utterances(logits, targets, logit_lengths, target_lengths, **options):
        T, W = lb.shape
        loss[b], gb[b, :T, :W], ge[b, :T, :W] = lattice_loss(lb, le, U, topology=topology, first=first,
                                                             delay_penalty=delay_penalty)
    return _settle(loss, infeasible), gb, ge


def align(logits: ArrayLike, targets: ArrayLike, logit_lengths: ArrayLike, target_lengths: ArrayLike, *,
          topology: str = "regular", delay_penalty: float = 0.0, infeasible: str = "inf",
          **options: Any) -> tuple[I8, F8]:
    """Most probable path of each utterance; of equal ones, that whose labels come earliest.

    Parameters
    ----------
    logits, targets, logit_lengths, target_lengths, topology, delay_penalty, infeasible, **options
        As in `occupancy`. Only "raise" treats an utterance without a path in another way.

    Returns
    -------
    frames : ndarray, int64, shape (B, U)
        The t of the cell that each label's arc leaves; -1 beyond U_b, and where the score is not finite.
    score : ndarray, float64, shape (B,)
        Log-probability of the path, delay penalty included. -inf without a path; NaN where the loss is.

    Examples
    --------
    >>> align(np.zeros((1, 3, 3, 2)), [[1, 1]], [3], [2])[0]
    array([[0, 0]])
    """
    frames, score = np.full(np.shape(targets), -1, dtype=np.int64), np.zeros(np.shape(logits)[0])
    for b, U, first, lb, le in _utterances(logits, targets, logit_lengths, target_lengths, **options):
        lb, label = _lattice(lb, le, U, topology, first, delay_penalty)
        step = _step(topology)
        best = _forward(lb, label, step, np.maximum)
        t, u, score[b] = len(lb), U, best[-1, -1]
        while math.isfinite(score[b]) and (t, u) != (0, 0):
            # Back from the end, a tie is a blank: that leaves the label to an earlier frame.
            if t > 0 and best[t, u] == best[t - 1, u] + lb[t - 1, u]:
                t -= 1
            else:
                t, u = t - step, u - 1
                frames[b, u] = t
    _settle(-score, infeasible)
    return frames, score


def _utterances(logits: ArrayLike, targets: ArrayLike, logit_lengths: ArrayLike, target_lengths: ArrayLike, *,
                blank: int = 0, normalized: bool = False, first: ArrayLike | None = None,
                end: ArrayLike | None = None, hat: bool = False,
                fastemit_lambda: float = 0.0) -> Iterator[tuple[int, int, I8 | None, F8, F8]]:
    """Index b, U_b, `first`, lb and le of each utterance, without padding; -inf in cells from `end` on."""
    x = np.asarray(logits, dtype=np.float64)
    T_max, W, V = x.shape[1:]
    if hat and normalized:
        raise ValueError("hat, normalized: expected one of them, got both")
    most = W - 1 if first is None else np.shape(targets)[1]
    for b, T, labels in _labels(targets, logit_lengths, target_lengths, T_max, most, V, blank, "logit_lengths"):
        if hat and (labels == blank % V).any():
            raise ValueError(f"targets: utterance {b} has a label that is blank, with hat: {labels}")
        start, stop = (None if a is None else np.asarray(a, dtype=np.int64)[b, :T] for a in (first, end))
        cells = x[b, :T, :len(labels) + 1] if first is None else x[b, :T]
        yield b, len(labels), start, *log_probs(cells, labels, blank=blank, normalized=normalized, hat=hat,
                                                first=start, end=stop)


def _labels(targets: ArrayLike, frame_lengths: ArrayLike, target_lengths: ArrayLike, frames: int,
            most: int, classes: int, blank: int, name: str) -> Iterator[tuple[int, int, I8]]:
    """Index b, T_b and labels of each utterance, once they are found to fit inputs for `frames` and `most` labels."""
    y = np.asarray(targets)
    if not -classes <= blank < classes:
        raise ValueError(f"blank: expected an index of {classes} classes, got {blank}")
    for b, (T, U) in enumerate(zip(np.asarray(frame_lengths), np.asarray(target_lengths), strict=True)):
        if not (1 <= T <= frames and 0 <= U <= min(most, y.shape[1])):
            raise ValueError(f"{name}, target_lengths: utterance {b} does not fit, got {T} and {U}")
        labels = y[b, :U].astype(np.int64)
        if ((labels < 0) | (labels >= classes)).any():
            raise ValueError(f"targets: utterance {b} has a label out of range: {labels}")
        yield b, int(T), labels
