"""JAX: the loss of any joint network, utterance by utterance (sample-wise, arXiv 2211.16270)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from transducer_loss import checks, logits_loss
from transducer_loss.adapters.jax.callback import Options, alike
from transducer_loss.adapters.jax.given import Given, array_of, given, shape_of
from transducer_loss.adapters.jax.logits import rnnt_loss

Joint = Callable[[Any, jax.Array, jax.Array], jax.Array]


def _losses(joint: Joint, options: Options, params: Any, one: tuple[Any, ...]) -> jax.Array:
    """The loss (1,) of an utterance, whose padding is made 0: what lies there must not reach the parameters' gradient."""
    encoder, predictor, batch = one
    encoder, predictor = (
        jnp.where(jnp.arange(len(rows))[:, None] < count, rows, 0)
        for rows, count in ((encoder, batch.frames), (predictor, batch.labels + 1))
    )
    logits = joint(params, encoder[None, :, None], predictor[None, None])
    return rnnt_loss(logits, batch.targets[None], batch.frames[None], batch.labels[None], **dict(options))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1))  # as an eager map would compile at every call
def _loss(joint: Joint, options: Options, params: Any, encoder: jax.Array, predictor: jax.Array, batch: Given) -> jax.Array:
    losses: jax.Array = jax.lax.map(lambda one: _losses(joint, options, params, one)[0], (encoder, predictor, batch))
    return losses


def _loss_fwd(
    joint: Joint, options: Options, params: Any, encoder: jax.Array, predictor: jax.Array, batch: Given
) -> tuple[jax.Array, Any]:
    return _loss(joint, options, params, encoder, predictor, batch), (params, encoder, predictor, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss_bwd(joint: Joint, options: Options, kept: Any, upstream: jax.Array) -> tuple[Any, jax.Array, jax.Array, None]:
    params, encoder, predictor, batch = kept
    # Keys and counters among the parameters have no gradient; None stands in their place.
    trained = jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else None, params)

    def step(sums: Any, one: Any) -> Any:
        *rows, labelled, weight = one

        def losses(trained: Any, *rows: jax.Array) -> jax.Array:
            whole = jax.tree.map(lambda leaf, each: leaf if each is None else each, params, trained, is_leaf=_nothing)
            return _losses(joint, options, whole, (*rows, labelled))

        loss, pull = jax.vjp(losses, trained, *rows)
        # The logits' gradient of an utterance without a finite loss is 0, but 0 * NaN is NaN.
        known = jnp.isfinite(loss[0])
        by_trained, *by_rows = jax.tree.map(lambda gradient: jnp.where(known, gradient, 0), pull(weight[None]))
        return jax.tree.map(jnp.add, sums, by_trained), by_rows

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), trained)
    sums, (by_encoder, by_predictor) = jax.lax.scan(step, zeros, (encoder, predictor, batch, upstream))
    by_trained = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), sums, trained)
    return by_trained, by_encoder, by_predictor, None


def _nothing(leaf: Any) -> bool:
    return leaf is None


_loss.defvjp(_loss_fwd, _loss_bwd)


def samplewise_rnnt_loss(
    joint: Joint,
    params: Any,
    encoder: Any,
    predictor: Any,
    targets: Any,
    encoder_lengths: Any,
    target_lengths: Any,
    *,
    blank: int = 0,
    topology: str = "regular",
    normalized: bool = False,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    validate: bool = False,
) -> jax.Array:
    """Transducer loss of any joint network, with gradients, in the memory of one utterance (arXiv 2211.16270).

    The same numbers as these lines, but joint, loss and backward run for one utterance after the other::

        logits = joint(params, encoder[:, :, None], predictor[:, None])              # (B, T, U+1, V)
        loss = rnnt_loss(logits, targets, encoder_lengths, target_lengths)

    For a joint that is ``weight @ activation(encoder + predictor) + bias``, `joint_rnnt_loss` takes less memory and time.

    Parameters
    ----------
    joint : callable
        ``joint(params, encoder, predictor) -> logits``, from (1, T, 1, D) and (1, 1, U+1, D') to (1, T, U+1, V), each cell by
        itself: ``module.apply`` of Flax, or a function of yours. The same object at every call, or else jit compiles anew.
    params : pytree
        All that the joint reads beside encoder and predictor and that is traced: its parameters, which get gradients, and
        whatever else (a PRNG key of its dropout, the same for each utterance), which gets none. JAX raises for what the joint
        closes over instead and that needs a gradient.
    encoder : (B, T, D) array
        Padding may hold anything; the joint is given 0 there.
    predictor : (B, U+1, D') array
        Likewise; row u follows label u, row 0 the start.
    targets, encoder_lengths, target_lengths
        As of `rnnt_loss`.
    blank, topology, normalized, fastemit_lambda, delay_penalty, hat, infeasible, validate
        As of `rnnt_loss`.

    Returns
    -------
    (B,) array
        float32, or float64 for float64 logits.

    Raises
    ------
    ValueError, TypeError, jax.errors.JaxRuntimeError
        As of `rnnt_loss`.

    Notes
    -----
    Losses (B,) have one upstream weight each, known in backward alone: backward makes the logits of each utterance again, with
    the true weight, and adds up the gradients of `params` in float32 (float64 for float64). Nothing is kept but the arguments.
    Shapes are static: each utterance takes the time of the padded one.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from transducer_loss.adapters.jax import samplewise_rnnt_loss
    >>> def joint(params, encoder, predictor):
    ...     gate = jax.nn.sigmoid(encoder @ params["gate"])
    ...     return (gate * jnp.tanh(encoder + predictor)) @ params["output"]
    >>> params = {"gate": jnp.ones((4, 4)), "output": jnp.ones((4, 10))}
    >>> encoder, predictor = jnp.ones((1, 5, 4)), jnp.ones((1, 3, 4))
    >>> def loss(params):
    ...     return samplewise_rnnt_loss(joint, params, encoder, predictor, [[1, 2]], [5], [2]).mean()
    >>> jax.tree.map(jnp.shape, jax.grad(loss)(params))
    {'gate': (4, 4), 'output': (4, 10)}
    """
    if not callable(joint):
        raise TypeError(f"joint: expected a callable, got {type(joint).__name__}")
    encoder, predictor = array_of(encoder, "encoder"), array_of(predictor, "predictor")
    checks.float_array(shape_of(encoder), "encoder", "B T D")
    checks.float_array(shape_of(predictor), "predictor", "B U+1 D")
    size = encoder.shape[0]
    if predictor.shape[0] != size:
        raise ValueError(f"predictor: expected shape (B, U+1, D) = ({size}, U+1, D), got {predictor.shape}")
    batch = given(targets, encoder_lengths, target_lengths, ("encoder_lengths", "target_lengths"))
    known = batch.known()
    checks.lengths(known.frames, "encoder_lengths", size, 1, encoder.shape[1], "T")
    params = jax.tree.map(jnp.asarray, params)
    logits = jax.eval_shape(joint, params, encoder[:1, :, None], predictor[:1, None])
    cells = (1, encoder.shape[1], predictor.shape[1])
    if getattr(logits, "shape", ())[:-1] != cells:
        raise ValueError(
            f"joint: expected logits of shape (n, T, U+1, V) = ({', '.join(map(str, cells))}, V), got {logits}"
        )
    options: dict[str, Any] = {
        "blank": blank, "topology": topology, "normalized": normalized, "fastemit_lambda": fastemit_lambda,
        "delay_penalty": delay_penalty, "hat": hat, "infeasible": infeasible, "validate": validate,
    }  # fmt: skip
    whole = jax.ShapeDtypeStruct((size, *logits.shape[1:]), logits.dtype)
    logits_loss.problem(shape_of(whole), *known.positional, **options)
    loss: jax.Array = _loss(joint, tuple(options.items()), *alike(params, encoder, predictor, batch.on_device()))
    return loss
