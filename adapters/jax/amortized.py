"""JAX: gates, cost and backlog of Amortized Networks (arXiv 2108.01553)."""

from __future__ import annotations

import functools
from typing import Any

import jax

from transducer_loss import checks
from transducer_loss.adapters.jax.callback import Body, Memory, Options, alike, call, compute_dtype, device_bytes
from transducer_loss.adapters.jax.given import (
    array_of,
    as_callbacks,
    lengths_of,
    number_of,
    numbers_of,
    shape_of,
    words_of,
)
from transducer_loss.amortized import STATISTICS, gated, gated_backward, mean_cost, noisy, waiting
from transducer_loss.arrays import as_numpy

Others = dict[str, Any]
"""Arrays that have no gradient."""


def _cost(
    memory: Memory, options: dict[str, Any], outputs: list[Any], gates: Any, others: Others, upstream: Any = None
) -> None:
    mean_cost(gates, weights=upstream, gradient=upstream is not None, allocate=memory, **{**options, **others})


def _backlog(
    memory: Memory, options: dict[str, Any], outputs: list[Any], gates: Any, others: Others, upstream: Any = None
) -> None:
    waiting(gates, weights=upstream, gradient=upstream is not None, allocate=memory, **{**options, **others})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_gates(body: Body, options: Options, gates: jax.Array, others: Others) -> jax.Array:
    results = ((gates.shape[:1], compute_dtype(gates)),)
    (value,) = call(body, options, results, gates, others, scratch=_scratch(gates))
    return value


def _of_gates_fwd(body: Body, options: Options, gates: jax.Array, others: Others) -> tuple[jax.Array, Any]:
    return _of_gates(body, options, gates, others), (gates, others)


def _of_gates_bwd(body: Body, options: Options, kept: Any, upstream: jax.Array) -> tuple[jax.Array, None]:
    gates, _ = kept
    results = ((upstream.shape, upstream.dtype.name), (gates.shape, gates.dtype.name))
    _, gradient = call(body, options, results, *kept, upstream, scratch=_scratch(gates))
    return gradient, None


_of_gates.defvjp(_of_gates_fwd, _of_gates_bwd)


def _scratch(gates: jax.Array) -> int:
    return device_bytes("float32", 0, gates.shape[0] * gates.shape[1])


def _checked(gates: Any, each: Any, name: str, lengths: Any) -> tuple[jax.Array, Others, dict[str, Any]]:
    """Gates, arrays and options: an option are numbers that are no array of JAX, as it may have no float64 for them."""
    of = array_of(gates, "gates")
    batch, frames, branches = checks.float_array(shape_of(of), "gates", "B T K").shape
    found = numbers_of(each, name, "(K,)", (branches,), "float64")
    others: Others = {"lengths": lengths_of(lengths, "lengths", (batch,), 1, frames, "(B,) T")}
    if isinstance(found, jax.Array):
        return of, {name: found, **others}, {}
    return of, others, {name: tuple(found.tolist())}


def amortized_cost(gates: Any, costs: Any, lengths: Any, *, validate: bool = False) -> jax.Array:
    """Average cost of a frame of each utterance, with a gradient by the gates.

    Parameters
    ----------
    gates : (B, T, K) array
        How far each frame takes each branch, as of `gumbel_gate`.
    costs : (K,) array or list of float
        Of a frame in each branch: no gradient. Those of an array of JAX may be traced; others compile anew if they change.
    lengths : (B,) array or list of int
    validate : bool
        Raise for traced lengths out of range when a compiled function runs. Unchecked, such an utterance has cost NaN and
        gradient 0.

    Returns
    -------
    (B,) array
        float32, or float64 for float64 gates.

    Raises
    ------
    ValueError, TypeError, jax.errors.JaxRuntimeError
        As of `rnnt_loss`.

    Notes
    -----
    Backward reads the gates again. See `transducer_loss.amortized_cost` for what of it is the paper's.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import amortized_cost, gumbel_gate
    >>> def cost(logits):
    ...     return amortized_cost(gumbel_gate(logits, [2], noise=False), [1.0, 0.25], [2]).mean()
    >>> value, gradient = jax.value_and_grad(cost)(jnp.zeros((1, 3, 2)))
    >>> value, gradient[0, :, 0]
    (Array(0.625, dtype=float32), Array([0.09375, 0.09375, 0.     ], dtype=float32))
    """
    of, others, options = _checked(gates, costs, "costs", lengths)
    return _of_gates(_cost, as_callbacks({**options, "validate": validate}), *alike(of, others))


def amortized_backlog(
    gates: Any, durations: Any, lengths: Any, *, frame_period: float = 1.0, statistic: str = "mean", validate: bool = False
) -> jax.Array:
    """Work that waits, of a recogniser that takes longer for some frames than they last, with a gradient by the gates.

    Parameters
    ----------
    gates : (B, T, K) array
        How far each frame takes each branch.
    durations : (K,) array or list of float
        Of a frame in each branch, in the unit of `frame_period`: no gradient. Those of an array of JAX may be traced.
    lengths : (B,) array or list of int
    frame_period, statistic
        As of `transducer_loss.amortized_backlog`. They are not traced.
    validate : bool
        As of `amortized_cost`.

    Returns
    -------
    (B,) array
        float32, or float64 for float64 gates.

    Raises
    ------
    ValueError, TypeError, jax.errors.JaxRuntimeError
        As of `rnnt_loss`.

    Notes
    -----
    As of `amortized_cost`; the formula is in `transducer_loss.amortized_backlog`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import amortized_backlog
    >>> amortized_backlog(jnp.array([[[1.0], [1.0], [0.0]]]), [3.0], [3])  # 2, 4 and 3 wait
    Array([3.], dtype=float32)
    """
    of, others, options = _checked(gates, durations, "durations", lengths)
    if checks.finite(frame_period, "frame_period") < 0:
        raise ValueError(f"frame_period: expected 0 or more, got {frame_period}")
    checks.choice(statistic, STATISTICS, "statistic")
    options = {**options, "frame_period": frame_period, "statistic": statistic, "validate": validate}
    return _of_gates(_backlog, as_callbacks(options), *alike(of, others))


def _drawing(options: dict[str, Any], others: Others) -> dict[str, Any]:
    """Keywords of the core."""
    seed, temperature = others["seed"], others["temperature"]
    return {
        **options, "lengths": others["lengths"], "seed": 0 if seed is None else number_of(seed),
        "temperature": options["temperature"] if temperature is None else float(as_numpy(temperature)),
    }  # fmt: skip


def _gate(memory: Memory, options: dict[str, Any], outputs: list[Any], logits: Any, others: Others) -> None:
    gated(logits, allocate=memory, **_drawing(options, others))


def _gate_backward(
    memory: Memory, options: dict[str, Any], outputs: list[Any], logits: Any, others: Others, upstream: Any
) -> None:
    del options["hard"]  # whose gradient is that of the soft gates
    gated_backward(upstream, logits, allocate=memory, **_drawing(options, others))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gates(options: Options, logits: jax.Array, others: Others) -> jax.Array:
    (gates,) = call(_gate, options, ((logits.shape, logits.dtype.name),), logits, others, scratch=_scratch(logits))
    return gates


def _gates_fwd(options: Options, logits: jax.Array, others: Others) -> tuple[jax.Array, Any]:
    return _gates(options, logits, others), (logits, others)


def _gates_bwd(options: Options, kept: Any, upstream: jax.Array) -> tuple[jax.Array, None]:
    results = ((upstream.shape, upstream.dtype.name),)
    (gradient,) = call(_gate_backward, options, results, *kept, upstream, scratch=_scratch(upstream))
    return gradient, None


_gates.defvjp(_gates_fwd, _gates_bwd)


def gumbel_gate(
    logits: Any, lengths: Any = None, *, temperature: Any = 1.0, hard: bool = False, noise: bool = True, seed: Any = 0,
    validate: bool = False,
) -> jax.Array:  # fmt: skip
    """Gates that choose a branch in every frame, with a gradient, which is that of the soft gates for hard ones, too.

    Parameters
    ----------
    logits : (B, T, K) array
        Of the arbitrator.
    lengths : (B,) array or list of int, optional
        Frames past them get gates of 0.
    temperature : float or scalar array
        An array of JAX may be traced, as one that is lowered in training; another float compiles anew. No gradient.
    seed : int, integer scalar or PRNG key
        Of the noise; may be traced, as in ``seed=jax.random.fold_in(key, step)``. Give data-parallel workers and calls under
        ``vmap`` a seed each: they draw the same for the same.
    hard, noise
        As of `transducer_loss.gumbel_gate`. They are not traced.
    validate : bool
        Raise for traced lengths out of range when a compiled function runs. Unchecked, such an utterance has gates of NaN,
        without gradient.

    Returns
    -------
    (B, T, K) array
        In the dtype of the logits.

    Raises
    ------
    ValueError, TypeError, jax.errors.JaxRuntimeError
        As of `rnnt_loss`; the last for a traced temperature that is not above 0.

    Notes
    -----
    See `transducer_loss.gumbel_gate` for what of it is the paper's.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import gumbel_gate
    >>> gumbel_gate(jnp.array([[[2.0, 0.0], [0.0, 1.0]]]), hard=True, noise=False)[0]
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    of, words = array_of(logits, "logits"), words_of(seed, "seed", 64)
    heat = None
    if isinstance(temperature, jax.Array):
        heat, temperature = numbers_of(temperature, "temperature", "()", (), "float64"), 1.0
    batch, frames, _ = noisy(shape_of(of), temperature, noise, 0)[0].shape
    counts = None if lengths is None else lengths_of(lengths, "lengths", (batch,), 1, frames, "(B,) T")
    options = {"temperature": temperature, "hard": bool(hard), "noise": bool(noise), "validate": validate}
    others = {"lengths": counts, "seed": words if noise else None, "temperature": heat}
    return _gates(as_callbacks(options), *alike(of, others))
