"""Keras 3 on its TensorFlow backend: the Tied & Reduced decoder (arXiv 2109.07513), which shares its matrix with the joint."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from transducer_loss.adapters.keras.rnnt import RNNTJoint, counts_of, registered
from transducer_loss.adapters.tensorflow.tied_reduced import reduced_predictor
from transducer_loss.arrays import COMPUTE
from transducer_loss.checks import dropout_rate, whole_number


def _average(embedding: Any, positions: Any, labels: Any) -> Any:
    """`reduced_predictor` by plain TensorFlow, of the last N labels (..., N), -1 before the first of them."""
    classes, kind, real = embedding.shape[0], embedding.dtype, COMPUTE[embedding.dtype.name]
    rows = tf.cast(tf.gather(embedding, tf.clip_by_value(labels, 0, classes - 1)), real)
    rows = tf.where(labels[..., None] < classes, rows, tf.constant(float("nan"), real))
    rows = tf.where(labels[..., None] < 0, tf.zeros((), real), rows)
    oldest_first = tf.reverse(tf.reduce_mean(tf.cast(positions, real), 0), [0])
    return tf.cast(tf.reduce_mean(rows * tf.reduce_sum(rows * oldest_first, -1, keepdims=True), -2), kind)


@registered
class TiedReducedDecoder(keras.layers.Layer):
    """Prediction network without recurrence: ``silu(LayerNormalization(Dense(average)))`` of the last embeddings.

    The average is `reduced_predictor`. The embeddings are the `weight` of an `RNNTJoint`: one variable, in which the gradients
    of both uses add up. Called with labels (B, U), padded with -1, the layer returns features (B, U+1, H) for the joint, of
    which row u follows label u.

    In training the average is the library's own. Otherwise, and in `step`, it is made by plain TensorFlow, the same but for
    rounding: ``model.export()`` needs no transducer_loss where the model is served.

    Parameters
    ----------
    joint : RNNTJoint
        Built with this layer, where it is not built yet; its variables are this layer's, too.
    features : int
        H: of the embeddings, the joint, and what is returned.
    heads, context : int
        Position vectors for each of the last `context` labels.
    dropout : float
        Of the result, in training.
    positions_initializer, kernel_initializer
        Of Keras, for the position vectors and the projection. Position vectors are drawn so large, by default, that the average
        is about as large as an embedding.
    **kwargs
        Of `keras.layers.Layer`.

    Attributes
    ----------
    joint : RNNTJoint
    positions : (heads, context, H) variable
    projection, norm : keras.layers.Layer

    Notes
    -----
    The tie is saved by ``model.save()`` and restored by ``keras.models.load_model()``. What makes layers one by one does not
    keep it, as ``keras.models.clone_model`` and ``from_config``: it gives the decoder a joint of its own.

    Formula, tie, projection, LayerNorm and Swish are the paper's. Default sizes, dropout and initial values are this library's;
    the projection has no bias, which would drown the average while it is small.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from transducer_loss.adapters.keras import RNNTJoint, TiedReducedDecoder
    >>> joint = RNNTJoint(50)
    >>> decoder = TiedReducedDecoder(joint, 16)
    >>> encoder, targets = np.zeros((2, 30, 16), "float32"), np.array([[3, 7, 3], [9, -1, -1]])
    >>> joint(encoder, decoder(targets), targets=targets).shape
    TensorShape([2])
    >>> features, state = decoder.step([0, 0])
    >>> features, state = decoder.step([3, 9], state)
    >>> features.shape, state.numpy()[:, -2:]
    (TensorShape([2, 16]), array([[-1,  3],
           [-1,  9]], dtype=int32))
    """

    def __init__(
        self, joint: Any, features: int, *, heads: int = 4, context: int = 5, dropout: float = 0.0,
        positions_initializer: Any = None, kernel_initializer: Any = "glorot_uniform", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        if not isinstance(joint, RNNTJoint):
            raise TypeError(f"joint: expected an RNNTJoint, got {type(joint).__name__}")
        self.joint, self.features = joint, whole_number(features, "features", 1)
        self.heads, self.context = whole_number(heads, "heads", 1), whole_number(context, "context", 1)
        if positions_initializer is None:
            # For x with |x|^2 = 1/3 the sum of heads * context terms x (x . p), so divided, is then as large as x.
            positions_initializer = keras.initializers.RandomNormal(stddev=math.sqrt(3 * self.heads * self.context))
        self.positions_initializer = keras.initializers.get(positions_initializer)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        own: dict[str, Any] = {"dtype": self.dtype_policy}
        self.projection = keras.layers.Dense(
            self.features, use_bias=False, kernel_initializer=self.kernel_initializer, name="projection", **own
        )
        self.norm = keras.layers.LayerNormalization(epsilon=1e-5, name="norm", **own)
        self.dropout = keras.layers.Dropout(dropout_rate(dropout), name="dropout", **own)
        self.supports_masking, self.supports_jit = True, False

    def build(self, targets_shape: Any) -> None:
        """Make the position vectors and the layers, and the joint's weight."""
        shape = (None, None, self.features)
        if not self.joint.built:
            self.joint.build(shape, shape)
        if self.joint.weight.shape[1] != self.features:
            raise ValueError(
                f"features: expected H = {self.joint.weight.shape[1]} of the joint's weight (V, H), got {self.features}"
            )
        self.positions = self.add_weight(
            name="positions", shape=(self.heads, self.context, self.features), initializer=self.positions_initializer
        )
        self.projection.build(shape)
        self.norm.build(shape)

    def call(self, targets: Any, target_lengths: Any = None, training: bool = False) -> Any:
        """Features (B, U+1, H).

        Parameters
        ----------
        targets : (B, U) tensor of int
            Padded with -1, or with anything where there are `target_lengths`.
        target_lengths : (B,) tensor of int, optional
            Instead of the labels' padding.
        training : bool
            Whether the library's own function is called.
        """
        targets = tf.convert_to_tensor(targets)
        lengths = counts_of(targets >= 0, "targets") if target_lengths is None else tf.convert_to_tensor(target_lengths)
        if training:
            average = reduced_predictor(self.joint.weight, self.positions, targets, lengths)
        else:
            known = tf.cast(tf.where(targets < 0, self.joint.classes, targets), tf.int32)  # no class: NaN, as in training
            known = tf.where(tf.sequence_mask(lengths, tf.shape(targets)[1]), known, -1)
            seen = tf.signal.frame(tf.pad(known, [[0, 0], [self.context, 0]], constant_values=-1), self.context, 1, axis=1)
            real = tf.sequence_mask(lengths + 1, tf.shape(seen)[1])
            average = self._average(tf.where(real[..., None], seen, -1))
        return self._features(average, training)

    def get_initial_state(self, batch_size: Any) -> Any:
        """The state (B, context) of `step` before the first label: -1."""
        return tf.fill((batch_size, self.context), -1)

    def step(self, labels: Any, state: Any = None) -> tuple[Any, Any]:
        """Features after one more label, for decoding.

        Parameters
        ----------
        labels : (B,) tensor or list of int
            Negative where there is none, as for utterances that have just emitted a blank: the state stays. Not looked at
            without a state, at the start.
        state : (B, context) tensor of int32, optional
            The last labels, as the last step returned it.

        Returns
        -------
        features : (B, H) tensor
        state : (B, context) tensor of int32
        """
        if not self.built:
            self.build((None, None))
        label = tf.cast(tf.convert_to_tensor(labels), tf.int32)[:, None]
        if state is None:
            state = self.get_initial_state(tf.shape(label)[0])
        else:
            state = tf.cast(state, tf.int32)
            state = tf.where(label < 0, state, tf.concat([state[:, 1:], label], axis=1))
        return self._features(self._average(state), False), state

    def _average(self, labels: Any) -> Any:
        return _average(tf.convert_to_tensor(self.joint.weight), tf.convert_to_tensor(self.positions), labels)

    def _features(self, average: Any, training: bool) -> Any:
        return self.dropout(tf.nn.silu(self.norm(self.projection(average))), training=training)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """None: the joint looks at the labels."""

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        # The joint as it is: when a model is saved, Keras writes down which of its layers are one and the same.
        return {
            **super().get_config(), "joint": self.joint, "features": self.features, "heads": self.heads,
            "context": self.context, "dropout": self.dropout.rate,
            "positions_initializer": keras.initializers.serialize(self.positions_initializer),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TiedReducedDecoder:
        """The layer of a configuration, serialised or not."""
        joint = config["joint"]
        serialised = joint if isinstance(joint, dict) else keras.saving.serialize_keras_object(joint)
        return cls(**{**config, "joint": keras.saving.deserialize_keras_object(serialised)})
