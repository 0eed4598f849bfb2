"""NeMo's loss in numba."""

from __future__ import annotations

import importlib

from torch import Tensor

from transducer_loss.benchmarks.implementations import Case, exact_tasks

NAME = "NeMo"
NEEDS = ("nemo.collections.asr.parts.numba.rnnt_loss",)


def loss(case: Case, logits: Tensor) -> Tensor:
    """Of logits; on the host it takes logarithms of probabilities."""
    frames, labels = (each.long() for each in case.lengths())
    criterion = importlib.import_module(NEEDS[0]).RNNTLossNumba(blank=0, reduction="sum")
    wanted: Tensor = criterion(logits if logits.is_cuda else logits.log_softmax(-1), case.targets, frames, labels)
    return wanted


TASKS = exact_tasks(loss)
