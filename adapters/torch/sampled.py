"""PyTorch: sampled softmax (arXiv 2203.16868): the classes that a loss is normalised over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transducer_loss import output_layer, sampling
from transducer_loss.adapters.torch.operators import (
    as_tensor,
    caller,
    class_tensors,
    classes_of,
    core_arguments,
    operator,
    plain,
    recorded,
    seed_tensor,
    tensor_of,
)
from transducer_loss.arrays import as_array
from transducer_loss.checks import blank_class, integers
from transducer_loss.classes import Classes


def _drawn(targets: Any, lengths: Any, counts: Any, ctc_logits: Any, ctc_lengths: Any, seed: Any, **options: Any) -> Classes:
    """Classes by the core, on the stream and in the memory of whichever argument is on a device."""
    options |= {"counts": plain(counts), "ctc_logits": plain(ctc_logits), "ctc_lengths": plain(ctc_lengths), "seed": int(seed)}
    tensors = [value for value in (ctc_logits, counts, targets) if isinstance(value, Tensor)]
    on_device = [tensor for tensor in tensors if tensor.device.type != "cpu"] or tensors
    if not on_device:
        return sampling.draw(plain(targets), plain(lengths), **options, threads=torch.get_num_threads())
    with caller(on_device[0]):
        return sampling.draw(plain(targets), plain(lengths), **options, **core_arguments(on_device[0]))


def _classes_shapes(
    targets: Tensor, lengths: Tensor, counts: Tensor | None, ctc_logits: Tensor | None, ctc_lengths: Tensor | None,
    seed: Tensor, *, vocab_size: int, num_samples: int, scope: str, **options: Any,
) -> list[Tensor]:  # fmt: skip
    batch, columns = targets.shape
    each = scope == "utterance"
    slots = torch.sym_min(vocab_size, 1 + (columns if each else batch * columns) + num_samples)
    # On the device of the logits; else on that of counts or targets, if one is on a device.
    given = [ctc_logits] if ctc_logits is not None else [tensor for tensor in (counts, targets) if tensor is not None]
    where = next((tensor.device for tensor in given if tensor.device.type != "cpu"), torch.device("cpu"))
    shape = (batch, slots) if each else (slots,)
    return [torch.empty(shape, dtype=kind, device=where) for kind in (torch.int32, torch.float32)]


@operator(
    "sample_classes(Tensor targets, Tensor target_lengths, Tensor? counts, Tensor? ctc_logits, Tensor? ctc_lengths, "
    "Tensor seed, *, SymInt vocab_size, SymInt num_samples, str proposal, str scope, int blank, bool correction, SymInt step, "
    "bool validate) -> Tensor[]",
    _classes_shapes,
)
def _class_tensors(*arguments: Any, **options: Any) -> list[Tensor]:
    classes = _drawn(*arguments, **options)
    return [tensor_of(classes.ids), tensor_of(classes.probability)]


@operator(
    "labels_in(Tensor targets, Tensor target_lengths, Tensor[] classes, SymInt[] described, bool validate) "
    "-> Tensor",
    lambda targets, *arguments: targets.new_empty((targets.shape[0], torch.sym_max(targets.shape[1], 1)), dtype=torch.int32),
    padded=True,
)
def _labels(
    targets: Tensor, lengths: Tensor, classes: list[Tensor], described: list[int], validate: bool, *, padded: bool = False
) -> Tensor:
    # A device is where either of the two is on one.
    where = targets if targets.device.type != "cpu" else classes[0]
    with caller(where):
        sampled = classes_of(classes, described)
        found = tensor_of(output_layer.found_in(sampled, targets, lengths, validate, **core_arguments(where)))
    return torch.nn.functional.pad(found, (0, max(targets.shape[1], 1) - found.shape[1]), value=-1) if padded else found


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
    drawn = seed_tensor(seed)
    options = {
        "vocab_size": vocab_size, "num_samples": num_samples, "proposal": proposal, "scope": scope, "blank": blank,
        "correction": correction, "step": step, "validate": validate,
    }  # fmt: skip
    if not recorded(ctc_logits, counts, targets):
        return _drawn(targets, target_lengths, counts, ctc_logits, ctc_lengths, drawn, **options)
    optional = (("counts", counts, as_array), ("ctc_logits", ctc_logits, as_array), ("ctc_lengths", ctc_lengths, integers))
    ids, probability = _class_tensors(
        as_tensor(targets, "targets"), as_tensor(target_lengths, "target_lengths"),
        *(None if value is None else as_tensor(value, name, read) for name, value, read in optional),
        drawn, **options,
    )  # fmt: skip
    return Classes(ids, probability, vocab_size, blank_class(blank, vocab_size), correction)


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
    tensors, described = class_tensors(classes)
    return _labels(  # type: ignore[no-any-return]
        as_tensor(targets, "targets"), as_tensor(target_lengths, "target_lengths"), tensors, described, validate
    )
