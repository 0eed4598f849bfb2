"""The losses for TensorFlow, eager and in a tf.function: bit-equal to the core, and all that a tape and a graph may do."""

import gc
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf

import transducer_loss as tl
from helpers import FLOATS, TOPOLOGIES, Batch, numpy_dtype, random_batch, run_python
from transducer_loss import joint_loss, logits_loss, reference, tiling
from transducer_loss.adapters import tensorflow as tftl
from transducer_loss.adapters.tensorflow import (
    gather_predictor,
    joint_rnnt_loss,
    labels_in,
    prune,
    rnnt_loss,
    sample_classes,
    samplewise_rnnt_loss,
    simple_rnnt_loss,
)
from transducer_loss.adapters.tensorflow import graph as tensorflow_graph
from transducer_loss.adapters.tensorflow import logits as tensorflow_logits
from transducer_loss.arrays import COMPUTE, as_array
from transducer_loss.check import budgets

WEIGHTS = np.array([1.0, -2.5, 0.0, 0.375])
FRAMES, LABELS = np.array([9, 1, 7, 5]), np.array([4, 0, 2, 3])
T, U, V, H = 9, 4, 11, 6
MESSAGE = "cannot be differentiated twice"

WAYS = ("eager", "function", "unknown sizes")
of_each_way = pytest.mark.parametrize("way", WAYS)
of_each_dtype = pytest.mark.parametrize("dtype", FLOATS)


def batch(dtype: str = "float32", seed: int = 0) -> Batch:
    """Ragged logits, with an utterance of one frame and no labels, and with NaN and -1 in the padding."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (4, T, U + 1, V))
    targets = rng.integers(0, V, (4, U + 1))
    for b, (frames, labels) in enumerate(zip(FRAMES, LABELS, strict=True)):
        logits[b, frames:] = logits[b, :, labels + 1 :] = np.nan
        targets[b, labels:] = -1
    return Batch(logits.astype(numpy_dtype(dtype)), targets, FRAMES, LABELS, -3)


def without_nan(array: Any) -> Any:
    return np.where(np.isnan(array.astype("float64")), array.dtype.type(0), array)


def joint_inputs(dtype: str = "float32", seed: int = 0, bias: bool = True) -> list[Any]:
    """Encoder, predictor, weight, bias; NaN in the padding."""
    rng = np.random.default_rng(seed)
    encoder, predictor, weight, offset = (rng.normal(size=size) for size in ((4, T, H), (4, U + 1, H), (V, H), (V,)))
    for b, (frames, labels) in enumerate(zip(FRAMES, LABELS, strict=True)):
        encoder[b, frames:] = predictor[b, labels + 1 :] = np.nan
    arrays = [each.astype(numpy_dtype(dtype)) for each in (encoder, predictor, weight, offset)]
    return arrays if bias else [*arrays[:3], None]


def tensors_of(arrays: list[Any]) -> list[Any]:
    return [None if array is None else tf.constant(array) for array in arrays]


def in_way(way: str, function: Callable[..., Any], *tensors: Any) -> Any:
    """Results of a function of tensors."""
    if way == "eager":
        return function(*tensors)
    if way == "function":
        return tf.function(function)(*tensors)
    unknown = [tf.TensorSpec([None] * (each.shape.rank - 1) + [each.shape[-1] if each.dtype.is_floating else None], each.dtype) for each in tensors]
    return tf.function(function, input_signature=unknown)(*tensors)


def gradients_of(loss_of: Callable[..., Any], *, persistent: bool = False) -> Callable[..., Any]:
    """Losses of tensors, and gradients of their sum, weighted."""

    def called(*tensors: Any) -> Any:
        there = [each for each in tensors if each.dtype.is_floating]
        with tf.GradientTape(persistent=persistent) as tape:
            tape.watch(there)
            loss = loss_of(*tensors)
        gradients = [tape.gradient(loss, there, tf.cast(WEIGHTS, loss.dtype)) for _ in range(1 + persistent)]
        return (loss, *gradients)

    return called


def later(inputs: list[Any], targets: Any, weights: Any = WEIGHTS, **options: Any) -> tuple[Any, list[Any]]:
    """The core's losses and gradients, made by a pass two of its own, as frameworks do that know the weights late."""
    defaults = {"blank": 0, "topology": "regular", "fastemit_lambda": 0.0, "delay_penalty": 0.0, "hat": False, "infeasible": "inf"}
    of = joint_loss.problem(*inputs, targets, FRAMES, LABELS, **{**defaults, **options})
    done = joint_loss.forward(of, later=True)
    sums = joint_loss.backward(of, done, logits_loss.weights_of(of, weights)).native
    return done.native, [None if each is None else each.astype(inputs[0].dtype) for each in sums]


def same(actual: Any, expected: Any) -> bool:
    """Whether dtype and bits are those of the core."""
    array = tf.convert_to_tensor(actual).numpy()
    return array.dtype == expected.dtype and np.array_equal(array.astype("float64"), np.asarray(expected, "float64"), equal_nan=True)


# Values and gradients.


@of_each_way
@of_each_dtype
def test_logits_as_the_core(dtype: str, way: str) -> None:
    of = batch(dtype)
    loss, grad = tl.rnnt_loss(*of.arguments, blank=of.blank, weights=WEIGHTS)
    call = gradients_of(lambda *tensors: rnnt_loss(*tensors, blank=of.blank), persistent=True)
    found, (first,), (second,) = in_way(way, call, *map(tf.constant, of.arguments))
    assert same(found, loss) and same(first, grad) and same(second, grad)


@of_each_way
@of_each_dtype
def test_joint_as_the_core(dtype: str, way: str) -> None:
    inputs, of = joint_inputs(dtype), batch()
    loss, grads = later(inputs, of.targets, blank=of.blank)
    call = gradients_of(lambda *tensors: joint_rnnt_loss(*tensors, blank=of.blank), persistent=True)
    integers = [tf.constant(each, tf.int32) for each in (of.targets, FRAMES, LABELS)]
    found, first, second = in_way(way, call, *tensors_of(inputs), *integers)
    assert same(found, loss)
    assert len(first) == 4 and all(map(same, first, grads)) and all(map(same, second, grads))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_within_the_error_budget_of_the_reference(dtype: str) -> None:
    of, inputs = batch(dtype), joint_inputs(dtype)
    integers = (of.targets, of.frames, of.labels)
    exact_loss, exact_grad = reference.rnnt_loss(of.logits.astype("float64"), *integers, blank=of.blank, weights=WEIGHTS)
    wide = [each.astype("float64") for each in inputs]
    exact = reference.joint_rnnt_loss(*wide, *integers, blank=of.blank, weights=WEIGHTS)
    one = gradients_of(lambda x: rnnt_loss(x, *integers, blank=of.blank))(tf.constant(of.logits))
    other = gradients_of(lambda *tensors: joint_rnnt_loss(*tensors, *integers, blank=of.blank, occupancy_floor=0.0))(*tensors_of(inputs))
    for name, found, expectations in (("rnnt_loss", one, (exact_loss, exact_grad)), ("joint_rnnt_loss", other, (exact[0], *exact[1]))):
        of_loss, of_gradient = budgets(name, dtype, "cpu")
        for i, (actual, expected) in enumerate(zip((found[0], *found[1]), expectations, strict=True)):
            budget = of_gradient if i else of_loss
            assert np.linalg.norm(np.asarray(actual, "float64") - expected) <= budget * np.linalg.norm(expected)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("seed", range(4))
def test_random_batches(topology: str, seed: int) -> None:
    of = random_batch(np.random.default_rng(seed), FLOATS[seed], topology)
    loss, grad = tl.rnnt_loss(*of.arguments, blank=of.blank, topology=topology)
    with tf.GradientTape() as tape:
        x = tf.Variable(of.logits)
        found = rnnt_loss(x, of.targets.tolist(), of.frames.tolist(), of.labels.tolist(), blank=of.blank, topology=topology)
        total = tf.reduce_sum(found)
    assert same(found, loss) and same(tape.gradient(total, x), grad)


@pytest.mark.parametrize("options", [
    {"topology": "constrained", "fastemit_lambda": 0.25}, {"topology": "modified", "delay_penalty": -0.125}, {"hat": True, "blank": 0},
    {"normalized": True}, {"infeasible": "zero", "topology": "modified"},
], ids=str)  # fmt: skip
def test_options_reach_the_core(options: dict[str, Any]) -> None:
    of = batch("float64")
    targets = np.where(of.targets == 0, 1, of.targets)
    logits = of.logits - np.logaddexp.reduce(without_nan(of.logits), axis=-1, keepdims=True) if "normalized" in options else of.logits
    loss, grad = tl.rnnt_loss(logits, targets, of.frames, of.labels, **options, weights=WEIGHTS)
    found, (gradient,) = tf.function(gradients_of(lambda x: rnnt_loss(x, targets, of.frames, of.labels, **options)))(tf.constant(logits))
    assert same(found, loss) and same(gradient, grad)
    if "normalized" in options:
        return
    loss, grads = later(joint_inputs(), targets, **options)
    call = gradients_of(lambda *tensors: joint_rnnt_loss(*tensors, targets, FRAMES, LABELS, **options))
    found, gradients = tf.function(call)(*tensors_of(joint_inputs()))
    assert same(found, loss) and all(map(same, gradients, grads))


@pytest.mark.parametrize("options", [
    {"activation": "gelu"}, {"dropout": 0.25, "seed": 7}, {"occupancy_floor": 0.0}, {"bias": None}, {"workspace": 10_000},
], ids=str)  # fmt: skip
def test_options_of_the_joint(options: dict[str, Any]) -> None:
    inputs, of = joint_inputs(bias="bias" not in options), batch()
    options.pop("bias", None)
    if "workspace" in options:  # what is saved of several groups is one tensor
        defaults = {"blank": 0, "topology": "regular", "fastemit_lambda": 0.0, "delay_penalty": 0.0, "hat": False, "infeasible": "inf"}
        assert len(tiling.plan(joint_loss.problem(*inputs, of.targets, FRAMES, LABELS, **defaults, **options)).groups) > 1
    loss, grads = later(inputs, of.targets, **options)

    def loss_of(*tensors: Any) -> Any:
        return joint_rnnt_loss(*tensors[:3], tensors[3] if len(tensors) > 3 else None, of.targets, FRAMES, LABELS, **options)

    for way in ("eager", "function"):
        found, gradients = in_way(way, gradients_of(loss_of), *(each for each in tensors_of(inputs) if each is not None))
        assert same(found, loss)
        assert len(gradients) == (3 if inputs[3] is None else 4)
        assert all(map(same, gradients, grads))


def test_packed_logits() -> None:
    of = batch()
    packed = of.logits[of.real]
    loss, grad = tl.rnnt_loss(packed, of.targets, of.frames, of.labels, weights=WEIGHTS)
    found, (gradient,) = tf.function(gradients_of(lambda x: rnnt_loss(x, of.targets, of.frames, of.labels)))(tf.constant(packed))
    assert same(found, loss) and same(gradient, grad)


@pytest.mark.parametrize("name", ["logits", "joint", "simple"])
def test_not_finite(name: str) -> None:
    """Whatever comes back to an utterance whose loss is NaN, its gradient is 0."""
    loss_of, array = cases()[name]
    array = array.copy()
    array[0, 0] = np.nan
    x = tf.constant(array)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = loss_of(x)
        total = tf.reduce_sum(loss**2)
    gradient = tape.gradient(total, x)
    assert np.isnan(loss[0]) and np.isfinite(loss[1:]).all()
    assert not np.any(gradient[0]) and np.isfinite(gradient).all() and np.any(gradient[2])


# The tape and the graph.


def cases() -> dict[str, tuple[Callable[[Any], Any], Any]]:
    of = batch()
    inputs = joint_inputs()
    return {
        "logits": (lambda x: rnnt_loss(x, of.targets, FRAMES, LABELS), of.logits),
        "joint": (lambda x: joint_rnnt_loss(x, *tensors_of(inputs[1:]), of.targets, FRAMES, LABELS), inputs[0]),
        "simple": (lambda x: simple_rnnt_loss(x, tf.zeros((4, U + 1, V)), of.targets, FRAMES, LABELS)[0], np.zeros((4, T, V), "f")),
    }


@pytest.mark.parametrize("name", ["logits", "joint", "simple"])
def test_second_order_raises(name: str) -> None:
    loss_of, array = cases()[name]
    x = tf.constant(array)

    def penalty(x: Any, of: Callable[..., Any]) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = of(x)
            size = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(size, x)

    with pytest.raises(RuntimeError, match=MESSAGE):
        penalty(x, loss_of)
    with pytest.raises(tf.errors.OpError, match=MESSAGE):
        penalty(x, tf.function(loss_of))
    with pytest.raises(tf.errors.OpError, match=MESSAGE):
        tf.function(lambda x: penalty(x, loss_of))(x)
    with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as forward, pytest.raises(RuntimeError, match="nor in forward mode"):
        forward.jvp(loss_of(x))


@pytest.mark.parametrize("name", ["logits", "joint", "simple"])
def test_a_second_tape_that_asks_for_nothing(name: str) -> None:
    """Around a tf.function, for which TensorFlow draws graphs of second order under two tapes, or a persistent one."""
    loss_of, array = cases()[name]
    function, x = tf.function(loss_of), tf.constant(array)
    _, (expected,) = gradients_of(loss_of)(x)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(x)
        _, (found,) = gradients_of(function)(x)
        loss = function(x)
    assert same(found, expected.numpy())
    assert same(outer.gradient(loss, x, tf.constant(WEIGHTS, tf.float32)), expected.numpy())


@of_each_way
def test_upstream_of_a_gather_and_none(way: str) -> None:
    loss_of, array = cases()["logits"]

    def chosen(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.gather(loss_of(x), [1, 3, 3]))  # whose gradient is of IndexedSlices
        return tape.gradient(loss, x)

    of = batch()
    _, grad = tl.rnnt_loss(of.logits, of.targets, FRAMES, LABELS, weights=[0.0, 1.0, 0.0, 2.0])
    assert same(in_way(way, chosen, tf.constant(array)), grad)


def test_in_loops_and_tf_gradients() -> None:
    loss_of, array = cases()["joint"]

    @tf.function
    def total(x: Any) -> Any:
        sums = tf.zeros(4)
        for i in tf.range(3):
            sums += loss_of(x * tf.cast(i + 1, x.dtype))
        return sums

    @tf.function
    def by_graph(x: Any) -> Any:
        return tf.gradients(loss_of(x), x, tf.constant(WEIGHTS, tf.float32))[0]

    x = tf.constant(array)
    found, (gradient,) = gradients_of(total)(x)
    parts = [gradients_of(lambda x, i=i: loss_of(x * i))(x) for i in (1.0, 2.0, 3.0)]
    np.testing.assert_allclose(found, sum(loss for loss, _ in parts), rtol=1e-6)
    np.testing.assert_allclose(gradient, sum(gradients[0] for _, gradients in parts), rtol=1e-5, atol=1e-6)
    assert same(by_graph(x), gradients_of(loss_of)(x)[1][0].numpy())


def test_static_shapes_are_kept() -> None:
    of, inputs = batch("bfloat16"), joint_inputs()
    shapes: dict[str, Any] = {}

    @tf.function
    def traced(x: Any, encoder: Any, lengths: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch((x, encoder))
            shapes["logits"] = rnnt_loss(x, of.targets, lengths, LABELS)
            shapes["joint"] = joint_rnnt_loss(encoder, *tensors_of(inputs[1:]), of.targets, lengths, LABELS)
            total = tf.reduce_sum(shapes["logits"]) + tf.reduce_sum(shapes["joint"])
        shapes["gradients"] = tape.gradient(total, [x, encoder])
        shapes["band"] = prune(simple_rnnt_loss(encoder, tf.zeros((4, U + 1, H)), of.targets % H, lengths, LABELS)[1], lengths, LABELS)
        shapes["classes"] = sample_classes(tf.constant(of.targets[:, :U]), LABELS, vocab_size=100, num_samples=3)
        return total

    traced.get_concrete_function(
        tf.TensorSpec([4, None, U + 1, V], tf.bfloat16), tf.TensorSpec([4, T, H], tf.float32), tf.TensorSpec([4], tf.int32)
    )
    assert shapes["logits"].shape == shapes["joint"].shape == (4,)
    assert shapes["logits"].dtype == tf.float32
    assert [each.shape.as_list() for each in shapes["gradients"]] == [[4, None, U + 1, V], [4, T, H]]
    assert shapes["gradients"][0].dtype == tf.bfloat16
    assert (shapes["band"].first.shape, shapes["band"].width.shape) == ((4, T), ())
    assert shapes["classes"].ids.shape == (1 + 4 * U + 3,)


@of_each_way
def test_loss_of_no_tape(way: str) -> None:
    of = batch()
    assert same(in_way(way, lambda x: rnnt_loss(x, of.targets, FRAMES, LABELS), tf.constant(of.logits)), tl.rnnt_loss(of.logits, of.targets, FRAMES, LABELS)[0])


def test_no_gradients_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("pass two")

    monkeypatch.setattr(joint_loss, "backward", never)
    monkeypatch.setattr(logits_loss, "backward", never)
    for loss_of, array in list(cases().values())[:2]:
        for way in WAYS:
            in_way(way, loss_of, tf.constant(array))
        with tf.GradientTape() as tape:  # a tape alone does not ask
            x = tf.Variable(array)
            loss = loss_of(x)
        with pytest.raises(AssertionError, match="pass two"):
            tape.gradient(loss, x)


def test_threads_share_a_function() -> None:
    """What the forward pass saved is carried by the graph: runs side by side do not meet."""
    function = tf.function(gradients_of(lambda x: rnnt_loss(x, batch().targets, FRAMES, LABELS)))
    arrays = [batch(seed=seed).logits for seed in range(6)]
    function(tf.constant(arrays[0]))
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        for _ in range(5):
            found[seed] = function(tf.constant(arrays[seed]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, array in enumerate(arrays):
        loss, grad = tl.rnnt_loss(array, batch().targets, FRAMES, LABELS, weights=WEIGHTS)
        assert same(found[seed][0], loss) and same(found[seed][1][0], grad)


def test_xla_is_told_what_to_do() -> None:
    loss_of, array = cases()["logits"]
    x = tf.constant(array)
    with pytest.raises(ValueError, match=r"XLA: expected a tf.function without jit_compile=True.*jit_compile=False"):
        tf.function(loss_of, jit_compile=True)(x)
    with pytest.raises(ValueError, match="XLA"):
        tf.function(gradients_of(loss_of), jit_compile=True)(x)
    plain = tf.function(loss_of)
    plain(x)
    with pytest.raises(tf.errors.InvalidArgumentError, match="EagerPyFunc"):  # as the docs say
        tf.function(lambda x: plain(x), jit_compile=True)(x)
    inner = tf.function(lambda x: 2 * x, jit_compile=True)
    assert same(tf.function(lambda x: loss_of(inner(x)))(x), tl.rnnt_loss(2 * array, batch().targets, FRAMES, LABELS)[0])


# Memory.


@of_each_dtype
def test_no_copies(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = batch(dtype)
    read, written = [], []
    problem, backward = logits_loss.problem, logits_loss.backward

    def spied_problem(*arguments: Any, **options: Any) -> Any:
        made = problem(*arguments, **options)
        read.append((made.logits.ctypes.data, made.targets.array.ctypes.data))
        return made

    def spied_backward(*arguments: Any, **options: Any) -> Any:
        written.append(backward(*arguments, **options))
        return written[-1]

    monkeypatch.setattr(logits_loss, "problem", spied_problem)
    monkeypatch.setattr(logits_loss, "backward", spied_backward)
    x, targets = tf.constant(of.logits), tf.constant(of.targets)
    _, (gradient,) = gradients_of(lambda x, y: rnnt_loss(x, y, FRAMES, LABELS))(x, targets)
    mine = (as_array(x, "x").ctypes.data, as_array(targets, "targets").ctypes.data)
    assert read == [mine, mine]
    assert as_array(gradient, "gradient").ctypes.data == written[0].ctypes.data
    assert written[0].ctypes.data % 64 == 0
    # A graph hands over its own tensors, the same to both passes.
    read.clear()
    tf.function(gradients_of(lambda x, y: rnnt_loss(x, y, FRAMES, LABELS)))(x, targets)
    assert read == [mine, mine]


def test_memory_of_tensorflow_itself() -> None:
    """As on CUDA: arrays that TensorFlow has allocated, written by way of DLPack."""
    of = batch()
    allocated: list[Any] = []

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        allocated.append(tf.raw_ops.Empty(shape=shape, dtype=dtype))
        return allocated[-1]

    problem = logits_loss.problem(
        of.logits, of.targets, FRAMES, LABELS, allocate=allocate, blank=0, topology="regular", normalized=False,
        fastemit_lambda=0.0, delay_penalty=0.0, hat=False, infeasible="inf",
    )
    loss, _, saved = logits_loss.forward(problem)
    gradient = logits_loss.backward(problem, saved, logits_loss.weights_of(problem, WEIGHTS), False)
    assert any(each is loss for each in allocated)
    assert tensorflow_graph.tensor_of(gradient) is gradient
    expected = tl.rnnt_loss(of.logits, of.targets, FRAMES, LABELS, weights=WEIGHTS)
    assert same(loss, expected[0]) and same(gradient, expected[1])


def test_misaligned_arrays_strategies_and_imports() -> None:
    """In a process of its own, which TensorFlow would abort, and whose devices have to be made first."""
    found = run_python(
        """
        import json, os, sys
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        import numpy as np, tensorflow as tf
        before = set(sys.modules)  # TensorFlow itself may bring JAX
        from transducer_loss.adapters.tensorflow import joint_rnnt_loss, rnnt_loss, samplewise_rnnt_loss
        from transducer_loss.adapters.tensorflow.graph import tensor_of
        from transducer_loss.arrays import numpy_dtype

        found = {"foreign": [name for name in ("torch", "jax", "cupy", "keras") if name in set(sys.modules) - before]}
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
        misaligned = []
        for dtype in ("float16", "bfloat16", "float32", "float64", "int32"):
            raw = np.zeros(4096, np.uint8)
            start = -raw.ctypes.data % 64 + 8
            array = raw[start:start + 640].view(numpy_dtype(dtype)).reshape(2, -1)
            aligned = raw[start + 1016:start + 1656].view(numpy_dtype(dtype)).reshape(2, -1)
            assert array.ctypes.data % 64 == 8 and aligned.ctypes.data % 64 == 0
            array[...] = aligned[...] = np.arange(array.size).reshape(2, -1) % 13
            views = [each for of in (array, aligned) for each in (of, of.T, of[:, 1::2], of[::-1])]
            equal = [np.array_equal(tensor_of(each).numpy().astype("f"), each.astype("f")) for each in views]
            misaligned.append(all(equal))
        found["misaligned"] = misaligned

        rng = np.random.default_rng(0)
        encoder, predictor, first = (rng.normal(size=s).astype("f") for s in ((4, 9, 6), (4, 5, 6), (11, 6)))
        data = (encoder, predictor, rng.integers(0, 11, (4, 4)), np.array([9, 4, 1, 6]), np.array([4, 0, 2, 3]))
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        with strategy.scope():
            weight = tf.Variable(first)

        def joint(e, p):
            return tf.matmul(tf.tanh(e + p), weight, transpose_b=True)

        def loss_of(kind, weight, e, p, *integers):
            if kind == "joint":
                return joint_rnnt_loss(e, p, weight, None, *integers)
            if kind == "logits":
                logits = tf.matmul(tf.tanh(e[:, :, None] + p[:, None]), weight, transpose_b=True)
                return rnnt_loss(logits, *integers)
            return samplewise_rnnt_loss(joint, e, p, *integers, parameters=[weight])

        def step(kind, *tensors):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(loss_of(kind, weight, *tensors)) / 4
            return tf.distribute.get_replica_context().all_reduce("sum", tape.gradient(loss, weight))

        sets = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices(data).batch(4))
        one = next(iter(sets))
        for kind in ("logits", "joint"):
            with tf.GradientTape() as tape:
                variable = tf.Variable(first)
                alone = tape.gradient(tf.reduce_mean(loss_of(kind, variable, *map(tf.constant, data))), variable)
            for name, call in (("eager", strategy.run), ("function", tf.function(strategy.run))):
                replicas = strategy.experimental_local_results(call(step, (kind, *one)))
                found[kind + " " + name] = [len(replicas), max(float(np.abs(each - alone).max()) for each in replicas)]
        try:
            strategy.run(step, ("packs", *one))
        except ValueError as error:
            found["packs"] = str(error)
        print(json.dumps(found))
        """
    )
    assert found.pop("foreign") == []
    assert found.pop("misaligned") == [True] * 5
    assert "expected variables of no tf.distribute strategy" in found.pop("packs")
    assert sorted(found) == ["joint eager", "joint function", "logits eager", "logits function"]
    assert all(number == 2 and error < 1e-6 for number, error in found.values())


# Bands, classes.


def simple_inputs(dtype: str = "float32") -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    am, lm = rng.normal(size=(4, T, V)), rng.normal(size=(4, U + 1, V))
    for b, (frames, labels) in enumerate(zip(FRAMES, LABELS, strict=True)):
        am[b, frames:] = lm[b, labels + 1 :] = np.nan
    return am.astype(numpy_dtype(dtype)), lm.astype(numpy_dtype(dtype))


@of_each_way
@of_each_dtype
def test_simple_loss(dtype: str, way: str) -> None:
    am, lm = simple_inputs(dtype)
    of = batch()
    loss, _, occupancy = tl.simple_rnnt_loss(am, lm, of.targets, FRAMES, LABELS, lm_only_scale=0.25)
    wide, _, _ = tl.simple_rnnt_loss(am, lm, of.targets, FRAMES, LABELS, lm_only_scale=0.25, weights=WEIGHTS)
    done = tl.simple_loss.forward(tl.simple_loss.problem(am, lm, of.targets, FRAMES, LABELS, lm_only_scale=0.25, blank=0, topology="regular", fastemit_lambda=0.0, delay_penalty=0.0, infeasible="inf"))
    # Each utterance's gradient times its weight, rounded once.
    factors = WEIGHTS.astype(COMPUTE[dtype])[:, None, None]
    grads = [np.where(each == 0, 0, each * factors).astype(am.dtype) for each in done.gradients]
    kept: list[Any] = []

    def loss_of(*tensors: Any) -> Any:
        losses, found = simple_rnnt_loss(*tensors, lm_only_scale=0.25)
        kept.append(found)
        return losses

    found, gradients = in_way(way, gradients_of(loss_of), *map(tf.constant, (am, lm, of.targets, FRAMES, LABELS)))
    assert same(found, loss) and same(found, wide)
    assert all(map(same, gradients, grads))
    if way == "eager":
        assert same(kept[0].blank, occupancy.blank) and same(kept[0].label, occupancy.label) and same(kept[0].loss, loss)


@of_each_way
@pytest.mark.parametrize("strategy", ["local", "optimal"])
def test_pruned(strategy: str, way: str) -> None:
    am, lm = simple_inputs()
    inputs, of = joint_inputs(), batch()
    _, _, occupancy = tl.simple_rnnt_loss(am, lm, of.targets, FRAMES, LABELS)
    band = tl.prune(occupancy, FRAMES, LABELS, s_range=2, strategy=strategy)
    loss, grads = later(inputs, of.targets, band=band)
    rows = tl.gather_predictor(inputs[1], band)
    upstream = np.random.default_rng(1).normal(size=rows.shape).astype("f")
    of_rows = tl.gather_predictor_backward(upstream, band, U + 1)

    def step(am: Any, lm: Any, *tensors: Any) -> Any:
        occupancy = simple_rnnt_loss(am, lm, *tensors[4:])[1]
        found = prune(occupancy, *tensors[5:], s_range=2, strategy=strategy)
        with tf.GradientTape() as tape:
            tape.watch(tensors[1])
            gathered = gather_predictor(tensors[1], found)
        gradient = tape.gradient(gathered, tensors[1], tf.constant(upstream))
        return found, gathered, gradient, gradients_of(lambda *each: joint_rnnt_loss(*each, band=found))(*tensors)

    integers = map(tf.constant, (of.targets, FRAMES, LABELS))
    found, gathered, gradient, (losses, gradients) = in_way(way, step, *map(tf.constant, (am, lm)), *tensors_of(inputs), *integers)
    assert isinstance(found, tftl.Band)
    for name in ("first", "end", "frames", "labels", "mass"):
        assert same(getattr(found, name), getattr(band, name))
    assert (int(found.width), int(found.s_range)) == (band.width, 2)
    assert same(gathered, rows) and same(gradient, of_rows)
    assert same(losses, loss) and all(map(same, gradients, grads))
    # A band crosses the border of a function, and the core's own is taken, too.
    again = tf.function(lambda each: joint_rnnt_loss(*tensors_of(inputs), of.targets, FRAMES, LABELS, band=each))
    assert same(again(found), loss)
    assert same(joint_rnnt_loss(*tensors_of(inputs), of.targets, FRAMES, LABELS, band=band), loss)


def test_logits_of_a_band() -> None:
    of = batch()
    band = tl.Band.from_alignment(np.zeros((4, U), int), FRAMES, LABELS, left=0, right=6)
    logits = np.random.default_rng(0).normal(size=(4, T, band.width, V)).astype("f")
    loss, grad = tl.rnnt_loss(logits, of.targets, FRAMES, LABELS, band=band, weights=WEIGHTS)
    call = gradients_of(lambda x: rnnt_loss(x, of.targets, FRAMES, LABELS, band=band))
    for found, (gradient,) in (call(tf.constant(logits)), tf.function(call)(tf.constant(logits))):
        assert same(found, loss) and same(gradient, grad)


@of_each_way
@pytest.mark.parametrize("scope", ["batch", "utterance"])
@pytest.mark.parametrize("sparse", [False, True])
def test_sampled(scope: str, sparse: bool, way: str) -> None:
    inputs, of = joint_inputs(), batch()
    ctc = np.random.default_rng(2).normal(size=(4, T, V)).astype("f")
    options: dict[str, Any] = {"vocab_size": V, "num_samples": 2, "scope": scope, "proposal": "ctc", "correction": True}
    classes = tl.sample_classes(of.targets, LABELS, **options, ctc_logits=ctc, ctc_lengths=FRAMES, seed=5, step=3)
    loss, grads = later(inputs, of.targets, classes=classes)
    slots = tl.labels_in(classes, of.targets, LABELS)

    def step(ctc: Any, at: Any, *tensors: Any) -> Any:
        found = sample_classes(tensors[4], tensors[6], **options, ctc_logits=ctc, ctc_lengths=tensors[5], seed=5, step=at[0])
        call = gradients_of(lambda *each: joint_rnnt_loss(*each, classes=found, sparse=sparse))
        return found, labels_in(found, tensors[4], tensors[6]), call(*tensors)

    integers = map(tf.constant, (of.targets, FRAMES, LABELS))
    found, labels, (losses, gradients) = in_way(way, step, tf.constant(ctc), tf.constant([3]), *tensors_of(inputs), *integers)
    assert isinstance(found, tftl.Classes)
    assert same(found.ids, classes.ids) and same(found.probability, classes.probability)
    assert (int(found.vocab_size), int(found.blank), bool(found.correction)) == (V, 0, True)
    assert same(labels, slots) and same(losses, loss)
    assert [isinstance(each, tf.IndexedSlices) for each in gradients] == [False, False, sparse, sparse]
    for gradient, expected in zip(gradients, grads, strict=True):
        if sparse and scope == "utterance":  # summed in another order
            np.testing.assert_allclose(tf.convert_to_tensor(gradient), expected, rtol=1e-5, atol=1e-6)
        else:
            assert same(gradient, expected)


def test_random_seeds_are_new_in_every_step() -> None:
    inputs, of = tensors_of(joint_inputs()), batch()
    dropped = tf.function(lambda: joint_rnnt_loss(*inputs, of.targets, FRAMES, LABELS, dropout=0.5))
    drawn = tf.function(lambda: sample_classes(of.targets, LABELS, vocab_size=1000, num_samples=50).ids)
    for call in (dropped, drawn):
        tf.random.set_seed(0)
        first, second = call(), call()
        assert not np.array_equal(first, second)


# Sample-wise.

GATED = [np.random.default_rng(9).normal(size=size) for size in ((H, H), (H, V))]


def gated(dtype: str) -> tuple[Callable[..., Any], list[tf.Variable]]:
    gate, output = (tf.Variable(each.astype(numpy_dtype(dtype))) for each in GATED)

    def joint(encoder: Any, predictor: Any) -> Any:
        return tf.matmul(tf.tanh(encoder + predictor) * tf.sigmoid(tf.matmul(encoder, gate)), output)

    return joint, [gate, output]


@pytest.mark.parametrize("way", ["eager", "function"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("pack", "reduction"), [(0, "none"), (60, "none"), (10**6, "mean"), (0, "sum")])
def test_samplewise(dtype: str, pack: int, reduction: str, way: str) -> None:
    joint, variables = gated(dtype)
    encoder, predictor = joint_inputs(dtype)[:2]
    of = batch()
    reduce = {"none": lambda x: tf.reduce_sum(x * tf.cast(WEIGHTS, x.dtype)), "mean": tf.reduce_mean, "sum": tf.reduce_sum}[reduction]

    def step(*tensors: Any) -> Any:
        tensors, clean = tensors[:2], tensors[2:]
        with tf.GradientTape(persistent=True) as tape:
            tape.watch((*tensors, *clean))
            logits = joint(clean[0][:, :, None], clean[1][:, None])
            exact = rnnt_loss(logits, of.targets, FRAMES, LABELS, fastemit_lambda=0.125)
            loss = samplewise_rnnt_loss(
                joint, *tensors, of.targets, FRAMES, LABELS, parameters=variables, pack=pack, reduction=reduction, fastemit_lambda=0.125
            )
            totals = reduce(exact), -2.5 * (reduce(loss) if reduction == "none" else loss)
        sources = [*tensors, *variables]
        return exact, loss, tape.gradient(totals[0], [*clean, *variables]), tape.gradient(totals[1], sources), tape.gradient(totals[1], sources)

    exact, loss, expected, first, second = in_way(way, step, *map(tf.constant, (encoder, predictor, without_nan(encoder), without_nan(predictor))))
    epsilon = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-14}[dtype]
    np.testing.assert_allclose(loss, exact if reduction == "none" else reduce(exact), rtol=epsilon)
    for one, two, three in zip(expected, first, second, strict=True):
        one, two, three = (np.asarray(each, "float64") for each in (one, two, three))
        assert np.linalg.norm(two + 2.5 * one) <= 8 * epsilon * np.linalg.norm(one)
        assert np.array_equal(two, three)


def test_samplewise_forgets_its_packs() -> None:
    """Under a tape of the caller's, which would record what the joint does with its variables."""
    joint, variables = gated("float32")
    alive: list[Any] = []
    most = 0

    def watched(encoder: Any, predictor: Any) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, sum(each() is not None for each in alive))
        logits = joint(encoder, predictor)
        alive.append(weakref.ref(logits))
        return logits

    encoder, predictor = tensors_of([without_nan(each) for each in joint_inputs()[:2]])
    with tf.GradientTape(persistent=True) as tape:
        loss = samplewise_rnnt_loss(watched, encoder, predictor, batch().targets, FRAMES, LABELS, parameters=variables, reduction="mean")
        assert len(alive) == 4
    assert most <= 1  # the one before, which the next is made beside
    assert all(each is not None for each in tape.gradient(loss, variables))
    assert len(alive) == 4  # gradients were made with the loss


def test_samplewise_utterance_that_is_not_finite() -> None:
    joint, variables = gated("float32")
    encoder, predictor = (without_nan(each) for each in joint_inputs()[:2])
    encoder[0, 0] = np.nan
    results = []
    for pack in (0, 10**6):
        with tf.GradientTape() as tape:
            loss = samplewise_rnnt_loss(joint, tf.constant(encoder), tf.constant(predictor), batch().targets, FRAMES, LABELS, parameters=variables, pack=pack)
            total = tf.reduce_sum(loss)
        assert np.isnan(loss[0]) and np.isfinite(loss[1:]).all()
        results.append(tape.gradient(total, variables))
    for one, other in zip(*results, strict=True):
        assert np.isfinite(one).all() and np.any(one) and same(one, other.numpy())


def test_samplewise_errors() -> None:
    joint, variables = gated("float32")
    encoder, predictor = tensors_of([without_nan(each) for each in joint_inputs()[:2]])
    rest = (batch().targets, FRAMES, LABELS)
    with pytest.raises(ValueError, match=r"parameters: expected the joint's variables, as it has no trainable_variables"):
        samplewise_rnnt_loss(joint, encoder, predictor, *rest)
    with pytest.raises(ValueError, match=r"parameters: expected every trainable variable that the joint uses, got none for .* of shape \(6, 11\)"):
        samplewise_rnnt_loss(joint, encoder, predictor, *rest, parameters=variables[:1], reduction="sum")
    with pytest.raises(TypeError, match=r"parameters: expected tf.Variables, got EagerTensor"):
        samplewise_rnnt_loss(joint, encoder, predictor, *rest, parameters=[encoder])
    with pytest.raises(ValueError, match=r"joint: expected logits of shape \(n, T, U\+1, V\) = \(1, 9, 5, V\), got \(1, 9, 1, 6\)"):
        samplewise_rnnt_loss(lambda e, p: e, encoder, predictor, *rest, parameters=[])
    with pytest.raises(ValueError, match=r"predictor: expected shape \(B, U\+1, D\) = \(4, U\+1, D\), got \(3, 5, 6\)"):
        samplewise_rnnt_loss(joint, encoder, predictor[:3], *rest, parameters=variables)
    with pytest.raises(ValueError, match=r"targets: expected labels in \[0, V = 11\), got 99 at index \(3, 1\)"):
        targets = rest[0].copy()
        targets[3, 1] = 99
        samplewise_rnnt_loss(joint, encoder, predictor, targets, *rest[1:], parameters=variables)
    with pytest.raises(ValueError, match=r"none for utterances \[0\]"):
        samplewise_rnnt_loss(joint, encoder, predictor, rest[0], [3, 1, 7, 5], LABELS, parameters=variables, topology="modified", infeasible="raise")


# Errors.


def test_errors_teach() -> None:
    of, inputs = batch(), tensors_of(joint_inputs())
    x = tf.constant(of.logits)
    rest = (of.targets, FRAMES, LABELS)
    with pytest.raises(ValueError, match=r"logits: expected 4 dimensions \(B, T, U\+1, V\), got shape \(9, 5, 11\)"):
        rnnt_loss(x[0], *rest)
    with pytest.raises(TypeError, match="logits: expected dtype float16, bfloat16, float32, float64, got int32"):
        rnnt_loss(tf.cast(tf.ones_like(x), tf.int32), *rest)
    with pytest.raises(TypeError, match="targets: expected integers, got dtype float64"):
        rnnt_loss(x, of.targets.astype(float), FRAMES, LABELS)
    with pytest.raises(TypeError, match="targets: expected a dense tensor, as of its to_tensor\\(\\), got a RaggedTensor"):
        rnnt_loss(x, tf.ragged.constant([[1, 2, 3, 4], [], [1, 2], [3, 2, 1]]), FRAMES, LABELS)
    with pytest.raises(ValueError, match=r"targets: expected shape \(B, U\) = \(4, 4\), got \(4, 3\)"):
        rnnt_loss(x, of.targets[:, :3], FRAMES, LABELS)
    with pytest.raises(TypeError, match="weight: expected dtype float32 as encoder, got float64"):
        joint_rnnt_loss(*inputs[:2], tf.cast(inputs[2], tf.float64), inputs[3], *rest)
    with pytest.raises(ValueError, match="sparse: expected False without classes"):
        joint_rnnt_loss(*inputs, *rest, sparse=True)
    with pytest.raises(TypeError, match="band: expected a Band, got int"):
        joint_rnnt_loss(*inputs, *rest, band=3)
    with pytest.raises(TypeError, match="occupancy: expected an Occupancy, got int"):
        prune(3, FRAMES, LABELS)
    with pytest.raises(TypeError, match="classes: expected Classes, got int"):
        joint_rnnt_loss(*inputs, *rest, classes=3)
    # While a graph is traced, where that is known by then; when it runs, else.
    with pytest.raises(ValueError, match=r"blank: expected a class in \[-11, 11\), got 11"):
        tf.function(lambda x: rnnt_loss(x, *rest, blank=11))(x)
    with pytest.raises(ValueError, match="topology: expected one of 'regular'"):
        tf.function(lambda x: rnnt_loss(x, *rest, topology="odd"))(x)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"logit_lengths: expected lengths in \[1, T = 9\], got 10 at index 0"):
        tf.function(lambda x: rnnt_loss(x, of.targets, [10, 1, 7, 5], LABELS))(x)
    for call, kind in ((rnnt_loss, ValueError), (tf.function(rnnt_loss), tf.errors.InvalidArgumentError)):
        with pytest.raises(kind, match=r"expected a path for every utterance, got none for utterances \[0\]"):
            call(x, of.targets, [3, 1, 7, 5], LABELS, topology="modified", infeasible="raise")


def test_public_names() -> None:
    assert sorted(tftl.__all__) == sorted([
        "Band", "Classes", "EditDistance", "Occupancy", "amortized_backlog", "amortized_cost", "edit_distance", "embr_loss",
        "gather_predictor", "gumbel_gate", "joint_rnnt_loss", "labels_in", "prune", "reduced_predictor", "rnnt_loss",
        "sample_classes", "samplewise_rnnt_loss", "simple_rnnt_loss",
    ])
    assert tensorflow_logits.rnnt_loss.__doc__ is not None
