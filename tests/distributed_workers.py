"""Two processes that train on halves of a batch, or hold halves of a vocabulary; where their processes can import it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data_parallel import begin, leave
from naive_torch import Case, case
from transducer_loss.adapters.torch import JointRNNTLoss, PrunedRNNTLoss, RNNTLoss, joint_rnnt_loss, prune, simple_rnnt_loss

SIZES = (5, 8)
"""Classes of the two processes that share a vocabulary."""

H, V = 6, sum(SIZES)


class Model(torch.nn.Module):
    """Two projections and a loss: what a recogniser is, for a gradient."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.encoder, self.predictor = torch.nn.Linear(H, H), torch.nn.Linear(H, H)
        if kind == "logits":
            self.output, self.loss = torch.nn.Linear(H, V), RNNTLoss()
        elif kind == "joint":
            self.loss = JointRNNTLoss(H, V, occupancy_floor=0.0)
        else:
            self.loss = PrunedRNNTLoss(H, V, s_range=3, warm_step=0, occupancy_floor=0.0)

    def forward(self, encoder: Tensor, predictor: Tensor, *integers: Any) -> Tensor:
        encoder, predictor = self.encoder(encoder), self.predictor(predictor)
        if self.kind == "logits":
            logits = self.output(torch.tanh(encoder[:, :, None] + predictor[:, None]))
            return self.loss(logits, *integers)
        loss = self.loss(encoder, predictor, *integers)
        return loss.loss if self.kind == "pruned" else loss


KINDS = ("logits", "joint", "pruned")


def model_of(kind: str, dtype: torch.dtype) -> Model:
    torch.manual_seed(7)
    return Model(kind).to(dtype)


def part(rank: int | None) -> Case:
    """Half of a batch, whose halves are of unlike lengths, or all of it."""
    of = case()
    half = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    return dataclasses.replace(
        of, joint=(of.joint[0][half], of.joint[1][half], *of.joint[2:]), targets=of.targets[half],
        frames=of.frames[half], labels=of.labels[half],
    )  # fmt: skip


def backward(model: Any, rank: int | None, dtype: torch.dtype) -> Tensor:
    of = part(rank)
    loss: Tensor = model(*(tensor.to(dtype) for tensor in of.joint[:2]), *of.integers)
    loss.backward()
    return loss.detach()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        for name, parameter in model.named_parameters()
    }


def with_ddp(rank: int, kind: str) -> dict[str, Tensor]:
    module = model_of(kind, torch.float64)
    backward(torch.nn.parallel.DistributedDataParallel(module), rank, torch.float64)
    return gradients(module)


def with_fsdp(rank: int, kind: str, policy: MixedPrecisionPolicy, dtype: torch.dtype) -> dict[str, Tensor]:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    module = model_of(kind, dtype)
    for inner in (module.encoder, module.loss) if kind != "logits" else (module.encoder, module.output):
        fully_shard(inner, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    backward(module, rank, dtype)
    backward(module, rank, dtype)  # parameters are gathered anew, and gradients add up
    return {name: gradient / 2 for name, gradient in gradients(module).items()}


def misplaced(rank: int) -> str:
    """What is said of a shard of an output layer whose forward pass never runs."""
    module = JointRNNTLoss(H, V)
    fully_shard(module.output, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    of = part(rank)
    try:
        module(*(tensor.float() for tensor in of.joint[:2]), *of.integers)
    except TypeError as error:
        return str(error)
    return ""


PARALLEL: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none"},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "autocast": {"dtype": torch.float32, "autocast": True},
    "blank of the second": {"blank": -2},
    "blank of the first": {"blank": 3, "reduction": "sum"},
    "band": {"band": True, "reduction": "none"},
    "encoder index": {"encoder_index": [2, 0, 0, 2], "reduction": "none"},
    "dropout": {"dropout": 0.4},
    "no bias": {"bias": False},
    "workspace": {"workspace": 40_000, "reduction": "none"},
    "floor": {"occupancy_floor": 1e-6},
}


def parallel_loss(rank: int | None, name: str) -> list[Tensor]:
    """Loss and gradients, of a slice of the output layer or (None) of all of it."""
    options = {"occupancy_floor": 0.0, **PARALLEL[name]}
    dtype, autocast, bias = options.pop("dtype", torch.float64), options.pop("autocast", False), options.pop("bias", True)
    of = case()
    rows = slice(None) if rank is None else slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    inputs = [
        tensor[rows if i > 1 else slice(None)].to(dtype).clone().requires_grad_() for i, tensor in enumerate(of.joint)
    ]
    if options.pop("band", False):
        occupancy = simple_rnnt_loss(of.logits[:, :, 0], of.logits[:, 0], *of.integers)[1]
        options["band"] = prune(occupancy, of.frames, of.labels, s_range=3)
    if rank is not None:
        options["process_group"] = torch.distributed.group.WORLD
    # Generators of the two differ, and masks of the dropout must not.
    torch.manual_seed(rank or 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = joint_rnnt_loss(*inputs[:3], inputs[3] if bias else None, *of.integers, **options)
    upstream = torch.tensor([1.5, -0.75, 0.0, 2.0]) if loss.ndim else torch.tensor(-2.5)
    found = torch.autograd.grad(loss, inputs if bias else inputs[:3], upstream.to(loss.dtype), retain_graph=True)
    again = torch.autograd.grad(loss, inputs if bias else inputs[:3], upstream.to(loss.dtype))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    return [loss.detach(), *found]


def parallel_module(rank: int | None) -> list[Tensor]:
    """The same of the module."""
    torch.manual_seed(3)
    whole = JointRNNTLoss(H, V, reduction="sum").double()
    module, of = whole, case()
    if rank is not None:
        rows = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
        module = JointRNNTLoss(H, SIZES[rank], reduction="sum", process_group=torch.distributed.group.WORLD).double()
        with torch.no_grad():
            module.output.weight.copy_(whole.output.weight[rows])
            module.output.bias.copy_(whole.output.bias[rows])
    inputs = [tensor.clone().requires_grad_() for tensor in of.joint[:2]]
    loss = module(*inputs, *of.integers)
    loss.backward()
    return [loss.detach(), *(tensor.grad for tensor in (*inputs, module.output.weight, module.output.bias))]


def jobs(rank: int) -> dict[str, Callable[[], Any]]:
    full, half = MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {
        **{f"ddp {kind}": lambda kind=kind: with_ddp(rank, kind) for kind in KINDS},
        **{f"fsdp {kind}": lambda kind=kind: with_fsdp(rank, kind, full, torch.float64) for kind in KINDS},
        **{f"half {kind}": lambda kind=kind: with_fsdp(rank, kind, half, torch.float32) for kind in KINDS},
        "misplaced": lambda: misplaced(rank),
        **{f"parallel {name}": lambda name=name: parallel_loss(rank, name) for name in PARALLEL},
        "module": lambda: parallel_module(rank),
    }


def worker(rank: int, port: int, folder: str) -> None:
    """Leave the results of every job of one of two processes in a folder."""
    torch.set_num_threads(1)
    begin(rank, port)
    leave(rank, folder, {name: job() for name, job in jobs(rank).items()})
