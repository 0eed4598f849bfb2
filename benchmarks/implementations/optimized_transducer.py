"""optimized_transducer: the loss of logits without padding, (cells, V), over which it writes their gradient."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from transducer_loss.benchmarks.implementations import Case, Step, differentiated

NAME = "optimized_transducer"
NEEDS = ("optimized_transducer",)


def _cells(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Utterance, frame and label of every cell."""
    each = [
        torch.cartesian_prod(torch.tensor([b]), torch.arange(t), torch.arange(u + 1))
        for b, (t, u) in enumerate(zip(case.frames, case.labels, strict=True))
    ]
    b, t, u = torch.cat(each).to(case.targets.device).unbind(1)
    return b, t, u


def loss(case: Case, logits: Tensor) -> Tensor:
    """Of logits (cells, V)."""
    module = importlib.import_module("optimized_transducer")
    frames, labels = case.lengths()
    wanted: Tensor = module.transducer_loss(
        logits=logits, targets=case.targets.int(), logit_lengths=frames, target_lengths=labels, blank=0, reduction="sum",
        from_log_softmax=False,
    )  # fmt: skip
    return wanted


def _of_logits(case: Case) -> Step:
    if len(set(case.frames)) == len(set(case.labels)) == 1:  # nothing is padding, but it would write over the logits
        return differentiated(case, lambda: loss(case, case.leaves["logits"].flatten(0, 2).clone()))
    cells = _cells(case)
    return differentiated(case, lambda: loss(case, case.leaves["logits"][cells]))


def _joint(case: Case) -> Step:
    b, t, u = _cells(case)

    def joined() -> Tensor:
        hidden = torch.tanh(case.leaves["encoder"][b, t] + case.leaves["predictor"][b, u])
        return loss(case, torch.nn.functional.linear(hidden, case.leaves["weight"], case.leaves["bias"]))

    return differentiated(case, joined)


TASKS = {"logits": _of_logits, "joint": _joint, "samplewise": _joint}
