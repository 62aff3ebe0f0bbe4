"""The benchmark of rewards runs, and has a figure for each line."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rewards.py"


@pytest.mark.full
def test_each_line_has_a_figure():
    command = [sys.executable, SCRIPT, "--seconds", "0.02"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    lines = result.stdout.splitlines()
    assert len(lines) == 9
    assert all(float(line.split()[-2].replace(",", "")) > 0 for line in lines)
