"""`edit_distance` against the reference, pair by pair."""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import transducer_loss as tl
from helpers import Array, Counting
from transducer_loss import reference
from transducer_loss.edit_distance import MOST_LABELS, counted

KINDS = ("total", "insertions", "deletions", "substitutions")
Arguments = tuple[Array, Array, Array, Array]


def expected(hypotheses: Array, said: Array, references: Array, meant: Array, blank: int | None = None) -> Array:
    """Counts of the reference, (4, B) or (4, B, N)."""
    found = np.full((4, *said.shape), -1)
    for at, length in np.ndenumerate(said):
        if length >= 0:
            right = references[at[0], : meant[at[0]]]
            found[(slice(None), *at)] = reference.edit_distance(hypotheses[at][:length], right, blank=blank)
    return found


def expect_counts(got: tl.EditDistance, exact: npt.ArrayLike) -> None:
    """Raise unless all counts are these, each an array of its own for other frameworks to take."""
    for name, counts in zip(KINDS, np.asarray(exact), strict=True):
        array = getattr(got, name)
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
        assert array.ctypes.data % 64 == 0
        np.testing.assert_array_equal(array, counts, err_msg=name)


def batch(rng: np.random.Generator, *, best: bool, longest: int = 12, dtype: str = "int64") -> Arguments:
    """Arguments of `edit_distance`, N-best lists or one hypothesis each. What is past a length is like what is before it."""
    B, V, (L, U) = int(rng.integers(1, 7)), int(rng.integers(1, 7)), rng.integers(0, longest + 1, 2)
    shape = (B, int(rng.integers(1, 6))) if best else (B,)
    hypotheses, references = (rng.integers(0, V, (*of, n)).astype(dtype) for of, n in ((shape, L), ((B,), U)))
    if rng.random() < 0.5:  # with much of the reference in them
        n = min(L, U)
        right = references[:, None, :n] if best else references[:, :n]
        hypotheses[..., :n] = np.where(rng.random((*shape, n)) < 0.8, right, hypotheses[..., :n])
    return hypotheses, rng.integers(-1, L + 1, shape), references, rng.integers(0, U + 1, B)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("best", [False, True], ids=["one", "N-best"])
def test_two_thousand_random_pairs(best: bool, dtype: str) -> None:
    rng = np.random.default_rng([best, dtype == "int64"])
    pairs = {"all": 0, "padding": 0, "nothing said": 0, "nothing meant": 0, "neither": 0, "the same": 0, "every kind": 0}
    while pairs["all"] < 2000:
        of = batch(rng, best=best, dtype=dtype, longest=18)
        exact = expected(*of)
        expect_counts(tl.edit_distance(*of), exact)
        said, meant = of[1], np.broadcast_to(of[3][:, None] if best else of[3], of[1].shape)
        pairs["all"] += said.size
        pairs["padding"] += int((said < 0).sum())
        pairs["nothing said"] += int(((said == 0) & (meant > 0)).sum())
        pairs["nothing meant"] += int(((said > 0) & (meant == 0)).sum())
        pairs["neither"] += int(((said == 0) & (meant == 0)).sum())
        pairs["the same"] += int(((exact[0] == 0) & (said > 0)).sum())
        pairs["every kind"] += int((exact[1:] > 0).all(axis=0).sum())
    assert min(pairs.values()) >= 6, f"{pairs}"


@pytest.mark.parametrize("best", [False, True], ids=["one", "N-best"])
def test_longer_pairs(best: bool) -> None:
    rng = np.random.default_rng(2)
    for _ in range(6):
        of = batch(rng, best=best, longest=80)
        expect_counts(tl.edit_distance(*of), expected(*of))


def test_the_lead_of_insertions_is_broken_by_substitutions() -> None:
    # Of the same distance: two substitutions, or a deletion and an insertion.
    expect_counts(tl.edit_distance([[1, 2]], [2], [[0, 1]], [2]), [[2], [0], [0], [2]])
    expect_counts(tl.edit_distance([[1, 2, 3]], [3], [[0, 1, 2]], [3]), [[2], [1], [1], [0]])
    expect_counts(tl.edit_distance([[5, 5]], [2], [[7, 5, 8]], [3]), [[2], [0], [1], [1]])


@pytest.mark.parametrize("U", [1022, 1023, 1024, 1025, 1400])
def test_references_around_the_size_of_shared_memory(U: int) -> None:
    rng = np.random.default_rng(U)
    references = rng.integers(0, 3, (2, U))
    hypotheses = rng.integers(0, 3, (2, 2, 9))
    hypotheses[0, 0] = references[0, 500:509]
    of = hypotheses, np.array([[9, 0], [5, 7]]), references, np.array([U, U - 3])
    exact = expected(*of)
    assert exact[0, 0, 0] == U - 9  # all of it is found
    expect_counts(tl.edit_distance(*of), exact)


def test_both_of_a_thousand_labels() -> None:
    rng = np.random.default_rng(3)
    references = rng.integers(0, 30, (1, 1040))
    kept = rng.random(1040) < 0.9
    hypotheses = np.where(rng.random(1040) < 0.1, 30, references)[:, kept]
    L = hypotheses.shape[1]
    found = tl.edit_distance(hypotheses, [L], references, [1040])
    expect_counts(found, expected(hypotheses, np.array([L]), references, np.array([1040])))
    # The other way round the shared memory is enough; insertions are deletions then.
    other = tl.edit_distance(references, [1040], hypotheses, [L])
    expect_counts(other, np.stack([found.total, found.deletions, found.insertions, found.substitutions]))


def test_as_many_labels_as_can_be_counted() -> None:
    many = np.zeros((1, MOST_LABELS), np.int32)
    one, none = np.ones((1, 1), np.int32), np.zeros((1, 0), np.int32)
    n = MOST_LABELS
    assert n == 2**21 - 2
    expect_counts(tl.edit_distance(many, [n], none, [0]), [[n], [n], [0], [0]])
    expect_counts(tl.edit_distance(none, [0], many, [n]), [[n], [0], [n], [0]])
    expect_counts(tl.edit_distance(many, [n], one, [1]), [[n], [n - 1], [0], [1]])
    expect_counts(tl.edit_distance(one * 0, [1], many, [n]), [[n - 1], [0], [n - 1], [0]])
    too_many = np.zeros((1, n + 1), np.int32)
    for name, of in (("hypotheses", (too_many, [0], one, [1])), ("references", (one, [1], too_many, [0]))):
        with pytest.raises(ValueError, match=rf"^{name}: expected at most {n} labels, got shape \(1, {n + 1}\)$"):
            tl.edit_distance(*of)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("best", [False, True], ids=["one", "N-best"])
def test_blanks_are_left_out_of_both(best: bool, dtype: str) -> None:
    rng = np.random.default_rng(4)
    fewer = 0
    for _ in range(40):
        of = batch(rng, best=best, dtype=dtype)
        blank = int(rng.integers(-1, 4))
        of[0][of[0] == 1], of[2][of[2] == 1] = -1, -1  # a class as good as others
        exact = expected(*of, blank=blank)
        expect_counts(tl.edit_distance(*of, blank=blank), exact)
        fewer += int((exact != expected(*of)).any())
    assert fewer >= 15
    nothing_left = tl.edit_distance([[3, 3], [3, 3]], [2, 0], [[3], [3]], [1, 0], blank=3)
    expect_counts(nothing_left, np.zeros((4, 2)))


def test_labels_are_told_apart_by_all_their_bits() -> None:
    far = np.array([[5, 2**32 + 5, -(2**63), 2**63 - 1]])
    near = np.array([[5, 5, 0, -1]])
    expect_counts(tl.edit_distance(far, [4], near, [4]), [[3], [0], [0], [3]])
    expect_counts(tl.edit_distance(far, [4], far, [4]), np.zeros((4, 1)))
    # A blank of 64 bits is none of 32.
    expect_counts(tl.edit_distance(near.astype(np.int32), [4], near, [2], blank=2**32 + 5), [[2], [2], [0], [0]])
    expect_counts(tl.edit_distance(far, [4], near, [4], blank=2**32 + 5), [[3], [0], [1], [2]])


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "uint32", "uint64"])
def test_other_integers(kind: str) -> None:
    of = batch(np.random.default_rng(5), best=True)
    converted = of[0].astype(kind), of[1].astype("int8"), of[2].astype(kind), of[3].astype(kind)
    expect_counts(tl.edit_distance(*converted), expected(*of))
    expect_counts(tl.edit_distance(converted[0], of[1].tolist(), of[2], of[3].tolist()), expected(*of))


def test_lists() -> None:
    expect_counts(tl.edit_distance([[[1, 2], [1, 3]]], [[2, 1]], [[1, 2]], [2]), [[[0, 1]], [[0, 0]], [[0, 1]], [[0, 0]]])
    expect_counts(tl.edit_distance([[]], [0], [[]], [0]), np.zeros((4, 1)))
    expect_counts(tl.edit_distance([[[], []]], [[0, -1]], [[4]], [1]), [[[1, -1]], [[0, -1]], [[1, -1]], [[0, -1]]])


STRIDES: dict[str, Any] = {
    "labels first": lambda x: np.moveaxis(np.moveaxis(x, -1, 0).copy(), 0, -1),
    "batch last": lambda x: np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0),
    "every other": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "reversed": lambda x: x[..., ::-1].copy()[..., ::-1],
    "inside": lambda x: np.pad(x, 2, constant_values=1)[(slice(2, -2),) * x.ndim],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("best", [False, True], ids=["one", "N-best"])
def test_strides(best: bool, how: str, dtype: str) -> None:
    rng = np.random.default_rng(6)
    for _ in range(5):
        of = batch(rng, best=best, dtype=dtype)
        views = [STRIDES[how](array) for array in of]
        before = [view.copy() for view in views]
        expect_counts(tl.edit_distance(*views), expected(*of))
        for view, copy in zip(views, before, strict=True):
            np.testing.assert_array_equal(view, copy)
    # One hypothesis for all, and one reference, neither copied before.
    said, meant = np.broadcast_to([1, 2, 3, 4], (3, 4)), np.broadcast_to([[1, 3]], (3, 2))
    shared = said, np.array([4, 3, 0]), meant, np.array([2, 2, 1])
    expect_counts(tl.edit_distance(*shared), expected(*shared))


def test_what_is_past_a_length_is_never_read() -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        of = batch(rng, best=True)
        exact = expected(*of)
        for rubbish in (-1, 2**62):
            hypotheses, references = (np.where(np.arange(array.shape[-1]) < lengths[..., None], array, rubbish)
                                      for array, lengths in ((of[0], of[1]), (of[2], of[3])))
            expect_counts(tl.edit_distance(hypotheses, of[1], references, of[3]), exact)
            expect_counts(tl.edit_distance(hypotheses, of[1], references, of[3], blank=rubbish), exact)


def test_any_number_of_threads_counts_the_same() -> None:
    rng = np.random.default_rng(8)
    of = (rng.integers(0, 9, (13, 7, 60)), rng.integers(-1, 61, (13, 7)), rng.integers(0, 9, (13, 50)), rng.integers(0, 51, 13))
    exact = expected(*of)
    for threads in (1, 2, 3, 16):
        expect_counts(counted(*of, blank=None, validate=False, threads=threads), exact)


@pytest.mark.parametrize("U", [40, 1500])
def test_temporary_memory_is_what_the_docstring_says(U: int) -> None:
    counting = Counting()
    B, N, L = 3, 4, 30
    of = np.ones((B, N, L), np.int32), np.full((B, N), L), np.zeros((B, U), np.int32), np.full(B, U)
    expect_counts(counted(*of, blank=None, validate=False, allocate=counting), expected(*of))
    diagonals = 24 * B * N * (U + 1) if U > 1023 else 0
    outputs = 4 * B * N * 4
    assert counting.most <= 8 * (B * N * (L + 1) + B * (U + 1)) + diagonals + outputs
    assert counting.most >= 8 * (B * N * L + B * U) + diagonals


def test_lengths_that_nobody_has_checked() -> None:
    # As those on a device: nothing outside of the arrays is touched, and no count looks like one.
    hypotheses, references = np.ones((6, 3), np.int64), np.ones((6, 2), np.int64)
    said, meant = np.array([3, 4, -2, -(2**62), 2**62, 1]), np.array([2, 2, 2, 2, 2, 2])
    found = counted(hypotheses, said, references, meant, blank=None, validate=None)
    expect_counts(found, [[1, -1, -1, -1, -1, 1], [1, -1, -1, -1, -1, 0], [0, -1, -1, -1, -1, 1], [0, -1, -1, -1, -1, 0]])
    said, meant = np.array([1, 1, 1, 1, 1, -1]), np.array([2, 3, -1, 2**62, -(2**62), 2])
    found = counted(hypotheses, said, references, meant, blank=None, validate=None)
    expect_counts(found, [[1, *[-1] * 5], [0, *[-1] * 5], [1, *[-1] * 5], [0, *[-1] * 5]])


GOOD: dict[str, Any] = {
    "hypotheses": np.ones((2, 3, 4), np.int64), "hypothesis_lengths": np.full((2, 3), 4),
    "references": np.ones((2, 5), np.int64), "reference_lengths": np.full(2, 5),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"hypotheses": np.ones((2, 3, 4))}, TypeError, "hypotheses: expected integers, got dtype float64"),
    ({"hypotheses": "text"}, TypeError, "hypotheses: expected an array with __dlpack__, got str"),
    ({"hypotheses": np.ones(4, int)}, ValueError, "hypotheses: expected shape (B, L) or (B, N, L) with at least one sequence, got (4,)"),
    ({"hypotheses": np.ones((2, 0, 4), int)}, ValueError, "hypotheses: expected shape (B, L) or (B, N, L) with at least one sequence, got (2, 0, 4)"),
    ({"hypotheses": [[1, 2], [3]]}, ValueError, "hypotheses: expected integers, in rows of one length, got [[1, 2], [3]]"),
    ({"hypothesis_lengths": np.full(2, 4)}, ValueError, "hypothesis_lengths: expected shape (B, N) = (2, 3), got (2,)"),
    ({"hypothesis_lengths": np.full((2, 3), 4.0)}, TypeError, "hypothesis_lengths: expected integers, got dtype float64"),
    ({"hypothesis_lengths": [[4, 4, 4], [4, 5, 4]]}, ValueError, "hypothesis_lengths: expected lengths in [-1, L = 4], got 5 at index (1, 1)"),
    ({"hypothesis_lengths": [[4, 4, -2], [4, 5, 4]]}, ValueError, "hypothesis_lengths: expected lengths in [-1, L = 4], got -2 at index (0, 2)"),
    ({"references": np.ones((3, 5), int)}, ValueError, "references: expected shape (B, U) = (2, U), got (3, 5)"),
    ({"references": np.ones(5, int)}, ValueError, "references: expected shape (B, U) = (2, U), got (5,)"),
    ({"references": np.ones((2, 5), bool)}, TypeError, "references: expected integers, got dtype bool"),
    ({"reference_lengths": [5]}, ValueError, "reference_lengths: expected shape (B,) = (2,), got (1,)"),
    ({"reference_lengths": [5, -1]}, ValueError, "reference_lengths: expected lengths in [0, U = 5], got -1 at index 1"),
    ({"reference_lengths": [6, 5]}, ValueError, "reference_lengths: expected lengths in [0, U = 5], got 6 at index 0"),
    ({"blank": 0.0}, TypeError, "blank: expected an int, got float"),
])
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        tl.edit_distance(**{**GOOD, **change})


@pytest.mark.parametrize("blank", [2**63, -(2**63) - 1, 2**80])
def test_a_blank_that_no_label_can_be_is_refused_by_name(blank: int) -> None:
    with pytest.raises(ValueError, match=r"^blank: "):
        tl.edit_distance(**GOOD, blank=blank)


def test_unaligned_labels_are_refused() -> None:
    record = np.zeros(4, np.dtype([("pad", "i1"), ("label", "i4")]))["label"].reshape(1, 4)
    with pytest.raises(ValueError, match=r"^hypotheses: expected elements at multiples of their 4 bytes"):
        tl.edit_distance(record, [4], record.copy(), [4])
