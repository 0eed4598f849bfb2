"""warp-rnnt, on CUDA alone: the loss of log-probabilities, of which it gathers the two that count."""

from __future__ import annotations

import importlib

from torch import Tensor

from transducer_loss.benchmarks.implementations import Case, exact_tasks

NAME = "warp-rnnt"
NEEDS = ("warp_rnnt",)


def loss(case: Case, logits: Tensor) -> Tensor:
    """Of logits."""
    module, (frames, labels) = importlib.import_module("warp_rnnt"), case.lengths()
    log_probs = logits.float().log_softmax(-1)
    wanted: Tensor = module.rnnt_loss(log_probs, case.targets.int(), frames, labels, reduction="sum", blank=0, gather=True)
    return wanted


TASKS = exact_tasks(loss)
