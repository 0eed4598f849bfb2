"""Pruned RNN-T for PyTorch: the simple loss, the band, the losses in a band and the module of both, against the reference."""

import copy
import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import TOPOLOGIES, Counting
from naive_torch import DTYPES, WEIGHTS, Case, case, error, leaves, same
from transducer_loss import engine, lattice, pruning, reference, simple_joint
from transducer_loss.adapters.torch import (
    Band,
    PrunedRNNTLoss,
    gather_predictor,
    joint_rnnt_loss,
    prune,
    rnnt_loss,
    simple_rnnt_loss,
)
from transducer_loss.adapters.torch import pruned as torch_pruned
from transducer_loss.check import budgets
from transducer_loss.paths import Occupancy

FUNCTIONS = ("simple", "smoothed", "banded", "banded joint")
REDUCTIONS = ("mean", "sum", "none")
SMOOTHING = {"lm_only_scale": 0.25, "am_only_scale": 0.125}
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}

of_each_function = pytest.mark.parametrize("function", FUNCTIONS)
of_each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
of_each_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)


def simple_inputs(of: Case) -> tuple[Tensor, Tensor]:
    """am (B, T, V) and lm (B, U+1, V) out of the case's random numbers."""
    return of.logits[:, :, 0], of.logits[:, 1] if of.logits.shape[1] > 1 else of.logits[:, 0].flip(-1)


def band_of(of: Case, s_range: int = 3, topology: str = "regular") -> Band:
    """The same band for the same case, whatever is done with its inputs."""
    _, occupancy = simple_rnnt_loss(*simple_inputs(of), *of.integers, topology=topology)
    return prune(occupancy, of.frames, of.labels, s_range=s_range, topology=topology)


def labels_of(band: Band, rows: int) -> Tensor:
    """Label of every column of a band, (B, T, S), where there are no more than `rows`."""
    return (torch.as_tensor(band.first)[..., None].long() + torch.arange(band.width)).clamp(max=rows - 1)


def in_band(cells: Tensor, band: Band) -> Tensor:
    """(B, T, S, ...) of (B, T, U+1, ...)."""
    batch, frames, rows = cells.shape[:3]
    return cells[torch.arange(batch)[:, None, None], torch.arange(frames)[:, None], labels_of(band, rows)]


def padding_of(of: Case, band: Band) -> Tensor:
    """Which of the cells (B, T, S) are not real."""
    u = torch.as_tensor(band.first)[..., None] + torch.arange(band.width)
    past = torch.arange(u.shape[1])[:, None] >= torch.tensor(of.frames)[:, None, None]
    return past | (u >= torch.as_tensor(band.end)[..., None])


def inputs_of(function: str, of: Case, topology: str = "regular") -> tuple[Tensor, ...]:
    if function == "banded":
        return (in_band(of.logits, band_of(of, topology=topology)),)
    return of.joint if function == "banded joint" else simple_inputs(of)


def loss_of(function: str, inputs: Any, of: Case, *, band: Band | None = None, **options: Any) -> Tensor:
    """In the band of the case, if any. Every cell gets its gradient, so that comparisons may be exact."""
    if function in ("simple", "smoothed"):
        return simple_rnnt_loss(*inputs, *of.integers, **(SMOOTHING if function == "smoothed" else {}), **options)[0]
    band = band or band_of(of, topology=options.get("topology", "regular"))
    if function == "banded":
        return rnnt_loss(*inputs, *of.integers, band=band, **options)
    return joint_rnnt_loss(*inputs, *of.integers, band=band, **{"occupancy_floor": 0.0, **options})


def expected(function: str, inputs: Any, of: Case, weights: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Losses (B,) and gradients of ``sum_b weights_b loss_b``, by the reference."""
    arrays = [tensor.detach().double().numpy() for tensor in inputs]
    if function in ("simple", "smoothed"):
        smoothing = SMOOTHING if function == "smoothed" else {}
        loss, gradients, _ = reference.simple_rnnt_loss(*arrays, *of.integers, weights=weights, **smoothing, **options)
    else:
        band = band_of(of, topology=options.get("topology", "regular"))
        options = {"first": band.first, "end": band.end, "weights": weights, **options}
        if function == "banded":
            loss, gradient = reference.rnnt_loss(*arrays, *of.integers, **options)
            gradients = (gradient,)
        else:
            loss, gradients = reference.joint_rnnt_loss(*arrays, *of.integers, width=band.width, **options)
    return torch.as_tensor(loss), [torch.as_tensor(gradient) for gradient in gradients]


def weights_of(upstream: Any, reduction: str, batch: int) -> list[float]:
    """What an upstream gradient of the reduced loss weighs each utterance with."""
    return np.broadcast_to(np.asarray(upstream) / (batch if reduction == "mean" else 1), batch).tolist()


def reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else getattr(loss, reduction)()


def expect_gradients(gradients: Any, exact: list[Tensor], dtype: torch.dtype = torch.float64, least: float = 0.0) -> None:
    """Raise unless within the budget of the dtype, relative to norms of at least `least`."""
    budget = budgets("rnnt_loss", DTYPE_NAMES[dtype], "cpu")[1]
    for gradient, e in zip(gradients, exact, strict=True):
        assert gradient.dtype == dtype
        assert torch.linalg.vector_norm(gradient.double() - e) <= budget * max(least, float(torch.linalg.vector_norm(e)))


def expect_loss(loss: Tensor, exact: Tensor) -> None:
    assert loss.dtype in (torch.float32, torch.float64)
    assert error(loss, exact) <= budgets("rnnt_loss", DTYPE_NAMES[loss.dtype], "cpu")[0]


# Values and gradients of the losses.


@of_each_dtype
@of_each_function
@pytest.mark.parametrize(("reduction", "upstream"), [("mean", 1.0), ("mean", -3.5), ("sum", 0.375), ("none", WEIGHTS)])
def test_within_the_error_budget(function: str, dtype: torch.dtype, reduction: str, upstream: Any) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of), dtype=dtype)
    exact_loss, exact = expected(function, inputs, of, weights_of(upstream, reduction, len(of.frames)))
    loss = loss_of(function, inputs, of, reduction=reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expect_loss(loss, reduced(exact_loss, reduction))
    expect_gradients(torch.autograd.grad(loss, inputs, torch.tensor(upstream, dtype=loss.dtype)), exact, dtype)


@of_each_topology
@of_each_function
@pytest.mark.parametrize("options", [
    {"fastemit_lambda": 0.25}, {"delay_penalty": -0.125}, {"blank": 4}, {"blank": -1}, {"hat": True}, {"activation": "gelu"},
    {"normalized": True},
], ids=str)  # fmt: skip
def test_options_reach_the_core(function: str, topology: str, options: dict[str, Any]) -> None:
    takes = {"banded": ("hat", "normalized"), "banded joint": ("hat", "activation")}.get(function, ())
    if not {*options} <= {"fastemit_lambda", "delay_penalty", "blank", *takes}:
        return
    of, options = case(frames=(9, 1, 7, 5)), {"topology": topology, **options}
    inputs = leaves(*inputs_of(function, of, topology))
    if "normalized" in options:
        inputs = leaves(inputs[0].detach().log_softmax(-1))
    exact_loss, exact = expected(function, inputs, of, WEIGHTS, **options)
    loss = loss_of(function, inputs, of, reduction="none", **options)
    expect_loss(loss, exact_loss)
    expect_gradients(torch.autograd.grad(loss, inputs, torch.tensor(WEIGHTS, dtype=torch.float64)), exact)


@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.0, 0.3), (0.2, 0.5), (1.0, 0.0), (0.0, 1.0), (0.6, 0.4)])
@of_each_topology
def test_every_mixture_of_the_smoothed_loss(topology: str, scales: tuple[float, float]) -> None:
    of = case(frames=(9, 1, 7, 5))
    inputs = leaves(*simple_inputs(of))
    options = {"lm_only_scale": scales[0], "am_only_scale": scales[1], "topology": topology}
    exact_loss, exact = expected("simple", inputs, of, WEIGHTS, **options)
    loss, _ = simple_rnnt_loss(*inputs, *of.integers, reduction="none", **options)
    expect_loss(loss, exact_loss)
    gradients = torch.autograd.grad(loss, inputs, torch.tensor(WEIGHTS, dtype=torch.float64))
    expect_gradients(gradients, exact, least=1.0)  # by am it is 0 where only lm counts


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[Case, dict[str, Any]]:
    batch, classes = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    frames = draw(st.lists(st.integers(1, 5), min_size=batch, max_size=batch))
    labels = draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    of = case(frames, labels, classes, features=draw(st.integers(1, 5)))
    return of, {"blank": draw(st.integers(-classes, classes - 1)), "topology": draw(st.sampled_from(TOPOLOGIES))}


@of_each_function
@given(drawn=small_cases())
@settings(max_examples=25)
def test_any_shape_and_any_blank(function: str, drawn: tuple[Case, dict[str, Any]]) -> None:
    of, options = drawn
    inputs = leaves(*inputs_of(function, of, options["topology"]))
    exact_loss, exact = expected(function, inputs, of, None, **options)
    loss = loss_of(function, inputs, of, reduction="none", **options)
    known = exact_loss.isfinite()  # without a path it is not
    assert torch.equal(loss[~known], exact_loss[~known])
    if known.any():
        expect_loss(loss[known], exact_loss[known])
    expect_gradients(torch.autograd.grad(loss[known].sum(), inputs), exact, least=1.0)


@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.25, 0.125)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=DTYPE_NAMES.get)
def test_modes_of_am_and_lm_that_lie_far_apart(dtype: torch.dtype, scales: tuple[float, float]) -> None:
    """Products of exponentials underflow there."""
    of = case()
    inputs = leaves(*(64.0 * tensor for tensor in simple_inputs(of)), dtype=dtype)
    options = {"lm_only_scale": scales[0], "am_only_scale": scales[1]}
    exact_loss, exact = expected("simple", inputs, of, WEIGHTS, **options)
    loss, _ = simple_rnnt_loss(*inputs, *of.integers, reduction="none", **options)
    expect_loss(loss, exact_loss)
    # Log-probabilities are up to 500 here: their rounding is that of the occupancies.
    steps, largest = max(map(sum, zip(of.frames, of.labels, strict=True))), max(float(x.detach().abs().max()) for x in inputs)
    budget = torch.finfo(dtype).eps * steps * largest
    for gradient, e in zip(torch.autograd.grad(loss, inputs, torch.tensor(WEIGHTS, dtype=dtype)), exact, strict=True):
        assert error(gradient, e) <= budget


@of_each_function
def test_no_labels_and_one_frame(function: str) -> None:
    of = case(frames=(1, 3), labels=(0, 0))
    assert of.targets.shape == (2, 0)
    inputs = leaves(*inputs_of(function, of))
    exact_loss, exact = expected(function, inputs, of, None)
    loss = loss_of(function, inputs, of, reduction="none")
    expect_loss(loss, exact_loss)
    expect_gradients(torch.autograd.grad(loss.sum(), inputs), exact)


@of_each_function
def test_a_band_of_everything_is_no_band(function: str) -> None:
    if not function.startswith("banded"):
        return
    of = case()
    band = band_of(of, s_range=99)
    assert band.width == max(of.labels) + 1
    call, given_inputs = (rnnt_loss, (of.logits,)) if function == "banded" else (joint_rnnt_loss, of.joint)
    inputs = leaves(*given_inputs, dtype=torch.float32)
    results = []
    for options in ({}, {"band": band}):
        loss = call(*inputs, *of.integers, reduction="none", **options)
        results.append([loss, *torch.autograd.grad(loss.sum(), inputs)])
    assert same(*results)


def test_a_joiner_of_ones_own_is_the_fused_one() -> None:
    of = case()
    inputs, band = leaves(*of.joint), band_of(of)
    encoder, predictor, weight, bias = inputs
    hidden = torch.tanh(encoder[:, :, None] + gather_predictor(predictor, band))
    own = rnnt_loss(torch.nn.functional.linear(hidden, weight, bias), *of.integers, band=band)
    fused = joint_rnnt_loss(*inputs, *of.integers, band=band, occupancy_floor=0.0)
    expect_loss(own, fused)
    expect_gradients(torch.autograd.grad(own, inputs), list(torch.autograd.grad(fused, inputs)))


@of_each_function
def test_gradients_in_float16_do_not_underflow(function: str) -> None:
    """Loss scaling comes with the upstream gradient: what is made before it must not be lost."""
    of, scale = case(frames=(40,), labels=(12,), classes=600), 2.0**12
    inputs = leaves(*inputs_of(function, of), dtype=torch.float16)
    with torch.no_grad():
        for weight in inputs[2:3]:
            weight /= 4096  # and with it the gradients of encoder and predictor
    _, exact = expected(function, inputs, of, [1.0])
    gradients = torch.autograd.grad(loss_of(function, inputs, of), inputs, torch.tensor(scale))
    unscaled = torch.autograd.grad(loss_of(function, inputs, of), inputs)
    for gradient, without, e in list(zip(gradients, unscaled, exact, strict=True))[:2]:
        small = (e.abs() < 2.0**-17) & (e.abs() * scale >= 2.0**-14)  # subnormal without the scale, and with it not
        assert small.any()
        assert error(gradient[small].double() / scale, e[small]) <= 2.0**-10 < error(without[small], e[small])


# Occupancies and bands.


@of_each_topology
@pytest.mark.parametrize("function", ["simple", "smoothed"])
@of_each_dtype
def test_occupancies(function: str, topology: str, dtype: torch.dtype) -> None:
    of = case(frames=(9, 1, 7, 5))
    inputs = leaves(*simple_inputs(of), dtype=dtype)
    options = {"topology": topology, **(SMOOTHING if function == "smoothed" else {})}
    loss, occupancy = simple_rnnt_loss(*inputs, *of.integers, reduction="none", fastemit_lambda=0.5, **options)
    arrays = [tensor.detach().double().numpy() for tensor in inputs]
    _, _, exact = reference.simple_rnnt_loss(*arrays, *of.integers, **options)
    budget = budgets("rnnt_loss", DTYPE_NAMES[loss.dtype], "cpu")[1]
    assert isinstance(occupancy, Occupancy)
    assert torch.equal(occupancy.loss, loss)
    for tensor, e in zip((occupancy.blank, occupancy.label), exact, strict=True):
        assert tensor.dtype == loss.dtype
        assert error(tensor, e) <= budget
        assert (tensor[of.padding(of.logits)[..., 0]] == 0).all()
    assert not any(tensor.requires_grad for tensor in (occupancy.blank, occupancy.label, occupancy.loss))
    # They are the same without a gradient, and whatever becomes of the loss.
    kept = [tensor.clone() for tensor in (occupancy.blank, occupancy.label)]
    loss.backward(torch.full_like(loss, -2.0))
    _, without = simple_rnnt_loss(*(tensor.detach() for tensor in inputs), *of.integers, **options)
    assert same((occupancy.blank, occupancy.label), kept)
    assert same((without.blank, without.label), kept)


@of_each_topology
@pytest.mark.parametrize("strategy", ["local", "optimal"])
@pytest.mark.parametrize("s_range", [1, 2, 3, 4, 99])
def test_bands(topology: str, strategy: str, s_range: int) -> None:
    of = case(frames=(9, 1, 7, 5))
    integers = (of.frames, of.labels)
    for dtype in DTYPES[1:]:
        inputs = leaves(*simple_inputs(of), dtype=dtype)
        _, occupancy = simple_rnnt_loss(*inputs, *of.integers, topology=topology)
        band = prune(occupancy, *integers, s_range=s_range, strategy=strategy, topology=topology)
        arcs = [tensor.double().numpy() for tensor in (occupancy.blank, occupancy.label)]
        first, width, mass = reference.prune(*arcs, *integers, s_range=s_range, strategy=strategy, topology=topology)
        assert (band.width, band.s_range) == (width, s_range)
        np.testing.assert_array_equal(band.first, first)
        np.testing.assert_array_equal(band.end, np.minimum(first + width, np.array(of.labels)[:, None] + 1))
        assert (band.frames.tolist(), band.labels.tolist()) == integers
        np.testing.assert_allclose(band.mass, mass, atol=64 * torch.finfo(occupancy.blank.dtype).eps)
        lengths = [torch.tensor(each, dtype=torch.int32) for each in integers]
        again = prune(occupancy, *lengths, s_range=s_range, strategy=strategy, topology=topology)
        np.testing.assert_array_equal(again.first, band.first)


@of_each_topology
def test_the_kept_mass_is_what_the_band_costs(topology: str) -> None:
    of = case(frames=(9, 1, 7, 5))
    am, lm = simple_inputs(of)
    logits = am[:, :, None] + lm[:, None]
    band = band_of(of, s_range=2, topology=topology)
    full = rnnt_loss(logits, *of.integers, reduction="none", topology=topology)
    kept = rnnt_loss(in_band(logits, band), *of.integers, reduction="none", topology=topology, band=band)
    assert 0.0 < min(band.mass) < 0.9  # so that it says something
    np.testing.assert_allclose(band.mass, (full - kept).exp(), rtol=1e-12)


# The predictor's rows of a band.


@of_each_dtype
def test_the_predictors_rows(dtype: torch.dtype) -> None:
    of = case()
    (predictor,), band = leaves(of.joint[1], dtype=dtype), band_of(of)
    outside = padding_of(of, band)
    wanted = predictor.detach()[torch.arange(4)[:, None, None], labels_of(band, predictor.shape[1])]
    wanted[outside] = 0
    rows = gather_predictor(predictor, band)
    assert rows.dtype == dtype
    assert torch.equal(rows, wanted)

    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(rows.shape, generator=generator).to(dtype)
    exact = torch.zeros(predictor.shape, dtype=torch.float64)
    for b, t, s in (~outside).nonzero().tolist():
        exact[b, int(band.first[b, t]) + s] += upstream[b, t, s].double()
    upstream[outside] = torch.nan  # cells that are none
    (gradient,) = torch.autograd.grad(rows, predictor, upstream, retain_graph=True)
    expect_gradients([gradient], [exact], dtype)
    assert same(torch.autograd.grad(rows, predictor, upstream, retain_graph=True), [gradient])
    spread = upstream.movedim(0, -1).contiguous().movedim(-1, 0)
    assert not spread.is_contiguous()
    assert same(torch.autograd.grad(rows, predictor, spread, retain_graph=True), [gradient])
    ones = torch.ones((), dtype=dtype).expand(rows.shape)  # as `sum` sends it back
    assert same(torch.autograd.grad(rows, predictor, ones, retain_graph=True), torch.autograd.grad(rows.sum(), predictor))


def test_the_predictors_rows_of_any_layout() -> None:
    of = case()
    band, dense = band_of(of), of.joint[1].clone()
    dense[of.padding(dense)] = torch.nan  # rows that no cell has
    wanted = gather_predictor(dense, band)
    assert wanted.isfinite().all()
    for predictor in (
        dense.movedim(0, -1).contiguous().movedim(-1, 0), torch.stack([dense, dense], -1)[..., 0],
        torch.nn.functional.pad(dense, (0, 0, 0, 3)), torch.nn.functional.pad(dense, (2, 1), value=7)[..., 2:-1],
    ):  # fmt: skip
        leaf = predictor.detach().requires_grad_()
        rows = gather_predictor(leaf, band)
        assert torch.equal(rows, wanted)
        (gradient,) = torch.autograd.grad(rows.sum(), leaf)
        assert gradient.shape == leaf.shape
        assert gradient[:, 6:].count_nonzero() == 0


# Reductions and upstream gradients.


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


@pytest.mark.parametrize("function", ["simple", "smoothed", "banded"])
@of_each_dtype
def test_reductions_have_the_same_bits(function: str, dtype: torch.dtype) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of), dtype=dtype)
    each = loss_of(function, inputs, of, reduction="none")
    assert torch.equal(loss_of(function, inputs, of), each.mean())
    for reduction, one, share in (("mean", each.mean(), 0.25), ("sum", each.sum(), 1.0)):
        loss = loss_of(function, inputs, of, reduction=reduction)
        assert torch.equal(loss, one)
        wanted = torch.autograd.grad(each, inputs, torch.full_like(each, -3 * share), retain_graph=True)
        assert same(torch.autograd.grad(loss, inputs, torch.full_like(loss, -3)), wanted)


@of_each_function
def test_expanded_and_strided_upstream(function: str) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of), dtype=torch.float32)
    loss = loss_of(function, inputs, of, reduction="none")
    dense, strided = torch.tensor([-0.5] * 4), torch.tensor([[w, 9.0] for w in WEIGHTS])[:, 0]

    def gradients(upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, inputs, upstream, retain_graph=True)

    assert same(gradients(torch.tensor(-0.5).expand(4)), gradients(dense))
    assert same(gradients(strided), gradients(strided.clone()))
    assert not same(gradients(strided), gradients(dense))


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
    expect_gradients([tensor.grad for tensor in inputs], exact)


# What autograd does not ask for.


@of_each_function
@of_each_reduction
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_work_where_none_is_wanted(
    function: str, reduction: str, mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = case()
    inputs, options = leaves(*inputs_of(function, of)), {"reduction": reduction, "band": band_of(of)}
    loss = loss_of(function, inputs, of, **options)
    made: list[str] = []
    parts = [(simple_joint, "shares"), (engine.Engine, "gradients"), *([(lattice, "occupancy")] * function.startswith("banded"))]
    for owner, name in parts:
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, name=name, call=call: (made.append(name), call(*args))[1])
    with mode():
        without = loss_of(function, inputs, of, **options)
        fresh = loss_of(function, [tensor.clone() for tensor in inputs], of, **options)
    plain = loss_of(function, [tensor.detach() for tensor in inputs], of, **options)
    assert made == []
    for other in (without, fresh, plain):
        assert torch.equal(other, loss)
        assert not other.requires_grad
    loss_of(function, inputs, of, **options)
    assert made  # so that it was empty for a reason


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_of_the_rows_where_none_is_wanted(mode: Callable[[], Any]) -> None:
    of = case()
    (predictor,), band = leaves(of.joint[1]), band_of(of)
    with mode():
        rows = gather_predictor(predictor, band)
    assert not rows.requires_grad
    assert not gather_predictor(predictor.detach(), band).requires_grad
    assert torch.equal(rows, gather_predictor(predictor, band))


@pytest.mark.parametrize("function", ["simple", "smoothed"])
def test_no_gradient_memory_where_none_is_wanted(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(frames=(20,) * 8, labels=(5,) * 8, classes=600)
    inputs = leaves(*simple_inputs(of), dtype=torch.float32)
    of_gradients = sum(tensor.nbytes for tensor in inputs)
    peaks = []
    for mode in (torch.no_grad, torch.enable_grad):
        counting = Counting()

        def arguments(tensor: Tensor, counting: Counting = counting) -> dict[str, Any]:
            return {"threads": 2, "allocate": lambda shape, dtype: torch.from_numpy(counting(shape, dtype))}

        monkeypatch.setattr(torch_pruned, "core_arguments", arguments)
        with mode():
            loss_of(function, inputs, of)
        peaks.append(counting.most)
    assert peaks[0] < of_gradients <= peaks[1]


@pytest.mark.parametrize("function", ["simple", "smoothed", "banded joint"])
@of_each_reduction
def test_only_one_input_needs_a_gradient(function: str, reduction: str) -> None:
    of = case()
    everything = leaves(*inputs_of(function, of), dtype=torch.float32)
    loss = loss_of(function, everything, of, reduction=reduction)
    wanted = torch.autograd.grad(loss, everything, torch.full_like(loss, 0.5))
    for one, gradient in enumerate(wanted):
        inputs = [tensor.detach().requires_grad_(i == one) for i, tensor in enumerate(everything)]
        loss = loss_of(function, inputs, of, reduction=reduction)
        loss.backward(torch.full_like(loss, 0.5))
        assert same([tensor.grad for tensor in inputs], [gradient if i == one else None for i in range(len(inputs))])


# Memory layouts, padding, utterances that have no gradient.


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

    band = band_of(of)

    def run(targets: Any, frames: Any, labels: Any) -> list[Tensor]:
        given = dataclasses.replace(of, targets=targets, frames=frames, labels=labels)
        loss = loss_of(function, inputs, given, reduction="none", band=band)
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
    masks = [padding_of(of, band_of(of))] if function == "banded" else [of.padding(tensor) for tensor in clean[:2]]
    assert all(mask.any() for mask in masks)
    results = []
    for value in (None, torch.nan, torch.inf):
        inputs = [tensor.detach().clone() for tensor in clean]
        for tensor, mask in zip(inputs, masks, strict=False) if value is not None else []:
            tensor[mask] = value
        inputs = [tensor.requires_grad_() for tensor in inputs]
        loss = loss_of(function, inputs, of, reduction=reduction)
        gradients = torch.autograd.grad(loss, inputs, torch.full_like(loss, -1.25))
        results.append([loss, *gradients])
        for gradient, mask in zip(gradients, masks, strict=False):
            assert (gradient[mask] == 0).all()
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("upstream", [5.0, torch.nan])  # what sends NaN back is the loss's own, as in its square
@of_each_function
def test_an_utterance_with_nan_leaves_the_others_alone(function: str, upstream: float) -> None:
    of = case()
    inputs = leaves(*inputs_of(function, of))
    weights = [1.5, -0.75, 0.0, 2.0]
    _, exact = expected(function, inputs, of, weights)
    with torch.no_grad():
        inputs[0][2, 0] = torch.nan
    loss = loss_of(function, inputs, of, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False]
    gradients = torch.autograd.grad(loss, inputs, torch.tensor([*weights[:2], upstream, weights[3]], dtype=torch.float64))
    expect_gradients(gradients, exact)


def test_a_band_of_an_utterance_with_nan() -> None:
    of = case()
    am, lm = (tensor.clone() for tensor in simple_inputs(of))
    am[2, 0] = torch.nan
    _, occupancy = simple_rnnt_loss(am, lm, *of.integers)
    band, wanted = prune(occupancy, of.frames, of.labels, s_range=3), band_of(of)
    np.testing.assert_array_equal(band.first[[0, 1, 3]], wanted.first[[0, 1, 3]])
    assert band.mass[2] == 0.0


@of_each_function
def test_an_utterance_without_a_path(function: str) -> None:
    of = case(frames=(4, 2), labels=(3, 3))
    inputs = leaves(*inputs_of(function, of, "modified"))
    options = {"topology": "modified", "reduction": "none"}
    _, exact = expected(function, inputs, of, [1.0, 1.0], topology="modified")
    for infeasible, reported in (("inf", torch.inf), ("zero", 0.0)):
        loss = loss_of(function, inputs, of, infeasible=infeasible, **options)
        assert loss[1] == reported
        assert loss[0].isfinite()
        expect_gradients(torch.autograd.grad(loss, inputs, torch.ones_like(loss)), exact)
    with pytest.raises(ValueError, match=r"targets: expected a path .* utterances \[1\]"):
        loss_of(function, inputs, of, infeasible="raise", **options)


# Changes between forward and backward.


@pytest.mark.parametrize(
    ("function", "reduction", "changed"),
    [
        *(("banded", reduction, i) for reduction in REDUCTIONS for i in (0, -1)),
        *(("banded joint", "none", i) for i in (0, 1, 2, 3, -1)),
    ],
)
def test_changes_before_backward_raise(function: str, reduction: str, changed: int) -> None:
    of = case()
    inputs, targets = leaves(*inputs_of(function, of)), of.targets.clone()
    band = band_of(of)
    call = rnnt_loss if function == "banded" else joint_rnnt_loss
    loss = call(*inputs, targets, of.frames, of.labels, reduction=reduction, band=band)
    with torch.no_grad():
        (targets if changed == -1 else inputs[changed]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize(
    ("function", "reduction"),
    [*((f, r) for f in ("simple", "smoothed") for r in REDUCTIONS), ("banded joint", "mean"), ("banded joint", "sum")],
)
def test_gradients_made_with_the_loss_are_those_of_then(function: str, reduction: str) -> None:
    of = case()
    inputs, others = leaves(*inputs_of(function, of)), leaves(*inputs_of(function, of))
    loss, wanted = (loss_of(function, each, of, reduction=reduction) for each in (inputs, others))
    with torch.no_grad():
        for tensor in inputs:
            tensor.fill_(torch.nan)
    upstream = torch.full_like(loss, -0.5)
    assert same(torch.autograd.grad(loss, inputs, upstream), torch.autograd.grad(wanted, others, upstream))


@pytest.mark.parametrize("function", ["simple", "smoothed"])
def test_changes_of_occupancies_do_not_reach_the_gradient(function: str) -> None:
    of = case()
    inputs = leaves(*simple_inputs(of))
    options = SMOOTHING if function == "smoothed" else {}
    loss, occupancy = simple_rnnt_loss(*inputs, *of.integers, **options)
    (wanted,) = torch.autograd.grad(loss, inputs[:1], retain_graph=True)
    for tensor in (occupancy.blank, occupancy.label):
        tensor.fill_(torch.nan)
    assert same(torch.autograd.grad(loss, inputs[:1]), [wanted])
    assert not loss.isnan()


# Derivatives by finite differences, and derivatives of derivatives.


@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.25, 0.0), (0.0, 0.3), (0.25, 0.125), (0.0, 1.0)])
@pytest.mark.parametrize("options", [{}, {"topology": "constrained", "reduction": "none"}], ids=str)
def test_gradcheck_of_the_simple_loss(scales: tuple[float, float], options: dict[str, Any]) -> None:
    of = case(frames=(3, 2), labels=(2, 1), classes=4)

    def loss(am: Tensor, lm: Tensor) -> Tensor:
        return simple_rnnt_loss(am, lm, *of.integers, lm_only_scale=scales[0], am_only_scale=scales[1], **options)[0]

    assert torch.autograd.gradcheck(loss, leaves(*simple_inputs(of)))


@pytest.mark.parametrize("function", ["banded", "banded joint"])
def test_gradcheck_in_a_band(function: str) -> None:
    of = case(frames=(3, 2), labels=(2, 1), classes=4, features=3)
    band = band_of(of, s_range=2)
    assert band.width == 2
    inputs = (in_band(of.logits, band),) if function == "banded" else of.joint
    call, options = (rnnt_loss, {}) if function == "banded" else (joint_rnnt_loss, {"occupancy_floor": 0.0})
    assert torch.autograd.gradcheck(
        lambda *inputs: call(*inputs, *of.integers, band=band, reduction="none", **options), leaves(*inputs)
    )


def test_gradcheck_of_the_rows() -> None:
    of = case(frames=(3, 2), labels=(2, 1), features=3)
    band = band_of(of, s_range=2)
    assert torch.autograd.gradcheck(lambda predictor: gather_predictor(predictor, band), leaves(of.joint[1]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_the_module(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(frames=(3, 2), labels=(2, 1), classes=4, features=3)
    torch.manual_seed(0)
    module = PrunedRNNTLoss(3, 4, s_range=2, am_only_scale=0.125, reduction=reduction, warm_step=2, occupancy_floor=0.0)
    module.double()
    module.step = 1
    module.eval()
    band = module(*of.joint[:2], *of.integers).band
    assert band.width == 2
    monkeypatch.setattr(torch_pruned, "prune", lambda *args, **options: band)
    names = [name for name, _ in module.named_parameters()]

    def loss(encoder: Tensor, predictor: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, named, (encoder, predictor, *of.integers)).loss

    assert torch.autograd.gradcheck(loss, leaves(*of.joint[:2], *(each.detach() for each in module.parameters())))


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


def test_second_order_of_the_rows_raises() -> None:
    of = case()
    (predictor,) = leaves(of.joint[1])
    rows = gather_predictor(predictor, band_of(of)).square().sum()
    (gradient,) = torch.autograd.grad(rows, predictor, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


# Autocast and threads.


@pytest.mark.parametrize("function", ["simple", "smoothed", "banded"])
def test_autocast_leaves_what_it_is_given_alone(function: str) -> None:
    of = case()
    for dtype in DTYPES:
        inputs = leaves(*inputs_of(function, of), dtype=dtype)
        outside = loss_of(function, inputs, of)
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss_of(function, inputs, of)
        assert inside.dtype == outside.dtype
        assert torch.equal(inside, outside)
        assert same(torch.autograd.grad(inside, inputs), torch.autograd.grad(outside, inputs))


@of_each_reduction
def test_the_module_under_autocast(reduction: str) -> None:
    of = case()
    torch.manual_seed(0)
    module = PrunedRNNTLoss(6, 13, s_range=3, am_only_scale=0.125, reduction=reduction, occupancy_floor=0.0)
    inputs = leaves(*of.joint[:2], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*inputs, *of.integers)
    assert out.loss.dtype == out.simple_loss.dtype == out.pruned_loss.dtype == torch.float32
    everything = [*inputs, *module.parameters()]
    got = torch.autograd.grad(out.loss, everything, torch.ones_like(out.loss))
    assert all(gradient.dtype == torch.float32 for gradient in got)

    half = copy.deepcopy(module).bfloat16()
    half.step = 0
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    other = half(*rounded, *of.integers)
    np.testing.assert_array_equal(other.band.first, out.band.first)
    assert torch.equal(other.loss, out.loss)
    wanted = torch.autograd.grad(other.loss, [*rounded, *half.parameters()], torch.ones_like(other.loss))
    for gradient, e in zip(got, wanted, strict=True):  # of both losses' gradients one sums in half, the other in single
        assert error(gradient, e.double()) <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("strategy", ["local", "optimal"])
@of_each_function
@pytest.mark.usefixtures("thread_count")
def test_any_number_of_threads_gives_the_same_bits(function: str, strategy: str) -> None:
    of, results = case(frames=(40, 25, 33), labels=(14, 9, 0), classes=200, features=24), []
    inputs = leaves(*inputs_of(function, of), dtype=torch.float32)
    arcs = leaves(*simple_inputs(of), of.joint[1], dtype=torch.float32)
    for number in (1, 2, 4):
        torch.set_num_threads(number)
        loss = loss_of(function, inputs, of)
        _, occupancy = simple_rnnt_loss(*arcs[:2], *of.integers, **SMOOTHING)
        band = prune(occupancy, of.frames, of.labels, strategy=strategy)
        rows = gather_predictor(arcs[2], band)
        (by_rows,) = torch.autograd.grad(rows.square().sum(), arcs[2])
        first, mass = map(torch.as_tensor, (band.first, band.mass))
        results.append([loss, *torch.autograd.grad(loss, inputs), occupancy.blank, occupancy.label, first, mass, rows, by_rows])
    assert same(results[0], results[1])
    assert same(results[0], results[2])


# The module.


def module_and_inputs(of: Case, **options: Any) -> tuple[PrunedRNNTLoss, list[Tensor]]:
    torch.manual_seed(3)
    return PrunedRNNTLoss(6, 13, **{"s_range": 3, **options}), leaves(*of.joint[:2], dtype=torch.float32)


def separately(module: PrunedRNNTLoss, of: Case, am: Tensor, lm: Tensor, encoder: Tensor, predictor: Tensor,
               smoothing: dict[str, float], joint: dict[str, Any], **common: Any) -> tuple[Tensor, Tensor, Band]:  # fmt: skip
    """Both losses and the band, by the functions."""
    simple, occupancy = simple_rnnt_loss(module.simple_encoder(am), module.simple_predictor(lm), *of.integers, **smoothing, **common)
    band = prune(occupancy, of.frames, of.labels, s_range=3, topology=common.get("topology", "regular"))
    layer = module.output
    return simple, joint_rnnt_loss(encoder, predictor, layer.weight, layer.bias, *of.integers, band=band, **joint, **common), band


@pytest.mark.parametrize(
    ("common", "smoothing", "joint"),
    [
        ({}, {}, {}),
        ({"reduction": "none", "fastemit_lambda": 0.25}, {"lm_only_scale": 0.0}, {"hat": True}),
        ({"reduction": "sum", "topology": "modified", "delay_penalty": 0.1}, SMOOTHING, {"workspace": "1MiB"}),
        ({"topology": "constrained", "infeasible": "zero", "blank": -1}, SMOOTHING, {"activation": "relu", "occupancy_floor": 0.0}),
    ],
    ids=str,
)
def test_the_module_is_the_weighted_sum_of_the_functions(
    common: dict[str, Any], smoothing: dict[str, float], joint: dict[str, Any]
) -> None:
    of = case(frames=(9, 1, 7, 5))
    module, inputs = module_and_inputs(of, warm_step=10, simple_scale=0.25, **common, **smoothing, **joint)
    module.step = 5
    smoothing = {"lm_only_scale": 0.25, "am_only_scale": 0.0, **smoothing}
    simple, pruned, band = separately(module, of, *inputs, *inputs, smoothing, joint, **common)
    out = module(*inputs, *of.integers)
    assert torch.equal(out.simple_loss, simple)
    assert torch.equal(out.pruned_loss, pruned)
    np.testing.assert_array_equal(out.band.first, band.first)
    wanted = (1.0 - 0.5 * 0.75) * simple + (0.1 + 0.5 * 0.9) * pruned
    torch.testing.assert_close(out.loss, wanted)
    everything = [*inputs, *module.parameters()]
    upstream = torch.full_like(wanted, -1.5)
    gradients = torch.autograd.grad(out.loss, everything, upstream)
    for gradient, e in zip(gradients, torch.autograd.grad(wanted, everything, upstream), strict=True):
        assert error(gradient, e.double()) <= 4 * torch.finfo(torch.float32).eps


def test_the_strategy_of_the_module() -> None:
    of = case()
    local, optimal = (module(*inputs, *of.integers).band for module, inputs in (
        module_and_inputs(of, strategy=strategy) for strategy in ("local", "optimal")
    ))  # fmt: skip
    assert optimal.mass[0] > local.mass[0]
    np.testing.assert_array_equal(optimal.mass[1:], local.mass[1:])


def test_the_module_against_the_reference() -> None:
    of = case()
    module, _ = module_and_inputs(of, warm_step=0, simple_scale=0.3, am_only_scale=0.125, reduction="sum", occupancy_floor=0.0)
    module.double()
    inputs = leaves(*of.joint[:2])
    out = module(*inputs, *of.integers)
    projections = [
        layer(tensor).detach() for layer, tensor in zip((module.simple_encoder, module.simple_predictor), inputs, strict=True)
    ]
    simple, by_logits, arcs = reference.simple_rnnt_loss(
        *(each.numpy() for each in projections), *of.integers, lm_only_scale=0.25, am_only_scale=0.125
    )
    first, width, _ = reference.prune(*arcs, of.frames, of.labels, s_range=3)
    np.testing.assert_array_equal(out.band.first, first)
    layer = [each.detach().numpy() for each in module.output.parameters()]
    arrays = [tensor.detach().numpy() for tensor in inputs]
    pruned, by_joint = reference.joint_rnnt_loss(*arrays, *layer, *of.integers, first=first, width=width)
    expect_loss(out.loss, torch.as_tensor(0.3 * simple.sum() + pruned.sum()))
    exact: list[Any] = []
    for of_input, of_logits, linear in zip(by_joint, by_logits, (module.simple_encoder, module.simple_predictor), strict=False):
        exact.append(of_input + 0.3 * of_logits @ linear.weight.detach().numpy())
    for of_logits, array in zip(by_logits, arrays, strict=True):
        flat = of_logits.reshape(-1, 13)
        exact += [0.3 * flat.T @ array.reshape(len(flat), -1), 0.3 * flat.sum(axis=0)]
    exact += by_joint[2:]
    expect_gradients(torch.autograd.grad(out.loss, [*inputs, *module.parameters()]), [torch.as_tensor(e) for e in exact])


def test_separate_inputs_to_the_simple_projections() -> None:
    of = case()
    torch.manual_seed(3)
    module = PrunedRNNTLoss(6, 13, encoder_features=4, predictor_features=5, s_range=3)
    assert module.simple_encoder.weight.shape == (13, 4)
    assert module.simple_predictor.weight.shape == (13, 5)
    encoder, predictor, am, lm = leaves(*of.joint[:2], of.joint[0][..., :4], of.joint[1][..., :5], dtype=torch.float32)
    out = module(encoder, predictor, *of.integers, simple_encoder=am, simple_predictor=lm)
    simple, pruned, _ = separately(
        module, of, am, lm, encoder, predictor, {"lm_only_scale": 0.25}, {}
    )
    assert torch.equal(out.simple_loss, simple)
    assert torch.equal(out.pruned_loss, pruned)
    out.loss.backward()
    for tensor, part, weight in ((am, simple, 1.0), (lm, simple, 1.0), (encoder, pruned, 0.1), (predictor, pruned, 0.1)):
        (wanted,) = torch.autograd.grad(part, tensor, torch.tensor(weight), retain_graph=True)
        assert error(tensor.grad, wanted.double()) <= 2 * torch.finfo(torch.float32).eps
    # One of them may be the joint's.
    module = PrunedRNNTLoss(6, 13, predictor_features=5).eval()
    first, second = (
        module(encoder, predictor, *of.integers, simple_predictor=lm, **more) for more in ({}, {"simple_encoder": encoder})
    )
    assert torch.equal(first.loss, second.loss)


@pytest.mark.parametrize(("step", "weights"), [(0, (1.0, 0.1)), (2, (0.75, 0.55)), (4, (0.5, 1.0)), (9, (0.5, 1.0))])
@of_each_reduction
def test_the_warm_up(step: int, weights: tuple[float, float], reduction: str) -> None:
    of = case()
    module, inputs = module_and_inputs(of, warm_step=4, reduction=reduction)
    module.step = step
    assert module.weights() == pytest.approx(weights)
    for train in (False, True):
        out = module.train(train)(*inputs, *of.integers)
        torch.testing.assert_close(out.loss, weights[0] * out.simple_loss + weights[1] * out.pruned_loss)
        assert module.step == step + train


def test_no_warm_up() -> None:
    assert PrunedRNNTLoss(6, 13, warm_step=0, simple_scale=0.125).weights() == (0.125, 1.0)
    assert PrunedRNNTLoss(6, 13, warm_step=0, simple_scale=0.0).weights() == (0.0, 1.0)


def test_steps_are_counted_in_training_mode_only() -> None:
    of = case()
    module, inputs = module_and_inputs(of)
    assert module.step == 0
    for _ in range(3):
        module(*inputs, *of.integers)
    assert module.step == 3
    module.eval()
    module(*inputs, *of.integers)
    assert module.step == 3
    module.train()
    with pytest.raises(ValueError, match=r"^(encoder|am)_lengths: expected lengths"):
        module(*inputs, of.targets, [99] * 4, of.labels)
    assert module.step == 3  # a call that failed was none
    module(*inputs, *of.integers)
    assert module.step == 4


def test_dropout_in_training_mode_only() -> None:
    of = case()
    module, inputs = module_and_inputs(of, dropout=0.5, seed=1)
    plain, _ = module_and_inputs(of)
    layer = module.output
    for train, dropout in ((True, 0.5), (False, 0.0)):
        out = module.train(train)(*inputs, *of.integers)
        wanted = joint_rnnt_loss(
            *inputs, layer.weight, layer.bias, *of.integers, band=out.band, dropout=dropout, seed=1
        )
        assert torch.equal(out.pruned_loss, wanted)
        without = plain(*inputs, *of.integers)
        assert torch.equal(out.simple_loss, without.simple_loss)
        assert torch.equal(out.pruned_loss, without.pruned_loss) is not train


def test_the_state() -> None:
    of = case()
    module, inputs = module_and_inputs(of, warm_step=10)
    parameters = ["output.bias", "output.weight", *(f"simple_{x}.{y}" for x in ("encoder", "predictor") for y in ("bias", "weight"))]
    assert sorted(name for name, _ in module.named_parameters()) == parameters
    assert len(list(PrunedRNNTLoss(6, 13, bias=False).parameters())) == 5
    for _ in range(3):
        module(*inputs, *of.integers)
    file = io.BytesIO()
    torch.save({"model": module.state_dict()}, file)
    file.seek(0)
    for state in (module.state_dict(), torch.load(file)["model"], torch.load(io.BytesIO(file.getvalue()), weights_only=True)["model"]):
        other = PrunedRNNTLoss(6, 13, s_range=3, warm_step=10)
        assert (other.step, module.step) == (0, 3)
        assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
        assert other.step == 3
        assert other.weights() == module.weights() != (1.0, 0.1)
        assert torch.equal(other.eval()(*inputs, *of.integers).loss, module.eval()(*inputs, *of.integers).loss)
        module.train()
    # As part of a model, as models are made and kept.
    model = torch.nn.ModuleDict({"loss": module})
    twin = copy.deepcopy(model)
    twin["loss"].step = 0
    twin.load_state_dict(model.state_dict())
    assert twin["loss"].step == 3
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)["loss"].step == 3


def test_without_a_bias() -> None:
    of = case()
    module, inputs = module_and_inputs(of, bias=False)
    assert module.output.bias is None
    with_zeros, _ = module_and_inputs(of)
    with_zeros.load_state_dict({**module.state_dict(), "output.bias": torch.zeros(13)})
    results = []
    for each in (module, with_zeros):
        out = each(*inputs, *of.integers)
        results.append([out.loss, *torch.autograd.grad(out.loss, [*inputs, each.output.weight])])
    assert same(*results)


@pytest.mark.parametrize("options", [
    {}, {"topology": "modified", "strategy": "optimal"}, {"reduction": "sum", "hat": True, "warm_step": 5},
], ids=str)  # fmt: skip
@pytest.mark.usefixtures("thread_count")
def test_it_trains(options: dict[str, Any]) -> None:
    """Frames that say which label is due; the predictor only knows how many there were."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # those of torch wait for each other where processors are busy
    classes, labels, per_label = 7, 6, 3
    targets = torch.randint(1, classes, (4, labels))
    frames = torch.nn.functional.one_hot(targets.repeat_interleave(per_label, dim=1), classes).float()
    encoder, predictor = torch.nn.Linear(classes, 16), torch.nn.Embedding(labels + 1, 16)
    module = PrunedRNNTLoss(16, classes, s_range=3, **{"warm_step": 10, **options})
    everything = [*encoder.parameters(), *predictor.parameters(), *module.parameters()]
    optimizer = torch.optim.SGD(everything, lr=0.1 if options.get("reduction") == "sum" else 0.3)
    lengths = ([labels * per_label, 9, 15, 12], [labels, 3, 5, 4])
    values = []
    for _ in range(20):
        out = module(encoder(frames), predictor.weight.expand(4, -1, -1), targets, *lengths)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        values.append((out.simple_loss.item(), out.pruned_loss.item()))
        assert out.band.mass.min() > 0.0
    assert module.step == 20
    for first, last in zip(values[0], values[-1], strict=True):
        assert last < 0.5 * first


# Errors.


OF_ALL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"targets": torch.zeros(4, 5)}, TypeError, "targets: expected integers, got dtype float32"),
    ({"targets": torch.zeros(3, 5).long()}, ValueError, r"targets: expected shape \(B, U\) = \(4, 5\), got \(3, 5\)"),
    ({"targets": torch.full((4, 5), 13)}, ValueError, r"targets: expected labels in \[0, V = 13\), got 13 at index \(0, 0\)"),
    ({"labels": [5, 0, 3]}, ValueError, r"target_lengths: expected shape \(B,\) = \(4,\), got \(3,\)"),
    ({"labels": [5, 0, -3, 4]}, ValueError, r"target_lengths: .* got -3 at index 2"),
    ({"labels": [5.0, 0.0, 3.0, 4.0]}, TypeError, "target_lengths: expected integers"),
    ({"frames": [9, 1, 7, 10]}, ValueError, r"(logit|encoder|am)_lengths: expected lengths in \[1, T = 9\], got 10 at index 3"),
    ({"frames": [9, 0, 7, 4]}, ValueError, r"(logit|encoder|am)_lengths: expected lengths in \[1, T = 9\], got 0 at index 1"),
    ({"blank": 13}, ValueError, r"blank: expected a class in \[-13, 13\), got 13"),
    ({"reduction": "average"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'average'"),
    ({"topology": "normal"}, ValueError, "topology: expected one of .* got 'normal'"),
    ({"infeasible": "nan"}, ValueError, "infeasible: expected one of .* got 'nan'"),
    ({"fastemit_lambda": -0.5}, ValueError, "fastemit_lambda: expected 0 or more, got -0.5"),
    ({"delay_penalty": float("nan")}, ValueError, "delay_penalty: expected a finite number, got nan"),
]


@of_each_function
@pytest.mark.parametrize(("wrong", "kind", "message"), OF_ALL)
def test_wrong_arguments_are_named(function: str, wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    of = case()
    integers = [wrong.get("targets", of.targets), wrong.get("frames", of.frames), wrong.get("labels", of.labels)]
    options = {name: value for name, value in wrong.items() if name not in ("targets", "frames", "labels")}
    call = {"banded": rnnt_loss, "banded joint": joint_rnnt_loss}.get(function, simple_rnnt_loss)
    options.update({"band": band_of(of)} if function.startswith("banded") else SMOOTHING if function == "smoothed" else {})
    with pytest.raises(kind, match=f"^{message}"):
        call(*inputs_of(function, of), *integers, **options)


@pytest.mark.parametrize(
    ("at", "change", "kind", "message"),
    [
        (0, lambda x: x.numpy(), TypeError, "am: expected a torch.Tensor, got ndarray"),
        (0, lambda x: x[0], ValueError, r"am: expected 3 dimensions \(B, T, V\), got shape \(9, 13\)"),
        (0, lambda x: x.long(), TypeError, "am: expected dtype float16, .* got int64"),
        (0, lambda x: x[:0], ValueError, "am: expected at least one of each"),
        (0, lambda x: x[:3], ValueError, r"lm: expected shape \(B, U\+1, V\) = \(3, 6, 13\), got \(4, 6, 13\)"),
        (1, lambda x: None, TypeError, "lm: expected a torch.Tensor, got NoneType"),
        (1, lambda x: x[0], ValueError, r"lm: expected 3 dimensions \(B, U\+1, V\), got shape \(6, 13\)"),
        (1, lambda x: x[..., 1:], ValueError, r"lm: expected shape \(B, U\+1, V\) = \(4, 6, 13\), got \(4, 6, 12\)"),
        (1, lambda x: x[:, 1:], ValueError, r"target_lengths: expected lengths in \[0, U = 4\], got 5 at index 0"),
        (1, lambda x: x.float(), TypeError, "lm: expected dtype float64 as am, got float32"),
    ],
)
def test_wrong_inputs_of_the_simple_loss_are_named(
    at: int, change: Callable[[Tensor], Any], kind: type[Exception], message: str
) -> None:
    of = case()
    inputs: list[Any] = list(simple_inputs(of))
    inputs[at] = change(inputs[at])
    with pytest.raises(kind, match=f"^{message}"):
        simple_rnnt_loss(*inputs, *of.integers)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lm_only_scale": -0.1}, ValueError, r"lm_only_scale: expected a share in \[0, 1\], got -0.1"),
        ({"am_only_scale": 1.5}, ValueError, r"am_only_scale: expected a share in \[0, 1\], got 1.5"),
        ({"lm_only_scale": 0.75, "am_only_scale": 0.5}, ValueError, "am_only_scale: expected at most .* 0.25, got 0.5"),
        ({"am_only_scale": "much"}, TypeError, "am_only_scale: expected a number, got str"),
        ({"lm_only_scale": float("nan")}, ValueError, "lm_only_scale: expected a finite number, got nan"),
    ],
)
def test_wrong_scales_are_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    of = case()
    with pytest.raises(kind, match=f"^{message}"):
        simple_rnnt_loss(*simple_inputs(of), *of.integers, **options)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"occupancy": None}, TypeError, "occupancy: expected an Occupancy, got NoneType"),
        ({"occupancy": torch.zeros(4, 9, 6)}, TypeError, "occupancy: expected an Occupancy, got Tensor"),
        ({"am_lengths": [9, 1, 7]}, ValueError, r"am_lengths: expected shape \(B,\) = \(4,\), got \(3,\)"),
        ({"am_lengths": [9, 1, 7, 10]}, ValueError, r"am_lengths: expected lengths in \[1, T = 9\], got 10 at index 3"),
        ({"target_lengths": [6, 0, 3, 4]}, ValueError, r"target_lengths: expected lengths in \[0, U = 5\], got 6 at index 0"),
        ({"s_range": 0}, ValueError, "s_range: expected 1 or more, got 0"),
        ({"s_range": 2.5}, TypeError, "s_range: expected an int, got float"),
        ({"strategy": "global"}, ValueError, "strategy: expected one of 'local', 'optimal', got 'global'"),
        ({"topology": "normal"}, ValueError, "topology: expected one of .* got 'normal'"),
    ],
)
def test_wrong_arguments_of_prune_are_named(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    of = case()
    arguments = {"am_lengths": of.frames, "target_lengths": of.labels, **wrong}
    if "occupancy" not in wrong:
        arguments["occupancy"] = simple_rnnt_loss(*simple_inputs(of), *of.integers)[1]
    with pytest.raises(kind, match=f"^{message}"):
        prune(**arguments)


def test_occupancies_of_unlike_shapes_are_named() -> None:
    blank, label = torch.zeros(4, 9, 6), torch.zeros(4, 9, 5)
    with pytest.raises(ValueError, match=r"^occupancy.label: expected shape \(B, T, U\+1\) = \(4, 9, 6\), got \(4, 9, 5\)"):
        prune(Occupancy(blank, label, None), [9] * 4, [5] * 4)


def test_prune_takes_occupancies_of_the_core() -> None:
    from transducer_loss import occupancy

    of = case()
    am, lm = simple_inputs(of)
    of_core = occupancy((am[:, :, None] + lm[:, None]).numpy(), of.targets.numpy(), of.frames, of.labels)
    assert isinstance(of_core.blank, np.ndarray)
    np.testing.assert_array_equal(prune(of_core, of.frames, of.labels, s_range=3).first, band_of(of).first)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda x, band: (x.numpy(), band), TypeError, "predictor: expected a torch.Tensor, got ndarray"),
        (lambda x, band: (x[0], band), ValueError, r"predictor: expected 3 dimensions \(B, U\+1, H\), got shape \(6, 6\)"),
        (lambda x, band: (x.long(), band), TypeError, "predictor: expected dtype float16"),
        (lambda x, band: (x[:, :5], band), ValueError, "band: expected one of 4 utterances of less than 5 labels"),
        (lambda x, band: (x[:3], band), ValueError, "band: expected one of 3 utterances"),
        (lambda x, band: (x, None), TypeError, "band: expected a Band, got NoneType"),
        (lambda x, band: (x, band.to_ranges()), TypeError, "band: expected a Band, got ndarray"),
    ],
)
def test_wrong_arguments_of_the_rows_are_named(change: Callable[..., Any], kind: type[Exception], message: str) -> None:
    of = case()
    with pytest.raises(kind, match=f"^{message}"):
        gather_predictor(*change(of.joint[1], band_of(of)))


@pytest.mark.parametrize("function", ["banded", "banded joint"])
def test_wrong_bands_are_named(function: str) -> None:
    of = case()
    call = rnnt_loss if function == "banded" else joint_rnnt_loss
    inputs, band = inputs_of(function, of), band_of(of)
    for other, kind, message in (
        (band.to_ranges(), TypeError, "band: expected a Band, got ndarray"),
        (band_of(case(frames=(9, 1, 6, 4))), ValueError, "band: expected the band of this batch, of frame lengths"),
        (band_of(case(labels=(5, 0, 2, 4))), ValueError, "band: expected the band of this batch, of target lengths"),
        (band_of(case((9, 1, 7), (5, 0, 3))), ValueError, "band: expected the band of this batch"),
    ):
        with pytest.raises(kind, match=f"^{message}"):
            call(*inputs, *of.integers, band=other)
    if function == "banded":
        with pytest.raises(ValueError, match=r"^logits: expected shape \(B, T, S, V\) = \(4, 9, 3, 13\), got \(4, 9, 6, 13\)"):
            rnnt_loss(of.logits, *of.integers, band=band)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"reduction": "average"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'average'"),
        ({"strategy": "global"}, ValueError, "strategy: expected one of 'local', 'optimal', got 'global'"),
        ({"s_range": 0}, ValueError, "s_range: expected 1 or more, got 0"),
        ({"s_range": 2.5}, TypeError, "s_range: expected an int, got float"),
        ({"warm_step": -1}, ValueError, "warm_step: expected 0 or more, got -1"),
        ({"warm_step": 1.5}, TypeError, "warm_step: expected an int, got float"),
        ({"simple_scale": float("inf")}, ValueError, "simple_scale: expected a finite number, got inf"),
        ({"simple_scale": None}, TypeError, "simple_scale: expected a number, got NoneType"),
    ],
)
def test_the_module_checks_its_own_options_at_once(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        PrunedRNNTLoss(6, 13, **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"topology": "normal"}, ValueError, "topology: expected one of"),
        ({"blank": 13}, ValueError, "blank: expected a class"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"lm_only_scale": 2.0}, ValueError, "lm_only_scale: expected a share"),
        ({"workspace": 1}, ValueError, "workspace: expected at least [0-9]+ bytes"),
        ({"activation": "softplus"}, ValueError, "activation: expected one of"),
        ({"beam": 4}, TypeError, ".*beam"),
    ],
)
def test_other_options_of_the_module_are_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    of = case()
    with pytest.raises(kind, match=f"^{message}"):  # at once or when they are used
        PrunedRNNTLoss(6, 13, **options)(*(tensor.float() for tensor in of.joint[:2]), *of.integers)


def test_wrong_inputs_of_the_module_are_named() -> None:
    of = case()
    module, (encoder, predictor) = module_and_inputs(of)
    with pytest.raises(ValueError, match=r"^targets: expected shape \(B, U\) = \(4, 5\), got \(4, 4\)"):
        module(encoder, predictor, of.targets[:, 1:], of.frames, of.labels)
    with pytest.raises(ValueError, match=r"^target_lengths: expected lengths in"):
        module(encoder, predictor[:, :5], *of.integers)
    with pytest.raises(ValueError, match=r"^(lm|predictor): expected shape"):
        module(encoder, predictor[:3], *of.integers)


def test_gradients_of_the_rows_are_the_cores() -> None:
    """What another framework may call for it."""
    of = case()
    (predictor,), band = leaves(of.joint[1]), band_of(of)
    rows = gather_predictor(predictor, band)
    (gradient,) = torch.autograd.grad(rows.square().sum(), predictor)
    wanted = pruning.gather_predictor_backward(2 * rows.detach().numpy(), band, 6)
    np.testing.assert_array_equal(gradient.numpy(), wanted)
