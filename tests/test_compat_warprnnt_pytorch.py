"""warp-transducer's loss by its own names: published vectors, its habits, and those of the fork with FastEmit."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from compat_cases import every_vector, expect_vector, of_core, padded_case, spied
from naive_torch import DTYPES, WEIGHTS, case, leaves, naive_rnnt_loss, same
from transducer_loss import reference
from transducer_loss.adapters.compat.warprnnt_pytorch import RNNTLoss, rnnt_loss

of_each_way = pytest.mark.parametrize("way", ["function", "module"])


def call(way: str, tensors: tuple[Any, ...], **options: Any) -> Tensor:
    return rnnt_loss(*tensors, **options) if way == "function" else RNNTLoss(**options)(*tensors)


@of_each_way
@every_vector
def test_vectors(vector: dict[str, Any], way: str) -> None:
    options = {"blank": vector["blank"], "reduction": "none", "fastemit_lambda": vector.get("fastemit_lambda", 0.0)}
    expect_vector(vector, lambda *tensors: call(way, tensors, **options))
    expect_vector(vector, lambda x, *integers: call(way, (x.log_softmax(-1), *integers), **options))


def test_signatures() -> None:
    positional, defaults = ["acts", "labels", "act_lens", "label_lens"], {"blank": 0, "reduction": "mean", "fastemit_lambda": 0.0}
    for function, before in ((rnnt_loss, positional), (RNNTLoss, [])):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == [*before, *defaults]
        assert {name: parameters[name].default for name in defaults} == defaults
    assert list(inspect.signature(RNNTLoss.forward).parameters)[1:] == positional


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_the_core_with_strides_and_padding(dtype: torch.dtype) -> None:
    of, x, targets = padded_case(dtype)
    loss = rnnt_loss(x, targets, torch.tensor(of.frames), torch.tensor(of.labels), reduction="none", fastemit_lambda=0.25)
    upstream = torch.tensor(WEIGHTS, dtype=loss.dtype)
    first, second = (torch.autograd.grad(loss, x, upstream, retain_graph=True)[0] for _ in range(2))
    assert same((loss, first), of_core(x, of, WEIGHTS, fastemit_lambda=0.25))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("reduction", "share"), [("sum", 1.0), ("mean", 0.25)])
@of_each_way
def test_reductions_have_one_element(way: str, reduction: str, share: float) -> None:
    of = case()
    acts, naive = leaves(of.logits, of.logits)
    loss = call(way, (acts, *map(torch.as_tensor, of.integers)), reduction=reduction)
    exact = share * naive_rnnt_loss(naive, *of.integers).sum()
    assert loss.shape == (1,)
    torch.testing.assert_close(loss[0], exact, rtol=1e-12, atol=0)
    (-2.5 * loss).backward()
    (-2.5 * exact).backward()
    torch.testing.assert_close(acts.grad, naive.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", [None, "none"])
def test_none(reduction: str | None) -> None:
    of = case()
    loss = RNNTLoss()
    loss.reduction = reduction  # as NeMo does
    assert loss(of.logits, *map(torch.as_tensor, of.integers)).shape == (4,)


@pytest.mark.parametrize("fastemit_lambda", [0.0, 0.01, 1.5])
def test_fastemit_scales_gradients_and_not_the_cost(fastemit_lambda: float) -> None:
    """By the log-probabilities, as the fork's CPU path has it, and through the log-softmax."""
    of = case()
    acts, twin = leaves(of.logits, of.logits)
    log_probs = twin.log_softmax(-1)
    exact_loss, by_log_probs = reference.rnnt_loss(log_probs.detach().numpy(), *of.integers, normalized=True, weights=WEIGHTS)
    scaled = torch.as_tensor(by_log_probs)
    for b, (T, U) in enumerate(zip(of.frames, of.labels, strict=True)):
        for u in range(U):  # no label is the blank
            scaled[b, :T, u, of.targets[b, u]] *= 1.0 + fastemit_lambda
    log_probs.backward(scaled)
    loss = rnnt_loss(acts, *map(torch.as_tensor, of.integers), reduction="none", fastemit_lambda=fastemit_lambda)
    torch.testing.assert_close(loss, torch.as_tensor(exact_loss), rtol=1e-12, atol=0)
    loss.backward(torch.tensor(WEIGHTS, dtype=torch.float64))
    torch.testing.assert_close(acts.grad, twin.grad, rtol=0, atol=1e-12)


def test_log_probabilities_give_the_same() -> None:
    """What a recipe made for a CPU build without the softmax passes."""
    of = case()
    logits, of_log_probs = leaves(of.logits, of.logits)
    integers = list(map(torch.as_tensor, of.integers))
    for loss, x in ((rnnt_loss(logits, *integers), logits), (rnnt_loss(of_log_probs.log_softmax(-1), *integers), of_log_probs)):
        loss.backward()
        torch.testing.assert_close(loss, rnnt_loss(of.logits, *integers), rtol=1e-13, atol=0)
        assert x.grad is not None
    torch.testing.assert_close(of_log_probs.grad, logits.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((2,), (2, "mean", 0.0)),
        ((2, "sum"), (2, "sum", 0.0)),
        ((2, "sum", 0.5), (2, "sum", 0.5)),
        ((2, 0.5), (2, "mean", 0.5)),
        ((2, 0.5, "sum"), (2, "sum", 0.5)),
        ((2, 0), (2, "mean", 0)),
    ],
)
def test_either_order_of_the_module(arguments: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    loss = RNNTLoss(*arguments)
    assert (loss.blank, loss.reduction, loss.fastemit_lambda) == expected


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    of, x, targets = padded_case(torch.float32)
    calls = spied(monkeypatch)
    RNNTLoss()(x, targets, of.frames, of.labels)
    assert calls[0][0] is x
    assert calls[0][1] is targets


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"reduction": "batch"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'batch'"),
        ({"blank": -14}, ValueError, r"blank: expected a class in \[-13, 13\), got -14"),
        ({"fastemit_lambda": -0.5}, ValueError, "fastemit_lambda: expected"),
        ({"acts": None}, TypeError, "acts: expected a torch.Tensor, got NoneType"),
        ({"acts": torch.zeros(4, 9, 13)}, ValueError, "acts: expected 4 dimensions"),
        ({"labels": torch.full((4, 5), 13)}, ValueError, r"labels: expected labels in \[0, V = 13\), got 13"),
        ({"labels": torch.zeros(4, 5)}, TypeError, "labels: expected integers"),
        ({"act_lens": torch.tensor([10, 2, 7, 4])}, ValueError, r"act_lens: expected lengths in \[1, T = 9\], got 10"),
        ({"label_lens": torch.tensor([6, 0, 3, 4])}, ValueError, r"label_lens: expected lengths in \[0, U = 5\], got 6"),
    ],
)
@of_each_way
def test_wrong_arguments_are_named(way: str, wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    of = case()
    tensors = dict(zip(("acts", "labels", "act_lens", "label_lens"), (of.logits, *map(torch.as_tensor, of.integers)), strict=True))
    options = {name: value for name, value in wrong.items() if name not in tensors}
    with pytest.raises(kind, match=f"^{message}"):
        call(way, tuple({**tensors, **wrong}[name] for name in tensors), **options)


@pytest.mark.parametrize("arguments", [(0, "batch"), (0, 0.5, "batch")])
def test_the_module_checks_reduction_when_it_is_made(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"^reduction: expected one of 'mean', 'sum', 'none', got 'batch'"):
        RNNTLoss(*arguments)


def test_under_compile() -> None:
    """What gives errors their names breaks no graph."""
    of = case()
    (logits,) = leaves(of.logits, dtype=torch.float32)
    integers = list(map(torch.as_tensor, of.integers))
    wanted, loss = (f(logits, *integers) for f in (rnnt_loss, torch.compile(rnnt_loss, fullgraph=True, backend="aot_eager")))
    assert same([wanted, *torch.autograd.grad(wanted, logits)], [loss, *torch.autograd.grad(loss, logits)])
