"""The logits of one utterance -> the log-probability of blank and of the next label in every cell."""

import numpy as np
from numpy.typing import ArrayLike

from transducer_loss.reference.lattice import F8, _cells


def log_probs(logits: ArrayLike, targets: ArrayLike, *, blank: int = 0, normalized: bool = False,
              hat: bool = False, first: ArrayLike | None = None,
              end: ArrayLike | None = None) -> tuple[F8, F8]:
    """Log-probability of blank and of the next label in every cell of one utterance.

    Parameters
    ----------
    logits, targets : array_like, float, shape (T, W, V), and int, shape (U,)
        Column s of row t is the cell (t, first[t] + s).
    blank, normalized, hat, first, end
        As in `rnnt_loss`, for one utterance.

    Returns
    -------
    blank_logp, label_logp : ndarray, float64, shape (T, W)
        -inf where there is no such cell. NaN in a cell that holds NaN or +inf, or whose softmax has nothing
        but -inf; with `normalized` the two entries as they are. `label_logp` at u = U means nothing.

    Examples
    --------
    >>> log_probs([[[0.5, 0.25], [0.125, 0.0]]], [1], normalized=True)
    (array([[0.5  , 0.125]]), array([[0.25 , 0.125]]))
    """
    x = np.asarray(logits, dtype=np.float64)
    labels = np.append(np.asarray(targets, dtype=np.int64), blank)  # u = U has no label; blank is read anyway
    lb, le = np.full((2, *x.shape[:2]), -np.inf)
    for t, s, u in _cells(x.shape[0], x.shape[1], len(labels) - 1, first, end):
        logp = x[t, s] if normalized else _hat(x[t, s], blank) if hat else _log_softmax(x[t, s])
        lb[t, s], le[t, s] = logp[blank], logp[labels[u]]
    return lb, le


def _log_softmax(x: F8) -> F8:
    """Log-probabilities over the last axis; all NaN for NaN, +inf, or nothing but -inf: the largest tells."""
    top = x.max(axis=-1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN comes of itself; no classes sum to 0
        logp: F8 = x - top - np.log(np.exp(x - top).sum(axis=-1, keepdims=True))
    return logp


def _sigmoid(z: F8) -> F8:
    """1 / (1 + exp(-z)) that does not overflow."""
    return np.exp(-np.logaddexp(0.0, -z))


def _hat(x: F8, blank: int) -> F8:
    """Log-probabilities of one cell of a hybrid autoregressive transducer; all NaN as in `_log_softmax`."""
    if not x.max() < np.inf:
        return np.full_like(x, np.nan)
    labels = _log_softmax(np.delete(x, blank)) - np.logaddexp(0.0, x[blank])  # log sigmoid(-x) of blank
    logp = np.insert(labels, blank % len(x), -np.logaddexp(0.0, -x[blank]))
    return np.full_like(x, np.nan) if np.isnan(logp).any() else logp
