"""The simple joiner, encoder and predictor added class by class -> losses, their gradients, posteriors of the arcs."""

import math

import numpy as np
from numpy.typing import ArrayLike

from transducer_loss.reference.lattice import F8, _settle, effective_occupancy, lattice_loss
from transducer_loss.reference.losses import _labels
from transducer_loss.reference.softmax import _log_softmax


def simple_rnnt_loss(am: ArrayLike, lm: ArrayLike, targets: ArrayLike, am_lengths: ArrayLike,
                     target_lengths: ArrayLike, *, lm_only_scale: float = 0.0, am_only_scale: float = 0.0,
                     blank: int = 0, topology: str = "regular", fastemit_lambda: float = 0.0,
                     delay_penalty: float = 0.0, infeasible: str = "inf", weights: ArrayLike | None = None,
                     shared_unigram: bool = False) -> tuple[F8, tuple[F8, F8], tuple[F8, F8]]:
    """Transducer loss of the logits ``am[t] + lm[u]``, smoothed by what each of the two says alone.

    With l and a for `lm_only_scale` and `am_only_scale` the log-probabilities of the classes in cell (t, u) are ::

        (1 - l - a) log_softmax(am[t] + lm[u]) + l log_softmax(lm[u]) + a log_softmax(am[t] + unigram)

    where unigram is the log of the mean of softmax(lm[u]) over u = 0..U_b. A term of scale 0 is left out: it cannot
    make the loss infinite or NaN.

    Parameters
    ----------
    am, lm : array_like, float, shape (B, T, V) and (B, U + 1, V)
        Frames from T_b on and rows beyond U_b are never read, but for `shared_unigram`. -inf is probability zero.
    targets, am_lengths, target_lengths
        As in `rnnt_loss`.
    lm_only_scale, am_only_scale : float
        At least 0, and together at most 1.
    blank, topology, fastemit_lambda, delay_penalty, infeasible, weights
        As in `rnnt_loss`.
    shared_unigram : bool
        The mean is over all rows of all utterances, padding included, as k2 takes it. A row of `lm` without a softmax
        then makes every loss NaN, and the gradient of each utterance reaches the rows of all.

    Returns
    -------
    loss : ndarray, float64, shape (B,)
        Negative log-likelihoods, not weighted. NaN if a real row holds NaN or +inf, or if a softmax of a term that is
        not left out has nothing but -inf.
    grads : tuple of ndarray, float64, shape (B, T, V) and (B, U + 1, V)
        Gradients of sum_b w_b loss_b by am and lm. An utterance without a finite loss adds nothing.
    occupancy : tuple of ndarray, float64, shape (B, T, U + 1)
        Posteriors of the blank and of the label arcs, as those of `lattice_loss`; zero in padding.

    Raises
    ------
    ValueError
        For an argument out of range, and with ``infeasible="raise"`` for utterances without a path.

    References
    ----------
    Kuang et al., arXiv 2206.13236.

    Examples
    --------
    The softmax of logits that are all equal is uniform, smoothed or not:

    >>> am, lm = np.zeros((1, 2, 4)), np.zeros((1, 2, 4))
    >>> loss, (by_am, by_lm), (blank, label) = simple_rnnt_loss(am, lm, [[3]], [2], [1], lm_only_scale=0.25)
    >>> bool(np.isclose(loss[0], 3 * np.log(4) - np.log(2))), label
    (True, array([[[0.5, 0. ],
            [0.5, 0. ]]]))
    >>> by_am[0, 0]
    array([-0.46875,  0.28125,  0.28125, -0.09375])
    """
    x, y = np.asarray(am, dtype=np.float64), np.asarray(lm, dtype=np.float64)
    if not (lm_only_scale >= 0.0 and am_only_scale >= 0.0 and lm_only_scale + am_only_scale <= 1.0):
        raise ValueError(f"lm_only_scale, am_only_scale: expected at least 0 and at most 1 together, "
                         f"got {lm_only_scale} and {am_only_scale}")
    both_scale = 1.0 - (lm_only_scale + am_only_scale)
    loss, (gb, ge) = np.zeros(len(x)), np.zeros((2, *x.shape[:2], y.shape[1]))
    by_am, by_lm, by_shared = np.zeros_like(x), np.zeros_like(y), np.zeros(y.shape[2])
    every_row = y.reshape(-1, y.shape[2])
    for b, T, labels in _labels(targets, am_lengths, target_lengths, x.shape[1], y.shape[1] - 1, x.shape[2], blank,
                                "am_lengths"):
        U = len(labels)
        frames, rows = x[b, :T], y[b, :U + 1]
        if not ((frames < np.inf).all() and (rows < np.inf).all()):  # NaN or +inf
            loss[b] = np.nan
            continue
        cells, unigram_rows = frames[:, None] + rows, every_row if shared_unigram else rows
        logp = np.zeros_like(cells)
        if both_scale:
            logp += both_scale * _log_softmax(cells)
        if lm_only_scale:
            logp += lm_only_scale * _log_softmax(rows)
        if am_only_scale:
            alone = _log_softmax(frames + _unigram(unigram_rows))
            logp += am_only_scale * alone[:, None]
        le = logp[:, np.arange(U + 1), np.append(labels, blank)]  # u = U has no label; blank is read anyway
        loss[b], *raw = lattice_loss(logp[..., blank], le, U, topology=topology, delay_penalty=delay_penalty)
        gb[b, :T, :U + 1], ge[b, :T, :U + 1] = raw
        if not math.isfinite(loss[b]):
            continue

        by_blank, by_label = effective_occupancy(*raw, topology=topology, fastemit_lambda=fastemit_lambda)
        by_logp = np.zeros_like(logp)
        by_logp[..., blank] -= by_blank
        by_logp[:, np.arange(U), labels] -= by_label[:, :U]
        by_logp *= 1.0 if weights is None else np.asarray(weights)[b]
        if both_scale:
            by_cells = both_scale * _through_softmax(by_logp, _log_softmax(cells))
            by_am[b, :T] += by_cells.sum(axis=1)
            by_lm[b, :U + 1] += by_cells.sum(axis=0)
        if lm_only_scale:
            by_lm[b, :U + 1] += lm_only_scale * _through_softmax(by_logp.sum(axis=0), _log_softmax(rows))
        if am_only_scale:
            by_frames = am_only_scale * _through_softmax(by_logp.sum(axis=1), alone)
            by_am[b, :T] += by_frames
            if shared_unigram:
                by_shared += by_frames.sum(axis=0)
            else:
                by_lm[b, :U + 1] += _through_unigram(by_frames.sum(axis=0), rows)
    if by_shared.any():  # not where nothing has a finite loss: the rows may then hold NaN
        by_lm += _through_unigram(by_shared, every_row).reshape(y.shape)
    return _settle(loss, infeasible), (by_am, by_lm), (gb, ge)


def _through_softmax(by_logp: F8, logp: F8) -> F8:
    """Derivative by the logits, from that by their log-softmax."""
    by_logits: F8 = by_logp - np.exp(logp) * by_logp.sum(axis=-1, keepdims=True)
    return by_logits


def _unigram(rows: F8) -> F8:
    """Log of the mean of the softmax of each row."""
    with np.errstate(invalid="ignore"):  # a row without a softmax makes the mean NaN
        logp: F8 = np.logaddexp.reduce(_log_softmax(rows), axis=0) - math.log(len(rows))
    return logp


def _through_unigram(by_unigram: F8, rows: F8) -> F8:
    """Derivative by the rows, from that by their `_unigram`."""
    logp = _log_softmax(rows)
    total = np.logaddexp.reduce(logp, axis=0)
    # What each row gave to the mean of a class: a ratio of probabilities, which need not be representable themselves.
    share = np.exp(logp - np.where(np.isneginf(total), 0.0, total))
    return _through_softmax(share * by_unigram, logp)
