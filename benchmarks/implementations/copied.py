"""transducer_loss of hypotheses that each have a copy of their utterance's encoder."""

from __future__ import annotations

from torch import Tensor

from transducer_loss.adapters.torch import joint_rnnt_loss
from transducer_loss.benchmarks.implementations import Case, Step, differentiated

NAME = "transducer_loss, encoders copied"
NEEDS: tuple[str, ...] = ()


def _nbest(case: Case) -> Step:
    def loss() -> Tensor:
        encoder = case.leaves["encoder"].repeat_interleave(case.scenario.hypotheses, 0)
        layer = case.leaves["predictor"], case.leaves["weight"], case.leaves["bias"]
        return joint_rnnt_loss(encoder, *layer, *case.integers, reduction="sum")

    return differentiated(case, loss)


TASKS = {"nbest": _nbest}
