"""Time of `joint_rnnt_loss` on the host, as a ratio to its floor: the three matrix products, alone, in NumPy's BLAS.

``python -m transducer_loss.benchmarks.joint_loss`` prints a JSON object per case.
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import transducer_loss

CASES = {"small": (8, 200, 40, 500, 256), "large": (4, 300, 60, 2000, 256)}
REPEATS = 5


def medians(*works: Callable[[], Any]) -> list[float]:
    """Seconds of each work, the medians of five runs in turns: the clock of a busy machine drifts, for all of them alike.

    Each is run once before each run that counts: a BLAS's threads spin for a while after their work, in the next one's way.
    """
    times: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS):
        for work, seconds in zip(works, times, strict=True):
            work()
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def three_products(cells: int, classes: int, features: int) -> Callable[[], None]:
    """hidden to logits, logits' gradient to hidden's and to the weight's, of all cells at once."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(cells, features)).astype(np.float32)
    weight = rng.normal(size=(classes, features)).astype(np.float32)
    logits, hidden_gradient, weight_gradient = np.ones((cells, classes), np.float32), np.ones_like(hidden), np.ones_like(weight)

    def run() -> None:
        np.matmul(hidden, weight.T, out=logits)
        np.matmul(logits, weight, out=hidden_gradient)
        np.matmul(logits.T, hidden, out=weight_gradient)

    return run


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


def main() -> None:
    """Run all cases."""
    for name, shape in CASES.items():
        batch, frames, labels, classes, features = shape
        call = functools.partial(transducer_loss.joint_rnnt_loss, *random_case(*shape), occupancy_floor=0.0)
        products, every_cell = medians(three_products(batch * frames * (labels + 1), classes, features), call)
        trained = functools.partial(transducer_loss.joint_rnnt_loss, *trained_case(*shape))
        grads = trained()[1]
        dropping, keeping = medians(trained, functools.partial(trained, occupancy_floor=0.0))
        print(json.dumps({
            "case": name, "B T U V H": shape, "three products, s": round(products, 4), "every cell, s": round(every_cell, 4),
            "ratio to products": round(every_cell / products, 3),
            "trained: default floor against every cell": round(dropping / keeping, 3),
            "trained: dropped": round(grads.dropped if grads else 0.0, 3),
            "machine": platform.machine(), "numpy": np.__version__,
        }))  # fmt: skip


if __name__ == "__main__":
    main()
