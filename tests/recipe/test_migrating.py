"""The page for people who come from Miles: what it says of flags, defaults, variables and modules is so."""

import importlib.util
import re
import subprocess

import pytest
from support.flag_cases import FACTS, RECIPE, outcome
from support.training_runs import ROOT

from miles.flags.config_file import apply_config
from miles.flags.parse import parse
from miles.flags.resolve import resolve
from miles.flags.table import table
from miles_launcher import flags as flags_command

PAGE = (ROOT / "docs" / "migrating-from-miles.md").read_text()
NOT_OF_TRAIN_PY = {"--help", "--json", "--runtime-env-json"}
ELSEWHERE = {"--sglang-", "--router-"}


def cells(title):
    """The rows of the table below a heading (or a line), as lists of cells."""
    below = PAGE[PAGE.index(title) :].splitlines()
    rows = []
    for line in below:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def test_every_flag_on_the_page_is_a_flag():
    text = re.sub(r"^(?:pkill|ray ).*$", "", PAGE, flags=re.MULTILINE)
    text = re.sub(r"^ *--runtime-env-json=.*$", "", text, flags=re.MULTILINE)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - NOT_OF_TRAIN_PY - ELSEWHERE
    known = table().by_name
    assert len(flags) > 30
    assert sorted(flag for flag in flags if flag not in known) == []


DEFAULTS = cells("## Defaults that differ")


@pytest.mark.parametrize(("name", "there", "here"), [(row[0].strip("`"), row[1], row[2]) for row in DEFAULTS])
def test_the_defaults_here_are_these_and_not_those(name, there, here):
    flag = table().by_name[name]
    assert str(flag.default) == {"unset": "None"}.get(here, here.strip("`"))
    assert there != here or "required" in there


@pytest.mark.parametrize("words", [row[0].strip("`") for row in cells("What you meet most often")])
def test_what_is_to_be_left_out_for_now_is_refused_today(words):
    name, *values = words.split()
    problems = {problem.flag: problem for problem in parse([name, *values], table()).problems}
    assert name in problems


def test_what_is_to_be_typed_instead_is_taken():
    assert not parse(["--attn-implementation", "flash_attention_2", "--resume", "auto"], table()).problems


def sources():
    """All of the code but the tests."""
    paths = (path for part in ("miles", "launcher", "controller", "agents") for path in (ROOT / part).rglob("*.py"))
    return "\n".join(path.read_text() for path in paths)


def test_variables_are_read_forwarded_or_ignored_as_the_page_says():
    from miles_controller.config import FORWARDED_NAMES, FORWARDED_PREFIXES

    code = sources()
    seen = {"read": 0, "ignored": 0, "forwarded": 0}
    for names, what in cells("## Environment variables"):
        word = re.match(r"\w+", what)[0]
        for name in re.findall(r"`([\w*]+)`", names):
            seen[word] += 1
            if word == "read":
                assert name in code, name
            elif word == "ignored":
                bare = name.rstrip("*")
                assert f'"{bare}' not in code or name.startswith("MASTER_"), name
            elif name == "*_proxy":
                assert {"http_proxy", "https_proxy", "no_proxy"} <= FORWARDED_NAMES
            else:
                assert name in FORWARDED_NAMES or name.rstrip("*") in FORWARDED_PREFIXES, name
    assert min(seen.values()) > 3


def test_modules_that_the_page_names_are_there_and_those_it_says_are_not_are_not():
    below = PAGE[PAGE.index("## Your Python") : PAGE.index("## What a run leaves")]
    for name in set(re.findall(r"`(miles(?:\.\w+)+)`", below)) - {"miles.ray"}:
        module, _, attribute = name.rpartition(".")
        assert importlib.util.find_spec(module) is not None, name
        found = importlib.import_module(module)
        assert hasattr(found, attribute) or importlib.util.find_spec(name) is not None, name
    assert importlib.util.find_spec("miles.ray") is None
    assert (ROOT / "train_async.py").exists()


def test_the_commands_that_ask_about_flags_answer(capsys):
    assert flags_command.main(["kl"]) == 0
    assert "--kl-loss-coef" in capsys.readouterr().out
    assert flags_command.main(["--json", "kl"]) == 0


def test_a_flag_without_effect_is_told():
    assert any("--eval-top-p" in notice and "no effect" in notice for notice in outcome("--eval-top-p 0.9").notices)


def test_a_file_of_values_counts_for_what_follows_from_them_and_may_have_keys_of_its_own():
    parsed = parse(RECIPE.split(), table())
    apply_config(parsed, table(), {"n_samples_per_prompt": 8, "mine": 3})
    config = resolve(parsed, table(), FACTS).config
    assert (config["rollout_batch_size"], config["global_batch_size"], config["mine"]) == (8, 64, 3)


def test_the_recipes_script_is_what_the_page_says():
    script = ROOT / "examples" / "recipe" / "run-qwen3-tiny-grpo.sh"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)
    lines = [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert not any(word in line for line in lines for word in ("pkill", "ray start", "ray job"))
