"""What a GPU shows of the losses: that runs agree bit for bit, what memory they take, and how long they take.

``python -m transducer_loss.benchmarks.gpu repeatability | memory | timings`` prints one JSON object; the exit status is 1 where
runs differ, or memory goes unseen. Needs PyTorch. ``--device cpu`` tries the measurements themselves, on small inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import transducer_loss
from transducer_loss.adapters.torch import (
    PrunedRNNTLoss,
    amortized_backlog,
    amortized_cost,
    edit_distance,
    embr_loss,
    gumbel_gate,
    joint_rnnt_loss,
    reduced_predictor,
    rnnt_loss,
    sample_classes,
)
from transducer_loss.benchmarks import floors
from transducer_loss.benchmarks.scenarios import random_case, trained_case

Shape = tuple[int, int, int, int, int]

SHAPES: list[Shape] = [(8, 200, 40, 500, 256), (4, 300, 60, 2000, 256), (32, 400, 100, 1000, 640)]
"""B, T, U, V, H."""
SMALL: Shape = (2, 20, 6, 30, 16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEBIBYTE = 1 << 20


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _logits(shape: Shape, dtype: torch.dtype, device: str) -> Tensor:
    batch, frames, labels, classes, _ = shape
    generator = torch.Generator(device).manual_seed(0)
    size = (batch, frames, labels + 1, classes)
    return torch.randn(size, dtype=dtype, device=device, generator=generator).requires_grad_()


def _joint(case: tuple[Any, ...], dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Any]]:
    """Leaves, and integers, which stay on the host."""
    return [torch.from_numpy(array).to(device, dtype).requires_grad_() for array in case[:4]], list(case[4:])


def _step(loss: Callable[..., Tensor], leaves: list[Tensor], *integers: Any, **options: Any) -> list[Tensor]:
    """Loss and gradients."""
    value = loss(*leaves, *integers, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _pruned_step(case: tuple[Any, ...], dtype: torch.dtype, device: str) -> Callable[[], list[Tensor]]:
    """Simple loss, band and pruned loss, with the gradients of everything."""
    (encoder, predictor, weight, _), integers = _joint(case, dtype, device)
    torch.manual_seed(0)
    losses = PrunedRNNTLoss(weight.shape[1], weight.shape[0]).to(device, dtype).eval()
    leaves = [encoder, predictor, *losses.parameters()]
    return functools.partial(_step, lambda *_: losses(encoder, predictor, *integers).loss, leaves)


def _sampled_step(
    case: tuple[Any, ...], dtype: torch.dtype, device: str, samples: int, **options: Any
) -> Callable[[], list[Tensor]]:
    """Classes drawn, and the loss over them with sparse gradients of the output layer."""
    leaves, integers = _joint(case, dtype, device)
    targets = torch.from_numpy(integers[0]).to(device)

    def step() -> list[Tensor]:
        classes = sample_classes(
            targets, integers[2], vocab_size=leaves[2].shape[0], num_samples=samples, correction=True, seed=1, **options
        )
        return _step(joint_rnnt_loss, leaves, targets, *integers[1:], classes=classes, sparse=True)

    return step


def _shared_step(
    case: tuple[Any, ...], dtype: torch.dtype, device: str, members: int, shared: bool = True, **options: Any
) -> Callable[[], list[Tensor]]:
    """EMBR over N hypotheses of each utterance, whose encoders they share, or have copies of."""
    (encoder, predictor, weight, bias), (targets, frames, labels) = _joint(case, dtype, device)
    batch = encoder.shape[0]
    rng = np.random.default_rng(0)
    which = np.repeat(np.arange(batch), members)
    said = torch.from_numpy(np.where(rng.random((batch * members, targets.shape[1])) < 0.9, targets[which], 1)).to(device)
    meant, lengths = torch.from_numpy(targets).to(device), torch.as_tensor(labels)
    rows = predictor.detach().repeat_interleave(members, 0).requires_grad_()
    index = torch.from_numpy(which)
    counts, hypothesis_lengths = torch.as_tensor(frames), lengths[index]
    options |= {"encoder_index": index, "reduction": "none"} if shared else {"reduction": "none"}
    leaves = [encoder, rows, weight, bias]

    def risk(encoder: Tensor, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not shared:
            encoder = encoder[index.to(device)]
        of_each = counts if shared else counts[index]
        nll = joint_rnnt_loss(encoder, rows, weight, bias, said, of_each, hypothesis_lengths, **options)
        edits = edit_distance(said.view(batch, members, -1), hypothesis_lengths.view(batch, members), meant, lengths)
        return embr_loss(nll.view(batch, members), edits.total)

    return functools.partial(_step, risk, leaves)


def _system_steps(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Callable[[], list[Tensor]]]:
    """The reduced decoder and Amortized Networks."""
    batch, frames, labels, classes, features = shape
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, frames, 4, generator=generator).to(device, dtype).requires_grad_()
    embedding = torch.randn(classes, features, generator=generator).to(device, dtype).requires_grad_()
    positions = torch.randn(4, 5, features, generator=generator).to(device, dtype).requires_grad_()
    # Labels as frequent as words are, so that the rows of some classes have many gradients to add up.
    share = 1.0 / torch.arange(1, classes + 1)
    targets = torch.multinomial(share, batch * labels, replacement=True, generator=generator).view(batch, labels).to(device)
    lengths, counts = [labels] * batch, [frames] * batch

    def averaged(embedding: Tensor, positions: Tensor) -> Tensor:
        out = reduced_predictor(embedding, positions, targets, lengths)
        return (out * out.detach()).float().sum()

    def amortized(logits: Tensor) -> Tensor:
        gates = gumbel_gate(logits, counts, hard=True, seed=1)
        each = [1.0, 0.7, 0.4, 0.2]
        return amortized_cost(gates, each, counts) + amortized_backlog(gates, each, counts, frame_period=0.5)

    return {
        "reduced_predictor": functools.partial(_step, averaged, [embedding, positions]),
        "gumbel_gate, cost, backlog": functools.partial(_step, amortized, [logits]),
    }


@contextlib.contextmanager
def _busy(device: str) -> Iterator[None]:
    """Matrix products on another stream all the while."""
    if device == "cpu":
        yield
        return
    done, stream = threading.Event(), torch.cuda.Stream()
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()

    def multiply() -> None:
        with torch.cuda.stream(stream):
            while not done.is_set():
                for _ in range(8):
                    torch.mm(matrix, matrix)
                stream.synchronize()

    thread = threading.Thread(target=multiply)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def repeatability(device: str, runs: int = 20) -> dict[str, Any]:
    """Whether loss and gradients of several runs beside a busy stream are the same bits."""
    shape = SMALL if device == "cpu" else (4, 150, 40, 300, 128)
    rows = []
    with _busy(device):
        for dtype in DTYPES:
            leaves, integers = _joint(random_case(*shape), dtype, device)
            logits = _logits(shape, dtype, device)
            steps: dict[str, Callable[[], list[Tensor]]] = {
                "rnnt_loss": functools.partial(_step, rnnt_loss, [logits], *integers),
                "joint_rnnt_loss": functools.partial(_step, joint_rnnt_loss, leaves, *integers),
                "joint_rnnt_loss, 48 MiB": functools.partial(_step, joint_rnnt_loss, leaves, *integers, workspace="48MiB"),
                "PrunedRNNTLoss": _pruned_step(random_case(*shape), dtype, device),
                "sampled, batch": _sampled_step(random_case(*shape), dtype, device, 20),
                "sampled, utterance": _sampled_step(random_case(*shape), dtype, device, 20, scope="utterance"),
                "EMBR, shared encoders": _shared_step(random_case(*shape), dtype, device, 3),
                **_system_steps(shape, dtype, device),
            }
            for name, step in steps.items():
                first = _bytes(step())
                same = [all(map(torch.equal, first, _bytes(step()))) for _ in range(runs - 1)]
                rows.append({"loss": name, "dtype": _name(dtype), "runs": runs, "same": 1 + sum(same)})
    return {"passed": all(row["same"] == runs for row in rows), "rows": rows}


def _bytes(results: list[Tensor]) -> list[Tensor]:
    """The bits of some results; of sparse ones the values, whose rows are those of one seed."""
    parts = [part for result in results for part in ((result._indices(), result._values()) if result.is_sparse else (result,))]
    return [part.clone().contiguous().view(-1).view(torch.uint8) for part in parts]


def memory(device: str) -> dict[str, Any]:
    """The torch allocator's peak against the workspace that was asked for, and against what the device itself says is gone."""
    rows: list[dict[str, Any]] = []
    shape = SMALL if device == "cpu" else SHAPES[0]
    for dtype in DTYPES:
        leaves, integers = _joint(random_case(*shape), dtype, device)
        gradients = 4 * sum(leaf.numel() for leaf in leaves)
        for workspace in (64 * MEBIBYTE, 256 * MEBIBYTE, 1024 * MEBIBYTE):
            step = functools.partial(_step, joint_rnnt_loss, leaves, *integers, workspace=workspace)
            step()  # compiles the kernels, makes the handles
            row: dict[str, Any] = {"dtype": _name(dtype), "workspace": workspace, "gradients_in_float32": gradients}
            if device != "cpu":
                row.update(_measured(step))
                # Gradients exist in float32, times the upstream gradient, and in the inputs' dtype.
                row["passed"] = (
                    row["peak"] <= workspace + 3 * gradients + MEBIBYTE
                    and row["unseen"] <= 8 * MEBIBYTE and row["cupy_pool"] <= MEBIBYTE
                )  # fmt: skip
            rows.append(row)
    # Eight hypotheses of each utterance: with copies of the encoder there are eight of it and of its gradient.
    for name in ("copied", "shared"):
        embr = _shared_step(random_case(*shape), torch.float32, device, 8, name == "shared", workspace=64 * MEBIBYTE)
        embr()
        rows.append({"what": f"EMBR, {name} encoders", **(_measured(embr) if device != "cpu" else {})})
    if device != "cpu":
        rows[-1]["passed"] = rows[-1]["peak"] < rows[-2]["peak"]
    return {"passed": all(row.get("passed", True) for row in rows), "rows": rows}


def _measured(step: Callable[[], Any]) -> dict[str, int]:
    import cupy

    pool = cupy.get_default_memory_pool()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    pool.free_all_blocks()
    torch.cuda.reset_peak_memory_stats()
    pooled, allocated, reserved = pool.total_bytes(), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    free = torch.cuda.mem_get_info()[0]
    step()
    torch.cuda.synchronize()
    taken, known = free - torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved() - reserved
    return {
        "peak": torch.cuda.max_memory_allocated() - allocated, "reserved": known, "device": taken, "unseen": taken - known,
        "cupy_pool": pool.total_bytes() - pooled,
    }  # fmt: skip


def _time(work: Callable[[], Any], device: str) -> dict[str, Any]:
    """Milliseconds of up to 20 runs or 1.5 s, at least 5, after two that are not counted; and the peak of torch's allocator."""
    on_gpu, times = device != "cpu", list[float]()
    work()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    work()
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
    begun = time.perf_counter()
    while len(times) < 5 or (len(times) < 20 and time.perf_counter() - begun < 1.5):
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start_time = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start_time))
    low, median, high = np.percentile(times, [10, 50, 90])
    return {"median_ms": median, "p10_ms": low, "p90_ms": high, "least_ms": min(times), "runs": len(times), "peak": peak}


def _torchaudio(shape: Shape, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    peer = importlib.import_module("torchaudio.functional").rnnt_loss
    batch, frames, labels, classes, _ = shape
    targets = torch.randint(1, classes, (batch, labels), dtype=torch.int32, device=device)
    lengths = [torch.full((batch,), n, dtype=torch.int32, device=device) for n in (frames, labels)]
    return functools.partial(_step, peer, [_logits(shape, dtype, device)], targets, *lengths, blank=0)


def _works(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], Callable[[], Any]]]]:
    """Names, and functions that make what is to be timed."""

    def joint(case: Callable[..., tuple[Any, ...]], **options: Any) -> Callable[[], Any]:
        leaves, integers = _joint(case(*shape), dtype, device)
        return functools.partial(_step, joint_rnnt_loss, leaves, *integers, **options)

    def logits() -> Callable[[], Any]:
        return functools.partial(_step, rnnt_loss, [_logits(shape, dtype, device)], *random_case(*shape)[4:])

    batch, frames, labels, classes, features = shape
    cells = batch * frames * (labels + 1)
    yield "three products", functools.partial(floors.three_products, cells, classes, features, dtype, device)
    yield "joint_rnnt_loss, every cell", functools.partial(joint, random_case, occupancy_floor=0.0)
    yield "joint_rnnt_loss, random", functools.partial(joint, random_case)
    yield "joint_rnnt_loss, as trained", functools.partial(joint, trained_case)
    yield "simple and pruned, S=5", lambda: _pruned_step(random_case(*shape), dtype, device)
    yield "sampled, k=100", lambda: _sampled_step(random_case(*shape), dtype, device, 100)
    if dtype == torch.bfloat16:
        # Of a vocabulary whose logits would take 26 GB in float32.
        large = (8, 200, 40, 100_000, 256) if device != "cpu" else shape
        yield f"sampled, k=1000, {large}", lambda: _sampled_step(random_case(*large), dtype, device, 1000)
    if shape == (SHAPES[0] if device != "cpu" else SMALL):
        yield "EMBR, N=4, shared encoders", lambda: _shared_step(random_case(*shape), dtype, device, 4)
    yield "rnnt_loss", logits
    yield "torchaudio rnnt_loss", functools.partial(_torchaudio, shape, dtype, device)


def timings(device: str) -> dict[str, Any]:
    """Forward and backward of the losses, beside torchaudio's and the matrix products alone; and of the other functions."""
    rows: list[dict[str, Any]] = []
    for shape in [SMALL] if device == "cpu" else SHAPES:
        for dtype in DTYPES:
            leaves, integers = _joint(trained_case(*shape), dtype, device)
            grads = transducer_loss.joint_rnnt_loss(*(leaf.detach() for leaf in leaves), *integers)[1]
            shared = {"B T U V H": shape, "dtype": _name(dtype), "kept as trained": 1 - grads.dropped if grads else None}
            for name, make in _works(shape, dtype, device):
                try:
                    rows.append({**shared, "what": name, **_time(make(), device)})
                except Exception as error:  # no torchaudio, a dtype it lacks, too little memory: the rest is still worth timing
                    rows.append({**shared, "what": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
                if device != "cpu":
                    torch.cuda.empty_cache()
    for shape in [SMALL] if device == "cpu" else [(8, 2000, 100, 100_000, 640), (128, 1000, 200, 4000, 640)]:
        for name, work in _system_steps(shape, torch.float32, device).items():
            rows.append({"B T U V H": shape, "dtype": "float32", "what": name, **_time(work, device)})
        said = torch.randint(4, 90, (shape[0], 8, shape[2]), device=device)
        lengths = torch.full((shape[0], 8), shape[2], device=device)
        edits = functools.partial(edit_distance, said, lengths, said[:, 0], lengths[:, 0])
        rows.append({"B T U V H": shape, "dtype": "int64", "what": "edit_distance, N=8", **_time(edits, device)})
    ours = [row for row in rows if "torchaudio" not in row["what"]]
    return {"passed": all("error" not in row for row in ours), "rows": rows}


def main() -> int:
    """Run one of them."""
    parser = argparse.ArgumentParser(prog="python -m transducer_loss.benchmarks.gpu")
    parser.add_argument("measure", choices=["repeatability", "memory", "timings"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    found = {"repeatability": repeatability, "memory": memory, "timings": timings}[arguments.measure](arguments.device)
    print(json.dumps({"torch": torch.__version__, "device": arguments.device, **found}, indent=1))
    return int(not found["passed"])


if __name__ == "__main__":
    sys.exit(main())
