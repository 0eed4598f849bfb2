"""NeMo's transducer losses by their own names, their resolver patched on request, and the joint fused with the loss.

A recipe adds two lines after its imports, and keeps its configuration::

    +from transducer_loss.adapters.compat import nemo as tl_nemo
    +tl_nemo.install()                                   # loss_name: default, warprnnt_numba

Memory is spent in the joint. Where the recipe sets ``joint.fuse_loss_wer: true``, one line more and no logits are made::

    +model.joint = tl_nemo.FusedJoint(model.joint)

NeMo's habits, kept:

- with FastEmit the reported cost is (1 + lambda) times the negative log-likelihood, while the gradient is FastEmit's: that of
  the label arcs times (1 + lambda), not everything;
- `RNNTLossNumba` reduces ``"mean"`` over the batch, whatever its docstring says, and ``"mean"`` and ``"sum"`` to shape (1,);
  None is none. `RNNTLoss` has ``"mean_batch"`` for that, ``"mean"`` for the mean of loss over target length (inf for U = 0) and
  ``"mean_volume"`` for the sum of losses over that of lengths. Both read `reduction` at each call: NeMo changes it there;
- `clamp` bounds each element of the gradient before upstream and reduction scale it, as NeMo's CUDA path does (its CPU path
  clamps afterwards); 0 and below is off.

What differs: `acts` may be log-probabilities or logits on every device, may have strides, half types, more than 2^31 elements
and more padding than the longest utterance; integers may be int32 and lie on the host; a target equal to blank gets the right
gradient.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters import torch as losses
from transducer_loss.adapters.compat.nemo_joint import FusedJoint, reported
from transducer_loss.adapters.compat.shared import bound_of, named
from transducer_loss.checks import choice

__all__ = ["FusedJoint", "RNNTLoss", "RNNTLossNumba", "install", "uninstall"]

_REDUCTIONS = ("mean_batch", "mean", "mean_volume", "sum", "none")


def _resolver() -> Any:
    return importlib.import_module("nemo.collections.asr.losses.rnnt")


class RNNTLossNumba(torch.nn.Module):
    """Loss with NeMo's inner call convention, as ``nemo.collections.asr.parts.numba.rnnt_loss.RNNTLossNumba``.

    Parameters
    ----------
    blank : int
    reduction : {"mean", "sum", "none"} or None
        Read at each call.
    fastemit_lambda : float
        FastEmit (arXiv 2010.11148).
    clamp : float
        Bound of each element of the gradient; 0 and below is none.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.compat.nemo import RNNTLossNumba
    >>> loss, lengths = RNNTLossNumba(blank=4, fastemit_lambda=1.0), torch.tensor([4])
    >>> loss(acts=torch.zeros(1, 4, 3, 5), labels=torch.tensor([[1, 2]]), act_lens=lengths, label_lens=torch.tensor([2]))
    tensor([14.7081])
    """

    def __init__(
        self, blank: int = 0, reduction: str | None = "mean", fastemit_lambda: float = 0.0, clamp: float = -1
    ) -> None:
        super().__init__()
        self.blank, self.reduction, self.fastemit_lambda = blank, reduction, fastemit_lambda
        self.clamp = bound_of(clamp)

    @named(logits="acts", targets="labels", logit_lengths="act_lens", target_lengths="label_lens")
    def forward(self, acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
        """Acts (B, T, U+1, V), labels (B, U), lengths (B,): loss (1,) or (B,)."""
        loss = losses.rnnt_loss(
            acts, labels, act_lens, label_lens, blank=self.blank, fastemit_lambda=self.fastemit_lambda, clamp=self.clamp,
            reduction="none" if self.reduction is None else self.reduction,
        )  # fmt: skip
        return reported(loss.reshape(-1), self.fastemit_lambda)


class RNNTLoss(torch.nn.Module):
    """Loss with NeMo's outer call convention, as ``nemo.collections.asr.losses.rnnt.RNNTLoss``.

    Parameters
    ----------
    num_classes : int
        Labels without the blank, which is the class of that number.
    reduction : {"mean_batch", "mean", "mean_volume", "sum", "none"} or None
        Read at each call.
    loss_name : {"default", "warprnnt_numba", "warprnnt", "pytorch", "transducer_loss"}
        All the same loss.
    loss_kwargs : dict, optional
        `fastemit_lambda` and `clamp` of `RNNTLossNumba`.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.compat.nemo import RNNTLoss
    >>> loss, logits = RNNTLoss(num_classes=4, reduction="mean_volume"), torch.zeros(1, 4, 3, 5)
    >>> frames, labels = torch.tensor([4]), torch.tensor([2])
    >>> loss(log_probs=logits, targets=torch.tensor([[1, 2]]), input_lengths=frames, target_lengths=labels)
    tensor(3.6770)
    """

    def __init__(
        self, num_classes: int, reduction: str | None = "mean_batch", loss_name: str = "default", loss_kwargs: Any = None
    ) -> None:
        super().__init__()
        choice("none" if reduction is None else reduction, _REDUCTIONS, "reduction")
        choice(loss_name, ("default", "warprnnt_numba", "warprnnt", "pytorch", "transducer_loss"), "loss_name")
        self._blank, self.reduction = num_classes, reduction
        self._loss = RNNTLossNumba(num_classes, None, **(loss_kwargs or {}))

    def reduce(self, losses: Any, target_lengths: Any) -> Tensor:
        """Losses (B,) and lengths (B,), or lists of such parts of a batch."""
        if isinstance(losses, list):
            losses, target_lengths = torch.cat(losses), torch.cat(target_lengths)
        target_lengths = torch.as_tensor(target_lengths).to(losses.device)
        reduction = "none" if self.reduction is None else self.reduction
        choice(reduction, _REDUCTIONS, "reduction")
        if reduction == "mean_batch":
            losses = losses.mean()
        if reduction == "mean":
            losses = (losses / target_lengths).mean()
        if reduction == "mean_volume":
            losses = losses.sum() / target_lengths.sum()
        if reduction == "sum":
            losses = losses.sum()
        return losses  # type: ignore[no-any-return]

    @named(acts="log_probs", labels="targets", act_lens="input_lengths", label_lens="target_lengths")
    def forward(self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor) -> Tensor:
        """Logits (B, T, U+1, V), targets (B, U), lengths (B,): scalar, or (B,)."""
        return self.reduce(self._loss(log_probs, targets, input_lengths, target_lengths), target_lengths)


def install(*names: str) -> None:
    """Make NeMo resolve these loss names, and ``"transducer_loss"``, to `RNNTLossNumba`; `uninstall` undoes it.

    It changes ``nemo.collections.asr.losses.rnnt``: `resolve_rnnt_loss` is replaced, so that numba is not needed, and the
    entries of `RNNT_LOSS_RESOLVER` no longer ask for float32 logits. Models that are made afterwards have our loss;
    configurations, such as ``warprnnt_numba_kwargs``, are read as before. Any other loss (multi-blank, TDT, k2's graphs) stays
    NeMo's own.

    Parameters
    ----------
    *names : str
        ``"warprnnt_numba"`` by default, which NeMo's ``"default"`` stands for.

    Examples
    --------
    ::

        from transducer_loss.adapters.compat import nemo as tl_nemo
        tl_nemo.install()
        model = nemo_asr.models.EncDecRNNTBPEModel(cfg=cfg.model, trainer=trainer)
    """
    names = names or ("warprnnt_numba",)
    for name in names:
        choice(name, ("warprnnt_numba", "warprnnt", "pytorch"), "names")
    rnnt = _resolver()
    uninstall()
    original, table = rnnt.resolve_rnnt_loss, rnnt.RNNT_LOSS_RESOLVER
    before = {name: (entry, dict(vars(entry))) for name, entry in table.items()}
    table["transducer_loss"] = rnnt.RNNTLossConfig("transducer_loss", "torch")
    for entry in (table[name] for name in (*names, "transducer_loss")):
        entry.is_available, entry.force_float32 = True, False

    def resolve_rnnt_loss(loss_name: str, blank_idx: int, loss_kwargs: Any = None) -> torch.nn.Module:
        name = table["default"].loss_name if loss_name == "default" else loss_name
        if name not in (*names, "transducer_loss"):
            return original(loss_name, blank_idx, loss_kwargs)  # type: ignore[no-any-return]
        options = dict(loss_kwargs or {})
        known = {key: options.pop(key) for key in ("fastemit_lambda", "clamp") if key in options}
        rnnt._warn_unused_additional_kwargs(name, options)
        return RNNTLossNumba(blank_idx, "none", **known)

    rnnt.resolve_rnnt_loss = resolve_rnnt_loss
    rnnt.resolve_rnnt_loss.before = original, before


def uninstall() -> None:
    """Undo `install`; nothing where there was none. Models that were made in between keep their loss."""
    rnnt = _resolver()
    if hasattr(rnnt.resolve_rnnt_loss, "before"):
        rnnt.resolve_rnnt_loss, before = rnnt.resolve_rnnt_loss.before
        del rnnt.RNNT_LOSS_RESOLVER["transducer_loss"]
        for entry, values in before.values():
            vars(entry).clear()
            vars(entry).update(values)
