"""Negative log-likelihoods and errors of the hypotheses of a batch -> its expected errors, and their gradient."""

import numpy as np
from numpy.typing import ArrayLike

from transducer_loss.reference.lattice import F8, _settle


def embr_loss(nll: ArrayLike, distances: ArrayLike, *, hypotheses: ArrayLike | None = None,
              hypothesis_lengths: ArrayLike | None = None, blank: int | None = None, temperature: float = 1.0,
              reference_nll: ArrayLike | None = None, interpolation: float = 0.0,
              infeasible: str = "inf") -> tuple[F8, F8]:
    """Edit distance that is to be expected of an N-best list, whose probabilities are made to sum to 1.

    With p the softmax of ``-nll / temperature`` over the hypotheses that count ::

        loss_b = sum_i p_i d_i + interpolation * reference_nll_b
        d loss_b / d nll_i = -p_i sum_j p_j (d_i - d_j) / temperature

    Parameters
    ----------
    nll, distances : array_like, float, shape (B, N)
        Loss of each hypothesis, +inf for one without a path, and what it costs.
    hypotheses : array_like, int, shape (B, N, L), optional
        Their labels: one that is equal to an earlier one, blanks left out, does not count.
    hypothesis_lengths : array_like, int, shape (B, N), optional
        Numbers of labels. Negative for padding, which does not count. `hypotheses` need them.
    blank : int, optional
        As in `edit_distance`; None leaves nothing out.
    temperature : float
        Above 0.
    reference_nll : array_like, float, shape (B,), optional
        Loss of the reference, needed and read where `interpolation` is not 0.
    interpolation : float
        Weight of `reference_nll`.
    infeasible : {"inf", "zero", "raise"}
        What is expected where no hypothesis that counts has any probability. "raise" refuses a `reference_nll` of
        +inf, too, where it is read.

    Returns
    -------
    loss : ndarray, float64, shape (B,)
        NaN where the nll of a hypothesis that counts is NaN or -inf, or its distance is not finite while its probability
        is not 0.
    grad : ndarray, float64, shape (B, N)
        Gradient of sum_b loss_b by nll; zero where there is no finite loss, and for what does not count. That by
        `reference_nll` is `interpolation`.

    Raises
    ------
    ValueError
        For an argument out of range, and with ``infeasible="raise"`` for utterances without a path.

    References
    ----------
    Botros et al., arXiv 2109.07513; the same of other transducers: Weng et al., arXiv 1911.12487.

    Examples
    --------
    >>> loss, grad = embr_loss([[np.log(2), np.log(4), np.log(4)]], [[0, 2, 4]])
    >>> bool(np.isclose(loss[0], 1.5)), grad.round(6).tolist()
    (True, [[0.75, -0.125, -0.625]])
    """
    if not 0.0 < temperature < np.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if interpolation != 0.0 and reference_nll is None:
        raise ValueError("reference_nll: expected an array with interpolation, got None")
    x, d = np.asarray(nll, np.float64), np.asarray(distances, np.float64)
    loss, grad = np.full(len(x), np.inf), np.zeros_like(x)
    probability: list[dict[int, float]] = [{} for _ in x]
    for b, these in enumerate(_counted(x.shape, hypotheses, hypothesis_lengths, blank)):
        if not (x[b, these] > -np.inf).all():
            loss[b] = np.nan
            continue
        best = x[b, these].min(initial=np.inf)
        share = {i: np.exp((best - x[b, i]) / temperature) for i in these if x[b, i] < np.inf}
        p = probability[b] = {i: s / sum(share.values()) for i, s in share.items() if s > 0.0}
        if not np.isfinite([d[b, i] for i in p]).all():
            loss[b] = np.nan
        elif p:
            loss[b] = sum(p[i] * d[b, i] for i in p)
    loss = _settle(loss, infeasible)
    if interpolation != 0.0:
        loss = loss + interpolation * np.asarray(reference_nll, np.float64)
        loss = _settle(loss, "raise" if infeasible == "raise" else "inf")
    for b in np.flatnonzero(np.isfinite(loss)).tolist():
        for i, p_i in probability[b].items():
            grad[b, i] = -p_i * sum(p_j * (d[b, i] - d[b, j]) for j, p_j in probability[b].items()) / temperature
    return loss, grad


def _counted(shape: tuple[int, ...], hypotheses: ArrayLike | None, hypothesis_lengths: ArrayLike | None,
             blank: int | None) -> list[list[int]]:
    """Which hypotheses of each utterance are neither padding nor a repetition."""
    if hypothesis_lengths is None:
        if hypotheses is not None:
            raise ValueError("hypothesis_lengths: expected an array with hypotheses, got None")
        return [list(range(shape[1]))] * shape[0]
    counted = []
    for b, lengths in enumerate(np.asarray(hypothesis_lengths)):
        first: dict[object, int] = {}
        for i, length in enumerate(lengths):
            if length >= 0:
                labels = None if hypotheses is None else np.asarray(hypotheses)[b, i, :length].tolist()
                first.setdefault(i if labels is None else tuple(v for v in labels if v != blank), i)
        counted.append(list(first.values()))
    return counted
