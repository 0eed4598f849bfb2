"""warp-transducer's loss for TensorFlow by its own name: published vectors, and the call of TensorFlowASR."""

import inspect
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf

import transducer_loss as tl
from test_public_vectors import CASES, PRECISION
from transducer_loss.adapters.compat.warprnnt_tensorflow import rnnt_loss

every_vector = pytest.mark.parametrize("vector", [pytest.param(each, id=each["id"]) for each in CASES if each["kind"] in ("rnnt", "fastemit")])


def tensorflow_asr(logits: Any, labels: Any, label_length: Any, logit_length: Any, blank: int, **options: Any) -> Any:
    """The call in TensorFlowASR, within its tf.function, but for the cast to float32, which rounds the vectors."""
    if not tf.config.list_physical_devices("GPU"):
        logits = tf.nn.log_softmax(logits)
    return rnnt_loss(
        acts=logits, label_lengths=tf.cast(label_length, tf.int32), labels=tf.cast(labels, tf.int32),
        input_lengths=tf.cast(logit_length, tf.int32), blank_label=blank, **options,
    )  # fmt: skip


def of_logits(logits: Any, labels: Any, label_length: Any, logit_length: Any, blank: int, **options: Any) -> Any:
    return rnnt_loss(logits, labels, logit_length, label_length, blank, *options.values())


@every_vector
@pytest.mark.parametrize("call", [tensorflow_asr, of_logits])
def test_vectors(vector: dict[str, Any], call: Any) -> None:
    logits = tf.constant(vector["logits"], tf.float64)
    targets = np.array(vector["targets"], np.int32).reshape(len(logits), -1)
    options = {"fastemit_lambda": vector["fastemit_lambda"]} if vector["kind"] == "fastemit" else {}

    @tf.function
    def step(logits: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(logits)
            costs = call(logits, targets, vector["U_len"], vector["T_len"], vector["blank"], **options)
            total = tf.reduce_sum(costs)
        return costs, tape.gradient(total, logits)

    costs, gradient = step(logits)
    of_cost, of_gradient = PRECISION[vector["id"]]
    np.testing.assert_allclose((1 + vector.get("fastemit_lambda", 0.0)) * costs, vector["expected_cost"], rtol=0, atol=of_cost)
    if vector["expected_grads"] is None:
        return
    expected = np.array(vector["expected_grads"])
    if vector["grad_wrt"] == "log_probs":
        expected = expected - tf.nn.softmax(logits) * expected.sum(-1, keepdims=True)
        of_gradient *= 2  # an entry of the sum and the entry itself carry what was published
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=of_gradient)


def test_signature() -> None:
    parameters = inspect.signature(rnnt_loss).parameters
    assert list(parameters) == ["acts", "labels", "input_lengths", "label_lengths", "blank_label", "fastemit_lambda"]
    assert (parameters["blank_label"].default, parameters["fastemit_lambda"].default) == (0, 0.0)


def test_fastemit_scales_gradients_and_not_the_cost() -> None:
    rng = np.random.default_rng(0)
    logits = tf.constant(rng.normal(size=(2, 5, 4, 6)))
    arguments = (rng.integers(0, 6, (2, 3)), [5, 3], [3, 0])
    expected = tl.rnnt_loss(logits.numpy(), *arguments, fastemit_lambda=1.5)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        costs = rnnt_loss(logits, *arguments, 0, 1.5)
    assert np.array_equal(costs, expected[0]) and np.array_equal(costs, tl.rnnt_loss(logits.numpy(), *arguments)[0])
    assert np.array_equal(tape.gradient(costs, logits), expected[1])


def test_without_the_restrictions() -> None:
    """int64, bfloat16, no label at all, and padding beyond the longest."""
    logits = tf.cast(np.random.default_rng(0).normal(size=(2, 6, 4, 5)), tf.bfloat16)
    targets = tf.constant([[-1, -1, -1], [2, -1, -1]], tf.int64)
    costs = tf.function(rnnt_loss)(logits, targets, tf.constant([4, 5], tf.int64), tf.constant([0, 1], tf.int64))
    assert costs.shape == (2,) and costs.dtype == tf.float32
    assert np.array_equal(costs, tl.rnnt_loss(logits.numpy(), targets.numpy(), [4, 5], [0, 1])[0])


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"acts": tf.zeros((4, 3, 5))}, ValueError, "acts: expected 4 dimensions"),
        ({"labels": [[1, 9]]}, ValueError, r"labels: expected labels in \[0, V = 5\), got 9"),
        ({"labels": [[1.0, 2.0]]}, TypeError, "labels: expected integers"),
        ({"input_lengths": [5]}, ValueError, r"input_lengths: expected lengths in \[1, T = 4\], got 5"),
        ({"label_lengths": [3]}, ValueError, r"label_lengths: expected lengths in \[0, U = 2\], got 3"),
        ({"blank_label": 5}, ValueError, r"blank_label: expected a class in \[-5, 5\), got 5"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"acts": tf.zeros((1, 4, 3, 5)), "labels": [[1, 2]], "input_lengths": [4], "label_lengths": [2]}
    with pytest.raises(kind, match=f"^{message}"):
        rnnt_loss(**{**arguments, **wrong})
