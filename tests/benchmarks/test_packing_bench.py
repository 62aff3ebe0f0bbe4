"""The packing benchmark on few samples: its figures on schedules worked out by hand, its tables, its command."""

import numpy as np
import pytest

import packing
from packing_bench import report, sides
from packing_bench.figures import Quality, bound, quality
from packing_bench.lengths import KINDS, QUICK, Size, lengths
from packing_bench.report import Measured, Results

SIZE = Size(samples=4, ranks=2, budget=256)


def test_quality_by_hand():
    found = quality([[[0, 1], [2]], [[3], []]], np.array([100, 100, 128, 184]), SIZE)
    assert found.micro_batches == 2
    assert found.imbalance == pytest.approx(328 / 256 - 1)
    assert found.waiting == pytest.approx((200 + 128) / 256 - 1)
    assert found.padding == pytest.approx(1 - 512 / (256 + 128 + 256))
    assert found.fullest == pytest.approx(200 / 256)


def test_the_bound_by_hand():
    found = bound(np.array([100, 100, 128, 184]), SIZE)
    assert (found.micro_batches, found.imbalance, found.waiting) == (1, 0.0, 0.0)
    giant = bound(np.array([1000, 100, 100, 100]), SIZE)
    assert giant.imbalance == pytest.approx(1000 / 650 - 1)
    assert giant.waiting == pytest.approx((1000 + (1300 - 1000 - 256) / 2) / 650 - 1)


@pytest.mark.parametrize("schedule", [[[[0, 1], [2]], [[3], [3]]], [[[0, 1], [2]], [[], []]], [[[0, 1], [2]], [[3]]]])
def test_a_wrong_schedule_is_no_result(schedule):
    with pytest.raises(ValueError, match=r"exactly once|differ in their number"):
        quality(schedule, np.array([1, 1, 1, 1]), SIZE)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_rollout_is_scheduled_by_every_side_and_nobody_beats_the_bound(kind):
    given = lengths(kind, QUICK)
    assert (given == lengths(kind, QUICK)).all()
    assert len(given) == QUICK.samples
    best = bound(given, QUICK)
    naive = quality(sides.contiguous(given, QUICK), given, QUICK)
    for name, make in {**sides.OURS, **sides.PEERS}.items():
        if sides.why_missing(name):
            continue
        found = quality(make(given, QUICK), given, QUICK)
        assert found.imbalance >= best.imbalance - 1e-12
        assert found.waiting >= best.waiting - 1e-3
        if name == "dynamic, `--balance-data`":
            assert best.micro_batches <= found.micro_batches <= naive.micro_batches
            assert found.waiting <= naive.waiting
            assert found.imbalance <= max(naive.imbalance, best.waiting)
            assert kind == "one giant" or found.imbalance <= best.imbalance + 1e-3


def results():
    plain = Quality(3, 0.1, 0.2, 0.3, 0.004, 1.0)
    found = {"long tail": {"dynamic": Measured([0.4, 0.2, 0.3], plain), "naive: contiguous": Measured([0.6], plain)}}
    return Results(
        QUICK, {"Machine": "none"}, 3, {"long tail": plain}, found, {"prtpy: greedy": "prtpy is not installed"}
    )


def test_the_report_says_whether_the_goal_was_reached_and_who_was_missing():
    text = report.markdown(results())
    assert "1,024 samples for 16 ranks takes 300 ms of CPU time at most (long tail, dynamic); asked for" in text
    assert report.verdict(results()).endswith("reached.")
    assert "| naive: contiguous | 600 ms | 2.00 | 3 | 10.0 % | 20.0 % | 30.0 % | 0.400 % | 1.00 |" in text
    assert "Not measured: prtpy: greedy (prtpy is not installed)" in text
    slow = results()
    slow.found["long tail"]["dynamic"].seconds = [1.5]
    assert report.verdict(slow).endswith("short.")


def test_the_command_writes_between_its_markers(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert packing.main(["--quick", "--rounds", "1", "--no-slow", "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert all(f"#### {kind.capitalize()}" in text for kind in KINDS)
    assert "reached" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no lines"):
        report.insert("no markers", "text")
