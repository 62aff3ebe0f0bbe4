"""Every error that a person can see has a code of its own, and docs/errors.md explains every code."""

import importlib
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest

from miles_agents import errors
from miles_agents.errors import MilesError

ROOT = Path(__file__).parents[2]
PACKAGES = ("miles_agents", "miles_controller", "miles", "miles_launcher")
KINDS = {errors.ConfigError, errors.EnvironmentFault, errors.PeerFault, errors.UserCodeError, errors.InternalError}
PARTS = ("Means:", "Usually because:", "What to do:")


def modules():
    """All modules of the four packages but those that run something when imported, and the stand-ins for libraries,
    which are imported under the libraries' names."""
    for package in map(importlib.import_module, PACKAGES):
        yield package
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if found.name.rpartition(".")[2] != "__main__" and ".cpu_stand_ins." not in found.name:
                yield importlib.import_module(found.name)


def error_classes():
    """By qualified name, from the modules that define them: classes that are built at run time do not count."""
    return {
        f"{module.__name__}.{name}": value
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, MilesError) and value.__module__ == module.__name__
    }


def sections():
    """The part of docs/errors.md below each ``### E-...`` heading, by code."""
    text = (ROOT / "docs" / "errors.md").read_text()
    parts = re.split(r"^### (.+)$", text, flags=re.MULTILINE)[1:]
    codes = parts[::2]
    assert not [code for code, count in Counter(codes).items() if count > 1], "a heading occurs twice"
    return {
        code: re.split(r"^## ", section, flags=re.MULTILINE)[0]
        for code, section in zip(codes, parts[1::2], strict=True)
    }


def test_every_error_has_a_code_of_its_own():
    missing = [name for name, error in error_classes().items() if "code" not in vars(error)]
    assert not missing, f"without a code of its own: {missing}"
    by_code = Counter(error.code for error in error_classes().values())
    twice = {code: [n for n, e in error_classes().items() if e.code == code] for code, n in by_code.items() if n > 1}
    assert not twice, f"shared codes: {twice}"


def test_every_code_has_the_form_that_errors_md_describes():
    odd = {
        name: error.code for name, error in error_classes().items() if not re.fullmatch(r"E-[A-Z]+-\d{3}", error.code)
    }
    assert not odd


def test_every_error_is_of_one_of_the_five_kinds():
    odd = [
        name
        for name, error in error_classes().items()
        if error is not MilesError and len([kind for kind in KINDS if issubclass(error, kind)]) != 1
    ]
    assert not odd


def test_every_code_is_explained_and_nothing_else_is():
    codes = {error.code for error in error_classes().values()}
    assert codes - set(sections()) == set(), "codes without a section in docs/errors.md"
    assert set(sections()) - codes == set(), "sections in docs/errors.md without a class"


def test_every_section_names_its_class_and_has_the_three_parts():
    names = {error.code: name.rpartition(".")[2] for name, error in error_classes().items()}
    incomplete = {
        code: [part for part in (*PARTS, f"`{names.get(code)}`") if part not in section]
        for code, section in sections().items()
    }
    assert not {code: missing for code, missing in incomplete.items() if missing}


def test_an_error_shows_its_four_parts():
    error = errors.ConfigError("port 80 is taken", evidence="by nginx\npid 7", advice="Choose another.", port=80)
    assert str(error) == (
        "port 80 is taken\n"
        "  evidence: by nginx\n    pid 7\n"
        "  what to do: Choose another.\n"
        "  code: E-CFG-000 (docs/errors.md)"
    )
    assert error.fields == {"port": 80}


def test_an_error_without_evidence_or_advice_says_so():
    assert "evidence: none" in str(errors.InternalError("no"))
    assert "report it" in str(errors.InternalError("no"))


@pytest.mark.parametrize("kind", sorted(KINDS, key=lambda kind: kind.__name__))
def test_the_five_kinds_are_miles_errors(kind):
    assert issubclass(kind, MilesError)
