"""The losses for PyTorch: values and gradients against the reference, and everything autograd may do with them."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from naive_torch import DTYPES, HALVES, WEIGHTS, Case, case, error, leaves, naive_joint, naive_rnnt_loss, same
from transducer_loss import engine, lattice, reference
from transducer_loss.adapters.torch import JointRNNTLoss, RNNTLoss, joint_rnnt_loss, rnnt_loss
from transducer_loss.check import budgets

FUNCTIONS = ("rnnt_loss", "joint_rnnt_loss")
REDUCTIONS = ("mean", "sum", "none")
JOINT_INPUTS = ("encoder", "predictor", "weight", "bias")

of_each_function = pytest.mark.parametrize("function", FUNCTIONS)
of_each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def inputs_of(function: str, of: Case) -> tuple[Tensor, ...]:
    return (of.logits,) if function == "rnnt_loss" else of.joint


def loss_of(function: str, inputs: Any, of: Case, **options: Any) -> Tensor:
    """Every cell gets its gradient, so that comparisons may be exact."""
    if function == "rnnt_loss":
        return rnnt_loss(*inputs, *of.integers, **options)
    return joint_rnnt_loss(*inputs, *of.integers, **{"occupancy_floor": 0.0, **options})


def expected(function: str, inputs: Any, of: Case, weights: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Losses (B,) and gradients of ``sum_b weights_b loss_b``, by the reference."""
    arrays = [tensor.detach().double().numpy() for tensor in inputs]
    loss, gradients = getattr(reference, function)(*arrays, *of.integers, weights=weights, **options)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return torch.as_tensor(loss), [torch.as_tensor(gradient) for gradient in gradients]


def weights_of(upstream: Any, reduction: str, batch: int) -> list[float]:
    """What an upstream gradient of the reduced loss weighs each utterance with."""
    return np.broadcast_to(np.asarray(upstream) / (batch if reduction == "mean" else 1), batch).tolist()


# Values and gradients.


@of_each_dtype
@of_each_function
@pytest.mark.parametrize(("reduction", "upstream"), [("mean", 1.0), ("mean", -3.5), ("sum", 0.375), ("none", WEIGHTS)])
def test_within_the_error_budget(function: str, dtype: torch.dtype, reduction: str, upstream: Any) -> None:
    of = case()
    inputs, naive_inputs = (leaves(*inputs_of(function, of), dtype=dtype) for _ in range(2))
    weights = weights_of(upstream, reduction, len(of.frames))
    exact_loss, exact = expected(function, inputs, of, weights)

    loss = loss_of(function, inputs, of, reduction=reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gradients = torch.autograd.grad(loss, inputs, torch.tensor(upstream, dtype=loss.dtype))
    assert [g.dtype for g in gradients] == [dtype] * len(inputs)
    if reduction != "none":
        exact_loss = exact_loss.mean() if reduction == "mean" else exact_loss.sum()

    # Halves may be off by twice what torch is off in the same dtype, the others by rounding.
    loss_budget, budget = budgets(function, name_of(dtype), "cpu")
    gradient_budgets = [budget] * len(inputs)
    if dtype in HALVES:
        naive_logits = naive_inputs[0] if function == "rnnt_loss" else naive_joint(*naive_inputs)
        naive = naive_rnnt_loss(naive_logits, *of.integers)
        of_naive = torch.autograd.grad(naive, naive_inputs, torch.tensor(weights, dtype=dtype))
        naive_loss = naive if reduction == "none" else naive.mean() if reduction == "mean" else naive.sum()
        loss_budget = 2 * error(naive_loss, exact_loss)
        gradient_budgets = [2 * error(g, e) for g, e in zip(of_naive, exact, strict=True)]
    assert error(loss, exact_loss) <= loss_budget
    for gradient, e, budget in zip(gradients, exact, gradient_budgets, strict=True):
        assert error(gradient, e) <= budget


@pytest.mark.parametrize("topology", ["regular", "modified", "constrained"])
@pytest.mark.parametrize(("function", "options"), [
    *((function, options) for function in FUNCTIONS for options in (
        {"fastemit_lambda": 0.25}, {"delay_penalty": -0.125}, {"hat": True},
    )),
    ("rnnt_loss", {"normalized": True}), ("joint_rnnt_loss", {"activation": "gelu"}), ("joint_rnnt_loss", {"bias": None}),
], ids=str)  # fmt: skip
def test_options_reach_the_core(function: str, topology: str, options: dict[str, Any]) -> None:
    of, options = case(frames=(9, 1, 7, 5)), {"topology": topology, **options}
    inputs = leaves(*inputs_of(function, of))
    if options.pop("bias", 1) is None:
        inputs[3:] = []
    if "normalized" in options:
        inputs = leaves(inputs[0].detach().log_softmax(-1))
    bias = [] if function == "rnnt_loss" or len(inputs) == 4 else [None]
    arrays = [tensor.detach().numpy() for tensor in inputs]
    exact_loss, exact = getattr(reference, function)(*arrays, *bias, *of.integers, weights=WEIGHTS, **options)
    exact = [e for e in (exact if isinstance(exact, tuple) else (exact,)) if e is not None]
    loss = loss_of(function, [*inputs, *bias], of, reduction="none", **options)
    gradients = torch.autograd.grad(loss, inputs, torch.tensor(WEIGHTS, dtype=loss.dtype))
    loss_budget, budget = budgets(function, "float64", "cpu")
    assert error(loss, exact_loss) <= loss_budget
    assert len(gradients) == len(exact)
    for gradient, e in zip(gradients, exact, strict=True):
        assert error(gradient, e) <= budget


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[Case, int]:
    batch, classes = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    frames = draw(st.lists(st.integers(1, 5), min_size=batch, max_size=batch))
    labels = draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    of = case(frames, labels, classes, features=draw(st.integers(1, 5)))
    return of, draw(st.integers(-classes, classes - 1))


@of_each_function
@given(drawn=small_cases())
@settings(max_examples=40, deadline=None, database=None, derandomize=True)
def test_any_shape_and_any_blank(function: str, drawn: tuple[Case, int]) -> None:
    of, blank = drawn
    inputs = leaves(*inputs_of(function, of))
    exact_loss, exact = expected(function, inputs, of, None, blank=blank)
    loss = loss_of(function, inputs, of, reduction="none", blank=blank)
    loss_budget, budget = budgets(function, "float64", "cpu")
    assert error(loss, exact_loss) <= loss_budget
    for gradient, e in zip(torch.autograd.grad(loss.sum(), inputs), exact, strict=True):
        assert torch.linalg.vector_norm(gradient - e) <= budget * max(1.0, float(torch.linalg.vector_norm(e)))


@pytest.mark.parametrize("blank", [0, 4, 12, -1, -13])
@of_each_function
def test_blank_anywhere(function: str, blank: int) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of))
    exact_loss, exact = expected(function, inputs, of, WEIGHTS, blank=blank)
    loss = loss_of(function, inputs, of, reduction="none", blank=blank)
    gradients = torch.autograd.grad(loss, inputs, torch.tensor(WEIGHTS, dtype=loss.dtype))
    loss_budget, budget = budgets(function, "float64", "cpu")
    assert error(loss, exact_loss) <= loss_budget
    for gradient, e in zip(gradients, exact, strict=True):
        assert error(gradient, e) <= budget


@of_each_dtype
def test_packed_logits_give_the_same_bits(dtype: torch.dtype) -> None:
    of = case()
    (logits,) = leaves(of.logits, dtype=dtype)
    real = ~of.padding(of.logits)[..., 0]
    packed = logits.detach()[real].requires_grad_()
    upstream = torch.tensor(WEIGHTS, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    loss, loss_packed = (rnnt_loss(x, *of.integers, reduction="none") for x in (logits, packed))
    assert torch.equal(loss, loss_packed)
    (gradient,), (gradient_packed,) = (torch.autograd.grad(*pair, upstream) for pair in ((loss, logits), (loss_packed, packed)))
    assert torch.equal(gradient[real], gradient_packed)


@of_each_function
def test_no_labels_and_one_frame(function: str) -> None:
    of = case(frames=(1, 3), labels=(0, 0))
    assert of.targets.shape == (2, 0)
    inputs = leaves(*inputs_of(function, of))
    exact_loss, exact = expected(function, inputs, of, None)
    loss = loss_of(function, inputs, of, reduction="none")
    assert error(loss, exact_loss) <= budgets(function, "float64", "cpu")[0]
    for gradient, e in zip(torch.autograd.grad(loss.sum(), inputs), exact, strict=True):
        assert error(gradient, e) <= budgets(function, "float64", "cpu")[1]


@of_each_function
def test_gradients_in_float16_do_not_underflow(function: str) -> None:
    """Loss scaling comes with the upstream gradient: what is made before it must not be lost."""
    of = case(frames=(40,), labels=(12,), classes=600)
    scale = 2.0**12
    inputs = leaves(*inputs_of(function, of), dtype=torch.float16)
    with torch.no_grad():
        for weight in inputs[2:3]:
            weight /= 4096  # and with it the gradients of encoder and predictor
    _, exact = expected(function, inputs, of, [1.0])
    gradients = torch.autograd.grad(loss_of(function, inputs, of, reduction="mean"), inputs, torch.tensor(scale))
    unscaled = torch.autograd.grad(loss_of(function, inputs, of, reduction="mean"), inputs)
    for gradient, without, e in list(zip(gradients, unscaled, exact, strict=True))[:2]:
        small = (e.abs() < 2.0**-17) & (e.abs() * scale >= 2.0**-14)  # subnormal without the scale, and with it not
        assert small.any()
        assert error(gradient[small].double() / scale, e[small]) <= 2.0**-10 < error(without[small], e[small])


# Reductions and upstream gradients.


@of_each_dtype
def test_reductions_of_logits_have_the_same_bits(dtype: torch.dtype) -> None:
    of = case()
    (logits,) = leaves(of.logits, dtype=dtype)
    each = rnnt_loss(logits, *of.integers, reduction="none")
    assert torch.equal(rnnt_loss(logits, *of.integers), each.mean())
    for reduction, one, share in (("mean", each.mean(), 0.25), ("sum", each.sum(), 1.0)):
        loss = rnnt_loss(logits, *of.integers, reduction=reduction)
        assert torch.equal(loss, one)
        wanted = torch.autograd.grad(each, logits, torch.full_like(each, -3 * share), retain_graph=True)
        assert same(torch.autograd.grad(loss, logits, torch.full_like(loss, -3)), wanted)


@pytest.mark.parametrize(("reduction", "share"), [("mean", 0.25), ("sum", 1.0)])
def test_reductions_of_the_joint_agree(reduction: str, share: float) -> None:
    of = case()
    inputs = leaves(*of.joint)
    each = loss_of("joint_rnnt_loss", inputs, of, reduction="none")
    one = loss_of("joint_rnnt_loss", inputs, of, reduction=reduction)
    assert torch.equal(one, each.mean() if reduction == "mean" else each.sum())
    first = torch.autograd.grad(each, inputs, torch.full_like(each, -3.0 * share))
    second = torch.autograd.grad(one, inputs, torch.tensor(-3.0, dtype=torch.float64))
    # One makes the exponentials of the logits again, the other keeps them.
    for a, b in zip(first, second, strict=True):
        assert error(a, b) <= 32 * torch.finfo(torch.float64).eps


@of_each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_expanded_and_strided_upstream(function: str, dtype: torch.dtype) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of), dtype=dtype)
    loss = loss_of(function, inputs, of, reduction="none")
    dense = torch.tensor([-0.5] * 4)
    strided = torch.tensor([[w, 9.0] for w in WEIGHTS])[:, 0]
    assert torch.tensor(-0.5).expand(4).stride() == (0,)
    assert strided.stride() == (2,)

    def gradients(upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, inputs, upstream, retain_graph=True)

    assert same(gradients(torch.tensor(-0.5).expand(4)), gradients(dense))
    assert same(gradients(strided), gradients(strided.clone()))
    assert not same(gradients(strided), gradients(dense))


@of_each_function
@of_each_reduction
def test_backward_twice_gives_the_same_bits(function: str, reduction: str) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of), dtype=torch.float32)
    loss = loss_of(function, inputs, of, reduction=reduction)
    upstream = torch.full_like(loss, -1.5)
    first = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    torch.autograd.grad(loss, inputs, 7 * upstream, retain_graph=True)
    assert same(torch.autograd.grad(loss, inputs, upstream), kept)
    assert same(first, kept)  # and nobody has changed those that were handed out
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs, upstream)


@of_each_function
@of_each_reduction
def test_gradients_accumulate_in_leaves(function: str, reduction: str) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of))
    upstream = [1.0, -2.0]
    for weight in upstream:
        loss = loss_of(function, inputs, of, reduction=reduction)
        loss.backward(torch.full_like(loss, weight))
    _, exact = expected(function, inputs, of, weights_of(sum(upstream), reduction, 4))
    for tensor, e in zip(inputs, exact, strict=True):
        assert error(tensor.grad, e) <= budgets(function, "float64", "cpu")[1]


# What autograd does not ask for.


@of_each_function
@of_each_reduction
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_work_where_none_is_wanted(
    function: str, reduction: str, mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of))
    loss = loss_of(function, inputs, of, reduction=reduction)
    made: list[str] = []
    occupancy, gradients = lattice.occupancy, engine.Engine.gradients
    monkeypatch.setattr(lattice, "occupancy", lambda *args: (made.append("occupancy"), occupancy(*args))[1])
    monkeypatch.setattr(engine.Engine, "gradients", lambda self: (made.append("gradients"), gradients(self))[1])
    with mode():
        without = loss_of(function, inputs, of, reduction=reduction)
        fresh = loss_of(function, [tensor.clone() for tensor in inputs], of, reduction=reduction)
    plain = loss_of(function, [tensor.detach() for tensor in inputs], of, reduction=reduction)
    assert made == []
    for other in (without, fresh, plain):
        assert torch.equal(other, loss)
        assert not other.requires_grad
    loss_of(function, inputs, of, reduction=reduction)
    assert "occupancy" in made  # so that the list above was empty for a reason


@of_each_reduction
@pytest.mark.parametrize("wanted", [
    ("encoder",), ("predictor",), ("weight",), ("bias",), ("encoder", "bias"), ("predictor", "weight"),
], ids="+".join)  # fmt: skip
def test_only_some_inputs_need_a_gradient(reduction: str, wanted: tuple[str, ...]) -> None:
    of = case()
    everything = leaves(*of.joint, dtype=torch.float32)
    some = [tensor.detach().requires_grad_(name in wanted) for name, tensor in zip(JOINT_INPUTS, everything, strict=True)]
    for inputs in (everything, some):
        loss = loss_of("joint_rnnt_loss", inputs, of, reduction=reduction)
        loss.backward(torch.full_like(loss, 0.5))
    for name, full, tensor in zip(JOINT_INPUTS, everything, some, strict=True):
        assert same([tensor.grad], [full.grad if name in wanted else None])


@of_each_reduction
def test_without_a_bias(reduction: str) -> None:
    of = case()
    encoder, predictor, weight, _ = of.joint
    with_zeros = leaves(encoder, predictor, weight, torch.zeros(len(weight)), dtype=torch.float32)
    without = leaves(encoder, predictor, weight, dtype=torch.float32)
    results = []
    for inputs in (with_zeros, [*without, None]):
        loss = loss_of("joint_rnnt_loss", inputs, of, reduction=reduction)
        results.append([loss, *torch.autograd.grad(loss, inputs[:3], torch.ones_like(loss))])
    assert same(*results)


# Memory layouts, integers, padding.


@pytest.mark.parametrize("layout", ["permuted", "sliced", "expanded"])
@of_each_function
@of_each_reduction
def test_strides(function: str, layout: str, reduction: str) -> None:
    of = case()
    lay: dict[str, Callable[[Tensor], Tensor]] = {
        "permuted": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
        "sliced": lambda x: torch.stack([x, torch.full_like(x, 7)], dim=-1).flatten(-2)[..., ::2],
        "expanded": lambda x: x[:1].expand(x.shape),
    }
    inputs = [lay[layout](tensor.float()).detach().requires_grad_() for tensor in inputs_of(function, of)]
    assert not any(tensor.is_contiguous() for tensor in inputs if tensor.ndim > 1)
    dense = [tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for tensor in inputs]
    losses = [loss_of(function, i, of, reduction=reduction) for i in (inputs, dense)]
    assert torch.equal(*losses)
    upstream = torch.full_like(losses[0], -0.5)
    strided, contiguous = (torch.autograd.grad(loss, i, upstream) for loss, i in zip(losses, (inputs, dense), strict=True))
    assert same(strided, contiguous)


@of_each_function
def test_integers_of_every_kind(function: str) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of), dtype=torch.float32)

    def run(targets: Any, frames: Any, labels: Any) -> list[Tensor]:
        options = {} if function == "rnnt_loss" else {"occupancy_floor": 0.0}
        call = rnnt_loss if function == "rnnt_loss" else joint_rnnt_loss
        loss = call(*inputs, targets, frames, labels, reduction="none", **options)
        return [loss, *torch.autograd.grad(loss.sum(), inputs)]

    wanted = run(*of.integers)
    spaced = torch.stack([of.targets, torch.full_like(of.targets, 99)], dim=-1).flatten(1)[:, ::2]
    for targets in (
        of.targets.int(), of.targets.to(torch.int16), of.targets.tolist(), of.targets.numpy(), spaced,
        of.targets.T.contiguous().T, torch.nn.functional.pad(of.targets, (0, 3), value=-1),
    ):  # fmt: skip
        assert same(run(targets, of.frames, of.labels), wanted)
    for kind in (torch.int32, torch.int64, torch.uint8):
        assert same(run(of.targets, torch.tensor(of.frames, dtype=kind), torch.tensor(of.labels, dtype=kind)), wanted)
    assert same(run(of.targets, tuple(of.frames), np.array(of.labels)), wanted)


@of_each_dtype
@of_each_function
@of_each_reduction
def test_padding_may_hold_anything(function: str, dtype: torch.dtype, reduction: str) -> None:
    of = case()
    clean = leaves(*inputs_of(function, of), dtype=dtype)
    results = []
    for value in (None, torch.nan, torch.inf):
        inputs = [tensor.detach().clone() for tensor in clean]
        padded = inputs[:1] if function == "rnnt_loss" else inputs[:2]
        for tensor in padded if value is not None else []:
            tensor[of.padding(tensor)] = value
        inputs = [tensor.requires_grad_() for tensor in inputs]
        loss = loss_of(function, inputs, of, reduction=reduction)
        gradients = torch.autograd.grad(loss, inputs, torch.full_like(loss, -1.25))
        results.append([loss, *gradients])
        for gradient, tensor in zip(gradients, padded, strict=False):
            assert of.padding(tensor).any()
            assert (gradient[of.padding(tensor)] == 0).all()
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@of_each_function
def test_an_utterance_with_nan_leaves_the_others_alone(function: str) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of))
    weights = [1.5, -0.75, 0.0, 2.0]
    _, exact = expected(function, inputs, of, weights)
    with torch.no_grad():
        inputs[0][2, 0] = torch.nan
    loss = loss_of(function, inputs, of, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False]
    gradients = torch.autograd.grad(loss, inputs, torch.tensor([*weights[:2], 5.0, weights[3]], dtype=torch.float64))
    for gradient, e in zip(gradients, exact, strict=True):
        assert error(gradient, e) <= budgets(function, "float64", "cpu")[1]


@of_each_function
def test_an_utterance_without_a_path(function: str) -> None:
    of = case(frames=(4, 2), labels=(3, 3))
    inputs = leaves(*inputs_of(function, of))
    options = {"topology": "modified", "reduction": "none"}
    _, exact = expected(function, inputs, of, [1.0, 1.0], topology="modified")
    for infeasible, reported in (("inf", torch.inf), ("zero", 0.0)):
        loss = loss_of(function, inputs, of, infeasible=infeasible, **options)
        assert loss[1] == reported
        assert loss[0].isfinite()
        for gradient, e in zip(torch.autograd.grad(loss, inputs, torch.ones_like(loss)), exact, strict=True):
            assert error(gradient, e) <= budgets(function, "float64", "cpu")[1]
    with pytest.raises(ValueError, match=r"targets: expected a path .* utterances \[1\]"):
        loss_of(function, inputs, of, infeasible="raise", **options)


# In place, and changes between forward and backward.


def test_the_gradient_in_place_of_the_logits() -> None:
    of = case()
    for layout in (lambda x: x, lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0)):
        source, other = leaves(of.logits, of.logits, dtype=torch.float32)
        logits = layout(2 * source)
        loss = rnnt_loss(logits, *of.integers, inplace=True)
        wanted = torch.autograd.grad(rnnt_loss(layout(2 * other), *of.integers), other, torch.tensor(-3.0))
        handed: list[Tensor] = []
        logits.register_hook(handed.append)
        got = torch.autograd.grad(loss, source, torch.tensor(-3.0), retain_graph=True)
        assert same(got, wanted)
        assert handed[0].data_ptr() == logits.data_ptr()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, source)


def test_in_place_changes_nothing_without_a_gradient() -> None:
    of = case()
    logits = of.logits.clone()
    with torch.no_grad():
        rnnt_loss(logits.requires_grad_(), *of.integers, inplace=True)
    rnnt_loss(logits.detach(), *of.integers, inplace=True)
    assert torch.equal(logits, of.logits)
    rnnt_loss(logits, *of.integers, inplace=True)
    assert torch.equal(logits, of.logits)  # only backward writes


@pytest.mark.parametrize(
    ("function", "reduction", "changed"),
    [
        *(("rnnt_loss", reduction, i) for reduction in REDUCTIONS for i in (0, -1)),
        *(("joint_rnnt_loss", "none", i) for i in (0, 1, 2, 3, -1)),
    ],
)
def test_changes_before_backward_raise(function: str, reduction: str, changed: int) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of))
    targets = of.targets.clone()
    call = rnnt_loss if function == "rnnt_loss" else joint_rnnt_loss
    loss = call(*inputs, targets, of.frames, of.labels, reduction=reduction)
    with torch.no_grad():
        (targets if changed == -1 else inputs[changed]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_made_with_the_loss_are_those_of_then(reduction: str) -> None:
    of = case()
    inputs, others = leaves(*of.joint), leaves(*of.joint)
    wanted = torch.autograd.grad(loss_of("joint_rnnt_loss", others, of, reduction=reduction), others)
    loss = loss_of("joint_rnnt_loss", inputs, of, reduction=reduction)
    with torch.no_grad():
        for tensor in inputs:
            tensor.fill_(torch.nan)
    assert same(torch.autograd.grad(loss, inputs), wanted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_lets_go_of_the_logits(reduction: str) -> None:
    """A training loop still has the last loss while it makes the next logits."""
    from torch.multiprocessing.reductions import StorageWeakRef

    of = case()
    (source,) = leaves(of.logits)
    logits = 2 * source
    held = StorageWeakRef(logits.untyped_storage())
    loss = rnnt_loss(logits, *of.integers, reduction=reduction)
    del logits
    assert not held.expired()
    loss.sum().backward()
    assert held.expired()


# Derivatives by finite differences, and derivatives of derivatives.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [
    {}, {"topology": "modified"}, {"topology": "constrained"}, {"hat": True}, {"delay_penalty": 0.1, "blank": -1},
], ids=str)  # fmt: skip
def test_gradcheck_of_logits(options: dict[str, Any], reduction: str) -> None:
    of = case(frames=(3, 2), labels=(2, 1), classes=4)
    assert torch.autograd.gradcheck(lambda x: rnnt_loss(x, *of.integers, reduction=reduction, **options), leaves(of.logits))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [
    {}, {"topology": "constrained"}, {"activation": "silu"}, {"dropout": 0.5, "seed": 3}, {"hat": True},
], ids=str)  # fmt: skip
def test_gradcheck_of_the_joint(options: dict[str, Any], reduction: str) -> None:
    of = case(frames=(3, 2), labels=(2, 1), classes=4, features=3)

    def loss(*inputs: Tensor) -> Tensor:
        return loss_of("joint_rnnt_loss", inputs, of, reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss, leaves(*of.joint))


@of_each_function
@of_each_reduction
def test_second_order_raises(function: str, reduction: str) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of))
    loss = loss_of(function, inputs, of, reduction=reduction).sum()
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    # A penalty on the gradient, beside something that can be differentiated.
    penalty = sum(gradient.square().sum() for gradient in gradients) + sum(tensor.sum() for tensor in inputs)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        penalty.backward()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    weighted = weight * loss_of(function, inputs, of, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(weighted, inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


# Autocast and random numbers.


@of_each_reduction
def test_autocast(reduction: str) -> None:
    of = case()
    parameters = leaves(*of.joint[2:], dtype=torch.float32)
    encoder, predictor = leaves(*of.joint[:2], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder * 1.0 @ torch.eye(6)  # as a layer before the joint makes it
        assert half.dtype == torch.bfloat16
        loss = loss_of("joint_rnnt_loss", (half, predictor, *parameters), of, reduction=reduction)
    assert loss.dtype == torch.float32
    loss.backward(torch.ones_like(loss))
    got = [tensor.grad for tensor in (encoder, predictor, *parameters)]
    assert all(gradient.dtype == torch.float32 for gradient in got)

    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in (encoder, predictor, *parameters)]
    other = loss_of("joint_rnnt_loss", rounded, of, reduction=reduction)
    assert torch.equal(other, loss)
    # What is float32 gets its gradient without rounding it on the way.
    wanted = torch.autograd.grad(other, rounded, torch.ones_like(other))
    assert same([gradient.bfloat16() for gradient in got], wanted)
    assert not torch.equal(got[2], wanted[2].float())


def test_autocast_leaves_logits_alone() -> None:
    of = case()
    for dtype in DTYPES:
        (logits,) = leaves(of.logits, dtype=dtype)
        outside = rnnt_loss(logits, *of.integers)
        with torch.autocast("cpu", torch.bfloat16):
            inside = rnnt_loss(logits, *of.integers)
        assert inside.dtype == outside.dtype
        assert torch.equal(inside, outside)
        assert same(torch.autograd.grad(inside, logits), torch.autograd.grad(outside, logits))


def test_autocast_does_not_hide_wrong_dtypes() -> None:
    of = case()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="encoder: expected dtype"):
        joint_rnnt_loss(of.joint[0].long(), *of.joint[1:], *of.integers)


@of_each_reduction
def test_the_seed_of_dropout(reduction: str) -> None:
    of = case()
    inputs = leaves(*of.joint, dtype=torch.float32)

    def run(**options: Any) -> list[Tensor]:
        loss = loss_of("joint_rnnt_loss", inputs, of, reduction=reduction, dropout=0.4, **options)
        return [loss, *torch.autograd.grad(loss.sum(), inputs)]

    assert same(run(seed=5), run(seed=5))
    assert not same(run(seed=5), run(seed=6))
    torch.manual_seed(11)
    first, second = run(), run()
    assert not same(first, second)
    torch.manual_seed(11)
    assert same(run(), first)
    assert same(run(), second)


# Threads and processes.


def wide_case() -> Case:
    """Large enough that the host hands parts of it to threads."""
    return case(frames=(40, 25, 33), labels=(14, 9, 0), classes=200, features=24)


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@of_each_function
@of_each_reduction
@pytest.mark.usefixtures("thread_count")
def test_any_number_of_threads_gives_the_same_bits(function: str, reduction: str) -> None:
    of, results = wide_case(), []
    options = {} if function == "rnnt_loss" else {"occupancy_floor": 1e-6}
    inputs = leaves(*inputs_of(function, of), dtype=torch.float32)
    for number in (1, 2, 4):
        torch.set_num_threads(number)
        loss = loss_of(function, inputs, of, reduction=reduction, **options)
        results.append([loss, *torch.autograd.grad(loss.sum(), inputs)])
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_calls_from_several_threads_at_once() -> None:
    work = [(function, reduction) for function in FUNCTIONS for reduction in REDUCTIONS]
    of = wide_case()

    def run(function: str, reduction: str) -> list[Tensor]:
        inputs = leaves(*inputs_of(function, of), dtype=torch.float32)
        loss = loss_of(function, inputs, of, reduction=reduction)
        return [loss, *torch.autograd.grad(loss.sum(), inputs)]

    wanted = {item: run(*item) for item in work}
    failures: list[Any] = []
    start = threading.Barrier(len(work))

    def many(item: tuple[str, str]) -> None:
        start.wait()
        try:
            failures.extend(item for _ in range(5) if not same(run(*item), wanted[item]))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=many, args=(item,)) for item in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def in_child(work: Callable[[], bytes], seconds: float) -> bytes:
    """What a forked child makes; empty where it raises or hangs."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.write(write, work())
        os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], seconds)
    got = os.read(read, 1 << 20) if ready else b""
    os.close(read)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return got


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.usefixtures("thread_count")
@of_each_function
def test_a_forked_child_after_first_use(function: str) -> None:
    """As data loaders fork, after the parent's threads have worked."""
    of = wide_case()
    inputs = leaves(*inputs_of(function, of), dtype=torch.float32)
    torch.set_num_threads(2)

    def work() -> bytes:
        # No large operator of torch: its own threads do not survive a fork.
        loss = loss_of(function, inputs, of)
        gradients = torch.autograd.grad(loss, inputs)
        return b"".join(tensor.detach().numpy().tobytes()[:4096] for tensor in (loss, *gradients))

    wanted = work()
    assert in_child(work, 30) == wanted


# Modules and errors.


def test_the_module_of_logits() -> None:
    of = case()
    (logits,) = leaves(of.logits)
    options = {"blank": -1, "reduction": "sum", "topology": "modified", "fastemit_lambda": 0.1}
    module = RNNTLoss(**options)
    assert list(module.parameters()) == []
    value, wanted = module(logits, *of.integers), rnnt_loss(logits, *of.integers, **options)
    assert torch.equal(value, wanted)
    assert same(torch.autograd.grad(value, logits), torch.autograd.grad(wanted, logits))


@pytest.mark.parametrize("bias", [True, False])
def test_the_module_of_the_joint(bias: bool) -> None:
    of = case()
    torch.manual_seed(0)
    module = JointRNNTLoss(6, 13, bias=bias, dropout=0.5, activation="relu", reduction="sum", seed=1)
    assert sorted(module.state_dict()) == ["output.bias", "output.weight"][not bias :]
    inputs = leaves(*of.joint[:2], dtype=torch.float32)
    layer = module.output

    def wanted(dropout: float) -> Tensor:
        return joint_rnnt_loss(
            *inputs, layer.weight, layer.bias, *of.integers, dropout=dropout, activation="relu", reduction="sum", seed=1
        )

    assert torch.equal(module(*inputs, *of.integers), wanted(0.5))
    module.eval()
    value = module(*inputs, *of.integers)
    assert torch.equal(value, wanted(0.0))
    assert not torch.equal(value, wanted(0.5))
    everything = [*inputs, *module.parameters()]
    assert same(torch.autograd.grad(value, everything), torch.autograd.grad(wanted(0.0), everything))


@pytest.mark.parametrize("module", [RNNTLoss, lambda **options: JointRNNTLoss(6, 13, **options)])
def test_a_module_checks_its_reduction_at_once(module: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'sum', 'none', got 'average'"):
        module(reduction="average")


OF_BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"targets": torch.zeros(4, 5)}, TypeError, "targets: expected integers, got dtype float32"),
    ({"targets": torch.zeros(3, 5).long()}, ValueError, r"targets: expected shape \(B, U\) = \(4, 5\), got \(3, 5\)"),
    ({"targets": torch.zeros(4, 4).long()}, ValueError, r"targets: expected shape \(B, U\) = \(4, 5\), got \(4, 4\)"),
    ({"targets": torch.full((4, 5), 13)}, ValueError, r"targets: expected labels in \[0, V = 13\), got 13 at index \(0, 0\)"),
    ({"targets": [[1, 2], [3]]}, ValueError, "targets: expected integers, in rows of one length"),
    ({"targets": None}, TypeError, "targets: expected an array"),
    ({"labels": [5, 0, 3]}, ValueError, r"target_lengths: expected shape \(B,\) = \(4,\), got \(3,\)"),
    ({"labels": [6, 0, 3, 4]}, ValueError, r"target_lengths: expected lengths in \[0, U = 5\], got 6 at index 0"),
    ({"labels": [5, 0, -3, 4]}, ValueError, r"target_lengths: .* got -3 at index 2"),
    ({"labels": [5.0, 0.0, 3.0, 4.0]}, TypeError, "target_lengths: expected integers"),
    ({"frames": [9, 1, 7, 10]}, ValueError, r"(logit|encoder)_lengths: expected lengths in \[1, T = 9\], got 10 at index 3"),
    ({"frames": [9, 0, 7, 4]}, ValueError, r"(logit|encoder)_lengths: expected lengths in \[1, T = 9\], got 0 at index 1"),
    ({"frames": 9}, ValueError, r"(logit|encoder)_lengths: expected shape \(B,\) = \(4,\), got \(\)"),
    ({"frames": torch.ones(4, dtype=torch.bool)}, TypeError, "(logit|encoder)_lengths: expected integers, got dtype bool"),
    ({"blank": 13}, ValueError, r"blank: expected a class in \[-13, 13\), got 13"),
    ({"blank": 1.0}, TypeError, "blank: expected an int, got float"),
    ({"reduction": "average"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'average'"),
    ({"reduction": None}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got None"),
    ({"topology": "normal"}, ValueError, "topology: expected one of .* got 'normal'"),
    ({"infeasible": "nan"}, ValueError, "infeasible: expected one of .* got 'nan'"),
    ({"fastemit_lambda": -0.5}, ValueError, "fastemit_lambda: expected 0 or more, got -0.5"),
    ({"fastemit_lambda": "much"}, TypeError, "fastemit_lambda: expected a number, got str"),
    ({"delay_penalty": float("nan")}, ValueError, "delay_penalty: expected a finite number, got nan"),
    ({"targets": torch.zeros(4, 5).long(), "hat": True}, ValueError, r"targets: expected no blank \(0\) with hat=True"),
]


@of_each_function
@pytest.mark.parametrize(("wrong", "kind", "message"), OF_BOTH)
def test_wrong_arguments_are_named(function: str, wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    of = case()
    integers = [wrong.get("targets", of.targets), wrong.get("frames", of.frames), wrong.get("labels", of.labels)]
    options = {name: value for name, value in wrong.items() if name not in ("targets", "frames", "labels")}
    call = rnnt_loss if function == "rnnt_loss" else joint_rnnt_loss
    with pytest.raises(kind, match=f"^{message}"):
        call(*inputs_of(function, of), *integers, **options)


@pytest.mark.parametrize(
    ("logits", "lengths", "kind", "message"),
    [
        ([1.0], [1], TypeError, "logits: expected a torch.Tensor, got list"),
        (np.zeros((1, 2, 1, 3), np.float32), [2], TypeError, "logits: expected a torch.Tensor, got ndarray"),
        (None, [1], TypeError, "logits: expected a torch.Tensor, got NoneType"),
        (torch.zeros(1, 2, 1, 3, dtype=torch.int64), [2], TypeError, "logits: expected dtype float16, .* got int64"),
        (torch.zeros(1, 2, 1, 3, dtype=torch.complex64), [2], TypeError, "logits: expected real numbers"),
        (torch.zeros(2, 1, 3), [2], ValueError, r"logits: expected 4 dimensions .* got shape \(2, 1, 3\)"),
        (torch.zeros(0, 2, 1, 3), [], ValueError, "logits: expected at least one of each"),
        (torch.zeros(3, 5), [2], ValueError, r"logits: expected shape \(sum of T_b \(U_b \+ 1\), V\) = \(2, 5\), got \(3, 5\)"),
        (torch.zeros(2, 5), 2, ValueError, r"logit_lengths: expected shape \(B,\), got 2"),
        (torch.zeros(2, 5), torch.tensor(2), ValueError, r"logit_lengths: expected shape \(B,\), got 2"),
        (torch.zeros(2, 5), [], ValueError, "logit_lengths: expected at least one utterance, got none"),
    ],
)
def test_wrong_logits_are_named(logits: Any, lengths: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        rnnt_loss(logits, torch.zeros(1, 0, dtype=torch.int64), lengths, [0])


def test_options_of_logits_that_do_not_go_together() -> None:
    of = case()
    with pytest.raises(ValueError, match="hat: expected False with normalized=True"):
        rnnt_loss(of.logits, *of.integers, hat=True, normalized=True)
    expanded = of.logits[:1].expand(of.logits.shape).requires_grad_()
    with pytest.raises(ValueError, match="logits: expected no broadcast dimension with inplace=True"):
        rnnt_loss(expanded, *of.integers, inplace=True)


@pytest.mark.parametrize(
    ("at", "change", "kind", "message"),
    [
        (0, lambda x: x.numpy(), TypeError, "encoder: expected a torch.Tensor, got ndarray"),
        (0, lambda x: x[..., :-1], ValueError, r"predictor: expected shape \(B, U\+1, H\) = \(4, 6, 5\), got \(4, 6, 6\)"),
        (0, lambda x: x[0], ValueError, "encoder: expected 3 dimensions"),
        (0, lambda x: x[:3], ValueError, r"predictor: expected shape \(B, U\+1, H\) = \(3, 6, 6\), got \(4, 6, 6\)"),
        (1, lambda x: None, TypeError, "predictor: expected a torch.Tensor, got NoneType"),
        (1, lambda x: x.float(), TypeError, "predictor: expected dtype float64 as encoder, got float32"),
        (2, lambda x: x.tolist(), TypeError, "weight: expected a torch.Tensor, got list"),
        (2, lambda x: x.T, ValueError, r"weight: expected shape \(V, H\) = \(6, 6\), got \(6, 13\)"),
        (2, lambda x: x.half(), TypeError, "weight: expected dtype float64 as encoder, got float16"),
        (3, lambda x: x.numpy(), TypeError, "bias: expected a torch.Tensor, got ndarray"),
        (3, lambda x: x[1:], ValueError, r"bias: expected shape \(V,\) = \(13,\), got \(12,\)"),
        (3, lambda x: x[None], ValueError, "bias: expected 1 dimensions"),
    ],
)
def test_wrong_inputs_of_the_joint_are_named(
    at: int, change: Callable[[Tensor], Any], kind: type[Exception], message: str
) -> None:
    of = case()
    inputs: list[Any] = list(of.joint)
    inputs[at] = change(inputs[at])
    with pytest.raises(kind, match=f"^{message}"):
        joint_rnnt_loss(*inputs, *of.integers)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"activation": "softplus"}, ValueError, "activation: expected one of .* got 'softplus'"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout: expected a probability in \[0, 1\), got -0.1"),
        ({"occupancy_floor": 1.0}, ValueError, r"occupancy_floor: expected a share in \[0, 1\), got 1.0"),
        ({"workspace": "much"}, ValueError, "workspace: expected bytes or a size as '256MiB', got 'much'"),
        ({"workspace": 1}, ValueError, "workspace: expected at least [0-9]+ bytes .* got 1$"),
        ({"workspace": 0.5}, TypeError, "workspace: expected an int or a str, got float"),
    ],
)
def test_wrong_options_of_the_joint_are_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    of = case()
    with pytest.raises(kind, match=f"^{message}"):
        joint_rnnt_loss(*of.joint, *of.integers, **options)
