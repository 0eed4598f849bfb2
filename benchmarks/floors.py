"""What no implementation can do without: bytes to move and multiply-adds, and how fast this machine does them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from transducer_loss.benchmarks.scenarios import S_RANGE, Scenario

COPIED_BYTES = 1 << 28
MOST_ROWS = 1 << 16  # of the products that are timed: enough for a rate, small enough for any memory


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products, the classes that these have, and bytes to or from memory."""

    operations: int
    classes: int
    bytes: int


def work(scenario: Scenario) -> Work:
    """Count the work of a scenario with all gradients, of cells that are not padding.

    From logits: one pass for their normalisers, one for their gradient, which is written: three times their size. With the
    joint network: logits, gradient of the hidden layer, gradient of the weight, each a product of cells x V x H. Pruned: these
    in S cells of each frame, and the same three for both projections and for the simple joint network's normalisers, whose
    "features" are the V classes. Sampled: of K classes for V. Gradients that an implementation drops count in full.
    """
    size = getattr(torch, scenario.dtype).itemsize
    rows = sum(scenario.frames[:: scenario.hypotheses]) + sum(scenario.labels) + scenario.batch
    classes, features = scenario.classes, scenario.features
    if scenario.task == "logits":
        return Work(0, 0, 3 * size * scenario.cells * classes)
    if scenario.task == "pruned":
        kept = sum(t * min(S_RANGE, u + 1) for t, u in zip(scenario.frames, scenario.labels, strict=True))
        operations = 6 * (kept * features + rows * features + scenario.cells) * classes
        return Work(operations, classes, 3 * size * rows * (features + classes))
    if scenario.task == "sampled":
        classes = min(classes, scenario.samples + sum(scenario.labels) + 1)
    return Work(6 * scenario.cells * classes * features, classes, 2 * size * (rows + 2 * classes) * features)


def three_products(cells: int, classes: int, features: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """What no exact loss with a gradient of every cell does without: logits, and the gradients of hidden and weight."""
    hidden, weight = (torch.randn(n, features, dtype=dtype, device=device) for n in (cells, classes))
    logits = torch.empty(cells, classes, dtype=dtype, device=device)
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=hidden_gradient)
        torch.mm(logits.T, hidden, out=weight_gradient)

    return run


def products(scenario: Scenario, classes: int, device: str) -> tuple[Callable[[], None], int]:
    """The three products of a scenario's cells, or of as many as fit; and their floating-point operations."""
    rows = min(scenario.cells, MOST_ROWS)
    run = three_products(rows, classes, scenario.features, getattr(torch, scenario.dtype), device)
    return run, 6 * rows * classes * scenario.features


def copying(device: str) -> tuple[Callable[[], None], int]:
    """A copy by all threads; and the bytes that it reads and writes."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    copy = torch.ones_like(source)

    def run() -> None:
        copy.copy_(source)

    return run, 2 * COPIED_BYTES
