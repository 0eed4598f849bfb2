"""Who computes a scenario: this library and its peers, all by PyTorch's autograd.

An implementation is a file of this folder: `NAME`, by which results list it, `NEEDS`, the modules that it imports, and
`TASKS`, which gives for a task the function that makes from a `Case` the step to measure. Where a module cannot be imported,
the implementation is listed as absent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from transducer_loss.band import Band
from transducer_loss.benchmarks.scenarios import Scenario, inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAMES = (
    "fused", "every_cell", "small_workspace", "copied", "torch_operators", "torchaudio", "fast_rnnt", "optimized_transducer",
    "k2", "nemo", "warprnnt_numba", "warp_rnnt",
)  # fmt: skip
"""Files of this folder: the library's own first."""


@dataclass
class Case:
    """A scenario's inputs as PyTorch has them: leaves on a device and in the scenario's dtype, lengths on the host."""

    scenario: Scenario
    leaves: dict[str, Tensor]
    targets: Tensor  # (B, U) int64
    frames: list[int]
    labels: list[int]
    band: Callable[[], Band] | None = None
    """Of ``pruned``: the band of the last step, which in a wider dtype might be another, and so be no measure of its error."""

    @classmethod
    def of(cls, scenario: Scenario, device: str) -> Case:
        """Draw the inputs and take them to a device."""
        import torch

        drawn, dtype = inputs(scenario), getattr(torch, scenario.dtype)
        leaves = {name: torch.from_numpy(array).to(device, dtype).requires_grad_() for name, array in drawn.floats.items()}
        return cls(scenario, leaves, torch.from_numpy(drawn.targets).to(device), drawn.frames, drawn.labels)

    def exact(self, dtype: torch.dtype) -> Case:
        """The same numbers as they are after rounding to the scenario's dtype, in a wider one."""
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves.items()}
        return Case(self.scenario, leaves, self.targets, self.frames, self.labels, self.band)

    @property
    def integers(self) -> tuple[Tensor, list[int], list[int]]:
        """As this library's losses take them."""
        return self.targets, self.frames, self.labels

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Frames and labels as int32 tensors beside the leaves."""
        import torch

        return tuple(torch.tensor(each, dtype=torch.int32, device=self.targets.device) for each in (self.frames, self.labels))  # type: ignore[return-value]


Result = tuple["Tensor", dict[str, "Tensor"]]
"""The sum of the losses, and the gradient of every leaf by its name."""
Step = Callable[[], Result]


def differentiated(case: Case, loss: Callable[[], Tensor]) -> Step:
    """Loss and gradients of all leaves."""
    import torch

    def step() -> Result:
        value = loss()
        return value.detach(), dict(zip(case.leaves, torch.autograd.grad(value, list(case.leaves.values())), strict=True))

    return step


def hidden(case: Case) -> Tensor:
    """The joint network's hidden layer (B, T, U+1, H), as a recipe writes it."""
    import torch

    return torch.tanh(case.leaves["encoder"][:, :, None] + case.leaves["predictor"][:, None])


def exact_tasks(loss: Callable[[Case, Tensor], Tensor]) -> dict[str, Callable[[Case], Step]]:
    """Tasks of an implementation that knows a loss of logits (B, T, U+1, V), summed: all that are exact."""
    import torch

    def of_logits(case: Case) -> Step:
        return differentiated(case, lambda: loss(case, case.leaves["logits"]))

    def of_joint(case: Case) -> Step:
        layer = case.leaves["weight"], case.leaves["bias"]
        return differentiated(case, lambda: loss(case, torch.nn.functional.linear(hidden(case), *layer)))

    return {"logits": of_logits, "joint": of_joint, "samplewise": of_joint}


def load(name: str) -> ModuleType:
    """Import an implementation, and what it needs."""
    module = importlib.import_module(f"{__name__}.{name}")
    for needed in module.NEEDS:
        importlib.import_module(needed)
    return module
