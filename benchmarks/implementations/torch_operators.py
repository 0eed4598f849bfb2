"""The transducer loss composed of PyTorch's own operators: what needs no library."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_loss.benchmarks.implementations import Case, exact_tasks

NAME = "PyTorch operators"
NEEDS: tuple[str, ...] = ()


def loss(case: Case, logits: Tensor) -> Tensor:
    """One step per frame: within it, the recursion over labels is a running sum of logarithms.

    With alpha(t, u) = logaddexp(alpha(t-1, u) + blank, alpha(t, u-1) + label(t, u-1)) and s(t, u) the sum of the frame's
    label terms before u, alpha(t, u) - s(t, u) is the running logsumexp over v <= u of alpha(t-1, v) + blank - s(t, v).
    """
    batch, frames, rows, _ = logits.shape
    log_probs = logits.float().log_softmax(-1)
    blank = log_probs[..., 0]
    index = case.targets[:, None, :, None].expand(batch, frames, rows - 1, 1)
    label = log_probs[:, :, :-1].gather(-1, index).squeeze(-1)
    so_far = torch.nn.functional.pad(label.cumsum(-1), (1, 0))
    alpha = so_far[:, 0]
    ends = [alpha]
    for t in range(1, frames):
        alpha = so_far[:, t] + torch.logcumsumexp(alpha + blank[:, t - 1] - so_far[:, t], dim=-1)
        ends.append(alpha)
    each = torch.arange(batch, device=logits.device)
    last, row = torch.tensor(case.frames, device=logits.device) - 1, torch.tensor(case.labels, device=logits.device)
    return -(torch.stack(ends, 1)[each, last, row] + blank[each, last, row]).sum()


TASKS = exact_tasks(loss)
