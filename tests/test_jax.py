"""The functions for JAX: the same numbers as the core's, bit by bit, under every transformation of JAX."""

import contextlib
import dataclasses
import functools
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import transducer_loss as tl
from helpers import FLOATS, TOPOLOGIES, expect_close, numpy_dtype, random_batch, run_python
from transducer_loss import joint_loss, logits_loss, reference, simple_loss

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from transducer_loss.adapters.jax import (  # noqa: E402
    amortized_backlog,
    amortized_cost,
    embr_loss,
    gather_predictor,
    gumbel_gate,
    joint_rnnt_loss,
    labels_in,
    prune,
    reduced_predictor,
    rnnt_loss,
    sample_classes,
    samplewise_rnnt_loss,
    simple_rnnt_loss,
)
from transducer_loss.adapters.jax import callback as jax_callback  # noqa: E402
from transducer_loss.adapters.jax import given as jax_given  # noqa: E402
from transducer_loss.adapters.jax import joint as jax_joint  # noqa: E402
from transducer_loss.adapters.jax import logits as jax_logits  # noqa: E402

TWICE = "cannot be differentiated twice"


def wide(dtype):
    """JAX has float64 where it is told so."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def same(actual, expected):
    """Raise unless arrays have the same dtype and bits; NaN equals NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def weights_for(count, dtype="float32"):
    """Upstream gradients of any sign, one of them 0."""
    weights = np.array([1.0, -0.75, 0.0, 2.5, -3.0, 0.125])[:count]
    return weights.astype("float64" if dtype == "float64" else "float32")


@functools.cache
def arguments(dtype, seed=0, topology="regular", **keywords):
    """A ragged batch: of one frame, of no label, NaN in the padding, -1 past U_b."""
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, dtype, topology, most=(5, 7, 4, 9), **keywords)
    while len(batch.frames) < 3 or batch.logits.shape[2] < 3:
        batch = random_batch(rng, dtype, topology, most=(5, 7, 4, 9), **keywords)
    return batch


def joint_arguments(dtype, seed=0, bias=True):
    rng = np.random.default_rng(seed)
    frames, labels = np.array([9, 1, 6, 9]), np.array([4, 0, 4, 2])
    encoder, predictor = rng.normal(size=(4, 9, 6)), rng.normal(size=(4, 5, 6))
    for b in range(4):
        encoder[b, frames[b] :] = predictor[b, labels[b] + 1 :] = np.nan
    inputs = [each.astype(numpy_dtype(dtype)) for each in (encoder, predictor, rng.normal(size=(11, 6)), rng.normal(size=11))]
    targets = rng.integers(0, 11, (4, 4))
    targets[np.arange(4) >= labels[:, None]] = -1
    return (*inputs[:3], inputs[3] if bias else None), (targets, frames, labels)


def weighted(loss, weights):
    """Losses, and the gradient of their weighted sum, by vjp."""

    def of(*floats):
        value, pull = jax.vjp(loss, *floats)
        return value, pull(jnp.asarray(weights))

    return of


def core_joint(inputs, batch, weights, **options):
    """Loss and gradients by the core in the two calls that the adapter makes, cast as the inputs are."""
    of = joint_loss.problem(*inputs, *batch, **{**CORE, **options})
    done = joint_loss.forward(of, later=True)
    sums = joint_loss.backward(of, done, logits_loss.weights_of(of, weights)).native
    return done.native, [None if each is None else each.astype(inputs[0].dtype) for each in sums]


CORE = {
    "blank": 0, "topology": "regular", "fastemit_lambda": 0.0, "delay_penalty": 0.0, "hat": False, "infeasible": "inf",
}  # fmt: skip


class TestLogits:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("jitted", [False, True])
    def test_bits_of_the_core(self, dtype, jitted):
        batch = arguments(dtype)
        weights = weights_for(len(batch.frames), dtype)
        with wide(dtype):
            numbers = [jnp.asarray(each) for each in batch.arguments[1:]]

            def run(logits, *numbers):
                return weighted(lambda x: rnnt_loss(x, *numbers, blank=batch.blank), weights)(logits)

            loss, (gradient,) = (jax.jit(run) if jitted else run)(jnp.asarray(batch.logits), *numbers)
        expected, grad = tl.rnnt_loss(*batch.arguments, blank=batch.blank, weights=weights)
        same(loss, expected)
        same(gradient, grad)

    def test_float64_loops(self):
        batch = arguments("float32", seed=3)
        exact = reference.rnnt_loss(*batch.arguments, blank=batch.blank)
        loss, gradient = jax.value_and_grad(lambda x: rnnt_loss(x, *batch.arguments[1:], blank=batch.blank).sum())(batch.logits)
        assert np.isfinite(exact[0]).all()
        expect_close(np.float32(loss), exact[0].sum(), 1e-5 * abs(exact[0]).sum())
        expect_close(np.asarray(gradient), exact[1], 1e-5)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(
        "options",
        [
            {"topology": "modified", "fastemit_lambda": 0.3},
            {"topology": "constrained", "delay_penalty": -0.2},
            {"hat": True},
            {"normalized": True, "infeasible": "zero"},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_options(self, dtype, options):
        batch = arguments(
            dtype, 5, options.get("topology", "regular"), hat="hat" in options, normalized="normalized" in options
        )
        options = {**options, "blank": batch.blank}
        weights = weights_for(len(batch.frames))
        loss, (gradient,) = jax.jit(weighted(lambda x: rnnt_loss(x, *batch.arguments[1:], **options), weights))(batch.logits)
        expected, grad = tl.rnnt_loss(*batch.arguments, **options, weights=weights)
        same(loss, expected)
        same(gradient, grad)

    @pytest.mark.parametrize("jitted", [False, True])
    def test_packed(self, jitted):
        batch = arguments("float32", seed=1)
        packed = batch.logits[batch.real]

        def run(logits, *numbers):
            return weighted(lambda x: rnnt_loss(x, *numbers, blank=batch.blank), weights_for(len(batch.frames)))(logits)

        loss, (gradient,) = (jax.jit(run) if jitted else run)(packed, *batch.arguments[1:])
        expected, grad = tl.rnnt_loss(
            packed, *batch.arguments[1:], blank=batch.blank, weights=weights_for(len(batch.frames))
        )
        same(loss, expected)
        same(gradient, grad)

    def test_lists_and_kinds_of_integers(self):
        logits, expected = np.zeros((2, 4, 3, 5), "f"), tl.rnnt_loss(np.zeros((2, 4, 3, 5), "f"), [[1, 2], [3, 0]], [4, 3], [2, 1])
        for kind in (np.int64, np.int32, np.uint16, np.int8):
            targets = np.array([[1, 2], [3, 0]], kind)
            same(rnnt_loss(logits, targets, np.array([4, 3], kind), [2, 1]), expected[0])
        same(jax.jit(rnnt_loss)(logits, np.array([[1, 2], [3, 0]], np.uint16), [4, 3], [2, 1]), expected[0])
        same(rnnt_loss(logits.tolist(), [[1, 2], [3, 0]], [4, 3], (2, 1)), expected[0])
        same(jax.jit(lambda n: rnnt_loss(logits, [[1, 2], [3, 0]], [n, n - 1], [2, 1]))(4), expected[0])
        same(rnnt_loss(logits[:, :, :1], [[], []], [4, 3], [0, 0]), tl.rnnt_loss(logits[:, :, :1], [[], []], [4, 3], [0, 0])[0])

    def test_strided_numpy(self):
        batch = arguments("float32", seed=2)
        turned = np.asfortranarray(batch.logits)
        same(rnnt_loss(turned, *batch.arguments[1:], blank=batch.blank), tl.rnnt_loss(*batch.arguments, blank=batch.blank)[0])

    def test_an_utterance_that_is_not_finite(self):
        batch = arguments("float32", seed=4, impossible=0.0)
        logits = batch.logits.copy()
        logits[1, 0, 0, 0] = np.nan
        loss, (gradient,) = weighted(
            lambda x: rnnt_loss(x, *batch.arguments[1:], blank=batch.blank), np.full(len(batch.frames), np.inf, "f")
        )(logits)
        assert np.isnan(loss[1]) and np.isfinite(np.delete(loss, 1)).all()
        assert not np.asarray(gradient[1]).any()

    def test_backward_twice(self):
        batch = arguments("float32")
        value, pull = jax.vjp(lambda x: rnnt_loss(x, *batch.arguments[1:], blank=batch.blank), jnp.asarray(batch.logits))
        ones = jnp.ones_like(value)
        first, negative, second = (pull(sign * ones)[0] for sign in (1, -1, 1))
        same(second, first)
        same(-negative, first)

    def test_no_gradient_work_without_a_gradient(self, monkeypatch):
        kept = []
        forward = logits_loss.forward
        monkeypatch.setattr(logits_loss, "forward", lambda of, keep: kept.append(keep) or forward(of, keep=keep))
        batch = arguments("float32")
        call = functools.partial(rnnt_loss, targets=batch.targets, logit_lengths=batch.frames, target_lengths=batch.labels)
        jax.block_until_ready((call(batch.logits), jax.jit(call)(batch.logits)))
        assert kept == [False, False]
        jax.block_until_ready(jax.grad(lambda x: call(x).sum())(batch.logits))
        assert kept == [False, False, True]

    def test_bad_numbers_while_they_are_known(self):
        logits = jnp.zeros((2, 4, 3, 5))
        with pytest.raises(ValueError, match=r"logit_lengths: expected lengths in \[1, T = 4\], got 5 at index 1"):
            rnnt_loss(logits, [[1, 2], [1, 2]], [4, 5], [2, 2])
        with pytest.raises(ValueError, match=r"target_lengths: .*got 3 at index 0"):
            rnnt_loss(logits, [[1, 2], [1, 2]], jnp.array([4, 4]), jnp.array([3, 2]))
        with pytest.raises(ValueError, match=r"targets: expected labels in \[0, V = 5\), got 5 at index \(1, 0\)"):
            jax.jit(lambda x: rnnt_loss(x, [[1, 2], [5, 2]], [4, 4], [2, 2]))(logits)
        with pytest.raises(ValueError, match="got 4294967297 at"):  # which 32 bits would make a 1 of
            rnnt_loss(logits, np.array([[1, 2], [(1 << 32) + 1, 2]]), [4, 4], [2, 2])

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"frames": [4, 5]}, "logit_lengths: expected lengths in"),
            ({"frames": [4, 0]}, "logit_lengths: expected lengths in"),
            ({"frames": [4, -(1 << 31)]}, "logit_lengths: expected lengths in"),
            ({"labels": [2, 3]}, "target_lengths: expected lengths in"),
            ({"labels": [2, -1]}, "target_lengths: expected lengths in"),
            ({"targets": [[1, 2], [-1, 2]]}, "targets: expected labels in"),
            ({"targets": [[1, 2], [1, 5]]}, "targets: expected labels in"),
            ({"targets": [[1, 2], [0, 2]], "hat": True}, "targets: expected no blank"),
        ],
        ids=str,
    )
    def test_bad_numbers_within_jit(self, change, words):
        """NaN and no gradient for that utterance; with validate=True an error that names the argument."""
        logits = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype("f")
        numbers = {"targets": [[1, 2], [1, 2]], "frames": [4, 4], "labels": [2, 2], **change}
        hat = numbers.pop("hat", False)
        numbers = [jnp.array(each, jnp.int32) for each in numbers.values()]
        def run(logits, *numbers):
            return weighted(lambda x: rnnt_loss(x, *numbers, hat=hat), np.full(2, -2.0, "f"))(logits)

        call = jax.jit(run)
        loss, (gradient,) = call(logits, *numbers)
        assert np.isnan(loss[1]) and not np.asarray(gradient[1]).any()
        expected, grad = tl.rnnt_loss(logits[:1], [[1, 2]], [4], [2], hat=hat, weights=[-2.0])
        same(loss[:1], expected)
        same(gradient[:1], grad)
        checked = jax.jit(functools.partial(rnnt_loss, hat=hat, validate=True))
        with pytest.raises(jax.errors.JaxRuntimeError, match=words):
            checked(logits, *numbers).block_until_ready()
        same(call(logits, jnp.array([[1, 2], [1, 2]]), jnp.array([4, 4]), jnp.array([2, 2]))[0][:1], expected)

    @pytest.mark.parametrize("frames", [[5, 4], [4, 3], [99, 4], [0, 0]])
    def test_bad_numbers_of_packed_cells(self, frames):
        """Nobody's cells can be found."""
        loss, gradient = jax.jit(
            lambda x, n: jax.value_and_grad(lambda x: rnnt_loss(x, [[1, 2], [1, 0]], n, [2, 1]).sum())(x)
        )(jnp.ones((4 * 3 + 4 * 2, 5)), jnp.array(frames))  # fmt: skip
        assert np.isnan(loss) and not np.asarray(gradient).any()

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_clamp(self, dtype):
        batch = arguments(dtype)
        options = {"blank": batch.blank, "clamp": 0.0625}
        weights = weights_for(len(batch.frames))
        loss, (gradient,) = jax.jit(weighted(lambda x: rnnt_loss(x, *batch.arguments[1:], **options), weights))(batch.logits)
        expected, grad = tl.rnnt_loss(*batch.arguments, **options, weights=weights)
        same(loss, expected)
        same(gradient, grad)
        assert (grad != tl.rnnt_loss(*batch.arguments, blank=batch.blank, weights=weights)[1]).any()

    def test_no_path(self):
        logits, rest = jnp.zeros((2, 2, 4, 5)), ([[1, 2, 3]] * 2, [2, 2], [3, 1])
        assert np.isposinf(rnnt_loss(logits, *rest, topology="modified")[0])
        gradient = jax.grad(lambda x: rnnt_loss(x, *rest, topology="modified", infeasible="zero").sum())(logits)
        assert not np.asarray(gradient[0]).any() and np.asarray(gradient[1]).any()
        with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape("targets: expected a path for every utterance")):
            rnnt_loss(logits, *rest, topology="modified", infeasible="raise").block_until_ready()

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"logits": jnp.zeros((2, 4, 3))}, ValueError, "logits: expected 4 dimensions"),
            ({"logits": jnp.zeros((2, 4, 3, 5), int)}, TypeError, "logits: expected dtype"),
            ({"logits": jnp.zeros((2, 0, 3, 5))}, ValueError, "logits: expected at least one"),
            ({"targets": jnp.zeros((3, 2), int)}, ValueError, "targets: expected shape"),
            ({"targets": jnp.zeros((2, 2))}, TypeError, "targets: expected integers"),
            ({"frames": jnp.zeros((3,), int)}, ValueError, "logit_lengths: expected shape"),
            ({"frames": jnp.zeros((2,))}, TypeError, "logit_lengths: expected integers"),
            ({"labels": jnp.zeros((2, 1), int)}, ValueError, "target_lengths: expected shape"),
            ({"blank": 5}, ValueError, "blank: expected a class"),
            ({"topology": "other"}, ValueError, "topology: expected one of"),
            ({"fastemit_lambda": jnp.ones(())}, TypeError, "fastemit_lambda: expected a number"),
            ({"band": 3}, TypeError, "band: expected a Band"),
        ],
        ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
    )
    def test_checked_while_tracing(self, change, error, words):
        values = {
            "logits": jnp.zeros((2, 4, 3, 5)), "targets": jnp.ones((2, 2), int), "frames": jnp.full(2, 4),
            "labels": jnp.full(2, 2), **change,
        }  # fmt: skip
        options = {key: value for key, value in values.items() if key not in ("logits", "targets", "frames", "labels")}
        with pytest.raises(error, match=words):
            jax.eval_shape(
                lambda *inputs: rnnt_loss(*inputs, **options), *(values[key] for key in ("logits", "targets", "frames", "labels"))
            )

    def test_no_array(self):
        with pytest.raises(TypeError, match="logits: expected an array, got str"):
            rnnt_loss("logits", [[1]], [1], [1])


class TestJoint:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("jitted", [False, True])
    def test_bits_of_the_core(self, dtype, jitted):
        inputs, batch = joint_arguments(dtype)
        weights = weights_for(4, dtype)
        with wide(dtype):

            def run(inputs, *batch):
                return weighted(lambda *inputs: joint_rnnt_loss(*inputs, *batch, blank=-1), weights)(*inputs)

            loss, gradients = (jax.jit(run) if jitted else run)(jax.tree.map(jnp.asarray, inputs), *map(jnp.asarray, batch))
        expected, grads = core_joint(inputs, batch, weights, blank=-1)
        same(loss, expected)
        for actual, grad in zip(gradients, grads, strict=True):
            same(actual, grad)

    def test_float64_loops(self):
        inputs, batch = joint_arguments("float32", bias=False)
        weights = weights_for(4)
        loss, gradients = weighted(lambda *inputs: joint_rnnt_loss(*inputs, None, *batch, occupancy_floor=0), weights)(*inputs[:3])
        exact, grads = reference.joint_rnnt_loss(*inputs, *batch, weights=weights)
        expect_close(np.asarray(loss), exact, 1e-5 * abs(exact))
        for actual, grad in zip(gradients, grads[:3], strict=True):
            expect_close(np.asarray(actual), grad, 1e-5 * max(1.0, abs(grad).max()))

    @pytest.mark.parametrize("bias", [True, False])
    def test_groups_of_utterances(self, bias, monkeypatch):
        """Several groups, each a part of the saved arrays."""
        inputs, batch = joint_arguments("float32", bias=bias)
        groups = []
        plan = jax_joint.tiling.plan
        monkeypatch.setattr(jax_joint.tiling, "plan", lambda of: groups.append(plan(of).groups) or plan(of))
        options = {"workspace": 12_000 if bias else 11_800, "activation": "silu"}
        loss, gradients = weighted(
            lambda floats: joint_rnnt_loss(*floats, *batch, **options), weights_for(4)
        )(inputs)  # fmt: skip
        assert len(groups[-1]) > 1
        expected, grads = core_joint(inputs, batch, weights_for(4), **options)
        same(loss, expected)
        for actual, grad in zip(gradients[0], grads, strict=True):
            assert (actual is None) == (grad is None)
            if grad is not None:
                same(actual, grad)

    def test_half_gradients_do_not_underflow(self):
        inputs, batch = joint_arguments("float16")
        weights = np.full(4, 1e-6, "f")
        small = weighted(lambda *inputs: joint_rnnt_loss(*inputs, *batch), weights)(*inputs)[1]
        grads = core_joint(inputs, batch, weights)[1]
        assert np.asarray(small[2]).any()
        same(small[2], grads[2])

    def test_dropout_by_number_and_key(self):
        inputs, batch = joint_arguments("float32")
        by = jax.jit(lambda seed: joint_rnnt_loss(*inputs, *batch, dropout=0.4, seed=seed))
        large = (1 << 61) + 12345
        for seed in (0, 7, -3):
            same(by(seed), tl.joint_rnnt_loss(*inputs, *batch, dropout=0.4, seed=seed)[0])
        same(
            joint_rnnt_loss(*inputs, *batch, dropout=0.4, seed=large),
            tl.joint_rnnt_loss(*inputs, *batch, dropout=0.4, seed=large)[0],
        )
        key = jax.random.key(5)
        one, other = by(jax.random.fold_in(key, 1)), by(jax.random.fold_in(key, 2))
        assert (np.asarray(one) != np.asarray(other)).any()
        same(by(jax.random.fold_in(key, 1)), one)
        words = np.asarray(jax.random.key_data(key), np.uint64)
        same(by(key), tl.joint_rnnt_loss(*inputs, *batch, dropout=0.4, seed=int(words[0]) + (int(words[1]) << 32))[0])
        with pytest.raises(TypeError, match="seed: expected an int"):
            by(jnp.ones(()))

    def test_dropout_is_the_same_in_backward(self):
        inputs, batch = joint_arguments("float32")
        options = {"dropout": 0.4, "seed": 11}
        loss, gradients = weighted(lambda *inputs: joint_rnnt_loss(*inputs, *batch, **options), weights_for(4))(*inputs)
        expected, grads = core_joint(inputs, batch, weights_for(4), **options)
        same(loss, expected)
        for actual, grad in zip(gradients, grads, strict=True):
            same(actual, grad)

    def test_no_gradient_work_without_a_gradient(self, monkeypatch):
        calls = []
        forward = joint_loss.forward
        monkeypatch.setattr(joint_loss, "forward", lambda of, **how: calls.append(how) or forward(of, **how))
        inputs, batch = joint_arguments("float32")
        jax.block_until_ready(jax.jit(lambda: joint_rnnt_loss(*inputs, *batch))())
        assert calls == [{"gradient": False, "later": False}]

    def test_bad_numbers_within_jit(self):
        """NaN and no gradient for that utterance, in all losses."""
        inputs, batch = joint_arguments("float32")
        known = jax.tree.map(lambda each: each[1:], (inputs[:2], batch))

        @jax.jit
        def run(*values):
            *floats, targets, frames, labels = values

            def losses(*floats):
                am, lm = floats[0] @ inputs[2].T, floats[1] @ inputs[2].T
                simple, occupancy = simple_rnnt_loss(am, lm, targets, frames, labels)
                band = prune(occupancy, frames, labels, s_range=4)
                return jnp.stack([
                    simple,
                    joint_rnnt_loss(*floats, targets, frames, labels),
                    joint_rnnt_loss(*floats, targets, frames, labels, band=band),
                ])

            value, pull = jax.vjp(losses, *floats)
            return value, pull(-2 * jnp.ones_like(value))

        expected, grads = run(*known[0], *inputs[2:], *known[1])
        checked = jax.jit(functools.partial(joint_rnnt_loss, validate=True))
        for at, name in ((4, "targets"), (5, "encoder_lengths"), (6, "target_lengths")):
            values = [*inputs, *(each.copy() for each in batch)]
            values[at][0] = 99
            loss, gradients = run(*values)
            assert np.isnan(loss[:, 0]).all() and np.isfinite(loss[:, 1:]).all()
            np.testing.assert_allclose(loss[:, 1:], expected, rtol=1e-6)
            for actual, grad in zip(gradients[:2], grads[:2], strict=True):
                assert not np.asarray(actual[0]).any()
                np.testing.assert_allclose(actual[1:], grad, atol=1e-5)
            for actual, grad in zip(gradients[2:], grads[2:], strict=True):
                np.testing.assert_allclose(actual, grad, atol=1e-4)
            with pytest.raises(jax.errors.JaxRuntimeError, match=f"{name}: expected"):
                checked(*values).block_until_ready()

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({0: jnp.zeros((4, 9))}, ValueError, "encoder: expected 3 dimensions"),
            ({1: jnp.zeros((4, 5, 7))}, ValueError, "predictor: expected shape"),
            ({1: jnp.zeros((4, 5, 6), jnp.float16)}, TypeError, "predictor: expected dtype float32"),
            ({2: jnp.zeros((11, 7))}, ValueError, "weight: expected shape"),
            ({3: jnp.zeros(10)}, ValueError, "bias: expected shape"),
            ({2: None}, TypeError, "weight: expected"),
            ({"workspace": 100}, ValueError, "workspace: expected at least"),
            ({"activation": "swish"}, ValueError, "activation: expected one of"),
            ({"dropout": 1.5}, ValueError, "dropout: expected a probability"),
            ({"classes": 7}, TypeError, "classes: expected Classes"),
        ],
        ids=str,
    )
    def test_checked_while_tracing(self, change, error, words):
        inputs, batch = joint_arguments("float32")
        inputs = [change.get(i, each) for i, each in enumerate(inputs)]
        options = {key: value for key, value in change.items() if isinstance(key, str)}
        with pytest.raises(error, match=words):
            jax.eval_shape(lambda *values: joint_rnnt_loss(*values, **options), *inputs, *batch)


class TestPruned:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_simple_bits_of_the_core(self, dtype):
        rng = np.random.default_rng(0)
        am, lm = (rng.normal(0, 2, (3, n, 7)).astype(numpy_dtype(dtype)) for n in (8, 5))
        batch = rng.integers(1, 7, (3, 4)), np.array([8, 1, 5]), np.array([4, 0, 2])
        am[1, 1:] = lm[2, 3:] = np.nan
        options = {"lm_only_scale": 0.25, "am_only_scale": 0.1, "topology": "constrained"}
        weights = weights_for(3, dtype)
        with wide(dtype):

            @jax.jit
            def run(am, lm):
                (loss, occupancy), pull = jax.vjp(lambda am, lm: simple_rnnt_loss(am, lm, *batch, **options), am, lm)
                return loss, occupancy, pull((jnp.asarray(weights), jax.tree.map(jnp.ones_like, occupancy)))

            loss, occupancy, gradients = run(am, lm)
            plain = simple_rnnt_loss(am, lm, *batch, **options)[0]
        expected, _, found = tl.simple_rnnt_loss(am, lm, *batch, **options)
        same(loss, expected)
        same(plain, expected)
        same(occupancy.blank, found.blank)
        same(occupancy.label, found.label)
        of = simple_loss.problem(am, lm, *batch, **{**options, "blank": 0, "fastemit_lambda": 0.0, "delay_penalty": 0.0, "infeasible": "inf"})
        sums = simple_loss.forward(of).gradients
        for actual, total in zip(gradients, sums, strict=True):
            same(actual, (total * weights[:, None, None]).astype(am.dtype))

    def pruned(self, topology="regular", lengths=((12, 1, 7), (8, 0, 3))):
        rng = np.random.default_rng(1)
        am, lm = (rng.normal(0, 2, (3, n, 7)).astype("f") for n in (12, 9))
        batch = rng.integers(1, 7, (3, 8)), *map(np.array, lengths)
        return am, lm, batch, tl.simple_rnnt_loss(am, lm, *batch, topology=topology)[2]

    @pytest.mark.parametrize("strategy", ["local", "optimal"])
    @pytest.mark.parametrize("topology", TOPOLOGIES)
    def test_band_of_the_core(self, strategy, topology):
        _, _, (_, frames, labels), occupancy = self.pruned(topology)
        options = {"s_range": 4, "strategy": strategy, "topology": topology}
        expected = tl.prune(occupancy, frames, labels, **options)
        for run in (prune, jax.jit(prune, static_argnames=options)):
            band = run(occupancy, frames, labels, **options)
            assert (band.width, band.s_range) == (expected.width, expected.s_range) == (4, 4)
            for name in ("first", "end", "mass"):
                same(getattr(band, name), getattr(expected, name))
            for name in ("frames", "labels"):
                np.testing.assert_array_equal(getattr(band, name), getattr(expected, name))

    def test_width_where_no_path_fits(self):
        _, _, (_, frames, labels), occupancy = self.pruned(lengths=((12, 2, 7), (8, 8, 3)))
        band, expected = prune(occupancy, frames, labels, s_range=3), tl.prune(occupancy, frames, labels, s_range=3)
        assert band.width == expected.width == 5
        same(band.first, expected.first)

    @pytest.mark.parametrize("topology", TOPOLOGIES)
    def test_width_where_no_path_fits_within_jit(self, topology):
        """That utterance has a band without a path; the others have theirs."""
        am, lm, (targets, frames, labels), occupancy = self.pruned(topology, lengths=((12, 2, 7), (8, 8, 3)))
        options = {"s_range": 1 if topology == "constrained" else 3, "topology": topology}

        @jax.jit
        def run(am, lm, frames, labels):
            band = prune(occupancy, frames, labels, **options)
            return band, joint_rnnt_loss(am, lm, jnp.eye(7), None, targets, frames, labels, band=band, topology=topology)

        band, loss = run(am, lm, frames, labels)
        if topology == "constrained":  # of width 1
            assert np.isposinf(loss).all() and not np.asarray(band.mass).any()
            return
        others = np.array([0, 2])
        expected = tl.prune(
            tl.simple_rnnt_loss(am[others], lm[others], targets[others], frames[others], labels[others], topology=topology)[2],
            frames[others], labels[others], **options,
        )  # fmt: skip
        same(band.first[others], expected.first)
        same(band.mass[others], expected.mass)
        assert np.isposinf(loss[1]) and np.isfinite(loss[others]).all() and (band.mass[1] == 0 or topology == "modified")

    def test_wide_band_of_short_transcripts(self):
        """A compiled band keeps its width where the longest transcript is narrower: losses and gradients are the same."""
        _, _, (targets, frames, labels), occupancy = self.pruned(lengths=((12, 1, 7), (2, 0, 1)))
        band = jax.jit(lambda *lengths: prune(occupancy, *lengths, s_range=5))(frames, labels)
        expected = tl.prune(occupancy, frames, labels, s_range=5)
        assert (band.width, expected.width) == (5, 3)
        rng = np.random.default_rng(2)
        inputs = *(rng.normal(size=(3, n, 4)).astype("f") for n in (12, 9)), rng.normal(size=(7, 4)).astype("f"), None
        run = jax.jit(weighted(lambda inputs: joint_rnnt_loss(*inputs, targets, frames, labels, band=band), weights_for(3)))
        loss, (gradients,) = run(inputs)
        known, grads = core_joint(inputs, (targets, frames, labels), weights_for(3), band=expected)
        same(loss, known)
        for actual, grad in zip(gradients[:3], grads[:3], strict=True):
            same(actual, grad)

    def test_losses_of_a_band_within_one_jit(self):
        am, lm, batch, occupancy = self.pruned()
        targets, frames, labels = batch
        rng = np.random.default_rng(3)
        inputs = tuple(rng.normal(size=shape).astype("f") for shape in ((3, 12, 4), (3, 9, 4), (7, 4), (7,)))
        weights = jnp.asarray(weights_for(3))

        @jax.jit
        def run(am, lm, inputs, targets, frames, labels):
            _, occupancy = simple_rnnt_loss(am, lm, targets, frames, labels)
            band = prune(occupancy, frames, labels, s_range=4)

            def by_joiner(encoder, predictor, weight, bias):
                hidden = jnp.tanh(encoder[:, :, None] + gather_predictor(predictor, band))
                return rnnt_loss(hidden @ weight.T + bias, targets, frames, labels, band=band)

            joiner, pull = jax.vjp(by_joiner, *inputs)
            fused, pull_fused = jax.vjp(lambda *x: joint_rnnt_loss(*x, targets, frames, labels, band=band), *inputs)
            return band, joiner, pull(weights), fused, pull_fused(weights)

        band, joiner, by_joiner, fused, by_fused = run(am, lm, inputs, *batch)
        expected, grads = core_joint(inputs, batch, weights_for(3), band=tl.prune(occupancy, frames, labels, s_range=4))
        same(fused, expected)
        for actual, grad in zip(by_fused, grads, strict=True):
            same(actual, grad)
        np.testing.assert_allclose(joiner, expected, rtol=1e-5)
        for actual, grad in zip(by_joiner, grads, strict=True):
            np.testing.assert_allclose(actual, grad, atol=2e-5)

        again = jax.jit(lambda band: joint_rnnt_loss(*inputs, *batch, band=band))(band)  # a band is an argument like others
        same(again, expected)
        with pytest.raises(ValueError, match="band: expected the band of this batch"):
            joint_rnnt_loss(*inputs, targets, frames - 1 + (frames == 1), labels, band=band)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_gathered(self, dtype):
        _, _, (_, frames, labels), occupancy = self.pruned()
        rng = np.random.default_rng(4)
        predictor = rng.normal(size=(3, 9, 5)).astype(numpy_dtype(dtype))
        with wide(dtype):
            band = prune(occupancy, frames, labels, s_range=4)
            rows, pull = jax.vjp(jax.jit(lambda p: gather_predictor(p, band)), predictor)
            upstream = rng.normal(size=rows.shape).astype(predictor.dtype)
            (gradient,) = pull(jnp.asarray(upstream))
        expected = tl.prune(occupancy, frames, labels, s_range=4)
        same(rows, tl.gather_predictor(predictor, expected))
        same(gradient, tl.gather_predictor_backward(upstream, expected, 9))

    def test_errors(self):
        _, _, (_, frames, labels), occupancy = self.pruned()
        band = prune(occupancy, frames, labels)
        with pytest.raises(ValueError, match="s_range: expected 1 or more"):
            prune(occupancy, frames, labels, s_range=0)
        with pytest.raises(TypeError, match="occupancy: expected an Occupancy"):
            prune(3, frames, labels)
        with pytest.raises(ValueError, match="am_lengths: expected lengths"):
            prune(occupancy, frames + 9, labels)
        with pytest.raises(ValueError, match="band: expected utterances of less than 4 labels"):
            gather_predictor(jnp.zeros((3, 4, 2)), band)
        with pytest.raises(ValueError, match="band: expected one of 2 utterances"):
            gather_predictor(jnp.zeros((2, 9, 2)), band)


class TestSampled:
    @pytest.mark.parametrize("scope", ["batch", "utterance"])
    @pytest.mark.parametrize("proposal", ["uniform", "unigram", "ctc"])
    def test_classes_of_the_core(self, scope, proposal):
        rng = np.random.default_rng(0)
        targets, labels = rng.integers(1, 50, (3, 4)), np.array([4, 0, 2])
        given = {
            "uniform": {},
            "unigram": {"counts": rng.integers(0, 9, 50)},
            "ctc": {"ctc_logits": rng.normal(size=(3, 6, 50)).astype("f"), "ctc_lengths": np.array([6, 1, 3])},
        }[proposal]
        options = {"vocab_size": 50, "num_samples": 6, "scope": scope, "proposal": proposal, "correction": True, "blank": -1}

        @jax.jit
        def draw(targets, labels, given, step):
            return sample_classes(targets, labels, seed=3, step=step, **given, **options)

        for step in (0, 1):
            expected = tl.sample_classes(targets, labels, seed=3, step=step, **given, **options)
            for classes in (
                draw(targets, labels, given, step),
                sample_classes(targets, labels, seed=3, step=step, **given, **options),
            ):
                same(classes.ids, expected.ids)
                same(classes.probability, expected.probability)
                assert (classes.vocab_size, classes.blank, classes.correction) == (50, 49, True)

    @pytest.mark.parametrize("scope", ["batch", "utterance"])
    def test_loss(self, scope):
        inputs, batch = joint_arguments("float32")
        targets, _, labels = batch
        options = {"vocab_size": 11, "num_samples": 1, "scope": scope, "correction": True}
        weights = weights_for(4)

        @jax.jit
        def run(inputs, targets, frames, labels, step):
            classes = sample_classes(targets, labels, **options, step=step)
            loss, pull = jax.vjp(lambda *x: joint_rnnt_loss(*x, targets, frames, labels, classes=classes), *inputs)
            return classes, loss, pull(jnp.asarray(weights))

        classes, loss, gradients = run(inputs, *batch, 5)
        known = tl.sample_classes(targets, labels, **options, step=5)
        same(classes.ids, known.ids)
        expected, grads = core_joint(inputs, batch, weights, classes=known)
        same(loss, expected)
        for actual, grad in zip(gradients, grads, strict=True):
            same(actual, grad)
        same(joint_rnnt_loss(*inputs, *batch, classes=classes), expected)
        slots = np.asarray(labels_in(classes, targets, labels))
        same(slots, jax.jit(labels_in)(classes, targets, labels))
        assert slots.shape == targets.shape
        same(slots[:, : labels.max()], tl.labels_in(known, targets, labels))

    def test_bad_numbers_within_jit(self):
        inputs, (targets, frames, labels) = joint_arguments("float32")

        def run(targets, labels, **options):
            classes = sample_classes(targets, labels, vocab_size=11, num_samples=2, **options)
            return labels_in(classes, targets, labels), joint_rnnt_loss(*inputs, targets, frames, labels, classes=classes)

        for at in (0, 1):
            changed = [targets.copy(), labels.copy()]
            changed[at][0] = 99
            slots, loss = jax.jit(run)(*changed)
            assert np.isnan(loss[0]) and np.isfinite(loss[1:]).all()
            assert (np.asarray(slots[0]) == -1).all() and (np.asarray(slots[2]) >= 0).all()
            with pytest.raises(jax.errors.JaxRuntimeError, match=("targets: expected", "target_lengths: expected")[at]):
                jax.block_until_ready(jax.jit(functools.partial(run, validate=True))(*changed))
        classes = tl.Classes.from_ids([0, 4, 7], vocab_size=11)
        loss = jax.jit(lambda t: joint_rnnt_loss(*inputs, t, frames, labels, classes=classes))(np.where(targets > 0, 5, 5))
        np.testing.assert_array_equal(np.isnan(loss), labels > 0)  # class 5 is none of them

    def test_counts_and_probabilities_have_no_gradient(self):
        """They may lie among the parameters, and for the loss they are constants."""
        inputs, batch = joint_arguments("float32")
        targets, _, labels = batch
        options = {"vocab_size": 11, "num_samples": 2, "proposal": "unigram", "correction": True}

        def loss(params):
            classes = sample_classes(targets, labels, counts=params["counts"], **options)
            slots = labels_in(classes, targets, labels)
            return joint_rnnt_loss(*params["inputs"], *batch, classes=classes).sum() + slots.sum() * params["scale"]

        def of_probability(probability):
            return probability.sum() * labels_in(dataclasses.replace(drawn, probability=probability), targets, labels).sum()

        params = {"inputs": tuple(map(jnp.asarray, inputs)), "counts": jnp.arange(11.0), "scale": 1.0}
        drawn = sample_classes(targets, labels, counts=params["counts"], **options)
        for transform in (lambda function: function, jax.jit):
            gradient = transform(jax.grad(loss))(params)
            assert np.asarray(gradient["inputs"][0]).any() and not np.asarray(gradient["counts"]).any()
            total = labels_in(drawn, targets, labels).sum()
            same(transform(jax.grad(of_probability))(drawn.probability), np.full(drawn.probability.shape, total, "f"))

    def test_labels_beyond_the_longest(self):
        slots = labels_in(tl.Classes.from_ids([0, 4, 7], vocab_size=9), jnp.array([[7, 4, 4]]), [1])
        assert slots.tolist() == [[2, -1, -1]]

    def test_errors(self):
        draw = functools.partial(sample_classes, [[3]], [1], vocab_size=9, num_samples=2)
        with pytest.raises(ValueError, match="targets: expected labels in"):
            sample_classes([[9]], [1], vocab_size=9, num_samples=2)
        with pytest.raises(ValueError, match="counts: expected an array"):
            draw(proposal="unigram")
        with pytest.raises(ValueError, match=r"counts: expected shape \(V,\)"):
            draw(proposal="unigram", counts=jnp.ones(8))
        with pytest.raises(ValueError, match="ctc_lengths: expected lengths"):
            draw(proposal="ctc", ctc_logits=jnp.zeros((1, 4, 9)), ctc_lengths=[5])
        with pytest.raises(ValueError, match="targets: expected labels among"):
            labels_in(tl.Classes.from_ids([0, 4], vocab_size=9), [[5]], [1])


def any_joint(params, encoder, predictor):
    return jnp.tanh(encoder @ params["gate"] * 0.5 + predictor) @ params["output"] + params["bias"]


class TestSamplewise:
    def case(self):
        (encoder, predictor, weight, bias), batch = joint_arguments("float32")
        rng = np.random.default_rng(9)
        params = {"gate": rng.normal(size=(6, 6)).astype("f"), "output": weight.T.copy(), "bias": bias}
        return params, encoder, predictor, batch

    def test_as_the_loss_of_all_logits(self):
        params, encoder, predictor, batch = self.case()
        _, frames, labels = batch

        def whole(params, encoder, predictor):
            # Padding of NaN would reach the parameters here.
            real = jnp.arange(encoder.shape[1])[:, None] < frames[:, None, None]
            rows = jnp.arange(predictor.shape[1])[:, None] <= labels[:, None, None]
            encoder, predictor = jnp.where(real, encoder, 0), jnp.where(rows, predictor, 0)
            return rnnt_loss(any_joint(params, encoder[:, :, None], predictor[:, None]), *batch)

        def parts(params, encoder, predictor):
            return samplewise_rnnt_loss(any_joint, params, encoder, predictor, *batch)

        loss, gradients = jax.jit(weighted(parts, weights_for(4)))(params, encoder, predictor)
        expected, grads = weighted(whole, weights_for(4))(params, encoder, predictor)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        jax.tree.map(lambda actual, grad: np.testing.assert_allclose(actual, grad, atol=3e-5), gradients, grads)

    def test_what_is_no_parameter_and_half_types(self):
        params, encoder, predictor, batch = self.case()
        params = jax.tree.map(lambda each: jnp.asarray(each, jnp.bfloat16), params)
        params["key"], params["step"] = jax.random.key(0), jnp.int32(3)
        encoder, predictor = (jnp.asarray(each, jnp.bfloat16) for each in (encoder, predictor))

        def joint(params, encoder, predictor):
            assert encoder.shape == (1, 9, 1, 6) and predictor.shape == (1, 1, 5, 6)
            drop = jax.random.bernoulli(params["key"], 0.9, (11,))
            return any_joint(params, encoder, predictor) * drop

        def loss(params):
            return samplewise_rnnt_loss(joint, params, encoder, predictor, *batch).sum()

        gradient = jax.jit(jax.grad(loss, allow_int=True))(params)
        assert gradient["gate"].dtype == jnp.bfloat16 and np.asarray(gradient["gate"], "f").any()
        assert all(np.isfinite(np.asarray(gradient[name], "f")).all() for name in ("gate", "output", "bias"))

    def test_an_utterance_that_is_not_finite(self):
        params, encoder, predictor, batch = self.case()
        broken = encoder.copy()
        broken[0, 3, 0] = np.nan

        def run(encoder, predictor, *batch):
            call = functools.partial(samplewise_rnnt_loss, any_joint)
            return weighted(lambda *x: call(*x, *batch), weights_for(4)[4 - len(encoder) :])(params, encoder, predictor)

        loss, (gradient, by_encoder, by_predictor) = run(broken, predictor, *batch)
        expected, (known, _, _) = run(*(each[1:] for each in (encoder, predictor, *batch)))
        assert np.isnan(loss[0]) and not np.asarray(by_encoder[0]).any() and not np.asarray(by_predictor[0]).any()
        np.testing.assert_allclose(loss[1:], expected, rtol=1e-6)
        jax.tree.map(lambda actual, each: np.testing.assert_allclose(actual, each, rtol=1e-4, atol=1e-4), gradient, known)

    def test_what_the_joint_closes_over(self):
        params, encoder, predictor, batch = self.case()

        def loss(params):
            return samplewise_rnnt_loss(lambda _, e, p: any_joint(params, e, p), {}, encoder, predictor, *batch).sum()

        with pytest.raises(Exception, match=r"closed-over|closing over|[Tt]racer"):
            jax.grad(loss)(params)

    def test_errors(self):
        params, encoder, predictor, batch = self.case()
        with pytest.raises(ValueError, match="joint: expected logits of shape"):
            samplewise_rnnt_loss(lambda p, e, q: e, params, encoder, predictor, *batch)
        with pytest.raises(ValueError, match="joint: expected logits of shape"):
            samplewise_rnnt_loss(lambda p, e, q: (e, q), params, encoder, predictor, *batch)
        with pytest.raises(ValueError, match=r"targets: expected labels in \[0, V = 6\), got 10 at index \(0, 0\)"):
            samplewise_rnnt_loss(lambda p, e, q: e + q, params, encoder, predictor, *batch)
        with pytest.raises(ValueError, match="blank: expected a class"):
            samplewise_rnnt_loss(any_joint, params, encoder, predictor, *batch, blank=11)
        with pytest.raises(TypeError, match="joint: expected a callable"):
            samplewise_rnnt_loss(3, params, encoder, predictor, *batch)
        with pytest.raises(ValueError, match="predictor: expected shape"):
            samplewise_rnnt_loss(any_joint, params, encoder, predictor[:2], *batch)
        with pytest.raises(ValueError, match="encoder_lengths: expected lengths"):
            samplewise_rnnt_loss(any_joint, params, encoder, predictor, batch[0], [99] * 4, batch[2])


def losses():
    """Every function with a gradient: a call of its float arguments, one number for each of four utterances; and these."""
    (encoder, predictor, weight, bias), batch = joint_arguments("float32")
    encoder, predictor = np.nan_to_num(encoder), np.nan_to_num(predictor)
    logits = np.tanh(encoder[:, :, None] + predictor[:, None]) @ weight.T
    targets, frames, labels = batch
    index = np.array([2, 0, 0, 1])
    scores, distances = (np.abs(each @ weight[:5].T)[:, 0] for each in (encoder, predictor))
    gates, factor = np.abs(encoder), np.cos(np.arange(6, dtype="f"))
    return {
        "rnnt_loss": (lambda x: rnnt_loss(x, *batch), (logits,)),
        "joint_rnnt_loss": (lambda *x: joint_rnnt_loss(*x, *batch), (encoder, predictor, weight, bias)),
        "simple_rnnt_loss": (lambda *x: simple_rnnt_loss(*x, *batch)[0], (encoder @ weight.T, predictor @ weight.T)),
        "samplewise_rnnt_loss": (
            lambda *x: samplewise_rnnt_loss(any_joint, dict(zip(("gate", "output", "bias"), x[2:], strict=True)), *x[:2], *batch),
            (encoder, predictor, np.eye(6, dtype="f"), weight.T.copy(), bias),
        ),
        "encoder_index": (
            lambda *x: joint_rnnt_loss(*x, targets, frames[:3], labels, encoder_index=index),
            (encoder[:3], predictor, weight, bias),
        ),
        "embr_loss": (lambda *x: embr_loss(x[0], distances, reference_nll=x[1], interpolation=0.5), (scores, scores[:, 0])),
        "reduced_predictor": (
            lambda *x: (reduced_predictor(*x, targets, labels) * factor).sum((1, 2)), (weight, np.stack([encoder[0, :2]] * 2)),
        ),
        "amortized_cost": (lambda x: amortized_cost(x, factor, frames), (gates,)),
        "amortized_backlog": (lambda x: amortized_backlog(x, factor, frames, frame_period=0.25), (gates,)),
        "gumbel_gate": (lambda x: (gumbel_gate(x, frames, hard=True, seed=3) * factor).sum((1, 2)), (encoder,)),
    }  # fmt: skip


@pytest.mark.parametrize("name", losses())
class TestTransformations:
    def test_second_order_raises(self, name):
        loss, inputs = losses()[name]
        for run in (jax.jit, lambda call: call):
            with pytest.raises(NotImplementedError, match=TWICE):
                run(jax.grad(lambda x: (jax.grad(lambda y: loss(y, *inputs[1:]).sum())(x) ** 2).sum()))(inputs[0])

    def test_second_order_by_the_upstream_gradient_raises(self, name):
        loss, inputs = losses()[name]
        _, pull = jax.vjp(loss, *inputs)

        def square(weights):
            return (pull(weights)[0] ** 2).sum()

        if name == "simple_rnnt_loss":  # whose gradient is made with the loss: weighting it is JAX's own product
            gradient, twice = jax.grad(square)(jnp.ones(4)), (pull(jnp.ones(4))[0] ** 2).sum((1, 2))
            np.testing.assert_allclose(gradient, 2 * twice, rtol=1e-5)
        else:
            with pytest.raises(NotImplementedError, match=TWICE):
                jax.grad(square)(jnp.ones(4))

    def test_forward_mode_raises(self, name):
        loss, inputs = losses()[name]
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(loss, tuple(map(jnp.asarray, inputs)), tuple(map(jnp.ones_like, inputs)))

    def test_checkpoint_and_scan(self, name):
        loss, inputs = losses()[name]
        expected, grads = jax.value_and_grad(lambda x: loss(*x).sum())(inputs)
        parts = jax.tree.map(lambda each: jnp.stack([each, 2 * each]), inputs)

        def step(total, part):
            return total + jax.checkpoint(lambda x: loss(*x).sum())(part), None

        total, gradients = jax.jit(jax.value_and_grad(lambda parts: jax.lax.scan(step, 0.0, parts)[0]))(parts)
        other, _ = jax.value_and_grad(lambda x: loss(*x).sum())(jax.tree.map(lambda each: 2 * each, inputs))
        np.testing.assert_allclose(total, expected + other, rtol=1e-6)
        jax.tree.map(lambda actual, grad: np.testing.assert_allclose(actual[0], grad, atol=1e-5), gradients, grads)

    def test_vmap(self, name):
        """Gradients of a shared argument are those of each mapped call."""
        loss, inputs = losses()[name]
        mapped = jnp.stack([inputs[0], -inputs[0], 0.5 * inputs[0]])
        run = jax.vmap(weighted(loss, weights_for(4)), in_axes=(0, *[None] * (len(inputs) - 1)))
        found, gradients = jax.jit(run)(mapped, *inputs[1:])
        for i, each in enumerate(mapped):
            expected, grads = weighted(loss, weights_for(4))(each, *inputs[1:])
            np.testing.assert_allclose(found[i], expected, rtol=1e-6)
            jax.tree.map(lambda actual, grad, i=i: np.testing.assert_allclose(actual[i], grad, atol=1e-5), gradients, grads)

    def test_no_compilation_per_step(self, name):
        """Nothing compiles again for other numbers of the same shapes, in a compiled step or in an eager one."""
        loss, inputs = losses()[name]
        compiled = []

        def listener(event, _, **__):
            if event == "/jax/core/compile/backend_compile_duration":
                compiled.append(event)

        step = jax.jit(jax.value_and_grad(lambda x: loss(*x).sum()))
        eager = jax.value_and_grad(lambda x: loss(*x).sum())
        others = [jax.tree.map(lambda each, i=i: jnp.asarray(each + 0.1 * i), inputs) for i in range(3)]
        jax.block_until_ready((step(others[0]), eager(others[0])))
        jax.monitoring.register_event_duration_secs_listener(listener)
        try:
            jax.block_until_ready([step(each) for each in others[1:]])
            jax.block_until_ready([eager(each) for each in others[1:]])
            assert not compiled
            jax.block_until_ready(jax.jit(lambda x: x * 3.5)(others[0][0]))
            assert compiled  # the test can fail
        finally:
            jax.monitoring.unregister_event_duration_listener(listener)


class TestMemory:
    @pytest.mark.parametrize("offset", [1, 4, 20])
    def test_misaligned_numpy(self, offset):
        batch = arguments("float32")
        raw = np.zeros(batch.logits.nbytes + offset + 64, np.uint8)
        start = -raw.ctypes.data % 64 + offset
        logits = raw[start : start + batch.logits.nbytes].view(np.float32).reshape(batch.logits.shape)
        logits[...] = batch.logits
        assert logits.ctypes.data % 64 == offset
        loss = jax.jit(lambda x: rnnt_loss(x, *batch.arguments[1:], blank=batch.blank))(logits)
        same(loss, tl.rnnt_loss(*batch.arguments, blank=batch.blank)[0])

    def seen(self, monkeypatch, module, name="problem"):
        """Arrays that the core is given within callbacks."""
        found = []
        original = getattr(module, name)

        def spy(*arrays, **options):
            if options.get("allocate") is not None:
                found.append([each.ctypes.data for each in arrays if isinstance(each, np.ndarray)])
            return original(*arrays, **options)

        monkeypatch.setattr(module, name, spy)
        return found

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_inputs_without_a_copy(self, monkeypatch, dtype):
        found = self.seen(monkeypatch, logits_loss)
        batch = arguments(dtype)
        with wide(dtype):
            values = [jnp.asarray(each) for each in batch.arguments]
            step = jax.jit(jax.value_and_grad(lambda x, *rest: rnnt_loss(x, *rest, blank=batch.blank).sum()))
            _, gradient = jax.block_until_ready(step(*values))
        assert len(found) == 2  # forward and backward
        for addresses in found:
            assert addresses[:2] == [each.unsafe_buffer_pointer() for each in values[:2]]
        assert gradient.unsafe_buffer_pointer() % 64 == 0

    def test_joint_inputs_without_a_copy(self, monkeypatch):
        found = self.seen(monkeypatch, joint_loss)
        inputs, batch = joint_arguments("float16")
        values = [jnp.asarray(each) for each in (*inputs, *batch)]
        jax.block_until_ready(jax.jit(jax.value_and_grad(lambda *x: joint_rnnt_loss(*x).sum(), range(4)))(*values))
        assert len(found) == 2
        for addresses in found:
            assert addresses[:5] == [each.unsafe_buffer_pointer() for each in values[:5]]

    def test_results_are_written_in_place(self, monkeypatch):
        """The gradient that the core writes is the array that JAX returns."""
        written = []
        backward = logits_loss.backward

        def spy(*given, **options):
            native = backward(*given, **options)
            written.append((native.ctypes.data, native.nbytes))
            return native

        monkeypatch.setattr(logits_loss, "backward", spy)
        batch = arguments("bfloat16")
        gradient = jax.block_until_ready(jax.grad(lambda x: rnnt_loss(x, *batch.arguments[1:], blank=batch.blank).sum())(batch.logits))
        assert written == [(gradient.unsafe_buffer_pointer(), gradient.nbytes)]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_as_on_a_device(self, monkeypatch, dtype):
        """What is compiled for a device, run on the host: bfloat16 as bits, and memory for the core as one more output."""
        rooms = []
        callback = jax_callback.buffer_callback

        def spy(body, outputs, **options):
            rooms.append([each.shape[0] for each in outputs if each.dtype == jnp.uint8])
            assert all(each.dtype != jnp.bfloat16 for each in outputs)
            return callback(body, outputs, **options)

        monkeypatch.setattr(jax_callback, "buffer_callback", spy)
        for module in (jax_callback, jax_joint):
            monkeypatch.setattr(module, "on_device", lambda: True)
        inputs, batch = joint_arguments(dtype)
        targets, frames, labels = batch
        weights = weights_for(4)
        classes = tl.sample_classes(targets, labels, vocab_size=11, num_samples=9, scope="utterance")
        for options in ({}, {"classes": classes}):
            run = jax.jit(weighted(lambda *inputs, options=options: joint_rnnt_loss(*inputs, *batch, **options), weights))
            loss, gradients = run(*inputs)
            expected, grads = core_joint(inputs, batch, weights, **options)
            same(loss, expected)
            for actual, grad in zip(gradients, grads, strict=True):
                same(actual, grad)
        band = prune(tl.simple_rnnt_loss(*(x @ inputs[2].T for x in inputs[:2]), *batch)[2], frames, labels, s_range=3)
        rows = gather_predictor(inputs[1], band)
        same(rows, tl.gather_predictor(inputs[1], jax.tree.map(np.asarray, band)))
        assert len(rooms) >= 5 and all(len(room) == 1 and 0 < room[0] <= 1 << 30 and room[0] % 512 == 0 for room in rooms)

    def test_memory_of_xla_is_handed_out_once(self, monkeypatch):
        """CuPy's pool asks for as much again while it is in use, and for more, as it then does of a stand-in that keeps none."""
        found, used = [], []

        class Pool:
            def __init__(self, malloc):
                self.malloc = lambda size: found.append(malloc(size)) or found[-1]

        cuda = SimpleNamespace(
            Device=lambda index: contextlib.nullcontext(), ExternalStream=lambda stream: contextlib.nullcontext(),
            MemoryPool=Pool, using_allocator=lambda allocator: contextlib.nullcontext(used.append(allocator)),
        )  # fmt: skip
        cupy = SimpleNamespace(
            cuda=cuda, asarray=lambda scratch: SimpleNamespace(data=scratch, nbytes=1024),
            get_default_memory_pool=lambda: SimpleNamespace(malloc=lambda size: size),
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        buffer = SimpleNamespace(__dlpack_device__=lambda: (2, 0))
        with jax_callback._place(SimpleNamespace(stream=7), "room", buffer):
            for size in (1024, 512, 2048):
                used[0](size)
        assert found == ["room", 1024, 512, 2048]

    def test_a_shape_out_of_order_is_an_error(self):
        memory = jax_callback.Memory([np.zeros((2, 3), "f")], lambda shape, dtype: np.empty(shape, dtype))
        assert memory((4,), "float64").shape == (4,)
        with pytest.raises(RuntimeError, match="output: expected float32"):
            memory.result((3, 2), "float32")

    def test_no_memory_behind_shapes(self):
        shape = jax_given.shape_of(jax.ShapeDtypeStruct((1 << 20, 1 << 20, 1 << 10), jnp.bfloat16))
        assert shape.shape == (1 << 20, 1 << 20, 1 << 10) and shape.flags.c_contiguous and not shape.flags.writeable

    def test_nothing_uninitialised(self):
        """What is kept for backward is 0 past the cells, so that jax_debug_nans finds none."""
        batch = arguments("float32", seed=8, impossible=0.0)
        with jax.debug_nans(True):
            logits = jnp.asarray(np.nan_to_num(batch.logits))
            gradient = jax.grad(lambda x: rnnt_loss(x, *batch.arguments[1:], blank=batch.blank).sum())(logits)
        assert np.asarray(gradient).any()
        kept = jax_logits._loss_fwd(
            tuple({**CORE, "normalized": False, "blank": batch.blank, "validate": False}.items()), jnp.asarray(batch.logits),
            jax_given.given(*batch.arguments[1:], ("a", "b")).on_device(),
        )[1][2]  # fmt: skip
        cells = int(batch.real.sum())
        for each in kept:
            assert each.shape == (batch.real.size,) and not np.asarray(each[cells:]).any() and np.asarray(each[:cells]).any()


class TestProcesses:
    def test_no_other_framework(self):
        """Importing the core leaves JAX alone; importing the adapter leaves the others alone."""
        found = run_python("""
            import json, sys
            names = ("jax", "torch", "tensorflow", "keras", "cupy")
            import numpy as np, transducer_loss as tl
            tl.rnnt_loss(np.zeros((1, 2, 2, 3), "f"), [[1]], [2], [1])
            before = [name for name in names if name in sys.modules]
            from transducer_loss.adapters.jax import rnnt_loss
            rnnt_loss(np.zeros((1, 2, 2, 3), "f"), [[1]], [2], [1]).block_until_ready()
            print(json.dumps([before, [name for name in names if name in sys.modules]]))
        """)
        assert found == [[], ["jax"]]

    def test_data_parallel(self):
        """Two devices, each with a part of the batch: losses, and gradients of what is replicated, are those of one device."""
        found = run_python(
            """
            import json
            import jax, jax.numpy as jnp, numpy as np
            from jax.sharding import PartitionSpec as P
            from transducer_loss.adapters.jax import (
                amortized_backlog, amortized_cost, edit_distance, embr_loss, gumbel_gate, joint_rnnt_loss, prune,
                reduced_predictor, rnnt_loss, sample_classes, samplewise_rnnt_loss, simple_rnnt_loss,
            )

            rng = np.random.default_rng(0)
            floats = tuple(rng.normal(size=shape).astype("f") for shape in ((4, 9, 6), (4, 5, 6), (11, 6), (11,)))
            batch = rng.integers(1, 11, (4, 4)), np.array([9, 1, 6, 9]), np.array([4, 0, 4, 2])
            weights = np.array([1.0, -0.75, 0.5, 2.5], "f")

            def joint(params, e, p):
                return jnp.tanh(e + p) @ params[0].T + params[1]

            def risk(encoder, weight, bias, targets, frames, labels):
                lists, counts = jnp.stack([targets, targets % 3], 1), jnp.stack([labels, labels], 1)
                of = lists.reshape(-1, 4), counts.reshape(-1)
                nll = joint_rnnt_loss(
                    encoder, reduced_predictor(weight, floats[0][:2, :2], *of), weight, bias, of[0], frames, of[1],
                    encoder_index=jnp.arange(len(of[1])) // 2,
                )
                distances = edit_distance(lists, counts, targets, labels).total
                return embr_loss(nll.reshape(-1, 2), distances, hypotheses=lists, hypothesis_lengths=counts)

            def work(encoder, frames):
                gates = gumbel_gate(encoder, frames, noise=False, hard=True)
                each = jnp.arange(6.0)
                return amortized_cost(gates, each, frames) + amortized_backlog(gates, each, frames, frame_period=2.0)

            def losses(encoder, predictor, weight, bias, targets, frames, labels, weights):
                am, lm = encoder @ weight.T, predictor @ weight.T
                simple, occupancy = simple_rnnt_loss(am, lm, targets, frames, labels)
                band = prune(occupancy, frames, labels, s_range=5)
                classes = sample_classes(targets, labels, vocab_size=11, num_samples=11, scope="utterance")
                rest = targets, frames, labels
                return jnp.stack([
                    (weights * loss).sum() for loss in (
                        simple,
                        rnnt_loss(jnp.tanh(encoder[:, :, None] + predictor[:, None]) @ weight.T + bias, *rest),
                        joint_rnnt_loss(encoder, predictor, weight, bias, *rest),
                        joint_rnnt_loss(encoder, predictor, weight, None, *rest, band=band, dropout=0.0),
                        joint_rnnt_loss(encoder, predictor, weight, bias, *rest, classes=classes),
                        samplewise_rnnt_loss(joint, (weight, bias), encoder, predictor, *rest),
                        risk(encoder, weight, bias, *rest),
                        work(encoder, frames),
                    )
                ])

            def step(*inputs):
                def total(floats):
                    each = losses(*floats, *inputs[4:])
                    return each.sum(), each
                (_, each), gradients = jax.value_and_grad(total, has_aux=True)(inputs[:4])
                return each, gradients

            results = [jax.jit(step)(*floats, *batch, weights)]
            for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
                mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
                over, whole = P("data"), P()

                def parallel(*inputs):
                    each, gradients = step(*inputs)
                    return jax.lax.psum(each, "data"), gradients

                specs = (over, over, whole, whole, over, over, over, over)
                values = [jax.device_put(v, jax.NamedSharding(mesh, s)) for v, s in zip((*floats, *batch, weights), specs)]
                run = jax.shard_map(parallel, mesh=mesh, in_specs=specs, out_specs=(whole, (over, over, whole, whole)))
                results.append(jax.jit(run)(*values))
            print(json.dumps([jax.device_count(), [jax.tree.map(lambda x: np.asarray(x).tolist(), r) for r in results]]))
            """,
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
        )
        devices, (one, *others) = found
        assert devices == 2
        for other in others:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), other, one)
        assert np.abs(one[1][2]).max() > 1
