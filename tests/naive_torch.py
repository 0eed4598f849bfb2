"""What the tests for PyTorch share: a ragged batch, the loss as torch's own operators make it, and errors."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HALVES = DTYPES[:2]

# Upstream gradients of the losses (B,), as reductions and callers make them.
WEIGHTS = [1.5, -0.75, 0.0, 2.0]


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of every loss, in float64: utterances with every kind of border."""

    logits: Tensor
    """(B, T, U+1, V)."""
    joint: tuple[Tensor, Tensor, Tensor, Tensor]
    """Encoder (B, T, H), predictor (B, U+1, H), weight (V, H), bias (V,)."""
    targets: Tensor
    """(B, U), -1 past an utterance's end."""
    frames: list[int]
    labels: list[int]

    @property
    def integers(self) -> tuple[Tensor, list[int], list[int]]:
        """As every loss takes them."""
        return self.targets, self.frames, self.labels

    def padding(self, tensor: Tensor) -> Tensor:
        """Which elements of the logits, the encoder or the predictor are not real."""
        mask = torch.ones(tensor.shape, dtype=torch.bool)
        for b, (T, U) in enumerate(zip(self.frames, self.labels, strict=True)):
            if tensor.ndim == 4:
                mask[b, :T, : U + 1] = False
            else:
                mask[b, : T if tensor.shape[1] == max(self.frames) else U + 1] = False
        return mask


def case(
    frames: Sequence[int] = (9, 1, 7, 4), labels: Sequence[int] = (5, 0, 3, 4), classes: int = 13, features: int = 6
) -> Case:
    """The same case for the same arguments."""
    generator = torch.Generator().manual_seed(len(frames) + classes)
    batch, T, U = len(frames), max(frames), max(labels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(1, classes, (batch, U), generator=generator)
    targets[torch.arange(U) >= torch.tensor(labels)[:, None]] = -1
    joint = (normal(batch, T, features), normal(batch, U + 1, features), normal(classes, features), normal(classes))
    return Case(2 * normal(batch, T, U + 1, classes), joint, targets, list(frames), list(labels))


def leaves(*tensors: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Copies that need a gradient."""
    return [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]


def naive_rnnt_loss(logits: Tensor, targets: Tensor, frames: Sequence[int], labels: Sequence[int]) -> Tensor:
    """Losses (B,) by log_softmax and the forward recursion under autograd, all in the dtype of the logits; blank is 0."""
    losses = []
    for b, (T, U) in enumerate(zip(frames, labels, strict=True)):
        log_probs = logits[b, :T, : U + 1].log_softmax(-1)
        blank = log_probs[..., 0]
        label = log_probs[:, :U].gather(-1, targets[b, :U].clamp(min=0).expand(T, U)[..., None])[..., 0]
        alpha: dict[tuple[int, int], Tensor] = {}
        for t in range(T):
            for u in range(U + 1):
                ways = []
                if t > 0:
                    ways.append(alpha[t - 1, u] + blank[t - 1, u])
                if u > 0:
                    ways.append(alpha[t, u - 1] + label[t, u - 1])
                alpha[t, u] = torch.logaddexp(*ways) if len(ways) == 2 else ways[0] if ways else torch.zeros_like(blank[0, 0])
        losses.append(-(alpha[T - 1, U] + blank[T - 1, U]))
    return torch.stack(losses)


def naive_joint(encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits of the joint that `joint_rnnt_loss` is fused with."""
    return torch.nn.functional.linear(torch.tanh(encoder[:, :, None] + predictor[:, None]), weight, bias)


def error(value: Tensor, exact: Tensor | np.ndarray) -> float:
    """Relative, by the Frobenius norm; NaN where the value has one."""
    exact = torch.as_tensor(exact).detach()
    return float(torch.linalg.vector_norm(value.detach().double() - exact) / torch.linalg.vector_norm(exact))


def same(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    """Whether tensors have the same bits, and are None in the same places."""
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(first, second, strict=True)
    )
