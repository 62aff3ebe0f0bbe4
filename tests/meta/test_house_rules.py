"""Rules that keep the code readable, and the documents true."""

import ast
import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [ROOT / path for path in PYPROJECT["tool"]["setuptools"]["package-dir"].values()]
MODULES = sorted(path for root in SOURCES for path in root.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70
# `print` is the output of these; everything else logs, or returns what it has to say.
MAY_PRINT = {ROOT / "launcher/miles_launcher/cli.py"}


def name(path):
    return str(path.relative_to(ROOT))


def lines(path):
    return path.read_text().count("\n")


def test_there_is_something_to_look_at():
    assert len(MODULES) > 10
    assert len(TESTS) > 5
    assert len(DOCUMENTS) >= 4


def test_no_file_is_too_long():
    assert {name(path): lines(path) for path in (*MODULES, *TESTS) if lines(path) > MAX_FILE_LINES} == {}


def test_no_function_is_too_long():
    long = {
        f"{name(path)}:{node.lineno} {node.name}": length
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_only_the_command_line_prints():
    printing = [
        f"{name(path)}:{node.lineno}"
        for path in MODULES
        if path not in MAY_PRINT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_nothing_unpickles_and_nothing_is_left_to_do():
    words = re.compile(
        r"\b(import (cloudpickle|pickle|dill|marshal)|from (cloudpickle|pickle|dill|marshal)|TODO|FIXME)\b"
    )
    found = {name(path): match[0] for path in MODULES if (match := words.search(path.read_text()))}
    assert found == {}


def test_no_test_is_skipped():
    # Spelled in halves, so that this file does not find itself.
    words = re.compile(
        r"pytest\.(mark\.)?(skip|xfail|skipif|import" + r"orskip)\b|unittest\.mo" + r"ck|monkeypatch\.setattr"
    )
    found = {name(path): match[0] for path in TESTS if (match := words.search(path.read_text()))}
    assert found == {}


def test_the_installed_package_is_this_version():
    assert importlib.metadata.version("miles") == PYPROJECT["project"]["version"]


def test_the_changelog_has_a_place_for_what_is_not_released():
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()


def anchors(path):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_documents_mention_only_files_that_exist(document):
    """Paths in backticks that begin with one of our top directories."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines() if "/" in line}
    mentioned = re.findall(r"`([\w.-]+/[\w./-]*)[^`\n]*`", document.read_text())
    missing = [path for path in mentioned if path.split("/")[0] in top and not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("script", ["scripts/test.sh", ".ci/run"])
def test_scripts_can_be_run_and_parse(script):
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / script], check=True)
