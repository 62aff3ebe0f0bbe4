"""The benchmark of launching: the simulation, the tables. The measuring itself is what tests/hosts does."""

import ast
from pathlib import Path

import pytest

from launch_bench.reaction_figures import Reaction
from launch_bench.report import BEGIN, END, Results, insert, markdown
from launch_bench.simulated import simulate
from miles_launcher.bounded_start import StartTooSlow

BENCH = Path(__file__).parents[2] / "benchmarks" / "launch_bench"


def test_a_thousand_hosts_are_started_some_at_a_time_and_each_that_fails_is_told_with_its_reason():
    report, starter = simulate(1000)
    again, _ = simulate(1000)
    assert (report.joined, report.seconds) == (again.joined, again.seconds)
    assert (len(report.joined), len(report.failed), starter.given_up) == (980, 20, 20)
    assert starter.most_at_work == 64 and starter.at_work == 0
    slow = [error for error in report.failed.values() if isinstance(error, StartTooSlow)]
    assert len(slow) == 10 and all("the answer of sshd" in error.evidence for error in slow)
    # One that hangs keeps its place for its time, and nobody else from starting: no longer than that and two rounds.
    assert 120 < report.seconds < 120 + 2 * 1000 / 64 * 3.0


def test_one_at_a_time_takes_as_long_as_all_together():
    report, starter = simulate(100, at_once=1, timeout_s=10.0)
    assert starter.most_at_work == 1
    assert report.seconds == pytest.approx(sum(report.joined.values()) + 10.0 + 0.5)


def test_the_tables_show_medians_ratios_bounds_and_what_is_missing():
    results = Results({"Machine": "small"}, 3)
    results.starts = {
        ("runtime", "ours"): [1.0, 2.0, 3.0],
        ("runtime", "Ray"): [8.0, 9.0, 10.0],
        ("train", "ours"): [4.0],
    }
    results.reactions = [Reaction(19.0, 19.5, 20.0), Reaction(20.0, 20.5, 20.75)]
    results.simulated, _ = simulate(100)
    results.failures = ["train Ray: not ready: no ray\nand a trace"]
    text = markdown(results)
    assert "| 2.00 s (1.00, 2.00, 3.00) | 9.00 s (8.00, 9.00, 10.0) | 4.50 |" in text
    assert "| 4.00 s (4.00) | - |  |" in text
    assert "| the mesh has failed: the job's decision | 20.4 | 20.8 | 21 |" in text
    assert "| joined | 98 |" in text and "HOST does not let us in" in text
    assert "* Failed: train Ray: not ready: no ray\n" in text and "trace" not in text
    assert insert(f"a\n{BEGIN}\nold\n{END}\nb", text) == f"a\n{BEGIN}\n\n{text}\n{END}\nb"
    with pytest.raises(ValueError, match="no lines"):
        insert("nothing", text)


def test_what_runs_in_rays_environment_needs_nothing_of_ours():
    tree = ast.parse((BENCH / "ray_child.py").read_text())
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith(("miles", "support", "launch_bench")) for name in modules)
