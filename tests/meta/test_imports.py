"""Who may import what, and what a light process must not load."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {name: ROOT / path for name, path in PYPROJECT["tool"]["setuptools"]["package-dir"].items()}


def test_imports_point_down_only():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    result = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_the_runtime_loads_neither_torch_nor_numpy():
    names = [
        ".".join((package, *path.relative_to(SOURCES[package]).with_suffix("").parts)).removesuffix(".__init__")
        for package in ("miles_agents", "miles_controller")
        for path in sorted(SOURCES[package].rglob("*.py"))
        if path.stem != "__main__"
    ]
    assert "miles_agents.errors" in names
    code = f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert set(names) <= loaded
    assert not loaded & {"torch", "numpy"}


def test_an_agent_loads_what_few_nodes_need_only_there():
    """NVML without a GPU, HTTP without a service: megabytes on every node, and time at every start."""
    code = "import sys, miles_agents.agent.main; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert not set(result.stdout.split()) & {"pynvml", "h11", "rich", "multiprocessing"}


def test_every_package_directory_is_listed():
    found = {
        ".".join((name, *path.parent.relative_to(root).parts))
        for name, root in SOURCES.items()
        for path in root.rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert found == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_every_package_directory_is_a_package():
    without = [
        str(path.parent.relative_to(ROOT))
        for root in SOURCES.values()
        for path in root.rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    ]
    assert not without


def test_no_top_level_package_says_that_it_is_typed_without_the_marker():
    assert [name for name, root in SOURCES.items() if not (root / "py.typed").exists()] == []
