"""warp-rnnt's loss by its own names: published vectors, and its gathered, packed and averaged forms."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from compat_cases import every_vector, expect_vector, of_core, padded_case, spied
from naive_torch import DTYPES, WEIGHTS, Case, case, leaves, same
from transducer_loss import reference
from transducer_loss.adapters.compat.warp_rnnt import rnnt_loss


def packed(x: Tensor, of: Case) -> Tensor:
    """(cells, C) of the real cells of (B, T, U + 1, C)."""
    return torch.cat([x[b, :T, : U + 1].reshape(-1, x.shape[-1]) for b, (T, U) in enumerate(zip(of.frames, of.labels, strict=True))])


def in_a_row(of: Case) -> Tensor:
    return torch.cat([of.targets[b, :U] for b, U in enumerate(of.labels)])


def gathered(log_probs: Tensor, of: Case, blank: int) -> Tensor:
    """Blank and label of each cell (B, T, U + 1, 2); the last column has no label."""
    labels = torch.nn.functional.pad(of.targets.clamp(min=0), (0, 1))
    index = torch.stack([torch.full_like(labels, blank), labels], -1)[:, None].expand(-1, log_probs.shape[1], -1, -1)
    return log_probs.gather(-1, index)


def normalised(of: Case) -> Tensor:
    return of.logits.log_softmax(-1)


@pytest.mark.parametrize("compact", [False, True])
@every_vector
def test_vectors(vector: dict[str, Any], compact: bool) -> None:
    options = {"blank": vector["blank"], "fastemit_lambda": vector.get("fastemit_lambda", 0.0)}
    if not compact:
        expect_vector(vector, lambda *tensors: rnnt_loss(*tensors, **options), log_probs=True)
        return

    def of_packed(x: Tensor, targets: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
        of = Case(x, (x, x, x, x), targets, frames.tolist(), labels.tolist())
        return rnnt_loss(packed(x, of), in_a_row(of), frames, labels, compact=True, **options)

    expect_vector(vector, of_packed, log_probs=True)


def test_signature() -> None:
    defaults = {
        "average_frames": False, "reduction": None, "blank": 0, "gather": False, "fastemit_lambda": 0.0, "compact": False,
    }  # fmt: skip
    parameters = inspect.signature(rnnt_loss).parameters
    assert list(parameters) == ["log_probs", "labels", "frames_lengths", "labels_lengths", *defaults]
    assert {name: parameters[name].default for name in defaults} == defaults


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather", [False, True])
def test_as_the_core_with_strides_and_padding(dtype: torch.dtype, gather: bool) -> None:
    of, x, targets = padded_case(dtype, log_probs=True)
    loss = rnnt_loss(x, targets, torch.tensor(of.frames), torch.tensor(of.labels), gather=gather, fastemit_lambda=0.5)
    upstream = torch.tensor(WEIGHTS, dtype=loss.dtype)
    first, second = (torch.autograd.grad(loss, x, upstream, retain_graph=True)[0] for _ in range(2))
    assert same((loss, first), of_core(x, of, WEIGHTS, normalized=True, fastemit_lambda=0.5))
    assert torch.equal(first, second)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("average_frames", [False, True])
@pytest.mark.parametrize("reduction", [None, "none", "sum", "mean"])
def test_averages_and_reductions(reduction: str | None, average_frames: bool, compact: bool) -> None:
    of = case()
    weights = torch.tensor([1 / T for T in of.frames] if average_frames else [1.0] * 4, dtype=torch.float64)
    weights = weights / 4 if reduction == "mean" else weights
    exact_loss, exact = reference.rnnt_loss(normalised(of).numpy(), *of.integers, normalized=True, weights=weights.numpy())
    wanted = weights * torch.as_tensor(exact_loss)
    (x,) = leaves(normalised(of))
    frames, labels = torch.tensor(of.frames), torch.tensor(of.labels)
    if compact:
        loss = rnnt_loss(packed(x, of), in_a_row(of), frames, labels, average_frames, reduction, compact=True)
    else:
        loss = rnnt_loss(x, of.targets, frames, labels, average_frames, reduction)
    torch.testing.assert_close(loss, wanted if reduction in (None, "none") else wanted.sum(), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(-2.0 * loss.sum(), x)
    torch.testing.assert_close(gradient, -2.0 * torch.as_tensor(exact), rtol=0, atol=1e-12)


@pytest.mark.parametrize("compact", [False, True])
def test_gathered_by_the_caller(compact: bool) -> None:
    """With blank=-1 labels are not read: they may be anything."""
    of = case()
    blank = 5
    (x,) = leaves(normalised(of))
    exact_loss, exact = reference.rnnt_loss(normalised(of).numpy(), *of.integers, blank=blank, normalized=True, weights=WEIGHTS)
    pairs, nonsense = gathered(x, of, blank), torch.full_like(of.targets, 99)
    if compact:
        nonsense = torch.full_like(in_a_row(of), 99)
    loss = rnnt_loss(packed(pairs, of) if compact else pairs, nonsense, torch.tensor(of.frames), torch.tensor(of.labels), blank=-1, compact=compact)
    torch.testing.assert_close(loss, torch.as_tensor(exact_loss), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, x, torch.tensor(WEIGHTS, dtype=torch.float64))
    torch.testing.assert_close(gradient, torch.as_tensor(exact), rtol=0, atol=1e-12)


@pytest.mark.parametrize("of_labels", [Tensor.tolist, Tensor.numpy])
def test_labels_of_other_kinds_gathered_by_the_caller(of_labels: Any) -> None:
    of = case()
    pairs, labels = gathered(normalised(of), of, 5), of.targets.clamp(min=0)
    wanted, loss = (rnnt_loss(pairs, each, of.frames, of.labels, blank=-1) for each in (labels, of_labels(labels)))
    assert torch.equal(loss, wanted)


@pytest.mark.parametrize("labels", [[0, 0], [0, 2], [1, 0]])
def test_packed_without_labels(labels: list[int]) -> None:
    of = case((3, 2), labels)
    x = leaves(packed(normalised(of), of))[0]
    loss = rnnt_loss(x, in_a_row(of), torch.tensor(of.frames), torch.tensor(labels), compact=True)
    exact, _ = reference.rnnt_loss(normalised(of).numpy(), *of.integers, normalized=True)
    torch.testing.assert_close(loss, torch.as_tensor(exact), rtol=1e-12, atol=0)
    loss.sum().backward()


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    of, x, targets = padded_case(torch.float32, log_probs=True)
    calls = spied(monkeypatch)
    rnnt_loss(x, targets, of.frames, of.labels, gather=True, average_frames=True)
    assert calls[0][0] is x
    assert calls[0][1] is targets


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"reduction": "batch"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'batch'"),
        ({"blank": 13}, ValueError, r"blank: expected a class in \[-13, 13\), got 13"),
        ({"blank": -1}, ValueError, r"log_probs: expected 2 classes .* got shape \(4, 9, 6, 13\)"),
        ({"compact": True}, ValueError, r"labels: expected shape \(sum of labels_lengths,\) = \(12,\), got \(4, 5\)"),
        ({"fastemit_lambda": -1.0}, ValueError, "fastemit_lambda: expected"),
        ({"log_probs": None}, TypeError, "log_probs: expected a torch.Tensor, got NoneType"),
        ({"labels": [1], "compact": True}, TypeError, "labels: expected a torch.Tensor, got list"),
        ({"log_probs": torch.tensor(0.0), "blank": -1}, ValueError, r"log_probs: expected 2 classes .* got shape \(\)"),
        ({"log_probs": torch.zeros(4, 9, 13)}, ValueError, "log_probs: expected 4 dimensions"),
        ({"log_probs": torch.zeros(77, 13), "labels": torch.zeros(12).long(), "compact": True}, ValueError, "log_probs: expected .* got"),
        ({"labels": torch.full((4, 5), 13)}, ValueError, r"labels: expected labels in \[0, V = 13\), got 13"),
        ({"labels": None}, TypeError, "labels: expected .* got NoneType"),
        ({"labels": None, "log_probs": torch.zeros(4, 9, 6, 2), "blank": -1}, TypeError, "labels: expected .* got NoneType"),
        ({"frames_lengths": torch.tensor([10, 2, 7, 4])}, ValueError, r"frames_lengths: expected lengths in \[1, T = 9\], got 10"),
        ({"frames_lengths": torch.ones(4), "compact": True}, TypeError, "frames_lengths: expected integers"),
        ({"labels_lengths": torch.tensor([6, 0, 3, 4])}, ValueError, r"labels_lengths: expected lengths in \[0, U = 5\], got 6"),
        ({"labels_lengths": torch.tensor([5.0, 0, 3, 4]), "compact": True}, TypeError, "labels_lengths: expected integers"),
        ({"labels_lengths": torch.tensor([5, -1, 3, 4]), "compact": True}, ValueError, "labels_lengths: expected lengths .* got -1 at index 1"),
        ({"labels_lengths": torch.tensor([[5, 0], [3, 4]]), "compact": True}, ValueError, r"labels_lengths: expected shape \(B,\) = \(4,\), got \(2, 2\)"),
        ({"labels_lengths": torch.tensor([5, 0, 3]), "compact": True}, ValueError, r"labels_lengths: expected shape \(B,\) = \(4,\), got \(3,\)"),
        ({"labels_lengths": torch.tensor(5), "compact": True}, ValueError, r"labels_lengths: expected shape \(B,\) = \(4,\), got \(\)"),
        ({"labels": torch.tensor(1), "compact": True, "labels_lengths": torch.tensor([1, 0, 0, 0])}, ValueError, r"labels: expected shape .* got \(\)"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    of = case()
    arguments = {
        "log_probs": normalised(of), "labels": of.targets, "frames_lengths": torch.tensor(of.frames), "labels_lengths": torch.tensor(of.labels),
    }  # fmt: skip
    with pytest.raises(kind, match=f"^{message}"):
        rnnt_loss(**{**arguments, **wrong})
