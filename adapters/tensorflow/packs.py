"""TensorFlow: the loss of any joint network, pack by pack (sample-wise)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from transducer_loss.adapters.tensorflow.graph import check_options, differentiable, floats, integers
from transducer_loss.adapters.tensorflow.logits import rnnt_loss
from transducer_loss.arrays import COMPUTE, as_array
from transducer_loss.cells import Ints
from transducer_loss.checks import Options, choice, lengths, targets_for, whole_number
from transducer_loss.logits_loss import expect_paths
from transducer_loss.packs import gradient_scale, packs_of
from transducer_loss.processors import processor_for

REDUCTIONS = ("none", "mean", "sum")


def _real(dtype: tf.DType) -> str:
    return COMPUTE[dtype.name]


def _rows(padded: Any, counts: Ints) -> Any:
    """A pack's rows, cropped; past its end an utterance's last row is repeated: no value there that is not a real one."""
    return tf.gather(padded, np.minimum(np.arange(int(counts.max())), counts[:, None] - 1), axis=1, batch_dims=1)


@dataclasses.dataclass
class _Run:
    """One pass over the packs of eager tensors."""

    joint: Callable[..., Any]
    variables: Sequence[Any]
    pack: int
    options: dict[str, Any]
    validate: bool
    encoder: Any
    predictor: Any
    targets: Any
    frames: Ints
    labels: Ints

    def losses_of(self, begin: int, end: int) -> tuple[Any, Any, Any]:
        """Losses of utterances [begin, end); and what of encoder and predictor they were made of."""
        frames, labels = self.frames[begin:end], self.labels[begin:end]
        encoder, predictor = _rows(self.encoder[begin:end], frames), _rows(self.predictor[begin:end], labels + 1)
        for tape in self.tapes:
            tape.watch((encoder, predictor))
        logits = tf.convert_to_tensor(self.joint(encoder[:, :, None], predictor[:, None]))
        cells = (end - begin, int(frames.max()), int(labels.max()) + 1)
        if logits.shape.rank != 4 or tuple(logits.shape[:3]) != cells:
            wanted = ", ".join(map(str, cells))
            raise ValueError(f"joint: expected logits of shape (n, T, U+1, V) = ({wanted}, V), got {tuple(logits.shape)}")
        if begin == 0:  # of the whole batch, so that errors tell an utterance's own index
            options = Options.checked(int(logits.shape[-1]), **self.options)
            with processor_for(as_array(logits, "logits")) as processor:
                targets_for(self.targets, processor, self.labels, int(logits.shape[-1]), options, self.validate)
        loss = rnnt_loss(logits, self.targets[begin:end], frames, labels, **self.options)
        return loss, encoder, predictor

    tapes: Sequence[tf.GradientTape] = ()

    def forward(self) -> Any:
        """Losses (B,)."""
        return tf.concat([self.losses_of(*each)[0] for each in packs_of(self.frames, self.labels, self.pack)], 0)

    def with_gradients(self, weights: Any, share: float) -> tuple[Any, list[Any]]:
        """Losses, and gradients of ``share * sum_b weights_b loss_b`` by encoder, predictor and variables.

        Without weights they are 1, and gradients of logits are made larger by a power of two.
        """
        losses, parts, sums = [], [], [None] * len(self.variables)
        todo = packs_of(self.frames, self.labels, self.pack)[::-1]
        while todo:
            begin, end = todo.pop()
            with tf.GradientTape() as tape:
                self.tapes = (tape,)
                loss, encoder, predictor = self.losses_of(begin, end)
            self.expect_known(tape)
            finite = bool(tf.reduce_all(tf.math.is_finite(loss)))
            if not finite and end - begin > 1:  # its NaN would reach the others by way of the variables: one by one, then
                todo.extend((b, b + 1) for b in reversed(range(begin, end)))
                continue
            part = slice(begin, end)
            scale = 1.0
            if weights is None:
                scale = gradient_scale(self.frames[part], self.labels[part], self.options["fastemit_lambda"])
            upstream = tf.fill([end - begin], tf.cast(scale, loss.dtype)) if weights is None else weights[begin:end]
            made = tape.gradient(loss, [encoder, predictor, *self.variables], upstream)
            del tape
            losses.append(loss)
            sized = [None if each is None else self.summand(each, share / scale, finite) for each in made]
            parts.append([
                tf.zeros_like(tensor[begin:end], _real(tensor.dtype)) if each is None
                else tf.pad(each, [[0, 0], [0, tensor.shape[1] - each.shape[1]], [0, 0]])
                for each, tensor in zip(sized, (self.encoder, self.predictor), strict=False)
            ])  # fmt: skip
            sums = [new if old is None else old if new is None else old + new for old, new in zip(sums, sized[2:], strict=True)]
        rows = [tf.concat(each, 0) for each in zip(*parts, strict=True)]
        unused = [tf.zeros(each.shape, _real(each.dtype)) for each in self.variables]
        return tf.concat(losses, 0), [*rows, *(zero if each is None else each for each, zero in zip(sums, unused, strict=True))]

    def summand(self, gradient: Any, factor: float, finite: bool) -> Any:
        """A gradient as it is added up."""
        dense = tf.convert_to_tensor(gradient)
        wide = tf.cast(dense, _real(dense.dtype)) * factor
        # The gradient of logits that are not finite is 0, but 0 * NaN is NaN.
        return wide if finite else tf.zeros_like(wide)

    def expect_known(self, tape: tf.GradientTape) -> None:
        """Raise where the joint used a variable whose gradient would be lost."""
        known = {id(each) for each in self.variables}
        for each in tape.watched_variables():
            if id(each) not in known:
                raise ValueError(
                    f"parameters: expected every trainable variable that the joint uses, got none for {each.name!r} of shape "
                    f"{tuple(each.shape)}"
                )


def _apart(function: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """A function in a thread of its own: no tape of the caller's records there, and so keeps the packs it is to forget."""

    @functools.wraps(function)
    def called(arguments: Any) -> list[Any]:
        def on_device() -> list[Any]:
            with tf.device(arguments[0][0].device):
                return function(arguments)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(on_device).result()

    return called


def _variables(joint: Any, parameters: Iterable[Any] | None) -> list[Any]:
    if parameters is None:
        parameters = getattr(joint, "trainable_variables", None)
        if parameters is None:
            raise ValueError("parameters: expected the joint's variables, as it has no trainable_variables, got None")
    different = {}
    for each in parameters:
        variable = each if isinstance(each, tf.Variable) else getattr(each, "_value", None)  # of a keras.Variable
        if not isinstance(variable, tf.Variable):
            raise TypeError(f"parameters: expected tf.Variables, got {type(each).__name__}")
        if isinstance(variable, tf.distribute.DistributedValues):
            raise ValueError(f"parameters: expected variables of no tf.distribute strategy, got a {type(variable).__name__}")
        if variable.trainable:
            different[id(variable)] = variable
    return list(different.values())


@tf.autograph.experimental.do_not_convert
def samplewise_rnnt_loss(
    joint: Callable[..., Any],
    encoder: Any,
    predictor: Any,
    targets: Any,
    encoder_lengths: Any,
    target_lengths: Any,
    *,
    parameters: Iterable[Any] | None = None,
    pack: int = 0,
    reduction: str = "none",
    blank: int = 0,
    topology: str = "regular",
    normalized: bool = False,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    validate: bool = False,
) -> Any:
    """Transducer losses of any joint network, with gradients, in the memory of one pack of utterances (arXiv 2211.16270).

    The same numbers as these lines, but joint, loss and gradient run for one pack after the other, and only the gradients of
    encoder, predictor and variables stay::

        logits = joint(encoder[:, :, None], predictor[:, None])                     # (B, T, U+1, V)
        loss = rnnt_loss(logits, targets, encoder_lengths, target_lengths)

    For a joint that is ``weight @ activation(encoder + predictor) + bias``, `joint_rnnt_loss` takes less memory and time.

    Parameters
    ----------
    joint : keras.Layer, tf.Module or callable
        ``joint(encoder, predictor) -> logits``, from (n, T, 1, D) and (n, 1, U+1, D') to (n, T, U+1, V), each cell by itself:
        n utterances of a pack, cropped to the longest of them. It runs eagerly, in a tf.function as well.
    encoder : (B, T, D) tensor
        Padding may hold anything.
    predictor : (B, U+1, D') tensor
        Likewise; row u follows label u, row 0 the start.
    targets, encoder_lengths, target_lengths
        As of `rnnt_loss`.
    parameters : iterable of variables, optional
        Every trainable variable that the joint uses. By default ``joint.trainable_variables``; a joint without needs them. A
        Keras layer has to be built before.
    pack : int
        Utterances that follow each other are taken together while ``n * T * (U+1)`` is at most this. 0 is one at a time, which
        takes the least memory; more is faster where utterances are too short to keep the device busy.
    reduction : {"none", "mean", "sum"}
        "mean" and "sum" make the gradients together with the loss, whether they are asked for or not. "none" makes the logits
        twice, the second time when gradients are asked for, and then with new random numbers: a joint with dropout needs one
        of the other two.
    blank, topology, normalized, fastemit_lambda, delay_penalty, hat, infeasible, validate
        As of `rnnt_loss`.

    Returns
    -------
    tensor
        (B,), or a scalar: float32, or float64 for a float64 encoder, whose dtype the logits have to share but for half types.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came; also for a trainable variable that the joint uses and that is not
        among the `parameters`, whose gradient would be lost.

    Notes
    -----
    Tensors that the joint takes from around it have no gradient, and it does not see the replica of a tf.distribute strategy,
    whose variables are an error. Gradients of packs are summed in float32 (float64 for
    float64).

    Examples
    --------
    >>> import tensorflow as tf
    >>> from transducer_loss.adapters.tensorflow import samplewise_rnnt_loss
    >>> gate, output = tf.Variable(tf.random.normal((16, 16))), tf.Variable(tf.random.normal((16, 50)))
    >>> def joint(encoder, predictor):
    ...     return tf.tanh(encoder + predictor) * tf.sigmoid(encoder @ gate) @ output
    >>> encoder, predictor = tf.random.normal((2, 30, 16)), tf.random.normal((2, 8, 16))
    >>> with tf.GradientTape() as tape:
    ...     loss = samplewise_rnnt_loss(
    ...         joint, encoder, predictor, tf.ones((2, 7), tf.int32), [30, 21], [7, 4], parameters=[gate, output],
    ...         reduction="mean",
    ...     )
    >>> [gradient.shape for gradient in tape.gradient(loss, [gate, output])]
    [TensorShape([16, 16]), TensorShape([16, 50])]
    """
    choice(reduction, REDUCTIONS, "reduction")
    whole_number(pack, "pack", 0)
    if not callable(joint):
        raise TypeError(f"joint: expected a callable, got {type(joint).__name__}")
    options: dict[str, Any] = {
        "blank": blank, "topology": topology, "normalized": normalized, "fastemit_lambda": fastemit_lambda,
        "delay_penalty": delay_penalty, "hat": hat, "infeasible": infeasible,
    }  # fmt: skip
    check_options(1, **{**options, "blank": 0})
    variables = _variables(joint, parameters)
    inputs = [floats(encoder, "encoder", "B T D"), floats(predictor, "predictor", "B U+1 D")]
    inputs += [tf.convert_to_tensor(each) for each in variables]
    others = (integers(targets, "targets"), integers(encoder_lengths, "encoder_lengths"),
              integers(target_lengths, "target_lengths"))  # fmt: skip
    real = _real(inputs[0].dtype)

    def of(arguments: Any) -> _Run:
        (encoder, predictor, *_), (targets, frames, labels), *_ = arguments
        batch = int(encoder.shape[0])
        if predictor.shape[0] != batch:
            raise ValueError(f"predictor: expected shape (B, U+1, D) = ({batch}, U+1, D), got {tuple(predictor.shape)}")
        return _Run(
            joint, variables, pack, {**options, "infeasible": "zero" if infeasible == "zero" else "inf"}, validate,
            encoder, predictor, targets,
            lengths(frames, "encoder_lengths", batch, 1, int(encoder.shape[1]), "T"),
            lengths(labels, "target_lengths", batch, 0, int(predictor.shape[1]) - 1, "U"),
        )  # fmt: skip

    def reported(loss: Any) -> Any:
        if infeasible == "raise":
            expect_paths(loss.numpy())
        return tf.cast(loss, real)

    def forward(arguments: Any) -> list[Any]:
        run = of(arguments)
        if reduction == "none":
            return [reported(run.forward())]
        share = 1 / len(run.frames) if reduction == "mean" else 1.0
        loss, gradients = run.with_gradients(None, share)
        return [tf.reduce_sum(reported(loss)) * share, *gradients]

    def backward(arguments: Any) -> list[Any]:
        tensors, _, saved, upstream = arguments
        sums = of(arguments).with_gradients(upstream, 1.0)[1] if reduction == "none" else [
            each * tf.cast(upstream, each.dtype) for each in saved
        ]
        return [tf.cast(each, tensor.dtype) for each, tensor in zip(sums, tensors, strict=True)]

    batch, sums = inputs[0].shape[:1], [tf.TensorSpec(each.shape, _real(each.dtype)) for each in inputs]
    specs = [tf.TensorSpec(batch, real)] if reduction == "none" else [tf.TensorSpec((), real), *sums]
    return differentiable(_apart(forward), _apart(backward), inputs, others, specs)[0]
