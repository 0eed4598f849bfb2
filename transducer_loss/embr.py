"""Edit-based minimum Bayes risk over an N-best list. Launches `kernels/embr.cu`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from transducer_loss.arrays import COMPUTE
from transducer_loss.checks import INFEASIBLE, choice, expect_shape, finite, float_array, lengths_on, numbers_for, weights_for
from transducer_loss.edit_distance import MOST_LABELS, labels_of, sequences
from transducer_loss.processors import Allocate, processor_for


@dataclasses.dataclass(frozen=True, eq=False)
class EmbrGrads:
    """Gradients of `embr_loss`.

    Attributes
    ----------
    nll : (B, N) array
        The signed upstream weights of the hypotheses' transducer losses.
    reference_nll : (B,) array or None
    """

    nll: Any
    reference_nll: Any


def embr_loss(
    nll: Any,
    distances: Any,
    *,
    hypotheses: Any = None,
    hypothesis_lengths: Any = None,
    blank: int | None = None,
    temperature: float = 1.0,
    reference_nll: Any = None,
    interpolation: float = 0.0,
    infeasible: str = "inf",
    weights: Any = None,
    gradient: bool = True,
    validate: bool = False,
) -> tuple[Any, EmbrGrads | None]:
    """Expected edit distance over the renormalised N-best hypotheses (EMBR, arXiv 2109.07513, section 3.3).

    In float64 the same as these lines, with their gradient::

        p = softmax(-nll / temperature, axis=1)
        loss = (p * distances).sum(axis=1) + interpolation * reference_nll

    Parameters
    ----------
    nll : (B, N) array
        Negative log-probability of each hypothesis: its exact or pruned transducer loss, of all its paths. Any float dtype.
        +inf is a hypothesis of probability 0.
    distances : (B, N) array
        Of each hypothesis from the reference: any numbers, as those that `edit_distance` counts.
    hypotheses : (B, N, L) array of int, optional
        With `hypothesis_lengths`: a hypothesis equal to an earlier one is left out, as its paths are counted already.
    hypothesis_lengths : (B, N) array or list of int, optional
        -1 for padding, which is left out whatever it holds.
    blank : int, optional
        A label that is left out of the hypotheses before they are compared.
    temperature : float
        Above 1 the probabilities of an N-best list are more alike, below 1 less.
    reference_nll : (B,) array, optional
        The transducer loss of the reference, of the dtype of `nll`.
    interpolation : float
        Weight of `reference_nll`, 0 or more; it is not read where this is 0.
    infeasible : {"inf", "zero", "raise"}
        The expected distance of an utterance without a hypothesis of any probability; its gradient is 0.
    weights : (B,) array, optional
        Of the utterances, in the gradient.
    gradient : bool
        Whether to make the gradients.
    validate : bool
        Also check `hypothesis_lengths` that are on a device, which synchronises.

    Returns
    -------
    loss : (B,) array
        float32, or float64 for float64 inputs. NaN, with gradient 0, where a hypothesis that counts has an `nll` of NaN or
        -inf, or one with any probability a distance that is not finite.
    grads : EmbrGrads or None
        Of ``sum_b weights_b loss_b``, in the dtype of `nll`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.

    Notes
    -----
    The gradient by the i-th `nll` is ``-p_i sum_j p_j (d_i - d_j) / temperature``, exactly 0 where all distances are equal. The
    loss and the renormalisation are the paper's; that equal hypotheses count once, the temperature and what becomes of padding
    are this library's reading of "N-best".

    Examples
    --------
    >>> import numpy as np, transducer_loss as tl
    >>> loss, grads = tl.embr_loss(np.zeros((1, 2)), [[0, 2]])
    >>> loss, grads.nll
    (array([1.]), array([[ 0.5, -0.5]]))
    """
    return risk(
        nll, distances, hypotheses=hypotheses, hypothesis_lengths=hypothesis_lengths, blank=blank, temperature=temperature,
        reference_nll=reference_nll, interpolation=interpolation, infeasible=infeasible, weights=weights, gradient=gradient,
        validate=validate,
    )  # fmt: skip


def expected(
    nll: Any, reference_nll: Any, hypotheses: Any, hypothesis_lengths: Any, temperature: float, interpolation: float,
    infeasible: str,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Scores (B, N), those of references (B,) or None, and labels (B, N, L) or None, checked but for lengths and labels."""
    scores = float_array(nll, "nll", "B N")
    if finite(temperature, "temperature") <= 0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
    if finite(interpolation, "interpolation") < 0:
        raise ValueError(f"interpolation: expected 0 or more, got {interpolation}")
    if reference_nll is None and interpolation != 0:
        raise ValueError(f"reference_nll: expected an array of shape (B,) with interpolation={interpolation}, got None")
    choice(infeasible, INFEASIBLE, "infeasible")
    reference = labels = None
    if reference_nll is not None:
        reference = float_array(reference_nll, "reference_nll", "B", scores, "nll")
        expect_shape(reference, "reference_nll", "(B,)", (int(scores.shape[0]),))
    if hypotheses is not None:
        if hypothesis_lengths is None:
            raise ValueError("hypothesis_lengths: expected an array of shape (B, N) with hypotheses, got None")
        labels = sequences(hypotheses, "hypotheses")
        expect_shape(labels, "hypotheses", "(B, N, L)", (*(int(size) for size in scores.shape), labels.shape[-1]))
    return scores, reference, labels


def risk(
    nll: Any, distances: Any, *, hypotheses: Any, hypothesis_lengths: Any, blank: int | None, temperature: float,
    reference_nll: Any, interpolation: float, infeasible: str, weights: Any, gradient: bool, validate: bool | None,
    threads: int | None = None, allocate: Allocate | None = None,
) -> tuple[Any, EmbrGrads | None]:  # fmt: skip
    """See `embr_loss`."""
    scores, reference, labels = expected(
        nll, reference_nll, hypotheses, hypothesis_lengths, temperature, interpolation, infeasible
    )
    batch, members = (int(size) for size in scores.shape)
    real = COMPUTE[scores.dtype.name]
    with processor_for(scores, threads, allocate) as processor:
        far = numbers_for(distances, processor, "distances", "(B, N)", (batch, members), real)
        upstream = weights_for(weights, processor, batch, real)
        standing = _standing(processor, labels, hypothesis_lengths, (batch, members), blank, validate)
        native, loss = processor.output((batch,), real)
        outputs = [(None, None), (None, None)]
        if gradient:
            kind = scores.dtype.name
            outputs = [processor.output((batch, members), kind)]
            outputs.append((None, None) if reference is None else processor.output((batch,), kind))
        processor.launch(
            f"embr_loss<{scores.dtype.name}>", batch, members,
            batch, members, processor.dense(scores, scores.dtype.name), far, standing, float(temperature),
            None if reference is None else processor.dense(reference, reference.dtype.name), float(interpolation), upstream,
            0.0 if infeasible == "zero" else math.inf, processor.empty((batch, members), "float64"), loss,
            *(view for _, view in outputs), steps=members, per_thread=1,
        )  # fmt: skip
        if infeasible == "raise":
            without = np.flatnonzero(np.isposinf(processor.to_host(loss)))
            if without.size:
                raise ValueError(
                    "nll: expected a hypothesis, and a reference, with a path for every utterance, got none for utterances "
                    f"{without.tolist()}"
                )
    return native, EmbrGrads(*(native for native, _ in outputs)) if gradient else None


def _standing(
    processor: Any, hypotheses: Any, lengths: Any, shape: tuple[int, int], blank: int | None, validate: bool | None
) -> Any:
    """Which hypotheses count, (B, N) uint8 as the kernel numbers it; None where all do."""
    if lengths is None:
        return None
    labels, columns, most = None, 0, MOST_LABELS
    if hypotheses is None:
        counts = lengths_on(processor, lengths, "hypothesis_lengths", shape, -1, most, "(B, N) L", validate)
    else:
        labels, counts = labels_of(processor, hypotheses, lengths, "hypothesis", blank, validate)
        columns = int(hypotheses.shape[-1])
    standing = processor.empty(shape, "uint8")
    processor.launch(
        "embr_standing", shape[0], shape[1], *shape, labels, columns, counts, standing, steps=1 + columns, per_thread=1
    )
    return standing
