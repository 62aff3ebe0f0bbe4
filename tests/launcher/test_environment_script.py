"""scripts/environment.sh: which interpreter, and which torch."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "environment.sh"
GOOD, TOO_OLD = "exit 0", "exit 1"


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def bash(text, cwd, **env):
    return subprocess.run(
        ["/bin/bash", "-c", f". {SCRIPT}; {text}"], check=False, cwd=cwd, capture_output=True, text=True, timeout=30,
        env={**os.environ, **env},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("there", "named", "found"),
    [
        ({"python3": GOOD, "python3.14": GOOD, "python3.11": GOOD}, "", "python3.11"),
        ({"python3": GOOD, "python3.12": GOOD, "python3.11": TOO_OLD}, "", "python3.12"),
        ({"python3": GOOD}, "", "python3"),
        ({"python3.11": GOOD, "mine": GOOD}, "mine", "mine"),
        ({"python3": TOO_OLD}, "", None),
        ({"python3.11": GOOD, "mine": TOO_OLD}, "mine", None),
    ],
)
def test_the_tested_python_is_taken_before_others_and_a_named_one_before_all(tmp_path, there, named, found):
    for name, text in there.items():
        program(tmp_path / name, text)
    done = bash("find_python", tmp_path, PATH=str(tmp_path), PYTHON=named)
    assert done.stdout.strip() == (str(tmp_path / found) if found else "")
    assert (done.returncode == 0) is (found is not None)
    assert ("PYTHON=" in done.stderr) is (found is None)


def test_a_torch_of_another_version_is_replaced_first(tmp_path):
    """By pip itself, which is asked whatever is installed, and leaves alone what satisfies the pin."""
    program(tmp_path / ".venv" / "bin" / "python", f'echo "$@" >>{tmp_path}/asked')
    assert bash("install_for_cpu dev", tmp_path).returncode == 0
    asked = (tmp_path / "asked").read_text().splitlines()
    pip = "-m pip install -q -c scripts/requirements/torch.txt"
    assert asked == [
        f"{pip} -r scripts/requirements/torch.txt",
        f"{pip} --no-deps -r scripts/requirements/cpu-no-deps.txt",
        f"{pip} -r scripts/requirements/cpu.txt -e .[dev]",
    ]


def test_a_step_that_fails_ends_it(tmp_path):
    program(tmp_path / ".venv" / "bin" / "python", f'echo "$@" >>{tmp_path}/asked; exit 3')
    assert bash("install_for_cpu dev", tmp_path).returncode == 3
    assert len((tmp_path / "asked").read_text().splitlines()) == 1
