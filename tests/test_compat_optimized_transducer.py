"""optimized_transducer's loss by its own names: published vectors, packed logits, and one symbol per frame."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compat_cases import every_vector, expect_vector, of_core, spied
from naive_torch import DTYPES, WEIGHTS, Case, case, leaves, naive_rnnt_loss, same
from transducer_loss import reference
from transducer_loss.adapters.compat.optimized_transducer import TransducerLoss, transducer_loss

of_each_way = pytest.mark.parametrize("way", ["function", "module"])
of_each_form = pytest.mark.parametrize("from_log_softmax", [False, True])


def call(way: str, tensors: tuple[Any, ...], blank: int = 0, reduction: str = "mean", **options: Any) -> Tensor:
    if way == "function":
        return transducer_loss(*tensors, blank=blank, reduction=reduction, **options)
    return TransducerLoss(blank, reduction)(*tensors, **options)


def cells(x: Tensor, frames: list[int], labels: list[int]) -> list[Tensor]:
    """The real cells of each utterance."""
    return [x[b, :T, : U + 1].reshape(-1, x.shape[-1]) for b, (T, U) in enumerate(zip(frames, labels, strict=True))]


def packed(x: Tensor, of: Case) -> Tensor:
    return torch.cat(cells(x, of.frames, of.labels))


def integers(of: Case, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor, Tensor]:
    """As recipes pad them, with 0."""
    return of.targets.clamp(min=0).to(dtype), torch.tensor(of.frames, dtype=dtype), torch.tensor(of.labels, dtype=dtype)


@of_each_way
@of_each_form
@every_vector
def test_vectors(vector: dict[str, Any], from_log_softmax: bool, way: str) -> None:
    def of_packed(x: Tensor, targets: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
        x = torch.cat(cells(x, frames.tolist(), labels.tolist()))
        return call(way, (x, targets, frames, labels), vector["blank"], "none", from_log_softmax=from_log_softmax)

    if "fastemit_lambda" in vector:  # it has none: the cost alone
        vector = {**vector, "expected_grads": None}
    expect_vector(vector, of_packed, log_probs=from_log_softmax)


def test_signatures() -> None:
    positional = ["logits", "targets", "logit_lengths", "target_lengths"]
    assert list(inspect.signature(transducer_loss).parameters) == [*positional, "blank", "from_log_softmax", "one_sym_per_frame", "reduction"]
    assert list(inspect.signature(TransducerLoss).parameters) == ["blank", "reduction"]
    assert list(inspect.signature(TransducerLoss.forward).parameters)[1:] == [*positional, "from_log_softmax", "one_sym_per_frame"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@of_each_form
def test_as_the_core(dtype: torch.dtype, from_log_softmax: bool) -> None:
    of = case()
    of_packed = packed(of.logits.log_softmax(-1) if from_log_softmax else of.logits, of).to(dtype)
    base = torch.full((2 * len(of_packed), 13), 7, dtype=dtype)
    base[::2] = of_packed
    x = base[::2].requires_grad_()
    loss = transducer_loss(x, *integers(of, torch.int64), 0, from_log_softmax, reduction="none")
    (gradient,) = torch.autograd.grad(loss, x, torch.tensor(WEIGHTS, dtype=loss.dtype))
    assert same((loss, gradient), of_core(of_packed, of, WEIGHTS, normalized=from_log_softmax))
    assert (base[1::2] == 7).all()


def test_the_gradient_is_over_the_logits() -> None:
    of = case()
    given = packed(of.logits, of)
    x = (1.0 * given).requires_grad_()
    loss = transducer_loss(x, *integers(of), 0)
    assert torch.equal(x, given)
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert gradient.data_ptr() == x.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@of_each_form
def test_what_keeps_its_values(from_log_softmax: bool) -> None:
    """Logits without a gradient, and log-probabilities, which log_softmax itself needs again."""
    of = case()
    given = packed(of.logits.log_softmax(-1) if from_log_softmax else of.logits, of)
    x = given.clone().requires_grad_(from_log_softmax)
    with torch.set_grad_enabled(from_log_softmax):
        loss = transducer_loss(x, *integers(of), 0, from_log_softmax)
    if from_log_softmax:
        first, second = (torch.autograd.grad(loss, x, retain_graph=True) for _ in range(2))
        assert same(first, second)
    assert torch.equal(x, given)


@pytest.mark.parametrize(("reduction", "share"), [("sum", 1.0), ("mean", 0.25)])
@of_each_way
def test_reductions(way: str, reduction: str, share: float) -> None:
    of = case()
    logits, naive = leaves(of.logits, of.logits)
    loss = call(way, (packed(logits, of), *integers(of)), reduction=reduction)
    exact = share * naive_rnnt_loss(naive, *of.integers).sum()
    assert loss.shape == ()
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    (-2.5 * loss).backward()
    (-2.5 * exact).backward()
    torch.testing.assert_close(logits.grad, naive.grad, rtol=0, atol=1e-12)


# One symbol per frame.


def one_symbol_per_frame(x: Tensor, of: Case, blank: int, from_log_softmax: bool) -> Tensor:
    """alpha(t, u) from alpha(t - 1, u) by blank and from alpha(t - 1, u - 1) by symbol; the end is blank out of (T - 1, U)."""
    found = []
    for b, (T, U) in enumerate(zip(of.frames, of.labels, strict=True)):
        log_probs = x[b] if from_log_softmax else x[b].log_softmax(-1)
        alpha: dict[tuple[int, int], Tensor] = {(0, 0): x.new_zeros(())}
        for t in range(1, T):
            for u in range(U + 1):
                ways = [alpha[t - 1, u] + log_probs[t - 1, u, blank]] if (t - 1, u) in alpha else []
                if (t - 1, u - 1) in alpha:
                    ways.append(alpha[t - 1, u - 1] + log_probs[t - 1, u - 1, of.targets[b, u - 1]])
                if ways:
                    alpha[t, u] = torch.logsumexp(torch.stack(ways), 0)
        found.append(-(alpha[T - 1, U] + log_probs[T - 1, U, blank]) if (T - 1, U) in alpha else x.new_full((), torch.inf))
    return torch.stack(found)


@of_each_form
@of_each_way
@pytest.mark.parametrize("blank", [0, 5])  # 5 is a label, too
def test_one_symbol_per_frame(way: str, from_log_softmax: bool, blank: int) -> None:
    """Without a path, as in the last two utterances, the loss is inf and the gradient 0."""
    of = case((9, 1, 7, 5, 4, 1), (5, 0, 3, 4, 4, 1))
    weights = torch.tensor([1.5, -0.75, 2.0, 1.0, 3.0, -1.0], dtype=torch.float64)
    given = of.logits.log_softmax(-1) if from_log_softmax else of.logits
    x, twin = leaves(given, given)
    options = {"from_log_softmax": from_log_softmax, "one_sym_per_frame": True}
    loss = call(way, (packed(x, of), *integers(of)), blank, "none", **options)
    exact = one_symbol_per_frame(twin, of, blank, from_log_softmax)
    assert torch.isinf(exact).tolist() == [False, False, False, False, True, True]
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, x, weights)
    (of_twin,) = torch.autograd.grad((weights * exact)[:4].sum(), twin)
    torch.testing.assert_close(gradient, of_twin, rtol=0, atol=1e-12)


def test_it_is_not_modified() -> None:
    """k2's `modified` may emit in the last frame, too."""
    of = case()
    loss = transducer_loss(packed(of.logits, of), *integers(of), 0, one_sym_per_frame=True, reduction="none")
    modified, _ = reference.rnnt_loss(of.logits.numpy(), *of.integers, topology="modified")
    assert (modified[[0, 2]] < loss.numpy()[[0, 2]]).all()
    np.testing.assert_allclose(loss[1], modified[1], rtol=1e-12)  # no label at all


def test_one_symbol_per_frame_leaves_the_logits_alone() -> None:
    of = case()
    given = packed(of.logits, of)
    x = given.clone().requires_grad_()
    transducer_loss(x, *integers(of), 0, one_sym_per_frame=True, reduction="none")[:3].sum().backward()
    assert torch.equal(x, given)


def test_nothing_but_the_last_label() -> None:
    """A cell of the last frame whose other classes are all -inf is in no path."""
    of = case((3, 2), (1, 1), classes=2)
    logits = of.logits.clone()
    logits[0, 2, 0, 0] = -torch.inf  # the blank; the label is the only other class
    x, twin = leaves(logits, logits)
    loss = transducer_loss(packed(x, of), *integers(of), 0, one_sym_per_frame=True, reduction="none")
    exact = one_symbol_per_frame(twin, of, 0, False)
    assert exact.isfinite().all()
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(each.sum(), leaf)[0] for each, leaf in ((loss, x), (exact, twin))]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_no_labels_at_all() -> None:
    of = case((3, 1), (0, 0))
    loss = transducer_loss(packed(of.logits, of), *integers(of), 0, one_sym_per_frame=True, reduction="none")
    exact, _ = reference.rnnt_loss(of.logits.numpy(), *of.integers)
    np.testing.assert_allclose(loss, exact, rtol=1e-12)


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    of = case()
    x, given = packed(of.logits, of), integers(of)
    calls = spied(monkeypatch)
    transducer_loss(x, *given, 0)
    assert all(passed is mine for passed, mine in zip(calls[0], (x, *given), strict=True))


@pytest.mark.parametrize("one_sym_per_frame", [False, True])
@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"reduction": "batch"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'batch'"),
        ({"blank": 13}, ValueError, r"blank: expected a class in \[-13, 13\), got 13"),
        ({"logits": None}, TypeError, "logits: expected a torch.Tensor, got NoneType"),
        ({"logits": torch.zeros(117, 13)}, ValueError, "logits: expected shape"),
        ({"targets": torch.zeros(4, 4, dtype=torch.int32)}, ValueError, "target(s|_lengths): expected"),
        ({"targets": torch.full((4, 5), 13)}, ValueError, r"targets: expected labels in \[0, V = 13\)"),
        ({"logit_lengths": torch.tensor([9, 0, 7, 4])}, ValueError, "logit_lengths: expected lengths"),
        ({"target_lengths": torch.tensor([5, 0, 3])}, ValueError, "target_lengths: expected shape"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], kind: type[Exception], message: str, one_sym_per_frame: bool) -> None:
    of = case()
    arguments = {"blank": 0, **dict(zip(("logits", "targets", "logit_lengths", "target_lengths"), (packed(of.logits, of), *integers(of)), strict=True))}
    with pytest.raises(kind, match=f"^{message}"):
        transducer_loss(**{**arguments, **wrong}, one_sym_per_frame=one_sym_per_frame)
