"""TensorFlow: edit distances, and the minimum Bayes risk over an N-best list (EMBR, arXiv 2109.07513)."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from transducer_loss.adapters.tensorflow.graph import (
    core_arguments,
    differentiable,
    floats,
    integers,
    numbers,
    run,
    tensor_of,
)
from transducer_loss.arrays import COMPUTE
from transducer_loss.checks import INFEASIBLE, choice
from transducer_loss.edit_distance import counted
from transducer_loss.embr import risk


class EditDistance(NamedTuple):
    """`transducer_loss.EditDistance` as tensors, each (B,) or (B, N) int32; -1 for padding."""

    total: Any
    insertions: Any
    deletions: Any
    substitutions: Any


@tf.autograph.experimental.do_not_convert
def edit_distance(
    hypotheses: Any, hypothesis_lengths: Any, references: Any, reference_lengths: Any, *, blank: int | None = None,
    validate: bool = False,
) -> EditDistance:  # fmt: skip
    """Edit distance of every hypothesis and the reference of its utterance: `transducer_loss.edit_distance`, as tensors.

    Parameters
    ----------
    hypotheses : (B, L) or (B, N, L) tensor or nested list of int
    hypothesis_lengths : (B,) or (B, N) tensor or list of int
        -1 for padding, which is no hypothesis.
    references : (B, U) tensor or nested list of int
    reference_lengths : (B,) tensor or list of int
    blank, validate
        As of `transducer_loss.edit_distance`.

    Returns
    -------
    EditDistance
        Integers, which have no gradient.

    Raises
    ------
    ValueError, TypeError
        As of `rnnt_loss`.

    Examples
    --------
    >>> from transducer_loss.adapters.tensorflow import edit_distance
    >>> edit_distance([[1, 2, 3, 4], [5, 6, 0, 0]], [4, 2], [[1, 3, 4], [5, 7, 6]], [3, 3]).total.numpy()
    array([1, 1], dtype=int32)
    """
    given = (
        integers(hypotheses, "hypotheses"), integers(hypothesis_lengths, "hypothesis_lengths"),
        integers(references, "references"), integers(reference_lengths, "reference_lengths"),
    )  # fmt: skip

    def made(given: Any) -> list[Any]:
        hypotheses, _, references, _ = given
        # The core works where the hypotheses are, and where the references are if these are on the host.
        with core_arguments(references if int(hypotheses.__dlpack_device__()[0]) == 1 else hypotheses) as core:
            edits = counted(*given, blank=blank, validate=validate, **core)
            return [tensor_of(each) for each in (edits.total, edits.insertions, edits.deletions, edits.substitutions)]

    return EditDistance(*run(made, given, [tf.TensorSpec(given[0].shape[:-1], tf.int32)] * 4))


@tf.autograph.experimental.do_not_convert
def embr_loss(
    nll: Any,
    distances: Any,
    *,
    hypotheses: Any = None,
    hypothesis_lengths: Any = None,
    blank: int | None = None,
    temperature: float = 1.0,
    reference_nll: Any = None,
    interpolation: float = 0.0,
    infeasible: str = "inf",
    validate: bool = False,
) -> Any:
    """Expected edit distances over N-best lists, with gradients.

    Parameters
    ----------
    nll : (B, N) tensor
        Transducer losses of the hypotheses, of any float dtype.
    distances : (B, N) tensor or nested list
        Of each hypothesis from the reference, ints or floats: no gradient.
    hypotheses : (B, N, L) tensor of int, optional
        With `hypothesis_lengths`: a hypothesis equal to an earlier one is left out.
    hypothesis_lengths : (B, N) tensor or nested list of int, optional
        Negative for padding, which is left out.
    reference_nll : (B,) tensor, optional
        Transducer losses of the references, of the dtype of `nll`.
    blank, temperature, interpolation, infeasible, validate
        As of `transducer_loss.embr_loss`.

    Returns
    -------
    (B,) tensor
        float32, or float64 for float64 inputs; with gradients by `nll` and `reference_nll`.

    Raises
    ------
    ValueError, TypeError
        As of `rnnt_loss`.

    Notes
    -----
    The N hypotheses of an utterance share its encoder: give `joint_rnnt_loss` all B N of them and an `encoder_index`.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from transducer_loss.adapters.tensorflow import edit_distance, embr_loss, joint_rnnt_loss
    >>> encoder = tf.Variable(tf.random.normal((1, 9, 6)))
    >>> predictor, weight = tf.random.normal((2, 3, 6)), tf.random.normal((5, 6))
    >>> hypotheses, lengths = tf.constant([[[1, 2], [3, 0]]]), tf.constant([[2, 1]])
    >>> with tf.GradientTape() as tape:
    ...     nll = joint_rnnt_loss(encoder, predictor, weight, None, hypotheses[0], [9], lengths[0], encoder_index=[0, 0])
    ...     edits = edit_distance(hypotheses, lengths, [[1, 4]], [2])
    ...     loss = tf.reduce_mean(embr_loss(nll[None], edits.total, hypotheses=hypotheses, hypothesis_lengths=lengths))
    >>> edits.total.numpy(), tape.gradient(loss, encoder).shape
    (array([[1, 2]], dtype=int32), TensorShape([1, 9, 6]))
    """
    options: dict[str, Any] = {
        "blank": blank, "temperature": temperature, "interpolation": interpolation, "infeasible": infeasible,
    }  # fmt: skip
    choice(infeasible, INFEASIBLE, "infeasible")
    inputs = [floats(nll, "nll", "B N"), None if reference_nll is None else floats(reference_nll, "reference_nll", "B")]
    others = (
        numbers(distances, "distances"), None if hypotheses is None else integers(hypotheses, "hypotheses"),
        None if hypothesis_lengths is None else integers(hypothesis_lengths, "hypothesis_lengths"),
    )  # fmt: skip

    def of(inputs: Any, others: Any, weights: Any, checked: bool | None) -> list[Any]:
        (nll, reference_nll), (distances, hypotheses, lengths) = inputs, others
        with core_arguments(nll) as given:
            loss, grads = risk(
                nll, distances, hypotheses=hypotheses, hypothesis_lengths=lengths, reference_nll=reference_nll, weights=weights,
                gradient=weights is not None, validate=checked, **options, **given,
            )  # fmt: skip
            made = (loss,) if grads is None else (grads.nll, grads.reference_nll)
            return [tensor_of(each) for each in made if each is not None]

    def forward(arguments: Any) -> list[Any]:
        inputs, others = arguments
        return of(inputs, others, None, validate)

    def backward(arguments: Any) -> list[Any]:
        # All over again, as the core does it: beside the hypotheses' own losses it costs nothing.
        inputs, others, _, upstream = arguments
        return of(inputs, others, upstream, None)

    specs = [tf.TensorSpec(inputs[0].shape[:1], COMPUTE[inputs[0].dtype.name])]
    return differentiable(forward, backward, inputs, others, specs)[0]
