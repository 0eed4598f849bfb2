"""What is measured: shapes and lengths, and inputs drawn for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Task = Literal["logits", "joint", "pruned", "sampled", "samplewise", "nbest"]
S_RANGE, SAMPLES = 5, 1000


@dataclass(frozen=True)
class Scenario:
    """A loss to compute with its gradients, of utterances of so many frames and labels.

    Attributes
    ----------
    name : str
    task : str
        ``logits``: loss of given logits (B, T, U+1, V). ``joint``: joint network and loss, by gradients of encoder, predictor
        and output layer. ``pruned``: simple loss with its projections, band of S labels a frame, and joint and loss inside it.
        ``sampled``: as ``joint``, over the classes of the batch and k negatives. ``samplewise``: as ``joint``, of utterances
        that need not fit in memory at once. ``nbest``: as ``joint``, of N hypotheses of each utterance.
    frames, labels : tuple of int
        Of every utterance.
    classes, features : int
        With the blank; of the joint network.
    dtype : str
    trained : bool
        Whether the occupancy is concentrated as a trained model's is.
    hypotheses : int
        N, of ``nbest``: as many follow each other of one utterance.
    """

    name: str
    task: Task
    frames: tuple[int, ...]
    labels: tuple[int, ...]
    classes: int
    features: int
    dtype: str = "float32"
    trained: bool = False
    hypotheses: int = 1

    @property
    def batch(self) -> int:
        """Utterances."""
        return len(self.frames)

    @property
    def samples(self) -> int:
        """Negatives of ``sampled``."""
        return min(SAMPLES, self.classes // 8)

    @property
    def cells(self) -> int:
        """Cells of all lattices, without padding."""
        return sum(t * (u + 1) for t, u in zip(self.frames, self.labels, strict=True))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the padded batch: B, T, U, V and H."""
        return self.batch, max(self.frames), max(self.labels), self.classes, self.features


def random_case(batch: int, frames: int, labels: int, classes: int, features: int) -> tuple[Any, ...]:
    """Arguments of an untrained model: full lengths, flat occupancy."""
    rng = np.random.default_rng(1)
    return (
        rng.normal(size=(batch, frames, features)).astype(np.float32),
        rng.normal(size=(batch, labels + 1, features)).astype(np.float32),
        (rng.normal(size=(classes, features)) / features**0.5).astype(np.float32), np.zeros(classes, np.float32),
        rng.integers(1, classes, size=(batch, labels)), [frames] * batch, [labels] * batch,
    )  # fmt: skip


def trained_case(batch: int, frames: int, labels: int, classes: int, features: int) -> tuple[Any, ...]:
    """As `random_case`, but the blank's logit depends on how far (t, u) lies from a diagonal, as a trained model's does."""
    encoder, predictor, weight, bias, *rest = random_case(batch, frames, labels, classes, features)
    # The steepness keeps some 12 % of the cells, the share measured on a trained model of characters.
    advance = 0.35 * labels / frames * np.arange(frames, dtype=np.float32)
    emitted = 0.35 * (np.arange(labels + 1, dtype=np.float32) + 0.5)
    encoder *= 0.3
    encoder[..., 0], predictor[..., 0] = advance, -emitted
    encoder[..., 1], predictor[..., 1] = -advance, emitted
    predictor[..., 2:] = 0
    weight[:, 0], weight[:, 1] = 4, -4
    weight[0, :2] = -4, 4
    return encoder, predictor, weight, bias, *rest


@dataclass(frozen=True)
class Inputs:
    """Arrays in float32, targets (B, U) in int64, and lengths; `logits` and the projections only where the task has them."""

    floats: dict[str, np.ndarray[Any, Any]]
    targets: np.ndarray[Any, Any]
    frames: list[int]
    labels: list[int]


def inputs(scenario: Scenario) -> Inputs:
    """Draw the inputs of a scenario, the same ones each time."""
    shape = scenario.shape
    batch, frames, labels, classes, features = shape
    rng = np.random.default_rng(2)
    lengths = list(scenario.frames), list(scenario.labels)
    if scenario.task == "logits":
        logits = rng.standard_normal((batch, frames, labels + 1, classes), np.float32)
        return Inputs({"logits": logits}, rng.integers(1, classes, size=(batch, labels)), *lengths)
    encoder, predictor, weight, bias, targets, *_ = (trained_case if scenario.trained else random_case)(*shape)
    floats = {"encoder": encoder[:: scenario.hypotheses].copy(), "predictor": predictor, "weight": weight, "bias": bias}
    if scenario.task == "pruned":
        for name in ("simple_encoder_weight", "simple_predictor_weight"):
            floats[name] = (rng.normal(size=(classes, features)) / features**0.5).astype(np.float32)
    return Inputs(floats, targets, *lengths)


def full(batch: int, frames: int, labels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of utterances that are equally long."""
    return (frames,) * batch, (labels,) * batch


def speech(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths as in speech: 31 to 680 frames, 318 in the mean, and 2 to 151 labels, 68 in the mean, the more the longer."""
    rng = np.random.default_rng(0)
    frames = (31 + 649 * rng.beta(2, 2.52, count)).round().astype(int)
    labels = np.clip((frames * rng.normal(0.214, 0.03, count)).round(), 2, 151).astype(int)
    return tuple(frames.tolist()), tuple(labels.tolist())


def sorted_batches(count: int, most_frames: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Utterances sorted by length, in batches that hold no more than so many frames with their padding."""
    pairs = sorted(zip(*speech(count), strict=True))
    batches: list[list[tuple[int, int]]] = [[]]
    for pair in pairs:
        if (len(batches[-1]) + 1) * pair[0] > most_frames:
            batches.append([])
        batches[-1].append(pair)
    return [(tuple(t for t, _ in each), tuple(u for _, u in each)) for each in batches]


SMALL, LARGE = full(8, 200, 40), full(4, 300, 60)


def _on_the_host() -> Iterable[Scenario]:
    yield Scenario("logits", "logits", *SMALL, 500, 0)
    yield Scenario("logits, bfloat16", "logits", *SMALL, 500, 0, "bfloat16")
    yield Scenario("logits, V=4096", "logits", *full(4, 150, 30), 4096, 0)
    yield Scenario("logits, as in speech", "logits", *speech(6), 500, 0)
    yield Scenario("joint, small", "joint", *SMALL, 500, 256)
    yield Scenario("joint, large", "joint", *LARGE, 2000, 256)
    yield Scenario("joint, bfloat16", "joint", *SMALL, 500, 256, "bfloat16")
    yield Scenario("joint, V=16384", "joint", *full(2, 100, 20), 16384, 256)
    yield Scenario("joint, as in speech", "joint", *speech(6), 500, 512)
    yield Scenario("joint, sorted by length", "joint", *sorted_batches(300, 2000)[0], 500, 512)
    yield Scenario("joint, small, as trained", "joint", *SMALL, 500, 256, trained=True)
    yield Scenario("joint, large, as trained", "joint", *LARGE, 2000, 256, trained=True)
    yield Scenario("samplewise, B=64", "samplewise", *full(64, 100, 20), 500, 256)
    yield Scenario("nbest, N=8", "nbest", *full(32, 100, 20), 500, 256, hypotheses=8)
    yield Scenario("pruned, small", "pruned", *SMALL, 500, 256)
    yield Scenario("pruned, large", "pruned", *LARGE, 2000, 256)
    yield Scenario("pruned, as in speech", "pruned", *speech(6), 500, 512)
    for classes in (16_384, 100_000):
        yield Scenario(f"sampled, V={classes}", "sampled", *SMALL, classes, 256)


def _on_a_gpu() -> Iterable[Scenario]:
    for dtype in ("float32", "bfloat16"):
        yield Scenario(f"logits, as published, {dtype}", "logits", *speech(30), 500, 0, dtype)
        yield Scenario(f"logits, V=4096, {dtype}", "logits", *full(8, 400, 80), 4096, 0, dtype)
        yield Scenario(f"joint, as published, {dtype}", "joint", *speech(30), 500, 512, dtype)
        yield Scenario(f"joint, V=4096, {dtype}", "joint", *full(16, 400, 80), 4096, 640, dtype)
        yield Scenario(f"joint, V=4096, as trained, {dtype}", "joint", *full(16, 400, 80), 4096, 640, dtype, trained=True)
        yield Scenario(f"joint, V=16384, {dtype}", "joint", *full(8, 300, 60), 16384, 640, dtype)
        yield Scenario(f"pruned, as published, {dtype}", "pruned", *speech(30), 500, 512, dtype)
        yield Scenario(f"sampled, V=16384, {dtype}", "sampled", *full(16, 400, 80), 16384, 640, dtype)
        yield Scenario(f"nbest, N=8, {dtype}", "nbest", *full(64, 400, 50), 500, 512, dtype, hypotheses=8)
    for name, lengths in zip(("shortest", "longest"), (sorted_batches(2000, 10_000)[i] for i in (0, -2)), strict=True):
        yield Scenario(f"joint, sorted by length, {name}", "joint", *lengths, 500, 512)
    yield Scenario("samplewise, B=64", "samplewise", *full(64, 400, 80), 4096, 640, "bfloat16")
    yield Scenario("joint, B=1024, 40 s", "joint", *full(1024, 1000, 200), 4096, 640, "bfloat16")


def _growing() -> Iterable[Scenario]:
    """One size after the other, doubled twice."""
    shape = {"B": 4, "T": 100, "U": 20, "V": 500}
    for name, smallest in shape.items():
        for factor in (1, 2, 4):
            sizes = shape | {name: factor * smallest}
            lengths = full(sizes["B"], sizes["T"], sizes["U"])
            yield Scenario(f"joint, {name}={sizes[name]}", "joint", *lengths, sizes["V"], 256)


SUITES: dict[str, tuple[Scenario, ...]] = {
    "cpu": tuple(_on_the_host()),
    "cuda": tuple(_on_a_gpu()),
    "growth": tuple(_growing()),
    "trial": (
        Scenario("logits, tiny", "logits", (9, 7), (4, 1), 12, 0),
        Scenario("joint, tiny", "joint", (9, 7), (4, 1), 12, 8),
        Scenario("samplewise, tiny", "samplewise", (9, 7), (4, 1), 12, 8, "bfloat16"),
        Scenario("pruned, tiny", "pruned", (19, 17), (9, 8), 12, 8),
        Scenario("nbest, tiny", "nbest", (9, 9, 7, 7), (4, 1, 3, 4), 12, 8, hypotheses=2),
        Scenario("sampled, tiny", "sampled", (9, 7), (4, 1), 1200, 8),
    ),
}
"""Scenarios by suite: on the host, on a GPU, growth with every size, and a trial of seconds."""


def named(suite: str, name: str) -> Scenario:
    """Find a scenario of a suite."""
    return next(each for each in SUITES[suite] if each.name == name)
