"""Sampled softmax for PyTorch: classes, their gradients as sparse tensors, modules, and data-parallel workers."""

import dataclasses
import socket
from typing import Any

import numpy as np
import pytest
import torch

import transducer_loss as tl
from data_parallel import V, loss_of, worker
from helpers import TOPOLOGIES
from naive_torch import DTYPES, Case, case, error, leaves, same
from transducer_loss import reference
from transducer_loss.adapters.torch import (
    Classes,
    JointRNNTLoss,
    PrunedRNNTLoss,
    joint_rnnt_loss,
    labels_in,
    prune,
    sample_classes,
    simple_rnnt_loss,
)

UPSTREAM = (1.5, -0.75, 0.0, 2.0)
of_each_scope = pytest.mark.parametrize("scope", ["batch", "utterance"])
of_each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def classes_of(of: Case, scope: str = "batch", **options: Any) -> Classes:
    options = {"num_samples": 3, "correction": True, "seed": 5, **options}
    return sample_classes(of.targets, of.labels, vocab_size=of.joint[2].shape[0], scope=scope, **options)


def expected(of: Case, classes: Classes, weights: Any, **options: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """The reference's losses, and its gradients of the weighted sum."""
    offset = -np.log(classes.probability.astype(np.float64)) if classes.correction else None
    loss, gradients = reference.joint_rnnt_loss(
        *(tensor.numpy() for tensor in of.joint), of.targets.numpy(), of.frames, of.labels, classes=classes.ids,
        offset=offset, blank=classes.blank, weights=weights, **options,
    )  # fmt: skip
    return loss, list(gradients)


@of_each_scope
@of_each_reduction
@pytest.mark.parametrize("sparse", [False, True])
def test_losses_and_gradients_are_those_of_the_reference(scope: str, reduction: str, sparse: bool) -> None:
    of = case(classes=V)
    inputs, classes = leaves(*of.joint), classes_of(of, scope)
    assert classes.slots < V
    loss = joint_rnnt_loss(
        *inputs, *of.integers, classes=classes, sparse=sparse, reduction=reduction, occupancy_floor=0.0
    )
    weights = np.array(UPSTREAM) if reduction == "none" else np.full(4, -2.0 if reduction == "sum" else -0.5)
    wanted, gradients = expected(of, classes, weights)
    losses = {"mean": wanted.mean(), "sum": wanted.sum(), "none": wanted}[reduction]
    np.testing.assert_allclose(loss.detach(), losses, rtol=1e-12)
    upstream = torch.tensor(UPSTREAM, dtype=torch.float64) if reduction == "none" else torch.tensor(-2.0).double()
    for _ in range(2):  # what is saved is not modified
        got = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
        assert [gradient.is_sparse for gradient in got] == [False, False, sparse, sparse]
        for gradient, wants in zip(got, gradients, strict=True):
            assert gradient.shape == wants.shape
            assert error(gradient.to_dense(), wants) < 1e-12


@of_each_scope
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(scope: str, dtype: torch.dtype) -> None:
    of = case(classes=V)
    of = dataclasses.replace(of, joint=tuple(tensor.to(dtype).double() for tensor in of.joint))
    inputs, classes = leaves(*of.joint, dtype=dtype), classes_of(of, scope)
    loss = joint_rnnt_loss(*inputs, *of.integers, classes=classes, sparse=True, reduction="sum")
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    wanted, gradients = expected(of, classes, None)
    assert abs(float(loss.detach()) / wanted.sum() - 1) < 1e-5
    for tensor, wants in zip(inputs, gradients, strict=True):
        assert tensor.grad.dtype == dtype
        # Sums are made in float32 and rounded once; rows that several utterances have are added up in the dtype.
        assert error(tensor.grad.to_dense(), wants) < max(4 * torch.finfo(dtype).eps, 1e-5)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@of_each_scope
def test_with_band_and_workspace(topology: str, scope: str) -> None:
    of = case(classes=V)
    inputs, classes = leaves(*of.joint), classes_of(of, scope)
    _, occupancy = simple_rnnt_loss(of.logits[:, :, 0], of.logits[:, 1], *of.integers, topology=topology)
    band = prune(occupancy, of.frames, of.labels, s_range=3, topology=topology)
    loss = joint_rnnt_loss(
        *inputs, *of.integers, classes=classes, band=band, workspace=30_000, topology=topology, reduction="none",
        occupancy_floor=0.0,
    )  # fmt: skip
    wanted, gradients = expected(
        of, classes, UPSTREAM, topology=topology, first=band.first, width=band.width, end=band.end
    )
    np.testing.assert_allclose(loss.detach(), wanted, rtol=1e-12)
    live = np.where(np.isfinite(wanted), UPSTREAM, 0.0)
    for gradient, wants in zip(torch.autograd.grad(loss, inputs, torch.tensor(live)), gradients, strict=True):
        assert error(gradient, wants) < 1e-12


def test_all_classes_give_the_exact_loss() -> None:
    of = case(classes=V)
    inputs = leaves(*of.joint)
    exact = joint_rnnt_loss(*inputs, *of.integers, reduction="none", occupancy_floor=0.0)
    sampled = joint_rnnt_loss(
        *inputs, *of.integers, classes=classes_of(of, num_samples=99), reduction="none", occupancy_floor=0.0
    )
    assert torch.allclose(exact, sampled, rtol=1e-12)
    upstream = torch.tensor(UPSTREAM)
    for one, other in zip(
        torch.autograd.grad(exact, inputs, upstream), torch.autograd.grad(sampled, inputs, upstream), strict=True
    ):
        assert error(one, other) < 1e-12


def test_autocast_keeps_the_parameters_gradient_in_float32() -> None:
    of = case(classes=V)
    inputs, classes = leaves(*of.joint, dtype=torch.float32), classes_of(of)
    with torch.autocast("cpu", torch.bfloat16):
        loss = joint_rnnt_loss(*inputs, *of.integers, classes=classes, sparse=True)
    loss.backward()
    assert inputs[2].grad.is_sparse
    assert inputs[2].grad.dtype == torch.float32
    values = inputs[2].grad.to_dense()
    assert not torch.equal(values.bfloat16().float(), values)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam])
def test_optimisers_take_sparse_gradients(optimiser: Any) -> None:
    of = case(classes=V)
    torch.manual_seed(0)
    sparse, dense = (JointRNNTLoss(6, V, sparse=way) for way in (True, False))
    dense.load_state_dict(sparse.state_dict())
    encoder, predictor = (tensor.float() for tensor in of.joint[:2])
    classes = classes_of(of, num_samples=1)
    before = sparse.output.weight.detach().clone()
    for module in (sparse, dense):
        module(encoder, predictor, *of.integers, classes=classes).backward()
        if optimiser is torch.optim.SparseAdam and module is dense:
            continue
        optimiser(module.parameters(), lr=0.1).step()
    moved = (sparse.output.weight != before).any(1).nonzero()[:, 0]
    assert set(moved.tolist()) == set(classes.ids.tolist()) != set(range(V))
    if optimiser is not torch.optim.SparseAdam:
        assert torch.allclose(sparse.output.weight, dense.output.weight, atol=1e-6)
        assert torch.allclose(sparse.output.bias, dense.output.bias, atol=1e-6)


def test_the_seed_is_torchs() -> None:
    of = case(classes=400)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([sample_classes(of.targets, of.labels, vocab_size=400, num_samples=20).ids.tolist() for _ in range(2)])
    assert draws[0] == draws[1] != draws[2]
    assert draws[0][0] != draws[0][1]
    given = [sample_classes(of.targets, of.labels, vocab_size=400, num_samples=20, seed=3, step=s).ids for s in (0, 0, 1)]
    assert np.array_equal(given[0], given[1])
    assert not np.array_equal(given[0], given[2])


@of_each_scope
def test_proposals_take_tensors_and_leave_their_graph_alone(scope: str) -> None:
    of = case(classes=V)
    head = torch.randn(4, 9, V, requires_grad=True)
    options = {"vocab_size": V, "num_samples": 2, "scope": scope, "seed": 1}
    classes = sample_classes(
        of.targets, of.labels, proposal="ctc", ctc_logits=head * 2, ctc_lengths=torch.tensor(of.frames), **options
    )
    core = tl.sample_classes(
        of.targets.numpy(), of.labels, proposal="ctc", ctc_logits=(2 * head).detach().numpy(), ctc_lengths=of.frames, **options
    )
    assert np.array_equal(classes.ids, core.ids)
    counts = torch.arange(V, dtype=torch.bfloat16)
    drawn = sample_classes(of.targets, of.labels, proposal="unigram", counts=counts, **options)
    assert np.array_equal(drawn.ids, tl.sample_classes(
        of.targets.numpy(), of.labels, proposal="unigram", counts=list(range(V)), **options
    ).ids)  # fmt: skip


def test_module_without_classes_is_exact_and_with_them_sampled() -> None:
    of = case(classes=V)
    module = JointRNNTLoss(6, V, sparse=True).double()
    encoder, predictor = of.joint[:2]
    classes = classes_of(of)
    parameters = (module.output.weight, module.output.bias)
    assert torch.equal(
        module(encoder, predictor, *of.integers, classes=classes),
        joint_rnnt_loss(encoder, predictor, *parameters, *of.integers, classes=classes),
    )
    exact = module(encoder, predictor, *of.integers)
    assert torch.equal(exact, joint_rnnt_loss(encoder, predictor, *parameters, *of.integers))
    exact.backward()
    assert not module.output.weight.grad.is_sparse


def test_sparse_gradients_of_the_pruned_module() -> None:
    of = case(classes=V)
    torch.manual_seed(0)
    sparse, dense = (PrunedRNNTLoss(6, V, s_range=3, sparse=way).double() for way in (True, False))
    dense.load_state_dict(sparse.state_dict())
    classes, (encoder, predictor) = classes_of(of), of.joint[:2]
    for module in (sparse, dense):
        module(encoder, predictor, *of.integers, classes=classes).loss.backward()
    for name, parameter in sparse.named_parameters():
        assert parameter.grad.is_sparse == (name.endswith("weight") or name == "output.bias")
        assert error(parameter.grad.to_dense(), dict(dense.named_parameters())[name].grad) < 1e-12
    # Without classes, as in evaluation, all is dense.
    sparse.zero_grad()
    sparse(encoder, predictor, *of.integers).loss.backward()
    assert not any(parameter.grad.is_sparse for parameter in sparse.parameters())


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_in_a_graph_raise_when_they_are_differentiated(sparse: bool) -> None:
    of = case(classes=V)
    inputs = leaves(*of.joint)
    loss = joint_rnnt_loss(*inputs, *of.integers, classes=classes_of(of), sparse=sparse)
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    plain = torch.autograd.grad(joint_rnnt_loss(*inputs, *of.integers, classes=classes_of(of), sparse=sparse), inputs)
    assert all(torch.equal(one.to_dense(), other.to_dense()) for one, other in zip(gradients, plain, strict=True))
    for gradient in gradients[:1] if sparse else gradients:
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.sum().backward(retain_graph=True)
    if sparse:
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.sparse.sum(gradients[2]).backward(retain_graph=True)


def test_labels_in_classes() -> None:
    classes = Classes.from_ids([9, 4, 7, 0], vocab_size=10, blank=9)
    assert classes.ids.tolist() == [9, 0, 4, 7]
    targets = torch.tensor([[7, 4, 9], [0, -5, 99]])
    assert labels_in(classes, targets, [3, 1]).tolist() == [[3, 2, 0], [1, -1, -1]]
    with pytest.raises(ValueError, match=r"targets: expected labels among the sampled classes.*got 5 at index \(0, 1\)"):
        labels_in(classes, torch.tensor([[7, 5]]), [2])
    with pytest.raises(TypeError, match="classes: expected Classes, got list"):
        labels_in([1, 2], targets, [3, 1])
    assert np.array_equal(tl.labels_in(classes, targets.numpy(), [3, 1]), [[3, 2, 0], [1, -1, -1]])
    assert labels_in(classes, targets.tolist(), torch.tensor([3, 1])).tolist() == [[3, 2, 0], [1, -1, -1]]
    with pytest.raises(ValueError, match=r"targets: expected shape \(B, U\)"):
        tl.labels_in(classes, [7, 4], [1, 1])


@pytest.mark.parametrize("correction", [False, True])
def test_pruned_module_with_classes(correction: bool) -> None:
    of = case(classes=V)
    torch.manual_seed(0)
    module = PrunedRNNTLoss(6, V, s_range=3, blank=2, occupancy_floor=0.0).double()
    module.step = 10_000
    encoder, predictor = leaves(*of.joint[:2])
    classes = classes_of(of, blank=2, correction=correction)
    assert classes.slots < V
    out = module(encoder, predictor, *of.integers, classes=classes)
    ids = torch.from_numpy(classes.ids).long()
    am, lm = (
        torch.nn.functional.linear(rows, layer.weight[ids], layer.bias[ids])
        for rows, layer in ((encoder, module.simple_encoder), (predictor, module.simple_predictor))
    )
    wanted, *_ = reference.simple_rnnt_loss(
        am.detach().numpy(), lm.detach().numpy(), labels_in(classes, *of.integers[::2]).numpy(), of.frames, of.labels,
        lm_only_scale=0.25,
    )  # fmt: skip
    assert abs(float(out.simple_loss.detach()) - wanted.mean()) < 1e-9
    inside = dataclasses.replace(of, joint=(*of.joint[:2], module.output.weight.detach(), module.output.bias.detach()))
    pruned, _ = expected(inside, classes, None, first=out.band.first, width=out.band.width, end=out.band.end)
    assert abs(float(out.pruned_loss.detach()) - pruned.mean()) < 1e-9
    out.loss.backward()
    used = module.simple_encoder.weight.grad.any(1).nonzero()[:, 0].tolist()
    assert set(used) == set(classes.ids.tolist())
    with pytest.raises(ValueError, match="classes: expected those of the whole batch"):
        module(encoder, predictor, *of.integers, classes=classes_of(of, "utterance", blank=2))


def test_gradients_of_workers_with_different_seeds_are_averaged(tmp_path: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert same(*found)

    torch.manual_seed(0)
    module = JointRNNTLoss(6, V).double()
    alone = []
    for rank in (0, 1):
        alone.append(torch.autograd.grad(loss_of(module, rank), list(module.parameters())))
    for got, one, other in zip(found[0], *alone, strict=True):
        assert error(got, (one + other) / 2) < 1e-12
    # The workers' classes differ, so each sees rows that the other has no gradient for.
    zero = [{v for v in range(V) if not gradients[0][v].any()} for gradients in alone]
    assert zero[0] - zero[1]
    assert zero[1] - zero[0]
