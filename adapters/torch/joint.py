"""PyTorch: the loss fused with the joint network, as a function and as a module that owns the output layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss.adapters.torch.autograd import REDUCTIONS, expect_options, wants_gradient
from transducer_loss.adapters.torch.joint_autograd import How, JointLoss
from transducer_loss.adapters.torch.operators import (
    as_tensor,
    band_tensors,
    class_tensors,
    constants,
    expect_tensor,
    recorded,
    seed_tensor,
    uncompiled,
)
from transducer_loss.adapters.torch.parallel import shard_of
from transducer_loss.band import Band
from transducer_loss.checks import choice
from transducer_loss.classes import Classes

_parallel_loss = uncompiled(JointLoss.apply, "process_group= exchanges arrays in the middle of the loss: leave it out")
_sparse_loss = uncompiled(JointLoss.apply, "sparse=True makes sparse gradients, which torch.compile cannot: leave it out")


def joint_rnnt_loss(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Any,
    encoder_lengths: Any,
    target_lengths: Any,
    *,
    activation: str = "tanh",
    encoder_index: Any = None,
    blank: int = 0,
    reduction: str = "mean",
    topology: str = "regular",
    band: Band | None = None,
    classes: Classes | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    hat: bool = False,
    infeasible: str = "inf",
    workspace: int | str | None = None,
    occupancy_floor: float = 1e-6,
    sparse: bool = False,
    process_group: Any = None,
    validate: bool = False,
) -> Tensor:
    """Transducer loss fused with the joint network, with autograd, in bounded memory.

    Parameters
    ----------
    encoder : (B, T, H) tensor
        With `encoder_index` (E, T, H).
    predictor : (B, U+1, H) tensor
    weight : (V, H) tensor
        Of the output layer, as ``torch.nn.Linear(H, V).weight``.
    bias : (V,) tensor or None
    targets, encoder_lengths, target_lengths
        As of `rnnt_loss`.
    encoder_index : (B,) tensor or list of int, optional
        Where utterances share encoders, as the hypotheses of an N-best list do: utterance b reads ``encoder[i]``, of
        ``encoder_lengths[i]`` frames, for ``i = encoder_index[b]``. On the host it costs no synchronisation.
    reduction : {"mean", "sum", "none"}
        "mean" is the mean over the batch: the predictor's B. Scalar reductions make the gradients together with the loss.
    seed : int, optional
        Of the dropout; drawn from torch's generator where it is None.
    band : Band, optional
        As `prune` returns it: only its cells are ever projected.
    classes : Classes, optional
        As `sample_classes` returns them: only their rows of weight and bias are read.
    sparse : bool
        With `classes`, make the gradients of weight and bias sparse tensors, as ``torch.nn.Embedding(sparse=True)`` does: K
        rows, or B K with classes per utterance. ``SGD``, ``Adagrad`` and ``SparseAdam`` take them, without weight decay. Not in
        a graph of `torch.compile`.
    process_group : torch.distributed.ProcessGroup or transducer_loss.Shard, optional
        Vocabulary-parallel: `weight` and `bias` are the rows of this process, in the order of the group's ranks, and so are
        their gradients. Everything else is to be the same in every process; loss and gradients of encoder and predictor
        are. The processes tell each other their numbers of rows in every call, unless a `Shard` knows them, and take the seed
        of the first.
    workspace : int or str, optional
        Bytes, as of `transducer_loss.joint_rnnt_loss`, or "auto": on a CUDA device a quarter of the memory that is free at the
        first such call, rounded down to a power of two, from 256 MiB to 8 GiB, and the same from then on (`auto_workspace`
        tells it, `reset_auto_workspace` lets go of it); on the CPU 256 MiB. Not with `process_group`.
    activation, dropout, occupancy_floor and the others
        As of `transducer_loss.joint_rnnt_loss`.

    Returns
    -------
    Tensor
        Scalar, or (B,): float32, or float64 for float64 inputs. Under autocast all inputs but float64 ones are brought to
        autocast's dtype, the whole weight, too.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import joint_rnnt_loss
    >>> encoder, predictor = torch.randn(2, 30, 16, requires_grad=True), torch.randn(2, 8, 16)
    >>> output = torch.nn.Linear(16, 50)
    >>> targets = torch.randint(1, 50, (2, 7))
    >>> loss = joint_rnnt_loss(encoder, predictor, output.weight, output.bias, targets, [30, 21], [7, 4])
    >>> loss.backward()
    """
    choice(reduction, REDUCTIONS, "reduction")
    tensors = {"encoder": encoder, "predictor": predictor, "weight": weight, **({} if bias is None else {"bias": bias})}
    for name, tensor in tensors.items():
        expect_tensor(tensor, name)
    if recorded(encoder) and workspace is not None:
        workspace = str(workspace)
    drawn, parallel = seed_tensor(seed if dropout else seed or 0), {}
    if process_group is not None:
        if workspace == "auto":
            raise ValueError(
                "workspace: expected bytes, the same in every process of process_group, got 'auto', which may differ in each"
            )
        parallel["shard"], drawn = shard_of(process_group, weight.shape[0], drawn, encoder.device)
    options = {
        "activation": activation, "blank": blank, "topology": topology, "dropout": dropout, "sparse": sparse,
        "fastemit_lambda": fastemit_lambda, "delay_penalty": delay_penalty, "hat": hat, "infeasible": infeasible,
        "workspace": workspace, "occupancy_floor": occupancy_floor, "validate": validate, **parallel,
    }  # fmt: skip
    integers = (
        as_tensor(targets, "targets"), as_tensor(encoder_lengths, "encoder_lengths"),
        as_tensor(target_lengths, "target_lengths"),
        None if encoder_index is None else as_tensor(encoder_index, "encoder_index"),
    )  # fmt: skip
    rows, (sampled, described) = band_tensors(band), class_tensors(classes)
    apply = _parallel_loss if parallel else _sparse_loss if sparse else JointLoss.apply
    later = "later" if reduction == "none" else reduction
    gradient = later if wants_gradient(encoder, predictor, weight, bias) else "none"
    how = How(reduction, gradient, len(rows), described, constants(options))
    loss: Tensor = apply(encoder, predictor, weight, bias, how, *integers, drawn, *rows, *sampled)
    return loss


class JointRNNTLoss(torch.nn.Module):
    """`joint_rnnt_loss` with its output layer (`weight`, `bias`) as parameters. Dropout acts in training mode only.

    Parameters
    ----------
    features, classes : int
        H and V.
    bias : bool
    dropout : float
    sparse : bool
        Of the gradients of the output layer, in calls with `classes`.
    device, dtype
        Of the parameters, as of `torch.nn.Linear`.
    **options
        Keywords of `joint_rnnt_loss`. With ``process_group=`` `classes` is the number of this process's classes.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import JointRNNTLoss
    >>> loss = JointRNNTLoss(16, 50, dropout=0.1, activation="relu")
    >>> loss(torch.randn(2, 30, 16), torch.randn(2, 8, 16), torch.randint(1, 50, (2, 7)), [30, 21], [7, 4]).backward()
    >>> loss.output.weight.grad.shape
    torch.Size([50, 16])
    """

    def __init__(
        self, features: int, classes: int, *, bias: bool = True, dropout: float = 0.0, sparse: bool = False,
        device: Any = None, dtype: torch.dtype | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        expect_options(joint_rnnt_loss, {"dropout": dropout, **options}, "band", "classes", "encoder_index")
        self.output = torch.nn.Linear(features, classes, bias=bias, device=device, dtype=dtype)
        self.dropout, self.sparse, self.options = dropout, sparse, options

    def forward(
        self, encoder: Tensor, predictor: Tensor, targets: Any, encoder_lengths: Any, target_lengths: Any, *,
        band: Band | None = None, classes: Classes | None = None, encoder_index: Any = None,
    ) -> Tensor:  # fmt: skip
        """See `joint_rnnt_loss`; `band`, `classes` and `encoder_index` are of this batch."""
        return joint_rnnt_loss(
            encoder, predictor, self.output.weight, self.output.bias, targets, encoder_lengths, target_lengths,
            band=band, classes=classes, encoder_index=encoder_index, dropout=self.dropout if self.training else 0.0,
            sparse=self.sparse and classes is not None, **self.options,
        )  # fmt: skip
