"""--custom-config-path: values from a file, before anything is derived from them."""

import base64
import json

import pytest

from miles.flags.config_file import apply_config, read_config
from miles.flags.parse import parse
from miles.flags.problems import Problem
from miles.flags.table import table


def applied(values, *words):
    parsed = parse(words, table())
    apply_config(parsed, table(), values)
    return parsed


def test_a_file_and_an_inline_one(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1.0e-5\ntool_key: null\n")
    assert read_config(str(tmp_path / "c.yaml")) == {"lr": 1e-5, "tool_key": None}
    assert read_config("base64:" + base64.b64encode(b"a: [1, 2]").decode()) == {"a": [1, 2]}
    (tmp_path / "empty.yaml").touch()
    assert read_config(str(tmp_path / "empty.yaml")) == {}


@pytest.mark.parametrize("text", ["[1]", "a: [", "1: 2"])
def test_what_is_no_mapping(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert isinstance(read_config(str(tmp_path / "c.yaml")), Problem)


@pytest.mark.parametrize("path", ["none.yaml", "base64:%%%", "base64:/w=="])
def test_what_cannot_be_read(path):
    assert "cannot be read" in read_config(path).what


def test_values_count_as_typed_and_win():
    parsed = applied({"lr": "1e-5", "rollout-batch-size": 4.0, "rollout_stop": ["a"], "colocate": True}, "--lr", "1")
    assert parsed.typed == {"lr": 1e-5, "rollout_batch_size": 4, "rollout_stop": ["a"], "colocate": True}
    assert any("--lr 1.0 is replaced by 1e-5" in notice for notice in parsed.notices)


def test_an_unknown_key_goes_to_user_code_and_is_told():
    parsed = applied({"mis_mode": "mask", "rolout_batch_size": 3})
    assert parsed.extra == {"mis_mode": "mask", "rolout_batch_size": 3}
    assert any("--rollout-batch-size is not meant?" in notice for notice in parsed.notices)


def test_what_a_flag_would_refuse_is_refused():
    parsed = applied({"allgather_cp": True, "lr": "fast", "optimizer": "lion"})
    told = {problem.flag: problem.what for problem in parsed.problems}
    assert set(told) == {f"--custom-config-path: {dest}" for dest in ("allgather_cp", "lr", "optimizer")}
    assert "context parallel" in told["--custom-config-path: allgather_cp"]


def test_a_refused_feature_may_be_said_to_be_off():
    parsed = applied({"allgather_cp": False, "lora_rank": 0})
    assert parsed.problems == []
    assert parsed.typed["allgather_cp"] is False


def test_what_needs_a_value_gets_one():
    """``null`` is no number; a name may be none."""
    parsed = applied({"lr": None, "micro_batch_size": None, "tool_key": None})
    assert [problem.flag for problem in parsed.problems] == [
        f"--custom-config-path: {d}" for d in ("lr", "micro_batch_size")
    ]
    assert parsed.problems[0].what == "needs a value; without one it is 1e-06"
    assert parsed.typed == {"tool_key": None}


def test_one_value_of_a_flag_that_takes_several():
    parsed = applied(
        {"rollout_stop": "abc", "env": "A=1", "eval_prompt_data": "/x.jsonl", "profile_target": "train_overall"}
    )
    assert parsed.problems == []
    assert parsed.typed == {
        "rollout_stop": ["abc"], "env": ["A=1"], "eval_prompt_data": ["/x.jsonl"], "profile_target": ["train_overall"],
    }  # fmt: skip
    assert applied({"env": {"A": 1, "B": "x=y"}}).typed["env"] == ["A=1", "B=x=y"]


def test_several_values_of_a_flag_that_takes_one():
    parsed = applied({"hf_checkpoint": ["/a", "/b"], "lr": {"begin": 1}, "optimizer": ["adam"]})
    assert [problem.what for problem in parsed.problems] == ["takes one value"] * 3


def test_a_file_does_not_name_another():
    parsed = applied({"custom-config-path": "other.yaml"})
    assert "stands in the file that it names" in parsed.problems[0].what
    assert parsed.typed == {}


def test_what_json_cannot_hold_is_a_problem_and_no_crash(tmp_path):
    """Dates, what holds itself, bytes; for flags of JSON, for lists, for user code. A flag of text takes a date."""
    (tmp_path / "c.yaml").write_text(
        "mine: &a [*a]\nstart: 2026-01-01\ntrain_env_vars: {A: 2026-01-01}\nlr: &b [*b]\nraw: !!binary aGk=\n"
        "wandb_run_name: 2026-01-01\nnested: {2026-01-01: 1}\n"
    )
    parsed = applied(read_config(str(tmp_path / "c.yaml")))
    assert {problem.flag.rpartition(" ")[2] for problem in parsed.problems} == {
        "mine", "start", "train_env_vars", "lr", "raw", "nested",
    }  # fmt: skip
    assert all("JSON cannot hold it" in problem.what for problem in parsed.problems)
    assert parsed.typed == {"wandb_run_name": "2026-01-01"}
    json.dumps([problem.as_dict() for problem in parsed.problems])
