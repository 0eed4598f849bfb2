"""JAX: edit distances, and the minimum Bayes risk over an N-best list (EMBR, arXiv 2109.07513)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from transducer_loss import checks
from transducer_loss.adapters.jax.callback import Memory, Options, alike, call, compute_dtype, device_bytes
from transducer_loss.adapters.jax.given import (
    array_of,
    as_callbacks,
    integers_of,
    labels_of,
    lengths_of,
    numbers_of,
    shape_of,
)
from transducer_loss.edit_distance import MOST_LABELS, EditDistance, counted, sequences
from transducer_loss.embr import expected, risk


def _count(memory: Memory, options: dict[str, Any], outputs: list[Any], *arrays: Any) -> None:
    counted(*arrays, allocate=memory, **options)


def edit_distance(
    hypotheses: Any, hypothesis_lengths: Any, references: Any, reference_lengths: Any, *, blank: int | None = None,
    validate: bool = False,
) -> EditDistance:  # fmt: skip
    """Edit distance of every hypothesis and the reference of its utterance: `transducer_loss.edit_distance`, under jit, too.

    Parameters
    ----------
    hypotheses : (B, L) or (B, N, L) array or nested list of int
        Where JAX has no 64 bits (`jax_enable_x64`), labels are those of 32.
    hypothesis_lengths : (B,) or (B, N) array or list of int
        -1 for padding, which is no hypothesis.
    references : (B, U) array or nested list of int
    reference_lengths : (B,) array or list of int
    blank : int, optional
        As of `transducer_loss.edit_distance`; not traced.
    validate : bool
        Raise for traced lengths out of range when a compiled function runs. Unchecked, they give -1.

    Returns
    -------
    EditDistance
        A pytree of arrays of int32, which have no gradient.

    Raises
    ------
    ValueError, TypeError, jax.errors.JaxRuntimeError
        As of `rnnt_loss`.

    Examples
    --------
    >>> from transducer_loss.adapters.jax import edit_distance
    >>> edit_distance([[1, 2, 3, 4], [5, 6, 0, 0]], [4, 2], [[1, 3, 4], [5, 7, 6]], [3, 3]).total
    Array([1, 1], dtype=int32)
    """
    of, against = integers_of(hypotheses, "hypotheses"), integers_of(references, "references")
    sequences(shape_of(of), "hypotheses")
    if against.ndim != 2 or against.shape[0] != of.shape[0]:
        raise ValueError(f"references: expected shape (B, U) = ({of.shape[0]}, U), got {tuple(against.shape)}")
    if blank is not None:
        checks.whole_number(blank, "blank")
    shape, most, columns = of.shape[:-1], of.shape[-1], against.shape[1]
    dims = "(B,) L" if of.ndim == 2 else "(B, N) L"
    lengths = lengths_of(hypothesis_lengths, "hypothesis_lengths", shape, -1, most, dims)
    of_references = lengths_of(reference_lengths, "reference_lengths", shape[:1], 0, columns, "(B,) U")
    arrays = (
        labels_of(of, "hypotheses", hypothesis_lengths), lengths,
        labels_of(against, "references", reference_lengths), of_references,
    )  # fmt: skip
    room = 8 * (of.size + against.size + 4 * lengths.size) + 24 * lengths.size * (columns + 1)
    counts = call(
        _count, as_callbacks({"blank": blank, "validate": validate}), ((shape, "int32"),) * 4, *alike(*arrays),
        scratch=device_bytes("float32", 0, more=room),
    )  # fmt: skip
    return EditDistance(*counts)


def _risk(
    memory: Memory, options: dict[str, Any], outputs: list[Any], nll: Any, reference_nll: Any, others: dict[str, Any],
    upstream: Any = None,
) -> None:  # fmt: skip
    risk(
        nll, reference_nll=reference_nll, weights=upstream, gradient=upstream is not None, allocate=memory, **others, **options
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, nll: jax.Array, reference_nll: Any, others: dict[str, Any]) -> jax.Array:
    results = ((nll.shape[:1], compute_dtype(nll)),)
    (loss,) = call(_risk, options, results, nll, reference_nll, others, scratch=_scratch(nll, others))
    return loss


def _loss_fwd(options: Options, nll: jax.Array, reference_nll: Any, others: dict[str, Any]) -> tuple[jax.Array, Any]:
    return _loss(options, nll, reference_nll, others), (nll, reference_nll, others)


def _loss_bwd(options: Options, kept: Any, upstream: jax.Array) -> tuple[jax.Array, Any, None]:
    # Made anew, as the upstream weights are known only now: an N-best list is small.
    nll, reference_nll, others = kept
    inputs = [each for each in (nll, reference_nll) if each is not None]
    results = ((upstream.shape, upstream.dtype.name), *((each.shape, each.dtype.name) for each in inputs))
    _, gradient, *of_reference = call(_risk, options, results, *kept, upstream, scratch=_scratch(nll, others))
    return gradient, of_reference[0] if of_reference else None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _scratch(nll: jax.Array, others: dict[str, Any]) -> int:
    labels = others["hypotheses"]
    return device_bytes(compute_dtype(nll), 0, nll.size, 0 if labels is None else 8 * labels.size)


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
    validate: bool = False,
) -> jax.Array:
    """Expected edit distances over N-best lists, with gradients.

    Parameters
    ----------
    nll : (B, N) array
        Transducer losses of the hypotheses.
    distances : (B, N) array or nested list
        Of each hypothesis from the reference, ints or floats: no gradient.
    hypotheses : (B, N, L) array of int, optional
        With `hypothesis_lengths`: a hypothesis equal to an earlier one is left out.
    hypothesis_lengths : (B, N) array or nested list of int, optional
        Negative for padding, which is left out.
    reference_nll : (B,) array, optional
        Transducer losses of the references, of the dtype of `nll`.
    blank, temperature, interpolation, infeasible
        As of `transducer_loss.embr_loss`. They are not traced.
    validate : bool
        Raise for traced lengths out of range when a compiled function runs. Unchecked, such an utterance has loss NaN and
        gradient 0.

    Returns
    -------
    (B,) array
        float32, or float64 for float64 inputs; with gradients by `nll` and `reference_nll`.

    Raises
    ------
    ValueError, TypeError, jax.errors.JaxRuntimeError
        As of `rnnt_loss`.

    Notes
    -----
    The N hypotheses of an utterance share its encoder: give `joint_rnnt_loss` all B N of them and an `encoder_index`. See
    `transducer_loss.embr_loss` for the gradient and for what of it is the paper's.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import edit_distance, embr_loss, joint_rnnt_loss
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> encoder, predictor = jax.random.normal(keys[0], (1, 9, 6)), jax.random.normal(keys[1], (2, 3, 6))
    >>> weight, hypotheses, lengths = jax.random.normal(keys[2], (5, 6)), jnp.array([[[1, 2], [3, 0]]]), jnp.array([[2, 1]])
    >>> @jax.jit
    ... def loss(encoder):
    ...     nll = joint_rnnt_loss(encoder, predictor, weight, None, hypotheses[0], [9], lengths[0], encoder_index=[0, 0])
    ...     edits = edit_distance(hypotheses, lengths, [[1, 4]], [2])
    ...     risk = embr_loss(nll[None], edits.total, hypotheses=hypotheses, hypothesis_lengths=lengths)
    ...     return risk.mean(), edits
    >>> (value, edits), gradient = jax.value_and_grad(loss, has_aux=True)(encoder)
    >>> edits.total, gradient.shape
    (Array([[1, 2]], dtype=int32), (1, 9, 6))
    """
    scores = array_of(nll, "nll")
    reference = None if reference_nll is None else array_of(reference_nll, "reference_nll")
    labels = None if hypotheses is None else integers_of(hypotheses, "hypotheses")
    expected(
        shape_of(scores), None if reference is None else shape_of(reference), None if labels is None else shape_of(labels),
        hypothesis_lengths, temperature, interpolation, infeasible,
    )  # fmt: skip
    if blank is not None:
        checks.whole_number(blank, "blank")
    shape = scores.shape
    far = numbers_of(distances, "distances", "(B, N)", shape, compute_dtype(scores))
    others = {"distances": jnp.asarray(far), "hypotheses": None, "hypothesis_lengths": None}
    if hypothesis_lengths is not None:
        low, high = (-MOST_LABELS, MOST_LABELS) if labels is None else (-1, labels.shape[-1])
        others["hypothesis_lengths"] = lengths_of(hypothesis_lengths, "hypothesis_lengths", shape, low, high, "(B, N) L")
    if labels is not None:
        others["hypotheses"] = labels_of(labels, "hypotheses", hypothesis_lengths)
    options = {
        "blank": blank, "temperature": temperature, "interpolation": interpolation, "infeasible": infeasible,
        "validate": validate,
    }  # fmt: skip
    return _loss(as_callbacks(options), *alike(scores, reference, others))
