"""The command line: ``python -m transducer_loss info | check | plan | bench | compile``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transducer_loss import check, info, kernel_cache
from transducer_loss.arrays import FLOATS
from transducer_loss.benchmarks import report, runner
from transducer_loss.benchmarks.scenarios import SUITES
from transducer_loss.planner import DEVICES, plan
from transducer_loss.table import aligned

Cells = Sequence[Sequence[str]]


def _show(columns: Sequence[str], rows: Cells) -> None:
    """Print a table: by rich in a terminal that has it, else as plain aligned text."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(aligned(columns, rows))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(Text, row))
    # Without a terminal rich would assume 80 columns and wrap.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _print_json(value: Any) -> None:
    """NaN and infinities are not JSON: null stands for them."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain(inner) for key, inner in part.items()}
        if isinstance(part, list):
            return [plain(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    print(json.dumps(plain(value), indent=2, allow_nan=False))


def _info(arguments: argparse.Namespace) -> int:
    found = info.describe()
    if arguments.json:
        _print_json(found)
        return 0
    host, cuda = found["host"], found["cuda"]
    rows = [
        ["transducer_loss", found["transducer_loss"]],
        ["Python", f"{found['python']}, {found['platform']}"],
        ["host library", host["library"] or host["reason"]],
        *([f"  not {level}", reason] for level, reason in host["better"].items()),
        ["threads", str(host["threads"])],
        ["NumPy", host["numpy"]],
        *(["BLAS", f"{blas['name']} {blas['version']}, {blas['threads']} threads"] for blas in host["blas"]),
        ["CuPy", cuda["cupy"] or "none"],
        ["CUDA", "usable" if cuda["usable"] else cuda["reason"]],
        *([f"  {name}", cuda[name]] for name in ("driver", "runtime", "nvrtc") if cuda[name]),
        *(
            [
                f"  cuda:{device['index']}",
                f"{device['name']}, {device['memory'] / 2**30:.0f} GiB, compute capability {device['compute_capability']}",
            ]
            for device in cuda["devices"]
        ),
        *([name, version or "none"] for name, version in found["frameworks"].items()),
    ]
    _show(["what", "found"], rows)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    device = arguments.device or ("cuda" if info.cuda()["usable"] else "cpu")
    try:
        rows = check.check(
            device, functions=arguments.function or check.FUNCTIONS, dtypes=arguments.dtype or FLOATS, seed=arguments.seed,
            progress=lambda what: print(f"checking {what}", file=sys.stderr, flush=True),
        )  # fmt: skip
    except ValueError as error:
        print(f"python -m transducer_loss check: {error}", file=sys.stderr)
        return 2
    failed = [row for row in rows if not row.passed]
    if arguments.json:
        listed = [{**dataclasses.asdict(row), "passed": row.passed} for row in rows]
        _print_json({"device": device, "passed": not failed, "failed": len(failed), "rows": listed})
        return int(bool(failed))
    _show(
        ["function", "topology", "variant", "dtype", "loss error", "budget", "gradient error", "budget", "verdict"],
        [
            [
                row.function, row.topology, row.variant, row.dtype, f"{row.loss_error:.1e}", f"{row.loss_budget:.1e}",
                f"{row.gradient_error:.1e}", f"{row.gradient_budget:.1e}", "passed" if row.passed else row.problem or "FAILED",
            ]
            for row in rows
        ],
    )  # fmt: skip
    print(f"{device}: {len(rows) - len(failed)} of {len(rows)} passed")
    return int(bool(failed))


def _plan(arguments: argparse.Namespace) -> int:
    try:
        planned = plan(
            arguments.batch, arguments.frames, arguments.labels, arguments.classes, arguments.features, arguments.dtype,
            device=arguments.device, device_memory=arguments.memory, s_range=arguments.s_range, num_samples=arguments.samples,
        )  # fmt: skip
    except ValueError as error:
        print(f"python -m transducer_loss plan: {error}", file=sys.stderr)
        return 2
    cheapest = planned.cheapest
    if arguments.json:
        found = dataclasses.asdict(planned)
        found["strategies"] = [{**dataclasses.asdict(each), "bytes": each.bytes} for each in planned.strategies]
        for name, each in (("cheapest", cheapest), ("cheapest_exact", planned.cheapest_exact)):
            found[name] = None if each is None else each.name
        _print_json(found)
    else:
        print(planned.title)
        _show(*planned.table)
        print(planned.advice)
    return int(cheapest is None)


def _compile(arguments: argparse.Namespace) -> int:
    architectures = arguments.arch or [
        int(device["compute_capability"].replace(".", "")) for device in info.cuda()["devices"]
    ]
    try:
        if not architectures:
            raise ValueError("arch: expected one, as --arch 90, on a machine without a GPU, got none")
        filled = kernel_cache.fill(
            architectures, arguments.dtype or FLOATS,
            progress=lambda what: print(f"compiling {what}", file=sys.stderr, flush=True),
        )  # fmt: skip
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = info.cuda()["reason"] if isinstance(error, ImportError) else error
        print(f"python -m transducer_loss compile: {reason}", file=sys.stderr)
        return 2
    folder = str(kernel_cache.directory().absolute())
    if arguments.json:
        _print_json({"directory": folder, "architectures": [dataclasses.asdict(each) for each in filled]})
        return 0
    _show(
        ["GPUs", "kernels", "compiled now", "size", "seconds"],
        [
            [f"sm_{of.architecture}", str(of.kernels), str(of.compiled), f"{of.bytes / 2**20:.1f} MiB", f"{of.seconds:.1f}"]
            for of in filled
        ],
    )  # fmt: skip
    print(f"in {folder}")
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int], None]]:
    """Show on stderr what comes next of how many: by a bar in a terminal that has rich, else line by line."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda what, total: print(what, file=sys.stderr, flush=True)
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", completed=-1)
        yield lambda what, total: bar.update(task, advance=1, total=total, description=what)


def _bench(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("torch") is None:
        print("python -m transducer_loss bench: expected PyTorch, by which all implementations are measured", file=sys.stderr)
        return 2
    with _progress() as advance:
        results = runner.run(
            arguments.suite, arguments.device, scenarios=arguments.scenario or (), rounds=arguments.rounds, advance=advance,
            peers=arguments.implementation or runner.NAMES, output=arguments.output,
        )  # fmt: skip
    if arguments.json:
        _print_json(results)
    else:
        _show(report.COLUMNS, report.rows(results))
        print(report.described(results))
        for name, reason in results["absent"].items():
            print(f"absent: {name} ({reason})")
    return int(any("failed" in row and row["implementation"].startswith(report.OURS) for row in results["rows"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process by default.

    Returns
    -------
    int
        Exit status: 0, or 1 where a check failed or nothing fits, or 2 for what cannot be done.
    """
    parser = argparse.ArgumentParser(prog="python -m transducer_loss", description="Losses for training neural transducers.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser("info", help="what is installed and usable")
    about.set_defaults(run=_info)
    compare = commands.add_parser("check", help="every loss and gradient on this device against float64")
    compare.set_defaults(run=_check)
    compare.add_argument("--device", help="cpu, cuda or cuda:N; by default the first CUDA device, where there is one")
    compare.add_argument("--function", action="append", choices=check.FUNCTIONS, help="check only this; may be repeated")
    compare.add_argument("--dtype", action="append", choices=FLOATS, help="check only this; may be repeated")
    compare.add_argument("--seed", type=int, default=0, help="of the inputs")
    estimate = commands.add_parser("plan", help="memory and work of every way to compute the loss, and the call to copy")
    estimate.set_defaults(run=_plan)
    for name, what in (
        ("batch", "utterances"), ("frames", "frames of an utterance"), ("labels", "labels of an utterance"),
        ("classes", "classes, with the blank"), ("features", "features of the joint"),
    ):  # fmt: skip
        estimate.add_argument(f"--{name}", type=int, required=True, help=what)
    estimate.add_argument("--dtype", default="float32", choices=FLOATS, help="of the inputs (default: float32)")
    estimate.add_argument("--device", default="cuda", choices=DEVICES, help="where it will run (default: cuda)")
    estimate.add_argument("--memory", help="what the device has for the loss, as 16GiB")
    estimate.add_argument("--s-range", type=int, default=5, help="labels per frame of the pruned strategies (default: 5)")
    estimate.add_argument("--samples", type=int, default=1000, help="negatives of the sampled strategies (default: 1000)")
    prepare = commands.add_parser("compile", help="fill the cache of CUDA kernels, for GPUs that need not be here")
    prepare.set_defaults(run=_compile)
    prepare.add_argument(
        "--arch", type=int, nargs="+", action="extend", help="90 for compute capability 9.0; by default that of the GPUs here"
    )
    prepare.add_argument("--dtype", action="append", choices=FLOATS, help="only for inputs of this; may be repeated")
    race = commands.add_parser("bench", help="every loss beside installed peers and the machine's floor")
    race.set_defaults(run=_bench)
    race.add_argument("--suite", choices=SUITES, default="cpu", help="of scenarios (default: cpu)")
    race.add_argument("--device", choices=DEVICES, default="cpu", help="where (default: cpu)")
    race.add_argument("--scenario", action="append", help="only those whose names begin so; may be repeated")
    race.add_argument("--implementation", action="append", choices=runner.NAMES, help="only this; may be repeated")
    race.add_argument("--rounds", type=int, default=runner.ROUNDS, help="processes that time each (default: %(default)s)")
    race.add_argument("--output", type=Path, help="file for the results as JSON, those so far after every scenario")
    for command in (about, compare, estimate, prepare, race):
        command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
