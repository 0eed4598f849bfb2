"""transducer_loss, as its losses are by default."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters.torch import (
    joint_rnnt_loss,
    prune,
    rnnt_loss,
    sample_classes,
    samplewise_rnnt_loss,
    simple_rnnt_loss,
)
from transducer_loss.benchmarks.implementations import Case, Step, differentiated
from transducer_loss.benchmarks.scenarios import S_RANGE

NAME = "transducer_loss"
NEEDS: tuple[str, ...] = ()


def tasks(**options: Any) -> dict[str, Any]:
    """Steps by task, with options of `joint_rnnt_loss`."""

    def layer(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return case.leaves["encoder"], case.leaves["predictor"], case.leaves["weight"], case.leaves["bias"]

    def logits(case: Case) -> Step:
        return differentiated(case, lambda: rnnt_loss(case.leaves["logits"], *case.integers, reduction="sum"))

    def joint(case: Case) -> Step:
        return differentiated(case, lambda: joint_rnnt_loss(*layer(case), *case.integers, reduction="sum", **options))

    def nbest(case: Case) -> Step:
        every = case.scenario.hypotheses
        owners = torch.arange(case.scenario.batch) // every
        lengths = case.targets, case.frames[::every], case.labels
        return differentiated(
            case, lambda: joint_rnnt_loss(*layer(case), *lengths, encoder_index=owners, reduction="sum", **options)
        )

    def pruned(case: Case) -> Step:
        def loss() -> Tensor:
            am = case.leaves["encoder"] @ case.leaves["simple_encoder_weight"].T
            lm = case.leaves["predictor"] @ case.leaves["simple_predictor_weight"].T
            simple, occupancy = simple_rnnt_loss(am, lm, *case.integers, lm_only_scale=0.25, reduction="sum")
            band = given() if given else prune(occupancy, case.frames, case.labels, s_range=S_RANGE)
            case.band = lambda: band
            return simple + joint_rnnt_loss(*layer(case), *case.integers, band=band, reduction="sum", **options)

        given = case.band
        return differentiated(case, loss)

    def sampled(case: Case) -> Step:
        def loss() -> Tensor:
            classes = sample_classes(
                case.targets, case.labels, vocab_size=case.scenario.classes, num_samples=case.scenario.samples, correction=True,
                seed=1,
            )  # fmt: skip
            return joint_rnnt_loss(*layer(case), *case.integers, classes=classes, reduction="sum", **options)

        return differentiated(case, loss)

    def samplewise(case: Case) -> Step:
        def joint_network(encoder: Tensor, predictor: Tensor) -> Tensor:
            return torch.nn.functional.linear(torch.tanh(encoder + predictor), case.leaves["weight"], case.leaves["bias"])

        def loss() -> Tensor:
            encoder, predictor, *own = layer(case)
            return samplewise_rnnt_loss(joint_network, encoder, predictor, *case.integers, parameters=own, reduction="sum")

        return differentiated(case, loss)

    return {
        "logits": logits, "joint": joint, "nbest": nbest, "pruned": pruned, "sampled": sampled, "samplewise": samplewise,
    }  # fmt: skip


TASKS = tasks()
