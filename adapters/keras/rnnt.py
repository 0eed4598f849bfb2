"""Keras 3: a loss of logits for ``compile`` and ``fit``, and a joint network with its loss inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from transducer_loss.adapters.tensorflow.graph import check_options
from transducer_loss.adapters.tensorflow.joint import joint_rnnt_loss
from transducer_loss.adapters.tensorflow.logits import rnnt_loss
from transducer_loss.checks import Options, choice, dropout_rate, keywords_of, whole_number
from transducer_loss.joint import ACTIVATIONS

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"keras: expected the TensorFlow backend, got {keras.backend.backend()!r}: set KERAS_BACKEND=tensorflow before it"
    )

registered = keras.saving.register_keras_serializable("transducer_loss")


def counts_of(real: Any, name: str) -> Any:
    """Lengths (B,) of what is real, which has to come before the padding."""
    if real.shape.rank != 2:
        raise ValueError(f"{name}: expected two dimensions, got shape {real.shape}")
    counts = tf.reduce_sum(tf.cast(real, tf.int32), axis=1)
    first = tf.sequence_mask(counts, tf.shape(real)[1])
    check = tf.debugging.assert_equal(real, first, f"{name}: expected padding at the end alone, got some before the end")
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(counts)


def frames_of(mask: Any, padded: Any) -> Any:
    """Lengths (B,) by a mask (B, T); all of T where there is none."""
    if mask is None:
        return tf.fill(tf.shape(padded)[:1], tf.shape(padded)[1])
    return counts_of(tf.cast(mask, tf.bool), "mask")


def _expect_options(options: dict[str, Any], function: Any, own: set[str], classes: int, name: str) -> None:
    """Raise for what is no keyword of a function or one of the class's `own`, and for values of those that all losses share."""
    keywords = keywords_of(function, *own)
    odd = sorted(options.keys() - keywords.keys())
    if odd:
        raise TypeError(f"{name}: expected some of {', '.join(keywords)}, got {', '.join(odd)}")
    shared = keywords_of(Options.checked)
    check_options(classes, **{key: value for key, value in {**keywords, **options}.items() if key in shared})


class _Reduced(keras.losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


@registered
class RNNTLoss(keras.losses.Loss):
    """Transducer loss of logits, for ``model.compile(loss=RNNTLoss())``.

    ``y_pred`` are logits (B, T, U+1, V) of any float dtype, which are not cast; the frames of each utterance are counted in
    their Keras mask (B, T), as `RNNTJoint` hands it on, and without a mask all T are real. ``y_true`` are labels (B, U),
    padded with -1. ``sample_weight`` (B,) weighs utterances. Leave out ``class_weight``, which Keras would look up by the place
    of the highest of an utterance's labels.

    Plain operations, as of `keras.ops`, lose the mask, and padding then counts as frames without a word: where there is to be a
    mask, say ``require_mask=True``. A layer hands it on that says ``self.supports_masking = True``.

    Parameters
    ----------
    reduction : {"sum_over_batch_size", "mean", "mean_with_sample_weight", "sum", "none"}
        As of every Keras loss: the first two are the mean over the batch.
    name : str
    dtype : ignored
        The loss is float32, or float64 for float64 logits.
    require_mask : bool
        Raise for logits without a mask.
    **options
        Keywords of `transducer_loss.adapters.tensorflow.rnnt_loss`, but for `band`.

    Raises
    ------
    TypeError, ValueError
        For what is no option, at once; for the rest as of `rnnt_loss`, and where the mask is required and lost.

    Examples
    --------
    >>> import numpy as np
    >>> from transducer_loss.adapters.keras import RNNTLoss
    >>> loss = RNNTLoss(fastemit_lambda=0.01)(np.array([[1, 2, -1]]), np.zeros((1, 4, 3, 5), "float32"))
    >>> print(f"{float(loss):.4f}")
    7.3540
    """

    def __init__(
        self, reduction: str = "sum_over_batch_size", name: str = "rnnt_loss", dtype: Any = None, *, require_mask: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        _expect_options(options, rnnt_loss, {"band"}, 1 << 31, "RNNTLoss")  # how many classes there are comes with the logits
        self.require_mask, self.options = bool(require_mask), options

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Losses (B,)."""
        mask = getattr(y_pred, "_keras_mask", None)
        if mask is None and self.require_mask:
            raise ValueError(
                "y_pred: expected a Keras mask (B, T) with require_mask=True, got none: a layer or operation has lost it"
            )
        targets, logits = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
        return rnnt_loss(logits, targets, frames_of(mask, logits), counts_of(targets >= 0, "y_true"), **self.options)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Weighted and reduced losses."""
        losses = self.call(y_true, y_pred)
        reduced = _Reduced(name=self.name, reduction=self.reduction, dtype=losses.dtype.name)
        return reduced(losses, losses, sample_weight)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), "require_mask": self.require_mask, **self.options}


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "tanh": tf.tanh, "relu": tf.nn.relu, "leaky_relu": functools.partial(tf.nn.leaky_relu, alpha=0.01), "sigmoid": tf.sigmoid,
    "gelu": tf.nn.gelu, "gelu_tanh": functools.partial(tf.nn.gelu, approximate=True), "silu": tf.nn.silu,
    "identity": tf.identity,
}  # fmt: skip


@registered
class RNNTJoint(keras.layers.Layer):
    """Joint network ``weight @ activation(encoder + predictor) + bias``: logits, or the loss without them.

    Called with `targets`, as in training, it adds the mean of `joint_rnnt_loss` to the model's losses, so that ``compile`` is
    given none, and returns the losses (B,). Called without, as for decoding, it returns logits (B, T, U+1, V) with the mask of
    the frames, made by plain TensorFlow: ``model.export()`` of such a model needs no transducer_loss where it is served.

    Keras hands ``fit(sample_weight=, class_weight=)`` to compiled losses alone: they do not weigh the loss added here. The
    argument `sample_weight` of the call does, an input of the model as `targets` are.

    Parameters
    ----------
    classes : int
        V.
    activation : {"tanh", "relu", "leaky_relu", "sigmoid", "gelu", "gelu_tanh", "silu", "identity"}
    use_bias : bool
    dropout : float
        Of the hidden features, in training.
    kernel_initializer, bias_initializer
        Of Keras.
    loss_options : dict, optional
        Other keywords of `joint_rnnt_loss`, as ``{"blank": 0, "fastemit_lambda": 0.01}``; what is none raises at once.
    **kwargs
        Of `keras.layers.Layer`.

    Attributes
    ----------
    weight : (V, H) variable
        The transposed kernel of a ``Dense(V)``.
    bias : (V,) variable or None

    Examples
    --------
    >>> import keras, numpy as np
    >>> from transducer_loss.adapters.keras import RNNTJoint
    >>> joint = RNNTJoint(50)
    >>> encoder, predictor = np.zeros((2, 30, 16), "float32"), np.zeros((2, 8, 16), "float32")
    >>> joint(encoder, predictor).shape
    TensorShape([2, 30, 8, 50])
    >>> joint(encoder, predictor, targets=np.full((2, 7), 3)).shape, len(joint.losses)
    (TensorShape([2]), 1)
    """

    def __init__(
        self, classes: int, *, activation: str = "tanh", use_bias: bool = True, dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform", bias_initializer: Any = "zeros", loss_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        choice(activation, ACTIVATIONS, "activation")
        self.classes, self.activation, self.use_bias = whole_number(classes, "classes", 1), activation, use_bias
        self.dropout, self.loss_options = dropout_rate(dropout), dict(loss_options or {})
        own = {"activation", "band", "classes", "dropout", "encoder_index", "sparse"}
        _expect_options(self.loss_options, joint_rnnt_loss, own, self.classes, "loss_options")
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.seed_generator = keras.random.SeedGenerator() if dropout else None
        self.supports_masking, self.supports_jit = True, False

    def build(self, encoder_shape: Any, predictor_shape: Any) -> None:
        """Make the output layer."""
        features = encoder_shape[-1]
        if predictor_shape[-1] != features:
            raise ValueError(f"predictor: expected shape (B, U+1, H) of H = {features} as encoder, got {predictor_shape}")
        self.weight = self.add_weight(
            name="weight", shape=(self.classes, features), initializer=self.kernel_initializer
        )
        self.bias = (
            self.add_weight(name="bias", shape=(self.classes,), initializer=self.bias_initializer) if self.use_bias else None
        )

    def call(
        self, encoder: Any, predictor: Any, targets: Any = None, encoder_lengths: Any = None, target_lengths: Any = None,
        training: bool = False, encoder_mask: Any = None, sample_weight: Any = None,
    ) -> Any:  # fmt: skip
        """Logits, or losses where there are targets.

        Parameters
        ----------
        encoder : (B, T, H) tensor
        predictor : (B, U+1, H) tensor
        targets : (B, U) tensor of int, optional
            Padded with -1, or with anything where there are `target_lengths`.
        encoder_lengths, target_lengths : (B,) tensor of int, optional
            Instead of the mask of the encoder and of the labels' padding.
        training : bool
            Whether dropout acts.
        encoder_mask : (B, T) tensor of bool, optional
            Found by Keras.
        sample_weight : (B,) tensor, optional
            Weighs the utterances in the added loss, which stays a mean over the batch; the losses returned are not weighted.
        """
        if targets is None:
            hidden = _ACTIVATIONS[self.activation](encoder[:, :, None] + predictor[:, None])
            if self.dropout and training:
                hidden = keras.random.dropout(hidden, self.dropout, seed=self.seed_generator)
            logits = tf.matmul(hidden, tf.convert_to_tensor(self.weight), transpose_b=True)
            return logits if self.bias is None else logits + tf.convert_to_tensor(self.bias)
        targets = tf.convert_to_tensor(targets)
        losses = joint_rnnt_loss(
            encoder, predictor, self.weight, self.bias, targets,
            frames_of(encoder_mask, encoder) if encoder_lengths is None else encoder_lengths,
            counts_of(targets >= 0, "targets") if target_lengths is None else target_lengths,
            activation=self.activation, dropout=self.dropout if training else 0.0, **self.loss_options,
        )  # fmt: skip
        weights = 1 if sample_weight is None else tf.reshape(tf.cast(sample_weight, losses.dtype), tf.shape(losses))
        self.add_loss(tf.reduce_mean(losses * weights))
        return losses

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        """The frames' mask (B, T), of logits."""
        return previous_mask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of every layer; losses have no mask."""
        outputs = super().__call__(*args, **kwargs)
        if len(outputs.shape) == 1:  # which compute_mask is not told
            outputs._keras_mask = None
        return outputs

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            **super().get_config(), "classes": self.classes, "activation": self.activation, "use_bias": self.use_bias,
            "dropout": self.dropout, "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer), "loss_options": self.loss_options,
        }  # fmt: skip
