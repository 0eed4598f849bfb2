"""Edit distances, EMBR, shared encoders and the reduced predictor for JAX: the same numbers as the core's, bit by bit."""

import functools

import numpy as np
import pytest

import transducer_loss as tl
from helpers import FLOATS, expect_close, numpy_dtype
from transducer_loss import embr, reference

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from test_jax import core_joint, joint_arguments, same, weighted, weights_for, wide  # noqa: E402
from transducer_loss.adapters.jax import callback as jax_callback  # noqa: E402
from transducer_loss.adapters.jax import (  # noqa: E402
    edit_distance,
    embr_loss,
    joint_rnnt_loss,
    prune,
    reduced_predictor,
    sample_classes,
    simple_rnnt_loss,
)
from transducer_loss.adapters.jax import joint as jax_joint  # noqa: E402

NAMES = ("total", "insertions", "deletions", "substitutions")


def sequences(seed=0, labels=5):
    """N-best lists with padding, an empty hypothesis, one that comes twice, an utterance of padding alone; references."""
    rng = np.random.default_rng(seed)
    hypotheses, references = rng.integers(0, labels, (4, 5, 6)), rng.integers(0, labels, (4, 7))
    lengths = np.array([[6, 0, 3, -1, 6], [1, 2, 2, 4, -1], [-1] * 5, [5, 5, 5, 5, 5]])
    hypotheses[0, 4], hypotheses[3, 2] = hypotheses[0, 0], hypotheses[3, 1]
    hypotheses[np.arange(6) >= lengths[..., None]] = -1
    return hypotheses, lengths, references, np.array([7, 0, 4, 5])


def scores(dtype, seed=0):
    """Scores of such lists, NaN where nothing counts, one +inf; those of the references; and distances."""
    rng = np.random.default_rng(seed)
    hypotheses, lengths, *references = sequences(seed)
    nll = rng.normal(5, 2, (4, 5))
    nll[3, 4], nll[lengths < 0] = np.inf, np.nan
    distances = tl.edit_distance(hypotheses, lengths, *references).total
    return nll.astype(numpy_dtype(dtype)), rng.normal(4, 1, 4).astype(numpy_dtype(dtype)), distances, hypotheses, lengths


class TestEditDistance:
    @pytest.mark.parametrize("blank", [None, 0, -1])
    @pytest.mark.parametrize("run", [edit_distance, jax.jit(edit_distance, static_argnames="blank")], ids=["eager", "jit"])
    def test_counts_of_the_core(self, run, blank):
        hypotheses, lengths, references, reference_lengths = sequences()
        hypotheses[2, 0, :3], lengths[2, 0] = -1, 3
        for arguments in (
            (hypotheses, lengths, references, reference_lengths),
            (hypotheses[:, 1], lengths[:, 1], references, reference_lengths),
            (hypotheses[:, :, :0], np.minimum(lengths, 0), references[:, :0], 0 * reference_lengths),
        ):
            found, expected = run(*arguments, blank=blank), tl.edit_distance(*arguments, blank=blank)
            assert isinstance(found, tl.EditDistance)
            for name in NAMES:
                same(getattr(found, name), getattr(expected, name))

    def test_loops(self):
        rng = np.random.default_rng(1)
        of = rng.integers(0, 4, (50, 3, 8)), rng.integers(-1, 9, (50, 3)), rng.integers(0, 4, (50, 9)), rng.integers(0, 10, 50)
        hypotheses, lengths, references, reference_lengths = of
        found = np.stack(jax.tree.leaves(jax.jit(edit_distance)(*of)), axis=-1)
        for b, n in np.ndindex(50, 3):
            pair = hypotheses[b, n, : lengths[b, n]], references[b, : reference_lengths[b]]
            assert tuple(found[b, n]) == (reference.edit_distance(*pair) if lengths[b, n] >= 0 else (-1,) * 4)

    def test_kinds_of_integers(self):
        hypotheses, references = [[3, 1, 2], [1, 1, 0]], [[3, 2], [2, 1]]
        expected = tl.edit_distance(hypotheses, [3, 2], references, [2, 2]).total
        same(edit_distance(hypotheses, (3, 2), references, [2, 2]).total, expected)
        for kind in (np.int64, np.int32, np.uint32, np.uint16, np.int8):
            arrays = [np.array(each, kind) for each in (hypotheses, [3, 2], references, [2, 2])]
            same(edit_distance(*arrays).total, expected)
            same(jax.jit(edit_distance)(*arrays).total, expected)
        same(jax.jit(lambda n: edit_distance(hypotheses, [n, n - 1], references, [2, n - 1]).total)(3), expected)
        strided = np.asfortranarray(np.stack([hypotheses, hypotheses]))
        same(edit_distance(strided[0], [3, 2], references, [2, 2]).total, expected)

    def test_labels_stay_what_they_are(self):
        """No two become one where JAX has 32 bits."""
        big = np.array([[1 << 40, (1 << 40) + 1, 3]])
        with jax.enable_x64(True):
            assert jax.jit(edit_distance)(big, [3], big[:, ::-1].copy(), [3]).total.tolist() == [2]
        for arguments in ((big, [3], [[3]], [1]), ([[3]], [1], big, [2])):
            with pytest.raises(ValueError, match=r"(hypotheses|references): expected labels of int32, .*, got 1099511627776"):
                edit_distance(*arguments)
        assert edit_distance(big[:, ::-1].copy(), [1], [[3]], [1]).total.tolist() == [0]  # past its length nothing is read
        with pytest.raises(ValueError, match="expected labels of int32"):
            jax.jit(lambda n: edit_distance(big[:, ::-1].copy(), n, [[3]], [1]).total)(np.array([1]))
        high = np.array([[0xFFFFFFFF, 0x80000000]], np.uint32)
        for run in (edit_distance, jax.jit(edit_distance)):
            assert run(high, [2], np.array([[-1, -(1 << 31)]], np.int32), [2]).total.tolist() == [2]
            assert run(high, [2], high, [2]).total.tolist() == [0]

    def test_bad_lengths(self):
        """-1 where only a device knows; an error where they are known, or with validate=True."""
        of = [[[1, 2], [1, 2]]], [[2, 1]], [[1, 2]], [2]
        for at, value, words in (
            (1, [[3, 1]], r"hypothesis_lengths: expected lengths in \[-1, L = 2\], got 3 at index \(0, 0\)"),
            (3, [5], r"reference_lengths: expected lengths in \[0, U = 2\], got 5 at index 0"),
        ):
            arguments = [jnp.array(each) for each in of]
            arguments[at] = jnp.array(value)
            with pytest.raises(ValueError, match=words):
                edit_distance(*arguments)
            assert jax.jit(edit_distance)(*arguments).total.tolist() == ([[-1, 1]] if at == 1 else [[-1, -1]])
            with pytest.raises(jax.errors.JaxRuntimeError, match=words):
                jax.block_until_ready(jax.jit(functools.partial(edit_distance, validate=True))(*arguments))

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({0: jnp.zeros(3, int)}, ValueError, r"hypotheses: expected shape \(B, L\) or \(B, N, L\)"),
            ({0: jnp.zeros((2, 3))}, TypeError, "hypotheses: expected integers"),
            ({1: jnp.zeros((2, 1), int)}, ValueError, r"hypothesis_lengths: expected shape \(B,\) = \(2,\), got \(2, 1\)"),
            ({2: jnp.zeros((3, 3), int)}, ValueError, r"references: expected shape \(B, U\) = \(2, U\), got \(3, 3\)"),
            ({2: jnp.zeros((2, 3))}, TypeError, "references: expected integers"),
            ({3: jnp.zeros(3, int)}, ValueError, r"reference_lengths: expected shape \(B,\) = \(2,\)"),
            ({3: jnp.zeros(2)}, TypeError, "reference_lengths: expected integers"),
            ({"blank": 0.5}, TypeError, "blank: expected an int"),
        ],
        ids=str,
    )
    def test_checked_while_tracing(self, change, error, words):
        values = [jnp.zeros((2, 3), int), jnp.zeros(2, int), jnp.zeros((2, 4), int), jnp.zeros(2, int)]
        values = [change.get(i, each) for i, each in enumerate(values)]
        options = {key: value for key, value in change.items() if isinstance(key, str)}
        with pytest.raises(error, match=words):
            jax.eval_shape(lambda *values: edit_distance(*values, **options), *values)

    def test_a_pytree_under_vmap_and_scan(self):
        hypotheses, lengths, references, reference_lengths = sequences()
        expected = tl.edit_distance(hypotheses, lengths, references, reference_lengths)
        by_rank = jax.vmap(edit_distance, in_axes=(1, 1, None, None), out_axes=1)(
            hypotheses, lengths, references, reference_lengths
        )
        _, one_by_one = jax.lax.scan(
            lambda carry, of: (carry, edit_distance(*of)), 0,
            tuple(jnp.asarray(each[:, None]) for each in (hypotheses, lengths, references, reference_lengths)),
        )  # fmt: skip
        for name in NAMES:
            same(getattr(by_rank, name), getattr(expected, name))
            same(getattr(one_by_one, name)[:, 0], getattr(expected, name))


class TestEmbr:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("jitted", [False, True])
    @pytest.mark.parametrize(
        "options",
        [{"interpolation": 0.25, "temperature": 1.5}, {"infeasible": "zero", "blank": 0}, {"listed": False}],
        ids=lambda options: "-".join(options),
    )
    def test_bits_of_the_core(self, dtype, jitted, options):
        nll, reference_nll, distances, hypotheses, lengths = scores(dtype)
        options = dict(options)
        lists = {"hypotheses": hypotheses, "hypothesis_lengths": lengths} if options.pop("listed", True) else {}
        if not lists:
            nll = np.nan_to_num(nll)
        weights = weights_for(4, dtype)
        with wide(dtype):

            def run(nll, reference_nll, distances, lists):
                return weighted(
                    lambda nll, of: embr_loss(nll, distances, reference_nll=of, **lists, **options), weights
                )(nll, reference_nll)  # fmt: skip

            loss, gradients = (jax.jit(run) if jitted else run)(*jax.tree.map(jnp.asarray, (nll, reference_nll, distances, lists)))
            plain = embr_loss(nll, distances, reference_nll=reference_nll, **lists, **options)
        expected, grads = tl.embr_loss(nll, distances, reference_nll=reference_nll, weights=weights, **lists, **options)
        same(loss, expected)
        same(plain, expected)
        same(gradients[0], grads.nll)
        same(gradients[1], grads.reference_nll)
        assert np.asarray(gradients[0]).any()

    def test_loops(self):
        nll, reference_nll, distances, hypotheses, lengths = scores("float32", 3)
        options = {"hypotheses": hypotheses, "hypothesis_lengths": lengths, "temperature": 0.5, "interpolation": 2.0}
        weights = weights_for(4)
        loss, (by_nll, by_reference) = jax.jit(
            weighted(lambda nll, of: embr_loss(nll, distances, reference_nll=of, **options), weights)
        )(nll, reference_nll)  # fmt: skip
        exact, gradient = reference.embr_loss(nll, distances, reference_nll=reference_nll, **options)
        expect_close(np.asarray(loss), exact, 1e-5)
        expect_close(np.asarray(by_nll), weights[:, None] * gradient, 1e-5)
        np.testing.assert_array_equal(by_reference, np.where(np.isfinite(exact), 2 * weights, 0))

    def test_no_reference(self):
        nll, _, distances, _, lengths = scores("float32")
        of = lambda nll: embr_loss(nll, distances, hypothesis_lengths=lengths)  # noqa: E731
        expected, grads = tl.embr_loss(nll, distances, hypothesis_lengths=lengths, weights=weights_for(4))
        loss, (gradient,) = weighted(of, weights_for(4))(nll)
        same(loss, expected)
        same(gradient, grads.nll)

    def test_equal_distances(self):
        """Whose gradient is 0 and nothing else."""
        nll = np.random.default_rng(0).normal(0, 30, (3, 8)).astype("f")
        gradient = jax.grad(lambda nll: (embr_loss(nll, jnp.full((3, 8), 1 / 3)) * jnp.array([1e30, -7, 3])).sum())(nll)
        assert not np.asarray(gradient).any()

    @pytest.mark.parametrize("kind", ["int8", "uint16", "uint32", "int64", "float16", "bfloat16", "float64", "list"])
    def test_kinds_of_distances(self, kind):
        nll, _, distances, _, _ = scores("float32")
        nll = np.nan_to_num(nll)
        distances = np.abs(distances) if kind[0] in "ui" else distances / 3
        given = distances.tolist() if kind == "list" else distances.astype(numpy_dtype(kind))
        expected, grads = tl.embr_loss(nll, given)
        loss, gradient = jax.value_and_grad(lambda nll: embr_loss(nll, given).sum())(nll)
        same(embr_loss(nll, given), expected)
        same(gradient, grads.nll)
        if kind not in ("list", "int64", "float64"):  # of which JAX makes 32 bits before
            same(jax.jit(embr_loss)(nll, given), expected)
        assert np.isfinite(loss)

    def test_distances_of_traced_numbers(self):
        nll = jnp.zeros((1, 2))
        same(jax.jit(lambda far: embr_loss(nll, [[far, 3 * far]]))(0.5), np.ones(1, "f"))

    def test_distances_have_no_gradient(self):
        nll, _, distances, _, lengths = scores("float32")
        gradient = jax.grad(lambda far: embr_loss(nll, far, hypothesis_lengths=lengths, infeasible="zero").sum())
        assert not np.asarray(gradient(distances.astype("f"))).any()

    def test_backward_twice(self):
        nll, reference_nll, distances, _, lengths = scores("float32")
        value, pull = jax.vjp(
            lambda *x: embr_loss(x[0], distances, hypothesis_lengths=lengths, reference_nll=x[1], interpolation=0.5), nll, reference_nll
        )
        first, negative, second = (pull(sign * jnp.ones_like(value)) for sign in (1, -1, 1))
        for one, other, again in zip(first, negative, second, strict=True):
            same(again, one)
            same(-other, one)

    def test_no_gradient_work_without_a_gradient(self, monkeypatch):
        from transducer_loss.adapters.jax import embr as adapter

        asked = []
        monkeypatch.setattr(adapter, "risk", lambda *of, **how: asked.append(how["gradient"]) or embr.risk(*of, **how))
        nll, _, distances, _, lengths = scores("float32")
        call = functools.partial(embr_loss, distances=distances, hypothesis_lengths=lengths)
        jax.block_until_ready((call(nll), jax.jit(call)(nll)))
        assert asked == [False, False]
        jax.block_until_ready(jax.grad(lambda nll: call(nll).sum())(nll))
        assert asked == [False, False, False, True]

    def test_no_hypothesis(self):
        nll, _, distances, _, lengths = scores("float32")
        call = jax.jit(functools.partial(embr_loss, infeasible="raise"))
        assert np.isposinf(embr_loss(nll, distances, hypothesis_lengths=lengths)[2])
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"nll: expected a hypothesis, .* for utterances \[2\]"):
            call(nll, distances, hypothesis_lengths=lengths).block_until_ready()
        others = np.array([0, 1, 3])
        gradient = jax.grad(lambda nll: call(nll, distances[others], hypothesis_lengths=lengths[others]).sum())(nll[others])
        assert np.asarray(gradient).any()

    def test_an_utterance_that_is_not_finite(self):
        nll, _, distances, _, lengths = scores("float32")
        nll[0, 0] = np.nan
        loss, (gradient,) = weighted(
            lambda nll: embr_loss(nll, distances, hypothesis_lengths=lengths), np.full(4, np.inf, "f")
        )(nll)  # fmt: skip
        assert np.isnan(loss[0]) and not np.asarray(gradient[0]).any() and np.isfinite(loss[np.array([1, 3])]).all()

    @pytest.mark.parametrize("listed", [False, True])
    def test_bad_lengths(self, listed):
        """Those of an utterance make its loss NaN, without gradient."""
        nll, _, distances, hypotheses, lengths = scores("float32")
        lengths[0, 1] = 7 if listed else 1 << 21
        lists = {"hypotheses": hypotheses} if listed else {}
        words = rf"hypothesis_lengths: expected lengths in \[-.*, L = .*\], got {lengths[0, 1]} at index \(0, 1\)"
        with pytest.raises(ValueError, match=words):
            embr_loss(nll, distances, hypothesis_lengths=lengths, **lists)
        if not listed:
            return  # a length is not looked at, then, but for its sign
        loss, (gradient,) = jax.jit(
            lambda nll, lengths: weighted(lambda nll: embr_loss(nll, distances, hypothesis_lengths=lengths, **lists), weights_for(4))(nll)
        )(nll, lengths)  # fmt: skip
        assert np.isnan(loss[0]) and not np.asarray(gradient[0]).any()
        same(loss[1], embr_loss(nll[1:2], distances[1:2], hypothesis_lengths=lengths[1:2])[0])
        with pytest.raises(jax.errors.JaxRuntimeError, match=words):
            jax.jit(functools.partial(embr_loss, validate=True))(nll, distances, hypothesis_lengths=lengths, **lists).block_until_ready()

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"nll": jnp.zeros(3)}, ValueError, "nll: expected 2 dimensions"),
            ({"nll": jnp.zeros((2, 3), int)}, TypeError, "nll: expected dtype"),
            ({"distances": jnp.zeros((3, 2))}, ValueError, r"distances: expected shape \(B, N\) = \(2, 3\), got \(3, 2\)"),
            ({"distances": jnp.zeros((2, 3), bool)}, TypeError, "distances: expected numbers"),
            ({"distances": "far"}, TypeError, "distances: expected an array"),
            ({"hypotheses": jnp.zeros((2, 3, 4), int)}, ValueError, "hypothesis_lengths: expected an array of shape"),
            ({"hypotheses": jnp.zeros((2, 2, 4), int), "hypothesis_lengths": jnp.zeros((2, 3), int)}, ValueError,
             r"hypotheses: expected shape \(B, N, L\) = \(2, 3, 4\)"),
            ({"hypothesis_lengths": jnp.zeros(2, int)}, ValueError, r"hypothesis_lengths: expected shape \(B, N\)"),
            ({"hypothesis_lengths": jnp.zeros((2, 3))}, TypeError, "hypothesis_lengths: expected integers"),
            ({"interpolation": 0.5}, ValueError, "reference_nll: expected an array"),
            ({"interpolation": -0.5}, ValueError, "interpolation: expected 0 or more"),
            ({"reference_nll": jnp.zeros(3)}, ValueError, r"reference_nll: expected shape \(B,\) = \(2,\)"),
            ({"reference_nll": jnp.zeros(2, jnp.float16)}, TypeError, "reference_nll: expected dtype float32 as nll"),
            ({"temperature": 0}, ValueError, "temperature: expected more than 0"),
            ({"temperature": jnp.ones(())}, TypeError, "temperature: expected a number"),
            ({"infeasible": "nan"}, ValueError, "infeasible: expected one of"),
            ({"blank": "0"}, TypeError, "blank: expected an int"),
        ],
        ids=str,
    )  # fmt: skip
    def test_checked_while_tracing(self, change, error, words):
        values = {"nll": jnp.zeros((2, 3)), "distances": jnp.zeros((2, 3), int), **change}
        arrays = {key: value for key, value in values.items() if isinstance(value, jax.Array) and key != "temperature"}
        others = {key: value for key, value in values.items() if key not in arrays}
        with pytest.raises(error, match=words):
            jax.eval_shape(lambda arrays: embr_loss(**arrays, **others), arrays)


INDEX = np.array([1, 0, 1, 1, 3, 0])


def shared_arguments(dtype, bias=True):
    """Six utterances of four encoders, one of which nobody reads and one a single utterance of a single frame."""
    inputs, (_, frames, _) = joint_arguments(dtype, bias=bias)
    rng = np.random.default_rng(5)
    labels = np.array([4, 0, 3, 4, 2, 1])
    frames = np.array([9, 6, 7, 1])
    encoder, predictor = rng.normal(size=(4, 9, 6)), rng.normal(size=(6, 5, 6))
    for e, count in enumerate(frames):
        encoder[e, count:] = np.nan
    encoder[2] = np.nan
    for b, length in enumerate(labels):
        predictor[b, length + 1 :] = np.nan
    targets = rng.integers(0, 11, (6, 4))
    targets[np.arange(4) >= labels[:, None]] = -1
    kind = inputs[0].dtype
    return (encoder.astype(kind), predictor.astype(kind), *inputs[2:]), (targets, frames, labels)


def without_repeats(inputs, batch):
    """The same with an encoder for each utterance."""
    (encoder, *rest), (targets, frames, labels) = inputs, batch
    return (encoder[INDEX], *rest), (targets, frames[INDEX], labels)


class TestSharedEncoders:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("jitted", [False, True])
    def test_bits_of_the_core(self, dtype, jitted):
        inputs, batch = shared_arguments(dtype)
        weights = weights_for(6, dtype)
        with wide(dtype):

            def run(inputs, index, *batch):
                return weighted(lambda *inputs: joint_rnnt_loss(*inputs, *batch, encoder_index=index, blank=-1), weights)(*inputs)

            loss, gradients = (jax.jit(run) if jitted else run)(*jax.tree.map(jnp.asarray, (inputs, INDEX, *batch)))
        expected, grads = core_joint(inputs, batch, weights, encoder_index=INDEX, blank=-1)
        same(loss, expected)
        for actual, grad in zip(gradients, grads, strict=True):
            same(actual, grad)
        assert not np.asarray(gradients[0][2]).any() and np.isfinite(loss).all()

    @pytest.mark.parametrize(
        "options",
        [
            {"dropout": 0.25, "seed": 3, "activation": "silu"},
            {"topology": "modified", "infeasible": "zero", "fastemit_lambda": 0.25},
            {"workspace": 30_000, "occupancy_floor": 0.0},
            {"workspace": 100_000},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_options(self, options):
        inputs, batch = shared_arguments("float32", bias=False)
        weights = weights_for(6)
        loss, (gradients,) = jax.jit(
            weighted(lambda inputs: joint_rnnt_loss(*inputs, *batch, encoder_index=INDEX.tolist(), **options), weights)
        )(inputs)  # fmt: skip
        expected, grads = core_joint(inputs, batch, weights, encoder_index=INDEX, **options)
        same(loss, expected)
        for actual, grad in zip(gradients[:3], grads[:3], strict=True):
            same(actual, grad)

    def test_as_with_an_encoder_each(self):
        inputs, batch = shared_arguments("float32")
        weights = weights_for(6)
        loss, (encoder, *gradients) = jax.jit(
            weighted(lambda *inputs: joint_rnnt_loss(*inputs, *batch, encoder_index=INDEX), weights)
        )(*inputs)  # fmt: skip
        alone, rest = without_repeats(inputs, batch)
        expected, (each, *grads) = weighted(lambda *inputs: joint_rnnt_loss(*inputs, *rest), weights)(*alone)
        same(loss, expected)
        np.testing.assert_allclose(encoder, jnp.zeros_like(encoder).at[INDEX].add(each), atol=1e-5)
        for actual, grad in zip(gradients, grads, strict=True):
            np.testing.assert_allclose(actual, grad, atol=1e-5)

    def test_band_and_classes(self):
        inputs, batch = shared_arguments("float32")
        am, lm = inputs[0][INDEX] @ inputs[2].T, inputs[1] @ inputs[2].T

        @jax.jit
        def run(inputs, index, targets, frames, labels):
            _, occupancy = simple_rnnt_loss(am, lm, targets, frames[index], labels)
            kept = {
                "band": prune(occupancy, frames[index], labels, s_range=4),
                "classes": sample_classes(targets, labels, vocab_size=11, num_samples=2, correction=True),
            }
            return kept, weighted(
                lambda inputs: joint_rnnt_loss(*inputs, targets, frames, labels, encoder_index=index, **kept), weights_for(6)
            )(inputs)  # fmt: skip

        kept, (loss, (gradients,)) = run(inputs, INDEX, *batch)
        kept = jax.tree.map(np.asarray, kept)
        expected, grads = core_joint(inputs, batch, weights_for(6), encoder_index=INDEX, **kept)
        same(loss, expected)
        for actual, grad in zip(gradients, grads, strict=True):
            same(actual, grad)
        same(joint_rnnt_loss(*inputs, *batch, encoder_index=INDEX, **kept), expected)
        same(jax.jit(lambda kept: joint_rnnt_loss(*inputs, *batch, encoder_index=INDEX, **kept))(kept), expected)

    @pytest.mark.parametrize("banded", [False, True])
    def test_bad_numbers_within_jit(self, banded):
        """NaN and no gradient for the utterances that they belong to, all else as it is without these."""
        inputs, batch = shared_arguments("float32")
        am, lm = inputs[0][INDEX] @ inputs[2].T, inputs[1] @ inputs[2].T
        band = tl.prune(tl.simple_rnnt_loss(am, lm, batch[0], batch[1][INDEX], batch[2])[2], batch[1][INDEX], batch[2], s_range=5)
        options = {"band": band} if banded else {}

        @jax.jit
        def run(inputs, index, *batch):
            return weighted(
                lambda inputs: joint_rnnt_loss(*inputs, *batch, encoder_index=index, infeasible="raise", **options), weights_for(6)
            )(inputs)

        known, (expected,) = run(inputs, INDEX, *batch)
        for where, at, value, bad in (
            ("index", 0, 4, [0]), ("index", 3, -1, [3]), ("frames", 1, 0, [0, 2, 3]), ("frames", 1, 10, [0, 2, 3]),
            ("frames", 2, -9, []), ("labels", 2, 5, [2]), ("labels", 3, -1, [3]), ("targets", 4, 99, [4]),
        ):  # fmt: skip
            values = {"index": INDEX, **dict(zip(("targets", "frames", "labels"), batch, strict=True))}
            values[where] = values[where].copy()
            values[where][at] = value
            loss, (gradients,) = run(inputs, *values.values())
            good = np.setdiff1d(np.arange(6), bad)
            assert np.isnan(loss[np.array(bad, int)]).all(), where
            np.testing.assert_allclose(loss[good], known[good], rtol=1e-6)
            assert not np.asarray(gradients[1][np.array(bad, int)]).any()
            np.testing.assert_allclose(gradients[1][good], expected[1][good], atol=1e-5)
            weights = weights_for(6).copy()
            weights[bad] = 0
            _, grads = core_joint(inputs, batch, weights, encoder_index=INDEX, **options)
            for actual, grad in zip(gradients, grads, strict=True):
                np.testing.assert_allclose(actual, grad, atol=1e-5)
            named = {"index": "encoder_index", "frames": "encoder_lengths", "labels": "target_lengths"}.get(where, where)
            with pytest.raises(ValueError, match=f"{named}: expected"):
                joint_rnnt_loss(
                    *inputs, values["targets"], values["frames"], values["labels"], encoder_index=values["index"], **options
                )  # fmt: skip
            if not banded:
                checked = jax.jit(lambda *of: joint_rnnt_loss(*inputs, *of[1:], encoder_index=of[0], validate=True))
                with pytest.raises(jax.errors.JaxRuntimeError, match=f"{named}: expected"):
                    checked(*values.values()).block_until_ready()

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"index": jnp.zeros(5, int)}, ValueError, r"encoder_index: expected shape \(B,\) = \(6,\), got \(5,\)"),
            ({"index": jnp.zeros(6)}, TypeError, "encoder_index: expected integers"),
            ({"frames": jnp.ones(6, int)}, ValueError, r"encoder_lengths: expected shape \(E,\) = \(4,\), got \(6,\)"),
            ({"index": None}, ValueError, r"predictor: expected shape \(B, U\+1, H\) = \(4, 5, 6\)"),
            ({"workspace": 100}, ValueError, "workspace: expected at least"),
        ],
        ids=str,
    )
    def test_checked_while_tracing(self, change, error, words):
        inputs, (targets, frames, labels) = shared_arguments("float32")
        values = {"index": INDEX, "frames": frames, "workspace": None, **change}
        with pytest.raises(error, match=words):
            jax.eval_shape(
                lambda index, frames, *rest: joint_rnnt_loss(
                    *rest[:4], rest[4], frames, rest[5], encoder_index=index, workspace=values["workspace"]
                ),
                values["index"], values["frames"], *inputs, targets, labels,
            )  # fmt: skip

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_as_on_a_device(self, monkeypatch, dtype):
        rooms = []
        callback = jax_callback.buffer_callback

        def spy(body, outputs, **options):
            rooms.append([each.shape[0] for each in outputs if each.dtype == jnp.uint8])
            assert all(each.dtype != jnp.bfloat16 for each in outputs)
            return callback(body, outputs, **options)

        monkeypatch.setattr(jax_callback, "buffer_callback", spy)
        for module in (jax_callback, jax_joint):
            monkeypatch.setattr(module, "on_device", lambda: True)
        inputs, batch = shared_arguments(dtype)
        targets, _, labels = batch
        nll, reference_nll, distances, hypotheses, lengths = scores(dtype)
        embedding, positions = vectors(dtype)

        @jax.jit
        def run(inputs, nll, vectors):
            call = functools.partial(weighted, weights=weights_for(6))
            return (
                call(lambda *x: joint_rnnt_loss(*x, *batch, encoder_index=INDEX))(*inputs),
                weighted(lambda x, y: embr_loss(x, distances, hypotheses=hypotheses, hypothesis_lengths=lengths, reference_nll=y,
                                                interpolation=0.5), weights_for(4))(nll, reference_nll),
                weighted(lambda *x: reduced_predictor(*x, targets, labels), upstream)(*vectors),
                edit_distance(hypotheses, lengths, *sequences()[2:]).total,
            )  # fmt: skip

        upstream = np.ones((6, 5, 6), embedding.dtype)
        (loss, gradients), (risk, by_scores), (rows, by_vectors), total = run(inputs, nll, (embedding, positions))
        expected, grads = core_joint(inputs, batch, weights_for(6), encoder_index=INDEX)
        same(loss, expected)
        jax.tree.map(same, list(gradients), grads)
        expected, by_nll = tl.embr_loss(nll, distances, hypotheses=hypotheses, hypothesis_lengths=lengths, reference_nll=reference_nll,
                                        interpolation=0.5, weights=weights_for(4))  # fmt: skip
        same(risk, expected)
        jax.tree.map(same, by_scores, (by_nll.nll, by_nll.reference_nll))
        same(rows, tl.reduced_predictor(embedding, positions, targets, labels))
        by = tl.reduced_predictor_backward(upstream, embedding, positions, targets, labels)
        jax.tree.map(same, by_vectors, (by.embedding, by.positions))
        same(total, distances)
        assert len(rooms) >= 6 and all(len(room) == 1 and room[0] % 512 == 0 for room in rooms)


def vectors(dtype, reach=3):
    rng = np.random.default_rng(7)
    return rng.normal(size=(11, 6)).astype(numpy_dtype(dtype)), rng.normal(size=(2, reach, 6)).astype(numpy_dtype(dtype))


def labelled():
    targets = np.random.default_rng(8).integers(0, 11, (4, 5))
    labels = np.array([5, 0, 3, 1])
    targets[np.arange(5) >= labels[:, None]] = -1
    return targets, labels


class TestReducedPredictor:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("jitted", [False, True])
    @pytest.mark.parametrize("last", [False, True])
    def test_bits_of_the_core(self, dtype, jitted, last):
        of, (targets, labels) = vectors(dtype), labelled()
        upstream = np.random.default_rng(9).normal(size=(4, 6) if last else (4, 6, 6)).astype(of[0].dtype)
        if not last:
            upstream[np.arange(6) > labels[:, None]] = np.nan  # rows past the last label
        with wide(dtype):

            def run(of, targets, labels, upstream):
                return weighted(lambda *of: reduced_predictor(*of, targets, labels, last=last), upstream)(*of)

            rows, gradients = (jax.jit(run) if jitted else run)(*jax.tree.map(jnp.asarray, (of, targets, labels, upstream)))
        same(rows, tl.reduced_predictor(*of, targets, labels, last=last))
        grads = tl.reduced_predictor_backward(upstream, *of, targets, labels, last=last)
        same(gradients[0], grads.embedding)
        same(gradients[1], grads.positions)
        assert np.asarray(gradients[0]).any() and np.asarray(gradients[1]).any()

    def test_loops(self):
        of, (targets, labels) = vectors("float32", reach=7), labelled()
        upstream = -3 * np.random.default_rng(9).normal(size=(4, 6, 6)).astype("f")
        rows, gradients = weighted(lambda *of: reduced_predictor(*of, targets.tolist(), labels.tolist()), upstream)(*of)
        expect_close(np.asarray(rows), reference.reduced_predictor(*of, targets, labels), 1e-5)
        for actual, exact in zip(gradients, reference.reduced_predictor_backward(upstream, *of, targets, labels), strict=True):
            expect_close(np.asarray(actual), exact, 1e-5 * abs(exact).max())

    def test_last_rows_are_those_of_a_stream(self):
        """What a decoder sees of the last N labels alone."""
        of, (targets, labels) = vectors("float32"), labelled()
        rows = reduced_predictor(*of, targets, labels)
        step = jax.jit(functools.partial(reduced_predictor, last=True))
        same(step(*of, targets, labels), rows[jnp.arange(4), labels])
        same(step(*of, targets[:1, 2:], [3]), rows[:1, 5])

    def test_no_labels(self):
        of = vectors("float32")
        rows, gradients = weighted(lambda *of: reduced_predictor(*of, np.zeros((2, 0), int), [0, 0]), np.ones((2, 1, 6), "f"))(*of)
        assert rows.shape == (2, 1, 6) and not np.asarray(rows).any()
        assert not any(np.asarray(each).any() for each in gradients)

    def test_tied(self):
        """One parameter for embedding and output layer: its gradient is the sum of both."""
        (encoder, _, _, _), (_, frames, labels) = joint_arguments("float32")
        (embedding, positions), targets = vectors("float32"), joint_arguments("float32")[1][0]
        rest = targets, frames, labels

        def loss(embedding, weight):
            return joint_rnnt_loss(encoder, reduced_predictor(embedding, positions, targets, labels), weight, None, *rest).sum()

        tied = jax.jit(jax.grad(lambda both: loss(both, both)))(embedding)
        same(tied, jax.jit(lambda one, other: one + other)(*jax.jit(jax.grad(loss, (0, 1)))(embedding, embedding)))

    def test_bad_numbers(self):
        """Rows that see them are NaN and have no gradient; with validate=True an error."""
        of, (targets, labels) = vectors("float32"), labelled()
        upstream = np.ones((4, 6, 6), "f")

        @jax.jit
        def run(of, targets, labels):
            return weighted(lambda *of: reduced_predictor(*of, targets, labels), upstream)(*of)

        checked = jax.jit(functools.partial(reduced_predictor, validate=True))
        for at, value, words in (
            (0, 11, r"targets: expected labels in \[0, V = 11\), got 11 at index \(0, 0\)"),
            (0, -1, r"targets: expected labels in \[0, V = 11\), got -1 at index \(0, 0\)"),
            (1, 6, r"target_lengths: expected lengths in \[0, U = 5\], got 6 at index 0"),
        ):
            changed = [targets.copy(), labels.copy()]
            changed[at][(0, 0)[: changed[at].ndim]] = value
            rows, gradients = run(of, *changed)
            seen = np.arange(6) > (0 if at == 0 else -1)
            seen &= np.arange(6) <= (3 if at == 0 else 6)
            assert np.isnan(rows[0, seen]).all() and np.isfinite(rows[0, ~seen]).all() and np.isfinite(rows[1:]).all()
            assert all(np.isfinite(each).all() for each in gradients)
            with pytest.raises(ValueError, match=words):
                reduced_predictor(*of, *changed)
            with pytest.raises(jax.errors.JaxRuntimeError, match=words):
                checked(*of, *changed).block_until_ready()

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({0: jnp.zeros((11,))}, ValueError, "embedding: expected 2 dimensions"),
            ({0: jnp.zeros((11, 6), int)}, TypeError, "embedding: expected dtype"),
            ({1: jnp.zeros((2, 3, 5))}, ValueError, r"positions: expected shape \(heads, N, E\) = \(2, 3, 6\)"),
            ({1: jnp.zeros((2, 3, 6), jnp.float16)}, TypeError, "positions: expected dtype float32 as embedding"),
            ({1: jnp.zeros((2, 0, 6))}, ValueError, "positions: expected at least one"),
            ({2: jnp.zeros((4,), int)}, ValueError, r"targets: expected shape \(B, U\)"),
            ({2: jnp.zeros((4, 5))}, TypeError, "targets: expected integers"),
            ({3: jnp.zeros((3,), int)}, ValueError, r"target_lengths: expected shape \(B,\) = \(4,\)"),
        ],
        ids=str,
    )
    def test_checked_while_tracing(self, change, error, words):
        values = [change.get(i, each) for i, each in enumerate((*vectors("float32"), *labelled()))]
        with pytest.raises(error, match=words):
            jax.eval_shape(reduced_predictor, *values)


def test_a_step_of_embr_within_one_jit():
    """N-best lists of shared encoders through a tied decoder: risk and gradients are those of the core, call by call."""
    (encoder, _, _, bias), _ = joint_arguments("float32")
    frames = np.array([9, 1, 6, 9])
    embedding, positions = vectors("float32")
    hypotheses, lengths, *_ = sequences()
    index, real = np.repeat(np.arange(4), 5), np.maximum(lengths, 0)

    @jax.jit
    def step(params, encoder, hypotheses, lengths, references, reference_lengths):
        edits = edit_distance(hypotheses, lengths, references, reference_lengths)

        def risk(params, encoder):
            flat, counts = hypotheses.reshape(20, 6), jnp.maximum(lengths, 0).reshape(20)
            predictor = reduced_predictor(params["tied"], params["positions"], flat, counts)
            nll = joint_rnnt_loss(encoder, predictor, params["tied"], bias, flat, frames, counts, encoder_index=index)
            loss = embr_loss(nll.reshape(4, 5), edits.total, hypotheses=hypotheses, hypothesis_lengths=lengths, infeasible="zero")
            return loss.sum(), loss

        return edits, jax.value_and_grad(risk, (0, 1), has_aux=True)(params, encoder)

    params = {"tied": embedding, "positions": positions}
    edits, ((_, loss), (by_params, by_encoder)) = step(params, encoder, *sequences())
    flat, counts = hypotheses.reshape(20, 6), real.reshape(20)
    predictor = tl.reduced_predictor(embedding, positions, flat, counts)
    inputs = encoder, predictor, embedding, bias
    nll = core_joint(inputs, (flat, frames, counts), np.ones(20, "f"), encoder_index=index)[0]
    expected, grads = tl.embr_loss(
        nll.reshape(4, 5), edits.total, hypotheses=hypotheses, hypothesis_lengths=lengths, infeasible="zero"
    )
    same(loss, expected)
    _, (known_encoder, by_predictor, by_weight, _) = core_joint(
        inputs, (flat, frames, counts), grads.nll.reshape(20), encoder_index=index
    )
    by = tl.reduced_predictor_backward(by_predictor, embedding, positions, flat, counts)
    same(by_encoder, known_encoder)
    same(by_params["positions"], by.positions)
    np.testing.assert_allclose(by_params["tied"], by_weight + by.embedding, rtol=1e-6, atol=1e-6)
    assert np.asarray(by_encoder).any() and not np.asarray(by_encoder[2]).any()
