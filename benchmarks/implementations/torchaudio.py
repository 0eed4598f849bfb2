"""torchaudio's loss of logits."""

from __future__ import annotations

import importlib

from torch import Tensor

from transducer_loss.benchmarks.implementations import Case, exact_tasks

NAME = "torchaudio"
NEEDS = ("torchaudio",)


def loss(case: Case, logits: Tensor) -> Tensor:
    """Of logits in float32, or on a GPU in float16."""
    functional = importlib.import_module("torchaudio.functional")
    wanted: Tensor = functional.rnnt_loss(logits, case.targets.int(), *case.lengths(), blank=0, reduction="sum")
    return wanted


TASKS = exact_tasks(loss)
