"""TensorFlow: the reduced prediction network of the Tied & Reduced decoder (arXiv 2109.07513)."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from transducer_loss.adapters.tensorflow.graph import core_arguments, differentiable, floats, integers, tensor_of
from transducer_loss.reduced_predictor import averaged, averaged_backward


@tf.autograph.experimental.do_not_convert
def reduced_predictor(
    embedding: Any, positions: Any, targets: Any, target_lengths: Any, *, last: bool = False, validate: bool = False
) -> Any:
    """Average of the embeddings of the last N labels, each weighted by position vectors, with gradients.

    Parameters
    ----------
    embedding : (V, E) tensor or variable
        Any float dtype. In a tied decoder the `weight` of `joint_rnnt_loss`: a tape adds both gradients.
    positions : (heads, N, E) tensor or variable
        Of the dtype of the embedding.
    targets : (B, U) tensor or nested list of int
    target_lengths : (B,) tensor or list of int
    last, validate
        As of `transducer_loss.reduced_predictor`.

    Returns
    -------
    (B, U+1, E) tensor
        In the dtype of the embedding; with `last` (B, E).

    Raises
    ------
    ValueError, TypeError
        As of `rnnt_loss`.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from transducer_loss.adapters.tensorflow import joint_rnnt_loss, reduced_predictor
    >>> weight, positions = tf.Variable(tf.random.normal((50, 16))), tf.Variable(tf.random.normal((4, 2, 16)))
    >>> targets, lengths = tf.ones((2, 7), tf.int32), [7, 4]
    >>> with tf.GradientTape() as tape:
    ...     predictor = reduced_predictor(weight, positions, targets, lengths)
    ...     losses = joint_rnnt_loss(tf.zeros((2, 30, 16)), predictor, weight, None, targets, [30, 21], lengths)
    >>> [gradient.shape for gradient in tape.gradient(losses, [weight, positions])]
    [TensorShape([50, 16]), TensorShape([4, 2, 16])]
    """
    inputs = floats(embedding, "embedding", "V E"), floats(positions, "positions", "heads N E")
    others = integers(targets, "targets"), integers(target_lengths, "target_lengths")

    def forward(arguments: Any) -> list[Any]:
        inputs, others = arguments
        with core_arguments(inputs[0]) as given:
            return [tensor_of(averaged(*inputs, *others, last=last, validate=validate, **given))]

    def backward(arguments: Any) -> list[Any]:
        inputs, others, _, upstream = arguments
        with core_arguments(inputs[0]) as given:
            grads = averaged_backward(upstream, *inputs, *others, last=last, validate=None, **given)
            return [tensor_of(grads.embedding), tensor_of(grads.positions)]

    batch, columns = others[0].shape if others[0].shape.rank == 2 else (None, None)
    rows = [] if last else [None if columns is None else columns + 1]
    specs = [tf.TensorSpec([batch, *rows, inputs[0].shape[-1]], inputs[0].dtype)]
    return differentiable(forward, backward, inputs, others, specs)[0]
