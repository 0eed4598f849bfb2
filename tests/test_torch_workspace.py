"""`workspace="auto"`: what it is for how much free memory, that it is found once, and that the loss takes it everywhere.

No device is needed: what torch says of one's memory is a stand-in, and the loss on the CPU is told to take itself for on it.
"""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import transducer_loss as tl
from naive_torch import case, leaves, same
from transducer_loss import Shard, joint_loss, tiling
from transducer_loss.adapters.torch import JointRNNTLoss, PrunedRNNTLoss, joint_rnnt_loss, workspace
from transducer_loss.adapters.torch.workspace import auto_workspace, reset_auto_workspace, workspace_for
from transducer_loss.processors import Host

MIB, GIB = 1 << 20, 1 << 30
OF = case(classes=20)


class Memory:
    """What torch says of the memory of devices, and how often it was asked."""

    def __init__(self) -> None:
        self.free, self.reserved, self.allocated = {0: 70 * GIB, 1: 13 * GIB}, {0: 0, 1: 0}, {0: 0, 1: 0}
        self.asked: list[int] = []

    def get_info(self, device: int) -> tuple[int, int]:
        self.asked.append(device)
        time.sleep(0.01)  # in which another thread may ask, too
        return self.free[device], 80 * GIB


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    says = Memory()
    monkeypatch.setattr(torch.cuda, "mem_get_info", says.get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: says.reserved[device])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: says.allocated[device])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    reset_auto_workspace()
    yield says
    reset_auto_workspace()


@pytest.fixture
def as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU is taken for device 0; the workspaces that the core is given."""
    given: list[int] = []

    def noted(*arguments: Any, **options: Any) -> tiling.Problem:
        given.append(options["workspace"])
        return problem(*arguments, **options)

    problem = joint_loss.problem
    monkeypatch.setattr(joint_loss, "problem", noted)
    monkeypatch.setattr(workspace, "_index", lambda device: 0)
    return given


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (0, 256 * MIB), (1, 256 * MIB), (GIB, 256 * MIB), (2 * GIB - 1, 256 * MIB), (2 * GIB, 512 * MIB), (16 * GIB - 1, 2 * GIB),
        (16 * GIB, 4 * GIB), (23 * GIB, 4 * GIB), (32 * GIB - 1, 4 * GIB), (32 * GIB, 8 * GIB), (141 * GIB, 8 * GIB),
    ],
)  # fmt: skip
def test_a_quarter_as_a_power_of_two(free: int, expected: int) -> None:
    assert workspace_for(free) == expected


def test_never_more_than_a_quarter_and_never_less_than_an_eighth_between_its_bounds() -> None:
    before = 0
    for free in np.geomspace(GIB, 32 * GIB, 500).astype(int).tolist():
        found = workspace_for(free)
        assert free / 8 < found <= free / 4
        assert found & (found - 1) == 0
        assert found >= before
        before = found


def test_it_is_found_once_for_a_device(memory: Memory) -> None:
    assert auto_workspace("cuda:0") == 8 * GIB
    memory.free[0] = 3 * GIB
    assert auto_workspace("cuda:0") == auto_workspace(torch.device("cuda", 0)) == 8 * GIB
    assert memory.asked == [0]
    assert auto_workspace("cuda:1") == auto_workspace("cuda") == auto_workspace() == 2 * GIB  # the current one is 1
    assert memory.asked == [0, 1]


def test_reset(memory: Memory) -> None:
    assert (auto_workspace("cuda:0"), auto_workspace("cuda:1")) == (8 * GIB, 2 * GIB)
    memory.free = {0: 3 * GIB, 1: 3 * GIB}
    reset_auto_workspace("cuda:1")
    assert (auto_workspace("cuda:0"), auto_workspace("cuda:1")) == (8 * GIB, 512 * MIB)
    memory.free = {0: 5 * GIB, 1: 5 * GIB}
    reset_auto_workspace()
    assert (auto_workspace("cuda:0"), auto_workspace("cuda:1")) == (GIB, GIB)
    reset_auto_workspace("cuda:0")
    reset_auto_workspace("cuda:0")  # of what is not there
    reset_auto_workspace("cpu")
    assert auto_workspace("cuda:1") == GIB


def test_what_the_allocator_holds_without_use_is_free(memory: Memory) -> None:
    memory.free[0], memory.reserved[0], memory.allocated[0] = 2 * GIB, 30 * GIB, 14 * GIB
    assert auto_workspace("cuda:0") == workspace_for(18 * GIB) == 4 * GIB


def test_threads_find_one(memory: Memory) -> None:
    start = threading.Barrier(8)

    def ask(number: int) -> int:
        start.wait()
        memory.free[0] = (number + 1) * GIB
        return auto_workspace("cuda:0")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert memory.asked == [0]


def test_it_is_said_once(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, "transducer_loss"):
        auto_workspace("cuda:0")
        auto_workspace("cuda:0")
    (record,) = caplog.records
    assert record.name == "transducer_loss"
    assert record.levelno == logging.INFO
    assert record.getMessage() == 'workspace="auto" is 8192 MiB on cuda:0 from now on, by the 71680 MiB that are free'
    assert capfd.readouterr() == ("", "")


def test_on_the_cpu_it_is_the_default(memory: Memory) -> None:
    assert auto_workspace("cpu") == Host.default_workspace == 256 * MIB
    for reduction in ("mean", "none"):
        results = []
        for given in ("auto", None, "256MiB"):
            inputs = leaves(*OF.joint, dtype=torch.float32)
            loss = joint_rnnt_loss(*inputs, *OF.integers, workspace=given, reduction=reduction)
            results.append([loss.detach(), *torch.autograd.grad(loss.sum(), inputs)])
        assert same(results[0], results[1])
        assert same(results[0], results[2])
    assert memory.asked == []


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_takes_it_forward_and_backward(reduction: str, memory: Memory, as_if_on_cuda: list[int]) -> None:
    memory.free[0] = 17 * GIB
    for _ in range(2):
        inputs = leaves(*OF.joint, dtype=torch.float32)
        loss = joint_rnnt_loss(*inputs, *OF.integers, workspace="auto", reduction=reduction)
        memory.free[0] = 3 * GIB
        loss.sum().backward()
    assert set(as_if_on_cuda) == {4 * GIB}
    assert len(as_if_on_cuda) == (4 if reduction == "none" else 2)
    assert memory.asked == [0]


def test_other_workspaces_ask_nothing(memory: Memory, as_if_on_cuda: list[int]) -> None:
    for given in (None, "64MiB", 64 * MIB):
        joint_rnnt_loss(*OF.joint, *OF.integers, workspace=given)
    assert as_if_on_cuda == [None, "64MiB", 64 * MIB]
    assert memory.asked == []


def test_modules_take_it(as_if_on_cuda: list[int]) -> None:
    features = OF.joint[0].shape[-1]
    encoder, predictor = (tensor.float() for tensor in OF.joint[:2])
    JointRNNTLoss(features, 20, workspace="auto")(encoder, predictor, *OF.integers)
    PrunedRNNTLoss(features, 20, s_range=3, workspace="auto")(encoder, predictor, *OF.integers)
    assert as_if_on_cuda == [8 * GIB, 8 * GIB]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_graph_does_not_see_it(reduction: str, memory: Memory, as_if_on_cuda: list[int]) -> None:
    """One graph without a break, which asks when it runs first, and takes another number after a reset without a new one."""

    def call(*inputs: Any) -> Any:
        return joint_rnnt_loss(*inputs, OF.targets, frames, labels, workspace="auto", reduction=reduction)

    frames, labels = torch.tensor(OF.frames), torch.tensor(OF.labels)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for free in (17 * GIB, 5 * GIB):
        memory.free[0] = free
        results = []
        for function in (compiled, call, compiled):
            inputs = leaves(*OF.joint, dtype=torch.float32)
            loss = function(*inputs)
            results.append([loss.detach(), *torch.autograd.grad(loss.sum(), inputs)])
            memory.free[0] = GIB
        assert same(results[0], results[1])
        assert same(results[0], results[2])
        assert set(as_if_on_cuda) == {workspace_for(free)}
        del as_if_on_cuda[:]
        reset_auto_workspace()
    assert counter.frame_count == 1
    assert memory.asked == [0, 0]
    torch._dynamo.reset()


def test_processes_that_share_an_output_layer_need_one_number() -> None:
    shard = Shard(lambda array, operation: None, [20], 0)
    with pytest.raises(ValueError, match=r"^workspace: expected bytes, the same in every process of process_group, got 'auto'"):
        joint_rnnt_loss(*OF.joint, *OF.integers, workspace="auto", process_group=shard)
    joint_rnnt_loss(*OF.joint, *OF.integers, workspace="64MiB", process_group=shard)


@pytest.mark.parametrize("word", ["Auto", "automatic", ""])
def test_no_other_word(word: str) -> None:
    with pytest.raises(ValueError, match="workspace: expected bytes or a size as '256MiB'"):
        joint_rnnt_loss(*OF.joint, *OF.integers, workspace=word)


def test_it_is_of_pytorch_alone() -> None:
    """The core never looks at free memory."""
    arrays = [tensor.detach().numpy() for tensor in OF.joint]
    with pytest.raises(ValueError, match="workspace: expected bytes or a size as '256MiB', got 'auto'"):
        tl.joint_rnnt_loss(*arrays, OF.targets.numpy(), OF.frames, OF.labels, workspace="auto")
