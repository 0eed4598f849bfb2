"""k2's pruned RNN-T by its own names: against the formulas that k2 documents, written out here with torch's own operators.

px (B, S, T) and py (B, S + 1, T) are the log-probabilities of the next symbol and of the terminator in each cell, as k2 lays
them out. A loss is minus the log of the sum over paths, made arc by arc; its occupancies are what autograd says of that.
"""

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import TOPOLOGIES
from naive_torch import error, leaves, same
from transducer_loss import reference
from transducer_loss.adapters import torch as losses
from transducer_loss.adapters.compat import k2
from transducer_loss.check import budgets

FRAMES, LABELS, CLASSES = [7, 4, 1, 6], [4, 2, 0, 3], 6
WEIGHTS = [1.5, -0.75, 0.0, 2.0]
EXACT = 1e-11  # relative, of sums in float64 made in another order

of_each_type = pytest.mark.parametrize("rnnt_type", TOPOLOGIES)
of_each_scale = pytest.mark.parametrize(("lm_only", "am_only"), [(0.0, 0.0), (0.25, 0.0), (0.0, 0.4), (0.1, 0.2), (0.0, 1.0)])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def simple_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """lm and am, in k2's order."""
    lm, am = normal(4, max(LABELS) + 1, CLASSES, seed=1), normal(4, max(FRAMES), CLASSES, seed=2)
    return leaves(2 * lm, 2 * am, dtype=dtype)


def symbols(blank: int = 0) -> Tensor:
    """(B, S), the terminator past an utterance's end, as recipes pad."""
    drawn = torch.randint(1, CLASSES, (4, max(LABELS)), generator=torch.Generator().manual_seed(3))
    drawn = (drawn + blank) % CLASSES
    return drawn.where(torch.arange(max(LABELS)) < torch.tensor(LABELS)[:, None], blank % CLASSES)


def boundary() -> Tensor:
    return torch.tensor([[0, 0, u, t] for t, u in zip(FRAMES, LABELS, strict=True)])


def lengths(given: Tensor | None) -> tuple[list[int], list[int]]:
    """T_b and U_b."""
    return (FRAMES, LABELS) if given is not None else ([max(FRAMES)] * 4, [max(LABELS)] * 4)


# k2's formulas.


def smoothed_log_probs(lm: Tensor, am: Tensor, lm_only: float, am_only: float) -> Tensor:
    """(B, T, S + 1, C). The unigram of am's own term is the average of the whole batch, padding included."""
    both = (am[:, :, None] + lm[:, None]).log_softmax(-1)
    of_lm = lm.log_softmax(-1)[:, None]
    of_am = (am + lm.softmax(-1).mean((0, 1)).log()).log_softmax(-1)[:, :, None]
    return (1.0 - lm_only - am_only) * both + lm_only * of_lm + am_only * of_am


def hat_log_probs(logits: Tensor, blank: int) -> Tensor:
    """The terminator is a sigmoid of its own, symbols a softmax of what is left."""
    logsigmoid = torch.nn.functional.logsigmoid
    is_blank = torch.arange(logits.shape[-1]) == blank % logits.shape[-1]
    others = logits.masked_fill(is_blank, -torch.inf).log_softmax(-1) + logsigmoid(-logits[..., blank, None])
    return torch.where(is_blank, logsigmoid(logits), others)


def arcs(log_probs: Tensor, y: Tensor, blank: int, rnnt_type: str, delay_penalty: float, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
    """px and py of (B, T, S + 1, C)."""
    batch, T, S1, _ = log_probs.shape
    py = log_probs[..., blank].transpose(1, 2)
    px = log_probs[:, :, :-1].gather(-1, y[:, None, :, None].expand(batch, T, S1 - 1, 1))[..., 0].transpose(1, 2)
    if rnnt_type == "constrained":
        px = px + py[:, 1:]
    middle = (torch.tensor(frames, dtype=torch.float64)[:, None, None] - 1) / 2
    return px + delay_penalty * (middle - torch.arange(T)), py


def loss_of_arcs(px: Tensor, py: Tensor, rnnt_type: str, frames: Sequence[int], labels: Sequence[int]) -> Tensor:
    """(B,)."""
    step, found = int(rnnt_type != "regular"), []
    for b, (T, U) in enumerate(zip(frames, labels, strict=True)):
        sums = {(0, 0): py.new_zeros(())}
        for t in range(T + 1):
            for u in range(U + 1):
                ways = [sums[t - 1, u] + py[b, u, t - 1]] if (t - 1, u) in sums else []
                if (t - step, u - 1) in sums and 0 <= t - step < T:
                    ways.append(sums[t - step, u - 1] + px[b, u - 1, t - step])
                ways = [way for way in ways if way > -torch.inf]  # no path, and no gradient
                if ways:
                    sums[t, u] = torch.logsumexp(torch.stack(ways), 0)
        found.append(-sums[T, U] if (T, U) in sums else py.new_full((), torch.inf))
    return torch.stack(found)


def occupancies(px: Tensor, py: Tensor, rnnt_type: str, frames: Sequence[int], labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What k2 calls px_grad and py_grad: of symbols (B, S, T), with one column more if regular, and of terminators."""
    px, py = leaves(px.detach(), py.detach())
    of_px, of_py = torch.autograd.grad(-loss_of_arcs(px, py, rnnt_type, frames, labels).sum(), (px, py))
    return torch.nn.functional.pad(of_px, (0, 1)) if rnnt_type == "regular" else of_px, of_py


def lower_bound(row: Sequence[int]) -> list[int]:
    return [min(row[i:]) for i in range(len(row))]


def prune_ranges(px_grad: Tensor, py_grad: Tensor, frames: Sequence[int], labels: Sequence[int], s_range: int) -> Tensor:
    """(B, T, s_range): a loop for every sentence of k2's description."""
    batch, S1, T = py_grad.shape
    s_range = S1 if s_range > S1 - 1 else s_range
    furthest = 1 if px_grad.shape[2] == T else s_range - 1
    result = torch.zeros(batch, T, s_range, dtype=torch.int64)
    for b in range(batch):
        rows = []
        for t in range(T):
            scores = [
                py_grad[b, p : p + s_range, t].sum() - (px_grad[b, p - 1, t] if p else 0.0) for p in range(S1 - s_range + 1)
            ]
            rows.append(int(np.argmax([float(score) for score in scores])))
            if t >= frames[b] - 1:
                rows[t] = max(labels[b] - s_range + 1, 0)
        rows = lower_bound(rows)
        left = [max(0, least) for least in lower_bound([furthest * t - p for t, p in enumerate(rows)])]
        for t in range(T):
            result[b, t] = furthest * t - left[t] + torch.arange(s_range)
    return result


def pruned_log_probs(logits: Tensor, ranges: Tensor, rows: int, blank: int, hat: bool) -> Tensor:
    """(B, T, S + 1, C) of the kept cells' logits; -inf in the others."""
    log_probs = hat_log_probs(logits, blank) if hat else logits.log_softmax(-1)
    full = log_probs.new_full((*logits.shape[:2], rows, logits.shape[3]), -torch.inf)
    return full.scatter(2, ranges[..., None].expand(log_probs.shape), log_probs)


def expect_same(value: Tensor, exact: Tensor, dtype: torch.dtype = torch.float64) -> None:
    budget = EXACT if dtype == torch.float64 else budgets("rnnt_loss", str(dtype).removeprefix("torch."), "cpu")[1]
    assert value.shape == exact.shape
    assert value.dtype == dtype
    assert torch.linalg.vector_norm(value.detach().double() - exact) <= budget * max(1e-3, float(torch.linalg.vector_norm(exact)))


# The simple and the smoothed loss.


@of_each_type
@of_each_scale
@pytest.mark.parametrize(("blank", "delay_penalty", "bounded"), [(0, 0.0, True), (-1, 0.25, True), (2, 0.125, False)])
def test_the_smoothed_loss(
    rnnt_type: str, lm_only: float, am_only: float, blank: int, delay_penalty: float, bounded: bool
) -> None:
    lm, am = simple_inputs()
    y, given = symbols(blank), boundary() if bounded else None
    frames, labels = lengths(given)
    px, py = arcs(smoothed_log_probs(lm, am, lm_only, am_only), y, blank, rnnt_type, delay_penalty, frames)
    exact = loss_of_arcs(px, py, rnnt_type, frames, labels)
    options = {"boundary": given, "rnnt_type": rnnt_type, "delay_penalty": delay_penalty, "reduction": "none"}
    loss = k2.rnnt_loss_smoothed(lm, am, y, blank, lm_only, am_only, **options)
    assert error(loss, exact) <= EXACT
    upstream = torch.tensor(WEIGHTS, dtype=torch.float64)
    wanted = torch.autograd.grad(exact, (lm, am), upstream, allow_unused=True)
    for gradient, e in zip(torch.autograd.grad(loss, (lm, am), upstream), wanted, strict=True):
        expect_same(gradient, e)
    # That is what the reference defines.
    by_reference, (by_am, by_lm), _ = reference.simple_rnnt_loss(
        am.detach().numpy(), lm.detach().numpy(), y, frames, labels, lm_only_scale=lm_only, am_only_scale=am_only, blank=blank,
        topology=rnnt_type, delay_penalty=delay_penalty, weights=WEIGHTS, shared_unigram=True,
    )  # fmt: skip
    assert error(exact, by_reference) <= EXACT
    for e, r in zip(wanted, (by_lm, by_am), strict=True):
        expect_same(e, torch.as_tensor(r))

    again, grads = k2.rnnt_loss_smoothed(lm, am, y, blank, lm_only, am_only, **options, return_grad=True)
    assert torch.equal(again, loss)
    assert isinstance(grads, tuple)
    columns = max(FRAMES) + (rnnt_type == "regular")
    assert [tuple(tensor.shape) for tensor in grads] == [(4, max(LABELS), columns), (4, max(LABELS) + 1, max(FRAMES))]
    for tensor, e in zip(grads, occupancies(px, py, rnnt_type, frames, labels), strict=True):
        assert not tensor.requires_grad
        expect_same(tensor, e)
    if rnnt_type == "regular":
        assert (grads[0][:, :, -1] == 0).all()


@of_each_type
def test_the_simple_loss_is_the_smoothed_one_of_no_scale(rnnt_type: str) -> None:
    results = []
    for call in (k2.rnnt_loss_simple, lambda *args, **options: k2.rnnt_loss_smoothed(*args, 0.0, 0.0, **options)):
        lm, am = simple_inputs(torch.float32)
        loss, grads = call(lm, am, symbols(), 0, boundary=boundary(), rnnt_type=rnnt_type, delay_penalty=0.25, return_grad=True)
        results.append([loss, *grads, *torch.autograd.grad(loss, (lm, am))])
        assert torch.equal(call(lm, am, symbols(), 0, boundary=boundary(), rnnt_type=rnnt_type, delay_penalty=0.25), loss)
    assert same(*results)
    logits = simple_inputs(torch.float32)
    by_logits = k2.rnnt_loss(logits[1][:, :, None] + logits[0][:, None], symbols(), 0, boundary(), rnnt_type, 0.25)
    assert error(results[0][0], by_logits.double()) <= budgets("rnnt_loss", "float32", "cpu")[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("am_only", [0.0, 0.4])
def test_the_smoothed_loss_in_other_dtypes(dtype: torch.dtype, am_only: float) -> None:
    lm, am = simple_inputs(dtype)
    by_loss, (by_am, by_lm), _ = reference.simple_rnnt_loss(
        am.detach().double().numpy(), lm.detach().double().numpy(), symbols(), FRAMES, LABELS, lm_only_scale=0.25,
        am_only_scale=am_only, weights=[-2.0 * w for w in WEIGHTS], shared_unigram=True,
    )  # fmt: skip
    loss, grads = k2.rnnt_loss_smoothed(lm, am, symbols(), 0, 0.25, am_only, boundary(), reduction="none", return_grad=True)
    assert {tensor.dtype for tensor in (loss, *grads)} == {torch.float32}
    assert error(loss, by_loss) <= budgets("rnnt_loss", "float32", "cpu")[0]
    gradients = torch.autograd.grad(loss, (lm, am), torch.tensor([-2.0 * w for w in WEIGHTS]))
    for gradient, e in zip(gradients, (by_lm, by_am), strict=True):
        expect_same(gradient, torch.as_tensor(e), dtype)


@pytest.mark.parametrize("am_only", [0.0, 0.4])
def test_reductions_of_the_smoothed_loss(am_only: float) -> None:
    lm, am = simple_inputs(torch.float32)
    arguments = (lm, am, symbols(), 0, 0.25, am_only, boundary())
    each = k2.rnnt_loss_smoothed(*arguments, reduction="none")
    assert torch.equal(k2.rnnt_loss_smoothed(*arguments), each.mean())
    for reduction, share in (("mean", 0.25), ("sum", 1.0)):
        loss = k2.rnnt_loss_smoothed(*arguments, reduction=reduction)
        assert torch.equal(loss, getattr(each, reduction)())
        wanted = torch.autograd.grad(each, (lm, am), torch.full_like(each, -3 * share), retain_graph=True)
        assert same(torch.autograd.grad(loss, (lm, am), torch.tensor(-3.0)), wanted)


@pytest.mark.parametrize("am_only", [0.0, 0.4])
def test_autograd_of_the_smoothed_loss(am_only: float, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, am = simple_inputs()

    def loss(lm: Tensor, am: Tensor) -> Tensor:
        return k2.rnnt_loss_smoothed(lm, am, symbols(), 0, 0.25, am_only, boundary(), reduction="none")

    value = loss(lm, am)
    upstream = torch.tensor(WEIGHTS, dtype=torch.float64)
    wanted = torch.autograd.grad(value, (lm, am), upstream, retain_graph=True)
    kept = [gradient.clone() for gradient in wanted]
    torch.autograd.grad(value, (lm, am), 7 * upstream, retain_graph=True)
    assert same(torch.autograd.grad(value, (lm, am), upstream, retain_graph=True), kept)
    assert same(wanted, kept)
    spread = torch.stack([upstream, 9 * upstream], -1)[:, 0]
    assert same(torch.autograd.grad(value, (lm, am), spread), kept)
    # One of them, and none.
    assert same(torch.autograd.grad(loss(lm, am.detach()), lm, upstream), kept[:1])
    assert same(torch.autograd.grad(loss(lm.detach(), am), am, upstream), kept[1:])
    for plain in (loss(lm.detach(), am.detach()), torch.no_grad()(loss)(lm, am)):
        assert torch.equal(plain, value)
        assert not plain.requires_grad
    # Any layout.
    laid_out = [tensor.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_() for tensor in (lm, am)]
    assert same(torch.autograd.grad(loss(*laid_out), laid_out, upstream), kept)
    gradients = torch.autograd.grad(loss(lm, am).sum(), (lm, am), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        sum(gradient.square().sum() for gradient in gradients).backward()


def test_gradcheck_of_the_smoothed_loss() -> None:
    lm, am = normal(2, 3, 4, seed=4), normal(2, 3, 4, seed=5)
    y, given = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[0, 0, 2, 3], [0, 0, 1, 2]])
    for reduction in ("sum", "none"):
        assert torch.autograd.gradcheck(
            lambda *inputs, reduction=reduction: k2.rnnt_loss_smoothed(*inputs, y, 0, 0.1, 0.3, given, reduction=reduction),
            leaves(lm, am),
        )


@pytest.mark.parametrize("changed", ["lm", "am", "symbols"])
def test_changes_before_backward_raise(changed: str) -> None:
    """Gradients of a shared unigram are made in backward."""
    lm, am = simple_inputs()
    y = symbols()
    loss = k2.rnnt_loss_smoothed(lm, am, y, 0, 0.25, 0.25, boundary())
    with torch.no_grad():
        {"lm": lm, "am": am, "symbols": y}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_shared_unigram_and_padding() -> None:
    """With a share of am's own term all rows count; without one, padding does not."""
    lm, am = (tensor.detach().clone() for tensor in simple_inputs())
    arguments = (symbols(), 0, 0.25)
    wanted = k2.rnnt_loss_smoothed(lm, am, *arguments, 0.0, boundary(), reduction="none")
    shared = k2.rnnt_loss_smoothed(lm, am, *arguments, 0.25, boundary(), reduction="none")
    am[1, FRAMES[1] :] = torch.nan
    assert torch.equal(k2.rnnt_loss_smoothed(lm, am, *arguments, 0.25, boundary(), reduction="none"), shared)
    lm[1, LABELS[1] + 1 :] += normal(2, CLASSES)
    assert torch.equal(k2.rnnt_loss_smoothed(lm, am, *arguments, 0.0, boundary(), reduction="none"), wanted)
    other = k2.rnnt_loss_smoothed(lm, am, *arguments, 0.25, boundary(), reduction="none")
    assert (other != shared).all()
    lm[1, LABELS[1] + 1 :] = torch.nan
    assert torch.equal(k2.rnnt_loss_smoothed(lm, am, *arguments, 0.0, boundary(), reduction="none"), wanted)
    assert k2.rnnt_loss_smoothed(lm, am, *arguments, 0.25, boundary(), reduction="none").isnan().all()


def test_an_utterance_without_a_path_adds_no_gradient() -> None:
    lm, am = simple_inputs()
    y, frames = symbols(), [3, 4, 1, 6]  # 3 frames for 4 labels
    given = torch.tensor([[0, 0, u, t] for t, u in zip(frames, LABELS, strict=True)])
    loss = k2.rnnt_loss_smoothed(lm, am, y, 0, 0.25, 0.25, given, "modified", reduction="none")
    assert loss.isinf().tolist() == [True, False, False, False]
    _, (by_am, by_lm), _ = reference.simple_rnnt_loss(
        am.detach().numpy(), lm.detach().numpy(), y, frames, LABELS, lm_only_scale=0.25, am_only_scale=0.25,
        topology="modified", shared_unigram=True,
    )  # fmt: skip
    assert (by_lm[0] != 0).any()  # its rows are part of the unigram
    for gradient, e in zip(torch.autograd.grad(loss, (lm, am), torch.ones_like(loss)), (by_lm, by_am), strict=True):
        expect_same(gradient, torch.as_tensor(e))


def test_modes_of_am_and_lm_that_lie_far_apart() -> None:
    """Where k2's products of exponentials underflow."""
    lm, am = leaves(*(tensor.detach() * 64 for tensor in simple_inputs()))
    px, py = arcs(smoothed_log_probs(lm, am, 0.1, 0.0), symbols(), 0, "regular", 0.0, FRAMES)
    exact = loss_of_arcs(px, py, "regular", FRAMES, LABELS)
    single = [tensor.detach().float() for tensor in (lm, am)]
    assert error(k2.rnnt_loss_smoothed(*single, symbols(), 0, 0.1, 0.0, boundary(), reduction="none"), exact) <= 1e-6


# The exact loss.


@of_each_type
@pytest.mark.parametrize(("blank", "delay_penalty", "bounded"), [(0, 0.0, True), (-1, 0.25, True), (2, 0.125, False)])
def test_the_loss_of_logits(rnnt_type: str, blank: int, delay_penalty: float, bounded: bool) -> None:
    (logits,) = leaves(2 * normal(4, max(FRAMES), max(LABELS) + 1, CLASSES))
    y, given = symbols(blank), boundary() if bounded else None
    frames, labels = lengths(given)
    exact = loss_of_arcs(
        *arcs(logits.log_softmax(-1), y, blank, rnnt_type, delay_penalty, frames), rnnt_type, frames, labels
    )
    loss = k2.rnnt_loss(logits, y, blank, given, rnnt_type, delay_penalty, "none")
    assert error(loss, exact) <= EXACT
    upstream = torch.tensor(WEIGHTS, dtype=torch.float64)
    expect_same(*(torch.autograd.grad(each, logits, upstream)[0] for each in (loss, exact)))
    assert torch.equal(k2.rnnt_loss(logits, y, blank, given, rnnt_type, delay_penalty), loss.mean())
    assert torch.equal(k2.rnnt_loss(logits, y, blank, given, rnnt_type, delay_penalty, "sum"), loss.sum())


def test_a_published_loss() -> None:
    tests = json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))["tests"]
    (of_k2,) = (test for test in tests if test["id"] == "k2_basic")
    (logits,) = leaves(torch.tensor(of_k2["logits"]))
    given = torch.tensor([[0, 0, u, t] for t, u in zip(of_k2["T_len"], of_k2["U_len"], strict=True)])
    loss = k2.rnnt_loss(logits, torch.tensor(of_k2["targets"]), of_k2["blank"], given, reduction="none")
    assert error(loss, np.array(of_k2["expected_cost"])) <= 1e-12
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    if of_k2["grad_wrt"] == "log_probs":
        published = torch.tensor(of_k2["expected_grads"], dtype=torch.float64)
        expect_same(gradient, published - logits.detach().softmax(-1) * published.sum(-1, keepdim=True))
    else:
        expect_same(gradient, torch.tensor(of_k2["expected_grads"], dtype=torch.float64))


# Ranges.


@of_each_type
@pytest.mark.parametrize("s_range", [1, 2, 3, 4, 5, 9])
def test_prune_ranges(rnnt_type: str, s_range: int) -> None:
    if rnnt_type == "regular" and s_range == 1:
        return
    lm, am = simple_inputs()
    _, grads = k2.rnnt_loss_simple(lm, am, symbols(), 0, boundary(), rnnt_type, return_grad=True)
    for px_grad, py_grad in (grads, [tensor.float() for tensor in grads]):
        ranges = k2.get_rnnt_prune_ranges(px_grad, py_grad, boundary(), s_range)
        assert ranges.dtype == torch.int64
        assert ranges.shape == (4, max(FRAMES), min(s_range, max(LABELS) + 1))
        exact = prune_ranges(px_grad, py_grad, FRAMES, LABELS, s_range)
        reached = exact[torch.arange(4), torch.tensor(FRAMES) - 1, -1] >= torch.tensor(LABELS)
        for b in range(4):  # padding of an utterance that the band cannot serve means nothing
            T = max(FRAMES) if reached[b] else FRAMES[b]
            assert torch.equal(ranges[b, :T], exact[b, :T])
    assert reached.all() or s_range < 3


@of_each_type
@pytest.mark.parametrize("seed", range(12))
def test_prune_ranges_of_anything(rnnt_type: str, seed: int) -> None:
    """Scores without a path behind them: every constraint has something to do."""
    rng = np.random.default_rng(seed)
    T, S = int(rng.integers(2, 12)), int(rng.integers(1, 9))
    labels = [S, *rng.integers(0, S + 1, 3).tolist()]
    frames = [T, *rng.integers(1, T + 1, 3).tolist()]
    px_grad = torch.as_tensor(rng.random((4, S, T + (rnnt_type == "regular"))))
    py_grad = torch.as_tensor(rng.random((4, S + 1, T)))
    given = torch.tensor([[0, 0, u, t] for t, u in zip(frames, labels, strict=True)])
    for s_range in range(1 + (rnnt_type == "regular"), S + 3):
        ranges = k2.get_rnnt_prune_ranges(px_grad, py_grad, given, s_range)
        exact = prune_ranges(px_grad, py_grad, frames, labels, s_range)
        assert ranges.shape == exact.shape
        for b, count in enumerate(frames):
            assert torch.equal(ranges[b, :count], exact[b, :count]), (b, s_range)


def test_prune_ranges_of_the_whole_batch() -> None:
    lm, am = simple_inputs()
    _, (px_grad, py_grad) = k2.rnnt_loss_simple(lm, am, symbols(), 0, None, return_grad=True)
    exact = prune_ranges(px_grad, py_grad, *lengths(None), 3)
    assert torch.equal(k2.get_rnnt_prune_ranges(px_grad, py_grad, None, 3), exact)
    full = torch.tensor([[0, 0, max(LABELS), max(FRAMES)]] * 4)
    assert torch.equal(k2.get_rnnt_prune_ranges(px_grad, py_grad, full.int(), 3), exact)


def test_a_band_too_narrow_for_any_path() -> None:
    """As k2, the width is not raised: the loss is inf, and there is no gradient."""
    lm, am = leaves(normal(1, 7, CLASSES), normal(1, 2, CLASSES, seed=1))
    y, given = torch.tensor([[1, 2, 3, 4, 5, 1]]), torch.tensor([[0, 0, 6, 2]])
    _, grads = k2.rnnt_loss_simple(lm, am, y, 0, given, return_grad=True)
    ranges = k2.get_rnnt_prune_ranges(*grads, given, 2)
    assert torch.equal(ranges, prune_ranges(*grads, [2], [6], 2))
    assert ranges.max() < 6
    (logits,) = leaves(normal(1, 2, 2, CLASSES))
    loss = k2.rnnt_loss_pruned(logits, y, ranges, 0, given)
    loss.backward()
    assert loss == torch.inf
    assert (logits.grad == 0).all()


def some_ranges(rnnt_type: str = "regular", s_range: int = 3, given: Tensor | None = None) -> Tensor:
    lm, am = simple_inputs()
    _, grads = k2.rnnt_loss_smoothed(lm, am, symbols(), 0, 0.25, 0.1, given, rnnt_type, return_grad=True)
    return k2.get_rnnt_prune_ranges(*grads, given, s_range)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pruning(dtype: torch.dtype) -> None:
    am, lm = leaves(normal(4, max(FRAMES), 5), normal(4, max(LABELS) + 1, 3, seed=1), dtype=dtype)
    ranges = some_ranges(given=boundary())
    shape = (*ranges.shape, 3)
    wanted = lm[:, None].expand(4, max(FRAMES), -1, 3).gather(2, ranges[..., None].expand(shape))
    am_pruned, lm_pruned = k2.do_rnnt_pruning(am, lm, ranges)
    assert am_pruned.shape == (*ranges.shape, 5)
    assert torch.equal(am_pruned, am[:, :, None].expand(am_pruned.shape))
    assert am_pruned.data_ptr() == am.data_ptr()
    assert torch.equal(lm_pruned, wanted)
    upstream = [normal(*each.shape, seed=7).to(dtype) for each in (am_pruned, lm_pruned)]
    exact = leaves(am.detach(), lm.detach())
    rows = exact[1][:, None].expand(4, max(FRAMES), -1, 3).gather(2, ranges[..., None].expand(shape))
    for gradient, e in zip(
        torch.autograd.grad((am_pruned, lm_pruned), (am, lm), upstream),
        torch.autograd.grad((exact[0][:, :, None].expand(am_pruned.shape), rows), exact, [u.double() for u in upstream]),
        strict=True,
    ):
        expect_same(gradient, e, dtype)
    assert same(k2.do_rnnt_pruning(am, lm, ranges.int()), (am_pruned, lm_pruned))
    with torch.no_grad():  # where a view of a leaf still says that it requires a gradient
        assert not k2.do_rnnt_pruning(am, lm, ranges)[1].requires_grad


# The pruned loss.


@of_each_type
@pytest.mark.parametrize("hat", [False, True])
@pytest.mark.parametrize(("blank", "delay_penalty", "bounded"), [(0, 0.0, True), (-1, 0.25, True), (2, 0.125, False)])
def test_the_pruned_loss(rnnt_type: str, hat: bool, blank: int, delay_penalty: float, bounded: bool) -> None:
    y, given = symbols(blank), boundary() if bounded else None
    if not bounded:
        y = y.where(y != blank, (blank + 1) % CLASSES)  # no terminator among what counts: HAT refuses it
    frames, labels = lengths(given)
    ranges = some_ranges(rnnt_type, given=given)
    (logits,) = leaves(2 * normal(*ranges.shape, CLASSES))
    log_probs = pruned_log_probs(logits, ranges, max(LABELS) + 1, blank, hat)
    exact = loss_of_arcs(*arcs(log_probs, y, blank, rnnt_type, delay_penalty, frames), rnnt_type, frames, labels)
    assert exact.isfinite().all()
    loss = k2.rnnt_loss_pruned(logits, y, ranges, blank, given, rnnt_type, delay_penalty, "none", hat)
    assert error(loss, exact) <= EXACT
    upstream = torch.tensor(WEIGHTS, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(exact, logits, upstream)
    expect_same(torch.autograd.grad(loss, logits, upstream)[0], wanted)
    for reduction in ("mean", "sum"):
        one = k2.rnnt_loss_pruned(logits, y, ranges.int(), blank, given, rnnt_type, delay_penalty, reduction, hat)
        assert torch.equal(one, getattr(loss, reduction)())
    assert torch.equal(
        k2.rnnt_loss_pruned(logits, y, ranges, blank, given, rnnt_type, delay_penalty, use_hat_loss=hat), loss.mean()
    )


def test_the_pruned_loss_of_a_full_range_is_the_loss() -> None:
    (logits,) = leaves(normal(4, max(FRAMES), max(LABELS) + 1, CLASSES), dtype=torch.float32)
    ranges = torch.arange(max(LABELS) + 1).expand(4, max(FRAMES), -1)
    results = []
    for call in (k2.rnnt_loss, lambda logits, y, *rest: k2.rnnt_loss_pruned(logits, y, ranges, *rest)):
        loss = call(logits, symbols(), 0, boundary())
        results.append([loss, *torch.autograd.grad(loss, logits)])
    assert same(*results)


def test_the_own_function_takes_the_ranges_too() -> None:
    ranges = some_ranges(given=boundary())
    logits = normal(*ranges.shape, CLASSES)
    band = losses.Band.from_ranges(ranges, FRAMES, LABELS)
    own = losses.rnnt_loss(logits, symbols(), FRAMES, LABELS, band=band, reduction="sum")
    assert torch.equal(own, k2.rnnt_loss_pruned(logits, symbols(), ranges, 0, boundary(), reduction="sum"))
    np.testing.assert_array_equal(band.to_ranges()[0], ranges[0])


# What k2 publishes.


def test_published_lower_bounds() -> None:
    for src, bound in (
        ([0, 2, 1, 3, 6, 5, 8], [0, 1, 1, 3, 5, 5, 8]),
        (
            [[12, 18, 5, 4, 18, 17], [11, 14, 14, 3, 10, 4], [19, 3, 8, 13, 7, 19]],
            [[4, 4, 4, 4, 17, 17], [3, 3, 3, 3, 4, 4], [3, 3, 7, 7, 7, 19]],
        ),
    ):
        for dtype in (torch.int32, torch.int64, torch.float32):
            given = torch.tensor(src, dtype=dtype)
            result = k2.monotonic_lower_bound(given)
            assert torch.equal(result, torch.tensor(bound, dtype=dtype))
            assert given.tolist() == src
    drawn = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    assert k2.monotonic_lower_bound(drawn).tolist() == [lower_bound(row) for row in drawn.tolist()]


def test_published_rolls() -> None:
    src = torch.arange(15).reshape(1, 3, 5)
    rolled = k2.roll_by_shifts(src, torch.tensor([[1, 2, 3]]))
    assert rolled.tolist() == [[[4, 0, 1, 2, 3], [8, 9, 5, 6, 7], [12, 13, 14, 10, 11]]]
    src, shifts = normal(2, 4, 7), torch.tensor([[0, 3, 7, 6], [5, 1, 2, 0]])
    wanted = [[torch.roll(row, int(shift)) for row, shift in zip(*each, strict=True)] for each in zip(src, shifts, strict=True)]
    assert torch.equal(k2.roll_by_shifts(src, shifts), torch.stack([torch.stack(rows) for rows in wanted]))


COMMON = {"boundary": None, "rnnt_type": "regular", "delay_penalty": 0.0, "reduction": "mean"}
REQUIRED = inspect.Parameter.empty


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("rnnt_loss_simple", {**dict.fromkeys(("lm", "am", "symbols", "termination_symbol"), REQUIRED), **COMMON, "return_grad": False}),
        (
            "rnnt_loss_smoothed",
            {
                **dict.fromkeys(("lm", "am", "symbols", "termination_symbol"), REQUIRED),
                **dict.fromkeys(("lm_only_scale", "am_only_scale"), 0.1),
                **COMMON,
                "return_grad": False,
            },
        ),
        ("get_rnnt_prune_ranges", dict.fromkeys(("px_grad", "py_grad", "boundary", "s_range"), REQUIRED)),
        ("do_rnnt_pruning", dict.fromkeys(("am", "lm", "ranges"), REQUIRED)),
        (
            "rnnt_loss_pruned",
            {
                **dict.fromkeys(("logits", "symbols", "ranges", "termination_symbol"), REQUIRED),
                **COMMON,
                "use_hat_loss": False,
            },
        ),
        ("rnnt_loss", {**dict.fromkeys(("logits", "symbols", "termination_symbol"), REQUIRED), **COMMON}),
        ("monotonic_lower_bound", {"src": REQUIRED}),
        ("roll_by_shifts", {"src": REQUIRED, "shifts": REQUIRED}),
    ],
)
def test_names_order_and_defaults_are_k2s(function: str, arguments: dict[str, Any]) -> None:
    parameters = inspect.signature(getattr(k2, function)).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == arguments
    assert list(parameters) == list(arguments)
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert function in k2.__all__


# A recipe.


class Joiner(torch.nn.Module):
    """As recipes have it."""

    def __init__(self, encoder: int, decoder: int, joiner: int, classes: int) -> None:
        super().__init__()
        self.encoder_proj = torch.nn.Linear(encoder, joiner)
        self.decoder_proj = torch.nn.Linear(decoder, joiner)
        self.output_linear = torch.nn.Linear(joiner, classes)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


class Transducer(torch.nn.Module):
    """The part of a recipe's model that calls k2: frames that say which symbol is due, and a decoder that counts."""

    def __init__(self, classes: int = 7, symbols: int = 5) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(classes, 12), torch.nn.Embedding(symbols + 1, 10)
        self.joiner = Joiner(12, 10, 16, classes)
        self.simple_am_proj, self.simple_lm_proj = torch.nn.Linear(12, classes), torch.nn.Linear(10, classes)

    def forward(self, loss: Any, x: Tensor, x_lens: Tensor, y: Tensor, y_lens: Tensor, **kinds: Any) -> tuple[Tensor, Tensor]:
        encoder_out = self.encoder(x)
        decoder_out = self.decoder.weight.expand(len(x), -1, -1)
        boundary = torch.zeros((encoder_out.size(0), 4), dtype=torch.int64)
        boundary[:, 2] = y_lens
        boundary[:, 3] = x_lens
        lm = self.simple_lm_proj(decoder_out)
        am = self.simple_am_proj(encoder_out)
        simple_loss, (px_grad, py_grad) = loss.rnnt_loss_smoothed(
            lm=lm.float(), am=am.float(), symbols=y, termination_symbol=0, lm_only_scale=0.25, am_only_scale=0.1,
            boundary=boundary, reduction="sum", return_grad=True, **kinds,
        )  # fmt: skip
        ranges = loss.get_rnnt_prune_ranges(px_grad=px_grad, py_grad=py_grad, boundary=boundary, s_range=3)
        am_pruned, lm_pruned = loss.do_rnnt_pruning(
            am=self.joiner.encoder_proj(encoder_out), lm=self.joiner.decoder_proj(decoder_out), ranges=ranges
        )
        logits = self.joiner(am_pruned, lm_pruned)
        pruned_loss = loss.rnnt_loss_pruned(
            logits=logits.float(), symbols=y, ranges=ranges, termination_symbol=0, boundary=boundary, reduction="sum", **kinds
        )
        return simple_loss, pruned_loss


class Formulas:
    """k2's functions that a recipe calls, by the formulas above."""

    @staticmethod
    def rnnt_loss_smoothed(lm: Tensor, am: Tensor, symbols: Tensor, termination_symbol: int, lm_only_scale: float, am_only_scale: float,
                           boundary: Tensor, reduction: str, return_grad: bool, rnnt_type: str, delay_penalty: float) -> Any:  # fmt: skip
        frames, labels = boundary[:, 3].tolist(), boundary[:, 2].tolist()
        log_probs = smoothed_log_probs(lm.double(), am.double(), lm_only_scale, am_only_scale)
        px, py = arcs(log_probs, symbols, termination_symbol, rnnt_type, delay_penalty, frames)
        grads = occupancies(px, py, rnnt_type, frames, labels)
        return loss_of_arcs(px, py, rnnt_type, frames, labels).sum(), grads

    @staticmethod
    def get_rnnt_prune_ranges(px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int) -> Tensor:
        return prune_ranges(px_grad, py_grad, boundary[:, 3].tolist(), boundary[:, 2].tolist(), s_range)

    @staticmethod
    def do_rnnt_pruning(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
        return am[:, :, None], lm[torch.arange(len(lm))[:, None, None], ranges]

    @staticmethod
    def rnnt_loss_pruned(logits: Tensor, symbols: Tensor, ranges: Tensor, termination_symbol: int, boundary: Tensor,
                         reduction: str, rnnt_type: str, delay_penalty: float) -> Tensor:  # fmt: skip
        frames, labels = boundary[:, 3].tolist(), boundary[:, 2].tolist()
        log_probs = pruned_log_probs(logits.double(), ranges, symbols.shape[1] + 1, termination_symbol, hat=False)
        px, py = arcs(log_probs, symbols, termination_symbol, rnnt_type, delay_penalty, frames)
        return loss_of_arcs(px, py, rnnt_type, frames, labels).sum()


def recipe_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    y_lens, x_lens = torch.tensor([5, 3, 4]), torch.tensor([15, 9, 14])
    y = torch.randint(1, 7, (3, 5))
    x = torch.nn.functional.one_hot(y.repeat_interleave(3, dim=1), 7).float()
    return x, x_lens, y.where(torch.arange(5) < y_lens[:, None], 0), y_lens


def warm_up(step: int, warm_step: int, simple_loss_scale: float, simple_loss: Tensor, pruned_loss: Tensor) -> Tensor:
    warm = step / warm_step
    of_simple = simple_loss_scale if step >= warm_step else 1.0 - warm * (1.0 - simple_loss_scale)
    of_pruned = 1.0 if step >= warm_step else 0.1 + 0.9 * warm
    return of_simple * simple_loss + of_pruned * pruned_loss


@pytest.mark.parametrize("kinds", [
    {"rnnt_type": "regular", "delay_penalty": 0.0}, {"rnnt_type": "modified", "delay_penalty": 0.125},
    {"rnnt_type": "constrained", "delay_penalty": 0.0},
], ids=str)  # fmt: skip
def test_a_recipe(kinds: dict[str, Any]) -> None:
    batch, threads = recipe_batch(), torch.get_num_threads()
    model = Transducer()
    losses, gradients = [], []
    for loss in (Formulas, k2):
        losses.append(warm_up(3, 12, 0.5, *model(loss, *batch, **kinds)))
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    assert error(losses[1], losses[0]) <= 4 * budgets("rnnt_loss", "float32", "cpu")[0]
    for gradient, e in zip(gradients[1], gradients[0], strict=True):
        expect_same(gradient, e.double(), torch.float32)

    torch.set_num_threads(1)  # those of torch wait for each other where processors are busy
    try:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        values = []
        for step in range(25):
            simple_loss, pruned_loss = model(k2, *batch, **kinds)
            optimizer.zero_grad()
            warm_up(step, 12, 0.5, simple_loss, pruned_loss).backward()
            optimizer.step()
            values.append((simple_loss.item(), pruned_loss.item()))
    finally:
        torch.set_num_threads(threads)
    for first, last in zip(values[0], values[-1], strict=True):
        assert last < 0.5 * first


# Errors.


def smoothed_arguments() -> dict[str, Any]:
    lm, am = simple_inputs()
    return {"lm": lm, "am": am, "symbols": symbols(), "termination_symbol": 0, "boundary": boundary()}


@pytest.mark.parametrize("function", ["rnnt_loss_smoothed", "rnnt_loss_simple", "rnnt_loss", "rnnt_loss_pruned"])
@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"boundary": boundary() + torch.tensor([1, 0, 0, 0])}, ValueError, "boundary: expected to begin at symbol 0 and frame 0"),
        ({"boundary": boundary() + torch.tensor([0, 1, 0, 0])}, ValueError, "boundary: expected to begin .* at index 0"),
        ({"boundary": boundary()[:3]}, ValueError, r"boundary: expected shape \(B, 4\) = \(4, 4\), got \(3, 4\)"),
        ({"boundary": boundary()[:, 2:]}, ValueError, r"boundary: expected shape \(B, 4\) = \(4, 4\), got \(4, 2\)"),
        ({"boundary": boundary().tolist()}, TypeError, "boundary: expected a torch.Tensor, got list"),
        ({"boundary": boundary() + torch.tensor([0, 0, 0, 1])}, ValueError, r"boundary: expected lengths in \[1, T = 7\], got 8 at index 0"),
        ({"boundary": boundary() + torch.tensor([0, 0, 1, 0])}, ValueError, r"(symbols|boundary): expected .* got"),
        ({"symbols": symbols()[:, 1:]}, ValueError, "(symbols|boundary): expected"),
        ({"symbols": symbols().float()}, TypeError, "symbols: expected integers"),
        ({"symbols": symbols() + 99}, ValueError, r"symbols: expected labels in \[0, V = 6\)"),
        ({"termination_symbol": 6}, ValueError, r"termination_symbol: expected a class in \[-6, 6\), got 6"),
        ({"rnnt_type": "normal"}, ValueError, "rnnt_type: expected one of 'regular', 'modified', 'constrained'"),
        ({"reduction": "average"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'average'"),
        ({"delay_penalty": -0.5}, ValueError, "delay_penalty: expected 0 or more, .* got -0.5"),
        ({"delay_penalty": float("nan")}, ValueError, "delay_penalty: expected a finite number"),
    ],
)
def test_wrong_arguments_of_losses_are_named(function: str, wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = smoothed_arguments()
    if function in ("rnnt_loss", "rnnt_loss_pruned"):
        arguments = {name: value for name, value in arguments.items() if name not in ("lm", "am")}
        arguments["logits"] = normal(4, max(FRAMES), max(LABELS) + 1, CLASSES)
    if function == "rnnt_loss_pruned":
        arguments["ranges"] = torch.arange(max(LABELS) + 1).expand(4, max(FRAMES), -1)
    with pytest.raises(kind, match=f"^{message}"):
        getattr(k2, function)(**{**arguments, **wrong})


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"lm": None}, TypeError, "lm: expected a torch.Tensor, got NoneType"),
        ({"am": np.zeros((4, 7, 6))}, TypeError, "am: expected a torch.Tensor, got ndarray"),
        ({"lm": normal(4, 5)}, ValueError, "lm: expected 3 dimensions"),
        ({"lm": normal(5)}, ValueError, "lm: expected 3 dimensions"),
        ({"am": normal(7)}, ValueError, "am: expected 3 dimensions"),
        ({"am": normal(4, 7)}, ValueError, "am: expected 3 dimensions"),
        ({"lm": normal(4, 5, 7)}, ValueError, "lm: expected shape"),
        ({"lm": normal(3, 5, 6)}, ValueError, "lm: expected shape"),
        ({"lm": normal(4, 5, 6).float()}, TypeError, "lm: expected dtype float64 as am"),
        ({"lm_only_scale": 0.5, "am_only_scale": 0.75}, ValueError, "am_only_scale: expected at most"),
        ({"lm_only_scale": -0.5}, ValueError, "lm_only_scale: expected a share"),
    ],
)
def test_wrong_arguments_of_the_smoothed_loss_are_named(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        k2.rnnt_loss_smoothed(**{**smoothed_arguments(), **wrong})


@pytest.mark.parametrize("logits", [normal(4, 7, 6), normal(6), None, normal(4, 7, 5, 6).long()], ids=["3", "1", "none", "int"])
def test_wrong_logits_are_named(logits: Any) -> None:
    ranges = torch.arange(5).expand(4, 7, -1)
    for call in (lambda: k2.rnnt_loss(logits, symbols(), 0), lambda: k2.rnnt_loss_pruned(logits, symbols(), ranges, 0)):
        with pytest.raises((ValueError, TypeError), match=r"^logits: expected"):
            call()


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"px_grad": None}, TypeError, "px_grad: expected a torch.Tensor"),
        ({"py_grad": [1]}, TypeError, "py_grad: expected a torch.Tensor"),
        ({"py_grad": normal(5, 7)}, ValueError, "py_grad: expected 3 dimensions"),
        ({"px_grad": normal(4, 4, 9)}, ValueError, r"px_grad: expected shape \(B, S, T\) or \(B, S, T \+ 1\)"),
        ({"px_grad": normal(4, 5, 8)}, ValueError, r"px_grad: expected shape .* got \(4, 5, 8\)"),
        ({"boundary": boundary()[:, :3]}, ValueError, "boundary: expected shape"),
        ({"boundary": boundary() + 1}, ValueError, "boundary: expected to begin"),
        ({"boundary": boundary() + torch.tensor([0, 0, 0, 1])}, ValueError, "boundary: expected lengths in .* got 8"),
        ({"boundary": boundary() + torch.tensor([0, 0, 1, 0])}, ValueError, "boundary: expected lengths in .* got 5"),
        ({"s_range": 1}, ValueError, "s_range: expected 2 or more for the regular type, got 1"),
        ({"s_range": 0}, ValueError, "s_range: expected"),
        ({"s_range": 2.5}, TypeError, "s_range: expected an int, got float"),
        ({"s_range": "3"}, TypeError, "s_range: expected an int, got str"),
        ({"px_grad": normal(4, 4, 7), "s_range": 0}, ValueError, "s_range: expected 1 or more, got 0"),
    ],
)
def test_wrong_arguments_of_prune_ranges_are_named(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"px_grad": normal(4, 4, 8), "py_grad": normal(4, 5, 7), "boundary": boundary(), "s_range": 3, **wrong}
    with pytest.raises(kind, match=f"^{message}"):
        k2.get_rnnt_prune_ranges(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda ranges: ranges.float(),
        lambda ranges: ranges.to(torch.complex64),
        lambda ranges: ranges.bool(),
        lambda ranges: ranges.tolist(),
        lambda ranges: ranges[0],
        lambda ranges: ranges[:3],
        lambda ranges: torch.cat([ranges, ranges]),
        lambda ranges: ranges[:, :-1],
        lambda ranges: torch.cat([ranges, ranges], 1),
        lambda ranges: ranges[:, :, :0],
    ],
    ids=["float", "complex", "bool", "list", "flat", "fewer", "more", "shorter", "longer", "empty"],
)
@pytest.mark.parametrize("function", ["do_rnnt_pruning", "rnnt_loss_pruned"])
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_wrong_ranges_are_named(change: Callable[[Tensor], Any], function: str) -> None:
    ranges = some_ranges(given=boundary())
    with pytest.raises((ValueError, TypeError), match=r"^ranges: expected"):
        if function == "do_rnnt_pruning":
            k2.do_rnnt_pruning(normal(4, max(FRAMES), 3), normal(4, max(LABELS) + 1, 3), change(ranges))
        else:
            k2.rnnt_loss_pruned(normal(*ranges.shape, CLASSES), symbols(), change(ranges), 0, boundary())


def test_as_many_logits_as_ranges() -> None:
    ranges = some_ranges(given=boundary())
    with pytest.raises(ValueError, match=r"^(logits|ranges): expected shape"):
        k2.rnnt_loss_pruned(normal(*ranges.shape, CLASSES)[:, :, 1:], symbols(), ranges, 0, boundary())
    with pytest.raises(ValueError, match=r"expected"):
        k2.rnnt_loss_pruned(normal(*ranges.shape, CLASSES), symbols()[0], ranges, 0, boundary())
    for wrong in (normal(3, 5, 3), normal(4, 5, 3).long()):
        with pytest.raises((ValueError, TypeError), match=r"^lm: expected"):
            k2.do_rnnt_pruning(normal(4, max(FRAMES), 3), wrong, ranges)
    for name, arguments in (("am", (normal(4, 7), normal(4, 5, 3))), ("lm", (normal(4, 7, 3), normal(5, 3)))):
        with pytest.raises(ValueError, match=f"^{name}: expected 3 dimensions"):
            k2.do_rnnt_pruning(*arguments, ranges)


@pytest.mark.parametrize(
    "change",
    [lambda row: row - 1 - row[0], lambda row: row - 99, lambda row: row + 99, lambda row: row + 2**32, lambda row: 2 * row + 1],
    ids=["negative", "far below", "far above", "wrapped", "not consecutive"],
)
@of_each_type
def test_an_impossible_row_gives_no_plausible_number(change: Callable[[Tensor], Tensor], rnnt_type: str) -> None:
    """Whether rows are looked at before the lattice is, or not."""
    given = boundary()
    ranges, am, lm = some_ranges(rnnt_type, given=given), normal(4, max(FRAMES), 3), normal(4, max(LABELS) + 1, 3)
    (logits,) = leaves(normal(*ranges.shape, CLASSES))
    wanted = k2.rnnt_loss_pruned(logits, symbols(), ranges, 0, given, rnnt_type, reduction="none")
    for b, t in [(utterance, t) for utterance, T in enumerate(FRAMES) for t in range(T)]:
        impossible = ranges.clone()
        impossible[b, t] = change(ranges[b, t])
        try:
            rows = k2.do_rnnt_pruning(am, lm, impossible)[1]
            loss = k2.rnnt_loss_pruned(logits, symbols(), impossible, 0, given, rnnt_type, reduction="none")
        except ValueError as error:
            assert str(error).startswith("ranges: expected")
            continue
        assert rows.isfinite().all()
        assert not loss[b].isfinite()
        others = torch.arange(4) != b
        assert torch.equal(loss[others], wanted[others])
        (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        assert (gradient[b] == 0).all()
        assert gradient.isfinite().all()


def test_falling_ranges_make_the_loss_nan() -> None:
    ranges = some_ranges(given=boundary())
    assert (ranges[0] != ranges[0].flip(0)).any()
    (logits,) = leaves(normal(*ranges.shape, CLASSES))
    wanted = k2.rnnt_loss_pruned(logits, symbols(), ranges, 0, boundary(), reduction="none")
    ranges[0] = ranges[0].flip(0)
    loss = k2.rnnt_loss_pruned(logits, symbols(), ranges, 0, boundary(), reduction="none")
    assert loss.isnan().tolist() == [True, False, False, False]
    assert torch.equal(loss[1:], wanted[1:])
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    assert gradient.isfinite().all()
    assert (gradient[0] == 0).all()


def test_helpers_name_what_is_wrong() -> None:
    for call in (lambda: k2.monotonic_lower_bound([3, 1]), lambda: k2.roll_by_shifts([[1]], torch.tensor([1]))):
        with pytest.raises(TypeError, match=r"^src: expected a torch.Tensor, got list"):
            call()
