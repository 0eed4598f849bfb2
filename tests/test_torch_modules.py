"""The modules for PyTorch when they are made: keywords and values that no call could take are errors there."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from transducer_loss.adapters.torch import (
    JointRNNTLoss,
    PrunedRNNTLoss,
    RNNTLoss,
    SamplewiseRNNTLoss,
    joint_rnnt_loss,
    rnnt_loss,
    samplewise_rnnt_loss,
)

MODULES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Callable[..., Any], set[str]]] = {
    "RNNTLoss": (RNNTLoss, (), rnnt_loss, {"band"}),
    "JointRNNTLoss": (JointRNNTLoss, (5, 6), joint_rnnt_loss, {"band", "classes", "encoder_index"}),
    "PrunedRNNTLoss": (PrunedRNNTLoss, (5, 6), joint_rnnt_loss, {"band", "classes", "encoder_index"}),
    "SamplewiseRNNTLoss": (SamplewiseRNNTLoss, (torch.nn.Linear(5, 6),), samplewise_rnnt_loss, set()),
}
of_each_module = pytest.mark.parametrize(("module", "arguments", "function", "of_the_call"), MODULES.values(), ids=MODULES)


@of_each_module
def test_keywords_of_the_function_are_taken(
    module: Callable[..., Any], arguments: tuple[Any, ...], function: Callable[..., Any], of_the_call: set[str]
) -> None:
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in of_the_call
    }  # fmt: skip
    module(*arguments, **defaults)


@of_each_module
def test_other_keywords_are_errors(
    module: Callable[..., Any], arguments: tuple[Any, ...], function: Callable[..., Any], of_the_call: set[str]
) -> None:
    for name in {"blnk", "logits"} | of_the_call - {"classes"}:
        with pytest.raises(TypeError, match=f"^{name}: expected one of .*blank, .*got a keyword that is none of them"):
            module(*arguments, **{name: None})


@of_each_module
def test_values_that_no_call_could_take_are_errors(
    module: Callable[..., Any], arguments: tuple[Any, ...], function: Callable[..., Any], of_the_call: set[str]
) -> None:
    for name in ("topology", "reduction", "infeasible"):
        with pytest.raises(ValueError, match=f"^{name}: expected one of '.*, got 'x'"):
            module(*arguments, **{name: "x"})
    with pytest.raises(TypeError, match=r"^blank: expected an int, got float"):
        module(*arguments, blank=1.5)
    with pytest.raises(ValueError, match=r"^fastemit_lambda: expected a finite number, got inf"):
        module(*arguments, fastemit_lambda=float("inf"))


@pytest.mark.parametrize("module", [JointRNNTLoss, PrunedRNNTLoss])
def test_values_of_the_joint_are_checked(module: Callable[..., Any]) -> None:
    for dropout in (2.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=rf"^dropout: expected a probability in \[0, 1\), got {dropout}"):
            module(5, 6, dropout=dropout)
    with pytest.raises(ValueError, match=r"^activation: expected one of 'tanh', .*, got 'tahn'"):
        module(5, 6, activation="tahn")


def test_scales_of_the_simple_loss_are_checked() -> None:
    with pytest.raises(TypeError, match=r"^lm_only_scale: expected a number, got str"):
        PrunedRNNTLoss(5, 6, lm_only_scale="0.25")


def test_parameters_are_made_where_and_as_they_are_wanted() -> None:
    losses = PrunedRNNTLoss(5, 6, device="meta", dtype=torch.float64)
    assert {(each.device.type, each.dtype) for each in losses.parameters()} == {("meta", torch.float64)}
    assert len(list(losses.parameters())) == 6 and losses.step == 0
    output = JointRNNTLoss(5, 6, bias=False, device="meta", dtype=torch.bfloat16).output
    assert (output.weight.device.type, output.weight.dtype, output.bias) == ("meta", torch.bfloat16, None)
