"""TensorFlow: the loss fused with the joint network."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from transducer_loss import joint_loss, logits_loss
from transducer_loss.adapters.tensorflow.graph import (
    check_options,
    core_arguments,
    differentiable,
    floats,
    integers,
    like,
    tensor_of,
)
from transducer_loss.adapters.tensorflow.pruned import band_tensors, core_band
from transducer_loss.adapters.tensorflow.sampled import classes_tensors, core_classes, drawn
from transducer_loss.arrays import COMPUTE, as_array
from transducer_loss.checks import choice
from transducer_loss.joint import ACTIVATIONS
from transducer_loss.tiling import Problem


def _problem(inputs: Any, others: Any, options: dict[str, Any], given: dict[str, Any]) -> Problem:
    *integers, index, seed, band, classes = others
    return joint_loss.problem(
        *inputs, *integers, encoder_index=index, seed=0 if seed is None else int(seed), band=core_band(band),
        classes=core_classes(classes), **options, **given,
    )  # fmt: skip


@tf.autograph.experimental.do_not_convert
def joint_rnnt_loss(
    encoder: Any,
    predictor: Any,
    weight: Any,
    bias: Any,
    targets: Any,
    encoder_lengths: Any,
    target_lengths: Any,
    *,
    activation: str = "tanh",
    encoder_index: Any = None,
    blank: int = 0,
    topology: str = "regular",
    band: Any = None,
    classes: Any = None,
    dropout: float = 0.0,
    seed: Any = None,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    workspace: int | str | None = None,
    occupancy_floor: float = 1e-6,
    sparse: bool = False,
    validate: bool = False,
) -> Any:
    """Transducer losses fused with the joint network, with gradients, in bounded memory.

    Parameters
    ----------
    encoder : (B, T, H) tensor
        With `encoder_index` (E, T, H).
    predictor : (B, U+1, H) tensor
    weight : (V, H) tensor or variable
        Of the output layer: ``tf.transpose(kernel)`` of a Keras ``Dense(V)``.
    bias : (V,) tensor or variable, or None
    targets, encoder_lengths, target_lengths
        As of `rnnt_loss`; with `encoder_index` the encoder has E lengths.
    encoder_index : (B,) tensor or list of int, optional
        Which encoder each utterance reads, as the hypotheses of an N-best list share one.
    band : Band, optional
        As `prune` returns it: only its cells are ever projected.
    classes : Classes, optional
        As `sample_classes` returns them: only their rows of weight and bias are read.
    seed : int or tensor, optional
        Of the dropout; drawn from TensorFlow's generator where it is None, in a tf.function anew for every step.
    sparse : bool
        With `classes`, make the gradients of weight and bias ``tf.IndexedSlices``, as that of ``tf.gather`` is.
    activation, dropout, workspace, occupancy_floor and the others
        As of `transducer_loss.joint_rnnt_loss`.

    Returns
    -------
    (B,) tensor
        float32, or float64 for float64 inputs.

    Notes
    -----
    The forward pass keeps 12 bytes a cell (24 for float64), from which the gradient makes the logits once more, tile by tile.
    Losses that nothing is differentiated by cost no such pass.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from transducer_loss.adapters.tensorflow import joint_rnnt_loss
    >>> encoder, predictor = tf.random.normal((2, 30, 16)), tf.random.normal((2, 8, 16))
    >>> weight, bias = tf.Variable(tf.random.normal((50, 16))), tf.Variable(tf.zeros(50))
    >>> with tf.GradientTape() as tape:
    ...     losses = joint_rnnt_loss(encoder, predictor, weight, bias, tf.ones((2, 7), tf.int32), [30, 21], [7, 4])
    ...     loss = tf.reduce_mean(losses)
    >>> [gradient.shape for gradient in tape.gradient(loss, [weight, bias])]
    [TensorShape([50, 16]), TensorShape([50])]
    """
    options: dict[str, Any] = {
        "activation": activation, "blank": blank, "topology": topology, "dropout": dropout, "sparse": sparse,
        "fastemit_lambda": fastemit_lambda, "delay_penalty": delay_penalty, "hat": hat, "infeasible": infeasible,
        "workspace": workspace, "occupancy_floor": occupancy_floor, "validate": validate,
    }  # fmt: skip
    inputs = [
        floats(encoder, "encoder", "B T H"), floats(predictor, "predictor", "B U+1 H"), floats(weight, "weight", "V H"),
        None if bias is None else floats(bias, "bias", "V"),
    ]  # fmt: skip
    kind = inputs[0].dtype
    for each, name in zip(inputs, ("encoder", "predictor", "weight", "bias"), strict=True):
        if each is not None and each.dtype != kind:
            raise TypeError(f"{name}: expected dtype {kind.name} as encoder, got {each.dtype.name}")
    choice(activation, ACTIVATIONS, "activation")
    check_options(
        inputs[2].shape[0], blank=blank, topology=topology, fastemit_lambda=fastemit_lambda, delay_penalty=delay_penalty,
        infeasible=infeasible, hat=hat,
    )  # fmt: skip
    found = classes_tensors(classes)
    if sparse and found is None:
        raise ValueError("sparse: expected False without classes, as every row of the weight has a gradient then, got True")
    others = (
        integers(targets, "targets"), integers(encoder_lengths, "encoder_lengths"),
        integers(target_lengths, "target_lengths"), None if encoder_index is None else integers(encoder_index, "encoder_index"),
        drawn(seed) if dropout else None, band_tensors(band), found,
    )  # fmt: skip

    def forward(arguments: Any) -> list[Any]:
        inputs, others = arguments
        with core_arguments(inputs[0]) as given:
            done = joint_loss.forward(_problem(inputs, others, options, given), later=True)
            vectors = () if done.saved is None else done.saved.vectors
            return [tensor_of(each) for each in (done.native, done.loss, *vectors)]

    def backward(arguments: Any) -> list[Any]:
        inputs, others, saved, upstream = arguments
        with core_arguments(inputs[0]) as given:
            of = _problem(inputs, others, options, given)
            done = joint_loss.Forward.resumed(*(as_array(each, "saved") for each in saved))
            sums = joint_loss.backward(of, done, logits_loss.weights_of(of, upstream)).native
            return [tf.cast(tensor_of(each), kind) for each in sums if each is not None]

    def finish(encoder: Any, predictor: Any, *layer: Any) -> tuple[Any, ...]:
        if sparse and found is not None:
            size = found.ids.shape.rank
            layer = tuple(
                tf.IndexedSlices(
                    tf.reshape(values, tf.concat([[-1], tf.shape(values)[size:]], 0)), tf.reshape(found.ids, [-1]),
                    tf.shape(of, tf.int64),
                )
                for values, of in zip(layer, inputs[2:], strict=False)
            )  # fmt: skip
        return encoder, predictor, *layer

    real = COMPUTE[kind.name]
    batch = inputs[1].shape[:1]
    specs = [tf.TensorSpec(batch, real)] * 2 + [tf.TensorSpec([None], real)] * 3
    gradients = like(*(each for each in inputs if each is not None))
    if sparse and found is not None:
        gradients[2:] = [tf.TensorSpec([*found.ids.shape, *each.shape[1:]], kind) for each in gradients[2:]]
    return differentiable(forward, backward, inputs, others, specs, gradients, finish)[0]
