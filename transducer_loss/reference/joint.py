"""Encoder, predictor and output layer of a batch -> its losses and their gradients."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from transducer_loss.reference.lattice import F8, _cells
from transducer_loss.reference.losses import rnnt_loss
from transducer_loss.reference.softmax import _sigmoid


def joint_rnnt_loss(encoder: ArrayLike, predictor: ArrayLike, weight: ArrayLike, bias: ArrayLike | None,
                    targets: ArrayLike, encoder_lengths: ArrayLike, target_lengths: ArrayLike, *,
                    activation: str = "tanh", mask: ArrayLike | None = None, first: ArrayLike | None = None,
                    end: ArrayLike | None = None, width: int | None = None,
                    classes: ArrayLike | None = None, offset: ArrayLike | None = None, blank: int = 0,
                    **options: Any) -> tuple[F8, tuple[F8, F8, F8, F8 | None]]:
    """Transducer loss of the logits ``weight @ (mask * activation(encoder[t] + predictor[u])) + bias``.

    Parameters
    ----------
    encoder, predictor : array_like, float, shape (B, T, H) and (B, U + 1, H)
        Frames from T_b on and rows beyond U_b are never read.
    weight, bias : array_like, float, shape (V, H) and (V,)
        The output layer; `bias` may be None.
    targets, encoder_lengths, target_lengths, blank, **options
        As in `rnnt_loss`, with its other options.
    activation : {"tanh", "relu", "leaky_relu", "sigmoid", "gelu", "gelu_tanh", "silu", "identity"}
        `leaky_relu` has slope 0.01; `gelu` is exact, `gelu_tanh` its usual approximation.
    mask : array_like, float, shape (B, T, U + 1, H), or (B, T, width, H) with `first`, optional
        A dropout mask with its scale.
    first, width : array_like, int, shape (B, T), and int, optional
        The band, both or neither: only its cells are computed.
    end : array_like, int, shape (B, T), optional
        As in `rnnt_loss`.
    classes : array_like, int, shape (K,) or (B, K), optional
        Sampled softmax: the softmax is over these classes only, of the batch or of each utterance. They hold its labels,
        and the blank in the same place of every row.
    offset : array_like, float, shaped as `classes`, optional
        Added to the logits of the classes.

    Returns
    -------
    loss : ndarray, float64, shape (B,)
        As in `rnnt_loss`. Activated features that are not finite count as NaN logits.
    grads : tuple of ndarray, float64
        By encoder, predictor, weight, bias (None without one), whole also with `classes`. Utterances without a finite
        loss add nothing.

    Raises
    ------
    ValueError
        For an unknown activation, half a band, a label that is not among the classes, and as in `rnnt_loss`.

    Examples
    --------
    >>> loss, (dE, dP, dW, db) = joint_rnnt_loss([[[1.0]]], [[[0.0]]], [[0.0], [0.0]], None, [[]], [1], [0])
    >>> bool(np.isclose(loss[0], np.log(2))), bool(np.isclose(dW[0, 0], -0.5 * np.tanh(1.0))), db
    (True, True, None)
    """
    if (first is None) != (width is None):
        raise ValueError("first, width: a band needs both")
    E, P, W = (np.asarray(a, dtype=np.float64) for a in (encoder, predictor, weight))
    ids: Any = np.arange(len(W)) if classes is None else np.asarray(classes)
    ids = np.broadcast_to(ids, (len(E), ids.shape[-1]))
    constant = np.zeros(ids.shape) if offset is None else np.broadcast_to(np.asarray(offset, np.float64), ids.shape)
    if bias is not None:
        constant = constant + np.asarray(bias, np.float64)[ids]
    slots = [{int(v): k for k, v in enumerate(row)} for row in ids]
    found = np.array(np.asarray(targets), np.int64)
    blanks = {row.get(blank % len(W), -1) for row in slots}
    if len(blanks) != 1 or -1 in blanks:
        raise ValueError(f"classes: the blank {blank} is not in the same place of every row")
    logits = np.full((*E.shape[:2], P.shape[1] if width is None else width, ids.shape[1]), np.nan)
    saved = []
    for b, (T, U) in enumerate(zip(np.asarray(encoder_lengths), np.asarray(target_lengths), strict=True)):
        for u, label in enumerate(found[b, :U]):
            if label not in slots[b]:
                raise ValueError(f"targets: {label} is not among the classes of utterance {b}")
            found[b, u] = slots[b][label]
        rows = (None if a is None else np.asarray(a)[b] for a in (first, end))
        t, s, u = _cells(T, logits.shape[2], U, *rows).T
        scale = 1.0 if mask is None else np.asarray(mask, np.float64)[b, t, s]
        with np.errstate(invalid="ignore", over="ignore"):
            hidden, slope = (scale * a for a in _activate(E[b, t] + P[b, u], activation))
            finite = np.isfinite(hidden).all(axis=1, keepdims=True)
            logits[b, t, s] = np.where(finite, hidden @ W[ids[b]].T + constant[b], np.nan)
        saved.append((t, s, u, hidden, slope))
    loss, grad = rnnt_loss(logits, found, encoder_lengths, target_lengths, first=first, end=end,
                           blank=blanks.pop(), **options)
    dE, dP, dW, db = np.zeros_like(E), np.zeros_like(P), np.zeros_like(W), np.zeros(len(W))
    for b, (t, s, u, hidden, slope) in enumerate(saved):
        if grad[b].any():  # features of an utterance without gradient may be NaN, and 0 * NaN is NaN
            dz = (grad[b, t, s] @ W[ids[b]]) * slope
            np.add.at(dE[b], t, dz)
            np.add.at(dP[b], u, dz)
            dW[ids[b]] += grad[b, t, s].T @ hidden
            db[ids[b]] += grad[b, t, s].sum(axis=0)
    return loss, (dE, dP, dW, None if bias is None else db)


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
