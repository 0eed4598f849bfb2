"""`plan`: its memory against what the calls allocate, its choices, its errors; and the command line's `plan`."""

import dataclasses
import gc
import json
import re
import subprocess
import sys
import time
import tracemalloc
from types import CodeType
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import transducer_loss as tl
from helpers import PEAK, Array, Counting, numpy_dtype, run_python
from transducer_loss import joint_loss, pruning, sampling, simple_loss, tiling
from transducer_loss.cells import Cells
from transducer_loss.processors import Host, OnCuda

Names = dict[str, Any]


def inputs(plan: tl.Plan, strategy: tl.Strategy) -> Names:
    """Arrays of the plan's sizes by the names that the call uses."""
    rng = np.random.default_rng(0)
    B, T, U, V, H = plan.B, plan.T, plan.U, plan.V, plan.H
    shapes = {"encoder": (B, T, H), "predictor": (B, U + 1, H), "weight": (V, H), "bias": (V,)}
    lengths = {"targets": rng.integers(1, V, (B, U)), "frames": np.full(B, T), "labels": np.full(B, U)}
    if "simple_rnnt_loss" in strategy.call:
        K = V
        if "sample_classes" in strategy.call:
            made: Names = {}
            exec(strategy.call.splitlines()[0], {"tl": tl, **lengths}, made)
            K = made["classes"].slots
        shapes |= {"am": (B, T, K), "lm": (B, U + 1, K)}
    floats = {name: (rng.normal(size=shape) / H**0.5).astype(numpy_dtype(plan.dtype)) for name, shape in shapes.items()}
    return {**floats, **lengths, "tl": tl, "np": np}


def arrays_of(value: Any) -> list[Array]:
    """The arrays of a gradient."""
    if dataclasses.is_dataclass(value):
        return [part for field in dataclasses.fields(value) for part in arrays_of(getattr(value, field.name))]
    return [value] if isinstance(value, np.ndarray) else []


def through_logits(names: Names) -> list[Array]:
    """What autograd does with the gradient of the logits: no array longer than it needs to."""
    hidden, gradient, weight = names["hidden"], names.pop("grad"), names["weight"]
    of_weight = np.tensordot(gradient, hidden, axes=([0, 1, 2], [0, 1, 2]))
    of_bias = gradient.sum(axis=(0, 1, 2))
    of_hidden = gradient @ weight
    del gradient
    of_sum = np.multiply(hidden, hidden)
    np.subtract(1, of_sum, out=of_sum)
    of_sum *= of_hidden
    return [of_sum.sum(axis=2), of_sum.sum(axis=1), of_weight, of_bias]


def traced(code: CodeType, given: Names) -> tuple[int, list[Array]]:
    """The most that a call allocates, and the gradients."""
    gc.collect()
    names = dict(given)
    tracemalloc.start()
    try:
        exec(code, names)
        if "hidden" in names:
            gradients = through_logits(names)
        else:
            gradients = [*arrays_of(names["grads"]), *arrays_of(names.get("simple_grads"))]
        return tracemalloc.get_traced_memory()[1], gradients
    finally:
        tracemalloc.stop()


def short_of(plan: tl.Plan, share: float) -> int:
    """Memory that the exact joint with the default workspace does not fit into."""
    return int(share * next(each.bytes for each in plan.strategies if each.name == "exact joint"))


@dataclasses.dataclass(frozen=True)
class Case:
    """What to plan and to run. `workspaces`: of the joints, as the memory makes them."""

    sizes: tuple[int, int, int, int, int]
    workspaces: dict[str, int | None]
    dtype: str = "float32"
    threads: int = 2
    share: float | None = None
    options: Names = dataclasses.field(default_factory=dict)

    def plan(self, **options: Any) -> tl.Plan:
        """With the memory that is the case's share of what the exact joint needs."""
        planned = tl.plan(*self.sizes, self.dtype, **self.options, **options)
        if self.share is None:
            return planned
        return tl.plan(*self.sizes, self.dtype, device_memory=short_of(planned, self.share), **self.options, **options)


MiB = 1 << 20
CASES = {
    "all kept": Case((4, 200, 40, 500, 128), {"exact joint": None, "pruned": None}),
    "one thread": Case((4, 200, 40, 500, 128), {"exact joint": None, "pruned": None}, threads=1),
    "8 threads": Case((4, 200, 40, 500, 128), {"exact joint": None, "pruned": None}, threads=8),
    "groups": Case(
        (16, 200, 40, 500, 128),
        {"exact joint": 16 * MiB, "exact joint, logits kept": 32 * MiB, "pruned": MiB // 2, "pruned, logits kept": 8 * MiB},
        share=0.7,
    ),
    "half": Case((4, 200, 40, 500, 128), {"exact joint": None, "pruned": None}, "float16"),
    "short, half": Case(
        (4, 200, 40, 500, 128), {"exact joint": 16 * MiB, "exact joint, logits kept": 32 * MiB, "pruned": None}, "bfloat16",
        share=0.7,
    ),
    "double": Case((4, 200, 40, 500, 64), {"exact joint": None, "pruned": None}, "float64"),
    "sampled": Case(
        (2, 200, 60, 2000, 64), {"exact joint": None, "pruned": None, "sampled": None, "pruned and sampled": None},
        options={"num_samples": 300},
    ),
    "sampled, half": Case(
        (2, 200, 60, 2000, 64), {"exact joint": None, "pruned": None, "sampled": None, "pruned and sampled": None}, "float16",
        options={"num_samples": 300},
    ),
    "not kept": Case(
        (2, 200, 60, 2000, 64),
        {"exact joint": 16 * MiB, "exact joint, logits kept": None, "pruned": MiB, "pruned, logits kept": 16 * MiB},
        share=0.1, options={"num_samples": 2000},
    ),
    "many classes": Case(
        (2, 100, 20, 12_000, 48), {"exact joint": None, "pruned": None, "sampled": None, "pruned and sampled": None}
    ),
    "many classes, half": Case(
        (1, 150, 20, 20_000, 32),
        {"exact joint": None, "exact joint, logits kept": 512 * MiB, "pruned": None, "sampled": None, "pruned and sampled": None},
        "float16",
    ),
    "many labels": Case((4, 60, 1200, 50, 64), {"exact joint": None, "pruned": None}, options={"s_range": 3}),
    "casts": Case((16, 1000, 2, 8, 512), {"exact joint": None}, "float16", threads=1),
    "simple casts": Case(
        (16, 100, 10, 2000, 8),
        {"exact joint": 8 * MiB, "exact joint, logits kept": 16 * MiB, "pruned": MiB // 4, "pruned, logits kept": 8 * MiB},
        "float16", share=0.1, options={"num_samples": 2000},
    ),
    "many cells, few in the band": Case((4, 100, 300, 200, 64), {"exact joint": None, "pruned": None}, options={"s_range": 20}),
    "wide band": Case((4, 400, 60, 500, 64), {"exact joint": None, "pruned": None}, options={"s_range": 30}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_joints_allocate_what_the_plan_says(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(case.threads))
    plan = case.plan(device="cpu")
    joints = [strategy for strategy in plan.strategies if not strategy.name.startswith("logits")]
    assert {strategy.name: strategy.workspace for strategy in joints} == case.workspaces
    for strategy in joints:
        expect_measured(plan, strategy)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((2, 100, 30, 1000, 64), "float32"), ((2, 100, 30, 50, 300), "float64"), ((2, 100, 30, 50, 40), "float16"),
     ((4, 200, 60, 9, 2), "float32"), ((4, 200, 60, 6, 1), "float64")],
)  # fmt: skip
def test_logits_allocate_what_the_plan_says(sizes: tuple[int, ...], dtype: str) -> None:
    plan = tl.plan(*sizes, dtype, device="cpu")
    assert [strategy.name for strategy in plan.strategies[:2]] == ["logits", "logits, in place"]
    # The many small products of NumPy's matmul take longer by more threads.
    with threadpoolctl.threadpool_limits(1):
        for strategy in plan.strategies[:2]:
            expect_measured(plan, strategy)


def expect_measured(plan: tl.Plan, strategy: tl.Strategy) -> None:
    """Raise unless a call with arrays of the plan's sizes takes the plan's memory, within 5 %."""
    given = inputs(plan, strategy)
    assert sum(value.nbytes for value in given.values() if isinstance(value, np.ndarray)) == strategy.inputs
    code = compile(strategy.call, strategy.name, "exec")
    measured, gradients = traced(code, given)
    assert sum(gradient.nbytes for gradient in gradients) == strategy.gradients
    wanted = strategy.gradients + strategy.temporary
    if wanted != pytest.approx(measured, rel=0.05):  # the first may load something, and Python's own tables grow now and then
        measured, _ = traced(code, given)
    assert wanted == pytest.approx(measured, rel=0.05), strategy


AUTOGRAD = PEAK + """
    import torch
    from transducer_loss.adapters.torch import rnnt_loss

    def step(B, T, U, V, H):
        encoder, predictor = (torch.randn(B, rows, H, requires_grad=True) for rows in (T, U + 1))
        output, targets = torch.nn.Linear(H, V), torch.randint(1, V, (B, U))
        logits = output(torch.tanh(encoder[:, :, None] + predictor[:, None]))
        rnnt_loss(logits, targets, [T] * B, [U] * B, inplace=INPLACE).backward()
        return ()

    step(1, 20, 5, 10, 8)
    print(json.dumps(peak(lambda: step(*SIZES), list)[0]))
"""


@pytest.mark.parametrize("inplace", [False, True])
def test_torch_allocates_for_logits_what_the_plan_says(inplace: bool) -> None:
    pytest.importorskip("torch")
    sizes = (4, 300, 60, 400, 256)
    measured = run_python(AUTOGRAD.replace("INPLACE", str(inplace)).replace("SIZES", str(sizes)), OMP_NUM_THREADS="2")
    assert tl.plan(*sizes, device="cpu").strategies[int(inplace)].bytes == pytest.approx(measured, rel=0.05)


class LikeCuda(Host):
    """The host's kernels, cut and allocated for as on CUDA."""

    host, strips, tile_bytes, tile_cells, group_cells, default_workspace, reserved = (
        getattr(OnCuda, name)
        for name in ("host", "strips", "tile_bytes", "tile_cells", "group_cells", "default_workspace", "reserved")
    )

    def __init__(self, allocate: Counting) -> None:
        super().__init__(threads=1, allocate=allocate)

    def gemm(self, a: Any, b: Any, out: Any, add: bool = False, scratch: Any = None) -> None:
        """cuBLAS widens half types and adds without further arrays."""
        product = a.astype(out.dtype) @ b.astype(out.dtype)
        out[...] = out + product if add else product


CUDA_CASES = {
    "kept": (Case((4, 200, 40, 500, 128), {}), None),
    "kept, half": (Case((4, 200, 40, 500, 128), {}, "float16"), None),
    "not kept": (Case((8, 200, 60, 300, 256), {}), 64 * MiB),
    "not kept, half": (Case((8, 200, 60, 300, 256), {}, "bfloat16"), 64 * MiB),
    "sampled": (Case((2, 200, 60, 2000, 64), {}, options={"num_samples": 300}), 128 * MiB),
    "small cells": (Case((4, 400, 100, 4, 4), {}), None),
    "wider than shared memory": (Case((40, 1, 3000, 5, 4), {}), None),
    "double": (Case((2, 100, 60, 1000, 32), {}, "float64", options={"num_samples": 300}), None),
}


@pytest.mark.parametrize(("case", "workspace"), CUDA_CASES.values(), ids=CUDA_CASES)
def test_on_cuda_joints_allocate_what_the_plan_says(
    case: Case, workspace: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arrays that come from the framework's memory, on the host: this machine may have no device."""
    if workspace is not None:
        monkeypatch.setattr(OnCuda, "default_workspace", workspace)
        monkeypatch.setattr(LikeCuda, "default_workspace", workspace)
    plan = case.plan(device="cuda")
    for strategy in plan.strategies[2:]:
        counting = Counting()
        with monkeypatch.context() as patch:
            for module in (joint_loss, simple_loss, pruning, sampling):
                patch.setattr(module, "processor_for", lambda *_, made=counting: LikeCuda(made))
            names = inputs(plan, strategy)
            exec(strategy.call, names)
        of_simple = sum(array.nbytes for array in arrays_of(names.get("simple_grads")))
        assert sum(array.nbytes for array in arrays_of(names["grads"])) + of_simple == strategy.gradients
        # The simple loss casts its gradients by NumPy, or CuPy.
        measured = counting.most + (of_simple if plan.dtype in ("float16", "bfloat16") else 0)
        assert strategy.gradients + strategy.temporary - OnCuda.reserved == pytest.approx(measured, rel=0.05), strategy


def test_every_strategy_is_measured_kept_and_not() -> None:
    """Cases that are all alike would say little."""
    names = {name for case in CASES.values() for name in case.workspaces}
    assert names == {
        "exact joint", "exact joint, logits kept", "pruned", "pruned, logits kept", "sampled", "pruned and sampled"
    }  # fmt: skip
    cuts = [tiling.cut(sizes_of(case.plan(device="cpu"), workspace)) for case in CASES.values() for name, workspace
            in case.workspaces.items() if name.startswith("exact")]  # fmt: skip
    assert {(len(cut.groups) > 1, cut.strips > 1) for cut in cuts} >= {(False, True), (True, True)}
    assert {kept for cut in cuts for kept in cut.retained} == {False, True}


def sizes_of(plan: tl.Plan, workspace: int | None) -> tiling.Sizes:
    """Of the exact joint, as the engine knows them."""
    processor = {"cpu": Host, "cuda": OnCuda}[plan.device]
    labels = np.full(plan.B, plan.U)
    return tiling.Sizes(
        processor, plan.dtype, Cells.full(np.full(plan.B, plan.T), labels), plan.V, plan.H,
        processor.default_workspace if workspace is None else workspace,
    )  # fmt: skip


def by_name(plan: tl.Plan) -> dict[str, tl.Strategy]:
    """Strategies by name, each of which is there once."""
    assert len({strategy.name for strategy in plan.strategies}) == len(plan.strategies)
    return {strategy.name: strategy for strategy in plan.strategies}


def test_work_is_the_matrix_products() -> None:
    B, T, U, V, H, S, K = 4, 200, 40, 500, 128, 7, 1 + 4 * 40 + 20
    found = by_name(tl.plan(B, T, U, V, H, s_range=S, num_samples=20))
    cells, rows = B * T * (U + 1), B * (T + U + 1)
    simple = [6 * cells * classes + 6 * rows * classes * H for classes in (V, K)]
    assert {name: strategy.flops for name, strategy in found.items()} == {
        "logits": 6 * cells * V * H, "logits, in place": 6 * cells * V * H, "exact joint": 6 * cells * V * H,
        "pruned": 6 * B * T * S * V * H + simple[0], "sampled": 6 * cells * K * H,
        "pruned and sampled": 6 * B * T * S * K * H + simple[1],
    }  # fmt: skip
    found = by_name(tl.plan(32, 1000, 200, 1024, 512))
    cells = 32 * 1000 * 201
    assert found["exact joint"].flops == 8 * cells * 1024 * 512
    assert found["exact joint, logits kept"].flops == found["logits"].flops == 6 * cells * 1024 * 512


@pytest.mark.parametrize(("T", "U", "asked", "width"), [(50, 20, 5, 5), (10, 30, 3, 4), (10, 30, 4, 4), (50, 3, 3, 3), (50, 3, 4, None)])
def test_the_band_is_as_wide_as_prune_makes_it(T: int, U: int, asked: int, width: int | None) -> None:
    found = by_name(tl.plan(2, T, U, 40, 8, s_range=asked))
    assert ("pruned" in found) == (width is not None)
    assert ("pruned and sampled" in by_name(tl.plan(2, T, U, 200, 8, s_range=asked, num_samples=2))) == (width is not None)
    if width is not None:
        assert f"s_range={width})" in found["pruned"].call
        names = inputs(tl.plan(2, T, U, 40, 8), found["pruned"])
        exec(found["pruned"].call.replace(f"s_range={width}", f"s_range={asked}"), names)
        assert names["band"].width == width


@pytest.mark.parametrize(
    ("sizes", "samples", "slots"),
    [((2, 20, 5, 100, 4), 10, 21), ((2, 20, 5, 22, 4), 10, 21), ((2, 20, 5, 21, 4), 10, None), ((2, 20, 50, 40, 4), 0, None),
     ((2, 20, 5, 30, 4), 10**9, None), ((1, 2, 1, (1 << 22) + 1, 4), 10, None)],
)  # fmt: skip
def test_sampled_if_that_leaves_out_classes(sizes: tuple[int, ...], samples: int, slots: int | None) -> None:
    found = by_name(tl.plan(*sizes, num_samples=samples))
    assert ("sampled" in found) == (slots is not None)
    if slots is not None:
        names = inputs(tl.plan(*sizes), found["sampled"])
        exec(found["sampled"].call, names)
        assert names["classes"].slots == slots
        assert found["sampled"].flops == 6 * sizes[0] * sizes[1] * (sizes[2] + 1) * slots * sizes[4]


def test_what_cannot_be_pruned_or_sampled() -> None:
    assert list(by_name(tl.plan(2, 30, 0, 10, 4))) == ["logits", "logits, in place", "exact joint"]
    assert list(by_name(tl.plan(1, 1, 0, 1, 1))) == ["logits", "logits, in place", "exact joint"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_calls_run_and_give_the_loss(device: str) -> None:
    plan = tl.plan(2, 30, 8, 60, 8, device=device, s_range=3, num_samples=10)
    given = inputs(plan, by_name(plan)["pruned"])
    losses = {}
    for strategy in plan.strategies:
        am, lm = (value[..., : inputs(plan, strategy).get("am", given["am"]).shape[-1]] for value in (given["am"], given["lm"]))
        names = {**given, "am": am, "lm": lm}
        exec(strategy.call, names)
        losses[strategy.name] = names["loss"]
        assert ("band" in names, "classes" in names) == ("pruned" in strategy.name, "sampled" in strategy.name)
        if not strategy.name.startswith("logits"):
            assert all(gradient.any() for gradient in arrays_of(names["grads"]))
    exact = losses.pop("logits")
    for name in ("logits, in place", "exact joint"):
        np.testing.assert_allclose(losses.pop(name), exact, rtol=1e-5)
    # Fewer paths make it larger, fewer classes smaller.
    assert (losses["pruned"] > exact + 1e-3).all()
    assert (losses["sampled"] < exact - 1e-3).all()
    assert (losses["sampled"] < losses["pruned and sampled"]).all()
    assert (losses["pruned and sampled"] < losses["pruned"]).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_call_says_its_workspace(device: str) -> None:
    seen = set()
    for size in (None, "40GiB", "1GiB", "300MiB", "40MiB"):
        plan = tl.plan(8, 400, 80, 4000, 64, device=device, device_memory=size)
        for strategy in plan.strategies:
            said = re.findall(r'workspace="(\w+)"', strategy.call)
            assert [joint_loss.workspace_bytes(each, 0) for each in said] == [strategy.workspace] * (strategy.workspace is not None)
            seen.add(strategy.workspace)
    assert {None, 2 * MiB if device == "cpu" else 64 * MiB} <= seen


@pytest.mark.parametrize(
    ("device", "share"), [("cpu", 0.95), ("cpu", 0.5), ("cpu", 0.3), ("cuda", 0.95), ("cuda", 0.5), ("cuda", 0.1)]
)
def test_short_memory_takes_the_largest_workspace_that_fits(device: str, share: float) -> None:
    sizes, threads = (8, 400, 80, 4000, 64), 2 if device == "cpu" else 1
    whole = tl.plan(*sizes, device=device, threads=threads)
    plan = tl.plan(*sizes, device=device, threads=threads, device_memory=short_of(whole, share))
    joint = by_name(plan)["exact joint"]
    assert joint.fits
    assert joint.workspace is not None
    assert plan.device_memory is not None
    twice = sizes_of(plan, 2 * joint.workspace)
    beyond = tiling.allocated(twice, tiling.cut(twice), threads)
    assert joint.bytes <= plan.device_memory < joint.inputs + joint.gradients + beyond


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_for_nothing_takes_the_least_workspace(device: str) -> None:
    plan = tl.plan(8, 400, 80, 4000, 64, device=device, device_memory=1000)
    assert plan.cheapest is None
    assert plan.cheapest_exact is None
    assert not any(strategy.fits for strategy in plan.strategies)
    workspace = by_name(plan)["exact joint"].workspace
    assert workspace is not None
    tiling.cut(sizes_of(plan, workspace))
    with pytest.raises(ValueError, match="workspace"):
        tiling.cut(sizes_of(plan, workspace // 2))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_default_too_small_is_raised(device: str) -> None:
    plan = tl.plan(1, 10, 2, 1 << 20, 1024, "float16", device=device)
    joint = by_name(plan)["exact joint"]
    if device == "cuda":  # its weight stays as it is
        assert joint.workspace is None
        return
    assert joint.workspace == 16 << 30
    with pytest.raises(ValueError, match="workspace"):
        tiling.cut(sizes_of(plan, 8 << 30))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_logits_are_kept_by_the_least_workspace_that_does(device: str) -> None:
    plan = tl.plan(8, 1000, 200, 4000, 64, device=device)
    kept = by_name(plan)["exact joint, logits kept"]
    assert kept.workspace is not None
    assert all(tiling.cut(sizes_of(plan, kept.workspace)).retained)
    assert not all(tiling.cut(sizes_of(plan, kept.workspace // 2)).retained)
    assert kept.bytes > by_name(plan)["exact joint"].bytes


def test_what_fits() -> None:
    sizes = (8, 200, 40, 500, 256)
    assert {strategy.fits for strategy in tl.plan(*sizes).strategies} == {None}
    exactly = by_name(tl.plan(*sizes))["logits, in place"].bytes
    for memory, fits in ((exactly, True), (exactly - 1, False)):
        plan = tl.plan(*sizes, device_memory=memory)
        assert by_name(plan)["logits, in place"].fits is fits
        assert all(strategy.fits == (strategy.bytes <= memory) for strategy in plan.strategies)
    assert tl.plan(*sizes, device_memory="1.5 GiB").device_memory == 3 << 29


def strategy(name: str, flops: int, memory: int, exact: bool = True, fits: bool | None = True) -> tl.Strategy:
    return tl.Strategy(name, exact, memory, 0, 0, flops, None, fits, f"call {name}")


@pytest.mark.parametrize(
    ("strategies", "cheapest", "exact"),
    [
        ([strategy("a", 3, 5), strategy("b", 2, 9), strategy("c", 2, 8)], "c", "c"),
        ([strategy("a", 1, 5, fits=False), strategy("b", 2, 9), strategy("c", 1, 5, exact=False)], "c", "b"),
        ([strategy("a", 2, 1, fits=None), strategy("b", 1, 2, fits=None)], "b", "b"),
        ([strategy("a", 2, 1, fits=False), strategy("b", 1, 2, exact=False)], "b", None),
        ([strategy("a", 2, 1, fits=False)], None, None),
    ],
)
def test_the_cheapest(strategies: list[tl.Strategy], cheapest: str | None, exact: str | None) -> None:
    plan = dataclasses.replace(tl.plan(1, 2, 3, 4, 5), strategies=tuple(strategies))
    assert (plan.cheapest and plan.cheapest.name, plan.cheapest_exact and plan.cheapest_exact.name) == (cheapest, exact)
    shown = str(plan).split("\n\n", 2)[2]
    assert shown == {
        ("c", "c"): "Cheapest exact: c\ncall c", ("b", "b"): "Cheapest exact: b\ncall b",
        ("c", "b"): "Cheapest exact: b\ncall b\n\nCheapest: c\ncall c",
        ("b", None): "Cheapest exact: none fits\n\nCheapest: b\ncall b", (None, None): "Nothing fits.",
    }[cheapest, exact]  # fmt: skip


def test_only_joints_over_all_paths_and_classes_are_exact() -> None:
    for plan in (tl.plan(8, 1000, 200, 4000, 64), tl.plan(8, 1000, 200, 4000, 64, device="cpu", device_memory="200MiB")):
        for each in plan.strategies:
            assert each.exact == ("prune" not in each.call and "sample" not in each.call)


def test_as_text() -> None:
    plan = tl.plan(8, 1000, 200, 4000, 64, "float16", device_memory="4GiB")
    title, table, *advice = str(plan).split("\n\n")
    assert title == "B=8 T=1000 U=200 V=4000 H=64 float16, cuda of 4 GiB"
    names, *rows = table.splitlines()
    assert re.split(" {2,}", names) == [
        "strategy", "loss", "work", "workspace", "memory", "inputs", "gradients", "temporary", "fits"
    ]
    assert [re.split(" {2,}", row)[0] for row in rows] == list(by_name(plan))
    assert re.split(" {2,}", rows[0])[:3] == ["logits", "exact", "2.47 TFLOP"]
    assert {row.split()[-1] for row in rows} == {"yes", "no"}
    assert advice[0].startswith("Cheapest exact: ")
    assert advice[1].startswith("Cheapest: pruned and sampled\nclasses = tl.sample_classes(")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sizes_beyond_any_machine_are_planned_at_once(device: str) -> None:
    sizes = (1024, 1000, 200, 1_000_000, 1024)
    begin = time.perf_counter()
    plan = tl.plan(*sizes, device=device, device_memory="80GiB")
    assert time.perf_counter() - begin < 5
    tracemalloc.start()
    tl.plan(16, 64_000, 200, 1_000_000, 1024, device=device, device_memory="80GiB")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10 * MiB
    found = by_name(plan)
    logits = 4 * 1024 * 1000 * 201 * 1_000_000
    assert 2 * logits < found["logits"].bytes < 2.01 * logits
    assert found["exact joint"].fits
    assert found["exact joint"].bytes < 30 << 30


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"B": 0}, ValueError, "B: expected 1 or more, got 0"),
        ({"T": 0}, ValueError, "T: expected 1 or more, got 0"),
        ({"U": -1}, ValueError, "U: expected 0 or more, got -1"),
        ({"V": 0}, ValueError, "V: expected 1 or more, got 0"),
        ({"H": 2.0}, TypeError, "H: expected an int, got float"),
        ({"B": 1 << 30, "T": 1 << 30}, ValueError, r"B: expected sizes of fewer than 2\^58 logits, got B=1073741824 T=1073741824"),
        ({"dtype": "int8"}, ValueError, "dtype: expected one of 'float16', 'bfloat16', 'float32', 'float64', got 'int8'"),
        ({"device": "gpu"}, ValueError, "device: expected one of 'cuda', 'cpu', got 'gpu'"),
        ({"device_memory": "much"}, ValueError, "device_memory: expected bytes or a size as '256MiB', got 'much'"),
        ({"device_memory": 0}, ValueError, "device_memory: expected more than 0 bytes, got 0"),
        ({"device_memory": 1.5}, TypeError, "device_memory: expected an int or a str, got float"),
        ({"s_range": 0}, ValueError, "s_range: expected 1 or more, got 0"),
        ({"num_samples": -1}, ValueError, "num_samples: expected 0 or more, got -1"),
        ({"threads": 0}, ValueError, "threads: expected 1 or more, got 0"),
    ],
)
def test_errors_name_the_argument(changes: Names, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        tl.plan(**{"B": 2, "T": 10, "U": 4, "V": 30, "H": 8, **changes})


def test_threads_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (8, 200, 40, 500, 256)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert tl.plan(*sizes, device="cpu") == tl.plan(*sizes, device="cpu", threads=3) != tl.plan(*sizes, device="cpu", threads=4)
    sizes = (64, 1000, 1000, 500, 8)  # of several tasks, and most memory within the simple loss
    assert tl.plan(*sizes, s_range=2) == tl.plan(*sizes, s_range=2, threads=4)
    assert tl.plan(*sizes).device == "cuda"


# As if neither were installed.
WITHOUT = "import sys; sys.modules['cupy'] = sys.modules['rich'] = None; "
MAIN = "import sys; from transducer_loss.__main__ import main; sys.exit(main(sys.argv[1:]))"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + MAIN, "plan", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


SIZES = ("--batch", "8", "--frames", "1000", "--labels", "200", "--classes", "4000", "--features", "64")


def test_command_line_as_json() -> None:
    done = command(*SIZES, "--dtype", "float16", "--memory", "4GiB", "--s-range", "7", "--samples", "50", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    plan = tl.plan(8, 1000, 200, 4000, 64, "float16", device_memory="4GiB", s_range=7, num_samples=50)
    listed = found.pop("strategies")
    assert [each.pop("bytes") for each in listed] == [each.bytes for each in plan.strategies]
    assert listed == [dataclasses.asdict(each) for each in plan.strategies]
    assert found == {
        "B": 8, "T": 1000, "U": 200, "V": 4000, "H": 64, "dtype": "float16", "device": "cuda", "device_memory": 4 << 30,
        "cheapest": "pruned and sampled", "cheapest_exact": "exact joint, logits kept",
    }  # fmt: skip


def test_command_line_as_a_table() -> None:
    done = command(*SIZES, "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    plan = tl.plan(8, 1000, 200, 4000, 64, device="cpu")
    assert done.stdout.split() == str(plan).split()


def test_command_line_when_nothing_fits() -> None:
    done = command(*SIZES, "--memory", "1MiB")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "Nothing fits.")
    done = command(*SIZES, "--memory", "1MiB", "--json")
    assert (done.returncode, json.loads(done.stdout)["cheapest"]) == (1, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SIZES, "--memory", "much"), "plan: device_memory: expected bytes"),
        ((*SIZES, "--s-range", "0"), "plan: s_range: expected 1 or more"),
        ((*SIZES, "--batch", "0"), "plan: B: expected 1 or more"),
        ((*SIZES, "--device", "gpu"), "--device: invalid choice: 'gpu'"),
        (SIZES[:-2], "the following arguments are required: --features"),
    ],
)
def test_command_line_of_what_cannot_be_planned(arguments: tuple[str, ...], message: str) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
