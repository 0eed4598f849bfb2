"""Keras 3 on its TensorFlow backend: the gate of Amortized Networks (arXiv 2108.01553), and what its choices cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from transducer_loss.adapters.keras.rnnt import frames_of, registered
from transducer_loss.adapters.tensorflow.amortized import amortized_cost, gumbel_gate
from transducer_loss.arrays import COMPUTE
from transducer_loss.checks import finite


def _hardest(logits: Any, frames: Any) -> Any:
    """Hard gates without noise by plain TensorFlow: `gumbel_gate` of inference."""
    known = tf.reduce_all(tf.math.is_finite(tf.nn.softmax(tf.cast(logits, COMPUTE[logits.dtype.name]))), -1, keepdims=True)
    gates = tf.one_hot(tf.argmax(logits, -1), tf.shape(logits)[-1], dtype=logits.dtype)
    gates = tf.where(known, gates, tf.constant(float("nan"), logits.dtype))
    real = tf.sequence_mask(frames, tf.shape(logits)[1])[..., None]
    return tf.ensure_shape(tf.where(real, gates, tf.zeros((), logits.dtype)), logits.shape)


@registered
class GumbelGate(keras.layers.Layer):
    """Gates (B, T, K) that choose a branch in every frame, by an arbitrator's logits (B, T, K).

    In training they are `gumbel_gate`: noisy, and soft, or hard with the gradient of the soft ones. Otherwise they are hard,
    without noise and without gradient, and made by plain TensorFlow: ``model.export()`` needs no transducer_loss where the
    model is served. Gates of masked frames are 0; the mask is handed on.

    Parameters
    ----------
    temperature : float
        At first; see the attribute.
    hard : bool
        In training, too.
    costs : sequence of float, optional
        Of a frame in each of the K branches: adds ``cost_weight`` times the mean of `amortized_cost` to the model's losses.
    cost_weight : float
    seed : int, optional
        Of the noise, another in every step: of a `keras.random.SeedGenerator`.
    **kwargs
        Of `keras.layers.Layer`.

    Attributes
    ----------
    temperature : scalar variable
        Not trained, but saved: ``gate.temperature.assign(...)`` lowers it from epoch to epoch, as in a
        `keras.callbacks.LambdaCallback`.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from transducer_loss.adapters.keras import GumbelGate
    >>> gate = GumbelGate(costs=[1.0, 0.25], cost_weight=0.1)
    >>> gate(np.array([[[2.0, 0.0], [0.0, 1.0]]], "float32"))[0].numpy()
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    >>> print(f"{float(gate.losses[0]):.4f}")
    0.0625
    """

    def __init__(
        self, *, temperature: float = 1.0, hard: bool = False, costs: Sequence[float] | None = None, cost_weight: float = 1.0,
        seed: int | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        if finite(temperature, "temperature") <= 0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        self._first, self.hard, self.seed = float(temperature), bool(hard), seed
        self.costs = None if costs is None else [finite(cost, "costs") for cost in costs]
        self.cost_weight = finite(cost_weight, "cost_weight")
        self.temperature = self.add_weight(
            name="temperature", shape=(), initializer=keras.initializers.Constant(self._first), dtype="float64",
            trainable=False, autocast=False,
        )  # fmt: skip
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking, self.supports_jit = True, False

    def build(self, logits_shape: Any) -> None:
        """Check the number of branches."""
        if len(logits_shape) != 3:
            raise ValueError(f"logits: expected 3 dimensions (B, T, K), got shape {logits_shape}")
        if self.costs is not None and len(self.costs) != logits_shape[-1]:
            raise ValueError(f"costs: expected K = {logits_shape[-1]} numbers as logits (B, T, K), got {self.costs}")

    def call(self, logits: Any, lengths: Any = None, training: bool = False, mask: Any = None) -> Any:
        """Gates (B, T, K).

        Parameters
        ----------
        logits : (B, T, K) tensor
        lengths : (B,) tensor of int, optional
            Instead of the mask.
        training : bool
            Whether there is noise.
        mask : (B, T) tensor of bool, optional
            Found by Keras.
        """
        logits = tf.convert_to_tensor(logits)
        frames = frames_of(mask, logits) if lengths is None else tf.convert_to_tensor(lengths)
        if training:
            first, step = tf.unstack(tf.cast(self.seed_generator.next(), tf.int64))
            gates = gumbel_gate(
                logits, frames, temperature=tf.convert_to_tensor(self.temperature), hard=self.hard, seed=first * 2**32 + step
            )
        else:
            gates = _hardest(logits, frames)
        if self.costs is not None:
            self.add_loss(self.cost_weight * tf.reduce_mean(self._cost(gates, frames, training)))
        return gates

    def _cost(self, gates: Any, frames: Any, training: bool) -> Any:
        if training:
            return amortized_cost(gates, self.costs, frames)
        real = COMPUTE[gates.dtype.name]
        return tf.tensordot(tf.reduce_sum(tf.cast(gates, real), 1), tf.constant(self.costs, real), 1) / tf.cast(frames, real)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            **super().get_config(), "temperature": self._first, "hard": self.hard, "costs": self.costs,
            "cost_weight": self.cost_weight, "seed": self.seed,
        }  # fmt: skip
