"""The gate of Amortized Networks for Keras: its noise, its hard gates and costs are the core's; fit, schedules, saving."""

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
from helpers import FLOATS, epsilon, numpy_dtype
from test_tensorflow import same
from transducer_loss.adapters.keras import GumbelGate
from transducer_loss.arrays import COMPUTE

B, T, K = 4, 9, 3
FRAMES = np.array([9, 1, 5, 3])
COSTS = [1.0, 0.25, 2.5]


def logits(dtype: str = "float32") -> Any:
    """With NaN in the padding, a branch ruled out, a tie, and a frame without a branch."""
    x = np.random.default_rng(0).normal(0, 2, (B, T, K))
    x[0, 0, 2], x[0, 1], x[0, 2, 1:], x[2, 1] = -np.inf, 0.5, 7.0, -np.inf
    x[np.arange(T) >= FRAMES[:, None]] = np.nan
    return x.astype(numpy_dtype(dtype))


def seed_of(gate: GumbelGate) -> int:
    """Of the next step."""
    first, step = gate.seed_generator.state.numpy().tolist()
    return first * 2**32 + step


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.mixed_precision.set_global_policy("float32")


def called(gate: GumbelGate, x: Any, graph: bool = False, **options: Any) -> Any:
    """Gates, added losses, and gradients by the logits of a weighted sum of the gates and of the losses."""
    upstream = np.random.default_rng(1).normal(size=x.shape)

    def step(x: Any) -> Any:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            gates = gate(x, **options)
            losses = list(gate.losses)
        by_gates = tape.gradient(gates, x, tf.cast(upstream, gates.dtype))
        return gates, losses, by_gates, [tape.gradient(each, x) for each in losses]

    unknown = tf.TensorSpec([None, None, x.shape[-1]], numpy_dtype(x.dtype.name))
    return upstream, *(tf.function(step, input_signature=[unknown]) if graph else step)(tf.constant(x))


# Training.


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_training_is_the_core(dtype: str, hard: bool, graph: bool) -> None:
    gate, x = GumbelGate(temperature=0.75, hard=hard, seed=2**33 + 5, dtype=dtype), logits(dtype)
    drawing = {"temperature": 0.75, "seed": seed_of(gate)}
    upstream, gates, losses, gradient, _ = called(gate, x, graph, lengths=FRAMES, training=True)
    assert same(gates, tl.gumbel_gate(x, FRAMES, hard=hard, **drawing)) and losses == []
    assert same(gradient, tl.gumbel_gate_backward(upstream.astype(x.dtype), x, FRAMES, **drawing))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_cost_is_the_core(dtype: str, graph: bool) -> None:
    x = logits(dtype)
    x[2, 1] = 0
    gate = GumbelGate(costs=COSTS, cost_weight=-0.5, dtype=dtype)
    seed = seed_of(gate)
    _, gates, (loss,), _, (gradient,) = called(gate, x, graph, lengths=FRAMES, training=True)
    cost, by_gates = tl.amortized_cost(gates.numpy(), COSTS, FRAMES, weights=np.full(B, -0.5 / B))
    np.testing.assert_allclose(loss, -0.5 * cost.mean(), rtol=1e-6)
    assert loss.dtype.name == COMPUTE[dtype]
    assert same(gradient, tl.gumbel_gate_backward(by_gates, x, FRAMES, seed=seed)) and np.any(gradient)


def test_noise_is_that_of_the_seed_and_step() -> None:
    x, gate = logits(), GumbelGate(seed=3)
    steps = [gate(x, lengths=FRAMES, training=True).numpy() for _ in range(3)]
    assert not np.array_equal(steps[0], steps[1], equal_nan=True) and not np.array_equal(steps[1], steps[2], equal_nan=True)
    twin, other, function = GumbelGate(seed=3), GumbelGate(seed=4), GumbelGate(seed=3)
    assert all(np.array_equal(twin(x, lengths=FRAMES, training=True), each, equal_nan=True) for each in steps)
    assert not np.array_equal(other(x, lengths=FRAMES, training=True), steps[0], equal_nan=True)
    call = tf.function(lambda x: function(x, lengths=FRAMES, training=True))
    assert all(np.array_equal(call(x), each, equal_nan=True) for each in steps)
    # Without a seed it is that of keras.utils.set_random_seed, for each layer another.
    drawn = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        drawn.append([GumbelGate()(x, lengths=FRAMES, training=True).numpy() for _ in range(2)])
    assert np.array_equal(drawn[0][0], drawn[1][0], equal_nan=True) and not np.array_equal(*drawn[0], equal_nan=True)


# Inference.


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_inference_is_hard_and_silent(dtype: str, graph: bool) -> None:
    x = logits(dtype)
    gate = GumbelGate(temperature=0.75, costs=COSTS, cost_weight=2.0, dtype=dtype)
    before = seed_of(gate)
    _, gates, (loss,), gradient, _ = called(gate, x, graph, lengths=FRAMES)
    expected = tl.gumbel_gate(x, FRAMES, hard=True, noise=False, temperature=0.75)
    assert same(gates, expected) and np.isnan(gates[2, 1].numpy().astype("f")).all()
    assert gradient is None and seed_of(gate) == before and np.isnan(loss)
    x[2, 1] = 0
    _, gates, (loss,), *_ = called(gate, x, graph, lengths=FRAMES)
    expected = tl.amortized_cost(gates.numpy(), COSTS, FRAMES)[0].mean()
    np.testing.assert_allclose(loss, 2 * expected, rtol=4 * epsilon(COMPUTE[dtype]))
    assert loss.dtype.name == COMPUTE[dtype]


def test_lengths_are_those_of_the_mask() -> None:
    x = np.where(np.isnan(logits()), 0, logits())
    x[2, 1] = 0
    for training in (False, True):
        masked = tf.constant(x)
        masked._keras_mask = tf.sequence_mask(FRAMES, T)
        one, other = GumbelGate(seed=0, costs=COSTS), GumbelGate(seed=0, costs=COSTS)
        gates = one(masked, training=training)
        assert np.array_equal(gates, other(x, lengths=FRAMES, training=training))
        assert np.array_equal(one.losses, other.losses)
        assert np.array_equal(gates._keras_mask, masked._keras_mask)
        assert not np.any(gates[1, 1:]) and np.any(GumbelGate()(x, training=training)[1, 1:])
    holes = tf.constant(x)
    holes._keras_mask = tf.constant([[False] + [True] * (T - 1)] * B)
    with pytest.raises(tf.errors.InvalidArgumentError, match="mask: expected padding at the end alone"):
        GumbelGate()(holes)


# In a model.


def model(**options: Any) -> keras.Model:
    """Two branches, of which the second costs little and can do what is asked as well."""
    inputs = keras.Input((None, 4))
    features = keras.layers.Masking()(inputs)
    gates = GumbelGate(**options)(keras.layers.Dense(2)(features))
    branches = [keras.layers.Dense(1)(features) for _ in range(2)]
    return keras.Model(inputs, sum(gates[..., k : k + 1] * branches[k] for k in range(2)))


def gate_of(of: keras.Model) -> GumbelGate:
    return next(each for each in of.layers if isinstance(each, GumbelGate))


def data() -> tuple[Any, Any]:
    x = np.random.default_rng(5).normal(size=(B, T, 4)).astype("f")
    x[np.arange(T) >= FRAMES[:, None]] = 0
    return x, x.sum(-1, keepdims=True)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_fit_save_load(policy: str, tmp_path: Path) -> None:
    keras.mixed_precision.set_global_policy(policy)
    of, (x, y) = model(costs=[1.0, 0.1], cost_weight=5.0, hard=True, seed=1), data()
    of.compile(keras.optimizers.Adam(0.1), loss="mse")
    assert of.jit_compile is False
    gate, temperatures = gate_of(of), []

    def cool(epoch: int, logs: Any) -> None:
        gate.temperature.assign(0.9**epoch)
        temperatures.append(float(gate.temperature))

    before = of.evaluate(x, y, verbose=0)
    of.fit(x, y, batch_size=B, epochs=30, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_epoch_begin=cool)])
    after = of.evaluate(x, y, verbose=0)
    assert after < before and temperatures[-1] < 0.1
    of(x)
    np.testing.assert_allclose(of.losses, [0.5], rtol=1e-3)  # everything takes the cheap branch
    assert np.asarray(of(x)).dtype == ("float16" if policy == "mixed_float16" else "float32")

    of.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(again(x), of(x)) and np.array_equal(again.losses, of.losses)
    assert gate_of(again).get_config() == gate.get_config()
    assert float(gate_of(again).temperature) == temperatures[-1]


def test_the_temperature_acts() -> None:
    """In a graph that is traced once."""
    gate, x = GumbelGate(seed=0, dtype="float64"), logits("float64")
    call = tf.function(lambda x: gate(x, lengths=FRAMES, training=True))
    for temperature in (1.0, 0.25, 4.0):
        gate.temperature.assign(temperature)
        seed = seed_of(gate)
        assert same(call(tf.constant(x)), tl.gumbel_gate(x, FRAMES, temperature=temperature, seed=seed))
    assert call.experimental_get_tracing_count() == 1
    gate.temperature.assign(0.0)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"temperature: expected more than 0, got 0\.0"):
        call(tf.constant(x))


def test_configuration() -> None:
    gate = GumbelGate(temperature=2.0, hard=True, costs=np.array(COSTS), cost_weight=0.1, seed=7, name="gate")
    gate.temperature.assign(0.5)
    again = GumbelGate.from_config(json.loads(json.dumps(gate.get_config())))
    assert again.get_config() == gate.get_config()
    assert float(again.temperature) == 2.0 and again.trainable_variables == []


# Errors.


def test_errors_teach() -> None:
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"temperature: expected more than 0, got {temperature}"):
            GumbelGate(temperature=temperature)
    with pytest.raises(TypeError, match="costs: expected a number, got str"):
        GumbelGate(costs=["cheap"])
    with pytest.raises(ValueError, match="cost_weight: expected a finite number"):
        GumbelGate(cost_weight=np.inf)
    with pytest.raises(ValueError, match=r"costs: expected K = 3 numbers as logits \(B, T, K\), got \[1.0\]"):
        GumbelGate(costs=[1.0])(logits())
    with pytest.raises(ValueError, match=r"logits: expected 3 dimensions \(B, T, K\), got shape \(4, 3\)"):
        GumbelGate()(np.zeros((4, 3), "f"))
    with pytest.raises(ValueError, match=r"lengths: expected lengths in \[1, T = 9\], got 10"):
        GumbelGate()(logits(), lengths=[10, 1, 1, 1], training=True)
