"""Rows that ``ifbench`` cannot check are told with their line, before anything starts."""

import json

import pyarrow as pa
from pyarrow import parquet

from miles.flags.facts import gather
from miles.flags.table import table

GOOD = {"record_id": 1, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"N": 1}]}
BAD = {"record_id": 2, "instruction_id_list": ["punctuation:no_coma"], "kwargs": [{"N": 1}]}


def row(metadata):
    return {"prompt": "p", "label": None, "metadata": metadata}


def jsonl(path, *metadata):
    path.write_text("".join(json.dumps(row(found)) + "\n" for found in metadata))
    return str(path)


def looked_at(path, **values):
    found = gather({**table().defaults(), "prompt_data": path, "rm_type": "ifbench", **values}, run_dir="r")
    return found.data[path].broken


def test_rows_that_can_be_checked(tmp_path):
    assert looked_at(jsonl(tmp_path / "p.jsonl", GOOD, {**GOOD, "kwargs": None}, {"rm_type": "f1"})) is None


def test_a_row_that_cannot_is_told_with_its_line(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", GOOD, GOOD, BAD)
    line, why = looked_at(path)
    assert line == 3
    assert "column 'metadata' (--metadata-key) is not what the row's reward needs" in why
    assert "ifbench cannot check: record 2: there is no instruction 'punctuation:no_coma' (near ids: punctuation" in why
    assert looked_at(path, rm_type=" boxed_ifbench")[0] == 3
    assert looked_at(path, rm_type="math") is None
    assert looked_at(path, custom_rm_path="json.loads") is None


def test_rows_without_metadata(tmp_path):
    assert looked_at(jsonl(tmp_path / "p.jsonl", GOOD, None))[0] == 2
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "p"}\n')
    assert looked_at(str(path))[0] == 1


def test_a_row_may_name_the_reward_itself(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", BAD, {**BAD, "rm_type": "ifbench"})
    assert looked_at(path, rm_type="f1")[0] == 2
    assert looked_at(path, rm_type=None)[0] == 2


def test_arguments_are_looked_at(tmp_path):
    _, why = looked_at(jsonl(tmp_path / "p.jsonl", {"instruction_id_list": ["count:numbers"], "kwargs": [{"N": "2"}]}))
    assert "'N' of count:numbers is not a number; it is '2'" in why


def test_rows_of_parquet(tmp_path):
    for name, metadata, rm_type in (
        ("named", [GOOD, {**BAD, "rm_type": "ifbench"}], "f1"),
        ("all", [GOOD, BAD], "ifbench"),
    ):
        path = str(tmp_path / f"{name}.parquet")
        parquet.write_table(pa.table({"prompt": ["p", "p"], "label": ["", ""], "metadata": metadata}), path)
        assert looked_at(path, rm_type=rm_type)[0] == 2, name
    assert looked_at(path, rm_type="f1") is None
    path = str(tmp_path / "none.parquet")
    parquet.write_table(pa.table({"prompt": ["p", "p"]}), path)
    assert looked_at(path)[0] == 1


def test_data_of_evaluations(tmp_path):
    path = jsonl(tmp_path / "e.jsonl", GOOD, BAD)
    entry = f"name: e, path: {path}, rm_type"
    override = "metadata_overrides: {instruction_id_list: [punctuation:no_comma]}"
    for text, line in ((f"{entry}: ifbench", 2), (f"{entry}: f1", None), (f"{entry}: ifbench, {override}", None)):
        (tmp_path / "e.yaml").write_text(f"eval:\n  datasets:\n  - {{{text}}}\n")
        values = {**table().defaults(), "eval_config": str(tmp_path / "e.yaml")}
        broken = gather(values, run_dir="r").data[path].broken
        assert (broken and broken[0]) == line, text
        assert gather({**values, "custom_rm_path": "json.loads"}, run_dir="r").data[path].broken is None


def test_labels_of_evaluations_without_a_reward_of_their_own_are_those_of_rm_type(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text('{"prompt": "p", "label": "x"}\n')
    (tmp_path / "e.yaml").write_text(f"eval:\n  datasets:\n  - {{name: e, path: {path}}}\n")
    values = {**table().defaults(), "eval_config": str(tmp_path / "e.yaml"), "rm_type": "dapo"}
    assert gather(values, run_dir="r").data[str(path)].broken[0] == 1
    assert gather({**values, "custom_rm_path": "json.loads"}, run_dir="r").data[str(path)].broken is None
