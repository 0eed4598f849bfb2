"""Gates, cost and backlog of Amortized Networks for JAX: the same numbers as the core's, bit by bit."""

import functools

import numpy as np
import pytest

import transducer_loss as tl
from helpers import FLOATS, expect_close, numpy_dtype
from transducer_loss import amortized, reference

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from test_jax import same, weighted, weights_for, wide  # noqa: E402
from transducer_loss.adapters.jax import amortized as adapter  # noqa: E402
from transducer_loss.adapters.jax import amortized_backlog, amortized_cost, gumbel_gate  # noqa: E402
from transducer_loss.adapters.jax import callback as jax_callback  # noqa: E402

LENGTHS = np.array([9, 1, 6, 4])
PER_BRANCH = [2.25, 0.1, 0.7]

TERMS = {
    "cost": (amortized_cost, tl.amortized_cost, {}),
    "backlog": (amortized_backlog, tl.amortized_backlog, {"frame_period": 0.6}),
    "last backlog": (amortized_backlog, tl.amortized_backlog, {"statistic": "last", "frame_period": 0.6}),
}
every_term = pytest.mark.parametrize("term", TERMS)


def ragged(dtype, seed=0, positive=True):
    """(B, T, K), NaN in the padding."""
    rng = np.random.default_rng(seed)
    x = rng.dirichlet(np.ones(3), (4, 9)) if positive else rng.normal(size=(4, 9, 3))
    x[np.arange(9) >= LENGTHS[:, None]] = np.nan
    return x.astype(numpy_dtype(dtype))


@every_term
class TestTerms:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("jitted", [False, True])
    def test_bits_of_the_core(self, term, dtype, jitted):
        function, core, options = TERMS[term]
        gates, weights = ragged(dtype), weights_for(4, dtype)
        with wide(dtype):

            def run(gates, lengths):
                return weighted(lambda gates: function(gates, PER_BRANCH, lengths, **options), weights)(gates)

            value, (gradient,) = (jax.jit(run) if jitted else run)(jnp.asarray(gates), jnp.asarray(LENGTHS))
            plain = function(gates, PER_BRANCH, LENGTHS, **options)
        expected, grad = core(gates, PER_BRANCH, LENGTHS, weights=weights, **options)
        same(value, expected)
        same(plain, expected)
        same(gradient, grad)
        assert np.asarray(gradient)[0].any() and not np.asarray(gradient)[1, 1:].any()

    def test_loops(self, term):
        function, core, options = TERMS[term]
        gates, weights = ragged("float32"), weights_for(4)
        value, (gradient,) = weighted(lambda gates: function(gates, PER_BRANCH, LENGTHS, **options), weights)(gates)
        exact, grad = getattr(reference, core.__name__)(gates, PER_BRANCH, LENGTHS, **options)
        expect_close(np.asarray(value), exact, 1e-6)
        expect_close(np.asarray(gradient), weights[:, None, None] * grad, 1e-6 * abs(weights).max())

    def test_numbers_per_branch(self, term):
        """Those of JAX may be traced; all others are as exact as the core has them."""
        function, core, options = TERMS[term]
        gates = ragged("float32")
        exact = core(gates, PER_BRANCH, LENGTHS, **options)[0]
        for given in (PER_BRANCH, tuple(PER_BRANCH), np.array(PER_BRANCH), np.array([9.0, *PER_BRANCH])[1:]):
            same(function(gates, given, LENGTHS, **options), exact)
            same(jax.jit(lambda gates, given=given: function(gates, given, LENGTHS, **options))(gates), exact)
        for kind in ("float32", "float16", "bfloat16", "int8", "uint16", "int32", "uint32"):
            given = (3 * np.array(PER_BRANCH)).astype(numpy_dtype(kind))
            expected = core(gates, given, LENGTHS, **options)[0]
            same(function(gates, jnp.asarray(given), LENGTHS, **options), expected)
            same(jax.jit(lambda given: function(gates, given, LENGTHS, **options))(given), expected)
        listed = jax.jit(lambda one: function(gates, [one, 3 * one, 0.5], LENGTHS, **options))(0.25)
        same(listed, core(gates, [0.25, 0.75, 0.5], LENGTHS, **options)[0])
        gradient = jax.grad(lambda given: function(gates, given, LENGTHS, **options).sum())(jnp.array(PER_BRANCH))
        assert not np.asarray(gradient).any()

    def test_backward_twice(self, term):
        function, _, options = TERMS[term]
        value, pull = jax.vjp(lambda gates: function(gates, PER_BRANCH, LENGTHS, **options), ragged("float16"))
        first, negative, second = (pull(sign * jnp.ones_like(value))[0] for sign in (1, -1, 1))
        same(second, first)
        same(-negative, first)

    def test_no_gradient_work_without_a_gradient(self, term, monkeypatch):
        function, _, options = TERMS[term]
        asked, name = [], "mean_cost" if term == "cost" else "waiting"
        of_core = getattr(amortized, name)
        monkeypatch.setattr(adapter, name, lambda *of, **how: asked.append(how["gradient"]) or of_core(*of, **how))
        call = functools.partial(function, lengths=LENGTHS, **{"costs" if term == "cost" else "durations": PER_BRANCH}, **options)
        jax.block_until_ready((call(ragged("float32")), jax.jit(call)(ragged("float32"))))
        jax.block_until_ready(jax.grad(lambda gates: call(gates).sum())(ragged("float32")))
        assert asked == [False, False, False, True]

    def test_an_utterance_that_is_not_finite(self, term):
        function, _, options = TERMS[term]
        gates = ragged("float32")
        gates[2, 3, 1] = np.nan
        value, (gradient,) = weighted(
            lambda gates: function(gates, PER_BRANCH, LENGTHS, **options), np.full(4, np.inf, "f")
        )(gates)  # fmt: skip
        assert np.isnan(value[2]) and np.isfinite(np.delete(value, 2)).all() and not np.asarray(gradient[2]).any()

    def test_bad_lengths(self, term):
        """NaN and no gradient within jit; an error where they are known, or with validate=True."""
        function, core, options = TERMS[term]
        gates, weights = ragged("float32"), weights_for(4)
        known, grad = core(gates, PER_BRANCH, LENGTHS, weights=weights, **options)
        run = jax.jit(lambda gates, lengths: weighted(lambda gates: function(gates, PER_BRANCH, lengths, **options), weights)(gates))
        checked = jax.jit(lambda lengths: function(gates, PER_BRANCH, lengths, validate=True, **options))
        for bad in (10, 0, -1, -(1 << 31)):
            lengths = np.where(np.arange(4) == 3, bad, LENGTHS)
            value, (gradient,) = run(gates, lengths)
            assert np.isnan(value[3]) and not np.asarray(gradient[3]).any()
            same(value[:3], known[:3])
            same(gradient[:3], grad[:3])
            words = rf"lengths: expected lengths in \[1, T = 9\], got {bad} at index 3"
            with pytest.raises(ValueError, match=words):
                function(gates, PER_BRANCH, jnp.asarray(lengths), **options)
            with pytest.raises(jax.errors.JaxRuntimeError, match=words):
                checked(lengths).block_until_ready()
        with pytest.raises(ValueError, match="got 4294967297 at"):  # which 32 bits would make a 1 of
            function(gates, PER_BRANCH, np.array([1, 1, 1, (1 << 32) + 1]), **options)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"gates": jnp.zeros((4, 3))}, ValueError, "gates: expected 3 dimensions"),
            ({"gates": jnp.zeros((4, 9, 3), int)}, TypeError, "gates: expected dtype"),
            ({"gates": "open"}, TypeError, "gates: expected an array, got str"),
            ({"each": [1.0, 2.0]}, ValueError, r"(costs|durations): expected shape \(K,\) = \(3,\), got \(2,\)"),
            ({"each": jnp.ones((1, 3))}, ValueError, r"(costs|durations): expected shape \(K,\)"),
            ({"each": jnp.ones(3, bool)}, TypeError, "(costs|durations): expected numbers"),
            ({"each": ["a", "b", "c"]}, ValueError, "(costs|durations): expected numbers"),
            ({"lengths": [1, 2, 3]}, ValueError, r"lengths: expected shape \(B,\) = \(4,\), got \(3,\)"),
            ({"lengths": jnp.ones(4)}, TypeError, "lengths: expected integers"),
        ],
        ids=str,
    )
    def test_checked_while_tracing(self, term, change, error, words):
        function, _, options = TERMS[term]
        values = {"gates": jnp.zeros((4, 9, 3)), "each": PER_BRANCH, "lengths": LENGTHS, **change}
        arrays = {name: value for name, value in values.items() if not isinstance(value, (list, str))}
        with pytest.raises(error, match=words):
            jax.eval_shape(lambda arrays: function(*{**values, **arrays}.values(), **options), arrays)


def test_options_of_the_backlog():
    for options, error, words in (
        ({"frame_period": -1}, ValueError, "frame_period: expected 0 or more"),
        ({"frame_period": jnp.ones(())}, TypeError, "frame_period: expected a number"),
        ({"statistic": "max"}, ValueError, "statistic: expected one of"),
    ):
        with pytest.raises(error, match=words):
            amortized_backlog(ragged("float32"), PER_BRANCH, LENGTHS, **options)


class TestGates:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("jitted", [False, True])
    @pytest.mark.parametrize("hard", [False, True])
    def test_bits_of_the_core(self, dtype, jitted, hard):
        logits = ragged(dtype, positive=False)
        upstream = -2 * ragged(dtype, 1, positive=False)  # NaN in the padding
        options = {"temperature": 0.7, "seed": 5}
        with wide(dtype):

            def run(logits, lengths, upstream):
                return weighted(lambda x: gumbel_gate(x, lengths, hard=hard, **options), upstream)(logits)

            gates, (gradient,) = (jax.jit(run) if jitted else run)(*map(jnp.asarray, (logits, LENGTHS, upstream)))
        same(gates, tl.gumbel_gate(logits, LENGTHS, hard=hard, **options))
        same(gradient, tl.gumbel_gate_backward(upstream, logits, LENGTHS, **options))
        assert np.asarray(gradient).any() and not np.asarray(gates)[1, 1:].any()

    def test_loops(self):
        logits, upstream = ragged("float32", positive=False), np.random.default_rng(1).normal(size=(4, 9, 3)).astype("f")
        for options in ({}, {"noise": False, "temperature": 2.0}, {"seed": 1 << 63, "temperature": 0.25}):
            gates, (gradient,) = weighted(lambda x, of=options: gumbel_gate(x, LENGTHS, **of), upstream)(logits)
            expect_close(np.asarray(gates), reference.gumbel_gate(logits, LENGTHS, **options), 1e-5)
            expect_close(np.asarray(gradient), reference.gumbel_gate_backward(upstream, logits, LENGTHS, **options), 1e-4)

    def test_without_lengths(self):
        logits, upstream = np.nan_to_num(ragged("float32", positive=False)), np.ones((4, 9, 3), "f") * np.array([1, -2, 5], "f")
        gates, (gradient,) = jax.jit(weighted(lambda x: gumbel_gate(x, hard=True), upstream))(logits)
        same(gates, tl.gumbel_gate(logits, hard=True))
        same(gradient, tl.gumbel_gate_backward(upstream, logits))
        assert (np.asarray(gates).sum(-1) == 1).all()

    def test_seeds(self):
        """All 64 bits of a number, of either sign; keys; and traced ones."""
        logits = np.zeros((2, 3, 4), "f")
        drawn = jax.jit(lambda seed: gumbel_gate(logits, seed=seed))
        for seed in (0, 7, -3):
            same(drawn(seed), tl.gumbel_gate(logits, seed=seed))
        for seed in (-3, (1 << 63) + 5, (1 << 64) - 1, -(1 << 63)):
            same(gumbel_gate(logits, seed=seed), tl.gumbel_gate(logits, seed=seed))
        for kind in (np.uint16, np.int8, np.uint32):
            same(drawn(kind(9)), tl.gumbel_gate(logits, seed=9))
        same(drawn(np.uint32(0xFFFFFFFF)), tl.gumbel_gate(logits, seed=0xFFFFFFFF))
        key = jax.random.key(5)
        one, other = drawn(jax.random.fold_in(key, 1)), drawn(jax.random.fold_in(key, 2))
        assert (np.asarray(one) != np.asarray(other)).any()
        words = np.asarray(jax.random.key_data(jax.random.fold_in(key, 1)), np.uint64)
        same(one, tl.gumbel_gate(logits, seed=int(words[0]) + (int(words[1]) << 32)))
        with pytest.raises(TypeError, match="seed: expected an int"):
            drawn(jnp.ones(()))

    def test_the_same_noise_in_backward(self):
        logits, upstream = np.zeros((2, 3, 4), "f"), np.random.default_rng(0).normal(size=(2, 3, 4)).astype("f")

        def step(carry, seed):
            gates, pull = jax.vjp(lambda x: gumbel_gate(x, seed=seed), jnp.asarray(logits))
            return carry, (gates, pull(jnp.asarray(upstream))[0])

        _, (gates, gradients) = jax.jit(lambda seeds: jax.lax.scan(step, 0, seeds))(jnp.arange(3))
        for seed in range(3):
            same(gates[seed], tl.gumbel_gate(logits, seed=seed))
            same(gradients[seed], tl.gumbel_gate_backward(upstream, logits, seed=seed))

    def test_a_temperature_that_changes(self):
        """Traced, so that nothing compiles again; without gradient."""
        logits, upstream = ragged("float32", positive=False), np.random.default_rng(1).normal(size=(4, 9, 3)).astype("f")
        traces = []

        @jax.jit
        def run(logits, temperature):
            traces.append(1)
            return weighted(lambda x: gumbel_gate(x, LENGTHS, temperature=temperature, seed=2), upstream)(logits)

        for temperature in (2.0, 0.5, 0.1):
            gates, (gradient,) = run(logits, temperature)
            options = {"temperature": float(np.float32(temperature)), "seed": 2}
            same(gates, tl.gumbel_gate(logits, LENGTHS, **options))
            same(gradient, tl.gumbel_gate_backward(upstream, logits, LENGTHS, **options))
        same(gates, gumbel_gate(logits, LENGTHS, temperature=jnp.float32(0.1), seed=2))
        same(run(logits, 2)[0], tl.gumbel_gate(logits, LENGTHS, temperature=2, seed=2))
        assert len(traces) == 2  # a float and an int
        by_heat = jax.grad(lambda heat: gumbel_gate(np.ones((1, 2, 3), "f"), temperature=heat)[0, 0, 0])(0.5)
        assert by_heat == 0
        for bad in (0.0, -1.0, np.nan, np.inf):
            # From the second call on JAX takes another way, which raises a ValueError.
            with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="temperature: expected"):
                jax.block_until_ready(run(logits, bad))

    def test_no_finite_gates(self):
        logits = np.zeros((2, 3, 2), "f")
        logits[0, 1] = -np.inf
        logits[1, 0, 0], logits[1, 2, 0] = np.nan, -np.inf
        gates, (gradient,) = weighted(lambda x: gumbel_gate(x, [3, 3]), np.full((2, 3, 2), 3, "f"))(logits)
        assert np.isnan(gates[0, 1]).all() and np.isnan(gates[1, 0]).all() and np.isfinite(gradient).all()
        assert gates[1, 2].tolist() == [0, 1]

    def test_bad_lengths(self):
        """NaN, and no gradient, within jit; an error where they are known, or with validate=True."""
        logits, upstream = ragged("float32", positive=False), np.ones((4, 9, 3), "f")
        run = jax.jit(lambda logits, lengths: weighted(lambda x: gumbel_gate(x, lengths), upstream)(logits))
        checked = jax.jit(lambda lengths: gumbel_gate(logits, lengths, validate=True))
        for bad in (10, 0):
            lengths = np.where(np.arange(4) == 0, bad, LENGTHS)
            gates, (gradient,) = run(logits, lengths)
            assert np.isnan(gates[0]).all() and np.isfinite(gates[1:]).all() and not np.asarray(gradient[0]).any()
            words = rf"lengths: expected lengths in \[1, T = 9\], got {bad} at index 0"
            with pytest.raises(ValueError, match=words):
                gumbel_gate(logits, lengths)
            with pytest.raises(jax.errors.JaxRuntimeError, match=words):
                checked(lengths).block_until_ready()

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"logits": jnp.zeros((4, 3))}, ValueError, "logits: expected 3 dimensions"),
            ({"logits": jnp.zeros((4, 9, 3), int)}, TypeError, "logits: expected dtype"),
            ({"logits": jnp.zeros((4, 9, 0))}, ValueError, "logits: expected at least one"),
            ({"lengths": jnp.ones((4, 1), int)}, ValueError, r"lengths: expected shape \(B,\) = \(4,\)"),
            ({"lengths": jnp.ones(4)}, TypeError, "lengths: expected integers"),
            ({"temperature": 0.0}, ValueError, "temperature: expected more than 0"),
            ({"temperature": "hot"}, TypeError, "temperature: expected a number"),
            ({"temperature": jnp.ones(1)}, ValueError, r"temperature: expected shape \(\) = \(\), got \(1,\)"),
            ({"temperature": jnp.ones((), bool)}, TypeError, "temperature: expected numbers"),
            ({"seed": 1.5}, TypeError, "seed: expected an int"),
        ],
        ids=str,
    )
    def test_checked_while_tracing(self, change, error, words):
        values = {"logits": jnp.zeros((4, 9, 3)), "lengths": LENGTHS, **change}
        arrays = {name: value for name, value in values.items() if hasattr(value, "shape")}
        others = {name: value for name, value in values.items() if name not in arrays}
        with pytest.raises(error, match=words):
            jax.eval_shape(lambda arrays: gumbel_gate(**arrays, **others), arrays)


def test_a_step_within_one_jit():
    """Loss of gates by way of cost and backlog: the gradient reaches the arbitrator through hard gates."""
    logits = ragged("float32", positive=False)

    @jax.jit
    def step(logits, lengths, temperature, key):
        def loss(logits):
            gates = gumbel_gate(logits, lengths, temperature=temperature, hard=True, seed=key)
            return (amortized_cost(gates, PER_BRANCH, lengths) + 2 * amortized_backlog(gates, PER_BRANCH, lengths)).mean()

        return jax.value_and_grad(loss)(logits)

    value, gradient = step(logits, LENGTHS, 0.5, jnp.int32(3))
    gates = tl.gumbel_gate(logits, LENGTHS, temperature=0.5, hard=True, seed=3)
    quarter = np.full(4, 0.25, "f")
    cost, by_cost = tl.amortized_cost(gates, PER_BRANCH, LENGTHS, weights=quarter)
    backlog, by_backlog = tl.amortized_backlog(gates, PER_BRANCH, LENGTHS, weights=2 * quarter)
    np.testing.assert_allclose(value, (cost + 2 * backlog).mean(), rtol=1e-6)
    by_logits = tl.gumbel_gate_backward(by_cost + by_backlog, logits, LENGTHS, temperature=0.5, seed=3)
    np.testing.assert_allclose(gradient, by_logits, atol=1e-6)
    assert np.asarray(gradient).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_as_on_a_device(monkeypatch, dtype):
    """What is compiled for a device, run on the host: bfloat16 as bits, and memory for the core as one more output."""
    rooms = []
    callback = jax_callback.buffer_callback

    def spy(body, outputs, **options):
        rooms.append([each.shape[0] for each in outputs if each.dtype == jnp.uint8])
        assert all(each.dtype != jnp.bfloat16 for each in outputs)
        return callback(body, outputs, **options)

    monkeypatch.setattr(jax_callback, "buffer_callback", spy)
    monkeypatch.setattr(jax_callback, "on_device", lambda: True)
    gates, upstream = ragged(dtype), ragged(dtype, 1)
    each = jnp.array(PER_BRANCH, dtype)
    for function, core, options in TERMS.values():
        value, (gradient,) = jax.jit(weighted(lambda x, of=(function, options): of[0](x, each, LENGTHS, **of[1]), weights_for(4)))(gates)
        expected, grad = core(gates, np.asarray(each), LENGTHS, weights=weights_for(4), **options)
        same(value, expected)
        same(gradient, grad)
    heat = jnp.array(0.5, dtype)
    found, (gradient,) = jax.jit(weighted(lambda x: gumbel_gate(x, LENGTHS, temperature=heat, seed=4), upstream))(gates)
    same(found, tl.gumbel_gate(gates, LENGTHS, temperature=0.5, seed=4))
    same(gradient, tl.gumbel_gate_backward(upstream, gates, LENGTHS, temperature=0.5, seed=4))
    assert len(rooms) == 8 and all(len(room) == 1 and room[0] % 512 == 0 for room in rooms)
