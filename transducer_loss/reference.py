"""Every loss in plain float64 loops: the definition that the tests and the `check` command compare with.

The lattice of one utterance has the cells (t, u), 0 <= t < T and 0 <= u <= U: u labels have been emitted.
A blank arc of weight lb(t, u) leaves each cell for (t + 1, u), a label arc emits label u + 1:

=============  ======================  =======================  ======================================
topology       label arc leads to      it weighs                the path ends with
=============  ======================  =======================  ======================================
`regular`      (t, u + 1)              le(t, u)                 the blank out of (T - 1, U)
`modified`     (t + 1, u + 1)          le(t, u)                 the blank or label that reaches (T, U)
`constrained`  (t + 1, u + 1)          le(t, u) + lb(t, u + 1)  the blank or label that reaches (T, U)
=============  ======================  =======================  ======================================

A band keeps of each row t the cells first[t] <= u < first[t] + W. It is the full lattice with weight -inf in
all other cells: a path that enters such a cell has to leave it, and so has probability zero.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]


def lattice_loss(blank_logp: ArrayLike, label_logp: ArrayLike, num_labels: int, *, topology: str = "regular",
                 first: ArrayLike | None = None, delay_penalty: float = 0.0) -> tuple[float, F8, F8]:
    """Negative log of the summed weight of all paths of one utterance, and the posterior of every arc.

    Parameters
    ----------
    blank_logp, label_logp : array_like, float, shape (T, W)
        lb and le; column s of row t is the cell (t, first[t] + s). Only cells with 0 <= u <= U exist, and
        label arcs with u < U. -inf is a legal weight: probability zero.
    num_labels : int
        U.
    topology, first, delay_penalty
        As in `rnnt_loss`, for one utterance: `first` has shape (T,). Without it W must be U + 1.

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
    lb, label = _lattice(blank_logp, label_logp, num_labels, topology, first, delay_penalty)
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
        for t, s, u in _cells(T, gb.shape[1], U, first):
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


def log_probs(logits: ArrayLike, targets: ArrayLike, *, blank: int = 0, normalized: bool = False,
              hat: bool = False, first: ArrayLike | None = None) -> tuple[F8, F8]:
    """Log-probability of blank and of the next label in every cell of one utterance.

    Parameters
    ----------
    logits, targets : array_like, float, shape (T, W, V), and int, shape (U,)
        Column s of row t is the cell (t, first[t] + s).
    blank, normalized, hat, first
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
    for t, s, u in _cells(x.shape[0], x.shape[1], len(labels) - 1, first):
        logp = x[t, s] if normalized else _hat(x[t, s], blank) if hat else _log_softmax(x[t, s])
        lb[t, s], le[t, s] = logp[blank], logp[labels[u]]
    return lb, le


def rnnt_loss(logits: ArrayLike, targets: ArrayLike, logit_lengths: ArrayLike, target_lengths: ArrayLike, *,
              blank: int = 0, topology: str = "regular", normalized: bool = False,
              first: ArrayLike | None = None, fastemit_lambda: float = 0.0, delay_penalty: float = 0.0,
              hat: bool = False, infeasible: str = "inf", weights: ArrayLike | None = None) -> tuple[F8, F8]:
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
        Which arcs there are: see the head of this module.
    normalized : bool
        The logits are log-probabilities already, and the gradient is by them.
    first : array_like, int, shape (B, T), optional
        First u of each row of a band of S columns.
    fastemit_lambda : float
        As in `effective_occupancy`: changes the gradient, never the loss.
    delay_penalty : float
        ``delay_penalty * ((T_b - 1) / 2 - t)`` is added to le(t, u), after the softmax.
    hat : bool
        Blank is a sigmoid of its own; labels are a softmax without blank, times 1 - sigmoid.
    infeasible : {"inf", "zero", "raise"}
        The loss of an utterance without a path. Its gradient is zero.
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
                           delay_penalty=delay_penalty, infeasible=infeasible, blank=blank,
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
        g *= 1.0 if weights is None else np.asarray(weights)[b]
    return loss, grad


def joint_rnnt_loss(encoder: ArrayLike, predictor: ArrayLike, weight: ArrayLike, bias: ArrayLike | None,
                    targets: ArrayLike, encoder_lengths: ArrayLike, target_lengths: ArrayLike, *,
                    activation: str = "tanh", mask: ArrayLike | None = None, first: ArrayLike | None = None,
                    width: int | None = None, **options: Any) -> tuple[F8, tuple[F8, F8, F8, F8 | None]]:
    """Transducer loss of the logits ``weight @ (mask * activation(encoder[t] + predictor[u])) + bias``.

    Parameters
    ----------
    encoder, predictor : array_like, float, shape (B, T, H) and (B, U + 1, H)
        Frames from T_b on and rows beyond U_b are never read.
    weight, bias : array_like, float, shape (V, H) and (V,)
        The output layer; `bias` may be None.
    targets, encoder_lengths, target_lengths, **options
        As in `rnnt_loss`, with its other options.
    activation : {"tanh", "relu", "leaky_relu", "sigmoid", "gelu", "gelu_tanh", "silu", "identity"}
        `leaky_relu` has slope 0.01; `gelu` is exact, `gelu_tanh` its usual approximation.
    mask : array_like, float, shape (B, T, U + 1, H), or (B, T, width, H) with `first`, optional
        A dropout mask with its scale.
    first, width : array_like, int, shape (B, T), and int, optional
        The band, both or neither: only its cells are computed.

    Returns
    -------
    loss : ndarray, float64, shape (B,)
        As in `rnnt_loss`. Activated features that are not finite count as NaN logits.
    grads : tuple of ndarray, float64
        By encoder, predictor, weight, bias (None without one). Utterances without a finite loss add nothing.

    Raises
    ------
    ValueError
        For an unknown activation or half a band, and as in `rnnt_loss`.

    Examples
    --------
    >>> loss, (dE, dP, dW, db) = joint_rnnt_loss([[[1.0]]], [[[0.0]]], [[0.0], [0.0]], None, [[]], [1], [0])
    >>> bool(np.isclose(loss[0], np.log(2))), bool(np.isclose(dW[0, 0], -0.5 * np.tanh(1.0))), db
    (True, True, None)
    """
    if (first is None) != (width is None):
        raise ValueError("first, width: a band needs both")
    E, P, W = (np.asarray(a, dtype=np.float64) for a in (encoder, predictor, weight))
    offset = 0.0 if bias is None else np.asarray(bias, dtype=np.float64)
    logits = np.full((*E.shape[:2], P.shape[1] if width is None else width, len(W)), np.nan)
    saved = []
    for b, (T, U) in enumerate(zip(np.asarray(encoder_lengths), np.asarray(target_lengths), strict=True)):
        t, s, u = _cells(T, logits.shape[2], U, None if first is None else np.asarray(first)[b]).T
        scale = 1.0 if mask is None else np.asarray(mask, np.float64)[b, t, s]
        with np.errstate(invalid="ignore", over="ignore"):
            hidden, slope = (scale * a for a in _activate(E[b, t] + P[b, u], activation))
            finite = np.isfinite(hidden).all(axis=1, keepdims=True)
            logits[b, t, s] = np.where(finite, hidden @ W.T + offset, np.nan)
        saved.append((t, s, u, hidden, slope))
    loss, grad = rnnt_loss(logits, targets, encoder_lengths, target_lengths, first=first, **options)
    dE, dP, dW, db = np.zeros_like(E), np.zeros_like(P), np.zeros_like(W), np.zeros(len(W))
    for b, (t, s, u, hidden, slope) in enumerate(saved):
        if grad[b].any():  # features of an utterance without gradient may be NaN, and 0 * NaN is NaN
            dz = (grad[b, t, s] @ W) * slope
            np.add.at(dE[b], t, dz)
            np.add.at(dP[b], u, dz)
            dW += grad[b, t, s].T @ hidden
            db += grad[b, t, s].sum(axis=0)
    return loss, (dE, dP, dW, None if bias is None else db)


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


def _cells(num_frames: int, width: int, num_labels: int, first: ArrayLike | None) -> I8:
    """Row t, column s and label count u of each cell that exists, (N, 3)."""
    start = np.zeros(num_frames, np.int64) if first is None else np.asarray(first, np.int64)[:num_frames]
    u = start[:, None] + np.arange(width)
    t, s = np.nonzero((u >= 0) & (u <= num_labels))
    return np.stack([t, s, u[t, s]], axis=1)


def _step(topology: str) -> int:
    """Frames that a label arc advances."""
    if topology not in ("regular", "modified", "constrained"):
        raise ValueError(f"topology: expected 'regular', 'modified' or 'constrained', got {topology!r}")
    return 0 if topology == "regular" else 1


def _log_softmax(x: F8) -> F8:
    """Log-probabilities of one cell; all NaN for NaN, +inf, or nothing but -inf: the largest tells."""
    top = x.max(initial=-np.inf)
    return x - top - np.log(np.exp(x - top).sum()) if np.isfinite(top) else np.full_like(x, np.nan)


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


def _lattice(blank_logp: ArrayLike, label_logp: ArrayLike, num_labels: int, topology: str,
             first: ArrayLike | None, delay_penalty: float) -> tuple[F8, F8]:
    """Weights of the arcs of the full lattice, (T, U + 1) each; all NaN if one of them is NaN or +inf."""
    rows = np.array([blank_logp, label_logp], dtype=np.float64)
    T, W = rows.shape[1:]
    if first is None and num_labels + 1 != W:
        raise ValueError(f"blank_logp: expected U + 1 = {num_labels + 1} columns without first, got {W}")
    lb, label = arcs = np.full((2, T, num_labels + 1), -np.inf)
    t, s, u = _cells(T, W, num_labels, first).T
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


def _utterances(logits: ArrayLike, targets: ArrayLike, logit_lengths: ArrayLike, target_lengths: ArrayLike, *,
                blank: int = 0, normalized: bool = False, first: ArrayLike | None = None, hat: bool = False,
                fastemit_lambda: float = 0.0) -> Iterator[tuple[int, int, I8 | None, F8, F8]]:
    """Index b, U_b, `first`, lb and le of each utterance, without padding."""
    x, y = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    T_max, W, V = x.shape[1:]
    if not -V <= blank < V:
        raise ValueError(f"blank: expected an index of {V} classes, got {blank}")
    if hat and normalized:
        raise ValueError("hat, normalized: expected one of them, got both")
    for b, (T, U) in enumerate(zip(np.asarray(logit_lengths), np.asarray(target_lengths), strict=True)):
        if not (1 <= T <= T_max and 0 <= U <= y.shape[1]) or (first is None and U >= W):
            raise ValueError(f"logit_lengths, target_lengths: utterance {b} does not fit, got {T} and {U}")
        labels = y[b, :U].astype(np.int64)
        if ((labels < 0) | (labels >= V)).any() or (hat and (labels == blank % V).any()):
            raise ValueError(f"targets: utterance {b} has a label out of range, or blank with hat: {labels}")
        start = None if first is None else np.asarray(first, dtype=np.int64)[b, :T]
        cells = x[b, :T, :U + 1] if first is None else x[b, :T]
        yield b, U, start, *log_probs(cells, labels, blank=blank, normalized=normalized, hat=hat, first=start)


def _settle(loss: F8, infeasible: str) -> F8:
    """Treat utterances without a path as asked."""
    if infeasible not in ("inf", "zero", "raise"):
        raise ValueError(f"infeasible: expected 'inf', 'zero' or 'raise', got {infeasible!r}")
    missing = np.isposinf(loss)
    if infeasible == "raise" and missing.any():
        raise ValueError(f"no path for utterances {np.flatnonzero(missing).tolist()}")
    return np.where(missing, 0.0, loss) if infeasible == "zero" else loss


def _activate(z: F8, name: str) -> tuple[F8, F8]:
    """Activation and its derivative; at a kink the derivative from below."""
    if name in ("identity", "relu", "leaky_relu"):
        slope = np.where(z > 0.0, 1.0, {"identity": 1.0, "relu": 0.0, "leaky_relu": 0.01}[name])
        return np.maximum(z, 0.0) if name == "relu" else slope * z, slope
    if name == "tanh":
        return np.tanh(z), 1.0 - np.tanh(z) ** 2
    if name == "sigmoid":
        return _sigmoid(z), _sigmoid(z) * _sigmoid(-z)
    # The others are z F(z) with F a distribution function of density f.
    if name == "silu":
        F, f = _sigmoid(z), _sigmoid(z) * _sigmoid(-z)
    elif name == "gelu":
        F = 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-z / math.sqrt(2.0))
        f = np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    elif name == "gelu_tanh":
        c = math.sqrt(8.0 / math.pi)
        F = _sigmoid(c * (z + 0.044715 * z**3))
        f = F * (1.0 - F) * c * (1.0 + 3.0 * 0.044715 * z * z)
    else:
        raise ValueError(f"activation: unknown, got {name!r}")
    return z * F, F + z * f
