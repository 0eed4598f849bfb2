"""An output layer in several processes gives the loss and the gradients of one, whatever its shards' sizes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import transducer_loss as tl
from helpers import TOPOLOGIES, epsilon, expect_close, numpy_dtype, random_lengths, random_targets
from transducer_loss import reference
from transducer_loss.arrays import FLOATS

Array = np.ndarray[Any, Any]


class Processes:
    """Threads that stand for processes: `all_reduce` meets all of them, and notes what was exchanged."""

    def __init__(self, number: int) -> None:
        self.barrier = threading.Barrier(number, timeout=60)
        self.arrays: list[Array] = [np.empty(0)] * number
        self.exchanged: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(number)]

    def all_reduce(self, rank: int) -> Callable[[Any, str], None]:
        """Reduce over the threads, each of which calls its own."""

        def reduce(array: Array, operation: str) -> None:
            assert not np.isnan(array).any()  # a largest number may pass over it
            self.exchanged[rank].append((operation, array.shape))
            self.arrays[rank] = array.copy()
            self.barrier.wait()
            array[...] = {"max": np.max, "sum": np.sum}[operation](np.stack(self.arrays), axis=0)
            self.barrier.wait()

        return reduce


def sharded(sizes: list[int], weight: Array, bias: Array | None, call: Callable[..., Any]) -> list[Any]:
    """What every process's ``call(weight, bias, shard)`` returns."""
    processes = Processes(len(sizes))

    def run(rank: int) -> Any:
        shard = tl.Shard(processes.all_reduce(rank), sizes, rank)
        rows = slice(shard.first, shard.first + shard.classes)
        try:
            return call(weight[rows], None if bias is None else bias[rows], shard)
        except BaseException:
            processes.barrier.abort()
            raise

    with ThreadPoolExecutor(len(sizes)) as pool:
        results = list(pool.map(run, range(len(sizes))))
    assert all(one == processes.exchanged[0] for one in processes.exchanged)
    return results


class Problem:
    """Ragged, of random sizes, NaN in the padding."""

    def __init__(self, seed: int, dtype: str, topology: str = "regular", classes: int | None = None) -> None:
        rng = self.rng = np.random.default_rng(seed)
        B, T, U, H = (int(rng.integers(1, n + 1)) for n in (4, 9, 6, 12))
        self.classes = classes or int(rng.integers(4, 30))
        self.frames, self.labels = random_lengths(rng, B, T, U, topology)
        kind = numpy_dtype(dtype)
        self.encoder, self.predictor = rng.normal(size=(B, T, H)), rng.normal(size=(B, U + 1, H))
        for b in range(B):
            self.encoder[b, self.frames[b] :] = self.predictor[b, self.labels[b] + 1 :] = np.nan
        self.encoder, self.predictor = self.encoder.astype(kind), self.predictor.astype(kind)
        self.weight, self.bias = rng.normal(size=(self.classes, H)).astype(kind), rng.normal(size=self.classes).astype(kind)
        self.blank = int(rng.integers(-self.classes, self.classes))
        self.targets = random_targets(rng, self.labels, U, self.classes, self.blank % self.classes)

    def sizes(self, number: int) -> list[int]:
        """Random cuts of the vocabulary."""
        cuts = np.sort(self.rng.choice(np.arange(1, self.classes), number - 1, replace=False))
        return np.diff([0, *cuts, self.classes]).tolist()

    def loss(self, weight: Array, bias: Array | None, **options: Any) -> tuple[Array, Any]:
        """The fused loss, with weights of either sign."""
        weights = np.linspace(-1.0, 2.0, len(self.frames))
        result: tuple[Array, Any] = tl.joint_rnnt_loss(
            self.encoder, self.predictor, weight, bias, self.targets, self.frames, self.labels,
            **{"blank": self.blank, "weights": weights, **options},
        )  # fmt: skip
        return result


def expect_same(results: list[Any], one: tuple[Array, Any], dtype: str) -> None:
    loss, grads = one
    # Products and sums of at most some hundred terms in another order; then rounded to the dtype of the inputs.
    exact = loss.dtype.name
    for other, _ in results:
        expect_close(other, loss.astype(np.float64), 200 * epsilon(exact) * (1 + np.abs(np.nan_to_num(loss, posinf=0))))
        np.testing.assert_array_equal(other, results[0][0])
    for name in ("encoder", "predictor"):
        wanted = getattr(grads, name).astype(np.float64)
        noise = 500 * epsilon(exact) * (1 + np.abs(wanted).max()) + epsilon(dtype) * np.abs(wanted)
        for _, other in results:
            expect_close(getattr(other, name), wanted, noise)
            np.testing.assert_array_equal(getattr(other, name), getattr(results[0][1], name))
    for name in ("weight", "bias"):
        if getattr(grads, name) is not None:
            wanted = getattr(grads, name).astype(np.float64)
            got = np.concatenate([getattr(other, name) for _, other in results])
            expect_close(got, wanted, 500 * epsilon(exact) * (1 + np.abs(wanted).max()) + epsilon(dtype) * np.abs(wanted))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_equals_one_process(number: int, dtype: str, topology: str) -> None:
    for seed in range(12):
        of = Problem(1000 * number + seed, dtype, topology)
        options = {
            "topology": topology, "fastemit_lambda": 0.3 * (seed % 2), "delay_penalty": 0.1 * (seed % 3), "hat": seed % 4 == 1,
            "occupancy_floor": 0.0, "dropout": 0.2 * (seed % 5 == 2), "seed": seed,
        }  # fmt: skip
        bias = of.bias if seed % 3 else None
        one = of.loss(of.weight, bias, **options)
        results = sharded(of.sizes(number), of.weight, bias, lambda w, b, s: of.loss(w, b, shard=s, **options))  # noqa: B023
        expect_same(results, one, dtype)


@pytest.mark.parametrize("workspace", ["min", "256MiB"])
@pytest.mark.parametrize("hat", [False, True])
def test_logits_made_again_or_kept(workspace: str, hat: bool) -> None:
    of = Problem(7, "float32", classes=23)
    sizes = [3, 19, 1]

    def loss(weight: Array, bias: Array, shard: tl.Shard) -> Any:
        if workspace != "min":
            return of.loss(weight, bias, shard=shard, hat=hat, occupancy_floor=0.0)
        least = 1
        try:
            of.loss(weight, bias, shard=shard, workspace=1)
        except ValueError as error:
            least = int(str(error).split(" bytes")[0].split()[-1])
        return of.loss(weight, bias, shard=shard, hat=hat, workspace=least, occupancy_floor=0.0)

    expect_same(sharded(sizes, of.weight, of.bias, loss), of.loss(of.weight, of.bias, hat=hat, occupancy_floor=0.0), "float32")


def test_equals_the_reference() -> None:
    of = Problem(3, "float64")
    results = sharded(of.sizes(2), of.weight, of.bias, lambda w, b, s: of.loss(w, b, shard=s, occupancy_floor=0.0))
    hidden = np.tanh(of.encoder[:, :, None] + of.predictor[:, None])
    loss, _ = reference.rnnt_loss(hidden @ of.weight.T + of.bias, of.targets, of.frames, of.labels, blank=of.blank)
    np.testing.assert_allclose(results[0][0], loss, rtol=1e-12)


def test_band_and_floor() -> None:
    of = Problem(11, "float32", classes=17)
    full = tl.occupancy(of.encoder, of.predictor, of.weight, of.bias, of.targets, of.frames, of.labels, blank=of.blank)
    band = tl.prune(full, of.frames, of.labels, s_range=2)
    options = {"band": band, "occupancy_floor": 1e-3}
    one = of.loss(of.weight, of.bias, **options)
    results = sharded([8, 9], of.weight, of.bias, lambda w, b, s: of.loss(w, b, shard=s, **options))
    expect_same(results, one, "float32")
    assert {grads.dropped for _, grads in results} == {one[1].dropped}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_of_one_shard_that_are_not_finite(value: float) -> None:
    """A NaN in one process is an utterance's loss in all; -inf is no probability, of one class or of a whole shard."""
    of = Problem(5, "float32", classes=9)
    bias = of.bias.copy()
    bias[[v for v in (6, 7, 8) if v != of.blank % 9]] = value
    targets = np.where(of.targets >= 6, 1, of.targets)
    of.targets = np.where(targets == of.blank % 9, 2, targets)
    one = of.loss(of.weight, bias)
    assert np.isfinite(one[0]).all() == (value == -np.inf)
    expect_same(sharded([6, 3], of.weight, bias, lambda w, b, s: of.loss(w, b, shard=s)), one, "float32")


def test_one_utterance_that_is_not_finite_leaves_the_others() -> None:
    of = next(p for p in (Problem(seed, "float32") for seed in range(100)) if len(p.frames) > 2)
    of.encoder[1, 0, 0] = np.nan
    one = of.loss(of.weight, of.bias)
    assert np.isnan(one[0]).tolist() == [b == 1 for b in range(len(of.frames))]
    expect_same(sharded(of.sizes(2), of.weight, of.bias, lambda w, b, s: of.loss(w, b, shard=s)), one, "float32")


@pytest.mark.parametrize("logit", [0.5, np.nan, np.inf, -np.inf])
def test_nothing_but_a_blank(logit: float) -> None:
    """HAT has no labels to normalise, then."""
    arguments = (np.zeros((1, 3, 2)), np.zeros((1, 1, 2)), np.zeros((1, 2)), np.array([logit]), [[]], [3], [0])
    shard = tl.Shard(lambda array, operation: None, [1], 0)
    for hat in (False, True):
        wanted, got = (tl.joint_rnnt_loss(*arguments, hat=hat, shard=of)[0] for of in (None, shard))
        np.testing.assert_array_equal(got, wanted)


def test_classes_of_one_label_each() -> None:
    of = Problem(2, "float64", classes=4)
    for hat in (False, True):
        one = of.loss(of.weight, of.bias, hat=hat)
        expect_same(sharded([1, 1, 1, 1], of.weight, of.bias, lambda w, b, s: of.loss(w, b, shard=s, hat=hat)), one, "float64")  # noqa: B023


def test_exchanges_do_not_depend_on_a_shard() -> None:
    """Neither on its size nor on its layout, else processes would wait for one another for ever: `sharded` compares them."""
    rng = np.random.default_rng(0)
    encoder, predictor = rng.normal(size=(6, 40, 8)).astype("f"), rng.normal(size=(6, 11, 8)).astype("f")
    weight, targets = rng.normal(size=(700, 8)).astype("f"), rng.integers(1, 700, (6, 10))
    arguments = (targets, [40] * 6, [10] * 6)

    for workspace in (1_400_000, 3_000_000):

        def loss(weight: Array, _: None, shard: tl.Shard | None) -> Any:
            if shard is not None and shard.rank == 1:  # what is strided is copied
                weight = np.repeat(weight, 2, axis=1)[:, ::2]
            return tl.joint_rnnt_loss(
                encoder, predictor, weight, None, *arguments, shard=shard, workspace=workspace, occupancy_floor=0.0  # noqa: B023
            )  # fmt: skip

        processes = sharded([20, 680], weight, None, loss)
        expect_same(processes, loss(weight, None, None), "float32")


def test_arguments() -> None:
    of = Problem(1, "float32", classes=6)

    def nothing(array: Any, operation: str) -> None:
        pass

    with pytest.raises(TypeError, match="all_reduce: expected a callable, got int"):
        tl.Shard(3, [6], 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank: expected one of 2 processes, got 2"):
        tl.Shard(nothing, [3, 3], 2)
    with pytest.raises(TypeError, match="sizes: expected the classes of every process, got int"):
        tl.Shard(nothing, 6, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sizes: expected 1 or more, got 0"):
        tl.Shard(nothing, [6, 0], 0)
    with pytest.raises(TypeError, match="shard: expected a Shard, got str"):
        of.loss(of.weight, of.bias, shard="all")
    with pytest.raises(ValueError, match=r"weight: expected shape \(V of the shard, H\)"):
        of.loss(of.weight, of.bias, shard=tl.Shard(nothing, [4, 2], 0))
    with pytest.raises(ValueError, match=r"bias: expected shape \(V of the shard,\) = \(4,\), got \(6,\)"):
        of.loss(of.weight[:4], of.bias, shard=tl.Shard(nothing, [4, 2], 0))
    classes = tl.Classes.from_ids(list(range(6)), 6, blank=of.blank)
    with pytest.raises(ValueError, match="shard: expected None with classes"):
        of.loss(of.weight, of.bias, classes=classes, shard=tl.Shard(nothing, [6], 0))
