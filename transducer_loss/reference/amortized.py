"""Which of the branches of an encoder each frame takes -> what that costs, how far it lags behind; and the choice itself."""

import math

import numpy as np
from numpy.typing import ArrayLike

from transducer_loss.reference.lattice import F8
from transducer_loss.reference.sampling import philox


def amortized_cost(gates: ArrayLike, costs: ArrayLike, lengths: ArrayLike) -> tuple[F8, F8]:
    """Average cost of a frame, ``1 / T_b sum_t sum_k gates_tk costs_k``, and its gradient by the gates.

    Parameters
    ----------
    gates : array_like, float, shape (B, T, K)
        Share of each branch in each frame; frames from T_b on are never read.
    costs : array_like, float, shape (K,)
        Cost of a frame in each branch, in any unit.
    lengths : array_like, int, shape (B,)
        T_b >= 1.

    Returns
    -------
    cost : ndarray, float64, shape (B,)
        In the unit of `costs`; NaN where a gate is not finite.
    grad : ndarray, float64, shape (B, T, K)
        Of sum_b cost_b; zero in padding, and where the cost is NaN.

    References
    ----------
    Macoskey et al., arXiv 2108.01553.

    Examples
    --------
    >>> amortized_cost([[[1.0, 0.0], [0.5, 0.5]]], [4.0, 1.0], [2])[0]
    array([3.25])
    """
    z, c = np.asarray(gates, np.float64), np.asarray(costs, np.float64)
    cost, grad = np.zeros(len(z)), np.zeros_like(z)
    for b, T in enumerate(_lengths(lengths, z)):
        if not np.isfinite(z[b, :T]).all():
            cost[b] = np.nan
            continue
        for t in range(T):
            cost[b] += _taken(z[b, t], c) / T
            grad[b, t] = c / T
    return cost, grad


def amortized_backlog(gates: ArrayLike, durations: ArrayLike, lengths: ArrayLike, *, frame_period: float = 1.0,
                      statistic: str = "mean") -> tuple[F8, F8]:
    """How much work is left when each frame has come and the next is due, and its gradient by the gates.

    Frames come every `frame_period`; what has not been worked off by then waits ::

        q_t = max(0, q_{t-1} + sum_k gates_tk durations_k - frame_period),  q_{-1} = 0

    Parameters
    ----------
    gates, lengths
        As in `amortized_cost`.
    durations : array_like, float, shape (K,)
        Time that a frame takes in each branch.
    frame_period : float
        Time between frames, in the unit of `durations`.
    statistic : {"mean", "last"}
        ``1 / T_b sum_t q_t``, or the q of the last frame.

    Returns
    -------
    backlog : ndarray, float64, shape (B,)
        In the unit of `durations`; NaN where a gate is not finite.
    grad : ndarray, float64, shape (B, T, K)
        Of sum_b backlog_b; the slope of ``max(0, x)`` is 0 where x <= 0. Zero in padding, and where the backlog is NaN.

    References
    ----------
    Macoskey et al., arXiv 2108.01553.

    Examples
    --------
    >>> backlog, grad = amortized_backlog([[[1, 0], [1, 0], [0, 1], [0, 1]]], [2.0, 0.5], [4])  # q = 1, 2, 1.5, 1
    >>> backlog, grad[0, :, 0].tolist()
    (array([1.375]), [2.0, 1.5, 1.0, 0.5])
    """
    if statistic not in ("mean", "last"):
        raise ValueError(f"statistic: expected 'mean' or 'last', got {statistic!r}")
    z, d = np.asarray(gates, np.float64), np.asarray(durations, np.float64)
    backlog, grad = np.zeros(len(z)), np.zeros_like(z)
    for b, T in enumerate(_lengths(lengths, z)):
        if not np.isfinite(z[b, :T]).all():
            backlog[b] = np.nan
            continue
        share = [float(t == T - 1) if statistic == "last" else 1.0 / T for t in range(T)]
        q = np.zeros(T)
        for t in range(T):
            q[t] = max(0.0, (q[t - 1] if t > 0 else 0.0) + (_taken(z[b, t], d) - frame_period))
            backlog[b] += share[t] * q[t]
        slope = 0.0  # of what is asked for by q_t, that of later frames included
        for t in reversed(range(T)):
            slope = slope + share[t] if q[t] > 0.0 else 0.0
            grad[b, t] = slope * d
    return backlog, grad


def gumbel_gate(logits: ArrayLike, lengths: ArrayLike | None = None, *, temperature: float = 1.0, hard: bool = False,
                noise: bool = True, seed: int = 0) -> F8:
    """Shares of the branches, ``softmax((logits + gumbel) / temperature)``, or the branch drawn by them.

    Parameters
    ----------
    logits : array_like, float, shape (B, T, K)
        Of an arbitrator.
    lengths : array_like, int, shape (B,), optional
        Frames from T_b on are never read.
    temperature : float
        Above 0.
    hard : bool
        One-hot of the largest, and of equals the first.
    noise : bool
        Whether to add Gumbel noise, with which the largest is branch k as often as its softmax says.
    seed : int
        Of the noise, 64 bits.

    Returns
    -------
    ndarray, float64, shape (B, T, K)
        Zero in padding. NaN in a frame that has no softmax, as it holds NaN, +inf, or nothing but -inf.

    References
    ----------
    Jang et al., arXiv 1611.01144; Macoskey et al., arXiv 2108.01553.

    Examples
    --------
    >>> gumbel_gate([[[0.0, np.log(3)]]], noise=False).round(6), gumbel_gate([[[0.0, 1.0]]], noise=False, hard=True)
    (array([[[0.25, 0.75]]]), array([[[0., 1.]]]))
    """
    x = np.asarray(logits, np.float64)
    gates = np.zeros_like(x)
    if not 0.0 < temperature < np.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    for b, T in enumerate(_lengths(lengths, x)):
        for t in range(T):
            score = x[b, t] + [gumbel(seed, b, t, k) if noise else 0.0 for k in range(x.shape[2])]
            if not -np.inf < score.max() < np.inf:
                gates[b, t] = np.nan
            elif hard:
                gates[b, t, score.argmax()] = 1.0
            else:
                share = np.exp((score - score.max()) / temperature)
                gates[b, t] = share / share.sum()
    return gates


def gumbel_gate_backward(gradient: ArrayLike, logits: ArrayLike, lengths: ArrayLike | None = None, *,
                         temperature: float = 1.0, noise: bool = True, seed: int = 0) -> F8:
    """Gradient of ``sum(gradient * gates)`` by the logits, of soft gates: for hard ones it is the straight-through estimate.

    Parameters
    ----------
    gradient : array_like, float, shape (B, T, K)
        Frames from T_b on are never read.
    logits, lengths, temperature, noise, seed
        As in `gumbel_gate`.

    Returns
    -------
    ndarray, float64, shape (B, T, K)
        Zero in padding, and where the gates are NaN.

    Examples
    --------
    >>> gumbel_gate_backward([[[8.0, 0.0]]], [[[0.0, 0.0]]], noise=False)
    array([[[ 2., -2.]]])
    """
    g, gates = np.asarray(gradient, np.float64), gumbel_gate(logits, lengths, temperature=temperature, noise=noise, seed=seed)
    by_logits = np.zeros_like(gates)
    for b, T in enumerate(_lengths(lengths, gates)):
        for t in range(T):
            if not np.isnan(gates[b, t]).any():
                by_logits[b, t] = gates[b, t] * (g[b, t] - gates[b, t] @ g[b, t]) / temperature
    return by_logits


def gumbel(seed: int, b: int, t: int, k: int) -> float:
    """Noise of one branch, from the middle of one of 2^32 parts of the probability: never infinite.

    Examples
    --------
    >>> round(gumbel(seed=0, b=0, t=0, k=0), 6)  # Philox gives 0x6627e8d5
    0.08482
    """
    word = philox(seed % 2**64, (k // 4, t, b, 0))[k % 4]
    return -math.log(-math.log((word + 0.5) / 2**32))


def _taken(shares: F8, of_branches: F8) -> float:
    """What one frame takes of something, in the order in which kernels add it up: whether a backlog is 0 may depend on it."""
    return float(sum(share * of_branch for share, of_branch in zip(shares, of_branches, strict=True)))


def _lengths(lengths: ArrayLike | None, frames: F8) -> list[int]:
    """T_b of each utterance."""
    B, most = frames.shape[:2]
    known = [most] * B if lengths is None else [int(T) for T in np.asarray(lengths)]
    if len(known) != B or not all(1 <= T <= most for T in known):
        raise ValueError(f"lengths: expected {B} of 1 to {most}, got {known}")
    return known
