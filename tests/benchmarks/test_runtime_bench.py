"""The benchmark's judgement and its tables, on made-up figures; no peer is needed."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime_bench import circumstances, figures, parent, report
from runtime_bench.figures import GOAL, MUST, SHORT, Results, Sample, Spread
from runtime_bench.rows import BY_NAME, CASES, MEMCPY, MONARCH, OURS, RAY, SYSTEMS, Asked, Bound, Row

ROOT = Path(__file__).parents[2]
LATENCY = Row(
    "echo", "echo", "us", asked=Asked((Bound(4, RAY), Bound(2.5, MONARCH)), (Bound(6, RAY), Bound(4, MONARCH)))
)
RATE = Row("rate", "rate", "calls/s", higher_is_better=True, asked=Asked((Bound(3, RAY),), (Bound(6, RAY),)))
LIMIT = Row("kill", "kill", "ms", asked=Asked((Bound(50), Bound(1, RAY)), (Bound(5),)))
BULK = Row("bulk", "bulk", "MiB/s", higher_is_better=True, asked=Asked((Bound(1, RAY),), (Bound(0.9, MEMCPY),)))


def at(**columns):
    return {name: None if value is None else Spread(value, value, value, 1) for name, value in columns.items()}


@pytest.mark.parametrize(
    ("row", "spreads", "expected"),
    [
        (LATENCY, at(ours=100, ray=600, monarch=400), GOAL),
        (LATENCY, at(ours=100, ray=599, monarch=400), MUST),
        (LATENCY, at(ours=100, ray=400, monarch=250), MUST),
        (LATENCY, at(ours=100, ray=900, monarch=249), SHORT),
        (LATENCY, at(ours=100, ray=399, monarch=None), SHORT),
        (LATENCY, at(ours=100, ray=900, monarch=None), "not judged: no figure for Monarch"),
        (LATENCY, at(ours=None, ray=900, monarch=900), "not measured"),
        (RATE, at(ours=600, ray=100), GOAL),
        (RATE, at(ours=300, ray=100), MUST),
        (RATE, at(ours=299, ray=100), SHORT),
        (LIMIT, at(ours=5, ray=5), GOAL),
        (LIMIT, at(ours=20, ray=21), MUST),
        (LIMIT, at(ours=20, ray=19), SHORT),
        (LIMIT, at(ours=51, ray=99), SHORT),
        (LIMIT, at(ours=4, ray=math.inf), GOAL),
        (BULK, at(ours=900, ray=800, memcpy=1000), GOAL),
        (BULK, at(ours=800, ray=800, memcpy=1000), MUST),
        (BULK, at(ours=800, ray=800, memcpy=None), "must; goal not judged: no figure for memcpy, one process"),
        (Row("p99", "p99", "us"), at(ours=1), ""),
    ],
)
def test_verdicts(row, spreads, expected):
    assert figures.verdict(row, spreads) == expected


def test_a_spread_is_the_median_and_the_range():
    assert figures.spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert figures.spread([]) is None


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (99, 99), (100, 100), (0, 1)])
def test_percentiles_are_samples_that_occurred(percent, expected):
    assert figures.percentile(list(range(100, 0, -1)), percent) == expected


def test_a_peer_that_never_gets_there_is_infinitely_worse():
    ours, never = Spread(2, 2, 2, 1), Spread(math.inf, math.inf, math.inf, 1)
    assert figures.ratio(ours, never, higher_is_better=False) == math.inf


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.01234, "0.0123"), (1.004, "1.00"), (12.34, "12.3"), (99.96, "100"), (1234.5, "1,234")],
)
def test_numbers_have_three_digits_that_count(value, expected):
    assert report.number(value) == expected


def made_up_results():
    """Two rounds of everything, ours ten times as good; Monarch is not there; Ray never notices a frozen worker."""
    results = Results(
        num_rounds=2, machine={"cores": "2"}, versions={"ray": "9.9"}, why_missing={MONARCH: "not installed"}
    )
    for case in CASES:
        for row in case.rows:
            for column in case.columns:
                if column == MONARCH:
                    continue
                good = column == OURS
                value = (1000.0 if good else 100.0) if row.higher_is_better else (1.0 if good else 10.0)
                if case.name == "freeze" and not good:
                    value = math.inf
                results.samples += [Sample(column, row.metric_of(column), value * spread) for spread in (1.0, 1.1)]
    return results


def test_the_tables_of_a_run():
    text = report.markdown(made_up_results())
    summary = text.partition("###")[2].partition("###")[0]
    assert summary.count("\n| ") == 2 + sum(bool(row.asked.must) for case in CASES for row in case.rows)
    assert "| 1.05 us | 10.0x | - | 4x Ray, 2.5x Monarch |" in summary
    assert "not judged: no figure for Monarch" in summary
    assert "| 1.05 ms | 10.0x | - | 50 ms, as Ray | 5 ms | goal |" in summary
    assert "| > 19.0x |" in summary
    assert "| not within 20 s" in text
    assert (
        "| 1.05 us (1.00..1.10) | 10.5 us (10.0..11.0), 10.0x | 10.5 us (10.0..11.0), 10.0x | not installed |" in text
    )
    assert "torchmonarch: not installed." in text


def test_what_was_not_measured_has_no_table():
    results = Results(samples=[Sample(OURS, "kill", 3.0)], num_rounds=1)
    text = report.markdown(results)
    assert BY_NAME["kill"].title in text
    assert BY_NAME["echo"].title not in text


def test_results_survive_json():
    results = made_up_results()
    assert Results.from_json(json.loads(json.dumps(results.as_json(), allow_nan=False))) == results


def test_an_earlier_run_adds_only_the_cases_that_are_asked_for():
    results = Results(samples=[Sample(OURS, "kill", 3.0)], num_rounds=1)
    earlier = made_up_results()
    earlier.failures = ["start, ray, round 1: no", "group, ray, round 1: no"]
    results.add(earlier, [BY_NAME["start"]])
    assert {sample.metric for sample in results.samples} == {"kill", "start", "start.import"}
    assert results.why_missing == {MONARCH: "not installed"}
    assert results.notes == ["From another run: start."]
    assert results.failures == ["start, ray, round 1: no"]


def test_tables_go_between_the_markers():
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.insert(document, "new") == f"before\n{report.BEGIN}\n\nnew\n{report.END}\nafter\n"
    assert report.insert(report.insert(document, "newer"), "new") == report.insert(document, "new")
    with pytest.raises(report.MarkersMissing):
        report.insert("no place", "new")


def test_the_document_has_a_place_for_the_tables():
    document = (ROOT / "docs" / "performance.md").read_text()
    assert report.insert(document, "new") != document


def test_systems_take_turns_and_each_begins_a_round():
    runs = parent.plan([BY_NAME["echo"], BY_NAME["kill"]], SYSTEMS, 4)
    order = [run.system for run in runs if run.case.name == "echo"]
    assert order[:8] == ["ours", "ray", "monarch", "bare", "ray", "monarch", "bare", "ours"]
    assert {order[start] for start in range(0, 16, 4)} == set(SYSTEMS)
    assert "bare" not in [run.system for run in runs if run.case.name == "kill"]
    assert parent.plan([BY_NAME["kill"]], [], 3) == []


def test_what_is_not_installed_is_named():
    assert circumstances.why_missing("ours") == ""
    assert {circumstances.why_missing(system) for system in SYSTEMS} <= {"", "not installed"}


@pytest.mark.parametrize("system", ["ours", "bare"])
def test_a_system_has_what_its_cases_ask_for(system):
    module = importlib.import_module(f"runtime_bench.system_{system}")
    assert set(module.CASES) == {case.name for case in CASES if system in case.systems}


def run_benchmark(*flags):
    command = [sys.executable, ROOT / "benchmarks" / "runtime.py", *flags]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)


def test_help_names_the_cases():
    shown = run_benchmark("--help")
    assert shown.returncode == 0, shown.stderr
    assert ",".join(BY_NAME) in shown.stdout.replace("\n", "").replace(" ", "")


@pytest.mark.full
def test_a_quick_run_of_our_own(tmp_path):
    json_path = tmp_path / "figures.json"
    done = run_benchmark(
        "--quick", "--rounds", "1", "--systems", "ours,bare", "--only", "echo,kill", "--json", json_path
    )
    assert done.returncode == 0, done.stderr
    results = Results.from_json(json.loads(json_path.read_text()))
    assert results.failures == []
    measured = {(sample.column, sample.metric) for sample in results.samples}
    assert {(OURS, "echo.main.p50"), (OURS, "echo.io.p99"), ("relay", "echo.p50"), (OURS, "kill")} <= measured
    assert "not judged: no figure for Ray" in done.stdout


FAILING = """
from runtime_bench import parent
from runtime_bench.figures import Results
from runtime_bench.rows import BY_NAME

parent.adopt_orphans()
results = Results()
said = parent.measure(parent.Run(BY_NAME["kill"], "bare", 0), results, effort="quick")
assert "KeyError: 'kill'" in said, said
assert results.failures == ["kill, bare, round 1: it ended before it was done"], results.failures
"""


@pytest.mark.full
def test_a_child_that_fails_is_told():
    """In a process of its own: whatever is left below it is killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FAILING]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
