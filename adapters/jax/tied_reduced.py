"""JAX: the reduced prediction network of the Tied & Reduced decoder (arXiv 2109.07513)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from transducer_loss import checks
from transducer_loss.adapters.jax.callback import Memory, Options, alike, call, compute_dtype, device_bytes
from transducer_loss.adapters.jax.given import array_of, as_callbacks, as_jax, integers_of, lengths_of, shape_of, traced
from transducer_loss.reduced_predictor import averaged, averaged_backward

Labels = tuple[jax.Array, jax.Array]
"""Targets and their lengths."""


def _average(
    memory: Memory, options: dict[str, Any], outputs: list[Any], embedding: Any, positions: Any, labels: Labels
) -> None:
    averaged(embedding, positions, *labels, allocate=memory, **options)


def _average_backward(
    memory: Memory, options: dict[str, Any], outputs: list[Any], embedding: Any, positions: Any, labels: Labels, upstream: Any
) -> None:
    averaged_backward(upstream, embedding, positions, *labels, allocate=memory, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _averaged(options: Options, embedding: jax.Array, positions: jax.Array, labels: Labels) -> jax.Array:
    size, columns = labels[0].shape
    rows = (size,) if dict(options)["last"] else (size, columns + 1)
    results = (((*rows, embedding.shape[1]), embedding.dtype.name),)
    (out,) = call(_average, options, results, embedding, positions, labels, scratch=_scratch(embedding, positions, labels))
    return out


def _averaged_fwd(options: Options, *arguments: Any) -> tuple[jax.Array, Any]:
    return _averaged(options, *arguments), arguments


def _averaged_bwd(options: Options, kept: Any, upstream: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    results = tuple((each.shape, each.dtype.name) for each in kept[:2])
    embedding, positions = call(_average_backward, options, results, *kept, upstream, scratch=_scratch(*kept))
    return embedding, positions, None


_averaged.defvjp(_averaged_fwd, _averaged_bwd)


def _scratch(embedding: jax.Array, positions: jax.Array, labels: Labels) -> int:
    """Of backward: scores and products of every row, the gradient by every label, and parts of that by the positions."""
    (batch, columns), (_, reach, features) = labels[0].shape, positions.shape
    numbers = 2 * batch * (columns + 1) * reach + batch * columns * features + 72 * reach * features
    return device_bytes("float32", 0, more=np.dtype(compute_dtype(embedding)).itemsize * numbers + 64 * batch * (columns + 1))


def reduced_predictor(
    embedding: Any, positions: Any, targets: Any, target_lengths: Any, *, last: bool = False, validate: bool = False
) -> jax.Array:
    """Average of the embeddings of the last N labels, each weighted by position vectors, with gradients.

    Parameters
    ----------
    embedding : (V, E) array
        In a tied decoder the `weight` of `joint_rnnt_loss`, too: both gradients are added where it is one parameter.
    positions : (heads, N, E) array
        Of the dtype of the embedding.
    targets : (B, U) array or nested list of int
    target_lengths : (B,) array or list of int
    last : bool
        As of `transducer_loss.reduced_predictor`; not traced.
    validate : bool
        Raise for traced labels and lengths out of range when a compiled function runs. Unchecked, rows that see one are NaN,
        without gradient.

    Returns
    -------
    (B, U+1, E) array
        In the dtype of the embedding; with `last` (B, E).

    Raises
    ------
    ValueError, TypeError, jax.errors.JaxRuntimeError
        As of `rnnt_loss`.

    Notes
    -----
    The formula, which is the paper's, is in `transducer_loss.reduced_predictor`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import joint_rnnt_loss, reduced_predictor
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> params = {"tied": jax.random.normal(keys[0], (50, 16)), "positions": jax.random.normal(keys[1], (4, 2, 16))}
    >>> encoder, targets = jax.random.normal(keys[2], (2, 30, 16)), jnp.ones((2, 7), int)
    >>> @jax.jit
    ... def loss(params, frames, labels):
    ...     predictor = reduced_predictor(params["tied"], params["positions"], targets, labels)
    ...     return joint_rnnt_loss(encoder, predictor, params["tied"], None, targets, frames, labels).mean()
    >>> gradient = jax.grad(loss)(params, jnp.array([30, 21]), jnp.array([7, 4]))
    >>> gradient["tied"].shape, gradient["positions"].shape
    ((50, 16), (4, 2, 16))
    """
    vectors, weights = array_of(embedding, "embedding"), array_of(positions, "positions")
    of = checks.float_array(shape_of(vectors), "embedding", "V E")
    heads, reach, _ = checks.float_array(shape_of(weights), "positions", "heads N E", of, "embedding").shape
    checks.expect_shape(weights, "positions", "(heads, N, E)", (heads, reach, of.shape[1]))
    labels = integers_of(targets, "targets")
    if labels.ndim != 2 or labels.shape[0] < 1:
        raise ValueError(f"targets: expected shape (B, U) of at least one utterance, got {tuple(labels.shape)}")
    counts = integers_of(target_lengths, "target_lengths")
    lengths = lengths_of(counts, "target_lengths", labels.shape[:1], 0, labels.shape[1], "(B,) U")
    if not traced(labels, counts):
        checks.expect_labels(np.asarray(labels), np.asarray(counts), of.shape[0])
    options = as_callbacks({"last": bool(last), "validate": validate})
    return _averaged(options, *alike(vectors, weights, (jax.lax.stop_gradient(as_jax(labels)), lengths)))
