"""Weights & Biases offline, in the process of the trackers, read back from its file."""

import json
from pathlib import Path

import pytest
from support.fake_trackers import host_answers, remembered, run_info, said
from support.tracker_files import wandb_records, wandb_rows

from miles.tracking.wandb_tracker import identity

SETTINGS = {"wandb_mode": "offline", "wandb_project": "p", "wandb_group": "g", "wandb_key": "0" * 40}


def ran(tmp_path, *orders, before=None, how="finished", **settings):
    """Where the run was written, what is remembered, and the lines that were said."""
    tmp_path.mkdir(exist_ok=True)
    run = run_info(run_dir=str(tmp_path), settings={**SETTINGS, **settings}).as_dict()
    begin = {"do": "begin", "run": run, "before": {} if before is None else {"wandb": before}}
    finish = {"do": "finish", "outcome": how, "timeout_s": 30}
    answers, log = host_answers(tmp_path, ["wandb"], [begin, *orders, finish], WANDB_ERROR_REPORTING="false")
    lines = said(answers)
    assert "Traceback" not in log, log
    where = lines[0].removeprefix("Weights & Biases: ").removesuffix(" (offline)")
    return Path(where), remembered(answers)["wandb"], lines


def log(step, **metrics):
    return {"do": "log", "steps": {"rollout/step": step, "train/step": 2 * step}, "metrics": metrics, "time": 1e9}


@pytest.mark.full
def test_a_run_is_written_with_its_axes_its_config_and_its_answers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    row = {"dataset": "a", "prompt": "1", "response": "2", "label": None, "reward": 1.0}
    path, known, lines = ran(
        tmp_path,
        log(3, **{"train/loss": 0.5}),
        {"do": "examples", "step": 4, "rows": [row]},
        {"do": "artefact", "path": str(tmp_path / "config.json")},
        how="failed",
    )
    assert lines[1] == f"Weights & Biases: upload it with: wandb sync {path}"
    rows = wandb_rows(path)
    assert rows[0] | {"train/loss": "0.5", "rollout/step": "3", "train/step": "6"} == rows[0]
    assert rows[1]["eval/step"] == "4"
    (table,) = path.glob("files/media/table/eval/*.json")
    assert json.loads(table.read_text())["data"] == [["a", "1", "2", "None", "1.0"]]
    assert (path / "files" / "config.json").exists()
    records = wandb_records(path)
    axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert axes["train/*"] == "train/step"
    assert axes["eval/*"] == "eval/step"
    assert axes["*"] == "rollout/step"
    run = next(r.run for r in records if r.HasField("run"))
    assert (run.project, run.run_group, run.run_id) == ("p", "g", known["run_id"])
    assert run.display_name == f"g_{run.run_id}"
    assert {item.key: item.value_json for item in run.config.update}["lr"] == "0.001"
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1]
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"0" * 40 not in written


BEFORE = {"project": "p", "team": None, "host": None, "run_id": "abcd1234", "name": "old"}


@pytest.mark.parametrize(
    ("settings", "before", "run_id", "name"),
    [
        ({}, BEFORE, "abcd1234", "old"),
        ({"wandb_project": "q"}, BEFORE, None, "my-run"),
        ({"wandb_team": "t"}, BEFORE, None, "my-run"),
        ({"wandb_run_id": "typed"}, BEFORE, "typed", "my-run"),
        ({"wandb_run_id": "abcd1234"}, BEFORE, "abcd1234", "old"),
        ({"wandb_run_name": "n", "wandb_group": "g"}, {}, None, "n"),
        ({"wandb_group": "g"}, {}, None, "g"),
    ],
)
@pytest.mark.parametrize("suffix", [True, False])
def test_a_resumed_run_is_the_same_one_if_it_is_in_the_same_place(monkeypatch, settings, before, run_id, name, suffix):
    for variable in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    settings = {"wandb_project": "p", "wandb_random_suffix": suffix, **settings}
    found = identity(run_info(settings=settings), before)
    assert found["run_id"] == run_id or (run_id is None and found["run_id"] != "abcd1234")
    assert found["name"] == (f"{name}_{found['run_id']}" if suffix and name != "old" else name)
    assert found["project"] == settings["wandb_project"]
