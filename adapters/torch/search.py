"""PyTorch: what decoding knows of a model: checked arguments, and the predictor's results for the prefixes in use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters.torch.operators import compute_dtype, expect_tensor
from transducer_loss.checks import TOPOLOGIES, blank_class, choice, lengths, whole_number

Predictor = Callable[[Tensor, Any], tuple[Tensor, Any]]
Joint = Callable[[Tensor, Tensor], Tensor]


class Search:
    """Checked arguments, and what the predictor has made of the prefixes in use: a row for each."""

    def __init__(
        self, encoder: Tensor, encoder_lengths: Any, predictor: Predictor, joint: Joint, blank: int, max_symbols: int,
        topology: str, normalized: bool, hat: bool,
    ) -> None:  # fmt: skip
        expect_tensor(encoder, "encoder")
        if encoder.ndim != 3 or 0 in encoder.shape[:2]:
            raise ValueError(f"encoder: expected shape (B, T, H) with B and T of 1 or more, got {tuple(encoder.shape)}")
        host = encoder_lengths.cpu() if isinstance(encoder_lengths, Tensor) else encoder_lengths
        known = lengths(host, "encoder_lengths", encoder.shape[0], 0, encoder.shape[1], "T")
        if hat and normalized:
            raise ValueError("hat: expected False with normalized=True (HAT normalises the logits itself), got True")
        self.encoder, self.predictor, self.joint = encoder, predictor, joint
        self.lengths, self.frames = torch.from_numpy(known).to(encoder.device), int(known.max())
        self.broken = torch.zeros_like(self.lengths, dtype=torch.bool)
        most = whole_number(max_symbols, "max_symbols", 1)
        # The constrained lattice is the regular one with a label a frame at most.
        self.max_symbols = most if choice(topology, TOPOLOGIES, "topology") == TOPOLOGIES.index("regular") else 1
        self.modified = topology == "modified"
        self.normalized, self.hat = normalized, hat
        self.blank = whole_number(blank, "blank")
        if self.blank < 0:
            probe, _ = self._predicted(self.lengths.new_zeros(1), None)
            self.blank = blank_class(blank, self._joined(encoder[:1, 0], probe).shape[1])
        self.features, self.state = self._predicted(self.lengths.new_full((1,), self.blank), None)
        self.grown = False

    def _predicted(self, labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        result = self.predictor(labels, state)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise TypeError(f"predictor: expected a pair of features and state, got {type(result).__name__}")

        def checked(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or len(tensor) != len(labels):
                raise ValueError(
                    f"predictor: expected a row for each of the M = {len(labels)} labels in features and in each tensor of the "
                    f"state, got shape {tuple(tensor.shape)}"
                )
            return tensor

        features, state = result
        expect_tensor(features, "predictor: features")
        return checked(features), _each(checked, state)

    def _joined(self, encoding: Tensor, features: Tensor) -> Tensor:
        logits = self.joint(encoding, features)
        expect_tensor(logits, "joint")
        if logits.ndim != 2 or len(logits) != len(encoding) or not logits.is_floating_point():
            raise ValueError(
                f"joint: expected float logits (M, V), M = {len(encoding)}, got {logits.dtype} of shape {tuple(logits.shape)}"
            )
        blank_class(self.blank, logits.shape[1])
        return logits

    def log_probs(self, frame: int, utterances: Tensor, rows: Tensor) -> Tensor:
        """Log-probabilities (M, V) of some utterances' cells."""
        logits = self._joined(self.encoder[utterances, frame], self.features[rows])
        x = logits.to(compute_dtype(logits))
        if self.normalized:
            return x
        if not self.hat:
            return x.log_softmax(1)
        silent = x[:, self.blank, None]
        labels = x.index_fill(1, silent.new_tensor([self.blank], dtype=torch.int64), -math.inf)
        result = labels.log_softmax(1) + torch.nn.functional.logsigmoid(-silent)
        result[:, self.blank, None] = torch.nn.functional.logsigmoid(silent)
        return result

    def extend(self, rows: Tensor, labels: Tensor) -> Tensor:
        """New rows, for the prefixes of some rows with a label more each."""
        features, state = self._predicted(labels, _each(lambda tensor: tensor[rows], self.state))
        first = len(self.features)
        self.features = torch.cat([self.features, features])
        self.state = _each(lambda *tensors: torch.cat(tensors), self.state, state)
        self.grown = True
        return torch.arange(first, len(self.features), device=rows.device)

    def keep(self, rows: Tensor) -> Tensor:
        """Forget all other rows; where these are now."""
        if not self.grown:
            return rows
        kept, renamed = rows.unique(return_inverse=True)
        self.features, self.state = self.features[kept], _each(lambda tensor: tensor[kept], self.state)
        self.grown = False
        return renamed  # type: ignore[no-any-return]


def _each(function: Callable[..., Any], *nests: Any) -> Any:
    """Apply a function to the tensors of nests that are made alike."""
    first = nests[0]
    if all(isinstance(nest, Tensor) for nest in nests):
        return function(*nests)
    if all(nest is None for nest in nests):
        return None
    if all(isinstance(nest, dict) and nest.keys() == first.keys() for nest in nests):
        return {key: _each(function, *(nest[key] for nest in nests)) for key in first}
    if isinstance(first, (tuple, list)) and all(type(nest) is type(first) and len(nest) == len(first) for nest in nests):
        parts = [_each(function, *each) for each in zip(*nests, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    raise TypeError(
        "predictor: expected a state of tensors, or tuples, lists and dicts of them, made alike in every call, got "
        + " and ".join(type(nest).__name__ for nest in nests)
    )
