"""The Tied & Reduced decoder for Keras: bit-equal to the core, tied for good, streamed, saved and served."""

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
from helpers import FLOATS, epsilon, run_python
from test_tensorflow import same
from transducer_loss.adapters.keras import GumbelGate, RNNTJoint, TiedReducedDecoder

B, T, U, F, H, V = 6, 10, 4, 5, 12, 7
FRAMES, LABELS = np.array([10, 1, 7, 5, 6, 10]), np.array([4, 0, 2, 1, 4, 3])
SIZES: dict[str, Any] = {"heads": 2, "context": 3}


def data() -> tuple[Any, Any]:
    """Features, 0 past the frames, as Masking wants them; labels, -1 past the last."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(B, T, F)).astype("f")
    targets = rng.integers(1, V, (B, U))
    for b in range(B):
        features[b, FRAMES[b] :] = 0
        targets[b, LABELS[b] :] = -1
    return features, targets


def model(**options: Any) -> keras.Model:
    """Of losses; its decoder and joint are its last layers."""
    features, targets = keras.Input((None, F)), keras.Input((None,), dtype="int32")
    encoder = keras.layers.Dense(H)(keras.layers.Masking()(features))
    joint = RNNTJoint(V, bias_initializer="random_normal")
    predictor = TiedReducedDecoder(joint, H, **{**SIZES, **options})(targets)
    return keras.Model([features, targets], joint(encoder, predictor, targets=targets))


def parts(of: keras.Model) -> tuple[TiedReducedDecoder, RNNTJoint]:
    return tuple(next(each for each in of.layers if isinstance(each, kind)) for kind in (TiedReducedDecoder, RNNTJoint))


def decoder(dtype: str = "float32", **options: Any) -> TiedReducedDecoder:
    made = TiedReducedDecoder(RNNTJoint(V, dtype=dtype), H, dtype=dtype, **{**SIZES, **options})
    made.build((None, None))
    return made


def matrices(of: TiedReducedDecoder) -> list[Any]:
    return [tf.convert_to_tensor(each).numpy() for each in (of.joint.weight, of.positions)]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.mixed_precision.set_global_policy("float32")


# What it computes.


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_training_is_the_core(dtype: str, graph: bool) -> None:
    """But for the dense layer and the normalisation, which are Keras's."""
    of, targets = decoder(dtype), data()[1]
    upstream = np.random.default_rng(1).normal(size=(B, U + 1, H))

    def step(targets: Any) -> Any:
        with tf.GradientTape() as tape:
            features = of(targets, training=True)
        return features, tape.gradient(features, of.trainable_variables, tf.cast(upstream, features.dtype))

    call = tf.function(step, input_signature=[tf.TensorSpec([None, None], tf.int64)]) if graph else step
    features, gradients = call(tf.constant(targets))
    average = tl.reduced_predictor(*matrices(of), targets, LABELS)
    with tf.GradientTape() as tape:
        x = tf.constant(average)
        tape.watch(x)
        expected = tf.nn.silu(of.norm(of.projection(x)))
    back = tape.gradient(expected, x, tf.cast(upstream, expected.dtype)).numpy()
    grads = tl.reduced_predictor_backward(back, *matrices(of), targets, LABELS)
    found = {each.path: gradient for each, gradient in zip(of.trainable_variables, gradients, strict=True)}
    if graph:  # of layers that TensorFlow may fuse
        np.testing.assert_allclose(np.asarray(features, "f"), np.asarray(expected, "f"), rtol=4 * epsilon(dtype), atol=4 * epsilon(dtype))
    else:
        assert same(features, expected.numpy())
        assert same(found[of.joint.weight.path], grads.embedding) and same(found[of.positions.path], grads.positions)
    assert found[of.joint.bias.path] is None and all(np.any(each) for path, each in found.items() if path != of.joint.bias.path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inference_is_the_same_but_for_rounding(dtype: str) -> None:
    targets = data()[1]
    for context in (1, 3, 6):
        of = decoder(dtype, context=context, positions_initializer="random_normal")
        for labels, lengths in ((targets, None), (np.where(targets < 0, 99, targets), LABELS), (targets[:, :0], None)):
            trained, found = (of(labels, target_lengths=lengths, training=training) for training in (True, False))
            assert found.shape == (B, labels.shape[1] + 1, H)
            np.testing.assert_allclose(found, trained, rtol=1e-10 if dtype == "float64" else 1e-3, atol=1e-4 * (dtype != "float64"))
        # Before projection and normalisation, to the last digits.
        exact = tl.reduced_predictor(*matrices(of), targets, LABELS)
        seen: list[Any] = []
        of.projection = lambda x, seen=seen: seen.append(x) or x
        of(targets)
        assert np.abs(seen[0] - exact).max() <= 8 * epsilon(dtype) * np.abs(exact).max()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy: str) -> None:
    keras.mixed_precision.set_global_policy(policy)
    of, targets = decoder(policy), data()[1]
    assert {each.dtype for each in of.trainable_variables} == {"float32"}
    trained, found = of(targets, training=True), of(targets)
    assert trained.dtype.name == found.dtype.name == policy.removeprefix("mixed_")
    np.testing.assert_allclose(np.asarray(trained, "f"), np.asarray(found, "f"), atol=0.05)
    first, _ = of.step(targets[:, 0])
    assert first.dtype == found.dtype
    np.testing.assert_allclose(np.asarray(first, "f"), np.asarray(found[:, 0], "f"), atol=0.05)


def test_labels_that_no_class_has_are_never_plausible() -> None:
    of = decoder(context=2)
    targets = np.array([[1, V, 2, 3], [1, -1, 2, 3], [1, 2, 3, 4]])
    found = of(targets, target_lengths=np.full(3, 4)).numpy()
    expected = np.zeros((3, 5), bool)
    expected[:2, 2:4] = True
    assert np.array_equal(np.isnan(found).all(-1), expected) and np.array_equal(np.isnan(found).any(-1), expected)
    with pytest.raises(ValueError, match=r"targets: expected labels in \[0, V = 7\), got 7 at index \(0, 1\)"):
        of(targets, target_lengths=np.full(3, 4), training=True)


def test_dropout_acts_in_training_alone() -> None:
    of, targets = decoder(dropout=0.5), np.random.default_rng(0).integers(0, V, (B, U))
    first, second = (of(targets, training=True).numpy()[:, 1:] for _ in range(2))  # row 0, of no labels, is 0
    assert not np.array_equal(first, second) and 0.3 < (first == 0).mean() < 0.7
    assert np.array_equal(of(targets), of(targets))


# The tie.


def test_both_gradients_add_up_in_one_variable() -> None:
    features, targets = data()
    of = model()
    prediction, joint = parts(of)
    assert sum(each is joint.weight for each in of.trainable_variables) == 1
    assert sum(each is joint.weight for each in of.variables) == 1
    with tf.GradientTape() as tape:
        losses = of([features, targets], training=True)
        total = tf.reduce_sum(losses * tf.constant([1.0, -2.0, 0.5, 1.0, 0.0, 3.0]))
    assert len(of.losses) == 1  # the joint's, though it is a layer of two
    found = dict(zip((each.path for each in of.trainable_variables), tape.gradient(total, of.trainable_variables), strict=True))

    encoder = next(each for each in of.layers if isinstance(each, keras.layers.Dense))(features).numpy()
    weight, positions = matrices(prediction)
    average = tl.reduced_predictor(weight, positions, targets, LABELS)
    with tf.GradientTape() as tape:
        x = tf.constant(average)
        tape.watch(x)
        predictor = tf.nn.silu(prediction.norm(prediction.projection(x)))
    _, grads = tl.joint_rnnt_loss(
        encoder, predictor.numpy(), weight, joint.bias.numpy(), targets, FRAMES, LABELS, weights=[1.0, -2.0, 0.5, 1.0, 0.0, 3.0]
    )
    back = tape.gradient(predictor, x, tf.constant(grads.predictor)).numpy()
    of_embedding = tl.reduced_predictor_backward(back, weight, positions, targets, LABELS)
    assert np.any(of_embedding.embedding) and np.any(grads.weight)
    np.testing.assert_allclose(found[joint.weight.path], of_embedding.embedding + grads.weight, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found[prediction.positions.path], of_embedding.positions, rtol=1e-3, atol=1e-4)


def test_a_joint_that_is_built() -> None:
    joint = RNNTJoint(V)
    encoder = np.zeros((2, 3, H), "f")
    joint(encoder, np.zeros((2, 1, H), "f"))
    weight = joint.weight
    of = TiedReducedDecoder(joint, H)
    assert joint(encoder, of(np.zeros((2, 0), int))).shape == (2, 3, 1, V)
    assert of.joint.weight is weight and any(each is weight for each in of.trainable_variables)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_fit_save_load(policy: str, tmp_path: Path) -> None:
    keras.mixed_precision.set_global_policy(policy)
    features, targets = data()
    of = model(dropout=0.1)
    of.compile(keras.optimizers.Adam(0.02))
    assert of.jit_compile is False
    history = of.fit([features, targets], batch_size=4, epochs=12, verbose=0).history["loss"]
    assert history[-1] < 0.8 * history[0]
    losses = of([features, targets])
    of.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(again([features, targets]), losses)
    prediction, joint = parts(again)
    assert prediction.joint is joint and len(again.trainable_variables) == len(of.trainable_variables)
    assert json.dumps(keras.layers.serialize(prediction)) == json.dumps(keras.layers.serialize(parts(of)[0]))
    joint.weight.assign(2 * joint.weight)
    assert np.array_equal(prediction.joint.weight, joint.weight)
    of.save_weights(tmp_path / "model.weights.h5")
    other = model(dropout=0.1)
    other.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(other([features, targets]), losses)


def test_what_makes_layers_one_by_one_makes_a_joint_of_its_own() -> None:
    """As the documentation says: not that it should."""
    prediction, joint = parts(keras.models.clone_model(model()))
    assert prediction.joint is not joint


def test_configuration() -> None:
    of = TiedReducedDecoder(RNNTJoint(V, dropout=0.5), H, heads=3, context=2, dropout=0.25, kernel_initializer="ones", name="decoder")
    again = keras.layers.deserialize(json.loads(json.dumps(keras.layers.serialize(of))))
    assert keras.layers.serialize(again) == keras.layers.serialize(of) and again.joint.dropout == 0.5
    again.build((None, None))
    assert again.positions.shape == (3, 2, H) and np.all(again.projection.kernel.numpy() == 1)
    # Drawn so that the average is about as large as an embedding.
    big = TiedReducedDecoder(RNNTJoint(200), 200)
    big.build((None, None))
    average = tl.reduced_predictor(*matrices(big), np.random.default_rng(0).integers(0, 200, (20, 30)), np.full(20, 30))[:, 5:]
    assert 0.5 < np.linalg.norm(average, axis=-1).mean() / np.linalg.norm(big.joint.weight.numpy(), axis=-1).mean() < 3


# Decoding.


@pytest.mark.parametrize("graph", [False, True])
def test_steps_are_rows(graph: bool) -> None:
    of = decoder("float64", context=3)
    targets = np.random.default_rng(1).integers(0, V, (B, 6))
    rows = of(targets).numpy()
    step = tf.function(of.step) if graph else of.step
    found, state = step(np.full(B, 99))  # not looked at
    assert np.array_equal(state, of.get_initial_state(B)) and np.array_equal(state, np.full((B, 3), -1))
    np.testing.assert_allclose(found, rows[:, 0], rtol=1e-12, atol=1e-14)
    counts = np.zeros(B, int)
    for turn in range(12):
        emits = (turn + np.arange(B)) % 2 == 0  # the others stay as they are
        labels = np.where(emits, targets[np.arange(B), np.minimum(counts, 5)], -1)
        found, state = step(tf.constant(labels), state)
        counts += emits
        np.testing.assert_allclose(found, rows[np.arange(B), counts], rtol=1e-12, atol=1e-14)
    assert np.array_equal(state, targets[:, -3:])
    features, _ = TiedReducedDecoder(RNNTJoint(V), H).step([0, 1])  # builds
    assert features.shape == (2, H)


def test_serves_without_this_package(tmp_path: Path) -> None:
    """A model of logits with a gate in its encoder, whose cost it adds, and a step of the decoder."""
    features, targets = data()
    inputs = [keras.Input((None, F)), keras.Input((None,), dtype="int32")]
    encoder = keras.layers.Masking()(inputs[0])
    gates = GumbelGate(costs=[1.0, 0.25])(keras.layers.Dense(2)(encoder))
    encoder = sum(gates[..., k : k + 1] * keras.layers.Dense(H)(encoder) for k in range(2))
    joint = RNNTJoint(V)
    prediction = TiedReducedDecoder(joint, H, **SIZES)
    of = keras.Model(inputs, {"logits": joint(encoder, prediction(inputs[1])), "gates": gates})
    archive = keras.export.ExportArchive()
    archive.track(of)
    archive.add_endpoint("serve", of.call, [tuple(tf.TensorSpec(each.shape, each.dtype) for each in inputs)])
    archive.add_endpoint("step", prediction.step, [tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, 3], tf.int32)])
    archive.write_out(tmp_path / "served", verbose=False)
    np.savez(tmp_path / "inputs.npz", features=features, targets=targets.astype("int32"))
    found = run_python(
        f"""
        import json, os, sys
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        sys.modules["transducer_loss"] = None  # an import of it raises
        import numpy as np, tensorflow as tf
        model = tf.saved_model.load({str(tmp_path / "served")!r})
        inputs = np.load({str(tmp_path / "inputs.npz")!r})
        out = model.serve((inputs["features"], inputs["targets"]))
        labels, state = inputs["targets"][:, 0], np.full((len(inputs["targets"]), 3), -1, "int32")
        graphs = [each.graph for endpoint in (model.serve, model.step) for each in endpoint.concrete_functions]
        names = {{op.type for graph in graphs for op in graph.get_operations()}}
        names |= {{node.op for graph in graphs for each in graph.as_graph_def().library.function for node in each.node_def}}
        print(json.dumps({{
            "logits": out["logits"].numpy().tolist(), "gates": out["gates"].numpy().tolist(),
            "step": model.step(labels, state)[0].numpy().tolist(),
            "python": sorted(name for name in names if "PyFunc" in name), "gather": any("Gather" in name for name in names),
        }}))
        """
    )
    expected = of([features, targets])
    for name in ("logits", "gates"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["step"], prediction.step(targets[:, 0], prediction.get_initial_state(B))[0], rtol=1e-4, atol=1e-5)
    assert found["python"] == [] and found["gather"]


# Errors.


def test_errors_teach() -> None:
    with pytest.raises(TypeError, match="joint: expected an RNNTJoint, got Dense"):
        TiedReducedDecoder(keras.layers.Dense(3), H)
    for name in ("features", "heads", "context"):
        with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
            TiedReducedDecoder(RNNTJoint(V), **{"features": H, **SIZES, name: 0})
    with pytest.raises(ValueError, match="dropout: expected a probability"):
        TiedReducedDecoder(RNNTJoint(V), H, dropout=1.0)
    joint = RNNTJoint(V)
    joint.build((None, None, 3), (None, None, 3))
    with pytest.raises(ValueError, match=r"features: expected H = 3 of the joint's weight \(V, H\), got 12"):
        TiedReducedDecoder(joint, H)(np.zeros((1, 2), int))
    with pytest.raises(ValueError, match="targets: expected two dimensions"):
        decoder()(np.zeros(3, int))
    for training in (False, True):
        with pytest.raises(tf.errors.InvalidArgumentError, match="targets: expected padding at the end alone"):
            decoder()(np.array([[-1, 2]]), training=training)
    with pytest.raises(TypeError, match=r"loss_options: expected some of blank, .*, got encoder_index"):
        RNNTJoint(V, loss_options={"encoder_index": [0]})
