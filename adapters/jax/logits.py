"""JAX: the loss of logits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from transducer_loss import logits_loss
from transducer_loss.adapters.jax.callback import (
    Memory,
    Options,
    alike,
    call,
    compute_dtype,
    device_bytes,
    store,
)
from transducer_loss.adapters.jax.given import Given, array_of, as_callbacks, blanked, given, shape_of
from transducer_loss.band import Band


def _problem(memory: Memory, options: dict[str, Any], logits: Any, batch: Given) -> tuple[logits_loss.Problem, Any]:
    """And which utterances have lengths that do not fit."""
    if logits.ndim == 2:
        batch, bad = batch.mended_packed(logits.shape[0], options["validate"])
    else:
        labels = batch.targets.shape[1] if batch.band is not None else logits.shape[2] - 1
        batch, bad = batch.mended(logits.shape[1], labels, options["validate"])
    return logits_loss.problem(logits, *batch.positional, band=batch.band, allocate=memory, **options), bad


def _forward(memory: Memory, options: dict[str, Any], outputs: list[Any], logits: Any, batch: Given) -> None:
    of, bad = _problem(memory, options, logits, batch)
    saved = logits_loss.forward(of, keep=len(outputs) > 1)[2]
    outputs[0][...] = blanked(of.processor, outputs[0], bad, np.nan)
    if saved is not None:
        store(outputs[1:], (saved.normaliser, saved.blank_occupancy, saved.label_occupancy))


def _backward(
    memory: Memory, options: dict[str, Any], outputs: list[Any], logits: Any, batch: Given, saved: list[Any], upstream: Any
) -> None:
    of, bad = _problem(memory, options, logits, batch)
    weights = blanked(of.processor, upstream, bad, 0)
    logits_loss.backward(of, logits_loss.Saved(*saved), logits_loss.weights_of(of, weights), inplace=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, logits: jax.Array, batch: Given) -> jax.Array:
    kind = compute_dtype(logits)
    (loss,) = call(_forward, options, ((batch.frames.shape, kind),), logits, batch, scratch=_scratch(logits))
    return loss


def _loss_fwd(options: Options, logits: jax.Array, batch: Given) -> tuple[jax.Array, Any]:
    kind, cells = compute_dtype(logits), logits.size // logits.shape[-1]
    results = ((batch.frames.shape, kind), *[((cells,), kind)] * 3)
    loss, *saved = call(_forward, options, results, logits, batch, scratch=_scratch(logits))
    return loss, (logits, batch, saved)


def _loss_bwd(options: Options, kept: Any, upstream: jax.Array) -> tuple[jax.Array, None]:
    logits = kept[0]
    (gradient,) = call(
        _backward, options, ((logits.shape, logits.dtype.name),), *kept, upstream, scratch=_scratch(logits)
    )  # fmt: skip
    return gradient, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _scratch(logits: jax.Array) -> int:
    return device_bytes(compute_dtype(logits), logits.size // logits.shape[-1])


def rnnt_loss(
    logits: Any,
    targets: Any,
    logit_lengths: Any,
    target_lengths: Any,
    *,
    blank: int = 0,
    topology: str = "regular",
    normalized: bool = False,
    band: Band | None = None,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    clamp: float = 0.0,
    validate: bool = False,
) -> jax.Array:
    """Transducer loss of logits, with a gradient.

    Parameters
    ----------
    logits : (B, T, U+1, V), or (B, T, S, V) with `band`, or (cells, V) array
        float16, bfloat16, float32, or float64 with ``jax_enable_x64``: a JAX array, traced or not, or a NumPy array.
    targets : (B, U) array or nested list of int
        Labels. Those beyond U_b are never read.
    logit_lengths, target_lengths : (B,) array or list of int
        T_b >= 1 and U_b >= 0.
    band : Band, optional
        As `prune` returns it: `logits` are of its cells.
    blank, topology, normalized, fastemit_lambda, delay_penalty, hat, infeasible, clamp
        As of `transducer_loss.rnnt_loss`. They are not traced: other values compile anew.
    validate : bool
        Raise for lengths and labels out of range within a compiled function, too. Unchecked, such an utterance has loss NaN and
        gradient 0.

    Returns
    -------
    (B,) array
        float32, or float64 for float64 logits. ``rnnt_loss(...).mean()`` is what most recipes minimise.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came: for shapes, dtypes and options, while tracing, too, and for
        lengths and labels whose numbers are known.
    jax.errors.JaxRuntimeError
        With the same words when a compiled function runs: for numbers that were traced, with ``validate=True``, and for
        ``infeasible="raise"``. From the second run on it is a ValueError of JAX. Where several devices wait for each other, XLA
        then ends the process.

    Notes
    -----
    A callback on XLA's own buffers and stream: nothing is copied to the host but lengths that are on a device. A call outside
    ``jit`` copies targets, `band` and, in `joint_rnnt_loss`, `classes` from there, too, as it checks them: compile a whole
    step. Forward keeps 12 bytes a cell (24 for float64), the padding included, and backward writes the gradient with the true
    upstream weights. Under ``vmap`` one call follows the other; batches belong in the batch axis. Arrays that ``jit`` has
    sharded by itself are gathered on every device: use ``jax.shard_map``, under which each device works on its own utterances.
    Second derivatives and forward mode raise.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import rnnt_loss
    >>> logits, targets = jnp.zeros((1, 4, 3, 5)), jnp.array([[1, 2]])
    >>> @jax.jit
    ... def step(logits, targets, frames, labels):
    ...     return jax.value_and_grad(lambda logits: rnnt_loss(logits, targets, frames, labels).mean())(logits)
    >>> loss, gradient = step(logits, targets, jnp.array([4]), jnp.array([2]))
    >>> round(float(loss), 3), gradient.shape
    (7.354, (1, 4, 3, 5))
    """
    options: dict[str, Any] = {
        "blank": blank, "topology": topology, "normalized": normalized, "fastemit_lambda": fastemit_lambda,
        "delay_penalty": delay_penalty, "hat": hat, "infeasible": infeasible, "clamp": clamp,
        "validate": validate,
    }  # fmt: skip
    logits = array_of(logits, "logits")
    batch = given(targets, logit_lengths, target_lengths, ("logit_lengths", "target_lengths"), band)
    known = batch.known(packed=logits.shape[0] if logits.ndim == 2 else None)
    logits_loss.problem(shape_of(logits), *known.positional, band=known.band, **options)
    return _loss(as_callbacks(options), *alike(logits, batch.on_device()))
