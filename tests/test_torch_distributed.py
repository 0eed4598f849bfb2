"""Two processes and PyTorch: data-parallel gradients are those of one process, and so is a vocabulary in two parts."""

import socket
from typing import Any

import pytest
import torch

from distributed_workers import (
    KINDS,
    PARALLEL,
    SIZES,
    backward,
    gradients,
    model_of,
    parallel_loss,
    parallel_module,
    part,
    worker,
)
from naive_torch import error
from transducer_loss.adapters.torch import joint_rnnt_loss

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of both processes; they start once."""
    folder = tmp_path_factory.mktemp("workers")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_the_halves_differ() -> None:
    """So that an average of anything else would be noticed."""
    frames = [part(rank).frames for rank in (0, 1)]
    assert sorted(frames[0]) != sorted(frames[1])


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_process(results: Results, wrapper: str, kind: str) -> None:
    """The mean over the batch is the mean of two means over halves, which the wrappers take."""
    alone = model_of(kind, torch.float64)
    backward(alone, None, torch.float64)
    wanted = gradients(alone)
    for found in results:
        assert found[f"{wrapper} {kind}"].keys() == wanted.keys()
        for name, gradient in found[f"{wrapper} {kind}"].items():
            assert error(gradient, wanted[name]) < 1e-12, name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_mixed_precision(results: Results, kind: str) -> None:
    """Parameters and inputs are bfloat16 in the pass; gradients are rounded to it once, and averaged in float32."""
    halves = []
    for rank in (0, 1):
        module = model_of(kind, torch.float32).bfloat16()
        backward(module, rank, torch.bfloat16)
        halves.append(gradients(module))
    for found in results:
        for name, gradient in found[f"half {kind}"].items():
            assert gradient.dtype == torch.float32
            wanted = (halves[0][name].float() + halves[1][name].float()) / 2
            assert torch.equal(gradient, wanted), name


def test_a_sharded_output_layer_is_named(results: Results) -> None:
    for found in results:
        assert found["misplaced"].startswith("weight: expected a torch.Tensor of this process, got a DTensor: fully_shard the")


def expect_parts(found: list[Any], wanted: list[torch.Tensor], most: float) -> None:
    """Loss and gradients of encoder and predictor are the whole's in both processes; those of the layer are slices."""
    for one, other in zip(*(each[:3] for each in found), strict=True):
        assert torch.equal(one, other)
    for one, want in zip(found[0][:3], wanted[:3], strict=True):
        assert one.dtype == want.dtype
        assert error(one, want) <= most
    for one, other, want in zip(*(each[3:] for each in found), wanted[3:], strict=True):
        assert (len(one), len(other)) == SIZES
        assert error(torch.cat([one, other]), want) <= most


@pytest.mark.parametrize("name", PARALLEL)
def test_a_vocabulary_in_two_parts(results: Results, name: str) -> None:
    wanted = parallel_loss(None, name)
    half = "bfloat16" in name or name == "autocast"
    most = {torch.float64: 1e-12, torch.float32: 2e-6}[wanted[0].dtype] if not half else 2**-8
    expect_parts([found[f"parallel {name}"] for found in results], wanted, most)


def test_the_module_of_a_vocabulary_in_two_parts(results: Results) -> None:
    expect_parts([found["module"] for found in results], parallel_module(None), 1e-12)


def test_what_is_no_process_group_is_named() -> None:
    of = part(0)
    with pytest.raises(TypeError, match=r"process_group: expected a torch\.distributed\.ProcessGroup or a Shard, got str"):
        joint_rnnt_loss(*of.joint, *of.integers, process_group="gloo")
