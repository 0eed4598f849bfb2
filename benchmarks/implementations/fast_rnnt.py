"""fast_rnnt: the loss of logits, and pruned RNN-T with a joint network in PyTorch."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from transducer_loss.band import Band
from transducer_loss.benchmarks.implementations import Case, Step, differentiated, exact_tasks
from transducer_loss.benchmarks.scenarios import S_RANGE

NAME = "fast_rnnt"
NEEDS = ("fast_rnnt",)


def boundary_of(case: Case) -> Tensor:
    """Labels and frames of every utterance, as k2 wants them, too."""
    lengths = [[0, 0, labels, frames] for frames, labels in zip(case.frames, case.labels, strict=True)]
    return torch.tensor(lengths, dtype=torch.int64, device=case.targets.device)


def loss(case: Case, logits: Tensor) -> Tensor:
    """Of logits."""
    module = importlib.import_module("fast_rnnt")
    wanted: Tensor = module.rnnt_loss(logits, case.targets, 0, boundary=boundary_of(case), reduction="sum")
    return wanted


def pruned(case: Case) -> Step:
    """Simple loss, ranges, pruned loss."""
    module = importlib.import_module("fast_rnnt")
    boundary, leaves = boundary_of(case), case.leaves

    def both() -> Tensor:
        am = leaves["encoder"] @ leaves["simple_encoder_weight"].T
        lm = leaves["predictor"] @ leaves["simple_predictor_weight"].T
        simple, (px, py) = module.rnnt_loss_smoothed(
            lm=lm, am=am, symbols=case.targets, termination_symbol=0, lm_only_scale=0.25, am_only_scale=0.0, boundary=boundary,
            reduction="sum", return_grad=True,
        )  # fmt: skip
        ranges = module.get_rnnt_prune_ranges(px_grad=px, py_grad=py, boundary=boundary, s_range=S_RANGE)
        case.band = lambda: Band.from_ranges(ranges, case.frames, case.labels)
        encoder, predictor = module.do_rnnt_pruning(am=leaves["encoder"], lm=leaves["predictor"], ranges=ranges)
        logits = torch.nn.functional.linear(torch.tanh(encoder + predictor), leaves["weight"], leaves["bias"])
        inside: Tensor = module.rnnt_loss_pruned(
            logits=logits, symbols=case.targets, ranges=ranges, termination_symbol=0, boundary=boundary, reduction="sum"
        )
        total: Tensor = simple + inside
        return total

    return differentiated(case, both)


TASKS = {**exact_tasks(loss), "pruned": pruned}
