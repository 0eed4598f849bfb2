"""warprnnt_numba, the loss that NeMo's descends from: CUDA, or a loop on the host."""

from __future__ import annotations

import importlib

from torch import Tensor

from transducer_loss.benchmarks.implementations import Case, exact_tasks

NAME = "warprnnt_numba"
NEEDS = ("numba", "warprnnt_numba")
MOST_ON_HOST = 40_000_000  # logits: they take 20 seconds, a hundred times as long as others


def loss(case: Case, logits: Tensor) -> Tensor:
    """Of logits."""
    if not logits.is_cuda and logits.numel() > MOST_ON_HOST:
        raise RuntimeError(f"left out: its loops on the host would take minutes for {logits.numel() / 1e6:.0f} million logits")
    frames, labels = case.lengths()
    criterion = importlib.import_module("warprnnt_numba").RNNTLossNumba(blank=0, reduction="sum")
    # On the host it takes logarithms of probabilities.
    wanted: Tensor = criterion(logits if logits.is_cuda else logits.log_softmax(-1), case.targets.int(), frames, labels)
    return wanted


TASKS = exact_tasks(loss)
