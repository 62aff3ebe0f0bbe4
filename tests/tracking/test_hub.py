"""What a run records: metrics.jsonl, orders for trackers, what a resumed run knows."""

import errno
import json
import subprocess
import sys

import pytest
from support.fake_trackers import point

from miles.tracking.continuation import places, read_remembered, write_remembered
from miles.tracking.hub import Tracking
from miles.tracking.metric_check import MetricBelowThreshold, MetricCheck
from miles.tracking.metrics_file import MetricsFile, read_metrics
from miles.tracking.tracker import as_markdown, axis_of

CONFIG = {
    "wandb_always_use_train_step": False, "rollout_batch_size": 8, "n_samples_per_prompt": 4, "global_batch_size": 16,
    "num_steps_per_rollout": 2, "load": None, "lr": 0.1, "mlflow_tracking_uri": "http://me:pw@h", "use_wandb": True,
    "wandb_project": "p", "tensorboard_queue_size": 7, "tensorboard_log_interval": 1,
}  # fmt: skip


class Sent:
    """In place of the process: takes orders."""

    def __init__(self):
        self.orders = []

    def send(self, order):
        self.orders.append(json.loads(json.dumps(order)))

    async def finish(self, outcome, timeout_s):
        self.orders.append({"do": "finish", "outcome": outcome, "timeout_s": timeout_s})


@pytest.fixture
def tracking(tmp_path):
    """Makes a hub whose process takes orders, in a run directory of this name; returns both."""
    made = []

    def make(name="run", **changes):
        run_dir = tmp_path / name
        run_dir.mkdir()
        hub = Tracking({**CONFIG, **changes}, run_dir, lambda line: None, {"wandb_key": "secret"})
        hub._process = Sent()
        made.append(hub)
        return hub, hub._process.orders

    yield make
    for hub in made:
        hub._file.close()
        hub.trace.close()


async def test_an_iteration_an_evaluation_and_the_end(tmp_path, tracking):
    hub, orders = tracking()
    hub.begin("run-1", 0)
    steps = [{"train/loss": 1.0, "train/step": 6.0}, {"train/loss": 3.0, "train/step": 7.0}]
    metrics = {"train/loss": 2.0, "train/step": 7.0, "train/params_norm": 5.0, "rollout/raw_reward": 0.5}
    hub.write("rollout", 3, 4, metrics, steps)
    hub.write("eval", 3, 4, {"eval/a": 1.0, "perf/eval_time": 2.0})
    hub.examples(3, [{"response": "x"}])
    await hub.close("interrupted")
    begin, first, second, rollout, evaluation, examples, artefact, finish = orders
    assert begin["run"]["settings"]["wandb_key"] == "secret"
    assert begin["run"]["config"]["mlflow_tracking_uri"] == "http://***@h"
    assert begin["limits"] == {"tensorboard": 7}
    assert "secret" not in json.dumps(begin["run"]["config"])
    assert [(o["steps"], o["metrics"]) for o in (first, second)] == [
        ({"train/step": 6}, {"train/loss": 1.0}), ({"train/step": 7}, {"train/loss": 3.0}),
    ]  # fmt: skip
    assert rollout["steps"] == {"rollout/step": 3, "train/step": 7}
    assert rollout["metrics"] == {"train/params_norm": 5.0, "rollout/raw_reward": 0.5}
    assert evaluation["steps"] == {"eval/step": 3, "rollout/step": 3}
    assert (examples["step"], artefact["path"]) == (3, str(tmp_path / "run" / "metrics.jsonl"))
    assert finish["outcome"] == "interrupted"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["event"] for row in rows] == ["step", "step", "rollout", "eval"]
    assert [row.get("train/loss") for row in rows] == [1.0, 3.0, 2.0, None]
    assert (rows[2]["rollout/step"], rows[3]["eval/step"]) == (3, 3)


def test_optimizer_steps_as_axis(tmp_path, tracking):
    hub, orders = tracking(wandb_always_use_train_step=True)
    hub.begin("run-1", 5)
    assert orders[0]["run"]["first_steps"] == {"rollout/step": 10, "train/step": 10}
    hub.write("rollout", 5, 6, {"rollout/raw_reward": 1.0})
    assert orders[1]["steps"] == {"rollout/step": 5 * 8 * 4 // 16}


def test_trackers_get_every_nth_iteration_and_the_file_all(tmp_path, tracking):
    hub, orders = tracking(tensorboard_log_interval=3)
    for rollout_id in range(7):
        hub.write("rollout", rollout_id, rollout_id + 1, {"x": 1.0})
    hub.write("eval", 4, 5, {"eval/a": 1.0})
    assert [order["steps"]["rollout/step"] for order in orders] == [0, 3, 6, 4]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 8


def test_what_trackers_remember_is_found_beside_the_checkpoint_by_another_run(tmp_path, tracking):
    hub, _ = tracking()
    hub.begin("run-1", 0)
    hub._remember("wandb", {"run_id": "a"})
    hub.saved(str(tmp_path / "ckpt"))
    hub._remember("mlflow", {"run_id": "b"})
    hub._remember("prometheus", {})
    expected = {"wandb": {"run_id": "a"}, "mlflow": {"run_id": "b"}}
    assert read_remembered([tmp_path / "run"]) == read_remembered([tmp_path / "ckpt"]) == expected
    (tmp_path / "ckpt" / "iter_0000001").mkdir()
    for load in ("ckpt", "ckpt/iter_0000001"):
        again, orders = tracking("of-" + load.replace("/", "-"), load=str(tmp_path / load))
        again.begin("run-2", 2)
        assert orders[0]["before"] == expected
    fresh, orders = tracking("fresh", load=str(tmp_path / "ckpt"))
    fresh.begin("run-3", 0)  # weights alone: another run
    assert orders[0]["before"] == {}


def test_a_file_of_another_kind_is_no_memory(tmp_path):
    (tmp_path / "trackers.json").write_text("[1]")
    (tmp_path / "b").mkdir()
    write_remembered(tmp_path / "b", {"x": {"y": 1}})
    assert read_remembered(places(str(tmp_path), str(tmp_path / "b"))) == {"x": {"y": 1}}
    (tmp_path / "trackers.json").write_text("{torn")
    assert read_remembered([tmp_path, tmp_path / "b"]) == {"x": {"y": 1}}
    write_remembered(tmp_path / "b" / "trackers.json", {})  # a file is no directory: nothing happens


def test_a_full_disk_is_told_once_and_the_lines_follow(tmp_path):
    said = []
    file = MetricsFile(tmp_path, said.append)
    real, room = file._file, [10]

    class Full:
        def write(self, data):
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            part, room[0] = data[: room[0]], max(0, room[0] - len(data))
            return real.write(part)

        def close(self):
            real.close()

    file._file = Full()
    file.write("rollout", 0, 1, {"x": 1.0})
    file.write("rollout", 1, 2, {"x": 2.0})
    assert len(said) == 1
    assert "No space left on device. The run goes on" in said[0]
    room[0] = 10**6
    file.write("rollout", 2, 3, {"x": 3.0})
    file.close()
    assert [row["x"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]


def test_axes_and_tables():
    assert [axis_of(n) for n in ("train/loss", "eval/a", "perf/x", "mine")] == [
        "train/step", "eval/step", "rollout/step", "rollout/step",
    ]  # fmt: skip
    assert point(3).step_of("eval/a") == 3
    assert (
        as_markdown([{"prompt": "a|b\n<i>", "reward": 1}]).splitlines()[2]
        == "| None | a\\|b<br>&lt;i> | None | None | 1 |"
    )


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        ([{"eval/a": 0.1}, {"eval/a": 0.49}], "the best of 2 evaluations was 0.49"),
        ([{"eval/b": 1.0}], "no evaluation has such a number; there were eval/b"),
        ([], "there were none"),
        ([{"eval/a": float("nan")}], "no evaluation has such a number"),
    ],
)
def test_a_metric_that_has_not_reached_its_threshold_fails_the_run(seen, text):
    check = MetricCheck("eval/a", 0.5)
    for metrics in seen:
        check.see(metrics)
    with pytest.raises(MetricBelowThreshold) as caught:
        check.verdict()
    assert text in str(caught.value)


def test_one_evaluation_that_has_reached_it_is_enough():
    check = MetricCheck("eval/a", 0.5)
    for value in (0.1, 0.5, 0.2):
        check.see({"eval/a": value})
    check.verdict()
    MetricCheck(None, None).verdict()


def test_the_controllers_part_imports_neither_numpy_nor_any_trackers_library():
    heavy = "{'numpy', 'torch', 'wandb', 'mlflow', 'tensorboard', 'prometheus_client'}"
    code = f"import sys, miles.training.job, miles.flags.tracking_facts; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
