"""Flags of the reference system beyond the documented ones: types, defaults and choices, but for what differs here."""

import ast
from pathlib import Path

import pytest

from miles.flags.parse import parse
from miles.flags.table import table

ROWS = [line.split(" | ") for line in (Path(__file__).parent / "reference_flags.txt").read_text().splitlines()]
KINDS = {
    "int": {"int"},
    "float": {"float"},
    "str": {"str", "path"},
    "json": {"json"},
    "append": {"append", "str"},
    "flag": {"switch", "off", "tri"},
}
OTHER_DEFAULT = {
    "--num-gpus-per-node": None,  # what the machine has
    "--object-store-backend": "shm",
    "--pin-rollout-manager-to-head": True,
    "--extra-high-precision-layers-hf": [],
    "--extra-high-precision-layers-megatron": [],
    "--train-env-vars": {},
    "--apply-chat-template-kwargs": {},
}
OF_GENERATE_FUNCTIONS = {row[0] for row in ROWS} & {
    "--custom-agent-function-path",
    "--max-seq-len",
    "--generate-max-turns",
    "--generate-tool-specs-path",
    "--generate-tool-call-parser",
    "--generate-execute-tool-function-path",
}
"""A function adds them where it is used."""
IN_TABLE = [row for row in ROWS if row[0] not in OF_GENERATE_FUNCTIONS]


def typed(text):
    if text in {"on", "off"}:
        return text == "on"
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@pytest.mark.parametrize("row", IN_TABLE, ids=lambda row: row[0])
def test_a_flag_has_its_type_default_and_choices(row):
    name, kind, default, choices = [*row, ""][:4]
    flag = table().by_name[name]
    assert flag.kind in KINDS[kind]
    assert flag.default == OTHER_DEFAULT.get(name, typed(default))
    assert not choices or set(choices.split(",")) == set(map(str, flag.choices))
    assert flag.help


@pytest.mark.parametrize("name", sorted(OF_GENERATE_FUNCTIONS))
def test_flags_of_generate_functions_are_told_where_no_function_adds_them(name):
    (problem,) = parse([name, "1"], table()).problems
    assert (problem.flag, "--custom-generate-function-path" in problem.what) == (name, True)


def test_there_are_285():
    assert len(ROWS) == 285
