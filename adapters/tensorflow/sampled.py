"""TensorFlow: sampled softmax (arXiv 2203.16868): the classes that a loss is normalised over."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from transducer_loss import classes as core
from transducer_loss import output_layer, sampling
from transducer_loss.adapters.tensorflow.graph import core_arguments, floats, integers, run, tensor_of
from transducer_loss.arrays import as_array
from transducer_loss.checks import choice


class Classes(NamedTuple):
    """`transducer_loss.Classes` as tensors, which a tf.function, a data set or a strategy may pass on.

    Attributes
    ----------
    ids : (K,) or (B, K) tensor of int32
    probability : like `ids`, float32
    vocab_size, blank : scalar tensor of int64
    correction : scalar tensor of bool
    """

    ids: Any
    probability: Any
    vocab_size: Any
    blank: Any
    correction: Any


def classes_tensors(classes: Any) -> Classes | None:
    """Classes of either kind, as tensors."""
    if classes is None or isinstance(classes, Classes):
        return classes
    core.expect_classes(classes)
    return Classes(
        tensor_of(classes.ids), tensor_of(classes.probability), tf.constant(classes.vocab_size, tf.int64),
        tf.constant(classes.blank, tf.int64), tf.constant(classes.correction),
    )  # fmt: skip


def core_classes(classes: Classes | None) -> Any:
    """The core's classes of eager tensors."""
    if classes is None:
        return None
    ids, probability = as_array(classes.ids, "classes.ids"), as_array(classes.probability, "classes.probability")
    return core.Classes(ids, probability, int(classes.vocab_size), int(classes.blank), bool(classes.correction))


def drawn(seed: Any) -> Any:
    """A seed as a tensor: the one that is given, or one of TensorFlow's generator, another for every step."""
    if seed is None:
        return tf.random.uniform((), 0, 1 << 62, tf.int64)
    return integers(seed, "seed")


@tf.autograph.experimental.do_not_convert
def sample_classes(
    targets: Any,
    target_lengths: Any,
    *,
    vocab_size: int,
    num_samples: int,
    proposal: str = "uniform",
    scope: str = "batch",
    counts: Any = None,
    ctc_logits: Any = None,
    ctc_lengths: Any = None,
    blank: int = 0,
    correction: bool = False,
    seed: Any = None,
    step: Any = 0,
    validate: bool = False,
) -> Classes:
    """Classes for a sampled softmax: `transducer_loss.sample_classes`, as tensors.

    Parameters
    ----------
    targets : (B, U) tensor of int
    target_lengths : (B,) tensor or list of int
    seed : int or tensor, optional
        Drawn from TensorFlow's generator where it is None, in a tf.function anew for every step.
    step : int or tensor
        As ``optimizer.iterations``, with a `seed`.
    vocab_size, num_samples, proposal, scope, counts, ctc_logits, ctc_lengths, blank, correction, validate
        As of `transducer_loss.sample_classes`.

    Returns
    -------
    Classes
        For ``classes=`` of `joint_rnnt_loss`.

    Examples
    --------
    >>> from transducer_loss.adapters.tensorflow import sample_classes
    >>> sample_classes([[3, 5], [3, 1]], [2, 1], vocab_size=1000, num_samples=4, seed=0).ids.shape
    TensorShape([9])
    """
    choice(proposal, sampling.PROPOSALS, "proposal")
    each = sampling.SCOPES[choice(scope, sampling.SCOPES, "scope")] == "utterance"
    tensors: dict[str, Any] = {
        "targets": integers(targets, "targets"), "target_lengths": integers(target_lengths, "target_lengths"),
        "counts": None if counts is None else tf.convert_to_tensor(counts),
        "ctc_logits": None if ctc_logits is None else floats(ctc_logits, "ctc_logits", "B T V"),
        "ctc_lengths": None if ctc_lengths is None else integers(ctc_lengths, "ctc_lengths"),
        "seed": drawn(seed), "step": integers(step, "step"),
    }  # fmt: skip
    options: dict[str, Any] = {
        "vocab_size": vocab_size, "num_samples": num_samples, "proposal": proposal, "scope": scope, "blank": blank,
        "correction": correction, "validate": validate,
    }  # fmt: skip

    def made(tensors: Any) -> list[Any]:
        given = {**tensors, "seed": int(tensors["seed"]), "step": int(tensors["step"])}
        where = next(each for each in (given["ctc_logits"], given["counts"], given["targets"]) if each is not None)
        with core_arguments(where) as core:
            return list(classes_tensors(sampling.draw(**given, **options, **core)) or ())

    batch, columns = tensors["targets"].shape if tensors["targets"].shape.rank == 2 else (None, None)
    labels = columns if each else None if batch is None or columns is None else batch * columns
    slots = None if labels is None else min(vocab_size, 1 + labels + num_samples)
    shape = tf.TensorShape([batch, slots] if each else [slots])
    specs = [tf.TensorSpec(shape, tf.int32), tf.TensorSpec(shape, tf.float32)]
    return Classes(*run(made, tensors, [*specs, *(tf.TensorSpec((), kind) for kind in (tf.int64, tf.int64, tf.bool))]))


@tf.autograph.experimental.do_not_convert
def labels_in(classes: Any, targets: Any, target_lengths: Any, *, validate: bool = False) -> Any:
    """Labels (B, U) as positions among the sampled classes, for losses of logits over these alone.

    Parameters
    ----------
    classes : Classes
    targets : (B, U) tensor of int
    target_lengths : (B,) tensor or list of int
    validate : bool
        Also check what is on a device, which synchronises.

    Returns
    -------
    (B, max U_b) tensor of int32
        The blank is class 0 there. -1 past the last label, and for a label on a device that is not among the classes.

    Examples
    --------
    >>> import transducer_loss as tl
    >>> from transducer_loss.adapters.tensorflow import labels_in
    >>> labels_in(tl.Classes.from_ids([0, 4, 7, 9], vocab_size=10), [[7, 4]], [2]).numpy()
    array([[2, 1]], dtype=int32)
    """
    found = classes_tensors(classes)
    if found is None:
        raise TypeError("classes: expected Classes, got NoneType")
    targets, lengths = integers(targets, "targets"), integers(target_lengths, "target_lengths")

    def made(arguments: Any) -> list[Any]:
        classes, targets, lengths = arguments
        with core_arguments(classes.ids) as given:
            return [tensor_of(output_layer.found_in(core_classes(classes), targets, lengths, validate, **given))]

    return run(made, (found, targets, lengths), [tf.TensorSpec([targets.shape[0], None], tf.int32)])[0]
