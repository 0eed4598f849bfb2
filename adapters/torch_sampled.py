"""PyTorch: sampled softmax (arXiv 2203.16868): the classes that a loss is normalised over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss import output_layer, sampling
from transducer_loss.adapters.torch_autograd import caller, core_arguments, plain, tensor_of
from transducer_loss.classes import Classes, expect_classes


def sample_classes(
    targets: Any,
    target_lengths: Any,
    *,
    vocab_size: int,
    num_samples: int,
    proposal: str = "uniform",
    scope: str = "batch",
    counts: Any = None,
    ctc_logits: Tensor | None = None,
    ctc_lengths: Any = None,
    blank: int = 0,
    correction: bool = False,
    seed: int | None = None,
    step: int = 0,
    validate: bool = False,
) -> Classes:
    """Classes for a sampled softmax: `transducer_loss.sample_classes`, on the caller's stream and memory.

    Parameters
    ----------
    targets : (B, U) tensor of int
    target_lengths : (B,) tensor or list of int
    seed : int, optional
        Drawn from torch's generator where it is None: data-parallel workers whose generators differ draw different classes,
        and their averaged gradients see more of the vocabulary.
    ctc_logits : (B, T, V) tensor, optional
        Not part of the graph: train the head by ``torch.nn.functional.ctc_loss`` on the same logits.
    vocab_size, num_samples, proposal, scope, counts, ctc_lengths, blank, correction, step, validate
        As of `transducer_loss.sample_classes`.

    Returns
    -------
    Classes
        For ``classes=`` of `joint_rnnt_loss`, `JointRNNTLoss` and `PrunedRNNTLoss`.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import joint_rnnt_loss, sample_classes
    >>> encoder, predictor = torch.randn(2, 30, 16, requires_grad=True), torch.randn(2, 8, 16)
    >>> output = torch.nn.Linear(16, 5000)
    >>> targets = torch.randint(1, 5000, (2, 7))
    >>> classes = sample_classes(targets, [7, 4], vocab_size=5000, num_samples=100)
    >>> loss = joint_rnnt_loss(
    ...     encoder, predictor, output.weight, output.bias, targets, [30, 21], [7, 4], classes=classes
    ... )
    >>> loss.backward()
    """
    if seed is None:
        seed = int(torch.randint(1 << 62, ()).item())
    options = {
        "vocab_size": vocab_size, "num_samples": num_samples, "proposal": proposal, "scope": scope, "counts": plain(counts),
        "ctc_logits": plain(ctc_logits), "ctc_lengths": plain(ctc_lengths), "blank": blank, "correction": correction,
        "seed": seed, "step": step, "validate": validate,
    }  # fmt: skip
    tensors = [value for value in (ctc_logits, counts, targets) if isinstance(value, Tensor)]
    on_device = [tensor for tensor in tensors if tensor.device.type != "cpu"] or tensors
    if not on_device:
        return sampling.draw(plain(targets), plain(target_lengths), **options, threads=torch.get_num_threads())
    with caller(on_device[0]):
        return sampling.draw(plain(targets), plain(target_lengths), **options, **core_arguments(on_device[0]))


def labels_in(classes: Classes, targets: Any, target_lengths: Any, *, validate: bool = False) -> Tensor:
    """Labels (B, U) as positions among the sampled classes, for losses of logits over these alone.

    Parameters
    ----------
    classes : Classes
    targets : (B, U) tensor of int
    target_lengths : (B,) tensor or list of int
    validate : bool
        Also check what is on a device, which synchronises.

    Returns
    -------
    (B, max U_b) tensor of int32
        The blank is class 0 there. -1 past the last label, and for a label on a device that is not among the classes.

    Examples
    --------
    >>> import torch
    >>> from transducer_loss.adapters.torch import Classes, labels_in
    >>> labels_in(Classes.from_ids([0, 4, 7, 9], vocab_size=10), torch.tensor([[7, 4]]), [2])
    tensor([[2, 1]], dtype=torch.int32)
    """
    expect_classes(classes)
    # A device is where either of the two is on one.
    where = targets if isinstance(targets, Tensor) and targets.device.type != "cpu" else tensor_of(classes.ids)
    with caller(where):
        return tensor_of(
            output_layer.found_in(classes, plain(targets), plain(target_lengths), validate, **core_arguments(where))
        )
