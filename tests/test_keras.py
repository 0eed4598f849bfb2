"""The loss and the joint network for Keras 3 on TensorFlow: fit, masks, mixed precision, saving, and what is served elsewhere."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import pytest
import tensorflow as tf

import transducer_loss as tl
from helpers import FLOATS, numpy_dtype, run_python
from transducer_loss.adapters.keras import RNNTJoint, RNNTLoss
from transducer_loss.adapters.tensorflow import joint_rnnt_loss
from transducer_loss.joint import ACTIVATIONS

B, T, F, U, V, H = 6, 10, 5, 4, 7, 12
FRAMES, LABELS = np.array([10, 1, 7, 5, 6, 10]), np.array([4, 0, 2, 1, 4, 3])


def data() -> tuple[Any, Any, Any]:
    """Features, 0 past the frames, as Masking wants them; labels before each row; labels, -1 past the last."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(B, T, F)).astype("f")
    targets = rng.integers(1, V, (B, U))
    for b in range(B):
        features[b, FRAMES[b] :] = 0
        targets[b, LABELS[b] :] = -1
    return features, np.pad(np.maximum(targets, 0), ((0, 0), (1, 0))), targets


def models(joint: RNNTJoint) -> tuple[keras.Model, keras.Model]:
    """One of logits and one of losses, of the same layers."""
    features, before = keras.Input((None, F)), keras.Input((None,), dtype="int32")
    targets = keras.Input((None,), dtype="int32")
    encoder = keras.layers.Dense(H)(keras.layers.Masking()(features))  # tracing a GRU takes seconds
    predictor = keras.layers.Embedding(V, H)(before)
    return keras.Model([features, before], joint(encoder, predictor)), keras.Model(
        [features, before, targets], joint(encoder, predictor, targets=targets)
    )


def gradients(loss: Any, tape: tf.GradientTape, model: keras.Model) -> list[Any]:
    return [np.asarray(tf.convert_to_tensor(each)) for each in tape.gradient(loss, model.trainable_variables)]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.mixed_precision.set_global_policy("float32")


# The loss.


def masked(logits: Any, frames: Any = FRAMES) -> Any:
    tensor = tf.constant(logits)
    tensor._keras_mask = tf.sequence_mask(frames, T)
    return tensor


@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_cast(dtype: str) -> None:
    logits = np.random.default_rng(1).normal(size=(B, T, U + 1, V)).astype(numpy_dtype(dtype))
    targets = data()[2]
    expected, grad = tl.rnnt_loss(logits, targets, FRAMES, LABELS, fastemit_lambda=0.01)
    y_pred = masked(logits)
    with tf.GradientTape() as tape:
        tape.watch(y_pred)
        losses = RNNTLoss(reduction="none", fastemit_lambda=0.01)(targets, y_pred)
    assert losses.dtype.name == ("float64" if dtype == "float64" else "float32")
    assert np.array_equal(losses, expected)
    gradient = tape.gradient(losses, y_pred)
    assert gradient.dtype.name == dtype and np.array_equal(gradient.numpy().astype("float64"), grad.astype("float64"))


@pytest.mark.parametrize(("reduction", "weight", "expected"), [
    ("sum_over_batch_size", None, lambda x, w: x.mean()), ("sum_over_batch_size", 1, lambda x, w: (x * w).mean()),
    ("mean", 1, lambda x, w: (x * w).mean()), ("sum", 1, lambda x, w: (x * w).sum()), ("none", 1, lambda x, w: x * w),
    ("mean_with_sample_weight", 1, lambda x, w: (x * w).sum() / w.sum()),
])  # fmt: skip
def test_reductions(reduction: str, weight: Any, expected: Any) -> None:
    logits = np.random.default_rng(1).normal(size=(B, T, U + 1, V)).astype("f")
    losses = tl.rnnt_loss(logits, data()[2], FRAMES, LABELS)[0]
    weights = np.arange(B).astype("f")
    for sample_weight in (weights, weights[:, None])[: 1 if reduction == "none" else 2]:
        found = RNNTLoss(reduction=reduction)(data()[2], masked(logits), None if weight is None else sample_weight)
        np.testing.assert_allclose(found, expected(losses, weights), rtol=1e-6)


def test_without_a_mask_every_frame_is_real() -> None:
    logits = np.random.default_rng(1).normal(size=(B, T, U + 1, V)).astype("f")
    found = RNNTLoss(reduction="none").call(data()[2], tf.constant(logits))
    assert np.array_equal(found, tl.rnnt_loss(logits, data()[2], [T] * B, LABELS)[0])


def test_a_mask_may_be_required() -> None:
    logits, targets = np.zeros((B, T, U + 1, V), "f"), data()[2]
    loss = RNNTLoss.from_config(json.loads(json.dumps(RNNTLoss(require_mask=True).get_config())))
    assert np.array_equal(loss(targets, masked(logits)), RNNTLoss()(targets, masked(logits)))
    with pytest.raises(ValueError, match=r"y_pred: expected a Keras mask \(B, T\) with require_mask=True, got none"):
        loss(targets, keras.ops.add(masked(logits), 0))


@pytest.mark.parametrize("graph", [False, True])
def test_padding_elsewhere_is_an_error(graph: bool) -> None:
    logits = tf.zeros((1, 4, 3, V))
    holes, targets = tf.constant([[True, False, True, True]]), tf.constant([[1, 2]])

    def called(mask: Any, targets: Any) -> Any:
        y_pred = tf.identity(logits)
        y_pred._keras_mask = mask
        return RNNTLoss()(targets, y_pred)

    call = tf.function(called) if graph else called
    assert np.isfinite(call(tf.sequence_mask([2], 4), targets))
    with pytest.raises(tf.errors.InvalidArgumentError, match="mask: expected padding at the end alone"):
        call(holes, targets)
    with pytest.raises(tf.errors.InvalidArgumentError, match="y_true: expected padding at the end alone"):
        call(tf.sequence_mask([2], 4), tf.constant([[-1, 2]]))


# The joint.


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_logits_and_fused_loss_are_one(activation: str) -> None:
    """Of the layer's logits, by the reference's loss; this pins what every activation is."""
    rng = np.random.default_rng(2)
    encoder, predictor = rng.normal(size=(B, T, H)).astype("f"), rng.normal(size=(B, U + 1, H)).astype("f")
    joint = RNNTJoint(V, activation=activation, bias_initializer="random_normal")
    logits = joint(encoder, predictor)
    losses = joint(encoder, predictor, targets=data()[2], encoder_lengths=FRAMES)
    np.testing.assert_allclose(losses, tl.rnnt_loss(logits.numpy(), data()[2], FRAMES, LABELS)[0], rtol=1e-5)
    np.testing.assert_allclose(joint.losses, [losses.numpy().mean()], rtol=1e-6)
    weights = (joint.weight.numpy(), joint.bias.numpy())
    expected = tl.joint_rnnt_loss(encoder, predictor, *weights, data()[2], FRAMES, LABELS, activation=activation)[0]
    assert np.array_equal(losses, expected)


def test_both_models_have_one_gradient() -> None:
    features, before, targets = data()
    of_logits, of_losses = models(RNNTJoint(V, loss_options={"fastemit_lambda": 0.5, "blank": -1, "occupancy_floor": 0.0}))
    with tf.GradientTape() as tape:
        logits = of_logits([features, before])
        loss = RNNTLoss(fastemit_lambda=0.5, blank=-1)(targets, logits)
    one = gradients(loss, tape, of_logits)
    with tf.GradientTape() as tape:
        losses = of_losses([features, before, targets])
        total = of_losses.losses[0]
    other = gradients(total, tape, of_losses)
    assert losses.shape == (B,) and len(of_losses.losses) == 1
    np.testing.assert_allclose(total, loss, rtol=1e-6)
    np.testing.assert_allclose(losses, tl.rnnt_loss(logits.numpy(), targets, FRAMES, LABELS, blank=-1)[0], rtol=1e-6)
    for mine, theirs in zip(one, other, strict=True):
        assert np.any(mine)
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * np.abs(mine).max())


def test_losses_have_no_mask() -> None:
    features, before, targets = data()
    of_logits, of_losses = models(RNNTJoint(V))
    found = of_losses([features, before, targets])
    for losses, logits in ((of_losses.output, of_logits.output), (found, of_logits([features, before]))):
        assert losses._keras_mask is None and logits._keras_mask is not None
    of_losses.compile("sgd", loss=lambda _, losses: losses, run_eagerly=True)
    total = of_losses.test_on_batch([features, before, targets], np.zeros(B))
    np.testing.assert_allclose(total, 2 * found.numpy().mean(), rtol=1e-6)  # as compiled and as added


@pytest.mark.parametrize("shape", [(B,), (B, 1)])
def test_weights_of_utterances(shape: tuple[int, ...]) -> None:
    features, before, targets = data()
    joint = RNNTJoint(V)
    _, of_losses = models(joint)
    encoder, predictor, labels = joint.input[0], joint.input[1], of_losses.input[2]
    weight = keras.Input(shape[1:])
    weighted = keras.Model([*of_losses.input, weight], joint(encoder, predictor, targets=labels, sample_weight=weight))
    weights = np.array([1.0, 0.0, 1.0, 2.0, 0.5, -1.0], "f")
    inputs = [features, before, targets]
    losses = of_losses(inputs)
    assert np.array_equal(weighted([*inputs, weights.reshape(shape)]), losses)
    np.testing.assert_allclose(weighted.losses, [(losses * weights).numpy().mean()], rtol=1e-6)
    weighted.compile("sgd", run_eagerly=True)
    found = weighted.evaluate([*inputs, weights.reshape(shape)], batch_size=B, verbose=0)
    np.testing.assert_allclose(found, (losses * weights).numpy().mean(), rtol=1e-6)


def test_dropout_acts_in_training_alone() -> None:
    encoder, predictor = np.ones((2, 3, H), "f"), np.ones((2, 2, H), "f")
    joint = RNNTJoint(V, dropout=0.5)
    for options in ({}, {"targets": np.ones((2, 1), int)}):
        first, second = (joint(encoder, predictor, training=True, **options) for _ in range(2))
        assert not np.array_equal(first, second)
        assert np.array_equal(joint(encoder, predictor, **options), joint(encoder, predictor, **options))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_fit_save_load(policy: str, tmp_path: Path) -> None:
    keras.mixed_precision.set_global_policy(policy)
    features, before, targets = data()
    of_logits, of_losses = models(RNNTJoint(V, dropout=0.1, loss_options={"fastemit_lambda": 0.01}))
    of_losses.compile(keras.optimizers.Adam(0.02))
    assert of_losses.jit_compile is False
    history = of_losses.fit([features, before, targets], batch_size=4, epochs=12, verbose=0).history["loss"]
    assert history[-1] < 0.8 * history[0]

    logits = of_logits([features, before])
    assert logits.dtype.name == policy.removeprefix("mixed_")
    losses = of_losses([features, before, targets])
    assert losses.dtype == tf.float32
    exact = tl.rnnt_loss(logits.numpy(), targets, FRAMES, LABELS)[0]
    np.testing.assert_allclose(losses, exact, rtol=1e-6 if policy == "float32" else 2e-2)
    of_losses.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(again([features, before, targets]), losses)
    np.testing.assert_allclose(again.losses, losses.numpy().mean(), rtol=1e-6)
    assert again.layers[-1].get_config() == of_losses.layers[-1].get_config()


def test_fit_with_the_loss_of_logits(tmp_path: Path) -> None:
    features, before, targets = data()
    model, _ = models(RNNTJoint(V))
    model.compile(keras.optimizers.Adam(0.02), loss=RNNTLoss(fastemit_lambda=0.01))
    weights = np.array([1.0, 0.0, 1.0, 2.0, 0.5, 1.0])
    history = model.fit([features, before], targets, batch_size=B, epochs=8, verbose=0, sample_weight=weights).history["loss"]
    assert history[-1] < 0.8 * history[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    exact = tl.rnnt_loss(model([features, before]).numpy(), targets, FRAMES, LABELS)[0]
    np.testing.assert_allclose(again.evaluate([features, before], targets, sample_weight=weights, verbose=0), (exact * weights).mean(), rtol=1e-5)


def test_configuration() -> None:
    joint = RNNTJoint(V, activation="relu", use_bias=False, dropout=0.25, loss_options={"hat": True}, name="joint")
    again = RNNTJoint.from_config(json.loads(json.dumps(joint.get_config())))
    assert again.get_config() == joint.get_config()
    again.build((None, None, H), (None, None, H))
    assert again.weight.shape == (V, H) and again.bias is None
    loss = RNNTLoss(reduction="sum", delay_penalty=0.5)
    assert keras.losses.deserialize(keras.losses.serialize(loss)).get_config() == loss.get_config()


def test_serves_without_this_package(tmp_path: Path) -> None:
    features, before, targets = data()
    of_logits, of_losses = models(RNNTJoint(V, bias_initializer="random_normal"))
    of_losses([features, before, targets])
    scores = keras.ops.argmax(of_logits.output, axis=-1)
    served = keras.Model(of_logits.input, {"logits": of_logits.output, "greedy": scores})
    served.export(tmp_path / "served", verbose=False)
    np.savez(tmp_path / "inputs.npz", features=features, before=before.astype("int32"))
    found = run_python(
        f"""
        import json, os, sys
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        sys.modules["transducer_loss"] = None  # an import of it raises
        import numpy as np, tensorflow as tf
        model = tf.saved_model.load({str(tmp_path / "served")!r})
        inputs = np.load({str(tmp_path / "inputs.npz")!r})
        out = model.serve([inputs["features"], inputs["before"]])
        concrete = model.signatures["serving_default"]
        operations = {{op.type for op in concrete.graph.get_operations()}}
        operations |= {{node.op for function in concrete.graph.as_graph_def().library.function for node in function.node_def}}
        print(json.dumps({{
            "logits": out["logits"].numpy().tolist(), "greedy": out["greedy"].numpy().tolist(),
            "python": sorted(name for name in operations if "PyFunc" in name), "matmul": any("MatMul" in name for name in operations),
        }}))
        """
    )
    expected = of_logits([features, before]).numpy()
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=1e-6)
    assert found["greedy"] == expected.argmax(-1).tolist()
    assert found["python"] == [] and found["matmul"]


# Errors.


def test_xla_is_told_what_to_do() -> None:
    targets = data()[2]
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):  # the joint says so
        models(RNNTJoint(V))[0].compile("sgd", loss=RNNTLoss(), jit_compile=True)
    logits = keras.Sequential([keras.Input((T, U + 1, V)), keras.layers.Dense(V)])
    logits.compile("sgd", loss=RNNTLoss(), jit_compile=True)
    with pytest.raises(ValueError, match=r"compile\(\.\.\., jit_compile=False\)"):
        logits.fit(np.zeros((B, T, U + 1, V)), targets, verbose=0)


def test_errors_teach() -> None:
    with pytest.raises(ValueError, match="activation: expected one of 'tanh'"):
        RNNTJoint(V, activation="odd")
    with pytest.raises(ValueError, match="dropout: expected a probability"):
        RNNTJoint(V, dropout=1.0)
    with pytest.raises(ValueError, match="classes: expected 1 or more, got 0"):
        RNNTJoint(0)
    with pytest.raises(ValueError, match=r"predictor: expected shape \(B, U\+1, H\) of H = 3 as encoder, got \(1, 2, 4\)"):
        RNNTJoint(V)(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)))
    with pytest.raises(ValueError, match="y_true: expected two dimensions"):
        RNNTLoss()(np.zeros((1,), int), np.zeros((1, 2, 1, 3), "f"))
    with pytest.raises(TypeError, match=r"RNNTLoss: expected some of blank, .*, got blnk"):
        RNNTLoss(blnk=0)
    for name in ("blnk", "activation", "band", "classes", "dropout", "sparse"):
        with pytest.raises(TypeError, match=rf"loss_options: expected some of blank, .*, got {name}"):
            RNNTJoint(V, loss_options={name: 0})
    with pytest.raises(ValueError, match="fastemit_lambda: expected 0 or more, got -1"):
        RNNTLoss(fastemit_lambda=-1)
    with pytest.raises(ValueError, match=r"blank: expected a class in \[-7, 7\), got 7"):
        RNNTJoint(V, loss_options={"blank": 7})


def test_keyword_names_are_those_of_the_function() -> None:
    """The layer passes its options on by name."""
    rest = (np.ones((1, 1), int), [2], [1])
    inputs = [tf.ones(shape) for shape in ((1, 2, H), (1, 2, H), (V, H))]
    options = {"topology": "modified", "workspace": "1MiB", "infeasible": "zero", "delay_penalty": 0.5}
    joint = RNNTJoint(V, use_bias=False, kernel_initializer="ones", loss_options=options)
    assert np.array_equal(joint(*inputs[:2], targets=rest[0]), joint_rnnt_loss(*inputs, None, *rest, **options))
