"""Time and memory of the sampled softmax on the host, at a vocabulary for which the exact loss is slow, beside that loss.

``python -m transducer_loss.benchmarks.sampled_loss`` prints a JSON object. The exact loss takes minutes there and is run once;
``--classes 5000`` is soon done.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

import transducer_loss
from transducer_loss.benchmarks.joint_loss import medians, random_case, three_products
from transducer_loss.benchmarks.pruned_loss import extra_megabytes

BATCH, FRAMES, LABELS, FEATURES = 8, 200, 40, 256


def once(work: Callable[[], Any], returned: int) -> tuple[float, float]:
    """Seconds of one run, and megabytes at its peak beyond the arrays that it returns, of so many bytes."""
    tracemalloc.start()
    start = time.perf_counter()
    kept = work()
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return seconds, (peak - returned) / 1e6


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m transducer_loss.benchmarks.sampled_loss")
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--no-exact", action="store_true")
    asked = parser.parse_args()
    shape = (BATCH, FRAMES, LABELS, asked.classes, FEATURES)
    arguments = random_case(*shape)
    targets, frames, labels = arguments[4:]
    head = np.random.default_rng(3).normal(size=(BATCH, FRAMES, asked.classes)).astype(np.float32)

    def drawn(**options: Any) -> transducer_loss.Classes:
        return transducer_loss.sample_classes(
            targets, labels, vocab_size=asked.classes, num_samples=asked.samples, correction=True, **options
        )

    def sampled(scope: str = "batch", sparse: bool = True) -> Any:
        classes = drawn(scope=scope)
        return transducer_loss.joint_rnnt_loss(*arguments, classes=classes, sparse=sparse, occupancy_floor=0.0)

    slots = {scope: drawn(scope=scope).slots for scope in ("batch", "utterance")}
    cells = BATCH * FRAMES * (LABELS + 1)
    works: dict[str, Callable[[], Any]] = {
        "three products of the sampled classes": three_products(cells, slots["batch"], FEATURES),
        "sampled": sampled, "sampled, gradients of all rows": functools.partial(sampled, sparse=False),
        "sampled, per utterance": functools.partial(sampled, "utterance"), "of it drawing, uniform": drawn,
        "drawing by CTC posteriors": functools.partial(drawn, proposal="ctc", ctc_logits=head, ctc_lengths=frames),
    }  # fmt: skip
    seconds = dict(zip(works, medians(*works.values()), strict=True))
    features = arguments[0].nbytes + arguments[1].nbytes
    row = 4 * (FEATURES + 1)
    found = {
        "B T U V H": shape, "k": asked.samples, "K": slots["batch"], "K, per utterance": slots["utterance"],
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "ratio to products": round(seconds["sampled"] / seconds["three products of the sampled classes"], 3),
        "extra MB, sampled": round(extra_megabytes(works["sampled"], features + slots["batch"] * row), 1),
        "extra MB, gradients of all rows": round(
            extra_megabytes(works["sampled, gradients of all rows"], features + asked.classes * row), 1
        ),
        "extra MB, per utterance": round(
            extra_megabytes(works["sampled, per utterance"], features + BATCH * slots["utterance"] * row), 1
        ),
        "MB of logits (B, T, U+1, V)": round(4e-6 * cells * asked.classes, 1),
        "machine": platform.machine(), "numpy": np.__version__,
    }  # fmt: skip
    if not asked.no_exact:
        # The default workspace has room for the products of one thread only.
        exact = functools.partial(transducer_loss.joint_rnnt_loss, *arguments, occupancy_floor=0.0, workspace="4GiB")
        exact_seconds, extra = once(exact, features + asked.classes * row)
        found |= {
            "exact, s": round(exact_seconds, 2), "extra MB, exact": round(extra, 1),
            "sampled to exact": round(seconds["sampled"] / exact_seconds, 4),
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
