"""Edit distance, EMBR, shared encoders, the reduced predictor and the gates for TensorFlow: bit-equal to the core, in every graph."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf

import transducer_loss as tl
from helpers import FLOATS, numpy_dtype
from test_tensorflow import MESSAGE, same
from transducer_loss import joint_loss, logits_loss, reference
from transducer_loss.adapters import tensorflow as tftl
from transducer_loss.adapters.tensorflow import amortized as tensorflow_amortized
from transducer_loss.adapters.tensorflow import (
    amortized_backlog,
    amortized_cost,
    edit_distance,
    embr_loss,
    gumbel_gate,
    joint_rnnt_loss,
    reduced_predictor,
)
from transducer_loss.adapters.tensorflow import embr as tensorflow_embr
from transducer_loss.adapters.tensorflow import tied_reduced as tensorflow_tied_reduced
from transducer_loss.arrays import as_array

WEIGHTS = np.array([1.0, -2.5, 0.0, 0.375])
B, N, L, T, K, U, V, E = 4, 5, 3, 8, 3, 4, 7, 6
FRAMES, LABELS = np.array([8, 1, 5, 3]), np.array([4, 0, 2, 3])


class Case(NamedTuple):
    """A function of float and int arrays, and what the core makes of them."""

    function: Callable[..., Any]
    floats: list[Any]
    integers: list[Any]
    core: Callable[[Any], tuple[Any, list[Any]]]
    """Upstream to result and gradients."""
    upstream: Any


def hypotheses() -> tuple[Any, Any]:
    """N of each utterance: repetitions, empty ones, padding, and an utterance with nothing else."""
    rng = np.random.default_rng(0)
    labels, lengths = rng.integers(0, 3, (B, N, L)), rng.integers(0, L + 1, (B, N))
    lengths[:, -1] = lengths[2] = -1
    labels[0, 1], lengths[0, 1] = labels[0, 0], lengths[0, 0]
    labels[np.arange(L) >= lengths[..., None]] = -1
    return labels, lengths


def of_embr(dtype: str, **options: Any) -> Case:
    rng = np.random.default_rng(1)
    labels, lengths = hypotheses()
    nll, reference_nll = rng.normal(4, 2, (B, N)), rng.normal(5, 1, B)
    nll[lengths < 0] = np.nan
    nll[3, 1] = np.inf
    kinds = [each.astype(numpy_dtype(dtype)) for each in (nll, reference_nll)]
    distances = rng.integers(0, 5, (B, N))
    given: dict[str, Any] = {"blank": 0, "temperature": 1.5, "interpolation": 0.25, **options}

    def core(upstream: Any) -> tuple[Any, list[Any]]:
        loss, grads = tl.embr_loss(
            kinds[0], distances, hypotheses=labels, hypothesis_lengths=lengths, reference_nll=kinds[1], weights=upstream, **given
        )
        return loss, [grads.nll, grads.reference_nll]

    def function(nll: Any, reference_nll: Any, distances: Any, labels: Any, lengths: Any) -> Any:
        return embr_loss(nll, distances, hypotheses=labels, hypothesis_lengths=lengths, reference_nll=reference_nll, **given)

    return Case(function, kinds, [distances, labels, lengths], core, WEIGHTS)


def gates(dtype: str) -> Any:
    array = np.random.default_rng(2).dirichlet(np.ones(K), (B, T))
    array[np.arange(T) >= FRAMES[:, None]] = np.nan
    return array.astype(numpy_dtype(dtype))


def of_gates(function: Callable[..., Any], core: Callable[..., Any], dtype: str, **options: Any) -> Case:
    each, array = [1.0, 0.375, 2.5], gates(dtype)

    def of_core(upstream: Any) -> tuple[Any, list[Any]]:
        value, grad = core(array, each, FRAMES, weights=upstream, **options)
        return value, [grad]

    return Case(lambda x, lengths: function(x, each, lengths, **options), [array], [FRAMES], of_core, WEIGHTS)


def of_logits(dtype: str, **options: Any) -> Case:
    logits = np.random.default_rng(3).normal(0, 2, (B, T, K))
    logits[0, 0, 1] = -np.inf
    logits[np.arange(T) >= FRAMES[:, None]] = np.nan
    logits, seed = logits.astype(numpy_dtype(dtype)), np.array(2**40 + 7)
    upstream = np.random.default_rng(4).normal(size=logits.shape).astype(logits.dtype)
    upstream[np.arange(T) >= FRAMES[:, None]] = np.nan

    def core(upstream: Any) -> tuple[Any, list[Any]]:
        drawing = {key: value for key, value in options.items() if key != "hard"}
        grad = tl.gumbel_gate_backward(upstream, logits, FRAMES, seed=int(seed), **drawing)
        return tl.gumbel_gate(logits, FRAMES, seed=int(seed), **options), [grad]

    def function(x: Any, lengths: Any, seed: Any) -> Any:
        return gumbel_gate(x, lengths, seed=seed, **options)

    return Case(function, [logits], [FRAMES, seed], core, upstream)


def of_labels(dtype: str, last: bool = False) -> Case:
    rng = np.random.default_rng(5)
    inputs = [rng.normal(size=size).astype(numpy_dtype(dtype)) for size in ((V, E), (2, 3, E))]
    targets = rng.integers(0, V, (B, U))
    targets[np.arange(U) >= LABELS[:, None]] = -1
    upstream = rng.normal(size=(B, E) if last else (B, U + 1, E)).astype(inputs[0].dtype)
    if not last:
        upstream[np.arange(U + 1) > LABELS[:, None]] = np.nan

    def core(upstream: Any) -> tuple[Any, list[Any]]:
        grads = tl.reduced_predictor_backward(upstream, *inputs, targets, LABELS, last=last)
        return tl.reduced_predictor(*inputs, targets, LABELS, last=last), [grads.embedding, grads.positions]

    return Case(lambda *tensors: reduced_predictor(*tensors, last=last), inputs, [targets, LABELS], core, upstream)


def of_joint(dtype: str, **options: Any) -> Case:
    """Three encoders, one of them of no utterance, for four utterances."""
    rng = np.random.default_rng(6)
    index, frames = np.array([2, 0, 2, 2]), np.array([8, 3, 5])
    arrays = [rng.normal(size=size) for size in ((3, T, E), (B, U + 1, E), (V, E), (V,))]
    arrays[0][np.arange(T) >= frames[:, None]] = np.nan
    arrays[1][np.arange(U + 1) > LABELS[:, None]] = np.nan
    targets = rng.integers(1, V, (B, U))
    targets[np.arange(U) >= LABELS[:, None]] = -1
    inputs = [each.astype(numpy_dtype(dtype)) for each in arrays]
    defaults = {"blank": 0, "topology": "regular", "fastemit_lambda": 0.0, "delay_penalty": 0.0, "hat": False, "infeasible": "inf"}

    def core(upstream: Any) -> tuple[Any, list[Any]]:
        of = joint_loss.problem(*inputs, targets, frames, LABELS, encoder_index=index, **{**defaults, **options})
        done = joint_loss.forward(of, later=True)
        sums = joint_loss.backward(of, done, logits_loss.weights_of(of, upstream)).native
        return done.native, [each.astype(inputs[0].dtype) for each in sums]

    def function(*tensors: Any) -> Any:
        return joint_rnnt_loss(*tensors[:-1], encoder_index=tensors[-1], **options)

    return Case(function, inputs, [targets, frames, LABELS, index], core, WEIGHTS)


CASES: dict[str, Callable[[str], Case]] = {
    "embr": of_embr,
    "embr infeasible": lambda dtype: of_embr(dtype, infeasible="zero", interpolation=0.0, blank=None),
    "cost": lambda dtype: of_gates(amortized_cost, tl.amortized_cost, dtype),
    "backlog": lambda dtype: of_gates(amortized_backlog, tl.amortized_backlog, dtype, frame_period=0.75),
    "last backlog": lambda dtype: of_gates(amortized_backlog, tl.amortized_backlog, dtype, statistic="last"),
    "gate": lambda dtype: of_logits(dtype, temperature=0.75),
    "hard gate": lambda dtype: of_logits(dtype, hard=True, temperature=2.0),
    "silent gate": lambda dtype: of_logits(dtype, noise=False),
    "predictor": of_labels,
    "last row": lambda dtype: of_labels(dtype, last=True),
    "shared encoder": of_joint,
    "shared encoder, cut": lambda dtype: of_joint(dtype, workspace=10_000, activation="relu"),
}

every_case = pytest.mark.parametrize("name", CASES)


def in_way(way: str, function: Callable[..., Any], *tensors: Any) -> Any:
    """Results of a function of tensors."""
    if way == "eager":
        return function(*tensors)
    if way == "function":
        return tf.function(function)(*tensors)
    shapes = [None if way == "unknown ranks" else [None] * each.shape.rank for each in tensors]
    return tf.function(function, input_signature=[tf.TensorSpec(*of) for of in zip(shapes, (each.dtype for each in tensors), strict=True)])(*tensors)


def tensors_of(case: Case) -> list[Any]:
    return [tf.constant(each) for each in (*case.floats, *case.integers)]


def gradients_of(case: Case, upstreams: list[Any]) -> Callable[..., Any]:
    """Result and gradients, of one backward pass after another."""

    def called(*tensors: Any) -> Any:
        inputs = tensors[: len(case.floats)]
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(inputs)
            result = case.function(*tensors)
        return result, [tape.gradient(result, inputs, tf.cast(upstream, result.dtype)) for upstream in upstreams]

    return called


# Values and gradients.


@pytest.mark.parametrize("way", ["eager", "function", "unknown sizes", "unknown ranks"])
@pytest.mark.parametrize("dtype", FLOATS)
@every_case
def test_as_the_core(name: str, dtype: str, way: str) -> None:
    """With upstream gradients of any sign and 0, backward three times, the last of which has the first's upstream."""
    case = CASES[name](dtype)
    upstreams = [case.upstream, -2 * case.upstream, case.upstream]
    result, found = in_way(way, gradients_of(case, upstreams), *tensors_of(case))
    for upstream, gradients in zip(upstreams, found, strict=True):
        expected, grads = case.core(upstream)
        assert same(result, expected)
        assert len(gradients) == len(grads) and all(map(same, gradients, grads))
        assert any(np.any(each) for each in grads)


def test_as_the_reference() -> None:
    """In float64, which the core's own tests do at length: that the adapters call what they say."""
    case = of_embr("float64")
    labels, lengths = hypotheses()
    loss, grad = reference.embr_loss(
        case.floats[0], case.integers[0], hypotheses=labels, hypothesis_lengths=lengths, blank=0, temperature=1.5,
        reference_nll=case.floats[1], interpolation=0.25,
    )  # fmt: skip
    found, ((by_nll, by_reference),) = gradients_of(case, [np.ones(B)])(*tensors_of(case))
    np.testing.assert_allclose(found, loss, rtol=1e-12)
    np.testing.assert_allclose(by_nll, grad, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(by_reference, np.where(np.isfinite(loss), 0.25, 0))

    case = of_labels("float64")
    found, ((*gradients,),) = gradients_of(case, [case.upstream])(*tensors_of(case))
    np.testing.assert_allclose(found, reference.reduced_predictor(*case.floats, *case.integers), rtol=1e-12, atol=1e-15)
    exact = reference.reduced_predictor_backward(case.upstream, *case.floats, *case.integers)
    for one, other in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)

    array, each = gates("float64"), [1.0, 0.375, 2.5]
    for function, exact_of in ((amortized_cost, reference.amortized_cost), (amortized_backlog, reference.amortized_backlog)):
        x = tf.constant(array)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x, each, FRAMES)
        expected, slope = exact_of(array, each, FRAMES)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        np.testing.assert_allclose(tape.gradient(value, x), slope, rtol=1e-12, atol=1e-15)

    case = of_logits("float64", temperature=0.75)
    found, ((gradient,),) = gradients_of(case, [case.upstream])(*tensors_of(case))
    drawing = {"temperature": 0.75, "seed": 2**40 + 7}
    np.testing.assert_allclose(found, reference.gumbel_gate(case.floats[0], FRAMES, **drawing), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        gradient, reference.gumbel_gate_backward(case.upstream, case.floats[0], FRAMES, **drawing), rtol=1e-11, atol=1e-14
    )


@pytest.mark.parametrize("way", ["eager", "function", "unknown sizes", "unknown ranks"])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("blank", [None, 0])
def test_edit_distance(blank: int | None, kind: Any, way: str) -> None:
    labels, lengths = hypotheses()
    references = np.random.default_rng(7).integers(0, 3, (B, U))
    expected = tl.edit_distance(labels, lengths, references, LABELS, blank=blank)
    tensors = [tf.constant(each.astype(kind)) for each in (labels, lengths, references, LABELS)]
    found = in_way(way, lambda *each: edit_distance(*each, blank=blank), *tensors)
    assert isinstance(found, tftl.EditDistance)
    for name in found._fields:
        assert same(getattr(found, name), getattr(expected, name))
    plain = reference.edit_distance(labels[0, 0, : lengths[0, 0]], references[0, : LABELS[0]], blank)
    assert [int(each[0, 0]) for each in found] == list(plain)
    assert (found.total.numpy()[lengths < 0] == -1).all()
    # One hypothesis of each utterance.
    one = in_way(way, lambda *each: edit_distance(*each, blank=blank), tensors[0][:, 0], tensors[1][:, 0], *tensors[2:])
    assert same(one.total, expected.total[:, 0])


def test_edit_distance_of_lists_and_of_nothing() -> None:
    assert edit_distance([[1, 2, 3], [1, 0, 0]], [3, 0], [[1, 3], [1, 3]], [2, 1]).total.numpy().tolist() == [1, 1]
    assert edit_distance([[]], [0], [[]], [0]).total.numpy().tolist() == [0]
    assert edit_distance([[[1], [2]]], [[1, -1]], [[]], [0]).insertions.numpy().tolist() == [[1, -1]]


# Shared encoders.


def test_shared_encoders_add_up_what_copies_of_them_get() -> None:
    case = of_joint("float64")
    targets, frames, labels, index = case.integers
    loss, ((by_encoder, *rest),) = gradients_of(case, [WEIGHTS])(*tensors_of(case))
    copies = Case(joint_rnnt_loss, [case.floats[0][index], *case.floats[1:]], [targets, frames[index], labels], case.core, WEIGHTS)
    expected, ((of_copies, *others),) = gradients_of(copies, [WEIGHTS])(*tensors_of(copies))
    np.testing.assert_allclose(loss, expected, rtol=1e-13)
    summed = np.zeros((3, T, E))
    np.add.at(summed, index, of_copies.numpy())
    np.testing.assert_allclose(by_encoder, summed, rtol=1e-11, atol=1e-13)
    assert not np.any(by_encoder[1]) and np.any(by_encoder[2])
    for one, other in zip(rest, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13)


def test_shared_encoders_with_a_band_and_classes() -> None:
    case = of_joint("float32")
    targets, frames, labels, index = case.integers
    band = tl.Band.from_alignment(np.zeros((B, U), int), frames[index], labels, left=0, right=T - 1)
    classes = tl.sample_classes(targets, labels, vocab_size=V, num_samples=1, seed=0)
    for options in ({"band": band}, {"classes": classes}):
        of = of_joint("float32", **options)
        expected, grads = of.core(WEIGHTS)
        found, (gradients,) = tf.function(gradients_of(of, [WEIGHTS]))(*tensors_of(of))
        assert same(found, expected) and all(map(same, gradients, grads))
    # The index may be a list, and the batch is that of the predictor.
    again = joint_rnnt_loss(*map(tf.constant, case.floats), targets, frames.tolist(), labels.tolist(), encoder_index=index.tolist())
    assert same(again, case.core(WEIGHTS)[0])


@pytest.mark.parametrize("graph", [False, True])
def test_embr_through_the_engine(graph: bool) -> None:
    """Losses of all hypotheses, distances, risk: one tape, whose upstream weights of the hypotheses have any sign."""
    rng = np.random.default_rng(8)
    encoder, predictor, weight = (rng.normal(size=size).astype("f") for size in ((2, T, E), (2 * N, L + 1, E), (V, E)))
    labels, lengths = (each[:2] for each in hypotheses())
    references, frames, index = rng.integers(0, 3, (2, U)), np.array([8, 4]), np.repeat(np.arange(2), N)
    flat = labels.reshape(2 * N, L), np.maximum(lengths, 0).reshape(-1)

    def step(*inputs: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            nll = tf.reshape(joint_rnnt_loss(*inputs, None, flat[0], frames, flat[1], encoder_index=index), (2, N))
            edits = edit_distance(labels, lengths, references, LABELS[[0, 2]])
            loss = embr_loss(nll, edits.total, hypotheses=labels, hypothesis_lengths=lengths)
            total = tf.reduce_mean(loss)
        return nll, loss, tape.gradient(total, inputs)

    nll, loss, gradients = (tf.function(step) if graph else step)(*map(tf.constant, (encoder, predictor, weight)))
    edits = tl.edit_distance(labels, lengths, references, LABELS[[0, 2]])
    expected, grads = tl.embr_loss(nll.numpy(), edits.total, hypotheses=labels, hypothesis_lengths=lengths, weights=[0.5, 0.5])
    assert (grads.nll < 0).any() and (grads.nll > 0).any()
    of = joint_loss.problem(
        encoder, predictor, weight, None, flat[0], frames, flat[1], encoder_index=index, blank=0, topology="regular",
        fastemit_lambda=0.0, delay_penalty=0.0, hat=False, infeasible="inf",
    )  # fmt: skip
    sums = joint_loss.backward(of, joint_loss.forward(of, later=True), logits_loss.weights_of(of, grads.nll.reshape(-1))).native
    assert same(loss, expected) and all(map(same, gradients, sums))


def test_equal_distances_have_no_gradient() -> None:
    nll = tf.constant(np.random.default_rng(9).normal(size=(3, 4)))
    with tf.GradientTape() as tape:
        tape.watch(nll)
        loss = embr_loss(nll, tf.fill((3, 4), 2.5))
    np.testing.assert_allclose(loss, 2.5, rtol=1e-15)
    assert not np.any(tape.gradient(loss, nll))


# The tape and the graph.


@pytest.mark.parametrize("name", ["embr", "cost", "backlog", "hard gate", "predictor", "shared encoder"])
def test_second_order_raises(name: str) -> None:
    case = CASES[name]("float32")
    tensors = tensors_of(case)

    def penalty(*tensors: Any, of: Callable[..., Any] = case.function) -> Any:
        inputs = tensors[: len(case.floats)]
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                result = of(*tensors)
            size = sum(tf.reduce_sum(each**2) for each in inner.gradient(result, inputs))
        return outer.gradient(size, inputs)

    with pytest.raises(RuntimeError, match=MESSAGE):
        penalty(*tensors)
    with pytest.raises(tf.errors.OpError, match=MESSAGE):
        penalty(*tensors, of=tf.function(case.function))
    with pytest.raises(tf.errors.OpError, match=MESSAGE):
        tf.function(penalty)(*tensors)


def test_not_finite() -> None:
    """Whatever comes back to an utterance whose result is NaN, its gradient is 0."""
    for name in ("embr", "cost", "backlog"):
        case = CASES[name]("float32")
        case.floats[0][0, 0] = np.nan
        x = tf.constant(case.floats[0])
        with tf.GradientTape() as tape:
            tape.watch(x)
            result = case.function(x, *tensors_of(case)[1:])
            total = tf.reduce_sum(result**2)
        gradient = tape.gradient(total, x)
        assert np.isnan(result[0]) and np.isfinite(result[1])
        assert not np.any(gradient[0]) and np.isfinite(gradient[1]).all() and np.any(gradient[1])


def test_what_has_no_gradient() -> None:
    case = of_embr("float32")
    nll, *rest = tensors_of(case)
    distances = tf.Variable(tf.cast(rest[1], tf.float32))
    costs = tf.Variable([1.0, 0.375, 2.5])
    with tf.GradientTape(persistent=True) as tape:
        loss = case.function(nll, rest[0], distances, *rest[2:])
        cost = amortized_cost(tf.constant(gates("float32")), costs, FRAMES)
    assert same(loss, case.core(None)[0]) and same(cost, tl.amortized_cost(gates("float32"), [1.0, 0.375, 2.5], FRAMES)[0])
    assert tape.gradient(loss, distances) is None and tape.gradient(cost, costs) is None


def test_no_gradients_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def spied(module: Any, name: str) -> None:
        function = getattr(module, name)

        def called(*arguments: Any, **options: Any) -> Any:
            asked.append(options.get("gradient", "backward" in name))
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, called)

    for name in ("gated", "gated_backward", "mean_cost", "waiting"):
        spied(tensorflow_amortized, name)
    spied(tensorflow_embr, "risk")
    for name in ("averaged", "averaged_backward"):
        spied(tensorflow_tied_reduced, name)
    for name in ("embr", "cost", "backlog", "gate", "predictor"):
        case = CASES[name]("float32")
        x = tf.Variable(case.floats[0])
        with tf.GradientTape() as tape:  # a tape alone does not ask
            result = case.function(x, *tensors_of(case)[1:])
        assert asked == [False]
        tape.gradient(result, x)
        assert asked == [False, True]
        asked.clear()


def test_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the matrix that the joint has, too, nor of its gradient."""
    read, written = [], []
    averaged, backward = tensorflow_tied_reduced.averaged, tensorflow_tied_reduced.averaged_backward

    def spied(embedding: Any, *arguments: Any, **options: Any) -> Any:
        read.append(as_array(embedding, "embedding").ctypes.data)
        return averaged(embedding, *arguments, **options)

    def spied_backward(*arguments: Any, **options: Any) -> Any:
        grads = backward(*arguments, **options)
        written.append(grads.embedding)
        return grads

    monkeypatch.setattr(tensorflow_tied_reduced, "averaged", spied)
    monkeypatch.setattr(tensorflow_tied_reduced, "averaged_backward", spied_backward)
    case = of_labels("bfloat16")
    tensors = tensors_of(case)
    _, ((gradient, _),) = gradients_of(case, [case.upstream])(*tensors)
    assert read == [as_array(tensors[0], "x").ctypes.data]
    assert as_array(gradient, "gradient").ctypes.data == written[0].ctypes.data


def test_upstream_of_a_gather() -> None:
    """Whose gradient is of IndexedSlices."""
    case = of_labels("float32")
    upstream = np.zeros((B, U + 1, E), "f")
    upstream[0], upstream[3] = 2, 1
    inputs = [tf.Variable(each) for each in case.floats]
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(tf.gather(case.function(*inputs, *case.integers), [0, 3, 0]))
    assert all(map(same, tape.gradient(total, inputs), case.core(upstream)[1]))


def test_static_shapes_are_kept() -> None:
    shapes: dict[str, Any] = {}

    @tf.function
    def traced(nll: Any, x: Any, embedding: Any, positions: Any, targets: Any, encoder: Any, predictor: Any) -> Any:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch((nll, x, embedding, positions))
            shapes["embr"] = embr_loss(nll, tf.zeros((B, N)))
            shapes["cost"] = amortized_cost(x, [1.0] * K, tf.ones(B, tf.int32))
            shapes["gate"] = gumbel_gate(x)
            shapes["features"] = reduced_predictor(embedding, positions, targets, tf.zeros(B, tf.int32))
            shapes["row"] = reduced_predictor(embedding, positions, targets, tf.zeros(B, tf.int32), last=True)
        lengths = tf.zeros((B, N), tf.int32)
        shapes["edits"] = edit_distance(tf.zeros((B, N, L), tf.int32), lengths, targets, tf.zeros(B, tf.int32)).total
        index = tf.zeros(B, tf.int32)
        shapes["joint"] = joint_rnnt_loss(encoder, predictor, embedding, None, targets, [T, T], index, encoder_index=index)
        shapes["gradients"] = tape.gradient(shapes["embr"], nll), tape.gradient(shapes["gate"], x), *tape.gradient(shapes["features"], [embedding, positions])
        return shapes["embr"]

    traced.get_concrete_function(
        tf.TensorSpec([B, N], tf.float64), tf.TensorSpec([B, None, K], tf.float16), tf.TensorSpec([V, E], tf.bfloat16),
        tf.TensorSpec([2, 3, E], tf.bfloat16), tf.TensorSpec([B, None], tf.int32), tf.TensorSpec([2, T, E], tf.bfloat16),
        tf.TensorSpec([B, None, E], tf.bfloat16),
    )
    gradients = shapes.pop("gradients")
    assert {name: (each.shape.as_list(), each.dtype.name) for name, each in shapes.items()} == {
        "embr": ([B], "float64"), "cost": ([B], "float32"), "gate": ([B, None, K], "float16"),
        "features": ([B, None, E], "bfloat16"), "row": ([B, E], "bfloat16"), "edits": ([B, N], "int32"), "joint": ([B], "float32"),
    }  # fmt: skip
    assert [each.shape.as_list() for each in gradients] == [[B, N], [B, None, K], [V, E], [2, 3, E]]


def test_noise_is_new_in_every_step() -> None:
    x = tf.zeros((2, 50, K))
    for call in (lambda: gumbel_gate(x), tf.function(lambda: gumbel_gate(x))):
        tf.random.set_seed(0)
        first, second = call(), call()
        assert not np.array_equal(first, second)
    tf.random.set_seed(0)
    assert np.array_equal(call(), first)  # of one trace: TensorFlow's generator is seeded by the operation
    quiet = tf.function(lambda: gumbel_gate(x, noise=False))
    assert np.array_equal(quiet(), np.full((2, 50, K), np.float32(1 / 3)))


def test_backward_has_the_noise_of_forward() -> None:
    """Where no seed is given, too: drawn once for both."""
    x = tf.constant(np.random.default_rng(10).normal(size=(2, 6, K)))
    upstream = np.random.default_rng(11).normal(size=x.shape)

    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            soft = gumbel_gate(x)
        return soft, tape.gradient(soft, x, tf.constant(upstream))

    for call in (step, tf.function(step)):
        soft, gradient = (each.numpy() for each in call(x))
        expected = soft * (upstream - (soft * upstream).sum(-1, keepdims=True))
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)


def test_temperature_of_a_schedule() -> None:
    """A tensor, for which nothing is traced again; a float is the graph's."""
    logits, traces = of_logits("float32").floats[0], []

    @tf.function
    def gate(x: Any, temperature: Any) -> Any:
        traces.append(1)
        return gumbel_gate(x, FRAMES, temperature=temperature, seed=3)

    for temperature in (2.0, 0.5, 0.125):
        expected = tl.gumbel_gate(logits, FRAMES, temperature=temperature, seed=3)
        assert same(gate(tf.constant(logits), tf.constant(temperature)), expected)
        assert same(gumbel_gate(tf.constant(logits), FRAMES, temperature=tf.Variable(temperature), seed=3), expected)
    assert len(traces) == 1


# Errors.


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (lambda: embr_loss(tf.zeros(3), [[1]]), r"nll: expected 2 dimensions \(B, N\), got shape \(3,\)"),
    "distances": (lambda: embr_loss(tf.zeros((1, 2)), [[1, 2, 3]]), r"distances: expected shape \(B, N\) = \(1, 2\), got \(1, 3\)"),
    "reference": (lambda: embr_loss(tf.zeros((1, 2)), [[1, 2]], interpolation=0.5), "reference_nll: expected an array of shape"),
    "lengths": (lambda: embr_loss(tf.zeros((1, 1)), [[1]], hypotheses=[[[1]]]), "hypothesis_lengths: expected an array of shape"),
    "heat": (lambda: embr_loss(tf.zeros((1, 1)), [[1]], temperature=0.0), "temperature: expected more than 0, got 0.0"),
    "raise": (
        lambda: embr_loss(tf.fill((2, 1), np.float32(np.inf)), [[1], [1]], infeasible="raise"), r"for utterances \[0, 1\]"
    ),
    "hypothesis length": (lambda: edit_distance([[1]], [2], [[1]], [1]), r"hypothesis_lengths: expected lengths in \[-1, L = 1\], got 2"),
    "batch": (lambda: edit_distance([[1]], [1], [[1], [2]], [1, 1]), r"references: expected shape \(B, U\) = \(1, U\), got \(2, 1\)"),
    "costs": (lambda: amortized_cost(tf.zeros((1, 2, 3)), [1.0], [2]), r"costs: expected shape \(K,\) = \(3,\), got \(1,\)"),
    "frames": (lambda: amortized_cost(tf.zeros((1, 2, 3)), [1.0] * 3, [0]), r"lengths: expected lengths in \[1, T = 2\], got 0"),
    "period": (lambda: amortized_backlog(tf.zeros((1, 2, 1)), [1.0], [2], frame_period=-1.0), "frame_period: expected 0 or more"),
    "gate": (lambda: gumbel_gate(tf.zeros((1, 2, 3)), temperature=-1.0), "temperature: expected more than 0, got -1.0"),
    "positions": (
        lambda: reduced_predictor(tf.zeros((5, 4)), tf.zeros((1, 2, 3)), [[1]], [1]),
        r"positions: expected shape \(heads, N, E\) = \(1, 2, 4\), got \(1, 2, 3\)",
    ),
    "label": (
        lambda: reduced_predictor(tf.zeros((5, 4)), tf.zeros((1, 2, 4)), [[5]], [1]), r"targets: expected labels in \[0, V = 5\), got 5"
    ),
    "index": (
        lambda: joint_rnnt_loss(tf.zeros((2, 3, 4)), tf.zeros((3, 2, 4)), tf.zeros((5, 4)), None, [[1]] * 3, [3, 3], [1] * 3, encoder_index=[0, 2, 1]),
        r"encoder_index: expected indices in \[0, E - 1 = 1\], got 2 at index 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_teach(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
    # In the same words where only the running graph knows.
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        tf.function(call)()


def test_errors_of_the_trace() -> None:
    """What needs no numbers is told at once."""
    x = tf.zeros((1, 2, 3))
    for call, kind, message in (
        (lambda: embr_loss(tf.zeros((1, 1)), [[1]], infeasible="odd"), ValueError, "infeasible: expected one of 'inf'"),
        (lambda: amortized_backlog(x, [1.0] * 3, [2], statistic="odd"), ValueError, "statistic: expected one of 'mean', 'last'"),
        (lambda: gumbel_gate(x, temperature=[1.0]), ValueError, r"temperature: expected a number, got shape \(1,\)"),
        (lambda: gumbel_gate(x, temperature="warm"), TypeError, "temperature: expected integers or dtype float16"),
        (lambda: gumbel_gate(tf.zeros((1, 2, 3), tf.int32)), TypeError, "logits: expected dtype float16, .* got int32"),
        (lambda: gumbel_gate(x, seed=0.5), TypeError, "seed: expected integers"),
        (lambda: embr_loss(tf.zeros((1, 2)), [[1], [1, 2]]), ValueError, "distances: expected numbers, in rows of one length"),
        (lambda: edit_distance([[1.0]], [1], [[1]], [1]), TypeError, "hypotheses: expected integers, got dtype float64"),
        (lambda: edit_distance(tf.ragged.constant([[1]]), [1], [[1]], [1]), TypeError, "hypotheses: expected a dense tensor"),
        (lambda: amortized_cost(x, tf.ragged.constant([[1.0]]), [2]), TypeError, "costs: expected a dense tensor"),
    ):  # fmt: skip
        for way in (call, tf.function(call).get_concrete_function):
            with pytest.raises(kind, match=message):
                way()
