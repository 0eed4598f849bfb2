"""k2, whose losses fast_rnnt has, too, under the same names."""

from __future__ import annotations

import importlib

from torch import Tensor

from transducer_loss.benchmarks.implementations import Case, exact_tasks
from transducer_loss.benchmarks.implementations.fast_rnnt import boundary_of

NAME = "k2"
NEEDS = ("k2",)


def loss(case: Case, logits: Tensor) -> Tensor:
    """Of logits."""
    module = importlib.import_module("k2")
    wanted: Tensor = module.rnnt_loss(logits, case.targets, 0, boundary=boundary_of(case), reduction="sum")
    return wanted


TASKS = exact_tasks(loss)
