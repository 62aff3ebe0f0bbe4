"""Tests that need more of the machine than others: left out where it is missing, counted and named; in CI they fail."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.needs import report, split
from support.netns import NotAllowed

ROOT = Path(__file__).parents[2]


def item(name, *needs):
    marks = [SimpleNamespace(args=(need,)) for need in needs]
    return SimpleNamespace(nodeid=name, iter_markers=lambda kind: marks if kind == "needs" else [])


def test_what_needs_something_missing_is_left_out_with_its_reason_but_not_in_ci():
    plain, hosts, both = item("a"), item("b", "hosts"), item("c", "hosts", "slurm")
    needs = {"hosts": lambda: ["root", "ip"], "slurm": list}
    kept, left_out, out = split([plain, hosts, both], {}, needs)
    assert (kept, left_out, out) == ([plain], [("b", "root, ip"), ("c", "root, ip")], [hosts, both])
    assert split([plain, hosts, both], {"CI": "true"}, needs) == ([plain, hosts, both], [], [])
    assert split([both], {}, {"hosts": list, "slurm": list}) == ([both], [], [])


def test_what_the_machine_does_not_allow_is_left_out_and_named_in_ci_too():
    hosts, ssh = item("a", "hosts"), item("b", "ssh")
    needs = {"hosts": lambda: [NotAllowed("namespaces")], "ssh": lambda: ["sshd"]}
    assert split([hosts, ssh], {"CI": "true"}, needs) == ([ssh], [("a", "namespaces")], [hosts])


def test_the_report_counts_each_test_once_by_what_is_missing():
    told = report([("b", "root"), ("a", "root"), ("b", "root"), ("c", "slurmd")])
    assert told == [
        "2 tests left out, because this machine lacks: root", "  a", "  b",
        "1 tests left out, because this machine lacks: slurmd", "  c",
    ]  # fmt: skip
    assert report([]) == []


@pytest.mark.long
@pytest.mark.parametrize(("ci", "code", "told"), [("", 5, "tests left out"), ("true", 1, "iproute2")])
def test_a_session_on_a_machine_without_the_programs(tmp_path, ci, code, told):
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "1", "tests/hosts/test_network.py"]
    env = {**os.environ, "PATH": str(tmp_path), "CI": ci}
    done = subprocess.run(argv, cwd=ROOT, env=env, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    assert told in done.stdout and "(Debian: iproute2)" in done.stdout
