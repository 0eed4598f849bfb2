"""The benchmarks: that they measure what they say, refuse a time to what is wrong, and that the README shows what is committed."""

import itertools
import json
import math
import mmap
from pathlib import Path

import numpy as np
import pytest

from transducer_loss.benchmarks import floors, implementations, measuring, report, runner, scenarios
from transducer_loss.benchmarks.scenarios import SUITES, Scenario, full, named

TRIAL = SUITES["trial"]


@pytest.mark.parametrize("suite", SUITES)
def test_scenarios_have_names_of_their_own(suite):
    names = [each.name for each in SUITES[suite]]
    assert len(set(names)) == len(names)
    for each in SUITES[suite]:
        assert len(each.frames) == len(each.labels)
        assert min(each.frames) > 0


def test_lengths_as_in_speech():
    frames, labels = map(np.array, scenarios.speech(20_000))
    assert frames.min() >= 31
    assert frames.max() <= 680
    assert frames.mean() == pytest.approx(318, rel=0.02)
    assert labels.min() >= 2
    assert labels.max() <= 151
    assert labels.mean() == pytest.approx(68, rel=0.02)
    assert np.corrcoef(frames, labels)[0, 1] > 0.9
    assert scenarios.speech(5) == scenarios.speech(5)


def test_batches_sorted_by_length_are_full_but_not_over():
    batches = scenarios.sorted_batches(300, 10_000)
    assert sum(len(frames) for frames, _ in batches) == 300
    for frames, labels in batches:
        assert len(frames) * max(frames) <= 10_000
        assert list(frames) == sorted(frames)
        assert len(labels) == len(frames)
    for (frames, _), (following, _) in itertools.pairwise(batches):
        assert (len(frames) + 1) * following[0] > 10_000


def test_a_concentrated_occupancy_keeps_the_share_of_a_trained_model():
    import transducer_loss

    arguments = scenarios.trained_case(2, 200, 40, 500, 64)
    _, grads = transducer_loss.joint_rnnt_loss(*arguments)
    assert 0.84 <= grads.dropped <= 0.9


@pytest.mark.parametrize(
    ("task", "operations", "size"),
    [
        ("logits", 0, 3 * 2 * 90 * 20),
        ("joint", 6 * 90 * 20 * 8, 2 * 2 * (10 + 2 * 8 + 2 + 2 * 20) * 8),
        ("samplewise", 6 * 90 * 20 * 8, 2 * 2 * (10 + 2 * 8 + 2 + 2 * 20) * 8),
        ("pruned", 6 * (10 * 5 * 8 + (10 + 2 * 8 + 2) * 8 + 90) * 20, 3 * 2 * (10 + 2 * 8 + 2) * (8 + 20)),
    ],
)
def test_what_must_be_done_is_counted(task, operations, size):
    scenario = Scenario("", task, (5, 5), (8, 8), 20, 8, "bfloat16")
    assert scenario.cells == 90
    work = floors.work(scenario)
    assert (work.operations, work.bytes) == (operations, size)


def test_sampled_classes_are_those_of_the_batch_and_the_negatives():
    work = floors.work(Scenario("", "sampled", *full(2, 10, 3), 100_000, 8))
    assert work.classes == 1000 + 6 + 1
    assert work.operations == 6 * 80 * 1007 * 8


PRESENT, ABSENT = runner.present()


@pytest.mark.parametrize(
    ("scenario", "name"),
    [(each.name, name) for each in TRIAL for name, module in PRESENT.items() if each.task in module.TASKS],
)
def test_all_implementations_compute_the_same(scenario, name):
    case = implementations.Case.of(named("trial", scenario), "cpu")
    found = measuring.checked(case, PRESENT[name].TASKS[case.scenario.task](case), "cpu")
    assert runner.failure(case.scenario, found) is None
    assert found["results"] == sum(leaf.numel() * leaf.element_size() for leaf in case.leaves.values())


def test_own_losses_are_measured_and_peers_that_are_not_here_are_listed():
    assert {"fused", "every_cell", "torch_operators"} <= set(PRESENT)
    assert set(PRESENT) | set(ABSENT) == set(runner.NAMES)
    assert not set(PRESENT) & set(ABSENT)
    assert "nowhere" in runner.present(["nowhere"])[1]
    assert set(PRESENT["fused"].TASKS) == {"logits", "joint", "samplewise", "pruned", "sampled", "nbest"}


def test_hypotheses_of_an_utterance_have_its_encoder_once():
    case = implementations.Case.of(named("trial", "nbest, tiny"), "cpu")
    assert case.leaves["encoder"].shape == (2, 9, 8)
    assert case.leaves["predictor"].shape == (4, 5, 8)


def test_the_peak_of_a_call():
    with measuring.Peak("cpu") as peak, mmap.mmap(-1, 30_000_000) as memory:  # an allocator may have some left over
        memory[::4096] = bytes(len(memory[::4096]))
    assert 29e6 <= peak.bytes < 60e6  # the system counts by some dozens of pages
    with measuring.Peak("cpu") as peak:
        pass
    assert peak.bytes < 2e6


def test_a_run_beside_a_peer(tmp_path):
    told = []
    results = runner.run(
        "trial", "cpu", scenarios=["joint"], peers=["fused", "torch_operators"], rounds=1,
        advance=lambda *what: told.append(what), output=tmp_path / "results.json",
    )  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [total for _, total in told] == [4] * 4
    ours, peer = results["rows"]
    assert (ours["implementation"], peer["implementation"]) == ("transducer_loss", "PyTorch operators")
    for row in results["rows"]:
        assert 0 < row["p10"] <= row["median"] <= row["p90"]
        assert row["floor"] > 0
        assert 1 <= row["runs"] <= measuring.REPEATS
        assert row["gradient_error"] < 1e-5
    assert [row["scenario"] for row in json.loads(json.dumps(results))["rows"]] == ["joint, tiny"] * 2
    table = report.rows(results)
    assert {cells[1] for cells in table} == {"transducer_loss", "PyTorch operators"}
    assert all(len(cells) == len(report.COLUMNS) for cells in table)
    assert "torch" in results["machine"]["versions"]


RIGHT = {"peak": 2_000_000, "results": 500_000, "loss_error": 1e-7, "gradient_error": 1e-6}
TIMES = [{"seconds": [0.2, 0.1, 0.3], "floor": 0.05, "bytes_per_second": 1e9, "flops": None}] * 2


@pytest.mark.parametrize("what", ["loss_error", "gradient_error"])
@pytest.mark.parametrize("error", [0.5, math.nan, math.inf])
def test_what_is_wrong_gets_no_time(what, error):
    row = runner.row(TRIAL[1], "a peer", {**RIGHT, what: error}, TIMES)
    assert what.replace("_", " ") in row["failed"]
    assert "median" not in row


def test_what_fails_gets_no_time():
    assert runner.row(TRIAL[1], "a peer", {"failed": "no such thing"}, [{}])["failed"] == "no such thing"
    row = runner.row(TRIAL[1], "a peer", RIGHT, [*TIMES, {"failed": "out of memory"}])
    assert row["failed"] == "out of memory"
    assert "median" not in row
    assert runner.measured("time", "trial", TRIAL[0], "every_cell", "cpu") == {"failed": "KeyError: 'logits'"}


def test_a_row_of_the_table():
    row = runner.row(TRIAL[1], "transducer_loss", RIGHT, TIMES)
    assert (row["median"], row["runs"], row["flops"]) == (pytest.approx(0.2), 6, None)
    slow = {**row, "implementation": "a peer", "median": 0.4}
    broken = runner.row(TRIAL[1], "another", {"failed": "why"}, [{}])
    results = {"rows": [broken, slow, row], "absent": {}}
    first, second, third = report.rows(results)
    assert first == [TRIAL[1].name, "transducer_loss", "0.2", "0.1 to 0.3", "4.00", "1.00", "2", "1e-07", "1e-06"]
    assert second[1:3] == ["a peer", "0.4"]
    assert second[5] == "2.00"
    assert third[:3] == [TRIAL[1].name, "another", "why"]
    *_, line = report.summary({**results, "machine": runner.machine()}).split("\n")
    assert line == f"| {TRIAL[1].name} | 2 9 4 12 8 | 0.2 | 4.00 | 2 | 1e-06 | a peer 2.0 x, 2 MB; another fails |"
    results["rows"].remove(row)
    assert "no time" in report.summary({**results, "machine": runner.machine()})


def test_a_table_between_the_marks_of_a_page():
    begin, end = report.MARKS
    page = f"before\n{begin}\nold\n{end}\nafter\n"
    assert report.between_marks(page, "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    with pytest.raises(ValueError, match="expected the marks"):
        report.between_marks("nothing", "new")


def test_the_picture_of_growth(tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for scenario in SUITES["growth"]:
        for name, factor in (("transducer_loss", 1), ("a peer", 3)):
            times = [{**TIMES[0], "seconds": [1e-6 * scenario.cells * factor]}]
            rows.append(runner.row(scenario, name, RIGHT, times))
    (path,) = report.growth({"rows": rows}, tmp_path / "new")
    assert path.stat().st_size > 10_000


def test_the_readme_shows_what_is_committed():
    root = Path(__file__).parents[1]
    page = (root / "README.md").read_text()
    begin, end = report.MARKS
    shown = page[page.index(begin) + len(begin) : page.index(end)].strip()
    results = (json.loads(path.read_text()) for path in (root / "benchmarks" / "results").glob("*.json"))
    assert shown in {report.summary(each) for each in results if "rows" in each}
