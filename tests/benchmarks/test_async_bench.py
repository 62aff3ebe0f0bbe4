"""The benchmark of asynchronous training on made-up runs: what it reads of a run's files, and its table."""

import json

import pytest

import async_training
from async_bench.runs import GROUPS, SAMPLES, Figures, Sizes, figures
from miles.tracking.metrics_file import MetricsFile
from miles.tracking.trace import ENGINES, LOOP, TRAINER, TraceFile


def a_run(tmp_path, times):
    """Iterations end at these times; the trainer works from 2 to 5 and from 7 to 9, engines from 0 to 4 and 6 to 7."""
    file = MetricsFile(tmp_path)
    for rollout_id, _ in enumerate(times):
        file.write("rollout", rollout_id, rollout_id + 1, {})
    file.close()
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    rows = [row | {"time": float(time)} for row, time in zip(lines, times, strict=True)]
    file.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = TraceFile(tmp_path)
    trace.add(TRAINER, [("train", 2.0, 5.0, {}), ("log_probs", 2.0, 3.0, {}), ("train", 7.0, 9.0, {})])
    trace.add(ENGINES, [("generate", 0.0, 4.0, {}), ("generate", 6.0, 7.0, {})])
    trace.add(LOOP, [("train", 0.0, 10.0, {})])
    trace.close()


def test_figures_are_of_the_time_after_the_first_rollout(tmp_path):
    a_run(tmp_path, [3, 6, 11])
    found = figures(tmp_path)
    assert found.seconds == pytest.approx(8 / (2 * GROUPS * SAMPLES) * 1000)
    assert found.trainer_idle == pytest.approx(1 - (2 + 2) / 8)
    assert found.engines_idle == pytest.approx(1 - (1 + 1) / 8)
    assert found.train_s == pytest.approx((2 + 2) / 2)


def test_the_table_compares_medians_with_the_first_way():
    found = {
        "train.py": [Figures(120, 0.5, 0.4, 2.0), Figures(100, 0.5, 0.4, 2.0), Figures(900, 0.9, 0.9, 9.0)],
        "train_async.py": [Figures(60, 0.1, 0.2, 2.0)],
    }
    text = async_training.report(found, Sizes(rollouts=5))
    assert "| `train.py` | 120.0 (120.0, 100.0, 900.0) | 50 % | 40 % | 2.00 | 1.00 |" in text
    assert "| `train_async.py` | 60.0 (60.0) | 10 % | 20 % | 2.00 | 2.00 |" in text
    page = f"before\n{async_training.BEGIN}\nold\n{async_training.END}\nafter"
    assert async_training.insert(page, "new") == f"before\n{async_training.BEGIN}\nnew\n{async_training.END}\nafter"
