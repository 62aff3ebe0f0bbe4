"""The reference page, the list as JSON, and help: made of the table, complete, readable in narrow terminals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from miles.flags import document
from miles.flags.document import page
from miles.flags.flag import integer, refused
from miles.flags.help import render_help, render_list
from miles.flags.table import Table, spellings, table
from miles_launcher.flags import main as list_flags

DOCS = Path(document.__file__).parents[2] / "docs" / "flags.md"


def test_the_page_is_that_of_the_table():
    assert DOCS.read_text() == page(table()), "write it anew: python -m miles.flags.document"


def test_the_page_names_every_flag():
    text = page(table())
    assert [flag.name for flag in table().flags if f"`{flag.name}`" not in text] == []


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_help_fits_its_terminal_and_names_every_honoured_flag(width):
    text = render_help(table(), width)
    unbroken = max(len(name) for flag in table().flags for name in spellings(flag)) + 8
    assert max(map(len, text.splitlines())) <= max(width, unbroken)
    words = set(text.replace(",", " ").split())
    assert [flag.name for flag in table().flags if flag.status == "honoured" and flag.name not in words] == []


def test_every_flag_that_is_honoured_has_help():
    assert [flag.name for flag in table().flags if flag.status == "honoured" and len(flag.help) < 3] == []


def test_help_says_what_is_fixed_and_counts_what_is_refused():
    some = Table(
        [
            integer("--free", 1, "h", group="g"),
            refused(integer("--one", 1, "h", group="g"), "why", only=(1,)),
            refused(integer("--none", 1, "h", group="g"), "why"),
        ]
    )
    text = render_help(some, 80)
    assert "taken only so: --one 1" in text
    assert "refused: 1 more, which `miles flags 'g'` explains" in text
    assert render_list(some.flags, 80).count("refused: why") == 1


def listed(capsys, *words):
    status = list_flags(words)
    return status, capsys.readouterr()


def test_json_has_one_object_per_flag_with_a_status_of_two(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, told = listed(capsys, "--json", "rollout", "--lr", "moe-router-topk")
    rows = {row["name"]: row for row in json.loads(told.out)}
    assert status == 0
    assert rows["--lr"] == {
        "name": "--lr",
        "names": ["--lr"],
        "dest": "lr",
        "type": "float",
        "default": 1e-6,
        "choices": [],
        "nargs": None,
        "group": "optimizer",
        "help": "learning rate",
        "status": "honoured",
        "values": None,
        "reason": None,
        "stands_for": None,
        "source": "contract",
    }
    assert {row["status"] for row in rows.values()} == {"honoured", "refused"}
    assert all((row["values"] == []) == (row["status"] == "refused") for row in rows.values())
    assert all(row["reason"] for row in rows.values() if row["status"] == "refused")


def test_fixed_values_are_honoured_and_named(capsys):
    (row,) = json.loads(listed(capsys, "--json", "ckpt-format")[1].out)[:1]
    assert (row["status"], row["values"]) == ("honoured", ["torch_dist"])
    assert row["reason"]


def test_json_of_everything_has_the_flags_of_installed_packages(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from miles.flags.passthrough import _DISTRIBUTION, _FORMAT, cache_directory
    from miles.flags.passthrough import importlib as of_module

    cache_directory().mkdir(parents=True)
    version = of_module.metadata.version(_DISTRIBUTION["sglang"])
    row = {"names": ["--mem-fraction-static"], "dest": "mem", "kind": "float", "choices": [], "nargs": None}
    rows = [{**row, "default": None, "help": "share"}]
    (cache_directory() / f"sglang-{version}-{_FORMAT}.json").write_text(json.dumps(rows))
    found = {row["name"]: row for row in json.loads(listed(capsys, "--json")[1].out)}
    assert found["--sglang-mem-fraction-static"]["source"] == "sglang"
    assert found["--sglang-mem-fraction-static"]["help"] == "share"
    assert len([row for row in found.values() if row["source"] == "router"]) > 40


def test_a_group_is_listed_by_its_name_and_markdown_is_the_page(capsys):
    assert "--rollout-temperature" in listed(capsys, "sampling")[1].out
    assert listed(capsys, "--markdown")[1].out == page(table())


def test_help_shows_the_flags_that_user_code_adds(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def generate(): ...\n"
        "def add(parser): parser.add_argument('--my-depth', type=int, default=3, help='how deep it looks')\n"
        "generate.add_arguments = add\n"
    )
    train = Path(document.__file__).parents[2] / "train.py"
    command = [sys.executable, train, "--help", "--custom-generate-function-path", "mine.generate"]
    done = subprocess.run(
        command,
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "of mine.generate:\n  --my-depth MY_DEPTH" in done.stdout
    assert "how deep it looks" in done.stdout
