"""The same calls through every framework: losses and gradients of the same bits, for they are made by the same processor."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import transducer_loss as tl
from helpers import FLOATS, epsilon, expect_close, numpy_dtype, random_targets
from transducer_loss import joint_loss, logits_loss, reference, simple_loss
from transducer_loss.adapters import jax as for_jax
from transducer_loss.adapters import keras as for_keras
from transducer_loss.adapters import tensorflow as for_tensorflow
from transducer_loss.adapters import torch as for_torch

Array = np.ndarray[Any, Any]
Result = tuple[Array, tuple[Array, ...]]

FRAMES, LABELS, CLASSES, FEATURES = np.array([7, 1, 5, 3]), np.array([4, 2, 0, 3]), 11, 6
UPSTREAMS = (np.ones(4), np.array([1.5, -2.0, 0.25, 0.0]))

# What each is called with; `of` names the arrays that it takes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnnt_loss": ("logits", {"blank": -1}),
    "rnnt_loss regularised": ("logits", {"fastemit_lambda": 0.25, "delay_penalty": -0.5, "topology": "constrained", "blank": 3}),
    "rnnt_loss hat": ("logits", {"hat": True, "blank": 10}),
    "rnnt_loss normalized and clamped": ("logits", {"normalized": True, "clamp": 0.125, "infeasible": "zero", "topology": "modified"}),
    "rnnt_loss of a band": ("band", {}),
    "joint_rnnt_loss": ("joint", {"blank": -1, "occupancy_floor": 0.0}),
    "joint_rnnt_loss regularised": ("joint", {"fastemit_lambda": 0.5, "topology": "constrained", "dropout": 0.25, "seed": 5, "activation": "silu"}),
    "joint_rnnt_loss without bias": ("no bias", {"activation": "relu", "hat": True, "blank": 10}),
    "joint_rnnt_loss of a band": ("joint", {"band": "made", "delay_penalty": 0.125}),
    "joint_rnnt_loss of classes": ("joint", {"classes": "made", "occupancy_floor": 0.0}),
    "simple_rnnt_loss": ("simple", {"blank": -1}),
    "simple_rnnt_loss smoothed": ("simple", {"lm_only_scale": 0.25, "am_only_scale": 0.125, "fastemit_lambda": 0.25}),
    "joint_rnnt_loss of shared encoders": ("shared", {"blank": -1, "activation": "gelu"}),
    "embr_loss": ("lists", {"temperature": 1.5, "interpolation": 0.25, "blank": 3}),
    "reduced_predictor": ("vectors", {}),
    "reduced_predictor of last rows": ("vectors", {"last": True}),
    "amortized_cost": ("gates", {"costs": [2.25, 0.1, 0.7]}),
    "amortized_backlog": ("gates", {"durations": [2.25, 0.1, 0.7], "frame_period": 0.6}),
    "amortized_backlog at the end": ("gates", {"durations": [2.25, 0.1, 0.7], "frame_period": 0.6, "statistic": "last"}),
    "gumbel_gate": ("gates", {"temperature": 0.7, "seed": 5}),
    "gumbel_gate hard": ("gates", {"temperature": 0.7, "seed": 5, "hard": True}),
}

# The last of a kind's arrays, which are given by name.
NAMED = {
    "shared": ("encoder_index",), "lists": ("reference_nll", "distances", "hypotheses", "hypothesis_lengths"),
    "gates": ("lengths",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Call:
    """A function, and what it is called with: floats of a dtype, lengths of which some are 1 and 0, NaN in the padding."""

    function: str
    floats: tuple[Array | None, ...]
    integers: tuple[Array, ...]
    options: dict[str, Any]
    named: tuple[str, ...]

    @classmethod
    @functools.cache
    def of(cls, variant: str, dtype: str) -> Call:
        """The same numbers in every run."""
        kind, options = VARIANTS[variant]
        rng = np.random.default_rng(list(VARIANTS).index(variant))
        B, T, U1 = len(FRAMES), FRAMES.max() + 1, LABELS.max() + 2
        blank = options.get("blank", 0) % CLASSES
        targets = random_targets(rng, LABELS, U1, CLASSES, blank if options.get("hat") else None)
        integers: tuple[Array, ...] = (targets, FRAMES, LABELS)
        if kind == "shared":
            integers = (targets, FRAMES[[0, 2]], LABELS, np.array([1, 0, 0, 1]))
        band = tl.Band(*_band())
        shapes = {
            "logits": [(B, T, U1, CLASSES)], "band": [(B, T, band.width, CLASSES)], "simple": [(B, T, CLASSES), (B, U1, CLASSES)],
            "joint": [(B, T, FEATURES), (B, U1, FEATURES), (CLASSES, FEATURES), (CLASSES,)],
        }
        shapes |= {
            "no bias": shapes["joint"][:3], "shared": [(2, T, FEATURES), *shapes["joint"][1:]], "lists": [(B, 4), (B,)],
            "vectors": [(CLASSES, FEATURES), (2, 3, FEATURES)], "gates": [(B, T, 3)],
        }  # fmt: skip
        arrays = [rng.normal(size=shape) for shape in shapes[kind]]
        if options.get("normalized"):
            arrays[0] -= np.logaddexp.reduce(arrays[0], axis=-1, keepdims=True)
        if kind == "lists":
            integers = _lists(rng)
            arrays[0][integers[-1] < 0] = np.nan
        elif kind == "vectors":
            integers = (targets, LABELS)
        else:
            for b, count in enumerate(integers[1]):
                arrays[0][b, count:] = np.nan
            for b, length in enumerate(LABELS):
                if kind == "logits":
                    arrays[0][b, :, length + 1 :] = np.nan
                elif kind not in ("band", "gates"):
                    arrays[1][b, length + 1 :] = np.nan
            integers = (FRAMES,) if kind == "gates" else integers
        made: dict[str, Any] = {"band": band} if kind == "band" or "band" in options else {}
        if "classes" in options:
            made["classes"] = tl.sample_classes(targets, LABELS, vocab_size=CLASSES, num_samples=2, correction=True)
        floats: list[Array | None] = [array.astype(numpy_dtype(dtype)) for array in arrays]
        return cls(
            variant.split()[0], (*floats, *[None] * (kind == "no bias")), integers, {**options, **made}, NAMED.get(kind, ())
        )  # fmt: skip

    def arguments(self, floats: Any, integers: Any) -> tuple[list[Any], dict[str, Any]]:
        """A framework's arrays as the function takes them: by position, and by name."""
        arrays = [*floats, *integers]
        count = len(arrays) - len(self.named)
        return arrays[:count], dict(zip(self.named, arrays[count:], strict=True))

    def made_by(self, module: Any, floats: Any, integers: Any, **options: Any) -> Any:
        """The result of a framework's function, without the occupancies or gradients that come with it."""
        arguments, named = self.arguments(floats, integers)
        result = getattr(module, self.function)(*arguments, **named, **options)
        return result[0] if isinstance(result, tuple) else result

    def upstream(self, weights: Array) -> Array:
        """The gradient that comes back to the result, of a weight for each utterance; exact in every dtype."""
        shape = self.made_by(tl, self.floats, self.integers, **self.options).shape
        each = 1 + np.arange(int(np.prod(shape[1:]))).reshape(shape[1:]) % 5 / 4
        return weights.reshape(-1, *[1] * len(shape[1:])) * each

    @property
    def inputs(self) -> list[Array]:
        """The floats that there are."""
        return [array for array in self.floats if array is not None]

    @property
    def all_options(self) -> dict[str, Any]:
        """With the defaults that the core's inner functions have none for."""
        defaults = {
            "blank": 0, "topology": "regular", "fastemit_lambda": 0.0, "delay_penalty": 0.0, "infeasible": "inf",
            **({} if self.function == "simple_rnnt_loss" else {"hat": False}),
            **({"normalized": False} if self.function == "rnnt_loss" else {}),
        }  # fmt: skip
        return {**defaults, **self.options}


def _lists(rng: np.random.Generator) -> tuple[Array, ...]:
    """Distances, labels and lengths of N-best lists with padding, an empty hypothesis, and some that come twice."""
    hypotheses, lengths = rng.integers(0, CLASSES, (4, 4, 5)), np.array([[4, 0, 4, -1], [3, 2, 2, 1], [-1, 1, 5, 5], [2] * 4])
    hypotheses[0, 2], hypotheses[3] = hypotheses[0, 0], hypotheses[3, 0]
    hypotheses[np.arange(5) >= lengths[..., None]] = -1
    return rng.integers(0, 6, (4, 4)), hypotheses, lengths


def _band() -> tuple[Any, ...]:
    T = FRAMES.max() + 1
    row = np.minimum(np.arange(T), FRAMES[:, None] - 1)
    first = np.minimum(row // 2, np.maximum(LABELS - 2, 0)[:, None]).astype(np.int32)
    return first, np.minimum(first + 3, LABELS[:, None] + 1).astype(np.int32), 3, FRAMES, LABELS, 3


def with_numpy(call: Call, upstream: Array) -> Result:
    """By the core alone, in the two steps that frameworks take: the losses, then the gradient with the true upstream weights."""
    arguments, named = call.arguments(call.floats, call.integers)
    if call.function in ("rnnt_loss", "embr_loss", "amortized_cost", "amortized_backlog"):
        loss, gradient = getattr(tl, call.function)(*arguments, **named, weights=upstream, **call.options)
        return loss, _gradients(gradient)
    if call.function in ("reduced_predictor", "gumbel_gate"):
        result = call.made_by(tl, call.floats, call.integers, **call.options)
        options = {name: value for name, value in call.options.items() if name != "hard"}
        backward = getattr(tl, f"{call.function}_backward")
        return result, _gradients(backward(upstream.astype(result.dtype), *arguments, **named, **options))
    if call.function == "joint_rnnt_loss":
        joint = joint_loss.problem(*arguments, **named, **call.all_options)
        done = joint_loss.forward(joint, later=True)
        sums = joint_loss.backward(joint, done, logits_loss.weights_of(joint, upstream)).native
        return done.native, tuple(total.astype(call.inputs[0].dtype) for total in sums if total is not None)
    # Each utterance's gradient is its own: it is made with the loss, and multiplied later.
    found = simple_loss.forward(simple_loss.problem(*arguments, **call.all_options))
    weights = upstream.astype(found.loss.dtype)[:, None, None]
    assert found.gradients is not None
    return found.loss, tuple((total * weights).astype(call.inputs[0].dtype) for total in found.gradients)


def _gradients(found: Any) -> tuple[Array, ...]:
    """By each of the inputs."""
    return tuple(vars(found).values()) if dataclasses.is_dataclass(found) else (found,)


def of_torch(array: Array) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.view(torch.int16).numpy().view(numpy_dtype("bfloat16")) if value.dtype == torch.bfloat16 else value.numpy()
    return np.asarray(value)


def with_torch(call: Call, upstreams: tuple[Array, ...]) -> list[Result]:
    tensors = [None if array is None else of_torch(array).requires_grad_() for array in call.floats]
    integers = [torch.from_numpy(array) for array in call.integers]
    reduced = {"reduction": "none"} if "reduction" in inspect.signature(getattr(for_torch, call.function)).parameters else {}
    loss = call.made_by(for_torch, tensors, integers, **reduced, **call.options)
    inputs = [tensor for tensor in tensors if tensor is not None]
    return [
        (to_numpy(loss), tuple(map(to_numpy, torch.autograd.grad(loss, inputs, of_torch(upstream).to(loss.dtype), retain_graph=True))))
        for upstream in upstreams
    ]  # fmt: skip


def with_tensorflow(call: Call, upstreams: tuple[Array, ...], graph: bool) -> list[Result]:
    options = dict(call.options)

    def losses(upstreams: Any, integers: Any, *inputs: Any) -> Any:
        given = [*inputs, *[None] * (len(call.floats) - len(inputs))]
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(inputs)
            loss = call.made_by(for_tensorflow, given, integers, **options)
        return loss, [tape.gradient(loss, inputs, tf.cast(upstream, loss.dtype)) for upstream in upstreams]

    run = tf.function(losses) if graph else losses
    loss, gradients = run(
        [tf.constant(each) for each in upstreams], [tf.constant(each) for each in call.integers], *map(tf.constant, call.inputs)
    )  # fmt: skip
    return [(loss.numpy(), tuple(each.numpy() for each in some)) for some in gradients]


def with_jax(call: Call, upstreams: tuple[Array, ...], jit: bool) -> list[Result]:
    # As arguments, not as constants of the function: what is passed to jit is traced.
    arrays = {name: call.options[name] for name in ("band", "classes") if name in call.options}
    options = {name: value for name, value in call.options.items() if name not in arrays}

    def losses(inputs: Any, integers: Any, arrays: Any, upstreams: Any) -> Any:
        def function(inputs: Any) -> Any:
            given = [*inputs, *[None] * (len(call.floats) - len(inputs))]
            return call.made_by(for_jax, given, integers, **arrays, **options)

        loss, gradients = jax.vjp(function, inputs)
        return loss, [gradients(upstream.astype(loss.dtype))[0] for upstream in upstreams]

    with jax.enable_x64(call.inputs[0].dtype == np.float64):
        run = jax.jit(losses) if jit else losses
        integers = [jnp.asarray(each) for each in call.integers]
        loss, gradients = run([jnp.asarray(each) for each in call.inputs], integers, arrays, [jnp.asarray(each) for each in upstreams])
    return [(to_numpy(loss), tuple(map(to_numpy, some))) for some in gradients]


def with_keras(call: Call, upstreams: tuple[Array, ...]) -> list[Result]:
    """`RNNTLoss` with a mask for the lengths, `RNNTJoint` with variables for the output layer."""
    targets, frames, labels = call.integers
    inputs = [tf.constant(array) for array in call.inputs]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        if call.function == "rnnt_loss":
            # Padded to what the logits have room for.
            padded = np.where(np.arange(targets.shape[1]) < labels[:, None], targets, -1)
            logits = tf.identity(inputs[0])
            logits._keras_mask = tf.sequence_mask(frames, logits.shape[1])
            loss = for_keras.RNNTLoss(reduction="none", **call.options)(padded, logits)
        else:
            options = dict(call.options)
            joint = for_keras.RNNTJoint(
                CLASSES, activation=options.pop("activation", "tanh"), dropout=options.pop("dropout", 0.0),
                use_bias=len(inputs) > 3, dtype=call.inputs[0].dtype.name, loss_options=options, autocast=False,
            )  # fmt: skip
            joint.build(inputs[0].shape, inputs[1].shape)
            joint.set_weights(call.inputs[2:])
            loss = joint(
                *inputs[:2], targets=tf.constant(targets), encoder_lengths=frames, target_lengths=labels, training=True
            )  # fmt: skip
            inputs[2:] = [variable.value for variable in joint.trainable_variables]
    return [
        (loss.numpy(), tuple(each.numpy() for each in tape.gradient(loss, inputs, tf.cast(upstream, loss.dtype))))
        for upstream in upstreams
    ]  # fmt: skip


FRAMEWORKS: dict[str, Callable[[Call, tuple[Array, ...]], list[Result]]] = {
    "torch": with_torch,
    "tensorflow": functools.partial(with_tensorflow, graph=False),
    "tf.function": functools.partial(with_tensorflow, graph=True),
    "keras": with_keras,
    "jax": functools.partial(with_jax, jit=False),
    "jax.jit": functools.partial(with_jax, jit=True),
}


# Whose reference takes what the function takes, and gives gradients of weighted sums.
LATTICES = ("logits", "band", "joint", "no bias", "simple")


def _cases() -> list[Any]:
    return [
        pytest.param(framework, variant, id=f"{framework}-{variant}")
        for framework in FRAMEWORKS
        for variant, (kind, _) in VARIANTS.items()
        if framework != "keras" or (kind in ("logits", "joint", "no bias") and " of " not in variant)
    ]


def expect_bits(got: Array, expected: Array) -> None:
    assert got.dtype == expected.dtype
    # Zeros of either sign are zeros.
    np.testing.assert_array_equal(np.where(got == 0, 0, got).astype(got.dtype), np.where(expected == 0, 0, expected).astype(got.dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("framework", "variant"), _cases())
def test_same_bits(framework: str, variant: str, dtype: str) -> None:
    call = Call.of(variant, dtype)
    # Backward as often as there are upstream weights, and once more, which is to change nothing.
    upstreams = tuple(call.upstream(weights) for weights in (*UPSTREAMS, UPSTREAMS[0]))
    for upstream, (loss, gradients) in zip(upstreams, FRAMEWORKS[framework](call, upstreams), strict=True):
        wanted, wanted_gradients = with_numpy(call, upstream)
        expect_bits(loss, wanted)
        for got, expected in zip(gradients, wanted_gradients, strict=True):
            expect_bits(got, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("variant", [variant for variant, (kind, _) in VARIANTS.items() if kind in LATTICES])
def test_the_numbers_are_right(variant: str, dtype: str) -> None:
    """Those of the core, which all frameworks agree with, against the float64 reference; of others each has tests of its own."""
    call = Call.of(variant, dtype)
    options = {name: value for name, value in call.options.items() if name not in ("band", "classes", "dropout", "seed", "occupancy_floor")}
    if "dropout" in call.options:
        return  # tests/test_joint_loss.py compares the mask
    if "band" in call.options:
        options |= {"first": call.options["band"].first, "end": call.options["band"].end}
        options |= {"width": call.options["band"].width} if call.function == "joint_rnnt_loss" else {}
    if "classes" in call.options:
        classes = call.options["classes"]
        options |= {"classes": classes.ids, "offset": -np.log(classes.probability.astype(np.float64))}
    floats = [None if array is None else array.astype(np.float64) for array in call.floats]
    loss, gradients, *_ = getattr(reference, call.function)(*floats, *call.integers, weights=UPSTREAMS[1], **options)
    got, got_gradients = with_numpy(call, UPSTREAMS[1])
    real = got.dtype.name
    expect_close(got, loss, 100 * epsilon(real) * (1 + np.abs(np.where(np.isfinite(loss), loss, 0))))
    exact = [each for each in (gradients if isinstance(gradients, tuple) else (gradients,)) if each is not None]
    for one, other in zip(got_gradients, exact, strict=True):
        expect_close(one, other, 1000 * epsilon(real) * (1 + np.abs(other).max()))


def test_bands_and_classes_are_the_same() -> None:
    """What is drawn and pruned in one framework is what is drawn and pruned in all."""
    call = Call.of("simple_rnnt_loss", "float32")
    am, lm = call.inputs
    targets, frames, labels = call.integers
    occupancy = tl.simple_rnnt_loss(*call.inputs, *call.integers)[2]
    band = tl.prune(occupancy, frames, labels, s_range=3, strategy="optimal")
    counts = np.arange(1, CLASSES + 1)
    sampling = {"vocab_size": CLASSES, "num_samples": 4, "proposal": "unigram", "scope": "utterance", "seed": 3, "step": 2}
    classes = tl.sample_classes(targets, labels, counts=counts, **sampling)
    slots = tl.labels_in(classes, targets, labels)
    rows = tl.gather_predictor(lm, band)
    for module, convert in (
        (for_torch, torch.from_numpy), (for_tensorflow, tf.constant), (for_jax, jnp.asarray),
    ):  # fmt: skip
        found = module.simple_rnnt_loss(convert(am), convert(lm), *call.integers)[1]
        for name in ("blank", "label"):
            expect_bits(to_numpy(getattr(found, name)), getattr(occupancy, name))
        pruned = module.prune(found, frames, labels, s_range=3, strategy="optimal")
        drawn = module.sample_classes(convert(targets), labels, counts=convert(counts), **sampling)
        assert int(pruned.width) == band.width
        for name in ("first", "end", "mass"):
            expect_bits(to_numpy(getattr(pruned, name)), getattr(band, name))
        for name in ("ids", "probability"):
            expect_bits(to_numpy(getattr(drawn, name)), getattr(classes, name))
        found_slots = to_numpy(module.labels_in(drawn, convert(targets), labels))
        np.testing.assert_array_equal(found_slots[:, : slots.shape[1]], slots)
        assert (found_slots[:, slots.shape[1] :] == -1).all()
        expect_bits(to_numpy(module.gather_predictor(convert(lm), pruned)), rows)


def test_edit_distances_are_the_same() -> None:
    call = Call.of("embr_loss", "float32")
    _, hypotheses, lengths = call.integers
    references = Call.of("reduced_predictor", "float32").integers
    expected = tl.edit_distance(hypotheses, lengths, *references, blank=3)
    for module, convert in (
        (for_torch, torch.from_numpy), (for_tensorflow, tf.constant), (for_jax, jnp.asarray),
    ):  # fmt: skip
        found = module.edit_distance(*map(convert, (hypotheses, lengths, *references)), blank=3)
        assert isinstance(found, module.EditDistance)
        for name in ("total", "insertions", "deletions", "substitutions"):
            expect_bits(to_numpy(getattr(found, name)), getattr(expected, name))


def test_any_joint_network() -> None:
    """`samplewise_rnnt_loss`, whose matrix products are each framework's own: the numbers are the same but for rounding."""
    call = Call.of("joint_rnnt_loss", "float64")
    encoder, predictor, weight, bias = call.inputs
    wanted, gradients = with_numpy(call, np.full(4, 0.25))

    tensors = [of_torch(array).requires_grad_() for array in call.inputs]
    loss = for_torch.samplewise_rnnt_loss(
        lambda e, p: torch.tanh(e + p) @ tensors[2].T + tensors[3], *tensors[:2], *map(torch.from_numpy, call.integers),
        parameters=tensors[2:], blank=-1,
    )  # fmt: skip
    found = {"torch": (loss, torch.autograd.grad(loss, tensors))}

    variables = [tf.Variable(array) for array in call.inputs]
    with tf.GradientTape() as tape:
        losses = for_tensorflow.samplewise_rnnt_loss(
            lambda e, p: tf.tensordot(tf.tanh(e + p), tf.transpose(variables[2]), 1) + variables[3], *variables[:2],
            *map(tf.constant, call.integers), parameters=variables[2:], blank=-1,
        )  # fmt: skip
        mean = tf.reduce_mean(losses)
    found["tensorflow"] = mean, tape.gradient(mean, variables)

    with jax.enable_x64(True):
        def mean_loss(encoder: Any, predictor: Any, layer: Any) -> Any:
            return for_jax.samplewise_rnnt_loss(
                lambda layer, e, p: jnp.tanh(e + p) @ layer[0].T + layer[1], layer, encoder, predictor, *call.integers, blank=-1
            ).mean()  # fmt: skip

        value, (d_encoder, d_predictor, d_layer) = jax.value_and_grad(mean_loss, (0, 1, 2))(
            jnp.asarray(encoder), jnp.asarray(predictor), (jnp.asarray(weight), jnp.asarray(bias))
        )
        found["jax"] = value, (d_encoder, d_predictor, *d_layer)
        for _, (value, some) in found.items():
            np.testing.assert_allclose(to_numpy(value), wanted.mean(), rtol=1e-12)
            for got, expected in zip(some, gradients, strict=True):
                np.testing.assert_allclose(to_numpy(got), expected, rtol=1e-9, atol=1e-12)


def test_keras_is_on_tensorflow() -> None:
    assert keras.backend.backend() == "tensorflow"
