"""A training run with every tracker: what each of them has afterwards, and Prometheus while it runs."""

import sqlite3
import urllib.request

import pytest
from support.metric_names import undocumented
from support.tracker_files import scalars, wandb_rows
from support.training_runs import Finished, running, write_prompts

FLAGS = {
    "num_rollout": 2, "rollout_batch_size": 4, "n_samples_per_prompt": 4, "global_batch_size": 8,
    "num_steps_per_rollout": 2, "use_tensorboard": True, "use_wandb": True, "wandb_mode": "offline",
    "wandb_key": "k3y-of-nobody", "use_mlflow": True, "use_prometheus": True, "prometheus_port": 0,
    "log_multi_turn": True, "log_passrate": True, "log_correct_samples": True, "log_params_norm": True,
    "mfu_peak_tflops": 0.1, "eval_interval": 2, "eval_max_response_len": 4, "skip_eval_before_train": True,
    "save_interval": 1, "use_kl_loss": True,
    "custom_rollout_log_function_path": "user_code.log_rollout",
    "custom_eval_rollout_log_function_path": "user_code.log_eval",
    "ci_metric_checker_key": "eval/mine", "ci_metric_checker_threshold": 4.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run, and what Prometheus read when the second iteration was told."""
    tmp_path = tmp_path_factory.mktemp("run")
    prompts = write_prompts(tmp_path / "held_out.jsonl", 4)
    flags = {**FLAGS, "eval_prompt_data": ("held_out", prompts), "save": tmp_path / "checkpoints"}
    lines, url, scraped = [], "", ""
    with running(tmp_path, **flags) as process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Prometheus: "):
                url = line.split()[1]
            if line.startswith("rollout 2/2"):
                with urllib.request.urlopen(url, timeout=20) as page:
                    scraped = page.read().decode()
        code = process.wait(60)
    return Finished(code, "".join(lines), tmp_path / "run"), scraped


@pytest.mark.full
def test_every_tracker_has_the_run(run):
    finished, scraped = run
    # The evaluation has 4 rewards, which is below the threshold: the run fails for that, after everything is recorded.
    assert finished.code == 2, finished.output
    assert "eval/mine has not reached 4.5" in finished.output
    rows = finished.rows()
    assert [row["rollout/step"] for row in rows] == [0, 1]
    assert [row["user/samples"] for row in rows] == [16, 16]
    assert [row["train/step"] for row in finished.rows("step")] == [0, 1, 2, 3]
    (evaluation,) = finished.rows("eval")
    assert (evaluation["eval/mine"], evaluation["eval/step"]) == (4.0, 1)
    assert "eval/held_out" not in evaluation

    names = {name for row in [*rows, *finished.rows("step")] for name in row}
    assert undocumented(names) == ["user/samples"]
    assert {
        "perf/wait_time_ratio", "perf/train_wait_time", "perf/actor_train_tflops", "perf/actor_train_mfu",
        "perf/cpu_memory_used_GB", "train/lr-pg_0", "train/params_norm", "passrate/pass@4", "rollout/ref_log_probs",
        "multi_turn/multi_turn_metric/round_number_mean", "rollout/correct_samples/ratio",
    } <= names  # fmt: skip

    rewards = [row["rollout/raw_reward"] for row in rows]
    losses = [row["train/loss"] for row in finished.rows("step")]
    board = scalars(finished.run_dir / "tensorboard")
    assert board["rollout/raw_reward"] == [(0, pytest.approx(rewards[0])), (1, pytest.approx(rewards[1]))]
    assert [step for step, _ in board["train/loss"]] == [0, 1, 2, 3]
    assert [value for _, value in board["train/loss"]] == pytest.approx(losses, rel=1e-5, abs=1e-7)
    assert board["eval/mine"] == [(1, 4.0)]

    (offline,) = (finished.run_dir / "wandb").glob("offline-run-*")
    logged = wandb_rows(offline)
    assert [float(row["rollout/raw_reward"]) for row in logged if "rollout/raw_reward" in row] == pytest.approx(rewards)
    assert [float(row["train/step"]) for row in logged if "train/loss" in row] == [0, 1, 2, 3]

    with sqlite3.connect(finished.run_dir / "mlflow.db") as database:
        query = "select step, value from metrics where key = ? order by step"
        assert database.execute(query, ("rollout/raw_reward",)).fetchall() == [
            (0, pytest.approx(rewards[0])), (1, pytest.approx(rewards[1])),
        ]  # fmt: skip
        assert [step for step, _ in database.execute(query, ("train/loss",))] == [0, 1, 2, 3]
        assert database.execute("select status from runs").fetchall() == [("FAILED",)]
    database.close()

    assert 'miles_run_info{run="run"' in scraped
    assert 'miles_rollout_raw_reward{run="run"}' in scraped


@pytest.mark.full
def test_the_key_is_nowhere_and_what_is_remembered_is_beside_the_checkpoints(run):
    finished, _ = run
    files = [path for path in finished.run_dir.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if b"k3y-of-nobody" in path.read_bytes()] == []
    assert "k3y-of-nobody" not in finished.output
    beside = finished.run_dir.parent / "checkpoints" / "trackers.json"
    assert beside.read_text() == (finished.run_dir / "trackers.json").read_text()
    assert all(name in beside.read_text() for name in ("wandb", "mlflow", "tensorboard"))
