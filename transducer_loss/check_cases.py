"""Inputs of `check`, and what the reference makes of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from transducer_loss import check_systems, reference
from transducer_loss.arrays import numpy_dtype
from transducer_loss.band import Band
from transducer_loss.classes import Classes
from transducer_loss.sampling import sample_classes

Array = np.ndarray[Any, Any]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fastemit": {"fastemit_lambda": 0.25},
    "delay penalty": {"delay_penalty": 0.0625},
    "hat": {"hat": True},
    "normalized": {"normalized": True},
    "clamp": {"clamp": 0.0625},
    "band": {},
    "classes": {},
    "band and classes": {},
    "shared encoders": {},
    "smoothed": {"lm_only_scale": 0.25, "am_only_scale": 0.125},
}

VARIANTS_OF = {
    "rnnt_loss": ("plain", "fastemit", "delay penalty", "hat", "normalized", "clamp", "band"),
    "joint_rnnt_loss": ("plain", "fastemit", "delay penalty", "hat", "band", "classes", "band and classes", "shared encoders"),
    "simple_rnnt_loss": ("plain", "fastemit", "delay penalty", "smoothed"),
    **{name: tuple(variants) for name, variants in check_systems.VARIANTS_OF.items()},
}
"""The functions, and the variants that each has."""

_BLANK, _WEIGHTS = 1, (1.0, -0.5, 2.0, 0.25)
_S = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of all losses, the same for every dtype."""

    seed: int
    logits: Array
    joint: tuple[Array, Array, Array, Array]
    """Encoder, predictor, weight, bias."""
    simple: tuple[Array, Array]
    """am and lm."""
    targets: Array
    frames: Array
    labels: Array
    weights: Array

    @property
    def encoder_index(self) -> list[int]:
        """Whose encoder each utterance has, where they share them: not in order, and not all of them."""
        return [b // 2 * 2 for b in reversed(range(len(self.frames)))]

    def system(self, function: str, variant: str) -> check_systems.System:
        """A call of a function without a lattice."""
        draw = functools.partial(_draw, np.random.default_rng(self.seed))
        return check_systems.system(function, variant, draw, self.frames, self.labels, self.weights)

    @property
    def band(self) -> Band:
        """A band of rows along the diagonal."""
        frame, last = np.arange(self.frames.max()), np.maximum(self.labels - _S + 1, 0)
        first = np.minimum(frame * last[:, None] // np.maximum(self.frames - 1, 1)[:, None], last[:, None])
        width = min(_S, int(self.labels.max()) + 1)
        return Band.from_ranges(first[:, :, None] + np.arange(width), self.frames, self.labels)

    def classes(self, variant: str, dtype: str = "float64", to_device: Callable[[Array], Any] = np.asarray) -> Classes:
        """Sampled on the device at hand, of each utterance or of all: the same ones on every device, for every dtype."""
        size = self.logits.shape[3]
        given: dict[str, Any] = {"proposal": "unigram", "counts": to_device(1000.0 // np.arange(1, size + 1))}
        if variant == "classes":
            head = self.logits[:, :, 0].astype(numpy_dtype(dtype))
            given = {"proposal": "ctc", "ctc_logits": to_device(head), "ctc_lengths": self.frames, "scope": "utterance"}
        return sample_classes(
            self.targets, self.labels, vocab_size=size, num_samples=size // 2, blank=_BLANK, correction=True, **given
        )  # fmt: skip


def _draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    """Multiples of 1/32 below 8 in magnitude: exact in every dtype, so that one reference serves all of them."""
    return np.clip(np.rint(32 * scale * rng.normal(size=shape)), -255, 255) / 32


def _case(frames: Sequence[int], labels: Sequence[int], classes: int, features: int, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    batch, T, U = len(frames), max(frames), max(labels)
    # Past the last label there is what some toolkits pad with; it must not be read. A label may be the blank, save in HAT.
    targets = np.where(np.arange(U) < np.array(labels)[:, None], rng.integers(0, classes, (batch, U)), -1)
    logits = _draw(rng, batch, T, U + 1, classes, scale=2.0)
    encoder, predictor = _draw(rng, batch, T, features), _draw(rng, batch, U + 1, features)
    output = _draw(rng, classes, features, scale=0.5), _draw(rng, classes)
    am, lm = _draw(rng, batch, T, classes, scale=1.5), _draw(rng, batch, U + 1, classes, scale=1.5)
    for b in range(batch):
        logits[b, frames[b] :] = logits[b, :, labels[b] + 1 :] = np.nan
        encoder[b, frames[b] :] = predictor[b, labels[b] + 1 :] = am[b, frames[b] :] = lm[b, labels[b] + 1 :] = np.nan
    weights = np.array(_WEIGHTS[:batch])
    return Case(seed, logits, (encoder, predictor, *output), (am, lm), targets, np.array(frames), np.array(labels), weights)


@functools.cache
def cases(seed: int) -> tuple[Case, ...]:
    """Utterances with every kind of border; more classes than a block has threads; rows wider than a warp."""
    return (
        _case([13, 1, 7, 9], [5, 0, 7, 0], 19, 8, seed),
        _case([4], [3], 1500, 33, seed + 1),
        _case([45], [40], 7, 16, seed + 2),
    )


def options(variant: str, topology: str, case: Case) -> dict[str, Any]:
    """Keyword arguments, but for the band."""
    return {"topology": topology, "blank": _BLANK, "weights": case.weights, **VARIANTS[variant]}


def inputs(function: str, variant: str, case: Case) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Float and integer arguments of a function."""
    targets = np.where(case.targets == _BLANK, _BLANK + 1, case.targets) if variant == "hat" else case.targets
    integers = (targets, case.frames, case.labels)
    if function == "joint_rnnt_loss":
        return case.joint, integers
    if function == "simple_rnnt_loss":
        return case.simple, integers
    logits = -abs(case.logits) if variant == "normalized" else case.logits
    if "band" in variant:
        # Columns past the last label, of which there are some where a transcript is short, are not read.
        columns = np.minimum(case.band.to_ranges(), logits.shape[2] - 1)
        logits = np.take_along_axis(logits, columns[..., None], axis=2)
    return (logits,), integers


@functools.cache
def expected(function: str, topology: str, variant: str, seed: int, index: int) -> tuple[Array, tuple[Array, ...]]:
    """Loss and gradients of a case by the reference; dtypes share them."""
    case = cases(seed)[index]
    if function in check_systems.VARIANTS_OF:
        return case.system(function, variant).wanted()
    floats, integers = inputs(function, variant, case)
    twin, parts = getattr(reference, function), dict[str, Any]()
    if "band" in variant:
        parts = {"first": case.band.first} | ({"width": case.band.width} if function == "joint_rnnt_loss" else {})
    if "classes" in variant:
        classes = case.classes(variant)
        parts |= {"classes": classes.ids, "offset": -np.log(classes.probability.astype(np.float64))}
    if variant == "shared encoders":
        encoders = case.encoder_index
        floats, integers = (floats[0][encoders], *floats[1:]), (integers[0], case.frames[encoders], case.labels)
    loss, gradients, *_ = twin(*floats, *integers, **options(variant, topology, case), **parts)
    if variant == "shared encoders":
        by_encoder = np.zeros_like(case.joint[0])
        np.add.at(by_encoder, encoders, gradients[0])
        gradients = (by_encoder, *gradients[1:])
    return loss, gradients if isinstance(gradients, tuple) else (gradients,)
