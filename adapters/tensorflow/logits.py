"""TensorFlow: the loss of logits."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from transducer_loss import logits_loss
from transducer_loss.adapters.tensorflow.graph import (
    check_options,
    core_arguments,
    differentiable,
    floats,
    integers,
    tensor_of,
)
from transducer_loss.adapters.tensorflow.pruned import band_tensors, core_band
from transducer_loss.arrays import COMPUTE, as_array


@tf.autograph.experimental.do_not_convert
def rnnt_loss(
    logits: Any,
    targets: Any,
    logit_lengths: Any,
    target_lengths: Any,
    *,
    blank: int = 0,
    topology: str = "regular",
    normalized: bool = False,
    band: Any = None,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    clamp: float = 0.0,
    validate: bool = False,
) -> Any:
    """Transducer losses of logits, with a gradient.

    Parameters
    ----------
    logits : (B, T, U+1, V), or (B, T, S, V) with `band`, or (cells, V) tensor
        Of any float dtype; read where it is.
    targets : (B, U) tensor or nested list of int
        Labels. Those beyond U_b are never read.
    logit_lengths, target_lengths : (B,) tensor or list of int
    band : Band, optional
        As `prune` returns it: `logits` are of its cells.
    blank, topology, normalized, fastemit_lambda, delay_penalty, hat, infeasible, clamp, validate
        As of `transducer_loss.rnnt_loss`.

    Returns
    -------
    (B,) tensor
        float32, or float64 for float64 logits.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came. What only the running graph knows is told by its
        ``tf.errors.InvalidArgumentError``, in the same words.

    Notes
    -----
    The forward pass keeps 12 bytes a cell (24 for float64) beside the logits; the gradient is made when it is asked for.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from transducer_loss.adapters.tensorflow import rnnt_loss
    >>> logits = tf.Variable(tf.zeros((1, 4, 3, 5)))
    >>> with tf.GradientTape() as tape:
    ...     loss = tf.reduce_mean(rnnt_loss(logits, [[1, 2]], [4], [2]))
    >>> print(f"{float(loss):.4f}", tape.gradient(loss, logits).shape)
    7.3540 (1, 4, 3, 5)
    """
    options: dict[str, Any] = {
        "blank": blank, "topology": topology, "normalized": normalized, "fastemit_lambda": fastemit_lambda,
        "delay_penalty": delay_penalty, "hat": hat, "infeasible": infeasible,
    }  # fmt: skip
    logits = tf.convert_to_tensor(logits)
    logits = floats(logits, "logits", "cells V" if logits.shape.rank == 2 else "B T U+1 V" if band is None else "B T S V")
    check_options(logits.shape[-1] if logits.shape.rank else None, **options)
    options["clamp"] = clamp
    lengths = integers(logit_lengths, "logit_lengths"), integers(target_lengths, "target_lengths")

    def problem(inputs: Any, others: Any, given: dict[str, Any]) -> logits_loss.Problem:
        *others, band = others
        return logits_loss.problem(*inputs, *others, band=core_band(band), validate=validate, **options, **given)

    def forward(arguments: Any) -> list[Any]:
        inputs, others = arguments
        with core_arguments(inputs[0]) as given:
            loss, _, saved = logits_loss.forward(problem(inputs, others, given))
            kept = () if saved is None else (saved.normaliser, saved.blank_occupancy, saved.label_occupancy)
            return [tensor_of(each) for each in (loss, *kept)]

    def backward(arguments: Any) -> list[Any]:
        inputs, others, saved, upstream = arguments
        with core_arguments(inputs[0]) as given:
            of = problem(inputs, others, given)
            kept = logits_loss.Saved(*(as_array(each, "saved") for each in saved))
            return [tensor_of(logits_loss.backward(of, kept, logits_loss.weights_of(of, upstream), inplace=False))]

    real = COMPUTE[logits.dtype.name]
    specs = [tf.TensorSpec(lengths[0].shape, real), *([tf.TensorSpec([None], real)] * 3)]
    return differentiable(forward, backward, [logits], (integers(targets, "targets"), *lengths, band_tensors(band)), specs)[0]
