"""TensorFlow: gates, cost and backlog of Amortized Networks (arXiv 2108.01553)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from transducer_loss.adapters.tensorflow.graph import (
    core_arguments,
    differentiable,
    floats,
    integers,
    numbers,
    tensor_of,
)
from transducer_loss.adapters.tensorflow.sampled import drawn
from transducer_loss.amortized import STATISTICS, gated, gated_backward, mean_cost, waiting
from transducer_loss.arrays import COMPUTE
from transducer_loss.checks import choice


@tf.autograph.experimental.do_not_convert
def amortized_cost(gates: Any, costs: Any, lengths: Any, *, validate: bool = False) -> Any:
    """Average cost of a frame of each utterance, with a gradient by the gates.

    Parameters
    ----------
    gates : (B, T, K) tensor
        How far each frame takes each branch, as of `gumbel_gate`. Any float dtype.
    costs : (K,) tensor or list of float
        Of a frame in each branch: no gradient.
    lengths : (B,) tensor or list of int
    validate
        As of `transducer_loss.amortized_cost`.

    Returns
    -------
    (B,) tensor
        float32, or float64 for float64 gates.

    Raises
    ------
    ValueError, TypeError
        As of `rnnt_loss`.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from transducer_loss.adapters.tensorflow import amortized_cost, gumbel_gate
    >>> logits = tf.Variable(tf.zeros((1, 3, 2)))
    >>> with tf.GradientTape() as tape:
    ...     cost = amortized_cost(gumbel_gate(logits, [2], noise=False), [1.0, 0.25], [2])
    >>> cost.numpy(), tape.gradient(cost, logits)[0, :, 0].numpy()
    (array([0.625], dtype=float32), array([0.09375, 0.09375, 0.     ], dtype=float32))
    """
    return _of_gates(mean_cost, gates, numbers(costs, "costs"), lengths, validate, {})


@tf.autograph.experimental.do_not_convert
def amortized_backlog(
    gates: Any, durations: Any, lengths: Any, *, frame_period: float = 1.0, statistic: str = "mean", validate: bool = False
) -> Any:
    """Work that waits, of a recogniser that takes longer for some frames than they last, with a gradient by the gates.

    Parameters
    ----------
    gates : (B, T, K) tensor
        How far each frame takes each branch. Any float dtype.
    durations : (K,) tensor or list of float
        Of a frame in each branch, in the unit of `frame_period`: no gradient.
    lengths : (B,) tensor or list of int
    frame_period, statistic, validate
        As of `transducer_loss.amortized_backlog`.

    Returns
    -------
    (B,) tensor
        float32, or float64 for float64 gates.

    Raises
    ------
    ValueError, TypeError
        As of `rnnt_loss`.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from transducer_loss.adapters.tensorflow import amortized_backlog
    >>> amortized_backlog(tf.constant([[[1.0], [1.0], [0.0]]]), [3.0], [3]).numpy()  # 2, 4 and 3 wait
    array([3.], dtype=float32)
    """
    choice(statistic, STATISTICS, "statistic")
    options = {"frame_period": frame_period, "statistic": statistic}
    return _of_gates(waiting, gates, numbers(durations, "durations"), lengths, validate, options)


def _of_gates(
    function: Callable[..., Any], gates: Any, each: Any, lengths: Any, validate: bool, options: dict[str, Any]
) -> Any:
    gates = floats(gates, "gates", "B T K")
    others = each, integers(lengths, "lengths")

    def of(inputs: Any, others: Any, weights: Any, checked: bool | None) -> list[Any]:
        with core_arguments(inputs[0]) as given:
            pair = function(
                *inputs, *others, weights=weights, gradient=weights is not None, validate=checked, **options, **given
            )
            return [tensor_of(pair[weights is not None])]

    def forward(arguments: Any) -> list[Any]:
        inputs, others = arguments
        return of(inputs, others, None, validate)

    def backward(arguments: Any) -> list[Any]:
        inputs, others, _, upstream = arguments
        return of(inputs, others, upstream, None)

    specs = [tf.TensorSpec(gates.shape[:1], COMPUTE[gates.dtype.name])]
    return differentiable(forward, backward, [gates], others, specs)[0]


@tf.autograph.experimental.do_not_convert
def gumbel_gate(
    logits: Any, lengths: Any = None, *, temperature: Any = 1.0, hard: bool = False, noise: bool = True, seed: Any = None,
    validate: bool = False,
) -> Any:  # fmt: skip
    """Gates that choose a branch in every frame, with a gradient, which is that of the soft gates for hard ones, too.

    Parameters
    ----------
    logits : (B, T, K) tensor
        Of the arbitrator. Any float dtype.
    lengths : (B,) tensor or list of int, optional
        Frames past them get gates of 0.
    temperature : float or scalar tensor
        A tensor where it is to change from step to step of a tf.function.
    seed : int or tensor, optional
        Of the noise; drawn from TensorFlow's generator where it is None, in a tf.function anew for every step.
    hard, noise, validate
        As of `transducer_loss.gumbel_gate`.

    Returns
    -------
    (B, T, K) tensor
        In the dtype of the logits.

    Raises
    ------
    ValueError, TypeError
        As of `rnnt_loss`.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from transducer_loss.adapters.tensorflow import gumbel_gate
    >>> gumbel_gate(tf.constant([[[2.0, 0.0], [0.0, 1.0]]]), hard=True, noise=False).numpy()[0]
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    logits, heat = floats(logits, "logits", "B T K"), numbers(temperature, "temperature")
    if heat.shape.rank not in (None, 0):
        raise ValueError(f"temperature: expected a number, got shape {heat.shape}")
    others = None if lengths is None else integers(lengths, "lengths"), heat, drawn(seed) if noise else None

    def of(function: Callable[..., Any], arrays: Any, others: Any, **options: Any) -> list[Any]:
        lengths, heat, seed = others
        drawing = {"temperature": float(heat), "noise": noise, "seed": 0 if seed is None else int(seed)}
        with core_arguments(arrays[0]) as given:
            return [tensor_of(function(*arrays, lengths, **drawing, **options, **given))]

    def forward(arguments: Any) -> list[Any]:
        return of(gated, *arguments, hard=hard, validate=validate)

    def backward(arguments: Any) -> list[Any]:
        inputs, others, _, upstream = arguments
        return of(gated_backward, (upstream, *inputs), others, validate=None)

    return differentiable(forward, backward, [logits], others, [tf.TensorSpec(logits.shape, logits.dtype)])[0]
