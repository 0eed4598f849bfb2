"""Every bad input is a ValueError or TypeError that names the argument, what was expected and what came."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transducer_loss as tl
from helpers import FLOATS, TOPOLOGIES, Array, numpy_dtype
from transducer_loss import checks
from transducer_loss.joint import ACTIVATIONS

B, T, U, V, H = 2, 5, 3, 7, 4
RNG = np.random.default_rng(0)


def draw(*shape: int, dtype: str = "float32") -> Array:
    return RNG.normal(size=shape).astype(numpy_dtype(dtype))


LOGITS: dict[str, Any] = {
    "logits": draw(B, T, U + 1, V), "targets": [[1, 2, 3], [4, 5, -1]], "logit_lengths": [5, 4], "target_lengths": [3, 2],
}  # fmt: skip
JOINT: dict[str, Any] = {
    "encoder": draw(B, T, H), "predictor": draw(B, U + 1, H), "weight": draw(V, H), "bias": draw(V),
    "targets": LOGITS["targets"], "encoder_lengths": [5, 4], "target_lengths": [3, 2],
}  # fmt: skip
PACKED = {**LOGITS, "logits": draw(5 * 4 + 4 * 3, V)}

Bad = tuple[str, Any, type[Exception], str]

# The argument, a bad value of it, and what the error says after its name.
SHARED: list[Bad] = [
    ("targets", [[1, 2, 3]], ValueError, r"expected shape \(B, U\) = \(2, 3\), got \(1, 3\)"),
    ("targets", [[1, 2], [3, 4]], ValueError, r"expected shape \(B, U\) = \(2, 3\), got \(2, 2\)"),
    ("targets", [1, 2, 3], ValueError, r"expected shape \(B, U\) = \(2, 3\), got \(3,\)"),
    ("targets", 3, ValueError, r"expected shape \(B, U\) = \(2, 3\), got \(\)"),
    ("targets", [[1, 2, 3], [4]], ValueError, r"expected integers, in rows of one length, got \[\[1, 2, 3\], \[4\]\]"),
    ("targets", [[1, 2, 7], [1, 2, 3]], ValueError, r"expected labels in \[0, V = 7\), got 7 at index \(0, 2\)"),
    ("targets", [[1, 2, 3], [1, -1, 3]], ValueError, r"expected labels in \[0, V = 7\), got -1 at index \(1, 1\)"),
    ("targets", np.full((2, 3), 200, np.uint8), ValueError, r"expected labels in \[0, V = 7\), got 200 at index \(0, 0\)"),
    ("targets", np.full((2, 3), 2**63 + 1, np.uint64), ValueError, r"expected labels in .*, got 9223372036854775809 at"),
    ("targets", [[1.0, 2.0, 3.0]] * 2, TypeError, "expected integers, got dtype float64"),
    ("targets", np.ones((2, 3), bool), TypeError, "expected integers, got dtype bool"),
    ("targets", torch.ones(2, 3), TypeError, "expected integers, got dtype float32"),
    ("targets", [["a", "b", "c"]] * 2, TypeError, "expected integers, got dtype <?U|str"),
    ("targets", None, TypeError, "expected an array with __dlpack__, got NoneType"),
    ("targets", {1, 2}, TypeError, "expected an array with __dlpack__, got set"),
    ("targets", np.ones((2, 3), ">i4"), TypeError, "expected native byte order, got dtype '>i4'"),
    ("frames", [5, 6], ValueError, r"expected lengths in \[1, T = 5\], got 6 at index 1"),
    ("frames", [0, 5], ValueError, r"expected lengths in \[1, T = 5\], got 0 at index 0"),
    ("frames", [5, -1], ValueError, r"expected lengths in \[1, T = 5\], got -1 at index 1"),
    ("frames", [5], ValueError, r"expected shape \(B,\) = \(2,\), got \(1,\)"),
    ("frames", [[5, 4]], ValueError, r"expected shape \(B,\) = \(2,\), got \(1, 2\)"),
    ("frames", 5, ValueError, r"expected shape \(B,\) = \(2,\), got \(\)"),
    ("frames", [5.0, 4.0], TypeError, "expected integers, got dtype float64"),
    ("frames", [True, True], TypeError, "expected integers, got dtype bool"),
    ("frames", np.array([2**63 + 5, 4], np.uint64), ValueError, r"expected lengths in \[1, T = 5\], got"),
    ("frames", None, TypeError, "expected an array with __dlpack__, got NoneType"),
    ("target_lengths", [4, 1], ValueError, r"expected lengths in \[0, U = 3\], got 4 at index 0"),
    ("target_lengths", [3, -1], ValueError, r"expected lengths in \[0, U = 3\], got -1 at index 1"),
    ("target_lengths", [3, 2, 1], ValueError, r"expected shape \(B,\) = \(2,\), got \(3,\)"),
    ("target_lengths", "32", TypeError, "expected an array with __dlpack__, got str"),
    ("blank", 7, ValueError, r"expected a class in \[-7, 7\), got 7"),
    ("blank", -8, ValueError, r"expected a class in \[-7, 7\), got -8"),
    ("blank", 10**30, ValueError, r"expected a class in \[-7, 7\), got 10{30}"),
    ("blank", True, TypeError, "expected an int, got bool"),
    ("blank", np.bool_(True), TypeError, "expected an int, got bool"),
    ("blank", 0.0, TypeError, "expected an int, got float"),
    ("blank", None, TypeError, "expected an int, got NoneType"),
    ("blank", "0", TypeError, "expected an int, got str"),
    ("topology", "monotonic", ValueError, "expected one of 'regular', 'modified', 'constrained', got 'monotonic'"),
    ("topology", None, ValueError, "expected one of 'regular', .*, got None"),
    ("topology", np.zeros(3), ValueError, "expected one of 'regular', .*, got array"),
    ("infeasible", "ignore", ValueError, "expected one of 'inf', 'zero', 'raise', got 'ignore'"),
    ("infeasible", 0, ValueError, "expected one of 'inf', 'zero', 'raise', got 0"),
    ("fastemit_lambda", -0.1, ValueError, "expected 0 or more, got -0.1"),
    ("fastemit_lambda", math.nan, ValueError, "expected a finite number, got nan"),
    ("fastemit_lambda", math.inf, ValueError, "expected a finite number, got inf"),
    ("fastemit_lambda", 10**400, ValueError, "expected a finite number, got 10{400}"),
    ("fastemit_lambda", "0.1", TypeError, "expected a number, got str"),
    ("fastemit_lambda", True, TypeError, "expected a number, got bool"),
    ("delay_penalty", math.nan, ValueError, "expected a finite number, got nan"),
    ("delay_penalty", -math.inf, ValueError, "expected a finite number, got -inf"),
    ("delay_penalty", None, TypeError, "expected a number, got NoneType"),
    ("delay_penalty", np.zeros(2), TypeError, "expected a number, got ndarray"),
    ("weights", [1.0], ValueError, r"expected shape \(B,\) = \(2,\), got \(1,\)"),
    ("weights", np.ones((2, 1)), ValueError, r"expected shape \(B,\) = \(2,\), got \(2, 1\)"),
    ("weights", np.array([1, 2]), TypeError, "expected dtype float16, bfloat16, float32, float64, got int64"),
    ("weights", 2.0, TypeError, "expected an array with __dlpack__, got float"),
    ("weights", ["a", "b"], ValueError, r"expected numbers, got \['a', 'b'\]"),
    ("weights", np.zeros(9, np.uint8)[1:].view("f4"), ValueError, "expected elements at multiples of their 4 bytes"),
    ("targets", np.zeros(49, np.uint8)[1:].view("i8").reshape(2, 3), ValueError, "expected elements at multiples of their 8"),
    ("weights", [[1.0], [2.0, 3.0]], ValueError, r"expected numbers, got \[\[1.0\], \[2.0, 3.0\]\]"),
    ("weights", [object(), 1.0], ValueError, "expected numbers, got"),
]
OF_LOGITS: list[Bad] = [
    ("logits", LOGITS["logits"].astype(int), TypeError, "expected dtype float16, bfloat16, float32, float64, got int64"),
    ("logits", LOGITS["logits"].astype(complex), TypeError, "expected dtype float16, .*, got complex128"),
    ("logits", LOGITS["logits"] > 0, TypeError, "expected dtype float16, .*, got bool"),
    ("logits", LOGITS["logits"].astype(">f4"), TypeError, "expected native byte order, got dtype '>f4'"),
    ("logits", LOGITS["logits"].astype("f2").astype("O"), TypeError, "expected dtype float16, .*, got object"),
    ("logits", LOGITS["logits"].tolist(), TypeError, "expected an array with __dlpack__, got list"),
    ("logits", None, TypeError, "expected an array with __dlpack__, got NoneType"),
    ("logits", torch.zeros(B, T, U + 1, V, dtype=torch.complex64), TypeError, "expected real numbers, got DLPack type code 5"),
    ("logits", draw(T, U + 1, V), ValueError, r"expected 4 dimensions \(B, T, U\+1, V\), got shape \(5, 4, 7\)"),
    ("logits", np.zeros((0, T, U + 1, V)), ValueError, r"expected at least one of each of \(B, T, U\+1, V\), got shape \(0, 5"),
    ("logits", np.zeros((B, T, U + 1, 0)), ValueError, r"expected at least one of each of \(B, T, U\+1, V\), got shape \(2, 5"),
    ("hat", True, ValueError, r"targets: expected no blank \(1\) with hat=True, got it at index \(0, 0\)"),
]
OF_PACKED: list[Bad] = [
    ("logits", draw(33, V), ValueError, r"expected shape \(sum of T_b \(U_b \+ 1\), V\) = \(32, 7\), got \(33, 7\)"),
    ("logits", np.zeros((0, V)), ValueError, r"expected at least one of each of \(cells, V\), got shape \(0, 7\)"),
    ("frames", [], ValueError, "expected at least one utterance, got none"),
    ("frames", 5, ValueError, r"expected shape \(B,\), got 5"),
    ("frames", [5, 33], ValueError, r"expected lengths in \[1, cells = 32\], got 33 at index 1"),
]
OF_JOINT: list[Bad] = [
    ("encoder", JOINT["encoder"].astype(int), TypeError, "expected dtype float16, bfloat16, float32, float64, got int64"),
    ("encoder", draw(B, T, 1, H), ValueError, r"expected 3 dimensions \(B, T, H\), got shape \(2, 5, 1, 4\)"),
    ("encoder", np.zeros((0, T, H), "f"), ValueError, r"expected at least one of each of \(B, T, H\), got shape \(0, 5, 4\)"),
    ("encoder", [1.0], TypeError, "expected an array with __dlpack__, got list"),
    ("predictor", draw(B, U + 1, H, dtype="float64"), TypeError, "expected dtype float32 as encoder, got float64"),
    ("predictor", draw(B, U + 1, H, dtype="bfloat16"), TypeError, "expected dtype float32 as encoder, got bfloat16"),
    ("predictor", draw(B + 1, U + 1, H), ValueError, r"expected shape \(B, U\+1, H\) = \(2, 4, 4\), got \(3, 4, 4\)"),
    ("predictor", draw(B, U + 1, H + 1), ValueError, r"expected shape \(B, U\+1, H\) = \(2, 4, 4\), got \(2, 4, 5\)"),
    ("predictor", draw(B, H), ValueError, r"expected 3 dimensions \(B, U\+1, H\), got shape \(2, 4\)"),
    ("weight", draw(V, H + 1), ValueError, r"expected shape \(V, H\) = \(7, 4\), got \(7, 5\)"),
    ("weight", draw(H, V).T.copy().T, ValueError, r"expected shape \(V, H\) = \(4, 4\), got \(4, 7\)"),
    ("weight", draw(V), ValueError, r"expected 2 dimensions \(V, H\), got shape \(7,\)"),
    ("weight", draw(V, H, dtype="float16"), TypeError, "expected dtype float32 as encoder, got float16"),
    ("weight", None, TypeError, "expected an array with __dlpack__, got NoneType"),
    ("bias", draw(V + 1), ValueError, r"expected shape \(V,\) = \(7,\), got \(8,\)"),
    ("bias", draw(V, 1), ValueError, r"expected 1 dimensions \(V\), got shape \(7, 1\)"),
    ("bias", 0.0, TypeError, "expected an array with __dlpack__, got float"),
    ("activation", "softplus", ValueError, "expected one of 'tanh', 'relu', .*, got 'softplus'"),
    ("activation", np.tanh, ValueError, "expected one of 'tanh', 'relu', .*, got <ufunc 'tanh'>"),
    ("dropout", 1.0, ValueError, r"expected a probability in \[0, 1\), got 1.0"),
    ("dropout", -0.1, ValueError, r"expected a probability in \[0, 1\), got -0.1"),
    ("dropout", math.nan, ValueError, "expected a finite number, got nan"),
    ("dropout", "0.1", TypeError, "expected a number, got str"),
    ("seed", 1.5, TypeError, "expected an int, got float"),
    ("seed", None, TypeError, "expected an int, got NoneType"),
    ("occupancy_floor", 1.0, ValueError, r"expected a share in \[0, 1\), got 1.0"),
    ("occupancy_floor", -1e-9, ValueError, r"expected a share in \[0, 1\), got -1e-09"),
    ("occupancy_floor", math.nan, ValueError, "expected a finite number, got nan"),
    ("occupancy_floor", None, TypeError, "expected a number, got NoneType"),
    ("workspace", 1000, ValueError, r"expected at least \d+ bytes for one tile and the longest utterance, got 1000"),
    ("workspace", "1KiB", ValueError, r"expected at least \d+ bytes .*, got 1024"),
    ("workspace", 0, ValueError, "expected more than 0 bytes, got 0"),
    ("workspace", "0", ValueError, "expected .* bytes.*, got 0"),
    ("workspace", -5, ValueError, "expected more than 0 bytes, got -5"),
    ("workspace", "-5MB", ValueError, "expected bytes or a size as '256MiB', got '-5MB'"),
    ("workspace", "lots", ValueError, "expected bytes or a size as '256MiB', got 'lots'"),
    ("workspace", "1 TiB", ValueError, "expected bytes or a size as '256MiB', got '1 TiB'"),
    ("workspace", "", ValueError, "expected bytes or a size as '256MiB', got ''"),
    ("workspace", 1e6, TypeError, "expected an int or a str, got float"),
    ("workspace", math.nan, TypeError, "expected an int or a str, got float"),
    ("workspace", True, TypeError, "expected an int or a str, got bool"),
    ("hat", True, ValueError, r"targets: expected no blank \(1\) with hat=True, got it at index \(0, 0\)"),
]


def label(bad: Bad) -> str:
    return f"{bad[0]}={type(bad[1]).__name__}-{bad[3][:30]}"


def expect(function: Any, inputs: dict[str, Any], bad: Bad) -> None:
    name, value, kind, message = bad
    if name == "frames":
        name = next(key for key in inputs if key in ("logit_lengths", "encoder_lengths"))
    arguments = {**inputs, name: value}
    if name == "hat":
        arguments["blank"] = 1
        name = ""
    positional = [arguments.pop(key) for key in inputs]
    with pytest.raises(kind, match=rf"^{name}{': ' if name else ''}{message}"):
        function(*positional, **arguments)


@pytest.mark.parametrize("bad", SHARED + OF_LOGITS, ids=label)
def test_logits(bad: Bad) -> None:
    expect(tl.rnnt_loss, LOGITS, bad)
    if bad[0] != "weights":
        expect(tl.occupancy, LOGITS, bad)
        expect(tl.align, LOGITS, bad)


@pytest.mark.parametrize("bad", OF_PACKED, ids=label)
def test_packed_logits(bad: Bad) -> None:
    expect(tl.rnnt_loss, PACKED, bad)


@pytest.mark.parametrize("bad", SHARED + OF_JOINT, ids=label)
def test_joint(bad: Bad) -> None:
    expect(tl.joint_rnnt_loss, JOINT, bad)
    if bad[0] != "weights":
        expect(tl.occupancy, JOINT, bad)
        expect(tl.align, JOINT, bad)


def test_the_inputs_themselves_are_good() -> None:
    for loss, _ in (tl.rnnt_loss(*LOGITS.values()), tl.rnnt_loss(*PACKED.values()), tl.joint_rnnt_loss(*JOINT.values())):
        assert np.isfinite(loss).all()


def test_hat_does_its_own_normalisation() -> None:
    with pytest.raises(ValueError, match=r"^hat: expected False with normalized=True .* got True"):
        tl.rnnt_loss(*LOGITS.values(), hat=True, normalized=True)
    with pytest.raises(ValueError, match=r"^normalized: expected False, as the joint makes logits, got True"):
        tl.occupancy(*JOINT.values(), normalized=True)


def test_options_of_the_other_loss() -> None:
    for function in (tl.rnnt_loss, tl.occupancy, tl.align):
        with pytest.raises(TypeError, match="activation"):
            function(*LOGITS.values(), activation="tanh")
    with pytest.raises(TypeError, match="inplace"):
        tl.joint_rnnt_loss(*JOINT.values(), inplace=True)


def test_logits_that_cannot_be_overwritten() -> None:
    fixed = LOGITS["logits"].copy()
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match=r"^logits: expected a writable array with inplace=True, got a read-only one"):
        tl.rnnt_loss(*{**LOGITS, "logits": fixed}.values(), inplace=True)
    shared = np.broadcast_to(LOGITS["logits"][:, :1], (B, T, U + 1, V)).view()
    with pytest.raises(ValueError, match=r"^logits: expected no broadcast dimension with inplace=True, got strides of 0"):
        tl.rnnt_loss(*{**LOGITS, "logits": shared}.values(), inplace=True)
    # Without a gradient nothing is written.
    assert np.isfinite(tl.rnnt_loss(*{**LOGITS, "logits": fixed}.values(), inplace=True, gradient=False)[0]).all()


def test_nothing_is_changed_by_a_call_that_fails() -> None:
    logits = LOGITS["logits"].copy()
    with pytest.raises(ValueError, match="weights"):
        tl.rnnt_loss(*{**LOGITS, "logits": logits}.values(), inplace=True, weights=[1.0])
    np.testing.assert_array_equal(logits, LOGITS["logits"])


def test_words_are_numbered_as_in_the_kernels() -> None:
    assert [checks.choice(word, TOPOLOGIES, "topology") for word in ("regular", "modified", "constrained")] == [0, 1, 2]
    assert checks.DISTRIBUTIONS == ("softmax", "normalized", "hat")
    assert [ACTIVATIONS.index(word) for word in ("tanh", "relu", "leaky_relu", "sigmoid")] == [0, 1, 2, 3]
    assert [ACTIVATIONS.index(word) for word in ("gelu", "gelu_tanh", "silu", "identity")] == [4, 5, 6, 7]


small = st.integers(0, 4)
numbers = st.one_of(st.sampled_from([0.0, 0.1, 0.9, 1.0, -1.0, math.nan, math.inf, None, "1"]), st.floats(-2, 2))


@st.composite
def dims(draw: st.DrawFn, *right: int) -> tuple[int, ...]:
    """The right shape, mostly."""
    shape = list(right)
    if draw(st.integers(0, 9)) == 0:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(small)
    if draw(st.integers(0, 30)) == 0:
        shape = shape[1:]
    return tuple(shape)


@st.composite
def integers(draw: st.DrawFn, shape: tuple[int, ...], low: int, high: int) -> Any:
    """In [low, high], mostly; arrays of several types, or lists."""
    if draw(st.integers(0, 15)) == 0:
        low, high = low - 1, high + 2
    kind = draw(st.sampled_from([np.int32, np.int64, np.int16, list]))
    seed = draw(st.integers(0, 1000))
    values = np.random.default_rng(seed).integers(low, max(high, low) + 1, shape)
    return values.tolist() if kind is list else values.astype(kind)


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> Array:
    if draw(st.integers(0, 30)) == 0:
        dtype = draw(st.sampled_from([*FLOATS, "int32", "complex64", "bool"]))
    values = np.random.default_rng(draw(st.integers(0, 1000))).normal(size=shape).astype(numpy_dtype(dtype))
    bad = draw(st.sampled_from([None] * 12 + [np.nan, np.inf, -np.inf]))
    if bad is not None and values.size and values.dtype.name in FLOATS:
        values.reshape(-1)[draw(st.integers(0, values.size - 1))] = bad
    if draw(st.booleans()) and values.ndim > 1:
        values = np.asfortranarray(values)
    return values


@st.composite
def options(draw: st.DrawFn, classes: int) -> dict[str, Any]:
    """Some of the shared keywords, most of them good."""
    every = {
        "blank": st.one_of(st.integers(-classes - 1, classes), st.sampled_from([0.5, True])),
        "topology": st.sampled_from([*TOPOLOGIES, *TOPOLOGIES, "other"]),
        "fastemit_lambda": st.one_of(st.floats(0, 2), numbers),
        "delay_penalty": st.one_of(st.floats(-2, 2), numbers),
        "hat": st.booleans(),
        "infeasible": st.sampled_from(["inf", "zero", "raise", "other"]),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(every)), unique=True, max_size=3))
    return {name: draw(every[name]) for name in chosen}


def expect_documented(loss: Array, gradients: list[tuple[Array, tuple[int, ...]]], batch: int, dtype: str) -> None:
    """Losses are finite, +inf without a path or NaN; gradients are finite."""
    assert loss.shape == (batch,)
    assert loss.dtype == ("float64" if dtype == "float64" else "float32")
    assert not np.isneginf(loss).any()
    for gradient, shape in gradients:
        assert gradient.shape == shape
        assert gradient.dtype == numpy_dtype(dtype)
        assert np.isfinite(gradient.astype(np.float64)).all()


reached = {"logits": 0, "joint": 0}


@settings(max_examples=400)
@given(st.data())
def test_any_logits(data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(dims(*(draw(st.integers(1, 4)) for _ in range(4))))
    B, T, U1, V = (*shape, 1, 1, 1, 1)[:4]
    dtype = draw(st.sampled_from(FLOATS))
    logits = draw(arrays(shape, dtype))
    others = [
        draw(integers(draw(dims(B, max(U1 - 1, 0))), 0, V - 1)), draw(integers(draw(dims(B)), 1, T)),
        draw(integers(draw(dims(B)), 0, U1 - 1)),
    ]  # fmt: skip
    chosen = {**draw(options(V)), "normalized": draw(st.sampled_from([False] * 5 + [True]))}
    inplace = draw(st.booleans())
    try:
        loss, grad = tl.rnnt_loss(logits.copy(order="K"), *others, inplace=inplace, **chosen)
    except (ValueError, TypeError) as raised:
        assert ": expected " in str(raised)
        return
    reached["logits"] += 1
    expect_documented(loss, [(grad, logits.shape)], B, logits.dtype.name)
    finite = np.isfinite(loss)
    assert not grad[~finite].any()
    posterior = tl.occupancy(logits, *others, **chosen)
    np.testing.assert_array_equal(posterior.loss, loss)
    assert posterior.blank.shape == posterior.label.shape == shape[:3]
    aligned = tl.align(logits, *others, **chosen)
    assert aligned.frames.shape == np.shape(others[0])
    # The best path is one of the paths.
    possible = np.isfinite(aligned.score)
    np.testing.assert_array_less(-aligned.score[possible], np.inf)
    assert (aligned.score[possible] <= -loss[possible] + 1e-4 * (1 + np.abs(loss[possible]))).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@settings(max_examples=400)
@given(st.data())
def test_any_joint(data: st.DataObject) -> None:
    draw = data.draw
    B, T, U1, V, H = (draw(st.integers(1, 4)) for _ in range(5))
    dtype = draw(st.sampled_from(FLOATS))
    floats = [draw(arrays(draw(dims(*shape)), dtype)) for shape in ((B, T, H), (B, U1, H), (V, H), (V,))]
    if draw(st.booleans()):
        floats[3] = None
    others = [
        draw(integers(draw(dims(B, U1 - 1)), 0, V - 1)), draw(integers(draw(dims(B)), 1, T)),
        draw(integers(draw(dims(B)), 0, U1 - 1)),
    ]  # fmt: skip
    every = {
        "activation": st.sampled_from([*ACTIVATIONS, "other"]),
        "dropout": st.one_of(st.floats(0, 0.9), numbers),
        "occupancy_floor": st.one_of(st.floats(0, 0.9), numbers),
        "workspace": st.sampled_from([None, 1, 5000, 20_000, "1MiB", "2 GB", "x", 0, 1.5]),
        "seed": st.sampled_from([0, -1, 2**80, "0"]),
    }
    names = draw(st.lists(st.sampled_from(sorted(every)), unique=True, max_size=3))
    chosen = {**draw(options(V)), **{name: draw(every[name]) for name in names}}
    try:
        loss, grads = tl.joint_rnnt_loss(*floats, *others, **chosen)
    except (ValueError, TypeError) as raised:
        assert ": expected " in str(raised)
        return
    reached["joint"] += 1
    assert 0.0 <= grads.dropped <= 1.0
    if not any(floats[i] is not None and np.isinf(floats[i].astype(np.float64)).any() for i in range(4)):
        # An infinite weight of a class of probability zero has no gradient to pass on.
        pairs = [
            (getattr(grads, name), array.shape)
            for name, array in zip(("encoder", "predictor", "weight", "bias"), floats, strict=True) if array is not None
        ]  # fmt: skip
        expect_documented(loss, pairs, B, dtype)
    assert not grads.encoder[~np.isfinite(loss)].any()


def test_most_of_those_were_answered() -> None:
    """Runs after them: the two above do not only find bad inputs."""
    if not all(reached.values()):
        pytest.skip("they were not run")
    assert min(reached.values()) > 50
