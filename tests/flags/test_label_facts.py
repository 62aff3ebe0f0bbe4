"""Labels that a reward cannot use are told with their line, before anything starts."""

import json

import pyarrow as pa
from pyarrow import parquet

from miles.flags.facts import gather
from miles.flags.table import table


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def facts(tmp_path, *rows, **values):
    path = jsonl(tmp_path / "p.jsonl", *rows)
    found = gather({**table().defaults(), "prompt_data": str(path), "rm_type": "dapo", **values}, run_dir="r")
    return found.data[str(path)]


def test_dapo_takes_numbers_and_other_rewards(tmp_path):
    good = [{"prompt": "p", "label": label} for label in ("34", 34, 34.5, "1,234", "$7$", "-0")]
    assert facts(tmp_path, *good).broken is None
    other = {"prompt": "p", "label": "Paris", "metadata": {"rm_type": "f1"}}
    assert facts(tmp_path, good[0], other).broken is None
    assert facts(tmp_path, {"prompt": "p", "label": "x"}, rm_type="math").broken is None
    assert facts(tmp_path, {"prompt": "p", "label": "x"}, custom_rm_path="json.loads").broken is None


def test_what_is_no_number_is_told(tmp_path):
    rows = [{"prompt": "p", "label": "34"}, {"prompt": "p", "label": "\\frac12"}]
    line, why = facts(tmp_path, *rows).broken
    assert line == 2
    assert "'label' (--label-key) is not a number, as --rm-type dapo needs" in why
    assert "\\frac12" in why
    for label in (None, "nan", [1]):
        assert facts(tmp_path, {"prompt": "p", "label": label}, rm_type="boxed_dapo").broken[0] == 1


def test_rows_of_parquet(tmp_path):

    path = str(tmp_path / "p.parquet")
    parquet.write_table(pa.table({"prompt": ["p"] * 3, "label": ["1", "2", "three"]}), path)
    found = gather({**table().defaults(), "prompt_data": path, "rm_type": "dapo"}, run_dir="r").data[path]
    assert found.broken[0] == 3


def test_data_of_evaluations(tmp_path):
    path = jsonl(tmp_path / "e.jsonl", {"prompt": "p", "label": "x"})
    (tmp_path / "e.yaml").write_text(f"eval:\n  datasets:\n  - {{name: e, path: {path}, rm_type: dapo}}\n")
    found = gather({**table().defaults(), "eval_config": str(tmp_path / "e.yaml")}, run_dir="r")
    assert "(--eval-label-key) is not a number" in found.data[str(path)].broken[1]


def test_supervised_training_learns_something_of_each_row(tmp_path):
    rows = [{"prompt": "p", "label": "34"}, {"prompt": "p", "label": ""}]
    line, why = facts(tmp_path, *rows, loss_type="sft_loss").broken
    assert (line, "an answer to learn" in why) == (2, True)
    for more in (
        {"rollout_function_path": "my.rollout"},
        {"load_debug_rollout_data": "x"},
        {"loss_type": "policy_loss"},
    ):
        values = {"loss_type": "sft_loss", "rm_type": "math", **more}
        assert facts(tmp_path, *rows, **values).broken is None
