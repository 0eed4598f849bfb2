"""A stand-in for the parts of NeMo that `transducer_loss.adapters.compat.nemo` touches, made after its public interface.

Its losses are the naive ones of the tests, so that whatever it computes by itself can be compared with. It is not NeMo.
"""

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from naive_torch import naive_rnnt_loss


class RNNTLossPytorch(torch.nn.Module):
    """For ``acts=, labels=, act_lens=, label_lens=``; the blank is the last class; no reduction."""

    def __init__(self, blank: int, reduction: str | None = "none", fastemit_lambda: float = 0.0, clamp: float = -1.0) -> None:
        super().__init__()
        self.blank, self.reduction, self.fastemit_lambda, self.clamp = blank, reduction, fastemit_lambda, clamp

    def forward(self, acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
        assert self.reduction is None, "the outer loss reduces"
        assert acts.shape[1] == act_lens.max()
        assert acts.shape[2] == label_lens.max() + 1
        first = torch.cat([acts[..., -1:], acts[..., :-1]], -1)  # the naive loss has its blank first
        return naive_rnnt_loss(first, labels + 1, act_lens.tolist(), label_lens.tolist())


class TDTLossPytorch(RNNTLossPytorch):
    """Of another distribution."""


class GraphWTransducerLoss(RNNTLossPytorch):
    """Of other paths, with no attribute that would say so."""


@dataclasses.dataclass
class RNNTLossConfig:
    loss_name: str
    lib_name: str
    is_available: bool = False
    installation_msg: str = ""
    min_version: str | None = None
    force_float32: bool = True


@dataclasses.dataclass
class OldConfig:
    """Of versions that had no `force_float32`."""

    loss_name: str
    lib_name: str
    is_available: bool = False
    installation_msg: str = ""
    min_version: str | None = None


def losses_rnnt(config: Any = RNNTLossConfig) -> Any:
    """``nemo.collections.asr.losses.rnnt`` of a machine without numba."""
    module: Any = types.ModuleType("nemo.collections.asr.losses.rnnt")
    table = {
        "warprnnt": config("warprnnt", "warprnnt_pytorch"),
        "warprnnt_numba": config("warprnnt_numba", "numba", min_version="0.53.0"),
        "pytorch": config("pytorch", "torch", True, min_version="0.0"),
        "multiblank_rnnt_pytorch": config("pytorch", "torch", True, min_version="0.0"),
        "tdt_pytorch": config("tdt_pytorch", "torch", True),
        "graph_w_transducer": config("graph_w_transducer", "k2", True),
    }
    table["default"] = table["warprnnt_numba"]
    module.warned = []

    def warn(name: str, options: dict[str, Any]) -> None:
        if options:
            module.warned.append((name, options))

    def resolve_rnnt_loss(loss_name: str, blank_idx: int, loss_kwargs: Any = None) -> torch.nn.Module:
        if loss_name not in table:
            raise ValueError(f"{loss_name} is no loss")
        if not table[loss_name].is_available:
            raise ImportError(table[loss_name].installation_msg)
        kinds = {"tdt_pytorch": TDTLossPytorch, "graph_w_transducer": GraphWTransducerLoss}
        return kinds.get(loss_name, RNNTLossPytorch)(blank_idx, **dict(loss_kwargs or {}))

    class RNNTLoss(torch.nn.Module):
        def __init__(self, num_classes: int, reduction: str | None = "mean_batch", loss_name: str = "default", loss_kwargs: Any = None) -> None:
            super().__init__()
            self._blank, self.reduction = num_classes, reduction
            self._loss = module.resolve_rnnt_loss(loss_name, blank_idx=num_classes, loss_kwargs=loss_kwargs)
            self._force_float32 = getattr(table[loss_name], "force_float32", True)

        def reduce(self, losses: Any, target_lengths: Any) -> Tensor:
            if isinstance(losses, list):
                losses, target_lengths = torch.cat(losses, 0), torch.cat(target_lengths, 0)
            if self.reduction == "mean_batch":
                return losses.mean()
            if self.reduction == "mean":
                return torch.div(losses, target_lengths).mean()
            if self.reduction == "sum":
                return losses.sum()
            return losses.sum() / target_lengths.sum() if self.reduction == "mean_volume" else losses

        def forward(self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor) -> Tensor:
            if self._force_float32 and log_probs.dtype != torch.float64:
                log_probs = log_probs.float()
            log_probs = log_probs[:, : int(input_lengths.max())].contiguous()
            targets = targets.long()[:, : int(target_lengths.max())].contiguous()
            kept, self._loss.reduction = self._loss.reduction, None
            loss = self._loss(acts=log_probs, labels=targets, act_lens=input_lengths.long(), label_lens=target_lengths.long())
            self._loss.reduction = kept
            return self.reduce(loss, target_lengths) if self.reduction is not None else loss

    module.RNNTLossConfig, module.RNNT_LOSS_RESOLVER, module.RNNTLoss = config, table, RNNTLoss
    module.resolve_rnnt_loss, module._warn_unused_additional_kwargs = resolve_rnnt_loss, warn
    return module


class RNNTJoint(torch.nn.Module):
    """Joint with NeMo's names of parameters and its fused step, batch part by batch part."""

    def __init__(
        self, encoder: int, predictor: int, hidden: int, classes: int, activation: torch.nn.Module, dropout: float = 0.0, fused: int | None = None,
        num_extra_outputs: int = 0, masking_prob: float = -1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.enc, self.pred = torch.nn.Linear(encoder, hidden), torch.nn.Linear(predictor, hidden)
        layers = [activation, *([torch.nn.Dropout(dropout)] if dropout else []), torch.nn.Linear(hidden, classes + 1 + num_extra_outputs)]
        self.joint_net = torch.nn.Sequential(*layers)
        self._fuse_loss_wer, self._fused_batch_size = fused is not None, fused
        self._loss = self._wer = None
        self.temperature = 1.0
        self.num_extra_outputs, self.masking_prob, self.adapters = num_extra_outputs, masking_prob, False
        self.num_classes_with_blank = classes + 1

    def is_adapter_available(self) -> bool:
        return self.adapters

    @property
    def loss(self) -> Any:
        return self._loss

    def set_loss(self, loss: Any) -> None:
        if not self._fuse_loss_wer:
            raise ValueError("a loss without fuse_loss_wer")
        self._loss = loss

    @property
    def wer(self) -> Any:
        return self._wer

    def set_wer(self, wer: Any) -> None:
        if not self._fuse_loss_wer:
            raise ValueError("a metric without fuse_loss_wer")
        self._wer = wer

    @property
    def fuse_loss_wer(self) -> bool:
        return self._fuse_loss_wer

    def set_fuse_loss_wer(self, fused: bool, loss: Any = None, metric: Any = None) -> None:
        self._fuse_loss_wer, self._loss, self._wer = fused, loss, metric

    @property
    def fused_batch_size(self) -> bool:
        return self._fuse_loss_wer  # what NeMo returns

    def set_fused_batch_size(self, size: int) -> None:
        self._fused_batch_size = size

    def project_encoder(self, encoder_output: Tensor) -> Tensor:
        return self.enc(encoder_output)

    def joint(self, f: Tensor, g: Tensor) -> Tensor:
        return self.joint_net(self.enc(f)[:, :, None] + self.pred(g)[:, None])

    def forward(
        self, encoder_outputs: Tensor, decoder_outputs: Tensor | None, encoder_lengths: Any = None, transcripts: Any = None,
        transcript_lengths: Any = None, compute_wer: bool = False, keep_hypotheses: bool = False,
    ) -> Any:  # fmt: skip
        encoder = encoder_outputs.transpose(1, 2)
        if not self.fuse_loss_wer:
            return self.joint(encoder, decoder_outputs.transpose(1, 2))
        if self.loss is None or self.wer is None:
            raise ValueError("fuse_loss_wer without loss and wer")
        losses, lengths, wers = [], [], []
        for begin in range(0, len(encoder), self._fused_batch_size):
            part = slice(begin, begin + self._fused_batch_size)
            frames, labels, targets = encoder_lengths[part], transcript_lengths[part], transcripts[part]
            T, U = int(frames.max()), int(labels.max())
            if decoder_outputs is not None:
                logits = self.joint(encoder[part, :T], decoder_outputs.transpose(1, 2)[part, : U + 1])
                kept, self.loss.reduction = self.loss.reduction, None
                losses.append(self.loss(log_probs=logits, targets=targets[:, :U], input_lengths=frames, target_lengths=labels))
                lengths.append(labels)
                self.loss.reduction = kept
            if compute_wer:
                wers.append(self.wer(encoder[part].detach(), frames, targets, labels, keep_hypotheses))
        loss = self.loss.reduce(losses, lengths) if losses else None
        if not compute_wer:
            return loss, None, None, None
        return loss, sum(wer / of for wer, of in wers) / len(wers), sum(wer for wer, _ in wers), sum(of for _, of in wers)


class SampledRNNTJoint(RNNTJoint):
    """Of a few classes in training."""


def installed(monkeypatch: pytest.MonkeyPatch, config: Any = RNNTLossConfig) -> Any:
    """Put a fresh stand-in into sys.modules; the module of its losses."""
    names = ("nemo", "nemo.collections", "nemo.collections.asr", "nemo.collections.asr.losses")
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    module = losses_rnnt(config)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules[names[-1]].rnnt = module  # type: ignore[attr-defined]
    return module


