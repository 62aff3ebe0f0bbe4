"""Runs whose engines are killed or stopped, with ``--use-fault-tolerance``: they go on, with the same weights."""

import json
import signal

import psutil
import pytest
from support.training_runs import GRPO, all_gone, running, until

from miles.rollout.journal import replay
from miles.tracking.metrics_file import read_metrics

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
QUICK = {
    "use_fault_tolerance": True,
    "rollout_health_check_interval": 1,
    "rollout_health_check_timeout": 10,
    "check_weight_update_equal": True,
}
RUN_S = 500
CAUSES = {"SIGKILL": ("SIGKILL",), "SIGSTOP": ("health probes failed", "did not answer", "said nothing for")}
"""One that stops is found by its heartbeats; if an update comes before their verdict, by that."""


def events(tmp_path, kind):
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def trained(tmp_path):
    """How many rollouts: each once, in order, with all its groups; none of these was lost or trained on twice."""
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["event"] == "rollout"]
    assert [row["rollout_id"] for row in rows] == list(range(len(rows)))
    path = tmp_path / "run" / "journal" / "rollout.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    groups = [step["group"] for step in steps if step["kind"] == "train"]
    assert len(groups) == len(set(groups)) >= GRPO["--rollout-batch-size"] * len(rows)
    assert replay(path).num_trained == len(groups)
    return len(rows)


def finishes(process, tmp_path, name, version_at_least):
    below = psutil.Process(process.pid).children(recursive=True)
    output, _ = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, output
    [told] = events(tmp_path, "recovered")
    assert told["subject"].startswith(name) and told["fields"]["version"] >= version_at_least
    assert told["text"] in output and told["fields"]["seconds"] > 0
    assert all_gone(below)
    return told, output


@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.long)])
def test_a_colocated_run_outlives_its_only_engine(tmp_path, name):
    """Generation waits; the trainer, which is asleep, is woken for an update at once."""
    strike = {"custom_rm_path": "engine_strikes.reward", "env": f"STRIKE=90,{name}"}
    with running(tmp_path, colocate=True, num_rollout=2, **QUICK, **strike) as process:
        told, _ = finishes(process, tmp_path, "engine-0", 2)
    assert any(cause in told["fields"]["cause"] for cause in CAUSES[name])
    assert trained(tmp_path) == 2


@pytest.mark.long
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_one_of_two_engines_comes_back_while_the_other_serves(tmp_path, name, asynchronous):
    """Weights are broadcast: those that are left are a group without it, and it gets one of its own to catch up."""
    strike = {"custom_rm_path": "engine_strikes.reward", "env": f"STRIKE=90,{name}"}
    with running(tmp_path, rollout_num_gpus=2, num_rollout=1000, train_async=asynchronous, **QUICK, **strike) as run:
        told = until(run, "recovered engine-").splitlines()[-1]
        checked = [until(run, "the engines hold exactly the trainer's weights") for _ in range(2)]
        run.send_signal(signal.SIGINT)
    assert any(cause in told for cause in CAUSES[name])
    [event] = events(tmp_path, "recovered")
    assert event["text"] == told and event["fields"]["version"] > 1
    assert "warning" not in "".join(checked)
    assert trained(tmp_path) > 2
