"""Tables and plots of what the runner measured; the README's table is made here.

``python -m transducer_loss.benchmarks.report RESULTS.json [--readme README.md] [--plots FOLDER]`` prints the table, puts a
short one between the marks of that file, and draws the plots.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MARKS = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
COLUMNS = (
    "scenario", "implementation", "time, s", "10 % to 90 %", "x floor", "x ours", "extra memory, MB", "loss error",
    "gradient error",
)  # fmt: skip
OURS = "transducer_loss"


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Cells of the table: of each scenario the fastest first, those without a time last."""
    scenarios = dict.fromkeys(row["scenario"] for row in results["rows"])
    shown = []
    for scenario in scenarios:
        of_it = [row for row in results["rows"] if row["scenario"] == scenario]
        ours = next((row.get("median") for row in of_it if row["implementation"] == OURS), None)
        for row in sorted(of_it, key=lambda row: row.get("median", float("inf"))):
            if "failed" in row:
                shown.append([scenario, row["implementation"], row["failed"], *[""] * (len(COLUMNS) - 3)])
                continue
            shown.append([
                scenario, row["implementation"], f"{row['median']:.3g}", f"{row['p10']:.3g} to {row['p90']:.3g}",
                f"{row['median'] / row['floor']:.2f}", f"{row['median'] / ours:.2f}" if ours else "",
                extra(row), f"{row['loss_error']:.0e}", f"{row['gradient_error']:.0e}",
            ])  # fmt: skip
    return shown


def described(results: dict[str, Any]) -> str:
    """One sentence on machine, date and versions."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine["versions"].items()))
    return f"{machine['processors']} threads of {machine['processor']}, {machine['date']}; {versions}"


def markdown(results: dict[str, Any]) -> str:
    """The table for a page."""
    lines = [f"On {described(results)}.", "", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows(results)]
    return "\n".join([*lines, *absent(results)])


def summary(results: dict[str, Any]) -> str:
    """The short table of README: of each scenario the library's own line, and the others beside it."""
    columns = (
        "scenario", "B T U V H", "time, s", "x floor", "extra memory, MB", "gradient error", "others: x time, extra memory",
    )  # fmt: skip
    lines = [f"On {described(results)}.", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for scenario in dict.fromkeys(row["scenario"] for row in results["rows"]):
        of_it = [row for row in results["rows"] if row["scenario"] == scenario]
        timed = [row for row in of_it if "median" in row]
        own = next((row for row in timed if row["implementation"] == OURS), None)
        if own is None:
            lines.append(f"| {scenario} | | {OURS} has no time |" + " |" * (len(columns) - 3))
            continue
        others = [
            f"{row['implementation'].removeprefix(OURS + ', ')} {row['median'] / own['median']:,.1f} x, {extra(row)} MB"
            for row in sorted(timed, key=lambda row: row["median"])
            if row is not own
        ]
        others += [f"{row['implementation']} fails" for row in of_it if "failed" in row]
        lines.append(
            f"| {scenario} | {' '.join(f'{size:,}' for size in own['B T U V H'])} | {own['median']:.2g} "
            f"| {own['median'] / own['floor']:.2f} | {extra(own)} | {own['gradient_error']:.0e} | {'; '.join(others)} |"
        )
    return "\n".join([*lines, *absent(results)])


def absent(results: dict[str, Any]) -> list[str]:
    """Lines on the peers that were not there."""
    return ["", "Not importable there: " + ", ".join(sorted(results["absent"])) + "."] if results["absent"] else []


def extra(row: dict[str, Any]) -> str:
    """Megabytes beyond inputs and results at the peak."""
    return f"{(row['peak'] - row['results']) / 1e6:,.0f}"


def between_marks(page: str, table: str) -> str:
    """Put a table between the marks of a page.

    Raises
    ------
    ValueError
        Where the page lacks a mark.
    """
    begin, end = MARKS
    if begin not in page or end not in page:
        raise ValueError(f"page: expected the marks {begin} and {end}")
    return page[: page.index(begin) + len(begin)] + f"\n{table}\n" + page[page.index(end) :]


def growth(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw time and memory over each size of the suite ``growth``, in logarithms, with the floor beside the time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    names = ("B", "T", "U", "V")
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots(2, len(names), sharey="row")
    for column, name in enumerate(names):
        for implementation in dict.fromkeys(row["implementation"] for row in results["rows"]):
            points = sorted(
                (row["B T U V H"][column], row)
                for row in results["rows"]
                if row["scenario"].startswith(f"joint, {name}=") and row["implementation"] == implementation and "median" in row
            )
            sizes = [size for size, _ in points]
            axes[0, column].loglog(sizes, [row["median"] for _, row in points], "o-", label=implementation)
            axes[1, column].loglog(sizes, [max(row["peak"] - row["results"], 1) / 1e6 for _, row in points], "o-")
            if implementation == OURS:
                axes[0, column].loglog(sizes, [row["floor"] for _, row in points], "k:", label="floor")
        axes[1, column].set_xlabel(name)
        for each in axes[:, column]:
            each.set_xticks(sizes, [str(size) for size in sizes], minor=False)
            each.xaxis.minorticks_off()
            each.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            each.yaxis.set_major_formatter("{x:g}")
            each.yaxis.minorticks_off()
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("extra memory, MB")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "growth.png"
    figure.savefig(path, dpi=150)
    return [path]


def main() -> None:
    """Print a table of results."""
    parser = argparse.ArgumentParser(prog="python -m transducer_loss.benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, help="page whose marks are to hold the table")
    parser.add_argument("--plots", type=Path, help="folder of the plots of a suite of growth")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    table = markdown(results)
    print(table)
    if arguments.readme:
        arguments.readme.write_text(between_marks(arguments.readme.read_text(), summary(results)))
    if arguments.plots:
        growth(results, arguments.plots)


if __name__ == "__main__":
    main()
