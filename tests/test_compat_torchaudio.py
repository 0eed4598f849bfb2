"""torchaudio's loss by its own names: published vectors, its habits, and what it cannot do."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from compat_cases import every_vector, expect_vector, of_core, padded_case, spied
from naive_torch import DTYPES, WEIGHTS, case, leaves, naive_rnnt_loss, same
from transducer_loss.adapters.compat.torchaudio import RNNTLoss, rnnt_loss

of_each_way = pytest.mark.parametrize("way", ["function", "module"])


def call(way: str, tensors: tuple[Any, ...], **options: Any) -> Tensor:
    return rnnt_loss(*tensors, **options) if way == "function" else RNNTLoss(**options)(*tensors)


@of_each_way
@every_vector
def test_vectors(vector: dict[str, Any], way: str) -> None:
    blank, classes = vector["blank"], len(vector["logits"][0][0][0])
    options = {"blank": blank, "reduction": "none", "clamp": vector.get("clamp", -1)}
    if blank == classes - 1:
        del options["blank"]  # the default is the last class
    if "fastemit_lambda" in vector:  # torchaudio has none: the cost alone
        expect_vector({**vector, "expected_grads": None}, lambda *tensors: call(way, tensors, **options))
        return
    expect_vector(vector, lambda *tensors: call(way, tensors, **options), clamps=True)
    if "clamp" not in vector:
        options["fused_log_softmax"] = False
        expect_vector(vector, lambda *tensors: call(way, tensors, **options), log_probs=True)


def test_signatures() -> None:
    defaults = {"blank": -1, "clamp": -1, "reduction": "mean", "fused_log_softmax": True}
    for function, positional in ((rnnt_loss, ["logits", "targets", "logit_lengths", "target_lengths"]), (RNNTLoss, [])):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == [*positional, *defaults]
        assert {name: parameters[name].default for name in defaults} == defaults
    assert list(inspect.signature(RNNTLoss.forward).parameters)[1:] == ["logits", "targets", "logit_lengths", "target_lengths"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_as_the_core_with_strides_and_padding(dtype: torch.dtype, fused: bool) -> None:
    of, x, targets = padded_case(dtype, log_probs=not fused)
    loss = rnnt_loss(x, targets, torch.tensor(of.frames), torch.tensor(of.labels), 0, -1, "none", fused)
    upstream = torch.tensor(WEIGHTS, dtype=loss.dtype)
    first, second = (torch.autograd.grad(loss, x, upstream, retain_graph=True)[0] for _ in range(2))
    assert same((loss, first), of_core(x, of, WEIGHTS, normalized=not fused))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("reduction", "share"), [("sum", 1.0), ("mean", 0.25), (None, 0.25)])
def test_reductions(reduction: str | None, share: float) -> None:
    of = case()
    logits, naive = leaves(of.logits, of.logits)
    options = {} if reduction is None else {"reduction": reduction}
    loss = rnnt_loss(logits, *map(torch.as_tensor, of.integers), blank=0, **options)
    exact = share * naive_rnnt_loss(naive, *of.integers).sum()
    assert loss.shape == ()
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(-2.5 * of_loss, x)[0] for of_loss, x in ((loss, logits), (exact, naive))), rtol=0, atol=1e-12)


@pytest.mark.parametrize("clamp", [0.05, 0.3])
@pytest.mark.parametrize("fused", [True, False])
def test_clamp_comes_before_upstream(clamp: float, fused: bool) -> None:
    of = case()
    x = leaves(of.logits if fused else of.logits.log_softmax(-1))[0]
    integers = list(map(torch.as_tensor, of.integers))
    (plain,) = torch.autograd.grad(rnnt_loss(x, *integers, blank=0, reduction="sum", fused_log_softmax=fused), x)
    assert plain.abs().max() > clamp
    for reduction, scale in (("sum", -3.0), ("mean", 8.0)):
        loss = rnnt_loss(x, *integers, 0, clamp, reduction, fused)
        (gradient,) = torch.autograd.grad(scale * loss, x)
        share = scale / (len(of.frames) if reduction == "mean" else 1)
        torch.testing.assert_close(gradient, share * plain.clamp(-clamp, clamp), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("clamp", [-1, 0, 0.0, -0.5])
def test_clamp_is_off(clamp: float) -> None:
    of = case()
    (logits,) = leaves(10 * of.logits)
    gradients = [
        torch.autograd.grad(rnnt_loss(logits, *map(torch.as_tensor, of.integers), 0, **options), logits)
        for options in ({}, {"clamp": clamp})
    ]
    assert same(*gradients)


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    of, x, targets = padded_case(torch.float32)
    calls = spied(monkeypatch)
    rnnt_loss(x, targets, of.frames, of.labels)
    assert calls[0][0] is x
    assert calls[0][1] is targets


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"reduction": "batchmean"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'batchmean'"),
        ({"blank": 13}, ValueError, r"blank: expected a class in \[-13, 13\), got 13"),
        ({"clamp": "1"}, TypeError, "clamp: expected a number, got str"),
        ({"clamp": float("nan")}, ValueError, "clamp: expected a finite number, got nan"),
    ],
)
@of_each_way
def test_wrong_arguments_are_named(way: str, wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    of = case()
    with pytest.raises(kind, match=f"^{message}"):
        call(way, (of.logits, *map(torch.as_tensor, of.integers)), **{"blank": 0, **wrong})


def test_second_order_raises() -> None:
    of = case()
    (logits,) = leaves(of.logits)
    (gradient,) = torch.autograd.grad(rnnt_loss(logits, *map(torch.as_tensor, of.integers), blank=0), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()
